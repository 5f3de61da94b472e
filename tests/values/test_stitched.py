"""The stitched value's own settings; that it is the value model, and what it shares, is tested beside."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.nn.functional import cosine_similarity

from stitchvm.generator import Generator
from stitchvm.rewards.clip import CLIPReward
from stitchvm.samplers.field import Field
from stitchvm.value_model import StitchedValueModel
from stitchvm.values.parts import Parts
from stitchvm.values.stitched import StitchedFactory

PROMPTS = ["a red circle", "a blue square left of the red circle"]


def test_stitch_and_tail_in_a_dtype_of_their_own(
    tiny_sd3: Path, tiny_clip: Path, tmp_path: Path
) -> None:
    generator = Generator(str(tiny_sd3), text_tokens=12, guidance_scale=4.5)
    reward = CLIPReward(model=f"local-dir:{tiny_clip}")
    whole = Generator(str(tiny_sd3), text_tokens=12)
    backbone = whole.null_branch()
    backbone.init_args["null_tokens"] = 12
    model = StitchedValueModel(backbone, reward, (2, 1))
    torch.nn.init.normal_(model.stitch.F.weight, std=0.3)
    folder = str(model.save_pretrained(tmp_path / "value"))

    def found(dtype: str | None) -> tuple[torch.Tensor, torch.Tensor]:
        parts = Parts(lambda: reward, lambda: generator)
        value = StitchedFactory(folder, share_generator=True, dtype=dtype)(parts)
        cast = value.value_model
        wanted = torch.bfloat16 if dtype else torch.float32
        assert {p.dtype for m in (cast.stitch, cast.tail) for p in m.parameters()} == {wanted}
        assert {p.dtype for p in reward.visual.parameters()} == {torch.float32}
        field = Field(generator, PROMPTS, None, value.bind(PROMPTS))
        assert field.depths == (2,)
        v, gradient, _ = field.value_gradient(z, torch.tensor(0.6), torch.tensor([0, 0, 1, 1]))
        assert v.dtype == gradient.dtype == torch.float32
        return v, gradient

    z = torch.randn(4, 4, 8, 8)
    (v, gradient), (v_cast, gradient_cast) = found(None), found("bfloat16")
    assert not torch.equal(v, v_cast)
    assert torch.allclose(v, v_cast, atol=0.01)
    assert cosine_similarity(gradient.flatten(1), gradient_cast.flatten(1)).min() > 0.99
    with pytest.raises(ValueError, match="expected one of float32, bfloat16, float16"):
        StitchedFactory(folder, dtype="half")
