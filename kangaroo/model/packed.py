"""The decoder on the native CPU kernels: weights packed once at load, a span of layers run as one call.

Shapes: D hidden size, E head size, R packed rows, V vocabulary.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from kangaroo.kernels import NATIVE, cpu
from kangaroo.model.cache import CachedPass, KVCache, Segment
from kangaroo.model.config import ModelConfig
from kangaroo.model.skips import NO_SKIPS, SkippedSublayers
from kangaroo.model.transformer import AttentionPass, Layer, Rotary, Transformer

CPU = torch.device("cpu")
LINEARS = ("qkv", "output", "gate_up", "down")


class PackedCache(KVCache):
    """A key-value cache in the native kernels' layout, with the rotary tables of all its positions."""

    def __init__(self, config: ModelConfig, num_sequences: int, *, num_slots: int, rotary: Rotary) -> None:
        self.config = config
        self.device = CPU
        self.lengths = [0] * num_sequences
        self._rotary = rotary
        self._allocate(num_sequences, num_slots)

    def _allocate(self, num_sequences: int, num_slots: int) -> None:
        config = self.config
        storage = cpu.Cache(config.num_layers, num_sequences, config.num_kv_heads, num_slots, config.head_dim)
        # What a pass is given: the keys and values, and the tables.
        self.cached = storage, cpu.Tables(self._rotary.tables(num_slots))
        self.storage, self.num_slots = storage, num_slots

    def _grow(self, num_sequences: int, num_slots: int) -> None:
        old = self.storage
        self._allocate(num_sequences, num_slots)
        for sequence, length in enumerate(self.lengths):
            self.storage.copy(old, sequence, length)

    def compact(self, sequence: int, path: list[int]) -> None:
        """Move the rows path behind the committed slots, in order."""
        self.storage.keep(sequence, self.lengths[sequence], path)


class PackedStack:
    """Packed layers with the rotary tables of their positions."""

    def __init__(self, config: ModelConfig) -> None:
        self._config = config
        self._rotary = Rotary(config.rope, config.head_dim, device=CPU)
        self.kernels = cpu.Stack(
            (config.hidden_size, config.num_heads, config.num_kv_heads, config.head_dim),
            norm_eps=config.norm_eps,
            attention_scale=config.attention_scale,
            softcap=config.attention_softcap,
            activation=config.activation,
        )

    def add_layer(self, tensors: Mapping[str, Tensor], *, storage: str, window: int | None) -> None:
        """Pack a layer's tensors, by the field names of Layer.

        One without qkv and output has no attention, one without gate_up and down no MLP.
        """
        weights = [
            cpu.pack(tensors[name], storage=storage, bias=tensors.get(f"{name}_bias"), paired=name == "gate_up")
            if name in tensors
            else None
            for name in LINEARS
        ]
        self.kernels.add_layer(weights, tensors, window=window)

    def run(self, hidden: Tensor, span: tuple[int, int], *, attention: AttentionPass, taps: Sequence[int] = (),
            skips: SkippedSublayers = NO_SKIPS) -> tuple[Tensor, dict[int, Tensor]]:  # fmt: skip
        """Run layers [i, j) over states [R, D]; returns what leaves them, and the tapped states."""
        cached, segments = _locate(attention)
        described = [] if skips is NO_SKIPS else _describe(skips, self._config.num_layers)
        return self.kernels.run(hidden, span, cached=cached, segments=segments, taps=taps, skips=described)

    def decide(
        self, entering: Tensor | list[int], span: tuple[int, int], *, attention: AttentionPass, taps: Sequence[int],
        ends: tuple[cpu.Weight, float, cpu.HeadPass]
    ) -> tuple[list[int], dict[int, Tensor]]:  # fmt: skip
        """An embedding, layers [i, j) and a head as one call: its argmax [R] and the tapped states."""
        cached, segments = _locate(attention)
        return self.kernels.decide(entering, span, cached=cached, segments=segments, taps=taps, ends=ends)

    def new_cache(self, num_sequences: int, num_slots: int) -> PackedCache:
        """An empty cache for these layers."""
        return PackedCache(self._config, num_sequences, num_slots=num_slots, rotary=self._rotary)


class PackedTransformer(Transformer):
    """A decoder that keeps only packed weights: bit-for-bit row-invariant, without gradients.

    Its norms are ordinary tensors; its matrices are shapes without content ("meta" tensors).
    """

    backend = NATIVE

    def __init__(self, config: ModelConfig, layers: Iterable[Layer], *, embedding: Tensor, final_norm: Tensor,
                 head: Tensor, storage: str) -> None:  # fmt: skip
        """Takes layers one by one, so that a generator's need never all be in memory unpacked.

        storage: float32, bfloat16, float16 or int8, what the weights are kept in.
        """
        self._stack = PackedStack(config)
        packed_head = cpu.pack(head, storage=storage)
        self._embedding = packed_head if head is embedding else cpu.pack(embedding, storage=storage)
        self._head = cpu.Head(packed_head, norm_eps=config.norm_eps, softcap=config.logits_softcap)
        shapes = []
        for layer, window in zip(layers, config.windows, strict=True):
            tensors = layer.tensors()
            self._stack.add_layer(tensors, storage=storage, window=window)
            shapes.append(replace(layer, **{name: tensors[name].to("meta") for name in LINEARS}))
        meta = embedding.to("meta")
        super().__init__(config, shapes, embedding=meta, final_norm=final_norm,
                         head=meta if head is embedding else head.to("meta"))  # fmt: skip
        self.storage = storage
        self._ends = self._embedding, config.embedding_scale, self._head.describe(final_norm, (0, 0, 0))

    @property
    def device(self) -> torch.device:
        return CPU

    @property
    def dtype(self) -> torch.dtype:
        """float32: the type of hidden states and cache, whatever the weights are stored in."""
        return torch.float32

    def new_cache(self, num_sequences: int, num_slots: int) -> PackedCache:
        """An empty cache for this model's keys and values."""
        return self._stack.new_cache(num_sequences, num_slots)

    def embed(self, tokens: Tensor | list[int]) -> Tensor:
        """Hidden states [R, D] that enter layer 0 for tokens [R]."""
        hidden = cpu.gather(self._embedding, tokens if isinstance(tokens, list) else tokens.tolist())
        return hidden if self.config.embedding_scale == 1.0 else hidden * self.config.embedding_scale

    def forward(self, hidden: Tensor, span: tuple[int, int], *, attention: AttentionPass, taps: Sequence[int] = (),
                skips: SkippedSublayers = NO_SKIPS) -> tuple[Tensor, dict[int, Tensor]]:  # fmt: skip
        """Run layers [i, j) of span over hidden states [R, D] that enter layer i; as Transformer.forward."""
        return self._stack.run(hidden, span, attention=attention, taps=taps, skips=skips)

    def decide(self, entering: Tensor | list[int], span: tuple[int, int], *, attention: AttentionPass,
               taps: Sequence[int] = ()) -> tuple[list[int], dict[int, Tensor]]:  # fmt: skip
        """Embedding, layers [i, L) and head in one call; as Transformer.decide."""
        if span[0] in taps and isinstance(entering, list):
            entering = self.embed(entering)
        return self._stack.decide(entering, span, attention=attention, taps=taps, ends=self._ends)

    def logits(self, hidden: Tensor, norm: Tensor | None = None) -> Tensor:
        """Next-token logits [R, V] of hidden states [R, D] under a norm [D], the final one unless given."""
        return self._head.logits(hidden, self.final_norm if norm is None else norm)

    def head_logits(self, normed: Tensor) -> Tensor:
        """Logits [R, V] of normed states [R, D]."""
        return self._head.logits(normed, None)

    def argmax(self, hidden: Tensor) -> Tensor:
        """The most likely next token [R] int64 of hidden states [R, D], the lowest id winning ties."""
        return self._head.argmax(hidden, self.final_norm)

    def guess(self, hidden: Tensor, norm: Tensor) -> tuple[Tensor, Tensor]:
        """A drafter's argmax [R] int64 and its probability [R], of states [R, D] under the drafter's norm [D]."""
        return self._head.guess(hidden, norm)

    def plan_drafts(
        self, adapter: PackedStack, bounds: tuple[int, int, int], *, head: tuple["PackedTransformer", Tensor]
    ) -> cpu.DraftPlan:
        """Drafts with layers [0, e) and an adapter, verified by the others, as cpu.DraftPlan says.

        bounds: e, siblings a node may have, most nodes; head: the model whose head guesses, and the norm [D] before it.
        """
        return cpu.DraftPlan(
            self._stack.kernels,
            adapter.kernels,
            bounds=bounds,
            embedding=self._ends[:2],
            heads=[(head[0]._head, head[1]), (self._head, self.final_norm)],
        )


def pack(model: Transformer, storage: str = "float32") -> PackedTransformer:
    """The same model with its weights packed in this storage."""
    return PackedTransformer(model.config, model.layers, embedding=model.embedding, final_norm=model.final_norm,
                             head=model.head, storage=storage)  # fmt: skip


def _locate(attention: AttentionPass) -> tuple[cpu.Cached, list[Segment]]:
    """Cache, rotary tables and segments of a pass, as the native kernels take them."""
    assert isinstance(attention, CachedPass), "packed weights decode from a cache; train on the reference kernels"
    assert isinstance(attention.cache, PackedCache), "the cache of another backend"
    return attention.cache.cached, attention.segments


def _describe(skips: SkippedSublayers, num_layers: int) -> list[int]:
    """What is left out of every layer, as the native kernels take it."""
    return [
        cpu.SKIP_ATTENTION * (layer in skips.attention) + cpu.SKIP_MLP * (layer in skips.mlp)
        for layer in range(num_layers)
    ]
