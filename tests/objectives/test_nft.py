"""DiffusionNFT against hand-computed numbers, identities in float64 and Gaussian worlds."""

import numpy as np
import pytest
import torch
from torch import Tensor

from stitchvm.objectives.nft import (
    anchored_nft_loss,
    contrast,
    ema_decay,
    nft_loss,
    old_decay,
    optimality,
    velocity_nft_loss,
)
from stitchvm.objectives.regulariser import output_regulariser
from stitchvm.path import FlowPath
from stitchvm.world.closed_form import GaussianWorld, KnownReward

F64 = torch.float64
B, SHAPE = 6, (4, 3, 5)
D = 60


def batch(dtype: torch.dtype = F64):
    """Returns u, u_old, z_0, ε, t and advantages of B samples."""
    u, u_old, z_0, eps = (torch.randn(B, *SHAPE, dtype=dtype) for _ in range(4))
    return u, u_old, z_0, eps, torch.rand(B, dtype=dtype) * 0.9 + 0.05, torch.randn(B, dtype=dtype)


def gradient(loss: Tensor, u: Tensor) -> Tensor:
    return torch.autograd.grad(loss.sum(), u)[0]


def test_by_hand():
    # one sample of two entries, t = 1/2: z_t = (1, 1), z_0 = (0, 2); u = (2, 0), u_old = (0, 2), β = 1/2
    # u⁺ = (1, 1), u⁻ = (−1, 3); x⁺ = (.5, .5), x⁻ = (1.5, −.5); errors (.5, −1.5) and (1.5, −2.5)
    # w = 1 and 2; squares' means 1.25 and 4.25; parts 1.25 and 2.125; r = .7, A_max = 5
    tensors = [torch.tensor([x]) for x in ([2.0, 0.0], [0.0, 2.0], [1.0, 1.0], [0.0, 2.0])]
    terms = nft_loss(*tensors, torch.tensor([0.5]), torch.tensor([0.7]), beta=0.5, adv_clip=5.0)
    assert terms["positive"].item() == pytest.approx(1.25)
    assert terms["negative"].item() == pytest.approx(2.125)
    assert terms["loss"].item() == pytest.approx(5 * (0.7 * 1.25 + 0.3 * 2.125) / 0.5)
    # velocity form, target (1, −1): errors (0, 2) and (−2, 4)
    target = torch.tensor([[1.0, -1.0]])
    terms = velocity_nft_loss(*tensors[:2], target, torch.tensor([0.7]), beta=0.5)
    assert terms["loss"].item() == pytest.approx(0.7 * 2 + 0.3 * 10)


def test_optimality():
    a = torch.tensor([-7.0, -5.0, -1.0, 0.0, 2.5, 5.0, 9.0])
    r = optimality(a)
    assert r.tolist() == pytest.approx([0, 0, 0.4, 0.5, 0.75, 1, 1])
    assert optimality(a, adv_clip=2.0)[4].item() == 1.0
    half = [0.5] * 7
    assert optimality(a, mode="positive_only").tolist() == pytest.approx([*half[:4], 0.75, 1, 1])
    assert optimality(a, mode="negative_only").tolist() == pytest.approx([0, 0, 0.4, *half[:4]])
    assert optimality(a, mode="one_only").tolist() == pytest.approx(half[:4] + [0.6] * 3)
    assert optimality(a, mode="binary").tolist() == pytest.approx([0.4] * 3 + [0.5] + [0.6] * 3)


def test_contrast_and_expansion():
    """u⁺ + u⁻ = 2u_old; the velocity loss is |e|² + 2β(2r − 1)⟨e, δ⟩ + β²|δ|²."""
    u, u_old, z_0, eps, _, a = batch()
    for beta in (0.1, 1.0, 2.5):
        plus, minus = contrast(u, u_old, beta)
        assert torch.allclose(plus + minus, 2 * u_old, atol=1e-14)
        target, r = FlowPath.velocity_target(z_0, eps), optimality(a)
        loss = velocity_nft_loss(u, u_old, target, r, beta=beta)["loss"]
        e, delta = (u_old - target).flatten(1), (u - u_old).flatten(1)
        cross = 2 * beta * (2 * r - 1) * (e * delta).mean(1)
        expected = e.square().mean(1) + cross + beta**2 * delta.square().mean(1)
        assert torch.allclose(loss, expected, atol=1e-13)


def test_minimiser_of_one_sample():
    """u = u_old + ((2r − 1)/β)(u* − u_old); plain flow matching for r = β = 1, reflected for r = 0."""
    _, u_old, z_0, eps, _, a = batch()
    target, r = FlowPath.velocity_target(z_0, eps), optimality(a)
    for beta in (0.1, 1.0):
        slope = ((2 * r - 1) / beta).reshape(-1, 1, 1, 1)
        u = (u_old + slope * (target - u_old)).requires_grad_()
        loss = velocity_nft_loss(u, u_old, target, r, beta=beta)["loss"]
        assert gradient(loss, u).abs().max() < 1e-14
        nearby = u.detach() + 0.01 * torch.randn_like(u)
        assert (velocity_nft_loss(nearby, u_old, target, r, beta=beta)["loss"] > loss).all()
    one = torch.ones(B, dtype=F64)
    u = target.clone().requires_grad_()
    assert gradient(velocity_nft_loss(u, u_old, target, one, beta=1.0)["loss"], u).abs().max() == 0
    u = (2 * u_old - target).requires_grad_()
    loss = velocity_nft_loss(u, u_old, target, 0 * one, beta=1.0)["loss"]
    assert gradient(loss, u).abs().max() < 1e-15


def test_indifferent_samples_are_a_trust_region():
    """r = ½: no gradient on-policy, 2β²(u − u_old)/D off-policy in the velocity form."""
    u, u_old, z_0, eps, t, _ = batch()
    half, target = torch.full((B,), 0.5, dtype=F64), FlowPath.velocity_target(z_0, eps)
    z_t = FlowPath.interpolate(z_0, eps, t)
    same = u_old.clone().requires_grad_()
    assert (
        gradient(velocity_nft_loss(same, u_old, target, half, beta=0.3)["loss"], same).abs().max()
        < 1e-16
    )
    assert (
        gradient(nft_loss(same, u_old, z_t, z_0, t, half, beta=0.3)["loss"], same).abs().max()
        < 1e-16
    )
    u.requires_grad_()
    found = gradient(velocity_nft_loss(u, u_old, target, half, beta=0.3)["loss"], u)
    assert torch.allclose(found, 2 * 0.3**2 * (u - u_old) / D, atol=1e-15)


def test_on_policy_gradient():
    """−(2tA/(Dw))(x_old − z_0): independent of β and A_max; the loss's value says nothing of r."""
    _, u_old, z_0, eps, t, a = batch()
    a = a.clamp(-2, 2)
    z_t = FlowPath.interpolate(z_0, eps, t)
    error = FlowPath.denoise(z_t, u_old, t) - z_0
    w = error.flatten(1).abs().mean(1)
    expected = -(2 * t * a / (D * w)).reshape(-1, 1, 1, 1) * error
    u = u_old.clone().requires_grad_()
    for beta in (0.1, 1.0):
        for adv_clip in (2.0, 5.0):
            r = optimality(a, adv_clip)
            terms = nft_loss(u, u_old, z_t, z_0, t, r, beta=beta, adv_clip=adv_clip)
            found = gradient(terms["loss"], u)
            assert torch.allclose(found, expected, rtol=1e-10, atol=1e-16)
            assert torch.allclose(found.flatten(1).abs().sum(1), 2 * t * a.abs())
            others = optimality(torch.zeros_like(a), adv_clip)
            blind = nft_loss(u, u_old, z_t, z_0, t, others, beta=beta, adv_clip=adv_clip)["loss"]
            assert torch.allclose(blind, terms["loss"], rtol=1e-12)
    # beyond A_max it saturates
    grads = [
        gradient(
            nft_loss(u, u_old, z_t, z_0, t, optimality(x * torch.ones_like(a)), beta=1.0)["loss"],
            u,
        )
        for x in (5.0, 50.0)
    ]
    assert torch.equal(*grads)


def test_reflection():
    """L(u_old + δ; r) = L(u_old − δ; 1 − r), in every form."""
    delta, u_old, z_0, eps, t, a = batch()
    r = optimality(a)
    z_t, target = FlowPath.interpolate(z_0, eps, t), FlowPath.velocity_target(z_0, eps)
    bridge = FlowPath.bridge(0.3 * t, t)
    point = bridge.interpolate(z_0, eps)
    for form in (
        lambda u, r: nft_loss(u, u_old, z_t, z_0, t, r, beta=0.7),
        lambda u, r: velocity_nft_loss(u, u_old, target, r, beta=0.7),
        lambda u, r: anchored_nft_loss(u, u_old, point, z_0, bridge, r, beta=0.7),
    ):
        assert torch.allclose(
            form(u_old + delta, r)["loss"], form(u_old - delta, 1 - r)["loss"], rtol=1e-12
        )


def test_weights_carry_no_gradient_and_are_clipped():
    """A perfect prediction: w = 1e-5, finite; and the gradient is that of the loss with w held fixed."""
    u, u_old, z_0, eps, t, a = batch()
    z_t, r, beta = FlowPath.interpolate(z_0, eps, t), optimality(a), 0.5
    perfect = FlowPath.velocity_target(z_0, eps).requires_grad_()
    terms = nft_loss(perfect, perfect.detach(), z_t, z_0, t, r, beta=beta)
    assert terms["loss"].max() < 1e-20 and gradient(terms["loss"], perfect).isfinite().all()
    # errors of 1e-7 are below the clip: the loss is their square over 1e-5
    near = (perfect.detach() + 1e-7 / t.reshape(-1, 1, 1, 1)).requires_grad_()
    loss = nft_loss(
        near, near.detach(), z_t, z_0, t, torch.ones(B, dtype=F64), beta=1.0, adv_clip=1.0
    )["loss"]
    assert torch.allclose(loss, torch.full_like(loss, 1e-14 / 1e-5), rtol=1e-6, atol=0)

    u.requires_grad_()
    found = gradient(nft_loss(u, u_old, z_t, z_0, t, r, beta=beta)["loss"], u)
    fixed = []
    for velocity in contrast(u, u_old, beta):
        error = (z_t - t.reshape(-1, 1, 1, 1) * velocity - z_0).flatten(1)
        fixed.append(error.square().mean(1) / error.detach().abs().mean(1))
    expected = gradient(5 * (r * fixed[0] + (1 - r) * fixed[1]) / beta, u)
    assert torch.allclose(found, expected, rtol=1e-12)


def test_old_policy_and_target_get_no_gradient():
    tensors = [x.requires_grad_() for x in batch()[:4]]
    u, u_old, z_0, eps = tensors
    t, r = torch.full((B,), 0.4, dtype=F64), torch.full((B,), 0.8, dtype=F64)
    bridge = FlowPath.bridge(torch.full_like(t, 0.2), t)
    z_t = bridge.interpolate(z_0, eps).detach()
    losses = [
        nft_loss(u, u_old, z_t, z_0, t, r, beta=1.0)["loss"],
        anchored_nft_loss(u, u_old, z_t, z_0, bridge, r, beta=1.0)["loss"],
        velocity_nft_loss(u, u_old, eps - z_0, r, beta=1.0)["loss"],
    ]
    for loss in losses:
        found = torch.autograd.grad(loss.sum(), tensors, allow_unused=True, retain_graph=True)
        assert found[0].abs().sum() > 0 and found[1:] == (None, None, None)


def test_regulariser():
    """R's gradient is 2λ(u − u_ref)/D, zero where both agree, and steps are averaged."""
    u, u_ref, other, _, _, _ = batch()
    u.requires_grad_()
    assert not output_regulariser(u.detach(), u_ref.clone().requires_grad_()).requires_grad
    r = output_regulariser(u, u_ref)
    assert torch.allclose(r, (u - u_ref).square().sum((1, 2, 3)) / D)
    assert torch.allclose(gradient(0.01 * r, u), 0.02 * (u - u_ref) / D, rtol=1e-12)
    same = u_ref.clone().requires_grad_()
    assert output_regulariser(same, u_ref).tolist() == [0.0] * B
    assert gradient(output_regulariser(same, u_ref), same).abs().max() == 0
    two = output_regulariser([u, other], [u_ref, u_ref])
    assert torch.allclose(two, (r + output_regulariser(other, u_ref)) / 2)
    assert output_regulariser(u.bfloat16(), u_ref.bfloat16()).dtype == torch.float32
    with pytest.raises(ValueError, match="one pair per step"):
        output_regulariser([u], [u_ref, u_ref])


# Value-anchored regression.


@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_anchored_at_the_clean_sample_is_the_plain_loss_bit_for_bit(dtype):
    _, u_old, z_0, eps, t, a = batch(dtype)
    r = optimality(a)
    bridge = FlowPath.bridge(torch.zeros_like(t), t)
    z_t = FlowPath.interpolate(z_0, eps, t)
    point = bridge.interpolate(z_0, eps)
    assert torch.equal(point, z_t)
    plain = (u_old + 0.1 * z_0).requires_grad_()
    anchored = plain.detach().clone().requires_grad_()
    first = nft_loss(plain, u_old, z_t, z_0, t, r, beta=0.1)
    second = anchored_nft_loss(anchored, u_old, point, z_0, bridge, r, beta=0.1)
    for name in ("loss", "positive", "negative"):
        assert torch.equal(first[name], second[name])
    assert torch.equal(gradient(first["loss"], plain), gradient(second["loss"], anchored))
    # the velocity form too
    targets = FlowPath.velocity_target(z_0, eps), bridge.velocity_target(z_0, eps)
    pair = [velocity_nft_loss(plain, u_old, x, r, beta=0.1)["loss"] for x in targets]
    assert torch.equal(*pair)


def test_anchored_on_policy_gradient():
    """ẑ_τ(u*) = z_τ, and the on-policy gradient's ℓ1 norm is 2b|A| with b = σ̄²(1 − τ)/t."""
    _, u_old, z_tau, eps, t, a = batch()
    a, tau = a.clamp(-5, 5), t * torch.linspace(0, 0.95, B, dtype=F64)
    bridge = FlowPath.bridge(tau, t)
    z_t = bridge.interpolate(z_tau, eps)
    assert torch.allclose(
        bridge.anchor(z_t, bridge.velocity_target(z_tau, eps)), z_tau, atol=1e-12
    )
    u = u_old.clone().requires_grad_()
    for beta in (0.1, 1.0):
        loss = anchored_nft_loss(u, u_old, z_t, z_tau, bridge, optimality(a), beta=beta)["loss"]
        norm = gradient(loss, u).flatten(1).abs().sum(1)
        sigma2 = t**2 - ((1 - t) / (1 - tau)) ** 2 * tau**2
        assert torch.allclose(norm, 2 * sigma2 * (1 - tau) / t * a.abs(), rtol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_anchored_loss_is_finite_up_to_the_anchor(dtype):
    """Where the velocity target is infinite (t = τ) or huge, value and gradient are finite, at t = τ zero."""
    z_tau, eps, u_old = (torch.randn(4, *SHAPE) for _ in range(3))
    tau = torch.full((4,), 0.6022)
    t = tau + torch.tensor([0.0, 6e-8, 1e-4, 0.3])
    bridge = FlowPath.bridge(tau, t)
    assert (bridge.sigma[1:] > 0).all() and bridge.sigma[0] == 0
    assert not bridge.velocity_target(z_tau, eps)[0].isfinite().any()
    z_t = bridge.interpolate(z_tau, eps)
    u = (u_old + 1).to(dtype).requires_grad_()
    r = torch.full((4,), 0.9)
    loss = anchored_nft_loss(u, u_old.to(dtype), z_t, z_tau, bridge, r, beta=1.0)["loss"]
    found = gradient(loss, u)
    assert loss.isfinite().all() and found.isfinite().all() and loss.dtype == torch.float32
    assert loss[0] == 0 and found[0].abs().max() == 0 and found[1:].abs().amax((1, 2, 3)).min() > 0
    # so is the σ̄-weighted velocity loss
    terms = velocity_nft_loss(
        u,
        u_old.to(dtype),
        bridge.scaled_velocity_target(z_tau, eps),
        r,
        beta=1.0,
        scale=bridge.sigma,
    )
    assert terms["loss"].isfinite().all() and gradient(terms["loss"], u).isfinite().all()


def test_scaled_velocity_form_is_the_weighted_one():
    u, u_old, z_tau, eps, t, a = batch()
    bridge, r = FlowPath.bridge(0.5 * t, t), optimality(a)
    plain = velocity_nft_loss(u, u_old, bridge.velocity_target(z_tau, eps), r, beta=0.3)["loss"]
    target = bridge.scaled_velocity_target(z_tau, eps)
    scaled = velocity_nft_loss(u, u_old, target, r, beta=0.3, scale=bridge.sigma)["loss"]
    assert torch.allclose(scaled, bridge.sigma**2 * plain, rtol=1e-11)


# The optimum in a world with a closed form.


def quadrature(mean: Tensor, variance: Tensor) -> tuple[Tensor, Tensor]:
    """Returns nodes (n, 1) and weights (n,) that integrate polynomials over N(mean, variance) exactly."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(20)
    weights = torch.from_numpy(weights / weights.sum())
    return mean.reshape(1, 1) + variance.reshape(1, 1).sqrt() * torch.from_numpy(nodes)[
        :, None
    ], weights


@pytest.mark.parametrize("tau", [0.0, 0.3, 0.6])
def test_optimum_is_the_guided_velocity(tau):
    """With r affine in the value at z_τ, the minimiser over everything that leads to z_t is u + (1/β)·c_t∇V.

    The world is Gaussian and the reward linear, so that this is the velocity of the tilted world to first order, and
    the same for every τ: a roll-out that stops early and asks the value teaches what a whole one does.
    """
    world = GaussianWorld(torch.tensor([0.7], dtype=F64), 0.5)
    reward = KnownReward.linear(torch.tensor([0.02], dtype=F64))
    z_t, t, beta = torch.tensor([[0.4]], dtype=F64), 0.8, 0.5
    posterior = world.posterior(z_t, t, tau)
    anchors, weights = quadrature(posterior.means[0, 0], posterior.variances[0])
    bridge = FlowPath.bridge(tau, t)
    eps = (z_t - bridge.alpha * anchors) / bridge.sigma
    value = world.value(anchors, tau, reward) if tau else reward(anchors)
    r = optimality(value - (weights * value).sum(), adv_clip=1.0)  # ½ + ½A, far from the clip
    u_old = world.velocity(z_t, t).expand(20, 1)
    target = bridge.velocity_target(anchors, eps)
    # E[u_{t|τ} | z_t] = u_t(z_t)
    assert torch.allclose((weights[:, None] * target).sum(0), u_old[0], atol=1e-12)

    guided = z_t.clone().requires_grad_()
    slope = torch.autograd.grad(world.value(guided, t, reward).sum(), guided)[0]
    best = (
        world.velocity(z_t, t) + FlowPath.score_coupling(torch.tensor(t, dtype=F64)) * slope / beta
    )
    u = best.clone().requires_grad_()
    for scale, aim in (
        (None, target),
        (bridge.sigma, bridge.scaled_velocity_target(anchors, eps)),
    ):
        loss = velocity_nft_loss(u.expand(20, 1), u_old, aim, r, beta=beta, scale=scale)["loss"]
        assert gradient(weights * loss, u).abs().max() < 1e-12
    tilted = world.tilt(reward, 1 / beta).velocity(z_t, t)
    assert torch.allclose(best, tilted, atol=1e-12)
    assert (best - u_old[:1]).abs() > 1e-3


def test_decays():
    assert [old_decay(s, 0) for s in (0, 1, 1000)] == [0, 0, 0]
    assert [old_decay(s, 1) for s in (0, 1, 100, 500, 1000)] == pytest.approx(
        [0, 0.001, 0.1, 0.5, 0.5]
    )
    found = [old_decay(s, 2) for s in (74, 75, 76, 208, 209, 1000)]
    assert found == pytest.approx([0, 0, 0.0075, 0.9975, 0.999, 0.999])
    assert [ema_decay(s) for s in (0, 1, 8, 80, 81, 500)] == pytest.approx(
        [0.1, 2 / 11, 0.5, 0.9, 0.9, 0.9]
    )
    assert ema_decay(500, limit=0.9999) == pytest.approx(501 / 510)
    with pytest.raises(ValueError, match="expected 0"):
        old_decay(1, 3)


def test_bad_input():
    u, u_old, z_0, eps, t, a = batch()
    r = optimality(a)
    with pytest.raises(ValueError, match="beta = 0"):
        nft_loss(u, u_old, z_0, z_0, t, r, beta=0)
    with pytest.raises(ValueError, match="one shape"):
        nft_loss(u, u_old[:1], z_0, z_0, t, r, beta=1.0)
    with pytest.raises(ValueError, match=r"and \(B,\)"):
        nft_loss(u, u_old, z_0, z_0, t, r[:, None], beta=1.0)
    with pytest.raises(ValueError, match="target"):
        velocity_nft_loss(u, u_old, eps[:1], r, beta=1.0)
    with pytest.raises(ValueError, match="positive_only"):
        optimality(a, mode="most")
    with pytest.raises(ValueError, match="adv_clip"):
        optimality(a, adv_clip=0.0)
