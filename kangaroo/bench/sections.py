"""What a report says, section by section, for Markdown and HTML alike."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from kangaroo.bench.scores import CONFIDENCE, MAX_CTAR, NUM_RESAMPLES, OVERALL, TASKS

LEGACY = (
    "Spec-Bench's own formula (its evaluation/speed.py), to compare with its leaderboard: every question's tokens a "
    "second, prefill included, are averaged over questions, and the speedup is the ratio of the two averages; mean and "
    "sample deviation over runs. A drafter's tokens are counted as generated, plain decoding's by tokenising its text "
    "anew, special tokens included, minus 1 for the BOS. So plain decoding against itself is not exactly 1, and a "
    "short answer weighs as much as a long one. As in Spec-Bench a call gives text, so that its time spans turning ids "
    "into text, too."
)
CORRECTED = (
    "Token ids are counted on both sides, and the speedup is the ratio of summed tokens over summed decode time, over "
    "all questions that both answered; a question counts with its median over runs. The prefill is apart, and so is "
    "the first token of each turn, which it emits; end to end is the ratio for whole calls, with both. The interval is "
    f"a paired bootstrap's: questions are drawn with replacement {NUM_RESAMPLES:,} times, both sides of each together, "
    f"and {CONFIDENCE:.0%} of the speedups lie within."
)
EQUAL = (
    "A question's text is equal if its token ids are those of plain decoding in every run, run 1 compared with run 1 "
    "and so on."
)
STEPS = (
    "All runs together. A step is a pass that verifies a draft; the prefill is none. Tokens per step counts what steps "
    "emitted, the target's own token behind each accepted draft included."
)
RATE = "The share of drafted tokens that came into the text, over all runs; of a tree all nodes count."
CTAR = (
    "The consistent token acceptance rate of the Kangaroo paper: the share of all steps whose first k drafted tokens "
    "were all accepted. A step without a draft counts as one that accepts none."
)
PUBLISHED = (
    "Ours are legacy scores, as the published ones are, from the hardware named in the first paragraph. The others "
    "were measured on other hardware, models and code: they give a sense of scale, and rank nothing against ours."
)


@dataclass(frozen=True)
class Section:
    """A heading, what explains it, a table of texts, and the name of its figure, if it has one."""

    title: str
    text: str
    header: list[str]
    rows: list[list[str]]
    figure: str | None = None


def make_sections(report: dict[str, Any]) -> Iterator[Section]:
    """The sections of report.json's content."""
    yield _summary(report)
    yield _speedups(report)
    yield _legacy(report)
    if report["published"]:
        yield _published(report)
    steps = _by_task(report, lambda one: number(one["steps"]["tokens_per_step"], "{:.2f}"))
    yield Section("Tokens per step", STEPS, *steps, "tokens_per_step")
    rates = _by_task(report, lambda one: number(one["steps"]["acceptance_rate"], "{:.1%}"))
    yield Section("Acceptance rate", RATE, *rates)
    yield _ctar(report)
    yield _lengths(report)
    yield _time(report)
    yield _equality(report)
    yield _failures(report)
    yield _settings(report["run"])


def number(value: float | None, form: str) -> str:
    """A figure as text, n/a where there is none."""
    return "n/a" if value is None else form.format(value)


def pick(scores: dict[str, Any] | None, name: str, *, form: str) -> str:
    """A figure of a score as text, n/a where there is no score or no figure."""
    return "n/a" if scores is None else number(scores[name], form)


def interval(corrected: dict[str, Any] | None, form: str = "{:.2f} to {:.2f}") -> str:
    """The bounds of a speedup as text."""
    if corrected is None or corrected["speedup_low"] is None:
        return "n/a"
    return form.format(corrected["speedup_low"], corrected["speedup_high"])


def equal(matches: dict[str, Any]) -> str:
    """How many texts are plain decoding's, as text."""
    return f"{matches['num_equal']}/{matches['num_compared']}"


def _rows(report: dict[str, Any], cells: Callable[[dict[str, Any]], list[str]]) -> list[list[str]]:
    """A row of the overall scores of every drafter."""
    return [[name, *cells(drafter["tasks"][OVERALL])] for name, drafter in report["drafters"].items()]


def _by_task(report: dict[str, Any], cell: Callable[[dict[str, Any]], str]) -> tuple[list[str], list[list[str]]]:
    """Header and rows of a table of drafters by tasks."""
    rows = [[name, *(cell(drafter["tasks"][task]) for task in report["tasks"])]
            for name, drafter in report["drafters"].items()]  # fmt: skip
    return ["drafter", *report["tasks"]], rows


def _summary(report: dict[str, Any]) -> Section:
    def cells(one: dict[str, Any]) -> list[str]:
        score = one["corrected"]
        return [pick(score, "tokens_per_s", form="{:.1f}"), pick(score, "speedup", form="{:.2f}x"), interval(score),
                pick(score, "end_to_end_speedup", form="{:.2f}x"), pick(one["legacy"], "speedup", form="{:.2f}x"),
                number(one["steps"]["tokens_per_step"], "{:.2f}"), number(one["steps"]["acceptance_rate"], "{:.1%}"),
                equal(one["matches"])]  # fmt: skip

    header = ["drafter", "tokens/s", "speedup", f"{CONFIDENCE:.0%} interval", "end to end", "legacy speedup",
              "tokens per step", "accepted", "equal texts"]  # fmt: skip
    run = report["run"]
    text = (
        f"{run['num_questions']} questions, {run['num_runs']} runs. Tokens/s, speedup, interval: the corrected score."
    )
    missing = {name: one["num_expected"] - one["num_answers"] for name, one in report["drafters"].items()}
    if any(missing.values()):
        listed = ", ".join(f"{count} of {name}" for name, count in missing.items() if count)
        text += f" Not all questions are answered: missing are {listed}."
    return Section("Overall", text, header, _rows(report, cells))


def _speedups(report: dict[str, Any]) -> Section:
    def cell(one: dict[str, Any]) -> str:
        bounds = interval(one["corrected"])
        return pick(one["corrected"], "speedup", form="{:.2f}x") + ("" if bounds == "n/a" else f" ({bounds})")

    return Section("Corrected score", CORRECTED, *_by_task(report, cell), "speedup")


def _legacy(report: dict[str, Any]) -> Section:
    if report["legacy_missing"] is not None:
        return Section("Legacy score", f"{LEGACY} There is none here: {report['legacy_missing']}", [], [])

    def cell(one: dict[str, Any]) -> str:
        score = one["legacy"]
        deviation = "" if score is None or score["speedup_std"] is None else f" ± {score['speedup_std']:.2f}"
        return pick(score, "speedup", form="{:.2f}x") + deviation

    header, rows = _by_task(report, cell)
    overall = _rows(report, lambda one: [pick(one["legacy"], "mean_accepted_tokens", form="{:.2f}"),
                                         pick(one["legacy"], "tokens_per_s", form="{:.1f}"),
                                         pick(one["legacy"], "baseline_tokens_per_s", form="{:.1f}")])  # fmt: skip
    header += ["mean accepted tokens", "tokens/s", "plain's tokens/s"]
    return Section("Legacy score", LEGACY, header, [row + more[1:] for row, more in zip(rows, overall, strict=True)])


def _published(report: dict[str, Any]) -> Section:
    run, stamp = report["run"], report["run"]["stamp"]
    model = f"{run['model']}, {run['dtype']}"
    hardware = ", ".join(stamp["cuda_devices"]) if run["device"].startswith("cuda") else str(stamp["cpu"])
    rows = []
    for name, drafter in report["drafters"].items():
        tasks = drafter["tasks"]
        speedups = [pick(tasks[task]["legacy"], "speedup", form="{:.2f}x") if task in tasks else "" for task in TASKS]
        overall = tasks[OVERALL]["legacy"]
        rows.append([f"{name} (ours)", *speedups, pick(overall, "mean_accepted_tokens", form="{:.2f}"),
                     pick(overall, "speedup", form="{:.2f}x"), model, hardware, "this run"])  # fmt: skip
    for one in report["published"]:
        listed = one["speedups"] or {}
        rows.append([one["method"], *(f"{listed[task]:.2f}x" if task in listed else "" for task in TASKS),
                     "" if one["mean_accepted_tokens"] is None else f"{one['mean_accepted_tokens']:.2f}",
                     f"{'up to ' if one['up_to'] else ''}{one['overall']:.2f}x", one["model"], one["hardware"],
                     one["source"]])  # fmt: skip
    header = ["method", *TASKS, "mean accepted tokens", OVERALL, "model", "hardware", "source"]
    return Section("Beside published results", PUBLISHED, header, rows)


def _ctar(report: dict[str, Any]) -> Section:
    rows = _rows(report, lambda one: [number(rate, "{:.1%}") for rate in one["steps"]["ctar"] or [None] * MAX_CTAR])
    header = ["drafter", *(f"CTAR@{k}" for k in range(1, MAX_CTAR + 1))]
    return Section("Acceptance by draft position", CTAR, header, rows, "ctar")


def _lengths(report: dict[str, Any]) -> Section:
    counts = {name: one["tasks"][OVERALL]["steps"]["accepted_lengths"] for name, one in report["drafters"].items()}
    lengths = sorted({int(length) for found in counts.values() for length in found})
    rows = [[name, *(f"{found.get(str(length), 0):,}" for length in lengths)] for name, found in counts.items()]
    text = "How many steps emitted so many tokens, over all runs."
    return Section("Accepted lengths", text, ["drafter", *map(str, lengths)], rows, "accepted_lengths")


def _time(report: dict[str, Any]) -> Section:
    def cells(one: dict[str, Any]) -> list[str]:
        shares = [pick(one["time"], f"{part}_share", form="{:.1%}") for part in ("draft", "verify", "overhead")]
        prefill = [
            pick(one["corrected"], name, form="{:.2f}") for name in ("prefill_time_s", "baseline_prefill_time_s")
        ]
        return [*shares, pick(one["time"], "ms_per_token", form="{:.2f}"), *prefill]

    text = ("Shares of decode time, over all runs; overhead is what is neither drafting nor the verifying pass. "
            "Prefill: seconds for all questions, of the drafter and of plain decoding, medians over runs.")  # fmt: skip
    header = ["drafter", "draft", "verify", "overhead", "ms per token", "prefill s", "plain's prefill s"]
    return Section("Where the time goes", text, header, _rows(report, cells), "time")


def _equality(report: dict[str, Any]) -> Section:
    rows = _rows(report, lambda one: [equal(one["matches"]),
                                      ", ".join(map(str, one["matches"]["differing_ids"])) or "none"])  # fmt: skip
    return Section("Exact match", EQUAL, ["drafter", "equal texts", "questions that differ"], rows)


def _failures(report: dict[str, Any]) -> Section:
    rows = []
    for name, drafter in report["drafters"].items():
        failed = [f"{one['question_id']} (run {one['run']})" for one in report["failures"] if one["drafter"] == name]
        rows.append([name, f"{drafter['num_answers']} of {drafter['num_expected']}", str(len(failed)),
                     ", ".join(failed) or "none"])  # fmt: skip
    text = "Questions that raised an error; failures.jsonl has the reasons. They count in no score."
    return Section("Failures", text, ["drafter", "answers", "failures", "questions that failed"], rows)


def _settings(run: dict[str, Any]) -> Section:
    rows = [[name.replace("_", " "), str(value)] for name, value in run.items() if name not in ("stamp", "drafters")]
    rows += [[name, _tell(settings)] for name, settings in run["drafters"].items()]
    return Section("Settings", "", ["setting", "value"], rows)


def _tell(settings: dict[str, Any]) -> str:
    """A drafter's settings as text; auto's sources hold settings themselves."""
    told = (f"{name}=({_tell(value)})" if isinstance(value, dict) else f"{name}={value}"
            for name, value in settings.items())  # fmt: skip
    return ", ".join(told) or "nothing to set"
