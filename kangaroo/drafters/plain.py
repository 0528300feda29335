"""Plain decoding: the drafter that drafts nothing."""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf

from kangaroo.drafters.base import Batch, Sequence, draft_roots
from kangaroo.types import Draft, Outcome


def build(model: object, settings: object) -> PlainDrafter:
    """The drafter, which needs neither."""
    return PlainDrafter()


class PlainDrafter:
    """Proposes only the roots, so that every step emits the target's one token."""

    name = "plain"
    taps: tuple[int, ...] = ()

    def begin(self, sequences: SequenceOf[Sequence], *, num_slots: int) -> None:
        """Nothing to prepare."""

    def draft(self, batch: Batch) -> Draft:
        """The roots alone."""
        return draft_roots(batch)

    def accept(self, sequences: SequenceOf[Sequence], outcome: Outcome) -> None:
        """Nothing to learn."""

    def end(self, sequences: SequenceOf[Sequence]) -> None:
        """Nothing to free."""
