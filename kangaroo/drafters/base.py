"""What the engine and a drafter share: the batch, and the protocol every drafter follows."""

import functools
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field
from typing import Protocol

import torch

from kangaroo.model.cache import KVCache, Segment
from kangaroo.model.transformer import Transformer
from kangaroo.types import Draft, Outcome, Request


@dataclass(eq=False)
class Sequence:
    """A text being decoded: its committed tokens, whose last is the root of the next draft.

    slot is its row in the target's cache, which holds every committed token but the last;
    max_draft bounds the guesses worth making: what may still be emitted, less the bonus token.
    """

    request: Request
    slot: int
    tokens: list[int]
    max_draft: int = 0
    finish_reason: str | None = None
    origins: list[str] = field(default_factory=list)

    @property
    def num_new_tokens(self) -> int:
        return len(self.tokens) - len(self.request.prompt_ids)


@dataclass(frozen=True)
class Batch:
    """The sequences of one step, with the target and the cache that a self-drafting drafter shares."""

    target: Transformer
    cache: KVCache
    sequences: SequenceOf[Sequence]

    def segment(self, row: int, *, num_rows: int, offset: int = 0, parents: SequenceOf[int] = ()) -> Segment:
        """Rows of the row-th sequence, written offset slots after its cached tokens; a chain without parents."""
        slot = self.sequences[row].slot
        chain = not parents or list(parents) == list(range(-1, num_rows - 1))
        return Segment(slot, self.cache.lengths[slot] + offset, num_rows, None if chain else tuple(parents))


class Drafter(Protocol):
    """Guesses continuations; whatever it guesses, the text stays the target's own.

    taps are the layers whose entering states it needs: every target pass, prefill included, hands those of
    the committed tokens to accept().
    """

    name: str
    taps: tuple[int, ...]

    def begin(self, sequences: SequenceOf[Sequence], *, num_slots: int) -> None:
        """Make room for new sequences of at most num_slots tokens."""
        ...

    def draft(self, batch: Batch) -> Draft:
        """Guess at most max_draft tokens for every sequence of the batch, after its last committed token."""
        ...

    def accept(self, sequences: SequenceOf[Sequence], outcome: Outcome) -> None:
        """Learn which nodes of the last draft, or tokens of a prefill, were committed."""
        ...

    def end(self, sequences: SequenceOf[Sequence]) -> None:
        """Free what was held for these sequences."""
        ...


def chain_draft(root: torch.Tensor, guesses: SequenceOf[torch.Tensor]) -> Draft:
    """A draft without branches, equally long for every sequence: roots [B], then guesses [B] per level."""
    num_sequences, num_nodes = root.shape[0], 1 + len(guesses)
    parents, depths = chain_shape(num_sequences, num_nodes)
    tokens = torch.stack([root, *guesses], dim=1) if guesses else root[:, None]
    return Draft(tokens=tokens, parents=parents, depths=depths, num_nodes=(num_nodes,) * num_sequences)


@functools.cache
def chain_shape(num_sequences: int, num_nodes: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Parents and depths [B, N] of chains; made once, since every step needs them."""
    with torch.inference_mode(False):
        depths = torch.arange(num_nodes).repeat(num_sequences, 1)
        return depths - 1, depths
