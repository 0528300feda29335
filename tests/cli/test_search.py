"""`kangaroo search layers`: what it writes, how it goes on, and how it refuses."""

import json
import sys
from pathlib import Path

import pytest

from kangaroo.errors import SettingsError
from kangaroo.model.skips import SkippedSublayers
from kangaroo.search.report import write_results

from .conftest import Run, build_model


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.txt"
    path.write_text("one\n\ntwo three\n")
    return path


def search(run: Run, model: Path, prompts: Path, output: Path, *more: object) -> tuple[object, str, str]:
    return run("search", "layers", "--model", model, "--data", prompts, "--output", output, "--max-new-tokens", 12,
               "--gamma", 3, "--validate", 2, *more)  # fmt: skip


@pytest.mark.parametrize("objective", ["expected_speedup", "tokens_per_second"])
def test_a_search_writes_a_skip_list_that_decodes_and_a_report(
    run: Run, tmp_path: Path, prompts: Path, objective: str
) -> None:
    (tmp_path / "tiny").mkdir()
    model, output = build_model(tmp_path / "tiny"), tmp_path / "out"
    argv = ("--trials", 4, "--objective", objective)
    status, out, err = search(run, model, prompts, output, *argv)
    assert (status, err) == (0, "")
    assert "the best of 4 candidates" in out
    assert f"written to {output}" in out
    assert {path.name for path in output.iterdir()} == {
        "search.sqlite",
        "skip_layers.json",
        "report.json",
        "search.png",
    }
    skips = json.loads((output / "skip_layers.json").read_text())
    report = json.loads((output / "report.json").read_text())
    assert skips == {"tiny": report["validated"][0]["skips"]}
    assert report["num_trials"] == len(report["values"]) == 4
    assert report["plan"]["objective"] == objective
    assert {"command", "commit", "cpu", "torch", "kernel_backend"} <= report["stamp"].keys()
    assert (report["costs"] is None) == (objective == "tokens_per_second")
    assert (output / "search.png").read_bytes().startswith(b"\x89PNG")
    (model / "skip_layers.json").write_text((output / "skip_layers.json").read_text())
    texts = [
        json.loads(run("generate", "--model", model, "--prompt", "one", "--max-new-tokens", 12, "--drafter", drafter,
                       "--json").out)
        for drafter in ("plain", "layer_skip")
    ]  # fmt: skip
    assert texts[0]["token_ids"] == texts[1]["token_ids"]
    assert texts[1]["drafter"] == "layer_skip"


def test_a_search_is_resumed_and_keeps_its_texts_and_costs(run: Run, bare_folder: Path, tmp_path: Path,
                                                           prompts: Path) -> None:  # fmt: skip
    output = tmp_path / "out"
    first = json.loads(search(run, bare_folder, prompts, output, "--trials", 2, "--json")[1])
    status, out, _ = search(run, bare_folder, prompts, output, "--trials", 5, "--resume", "--json")
    report = json.loads(out)
    assert status == 0
    assert report["costs"] == first["costs"]
    assert report["values"][:2] == first["values"]
    assert report["num_trials"] == 5


@pytest.mark.parametrize(
    ("argv", "match"),
    [
        (["--gamma", 0], "gamma must be at least 1"),
        (["--max-new-tokens", 1], "max_new_tokens must be at least 2"),
        (["--resume"], "to resume from"),
        (["--data", "missing.txt"], "cannot read the prompts"),
    ],
)
def test_bad_input_is_one_line_and_leaves_no_folder(
    run: Run, bare_folder: Path, tmp_path: Path, prompts: Path, argv: list[object], match: str
) -> None:
    status, out, err = search(run, bare_folder, prompts, tmp_path / "out", *argv)
    assert (status, out) == (1, "")
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert match in err
    assert not (tmp_path / "out").exists()


def test_without_matplotlib_nothing_is_searched(
    run: Run, bare_folder: Path, tmp_path: Path, prompts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    status, out, err = search(run, bare_folder, prompts, tmp_path / "out")
    assert (status, out) == (1, "")
    assert err == (
        "error: the plot needs matplotlib, which is not installed; pip install 'kangaroo-decoding[search]'\n"
    )
    assert not (tmp_path / "out").exists()


def test_what_cannot_be_plotted_is_written_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    skips = SkippedSublayers(frozenset({1}))
    report = {"plan": {"model": "folder/tiny"}, "num_trials": 0}
    with pytest.raises(SettingsError, match="the plot needs matplotlib"):
        write_results(tmp_path, report, trials=[], skips=skips)
    assert json.loads((tmp_path / "skip_layers.json").read_text()) == {"tiny": skips.to_dict()}
    assert json.loads((tmp_path / "report.json").read_text()) == report


def test_a_finished_search_is_not_written_over(run: Run, bare_folder: Path, tmp_path: Path, prompts: Path) -> None:
    output = tmp_path / "out"
    output.mkdir()
    (output / "skip_layers.json").write_text("mine")
    status, _, err = search(run, bare_folder, prompts, output)
    assert status == 1
    assert "already holds skip_layers.json" in err
    assert (output / "skip_layers.json").read_text() == "mine"


@pytest.mark.parametrize("entry", [{"attention": [7], "mlp": []}, {"attention": [0, 1, 2, 3], "mlp": [0, 1, 2, 3]}])
def test_a_skip_list_that_fits_no_model_is_one_line(run: Run, tmp_path: Path, entry: dict[str, list[int]]) -> None:
    (tmp_path / "tiny").mkdir()
    model = build_model(tmp_path / "tiny")
    (model / "skip_layers.json").write_text(json.dumps({"tiny": entry}))
    status, out, err = run("generate", "--model", model, "--prompt", "one", "--drafter", "layer_skip")
    assert (status, out, err.count("\n")) == (1, "", 1)
    assert "skip_layers.json: " in err
