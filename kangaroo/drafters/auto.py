"""Several drafters as one: every step takes the draft that promises most tokens a second.

Free drafters only look things up. They are asked first, and what they guessed is compared with the text whether or not
it was verified: how often they are right at every depth, given the confidence of their first guess, is learned from
all steps. Each of their chains is cut where one more node stops paying. A drafter that runs a model is judged by what
its own steps brought, and asked where that beats what the free ones have to offer.
Time is a line through what recent steps took, by the rows they verified.
Shapes: B sequences, R packed nodes of all sequences, D hidden size.
"""

import math
import time
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from torch import Tensor

from kangaroo.drafters.base import Batch, Drafter, Prices, Sequence, draft_roots, is_chain
from kangaroo.drafters.earnings import Chances, Earnings, StepCost
from kangaroo.model.cache import CachedPass, depths_of
from kangaroo.types import Draft, Outcome

# Free sources are asked in turn until one promises so many times what plain decoding brings.
ENOUGH = 2.0
# Steps of a text between two tries of a source that does not win, doubled by each that fails.
MIN_PATIENCE, MAX_PATIENCE = 8, 256
# Confidences c are told apart by -log2(1 - c), rounded, up to this: a lookup's is the length of its match.
MAX_BITS = 8


@dataclass
class _Offer:
    """Tokens a second, and the first num_nodes nodes of a draft's row that promise them; the root alone without one."""

    rate: float
    draft: Draft | None = None
    row: int = 0
    num_nodes: int = 1


class _Asked(NamedTuple):
    """What a source with a model drafted for a sequence, and its part of the time; arguments of Earnings.add()."""

    source: int
    num_nodes: int
    draft_s: float
    is_steady: bool


@dataclass
class _Memory:
    """What is held per sequence.

    chances: of each free source, by the bits of its confidence; said: what those guessed in this step. earnings: of
    each source with a model; waited, patience: the steps since it was asked, and those it waits for a try. asked: which
    one was asked in this step; last_source: which in the step before.
    """

    earnings: list[Earnings]
    waited: list[int]
    patience: list[int]
    chances: dict[tuple[int, int], Chances] = field(default_factory=dict)
    said: list[tuple[Chances, Draft, int]] = field(default_factory=list)
    asked: _Asked | None = None
    last_source: int | None = None

    def choose(self, offer: _Offer, *, costs: tuple[float, float], enough: float) -> int | None:
        """The source with a model that beats what the free ones offer, or is due for a try."""
        best, best_rate = None, offer.rate
        for index, earnings in enumerate(self.earnings):
            self.waited[index] += 1
            is_due = self.waited[index] > self.patience[index] and offer.rate < enough
            rate = math.inf if is_due else earnings.rate(costs)
            if rate > best_rate:
                best, best_rate = index, rate
        if best is not None:
            self.waited[best] = 0
            self.patience[best] = min(2 * self.patience[best], MAX_PATIENCE) if best_rate == math.inf else MIN_PATIENCE
        return best


class AutoDrafter:
    """Chooses among drafters for every text and step."""

    name = "auto"

    def __init__(self, free: SequenceOf[Drafter], models: SequenceOf[Drafter] = ()) -> None:
        """free: those that cost next to nothing and hold nothing of what they drafted; models: those that run one."""
        self._free, self._models = tuple(free), tuple(models)
        self._sources = (*self._free, *self._models)
        self.taps: tuple[int, ...] = tuple(sorted({layer for source in self._sources for layer in source.taps}))
        # What all texts taught.
        self._chances: dict[tuple[int, int], Chances] = {}
        self._earnings = [Earnings() for _ in models]
        self._cost = StepCost()
        self._memory: dict[Sequence, _Memory] = {}
        self._started_s, self._asked_s, self._num_rows = 0.0, 0.0, 0

    def begin(self, sequences: SequenceOf[Sequence], *, num_slots: int) -> None:
        """Make room in every source; a new text starts from what others taught."""
        for source in self._sources:
            source.begin(sequences, num_slots=num_slots)
        for sequence in sequences:
            known = [earnings.share() for earnings in self._earnings]
            self._memory[sequence] = _Memory(known, [0] * len(known), [MIN_PATIENCE] * len(known))

    def draft(self, batch: Batch) -> Draft:
        """One draft of what promises most for each sequence."""
        self._started_s, self._asked_s = time.perf_counter(), 0.0
        base_s, row_s = self._cost.fit(batch.prices.branch)
        costs = base_s / len(batch.sequences), row_s
        plain = 1 / sum(costs)
        price = min(1.0, row_s * plain)
        # One price for all nodes, or trees would lose their likeliest and keep its siblings.
        batch = replace(batch, prices=Prices(price, price if batch.prices.chain else 0.0))
        offers = {sequence: _Offer(plain) for sequence in batch.sequences if sequence.max_draft > 0}
        for index, source in enumerate(self._free):
            asking = [sequence for sequence, offer in offers.items() if offer.rate < ENOUGH * plain]
            if not asking:
                break
            draft = source.draft(replace(batch, sequences=asking))
            for row, sequence in enumerate(asking):
                if draft.num_nodes[row] > 1:
                    chances = self._listen(index, draft, row=row, sequence=sequence)
                    offer = _judge(draft, row, chances=chances, costs=costs)
                    offers[sequence] = max(offers[sequence], offer, key=lambda one: one.rate)
        chosen = {
            sequence: self._memory[sequence].choose(offer, costs=costs, enough=ENOUGH * plain)
            for sequence, offer in offers.items()
        }
        for index in range(len(self._models)):
            asking = [sequence for sequence, choice in chosen.items() if choice == index]
            if asking:
                offers.update(self._ask(index, replace(batch, sequences=asking)))
        draft = _merge(batch, offers)
        self._num_rows = sum(draft.num_nodes)
        return draft

    def accept(self, sequences: SequenceOf[Sequence], outcome: Outcome) -> None:
        """Tell every source what was committed, and learn what it says of their guesses."""
        if self._num_rows:
            self._cost.add(self._num_rows, time.perf_counter() - self._started_s - self._asked_s)
            self._num_rows = 0
        for sequence, tokens in zip(sequences, outcome.tokens, strict=True):
            memory = self._memory[sequence]
            for chances, draft, row in memory.said:
                _compare(draft, row, chances=chances, tokens=tokens)
            memory.last_source = None
            if memory.asked is not None:
                memory.last_source, num_nodes, draft_s, is_steady = memory.asked
                # Where it drafted nothing, what a free source's draft brought is not its own.
                num_tokens = len(tokens) if num_nodes > 1 else 1
                for earnings in (memory.earnings[memory.last_source], self._earnings[memory.last_source]):
                    earnings.add(num_tokens, num_nodes, draft_s=draft_s, is_steady=is_steady)
            memory.said, memory.asked = [], None
        for source in self._sources:
            source.accept(sequences, outcome)

    def end(self, sequences: SequenceOf[Sequence]) -> None:
        """Forget these sequences."""
        for source in self._sources:
            source.end(sequences)
        for sequence in sequences:
            self._memory.pop(sequence, None)

    def _listen(self, index: int, draft: Draft, *, row: int, sequence: Sequence) -> Chances:
        """The chances of a free source's guesses; what it said is kept, to be compared with the text."""
        doubt = 1.0 if draft.confidence is None else 1 - draft.confidence[row][1]
        key = index, min(MAX_BITS, round(-math.log2(max(doubt, 2**-MAX_BITS))))
        memory = self._memory[sequence]
        chances = memory.chances.get(key)
        if chances is None:
            chances = memory.chances[key] = Chances(self._chances.setdefault(key, Chances()))
        memory.said.append((chances, draft, row))
        return chances

    def _ask(self, index: int, batch: Batch) -> dict[Sequence, _Offer]:
        """What a source with a model drafts, and for whom."""
        started_s = time.perf_counter()
        draft = self._models[index].draft(batch)
        draft_s = time.perf_counter() - started_s
        self._asked_s += draft_s
        # As in engine/pace.py: catching up with the text is no part of what drafting costs from then on.
        is_steady = all(self._memory[sequence].last_source == index for sequence in batch.sequences)
        offers = {}
        for row, (sequence, count) in enumerate(zip(batch.sequences, draft.num_nodes, strict=True)):
            self._memory[sequence].asked = _Asked(index, count, draft_s / len(batch.sequences), is_steady)
            if count > 1:
                offers[sequence] = _Offer(math.inf, draft, row, count)
        return offers


def _judge(draft: Draft, row: int, *, chances: Chances, costs: tuple[float, float]) -> _Offer:
    """What a free source's draft promises; a chain is cut behind the last node that pays."""
    parents, (base_s, row_s) = draft.parents[row], costs
    tokens, chance, num_nodes = 1.0, 1.0, len(parents)
    time_s = base_s + row_s
    if not is_chain(parents):
        for depth in range(max(depths_of(parents))):
            chance *= chances.at(depth)
            tokens += chance
        return _Offer(tokens / (base_s + row_s * num_nodes), draft, row, num_nodes)
    for node in range(1, num_nodes):
        chance *= chances.at(node - 1)
        if chance * time_s <= tokens * row_s:
            num_nodes = node
            break
        tokens, time_s = tokens + chance, time_s + row_s
    return _Offer(tokens / time_s, draft, row, num_nodes)


def _compare(draft: Draft, row: int, *, chances: Chances, tokens: SequenceOf[int]) -> None:
    """Learn from the text how deep a draft was right, whether or not it was verified."""
    guessed, parents, node = draft.tokens[row], draft.parents[row], 0
    for depth, token in enumerate(tokens):
        children = [child for child in range(node + 1, len(parents)) if parents[child] == node]
        if not children:
            return
        node = next((child for child in children if guessed[child] == token), 0)
        chances.add(depth, is_right=node > 0)
        if node == 0:
            return


def _merge(batch: Batch, offers: dict[Sequence, _Offer]) -> Draft:
    """One draft for the batch: what was offered for each row, roots alone where nothing was.

    Where a draft resumes at a later layer, the layers before are run for the nodes of all others.
    """
    roots = draft_roots(batch)
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
