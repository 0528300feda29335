"""The front door: load a model with a drafter, generate, stream."""

from __future__ import annotations

import json
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from kangaroo.drafters import NAMES
from kangaroo.drafters.adapter import CONFIG_FILE, Adapter, check_exit_layer
from kangaroo.drafters.base import Drafter
from kangaroo.drafters.kangaroo import KangarooDrafter, KangarooSettings
from kangaroo.drafters.plain import PlainDrafter
from kangaroo.engine.engine import Decoding, Engine
from kangaroo.errors import AdapterError, CheckpointError, SettingsError
from kangaroo.kernels import select_backend
from kangaroo.model.config import ModelConfig
from kangaroo.model.tokenizer import Tokenizer
from kangaroo.model.transformer import Transformer
from kangaroo.model.weights import DTYPES, load_transformer, resolve_folder
from kangaroo.types import Completion, Request, SamplingParams, Token

DEMO_FOLDER = Path(__file__).parent / "assets" / "demo"


@dataclass(frozen=True)
class LoadedModel:
    """A checkpoint in memory: the decoder, its tokenizer and its end-of-text ids."""

    name: str
    folder: Path
    target: Transformer
    tokenizer: Tokenizer
    eos_ids: frozenset[int]

    @property
    def adapter_folder(self) -> Path:
        """Where an adapter lies beside its model."""
        return self.folder / "adapter"


def load_model(
    model: str, *, dtype: str | None = None, weights: str | None = None, device: str = "cpu", backend: str | None = None
) -> LoadedModel:
    """Load a checkpoint: a folder, a hub id, or "demo" for the bundled model.

    dtype: float32 (the default), bfloat16 or float16, what the weights are kept in; weights="int8" keeps them in int8
    instead, with a scale per output. backend: "reference" for a model to train; the device's own unless given
    (kernels.select_backend). Raises CheckpointError or SettingsError.
    """
    if dtype is not None and weights is not None:
        raise SettingsError(f"give dtype or weights, not both: got {dtype} and {weights}")
    dtype = "float32" if dtype is None else dtype
    if dtype not in DTYPES:
        raise SettingsError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype}")
    if weights not in (None, "int8"):
        raise SettingsError(f"weights must be int8 or left out, got {weights}")
    placed = resolve_device(device)
    if weights is not None and placed.type != "cpu":
        raise SettingsError(f"weights {weights} needs device cpu, got {device}")
    folder = DEMO_FOLDER if model == "demo" else resolve_folder(model)
    config = ModelConfig.from_folder(folder)
    target = load_transformer(
        folder, config, storage=weights or dtype, device=placed, backend=backend or select_backend(placed.type)
    )
    tokenizer = Tokenizer.from_folder(folder)
    return LoadedModel(model, folder, target, tokenizer, _eos_ids(folder))


class LLM:
    """A model ready to generate, with the drafter that makes it fast."""

    def __init__(self, model: LoadedModel, drafter: Drafter, *, max_context: int | None = None) -> None:
        """max_context: tokens a text may hold, if fewer than the model's context length."""
        context_length = model.target.config.context_length
        if max_context is not None and not 2 <= max_context <= context_length:
            raise SettingsError(f"max_context must be in 2..{context_length} (the model's context), got {max_context}")
        self.model = model
        self.drafter = drafter
        self.engine = Engine(model.target, drafter, max_context=max_context)

    @classmethod
    def from_pretrained(
        cls,
        model: str,
        drafter: str | KangarooSettings | None = None,
        *,
        dtype: str | None = None,
        weights: str | None = None,
        device: str = "cpu",
        max_context: int | None = None,
    ) -> LLM:
        """Load a model and build its drafter.

        model: a folder, a hub id, or "demo". drafter: "plain", "kangaroo", or KangarooSettings; None takes
        kangaroo where an adapter lies beside the model, else plain. dtype, weights and device are load_model's.
        Raises a KangarooError for bad input.
        """
        loaded = load_model(model, dtype=dtype, weights=weights, device=device)
        return cls(loaded, build_drafter(loaded, drafter), max_context=max_context)

    def generate(self, prompt: str | Sequence[int], params: SamplingParams | None = None) -> Completion:
        """Continue a prompt, given as text or as token ids, until it stops."""
        decoding = self._begin(prompt, params)
        try:
            while decoding.sequence.finish_reason is None:
                self.engine.step(decoding)
        finally:
            self.engine.end(decoding)
        return self.completion(decoding)

    def stream(
        self, prompt: str | Sequence[int], params: SamplingParams | None = None
    ) -> Generator[Token, None, Completion]:
        """Continue a prompt token by token; the generator's return value is the Completion.

        The prompt is checked and prefilled by the call itself.
        """
        return self._stream(self._begin(prompt, params))

    def _stream(self, decoding: Decoding) -> Generator[Token, None, Completion]:
        decoder = self.model.tokenizer.stream_decoder()
        num_yielded = 0
        try:
            while True:
                sequence = decoding.sequence
                fresh = decoding.new_tokens[num_yielded:]
                for token_id, origin in zip(fresh, sequence.origins[num_yielded:], strict=True):
                    num_yielded += 1
                    text = decoder.step(token_id)
                    if sequence.finish_reason is not None and num_yielded == sequence.num_new_tokens:
                        text += decoder.finish()
                    yield Token(token_id, text, origin)
                if sequence.finish_reason is not None:
                    return self.completion(decoding)
                self.engine.step(decoding)
        finally:
            self.engine.end(decoding)

    def completion(self, decoding: Decoding) -> Completion:
        """The record of a request so far."""
        new_tokens = decoding.new_tokens
        return Completion(
            text=self.model.tokenizer.decode(new_tokens),
            token_ids=tuple(new_tokens),
            num_prompt_tokens=len(decoding.sequence.request.prompt_ids),
            finish_reason=decoding.sequence.finish_reason or "unfinished",
            prefill_time_s=decoding.prefill_time_s,
            decode_time_s=decoding.decode_time_s,
            num_steps=decoding.num_steps,
            num_drafted=decoding.num_drafted,
            num_accepted=decoding.num_accepted,
            drafter=self.drafter.name,
            model=self.model.name,
            accepted_lengths=tuple(decoding.accepted_lengths),
        )

    def _begin(self, prompt: str | Sequence[int], params: SamplingParams | None) -> Decoding:
        token_ids = self.model.tokenizer.encode(prompt) if isinstance(prompt, str) and prompt else prompt
        request = Request(tuple(token_ids), params or SamplingParams(), self.model.eos_ids)  # type: ignore[arg-type]
        return self.engine.begin(request)


def build_drafter(model: LoadedModel, drafter: str | KangarooSettings | None) -> Drafter:
    """The drafter of this name or these settings for a model; raises SettingsError for an unknown name."""
    if drafter is None:
        drafter = "kangaroo" if (model.adapter_folder / CONFIG_FILE).is_file() else "plain"
    if drafter == "plain":
        return PlainDrafter()
    if drafter == "kangaroo":
        drafter = KangarooSettings()
    if not isinstance(drafter, KangarooSettings):
        raise SettingsError(f"drafter must be one of {', '.join(NAMES)}, got {drafter!r}")
    return _build_kangaroo(model, drafter)


def _build_kangaroo(model: LoadedModel, settings: KangarooSettings) -> KangarooDrafter:
    if settings.exit_layer is not None:
        check_exit_layer(settings.exit_layer, model.target.num_layers)
    folder = model.adapter_folder if settings.adapter is None else Path(settings.adapter).expanduser()
    if not folder.is_dir():
        raise AdapterError(f"no adapter folder {folder}; train one with `kangaroo train adapter` or give its folder")
    adapter = Adapter.load(folder, model.target)
    trained_at = adapter.config.exit_layer
    if settings.exit_layer not in (None, trained_at):
        raise AdapterError(f"{folder} was trained at exit layer {trained_at}, got exit_layer {settings.exit_layer}; "
                           "leave it out or train another adapter")  # fmt: skip
    return KangarooDrafter(model.target, adapter, stopping=settings.stopping(adapter))


def resolve_device(name: str) -> torch.device:
    """The device of this name; raises SettingsError for an unknown kind or one that is not here."""
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise SettingsError(f"device must be cpu or cuda[:N], got {name!r}") from error
    if device.type not in ("cpu", "cuda"):
        raise SettingsError(f"device must be cpu or cuda[:N], got {name!r}")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise SettingsError(f"device {name} is not here: PyTorch sees {torch.cuda.device_count()} CUDA devices")
    return device


def _eos_ids(folder: Path) -> frozenset[int]:
    """EOS ids of generation_config.json, else of config.json; one id or a list."""
    for name in ("generation_config.json", "config.json"):
        path = folder / name
        try:
            content = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{path} is not readable JSON: {error}") from error
        ids = content.get("eos_token_id") if isinstance(content, dict) else None
        if ids is not None:
            listed = ids if isinstance(ids, list) else [ids]
            if not all(isinstance(one, int) for one in listed):
                raise CheckpointError(f"{path}: eos_token_id must be one id or a list of ids, got {ids!r:.60}")
            return frozenset(listed)
    return frozenset()
