"""`stitchvm test` on small data of every task: numbers, independence of batches, files, messages, two processes."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torchmetrics.functional import spearman_corrcoef

from stitchvm.backbones.latent import LatentBackbone
from stitchvm.modules.evaluation import ValueEvaluation
from stitchvm.modules.tasks import TASKS
from stitchvm.randomness import keyed_normal
from stitchvm.rewards.clip import CLIPReward
from stitchvm.rewards.weighted import WeightedReward
from stitchvm.vae import VAE
from stitchvm.value_model import StitchedValueModel
from stitchvm.values.base import Value
from stitchvm.values.parts import Parts, ValueFactory
from stitchvm.values.stitched import StitchedFactory
from stitchvm.values.terminal import TerminalValue
from tests.modules.evaluation_runs import (
    Data,
    Noisy,
    NoisyFactory,
    run,
    same,
    value,
)
from tests.values.fakes import (
    FakeReward,
)


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
        ({"estimators": {"noise": NoisyFactory()}}, "names what makes z_t"),
        ({"estimators": {}, "clean": False}, "nothing to measure"),
        ({"truth_images": 3}, "give a generator"),
        ({"truth_images": -3}, "truth_images = -3: expected at least 0"),
        ({"truth_images": 3, "truth_rollouts": 5}, "even number"),
    ):
        with pytest.raises(ValueError, match=message):
            ValueEvaluation(**({"estimators": {"stitched": NoisyFactory()}} | options))
    whole = ValueEvaluation({"stitched": NoisyFactory()}, sigmas=[1])
    assert [str(sigma) for sigma in whole.sigmas] == ["1.0"]  # the noise of 1 is that of 1.0
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


def test_terminal_needs_clean_latents(tmp_path: Path) -> None:
    class Factory(ValueFactory):
        def __call__(self, parts: Parts) -> Value:
            return TerminalValue(parts.vae, parts.reward)

    with pytest.raises(ValueError, match="t = 0 only"):
        run(tmp_path, Data("aesthetic"), {"terminal": Factory()})


def test_a_value_model_of_other_latents_is_refused(
    tiny_sd3: Path, tiny_clip: Path, tmp_path: Path
) -> None:
    reward = CLIPReward(model=f"local-dir:{tiny_clip}")
    for name, scale in (("own", 1.5), ("other", 0.3611)):
        backbone = LatentBackbone(4, scale=scale, shift=0.1)
        StitchedValueModel(backbone, reward, (0, 1)).save_pretrained(tmp_path / name)
    module = {
        name: ValueEvaluation(
            {"vae": StitchedFactory(str(tmp_path / name))},
            reward=partial(CLIPReward, model=f"local-dir:{tiny_clip}"),
            vae=partial(VAE, str(tiny_sd3)),
            task="retrieval",
        )
        for name in ("own", "other")
    }
    for each in module.values():
        each.task = TASKS["retrieval"]()
    module["own"].configure_model()
    with pytest.raises(ValueError, match=r"another latent space .*\(0\.3611, 0\.1\), not \(1\.5"):
        module["other"].configure_model()
