"""The flags that choose a drafter and set it, without a model."""

from dataclasses import fields
from typing import get_args

import pytest
import typer

from kangaroo.cli.drafter_options import _OWNERS, _RENAMED, drafter_settings
from kangaroo.cli.shared import DrafterName
from kangaroo.drafters.settings import (
    SETTINGS,
    AutoSettings,
    DraftModelSettings,
    GateSettings,
    KangarooSettings,
    LayerSkipSettings,
    MedusaSettings,
    PromptLookupSettings,
    RetrievalSettings,
    Settings,
)
from kangaroo.drafters.stopping import AdaptiveSettings


def test_no_flag_leaves_the_choice_open_and_a_name_is_passed_on() -> None:
    assert drafter_settings(None, {"gamma": None, "gate": None}) is None
    for name in get_args(DrafterName):
        assert drafter_settings(name, {"gamma": None}) == name


def test_drafters_to_choose_from_are_those_that_have_settings() -> None:
    assert set(get_args(DrafterName)) == set(SETTINGS)


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ({"draft_model": "d"}, DraftModelSettings(model="d")),
        ({"draft_dtype": "int8"}, DraftModelSettings(dtype="int8")),
        ({"heads": "h"}, MedusaSettings(heads="h")),
        ({"num_heads": 2}, MedusaSettings(num_heads=2)),
        ({"skip_layers": "s.json"}, LayerSkipSettings(skip_layers="s.json")),
        ({"datastore": "d"}, RetrievalSettings(datastore="d")),
        ({"max_matches": 5}, RetrievalSettings(max_matches=5)),
        ({"references": ["a", "b"]}, PromptLookupSettings(references=("a", "b"))),
        ({"sources": ["plain", "kangaroo"]}, AutoSettings(sources=("plain", "kangaroo"))),
        ({"adapter": "a"}, KangarooSettings(adapter="a")),
        ({"exit_layer": 2}, KangarooSettings(exit_layer=2)),
    ],
)
def test_flag_of_its_own_asks_for_its_drafter(flags: dict[str, object], expected: Settings) -> None:
    assert drafter_settings(None, {"gamma": None, **flags}) == expected
    # Saying so too changes nothing.
    assert drafter_settings(expected.name, flags) == expected


@pytest.mark.parametrize("name", _OWNERS)
def test_owner_of_a_flag_is_the_only_drafter_that_has_its_setting_beside_auto(name: str) -> None:
    setting = _RENAMED.get(name, name)
    known = {drafter for drafter, made in SETTINGS.items() if setting in {one.name for one in fields(made)}}  # type: ignore[arg-type]
    # auto hands on what it is told for its sources.
    assert known - {"auto"} == {_OWNERS[name]} - {"auto"}
    assert _OWNERS[name] in known


@pytest.mark.parametrize(
    ("drafter", "flags", "expected"),
    [
        (None, {"gamma": 3, "eta": 0.0}, KangarooSettings(gamma=3, eta=0.0)),
        (None, {"gamma": 3, "draft_model": "d"}, DraftModelSettings(model="d", gamma=3)),
        (None, {"num_siblings": 2, "max_nodes": 9, "heads": "h"}, MedusaSettings("h", num_siblings=2, max_nodes=9)),
        (None, {"min_ngram": 2, "num_tokens": 5, "references": ["a"]},
         PromptLookupSettings(min_ngram=2, num_tokens=5, references=("a",))),
        ("layer_skip", {"gamma": 3}, LayerSkipSettings(gamma=3)),
        ("layer_skip", {"alpha": 0.8, "beta1": 0.1, "beta2": 0.2, "epsilon": 0.3, "initial_threshold": 0.4},
         LayerSkipSettings(eta=AdaptiveSettings(0.8, 0.1, 0.2, 0.3, 0.4))),
        (None, {"initial_threshold": 0.4}, KangarooSettings(eta=AdaptiveSettings(initial_threshold=0.4))),
        ("medusa", {"alpha": 0.5}, MedusaSettings(eta=AdaptiveSettings(alpha=0.5))),
        ("draft_model", {"epsilon": 0.5}, DraftModelSettings(eta=AdaptiveSettings(epsilon=0.5))),
        ("prompt_lookup", {"max_ngram": 4}, PromptLookupSettings(max_ngram=4)),
        (None, {"references": ["a"], "eta": 0.5}, PromptLookupSettings(references=("a",), eta=0.5)),
        ("prompt_lookup", {"alpha": 0.5}, PromptLookupSettings(eta=AdaptiveSettings(alpha=0.5))),
        ("retrieval", {"eta": 0.0}, RetrievalSettings(eta=0.0)),
        ("retrieval", {"eta": 0.5}, RetrievalSettings(eta=0.5)),
        (None, {"datastore": "d", "initial_threshold": 0.1},
         RetrievalSettings("d", eta=AdaptiveSettings(initial_threshold=0.1))),
        ("auto", {"references": ["a"], "datastore": "d"}, AutoSettings(references=("a",), datastore="d")),
        (None, {"sources": ["retrieval"], "datastore": "d"}, AutoSettings(("retrieval",), datastore="d")),
        ("retrieval", {"max_ngram": 4, "max_nodes": 8}, RetrievalSettings(max_ngram=4, max_nodes=8)),
    ],
)  # fmt: skip
def test_shared_flags_go_to_the_drafter_chosen(
    drafter: str | None, flags: dict[str, object], expected: Settings
) -> None:
    assert drafter_settings(drafter, flags) == expected


@pytest.mark.parametrize(
    ("drafter", "flags", "inner"),
    [
        (None, {}, KangarooSettings()),
        (None, {"gamma": 3}, KangarooSettings(gamma=3)),
        (None, {"draft_model": "d"}, DraftModelSettings(model="d")),
        ("medusa", {}, MedusaSettings()),
        ("auto", {"sources": ["retrieval"]}, AutoSettings(("retrieval",))),
    ],
)
def test_gate_wraps_the_drafter(drafter: str | None, flags: dict[str, object], inner: Settings) -> None:
    # A threshold of 0 is one, too.
    for threshold in (0.0, 0.5):
        assert drafter_settings(drafter, {**flags, "gate": threshold}) == GateSettings(inner, threshold)


@pytest.mark.parametrize(
    ("drafter", "flags", "flag", "name"),
    [
        ("plain", {"gamma": 3}, "--gamma", "plain"),
        ("plain", {"gate": 0.5}, "--gate", "plain"),
        ("medusa", {"gamma": 3}, "--gamma", "medusa"),
        ("auto", {"eta": 0.1}, "--eta", "auto"),
        ("auto", {"initial_threshold": 0.1}, "--initial-threshold", "auto"),
        ("plain", {"eta": 0.1}, "--eta", "plain"),
        ("plain", {"alpha": 0.1}, "--alpha", "plain"),
        ("retrieval", {"num_siblings": 2}, "--num-siblings", "retrieval"),
        ("kangaroo", {"draft_model": "d"}, "--draft-model", "kangaroo"),
        ("kangaroo", {"references": ["a"]}, "--reference", "kangaroo"),
        ("kangaroo", {"sources": ["plain"]}, "--source", "kangaroo"),
        (None, {"max_ngram": 4}, "--max-ngram", "kangaroo"),
        (None, {"heads": "h", "exit_layer": 1}, "--exit-layer", "medusa"),
        (None, {"heads": "h", "datastore": "d"}, "--datastore", "medusa"),
        (None, {"datastore": "d", "max_ngram": 4, "gamma": 2, "gate": 0.5}, "--gamma", "retrieval"),
    ],
)
def test_flag_that_the_drafter_does_not_have_is_refused(
    drafter: str | None, flags: dict[str, object], flag: str, name: str
) -> None:
    with pytest.raises(typer.BadParameter, match=f"^it does nothing with --drafter {name}; leave out one") as info:
        drafter_settings(drafter, flags)
    assert (info.value.param_hint, info.value.exit_code) == (flag, 2)


def test_threshold_is_fixed_or_adaptive() -> None:
    with pytest.raises(typer.BadParameter, match=r"^it does nothing beside --alpha; leave") as info:
        drafter_settings("layer_skip", {"eta": 0.5, "alpha": 0.9})
    assert (info.value.param_hint, info.value.exit_code) == ("--eta", 2)
