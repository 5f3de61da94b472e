"""The FLUX class of backbones: double blocks, then single blocks, counted as one sequence (1 … 57 in FLUX.1-dev).

Latents are packed: every 2 × 2 patch of a (B, C, H, W) latent is one token of 4C channels, so features have
the grid (H/2, W/2). The timestep passes through the network's dtype as in the pipeline: 1000·t is rounded, divided
by 1000, and multiplied again inside the model (503 becomes 504 in bfloat16), so that features and generator see the
same noise level.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from stitchvm.backbones.base import PrefixState
from stitchvm.backbones.dense_gradients import dense_gradients
from stitchvm.backbones.loading import find_tensors, load_tensors
from stitchvm.backbones.network import NetworkBackbone
from stitchvm.backbones.text import Condition


def pack(z: Tensor) -> Tensor:
    """Returns latents (B, C, H, W) as tokens (B, H/2 * W/2, 4C), channel-major within a token."""
    patches = z.unflatten(3, (-1, 2)).unflatten(2, (-1, 2))
    return patches.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)


def unpack(tokens: Tensor, grid: tuple[int, int]) -> Tensor:
    """Returns tokens (B, h * w, 4C) of a grid (h, w) as latents (B, C, 2h, 2w)."""
    patches = tokens.unflatten(2, (-1, 2, 2)).unflatten(1, grid)
    return patches.permute(0, 3, 1, 4, 2, 5).flatten(4).flatten(2, 3)


def image_ids(grid: tuple[int, int], like: Tensor) -> Tensor:
    """Returns the position (0, row, column) of every token, with shape (h * w, 3)."""
    rows, columns = torch.arange(grid[0]), torch.arange(grid[1])
    row, column = torch.meshgrid(rows, columns, indexing="ij")
    ids = torch.stack([torch.zeros_like(row), row, column], dim=-1).flatten(0, 1)
    return ids.to(device=like.device, dtype=like.dtype)


def pipeline_timestep(t: Tensor, dtype: torch.dtype) -> Tensor:
    """Returns what `FluxPipeline` passes as timestep for noise levels t: 1000·t, rounded to `dtype`, / 1000."""
    return (1000 * t.float()).to(dtype) / 1000


def call_flux(
    transformer: Any, z_t: Tensor, t: Tensor, cond: Condition, guidance: Tensor | None = None
) -> Tensor:
    """Returns the velocity (B, C, H, W) of a whole FLUX transformer, called as the pipeline calls it.

    Arguments:
        transformer: The diffusers transformer.
        z_t: Noisy latents, with shape (B, C, H, W), in its dtype.
        t: Noise levels, with shape (B,), float32.
        cond: The conditions of B prompts, in its dtype.
        guidance: The guidance scales (B,) that a guidance-distilled model is told.
    """
    grid = (z_t.shape[2] // 2, z_t.shape[3] // 2)
    tokens = transformer(
        hidden_states=pack(z_t),
        timestep=pipeline_timestep(t, z_t.dtype),
        guidance=guidance,
        encoder_hidden_states=cond.tokens,
        pooled_projections=cond.pooled,
        txt_ids=z_t.new_zeros(cond.tokens.shape[1], 3),
        img_ids=image_ids(grid, z_t),
        return_dict=False,
    )[0]
    return unpack(tokens, grid)


class FluxBackbone(NetworkBackbone):
    """A frozen FLUX transformer, cut where asked.

    Arguments:
        path: A pipeline folder, a hub id such as "black-forest-labs/FLUX.1-dev", or "world:flux".
        max_depth: How many blocks to load; the whole network if None.
        dtype: "float32", "bfloat16" or "float16".
        null_tokens: The T5 length of the null text; the pipeline's is 512. It changes the features, so a value model
            keeps it in its configuration.
        guidance: The guidance scale a guidance-distilled model is told; others have no such input.
        null_embeddings: A file of null-text embeddings (`tokens`, `pooled`) to use instead of encoding "".
        gradient_checkpointing: Whether blocks are run again in the backward pass instead of keeping activations.
        revision: The hub revision.

    Raises:
        FileNotFoundError: If the model cannot be found.
        ValueError: If it is another kind of model, or a tensor is missing or misshapen.
    """

    family = "flux"
    class_name = "FluxTransformer2DModel"
    guidance: float = 3.5

    def __init__(
        self,
        path: str,
        max_depth: int | None = None,
        dtype: str = "bfloat16",
        null_tokens: int = 512,
        guidance: float = 3.5,
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
            "guidance": guidance,
            "null_embeddings": null_embeddings,
            "gradient_checkpointing": gradient_checkpointing,
            "revision": revision,
        }
        self.guidance = guidance
        self.gradient_checkpointing = gradient_checkpointing

    def load_weights(
        self, model: Any, path: str, dtype: torch.dtype, revision: str | None
    ) -> None:
        """Loads the tensors of a (cut) meta-device model."""
        load_tensors(model, find_tensors(path, model.state_dict(), revision), path, dtype)

    @property
    def blocks(self) -> list[nn.Module]:
        """The double and single blocks in memory, in their order."""
        return [*self.network.transformer_blocks, *self.network.single_transformer_blocks]

    @staticmethod
    def block_count(config: dict[str, Any]) -> int:
        """Returns the number of blocks of a configuration."""
        return config["num_layers"] + config["num_single_layers"]

    def _adopt(self, id: str, config: dict[str, Any], null: Condition) -> None:
        dense_gradients(self.network)
        super()._adopt(id, config, null)

    def read_shape(self, config: dict[str, Any]) -> None:
        """Takes channels and patch size from the transformer's configuration."""
        self.latent_channels = config["in_channels"] // 4
        self.patch = 2

    def embed(self, z_t: Tensor, t: Tensor) -> PrefixState:
        """Returns the state before the first block."""
        batch, _, height, width = z_t.shape
        grid = (height // 2, width // 2)
        null, net = self.null(batch), self.network
        levels = [pipeline_timestep(t, self.dtype) * 1000]
        if net.config.guidance_embeds:
            guidance = torch.full_like(t, self.guidance, dtype=torch.float32)
            levels.append(guidance.to(self.dtype) * 1000)
        with self.frozen(net.x_embedder, net.time_text_embed, net.context_embedder):
            hidden = net.x_embedder(pack(z_t.to(self.dtype)))
            temb = net.time_text_embed(*levels, null.pooled)
            context = net.context_embedder(null.tokens)
        text_ids = hidden.new_zeros(context.shape[1], 3)
        rotary = net.pos_embed(torch.cat([text_ids, image_ids(grid, hidden)]))
        return PrefixState(0, hidden, context, grid, {"temb": temb, "rotary": rotary})

    def block_kwargs(self, state: PrefixState) -> dict[str, Any]:
        """Returns what a block takes besides the two token streams."""
        return {"temb": state.extra["temb"], "image_rotary_emb": state.extra["rotary"]}

    def head(self, state: PrefixState) -> Tensor:
        """Returns the velocity from the tokens after the last block: unpacked."""
        hidden = self.network.norm_out(state.hidden, state.extra["temb"])
        return unpack(self.network.proj_out(hidden), state.grid)

    def flops(self, latent_size: tuple[int, int], depth: int) -> int:
        """Returns the FLOPs of the linear and attention layers of `forward` for one sample."""
        config, width = self.network.config, self.network.inner_dim
        n = (latent_size[0] // 2) * (latent_size[1] // 2)
        m = self.null_context.shape[1]
        total = n * width * config.in_channels + m * width * config.joint_attention_dim
        embedders = 2 if config.guidance_embeds else 1
        total += embedders * width * (256 + width)
        total += width * (config.pooled_projection_dim + width)
        double = min(depth, config.num_layers)
        attention = 2 * (n + m) ** 2 * width
        total += double * (12 * width**2 + 12 * (n + m) * width**2 + attention)
        total += (depth - double) * (3 * width**2 + (3 + 4 + 5) * (n + m) * width**2 + attention)
        return 2 * total
