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

from kangaroo.drafters.companion import Companion, CompanionConfig, choose_storage, fingerprint
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
        self._numbers = range(1, config.num_heads + 1)
        # The final norm and the residual blocks of all heads as one, and what follows each.
        self._packed: tuple[cpu.Head, list[cpu.Head]] | None = None

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
        """These heads on the native kernels, their weights kept as choose_storage() says."""
        from kangaroo.kernels import cpu

        # The matrices are kept once, packed; their shapes stay.
        shapes = {name: one if one.ndim == 1 else one.to("meta") for name, one in self.tensors.items()}
        packed = MedusaHeads(self.config, target, tensors=shapes)
        weights, biases, outputs = ([self.tensors[f"{name}.{number}"] for number in self._numbers]
                                    for name in ("hidden", "bias", "head"))  # fmt: skip
        # The identity hands on the normed states.
        every = torch.cat([*weights, torch.eye(*weights[0].shape, dtype=weights[0].dtype)])
        bias = torch.cat([*biases, torch.zeros_like(biases[0])])
        storage = choose_storage([*weights, *outputs], target.storage)
        blocks = cpu.pack(every, storage=storage, bias=bias)
        packed._packed = (
            cpu.Head(blocks, norm_eps=self._norm_eps, softcap=None),
            [
                cpu.Head(cpu.pack(output, storage=storage), norm_eps=self._norm_eps, softcap=self._softcap)
                for output in outputs
            ],
        )
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
        """What head `number`, from 1, makes of normed states [..., D]: logits [..., V], float32.

        For heads whose weights are not packed, which may be in training.
        """
        weight, bias, output = (self.tensors[f"{name}.{number}"] for name in ("hidden", "bias", "head"))
        mixed = normed + functional.silu(reference.linear(normed, weight, bias=bias.to(normed.dtype)))
        return reference.head_logits(mixed, output, softcap=self._softcap)

    def predict(self, hidden: Tensor, num_heads: int) -> Tensor:
        """What the first num_heads heads make of states [R, D] that leave the target: logits [K, R, V], float32."""
        if self._packed is None:
            normed = self.normalize(hidden)
            return torch.stack([self.logits(normed, number) for number in self._numbers[:num_heads]])
        blocks, heads = self._packed
        num_rows, size = hidden.shape
        mixed = blocks.logits(hidden, self._final_norm).view(num_rows, -1, size)
        # One by one: where PyTorch's vector loop ends, and other code begins, would depend on the rows beside it.
        gated = torch.stack([functional.silu(row) for row in mixed[:, :num_heads].reshape(-1, size)])
        own = (gated.view(num_rows, -1, size) + mixed[:, -1:]).transpose(0, 1).contiguous()
        return torch.stack([head.logits(one, None) for one, head in zip(own, heads, strict=False)])


def tensor_shapes(model: ModelConfig, num_heads: int) -> dict[str, tuple[int, ...]]:
    """Shape of every weight of so many heads for this model; K (D^2 + D + V D) numbers in all."""
    size, shapes = model.hidden_size, dict[str, tuple[int, ...]]()
    for number in range(1, num_heads + 1):
        shapes |= {f"hidden.{number}": (size, size), f"bias.{number}": (size,),
                   f"head.{number}": (model.vocab_size, size)}  # fmt: skip
    return shapes
