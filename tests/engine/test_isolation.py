"""What goes wrong with one request ends that one alone: the others get their texts as if it had never been there."""

import asyncio
from collections.abc import Callable
from collections.abc import Sequence as SequenceOf
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from kangaroo.drafters import growing
from kangaroo.drafters.base import Prices
from kangaroo.engine import step
from kangaroo.engine.async_engine import AsyncEngine
from kangaroo.engine.decoding import Decoding
from kangaroo.engine.engine import Engine
from kangaroo.engine.scheduler import Limits
from kangaroo.errors import SettingsError
from kangaroo.kernels import cpu
from kangaroo.types import Request, SamplingParams
from tests.engine.cases import ON_NATIVE, Case, find_case, target_on
from tests.engine.scenarios import decode_alone, prompt, read_run
from tests.native import kernels_restored  # noqa: F401

BACKEND, FAMILY = ON_NATIVE[0], "llama"
BAD_SEED = 999
SOME = [find_case(name) for name in ("plain", "branching", "kangaroo-fixed6", "kangaroo-tree-fixed4")]
# Those that draw guesses in Python; auto's model is asked at the latest when lookup has found nothing for a while.
DRAWING = ["kangaroo-fixed6", "kangaroo-tree-fixed4", "draft_model-itself", "draft_model-tree", "layer_skip",
           "layer_skip-tree", "medusa", "medusa-tree", "gate-tree", "auto-draft_model"]  # fmt: skip
# Its penalty keeps the native kernels from drafting by themselves, and tells it apart where the drafter draws seeds.
PENALIZED = SamplingParams(40, 1.0, BAD_SEED, repetition_penalty=1.1, logprobs=0)


class BrokenError(Exception):
    pass


class BrokenText:
    """Follows a text until its third token."""

    def __init__(self) -> None:
        self.num_fed = 0
        self.stopped = False

    def feed(self, token_id: int) -> str:
        self.num_fed += 1
        if self.num_fed == 3:
            raise BrokenError
        return "x"

    def finish(self) -> str:
        raise BrokenError


def good_requests(num_requests: int) -> list[Request]:
    kinds = [SamplingParams(14, seed=0), SamplingParams(11, 0.8, 3), SamplingParams(16, seed=1, logprobs=2)]
    return [Request(prompt(3 + 4 * index, index), kinds[index % 3]) for index in range(num_requests)]


def decode_beside(case: Case, bad: Request, submit: Callable[[Engine], Decoding]) -> Decoding:
    """Decode a bad request amid good ones, whose texts must be those they have alone; returns the bad one."""
    good = good_requests(5)
    expected = [decode_alone(BACKEND, FAMILY, request) for request in good]
    cpu.select(BACKEND.kernels, num_threads=1)
    target = target_on(BACKEND, FAMILY)
    texts: dict[Request, SequenceOf[int]] = {one: run.tokens for one, run in zip(good, expected, strict=True)}
    texts[bad] = range(100)
    engine = Engine(target, case.build(target, texts), limits=Limits(4))
    begun = [engine.submit(request) for request in good[:2]]
    broken = submit(engine)
    begun += [engine.submit(request) for request in good[2:]]
    for one in [*begun, broken]:
        engine.run(one)
    assert [read_run(one) for one in begun] == expected
    assert [one.error for one in begun] == [None] * len(begun)
    assert engine.scheduler.num_free_slots == 4
    assert broken.finish_reason == "error"
    return broken


@pytest.mark.parametrize("fails_at", [1, 2, 5])
@pytest.mark.parametrize("case", SOME, ids=lambda case: case.name)
def test_choice_that_raises_ends_its_own_request(monkeypatch: pytest.MonkeyPatch, case: Case, fails_at: int) -> None:
    choose, num_calls = step.choose, 0

    def choose_or_raise(logits: Any, params: SamplingParams, **others: Any) -> int:
        nonlocal num_calls
        num_calls += params.seed == BAD_SEED
        if params.seed == BAD_SEED and num_calls >= fails_at:
            raise BrokenError
        return choose(logits, params, **others)

    bad = Request(prompt(8, 8), SamplingParams(20, 1.0, BAD_SEED))
    alone = decode_alone(BACKEND, FAMILY, bad).tokens
    monkeypatch.setattr(step, "choose", choose_or_raise)
    broken = decode_beside(case, bad, lambda engine: engine.submit(bad))
    assert isinstance(broken.error, BrokenError)
    assert len(broken.new_tokens) < fails_at
    assert broken.new_tokens == list(alone[8 : 8 + len(broken.new_tokens)])


class BrokenDrawing:
    """In the place of a function that drafters draw guesses with: fails once, at a call for the PENALIZED request."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, name: str, fails_at: int) -> None:
        self.num_calls, self._fails_at, self._function = 0, fails_at, getattr(growing, name)
        monkeypatch.setattr(growing, name, self)
        # Trees branch whatever their guesses promise.
        monkeypatch.setattr("kangaroo.engine.engine.DEFAULT_PRICES", Prices(0.0, 0.0))
        # Whom auto asks must not depend on how busy the machine is.
        monkeypatch.setattr("kangaroo.drafters.auto.time", SimpleNamespace(perf_counter=lambda: 0.0))

    def __call__(self, logits: Any, params: SamplingParams, **others: Any) -> Any:
        if params.repetition_penalty == PENALIZED.repetition_penalty:
            self.num_calls += 1
            if self.num_calls == self._fails_at:
                raise BrokenError
        return self._function(logits, params, **others)


@pytest.mark.parametrize("fails_at", [1, 2, 3, 4])
@pytest.mark.parametrize("name", DRAWING)
def test_guess_that_raises_ends_its_own_request(monkeypatch: pytest.MonkeyPatch, name: str, fails_at: int) -> None:
    bad = Request(prompt(8, 8), PENALIZED)
    alone = decode_alone(BACKEND, FAMILY, bad).tokens
    drawing = BrokenDrawing(monkeypatch, "choose_children", fails_at)
    broken = decode_beside(find_case(name), bad, lambda engine: engine.submit(bad))
    assert isinstance(broken.error, BrokenError)
    assert broken.new_tokens == list(alone[8 : 8 + len(broken.new_tokens)])
    assert broken.sequence is not None
    assert len(broken.sequence.logprobs) == len(broken.new_tokens)
    # At most the two siblings on its level are still asked for.
    assert fails_at <= drawing.num_calls <= fails_at + 2
    assert broken.num_steps < fails_at or name.startswith("auto")


@pytest.mark.parametrize("name", ["kangaroo-tree-fixed4", "draft_model-tree", "layer_skip-tree", "medusa-tree"])
def test_proposal_that_raises_ends_its_own_request(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    bad = Request(prompt(8, 8), replace(PENALIZED, acceptance="rejection"))
    drawing = BrokenDrawing(monkeypatch, "distribution", 2)
    broken = decode_beside(find_case(name), bad, lambda engine: engine.submit(bad))
    assert isinstance(broken.error, BrokenError)
    assert drawing.num_calls == 2


def test_top_k_beyond_the_kernels_integers_fails_no_step() -> None:
    cpu.select(BACKEND.kernels, num_threads=1)
    target = target_on(BACKEND, FAMILY)
    engine = Engine(target, find_case("kangaroo-fixed6").build(target, {}))
    # A top_k of all tokens and more is none.
    huge, off = (Request(prompt(8, 8), SamplingParams(20, 0.8, 3, top_k=top_k)) for top_k in (2**64, 0))
    begun = [engine.submit(request) for request in [*good_requests(2), huge]]
    for one in begun:
        engine.run(one)
    assert [read_run(one) for one in begun] == [decode_alone(BACKEND, FAMILY, one) for one in [*good_requests(2), off]]


def test_guess_that_raises_ends_its_own_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    good, bad = good_requests(2), Request(prompt(8, 8), PENALIZED)
    expected = [decode_alone(BACKEND, FAMILY, request) for request in good]
    cpu.select(BACKEND.kernels, num_threads=1)
    target = target_on(BACKEND, FAMILY)
    engine = Engine(target, find_case("kangaroo-tree-fixed4").build(target, {}))
    BrokenDrawing(monkeypatch, "choose_children", 3)

    async def main() -> list[Decoding | BaseException]:
        async with AsyncEngine(engine) as running:
            streams = [await running.submit(request) for request in [bad, *good]]
            return await asyncio.gather(*(stream.result() for stream in streams), return_exceptions=True)

    error, *others = asyncio.run(asyncio.wait_for(main(), timeout=30))
    assert isinstance(error, BrokenError)
    assert [read_run(one) for one in others if isinstance(one, Decoding)] == expected


@pytest.mark.parametrize("case", SOME, ids=lambda case: case.name)
def test_text_that_raises_ends_its_own_request(case: Case) -> None:
    bad = Request(prompt(8, 8), SamplingParams(20, seed=BAD_SEED))
    broken = decode_beside(case, bad, lambda engine: engine.submit(bad, BrokenText()))
    assert isinstance(broken.error, BrokenError)
    assert broken.pieces == ["x", "x"]
    assert broken.new_tokens == list(decode_alone(BACKEND, FAMILY, bad).tokens[8:10])


def test_block_verification_of_a_tree_ends_its_own_request() -> None:
    bad = Request(prompt(8, 8), SamplingParams(20, 1.0, BAD_SEED, acceptance="block"))
    broken = decode_beside(find_case("branching"), bad, lambda engine: engine.submit(bad))
    assert isinstance(broken.error, SettingsError)
