"""Requests of every kind that come, wait, are decoded together and leave, and the text that each makes alone."""

import functools
from collections.abc import Sequence as SequenceOf
from contextlib import ExitStack
from dataclasses import dataclass
from unittest import mock

from hypothesis import strategies as st

from kangaroo.drafters.base import DEFAULT_PRICES, MAX_NODES, Batch, Drafter, Prices, Sequence
from kangaroo.drafters.plain import PlainDrafter
from kangaroo.engine.decoding import Decoding
from kangaroo.engine.engine import Engine
from kangaroo.engine.scheduler import Limits
from kangaroo.kernels import cpu
from kangaroo.model.cache import depths_of
from kangaroo.model.transformer import Transformer
from kangaroo.types import Draft, Outcome, Request, SamplingParams, TokenLogprobs
from tests.engine.cases import ALL, FAMILIES, NONE, ON_REFERENCE, PART, Backend, prompt, target_on
from tests.tiny import VOCAB_SIZE

# What the requests of one scenario ask for; "any" leaves that to the scenario.
MODES = ["greedy", "sampled", "mixed"]
ANY_MODE = "any"


@dataclass(frozen=True)
class Arrival:
    """A request; num_steps are taken after it came, and then it may be cancelled."""

    request: Request
    num_steps: int = 0
    is_cancelled: bool = False


@dataclass(frozen=True)
class Scenario:
    """What comes when, and what the engine allows.

    num_rows: of prompts in a step. limits: of the depth of drafts, in turn.
    """

    family: str
    arrivals: tuple[Arrival, ...]
    max_batch_size: int
    num_rows: int
    limits: tuple[int, ...]

    @property
    def requests(self) -> list[Request]:
        return [arrival.request for arrival in self.arrivals]


@st.composite
def sampling_params(draw: st.DrawFn, mode: str) -> SamplingParams:
    """Greedy ones ask for the plain argmax, sampled ones for any processors, mixed ones for either or both."""
    max_new_tokens = draw(st.integers(1, 16))
    if mode == "greedy" or (mode == "mixed" and draw(st.booleans())):
        return SamplingParams(max_new_tokens=max_new_tokens, seed=0)
    return SamplingParams(
        max_new_tokens=max_new_tokens,
        temperature=draw(st.sampled_from([0.5, 0.8, 1.3] if mode == "sampled" else [0.7, 0.0])),
        seed=draw(st.integers(0, 3)),
        top_k=draw(st.sampled_from([0, 5, 60])),
        top_p=draw(st.sampled_from([1.0, 0.9])),
        min_p=draw(st.sampled_from([0.0, 0.02])),
        repetition_penalty=draw(st.sampled_from([1.0, 1.2])),
        presence_penalty=draw(st.sampled_from([0.0, 0.4])),
        frequency_penalty=draw(st.sampled_from([0.0, 0.3])),
        logit_bias=draw(st.sampled_from([(), ((3, float("-inf")), (70, 1.5), (201, 2.0))])),
        min_new_tokens=min(draw(st.sampled_from([0, 5])), max_new_tokens),
        stop_token_ids=draw(st.sampled_from([(), (70, 90, 201)])),
        logprobs=draw(st.sampled_from([None, 0, 3])),
        logprobs_of=draw(st.sampled_from(["raw", "processed"])),
    )


def requests(mode: str) -> st.SearchStrategy[Request]:
    prompts = st.builds(prompt, st.integers(1, 40), st.integers(0, 3))
    eos_ids = st.sampled_from([frozenset[int](), frozenset(range(2, VOCAB_SIZE, 25))])
    return st.builds(Request, prompts, sampling_params(mode), eos_ids)


def scenarios(mode: str) -> st.SearchStrategy[Scenario]:
    if mode == ANY_MODE:
        return st.sampled_from(MODES).flatmap(scenarios)
    is_cancelled = st.sampled_from([False, False, False, True])
    arrivals = st.lists(st.builds(Arrival, requests(mode), st.integers(0, 4), is_cancelled), min_size=1, max_size=10)
    return st.builds(
        Scenario,
        family=st.sampled_from(FAMILIES),
        arrivals=arrivals.map(tuple),
        max_batch_size=st.integers(1, 8),
        num_rows=st.sampled_from([512, 16, 3]),
        limits=st.sampled_from([(MAX_NODES,), (0, MAX_NODES, 2, 1)]),
    )


class Pace:
    """Bounds drafts by one number after another, and changes prices with them."""

    def __init__(self, limits: tuple[int, ...]) -> None:
        self._limits = limits
        self._num_steps = 0
        self.prices = DEFAULT_PRICES

    @property
    def is_drafting(self) -> bool:
        return self._num_steps % 2 == 0

    def limit(self, sequences: SequenceOf[Sequence]) -> int:
        self._num_steps += 1
        self.prices = (Prices(0.0, 0.0), Prices(0.05, 0.0), Prices(0.3, 0.01))[self._num_steps % 3]
        return self._limits[self._num_steps % len(self._limits)]

    def observe(self, draft: Draft, outcome: Outcome, *, draft_time_s: float, verify_time_s: float) -> None:
        pass

    def forget(self, sequence: Sequence) -> None:
        pass


class Observer:
    """Passes everything on to a drafter, and notes how much of its drafts is accepted, and which sequences it holds."""

    def __init__(self, drafter: Drafter) -> None:
        self.name, self.taps = drafter.name, drafter.taps
        self.accepted: set[str] = set()
        self.held: set[Sequence] = set()
        self._drafter = drafter
        self._depths: dict[Sequence, int] = {}

    def begin(self, sequences: SequenceOf[Sequence], *, num_slots: int) -> None:
        self.held |= set(sequences)
        self._drafter.begin(sequences, num_slots=num_slots)

    def draft(self, batch: Batch) -> Draft:
        draft = self._drafter.draft(batch)
        for sequence, parents, tokens in zip(batch.sequences, draft.parents, draft.tokens, strict=True):
            assert tokens[0] == sequence.tokens[-1]
            self._depths[sequence] = max(depths_of(parents))
            assert self._depths[sequence] <= sequence.max_draft
            assert len(parents) <= MAX_NODES
        return draft

    def accept(self, sequences: SequenceOf[Sequence], outcome: Outcome) -> None:
        self._drafter.accept(sequences, outcome)
        for sequence, path in zip(sequences, outcome.paths, strict=True):
            depth, num_accepted = self._depths.pop(sequence, 0), len(path) - 1
            if depth:
                self.accepted.add(NONE if num_accepted == 0 else ALL if num_accepted == depth else PART)

    def end(self, sequences: SequenceOf[Sequence]) -> None:
        self.held -= set(sequences)
        self._drafter.end(sequences)


@dataclass(frozen=True)
class Run:
    """What came of a request: the whole text, why it ended, and its log-probabilities."""

    tokens: tuple[int, ...]
    finish_reason: str
    logprobs: tuple[TokenLogprobs, ...]


def read_run(decoding: Decoding) -> Run:
    """What came of an ended request that got a slot."""
    sequence = decoding.sequence
    return Run(tuple(sequence.tokens), decoding.finish_reason, tuple(sequence.logprobs[: len(decoding.new_tokens)]))


@functools.cache
def decode_alone(backend: Backend, family: str, request: Request) -> Run:
    """Plain decoding of one request, with nothing beside it."""
    if backend != ON_REFERENCE:
        cpu.select(backend.kernels, num_threads=1)
    engine = Engine(target_on(backend, family), PlainDrafter())
    decoding = engine.submit(request)
    engine.run(decoding)
    return read_run(decoding)


def play(target: Transformer, drafter: Drafter, scenario: Scenario) -> list[Decoding]:
    """Let everything come as the scenario says, in small caches that must grow, until all have ended."""
    engine = Engine(target, drafter, limits=Limits(scenario.max_batch_size), pace=Pace(scenario.limits))
    begun = []
    with ExitStack() as stack:
        for name in ("PREFILL_ROWS", "INTERLEAVED_ROWS"):
            stack.enter_context(mock.patch(f"kangaroo.engine.scheduler.{name}", scenario.num_rows))
        stack.enter_context(mock.patch("kangaroo.engine.engine.SLOT_BLOCK", 8))
        stack.enter_context(mock.patch("kangaroo.drafters.kangaroo.FEED_ROWS", 16))
        # Who drafts must not depend on how busy the machine is.
        stack.enter_context(mock.patch("kangaroo.drafters.auto.time", perf_counter=lambda: 0.0))
        for arrival in scenario.arrivals:
            begun.append(engine.submit(arrival.request))
            for _ in range(arrival.num_steps):
                engine.step()
            if arrival.is_cancelled:
                engine.cancel(begun[-1])
        while any(one.finish_reason is None for one in begun):
            engine.step()
    assert engine.scheduler.num_free_slots == scenario.max_batch_size
    assert engine.scheduler.num_waiting == 0
    return begun
