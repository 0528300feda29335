"""Whatever is drafted, by whom and how long, and whoever is decoded beside it: the text is that of plain decoding."""

import zlib
from collections.abc import Sequence as SequenceOf

import pytest
import torch
from hypothesis import Phase, given, seed, settings
from torch import Tensor

from kangaroo.drafters.base import MAX_NODES
from kangaroo.engine.engine import Engine
from kangaroo.kernels import cpu
from kangaroo.model.transformer import FullSequencePass, Transformer
from kangaroo.sampling import Prefix, gumbel_noise, process
from kangaroo.types import Request, SamplingParams
from tests.engine.cases import CASES, FAMILIES, ON_NATIVE, ON_REFERENCE, Backend, Case, find_case, target_on
from tests.engine.scenarios import (
    ANY_MODE,
    MODES,
    Arrival,
    Observer,
    Run,
    Scenario,
    decode_alone,
    play,
    prompt,
    read_run,
    scenarios,
)
from tests.native import kernels_restored  # noqa: F401

# Scenarios tried for every drafter on every ground; raise them to search for longer.
NUM_SCENARIOS = 8
# Every mode on the fastest float32 kernels, any mode on every other storage and instruction set.
FASTEST, *OTHERS = ON_NATIVE
GROUNDS = [(FASTEST, mode) for mode in MODES] + [(backend, ANY_MODE) for backend in OTHERS]

NUM_NEW_TOKENS = 22
SINGLE = {
    "greedy": SamplingParams(max_new_tokens=NUM_NEW_TOKENS, seed=0),
    "sampled": SamplingParams(max_new_tokens=NUM_NEW_TOKENS, temperature=0.8, seed=11),
    "processed": SamplingParams(
        max_new_tokens=NUM_NEW_TOKENS,
        temperature=0.8,
        seed=5,
        top_p=0.95,
        repetition_penalty=1.1,
        frequency_penalty=0.2,
        logit_bias={4: 1.0},
        min_new_tokens=NUM_NEW_TOKENS,
        stop_token_ids=(9, 70),
    ),
}


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@pytest.mark.parametrize(("backend", "mode"), GROUNDS, ids=str)
def test_every_request_of_a_batch_gets_the_very_text_of_plain_decoding_alone(
    backend: Backend, case: Case, mode: str
) -> None:
    accepted: set[str] = set()

    @seed(zlib.crc32(f"{backend} {case.name} {mode}".encode()))
    @settings(max_examples=NUM_SCENARIOS, phases=[Phase.generate, Phase.shrink])
    @given(scenarios(mode))
    def search(scenario: Scenario) -> None:
        accepted.update(check(backend, case, scenario))

    search()
    assert accepted >= case.accepts


def check(backend: Backend, case: Case, scenario: Scenario) -> set[str]:
    """Compare every request of a scenario with itself alone; returns how much of the drafts was accepted."""
    expected = {request: decode_alone(backend, scenario.family, request) for request in scenario.requests}
    target = target_on(backend, scenario.family)
    cpu.select(backend.kernels, num_threads=1)
    texts = {request: run.tokens for request, run in expected.items()}
    observer = Observer(case.build(target, texts))
    for request, decoding in zip(scenario.requests, play(target, observer, scenario), strict=True):
        alone = expected[request]
        if decoding.finish_reason != "cancelled":
            assert read_run(decoding) == alone
            assert sum(decoding.accepted_lengths) == len(decoding.new_tokens) - 1
        elif decoding.sequence is not None:
            run = read_run(decoding)
            assert run.tokens == alone.tokens[: len(run.tokens)]
            assert run.logprobs == alone.logprobs[: len(run.logprobs)]
    assert not observer.held
    return observer.accepted


@pytest.mark.parametrize("name", ["branching", "kangaroo-fixed6", "kangaroo-tree-fixed4"])
def test_batches_are_the_same_on_every_number_of_threads(name: str) -> None:
    arrivals = tuple(
        Arrival(Request(prompt(5 + 3 * index, index), params))
        for index, params in enumerate([*SINGLE.values(), *SINGLE.values()])
    )
    scenario = Scenario("gemma2", arrivals, max_batch_size=4, num_rows=16, limits=(MAX_NODES,))
    expected = {request: decode_alone(FASTEST, "gemma2", request) for request in scenario.requests}
    cpu.select(FASTEST.kernels, num_threads=2)
    target, texts = target_on(FASTEST, "gemma2"), {request: run.tokens for request, run in expected.items()}
    begun = play(target, find_case(name).build(target, texts), scenario)
    assert [read_run(one) for one in begun] == [expected[request] for request in scenario.requests]


def full_logits(target: Transformer, tokens: SequenceOf[int]) -> Tensor:
    """Logits [T, V] of a text by one pass without a cache."""
    attention = FullSequencePass(target.config, len(tokens), device=target.device)
    hidden, _ = target.forward(target.embed(torch.tensor([tokens])), (0, target.num_layers), attention=attention)
    return target.logits(hidden)[0]


def score(logits: Tensor, request: Request, new_tokens: SequenceOf[int]) -> Tensor:
    """The scores [V] whose largest is chosen behind the prompt and new_tokens: processed logits [V] and noise."""
    prefix, params = Prefix(list(request.prompt_ids), stop_ids=request.stop_ids), request.params
    scores = process(logits, params, prefix=prefix, drafted=new_tokens)
    if params.temperature:
        position = len(request.prompt_ids) + len(new_tokens) - 1
        scores = scores + gumbel_noise(position, torch.arange(len(scores)), seed=params.seed)
    return scores


@pytest.mark.parametrize("mode", SINGLE)
@pytest.mark.parametrize("family", FAMILIES)
def test_plain_decoding_emits_the_choice_of_a_full_pass_without_cache(family: str, mode: str) -> None:
    request = Request(prompt(9, 0), SINGLE[mode])
    tokens = decode_alone(ON_REFERENCE, family, request).tokens
    assert tokens[:9] == request.prompt_ids
    # A text that repeats one token would prove little.
    assert len(set(tokens[9:])) >= 3
    logits = full_logits(target_on(ON_REFERENCE, family), tokens)
    for at in range(9, 9 + NUM_NEW_TOKENS):
        assert score(logits[at - 1], request, tokens[9:at]).argmax() == tokens[at]


@pytest.mark.parametrize("mode", SINGLE)
@pytest.mark.parametrize("case", CASES[1:], ids=lambda case: case.name)
@pytest.mark.parametrize("family", FAMILIES)
def test_drafting_on_reference_kernels_emits_the_text_of_plain_decoding_up_to_near_ties(
    family: str, case: Case, mode: str
) -> None:
    request, target = Request(prompt(9, 0), SINGLE[mode]), target_on(ON_REFERENCE, family)
    plain = decode_alone(ON_REFERENCE, family, request)
    engine = Engine(target, case.build(target, {request: plain.tokens}))
    decoding = engine.submit(request)
    engine.run(decoding)
    assert decoding.num_drafted > 0 or not case.always_drafts
    assert len(decoding.new_tokens) == NUM_NEW_TOKENS
    assert_same_text(target, request, plain, drafted=read_run(decoding))


def assert_same_text(target: Transformer, request: Request, plain: Run, *, drafted: Run) -> None:
    """Equal token ids, unless the first difference is between scores within 8 ulps times sqrt(D), a near-tie."""
    if drafted.tokens == plain.tokens:
        return
    at = next(i for i, (a, b) in enumerate(zip(plain.tokens, drafted.tokens, strict=True)) if a != b)
    logits = full_logits(target, plain.tokens[:at])[-1]
    top = score(logits, request, plain.tokens[len(request.prompt_ids) : at]).topk(2)
    ulp = torch.finfo(torch.float32).eps * top.values.abs().max()
    margin = top.values[0] - top.values[1]
    assert margin < 8 * ulp * target.config.hidden_size**0.5, (
        f"token {at}: {plain.tokens[at]} by plain decoding, {drafted.tokens[at]} by drafting, margin {margin}"
    )


@pytest.mark.parametrize("mode", SINGLE)
def test_scripts_are_accepted_as_they_are_written(mode: str) -> None:
    request = Request(prompt(9, 0), SINGLE[mode])
    plain = decode_alone(FASTEST, "qwen3", request)
    for name, lengths in {
        "always_right": {5, 1},
        "always_wrong": {1},
        "right_at_first": {1, 2, 3, 4, 6},
        "branching": {1, 2, 3, 4},
    }.items():
        target = target_on(FASTEST, "qwen3")
        engine = Engine(target, find_case(name).build(target, {request: plain.tokens}))
        decoding = engine.submit(request)
        engine.run(decoding)
        assert set(decoding.accepted_lengths) <= lengths
        assert len(set(decoding.accepted_lengths)) >= min(2, len(lengths))
