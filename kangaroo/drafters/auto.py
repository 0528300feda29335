"""Several drafters as one: every step asks the one that earns most, and the next where it has nothing to say.

What a source earns is measured: tokens emitted by the steps it drafted for over the time those took, from asking to
acceptance, remembered with exponential forgetting for every text on its own.
Shapes: B sequences, R packed nodes of all sequences, D hidden size.
"""

import time
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kangaroo.drafters.base import Batch, Drafter, Sequence, draft_roots
from kangaroo.model.cache import CachedPass
from kangaroo.types import Draft, Outcome

# How much an older step counts for after each newer one.
DECAY = 0.9
# Steps of a text between two tries of a source that is not the best.
TRY_EVERY = 24


@dataclass
class _Earnings:
    """Tokens and seconds of the steps a source drafted for, recent ones counting most."""

    tokens: float = 0.0
    time_s: float = 0.0

    @property
    def tokens_per_s(self) -> float:
        """The rate; a source that was never asked is worth a try."""
        return self.tokens / self.time_s if self.time_s > 0 else float("inf")

    def add(self, num_tokens: int, time_s: float) -> None:
        self.tokens = DECAY * self.tokens + num_tokens
        self.time_s = DECAY * self.time_s + time_s


@dataclass
class _Memory:
    """What is held per sequence: every source's earnings, who drafted last, and for how many steps none was tried."""

    earnings: list[_Earnings]
    asked: int | None = None
    since_try: int = 0
    num_tries: int = 0


class AutoDrafter:
    """Chooses among drafters for every text and step; earlier ones are asked first as long as nothing is known."""

    name = "auto"

    def __init__(self, sources: SequenceOf[Drafter]) -> None:
        """sources: those that cost nothing to ask first."""
        self.taps: tuple[int, ...] = tuple(sorted({layer for source in sources for layer in source.taps}))
        self._sources = tuple(sources)
        self._overall = [_Earnings() for _ in sources]
        self._memory: dict[Sequence, _Memory] = {}
        self._started_s = 0.0

    def begin(self, sequences: SequenceOf[Sequence], *, num_slots: int) -> None:
        """Make room in every source; a new text starts from what others taught."""
        for source in self._sources:
            source.begin(sequences, num_slots=num_slots)
        for sequence in sequences:
            # A few steps of the text itself outweigh what it starts from.
            known = [replace(one, tokens=one.tokens / 4, time_s=one.time_s / 4) for one in self._overall]
            self._memory[sequence] = _Memory(known)

    def draft(self, batch: Batch) -> Draft:
        """One draft of the guesses of whichever source each sequence is best served by."""
        self._started_s = time.perf_counter()
        waiting = {sequence: self._rank(sequence) for sequence in batch.sequences if sequence.max_draft > 0}
        drafts: dict[Sequence, tuple[Draft, int]] = {}
        while waiting:
            # All sequences whose next choice is the same source are asked together.
            index = next(iter(waiting.values()))[0]
            asking = [sequence for sequence, order in waiting.items() if order[0] == index]
            draft = self._sources[index].draft(replace(batch, sequences=asking))
            for row, sequence in enumerate(asking):
                if draft.num_nodes[row] > 1:
                    drafts[sequence] = (draft, row)
                    self._memory[sequence].asked = index
                    del waiting[sequence]
                elif len(waiting[sequence]) > 1:
                    del waiting[sequence][0]
                else:
                    del waiting[sequence]
        return _merge(batch, drafts)

    def accept(self, sequences: SequenceOf[Sequence], outcome: Outcome) -> None:
        """Tell every source what was committed, and count what the asked one earned."""
        elapsed_s = (time.perf_counter() - self._started_s) / len(sequences)
        for sequence, tokens in zip(sequences, outcome.tokens, strict=True):
            memory = self._memory[sequence]
            if memory.asked is not None:
                for earnings in (memory.earnings[memory.asked], self._overall[memory.asked]):
                    earnings.add(len(tokens), elapsed_s)
            memory.asked = None
        for source in self._sources:
            source.accept(sequences, outcome)

    def end(self, sequences: SequenceOf[Sequence]) -> None:
        """Forget these sequences."""
        for source in self._sources:
            source.end(sequences)
        for sequence in sequences:
            self._memory.pop(sequence, None)

    def _rank(self, sequence: Sequence) -> list[int]:
        """The sources in the order to ask them: the best earner first, from time to time the others before it."""
        memory = self._memory[sequence]
        order = sorted(range(len(self._sources)), key=lambda index: -memory.earnings[index].tokens_per_s)
        memory.since_try += 1
        if memory.since_try >= TRY_EVERY:
            memory.since_try = 0
            # Each of the others in its turn.
            first = order.pop(1 + memory.num_tries % (len(order) - 1)) if len(order) > 1 else order.pop()
            memory.num_tries += 1
            order.insert(0, first)
        return order


def _merge(batch: Batch, drafts: dict[Sequence, tuple[Draft, int]]) -> Draft:
    """One draft for the batch: rows of their own drafts, roots alone where there is none.

    Where a draft resumes at a later layer, the layers before are run for the nodes of all others.
    """
    roots = draft_roots(batch)
    rows = [drafts.get(sequence, (roots, row)) for row, sequence in enumerate(batch.sequences)]
    tokens = [_tokens(draft, row) for draft, row in rows]
    parents = [draft.parents[row] for draft, row in rows]
    resume_layer = max(draft.resume_layer for draft, _ in rows)
    assert all(draft.resume_layer in (0, resume_layer) for draft, _ in rows), "sources resume at different layers"
    proposals = [{} if draft.proposals is None else draft.proposals[row] for draft, row in rows]
    hidden = None
    if resume_layer > 0:
        lacking = [index for index, (draft, _) in enumerate(rows) if draft.hidden is None]
        fresh = _run_shallow(batch, lacking, tokens=tokens, parents=parents, stop=resume_layer)
        hidden = torch.cat([fresh[index] if index in fresh else _states(*rows[index]) for index in range(len(rows))])
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
