"""Opens CLIP models in the formats of open_clip: architecture names and tags, folders, single files, hub ids.

`open_clip.create_model` is not used for the weights, because it only warns of, or passes over in silence, what
makes a reward wrong: an activation (GELU or QuickGELU) the weights were not trained with, positional
embeddings of another resolution (they are resized), a checkpoint argument beside a folder (it is ignored). Here
each is an error. The network is built without memory and takes the checkpoint's tensors as they are.
"""

from __future__ import annotations

import functools
import json
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from stitchvm.hub import resolve, resolve_file
from stitchvm.rewards.weights import is_torchscript, load_strictly, read_state_dict

__all__ = ["LoadedCLIP", "first_on_hub", "load_clip", "warn_licence"]

CONFIG = "open_clip_config.json"
WEIGHTS = (
    "open_clip_model.safetensors",
    "open_clip_pytorch_model.safetensors",
    "open_clip_pytorch_model.bin",
)
TOKENIZER = ["*.json", "*.txt", "*.model"]


class LoadedCLIP(NamedTuple):
    """A CLIP model and what belongs to it.

    Attributes:
        model: The network, float as in the checkpoint.
        preprocess: mean, std, interpolation and resize_mode, as far as they are known.
        tokenizer: Maps a list of prompts to token ids with shape (B, L).
    """

    model: nn.Module
    preprocess: dict[str, Any]
    tokenizer: Callable[[list[str]], Tensor]


class _Source(NamedTuple):
    """Where a model's config and weights are, before anything is built."""

    config: dict[str, Any]
    preprocess: dict[str, Any]
    tokenizer: str  # a name for open_clip.get_tokenizer
    weights: Callable[[], Path]
    quick_gelu: bool | None  # what the weights were trained with, if that is known


def load_clip(
    model: str, checkpoint: str | None = None, *, quick_gelu: bool | None = None
) -> LoadedCLIP:
    """Builds a CLIP model with its weights.

    Arguments:
        model: An architecture name of open_clip, `local-dir:FOLDER`, `world:NAME`, or `hf-hub:ORG/NAME`.
        checkpoint: A tag of open_clip, a local file, `world:NAME/FILE` or `org/name/file` on the hub. None:
            the folder's own weights, or the architecture's only tag.
        quick_gelu: What an architecture's weights are known to have been trained with.

    Raises:
        FileNotFoundError: If a file, folder or hub repository is not there.
        ValueError: If the architecture or tag is unknown, the activation is not the weights', or the
            checkpoint does not fit (the keys are named).
    """
    warn_licence(f"{model} {checkpoint or ''}")
    if model.startswith(("world:", "local-dir:", "hf-hub:")):
        source = _folder_source(model, checkpoint)
    else:
        source = _architecture_source(model, checkpoint)
        if source.quick_gelu is None:
            source = source._replace(quick_gelu=quick_gelu)
        _check_activation(model, source)
    path = source.weights()
    if is_torchscript(path):
        _check_activation(model, source._replace(quick_gelu=True))
    network = _build(source.config, model)
    load_strictly(network, read_state_dict(path), f"{model} from {path.name}")
    return LoadedCLIP(network, source.preprocess, functools.partial(_tokenize, source.tokenizer))


def _tokenize(name: str, prompts: list[str]) -> Tensor:
    return _tokenizer(name)(prompts)


@functools.lru_cache(maxsize=8)
def _tokenizer(name: str) -> Callable[[list[str]], Tensor]:
    """Returns a tokenizer of open_clip; it takes a third of a second to make, and not all need one."""
    import open_clip

    tokenizer: Callable[[list[str]], Tensor] = open_clip.get_tokenizer(name)
    return tokenizer


def warn_licence(name: str) -> None:
    """Warns, once, of weights whose licence allows research only."""
    if "dfn" in name.lower():
        _warn_dfn()


@functools.cache
def _warn_dfn() -> None:
    warnings.warn(
        "DFN-CLIP's weights come under Apple's machine learning research model licence (apple-amlr): "
        "research use only",
        UserWarning,
        stacklevel=2,
    )


def _folder_source(model: str, checkpoint: str | None) -> _Source:
    """Returns the source of a folder with `open_clip_config.json`, local or on the hub."""
    kind, _, name = model.partition(":")
    if kind == "hf-hub":
        folder = resolve(name, allow_patterns=TOKENIZER)
    else:
        folder = resolve(model if kind == "world" else name)
    path = folder / CONFIG
    if not path.is_file():
        raise FileNotFoundError(
            f"'{model}' has no {CONFIG}: expected a folder of open_clip with model_cfg, preprocess_cfg and "
            f"weights ({WEIGHTS[0]})"
        )
    config = json.loads(path.read_text(encoding="utf-8"))
    if "model_cfg" not in config:
        raise ValueError(f"{CONFIG} of '{model}' has no 'model_cfg'; it has {sorted(config)}")

    def weights() -> Path:
        if checkpoint is not None:
            return _file(checkpoint, model)
        if kind == "hf-hub":
            return first_on_hub(name)
        found = [folder / file for file in WEIGHTS if (folder / file).is_file()]
        others = sorted(folder.glob("*.pt"))
        if not found and len(others) != 1:
            raise FileNotFoundError(
                f"'{model}' has no weights: expected {' or '.join(WEIGHTS)}, or one file *.pt"
            )
        return (found or others)[0]

    tokenizer = model if kind == "hf-hub" else f"local-dir:{folder}"
    return _Source(config["model_cfg"], config.get("preprocess_cfg", {}), tokenizer, weights, None)


def _architecture_source(model: str, checkpoint: str | None) -> _Source:
    """Returns the source of a built-in architecture with a tag or a file."""
    import open_clip
    from open_clip.pretrained import get_pretrained_cfg

    config = open_clip.get_model_config(model)
    if config is None:
        raise ValueError(
            f"open_clip has no architecture '{model}': expected one of open_clip.list_models(), such as "
            "ViT-L-14-336-quickgelu, or local-dir:FOLDER, hf-hub:ORG/NAME, world:clip"
        )
    tags = open_clip.list_pretrained_tags_by_model(model)
    published = {tag: get_pretrained_cfg(model, tag) for tag in tags}
    if checkpoint is None:
        if len(tags) != 1:
            raise ValueError(
                f"which weights of {model}? Give checkpoint: a file, org/name/file on the hub, or one of "
                f"its tags ({', '.join(tags) or 'it has none'})"
            )
        checkpoint = tags[0]
    if preset := get_pretrained_cfg(model, checkpoint):
        weights = functools.partial(_tagged, preset)
        return _Source(config, preset, model, weights, preset.get("quick_gelu", False))
    weights = functools.partial(_file, checkpoint, model, tuple(tags))
    of_hub = [p for p in published.values() if checkpoint.startswith(p.get("hf_hub") or "\0")]
    presets = of_hub or list(published.values())
    return _Source(
        config,
        # what all published weights of the architecture have in common holds for a file too
        {key: value for key in ("mean", "std", "interpolation", "resize_mode")
         if (value := _common([p.get(key) for p in presets])) is not None},
        model,
        weights,
        _common([p.get("quick_gelu", False) for p in presets]),
    )  # fmt: skip


def _common(values: list[Any]) -> Any:
    return values[0] if values and all(value == values[0] for value in values) else None


def _file(checkpoint: str, model: str, tags: tuple[str, ...] = ()) -> Path:
    if (
        "/" not in checkpoint
        and not checkpoint.startswith("world:")
        and not Path(checkpoint).exists()
    ):
        raise ValueError(
            f"'{checkpoint}' is neither a file nor a tag of {model}: expected a file, org/name/file on the "
            f"hub, or a tag ({', '.join(tags) or 'it has none'})"
        )
    return resolve_file(checkpoint)


def _tagged(preset: dict[str, Any]) -> Path:
    if preset.get("hf_hub"):
        return first_on_hub(preset["hf_hub"].rstrip("/"))
    from open_clip.pretrained import download_pretrained

    return Path(download_pretrained(preset))


def first_on_hub(repository: str, files: Sequence[str] = WEIGHTS) -> Path:
    """Returns the first of the usual weight files that a hub repository has, or that is in the cache."""
    from huggingface_hub import errors, try_to_load_from_cache

    for file in files:
        cached = try_to_load_from_cache(repository, file)
        if isinstance(cached, str):
            return Path(cached)
    for file in files[:-1]:
        try:
            return resolve_file(f"{repository}/{file}")
        except FileNotFoundError as error:
            hopeless = errors.LocalEntryNotFoundError, errors.RepositoryNotFoundError
            if isinstance(error.__cause__, hopeless):  # offline, gated, no such repository
                raise
    return resolve_file(f"{repository}/{files[-1]}")


def _check_activation(model: str, source: _Source) -> None:
    """Raises ValueError if the weights were trained with the other of GELU and QuickGELU."""
    import open_clip

    built = bool(source.config.get("quick_gelu", False))
    if source.quick_gelu is None or source.quick_gelu == built:
        return
    other = model.removesuffix("-quickgelu") if built else f"{model}-quickgelu"
    mend = (
        f"use model '{other}'"
        if other in open_clip.list_models()
        else "use a folder (local-dir:) with"
    )
    if other not in open_clip.list_models():
        mend += f' "quick_gelu": {str(source.quick_gelu).lower()} in its model_cfg'
    names = {True: "QuickGELU", False: "GELU"}
    raise ValueError(
        f"QuickGELU mismatch: these weights of '{model}' were trained with {names[source.quick_gelu]}, the "
        f"architecture computes {names[built]}, and every score would be off; {mend}"
    )


def _build(config: dict[str, Any], model: str) -> nn.Module:
    """Returns the network on the meta device, but for buffers that no checkpoint has."""
    import open_clip

    config = {**config}
    custom_text = config.pop("custom_text", False)
    unsupported = [
        key
        for key in ("timm_model_name", "hf_model_name")
        if key in {**config["vision_cfg"], **config["text_cfg"]}
    ]
    if unsupported or "multimodal_cfg" in config:
        raise ValueError(
            f"'{model}' is not a plain CLIP ({', '.join(unsupported) or 'multimodal_cfg'}): expected "
            "open_clip's own vision transformer and text transformer"
        )
    with torch.device("meta"):
        network = (open_clip.CustomTextCLIP if custom_text else open_clip.CLIP)(**config)
    for module in network.modules():
        mask = module._buffers.get("attn_mask")
        if mask is not None:  # causal
            module._buffers["attn_mask"] = torch.full(mask.shape, float("-inf")).triu_(1)
    return network
