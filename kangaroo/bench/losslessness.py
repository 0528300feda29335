"""Whether drafted texts are plain decoding's, prompt by prompt and in total."""

from collections.abc import Sequence
from dataclasses import dataclass

from kangaroo.bench.divergence import Divergence


@dataclass(frozen=True)
class Problem:
    """One prompt decoded with a drafter and plainly; divergence is None where the texts are equal.

    num_forced_tokens and num_forced_steps are teacher-forced on a text the model did not choose.
    """

    task_id: str
    num_new_tokens: int
    num_steps: int
    num_drafted: int
    num_accepted: int
    repeated_8_grams: float
    num_forced_tokens: int
    num_forced_steps: int
    divergence: Divergence | None = None


def summarize(problems: Sequence[Problem]) -> dict[str, float | None]:
    """Totals over the problems; a rate is None where there is nothing to divide by."""

    def rate(tokens: int, passes: int) -> float | None:
        return tokens / passes if passes else None

    return {
        "num_problems": len(problems),
        "num_equal": sum(one.divergence is None for one in problems),
        # The first token of a text is the prefill's.
        "tokens_per_step": rate(
            sum(one.num_new_tokens - 1 for one in problems), sum(one.num_steps for one in problems)
        ),
        "acceptance_rate": rate(sum(one.num_accepted for one in problems), sum(one.num_drafted for one in problems)),
        "repeated_8_grams": sum(one.repeated_8_grams for one in problems) / len(problems) if problems else None,
        "teacher_forced_tokens_per_step": rate(
            sum(one.num_forced_tokens for one in problems), sum(one.num_forced_steps for one in problems)
        ),
    }


def list_differing(problems: Sequence[Problem]) -> list[str]:
    """One Markdown line for every text that is not plain decoding's."""
    return [
        f"- {one.task_id}: new token {found.position} (counted from 0), margin {found.margin:.3g}, "
        f"near-tie: {'yes' if found.near_tie else 'no'}"
        for one in problems
        if (found := one.divergence) is not None
    ]
