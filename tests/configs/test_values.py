"""Fragments in configs/values/ take the place of a run's value; they build nothing until they are called."""

from __future__ import annotations

import pytest
import torch
from jsonargparse import ArgumentParser

from stitchvm.generator import Generator
from stitchvm.rewards.hpsv2 import HPSv2Reward
from stitchvm.samplers.field import Field
from stitchvm.values.parts import Parts, ValueFactory
from tests.configs.test_all import CONFIGS, parse

VALUES = sorted((CONFIGS / "values").glob("*.yaml"))
SUM = CONFIGS / "values" / "world_clip_hps.yaml"
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
