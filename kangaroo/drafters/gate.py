"""The target-confidence gate: where the target itself was unsure, the next tokens are decoded plainly.

A low-confidence choice of the target announces text that no drafter guesses well; until confidence returns, drafting
would be wasted.
"""

from collections.abc import Sequence as SequenceOf

import torch

from kangaroo.drafters.base import Batch, Drafter, Sequence
from kangaroo.errors import SettingsError
from kangaroo.model.transformer import Transformer
from kangaroo.types import Draft, Outcome


class GatedDrafter:
    """Any drafter, asked only for sequences whose last token the target chose with confidence.

    The confidence is the target's raw top-1 probability at temperature 1 behind the last accepted node.
    """

    def __init__(self, target: Transformer, drafter: Drafter, *, threshold: float) -> None:
        """Raises SettingsError where threshold is outside [0, 1]."""
        if not 0 <= threshold <= 1:
            raise SettingsError(f"the gate's threshold must be in [0, 1], got {threshold}")
        self.name = drafter.name
        self._target = target
        self._drafter = drafter
        self._threshold = threshold
        self._closed: set[Sequence] = set()

    @property
    def taps(self) -> tuple[int, ...]:
        """The drafter's, and what enters the head."""
        return tuple(sorted({*self._drafter.taps, self._target.num_layers}))

    def begin(self, sequences: SequenceOf[Sequence], *, num_slots: int) -> None:
        """Make room in the drafter."""
        self._drafter.begin(sequences, num_slots=num_slots)

    def draft(self, batch: Batch) -> Draft:
        """The drafter's guesses, none where the gate is closed."""
        for sequence in batch.sequences:
            if sequence in self._closed:
                sequence.max_draft = 0
        return self._drafter.draft(batch)

    def accept(self, sequences: SequenceOf[Sequence], outcome: Outcome) -> None:
        """Open or close the gate of every sequence that emitted tokens."""
        fresh = [row for row, tokens in enumerate(outcome.tokens) if tokens]
        if fresh:
            states = torch.cat([outcome.taps[row][self._target.num_layers][-1:] for row in fresh])
            _, confidence = self._target.guess(states, self._target.final_norm)
            for row, value in zip(fresh, confidence.tolist(), strict=True):
                (self._closed.add if value < self._threshold else self._closed.discard)(sequences[row])
        self._drafter.accept(sequences, outcome)

    def end(self, sequences: SequenceOf[Sequence]) -> None:
        """Forget these sequences."""
        self._closed.difference_update(sequences)
        self._drafter.end(sequences)
