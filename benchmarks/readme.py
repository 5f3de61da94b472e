"""Puts the figures of results/world/ into the README between its markers: `python benchmarks/readme.py`."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from stitchvm.results import read_results
from stitchvm.tables import records_to_markdown

README = Path("README.md")
WORLD = Path("results/world")
MARKERS = re.compile(r"(<!-- results: begin .*? -->\n).*?(<!-- results: end -->)", re.S)
VALUES = {
    "clip": ("CLIP: retrieval, R@1 among 512 unseen captions", "retrieval/"),
    "aesthetic": ("Aesthetic: SRCC with the true score", "aesthetic/"),
    "hps": ("Preference: accuracy", "preference/"),
}
SHOWN = ("_text_r1", "_image_r1", "aesthetic/srcc", "preference/hpdv2", "truth/r2")


def source(path: Path) -> str:
    """Returns the command and the machine of a results file, as a caption."""
    content = read_results(path)
    machine = content["machine"]
    return f"`{content['command']}` on {machine['cpu']}, {machine['cores']} cores ([json]({path}))"


def gates() -> str:
    """Returns the table of what the world's networks reach."""
    path = WORLD / "gates.json"
    if not path.is_file():
        return ""
    cells: dict[str, list[dict[str, Any]]] = {}
    for r in read_results(path)["records"]:
        if r.get("gate") is not None:
            cells.setdefault(r["metric"], []).append(r)
    rows = ["| gate | mean over seeds | seeds | n each | wanted |", "|---|---|---|---|---|"]
    for metric, same in cells.items():
        mean = sum(r["value"] for r in same) / len(same)
        rows.append(
            f"| {metric} | {mean:.3f} | {len(same)} | {same[0]['n']} | ≥ {same[0]['gate']} |"
        )
    return "**The networks.** " + source(path) + "\n\n" + "\n".join(rows)


def values(name: str, title: str) -> str:
    """Returns table, retention and picture of one reward's evaluation."""
    path = WORLD / f"values_{name}.json"
    if not path.is_file():
        return ""
    records = read_results(path)["records"]
    shown = [r for r in records if r["metric"].endswith(SHOWN) or r["metric"] == "retention"]
    picture = Path(f"docs/images/world_{name}.png")
    parts = [f"**{title}.** {source(path)}", records_to_markdown(shown)]
    if picture.is_file():
        parts.append(f"![{title}]({picture})")
    return "\n\n".join(parts)


def main() -> None:
    """Rewrites the README's section of results."""
    parts = [gates(), *(values(name, title) for name, (title, _) in VALUES.items())]
    body = "\n\n".join(part for part in parts if part)
    text = README.read_text()
    new, count = MARKERS.subn(lambda m: f"{m[1]}\n{body}\n\n{m[2]}", text)
    if count != 1:
        raise SystemExit("README.md must have one pair of results markers")
    README.write_text(new)
    print(f"README.md: {len(body.splitlines())} lines of results")


if __name__ == "__main__":
    main()
