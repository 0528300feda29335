"""How deep drafts were, for the stopping rules that learn from what became of them."""

from collections.abc import Sequence as SequenceOf

from kangaroo.drafters.base import Sequence
from kangaroo.drafters.stopping import StoppingPolicy
from kangaroo.types import Outcome


class DraftDepths:
    """The depths of the last drafts, until these have been verified and the stopping rule hears of it."""

    def __init__(self, stopping: StoppingPolicy) -> None:
        self._stopping = stopping
        self._depths: dict[Sequence, int] = {}

    def note(self, sequence: Sequence, depth: int) -> None:
        """A draft was made, of a root alone where depth is 0."""
        if depth:
            self._depths[sequence] = depth

    def settle(self, sequences: SequenceOf[Sequence], outcome: Outcome) -> None:
        """Tell the stopping rule how much of the last drafts was accepted."""
        for sequence, path in zip(sequences, outcome.paths, strict=True):
            depth = self._depths.pop(sequence, 0)
            if depth:
                self._stopping.observe(depth, len(path) - 1)

    def forget(self, sequences: SequenceOf[Sequence]) -> None:
        """These sequences have ended."""
        for sequence in sequences:
            self._depths.pop(sequence, None)
