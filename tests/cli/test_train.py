"""`kangaroo train` from the outside: one JSON report, what was trained on disk, clear refusals."""

import json
from pathlib import Path

import pytest

from kangaroo.train import data as data_module
from kangaroo.train.checkpoint import STATE_FILE
from kangaroo.train.data import MAX_SOURCE_FILE

STEPS = ("--steps", 4, "--batch-size", 2, "--sequence-length", 16, "--evaluate-every", 2)


@pytest.fixture
def data(tmp_path):
    path = tmp_path / "data.txt"
    path.write_text("hop over the log. " * 40)
    return path


@pytest.fixture
def train(run, bare_folder, data, tmp_path):
    """Run `kangaroo train adapter` briefly with these further flags; a repeated flag's last value counts."""

    def train_with(*argv, data=data):
        basics = ("--model", bare_folder, "--data", data, "--output", tmp_path / "out", *STEPS)
        return run("train", "adapter", *basics, *argv)

    return train_with


def refusal(ran, status=1):
    """The one line that says why the run was refused."""
    assert (ran.status, ran.out) == (status, "")
    (line,) = ran.err.splitlines()
    assert line.startswith("error: ")
    return line


def test_json_is_exactly_one_report(train, tmp_path):
    ran = train("--json")
    assert ran.status == 0
    assert json.loads(ran.out) == json.loads((tmp_path / "out/report.json").read_text())
    assert "step 4: held out: loss" in ran.err
    assert "skipped" not in ran.err
    assert (tmp_path / "out/adapter.safetensors").exists()


def test_every_flag_reaches_the_plan(train, bare_folder):
    flags = {"exit-layer": 3, "adapter-kind": "mlp", "learning-rate": 0.01, "warmup-steps": 1, "weight-decay": 0.5,
             "seed": 7, "checkpoint-every": 2, "initialization": "ones", "precision": "float32",
             "dtype": "bfloat16"}  # fmt: skip
    report = json.loads(train("--json", *(word for name, value in flags.items() for word in (f"--{name}", value))).out)
    expected = {name.replace("-", "_"): value for name, value in flags.items()}
    steps = {"num_steps": 4, "batch_size": 2, "sequence_length": 16, "evaluate_every": 2}
    assert report["plan"] == expected | steps | {"model": str(bare_folder)}


@pytest.mark.parametrize("kind", ["attention", "mlp", "layer", "head"])
def test_every_kind_of_adapter_is_trained_reported_and_drafted_with(kind, train, run, bare_folder, tmp_path):
    report = json.loads(train("--adapter-kind", kind, "--json").out)
    assert report["adapter"]["kind"] == kind
    generated = run("generate", "--model", bare_folder, "--prompt", "hop", "--adapter", tmp_path / "out", "--json")
    assert json.loads(generated.out)["num_drafted"] > 0


def test_resuming_as_another_kind_is_refused(train):
    assert train("--adapter-kind", "mlp").status == 0
    assert "adapter_kind was mlp, now layer" in refusal(train("--adapter-kind", "layer", "--resume"))


def test_a_summary_is_printed_and_a_second_run_needs_resume(train):
    assert "expected tokens per step" in train().out
    assert "continue with --resume" in refusal(train())
    assert train("--resume").status == 0


def test_files_passed_over_are_counted_on_stderr(train, tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "fine.txt").write_text("hop over the log. " * 40)
    (folder / "large.py").write_text("x" * (MAX_SOURCE_FILE + 1))
    ran = train("--json", data=folder)
    assert ran.status == 0
    assert "skipped 1 file over 1 MiB\n" in ran.err
    assert json.loads(ran.out)["num_skipped_files"] == 1


@pytest.mark.parametrize("flag", ["--adapter-kind", "--initialization", "--precision", "--dtype"])
def test_a_misspelt_choice_is_a_usage_error(flag, train, tmp_path):
    line = refusal(train(flag, "floaty"), status=2)
    assert flag in line
    assert "floaty" in line
    assert not (tmp_path / "out").exists()


def test_an_unknown_device_is_refused_first(train, tmp_path):
    assert "device must be cpu or cuda[:N], got 'toaster'" in refusal(train("--device", "toaster"))
    assert not (tmp_path / "out").exists()


def test_an_unwritable_output_is_refused(train, data):
    assert "cannot write to" in refusal(train("--output", data / "sub"))


def test_a_damaged_checkpoint_is_refused(train, tmp_path):
    assert train().status == 0
    path = tmp_path / "out" / STATE_FILE
    path.write_bytes(path.read_bytes()[:-100])
    assert "state.safetensors is damaged" in refusal(train("--resume"))


@pytest.mark.parametrize(
    ("flag", "value", "reason"),
    [("--exit-layer", 4, "exit_layer must be in 1..3, got 4"),
     ("--exit-layer", 0, "exit_layer must be in 1..3, got 0"),
     ("--sequence-length", 257, "sequence_length must be at most 256, the model's context, got 257")],
)  # fmt: skip
def test_what_the_model_cannot_do_is_refused_before_any_data_is_read(flag, value, reason, train, monkeypatch):
    monkeypatch.setattr(data_module, "read_corpus", lambda *_, **__: pytest.fail("the data was read"))
    assert reason in refusal(train(flag, value))


def test_a_missing_data_file_is_named(train):
    assert "no such data file or folder: nowhere.txt" in refusal(train(data=Path("nowhere.txt")))


def test_empty_data_is_refused(train, data):
    data.write_text("\n")
    assert "data.txt holds no text to learn from" in refusal(train())


@pytest.fixture
def train_medusa(run, bare_folder, data, tmp_path):
    """Run `kangaroo train medusa` briefly with these further flags; a repeated flag's last value counts."""
    basics = ("--model", bare_folder, "--data", data, "--output", tmp_path / "out", *STEPS, "--num-heads", 2)
    return lambda *argv: run("train", "medusa", *basics, *argv)


def test_medusa_heads_are_trained_reported_and_drafted_with(train_medusa, run, bare_folder, tmp_path):
    ran = train_medusa("--json")
    assert ran.status == 0
    assert json.loads(ran.out) == json.loads((tmp_path / "out/report.json").read_text())
    assert "step 4: held out: loss" in ran.err
    generated = run("generate", "--model", bare_folder, "--prompt", "hop", "--heads", tmp_path / "out", "--json")
    assert json.loads(generated.out)["num_drafted"] > 0


def test_every_flag_of_medusa_reaches_the_plan(train_medusa, bare_folder):
    flags = {"num-heads": 3, "head-decay": 0.5, "learning-rate": 0.01, "warmup-steps": 1, "weight-decay": 0.5,
             "seed": 7, "checkpoint-every": 2, "precision": "float32", "dtype": "bfloat16"}  # fmt: skip
    argv = (word for name, value in flags.items() for word in (f"--{name}", value))
    expected = {name.replace("-", "_"): value for name, value in flags.items()}
    steps = {"num_steps": 4, "batch_size": 2, "sequence_length": 16, "evaluate_every": 2}
    assert json.loads(train_medusa("--json", *argv).out)["plan"] == expected | steps | {"model": str(bare_folder)}


def test_medusa_prints_a_summary_and_resumes(train_medusa):
    assert "CTAR@2" in train_medusa().out
    assert "continue with --resume" in refusal(train_medusa())
    assert train_medusa("--resume").status == 0


@pytest.mark.parametrize(
    ("flag", "value", "reason"),
    [("--num-heads", 0, "num_heads must be in 1..15 (below sequence_length), got 0"),
     ("--head-decay", 1.5, "head_decay must be in (0, 1], got 1.5"),
     ("--sequence-length", 257, "sequence_length must be at most 256, the model's context, got 257")],
)  # fmt: skip
def test_what_medusa_cannot_do_is_refused_before_any_data_is_read(flag, value, reason, train_medusa, monkeypatch):
    monkeypatch.setattr(data_module, "read_corpus", lambda *_, **__: pytest.fail("the data was read"))
    assert reason in refusal(train_medusa(flag, value))
