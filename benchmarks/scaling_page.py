"""Puts the tables of docs/scaling.md between its markers: `python benchmarks/scaling_page.py`.

Counted are FLOPs: those of the parts of a sample (results/counts_sampling.json) and of a distillation step
(results/counts_distillation.json), and what methods are made of, which is added up here; and bytes of a device
(results/counts_memory.json, `memory_page.py`). Measured are the world's times on a CPU
(results/world/benchmark_sampling.json). A missing file of FLOPs leaves its tables out.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, NamedTuple

import memory_page
from memory_page import NAMES, table

from stitchvm.results import read_results

PAGE = Path("docs/scaling.md")
RESULTS = Path("results")
MARKERS = re.compile(r"(<!-- (\w+): begin -->\n).*?(<!-- \2: end -->)", re.S)
RATE = (
    790e12  # FLOP/s of bfloat16 matrix products of an H200, as benchmarks/distillation.py assumes
)
HALF = RATE / 2

Records = list[dict[str, Any]]
TOWERS = {"clip": "CLIP-L", "dfn": "DFN-CLIP", "hpsv2": "HPSv2"}
TAIL = 304.3e6  # the vision tower of CLIP ViT-L/14@336
IMAGES = 685_000  # AVA and HPDv2
LATENT = 16 * 64 * 64 * 2  # bytes of a bfloat16 latent at 512²


class Part(NamedTuple):
    """FLOPs forward, and backward to the input."""

    forward: float
    backward: float


def read(name: str) -> Records:
    """Returns the records of a file of results, none if it is not there."""
    path = RESULTS / name
    return read_results(path)["records"] if path.is_file() else []


def parts(setup: str) -> dict[str, Part]:
    """Returns the counted parts of a setup, by name."""
    return {
        r["part"]: Part(r["flops"], r["backward_flops"])
        for r in read("counts_sampling.json")
        if r["setup"] == setup and "part" in r
    }


def number(x: float) -> str:
    """Returns a number with three digits."""
    return f"{x:,.0f}" if x >= 100 else f"{x:.3g}"


def growth() -> str:
    """Returns TFLOPs of the parts by model and resolution."""
    rows = []
    for model, name in NAMES.items():
        for side in (512, 1024):
            found = parts(f"{model}_{side}")
            if found:
                cells = [number(p.forward / 1e12) for p in found.values()]
                rows.append([f"{name}, {side}²", *cells])
    return table(
        ["TFLOP, forward", "denoiser", "prefix, i = 4", "stitch + tail", "decoder", "CLIP-L"], rows
    )


def sampling() -> str:
    """Returns what samples cost, by method and model."""
    methods = {
        "plain": "plain, 100 steps",
        "DPS tweedie, cfg": "DPS (Tweedie), 100",
        "DPS stitched": "DPS + StitchVM, 100",
        "best of 4": "best of 4",
        "FK tweedie, cfg, M = 1": "FK steering (Tweedie), N = 4",
        "FK stitched, M = 2": "FK steering + StitchVM, N = 4, M = 2",
    }
    records = read("counts_sampling.json")
    flops = {(r["setup"], r["variant"]): r["flops"] for r in records if "variant" in r}
    rows = []
    for variant, title in methods.items():
        cells = []
        for model in NAMES:
            setup = f"{model}_1024"
            # without a null-text branch there is nothing to share
            found = flops.get((setup, variant), flops.get((setup, f"{variant}, not shared")))
            seconds = None if found is None else found / HALF
            hours = None if seconds is None else 200 * seconds / 3600
            cells.append(
                "–" if seconds is None else f"{number(seconds)} s, {number(hours or 0)} h"
            )
        rows.append([title, *cells])
    return table(["1024², a sample; 200 prompts", *NAMES.values()], rows)


def distillation() -> str:
    """Returns what stage 2 costs."""
    rows = []
    for r in read("counts_distillation.json"):
        if "tflop_per_image" in r and "K = 2" not in r["variant"]:
            paper = "–" if r["paper_hours"] is None else f"{r['paper_hours']:g}"
            same = number(r["hours_same_latents"])
            _, side, reward = f"{r['setup']}_clip".split("_")[:3]
            title = f"{TOWERS[reward]}, {side}²: {r['variant'].split(', ', 1)[1]}"
            rows.append([title, number(r["tflop_per_image"]), number(r["hours"]), same, paper])
    head = [
        "SD 3.5 Medium",
        "TFLOP an image",
        "hours, 5 epochs",
        "hours, same latents",
        "the paper's",
    ]
    return (
        table(head, rows) if rows else "(counted by `python benchmarks/distillation.py --count`)"
    )


def towers() -> tuple[float, float]:
    """Returns the FLOPs of DFN-CLIP's and HPSv2's towers together, and of their stitches and tails."""
    flops = {
        (r["setup"], r["part"]): r["flops"]
        for r in read("counts_distillation.json")
        if r["setup"] in ("sd35m_512_dfn", "sd35m_512_hpsv2") and "part" in r
    }
    teacher, student = (
        sum(x for (_, part), x in flops.items() if part == name) for name in ("teacher", "student")
    )
    return teacher, student


def updates() -> dict[str, tuple[int, float, float]]:
    """Returns, by method, the images of an update and the FLOPs of one: roll-out with value, and training.

    SD 3.5 Medium at 512², guidance 1, DFN-CLIP and HPSv2. A backward pass to LoRA's weights counts as one to the input,
    that of a tower as many times its forward pass as for CLIP-L.
    """
    found, (tower, tail) = parts("sd35m_512"), towers()
    u, prefix, decoder, clip = (found[n] for n in ("denoiser", "prefix", "decoder", "reward"))
    back = clip.backward / clip.forward
    pixels, value = decoder.forward + tower, prefix.forward + tail
    pixels_back, value_back = decoder.backward + back * tower, prefix.backward + back * tail

    def nft(calls: float, levels: float, end: float) -> tuple[int, float, float]:
        return 1152, calls * u.forward + end, levels * (3 * u.forward + u.backward)

    def draft(calls: float, K: int, end: float, back: float) -> tuple[int, float, float]:
        # K steps with a gradient, and the frozen model at their states
        return 2048, calls * u.forward + end, K * (u.forward + u.backward) + back

    stops = range(12, 18)
    k = sum(stops) / len(stops)
    levels = sum(int(0.99 * stop) for stop in stops) / len(stops)
    return {
        "DiffusionNFT": nft(25, int(0.99 * 25), pixels),
        "DiffusionNFT + StitchVM": nft(k, levels, value),
        "DRaFT-1": draft(10, 1, pixels, pixels_back),
        "DRaFT-1 + StitchVM": draft(5, 1, value, value_back),
        "DRaFT-3": draft(10, 3, pixels, pixels_back),
        "DRaFT-3 + StitchVM": draft(5, 3, value, value_back),
        "Flow-GRPO-Fast": (1152, 10 * u.forward + pixels, 3 * (u.forward + u.backward)),
    }


PAPER = {
    "DiffusionNFT": 191.5,
    "DiffusionNFT + StitchVM": 84.7,
    "DRaFT-1": 128.1,
    "DRaFT-1 + StitchVM": 94.8,
    "DRaFT-3": 128.0,
    "DRaFT-3 + StitchVM": 100.3,
    "Flow-GRPO-Fast": 122.2,
}


def training() -> str:
    """Returns what updates cost, and for how many of them the paper's GPU-hours would do."""
    rows = []
    for name, (images, rolled, trained) in updates().items():
        hours = images * (rolled + trained) / HALF / 3600
        rows.append(
            [
                name,
                f"{images}",
                number(rolled / 1e12),
                number(trained / 1e12),
                number(hours),
                f"{PAPER[name]:g}",
                number(PAPER[name] / hours),
            ]
        )
    head = ["SD 3.5 Medium, 512²", "images", "roll-out + value", "training", "GPU-h an update"]
    return table([*head, "the paper's GPU-h", "= updates"], rows)


def storage() -> str:
    """Returns bytes of what is kept and what is sent."""
    counted = {model: memory_page.counts(model) for model in NAMES}
    lora = counted["sd35m"]["lora"]["parameters"]
    rows = [
        [
            "latents of AVA and HPDv2, 512²",
            f"{IMAGES * LATENT / 1e9:.0f} GB",
            "once, `latent_cache`",
        ],
        ["the same, 1024²", f"{IMAGES * 4 * LATENT / 1e9:.0f} GB", "once"],
        [
            "a distillation checkpoint, CLIP-L",
            f"{3 * 4 * TAIL / 1e9:.1f} GB",
            "weights and both moments, float32",
        ],
        [
            "a fine-tuning checkpoint, LoRA",
            f"{5 * 4 * lora / 1e6:.0f} MB",
            "weights, old, EMA, both moments",
        ],
        [
            "gradients of an update, LoRA",
            f"{4 * lora / 1e6:.0f} MB",
            "one average over devices per update",
        ],
        [
            "gradients of a distillation step, CLIP-L",
            f"{4 * TAIL / 1e9:.1f} GB",
            "one average per optimiser step (DDP)",
        ],
    ]
    for model, name in NAMES.items():
        size = f"{2 * counted[model]['transformer']['parameters'] / 1e9:.1f} GB"
        rows.append(
            [f"{name}, transformer", size, "bfloat16; under FSDP2 gathered once in every pass"]
        )
    return table(["what", "size", ""], rows)


def measured() -> str:
    """Returns ratios of the world's benchmark on a CPU, counted and measured."""
    rows = [
        [f"{r['of']} / {r['over']}", number(r["flops"]), number(r["value"])]
        for r in read("world/benchmark_sampling.json")
        if r.get("quantity") == "time"
        and r.get("value") is not None
        and r.get("flops") is not None
    ]
    return table(["time, world, CPU", "counted", "measured"], rows)


TABLES = {
    "growth": growth,
    "sampling": sampling,
    "distillation": distillation,
    "training": training,
    "storage": storage,
    "fits": memory_page.fits,
    "holds": memory_page.holds,
    "measured": measured,
}


def fill(text: str) -> str:
    """Returns the page with its tables.

    Raises:
        ValueError: If the page does not have every table's markers once.
    """
    names = [name for _, name, _ in MARKERS.findall(text)]
    if sorted(names) != sorted(TABLES):
        raise ValueError(
            f"{PAGE} has markers for {names}: expected one pair for each of {[*TABLES]}."
        )
    return MARKERS.sub(lambda m: f"{m[1]}\n{TABLES[m[2]]()}\n\n{m[3]}", text)


def main() -> None:
    """Rewrites the page's tables."""
    PAGE.write_text(fill(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
    print(f"{PAGE}: {len(TABLES)} tables")


if __name__ == "__main__":
    main()
