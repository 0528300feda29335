"""What draft tokens cost on this machine for any set of skipped sublayers, from a few that are measured."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import accumulate

from kangaroo.bench.agreement import Counts
from kangaroo.cost import NUM_ROUNDS, StepCosts, measure_costs
from kangaroo.drafters.layer_skip import LayerSkipDrafter
from kangaroo.drafters.stopping import FixedLength
from kangaroo.model.skips import NO_SKIPS, SkippedSublayers
from kangaroo.model.transformer import Transformer

# Tokens of a draft that is long enough to tell what one more costs.
FEW = 5


@dataclass(frozen=True)
class SkipCosts:
    """Times in seconds, batches of one: a drafted token is base_s and what of its sublayers runs.

    draft_s is what a draft costs beside its tokens; verify_s[n]: the rest of a step that drafted n tokens.
    """

    num_layers: int
    draft_s: float
    base_s: float
    attention_s: float
    mlp_s: float
    verify_s: tuple[float, ...]

    def token_s(self, skips: SkippedSublayers) -> float:
        """The time to draft one token."""
        num_attention, num_mlp = self.num_layers - len(skips.attention), self.num_layers - len(skips.mlp)
        return self.base_s + num_attention * self.attention_s + num_mlp * self.mlp_s

    def speedup(self, counts: Counts, skips: SkippedSublayers) -> float:
        """How many times as fast as plain decoding, which takes a pass of one row a token."""
        token_s = self.token_s(skips)
        total_s = sum(
            count * (self.verify_s[length] + (self.draft_s + length * token_s if length else 0.0))
            for length, count in counts.drafts.items()
        )
        return counts.num_tokens * self.verify_s[0] / total_s

    def to_dict(self) -> dict[str, object]:
        """The fields by name."""
        return asdict(self)


def measure_skip_costs(target: Transformer, prompts: Sequence[Sequence[int]], *, gamma: int,
                       num_rounds: int = NUM_ROUNDS) -> SkipCosts:  # fmt: skip
    """Measure while the prompts are continued, for drafts of up to gamma tokens."""

    def measure(skips: SkippedSublayers, depths: Sequence[int]) -> StepCosts:
        drafter = LayerSkipDrafter(target, skips, stopping=FixedLength(max(depths)))
        return measure_costs(target, drafter, prompts=prompts, depths=depths, num_rounds=num_rounds)

    every = frozenset(range(target.num_layers))
    one_mlp = measure(SkippedSublayers(every, every - {0}), range(1, max(gamma, FEW) + 1))
    no_attention_s = measure(SkippedSublayers(attention=every), (1,)).draft_s[1]
    whole_s = measure(NO_SKIPS, (1,)).draft_s[1]
    least_s, one_mlp_s = one_mlp.draft_s[1], one_mlp.token_s
    mlp_s = max(0.0, (no_attention_s - least_s) / max(1, target.num_layers - 1))
    # No pass costs more than one over more rows: a time that was disturbed gives way.
    verify_s = tuple(accumulate((one_mlp.verify_s[rows] for rows in range(gamma + 1, 0, -1)), min))[::-1]
    return SkipCosts(
        num_layers=target.num_layers,
        draft_s=max(0.0, least_s - one_mlp_s),
        base_s=max(0.0, one_mlp_s - mlp_s),
        attention_s=max(0.0, (whole_s - no_attention_s) / target.num_layers),
        mlp_s=mlp_s,
        verify_s=tuple(one_mlp.engine_s + one_s for one_s in verify_s),
    )
