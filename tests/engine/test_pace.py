"""How deep to draft, decided on fabricated times: no clock is read here."""

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kangaroo.drafters.base import DEFAULT_PRICES, MAX_NODES, Prices, Sequence
from kangaroo.engine.pace import (
    MAX_PATIENCE,
    MAX_WAIT,
    MIN_PATIENCE,
    NUM_DRAFTS,
    NUM_NEEDED,
    NUM_RATIOS,
    PROBE_EVERY,
    Pace,
)
from kangaroo.types import Draft, Outcome, Request, SamplingParams
from tests.tiny import chain_parents

BASE_S = 0.010
# Plain steps, the first draft of a text, which is not counted, and the drafts that are.
NUM_FIRST = 2 * NUM_NEEDED + 1


def make_sequences(num_sequences: int) -> list[Sequence]:
    return [Sequence(Request((1,), SamplingParams()), slot) for slot in range(num_sequences)]


@dataclass
class World:
    """A machine, texts and a drafter: what a row of a pass and a drafted token cost, and how much is accepted.

    accepted: how many tokens of a draft of any depth would be accepted, by turns. depth: how deep the drafter goes.
    outliers: steps that take fifty times as long.
    """

    row_s: float
    accepted: tuple[int, ...]
    depth: int = 6
    draft_s: float = 0.0
    num_sequences: int = 1
    parents: Callable[[int], tuple[int, ...]] = chain_parents
    outliers: frozenset[int] = frozenset()
    num_steps: int = 0
    sequences: list[Sequence] = field(init=False)

    def __post_init__(self) -> None:
        self.sequences = make_sequences(self.num_sequences)

    def run(self, pace: Pace, num_steps: int) -> list[int]:
        """Let a pace go through steps; returns the limits it set."""
        return [self.step(pace) for _ in range(num_steps)]

    def step(self, pace: Pace, *, catch_up_s: float = 0.0) -> int:
        """One step, which may take the drafter some time more; returns its limit."""
        limit = pace.limit(self.sequences)
        depth = min(self.depth, limit)
        num_accepted = min(depth, self.accepted[self.num_steps % len(self.accepted)]) if depth else 0
        factor = 50 if self.num_steps in self.outliers else 1
        self.num_steps += 1
        observe(
            pace,
            [self.parents(1 + depth)] * len(self.sequences),
            [num_accepted] * len(self.sequences),
            draft_s=factor * self.draft_s * depth + (catch_up_s if depth else 0.0),
            verify_s=factor * (BASE_S + self.row_s * depth * len(self.sequences)),
        )
        return limit


def observe(
    pace: Pace, parents: list[tuple[int, ...]], num_accepted: list[int], *, draft_s: float, verify_s: float
) -> None:
    paths = tuple(tuple(range(1 + accepted)) for accepted in num_accepted)
    draft = Draft([[0] * len(one) for one in parents], parents)
    outcome = Outcome(paths, tokens=paths, taps=({},) * len(paths))
    pace.observe(draft, outcome, draft_time_s=draft_s, verify_time_s=verify_s)


def cheap(**others: object) -> World:
    return World(row_s=0.0, accepted=(5,), **others)  # type: ignore[arg-type]


def hopeless(**others: object) -> World:
    """Every drafted token costs as much as a plain step, and none is accepted."""
    return World(row_s=BASE_S, accepted=(0,), **others)  # type: ignore[arg-type]


@pytest.mark.parametrize("world", [cheap(), hopeless()])
def test_it_measures_plain_steps_and_then_drafts_before_it_chooses(world: World) -> None:
    limits = world.run(Pace(), NUM_FIRST)
    assert limits == [0] * NUM_NEEDED + [MAX_NODES] * (NUM_NEEDED + 1)


def test_it_drafts_where_that_pays() -> None:
    pace = Pace()
    limits = World(row_s=0.1e-3, draft_s=0.5e-3, accepted=(4, 6, 0, 5)).run(pace, 500)
    late = limits[NUM_FIRST:]
    assert set(late) == {0, MAX_NODES}
    # All but a plain step now and then, which keeps the comparison fresh.
    probes = [step for step, limit in enumerate(late) if limit == 0]
    assert len(probes) == len(late) // PROBE_EVERY
    assert {later - earlier for earlier, later in pairwise(probes)} == {PROBE_EVERY}
    assert (pace.num_steps, pace.num_drafting) == (500, 500 - limits.count(0))


def test_it_stops_drafting_where_that_does_not_pay() -> None:
    limits = hopeless().run(Pace(), 2000)
    assert set(limits[: NUM_FIRST + MIN_PATIENCE - 1][NUM_FIRST:]) == {0}
    assert limits.count(MAX_NODES) < 0.03 * len(limits)


def test_drafting_in_vain_takes_less_than_three_percent() -> None:
    pace, world, spent_s = Pace(), hopeless(), 0.0
    limits = world.run(pace, 20000)
    for limit in limits:
        spent_s += BASE_S * (1 + (world.depth if limit else 0))
    assert spent_s < 1.03 * BASE_S * len(limits)
    # It has not given up.
    assert MAX_NODES in limits[10000:]


def test_failed_tries_are_ever_further_apart() -> None:
    limits = World(row_s=0.01 * BASE_S, accepted=(0,)).run(Pace(), 1000)[NUM_FIRST:]
    tries = [step for step, limit in enumerate(limits) if limit == MAX_NODES]
    # Two steps each, of which the second is counted.
    assert [later - earlier for earlier, later in zip(tries[::2], tries[1::2], strict=False)] == [1] * (len(tries) // 2)
    waits = [later - earlier for earlier, later in zip(tries[1::2], tries[2::2], strict=False)]
    assert waits[:4] == [16, 32, 64, 128]
    assert set(waits[4:]) == {MAX_PATIENCE}


def test_tries_that_must_catch_up_with_long_texts_are_rare() -> None:
    pace, world, spent_s = Pace(), World(row_s=BASE_S, accepted=(0,)), 0.0
    limits = []
    for _ in range(20000):
        is_new = pace._granted == 0
        limits.append(world.step(pace, catch_up_s=20 * BASE_S if is_new else 0.0))
        spent_s += 20 * BASE_S * (is_new and limits[-1] > 0)
    assert 2 <= limits[10000:].count(MAX_NODES) <= 2 * 10000 / 2000 + 2
    assert spent_s < 0.03 * BASE_S * len(limits)


def count_tries(pace: Pace, num_tokens: int) -> int:
    """Tries on hopeless texts of so many tokens, a new one every 50 steps; seeing a token takes 1% of a step."""
    world, num_tries = World(row_s=0.1 * BASE_S, accepted=(0,)), 0
    for step in range(5000):
        if step % 50 == 0:
            world.sequences = [Sequence(Request((1,) * num_tokens, SamplingParams()), 0)]
        was_plain = pace._granted == 0
        num_tries += world.step(pace, catch_up_s=0.01 * BASE_S * num_tokens * was_plain) > 0 and was_plain
    return num_tries


def test_tries_are_as_rare_as_texts_are_long() -> None:
    pace = Pace()
    short = count_tries(pace, 10)
    assert short > 5000 / (MAX_PATIENCE + 3) - 10
    # Catching up takes 30 steps, and may take a hundredth of all.
    assert count_tries(pace, 3000) <= 5000 / 3000 + 2
    # That long texts are dear to try on is no reason to spare short ones.
    assert count_tries(pace, 10) > 0.8 * short


@pytest.mark.parametrize(("num_hopeless", "num_more"), [(50, 100), (2000, 5 * MAX_PATIENCE)])
def test_it_comes_back_when_texts_become_easy(num_hopeless: int, num_more: int) -> None:
    pace = Pace()
    world = World(row_s=0.1 * BASE_S, accepted=(0,))
    world.run(pace, num_hopeless)
    world.accepted = (6,)
    world.run(pace, num_more)
    assert world.run(pace, 100).count(MAX_NODES) >= 98


def test_it_stops_when_texts_become_hard() -> None:
    pace = Pace()
    world = World(row_s=0.1 * BASE_S, accepted=(6,))
    world.run(pace, 1000)
    world.accepted = (0,)
    world.run(pace, PROBE_EVERY)
    assert world.run(pace, 1000).count(MAX_NODES) < 30


@pytest.mark.parametrize("costly_first", [True, False])
def test_it_learns_again_when_the_machine_changes(costly_first: bool) -> None:
    pace, world = Pace(), World(row_s=0.0, accepted=(5,))
    world.row_s = 2 * BASE_S if costly_first else 0.0
    world.run(pace, 300)
    world.row_s = 2 * BASE_S - world.row_s
    world.run(pace, NUM_RATIOS * MAX_WAIT)
    limits = world.run(pace, 100)
    assert max(limits, key=limits.count) == (MAX_NODES if costly_first else 0)


def decode_texts(pace: Pace, *accepted: int) -> list[list[int]]:
    """Texts of 128 steps one after another, by what is accepted of their drafts; returns the limits of each."""
    texts = [World(row_s=0.1 * BASE_S, accepted=(one,)) for one in accepted]
    limits = []
    for text in texts:
        limits.append(text.run(pace, 128))
        pace.forget(text.sequences[0])
    return limits


def test_text_behind_a_hard_one_is_drafted_where_most_are_easy() -> None:
    *_, hard, easy = decode_texts(Pace(), 2, 2, 2, 0, 2)
    assert hard[64:].count(MAX_NODES) <= 2
    assert easy.count(MAX_NODES) >= 125


def test_hard_text_behind_easy_ones_is_soon_decoded_plainly() -> None:
    assert decode_texts(Pace(), 2, 2, 2, 0)[-1].count(MAX_NODES) <= 20


def test_texts_that_are_all_hard_are_hardly_drafted() -> None:
    limits = decode_texts(Pace(), *[0] * 20)
    assert sum(text.count(MAX_NODES) for text in limits[1:]) <= 0.02 * 128 * 19


def test_drafting_begins_again_when_texts_become_easy() -> None:
    limits = decode_texts(Pace(), *[0] * 20, *[3] * 20)
    assert limits[-1].count(MAX_NODES) >= 125


def test_gain_that_measurements_cannot_tell_from_none_is_no_reason_to_begin_and_no_loss_is_borne() -> None:
    # Plain decoding first, by a text that is hard, then a gain of 2 percent: not enough to begin.
    pace, world = Pace(), World(row_s=0.47 * BASE_S, accepted=(0,), depth=1)
    world.run(pace, 200)
    world.accepted = (1, 0)
    assert world.run(pace, 2000).count(MAX_NODES) < 60
    # While drafting, it is none to stop; a loss of as much is.
    for row_s, stops in ((0.49 * BASE_S, False), (0.53 * BASE_S, True)):
        pace, world = Pace(), World(row_s=row_s, accepted=(1,), depth=1)
        world.run(pace, 200)
        world.accepted = (1, 0)
        assert (world.run(pace, 1000).count(0) > 900) == stops


# --- shallower drafts


@pytest.mark.parametrize("accepted", [1, 2, 3])
def test_it_takes_the_depth_that_wins_where_whole_drafts_lose(accepted: int) -> None:
    world = World(row_s=0.4 * BASE_S, accepted=(accepted,), depth=12)
    limits = world.run(Pace(), NUM_FIRST + 400)[NUM_FIRST:]
    assert limits.count(accepted) >= 400 - 400 // PROBE_EVERY - 1
    # Plain steps and whole drafts by turns keep the comparison fresh.
    assert [limit for limit in limits if limit != accepted] == [0, MAX_NODES] * 3


def test_whole_drafts_that_win_are_not_cut_short() -> None:
    # A depth of 2 would win more.
    limits = World(row_s=0.1 * BASE_S, accepted=(2,), depth=6).run(Pace(), 1000)
    assert set(limits) == {0, MAX_NODES}
    assert limits.count(MAX_NODES) > 950


def test_cut_drafts_end_when_texts_become_hard() -> None:
    pace, world = Pace(), World(row_s=0.4 * BASE_S, accepted=(2,), depth=12)
    world.run(pace, 300)
    world.accepted = (0,)
    world.run(pace, PROBE_EVERY)
    assert world.run(pace, 1000).count(0) > 970


def test_cut_drafts_become_whole_when_texts_become_easy() -> None:
    pace, world = Pace(), World(row_s=0.4 * BASE_S, accepted=(2,), depth=12)
    assert 2 in world.run(pace, 300)
    world.accepted = (12,)
    world.run(pace, 60 * PROBE_EVERY)
    limits = world.run(pace, 100)
    assert limits.count(MAX_NODES) >= 98


def forked(num_nodes: int) -> tuple[int, ...]:
    """Siblings in pairs."""
    return tuple((node - 1) // 2 if node else -1 for node in range(num_nodes))


@pytest.mark.parametrize(("row_s", "pays"), [(0.1 * BASE_S, True), (0.4 * BASE_S, False)])
def test_trees_are_drafted_whole_or_not_at_all(row_s: float, pays: bool) -> None:
    limits = World(row_s=row_s, accepted=(2,), depth=12, parents=forked).run(Pace(), 300)
    assert set(limits) == {0, MAX_NODES}
    assert (limits.count(MAX_NODES) > 150) == pays


# --- what is counted


@pytest.mark.parametrize("first", range(10))
def test_outliers_do_not_change_the_decision_for_long(first: int) -> None:
    outliers = frozenset(range(first, 500, 10))
    for world, usual in ((cheap(outliers=outliers), MAX_NODES), (hopeless(outliers=outliers), 0)):
        limits = world.run(Pace(), 500)
        assert limits.count(usual) > 0.9 * len(limits)


def test_first_draft_of_a_newcomer_is_not_counted() -> None:
    pace, world = Pace(), cheap(num_sequences=2)
    world.run(pace, NUM_FIRST)
    # Every fourth step a text ends and another comes, with which the drafter has to catch up.
    for step in range(400):
        if step % 4 == 0:
            world.sequences = [world.sequences[1], *make_sequences(1)]
        assert world.step(pace, catch_up_s=(step % 4 == 0) * 100 * BASE_S) == MAX_NODES or step % PROBE_EVERY > 50
    (load,) = pace._loads.values()
    assert load.ratio(MAX_NODES) == pytest.approx(1.0)


def test_draft_behind_a_plain_step_is_not_counted() -> None:
    pace, world, was_plain = Pace(), cheap(), True
    for _ in range(500):
        was_plain = world.step(pace, catch_up_s=100 * BASE_S if was_plain else 0.0) == 0
    (load,) = pace._loads.values()
    assert load.ratio(MAX_NODES) == pytest.approx(1.0)


def test_drafter_that_had_nothing_to_say_is_not_taken_for_plain_decoding() -> None:
    # It costs the time of ten steps to find nothing; taken for plain decoding that would make drafting look cheap.
    pace, world = Pace(), cheap()
    world.run(pace, NUM_FIRST)
    for _ in range(100):
        if pace.limit(world.sequences):
            observe(pace, [(-1,)], [0], draft_s=10 * BASE_S, verify_s=BASE_S)
        else:
            observe(pace, [(-1,)], [0], draft_s=0.0, verify_s=BASE_S)
    assert pace.num_drafting == NUM_NEEDED + 1
    (load,) = pace._loads.values()
    assert load.plain_s == BASE_S
    assert load.ratio(MAX_NODES) == pytest.approx(1.0)


def test_drafter_that_never_has_anything_to_say_is_asked_on() -> None:
    pace, sequences = Pace(), make_sequences(1)
    limits = []
    for _ in range(100):
        limits.append(pace.limit(sequences))
        observe(pace, [(-1,)], [0], draft_s=0.0, verify_s=BASE_S)
    assert limits == [0] * NUM_NEEDED + [MAX_NODES] * (100 - NUM_NEEDED)
    assert pace.num_drafting == 0


def test_large_batch_that_drafts_for_few_is_no_trouble() -> None:
    # All drafts that are remembered of a step are empty.
    pace, sequences = Pace(), make_sequences(100)
    limits = []
    for _ in range(100):
        limits.append(pace.limit(sequences))
        first = chain_parents(5) if limits[-1] else (-1,)
        observe(pace, [first, *[(-1,)] * 99], [0] * 100, draft_s=0.0, verify_s=BASE_S * (2 if limits[-1] else 1))
    assert limits[NUM_FIRST:].count(0) > 80


# --- batch sizes


@pytest.mark.parametrize("order", [(1, 8), (8, 1)])
def test_every_batch_size_has_its_own_answer(order: tuple[int, int]) -> None:
    # Rows are free beside one sequence, and cost dearly beside eight.
    worlds = {1: cheap(), 8: World(row_s=BASE_S, accepted=(6,), num_sequences=8)}
    pace = Pace()
    for num_sequences in (*order, *order):
        limits = worlds[num_sequences].run(pace, 60)[NUM_FIRST:]
        usual = max(limits, key=limits.count)
        assert usual == (0 if num_sequences == 8 else MAX_NODES)
        assert limits.count(usual) > 0.8 * len(limits)


def test_new_batch_size_close_to_a_known_one_needs_no_measurements() -> None:
    pace = Pace()
    hopeless(num_sequences=6).run(pace, 20)
    assert hopeless(num_sequences=7).run(pace, 20).count(MAX_NODES) <= 2
    assert hopeless(num_sequences=12).run(pace, 20)[NUM_NEEDED] == MAX_NODES


def test_plain_decoding_that_follows_drafting_waits_before_it_tries_again() -> None:
    pace = Pace()
    beside_one, beside_two = cheap(), hopeless(num_sequences=2)
    beside_two.run(pace, NUM_FIRST + 1)
    beside_one.run(pace, NUM_FIRST + 40)
    assert set(beside_two.run(pace, MIN_PATIENCE - 1)) == {0}


# --- the price of nodes


def test_price_is_what_a_row_costs_in_plain_tokens() -> None:
    pace, world = Pace(), World(row_s=0.2 * BASE_S, accepted=(6,))
    assert pace.prices == DEFAULT_PRICES
    for world.depth in (2, 4, 6, 5, 3) * 8:
        world.step(pace)
    assert pace.prices == Prices(pytest.approx(0.2), pytest.approx(0.2))


def test_price_of_a_batch_counts_the_tokens_that_plain_decoding_makes_meanwhile() -> None:
    pace = Pace()
    World(row_s=0.02 * BASE_S, accepted=(6,), num_sequences=8).run(pace, 100)
    assert pace.prices.branch == pytest.approx(8 * 0.02)


class Obedient(World):
    """Drafts as deep as the price of a chain's token lets a drafter that is half sure of every token."""

    def step(self, pace: Pace, *, catch_up_s: float = 0.0) -> int:
        self.depth = next(depth for depth in range(1, 9) if depth == 8 or 0.5 ** (depth + 1) < pace.prices.chain)
        return super().step(pace, catch_up_s=catch_up_s)


def test_price_that_a_disturbance_raised_comes_down_again() -> None:
    pace, world = Pace(), Obedient(row_s=5 * BASE_S, accepted=(1, 2))
    world.run(pace, 50)
    assert pace.prices.chain == 1.0
    world.row_s = 0.02 * BASE_S
    world.run(pace, NUM_DRAFTS * MAX_WAIT)
    assert pace.prices.chain == pytest.approx(0.02)
    assert world.depth == 5


def test_price_is_that_of_the_batch_size() -> None:
    pace, dear, cheap_rows = (
        Pace(),
        World(row_s=0.1 * BASE_S, accepted=(6,), num_sequences=8),
        World(0.01 * BASE_S, (6,)),
    )
    for _ in range(3):
        dear.run(pace, 50)
        assert pace.prices.chain == pytest.approx(0.8)
        cheap_rows.run(pace, 50)
        assert pace.prices.chain == pytest.approx(0.01)


@pytest.mark.parametrize(("row_s", "price"), [(0.0, 0.0), (3 * BASE_S, 1.0), (-0.1 * BASE_S, 0.0)])
def test_price_is_a_chance(row_s: float, price: float) -> None:
    pace, world = Pace(), World(row_s=row_s, accepted=(6,))
    for step in range(2000):
        world.depth = 2 + step % 3
        world.step(pace)
    assert pace.prices == Prices(price, price)


STEPS = st.tuples(
    st.integers(1, 5), st.booleans(), st.integers(0, 9), st.integers(0, 9), st.floats(1e-6, 1e3), st.floats(1e-6, 1e3)
)


@settings(deadline=None)
@given(steps=st.lists(STEPS, max_size=80))
def test_any_times_give_a_depth_and_a_price(steps: list[tuple[int, bool, int, int, float, float]]) -> None:
    pace, sequences = Pace(), make_sequences(5)
    for num_sequences, are_new, depth, accepted, draft_s, verify_s in steps:
        if are_new:
            sequences = make_sequences(5)
        limit = pace.limit(sequences[:num_sequences])
        assert 0 <= limit <= MAX_NODES
        depth = min(depth, limit)
        parents, num_accepted = [chain_parents(1 + depth)] * num_sequences, [min(depth, accepted)] * num_sequences
        observe(pace, parents, num_accepted, draft_s=draft_s, verify_s=verify_s)
        assert all(0 <= price <= 1 for price in pace.prices)
    assert pace.num_steps == len(steps)
