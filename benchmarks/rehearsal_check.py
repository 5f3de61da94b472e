"""What would be written: a table of every file with its tensors, parameters and bytes, beside what is published."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from rehearsal_facts import PUBLISHED_BYTES, PUBLISHED_MIB, Pipeline
from rehearsal_rewards import reward_shapes
from rehearsal_shapes import count, shapes_of
from rehearsal_tiny import scaled_pipelines, scaled_rewards
from rehearsal_weights import SIZES, Shapes, dtype_of, shard

__all__ = ["HEADER", "rows", "table"]

# what a file may have beside its tensors: names and places, or torch's own records
HEADER = 200_000


def rows(scale: str, only: tuple[str, ...] = ()) -> list[dict[str, Any]]:
    """Returns a row for each network: files, tensors, parameters, bytes of tensors, and the published numbers.

    Raises:
        ValueError: If a number of parameters, or the bytes of a file, are not the published ones.
    """
    found: list[dict[str, Any]] = []
    for name, pipeline in scaled_pipelines(scale).items():
        if not only or name in only:
            found += _pipeline_rows(name, pipeline, scale)
    for name, reward in scaled_rewards(scale).items():
        shapes = reward_shapes(reward, scale)
        if shapes and (not only or name in only):
            dtype = "float16" if reward.kind == "hpsv2" else "float32"
            where = f"{reward.id or 'the library cache'}/{reward.files[0]}"
            found.append(_row(name, where, shapes, dtype, None))
            _compare(name, reward.files[0], found[-1]["bytes"], scale)
    return found


def _pipeline_rows(name: str, pipeline: Pipeline, scale: str) -> Iterator[dict[str, Any]]:
    for network in pipeline.networks:
        shapes = shapes_of(network.kind, network.config)
        where = f"{pipeline.id}/{network.folder}"
        row = _row(name, where, shapes, network.dtype, network.parameters)
        row["files"] = network.shards
        for k, part in enumerate(shard(shapes, network.dtype, network.shards), 1):
            of = f"-{k:05d}-of-{network.shards:05d}" if network.shards > 1 else ""
            file = f"{network.folder}/{network.stem}{of}.safetensors"
            _compare(name, file, _bytes(part, network.dtype), scale)
        yield row


def _row(
    name: str, where: str, shapes: Shapes, dtype: str, published: int | None
) -> dict[str, Any]:
    parameters = count(shapes)
    if published is not None and parameters != published:
        raise ValueError(
            f"{where} would have {parameters:,} parameters, {published:,} are published: the installed library "
            "builds another network from its configuration"
        )
    return {
        "name": name,
        "where": where,
        "dtype": dtype,
        "files": 1,
        "tensors": len(shapes),
        "parameters": parameters,
        "published": published,
        "bytes": _bytes(shapes, dtype),
    }


def _bytes(shapes: Shapes, dtype: str) -> int:
    return sum(math.prod(s) * SIZES[dtype_of(n, dtype)] for n, s in shapes.items())


def _compare(name: str, file: str, ours: int, scale: str) -> None:
    """Raises ValueError unless a file has the published size, up to its header."""
    if scale != "full":
        return
    published = PUBLISHED_BYTES.get((name, file))
    wrong = published is not None and not 0 <= published - ours <= HEADER
    if published is None and (name, file) in PUBLISHED_MIB:
        mib, tolerance = PUBLISHED_MIB[name, file]
        published = round(mib * 2**20)
        wrong = not (mib - tolerance) * 2**20 - HEADER <= ours <= (mib + tolerance) * 2**20
    if wrong:
        raise ValueError(
            f"{name}: the tensors of {file} would take {ours:,} bytes, the published file has {published:,}"
        )


def table(found: list[dict[str, Any]]) -> str:
    """Returns the rows as text, with their sum."""
    lines = [f"{'files':>5} {'tensors':>7} {'parameters':>14} {'published':>14} {'GB':>7}  where"]
    for row in found:
        published = "–" if row["published"] is None else f"{row['published']:,}"
        lines.append(
            f"{row['files']:>5} {row['tensors']:>7} {row['parameters']:>14,} {published:>14} "
            f"{row['bytes'] / 1e9:>7.3f}  {row['where']} ({row['dtype']})"
        )
    total = sum(row["bytes"] for row in found) / 1e9
    lines.append(f"{total:>51.1f}  in all (text encoders of one precision are written once)")
    return "\n".join(lines)
