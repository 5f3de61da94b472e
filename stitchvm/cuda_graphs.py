"""CUDA graphs of a frozen function and its gradient: many small kernels, launched as one.

A tail of 24 blocks on the few hundred tokens of one sample is half a millisecond of arithmetic in a thousand kernels,
which take the host several milliseconds to launch, and more on the way back. Two graphs, forward and backward, are
recorded once for each kind of input and then launched as a whole: the same kernels on the same numbers.

`torch.cuda.make_graphed_callables` records and replays. Its outputs and gradients lie in memory that the next call
overwrites, its gradient is that of the latest call, whichever is asked for, and can be asked for once. Here every
answer is a copy, and a gradient that is asked for later, or again, runs its own forward pass again.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

__all__ = ["KINDS", "Graphed"]

KINDS = 16


class Graphed:
    """A function of one tensor and frozen networks, as CUDA graphs for each kind of input.

    Kinds differ in shape, dtype, device, autocast, and in whether there is a gradient; those beyond `KINDS`, and
    everything that is not on a GPU, are run as they are. Every kind keeps the memory it works in. All are recorded
    anew where weights have moved; between a call and its gradient weights may neither move nor change, which nothing
    notices.

    Arguments:
        function: The function; it may not look at numbers (the host cannot wait while it is recorded), draw any, or
            compute activations again in the backward pass.
        networks: Returns the networks that it runs.
    """

    def __init__(
        self, function: Callable[[Tensor], Tensor], networks: Callable[[], Sequence[nn.Module]]
    ) -> None:
        self.function, self.networks = function, networks
        self._weights: list[tuple[int, torch.dtype]] = []
        self._graphs: dict[Hashable, _Graph] = {}
        self._memory: _Memory | None = None

    def __reduce__(self) -> Any:
        """Copies and pickles are without graphs."""
        return type(self), (self.function, self.networks)

    def __call__(self, x: Tensor) -> Tensor:
        """Returns the function of x, differentiable once in x.

        Raises:
            ValueError: If the function cannot be recorded.
        """
        if x.device.type != "cuda":
            self._forget()
            return self.function(x)
        tensors = [t for m in self.networks() for t in chain(m.parameters(), m.buffers())]
        if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
            return self.function(x)  # a graph has no gradient in weights
        weights = [(tensor.data_ptr(), tensor.dtype) for tensor in tensors]
        if weights != self._weights:  # what was recorded reads other memory
            self._forget()
        if self._memory is None:
            self._weights, self._memory = weights, _Memory(torch.cuda.graph_pool_handle())
        wanted = torch.is_grad_enabled() and x.requires_grad
        kind = (x.shape, x.dtype, x.device, wanted, *_autocast(x))
        if kind not in self._graphs:
            if len(self._graphs) == KINDS:
                return self.function(x)
            self._graphs[kind] = _Graph(self.function, x, wanted, self._memory)
        y: Tensor = _Replay.apply(x, self._graphs[kind])
        return y

    def _forget(self) -> None:
        if self._memory is None:
            return
        self._graphs.clear()
        self._memory, self._weights = None, []
        for _ in range(2):  # what torch makes refers to itself, in two layers
            gc.collect()


@dataclass
class _Memory:
    """Where all graphs of a function work: the pool, how many calls there were, and of which there are activations."""

    pool: Any
    calls: int = 0
    held: int = 0


class _Graph:
    """The graphs of one kind of input."""

    def __init__(
        self, function: Callable[[Tensor], Tensor], x: Tensor, wanted: bool, memory: _Memory
    ) -> None:
        self.wanted, self.memory = wanted, memory
        enabled, dtype = _autocast(x)
        try:
            with (
                torch.cuda.device(x.device),  # graphs are recorded on a stream of the current one
                torch.inference_mode(False),
                torch.set_grad_enabled(wanted),
                # weights cast once for several calls would be freed with the first context
                torch.autocast("cuda", dtype, enabled=enabled, cache_enabled=False),
            ):
                own = x.detach().clone().requires_grad_(wanted)
                self._call: Any = torch.cuda.make_graphed_callables(
                    function, (own,), pool=memory.pool
                )
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            raise ValueError(
                f"a value of features {tuple(x.shape)} failed, or could not be recorded as a CUDA graph ({error}): "
                "cuda_graph: false computes the same, slower on few samples, and shows which of the two it is."
            ) from error

    def run(self, x: Tensor, call: int | None = None) -> tuple[Tensor, int]:
        """Returns a copy of the function of x, and the number of the call: a new one, or that which is repeated."""
        if call is None:
            call = self.memory.calls = self.memory.calls + 1
        self.memory.held = call
        with torch.set_grad_enabled(self.wanted):
            self._leaf = x.detach().requires_grad_(self.wanted)
            self._y = self._call(self._leaf)
        return self._y.detach().clone(), call

    def gradient(self, x: Tensor, call: int, grad: Tensor) -> Tensor:
        """Returns a copy of the gradient of a call, whose input is x, running it again if its activations are gone."""
        if self.memory.held != call:
            self.run(x, call)
        (answer,) = torch.autograd.grad(self._y, self._leaf, grad)
        self.memory.held = 0  # the backward pass has worked in their memory
        return answer.clone()


class _Replay(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, graph: _Graph) -> Tensor:
        y, ctx.call = graph.run(x)
        ctx.graph = graph
        ctx.save_for_backward(x)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (x,) = ctx.saved_tensors
        return ctx.graph.gradient(x, ctx.call, grad), None


def _autocast(x: Tensor) -> tuple[bool, torch.dtype]:
    kind = x.device.type
    return torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)
