"""Checkpoints: exact continuation, and refusal of what cannot be continued."""

from dataclasses import replace
from itertools import islice

import pytest
import torch
from safetensors.torch import load_file

from kangaroo.errors import OutputError, ResumeError
from kangaroo.train.adapter import train_adapter
from kangaroo.train.checkpoint import STATE_FILE
from kangaroo.train.data import Corpus, Dataset, plain_document
from tests.tiny import tiny_config, tiny_transformer


@pytest.fixture
def killed(target, dataset, plan, tmp_path):
    """Stop after step 5; the last checkpoint is of step 4."""
    output = tmp_path / "killed"
    assert len(list(islice(train_adapter(target, dataset, plan=plan, output=output), 5))) == 5
    return output


@pytest.mark.parametrize(
    ("precision", "kind"),
    [
        ("float32", "attention"),
        ("bfloat16", "attention"),
        ("float32", "mlp"),
        ("float32", "layer"),
        ("float32", "head"),
    ],
)
def test_a_resumed_run_equals_the_uninterrupted_one_bit_for_bit(
    precision, kind, target, dataset, plan, finish, tmp_path
):
    plan = replace(plan, precision=precision, adapter_kind=kind)
    whole = finish(plan, tmp_path / "whole")
    list(islice(train_adapter(target, dataset, plan=plan, output=tmp_path / "killed"), 5))
    resumed = finish(plan, tmp_path / "killed", resume=True)
    assert [event.step for event in resumed] == [5, 6]
    assert [event.loss for event in resumed] == [event.loss for event in whole[4:]]
    for name in ("adapter.safetensors", STATE_FILE):
        first, second = (load_file(tmp_path / folder / name) for folder in ("whole", "killed"))
        assert first.keys() == second.keys()
        assert all(torch.equal(first[key], second[key]) for key in first)
    assert resumed[-1].report["history"] == whole[-1].report["history"]
    assert (tmp_path / "whole/config.json").read_text() == (tmp_path / "killed/config.json").read_text()


def test_resuming_a_finished_run_writes_the_same_adapter_again(finish, plan, tmp_path):
    finish(plan, tmp_path)
    before = (tmp_path / "adapter.safetensors").read_bytes()
    (tmp_path / "adapter.safetensors").unlink()
    assert [event.step for event in finish(plan, tmp_path, resume=True)] == [6]
    assert (tmp_path / "adapter.safetensors").read_bytes() == before


@pytest.mark.parametrize("damage", ["truncated", "flipped", "edited", "garbage", "empty"])
def test_a_damaged_checkpoint_is_refused_and_left_alone(damage, killed, finish, plan):
    path = killed / STATE_FILE
    content = bytearray(path.read_bytes())
    if damage == "flipped":
        content[-10] ^= 0xFF
    edited = path.read_bytes().replace(b"num_steps", b"num_stops")
    content = {"truncated": content[:-100], "flipped": content, "edited": edited, "garbage": b"x" * 500, "empty": b""}[
        damage
    ]
    path.write_bytes(content)
    with pytest.raises(ResumeError, match=r"state\.safetensors is damaged: .*start again in another folder") as caught:
        finish(plan, killed, resume=True)
    assert "\n" not in str(caught.value)
    assert path.read_bytes() == content


@pytest.mark.parametrize("field", ["learning_rate", "num_steps", "seed", "batch_size", "exit_layer"])
def test_resuming_with_another_plan_names_the_field(field, killed, finish, plan):
    value = {"exit_layer": 1}.get(field, getattr(plan, field) * 2 + 1)
    with pytest.raises(ResumeError, match=f"plan differs: {field} was {getattr(plan, field)}, now {value}"):
        finish(replace(plan, **{field: value}), killed, resume=True)


def test_resuming_for_another_target_is_refused(killed, dataset, plan):
    other = tiny_transformer(tiny_config(), seed=1)
    with pytest.raises(ResumeError, match="run differs: target_fingerprint was"):
        list(train_adapter(other, dataset, plan=plan, output=killed, resume=True))


def test_resuming_on_other_data_is_refused(killed, target, plan, tokenizer):
    other = Dataset(Corpus((plain_document("other text " * 50, tokenizer, eos_id=None),)), sequence_length=16)
    with pytest.raises(ResumeError, match="run differs: data was"):
        list(train_adapter(target, other, plan=plan, output=killed, resume=True))


def test_resuming_where_nothing_was_trained_is_refused(finish, plan, tmp_path):
    with pytest.raises(ResumeError, match=r"holds no checkpoint/state\.safetensors to resume from; leave out --resume"):
        finish(plan, tmp_path / "new", resume=True)
    assert not (tmp_path / "new").exists()


def test_a_run_never_overwrites_another(killed, finish, plan):
    before = (killed / STATE_FILE).read_bytes()
    with pytest.raises(OutputError, match=r"already holds checkpoint/state\.safetensors; continue with --resume or"):
        finish(plan, killed)
    assert (killed / STATE_FILE).read_bytes() == before


def test_a_finished_adapter_is_not_overwritten(finish, plan, tmp_path):
    (tmp_path / "adapter.safetensors").write_bytes(b"precious")
    with pytest.raises(OutputError, match=r"already holds adapter\.safetensors"):
        finish(plan, tmp_path)


def test_an_unwritable_output_is_refused_before_training(finish, plan, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match=r"cannot write to .*file/sub: Not a directory; give another --output"):
        finish(plan, tmp_path / "file" / "sub")


def test_a_checkpoint_that_cannot_be_written_keeps_the_previous_one(killed, finish, plan):
    before = (killed / STATE_FILE).read_bytes()
    (killed / STATE_FILE).with_suffix(".tmp").mkdir()
    with pytest.raises(OutputError, match="cannot write the checkpoint"):
        finish(plan, killed, resume=True)
    assert (killed / STATE_FILE).read_bytes() == before


def test_the_data_is_hashed_once_however_many_checkpoints_are_written(finish, plan, tmp_path, monkeypatch):
    hashed = []
    digest = Dataset.digest
    monkeypatch.setattr(Dataset, "digest", lambda self: hashed.append(self) or digest(self))
    finish(replace(plan, checkpoint_every=1), tmp_path)
    assert len(hashed) == 1
