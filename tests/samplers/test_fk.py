"""FK steering against exact tilted distributions, brute force, and the plain sampler that it contains."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from stitchvm.generator import Generator
from stitchvm.samplers.base import Record, Run, Samples
from stitchvm.samplers.best_of_n import BestOfN
from stitchvm.samplers.fk import FKSteering
from stitchvm.samplers.plain import PlainSampler
from stitchvm.samplers.resampling import SCHEMES
from stitchvm.schedule import sigma_grid
from stitchvm.values.monte_carlo import MonteCarloValue
from stitchvm.world.closed_form import GaussianWorld, KnownReward
from tests.samplers.fakes import ClosedFormGenerator, KnownValue
from tests.values.fakes import ClosedFormReward, known, mixture

PROMPTS = ["a red circle", "a blue square left of the red circle"]
STEPS = 16
WORLD = GaussianWorld(torch.full((1, 1, 1), 0.5), 0.09)
REWARD = KnownReward.quadratic(torch.full((1, 1, 1), 1.5), k=4.0)


def steer(n: int = 4000, prompts: int = 1, kind: str = "soft", **changes: object) -> Samples:
    """Steers the Gaussian world: by default every step but the last is a resampling step, λ = 1."""
    settings = {
        "lam": 1.0,
        "lam_per": "value",
        "resample_every": 1,
        "resample_from": 1,
        "resample_to": STEPS - 1,
        "num_steps": STEPS,
        "grid": "linear",
    } | changes
    value = KnownValue(WORLD, REWARD, kind)
    sampler = FKSteering(n, **settings)
    return sampler(ClosedFormGenerator(WORLD), ["0"] * prompts, value, seeds=0)


def target(lam: float = 1.0) -> tuple[float, float]:
    """Returns mean and variance of the sampler's own distribution (discretised), tilted by exp(λ r), exactly."""
    sigmas = sigma_grid(STEPS, kind="linear")
    kernel = FKSteering(1, num_steps=STEPS).kernel
    table = {float(sigmas[k]): kernel.nu_at(k, sigmas) ** 2 for k in range(STEPS)}
    mean, variance = WORLD.sampler_moments(sigmas, lambda t: table[t])
    tilted = GaussianWorld(mean, variance).tilt(REWARD, lam)
    return float(tilted.means), float(tilted.variances)


def moments(samples: Samples) -> tuple[float, float]:
    """Returns mean and variance of the weighted particles of the first prompt."""
    w, x = samples.log_weights[0].exp(), samples.particles[0].double().flatten()
    mean = float((w * x).sum())
    return mean, float((w * (x - mean) ** 2).sum())


def test_the_target_is_that_of_the_continuous_world_as_steps_get_fine() -> None:
    tilted = WORLD.tilt(REWARD)
    assert float(tilted.means) == pytest.approx(0.7647, abs=1e-4)
    assert float(tilted.variances) == pytest.approx(0.0662, abs=1e-4)
    assert target() == pytest.approx((0.7647, 0.0662), abs=0.05)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("threshold", [None, 0.5])
def test_particles_converge_to_the_tilted_distribution(
    scheme: str, threshold: float | None
) -> None:
    samples = steer(resampling=scheme, ess_threshold=threshold)
    mean, variance = target()
    # four standard deviations over seeds; the untilted distribution is 0.25 away
    assert moments(samples)[0] == pytest.approx(
        mean, abs=0.035 if scheme == "systematic" else 0.055
    )
    assert moments(samples)[1] == pytest.approx(variance, abs=0.014)
    resampled = torch.stack([r.info["resampled"][0] for r in samples.records if r.info])
    if threshold is None:
        assert resampled.all()
        # the exact value leaves nothing to correct: the particles themselves are right
        assert float(samples.particles.mean()) == pytest.approx(mean, abs=0.055)
    else:
        assert not resampled.all()


@pytest.mark.parametrize("potential", ["diff", "max", "add", "rt"])
def test_all_potentials_have_one_target(potential: str) -> None:
    settings = {"lam": 0.5, "resample_every": 5, "resample_from": 5}
    samples = steer(kind="expected", potential=potential, **settings)
    mean, variance = target(0.5)
    assert [r.step for r in samples.records if r.values is not None] == [5, 10, 15]
    assert moments(samples)[0] == pytest.approx(mean, abs=0.035)
    assert moments(samples)[1] == pytest.approx(variance, abs=0.014)


def test_resampling_at_the_last_step_leaves_nothing_to_weigh() -> None:
    samples = steer(kind="expected", n=3000, resample_every=5, resample_from=1, resample_to=STEPS)
    assert [r.step for r in samples.records if r.info] == [1, 6, 11, 16]
    assert samples.records[-1].sigma == 0
    assert torch.allclose(samples.log_weights.exp(), torch.full((1, 3000), 1 / 3000).double())
    assert float(samples.particles.mean()) == pytest.approx(target()[0], abs=0.05)


class Dropping(FKSteering):
    """The published code's mistake: weights are forgotten where particles are not resampled."""

    def advance(self, run: Run, k: int) -> Record:
        record = super().advance(run, k)
        run.memory["weights"].carried.zero_()
        return record


def test_dropping_weights_instead_of_carrying_them_loses_the_steering() -> None:
    sampler = Dropping(
        4000,
        lam=1.0,
        lam_per="value",
        resample_every=1,
        resample_from=1,
        resample_to=STEPS - 1,
        ess_threshold=0.5,
        num_steps=STEPS,
        grid="linear",
    )
    value = KnownValue(WORLD, REWARD)
    wrong = sampler(ClosedFormGenerator(WORLD), ["0"], value, seeds=0)
    assert moments(wrong)[0] == pytest.approx(target(0.0)[0], abs=0.03)
    right = steer(ess_threshold=0.5)
    assert moments(right)[0] == pytest.approx(target()[0], abs=0.035)
    assert target()[0] - target(0.0)[0] > 0.2


def test_proposals_overshoot_as_documented() -> None:
    mean = target()[0]
    found = {m: moments(steer(n=2000, proposals=m))[0] for m in (1, 2, 4)}
    assert found[1] == pytest.approx(mean, abs=0.03)
    assert found[1] + 0.03 < found[2] < found[4] and found[4] > mean + 0.06


def test_few_particles_of_many_prompts() -> None:
    base, mean = target(0.0)[0], target()[0]
    settings = {"n": 4, "prompts": 700}
    drawn = steer(final="sample", **settings).latents.double()
    first = steer(final="first", **settings).latents.double()
    best = steer(final="best", **settings)
    assert base + 0.1 < float(drawn.mean()) < mean + 0.03  # four particles are few: a bias of 1/N
    assert float(first.mean()) == pytest.approx(float(drawn.mean()), abs=0.05)
    assert torch.equal(best.chosen, best.final_values.argmax(dim=1))
    assert torch.equal(best.final_values.max(dim=1).values, REWARD(best.latents.double()))
    assert REWARD(best.latents.double()).mean() > REWARD(drawn).mean() + 0.1


def test_a_mixture_agrees_with_exact_importance_weights() -> None:
    world, reward = mixture(), known()
    settings = {"num_steps": 20, "grid": "linear", "nu": "linear_sde"}
    generator, value = ClosedFormGenerator(world), KnownValue(world, reward, "soft")
    plain = BestOfN(4000, **settings)(generator, ["0"], final_value=value, seeds=1)
    w, x = plain.final_values[0].softmax(dim=0), plain.particles[0].double().flatten(1)
    window = {"resample_every": 1, "resample_from": 1, "resample_to": 19}
    steered = FKSteering(4000, lam=1.0, lam_per="value", **window, **settings)
    samples = steered(generator, ["0"], value, seeds=2)
    w_fk, x_fk = samples.log_weights[0].exp(), samples.particles[0].double().flatten(1)
    assert torch.allclose(w_fk @ x_fk, w @ x, atol=0.06)
    assert torch.allclose(w_fk @ x_fk**2, w @ x**2, atol=0.12)
    # the tilted world's share of the first mode, to the discretisation
    share = float((w_fk * (x_fk[:, 0] > 0.3)).sum())
    exact = world.tilt(reward).sample(20000, torch.Generator().manual_seed(0))
    assert share == pytest.approx(float((exact[:, 0] > 0.3).double().mean()), abs=0.05)
    assert (x[:, 0] > 0.3).double().mean() < share - 0.2


def test_without_lambda_every_particle_is_the_plain_sample() -> None:
    generator, value = ClosedFormGenerator(WORLD), KnownValue(WORLD, REWARD)
    settings = {"num_steps": 10, "nu": "linear_sde"}
    plain = BestOfN(3, **settings)(generator, ["0", "1"], value, seeds=[4, 9])
    for changes in (
        {"resampling": "multinomial"},
        {"potential": "add", "lam_per": "value"},
        {"ess_threshold": 1.0, "resample_every": 1, "resample_to": 10},
    ):
        steered = FKSteering(3, lam=0.0, **changes, **settings)
        samples = steered(generator, ["0", "1"], value, seeds=[4, 9])
        assert torch.equal(samples.particles, plain.particles)
        assert torch.equal(samples.latents, plain.latents)


def test_without_lambda_the_final_value_and_proposals_still_choose() -> None:
    generator, value = ClosedFormGenerator(WORLD), KnownValue(WORLD, REWARD)
    plain = PlainSampler(num_steps=10, nu="linear_sde")(generator, ["0"] * 20)

    def steered(**settings: object) -> Tensor:
        sampler = FKSteering(3, lam=0.0, num_steps=10, **settings)
        return sampler(generator, ["0"] * 20, value).latents

    assert torch.equal(steered(final="first"), plain.latents)
    best, chosen = steered(final="best"), steered(final="first", proposals=2)
    reward = REWARD(plain.latents.double()).mean()
    for latents in (best, chosen):
        assert REWARD(latents.double()).mean() > reward + 0.3


def test_one_particle_and_one_proposal_are_the_plain_sampler(sd3: Generator) -> None:
    plain = PlainSampler(num_steps=5, nu="linear_sde")(sd3, PROMPTS, seeds=[3, 7])
    samples = FKSteering(1, 1, num_steps=5)(sd3, PROMPTS, seeds=[3, 7])
    assert torch.equal(samples.latents, plain.latents)


def test_the_childs_value_is_taken_at_the_childs_level_when_it_is_needed() -> None:
    value, generator = KnownValue(WORLD, REWARD), ClosedFormGenerator(WORLD)
    sampler = FKSteering(
        3, 2, lam=0.0, num_steps=20, grid="linear", proposal_share=0.1, resample_every=4
    )
    assert sampler.proposal_steps == (1, 2) and sampler.resampling_steps == (4, 8, 12, 16)
    latents: list[Tensor] = []
    advance = sampler.advance

    def spy(run: Run, k: int) -> Record:
        record = advance(run, k)
        latents.append(run.z)
        return record

    sampler.advance = spy  # type: ignore[method-assign]
    samples = sampler(generator, ["0", "0"], value)
    levels = sigma_grid(20, kind="linear")
    asked = [(12, float(levels[k])) for k in (1, 2)] + [
        (6, float(levels[k])) for k in (4, 8, 12, 16)
    ]
    assert value.asked == [*asked, (6, 0.0)]
    for record, z in zip(samples.records, latents, strict=True):
        if record.values is not None:
            expected = WORLD.soft_value(z.double(), record.sigma, REWARD)
            assert torch.allclose(record.values.flatten(), expected)
            assert record.sigma == float(levels[record.step])
    assert samples.calls == {"velocity": 6 * 20, "continued": 0, "value": 2 * 12 + 4 * 6 + 6}


@pytest.mark.parametrize("micro_batch", [None, 4])
def test_the_best_proposal_is_kept(micro_batch: int | None) -> None:
    sampler = FKSteering(2, 5, num_steps=4, proposal_share=1, micro_batch=micro_batch)
    sampler.resample_every = None
    seen: list[Tensor] = []
    propose = Run.propose

    def spy(run: Run, *args: object, **kwargs: object) -> Tensor:
        seen.append(propose(run, *args, **kwargs))
        return seen[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Run, "propose", spy)
        value = KnownValue(WORLD, REWARD)
        samples = sampler(ClosedFormGenerator(WORLD), ["0", "1"], value)
    levels = sigma_grid(4, kind="linear")
    for k, children in enumerate(seen[:-1]):
        flat = children.flatten(0, 1).double()
        v = WORLD.soft_value(flat, float(levels[k + 1]), REWARD).unflatten(0, (4, 5))
        assert torch.allclose(samples.records[k].values.flatten(), v.max(dim=1).values)
    assert seen[-1].shape[1] == 1  # the last step has no noise
    assert max(rows for rows, _ in value.asked) <= (micro_batch or 20)


def test_parents_are_scored_by_their_denoised_latents_for_nothing() -> None:
    value, generator = KnownValue(WORLD, REWARD), ClosedFormGenerator(WORLD)
    sampler = FKSteering(3, score="parent", lam=0.0, num_steps=10, grid="linear")
    parents: list[Tensor] = []
    advance = sampler.advance

    def spy(run: Run, k: int) -> Record:
        parents.append(run.z)
        return advance(run, k)

    sampler.advance = spy  # type: ignore[method-assign]
    samples = sampler(generator, ["0", "0"], value)
    levels = sigma_grid(10, kind="linear")
    assert sampler.resampling_steps == (2, 6)
    assert value.asked == [(6, 0.0)] * 3 and samples.calls["velocity"] == 60
    for step in (2, 6):
        record, sigma = samples.records[step - 1], float(levels[step - 1])
        expected = REWARD(WORLD.denoise(parents[step - 1].double(), sigma))
        assert torch.allclose(record.values.flatten(), expected, atol=1e-5)
        assert record.sigma == sigma
    n = 3000
    steered = steer(n, score="parent")
    assert moments(steered)[0] == pytest.approx(target()[0], abs=0.03)


def test_rows_are_independent_of_the_prompts_beside_them() -> None:
    generator, value = ClosedFormGenerator(WORLD), KnownValue(WORLD, REWARD)
    for changes in ({}, {"potential": "max", "ess_threshold": 0.9, "final": "sample"}):
        sampler = FKSteering(4, 2, num_steps=20, **changes)
        together = sampler(generator, ["0", "1", "0.5"], value, seeds=[1, 2, 3])
        alone = sampler(generator, ["0.5"], value, seeds=[3])
        pieces = FKSteering(4, 2, num_steps=20, micro_batch=5, **changes)
        parts = pieces(generator, ["0", "1", "0.5"], value, seeds=[1, 2, 3])
        assert torch.allclose(together.particles[2], alone.particles[0], atol=1e-6)
        assert torch.equal(together.chosen[2:], alone.chosen)
        assert torch.allclose(together.particles, parts.particles, atol=1e-6)
        assert together.records[15].info["distinct_ancestors"].min() < 1
    assert max(generator.calls[-20 * 3 :]) == 5


def test_a_value_that_rolls_out_steers_one_prompt_as_it_steers_several() -> None:
    generator = ClosedFormGenerator(mixture())
    settings = {"rollouts": 3, "steps": 2, "use_prompts": True}
    value = MonteCarloValue(generator, ClosedFormReward(known()), **settings)
    sampler = FKSteering(3, 2, num_steps=5, resample_every=1)
    together = sampler(generator, ["0.5", "0"], value, seeds=[3, 1])
    alone = sampler(generator, ["0.5"], value, seeds=[3])
    assert torch.allclose(alone.particles[0], together.particles[0], atol=1e-5)
    assert torch.allclose(alone.final_values[0], together.final_values[0], atol=1e-3)


def test_numbers_of_a_step() -> None:
    value = KnownValue(WORLD, REWARD)
    sampler = FKSteering(4, num_steps=20, lam=50.0, lam_per="value")
    samples = sampler(ClosedFormGenerator(WORLD), ["0"] * 3, value)
    info = samples.records[3].info
    assert set(info) == {"ess", "max_log_weight", "distinct_ancestors", "resampled", "lam"}
    assert all(x.shape == (3,) for x in info.values())
    assert torch.allclose(info["lam"], torch.tensor([50.0]).double())
    assert (info["ess"] >= 1).all() and (info["ess"] < 4).all()
    assert (info["max_log_weight"] <= 0).all() and (info["max_log_weight"] > -math.log(4)).all()
    assert (info["distinct_ancestors"] < 1).all()
    parents = samples.records[3].ancestors
    distinct = torch.tensor([len(set(row)) / 4 for row in parents.tolist()])
    assert torch.equal(info["distinct_ancestors"], distinct)
    assert not samples.records[4].info and samples.records[4].values is None
    assert samples.log_weights.exp().sum(dim=1) == pytest.approx([1, 1, 1])


def test_the_papers_schedules_are_the_default() -> None:
    sd, flux = FKSteering(4, 2, num_steps=40), FKSteering(4, 2, num_steps=28)
    assert sd.resampling_steps == (8, 12, 16, 20, 24, 28, 32)
    assert flux.resampling_steps == (6, 10, 14, 18, 22)
    assert sd.proposal_steps == tuple(range(1, 17)) and flux.proposal_steps[-1] == 11
    assert FKSteering(4, 1).proposal_steps == () and FKSteering(1, 2).resampling_steps == ()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"nu": "ode"}, "would be identical"),
        ({"particles": 1, "proposals": 2, "nu_scale": 0.0}, "would be identical"),
        ({"particles": 0}, "expected 1 or more"),
        ({"particles": -1}, "particles = -1.*expected 1 or more"),
        ({"resample_every": 0}, "expected 1 or more"),
        ({"resample_from": 9, "resample_to": 8}, "expected 0 ≤ from ≤ to"),
        ({"resample_to": 41}, "there are 40 steps: lower resample_to"),
        ({"proposal_share": 1.5}, "expected a share"),
        ({"ess_threshold": 2.0}, "expected a share of N"),
        ({"score": "parent", "proposals": 2}, "cannot tell 2 proposals"),
        ({"score": "grandparent"}, "expected one of child, parent"),
        ({"final": "worst"}, "expected one of best, sample, first"),
        ({"resampling": "residual"}, "expected one of systematic, multinomial"),
        ({"potential": "sum"}, "expected one of diff"),
        ({"lam": math.inf}, "expected a finite number"),
    ],
)
def test_settings_that_make_no_sense_are_errors(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FKSteering(**settings)


def test_a_run_without_a_value_or_with_one_that_is_not_finite_is_an_error() -> None:
    generator = ClosedFormGenerator(WORLD)
    with pytest.raises(ValueError, match="FKSteering asks a value"):
        FKSteering(2)(generator, ["0"])
    nan = KnownReward.linear(torch.full((1, 1, 1), math.nan))
    with pytest.raises(ValueError, match=r"not finite at step 4, σ = 0\.8, prompt '0'"):
        FKSteering(2, num_steps=20)(generator, ["0"], KnownValue(WORLD, nan, "expected"))
