"""What a search for sublayers to skip makes large, and the runs that check what it found."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Protocol

from kangaroo.drafters.base import Drafter
from kangaroo.drafters.layer_skip import LayerSkipDrafter
from kangaroo.drafters.plain import PlainDrafter
from kangaroo.drafters.stopping import AdaptiveThreshold, ConfidenceThreshold
from kangaroo.engine.engine import Engine
from kangaroo.model.skips import SkippedSublayers
from kangaroo.model.transformer import Transformer
from kangaroo.search.cost import StepCosts
from kangaroo.search.forced import Counts, ForcedTexts, Text, count_steps
from kangaroo.types import Request, SamplingParams

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

    def __init__(self, texts: ForcedTexts, costs: StepCosts) -> None:
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
        run = decode(self._target, drafter, texts=self._texts)
        return Score(run.tokens_per_s, run.acceptance_rate, run.tokens_per_step, self._gamma, None)


@dataclass(frozen=True)
class Run:
    """What decoding all texts took; tokens behind the first of each."""

    num_tokens: int
    num_steps: int
    num_drafted: int
    num_accepted: int
    decode_time_s: float

    @property
    def tokens_per_s(self) -> float:
        return self.num_tokens / self.decode_time_s

    @property
    def tokens_per_step(self) -> float:
        return self.num_tokens / self.num_steps

    @property
    def acceptance_rate(self) -> float:
        return self.num_accepted / self.num_drafted if self.num_drafted else 0.0


def decode(target: Transformer, drafter: Drafter, *, texts: Sequence[Text]) -> Run:
    """Decode the texts again, to their lengths."""
    engine, done = Engine(target, drafter), []
    for text in texts:
        params = SamplingParams(len(text.token_ids) - text.num_prompt, ignore_eos=True)
        decoding = engine.submit(Request(text.token_ids[: text.num_prompt], params))
        engine.run(decoding)
        done.append(decoding)
    return Run(
        num_tokens=sum(len(one.new_tokens) - 1 for one in done),
        num_steps=sum(one.num_steps for one in done),
        num_drafted=sum(one.num_drafted for one in done),
        num_accepted=sum(one.num_accepted for one in done),
        decode_time_s=sum(one.decode_time_s for one in done),
    )


@dataclass(frozen=True)
class Validated:
    """A candidate as it ran: its speedup is the median over rounds, each with a plain run beside it."""

    skips: SkippedSublayers
    score: Score
    speedup: float
    tokens_per_step: float
    acceptance_rate: float


def validate(target: Transformer, candidates: Sequence[tuple[SkippedSublayers, Score]], *, texts: Sequence[Text],
             num_rounds: int = 3) -> list[Validated]:  # fmt: skip
    """Run candidates with the drafts they were scored for, interleaved with plain decoding; the fastest first."""
    ratios: list[list[float]] = [[] for _ in candidates]
    runs: list[Run] = []
    for _ in range(num_rounds):
        plain = decode(target, PlainDrafter(), texts=texts)
        runs = []
        for index, (skips, score) in enumerate(candidates):
            stopping = (
                AdaptiveThreshold(score.gamma) if score.eta is None else ConfidenceThreshold(score.gamma, score.eta)
            )
            runs.append(decode(target, LayerSkipDrafter(target, skips, stopping=stopping), texts=texts))
            ratios[index].append(runs[-1].tokens_per_s / plain.tokens_per_s)
    found = [
        Validated(*candidate, median(ratio), run.tokens_per_step, run.acceptance_rate)
        for candidate, ratio, run in zip(candidates, ratios, runs, strict=True)
    ]
    return sorted(found, key=lambda one: one.speedup, reverse=True)
