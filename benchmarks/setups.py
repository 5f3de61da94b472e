"""What is measured: the shipped world, and real architectures with random weights.

Real networks are built by value from their published configurations, only as deep as they are used, with random
weights made on the device: their speed is that of the trained ones, and nothing is downloaded.
`reduced` shrinks every number of a setup, so that the code that runs on a GPU can be run anywhere in seconds.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from stitchvm.backbones.base import Backbone
from stitchvm.backbones.loading import build_truncated
from stitchvm.backbones.sd3 import CroppedPatchEmbed, SD3Backbone
from stitchvm.backbones.text import Condition
from stitchvm.data.images import ImageFolder
from stitchvm.data.module import DataModule
from stitchvm.data.world import World
from stitchvm.rewards.base import Reward
from stitchvm.rewards.checkpoint import LoadedCLIP
from stitchvm.rewards.clip import CLIPReward
from stitchvm.rewards.open_clip_reward import OpenCLIPReward
from stitchvm.vae import VAE

SD35_MEDIUM: dict[str, Any] = {
    "_class_name": "SD3Transformer2DModel",
    "sample_size": 128,
    "patch_size": 2,
    "in_channels": 16,
    "out_channels": 16,
    "num_layers": 24,
    "attention_head_dim": 64,
    "num_attention_heads": 24,
    "joint_attention_dim": 4096,
    "caption_projection_dim": 1536,
    "pooled_projection_dim": 2048,
    "pos_embed_max_size": 384,
    "dual_attention_layers": tuple(range(13)),
    "qk_norm": "rms_norm",
}
SD35_VAE: dict[str, Any] = {
    "latent_channels": 16,
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
    "scaling_factor": 1.5305,
    "shift_factor": 0.0609,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
}
NULL_TOKENS = 77 + 256  # CLIP's and T5's part of the pipeline's null text
SMALL_BACKBONE = {
    "num_layers": 6,
    "attention_head_dim": 16,
    "num_attention_heads": 3,
    "joint_attention_dim": 32,
    "caption_projection_dim": 48,
    "pooled_projection_dim": 32,
    "pos_embed_max_size": 24,
    "dual_attention_layers": (0, 1, 2),
}
SMALL_VAE = {"block_out_channels": (8, 8, 16, 16), "norm_num_groups": 4, "layers_per_block": 1}
SMALL_CLIP = {
    "embed_dim": 24,
    "vision_cfg": {"image_size": 56, "layers": 4, "width": 48, "head_width": 16, "patch_size": 14},
    "text_cfg": {"vocab_size": 64, "width": 24, "heads": 2, "layers": 1},
}


@dataclass(frozen=True)
class Setup:
    """One pair of backbone and reward at one resolution.

    Attributes:
        name: Its name on the command line.
        reward: The open_clip architecture; None for the world.
        resolution: The side of the images in pixels.
        batch_size: Images per micro-batch.
        accumulate: Micro-batches per optimiser step.
        noise_levels: Noise levels per image of the shipped config.
        paper_hours: The GPU-hours of the paper's training on a GH200 (Table 4), if it reports them.
        resize_mode: How the reward makes images square.
        reduced: Whether every size is shrunk.
        stitch_point: The pair (i, j).
    """

    name: str
    reward: str | None
    resolution: int
    batch_size: int = 32
    accumulate: int = 4
    noise_levels: int = 1
    paper_hours: float | None = None
    resize_mode: str | None = None
    reduced: bool = False
    stitch_point: tuple[int, int] = (4, 1)

    def shrunk(self) -> Setup:
        """Returns the same with small sizes."""
        return replace(self, resolution=self.resolution // 8, batch_size=2, reduced=True)

    def backbone(self, device: torch.device, max_depth: int | None = None) -> Backbone:
        """Returns the backbone's first blocks on the device, in the dtype of its config."""
        if self.reward is None:
            world = SD3Backbone("world:sd3", max_depth=max_depth, dtype="float32", null_tokens=1)
            return world.to(device)
        config = SD35_MEDIUM | (SMALL_BACKBONE if self.reduced else {})
        return random_sd3(config, max_depth, device, 9 if self.reduced else NULL_TOKENS)

    def make_reward(self, device: torch.device) -> Reward:
        """Returns the reward on the device, float32 as in its config."""
        if self.reward is None:
            return CLIPReward("world:clip").to(device)
        return random_clip(self.reward, self.resize_mode, device, self.reduced)

    def vae(self, device: torch.device) -> VAE:
        """Returns the VAE on the device, in the dtype of its config."""
        if self.reward is None:
            return VAE("world:sd3").to(device)
        return random_vae(SD35_VAE | (SMALL_VAE if self.reduced else {}), device)

    def data(self, folder: Path, batch_size: int, workers: int) -> DataModule:
        """Returns training images, for real setups JPEG files made in `folder`."""
        if self.reward is None:
            return World(batch_size=batch_size, num_workers=workers)
        root = folder / self.name
        if not root.is_dir():
            write_jpegs(root, 2 * batch_size + 1, self.resolution)
        return ImageFolder(
            str(root),
            val_size=1,
            resolution=self.resolution,
            batch_size=batch_size,
            num_workers=workers,
        )


CLIP_L, CLIP_H = "ViT-L-14-336-quickgelu", "ViT-H-14-378-quickgelu"
SETUPS = {
    setup.name: setup
    for setup in (
        Setup("world", None, 32, batch_size=16, accumulate=1, noise_levels=4),
        Setup("sd35m_512", CLIP_L, 512, paper_hours=9.3),
        Setup("sd35m_1024", CLIP_L, 1024, batch_size=16, accumulate=8, paper_hours=23.5),
        Setup("sd35m_512_dfn", CLIP_H, 512, resize_mode="squash"),
        Setup("sd35m_1024_dfn", CLIP_H, 1024, 16, 8, resize_mode="squash"),
        Setup("sd35m_512_hpsv2", "ViT-H-14", 512, paper_hours=9.4, resize_mode="pad"),
        Setup("sd35m_1024_hpsv2", "ViT-H-14", 1024, 16, 8, paper_hours=31.0, resize_mode="pad"),
    )
}


class RandomTable:
    """Random position embeddings in place of the 906 MB table, windows kept by size."""

    def __init__(self, width: int) -> None:
        self.width = width
        self._kept: dict[tuple[int, int], Tensor] = {}

    def window(self, height: int, width: int, like: Tensor) -> Tensor:
        """Returns positions (1, height * width, D), on the device and in the dtype of `like`."""
        if (height, width) not in self._kept:
            self._kept[height, width] = like.new_empty(1, height * width, self.width).normal_()
        return self._kept[height, width]


@torch.no_grad()
def randomise(module: nn.Module) -> nn.Module:
    """Fills matrices with N(0, 1/fan-in), gains with 1 and biases with 0, so that activations stay of order one."""
    for name, parameter in module.named_parameters():
        if parameter.ndim > 1:
            parameter.normal_(std=parameter[0].numel() ** -0.5)
        else:
            parameter.fill_(0.0 if name.endswith("bias") else 1.0)
    return module


def random_sd3(
    config: dict[str, Any], max_depth: int | None, device: torch.device, null_tokens: int
) -> SD3Backbone:
    """Returns the first blocks of an SD3-class transformer with random weights, bfloat16."""
    network: Any = build_truncated(config, max_depth)
    nn.Module.to(network, torch.bfloat16)  # diffusers' own warns of a list that is empty here
    table: Any = RandomTable(network.inner_dim)
    network.pos_embed = CroppedPatchEmbed(network.pos_embed.proj, table)
    randomise(network.to_empty(device=device))
    tokens = torch.randn(1, null_tokens, config["joint_attention_dim"])
    null = Condition(tokens, torch.randn(1, config["pooled_projection_dim"]))
    backbone = SD3Backbone.from_transformer(network, null.to(device, torch.bfloat16), id="random")
    backbone.network = network  # owned instead of borrowed: frozen, moved and compiled with it
    backbone.freeze()
    return backbone


def random_clip(
    name: str,
    resize_mode: str | None,
    device: torch.device,
    reduced: bool,
    cls: type[OpenCLIPReward] = OpenCLIPReward,
    **settings: Any,
) -> OpenCLIPReward:
    """Returns a reward on the vision tower of an open_clip architecture with random weights, float32 by default."""
    import open_clip

    config: dict[str, Any] = SMALL_CLIP if reduced else dict(open_clip.get_model_config(name))
    with torch.device("meta"):
        model = open_clip.CLIP(**config)
    randomise(model.visual.to_empty(device=device))

    def no_tokenizer(prompts: list[str]) -> Tensor:
        raise ValueError("a random reward reads no text")

    loaded = LoadedCLIP(model, {"resize_mode": resize_mode}, no_tokenizer)
    return cls(loaded, id=f"random {name}", uses_text=False, **settings)


def random_vae(config: dict[str, Any], device: torch.device) -> VAE:
    """Returns an AutoencoderKL with random weights, bfloat16: only its config.json is ever written."""
    from diffusers import AutoencoderKL

    with device:
        network = AutoencoderKL(**config)
    nn.Module.to(network, torch.bfloat16)
    with (
        tempfile.TemporaryDirectory() as folder,
        mock.patch.object(AutoencoderKL, "from_pretrained", lambda *_, **__: network),
    ):
        network.save_config(folder)
        return VAE(folder, dtype="bfloat16")


def write_jpegs(folder: Path, count: int, resolution: int) -> None:
    """Writes JPEG photographs of noise, 4:3 with a shorter side of 1.2 times the resolution."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    height = round(1.2 * resolution)
    size = (round(height * 4 / 3), height)
    for n in range(count):
        coarse = rng.integers(0, 256, (size[1] // 8 + 1, size[0] // 8 + 1, 3), dtype=np.uint8)
        image = Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC)
        image.save(folder / f"{n:05d}.jpg", quality=90)


Maker = Callable[..., Any]


def factories(setup: Setup, device: torch.device) -> tuple[Maker, Maker, Maker]:
    """Returns what StitchDistillation takes: makers of backbone, reward and VAE."""
    return (
        lambda max_depth=None: setup.backbone(device, max_depth),
        lambda: setup.make_reward(device),
        lambda: setup.vae(device),
    )
