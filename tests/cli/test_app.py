"""The root: start-up, help, exit statuses, --debug, and `env`."""

import errno
import json
import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest

import kangaroo
from kangaroo.cli.shared import DrafterName, Dtype
from kangaroo.drafters.settings import SETTINGS
from kangaroo.llm import LLM
from kangaroo.model.weights import DTYPES

from .conftest import Run

ROOT = Path(__file__).parents[2]
VERBS = ("demo", "generate", "env", "train", "bench")
HEAVY = ("torch", "tokenizers", "transformers", "safetensors", "huggingface_hub")


def test_help_of_every_verb_needs_no_torch() -> None:
    code = f"""
import sys
from kangaroo.cli import main
for verb in ([], *([verb] for verb in {VERBS}), ["train", "adapter"], ["bench", "spec-bench"]):
    try:
        main([*verb, "--help"])
    except SystemExit as done:
        assert done.code == 0, verb
sys.exit(", ".join(name for name in {HEAVY} if name in sys.modules) or 0)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert all(verb in done.stdout for verb in VERBS)


def test_version(run: Run) -> None:
    assert run("--version") == (0, f"kangaroo {kangaroo.__version__}\n", "")


def test_choices_are_those_of_the_library() -> None:
    assert get_args(Dtype) == tuple(DTYPES)
    assert get_args(DrafterName) == tuple(SETTINGS)


def test_nothing_asked_shows_the_help(run: Run) -> None:
    ran = run()
    assert ran.status == 2
    assert "generate" in ran.out + ran.err


@pytest.mark.parametrize("argv", [["fly"], ["--fly"], ["generate", "--fly"], ["generate"], ["train", "fly"]])
def test_usage_errors_are_one_line(run: Run, argv: list[str]) -> None:
    ran = run(*argv)
    assert (ran.status, ran.out) == (2, "")
    assert ran.err.startswith("error: ")
    assert ran.err.count("\n") == 1


@pytest.mark.parametrize("before", [True, False])
def test_debug_shows_the_traceback_of_an_error(run: Run, before: bool) -> None:
    verb = ["generate", "--model", "/no/such/model", "--prompt", "a"]
    ran = run("--debug", *verb) if before else run(*verb, "--debug")
    assert ran.status == 1
    assert ran.err.startswith("Traceback")
    assert ran.err.splitlines()[-1].startswith("error: no such model folder: /no/such/model")


def raise_on_load(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    def from_pretrained(*args: object, **kwargs: object) -> LLM:
        raise error

    monkeypatch.setattr(LLM, "from_pretrained", from_pretrained)


def test_unexpected_error_is_one_line(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    raise_on_load(monkeypatch, RuntimeError("first\nsecond"))
    ran = run("generate", "--model", "m", "--prompt", "a")
    message = "unexpected error: RuntimeError: first second; run again with --debug and report it\n"
    assert ran == (1, "", message)
    ran = run("--debug", "generate", "--model", "m", "--prompt", "a")
    assert ran.status == 1
    assert ran.err.startswith("Traceback")
    assert ran.err.endswith(message)


def test_interrupt_is_130(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    raise_on_load(monkeypatch, KeyboardInterrupt())
    assert run("generate", "--model", "m", "--prompt", "a") == (130, "", "")


def test_closed_pipe_is_silent(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", sys.stdout)
    monkeypatch.setattr(sys, "stderr", sys.stderr)
    raise_on_load(monkeypatch, BrokenPipeError(errno.EPIPE, "Broken pipe"))
    assert run("generate", "--model", "m", "--prompt", "a") == (1, "", "")


def test_env(run: Run) -> None:
    ran = run("env", "--json")
    facts = json.loads(ran.out)
    assert (ran.status, ran.err) == (0, "")
    assert facts["kangaroo"] == kangaroo.__version__
    assert facts["kernel_backend"].startswith(("native (", "reference"))
    assert facts["cpu_cores"] >= 1
    assert facts["threads"] >= 1
    lines = run("env").out.splitlines()
    assert [line.partition(":")[0] for line in lines] == list(facts)
