"""The contract of a diffusion backbone, cut after block i: u_θ^{≤i} of Eq. (6)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Self

import torch
from torch import Tensor, nn


@dataclass
class PrefixState:
    """Everything needed to go on after block `depth` without running the first blocks again.

    Attributes:
        depth: The number of blocks already run, i.
        hidden: The image tokens, with shape (B, N, D).
        context: The text tokens, with shape (B, M, D), or None.
        grid: The token grid (h, w), h * w = N.
        extra: Whatever else the suffix needs. Tensors among its values are batch-first (the time
            embedding); what all samples share (rotary tables) stands in a tuple.
    """

    depth: int
    hidden: Tensor
    context: Tensor | None
    grid: tuple[int, int]
    extra: dict[str, Any] = field(default_factory=dict)

    def features(self) -> Tensor:
        """Returns the image tokens as a contiguous map with shape (B, D, h, w)."""
        return self.hidden.transpose(1, 2).unflatten(2, self.grid).contiguous()

    def select(self, index: Tensor) -> PrefixState:
        """Returns the state of the samples `index` (for resampled particles)."""
        extra = {k: v[index] if isinstance(v, Tensor) else v for k, v in self.extra.items()}
        context = None if self.context is None else self.context[index]
        return replace(self, hidden=self.hidden[index], context=context, extra=extra)

    def detach(self) -> PrefixState:
        """Returns the state without its graph, to go on from once a gradient has been taken."""
        extra = {k: v.detach() if isinstance(v, Tensor) else v for k, v in self.extra.items()}
        context = None if self.context is None else self.context.detach()
        return replace(self, hidden=self.hidden.detach(), context=context, extra=extra)

    @staticmethod
    def cat(states: Sequence[PrefixState]) -> PrefixState:
        """Returns several states of one depth and grid as one batch."""
        first = states[0]
        if len(states) == 1:
            return first
        contexts = [state.context for state in states if state.context is not None]
        extra = {
            k: torch.cat([state.extra[k] for state in states]) if isinstance(v, Tensor) else v
            for k, v in first.extra.items()
        }
        return replace(
            first,
            hidden=torch.cat([state.hidden for state in states]),
            context=torch.cat(contexts) if contexts else None,
            extra=extra,
        )


class Backbone(nn.Module, ABC):
    """A frozen flow-matching network whose first i blocks are features of a noisy latent.

    The conditioning is the real noise level and a fixed null text, which is the backbone's own
    business. Depth i counts blocks: 0 is the network's input embedding, `num_blocks` the last block.
    Parameters never require gradients and the mode is always eval; gradients flow to z_t.

    Attributes:
        id: What the backbone was loaded from (a folder, a hub id, or "latent"), for `config.json`.
        init_args: The constructor's arguments as plain data, for `config.json`.
        num_blocks: The number L of blocks of the whole network (not only of those loaded).
        loaded_blocks: The number of blocks that are in memory; `depth` may not exceed it.
        latent_channels: The channels C of the latents it takes.
        patch: The latent pixels per token along each axis; height and width are multiples of it.
    """

    id: str
    init_args: dict[str, str | int | float | bool | None]
    num_blocks: int
    loaded_blocks: int
    latent_channels: int
    patch: int = 1

    @abstractmethod
    def width(self, depth: int) -> int:
        """Returns the channels D of the features after block `depth`."""

    @abstractmethod
    def embed(self, z_t: Tensor, t: Tensor) -> PrefixState:
        """Returns the state before the first block (depth 0), from what `forward` takes."""

    @abstractmethod
    def advance(self, state: PrefixState) -> PrefixState:
        """Returns the state after one more block."""

    @abstractmethod
    def suffix(self, state: PrefixState) -> Tensor:
        """Continues a prefix to the velocity u_t with shape (B, C, H, W).

        Prefix and suffix together equal the whole network's forward bit for bit.

        Raises:
            ValueError: If the backbone was loaded without its later blocks.
        """

    @abstractmethod
    def flops(self, latent_size: tuple[int, int], depth: int) -> int:
        """Returns the multiply-add FLOPs (2 per multiply-add) of `forward` for one sample."""

    def prefix(self, z_t: Tensor, t: Tensor, depth: int) -> PrefixState:
        """Runs the first `depth` blocks and returns a state that `suffix` continues.

        Arguments:
            z_t: The noisy latents, with shape (B, C, H, W), any floating dtype.
            t: The noise levels σ_t = t in [0, 1], with shape (B,), float32.
            depth: The number of blocks i to run.

        Raises:
            ValueError: If the latents do not fit the backbone, or `depth` is beyond the loaded blocks.
        """
        return self._run(z_t, t, depth)

    def _run(self, z_t: Tensor, t: Tensor, depth: int) -> PrefixState:
        """Runs the prefix. Apart from `prefix`, which FSDP2 wraps as a forward of its own."""
        self.check_depth(depth)
        self.check_latents(z_t, t)
        state = self.embed(z_t, t)
        while state.depth < depth:
            state = self.advance(state)
        return state

    def forward(self, z_t: Tensor, t: Tensor, depth: int) -> Tensor:
        """Returns the features u^{≤i}(z_t) after block `depth` with shape (B, D, h, w).

        This *is* the truncated pass: later blocks are not run. (FSDP2 hooks `forward` only.)
        Arguments and errors are those of `prefix`.
        """
        return self._run(z_t, t, depth).features()

    def features(self, z_t: Tensor, t: Tensor, depths: Sequence[int]) -> dict[int, Tensor]:
        """Returns the features after each of `depths`, each (B, D, h, w), from one pass (stage 1)."""
        wanted = sorted(set(depths))
        if not wanted:
            raise ValueError("no depths were asked for; give at least one, such as range(1, 5)")
        for depth in wanted:
            self.check_depth(depth)
        state = self._run(z_t, t, wanted[0])
        found = {state.depth: state.features()}
        while state.depth < wanted[-1]:
            state = self.advance(state)
            if state.depth in wanted:
                found[state.depth] = state.features()
        return found

    def check_depth(self, depth: int) -> None:
        """Raises ValueError unless the first `depth` blocks are in memory."""
        if not 0 <= depth <= self.num_blocks:
            raise ValueError(
                f"depth {depth} of {self.id}: expected 0 ... {self.num_blocks}, which is all it has"
            )
        if depth > self.loaded_blocks:
            raise ValueError(
                f"depth {depth} of {self.id}: only the first {self.loaded_blocks} of {self.num_blocks} "
                f"blocks were loaded; load it with max_depth={depth} (or None for the whole network)"
            )

    def check_latents(self, z_t: Tensor, t: Tensor | None = None) -> None:
        """Raises ValueError unless the latents (and noise levels) are those of this backbone."""
        got = tuple(z_t.shape)
        if z_t.ndim != 4:
            raise ValueError(
                f"latents have shape {got}, expected (B, {self.latent_channels}, H, W): a batch of VAE "
                "latents; add the batch axis with z_t[None] if it is missing"
            )
        if got[1] != self.latent_channels:
            raise ValueError(
                f"latents have shape {got}, expected {self.latent_channels} channels for {self.id}: encode "
                "the images with the VAE of that model (its `vae/` folder); a value model only "
                "works on latents of the VAE its backbone was trained with"
            )
        if got[2] % self.patch or got[3] % self.patch or 0 in got[2:]:
            raise ValueError(
                f"latents have shape {got}, expected height and width divisible by {self.patch} for "
                f"{self.id}: choose an image size that gives such latents"
            )
        if not z_t.is_floating_point():
            raise ValueError(f"latents have dtype {z_t.dtype}, expected floating point")
        if t is not None and t.shape != got[:1]:
            raise ValueError(
                f"noise levels have shape {tuple(t.shape)}, expected {got[:1]}: one level in [0, 1] for each "
                "sample, e.g. torch.full((len(z_t),), 0.5)"
            )

    def train(self, mode: bool = True) -> Self:
        """Stays in eval mode: the backbone is frozen."""
        return super().train(False)

    def freeze(self) -> None:
        """Turns gradients of all parameters off and sets eval mode."""
        self.requires_grad_(False)
        super().train(False)

    @torch.no_grad()
    def num_parameters(self) -> int:
        """Returns the number of parameters in memory."""
        return sum(p.numel() for p in self.parameters())
