"""Random weights, cheap to make, in safetensors and torch files.

One block of normal numbers is drawn once; every tensor is a stretch of it (begun at a place that its name decides)
times the scale of its kind: gains of norms near 1, biases small, matrices 1/sqrt(fan-in). Activations of networks of
any depth stay finite. safetensors files are written as they are made: memory does not grow with the checkpoint.
"""

from __future__ import annotations

import functools
import json
import math
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

__all__ = ["SIZES", "Shapes", "random_tensors", "shard", "write_safetensors", "write_sharded"]

Shapes = dict[str, tuple[int, ...]]
BLOCK = 1 << 20
SIZES = {"float32": 4, "float16": 2, "bfloat16": 2, "int64": 8}
CODES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "int64": "I64"}
NORMS = ("norm", "ln_", "layrnorm")


@functools.cache
def _normal() -> Tensor:
    return torch.from_numpy(np.random.default_rng(0).standard_normal(BLOCK, dtype=np.float32))


@functools.lru_cache(maxsize=64)
def _block(mean: float, scale: float, dtype: str) -> Tensor:
    """Returns the block under a scale, as the bytes of a dtype."""
    return (mean + scale * _normal()).to(getattr(torch, dtype)).view(torch.uint8)


def law_of(name: str, shape: tuple[int, ...]) -> tuple[float, float]:
    """Returns mean and standard deviation of a tensor's entries."""
    lowered = name.lower()
    if lowered.endswith("logit_scale"):
        return math.log(100.0), 0.0
    if len(shape) <= 1:
        gain = lowered.endswith("weight") and any(norm in lowered for norm in NORMS)
        return float(gain), 0.02
    if "pos_embed" in lowered or "positional" in lowered or "position_embed" in lowered:
        return 0.0, 0.02
    return 0.0, round(math.prod(shape[1:]) ** -0.5, 8)


def dtype_of(name: str, dtype: str) -> str:
    """Returns what a tensor is stored in: numbers of positions are integers."""
    return "int64" if name.endswith("position_ids") else dtype


def _pieces(name: str, shape: tuple[int, ...], dtype: str) -> Iterator[Tensor]:
    """Yields the bytes of a tensor."""
    left = math.prod(shape) * SIZES[dtype]
    if dtype == "int64":
        yield torch.arange(math.prod(shape)).view(torch.uint8)
        return
    block = _block(*law_of(name, shape), dtype)
    start = zlib.crc32(name.encode()) % BLOCK * SIZES[dtype]
    while left:
        piece = block[start : start + left]
        yield piece
        left, start = left - len(piece), 0


def random_tensors(shapes: Shapes, dtype: str) -> dict[str, Tensor]:
    """Returns the tensors in memory, for torch files."""
    tensors = {}
    for name, shape in shapes.items():
        own = dtype_of(name, dtype)
        data = torch.cat(list(_pieces(name, shape, own)))
        tensors[name] = data.view(getattr(torch, own)).reshape(shape)
    return tensors


def write_safetensors(path: Path, shapes: Shapes, dtype: str) -> int:
    """Writes one file and returns its bytes."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        own = dtype_of(name, dtype)
        start, end = end, end + math.prod(shape) * SIZES[own]
        header[name] = {"dtype": CODES[own], "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, shape in shapes.items():
            for piece in _pieces(name, shape, dtype_of(name, dtype)):
                file.write(piece.numpy().data)
    return path.stat().st_size


def shard(shapes: Shapes, dtype: str, shards: int) -> list[Shapes]:
    """Returns the tensors of each of `shards` files.

    Full files hold up to 10 GB (diffusers) or 5 GB (transformers), filled in the order of the checkpoint, as the
    libraries do; a smaller checkpoint is cut into as many files of about one size.
    """
    size = {name: math.prod(s) * SIZES[dtype_of(name, dtype)] for name, s in shapes.items()}
    total = sum(size.values())
    limits = [limit for limit in (5e9, 1e10) if -(-total // limit) == shards]
    limit = limits[0] if limits else total / shards + max(size.values())
    files: list[Shapes] = [{}]
    filled = 0
    for name, shape in shapes.items():
        even = not limits and filled >= total / shards and len(files) < shards
        if files[-1] and (filled + size[name] > limit or even):
            files.append({})
            filled = 0
        files[-1][name] = shape
        filled += size[name]
    assert len(files) == shards, (len(files), shards)
    return files


def write_sharded(
    folder: Path, stem: str, shapes: Shapes, dtype: str, shards: int, variant: str = ""
) -> list[Path]:
    """Writes STEM.safetensors, or its shards and their index, and returns the files of weights."""
    dot = f".{variant}" if variant else ""
    if shards == 1:
        path = folder / f"{stem}{dot}.safetensors"
        write_safetensors(path, shapes, dtype)
        return [path]
    weight_map, paths = {}, []
    for k, part in enumerate(shard(shapes, dtype, shards), 1):
        paths.append(folder / f"{stem}{dot}-{k:05d}-of-{shards:05d}.safetensors")
        write_safetensors(paths[-1], part, dtype)
        weight_map |= dict.fromkeys(part, paths[-1].name)
    total = sum(math.prod(s) * SIZES[dtype_of(n, dtype)] for n, s in shapes.items())
    content = {
        "metadata": {"total_size": total},
        "weight_map": dict(sorted(weight_map.items())),
    }
    (folder / f"{stem}.safetensors.index{dot}.json").write_text(json.dumps(content, indent=2))
    return paths
