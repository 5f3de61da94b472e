"""The VAE: diffusers' AutoencoderKL, 32x32 pixels to 16x16x4 latents, trained as a weighted beta-VAE.

L = mean w (x - x')^2 + 0.05 mean w |x - x'| + beta KL, with w = 1 + 6 [pixel is saturated]: objects are small, and
without the weight the background would have all the attention. No scene labels are used.
"""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import AutoencoderKL
from torch import Tensor

from stitchvm.world.checker import check_batch, pass_rate
from stitchvm.world.render import render
from stitchvm.world.scenes import sample_scenes
from stitchvm.world.train.common import Stage, replace_folder, runs_folder, step_generator

BATCH = 32


def build_vae() -> AutoencoderKL:
    """Returns an untrained VAE."""
    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(24, 48),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=32,
        mid_block_add_attention=False,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )


def saturation_weight(pixels: Tensor, gain: float = 6.0) -> Tensor:
    """Returns 1 + gain * saturation of pixels (B, 3, H, W) in [0, 1], as (B, 1, H, W)."""
    chroma = (pixels - pixels.mean(dim=1, keepdim=True)).norm(dim=1, keepdim=True)
    return 1 + gain * ((chroma - 0.15) / 0.2).clamp(0, 1)


class VAEStage(Stage):
    """Trains the VAE, which the generators then ship; shift and scaling are measured on training scenes."""

    name = "vae"
    total_steps = 1800
    warmup = 100
    ema_decay = 0.995
    betas = (
        2e-4,
        8e-4,
    )  # before and after step 1000: first learn to paint, then drop what is not needed

    def __init__(self, seed: int = 0) -> None:
        super().__init__(seed)
        torch.manual_seed(seed)
        self.vae = build_vae().to(memory_format=torch.channels_last)
        self.nets["vae"] = self.vae
        group = {"params": list(self.vae.parameters()), "base_lr": 2e-3}
        self.optimizers = [
            torch.optim.AdamW([group], lr=2e-3, betas=(0.9, 0.99), weight_decay=1e-3)
        ]
        self.start_ema()

    def loss(self, step: int) -> tuple[Tensor, dict[str, float]]:
        pixels = torch.from_numpy(render(sample_scenes("train", BATCH, [self.seed, 7, step])))
        x = (2 * pixels - 1).to(memory_format=torch.channels_last)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            moments = self.vae.encoder(x)
        mean, logvar = moments.float().chunk(2, dim=1)
        logvar = logvar.clamp(-20, 10)
        noise = torch.randn(mean.shape, generator=step_generator(self.seed, step))
        z = mean + (0.5 * logvar).exp() * noise
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = self.vae.decoder(z)
        error = out.float() - x
        weight = saturation_weight(pixels)
        mse = (weight * error**2).mean()
        kl = 0.5 * (mean**2 + logvar.exp() - 1 - logvar).mean()
        total = mse + 0.05 * (weight * error.abs()).mean() + self.betas[step >= 1000] * kl
        return total, {"mse": mse.item(), "kl": kl.item()}

    def evaluate(self) -> dict[str, float]:
        return vae_figures(self.vae, 512, 1)

    def export(self, folder: Path) -> None:
        pixels = torch.from_numpy(render(sample_scenes("train", 2048, 12345)))
        z = torch.cat([self.vae.encode(2 * p - 1).latent_dist.mean for p in pixels.split(256)])
        shift, scale = float(z.mean()), float(1 / z.std())
        self.vae.register_to_config(shift_factor=shift, scaling_factor=scale)

        def write(target: Path) -> None:
            copy = build_vae()
            copy.load_state_dict(self.vae.state_dict())
            copy.register_to_config(shift_factor=shift, scaling_factor=scale)
            copy.to(torch.float16).save_pretrained(target)

        replace_folder(write, runs_folder() / "vae" / "export")  # each generator ships a copy


@torch.no_grad()
def vae_figures(vae: AutoencoderKL, n: int, seed: int, split: str = "test") -> dict[str, float]:
    """Returns the checker's pass rate and PSNR in dB of n reconstructions (latent mean)."""
    scenes = sample_scenes(split, n, [seed, 99])
    pixels = torch.from_numpy(render(scenes))
    outs = []
    for part in pixels.split(256):
        outs.append((vae.decode(vae.encode(2 * part - 1).latent_dist.mean).sample + 1) / 2)
    out = torch.cat(outs).clamp(0, 1)
    psnr = -10 * torch.log10(((out - pixels) ** 2).mean())
    passed = pass_rate(check_batch(out.numpy(), scenes))
    return {"vae/checker": passed, "vae/psnr_db": float(psnr)}
