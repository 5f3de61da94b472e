"""Every part of a configuration that names files, in the order in which it stands there."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

from stitchvm.preflight import data, rewards
from stitchvm.preflight.findings import BAD, Finding
from stitchvm.preflight.pipelines import check_pipeline, check_vae, latent_space
from stitchvm.preflight.tensors import BrokenFile, check_torch_file
from stitchvm.preflight.values import check_value_model

__all__ = ["check"]

PIPELINES = ("SD3Backbone", "FluxBackbone", "Generator")


def check(config: dict[str, Any]) -> list[Finding]:
    """Returns what is found of everything that a composed configuration names, each once.

    Arguments:
        config: model, data, trainer, and maybe ckpt_path.
    """
    found: dict[tuple[str, str, str], Finding] = {}
    model = config.get("model") or {}
    run = _arguments(model)
    made_by = _path(run.get("generator")), _path(run.get("vae"))
    parts = [("model", model, run.get("reward")), ("data", config.get("data") or {}, None)]
    for name, part, reward in parts:
        for finding in _walk(name, part, made_by, reward):
            found.setdefault((finding.what, finding.state, finding.detail), finding)
    for finding in [*_one_space(run), *_checkpoint(config.get("ckpt_path"))]:
        found[finding.what, finding.state, finding.detail] = finding
    bad = {f.what for f in found.values() if f.state in BAD}
    return [f for f in found.values() if f.state != "ok" or f.what not in bad]


def _walk(
    part: str,
    node: Any,
    made_by: tuple[str | None, str | None],
    reward: dict[str, Any] | None,
) -> Iterator[Finding]:
    """Yields the findings of a component and of all below it; generator and VAE make the latents of the run."""
    if isinstance(node, list):
        for k, item in enumerate(node):
            yield from _walk(f"{part}[{k}]", item, made_by, reward)
        return
    if not isinstance(node, dict):
        return
    if "class_path" not in node:
        own = node.get("reward", reward) if "value" in node else reward  # a term of a sum
        for key, item in node.items():
            yield from _walk(f"{part}.{key}", item, made_by, own)
        return
    kind = str(node["class_path"]).rpartition(".")[2]
    arguments = _arguments(node)
    if kind in PIPELINES:
        yield from check_pipeline(part, kind, arguments)
    elif kind == "VAE":
        yield from check_vae(part, arguments)
    elif kind in rewards.CHECKS:
        yield from rewards.CHECKS[kind](part, arguments)
    elif kind == "StitchedFactory":
        named = _named(reward)
        generator, vae = made_by
        yield from check_value_model(part, str(arguments["path"]), generator, named, vae)
    elif kind in data.CHECKS:
        yield from data.CHECKS[kind](part, arguments)
    else:
        for key, item in (node.get("init_args") or {}).items():
            yield from _walk(f"{part}.{key}", item, made_by, reward)


def _arguments(node: Any) -> dict[str, Any]:
    """Returns a component's arguments, with the defaults of its class."""
    if not isinstance(node, dict) or "class_path" not in node:
        return {}
    given = node.get("init_args") or {}
    module, _, name = str(node["class_path"]).rpartition(".")
    if name not in (*PIPELINES, "VAE", *rewards.CHECKS, "StitchedFactory"):
        return dict(given)
    parameters = inspect.signature(getattr(import_module(module), name)).parameters.values()
    defaults = {p.name: p.default for p in parameters if p.default is not p.empty}
    return defaults | given


def _named(reward: dict[str, Any] | None) -> dict[str, Any] | None:
    """Returns the run's reward with all its arguments; None for a sum of several."""
    if not isinstance(reward, dict) or "class_path" not in reward:
        return None
    if str(reward["class_path"]).rpartition(".")[2] not in rewards.CHECKS:
        return None
    return {"class_path": reward["class_path"], "init_args": _arguments(reward)}


def _path(node: Any) -> str | None:
    path = _arguments(node).get("path")
    return None if path is None else str(path)


def _one_space(run: dict[str, Any]) -> Iterator[Finding]:
    """Yields that a distillation's VAE does not make the latents which its backbone reads."""
    backbone, vae = run.get("backbone"), _path(run.get("vae"))
    if backbone is None or vae is None:
        return
    arguments, made = _arguments(backbone) or {}, latent_space(vae)
    if made is None:
        return
    name, channels = arguments.get("path"), arguments.get("channels")
    read = None if name is None else latent_space(str(name))
    problem = ""
    if read is not None and read != made:
        problem = f"{name} was trained on latents of {read}, {vae} makes {made}"
    elif channels is not None and channels != made.channels:
        problem = f"the backbone reads {channels} channels, {vae} makes {made}"
    if problem:
        remedy = "take the VAE of the backbone's own repository"
        yield Finding("model.vae", f"{vae} (latent space)", "wrong", problem, remedy)


def _checkpoint(path: Any) -> Iterator[Finding]:
    """Yields what is found of a Lightning checkpoint; "last" and the like, and what is elsewhere, Lightning finds."""
    if not isinstance(path, str) or path in ("last", "best", "hpc", "registry"):
        return
    if "://" in path or path.startswith("registry:"):
        return
    file = Path(path)
    if not file.exists():
        yield Finding("ckpt_path", path, "missing", "no such checkpoint", "correct --ckpt_path")
        return
    try:
        if file.is_file():
            check_torch_file(file)
    except BrokenFile as error:
        remedy = "take the checkpoint before it"
        yield Finding("ckpt_path", path, "wrong", str(error), remedy)
        return
    yield Finding("ckpt_path", path, "ok")
