"""The embedded world as data: distillation images, and the three benchmarks, drawn when they are asked for.

Image number n of a set is fixed by (seed, split, n) and drawn in a fraction of a millisecond, so nothing is stored. The
splits are those of the scene grammar: distillation draws from "train", its validation from "tune", benchmarks from
"test", and no scene key is in two of them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, overload

import numpy as np
import torch
from torch.utils.data import Dataset

from stitchvm.data.base import Sample
from stitchvm.data.benchmark import BenchmarkModule
from stitchvm.data.module import DataModule
from stitchvm.data.world_generated import generated_images
from stitchvm.world.render import render
from stitchvm.world.scenes import SIZE, SPLITS, Scene, keys, sample_scenes
from stitchvm.world.scores import aesthetic_score, preference_groups

GROUP_SIZE = 4


class SceneStream(Sequence[Scene]):
    """Random scenes of a split, scene n fixed by (seed, split, n) whatever the length."""

    def __init__(self, split: str, length: int, seed: int) -> None:
        keys(split)  # raises ValueError for an unknown split
        self.split = split
        self.length = length
        self.seed = seed

    def __len__(self) -> int:
        return self.length

    @overload
    def __getitem__(self, index: int) -> Scene: ...
    @overload
    def __getitem__(self, index: slice) -> list[Scene]: ...
    def __getitem__(self, index: int | slice) -> Scene | list[Scene]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(self.length))]
        if not 0 <= index < self.length:
            raise IndexError(f"scene {index} of {self.length}")
        return sample_scenes(self.split, 1, [self.seed, SPLITS.index(self.split), index])[0]


class SceneDataset(Dataset[Sample]):
    """Pictures of scenes.

    Arguments:
        scenes: The scenes.
        columns: Further keys of a sample, one value for each scene.
        labelled: Whether samples have `prompt` (the scene's caption) and `score` (its true aesthetics).
    """

    def __init__(
        self,
        scenes: Sequence[Scene],
        columns: Mapping[str, Sequence[Any]] | None = None,
        labelled: bool = False,
    ) -> None:
        if not scenes:
            raise ValueError("The world was asked for 0 images; ask for at least 1.")
        self.scenes = scenes
        self.columns = dict(columns or {})
        self.labelled = labelled
        self.resolution = SIZE

    @property
    def fingerprint(self) -> str:
        """The SHA-256 of the number of pictures and of some of them, for caches."""
        digest = hashlib.sha256(str(len(self)).encode())
        places = np.linspace(0, len(self) - 1, 16).astype(int).tolist()
        for sample in self.__getitems__(places):
            digest.update(sample["pixels"].numpy().tobytes())
        return digest.hexdigest()

    def __len__(self) -> int:
        return len(self.scenes)

    def __getitem__(self, index: int) -> Sample:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[Sample]:
        """Returns several samples, drawn together (what a DataLoader calls)."""
        scenes = [self.scenes[i] for i in indices]
        drawn = np.rint(np.asarray(render(scenes)) * 255).astype(np.uint8)
        samples: list[Sample] = []
        for i, scene, pixels in zip(indices, scenes, torch.from_numpy(drawn), strict=True):
            sample: Sample = {"index": i, "pixels": pixels}
            if self.labelled:
                sample |= {"prompt": scene.caption, "score": float(aesthetic_score(scene))}
            samples.append(sample | {key: values[i] for key, values in self.columns.items()})
        return samples


class MixedDataset(Dataset[Sample]):
    """Drawn pictures, with a share of generated images among them.

    Arguments:
        drawn: The drawn pictures.
        generated: The generated images, uint8 with shape (N, 3, H, W).
        share: The share of samples that are generated, spread evenly; they are gone through in order, again and again.
    """

    def __init__(self, drawn: SceneDataset, generated: np.ndarray, share: float) -> None:
        self.drawn, self.generated, self.share = drawn, generated, share
        self.resolution = drawn.resolution

    @property
    def fingerprint(self) -> str:
        """The SHA-256 of the drawn pictures' fingerprint, the share and the generated images."""
        digest = hashlib.sha256(f"{self.drawn.fingerprint} {self.share}".encode())
        digest.update(self.generated.tobytes())
        return digest.hexdigest()

    def __len__(self) -> int:
        return len(self.drawn)

    def __getitem__(self, index: int) -> Sample:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[Sample]:
        """Returns several samples, the drawn ones drawn together."""
        taken = {i: int((i + 1) * self.share) - 1 for i in indices if self._is_generated(i)}
        drawn = [i for i in indices if i not in taken]
        samples = {s["index"]: s for s in self.drawn.__getitems__(drawn)} if drawn else {}
        for i, n in taken.items():
            pixels = torch.from_numpy(self.generated[n % len(self.generated)])
            samples[i] = {"index": i, "pixels": pixels}
        return [samples[i] for i in indices]

    def _is_generated(self, index: int) -> bool:
        return int((index + 1) * self.share) > int(index * self.share)


class World(DataModule):
    """The world's images for distillation, without labels; validation images have `prompt` and `score`.

    Arguments:
        train_size: The number of training images.
        val_size: The number of validation images.
        generated: How many images of the world's generator are among the training images (the part that HPDv2 plays);
            they are made once, about 0.2 s each on a CPU, and kept (`stitchvm.data.world_generated`).
        generated_share: The share of training samples that are such images.
        batch_size: Samples per batch and device.
        num_workers: Worker processes per loader; 0 is quickest on few cores, as drawing is cheap.
        seed: Fixes the images and their order.
    """

    def __init__(
        self,
        train_size: int = 20000,
        val_size: int = 256,
        generated: int = 0,
        generated_share: float = 0.5,
        batch_size: int = 32,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__(
            resolution=SIZE, batch_size=batch_size, num_workers=num_workers, seed=seed
        )
        self.train_size = train_size
        self.val_size = val_size
        self.generated, self.generated_share = generated, generated_share

    def fit_data(self) -> tuple[SceneDataset | MixedDataset, SceneDataset]:
        if min(self.train_size, self.val_size) < 1:
            raise ValueError(
                f"train_size={self.train_size} and val_size={self.val_size} must be at least 1."
            )
        if self.generated < 0 or not 0 < self.generated_share <= 1:
            raise ValueError(
                f"generated={self.generated} and generated_share={self.generated_share}: expected 0 images or more and "
                "a share in (0, 1]."
            )
        drawn = SceneDataset(SceneStream("train", self.train_size, self.seed))
        val = SceneDataset(SceneStream("tune", self.val_size, self.seed), labelled=True)
        if not self.generated:
            return drawn, val
        # the seed of the images is not that of the run: every run of the world shares them
        images = generated_images(self.generated)
        return MixedDataset(drawn, images, self.generated_share), val


class WorldBenchmark(BenchmarkModule):
    """A benchmark of the world: a subclass says which.

    Arguments:
        num_images: The number of images (of preference: rounded down to whole groups).
        split: The split of the scene grammar: "test", or "tune" for choices made while developing.
        seed: Fixes the images.
        batch_size: Samples per batch and device.
        num_workers: Worker processes per loader.
    """

    def __init__(
        self,
        num_images: int = 512,
        split: str = "test",
        seed: int = 0,
        batch_size: int = 64,
        num_workers: int = 0,
    ) -> None:
        super().__init__(resolution=SIZE, batch_size=batch_size, num_workers=num_workers)
        self.num_images = num_images
        self.split = split
        self.seed = seed


class WorldRetrieval(WorldBenchmark):
    """Images of distinct scenes; a pair has two captions ("a above b" and "b below a")."""

    task = "retrieval"

    def test_data(self) -> dict[str, SceneDataset]:
        scenes = sample_scenes(self.split, self.num_images, [self.seed, 3], distinct=True)
        return {"world": SceneDataset(scenes, {"captions": [wordings(scene) for scene in scenes]})}


class WorldPreference(WorldBenchmark):
    """Groups of four images for a prompt, ranked by the true preference."""

    task = "preference"

    def test_data(self) -> dict[str, SceneDataset]:
        groups = preference_groups(
            self.split, self.num_images // GROUP_SIZE, [self.seed, 4], GROUP_SIZE
        )
        columns: dict[str, list[Any]] = {
            "prompt": [group.prompt for group in groups for _ in group.scenes],
            "group": [g for g, group in enumerate(groups) for _ in group.scenes],
            "rank": [float(rank) for group in groups for rank in group.ranks],
        }
        scenes = [scene for group in groups for scene in group.scenes]
        return {"world": SceneDataset(scenes, columns)}


class WorldAesthetic(WorldBenchmark):
    """Images with the true aesthetic score, and their caption as `prompt`."""

    task = "aesthetic"

    def test_data(self) -> dict[str, SceneDataset]:
        stream = SceneStream(self.split, self.num_images, self.seed)
        return {"world": SceneDataset(stream, labelled=True)}


def wordings(scene: Scene) -> list[str]:
    """Returns the scene's caption and, for a pair, the same said from the other object."""
    if scene.relation is None:
        return [scene.caption]
    other = replace(scene, things=scene.things[::-1], relation=(scene.relation + 2) % 4)
    return [scene.caption, other.caption]
