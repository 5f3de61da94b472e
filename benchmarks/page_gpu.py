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
OTHERS = {
    "sd35m_1024_hpsv2": "Medium with HPSv2 (ViT-H/14)",
    "sd35l_1024": "Large",
    "flux_1024": "FLUX.1-dev",
}

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
    timed, found = rows(results, rate), ratios(results, rate)
    images = [r for r in timed if r["per"] not in ("call", "search")]
    of_others = [r for r in found if setup_of(r["of"]) in OTHERS]
    return {
        "machine": machine(runs, rate),
        "times": times([r for r in images if setup_of(r["what"]) in SIZES]),
        "aims": aims([r for r in found if r not in of_others]),
        "calls": calls(results.get("values", [])),
        "stage-1": stage_1(results.get("search", [])),
        "others": others([r for r in images if setup_of(r["what"]) in OTHERS]),
        "others-aims": aims(of_others),
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
            f"{image('plain, inductor'):.1f} s; {image('DPS stitched, CUDA graph, inductor'):.1f} s",
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


def setup_of(what: str) -> str:
    """Returns the setup that a row or a ratio is of."""
    return what.split(":", 1)[0]


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
            # the first stays where parts share the plain one
            pairs.setdefault(bare(r["what"]), {}).setdefault(r["what"] != bare(r["what"]), r)
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


def calls(records: list[Record]) -> str:
    """Returns what single calls of a value take, in milliseconds, without a CUDA graph and with one."""
    found: dict[tuple[str, str, int], dict[tuple[bool, bool], Record]] = {}
    for r in records:
        if "seconds" in r:
            name = r["value"].removesuffix(", CUDA graph")
            each = found.setdefault((r["setup"], name, r["batch_size"]), {})
            each[r["cuda_graph"], r["gradient"]] = r
    head = ["value", "samples", "ms", "with gradient", "GiB"]
    head += ["CUDA graph: ms", "with gradient", "GiB"]
    lines = []
    for (setup, name, batch), each in found.items():
        line = [f"{name}, {SIZES[setup]}", str(batch)]
        for graph in (False, True):
            both = [each.get((graph, gradient)) for gradient in (False, True)]
            line += ["–" if r is None else f"{1e3 * r['seconds']:.3g}" for r in both]
            line.append("–" if both[1] is None else f"{both[1]['peak_memory_gib']:.1f}")
        lines.append(line)
    return table(head, lines)


def stage_1(records: list[Record]) -> str:
    """Returns the seconds of each part of the search, and of what a plain pass would take."""
    seconds = {r["part"]: r["seconds"] for r in records if "seconds" in r}
    names = {
        "encode": "VAE (not in the ratio)",
        "backbone": "backbone, all depths",
        "reward": "reward, all blocks, float32",
        "gram": "products of features, float32",
        "solve": "least-squares solutions",
        "tail": "tails of the best cells",
    }
    (variant,) = {r["variant"] for r in records if "variant" in r}
    ratio = next(r["ratio"] for r in records if "ratio" in r)
    lines = [[what, f"{seconds[name]:.2g}"] for name, what in names.items()]
    lines.append(["all but the VAE, over a plain pass of backbone and reward", f"{ratio:.2f}"])
    return table([f"SD 3.5 Medium, 512²: {variant}", "seconds"], lines)


def others(records: list[Record]) -> str:
    """Returns seconds, utilisation and memory of other models and rewards."""
    head = ["1024², an image of 100 steps", "", "TFLOP", "seconds", "of the rate", "GiB"]
    lines = []
    for r in records:
        if r.get("seconds"):
            setup, name = r["what"].split(": ", 1)
            lines.append([OTHERS[setup], name, f"{r['tflop']:,.0f}", *cells(r)])
    return table(head, lines)


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
    found = [r for r in records if r["what"].startswith("sd35m_1024: ") and r["speed_up"]]
    parts = ("denoiser", "prefix", "stitch and tail", "decoder")
    found = [r for r in found if r["what"].split(": ")[1].removesuffix(", backward") in parts]
    every = {(r["what"], r["change"]): r for r in reversed(found)}.values()  # the first stays
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
            for r in reversed(every)
        ],
    )
