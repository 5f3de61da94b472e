"""DRaFT's loss by hand, its gradient against closed forms, and DRaFT-LV's pieces."""

import pytest
import torch

from stitchvm.objectives.draft import draft_loss, renoise
from stitchvm.objectives.regulariser import output_regulariser
from stitchvm.path import FlowPath
from stitchvm.schedule import sigma_grid
from stitchvm.world.closed_form import KnownReward

F64 = torch.float64


def test_by_hand():
    value = torch.tensor([0.3, 0.7], requires_grad=True)
    terms = draft_loss(value, torch.tensor([2.0, 4.0]), lam=0.01)
    assert terms["loss"].tolist() == pytest.approx([-0.28, -0.66])
    assert terms["active"].item() == 1.0
    assert torch.autograd.grad(terms["loss"].sum(), value)[0].tolist() == [-1.0, -1.0]
    assert draft_loss(value, lam=0.0)["loss"].tolist() == pytest.approx([-0.3, -0.7])
    # max(.55 − V, 0): the second sample is good enough
    terms = draft_loss(value, torch.tensor([2.0, 4.0]), lam=0.01, ceiling=0.55)
    assert terms["loss"].tolist() == pytest.approx([0.27, 0.04])
    assert terms["active"].item() == 0.5
    assert torch.autograd.grad(terms["loss"].sum(), value)[0].tolist() == [-1.0, 0.0]


@pytest.mark.parametrize("kind", ["single", "double"])
def test_gradient_of_the_last_step_is_its_length_times_the_value_slope(kind):
    """d(−r)/du = (t − τ)·∇r: .0089 of it on diffusers' 10-step schedule, .25 on the textbook's."""
    sigmas = sigma_grid(10, shift=3.0, kind=kind).double()
    reward = KnownReward.quadratic(torch.randn(4, dtype=F64), k=2.0)
    for stop in (3, 7, 10):
        t, tau = sigmas[stop - 1], sigmas[stop]
        z_t, u = torch.randn(2, 3, 4, dtype=F64).unbind(0)
        u.requires_grad_()
        z_tau = z_t + (tau - t) * u
        loss = draft_loss(reward(z_tau), lam=0.0)["loss"].sum()
        found = torch.autograd.grad(loss, u)[0]
        slope = -2.0 * (z_tau - reward.y)
        assert torch.allclose(found, (t - tau) * slope)
    last = {"single": 0.25, "double": 0.0089}[kind]
    assert sigmas[9].item() == pytest.approx(last, abs=5e-5)


def test_regulariser_at_the_start():
    """u_θ = u_θ0: R = 0 with gradient 0, and all of the loss's gradient is the value's."""
    u_ref = torch.randn(2, 3, 4, dtype=F64)
    u = u_ref.clone().requires_grad_()
    r = output_regulariser([u, u], [u_ref, u_ref])
    assert r.tolist() == [0.0, 0.0]
    value = u.flatten(1).sum(1)
    grads = [
        torch.autograd.grad(draft_loss(value, x, lam=y)["loss"].sum(), u, retain_graph=True)[0]
        for x, y in ((r, 0.5), (None, 0.0))
    ]
    assert torch.equal(*grads) and torch.equal(grads[0], -torch.ones_like(u))


def test_low_variance_pieces():
    z_0, eps = torch.randn(2, 3, 4, dtype=F64).unbind(0)
    z_0.requires_grad_()
    # at τ = 0 the literature's (1 − σ)·sg(x_0) + σε
    again = renoise(z_0, 0.0, 0.25, eps)
    assert torch.allclose(again, 0.75 * z_0 + 0.25 * eps, atol=1e-15) and not again.requires_grad
    # above it the bridge: the same law of z_t as a roll-out's, since z_τ is a point of the path
    z_tau = FlowPath.interpolate(z_0.detach(), torch.randn_like(eps), 0.4)
    bridge = FlowPath.bridge(0.4, 0.6)
    expected = bridge.alpha * z_tau + bridge.sigma * eps
    assert torch.equal(renoise(z_tau, 0.4, 0.6, eps), expected)
    # the value is the mean over the original and its copies; with none it is DRaFT-1
    values = torch.tensor([[0.1, 0.2], [0.3, 0.8], [0.2, 0.2]], dtype=F64, requires_grad=True)
    loss = draft_loss(values, lam=0.0)["loss"]
    assert loss.tolist() == pytest.approx([-0.2, -0.4])
    assert torch.equal(
        draft_loss(values[:1], lam=0.0)["loss"], draft_loss(values[0], lam=0.0)["loss"]
    )


def test_bad_input():
    with pytest.raises(ValueError, match="lam=0 to go without"):
        draft_loss(torch.ones(2))
    with pytest.raises(ValueError, match="expected lam ≥ 0"):
        draft_loss(torch.ones(2), torch.ones(2), lam=-1.0)
    with pytest.raises(ValueError, match=r"\(1 \+ n, B\)"):
        draft_loss(torch.ones(2), torch.ones(3))
