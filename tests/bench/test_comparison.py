"""Who runs when, and the headline numbers, on fabricated runs."""

import pytest

from kangaroo.bench.comparison import compare, interleave
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
    assert calls[:2] == [("a", (1,), 16), ("b", (1,), 16)]
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


def test_runs_that_do_not_pair_are_refused() -> None:
    with pytest.raises(ValueError, match="zip"):
        compare({"a": [run(1, 1.0)], "b": [run(1, 1.0), run(1, 1.0)]}, "a")
