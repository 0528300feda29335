"""The figures of a report, as SVG for a page that holds them."""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from kangaroo.bench.scores import MAX_CTAR, OVERALL

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

GREY = "#8a8f98"
COLOURS = ("#2f6fde", "#e8743b", "#19a979", "#945ecf", "#d64550", "#13a4b4", "#c9a227", "#6c8893", "#bf399e")
# Text stays text; its families have the widths that the layout is made with.
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "kangaroo",
    "font.sans-serif": ["DejaVu Sans", "Verdana"],
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.alpha": 0.3,
    "legend.frameon": False,
}
MAX_LENGTH = 12
# A height and the bounds of its interval.
Bar = tuple[float, float, float]


def draw_figures(report: dict[str, Any]) -> dict[str, str]:
    """SVG of every figure by its name; {} where matplotlib is not installed."""
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError:
        return {}
    drawings: dict[str, tuple[Callable[[Figure, dict[str, Any]], None], float]] = {
        "speedup": (_draw_speedups, 3.4),
        "tokens_per_step": (_draw_tokens_per_step, 3.2),
        "ctar": (_draw_ctar, 3.2),
        "accepted_lengths": (_draw_lengths, 1.1 * max(len(_others(report)), 1) + 0.6),
        "time": (_draw_time, 0.4 * len(report["drafters"]) + 1.2),
    }
    figures = {}
    with matplotlib.rc_context(STYLE):
        for name, (draw, height) in drawings.items():
            figure, buffer = Figure(figsize=(9, height), layout="constrained"), io.StringIO()
            draw(figure, report)
            figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
            figures[name] = re.sub(r"(?s)^.*?(?=<svg)", "", buffer.getvalue())
    return figures


def _others(report: dict[str, Any]) -> dict[str, str]:
    """The drafters but plain decoding, each with its colour, which is the same in all figures."""
    names = [name for name in report["drafters"] if name != report["baseline"]]
    return {name: COLOURS[index % len(COLOURS)] for index, name in enumerate(names)}


def _add_legend(figure: Figure) -> None:
    """Name what there is; a report of plain decoding alone has empty figures."""
    handles, labels = figure.axes[0].get_legend_handles_labels()
    if handles:
        figure.legend(handles, labels, loc="outside upper center", ncols=6)


def _draw_bars(axes: Axes, report: dict[str, Any], *, pick: Callable[[dict[str, Any]], Bar | None]) -> None:
    """Bars by task and drafter; pick turns a task's scores into a bar, or None."""
    colours = _others(report)
    width = 0.8 / max(len(colours), 1)
    for index, name in enumerate(colours):
        shift = (index - (len(colours) - 1) / 2) * width
        bars = [(place + shift, pick(report["drafters"][name]["tasks"][task]))
                for place, task in enumerate(report["tasks"])]  # fmt: skip
        shown = [(place, *picked) for place, picked in bars if picked is not None]
        places, heights, lows, highs = zip(*shown, strict=True) if shown else ((),) * 4
        axes.bar(places, heights, width * 0.92, color=colours[name], label=name)
        errors = [[max(0.0, h - low) for h, low in zip(heights, lows, strict=True)],
                  [max(0.0, high - h) for h, high in zip(heights, highs, strict=True)]]  # fmt: skip
        axes.errorbar(places, heights, errors, fmt="none", ecolor="#30343b", elinewidth=0.9)
    axes.axhline(1, color=GREY, linewidth=1, linestyle="--")
    axes.set_xticks(range(len(report["tasks"])), [task.replace("_", "\n") for task in report["tasks"]])


def _draw_speedups(figure: Figure, report: dict[str, Any]) -> None:
    def pick(scores: dict[str, Any]) -> Bar | None:
        score = scores["corrected"]
        if score is None:
            return None
        height = score["speedup"]
        return (height, height, height) if score["speedup_low"] is None else (
            height, score["speedup_low"], score["speedup_high"])  # fmt: skip

    axes = figure.subplots()
    _draw_bars(axes, report, pick=pick)
    axes.set_ylabel("speedup in decoding (corrected)")
    _add_legend(figure)


def _draw_tokens_per_step(figure: Figure, report: dict[str, Any]) -> None:
    def pick(scores: dict[str, Any]) -> Bar | None:
        height = scores["steps"]["tokens_per_step"]
        return None if height is None else (height, height, height)

    axes = figure.subplots()
    _draw_bars(axes, report, pick=pick)
    axes.set_ylabel("tokens per step")
    _add_legend(figure)


def _draw_ctar(figure: Figure, report: dict[str, Any]) -> None:
    axes = figure.subplots()
    positions = range(1, MAX_CTAR + 1)
    for name, colour in _others(report).items():
        ctar = report["drafters"][name]["tasks"][OVERALL]["steps"]["ctar"]
        if ctar is not None:
            axes.plot(positions, ctar, "o-", markersize=4, color=colour, label=name)
    axes.set(xlabel="first k drafted tokens", ylabel="CTAR@k", xticks=positions, ylim=(0, None))
    _add_legend(figure)


def _draw_lengths(figure: Figure, report: dict[str, Any]) -> None:
    """A row a drafter; the last bar holds all longer steps."""
    colours = _others(report) or {report["baseline"]: GREY}
    rows = figure.subplots(len(colours), sharex=True, sharey=True, squeeze=False)[:, 0]
    for axes, (name, colour) in zip(rows, colours.items(), strict=True):
        counts = report["drafters"][name]["tasks"][OVERALL]["steps"]["accepted_lengths"]
        shares = [0.0] * MAX_LENGTH
        for length, count in counts.items():
            shares[min(int(length), MAX_LENGTH) - 1] += count / sum(counts.values())
        axes.bar(range(1, MAX_LENGTH + 1), shares, 0.85, color=colour)
        axes.text(0.99, 0.8, name, transform=axes.transAxes, ha="right")
    labels = [*map(str, range(1, MAX_LENGTH)), f"{MAX_LENGTH}+"]
    rows[-1].set_xticks(range(1, MAX_LENGTH + 1), labels)
    rows[-1].set_xlabel("tokens a step emitted")
    figure.supylabel("share of steps", fontsize=9)


def _draw_time(figure: Figure, report: dict[str, Any]) -> None:
    axes = figure.subplots()
    splits = {name: drafter["tasks"][OVERALL]["time"] for name, drafter in report["drafters"].items()}
    shown = {name: split for name, split in reversed(splits.items()) if split is not None}
    starts = [0.0] * len(shown)
    for part, colour in (("draft", "#f2b134"), ("verify", "#1f4e79"), ("overhead", "#b9c0ca")):
        lengths = [split[f"{part}_share"] * split["ms_per_token"] for split in shown.values()]
        axes.barh(list(shown), lengths, 0.65, left=starts, color=colour, label=part)
        starts = [start + length for start, length in zip(starts, lengths, strict=True)]
    axes.set_xlabel("milliseconds per decoded token")
    axes.grid(axis="x", alpha=0.3)
    axes.grid(visible=False, axis="y")
    _add_legend(figure)
