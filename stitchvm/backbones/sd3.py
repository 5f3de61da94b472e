"""The SD3 class of backbones: SD 3.5 Medium (with dual-attention blocks), SD 3.5 Large, the embedded world.

A prefix is diffusers' own forward stopped early, and a suffix goes on from there; together they equal it bit for bit.
The timestep is 1000·t in float32, as the pipeline passes it, whatever the network's dtype.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from stitchvm.backbones.base import PrefixState
from stitchvm.backbones.loading import find_tensors, load_tensors
from stitchvm.backbones.network import NetworkBackbone
from stitchvm.backbones.text import Condition

_TABLE = "pos_embed.pos_embed"


class PositionTable:
    """Position embeddings read from a checkpoint as far as they are needed.

    SD 3.5 Medium stores a table for 384 × 384 tokens (906 MB in float32), of which a latent of 64 × 64 uses the
    central 32 × 32. Only that window is read; windows are kept by size.

    Arguments:
        file: The safetensors file.
        key: The table's name in it; its shape is (1, size * size, D).
        size: The side of the whole table, in tokens.
        width: The channels D.

    Raises:
        ValueError: If the table has another shape.
    """

    def __init__(self, file: Path, key: str, size: int, width: int) -> None:
        from safetensors import safe_open

        self.file, self.key, self.size = file, key, size
        self._kept: dict[tuple[Any, ...], Tensor] = {}
        with safe_open(file, framework="pt") as handle:
            if key not in set(handle.keys()):
                raise ValueError(f"{file} has no tensor '{key}': the checkpoint is incomplete")
            shape = tuple(handle.get_slice(key).get_shape())
        if shape != (1, size * size, width):
            raise ValueError(
                f"{file}: tensor '{key}' has shape {shape}, expected {(1, size * size, width)} from "
                "transformer/config.json: the weights belong to another model"
            )

    def window(self, height: int, width: int, like: Tensor) -> Tensor:
        """Returns the central window with shape (1, height * width, D), on the device and in the dtype of `like`."""
        kind = (height, width, like.device, like.dtype)
        if kind not in self._kept:
            from safetensors import safe_open

            top, left = (self.size - height) // 2, (self.size - width) // 2
            with safe_open(self.file, framework="pt") as handle:
                table = handle.get_slice(self.key)
                starts = [row * self.size + left for row in range(top, top + height)]
                window = torch.cat([table[:, s : s + width] for s in starts], dim=1)
            self._kept[kind] = window.to(device=like.device, dtype=like.dtype)
        return self._kept[kind]


class CroppedPatchEmbed(nn.Module):
    """diffusers' `PatchEmbed` of SD3 with a `PositionTable` in place of the whole buffer."""

    def __init__(self, proj: nn.Conv2d, table: PositionTable) -> None:
        super().__init__()
        self.proj = proj
        self.table = table

    def forward(self, latent: Tensor) -> Tensor:
        """Returns the embedded patches of latents (B, C, H, W), with shape (B, N, D)."""
        patches = self.proj(latent)
        position = self.table.window(patches.shape[2], patches.shape[3], like=patches)
        return patches.flatten(2).transpose(1, 2) + position


def call_sd3(transformer: Any, z_t: Tensor, t: Tensor, cond: Condition) -> Tensor:
    """Returns the velocity (B, C, H, W) of a whole SD3 transformer, called as the pipeline calls it.

    Arguments:
        transformer: The diffusers transformer.
        z_t: Noisy latents, with shape (B, C, H, W), in its dtype.
        t: Noise levels, with shape (B,), float32; its timestep is 1000·t in float32.
        cond: The conditions of B prompts, in its dtype.
    """
    return transformer(
        hidden_states=z_t,
        timestep=1000 * t,
        encoder_hidden_states=cond.tokens,
        pooled_projections=cond.pooled,
        return_dict=False,
    )[0]


class SD3Backbone(NetworkBackbone):
    """A frozen SD3 transformer, cut where asked.

    Arguments:
        path: A pipeline folder, a hub id such as "stabilityai/stable-diffusion-3.5-medium", or "world:sd3".
        max_depth: How many blocks to load; the whole network if None.
        dtype: "float32", "bfloat16" or "float16".
        null_tokens: The T5 length of the null text; the pipeline's is 256. It changes the features, so a value model
            keeps it in its configuration.
        null_embeddings: A file of null-text embeddings (`tokens`, `pooled`) to use instead of encoding "".
        gradient_checkpointing: Whether blocks are run again in the backward pass instead of keeping activations.
        revision: The hub revision.

    Raises:
        FileNotFoundError: If the model cannot be found.
        ValueError: If it is another kind of model, or a tensor is missing or misshapen.
    """

    family = "sd3"
    class_name = "SD3Transformer2DModel"

    def __init__(
        self,
        path: str,
        max_depth: int | None = None,
        dtype: str = "bfloat16",
        null_tokens: int = 256,
        null_embeddings: str | None = None,
        gradient_checkpointing: bool = False,
        revision: str | None = None,
    ) -> None:
        super().__init__()
        self.load(path, max_depth, dtype, null_tokens, null_embeddings, revision)
        self.init_args = {
            "path": path,
            "max_depth": max_depth,
            "dtype": dtype,
            "null_tokens": null_tokens,
            "null_embeddings": null_embeddings,
            "gradient_checkpointing": gradient_checkpointing,
            "revision": revision,
        }
        self.gradient_checkpointing = gradient_checkpointing

    def load_weights(
        self, model: Any, path: str, dtype: torch.dtype, revision: str | None
    ) -> None:
        """Loads the tensors of a (cut) meta-device model, all but the position table."""
        model.pos_embed.pos_embed = None
        files = find_tensors(path, [*model.state_dict(), _TABLE], revision)
        file, config = files.pop(_TABLE), model.config
        load_tensors(model, files, path, dtype)
        table = PositionTable(file, _TABLE, config.pos_embed_max_size, model.inner_dim)
        model.pos_embed = CroppedPatchEmbed(model.pos_embed.proj, table)

    @property
    def blocks(self) -> list[nn.Module]:
        """The transformer blocks in memory."""
        return list(self.network.transformer_blocks)

    @staticmethod
    def block_count(config: dict[str, Any]) -> int:
        """Returns the number of blocks of a configuration."""
        return config["num_layers"]

    def read_shape(self, config: dict[str, Any]) -> None:
        """Takes channels and patch size from the transformer's configuration."""
        self.latent_channels = config["in_channels"]
        self.patch = config["patch_size"]

    def check_latents(self, z_t: Tensor, t: Tensor | None = None) -> None:
        """Raises ValueError unless latents and noise levels fit, and the size is within the position table."""
        super().check_latents(z_t, t)
        limit = self.network.config.pos_embed_max_size * self.patch
        if max(z_t.shape[2:]) > limit:
            raise ValueError(
                f"latents have shape {tuple(z_t.shape)}, expected height and width of at most {limit}, the "
                f"largest that {self.id} has position embeddings for: use smaller images"
            )

    def embed(self, z_t: Tensor, t: Tensor) -> PrefixState:
        """Returns the state before the first block."""
        return self._embed(z_t, t, self.null(len(z_t)))

    def _embed(self, z_t: Tensor, t: Tensor, cond: Condition) -> PrefixState:
        height, width = z_t.shape[2:]
        net = self.network
        with self.frozen(net.pos_embed, net.time_text_embed, net.context_embedder):
            hidden = net.pos_embed(z_t.to(self.dtype)).contiguous()
            temb = net.time_text_embed(1000 * t.float(), cond.pooled)
            context = net.context_embedder(cond.tokens)
        grid = (height // self.patch, width // self.patch)
        return PrefixState(0, hidden, context, grid, {"temb": temb})

    def both_branches(
        self, prefix: PrefixState, z_t: Tensor, t: Tensor, cond: Condition
    ) -> Tensor:
        """Returns the velocities (2B, C, H, W) under null text, whose first blocks have been run, and under prompts.

        The prompts' branch catches up by itself, and from there both go on in one batch: as many FLOPs as two calls,
        in half as many kernels.

        Arguments:
            prefix: The state of the null-text branch at (z_t, t).
            z_t: The noisy latents, with shape (B, C, H, W).
            t: The noise levels, with shape (B,), float32.
            cond: The conditions of B prompts, in the network's dtype.
        """
        state = self._embed(z_t, t, cond)
        while state.depth < prefix.depth:
            state = self.advance(state)
        return self.suffix(PrefixState.cat([prefix, state]))

    def block_kwargs(self, state: PrefixState) -> dict[str, Any]:
        """Returns what a block takes besides the two token streams."""
        return {"temb": state.extra["temb"]}

    def head(self, state: PrefixState) -> Tensor:
        """Returns the velocity from the tokens after the last block: patches put back into place."""
        hidden = self.network.norm_out(state.hidden, state.extra["temb"])
        patches = self.network.proj_out(hidden)
        size = (self.patch, self.patch, self.network.out_channels)
        grid = patches.unflatten(2, size).unflatten(1, state.grid)
        return grid.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)

    def flops(self, latent_size: tuple[int, int], depth: int) -> int:
        """Returns the FLOPs of the linear, convolution and attention layers of `forward` for one sample."""
        config, width = self.network.config, self.network.inner_dim
        n = (latent_size[0] // self.patch) * (latent_size[1] // self.patch)
        m = self.null_context.shape[1]
        total = n * width * self.latent_channels * self.patch**2
        total += m * width * config.joint_attention_dim
        total += width * (256 + config.pooled_projection_dim + 2 * width)
        for index in range(depth):
            last, dual = index == self.num_blocks - 1, index in config.dual_attention_layers
            modulation = (9 if dual else 6) + (2 if last else 6)
            total += modulation * width**2 + 2 * (n + m) ** 2 * width
            total += (4 + 8) * n * width**2 + (3 if last else 4 + 8) * m * width**2
            if dual:
                total += 4 * n * width**2 + 2 * n**2 * width
        return 2 * total
