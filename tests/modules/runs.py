"""Tiny distillation runs through the command line, for tests in processes of their own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from PIL import Image

FSDP2 = {
    "class_path": "lightning.pytorch.strategies.ModelParallelStrategy",
    "init_args": {
        "data_parallel_size": 2,
        "tensor_parallel_size": 1,
        "save_distributed_checkpoint": False,
    },
}


def write_images(folder: Path, n: int = 40, side: int = 20) -> Path:
    """Writes n noisy colour patches as PNG files."""
    folder.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(0)
    for k in range(n):
        patch = random.integers(0, 256, (4, 4, 3), dtype=np.uint8)
        Image.fromarray(patch).resize((side, side), Image.Resampling.BICUBIC).save(
            folder / f"{k:03d}.png"
        )
    return folder


def distillation_config(
    sd3: Path, clip: Path, images: Path, root: Path, **model: Any
) -> dict[str, Any]:
    """Returns the configuration of a tiny distillation; `model` overrides the module's arguments."""
    return {
        "seed_everything": 0,
        "model": {
            "class_path": "stitchvm.modules.distillation.StitchDistillation",
            "init_args": {
                "backbone": {
                    "class_path": "stitchvm.backbones.sd3.SD3Backbone",
                    "init_args": {"path": str(sd3), "dtype": "float32", "null_tokens": 4},
                },
                "reward": {
                    "class_path": "stitchvm.rewards.clip.CLIPReward",
                    "init_args": {"model": f"local-dir:{clip}"},
                },
                "vae": {"class_path": "stitchvm.vae.VAE", "init_args": {"path": str(sd3)}},
                "stitch_point": [2, 1],
                "noise_levels": 2,
                "lr": 1e-3,
                "warmup_steps": 2,
                "search_js": [1, 2],
                "num_probes": 4,
                "num_held_out": 4,
                "num_end_probes": 2,
                **model,
            },
        },
        "data": {
            "class_path": "stitchvm.data.images.ImageFolder",
            "init_args": {
                "root": str(images),
                "resolution": 16,
                "batch_size": 4,
                "num_workers": 0,
                "val_size": 8,
            },
        },
        "trainer": {
            "accelerator": "cpu",
            "devices": 1,
            "max_steps": 6,
            "log_every_n_steps": 1,
            "val_check_interval": 3,
            "check_val_every_n_epoch": None,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "default_root_dir": str(root),
            "callbacks": [
                {
                    "class_path": "lightning.pytorch.callbacks.ModelCheckpoint",
                    "init_args": {"every_n_train_steps": 2, "save_last": True, "save_top_k": -1},
                }
            ],
        },
    }


def write_config(config: dict[str, Any], path: Path) -> Path:
    """Writes a configuration as YAML."""
    path.write_text(yaml.safe_dump(config))
    return path


def environment() -> dict[str, str]:
    """Returns the environment of a child: one thread, offline, no rank variables of an outer launcher."""
    keep = {
        k: v for k, v in os.environ.items() if not k.startswith(("PL_", "LOCAL_RANK", "WORLD"))
    }
    return keep | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}


def start(*arguments: str | Path) -> subprocess.Popen[str]:
    """Starts `stitchvm ARGUMENTS` in a process of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", "stitchvm", *map(str, arguments)],
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        # what was started in the background ignores Ctrl-C, and so would its children
        preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
    )


def stitchvm(*arguments: str | Path) -> str:
    """Runs `stitchvm ARGUMENTS`, requires success and returns its output."""
    process = start(*arguments)
    output, _ = process.communicate(timeout=900)
    assert process.returncode == 0, output
    return output


def checkpoint(root: Path, name: str = "last") -> dict[str, Any]:
    """Returns a checkpoint of a run, read the safe way."""
    return torch.load(root / "checkpoints" / f"{name}.ckpt", weights_only=True, map_location="cpu")


def write_run(
    config: dict[str, Any], root: Path, strategy: Any = None, max_steps: int | None = None
) -> Path:
    """Writes the configuration of a run beside its folder, on two processes if there is a strategy; returns `root`."""
    if max_steps is not None:
        config["trainer"]["max_steps"] = max_steps
    if strategy is not None:
        config["trainer"] |= {"devices": 2, "strategy": strategy}
    write_config(config, root.with_suffix(".yaml"))
    return root


def fit(root: Path, *arguments: str) -> dict[str, Any]:
    """Runs `stitchvm fit` on the configuration beside a run's folder and returns the last checkpoint."""
    stitchvm("fit", "--config", root.with_suffix(".yaml"), *arguments)
    return checkpoint(root)


def killed_at(root: Path, step: int) -> Path:
    """Starts the run of a folder, kills it when it has a checkpoint of a step, and returns that, the last there is."""
    process = start("fit", "--config", root.with_suffix(".yaml"))
    deadline = time.monotonic() + 600
    wanted = root / "checkpoints"
    while not list(wanted.glob(f"*step={step}.ckpt")):
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    for later in wanted.glob("*.ckpt"):  # whatever came after that step before the signal did
        if f"step={step}.ckpt" not in later.name:
            later.unlink()
    return next(wanted.glob(f"*step={step}.ckpt"))
