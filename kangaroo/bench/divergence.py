"""Where two texts of one prompt part, and whether rounding explains it.

Shapes: T positions, V vocabulary.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kangaroo.model.cache import CachedPass, Segment
from kangaroo.model.transformer import Transformer


@dataclass(frozen=True)
class Divergence:
    """The first new token on which two texts differ.

    candidates: the two token ids, None where a text had ended; margin: how far apart the target's two best logits
    are there; near_tie: whether that is under 8 float32 ulps of the larger logit times sqrt(D).
    """

    position: int
    candidates: tuple[int | None, int | None]
    margin: float
    near_tie: bool


def find_divergence(
    target: Transformer, prompt_ids: Sequence[int], *, first: Sequence[int], second: Sequence[int]
) -> Divergence | None:
    """Compare two continuations of a prompt; None where they are equal."""
    if tuple(first) == tuple(second):
        return None
    position = shared_length(first, second)
    with torch.inference_mode():
        states, _ = run_full_pass(target, [*prompt_ids, *first[:position]])
        top = target.logits(states[-1:])[0].topk(2).values
    margin = float(top[0] - top[1])
    one, other = (text[position] if position < len(text) else None for text in (first, second))
    return Divergence(position, (one, other), margin,
                      margin < near_tie_bound(top, target.config.hidden_size))  # fmt: skip


def near_tie_bound(best: Tensor, hidden_size: int) -> float:
    """How far apart the two best scores [2] may be for a near-tie: under 8 ulps of the larger times sqrt(D)."""
    larger = best.abs().max()
    ulp = float(torch.nextafter(larger, torch.full_like(larger, math.inf)) - larger)
    return 8 * ulp * math.sqrt(hidden_size)


def shared_length(first: Sequence[int], second: Sequence[int]) -> int:
    """How many leading tokens two texts share."""
    pairs = enumerate(zip(first, second, strict=False))
    return next((index for index, (one, other) in pairs if one != other), min(len(first), len(second)))


def run_full_pass(
    target: Transformer, token_ids: Sequence[int], *, taps: Sequence[int] = ()
) -> tuple[Tensor, dict[int, Tensor]]:
    """Last states [T, D] of a whole text, for target.logits(), in one pass; tapped states [T, D]."""
    attention = CachedPass(target.new_cache(1, len(token_ids)), [Segment(0, 0, len(token_ids))])
    entering = target.embed(torch.tensor(list(token_ids), device=target.device))
    return target.forward(entering, (0, target.num_layers), attention=attention, taps=taps)
