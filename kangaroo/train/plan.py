"""What a training run is to do: settings, checked before anything is loaded."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from kangaroo.drafters.adapter import KINDS, Kind
from kangaroo.errors import SettingsError
from kangaroo.model.weights import DTYPES

INITIALIZATIONS = ("target", "ones")
PRECISIONS = ("auto", "float32", "bfloat16")


@dataclass(frozen=True)
class TrainingPlan:
    """What decides the outcome of any training, besides the target and the data.

    learning_rate is the peak: linear warm-up, then a cosine down to zero. precision is what matrices multiply in while
    training, dtype what the weights are saved in. Raises SettingsError for values outside their range.
    """

    model: str = ""
    num_steps: int = 1000
    batch_size: int = 16
    sequence_length: int = 512
    learning_rate: float = 2e-3
    warmup_steps: int = 50
    weight_decay: float = 0.01
    seed: int = 0
    evaluate_every: int = 100
    checkpoint_every: int = 100
    precision: str = "float32"
    dtype: str = "float32"

    def __post_init__(self) -> None:
        least = {"num_steps": 1, "batch_size": 1, "sequence_length": 1, "warmup_steps": 0, "seed": 0,
                 "evaluate_every": 1, "checkpoint_every": 1, "weight_decay": 0.0}  # fmt: skip
        for name, minimum in least.items():
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= minimum):
                raise SettingsError(f"{name} must be at least {minimum}, got {value}")
        if not (math.isfinite(self.learning_rate) and self.learning_rate > 0):
            raise SettingsError(f"learning_rate must be above 0, got {self.learning_rate}")
        _check_choice("precision", self.precision, allowed=PRECISIONS[1:])
        _check_choice("dtype", self.dtype, allowed=tuple(DTYPES))

    def learning_rate_at(self, step: int) -> float:
        """The rate of a step, counted from 0."""
        if step < self.warmup_steps:
            return self.learning_rate * (step + 1) / self.warmup_steps
        progress = (step - self.warmup_steps) / max(1, self.num_steps - self.warmup_steps)
        return self.learning_rate * 0.5 * (1 + math.cos(math.pi * progress))


@dataclass(frozen=True)
class AdapterPlan(TrainingPlan):
    """Which adapter is trained, and how; initialization says where its norms start: at the target's own or at ones."""

    exit_layer: int = 2
    adapter_kind: Kind = "attention"
    initialization: str = "target"

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_choice("adapter_kind", self.adapter_kind, allowed=KINDS)
        _check_choice("initialization", self.initialization, allowed=INITIALIZATIONS)


@dataclass(frozen=True)
class MedusaPlan(TrainingPlan):
    """How Medusa heads are trained; the loss of head k, from 1, counts head_decay ** k."""

    num_heads: int = 4
    head_decay: float = 0.8

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.num_heads < self.sequence_length:
            raise SettingsError(f"num_heads must be in 1..{self.sequence_length - 1} (below sequence_length), "
                                f"got {self.num_heads}")  # fmt: skip
        if not 0 < self.head_decay <= 1:
            raise SettingsError(f"head_decay must be in (0, 1], got {self.head_decay}")


def _check_choice(name: str, value: str, *, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise SettingsError(f"{name} must be one of {', '.join(allowed)}, got {value}")


def resolve_precision(choice: str, device: torch.device) -> str:
    """What "auto" means on a device: bfloat16 where its matrix products are native, else float32."""
    _check_choice("precision", choice, allowed=PRECISIONS)
    if choice != "auto":
        return choice
    if device.type == "cuda":
        return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float32"
    # PyTorch 2.6 and some later versions cannot tell; float32 is never wrong.
    find: Callable[[], dict[str, Any]] = getattr(torch.cpu, "get_capabilities", dict)
    capabilities = find() if device.type == "cpu" else {}
    return "bfloat16" if capabilities.get("avx512_bf16") or capabilities.get("amx_bf16") else "float32"
