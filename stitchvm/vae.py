"""The VAE of a latent diffusion model: z_0 = (mean − shift)·scale, and back.

Pixels are in [0, 1], and inputs and outputs float32, whatever the network's dtype.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor, nn

from stitchvm.backbones.loading import parse_dtype
from stitchvm.hub import resolve

_FILES = ["config.json", "diffusion_pytorch_model.safetensors"]


class VAE(nn.Module):
    """A frozen `AutoencoderKL`; only `vae/` of the pipeline is read.

    Arguments:
        path: A pipeline folder, a folder of a VAE alone, a hub id, or "world:sd3".
        dtype: "float32", "bfloat16" or "float16" (float16 overflows in some published VAEs).
        micro_batch: How many images go through the network at once; the whole batch if None.
        revision: The hub revision.

    Attributes:
        id: What it was loaded from.
        factor: Pixels per latent pixel along each axis.
        latent_channels: The channels C of the latents.

    Raises:
        FileNotFoundError: If there is no VAE.
        ValueError: If it is no AutoencoderKL.
    """

    def __init__(
        self,
        path: str,
        dtype: str = "float32",
        micro_batch: int | None = None,
        revision: str | None = None,
    ) -> None:
        super().__init__()
        from diffusers import AutoencoderKL

        torch_dtype = parse_dtype(dtype)
        patterns = ["model_index.json", *(f"vae/{name}" for name in _FILES)]
        folder = resolve(path, allow_patterns=patterns, revision=revision)
        if (folder / "vae").is_dir():
            folder = folder / "vae"
        if not (folder / "config.json").is_file():
            raise FileNotFoundError(
                f"'{path}' has no VAE: there is no {folder / 'config.json'}; give a diffusers pipeline folder "
                "with vae/, or the folder of a VAE"
            )
        found = json.loads((folder / "config.json").read_text()).get("_class_name")
        if found != "AutoencoderKL":
            raise ValueError(f"'{path}' holds a {found}, expected an AutoencoderKL in {folder}")
        network = AutoencoderKL.from_pretrained(
            folder, torch_dtype=torch_dtype, use_safetensors=True
        )
        self._take(network, str(path), micro_batch)

    @classmethod
    def from_network(cls, network: Any, id: str, micro_batch: int | None = None) -> VAE:
        """Returns a VAE around an `AutoencoderKL` that is in memory, not copied, in its own dtype, frozen.

        Arguments:
            network: The autoencoder, e.g. `pipe.vae`.
            id: What to call it.
            micro_batch: How many images go through the network at once; the whole batch if None.

        Raises:
            ValueError: If it is no AutoencoderKL.
        """
        if type(network).__name__ != "AutoencoderKL":
            raise ValueError(f"'{id}' has a {type(network).__name__}, expected an AutoencoderKL")
        self = cls.__new__(cls)
        nn.Module.__init__(self)
        self._take(network, id, micro_batch)
        return self

    def _take(self, network: Any, id: str, micro_batch: int | None) -> None:
        """Takes a network and the numbers in its configuration, and freezes it."""
        if micro_batch is not None and micro_batch < 1:
            raise ValueError(
                f"micro_batch = {micro_batch}, expected at least 1, or None for all at once"
            )
        self.id, self.micro_batch, self.network = id, micro_batch, network
        config = network.config
        self.factor = 2 ** (len(config.block_out_channels) - 1)
        self.latent_channels = config.latent_channels
        self.scale = float(config.scaling_factor)
        self.shift = float(config.shift_factor or 0.0)
        self.requires_grad_(False)
        super().train(False)

    def encode(
        self, pixels: Tensor, generator: torch.Generator | None = None, sample: bool = False
    ) -> Tensor:
        """Returns the latents z_0 with shape (B, C, H / factor, W / factor), shifted and scaled.

        Arguments:
            pixels: Images in [0, 1], with shape (B, 3, H, W).
            generator: Where the posterior's noise comes from, on the pixels' device or the CPU.
            sample: Whether to draw from the posterior; its mean by default.

        Raises:
            ValueError: If the pixels have another layout, or a size that is not divisible by `factor`.
        """
        got = tuple(pixels.shape)
        if pixels.ndim != 4 or got[1] != 3:
            raise ValueError(
                f"pixels have shape {got}, expected (B, 3, H, W): convert images to RGB, put channels first, and "
                "add the batch axis"
            )
        if got[2] % self.factor or got[3] % self.factor or 0 in got[2:]:
            near = tuple(max(side // self.factor, 1) * self.factor for side in got[2:])
            raise ValueError(
                f"pixels have shape {got}, expected height and width divisible by {self.factor} for the VAE "
                f"of {self.id}: resize or crop the images, e.g. to {near[0]} x {near[1]}"
            )
        if not pixels.is_floating_point():
            raise ValueError(
                f"pixels have dtype {pixels.dtype}, expected floats in [0, 1]: divide by 255"
            )

        def run(part: Tensor) -> Tensor:
            posterior = self.network.encode((2 * part - 1).to(self.dtype)).latent_dist
            latent = posterior.sample(generator) if sample else posterior.mode()
            return (latent.float() - self.shift) * self.scale

        return self._in_parts(run, pixels)

    def decode(self, z_0: Tensor, clamp: bool = False) -> Tensor:
        """Returns pixels with shape (B, 3, H * factor, W * factor), differentiable in z_0.

        Arguments:
            z_0: Clean latents, shifted and scaled, with shape (B, C, H, W).
            clamp: Whether to cut the pixels to [0, 1], where their gradient vanishes.

        Raises:
            ValueError: If the latents have other channels than the VAE's.
        """
        got = tuple(z_0.shape)
        if z_0.ndim != 4 or got[1] != self.latent_channels:
            raise ValueError(
                f"latents have shape {got}, expected (B, {self.latent_channels}, H, W) for the VAE of {self.id}: "
                "decode them with the VAE of the model that made them"
            )

        def run(part: Tensor) -> Tensor:
            latent = (part.float() / self.scale + self.shift).to(self.dtype)
            return (self.network.decode(latent, return_dict=False)[0].float() + 1) / 2

        pixels = self._in_parts(run, z_0)
        return pixels.clamp(0, 1) if clamp else pixels

    @property
    def dtype(self) -> torch.dtype:
        """The network's dtype."""
        return self.network.dtype

    def train(self, mode: bool = True) -> Self:
        """Stays in eval mode: the VAE is frozen."""
        return super().train(False)

    def forward(self, pixels: Tensor) -> Tensor:
        """Returns the reconstruction of pixels, clamped to [0, 1]."""
        return self.decode(self.encode(pixels), clamp=True)

    def _in_parts(self, run: Callable[[Tensor], Tensor], batch: Tensor) -> Tensor:
        """Runs a batch in micro-batches, in the network's own dtype whatever autocast says."""
        with torch.autocast(batch.device.type, enabled=False):
            if self.micro_batch is None or len(batch) <= self.micro_batch:
                return run(batch)
            return torch.cat([run(part) for part in batch.split(self.micro_batch)])


def latent_scaling(path: str) -> tuple[float, float] | None:
    """Returns scale and shift of the latents of a pipeline, from its `vae/config.json`; None if that cannot be had.

    Two VAEs of as many channels are other latent spaces all the same: SD3's and FLUX's have 16 each, and differ here.

    Arguments:
        path: A pipeline folder, a hub id, or "world:sd3".
    """
    try:
        file = resolve(path, allow_patterns=["vae/config.json"]) / "vae" / "config.json"
        config = json.loads(file.read_text())
    except (OSError, ValueError):
        return None
    return float(config["scaling_factor"]), float(config.get("shift_factor") or 0.0)


def scaling_of(backbone: Any) -> tuple[float, float] | None:
    """Returns scale and shift of the latents that a backbone reads; None if that cannot be told."""
    if hasattr(backbone, "scaling"):  # of the VAE stitch, which has no pipeline to look into
        own: tuple[float, float] | None = backbone.scaling
        return own
    return latent_scaling(backbone.id)
