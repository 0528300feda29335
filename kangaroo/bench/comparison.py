"""Contenders side by side: who runs when, and the numbers that come of it."""

import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

import numpy as np

from kangaroo.bench.contenders import Contender, Run

Each = TypeVar("Each")

WARM_UP_TOKENS = 16
BASELINE = "plain"
NUM_RESAMPLES = 2000


def measure(
    contenders: Sequence[Contender],
    prompts: Sequence[tuple[int, ...]],
    *,
    num_rounds: int,
    max_new_tokens: int,
    other: str,
    advance: Callable[[], None] | None = None,
) -> list[dict[str, object]]:
    """Run contenders, plain among them, and compare() them to it; beside that to another one, if it is among them.

    advance: called behind every text. The rows also hold each contender's `version`, and as `ratio_to` and `interval`
    its ratio to the other one with ratio_interval(), which takes two texts; None where there is none.
    """
    runs = interleave(contenders, prompts, num_rounds=num_rounds, max_new_tokens=max_new_tokens, advance=advance)
    rows = compare(runs, BASELINE)
    for row, contender in zip(rows, contenders, strict=True):
        row["version"] = getattr(contender, "version", None)
        row["ratio_to"] = row["interval"] = None
        if other in runs:
            mine = runs[contender.name]
            row["ratio_to"] = statistics.median(_ratios(mine, runs[other]))
            if len(prompts) > 1 and contender.name != other:
                row["interval"] = ratio_interval(mine, runs[other], num_texts=len(prompts))
    return rows


def interleave(
    contenders: Sequence[Contender],
    prompts: Sequence[tuple[int, ...]],
    *,
    num_rounds: int,
    max_new_tokens: int,
    advance: Callable[[], None] | None = None,
) -> dict[str, list[Run]]:
    """Run every contender on every prompt, taking turns at going first, after a warm-up; runs by contender's name."""
    runs: dict[str, list[Run]] = {contender.name: [] for contender in contenders}
    for contender in contenders:
        contender.generate(prompts[0], max_new_tokens=min(WARM_UP_TOKENS, max_new_tokens))
    for round_id in range(num_rounds):
        for index, prompt in enumerate(prompts):
            for contender in take_turns(contenders, round_id + index):
                runs[contender.name].append(contender.generate(prompt, max_new_tokens=max_new_tokens))
                if advance is not None:
                    advance()
    return runs


def take_turns(each: Sequence[Each], number: int) -> list[Each]:
    """All of them in order, in turn number of everyone's going first."""
    shift = number % len(each)
    return [*each[shift:], *each[:shift]]


def compare(runs: Mapping[str, Sequence[Run]], baseline: str) -> list[dict[str, object]]:
    """Median speed of each contender, its median ratio to the baseline text by text, and how many texts are equal."""
    rows: list[dict[str, object]] = []
    for name, mine in runs.items():
        ratios = _ratios(mine, runs[baseline])
        completions = [run.completion for run in mine if run.completion is not None]
        num_steps = sum(one.num_steps for one in completions)
        rows.append({
            "contender": name,
            "tokens_per_s": statistics.median(run.tokens_per_s for run in mine),
            "ratio": statistics.median(ratios),
            "tokens_per_step": sum(c.num_new_tokens - 1 for c in completions) / num_steps if num_steps else None,
            "num_equal": sum(a.token_ids == b.token_ids for a, b in zip(mine, runs[baseline], strict=True)),
            "num_texts": len(mine),
        })  # fmt: skip
    return rows


def ratio_interval(mine: Sequence[Run], baseline: Sequence[Run], *, num_texts: int) -> tuple[float, float]:
    """The 95% bootstrap interval of compare()'s ratio over the texts that might have been asked for instead.

    mine, baseline: interleave()'s runs, which pair, num_texts a round. Whole texts are drawn, each with its pairs of
    all rounds; the percentile interval of Efron and Tibshirani 1993, An Introduction to the Bootstrap, 13.3.
    """
    by_round = np.array(_ratios(mine, baseline)).reshape(-1, num_texts)
    drawn = np.random.default_rng(0).integers(num_texts, size=(NUM_RESAMPLES, num_texts))
    medians = np.median(by_round[:, drawn], axis=(0, 2))
    low, high = np.quantile(medians, [0.025, 0.975])
    return float(low), float(high)


def _ratios(mine: Sequence[Run], baseline: Sequence[Run]) -> list[float]:
    return [a.tokens_per_s / b.tokens_per_s for a, b in zip(mine, baseline, strict=True)]
