"""Preallocated key-value cache: written by slot, rolled back by an integer.

Shapes: B sequences, R rows of a pass, S visible slots, G key-value heads, H query heads, E head size.
"""

from collections.abc import Sequence as SequenceOf
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from kangaroo.kernels import reference
from kangaroo.model.config import ModelConfig


class KVCache:
    """Keys and values of every layer for a fixed number of sequences of bounded length.

    The first lengths[b] slots of sequence b hold its committed tokens in order; a pass may write beyond them,
    and what is not kept afterwards is overwritten by the next pass.
    """

    def __init__(
        self, config: ModelConfig, num_sequences: int, *, num_slots: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        """num_slots: tokens a sequence may hold; a pass may use them all."""
        self.config = config
        self.device = device
        self.num_slots = num_slots
        self.lengths = [0] * num_sequences
        shape = (num_sequences, config.num_kv_heads, num_slots, config.head_dim)
        layers = range(config.num_layers)
        self.keys = [torch.zeros(shape, dtype=dtype, device=device) for _ in layers]
        self.values = [torch.zeros(shape, dtype=dtype, device=device) for _ in layers]

    def reserve(self, num_sequences: int, num_slots: int) -> None:
        """Make room for at least so many sequences of so many slots, keeping what is committed."""
        if num_sequences <= len(self.lengths) and num_slots <= self.num_slots:
            return
        lengths = self.lengths + [0] * (num_sequences - len(self.lengths))
        self._grow(len(lengths), max(num_slots, self.num_slots))
        self.lengths = lengths

    def truncate(self, sequence: int, num_tokens: int) -> None:
        """Forget everything of a sequence beyond its first num_tokens."""
        assert 0 <= num_tokens <= self.num_slots, (num_tokens, self.num_slots)
        self.lengths[sequence] = num_tokens

    def keep(self, sequence: int, path: list[int]) -> None:
        """Commit the rows path (root first) of the pass just written at slots lengths[sequence] onward.

        A path along a chain moves nothing; a branch of a tree is compacted.
        """
        if path != list(range(len(path))):
            self.compact(sequence, path)
        self.truncate(sequence, self.lengths[sequence] + len(path))

    def _grow(self, num_sequences: int, num_slots: int) -> None:
        held = len(self.lengths)
        grown = []
        for old in (*self.keys, *self.values):
            new = old.new_zeros(num_sequences, old.shape[1], num_slots, old.shape[3])
            new[:held, :, : old.shape[2]] = old
            grown.append(new)
        # Only now, when there was memory for all of it.
        self.keys, self.values = grown[: len(self.keys)], grown[len(self.keys) :]
        self.num_slots = num_slots

    def compact(self, sequence: int, path: list[int]) -> None:
        """Move the rows path behind the committed slots, in order."""
        start = self.lengths[sequence]
        source = torch.tensor(path, device=self.keys[0].device) + start
        for stored in (*self.keys, *self.values):
            stored[sequence, :, start : start + len(path)] = stored[sequence, :, source]


def depths_of(parents: SequenceOf[int]) -> list[int]:
    """How many ancestors each node of a draft has, by the parents of the nodes, -1 for one that has none."""
    depths: list[int] = []
    for parent in parents:
        depths.append(0 if parent < 0 else depths[parent] + 1)
    return depths


class Segment(NamedTuple):
    """Consecutive rows of one sequence in a packed pass: nodes first_node and on of its draft, or plain tokens.

    Node n is written at slot base + n; the slots below base hold committed tokens. parents gives the parent of every
    node up to the last row's, -1 for one that follows the committed tokens; None stands for a chain.
    """

    sequence: int
    base: int
    num_rows: int
    parents: tuple[int, ...] | None = None
    first_node: int = 0

    @property
    def stop(self) -> int:
        """The slot behind the last row's."""
        return self.base + self.first_node + self.num_rows

    def depths(self) -> list[int]:
        """Distance of every node up to the last row's from the committed tokens, minus one; a chain's are 0, 1, 2."""
        if self.parents is None:
            return list(range(self.first_node + self.num_rows))
        return depths_of(self.parents)

    def positions(self, device: torch.device) -> Tensor:
        """[R] int64: every row's position; a chain's are made on the device, without waiting for it."""
        if self.parents is None:
            return torch.arange(self.base + self.first_node, self.stop, device=device)
        return torch.tensor([self.base + depth for depth in self.depths()[self.first_node :]], device=device)

    def visibility(self) -> Tensor:
        """[R, first_node + R] bool: which nodes each row descends from, itself included."""
        num_nodes = self.first_node + self.num_rows
        sees = torch.eye(num_nodes, dtype=torch.bool)
        parents = range(-1, num_nodes - 1) if self.parents is None else self.parents
        for node, parent in enumerate(parents):
            if parent >= 0:
                sees[node] |= sees[parent]
        return sees[self.first_node :]


class CachedPass:
    """Attention of packed rows over a cache: writes each row's key and value, reads what the row may see."""

    def __init__(self, cache: KVCache, segments: list[Segment]) -> None:
        """Every segment must fit: segment.stop <= cache.num_slots."""
        self.cache = cache
        self.segments = segments

    @property
    def num_positions(self) -> int:
        return max(segment.stop for segment in self.segments)

    @cached_property
    def positions(self) -> Tensor:
        """[R] int64: every row's position."""
        return self._own_positions[0] if len(self.segments) == 1 else torch.cat(self._own_positions)

    @cached_property
    def _own_positions(self) -> list[Tensor]:
        device = self.cache.device
        return [segment.positions(device) for segment in self.segments]

    @cached_property
    def _masks(self) -> list[dict[int | None, Tensor | None]]:
        windows = set(self.cache.config.windows)
        return [
            {window: _mask(segment, positions, window=window) for window in windows}
            for segment, positions in zip(self.segments, self._own_positions, strict=True)
        ]

    def attend(self, layer_id: int, query: Tensor, *, key: Tensor, value: Tensor) -> Tensor:
        """Attend from query [R, H, E] with new key and value [R, G, E]; returns [R, H * E]."""
        outputs, row = [], 0
        for segment, masks in zip(self.segments, self._masks, strict=True):
            rows = slice(row, row + segment.num_rows)
            outputs.append(self._attend_segment(layer_id, segment, query=query[rows], key=key[rows],
                                                value=value[rows], masks=masks))  # fmt: skip
            row = rows.stop
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs)

    def _attend_segment(self, layer_id: int, segment: Segment, *, query: Tensor, key: Tensor, value: Tensor,
                        masks: dict[int | None, Tensor | None]) -> Tensor:  # fmt: skip
        config = self.cache.config
        start, stop = segment.base + segment.first_node, segment.stop
        keys = self.cache.keys[layer_id][segment.sequence]
        values = self.cache.values[layer_id][segment.sequence]
        keys[:, start:stop] = key.transpose(0, 1)
        values[:, start:stop] = value.transpose(0, 1)
        out = reference.attention(
            query.transpose(0, 1)[None],
            key=keys[None, :, :stop],
            value=values[None, :, :stop],
            mask=masks[config.windows[layer_id]],
            scale=config.attention_scale,
            softcap=config.attention_softcap,
        )
        return out[0].transpose(0, 1).flatten(-2)


def _mask(segment: Segment, positions: Tensor, *, window: int | None) -> Tensor | None:
    """Additive mask [R, S] of a segment, or None where every row sees every slot."""
    device, stop = positions.device, segment.stop
    is_chain = segment.parents is None
    if is_chain and segment.num_rows == 1 and (window is None or stop <= window):
        return None
    if is_chain:
        slot_positions = torch.arange(stop, device=device)
    else:
        nodes = torch.tensor([segment.base + depth for depth in segment.depths()], device=device)
        slot_positions = torch.cat([torch.arange(segment.base, device=device), nodes])
    mask = causal_mask(positions[:, None] - slot_positions, window=window)
    if not is_chain:
        mask[:, segment.base :].masked_fill_(~segment.visibility().to(device), float("-inf"))
    return mask


def causal_mask(offsets: Tensor, *, window: int | None) -> Tensor:
    """Additive float32 mask: 0 where the key is at most window - 1 positions back and not ahead, else -inf.

    offsets: the row's position minus the key's, any shape.
    """
    hidden = offsets < 0
    if window is not None:
        hidden |= offsets >= window
    return torch.zeros(offsets.shape, device=offsets.device).masked_fill_(hidden, float("-inf"))
