"""What a search leaves: the skip list, a report, and a picture of its history and its Pareto front."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kangaroo.bench.record import stamp
from kangaroo.errors import OutputError, SettingsError
from kangaroo.model.skips import SKIP_FILE, SkippedSublayers, write_skip_layers
from kangaroo.search.layers import Trial, find_pareto_front
from kangaroo.search.objectives import Validated
from kangaroo.search.plan import SearchPlan

if TYPE_CHECKING:
    from matplotlib.figure import Figure

REPORT_FILE, PLOT_FILE = "report.json", "search.png"
RESULTS = (SKIP_FILE, REPORT_FILE, PLOT_FILE)


def make_report(plan: SearchPlan, trials: Sequence[Trial], *, validated: Sequence[Validated],
                costs: dict[str, object] | None, device: str = "cpu") -> dict[str, Any]:  # fmt: skip
    """The search as JSON; validated: as validate() returns it, the winner first; device: cpu or cuda, it ran there."""
    return {
        "plan": asdict(plan),
        "stamp": stamp(device),
        "costs": costs,
        "num_trials": len(trials),
        "validated": [
            {"skips": one.skips.to_dict(), "score": one.score.to_dict(), "speedup": one.speedup,
             "tokens_per_step": one.tokens_per_step, "acceptance_rate": one.acceptance_rate}
            for one in validated
        ],
        "pareto_front": [_describe(one, plan.num_layers) for one in find_pareto_front(trials)],
        "values": [one.score.value for one in trials],
    }  # fmt: skip


def write_results(output: Path, report: dict[str, Any], *, trials: Sequence[Trial], skips: SkippedSublayers) -> None:
    """Write all of RESULTS into the folder, over those of an earlier part of the search."""
    write_skip_layers(output / SKIP_FILE, {Path(report["plan"]["model"]).name: skips})
    try:
        (output / REPORT_FILE).write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        plot(output / PLOT_FILE, trials, plan=report["plan"])
    except OSError as error:
        raise OutputError(f"cannot write to {output}: {error.strerror or error}; give another --output") from error


def plot(path: Path, trials: Sequence[Trial], *, plan: dict[str, Any]) -> None:
    """Draw every trial's value with the best so far, and skipped share against acceptance with the Pareto front."""
    figure = import_figure()(figsize=(11, 4.5), layout="constrained")
    history, shares = figure.subplots(1, 2)
    values = [one.score.value for one in trials]
    history.plot(values, ".", color="tab:gray", label="trial")
    history.plot(list(accumulate(values, max)), color="tab:blue", label="best so far")
    history.set(xlabel="trial", ylabel=plan["objective"].replace("_", " "), title=f"sampler {plan['sampler']}")
    history.legend()
    for some, style, label in ((trials, ".", "trial"), (find_pareto_front(trials), "o-", "Pareto front")):
        points = [(one.skips.num_skipped / (2 * plan["num_layers"]), one.score.acceptance) for one in some]
        shares.plot(*zip(*points, strict=True), style, color="tab:gray" if style == "." else "tab:blue", label=label)
    shares.set(xlabel="skipped share of sublayers", ylabel="acceptance", title="skipped against accepted")
    shares.legend()
    figure.savefig(path, dpi=120)


def import_figure() -> type[Figure]:
    """What plots are drawn on; raises SettingsError without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise SettingsError("the plot needs matplotlib, which is not installed; "
                            "pip install 'kangaroo-decoding[search]'") from error  # fmt: skip
    return Figure


def _describe(trial: Trial, num_layers: int) -> dict[str, Any]:
    share = trial.skips.num_skipped / (2 * num_layers)
    return {"skipped_share": share, **trial.score.to_dict(), "skips": trial.skips.to_dict()}
