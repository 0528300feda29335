"""The Kangaroo adapter: the small trained part that turns shallow hidden states into draft predictions.

Norm, one multi-head attention, residual, norm; the head is the target's (Kangaroo, section 3.2). The other kinds are
those of an ablation: other parts of a decoder layer, or attention under a head of its own.
Shapes: D hidden size, F MLP size, H query heads, E head size, V vocabulary; leading dimensions ... as in
model/transformer.py.
"""

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args

import torch
from pydantic import Field
from torch import Tensor

from kangaroo.drafters.base import MAX_NODES
from kangaroo.drafters.companion import Companion, CompanionConfig, choose_storage, fingerprint
from kangaroo.drafters.settings import KangarooSettings
from kangaroo.errors import AdapterError, KernelError
from kangaroo.kernels import REFERENCE, reference
from kangaroo.model.cache import KVCache
from kangaroo.model.config import ModelConfig
from kangaroo.model.transformer import AttentionPass, Rotary, Transformer

if TYPE_CHECKING:
    from kangaroo.model.packed import PackedStack, PackedTransformer

WEIGHTS_FILE = "adapter.safetensors"
ADAPTER = Companion("adapter", WEIGHTS_FILE, AdapterError)

# Attention alone, a gated MLP alone, a decoder layer of both, attention under a head of its own.
Kind = Literal["attention", "mlp", "layer", "head"]
KINDS: tuple[Kind, ...] = get_args(Kind)
# What a matrix of these names makes is added to the states.
ADDING = ("output", "down")
# What settings may leave open, and what it is then.
COMPLETED = ("gamma", "eta", "num_siblings", "max_nodes")
DEFAULTS = (6, 0.6, 1, MAX_NODES)


class AdapterConfig(CompanionConfig):
    """What an adapter was trained for; gamma and eta are the settings its training report recommends."""

    kind: Kind = "attention"
    exit_layer: int
    hidden_size: int
    num_heads: int
    head_dim: int
    vocab_size: int
    gamma: int | None = Field(default=None, ge=1)
    eta: float | None = Field(default=None, ge=0, le=1)

    def complete(self, settings: KangarooSettings) -> KangarooSettings:
        """The settings, with what they leave open as is recommended, else as in the paper, and chains."""
        recommended = (self.gamma, self.eta, None, None)
        values = {name: next(value for value in (getattr(settings, name), *rest) if value is not None)
                  for name, *rest in zip(COMPLETED, recommended, DEFAULTS, strict=True)}  # fmt: skip
        return replace(settings, **values)


class Adapter:
    """Adapter weights bound to their target's shapes and rotary settings."""

    def __init__(self, config: AdapterConfig, model_config: ModelConfig, *, tensors: dict[str, Tensor]) -> None:
        """tensors: final_norm [D] and, as the kind has them, input_norm [D], qkv [3 * H * E, D], output [D, H * E],
        mlp_norm [D], gate_up [2 * F, D], down [D, F], head [V, D].
        """
        self.config = config
        self.model_config = attention_config(model_config)
        self.tensors = tensors
        self.packed: PackedStack | None = None
        self._packed_head: PackedTransformer | None = None
        device = tensors["final_norm"].device
        self.rotary = Rotary(model_config.rope, model_config.head_dim, device=device)

    @classmethod
    def initialize(
        cls, target: Transformer, exit_layer: int, *, kind: Kind = "attention", seed: int = 0,
        initialization: str = "target"
    ) -> "Adapter":  # fmt: skip
        """A new adapter for target at exit_layer, which says what the target would, leaving there.

        initialization: where the norms start, "target" for the target's own or "ones".
        Raises AdapterError where exit_layer is outside 1..L-1, KernelError for a head of packed weights.
        """
        check_exit_layer(exit_layer, target.num_layers)
        if kind == "head":
            target.require_reference("make a head for it")
        model, layer = attention_config(target.config), target.layers[exit_layer]
        generator = torch.Generator().manual_seed(seed)
        own = {"input_norm": layer.input_norm, "mlp_norm": layer.mlp_norm, "final_norm": target.final_norm}
        tensors = {}
        for name, shape in tensor_shapes(model, kind).items():
            if name in own:
                tensors[name] = own[name].detach().float().clone() if initialization == "target" else torch.ones(shape)
            elif name == "head":
                tensors[name] = target.head.detach().float().clone()
            elif name in ADDING:
                # The residual path starts as the plain shallow state; what is added to it grows from zero.
                tensors[name] = torch.zeros(shape)
            else:
                tensors[name] = torch.randn(shape, generator=generator) * model.hidden_size**-0.5
        config = AdapterConfig(
            kind=kind,
            exit_layer=exit_layer,
            hidden_size=model.hidden_size,
            num_heads=model.num_heads,
            head_dim=model.head_dim,
            vocab_size=model.vocab_size,
            target_fingerprint=fingerprint(target),
        )
        return cls(config, target.config, tensors={name: t.to(target.device) for name, t in tensors.items()})

    @classmethod
    def load(cls, folder: Path, target: Transformer) -> "Adapter":
        """Read config.json and adapter.safetensors and check them against target.

        Raises AdapterError where files are missing or damaged, or the adapter belongs to another model.
        """
        config = ADAPTER.read_config(folder, AdapterConfig)
        check_exit_layer(config.exit_layer, target.num_layers)
        model = attention_config(target.config)
        sizes = {"hidden_size": model.hidden_size, "vocab_size": model.vocab_size,
                 "num_heads": model.num_heads, "head_dim": model.head_dim}  # fmt: skip
        ADAPTER.check_target(folder, config, target=target, sizes=sizes)
        tensors = ADAPTER.read_tensors(folder, tensor_shapes(model, config.kind), target=target)
        adapter = cls(config, target.config, tensors=tensors)
        return adapter if target.backend == REFERENCE else adapter.pack(target)  # type: ignore[arg-type]

    @classmethod
    def find(cls, folder: str | Path, target: Transformer, *, exit_layer: int | None) -> "Adapter":
        """Load from a folder; raises AdapterError where there is none, or exit_layer is given and not its own."""
        if exit_layer is not None:
            check_exit_layer(exit_layer, target.num_layers)
        folder = Path(folder).expanduser()
        if not folder.is_dir():
            raise AdapterError(
                f"no adapter folder {folder}; train one with `kangaroo train adapter` or give its folder"
            )
        adapter = cls.load(folder, target)
        trained_at = adapter.config.exit_layer
        if exit_layer not in (None, trained_at):
            raise AdapterError(f"{folder} was trained at exit layer {trained_at}, got exit_layer {exit_layer}; "
                               "leave it out or train another adapter")  # fmt: skip
        return adapter

    def pack(self, target: "PackedTransformer") -> "Adapter":
        """This adapter on the native kernels, its weights kept as choose_storage() says."""
        from kangaroo.model.packed import PackedStack, pack

        # The matrices are kept once, packed; their shapes stay.
        shapes = {name: one if one.ndim == 1 else one.to("meta") for name, one in self.tensors.items()}
        packed = Adapter(self.config, self.model_config, tensors=shapes)
        packed.packed = PackedStack(self.model_config)
        storage = choose_storage(self.tensors.values(), target.storage)
        packed.packed.add_layer(self.tensors, storage=storage, window=None)
        if "head" in self.tensors:
            packed._packed_head = pack(self.head(target), storage)
        return packed

    @property
    def final_norm(self) -> Tensor:
        """The norm [D] between its states and the head."""
        return self.tensors["final_norm"]

    @property
    def attends(self) -> bool:
        """Whether it reads earlier tokens, which it must have been fed then."""
        return "qkv" in self.tensors

    def head(self, target: Transformer) -> Transformer:
        """Whose head its states are for: the target, or a model of no layers that holds the adapter's own."""
        if self._packed_head is not None:
            return self._packed_head
        if "head" not in self.tensors:
            return target
        config, head = replace(target.config, num_layers=0, windows=()), self.tensors["head"]
        return Transformer(config, [], embedding=head, final_norm=self.final_norm, head=head)

    def new_cache(self, target: Transformer, *, num_sequences: int, num_slots: int) -> KVCache:
        """An empty cache for the adapter's own keys and values."""
        if self.packed is not None:
            return self.packed.new_cache(num_sequences, num_slots)
        return KVCache(self.model_config, num_sequences, num_slots=num_slots, dtype=target.dtype, device=target.device)

    def save(self, folder: Path, *, dtype: torch.dtype = torch.float32) -> None:
        """Write config.json and adapter.safetensors, weights in dtype, into an existing folder.

        Raises KernelError for one whose weights are packed.
        """
        if self.packed is not None:
            raise KernelError("packed weights are not saved; save the adapter they were packed from")
        ADAPTER.save(folder, self.config, tensors=self.tensors, dtype=dtype)

    def forward(self, hidden: Tensor, *, attention: AttentionPass) -> Tensor:
        """Normed states [..., D] for the head, from states [..., D] entering the exit layer."""
        return reference.rms_norm(
            self.run(hidden, attention=attention), self.final_norm, eps=self.model_config.norm_eps
        )

    def run(self, hidden: Tensor, *, attention: AttentionPass) -> Tensor:
        """The states [..., D] before the final norm, from states [..., D] entering the exit layer."""
        if self.packed is not None:
            return self.packed.run(hidden, (0, 1), attention=attention)[0]
        if self.attends:
            hidden = hidden + self._attend(hidden, attention)
        return hidden + self._transform(hidden) if "gate_up" in self.tensors else hidden

    def _attend(self, hidden: Tensor, attention: AttentionPass) -> Tensor:
        model, tensors = self.model_config, self.tensors
        cosine, sine = self.rotary.at(attention.positions, attention.num_positions)
        normed = reference.rms_norm(hidden, tensors["input_norm"], eps=model.norm_eps)
        heads = reference.linear(normed, tensors["qkv"]).unflatten(-1, (-1, model.head_dim))
        rotated = reference.rotate(heads[..., : 2 * model.num_heads, :], cosine=cosine, sine=sine)
        query, key = rotated.chunk(2, dim=-2)
        attended = attention.attend(0, query, key=key, value=heads[..., 2 * model.num_heads :, :])
        return reference.linear(attended, tensors["output"])

    def _transform(self, hidden: Tensor) -> Tensor:
        model, tensors = self.model_config, self.tensors
        normed = reference.rms_norm(hidden, tensors["mlp_norm"], eps=model.norm_eps)
        gated = reference.gate(reference.linear(normed, tensors["gate_up"]), activation=model.activation)
        return reference.linear(gated, tensors["down"])


def attention_config(config: ModelConfig) -> ModelConfig:
    """The one-layer, full-attention, multi-head shape an adapter for this model has."""
    return replace(
        config,
        num_layers=1,
        num_kv_heads=config.num_heads,
        windows=(None,),
        attention_scale=config.head_dim**-0.5,
        attention_softcap=None,
    )


def tensor_shapes(model: ModelConfig, kind: Kind = "attention") -> dict[str, tuple[int, ...]]:
    """Shape of every weight of such an adapter for this model.

    Attention has 4 D^2 numbers in all where H * E = D, the MLP 3 F D, an own head V D.
    """
    size, inner, middle = model.hidden_size, model.num_heads * model.head_dim, model.intermediate_size
    shapes: dict[str, tuple[int, ...]] = {}
    if kind != "mlp":
        shapes |= {"input_norm": (size,), "qkv": (3 * inner, size), "output": (size, inner)}
    if kind in ("mlp", "layer"):
        shapes |= {"mlp_norm": (size,), "gate_up": (2 * middle, size), "down": (size, middle)}
    if kind == "head":
        shapes["head"] = (model.vocab_size, size)
    return shapes | {"final_norm": (size,)}


def check_exit_layer(exit_layer: int, num_layers: int) -> None:
    """Raise AdapterError unless exit_layer is in 1..num_layers - 1."""
    if num_layers < 2:
        raise AdapterError("a model of one layer has no layer to exit from; use plain decoding")
    if not 1 <= exit_layer < num_layers:
        raise AdapterError(f"exit_layer must be in 1..{num_layers - 1}, got {exit_layer}")
