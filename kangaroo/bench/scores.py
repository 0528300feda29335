"""What answers say of a drafter: Spec-Bench's score, a corrected one, equality, acceptance, where the time goes.

Pure functions of a drafter's runs, and of plain decoding's where they compare. Shapes: Q questions, S resamples.
"""

import statistics
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kangaroo.bench.answers import Answer, task_of

TASKS = ("mt_bench", "translation", "summarization", "qa", "math_reasoning", "rag")
OVERALL = "overall"
MAX_CTAR, NUM_RESAMPLES, SEED, CONFIDENCE = 8, 5000, 0, 0.95

Runs = Sequence[Sequence[Answer]]
Pairs = NDArray[np.float64]


@dataclass(frozen=True)
class Legacy:
    """Spec-Bench's score: means over runs, and sample deviations, None for a single run.

    speedup is None where the baseline's rate is not above 0 in every run, as with texts that are empty.
    """

    tokens_per_s: float
    tokens_per_s_std: float | None
    baseline_tokens_per_s: float
    baseline_tokens_per_s_std: float | None
    speedup: float | None
    speedup_std: float | None
    mean_accepted_tokens: float | None


@dataclass(frozen=True)
class Corrected:
    """Tokens by their ids over decode time, both summed over the num_questions that drafter and baseline answered.

    A question counts with its medians over runs. speedup_low and speedup_high bound its bootstrap interval, None for a
    single question. end_to_end_speedup is that of whole calls, prefill and first token included; prefill times are sums
    in seconds.
    """

    num_questions: int
    num_tokens: float
    decode_time_s: float
    tokens_per_s: float
    baseline_tokens_per_s: float
    speedup: float
    speedup_low: float | None
    speedup_high: float | None
    end_to_end_speedup: float
    prefill_time_s: float
    baseline_prefill_time_s: float


@dataclass(frozen=True)
class Matches:
    """Of how many questions every run's token ids are the baseline's, and which differ."""

    num_compared: int
    num_equal: int
    differing_ids: list[int | str]


@dataclass(frozen=True)
class Steps:
    """What verification passes brought, over all runs; rates are None where there is nothing to divide by.

    ctar: by k - 1, the share of steps whose first k drafted tokens were all accepted. accepted_lengths: how many steps
    emitted so many tokens, the length written as text, as in JSON.
    """

    num_steps: int
    tokens_per_step: float | None
    num_drafted: int
    num_accepted: int
    acceptance_rate: float | None
    ctar: list[float] | None
    accepted_lengths: dict[str, int]


@dataclass(frozen=True)
class TimeSplit:
    """How decode time divides, over all runs: shares that sum to 1, and milliseconds a decoded token."""

    decode_time_s: float
    draft_share: float
    verify_share: float
    overhead_share: float
    ms_per_token: float


def find_tasks(answers: Sequence[Answer]) -> list[str]:
    """The tasks there are answers of, Spec-Bench's in its order, then the others, and last "overall"."""
    found = {task_of(answer.category) for answer in answers}
    return [task for task in TASKS if task in found] + sorted(found - set(TASKS)) + [OVERALL]


def select_task(runs: Runs, task: str) -> list[list[Answer]]:
    """Every run's answers to the questions of a task."""
    return [[answer for answer in run if task in (OVERALL, task_of(answer.category))] for run in runs]


def score_legacy(runs: Runs, baseline: Runs, *, count_tokens: Callable[[str], int]) -> Legacy | None:
    """Spec-Bench's score (its evaluation/speed.py), run by run; None where no run has answers of both.

    count_tokens: how many ids the tokenizer makes of a text, its special tokens included. As there, 1 is taken off for
    the BOS that Vicuna's adds, whatever this one does.
    """

    def rate(answer: Answer) -> float:
        return sum(answer.choices[0].new_tokens) / sum(answer.choices[0].wall_time)

    def baseline_rate(answer: Answer) -> float:
        choice = answer.choices[0]
        return sum(count_tokens(text) - 1 for text in choice.turns) / sum(choice.wall_time)

    pairs = [(mine, plain) for mine, plain in zip(runs, baseline, strict=False) if mine and plain]
    if not pairs:
        return None
    rates = [statistics.fmean(map(rate, mine)) for mine, _ in pairs]
    baseline_rates = [statistics.fmean(map(baseline_rate, plain)) for _, plain in pairs]
    ratios = [mine / plain for mine, plain in zip(rates, baseline_rates, strict=True) if plain > 0]
    is_rated = len(ratios) == len(rates)
    lengths = [length for mine, _ in pairs for answer in mine for length in answer.choices[0].accept_lengths]
    return Legacy(
        *(statistics.fmean(rates), _deviation(rates)),
        *(statistics.fmean(baseline_rates), _deviation(baseline_rates)),
        statistics.fmean(ratios) if is_rated else None,
        _deviation(ratios) if is_rated else None,
        statistics.fmean(lengths) if lengths else None,
    )


def score_corrected(runs: Runs, baseline: Runs) -> Corrected | None:
    """Speedup in decoding, with its interval; None where drafter and baseline decoded no question both."""
    mine, plain = _medians(runs), _medians(baseline)
    common = [question_id for question_id in plain if question_id in mine]
    ours, theirs = (np.array([side[one] for one in common]).reshape(-1, 5) for side in (mine, plain))
    tokens, decode_s, all_tokens, wall_s, prefill_s = ours.sum(axis=0).tolist()
    their_tokens, their_decode_s, their_all_tokens, their_wall_s, their_prefill_s = theirs.sum(axis=0).tolist()
    if not (tokens and their_tokens):
        return None
    low, high = bootstrap_speedup(ours[:, :2], theirs[:, :2]) if len(common) > 1 else (None, None)
    return Corrected(
        num_questions=len(common),
        num_tokens=tokens,
        decode_time_s=decode_s,
        tokens_per_s=tokens / decode_s,
        baseline_tokens_per_s=their_tokens / their_decode_s,
        speedup=(tokens / decode_s) / (their_tokens / their_decode_s),
        speedup_low=low,
        speedup_high=high,
        end_to_end_speedup=(all_tokens / wall_s) / (their_all_tokens / their_wall_s),
        prefill_time_s=prefill_s,
        baseline_prefill_time_s=their_prefill_s,
    )


def bootstrap_speedup(mine: Pairs, baseline: Pairs) -> tuple[float, float]:
    """Percentile interval of the ratio of summed tokens over summed seconds, of questions' pairs [Q, 2] of both.

    A resample draws Q questions with replacement and takes both sides of each (Efron and Tibshirani, "An introduction
    to the bootstrap", 1993, chapter 13); the seed is fixed, so that the same answers have the same interval.
    """
    chosen = np.random.default_rng(SEED).integers(len(mine), size=(NUM_RESAMPLES, len(mine)))  # [S, Q]
    sums = np.concatenate([mine, baseline], axis=1)[chosen].sum(axis=1)  # [S, 4]
    # A resample of nothing but texts of one token decodes nothing.
    tokens, seconds, their_tokens, their_seconds = sums[(sums > 0).all(axis=1)].T
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile((tokens / seconds) / (their_tokens / their_seconds), (tail, 1 - tail)).tolist()
    return low, high


def compare_texts(runs: Runs, baseline: Runs) -> Matches:
    """Compare token ids question by question, each run with the baseline's run of that number."""
    equal: dict[int | str, bool] = {}
    for mine, plain in zip(runs, baseline, strict=False):
        expected = {answer.question_id: answer.choices[0].token_ids for answer in plain}
        for answer in mine:
            if (name := answer.question_id) in expected:
                equal[name] = equal.get(name, True) and answer.choices[0].token_ids == expected[name]
    return Matches(len(equal), sum(equal.values()), [name for name, same in equal.items() if not same])


def count_steps(runs: Runs) -> Steps:
    """Tokens per step, acceptance and CTAR (Kangaroo, Liu et al. 2024, section 3) of all runs together.

    A step that emitted n tokens accepted n - 1, unless the text ended within its draft.
    """
    choices = [answer.choices[0] for run in runs for answer in run]
    lengths = Counter(length for choice in choices for length in choice.accept_lengths)
    num_steps = sum(sum(choice.decoding_steps) for choice in choices)
    num_tokens = sum(_num_decoded(answer) for run in runs for answer in run)
    num_drafted, num_accepted = (sum(sum(getattr(one, name)) for one in choices)
                                 for name in ("num_drafted", "num_accepted"))  # fmt: skip
    total = lengths.total()
    return Steps(
        num_steps=num_steps,
        tokens_per_step=num_tokens / num_steps if num_steps else None,
        num_drafted=num_drafted,
        num_accepted=num_accepted,
        acceptance_rate=num_accepted / num_drafted if num_drafted else None,
        ctar=[sum(count for length, count in lengths.items() if length > k) / total for k in range(1, MAX_CTAR + 1)]
        if total
        else None,
        accepted_lengths={str(length): lengths[length] for length in sorted(lengths)},
    )


def split_time(runs: Runs) -> TimeSplit | None:
    """Where decode time went; None where nothing was decoded."""
    answers = [answer for run in runs for answer in run]
    decode_s, draft_s, verify_s = (
        sum(sum(getattr(answer.choices[0], name)) for answer in answers)
        for name in ("decode_time_s", "draft_time_s", "verify_time_s")
    )
    num_tokens = sum(map(_num_decoded, answers))
    if not num_tokens:
        return None
    overhead_s = decode_s - draft_s - verify_s
    return TimeSplit(
        decode_time_s=decode_s,
        draft_share=draft_s / decode_s,
        verify_share=verify_s / decode_s,
        overhead_share=overhead_s / decode_s,
        ms_per_token=1000 * decode_s / num_tokens,
    )


def _num_decoded(answer: Answer) -> int:
    """Tokens of all turns but the first of each, which the prefill emits."""
    return sum(max(len(ids) - 1, 0) for ids in answer.choices[0].token_ids)


def _medians(runs: Runs) -> dict[int | str, Pairs]:
    """For every question its medians over runs: decoded tokens, decode time, all tokens, wall time, prefill time."""
    measured = defaultdict(list)
    for answer in (answer for run in runs for answer in run):
        choice = answer.choices[0]
        measured[answer.question_id].append((
            _num_decoded(answer), sum(choice.decode_time_s), sum(map(len, choice.token_ids)), sum(choice.wall_time),
            sum(choice.prefill_time_s),
        ))  # fmt: skip
    return {name: np.median(rows, axis=0) for name, rows in measured.items()}


def _deviation(values: Sequence[float]) -> float | None:
    return statistics.stdev(values) if len(values) > 1 else None
