"""What candidates are judged by, and the runs that check it."""

import pytest

from kangaroo.bench.agreement import count_steps
from kangaroo.bench.texts import Text, decode_texts
from kangaroo.kernels import cpu
from kangaroo.model import packed
from kangaroo.model.skips import NO_SKIPS, SkippedSublayers
from kangaroo.model.transformer import Transformer
from kangaroo.search.cost import SkipCosts
from kangaroo.search.forced import ForcedTexts
from kangaroo.search.objectives import ETAS, ExpectedSpeedup, Score, TokensPerSecond, validate
from tests.tiny import tame_transformer

SKIPS = SkippedSublayers(attention=frozenset({2}), mlp=frozenset({1, 3}))


@pytest.fixture(scope="module")
def target() -> Transformer:
    cpu.select(cpu.selected(), num_threads=1)
    return packed.pack(tame_transformer("llama", 1))


@pytest.fixture(scope="module")
def texts(target: Transformer) -> list[Text]:
    return decode_texts(target, [(9, 77, 210), (3, 140)], eos_ids=frozenset(), max_new_tokens=24)


def test_expected_speedup_takes_the_drafts_that_serve_a_candidate_best(target: Transformer, texts: list[Text]) -> None:
    costs, forced = SkipCosts(4, 0.1, 0.1, 1.0, 1.0, (9.0, 9.1, 9.2, 9.3)), ForcedTexts(target, texts, num_drafted=3)
    score = ExpectedSpeedup(forced, costs).score(SKIPS)
    judged = forced.judge(SKIPS)
    every = [costs.speedup(count_steps(judged, gamma=gamma, eta=eta), SKIPS) for gamma in (1, 2, 3) for eta in ETAS]
    assert score.value == max(every)
    assert score.eta is not None
    counts = count_steps(judged, gamma=score.gamma, eta=score.eta)
    assert (costs.speedup(counts, SKIPS), counts.tokens_per_step) == (score.value, score.tokens_per_step)
    agrees = [right for one in judged for right in one.agrees]
    assert score.acceptance == sum(agrees) / len(agrees)
    assert 0 < score.acceptance < 1


def test_expected_speedup_is_the_same_each_time(target: Transformer, texts: list[Text]) -> None:
    objective = ExpectedSpeedup(ForcedTexts(target, texts, num_drafted=2), SkipCosts(4, 0, 1, 1, 1, (9.0, 9.0, 9.0)))
    assert objective.score(SKIPS) == objective.score(SKIPS)


def test_tokens_per_second_runs_a_candidate(target: Transformer, texts: list[Text]) -> None:
    score = TokensPerSecond(target, texts, gamma=3).score(NO_SKIPS)
    assert score.value > 0
    assert (score.acceptance, score.gamma, score.eta) == (1.0, 3, None)
    assert score.tokens_per_step > 1


def test_validation_runs_every_candidate_and_puts_the_fastest_first(target: Transformer, texts: list[Text]) -> None:
    candidates = [(NO_SKIPS, Score(1.0, 1.0, 4.0, 3, 0.0)), (SKIPS, Score(1.0, 0.5, 2.0, 3, None))]
    found = validate(target, candidates, texts=texts, num_rounds=1)
    assert [one.speedup for one in found] == sorted((one.speedup for one in found), reverse=True)
    assert {one.skips for one in found} == {NO_SKIPS, SKIPS}
    whole = next(one for one in found if one.skips == NO_SKIPS)
    assert whole.acceptance_rate == 1.0
    assert whole.tokens_per_step == 46 / 12
