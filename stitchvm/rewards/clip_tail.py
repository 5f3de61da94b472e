"""The second half of a CLIP vision tower, from block j on: r_φ^{≥j} of Eq. (6), trainable.

open_clip's tower is: conv1 → (class token, + positional embedding, ln_pre) → blocks 1 … L → ln_post → class token
@ proj. The hand-over is in front of block j. For j = 1 it is the patch embedding and the tail begins with the
parenthesis, as the paper's text says. For j > 1 the tokens have gone through all of that already: nothing is
added to them, and the class token of that depth, which a latent cannot supply, is a parameter of the tail
(docs/handover.md compares the choices).
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from stitchvm.rewards.base import Embedding, RewardTail

__all__ = ["CLASS_TOKENS", "CLIPTail", "block_flops", "read_out"]

CLASS_TOKENS = ("trainable", "constant", "readout", "literal")


def read_out(x: Tensor, visual: Any) -> Embedding:
    """Returns tokens and image embedding from the last block's tokens (B, N, D).

    The tokens are those after ln_post, class token first: their scale is the same in every tower, while the
    raw residual stream of a large one is known for a few channels far larger than the rest.

    Arguments:
        x: The last block's output.
        visual: Something with ln_post, proj, pool_type and final_ln_after_pool.
    """
    tokens = visual.ln_post(x)
    pooled = x if visual.final_ln_after_pool else tokens
    pooled = pooled[:, 0] if visual.pool_type == "tok" else pooled[:, 1:].mean(dim=1)
    if visual.final_ln_after_pool:
        pooled = visual.ln_post(pooled)
    return Embedding(tokens, pooled @ visual.proj)


def block_flops(block: Any, num_tokens: int, width: int) -> int:
    """Returns the multiply-add FLOPs (2 per multiply-add) of one block for one sample."""
    mlp: int = sum(weight.numel() for weight in block.mlp.parameters() if weight.ndim == 2)
    projections = 4 * width * width
    return 2 * num_tokens * (projections + mlp + 2 * num_tokens * width)


class CLIPTail(RewardTail):
    """A trainable copy of blocks j … L of a CLIP vision tower and its read-out.

    Patch dropout is left out: student and teacher must have the same tokens.

    Arguments:
        visual: The frozen tower of open_clip that is copied.
        j: The first block, counted from 1.
        class_token: For j > 1: "trainable", one for all images; "constant", the same as a buffer; "readout",
            trainable plus a linear map of the mean patch token, zero at first; or "literal", the paper's
            sentence at its word: class embedding and positional embedding are put on again at that depth.
        gradient_checkpointing: Whether to compute the blocks' activations again in the backward pass.
    """

    def __init__(
        self,
        visual: Any,
        j: int,
        class_token: str = "trainable",
        gradient_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        layers = list(visual.transformer.resblocks)
        if not 1 <= j <= len(layers):
            raise ValueError(f"j = {j}: this tower has blocks 1..{len(layers)}")
        if class_token not in CLASS_TOKENS:
            raise ValueError(
                f"class_token {class_token!r}: expected one of {', '.join(CLASS_TOKENS)}"
            )
        self.j, self.gradient_checkpointing = j, gradient_checkpointing
        self.grid: tuple[int, int] = tuple(visual.grid_size)
        self.pool_type, self.final_ln_after_pool = visual.pool_type, visual.final_ln_after_pool
        self._embeds = j == 1 or class_token == "literal"
        if self._embeds:
            self.class_embedding = copy.deepcopy(visual.class_embedding)
            self.positional_embedding = copy.deepcopy(visual.positional_embedding)
            self.ln_pre = copy.deepcopy(visual.ln_pre) if j == 1 else nn.Identity()
        else:
            token = _embedded_class_token(visual)
            if class_token == "constant":
                self.register_buffer("class_token", token)
            else:
                self.class_token = nn.Parameter(token)
        self.class_readout: nn.Linear | None = None
        if not self._embeds and class_token == "readout":
            width = len(visual.class_embedding)
            self.class_readout = nn.Linear(width, width, bias=False).to(visual.proj)
            nn.init.zeros_(self.class_readout.weight)
        self.blocks = nn.ModuleList(copy.deepcopy(layers[j - 1 :]))
        self.ln_post = copy.deepcopy(visual.ln_post)
        self.proj = copy.deepcopy(visual.proj)
        self.requires_grad_(True).train()

    def forward(self, h: Tensor, cls: Tensor | None = None) -> Embedding:
        """Maps patch features with shape (B, D, h, w) to tokens (B, 1 + h w, D) and image embedding (B, E).

        Arguments:
            h: What is handed over in place of r^{≤j−1}.
            cls: The true class token before block j with shape (B, D), in place of the learned one.

        Raises:
            ValueError: If h does not have the tower's width and patch grid.
        """
        expected = (self.proj.shape[0], *self.grid)
        if h.ndim != 4 or tuple(h.shape[1:]) != expected:
            raise ValueError(
                f"the tail from block {self.j} takes features (B, {', '.join(map(str, expected))}), got "
                f"{tuple(h.shape)}: is the stitching layer that of another reward?"
            )
        if not torch.is_autocast_enabled(h.device.type):
            h = h.to(self.proj.dtype)
        if cls is None:
            cls = (self.class_embedding if self._embeds else self.class_token).expand(len(h), -1)
            if self.class_readout is not None:
                cls = cls + self.class_readout(h.mean((2, 3)))
        x = torch.cat([cls.to(h.dtype)[:, None], h.flatten(2).transpose(1, 2)], dim=1)
        if self._embeds:
            x = self.ln_pre(x + self.positional_embedding.to(x.dtype))
        recompute = self.gradient_checkpointing and torch.is_grad_enabled()
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False) if recompute else block(x)
        return read_out(x, self)

    @torch.no_grad()
    def init_class_token(self, mean: Tensor, readout: Tensor | None = None) -> None:
        """Sets the class token before block j from probe images; no effect where the tail puts on the tower's
        own class embedding (j = 1, "literal").

        Arguments:
            mean: The mean class token (D,); with a `readout`, the intercept of that fit.
            readout: The matrix (D, D) that maps the mean patch token to the class token, for "readout".

        Raises:
            ValueError: If a shape is another, or there is a `readout` and no place for it.
        """
        if self._embeds:
            return
        width = len(self.class_token)
        if mean.shape != (width,) or (readout is not None and readout.shape != (width, width)):
            raise ValueError(
                f"a class token of this tower has shape ({width},), its read-out ({width}, {width}); got "
                f"{tuple(mean.shape)} and {None if readout is None else tuple(readout.shape)}"
            )
        self.class_token.copy_(mean)
        if readout is not None:
            if self.class_readout is None:
                raise ValueError(
                    "this tail has no read-out; make the reward with class_token='readout'"
                )
            self.class_readout.weight.copy_(readout)

    def flops(self) -> int:
        """Returns the multiply-add FLOPs (2 per multiply-add) of `forward` for one sample."""
        num_tokens, width = 1 + self.grid[0] * self.grid[1], self.proj.shape[0]
        heads = self.proj.numel() + (width * width if self.class_readout is not None else 0)
        return sum(block_flops(b, num_tokens, width) for b in self.blocks) + 2 * heads


@torch.no_grad()
def _embedded_class_token(visual: Any) -> Tensor:
    """Returns ln_pre(class embedding + its position): the class token before block 1, the same for all images."""
    token = visual.class_embedding + visual.positional_embedding[0]
    embedded: Tensor = visual.ln_pre(token.view(1, 1, -1)).flatten().clone()
    return embedded
