"""Costs of steps: put together from their parts, and measured in the engine."""

import pytest

from kangaroo import cost
from kangaroo.cost import StepCosts, interpolate, measure_costs, measure_node_s
from kangaroo.drafters.adapter import Adapter
from kangaroo.drafters.kangaroo import KangarooDrafter
from kangaroo.drafters.stopping import FixedLength
from kangaroo.drafters.tree import CHAIN, Branching
from kangaroo.errors import PromptError
from kangaroo.model import packed
from kangaroo.model.transformer import Transformer
from tests.tiny import tame_transformer

PROMPTS = [(9, 77, 210, 31, 5, 66), (3, 140)]
COSTS = StepCosts(
    batch_size=2, plain_s=11.0, plain_engine_s=1.0, engine_s=2.0, draft_s={1: 3.0, 3: 5.0}, first_s=4.0,
    verify_s={2: 10.0, 4: 12.0, 8: 20.0}, node_s=0.25,
)  # fmt: skip


@pytest.fixture(scope="module")
def target() -> Transformer:
    return packed.pack(tame_transformer("llama", 1))


def make_drafter(target: Transformer, gamma: int, branching: Branching = CHAIN) -> KangarooDrafter:
    adapter = Adapter.initialize(tame_transformer("llama", 1), 1).pack(target)  # type: ignore[arg-type]
    return KangarooDrafter(target, adapter, stopping=FixedLength(gamma), branching=branching)


def test_a_step_costs_its_engine_draft_and_verification() -> None:
    assert COSTS.step_s(num_levels=3, num_drafted=6) == 2 + 5 + 20
    # One of the two drafts is shorter by 2: its rows cost nothing to draft or to verify.
    assert COSTS.step_s(num_levels=2, num_drafted=2) == 2 + 4 - 2 * 0.25 + 12
    assert COSTS.step_s(num_levels=0, num_drafted=0) == 2 + 10
    assert (COSTS.token_s, COSTS.row_s) == (1.0, pytest.approx((36 - 10) / 14))


def test_what_lies_between_points_and_beyond_them_is_on_their_lines() -> None:
    points = {1: 1.0, 3: 5.0, 4: 6.0}
    assert [interpolate(points, at) for at in (0, 1, 2, 3, 3.5, 4, 6)] == [-1, 1, 3, 5, 5.5, 6, 8]
    assert interpolate({2: 7.0}, 5) == 7


@pytest.mark.parametrize("batch_size", [1, 3])
def test_costs_are_measured_for_every_depth_and_its_rows(target: Transformer, batch_size: int) -> None:
    drafter = make_drafter(target, 4)
    costs = measure_costs(target, drafter, prompts=PROMPTS, depths=(1, 2, 4), batch_size=batch_size, num_rounds=4)
    assert costs.batch_size == batch_size
    assert list(costs.draft_s) == [1, 2, 4]
    assert list(costs.verify_s) == [batch_size * rows for rows in (1, 2, 3, 5)]
    assert min(*costs.draft_s.values(), *costs.verify_s.values(), costs.engine_s, costs.plain_engine_s) > 0
    assert costs.plain_s > costs.verify_s[batch_size]


def test_a_slow_model_is_measured_in_fewer_rounds(target: Transformer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cost, "MAX_TIME_S", 0.0)
    monkeypatch.setattr(cost, "MAX_RUN_S", 60.0)
    depths: list[int] = []
    run = cost._Bench.step
    monkeypatch.setattr(cost._Bench, "step", lambda self, depth: depths.append(depth) or run(self, depth))
    measure_costs(target, make_drafter(target, 2), prompts=PROMPTS, depths=(1, 2))
    assert len(depths) == 2 * 2 * cost.LEAST_ROUNDS * cost.RUN_LENGTH


def test_slow_steps_end_a_run_early(target: Transformer, monkeypatch: pytest.MonkeyPatch) -> None:
    bench = cost._Bench(target, make_drafter(target, 2), prompts=PROMPTS, batch_size=1, deepest=2)
    monkeypatch.setattr(cost, "MAX_RUN_S", 60.0)
    assert len(bench.run(2)) == cost.RUN_LENGTH
    monkeypatch.setattr(cost, "MAX_RUN_S", 0.0)
    assert len(bench.run(2)) == 2


def test_a_node_beside_the_deepest_branch_has_a_cost_of_its_own(target: Transformer) -> None:
    chain, tree = make_drafter(target, 3), make_drafter(target, 3, Branching(3, 20))
    assert 0 <= measure_node_s(target, (chain, tree), prompts=PROMPTS, num_steps=30) < 1
    assert measure_node_s(target, (chain, chain), prompts=PROMPTS, num_steps=10) == 0


def test_prompts_that_leave_no_room_are_refused(target: Transformer) -> None:
    with pytest.raises(PromptError, match="the shortest has 250 tokens of the 256 of the context; give shorter ones"):
        measure_costs(target, make_drafter(target, 2), prompts=[(5,) * 250], depths=(1, 2))
