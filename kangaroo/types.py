"""What goes in and what comes out: plain frozen records, no behaviour beyond arithmetic on themselves.

Shapes: B sequences, N draft nodes (padded to the longest draft), R packed nodes of all sequences, D hidden
size, K accepted nodes. Nodes of one sequence stand root first, every parent before its children.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from kangaroo.errors import SettingsError

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class SamplingParams:
    """How a request is decoded; temperature 0 is greedy.

    Raises SettingsError for values outside their range.
    """

    max_new_tokens: int = 128
    temperature: float = 0.0
    seed: int = 0
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise SettingsError(f"max_new_tokens must be at least 1, got {self.max_new_tokens}")
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise SettingsError(f"temperature must be 0 (greedy) or above, got {self.temperature}")
        if not 0 <= self.seed < 2**63:
            raise SettingsError(f"seed must be in 0..2**63-1, got {self.seed}")


@dataclass(frozen=True)
class Request:
    """One text to continue: its prompt's token ids and how to decode it."""

    prompt_ids: tuple[int, ...]
    params: SamplingParams
    eos_ids: frozenset[int] = frozenset()


@dataclass(frozen=True)
class Draft:
    """A tree of guesses per sequence; node 0 is the root, the last committed token.

    tokens, parents, depths: [B, N] int64, -1 padded; a root has parent -1 and depth 0. The tree's shape is the
    host's: parents and depths lie on the CPU, while tokens may still be under way on the device.
    hidden: [R, D], the nodes' states entering layer resume_layer, packed sequence by sequence; None where
    resume_layer is 0. confidence: [B, N] float32, the draft's raw top-1 probability that proposed each node,
    1 for roots; None where the drafter has none.
    num_nodes: nodes of every sequence, known to the host.
    """

    tokens: Tensor
    parents: Tensor
    depths: Tensor
    num_nodes: tuple[int, ...]
    resume_layer: int = 0
    hidden: Tensor | None = None
    confidence: Tensor | None = None


@dataclass(frozen=True)
class Outcome:
    """What one verification committed, per sequence.

    paths: accepted nodes, root first; tokens: the accepted drafts followed by the bonus token.
    taps: for every tapped layer the states [K, D] that enter it, of each sequence's accepted nodes.
    """

    paths: tuple[tuple[int, ...], ...]
    tokens: tuple[tuple[int, ...], ...]
    taps: tuple[dict[int, Tensor], ...]


@dataclass(frozen=True)
class Token:
    """One emitted token; origin is "draft" for an accepted guess, "bonus" for the target's own pick."""

    token_id: int
    text: str
    origin: str


@dataclass(frozen=True)
class Completion:
    """A finished text with its counts and times.

    token_ids holds the new tokens, a final EOS included. num_steps counts verification passes, without the
    prefill, which emits the first token. Times are in seconds; rates are None where the time is zero.
    """

    text: str
    token_ids: tuple[int, ...]
    num_prompt_tokens: int
    finish_reason: str
    prefill_time_s: float
    decode_time_s: float
    num_steps: int
    num_drafted: int
    num_accepted: int
    drafter: str
    model: str
    accepted_lengths: tuple[int, ...] = field(default=(), repr=False)

    @property
    def num_new_tokens(self) -> int:
        return len(self.token_ids)

    @property
    def tokens_per_s(self) -> float | None:
        """Decoded tokens per second; the first token belongs to the prefill."""
        return (self.num_new_tokens - 1) / self.decode_time_s if self.decode_time_s > 0 else None

    @property
    def tokens_per_step(self) -> float | None:
        return (self.num_new_tokens - 1) / self.num_steps if self.num_steps else None

    @property
    def acceptance_rate(self) -> float | None:
        return self.num_accepted / self.num_drafted if self.num_drafted else None

    def to_dict(self) -> dict[str, object]:
        """The public fields in the order of the command line's JSON."""
        names = ("text", "token_ids", "num_prompt_tokens", "num_new_tokens", "finish_reason", "prefill_time_s",
                 "decode_time_s", "tokens_per_s", "num_steps", "tokens_per_step", "num_drafted", "num_accepted",
                 "acceptance_rate", "drafter", "model")  # fmt: skip
        return {name: getattr(self, name) for name in names} | {"token_ids": list(self.token_ids)}
