"""`kangaroo tune`: what it prints and keeps, and how it refuses."""

import json
import math
import shutil
from pathlib import Path

import pytest

from kangaroo import cost
from kangaroo.bench import limits, tune
from kangaroo.drafters.base import MAX_NODES
from kangaroo.engine.pace import Pace
from kangaroo.model.checkpoint import load_model
from kangaroo.tuning import Tuned, tuning_key, write_tuned

from .conftest import Run


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cost, "MAX_TIME_S", 0.0)
    monkeypatch.setattr(cost, "LEAST_ROUNDS", 2)
    monkeypatch.setattr(limits, "BANDWIDTH_BYTES", 1 << 20)
    monkeypatch.setattr(tune, "ETAS", (0.0, 0.5))


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.txt"
    path.write_text("one\n\ntwo three\n")
    return path


def run_tune(run: Run, model: Path, data: Path, *more: object) -> tuple[object, str, str]:
    return run("tune", "--model", model, "--data", data, "--max-new-tokens", 12, "--rounds", 1, *more)


def test_tuning_is_kept(run: Run, model_folder: Path, prompts: Path, cache_folder: Path) -> None:
    status, out, err = run_tune(run, model_folder, prompts, "--batch-sizes", "2,1", "--json")
    assert (status, err) == (0, "")
    result = json.loads(out)
    assert result["num_texts"] == 2
    assert result["stamp"]["kernel_backend"].startswith("native")
    assert set(result["costs"][0]) == {"1", "2"}
    kept = json.loads((cache_folder / "tuning.json").read_text())["entries"][0]["tuned"]
    assert [one["batch_size"] for one in kept] == [1, 2]
    for one in kept:
        ran = [other for other in result["validated"] if other["batch_size"] == one["batch_size"]]
        assert one["measured"] == max(other["measured"] for other in ran)
        assert one["gamma"] == ran[0]["gamma"]
    assert json.loads(run("env", "--json").out)["tuned_adapters"] == 1
    assert result["settings"] == {
        "model": model_folder.name, "data": "prompts.txt", "adapters": ["adapter"], "batch_sizes": [1, 2],
        "dtype": "float32", "device": "cpu", "max_new_tokens": 12, "limit": 24, "rounds": 1,
    }  # fmt: skip
    assert str(model_folder.parent) not in out
    assert str(cache_folder) not in out


def test_generate_drafts_as_was_tuned(run: Run, model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    choose = Pace.limit
    monkeypatch.setattr(Pace, "limit", lambda self, sequences: max(MAX_NODES, choose(self, sequences)))
    key = tuning_key(load_model(str(model_folder)).target, model_folder / "adapter")
    argv = ("generate", "--model", model_folder, "--prompt", "one", "--max-new-tokens", 16, "--ignore-eos", "--json")
    plain = json.loads(run(*argv, "--drafter", "plain").out)
    per_step = {}
    for gamma in (1, 4):
        tuned = Tuned(batch_size=1, gamma=gamma, eta=0, num_siblings=1, max_nodes=64, predicted=1.0, measured=1.0)
        write_tuned(key, [tuned], stamp={})
        found = json.loads(run(*argv).out)
        assert found["token_ids"] == plain["token_ids"]
        per_step[gamma] = found["num_drafted"] / found["num_steps"]
    assert per_step[1] <= 1
    assert per_step[4] > 2


def test_adapters_of_one_name_are_told_apart(
    run: Run, model_folder: Path, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tune, "GAMMAS", (1, 2))
    folders = [tmp_path / name / "adapter" for name in ("one", "two")]
    for folder in folders:
        shutil.copytree(model_folder / "adapter", folder)
    argv = [word for folder in folders for word in ("--adapter", folder)]
    status, out, err = run_tune(run, model_folder, prompts, "--batch-sizes", "1", "--json", *argv)
    assert (status, err) == (0, "")
    assert json.loads(out)["settings"]["adapters"] == ["one/adapter", "two/adapter"]


def test_a_table_shows_prediction_and_measurement(run: Run, model_folder: Path, prompts: Path) -> None:
    status, out, err = run_tune(run, model_folder, prompts, "--batch-sizes", "1")
    assert (status, err) == (0, "")
    assert "predicted" in out
    assert "off by" in out
    assert "kept in " in out


@pytest.mark.parametrize("sizes", ["0", "1,1", "a", "", "1,-2"])
def test_bad_batch_sizes_are_a_usage_error(run: Run, model_folder: Path, prompts: Path, sizes: str) -> None:
    status, out, err = run_tune(run, model_folder, prompts, "--batch-sizes", sizes)
    assert (status, out) == (2, "")
    assert f"must be different whole numbers of at least 1 like 1,2,4,8, got {sizes!r}" in err
    assert err.count("\n") == 1


def test_what_is_missing_is_said_in_one_line(
    run: Run, bare_folder: Path, model_folder: Path, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    empty = tmp_path / "empty.txt"
    empty.write_text("\n")
    (tmp_path / "file").write_text("")
    cases = [(bare_folder, prompts, "no adapter folder"), (model_folder, empty, "holds no prompt")]
    for model, data, message in cases:
        status, out, err = run_tune(run, model, data)
        assert (status, out, err.count("\n")) == (1, "", 1)
        assert message in err
    monkeypatch.setenv("KANGAROO_CACHE", str(tmp_path / "file"))
    status, out, err = run_tune(run, model_folder, prompts)
    assert (status, out, err.count("\n")) == (1, "", 1)
    assert "set KANGAROO_CACHE to a folder that can be written" in err


def test_limits_are_told_to_people_and_machines(run: Run, model_folder: Path, prompts: Path) -> None:
    key = tuning_key(load_model(str(model_folder)).target, model_folder / "adapter")
    tuned = Tuned(batch_size=1, gamma=3, eta=0, num_siblings=3, max_nodes=16, predicted=1.0, measured=1.0)
    write_tuned(key, [tuned], stamp={})
    argv = ("bench", "limits", "--model", model_folder, "--data", prompts, "--max-new-tokens", 12)
    status, out, err = run(*argv, "--json")
    assert (status, err) == (0, "")
    found = json.loads(out)
    assert str(model_folder.parent) not in out
    assert found["settings"] == {
        "model": model_folder.name, "data": "prompts.txt", "adapter": "adapter", "exit_layer": None, "gamma": 3,
        "eta": 0.0, "num_siblings": 3, "max_nodes": 16, "dtype": "float32", "device": "cpu", "max_new_tokens": 12,
        "limit": 24,
    }  # fmt: skip
    assert found["plain"]["share"] == pytest.approx(
        found["plain"]["tokens_per_s"] / found["plain"]["ideal_tokens_per_s"]
    )
    assert found["drafted"]["ideal_speedup"] == pytest.approx(
        found["drafted"]["tokens_per_step"]
        / (
            1
            + found["drafted"]["levels_per_step"] * found["drafted"]["token_share"]
            + (found["drafted"]["drafted_per_step"] - found["drafted"]["levels_per_step"])
            * found["drafted"]["node_share"]
        )
    )
    for part in ("plain", "drafted"):
        assert math.isclose(sum(found[part]["parts_s"].values()), found[part]["step_s"])
    assert "cpu" in found["stamp"]
    status, out, err = run(*argv)
    assert (status, err) == (0, "")
    assert "verifying the rows above one" in out
    assert "of the limit" in out


def test_limits_without_an_adapter_say_so(run: Run, bare_folder: Path, prompts: Path) -> None:
    status, out, err = run("bench", "limits", "--model", bare_folder, "--data", prompts)
    assert (status, out, err.count("\n")) == (1, "", 1)
    assert "no adapter folder" in err
