"""When to stop drafting and verify."""

from dataclasses import dataclass, field, fields
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


@dataclass(frozen=True)
class AdaptiveSettings:
    """How a confidence threshold follows the acceptance rate (AdaptiveThreshold), in the place of a fixed eta.

    It starts at initial_threshold, and rises while at most the share alpha of a draft is accepted, else falls, by a
    part of epsilon; beta1 and beta2 are the weights of the rate and of the threshold so far. The defaults are those of
    Draft & Verify's repository. Raises SettingsError for values outside [0, 1].
    """

    alpha: float = 0.9
    beta1: float = 0.5
    beta2: float = 0.9
    epsilon: float = 0.01
    initial_threshold: float = 0.8

    def __post_init__(self) -> None:
        for one in fields(self):
            value = getattr(self, one.name)
            if not 0 <= value <= 1:
                raise SettingsError(f"{one.name} must be in [0, 1], got {value}")


@dataclass(eq=False)
class AdaptiveThreshold:
    """Stop below a threshold that follows the acceptance rate (Draft & Verify, arXiv 2309.08168).

    Its section "Adaptive Draft-Exiting Mechanism", after each verification, which accepted the share AR_e of a draft:
    AR <- beta1 * AR + (1 - beta1) * AR_e; the threshold is to go up by epsilon if AR <= alpha, else down by epsilon,
    and goes 1 - beta2 of that way. AR starts at 0. The paper's repository, unlike the rule, also holds the threshold
    where a draft of max_length was accepted well.
    The threshold is kept within [0, 1]: beyond, it would mean the same and take long to return.
    One object may serve all sequences of a drafter, which then learn together.
    """

    max_length: int
    settings: AdaptiveSettings = field(default_factory=AdaptiveSettings)

    def __post_init__(self) -> None:
        _check_length(self.max_length)
        self.acceptance_rate, self._threshold = 0.0, self.settings.initial_threshold

    @property
    def threshold(self) -> float:
        """The threshold now."""
        return self._threshold

    def observe(self, num_drafted: int, num_accepted: int) -> None:
        """Update the acceptance rate, then the threshold; num_drafted is at least 1."""
        own = self.settings
        self.acceptance_rate = own.beta1 * self.acceptance_rate + (1 - own.beta1) * num_accepted / num_drafted
        step = own.epsilon if self.acceptance_rate <= own.alpha else -own.epsilon
        moved = own.beta2 * self._threshold + (1 - own.beta2) * (self._threshold + step)
        self._threshold = min(max(moved, 0.0), 1.0)


def choose_stopping(gamma: int, eta: float | AdaptiveSettings) -> StoppingPolicy:
    """The policy of drafts at most gamma tokens deep that stop below confidence eta, which 0 never does, or adapt it.

    Raises SettingsError where one is out of range.
    """
    if isinstance(eta, AdaptiveSettings):
        return AdaptiveThreshold(gamma, eta)
    policy = ConfidenceThreshold(gamma, eta)
    return FixedLength(gamma) if policy.eta == 0 else policy


def _check_length(gamma: int) -> None:
    if gamma < 1:
        raise SettingsError(f"gamma must be at least 1, got {gamma}")
