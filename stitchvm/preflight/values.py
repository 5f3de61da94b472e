"""Value models: made for the blocks, the reward and the latent space that they are now to be used with?"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from stitchvm.preflight.findings import Finding
from stitchvm.preflight.pipelines import (
    CLASSES,
    check_pipeline,
    latent_space,
    read_json,
    transformer_config,
)
from stitchvm.preflight.places import find
from stitchvm.preflight.rewards import CHECKS, clip_vision
from stitchvm.preflight.tensors import AGAIN, BrokenFile, Shapes, read_header

__all__ = ["check_value_model"]

DISTIL = "`stitchvm fit` with the config of that name makes it"
AFRESH = "distil a value model for this pair"
IDENTITY = ("model", "checkpoint", "version", "head")


def check_value_model(
    part: str,
    path: str,
    generator: str | None = None,
    reward: dict[str, Any] | None = None,
    vae: str | None = None,
) -> Iterator[Finding]:
    """Yields what is found of a value model, and of the backbone and the reward that it brings along.

    Arguments:
        part: Where the configuration names it.
        path: Its folder or hub id.
        generator: What makes the latents that it is to value, if the run has a generator.
        reward: Class path and arguments of the reward that it is to be used with, if the run names one.
        vae: What makes them instead, if the run has a VAE of its own, as evaluations do.
    """
    place = find(path)
    if place.folder is None:
        finding = place.absent(part)
        yield finding if place.hub else finding._replace(remedy=_how(path))
        return
    try:
        config = read_json(place.folder / "config.json")
        shapes = read_header(place.folder / "model.safetensors")
        spec, made = (
            {"class_path": config[k]["class_path"], "init_args": dict(config[k]["init_args"])}
            for k in ("backbone", "reward")
        )
        i, _ = config["stitch_point"]
    except FileNotFoundError as error:
        yield place.absent(part, Path(str(error.filename)).name)
        return
    except BrokenFile as error:
        yield Finding(part, place.name, "wrong", str(error), AGAIN)
        return
    except (KeyError, TypeError, ValueError):
        detail = "config.json is not that of a value model"
        yield Finding(part, place.name, "wrong", detail, _how(path))
        return
    problem = (
        _other_blocks(spec, shapes)
        or _other_tower(made, shapes)
        or _other_space(spec, vae or generator)
        or _other_reward(made, reward)
    )
    if problem:
        yield Finding(part, place.name, "wrong", problem, AFRESH)
        return
    yield Finding(part, place.name, "ok", f"stitched after block {i}")
    kinds = [s["class_path"].rpartition(".")[2] for s in (spec, made)]
    if kinds[0] in CLASSES and spec["init_args"].get("path") != generator:
        yield from check_pipeline(part, kinds[0], spec["init_args"])
    if kinds[1] in CHECKS and reward is None:
        yield from CHECKS[kinds[1]](part, made["init_args"])


def _other_blocks(spec: dict[str, Any], shapes: Shapes) -> str:
    """Returns in what the stitch does not fit the blocks it is put on, or ""."""
    stitch, name = shapes.get("stitch.F.weight"), spec["init_args"].get("path")
    config = transformer_config(name) if name else None
    if stitch is None or config is None:
        return ""
    kind = config.get("_class_name", "")
    if kind.startswith("SD3") != spec["class_path"].endswith("SD3Backbone"):
        return f"was made on a {spec['class_path'].rpartition('.')[2]}, and {name} is a {kind}"
    width = config["num_attention_heads"] * config["attention_head_dim"]
    if stitch[1] != width:
        return f"its stitch reads features of width {stitch[1]}, the blocks of {name} have {width}"
    return ""


def _other_tower(made: dict[str, Any], shapes: Shapes) -> str:
    """Returns in what the stitch does not fit the reward it hands over to, or ""."""
    stitch, model = shapes.get("stitch.F.weight"), made["init_args"].get("model")
    kind = made["class_path"].rpartition(".")[2]
    if stitch is None or kind not in ("CLIPReward", "HPSv2Reward", "AestheticReward"):
        return ""
    vision = clip_vision(model)
    if vision is not None and stitch[0] != vision["width"]:
        return f"its stitch makes tokens of width {stitch[0]}, {model} has {vision['width']}"
    return ""


def _other_space(spec: dict[str, Any], generator: str | None) -> str:
    """Returns in what the value model's latents are not the generator's, or the VAE's, or ""."""
    if generator is None:
        return ""
    theirs = latent_space(generator)
    name = spec["init_args"].get("path")
    if name is None:  # the VAE-stitch baseline has no pipeline, but the VAE's numbers
        known = spec["init_args"]
        channels, scaling = known.get("channels"), (known.get("scale"), known.get("shift"))
        if theirs is None:
            return ""
        if channels not in (None, theirs.channels):
            return f"reads latents of {channels} channels, {generator} makes {theirs}"
        if scaling[0] is not None and scaling != (theirs.scale, theirs.shift):
            return f"reads latents of scale, shift {scaling}, {generator} makes {theirs}"
        return ""
    own = latent_space(name)
    if own is not None and theirs is not None and own != theirs:
        return f"reads the latents of {name} ({own}), {generator} makes others ({theirs})"
    return ""


def _other_reward(made: dict[str, Any], reward: dict[str, Any] | None) -> str:
    """Returns in what the run's reward is not the one that was distilled, or ""."""
    if reward is None:
        return ""
    kinds = [r["class_path"].rpartition(".")[2] for r in (made, reward)]
    if kinds[0] != kinds[1]:
        return f"was distilled from a {kinds[0]}, and the run's reward is a {kinds[1]}"
    for key in IDENTITY:
        old, new = (r.get("init_args", {}).get(key) for r in (made, reward))
        if old != new:
            return f"was distilled from a reward with {key} {old!r}, the run's has {new!r}"
    return ""


def _how(path: str) -> str:
    parts = Path(path).parts
    if len(parts) >= 2 and parts[-1] == "value_model" and parts[-2].startswith("distill_"):
        return f"`stitchvm fit --config configs/{parts[-2]}.yaml` makes it"
    return DISTIL
