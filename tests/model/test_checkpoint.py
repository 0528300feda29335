"""What a checkpoint recommends for sampling."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from kangaroo.errors import CheckpointError, SettingsError
from kangaroo.llm import LLM
from kangaroo.model.checkpoint import LoadedModel, load_model
from kangaroo.model.weights import save_checkpoint
from kangaroo.types import SamplingParams
from tests.tiny import save_tiny_tokenizer, tiny_config, tiny_raw_config, tiny_transformer


@pytest.fixture
def model(tmp_path: Path) -> LoadedModel:
    """A tiny model without a generation_config.json."""
    folder = tmp_path / "model"
    save_checkpoint(tiny_transformer(tiny_config()), folder, raw_config=tiny_raw_config(), dtype=torch.float32)
    save_tiny_tokenizer(folder)
    return load_model(str(folder))


def recommend(model: LoadedModel, content: object) -> None:
    (model.folder / "generation_config.json").write_text(json.dumps(content), encoding="utf-8")


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ({}, {}),
        ([], {}),
        ({"eos_token_id": 1, "max_length": 4096, "top_p": None}, {}),
        ({"do_sample": True}, {"temperature": 1.0, "top_k": 50}),
        ({"do_sample": True, "temperature": 0.6, "top_k": 20}, {"temperature": 0.6, "top_k": 20}),
        ({"do_sample": False, "temperature": 0.6, "top_p": 0.9}, {"temperature": 0.0, "top_p": 0.9}),
        ({"temperature": 0.6}, {"temperature": 0.0}),
        ({"min_p": 0.1, "repetition_penalty": 1.05}, {"min_p": 0.1, "repetition_penalty": 1.05, "temperature": 0.0}),
    ],
)
def test_recommended_fields_are_those_of_the_generation_config(
    model: LoadedModel, content: object, expected: dict[str, Any]
) -> None:
    recommend(model, content)
    assert model.sampling_defaults() == expected


def test_nothing_is_recommended_without_the_file(model: LoadedModel) -> None:
    assert model.sampling_defaults() == {}


def test_recommendation_is_used_only_when_asked_for(model: LoadedModel) -> None:
    recommend(model, {"do_sample": True, "temperature": 0.6, "top_k": 20})
    llm = LLM.from_pretrained(str(model.folder))
    assert llm.default_params() == SamplingParams(temperature=0.6, top_k=20)
    assert llm.generate("a").token_ids == llm.generate("a", SamplingParams(temperature=0)).token_ids


@pytest.mark.parametrize("value", ["0.6", True, [1]])
def test_value_that_is_no_number_is_refused(model: LoadedModel, value: object) -> None:
    recommend(model, {"temperature": value})
    with pytest.raises(CheckpointError, match=r"generation_config\.json: temperature must be a number"):
        model.sampling_defaults()


def test_value_outside_its_range_is_refused(model: LoadedModel) -> None:
    recommend(model, {"top_p": 1.5})
    with pytest.raises(SettingsError, match=r"top_p must be in \(0, 1\], got 1.5"):
        LLM.from_pretrained(str(model.folder)).default_params()
