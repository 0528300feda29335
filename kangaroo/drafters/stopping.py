"""When to stop drafting and verify."""

from dataclasses import dataclass
from typing import Protocol

from kangaroo.errors import SettingsError


class StoppingPolicy(Protocol):
    """How far to draft: at most max_length (gamma) tokens deep, and not behind one of less confidence than threshold.

    The token of low confidence is itself still verified. At threshold 0 no confidence is looked at, and the host
    never waits for one.
    """

    @property
    def max_length(self) -> int: ...

    @property
    def threshold(self) -> float: ...

    def observe(self, num_drafted: int, num_accepted: int) -> None:
        """Learn how much of a draft was accepted."""
        ...


@dataclass(frozen=True)
class FixedLength:
    """Always draft max_length (gamma) tokens."""

    max_length: int
    threshold = 0.0

    def __post_init__(self) -> None:
        _check_length(self.max_length)

    def observe(self, num_drafted: int, num_accepted: int) -> None:
        """Nothing to learn."""


@dataclass(frozen=True)
class ConfidenceThreshold:
    """Stop behind the first token whose confidence is below eta; it is still verified (Kangaroo, section 3.3)."""

    max_length: int
    eta: float

    def __post_init__(self) -> None:
        _check_length(self.max_length)
        if not 0 <= self.eta <= 1:
            raise SettingsError(f"eta must be in [0, 1], got {self.eta}")

    @property
    def threshold(self) -> float:
        """eta."""
        return self.eta

    def observe(self, num_drafted: int, num_accepted: int) -> None:
        """Nothing to learn."""


def _check_length(gamma: int) -> None:
    if gamma < 1:
        raise SettingsError(f"gamma must be at least 1, got {gamma}")
