"""The flags that choose a drafter and set it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kangaroo.cli.shared import DrafterName, usage_error

if TYPE_CHECKING:
    from kangaroo.drafters.settings import Settings

# Flags that do not have the name of the setting they give.
_RENAMED = {"draft_model": "model", "draft_dtype": "dtype"}
# The drafter a flag of its own asks for; flags that several share ask for Kangaroo.
_OWNERS = {"draft_model": "draft_model", "draft_dtype": "draft_model", "heads": "medusa", "num_heads": "medusa",
           "skip_layers": "layer_skip", "datastore": "retrieval", "max_matches": "retrieval",
           "references": "prompt_lookup", "sources": "auto"}  # fmt: skip


def _option(text: str, panel: str, *, default: str | None = None, name: str | None = None) -> Any:
    names = () if name is None else (name,)
    return typer.Option(*names, help=text, show_default=default or False, rich_help_panel=panel)


_ANY, _KANGAROO, _NGRAMS = "Drafting", "Kangaroo drafter", "Prompt lookup and retrieval drafters"
_MEDUSA, _MODEL, _SKIP = "Medusa drafter", "Draft model drafter", "Layer skip drafter (Draft & Verify)"

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
            default="Kangaroo: as tuned, else as the adapter recommends, else 0.6"),
]  # fmt: skip
NumSiblings = Annotated[
    int | None,
    _option(
        "Guesses for the token behind one guess; above 1 drafts are trees.", _ANY, default="as tuned, else 1, Medusa 3"
    ),
]
MaxNodes = Annotated[
    int | None, _option("Most tokens a draft holds, its root included.", _ANY, default="as tuned, else 64")
]
Gate = Annotated[
    float | None,
    _option("Draft only where the target was at least this sure of its last choice, in [0, 1].", _ANY, default="0"),
]
Sources = Annotated[
    list[str] | None,
    _option("With auto: a drafter to choose from, in the order to ask; repeatable.", _ANY, name="--source",
            default="prompt_lookup, and what lies beside the model"),
]  # fmt: skip
Adapter = Annotated[str | None, _option("Adapter folder.", _KANGAROO, default="the folder 'adapter' of the model")]
ExitLayer = Annotated[
    int | None,
    _option("Only a check: fails unless the adapter was trained at this layer.", _KANGAROO, default="the adapter's"),
]
Heads = Annotated[str | None, _option("Folder of heads.", _MEDUSA, default="the folder 'medusa' of the model")]
NumHeads = Annotated[int | None, _option("How many of the heads guess.", _MEDUSA, default="all")]
SkipLayers = Annotated[str | None, _option("Skip list to draft with.", _SKIP, default="skip_layers.json of the model")]
DraftModel = Annotated[str | None, _option("Folder or hub id of the draft model.", _MODEL)]
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

    made = find_settings(drafter)
    known = {field.name for field in fields(made)}  # type: ignore[arg-type]
    values = {}
    for name, value in given.items():
        setting = _RENAMED.get(name, name)
        if setting not in known:
            flag = {"references": "--reference", "sources": "--source"}.get(name, f"--{name.replace('_', '-')}")
            raise usage_error(flag, f"it does nothing with --drafter {drafter}; leave out one of the two")
        values[setting] = tuple(value) if isinstance(value, list) else value
    return made(**values)
