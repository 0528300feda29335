"""`kangaroo bench code` and `summarize`: prompts of any file, under the name of the verb."""

import gzip
import json
from pathlib import Path

import pytest

from tests.cli.conftest import Run
from tests.runs import read_runs


@pytest.mark.parametrize(("verb", "category"), [("code", "code"), ("summarize", "summarization")])
def test_prompts_are_continued_as_they_are(
    run: Run, model_folder: Path, tmp_path: Path, verb: str, category: str
) -> None:
    data, output = tmp_path / "data.jsonl.gz", tmp_path / "out"
    lines = [{"task_id": f"HumanEval/{i}", "prompt": f"def f{i}():\n    return f"} for i in range(3)]
    data.write_bytes(gzip.compress("\n".join(map(json.dumps, lines)).encode()))
    ran = run("bench", verb, "--model", model_folder, "--data", data, "--drafters", "plain,prompt_lookup", "--output",
              output, "--runs", 1, "--max-new-tokens", 9, "--limit", 2, "--temperature", 0.7, "--json")  # fmt: skip
    assert (ran.status, ran.err) == (0, "")
    assert json.loads(ran.out) == json.loads((output / "report.json").read_text())
    settings = json.loads((output / "run.json").read_text())
    assert (settings["bench"], settings["temperature"], settings["template"]) == (verb, 0.7, "none")
    plain, lookup = (read_runs(output)[name][0] for name in ("plain", "prompt_lookup"))
    assert [(one.question_id, one.category) for one in plain] == [("HumanEval/0", category), ("HumanEval/1", category)]
    assert [one.choices[0].token_ids for one in plain] == [one.choices[0].token_ids for one in lookup]
    # The BOS and a token for every byte: no template has added anything.
    assert plain[0].choices[0].num_prompt_tokens == [1 + len(lines[0]["prompt"])]


def test_a_missing_file_is_one_line(run: Run, model_folder: Path, tmp_path: Path) -> None:
    ran = run("bench", "code", "--model", model_folder, "--data", tmp_path / "no.jsonl", "--drafters", "plain",
              "--output", tmp_path / "out")  # fmt: skip
    assert (ran.status, ran.out, ran.err.count("\n")) == (1, "", 1)
    assert "cannot read the prompts of" in ran.err
