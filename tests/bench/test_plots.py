"""What the figures of a report are drawn from is what report.json holds."""

from pathlib import Path
from typing import Any

import pytest
from matplotlib.axes import Axes

from kangaroo.bench import scores
from kangaroo.bench.plots import MAX_LENGTH, draw_figures
from kangaroo.bench.report import write_report
from tests.bench.test_report import ALL_TASKS, TOKENIZER, write_answers

OTHERS = ["kangaroo", "medusa"]


@pytest.fixture(scope="module")
def content(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return write_report(write_answers(tmp_path_factory.mktemp("report")), tokenizer=TOKENIZER)


@pytest.fixture
def calls(content: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> dict[str, list[tuple[Any, ...]]]:
    """The arguments of everything that is drawn, by method, a label behind them."""
    found: dict[str, list[tuple[Any, ...]]] = {"bar": [], "barh": [], "plot": [], "errorbar": []}

    def note(method: str) -> Any:
        draw = getattr(Axes, method)

        def drawn(self: Axes, *args: Any, **settings: Any) -> Any:
            # What barh draws with bar is noted already.
            if settings.get("orientation") != "horizontal":
                found[method].append((*args, settings.get("left"), settings.get("label")))
            return draw(self, *args, **settings)

        return drawn

    for method in found:
        monkeypatch.setattr(Axes, method, note(method))
    assert set(draw_figures(content)) == {"speedup", "tokens_per_step", "ctar", "accepted_lengths", "time"}
    return found


def overall(content: dict[str, Any], name: str, part: str) -> Any:
    return content["drafters"][name]["tasks"]["overall"][part]


def test_bars_by_task_are_speedups_and_tokens_per_step(content: dict[str, Any], calls: dict[str, Any]) -> None:
    for index, name in enumerate(OTHERS):
        tasks = content["drafters"][name]["tasks"]
        for part, figure, (places, heights, *_, label), errors in (
            ("corrected", "speedup", calls["bar"][index], calls["errorbar"][index]),
            ("steps", "tokens_per_step", calls["bar"][2 + index], calls["errorbar"][2 + index]),
        ):
            assert label == name
            assert list(heights) == [tasks[task][part][figure] for task in ALL_TASKS]
            # A drafter's bars stand beside the other's, around their task's tick.
            assert [round(place) for place in places] == list(range(len(ALL_TASKS)))
            assert (places[0] < 0) == (index == 0)
            assert (list(errors[0]), list(errors[1])) == (list(places), list(heights))
        below, above = calls["errorbar"][index][2]
        for place, task in enumerate(ALL_TASKS):
            score = tasks[task]["corrected"]
            bounds = [score["speedup"] if score[name] is None else score[name]
                      for name in ("speedup_low", "speedup_high")]  # fmt: skip
            assert [score["speedup"] - below[place], score["speedup"] + above[place]] == pytest.approx(bounds)


def test_lines_are_ctar(content: dict[str, Any], calls: dict[str, Any]) -> None:
    assert [(list(places), rates, label) for places, rates, _, _, label in calls["plot"]] == [
        (list(range(1, 9)), overall(content, name, "steps")["ctar"], name) for name in OTHERS
    ]


def test_bars_by_length_are_shares_of_steps_the_last_of_all_longer_ones(
    content: dict[str, Any], calls: dict[str, Any]
) -> None:
    for (lengths, shares, *_), name in zip(calls["bar"][4:], OTHERS, strict=True):
        counts = {int(length): count for length, count in overall(content, name, "steps")["accepted_lengths"].items()}
        expected = [counts.get(length, 0) / sum(counts.values()) for length in range(1, MAX_LENGTH)]
        assert list(lengths) == list(range(1, MAX_LENGTH + 1))
        assert shares == pytest.approx([*expected, 1 - sum(expected)])


def test_long_steps_share_the_last_bar(content: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[list[float]] = []
    bar = Axes.bar
    monkeypatch.setattr(Axes, "bar", lambda self, *args, **settings: (drawn.append(args[1]) if args else None,
                                                                      bar(self, *args, **settings))[1])  # fmt: skip
    steps = overall(content, "medusa", "steps")
    monkeypatch.setitem(steps, "accepted_lengths", {"1": 2, str(MAX_LENGTH): 1, str(MAX_LENGTH + 5): 1})
    draw_figures(content)
    assert [0.5, *[0.0] * (MAX_LENGTH - 2), 0.5] in [list(shares) for shares in drawn]


def test_stacked_bars_are_the_parts_of_a_tokens_time(content: dict[str, Any], calls: dict[str, Any]) -> None:
    starts = [0.0] * 3
    for (names, lengths, _, left, label), part in zip(calls["barh"], ("draft", "verify", "overhead"), strict=True):
        assert (names, label) == (["medusa", "kangaroo", "plain"], part)
        splits = [overall(content, name, "time") for name in names]
        assert left == pytest.approx(starts)
        assert lengths == [one[f"{part}_share"] * one["ms_per_token"] for one in splits]
        starts = [start + length for start, length in zip(starts, lengths, strict=True)]
    assert starts == pytest.approx([one["ms_per_token"] for one in splits])


@pytest.mark.parametrize("bounds", [(50.0, 60.0), (0.0, 0.1)])
def test_an_interval_beside_its_score_is_drawn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bounds: tuple[float, float]
) -> None:
    monkeypatch.setattr(scores, "bootstrap_speedup", lambda *_: bounds)
    assert write_report(write_answers(tmp_path), tokenizer=TOKENIZER)
    assert (tmp_path / "report.html").read_text().count("<svg") == 5
