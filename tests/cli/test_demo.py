"""`kangaroo demo`: both texts, the comparison, and the exit status."""

import json
from pathlib import Path

import pytest

from kangaroo.cli import demo
from kangaroo.drafters.plain import PlainDrafter
from kangaroo.llm import LLM
from kangaroo.model.checkpoint import load_model

from .conftest import MakeModel, Run

SHORT = ("--prompt", "hello", "--max-new-tokens", 20)


def test_both_texts_and_their_comparison(run: Run, model_folder: Path) -> None:
    ran = run("demo", "--model", model_folder, *SHORT)
    assert (ran.status, ran.err) == (0, "")
    text = json.loads(run("demo", "--model", model_folder, *SHORT, "--json").out)["plain"]["text"]
    assert ran.out.count("hello" + text) == 2
    for expected in ("tokens/s", "tokens per step", "speedup: ", "identical texts: yes"):
        assert expected in ran.out
    assert "\x1b" not in ran.out


def test_colours_tell_the_origin_and_no_color_is_honoured(
    run: Run, model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    coloured = run("demo", "--model", model_folder, *SHORT).out
    assert "accepted draft" in coloured
    assert "\x1b[1;33m" in coloured
    monkeypatch.setenv("NO_COLOR", "1")
    assert "33m" not in run("demo", "--model", model_folder, *SHORT).out


def test_json(run: Run, model_folder: Path) -> None:
    ran = run("demo", "--model", model_folder, *SHORT, "--json")
    result = json.loads(ran.out)
    assert (ran.status, ran.err) == (0, "")
    assert list(result) == ["plain", "kangaroo", "speedup", "identical", "divergence"]
    plain, kangaroo = result["plain"], result["kangaroo"]
    assert (plain["drafter"], kangaroo["drafter"]) == ("plain", "kangaroo")
    assert plain["token_ids"] == kangaroo["token_ids"]
    assert result["speedup"] == kangaroo["tokens_per_s"] / plain["tokens_per_s"]
    assert (result["identical"], result["divergence"]) == (True, None)


def test_speedup_of_no_time_is_null(run: Run, model_folder: Path) -> None:
    argv = ["demo", "--model", model_folder, "--prompt", "a", "--max-new-tokens", 1]
    assert json.loads(run(*argv, "--json").out)["speedup"] is None
    assert "speedup: n/a" in run(*argv).out


def test_texts_that_differ_are_told_and_fail(
    run: Run, model_folder: Path, make_model: MakeModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    pair = [LLM(load_model(str(folder)), PlainDrafter()) for folder in (model_folder, make_model(seed=1))]
    monkeypatch.setattr(demo, "_pair", lambda *args, **kwargs: pair)
    ran = run("demo", *SHORT)
    assert ran.status == 1
    assert "identical texts: no" in ran.out
    assert "more than rounding explains" in ran.out
    ran = run("demo", *SHORT, "--json")
    result = json.loads(ran.out)
    position = result["divergence"]["position"]
    assert (ran.status, result["identical"], result["divergence"]["near_tie"]) == (1, False, False)
    assert result["divergence"]["margin"] > 0
    assert result["plain"]["token_ids"][:position] == result["kangaroo"]["token_ids"][:position]
    assert result["plain"]["token_ids"][position] != result["kangaroo"]["token_ids"][position]


def test_prompt_that_is_not_utf8_is_refused(run: Run, model_folder: Path) -> None:
    ran = run("demo", "--model", model_folder, "--prompt", "caf\udce9")
    assert (ran.status, ran.out) == (1, "")
    assert ran.err.startswith("error: text must be valid UTF-8")
    assert ran.err.count("\n") == 1


def test_errors_are_one_line(run: Run, bare_folder: Path) -> None:
    for flags, fragment in ((["--model", bare_folder], "no adapter folder"), (["--prompt", ""], "empty")):
        ran = run("demo", *flags)
        assert (ran.status, ran.out) == (1, "")
        assert ran.err.startswith("error: ")
        assert ran.err.count("\n") == 1
        assert fragment in ran.err
