"""A tower cut before block j: prefix and tail together are the whole, bit for bit."""

import copy

import open_clip
import pytest
import torch
from open_clip.transformer import Transformer
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from stitchvm.rewards.checkpoint import LoadedCLIP
from stitchvm.rewards.clip import CLIPReward
from stitchvm.rewards.clip_tail import CLIPTail
from stitchvm.rewards.open_clip_reward import OpenCLIPReward
from tests.rewards import tiny

VARIANTS = {
    "gelu": {},
    "quick_gelu": {"quick_gelu": True},
    "no_ln_pre": {"no_ln_pre": True},
    "final_ln_after_pool": {"final_ln_after_pool": True},
    "patch_dropout": {"patch_dropout": 0.5},
    "average_pool": {"pool_type": "avg", "final_ln_after_pool": True},
    "layer_scale": {"ls_init_value": 0.3},
    "custom_block": {"qk_norm": True, "scale_fc": True},
}


def with_other_layout(model: nn.Module) -> None:
    """Gives the tower blocks with the same weights that take (N, B, D), open_clip's older layout."""
    old = model.visual.transformer
    new = Transformer(32, len(old.resblocks), 2, batch_first=False)
    new.load_state_dict(old.state_dict())
    model.visual.transformer = new.to(old.get_cast_dtype())


def make(tmp_path, variant: str = "gelu", dtype: str = "float32", **options) -> CLIPReward:
    return CLIPReward(tiny.clip_folder(tmp_path, **VARIANTS[variant]), dtype=dtype, **options)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_prefix_and_tail_are_the_whole_tower(tmp_path, variant, dtype):
    reward = make(tmp_path, variant, dtype)
    pixels = torch.rand(3, 3, 32, 32)
    js = range(1, 5)
    whole = reward.embed(pixels)
    theirs = tiny.clip_model(tiny.clip_config(**VARIANTS[variant])).to(whole.image.dtype)
    e = theirs.visual(reward.preprocess(pixels).to(whole.image.dtype))
    assert torch.equal(e, whole.image)
    patches, cls = reward.prefixes(pixels, js), reward.class_tokens(pixels, js)
    for j in js:
        tail = reward.tail(j)
        for mode in (True, False):
            parts = tail.train(mode)(patches[j], cls[j])
            assert torch.equal(parts.image, whole.image)
            assert torch.equal(parts.tokens, whole.tokens)
        with torch.no_grad():
            assert torch.equal(tail(patches[j], cls[j]).image, whole.image)
        if j == 1:
            assert torch.equal(tail(patches[1]).tokens, whole.tokens)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_older_layout_of_the_batch(tmp_path, dtype):
    theirs = tiny.clip_model(tiny.clip_config()).to(getattr(torch, dtype))
    with_other_layout(theirs)
    pixels = torch.rand(3, 3, 32, 32)
    expected = copy.deepcopy(theirs).visual((pixels - 0.5).to(getattr(torch, dtype)) / 0.25)
    preset = {"mean": (0.5,) * 3, "std": (0.25,) * 3}
    reward = OpenCLIPReward(LoadedCLIP(theirs, preset, lambda texts: texts), id="old", dtype=dtype)
    whole = reward.embed(pixels).image
    if dtype == "float32":
        assert torch.equal(whole, expected)
    else:  # that layout fuses the bias of the projection, so bfloat16 rounds once less
        torch.testing.assert_close(whole, expected, rtol=0.05, atol=0.05)
    for j in (1, 3):
        parts = reward.tail(j)(reward.prefix(pixels, j), reward.class_tokens(pixels, (j,))[j])
        assert torch.equal(parts.image, whole)


def test_text_is_that_of_open_clip(tmp_path):
    reward = make(tmp_path)
    prompts = ["a red circle", "a blue square left of a cross", ""]
    theirs = tiny.clip_model(tiny.clip_config())
    tokens = open_clip.get_tokenizer("ViT-B-32")(prompts, context_length=16)
    expected = theirs.encode_text(tokens, normalize=True)
    torch.testing.assert_close(reward.encode_text(prompts), expected, rtol=1e-5, atol=1e-6)


def test_one_pass_gives_all(tmp_path):
    reward = make(tmp_path, "quick_gelu")
    pixels = torch.rand(2, 3, 40, 50)
    probe = reward.probe(pixels, (1, 3, 4))
    assert torch.equal(probe.image, reward.embed(pixels).image)
    for j in (1, 3, 4):
        assert torch.equal(probe.patches[j], reward.prefix(pixels, j))
        assert torch.equal(probe.class_token[j], reward.class_tokens(pixels, (j,))[j])
        assert probe.patches[j].shape == (2, 32, 4, 4)
        assert probe.class_token[j].shape == (2, 32)


def test_patches_are_those_of_open_clip(tmp_path):
    reward = make(tmp_path, "gelu")
    pixels = torch.rand(2, 3, 32, 32)
    x = reward.preprocess(pixels)
    theirs = reward.visual.forward_intermediates(
        x, indices=[0, 1, 2], intermediates_only=True, output_extra_tokens=True
    )
    patches, cls = reward.prefixes(pixels, (1, 2, 4)), reward.class_tokens(pixels, (1, 2, 4))
    assert torch.equal(patches[1], reward.visual.conv1(x))
    for j in (2, 4):
        torch.testing.assert_close(patches[j], theirs["image_intermediates"][j - 2])
        torch.testing.assert_close(cls[j], theirs["image_intermediates_prefix"][j - 2][:, 0])


def test_a_prefix_stops_early(tmp_path):
    reward = make(tmp_path, "gelu")
    ran = []
    for k, block in enumerate(reward.visual.transformer.resblocks, start=1):
        block.register_forward_hook(lambda *_, k=k: ran.append(k))
    reward.prefixes(torch.rand(1, 3, 32, 32), (1, 3))
    assert ran == [1, 2]
    reward.prefix(torch.rand(1, 3, 32, 32), 1)
    assert ran == [1, 2]


@pytest.mark.parametrize("class_token", ["trainable", "constant", "readout", "literal"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_every_parameter_is_used(tmp_path, class_token, checkpointing):
    reward = make(tmp_path, "gelu", class_token=class_token, gradient_checkpointing=checkpointing)
    for j in range(1, 5):
        tail = reward.tail(j)
        h = reward.prefix(torch.rand(2, 3, 32, 32), j)
        tokens, image = tail(h)
        # every row of ln_post's output takes part in the loss, as in the distillation
        (tokens.square().sum() + image.square().sum()).backward()
        assert all(p.grad is not None and p.requires_grad for p in tail.parameters())
        names = {name.split(".")[0] for name, _ in tail.named_parameters()}
        assert not {"conv1"} & names
        assert ("positional_embedding" in names) == (j == 1 or class_token == "literal")
        assert ("class_token" in names) == (j > 1 and class_token in ("trainable", "readout"))
    assert all(p.grad is None and not p.requires_grad for p in reward.parameters())


def test_checkpointing_changes_no_gradient(tmp_path):
    folder = tiny.clip_folder(tmp_path)
    h = torch.randn(2, 32, 4, 4)
    gradients = []
    for checkpointing in (False, True):
        tail = CLIPReward(folder, gradient_checkpointing=checkpointing).tail(2)
        tail(h).image.square().sum().backward()
        gradients.append({name: p.grad for name, p in tail.named_parameters()})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        assert torch.equal(gradient, gradients[1][name]), name


def test_the_tail_is_a_copy(tmp_path):
    reward = make(tmp_path, "gelu")
    pixels = torch.rand(1, 3, 32, 32)
    before = reward.embed(pixels).image
    with torch.no_grad():
        for parameter in reward.tail(1).parameters():
            parameter.add_(1)
    assert torch.equal(reward.embed(pixels).image, before)


def test_class_token_starts_from_the_probe_mean(tmp_path):
    reward = make(tmp_path, "gelu")
    pixels = torch.rand(16, 3, 32, 32)
    cls = reward.class_tokens(pixels, (1, 3))
    tail = reward.tail(3)
    first = reward.visual.ln_pre(
        (reward.visual.class_embedding + reward.visual.positional_embedding[0])[None, None]
    )
    assert torch.equal(tail.class_token, first.flatten())
    tail.init_class_token(cls[3].mean(0))
    assert torch.equal(tail.class_token, cls[3].mean(0))
    tail = reward.tail(1)
    state = {key: value.clone() for key, value in tail.state_dict().items()}
    tail.init_class_token(cls[1].mean(0))
    assert all(torch.equal(value, state[key]) for key, value in tail.state_dict().items())
    with pytest.raises(ValueError, match="class token of this tower has shape"):
        reward.tail(2).init_class_token(torch.zeros(5))


def test_class_token_read_out_of_the_patches(tmp_path):
    reward = make(tmp_path, "gelu", class_token="readout")
    pixels = torch.rand(4, 3, 32, 32)
    h, cls = reward.prefix(pixels, 3), reward.class_tokens(pixels, (3,))[3]
    tail = reward.tail(3)
    tail.init_class_token(cls.mean(0))
    constant = CLIPTail(reward.visual, 3, "constant")
    constant.init_class_token(cls.mean(0))
    assert torch.equal(tail(h).image, constant(h).image)
    readout = torch.randn(32, 32)
    tail.init_class_token(cls[0], readout)
    expected = constant(h, cls[0] + h.mean((2, 3)) @ readout.T)
    torch.testing.assert_close(tail(h).image, expected.image)
    assert tail.flops() == constant.flops() + 2 * 32 * 32
    with pytest.raises(ValueError, match="this tail has no read-out"):
        constant.init_class_token(cls[0], readout)


def test_flops_are_those_that_are_done(tmp_path):
    reward = make(tmp_path, "quick_gelu")
    pixels = torch.rand(1, 3, 32, 32)
    # torch's counter passes over the fused attention of a CPU in some releases
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        reward.embed(pixels)
    assert reward.flops() == counter.get_total_flops()
    for j in (1, 3):
        tail, h = reward.tail(j), reward.prefix(pixels, j)
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            tail(h)
        assert tail.flops() == counter.get_total_flops()


def test_wrong_features_are_named(tmp_path):
    reward = make(tmp_path, "gelu")
    with pytest.raises(ValueError, match=r"takes features \(B, 32, 4, 4\), got \(1, 32, 3, 3\)"):
        reward.tail(1)(torch.zeros(1, 32, 3, 3))
    for call in (reward.tail, lambda j: reward.prefix(torch.rand(1, 3, 32, 32), j)):
        for j in (0, 5):
            with pytest.raises(ValueError, match=r"has blocks 1\.\.4"):
                call(j)
    with pytest.raises(ValueError, match="trainable, constant, readout, literal"):
        make(tmp_path, "gelu", class_token="zero")


def test_autocast_trains_a_float32_tail(tmp_path):
    reward = make(tmp_path, "gelu")
    tail = reward.tail(2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        e = tail(reward.prefix(torch.rand(2, 3, 32, 32), 2)).image
    e.float().square().sum().backward()
    assert e.dtype == torch.bfloat16
    assert all(
        p.grad is not None and p.grad.dtype == torch.float32 for p in tail.blocks.parameters()
    )
