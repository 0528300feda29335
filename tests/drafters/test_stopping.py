"""When drafting ends."""

import math

import pytest

from kangaroo.drafters.stopping import (
    AdaptiveSettings,
    AdaptiveThreshold,
    ConfidenceThreshold,
    FixedLength,
    StoppingPolicy,
    choose_stopping,
)
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


def test_adaptive_threshold_follows_the_papers_rule_step_by_step() -> None:
    policy = AdaptiveThreshold(8, AdaptiveSettings(alpha=0.6, beta1=0.5, beta2=0.9, epsilon=0.1, initial_threshold=0.5))
    assert (policy.max_length, policy.threshold) == (8, 0.5)
    # AR: 0.5 * 0 + 0.5 * 1, then 0.5 * 0.5 + 0.5 * 1, then 0.5 * 0.75 + 0.5 * 0.25; 0.5 is not above alpha.
    expected = [(4, 4, 0.5, 0.51), (2, 2, 0.75, 0.50), (4, 1, 0.5, 0.51), (5, 0, 0.25, 0.52)]
    for num_drafted, num_accepted, rate, threshold in expected:
        policy.observe(num_drafted, num_accepted)
        assert policy.acceptance_rate == pytest.approx(rate)
        assert policy.threshold == pytest.approx(threshold)


def test_adaptive_threshold_rises_where_the_acceptance_rate_is_just_the_target() -> None:
    policy = AdaptiveThreshold(
        4, AdaptiveSettings(alpha=0.5, beta1=0.0, beta2=0.0, epsilon=0.25, initial_threshold=0.5)
    )
    policy.observe(4, 2)
    assert policy.threshold == 0.75
    policy.observe(4, 3)
    assert policy.threshold == 0.5


def test_eta_says_which_policy_stops_drafts() -> None:
    assert choose_stopping(5, 0.0) == FixedLength(5)
    assert choose_stopping(5, 0.3) == ConfidenceThreshold(5, 0.3)
    settings = {"alpha": 0.7, "beta1": 0.1, "beta2": 0.2, "epsilon": 0.3, "initial_threshold": 0.4}
    adaptive = choose_stopping(5, AdaptiveSettings(**settings))
    assert isinstance(adaptive, AdaptiveThreshold)
    assert vars(adaptive) == vars(AdaptiveThreshold(5, AdaptiveSettings(**settings)))
    assert vars(choose_stopping(5, AdaptiveSettings())) == vars(AdaptiveThreshold(5))


def test_adaptive_threshold_stays_within_probabilities() -> None:
    policy = AdaptiveThreshold(4, AdaptiveSettings(alpha=0.5, beta1=0.0, beta2=0.0, epsilon=0.4))
    seen = [(policy.observe(4, 0), policy.threshold)[1] for _ in range(3)]
    assert seen == [1.0, 1.0, 1.0]
    assert [(policy.observe(4, 4), policy.threshold)[1] for _ in range(4)][-2:] == [0.0, 0.0]


@pytest.mark.parametrize("name", ["alpha", "beta1", "beta2", "epsilon", "initial_threshold"])
@pytest.mark.parametrize("value", [-0.1, 1.1, math.nan])
def test_adaptive_settings_outside_their_range_are_refused(name: str, value: float) -> None:
    with pytest.raises(SettingsError, match=rf"{name} must be in \[0, 1\]"):
        AdaptiveSettings(**{name: value})
    with pytest.raises(SettingsError, match="gamma must be at least 1"):
        AdaptiveThreshold(0)
