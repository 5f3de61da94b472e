"""Names and shapes of a checkpoint's tensors, from the class on the meta device, under the names that are published.

transformers 5 has changed two names since: the text tower of FLUX lost its prefix `text_model.`, and T5's tied
`encoder.embed_tokens.weight` is listed beside `shared.weight`. Checkpoints keep the old ones.
"""

from __future__ import annotations

import math
from typing import Any

import torch

__all__ = ["count", "imagereward_shapes", "open_clip_shapes", "shapes_of"]

Shapes = dict[str, tuple[int, ...]]
BUFFERS = ("pos_embed.pos_embed", "position_ids")


def shapes_of(kind: str, config: dict[str, Any]) -> Shapes:
    """Returns the tensors of a network of diffusers or transformers, in the order of its checkpoint.

    Arguments:
        kind: The class.
        config: What its config.json holds.
    """
    import diffusers
    import transformers

    with torch.device("meta"):
        if hasattr(diffusers, kind):
            model = getattr(diffusers, kind).from_config(config)
        else:
            cls = getattr(transformers, kind)
            model = cls(cls.config_class(**config))
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    shapes.pop("encoder.embed_tokens.weight", None)
    if kind == "CLIPTextModel" and not any(name.startswith("text_model.") for name in shapes):
        shapes = {f"text_model.{name}": shape for name, shape in shapes.items()}
    return shapes


def open_clip_shapes(architecture: dict[str, Any]) -> Shapes:
    """Returns the tensors of a CLIP of open_clip, from its model_cfg."""
    import open_clip

    with torch.device("meta"):
        model = open_clip.CLIP(**architecture)
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def count(shapes: Shapes) -> int:
    """Returns the number of parameters: all but buffers."""
    return sum(math.prod(s) for name, s in shapes.items() if not name.endswith(BUFFERS))


def imagereward_shapes(
    width: int, depth: int, image: int, patch: int, med: dict[str, Any], ratio: int = 4
) -> Shapes:
    """Returns the tensors of ImageReward.pt: BLIP's ViT, a BERT that attends to it, an MLP.

    Arguments:
        width: The width of the ViT.
        depth: Its blocks.
        image: The side of its image, in pixels.
        patch: The side of a patch.
        med: What med_config.json holds.
        ratio: The width of the ViT's MLPs over that of the ViT.
    """
    shapes: Shapes = {}

    def linear(name: str, out: int, into: int) -> None:
        shapes.update({f"{name}.weight": (out, into), f"{name}.bias": (out,)})

    def norm(name: str, size: int) -> None:
        shapes.update({f"{name}.weight": (size,), f"{name}.bias": (size,)})

    d, ffn = med["hidden_size"], med["intermediate_size"]
    vision, text = "blip.visual_encoder", "blip.text_encoder"
    shapes[f"{vision}.cls_token"] = (1, 1, width)
    shapes[f"{vision}.pos_embed"] = (1, 1 + (image // patch) ** 2, width)
    shapes[f"{vision}.patch_embed.proj.weight"] = (width, 3, patch, patch)
    shapes[f"{vision}.patch_embed.proj.bias"] = (width,)
    for k in range(depth):
        block = f"{vision}.blocks.{k}"
        norm(f"{block}.norm1", width)
        linear(f"{block}.attn.qkv", 3 * width, width)
        linear(f"{block}.attn.proj", width, width)
        norm(f"{block}.norm2", width)
        linear(f"{block}.mlp.fc1", ratio * width, width)
        linear(f"{block}.mlp.fc2", width, ratio * width)
    norm(f"{vision}.norm", width)
    shapes[f"{text}.embeddings.position_ids"] = (1, med["max_position_embeddings"])
    shapes[f"{text}.embeddings.word_embeddings.weight"] = (med["vocab_size"], d)
    shapes[f"{text}.embeddings.position_embeddings.weight"] = (med["max_position_embeddings"], d)
    norm(f"{text}.embeddings.LayerNorm", d)
    for k in range(med["num_hidden_layers"]):
        layer = f"{text}.encoder.layer.{k}"
        for part, into in (("attention", d), ("crossattention", width)):
            linear(f"{layer}.{part}.self.query", d, d)
            linear(f"{layer}.{part}.self.key", d, into)
            linear(f"{layer}.{part}.self.value", d, into)
            linear(f"{layer}.{part}.output.dense", d, d)
            norm(f"{layer}.{part}.output.LayerNorm", d)
        linear(f"{layer}.intermediate.dense", ffn, d)
        linear(f"{layer}.output.dense", d, ffn)
        norm(f"{layer}.output.LayerNorm", d)
    linear("blip.vision_proj", 256, width)
    linear("blip.text_proj", 256, d)
    widths = (d, 1024, 128, 64, 16, 1)
    for place, into, out in zip((0, 2, 4, 6, 7), widths[:-1], widths[1:], strict=True):
        linear(f"mlp.layers.{place}", out, into)
    return shapes
