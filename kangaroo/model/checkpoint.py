"""A checkpoint in memory, from a folder, a hub id, or "demo" for the bundled model."""

from __future__ import annotations

import json
from dataclasses import dataclass
from numbers import Real
from pathlib import Path
from typing import Any

import torch

from kangaroo.errors import CheckpointError, SettingsError
from kangaroo.kernels import select_backend
from kangaroo.model.config import ModelConfig
from kangaroo.model.tokenizer import Tokenizer
from kangaroo.model.transformer import Transformer
from kangaroo.model.weights import DTYPES, load_transformer, resolve_folder

SAMPLING_FIELDS = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
DEMO_FOLDER = Path(__file__).parents[1] / "assets" / "demo"


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

    @property
    def heads_folder(self) -> Path:
        """Where Medusa heads lie beside their model."""
        return self.folder / "medusa"

    def sampling_defaults(self) -> dict[str, Any]:
        """The fields of SamplingParams that generation_config.json recommends, {} where there are none.

        Without do_sample the temperature is 0; with it temperature and top_k are 1 and 50 unless they are there, as in
        transformers.
        Raises CheckpointError where one is not a number.
        """
        path = self.folder / "generation_config.json"
        content = _read_json(path)
        found = {name: content[name] for name in SAMPLING_FIELDS if content.get(name) is not None}
        for name, value in found.items():
            if isinstance(value, bool) or not isinstance(value, Real):
                raise CheckpointError(f"{path}: {name} must be a number, got {value!r:.60}")
        if content.get("do_sample") is True:
            return {"temperature": 1.0, "top_k": 50} | found
        return found | {"temperature": 0.0} if found else {}


@dataclass(frozen=True)
class Vocabulary:
    """What a checkpoint says of its tokens: the tokenizer, the end-of-text ids and the number of its logits."""

    tokenizer: Tokenizer
    eos_ids: frozenset[int]
    size: int

    @classmethod
    def load(cls, model: str) -> Vocabulary:
        """Read it without the weights; model and errors are load_model's."""
        folder = find_folder(model)
        return cls(Tokenizer.from_folder(folder), _eos_ids(folder), ModelConfig.from_folder(folder).vocab_size)


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
    folder = find_folder(model)
    config = ModelConfig.from_folder(folder)
    target = load_transformer(
        folder, config, storage=weights or dtype, device=placed, backend=backend or select_backend(placed.type)
    )
    tokenizer = Tokenizer.from_folder(folder)
    return LoadedModel(model, folder, target, tokenizer, _eos_ids(folder))


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


def find_folder(model: str) -> Path:
    """The local folder of load_model()'s model; raises CheckpointError where there is none."""
    return DEMO_FOLDER if model == "demo" else resolve_folder(model)


def _eos_ids(folder: Path) -> frozenset[int]:
    """EOS ids of generation_config.json, else of config.json; one id or a list."""
    for name in ("generation_config.json", "config.json"):
        ids = _read_json(folder / name).get("eos_token_id")
        if ids is not None:
            listed = ids if isinstance(ids, list) else [ids]
            if not all(isinstance(one, int) for one in listed):
                raise CheckpointError(f"{folder / name}: eos_token_id must be one id or a list of ids, got {ids!r:.60}")
            return frozenset(listed)
    return frozenset()


def _read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file, {} where there is no file or none in it."""
    try:
        content = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} is not readable JSON: {error}") from error
    return content if isinstance(content, dict) else {}
