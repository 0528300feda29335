"""Totals over fabricated problems, and a line for every text that differs."""

import pytest

from kangaroo.bench.divergence import Divergence
from kangaroo.bench.losslessness import Problem, list_differing, summarize

PROBLEMS = [
    Problem("HumanEval/0", 11, 4, 12, 6, 0.25, 30, 10),
    Problem("HumanEval/1", 21, 6, 18, 12, 0.75, 10, 6, Divergence(7, (3, 5), 0.000012345, near_tie=True)),
    Problem("HumanEval/2", 2, 1, 0, 0, 0.5, 0, 0, Divergence(0, (3, None), 1.5, near_tie=False)),
]


def test_totals_weigh_problems_by_their_passes() -> None:
    assert summarize(PROBLEMS) == {
        "num_problems": 3,
        "num_equal": 1,
        "tokens_per_step": pytest.approx((10 + 20 + 1) / 11),
        "acceptance_rate": pytest.approx(18 / 30),
        "repeated_8_grams": pytest.approx(0.5),
        "teacher_forced_tokens_per_step": pytest.approx(40 / 16),
    }


def test_rates_of_nothing_are_none() -> None:
    summary = summarize([Problem("one token", 1, 0, 0, 0, 0.0, 0, 0)])
    assert (summary["num_equal"], summary["repeated_8_grams"]) == (1, 0.0)
    assert summary["tokens_per_step"] is summary["acceptance_rate"] is None
    assert summary["teacher_forced_tokens_per_step"] is None
    assert summarize([])["repeated_8_grams"] is None


def test_every_text_that_differs_has_a_line() -> None:
    assert list_differing(PROBLEMS) == [
        "- HumanEval/1: new token 7 (counted from 0), margin 1.23e-05, near-tie: yes",
        "- HumanEval/2: new token 0 (counted from 0), margin 1.5, near-tie: no",
    ]
