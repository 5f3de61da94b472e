"""The world's networks, values and stage 1 on the page of results, and in short for the README."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pages import WORLD, read, source

from stitchvm.results import read_results
from stitchvm.tables import records_to_markdown

VALUES = {
    "clip": ("CLIP: retrieval, R@1 among 512 unseen captions", "retrieval/"),
    "aesthetic": ("Aesthetic: SRCC with the true score", "aesthetic/"),
    "hps": ("Preference: accuracy", "preference/"),
}
SHOWN = ("_text_r1", "_image_r1", "aesthetic/srcc", "preference/hpdv2")
# which images were noised, and what counts as truth
TRUTHS = {
    ("drawn", "draw"): "drawn images, an exact draw",
    ("drawn", "posterior"): "drawn images, exact E[r given z_t]",
    ("drawn", "rollouts"): "drawn images, roll-outs",
    ("null", "draw"): "the generator's images, an exact draw",
}


def gates() -> str:
    """Returns the table of what the world's networks reach."""
    path = WORLD / "gates.json"
    if not path.is_file():
        return ""
    cells: dict[str, list[dict[str, Any]]] = {}
    for r in read_results(path)["records"]:
        if r.get("gate") is not None or r["metric"] == "flux/whole":
            cells.setdefault(r["metric"], []).append(r)
    rows = ["| gate | mean over seeds | seeds | n each | wanted |", "|---|---|---|---|---|"]
    for metric, same in cells.items():
        mean = sum(r["value"] for r in same) / len(same)
        wanted = f"≥ {same[0]['gate']}" if "gate" in same[0] else ""
        rows.append(f"| {metric} | {mean:.3f} | {len(same)} | {same[0]['n']} | {wanted} |")
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
        parts.append(f"![{title}](images/{picture.name})")
    return "\n\n".join(parts)


def truth() -> str:
    """Returns R² against every truth, and the ceiling of the aesthetic SRCC."""
    path = WORLD / "truth.json"
    if not path.is_file():
        return ""
    records = read_results(path)["records"]
    shown = [
        {**r, "truth": TRUTHS[r["images"], r["truth"]]}
        for r in records
        if r["metric"] == "truth/r2"
        and r["text"] in ("none", "other")
        and (r["images"], r["truth"]) in TRUTHS
        and r["estimator"] != "vae_stitch"
    ]
    table = records_to_markdown(shown, rows=("reward", "truth", "estimator"), digits=2)
    few = min((r["n"] for r in records if r["metric"] == "aesthetic/srcc"), default=0)
    ranked = [
        r
        for r in records
        if r["metric"] == "aesthetic/srcc"
        and r["n"] == few
        and not r["estimator"].startswith("truth:")
    ]
    ranks = records_to_markdown(ranked, rows=("metric", "estimator"), stderr=True)
    head = "**R² against the truth**, texts of another image where the reward reads text."
    tail = f"SRCC with the true aesthetic score on the first {few} images, the roll-outs' mean as an estimate:"
    return "\n\n".join([f"{head} {source(path)}", table, tail, ranks])


def study() -> str:
    """Returns how stage 1's criteria rank the cells."""
    path = WORLD / "search_study.json"
    if not path.is_file():
        return ""
    rows = [
        "| cells | criterion | Spearman with final quality | chosen (i, j) | its quality | best quality |",
        "|---|---|---|---|---|---|",
    ]
    content = read_results(path)
    for r in content["records"]:
        if "spearman" in r:
            region = r["region"].replace("whole grid", "all j")
            rows.append(
                f"| {region}: {r['cells']} measured | {r['criterion']} | {r['spearman']:+.2f} | "
                f"{tuple(r['chosen'])} | {r['quality_of_chosen']:.3f} | {r['best_quality']:.3f} |"
            )
    head = f"**Stage 1's criteria**, quality after {content['steps']} steps of stage 2 (mean R@1 over levels)."
    return f"{head} {source(path)}\n\n" + "\n".join(rows)


def section() -> str:
    """Returns all of it."""
    measured = (values(name, title) for name, (title, _) in VALUES.items())
    parts = [gates(), *measured, truth(), study()]
    return "\n\n".join(part for part in parts if part)


def summary() -> str:
    """Returns how much of the clean rewards' quality values keep, one table of all rewards."""
    records = [
        {**r, "reward": name}
        for name in VALUES
        for r in read(f"values_{name}") or ()
        if r["metric"] == "retention"
    ]
    return records_to_markdown(records, rows=("reward", "estimator"), digits=2)
