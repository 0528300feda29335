"""What drafts of free sources promise, what becomes of them, and drafts of several sources as one of the batch.

Shapes: R packed nodes of all sequences, K committed ones of a sequence, D hidden size.
"""

from bisect import bisect_right
from collections.abc import Sequence as SequenceOf
from typing import NamedTuple

import torch
from torch import Tensor

from kangaroo.drafters.base import MAX_NODES, Batch, Sequence, draft_roots
from kangaroo.drafters.earnings import BIN_STARTS, NUM_BINS, Chances
from kangaroo.drafters.ngrams import confidence_of
from kangaroo.model.cache import CachedPass
from kangaroo.types import Draft, Outcome

# What a step committed of a text: its tokens, and the states [K, D] that entered every tapped layer.
Step = tuple[tuple[int, ...], dict[int, Tensor]]
# What guesses are taken for whose source tells no confidence: the later, the surer, once those before were right.
_RANKS = [confidence_of(rank) for rank in range(MAX_NODES)]


class Offer(NamedTuple):
    """Tokens a second, the seconds of the step, and the first num_nodes nodes of a draft's row that promise them."""

    rate: float
    time_s: float
    draft: Draft | None = None
    row: int = 0
    num_nodes: int = 1


def judge(draft: Draft, row: int, *, chances: Chances, costs: tuple[float, float]) -> Offer:
    """What a free source's draft promises up to the first node that does not pay."""
    parents, rates, (base_s, row_s) = draft.parents[row], chances.rates, costs
    confidence = _RANKS if draft.confidence is None else draft.confidence[row]
    tokens, time_s, reached = 1.0, base_s + row_s, [1.0]
    for node in range(1, len(parents)):
        parent = parents[node]
        place = bisect_right(BIN_STARTS, confidence[node])
        chance = reached[parent] * rates[place + NUM_BINS if parent else place]
        if chance * time_s <= tokens * row_s:
            break
        reached.append(chance)
        tokens, time_s = tokens + chance, time_s + row_s
    return Offer(tokens / time_s, time_s, draft, row, len(reached))


def compare(draft: Draft, row: int, *, chances: Chances, tokens: SequenceOf[int]) -> None:
    """Learn from the text which guesses were right whose parents were, whether or not they were verified."""
    guessed, parents = draft.tokens[row], draft.parents[row]
    confidence = _RANKS if draft.confidence is None else draft.confidence[row]
    # The depths of the nodes that were right.
    right = {0: 0}
    for node in range(1, len(parents)):
        depth = right.get(parents[node], len(tokens))
        if depth < len(tokens):
            is_right = bool(guessed[node] == tokens[depth])
            place = bisect_right(BIN_STARTS, confidence[node])
            chances.add(place + NUM_BINS if depth else place, is_right=is_right)
            if is_right:
                right[node] = depth + 1


def merge_rows(batch: Batch, offers: dict[Sequence, Offer]) -> Draft:
    """One draft for the batch: what was offered for each row, roots alone where nothing was.

    Where a draft resumes at a later layer, the layers before are run for the nodes of all others.
    """
    roots = draft_roots(batch)
    if len(batch.sequences) == 1:
        offered = next(iter(offers.values()), None)
        if offered is None or offered.draft is None:
            return roots
        if offered.num_nodes == offered.draft.num_nodes[0]:
            return offered.draft
    rows = [
        (roots, row, 1) if (offer := offers.get(sequence)) is None or offer.draft is None
        else (offer.draft, offer.row, offer.num_nodes)
        for row, sequence in enumerate(batch.sequences)
    ]  # fmt: skip
    tokens = [_tokens(draft, row)[:count] for draft, row, count in rows]
    parents = [draft.parents[row][:count] for draft, row, count in rows]
    resume_layer = max(draft.resume_layer for draft, _, _ in rows)
    assert all(draft.resume_layer in (0, resume_layer) for draft, _, _ in rows), "sources resume at different layers"
    proposals = [{} if draft.proposals is None else draft.proposals[row] for draft, row, _ in rows]
    hidden = None
    if resume_layer > 0:
        lacking = [index for index, (draft, _, _) in enumerate(rows) if draft.hidden is None]
        fresh = _run_shallow(batch, lacking, tokens=tokens, parents=parents, stop=resume_layer)
        hidden = torch.cat(
            [fresh[index] if index in fresh else _states(*rows[index][:2]) for index in range(len(rows))]
        )
    return Draft(tokens, parents, resume_layer, hidden, proposals=proposals if any(proposals) else None)


def _run_shallow(batch: Batch, lacking: SequenceOf[int], *, tokens: SequenceOf[SequenceOf[int]],
                 parents: SequenceOf[SequenceOf[int]], stop: int) -> dict[int, Tensor]:  # fmt: skip
    """Layers [0, stop) over the nodes of the rows that lack their states, by row."""
    if not lacking:
        return {}
    target = batch.target
    counts = [len(parents[row]) for row in lacking]
    segments = [batch.segment(row, num_rows=len(parents[row]), parents=parents[row]) for row in lacking]
    entering = target.embed([token for row in lacking for token in tokens[row]])
    hidden, _ = target.forward(entering, (0, stop), attention=CachedPass(batch.cache, segments))
    return dict(zip(lacking, hidden.split(counts), strict=True))


def _tokens(draft: Draft, row: int) -> SequenceOf[int]:
    tokens = draft.tokens.tolist() if isinstance(draft.tokens, Tensor) else draft.tokens
    known: SequenceOf[int] = tokens[row][: draft.num_nodes[row]]
    return known


def _states(draft: Draft, row: int) -> Tensor:
    """A row's part of the packed states."""
    assert draft.hidden is not None, "a draft that resumes later has states"
    first = sum(draft.num_nodes[:row])
    return draft.hidden[first : first + draft.num_nodes[row]]


def join_steps(texts: SequenceOf[SequenceOf[Step]], layers: SequenceOf[int]) -> Outcome:
    """Several steps of every text as one, which had no other nodes; only the taps of these layers."""
    tokens = tuple(tuple(token for step in steps for token in step[0]) for steps in texts)
    taps = tuple({layer: torch.cat([step[1][layer] for step in steps]) for layer in layers} for steps in texts)
    return Outcome(tuple(tuple(range(len(one))) for one in tokens), tokens, taps)
