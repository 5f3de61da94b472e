"""The flow's conversions and the bridge against the general Eq. 13-20, finite differences and limits."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from stitchvm.path import Bridge, FlowPath

PATH = FlowPath()
LEVELS = torch.tensor([0.05, 0.3, 0.5, 0.8, 0.97], dtype=torch.float64)


def latents(*shape: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    draw = torch.randn(2, *shape, dtype=torch.float64, generator=generator)
    return draw[0], draw[1]


def test_conditional_velocity_is_the_time_derivative_of_the_path() -> None:
    z_0, eps = latents(5, 2, 3)
    step = 1e-6
    later = PATH.interpolate(z_0, eps, LEVELS + step)
    earlier = PATH.interpolate(z_0, eps, LEVELS - step)
    torch.testing.assert_close(
        PATH.velocity_target(z_0, eps), (later - earlier) / (2 * step), rtol=1e-8, atol=1e-8
    )


def test_conversions_equal_the_general_formulas() -> None:
    z_t, u = latents(5, 2, 3)
    t = LEVELS.reshape(-1, 1, 1)
    a, s, da, ds = PATH.alpha(t), PATH.sigma(t), PATH.d_alpha(t), PATH.d_sigma(t)
    d = (s * u - ds * z_t) / (da * s - a * ds)  # Eq. (17)
    score = (a * d - z_t) / s**2  # Eq. (18)
    torch.testing.assert_close(PATH.denoise(z_t, u, LEVELS), d)
    torch.testing.assert_close(PATH.score(z_t, u, LEVELS), score)
    torch.testing.assert_close(PATH.score_from_denoised(z_t, d, LEVELS), score)
    torch.testing.assert_close(PATH.denoise_from_score(z_t, score, LEVELS), d)
    torch.testing.assert_close(ds / s * z_t + (da - a * ds / s) * d, u)  # Eq. (16)
    coupling = s * (da * s - a * ds) / a  # Eq. (20)
    torch.testing.assert_close(PATH.score_coupling(t), coupling)
    torch.testing.assert_close(da / a * z_t + coupling * score, u)  # Eq. (19)
    # the path through the predicted data and noise passes z_t
    torch.testing.assert_close(a * d + s * PATH.noise(z_t, u, LEVELS), z_t)


@pytest.mark.parametrize("level", ["scalar", "number", "batch"])
def test_round_trips(level: str) -> None:
    z_t, u = latents(5, 2, 3)
    t = {"scalar": torch.tensor(0.3), "number": 0.3, "batch": LEVELS}[level]
    for there, back in (
        (PATH.denoise, PATH.velocity_from_denoised),
        (PATH.noise, PATH.velocity_from_noise),
        (PATH.score, PATH.velocity_from_score),
    ):
        torch.testing.assert_close(back(z_t, there(z_t, u, t), t), u)


def test_conditional_conversions_recover_data_and_noise() -> None:
    z_0, eps = latents(5, 4)
    z_t, u = PATH.interpolate(z_0, eps, LEVELS), PATH.velocity_target(z_0, eps)
    torch.testing.assert_close(PATH.denoise(z_t, u, LEVELS), z_0)
    torch.testing.assert_close(PATH.noise(z_t, u, LEVELS), eps)
    score = -eps / LEVELS[:, None]  # of N(α z_0, σ² I)
    torch.testing.assert_close(PATH.score(z_t, u, LEVELS), score)


def test_end_points() -> None:
    z, u = latents(3, 2)
    assert torch.equal(PATH.interpolate(z, u, 0.0), z)
    assert torch.equal(PATH.interpolate(z, u, 1.0), u)
    assert torch.equal(PATH.denoise(z, u, 0.0), z)
    assert torch.equal(PATH.denoise(z, u, 1.0), z - u)
    assert torch.equal(PATH.noise(z, u, 1.0), z)
    assert torch.equal(PATH.score(z, u, 1.0), -z)
    assert torch.equal(PATH.velocity_from_denoised(z, z, 0.0), -z)
    assert torch.equal(PATH.velocity_from_score(z, u, 0.0), -z)
    assert not PATH.score(z, u, 0.0).isfinite().any()
    assert not PATH.velocity_from_noise(z, u, 1.0).isfinite().any()
    assert not PATH.velocity_from_score(z, u, 1.0).isfinite().any()
    assert not PATH.denoise_from_score(z, u, 1.0).isfinite().any()


def test_the_gradient_of_a_batch_that_touches_zero_is_finite() -> None:
    z, d = latents(2, 3)
    d.requires_grad_()
    t = torch.tensor([0.0, 0.5])
    PATH.velocity_from_denoised(z, d, t).sum().backward()
    torch.testing.assert_close(d.grad, torch.tensor([[0.0], [-2.0]]).expand(2, 3).double())


def test_arithmetic_is_in_float32_or_better() -> None:
    z_0, eps = latents(4, 8)
    t = torch.full((4,), 0.123456789, dtype=torch.float64)
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        low = PATH.interpolate(z_0.to(dtype), eps.to(dtype), t)
        assert low.dtype == torch.float32
        exact = PATH.interpolate(z_0.to(dtype).double(), eps.to(dtype).double(), t)
        assert exact.dtype == torch.float64
        torch.testing.assert_close(low.double(), exact, rtol=1e-6, atol=1e-6)
    assert PATH.denoise(z_0.bfloat16(), eps, 0.5).dtype == torch.float64


@pytest.mark.parametrize(
    ("z_shape", "t", "message"),
    [
        ((3, 2), torch.zeros(2), "one level per latent"),
        ((3, 2), torch.zeros(3, 1), "reshape"),
        ((3, 2), 500.0, "1000"),
        ((3, 2), -0.1, "noise level"),
    ],
)
def test_bad_levels_are_named(z_shape: tuple[int, ...], t: Tensor | float, message: str) -> None:
    z = torch.zeros(z_shape)
    with pytest.raises(ValueError, match=message):
        PATH.denoise(z, z, t)


def test_latents_of_different_shapes_are_not_broadcast() -> None:
    with pytest.raises(ValueError, match=r"\(3, 2\) and \(1, 2\)"):
        PATH.interpolate(torch.zeros(3, 2), torch.zeros(1, 2), 0.5)


def test_bridge_coefficients_are_the_formulas_and_their_derivatives() -> None:
    tau, step = 0.3, 1e-6
    t = torch.tensor([0.31, 0.5, 0.9, 1.0 - 2e-6], dtype=torch.float64)
    bridge = PATH.bridge(tau, t)
    torch.testing.assert_close(bridge.alpha, (1 - t) / (1 - tau))
    torch.testing.assert_close(bridge.sigma, (t**2 - bridge.alpha**2 * tau**2).sqrt())
    later, earlier = PATH.bridge(tau, t + step), PATH.bridge(tau, t - step)
    torch.testing.assert_close(
        bridge.d_alpha, (later.alpha - earlier.alpha) / (2 * step), rtol=1e-7, atol=0
    )
    torch.testing.assert_close(
        bridge.d_sigma, (later.sigma - earlier.sigma) / (2 * step), rtol=1e-7, atol=0
    )
    torch.testing.assert_close(bridge.sigma_d_sigma, bridge.sigma * bridge.d_sigma)
    # what makes the bridge's marginal velocity the flow's own
    torch.testing.assert_close(
        bridge.d_alpha / bridge.alpha * bridge.sigma**2 - bridge.sigma_d_sigma,
        -1 / (1 - t) * t**2 - t,
        rtol=1e-9,
        atol=0,
    )


def test_bridges_compose() -> None:
    first, second, whole = PATH.bridge(0.2, 0.5), PATH.bridge(0.5, 0.8), PATH.bridge(0.2, 0.8)
    torch.testing.assert_close(second.alpha * first.alpha, whole.alpha)
    variance = (second.alpha * first.sigma) ** 2 + second.sigma**2
    torch.testing.assert_close(variance, whole.sigma**2)


def bridge_sample(tau: Tensor | float, t: Tensor | float) -> tuple[Bridge, Tensor, Tensor]:
    z_tau, eps = latents(5, 2, 3)
    return PATH.bridge(tau, t), z_tau, eps


def test_the_anchor_of_the_bridge_velocity_is_the_anchor() -> None:
    bridge, z_tau, eps = bridge_sample(0.6 * LEVELS, LEVELS)
    z_t, target = bridge.interpolate(z_tau, eps), bridge.velocity_target(z_tau, eps)
    torch.testing.assert_close(bridge.anchor(z_t, target), z_tau)
    torch.testing.assert_close(
        bridge.scaled_velocity_target(z_tau, eps), bridge.sigma[:, None, None] * target
    )
    # for any velocity the two errors differ by the weight b alone
    u = torch.randn(5, 2, 3, dtype=torch.float64)
    weight = bridge.anchor_weight[:, None, None]
    torch.testing.assert_close(bridge.anchor(z_t, u) - z_tau, -weight * (u - target))
    torch.testing.assert_close(bridge.anchor_weight, bridge.sigma**2 * (1 - bridge.tau) / bridge.t)


def test_the_bridge_from_clean_data_is_the_flow() -> None:
    for t in (LEVELS, torch.tensor(0.0), torch.tensor(1.0)):
        bridge, z_0, eps = bridge_sample(0.0, t)
        z_t = PATH.interpolate(z_0, eps, t)
        torch.testing.assert_close(bridge.interpolate(z_0, eps), z_t)
        torch.testing.assert_close(
            bridge.velocity_target(z_0, eps), PATH.velocity_target(z_0, eps)
        )
        torch.testing.assert_close(bridge.anchor(z_t, eps), PATH.denoise(z_t, eps, t))


def test_the_anchor_stays_finite_where_the_velocity_explodes() -> None:
    tau = torch.full((5,), 0.4)
    t = tau + torch.tensor([0.0, 1e-7, 1e-4, 0.1, 0.6])
    bridge, z_tau, eps = bridge_sample(tau, t)
    assert bridge.d_sigma[0] == torch.inf
    assert torch.equal(bridge.interpolate(z_tau, eps)[0], z_tau[0])
    z_t = bridge.interpolate(z_tau, eps)
    assert torch.equal(bridge.anchor(z_t, eps)[0], z_t[0])
    torch.testing.assert_close(bridge.anchor(z_t, eps)[4], 0.6 * (z_t - eps)[4])
    assert bridge.scaled_velocity_target(z_tau, eps).isfinite().all()
    assert bridge.anchor_weight.isfinite().all() and bridge.anchor_weight[0] == 0
    # float32 levels a hair apart keep their digits: no cancellation in σ̄
    exact = PATH.bridge(tau.double(), t.double())
    torch.testing.assert_close(bridge.sigma.double(), exact.sigma, rtol=1e-5, atol=0)


@pytest.mark.parametrize(("tau", "t"), [(0.5, 0.4), (1.0, 1.0), (-0.1, 0.5), (0.1, 1.5)])
def test_a_bridge_backwards_is_an_error(tau: float, t: float) -> None:
    with pytest.raises(ValueError, match="swapped"):
        PATH.bridge(tau, t)


def test_bridge_levels_of_two_batches_are_an_error() -> None:
    with pytest.raises(ValueError, match="one shape"):
        PATH.bridge(torch.zeros(2), torch.ones(3))
