"""What a GPU took, from the folder that `gpu.py` wrote: sections of docs/speed.md."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gpu_changes import changes
from gpu_plan import parts
from gpu_report import rate_of, ratios, rows
from gpu_run import Runs
from memory_page import table

__all__ = ["PAGE", "sections", "summary"]

PAGE = Path("docs/speed.md")
FOLDER = Path("results/h200")
THEIRS = "the literature's"
COMPILED = (", compiled", ", inductor")
SIZES = {"sd35m_512": "512²", "sd35m_1024": "1024²", "sd35m": "512²"}

Record = dict[str, Any]


def sections() -> dict[str, str]:
    """Returns the page's tables by section."""
    runs = Runs(FOLDER, "cuda", False)
    results = runs.results(parts(True))
    rate = rate_of(results)
    if rate is None:
        raise SystemExit(
            f"page_gpu: {FOLDER} has no rate of matrix products: run benchmarks/gpu.py"
        )
    return {
        "machine": machine(runs, rate),
        "times": times(rows(results, rate)),
        "aims": aims(ratios(results, rate)),
        "parts": of_parts(changes(results)),
    }


def summary() -> str:
    """Returns the README's table: what an hour of a GPU gives."""
    runs = Runs(FOLDER, "cuda", False)
    results = runs.results(parts(True))
    rate = rate_of(results)
    timed = {(r["what"], r["per"]): r["seconds"] for r in rows(results, rate)}
    found = {(r["ratio"], r["of"]): r["value"] for r in ratios(results, rate)}

    def ratio(name: str, of: str) -> float:
        return next(v for (n, o), v in found.items() if n == name and o.startswith(of))

    def image(what: str) -> float:
        return timed[f"sd35m_1024: {what}", "image, 100 steps"]

    stage_2 = "sd35m_512: batch 32, K = 1, compiled"
    lean = "sd35m_512: batch 32, K = 4, cached latents, compiled"
    against = "sd35m_1024: DPS tweedie, cfg, not shared"
    lines = [
        [
            "a value model, 5 epochs over 685,000 images at 512² (the paper: 9.3 GPU-hours of a GH200)",
            f"{ratio('distillation as shipped: GPU-hours', stage_2):.1f} GPU-hours",
        ],
        [
            "the same number of noisy latents, four an image, from cached latents",
            f"{ratio('distillation at its best: GPU-hours, same latents', lean):.1f} GPU-hours",
        ],
        [
            "an image of 100 steps at 1024²: plain; guided by a stitched value",
            f"{image('plain, inductor'):.1f} s; {image('DPS stitched, inductor'):.1f} s",
        ],
        [
            "guidance by a Tweedie value, as in the literature, beside a stitched one: time; memory",
            f"{ratio(f'{THEIRS} / stitched: time', against):.1f} times; "
            f"{1 / ratio(f'stitched / {THEIRS}: memory', 'sd35m_1024'):.1f} times",
        ],
        *(
            [
                f"{name} to the end, beside stopping at a stitched value: time of an image",
                f"{ratio(f'{name} terminal / stitched: time per sample', 'sd35m'):.2f} times",
            ]
            for name in ("NFT", "DRaFT-1")
        ),
    ]
    text = table([f"SD 3.5 Medium, one {runs.about['machine']['accelerators'][0]}", ""], lines)
    return f"{text}\n\n[All figures, and what keeps them from being better](docs/speed.md)."


def machine(runs: Runs, rate: float) -> str:
    """Returns the sentence on what was measured with what."""
    about, versions = runs.about["machine"], runs.about["versions"]
    used = ", ".join(f"{name} {versions[name]}" for name in ("torch", "diffusers", "peft"))
    return (
        f"`PYTHONPATH=. python benchmarks/gpu.py --output {FOLDER} --profile` on one {about['accelerators'][0]} "
        f"({about['cpu']}, {about['cores']} cores), {used}; bfloat16 matrix products ran at {rate / 1e12:.0f} "
        f"TFLOP/s (`{FOLDER}`)."
    )


def bare(what: str) -> str:
    """Returns the name of what was measured without its compilation."""
    for word in COMPILED:
        what = what.removesuffix(word)
    return what


def times(records: list[Record]) -> str:
    """Returns seconds, utilisation and memory, as it stands and compiled, side by side."""
    pairs: dict[str, dict[bool, Record]] = {}
    for r in records:
        if r["part"] != "rate" and r.get("seconds"):
            pairs.setdefault(bare(r["what"]), {})[r["what"] != bare(r["what"])] = r
    head = ["SD 3.5 Medium", "TFLOP", "seconds", "of the rate", "GiB"]
    head += ["compiled: seconds", "of the rate", "GiB"]
    lines = []
    for what, pair in pairs.items():
        setup, name = what.split(": ", 1)
        one = next(iter(pair.values()))
        line = [f"{name}, {SIZES[setup]}: {one['per']}", f"{one['tflop']:,.0f}"]
        for compiled in (False, True):
            line += [*cells(pair.get(compiled))]
        lines.append(line)
    return table(head, lines)


def cells(record: Record | None) -> Iterator[str]:
    """Yields seconds, utilisation and memory, or dashes."""
    if record is None:
        yield from ("–",) * 3
        return
    seconds = record["seconds"]
    yield f"{seconds:,.0f}" if seconds >= 100 else f"{seconds:.3g}"
    yield f"{record['utilisation']:.0%}"
    yield f"{record['peak_memory_gib']:.1f}"


def aims(records: list[Record]) -> str:
    """Returns the ratios that have an aim."""
    words = {True: "yes", False: "no"}
    return table(
        ["ratio", "of", "measured", "aim", "met", "by FLOPs"],
        [
            [r["ratio"], r["of"], f"{r['value']:.3g}", r["aim"], words[r["met"]], counted(r)]
            for r in records
            if r["aim"] is not None
        ],
    )


def counted(record: Record) -> str:
    """Returns the ratio of FLOPs, where one was counted."""
    return "–" if record.get("counted") is None else f"{record['counted']:.3g}"


def of_parts(records: list[Record]) -> str:
    """Returns what kernels, layouts and compilation do to the parts of a step, in milliseconds."""
    every = [r for r in records if r["what"].startswith("sd35m_1024: ") and r["speed_up"]]
    return table(
        ["1024², one sample", "change", "ms before", "ms after", "times as fast"],
        [
            [
                r["what"].split(": ", 1)[1],
                r["change"],
                f"{1e3 * r['before']:.3g}",
                f"{1e3 * r['after']:.3g}",
                f"{r['speed_up']:.2f}",
            ]
            for r in every
            if not r["change"].startswith("blocks by")
        ],
    )
