"""Answer files: what is written is read back, and lines that are no answers are named."""

from pathlib import Path

import pytest

from kangaroo.bench.answers import Answer, Choice, answer_file, append_answer, read_answers
from kangaroo.errors import PromptError
from tests.runs import read_runs


def answer(question_id: int) -> Answer:
    choice = Choice(
        turns=["a\u2028b"], idxs=[2], decoding_steps=[2], new_tokens=[4], wall_time=[0.5], accept_lengths=[2, 1],
        token_ids=[[5, 6, 7, 8]], num_prompt_tokens=[3], num_drafted=[4], num_accepted=[1], prefill_time_s=[0.1],
        decode_time_s=[0.4], draft_time_s=[0.1], verify_time_s=[0.2], finish_reasons=["length"],
    )  # fmt: skip
    return Answer(
        question_id=question_id, category="qa", answer_id="x", model_id="demo/plain", choices=[choice], tstamp=1.0
    )


def test_answers_are_read_back_as_they_were_written(tmp_path: Path) -> None:
    path = answer_file(tmp_path, "plain", run=1)
    for number in (81, 82):
        append_answer(path, answer(number))
    assert read_answers(path) == [answer(81), answer(82)]


def test_runs_are_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    for run in (10, 2, 1):
        append_answer(answer_file(tmp_path, "layer_skip", run=run), answer(run))
    append_answer(answer_file(tmp_path, "kangaroo", run=1), answer(7))
    runs = read_runs(tmp_path)
    assert list(runs) == ["kangaroo", "layer_skip"]
    assert [one[0].question_id for one in runs["layer_skip"]] == [1, 2, 10]


@pytest.mark.parametrize("line", ["{", "[]", '{"question_id": 1}'])
def test_a_line_that_is_no_answer_is_named(tmp_path: Path, line: str) -> None:
    path = answer_file(tmp_path, "plain", run=1)
    append_answer(path, answer(81))
    with path.open("a") as file:
        file.write(line + "\n")
    with pytest.raises(PromptError, match=r"plain-run-1.jsonl, line 2: no answer"):
        read_answers(path)


def test_a_missing_file_is_one_error(tmp_path: Path) -> None:
    with pytest.raises(PromptError, match="cannot read the answers"):
        read_answers(tmp_path / "none.jsonl")
