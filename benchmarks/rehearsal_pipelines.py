"""Writes diffusers pipelines in the layout of the hub."""

from __future__ import annotations

import json
import os
from pathlib import Path

from rehearsal_facts import Network, Pipeline
from rehearsal_hub import repository
from rehearsal_shapes import shapes_of
from rehearsal_tokenizers import write_clip_tokenizer, write_t5_tokenizer
from rehearsal_weights import write_sharded

__all__ = ["write_pipeline"]


def write_pipeline(root: Path, pipeline: Pipeline) -> Path:
    """Writes a pipeline with random weights into ROOT's hub cache; returns its folder.

    Text encoders that another pipeline has already, in the same precision, are hard links to its files.
    """
    folder = repository(root, pipeline.id)
    _json(folder / "model_index.json", pipeline.index)
    _json(folder / "scheduler" / "scheduler_config.json", pipeline.scheduler)
    for network in pipeline.networks:
        _json(folder / network.folder / "config.json", network.config)
        _weights(root, folder / network.folder, network)
    clip = [name for name, value in pipeline.index.items() if "CLIPTokenizer" in value]
    for name in clip:
        write_clip_tokenizer(folder / name, "!" if name == "tokenizer_2" else "<|endoftext|>")
    write_t5_tokenizer(folder / pipeline.t5_tokenizer)
    return folder


def _weights(root: Path, folder: Path, network: Network) -> None:
    known = f"{network.kind}-{network.dtype}-{_digest(network.config)}"
    shapes = shapes_of(network.kind, network.config)
    store = root / "store" / known
    if "Transformer2D" in network.kind:  # no two are the same
        store = folder
    if not store.exists() or store == folder:
        store.mkdir(parents=True, exist_ok=True)
        write_sharded(store, network.stem, shapes, network.dtype, network.shards)
    if store != folder:
        for path in store.iterdir():
            _link(path, folder / path.name)
    for variant in network.variants:
        _variant(folder, network, variant)


def _variant(folder: Path, network: Network, variant: str) -> None:
    """Writes a second copy of the weights under the names of a variant: hard links, and an index of its own."""
    index = folder / f"{network.stem}.safetensors.index.json"
    if not index.is_file():
        stem = network.stem
        _link(folder / f"{stem}.safetensors", folder / f"{stem}.{variant}.safetensors")
        return
    content = json.loads(index.read_text())
    renamed = {
        name: name.replace(f"{network.stem}-", f"{network.stem}.{variant}-")
        for name in set(content["weight_map"].values())
    }
    for name, new in renamed.items():
        _link(folder / name, folder / new)
    content["weight_map"] = {k: renamed[name] for k, name in content["weight_map"].items()}
    _json(folder / f"{network.stem}.safetensors.index.{variant}.json", content)


def _digest(config: dict[str, object]) -> str:
    import hashlib

    text = json.dumps({k: v for k, v in config.items() if k != "architectures"}, sort_keys=True)
    return hashlib.sha1(text.encode()).hexdigest()[:8]


def _link(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    target.unlink(missing_ok=True)
    os.link(source, target)


def _json(path: Path, content: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2) + "\n", "utf-8")
