r"""What users take away of a LoRA policy.

- `pytorch_lora_weights.safetensors`, which `StableDiffusion3Pipeline.load_lora_weights` and `FluxPipeline`'s read. Rank
  and α are in the file's metadata: a reader that ignores it takes α = r, half the update at α/r = 2. `fold_scale` puts
  the factor into B instead, for such readers.
- a peft folder (`adapter_config.json`, `adapter_model.safetensors`), which `PeftModel.from_pretrained` reads;
- the transformer with the update merged into its weights, a copy: W + (α/r)·B·A.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from stitchvm._version import __version__
from stitchvm.adapters.lora import PolicyAdapters, is_adapter_key
from stitchvm.adapters.policy import DEFAULT, full_tensor
from stitchvm.writing import readable

__all__ = ["export_lora", "lora_card", "merged_transformer", "pipeline_of", "plain_class"]

WEIGHTS = "pytorch_lora_weights.safetensors"
CARD = "README.md"
CALL = "guidance_scale=1.0"
_PIPELINES = {
    "SD3Transformer2DModel": "StableDiffusion3Pipeline",
    "FluxTransformer2DModel": "FluxPipeline",
}


def export_lora(
    policy: PolicyAdapters,
    folder: str | Path,
    *,
    base_model: str,
    name: str = DEFAULT,
    weights: dict[str, Tensor] | None = None,
    fold_scale: bool = False,
    card: str | None = None,
    call: str = CALL,
    overwrite: bool = False,
) -> Path:
    """Writes the weights for pipelines, a peft folder `peft/` and a model card; returns the folder.

    Arguments:
        policy: The policy.
        folder: Where to write; made if it does not exist.
        base_model: The pipeline that was trained, a folder or hub id: named in the card and in peft's configuration.
        name: Which adapter: "default" or a copy, such as "ema".
        weights: What `policy.weights(name)` returned, if it is sharded: all ranks gather, one writes.
        fold_scale: Whether α/r is multiplied into B and α = r is written.
        card: The text of the model card; a plain one if None.
        call: What the plain card's example gives the pipeline beside the prompt.
        overwrite: Whether an existing export may be replaced.

    Raises:
        FileExistsError: If there is an export and `overwrite` is False.
        ValueError: If no pipeline is known for the transformer.
    """
    import diffusers
    from peft import LoraConfig
    from safetensors.torch import save_file

    pipeline = pipeline_of(policy.transformer)
    folder = Path(folder)
    if (folder / WEIGHTS).exists() and not overwrite:
        raise FileExistsError(
            f"{folder} already holds LoRA weights; choose another folder or pass overwrite=True"
        )
    weights = policy.weights(name) if weights is None else weights
    alpha = policy.alpha
    if fold_scale:
        alpha = policy.r
        weights = {k: v * policy.scale if ".lora_B." in k else v for k, v in weights.items()}
    weights = {key: value.cpu().contiguous() for key, value in weights.items()}
    # what a LoRA is, and none of the fields by which peft's versions differ
    config = {"r": policy.r, "lora_alpha": alpha, "target_modules": policy.targets}
    getattr(diffusers, pipeline).save_lora_weights(
        folder,
        transformer_lora_layers=weights,
        transformer_lora_adapter_metadata=dict(config),
    )
    peft = folder / "peft"
    LoraConfig(
        **config, base_model_name_or_path=f"{base_model}/transformer", inference_mode=True
    ).save_pretrained(str(peft))
    save_file(
        {f"base_model.model.{key}": value for key, value in weights.items()},
        peft / "adapter_model.safetensors",
        metadata={"format": "pt"},
    )
    text = lora_card(policy, base_model, pipeline, name, call=call) if card is None else card
    (folder / CARD).write_text(text)
    readable(folder, peft)
    return folder


@torch.no_grad()
def merged_transformer(policy: PolicyAdapters, name: str = DEFAULT) -> Any:
    """Returns a new transformer with an adapter merged into its weights, W + (α/r)·B·A; the policy's stays as it is.

    The sum is taken in float32 and rounded to the frozen weights' dtype. Every rank must call it under FSDP2.

    Arguments:
        policy: The policy.
        name: Which adapter.
    """
    transformer, adapter = policy.transformer, policy.weights(name)
    state = {
        key.replace(".base_layer.", "."): full_tensor(value.detach()).clone()
        for key, value in transformer.state_dict().items()
        if not is_adapter_key(key)
    }
    for module in policy.modules:
        weight = state[f"{module}.weight"]
        a, b = (adapter[f"{module}.lora_{half}.weight"].to(weight.device) for half in "AB")
        weight.copy_(weight.float() + policy.scale * (b @ a))
    with torch.device("meta"):
        merged = plain_class(transformer).from_config(transformer.config)
    merged.load_state_dict(state, strict=True, assign=True)
    assert not any(p.is_meta for p in (*merged.parameters(), *merged.buffers()))
    return merged.requires_grad_(False).eval()


def lora_card(
    policy: PolicyAdapters,
    base_model: str,
    pipeline: str,
    name: str = DEFAULT,
    method: str = "",
    table: str = "",
    call: str = CALL,
) -> str:
    """Returns the text of a model card (Markdown with hub metadata) for LoRA weights.

    Arguments:
        policy: The policy.
        base_model: The pipeline that was trained.
        pipeline: The name of the diffusers class that loads it.
        name: Which adapter was exported.
        method: How it was trained, in a sentence, or "".
        table: A Markdown table of measured values, or "".
        call: What the example gives the pipeline beside the prompt: that which was trained with.
    """
    hub = "" if base_model.startswith((".", "/", "world:")) else f"base_model: {base_model}\n"
    measured = f"\n## Measured\n\n{table}\n" if table else ""
    sentence = f" {method}" if method else ""
    return f"""---
library_name: diffusers
{hub}tags: [lora, text-to-image, reward-alignment]
---
# LoRA weights

Trained with stitchvm {__version__} on `{base_model}` (arXiv 2605.19804, section 5).{sentence}

- adapter: {name}, rank {policy.r}, alpha {policy.alpha:g}, {len(policy.modules)} layers
- targets: {", ".join(policy.targets)}

```python
from diffusers import {pipeline}

pipeline = {pipeline}.from_pretrained("{base_model}")
pipeline.load_lora_weights("path/or/hub-id")
image = pipeline("a prompt", {call}).images[0]
```

`peft/` holds the same weights for `peft.PeftModel.from_pretrained(pipeline.transformer, "path/peft")`.
{measured}"""


def pipeline_of(transformer: nn.Module) -> str:
    """Returns the name of the diffusers pipeline that has such a transformer.

    Raises:
        ValueError: If none is known.
    """
    kind = next((k for k in _PIPELINES if k in _names(transformer)), None)
    if kind is None:
        raise ValueError(
            f"no pipeline is known for a {type(transformer).__name__}: expected one of {sorted(_PIPELINES)}."
        )
    return _PIPELINES[kind]


def _names(transformer: nn.Module) -> list[str]:
    return [kind.__name__ for kind in type(transformer).__mro__]


def plain_class(transformer: nn.Module) -> Any:
    """Returns the diffusers class of a transformer, without what FSDP2 mixes in."""
    import diffusers

    name = next(n for n in _names(transformer) if hasattr(diffusers, n))
    return getattr(diffusers, name)
