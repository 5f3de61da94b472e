"""`stitchvm test` on small data of every task: numbers, independence of batches, files, messages, two processes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningDataModule, Trainer
from torch import Tensor
from torchmetrics.functional import spearman_corrcoef

from stitchvm.data.base import collate
from stitchvm.modules.evaluation import ValueEvaluation
from stitchvm.modules.tasks import TASKS
from stitchvm.path import FlowPath
from stitchvm.randomness import keyed_generator, keyed_normal
from stitchvm.rewards.weighted import WeightedReward
from stitchvm.values.base import Value
from stitchvm.values.monte_carlo import MonteCarloFactory
from stitchvm.values.parts import Parts, ValueFactory
from stitchvm.values.terminal import TerminalValue
from stitchvm.values.tweedie import TweedieFactory
from tests.values.fakes import (
    BentReward,
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


@pytest.mark.parametrize(
    "task, metric",
    [
        ("retrieval", "retrieval/image_to_text_r1"),
        ("preference", "preference/hpdv2"),
        ("aesthetic", "aesthetic/srcc"),
    ],
)
def test_a_task_is_measured_written_and_drawn(
    task: str, metric: str, tmp_path: Path, capsys
) -> None:
    module = run(tmp_path, Data(task), seed=7)
    content = json.loads((tmp_path / "metrics.json").read_text())
    assert content["records"] == module.records
    assert content["seed"] == 7 and content["task"] == task
    assert content["weights"]["reward"]["id"] == "fake reward"
    assert len(content["weights"]["reward"]["fingerprint"]) == 16
    assert content["ms_per_image"]["stitched"] > 0
    assert (tmp_path / "retention.png").stat().st_size > 5000
    assert value(module.records, metric, None) > 0.8
    assert value(module.records, metric, 0.1) > value(module.records, metric, 0.9)
    if task == "aesthetic":
        # here the human score is the clean reward
        assert value(module.records, "clean_agreement/srcc", 0.1) == value(
            module.records, metric, 0.1
        )
    counts = {r["n"] for r in module.records if r["metric"] == metric}
    assert counts == {12 if task != "preference" else 4}
    printed = capsys.readouterr().out
    assert "σ = 0.75" in printed and metric in printed and "metrics.json" in printed


def test_the_clean_score_and_the_noise_are_what_they_should_be(tmp_path: Path) -> None:
    data = Data("aesthetic")
    module = run(tmp_path, data, sigmas=[0.5], seed=3)
    reward = FakeReward(uses_text=False)
    pixels = torch.stack([s["pixels"] for s in data.samples])
    target = torch.tensor([s["score"] for s in data.samples])
    clean = spearman_corrcoef(reward(pixels), target)
    assert value(module.records, "aesthetic/srcc", None) == pytest.approx(float(clean), abs=1e-6)
    eps = keyed_normal([(3, "noise", i, "0.5") for i in range(12)], (3, 8, 8))
    noisy = spearman_corrcoef(reward(0.5 * pixels + 0.5 * eps), target)
    assert value(module.records, "aesthetic/srcc", 0.5) == pytest.approx(float(noisy), abs=1e-6)


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


def test_truth_ranks_monte_carlo_above_tweedie(tmp_path: Path) -> None:
    options = {"sigmas": [0.25, 0.75], "truth_images": 30, "truth_rollouts": 64, "truth_steps": 10}
    module = world_run(tmp_path / "a", WorldData(), **options)
    records = module.records
    assert {r["n"] for r in records if r["metric"] == "truth/r2"} == {30}
    assert value(records, "aesthetic/srcc", None) == pytest.approx(1)

    # the same errors from the closed form, for the images that were chosen

    world = mixture()
    z_0 = torch.stack([s["pixels"] for s in WorldData().samples])[::2]
    eps = keyed_normal([(0, "noise", i, "0.75") for i in range(0, 60, 2)], (2, 1, 1))
    z_t = FlowPath.interpolate(z_0, eps, 0.75)
    exact, tweedie = world.value(z_t, 0.75, known()), world.tweedie_value(z_t, 0.75, known())
    rmse = float((tweedie - exact).square().mean().sqrt())
    assert value(records, "truth/rmse", 0.75, "tweedie") == pytest.approx(rmse, rel=0.1)
    assert value(records, "truth/r2", 0.75, "monte_carlo") > value(
        records, "truth/r2", 0.75, "tweedie"
    )
    noise = float((world.value_variance(z_t, 0.75, known()).mean() / 64).sqrt())
    assert value(records, "truth/truth_noise", 0.75, "tweedie") == pytest.approx(noise, rel=0.3)

    # nothing depends on the batch size: neither noise, nor roll-outs, nor the choice of images
    again = world_run(tmp_path / "b", WorldData(batch_size=7), **options)
    same(records, again.records)
    other = world_run(tmp_path / "c", WorldData(), seed=1, **options)
    assert value(other.records, "truth/rmse", 0.75, "tweedie") != value(
        records, "truth/rmse", 0.75, "tweedie"
    )


def test_roll_outs_are_scored_one_by_one_where_no_average_can_be(tmp_path: Path) -> None:
    estimators = {
        "mean": MonteCarloFactory(rollouts=4, steps=3),
        "soft": MonteCarloFactory(rollouts=4, steps=3, reduction="log_mean_exp"),
    }
    options = {"sigmas": [0.6], "truth_images": 30, "truth_rollouts": 4, "truth_steps": 3}
    module = run(
        tmp_path,
        WorldData(),
        estimators,
        reward=lambda: BentReward(known()),
        generator=lambda: WorldGenerator(mixture()),
        vae=None,
        plot=False,
        **options,
    )
    z_0 = torch.stack([s["pixels"] for s in WorldData().samples])
    eps = keyed_normal([(0, "noise", i, "0.6") for i in range(60)], (2, 1, 1))
    z_t, t = FlowPath.interpolate(z_0, eps, 0.6), torch.full((60,), 0.6)
    target = torch.tensor([s["score"] for s in WorldData().samples])
    for name, estimator in module.values.items():
        streams = [keyed_generator(0, name, i, "0.6") for i in range(60)]
        expected = spearman_corrcoef(estimator.bind(generator=streams)(z_t, t), target)
        found = value(module.records, "aesthetic/srcc", 0.6, name)
        assert found == pytest.approx(float(expected), abs=1e-4)


def test_several_benchmarks_are_kept_apart(tmp_path: Path, capsys) -> None:
    module = run(tmp_path, Data("retrieval", benchmarks=2), sigmas=[0.3])
    first = [r for r in module.records if r["benchmark"] == "set0"]
    second = [r for r in module.records if r["benchmark"] == "set1"]
    same([r | {"benchmark": ""} for r in first], [r | {"benchmark": ""} for r in second])
    assert "set1" in capsys.readouterr().out


def test_results_are_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "metrics.json").write_text("kept")
    with pytest.raises(
        FileExistsError, match=r"--trainer.default_root_dir.*--model.overwrite=true"
    ):
        run(tmp_path, Data("aesthetic"))
    assert (tmp_path / "metrics.json").read_text() == "kept"
    run(tmp_path, Data("aesthetic"), sigmas=[0.5], overwrite=True, plot=False)
    assert json.loads((tmp_path / "metrics.json").read_text())["records"]


def test_bad_input_ends_with_a_message(tmp_path: Path) -> None:
    for options, message in (
        ({"sigmas": [0.0]}, r"noise levels in \(0, 1\]"),
        ({"sigmas": [0.5, 0.5]}, "distinct"),
        ({"estimators": {"clean": NoisyFactory()}}, "another name"),
        ({"estimators": {"truth": NoisyFactory()}}, "names Monte Carlo truth"),
        ({"estimators": {}, "clean": False}, "nothing to measure"),
        ({"truth_images": 3}, "give a generator"),
        ({"truth_images": 3, "truth_rollouts": 5}, "even number"),
    ):
        with pytest.raises(ValueError, match=message):
            ValueEvaluation(**({"estimators": {"stitched": NoisyFactory()}} | options))
    empty, untold, mixed = Data("aesthetic"), Data("aesthetic"), Data("aesthetic")
    empty.samples = []
    with pytest.raises(ValueError, match="nothing was measured: the test set is empty"):
        run(tmp_path, empty)
    untold.task = "segmentation"
    with pytest.raises(ValueError, match="task is 'segmentation'"):
        run(tmp_path, untold)
    mixed.task = "retrieval"
    with pytest.raises(ValueError, match=r"needs the batch keys \['captions'\]"):
        run(tmp_path, mixed)
    with pytest.raises(ValueError, match="reads no text"):
        run(tmp_path, Data("retrieval"), reward=lambda: FakeReward(uses_text=False))
    with pytest.raises(ValueError, match="this data set has none"):
        run(tmp_path, Data("aesthetic"), reward=FakeReward)
    with pytest.raises(ValueError, match=r"'stitched' is not finite at sigma = 0.5 .* \[0, 1"):
        run(tmp_path, Data("aesthetic"), {"stitched": NoisyFactory(break_at=0.5)})
    with pytest.raises(ValueError, match="needs a vae"):
        run(tmp_path, Data("aesthetic"), vae=None)
    assert not (tmp_path / "metrics.json").exists()


def sum_of_rewards() -> WeightedReward:
    rewards = {"a": FakeReward(), "b": FakeReward()}
    torch.nn.init.normal_(rewards["b"].head.weight)
    return WeightedReward(rewards, {"b": -0.5}, {"a": 2.0}, {"b": 4.0})


def test_retrieval_of_a_sum_of_rewards_is_refused_before_any_work(tmp_path: Path) -> None:
    data = Data("retrieval")
    data.samples[0]["pixels"] = None  # would be looked at in the first batch
    with pytest.raises(ValueError, match=r"is a sum of rewards.*each part by itself \(a, b\)"):
        run(tmp_path, data, reward=sum_of_rewards)


def test_a_sum_of_rewards_is_measured_where_a_score_is_enough(tmp_path: Path) -> None:
    """Its unit texts score as its texts do: a sum of parts, neither of them shrunk by the other."""
    torch.manual_seed(0)
    reward, data = sum_of_rewards(), Data("aesthetic")
    pixels = torch.stack([sample["pixels"] for sample in data.samples])
    prompts = [f"1,{i},0,{-i}" for i in range(len(data.samples))]
    r = reward(pixels, reward.encode_text(prompts))
    for sample, prompt, score in zip(data.samples, prompts, r.tolist(), strict=True):
        sample |= {"prompt": prompt, "score": score}
    module = run(tmp_path, data, reward=lambda: reward, sigmas=[0.01], plot=False)
    assert value(module.records, "aesthetic/srcc", None) == pytest.approx(1)
    assert value(module.records, "aesthetic/srcc", 0.01) > 0.95


class OtherFactory(ValueFactory):
    """A value of a reward of its own."""

    def __init__(self, reward: Any) -> None:
        self.reward = reward

    def __call__(self, parts: Parts) -> Value:
        return Noisy(self.reward)


def test_estimators_are_of_the_evaluations_reward(tmp_path: Path) -> None:
    torch.manual_seed(0)
    data, one = Data("aesthetic"), sum_of_rewards()
    for sample in data.samples:
        sample["prompt"] = "1,0,0,0"
    with pytest.raises(ValueError, match=r"'other' values .* measures one reward"):
        run(tmp_path, data, {"other": OtherFactory(FakeReward())}, reward=FakeReward)
    with pytest.raises(ValueError, match="one evaluation measures one reward"):
        other = WeightedReward(dict(one.items()), {"b": 0.5}, {"a": 2.0}, {"b": 4.0})
        run(tmp_path, data, {"other": OtherFactory(other)}, reward=lambda: one)
    # the same sum in an object of its own, as a weighted value brings it along, is the same reward
    again = WeightedReward(dict(one.items()), {"b": -0.5}, {"a": 2.0}, {"b": 4.0})
    again.encode_text(["1,0,0,0"])  # the fake has no empty text to ask for widths
    module = run(tmp_path, data, {"other": OtherFactory(again)}, reward=lambda: one, plot=False)
    assert {record["estimator"] for record in module.records} == {"clean", "other"}


def test_an_image_without_captions_is_named() -> None:
    batch = {"index": torch.tensor([4, 9]), "captions": [["1,0,0,0"], []]}
    reward = FakeReward()
    with pytest.raises(ValueError, match="index 9 has no caption"):
        TASKS["retrieval"]().texts(batch, reward, reward.encode_text)


def test_two_processes_measure_the_same(tmp_path: Path) -> None:
    """Seven samples on two processes: Lightning's sampler repeats one, which must not count."""
    data = WorldData(n=7, batch_size=2)
    options = {"sigmas": [0.5], "truth_images": 3, "truth_rollouts": 4, "truth_steps": 3}
    alone = world_run(tmp_path / "one", data, **options)
    module = ValueEvaluation(
        {"tweedie": TweedieFactory(), "monte_carlo": MonteCarloFactory(rollouts=8, steps=6)},
        reward=lambda: ClosedFormReward(known()),
        generator=lambda: WorldGenerator(mixture()),
        plot=False,
        **options,
    )
    trainer = Trainer(
        accelerator="cpu",
        devices=2,
        strategy="ddp_fork",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=str(tmp_path / "two"),
    )
    trainer.test(module, data, verbose=False)
    content = json.loads((tmp_path / "two" / "metrics.json").read_text())
    together = content["records"]
    same([r | {"stderr": 0} for r in alone.records], [r | {"stderr": 0} for r in together])
    assert {r["n"] for r in together if r["metric"] == "aesthetic/srcc"} == {7}


def test_terminal_needs_clean_latents(tmp_path: Path) -> None:
    class Factory(ValueFactory):
        def __call__(self, parts: Parts) -> Value:
            return TerminalValue(parts.vae, parts.reward)

    with pytest.raises(ValueError, match="t = 0 only"):
        run(tmp_path, Data("aesthetic"), {"terminal": Factory()})
