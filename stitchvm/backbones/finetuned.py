"""A transformer as a pipeline has it, or as a fine-tuning left it.

`stitchvm fit` leaves LoRA weights (`lora/`) or, of full fine-tuning, a transformer (`full/`): both are what diffusers
writes and reads. LoRA weights stay beside the frozen ones, W x + (α/r)·B·A·x: added to weights in bfloat16, of which
they change few by half a last digit, they would be rounded away. They are applied in the transformer's dtype, as in
training.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from stitchvm.hub import resolve

__all__ = ["CONFIG", "LORA", "load_transformer", "lora_problem", "network_problem"]

LORA = "pytorch_lora_weights.safetensors"
CONFIG = "transformer/config.json"
# what of a configuration two transformers of one class differ in, such as SD 3.5 Medium's and Large's
NUMBERS = (
    "num_layers",
    "num_single_layers",
    "num_attention_heads",
    "attention_head_dim",
    "in_channels",
    "joint_attention_dim",
)


def load_transformer(
    kind: str, folder: Path, dtype: torch.dtype, finetuned: str | None = None
) -> Any:
    """Returns a pipeline's transformer, frozen.

    Arguments:
        kind: The transformer's class in diffusers.
        folder: The pipeline's folder.
        dtype: The dtype of all weights.
        finetuned: A folder or hub id with LoRA weights for it (`pytorch_lora_weights.safetensors`), or with a
            `transformer/` in its place.

    Raises:
        FileNotFoundError: If there is neither.
        ValueError: If that is not for this transformer.
    """
    import diffusers

    tuned = None
    if finetuned is not None:
        tuned = resolve(finetuned, allow_patterns=[LORA, "transformer/*"])
        if (tuned / CONFIG).is_file():
            ours, theirs = (json.loads((place / CONFIG).read_text()) for place in (folder, tuned))
            problem = network_problem(ours, theirs)
            if problem is not None:
                raise ValueError(f"'{finetuned}' {problem}")
            folder, tuned = tuned, None
    transformer = getattr(diffusers, kind).from_pretrained(
        folder, subfolder="transformer", torch_dtype=dtype, use_safetensors=True
    )
    if tuned is not None:
        _add_lora(transformer, tuned, str(finetuned), dtype)
    return transformer.requires_grad_(False).eval()


def network_problem(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> str | None:
    """Returns why a transformer cannot take the place of a pipeline's, or None.

    Arguments:
        ours: The configuration of the pipeline's.
        theirs: That of the other.
    """
    kinds = [config.get("_class_name") for config in (ours, theirs)]
    if kinds[0] != kinds[1]:
        return f"holds a {kinds[1]}, but the pipeline has a {kinds[0]}"
    for name in NUMBERS:
        if name in ours and name in theirs and ours[name] != theirs[name]:
            return (
                f"is of another model: its {name} is {theirs[name]}, the pipeline's {ours[name]}"
            )
    return None


def lora_problem(
    lora: Mapping[str, Sequence[int]], network: Mapping[str, Sequence[int]]
) -> str | None:
    """Returns why LoRA weights are not for a transformer, or None.

    Arguments:
        lora: The shapes in the file, by name.
        network: The shapes of the transformer's weights, by name.
    """
    if not lora:
        return "it holds nothing"
    for key, shape in lora.items():
        module, _, half = key.removeprefix("transformer.").partition(".lora_")
        if not (key.startswith("transformer.") and half):
            return (
                f"it holds '{key}', expected LoRA weights of a transformer alone, as diffusers names them "
                "(transformer.…): write them with the pipeline's save_lora_weights"
            )
        weight = network.get(f"{module}.weight")
        if weight is None:
            return f"it is of another model: the transformer has no '{module}'"
        if half not in ("A.weight", "B.weight"):
            continue
        side = 1 if half == "A.weight" else 0
        if len(shape) != len(weight) or shape[side] != weight[side]:
            return f"it is of another model: '{key}' has shape {tuple(shape)}, for weights of {tuple(weight)}"
        missing = "AB"[side]
        other = lora.get(f"{key.removesuffix(half)}{missing}.weight")
        if other is None:
            return f"it is not whole: '{key}' has no {missing}"
        if len(other) == len(shape) and shape[1 - side] != other[side]:
            return (
                f"it is damaged: '{key}' has rank {shape[1 - side]}, its {missing} {other[side]}"
            )
    return None


def _add_lora(transformer: nn.Module, folder: Path, name: str, dtype: torch.dtype) -> None:
    from safetensors import SafetensorError, safe_open

    file = folder / LORA
    if not file.is_file():
        raise FileNotFoundError(
            f"'{name}' has neither {LORA} nor {CONFIG}: give the folder lora/ or full/ that a fine-tuning left in "
            "its run folder"
        )
    try:
        with safe_open(file, framework="pt") as weights:
            keys = list(weights.keys())
            found = {key: weights.get_slice(key).get_shape() for key in keys}
    except SafetensorError as error:
        raise ValueError(f"{file} is damaged or no safetensors file ({error})") from error
    own = {key: tuple(p.shape) for key, p in transformer.named_parameters()}
    problem = lora_problem(found, own)
    if problem is not None:
        raise ValueError(f"{file}: {problem}")
    network: Any = transformer
    network.load_lora_adapter(folder, prefix="transformer", weight_name=LORA, use_safetensors=True)
    taken = [p for key, p in transformer.named_parameters() if "lora_" in key]
    if len(taken) != len(found):
        raise ValueError(f"{file}: the transformer took {len(taken)} of {len(found)} tensors")
    for parameter in taken:
        parameter.data = parameter.data.to(dtype)
