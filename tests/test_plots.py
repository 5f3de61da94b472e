"""The plots draw what the records say; each picture is opened, and its parts are looked at."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from matplotlib.figure import Figure

from stitchvm.plots import heatmap, retention_curves, style_of, sweep_curves

SIGMAS = (0.1, 0.25, 0.5, 0.75, 0.9)


def curves() -> list[dict]:
    out = [
        {"metric": m, "estimator": "clean", "sigma": None, "value": 0.6, "stderr": 0.01, "n": 100}
        for m in ("retrieval/image_to_text_r1", "aesthetic/srcc")
    ]
    for metric in ("retrieval/image_to_text_r1", "aesthetic/srcc", "truth/r2"):
        for name, speed in (("stitched", 4), ("tweedie", 2), ("mine", 3)):
            out += [
                {
                    "metric": metric,
                    "estimator": name,
                    "sigma": s,
                    "value": 0.6 * (1 - s**speed),
                    "stderr": 0.01,
                }
                for s in SIGMAS
            ]
    return out


@pytest.fixture
def figure(monkeypatch) -> list[Figure]:
    """Keeps the figures that are saved."""
    saved: list[Figure] = []
    plain = Figure.savefig

    def savefig(self, *args, **kwargs):
        saved.append(self)
        return plain(self, *args, **kwargs)

    monkeypatch.setattr(Figure, "savefig", savefig)
    return saved


def test_retention_curves_show_every_estimator(tmp_path: Path, figure: list[Figure]) -> None:
    path = retention_curves(curves(), tmp_path / "deep" / "curve.png", title="Two metrics")
    assert path.read_bytes().startswith(b"\x89PNG")
    axes = figure[0].axes
    assert [axis.get_title() for axis in axes] == [
        "Retrieval, image → text",
        "Aesthetic score",
        "Against Monte Carlo truth",
    ]
    assert all(axis.get_xlabel() and axis.get_ylabel() for axis in axes)
    labels = [text.get_text() for text in figure[0].legends[0].get_texts()]
    assert sorted(labels) == sorted(["stitched", "Tweedie", "mine", "clean reward"])
    line = axes[0].get_lines()[0]
    assert list(line.get_xdata()) == list(SIGMAS)
    assert line.get_ydata()[0] == pytest.approx(60 * (1 - 0.1**4))
    dashed = [x for x in axes[0].get_lines() if x.get_linestyle() == "--"]
    assert dashed[0].get_ydata()[0] == pytest.approx(60)
    with pytest.raises(ValueError, match="nothing to draw"):
        retention_curves(curves()[:2], tmp_path / "x.png")


def test_benchmarks_have_panels_of_their_own(tmp_path: Path, figure: list[Figure]) -> None:
    both = [r | {"benchmark": name} for name in ("coco", "flickr") for r in curves()]
    retention_curves(both, tmp_path / "curve.png", metrics=["aesthetic/srcc"])
    assert [axis.get_title().split("\n")[0] for axis in figure[0].axes] == ["coco", "flickr"]


def test_unknown_estimators_have_colours_of_their_own() -> None:
    styles = style_of(["stitched", *(f"x{k}" for k in range(30))])
    assert len({styles[f"x{k}"][1:] for k in range(12)}) == 12
    assert styles["stitched"][0] == "stitched"


def test_heatmap_marks_the_lowest_cell_of_the_region(tmp_path: Path, figure: list[Figure]) -> None:
    cells = [
        {
            "i": i,
            "j": j,
            "feature_loss": 0.02 * j + 0.001 * i,
            "embedding_error": None,
            "r1": 50 - i - j,
        }
        for i in range(1, 9)
        for j in (1, 2, 3, 4, 5, 6)
    ]
    cells[-1]["feature_loss"] = 1e-5
    path = heatmap(cells, tmp_path / "grid.png", values=("feature_loss", "embedding_error", "r1"))
    assert path.read_bytes().startswith(b"\x89PNG")
    panels = [axis for axis in figure[0].axes if axis.get_ylabel() == "reward block j"]
    assert [axis.get_title() for axis in panels] == ["Held-out feature loss ↓", "r1 ↑"]
    box = panels[0].patches[0]
    # the lowest with j ≤ 4 is (1, 1), although (8, 6) is lower
    assert box.get_xy() == (-0.5, -0.5)
    assert [tick.get_text() for tick in panels[0].get_xticklabels()] == [
        str(i) for i in range(1, 9)
    ]
    assert len(panels[0].texts) == 48
    heatmap(cells, tmp_path / "grid.png", selected=(3, 2), region=None)
    assert figure[1].axes[0].patches[0].get_xy() == (1.5, 0.5)
    with pytest.raises(ValueError, match="nothing to draw"):
        heatmap(cells, tmp_path / "x.png", values=("embedding_error",))


def test_a_hole_in_the_grid_stays_empty(tmp_path: Path, figure: list[Figure]) -> None:
    cells = [{"i": 1, "j": 1, "feature_loss": 0.5}, {"i": 2, "j": 2, "feature_loss": math.nan}]
    assert heatmap(cells, tmp_path / "grid") == tmp_path / "grid.png"
    assert (tmp_path / "grid.png").is_file()
    assert [text.get_text() for text in figure[0].axes[0].texts] == ["0.500"]
    named = [text.get_text() for text in figure[0].legends[0].get_texts()]
    assert named == ["selected (i*, j*) = (1, 1)", "not measured"]


def sweep(method: str, value: str | None, settings: list) -> list[dict]:
    return [
        {"metric": metric, "method": method, "value_estimator": value, "parameter": "strength"}
        | {"setting": setting, "value": k + 0.5, "stderr": 0.1}
        for metric in ("clip", "average gain")
        for k, setting in enumerate(settings)
    ]


def test_sweep_curves_draw_settings_in_order(figure, tmp_path: Path) -> None:
    failed = {"metric": "clip", "setting": 1e9, "value": None, "error": "not finite"}
    records = [
        *sweep("guided", "stitched", [0, 4, 0.5]),
        *sweep("guided", "tweedie", [0, 0.01]),
        failed,
    ]
    path = sweep_curves(records, tmp_path / "sweep.png")
    assert path.stat().st_size > 5000
    clip, average = figure[-1].axes
    assert (clip.get_title(), average.get_title()) == ("clip", "average gain")
    stitched, tweedie = (container[0] for container in clip.containers)
    assert stitched.get_xdata().tolist() == [0, 0.5, 4]
    assert stitched.get_ydata().tolist() == [0.5, 2.5, 1.5]
    assert tweedie.get_color() == style_of(["tweedie"])["tweedie"][1]
    assert clip.get_xlabel() == "strength" and clip.get_xscale() == "symlog"


def test_sweep_curves_of_words_and_of_two_methods_with_one_value(figure, tmp_path: Path) -> None:
    records = [
        *sweep("guided", "stitched", [[0, 0.5], [0.5, 1]]),  # as sweep.json has them
        *sweep("fk", "stitched", [[0, 0.5]]),
    ]
    sweep_curves(records, tmp_path / "sweep.png")
    axis = figure[-1].axes[0]
    assert [label.get_text() for label in axis.get_xticklabels()] == ["[0, 0.5]", "[0.5, 1]"]
    one, other = (container[0] for container in axis.containers)
    assert one.get_color() != other.get_color()
    with pytest.raises(ValueError, match="nothing to draw"):
        sweep_curves([{"metric": "clip", "value": 1.0}], tmp_path / "none.png")
