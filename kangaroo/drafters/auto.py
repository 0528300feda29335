"""Several drafters as one: every step takes the draft that promises most tokens a second.

Free drafters only look things up. They are asked first, and what they guessed is compared with the text whether or not
it was verified: how often they are right, given the confidence of a guess, is learned from all steps. Each of their
drafts is cut before the first node that does not pay. A drafter that runs a model is judged by what its own steps
brought, and asked where that beats what the free ones have to offer; tries may lose a small share of the time, and
while it saves next to nothing it sits texts out.
Time is a line through what recent steps took, by the rows they verified. Shapes are the host's.
"""

import math
import time
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field
from typing import NamedTuple

from kangaroo.drafters.base import Batch, Drafter, Prices, Sequence
from kangaroo.drafters.earnings import Budget, Chances, Earnings, Gains, Standing, StepCost
from kangaroo.drafters.offers import Offer, Step, compare, join_steps, judge, merge_rows
from kangaroo.types import Draft, Outcome

# Nothing more is asked or tried where a step promises so many times what plain decoding brings.
ENOUGH = 2.0
# Steps of a text between two tries of a source that does not win, doubled by each that fails; besides, all tries
# together have a budget.
MIN_PATIENCE, MAX_PATIENCE = 8, 256
# Steps that a source with a model is told of together at most.
MAX_UNTOLD = 64


class _Asked(NamedTuple):
    """What a source with a model drafted for a sequence, and its part of the time; arguments of Earnings.add().

    offered: the tokens a second it had to beat.
    """

    source: int
    offered: float
    num_nodes: int
    draft_s: float
    is_steady: bool


@dataclass
class _Memory:
    """What is held per sequence.

    chances: of each free source; said: what those guessed in this step. earnings: of each source with a model; waited,
    patience: the steps since it was asked, and those it waits for a try; untold: the tokens and taps it has not been
    told of, None where it takes no part. asked: which one was asked in this step; known: those that ever were. time_s,
    won_s: what its steps took, and what each source with a model saved of that.
    """

    chances: list[Chances]
    earnings: list[Earnings]
    waited: list[int]
    patience: list[int]
    untold: list[list[Step] | None]
    won_s: list[float]
    said: list[tuple[Chances, Draft, int]] = field(default_factory=list)
    asked: _Asked | None = None
    known: set[int] = field(default_factory=set)
    time_s: float = 0.0

    def choose(self, rate: float, *, costs: tuple[float, float], may_try: bool) -> int | None:
        """The source with a model that beats this rate, or one to be tried; the first time in a text is a try."""
        best, best_rate = None, rate
        for index, earnings in enumerate(self.earnings):
            self.waited[index] += 1
            if self.untold[index] is not None and (may_try or index in self.known):
                is_due = may_try and self.waited[index] > self.patience[index]
                earned = math.inf if is_due else earnings.rate(costs)
                if earned > best_rate:
                    best, best_rate = index, earned
        if best is not None:
            self.waited[best] = 0
            self.patience[best] = min(2 * self.patience[best], MAX_PATIENCE) if best_rate == math.inf else MIN_PATIENCE
        return best


class AutoDrafter:
    """Chooses among drafters for every text and step."""

    name = "auto"

    def __init__(self, free: SequenceOf[Drafter], models: SequenceOf[Drafter] = ()) -> None:
        """free: those that hold nothing of what they drafted, the first at next to no cost; models: those that run one.

        The first of the free ones is asked in every step, the others where that has been found to pay.
        """
        self._free, self._models = tuple(free), tuple(models)
        self._sources = (*self._free, *self._models)
        self.taps = _taps(self._sources)
        # What all texts taught.
        self._chances = [Chances() for _ in free]
        self._gains, self._idle = [Gains() for _ in free], [0] * len(free)
        self._earnings, self._standings = [Earnings() for _ in models], [Standing() for _ in models]
        self._cost, self._budget = StepCost(), Budget()
        self._memory: dict[Sequence, _Memory] = {}
        self._started_s, self._asked_s, self._lost_s, self._num_rows = 0.0, 0.0, 0.0, 0
        self._costs = 1.0, 0.0

    def begin(self, sequences: SequenceOf[Sequence], *, num_slots: int) -> None:
        """Make room in every source; a new text starts from what others taught."""
        for source in self._free:
            source.begin(sequences, num_slots=num_slots)
        for sequence in sequences:
            chances, earnings = list(map(Chances, self._chances)), [one.share() for one in self._earnings]
            untold: list[list[Step] | None] = [[] if one.take_part() else None for one in self._standings]
            num = len(earnings)
            self._memory[sequence] = _Memory(chances, earnings, [0] * num, [MIN_PATIENCE] * num, untold, [0.0] * num)
        for index, source in enumerate(self._models):
            if own := self._those_with(index, sequences):
                source.begin(own, num_slots=num_slots)
        self._choose_taps()

    def draft(self, batch: Batch) -> Draft:
        """One draft of what promises most for each sequence."""
        self._started_s, self._asked_s, self._lost_s = time.perf_counter(), 0.0, 0.0
        base_s, row_s = self._cost.fit(batch.prices.branch)
        self._costs = base_s, row_s = base_s / len(batch.sequences), row_s
        plain = Offer(1 / (base_s + row_s), base_s + row_s)
        offers = {sequence: plain for sequence in batch.sequences if sequence.max_draft > 0}
        for index in range(len(self._free)):
            self._idle[index] += 1
            asking = [sequence for sequence, offer in offers.items() if self._pays(index, offer.rate * plain.time_s)]
            if asking:
                self._look_up(index, batch, asking=asking, offers=offers)
        if self._models:
            chosen: dict[int, list[Sequence]] = {}
            for sequence, offer in offers.items():
                may_try = self._budget.is_open and offer.rate < ENOUGH * plain.rate
                choice = self._memory[sequence].choose(offer.rate, costs=self._costs, may_try=may_try)
                if choice is not None:
                    chosen.setdefault(choice, []).append(sequence)
            for index, asking in chosen.items():
                self._ask(index, batch, asking=asking, offers=offers)
        draft = merge_rows(batch, offers)
        self._num_rows = sum(draft.num_nodes)
        return draft

    def accept(self, sequences: SequenceOf[Sequence], outcome: Outcome) -> None:
        """Tell every source what was committed, and learn what it says of their guesses."""
        for sequence, tokens in zip(sequences, outcome.tokens, strict=True):
            memory = self._memory[sequence]
            for chances, draft, row in memory.said:
                compare(draft, row, chances=chances, tokens=tokens)
            memory.said.clear()
            if memory.asked is not None:
                self._learn(memory, memory.asked, num_tokens=len(tokens))
        for source in self._free:
            source.accept(sequences, outcome)
        for index in range(len(self._models)):
            self._tell(index, sequences, outcome=outcome)
        if self._num_rows:
            time_s = time.perf_counter() - self._started_s
            for sequence in sequences:
                self._memory[sequence].time_s += time_s / len(sequences)
            self._cost.add(self._num_rows, time_s - self._asked_s)
            self._budget.add(time_s, self._lost_s)
            self._num_rows = 0

    def end(self, sequences: SequenceOf[Sequence]) -> None:
        """Forget these sequences."""
        for source in self._free:
            source.end(sequences)
        for index, source in enumerate(self._models):
            for sequence in self._those_with(index, sequences):
                memory = self._memory[sequence]
                self._standings[index].add(memory.won_s[index], memory.time_s)
            source.end(sequences)
        for sequence in sequences:
            self._memory.pop(sequence, None)
        self._choose_taps()

    def _those_with(self, index: int, sequences: SequenceOf[Sequence]) -> list[Sequence]:
        """The sequences that a source with a model takes part in."""
        held = self._memory
        return [sequence for sequence in sequences if sequence in held and held[sequence].untold[index] is not None]

    def _choose_taps(self) -> None:
        """Have only those states handed over that somebody wants."""
        models = [source for index, source in enumerate(self._models) if self._those_with(index, list(self._memory))]
        self.taps = _taps((*self._free, *models))

    def _pays(self, index: int, worth: float) -> bool:
        """Whether to ask a free source where a step is worth so many plain ones without it."""
        if index == 0:
            return True
        if worth >= ENOUGH:
            return False
        return self._gains[index].at(worth) > 1 or (self._idle[index] > MIN_PATIENCE and self._budget.is_open)

    def _look_up(self, index: int, batch: Batch, *, asking: list[Sequence], offers: dict[Sequence, Offer]) -> None:
        """Ask a free source, and put what it offers where that is better."""
        started_s = time.perf_counter()
        draft = self._free[index].draft(self._narrow(batch, offers, asking=asking))
        draft_s = 0.0
        if index:
            draft_s = (time.perf_counter() - started_s) / len(asking)
            self._asked_s += draft_s * len(asking)
            self._idle[index] = 0
        for row, sequence in enumerate(asking):
            before = best = offers[sequence]
            if draft.num_nodes[row] > 1:
                memory = self._memory[sequence]
                chances = memory.chances[index]
                memory.said.append((chances, draft, row))
                offer = judge(draft, row, chances=chances, costs=self._costs)
                if offer.rate > before.rate:
                    offers[sequence] = best = offer
            if index:
                gain = best.rate / before.rate * best.time_s / (best.time_s + draft_s)
                worth = before.rate * sum(self._costs)
                if self._gains[index].at(worth) <= 1:
                    self._lost_s += draft_s
                self._gains[index].add(worth, gain)

    def _ask(self, index: int, batch: Batch, *, asking: list[Sequence], offers: dict[Sequence, Offer]) -> None:
        """Ask a source with a model, and put what it drafted in the place of other offers."""
        started_s = time.perf_counter()
        # As in engine/pace.py: catching up with the text is no part of what drafting costs from then on.
        memories = [self._memory[sequence] for sequence in asking]
        is_steady = all(index in memory.known and not memory.untold[index] for memory in memories)
        self._catch_up(index, asking)
        draft = self._models[index].draft(self._narrow(batch, offers, asking=asking))
        draft_s = time.perf_counter() - started_s - (draft.verified.time_s if draft.verified else 0.0)
        self._asked_s += draft_s
        for row, (sequence, memory, count) in enumerate(zip(asking, memories, draft.num_nodes, strict=True)):
            memory.asked = _Asked(index, offers[sequence].rate, count, draft_s / len(asking), is_steady)
            memory.known.add(index)
            if count > 1:
                offers[sequence] = Offer(math.inf, math.inf, draft, row, count)

    def _narrow(self, batch: Batch, offers: dict[Sequence, Offer], *, asking: list[Sequence]) -> Batch:
        """The batch of those who ask, at the price of a node where they have these offers already."""
        price = min(1.0, self._costs[1] * min([offers[sequence].rate for sequence in asking]))
        # One price for all nodes, or trees would lose their likeliest and keep its siblings.
        prices = Prices(price, price if batch.prices.chain else 0.0)
        # Of several sequences, others may take drafts from elsewhere.
        return Batch(batch.target, batch.cache, asking, prices, batch.taps if len(batch.sequences) == 1 else None)

    def _tell(self, index: int, sequences: SequenceOf[Sequence], *, outcome: Outcome) -> None:
        """Tell a source with a model what was committed; where it was not asked, only once that is needed or much."""
        now: list[int] = []
        late: list[Sequence] = []
        for row, sequence in enumerate(sequences):
            memory = self._memory[sequence]
            untold = memory.untold[index]
            if untold is None:
                continue
            if not self._num_rows or (memory.asked is not None and memory.asked.source == index):
                # Of prompts it may have to make something, and plain steps follow one another.
                now.append(row)
                memory.asked = None
            else:
                # Views would keep the states of the whole pass.
                taps = {layer: outcome.taps[row][layer].clone() for layer in self._models[index].taps}
                untold.append((outcome.tokens[row], taps))
                if len(untold) >= MAX_UNTOLD:
                    late.append(sequence)
        self._catch_up(index, late if self._num_rows else sequences)
        if now:
            own = Outcome(
                tuple(outcome.paths[row] for row in now),
                tuple(outcome.tokens[row] for row in now),
                tuple(outcome.taps[row] for row in now),
            )
            self._models[index].accept([sequences[row] for row in now], own)

    def _catch_up(self, index: int, sequences: SequenceOf[Sequence]) -> None:
        """Tell a source with a model of the steps in which it was not asked."""
        untold = {sequence: steps for sequence in sequences if (steps := self._memory[sequence].untold[index])}
        if untold:
            self._models[index].accept(list(untold), join_steps(list(untold.values()), self._models[index].taps))
            for steps in untold.values():
                steps.clear()

    def _learn(self, memory: _Memory, asked: _Asked, *, num_tokens: int) -> None:
        """Count what a source with a model brought in this step, and what was lost to what it had to beat."""
        source, offered, num_nodes, draft_s, is_steady = asked
        # Where it drafted nothing, what a free source's draft brought is not its own.
        num_tokens = num_tokens if num_nodes > 1 else 1
        for earnings in (memory.earnings[source], self._earnings[source]):
            earnings.add(num_tokens, num_nodes, draft_s=draft_s, is_steady=is_steady)
        # Before any step was timed the rate is no rate.
        if self._budget.time_s:
            won_s = num_tokens / offered - self._costs[0] - self._costs[1] * num_nodes if num_nodes > 1 else 0.0
            won_s -= draft_s
            memory.won_s[source] += won_s
            self._lost_s -= won_s


def _taps(sources: SequenceOf[Drafter]) -> tuple[int, ...]:
    return tuple(sorted({layer for source in sources for layer in source.taps}))
