"""What is sampled: the shipped world, and real generators, rewards and value models with random weights.

Real networks are built whole, straight on the device, from their published configurations; no file is read. Prompts are
random conditions of the real length: text encoders are neither run nor in memory, as after `encode_ahead`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from setups import (
    CLIP_L,
    NULL_TOKENS,
    SD35_MEDIUM,
    SD35_VAE,
    SMALL_BACKBONE,
    SMALL_VAE,
    random_clip,
    random_vae,
    randomise,
)
from torch import Tensor, nn

from stitchvm.backbones.loading import build_truncated
from stitchvm.backbones.text import Condition
from stitchvm.generator import Generator
from stitchvm.rewards.clip import CLIPReward
from stitchvm.rewards.open_clip_reward import OpenCLIPReward
from stitchvm.vae import VAE
from stitchvm.value_model import StitchedValueModel

SD35_LARGE: dict[str, Any] = SD35_MEDIUM | {
    "num_layers": 38,
    "num_attention_heads": 38,
    "caption_projection_dim": 2432,
    "pos_embed_max_size": 192,
    "dual_attention_layers": (),
}
FLUX_DEV: dict[str, Any] = {
    "_class_name": "FluxTransformer2DModel",
    "patch_size": 1,
    "in_channels": 64,
    "num_layers": 19,
    "num_single_layers": 38,
    "attention_head_dim": 128,
    "num_attention_heads": 24,
    "joint_attention_dim": 4096,
    "pooled_projection_dim": 768,
    "guidance_embeds": True,
    "axes_dims_rope": (16, 56, 56),
}
SMALL_FLUX = {
    "num_layers": 2,
    "num_single_layers": 4,
    "attention_head_dim": 16,
    "num_attention_heads": 3,
    "joint_attention_dim": 32,
    "pooled_projection_dim": 32,
    "axes_dims_rope": (4, 6, 6),
}
FLUX_VAE = SD35_VAE | {"scaling_factor": 0.3611, "shift_factor": 0.1159}


@dataclass(frozen=True)
class Architecture:
    """A generator: its transformer, the same shrunk, its VAE, the number of text tokens, and how it is sampled."""

    transformer: dict[str, Any]
    small: dict[str, Any]
    vae: dict[str, Any]
    text_tokens: int
    guidance_scale: float
    fk_steps: int


ARCHITECTURES = {
    "sd35m": Architecture(SD35_MEDIUM, SMALL_BACKBONE, SD35_VAE, NULL_TOKENS, 4.5, 40),
    "sd35l": Architecture(
        SD35_LARGE, SMALL_BACKBONE | {"dual_attention_layers": ()}, SD35_VAE, NULL_TOKENS, 4.5, 40
    ),
    "flux": Architecture(FLUX_DEV, SMALL_FLUX, FLUX_VAE, 512, 3.5, 28),
}


@dataclass(frozen=True)
class SamplingSetup:
    """A generator, a reward and a resolution.

    Attributes:
        name: Its name on the command line.
        architecture: A key of `ARCHITECTURES`; None for the world.
        reward: The open_clip architecture; None for the world.
        resolution: The side of the images in pixels.
        resize_mode: How the reward makes images square.
        reduced: Whether every size is shrunk.
        stitch_point: The pair (i, j).
        guided_steps: The steps of guidance and of plain sampling beside it; the paper's 100.
    """

    name: str
    architecture: str | None
    reward: str | None
    resolution: int
    resize_mode: str | None = None
    reduced: bool = False
    stitch_point: tuple[int, int] = (4, 1)
    guided_steps: int = 100

    @property
    def real(self) -> bool:
        """Whether it is a published architecture, not the world."""
        return self.architecture is not None

    @property
    def fk(self) -> bool:
        """Whether FK steering and best-of-N are compared, too; their reward makes little difference."""
        return self.reward in (None, CLIP_L)

    @property
    def guidance_scale(self) -> float:
        """The guidance scale g: the paper's 4.5 for SD 3.5 and 3.5 for FLUX."""
        return ARCHITECTURES[self.architecture].guidance_scale if self.architecture else 4.5

    @property
    def fk_steps(self) -> int:
        """The steps of FK steering and best-of-N: the paper's 40 for SD 3.5 and 28 for FLUX."""
        return ARCHITECTURES[self.architecture].fk_steps if self.architecture else 40

    def shrunk(self) -> SamplingSetup:
        """Returns the same with small sizes."""
        return replace(self, resolution=self.resolution // 8, reduced=True)


_ALL = [SamplingSetup("world", None, None, 32)]
for _name, _side in (
    *(("sd35m", 1024), ("sd35m", 512), ("sd35l", 1024), ("sd35l", 512)),
    ("flux", 1024),
):
    _ALL.append(SamplingSetup(f"{_name}_{_side}", _name, CLIP_L, _side))
    _ALL.append(SamplingSetup(f"{_name}_{_side}_hpsv2", _name, "ViT-H-14", _side, "pad"))
SAMPLING_SETUPS = {setup.name: setup for setup in _ALL}


class RandomReward(OpenCLIPReward):
    """A random vision tower, whose prompts have random unit embeddings."""

    direction: Tensor

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.uses_text = True
        # kept, as a real reward keeps its text tower when fine-tuning drops the vision tower
        e = torch.linspace(-1, 1, self.embed_dim, device=self.visual.proj.device)
        self.register_buffer("direction", F.normalize(e, dim=0), persistent=False)

    def encode_text(self, prompts: Sequence[str]) -> Tensor:
        """Returns the same unit embedding for every prompt, (B, E)."""
        return self.direction.expand(len(prompts), -1)


class RandomGenerator(Generator):
    """A generator on a random transformer; all prompts have one condition, the empty one another."""

    def __init__(
        self, transformer: Any, vae: VAE, guidance_scale: float, null: Condition, cond: Condition
    ) -> None:
        nn.Module.__init__(self)
        self.id, self.guidance_scale = "random", guidance_scale
        self.family = "flux" if type(transformer).__name__.startswith("Flux") else "sd3"
        self.transformer, self.vae = transformer, vae
        self.conditions = (null, cond)
        self.requires_grad_(False)
        self.eval()

    @property
    def null(self) -> Condition:
        """The condition of the empty prompt."""
        return self.conditions[0]

    def encode_prompts(self, prompts: Sequence[str]) -> Condition:
        """Returns the condition of B prompts."""
        return self.conditions[1].repeat(len(prompts))


class Rig:
    """Everything a variant may need, on one device, frozen.

    Attributes:
        setup: The setup.
        device: The device; "meta" to count only.
        generator: The generator.
        reward: The reward.
        model: The value model on the generator's null-text branch, its stitch untrained.
        prompts: The single prompt that is sampled.
    """

    def __init__(self, setup: SamplingSetup, device: torch.device) -> None:
        self.setup, self.device, self.prompts = setup, device, ["a red circle"]
        if setup.architecture is None:
            self.generator = Generator("world:sd3", guidance_scale=setup.guidance_scale)
            self.generator.encode_ahead(self.prompts)
            self.reward: OpenCLIPReward = CLIPReward("world:clip")
            self.reward.encode_text(self.prompts)
        else:
            self.generator, self.reward = random_networks(setup, device)
        self.reward.check_finite = device.type != "meta"
        self.model = StitchedValueModel(
            self.generator.null_branch(), self.reward, setup.stitch_point
        )
        for part in (self.generator, self.model):
            part.to(device).requires_grad_(False)
        self.model.eval()

    @property
    def latent_size(self) -> tuple[int, int]:
        """The latent height and width."""
        side = self.setup.resolution // self.generator.vae.factor
        return side, side

    @property
    def branches(self) -> int:
        """How many times a plain step runs the network: 2 with classifier-free guidance, else 1."""
        return 2 if self.generator.runs_null_branch() else 1

    @property
    def dtypes(self) -> str:
        """The dtypes, in words."""
        vae, reward = self.generator.vae.dtype, self.reward.visual.proj.dtype
        names = [str(d).removeprefix("torch.") for d in (self.generator.dtype, vae, reward)]
        return "transformer {}, VAE {}, reward and tail {}".format(*names)

    def compile(self, backend: str) -> None:
        """Compiles what a generator with `compile: true` does; the tail, on one sample, gains nothing by it."""
        self.generator.compile_blocks(backend)

    def place(self, *, reward: bool, model: bool) -> None:
        """Keeps on a GPU what is needed, and the rest in CPU memory. (A value model takes its reward along.)"""
        if self.device.type != "cuda":
            return
        parked = torch.device("cpu")
        self.model.to(self.device if model else parked)
        self.reward.to(self.device if reward or model else parked)


def random_networks(
    setup: SamplingSetup, device: torch.device
) -> tuple[RandomGenerator, RandomReward]:
    """Returns generator and reward of a real setup with random weights, all bfloat16."""
    assert setup.architecture is not None and setup.reward is not None
    of = ARCHITECTURES[setup.architecture]
    config = of.transformer | (of.small if setup.reduced else {})
    network: Any = build_truncated(config, None)
    nn.Module.to(network, torch.bfloat16)
    randomise(network.to_empty(device=device))
    for buffer in network.buffers():  # SD3's position table
        buffer.normal_()
    tokens = 9 if setup.reduced else of.text_tokens
    null, cond = (
        Condition(
            torch.randn(1, tokens, config["joint_attention_dim"]),
            torch.randn(1, config["pooled_projection_dim"]),
        ).to(device, torch.bfloat16)
        for _ in range(2)
    )
    vae = random_vae(of.vae | (SMALL_VAE if setup.reduced else {}), device)
    generator = RandomGenerator(network, vae, setup.guidance_scale, null, cond)
    reward = random_clip(
        setup.reward,
        setup.resize_mode,
        device,
        setup.reduced,
        cls=RandomReward,
        dtype="bfloat16",
    )
    assert isinstance(reward, RandomReward)
    return generator, reward
