"""StitchedValueModel: forward, saving and loading, and what does not belong together."""

from __future__ import annotations

import json
from contextlib import nullcontext

import pytest
import torch

from stitchvm.backbones.latent import LatentBackbone
from stitchvm.backbones.sd3 import SD3Backbone
from stitchvm.generator import Generator
from stitchvm.rewards.clip import CLIPReward
from stitchvm.value_model import StitchedValueModel
from stitchvm.values.stitched import StitchedValue
from tests.pretend_cuda import pretend_cuda


@pytest.fixture(scope="module")
def parts(tiny_sd3, tiny_clip):
    backbone = SD3Backbone(str(tiny_sd3), max_depth=3, dtype="float32", null_tokens=4)
    return backbone, CLIPReward(model=f"local-dir:{tiny_clip}")


@pytest.fixture
def model(parts):
    backbone, reward = parts
    made = StitchedValueModel(backbone, reward, (2, 2))
    with torch.no_grad():
        for value in made.trainable().values():
            value.add_(0.01 * torch.randn_like(value))
    return made


@pytest.fixture
def noisy():
    return torch.randn(3, 4, 8, 8), torch.tensor([0.1, 0.5, 0.9])


def test_forward_is_tail_of_stitch_of_backbone(model, noisy):
    z_t, t = noisy
    by_hand = model.tail(model.stitch(model.backbone(z_t, t, 2)))
    for got, expected in zip(model(z_t, t), by_hand, strict=True):
        assert torch.equal(got, expected)


def test_value_is_the_cosine_and_differentiable_in_the_latent(model, noisy):
    z_t, t = noisy
    z_t = z_t.requires_grad_()
    text = model.reward.encode_text(["a red circle", "a blue square", "and"])
    value = model.value(z_t, t, text)
    e = torch.nn.functional.normalize(model(z_t, t).image, dim=-1)
    torch.testing.assert_close(value, (e * text).sum(-1))
    (gradient,) = torch.autograd.grad(value.sum(), z_t)
    assert gradient.shape == z_t.shape and float(gradient.abs().min(0)[0].max()) > 0


def test_round_trip_is_exact_and_small(model, noisy, tmp_path):
    folder = model.save_pretrained(tmp_path / "value")
    loaded = StitchedValueModel.from_pretrained(folder)
    for got, expected in zip(loaded(*noisy), model.eval()(*noisy), strict=True):
        assert torch.equal(got, expected)
    trained = sum(v.numel() * v.element_size() for v in model.trainable().values())
    assert (folder / "model.safetensors").stat().st_size < 1.2 * trained + 20_000
    config = json.loads((folder / "config.json").read_text())
    assert config["stitch_point"] == [2, 2]
    assert config["backbone"]["init_args"]["max_depth"] == 2
    assert loaded.backbone.loaded_blocks == 2


def test_shares_given_parts(model, parts, tmp_path):
    folder = model.save_pretrained(tmp_path / "value")
    loaded = StitchedValueModel.from_pretrained(folder, reward=parts[1])
    assert loaded.reward is parts[1]


def test_a_vae_stitch_tells_a_given_backbone_whose_latents_it_reads(parts, tmp_path):
    made = StitchedValueModel(LatentBackbone(4, scale=1.5, shift=0.1), parts[1], (0, 1))
    folder = made.save_pretrained(tmp_path / "value")
    given = LatentBackbone(4)
    assert given.scaling is None
    StitchedValueModel.from_pretrained(folder, backbone=given, reward=parts[1])
    assert given.scaling == (1.5, 0.1)


def test_what_it_shares_stays_where_it_is(model, tiny_clip, tmp_path):
    folder = model.save_pretrained(tmp_path / "value")
    reward = CLIPReward(model=f"local-dir:{tiny_clip}")
    with pretend_cuda():
        loaded = StitchedValueModel.from_pretrained(folder, reward=reward.to("cuda"))
        everything = [*loaded.parameters(), *reward.parameters()]
        assert {p.device.type for p in everything} == {"cuda"}
        loaded = StitchedValueModel.from_pretrained(folder, reward=reward, device="cpu")
        assert {p.device.type for p in reward.parameters()} == {"cpu"}


def test_on_a_borrowed_transformer_it_is_saved_as_it_was(model, tiny_sd3, tmp_path):
    folder = model.save_pretrained(tmp_path / "value")
    generator = Generator(str(tiny_sd3), text_tokens=256)
    borrowing = StitchedValue.from_pretrained(folder, generator).value_model
    assert borrowing.backbone.borrowed
    again = borrowing.save_pretrained(tmp_path / "again")
    assert (again / "config.json").read_text() == (folder / "config.json").read_text()


def test_nothing_is_written_over(model, tmp_path):
    model.save_pretrained(tmp_path)
    with pytest.raises(FileExistsError, match="overwrite=True"):
        model.save_pretrained(tmp_path)
    model.save_pretrained(tmp_path, overwrite=True)


@pytest.mark.parametrize("name", ["config.json", "README.md"])
def test_nor_are_files_of_somebody_else(model, tmp_path, name):
    (tmp_path / name).write_text("mine")
    with pytest.raises(FileExistsError, match=f"already holds {name}; choose another folder"):
        model.save_pretrained(tmp_path)
    assert (tmp_path / name).read_text() == "mine" and len(list(tmp_path.iterdir())) == 1


def test_a_config_that_names_no_backbone_is_not_called(model, tmp_path):
    folder = model.save_pretrained(tmp_path / "value")
    config = json.loads((folder / "config.json").read_text())
    for kind in ("backbone", "reward"):
        spec = {
            "class_path": "subprocess.getoutput",
            "init_args": {"cmd": f"touch {tmp_path / kind}"},
        }
        changed = config | {kind: spec | {"fingerprint": ""}}
        (folder / "config.json").write_text(json.dumps(changed))
        with pytest.raises(ValueError, match=rf"'subprocess\.getoutput' is no {kind.title()}"):
            StitchedValueModel.from_pretrained(folder)
        assert not (tmp_path / kind).exists()


def test_another_backbone_or_reward_is_refused(model, tmp_path, tiny_sd3, tiny_clip):
    folder = model.save_pretrained(tmp_path / "value")
    backbone = SD3Backbone(str(tiny_sd3), max_depth=2, dtype="float32", null_tokens=4)
    with torch.no_grad():
        next(backbone.parameters()).add_(0.1)
    with pytest.raises(ValueError, match="trained on the backbone"):
        StitchedValueModel.from_pretrained(folder, backbone=backbone)
    reward = CLIPReward(model=f"local-dir:{tiny_clip}")
    with torch.no_grad():
        next(reward.parameters()).add_(0.1)
    with pytest.raises(ValueError, match="trained on the reward"):
        StitchedValueModel.from_pretrained(folder, reward=reward)
    for dtype in ("bfloat16", "float16"):  # which rounds to other weights than the former does
        reward = CLIPReward(model=f"local-dir:{tiny_clip}", dtype=dtype)
        refused = pytest.raises(ValueError, match="in float16 only if it was then")
        with refused if dtype == "float16" else nullcontext():
            StitchedValueModel.from_pretrained(folder, reward=reward)
    with pytest.raises(ValueError, match="stitch point i"):
        StitchedValueModel.from_pretrained(folder, backbone=LatentBackbone(4))


def test_not_a_value_model(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"config\.json is missing"):
        StitchedValueModel.from_pretrained(tmp_path)
    with pytest.raises(FileNotFoundError, match="no such file or folder"):
        StitchedValueModel.from_pretrained(tmp_path / "absent")


def test_a_damaged_value_model_is_said_before_anything_is_loaded(model, tmp_path):
    folder = model.save_pretrained(tmp_path / "value")
    weights, config = folder / "model.safetensors", folder / "config.json"
    whole = weights.read_bytes()
    for content in (b"", whole[:-5]):
        weights.write_bytes(content)
        with pytest.raises(ValueError, match=r"model\.safetensors is no .* copy or download"):
            StitchedValueModel.read(folder)
    weights.write_bytes(whole)
    config.write_text("{half")
    with pytest.raises(ValueError, match=r"config\.json is not valid JSON"):
        StitchedValueModel.read(folder)


def test_wrong_weights_are_named(model, tmp_path):
    from safetensors.torch import load_file, save_file

    folder = model.save_pretrained(tmp_path)
    state = load_file(folder / "model.safetensors")
    state["stitch.F.bias"] = state["stitch.F.bias"][:-1].clone()
    del state["tail.ln_post.weight"]
    save_file(state, folder / "model.safetensors")
    with pytest.raises(ValueError, match=r"tail\.ln_post\.weight.*stitch\.F\.bias"):
        StitchedValueModel.from_pretrained(folder)


def test_latents_of_the_wrong_shape_say_so(model):
    with pytest.raises(ValueError, match="channels"):
        model(torch.randn(1, 16, 8, 8), torch.tensor([0.5]))
