"""transformers as a contender."""

from __future__ import annotations

import time
from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from kangaroo.bench.contenders.base import Run, find_dtype, import_optional
from kangaroo.errors import KangarooError


@dataclass(frozen=True)
class GenerationSettings:
    """How transformers speculates, by the names of its own generate(); None for not at all.

    prompt_lookup_num_tokens: the most tokens to guess from the text so far. assistant_model: the folder of a draft
    model of the same vocabulary, which drafts by transformers' defaults.
    """

    prompt_lookup_num_tokens: int | None = None
    assistant_model: Path | None = None


class TokenClock:
    """A streamer of transformers that only notes when the prompts were taken and when each step's tokens came."""

    def __init__(self) -> None:
        self.times_s: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        """Called once with the prompts [B, T], then with every step's tokens [B]."""
        self.times_s.append(time.perf_counter())

    def end(self) -> None:
        """Nothing is left to note."""


class TransformersContender:
    """Greedy `generate` of transformers on the same checkpoint, on the CPU, weights and activations in dtype."""

    def __init__(
        self, folder: Path, *, eos_ids: frozenset[int], dtype: str = "float32", name: str = "transformers"
    ) -> None:
        """Raises KangarooError where transformers is missing or cannot load the checkpoint."""
        transformers = import_optional("transformers", package="transformers")
        # It would warn of its own defaults at every draft of an assistant_model.
        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        self.name = name
        self.version: str = transformers.__version__
        self._eos_ids = sorted(eos_ids) or None
        self._dtype = dtype
        self._model = _load(folder, dtype)
        # What the checkpoint recommends, such as a repetition penalty, would hold for greedy decoding as well.
        self._model.generation_config = transformers.GenerationConfig()
        self._options: dict[str, Any] = {}

    def speculating(self, settings: GenerationSettings, *, name: str) -> TransformersContender:
        """A contender on the same weights that speculates, a prompt at a time.

        Raises KangarooError where transformers cannot load the draft model or use it with this model.
        """
        assistant = None if settings.assistant_model is None else _load(settings.assistant_model, self._dtype)
        if assistant is not None and assistant.config.vocab_size != self._model.config.vocab_size:
            raise KangarooError(
                f"transformers asks an assistant_model for the target's {self._model.config.vocab_size} logits, got "
                f"{assistant.config.vocab_size}; give another draft model"
            )
        other = copy(self)
        other.name = name
        other._options = {
            "prompt_lookup_num_tokens": settings.prompt_lookup_num_tokens,
            "assistant_model": assistant,
        }
        return other

    def generate(self, prompt_ids: tuple[int, ...], *, max_new_tokens: int) -> Run:
        """Continue the prompt greedily."""
        started_s = time.perf_counter()
        (token_ids,) = self.generate_batch([prompt_ids], max_new_tokens=max_new_tokens)
        return Run(token_ids, time.perf_counter() - started_s)

    def generate_batch(
        self, prompts: Sequence[tuple[int, ...]], *, max_new_tokens: int, clock: TokenClock | None = None
    ) -> list[tuple[int, ...]]:
        """Continue prompts of any lengths together, padded on the left; a text that ended early is padded with 0."""
        longest = max(map(len, prompts))
        inputs = torch.tensor([[0] * (longest - len(prompt)) + list(prompt) for prompt in prompts])
        lengths = torch.tensor([len(prompt) for prompt in prompts])
        output = self._model.generate(
            inputs,
            attention_mask=(torch.arange(longest) >= longest - lengths[:, None]).long(),
            do_sample=False,
            max_new_tokens=max_new_tokens,
            eos_token_id=self._eos_ids,
            pad_token_id=0,
            streamer=clock,
            **self._options,
        )
        return [tuple(row) for row in output[:, longest:].tolist()]


def _load(folder: Path, dtype: str) -> Any:
    transformers, torch_dtype = import_optional("transformers", package="transformers"), find_dtype(dtype)
    try:
        return transformers.AutoModelForCausalLM.from_pretrained(str(folder), dtype=torch_dtype)
    except (OSError, ValueError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise KangarooError(f"transformers cannot load {folder}: {reason}") from error
