"""What decoding could reach at most on this machine, what it does reach, and where the rest of the time goes.

A plain token takes at least the time to read the weights and the text's keys and values once.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from kangaroo.bench.texts import Run, Text, race
from kangaroo.cost import StepCosts, measure_costs, measure_node_s
from kangaroo.drafters.base import Drafter
from kangaroo.engine.pace import Pace
from kangaroo.kernels import REFERENCE
from kangaroo.model.cache import depths_of
from kangaroo.model.transformer import Transformer
from kangaroo.types import Draft, Outcome

BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "int8": 1}
BANDWIDTH_BYTES, NUM_TRIES = 256 << 20, 5
# Depths between which the cost of a drafted token is measured.
DEPTHS = (1, 6)


class LevelCounter(Pace):
    """The usual pace, which also counts the tokens drafted and the levels they were on."""

    def __init__(self) -> None:
        super().__init__()
        self.num_drafted = self.num_levels = 0

    def observe(self, draft: Draft, outcome: Outcome, *, draft_time_s: float, verify_time_s: float) -> None:
        """Count, then learn as usual."""
        self.num_drafted += sum(len(parents) - 1 for parents in draft.parents)
        self.num_levels += sum(max(depths_of(parents)) for parents in draft.parents)
        super().observe(draft, outcome, draft_time_s=draft_time_s, verify_time_s=verify_time_s)

    @property
    def level_share(self) -> float:
        """How many of the drafted tokens made their draft deeper: all of a chain's."""
        return self.num_levels / self.num_drafted if self.num_drafted else 1.0


def num_weights(target: Transformer) -> int:
    """Numbers in the matrices that every pass reads: all layers and the head."""
    layers = sum(tensor.numel() for layer in target.layers for tensor in layer.tensors().values() if tensor.ndim == 2)
    return layers + target.head.numel()


def count_bytes(target: Transformer, num_tokens: int) -> tuple[int, int]:
    """What a plain step behind num_tokens of text reads: bytes of weights, and of keys and values."""
    config = target.config
    seen = sum(num_tokens if window is None else min(window, num_tokens) for window in config.windows)
    per_slot = 2 * config.num_kv_heads * config.head_dim * target.dtype.itemsize
    return num_weights(target) * BYTES[target.storage], seen * per_slot


def measure_bandwidth(target: Transformer) -> float:
    """Bytes a second that whatever runs the target reads from memory, the best of several tries."""
    if target.backend != REFERENCE:
        from kangaroo.kernels import cpu

        return max(cpu.measure_bandwidth(BANDWIDTH_BYTES) for _ in range(NUM_TRIES))
    numbers, rates = torch.ones(BANDWIDTH_BYTES // 4, device=target.device), []
    for _ in range(NUM_TRIES):
        started_s = time.perf_counter()
        # Its value is on the host only when all has been read.
        numbers.sum().item()
        rates.append(BANDWIDTH_BYTES / (time.perf_counter() - started_s))
    return max(rates)


def find_limits(target: Transformer, drafters: tuple[Drafter, Drafter, Drafter], *, texts: Sequence[Text],
                num_rounds: int = 3) -> dict[str, Any]:  # fmt: skip
    """Limits, what is reached and the parts of a step, for plain decoding and with a drafter; batches of one.

    drafters: as it is used; one of chains of at least 6 that never stop early, whose costs are measured; one that grows
    the same into trees.
    """
    prompts = [text.token_ids[: text.num_prompt] for text in texts]
    bandwidth = measure_bandwidth(target)
    costs = measure_costs(target, drafters[1], prompts=prompts, depths=DEPTHS)
    pace = LevelCounter()
    (plain, _), (drafted, speedup) = race(target, drafters[:1], texts=texts, paces=[pace], num_rounds=num_rounds)
    if pace.level_share < 1:
        costs = replace(costs, node_s=measure_node_s(target, drafters[1:], prompts=prompts))
    num_tokens = sum(text.num_prompt + len(text.token_ids) for text in texts) // (2 * len(texts))
    return {
        "bandwidth_bytes_per_s": bandwidth,
        "num_context_tokens": num_tokens,
        "plain": describe_plain(plain, num_bytes=count_bytes(target, num_tokens), bandwidth=bandwidth),
        "drafted": describe_drafted(drafted, plain, costs=costs, speedup=speedup, level_share=pace.level_share),
    }  # fmt: skip


def describe_plain(run: Run, *, num_bytes: tuple[int, int], bandwidth: float) -> dict[str, Any]:
    """Ideal and measured tokens a second, and the parts of a step in seconds; num_bytes: as count_bytes returns."""
    ideal_s, step_s = sum(num_bytes) / bandwidth, run.decode_time_s / run.num_steps
    verify_s = run.verify_time_s / run.num_steps
    return {
        "weight_bytes": num_bytes[0],
        "cache_bytes": num_bytes[1],
        "ideal_tokens_per_s": 1 / ideal_s,
        "tokens_per_s": run.tokens_per_s,
        "share": run.tokens_per_s * ideal_s,
        "step_s": step_s,
        "parts_s": {"reading memory at full bandwidth": min(ideal_s, verify_s),
                    "computing beyond that": max(0.0, verify_s - ideal_s),
                    "Python around the pass": step_s - verify_s},
    }  # fmt: skip


def describe_drafted(run: Run, plain: Run, *, costs: StepCosts, speedup: float, level_share: float) -> dict[str, Any]:
    """Ideal and measured speedup, and the parts of a step in seconds.

    Ideal: tokens per step / (1 + levels per step x token share + nodes beside x node share), the shares of a plain step
    that drafting one token deeper, and one beside others, takes: whole verification at the price of one row, and
    nothing around it. level_share: as LevelCounter has it.
    """
    num_drafted = run.num_drafted / run.num_steps
    num_levels = num_drafted * level_share
    num_beside = num_drafted - num_levels
    drafting_s = num_levels * costs.token_s + num_beside * costs.node_s
    ideal = run.tokens_per_step / (1 + drafting_s / costs.plain_s)
    step_s, draft_s, verify_s = (
        total_s / run.num_steps for total_s in (run.decode_time_s, run.draft_time_s, run.verify_time_s)
    )
    tokens_s = min(draft_s, drafting_s)
    one_row_s = min(verify_s, plain.verify_time_s / plain.num_steps)
    return {
        "tokens_per_step": run.tokens_per_step,
        "drafted_per_step": num_drafted,
        "levels_per_step": num_levels,
        "token_share": costs.token_s / costs.plain_s,
        "node_share": costs.node_s / costs.plain_s,
        "ideal_speedup": ideal,
        "speedup": speedup,
        "share": speedup / ideal,
        "step_s": step_s,
        "parts_s": {"verifying one row": one_row_s, "verifying the rows above one": verify_s - one_row_s,
                    "drafting tokens": tokens_s, "drafting beside them": draft_s - tokens_s,
                    "Python around both": step_s - draft_s - verify_s},
    }  # fmt: skip
