"""The plots of the paper's Figures 2 and 6, drawn from records.

Colours are fixed by estimator and told apart by markers too, so that plots of different runs read alike.
matplotlib is imported when something is drawn.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from stitchvm.tables import ordered

Record = Mapping[str, Any]

# name → (label, colour, marker), colours from the Okabe–Ito palette
STYLES: dict[str, tuple[str, str, str]] = {
    "stitched": ("stitched", "#0072B2", "o"),
    "vae_stitch": ("VAE stitch", "#555555", "s"),
    "tweedie": ("Tweedie", "#D55E00", "^"),
    "monte_carlo": ("Monte Carlo", "#009E73", "D"),
    "terminal": ("terminal", "#CC79A7", "v"),
}
SPARE = ("#E69F00", "#56B4E9", "#CC79A7", "#000000")

# The panels of `retention_curves`, those that the records have: metric → (title, axis, as a percentage).
PANELS: dict[str, tuple[str, str, bool]] = {
    "retrieval/image_to_text_r1": ("Retrieval, image → text", "Recall@1 (%)", True),
    "retrieval/text_to_image_r1": ("Retrieval, text → image", "Recall@1 (%)", True),
    "retrieval/mean_r1": ("Retrieval, mean of both ways", "Recall@1 (%)", True),
    "preference/hpdv2": ("Preference (HPDv2 protocol)", "Accuracy (%)", True),
    "preference/imagereward": ("Preference (ImageReward protocol)", "Accuracy (%)", True),
    "aesthetic/srcc": ("Aesthetic score", "SRCC", False),
    "clean_agreement/srcc": ("Agreement with the clean reward", "SRCC", False),
    "truth/r2": ("Against Monte Carlo truth", "R²", False),
}
# Panels of `heatmap` whose lower values are better, with their titles; other values are the higher the better.
LOSSES = {
    "feature_loss": "Held-out feature loss",
    "fit_loss": "Feature loss on the probes",
    "unexplained": "Held-out variance unexplained",
    "embedding_error": "Embedding error through the frozen tail",
}


def retention_curves(
    records: Iterable[Record],
    path: str | Path,
    *,
    metrics: Sequence[str] | None = None,
    title: str | None = None,
) -> Path:
    """Draws a metric against the noise level for every estimator, the clean reward dashed (Figure 2).

    Arguments:
        records: Evaluation records.
        path: The picture's file; its suffix is the format. It is replaced if it is there.
        metrics: The metrics to draw, one panel each; by default those of `PANELS` that there are.
        title: A line above all panels.

    Raises:
        ValueError: If no record has one of the metrics.
    """
    from matplotlib.figure import Figure

    records = [r for r in records if "metric" in r]
    # both ways have panels of their own: their mean is drawn when asked for
    usual = [name for name in PANELS if name != "retrieval/mean_r1"]
    wanted = list(usual if metrics is None else metrics)
    names = dict.fromkeys(r.get("benchmark") for r in records)
    noisy = {(r.get("benchmark"), r["metric"]) for r in records if r.get("sigma") is not None}
    chosen = [(name, metric) for metric in wanted for name in names if (name, metric) in noisy]
    if not chosen:
        raise ValueError(
            f"no record has a noise level and one of the metrics {wanted}: nothing to draw."
        )
    columns = min(len(chosen), 4)
    rows = -(-len(chosen) // columns)
    figure = Figure(figsize=(max(3.4 * columns, 5.0), 2.9 * rows + 0.9), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).flatten()
    styles = style_of(ordered(r["estimator"] for r in records if r.get("sigma") is not None))
    for axis, (name, metric) in zip(axes, chosen, strict=False):
        mine = [r for r in records if (r.get("benchmark"), r["metric"]) == (name, metric)]
        _retention_panel(axis, mine, metric, styles)
        if len(names) > 1 and name:
            axis.set_title(f"{name}\n{axis.get_title()}", fontsize=10)
    for axis in axes[len(chosen) :]:
        axis.remove()
    handles: dict[str, Any] = {}
    for axis in axes[: len(chosen)]:
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    legend_below(figure, handles, width=1.7)
    if title:
        figure.suptitle(title)
    return save_figure(figure, path)


def sweep_curves(records: Iterable[Record], path: str | Path, *, title: str | None = None) -> Path:
    """Draws every metric against the settings of a swept parameter, one line per method and value.

    Arguments:
        records: The records of one or several sweep.json.
        path: The picture's file; it is replaced if it is there.
        title: A line above all panels.

    Raises:
        ValueError: If no record has a setting.
    """
    from matplotlib.figure import Figure

    kept = [
        # a list or mapping stands on the axis as text
        {**r, "setting": str(r["setting"])} if isinstance(r["setting"], (list, dict)) else r
        for r in records
        if "setting" in r and r.get("value") is not None
    ]
    if not kept:
        raise ValueError("no record has a setting and a value: nothing to draw.")
    metrics = list(dict.fromkeys(r["metric"] for r in kept))
    rows = -(-len(metrics) // 4)
    columns = -(-len(metrics) // rows)  # 5 panels are 3 and 2, not 4 and 1
    figure = Figure(figsize=(max(3.4 * columns, 5.0), 2.9 * rows + 0.9), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).flatten()
    lines = list(dict.fromkeys((r.get("method"), r.get("value_estimator")) for r in kept))
    for axis, metric in zip(axes, metrics, strict=False):
        mine = [r for r in kept if r["metric"] == metric]
        _sweep_panel(axis, mine, lines)
        axis.set_title(metric, fontsize=10)
    for axis in axes[len(metrics) :]:
        axis.remove()
    handles, labels = axes[0].get_legend_handles_labels()
    legend_below(figure, dict(zip(labels, handles, strict=True)), width=1.7)
    if title:
        figure.suptitle(title)
    return save_figure(figure, path)


def _sweep_panel(axis: Any, records: Sequence[Record], lines: Sequence[tuple[Any, Any]]) -> None:
    settings = list(dict.fromkeys(r["setting"] for r in records))
    numeric = all(isinstance(x, (int, float)) and not isinstance(x, bool) for x in settings)
    place = {x: x if numeric else k for k, x in enumerate(settings)}
    values = [value for _, value in lines]
    names = [value if value and values.count(value) == 1 else f"{m} {value}" for m, value in lines]
    styles = style_of(names)
    for (method, value), (_, colour, marker) in zip(lines, styles.values(), strict=True):
        line = [
            r for r in records if (r.get("method"), r.get("value_estimator")) == (method, value)
        ]
        line = sorted(line, key=lambda r: place[r["setting"]])
        axis.errorbar(
            [place[r["setting"]] for r in line],
            [r["value"] for r in line],
            yerr=[r.get("stderr") or 0 for r in line],
            color=colour,
            marker=marker,
            markersize=4.5,
            linewidth=1.6,
            elinewidth=0.8,
            capsize=2,
            label=" + ".join(str(name) for name in (method, value) if name) or "sampler",
        )
    positive = [x for x in place.values() if x > 0]
    if numeric and positive and max(positive) > 20 * min(positive):
        axis.set_xscale("symlog", linthresh=min(positive))
    elif not numeric:
        axis.set_xticks(list(place.values()), [str(x) for x in place])
    axis.set_xlabel(str(records[0].get("parameter", "setting")))
    axis.grid(color="#dddddd", linewidth=0.6)
    axis.set_axisbelow(True)


def legend_below(figure: Any, handles: Mapping[str, Any], width: float) -> None:
    """Puts a legend under the panels, in as many columns of a width in inches as fit."""
    figure.legend(
        list(handles.values()),
        list(handles),
        loc="outside lower center",
        ncols=max(int(figure.get_figwidth() // width), 1),
        frameon=False,
    )


def style_of(names: Sequence[str]) -> dict[str, tuple[str, str, str]]:
    """Returns label, colour and marker of every estimator; unknown ones take spare colours in order."""
    spare = iter([(colour, marker) for marker in "XP*" for colour in SPARE])
    return {n: STYLES[n] if n in STYLES else (n, *next(spare, ("#000000", "x"))) for n in names}


def _retention_panel(
    axis: Any, records: Sequence[Record], metric: str, styles: Mapping[str, tuple[str, str, str]]
) -> None:
    title, label, percent = PANELS.get(metric, (metric, metric, False))
    factor = 100 if percent else 1
    for name, (text, colour, marker) in styles.items():
        line = [r for r in records if r["estimator"] == name and r["value"] is not None]
        line = sorted((r for r in line if r["sigma"] is not None), key=lambda r: r["sigma"])
        if line:
            axis.errorbar(
                [r["sigma"] for r in line],
                [factor * r["value"] for r in line],
                yerr=[factor * (r.get("stderr") or 0) for r in line],
                color=colour,
                marker=marker,
                markersize=4.5,
                linewidth=1.6,
                elinewidth=0.8,
                capsize=2,
                label=text,
                zorder=3 if name == "stitched" else 2,
            )
    clean = [r for r in records if r.get("sigma") is None and r["value"] is not None]
    for record in clean[:1]:
        axis.axhline(
            factor * record["value"],
            color="black",
            linestyle="--",
            linewidth=1.2,
            label="clean reward",
        )
    levels = sorted({r["sigma"] for r in records if r["sigma"] is not None})
    axis.set_xticks(levels, [f"{level:g}" for level in levels])
    axis.set_xlabel("noise level σ")
    axis.set_ylabel(label)
    axis.set_title(title, fontsize=10)
    axis.grid(color="#dddddd", linewidth=0.6)
    axis.set_axisbelow(True)
    if metric.startswith("retrieval/"):
        axis.set_ylim(bottom=0)
    if metric.startswith("truth/r2"):
        # R² is at most 1, and far below the best constant the exact place says nothing: both, or their
        # error bars, would flatten the rest
        axis.set_ylim(max(-1.0, min(0.0, axis.get_ylim()[0])), 1.05)


def heatmap(
    records: Iterable[Record],
    path: str | Path,
    *,
    values: Sequence[str] = ("feature_loss", "embedding_error"),
    selected: tuple[int, int] | None = None,
    region: int | None = 4,
    title: str | None = None,
) -> Path:
    """Draws stage 1's grid, reward block j down and backbone block i across (Figure 6).

    A box is the selected cell (i*, j*), a dashed line the end of the search region j ≤ `region`.

    Arguments:
        records: The records of search.json, with keys i, j and the values.
        path: The picture's file; it is replaced if it is there.
        values: The keys to draw, one panel each; those that no record has are left out.
        selected: The cell (i*, j*); by default the lowest of the first value inside the region.
        region: The largest j of the search region; None for the whole grid.
        title: A line above all panels.

    Raises:
        ValueError: If no record has i, j and one of the values.
    """
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    cells = [r for r in records if "i" in r and "j" in r]
    chosen = [v for v in values if any(r.get(v) is not None for r in cells)]
    if not chosen:
        raise ValueError(f"no record has i, j and one of {list(values)}: nothing to draw.")
    columns, rows = sorted({r["i"] for r in cells}), sorted({r["j"] for r in cells})
    if selected is None:
        inside = [r for r in cells if region is None or r["j"] <= region] or cells
        best = min((r for r in inside if r.get(chosen[0]) is not None), key=lambda r: r[chosen[0]])
        selected = best["i"], best["j"]
    width = max(0.62 * len(columns) + 1.9, 4.2)
    size = (width * len(chosen), 0.42 * len(rows) + 2.3)
    figure = Figure(figsize=size, layout="constrained")
    handles: dict[str, Any] = {}
    for axis, value in zip(figure.subplots(1, len(chosen), squeeze=False)[0], chosen, strict=True):
        grid = {(r["i"], r["j"]): r.get(value) for r in cells}
        table = [[_number(grid.get((i, j))) for i in columns] for j in rows]
        _heat_panel(figure, axis, table, columns, rows, value)
        handles |= _marks(axis, columns, rows, selected, region)
        if any(math.isnan(number) for line in table for number in line):
            handles["not measured"] = Patch(facecolor="w", edgecolor="0.6")
    legend_below(figure, handles, width=2.6)
    if title:
        figure.suptitle(title)
    return save_figure(figure, path)


def _number(value: Any) -> float:
    return math.nan if value is None else float(value)


def _heat_panel(
    figure: Any,
    axis: Any,
    table: list[list[float]],
    columns: Sequence[int],
    rows: Sequence[int],
    value: str,
) -> None:
    from matplotlib.colors import LogNorm, Normalize

    title, lower_is_better = LOSSES.get(value, value), value in LOSSES
    finite = [x for line in table for x in line if math.isfinite(x)]
    low, high = min(finite), max(finite)
    wide = low > 0 and high / low > 10
    norm = LogNorm(low, high) if wide else Normalize(low, high if high > low else low + 1)
    colours = "magma_r" if lower_is_better else "magma"
    image = axis.imshow(table, cmap=colours, norm=norm, aspect="auto")
    bar = figure.colorbar(image, ax=axis, fraction=0.05, pad=0.02)
    if wide:
        bar.ax.minorticks_off()
        ticks = [low * (high / low) ** (k / 4) for k in range(5)]
        bar.set_ticks(ticks, labels=[f"{tick:.2g}" for tick in ticks])
    digits = 3 if high < 10 else 1
    size = 8 if len(columns) <= 16 else 6
    for y, line in enumerate(table):
        for x, number in enumerate(line):
            if math.isfinite(number):
                red, green, blue, _ = image.cmap(norm(number))
                dark = 0.299 * red + 0.587 * green + 0.114 * blue < 0.5
                text = f"{number:.{digits}f}"
                axis.text(
                    x, y, text, ha="center", va="center", fontsize=size, color="w" if dark else "k"
                )
    axis.set_xticks(range(len(columns)), [str(i) for i in columns])
    axis.set_yticks(range(len(rows)), [str(j) for j in rows])
    axis.set_xlabel("backbone block i")
    axis.set_ylabel("reward block j")
    axis.set_title(f"{title} {'↓' if lower_is_better else '↑'}", fontsize=10)


def _marks(
    axis: Any,
    columns: Sequence[int],
    rows: Sequence[int],
    selected: tuple[int, int],
    region: int | None,
) -> dict[str, Any]:
    """Boxes the selected cell, draws the search region's edge, and returns both for the legend."""
    from matplotlib.patches import Rectangle

    handles: dict[str, Any] = {}
    inside = [j for j in rows if region is not None and j <= region]
    if inside and len(inside) < len(rows):
        edge = len(inside) - 0.5
        line = axis.axhline(edge, color="#1f9bff", linestyle="--", linewidth=2)
        handles[f"search region (j ≤ {region})"] = line
    i, j = selected
    if i in columns and j in rows:
        corner = (columns.index(i) - 0.5, rows.index(j) - 0.5)
        box = Rectangle(corner, 1, 1, fill=False, edgecolor="#00b8a9", linewidth=2.5, zorder=4)
        box.set_clip_on(False)
        handles[f"selected (i*, j*) = ({i}, {j})"] = axis.add_patch(box)
    return handles


def save_figure(figure: Any, path: str | Path) -> Path:
    """Writes a figure and returns its path, whose suffix is the format: PNG if there is none."""
    path = Path(path) if Path(path).suffix else Path(f"{path}.png")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    return path
