"""When to stop drafting and verify.

Shapes: B sequences.
"""

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from kangaroo.errors import SettingsError


class StoppingPolicy(Protocol):
    """Decides after each drafted token whether another one is worth drafting.

    max_length is the maximum draft length gamma; a policy that ignores confidence never makes the host wait.
    """

    @property
    def max_length(self) -> int: ...

    @property
    def reads_confidence(self) -> bool: ...

    @property
    def threshold(self) -> float | None:
        """Where drafting ends behind a confidence below one fixed number: that number; else None."""
        ...

    def stops(self, confidence: Tensor) -> list[bool]:
        """Whether drafting ends behind a token of this confidence [B], the raw top-1 probability."""
        ...


@dataclass(frozen=True)
class FixedLength:
    """Always draft max_length (gamma) tokens."""

    max_length: int
    reads_confidence = False
    threshold = 0.0

    def __post_init__(self) -> None:
        _check_length(self.max_length)

    def stops(self, confidence: Tensor) -> list[bool]:
        """Never."""
        return [False] * len(confidence)


@dataclass(frozen=True)
class ConfidenceThreshold:
    """Stop behind the first token whose confidence is below eta; it is still verified (Kangaroo, section 3.3)."""

    max_length: int
    eta: float
    reads_confidence = True

    def __post_init__(self) -> None:
        _check_length(self.max_length)
        if not 0 <= self.eta <= 1:
            raise SettingsError(f"eta must be in [0, 1], got {self.eta}")

    @property
    def threshold(self) -> float:
        """eta."""
        return self.eta

    def stops(self, confidence: Tensor) -> list[bool]:
        """Where confidence [B] < eta; the one read of the device per drafted token."""
        return [value < self.eta for value in confidence.tolist()]


def _check_length(gamma: int) -> None:
    if gamma < 1:
        raise SettingsError(f"gamma must be at least 1, got {gamma}")
