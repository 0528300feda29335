"""Contenders continue the same tokens on the same weights."""

from pathlib import Path

import pytest
import torch

from kangaroo.bench.contenders import KangarooContender, TransformersContender
from kangaroo.llm import LLM, build_drafter, load_model
from kangaroo.model.weights import save_checkpoint
from tests.tiny import save_tiny_tokenizer, tiny_config, tiny_raw_config, tiny_transformer


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_checkpoint(tiny_transformer(tiny_config()), tmp_path, raw_config=tiny_raw_config(), dtype=torch.float32)
    save_tiny_tokenizer(tmp_path)
    return tmp_path


def test_transformers_and_plain_decoding_write_the_same_text(folder: Path) -> None:
    model = load_model(str(folder))
    ours = KangarooContender("plain", LLM(model, build_drafter(model, "plain")))
    theirs = TransformersContender(folder, eos_ids=model.eos_ids)
    runs = [contender.generate((5, 6, 7), max_new_tokens=12) for contender in (ours, theirs)]
    assert runs[0].token_ids == runs[1].token_ids
    assert len(runs[0].token_ids) == 12
    assert all(run.wall_time_s > 0 for run in runs)
    assert runs[0].completion is not None
