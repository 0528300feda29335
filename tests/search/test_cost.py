"""Costs of drafts and verification: measured, and put together for any candidate."""

from collections import Counter

import pytest

from kangaroo.bench.agreement import Counts
from kangaroo.model import packed
from kangaroo.model.skips import NO_SKIPS, SkippedSublayers
from kangaroo.search.cost import SkipCosts, measure_skip_costs
from tests.tiny import tame_transformer

COSTS = SkipCosts(num_layers=4, draft_s=0.5, base_s=1.0, attention_s=2.0, mlp_s=3.0, verify_s=(30.0, 31.0, 33.0))


def test_a_drafted_token_costs_what_of_its_sublayers_runs() -> None:
    assert COSTS.token_s(NO_SKIPS) == 1 + 4 * 2 + 4 * 3
    assert COSTS.token_s(SkippedSublayers(frozenset({0, 3}), frozenset({1}))) == 1 + 2 * 2 + 3 * 3


def test_speedup_is_plain_time_over_that_of_the_counted_steps() -> None:
    every = frozenset(range(4))
    skips = SkippedSublayers(every, every - {0})  # 4 seconds a token
    counts = Counts(10, 4, Counter({2: 3, 1: 1, 0: 2}))
    time_s = 3 * (33 + 0.5 + 2 * 4) + (31 + 0.5 + 4) + 2 * 30
    assert COSTS.speedup(counts, skips) == pytest.approx(10 * 30 / time_s)
    assert COSTS.speedup(Counts(10, 0, Counter({0: 10})), skips) == pytest.approx(1)


@pytest.mark.parametrize("gamma", [1, 7])
def test_measured_costs_are_times_for_every_length_of_draft(gamma: int) -> None:
    target = packed.pack(tame_transformer("llama", 1))
    costs = measure_skip_costs(target, [tuple(range(30))], gamma=gamma, num_rounds=3)
    assert costs.num_layers == 4
    assert len(costs.verify_s) == gamma + 1
    assert min(costs.verify_s) > 0
    assert list(costs.verify_s) == sorted(costs.verify_s)
    assert costs.draft_s + costs.base_s + costs.mlp_s > 0
    assert SkipCosts(**costs.to_dict()) == costs  # type: ignore[arg-type]
