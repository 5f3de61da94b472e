"""Tiny CLIP checkpoints with random weights, in the formats of the real ones."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import open_clip
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

VISION: dict[str, Any] = {
    "image_size": 32,
    "layers": 4,
    "width": 32,
    "head_width": 16,
    "patch_size": 8,
}
TEXT: dict[str, Any] = {
    "context_length": 16,
    "vocab_size": 49408,
    "width": 8,
    "heads": 2,
    "layers": 1,
}


def clip_config(quick_gelu: bool = False, embed_dim: int = 24, **vision: Any) -> dict[str, Any]:
    """Returns a model_cfg of open_clip with 4 blocks of width 32 on a 4 x 4 grid; `vision` changes it."""
    return {
        "embed_dim": embed_dim,
        "quick_gelu": quick_gelu,
        "vision_cfg": {**VISION, **vision},
        "text_cfg": dict(TEXT),
    }


def clip_model(config: dict[str, Any], seed: int = 0) -> nn.Module:
    """Returns open_clip's own model with noise on every parameter, so that no bias or gain is trivial."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = open_clip.CLIP(**json.loads(json.dumps(config))).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim:
                    parameter.add_(0.1 * torch.randn(parameter.shape))
    return model


def clip_folder(
    folder: Path, *, seed: int = 0, preprocess: dict[str, Any] | None = None, **changes: Any
) -> str:
    """Writes a folder with open_clip_config.json and open_clip_model.safetensors; returns "local-dir:…"."""
    folder.mkdir(parents=True, exist_ok=True)
    config = clip_config(**changes)
    content = {"model_cfg": config, "preprocess_cfg": preprocess or {}}
    (folder / "open_clip_config.json").write_text(json.dumps(content))
    save_file(clip_model(config, seed).state_dict(), folder / "open_clip_model.safetensors")
    return f"local-dir:{folder}"


def register(name: str, folder: Path, config: dict[str, Any]) -> str:
    """Makes an architecture name of open_clip and returns it."""
    path = folder / f"{name}.json"
    path.write_text(json.dumps(config))
    open_clip.add_model_config(path)
    return name


def hps_file(path: Path, state: dict[str, Tensor]) -> Path:
    """Writes a checkpoint as HPSv2's: a torch file with half-precision weights under "state_dict"."""
    torch.save({"state_dict": {key: value.half() for key, value in state.items()}}, path)
    return path


def head_file(path: Path, embed_dim: int = 24, relu: bool = False, seed: int = 0) -> Path:
    """Writes an aesthetic MLP with the keys of LAION's linear or ReLU predictors (half their widths)."""
    generator = torch.Generator().manual_seed(seed)
    widths = [embed_dim, 64, 32, 16, 8, 1]
    places = (0, 3, 6, 9, 11) if relu else (0, 2, 4, 6, 7)
    state = {}
    for k, place in enumerate(places):
        shape = (widths[k + 1], widths[k])
        state[f"layers.{place}.weight"] = torch.randn(shape, generator=generator) / shape[1] ** 0.5
        state[f"layers.{place}.bias"] = torch.randn(shape[0], generator=generator)
    torch.save(state, path)
    return path
