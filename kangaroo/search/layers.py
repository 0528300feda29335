"""The search for the sublayers to skip: candidates from a sampler of Optuna or by greedy dropping, and the best."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

from kangaroo.model.skips import NO_SKIPS, SkippedSublayers
from kangaroo.search.objectives import Objective, Score
from kangaroo.search.plan import SearchPlan

if TYPE_CHECKING:
    import optuna


class Trial(NamedTuple):
    """A candidate that was judged."""

    number: int
    skips: SkippedSublayers
    score: Score


def run_search(study: optuna.Study, objective: Objective, *, plan: SearchPlan, num_trials: int) -> Iterator[Trial]:
    """Judge candidates until the study holds num_trials; yields each.

    The first of tpe, gp and greedy is the target itself, of which nothing is skipped.
    """
    import optuna

    names = sublayer_names(plan.num_layers)
    # The sampler works in memory, and what is judged is stored whole: SQLite waits for the disk at every sublayer.
    working = optuna.create_study(direction="maximize", sampler=study.sampler)
    working.add_trials(study.get_trials(states=[optuna.trial.TrialState.COMPLETE]))
    while len(done := finished_trials(working)) < num_trials:
        if plan.sampler == "greedy":
            proposed = propose_greedily({one.skips: one.score.value for one in done}, plan.num_layers)
            if proposed is None:
                return
            working.enqueue_trial(_to_params(proposed, plan.num_layers))
        elif plan.sampler != "random" and not done:
            working.enqueue_trial(dict.fromkeys(names, 0))
        trial = working.ask()
        skips = _to_skips({name: trial.suggest_int(name, 0, 1) for name in names})
        # Where nothing is left, nothing can draft.
        is_empty = skips.num_skipped == len(names)
        score = Score(0.0, 0.0, 1.0, plan.gamma, None) if is_empty else objective.score(skips)
        trial.set_user_attr("score", score.to_dict())
        study.add_trial(working.tell(trial, score.value))
        yield Trial(trial.number, skips, score)


def finished_trials(study: optuna.Study) -> list[Trial]:
    """Every candidate that was judged, in order."""
    return [
        Trial(one.number, _to_skips(one.params), Score(**one.user_attrs["score"]))
        for one in study.get_trials(deepcopy=False)
        if one.state.is_finished()
    ]


def propose_greedily(values: Mapping[SkippedSublayers, float], num_layers: int) -> SkippedSublayers | None:
    """Greedy dropping: skip one more sublayer than the best of its round, each of the others tried in turn.

    values: of everything tried so far, which alone decides what comes next; None where one sublayer is left.
    """
    if NO_SKIPS not in values:
        return NO_SKIPS
    dropped = NO_SKIPS
    while dropped.num_skipped < 2 * num_layers - 1:
        larger = [_add(dropped, name) for name in sublayer_names(num_layers) if not _holds(dropped, name)]
        untried = next((one for one in larger if one not in values), None)
        if untried is not None:
            return untried
        dropped = max(larger, key=lambda one: values[one])
    return None


def pick_best(trials: Sequence[Trial], count: int) -> list[Trial]:
    """The best few candidates that differ."""
    ranked = sorted(trials, key=lambda one: one.score.value, reverse=True)
    distinct = {one.skips: one for one in reversed(ranked) if one.score.value > 0}
    return sorted(distinct.values(), key=lambda one: one.score.value, reverse=True)[:count]


def find_pareto_front(trials: Sequence[Trial]) -> list[Trial]:
    """Those of which no other skips as much and accepts more, or more and as much; the one that skips least first."""
    front: list[Trial] = []
    for one in sorted(trials, key=lambda one: (one.skips.num_skipped, one.score.acceptance), reverse=True):
        if not front or one.score.acceptance > front[-1].score.acceptance:
            front.append(one)
    return front[::-1]


def digest(prompts: Sequence[Sequence[int]]) -> str:
    """Short hash of token ids."""
    return hashlib.sha256(json.dumps([list(one) for one in prompts]).encode()).hexdigest()[:16]


def sublayer_names(num_layers: int) -> list[str]:
    """The parameters of a candidate, 1 where the sublayer is skipped: attention_0 and on, then mlp_0 and on."""
    return [f"{kind}_{layer}" for kind, layer in itertools.product(("attention", "mlp"), range(num_layers))]


def _to_skips(params: Mapping[str, int]) -> SkippedSublayers:
    skipped = [name.split("_") for name, value in params.items() if value]
    return SkippedSublayers(*(frozenset(int(i) for kind, i in skipped if kind == one) for one in ("attention", "mlp")))


def _to_params(skips: SkippedSublayers, num_layers: int) -> dict[str, int]:
    return {name: int(_holds(skips, name)) for name in sublayer_names(num_layers)}


def _holds(skips: SkippedSublayers, name: str) -> bool:
    kind, layer = name.split("_")
    return int(layer) in (skips.attention if kind == "attention" else skips.mlp)


def _add(skips: SkippedSublayers, name: str) -> SkippedSublayers:
    kind, layer = name.split("_")
    if kind == "attention":
        return SkippedSublayers(skips.attention | {int(layer)}, skips.mlp)
    return SkippedSublayers(skips.attention, skips.mlp | {int(layer)})
