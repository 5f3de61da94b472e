"""What an alignment run leaves: its part of a checkpoint, and LoRA weights for pipelines."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from stitchvm.adapters.lora import PolicyAdapters
from stitchvm.adapters.policy import Policy

if TYPE_CHECKING:
    from stitchvm.modules.alignment import Alignment

__all__ = ["export_policy", "load_alignment", "save_alignment"]


def save_alignment(module: Alignment, checkpoint: dict[str, Any]) -> None:
    """Adds the policy with its copies, counters, the cost so far, and what the method keeps; all ranks must call it."""
    checkpoint["alignment"] = {
        "method": type(module).__name__,
        "policy": describe_policy(module.policy),
        "skipped": module.skipped,
        "skipped_in_a_row": module.skipped_in_a_row,
    }
    checkpoint["spent"] = dict(module.spent.totals)
    checkpoint["policy"] = module.policy.state(keep=_writes(module))
    checkpoint["method_state"] = module.method_state()


def load_alignment(module: Alignment, checkpoint: dict[str, Any]) -> None:
    """Takes up what `save_alignment` added, after making sure that it is of this method and configuration.

    Raises:
        ValueError: If it is not, naming what differs.
    """
    method = type(module).__name__
    if "alignment" not in checkpoint:
        raise ValueError(
            f"the checkpoint is of no alignment run, {method} cannot go on from it: choose another, or start without "
            "--ckpt_path."
        )
    saved, own = checkpoint["alignment"], describe_policy(module.policy)
    pairs = {"method": (saved["method"], method)}
    pairs |= {
        k: (saved["policy"].get(k), own.get(k)) for k in sorted(own.keys() | saved["policy"])
    }
    differing = [f"{k} {_short(a)} (here {_short(b)})" for k, (a, b) in pairs.items() if a != b]
    if differing:
        raise ValueError(
            f"the checkpoint is of another configuration: {'; '.join(differing)}. Use the config.yaml beside it, or "
            "start without --ckpt_path."
        )
    module.policy.load_state(checkpoint["policy"])
    module.skipped, module.skipped_in_a_row = saved["skipped"], saved["skipped_in_a_row"]
    if (
        "spent" in checkpoint
    ):  # the first versions' checkpoints have no clock: from there on it counts from 0
        module.spent.load(checkpoint["spent"])
    module.load_method_state(checkpoint["method_state"])
    module.note_loaded(checkpoint)
    if module._built.sharded and isinstance(module.policy, PolicyAdapters):
        # under FSDP2 the states are loaded by now, but those of whole weights mixed up among each other
        states = checkpoint.get("optimizer_states", [])
        for optimizer, state in zip(module.trainer.optimizers, states, strict=False):
            optimizer.load_state_dict(state)


def export_policy(module: Alignment, folder: str | Path, name: str, overwrite: bool) -> Path:
    """Writes a set of weights for diffusers' and peft's loaders; all ranks must call it under FSDP2.

    Arguments:
        module: The module.
        folder: Where to write.
        name: "default" or a copy.
        overwrite: Whether an existing export may be replaced.
    """
    from stitchvm.adapters.export import export_lora
    from stitchvm.adapters.export_full import export_transformer

    policy, writes = module.policy, _writes(module)
    weights = policy.weights(name, keep=writes)
    if writes:
        write: Any = export_lora if isinstance(policy, PolicyAdapters) else export_transformer
        call = f"guidance_scale={float(module.guidance_scale)}"
        if module.size is not None:
            call += ", height={}, width={}".format(*module.size)
        how: Any = {"weights": weights, "call": call, "overwrite": overwrite}
        write(policy, folder, base_model=module.generator.id, name=name, **how)
    return Path(folder)


def describe_policy(policy: Policy) -> dict[str, Any]:
    """Returns what a checkpoint's policy must agree in, as plain data."""
    found: dict[str, Any] = {"class": type(policy).__name__, "copies": list(policy.copies)}
    if isinstance(policy, PolicyAdapters):
        found |= {"r": policy.r, "alpha": float(policy.alpha), "layers": list(policy.modules)}
    return found


def _writes(module: Alignment) -> bool:
    """Whether this rank writes files."""
    return module._trainer is None or module.trainer.is_global_zero


def _short(value: Any) -> str:
    return f"{len(value)} of them" if isinstance(value, list) and len(value) > 4 else str(value)
