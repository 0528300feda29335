"""How deep to draft, decided on fabricated times: no clock is read here."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import cycle, pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kangaroo.drafters.base import DEFAULT_NODE_PRICE, MAX_NODES
from kangaroo.engine.pace import CHOOSE_EVERY, NUM_NEEDED, NUM_REMEMBERED, PROBE_EVERY, Pace
from kangaroo.types import Draft, Outcome
from tests.tiny import chain_parents

BASE_S = 0.010
# Long enough for old measurements to be forgotten.
SETTLED = NUM_REMEMBERED * PROBE_EVERY // 8


@dataclass
class World:
    """A machine, a text and a drafter: what a row of a pass and a drafted token cost, and how much is accepted.

    accepted: how many tokens of a draft of any depth would be accepted, by turns. depth: how deep the drafter goes.
    """

    row_s: float
    accepted: tuple[int, ...]
    depth: int = 6
    draft_s: float = 0.0
    num_sequences: int = 1
    parents: Callable[[int], tuple[int, ...]] = chain_parents

    def run(self, pace: Pace, num_steps: int) -> list[int]:
        """Let a pace go through steps; returns the limits it set."""
        limits, luck = [], cycle(self.accepted)
        for _ in range(num_steps):
            limits.append(pace.limit(self.num_sequences))
            self.step(pace, limits[-1], luck)
        return limits

    def step(self, pace: Pace, limit: int, luck: Iterator[int]) -> None:
        depth = min(self.depth, limit)
        parents = (self.parents(1 + depth),) * self.num_sequences
        draft = Draft(torch.zeros(self.num_sequences, 1 + depth, dtype=torch.int64), parents)
        paths = tuple(tuple(range(1 + (min(depth, next(luck)) if depth else 0))) for _ in parents)
        pace.observe(
            draft,
            Outcome(paths, tokens=paths, taps=({},) * self.num_sequences),
            draft_time_s=self.draft_s * depth,
            verify_time_s=BASE_S + self.row_s * depth * self.num_sequences,
        )


def test_it_measures_both_sides_before_it_chooses() -> None:
    limits = World(row_s=0.0, accepted=(6,)).run(Pace(), 2 * NUM_NEEDED)
    assert limits.count(0) == limits.count(MAX_NODES) == NUM_NEEDED


def test_it_drafts_where_that_pays() -> None:
    pace = Pace()
    limits = World(row_s=0.1e-3, draft_s=0.5e-3, accepted=(4, 6, 0, 5)).run(pace, 500)
    assert set(limits[2 * NUM_NEEDED :]) == {0, MAX_NODES}
    # All but the first measurements and a plain step now and then, which keeps the comparison fresh.
    assert limits.count(0) == NUM_NEEDED + (500 - 2 * NUM_NEEDED) // PROBE_EVERY
    assert (pace.num_steps, pace.num_drafting) == (500, 500 - limits.count(0))


def test_it_stops_drafting_where_that_does_not_pay() -> None:
    pace = Pace()
    # Every drafted token costs as much as a plain step.
    limits = World(row_s=BASE_S, accepted=(1, 0)).run(pace, 500)
    assert set(limits) == {0, MAX_NODES}
    # It looks at the other side now and then.
    assert limits.count(MAX_NODES) == NUM_NEEDED + (500 - 2 * NUM_NEEDED) // PROBE_EVERY
    assert pace.num_drafting == limits.count(MAX_NODES)


def test_probes_are_evenly_spaced() -> None:
    for world, usual in ((World(row_s=BASE_S, accepted=(0,)), 0), (World(row_s=0.0, accepted=(6,)), MAX_NODES)):
        limits = world.run(Pace(), 4 * PROBE_EVERY)[2 * NUM_NEEDED :]
        probes = [index for index, limit in enumerate(limits) if limit != usual]
        assert len(probes) == 3
        assert {later - earlier for earlier, later in pairwise(probes)} == {PROBE_EVERY}


@pytest.mark.parametrize(("accepted", "expected"), [(1, 1), (2, 2), (3, 3), (5, 5)])
def test_it_draws_the_line_behind_what_is_accepted(accepted: int, expected: int) -> None:
    limits = World(row_s=0.2 * BASE_S, accepted=(accepted,), depth=6).run(Pace(), 300)
    late = limits[2 * NUM_NEEDED + CHOOSE_EVERY :]
    assert {limit for limit in late if limit != MAX_NODES} == {expected}
    # A whole draft now and then shows what a deeper one would bring.
    assert 1 <= late.count(MAX_NODES) <= 300 // PROBE_EVERY


def test_depth_is_the_best_of_all_by_the_rates() -> None:
    accepted, row_s = (0, 1, 1, 2, 2), 0.25 * BASE_S
    rates = {
        depth: (1 + sum(min(one, depth) for one in accepted) / len(accepted)) / (BASE_S + row_s * depth)
        for depth in range(8)
    }
    best = max(rates, key=lambda depth: rates[depth])
    assert best == 2
    limits = World(row_s=row_s, accepted=accepted, depth=7).run(Pace(), 40 * PROBE_EVERY)
    # By then the acceptance is known well.
    assert {limit for limit in limits[-PROBE_EVERY:] if limit != MAX_NODES} == {best}


def test_gain_that_measurements_cannot_tell_from_none_is_no_reason_to_draft() -> None:
    # One token more in six steps, for this share of a plain step each.
    for cost, drafts in ((0.15, False), (0.10, True)):
        limits = World(row_s=cost * BASE_S, accepted=(1, 0, 0, 0, 0, 0), depth=1).run(Pace(), 20 * PROBE_EVERY)
        assert (limits[-PROBE_EVERY:].count(MAX_NODES) > PROBE_EVERY // 2) == drafts


def test_drafter_that_had_nothing_to_say_is_not_taken_for_plain_decoding() -> None:
    # It costs the time of ten steps to find nothing; taken for plain decoding that would make drafting look cheap.
    pace, world = Pace(), World(row_s=0.0, accepted=(6,))
    world.run(pace, 2 * NUM_NEEDED)
    for _ in range(100):
        limit = pace.limit(1)
        if limit:
            nothing = Draft(torch.zeros(1, 1, dtype=torch.int64), ((-1,),))
            pace.observe(nothing, Outcome(((0,),), ((0,),), ({},)), draft_time_s=10 * BASE_S, verify_time_s=BASE_S)
        else:
            world.step(pace, 0, cycle((0,)))
    assert pace.num_drafting == NUM_NEEDED
    (load,) = pace._loads.values()
    assert load.line() == (BASE_S, 0.0)


@pytest.mark.parametrize("costly_first", [True, False])
def test_it_learns_again_when_the_machine_changes(costly_first: bool) -> None:
    worlds = [World(row_s=0.0, accepted=(5,)), World(row_s=2 * BASE_S, accepted=(5,))]
    cheap, costly = worlds
    pace = Pace()
    for world in (costly, cheap) if costly_first else (cheap, costly):
        limits = world.run(pace, SETTLED * 16)[-PROBE_EVERY:]
        assert (limits.count(0) > PROBE_EVERY // 2) == (world is costly)


@pytest.mark.parametrize("order", [(1, 8), (8, 1)])
def test_every_batch_size_has_its_own_answer(order: tuple[int, int]) -> None:
    # Rows are free beside one sequence, and cost dearly beside eight.
    worlds = {
        1: World(row_s=0.0, accepted=(6,)),
        8: World(row_s=BASE_S, accepted=(6,), num_sequences=8),
    }
    pace = Pace()
    for num_sequences in (*order, *order):
        limits = worlds[num_sequences].run(pace, 60)[2 * NUM_NEEDED :]
        usual = max(limits, key=limits.count)
        assert usual == (0 if num_sequences == 8 else MAX_NODES)
        assert limits.count(usual) >= len(limits) - 1


def test_new_batch_size_close_to_a_known_one_needs_no_measurements() -> None:
    pace = Pace()
    World(row_s=BASE_S, accepted=(0,), num_sequences=6).run(pace, 20)
    assert set(World(row_s=BASE_S, accepted=(0,), num_sequences=7).run(pace, 20)) == {0}
    assert MAX_NODES in World(row_s=BASE_S, accepted=(0,), num_sequences=12).run(pace, 20)


def forked(num_nodes: int) -> tuple[int, ...]:
    """Siblings in pairs."""
    return tuple((node - 1) // 2 if node else -1 for node in range(num_nodes))


@pytest.mark.parametrize(("row_s", "pays"), [(0.1 * BASE_S, True), (BASE_S, False)])
def test_trees_are_drafted_whole_or_not_at_all(row_s: float, pays: bool) -> None:
    limits = World(row_s=row_s, accepted=(2,), parents=forked).run(Pace(), 200)
    assert set(limits) == {0, MAX_NODES}
    assert (limits.count(MAX_NODES) > 100) == pays


def test_node_price_is_what_a_row_costs_in_plain_tokens() -> None:
    pace, world = Pace(), World(row_s=0.2 * BASE_S, accepted=(6,))
    assert pace.node_price == DEFAULT_NODE_PRICE
    luck = cycle((6,))
    for depth in (2, 4, 6, 5, 3) * 8:
        world.depth = depth
        world.step(pace, pace.limit(1), luck)
    assert pace.node_price == pytest.approx(0.2)


@pytest.mark.parametrize(("row_s", "price"), [(0.0, 0.0), (5 * BASE_S, 1.0), (-0.1 * BASE_S, 0.0)])
def test_node_price_is_a_chance(row_s: float, price: float) -> None:
    pace, world = Pace(), World(row_s=row_s, accepted=(6,))
    luck = cycle((6,))
    for depth in (2, 4) * 20:
        world.depth = depth
        world.step(pace, MAX_NODES if pace.limit(1) else 0, luck)
        world.step(pace, MAX_NODES, luck)
    assert pace.node_price == price


def test_node_price_stays_where_all_drafts_are_of_one_size() -> None:
    pace = Pace()
    World(row_s=0.2 * BASE_S, accepted=(6,)).run(pace, 100)
    assert pace.node_price == DEFAULT_NODE_PRICE


def test_drafts_that_the_pace_cut_short_say_nothing_of_what_deeper_ones_bring() -> None:
    pace = Pace()
    world = World(row_s=0.2 * BASE_S, accepted=(2,), depth=6)
    world.run(pace, 300)
    # The text becomes easy: only the probes can tell, and they do.
    world.accepted = (6,)
    limits = world.run(pace, 300 * PROBE_EVERY)
    assert set(limits[-PROBE_EVERY + 1 :]) <= {0, MAX_NODES}
    assert limits[-PROBE_EVERY:].count(MAX_NODES) >= PROBE_EVERY - 1


@settings(deadline=None)
@given(
    steps=st.lists(
        st.tuples(st.integers(1, 5), st.integers(0, 9), st.integers(0, 9), st.floats(1e-6, 1e3), st.floats(1e-6, 1e3)),
        max_size=80,
    )
)
def test_any_times_give_a_depth_and_a_price(steps: list[tuple[int, int, int, float, float]]) -> None:
    pace = Pace()
    for num_sequences, depth, accepted, draft_s, verify_s in steps:
        limit = pace.limit(num_sequences)
        assert 0 <= limit <= MAX_NODES
        depth = min(depth, limit)
        parents = (chain_parents(1 + depth),) * num_sequences
        paths = (tuple(range(1 + min(depth, accepted))),) * num_sequences
        draft = Draft(torch.zeros(num_sequences, 1 + depth, dtype=torch.int64), parents)
        pace.observe(draft, Outcome(paths, paths, ({},) * num_sequences), draft_time_s=draft_s, verify_time_s=verify_s)
        assert 0 <= pace.node_price <= 1
    assert pace.num_steps == len(steps)
