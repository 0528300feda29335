"""Contenders by name: which a comparison takes, and how they are built on one model's weights."""

from __future__ import annotations

import sys
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from kangaroo.bench.contenders import (
    MAX_CONTEXT,
    Contender,
    GenerationSettings,
    KangarooContender,
    LlamaCppContender,
    TransformersContender,
    VllmContender,
)
from kangaroo.bench.drafting import describe_drafter
from kangaroo.drafters.settings import SETTINGS, DraftModelSettings, KangarooSettings, Settings, find_settings
from kangaroo.engine.pace import Pace
from kangaroo.errors import KangarooError, SettingsError
from kangaroo.llm import LLM, build_drafter, find_companions, resolve_settings
from kangaroo.model.checkpoint import LoadedModel, find_folder

# Ours, by drafter, and the others, in the order of a report.
NAMES = (*SETTINGS, "transformers", "transformers-prompt-lookup", "transformers-assistant", "llama.cpp", "vllm")
USUAL = ("prompt_lookup", "transformers", "transformers-prompt-lookup", "llama.cpp")
# What must be given for a contender, which asks for it by being given.
_NEEDS = {"draft_model": "draft_model", "transformers-assistant": "draft_model", "vllm": "vllm_python"}
# As many as its documentation takes, and as our own prompt lookup drafts.
_PROMPT_LOOKUP = GenerationSettings(prompt_lookup_num_tokens=10)


@dataclass(frozen=True)
class Parts:
    """What contenders need besides the model.

    dtype: what the model's weights are in. adapter: a folder, draft_model: a folder or hub id, None for those beside
    the model. vllm_python: the interpreter of vLLM's environment.
    """

    dtype: str = "float32"
    adapter: str | None = None
    draft_model: str | None = None
    vllm_python: Path | None = None


def choose_names(wanted: Collection[str], folder: Path, *, parts: Parts) -> list[str]:
    """The names of a comparison: those wanted, else the usual, always plain, and those that a part was given for.

    folder: the model's. Without an adapter the usual ones have auto for kangaroo, if it has anything to choose from.
    Raises SettingsError for an unknown name and one whose part is missing.
    """
    companions = find_companions(folder)
    for name in wanted:
        if name not in NAMES:
            raise SettingsError(f"contender must be one of {', '.join(NAMES)}, got {name!r}")
        if name in _NEEDS and getattr(parts, _NEEDS[name]) is None and _NEEDS[name] not in companions:
            flag = _NEEDS[name].replace("_", "-")
            raise SettingsError(f"contender {name} needs --{flag}, got none; give it or leave the contender out")
    chosen = {"plain", *(wanted or USUAL), *(name for name, part in _NEEDS.items() if getattr(parts, part) is not None)}
    if parts.adapter is not None or (not wanted and "kangaroo" in companions):
        chosen.add("kangaroo")
    elif not wanted and companions:
        chosen.add("auto")
    return [name for name in NAMES if name in chosen]


def find_vllm_python(wanted: Collection[str]) -> Path | None:
    """This interpreter where vLLM is installed beside it and wanted: by its name, or with the usual contenders."""
    is_wanted = not wanted or "vllm" in wanted
    return Path(sys.executable) if is_wanted and find_spec("vllm") is not None else None


def max_text_tokens(names: Collection[str], context_length: int) -> int:
    """The most tokens, prompt and new ones, that all of these contenders take for a model of this context length."""
    return min(context_length, MAX_CONTEXT) if {"llama.cpp", "vllm"} & set(names) else context_length


def build_contenders(
    model: LoadedModel, names: Sequence[str], *, parts: Parts
) -> tuple[list[Contender], dict[str, str]]:
    """The contenders of these names, ours as LLM.from_pretrained makes them; and for those left out the reason.

    Raises a KangarooError where one of ours cannot be built.
    """
    contenders: list[Contender] = []
    left_out: dict[str, str] = {}
    shared: TransformersContender | None = None
    for name in names:
        if name in SETTINGS:
            llm = LLM(model, build_drafter(model, _settings(name, parts=parts)), pace=Pace())
            contenders.append(KangarooContender(name, llm))
            continue
        try:
            if name.startswith("transformers"):
                shared = shared or TransformersContender(model.folder, eos_ids=model.eos_ids, dtype=parts.dtype)
                contenders.append(_vary(shared, model, name=name, parts=parts))
            else:
                contenders.append(_build_other(model, name, parts=parts))
        except KangarooError as error:
            left_out[name] = str(error)
    return contenders, left_out


def describe_drafters(model: LoadedModel, names: Sequence[str], *, parts: Parts) -> dict[str, dict[str, object]]:
    """How those of ours draft, in full."""
    return {name: describe_drafter(model, _settings(name, parts=parts)) for name in names if name in SETTINGS}


def _settings(name: str, *, parts: Parts) -> Settings:
    if name == "kangaroo":
        return KangarooSettings(adapter=parts.adapter)
    return DraftModelSettings(model=parts.draft_model) if name == "draft_model" else find_settings(name)()


def _vary(shared: TransformersContender, model: LoadedModel, *, name: str, parts: Parts) -> TransformersContender:
    if name == "transformers":
        return shared
    if name == "transformers-prompt-lookup":
        return shared.speculating(_PROMPT_LOOKUP, name=name)
    drafting = resolve_settings(model, _settings("draft_model", parts=parts))
    assert isinstance(drafting, DraftModelSettings)
    assert drafting.model is not None, "choose_names saw that there is one"
    settings = GenerationSettings(assistant_model=find_folder(drafting.model))
    return shared.speculating(settings, name=name)


def _build_other(model: LoadedModel, name: str, *, parts: Parts) -> Contender:
    if name == "llama.cpp":
        return LlamaCppContender(model.folder, eos_ids=model.eos_ids, dtype=parts.dtype)
    assert parts.vllm_python is not None
    return VllmContender(model.folder, python=parts.vllm_python, eos_ids=model.eos_ids, dtype=parts.dtype, name=name)
