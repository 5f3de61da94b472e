"""Latents on disk: z_0 of every image, computed once, since the VAE costs a third of a distillation step or more.

Layout of a cache folder:

    manifest.json                what the latents are of: VAE, data set, resolution, shard size
    latents-00000.safetensors    `latents` bfloat16 (n, C, h, w) and `index` int64 (n,), for samples 0 ... n − 1
    latents-00001.safetensors    the next n, and so on

Shards are memory-mapped and read row by row, so access is random at no cost in memory. A shard is written under
another name and then renamed: one that is there is whole, and a build that was cut short goes on with those missing. A
cache of another VAE, data set or resolution is refused.

At 512² an SD3 or FLUX latent is 131 kB (90 GB for AVA and HPDv2), at 1024² four times that.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.data import Dataset

from stitchvm.data.base import Sample
from stitchvm.data.datasets import BadImages
from stitchvm.data.loader import Loader
from stitchvm.writing import written

MANIFEST = "manifest.json"


class Encoder(Protocol):
    """What is needed of a VAE; `stitchvm.vae.VAE` has it."""

    id: str
    scale: float
    shift: float

    def encode(self, pixels: Tensor) -> Tensor:
        """Returns scaled latents (B, C, h, w) of pixels (B, 3, H, W) in [0, 1]."""


class ImageData(Protocol):
    """What is needed of an image data set."""

    resolution: int

    @property
    def fingerprint(self) -> str:
        """What tells two data sets, or two orders, apart."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Sample: ...


def build_latent_cache(
    dataset: ImageData,
    vae: Encoder,
    folder: str | Path,
    *,
    batch_size: int = 8,
    num_workers: int = 0,
    shard_size: int = 1024,
    device: str | torch.device = "cpu",
    bad: BadImages | None = None,
    rank: int = 0,
    world_size: int = 1,
) -> Path:
    """Encodes all images of a data set into `folder`, or those that an earlier call left undone.

    Arguments:
        dataset: The images.
        vae: The VAE, already on `device`; its posterior's mean is stored.
        folder: The cache folder; made if it is not there.
        batch_size: Images encoded at once.
        num_workers: Worker processes that read images.
        shard_size: Latents per file.
        device: Where to encode.
        bad: Counts unreadable images.
        rank: With several devices each makes every `world_size`-th shard, the first the manifest; wait for all before
            reading.
        world_size: The number of devices.

    Returns:
        The cache folder.

    Raises:
        ValueError: If the folder holds a cache of something else; the message names the difference.
    """
    folder = Path(folder)
    manifest = describe(dataset, vae, shard_size)
    folder.mkdir(parents=True, exist_ok=True)
    if (folder / MANIFEST).exists():
        check_manifest(folder, manifest)
    elif rank == 0:  # once is enough
        with written(folder / MANIFEST, sync=True) as part:
            part.write_text(json.dumps(manifest, indent=2))
    todo = [
        s
        for s in range(rank, num_shards(manifest), world_size)
        if not shard_path(folder, s).exists()
    ]
    ranges = {s: range(s * shard_size, min((s + 1) * shard_size, len(dataset))) for s in todo}
    batches = [
        list(r[i : i + batch_size]) for r in ranges.values() for i in range(0, len(r), batch_size)
    ]
    latents: Iterator[Tensor] = _encode(
        Loader(dataset, batches, num_workers=num_workers, bad=bad), vae, device
    )
    for shard, samples in ranges.items():
        parts: list[Tensor] = []
        while sum(map(len, parts)) < len(samples):
            parts.append(next(latents))
        tensors = {"latents": torch.cat(parts), "index": torch.tensor(samples)}
        with written(shard_path(folder, shard), sync=True) as part:
            save_file(tensors, part)
    return folder


@torch.no_grad()
def _encode(loader: Loader, vae: Encoder, device: str | torch.device) -> Iterator[Tensor]:
    for batch in loader:
        yield vae.encode(batch["pixels"].to(device)).to("cpu", torch.bfloat16).contiguous()


class LatentDataset(Dataset[Sample]):
    """An image data set whose samples also have `latents`, bfloat16 with shape (C, h, w), from a cache.

    Arguments:
        dataset: The images.
        vae: The VAE that the training uses.
        folder: The cache folder.

    Raises:
        ValueError: If the cache is of something else, or not complete.
    """

    def __init__(self, dataset: ImageData, vae: Encoder, folder: str | Path) -> None:
        self.dataset = dataset
        self.folder = Path(folder)
        if not (self.folder / MANIFEST).exists():
            raise ValueError(
                f"No latent cache in {self.folder}: expected {MANIFEST}; make it with build_latent_cache."
            )
        found = json.loads((self.folder / MANIFEST).read_text())
        self.shard_size = int(found.get("shard_size", 1))
        check_manifest(self.folder, describe(dataset, vae, self.shard_size))
        absent = [s for s in range(num_shards(found)) if not shard_path(self.folder, s).exists()]
        if absent:
            raise ValueError(
                f"The latent cache {self.folder} lacks {len(absent)} of {num_shards(found)} shards, from"
                f" {shard_path(self.folder, absent[0]).name} on: run build_latent_cache again, it goes on there."
            )
        self.resolution = dataset.resolution
        self.fingerprint = dataset.fingerprint
        self.missing = getattr(dataset, "missing", ())
        self._open: dict[int, Any] = {}

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Sample:
        sample = self.dataset[index]
        shard, row = divmod(
            int(sample["index"]), self.shard_size
        )  # a replacement brings its own latent
        if shard not in self._open:
            self._open[shard] = safe_open(shard_path(self.folder, shard), framework="pt")
        return {**sample, "latents": self._open[shard].get_slice("latents")[row : row + 1][0]}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": {}}  # files are opened anew in each worker


def describe(dataset: ImageData, vae: Encoder, shard_size: int) -> dict[str, Any]:
    """Returns the manifest of a cache of `dataset` under `vae`."""
    return {
        "vae": vae.id,
        "vae_sha256": weights_sha256(vae),
        "scale": float(vae.scale),
        "shift": float(vae.shift),
        "resolution": dataset.resolution,
        "images": len(dataset),
        "images_sha256": dataset.fingerprint,
        "shard_size": shard_size,
        "dtype": "bfloat16",
    }


def check_manifest(folder: Path, wanted: dict[str, Any]) -> None:
    """Raises ValueError if the manifest in `folder` differs from `wanted` in more than the VAE's path."""
    found = json.loads((folder / MANIFEST).read_text())
    # The same weights may be named by a hub id here and a folder there: the hash decides.
    different = [key for key in wanted if key != "vae" and found.get(key) != wanted[key]]
    if different:
        lines = "; ".join(
            f"{key}: {found.get(key)!r} there, {wanted[key]!r} here" for key in different
        )
        raise ValueError(
            f"The latent cache {folder} (of {found.get('vae')!r}) does not fit: {lines}."
            " Use another folder, or delete this one to make it anew."
        )


def weights_sha256(vae: object) -> str | None:
    """Returns the SHA-256 of a module's weights in bfloat16, the same when loaded in float32; None for no module."""
    if not isinstance(vae, nn.Module):
        return None
    digest = hashlib.sha256()
    for name, value in sorted(vae.state_dict().items()):
        digest.update(name.encode())
        digest.update(
            value.detach()
            .to("cpu", torch.bfloat16)
            .contiguous()
            .view(torch.int16)
            .numpy()
            .tobytes()
        )
    return digest.hexdigest()


def num_shards(manifest: dict[str, Any]) -> int:
    """Returns the number of shards of a complete cache."""
    return -(-int(manifest["images"]) // int(manifest["shard_size"]))


def shard_path(folder: Path, shard: int) -> Path:
    """Returns the path of shard number `shard`."""
    return folder / f"latents-{shard:05d}.safetensors"
