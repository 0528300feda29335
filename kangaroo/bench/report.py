"""The report of an output folder, from its answers alone: report.json, report.md and report.html."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from rich.box import SIMPLE_HEAD
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from kangaroo.bench import scores
from kangaroo.bench.answers import FAILURES_FILE, RUN_FILE, Answer, answer_file, read_answers
from kangaroo.bench.plots import draw_figures
from kangaroo.bench.published import PUBLISHED
from kangaroo.bench.record import markdown_table, stamp_facts, stamp_text, write_result
from kangaroo.bench.sections import equal, interval, make_sections, number, pick
from kangaroo.errors import CheckpointError, OutputError, PromptError
from kangaroo.model.checkpoint import Vocabulary
from kangaroo.model.tokenizer import Tokenizer

BASELINE = "plain"
STEM, HTML_FILE = "report", "report.html"
RUN_KEYS = ("bench", "model", "dtype", "device", "drafters", "num_runs", "num_questions", "stamp")
CAPTIONS = {
    "speedup": "Speedup in decoding over plain, by task, with its interval.",
    "tokens_per_step": "Tokens per step, by task; plain decoding's is 1.",
    "ctar": "Share of steps whose first k drafted tokens were all accepted.",
    "accepted_lengths": "Share of steps by how many tokens they emitted.",
    "time": "Where the time of a decoded token goes.",
}


def write_report(folder: Path, *, tokenizer: Tokenizer | None = None) -> dict[str, Any]:
    """Write the three files of a report into an output folder of a benchmark; returns report.json's content.

    Nothing in them is text of a question or an answer. tokenizer: the model's, for the legacy score; unless given it is
    that of run.json's model, and where that is not here the report says so and has no legacy score.
    Raises PromptError where the folder has no run.json or no answers of plain decoding, or a file is damaged, and
    OutputError where the report cannot be written.
    """
    run = _read_run(folder)
    runs = {name: _read_runs(folder, name, num_runs=run["num_runs"]) for name in run["drafters"]}
    problem = None
    if tokenizer is None:
        tokenizer, problem = _find_tokenizer(run)
    report = make_report(run, runs, failures=_read_failures(folder), tokenizer=tokenizer)
    report["legacy_missing"] = problem
    write_result(folder / STEM, report, text=_render_markdown(report))
    try:
        (folder / HTML_FILE).write_text(_render_html(report), encoding="utf-8")
    except OSError as error:
        raise OutputError(
            f"cannot write {folder / HTML_FILE}: {error.strerror or error}; give another place"
        ) from error
    return report


def make_report(
    run: dict[str, Any],
    runs: Mapping[str, scores.Runs],
    *,
    failures: Sequence[dict[str, Any]],
    tokenizer: Tokenizer | None,
) -> dict[str, Any]:
    """The content of report.json: run.json's, and every drafter's scores by task.

    runs: for every drafter of run, its answers run by run. failures: lines of failures.jsonl; a question that was
    answered later is none. tokenizer: the model's, None for a report without legacy scores.
    """
    baseline = runs.get(BASELINE, [])
    answers = [answer for one in baseline for answer in one]
    if not answers:
        raise PromptError(
            f"there are no answers of {BASELINE}, which every score compares with; run it beside the others"
        )
    tasks = scores.find_tasks(answers)
    count_tokens = None if tokenizer is None else cache(lambda text: len(tokenizer.encode(text)))
    failed = _still_failed(failures, runs)
    num_expected = run["num_runs"] * run["num_questions"]
    drafters = {
        name: {
            "num_expected": num_expected,
            "num_answers": sum(map(len, runs[name])),
            "num_failures": sum(one["drafter"] == name for one in failed),
            "tasks": {task: _score(task, runs[name], baseline=baseline, count_tokens=count_tokens)
                      for task in tasks},
        }
        for name in run["drafters"]
    }  # fmt: skip
    published = [asdict(row) for row in PUBLISHED] if run["bench"] == "spec-bench" else []
    return {"run": run, "baseline": BASELINE, "tasks": tasks, "legacy_missing": None, "failures": failed,
            "drafters": drafters, "published": published}  # fmt: skip


def _score(
    task: str, runs: scores.Runs, *, baseline: scores.Runs, count_tokens: Callable[[str], int] | None
) -> dict[str, Any]:
    mine, plain = scores.select_task(runs, task), scores.select_task(baseline, task)
    legacy = None if count_tokens is None else scores.score_legacy(mine, plain, count_tokens=count_tokens)
    found = {"legacy": legacy, "corrected": scores.score_corrected(mine, plain),
             "matches": scores.compare_texts(mine, plain), "steps": scores.count_steps(mine),
             "time": scores.split_time(mine)}  # fmt: skip
    return {name: None if score is None else asdict(score) for name, score in found.items()}


def _find_tokenizer(run: dict[str, Any]) -> tuple[Tokenizer | None, str | None]:
    """The tokenizer of the run's model, found by its name, or why there is none."""
    try:
        found = Vocabulary.load(run["model"]).tokenizer
    except CheckpointError as error:
        return None, f"it needs the model's tokenizer, and {error}."
    if run.get("tokenizer") not in (None, found.fingerprint()):
        return None, f"it needs the model's tokenizer, and that of {run['model']} here is another than the run's."
    return found, None


def _read_run(folder: Path) -> dict[str, Any]:
    path = folder / RUN_FILE
    try:
        run = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise PromptError(f"cannot read {path}: {error}; give the --output folder of a benchmark") from error
    if not isinstance(run, dict) or not set(RUN_KEYS) <= set(run):
        raise PromptError(f"{path} must hold {', '.join(RUN_KEYS)}; give the --output folder of a benchmark")
    return run


def _read_runs(folder: Path, drafter: str, *, num_runs: int) -> list[list[Answer]]:
    """The answers of every run, [] for one that has no file."""
    paths = [answer_file(folder, drafter, run=number) for number in range(1, num_runs + 1)]
    return [read_answers(path) if path.exists() else [] for path in paths]


def _read_failures(folder: Path) -> list[dict[str, Any]]:
    """The lines of failures.jsonl; [] where there is no such file."""
    path = folder / FAILURES_FILE
    if not path.exists():
        return []
    names = ("question_id", "category", "drafter", "run")
    try:
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line.strip()]
        return [{name: line[name] for name in names} for line in lines]
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise PromptError(f"cannot read {path}: {error!r}; its lines need {', '.join(names)}") from error


def _still_failed(failures: Sequence[dict[str, Any]], runs: Mapping[str, scores.Runs]) -> list[dict[str, Any]]:
    """Each failure once, but those of questions that a resumed run answered."""
    answered = {(name, number, answer.question_id) for name, listed in runs.items()
                for number, run in enumerate(listed, start=1) for answer in run}  # fmt: skip
    by_key = {(one["drafter"], one["run"], one["question_id"]): one for one in failures}
    return [one for key, one in by_key.items() if key not in answered]


def _title(report: dict[str, Any]) -> str:
    return f"{report['run']['bench']} on {report['run']['model']}"


def _render_markdown(report: dict[str, Any]) -> str:
    parts = [f"# {_title(report)}", stamp_text(report["run"]["stamp"])]
    for section in make_sections(report):
        table = markdown_table(section.header, section.rows) if section.rows else ""
        parts += [f"## {section.title}", section.text, table]
    return "\n\n".join(part for part in parts if part)


def _render_html(report: dict[str, Any]) -> str:
    environment = Environment(loader=PackageLoader("kangaroo", "bench"), autoescape=True, undefined=StrictUndefined,
                              trim_blocks=True, lstrip_blocks=True)  # fmt: skip
    return environment.get_template("report.html.jinja").render(
        title=_title(report), command=report["run"]["stamp"]["command"], facts=stamp_facts(report["run"]["stamp"]),
        drafters=report["drafters"], sections=list(make_sections(report)),
        figures=draw_figures(report), captions=CAPTIONS,
    )  # fmt: skip


def render_summary(report: dict[str, Any]) -> Group:
    """A report for the terminal: a row a drafter, then the speedup of each in every task."""
    overall = Table(
        box=SIMPLE_HEAD, padding=(0, 1, 0, 0), title=_title(report), title_justify="left", title_style="bold"
    )
    tasks = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    others = [name for name in report["drafters"] if name != BASELINE]
    headings = ("tokens\n/s", "speedup", f"{scores.CONFIDENCE:.0%}\ninterval", "legacy", "tokens\nper step", "accepted",
                "equal\ntexts")  # fmt: skip
    for table, names in ((overall, ("drafter", *headings)), (tasks, ("speedup in", *others))):
        for index, name in enumerate(names):
            table.add_column(name, justify="right" if index else "left", no_wrap=True)
    for name, drafter in report["drafters"].items():
        one = drafter["tasks"][scores.OVERALL]
        score, matches = one["corrected"], one["matches"]
        style = "green" if matches["num_equal"] == matches["num_compared"] else "bold red"
        overall.add_row(
            name, pick(score, "tokens_per_s", form="{:,.1f}"), _speedup(score), interval(score, "{:.2f}-{:.2f}"),
            pick(one["legacy"], "speedup", form="{:.2f}x"), number(one["steps"]["tokens_per_step"], "{:.2f}"),
            number(one["steps"]["acceptance_rate"], "{:.1%}"), Text(equal(matches), style),
        )  # fmt: skip
    for task in report["tasks"]:
        if task == scores.OVERALL:
            tasks.add_section()
        tasks.add_row(task, *(_speedup(report["drafters"][name]["tasks"][task]["corrected"]) for name in others))
    parts: list[RenderableType] = [overall, tasks] if others else [overall]
    if report["failures"]:
        parts.append(Text(f"failed questions: {len(report['failures'])}; {FAILURES_FILE} has the reasons", "red"))
    if report["legacy_missing"]:
        parts.append(Text(f"no legacy score: {report['legacy_missing']}", "yellow"))
    return Group(*parts)


def _speedup(score: dict[str, Any] | None) -> Text:
    """A speedup, green where its whole interval is above 1, red where below."""
    style = ""
    if score is not None and score["speedup_low"] is not None:
        style = "bold green" if score["speedup_low"] > 1 else "red" if score["speedup_high"] < 1 else ""
    return Text(pick(score, "speedup", form="{:.2f}x"), style)
