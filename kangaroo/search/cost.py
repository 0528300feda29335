"""What draft tokens and verification passes cost on this machine, for any set of skipped sublayers."""

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import accumulate

import torch

from kangaroo.drafters.base import Batch
from kangaroo.drafters.base import Sequence as DecodedSequence
from kangaroo.drafters.layer_skip import LayerSkipDrafter
from kangaroo.drafters.stopping import FixedLength
from kangaroo.model.cache import CachedPass
from kangaroo.model.skips import NO_SKIPS, SkippedSublayers
from kangaroo.model.transformer import Transformer
from kangaroo.search.forced import Counts
from kangaroo.types import Request, SamplingParams

# Rounds of measurement: fewer where a model is so slow that they would take too long, but never less than the least.
NUM_ROUNDS, LEAST_ROUNDS, MAX_TIME_S = 100, 20, 20.0
# Tokens of a draft that is long enough to tell what one more costs.
FEW = 5


@dataclass(frozen=True)
class StepCosts:
    """Times in seconds at one text length, batches of one: a drafted token is base_s and what of its sublayers runs.

    draft_s is what a draft costs beside its tokens; verify_s[n]: the pass over a draft of n tokens and its root.
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


def measure_costs(target: Transformer, token_ids: Sequence[int], *, gamma: int) -> StepCosts:
    """Measure behind a text, for drafts of up to gamma tokens; the fastest of several interleaved rounds counts."""
    cache = target.new_cache(1, len(token_ids) + max(gamma, FEW) + 1)
    sequence = DecodedSequence(Request(tuple(token_ids), SamplingParams()), slot=0)
    sequence.max_draft = FEW
    batch = Batch(target, cache, [sequence])
    entering = target.embed(torch.tensor(token_ids[:-1], device=target.device))
    segment = batch.segment(0, num_rows=len(token_ids) - 1)
    target.forward(entering, (0, target.num_layers), attention=CachedPass(cache, [segment]))
    cache.truncate(0, segment.stop)

    def draft(skips: SkippedSublayers, length: int) -> Callable[[], object]:
        drafter = LayerSkipDrafter(target, skips, stopping=FixedLength(length))
        return lambda: drafter.draft(batch)

    def verify(num_rows: int) -> Callable[[], object]:
        rows = torch.tensor([token_ids[-1]] * num_rows, device=target.device)

        def run() -> object:
            attention = CachedPass(cache, [batch.segment(0, num_rows=num_rows)])
            hidden, _ = target.forward(target.embed(rows), (0, target.num_layers), attention=attention)
            return target.argmax(hidden).tolist()

        return run

    every = frozenset(range(target.num_layers))
    one_mlp, no_attention = SkippedSublayers(every, every - {0}), SkippedSublayers(attention=every)
    # Short calls throughout: on a busy machine a long one is never left alone.
    drafts = draft(one_mlp, 1), draft(one_mlp, FEW), draft(no_attention, 1), draft(NO_SKIPS, 1)
    calls = [*drafts, *map(verify, range(1, gamma + 2))]
    least_s, few_s, no_attention_s, whole_s, *verify_s = _fastest(calls, before=verify(1))
    one_mlp_s = (few_s - least_s) / (FEW - 1)
    mlp_s = max(0.0, (no_attention_s - least_s) / max(1, target.num_layers - 1))
    return StepCosts(
        num_layers=target.num_layers,
        draft_s=max(0.0, least_s - one_mlp_s),
        base_s=max(0.0, one_mlp_s - mlp_s),
        attention_s=max(0.0, (whole_s - no_attention_s) / target.num_layers),
        mlp_s=mlp_s,
        # No pass costs more than one over more rows: a time that was disturbed in every round gives way.
        verify_s=tuple(accumulate(reversed(verify_s), min))[::-1],
    )


def _fastest(calls: Sequence[Callable[[], object]], *, before: Callable[[], object]) -> list[float]:
    """The least time each call took, in seconds: what else the machine does only adds to it.

    before: run ahead of each, so that none finds its weights in caches where decoding would not.
    """
    times_s = [float("inf")] * len(calls)
    began_s = time.perf_counter()
    for done in range(NUM_ROUNDS):
        for index, call in enumerate(calls):
            before()
            started_s = time.perf_counter()
            call()
            times_s[index] = min(times_s[index], time.perf_counter() - started_s)
        if done + 1 >= LEAST_ROUNDS and time.perf_counter() - began_s > MAX_TIME_S:
            break
    return times_s
