"""Every table of a report, in Markdown and HTML, holds the figures of report.json."""

import json
import re
from collections.abc import Callable, Iterator
from html import unescape
from pathlib import Path
from typing import Any

import pytest

from kangaroo.bench import scores
from kangaroo.bench.report import write_report
from tests.bench.test_report import ALL_TASKS, DRAFTERS, RUN, TOKENIZER, write_answers

Table = list[list[str]]
Content = dict[str, Any]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_answers(tmp_path_factory.mktemp("report"))


@pytest.fixture(scope="module")
def content(folder: Path) -> Content:
    return write_report(folder, tokenizer=TOKENIZER)


@pytest.fixture(scope="module")
def tables(folder: Path, content: Content) -> dict[str, Table]:
    """The rows of every section's table by its title, the header first."""
    assert content
    sections = (folder / "report.md").read_text().split("\n## ")[1:]
    found = {}
    for section in sections:
        lines = [line[2:-2].split(" | ") for line in section.splitlines() if line.startswith("| ")]
        found[section.splitlines()[0]] = [line for line in lines if line[0] != "---"]
    return found


def check(cells: list[str], values: list[float | None]) -> None:
    """The numbers that stand in the cells are these values, at the precision they are printed in."""
    known = [value for value in values if value is not None]
    found = re.findall(r"(-?[\d,]*\.?\d+)(%?)", " ".join(cells))
    assert len(found) == len(known), (cells, values)
    for (digits, percent), value in zip(found, known, strict=True):
        decimals = len(digits.partition(".")[2])
        assert digits.replace(",", "") == f"{value * (100 if percent else 1):.{decimals}f}"
        assert decimals >= isinstance(value, float)


def of(score: Content | None, *names: str) -> Iterator[float | None]:
    yield from (None if score is None else score[name] for name in names)


def each(*names: str) -> Callable[[Content], list[float | None]]:
    """Of every task's scores these figures of one part."""
    return lambda one: [value for task in ALL_TASKS for value in of(one["tasks"][task][names[0]], *names[1:])]


def overall(one: Content) -> list[float | None]:
    every = one["tasks"]["overall"]
    return [*of(every["corrected"], "tokens_per_s", "speedup", "speedup_low", "speedup_high", "end_to_end_speedup"),
            *of(every["legacy"], "speedup"), *of(every["steps"], "tokens_per_step", "acceptance_rate"),
            *of(every["matches"], "num_equal", "num_compared")]  # fmt: skip


def legacy(one: Content) -> list[float | None]:
    names = ("mean_accepted_tokens", "tokens_per_s", "baseline_tokens_per_s")
    return [*each("legacy", "speedup", "speedup_std")(one), *of(one["tasks"]["overall"]["legacy"], *names)]


def times(one: Content) -> list[float | None]:
    every = one["tasks"]["overall"]
    return [*of(every["time"], "draft_share", "verify_share", "overhead_share", "ms_per_token"),
            *of(every["corrected"], "prefill_time_s", "baseline_prefill_time_s")]  # fmt: skip


def matches(one: Content) -> list[float | None]:
    every = one["tasks"]["overall"]["matches"]
    return [every["num_equal"], every["num_compared"], *every["differing_ids"]]


@pytest.mark.parametrize(
    ("title", "values"),
    [
        ("Overall", overall),
        ("Corrected score", each("corrected", "speedup", "speedup_low", "speedup_high")),
        ("Legacy score", legacy),
        ("Tokens per step", each("steps", "tokens_per_step")),
        ("Acceptance rate", each("steps", "acceptance_rate")),
        ("Acceptance by draft position", lambda one: one["tasks"]["overall"]["steps"]["ctar"]),
        ("Where the time goes", times),
        ("Exact match", matches),
    ],
)
def test_rows_are_the_drafters_figures(
    content: Content, tables: dict[str, Table], title: str, values: Callable[[Content], list[float | None]]
) -> None:
    header, *rows = tables[title]
    assert [row[0] for row in rows] == list(DRAFTERS)
    for row in rows:
        assert len(row) == len(header)
        check(row[1:], values(content["drafters"][row[0]]))
    if title in ("Corrected score", "Tokens per step", "Acceptance rate"):
        assert header == ["drafter", *ALL_TASKS]


def test_accepted_lengths_are_counted_under_their_length(content: Content, tables: dict[str, Table]) -> None:
    header, *rows = tables["Accepted lengths"]
    for row in rows:
        counts = content["drafters"][row[0]]["tasks"]["overall"]["steps"]["accepted_lengths"]
        shown = dict(zip(header[1:], row[1:], strict=True))
        assert {length: count for length, count in shown.items() if count != "0"} == {
            length: f"{count:,}" for length, count in counts.items()
        }


def test_published_rows_and_ours_have_their_figures_in_place(content: Content, tables: dict[str, Table]) -> None:
    header, *rows = tables["Beside published results"]
    assert header == ["method", *scores.TASKS, "mean accepted tokens", "overall", "model", "hardware", "source"]
    for row, (name, one) in zip(rows, content["drafters"].items(), strict=False):
        tasks = {task: every["legacy"] for task, every in one["tasks"].items()}
        assert row[0] == f"{name} (ours)"
        assert [bool(cell) for cell in row[1:7]] == [task in tasks for task in scores.TASKS]
        speedups = [tasks[task]["speedup"] for task in scores.TASKS if task in tasks]
        check(row[1:9], [*speedups, tasks["overall"]["mean_accepted_tokens"], tasks["overall"]["speedup"]])
    for row, one in zip(rows[len(DRAFTERS) :], content["published"], strict=True):
        check(row[1:9], [*(one["speedups"] or {}).values(), one["mean_accepted_tokens"], one["overall"]])
        assert (row[0], *row[9:]) == (one["method"], one["model"], one["hardware"], one["source"])


def test_failures_and_settings_are_listed(content: Content, tables: dict[str, Table]) -> None:
    for row in tables["Failures"][1:]:
        failed = [one for one in content["failures"] if one["drafter"] == row[0]]
        one = content["drafters"][row[0]]
        check(row[1:], [one["num_answers"], one["num_expected"], one["num_failures"],
                        *(one[name] for one in failed for name in ("question_id", "run"))])  # fmt: skip
    settings = {name.replace("_", " "): str(value) for name, value in RUN.items() if name not in ("stamp", "drafters")}
    drafters = {"plain": "nothing to set", "kangaroo": "gamma=6, eta=0.6", "medusa": "heads=None"}
    assert dict(tables["Settings"][1:]) == settings | drafters  # type: ignore[arg-type]


def test_settings_of_autos_sources_stand_in_their_place(tmp_path: Path) -> None:
    write_answers(tmp_path)
    sources = {"prompt_lookup": {"max_ngram": 3, "min_ngram": 1}, "plain": {}}
    run = RUN | {"drafters": {"plain": {}, "auto": {"sources": sources}}}
    (tmp_path / "run.json").write_text(json.dumps(run))
    write_report(tmp_path, tokenizer=TOKENIZER)
    told = "| auto | sources=(prompt_lookup=(max_ngram=3, min_ngram=1), plain=(nothing to set)) |"
    assert told in (tmp_path / "report.md").read_text()


def test_the_page_has_the_same_tables(folder: Path, tables: dict[str, Table]) -> None:
    page = (folder / "report.html").read_text()
    rows = [
        [unescape(cell) for cell in re.findall(r"<t[hd]>(.*?)</t[hd]>", row)]
        for row in re.findall(r"<tr>(.*?)</tr>", page)
    ]
    assert rows == [row for table in tables.values() for row in table]


def test_the_pages_cards_are_the_overall_scores(folder: Path, content: Content) -> None:
    cards = (folder / "report.html").read_text().split('<div class="card">')[1:]
    for card, (name, one) in zip(cards, content["drafters"].items(), strict=True):
        text = re.sub(r"<[^>]*>", " ", card.split("</div>")[0])
        score, equal = one["tasks"]["overall"]["corrected"], one["tasks"]["overall"]["matches"]
        assert text.split()[0] == name
        check([text], [*of(score, "speedup", "speedup_low", "speedup_high", "tokens_per_s"),
                       *of(equal, "num_equal", "num_compared")])  # fmt: skip


def test_a_bound_of_zero_is_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scores, "bootstrap_speedup", lambda *_: (0.0, 9.0))
    write_report(write_answers(tmp_path), tokenizer=TOKENIZER)
    assert (tmp_path / "report.html").read_text().count("<small>0.00 to 9.00</small>") == len(DRAFTERS)
