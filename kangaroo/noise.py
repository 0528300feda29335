"""Counter-based noise: random bits and Gumbel variables as pure functions of (seed, position, token id).

Shapes: K token ids.
"""

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

# Constants of the splitmix64 finaliser (Steele, Lea, Flood 2014).
GOLDEN, _MIX_1, _MIX_2 = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB


def bound_hash(to_beat: float, bound: float) -> np.uint64:
    """A hash below all those with whose noise a score of at most `bound` reaches `to_beat`."""
    # The slack covers the rounding of float32 sums and noise; no noise is below -5.
    noise = max(to_beat - bound - 1e-6 * (abs(to_beat) + abs(bound)) - 1e-4, -5.0)
    uniform = math.exp(-math.exp(-noise))
    return np.uint64(max(int(uniform * 2**52) - 2, 0) << 12)


def hash_tokens(token_ids: NDArray[Any], *, seed: int, position: int) -> NDArray[Any]:
    """64 random bits [K] for token ids [K]."""
    key = mix(mix(seed) + position)
    state = token_ids.astype(np.uint64)
    state *= np.uint64(GOLDEN)
    state += np.uint64((key * GOLDEN + _MIX_2) % 2**64)
    state ^= state >> np.uint64(30)
    state *= np.uint64(_MIX_1)
    state ^= state >> np.uint64(27)
    state *= np.uint64(_MIX_2)
    state ^= state >> np.uint64(31)
    return state


def mix(state: int) -> int:
    """A hash of 64 bits, which hash_tokens applies to arrays."""
    return finalize((state * GOLDEN + _MIX_2) % 2**64)


def finalize(state: int) -> int:
    """The finaliser of splitmix64, which spreads every bit of a 64-bit state over all others."""
    state = (state ^ state >> 30) * _MIX_1 % 2**64
    state = (state ^ state >> 27) * _MIX_2 % 2**64
    return state ^ state >> 31


def gumbel(hashes: NDArray[Any]) -> NDArray[Any]:
    """Standard Gumbel noise [K] float32 from 64 random bits [K] each, never falling where the hash rises."""
    # 52 random bits, centred so that neither 0 nor 1 occurs; a 53rd would round the largest value up to 1.
    uniform = ((hashes >> np.uint64(12)).astype(np.float64) + 0.5) * 2.0**-52
    noise: NDArray[Any] = -np.log(-np.log(uniform)).astype(np.float32)
    return noise
