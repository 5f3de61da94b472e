"""Estimators as YAML: parsed by the command line's own machinery, nothing built before `configure_model`."""

from __future__ import annotations

import pytest
from jsonargparse import ArgumentError, ArgumentParser

from stitchvm.modules.evaluation import ValueEvaluation
from stitchvm.values.monte_carlo import MonteCarloFactory
from stitchvm.values.stitched import StitchedFactory

CONFIG = """
model:
  class_path: stitchvm.modules.evaluation.ValueEvaluation
  init_args:
    estimators:
      stitched:
        class_path: stitchvm.values.stitched.StitchedFactory
        init_args: {path: runs/nowhere/value_model}
      tweedie:
        class_path: stitchvm.values.tweedie.TweedieFactory
      monte_carlo:
        class_path: stitchvm.values.monte_carlo.MonteCarloFactory
        init_args: {rollouts: 4, steps: 10}
    reward:
      class_path: tests.values.fakes.FakeReward
      init_args: {embed_dim: 7}
    generator:
      class_path: stitchvm.generator.Generator
      init_args: {path: nowhere/at-all}
    vae:
      class_path: stitchvm.vae.VAE
      init_args: {path: nowhere/at-all}
    sigmas: [0.1, 0.5]
    truth_images: 16
"""


def parser() -> ArgumentParser:
    from lightning.pytorch import LightningModule

    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(LightningModule, "model", fail_untyped=False)
    return parser


def test_estimators_are_light_until_they_are_called() -> None:
    config = parser().parse_string(CONFIG)
    module = parser().instantiate_classes(config).model
    assert isinstance(module, ValueEvaluation)
    assert list(module.factories) == ["stitched", "tweedie", "monte_carlo"]
    stitched, monte_carlo = module.factories["stitched"], module.factories["monte_carlo"]
    assert isinstance(stitched, StitchedFactory) and stitched.path == "runs/nowhere/value_model"
    assert isinstance(monte_carlo, MonteCarloFactory)
    assert monte_carlo.options["rollouts"] == 4 and monte_carlo.options["steps"] == 10
    reward, generator, vae = module.part_factories
    assert reward().embed_dim == 7
    # only the call looks for the weights
    for factory in (generator, vae):
        with pytest.raises(FileNotFoundError, match="nowhere"):
            factory()


def test_an_estimator_can_be_changed_on_the_command_line(tmp_path) -> None:
    (tmp_path / "config.yaml").write_text(CONFIG)
    one = parser()
    one.add_argument("--config", action="config")
    config = one.parse_args(
        [
            "--config",
            str(tmp_path / "config.yaml"),
            "--model.estimators.monte_carlo.init_args.rollouts=9",
            "--model.sigmas=[0.9]",
        ]
    )
    module = one.instantiate_classes(config).model
    assert module.factories["monte_carlo"].options["rollouts"] == 9
    assert module.factories["monte_carlo"].options["steps"] == 10
    assert module.sigmas == (0.9,)


def test_a_misspelt_option_is_an_error() -> None:
    with pytest.raises(ArgumentError, match="rolouts"):
        parser().parse_string(CONFIG.replace("rollouts", "rolouts"))
