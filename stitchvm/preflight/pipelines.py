"""Diffusers pipelines: the parts that a backbone, a generator or a VAE reads, and whether they belong together."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stitchvm.preflight.findings import Finding
from stitchvm.preflight.places import Place, find
from stitchvm.preflight.tensors import (
    AGAIN,
    BrokenFile,
    Shapes,
    blocks,
    find_weights,
    read_weights,
)

__all__ = [
    "Space",
    "check_pipeline",
    "check_vae",
    "latent_space",
    "read_json",
    "transformer_config",
]

STEM = "diffusion_pytorch_model"
CLASSES = {
    "SD3Backbone": ("SD3Transformer2DModel",),
    "FluxBackbone": ("FluxTransformer2DModel",),
    "Generator": ("SD3Transformer2DModel", "FluxTransformer2DModel"),
}
USE = {"SD3Transformer2DModel": "SD3Backbone", "FluxTransformer2DModel": "FluxBackbone"}
ENCODERS = {"SD3Transformer2DModel": "text_encoder_3", "FluxTransformer2DModel": "text_encoder_2"}
TOKENIZERS = ("tokenizer.json", "vocab.json", "spiece.model", "vocab.txt")


@dataclass(frozen=True)
class Space:
    """A latent space: VAEs of as many channels and other constants are other spaces.

    Attributes:
        channels: The channels C.
        scale: The scaling factor.
        shift: The shift.
    """

    channels: int
    scale: float
    shift: float

    def __str__(self) -> str:
        return f"{self.channels} channels, scale {self.scale}, shift {self.shift}"


def read_json(path: Path) -> dict[str, Any]:
    """Returns the object in a JSON file.

    Raises:
        BrokenFile: If it is none.
        FileNotFoundError: If it is not there.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise BrokenFile(f"{path.name} is not JSON ({error})") from error
    if not isinstance(content, dict):
        raise BrokenFile(f"{path.name} holds no JSON object")
    return content


def transformer_config(name: str, revision: str | None = None) -> dict[str, Any] | None:
    """Returns the configuration of a pipeline's transformer, if it can be read."""
    place = find(name, revision)
    try:
        return read_json(place.folder / "transformer" / "config.json") if place.folder else None
    except (OSError, BrokenFile):
        return None


def latent_space(name: str, revision: str | None = None) -> Space | None:
    """Returns the latent space of a pipeline (or of a VAE's folder), if its configuration can be read."""
    place = find(name, revision)
    if place.folder is None:
        return None
    folder = place.folder / "vae" if (place.folder / "vae").is_dir() else place.folder
    try:
        config = read_json(folder / "config.json")
        channels, scale = config["latent_channels"], config["scaling_factor"]
    except (OSError, BrokenFile, KeyError):
        return None
    return Space(int(channels), float(scale), float(config.get("shift_factor") or 0.0))


def check_pipeline(part: str, kind: str, arguments: dict[str, Any]) -> Iterator[Finding]:
    """Yields what is found of a backbone or generator.

    Arguments:
        part: Where the configuration names it.
        kind: "SD3Backbone", "FluxBackbone" or "Generator".
        arguments: Its arguments: `path`, `revision`, `null_embeddings`, `finetuned`.
    """
    name = str(arguments.get("path"))
    place = find(name, arguments.get("revision"))
    if place.folder is None:
        yield place.absent(part)
        return
    yield from check_transformer(part, kind, place)
    if kind == "Generator":
        if arguments.get("finetuned"):
            from stitchvm.preflight.finetuned import check_finetuned

            yield from check_finetuned(part, str(arguments["finetuned"]), place)
        yield from check_vae(part, arguments)
        yield _file(part, place, "scheduler/scheduler_config.json")
    if not arguments.get("null_embeddings"):
        yield from check_text(part, place)


def check_transformer(part: str, kind: str, place: Place) -> Iterator[Finding]:
    """Yields what is found of the transformer: its class, its shards, its widths, its channels."""
    assert place.folder is not None
    what = f"{place.name}/transformer"
    try:
        config = read_json(place.folder / "transformer" / "config.json")
    except FileNotFoundError:
        yield place.absent(part, "transformer/config.json")
        return
    except BrokenFile as error:
        yield Finding(part, what, "wrong", str(error), AGAIN)
        return
    found = config.get("_class_name")
    if found not in CLASSES[kind]:
        remedy = (
            f"use {USE[found]}" if found in USE and kind != "Generator" else "give another model"
        )
        expected = " or ".join(CLASSES[kind])
        yield Finding(part, what, "wrong", f"holds a {found}, {kind} takes a {expected}", remedy)
        return
    shapes = yield from weights(part, place, "transformer", STEM)
    if shapes is None:
        return
    problem = transformer_problem(config, shapes)
    if problem:
        remedy = "weights and transformer/config.json are of two models: download both again"
        yield Finding(part, what, "wrong", problem, remedy)
        return
    space = latent_space(place.name)
    channels = config.get("in_channels", 0) // (4 if found == "FluxTransformer2DModel" else 1)
    if space is not None and space.channels != channels:
        detail = f"reads latents of {channels} channels, its VAE makes {space.channels}"
        yield Finding(part, what, "wrong", detail, "transformer and vae are of two models")


def transformer_problem(config: dict[str, Any], shapes: Shapes) -> str:
    """Returns in what the weights are not those of the configuration, or ""."""
    width = config["num_attention_heads"] * config["attention_head_dim"]
    lists = {"transformer_blocks.": config["num_layers"]}
    expected: Shapes
    if config["_class_name"] == "FluxTransformer2DModel":
        lists["single_transformer_blocks."] = config["num_single_layers"]
        expected = {"x_embedder.weight": (width, config["in_channels"])}
    else:
        patch = config["patch_size"]
        expected = {"pos_embed.proj.weight": (width, config["in_channels"], patch, patch)}
    expected["context_embedder.weight"] = (width, config["joint_attention_dim"])
    for prefix, number in lists.items():
        if blocks(shapes, prefix) != number:
            return f"the weights have {blocks(shapes, prefix)} {prefix.rstrip('.')}, config.json {number}"
    for key, shape in expected.items():
        if shapes.get(key) != shape:
            return f"tensor '{key}' has shape {shapes.get(key)}, config.json makes it {shape}"
    return ""


def check_vae(part: str, arguments: dict[str, Any]) -> Iterator[Finding]:
    """Yields what is found of a VAE."""
    place = find(str(arguments.get("path")), arguments.get("revision"))
    if place.folder is None:
        yield place.absent(part)
        return
    inner = "vae" if (place.folder / "vae").is_dir() else ""
    what = f"{place.name}/{inner}".rstrip("/")
    try:
        config = read_json(place.folder / inner / "config.json")
    except FileNotFoundError:
        yield place.absent(part, f"{inner or 'vae'}/config.json")
        return
    except BrokenFile as error:
        yield Finding(part, what, "wrong", str(error), AGAIN)
        return
    if config.get("_class_name") != "AutoencoderKL":
        detail = f"holds a {config.get('_class_name')}, expected an AutoencoderKL"
        yield Finding(part, what, "wrong", detail, "give a pipeline with such a VAE")
        return
    shapes = yield from weights(part, place, inner, STEM)
    channels = config["latent_channels"]
    made = None if shapes is None else shapes.get("encoder.conv_out.weight", (0,))[0]
    if made is not None and made != 2 * channels:
        detail = f"the weights make {made // 2} channels, config.json {channels}"
        yield Finding(part, what, "wrong", detail, AGAIN)


def check_text(part: str, place: Place) -> Iterator[Finding]:
    """Yields what is found of the text encoders and tokenizers that model_index.json names."""
    assert place.folder is not None
    try:
        index = read_json(place.folder / "model_index.json")
    except FileNotFoundError:
        yield place.absent(part, "model_index.json")
        return
    except BrokenFile as error:
        yield Finding(part, f"{place.name}/model_index.json", "wrong", str(error), AGAIN)
        return
    config = transformer_config(place.name) or {}
    t5 = ENCODERS.get(str(config.get("_class_name")))
    for name, entry in index.items():
        if not isinstance(entry, list) or entry[-1] is None:
            continue
        if name.startswith("tokenizer"):
            if not any((place.folder / name / file).is_file() for file in TOKENIZERS):
                yield place.absent(part, f"{name}/*")
        elif name.startswith("text_encoder"):
            shapes = yield from weights(part, place, name, "model")
            width, wanted = _width(shapes), config.get("joint_attention_dim")
            if name == t5 and width is not None and wanted is not None and width != wanted:
                detail = f"its tokens have width {width}, the transformer reads {wanted}"
                remedy = "take text encoders and transformer of one repository"
                yield Finding(part, f"{place.name}/{name}", "wrong", detail, remedy)


def _width(shapes: Shapes | None) -> int | None:
    table = None if shapes is None else shapes.get("shared.weight")
    return None if table is None else table[1]


def weights(part: str, place: Place, inner: str, stem: str) -> Any:
    """Yields what is found of a network's weights; returns their shapes if all are there."""
    assert place.folder is not None
    folder, what = place.folder / inner, f"{place.name}/{inner}".rstrip("/")
    try:
        found = find_weights(folder, stem)
        lost = [file for file in found.files if not file.is_file()]
        if lost:
            yield _absent_weights(part, place, inner, stem, lost, found.table)
            return None
        shapes = read_weights(found)
    except BrokenFile as error:
        yield Finding(part, what, "wrong", str(error), AGAIN)
        return None
    yield Finding(part, what, "ok")
    return shapes


def _absent_weights(
    part: str, place: Place, inner: str, stem: str, lost: list[Path], index: Path | None
) -> Finding:
    name = "/".join(filter(None, [inner, lost[0].name]))
    finding = place.absent(part, name)
    if index is not None:
        more = f" and {len(lost) - 1} more" if len(lost) > 1 else ""
        return finding._replace(detail=f"{index.name} names {lost[0].name}{more}: not there")
    variants = sorted((lost[0].parent).glob(f"{stem}.*.safetensors")) if lost[0].parent else []
    if variants:
        detail = f"there is only the variant {variants[0].name}"
        return finding._replace(detail=detail)
    return finding


def _file(part: str, place: Place, file: str) -> Finding:
    assert place.folder is not None
    if (place.folder / file).is_file():
        return Finding(part, f"{place.name}/{file}", "ok")
    return place.absent(part, file)
