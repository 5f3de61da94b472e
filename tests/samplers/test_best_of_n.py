"""Best-of-N against the plain sampler and the law of the maximum; SVDD as FK steering with proposals only."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from jsonargparse import ArgumentParser
from torch import Tensor

from stitchvm.generator import Generator
from stitchvm.samplers.base import Sampler
from stitchvm.samplers.best_of_n import BestOfN
from stitchvm.samplers.fk import FKSteering
from stitchvm.samplers.plain import PlainSampler
from stitchvm.samplers.svdd import SVDD
from stitchvm.world.closed_form import GaussianWorld, KnownReward
from tests.samplers.fakes import ClosedFormGenerator, KnownValue

WORLD = GaussianWorld(torch.full((1, 1, 1), 0.5), 0.09)
REWARD = KnownReward.linear(torch.ones(1, 1, 1))


def value() -> KnownValue:
    return KnownValue(WORLD, REWARD, "expected")


@pytest.mark.parametrize("nu", ["ode", "linear_sde"])
def test_each_particle_is_the_plain_sample_of_its_stream(tiny_sd3: Path, nu: str) -> None:
    generator = Generator(str(tiny_sd3), text_tokens=12, guidance_scale=4.5)
    plain = PlainSampler(num_steps=4, nu=nu)
    plain.particles = 3
    streams = plain(generator, ["a red circle"], seeds=7)
    best = BestOfN(3, num_steps=4, nu=nu)(
        generator, ["a red circle"], final_value=ByMean(), seeds=7
    )
    assert torch.equal(best.particles, streams.particles)
    first = PlainSampler(num_steps=4, nu=nu)(generator, ["a red circle"], seeds=7)
    assert torch.allclose(best.particles[:, 0], first.latents, atol=1e-4)
    means = best.particles.flatten(2).mean(dim=2)
    assert torch.equal(best.chosen, means.argmax(dim=1))
    assert torch.equal(best.latents[0], best.particles[0, best.chosen[0]])
    one = BestOfN(1, num_steps=4, nu=nu)(generator, ["a red circle"], seeds=7)
    assert torch.equal(one.latents, first.latents)


class ByMean(KnownValue):
    """The mean of the latent."""

    def __init__(self) -> None:
        super().__init__(WORLD, REWARD)

    def bind(self, prompts: object = None, *, generator: object = None) -> Mean:
        return Mean()


class Mean:
    name = "mean"

    def __call__(self, z: Tensor, t: Tensor, prefixes: object = None) -> Tensor:
        assert not t.any()
        return z.flatten(1).mean(dim=1)

    def select(self, index: Tensor) -> Mean:
        return self


def test_the_best_of_four_is_the_maximum_of_four() -> None:
    n = 2000
    sampler = BestOfN(4, num_steps=12, grid="linear")
    asked = value()
    samples = sampler(ClosedFormGenerator(WORLD), ["0"] * n, final_value=asked, seeds=0)
    assert asked.asked == [(4 * n, 0.0)]  # at σ = 0 only
    mean, variance = WORLD.sampler_moments(sampler.sigmas(ClosedFormGenerator(WORLD), (1, 1)))
    # E[max of 4] = mean + 1.0294 std for normal samples, std of the max .7012 std
    expected = float(mean) + 1.02938 * variance**0.5
    found = float(samples.latents.double().mean())
    assert found == pytest.approx(expected, abs=4 * 0.7012 * (variance / n) ** 0.5)
    assert found > float(samples.particles.mean()) + 0.2
    assert torch.equal(samples.final_values.max(dim=1).values, REWARD(samples.latents.double()))


def test_final_value_and_value_are_the_same_to_it() -> None:
    generator = ClosedFormGenerator(WORLD)
    a = BestOfN(3, num_steps=4)(generator, ["0", "1"], value())
    b = BestOfN(3, num_steps=4)(generator, ["0", "1"], final_value=value())
    assert torch.equal(a.latents, b.latents) and a.log_weights is None
    small = BestOfN(3, num_steps=4, micro_batch=2)(generator, ["0", "1"], value())
    assert torch.allclose(a.latents, small.latents) and max(generator.calls[-12:]) == 2


def test_errors_say_what_is_wrong() -> None:
    with pytest.raises(ValueError, match="expected at least 1"):
        BestOfN(0)
    with pytest.raises(ValueError, match="by what"):
        BestOfN(2)(ClosedFormGenerator(WORLD), ["0"])
    for asked in ({"resample_every": 4}, {"resampling": "multinomial"}, {"ess_threshold": 0.5}):
        with pytest.raises(
            ValueError, match=f"SVDD never resamples: leave {next(iter(asked))} out"
        ):
            SVDD(2, **asked)


def test_svdd_is_named_by_configurations() -> None:
    """Which name every setting of FK steering that it takes, with its default."""
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(Sampler, "sampler")
    named = {"class_path": "stitchvm.samplers.svdd.SVDD", "init_args": {"proposals": 3}}
    made = parser.instantiate(parser.parse_object({"sampler": named})).sampler
    assert isinstance(made, SVDD) and made.proposals == 3 and not made.resampling_steps
    named["init_args"]["ess_threshold"] = 0.5
    with pytest.raises(ValueError, match="SVDD never resamples: leave ess_threshold out"):
        parser.instantiate(parser.parse_object({"sampler": named}))


def test_svdd_is_fk_steering_with_proposals_only() -> None:
    generator, n = ClosedFormGenerator(WORLD), 300
    settings = {"num_steps": 12, "grid": "linear"}
    asked = value()
    search = SVDD(5, **settings)(generator, ["0"] * n, asked, seeds=0)
    levels = SVDD(5, **settings).sigmas(generator, (1, 1))
    assert asked.asked == [(5 * n, float(level)) for level in levels[1:-1]]
    same = FKSteering(1, 5, proposal_share=1.0, resample_every=None, **settings)
    assert torch.equal(search.latents, same(generator, ["0"] * n, value(), seeds=0).latents)
    plain = PlainSampler(nu="linear_sde", **settings)(generator, ["0"] * n, seeds=0)
    assert search.latents.mean() > plain.latents.mean() + 0.5
    chains = SVDD(5, particles=2, **settings)(generator, ["0"] * n, value(), seeds=0)
    assert all(not record.info for record in chains.records)
    assert chains.latents.mean() > chains.particles.mean()
