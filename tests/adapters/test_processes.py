"""Two processes with FSDP2 on the CPU: switching, moves and state act on shards as on whole weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from benchmarks.memory_page import elements, most_on_a_rank
from stitchvm.adapters.export import merged_transformer
from stitchvm.adapters.full import PolicyWeights
from stitchvm.adapters.lora import PolicyAdapters
from stitchvm.adapters.policy import Policy, _shard, full_tensor
from stitchvm.modules.alignment_parts import all_weights
from stitchvm.modules.sharding import shard_transformer
from tests.adapters.test_policy import INPUT, make

pytestmark = pytest.mark.slow
KINDS = ("lora", "full")


def shifted(policy: Policy) -> dict[str, Tensor]:
    """A state in which no two sets are equal."""
    return {key: value + 0.001 * i for i, (key, value) in enumerate(policy.state().items())}


def exercise(policy: Policy) -> dict[str, Any]:
    """Loads, moves and switches; returns what came of it, whole."""
    policy.load_state(shifted(policy))
    policy.decay_old(0.25)
    policy.update_ema(0.0)
    dtype = torch.float32 if isinstance(policy, PolicyWeights) else torch.bfloat16
    batch = {k: v.to(dtype) if isinstance(v, Tensor) else v for k, v in INPUT.items()}
    with torch.no_grad(), policy.use("old"):
        old = policy.transformer(**batch)[0]
    u = policy.transformer(**batch)[0]
    (u - old).float().square().mean().backward()
    found = {"distance": policy.distance("old"), "old": old, "u": u.detach()}
    found |= {f"state.{key}": value for key, value in policy.state().items()}
    if isinstance(policy, PolicyAdapters):
        merged = merged_transformer(policy, "old").state_dict()
        found |= {f"state.merged.{key}": value for key, value in merged.items()}
    gradients = {k: p.grad for k, p in policy.parameters().items() if p.grad is not None}
    return found | {f"grad.{key}": full_tensor(grad) for key, grad in gradients.items()}


def prepared(kind: str) -> Policy:
    """A policy; with LoRA the frozen weights are bfloat16 and the adapters float32."""
    policy = make(kind)
    if kind == "lora":
        for key, p in policy.transformer.named_parameters():
            if "lora_" not in key:
                p.data = p.data.bfloat16()
        policy.transformer.pos_embed.pos_embed = policy.transformer.pos_embed.pos_embed.bfloat16()
    return policy


def bytes_of_first_rank(policy: Policy, n: int) -> int:
    """Parameters by the formula of docs/scaling.md: frozen blocks in shards, all else whole, bfloat16 but for LoRA."""
    adapters = {id(p) for p in all_weights(policy)}
    blocks = policy.transformer.transformer_blocks
    inside = {id(p): p for p in blocks.parameters() if id(p) not in adapters}
    whole = [
        p for p in policy.transformer.parameters() if id(p) not in inside and id(p) not in adapters
    ]
    frozen = most_on_a_rank((tuple(p.shape) for p in inside.values()), n)
    frozen += elements(tuple(p.shape) for p in whole)
    return 2 * frozen + 4 * elements(tuple(p.shape) for p in all_weights(policy))


def sharded(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,))
    for kind in KINDS:
        policy = prepared(kind)
        for block in policy.transformer.transformer_blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(policy.transformer, mesh=mesh)
        found = exercise(policy)
        assert all(hasattr(p, "device_mesh") for p in policy.trainable())
        assert {p.dtype for p in policy.trainable()} == {torch.float32}
        assert bool(policy.state(keep=rank == 0)) == (rank == 0)  # both gather, one keeps
        if rank == 0:
            torch.save(found, f"{folder}/{kind}.pt")
    policy = prepared("lora")
    expected = bytes_of_first_rank(policy, 2)
    shard_transformer(policy.transformer, mesh, all_weights(policy))
    held = sum(_shard(p).nbytes for p in policy.transformer.parameters())
    assert held == expected or rank > 0
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fsdp2")
    mp.spawn(sharded, args=(str(folder),), nprocs=2)
    return folder


@pytest.mark.parametrize("kind", KINDS)
def test_shards_give_what_whole_weights_give(kind: str, runs: Path) -> None:
    expected, found = exercise(prepared(kind)), torch.load(runs / f"{kind}.pt")
    assert expected.keys() == found.keys()
    for key, value in expected.items():
        if key.startswith("state.") or key in ("old", "u"):
            assert torch.equal(found[key], value), key
        else:
            assert torch.allclose(found[key], value, rtol=1e-4, atol=1e-7), key
    assert found["distance"] > 0 and any(
        v.any() for k, v in found.items() if k.startswith("grad.")
    )
