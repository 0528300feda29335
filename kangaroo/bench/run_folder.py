"""The output folder of a benchmark: its settings, the answers so far, the failures; a run goes on where it ended."""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from kangaroo.bench.answers import FAILURES_FILE, FOLDER, RUN_FILE, Answer, answer_file, append_answer, read_answers
from kangaroo.errors import OutputError

# What of the stamp may change between the sessions of one run; all else there decides about speed.
NOT_COMPARED = ("command", "date")


class RunFolder:
    """An output folder that one run writes, in one session or several."""

    def __init__(self, path: Path, settings: Mapping[str, object]) -> None:
        """Begin in a new folder, or go on in one that a run of the same settings left.

        settings: what run.json holds, the environment under "stamp". Raises OutputError for a folder that cannot be
        written or holds answers of other settings or another environment, which the message names.
        """
        self.path = path
        try:
            path.mkdir(parents=True, exist_ok=True)
            if (path / RUN_FILE).exists():
                _compare(path, settings)
            elif (path / FOLDER).exists():
                raise OutputError(f"{path} holds answers but no {RUN_FILE}; give another output folder")
            else:
                _replace(path / RUN_FILE, json.dumps(settings, indent=1) + "\n")
            self._failures = _read_failures(path / FAILURES_FILE)
            self._write_failures()
        except OSError as error:
            raise OutputError(f"cannot write {path}: {error.strerror or error}; give another output folder") from error

    def read_done(self, drafter: str, *, run: int) -> set[int | str]:
        """The ids of the questions that a drafter has answered in a run; a last line cut short is dropped."""
        path = answer_file(self.path, drafter, run=run)
        if not path.exists():
            return set()
        content = path.read_bytes()
        num_whole = content.rfind(b"\n") + 1
        if num_whole < len(content):
            os.truncate(path, num_whole)
        return {answer.question_id for answer in read_answers(path)}

    def add_answer(self, answer: Answer, *, drafter: str, run: int) -> None:
        """Keep an answer; that the question failed before is forgotten."""
        append_answer(answer_file(self.path, drafter, run=run), answer)
        if self._failures.pop((drafter, run, answer.question_id), None) is not None:
            self._write_failures()

    def add_failure(self, failure: Mapping[str, object]) -> None:
        """Keep why a question was not answered, instead of why it was not before."""
        self._failures[_failure_key(failure)] = failure
        self._write_failures()

    def sort_answers(self, question_ids: Sequence[int | str]) -> None:
        """Put the answers in the order of the questions, by which Spec-Bench's equal.py compares two files.

        They are in another only where a question failed in one session and was answered in a later one.
        """
        places = {question_id: place for place, question_id in enumerate(question_ids)}
        for path in (self.path / FOLDER).glob("*.jsonl"):
            lines = path.read_text(encoding="utf-8").split("\n")[:-1]
            ordered = sorted(lines, key=lambda line: places[json.loads(line)["question_id"]])
            if ordered != lines:
                _replace(path, "".join(f"{line}\n" for line in ordered))

    def _write_failures(self) -> None:
        lines = (json.dumps(failure, ensure_ascii=False) + "\n" for failure in self._failures.values())
        _replace(self.path / FAILURES_FILE, "".join(lines))


def _read_failures(path: Path) -> dict[tuple[object, ...], Mapping[str, object]]:
    """What earlier sessions could not ask, by drafter, run and question; {} where there is no file."""
    try:
        lines = path.read_text(encoding="utf-8").split("\n")[:-1] if path.exists() else []
        return {_failure_key(failure): failure for failure in map(json.loads, lines)}
    except (ValueError, LookupError, TypeError) as error:
        raise OutputError(f"{path} is damaged ({error!r}); give another output folder") from error


def _failure_key(failure: Mapping[str, object]) -> tuple[object, ...]:
    return failure["drafter"], failure["run"], failure["question_id"]


def _compare(path: Path, settings: Mapping[str, object]) -> None:
    """Raise OutputError where run.json is not of these settings."""
    try:
        before = _flatten(json.loads((path / RUN_FILE).read_text(encoding="utf-8")))
    except (ValueError, AttributeError) as error:
        raise OutputError(f"{path / RUN_FILE} is damaged ({error}); give another output folder") from error
    now = _flatten(json.loads(json.dumps(settings)))
    for name in before | now:
        if before.get(name) != now.get(name):
            raise OutputError(f"{path} holds answers with another {name}: {before.get(name)!r:.200} there, "
                              f"{now.get(name)!r:.200} asked for; give another output folder, or the same "
                              "settings to go on")  # fmt: skip


def _flatten(settings: Mapping[str, object]) -> dict[str, object]:
    """The settings with those of the environment beside them."""
    stamp = settings.get("stamp")
    facts = (
        {name: value for name, value in stamp.items() if name not in NOT_COMPARED} if isinstance(stamp, dict) else {}
    )
    return {name: value for name, value in settings.items() if name != "stamp"} | facts


def _replace(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    beside = path.with_name(path.name + ".part")
    beside.write_text(text, encoding="utf-8")
    os.replace(beside, path)
