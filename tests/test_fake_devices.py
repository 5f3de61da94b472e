"""Parts of the library on a pretended GPU, against the same on the CPU; and the pretence itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import SD3Transformer2DModel
from torch import nn

from stitchvm.adapters.lora import PolicyAdapters
from tests.pretend_cuda import back, pretend_cuda
from tests.tiny import SD3_CONFIG


def mixed(cpu: torch.Tensor, gpu: torch.Tensor) -> dict[str, Callable[[], Any]]:
    """Returns what a GPU refuses."""
    index = torch.tensor([1, 0])
    return {
        "add": lambda: gpu + cpu,
        "add one": lambda: gpu + cpu[0, :1],
        "into the cpu": lambda: cpu.add_(gpu),
        "cat": lambda: torch.cat([gpu, cpu]),
        "stack of scalars": lambda: torch.stack([gpu[0, 0], torch.tensor(1.0)]),
        "where": lambda: torch.where(gpu > 0, gpu, cpu),
        "matmul": lambda: gpu @ cpu.T,
        "linear": lambda: nn.Linear(3, 2)(gpu),
        "cpu[gpu]": lambda: cpu[index.to("cuda")],
        "gpu[...] = cpu": lambda: gpu.__setitem__(index.to("cuda"), cpu),
        "gather": lambda: gpu.gather(0, index[:, None]),
        "embedding": lambda: nn.functional.embedding(index, gpu),
        "out": lambda: torch.add(gpu, 1, out=cpu),
        "generator": lambda: torch.randn(2, generator=torch.Generator(), device="cuda"),
        "in place": lambda: gpu.normal_(generator=torch.Generator()),
        "of the gpu": lambda: torch.rand(2, generator=torch.Generator("cuda")),
        "numpy": lambda: gpu.numpy(),
    }


def test_what_a_gpu_refuses_is_refused() -> None:
    with pretend_cuda():
        cpu = torch.ones(2, 3)
        gpu = cpu.to("cuda")
        for name, work in mixed(cpu, gpu).items():
            with pytest.raises((RuntimeError, TypeError)):
                print(name, work())


def test_what_a_gpu_does_is_done() -> None:
    with pretend_cuda() as cuda:
        x = torch.arange(6.0, device="cuda").view(2, 3)
        assert x.device == cuda and x.is_cuda and x.to("cuda") is x and x.float() is x
        assert x.tolist() == [[0, 1, 2], [3, 4, 5]] and float(x[1, 2]) == 5 and bool((x > 4).any())
        assert (x + torch.tensor(1.0)).tolist() == [[1, 2, 3], [4, 5, 6]]
        assert x[torch.tensor([1])].tolist() == x[[1]].tolist() == [[3, 4, 5]]
        assert x.nonzero().device == torch.tensor([1.0], device="cuda").device == cuda
        x[0], x[1, 0] = torch.ones(3), 7.0
        assert x.cpu().numpy().tolist() == [[1, 1, 1], [7, 4, 5]]
        with torch.device("cuda"):
            assert torch.zeros(2).device == cuda
        with torch.device("meta"):
            assert nn.Linear(2, 2).weight.is_meta
        net = nn.Linear(3, 1)
        weight = net.weight
        net.to("cuda")
        assert net.weight is weight and weight.device == cuda
        for fused in (False, True):
            optimizer = torch.optim.AdamW(net.parameters(), lr=0.1, fused=fused)
            net(x).sum().backward()
            assert weight.grad is not None and weight.grad.tolist() == [[8, 5, 6]]
            optimizer.step()
            optimizer.zero_grad()
        assert net.cpu().weight is weight and weight.device.type == "cpu"


def test_adapters_are_the_same_where_the_gpu_is_the_default_device() -> None:
    """As in Lightning's `configure_model`: the generator of A is one of the CPU."""

    def made() -> Any:
        network = SD3Transformer2DModel(**SD3_CONFIG)
        return PolicyAdapters(network, r=2, alpha=4).parameters()

    here = made()
    with pretend_cuda(), torch.device("cuda"):
        there = made()
        assert {p.device.type for p in there.values()} == {"cuda"}
        for key, value in back(there).items():
            assert torch.equal(value, here[key]), key
