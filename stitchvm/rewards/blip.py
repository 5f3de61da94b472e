"""Opens ImageReward's checkpoint: BLIP under its original names, loaded into transformers' BLIP classes.

    blip.visual_encoder.*   a ViT (timm's names)                                  → BlipVisionModel
    blip.text_encoder.*     a BERT that attends to image tokens in every layer    → BlipTextModel
    mlp.layers.{0,2,4,6,7}  five linear maps with nothing between them            → `Network.head`

The widths come from the tensors themselves and, for the text encoder, from med_config.json; heads of the ViT are 64
wide. BLIP's projections `vision_proj` and `text_proj` stand in the file too and take no part in the score.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from stitchvm.hub import resolve, resolve_file
from stitchvm.rewards.weights import fill_positions, load_strictly, read_state_dict

__all__ = ["LoadedBLIP", "load_imagereward"]

WEIGHTS, CONFIG = "ImageReward.pt", "med_config.json"
TOKENIZER = ["special_tokens_map.json", "tokenizer.json", "tokenizer_config.json", "vocab.txt"]
HEAD = {
    0: 1024,
    2: 128,
    4: 64,
    6: 16,
    7: 1,
}  # place in nn.Sequential → width; dropout at the others
UNUSED = tuple(
    f"blip.{name}"
    for name in (
        "vision_proj.weight",
        "vision_proj.bias",
        "text_proj.weight",
        "text_proj.bias",
        "text_encoder.embeddings.position_ids",
    )
)
# transformers' name → the original one
RENAMED = (
    (r"^text\.", "blip.text_encoder."),
    (r"^head\.", "mlp.layers."),
    (r"^visual\.embeddings\.class_embedding$", "blip.visual_encoder.cls_token"),
    (r"^visual\.embeddings\.position_embedding$", "blip.visual_encoder.pos_embed"),
    (r"^visual\.embeddings\.patch_embedding\.", "blip.visual_encoder.patch_embed.proj."),
    (r"^visual\.post_layernorm\.", "blip.visual_encoder.norm."),
    (r"^visual\.encoder\.layers\.", "blip.visual_encoder.blocks."),
    (r"^(blip\.visual_encoder\.blocks\.\d+)\.self_attn\.qkv\.", r"\1.attn.qkv."),
    (r"^(blip\.visual_encoder\.blocks\.\d+)\.self_attn\.projection\.", r"\1.attn.proj."),
    (r"^(blip\.visual_encoder\.blocks\.\d+)\.layer_norm(\d)\.", r"\1.norm\2."),
)
CLASS, POSITIONS = "blip.visual_encoder.cls_token", "blip.visual_encoder.pos_embed"
PATCHES, HIDDEN = (
    "blip.visual_encoder.patch_embed.proj.weight",
    "blip.visual_encoder.blocks.0.mlp.fc1.weight",
)
TEXT_SETTINGS = (
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
    "max_position_embeddings",
    "vocab_size",
    "layer_norm_eps",
    "hidden_act",
    "pad_token_id",
)


class Network(nn.Module):
    """ImageReward's three parts.

    Attributes:
        visual: The vision transformer.
        text: The text encoder with cross-attention.
        head: The linear maps, by their place.
    """

    def __init__(self, visual: nn.Module, text: nn.Module, width: int) -> None:
        super().__init__()
        self.visual, self.text, self.head = visual, text, nn.ModuleDict()
        for place, out in HEAD.items():
            self.head[str(place)] = nn.Linear(width, out)
            width = out


class LoadedBLIP(NamedTuple):
    """ImageReward's networks and what belongs to them.

    Attributes:
        network: The networks, float as in the checkpoint.
        size: The side of the square input image.
        tokenizer: BERT's tokenizer with BLIP's two extra tokens.
    """

    network: Network
    size: int
    tokenizer: Any


def load_imagereward(model: str, tokenizer: str | None, default_tokenizer: str) -> LoadedBLIP:
    """Builds ImageReward with its weights.

    Arguments:
        model: A folder or hub id with ImageReward.pt and med_config.json.
        tokenizer: A folder or hub id with BERT's vocabulary. None: `model` itself if it has one, else
            `default_tokenizer`.
        default_tokenizer: Where the vocabulary is published.

    Raises:
        FileNotFoundError: If a file, folder or hub repository is not there.
        ValueError: If a file is another one than expected (the keys are named), or the tokenizer has not
            as many tokens as the text encoder.
    """
    model = model.removeprefix("local-dir:").removeprefix("hf-hub:")
    folder = resolve(model, allow_patterns=[CONFIG, *TOKENIZER])
    if not (folder / CONFIG).is_file():
        raise FileNotFoundError(
            f"'{model}' has no {CONFIG}: expected a folder or hub id of ImageReward, with {WEIGHTS} and {CONFIG}"
        )
    settings = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    if lacking := [key for key in TEXT_SETTINGS if key not in settings]:
        raise ValueError(
            f"{CONFIG} of '{model}' lacks {', '.join(lacking)}; it has {sorted(settings)}"
        )
    words = _tokenizer(folder, tokenizer or default_tokenizer, own=tokenizer is None)
    if len(words) != settings["vocab_size"]:
        raise ValueError(
            f"the tokenizer has {len(words)} tokens with BLIP's [DEC] and [ENC], the text encoder "
            f"{settings['vocab_size']}: give `tokenizer`, a folder or hub id of bert-base-uncased"
        )
    local = folder / WEIGHTS
    if not local.is_file() and Path(model).expanduser().exists():
        raise FileNotFoundError(f"'{model}' has no weights: expected {WEIGHTS}")
    path = local if local.is_file() else resolve_file(f"{model}/{WEIGHTS}")
    state = {k: v for k, v in read_state_dict(path).items() if k not in UNUSED}
    network, size = _build(state, settings, path)
    load_strictly(network, state, f"ImageReward ({path.name})", _original_name)
    return LoadedBLIP(network, size, words)


def _original_name(name: str) -> str:
    """Returns the name in the published file of one of the network's tensors."""
    for pattern, original in RENAMED:
        name = re.sub(pattern, original, name)
    return name


def _build(state: dict[str, Tensor], settings: dict[str, Any], path: Path) -> tuple[Network, int]:
    """Returns the networks that a checkpoint is for, on the meta device, and the side of their image."""
    from transformers import BlipTextConfig, BlipTextModel, BlipVisionConfig, BlipVisionModel

    if lacking := [key for key in (CLASS, POSITIONS, PATCHES, HIDDEN) if key not in state]:
        raise ValueError(
            f"{path} is not ImageReward's checkpoint: it has no {', '.join(lacking)} but {sorted(state)[:4]}; "
            f"expected {WEIGHTS} of the hub's THUDM/ImageReward, the state dict as published"
        )
    width, patch = state[CLASS].shape[-1], state[PATCHES].shape[-1]
    side = round((state[POSITIONS].shape[1] - 1) ** 0.5)
    if width % 64 or side * side != state[POSITIONS].shape[1] - 1:
        raise ValueError(
            f"{path}: a ViT of width {width} with {state[POSITIONS].shape[1]} positions, expected a multiple of "
            "64 and a square of patches and a class token"
        )
    blocks = {k.split(".")[3] for k in state if k.startswith("blip.visual_encoder.blocks.")}
    vision = BlipVisionConfig(
        hidden_size=width,
        intermediate_size=state[HIDDEN].shape[0],
        num_hidden_layers=len(blocks),
        num_attention_heads=width // 64,
        image_size=side * patch,
        patch_size=patch,
        layer_norm_eps=1e-6,
        hidden_act="gelu",
        attention_dropout=0.0,
    )
    text = BlipTextConfig(
        **{key: settings[key] for key in TEXT_SETTINGS},
        encoder_hidden_size=width,  # not the file's encoder_width, which BLIP overrules too
        is_decoder=True,  # gives it cross-attention; its self-attention looks both ways all the same
    )
    with torch.device("meta"):
        network = Network(
            BlipVisionModel(vision),
            BlipTextModel(text, add_pooling_layer=False),
            settings["hidden_size"],
        )
    fill_positions(network)
    return network.eval(), side * patch


def _tokenizer(folder: Path, name: str, own: bool) -> Any:
    """Returns BERT's tokenizer with BLIP's tokens, from `folder` if it is there and `own`, else from `name`."""
    from transformers import BertTokenizer

    def found(place: Path) -> bool:
        return (place / "tokenizer.json").is_file() or (place / "vocab.txt").is_file()

    if not (own and found(folder)):
        folder = resolve(name, allow_patterns=TOKENIZER)
    if not found(folder):  # transformers would make one up, of a few tokens
        raise FileNotFoundError(
            f"'{name}' has no tokenizer: expected vocab.txt or tokenizer.json of bert-base-uncased"
        )
    tokenizer = BertTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"bos_token": "[DEC]"})
    tokenizer.add_special_tokens({"additional_special_tokens": ["[ENC]"]})
    return tokenizer
