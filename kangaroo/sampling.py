"""The target's choice as a pure function of (logits row, position, seed): greedy, or Gumbel-max.

Shapes: R packed rows, V vocabulary.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from kangaroo.types import SamplingParams

# Constants of the splitmix64 finaliser (Steele, Lea, Flood 2014), as signed 64-bit integers.
_GOLDEN = 0x9E3779B97F4A7C15 - 2**64
_MIX_1 = 0xBF58476D1CE4E5B9 - 2**64
_MIX_2 = 0x94D049BB133111EB - 2**64


def choose(logits: Tensor, positions: Tensor, *, params: Sequence[SamplingParams], num_rows: Sequence[int]) -> Tensor:
    """Pick the token that plain decoding emits after each row.

    logits: [R, V] float32; positions: [R] int64, the place in the text of the token each row stands on.
    params: one per sequence; num_rows: how many consecutive rows belong to each, summing to R.
    Returns [R] int64. Temperature 0 takes the largest logit, the lowest id winning ties; otherwise the
    largest of logits + temperature * gumbel noise, a draw from the softmax of logits / temperature (Gumbel-max).
    """
    if all(one.temperature == 0 for one in params):
        return logits.argmax(dim=-1)
    picks, row = [], 0
    for one, count in zip(params, num_rows, strict=True):
        rows = slice(row, row + count)
        scores = logits[rows]
        if one.temperature > 0:
            noise = gumbel_noise(positions[rows], logits.shape[-1], seed=one.seed)
            scores = scores + one.temperature * noise
        picks.append(scores.argmax(dim=-1))
        row = rows.stop
    return torch.cat(picks)


def gumbel_noise(positions: Tensor, vocab_size: int, *, seed: int) -> Tensor:
    """Standard Gumbel noise [R, V] float32 for positions [R]: a function of (seed, position, token id) alone."""
    token_ids = torch.arange(vocab_size, device=positions.device)
    row_keys = _mix(_mix(torch.full_like(positions, seed)) + positions)
    bits = _mix(row_keys[:, None] + token_ids)
    # 52 random bits, centred so that neither 0 nor 1 occurs; a 53rd would round the largest value up to 1.
    uniform = (_shift_right(bits, 12).double() + 0.5) * 2.0**-52
    return -torch.log(-torch.log(uniform)).float()


def _mix(state: Tensor) -> Tensor:
    """The splitmix64 output function on int64, which wraps around as unsigned arithmetic does."""
    state = state * _GOLDEN + _MIX_2
    state = (state ^ _shift_right(state, 30)) * _MIX_1
    state = (state ^ _shift_right(state, 27)) * _MIX_2
    return state ^ _shift_right(state, 31)


def _shift_right(value: Tensor, num_bits: int) -> Tensor:
    """Logical right shift of int64."""
    return (value >> num_bits) & ((1 << (64 - num_bits)) - 1)
