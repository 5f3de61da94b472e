"""Fragments in configs/values/ take the place of a run's value; they build nothing until they are called."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from jsonargparse import ArgumentParser

from stitchvm.cli import main
from stitchvm.generator import Generator
from stitchvm.rewards.clip import CLIPReward
from stitchvm.rewards.hpsv2 import HPSv2Reward
from stitchvm.samplers.base import Noise
from stitchvm.samplers.field import Field
from stitchvm.values.parts import Parts, ValueFactory
from stitchvm.values.stitched import StitchedValue
from stitchvm.values.tweedie import TweedieValue
from tests.configs.test_all import CONFIGS, parse

VALUES = sorted((CONFIGS / "values").glob("*.yaml"))
SUM = CONFIGS / "values" / "world_clip_hps.yaml"
MIXED = CONFIGS / "values" / "world_stitched_tweedie.yaml"
PROMPT = "a red circle left of a blue square on a dark background"


@pytest.mark.parametrize("path", VALUES, ids=lambda p: p.stem)
def test_they_take_the_place_of_a_value(path, monkeypatch):
    run = CONFIGS / "dps_stitched_world.yaml"
    cli = parse(run, "--model.value", str(path), monkeypatch=monkeypatch)
    value = cli.config.predict.model.init_args.value
    assert value.class_path == "stitchvm.values.weighted.WeightedFactory"
    for term in value.init_args.terms.values():
        assert term.value.class_path.startswith("stitchvm.values.")
        assert term.reward.class_path.startswith("stitchvm.rewards.")


def test_the_worlds_sum_runs_one_network_for_both(monkeypatch):
    monkeypatch.setenv("JSONARGPARSE_DEPRECATION_WARNINGS", "off")
    parser = ArgumentParser()
    parser.add_subclass_arguments(ValueFactory, "value")
    factory = parser.instantiate_classes(parser.parse_object({"value": str(SUM)})).value
    parts = Parts(generator=lambda: Generator("world:sd3", text_tokens=1, guidance_scale=4.5))
    value = factory(parts)
    assert list(value.values) == ["clip", "hps"]
    assert isinstance(value.values["hps"].reward, HPSv2Reward)
    generator = parts.generator
    for one in value.values.values():
        assert one.value_model.backbone.network is generator.transformer
    bound = value.bind([PROMPT])
    assert Field(generator, [PROMPT], None, bound).shares
    z_t, t = (
        torch.randn(2, generator.latent_channels, *generator.default_size),
        torch.tensor([0.5]),
    )
    each = [one.bind([PROMPT])(z_t, t) for one in value.values.values()]
    torch.testing.assert_close(bound(z_t, t), each[0] + each[1])


def sampled(config: str, value: Path, root: Path, *more: str) -> list[dict[str, Any]]:
    """Returns the lines that `stitchvm predict` writes for two prompts in a few steps with another value."""
    few = ["--data.num_prompts=2", "--model.sampler.num_steps=4", "--model.checker=false"]
    quiet = ["--trainer.enable_progress_bar=false", f"--trainer.default_root_dir={root}"]
    run = ["--config", str(CONFIGS / config), "--model.value", str(value)]
    main(["predict", *run, *few, *more, *quiet])
    return [json.loads(line) for line in (root / "samples.jsonl").read_text().splitlines()]


def test_guidance_by_a_stitched_and_a_tweedie_value_from_the_command_line(tmp_path: Path) -> None:
    """The first value of a trajectory is that of the first noise, which its stream gives."""
    lines = sampled("dps_stitched_world.yaml", MIXED, tmp_path)
    generator = Generator("world:sd3", text_tokens=1, guidance_scale=4.5)
    hps = StitchedValue.from_pretrained("world:value_hps", generator=generator)
    clip = TweedieValue(generator, CLIPReward(model="world:clip"), velocity="cfg")
    shape = (generator.latent_channels, *generator.default_size)
    assert len(lines) == 2
    for line in lines:
        z_t = Noise([line["stream"]], 1, shape, torch.device("cpu")).draw()[:, 0]
        v = [one.bind([line["prompt"]])(z_t, torch.ones(1)).item() for one in (hps, clip)]
        assert line["values"][0] == pytest.approx([1, v[0] + 0.5 * v[1]], abs=1e-4)
        assert min(abs(x) for x in v) > 0.01 and len(line["values"]) == 4
        # the velocity is what the Tweedie part has run of it
        assert line["calls"] == {"gradient": 4, "velocity": 4, "continued": 4}
        assert all(update > 0 for _, update in line["info"]["update_rms"])


def test_fk_steering_by_two_stitched_values_from_the_command_line(tmp_path: Path) -> None:
    sampler = {"particles": 2, "resample_from": 1, "resample_to": 3, "resample_every": 1}
    settings = [f"--model.sampler.{name}={number}" for name, number in sampler.items()]
    chooser = f"--model.reward={CONFIGS / 'rewards' / 'world_clip_hps.yaml'}"
    lines = sampled("fks_stitched_world.yaml", SUM, tmp_path, *settings, chooser)
    assert len(lines) == 2
    for line in lines:
        assert len(line["values"]) == len(line["info"]["ess"]) == 3
        assert all(1 <= ess <= 2 for _, ess in line["info"]["ess"])
        # the sum of the clean rewards chose, before the image was rounded to 8 bits
        both = line["rewards"]["clip"] + line["rewards"]["hps"]
        assert line["final_value"] == pytest.approx(both, abs=0.02)
