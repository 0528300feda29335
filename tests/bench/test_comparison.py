"""Who runs when, and the headline numbers, on fabricated runs."""

import pytest

from kangaroo.bench.comparison import compare, interleave, measure, ratio_interval
from kangaroo.bench.contenders import Run
from kangaroo.types import Completion


class Recorder:
    """A contender that only writes down its calls."""

    def __init__(self, name: str, calls: list[tuple[str, tuple[int, ...], int]]) -> None:
        self.name, self.calls = name, calls

    def generate(self, prompt_ids: tuple[int, ...], *, max_new_tokens: int) -> Run:
        self.calls.append((self.name, prompt_ids, max_new_tokens))
        return Run(prompt_ids, 1.0)


def run(num_tokens: int, wall_time_s: float, *, num_steps: int | None = None, first: int = 0) -> Run:
    token_ids = tuple(range(first, first + num_tokens))
    if num_steps is None:
        return Run(token_ids, wall_time_s)
    return Run(token_ids, wall_time_s, Completion("", token_ids, 1, "length", 0.0, 0.0, num_steps, 0, 0, "", ""))


def test_contenders_warm_up_and_take_turns_at_going_first() -> None:
    calls: list[tuple[str, tuple[int, ...], int]] = []
    prompts = [(1,), (2,)]
    runs = interleave([Recorder("a", calls), Recorder("b", calls)], prompts, num_rounds=2, max_new_tokens=9)
    assert calls[:2] == [("a", (1,), 9), ("b", (1,), 9)]
    assert [(name, prompt[0]) for name, prompt, _ in calls[2:]] == [
        *[("a", 1), ("b", 1), ("b", 2), ("a", 2)],
        *[("b", 1), ("a", 1), ("a", 2), ("b", 2)],
    ]
    assert {limit for _, _, limit in calls[2:]} == {9}
    assert {name: [one.token_ids for one in mine] for name, mine in runs.items()} == dict.fromkeys("ab", prompts * 2)


def test_speeds_are_medians_and_ratios_go_text_by_text() -> None:
    runs = {
        # 10, 5 and 2 tokens/s.
        "slow": [run(10, 1.0), run(10, 2.0), run(10, 5.0)],
        # 20, 5 and 20 tokens/s: 2, 1 and 10 times as fast; the last text differs.
        "fast": [run(10, 0.5, num_steps=3), run(10, 2.0, num_steps=9), run(10, 0.5, num_steps=6, first=1)],
    }
    slow, fast = compare(runs, "slow")
    assert slow == {"contender": "slow", "tokens_per_s": 5, "ratio": 1, "tokens_per_step": None, "num_equal": 3,
                    "num_texts": 3}  # fmt: skip
    assert (fast["contender"], fast["num_equal"], fast["num_texts"]) == ("fast", 2, 3)
    assert (fast["tokens_per_s"], fast["ratio"]) == (20, 2)
    # 9 tokens a text behind the prefill's, in 18 steps.
    assert fast["tokens_per_step"] == pytest.approx(27 / 18)


def test_texts_without_a_step_have_no_tokens_per_step() -> None:
    assert compare({"one": [run(1, 1.0, num_steps=0)]}, "one")[0]["tokens_per_step"] is None


def test_warm_up_is_short() -> None:
    calls: list[tuple[str, tuple[int, ...], int]] = []
    interleave([Recorder("a", calls)], [(1,)], num_rounds=1, max_new_tokens=99)
    assert [limit for _, _, limit in calls] == [16, 99]


def test_ratios_are_paired_before_texts_are_drawn() -> None:
    # Speeds differ a hundredfold between texts, their ratios not at all.
    slow = [run(10, wall_time_s) for wall_time_s in (1.0, 10.0, 100.0)]
    fast = [run(10, wall_time_s / 2) for wall_time_s in (1.0, 10.0, 100.0)]
    assert ratio_interval(fast, slow, num_texts=3) == pytest.approx((2, 2))


def test_more_rounds_do_not_make_more_texts() -> None:
    # Of 40 runs of each text drawn one by one, the median ratio would hardly ever be another than 2.
    ours = [run(12, 12 / ratio) for ratio in (1, 2, 3)] * 40
    assert ratio_interval(ours, [run(12, 12.0)] * 120, num_texts=3) == pytest.approx((1, 3))


def test_more_texts_narrow_the_interval() -> None:
    ratios = [1 + index / 100 for index in range(101)]
    few, many = (
        ratio_interval([run(10, 1 / ratio) for ratio in some], [run(10, 1.0)] * len(some), num_texts=len(some))
        for some in (ratios[::20], ratios)
    )
    assert few[0] < many[0] < 1.5 < many[1] < few[1]


class Paced:
    """A contender that takes its time per token, whatever the text."""

    version = "1.2"

    def __init__(self, name: str, token_time_s: float) -> None:
        self.name, self.token_time_s = name, token_time_s

    def generate(self, prompt_ids: tuple[int, ...], *, max_new_tokens: int) -> Run:
        return run(max_new_tokens, max_new_tokens * self.token_time_s, first=prompt_ids[0])


def test_rows_hold_the_ratio_to_plain_and_to_another() -> None:
    num_done: list[None] = []
    contenders = [Paced("plain", 0.1), Paced("fast", 0.05), Paced("other", 0.2)]
    rows = measure(contenders, [(1,), (2,)], num_rounds=2, max_new_tokens=9, other="other",
                   advance=lambda: num_done.append(None))  # fmt: skip
    assert [row["contender"] for row in rows] == ["plain", "fast", "other"]
    assert [row["ratio"] for row in rows] == pytest.approx([1, 2, 0.5])
    assert [row["ratio_to"] for row in rows] == pytest.approx([2, 4, 1])
    assert rows[1]["interval"] == pytest.approx((4, 4))
    assert rows[2]["interval"] is None
    assert {row["version"] for row in rows} == {"1.2"}
    assert len(num_done) == 3 * 2 * 2


def test_without_the_other_there_is_no_ratio_to_it_and_one_text_has_no_interval() -> None:
    (alone,) = measure([Paced("plain", 0.1)], [(1,), (2,)], num_rounds=1, max_new_tokens=9, other="other")
    assert (alone["ratio_to"], alone["interval"]) == (None, None)
    contenders = [Paced("plain", 0.1), Paced("other", 0.2)]
    plain, _ = measure(contenders, [(1,)], num_rounds=3, max_new_tokens=9, other="other")
    assert plain["ratio_to"] == pytest.approx(2)
    assert plain["interval"] is None


def test_runs_that_do_not_pair_are_refused() -> None:
    with pytest.raises(ValueError, match="zip"):
        compare({"a": [run(1, 1.0)], "b": [run(1, 1.0), run(1, 1.0)]}, "a")
