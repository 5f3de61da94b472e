"""Whether an alignment run can be: its settings, before anything is loaded, and its losses, as they come."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lightning.pytorch import Trainer
from torch import Tensor

from stitchvm.rewards.base import NotFiniteError
from stitchvm.schedule import sigma_grid

if TYPE_CHECKING:
    from stitchvm.modules.alignment import Alignment

__all__ = [
    "check_data",
    "check_generator",
    "check_settings",
    "check_skipped",
    "check_trainer",
    "pixel_size",
    "what_to_lower",
]

PRECISIONS = ("32-true", "bf16-mixed")
STRATEGIES = ("SingleDeviceStrategy", "DDPStrategy", "ModelParallelStrategy")


def check_settings(module: Alignment) -> None:
    """Raises ValueError if a number is out of its range."""
    for name in ("group_size", "micro_batch", "num_steps", "max_skipped"):
        number = getattr(module, name)
        if number is not None and number < 1:
            raise ValueError(f"model.{name} = {number}: expected at least 1.")
    lr, clip, limit = module.lr, module.clip, module.ema_limit
    if not lr > 0 or (clip is not None and not clip > 0) or not 0 <= limit <= 1:
        raise ValueError(
            f"model.lr = {lr}, clip = {clip}, ema_limit = {limit}: expected lr > 0, clip > 0 or null, and ema_limit in "
            "[0, 1]."
        )
    if not all(0 <= beta < 1 for beta in module.betas):
        raise ValueError(f"model.betas = {list(module.betas)}: expected two numbers in [0, 1).")
    sampler = module.evaluation.sampler
    if sampler is not None and (sampler.wants_value or sampler.particles > 1):
        raise ValueError(
            f"model.evaluation.sampler is a {type(sampler).__name__}, which asks a value, but held-out prompts are "
            "sampled without one, to see the policy alone: take stitchvm.samplers.plain.PlainSampler."
        )
    for name in ("warmup_steps", "weight_decay"):
        number = getattr(module, name)
        if not 0 <= number < float("inf"):
            raise ValueError(f"model.{name} = {number}: expected a finite number of at least 0.")
    if module.grid != "pipeline":
        sigma_grid(
            module.num_steps, shift=module.shift, kind=module.grid
        )  # raises for an unknown kind


def pixel_size(height: int | None, width: int | None) -> tuple[int, int] | None:
    """Returns height and width, or None for the model's own. Raises ValueError if one is missing."""
    if height is None and width is None:
        return None
    if height is None or width is None or min(height, width) < 1:
        raise ValueError(
            f"model.height = {height}, width = {width}: expected two numbers of pixels, or neither for the model's "
            "size."
        )
    return height, width


def check_trainer(trainer: Trainer) -> None:
    """Raises ValueError if a Trainer has a precision, a strategy or data that alignment cannot have."""
    check_data(getattr(trainer, "datamodule", None))
    if str(trainer.precision) not in PRECISIONS:
        raise ValueError(
            f"trainer.precision = {trainer.precision}: expected one of {', '.join(PRECISIONS)}. The frozen networks' "
            "dtype is model.generator.dtype; trained weights are float32."
        )
    kind = type(trainer.strategy).__name__
    if kind not in STRATEGIES:
        raise ValueError(
            f"trainer.strategy is a {kind}: expected one device, ddp, or ModelParallelStrategy (FSDP2, see "
            "configs/trainer/fsdp2.yaml)."
        )
    tensor = getattr(trainer.strategy, "_tensor_parallel_size", 1)
    if tensor == "auto":
        tensor = trainer.num_devices
    if tensor != 1:
        raise ValueError(
            f"trainer.strategy has tensor_parallel_size = {tensor}, so that as many devices would make the same update "
            "and shard nothing among each other: give it data_parallel_size, the number of all devices, and "
            "tensor_parallel_size: 1. (Lightning's defaults are the nodes, and the devices of a node.)"
        )


def check_generator(generator: Any) -> None:
    """Raises ValueError if a generator is fine-tuned already: the export would be of another than it names."""
    tuned = getattr(generator, "finetuned", None)
    if tuned is not None:
        raise ValueError(
            f"model.generator.finetuned = {tuned!r}: fine-tuning begins at the pipeline's own weights. Go on from a "
            "run with --ckpt_path; to train on a whole fine-tuned transformer, save a pipeline with it and give that "
            "as path."
        )


def check_data(datamodule: Any) -> None:
    """Raises ValueError if a data module gives something else than prompts."""
    for name in ("train_data", "val_data"):
        data = getattr(datamodule, name, None)
        if data is not None and not hasattr(data, "prompts"):
            raise ValueError(
                f"fine-tuning samples from prompts, but {type(datamodule).__name__} gives {type(data).__name__}: name "
                "a data module of prompts under data:, such as stitchvm.data.prompts.Prompts"
            )


def check_skipped(module: Alignment, norm: Tensor) -> None:
    """Raises NotFiniteError if as many updates in a row have been skipped as may be."""
    if module.skipped_in_a_row >= module.max_skipped:
        raise NotFiniteError(
            f"{module.skipped_in_a_row} updates in a row had a loss or gradient that is not finite (the last one's "
            f"norm was {float(norm)}): lower model.lr, look at the rewards in the logs, or run generator and reward in "
            "bfloat16 or float32."
        )


def what_to_lower(module: Alignment) -> str:
    """Returns what to do when memory runs out."""
    again = (
        "" if module.gradient_checkpointing else ", or set model.gradient_checkpointing to true"
    )
    return (
        f"out of memory in an update: lower model.micro_batch (now {module.micro_batch} images in a pass; the update "
        f"stays the same){again}. Go on with --ckpt_path last."
    )
