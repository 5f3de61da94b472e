"""Whole runs of the modules on a pretended GPU, against the same runs on the CPU."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from torch import Tensor

from stitchvm.adapters.full import PolicyWeights
from stitchvm.backbones.sd3 import SD3Backbone
from stitchvm.data.images import ImageFolder
from stitchvm.data.prompts import Prompts
from stitchvm.data.samples import SampleFolder
from stitchvm.modules.alignment import Alignment
from stitchvm.modules.distillation import StitchDistillation
from stitchvm.modules.draft import DRaFT
from stitchvm.modules.evaluation import ValueEvaluation
from stitchvm.modules.grpo import FlowGRPO
from stitchvm.modules.held_out import Evaluation
from stitchvm.modules.nft import DiffusionNFT
from stitchvm.modules.sample_evaluation import SampleEvaluation
from stitchvm.rewards.weighted import WeightedReward
from stitchvm.samplers.fk import FKSteering
from stitchvm.samplers.plain import PlainSampler
from stitchvm.vae import VAE
from stitchvm.values.monte_carlo import MonteCarloFactory
from stitchvm.values.stitched import StitchedFactory
from stitchvm.values.tweedie import TweedieFactory
from tests.modules import alignment_runs, sampling_runs
from tests.modules.evaluation_runs import Data
from tests.modules.runs import write_images
from tests.pretend_cuda import pretend_cuda

PROMPTS = ["a red circle", "a blue square"]


def both(work: Callable[[str], Any]) -> tuple[Any, Any]:
    """Returns what a piece of work gives on the CPU and on the pretended GPU."""
    torch.manual_seed(0)
    here = work("cpu")
    torch.manual_seed(0)
    with pretend_cuda():
        return here, work("cuda")


def weights(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: x.detach().cpu() for key, x in tensors.items()}


METHODS = {
    DRaFT: {"backprop_steps": 1},
    DiffusionNFT: {"group_size": 2, "fraction": 0.5},
    FlowGRPO: {"group_size": 2, "window": 1, "bounds": [0, 1], "normalise": "group"},
}


def alignment(
    method: type[Alignment], sd3: Path, reward: Any, root: Path, ckpt: Path | None = None
) -> dict[str, Tensor]:
    """Makes an update, from roll-out to optimiser step, or from a checkpoint a second one; returns the weights."""
    full = method is FlowGRPO  # fine-tuning of all weights, by a sum of rewards
    sampler = PlainSampler(num_steps=1, guidance_scale=1.0)
    made = method(
        generator=alignment_runs.generator(sd3),
        reward=partial(WeightedReward, {"a": reward, "b": reward}, {"b": 0.5}) if full else reward,
        policy=PolicyWeights if full else alignment_runs.policy(),
        evaluation=Evaluation({"clip": reward} if ckpt else {}, sampler=sampler, pictures=1),
        **({"num_steps": 2, "lr": 1e-2} | METHODS[method]),
    )
    data = Prompts(prompts=PROMPTS, prompts_per_update=2)
    options: dict[str, Any] = alignment_runs.save_every_step(root) | {"max_steps": 1}
    if ckpt:
        options = {"max_steps": 2, "limit_val_batches": 1, "ckpt_path": str(ckpt)}
    alignment_runs.fit(made, root, data=data, **options)
    assert made.sigmas.device.type == "cpu"  # they are read number by number
    assert any((root / ("full" if full else "lora")).iterdir())
    assert {x.device.type for x in made.policy.state().values()} == {"cpu"}  # as checkpoints are
    return weights(made.policy.parameters())


def same(here: dict[str, Tensor], there: dict[str, Tensor], atol: float = 1e-4) -> None:
    assert here.keys() == there.keys()
    for key, value in here.items():
        torch.testing.assert_close(there[key], value, rtol=1e-2, atol=atol)


@pytest.mark.parametrize("method", METHODS)
def test_alignment(method: type[Alignment], tiny_sd3: Path, tiny_clip: Path, tmp_path: Path):
    """Lightning makes the GPU the default device while networks are built, where a CPU's generator draws nothing."""
    reward = alignment_runs.reward(tiny_clip)
    same(*both(lambda device: alignment(method, tiny_sd3, reward, tmp_path / device)))


@pytest.mark.slow
def test_going_on_from_a_checkpoint(tiny_sd3: Path, tiny_clip: Path, tmp_path: Path):
    """Weights, copies and the optimiser's state come back to the device; held-out prompts are sampled and judged."""
    reward = alignment_runs.reward(tiny_clip)

    def work(device: str) -> dict[str, Tensor]:
        root = tmp_path / device
        alignment(DiffusionNFT, tiny_sd3, reward, root)
        return alignment(DiffusionNFT, tiny_sd3, reward, root, next(root.glob("*.ckpt")))

    same(*both(work))


def run(module: Any, data: Any, root: Path, what: str = "fit", **options: Any) -> Trainer:
    """Runs a module in this process and returns the Trainer."""
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False}
    quiet |= {"inference_mode": False}  # in it PyTorch does not let a tensor pretend
    trainer = Trainer(
        accelerator="cpu", devices=1, default_root_dir=str(root), **(quiet | options)
    )
    getattr(trainer, what)(module, datamodule=data)
    return trainer


def test_distillation(tiny_sd3: Path, tiny_clip: Path, tmp_path: Path):
    """Stage 1, some steps of stage 2 from the closed form, validation, and the value model that is left."""
    images = write_images(tmp_path / "images", n=12)

    def work(device: str) -> dict[str, Tensor]:
        module = StitchDistillation(
            backbone=partial(SD3Backbone, str(tiny_sd3), dtype="float32", null_tokens=4),
            reward=alignment_runs.reward(tiny_clip),
            vae=partial(VAE, str(tiny_sd3)),
            noise_levels=2,
            lr=1e-3,
            search_js=[1, 2],
            num_probes=4,
            num_held_out=2,
            num_end_probes=1,
        )
        root = tmp_path / device
        data = ImageFolder(str(images), resolution=16, batch_size=4, num_workers=0, val_size=6)
        trainer = run(module, data, root, max_steps=1, limit_val_batches=1)
        assert trainer.strategy.root_device.type == device
        found = json.loads((root / "search.json").read_text())
        assert len(found["records"]) == 10
        assert (root / "value_model" / "model.safetensors").is_file()
        return weights(module.value_model.trainable()) | {
            "loss": torch.tensor([record["feature_loss"] for record in found["records"]])
        }

    same(*both(work), atol=1e-3)


def test_evaluation(tiny_sd3: Path, tiny_clip: Path, tmp_path: Path):
    """Estimators that ask a generator, beside clean images and the truth of roll-outs."""

    def work(device: str) -> list[dict[str, Any]]:
        module = ValueEvaluation(
            {"tweedie": TweedieFactory(), "monte_carlo": MonteCarloFactory(1, 1)},
            reward=alignment_runs.reward(tiny_clip),
            generator=alignment_runs.generator(tiny_sd3),
            sigmas=[0.25, 0.75],
            truth_images=3,
            truth_rollouts=2,
            truth_steps=1,
            plot=False,
        )
        data = Data("preference", n=3, batch_size=3)
        trainer = run(module, data, tmp_path / device, "test")
        assert trainer.strategy.root_device.type == device
        return module.records

    here, there = both(work)
    assert len(here) == len(there) > 8
    for one, two in zip(here, there, strict=True):
        assert two["value"] == pytest.approx(one["value"], abs=1e-3, nan_ok=True), one["metric"]


def test_sampling_and_judging(tiny_sd3: Path, tiny_clip: Path, tmp_path: Path):
    """FK steering by a value on the generator's own blocks, judged on the way; then the folder by itself."""
    value = sampling_runs.value_model(tiny_sd3, tiny_clip, tmp_path / "value")
    clip = sampling_runs.reward(tiny_clip)

    def work(device: str) -> dict[str, float]:
        root = tmp_path / device
        sampler = FKSteering(num_steps=3, particles=2, proposals=2, resample_every=1)
        sampling_runs.predict(
            root,
            sampler=sampler,
            prompts=PROMPTS,
            generator=sampling_runs.generator(tiny_sd3),
            value=StitchedFactory(str(value), share_generator=True),
            reward=clip,
            rewards={"clip": clip},
        )
        module = SampleEvaluation({"clip": clip})
        run(module, SampleFolder(str(root), num_workers=0), root / "test", "test")
        return {r["metric"]: r["value"] for r in module.records}

    here, there = both(work)
    sampling_runs.same(tmp_path / "cpu", tmp_path / "cuda", exact=False)
    assert there == pytest.approx(here, abs=1e-3)
