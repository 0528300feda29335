"""Medusa heads: small trained parts, each of which predicts one more token ahead from the target's last states.

Head k (from 1) predicts the token k places behind the target's own next one, from the state h that the target's head
reads: W2_k (h + SiLU(W1_k h + b1_k)) (Medusa-1, Cai et al. 2024, arXiv 2401.10774, section 2.1.1).
Shapes: K heads, D hidden size, V vocabulary, R rows; leading dimensions ... as in model/transformer.py.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional

from kangaroo.drafters.companion import Companion, CompanionConfig, fingerprint
from kangaroo.errors import HeadsError, KernelError
from kangaroo.kernels import REFERENCE, reference
from kangaroo.model.config import ModelConfig
from kangaroo.model.transformer import Transformer

if TYPE_CHECKING:
    from kangaroo.kernels import cpu
    from kangaroo.model.packed import PackedTransformer

WEIGHTS_FILE = "heads.safetensors"
HEADS = Companion("Medusa heads", WEIGHTS_FILE, HeadsError)


class HeadsConfig(CompanionConfig):
    """What heads were trained for."""

    kind: Literal["medusa"] = "medusa"
    num_heads: int = Field(ge=1)
    hidden_size: int
    vocab_size: int


class MedusaHeads:
    """Weights of all heads, bound to the final norm and the soft cap of their target's own head."""

    def __init__(self, config: HeadsConfig, target: Transformer, *, tensors: dict[str, Tensor]) -> None:
        """tensors: for every k from 1, hidden.k [D, D], bias.k [D] and head.k [V, D]."""
        self.config = config
        self.tensors = tensors
        self._final_norm = target.final_norm
        self._norm_eps, self._softcap = target.config.norm_eps, target.config.logits_softcap
        self._packed: list[tuple[cpu.Weight, cpu.Head]] | None = None

    @classmethod
    def initialize(cls, target: Transformer, num_heads: int) -> "MedusaHeads":
        """New heads, at least one, that all say what the target's own says; raises KernelError for packed weights."""
        target.require_reference("make heads for it")
        model, head = target.config, target.head.detach().float()
        tensors = {
            name: head.clone() if name.startswith("head") else torch.zeros(shape, device=target.device)
            for name, shape in tensor_shapes(model, num_heads).items()
        }
        config = HeadsConfig(
            num_heads=num_heads,
            hidden_size=model.hidden_size,
            vocab_size=model.vocab_size,
            target_fingerprint=fingerprint(target),
        )
        return cls(config, target, tensors=tensors)

    @classmethod
    def load(cls, folder: Path, target: Transformer) -> "MedusaHeads":
        """Read config.json and heads.safetensors and check them against target.

        Raises HeadsError where files are missing or damaged, or the heads belong to another model.
        """
        config, model = HEADS.read_config(folder, HeadsConfig), target.config
        sizes = {"hidden_size": model.hidden_size, "vocab_size": model.vocab_size}
        HEADS.check_target(folder, config, target=target, sizes=sizes)
        tensors = HEADS.read_tensors(folder, tensor_shapes(model, config.num_heads), target=target)
        heads = cls(config, target, tensors=tensors)
        return heads if target.backend == REFERENCE else heads.pack(target)  # type: ignore[arg-type]

    def pack(self, target: "PackedTransformer") -> "MedusaHeads":
        """These heads on the native kernels, their weights kept as the target's are."""
        from kangaroo.kernels import cpu

        # The matrices are kept once, packed; their shapes stay.
        shapes = {name: one if one.ndim == 1 else one.to("meta") for name, one in self.tensors.items()}
        packed = MedusaHeads(self.config, target, tensors=shapes)
        packed._packed = []
        for number in range(1, self.config.num_heads + 1):
            weight, bias, head = (self.tensors[f"{name}.{number}"] for name in ("hidden", "bias", "head"))
            block = cpu.pack(weight, storage=target.storage, bias=bias)
            own = cpu.Head(cpu.pack(head, storage=target.storage), norm_eps=self._norm_eps, softcap=self._softcap)
            packed._packed.append((block, own))
        return packed

    def save(self, folder: Path, *, dtype: torch.dtype = torch.float32) -> None:
        """Write config.json and heads.safetensors, weights in dtype, into an existing folder.

        Raises KernelError for heads whose weights are packed.
        """
        if self._packed is not None:
            raise KernelError("packed weights are not saved; save the heads they were packed from")
        HEADS.save(folder, self.config, tensors=self.tensors, dtype=dtype)

    def normalize(self, hidden: Tensor) -> Tensor:
        """The states [..., D] that the heads read, from those that leave the target's last layer."""
        return reference.rms_norm(hidden, self._final_norm, eps=self._norm_eps)

    def logits(self, normed: Tensor, number: int) -> Tensor:
        """What head `number`, from 1, makes of normed states [..., D]: logits [..., V], float32."""
        if self._packed is not None:
            return self._packed[number - 1][1].logits(self._mix(normed, number), None)
        output = self.tensors[f"head.{number}"]
        return reference.head_logits(self._mix(normed, number), output, softcap=self._softcap)

    def guess(self, normed: Tensor, number: int) -> tuple[Tensor, Tensor]:
        """The argmax [R] int64 of what head `number` makes of normed states [R, D], and its probability [R]."""
        if self._packed is not None:
            return self._packed[number - 1][1].guess(self._mix(normed, number), None)
        logits = self.logits(normed, number)
        return logits.argmax(dim=-1), torch.softmax(logits, dim=-1).amax(dim=-1)

    def _mix(self, normed: Tensor, number: int) -> Tensor:
        """The residual block of a head: states [..., D] from normed states [..., D]."""
        if self._packed is not None:
            from kangaroo.kernels import cpu

            # Row by row: where PyTorch's vector loop ends, and other code begins, would depend on the rows beside it.
            mixed = cpu.linear(normed, self._packed[number - 1][0])
            return normed + torch.stack([functional.silu(row) for row in mixed])
        weight, bias = self.tensors[f"hidden.{number}"], self.tensors[f"bias.{number}"]
        return normed + functional.silu(reference.linear(normed, weight, bias=bias.to(normed.dtype)))


def tensor_shapes(model: ModelConfig, num_heads: int) -> dict[str, tuple[int, ...]]:
    """Shape of every weight of so many heads for this model; K (D^2 + D + V D) numbers in all."""
    size, shapes = model.hidden_size, dict[str, tuple[int, ...]]()
    for number in range(1, num_heads + 1):
        shapes |= {f"hidden.{number}": (size, size), f"bias.{number}": (size,),
                   f"head.{number}": (model.vocab_size, size)}  # fmt: skip
    return shapes
