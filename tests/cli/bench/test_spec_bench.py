"""`kangaroo bench spec-bench`: what it writes and prints, how it goes on, and how it refuses."""

import json
import sys
from collections.abc import Callable
from html import escape
from pathlib import Path
from typing import get_args

import pytest

from kangaroo.bench.templates import CHECKPOINT, TEMPLATES
from kangaroo.cli.bench.asking import OWNERS, TemplateName
from kangaroo.drafters.settings import SETTINGS
from kangaroo.model.checkpoint import load_model
from kangaroo.tuning import Tuned, tuning_key, write_tuned
from tests.cli.conftest import Ran, Run
from tests.runs import read_runs

Bench = Callable[..., Ran]
LONG = {"question_id": 9, "category": "qa", "turns": ["x" * 300]}


def write(path: Path, *more: dict[str, object]) -> Path:
    lines = [{"question_id": 1, "category": "writing", "turns": ["Write a b a b.", "Again."]},
             {"question_id": 2, "category": "qa", "turns": ["Who is it?"]}, *more]  # fmt: skip
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture
def bench(run: Run, model_folder: Path, tmp_path: Path) -> Bench:
    """Run the verb on the questions of the test's folder."""

    def run_bench(*argv: object, drafters: str = "plain,kangaroo,medusa", model: Path = model_folder) -> Ran:
        return run("bench", "spec-bench", "--model", model, "--questions", tmp_path / "q.jsonl", "--drafters", drafters,
                   "--output", tmp_path / "out", "--runs", 2, "--max-new-tokens", 8, *argv)  # fmt: skip

    write(tmp_path / "q.jsonl")
    return run_bench


def test_a_run_writes_answers_and_a_report_and_prints_its_summary(bench: Bench, tmp_path: Path) -> None:
    ran = bench()
    assert (ran.status, ran.err) == (0, "")
    output = tmp_path / "out"
    assert f"written to {output}" in ran.out.replace("\n", "")
    assert {"run.json", "failures.jsonl", "answers", "report.json"} <= {path.name for path in output.iterdir()}
    runs = read_runs(output)
    assert set(runs) == {"plain", "kangaroo", "medusa"}
    assert all([one.question_id for one in run] == [1, 2] for mine in runs.values() for run in mine)
    assert json.loads((output / "run.json").read_text())["bench"] == "spec-bench"


def test_a_report_names_no_folder_and_holds_no_text(
    bench: Bench, tmp_path: Path, model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = ("--adapter", model_folder / "adapter", "--draft-model", model_folder)
    argv = ["kangaroo", "bench", "spec-bench", "--model", model_folder, f"--output={tmp_path / 'out'}", *flags]
    monkeypatch.setattr(sys, "argv", [str(word) for word in argv])
    write(tmp_path / "q.jsonl", LONG)
    assert bench(*flags, drafters="plain,kangaroo,medusa,draft_model,auto").status == 1
    told = [line["turns"] for line in map(json.loads, (tmp_path / "q.jsonl").read_text().splitlines())]
    answers = [one for mine in read_runs(tmp_path / "out").values() for run in mine for one in run]
    ids = [str(turn) for one in answers for turn in one.choices[0].token_ids]
    texts = [text for one in answers for text in one.choices[0].turns if len(text) > 4]
    assert texts
    folders = [str(path) for path in (tmp_path, model_folder, model_folder.parent, Path.home(), Path.cwd())]
    for name in ("run.json", "report.json", "report.md", "report.html"):
        content = (tmp_path / "out" / name).read_text()
        for secret in (*ids, *folders, *(turn for turns in told for turn in turns), *texts):
            assert secret not in content
            assert json.dumps(secret)[1:-1] not in content
            assert escape(secret) not in content


def test_json_is_the_report_and_plain_is_added(bench: Bench, tmp_path: Path) -> None:
    ran = bench("--json", "--limit", 1, "--template", "vicuna", drafters="kangaroo")
    assert (ran.status, ran.err) == (0, "plain is asked too: the others are compared with it\n")
    assert json.loads(ran.out) == json.loads((tmp_path / "out" / "report.json").read_text())
    run = json.loads((tmp_path / "out" / "run.json").read_text())
    assert list(run["drafters"]) == ["plain", "kangaroo"]
    assert (run["num_questions"], run["template"], run["num_runs"]) == (1, "vicuna", 2)


def test_the_same_command_goes_on_and_another_is_refused(bench: Bench, tmp_path: Path) -> None:
    bench()
    path = tmp_path / "out" / "answers" / "medusa-run-2.jsonl"
    whole = path.read_text()
    path.write_text(whole[:-9])
    ran = bench()
    assert (ran.status, ran.err) == (0, f"going on in {tmp_path / 'out'}: 11 of 12 answers are there\n")
    assert len(path.read_text().splitlines()) == 2
    ran = bench("--temperature", 0.5)
    assert (ran.status, ran.out) == (1, "")
    assert ran.err == (f"error: {tmp_path / 'out'} holds answers with another temperature: 0.0 there, 0.5 asked for; "
                       "give another output folder, or the same settings to go on\n")  # fmt: skip


def test_more_than_one_in_a_hundred_failures_fail_the_run_after_its_report(bench: Bench, tmp_path: Path) -> None:
    write(tmp_path / "q.jsonl", LONG)
    ran = bench("--json")
    assert ran.status == 1
    assert json.loads(ran.out)
    assert ran.err == ("1 of 3 questions failed, question 9 because: the prompt must be under 256 tokens (the "
                       "context), got 301; shorten it or raise max_context if the model allows; all are in "
                       f"{tmp_path / 'out' / 'failures.jsonl'}\n")  # fmt: skip
    failures = [json.loads(line) for line in (tmp_path / "out" / "failures.jsonl").read_text().splitlines()]
    assert {(one["question_id"], one["drafter"], one["run"]) for one in failures} == {
        (9, drafter, run) for drafter in ("plain", "kangaroo", "medusa") for run in (1, 2)
    }


def test_one_failure_in_a_hundred_is_borne(bench: Bench, tmp_path: Path) -> None:
    short = [{"question_id": 100 + i, "category": "qa", "turns": [str(i)]} for i in range(97)]
    write(tmp_path / "q.jsonl", LONG, *short)
    ran = bench("--json", "--max-new-tokens", 1, "--runs", 1, drafters="plain")
    assert (ran.status, ran.err[:27]) == (0, "1 of 100 questions failed, ")


def test_where_nothing_is_answered_there_is_no_report(bench: Bench, tmp_path: Path) -> None:
    (tmp_path / "q.jsonl").write_text(json.dumps(LONG) + "\n")
    ran = bench()
    assert (ran.status, ran.out) == (1, "")
    assert ran.err.startswith("error: all questions failed, the first because: the prompt must be under 256 tokens")
    assert not (tmp_path / "out" / "report.json").exists()


@pytest.mark.parametrize(
    ("argv", "drafters", "reason"),
    [
        ((), "plain,fly", "--drafters: must be of plain, kangaroo"),
        ((), "", "--drafters: must be of plain, kangaroo"),
        (("--adapter", "x"), "plain,medusa", "--adapter: it does nothing without kangaroo in --drafters"),
        (("--max-nodes", "9"), "plain,medusa", "--max-nodes: it does nothing without kangaroo in --drafters"),
        (("--draft-model", "x"), "kangaroo", "--draft-model: it does nothing without draft_model in --drafters"),
        (("--template", "fly"), "plain", "--template"),
        (("--runs", "0"), "plain", "--runs"),
    ],
)
def test_a_command_line_that_makes_no_sense_is_one_line(
    bench: Bench, argv: tuple[str, ...], drafters: str, reason: str
) -> None:
    ran = bench(*argv, drafters=drafters)
    assert (ran.status, ran.out) == (2, "")
    assert reason in ran.err
    assert ran.err.splitlines()[-1].startswith("error: ")


@pytest.mark.parametrize(
    ("argv", "drafters", "reason"),
    [
        (("--categories", "qa, rag"), "plain", "has no category or task 'rag'; it has writing, mt_bench, qa"),
        (("--temperature", "-1"), "plain", "temperature must be 0 (greedy) or in"),
        (("--template", "checkpoint"), "plain", "this checkpoint has no chat template; give template vicuna"),
        (("--gamma", "0"), "plain,kangaroo", "gamma must be"),
        (("--adapter", "/no/such"), "plain,kangaroo", "/no/such"),
        ((), "plain,draft_model", "draft_model needs a draft model, got none"),
    ],
)
def test_what_cannot_be_run_is_one_line_and_leaves_no_folder(
    bench: Bench, tmp_path: Path, argv: tuple[str, ...], drafters: str, reason: str
) -> None:
    ran = bench(*argv, drafters=drafters)
    assert (ran.status, ran.out) == (1, "")
    assert reason in ran.err
    assert ran.err.startswith("error: ")
    assert ran.err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_companion_given_by_its_flag_drafts(
    bench: Bench, bare_folder: Path, model_folder: Path, tmp_path: Path
) -> None:
    flags = ("--adapter", model_folder / "adapter", "--heads", model_folder / "medusa", "--draft-model", model_folder)
    ran = bench(*flags, "--json", drafters="kangaroo,medusa,draft_model,plain", model=bare_folder)
    assert ran.status == 0
    for name in ("kangaroo", "medusa", "draft_model"):
        assert sum(sum(one.choices[0].num_drafted) for one in read_runs(tmp_path / "out")[name][0]) > 0


def test_kangaroos_flags_turn_what_was_tuned_off(bench: Bench, model_folder: Path, tmp_path: Path) -> None:
    model = load_model(str(model_folder))
    tuned = Tuned(batch_size=1, gamma=1, eta=0, num_siblings=1, max_nodes=64, predicted=1.0, measured=1.0)
    write_tuned(tuning_key(model.target, model.adapter_folder), [tuned], stamp={})
    for flags, expected in (
        ((), (1, 0, 1, 64)),
        (("--gamma", 4), (4, 0.6, 1, 64)),
        (("--gamma", 3, "--eta", 0, "--num-siblings", 3, "--max-nodes", 7), (3, 0, 3, 7)),
    ):
        output = tmp_path / str(len(flags))
        assert bench(*flags, "--output", output, "--runs", 1, drafters="kangaroo").status == 0
        drafted = json.loads((output / "run.json").read_text())["drafters"]["kangaroo"]
        assert tuple(drafted[name] for name in ("gamma", "eta", "num_siblings", "max_nodes")) == expected
        choices = [one.choices[0] for one in read_runs(output)["kangaroo"][0]]
        steps, nodes = sum(sum(one.decoding_steps) for one in choices), sum(sum(one.num_drafted) for one in choices)
        assert 0 < nodes <= steps * (1 if expected[0] == 1 else expected[3] - 1)


def test_categories_choose_the_questions(bench: Bench, tmp_path: Path) -> None:
    assert bench("--categories", "mt_bench", drafters="plain").status == 0
    assert [[one.question_id for one in run] for run in read_runs(tmp_path / "out")["plain"]] == [[1], [1]]


def test_choices_are_those_of_the_library() -> None:
    assert set(get_args(TemplateName)) == {*TEMPLATES, CHECKPOINT}
    assert set(OWNERS.values()) <= set(SETTINGS)
