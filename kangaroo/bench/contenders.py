"""The systems a benchmark compares, behind one call each: continue these tokens, say how long it took."""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from kangaroo.llm import LLM
from kangaroo.types import Completion, SamplingParams


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
        started_s = time.perf_counter()
        completion = self._llm.generate(prompt_ids, SamplingParams(max_new_tokens=max_new_tokens))
        return Run(completion.token_ids, time.perf_counter() - started_s, completion)


class TransformersContender:
    """Greedy `generate` of transformers on the same checkpoint, in float32 on the CPU."""

    def __init__(self, folder: Path, *, eos_ids: frozenset[int]) -> None:
        from transformers import AutoModelForCausalLM

        self.name = "transformers"
        self._eos_ids = sorted(eos_ids) or None
        self._model: Any = AutoModelForCausalLM.from_pretrained(str(folder), dtype=torch.float32)

    def generate(self, prompt_ids: tuple[int, ...], *, max_new_tokens: int) -> Run:
        """Continue the prompt greedily."""
        inputs = torch.tensor([prompt_ids])
        started_s = time.perf_counter()
        output = self._model.generate(
            inputs,
            attention_mask=torch.ones_like(inputs),
            do_sample=False,
            max_length=None,
            max_new_tokens=max_new_tokens,
            eos_token_id=self._eos_ids,
            pad_token_id=0,
        )
        wall_time_s = time.perf_counter() - started_s
        return Run(tuple(output[0, len(prompt_ids) :].tolist()), wall_time_s)
