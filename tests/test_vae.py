"""Tests of stitchvm/vae.py."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL

from stitchvm.backbones.latent import LatentBackbone
from stitchvm.vae import VAE, latent_scaling, scaling_of


@pytest.fixture(scope="module")
def vae(tiny_sd3: Path) -> VAE:
    return VAE(str(tiny_sd3))


def test_encode_and_decode_are_those_of_the_pipeline(vae: VAE, tiny_sd3: Path) -> None:
    stock = AutoencoderKL.from_pretrained(tiny_sd3, subfolder="vae")
    stock.requires_grad_(False)  # torch picks another convolution kernel for trainable weights
    pixels = torch.rand(2, 3, 12, 8)
    z_0 = vae.encode(pixels)
    with torch.no_grad():
        mean = stock.encode(2 * pixels - 1).latent_dist.mode()
        image = stock.decode(z_0 / 1.5 + 0.1, return_dict=False)[0]
    assert torch.equal(z_0, (mean - 0.1) * 1.5)
    assert z_0.shape == (2, vae.latent_channels, 12 // vae.factor, 8 // vae.factor)
    assert torch.equal(vae.decode(z_0), (image + 1) / 2)


def test_sampling_follows_the_generator(vae: VAE) -> None:
    pixels = torch.rand(2, 3, 8, 8)
    draws = [
        vae.encode(pixels, torch.Generator().manual_seed(seed), sample=True) for seed in (0, 0, 1)
    ]
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])
    assert not torch.equal(draws[0], vae.encode(pixels))


def test_micro_batches_change_nothing(vae: VAE, tiny_sd3: Path) -> None:
    parts = VAE(str(tiny_sd3 / "vae"), micro_batch=2)
    pixels = torch.rand(5, 3, 8, 8)
    torch.testing.assert_close(parts.encode(pixels), vae.encode(pixels))
    torch.testing.assert_close(parts(pixels), vae(pixels))


def test_decoding_is_differentiable_and_frozen(vae: VAE) -> None:
    z_0 = torch.randn(1, vae.latent_channels, 4, 4, requires_grad=True)
    vae.decode(z_0).sum().backward()
    assert z_0.grad is not None and z_0.grad.abs().sum() > 0
    assert not any(p.requires_grad for p in vae.parameters())
    assert not vae.train().network.training


@torch.no_grad()
def test_clamp(vae: VAE) -> None:
    z_0 = torch.randn(1, vae.latent_channels, 4, 4)
    bias = torch.tensor([-3.0, 0.0, 3.0])
    vae.network.decoder.conv_out.bias += bias
    free, cut = vae.decode(z_0), vae.decode(z_0, clamp=True)
    vae.network.decoder.conv_out.bias -= bias
    assert free.min() < 0 and free.max() > 1
    assert torch.equal(cut, free.clamp(0, 1))


def test_low_precision_inside_float32_outside(tiny_sd3: Path) -> None:
    vae = VAE(str(tiny_sd3), dtype="bfloat16")
    z_0 = vae.encode(torch.rand(1, 3, 8, 8))
    assert vae.dtype == torch.bfloat16
    assert z_0.dtype == vae.decode(z_0).dtype == torch.float32


@pytest.mark.parametrize(
    ("pixels", "message"),
    [
        (torch.rand(3, 8, 8), r"\(3, 8, 8\), expected \(B, 3, H, W\).*batch axis"),
        (torch.rand(1, 4, 8, 8), "expected \\(B, 3, H, W\\): convert images to RGB"),
        (torch.rand(1, 3, 9, 8), r"divisible by 2.*resize or crop the images, e.g. to 8 x 8"),
        (torch.zeros(1, 3, 8, 8, dtype=torch.uint8), "divide by 255"),
    ],
)
def test_wrong_pixels(vae: VAE, pixels: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        vae.encode(pixels)


def test_wrong_latents(vae: VAE) -> None:
    with pytest.raises(
        ValueError, match=r"\(1, 16, 4, 4\), expected \(B, 4, H, W\).*with the VAE of"
    ):
        vae.decode(torch.randn(1, 16, 4, 4))


def test_wrong_folders(tiny_sd3: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="has no VAE"):
        VAE(str(tmp_path))
    shutil.copytree(tiny_sd3 / "vae", tmp_path / "vae")
    (tmp_path / "vae" / "config.json").write_text(json.dumps({"_class_name": "AutoencoderTiny"}))
    with pytest.raises(ValueError, match="AutoencoderTiny, expected an AutoencoderKL"):
        VAE(str(tmp_path))
    with pytest.raises(ValueError, match="expected one of float32"):
        VAE(str(tiny_sd3), dtype="float64")
    with pytest.raises(ValueError, match="micro_batch"):
        VAE(str(tiny_sd3), micro_batch=0)


def test_latent_scaling_is_that_of_the_configuration(
    vae: VAE, tiny_sd3: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert latent_scaling(str(tiny_sd3)) == (vae.scale, vae.shift) == (1.5, 0.1)
    assert latent_scaling(str(tiny_sd3 / "transformer")) is None
    assert latent_scaling("nobody/nothing") is None
    monkeypatch.setattr("stitchvm.vae.resolve", lambda *_, **__: pytest.fail("asked the hub"))
    assert scaling_of(LatentBackbone()) is None
    assert scaling_of(LatentBackbone(scale=1.5, shift=0.1)) == (1.5, 0.1)


def test_around_an_autoencoder_in_memory(vae: VAE, tiny_sd3: Path) -> None:
    network = AutoencoderKL.from_pretrained(tiny_sd3 / "vae", torch_dtype=torch.bfloat16)
    around = VAE.from_network(network, "mine", micro_batch=1)
    assert around.network is network and around.dtype == torch.bfloat16
    assert (around.id, around.factor, around.latent_channels) == ("mine", 2, 4)
    assert not any(p.requires_grad for p in network.parameters())
    z_0 = torch.randn(2, 4, 4, 4)
    around.network.float()
    torch.testing.assert_close(around.decode(z_0), vae.decode(z_0), rtol=0.05, atol=0.05)
    with pytest.raises(ValueError, match="'mine' has a Identity, expected an AutoencoderKL"):
        VAE.from_network(torch.nn.Identity(), "mine")
