"""Stage 1 measured: what all stitch points cost beside one plain pass of backbone and reward over the probe images.

    python benchmarks/search.py                                     the world, on a CPU
    python benchmarks/search.py --setup sd35m_512 --device cuda     real sizes, random weights
    python benchmarks/search.py --setup sd35m_512 --reduced         the same code, every size shrunk

The plain pass is what no search can do without: z_0 of every image, all blocks of the backbone once, the whole reward
once. Encoding is on both sides and left out of both, so that the ratio is of what is charged to the search:

    ratio = (total − encode) / (backbone + reward),     the aim is 1.2 at most

"features" is the search's own pass of backbone and reward with the features of every cell taken along, "gram" the
sums of products, "solve" the closed-form maps and their losses, "tail" the criterion that looks at the end of the
frozen tail.
"""

from __future__ import annotations

import argparse
import inspect
import statistics
import sys
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from common import Laps, clock, load, matmul_rate, parse, parser, peak_memory, reset_memory, write
from setups import SETUPS, Setup
from torch import Tensor

from stitchvm import search as stage_one
from stitchvm.backbones.base import Backbone
from stitchvm.path import FlowPath
from stitchvm.results import records_to_text
from stitchvm.rewards.base import Reward
from stitchvm.search import SearchResult, search
from stitchvm.vae import VAE

Record = dict[str, Any]
JS = (1, 2, 3, 4)


@torch.no_grad()
def plain_pass(
    batches: list[Tensor], vae: VAE, backbone: Backbone, reward: Reward, device: torch.device
) -> dict[str, float]:
    """Returns the seconds of encoding, all backbone blocks and the whole reward over the images."""
    laps = Laps.of_seconds(device)
    for pixels in batches:
        z_0 = vae.encode(pixels)
        laps.lap("encode")
        t = torch.rand(len(z_0), device=device)
        z_t = FlowPath().interpolate(z_0.float(), torch.randn_like(z_0), t)
        backbone(z_t, t, backbone.num_blocks)
        laps.lap("backbone")
        reward.embed(pixels)
        laps.lap("reward")
    return laps.sums


def gram_flops(backbone: Backbone, reward: Reward, images: int) -> float:
    """Returns the FLOPs of X'X and X'Y for all depths, the j side by side."""
    D, cells = backbone.width(1), reward.grid[0] * reward.grid[1]
    return 2.0 * images * cells * backbone.num_blocks * D * (D + len(JS) * reward.width)


def tail_flops(result: SearchResult, reward: Reward, images: int) -> float:
    """Returns the FLOPs of the frozen tail for the cells that went through it."""
    measured = [r["j"] for r in result.records if r["embedding_error"] is not None]
    return float(images * sum(measured.count(j) * reward.tail(j).flops() for j in JS))


def measure(setup: Setup, device: torch.device, args: argparse.Namespace) -> list[Record]:
    """Measures one setup, prints its table and returns its records."""
    torch.manual_seed(0)
    backbone, reward = setup.backbone(device), setup.make_reward(device)
    vae, size = setup.vae(device), setup.batch_size
    images, side = args.probes + args.held_out, setup.resolution
    pixels = torch.rand(images, 3, side, side, device=device)
    batches = list(pixels.split(size))
    plain_pass(batches[:1], vae, backbone, reward, device)  # warm-up

    settings: dict[str, Any] = {"js": JS, "num_probes": args.probes, "num_held_out": args.held_out}
    if args.end_probes is not None:
        settings["num_end_probes"] = args.end_probes
    default = inspect.signature(search).parameters["num_end_probes"].default
    ends = min(settings.get("num_end_probes", default), args.held_out)
    reset_memory(device)
    plain, found = [], []
    for _ in range(args.repeats):  # interleaved: other work on the machine hits both alike
        plain.append(plain_pass(batches, vae, backbone, reward, device))
        with mock.patch.object(stage_one, "time", SimpleNamespace(perf_counter=clock(device))):
            result = search(batches, vae.encode, backbone, reward, **settings)
        found.append(result.timing)
    seconds = {
        name: statistics.median(run[name] for run in runs)
        for runs in (plain, found)
        for name in runs[0]
    }  # "encode" is the search's own, which replaces the plain pass's
    base = seconds["backbone"] + seconds["reward"]
    L, latent = backbone.num_blocks, (side // vae.factor,) * 2
    flops = {
        "backbone": float(images * backbone.flops(latent, L)),
        "reward": float(images * reward.flops()),
        "gram": gram_flops(backbone, reward, images),
        "tail": tail_flops(result, reward, ends),
    }
    shared = {"benchmark": "search", "setup": setup.name, "device": device.type}
    records: list[Record] = [
        shared
        | {
            "variant": f"{L} x {len(JS)} cells, {images} images, {ends} end probes",
            "part": name,
            "seconds": value,
            "of_pass": value / base,
            "images_per_second": images / value,
            "flops": flops.get(name),
            "peak_memory_gib": peak_memory(device),
        }
        for name, value in seconds.items()
    ]
    ratio = (seconds["total"] - seconds["encode"]) / base
    rates = {
        str(dtype).removeprefix("torch."): matmul_rate(device, dtype)
        for dtype in (torch.float64, torch.float32, torch.bfloat16)
    }
    records.append(
        shared | {"part": "ratio", "ratio": ratio, "matmul_flops_per_s": rates, "load": load()}
    )
    print(f"\n{setup.name} on {device.type}: {records[0]['variant']}\n")
    shown = [r | {"gflop": r["flops"] and r["flops"] / 1e9} for r in records[:-1]]
    print(records_to_text(shown, rows=("part", "seconds", "of_pass", "gflop"), column=None))
    print(f"\n(total - encode) / (backbone + reward) = {ratio:.3f}")
    print("matrix products, TFLOP/s:", {k: round(v / 1e12, 3) for k, v in rates.items()})
    return records


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the benchmark from the command line."""
    made = parser(__doc__)
    made.add_argument("--setup", nargs="+", default=["world"], choices=sorted(SETUPS))
    made.add_argument("--probes", type=int, default=200, help="images that are fitted")
    made.add_argument("--held-out", type=int, default=200, help="images losses are measured on")
    made.add_argument("--end-probes", type=int, help="images that go through the tails")
    made.add_argument("--repeats", type=int, default=3)
    args, device = parse(made, argv)
    records: list[Record] = []
    for name in args.setup:
        setup = SETUPS[name]
        small = args.reduced and setup.reward is not None
        records += measure(setup.shrunk() if small else setup, device, args)
    if args.output:
        write(args.output, records, device, args.overwrite)


if __name__ == "__main__":
    main(sys.argv[1:])
