"""Plain decoding: the drafter that drafts nothing."""

from collections.abc import Sequence as SequenceOf

import torch

from kangaroo.drafters.base import Batch, Sequence, chain_draft
from kangaroo.types import Draft, Outcome


class PlainDrafter:
    """Proposes only the root, so that every step emits the target's one token."""

    name = "plain"
    taps: tuple[int, ...] = ()

    def begin(self, sequences: SequenceOf[Sequence], *, num_slots: int) -> None:
        """Nothing to prepare."""

    def draft(self, batch: Batch) -> Draft:
        """The roots alone."""
        roots = [sequence.tokens[-1] for sequence in batch.sequences]
        return chain_draft(torch.tensor(roots, device=batch.target.device), [])

    def accept(self, sequences: SequenceOf[Sequence], outcome: Outcome) -> None:
        """Nothing to learn."""

    def end(self, sequences: SequenceOf[Sequence]) -> None:
        """Nothing to free."""
