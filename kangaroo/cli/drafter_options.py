"""The flags that choose a drafter and set it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kangaroo.cli.shared import DrafterName, usage_error

if TYPE_CHECKING:
    from kangaroo.drafters.settings import Settings

# Flags that together say how eta adapts.
_ADAPTIVE = ("alpha", "beta1", "beta2", "epsilon", "initial_threshold")
# Flags that do not have the name of the setting they give.
_RENAMED = {"draft_model": "model", "draft_dtype": "dtype", **dict.fromkeys(_ADAPTIVE, "eta")}
# The drafter a flag of its own asks for; flags that several share ask for Kangaroo.
_OWNERS = {"draft_model": "draft_model", "draft_dtype": "draft_model", "heads": "medusa", "num_heads": "medusa",
           "skip_layers": "layer_skip", "datastore": "retrieval", "max_matches": "retrieval",
           "references": "prompt_lookup", "sources": "auto"}  # fmt: skip


def _option(text: str, panel: str, *, default: str | None = None, name: str | None = None) -> Any:
    names = () if name is None else (name,)
    return typer.Option(*names, help=text, show_default=default or False, rich_help_panel=panel)


_ANY, _KANGAROO, _NGRAMS = "Drafting", "Kangaroo drafter", "Prompt lookup and retrieval drafters"
_MEDUSA, _MODEL, _SKIP = "Medusa drafter", "Draft model drafter", "Layer skip drafter (Draft & Verify)"
_ADAPTING = "Adaptive threshold, in the place of --eta, of any drafter but auto and plain"

Drafter = Annotated[
    DrafterName | None,
    typer.Option(
        help="How to decode; the text is the model's own either way.",
        show_default="whose own flag is given, else kangaroo if an adapter lies beside the model, else plain",
        rich_help_panel=_ANY,
    ),
]
Gamma = Annotated[
    int | None,
    _option(
        "Most tokens drafted in depth per step.",
        _ANY,
        default="Kangaroo: as tuned, else as the adapter recommends, else 6",
    ),
]
Eta = Annotated[
    float | None,
    _option("Stop drafting behind a token of less confidence, in [0, 1]; 0 never stops early.", _ANY,
            default="Kangaroo: as tuned, else as the adapter recommends, else 0.6; draft model 0.4, Medusa 0.2, layer "
            "skip adaptive, prompt lookup and retrieval 0"),
]  # fmt: skip
Alpha = Annotated[
    float | None,
    _option("Share of the drafted tokens to be accepted: above it the threshold falls, else it rises.", _ADAPTING,
            default="0.9"),
]  # fmt: skip
Beta1 = Annotated[float | None, _option("Weight of the acceptance rate so far.", _ADAPTING, default="0.5")]
Beta2 = Annotated[float | None, _option("Weight of the threshold so far.", _ADAPTING, default="0.9")]
Epsilon = Annotated[float | None, _option("How far the threshold may go at once.", _ADAPTING, default="0.01")]
InitialThreshold = Annotated[float | None, _option("Threshold to start from.", _ADAPTING, default="0.8")]
NumSiblings = Annotated[
    int | None,
    _option("Guesses for the token behind one guess; above 1 drafts are trees.", _ANY,
            default="Kangaroo: as tuned, else 1; Medusa 3, others 1"),
]  # fmt: skip
MaxNodes = Annotated[
    int | None,
    _option("Most tokens a draft holds, its root included.", _ANY,
            default="Kangaroo: as tuned, else 64; Medusa 24, retrieval 32, others 64"),
]  # fmt: skip
Gate = Annotated[
    float | None,
    _option("Draft only where the target was at least this sure of its last choice, in [0, 1].", _ANY, default="0"),
]
Sources = Annotated[
    list[str] | None,
    _option("With auto: a drafter to choose from; repeatable. Prompt lookup is asked first, then other lookups, "
            "those that run a model by what they bring.", _ANY, name="--source",
            default="prompt_lookup and all that lies beside the model"),
]  # fmt: skip
Adapter = Annotated[str | None, _option("Adapter folder.", _KANGAROO, default="the folder 'adapter' of the model")]
ExitLayer = Annotated[
    int | None,
    _option("Only a check: fails unless the adapter was trained at this layer.", _KANGAROO, default="the adapter's"),
]
Heads = Annotated[str | None, _option("Folder of heads.", _MEDUSA, default="the folder 'medusa' of the model")]
NumHeads = Annotated[int | None, _option("How many of the heads guess.", _MEDUSA, default="all")]
SkipLayers = Annotated[str | None, _option("Skip list to draft with.", _SKIP, default="skip_layers.json of the model")]
DraftModel = Annotated[
    str | None,
    _option("Folder or hub id of the draft model.", _MODEL, default="the folder 'draft_model' of the model"),
]
DraftDtype = Annotated[
    str | None, _option("float32, bfloat16, float16 or int8: its weights.", _MODEL, default="the target's")
]
MaxNgram = Annotated[int | None, _option("Most last tokens to look for.", _NGRAMS, default="3, retrieval 16")]
MinNgram = Annotated[
    int | None, _option("Fewest last tokens whose match is believed.", _NGRAMS, default="1, retrieval 2")
]
NumTokens = Annotated[int | None, _option("Most tokens of a match to draft.", _NGRAMS, default="10")]
References = Annotated[
    list[str] | None, _option("Text file to look in, too (LLMA); repeatable.", _NGRAMS, name="--reference")
]
Datastore = Annotated[
    str | None, _option("Folder to retrieve from.", _NGRAMS, default="the folder 'datastore' of the model")
]
MaxMatches = Annotated[int | None, _option("Places in the datastore that are read per step.", _NGRAMS, default="64")]


def drafter_settings(drafter: str | None, flags: Mapping[str, object]) -> str | Settings | None:
    """What LLM.from_pretrained takes as its drafter, from all flags by name; a drafter's own flag asks for it.

    Raises a usage error for a flag that the drafter does not have.
    """
    given: dict[str, Any] = {name: value for name, value in flags.items() if value is not None}
    gate = given.pop("gate", None)
    if drafter is None and given:
        drafter = next((_OWNERS[name] for name in given if name in _OWNERS), "kangaroo")
    settings = _set(drafter, given) if drafter is not None and given else drafter
    if gate is None:
        return settings
    from kangaroo.drafters.settings import GateSettings, KangarooSettings, find_settings

    inner = find_settings(settings)() if isinstance(settings, str) else settings or KangarooSettings()
    if inner.name == "plain":
        raise usage_error("--gate", "it does nothing with --drafter plain; leave out one of the two")
    return GateSettings(inner, threshold=gate)


def _set(drafter: str, given: Mapping[str, Any]) -> Settings:
    from kangaroo.drafters.settings import find_settings
    from kangaroo.drafters.stopping import AdaptiveSettings

    made = find_settings(drafter)
    known = {field.name for field in fields(made)}  # type: ignore[arg-type]
    values = {}
    adaptive = {name: given[name] for name in _ADAPTIVE if name in given}
    if adaptive and "eta" in given:
        raise usage_error("--eta", f"it does nothing beside {_flag(next(iter(adaptive)))}; leave out one of the two")
    for name, value in given.items():
        setting = _RENAMED.get(name, name)
        if setting not in known:
            raise usage_error(_flag(name), f"it does nothing with --drafter {drafter}; leave out one of the two")
        values[setting] = tuple(value) if isinstance(value, list) else value
    if adaptive:
        values["eta"] = AdaptiveSettings(**adaptive)
    return made(**values)


def _flag(name: str) -> str:
    return {"references": "--reference", "sources": "--source"}.get(name, f"--{name.replace('_', '-')}")
