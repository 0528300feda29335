"""The answers of an output folder, as the tests look at them."""

from collections import defaultdict
from pathlib import Path

from kangaroo.bench.answers import FOLDER, Answer, read_answers


def read_runs(folder: Path) -> dict[str, list[list[Answer]]]:
    """The answers of an output folder: for every drafter, in the order of names, one list a run."""
    runs: defaultdict[str, list[list[Answer]]] = defaultdict(list)
    paths = sorted((folder / FOLDER).glob("*-run-*.jsonl"), key=lambda path: _split(path.stem))
    for path in paths:
        runs[_split(path.stem)[0]].append(read_answers(path))
    return dict(runs)


def _split(stem: str) -> tuple[str, int]:
    drafter, _, run = stem.rpartition("-run-")
    return drafter, int(run)
