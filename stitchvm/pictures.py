"""Pictures of samples: a grid with captions and rewards, and values along the trajectories.

Both are drawn from lines of samples.jsonl. Pillow and matplotlib are imported when something is drawn.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from textwrap import fill
from typing import Any

__all__ = ["PAGE", "grid", "scores", "trajectory"]

Line = Mapping[str, Any]

PAGE = 64  # samples on a page
CELL = 232  # the width of a cell in pixels
MARGIN = 10
LABEL = 44  # letters in a line of an axis' label
INK, GREY, GREEN, RED = "#1a1a1a", "#666666", "#00734f", "#b0230f"
SERIES = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")  # Okabe–Ito


def scores(line: Line) -> list[tuple[str, str]]:
    """Returns what stands under a sample: each reward, and the checker's verdict, with their colours."""
    found = [(f"{name} {significant(x)}", INK) for name, x in line.get("rewards", {}).items()]
    if verdict := line.get("checker"):
        wrong = [name for name, x in verdict.items() if name != "whole" and x < 1]
        why = ", ".join(wrong) if any(verdict.values()) else "no such scene"
        right = verdict["whole"] == 1
        found.append(("✓ right", GREEN) if right else (f"✗ {why or 'more'}", RED))
    return found


def significant(x: float | None) -> str:
    """Returns a number with about four significant digits."""
    if x is None:
        return "–"
    digits = 2 if abs(x) >= 10 else 3
    return f"{x:.{digits}f}"


def grid(
    lines: Sequence[Line], root: str | Path, path: str | Path, pages: int = 16, per_prompt: int = 1
) -> list[Path]:
    """Draws samples with caption, seed and rewards under each, and returns the files that were written.

    Arguments:
        lines: The samples.
        root: The folder their files are relative to.
        path: The first page, "grid.png"; further pages are "grid_2.png", …, of at most 64 samples each.
        pages: The most pages.
        per_prompt: The samples of a prompt, which stand in one row.

    Raises:
        ValueError: If there are no samples.
    """
    if not lines:
        raise ValueError("there are no samples: nothing to draw.")
    columns = grid_columns(min(len(lines), PAGE), per_prompt)
    page = PAGE - PAGE % columns
    path, written = Path(path), []
    for number, start in enumerate(range(0, min(len(lines), pages * page), page), 1):
        name = path if number == 1 else path.with_stem(f"{path.stem}_{number}")
        draw_page(lines[start : start + page], Path(root), columns).save(name)
        written.append(name)
    return written


def grid_columns(samples: int, per_prompt: int = 1) -> int:
    """Returns a number of columns, at most 8: whole prompts in a row, and about as many rows as columns."""
    wanted = min(max(round(samples**0.5 + 0.3), 1), 8)
    if 1 < per_prompt <= 8:
        return per_prompt * min(max(round(wanted / per_prompt), 1), 8 // per_prompt)
    return wanted


def draw_page(lines: Sequence[Line], root: Path, columns: int) -> Any:
    """Returns a Pillow image of a page."""
    from PIL import Image, ImageDraw

    plain, small = fonts(15), fonts(13)
    with Image.open(root / lines[0]["file"]) as first:
        height = round(CELL * first.height / first.width)
    texts = [caption(line, plain, small) for line in lines]
    rows = [range(i, min(i + columns, len(lines))) for i in range(0, len(lines), columns)]
    below = [max(sum(step for _, _, _, step in texts[i]) for i in row) for row in rows]
    size = (
        MARGIN + (CELL + MARGIN) * min(columns, len(lines)),
        MARGIN + sum(height + text + 2 * MARGIN for text in below),
    )
    page = Image.new("RGB", size, "white")
    pen, top = ImageDraw.Draw(page), MARGIN
    for row, text_height in zip(rows, below, strict=True):
        for column, i in enumerate(row):
            left = MARGIN + column * (CELL + MARGIN)
            with Image.open(root / lines[i]["file"]) as image:
                page.paste(fitted(image.convert("RGB"), (CELL, height)), (left, top))
            y = top + height + 5
            for words, font, colour, step in texts[i]:
                pen.text((left, y), words, fill=colour, font=font)
                y += step
        top += height + text_height + 2 * MARGIN
    return page


def fitted(image: Any, size: tuple[int, int]) -> Any:
    """Returns an image resized to a cell: its own pixels where it is enlarged, smooth where it is reduced."""
    from PIL import Image

    small = image.width < size[0]
    return image.resize(size, Image.Resampling.NEAREST if small else Image.Resampling.LANCZOS)


def caption(line: Line, plain: Any, small: Any) -> list[tuple[str, Any, str, int]]:
    """Returns the lines of text under a sample: words, font, colour and height."""
    words = wrapped(line["prompt"], plain, 3)
    found = [(part, plain, INK, 18) for part in words]
    found.append((f"#{line['index']}, seed {line['seed']}", small, GREY, 17))
    row, colour = "", INK
    for text, ink in scores(line):
        longer = f"{row}   {text}" if row else text
        if row and (ink != colour or small.getlength(longer) > CELL):
            found.append((row, small, colour, 17))
            longer = text
        row, colour = longer, ink
    if row:
        found.append((shortened(row, small), small, colour, 17))
    return found


def wrapped(text: str, font: Any, most: int) -> list[str]:
    """Returns a text in lines that fit a cell, at most so many; … stands for what is left out."""
    rows, row = [], ""
    for word in " ".join(text.split()).split(" "):
        longer = f"{row} {word}" if row else word
        if row and font.getlength(longer) > CELL:
            rows.append(row)
            longer = word
        row = longer
    rows.append(row)
    if len(rows) > most:
        rows = [*rows[: most - 1], f"{rows[most - 1]} …"]
    return [shortened(each, font) for each in rows]


def shortened(text: str, font: Any) -> str:
    """Returns a text cut to the width of a cell."""
    if font.getlength(text) <= CELL:
        return text
    text = text.removesuffix(" …")
    while text and font.getlength(f"{text}…") > CELL:
        text = text[:-1]
    return f"{text}…"


def fonts(size: int) -> Any:
    """Returns a font with many scripts' letters (matplotlib's DejaVu Sans)."""
    from matplotlib import get_data_path
    from PIL import ImageFont

    return ImageFont.truetype(Path(get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf", size)


# Panels of `trajectory` beside the value's, those that the samples have: name → (title, log scale).
INFO_PANELS = {
    "ess": ("Effective sample size of the particles", False),
    "distinct_ancestors": ("Particles that have children (share)", False),
    "update_to_cfg": ("Value guidance over prompt guidance (rms)", True),
}


def trajectory(
    lines: Sequence[Line],
    path: str | Path,
    label: str = "value",
    examples: int = 6,
    final_label: str | None = None,
) -> Path:
    """Draws the values of samples along their trajectories: the mean, quantiles, and some samples themselves.

    The chosen samples' final values stand at σ = 0. Numbers the sampler reported have panels of their own.

    Arguments:
        lines: The samples; those without values are left out.
        path: The picture's file; it is replaced if it is there.
        label: What the value is.
        examples: How many samples are drawn themselves.
        final_label: What the final value is, where it is of another reward than the value: then it has an axis of
            its own, on the right. By default the two are of one reward and share an axis.

    Raises:
        ValueError: If no sample has values along its trajectory.
    """
    from matplotlib.figure import Figure

    lines = [line for line in lines if line.get("values")]
    if not lines:
        raise ValueError("no sample has values along its trajectory: nothing to draw.")
    names = [n for n in INFO_PANELS if any(line.get("info", {}).get(n) for line in lines)]
    width = 6.4 if not names else 5.0 * (1 + len(names))
    figure = Figure(figsize=(width, 4.6), layout="constrained")
    axes = figure.subplots(1, 1 + len(names), squeeze=False)[0]
    spread(axes[0], [line["values"] for line in lines], SERIES[0], f"mean of {len(lines)} samples")
    for number, line in enumerate(some(lines, examples)):
        points = [(sigma, v) for sigma, v in line["values"] if v is not None]
        axes[0].plot(
            [sigma for sigma, _ in points],
            [v for _, v in points],
            color=GREY,
            linewidth=0.8,
            alpha=0.8,
            label=None if number else "single samples",
            zorder=1,
        )
    finals = [
        [[0.0, line["final_value"]]] for line in lines if line.get("final_value") is not None
    ]
    scale = axes[0]
    if finals:
        if final_label is not None:
            scale = axes[0].twinx()
            scale.set_ylabel(fill(final_label, LABEL), color=SERIES[1])
            scale.tick_params(axis="y", colors=SERIES[1])
        (_, low, middle, high), *_ = quantiles(finals)
        # a few far samples carry the mean past a quantile; of equal ones it differs in the last digit
        below, above = max(middle - low, 0.0), max(high - middle, 0.0)
        scale.errorbar(
            [0.0],
            [middle],
            yerr=[[below], [above]],
            color=SERIES[1],
            marker="D",
            markersize=5,
            capsize=3,
            label="final value, 10 to 90 %",
            clip_on=False,
            zorder=5,
        )
    axes[0].set_title("Value along the trajectory", fontsize=11)
    axes[0].set_ylabel(fill(label, LABEL))
    for axis, name in zip(axes[1:], names, strict=True):
        title, logarithmic = INFO_PANELS[name]
        series = [line["info"][name] for line in lines if line.get("info", {}).get(name)]
        spread(axis, series, SERIES[2], "mean")
        axis.set_title(title, fontsize=11)
        axis.set_yscale("log" if logarithmic else "linear")
        if not logarithmic:
            axis.set_ylim(bottom=0)
    for axis in axes:
        axis.set_xlim(1.02, -0.02)
        axis.set_xlabel("noise level σ, from noise to image")
        axis.grid(color="#dddddd", linewidth=0.6)
        axis.set_axisbelow(True)
    handles, labels = axes[0].get_legend_handles_labels()
    if scale is not axes[0]:
        more = scale.get_legend_handles_labels()
        handles, labels = handles + more[0], labels + more[1]
    figure.legend(
        handles,
        labels,
        loc="outside lower center",
        ncols=2 if len(axes) == 1 else 4,
        frameon=False,
        fontsize=10,
    )
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    return path


def spread(axis: Any, series: Sequence[Any], colour: str, label: str) -> None:
    """Draws the mean of series over σ with the band of their 10 to 90 % quantiles."""
    points = quantiles(series)
    sigmas = [sigma for sigma, *_ in points]
    low, middle, high = ([point[k] for point in points] for k in (1, 2, 3))
    marker = "o" if len(points) <= 30 else None
    axis.plot(
        sigmas,
        middle,
        color=colour,
        linewidth=2,
        marker=marker,
        markersize=4,
        label=label,
        zorder=3,
    )
    if len(series) > 1:
        axis.fill_between(
            sigmas, low, high, color=colour, alpha=0.2, linewidth=0, label="10 to 90 %", zorder=2
        )


def quantiles(series: Sequence[Any]) -> list[tuple[float, float, float, float]]:
    """Returns (σ, 10 % quantile, mean, 90 % quantile) of series of [σ, value], σ falling; None is left out."""
    import numpy as np

    found: dict[float, list[float]] = {}
    for points in series:
        for sigma, value in points:
            if value is not None:
                found.setdefault(round(sigma, 6), []).append(value)
    return [
        (
            sigma,
            float(np.quantile(values, 0.1)),
            float(np.mean(values)),
            float(np.quantile(values, 0.9)),
        )
        for sigma, values in sorted(found.items(), reverse=True)
    ]


def some(lines: Sequence[Line], most: int) -> list[Line]:
    """Returns at most so many of the samples, evenly spread."""
    step = max(len(lines) / max(most, 1), 1)
    return [lines[int(k * step)] for k in range(min(most, len(lines)))]
