"""Counts what a device has to hold in fine-tuning, from the published configurations on the meta device.

`python benchmarks/memory_counts.py` writes results/counts_memory.json: parameters of every network, how they are cut
(`stitchvm/modules/sharding.py`), and the bytes that autograd keeps of one micro-batch. Kept is what PyTorch saves for
the backward pass (`saved_tensors_hooks`), each storage once, weights left out. Attention keeps what a fused kernel
does: queries, keys, values, output, and a float32 number per query and head.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
import yaml
from memory_page import DEVICES, RESULTS_NAME, TERMS, elements, most_on_a_rank
from rehearsal_facts import PIPELINES, REWARDS, Network
from rehearsal_shapes import count, shapes_of
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._pytree import tree_leaves

from stitchvm.adapters.lora import PolicyAdapters
from stitchvm.backbones.loading import build_truncated
from stitchvm.results import write_results
from stitchvm.rewards.clip_tail import CLIPTail
from stitchvm.stitch import StitchLayer

__all__ = ["Kept", "activations", "records", "transformer_of"]

META = torch.device("meta")
CONFIG = "configs/nft_stitched_{}.yaml"
DEPTH = 4  # i, as in docs/scaling.md's other tables
TEXT = {"sd35m": 77 + 256, "sd35l": 77 + 256, "flux": 512}


def transformer_of(network: Network) -> Any:
    """Returns the transformer of a configuration on the meta device."""
    import diffusers

    with META:
        return getattr(diffusers, network.kind).from_config(network.config)


def blocks_of(transformer: nn.Module) -> list[nn.Module]:
    """Returns the blocks that `shard_transformer` cuts one by one."""
    lists = [m for m in transformer.children() if isinstance(m, nn.ModuleList)]
    return [block for each in lists for block in each]


class Fused(torch.autograd.Function):
    """Attention by what a fused kernel keeps; on the meta device, where nothing is computed."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Returns a tensor with the shape of `q`."""
        out = torch.empty_like(q)
        lse = torch.empty(q.shape[:-1], dtype=torch.float32, device=q.device)
        ctx.save_for_backward(q, k, v, out, lse)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        """Raises RuntimeError: only what is kept is counted."""
        raise RuntimeError("attention that is only counted has no backward pass")


def fused(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Any = None, *_: Any, **__: Any
) -> Any:
    """Stands for `scaled_dot_product_attention`."""
    assert attn_mask is None, "the counted kernel knows no mask"
    return Fused.apply(query, key, value)


class Kept:
    """The storages that autograd keeps of a forward pass, by block.

    Arguments:
        network: What runs; its weights and buffers are not counted.
        blocks: Its blocks.

    Attributes:
        bytes: Bytes kept by each block, and outside of them under None.
        inputs: Bytes that come into blocks, of all of them together, each storage once.
    """

    def __init__(self, network: nn.Module, blocks: list[nn.Module]) -> None:
        self.bytes: dict[int | None, int] = {None: 0}
        self.inputs = 0
        self._block: int | None = None
        own = [*network.parameters(), *network.buffers()]
        # kept alive, so that no address is given out twice
        self._own = {s._cdata: s for s in (t.untyped_storage() for t in own)}
        self._seen: dict[int, Any] = dict(self._own)
        self._entered: dict[int, Any] = dict(self._own)
        for number, block in enumerate(blocks):
            block.register_forward_pre_hook(self._enter(number), with_kwargs=True)
            block.register_forward_hook(self._leave)

    @contextmanager
    def counting(self) -> Iterator[None]:
        """Counts what is kept inside."""
        attention = mock.patch.object(F, "scaled_dot_product_attention", fused)
        with attention, saved_tensors_hooks(self._pack, lambda t: t):
            yield

    @property
    def whole(self) -> int:
        """Bytes kept without checkpointing."""
        return sum(self.bytes.values())

    @property
    def checkpointed(self) -> int:
        """Bytes kept with blocks run again: their inputs, what is outside, and one block at a time."""
        inside = [n for block, n in self.bytes.items() if block is not None]
        return self.bytes[None] + self.inputs + max(inside, default=0)

    def _pack(self, tensor: Tensor) -> Tensor:
        self.bytes[self._block] = self.bytes.get(self._block, 0) + _new(tensor, self._seen)
        return tensor

    def _enter(self, number: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            self._block = number
            for leaf in tree_leaves((args, kwargs)):
                if isinstance(leaf, Tensor):
                    self.inputs += _new(leaf, self._entered)

        return hook

    def _leave(self, *_: Any) -> None:
        self._block = None


def _new(tensor: Tensor, seen: dict[int, Any]) -> int:
    """Returns the bytes of a tensor's storage if it has not been seen, and remembers it."""
    storage = tensor.untyped_storage()
    if storage._cdata in seen:
        return 0
    seen[storage._cdata] = storage
    return int(storage.nbytes())


def activations(transformer: Any, batch: int, side: int, text: int) -> Kept:
    """Returns what is kept of a velocity under LoRA, bfloat16, as `Generator.velocity` runs it.

    Arguments:
        transformer: The transformer with adapters, on the meta device.
        batch: The images of a micro-batch.
        side: Their side in pixels.
        text: The text tokens.
    """
    config, latent = transformer.config, side // 8
    given = {
        "encoder_hidden_states": (batch, text, config.joint_attention_dim),
        "pooled_projections": (batch, config.pooled_projection_dim),
    }
    half: dict[str, Any] = {"dtype": torch.bfloat16, "device": META}
    inputs = {name: torch.empty(shape, **half) for name, shape in given.items()}
    levels = torch.empty(batch, device=META)
    if "Flux" in type(transformer).__name__:
        tokens = (latent // 2) ** 2
        inputs["hidden_states"] = torch.empty(batch, tokens, config.in_channels, **half)
        inputs |= {"guidance": levels, "timestep": levels.bfloat16()}
        inputs |= {"img_ids": torch.empty(tokens, 3, **half)}
        inputs |= {"txt_ids": torch.empty(text, 3, **half)}
    else:
        inputs["hidden_states"] = torch.empty(batch, config.in_channels, latent, latent, **half)
        inputs["timestep"] = levels
    kept = Kept(transformer, blocks_of(transformer))
    with kept.counting():
        out = transformer(**inputs, return_dict=False)[0]
    assert out.requires_grad and out.is_meta
    return kept


def records(model: str) -> Iterator[dict[str, Any]]:
    """Yields the counts of a model's fine-tuning."""
    import open_clip

    pipeline = PIPELINES[model]
    network, vae, *encoders = pipeline.networks
    transformer = transformer_of(network)
    blocks = blocks_of(transformer)
    inside = [tuple(p.shape) for block in blocks for p in block.parameters()]
    known = {p for block in blocks for p in block.parameters()}
    outside = [tuple(p.shape) for p in transformer.parameters() if p not in known]
    about = {"benchmark": "memory", "device": "meta", "model": model}
    yield about | {
        "part": "transformer",
        "parameters": elements([*inside, *outside]),
        "outside": elements(outside),
        "buffers": sum(b.numel() for b in transformer.buffers()),
        "largest_block": max(sum(p.numel() for p in b.parameters()) for b in blocks),
        "blocks_on_rank": {str(n): most_on_a_rank(inside, n) for n in DEVICES},
        "all_on_rank": {str(n): most_on_a_rank([*inside, *outside], n) for n in DEVICES},
    }
    yield about | {"part": "vae", "parameters": count(shapes_of(vae.kind, vae.config))}
    texts = sum(count(shapes_of(e.kind, e.config)) for e in encoders)
    yield about | {"part": "text", "parameters": texts}
    prefix = sum(p.numel() for p in build_truncated(network.config, DEPTH).parameters())
    yield about | {"part": "prefix", "parameters": prefix, "i": DEPTH}
    width = transformer.inner_dim
    for term in TERMS:
        with META:
            clip = open_clip.CLIP(**open_clip.get_model_config(REWARDS[term].config["name"]))
            tail = CLIPTail(clip.visual, 1)
            stitch = StitchLayer(width, clip.visual.conv1.out_channels, tail.grid)
        parts = {"parameters": clip, "tower": clip.visual, "tail": tail, "stitch": stitch}
        sizes = {name: sum(p.numel() for p in part.parameters()) for name, part in parts.items()}
        yield about | {"part": term} | sizes
    with META:
        policy = PolicyAdapters(nn.Module.to(transformer, torch.bfloat16))
    found = sum(p.numel() for p in policy.trainable())
    yield about | {"part": "lora", "parameters": found, "modules": len(policy.modules)}
    run = yaml.safe_load(Path(CONFIG.format(model)).read_text(encoding="utf-8"))
    settings = run["model"]["init_args"]
    batch, side = settings["micro_batch"], settings["height"]
    kept = activations(transformer, batch, side, TEXT[model])
    yield about | {
        "part": "activations",
        "config": CONFIG.format(model),
        "batch": batch,
        "side": side,
        "text": TEXT[model],
        "checkpointing": settings["gradient_checkpointing"],
        "bytes": kept.whole,
        "bytes_checkpointed": kept.checkpointed,
    }


def main() -> None:
    """Counts, and writes the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", default=f"results/{RESULTS_NAME}")
    args = parser.parse_args()
    found = [record for model in PIPELINES for record in records(model)]
    command = "python benchmarks/memory_counts.py"
    print(write_results(args.output, found, command=command, overwrite=True))


if __name__ == "__main__":
    main()
