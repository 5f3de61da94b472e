"""The latent cache: exact, resumable, and refused where it does not fit."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from stitchvm.data.images import ImageFolder
from stitchvm.data.latents import LatentDataset, build_latent_cache, shard_path
from tests.data.files import write_folder


class ToyVAE(nn.Module):
    """Mean-pools pixels by 2 and mixes channels; counts the images it encodes."""

    def __init__(self, seed: int = 0, fail_after: int | None = None) -> None:
        super().__init__()
        self.id, self.scale, self.shift = "toy", 1.5, 0.25
        self.mix = nn.Conv2d(3, 4, 2, 2)
        generator = torch.Generator().manual_seed(seed)
        for parameter in self.parameters():
            parameter.data.normal_(generator=generator)
        self.fail_after = fail_after
        self.encoded = 0

    def encode(self, pixels: Tensor) -> Tensor:
        self.encoded += len(pixels)
        if self.fail_after is not None and self.encoded > self.fail_after:
            raise KeyboardInterrupt
        return (self.mix(pixels) - self.shift) * self.scale


@pytest.fixture
def data(tmp_path: Path) -> ImageFolder:
    write_folder(tmp_path / "images", 24)
    data = ImageFolder(
        str(tmp_path / "images"), val_size=2, resolution=8, batch_size=4, num_workers=0
    )
    data.setup("fit")
    return data


@pytest.mark.parametrize("num_workers", [0, 2])
def test_batches_have_the_latents_of_their_pixels(
    data: ImageFolder, tmp_path: Path, num_workers: int
) -> None:
    data.num_workers = num_workers
    vae = ToyVAE()
    data.cache_latents(vae, str(tmp_path / "cache"))
    assert vae.encoded == 22
    batches = list(data.train_dataloader())
    assert len(batches) == 5
    for batch in batches:
        with torch.no_grad():
            expected = vae.encode(batch["pixels"]).to(torch.bfloat16)
        assert batch["latents"].dtype == torch.bfloat16 and batch["latents"].shape == (4, 4, 4, 4)
        assert torch.equal(batch["latents"], expected)
    assert "latents" not in next(iter(data.val_dataloader()))


def test_a_build_that_was_cut_short_goes_on(data: ImageFolder, tmp_path: Path) -> None:
    folder = tmp_path / "cache"
    with pytest.raises(KeyboardInterrupt):
        build_latent_cache(
            data.train_data, ToyVAE(fail_after=13), folder, batch_size=4, shard_size=6
        )  # type: ignore[arg-type]
    assert sorted(path.name for path in folder.glob("latents-*")) == [
        f"latents-0000{i}.safetensors" for i in (0, 1)
    ]
    with pytest.raises(
        ValueError, match=r"lacks 2 of 4 shards, from latents-00002\.safetensors on"
    ):
        LatentDataset(data.train_data, ToyVAE(), folder)  # type: ignore[arg-type]
    kept = shard_path(folder, 0).stat().st_mtime_ns
    vae = ToyVAE()
    build_latent_cache(data.train_data, vae, folder, batch_size=4, shard_size=6)  # type: ignore[arg-type]
    assert vae.encoded == 22 - 12 and shard_path(folder, 0).stat().st_mtime_ns == kept
    dataset = LatentDataset(data.train_data, vae, folder)  # type: ignore[arg-type]
    for i in (0, 5, 6, 21):
        with torch.no_grad():
            expected = vae.encode(dataset[i]["pixels"][None] / 255)[0].to(torch.bfloat16)
        assert torch.equal(dataset[i]["latents"], expected)
    assert torch.equal(pickle.loads(pickle.dumps(dataset))[7]["latents"], dataset[7]["latents"])
    assert not list(folder.glob("*.part"))


def test_devices_make_a_part_each(data: ImageFolder, tmp_path: Path) -> None:
    vaes = [ToyVAE(), ToyVAE()]
    for rank in (1, 0):
        build_latent_cache(
            data.train_data, vaes[rank], tmp_path / "c", shard_size=6, rank=rank, world_size=2
        )  # type: ignore[arg-type]
        assert (tmp_path / "c" / "manifest.json").exists() == (rank == 0)  # one file, one writer
    assert [vae.encoded for vae in vaes] == [12, 10]
    assert len(LatentDataset(data.train_data, vaes[0], tmp_path / "c")) == 22  # type: ignore[arg-type]


def test_a_cache_of_something_else_is_refused(data: ImageFolder, tmp_path: Path) -> None:
    folder = tmp_path / "cache"
    build_latent_cache(data.train_data, ToyVAE(), folder)  # type: ignore[arg-type]
    renamed = ToyVAE()
    renamed.id = "elsewhere/toy"  # the same weights from another place fit
    assert len(LatentDataset(data.train_data, renamed, folder)) == 22  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"does not fit: vae_sha256: '.*' there, '.*' here"):
        LatentDataset(data.train_data, ToyVAE(seed=1), folder)  # type: ignore[arg-type]
    scaled = ToyVAE()
    scaled.scale = 2.0
    with pytest.raises(
        ValueError, match=r"does not fit: scale: 1\.5 there, 2\.0 here\. Use another folder"
    ):
        build_latent_cache(data.train_data, scaled, folder)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"images: 22 there, 2 here; images_sha256"):
        build_latent_cache(data.val_data, ToyVAE(), folder)  # type: ignore[arg-type]
    larger = ImageFolder(data.root, val_size=2, resolution=16, num_workers=0)
    larger.setup("fit")
    with pytest.raises(ValueError, match=r"resolution: 8 there, 16 here"):
        larger.cache_latents(ToyVAE(), str(folder))
    with pytest.raises(ValueError, match=r"No latent cache in .*absent"):
        LatentDataset(data.train_data, ToyVAE(), tmp_path / "absent")  # type: ignore[arg-type]


def test_the_manifest_says_what_it_is_of(data: ImageFolder, tmp_path: Path) -> None:
    build_latent_cache(data.train_data, ToyVAE(), tmp_path / "cache", shard_size=6)  # type: ignore[arg-type]
    manifest = json.loads((tmp_path / "cache" / "manifest.json").read_text())
    assert manifest["vae"] == "toy" and manifest["images"] == 22 and manifest["resolution"] == 8
    assert (manifest["scale"], manifest["shift"]) == (1.5, 0.25) and len(
        manifest["vae_sha256"]
    ) == 64
