"""Tiny alignment runs: networks, configurations for the command line, and modules for this process."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from stitchvm.adapters.lora import PolicyAdapters
from stitchvm.data.prompts import Prompts
from stitchvm.generator import Generator
from stitchvm.modules.alignment import Alignment
from stitchvm.rewards.clip import CLIPReward

PROMPTS = [
    f"a {colour} {shape}" for colour in ("red", "blue") for shape in ("circle", "square", "left")
] + ["the circle above", "a square right of the circle"]
EXACT = ("state", "policy")


def generator(sd3: Path, **changes: Any) -> partial[Generator]:
    """Returns what builds the tiny SD3 generator."""
    return partial(Generator, str(sd3), text_tokens=12, **changes)


def reward(clip: Path) -> partial[CLIPReward]:
    """Returns what builds the tiny CLIP reward."""
    return partial(CLIPReward, model=f"local-dir:{clip}")


def policy(**changes: Any) -> partial[PolicyAdapters]:
    """Returns what builds a small LoRA."""
    return partial(PolicyAdapters, **({"r": 2, "alpha": 4} | changes))


def fit(module: Alignment, root: Path, **trainer: Any) -> Trainer:
    """Trains a module in this process on `PROMPTS`, four an update, and returns the Trainer."""
    options: dict[str, Any] = {
        "max_steps": 2,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
        "logger": False,
        "limit_val_batches": 0,
    } | trainer
    ckpt_path = options.pop("ckpt_path", None)
    data = options.pop("data", None) or Prompts(prompts=PROMPTS, prompts_per_update=4)
    made = Trainer(accelerator="cpu", devices=1, default_root_dir=str(root), **options)
    made.fit(module, datamodule=data, ckpt_path=ckpt_path)
    return made


def save_every_step(root: Path) -> dict[str, Any]:
    """Returns what makes `fit` keep a checkpoint of every step in a folder."""
    callback = ModelCheckpoint(root, "{step}", every_n_train_steps=1, save_top_k=-1)
    return {"enable_checkpointing": True, "callbacks": [callback]}


def load(path: Path) -> dict[str, Any]:
    """Returns a checkpoint, read the safe way."""
    return torch.load(path, weights_only=True)


def scalars(root: Path) -> Any:
    """Returns TensorBoard's reader of a run's folder."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(root))
    return found.Reload()


def draft_config(sd3: Path, clip: Path, root: Path, **model: Any) -> dict[str, Any]:
    """Returns the configuration of a tiny DRaFT; `model` overrides the module's arguments."""
    return {
        "seed_everything": 0,
        "model": {
            "class_path": "stitchvm.modules.draft.DRaFT",
            "init_args": {
                "generator": {
                    "class_path": "stitchvm.generator.Generator",
                    "init_args": {"path": str(sd3), "text_tokens": 12},
                },
                "reward": {
                    "class_path": "stitchvm.rewards.clip.CLIPReward",
                    "init_args": {"model": f"local-dir:{clip}"},
                },
                "policy": {
                    "class_path": "stitchvm.adapters.lora.PolicyAdapters",
                    "init_args": {"r": 2, "alpha": 4},
                },
                "num_steps": 3,
                "lr": 1e-2,
                "lam": 0.1,
                "clip": 0.01,
                "warmup_steps": 2,
                "group_size": 2,
                "micro_batch": 3,
                **model,
            },
        },
        "data": {
            "class_path": "stitchvm.data.prompts.Prompts",
            "init_args": {"prompts": PROMPTS, "prompts_per_update": 4},
        },
        "trainer": {
            "accelerator": "cpu",
            "devices": 1,
            "max_steps": 5,
            "log_every_n_steps": 1,
            "limit_val_batches": 0,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "default_root_dir": str(root),
            "callbacks": [
                {
                    "class_path": "lightning.pytorch.callbacks.ModelCheckpoint",
                    "init_args": {"every_n_train_steps": 1, "save_last": True, "save_top_k": -1},
                }
            ],
        },
    }


def assert_same(one: dict[str, Any], two: dict[str, Any]) -> None:
    """Requires two checkpoints to have the same policy, copies, optimiser and counters, bit for bit."""
    assert one["global_step"] == two["global_step"] and one["alignment"] == two["alignment"]
    assert_equal(one["policy"], two["policy"])
    assert_equal(one["method_state"], two["method_state"])
    for old, new in zip(one["optimizer_states"], two["optimizer_states"], strict=True):
        assert_equal(old["state"], new["state"])
    assert one["lr_schedulers"] == two["lr_schedulers"]


def assert_equal(one: Any, two: Any) -> None:
    """Requires nested plain data and tensors to be equal, bit for bit."""
    if isinstance(one, dict):
        assert one.keys() == two.keys()
        for key in one:
            assert_equal(one[key], two[key])
    elif isinstance(one, torch.Tensor):
        assert torch.equal(one, two)
    else:
        assert one == two


def assert_close(
    one: dict[str, Any], two: dict[str, Any], rtol: float = 2e-3, atol: float = 1e-4
) -> None:
    """Requires two checkpoints to have the same policy and copies up to rounding."""
    assert one["global_step"] == two["global_step"]
    assert one["policy"].keys() == two["policy"].keys()
    for key, value in one["policy"].items():
        torch.testing.assert_close(
            two["policy"][key], value, rtol=rtol, atol=atol, msg=lambda m, k=key: f"{k}: {m}"
        )
