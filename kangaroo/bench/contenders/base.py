"""What a contender is, and what those outside this package have in common."""

from __future__ import annotations

import time
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any, Protocol

import torch

from kangaroo.errors import KangarooError, SettingsError

if TYPE_CHECKING:
    from kangaroo.llm import LLM
    from kangaroo.types import Completion

DTYPES = ("float32", "bfloat16", "float16")
# Tokens a contender that reserves its cache in advance makes room for, where the model could hold more.
MAX_CONTEXT = 4096


@dataclass(frozen=True)
class Run:
    """One text a contender produced; wall_time_s spans prefill and decoding, completion is ours where it is."""

    token_ids: tuple[int, ...]
    wall_time_s: float
    completion: Completion | None = None

    @property
    def tokens_per_s(self) -> float:
        return len(self.token_ids) / self.wall_time_s


class Contender(Protocol):
    """A named way to decode greedily."""

    name: str

    def generate(self, prompt_ids: tuple[int, ...], *, max_new_tokens: int) -> Run:
        """Continue the prompt greedily until EOS or max_new_tokens."""
        ...


class KangarooContender:
    """This package with one drafter."""

    def __init__(self, name: str, llm: LLM) -> None:
        self.name = name
        self._llm = llm

    def generate(self, prompt_ids: tuple[int, ...], *, max_new_tokens: int) -> Run:
        """Continue the prompt greedily."""
        from kangaroo.types import SamplingParams

        started_s = time.perf_counter()
        completion = self._llm.generate(prompt_ids, SamplingParams(max_new_tokens=max_new_tokens))
        return Run(completion.token_ids, time.perf_counter() - started_s, completion)


def import_optional(module: str, *, package: str) -> Any:
    """The module of a package that only benchmarks need; KangarooError where it is missing."""
    try:
        return import_module(module)
    except ImportError as error:
        raise KangarooError(f"the contender {module} is not installed ({error}); pip install {package}") from error


def find_dtype(dtype: str) -> torch.dtype:
    """The type of this name; raises SettingsError for one that not every contender has."""
    if dtype not in DTYPES:
        raise SettingsError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype}")
    found: torch.dtype = getattr(torch, dtype)
    return found
