"""Mean and band, the cost to a level and the ratios by hand; what is drawn."""

from __future__ import annotations

from typing import Any

import pytest

from stitchvm.training_curves import (
    cost_to_reach,
    equal_level,
    mean_curve,
    summaries,
    training_curves,
)


def points(method: str, run: int, line: list[tuple[float, float]], metric: str = "val/hps") -> Any:
    keys = {"method": method, "run": run, "metric": metric}
    return [keys | {"step": k, "seconds": x, "value": y} for k, (x, y) in enumerate(line)]


def run(*line: tuple[float, float]) -> dict[int, tuple[float, float]]:
    return dict(enumerate(line))


SLOW = [(0.0, 1.0), (10.0, 2.0), (20.0, 3.0)]
FAST = [(0.0, 1.0), (4.0, 3.0), (8.0, 2.0), (12.0, 5.0)]


def test_the_first_crossing_counts():
    assert cost_to_reach(run(*SLOW), 2.5) == 15.0
    assert cost_to_reach(run(*SLOW), 3.0) == 20.0
    assert cost_to_reach(run(*SLOW), 3.1) is None
    assert cost_to_reach(run(*SLOW), 1.0) == 0.0 and cost_to_reach(run(*SLOW), 0.5) == 0.0
    assert cost_to_reach(run(*FAST), 2.5) == 3.0  # although it falls below again
    assert cost_to_reach(run(*FAST), 3.5) == 10.0


def test_equal_reward_is_what_all_runs_reach():
    slow, fast = run(*SLOW), run(*FAST)
    assert equal_level({"a": [slow], "b": [fast]}) == 3.0
    assert equal_level({"a": [slow, run((0.0, 0.0), (1.0, 2.2), (2.0, 1.0))], "b": [fast]}) == 2.2


def test_mean_and_band_of_seeds_with_costs_of_their_own():
    one = {0: (0.0, 1.0), 10: (10.0, 3.0), 20: (20.0, 5.0)}
    two = {0: (0.0, 1.0), 5: (6.0, 9.0), 10: (12.0, 5.0)}  # not yet at 20
    # standard deviation of (3, 5) is √2, over √2
    assert mean_curve([one, two]) == [(0.0, 1.0, 0.0), (11.0, 4.0, pytest.approx(1.0))]
    assert mean_curve([one]) == [(x, y, None) for x, y in one.values()]


def test_costs_to_a_level_and_their_ratios():
    records = [*points("slow", 0, SLOW), *points("fast", 0, FAST)]
    slow, fast = summaries(records, "val/hps", "seconds")
    assert (slow["level"], slow["cost_to_level"], slow["ratio"]) == (3.0, 20.0, 1.0)
    assert (fast["cost_to_level"], fast["ratio"]) == (4.0, 5.0)
    assert (fast["value"], fast["cost"], fast["stderr"], fast["runs"]) == (5.0, 12.0, None, 1)
    slow, fast = summaries(records, "val/hps", "seconds", level=2.0, against="fast")
    assert (slow["cost_to_level"], fast["cost_to_level"], slow["ratio"]) == (10.0, 2.0, 0.2)
    slow, fast = summaries(records, "val/hps", "seconds", level=4.0)  # the first never gets there
    assert slow["cost_to_level"] is slow["ratio"] is fast["ratio"] is None
    assert fast["cost_to_level"] == pytest.approx(8 + 4 * 2 / 3)


def test_seeds_are_averaged_and_one_that_fails_is_not_left_out():
    records = [*points("slow", 0, SLOW), *points("fast", 0, FAST)]
    records += points("fast", 1, [(0.0, 1.0), (8.0, 4.0)])
    _, fast = summaries(records, "val/hps", "seconds", level=3.0)
    mean = (4 + 8 * 2 / 3) / 2
    assert fast["cost_to_level"] == pytest.approx(mean) and fast["ratio"] == pytest.approx(
        20 / mean
    )
    assert fast["cost_to_level_stderr"] == pytest.approx(abs(4 - 8 * 2 / 3) / 2)
    assert (fast["value"], fast["stderr"], fast["runs"]) == (4.5, pytest.approx(0.5), 2)
    _, fast = summaries(records, "val/hps", "seconds", level=4.5)
    assert fast["cost_to_level"] is None


def test_what_cannot_be_compared():
    records = points("slow", 0, SLOW)
    with pytest.raises(ValueError, match=r"slow has no cpu_seconds in its logs.*--x step"):
        summaries(records, "val/hps", "cpu_seconds")
    with pytest.raises(ValueError, match=r"no run has a value of val/clip"):
        summaries(records, "val/clip", "seconds")
    with pytest.raises(
        ValueError, match=r"no method 'fast' to compare with: expected one of slow"
    ):
        summaries(records, "val/hps", "seconds", against="fast")
    with pytest.raises(ValueError, match="nothing to draw"):
        training_curves([], "x.png")


def test_a_panel_per_metric_with_bands_and_levels(tmp_path, monkeypatch):
    import matplotlib.figure

    drawn: list[Any] = []
    monkeypatch.setattr(
        matplotlib.figure.Figure, "savefig", lambda self, *_, **__: drawn.append(self)
    )
    records = []
    for metric in ("val/hps", "val/clip"):
        records += points("slow", 0, [(3600 * x, y) for x, y in SLOW], metric)
        records += points("fast", 0, [(3600 * x, y) for x, y in FAST], metric)
        records += points("fast", 1, [(3600 * x, y + 1) for x, y in FAST], metric)
    path = training_curves(records, tmp_path / "a.png", x="seconds", levels={"val/hps": 3.0})
    assert path == tmp_path / "a.png"
    (figure,) = drawn
    hps, clip = figure.axes
    assert (hps.get_title(), clip.get_title()) == ("val/hps", "val/clip")
    assert hps.get_xlabel() == "hours"
    slow, fast, level = hps.lines
    assert list(slow.get_xdata()) == [0, 10, 20] and list(slow.get_ydata()) == [1, 2, 3]
    assert list(fast.get_xdata()) == [0, 4, 8, 12] and list(fast.get_ydata()) == [
        1.5,
        3.5,
        2.5,
        5.5,
    ]
    assert list(level.get_ydata()) == [3.0, 3.0] and len(clip.lines) == 2
    (band,) = hps.collections  # of the method with two runs: ± √½/√2
    heights = band.get_paths()[0].vertices[:, 1]
    assert heights.min() == pytest.approx(1.0) and heights.max() == pytest.approx(6.0)
    assert slow.get_color() != fast.get_color() and slow.get_marker() != fast.get_marker()
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["slow", "fast"]
