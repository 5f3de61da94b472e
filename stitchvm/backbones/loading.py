"""Loads the first blocks of a diffusers transformer without reading the others.

The network is built on the meta device from its published configuration (so that every block has the shape it has in
the whole network), cut, and then given exactly the tensors it still wants, each from the shard that holds it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from stitchvm.hub import resolve

_WEIGHTS = "diffusion_pytorch_model.safetensors"
_INDEX = _WEIGHTS + ".index.json"
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def parse_dtype(name: str) -> torch.dtype:
    """Returns the torch dtype of a name.

    Raises:
        ValueError: If the name is none of float32, bfloat16, float16.
    """
    if name not in _DTYPES:
        raise ValueError(f"dtype '{name}', expected one of {', '.join(_DTYPES)}")
    return _DTYPES[name]


def dtype_name(dtype: torch.dtype) -> str:
    """Returns the name that `parse_dtype` takes."""
    return str(dtype).removeprefix("torch.")


def read_config(path: str, expected_class: str, revision: str | None = None) -> dict[str, Any]:
    """Returns the transformer's configuration from a pipeline folder or hub id.

    Raises:
        FileNotFoundError: If there is no `transformer/config.json`.
        ValueError: If it is the configuration of another class than `expected_class`.
    """
    patterns = ["model_index.json", "transformer/*.json"]
    folder = resolve(path, allow_patterns=patterns, revision=revision)
    if (found := read_model_class(path, folder)) != expected_class:
        raise ValueError(
            f"'{path}' holds a {found}, expected a {expected_class}: use SD3Backbone for "
            "SD3Transformer2DModel and FluxBackbone for FluxTransformer2DModel"
        )
    config: dict[str, Any] = json.loads((folder / "transformer" / "config.json").read_text())
    return config


def read_model_class(path: str, folder: Path) -> str:
    """Returns the class of the transformer in a pipeline folder that was resolved from `path`.

    Raises:
        FileNotFoundError: If there is no `transformer/config.json`.
    """
    file = folder / "transformer" / "config.json"
    if not file.is_file():
        raise FileNotFoundError(
            f"'{path}' is no diffusers pipeline: there is no {file}; give the folder that holds "
            "model_index.json and transformer/"
        )
    return json.loads(file.read_text()).get("_class_name", "nameless class")


def find_tensors(path: str, keys: Iterable[str], revision: str | None = None) -> dict[str, Path]:
    """Returns the safetensors file that holds each of the wanted tensors; only those are downloaded.

    Raises:
        FileNotFoundError: If the checkpoint or one of the shards is missing.
        ValueError: If the checkpoint lacks a wanted tensor.
    """
    keys = list(keys)
    folder = (
        resolve(path, allow_patterns=["transformer/*.json"], revision=revision) / "transformer"
    )
    if (folder / _INDEX).is_file():
        weight_map: dict[str, str] = json.loads((folder / _INDEX).read_text())["weight_map"]
        _require(path, [k for k in keys if k not in weight_map])
        names = {key: weight_map[key] for key in keys}
    else:
        names = dict.fromkeys(keys, _WEIGHTS)
    patterns = ["transformer/*.json", *(f"transformer/{n}" for n in sorted(set(names.values())))]
    folder = resolve(path, allow_patterns=patterns, revision=revision) / "transformer"
    for name in sorted(set(names.values())):
        if not (folder / name).is_file():
            raise FileNotFoundError(
                f"'{path}': there is no {folder / name}; weights are read from safetensors files "
                f"(`{_WEIGHTS}`, or its shards and `{_INDEX}`): complete the download"
            )
    return {key: folder / name for key, name in names.items()}


def load_tensors(model: nn.Module, files: dict[str, Path], path: str, dtype: torch.dtype) -> None:
    """Gives a meta-device model its tensors from the files that hold them.

    Raises:
        ValueError: If a tensor is missing or has another shape than the model's.
    """
    from safetensors import safe_open

    expected = {key: tensor.shape for key, tensor in model.state_dict().items()}
    assert expected.keys() == files.keys()
    state: dict[str, Tensor] = {}
    for file in sorted(set(files.values())):
        with safe_open(file, framework="pt") as handle:
            wanted = [key for key in files if files[key] == file]
            there = set(handle.keys())
            _require(path, [key for key in wanted if key not in there])
            for key in wanted:
                shape = tuple(handle.get_slice(key).get_shape())
                if shape != tuple(expected[key]):
                    raise ValueError(
                        f"'{path}': tensor '{key}' has shape {shape}, expected {tuple(expected[key])} "
                        "from transformer/config.json: the weights belong to another model"
                    )
                state[key] = handle.get_tensor(key).to(dtype)
    model.load_state_dict(state, strict=True, assign=True)
    left = [name for name, t in [*model.named_parameters(), *model.named_buffers()] if t.is_meta]
    assert not left, left


def block_lists(transformer: Any) -> list[nn.ModuleList]:
    """Returns the lists of blocks of a diffusers transformer, in the order in which they run."""
    names = ("transformer_blocks", "single_transformer_blocks")
    return [getattr(transformer, name) for name in names if hasattr(transformer, name)]


def build_truncated(config: dict[str, Any], max_depth: int | None) -> nn.Module:
    """Returns the transformer of a configuration on the meta device, cut after `max_depth` blocks.

    The whole network is built first and then cut: with fewer layers in the configuration, the last of them would be
    built as a network's last block, which has no output for the text tokens. A cut network has no output head.

    Raises:
        ValueError: If `max_depth` is not within the network.
    """
    import diffusers

    model_class = getattr(diffusers, config["_class_name"])
    with torch.device("meta"):
        model = model_class.from_config(config)
    lists = block_lists(model)
    total = sum(map(len, lists))
    if max_depth is None or max_depth == total:
        return model
    if not 0 <= max_depth < total:
        raise ValueError(
            f"max_depth {max_depth}, expected 0 ... {total}, the blocks of the network"
        )
    left = max_depth
    for blocks in lists:
        del blocks[left:]
        left -= len(blocks)
    model.norm_out = nn.Identity()
    model.proj_out = nn.Identity()
    return model


def _require(path: str, missing: list[str]) -> None:
    """Raises ValueError if tensors are missing."""
    if missing:
        more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
        raise ValueError(
            f"'{path}': the checkpoint has no tensor '{missing[0]}'{more}: it is incomplete, or "
            "transformer/config.json belongs to another model"
        )
