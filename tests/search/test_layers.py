"""Candidates: where they come from, and which of them are best."""

from dataclasses import replace
from pathlib import Path

import pytest
from optuna.samplers import RandomSampler

from kangaroo.model.skips import NO_SKIPS, SkippedSublayers
from kangaroo.search.layers import (
    Trial,
    digest,
    find_pareto_front,
    finished_trials,
    pick_best,
    propose_greedily,
    run_search,
    sublayer_names,
)
from kangaroo.search.objectives import Score
from kangaroo.search.plan import SamplerName, SearchPlan
from kangaroo.search.study import open_study

NUM_LAYERS = 3
GOOD = SkippedSublayers(frozenset({1}), frozenset({0, 2}))


def make_plan(sampler: SamplerName = "tpe", **changes: object) -> SearchPlan:
    plan = SearchPlan("m", "f", NUM_LAYERS, storage="float32", prompts="p", max_new_tokens=8,
                      objective="expected_speedup", sampler=sampler, gamma=4, seed=0)  # fmt: skip
    return replace(plan, **changes)  # type: ignore[arg-type]


class FixedSampler(RandomSampler):
    """Draws what it was given."""

    def __init__(self, params: dict[str, int]) -> None:
        super().__init__()
        self._params = params

    def sample_independent(self, study: object, trial: object, param_name: str, *distribution: object) -> int:
        return self._params[param_name]


class Distance:
    """Best at GOOD, one less for every sublayer that is otherwise."""

    def __init__(self) -> None:
        self.seen: list[SkippedSublayers] = []

    def score(self, skips: SkippedSublayers) -> Score:
        self.seen.append(skips)
        missed = len(skips.attention ^ GOOD.attention) + len(skips.mlp ^ GOOD.mlp)
        return Score(10.0 - missed, 0.5, 2.0, 4, 0.1)


def trial(number: int, *, skipped: int, acceptance: float, value: float = 1.0) -> Trial:
    skips = SkippedSublayers(frozenset(range(skipped)))
    return Trial(number, skips, Score(value, acceptance, 2.0, 4, 0.0))


@pytest.mark.parametrize("sampler", ["tpe", "gp", "random", "greedy"])
def test_every_sampler_is_counted_out_and_resumes_where_it_stood(sampler: SamplerName, tmp_path: Path) -> None:
    plan, objective = make_plan(sampler), Distance()
    study = open_study(tmp_path, plan, resume=False)
    first = list(run_search(study, objective, plan=plan, num_trials=6))
    assert [one.number for one in first] == list(range(6))
    again = open_study(tmp_path, plan, resume=True)
    assert finished_trials(again) == first
    second = list(run_search(again, objective, plan=plan, num_trials=12))
    assert finished_trials(again) == [*first, *second]
    assert len(second) == 6
    assert [one.skips for one in (*first, *second) if one.skips.num_skipped < 6] == objective.seen
    if sampler != "random":
        assert first[0].skips == NO_SKIPS
    assert len({one.skips for one in (*first, *second)}) > 6


def test_greedy_dropping_goes_straight_to_an_optimum_of_independent_sublayers(tmp_path: Path) -> None:
    plan = make_plan("greedy")
    study = open_study(tmp_path, plan, resume=False)
    found = list(run_search(study, Distance(), plan=plan, num_trials=100))
    # The target, then rounds of 6, 5, 4, 3 and 2 that all hold one sublayer more.
    assert [one.skips.num_skipped for one in found] == [0] + [1] * 6 + [2] * 5 + [3] * 4 + [4] * 3 + [5] * 2
    assert pick_best(found, 1)[0].skips == GOOD


def test_greedy_dropping_depends_on_nothing_but_what_was_tried() -> None:
    values = {NO_SKIPS: 0.0}
    for layer, value in ((0, 1.0), (1, 3.0), (2, 2.0)):
        assert propose_greedily(values, NUM_LAYERS) == SkippedSublayers(frozenset({layer}))
        values[SkippedSublayers(frozenset({layer}))] = value
    for layer in range(3):
        assert propose_greedily(values, NUM_LAYERS) == SkippedSublayers(mlp=frozenset({layer}))
        values[SkippedSublayers(mlp=frozenset({layer}))] = 0.0
    assert propose_greedily(values, NUM_LAYERS) == SkippedSublayers(frozenset({0, 1}))


def test_a_candidate_of_which_nothing_is_left_is_not_run(tmp_path: Path) -> None:
    plan, objective = make_plan("random"), Distance()
    study = open_study(tmp_path, plan, resume=False)
    study.sampler = FixedSampler(dict.fromkeys(sublayer_names(NUM_LAYERS), 1))
    (found,) = run_search(study, objective, plan=plan, num_trials=1)
    assert (found.score.value, objective.seen) == (0.0, [])
    assert pick_best([found], 3) == []


def test_the_best_are_distinct_and_in_order() -> None:
    given = enumerate([(1, 2.0), (2, 3.0), (2, 3.0), (3, 1.0)])
    trials = [trial(number, skipped=skipped, acceptance=0.1, value=value) for number, (skipped, value) in given]
    assert [one.skips.num_skipped for one in pick_best(trials, 2)] == [2, 1]
    assert [one.skips.num_skipped for one in pick_best(trials, 9)] == [2, 1, 3]


def test_pareto_front_holds_what_nothing_beats_in_both() -> None:
    points = [(0, 1.0), (1, 0.8), (1, 0.9), (2, 0.9), (3, 0.4), (4, 0.5), (5, 0.5), (6, 0.1)]
    trials = [trial(i, skipped=skipped, acceptance=acceptance) for i, (skipped, acceptance) in enumerate(points)]
    front = [(one.skips.num_skipped, one.score.acceptance) for one in find_pareto_front(trials)]
    assert front == [(0, 1.0), (2, 0.9), (5, 0.5), (6, 0.1)]
    assert find_pareto_front([]) == []


def test_digest_tells_prompts_apart() -> None:
    assert digest([[1, 2], [3]]) == digest([(1, 2), (3,)])
    assert len({digest(one) for one in ([[1, 2], [3]], [[1], [2, 3]], [[1, 2, 3]])}) == 3
