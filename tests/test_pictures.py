"""Pictures of samples: what stands in a cell, how many pages, what the curves are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from stitchvm.pictures import (
    CELL,
    MARGIN,
    fonts,
    grid,
    grid_columns,
    quantiles,
    scores,
    trajectory,
    wrapped,
)

LONG = "an oil painting of a " + "very " * 40 + "old lighthouse"


def samples(root: Path, number: int, size: tuple[int, int] = (8, 8)) -> list[dict[str, Any]]:
    """Returns lines of samples, image n of which is one colour."""
    (root / "images").mkdir(exist_ok=True)
    found = []
    for n in range(number):
        file = f"images/{n}.png"
        Image.new("RGB", size, (n % 256, 255 - n % 256, 77)).save(root / file)
        prompt = LONG if n == 1 else f"prompt {n}"
        found.append(
            {"index": n, "prompt": prompt, "seed": 0, "file": file, "rewards": {"hps": 0.25 + n}}
        )
    return found


def test_every_sample_stands_in_its_cell(tmp_path: Path) -> None:
    lines = samples(tmp_path, 5)
    (path,) = grid(lines, tmp_path, tmp_path / "grid.png")
    page = np.asarray(Image.open(path)).astype(int)
    assert grid_columns(5) == 3 and page.shape[1] == MARGIN + 3 * (CELL + MARGIN)
    tops = [
        row
        for row in range(1, len(page))
        if (page[row, MARGIN + 5] != page[row - 1, MARGIN + 5]).any()
    ]
    first, second = tops[0], next(t for t in tops if (page[t, MARGIN + 5] == (3, 252, 77)).all())
    for n in range(5):
        top, left = (first, second)[n // 3], MARGIN + n % 3 * (CELL + MARGIN)
        cell = page[top : top + CELL, left : left + CELL]
        assert (cell == (n, 255 - n, 77)).all(), n
        assert page[top + CELL : top + CELL + 40, left : left + CELL].min() < 80, "no caption"
    assert (page[:, :MARGIN] == 255).all() and (page[:, -MARGIN:] == 255).all(), "clipped"
    assert (page[-3:] == 255).all(), "the last row of text is cut off"


def test_pages(tmp_path: Path) -> None:
    lines = samples(tmp_path, 131)
    pages = grid(lines, tmp_path, tmp_path / "grid.png")
    assert [page.name for page in pages] == ["grid.png", "grid_2.png", "grid_3.png"]
    widths = [Image.open(page).width for page in pages]
    assert widths == [MARGIN + 8 * (CELL + MARGIN)] * 2 + [MARGIN + 3 * (CELL + MARGIN)]
    assert len(grid(lines, tmp_path, tmp_path / "grid.png", pages=2)) == 2
    with pytest.raises(ValueError, match="nothing to draw"):
        grid([], tmp_path, tmp_path / "grid.png")


def test_samples_of_a_prompt_stand_in_a_row() -> None:
    assert [grid_columns(n) for n in (1, 2, 4, 9, 64)] == [1, 2, 2, 3, 8]
    assert grid_columns(64, 4) == 8 and grid_columns(64, 3) == 6 and grid_columns(3, 3) == 3
    assert grid_columns(64, 9) == 8 and grid_columns(10, 2) == 4 and grid_columns(64, 5) == 5


def test_oblong_images_keep_their_shape(tmp_path: Path) -> None:
    lines = samples(tmp_path, 1, size=(300, 150))
    (path,) = grid(lines, tmp_path, tmp_path / "grid.png")
    page = np.asarray(Image.open(path)).astype(int)
    coloured = (page == (0, 255, 77)).all(axis=2)
    assert coloured.any(axis=1).sum() == CELL // 2 and coloured.any(axis=0).sum() == CELL


def test_long_captions_are_cut_and_fit() -> None:
    font = fonts(15)
    rows = wrapped(LONG, font, 3)
    assert len(rows) == 3 and rows[-1].endswith("…") and rows[0].startswith("an oil painting")
    assert all(font.getlength(row) <= CELL for row in rows)
    (row,) = wrapped("x" * 300, font, 3)
    assert row.endswith("…") and font.getlength(row) <= CELL
    assert wrapped("two words", font, 3) == ["two words"]


def test_scores_and_verdicts() -> None:
    good = {"whole": 1.0, "count": 1.0, "colour": 1.0}
    bad = {"whole": 0.0, "count": 1.0, "colour": 0.5}
    none = {"whole": 0.0, "count": 0.0, "colour": 0.0}
    said = [scores({"rewards": {}, "checker": verdict})[0][0] for verdict in (good, bad, none)]
    assert said == ["✓ right", "✗ colour", "✗ no such scene"]
    assert scores({"rewards": {"a": 22.456, "b": -0.12345, "c": None}}) == [
        ("a 22.46", "#1a1a1a"),
        ("b -0.123", "#1a1a1a"),
        ("c –", "#1a1a1a"),
    ]


def test_trajectories(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved: list[Figure] = []
    plain = Figure.savefig
    monkeypatch.setattr(
        Figure, "savefig", lambda self, *a, **k: (saved.append(self), plain(self, *a, **k))
    )
    lines = [
        {
            "values": [[0.9, n], [0.5, 2.0 * n], [0.1, None]],
            "info": {"ess": [[0.9, 3.0]], "lam": [[0.9, 1.0]]},
            "final_value": 10.0 + n,
        }
        for n in range(11)
    ]
    path = trajectory(
        [*lines, {"values": []}], tmp_path / "deep" / "t.png", label="stitched value"
    )
    assert path.read_bytes().startswith(b"\x89PNG")
    value, ess = saved[0].axes
    mean = value.get_lines()[0]
    assert list(mean.get_xdata()) == [0.9, 0.5] and list(mean.get_ydata()) == [5.0, 10.0]
    assert value.get_xlim()[0] > value.get_xlim()[1], "noise is on the left"
    assert (value.get_ylabel(), ess.get_title()) == (
        "stitched value",
        "Effective sample size of the particles",
    )
    labels = [text.get_text() for text in saved[0].legends[0].get_texts()]
    assert set(labels) == {
        "mean of 11 samples",
        "10 to 90 %",
        "single samples",
        "final value, 10 to 90 %",
    }
    assert quantiles([line["values"] for line in lines])[0] == (0.9, 1.0, 5.0, 9.0)
    with pytest.raises(ValueError, match="nothing to draw"):
        trajectory([{"values": []}], tmp_path / "t.png")


def test_a_final_value_of_another_reward_has_an_axis_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **k: saved.append(self))
    lines = [{"values": [[0.9, n], [0.5, 2.0 * n]], "final_value": 1000.0 + n} for n in range(11)]
    trajectory(lines, tmp_path / "t.png", label="stitched value of A", final_label="final of B")
    value, final = saved[0].axes
    assert (value.get_ylabel(), final.get_ylabel()) == ("stitched value of A", "final of B")
    assert value.get_ylim()[1] < 30, "the other reward's numbers stretch the value's axis"
    assert final.get_ylim()[0] > 900 and final.yaxis.get_label_position() == "right"
    (diamond,) = (line for line in final.get_lines() if line.get_marker() == "D")
    assert (list(diamond.get_xdata()), list(diamond.get_ydata())) == ([0.0], [1005.0])
    assert final.get_xlim() == value.get_xlim()
    labels = [text.get_text() for text in saved[0].legends[0].get_texts()]
    assert len(labels) == 4 and "final value, 10 to 90 %" in labels
    trajectory(lines, tmp_path / "t.png", label="value")
    assert len(saved[1].axes) == 1 and saved[1].axes[0].get_ylim()[1] > 1000


@pytest.mark.parametrize("finals", [[0.1] * 3, [0.0] * 19 + [100.0], [100.0] * 19 + [0.0]])
def test_a_mean_outside_of_its_quantiles_is_drawn(tmp_path: Path, finals: list[float]) -> None:
    """Equal final values, whose mean rounds, and a few far ones, which carry it past 90 %."""
    middle = np.mean(finals)
    assert not np.quantile(finals, 0.1) <= middle <= np.quantile(finals, 0.9)
    lines = [{"values": [[0.9, 1.0]], "final_value": final} for final in finals]
    assert trajectory(lines, tmp_path / "t.png").stat().st_size > 5000
