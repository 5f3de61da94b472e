"""Tests of the identity backbone."""

from __future__ import annotations

import pytest
import torch

from stitchvm.backbones.latent import LatentBackbone


def test_it_is_the_identity() -> None:
    backbone = LatentBackbone(4)
    z_t, t = torch.randn(2, 4, 6, 5), torch.rand(2)
    assert torch.equal(backbone(z_t, t, 0), z_t)
    assert torch.equal(backbone.features(z_t, t, [0])[0], z_t)
    assert torch.equal(backbone.prefix(z_t, t, 0).features(), z_t)
    assert (backbone.num_blocks, backbone.loaded_blocks, backbone.width(0)) == (0, 0, 4)
    assert backbone.flops((64, 64), 0) == 0
    assert LatentBackbone(**backbone.init_args).latent_channels == 4


def test_bad_input() -> None:
    backbone = LatentBackbone(4)
    z_t, t = torch.randn(2, 4, 6, 5), torch.rand(2)
    with pytest.raises(ValueError, match=r"depth 1 of latent: expected 0 ... 0"):
        backbone(z_t, t, 1)
    with pytest.raises(ValueError, match="expected 4 channels for latent"):
        backbone(torch.randn(2, 16, 6, 5), t, 0)
    with pytest.raises(ValueError, match="use the velocity of a Generator"):
        backbone.suffix(backbone.prefix(z_t, t, 0))
    with pytest.raises(ValueError, match="no blocks"):
        backbone.advance(backbone.prefix(z_t, t, 0))
    with pytest.raises(ValueError, match="channels = 0"):
        LatentBackbone(0)
    with pytest.raises(ValueError, match="no depths"):
        backbone.features(z_t, t, [])
    with pytest.raises(ValueError, match="expected floating point"):
        backbone(z_t.long(), t, 0)
