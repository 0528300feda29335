"""Whether drafted decoding is plain decoding to the bit: its tokens, and the logits behind each of them.

Plain decoding runs one token per pass. Both runs are watched where the target chooses, so that the logits compared
come from the very states the choices were made from, in passes as wide as the run's own.
Shapes: R nodes of a pass, D hidden size, V vocabulary.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from copy import copy
from dataclasses import dataclass, replace
from itertools import islice, zip_longest

import torch
from torch import Tensor

from kangaroo.bench.divergence import Divergence, near_tie_bound, shared_length
from kangaroo.bench.prompts import Prompt, encode_prompt
from kangaroo.drafters.base import Batch, Drafter
from kangaroo.drafters.base import Sequence as Decoded
from kangaroo.drafters.plain import PlainDrafter
from kangaroo.llm import LLM
from kangaroo.model.cache import depths_of
from kangaroo.model.checkpoint import LoadedModel
from kangaroo.model.transformer import AttentionPass, Transformer
from kangaroo.sampling import gumbel_noise
from kangaroo.types import Completion, Draft, Outcome, SamplingParams


@dataclass(frozen=True)
class LogitsDifference:
    """Where logits differ: the first new token they differ for, at how many, and by how much at most.

    largest is None where a difference is no finite number.
    """

    position: int
    num_positions: int
    largest: float | None


@dataclass(frozen=True)
class Acceptance:
    """Steps by what they accepted of their draft: nothing, a part, all; or that they had none to accept."""

    none: int = 0
    part: int = 0
    all: int = 0
    no_draft: int = 0

    def __add__(self, other: "Acceptance") -> "Acceptance":
        sums = (one + two for one, two in zip(vars(self).values(), vars(other).values(), strict=True))
        return Acceptance(*sums)


@dataclass(frozen=True)
class PromptResult:
    """One prompt decoded plainly and with a drafter.

    name: the prompt's. num_compared: positions whose logits were compared, those up to the first token that differs;
    divergence and logits_difference are None where everything is identical.
    """

    name: str
    plain: Completion
    drafted: Completion
    acceptance: Acceptance
    num_compared: int
    divergence: Divergence | None = None
    logits_difference: LogitsDifference | None = None

    @property
    def identical(self) -> bool:
        return self.divergence is None and self.logits_difference is None

    def to_dict(self) -> dict[str, object]:
        """The fields of --json."""
        divergence, logits = self.divergence, self.logits_difference
        return {
            "name": self.name,
            "num_prompt_tokens": self.drafted.num_prompt_tokens,
            "num_new_tokens": self.drafted.num_new_tokens,
            "tokens_identical": divergence is None,
            "logits_identical": logits is None,
            "num_logits_compared": self.num_compared,
            "divergence": None if divergence is None else vars(divergence),
            "logits_difference": None if logits is None else vars(logits),
            "num_steps": self.drafted.num_steps,
            "tokens_per_step": self.drafted.tokens_per_step,
            "acceptance_rate": self.drafted.acceptance_rate,
            "accepted_of_draft": vars(self.acceptance),
        }


def total(results: Sequence[PromptResult]) -> dict[str, object]:
    """Counts over prompts; rates are None where there is nothing to divide by."""
    drafted = [one.drafted for one in results]
    divergences = [one.divergence for one in results if one.divergence is not None]
    differences = [one.logits_difference for one in results if one.logits_difference is not None]
    num_positions, num_differing = (
        sum(one.num_compared for one in results),
        sum(one.num_positions for one in differences),
    )
    num_new_tokens, num_steps = sum(one.num_new_tokens for one in drafted), sum(one.num_steps for one in drafted)
    num_drafted, num_accepted = sum(one.num_drafted for one in drafted), sum(one.num_accepted for one in drafted)
    return {
        "num_prompts": len(results),
        "num_tokens_identical": len(results) - len(divergences),
        "num_near_ties": sum(one.near_tie for one in divergences),
        "num_logits_identical": len(results) - len(differences),
        "num_positions": num_positions,
        "num_positions_identical": num_positions - num_differing,
        "num_new_tokens": num_new_tokens,
        "num_steps": num_steps,
        # The first token of a text is the prefill's.
        "tokens_per_step": (num_new_tokens - len(results)) / num_steps if num_steps else None,
        "acceptance_rate": num_accepted / num_drafted if num_drafted else None,
        "accepted_of_draft": vars(sum((one.acceptance for one in results), start=Acceptance())),
    }


class Checker:
    """Decodes prompts plainly and with a drafter, on the same weights and kernels, and compares."""

    def __init__(self, model: LoadedModel, drafter: Drafter) -> None:
        self._model = model
        self._plain = _WatchedRun(model, PlainDrafter())
        self._drafted = _WatchedRun(model, drafter)

    def check_all(self, prompts: Sequence[Prompt], params: SamplingParams) -> Iterator[PromptResult]:
        """Check prompts one by one; the call itself raises PromptError where one of them cannot be decoded."""
        tokenizer, max_tokens = self._model.tokenizer, self._model.target.config.context_length - 1
        encoded = [encode_prompt(prompt, tokenizer, max_tokens=max_tokens) for prompt in prompts]
        return (self.check(ids, params, name=prompt.name) for prompt, ids in zip(prompts, encoded, strict=True))

    def check(self, prompt_ids: Sequence[int], params: SamplingParams, *, name: str = "prompt") -> PromptResult:
        """Decode one prompt both ways; only its own states are held, and only two passes' logits at a time."""
        plain, drafted = (run.decode(prompt_ids, params) for run in (self._plain, self._drafted))
        assert all(len(one.hidden) == 1 for one in self._plain.passes), "plain decoding runs one token per pass"
        runs = (self._plain, self._drafted)
        with torch.inference_mode():
            divergence, num_compared, difference = _compare(runs, texts=(plain, drafted), params=params)
        acceptance = _count(self._drafted.passes[1:])
        return PromptResult(name, plain, drafted, acceptance, num_compared, divergence, difference)


@dataclass(frozen=True)
class _Pass:
    """The states [R, D] that a pass chose from, which of its nodes were kept, and how deep its draft was."""

    hidden: Tensor
    path: tuple[int, ...]
    draft_depth: int


class _WatchedRun:
    """Decodes with a drafter, whose place in the engine it takes, and remembers the passes of the last text."""

    def __init__(self, model: LoadedModel, drafter: Drafter) -> None:
        self.name = drafter.name
        self.passes: list[_Pass] = []
        self._target = model.target
        self._drafter = drafter
        self._chosen_from = torch.empty(0)
        self._draft_depth = 0
        self._llm = LLM(replace(model, target=self._watch(model.target)), self)

    @property
    def taps(self) -> tuple[int, ...]:
        """The drafter's, and what enters the head."""
        return tuple(sorted({*self._drafter.taps, self._target.num_layers}))

    def decode(self, prompt_ids: Sequence[int], params: SamplingParams) -> Completion:
        self.passes = []
        return self._llm.generate(prompt_ids, params)

    def logits(self) -> Iterator[Tensor]:
        """The logits [V] behind every token, computed pass by pass with the rejected nodes beside them."""
        for one in self.passes:
            yield from self._target.logits(one.hidden)[list(one.path)]

    def begin(self, sequences: Sequence[Decoded], *, num_slots: int) -> None:
        self._drafter.begin(sequences, num_slots=num_slots)

    def draft(self, batch: Batch) -> Draft:
        draft = self._drafter.draft(batch)
        if draft.verified is not None:
            # Such a draft does not come by the watched target.
            self._chosen_from = draft.verified.taps[self._target.num_layers]
        self._draft_depth = max(depths_of(draft.parents[0]))
        return draft

    def accept(self, sequences: Sequence[Decoded], outcome: Outcome) -> None:
        """Remember the pass that just ended; the first is the prefill, which chooses after its last row alone."""
        path = outcome.paths[0] if self.passes else (0,)
        # A block of a prompt that is not its last chooses nothing.
        if outcome.tokens[0]:
            self.passes.append(_Pass(self._chosen_from, path, self._draft_depth if self.passes else 0))
        self._drafter.accept(sequences, outcome)

    def end(self, sequences: Sequence[Decoded]) -> None:
        self._drafter.end(sequences)

    def _watch(self, target: Transformer) -> Transformer:
        """The same target, which tells what it is asked to choose from; drafters keep the one they were built for."""

        def argmax(hidden: Tensor) -> Tensor:
            self._chosen_from = hidden
            return target.argmax(hidden)

        def logits(hidden: Tensor, norm: Tensor | None = None) -> Tensor:
            if norm is None:
                self._chosen_from = hidden
            return target.logits(hidden, norm)

        def decide(entering: Tensor | list[int], span: tuple[int, int], *, attention: AttentionPass,
                   taps: Sequence[int] = ()) -> tuple[list[int], dict[int, Tensor]]:  # fmt: skip
            ids, tapped = target.decide(entering, span, attention=attention, taps=taps)
            self._chosen_from = tapped[span[1]]
            return ids, tapped

        watched = copy(target)
        watched.argmax, watched.logits, watched.decide = argmax, logits, decide  # type: ignore[method-assign]
        return watched


def _compare(
    runs: tuple[_WatchedRun, _WatchedRun], *, texts: tuple[Completion, Completion], params: SamplingParams
) -> tuple[Divergence | None, int, LogitsDifference | None]:
    """Compare up to the first token that differs, beyond which two runs answer different questions."""
    ours, theirs = (text.token_ids for text in texts)
    shared = shared_length(ours, theirs)
    rows = [islice(run.logits(), text.num_new_tokens) for run, text in zip(runs, texts, strict=True)]
    differing: dict[int, float] = {}
    divergence, num_compared = None, 0
    for position, (plain, drafted) in enumerate(islice(zip_longest(*rows), shared + 1)):
        if plain is not None and drafted is not None:
            num_compared += 1
            if not _same_bits(plain, drafted):
                differing[position] = float((plain - drafted).abs().max())
        if position == shared:
            scores = drafted if plain is None else plain
            if params.temperature > 0:
                place = texts[0].num_prompt_tokens + position - 1
                token_ids = torch.arange(len(scores))
                noise = gumbel_noise(place, token_ids, seed=params.seed or 0).to(scores.device)
                scores = scores + params.temperature * noise
            first, other = (text[position] if position < len(text) else None for text in (ours, theirs))
            divergence = judge(
                scores, (first, other), position=position, hidden_size=runs[0].passes[0].hidden.shape[-1]
            )
    return divergence, num_compared, _summarize(differing)


def judge(scores: Tensor, candidates: tuple[int | None, int | None], *, position: int, hidden_size: int) -> Divergence:
    """Describe a divergence by the scores [V] that plain decoding chose from: its logits, with the noise if sampling.

    A near-tie explains it only where both candidates are as close to the best score as the definition asks.
    """
    top = scores.topk(2).values
    (best, second), bound = top, near_tie_bound(top, hidden_size)
    near_tie = all(one is not None and float(best - scores[one]) < bound for one in candidates)
    return Divergence(position, candidates, float(best - second), near_tie)


def _same_bits(one: Tensor, other: Tensor) -> bool:
    """torch.equal, which takes 0.0 for -0.0 and no NaN for itself, on the bits of float32."""
    return torch.equal(one.view(torch.int32), other.view(torch.int32))


def _summarize(differing: dict[int, float]) -> LogitsDifference | None:
    if not differing:
        return None
    largest = max(differing.values())
    finite = all(math.isfinite(value) for value in differing.values())
    return LogitsDifference(min(differing), len(differing), largest if finite else None)


def _count(steps: Iterable[_Pass]) -> Acceptance:
    counts = dict.fromkeys(vars(Acceptance()), 0)
    for step in steps:
        accepted = len(step.path) - 1
        whole = "all" if accepted == step.draft_depth else "part"
        counts["no_draft" if step.draft_depth == 0 else whole if accepted else "none"] += 1
    return Acceptance(**counts)
