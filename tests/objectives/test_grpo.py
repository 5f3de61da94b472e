"""Flow-GRPO's steps and loss against torch.distributions, Euler, exact moments and hand-computed numbers."""

import math
from itertools import pairwise

import pytest
import torch
from torch import Tensor
from torch.distributions import Normal, kl_divergence

from stitchvm.objectives.grpo import (
    Transition,
    grpo_loss,
    kl_to_reference,
    sde_window,
    transition,
)
from stitchvm.schedule import sigma_grid
from stitchvm.world.closed_form import GaussianWorld

F64 = torch.float64
D = 60


def latents(n: int = 2) -> tuple[Tensor, ...]:
    return torch.randn(n, 5, 3, 4, 5, dtype=F64).unbind(0)


def levels(x: Tensor) -> Tensor:
    return x.reshape(-1, 1, 1, 1)


def test_by_hand():
    # σ = .5, σ' = .25, dt = −.25; sde with noise 1: s² = 1, s²/2σ = 1
    # μ = z(1 − .25) + u(1 + .5)(−.25); scale² = .25
    z, u = torch.tensor([[2.0]], dtype=F64), torch.tensor([[4.0]], dtype=F64)
    step = transition(z, u, 0.5, 0.25, noise_level=1.0)
    assert step.mean.item() == pytest.approx(2 * 0.75 - 4 * 1.5 * 0.25)
    assert (step.std.item(), step.scale.item()) == pytest.approx((1.0, 0.5))
    assert step.sample(torch.tensor([[3.0]])).item() == pytest.approx(0.0 + 1.5)
    expected = -(1.5**2) / 0.5 - math.log(0.5) - 0.5 * math.log(2 * math.pi)
    assert step.log_prob(torch.tensor([[1.5]])).item() == pytest.approx(expected)
    # cps with noise 1/3: s = .25·sin(π/6) = .125; clean 2 − 2 = 0, noise 2 + 2 = 4
    step = transition(z, u, 0.5, 0.25, noise_level=1 / 3, kind="cps")
    assert step.mean.item() == pytest.approx(4 * math.sqrt(0.0625 - 0.015625))
    assert step.std.item() == step.scale.item() == pytest.approx(0.125)
    assert step.log_prob(step.mean + 0.5).item() == pytest.approx(-0.25)


@pytest.mark.parametrize("kind", ["sde", "cps"])
def test_without_noise_it_is_euler(kind):
    z, u = latents()
    sigmas = sigma_grid(10).double()
    for sigma, following in pairwise(sigmas):
        step = transition(z, u, sigma, following, noise_level=0.0, kind=kind, sigma_max=0.9)
        assert torch.allclose(step.mean, z + (following - sigma) * u, atol=1e-14)
        assert step.scale.abs().max() == 0
    if kind == "sde":  # and in float32 bit for bit
        z, u = z.float(), u.float()
        step = transition(
            z, u, sigmas[2].float(), sigmas[3].float(), noise_level=0.0, sigma_max=0.9
        )
        assert torch.equal(step.mean, z + (sigmas[3].float() - sigmas[2].float()) * u)


def test_log_prob_is_a_mean_of_normal_log_densities():
    z, u = latents()
    sigma = torch.tensor([1.0, 0.9, 0.6, 0.3, 0.1], dtype=F64)
    step = transition(z, u, sigma, 0.9 * sigma, noise_level=0.7, sigma_max=0.95)
    following = step.sample(torch.randn_like(z))
    normal = Normal(step.mean, levels(step.scale.flatten()))
    assert torch.allclose(step.log_prob(following), normal.log_prob(following).mean((1, 2, 3)))
    # the first step takes the next level in the denominator
    std = 0.7 * (sigma / torch.tensor([0.05, 0.1, 0.4, 0.7, 0.9], dtype=F64)).sqrt()
    assert torch.allclose(step.std.flatten(), std)


def test_recomputed_log_prob_is_the_stored_one_bit_for_bit():
    z, u, eps = (x.float() for x in latents(3))
    for kind in ("sde", "cps"):
        first = transition(z, u, 0.6, 0.5, noise_level=0.7, kind=kind)
        following = first.sample(eps)
        again = transition(z, u, 0.6, 0.5, noise_level=0.7, kind=kind)
        old = first.log_prob(following)
        assert torch.equal(old, again.log_prob(following))
        terms = grpo_loss(again.log_prob(following), old, torch.ones(5), clip=1e-5)
        assert terms["ratio"].tolist() == [1.0] * 5


@pytest.mark.parametrize("num_steps", [5, 50])
def test_sde_steps_have_the_exact_moments(num_steps):
    """In a Gaussian world one step is affine: mean and variance follow the recursion of (26) with ν = s."""
    world = GaussianWorld(torch.tensor([0.7], dtype=F64), 0.4)
    sigmas = sigma_grid(num_steps).double()
    options = {"noise_level": 0.7, "sigma_max": sigmas[1].item()}
    mean, variance = 0.0, 1.0
    for sigma, following in pairwise(sigmas):
        probes = torch.tensor([[0.0], [1.0]], dtype=F64)
        step = transition(probes, world.velocity(probes, sigma), sigma, following, **options)
        slope, offset = (step.mean[1] - step.mean[0]).item(), step.mean[0].item()
        mean = slope * mean + offset
        variance = slope**2 * variance + step.scale.item() ** 2

    def nu_squared(t: float) -> float:
        return 0.49 * t / (1 - (t if t < 1 else sigmas[1].item()))

    expected_mean, expected_variance = world.sampler_moments(sigmas, nu_squared)
    assert (mean, variance) == pytest.approx((expected_mean.item(), expected_variance), rel=1e-10)
    if num_steps == 50:  # and they go to the data's as the steps become many
        assert (mean, variance) == pytest.approx((0.7, 0.4), abs=0.05)


def test_on_policy_loss_and_gradient():
    """ρ = 1: the loss is −A, the gradient −A·∇log p; of one entry of μ: −A·(z' − μ)/(scale²·D)."""
    z, u, eps = latents(3)
    a = torch.tensor([1.0, -2.0, 0.5, 3.0, -1.0], dtype=F64)
    for kind in ("sde", "cps"):
        velocity = u.clone().requires_grad_()
        step = transition(z, velocity, 0.6, 0.5, noise_level=0.7, kind=kind)
        following = step.sample(eps)  # depends on μ, but what was sampled is given
        log_prob = step.log_prob(following)
        terms = grpo_loss(log_prob, log_prob.detach(), a, clip=1e-4)
        assert torch.equal(terms["loss"], -a)
        assert terms["clip_fraction"] == 0 and terms["approx_kl"] == 0
        found, score = (
            torch.autograd.grad(x, step.mean, retain_graph=True)[0]
            for x in (terms["loss"].sum(), log_prob.sum())
        )
        assert torch.allclose(found, -levels(a) * score)
        divisor = step.scale.square() * D if kind == "sde" else D / 2
        assert torch.allclose(score, (following - step.mean) / divisor)


def test_clipping():
    log_prob = torch.log(torch.tensor([1.3, 0.7, 1.3, 0.7, 1.1], dtype=F64)).requires_grad_()
    a = torch.tensor([1.0, 1.0, -1.0, -1.0, 1.0], dtype=F64)
    terms = grpo_loss(log_prob, torch.zeros(5, dtype=F64), a, clip=0.2)
    assert terms["loss"].tolist() == pytest.approx([-1.2, -0.7, 1.3, 0.8, -1.1])
    found = torch.autograd.grad(terms["loss"].sum(), log_prob)[0]
    assert found.tolist() == pytest.approx([0.0, -0.7, 1.3, 0.0, -1.1])
    assert terms["clip_fraction"].item() == pytest.approx(0.8)
    assert (
        terms["clip_fraction_high"].item()
        == terms["clip_fraction_low"].item()
        == pytest.approx(0.2)
    )
    # advantages are clamped
    big = grpo_loss(torch.zeros(1), torch.zeros(1), torch.tensor([9.0]), clip=0.2, adv_clip=5.0)
    assert big["loss"].item() == -5.0


def test_kl_is_what_the_reference_codes():
    """coded/true = −dt/D for sde, 1/D for cps; the true one is torch's divergence of two Gaussians."""
    z, u, other = latents(3)
    sigma = torch.tensor([0.9, 0.8, 0.6, 0.3, 0.1], dtype=F64)
    following = 0.75 * sigma
    for kind in ("sde", "cps"):
        options = {"noise_level": 0.7, "kind": kind, "sigma_max": 0.95}
        policy, frozen = (transition(z, x, sigma, following, **options) for x in (u, other))
        true = kl_divergence(
            *(Normal(x.mean, x.scale.expand_as(x.mean)) for x in (policy, frozen))
        ).sum((1, 2, 3))
        assert torch.allclose(kl_to_reference(policy, frozen, as_coded=False), true)
        ratio = (sigma - following) / D if kind == "sde" else torch.full_like(sigma, 1 / D)
        assert torch.allclose(kl_to_reference(policy, frozen) / true, ratio)
        assert kl_to_reference(policy, policy).tolist() == [0.0] * 5


def test_half_precision_is_stepped_in_float32():
    z, u = (x.bfloat16() for x in latents())
    step = transition(z, u, 0.6, 0.5, noise_level=0.7)
    assert step.mean.dtype == torch.float32
    expected = transition(z.float(), u.float(), 0.6, 0.5, noise_level=0.7).mean
    assert torch.equal(step.mean, expected)


def test_a_policy_gradient_raises_the_reward():
    """One step of many samples: the estimated gradient points where E[r] grows, (z' − μ)·A averaged."""
    n = 4096
    z, u = torch.zeros(n, 1, dtype=F64), torch.zeros(n, 1, dtype=F64, requires_grad=True)
    step = transition(z, u, 0.6, 0.5, noise_level=0.7)
    eps = torch.randn(n, 1, dtype=F64)
    following = step.sample(eps).detach()
    a = (following - following.mean()).flatten() / following.std()  # r(z') = z'
    log_prob = step.log_prob(following)
    loss = grpo_loss(log_prob, log_prob.detach(), a, clip=1e-4)["loss"].mean()
    slope = torch.autograd.grad(loss, step.mean)[0].sum().item()
    # −E[A·(z' − μ)]/scale² = −1/scale
    assert slope == pytest.approx(-1 / step.scale.item(), rel=0.05)


def test_windows():
    counts = torch.zeros(5)
    for update in range(3000):
        window = sde_window(10, 3, (0, 5), key=(0, update))
        assert len(window) == 3 and window.start >= 0 and window.stop <= 5
        counts[window.start] += 1
    assert counts[3:].sum() == 0 and (counts[:3] - 1000).abs().max() < 5 * 25.9
    assert sde_window(10, 3, key=(1, 2)) == sde_window(10, 3, key=(1, 2))
    assert sde_window(10, 10, (0, 10), key=(0,)) == range(10)
    # plain Flow-GRPO leaves out the last step
    assert sde_window(10, None, key=(0,)) == range(9)
    for size, bounds in ((6, (0, 5)), (3, (0, 11)), (0, (0, 5)), (3, (-1, 5))):
        with pytest.raises(ValueError, match="of a schedule of 10 steps"):
            sde_window(10, size, bounds, key=(0,))
    with pytest.raises(ValueError, match="at least 2"):
        sde_window(1, None, key=(0,))


def test_bad_input():
    z, u = latents()
    with pytest.raises(ValueError, match="needs sigma_max"):
        transition(z, u, 1.0, 0.9, noise_level=0.7)
    with pytest.raises(ValueError, match="needs sigma_max"):
        transition(z, u, torch.tensor(0.5), 0.4, noise_level=0.7)
    with pytest.raises(ValueError, match='"cps" with one in'):
        transition(z, u, 0.5, 0.4, noise_level=1.5, kind="cps")
    with pytest.raises(ValueError, match='kind = "ode"'):
        transition(z, u, 0.5, 0.4, noise_level=0.5, kind="ode")
    with pytest.raises(ValueError, match="one shape"):
        transition(z, u[:1], 0.5, 0.4, noise_level=0.5)
    with pytest.raises(ValueError, match=r"one shape \(B,\)"):
        grpo_loss(torch.zeros(2), torch.zeros(3), torch.zeros(2), clip=0.1)
    with pytest.raises(ValueError, match="positive numbers"):
        grpo_loss(torch.zeros(2), torch.zeros(2), torch.zeros(2), clip=0.0)
    assert isinstance(transition(z, u, 0.5, 0.4, noise_level=0.5), Transition)
