"""An output folder is gone on with by the same run alone, and holds whole answers in the order of the questions."""

import json
from pathlib import Path
from typing import Any

import pytest

from kangaroo.bench.answers import Answer, Choice, answer_file, read_answers
from kangaroo.bench.run_folder import RunFolder
from kangaroo.errors import OutputError

CHOICE: dict[str, Any] = {name: [] for name in Choice.model_fields} | {"index": 0}
STAMP = {"command": "kangaroo bench", "date": "2026-01-01", "cpu": "a", "commit": "b"}
SETTINGS: dict[str, Any] = {"max_new_tokens": 8, "drafters": {"retrieval": {"references": ["x"]}}, "stamp": STAMP}


def add(folder: RunFolder, *question_ids: int | str) -> None:
    for question_id in question_ids:
        answer = Answer(question_id=question_id, category="qa\u2028", answer_id="x", model_id="m",
                        choices=[Choice(**CHOICE)], tstamp=0.0)  # fmt: skip
        folder.add_answer(answer, drafter="plain", run=1)


def test_the_same_settings_go_on(tmp_path: Path) -> None:
    output = tmp_path / "new" / "out"
    add(RunFolder(output, SETTINGS), 1, "two")
    later = SETTINGS | {"stamp": STAMP | {"command": "kangaroo  bench", "date": "2026-01-02"}}
    # A tuple is a list in JSON.
    folder = RunFolder(output, later | {"drafters": {"retrieval": {"references": ("x",)}}})
    assert folder.read_done("plain", run=1) == {1, "two"}
    assert folder.read_done("plain", run=2) == folder.read_done("kangaroo", run=1) == set()
    assert json.loads((output / "run.json").read_text()) == SETTINGS


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"max_new_tokens": 9}, "another max_new_tokens: 8 there, 9 asked for; give another output folder"),
        ({"drafters": {"retrieval": {"references": []}}}, "another drafters: "),
        ({"seed": 1}, "another seed: None there, 1 asked for"),
        ({"stamp": STAMP | {"cpu": "c"}}, "another cpu: 'a' there, 'c' asked for"),
    ],
)
def test_other_settings_and_another_machine_are_named(tmp_path: Path, change: dict[str, Any], reason: str) -> None:
    RunFolder(tmp_path, SETTINGS)
    with pytest.raises(OutputError) as refused:
        RunFolder(tmp_path, SETTINGS | change)
    assert str(refused.value).startswith(f"{tmp_path} holds answers with {reason}")


def test_a_line_cut_short_is_dropped(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path, SETTINGS)
    add(folder, 1, 2)
    path = answer_file(tmp_path, "plain", run=1)
    whole = path.read_bytes()
    # Without its line feed even a line that is all there may not be: nothing says that it is.
    for cut in (len(whole) - 1, len(whole) - 40):
        path.write_bytes(whole[:cut])
        assert folder.read_done("plain", run=1) == {1}
    add(folder, 2)
    assert path.read_bytes() == whole


def test_answers_end_up_in_the_order_of_the_questions(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path, SETTINGS)
    add(folder, 3, "a", 1)
    folder.sort_answers([1, 2, 3, "a"])
    path = answer_file(tmp_path, "plain", run=1)
    assert [one.question_id for one in read_answers(path)] == [1, 3, "a"]
    assert list(path.parent.iterdir()) == [path]


def test_a_failure_is_kept_until_its_question_is_asked_again(tmp_path: Path) -> None:
    def failed(question_id: int, reason: str) -> dict[str, object]:
        return {"question_id": question_id, "drafter": "plain", "run": 1, "reason": reason}

    def kept() -> list[object]:
        return [json.loads(line) for line in (tmp_path / "failures.jsonl").read_text().splitlines()]

    folder = RunFolder(tmp_path, SETTINGS)
    for question_id in (1, 2):
        folder.add_failure(failed(question_id, "é"))
    folder = RunFolder(tmp_path, SETTINGS)
    assert kept() == [failed(1, "é"), failed(2, "é")]
    folder.add_failure(failed(1, "b"))
    assert kept() == [failed(1, "b"), failed(2, "é")]
    add(folder, 2, 3)
    assert kept() == [failed(1, "b")]


@pytest.mark.parametrize("line", ["{", "[]", "{}"])
def test_damaged_failures_are_one_error(tmp_path: Path, line: str) -> None:
    RunFolder(tmp_path, SETTINGS)
    (tmp_path / "failures.jsonl").write_text(line + "\n")
    with pytest.raises(OutputError, match=r"failures\.jsonl is damaged"):
        RunFolder(tmp_path, SETTINGS)


@pytest.mark.parametrize("content", ["{", "[]", "3"])
def test_a_damaged_run_file_is_one_error(tmp_path: Path, content: str) -> None:
    RunFolder(tmp_path, SETTINGS)
    (tmp_path / "run.json").write_text(content)
    with pytest.raises(OutputError, match=r"run\.json is damaged"):
        RunFolder(tmp_path, SETTINGS)


def test_answers_of_an_unknown_run_are_left_alone(tmp_path: Path) -> None:
    add(RunFolder(tmp_path, SETTINGS), 1)
    (tmp_path / "run.json").unlink()
    with pytest.raises(OutputError, match=r"holds answers but no run\.json"):
        RunFolder(tmp_path, SETTINGS)


def test_a_folder_that_cannot_be_written_is_one_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match=r"cannot write .*; give another output folder"):
        RunFolder(tmp_path / "file", SETTINGS)
