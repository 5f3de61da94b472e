"""The world's inference-time alignment on the page of results, and in short for the README."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pages import WORLD, read, source

from stitchvm.results import read_results

TARGETS = {"hps": "Preference reward", "aesthetic": "Aesthetic reward", "clip": "CLIP reward"}
METHODS = {
    "plain": "plain (ODE)",
    "bon": "best-of-N, N = 4",
    "fks": "FK steering, Tweedie, N = 4",
    "fks_stitched": "**FK steering + StitchVM**, N = 4, M = 2",
    "dps": "DPS (Tweedie)",
    "dps_stitched": "**DPS + StitchVM**",
}
COLUMNS = ("hps", "aesthetic", "clip", "checker/whole")


def cell(record: dict[str, Any]) -> str:
    """Returns a mean with its standard error."""
    digits = 2 if record["metric"] == "aesthetic" else 3
    return f"{record['value']:.{digits}f} ± {record['stderr']:.{digits}f}"


def table(records: list[dict[str, Any]], target: str | None = None) -> str:
    """Returns the records of several methods as a Markdown table; the column of the steering reward is marked."""
    names = [f"{name} (steers)" if name == target else name for name in COLUMNS]
    lines = [
        f"| method | {' | '.join(names)} | setting | CPU s / sample | peak GiB |",
        "|---|" + "---:|" * (len(COLUMNS) + 3),
    ]
    for name in dict.fromkeys(r["name"] for r in records):
        mine = {r["metric"]: r for r in records if r["name"] == name}
        first = next(iter(mine.values()))
        cells = [cell(mine[metric]) if metric in mine else "–" for metric in COLUMNS]
        setting = "".join(
            f"{sign} = {first[key]:g}"
            for key, sign in (("strength", "s"), ("lam", "λ"))
            if key in first
        )
        costs = f"{setting} | {first['cpu_seconds']:.2f} | {first['peak_memory_gib']:.2f}"
        lines.append(f"| {METHODS.get(name, name)} | {' | '.join(cells)} | {costs} |")
    return "\n".join(lines)


def section() -> str:
    """Returns all of it."""
    parts = []
    for target, title in TARGETS.items():
        path = WORLD / f"sampling_{target}.json"
        if path.is_file():
            content = read_results(path)["records"]
            n = content[0]["n"]
            parts.append(
                f"**{title}**, {n} unseen captions, mean ± standard error. {source(path)}"
            )
            parts.append(table(content, target))
        for kind, words in (("cross", "the larger generator"), ("scaling", "N and M")):
            path = WORLD / f"sampling_{kind}_{target}.json"
            picture = Path(f"docs/images/world_sampling_scaling_{target}.png")
            if not path.is_file():
                continue
            content = read_results(path)["records"]
            parts.append(f"**{title}, {words}.** {source(path)}")
            if kind == "cross":
                parts.append(table(content, target))
            elif picture.is_file():
                parts.append(f"![Reward against the cost of a sample](images/{picture.name})")
    return "\n\n".join(parts)


def summary() -> str:
    """Returns what each reward comes to when it steers, and what a sample costs; one table of all methods."""
    found = {target: read(f"sampling_{target}") or [] for target in TARGETS}
    heads = [f"{title.lower()} | whole scenes" for title in TARGETS.values()]
    lines = [
        f"| method | {' | '.join(heads)} | CPU s / sample |",
        "|---|" + "---:|" * (2 * len(TARGETS) + 1),
    ]
    for method, label in METHODS.items():
        cells, seconds = [], []
        for target, records in found.items():
            mine = {r["metric"]: r for r in records if r["name"] == method}
            cells += [cell(mine[m]) if m in mine else "" for m in (target, "checker/whole")]
            seconds += [r["cpu_seconds"] for m, r in mine.items() if m == target]
        mean = sum(seconds) / len(seconds) if seconds else float("nan")
        lines.append(f"| {label} | {' | '.join(cells)} | {mean:.2f} |")
    return "\n".join(lines)
