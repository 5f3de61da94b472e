"""What users take away of full fine-tuning: a folder `transformer/` as diffusers writes and reads it."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from stitchvm._version import __version__
from stitchvm.adapters.export import CALL, CARD, pipeline_of, plain_class
from stitchvm.adapters.full import PolicyWeights
from stitchvm.adapters.policy import DEFAULT
from stitchvm.writing import readable

__all__ = ["export_transformer", "transformer_card"]

CONFIG = "config.json"


@torch.no_grad()
def export_transformer(
    policy: PolicyWeights,
    folder: str | Path,
    *,
    base_model: str,
    name: str = DEFAULT,
    weights: dict[str, Tensor] | None = None,
    call: str = CALL,
    overwrite: bool = False,
) -> Path:
    """Writes a set of weights as `transformer/`, and a model card; returns the folder.

    Arguments:
        policy: The policy.
        folder: Where to write; made if it does not exist.
        base_model: The pipeline that was trained, a folder or hub id: named in the card.
        name: Which weights: "default" or a copy, such as "ema".
        weights: What `policy.weights(name)` returned, if it is sharded: all ranks gather, one writes.
        call: What the card's example gives the pipeline beside the prompt.
        overwrite: Whether an existing export may be replaced.

    Raises:
        FileExistsError: If there is an export and `overwrite` is False.
        ValueError: If no pipeline is known for the transformer.
    """
    pipeline, folder = pipeline_of(policy.transformer), Path(folder)
    target = folder / "transformer"
    if (target / CONFIG).exists() and not overwrite:
        raise FileExistsError(
            f"{folder} already holds a transformer; choose another folder or pass overwrite=True"
        )
    kind = plain_class(policy.transformer)
    with torch.device("meta"):
        plain = kind.from_config(policy.transformer.config)
    kept = plain.state_dict().keys()  # buffers are whole on every rank
    state = {key: b for key, b in policy.transformer.named_buffers() if key in kept}
    state |= policy.weights(name) if weights is None else weights
    plain.load_state_dict({k: v.cpu() for k, v in state.items()}, strict=True, assign=True)
    plain.save_pretrained(target)
    (folder / CARD).write_text(transformer_card(base_model, pipeline, kind.__name__, name, call))
    readable(target)
    return folder


def transformer_card(
    base_model: str, pipeline: str, kind: str, name: str = DEFAULT, call: str = CALL
) -> str:
    """Returns the text of a model card (Markdown with hub metadata) for fine-tuned weights, see `lora_card`."""
    hub = "" if base_model.startswith((".", "/", "world:")) else f"base_model: {base_model}\n"
    return f"""---
library_name: diffusers
{hub}tags: [text-to-image, reward-alignment]
---
# A fine-tuned transformer

All weights of the transformer of `{base_model}`, trained with stitchvm {__version__} (arXiv 2605.19804, section 5).
These are its "{name}" weights.

```python
from diffusers import {pipeline}, {kind}

transformer = {kind}.from_pretrained("path/or/hub-id", subfolder="transformer")
pipeline = {pipeline}.from_pretrained("{base_model}", transformer=transformer)
image = pipeline("a prompt", {call}).images[0]
```
"""
