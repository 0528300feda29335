"""When drafting ends."""

import math

import pytest

from kangaroo.drafters.stopping import ConfidenceThreshold, FixedLength, StoppingPolicy
from kangaroo.errors import SettingsError


def test_fixed_length_never_stops_early() -> None:
    policy: StoppingPolicy = FixedLength(4)
    assert (policy.max_length, policy.threshold) == (4, 0.0)


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_threshold_is_eta(eta: float) -> None:
    policy: StoppingPolicy = ConfidenceThreshold(4, eta)
    assert (policy.max_length, policy.threshold) == (4, eta)


def test_policies_that_learn_nothing_stay_as_they_are() -> None:
    for policy in (FixedLength(4), ConfidenceThreshold(4, 0.5)):
        before = policy.max_length, policy.threshold
        policy.observe(4, 0)
        assert (policy.max_length, policy.threshold) == before


@pytest.mark.parametrize("gamma", [0, -3])
def test_draft_length_below_one_is_refused(gamma: int) -> None:
    with pytest.raises(SettingsError, match=f"gamma must be at least 1, got {gamma}"):
        FixedLength(gamma)
    with pytest.raises(SettingsError, match=f"gamma must be at least 1, got {gamma}"):
        ConfidenceThreshold(gamma, 0.5)


@pytest.mark.parametrize("eta", [-0.1, 1.1, math.nan])
def test_eta_outside_its_range_is_refused(eta: float) -> None:
    with pytest.raises(SettingsError, match=r"eta must be in \[0, 1\]"):
        ConfidenceThreshold(4, eta)
