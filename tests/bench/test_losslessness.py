"""Totals over fabricated problems, and a line for every text or logits that differ."""

import pytest

from kangaroo.bench.check import Acceptance, LogitsDifference, PromptResult
from kangaroo.bench.divergence import Divergence
from kangaroo.bench.losslessness import Problem, list_differing, summarize
from kangaroo.types import Completion


def result(name: str, counts: tuple[int, int, int, int], *, divergence: Divergence | None = None,
           logits: LogitsDifference | None = None) -> PromptResult:  # fmt: skip
    num_tokens, num_steps, num_drafted, num_accepted = counts
    tokens = tuple(range(num_tokens))
    text = Completion("", tokens, 1, "length", 0.0, 0.0, num_steps, num_drafted, num_accepted, "kangaroo", "m")
    return PromptResult(name, text, text, Acceptance(1, 2, 1, 0), num_tokens, divergence, logits)


PROBLEMS = [
    Problem(result("HumanEval/0", (11, 4, 12, 6), logits=LogitsDifference(2, 3, 1e-6)), 0.25, 30, 10),
    Problem(result("HumanEval/1", (21, 6, 18, 12), divergence=Divergence(7, (3, 5), 0.000012345, near_tie=True)),
            0.75, 10, 6),
    Problem(result("HumanEval/2", (2, 1, 0, 0), divergence=Divergence(0, (3, None), 1.5, near_tie=False)), 0.5, 0, 0),
]  # fmt: skip


def test_totals_weigh_problems_by_their_passes() -> None:
    assert summarize(PROBLEMS) == {
        "num_prompts": 3,
        "num_tokens_identical": 1,
        "num_near_ties": 1,
        "num_logits_identical": 2,
        "num_positions": 34,
        "num_positions_identical": 31,
        "num_new_tokens": 34,
        "num_steps": 11,
        "tokens_per_step": pytest.approx((10 + 20 + 1) / 11),
        "acceptance_rate": pytest.approx(18 / 30),
        "accepted_of_draft": {"none": 3, "part": 6, "all": 3, "no_draft": 0},
        "repeated_8_grams": pytest.approx(0.5),
        "teacher_forced_tokens_per_step": pytest.approx(40 / 16),
    }


def test_rates_of_nothing_are_none() -> None:
    summary = summarize([Problem(result("one token", (1, 0, 0, 0)), 0.0, 0, 0)])
    assert (summary["num_tokens_identical"], summary["repeated_8_grams"]) == (1, 0.0)
    assert summary["tokens_per_step"] is summary["acceptance_rate"] is None
    assert summary["teacher_forced_tokens_per_step"] is None
    assert summarize([])["repeated_8_grams"] is None


def test_everything_that_differs_has_a_line() -> None:
    assert list_differing(PROBLEMS) == [
        "- HumanEval/0: logits at 3 of 11 positions, from new token 2 on; tokens identical",
        "- HumanEval/1: new token 7 (counted from 0), margin 1.23e-05, near-tie: yes",
        "- HumanEval/2: new token 0 (counted from 0), margin 1.5, near-tie: no",
    ]


def test_a_problem_is_recorded_with_its_check() -> None:
    fields = PROBLEMS[0].to_dict()
    assert (fields["name"], fields["logits_identical"], fields["num_forced_steps"]) == ("HumanEval/0", False, 10)
    assert "result" not in fields
