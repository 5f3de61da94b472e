"""Gradients of whole transformers under each attention kernel, beside one another: kernels may round, not differ.

    python benchmarks/gpu_attention.py --setup sd35m_1024 flux_1024 --device cuda

"difference" is that of a gradient in the latents from the one under a kernel that is known to be right, over its
length; "length" the ratio of their lengths. A kernel's own rounding, amplified by every block, is what the forward pass
shows, too. A kernel that cannot run here says so.
"""

from __future__ import annotations

import gc
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from common import parse, parser, write
from sampling_setups import SAMPLING_SETUPS, Rig
from sampling_steps import part_calls
from sampling_tuning import BACKENDS
from torch import Tensor
from torch.nn.attention import sdpa_kernel

from stitchvm.results import records_to_text

Record = dict[str, Any]
PARTS = ("prefix", "denoiser")


def kernels(device: torch.device) -> list[str]:
    """Returns the names of the kernels, the one that the others are compared with first."""
    right = "efficient" if device.type == "cuda" else "auto"
    return [right, *(name for name in ("auto", *BACKENDS) if name != right)]


def answers(rig: Rig, part: str, kernel: str) -> tuple[Tensor, Tensor]:
    """Returns what a part computes, and the gradient of its sum in the latents, float32."""
    call, x = part_calls(rig)[part]
    leaf = x.detach().requires_grad_()
    with nullcontext() if kernel == "auto" else sdpa_kernel([BACKENDS[kernel]]):
        y = call(leaf)
        (gradient,) = torch.autograd.grad(y.sum(), leaf)
    return y.detach().float(), gradient.float()


def attention_records(rig: Rig) -> list[Record]:
    """Returns one record for each part and kernel."""
    records: list[Record] = []
    for part in PARTS:
        right: tuple[Tensor, Tensor] | None = None
        for kernel in kernels(rig.device):
            record: Record = {"benchmark": "attention", "setup": rig.setup.name, "part": part}
            record |= {"device": rig.device.type, "kernel": kernel}
            records.append(record)
            torch.manual_seed(0)  # of the part's latents
            try:
                own = answers(rig, part, kernel)
            except RuntimeError as error:
                record["error"] = str(error).split(".")[0]
                continue
            right = own if right is None else right
            for name, one, other in zip(("value", "gradient"), own, right, strict=True):
                record[f"{name}_difference"] = float((one - other).norm() / other.norm())
                record[f"{name}_length"] = float(one.norm() / other.norm())
    return records


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the benchmark from the command line."""
    made = parser(__doc__)
    made.add_argument("--setup", nargs="+", default=["world"], choices=[*SAMPLING_SETUPS])
    args, device = parse(made, argv)
    records: list[Record] = []
    for number, name in enumerate(args.setup):
        setup = SAMPLING_SETUPS[name]
        torch.manual_seed(0)
        rig = Rig(setup.shrunk() if args.reduced and setup.real else setup, device)
        records += attention_records(rig)
        del rig
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
        if args.output:
            write(args.output, records, device, args.overwrite or number > 0)
    columns = [f"{of}_{what}" for of in ("value", "gradient") for what in ("difference", "length")]
    columns = ["setup", "part", "kernel", *columns, "error"]
    shown = [dict.fromkeys(columns) | record for record in records]
    print(records_to_text(shown, rows=columns, column=None))


if __name__ == "__main__":
    main()
