"""Reports: every figure against a few plain lines that work it out anew from the answer files."""

import io
import json
import math
import random
import statistics
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from kangaroo.bench import report
from kangaroo.bench.answers import Answer, Choice, answer_file, append_answer
from kangaroo.bench.published import PUBLISHED
from kangaroo.bench.report import render_summary, write_report
from kangaroo.bench.scores import NUM_RESAMPLES, TASKS, bootstrap_speedup
from kangaroo.errors import OutputError, PromptError
from kangaroo.model.checkpoint import Vocabulary
from kangaroo.model.tokenizer import Tokenizer
from tests.tiny import tiny_tokenizer

# Id, category and turns of every question.
QUESTIONS = (
    (81, "writing", 2),
    (82, "math", 2),
    (161, "translation", 1),
    (241, "qa", 1),
    (242, "qa", 1),
    ("x", "own", 1),
)
DRAFTERS: dict[str, dict[str, Any]] = {"plain": {}, "kangaroo": {"gamma": 6, "eta": 0.6}, "medusa": {"heads": None}}
RUNS = (1, 2, 3)
SECRET = "sécret"
TOKENIZER = Tokenizer(tiny_tokenizer(), settings={}, chat_template=None)
STAMP = {
    **{"command": "kangaroo bench spec-bench --runs 3", "date": "2001-02-03", "kangaroo": "0.0.1", "commit": "abc1234"},
    **{"python": "3.11", "torch": "2.0", "transformers": None, "cpu": "Some CPU", "cpu_cores": 4, "threads": 3},
    **{"cuda_devices": [], "kernel_backend": "native (avx2, 3 threads)"},
}
RUN = {
    **{"bench": "spec-bench", "model": "no/such-model", "fingerprint": "f00", "dtype": "float32", "device": "cpu"},
    **{"drafters": DRAFTERS, "template": "none", "max_new_tokens": 40, "temperature": 0.0, "seed": 0, "num_runs": 3},
    **{"num_questions": len(QUESTIONS), "questions_digest": "d00", "stamp": STAMP},
}
SPEED = {"plain": 1.0, "kangaroo": 1.6, "medusa": 0.8}


def make_choice(drafter: str, question: int, *, num_turns: int, run: int) -> Choice:
    """An answer of made-up but consistent counts and times; the texts of a question are the same for all drafters."""
    noise = random.Random(f"{drafter} {question} {run}")
    fields: dict[str, list[Any]] = {name: [] for name in Choice.model_fields if name != "index"}
    for turn in range(num_turns):
        num_tokens = 5 + 7 * question + 3 * turn
        left, lengths, path = num_tokens - 1, [], random.Random(f"{drafter} {question} {turn}")
        while left:
            lengths.append(1 if drafter == "plain" else min(left, path.choice((1, 1, 2, 3, 5, 10))))
            left -= lengths[-1]
        decode_s = (num_tokens - 1) / 50 / SPEED[drafter] * noise.uniform(0.9, 1.2)
        prefill_s = 0.05 * noise.uniform(0.9, 1.2)
        num_accepted = sum(lengths) - len(lengths)
        values: dict[str, Any] = {
            **{"turns": SECRET * (question + turn + 1), "idxs": len(lengths), "decoding_steps": len(lengths)},
            **{"new_tokens": num_tokens, "wall_time": prefill_s + decode_s + 0.01, "num_prompt_tokens": 9},
            **{"token_ids": [question + turn + place for place in range(num_tokens)], "num_accepted": num_accepted},
            **{
                "num_drafted": 0 if drafter == "plain" else num_accepted + 4 * len(lengths),
                "prefill_time_s": prefill_s,
            },
            **{"decode_time_s": decode_s, "draft_time_s": decode_s * noise.uniform(0, 0.3), "finish_reasons": "length"},
            "verify_time_s": decode_s * noise.uniform(0.5, 0.6),
        }
        for name, value in values.items():
            fields[name].append(value)
        fields["accept_lengths"] += lengths
    return Choice(**fields)


def write_answers(folder: Path) -> Path:
    """Three runs of three drafters; Kangaroo's text differs at 241 in run 2, and Medusa failed at 82 in run 1."""
    (folder / "run.json").write_text(json.dumps(RUN))
    failure = {"question_id": 82, "category": "math", "drafter": "medusa", "run": 1, "reason": f"{SECRET} too long"}
    was_answered_later = failure | {"question_id": 81}
    lines = (failure, failure, was_answered_later)
    (folder / "failures.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for drafter in DRAFTERS:
        for run in RUNS:
            for index, (name, category, num_turns) in enumerate(QUESTIONS):
                choice = make_choice(drafter, index, num_turns=num_turns, run=run)
                if (drafter, name, run) == ("kangaroo", 241, 2):
                    choice.token_ids[0][2] = 99
                answer = Answer(question_id=name, category=category, answer_id="a", model_id=f"tiny/{drafter}",
                                choices=[choice], tstamp=1.0)  # fmt: skip
                if (drafter, name, run) != ("medusa", 82, 1):
                    append_answer(answer_file(folder, drafter, run=run), answer)
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An output folder to change."""
    return write_answers(tmp_path)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An output folder with its report; read only."""
    folder = write_answers(tmp_path_factory.mktemp("written"))
    write_report(folder, tokenizer=TOKENIZER)
    return folder


def read(folder: Path) -> dict[str, Any]:
    """The content of report.json."""
    content: dict[str, Any] = json.loads((folder / "report.json").read_text())
    return content


def load(folder: Path, drafter: str, run: int, task: str) -> dict[Any, dict[str, Any]]:
    """The choices of a file's lines of a task by question id."""
    lines = (folder / "answers" / f"{drafter}-run-{run}.jsonl").read_text().splitlines()
    tasks = {"writing": "mt_bench", "math": "mt_bench"}
    answers = [json.loads(line) for line in lines]
    return {one["question_id"]: one["choices"][0] for one in answers
            if task in ("overall", tasks.get(one["category"], one["category"]))}  # fmt: skip


ALL_TASKS = ["mt_bench", "translation", "qa", "own", "overall"]
every_score = pytest.mark.parametrize(("drafter", "task"), [(name, task) for name in DRAFTERS for task in ALL_TASKS])


@every_score
def test_legacy_score_is_what_spec_bench_computes(written: Path, drafter: str, task: str) -> None:
    """The formulas of its evaluation/speed.py, with numpy, as there."""
    rates, baselines, ratios, lengths = [], [], [], []
    for run in RUNS:
        mine, plain = load(written, drafter, run, task).values(), load(written, "plain", run, task).values()
        speeds = np.array([sum(one["new_tokens"]) / sum(one["wall_time"]) for one in mine])
        tokenized = [sum(len(TOKENIZER.encode(text)) - 1 for text in one["turns"]) for one in plain]
        speeds0 = np.array([count / sum(one["wall_time"]) for count, one in zip(tokenized, plain, strict=True)])
        rates.append(speeds.mean())
        baselines.append(speeds0.mean())
        ratios.append(speeds.mean() / speeds0.mean())
        lengths.extend([length for one in mine for length in one["accept_lengths"]])
    expected = {
        "tokens_per_s": np.mean(rates), "tokens_per_s_std": np.std(rates, ddof=1),
        "baseline_tokens_per_s": np.mean(baselines), "baseline_tokens_per_s_std": np.std(baselines, ddof=1),
        "speedup": np.mean(ratios), "speedup_std": np.std(ratios, ddof=1), "mean_accepted_tokens": np.mean(lengths),
    }  # fmt: skip
    found = read(written)["drafters"][drafter]["tasks"][task]["legacy"]
    assert found == pytest.approx(expected, rel=1e-12)


def medians(folder: Path, drafter: str, task: str, measure: Callable[[dict[str, Any]], float]) -> dict[Any, float]:
    runs = [load(folder, drafter, run, task) for run in RUNS]
    names = [name for name, *_ in QUESTIONS if any(name in run for run in runs)]
    return {name: statistics.median(measure(run[name]) for run in runs if name in run) for name in names}


@every_score
def test_corrected_score_is_tokens_over_decode_time(written: Path, drafter: str, task: str) -> None:
    measures: dict[str, Callable[[dict[str, Any]], float]] = {
        "tokens": lambda one: sum(len(ids) - 1 for ids in one["token_ids"]),
        "decode": lambda one: sum(one["decode_time_s"]),
        "all": lambda one: sum(len(ids) for ids in one["token_ids"]),
        "wall": lambda one: sum(one["wall_time"]),
        "prefill": lambda one: sum(one["prefill_time_s"]),
    }
    mine, plain = ({name: list(medians(written, which, task, measure).values()) for name, measure in measures.items()}
                   for which in (drafter, "plain"))  # fmt: skip
    total, baseline = ({name: sum(values) for name, values in one.items()} for one in (mine, plain))
    rate, baseline_rate = total["tokens"] / total["decode"], baseline["tokens"] / baseline["decode"]
    ratios = []
    for row in np.random.default_rng(0).integers(len(mine["all"]), size=(NUM_RESAMPLES, len(mine["all"]))).tolist():
        drawn = [sum(side[name][place] for place in row) for side in (mine, plain) for name in ("tokens", "decode")]
        ratios.append(drawn[0] / drawn[1] / (drawn[2] / drawn[3]))
    ratios.sort()

    found = read(written)["drafters"][drafter]["tasks"][task]["corrected"]
    bounds = (found.pop("speedup_low"), found.pop("speedup_high"))
    assert found == pytest.approx({
        "num_questions": len(mine["all"]), "num_tokens": total["tokens"], "decode_time_s": total["decode"],
        "tokens_per_s": rate, "baseline_tokens_per_s": baseline_rate, "speedup": rate / baseline_rate,
        "end_to_end_speedup": total["all"] / total["wall"] / (baseline["all"] / baseline["wall"]),
        "prefill_time_s": total["prefill"], "baseline_prefill_time_s": baseline["prefill"],
    })  # fmt: skip
    if len(mine["all"]) == 1:
        assert bounds == (None, None)
        return
    for bound, share in zip(bounds, (0.025, 0.975), strict=True):
        place = share * (NUM_RESAMPLES - 1)
        below, above = ratios[math.floor(place)], ratios[math.ceil(place)]
        assert bound == pytest.approx(below + (place - math.floor(place)) * (above - below), rel=1e-9)


@every_score
def test_steps_and_time_are_summed_over_runs(written: Path, drafter: str, task: str) -> None:
    choices = [one for run in RUNS for one in load(written, drafter, run, task).values()]
    lengths = [length for one in choices for length in one["accept_lengths"]]
    steps = sum(sum(one["decoding_steps"]) for one in choices)
    tokens = sum(len(ids) - 1 for one in choices for ids in one["token_ids"])
    drafted, accepted = (sum(sum(one[name]) for one in choices) for name in ("num_drafted", "num_accepted"))
    decode_s, draft_s, verify_s = (sum(sum(one[f"{name}_time_s"]) for one in choices)
                                   for name in ("decode", "draft", "verify"))  # fmt: skip

    scores = read(written)["drafters"][drafter]["tasks"][task]
    found = scores["steps"]
    assert found["ctar"] == pytest.approx([sum(x > k for x in lengths) / len(lengths) for k in range(1, 9)])
    assert found["accepted_lengths"] == {str(length): lengths.count(length) for length in sorted(set(lengths))}
    assert (found["num_steps"], found["num_drafted"], found["num_accepted"]) == (steps, drafted, accepted)
    assert found["tokens_per_step"] == pytest.approx(tokens / steps)
    assert found["acceptance_rate"] == (None if drafter == "plain" else pytest.approx(accepted / drafted))
    shares = {"draft": draft_s, "verify": verify_s, "overhead": decode_s - draft_s - verify_s}
    assert scores["time"] == pytest.approx({
        "decode_time_s": decode_s, "ms_per_token": 1000 * decode_s / tokens,
        **{f"{name}_share": part_s / decode_s for name, part_s in shares.items()},
    })  # fmt: skip


def test_texts_are_compared_by_their_ids_in_every_run(written: Path) -> None:
    drafters = read(written)["drafters"]
    found = {name: drafter["tasks"]["overall"]["matches"] for name, drafter in drafters.items()}
    assert found["plain"] == found["medusa"] == {"num_compared": 6, "num_equal": 6, "differing_ids": []}
    assert found["kangaroo"] == {"num_compared": 6, "num_equal": 5, "differing_ids": [241]}
    assert drafters["kangaroo"]["tasks"]["qa"]["matches"] == {"num_compared": 2, "num_equal": 1, "differing_ids": [241]}
    assert drafters["kangaroo"]["tasks"]["own"]["matches"]["differing_ids"] == []


def test_failures_are_counted_once_and_only_while_unanswered(written: Path) -> None:
    content = read(written)
    assert content["failures"] == [{"question_id": 82, "category": "math", "drafter": "medusa", "run": 1}]
    counts = [(one["num_expected"], one["num_answers"], one["num_failures"]) for one in content["drafters"].values()]
    assert counts == [(18, 18, 0), (18, 18, 0), (18, 17, 1)]
    assert "missing are 1 of medusa" in (written / "report.md").read_text()


def test_report_has_the_runs_stamp_and_settings(written: Path) -> None:
    content = write_report(written, tokenizer=TOKENIZER)
    assert content["run"] == RUN
    assert content["tasks"] == ALL_TASKS
    assert read(written) == content
    markdown, page = (written / "report.md").read_text(), (written / "report.html").read_text()
    assert markdown.split("\n\n")[1] == "Command: `kangaroo bench spec-bench --runs 3`"
    for text in (markdown, page):
        assert "2001-02-03, commit abc1234; Some CPU, 4 cores, 3 threads; kangaroo 0.0.1" in text
        assert "gamma=6, eta=0.6" in text


def test_report_holds_no_text_of_questions_or_answers(written: Path) -> None:
    content = read(written)
    for name in ("report.md", "report.json", "report.html"):
        text = (written / name).read_text()
        assert SECRET not in text
        assert json.dumps(SECRET).strip('"') not in text
    assert "token_ids" not in json.dumps(content)


def test_published_rows_stand_beside_ours_with_hardware_and_source(written: Path) -> None:
    eagle = "EAGLE2 | 2.71x | 1.82x | 2.19x | 2.11x | 2.71x | 1.91x | 4.36 | 2.25x | Vicuna-7B-v1.3"
    for text in (
        (written / "report.md").read_text(),
        (written / "report.html").read_text().replace("</td><td>", " | "),
    ):
        assert eagle in text
        assert "up to 1.68x" in text
        assert "Some CPU | this run" in text
        assert all(row.source in text and row.hardware in text for row in PUBLISHED)


def test_published_rows_hold_a_speedup_for_each_task_or_for_none() -> None:
    assert len(PUBLISHED) == 17
    for row in PUBLISHED:
        if row.speedups is not None:
            assert tuple(row.speedups) == TASKS
            # The leaderboard's overall speedup is of all questions, so it lies within the tasks'.
            assert min(row.speedups.values()) <= row.overall <= max(row.speedups.values())


def test_other_benchmarks_stand_alone(folder: Path) -> None:
    (folder / "run.json").write_text(json.dumps(RUN | {"bench": "code"}))
    assert write_report(folder, tokenizer=TOKENIZER)["published"] == []
    assert "Leaderboard" not in (folder / "report.md").read_text()


def test_page_needs_nothing_from_elsewhere(written: Path) -> None:
    page = (written / "report.html").read_text()
    assert page.count("<svg") == page.count("<figure>") == len(report.CAPTIONS)
    assert not [word for word in ("<script", "<link", "<img", "@import", "src=", "url(http") if word in page]


def test_report_without_matplotlib_says_what_is_missing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    write_report(folder, tokenizer=TOKENIZER)
    page = (folder / "report.html").read_text()
    assert "<svg" not in page
    assert page.count("needs matplotlib") == len(report.CAPTIONS)


def test_without_the_tokenizer_there_is_no_legacy_score_and_the_report_says_why(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "run.json").write_text(json.dumps(RUN | {"model": "./not-here"}))
    content = write_report(folder)
    assert all(one["legacy"] is None for drafter in content["drafters"].values() for one in drafter["tasks"].values())
    assert "no such model folder: ./not-here" in content["legacy_missing"]
    assert "There is none here: it needs the model's tokenizer" in (folder / "report.md").read_text()


def test_tokenizer_is_that_of_the_runs_model_unless_given(folder: Path) -> None:
    (folder / "run.json").write_text(json.dumps(RUN | {"model": "demo"}))
    mine = write_report(folder)["drafters"]["kangaroo"]["tasks"]["overall"]["legacy"]
    given = write_report(folder, tokenizer=TOKENIZER)["drafters"]["kangaroo"]["tasks"]["overall"]["legacy"]
    assert mine["tokens_per_s"] == given["tokens_per_s"]
    assert mine["baseline_tokens_per_s"] < given["baseline_tokens_per_s"]


def test_another_tokenizer_under_the_models_name_is_not_taken(folder: Path) -> None:
    for fingerprint, is_taken in ((Vocabulary.load("demo").tokenizer.fingerprint(), True), ("another", False)):
        (folder / "run.json").write_text(json.dumps(RUN | {"model": "demo", "tokenizer": fingerprint}))
        content = write_report(folder)
        assert (content["drafters"]["plain"]["tasks"]["overall"]["legacy"] is not None) == is_taken
    assert (
        content["legacy_missing"] == "it needs the model's tokenizer, and that of demo here is another than the run's."
    )


def test_summary_names_every_drafter_task_and_trouble(written: Path) -> None:
    console = Console(width=100, record=True, file=io.StringIO())
    content = read(written)
    console.print(render_summary(content))
    text = console.export_text()
    assert all(word in text for word in (*DRAFTERS, *ALL_TASKS, "failed questions: 1", "5/6"))
    assert f"{content['drafters']['kangaroo']['tasks']['qa']['corrected']['speedup']:.2f}x" in text


def test_one_run_has_no_deviation(folder: Path) -> None:
    (folder / "run.json").write_text(json.dumps(RUN | {"num_runs": 1}))
    legacy = write_report(folder, tokenizer=TOKENIZER)["drafters"]["kangaroo"]["tasks"]["overall"]["legacy"]
    assert legacy["speedup_std"] is None
    assert " ± " not in (folder / "report.md").read_text()


def test_drafter_without_answers_has_no_scores_but_a_row(folder: Path) -> None:
    for run in RUNS:
        answer_file(folder, "medusa", run=run).unlink()
    overall = write_report(folder, tokenizer=TOKENIZER)["drafters"]["medusa"]["tasks"]["overall"]
    assert (overall["corrected"], overall["legacy"], overall["time"]) == (None, None, None)
    assert "| medusa | n/a | n/a | n/a | n/a | n/a | n/a | n/a | 0/0 |" in (folder / "report.md").read_text()


def test_plain_decoding_alone_has_a_report(folder: Path) -> None:
    (folder / "run.json").write_text(json.dumps(RUN | {"drafters": {"plain": {}}}))
    score = write_report(folder, tokenizer=TOKENIZER)["drafters"]["plain"]["tasks"]["overall"]["corrected"]
    assert (score["speedup"], score["speedup_low"], score["speedup_high"]) == (1, 1, 1)


def test_texts_of_one_token_decode_nothing(folder: Path) -> None:
    for path in (folder / "answers").iterdir():
        answers = [json.loads(line) for line in path.read_text().splitlines()]
        for choice in (one["choices"][0] for one in answers):
            num_turns = len(choice["turns"])
            choice |= {"token_ids": [[1]] * num_turns, "accept_lengths": []}
            choice |= {name: [0] * num_turns for name in ("decoding_steps", "num_drafted", "decode_time_s")}
        path.write_text("".join(json.dumps(one) + "\n" for one in answers))
    overall = write_report(folder, tokenizer=TOKENIZER)["drafters"]["kangaroo"]["tasks"]["overall"]
    assert (overall["corrected"], overall["time"], overall["steps"]["ctar"]) == (None, None, None)
    assert f"| kangaroo |{' n/a |' * 8}" in (folder / "report.md").read_text()


def test_empty_texts_have_no_legacy_speedup(folder: Path) -> None:
    for path in (folder / "answers").iterdir():
        answers = [json.loads(line) for line in path.read_text().splitlines()]
        for choice in (one["choices"][0] for one in answers if one["category"] == "qa"):
            choice["turns"] = [""]
        path.write_text("".join(json.dumps(one) + "\n" for one in answers))
    tasks = write_report(folder, tokenizer=TOKENIZER)["drafters"]["kangaroo"]["tasks"]
    # Nothing but the BOS, which is taken off.
    assert tasks["qa"]["legacy"]["baseline_tokens_per_s"] == 0 < tasks["qa"]["legacy"]["tokens_per_s"]
    assert (tasks["qa"]["legacy"]["speedup"], tasks["qa"]["legacy"]["speedup_std"]) == (None, None)
    assert tasks["translation"]["legacy"]["speedup"] > 0
    legacy = (folder / "report.md").read_text().split("## Legacy score")[1].split("##")[0]
    cells = next(line for line in legacy.splitlines() if line.startswith("| kangaroo ")).split(" | ")
    assert cells[1 + ALL_TASKS.index("qa")] == "n/a"


def test_interval_tightens_with_questions_and_holds_the_true_ratio() -> None:
    noise = np.random.default_rng(7)

    @cache
    def bounds(num_questions: int) -> tuple[float, float]:
        tokens = noise.integers(10, 200, num_questions).astype(float)
        mine, plain = (np.stack([tokens, tokens * each * noise.lognormal(0, 0.1, num_questions)], axis=1)
                       for each in (0.01, 0.015))  # fmt: skip
        return bootstrap_speedup(mine, plain)

    for num_questions in (50, 800):
        low, high = bounds(num_questions)
        assert low < 1.5 < high
    assert bounds(800)[1] - bounds(800)[0] < (bounds(50)[1] - bounds(50)[0]) / 2


def test_interval_is_paired() -> None:
    """Questions of very different speed, each exactly twice as fast as plain decoding: no doubt is left."""
    seconds = np.array([0.1, 1.0, 30.0, 7.0])
    tokens = np.array([10.0, 500.0, 20.0, 70.0])
    bounds = bootstrap_speedup(np.stack([tokens, seconds / 2], axis=1), np.stack([tokens, seconds], axis=1))
    assert bounds == pytest.approx((2, 2))


def test_folder_without_a_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PromptError, match=r"cannot read .*run\.json: .*give the --output folder"):
        write_report(tmp_path)
    (tmp_path / "run.json").write_text('{"bench": "code"}')
    with pytest.raises(PromptError, match=r"run\.json must hold bench, model"):
        write_report(tmp_path)
    (tmp_path / "run.json").write_text(json.dumps(RUN))
    with pytest.raises(PromptError, match="no answers of plain"):
        write_report(tmp_path, tokenizer=TOKENIZER)


@pytest.mark.parametrize("line", ["{", "[]", '{"question_id": 1}'])
def test_damaged_failures_are_refused(folder: Path, line: str) -> None:
    (folder / "failures.jsonl").write_text(line + "\n")
    with pytest.raises(PromptError, match=r"cannot read .*failures\.jsonl"):
        write_report(folder, tokenizer=TOKENIZER)


@pytest.mark.parametrize("name", ["report.md", "report.html"])
def test_report_that_cannot_be_written_is_one_error(folder: Path, name: str) -> None:
    (folder / name).mkdir()
    with pytest.raises(OutputError, match="cannot write"):
        write_report(folder, tokenizer=TOKENIZER)
