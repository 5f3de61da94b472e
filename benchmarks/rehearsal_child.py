"""Runs `stitchvm` on a rehearsal folder: the command line itself, after two things that random weights need.

- Small towers stand under the names of the real ones: ROOT/architectures is handed to `open_clip.add_model_config`.
- The published aesthetic head is known by its SHA-256, which random numbers cannot have: the check is switched off.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import re
import resource
import sys
import time
import traceback
from pathlib import Path
from typing import Any, NamedTuple

__all__ = ["RELOAD", "Outcome", "preload", "prepare", "run_command"]


RELOAD = "reload-lora"


class Outcome(NamedTuple):
    """What a command came to.

    Attributes:
        code: Its exit code.
        seconds: How long it took.
        peak_memory_gib: The most memory it held: of the GPU if it used one, else of the process.
        peak_memory_of: "gpu" or "process".
        anonymous_memory_gib: The most memory of the process that is no page of a file (a mapped checkpoint is one:
            the system takes it back when it needs room); 0 where /proc does not say.
        log: The file with all it printed.
    """

    code: int
    seconds: float
    peak_memory_gib: float
    peak_memory_of: str
    anonymous_memory_gib: float
    log: Path


def preload() -> None:
    """Imports the heavy libraries once, so that forked commands need not."""
    import diffusers  # noqa: F401
    import open_clip  # noqa: F401
    import peft  # noqa: F401
    import transformers  # noqa: F401

    import stitchvm.lightning_cli  # noqa: F401


def prepare(root: Path) -> None:
    """Does the two things above."""
    from stitchvm.rewards import aesthetic

    aesthetic.SHA256.clear()
    if (root / "architectures").is_dir():
        import open_clip

        open_clip.add_model_config(root / "architectures")


def run_command(root: Path, argv: list[str], log: Path, start_method: str = "fork") -> Outcome:
    """Runs `stitchvm ARGV` in ROOT, in a process of its own.

    Arguments:
        root: The rehearsal's folder, where relative paths of configurations begin.
        argv: The command and its arguments.
        log: The file that gets its output.
        start_method: "fork", from this process with all it has imported, or "spawn": importing diffusers looks for
            devices, after which CUDA cannot be used in a fork.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    context: Any = multiprocessing.get_context(start_method)
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(root, argv, log, sender))
    start = time.perf_counter()
    process.start()
    sender.close()
    memory: tuple[float, str] = (0.0, "process")
    anonymous = 0.0
    while not receiver.poll(0.2):
        anonymous = max(anonymous, _anonymous(process.pid))
    with contextlib.suppress(EOFError):
        memory = receiver.recv()
    process.join()
    code = process.exitcode if process.exitcode is not None else 1
    return Outcome(code, time.perf_counter() - start, *memory, anonymous, log)


def _child(root: Path, argv: list[str], log: Path, sender: Any) -> None:
    with log.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.stdout = os.fdopen(1, "w", buffering=1)
    sys.stderr = os.fdopen(2, "w", buffering=1)
    os.chdir(root)
    code = 0
    try:
        prepare(root)
        print("stitchvm", *argv, flush=True)
        if argv[0] == RELOAD:
            _reload_lora(*argv[1:])
        else:
            from stitchvm.cli import main

            main(argv)
    except SystemExit as exit_:
        code = exit_.code if isinstance(exit_.code, int) else int(exit_.code is not None)
    except BaseException:  # a crash is a result, too
        traceback.print_exc()
        code = 70
    sender.send(_memory())
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _reload_lora(pipeline: str, folder: str) -> None:
    """Gives an exported LoRA to the pipeline as diffusers opens it, and requires that every layer took it.

    Raises:
        ValueError: If it was not loaded.
    """
    import torch
    from diffusers import DiffusionPipeline
    from safetensors import safe_open

    parts = [f"{kind}{k}" for kind in ("text_encoder", "tokenizer") for k in ("", "_2", "_3")]
    parts = [name for name in parts if "FLUX" not in pipeline or not name.endswith("_3")]
    pipe = DiffusionPipeline.from_pretrained(
        pipeline, dtype=torch.bfloat16, **dict.fromkeys(parts)
    )
    pipe.load_lora_weights(folder)
    taken = sum("lora_" in name for name, _ in pipe.transformer.named_parameters())
    with safe_open(Path(folder) / "pytorch_lora_weights.safetensors", framework="pt") as file:
        given = len(list(file.keys()))
    if taken != given or not given:
        raise ValueError(f"the pipeline took {taken} of {given} matrices of the LoRA in {folder}")


def _anonymous(pid: int) -> float:
    """Returns the GiB of a process that are no pages of files."""
    status = Path(f"/proc/{pid}/status")
    with contextlib.suppress(OSError):
        found = re.search(r"RssAnon:\s+(\d+) kB", status.read_text())
        return int(found[1]) / 2**20 if found else 0.0
    return 0.0


def _memory() -> tuple[float, str]:
    import torch

    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated() / 2**30, "gpu"
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, "process"
