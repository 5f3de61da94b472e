"""What `torch.compile` and CUDA graphs do to each part of the computation.

    python benchmarks/gpu_compile.py --setup sd35m_1024 --device cuda

The parts are those of `sampling_steps.part_calls`, a batch of one, forward and backward to the input. "per block" is
regional compilation (`stitchvm.compilation`): each block of transformer and tail is compiled by itself, all of one kind
from one compilation. "whole" compiles the transformer, the prefix, the tail as one graph each, which takes minutes.
Both compile the VAE's decoder. "CUDA graph" launches stitch and tail as one, compiled by the block or not. Seconds of
compilation are those of the first call beyond a later one.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from common import parse, parser, write
from sampling_setups import SAMPLING_SETUPS, Rig
from sampling_steps import part_seconds
from torch import nn

from stitchvm.compilation import compile_forward
from stitchvm.results import records_to_text

Record = dict[str, Any]
FORMS = ("eager", "CUDA graph", "per block", "per block, CUDA graph", "whole")


def forms(rig: Rig) -> dict[str, list[nn.Module]]:
    """Returns what is compiled, by form."""
    model, decoder = rig.model, rig.generator.vae.network.decoder
    blocks = [*model.backbone.blocks, *model.tail.blocks]
    whole = [rig.generator.transformer, model.backbone, model.tail]
    by_block = [*blocks, decoder]
    return dict(zip(FORMS, ([], [], by_block, by_block, [*whole, decoder]), strict=True))


@contextmanager
def compiled(modules: Sequence[nn.Module], backend: str) -> Iterator[None]:
    """Compiles modules in place, and undoes it."""
    torch._dynamo.reset()
    compile_forward(modules, backend)
    try:
        yield
    finally:
        for module in modules:
            module.__class__ = type(module).uncompiled


def form_records(rig: Rig, form: str, measure: Callable[[], Any]) -> list[Record]:
    """Returns one record for each part under a form, or one that says why there is none."""
    about = {"benchmark": "compile", "setup": rig.setup.name, "device": rig.device.type}
    about |= {"form": form}
    start = time.perf_counter()
    try:
        measure()  # compiles
        first = time.perf_counter() - start
        found = measure()
    except Exception as error:  # a compiler may fail in its own ways; the others go on
        return [about | {"part": "all", "error": f"{type(error).__name__}: {error}"[:300]}]
    compiling = max(0.0, first - (time.perf_counter() - start - first))
    return [
        about
        | {"part": part, "seconds": forward, "backward_seconds": backward}
        | {"compile_seconds": compiling if form != "eager" else 0.0}
        for part, (forward, backward) in found.items()
    ]


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the benchmark from the command line."""
    made = parser(__doc__)
    made.add_argument("--setup", default="sd35m_1024", choices=[*SAMPLING_SETUPS])
    made.add_argument("--backend", default="inductor", help="of torch.compile")
    made.add_argument("--repeats", type=int, default=3, help="calls whose median counts")
    made.add_argument("--forms", nargs="+", default=FORMS[:-1], choices=FORMS)
    args, device = parse(made, argv)
    torch.manual_seed(0)
    setup = SAMPLING_SETUPS[args.setup]
    rig = Rig(setup.shrunk() if args.reduced and setup.real else setup, device)
    records: list[Record] = []
    every = {form: modules for form, modules in forms(rig).items() if form in args.forms}
    for number, (form, modules) in enumerate(every.items()):
        with compiled(modules, args.backend):
            measure = partial(part_seconds, rig, args.repeats, graph="CUDA graph" in form)
            records += form_records(rig, form, measure)
        if args.output:
            write(args.output, records, device, args.overwrite or number > 0)
    for record in records:
        if "error" in record:
            print(f"{record['form']}: {record['error']}")
    columns = ("form", "part", "seconds", "backward_seconds", "compile_seconds")
    print(records_to_text(records, rows=columns, column=None))


if __name__ == "__main__":
    main()
