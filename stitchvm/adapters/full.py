r"""Full fine-tuning: the policy is the transformer's own weights, its copies are other tensors.

A copy is made active by exchanging its values with the transformer's, in place and back: exact, with any strategy, and
without another model's memory. Autograd notices: a graph recorded before the exchange cannot be run backwards after it
("modified by an inplace operation"). So old and frozen velocities are computed first, the policy's last.

The frozen model θ_0 costs a copy of its own, "base", kept on request: without it `off()` is an error. And a value that
borrows the transformer would see the trained weights: give it a backbone of its own.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from stitchvm.adapters.policy import DEFAULT, Policy, _shard, _shard_like

__all__ = ["PolicyWeights"]

BASE = "base"


class PolicyWeights(Policy):
    """All weights of a transformer, trained, and copies of them.

    Arguments:
        transformer: A diffusers transformer in float32.
        copies: The copies; "base" is the frozen model, which `off()` needs and nothing moves.

    Raises:
        ValueError: If weights are not float32: updates smaller than a half-precision step would be lost.
    """

    def __init__(self, transformer: Any, copies: Sequence[str] = ("old", "ema")) -> None:
        dtypes = {p.dtype for p in transformer.parameters()}
        if dtypes != {torch.float32}:
            raise ValueError(
                f"full fine-tuning of weights in {sorted(map(str, dtypes))}: expected float32 (the small updates are "
                "lost otherwise). Load the generator with dtype float32, in which it then runs, too, or train LoRA."
            )
        super().__init__(transformer, copies)
        transformer.requires_grad_(True)
        own = self.parameters()
        self._kept = {name: {k: p.detach().clone() for k, p in own.items()} for name in copies}

    def keep_base(self) -> None:
        """Keeps the weights of now as the frozen model "base", which `off()` needs."""
        if BASE not in self.copies:
            self.copies = (*self.copies, BASE)
            self._kept[BASE] = {k: p.detach().clone() for k, p in self.parameters().items()}

    def parameters(self, name: str = DEFAULT) -> dict[str, Tensor]:
        """Returns the transformer's weights, or a copy's, by name; a copy follows them to their device and shards."""
        own = dict(self.transformer.named_parameters())
        if self._known(name) == DEFAULT:
            return own
        kept = self._kept[name]
        for key, p in own.items():
            if type(kept[key]) is not type(p.detach()) or kept[key].device != p.device:
                kept[key] = _place(kept[key], p.detach())
        return kept

    def trainable(self) -> list[nn.Parameter]:
        """Returns what an optimiser takes: all weights of the transformer."""
        return list(self.transformer.parameters())

    def follow(self, name: str, decay: float) -> None:
        """Moves a copy towards the policy, see `Policy.follow`; "base" stays."""
        if name == BASE:
            raise ValueError("the frozen model 'base' does not follow the policy.")
        super().follow(name, decay)

    def _switch(self, active: str | None) -> None:
        wanted, there = self._copy_of(active), self._copy_of(self._active)
        for name in (there, wanted):  # back to the policy's own weights, then on
            if name != DEFAULT:
                self._exchange(name)

    def _copy_of(self, active: str | None) -> str:
        name = BASE if active is None else active
        if name == BASE and BASE not in self.copies:
            raise ValueError(
                "full fine-tuning has overwritten the frozen model: keep it with copies=('old', 'ema', 'base'), or "
                "set the regulariser's weight to 0."
            )
        return name

    @torch.no_grad()
    def _exchange(self, name: str) -> None:
        self._reshard()
        for p, copy in zip(self._local(DEFAULT), self._local(name), strict=True):
            value = p.clone()
            p.copy_(copy)
            copy.copy_(value)

    def _verify(self) -> None:
        frozen = [n for n, p in self.transformer.named_parameters() if not p.requires_grad]
        if frozen:
            raise RuntimeError(
                f"{frozen[:3]} ({len(frozen)} weights) have been frozen past the policy, which trains all of them."
            )

    @contextmanager
    def _again(self, active: str | None) -> Iterator[None]:
        if active != self._active:
            raise RuntimeError(
                f"a block that ran with '{active or 'off'}' is run again in a backward pass while "
                f"'{self._active or 'off'}' is active: leave use()/off() before backward()."
            )
        yield


def _place(copy: Tensor, like: Tensor) -> Tensor:
    """Returns a copy where `like` is, sharded as it is."""
    if not hasattr(like, "device_mesh"):
        return copy.to(like.device)
    placed = like.clone()
    _shard(placed).copy_(_shard_like(copy, like))
    return placed
