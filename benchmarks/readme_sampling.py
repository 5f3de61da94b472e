"""Puts the sampling figures of results/world/ into the README: `python benchmarks/readme_sampling.py`."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from readme import README, WORLD, source

from stitchvm.results import read_results

MARKERS = re.compile(r"(<!-- sampling: begin .*? -->\n).*?(<!-- sampling: end -->)", re.S)
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


def main() -> None:
    """Rewrites the README's section of sampling results."""
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
                parts.append(f"![Reward against the cost of a sample]({picture})")
    body = "\n\n".join(parts)
    new, count = MARKERS.subn(lambda m: f"{m[1]}\n{body}\n\n{m[2]}", README.read_text())
    if count != 1:
        raise SystemExit("README.md must have one pair of sampling markers")
    README.write_text(new)
    print(f"README.md: {len(body.splitlines())} lines of sampling results")


if __name__ == "__main__":
    main()
