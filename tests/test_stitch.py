"""The stitching layer: the closed-form start, the resampling and its commuting with F, gradients."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

from stitchvm.stitch import StitchLayer, up

SIZES = [(8, 8), (4, 4), (16, 16), (3, 17), (6, 8), (24, 5)]


def features(size: tuple[int, int], width: int = 6) -> Tensor:
    return torch.randn(2, width, *size, generator=torch.Generator().manual_seed(2))


def stitch(grid: tuple[int, int] = (8, 8)) -> StitchLayer:
    generator = torch.Generator().manual_seed(3)
    layer = StitchLayer(6, 16, grid)
    layer.init_closed_form(
        torch.randn(16, 6, dtype=torch.float64, generator=generator),
        torch.randn(16, generator=generator),
    )
    return layer


@pytest.mark.parametrize("size", SIZES)
def test_the_start_is_the_linear_map_resampled_in_either_order(size: tuple[int, int]) -> None:
    layer, h = stitch(), features(size)
    W, b = layer.F.weight[:, :, 0, 0], layer.F.bias
    mapped = torch.einsum("oi,bihw->bohw", W, h) + b[:, None, None]
    resampled = torch.einsum("oi,bihw->bohw", W, up(h, (8, 8))) + b[:, None, None]
    assert layer(h).shape == (2, 16, 8, 8)
    torch.testing.assert_close(layer(h), up(mapped, (8, 8)), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(layer(h), resampled, rtol=1e-5, atol=1e-5)


def test_up_keeps_constants_and_planes_and_every_cell_counts() -> None:
    assert torch.equal(up(features((8, 8)), (8, 8)), features((8, 8)))
    for grid in SIZES:
        torch.testing.assert_close(up(torch.ones(1, 1, 7, 9), grid), torch.ones(1, 1, *grid))
    # halving averages over the widened triangle; a plane stays a plane away from the border
    plane = torch.arange(16.0).expand(1, 1, 16, 16)
    torch.testing.assert_close(up(plane, (4, 4))[0, 0, 0, 1:3], torch.tensor([5.5, 9.5]))
    h = torch.zeros(1, 1, 64, 64, requires_grad=True)
    up(h, (24, 24)).sum().backward()
    assert (h.grad > 0.01).all()
    plain = functional.interpolate(features((4, 4)), size=(7, 9), mode="bilinear")
    torch.testing.assert_close(up(features((4, 4)), (7, 9)), plain)


def test_the_residual_is_the_formula() -> None:
    layer, h = stitch(), features((8, 8))
    torch.nn.init.normal_(layer.G.expand.weight)
    x = layer.F(h)
    hidden = functional.silu(layer.G.reduce(functional.silu(x)))
    torch.testing.assert_close(layer(h), x + layer.G.expand(hidden))
    assert layer.G.reduce.out_channels == 2  # 1:8


def test_training_moves_both_parts() -> None:
    layer, h = stitch(), features((12, 12))
    before = layer(h).detach()
    for _ in range(2):  # G's first convolution gets a gradient once its last is not zero
        layer.zero_grad()
        layer(h).square().mean().backward()
        with torch.no_grad():
            for parameter in layer.parameters():
                parameter -= 0.1 * parameter.grad
    assert all(p.grad.abs().sum() > 0 for p in layer.parameters())
    assert layer(h).square().mean() < before.square().mean()


def test_the_gradient_reaches_the_features() -> None:
    layer = stitch((3, 4)).double()
    torch.nn.init.normal_(layer.G.expand.weight)
    h = features((4, 3)).double().requires_grad_()
    assert torch.autograd.gradcheck(layer, h)


def test_an_intercept_is_optional_and_a_second_fit_starts_over() -> None:
    layer = stitch()
    torch.nn.init.normal_(layer.G.expand.weight)
    layer.init_closed_form(torch.zeros(16, 6))
    assert layer(features((5, 5))).abs().max() == 0


@pytest.mark.parametrize("size", [(4, 4), (16, 16)])
def test_low_precision(size: tuple[int, int]) -> None:
    layer, h = stitch(), features(size)
    exact = layer(h)
    assert layer(h.bfloat16()).dtype == torch.float32
    torch.testing.assert_close(layer(h.bfloat16()), exact, rtol=0.02, atol=0.05)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = layer(h.bfloat16())
    assert mixed.dtype == torch.bfloat16
    torch.testing.assert_close(mixed.float(), exact, rtol=0.03, atol=0.1)
    assert all(parameter.dtype == torch.float32 for parameter in layer.parameters())


@pytest.mark.parametrize("size", [(4, 4), (8, 8), (16, 16)])
def test_flops_are_those_of_the_convolutions(size: tuple[int, int]) -> None:
    layer = stitch()
    with FlopCounterMode(display=False) as counter:
        layer(features(size)[:1])
    assert layer.flops(size) == counter.get_total_flops()


@pytest.mark.parametrize(
    ("W", "b", "message"),
    [
        (torch.zeros(6, 16), None, "transposed"),
        (torch.zeros(16, 7), None, r"\(16, 7\).*\(16, 6\)"),
        (torch.zeros(16, 6), torch.zeros(6), r"\(16,\)"),
        (torch.full((16, 6), torch.nan), None, "finite"),
    ],
)
def test_a_map_that_does_not_fit_is_named(W: Tensor, b: Tensor | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        stitch().init_closed_form(W, b)


def test_features_of_another_width_are_named() -> None:
    with pytest.raises(ValueError, match="another backbone"):
        stitch()(features((8, 8), width=5))
    with pytest.raises(ValueError, match="positive"):
        StitchLayer(0, 16, (8, 8))
