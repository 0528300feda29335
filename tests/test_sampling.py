"""The target's choice is a pure function of (logits row, position, seed), and Gumbel-max draws from the softmax."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kangaroo import sampling
from kangaroo.sampling import choose, gumbel_noise
from kangaroo.types import SamplingParams

EXTREMES = [0, 1, 2**31, 2**32 + 1, 2**62, 2**63 - 1]


def sampled(logits: torch.Tensor, positions: torch.Tensor, *, seed: int = 0, temperature: float = 1.0) -> torch.Tensor:
    params = [SamplingParams(temperature=temperature, seed=seed)]
    return choose(logits, positions, params=params, num_rows=[len(logits)])


@pytest.mark.parametrize("vocab_size", [4, 300, 151_936])
def test_greedy_choice_between_equal_logits_is_the_lowest_id(vocab_size: int) -> None:
    logits = torch.zeros(3, vocab_size)
    logits[1, [vocab_size // 2, vocab_size - 1]] = 5.0
    logits[2, vocab_size - 1] = 5.0
    picks = choose(logits, torch.arange(3), params=[SamplingParams()], num_rows=[3])
    assert picks.tolist() == [0, vocab_size // 2, vocab_size - 1]


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_row_chosen_alone_is_the_row_chosen_in_any_batch(data: st.DataObject) -> None:
    num_rows = data.draw(st.lists(st.integers(1, 4), min_size=1, max_size=4))
    vocab_size = data.draw(st.sampled_from([1, 3, 17, 258, 1001]))
    params = [
        SamplingParams(temperature=data.draw(st.sampled_from([0.0, 0.3, 0.8, 2.0])), seed=data.draw(st.integers(0, 99)))
        for _ in num_rows
    ]
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**32)))
    # Few distinct values, so that greedy ties occur.
    logits = torch.randint(-3, 4, (sum(num_rows), vocab_size), generator=generator).float()
    positions = torch.randint(0, 5000, (sum(num_rows),), generator=generator)
    together = choose(logits, positions, params=params, num_rows=num_rows).tolist()
    owners = [one for one, count in zip(params, num_rows, strict=True) for _ in range(count)]
    alone = [
        choose(logits[row : row + 1], positions[row : row + 1], params=[owner], num_rows=[1]).item()
        for row, owner in enumerate(owners)
    ]
    assert together == alone


@given(seed=st.integers(0, 2**63 - 1), position=st.integers(0, 2**40), vocab_size=st.integers(2, 70))
@settings(max_examples=60, deadline=None)
def test_noise_of_a_token_does_not_depend_on_rows_beside_it_or_on_the_vocabulary(
    seed: int, position: int, vocab_size: int
) -> None:
    beside = torch.tensor([3, position, position + 1, 12])
    noise = gumbel_noise(beside, vocab_size, seed=seed)
    assert torch.equal(noise[1], gumbel_noise(beside[1:2], vocab_size, seed=seed)[0])
    assert torch.equal(noise[1, : vocab_size - 1], gumbel_noise(beside[1:2], vocab_size - 1, seed=seed)[0])


def test_seed_and_position_both_change_what_is_drawn() -> None:
    logits, positions = torch.zeros(64, 50), torch.arange(64)
    first = sampled(logits, positions, seed=1)
    assert torch.equal(first, sampled(logits, positions, seed=1))
    assert (first != sampled(logits, positions, seed=2)).float().mean() > 0.9
    assert (first != sampled(logits, positions + 64, seed=1)).float().mean() > 0.9


def test_mixed_batch_leaves_greedy_rows_without_noise() -> None:
    logits = torch.randn(40, 30, generator=torch.Generator().manual_seed(0))
    params = [SamplingParams(), SamplingParams(temperature=3.0, seed=4)]
    picks = choose(logits, torch.arange(40), params=params, num_rows=[20, 20])
    greedy = logits.argmax(-1)
    assert torch.equal(picks[:20], greedy[:20])
    assert not torch.equal(picks[20:], greedy[20:])


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_draws_over_positions_follow_the_softmax(temperature: float) -> None:
    num_draws, logits = 20_000, torch.tensor([1.5, 0.0, -1.0, 0.7, -2.0, 0.2])
    picks = sampled(logits.expand(num_draws, -1), torch.arange(num_draws), seed=7, temperature=temperature)
    expected = num_draws * torch.softmax(logits / temperature, dim=0)
    statistic = ((picks.bincount(minlength=6) - expected) ** 2 / expected).sum().item()
    assert statistic < 20.515  # chi-square with 5 degrees of freedom, p = 0.001


def test_draws_over_seeds_follow_the_softmax() -> None:
    num_draws, logits = 4_000, torch.tensor([1.0, 0.0, -1.0])
    noise = torch.cat([gumbel_noise(torch.tensor([17]), 3, seed=seed) for seed in range(num_draws)])
    expected = num_draws * torch.softmax(logits, dim=0)
    statistic = (((logits + noise).argmax(-1).bincount(minlength=3) - expected) ** 2 / expected).sum().item()
    assert statistic < 13.816  # chi-square with 2 degrees of freedom, p = 0.001


@pytest.mark.parametrize("seed", EXTREMES)
def test_noise_is_finite_at_extreme_seeds_and_positions(seed: int) -> None:
    noise = gumbel_noise(torch.tensor(EXTREMES), 1000, seed=seed)
    assert noise.dtype == torch.float32
    assert noise.isfinite().all()
    assert noise.unique().numel() > 0.99 * noise.numel()


@pytest.mark.parametrize("bits", [0, -1, -(2**63), 2**63 - 1])
def test_noise_is_finite_whatever_bits_the_counter_gives(monkeypatch: pytest.MonkeyPatch, bits: int) -> None:
    monkeypatch.setattr(sampling, "_mix", lambda state: torch.full_like(state, bits))
    assert gumbel_noise(torch.tensor([0]), 3, seed=0).isfinite().all()


def test_noise_has_the_mean_and_spread_of_a_gumbel_variable() -> None:
    noise = gumbel_noise(torch.arange(200), 1000, seed=3).double()
    assert noise.mean().item() == pytest.approx(0.57722, abs=0.01)
    assert noise.var().item() == pytest.approx(math.pi**2 / 6, rel=0.02)


@pytest.mark.parametrize("seed", [0, 1, 41, 2**62])
def test_noise_of_neighbouring_seeds_and_positions_is_unrelated(seed: int) -> None:
    noise = {(s, p): gumbel_noise(torch.tensor([p]), 20_000, seed=seed + s)[0].double() for s in (0, 1) for p in (5, 6)}
    pairs = [((0, 5), (0, 6)), ((0, 5), (1, 5)), ((0, 6), (1, 5)), ((0, 5), (1, 6))]
    for first, second in pairs:
        correlation = torch.corrcoef(torch.stack([noise[first], noise[second]]))[0, 1].item()
        assert abs(correlation) < 0.03, (first, second)
    # Shifted by one token id they must be unrelated too.
    shifted = torch.corrcoef(torch.stack([noise[0, 5][1:], noise[0, 6][:-1]]))[0, 1].item()
    assert abs(shifted) < 0.03
