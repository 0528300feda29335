"""`kangaroo check`: the report, its JSON, and the exit status that a perturbed kernel must turn."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from kangaroo.kernels import cpu
from tests.spoiling import one_ulp, spoil_wide_passes

from .conftest import Run

ROOT = Path(__file__).parents[2]
SHORT = ("--max-new-tokens", 16, "--limit", 3)
POSITIONS = 16 * 3


@pytest.fixture(autouse=True)
def _native(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KANGAROO_KERNELS", cpu.instruction_sets()[-1])


@pytest.mark.parametrize(
    ("flags", "storage"),
    [
        ([], "float32"),
        (["--weights", "int8"], "int8"),
        (["--dtype", "bfloat16", "--temperature", 0.8], "bfloat16"),
    ],
)
def test_identical_runs_succeed(run: Run, model_folder: Path, flags: list[object], storage: str) -> None:
    ran = run("check", "--model", model_folder, *SHORT, "--gamma", 3, "--eta", 0, *flags)
    assert (ran.status, ran.err) == (0, "")
    assert f" in {storage}, native (" in ran.out
    assert "3 of 3 prompts" in ran.out
    assert f"{POSITIONS} of {POSITIONS} positions" in ran.out
    assert ran.out.endswith("identical: yes, every token and every logit.\n")
    assert "\x1b" not in ran.out


def test_json_is_one_object(run: Run, model_folder: Path) -> None:
    ran = run("check", "--model", model_folder, *SHORT, "--gamma", 2, "--eta", 0, "--json")
    assert (ran.status, ran.err, ran.out.count("\n")) == (0, "", 1)
    result = json.loads(ran.out)
    assert list(result) == ["settings", "stamp", "backend", "identical", "totals", "prompts"]
    assert result["settings"]["gamma"] == 2
    assert result["settings"]["model"] == str(model_folder)
    assert result["settings"]["prompts"] is None
    assert result["backend"].startswith("native (")
    assert result["stamp"]["kernel_backend"] == result["backend"]
    assert "commit" in result["stamp"]
    assert result["identical"] is True
    assert result["totals"]["num_positions_identical"] == POSITIONS
    assert [one["name"] for one in result["prompts"]] == ["1", "2", "3"]
    for one in result["prompts"]:
        assert (one["tokens_identical"], one["logits_identical"], one["divergence"]) == (True, True, None)
        assert sum(one["accepted_of_draft"].values()) == one["num_steps"]


def test_one_ulp_fails_although_tokens_are_the_same(
    run: Run, model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoil_wide_passes(monkeypatch, one_ulp)
    ran = run("check", "--model", model_folder, *SHORT)
    assert ran.status == 1
    assert "prompt 1: tokens identical, logits differ at" in ran.out
    assert "0 of 3 prompts" in ran.out
    assert ran.out.endswith("identical: no; every token is, but logits are not.\n")
    ran = run("check", "--model", model_folder, *SHORT, "--json")
    result = json.loads(ran.out)
    assert (ran.status, result["identical"]) == (1, False)
    assert (result["totals"]["num_tokens_identical"], result["totals"]["num_logits_identical"]) == (3, 0)
    assert result["prompts"][0]["logits_difference"]["position"] >= 1
    assert 0 < result["prompts"][0]["logits_difference"]["largest"] < 1e-3


def test_flipped_tokens_fail_and_are_named(run: Run, model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spoil_wide_passes(monkeypatch, lambda states: states.flip(-1).contiguous())
    argv = ["check", "--model", model_folder, *SHORT]
    ran = run(*argv, "--json")
    found = json.loads(ran.out)["prompts"][0]["divergence"]
    assert (ran.status, found["near_tie"]) == (1, False)
    assert found["margin"] > 0
    assert found["candidates"][0] != found["candidates"][1]
    ran = run(*argv)
    assert ran.status == 1
    assert f"prompt 1: tokens differ from new token {found['position']}: plain " in ran.out
    assert all(f"({token})" in ran.out for token in found["candidates"])
    assert f"{found['margin']:.3g} apart: more than rounding explains" in ran.out
    assert "identical: no; texts that differ: 3, at a near-tie: 0.\n" in ran.out


def test_reference_kernels_are_named_and_their_near_ties_explained(
    run: Run, model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KANGAROO_KERNELS", "reference")
    ran = run("check", "--model", model_folder, *SHORT)
    assert ran.status in (0, 1)
    assert "reference kernels" in ran.out
    assert "near-tie" in ran.out
    assert json.loads(run("check", "--model", model_folder, *SHORT, "--json").out)["backend"] == "reference"


def test_prompts_of_a_file(run: Run, model_folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "questions.jsonl"
    lines = [{"question_id": 81, "turns": ["hello", "again"]}, {"task_id": "HumanEval/0", "prompt": "def f():\n"}]
    path.write_text("\n".join(json.dumps(line) for line in lines))
    argv = ["check", "--model", model_folder, "--prompts", path, "--max-new-tokens", 4, "--json"]
    result = json.loads(run(*argv).out)
    assert [(one["name"], one["num_prompt_tokens"]) for one in result["prompts"]] == [("81", 6), ("HumanEval/0", 10)]
    assert len(json.loads(run(*argv, "--limit", 1).out)["prompts"]) == 1


def test_errors_are_one_line(run: Run, model_folder: Path, bare_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "bad.jsonl").write_text("{")
    (tmp_path / "long.txt").write_text("x" * 300)
    for model, flags, fragment in (
        (bare_folder, [], "no adapter folder"),
        (model_folder, ["--prompts", tmp_path / "bad.jsonl"], "line 1: malformed JSON"),
        (model_folder, ["--prompts", tmp_path / "none.txt"], "cannot read the prompts"),
        (model_folder, ["--prompts", tmp_path / "long.txt"], "prompt 1 must be 1..255 tokens"),
        (model_folder, ["--gamma", 0], "gamma must be at least 1"),
        (model_folder, ["--temperature", -1], "temperature must be 0"),
    ):
        ran = run("check", "--model", model, *flags)
        assert (ran.status, ran.out) == (1, "")
        assert ran.err.startswith("error: ")
        assert ran.err.count("\n") == 1
        assert fragment in ran.err


@pytest.mark.parametrize(("flags", "fragment"), [(["--limit", 0], "--limit"), (["--drafter", "plain"], "--drafter")])
def test_usage_errors(run: Run, model_folder: Path, flags: list[object], fragment: str) -> None:
    ran = run("check", "--model", model_folder, *flags)
    assert (ran.status, ran.out) == (2, "")
    assert fragment in ran.err


def test_model_is_asked_for(run: Run) -> None:
    assert run("check").status == 2


def test_help_needs_no_torch() -> None:
    code = """
import sys
from kangaroo.cli import main
try:
    main(["check", "--help"])
except SystemExit as done:
    assert done.code == 0
sys.exit("torch" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "--prompts" in done.stdout
