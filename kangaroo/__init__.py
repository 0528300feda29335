"""Kangaroo: lossless self-speculative decoding. The text is the target's own, only sooner."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kangaroo.drafters.settings import (
        AutoSettings,
        DraftModelSettings,
        GateSettings,
        KangarooSettings,
        LayerSkipSettings,
        MedusaSettings,
        PromptLookupSettings,
        RetrievalSettings,
    )
    from kangaroo.drafters.stopping import AdaptiveSettings
    from kangaroo.engine.async_engine import AsyncEngine
    from kangaroo.engine.scheduler import Limits
    from kangaroo.errors import KangarooError
    from kangaroo.llm import LLM
    from kangaroo.types import Completion, SamplingParams, Token

__version__ = "0.1.0"

__all__ = [
    "LLM",
    "AdaptiveSettings",
    "AsyncEngine",
    "AutoSettings",
    "Completion",
    "DraftModelSettings",
    "GateSettings",
    "KangarooError",
    "KangarooSettings",
    "LayerSkipSettings",
    "Limits",
    "MedusaSettings",
    "PromptLookupSettings",
    "RetrievalSettings",
    "SamplingParams",
    "Token",
]

_HOMES = {
    "LLM": "kangaroo.llm",
    "AsyncEngine": "kangaroo.engine.async_engine",
    "Limits": "kangaroo.engine.scheduler",
    "Completion": "kangaroo.types",
    "KangarooError": "kangaroo.errors",
    "AdaptiveSettings": "kangaroo.drafters.stopping",
    "AutoSettings": "kangaroo.drafters.settings",
    "DraftModelSettings": "kangaroo.drafters.settings",
    "GateSettings": "kangaroo.drafters.settings",
    "KangarooSettings": "kangaroo.drafters.settings",
    "LayerSkipSettings": "kangaroo.drafters.settings",
    "MedusaSettings": "kangaroo.drafters.settings",
    "PromptLookupSettings": "kangaroo.drafters.settings",
    "RetrievalSettings": "kangaroo.drafters.settings",
    "SamplingParams": "kangaroo.types",
    "Token": "kangaroo.types",
}


def __getattr__(name: str) -> Any:
    """Import a public name on first use, so that `kangaroo --help` does not wait for PyTorch."""
    if name not in _HOMES:
        raise AttributeError(f"module 'kangaroo' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOMES[name]), name)
