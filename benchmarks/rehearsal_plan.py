"""What is run of each configuration: commands of `stitchvm`, and the numbers that are overridden to keep it short.

No path is overridden: the rehearsal's folder is the hub's cache and the working directory. What changes is how much is
done (steps, images, prompts), the number of devices, which is one, and, where the networks are small or the machine is,
the side of the images.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from rehearsal_child import RELOAD
from rehearsal_facts import PIPELINES

__all__ = ["Plan", "plans"]

CONFIGS = Path(__file__).parents[1] / "configs"
ORDER = ("distill_", "plain_", "bon_", "dps_", "fks_", "eval_", "draft", "grpo_", "nft_")
WORLD = "world"
STITCH_POINT = "[4,1]"  # where stage 1 cannot be run
SHORTER = {  # roll-outs of fewer steps
    "fks": tuple(
        f"--model.sampler.init_args.{key}"
        for key in ("num_steps=8", "resample_every=2", "resample_from=2", "resample_to=6")
    ),
    "nft_stitched": ("--model.num_steps=10", "--model.stop=[5,7]"),
    "nft": ("--model.num_steps=8",),
    "grpo_fast": ("--model.num_steps=6", "--model.window=2", "--model.bounds=[0,3]"),
    "grpo": ("--model.num_steps=6", "--model.window=2"),
}
CHECKPOINTS: dict[str, Any] = {
    "trainer": {
        "callbacks": [
            {
                "class_path": "lightning.pytorch.callbacks.ModelCheckpoint",
                "init_args": {"every_n_train_steps": 1, "save_last": True, "save_top_k": 0},
            }
        ]
    }
}


@dataclass(frozen=True)
class Plan:
    """The commands of one configuration.

    Attributes:
        name: The configuration's name.
        commands: The arguments of `stitchvm`, one list a command; one of them is none of its commands (`RELOAD`).
        steps: Optimiser steps, or steps of a sampler, in all.
        makes: Files below ROOT that must be there afterwards.
    """

    name: str
    commands: tuple[tuple[str, ...], ...]
    steps: int
    makes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Sizes:
    """How much is done.

    Attributes:
        side: The side of images in pixels; None leaves the configuration's own.
        steps: Steps of a sampler whose schedule is free.
        batch: Images of a batch.
        accelerator: Lightning's.
        too_large: Pipelines whose transformer does not fit in whole: no stage 1, which looks at every block.
    """

    side: int | None
    steps: int
    batch: int
    accelerator: str
    too_large: tuple[str, ...] = ()


def sizes(scale: str, device: str) -> Sizes:
    """Returns how much is done: tiny networks on 64 pixels, real ones on 256 on a CPU and as configured on a GPU."""
    if scale == "tiny":
        return Sizes(64, 4, 2, "cpu")
    return Sizes(None, 8, 4, "gpu") if device == "gpu" else Sizes(256, 2, 1, "cpu", ("flux",))


def plans(scale: str, device: str, patterns: Sequence[str], root: Path) -> Iterator[Plan]:
    """Yields the plans of the configurations for real models that match, value models before what uses them."""
    much = sizes(scale, device)
    overlay = root / "overlay.yaml"
    overlay.write_text(yaml.safe_dump(CHECKPOINTS))
    paths = [p for p in CONFIGS.glob("*.yaml") if WORLD not in p.stem]
    paths = [p for p in paths if any(fnmatch.fnmatch(p.stem, pattern) for pattern in patterns)]
    for path in sorted(paths, key=lambda p: (_rank(p.stem), p.stem)):
        yield plan(path, much, overlay)


def plan(path: Path, much: Sizes, overlay: Path) -> Plan:
    """Returns the plan of one configuration."""
    name = path.stem
    trainer = (
        f"--trainer.accelerator={much.accelerator}",
        "--trainer.devices=1",
        "--trainer.strategy=auto",
    )
    base = ("--config", str(path), *trainer)
    if name.startswith("distill_"):
        return _distillation(name, base, much, overlay)
    if name.startswith("eval_"):
        return _evaluation(name, base, much)
    if name.startswith(("draft", "nft_", "grpo_")):
        return _alignment(name, base, much, overlay)
    return _sampling(name, base, much)


def _rank(name: str) -> int:
    return next(k for k, prefix in enumerate(ORDER) if name.startswith(prefix))


def _side(much: Sizes, *keys: str) -> list[str]:
    return [] if much.side is None else [f"--{key}={much.side}" for key in keys]


def _uncompiled(much: Sizes, key: str) -> list[str]:
    """A step on a CPU is shorter than its compilation."""
    return [f"--{key}=false"] if much.accelerator == "cpu" else []


def _resumed(
    name: str, base: Sequence[str], more: Sequence[str], overlay: Path
) -> tuple[tuple[str, ...], ...]:
    """Two steps, two more from the checkpoint, and a validation of that checkpoint."""
    last = f"runs/{name}/checkpoints/last.ckpt"
    fit = ("fit", *base, "--config", str(overlay), *more)
    return (
        (*fit, "--trainer.max_steps=2"),
        (*fit, "--trainer.max_steps=4", "--ckpt_path=last"),
        ("validate", *base, *more, "--trainer.limit_val_batches=1", f"--ckpt_path={last}"),
    )


def _distillation(name: str, base: Sequence[str], much: Sizes, overlay: Path) -> Plan:
    more = [
        *_side(much, "data.resolution"),
        *_uncompiled(much, "model.compile"),
        f"--data.batch_size={much.batch}",
        "--data.num_workers=0",
        "--data.val_size=12",
        "--model.num_probes=8",
        "--model.num_held_out=4",
        "--model.num_end_probes=2",
        "--trainer.accumulate_grad_batches=1",
        "--trainer.val_check_interval=1",
        "--trainer.limit_val_batches=1",
        "--trainer.num_sanity_val_steps=0",
    ]
    files = ["value_model/config.json", "value_model/model.safetensors"]
    before: tuple[tuple[str, ...], ...] = ()
    if name.startswith(tuple(f"distill_{key}" for key in much.too_large)):
        more.append(f"--model.stitch_point={STITCH_POINT}")
    else:
        before = (("search", *base, *more),)
        files.append("search.json")
    return Plan(
        name,
        (*before, *_resumed(name, base, more, overlay)),
        4,
        tuple(f"runs/{name}/{file}" for file in files),
    )


def _alignment(name: str, base: Sequence[str], much: Sizes, overlay: Path) -> Plan:
    more = [
        *_side(much, "model.height", "model.width"),
        *_uncompiled(much, "model.generator.init_args.compile"),
        f"--model.micro_batch={much.batch}",
        f"--model.group_size={1 if name.startswith('draft') else 2}",
        "--data.prompts_per_update=2",
        f"--data.batch_size={much.batch}",
        f"--model.evaluation.sampler.init_args.num_steps={much.steps}",
        "--trainer.val_check_interval=1",
        "--trainer.limit_val_batches=1",
        "--trainer.num_sanity_val_steps=0",
    ]
    if name.startswith("nft"):
        more += ["--model.rollout_batch=4", "--model.fraction=0.2"]  # of the levels of each image
    if much.batch == 1:  # real networks on a CPU, where a pass takes ten seconds
        more += next((list(n) for start, n in SHORTER.items() if name.startswith(start)), [])
    key, pipeline = next((key, p.id) for key, p in PIPELINES.items() if name.endswith(key))
    lora, samples = f"runs/{name}/lora", f"runs/{name}/samples"
    plain = _sampling("plain", ("--config", str(CONFIGS / f"plain_{key}.yaml"), *base[2:]), much)
    tuned = f"--model.generator.init_args.finetuned={lora}"
    return Plan(
        name,
        (
            *_resumed(name, base, more, overlay),
            (RELOAD, pipeline, lora),
            (*plain.commands[0], tuned, f"--trainer.default_root_dir={samples}"),
        ),
        4,
        (f"{lora}/pytorch_lora_weights.safetensors", f"{samples}/samples.jsonl"),
    )


def _sampling(name: str, base: Sequence[str], much: Sizes) -> Plan:
    # FK steering has a window of steps, which a shorter schedule would not have
    window = name.startswith("fks")
    steps = (8 if much.batch == 1 else 40) if window else much.steps
    more = [
        *_side(much, "model.height", "model.width"),
        f"--data.batch_size={much.batch}",
        "--trainer.limit_predict_batches=1",
    ]
    if not window:
        more.append(f"--model.sampler.init_args.num_steps={steps}")
    elif much.batch == 1:
        more += SHORTER["fks"]
    return Plan(name, (("predict", *base, *more),), steps, (f"runs/{name}/samples.jsonl",))


def _evaluation(name: str, base: Sequence[str], much: Sizes) -> Plan:
    more = [f"--data.batch_size={much.batch}", "--data.num_workers=0"]
    commands: list[tuple[str, ...]] = []
    if name == "eval_geneval_hf":  # images of its own prompts
        path, samples = CONFIGS / "plain_sd35m.yaml", f"runs/{name}/prompts"
        plain = _sampling("plain_sd35m", ("--config", str(path), *base[2:]), much).commands[0]
        prompts = "--data.path=data/geneval/evaluation_metadata.jsonl"
        commands.append((*plain, prompts, f"--trainer.default_root_dir={samples}"))
        more += [f"--data.root={samples}"]
        more += ["--model.detector.size=[64,64]"] if much.side == 64 else []
    elif name != "eval_samples":
        more += _side(much, "data.resolution")
    commands.append(("test", *base, *more))
    return Plan(name, tuple(commands), 0, (f"runs/{name}/metrics.json",))
