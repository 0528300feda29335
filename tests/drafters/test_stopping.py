"""When drafting ends."""

import math

import pytest
import torch

from kangaroo.drafters.stopping import ConfidenceThreshold, FixedLength
from kangaroo.errors import SettingsError


def test_fixed_length_never_stops_early_and_never_reads_confidence() -> None:
    policy = FixedLength(4)
    assert policy.max_length == 4
    assert not policy.reads_confidence
    assert policy.stops(torch.zeros(2)) == [False, False]


def test_threshold_stops_strictly_below_eta() -> None:
    policy = ConfidenceThreshold(4, 0.5)
    assert policy.reads_confidence
    assert policy.stops(torch.tensor([0.49, 0.5, 0.51])) == [True, False, False]


def test_eta_zero_never_stops_and_eta_one_stops_below_certainty() -> None:
    assert ConfidenceThreshold(4, 0.0).stops(torch.tensor([0.0, 1.0])) == [False, False]
    assert ConfidenceThreshold(4, 1.0).stops(torch.tensor([0.999, 1.0])) == [True, False]


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
