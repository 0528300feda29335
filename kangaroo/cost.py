"""What drafts and verification passes cost on this machine, measured in the engine while it decodes.

Short runs of steps whose depth is dictated take turns with plain ones, so that whatever surrounds the kernels is in the
figures, and what else the machine does disturbs all kinds alike.
"""

import time
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import cycle
from statistics import median
from typing import NamedTuple

from kangaroo.drafters.base import MAX_NODES, Drafter
from kangaroo.drafters.base import Sequence as DecodedSequence
from kangaroo.drafters.plain import PlainDrafter
from kangaroo.engine.decoding import Decoding
from kangaroo.engine.engine import Engine
from kangaroo.engine.pace import Pace
from kangaroo.engine.scheduler import Limits
from kangaroo.errors import PromptError
from kangaroo.model.transformer import Transformer
from kangaroo.types import Draft, Outcome, Request, SamplingParams

# Rounds over all depths: fewer where a model is so slow that they would take too long, but never less than the least.
NUM_ROUNDS, LEAST_ROUNDS, MAX_TIME_S = 8, 3, 20.0
# Steps of a kind in a row, and how many of the first do not count: they find in the processor's caches what another
# kind left there, not what decoding would. Steps too slow to depend on that end a run early.
RUN_LENGTH, NUM_SETTLING, MAX_RUN_S = 16, 4, 0.5
# New tokens of a text before another takes its place.
NUM_NEW_TOKENS = 128


@dataclass(frozen=True)
class StepCosts:
    """Median times in seconds of the parts of a step of batch_size sequences.

    plain_s: a plain step; plain_engine_s: what of it is neither drafting nor verification; engine_s: the same of a
    drafted step. draft_s: by the tokens drafted for every sequence; first_s: what the first draft of a text takes
    beyond others, as the drafter has the prompt to read; node_s: one more token that makes no draft deeper.
    verify_s: by the rows of the pass, roots included.
    """

    batch_size: int
    plain_s: float
    plain_engine_s: float
    engine_s: float
    draft_s: Mapping[int, float]
    first_s: float
    verify_s: Mapping[int, float]
    node_s: float = 0.0

    @property
    def token_s(self) -> float:
        """What drafting one token more for every sequence takes, between the shallowest and deepest measured."""
        least, most = min(self.draft_s), max(self.draft_s)
        return max(0.0, self.draft_s[most] - self.draft_s[least]) / max(1, most - least)

    @property
    def row_s(self) -> float:
        """What one row more of a pass takes, between the roots alone and seven tokens behind each."""
        few, many = self.batch_size, 8 * self.batch_size
        return max(0.0, interpolate(self.verify_s, many) - interpolate(self.verify_s, few)) / (many - few)

    def step_s(self, *, num_levels: int, num_drafted: float) -> float:
        """The time of a step whose drafts are num_levels deep and hold num_drafted tokens together."""
        verify_s = interpolate(self.verify_s, num_drafted + self.batch_size)
        if num_drafted == 0:
            return self.engine_s + verify_s
        beside = num_drafted - num_levels * self.batch_size
        return self.engine_s + interpolate(self.draft_s, num_levels) + beside * self.node_s + verify_s

    def to_dict(self) -> dict[str, object]:
        """The fields by name."""
        return asdict(self)


class Meter(Pace):
    """Dictates how deep drafts are, and keeps what the last step took."""

    def __init__(self) -> None:
        super().__init__()
        self.depth = MAX_NODES
        self.draft_s = self.verify_s = 0.0
        self.shapes: Sequence[Sequence[int]] = ()

    def limit(self, sequences: Sequence[DecodedSequence]) -> int:
        """As it was told."""
        return self.depth

    def observe(self, draft: Draft, outcome: Outcome, *, draft_time_s: float, verify_time_s: float) -> None:
        """Keep the times, and the parents of every sequence's nodes."""
        self.draft_s, self.verify_s, self.shapes = draft_time_s, verify_time_s, draft.parents


class _Timed(NamedTuple):
    """A step: what was asked, how deep its drafts were, and what it took; is_new: whether a text was new in it."""

    depth: int
    num_levels: int
    num_rows: int
    step_s: float
    draft_s: float
    verify_s: float
    is_new: bool

    @property
    def engine_s(self) -> float:
        return self.step_s - self.draft_s - self.verify_s


class _Bench:
    """An engine that always has batch_size texts to decode."""

    def __init__(self, target: Transformer, drafter: Drafter, *, prompts: Sequence[Sequence[int]], batch_size: int,
                 deepest: int) -> None:  # fmt: skip
        """Raises PromptError where no prompt leaves room for drafts."""
        room = target.config.context_length - 2 * deepest - 2
        fitting = [prompt for prompt in prompts if len(prompt) < room]
        if not fitting:
            raise PromptError(f"no prompt leaves room to draft in: the shortest has {min(map(len, prompts))} tokens of "
                              f"the {target.config.context_length} of the context; give shorter ones")  # fmt: skip
        self.meter = Meter()
        self._engine = Engine(target, drafter, limits=Limits(max_batch_size=batch_size), pace=self.meter)
        self._prompts, self._batch_size, self._deepest = cycle(fitting), batch_size, deepest

    def step(self, depth: int) -> _Timed:
        """Run a step of drafts of at most this depth."""
        is_new, meter = self._fill(), self.meter
        meter.depth = depth
        started_s = time.perf_counter()
        self._engine.step()
        step_s = time.perf_counter() - started_s
        num_levels = max(map(_num_levels, meter.shapes))
        return _Timed(depth, num_levels, sum(map(len, meter.shapes)), step_s, meter.draft_s, meter.verify_s, is_new)

    def run(self, depth: int) -> list[_Timed]:
        """Steps of this depth in a row."""
        timed: list[_Timed] = []
        while len(timed) < 2 or (len(timed) < RUN_LENGTH and sum(one.step_s for one in timed) < MAX_RUN_S):
            timed.append(self.step(depth))
        return timed

    def _fill(self) -> bool:
        """Bring new texts to their first token where some have ended or will; returns whether there are any."""
        engine, is_new, self.meter.depth = self._engine, False, 0
        while True:
            running: list[Decoding] = engine.scheduler.running
            for one in running:
                if not one.is_reading and one.room <= self._deepest:
                    engine.cancel(one)
            running = engine.scheduler.running
            if len(running) == self._batch_size and not any(one.is_reading for one in running):
                return is_new
            is_new = True
            for _ in range(self._batch_size - len(running) - engine.scheduler.num_waiting):
                params = SamplingParams(NUM_NEW_TOKENS + self._deepest, ignore_eos=True)
                engine.submit(Request(tuple(next(self._prompts)), params))
            engine.step()


def measure_costs(
    target: Transformer, drafter: Drafter, *, prompts: Sequence[Sequence[int]], depths: Sequence[int],
    batch_size: int = 1, num_rounds: int = NUM_ROUNDS
) -> StepCosts:  # fmt: skip
    """Decode continuations of the prompts with chains of these depths, and plainly in turn.

    drafter: one of chains that never stops early of itself. Raises PromptError where no prompt leaves room for drafts.
    """
    deepest = max(depths)
    plain = _Bench(target, PlainDrafter(), prompts=prompts, batch_size=batch_size, deepest=deepest)
    drafted = _Bench(target, drafter, prompts=prompts, batch_size=batch_size, deepest=deepest)
    plain_steps, steps, firsts = list[_Timed](), list[_Timed](), list[_Timed]()
    began_s = time.perf_counter()
    for done in range(num_rounds):
        for depth in depths:
            for bench, found in ((plain, plain_steps), (drafted, steps)):
                timed = bench.run(depth)
                found += [one for one in timed[min(NUM_SETTLING, len(timed) // 2) :] if not one.is_new]
                if bench is drafted:
                    firsts += [one for one in timed if one.is_new]
        if done + 1 >= LEAST_ROUNDS and time.perf_counter() - began_s > MAX_TIME_S:
            break
    draft_s = _medians((one.depth, one.draft_s) for one in steps or firsts)
    return StepCosts(
        batch_size=batch_size,
        plain_s=median(one.step_s for one in plain_steps),
        plain_engine_s=median(one.engine_s for one in plain_steps),
        engine_s=median(one.engine_s for one in steps or firsts),
        draft_s=draft_s,
        first_s=max(0.0, median(one.draft_s - interpolate(draft_s, one.depth) for one in firsts)),
        verify_s=_medians((one.num_rows, one.verify_s) for one in (*plain_steps, *steps)),
    )


def measure_node_s(target: Transformer, drafters: tuple[Drafter, Drafter], *, prompts: Sequence[Sequence[int]],
                   num_steps: int = 200) -> float:  # fmt: skip
    """What a drafted token takes that makes its tree no deeper; 0 where there are none.

    drafters: one of chains, and one that grows the same into trees; batches of one.
    """
    chain, tree = (_Bench(target, one, prompts=prompts, batch_size=1, deepest=MAX_NODES // 2) for one in drafters)
    chains, trees, began_s = list[_Timed](), list[_Timed](), time.perf_counter()
    for done in range(num_steps):
        chains.append(chain.step(MAX_NODES))
        trees.append(tree.step(MAX_NODES))
        if done + 1 >= LEAST_ROUNDS and time.perf_counter() - began_s > MAX_TIME_S:
            break
    draft_s = _medians((one.num_levels, one.draft_s) for one in chains if not one.is_new)
    found = [
        (one.draft_s - interpolate(draft_s, one.num_levels)) / (one.num_rows - 1 - one.num_levels)
        for one in trees
        if draft_s and one.num_rows - 1 > one.num_levels and not one.is_new
    ]
    return max(0.0, median(found)) if found else 0.0


def _medians(samples: Iterable[tuple[int, float]]) -> dict[int, float]:
    """The median of every key's samples, in the order of the keys."""
    found: dict[int, list[float]] = defaultdict(list)
    for key, value in samples:
        found[key].append(value)
    return {key: median(found[key]) for key in sorted(found)}


def interpolate(points: Mapping[int, float], at: float) -> float:
    """The value at a place on the straight lines between points, the outermost of which go on beyond them."""
    places = sorted(points)
    if len(places) == 1:
        return points[places[0]]
    right = min(max(bisect_left(places, at), 1), len(places) - 1)
    low, high = places[right - 1], places[right]
    return points[low] + (at - low) * (points[high] - points[low]) / (high - low)


def _num_levels(parents: Sequence[int]) -> int:
    depths: list[int] = []
    for parent in parents:
        depths.append(0 if parent < 0 else depths[parent] + 1)
    return max(depths)
