"""`kangaroo train adapter` from the outside: one JSON report, an adapter on disk, clear refusals."""

import json

import pytest
from typer.testing import CliRunner

from kangaroo.cli.train import train_app
from kangaroo.errors import DataError, OutputError
from kangaroo.model.weights import save_checkpoint
from tests.tiny import save_tiny_tokenizer, tiny_config, tiny_raw_config, tiny_transformer


@pytest.fixture
def arguments(tmp_path):
    import torch

    folder = tmp_path / "model"
    raw = tiny_raw_config() | {"eos_token_id": 257}
    save_checkpoint(tiny_transformer(tiny_config()), folder, raw_config=raw, dtype=torch.float32)
    save_tiny_tokenizer(folder)
    (tmp_path / "data.txt").write_text("hop over the log. " * 40)
    return ["adapter", "--model", str(folder), "--data", str(tmp_path / "data.txt"), "--output", str(tmp_path / "out"),
            "--steps", "4", "--batch-size", "2", "--sequence-length", "16", "--evaluate-every", "2"]  # fmt: skip


def test_json_is_exactly_one_report(arguments, tmp_path):
    result = CliRunner().invoke(train_app, [*arguments, "--json"], catch_exceptions=False)
    assert result.exit_code == 0
    assert json.loads(result.stdout) == json.loads((tmp_path / "out/report.json").read_text())
    assert "step 4: held out: loss" in result.stderr
    assert (tmp_path / "out/adapter.safetensors").exists()


def test_a_summary_is_printed_and_a_second_run_needs_resume(arguments):
    result = CliRunner().invoke(train_app, arguments, catch_exceptions=False)
    assert "expected tokens per step" in result.stdout
    with pytest.raises(OutputError, match="continue with --resume"):
        CliRunner().invoke(train_app, arguments, catch_exceptions=False)
    assert CliRunner().invoke(train_app, [*arguments, "--resume"], catch_exceptions=False).exit_code == 0


def test_missing_data_is_named(arguments, tmp_path):
    (tmp_path / "data.txt").unlink()
    with pytest.raises(DataError, match=r"no such data file or folder: .*data\.txt"):
        CliRunner().invoke(train_app, arguments, catch_exceptions=False)
