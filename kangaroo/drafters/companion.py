"""A folder that lies beside a model and holds what a drafter was trained to add: a config and a weight file.

Every kind of companion names the target it belongs to by a fingerprint.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from kangaroo.errors import KangarooError
from kangaroo.kernels import reference
from kangaroo.model.transformer import Transformer

CONFIG_FILE = "config.json"

Shapes = Mapping[str, tuple[int, ...]]


class CompanionConfig(BaseModel):
    """What every companion's config.json says."""

    model_config = ConfigDict(extra="forbid")

    target_fingerprint: str


Config = TypeVar("Config", bound=CompanionConfig)


@dataclass(frozen=True)
class Companion:
    """A kind of companion: what it is called, its weight file, and the error that says what is wrong with one."""

    noun: str
    weights_file: str
    error: type[KangarooError]

    def read_config(self, folder: Path, schema: type[Config]) -> Config:
        """The folder's config.json; raises this kind's error where it is missing or malformed."""
        path = folder / CONFIG_FILE
        try:
            return schema.model_validate_json(path.read_bytes())
        except OSError as error:
            raise self.error(f"{folder} holds no {self.noun}: no readable {CONFIG_FILE}") from error
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"]) or "content"
            raise self.error(f"{path} is no {self.noun} config: {where}: {first['msg']}") from error

    def check_target(
        self, folder: Path, config: CompanionConfig, *, target: Transformer, sizes: Mapping[str, int]
    ) -> None:
        """Raise this kind's error where config has other sizes or another fingerprint than the target."""
        for name, size in sizes.items():
            if getattr(config, name) != size:
                raise self.error(f"{folder} is for another model: its {name} is {getattr(config, name)}, "
                                 f"the target's {size}; train one for this target")  # fmt: skip
        if config.target_fingerprint != fingerprint(target):
            raise self.error(f"{folder} is for another model of the same shape; train one for this target")

    def read_tensors(self, folder: Path, shapes: Shapes, *, target: Transformer) -> dict[str, Tensor]:
        """The folder's weights as the target keeps its own, vectors in float32.

        Raises this kind's error where the file is missing or damaged, or holds other names or shapes.
        """
        path = folder / self.weights_file
        try:
            with safe_open(path, framework="pt") as file:
                stored = {name: file.get_tensor(name) for name in file.keys()}
        except FileNotFoundError as error:
            raise self.error(f"{folder} holds no {self.weights_file}") from error
        except (SafetensorError, OSError) as error:
            raise self.error(f"{path} is damaged: {error}; copy or train it again") from error
        found = {name: tuple(tensor.shape) for name, tensor in stored.items()}
        if found != shapes:
            raise self.error(f"{path} must hold {shapes}, got {found}")
        tensors = {}
        for name, tensor in stored.items():
            dtype = torch.float32 if tensor.ndim == 1 else target.dtype
            placed = tensor.to(target.device, dtype)
            tensors[name] = placed if tensor.ndim == 1 else reference.prepare(placed)
        return tensors

    def save(self, folder: Path, config: CompanionConfig, *, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> None:
        """Write config.json and the weight file, weights in dtype, into an existing folder."""
        path = folder / self.weights_file
        save_file({name: tensor.detach().to(dtype).cpu().contiguous() for name, tensor in tensors.items()}, path)
        # safetensors writes for the owner alone; a model folder is shared like its config.
        path.chmod(0o644)
        text = json.dumps(config.model_dump(), indent=2) + "\n"
        (folder / CONFIG_FILE).write_text(text, encoding="utf-8")


def fingerprint(target: Transformer) -> str:
    """Short hash of the target's norms, rounded to bfloat16: the same in every dtype it is loaded or saved in.

    A fine-tune that leaves the norms alone shares it; a companion fits such a model, only less well.
    """
    norms = [*(layer.input_norm for layer in target.layers), *(layer.mlp_norm for layer in target.layers)]
    rounded = torch.cat([*norms, target.final_norm]).detach().bfloat16().float().cpu()
    return hashlib.sha256(rounded.numpy().tobytes()).hexdigest()[:16]


def choose_storage(weights: Iterable[Tensor], storage: str) -> str:
    """What a companion's weights are kept in beside a target kept in this: bfloat16 for float32 that it holds exactly.

    Companions are mostly saved in bfloat16; half as many bytes are then read for the same guesses.
    """
    if storage == "float32" and all(torch.equal(one, one.bfloat16().to(one.dtype)) for one in weights):
        return "bfloat16"
    return storage
