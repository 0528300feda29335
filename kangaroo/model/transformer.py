"""One decoder for every supported family: a forward over a span of layers, and nothing method-specific.

Shapes: D hidden size, F MLP size, H query heads, G key-value heads, E head size, V vocabulary.
Leading dimensions written ... are packed rows [R] when decoding and sequences [B, T] when training.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Protocol

import torch
from torch import Tensor

from kangaroo.errors import KernelError
from kangaroo.kernels import REFERENCE, reference
from kangaroo.model.cache import KVCache, causal_mask
from kangaroo.model.config import ModelConfig, RopeSettings
from kangaroo.model.skips import NO_SKIPS, SkippedSublayers


class AttentionPass(Protocol):
    """Where the rows of one forward pass stand and which keys and values they see.

    positions: [...] int64 on the device, all below num_positions, which the host knows.
    """

    @property
    def num_positions(self) -> int: ...

    @property
    def positions(self) -> Tensor: ...

    def attend(self, layer_id: int, query: Tensor, *, key: Tensor, value: Tensor) -> Tensor:
        """Attend from query [..., H, E] with new key and value [..., G, E]; returns [..., H * E]."""
        ...


@dataclass(slots=True)
class Layer:
    """Weights of one decoder layer; linear weights are [outputs, inputs], norms [size] in float32.

    qkv stacks query, key and value rows, gate_up the gate's and the up projection's. Absent parts are None.
    """

    input_norm: Tensor
    qkv: Tensor
    output: Tensor
    mlp_norm: Tensor
    gate_up: Tensor
    down: Tensor
    qkv_bias: Tensor | None = None
    output_bias: Tensor | None = None
    gate_up_bias: Tensor | None = None
    down_bias: Tensor | None = None
    query_norm: Tensor | None = None
    key_norm: Tensor | None = None
    post_attention_norm: Tensor | None = None
    post_mlp_norm: Tensor | None = None

    def tensors(self) -> dict[str, Tensor]:
        """Every weight that is present, by field name."""
        present = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: tensor for name, tensor in present.items() if tensor is not None}


class Rotary:
    """Cosine and sine tables of rotary position embedding, grown on demand."""

    def __init__(self, settings: RopeSettings, head_dim: int, *, device: torch.device) -> None:
        self._frequencies = inverse_frequencies(settings, head_dim).to(device)
        self._tables = torch.empty(2, 0, 1, head_dim, device=device)

    def tables(self, num_positions: int) -> Tensor:
        """Cosine and signed sine [2, S, 1, E] float32 of at least the first num_positions positions."""
        if self._tables.shape[1] < num_positions:
            size = 1 << (num_positions - 1).bit_length()
            # Tables made while decoding serve training too, which inference tensors could not.
            with torch.inference_mode(False):
                angles = torch.arange(size, device=self._tables.device)[:, None].float() * self._frequencies
                cosine, sine = angles.cos(), angles.sin()
                self._tables = torch.stack([torch.cat([cosine, cosine], -1), torch.cat([-sine, sine], -1)])[:, :, None]
        return self._tables

    def at(self, positions: Tensor, num_positions: int) -> tuple[Tensor, Tensor]:
        """Cosine and signed sine [..., 1, E] at positions [...], all below num_positions (known on the host)."""
        cosine, sine = self.tables(num_positions)
        return cosine[positions], sine[positions]


def inverse_frequencies(settings: RopeSettings, head_dim: int) -> Tensor:
    """Rotation per position of each pair of a head's dimensions, [E / 2] float32.

    The llama3 stretch leaves short wavelengths alone, divides long ones by factor, and blends between
    (Llama 3.1 release notes; the same formula as transformers' rope_type "llama3").
    """
    frequencies = settings.theta ** -(torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim)
    if settings.rope_type == "linear":
        return frequencies / settings.factor
    if settings.rope_type == "llama3":
        wavelengths = 2 * math.pi / frequencies
        low, high = settings.low_freq_factor, settings.high_freq_factor
        blend = ((settings.original_context / wavelengths - low) / (high - low)).clamp(0, 1)
        return (1 - blend) * frequencies / settings.factor + blend * frequencies
    return frequencies


class Transformer:
    """A decoder-only model: embedding, layers, final norm and head, with no state between calls."""

    backend = REFERENCE

    def __init__(self, config: ModelConfig, layers: Sequence[Layer], *, embedding: Tensor, final_norm: Tensor,
                 head: Tensor) -> None:  # fmt: skip
        """embedding: [V, D]; final_norm: [D]; head: [V, D], the embedding itself where it is tied."""
        self.config = config
        self.layers = list(layers)
        self.embedding = embedding
        self.final_norm = final_norm
        self.head = head
        # What the weights are kept in, by name.
        self.storage = str(embedding.dtype).removeprefix("torch.")
        self.rotary = Rotary(config.rope, config.head_dim, device=embedding.device)

    @property
    def device(self) -> torch.device:
        return self.embedding.device

    @property
    def dtype(self) -> torch.dtype:
        """The type of hidden states: the weights' own, float32 on a CPU whatever the weights are stored in."""
        return self.embedding.dtype

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    def require_reference(self, what: str) -> None:
        """Raise KernelError where the weights are packed, which cannot do what."""
        if self.backend != REFERENCE:
            raise KernelError(f"packed weights only decode; load the model with backend='reference' to {what}")

    def new_cache(self, num_sequences: int, num_slots: int) -> KVCache:
        """An empty cache for this model's keys and values."""
        return KVCache(self.config, num_sequences, num_slots=num_slots, dtype=self.dtype, device=self.device)

    def parameters(self) -> Iterator[tuple[str, Tensor]]:
        """Every weight with a stable name; a tied head is listed once, as the embedding."""
        yield "embedding", self.embedding
        for layer_id, layer in enumerate(self.layers):
            for name, tensor in layer.tensors().items():
                yield f"layers.{layer_id}.{name}", tensor
        yield "final_norm", self.final_norm
        if self.head is not self.embedding:
            yield "head", self.head

    def embed(self, tokens: Tensor | list[int]) -> Tensor:
        """Hidden states [..., D] that enter layer 0 for tokens [...] int64, or a list of R of them."""
        tokens = torch.tensor(tokens, device=self.device) if isinstance(tokens, list) else tokens
        hidden = torch.nn.functional.embedding(tokens, self.embedding)
        return hidden if self.config.embedding_scale == 1.0 else hidden * self.config.embedding_scale

    def forward(self, hidden: Tensor, span: tuple[int, int], *, attention: AttentionPass, taps: Sequence[int] = (),
                skips: SkippedSublayers = NO_SKIPS) -> tuple[Tensor, dict[int, Tensor]]:  # fmt: skip
        """Run layers [i, j) of span over hidden states [..., D] that enter layer i.

        What is in skips is left out: states pass it unchanged, and a skipped attention writes no keys and values.
        Returns the states that leave layer j - 1, and for each tap in i..j those that enter layer tap.
        """
        start, stop = span
        cosine, sine = self.rotary.at(attention.positions, attention.num_positions)
        tapped = {}
        for layer_id in range(start, stop):
            if layer_id in taps:
                tapped[layer_id] = hidden
            if layer_id not in skips.attention:
                hidden = self._attend(layer_id, hidden, attention=attention, cosine=cosine, sine=sine)
            if layer_id not in skips.mlp:
                hidden = self._transform(layer_id, hidden)
        if stop in taps:
            tapped[stop] = hidden
        return hidden, tapped

    def logits(self, hidden: Tensor, norm: Tensor | None = None) -> Tensor:
        """Next-token logits [..., V], float32, of hidden states [..., D] under a norm [D], else the final one."""
        weight = self.final_norm if norm is None else norm
        return self.head_logits(reference.rms_norm(hidden, weight, eps=self.config.norm_eps))

    def argmax(self, hidden: Tensor) -> Tensor:
        """The most likely next token [R] int64 of hidden states [R, D], the lowest id winning ties."""
        return self.logits(hidden).argmax(dim=-1)

    def decide(self, entering: Tensor | list[int], span: tuple[int, int], *, attention: AttentionPass,
               taps: Sequence[int] = ()) -> tuple[list[int], dict[int, Tensor]]:  # fmt: skip
        """The most likely next token [R] behind what enters layer i of span (i, L), and the tapped states.

        As forward() and argmax(); entering: states [R, D], or R tokens to be embedded.
        """
        hidden = self.embed(entering) if isinstance(entering, list) else entering
        leaving, tapped = self.forward(hidden, span, attention=attention, taps=taps)
        return self.argmax(leaving).tolist(), tapped

    def guess(self, hidden: Tensor, norm: Tensor) -> tuple[Tensor, Tensor]:
        """A drafter's argmax [R] int64 and its probability [R], of states [R, D] under the drafter's norm [D]."""
        logits = self.logits(hidden, norm)
        return logits.argmax(dim=-1), torch.softmax(logits, dim=-1).amax(dim=-1)

    def head_logits(self, normed: Tensor) -> Tensor:
        """Logits [..., V], float32, of normed states [..., D]: the head a drafter may share."""
        return reference.head_logits(normed, self.head, softcap=self.config.logits_softcap)

    def _attend(self, layer_id: int, hidden: Tensor, *, attention: AttentionPass, cosine: Tensor,
                sine: Tensor) -> Tensor:  # fmt: skip
        config, layer = self.config, self.layers[layer_id]
        num_rotated = config.num_heads + config.num_kv_heads
        normed = reference.rms_norm(hidden, layer.input_norm, eps=config.norm_eps)
        heads = reference.linear(normed, layer.qkv, bias=layer.qkv_bias).unflatten(-1, (-1, config.head_dim))
        query_key, value = heads[..., :num_rotated, :], heads[..., num_rotated:, :]
        if layer.query_norm is not None and layer.key_norm is not None:
            query, key = query_key.split((config.num_heads, config.num_kv_heads), dim=-2)
            query = reference.rms_norm(query, layer.query_norm, eps=config.norm_eps)
            key = reference.rms_norm(key, layer.key_norm, eps=config.norm_eps)
            query_key = torch.cat([query, key], dim=-2)
        query_key = reference.rotate(query_key, cosine=cosine, sine=sine)
        query, key = query_key[..., : config.num_heads, :], query_key[..., config.num_heads :, :]
        attended = attention.attend(layer_id, query, key=key, value=value)
        update = reference.linear(attended, layer.output, bias=layer.output_bias)
        if layer.post_attention_norm is not None:
            update = reference.rms_norm(update, layer.post_attention_norm, eps=config.norm_eps)
        return hidden + update

    def _transform(self, layer_id: int, hidden: Tensor) -> Tensor:
        config, layer = self.config, self.layers[layer_id]
        normed = reference.rms_norm(hidden, layer.mlp_norm, eps=config.norm_eps)
        gate_up = reference.linear(normed, layer.gate_up, bias=layer.gate_up_bias)
        gated = reference.gate(gate_up, activation=config.activation)
        update = reference.linear(gated, layer.down, bias=layer.down_bias)
        if layer.post_mlp_norm is not None:
            update = reference.rms_norm(update, layer.post_mlp_norm, eps=config.norm_eps)
        return hidden + update


class FullSequencePass:
    """Attention inside whole sequences [B, T] without a cache: the differentiable pass of training."""

    def __init__(self, config: ModelConfig, num_tokens: int, *, device: torch.device) -> None:
        self._config = config
        self.num_positions = num_tokens
        self.positions = torch.arange(num_tokens, device=device)
        offsets = self.positions[:, None] - self.positions
        self._masks: dict[int | None, Tensor | None] = {None: None}
        if config.attention_softcap is not None:
            self._masks[None] = causal_mask(offsets, window=None)
        for window in set(config.windows) - {None}:
            # A window at least as long as the sequence hides nothing.
            hides = window is not None and window < num_tokens
            self._masks[window] = causal_mask(offsets, window=window) if hides else self._masks[None]

    def attend(self, layer_id: int, query: Tensor, *, key: Tensor, value: Tensor) -> Tensor:
        """Attend from query [B, T, H, E] to key and value [B, T, G, E]; returns [B, T, H * E]."""
        query, key, value = (heads.transpose(-2, -3) for heads in (query, key, value))
        mask = self._masks[self._config.windows[layer_id]]
        scale = self._config.attention_scale
        if mask is None:
            out = reference.causal_attention(query, key=key, value=value, scale=scale)
        else:
            cap = self._config.attention_softcap
            out = reference.attention(query, key=key, value=value, mask=mask, scale=scale, softcap=cap)
        return out.transpose(-2, -3).flatten(-2)
