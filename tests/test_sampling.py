"""Processors are those of transformers, and the choice is an exact draw by text, position and seed alone."""

import itertools
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.generation import logits_process as theirs

from kangaroo.sampling import (
    DRAFT_STREAM,
    Prefix,
    choose,
    choose_children,
    derive_seed,
    distribution,
    draw_seed,
    gumbel_noise,
    logprobs_of,
    needs_logits,
    process,
)
from kangaroo.types import SamplingParams

STOP_IDS = frozenset({1, 2, 999_999})


def prefix_of(prompt_ids: Sequence[int], new_ids: Sequence[int] = (), stop_ids: frozenset[int] = STOP_IDS) -> Prefix:
    tokens = list(prompt_ids)
    prefix = Prefix(tokens, stop_ids=stop_ids)
    tokens += new_ids
    return prefix


def process_as_transformers(
    logits: torch.Tensor, params: SamplingParams, *, prompt_ids: Sequence[int], new_ids: Sequence[int]
) -> torch.Tensor:
    """Transformers' processors in the order of its `_get_logits_processor`, with vLLM's penalties after the first."""
    bias = {(token,): value for token, value in dict(params.logit_bias).items()}
    counts = torch.bincount(torch.tensor(new_ids, dtype=torch.long), minlength=len(logits)).float()

    def subtract(_: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        return scores - params.frequency_penalty * counts - params.presence_penalty * (counts > 0)

    processors: list[Any] = [theirs.SequenceBiasLogitsProcessor(bias)] if bias else []
    processors.append(theirs.RepetitionPenaltyLogitsProcessor(params.repetition_penalty))
    processors.append(subtract)
    if params.min_new_tokens:
        minimum = theirs.MinNewTokensLengthLogitsProcessor(len(prompt_ids), params.min_new_tokens, sorted(STOP_IDS))
        processors.append(minimum)
    if params.temperature > 0:
        processors.append(theirs.TemperatureLogitsWarper(params.temperature))
        if params.top_k:
            processors.append(theirs.TopKLogitsWarper(params.top_k))
        if params.top_p < 1:
            processors.append(theirs.TopPLogitsWarper(params.top_p))
        processors.append(theirs.MinPLogitsWarper(params.min_p))
    scores, text = logits[None], torch.tensor([[*prompt_ids, *new_ids]])
    for processor in processors:
        scores = processor(text, scores)
    return scores[0]


PENALTIES = st.sampled_from([0.0, 0.0, -2.0, 0.5, 1.25, 2.0])


@st.composite
def cases(draw: st.DrawFn) -> tuple[torch.Tensor, SamplingParams, list[int], list[int]]:
    """Logits, often with ties, any combination of settings, and a prompt and new tokens."""
    vocab_size = draw(st.integers(4, 40))
    tied = st.integers(-3, 3).map(float)
    logit = draw(st.sampled_from([tied, st.just(0.5), st.floats(-20, 20, width=32)]))
    tokens = st.lists(st.integers(0, vocab_size - 1), max_size=8)
    bias = st.sampled_from([-math.inf, -100.0, -1.0, 0.3, 5.0])
    params = SamplingParams(
        temperature=draw(st.sampled_from([0.0, 1.0, 0.7, 0.25, 3.0])),
        seed=draw(st.integers(0, 2**63 - 1)),
        top_k=draw(st.sampled_from([0, 0, 1, 2, 7, 1000])),
        top_p=draw(st.sampled_from([1.0, 1.0, 0.9, 0.5, 1 / 3, 0.2, 1e-9]) | st.floats(0.01, 1)),
        min_p=draw(st.sampled_from([0.0, 0.0, 0.05, 0.3, 1.0])),
        repetition_penalty=draw(st.sampled_from([1.0, 1.0, 1.3, 0.5])),
        presence_penalty=draw(PENALTIES),
        frequency_penalty=draw(PENALTIES),
        # Token 0 is neither a stop token nor forbidden, so that something is left to choose from.
        logit_bias=draw(st.dictionaries(st.integers(3, vocab_size - 1), bias, max_size=3)),
        min_new_tokens=draw(st.sampled_from([0, 0, 3, 20])),
    )
    logits = torch.tensor(draw(st.lists(logit, min_size=vocab_size, max_size=vocab_size)))
    return logits, params, draw(tokens.filter(bool)), draw(tokens)


@given(cases())
@settings(max_examples=400, deadline=None)
def test_processed_logits_are_those_of_transformers(
    case: tuple[torch.Tensor, SamplingParams, list[int], list[int]],
) -> None:
    logits, params, prompt_ids, new_ids = case
    before = logits.clone()
    processed = process(logits, params, prefix=prefix_of(prompt_ids, new_ids))
    assert torch.equal(logits, before)
    # Where the mass is within rounding of top_p, the order in which a softmax is summed decides: then either is right.
    nearby = {min(1.0, params.top_p * factor) for factor in (1, 1 - 1e-6, 1 + 1e-6)}
    expected = [
        process_as_transformers(logits, replace(params, top_p=top_p), prompt_ids=prompt_ids, new_ids=new_ids)
        for top_p in nearby
    ]
    if len(logits) > 16:
        # From 17 on torch.sort is not stable, so that chance decides which of equal logits top_p removes.
        processed, expected = processed.sort().values, [scores.sort().values for scores in expected]
    assert any(torch.equal(processed, scores) for scores in expected), (processed, expected)


@pytest.mark.parametrize("vocab_size", range(2, 17))
def test_mass_exactly_at_top_p_and_equal_logits_are_cut_as_in_transformers(vocab_size: int) -> None:
    logits = torch.full((vocab_size,), 0.5)
    for num_kept in range(1, vocab_size):
        params = SamplingParams(temperature=1.0, top_p=num_kept / vocab_size)
        expected = process_as_transformers(logits, params, prompt_ids=[0], new_ids=[])
        assert torch.equal(process(logits, params, prefix=prefix_of([0])), expected)


@given(cases(), st.data())
@settings(max_examples=200, deadline=None)
def test_row_inside_a_draft_is_the_row_after_the_same_tokens_committed(
    case: tuple[torch.Tensor, SamplingParams, list[int], list[int]], data: st.DataObject
) -> None:
    logits, params, prompt_ids, new_ids = case
    num_committed = data.draw(st.integers(0, len(new_ids)))
    committed: dict[str, Any] = {"prefix": prefix_of(prompt_ids, new_ids)}
    drafted: dict[str, Any] = {
        "prefix": prefix_of(prompt_ids, new_ids[:num_committed]),
        "drafted": new_ids[num_committed:],
    }
    assert torch.equal(process(logits, params, **committed), process(logits, params, **drafted))
    children = choose_children(logits, params, **committed, num_children=4)
    assert children == choose_children(logits, params, **drafted, num_children=4)
    assert children[0] == choose(logits, params, **committed) == choose(logits, params, **drafted)


def test_prefix_counts_the_same_text_however_it_was_split() -> None:
    whole = prefix_of([5, 6, 5], [6, 7, 7, 8])
    assert (whole.num_tokens, whole.num_prompt_tokens) == (7, 3)
    expected = {5: 0, 6: 1, 7: 2, 8: 1}
    for num_committed in range(5):
        prefix = prefix_of([5, 6, 5], [6, 7, 7, 8][:num_committed])
        for _ in range(2):  # consulting it changes nothing
            token_ids, counts = prefix.count([6, 7, 7, 8][num_committed:])
            assert dict(zip(token_ids.tolist(), counts.tolist(), strict=True)) == expected


def test_frequency_and_presence_penalty_count_new_tokens_and_not_the_prompt() -> None:
    logits, params = torch.zeros(6), SamplingParams(frequency_penalty=0.5, presence_penalty=0.25)
    processed = process(logits, params, prefix=prefix_of([0, 0, 1], [1, 2]), drafted=[2])
    assert processed.tolist() == [0.0, -0.75, -1.25, 0.0, 0.0, 0.0]


def test_stop_tokens_are_forbidden_until_enough_tokens_are_committed_or_drafted() -> None:
    logits, params = torch.tensor([0.0, 3.0, 2.0, 1.0]), SamplingParams(min_new_tokens=3)
    assert choose(logits, params, prefix=prefix_of([0], [3, 3])) == 3
    assert choose(logits, params, prefix=prefix_of([0], [3]), drafted=[3]) == 3
    assert choose(logits, params, prefix=prefix_of([0], [3]), drafted=[3, 3]) == 1
    assert choose(logits, params, prefix=prefix_of([0], [3, 3, 3])) == 1


def test_unchanged_logits_are_handed_back_and_not_copied() -> None:
    logits = torch.randn(9)
    for params in (SamplingParams(top_p=0.5, top_k=2), SamplingParams(temperature=1.0, seed=0)):
        assert process(logits, params, prefix=prefix_of([0])) is logits


@pytest.mark.parametrize(
    "setting",
    [
        {"temperature": 0.5},
        {"logit_bias": {0: 1.0}},
        {"repetition_penalty": 1.1},
        {"presence_penalty": 0.1},
        {"frequency_penalty": 0.1},
        {"min_new_tokens": 1},
        {"logprobs": 0},
    ],
)
def test_logits_are_needed_for_all_but_the_plain_argmax(setting: dict[str, Any]) -> None:
    assert needs_logits(SamplingParams(**setting))
    assert not needs_logits(SamplingParams(top_k=5, top_p=0.5, min_p=0.5, seed=3, stop="x", n=2))


def long_rows() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    rows = {}
    for vocab_size in (1024, 151_936):
        noise = torch.randn(vocab_size, generator=generator)
        rank = torch.randperm(vocab_size, generator=generator) + 1
        rows[f"flat {vocab_size}"] = noise
        rows[f"normal {vocab_size}"] = 3 * noise
        rows[f"zipf {vocab_size}"] = 12 - 1.6 * rank.log() + 0.3 * noise
        rows[f"tied {vocab_size}"] = (2 * noise).round()
        rows[f"equal {vocab_size}"] = torch.full((vocab_size,), -7.5)
        rows[f"one {vocab_size}"] = torch.full((vocab_size,), -math.inf).index_fill(0, torch.tensor([77]), 2.0)
        # Two far apart clusters leave all but the first and the last interval of scores empty.
        rows[f"clusters {vocab_size}"] = torch.where(rank < 900, 0.001 * noise, 0.001 * noise - 6.0)
    return rows


ROWS = long_rows()
SAMPLED = [
    {},
    {"temperature": 0.6},
    {"temperature": 1.5, "top_k": 50},
    {"top_k": 3000},
    {"top_p": 0.9},
    {"top_p": 0.9, "min_p": 0.02},
    {"min_p": 0.001},
    {"temperature": 0.7, "top_k": 40, "top_p": 0.8, "repetition_penalty": 1.2, "logit_bias": {7: 2.0}},
]


@pytest.mark.parametrize("setting", SAMPLED, ids=str)
@pytest.mark.parametrize("name", ROWS)
def test_choice_is_the_argmax_over_noise_for_the_whole_vocabulary(name: str, setting: dict[str, Any]) -> None:
    logits, prefix = ROWS[name], prefix_of([3, 4, 5])
    for seed in range(2):
        params = SamplingParams(**{"temperature": 1.0, "seed": seed} | setting)
        processed = process(logits, params, prefix=prefix, drafted=[9])
        perturbed = processed + gumbel_noise(3, torch.arange(len(logits)), seed=seed)
        best = perturbed.sort(descending=True, stable=True).indices[:5].tolist()
        survivors = [token for token in best if perturbed[token] > -math.inf]
        assert choose_children(logits, params, prefix=prefix, drafted=[9], num_children=5) == survivors
        assert choose(logits, params, prefix=prefix, drafted=[9]) == survivors[0]


@pytest.mark.parametrize("top_p", [0.2, 0.9, 0.999])
@pytest.mark.parametrize("name", ROWS)
def test_nucleus_of_a_long_row_is_the_smallest_set_that_holds_the_mass(name: str, top_p: float) -> None:
    logits = ROWS[name]
    params = SamplingParams(temperature=1.0, top_p=top_p, seed=0)
    kept = process(logits, params, prefix=prefix_of([3])) > -math.inf
    # transformers sorts upwards and removes from the low end, of equal logits the lower id first.
    probs, order = logits.double().softmax(0), logits.sort(stable=True).indices
    mass = probs[order].cumsum(0)
    assert kept[order].int().diff().min() >= 0
    first = int(kept[order].int().argmax())
    assert mass[first] > 1 - top_p - 1e-6 or first == len(logits) - 1
    assert first == 0 or mass[first - 1] <= 1 - top_p + 1e-6


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_children_are_the_best_tokens_in_order_and_only_those_that_survive(temperature: float) -> None:
    logits = torch.tensor([0.0, 3.0, 1.0, 3.0, -math.inf, 2.0])
    prefix = prefix_of([0], stop_ids=frozenset())
    greedy = choose_children(logits, SamplingParams(), prefix=prefix, num_children=4)
    assert greedy == [1, 3, 5, 2]
    params = SamplingParams(temperature=temperature, top_k=3, seed=8)
    children = choose_children(logits, params, prefix=prefix, num_children=50)
    assert sorted(children) == ([1, 3, 5] if temperature else [0, 1, 2, 3, 5])


@pytest.mark.parametrize("vocab_size", [4, 300, 151_936])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_row_left_without_any_token_yields_the_lowest_id(vocab_size: int, temperature: float) -> None:
    logits = torch.full((vocab_size,), -math.inf)
    params = SamplingParams(temperature=temperature, seed=1, top_k=2, top_p=0.9, min_p=0.1, logprobs=3)
    assert choose(logits, params, prefix=prefix_of([0])) == 0
    assert logprobs_of(logits, params, token=0, prefix=prefix_of([0])).top == ()


@pytest.mark.parametrize("vocab_size", [4, 300, 151_936])
def test_greedy_choice_between_equal_logits_is_the_lowest_id(vocab_size: int) -> None:
    logits = torch.zeros(vocab_size)
    assert choose(logits, SamplingParams(), prefix=prefix_of([0])) == 0
    logits[[vocab_size // 2, vocab_size - 1]] = 5.0
    assert choose(logits, SamplingParams(), prefix=prefix_of([0])) == vocab_size // 2
    assert choose_children(logits, SamplingParams(), prefix=prefix_of([0]), num_children=3)[2] == 0


def test_row_of_a_strided_or_differentiable_tensor_is_read_as_it_is() -> None:
    table = torch.randn(50, 3, requires_grad=True)
    params = SamplingParams(temperature=1.0, top_k=9, seed=4)
    plain = choose(table.detach()[:, 1].contiguous(), params, prefix=prefix_of([0]))
    assert choose(table[:, 1], params, prefix=prefix_of([0])) == plain


def critical_value(num_degrees: int) -> float:
    """What chi-square exceeds with probability 0.001 (Wilson and Hilferty 1931)."""
    spread = 2 / (9 * num_degrees)
    return num_degrees * (1 - spread + 3.0902 * math.sqrt(spread)) ** 3


def assert_follows(counts: Counter[Any], probs: dict[Any, float]) -> None:
    """Chi-square of observed counts against exact probabilities; rare outcomes are pooled."""
    num_draws = counts.total()
    assert set(counts) <= {outcome for outcome, prob in probs.items() if prob > 0}
    expected = {outcome: num_draws * prob for outcome, prob in probs.items()}
    common = [outcome for outcome in expected if expected[outcome] >= 5]
    cells = [(counts[outcome], expected[outcome]) for outcome in common]
    num_rare = num_draws - sum(observed for observed, _ in cells)
    expected_rare = num_draws - sum(one for _, one in cells)
    if expected_rare >= 5:
        cells.append((num_rare, expected_rare))
    statistic = sum((observed - one) ** 2 / one for observed, one in cells)
    assert statistic < critical_value(len(cells) - 1), statistic


# A model of six tokens whose logits depend on the last one, under settings that remove, penalise and forbid.
MARKOV = 1.5 * torch.randn(6, 6, generator=torch.Generator().manual_seed(5))
MARKOV_SETTINGS: dict[str, Any] = {
    "temperature": 0.9,
    "top_p": 0.93,
    "min_p": 0.01,
    "repetition_penalty": 1.3,
    "frequency_penalty": 0.4,
    "presence_penalty": 0.2,
    "min_new_tokens": 2,
    "logit_bias": {0: 0.5},
}


def exact_probs(text: tuple[int, ...], *, num_prompt_tokens: int) -> list[float]:
    scores = process_as_transformers(
        MARKOV[text[-1]],
        SamplingParams(**MARKOV_SETTINGS),
        prompt_ids=text[:num_prompt_tokens],
        new_ids=text[num_prompt_tokens:],
    )
    return scores.double().softmax(0).tolist()


def test_single_tokens_over_positions_of_one_seed_follow_the_exact_distribution() -> None:
    params, counts = SamplingParams(**MARKOV_SETTINGS, seed=12), Counter[int]()
    for position in range(15_000):
        prefix = type("Moved", (Prefix,), {"num_tokens": position})([3, 4], stop_ids=STOP_IDS)
        prefix.num_prompt_tokens = position
        counts[choose(MARKOV[4], params, prefix=prefix)] += 1
    assert_follows(counts, dict(enumerate(exact_probs((3, 4), num_prompt_tokens=2))))


@pytest.mark.parametrize("num_committed", [0, 1, 3])
def test_three_tokens_over_seeds_follow_the_exact_joint_distribution(num_committed: int) -> None:
    counts = Counter[tuple[int, ...]]()
    for seed in range(6_000):
        params, tokens, new_ids = SamplingParams(**MARKOV_SETTINGS, seed=seed), [3, 4], list[int]()
        prefix = Prefix(tokens, stop_ids=STOP_IDS)
        for index in range(3):
            last = new_ids[-1] if new_ids else 4
            new_ids.append(choose(MARKOV[last], params, prefix=prefix, drafted=new_ids[num_committed:]))
            if index < num_committed:
                tokens.append(new_ids[-1])
        counts[tuple(new_ids)] += 1
    joint = {}
    for first, second, third in itertools.product(range(6), repeat=3):
        chain = [(3, 4), (3, 4, first), (3, 4, first, second)]
        steps = zip(chain, (first, second, third), strict=True)
        joint[first, second, third] = math.prod(exact_probs(text, num_prompt_tokens=2)[token] for text, token in steps)
    assert_follows(counts, joint)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_tokens_of_a_long_row_follow_its_softmax(temperature: float) -> None:
    # Most of the mass lies outside the leaders, so that pruning has to let others win.
    vocab_size, num_draws = 4_000, 4_000
    logits = temperature * torch.linspace(0, 0.5, vocab_size)
    params = SamplingParams(temperature=temperature, seed=31)
    counts = Counter[int]()
    for num_tokens in range(1, num_draws + 1):
        counts[choose(logits, params, prefix=prefix_of([0] * num_tokens)) // 100] += 1
    probs = (logits / temperature).softmax(0).view(40, 100).sum(1).tolist()
    assert_follows(counts, dict(enumerate(probs)))


def test_seed_and_position_both_change_what_is_drawn() -> None:
    def draw(seed: int, first: int) -> list[int]:
        params = SamplingParams(temperature=1.0, seed=seed)
        return [
            choose(torch.zeros(50), params, prefix=prefix_of([0] * position)) for position in range(first, first + 64)
        ]

    first = draw(1, 1)
    assert first == draw(1, 1)
    for other in (draw(2, 1), draw(1, 65), draw(derive_seed(1, 1), 1), draw(derive_seed(1, DRAFT_STREAM), 1)):
        assert sum(map(int.__eq__, first, other)) < 8


def test_derived_seeds_are_distinct_in_range_and_start_with_the_seed_itself() -> None:
    indices = [*range(200), DRAFT_STREAM]
    for seed in (0, 1, 41, 2**63 - 1):
        assert derive_seed(seed, 0) == seed
    derived = {derive_seed(seed, index) for seed in (0, 1, 41, 2**63 - 1) for index in indices}
    assert len(derived) == 4 * len(indices)
    assert all(0 <= one < 2**63 for one in derived)


def test_drawn_seeds_differ_and_are_allowed() -> None:
    drawn = {draw_seed() for _ in range(100)}
    assert len(drawn) == 100
    for seed in drawn:
        SamplingParams(seed=seed)


@pytest.mark.parametrize("vocab_size", [30, 151_936])
def test_logprobs_are_the_log_softmax_of_the_raw_or_the_processed_logits(vocab_size: int) -> None:
    logits = torch.randn(vocab_size, generator=torch.Generator().manual_seed(1))
    setting: dict[str, Any] = {"temperature": 0.5, "top_k": 3, "seed": 0, "logit_bias": {9: 30.0}, "logprobs": 5}
    for logprobs_of_what, num_top in (("raw", 5), ("processed", 3)):
        params = SamplingParams(**setting, logprobs_of=logprobs_of_what)
        scores = logits if logprobs_of_what == "raw" else process(logits, params, prefix=prefix_of([0]))
        expected = scores.double().log_softmax(0)
        found = logprobs_of(logits, params, token=9, prefix=prefix_of([0]))
        assert (found.token_id, len(found.top)) == (9, num_top)
        assert found.logprob == pytest.approx(expected[9].item(), abs=1e-6)
        values, ids = expected.topk(num_top)
        assert [token for token, _ in found.top] == ids.tolist()
        assert [value for _, value in found.top] == pytest.approx(values.tolist(), abs=1e-6)


def test_no_alternatives_are_reported_where_only_the_chosen_one_was_asked_for() -> None:
    found = logprobs_of(torch.zeros(4), SamplingParams(logprobs=0), token=2, prefix=prefix_of([0]))
    assert (found.token_id, found.top) == (2, ())
    assert found.logprob == pytest.approx(-math.log(4))


def test_where_every_token_is_forbidden_the_distribution_is_on_what_choose_picks() -> None:
    params = SamplingParams(temperature=0.8, seed=1, logit_bias=dict.fromkeys(range(8), -math.inf))
    prefix = Prefix([1, 2], stop_ids=frozenset())
    picked = choose(torch.randn(8), params, prefix=prefix)
    assert distribution(torch.randn(8), params, prefix=prefix).tolist() == [
        float(token == picked) for token in range(8)
    ]
