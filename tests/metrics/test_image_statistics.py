"""Image statistics against numbers by hand."""

from __future__ import annotations

import math

import pytest
import torch

from stitchvm.metrics.image_statistics import image_statistics


def flat(r: float, g: float, b: float, side: int = 4) -> torch.Tensor:
    return torch.tensor([r, g, b])[:, None, None].expand(3, side, side)


def test_flat_images():
    images = torch.stack([flat(1, 0, 0), flat(0.5, 0.5, 0.5), flat(0.2, 0.6, 0.4)])
    found = {name: x.tolist() for name, x in image_statistics(images).items()}
    assert found["saturation"] == pytest.approx([1.0, 0.0, 0.4])
    assert found["brightness"] == pytest.approx([0.299, 0.5, 0.0598 + 0.3522 + 0.0456])
    for name in ("edge_density", "colour_entropy"):
        assert found[name] == [0.0] * 3
    assert found["contrast"] == pytest.approx([0.0] * 3, abs=1e-6)


def test_two_halves():
    """An edge through the middle: 1 of 3 positions across it; half black, half white."""
    image = torch.zeros(1, 3, 4, 4)
    image[..., 2:] = 1
    found = {name: float(x) for name, x in image_statistics(image).items()}
    assert found["edge_density"] == pytest.approx(1 / 3)
    assert found["colour_entropy"] == pytest.approx(1.0)
    assert found["contrast"] == pytest.approx(0.5)
    assert found["saturation"] == 0.0


def test_entropy_of_unequal_shares_and_of_all_colours():
    image = torch.zeros(1, 3, 2, 2)
    image[:, 0, 0, 0] = 1  # one red pixel of four
    wanted = -(0.25 * math.log2(0.25) + 0.75 * math.log2(0.75))
    assert float(image_statistics(image)["colour_entropy"]) == pytest.approx(wanted)
    levels = (torch.arange(8) + 0.5) / 8
    grid = torch.stack(torch.meshgrid(levels, levels, levels, indexing="ij")).reshape(1, 3, 16, 32)
    assert float(image_statistics(grid)["colour_entropy"]) == pytest.approx(9.0)


def test_a_faint_edge_is_none():
    image = torch.full((1, 3, 4, 4), 0.5)
    image[..., 2:] = 0.59
    assert float(image_statistics(image)["edge_density"]) == 0.0
    image[..., 2:] = 0.62
    assert float(image_statistics(image)["edge_density"]) > 0.0


def test_eight_bits_are_the_same():
    pixels = torch.randint(0, 256, (3, 3, 8, 8), dtype=torch.uint8)
    for name, x in image_statistics(pixels).items():
        assert torch.equal(x, image_statistics(pixels.float() / 255)[name]), name
        assert x.shape == (3,)


@pytest.mark.parametrize("shape", [(3, 8, 8), (1, 1, 8, 8), (1, 3, 1, 8)])
def test_other_shapes_are_refused(shape):
    with pytest.raises(ValueError, match=r"expected \(B, 3, H, W\)"):
        image_statistics(torch.zeros(shape))
