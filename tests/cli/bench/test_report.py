"""`kangaroo bench report`: the summary, the files, and folders that hold no benchmark."""

import json
from pathlib import Path

import pytest

from kangaroo.bench.answers import Answer, Choice, answer_file, append_answer
from kangaroo.bench.record import stamp
from tests.cli.conftest import Run


@pytest.fixture
def output(tmp_path: Path) -> Path:
    """The output folder of one question, which took the other drafter half the time of plain decoding."""
    run = {"bench": "spec-bench", "model": "elsewhere", "dtype": "float32", "device": "cpu", "num_runs": 1,
           "drafters": {"plain": {}, "prompt_lookup": {}}, "num_questions": 1, "stamp": stamp()}  # fmt: skip
    (tmp_path / "run.json").write_text(json.dumps(run))
    for drafter, seconds, lengths in (("plain", 2.0, [1, 1, 1, 1]), ("prompt_lookup", 1.0, [4])):
        choice = Choice(
            turns=["text"], idxs=[len(lengths)], decoding_steps=[len(lengths)], new_tokens=[5], wall_time=[seconds + 1],
            accept_lengths=lengths, token_ids=[[1, 2, 3, 4, 5]], num_prompt_tokens=[3], num_drafted=[0],
            num_accepted=[0], prefill_time_s=[1.0], decode_time_s=[seconds], draft_time_s=[0.0],
            verify_time_s=[seconds], finish_reasons=["length"],
        )  # fmt: skip
        answer = Answer(question_id=1, category="qa", answer_id="a", model_id="m", choices=[choice], tstamp=0.0)
        append_answer(answer_file(tmp_path, drafter, run=1), answer)
    return tmp_path


def test_report_is_written_and_summed_up(run: Run, output: Path, model_folder: Path) -> None:
    ran = run("bench", "report", output, "--model", model_folder)
    assert (ran.status, ran.err) == (0, "")
    row = next(line for line in ran.out.splitlines() if line.startswith(" prompt_lookup"))
    # 5 tokens in 2 s against 4 bytes in 3 s, as Spec-Bench counts.
    assert row.split() == ["prompt_lookup", "4.0", "2.00x", "n/a", "1.88x", "4.00", "n/a", "1/1"]
    assert max(map(len, ran.out.splitlines()[:-1])) <= 80
    assert {path.name for path in output.glob("report.*")} == {"report.md", "report.json", "report.html"}


def test_json_is_the_report(run: Run, output: Path) -> None:
    ran = run("bench", "report", output, "--json")
    assert (ran.status, ran.err, ran.out.count("\n")) == (0, "", 1)
    assert json.loads(ran.out) == json.loads((output / "report.json").read_text())
    assert "no such model folder: elsewhere" in json.loads(ran.out)["legacy_missing"]


def test_folder_without_a_benchmark_is_one_error(run: Run, tmp_path: Path) -> None:
    ran = run("bench", "report", tmp_path)
    assert (ran.status, ran.out) == (1, "")
    assert ran.err.startswith("error: cannot read")
    assert ran.err.count("\n") == 1
