"""Opens CLIP models in the format of transformers: a folder or hub id with config.json and model.safetensors.

The networks are transformers' own; they are only shown under the names of open_clip's towers, so that all that
cuts, copies and scores those (`OpenCLIPReward`, `CLIPTail`) takes these too. As in `checkpoint.py` the network is built
without memory and must be given every tensor it has: `from_pretrained` fills missing ones with random numbers.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from stitchvm.hub import resolve
from stitchvm.rewards.checkpoint import LoadedCLIP, first_on_hub
from stitchvm.rewards.weights import fill_positions, load_strictly, read_state_dict

__all__ = ["TransformersCLIP", "TransformersTower", "load_transformers_clip"]

WEIGHTS = ("model.safetensors", "pytorch_model.bin")
PROCESSOR = [
    "added_tokens.json",
    "merges.txt",
    "preprocessor_config.json",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
]
INTERPOLATIONS = {2: "bilinear", 3: "bicubic"}  # PIL's numbers


class _Block(nn.Module):
    """One layer of a CLIP encoder of transformers, called with tokens alone."""

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.layer = layer

    @property
    def mlp(self) -> Any:
        """The feed-forward part."""
        return self.layer.mlp

    def forward(self, x: Tensor) -> Tensor:
        """Maps tokens (B, N, D) to tokens."""
        return self.layer(x, None)


class TransformersTower(nn.Module):
    """The vision tower of a `CLIPModel` under the names of open_clip's, sharing its parameters.

    Arguments:
        model: A `CLIPModel` of transformers.
    """

    pool_type = "tok"
    final_ln_after_pool = False

    def __init__(self, model: Any) -> None:
        super().__init__()
        vision, config = model.vision_model, model.config.vision_config
        self.image_size = (config.image_size, config.image_size)
        self.grid_size = (config.image_size // config.patch_size,) * 2
        self.conv1 = vision.embeddings.patch_embedding
        self.class_embedding = vision.embeddings.class_embedding
        self.positional_embedding = vision.embeddings.position_embedding.weight
        self.ln_pre = vision.pre_layrnorm
        self.transformer = nn.Module()
        self.transformer.resblocks = nn.ModuleList(map(_Block, vision.encoder.layers))
        self.ln_post = vision.post_layernorm
        # a copy: FSDP2 shards contiguous parameters only
        self.proj = nn.Parameter(model.visual_projection.weight.detach().T.contiguous())


class TransformersCLIP(nn.Module):
    """A `CLIPModel` of transformers with the attributes of open_clip's that a reward uses.

    Arguments:
        model: A `CLIPModel` of transformers.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.visual = TransformersTower(model)
        self.text_model, self.text_projection = model.text_model, model.text_projection
        self.logit_scale = model.logit_scale

    def encode_text(self, tokens: Tensor) -> Tensor:
        """Returns text embeddings (B, E), not normalised, of token ids (B, L).

        Text attends backwards only, so that what stands behind the end of text needs no mask.
        """
        return self.text_projection(self.text_model(input_ids=tokens).pooler_output)


def load_transformers_clip(
    model: str, processor: str | None, default_processor: str
) -> LoadedCLIP:
    """Builds a CLIP model with its weights.

    Arguments:
        model: A folder or hub id with config.json and model.safetensors (or pytorch_model.bin).
        processor: A folder or hub id with the tokenizer and preprocessor_config.json. None: `model` itself
            if it has a tokenizer, else `default_processor`.
        default_processor: Where tokenizer and preprocessing are published.

    Raises:
        FileNotFoundError: If a file, folder or hub repository is not there.
        ValueError: If it is no CLIP model, the checkpoint does not fit (the keys are named), or tokenizer
            and preprocessing are those of another model.
    """
    from transformers import CLIPConfig, CLIPModel

    model = model.removeprefix("local-dir:").removeprefix("hf-hub:")
    folder = resolve(model, allow_patterns=["config.json", *PROCESSOR])
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(
            f"'{model}' has no config.json: expected a folder or hub id of a CLIPModel of transformers"
        )
    settings = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if settings.get("model_type") != "clip":
        raise ValueError(
            f"config.json of '{model}' is that of a {settings.get('model_type')!r} model, expected 'clip'"
        )
    own = _has_tokenizer(folder)
    place = folder if processor is None and own else _processor(processor or default_processor)
    config = CLIPConfig.from_dict(settings)
    with torch.device("meta"):
        network = CLIPModel(config).eval()
    fill_positions(network)
    path = _weights(folder, model)
    # older releases kept the numbers 0, 1, … among the weights
    state = {k: v for k, v in read_state_dict(path).items() if not k.endswith(".position_ids")}
    load_strictly(network, state, f"{model} ({path.name})")
    size, length = config.vision_config.image_size, config.text_config.max_position_embeddings
    tokenize = functools.partial(_tokenize, place, length, config.text_config.vocab_size)
    return LoadedCLIP(TransformersCLIP(network), _preprocess(place, size), tokenize)


def _weights(folder: Path, model: str) -> Path:
    """Returns the file of the weights, from the folder or the hub."""
    for file in WEIGHTS:
        if (folder / file).is_file():
            return folder / file
    if Path(model).expanduser().exists() or model.startswith("world:"):
        raise FileNotFoundError(f"'{model}' has no weights: expected {' or '.join(WEIGHTS)}")
    return first_on_hub(model, WEIGHTS)


def _has_tokenizer(folder: Path) -> bool:
    return (folder / "tokenizer.json").is_file() or (folder / "vocab.json").is_file()


def _processor(name: str) -> Path:
    """Returns the folder of a tokenizer and its preprocessing."""
    folder = resolve(name, allow_patterns=PROCESSOR)
    if not _has_tokenizer(folder):  # transformers would make one up, of a few tokens
        raise FileNotFoundError(
            f"'{name}' has no tokenizer: expected tokenizer.json, or vocab.json and merges.txt; give "
            "`processor`, a folder or hub id that has it"
        )
    return folder


def _preprocess(folder: Path, size: int) -> dict[str, Any]:
    """Returns mean, std, interpolation and resize_mode of a preprocessor_config.json, if there is one."""
    preset: dict[str, Any] = {"resize_mode": "processor"}
    path = folder / "preprocessor_config.json"
    if not path.is_file():
        return preset
    settings = json.loads(path.read_text(encoding="utf-8"))
    sides = [settings.get("size", size), settings.get("crop_size", size)]
    found = {side for s in sides for side in (s.values() if isinstance(s, dict) else [s])}
    resample = settings.get("resample", 3)
    if found != {size} or resample not in INTERPOLATIONS:
        raise ValueError(
            f"{path} makes images of {sides[0]} cropped to {sides[1]} pixels with resampling {resample}, "
            f"expected {size}, {size} and 2 or 3: give the `processor` that belongs to the model"
        )
    preset["interpolation"] = INTERPOLATIONS[resample]
    preset |= {k: settings[f"image_{k}"] for k in ("mean", "std") if f"image_{k}" in settings}
    return preset


@functools.lru_cache(maxsize=8)
def _tokenizer(folder: Path) -> Callable[..., Any]:
    from transformers import CLIPTokenizer

    tokenizer: Callable[..., Any] = CLIPTokenizer.from_pretrained(folder)
    return tokenizer


def _tokenize(folder: Path, length: int, vocabulary: int, prompts: list[str]) -> Tensor:
    """Returns token ids (B, length): cut off and padded, whatever the other prompts are.

    Raises:
        ValueError: If the text tower has no embedding for a token.
    """
    ids: Tensor = _tokenizer(folder)(
        prompts, padding="max_length", truncation=True, max_length=length, return_tensors="pt"
    ).input_ids
    if int(ids.max()) >= vocabulary:
        raise ValueError(
            f"the tokenizer in {folder} has token {int(ids.max())}, the text tower {vocabulary} tokens: give the "
            "`processor` that belongs to the model"
        )
    return ids
