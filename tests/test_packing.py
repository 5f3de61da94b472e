"""int8 rows: the error's bound, what stays as it is, a value model through it."""

from __future__ import annotations

import pytest
import torch

from stitchvm.backbones.latent import LatentBackbone
from stitchvm.packing import pack, unpack
from stitchvm.rewards.clip import CLIPReward
from stitchvm.value_model import StitchedValueModel


def test_rounding_is_within_half_a_step_of_each_row() -> None:
    W = torch.randn(64, 128) * torch.logspace(-3, 2, 64)[:, None]
    conv = torch.randn(96, 64, 1, 1)
    state = {"a.weight": W, "b.weight": conv, "a.bias": torch.randn(64), "small.weight": W[:2]}
    packed = pack(state)
    assert packed["a.weight"].dtype == torch.int8 and packed["b.weight"].shape == conv.shape
    assert packed["a.bias"].dtype == packed["small.weight"].dtype == torch.float16
    back = unpack(packed)
    assert back.keys() == state.keys()
    for name in ("a.weight", "b.weight"):
        rows, error = state[name].flatten(1), (back[name] - state[name]).flatten(1).abs()
        assert torch.all(error.amax(1) <= rows.abs().amax(1) / 254 * 1.0001)
    size = sum(v.numel() * v.element_size() for v in packed.values())
    assert size < 0.6 * sum(2 * v.numel() for v in state.values())
    again = unpack(state)
    assert all(again[name] is state[name] for name in state)


def test_rows_of_zeros_and_missing_scales() -> None:
    packed = pack({"a.weight": torch.zeros(64, 128)})
    assert torch.equal(unpack(packed)["a.weight"], torch.zeros(64, 128))
    del packed["a.weight.scale"]
    with pytest.raises(ValueError, match=r"there is no a\.weight\.scale with shape \(64,\)"):
        unpack(packed)


def test_a_value_model_is_read_from_a_packed_folder(tiny_clip, tmp_path) -> None:
    reward = CLIPReward(model=f"local-dir:{tiny_clip}")
    model = StitchedValueModel(LatentBackbone(4), reward, (0, 1)).eval()
    plain = model.save_pretrained(tmp_path / "plain")
    small = model.save_pretrained(tmp_path / "small", state=pack(model.trainable()))
    sizes = [(folder / "model.safetensors").stat().st_size for folder in (plain, small)]
    assert sizes[1] < 0.5 * sizes[0]
    z_t, t = torch.randn(3, 4, 8, 8), torch.tensor([0.1, 0.5, 0.9])
    loaded = StitchedValueModel.from_pretrained(small)
    for got, expected in zip(loaded(z_t, t), model(z_t, t), strict=True):
        assert 0 < (got - expected).norm() < 0.02 * expected.norm()
