"""What a device holds in fine-tuning, added up from results/counts_memory.json: tables of docs/scaling.md.

Under LoRA FSDP2 shards the frozen blocks; embeddings, head, position table and adapters stay whole on every rank. If
all weights are trained, all are sharded, with gradients, moments and copies (`stitchvm/modules/sharding.py`). The first
dimension is cut into n chunks of equal length, so that the fullest rank holds ⌈d_0/n⌉ rows of each tensor. VAE, rewards
and value models are whole on every rank in either case, and under DDP everything is. Text encoders are freed once all
prompts are encoded, if these are at most `prompts_ahead`; HPDv2's are more.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from stitchvm.results import read_results

RESULTS_NAME = "counts_memory.json"
RESULTS = Path("results")
NAMES = {"sd35m": "SD 3.5 Medium", "sd35l": "SD 3.5 Large", "flux": "FLUX.1-dev"}
TERMS = ("dfn_clip", "hpsv2")  # Eq. (80), as configs/nft_*.yaml have it
DEVICES = (1, 4, 8)
CARD = 80e9  # bytes
HALF, FLOAT = 2, 4  # bytes of bfloat16 and float32
LORA_SETS = 6  # policy, gradient, two moments, "old", "ema"

Shapes = Iterable[tuple[int, ...]]
Counts = dict[str, dict[str, Any]]
Memory = dict[str, float]


def elements(shapes: Shapes) -> int:
    """Returns the numbers in tensors of given shapes."""
    return sum(math.prod(shape) for shape in shapes)


def most_on_a_rank(shapes: Shapes, n: int) -> int:
    """Returns the numbers that the fullest of n ranks holds of sharded tensors: ⌈d_0/n⌉ rows of each."""
    return sum(math.ceil(shape[0] / n) * math.prod(shape[1:]) for shape in shapes)


def counts(model: str) -> Counts:
    """Returns the counted parts of a model, by name."""
    records = read_results(RESULTS / RESULTS_NAME)["records"]
    return {r["part"]: r for r in records if r["model"] == model}


def shared(found: Counts, stitched: bool) -> Memory:
    """Returns the bytes of what is whole on every rank: VAE, rewards, value models.

    Beside a stitched value nothing looks through the rewards' vision towers: they are freed (`drop_tower`).
    """
    terms = [found[term] for term in TERMS]
    rewards = sum(t["parameters"] - (t["tower"] if stitched else 0) for t in terms)
    students = sum(t["tail"] + t["stitch"] for t in terms) if stitched else 0
    return {
        "VAE, float32": FLOAT * found["vae"]["parameters"],
        "rewards, float32": FLOAT * rewards,
        "tails and stitches, float32": FLOAT * students,
    }


def lora(found: Counts, n: int, stitched: bool) -> Memory:
    """Returns the bytes of each kind on one of n devices that train LoRA.

    Arguments:
        found: The counted parts.
        n: How many devices the blocks are sharded over; 1 is also any device of DDP.
        stitched: Whether the value is stitched, on the generator's own blocks; else it is the terminal reward.
    """
    u, kept = found["transformer"], found["activations"]
    return {
        "blocks, bfloat16": HALF * u["blocks_on_rank"][str(n)],
        "embeddings, head, position table": HALF * (u["outside"] + u["buffers"]),
        "two blocks, gathered": 2 * HALF * u["largest_block"] if n > 1 else 0,
        "LoRA: weights, gradient, moments, old, EMA": LORA_SETS
        * FLOAT
        * found["lora"]["parameters"],
        **shared(found, stitched),
        "text encoders, bfloat16": HALF * found["text"]["parameters"],
        "activations of a micro-batch": kept[
            "bytes_checkpointed" if kept["checkpointing"] else "bytes"
        ],
    }


def full(found: Counts, n: int, stitched: bool) -> Memory:
    """Returns the bytes of each kind on one of n devices that train all weights, float32.

    The value has a prefix of its own: it must not follow the trained weights. Activations are not counted.
    """
    u = found["transformer"]
    size = FLOAT * u["all_on_rank"][str(n)]
    return {
        "weights": size,
        "gradient": size,
        "moments": 2 * size,
        "old, EMA": 2 * size,
        "the frozen model": size,
        "position table": FLOAT * u["buffers"],
        # FSDP2 leaves the outermost unit gathered between forward and backward pass
        "two blocks and a gradient, gathered; embeddings, head": FLOAT
        * (3 * u["largest_block"] + u["outside"] if n > 1 else 0),
        **shared(found, stitched),
        "prefix of the value, bfloat16": HALF * found["prefix"]["parameters"] if stitched else 0,
        "text encoders, float32": FLOAT * found["text"]["parameters"],
    }


WAYS = {"LoRA": lora, "all weights": full}


def gigabytes(x: float) -> str:
    """Returns bytes in GB, to a tenth; "–" for nothing."""
    return f"{x / 1e9:.1f}" if x else "–"


def table(head: list[str], rows: list[list[str]]) -> str:
    """Returns a Markdown table, numbers to the right."""
    lines = [head, ["---"] + ["---:"] * (len(head) - 1), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def holds() -> str:
    """Returns the bytes by kind, with LoRA and a stitched value."""
    columns = [lora(counts(model), n, True) for model in NAMES for n in DEVICES]
    rows = [[name, *(gigabytes(c[name]) for c in columns)] for name in columns[0]]
    rows.append(["**sum**", *(f"**{gigabytes(sum(c.values()))}**" for c in columns)])
    head = [f"{name}, {n}" for name in ("Medium", "Large", "FLUX") for n in DEVICES]
    return table(["GB a device: LoRA, stitched value; model, devices", *head], rows)


def fits() -> str:
    """Returns the sums of every model and way without text encoders, these, and how many 80 GB devices it takes."""
    rows = []
    for model, name in NAMES.items():
        found = counts(model)
        for way, needs in WAYS.items():
            for value, stitched in (("stitched", True), ("terminal", False)):
                held = [needs(found, n, stitched) for n in DEVICES]
                text = next(x for kind, x in held[0].items() if kind.startswith("text"))
                sums = [sum(memory.values()) - text for memory in held]
                enough = [least(sums), least([x + text for x in sums])]
                cells = [*map(gigabytes, [*sums, text]), *enough]
                rows.append([f"{name}, {way}, {value}", *cells])
    head = ["GB a device", "1, or DDP", "FSDP2 over 4", "over 8", "text encoders"]
    return table([*head, "80 GB do from", "with text encoders"], rows)


def least(sums: list[float]) -> str:
    """Returns the least number of devices whose sum is below 80 GB."""
    return next((str(n) for n, x in zip(DEVICES, sums, strict=True) if x < CARD), "–")
