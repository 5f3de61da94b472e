"""The world's training-time alignment on the page of results, and in short for the README; draws its curves.

The reward is the sum that is trained for. Curves and costs to equal reward are those of `stitchvm curves`.
"""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pages import WORLD, source
from world_alignment import REWARDS, SCORES

from stitchvm.results import read_results
from stitchvm.training_curves import summaries, training_curves

IMAGES = Path("docs/images")
LABELS = {
    "base": "before training",
    "grpo_fast": "Flow-GRPO-Fast",
    "draft1": "DRaFT-1",
    "draft1_stitched": "DRaFT-1 + StitchVM",
    "draft3": "DRaFT-3",
    "draft3_stitched": "DRaFT-3 + StitchVM",
    "nft": "DiffusionNFT",
    "nft_stitched": "DiffusionNFT + StitchVM",
    "nft_tweedie": "the same stop, Tweedie told the prompt",
    "nft_scaled": "NFT, standardised",
    "nft_stitched_scaled": "+ StitchVM, standardised",
}
PAIRS = {
    "draft1": "draft1_stitched",
    "draft3": "draft3_stitched",
    "nft": "nft_stitched",
    "nft_scaled": "nft_stitched_scaled",
}
COUNTED = {"draft1": "DRaFT-1", "draft3": "DRaFT-3", "nft": "NFT"}  # in benchmarks/training.py
TITLES = {"reward": "clip + hps, clean", "checker/whole": "whole scenes right (checker)"}


def with_sums(records: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Returns the records and, for every run and point, their sum that was trained for as metric "reward"."""
    cells: dict[tuple[Any, ...], dict[str, dict[str, Any]]] = defaultdict(dict)
    for r in records:
        cells[r["name"], r["seed"], r["split"], r["updates"]][r["metric"]] = r
    sums = [
        {**cell[REWARDS[0]], "metric": "reward", "value": sum(cell[m]["value"] for m in REWARDS)}
        for cell in cells.values()
    ]
    return [*records, *sums]


def points(records: Sequence[dict[str, Any]], metric: str) -> list[dict[str, Any]]:
    """Returns the points of the curves on "tune" as `stitchvm.training_curves` takes them."""
    return [
        {
            **r,
            "method": label(r["name"]),
            "run": r["seed"],
            "step": r["updates"],
            "metric": TITLES[metric],
        }
        for r in records
        if r["metric"] == metric and r["split"] == "tune"
    ]


def label(name: str) -> str:
    """Returns what a method or a window is called."""
    return LABELS.get(name, f"stop after {name} of 10")


def table(records: Sequence[dict[str, Any]]) -> str:
    """Returns the scores on "test" as Markdown, mean ± standard deviation over seeds, with what the runs cost."""
    header = ["run", "reward", *SCORES, "updates", "images", "core-seconds"]
    lines = ["| " + " | ".join(header) + " |", "|---|" + "---:|" * (len(header) - 1)]
    for name in dict.fromkeys(r["name"] for r in records):
        mine = [r for r in records if r["name"] == name and r["split"] == "test"]
        cells = [cell([r["value"] for r in mine if r["metric"] == m]) for m in header[1:-3]]
        costs = [
            statistics.mean(r[k] for r in mine) for k in ("updates", "samples", "cpu_seconds")
        ]
        lines.append(
            f"| {label(name)} | {' | '.join(cells)} | {' | '.join(f'{c:.0f}' for c in costs)} |"
        )
    return "\n".join(lines)


def cell(values: Sequence[float]) -> str:
    """Returns a mean with the spread over seeds, where there are several."""
    digits = 2 if max(values) > 2 else 3
    spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{spread}"


def flops_of_image(name: str) -> float:
    """Returns the FLOPs of an image, rolled out, judged and learnt from, as benchmarks/training.py counts them."""
    method, _, stitched = name.removesuffix("_scaled").partition("_")
    wanted = COUNTED[method], "stitched" if stitched else "terminal"
    records = read_results(WORLD / "benchmark_training.json")["records"]
    found = {(r["method"], r["value_estimator"]): r for r in records if "variant" in r}
    return float(found[wanted]["flops"])


def equal_reward(records: Sequence[dict[str, Any]]) -> str:
    """Returns the costs to equal reward as Markdown, stitched beside terminal: half-way, and as far as both get."""
    lines = [
        "| method | reward | core-seconds, terminal | + StitchVM | ratio | TFLOP, terminal | + StitchVM | ratio |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    start = statistics.fmean(p["value"] for p in points(records, "reward") if p["step"] == 0)
    for method, stitched in PAIRS.items():
        pair = [r for r in records if r["name"] in (method, stitched)]
        if len({r["name"] for r in pair}) < 2:
            continue
        curves = points(pair, "reward")
        most = summaries(curves, TITLES["reward"], "cpu_seconds")[0]["level"]
        for level in ((start + most) / 2, most):
            both = summaries(curves, TITLES["reward"], "cpu_seconds", level)
            images = summaries(curves, TITLES["reward"], "samples", level)
            work = [
                s["cost_to_level"] * flops_of_image(name) / 1e12
                for s, name in zip(images, (method, stitched), strict=True)
            ]
            cells = [
                *(f"{s['cost_to_level']:.0f}" for s in both),
                f"{both[1]['ratio']:.2f}",
                *(f"{w:.1f}" for w in work),
                f"{work[0] / work[1]:.2f}",
            ]
            lines.append(f"| {label(method)} | {level:.3f} | {' | '.join(cells)} |")
    return "\n".join(lines)


def equal_level(records: Sequence[dict[str, Any]], x: str, unit: str) -> str:
    """Returns what each run took until a reward as Markdown: half-way, and as far as all get; and the first over it.

    Arguments:
        records: Those of all runs.
        x: What they took, such as "samples".
        unit: Its name.
    """
    curves = points(records, "reward")
    start = statistics.fmean(p["value"] for p in curves if p["step"] == 0)
    most = summaries(curves, TITLES["reward"], x)[0]["level"]
    levels = ((start + most) / 2, most)
    found = [summaries(curves, TITLES["reward"], x, level) for level in levels]
    header = ["run", *(f"{unit} to {level:.3f} | ratio" for level in levels)]
    lines = ["| " + " | ".join(header) + " |", "|---|---:|---:|---:|---:|"]
    for row in zip(*found, strict=True):
        costs = " | ".join(f"{s['cost_to_level']:.0f} | {s['ratio']:.2f}" for s in row)
        lines.append(f"| {row[0]['method']} | {costs} |")
    return "\n".join(lines)


def part(kind: str, title: str) -> list[str]:
    """Returns the paragraphs of one results file, and draws its picture."""
    path = WORLD / f"{kind}.json"
    if not path.is_file():
        return []
    records = with_sums(read_results(path)["records"])
    seeds = len({r["seed"] for r in records})
    over = f"mean ± standard deviation over {seeds} seeds" if seeds > 1 else "one seed"
    parts = [f"**{title}**, {over}. {source(path)}", table(records)]
    if kind == "alignment_controls":
        parts.append(equal_level(records, "samples", "images"))
    elif kind == "alignment_windows":
        every = with_sums(read_results(WORLD / "alignment.json")["records"])
        terminal = [r for r in every if r["name"] == "nft"]
        parts.append(equal_level([*terminal, *records], "cpu_seconds", "core-seconds"))
    else:
        parts.append(
            "Core-seconds and counted work to the highest reward that every run of both has, and half-way there:\n\n"
            + equal_reward(records)
        )
    picture = IMAGES / f"world_{kind}.png"
    shown = [p for metric in TITLES for p in points(records, metric)]
    training_curves(shown, picture, x="samples" if kind == "alignment_controls" else "cpu_seconds")
    return [*parts, f"![{title}](images/{picture.name})"]


def section() -> str:
    """Returns all of it, and draws the curves."""
    parts = part("alignment", "Training") + part("alignment_windows", "Stopping windows")
    parts += part("alignment_scales", "Terms of the reward standardised within groups")
    parts += part("alignment_controls", "The value's error and the stop")
    return "\n\n".join(parts)


def summary() -> str:
    """Returns scores and costs of all methods, and the costs to equal reward."""
    path = WORLD / "alignment.json"
    if not path.is_file():
        return ""
    records = with_sums(read_results(path)["records"])
    return f"{table(records)}\n\n{equal_reward(records)}"
