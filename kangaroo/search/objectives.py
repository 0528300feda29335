"""What a search for sublayers to skip makes large, and the runs that check what it found."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Protocol

from kangaroo.bench.agreement import Counts, count_steps
from kangaroo.bench.texts import Decoder, Text, add_runs, race
from kangaroo.drafters.layer_skip import LayerSkipDrafter
from kangaroo.drafters.stopping import AdaptiveThreshold, ConfidenceThreshold
from kangaroo.model.skips import SkippedSublayers
from kangaroo.model.transformer import Transformer
from kangaroo.search.cost import SkipCosts
from kangaroo.search.forced import ForcedTexts

ETAS = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)


@dataclass(frozen=True)
class Score:
    """What a candidate is worth: the objective's value, and acceptance, the share of its guesses that were right.

    gamma and eta: with what drafts it reaches this, eta None under the adaptive threshold.
    """

    value: float
    acceptance: float
    tokens_per_step: float
    gamma: int
    eta: float | None

    def to_dict(self) -> dict[str, float | int | None]:
        """The fields by name."""
        return asdict(self)


class Objective(Protocol):
    """Judges a candidate; more is better."""

    def score(self, skips: SkippedSublayers) -> Score: ...


class ExpectedSpeedup:
    """Speedup over plain decoding by counted steps and measured costs, with the gamma and eta that serve it best."""

    def __init__(self, texts: ForcedTexts, costs: SkipCosts) -> None:
        self._texts = texts
        self._costs = costs

    def score(self, skips: SkippedSublayers) -> Score:
        """One teacher-forced pass, whatever the number of gammas and etas."""
        judged = self._texts.judge(skips)
        tried: dict[tuple[int, float], Counts] = {
            (gamma, eta): count_steps(judged, gamma=gamma, eta=eta)
            for gamma in range(1, len(self._costs.verify_s))
            for eta in (ETAS if gamma > 1 else ETAS[:1])
        }
        gamma, eta = max(tried, key=lambda drafts: self._costs.speedup(tried[drafts], skips))
        best = tried[gamma, eta]
        agrees = [right for one in judged for right in one.agrees]
        value = self._costs.speedup(best, skips)
        return Score(value, sum(agrees) / len(agrees), best.tokens_per_step, gamma, eta)


class TokensPerSecond:
    """Decoded tokens a second of a run under the adaptive threshold: the paper's objective, as noisy as the machine."""

    def __init__(self, target: Transformer, texts: Sequence[Text], *, gamma: int) -> None:
        self._target = target
        self._texts = texts
        self._gamma = gamma

    def score(self, skips: SkippedSublayers) -> Score:
        """One run over all texts."""
        drafter = LayerSkipDrafter(self._target, skips, stopping=AdaptiveThreshold(self._gamma))
        decoder = Decoder(self._target, drafter)
        run = add_runs([decoder.run([text]) for text in self._texts])
        return Score(run.tokens_per_s, run.acceptance_rate, run.tokens_per_step, self._gamma, None)


@dataclass(frozen=True)
class Validated:
    """A candidate as it ran: its speedup is the median over rounds, in which plain decoding took its turns."""

    skips: SkippedSublayers
    score: Score
    speedup: float
    tokens_per_step: float
    acceptance_rate: float


def validate(target: Transformer, candidates: Sequence[tuple[SkippedSublayers, Score]], *, texts: Sequence[Text],
             num_rounds: int = 3) -> list[Validated]:  # fmt: skip
    """Run candidates with the drafts they were scored for, in turn with plain decoding; the fastest first."""
    drafters = []
    for skips, score in candidates:
        stopping = AdaptiveThreshold(score.gamma) if score.eta is None else ConfidenceThreshold(score.gamma, score.eta)
        drafters.append(LayerSkipDrafter(target, skips, stopping=stopping))
    _, *raced = race(target, drafters, texts=texts, num_rounds=num_rounds)
    found = [
        Validated(*candidate, speedup, run.tokens_per_step, run.acceptance_rate)
        for candidate, (run, speedup) in zip(candidates, raced, strict=True)
    ]
    return sorted(found, key=lambda one: one.speedup, reverse=True)
