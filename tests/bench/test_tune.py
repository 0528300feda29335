"""Speedups predicted from given costs and guesses are those worked out by hand, and the best settings are run."""

from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kangaroo import cost
from kangaroo.bench import tune as tuning
from kangaroo.bench.agreement import Judged, Step, follow_chains, follow_trees, judge_adapter
from kangaroo.bench.texts import Raced, Text, decode_texts, race
from kangaroo.bench.tune import Prediction, Setting, Tuner, node_price, pick_best, predict, tune
from kangaroo.cost import Meter, StepCosts
from kangaroo.drafters.adapter import Adapter
from kangaroo.drafters.base import Prices
from kangaroo.drafters.tree import Branching
from kangaroo.errors import AdapterError, SettingsError
from kangaroo.model import packed
from kangaroo.model.transformer import Transformer
from tests.tiny import tame_transformer

ONE = StepCosts(batch_size=1, plain_s=10.0, plain_engine_s=1.0, engine_s=1.0, draft_s={1: 2.0, 2: 3.0}, first_s=5.0,
                verify_s={1: 9.0, 2: 9.5, 3: 10.0}, node_s=0.5)  # fmt: skip
TWO = StepCosts(batch_size=2, plain_s=14.0, plain_engine_s=1.0, engine_s=1.5, draft_s={1: 3.0, 2: 5.0}, first_s=0.0,
                verify_s={2: 12.0, 6: 20.0}, node_s=0.25)  # fmt: skip


@pytest.fixture(scope="module")
def target() -> Transformer:
    return packed.pack(tame_transformer("llama", 1))


@pytest.fixture(scope="module")
def texts(target: Transformer) -> list[Text]:
    return decode_texts(target, [(9, 77, 210), (3, 140)], eos_ids=frozenset(), max_new_tokens=24)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    found = []
    for seed in (0, 1):
        found.append(tmp_path_factory.mktemp("adapter"))
        Adapter.initialize(tame_transformer("llama", 1), 1, seed=seed).save(found[-1])
    return found


def priced(price: float) -> Meter:
    meter = Meter()
    meter.prices = Prices(price, price)
    return meter


def test_a_speedup_is_plain_time_over_that_of_the_steps() -> None:
    judged = Judged([True, True, False, True, False, True], [0.9, 0.2, 0.9, 0.9, 0.9, 0.9])
    # Two drafted, both accepted; one more at the miss; two drafted, one accepted; the last token alone.
    steps = list(follow_chains(judged, gamma=2, eta=0.0))
    assert steps == [(2, 2, 2), (2, 2, 1), (0, 0, 0)]
    found = predict(Setting(0, 1, 2, 0.0), [steps], costs={1: ONE})
    drafted_s = 5 + 2 * (1 + 3 + 10) + (1 + 9)
    assert found.speedup == pytest.approx(6 * 10 / drafted_s)
    assert (found.tokens_per_step, found.drafted_per_step) == (2.0, pytest.approx(4 / 3))


def test_texts_of_a_batch_step_together_until_each_has_ended() -> None:
    long, short = [Step(2, 2, 2), Step(1, 1, 0), Step(2, 2, 1)], [Step(1, 1, 1)]
    found = predict(Setting(0, 2, 2, 0.0), [long, short], costs={1: ONE, 2: TWO})
    together_s = 1.5 + (5 - 0.25) + (12 + 3 * 2)
    alone_s = (1 + 2 + 9.5) + (1 + 3 + 10)
    plain_s = 2 * 14 + 4 * 10
    assert found.speedup == pytest.approx(plain_s / (2 * 5 + together_s + alone_s))


def test_a_batch_of_a_size_that_was_not_measured_costs_what_lies_between() -> None:
    three = replace(TWO, batch_size=3)
    steps = [[Step(1, 1, 1)], [Step(3, 3, 1)]]
    found = predict(Setting(0, 3, 3, 0.0), steps, costs={1: ONE, 3: three})
    # Two sequences with four drafted tokens are halfway from one with two to three with six.
    between_s = (ONE.step_s(num_levels=3, num_drafted=2) + three.step_s(num_levels=3, num_drafted=6)) / 2
    plain_s = 2 * (ONE.plain_s + three.plain_s) / 2
    assert found.speedup == pytest.approx(plain_s / (2 * ONE.first_s + between_s))


def test_a_tree_is_followed_along_the_ranks_of_the_true_tokens() -> None:
    judged = Judged([True, False, False, True], [0.6, 0.5, 0.9, 0.9], [0, 1, 2, 0],
                    [[0.6, 0.3], [0.5, 0.4], [0.9, 0.1], [0.9, 0.1]])  # fmt: skip
    # First level: 0.6 and 0.3. Second, as if every node guessed the same: 0.3 and 0.24 behind the first; behind the
    # second 0.15 and 0.12, which the price forbids. The second guess is right, the third neither.
    (first, second) = follow_trees(judged, Branching(2), gamma=2, eta=0.0, price=0.2)
    assert first == Step(num_drafted=4, num_levels=2, num_accepted=2)
    assert second == Step(num_drafted=0, num_levels=0, num_accepted=0)
    # Under a threshold the second guess of 0.3 gets no children, and with a budget of three it is all there is.
    (small, *_) = follow_trees(judged, Branching(2, 3), gamma=2, eta=0.0, price=0.2)
    assert small == Step(2, 1, 1)


@given(
    st.lists(st.tuples(st.booleans(), st.floats(0.01, 1)), min_size=1, max_size=14), st.integers(1, 6), st.floats(0, 1)
)
def test_a_tree_without_siblings_is_a_chain(rows: list[tuple[bool, float]], gamma: int, eta: float) -> None:
    judged = Judged([right for right, _ in rows], [sure for _, sure in rows], [0 if right else 1 for right, _ in rows],
                    [[sure] for _, sure in rows])  # fmt: skip
    trees = follow_trees(judged, Branching(1), gamma=gamma, eta=eta, price=0.5)
    assert list(trees) == list(follow_chains(judged, gamma=gamma, eta=eta, price=0.5))


def test_a_chain_ends_where_the_confidences_on_the_way_promise_less_than_the_price() -> None:
    judged = Judged([True] * 8, [0.3, 0.9, 0.9, 0.9, 0.6, 0.9, 0.9, 0.9])
    # The first always joins; 0.3 x 0.9 pays, 0.3 x 0.9 x 0.9 does not, though it was guessed. 0.9 x 0.6 x 0.9 pays no
    # more than 0.3 x 0.9, and the last token is the bonus.
    steps = list(follow_chains(judged, gamma=6, eta=0.0, price=0.26))
    assert steps == [Step(2, 3, 2), Step(4, 4, 4)]
    assert list(follow_chains(judged, gamma=6, eta=0.0, price=0.5)) == [Step(1, 2, 1), Step(2, 3, 2), Step(2, 2, 2)]


def test_predicted_chains_are_those_of_the_engine_at_the_same_price(
    target: Transformer, texts: list[Text], folders: list[Path]
) -> None:
    tuner, lengths = Tuner(target, texts, adapters=folders[:1]), []
    for price in (0.0, 3e-5, 0.004, 1.0):
        tuner.costs[0][1] = replace(ONE, verify_s={1: 0.0, 8: 7 * 10 * price})
        setting = Setting(0, 1, 5, 0.0)
        made = predict(setting, tuner._follow(setting), costs=tuner.costs[0])
        (ran,) = tuner.validate([made], batch_size=1, num_rounds=1)
        assert ran.measured_tokens_per_step == made.tokens_per_step
        _, raced = race(target, [tuner.drafter(setting)], texts=texts, paces=[priced(price)], num_rounds=1)
        # Behind a miss the confidences are not those that were judged.
        assert raced.run.num_drafted / raced.run.num_steps == pytest.approx(made.drafted_per_step, rel=0.1)
        lengths.append(made.drafted_per_step)
    assert lengths == sorted(lengths, reverse=True)
    assert len(set(lengths)) == 4


def test_each_adapter_runs_at_its_own_price(
    target: Transformer, texts: list[Text], folders: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    tuner, seen = Tuner(target, texts, adapters=folders), list[Prices]()
    for place, row_s in enumerate((1.0, 3.0)):
        tuner.costs[place][1] = replace(ONE, verify_s={1: 0.0, 8: 7 * row_s})

    def spy(*args: object, paces: list[Meter], **rest: object) -> list[Raced]:
        seen.extend(pace.prices for pace in paces)
        return race(*args, paces=paces, **rest)  # type: ignore[arg-type]

    monkeypatch.setattr(tuning, "race", spy)
    made = [predict(setting, tuner._follow(setting), costs=tuner.costs[setting.place])
            for setting in (Setting(0, 1, 2, 0.0), Setting(1, 1, 2, 0.0))]  # fmt: skip
    tuner.validate(made, batch_size=1, num_rounds=1)
    assert seen == [pytest.approx((0.1, 0.1)), pytest.approx((0.3, 0.3))]


def test_too_few_texts_fill_a_batch_by_turns(target: Transformer, texts: list[Text], folders: list[Path]) -> None:
    tuner = Tuner(target, texts, adapters=folders[:1])
    tuner.costs[0].update({1: ONE, 5: replace(TWO, batch_size=5)})
    setting = Setting(0, 5, 1, 0.0)
    steps = tuner._follow(setting)
    assert len(texts) == 2
    assert [steps.index(one) for one in steps] == [0, 1, 0, 1, 0]
    (ran,) = tuner.validate([predict(setting, steps, costs=tuner.costs[0])], batch_size=5, num_rounds=1)
    assert ran.measured_tokens_per_step == pytest.approx(ran.tokens_per_step)


def test_ranks_say_which_guess_was_right(target: Transformer, texts: list[Text], folders: list[Path]) -> None:
    adapter = Adapter.load(folders[0], target)
    some, every = (judge_adapter(target, adapter, text=texts[0], num_guesses=count) for count in (2, 258))
    assert max(every.ranks) < 258
    assert some.ranks == [min(rank, 2) for rank in every.ranks]
    assert some.agrees == [rank == 0 for rank in every.ranks]
    assert some.chances == [one[:2] for one in every.chances]
    assert all(sum(one) == pytest.approx(1, abs=1e-4) for one in every.chances)
    assert 0 < sum(some.agrees) < len(some.agrees) == texts[0].num_guessed


def test_the_best_come_to_different_drafts() -> None:
    made = [Prediction(Setting(0, 1, gamma, 0.0), 2.0 - gamma / 10, tokens, 1.0)
            for gamma, tokens in ((1, 2.0), (2, 2.0), (3, 2.5), (4, 2.5), (5, 2.6), (6, 2.7))]  # fmt: skip
    assert [one.setting.gamma for one in pick_best(made)] == [1, 3, 5]
    other = replace(made[1], setting=replace(made[1].setting, place=1))
    assert pick_best([made[0], other]) == [made[0], other]


def test_a_nodes_price_is_its_row_in_plain_tokens() -> None:
    assert node_price(TWO) == pytest.approx(2 * 2 / 14)
    assert node_price(replace(TWO, verify_s={2: 1.0, 3: 90.0})) == 1.0


def test_every_setting_is_predicted_and_the_best_of_each_batch_size_run(
    target: Transformer, texts: list[Text], folders: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cost, "MAX_TIME_S", 0.0)
    monkeypatch.setattr(cost, "LEAST_ROUNDS", 2)
    told: list[str] = []
    tuner = Tuner(target, texts, adapters=folders)
    predictions, ran = tune(tuner, batch_sizes=[1, 2], num_rounds=1, report=told.append)
    num_chains = 1 + (len(tuning.GAMMAS) - 1) * len(tuning.ETAS)
    num_trees = len(tuning.TREE_GAMMAS) * len(tuning.TREE_ETAS) * len(tuning.TREE_BUDGETS)
    assert len({one.setting for one in predictions}) == len(predictions) == 2 * 2 * (num_chains + num_trees)
    speedups = [one.speedup for one in predictions]
    assert speedups == sorted(speedups, reverse=True)
    for size in (1, 2):
        mine = [one for one in ran if one.setting.batch_size == size]
        assert {one.setting for one in mine} == {
            one.setting for one in pick_best([one for one in predictions if one.setting.batch_size == size])
        }
        assert [one.measured for one in mine] == sorted((one.measured or 0 for one in mine), reverse=True)
    for one in ran:
        if one.setting.branching.num_siblings == 1 and one.setting.eta == 0:
            assert one.measured_tokens_per_step == one.tokens_per_step
        assert one.error == pytest.approx(one.speedup / (one.measured or 0) - 1)
        assert one.to_tuned().gamma == one.to_dict()["gamma"] == one.setting.gamma
    assert told[0] == "measuring costs"


@pytest.mark.parametrize("sizes", [[], [0], [2, -1]])
def test_batch_sizes_that_are_none_are_refused(target: Transformer, texts: list[Text], sizes: list[int]) -> None:
    with pytest.raises(SettingsError, match="batch sizes must be whole numbers of at least 1, got"):
        tune(Tuner(target, texts, adapters=[]), batch_sizes=sizes)


def test_an_adapter_that_is_not_there_is_refused(target: Transformer, texts: list[Text], tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match="no adapter folder"):
        Tuner(target, texts, adapters=[tmp_path / "none"])
