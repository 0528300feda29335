"""Contenders side by side: who runs when, and the numbers that come of it."""

import statistics
from collections.abc import Mapping, Sequence

from kangaroo.bench.contenders import Contender, Run

WARM_UP_TOKENS = 16


def interleave(
    contenders: Sequence[Contender], prompts: Sequence[tuple[int, ...]], *, num_rounds: int, max_new_tokens: int
) -> dict[str, list[Run]]:
    """Run every contender on every prompt, taking turns at going first, after a warm-up; runs by contender's name."""
    runs: dict[str, list[Run]] = {contender.name: [] for contender in contenders}
    for contender in contenders:
        contender.generate(prompts[0], max_new_tokens=WARM_UP_TOKENS)
    for round_id in range(num_rounds):
        for index, prompt in enumerate(prompts):
            shift = (round_id + index) % len(contenders)
            for contender in (*contenders[shift:], *contenders[:shift]):
                runs[contender.name].append(contender.generate(prompt, max_new_tokens=max_new_tokens))
    return runs


def compare(runs: Mapping[str, Sequence[Run]], baseline: str) -> list[dict[str, object]]:
    """Median speed of each contender, its median ratio to the baseline text by text, and how many texts are equal."""
    rows: list[dict[str, object]] = []
    for name, mine in runs.items():
        pairs = list(zip(mine, runs[baseline], strict=True))
        completions = [run.completion for run in mine if run.completion is not None]
        num_steps = sum(one.num_steps for one in completions)
        rows.append({
            "contender": name,
            "tokens_per_s": statistics.median(run.tokens_per_s for run in mine),
            "ratio": statistics.median(a.tokens_per_s / b.tokens_per_s for a, b in pairs),
            "tokens_per_step": sum(c.num_new_tokens - 1 for c in completions) / num_steps if num_steps else None,
            "num_equal": sum(a.token_ids == b.token_ids for a, b in pairs),
            "num_texts": len(mine),
        })  # fmt: skip
    return rows
