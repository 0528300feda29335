"""Whether drafted decoding is plain decoding to the bit on a set of prompts, and how much each step brings."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from kangaroo.bench.check import PromptResult, total


@dataclass(frozen=True)
class Problem:
    """One prompt's check, and what keeps a looping text from flattering it.

    num_forced_tokens and num_forced_steps are teacher-forced on a text the model did not choose.
    """

    result: PromptResult
    repeated_8_grams: float
    num_forced_tokens: int
    num_forced_steps: int

    def to_dict(self) -> dict[str, object]:
        """The check's fields and the others."""
        return self.result.to_dict() | {name: value for name, value in vars(self).items() if name != "result"}


def summarize(problems: Sequence[Problem]) -> dict[str, Any]:
    """The check's totals and the others; a rate is None where there is nothing to divide by."""
    num_forced_steps = sum(one.num_forced_steps for one in problems)
    num_forced_tokens = sum(one.num_forced_tokens for one in problems)
    return total([one.result for one in problems]) | {
        "repeated_8_grams": sum(one.repeated_8_grams for one in problems) / len(problems) if problems else None,
        "teacher_forced_tokens_per_step": num_forced_tokens / num_forced_steps if num_forced_steps else None,
    }


def list_differing(problems: Sequence[Problem]) -> list[str]:
    """One Markdown line for every text or logits that are not plain decoding's."""
    lines = []
    for one in (problem.result for problem in problems):
        if (found := one.divergence) is not None:
            lines.append(f"- {one.name}: new token {found.position} (counted from 0), margin {found.margin:.3g}, "
                         f"near-tie: {'yes' if found.near_tie else 'no'}")  # fmt: skip
        elif (logits := one.logits_difference) is not None:
            lines.append(f"- {one.name}: logits at {logits.num_positions} of {one.num_compared} positions, "
                         f"from new token {logits.position} on; tokens identical")  # fmt: skip
    return lines
