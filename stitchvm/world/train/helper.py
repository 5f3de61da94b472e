"""A second process that computes half of every batch's gradient.

Parameters live in shared memory; the helper reads them, writes its gradient to a shared buffer, and the sum of
the two halves equals, bit for bit, what one process accumulates over the same two pieces.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from stitchvm.world.train.sd3 import SD3Stage


class Helper:
    """Forks the helper; call before the first backward pass."""

    def __init__(self, stage: SD3Stage) -> None:
        self.params = [p for p in stage.nets.parameters() if p.requires_grad]
        stage.nets.share_memory()
        self.grads = [torch.zeros_like(p).share_memory_() for p in self.params]
        context = multiprocessing.get_context("fork")
        self.pipe, other = context.Pipe()
        self.process = context.Process(target=self._serve, args=(stage, other), daemon=True)
        self.process.start()
        other.close()

    def _serve(self, stage: SD3Stage, pipe: Any) -> None:
        self.pipe.close()
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        try:
            while True:
                step = pipe.recv()
                for p in self.params:
                    p.grad = None
                figures = stage.share(step, 1, 2)
                for p, grad in zip(self.params, self.grads, strict=True):
                    grad.zero_() if p.grad is None else grad.copy_(p.grad)
                pipe.send(figures)
        except (EOFError, BrokenPipeError, KeyboardInterrupt):
            os._exit(0)

    def begin(self, step: int) -> None:
        """Starts the other half of a step."""
        self.pipe.send(step)

    def finish(self) -> list[float]:
        """Waits for the other half, adds its gradient to the parameters' and returns its figures."""
        figures: list[float] = self.pipe.recv()
        for p, grad in zip(self.params, self.grads, strict=True):
            if p.grad is None:
                p.grad = grad.clone()
            else:
                p.grad.add_(grad)
        return figures
