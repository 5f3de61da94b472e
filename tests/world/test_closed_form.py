"""The closed-form worlds against finite differences, autograd, quadrature, regression and Monte Carlo."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from stitchvm.path import FlowPath
from stitchvm.schedule import sigma_grid
from stitchvm.world.closed_form import GaussianWorld, KnownReward, MixtureWorld

PATH = FlowPath()
EVENT = (2, 1, 2)


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=rng(seed))


def mixture() -> MixtureWorld:
    return MixtureWorld(
        torch.tensor([1.0, 2.0, 0.5]), normal(3, *EVENT, seed=1), torch.tensor([0.09, 0.3, 0.8])
    )


def gaussian() -> GaussianWorld:
    return GaussianWorld(normal(*EVENT, seed=2), 0.25)


WORLDS = [gaussian, mixture]
REWARDS = {
    "linear": KnownReward.linear(normal(*EVENT, seed=3), b=0.4),
    "quadratic": KnownReward.quadratic(normal(*EVENT, seed=4), k=1.3),
    "both": KnownReward(0.7, normal(*EVENT, seed=5), normal(*EVENT, seed=6), -0.2),
}
Z = normal(4, *EVENT, seed=7)
T = torch.tensor([0.1, 0.4, 0.7, 0.95], dtype=torch.float64)


def gradient(f: Callable[[Tensor], Tensor], z: Tensor) -> Tensor:
    z = z.clone().requires_grad_()
    return torch.autograd.grad(f(z).sum(), z)[0]


def agree(samples: Tensor, exact: Tensor) -> None:
    """Asserts that the mean over the first axis is within 4 standard errors."""
    error = samples.std(0) / math.sqrt(len(samples))
    assert ((samples.mean(0) - exact).abs() < 4 * error + 1e-12).all()


def test_the_gaussian_is_the_textbook_formula() -> None:
    m, s2 = gaussian().means[0], 0.25
    t = T.reshape(-1, 1, 1, 1)
    v = (1 - t) ** 2 * s2 + t**2
    delta = Z - (1 - t) * m
    torch.testing.assert_close(gaussian().velocity(Z, T), (t - (1 - t) * s2) / v * delta - m)
    torch.testing.assert_close(gaussian().denoise(Z, T), m + (1 - t) * s2 / v * delta)
    torch.testing.assert_close(gaussian().score(Z, T), -delta / v)
    log_prob = torch.distributions.Normal((1 - t) * m, v.sqrt()).log_prob(Z).sum((1, 2, 3))
    torch.testing.assert_close(gaussian().log_prob(Z, T), log_prob)


@pytest.mark.parametrize("make", WORLDS)
def test_score_is_the_gradient_of_the_log_density(make: Callable) -> None:
    world, step = make(), 1e-5
    score = world.score(Z, T)
    torch.testing.assert_close(score, gradient(lambda z: world.log_prob(z, T), Z))
    for axis in range(4):
        shift = torch.zeros(4, dtype=torch.float64)
        shift[axis] = step
        shift = shift.reshape(EVENT)
        slope = (world.log_prob(Z + shift, T) - world.log_prob(Z - shift, T)) / (2 * step)
        torch.testing.assert_close(score.flatten(1)[:, axis], slope, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("make", WORLDS)
def test_velocity_denoiser_and_score_are_one(make: Callable) -> None:
    world = make()
    u = world.velocity(Z, T)
    torch.testing.assert_close(PATH.denoise(Z, u, T), world.denoise(Z, T))
    torch.testing.assert_close(PATH.score(Z, u, T), world.score(Z, T))


@pytest.mark.parametrize("make", WORLDS)
def test_velocity_transports_the_density(make: Callable) -> None:
    """Checks ∂_t log p_t = −div u − u·∇ log p_t, by finite differences in t and autograd in z."""
    world, step = make(), 1e-5
    rate = (world.log_prob(Z, T + step) - world.log_prob(Z, T - step)) / (2 * step)
    z = Z.clone().requires_grad_()
    u = world.velocity(z, T).flatten(1)
    divergence = sum(
        torch.autograd.grad(u[:, axis].sum(), z, retain_graph=True)[0].flatten(1)[:, axis]
        for axis in range(4)
    )
    transport = (u * world.score(Z, T).flatten(1)).sum(1)
    torch.testing.assert_close(rate, -(divergence + transport).detach(), rtol=1e-6, atol=1e-6)


def test_velocity_is_the_regression_of_the_conditional_velocity() -> None:
    """Numerical E[ε − z_0 | z_t] in one dimension, by quadrature over z_0."""
    world = MixtureWorld(
        torch.tensor([0.3, 0.7]), torch.tensor([[-1.0], [0.8]]), torch.tensor([0.1, 0.4])
    )
    z_0 = torch.linspace(-6, 6, 20_001, dtype=torch.float64)
    density = world.log_prob(z_0[:, None]).exp()
    assert float(torch.trapezoid(density, z_0)) == pytest.approx(1, abs=1e-9)
    for t, z_t in ((0.3, 0.5), (0.6, -0.7), (0.9, 1.4)):
        eps = (z_t - (1 - t) * z_0) / t
        weight = density * (-0.5 * eps**2).exp()
        target = torch.trapezoid(weight * (eps - z_0), z_0) / torch.trapezoid(weight, z_0)
        u = world.velocity(torch.tensor([[z_t]], dtype=torch.float64), t)
        torch.testing.assert_close(u[0, 0], target, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("make", WORLDS)
@pytest.mark.parametrize("tau", [0.0, 0.05])
def test_posterior_moments_match_its_samples(make: Callable, tau: float) -> None:
    posterior = make().posterior(Z, T, tau)
    draws = posterior.sample(20_000, rng(1))
    assert draws.shape == (20_000, *Z.shape)
    agree(draws, posterior.mean())
    agree((draws - posterior.mean()).square(), posterior.variance())


@pytest.mark.parametrize("make", WORLDS)
def test_posterior_is_bayes(make: Callable) -> None:
    """Checks log p(z_τ | z_t) = log p_τ(z_τ) + log N(z_t; ᾱ z_τ, σ̄²) − log p_t(z_t) pointwise."""
    world, tau = make(), 0.5 * T
    posterior, bridge = world.posterior(Z, T, tau), PATH.bridge(tau, T)
    z_tau = normal(4, *EVENT, seed=8)
    spread = posterior.variances[..., None, None, None].sqrt()
    each = torch.distributions.Normal(posterior.means, spread).log_prob(z_tau[:, None])
    direct = (posterior.log_weights + each.sum((2, 3, 4))).logsumexp(1)
    alpha, sigma = (x.reshape(-1, 1, 1, 1) for x in (bridge.alpha, bridge.sigma))
    kernel = torch.distributions.Normal(alpha * z_tau, sigma).log_prob(Z).sum((1, 2, 3))
    bayes = world.log_prob(z_tau, tau) + kernel - world.log_prob(Z, T)
    torch.testing.assert_close(direct, bayes)


@pytest.mark.parametrize("make", WORLDS)
def test_the_bridge_velocity_averages_to_the_flow(make: Callable) -> None:
    """E[u_{t|τ} | z_t] = u_t(z_t): exactly, through the anchor, and by Monte Carlo."""
    world, tau = make(), 0.6 * T
    bridge, u = PATH.bridge(tau, T), world.velocity(Z, T)
    mean = world.posterior(Z, T, tau).mean()
    sigma = bridge.sigma.reshape(-1, 1, 1, 1)
    alpha = bridge.alpha.reshape(-1, 1, 1, 1)
    torch.testing.assert_close(bridge.velocity_target(mean, (Z - alpha * mean) / sigma), u)
    torch.testing.assert_close(bridge.anchor(Z, u), mean)
    z_tau = world.posterior(Z, T, tau).sample(20_000, rng(2))
    eps = (Z - alpha * z_tau) / sigma
    many = PATH.bridge(tau.repeat(20_000), T.repeat(20_000))
    agree(many.velocity_target(z_tau.flatten(0, 1), eps.flatten(0, 1)).reshape(eps.shape), u)


@pytest.mark.parametrize("make", WORLDS)
def test_samples_follow_the_density(make: Callable) -> None:
    world = make()
    for t in (0.0, 0.5):
        z = world.sample(40_000, rng(3), t)
        weights = world.log_weights.exp().reshape(-1, 1, 1, 1)
        mean = (1 - t) * (weights * world.means).sum(0)
        agree(z, mean)
        # a proper density: E[∇ log p] = 0 and E[z·∇ log p] = −d
        score = world.score(z, t)
        agree(score, torch.zeros(EVENT).double())
        agree((z * score).sum((1, 2, 3)), torch.tensor(-4.0).double())


@pytest.mark.parametrize("make", WORLDS)
@pytest.mark.parametrize("name", REWARDS)
def test_values_match_posterior_samples(make: Callable, name: str) -> None:
    world, reward = make(), REWARDS[name]
    draws = world.posterior(Z, T).sample(20_000, rng(4))
    r = torch.stack([reward(d) for d in draws.unbind(1)], 1)
    agree(r, world.value(Z, T, reward))
    agree((r - world.value(Z, T, reward)).square(), world.value_variance(Z, T, reward))
    agree((0.5 * r - world.soft_value(Z, T, reward, 0.5)).exp(), torch.ones(4).double())


def test_rewards_are_their_formulas() -> None:
    a, y = normal(*EVENT, seed=3), normal(*EVENT, seed=4)
    torch.testing.assert_close(REWARDS["linear"](Z), (a * Z).sum((1, 2, 3)) + 0.4)
    torch.testing.assert_close(REWARDS["quadratic"](Z), -0.65 * (Z - y).square().sum((1, 2, 3)))


@pytest.mark.parametrize("make", WORLDS)
@pytest.mark.parametrize("name", REWARDS)
@pytest.mark.parametrize("lam", [0.3, 1.0, 2.5])
def test_the_tilted_score_is_the_score_plus_the_gradient_of_the_soft_value(
    make: Callable, name: str, lam: float
) -> None:
    """Eq. (35), with the gradient by autograd, and Bayes: V_t = log Z + log p*_t − log p_t."""
    world, reward = make(), REWARDS[name]
    tilted = world.tilt(reward, lam)
    grad_v = gradient(lambda z: world.soft_value(z, T, reward, lam), Z)
    torch.testing.assert_close(tilted.score(Z, T), world.score(Z, T) + grad_v)
    value = world.log_normaliser(reward, lam) + tilted.log_prob(Z, T) - world.log_prob(Z, T)
    torch.testing.assert_close(world.soft_value(Z, T, reward, lam), value)
    # the exact guided velocity has c_t = ν̃²/2 in front of ∇V, Eq. (19, 23)
    coupling = PATH.score_coupling(T).reshape(-1, 1, 1, 1)
    torch.testing.assert_close(tilted.velocity(Z, T), world.velocity(Z, T) + coupling * grad_v)


@pytest.mark.parametrize("name", REWARDS)
def test_the_tilted_density_is_the_definition(name: str) -> None:
    world, reward = mixture(), REWARDS[name]
    target = world.log_prob(Z) + reward(Z) - world.log_normaliser(reward)
    torch.testing.assert_close(world.tilt(reward).log_prob(Z), target)
    # its samples: importance weights p/p* average to one, so Z is right too
    z = world.tilt(reward, 0.5).sample(40_000, rng(5))
    ratio = world.log_normaliser(reward, 0.5) - 0.5 * reward(z)
    agree(ratio.exp(), torch.tensor(1.0).double())


def test_the_soft_value_expands_in_the_temperature() -> None:
    """Eq. (54): V^(λ) = λ Ṽ + (λ²/2) Var[r | z_t] + O(λ³); Jensen: V^(λ) ≥ λ Ṽ."""
    world, reward = mixture(), REWARDS["both"]
    rest = []
    for lam in (0.04, 0.02):
        soft, hard = world.soft_value(Z, T, reward, lam), lam * world.value(Z, T, reward)
        assert (soft >= hard).all()
        rest.append((soft - hard - lam**2 / 2 * world.value_variance(Z, T, reward)).abs())
    assert (rest[1] < rest[0] / 6).all()  # the rest falls eightfold with λ halved
    torch.testing.assert_close(
        gradient(lambda z: world.soft_value(z, T, reward, 1e-5) / 1e-5, Z),
        gradient(lambda z: world.value(z, T, reward), Z),
        rtol=1e-3,
        atol=1e-4,
    )


def test_the_gaussians_soft_and_tweedie_gradients_differ_by_a_known_factor() -> None:
    world, reward = gaussian(), REWARDS["quadratic"]
    soft = gradient(lambda z: world.soft_value(z, T, reward), Z)
    tweedie = gradient(lambda z: world.tweedie_value(z, T, reward), Z)
    t = T.reshape(-1, 1, 1, 1)
    c = 0.25 * t**2 / ((1 - t) ** 2 * 0.25 + t**2)
    torch.testing.assert_close(tweedie, soft * (1 + 1.3 * c))
    torch.testing.assert_close(tweedie, gradient(lambda z: world.value(z, T, reward), Z))


def test_values_are_martingales() -> None:
    """Checks E[Ṽ_t] = E[r] and E[exp V_t] = E[exp r] over z_t ~ p_t."""
    world, reward = mixture(), REWARDS["both"]
    weights = world.log_weights.exp()
    mean = (weights * reward.expect(world.means, world.variances)).sum()
    for t in (0.3, 0.8):
        z_t = world.sample(40_000, rng(6), t)
        agree(world.value(z_t, t, reward), mean)
        log_z = world.log_normaliser(reward)
        agree((world.soft_value(z_t, t, reward) - log_z).exp(), torch.tensor(1.0).double())


@pytest.mark.parametrize("make", WORLDS)
def test_end_points(make: Callable) -> None:
    world, reward = make(), REWARDS["both"]
    torch.testing.assert_close(world.denoise(Z, 0.0), Z)
    torch.testing.assert_close(world.velocity(Z, 0.0), -Z)
    torch.testing.assert_close(world.value(Z, 0.0, reward), reward(Z))
    torch.testing.assert_close(world.soft_value(Z, 0.0, reward), reward(Z))
    weights = world.log_weights.exp().reshape(-1, 1, 1, 1)
    mean = (weights * world.means).sum(0).expand_as(Z)
    torch.testing.assert_close(world.denoise(Z, 1.0), mean)
    torch.testing.assert_close(world.velocity(Z, 1.0), Z - mean)
    torch.testing.assert_close(world.score(Z, 1.0), -Z)


NOISE: dict[str, Callable[[float], float] | None] = {
    "ode": None,
    "linear": lambda t: t**2,
    "square": lambda t: 9 * t**4,
}


@pytest.mark.parametrize("name", NOISE)
def test_euler_moments_match_a_simulation(name: str) -> None:
    world, nu_squared = GaussianWorld(torch.tensor([0.5, -1.0]), 0.09), NOISE[name]
    sigmas = sigma_grid(12, 3.0, "double").double()
    mean, variance = world.sampler_moments(sigmas, nu_squared)
    generator = rng(7)
    z = torch.empty(20_000, 2, dtype=torch.float64).normal_(generator=generator)
    for t, t_next in zip(sigmas[:-1].tolist(), sigmas[1:].tolist(), strict=True):
        nu2 = nu_squared(t) if nu_squared else 0.0
        noise = torch.empty_like(z).normal_(generator=generator)
        drift = world.velocity(z, t) - nu2 / 2 * world.score(z, t)
        z = z + drift * (t_next - t) + math.sqrt(nu2 * (t - t_next)) * noise
    agree(z, mean)
    agree((z - mean).square(), torch.full((2,), variance).double())


@pytest.mark.parametrize("name", NOISE)
def test_euler_moments_converge_to_the_data_at_first_order(name: str) -> None:
    world = GaussianWorld(torch.tensor([0.5, -1.0]), 0.09)
    errors = []
    for steps in (400, 800):
        mean, variance = world.sampler_moments(sigma_grid(steps, kind="linear"), NOISE[name])
        torch.testing.assert_close(mean, world.means[0], rtol=1e-5, atol=1e-5)
        errors.append(abs(variance - 0.09))
    assert errors[1] < 0.6 * errors[0] < 0.6 * 2e-3


@pytest.mark.parametrize("name", NOISE)
def test_guided_moments_converge_to_the_tilted_data(name: str) -> None:
    """The coefficient of Eq. (39) on the exact ∇V reaches p*; the Tweedie gradient overshoots."""
    mean, s2, y, k = torch.tensor([0.5]), 0.09, torch.tensor([1.3]), 5.0
    world, nu_squared = GaussianWorld(mean, s2), NOISE[name]
    target = world.tilt(KnownReward.quadratic(y, k))

    def guide(t: float, tweedie: bool = False) -> tuple[float, Tensor]:
        t = min(t, 0.9999)  # t/(1 − t)·∇V is finite at 1, its factors are not
        v = (1 - t) ** 2 * s2 + t**2
        jacobian, c = (1 - t) * s2 / v, s2 * t**2 / v
        size = k * jacobian / (1 if tweedie else 1 + k * c)
        coefficient = -(t / (1 - t) + 0.5 * (nu_squared(t) if nu_squared else 0.0))
        d_at_zero = mean.double() - jacobian * (1 - t) * mean.double()
        return -coefficient * size * jacobian, -coefficient * size * (d_at_zero - y)

    sigmas = sigma_grid(4000, kind="linear")
    reached, variance = world.sampler_moments(sigmas, nu_squared, guide)
    torch.testing.assert_close(reached, target.means[0], rtol=0, atol=2e-3)
    assert variance == pytest.approx(float(target.variances[0]), abs=5e-4)
    over, _ = world.sampler_moments(sigmas, nu_squared, lambda t: guide(t, tweedie=True))
    assert (over > target.means[0] + 0.03).all()


def test_precision_follows_the_latents() -> None:
    world, reward = mixture(), REWARDS["both"]
    single = world.velocity(Z.float(), T.float())
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.double(), world.velocity(Z, T), rtol=1e-4, atol=1e-5)
    assert world.value(Z.bfloat16(), 0.5, reward).dtype == torch.float32
    # levels in float32 beside latents in float64 cost no digits
    torch.testing.assert_close(
        world.denoise(Z, T.float()), world.denoise(Z, T.float().double()), rtol=1e-13, atol=1e-13
    )


def test_bad_worlds_and_latents_are_named() -> None:
    ones = torch.ones(2)
    with pytest.raises(ValueError, match=r"\(K, \*event\)"):
        MixtureWorld(ones, torch.ones(3, 4), ones)
    with pytest.raises(ValueError, match="negative"):
        MixtureWorld(ones, torch.ones(2, 4), -ones)
    with pytest.raises(ValueError, match="this world needs"):
        mixture().velocity(torch.zeros(4, 2), 0.5)
    with pytest.raises(ValueError, match="same trailing axes"):
        mixture().value(Z, T, KnownReward.linear(torch.zeros(3)))
    with pytest.raises(ValueError, match="infinite"):
        mixture().soft_value(Z, T, REWARDS["quadratic"], -1.0)
