"""`kangaroo bench compare` on a tiny model: the table, the files, and what is refused."""

import json
import sys
from pathlib import Path

import pytest

from tests.cli.conftest import Run, build_model


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.txt"
    path.write_text("def add(a, b):\n\nimport os\n\nhello")
    return path


@pytest.fixture(autouse=True)
def _no_llama_cpp(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llama_cpp", None)


def test_the_usual_contenders_are_compared_and_those_missing_named(run: Run, model_folder: Path, prompts: Path) -> None:
    argv = ["bench", "compare", "--model", model_folder, "--prompts", prompts, "--max-new-tokens", 6, "--rounds", 2]
    ran = run(*argv)
    assert (ran.status, ran.err) == (0, "")
    table = [line.split() for line in ran.out.splitlines()]
    rows = {line[0]: line[1:] for line in table if len(line) > 4 and line[-1] == "6/6"}
    assert list(rows) == ["plain", "kangaroo", "prompt_lookup", "transformers", "transformers-prompt-lookup"]
    assert rows["plain"][1] == "1.00x"
    assert rows["transformers"][2:] == ["1.00x", "n/a", "6/6"]
    assert "Left out: llama.cpp: the contender llama_cpp is not installed" in ran.out
    assert "\x1b" not in ran.out


def test_vllm_of_this_interpreter_is_a_usual_contender(
    run: Run, model_folder: Path, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "vllm.py").write_text("raise ImportError('no such engine')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    argv = ["bench", "compare", "--model", model_folder, "--prompts", prompts, "--limit", 1, "--max-new-tokens", 2,
            "--rounds", 1, "--json"]  # fmt: skip
    assert "no such engine" in json.loads(run(*argv).out)["left_out"]["vllm"]
    assert json.loads(run(*argv, "--contender", "prompt_lookup").out)["left_out"] == {}


def test_json_and_files_hold_the_same_result(run: Run, model_folder: Path, prompts: Path, tmp_path: Path) -> None:
    stem = tmp_path / "results" / "v1.2"
    ran = run("bench", "compare", "--model", model_folder, "--prompts", prompts, "--limit", 2, "--max-new-tokens", 5,
              "--rounds", 1, "--contender", "transformers", "--contender", "kangaroo", "--draft-model", model_folder,
              "--dtype", "bfloat16", "--output", stem, "--json")  # fmt: skip
    assert (ran.status, ran.err, ran.out.count("\n")) == (0, "", 1)
    result = json.loads(ran.out)
    assert json.loads(stem.with_name("v1.2.json").read_text()) == result
    assert list(result) == ["settings", "drafters", "stamp", "left_out", "contenders"]
    assert (result["settings"]["dtype"], result["settings"]["rounds"], result["left_out"]) == ("bfloat16", 1, {})
    assert list(result["drafters"]) == ["plain", "kangaroo", "draft_model"]
    assert (result["drafters"]["kangaroo"]["gamma"], result["drafters"]["kangaroo"]["eta"]) == (6, 0.6)
    rows = {row["contender"]: row for row in result["contenders"]}
    assert list(rows) == ["plain", "kangaroo", "draft_model", "transformers", "transformers-assistant"]
    for name in ("plain", "kangaroo", "draft_model"):
        assert (rows[name]["num_equal"], rows[name]["num_texts"]) == (2, 2)
        low, high = rows[name]["interval"]
        assert low <= rows[name]["ratio_to"] <= high
    assert rows["transformers"]["version"]
    assert str(model_folder.parent) not in json.dumps(result)
    page = stem.with_name("v1.2.md").read_text()
    assert "| transformers-assistant |" in page
    assert ", commit " in page


def test_errors_are_one_line(run: Run, bare_folder: Path, prompts: Path, tmp_path: Path) -> None:
    (tmp_path / "none.txt").write_text("\n\n")
    (tmp_path / "long.txt").write_text("x" * 200)
    (tmp_path / "file").touch()
    other = build_model(tmp_path / "other")
    tokenizer = other / "tokenizer.json"
    tokenizer.write_text(tokenizer.read_text().replace("<|eos|>", "<|end|>"))
    for flags, fragment in (
        (["--contender", "tortoise"], "contender must be one of plain, kangaroo"),
        (["--contender", "vllm"], "contender vllm needs --vllm-python"),
        (["--contender", "kangaroo"], "no adapter folder"),
        (["--prompts", tmp_path / "none.txt"], "holds no prompt"),
        (["--prompts", tmp_path / "long.txt"], "prompt 1 must be 1..128 tokens"),
        (["--max-new-tokens", 256], "max_new_tokens must be below the context of 256"),
        (["--draft-model", other], "must have the target's vocabulary"),
        (["--draft-model", tmp_path / "nowhere"], "no such model folder"),
        (["--output", tmp_path / "file" / "x"], "cannot write to"),
    ):
        ran = run("bench", "compare", "--model", bare_folder, "--prompts", prompts, *flags)
        assert (ran.status, ran.out) == (1, "")
        assert ran.err.startswith("error: ")
        assert ran.err.count("\n") == 1
        assert fragment in ran.err


def test_usage_errors(run: Run, bare_folder: Path, prompts: Path) -> None:
    assert run("bench", "compare", "--model", bare_folder).status == 2
    assert run("bench", "compare", "--model", bare_folder, "--prompts", prompts, "--rounds", 0).status == 2
    assert run("bench", "compare", "--model", bare_folder, "--prompts", prompts, "--dtype", "int8").status == 2
