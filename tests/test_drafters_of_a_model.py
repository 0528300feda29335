"""Which drafter a model gets: by name, by settings, or by what lies beside it."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from kangaroo.drafters.adapter import Adapter
from kangaroo.drafters.auto import AutoDrafter
from kangaroo.drafters.datastore import build_datastore
from kangaroo.drafters.gate import GatedDrafter
from kangaroo.drafters.kangaroo import KangarooDrafter
from kangaroo.drafters.medusa_heads import MedusaHeads
from kangaroo.drafters.plain import PlainDrafter
from kangaroo.drafters.prompt_lookup import PromptLookupDrafter
from kangaroo.drafters.settings import (
    SETTINGS,
    AutoSettings,
    DraftModelSettings,
    GateSettings,
    KangarooSettings,
    PlainSettings,
    PromptLookupSettings,
)
from kangaroo.errors import AdapterError, SettingsError
from kangaroo.llm import COMPANIONS, build_drafter, find_companions, resolve_settings
from kangaroo.model.checkpoint import LoadedModel, load_model
from kangaroo.model.weights import save_checkpoint
from tests.tiny import VOCAB_SIZE, save_tiny_tokenizer, tiny_config, tiny_raw_config, tiny_transformer

EXIT_LAYER = 2


@pytest.fixture
def model(tmp_path: Path) -> LoadedModel:
    """A model with nothing beside it."""
    folder = tmp_path / "tiny"
    save_checkpoint(tiny_transformer(tiny_config()), folder, raw_config=tiny_raw_config(), dtype=torch.float32)
    save_tiny_tokenizer(folder)
    return load_model(str(folder))


def add_companion(model: LoadedModel, name: str) -> None:
    """Lay what a drafter needs beside a model."""
    if name == "kangaroo":
        model.adapter_folder.mkdir()
        Adapter.initialize(model.target, EXIT_LAYER).save(model.adapter_folder)
    elif name == "medusa":
        model.heads_folder.mkdir()
        MedusaHeads.initialize(tiny_transformer(tiny_config()), 2).save(model.heads_folder)
    elif name == "retrieval":
        build_datastore(
            [np.arange(9)], model.folder / "datastore", vocab_size=VOCAB_SIZE, fingerprint=model.tokenizer.fingerprint()
        )
    elif name == "draft_model":
        folder = model.folder / "draft_model"
        save_checkpoint(tiny_transformer(tiny_config()), folder, raw_config=tiny_raw_config(), dtype=torch.float32)
        save_tiny_tokenizer(folder)
    else:
        assert name == "layer_skip"
        (model.folder / "skip_layers.json").write_text('{"tiny": {"attention": [2], "mlp": []}}')


def source_names(drafter: AutoDrafter) -> list[str]:
    return [source.name for source in drafter._sources]


# --- what lies beside a model


def test_bare_model_has_no_companions_and_is_decoded_plainly(model: LoadedModel) -> None:
    assert find_companions(model.folder) == []
    assert isinstance(build_drafter(model, None), PlainDrafter)


@pytest.mark.parametrize("name", COMPANIONS)
def test_companion_is_found_and_is_all_its_drafter_needs(model: LoadedModel, name: str) -> None:
    add_companion(model, name)
    assert find_companions(model.folder) == [name]
    assert build_drafter(model, name).name == name


def test_empty_folders_are_no_companions(model: LoadedModel) -> None:
    for file in COMPANIONS.values():
        (model.folder / file).parent.mkdir(exist_ok=True)
    assert find_companions(model.folder) == []
    assert isinstance(build_drafter(model, None), PlainDrafter)


def test_only_an_adapter_is_taken_without_being_asked_for(model: LoadedModel) -> None:
    for name in ("medusa", "retrieval", "layer_skip", "draft_model"):
        add_companion(model, name)
    assert isinstance(build_drafter(model, None), PlainDrafter)
    add_companion(model, "kangaroo")
    assert isinstance(build_drafter(model, None), KangarooDrafter)


def test_a_draft_model_is_named_where_it_lies_beside_the_model_and_left_open_where_none_does(
    model: LoadedModel,
) -> None:
    assert resolve_settings(model, "draft_model") == DraftModelSettings()
    add_companion(model, "draft_model")
    assert resolve_settings(model, "draft_model") == DraftModelSettings(model=str(model.folder / "draft_model"))
    assert resolve_settings(model, DraftModelSettings(model="org/name")) == DraftModelSettings(model="org/name")


# --- several drafters as one


@pytest.mark.parametrize(
    ("companions", "expected"),
    [
        ([], ["prompt_lookup"]),
        (["layer_skip"], ["prompt_lookup", "layer_skip"]),
        (["layer_skip", "medusa"], ["prompt_lookup", "medusa", "layer_skip"]),
        (["layer_skip", "medusa", "kangaroo"], ["prompt_lookup", "kangaroo", "medusa", "layer_skip"]),
        (["medusa", "retrieval"], ["prompt_lookup", "retrieval", "medusa"]),
        (["retrieval"], ["prompt_lookup", "retrieval"]),
        (["draft_model"], ["prompt_lookup", "draft_model"]),
        (["draft_model", "layer_skip"], ["prompt_lookup", "layer_skip", "draft_model"]),
    ],
)
def test_auto_takes_prompt_lookup_and_all_that_lies_beside_the_model(
    model: LoadedModel, companions: list[str], expected: list[str]
) -> None:
    for name in companions:
        add_companion(model, name)
    drafter = build_drafter(model, "auto")
    assert isinstance(drafter, AutoDrafter)
    assert source_names(drafter) == expected


def test_auto_takes_the_sources_it_is_told_those_first_that_only_look_things_up(model: LoadedModel) -> None:
    for name in ("kangaroo", "medusa"):
        add_companion(model, name)
    drafter = build_drafter(model, AutoSettings(sources=("medusa", "prompt_lookup")))
    assert isinstance(drafter, AutoDrafter)
    assert source_names(drafter) == ["prompt_lookup", "medusa"]


@pytest.mark.parametrize("sources", [(), ("retrieval", "prompt_lookup")])
def test_auto_hands_a_datastore_and_references_on_to_their_sources(
    model: LoadedModel, sources: tuple[str, ...], tmp_path: Path
) -> None:
    reference = tmp_path / "reference.txt"
    reference.write_text("w1 w2 w3", encoding="utf-8")
    add_companion(model, "retrieval")
    elsewhere = (model.folder / "datastore").rename(tmp_path / "elsewhere")
    settings = AutoSettings(sources, datastore=str(elsewhere), references=(str(reference),))
    drafter = build_drafter(model, settings)
    assert isinstance(drafter, AutoDrafter)
    assert sorted(source_names(drafter)) == ["prompt_lookup", "retrieval"]
    (lookup,) = [source for source in drafter._sources if isinstance(source, PromptLookupDrafter)]
    alone = build_drafter(model, PromptLookupSettings(references=(str(reference),)))
    assert lookup._references.tokens == alone._references.tokens != []  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"datastore": "d"}, "datastore must come with retrieval among the sources, got medusa, plain; add that"),
        ({"references": ("a",)}, "references must come with prompt_lookup among the sources, got medusa, plain; add"),
    ],
)
def test_what_none_of_the_sources_would_look_at_is_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        AutoSettings(("medusa", "plain"), **given)


@pytest.mark.parametrize("sources", [("auto",), ("prompt_lookup", "auto")])
def test_auto_among_its_own_sources_is_refused(model: LoadedModel, sources: tuple[str, ...]) -> None:
    with pytest.raises(SettingsError, match="sources must be other drafters than auto itself"):
        build_drafter(model, AutoSettings(sources=sources))


def test_unknown_source_is_refused_with_the_names_allowed(model: LoadedModel) -> None:
    with pytest.raises(SettingsError, match=f"drafter must be one of {', '.join(SETTINGS)}, got 'wallaby'"):
        build_drafter(model, AutoSettings(sources=("prompt_lookup", "wallaby")))


def test_source_whose_companion_is_missing_is_refused(model: LoadedModel) -> None:
    with pytest.raises(AdapterError, match=re.escape(f"no adapter folder {model.adapter_folder}")):
        build_drafter(model, AutoSettings(sources=("prompt_lookup", "kangaroo")))


# --- behind a gate


def test_gate_holds_the_drafter_of_its_settings_and_its_threshold(model: LoadedModel) -> None:
    add_companion(model, "kangaroo")
    drafter = build_drafter(model, GateSettings(KangarooSettings(), threshold=0.3))
    assert isinstance(drafter, GatedDrafter)
    assert isinstance(drafter._drafter, KangarooDrafter)
    assert (drafter.name, drafter._threshold) == ("kangaroo", 0.3)
    assert model.target.num_layers in drafter.taps


def test_gate_before_several_drafters(model: LoadedModel) -> None:
    drafter = build_drafter(model, GateSettings(AutoSettings(), threshold=0.3))
    assert isinstance(drafter, GatedDrafter)
    assert isinstance(drafter._drafter, AutoDrafter)
    (source,) = drafter._drafter._sources
    assert isinstance(source, PromptLookupDrafter)


@pytest.mark.parametrize("threshold", [-0.1, 1.1, float("nan")])
def test_gate_whose_threshold_is_no_probability_is_refused(model: LoadedModel, threshold: float) -> None:
    with pytest.raises(SettingsError, match=rf"threshold must be in \[0, 1\], got {threshold}"):
        build_drafter(model, GateSettings(PlainSettings(), threshold=threshold))
