"""The schedule and the data of pre-training, and a run that is cut in two."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from pretrain import CONTEXT, LONG_SHARE, Training, draw_batch, learning_rate_scale
from target import Plan


def test_learning_rate_warms_up_holds_and_decays_to_zero() -> None:
    assert learning_rate_scale(0.0, 0) == pytest.approx(1 / 40)
    assert learning_rate_scale(0.0, 19) == pytest.approx(0.5)
    assert learning_rate_scale(0.3, 1000) == learning_rate_scale(0.5, 1000) == 1
    assert learning_rate_scale(0.75, 1000) == pytest.approx(0.5)
    assert learning_rate_scale(1.0, 1000) == learning_rate_scale(1.1, 1000) == 0


def test_batches_are_seeded_windows_of_the_stream() -> None:
    stream = np.arange(1000, dtype="<u2")
    batch = draw_batch(stream, 5, length=16, seed=(0, 3, 1))
    assert batch.shape == (5, 17)
    assert torch.equal(batch, batch[:, :1] + torch.arange(17))
    assert torch.equal(batch, draw_batch(stream, 5, length=16, seed=(0, 3, 1)))
    # Another step and another process draw other windows.
    assert not torch.equal(batch, draw_batch(stream, 5, length=16, seed=(0, 4, 1)))
    assert not torch.equal(batch, draw_batch(stream, 5, length=16, seed=(0, 3, 0)))


@pytest.fixture
def plan(tmp_path: Path) -> Plan:
    corpus, output = tmp_path / "corpus", tmp_path / "output"
    for folder in (corpus, output):
        folder.mkdir()
    (corpus / "corpus.json").write_text(json.dumps({"heldout_bytes_per_token": 2.0}))
    (corpus / "tokenizer.json").write_text(json.dumps({"model": {"vocab": {str(i): i for i in range(32)}}}))
    tokens = np.random.default_rng(0).integers(0, 32, 3 * CONTEXT).astype("<u2")
    for name in ("train.bin", "heldout.bin"):
        tokens.tofile(corpus / name)
    return Plan(corpus=str(corpus), output=str(output), minutes=0.005, num_processes=1, batch_tokens=1024, num_layers=1,
                hidden_size=16, intermediate_size=32, num_heads=1, muon_lr=0.02, adam_lr=0.003, seed=0,
                device="cpu")  # fmt: skip


def test_run_ends_with_its_time_and_can_be_given_more(plan: Plan) -> None:
    first = Training(plan, 0)
    first.run()
    kept = json.loads((Path(plan.output) / "progress.json").read_text())
    assert kept["done"]
    assert kept["elapsed_s"] >= 60 * plan.minutes
    assert kept["history"][-1]["held_out_nats_per_byte"] == pytest.approx(np.log(32) / 2, rel=0.2)

    again = Training(plan, 0)
    again.run()
    assert again.progress == first.progress

    longer = Training(replace(plan, minutes=(first.progress.elapsed_s + 0.3) / 60), 0)
    assert not longer.progress.done
    for name, tensor in first.model.parameters():
        assert torch.equal(tensor, dict(longer.model.parameters())[name]), name
    longer.run()
    assert longer.progress.step > first.progress.step
    assert longer.progress.num_tokens > first.progress.num_tokens


def test_last_stretch_runs_on_the_full_context(plan: Plan) -> None:
    training = Training(plan, 0)
    training.step(1 - LONG_SHARE / 2)
    assert training.progress.num_tokens == CONTEXT
