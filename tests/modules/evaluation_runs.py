"""Small data of every task, and runs of `ValueEvaluation` on them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningDataModule, Trainer
from torch import Tensor

from stitchvm.data.base import collate
from stitchvm.modules.evaluation import ValueEvaluation
from stitchvm.values.base import Value
from stitchvm.values.monte_carlo import MonteCarloFactory
from stitchvm.values.parts import Parts, ValueFactory
from stitchvm.values.tweedie import TweedieFactory
from tests.values.fakes import (
    ClosedFormReward,
    FakeReward,
    IdentityVAE,
    WorldGenerator,
    known,
    mixture,
)


class Data(LightningDataModule):
    """Samples in memory; each image is its own latent."""

    def __init__(self, task: str, n: int = 12, batch_size: int = 5, benchmarks: int = 0) -> None:
        super().__init__()
        self.task, self.batch_size = task, batch_size
        if benchmarks:
            self.benchmarks = [f"set{k}" for k in range(benchmarks)]
        generator = torch.Generator().manual_seed(5)
        pixels = torch.randn(n, 3, 1, 1, generator=generator).expand(n, 3, 8, 8)
        reward = FakeReward(uses_text=task != "aesthetic")
        image = reward.embed(pixels).image.detach()
        lines = [",".join(f"{x:.3f}" for x in row) for row in image.tolist()]
        human = reward.score(image, None)
        self.samples: list[dict[str, Any]] = [{"index": i, "pixels": pixels[i]} for i in range(n)]
        for i, sample in enumerate(self.samples):
            if task == "retrieval":
                sample["captions"] = [lines[i]] * (i % 3 + 1)
            elif task == "preference":
                prompt = i - i % 3
                rank = float((image[i] - image[prompt]).norm())
                sample |= {"prompt": lines[prompt], "group": i // 3, "rank": rank}
            else:
                sample["score"] = float(human[i])

    def test_dataloader(self) -> Any:
        def loader() -> Any:
            return torch.utils.data.DataLoader(
                self.samples, batch_size=self.batch_size, collate_fn=collate_plain
            )

        return [loader() for _ in getattr(self, "benchmarks", [])] or loader()


def collate_plain(samples: list[dict[str, Any]]) -> dict[str, Any]:
    batch = collate(samples)
    batch.pop("bad")
    return batch


class Noisy(Value):
    """The clean reward of the noisy latent itself."""

    def embed(self, z_t: Tensor, t: Tensor, **kwargs: Any) -> Tensor:
        return self.reward.embed(z_t).image


class NoisyFactory(ValueFactory):
    def __init__(self, break_at: float = 2.0) -> None:
        self.break_at = break_at

    def __call__(self, parts: Parts) -> Value:
        value = Noisy(parts.reward)
        if self.break_at < 1:
            plain = value.embed
            value.embed = lambda z_t, t, **kw: plain(z_t, t) / (t[0] != self.break_at)
        return value


def run(
    folder: Path, data: LightningDataModule, estimators: Any = None, **options: Any
) -> ValueEvaluation:
    uses_text = getattr(data, "task", None) != "aesthetic"
    options = {"reward": lambda: FakeReward(uses_text=uses_text), "vae": IdentityVAE} | options
    module = ValueEvaluation(
        {"stitched": NoisyFactory()} if estimators is None else estimators, **options
    )
    trainer = Trainer(
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=str(folder),
        enable_checkpointing=False,
    )
    trainer.test(module, data, verbose=False)
    return module


def same(a: list[dict[str, Any]], b: list[dict[str, Any]]) -> None:
    assert len(a) == len(b) > 0
    for one, other in zip(a, b, strict=True):
        assert one.keys() == other.keys()
        for key in one:
            if isinstance(one[key], float):
                close = pytest.approx(other[key], rel=1e-5, abs=1e-6, nan_ok=True)
                assert one[key] == close, (one, other)
            else:
                assert one[key] == other[key], (one, other)


class WorldData(LightningDataModule):
    """Draws of a closed-form world, with their reward as the human score."""

    task = "aesthetic"

    def __init__(self, n: int = 60, batch_size: int = 20) -> None:
        super().__init__()
        z_0 = mixture().sample(n, generator=torch.Generator().manual_seed(0)).float()
        scores = known()(z_0).tolist()
        self.samples = [
            {"index": i, "pixels": z_0[i], "score": float(scores[i])} for i in range(n)
        ]
        self.batch_size = batch_size

    def test_dataloader(self) -> Any:
        return torch.utils.data.DataLoader(
            self.samples, batch_size=self.batch_size, collate_fn=collate_plain
        )


def world_run(folder: Path, data: LightningDataModule, **options: Any) -> ValueEvaluation:
    return run(
        folder,
        data,
        {"tweedie": TweedieFactory(), "monte_carlo": MonteCarloFactory(rollouts=8, steps=6)},
        reward=lambda: ClosedFormReward(known()),
        generator=lambda: WorldGenerator(mixture()),
        vae=None,
        plot=False,
        **options,
    )


def value(
    records: list[dict[str, Any]], metric: str, sigma: float | None, name: str = "stitched"
) -> float:
    found = [
        r["value"]
        for r in records
        if (r["metric"], r["sigma"], r["estimator"])
        == (metric, sigma, "clean" if sigma is None else name)
    ]
    assert len(found) == 1, (metric, sigma, found)
    return found[0]
