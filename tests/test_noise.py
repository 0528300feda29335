"""Noise is a pure function of (seed, position, token id), Gumbel distributed and unrelated from one to the next."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kangaroo.noise import bound_hash, gumbel, hash_tokens
from kangaroo.sampling import gumbel_noise

EXTREMES = [0, 1, 2**31, 2**32 + 1, 2**62, 2**63 - 1]


def test_hash_of_a_seed_stays_what_it_was_so_that_old_texts_can_be_repeated() -> None:
    assert hash_tokens(np.array([0, 151_935]), seed=7, position=40).tolist() == [
        15771717711183475493,
        13303948148480268751,
    ]


@given(seed=st.integers(0, 2**63 - 1), position=st.integers(0, 2**40), data=st.data())
@settings(max_examples=60, deadline=None)
def test_noise_of_a_token_does_not_depend_on_the_tokens_beside_it(
    seed: int, position: int, data: st.DataObject
) -> None:
    token_ids = torch.tensor(data.draw(st.lists(st.integers(0, 2000), min_size=1, max_size=70)))
    noise = gumbel_noise(position, token_ids, seed=seed)
    assert torch.equal(noise, gumbel_noise(position, torch.arange(2001), seed=seed)[token_ids])
    assert torch.equal(noise[-1:], gumbel_noise(position, token_ids[-1:], seed=seed))


@pytest.mark.parametrize("seed", EXTREMES)
def test_noise_is_finite_at_extreme_seeds_and_positions(seed: int) -> None:
    noise = torch.stack([gumbel_noise(position, torch.arange(1000), seed=seed) for position in EXTREMES])
    assert noise.dtype == torch.float32
    assert noise.isfinite().all()
    assert noise.unique().numel() > 0.99 * noise.numel()


def test_noise_is_finite_and_rises_with_the_hash_whatever_bits_the_counter_gives() -> None:
    hashes = np.array([0, 1, 2**11, 2**40, 2**63 - 1, 2**63, 2**64 - 2**40, 2**64 - 1], dtype=np.uint64)
    noise = gumbel(hashes)
    assert np.isfinite(noise).all()
    assert (np.diff(noise) >= 0).all()


@given(
    to_beat=st.floats(-1e6, 1e6, width=32),
    distance=st.floats(-10, 45),
    bits=st.integers(0, 2**64 - 1),
    from_edge=st.integers(1, 2**30),
)
@settings(max_examples=300, deadline=None)
def test_no_hash_below_the_bound_reaches_the_score_to_beat(
    to_beat: float, distance: float, bits: int, from_edge: int
) -> None:
    bound = np.float32(to_beat - distance)
    edge = int(bound_hash(to_beat, float(bound)))
    below = np.array([max(edge - from_edge, 0), bits % max(edge, 1)], dtype=np.uint64)
    assert edge == 0 or (bound + gumbel(below) < to_beat).all()


@pytest.mark.parametrize("distance", [0.0, 5.0, 12.0])
def test_bound_lets_few_hashes_through_that_do_not_reach_the_score(distance: float) -> None:
    hashes = hash_tokens(np.arange(1_000_000), seed=1, position=1)
    num_through = np.count_nonzero(hashes >= bound_hash(20.0, 20.0 - distance))
    num_reaching = np.count_nonzero(np.float32(20.0 - distance) + gumbel(hashes) >= 20.0)
    assert num_reaching <= num_through <= 1.001 * num_reaching + 3


def test_noise_has_the_mean_and_spread_of_a_gumbel_variable() -> None:
    noise = torch.stack([gumbel_noise(position, torch.arange(1000), seed=3) for position in range(200)]).double()
    assert noise.mean().item() == pytest.approx(0.57722, abs=0.01)
    assert noise.var().item() == pytest.approx(math.pi**2 / 6, rel=0.02)


@pytest.mark.parametrize("seed", [0, 1, 41, 2**62])
def test_noise_of_neighbouring_seeds_and_positions_is_unrelated(seed: int) -> None:
    token_ids = torch.arange(20_000)
    noise = {(s, p): gumbel_noise(p, token_ids, seed=seed + s).double() for s in (0, 1) for p in (5, 6)}
    pairs = [((0, 5), (0, 6)), ((0, 5), (1, 5)), ((0, 6), (1, 5)), ((0, 5), (1, 6))]
    for first, second in pairs:
        correlation = torch.corrcoef(torch.stack([noise[first], noise[second]]))[0, 1].item()
        assert abs(correlation) < 0.03, (first, second)
    # Shifted by one token id they must be unrelated too.
    shifted = torch.corrcoef(torch.stack([noise[0, 5][1:], noise[0, 6][:-1]]))[0, 1].item()
    assert abs(shifted) < 0.03
