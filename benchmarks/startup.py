"""Where the seconds of a command go before its work begins, on a CPU.

    python benchmarks/startup.py --output results/world/benchmark_startup.json

CPU seconds of whole processes, the least of several: what the interpreter, torch and `lightning.pytorch.cli` take to
import, and what commands take beside that. The last is a distillation of one step with a stitch point: networks are
built, and the closed-form start is fitted on 200 images, so that all between a command and its first step is in it.
"""

from __future__ import annotations

import argparse
import os
import resource
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from stitchvm.results import check_free, write_results
from stitchvm.tables import records_to_text

DISTIL = ("--config", "configs/distill_world.yaml")
ONE_STEP = (
    *("--model.stitch_point", "[7, 1]", "--trainer.max_steps", "1"),
    *("--trainer.limit_val_batches", "0", "--trainer.enable_progress_bar", "false"),
)
COMMANDS: dict[str, tuple[str, ...]] = {
    "python": ("-c", "pass"),
    "import torch": ("-c", "import torch"),
    "import torchmetrics": ("-c", "import torchmetrics"),
    "import lightning.pytorch.cli": ("-c", "import lightning.pytorch.cli"),
    "stitchvm --version": ("-m", "stitchvm", "--version"),
    "stitchvm fit --help": ("-m", "stitchvm", "fit", "--help"),
    "stitchvm fit --print_config": ("-m", "stitchvm", "fit", *DISTIL, "--print_config"),
    "stitchvm fit, one step": ("-m", "stitchvm", "fit", *DISTIL, *ONE_STEP),
}
BASE = "import lightning.pytorch.cli"


def cpu_seconds(arguments: tuple[str, ...]) -> float:
    """Returns the CPU seconds, user and system, of a Python process on one thread."""
    with tempfile.TemporaryDirectory() as folder:
        fits = "--trainer.max_steps" in arguments
        extra = ["--trainer.default_root_dir", folder] if fits else []
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run(
            [sys.executable, *arguments, *extra],
            check=True,
            capture_output=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> None:
    """Measures all of them in turn, and again."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--output", type=Path, help="a JSON file for the records")
    parser.add_argument("--overwrite", action="store_true", help="replace the JSON file")
    args = parser.parse_args()
    if args.output:
        check_free(args.output, overwrite=args.overwrite)
    least: dict[str, float] = {}
    for _ in range(args.repeats):
        for name, arguments in COMMANDS.items():
            least[name] = min(cpu_seconds(arguments), least.get(name, float("inf")))
    records: list[dict[str, Any]] = [
        {
            "benchmark": "startup",
            "command": name,
            "cpu_seconds": seconds,
            "of_lightning": seconds / least[BASE],
        }
        for name, seconds in least.items()
    ]
    print(records_to_text(records, rows=("command", "cpu_seconds", "of_lightning"), column=None))
    if args.output:
        command = " ".join(["python benchmarks/startup.py", *sys.argv[1:]])
        write_results(args.output, records, command=command, overwrite=args.overwrite)


if __name__ == "__main__":
    main()
