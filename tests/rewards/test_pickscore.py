"""PickScore against transformers' own CLIP classes: formats, scores, the cut tower, errors."""

import json
import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPImageProcessor, CLIPModel

from stitchvm.rewards import transformers_clip
from stitchvm.rewards.pickscore import PickScoreReward
from stitchvm.rewards.preprocess import Preprocess
from stitchvm.spec import build, fingerprint, spec_of
from tests.rewards import published
from tests.rewards.test_preprocess import picture, tensor

PROMPTS = ["a red circle", "b", "a very long prompt that is cut off"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return published.pickscore_folder(tmp_path_factory.mktemp("pickscore"))


@pytest.fixture(scope="module")
def reward(folder):
    return PickScoreReward(folder)


def tokens(prompts):
    """What the published code hands over: padded to the longest prompt, with a mask."""
    return published.clip_tokenizer()(
        prompts, padding=True, truncation=True, max_length=16, return_tensors="pt"
    )


@pytest.mark.parametrize("eos", [2, 53])
def test_is_the_clip_model_of_transformers(tmp_path, eos):
    folder = published.pickscore_folder(tmp_path, eos=eos)
    reward, theirs = PickScoreReward(folder), CLIPModel.from_pretrained(folder).eval()
    pixels = torch.rand(3, 3, 40, 50)
    x = reward.preprocess(pixels)
    image = theirs.get_image_features(pixel_values=x)
    ours = reward.embed(pixels)
    assert torch.equal(ours.tokens, theirs.vision_model.post_layernorm(image.last_hidden_state))
    torch.testing.assert_close(ours.image, image.pooler_output, rtol=1e-5, atol=1e-6)
    text = reward.encode_text(PROMPTS)
    expected = theirs.get_text_features(**tokens(PROMPTS)).pooler_output
    torch.testing.assert_close(text, F.normalize(expected, dim=-1), rtol=1e-5, atol=1e-6)
    score = reward(pixels, text)
    logits = theirs(**tokens(PROMPTS), pixel_values=x).logits_per_image
    torch.testing.assert_close(score, logits.diag(), rtol=1e-5, atol=1e-5)
    # the published code, word for word a scaled cosine
    cosine = F.cosine_similarity(image.pooler_output, expected)
    torch.testing.assert_close(score, theirs.logit_scale.exp() * cosine)
    assert score.std() > 1


def test_three_conventions(folder):
    pixels = torch.rand(3, 3, 32, 32)
    scores = {}
    for scale in ("published", "over_26", "cosine"):
        reward = PickScoreReward(folder, scale=scale)
        scores[scale] = reward(pixels, reward.encode_text(PROMPTS))
    torch.testing.assert_close(scores["published"], torch.tensor(4.6).exp() * scores["cosine"])
    torch.testing.assert_close(scores["published"], 26 * scores["over_26"])
    assert scores["cosine"].abs().max() < 1
    with pytest.raises(ValueError, match=r"scale 'x26': expected one of published, over_26"):
        PickScoreReward(folder, scale="x26")


def test_scale_is_not_rounded_with_the_networks(folder):
    low = PickScoreReward(folder, dtype="bfloat16")
    assert low.factor == PickScoreReward(folder).factor == float(torch.tensor(4.6).exp())
    pixels, exact = torch.rand(3, 3, 32, 32), PickScoreReward(folder)
    r = low(pixels, low.encode_text(PROMPTS))
    assert r.dtype == torch.float32
    assert low.embed(pixels).image.dtype == torch.bfloat16
    torch.testing.assert_close(r, exact(pixels, exact.encode_text(PROMPTS)), rtol=0.05, atol=3.0)


def test_a_prompt_scores_the_same_alone_and_in_a_batch(reward, folder):
    other = PickScoreReward(folder)  # with nothing in its cache
    together = reward.encode_text(PROMPTS)
    alone = torch.cat([other.encode_text([prompt]) for prompt in PROMPTS])
    torch.testing.assert_close(alone, together, rtol=1e-5, atol=1e-6)
    pixels = torch.rand(3, 3, 32, 32)
    each = torch.cat([other(pixels[k : k + 1], alone[k : k + 1]) for k in range(3)])
    torch.testing.assert_close(each, reward(pixels, together))
    assert (together[0] - together[1]).abs().max() > 0.01


def test_both_files_are_the_same(folder, tmp_path, reward):
    state = load_file(f"{folder}/model.safetensors")
    # as old releases wrote it
    state["text_model.embeddings.position_ids"] = torch.arange(16)[None]
    state["vision_model.embeddings.position_ids"] = torch.arange(17)[None]
    shutil.copytree(folder, tmp_path / "bin")
    (tmp_path / "bin" / "model.safetensors").unlink()
    torch.save(state, tmp_path / "bin" / "pytorch_model.bin")
    again = PickScoreReward(str(tmp_path / "bin"))
    assert fingerprint(again) == fingerprint(reward)
    pixels = torch.rand(3, 3, 32, 32)
    text = reward.encode_text(PROMPTS)
    assert torch.equal(again.encode_text(PROMPTS), text)
    assert torch.equal(again(pixels, text), reward(pixels, text))
    assert PickScoreReward(f"local-dir:{folder}")(pixels, text).equal(reward(pixels, text))


def test_gradient_is_the_derivative(reward):
    pixels = (0.2 + 0.6 * torch.rand(2, 3, 36, 44)).requires_grad_()
    text = reward.encode_text(PROMPTS[:2])
    (gradient,) = torch.autograd.grad(reward(pixels, text).sum(), pixels)
    assert gradient.abs().amax((1, 2, 3)).min() > 0
    direction = gradient / gradient.norm()
    h = 1e-2
    with torch.no_grad():
        ahead = reward(pixels + h * direction, text).sum()
        behind = reward(pixels - h * direction, text).sum()
    torch.testing.assert_close((ahead - behind) / (2 * h), gradient.norm(), rtol=1e-2, atol=0)
    assert not any(p.requires_grad for p in reward.parameters())


def test_preprocessing_is_that_of_transformers():
    """Both of its processors crop from a corner that is rounded down; torchvision rounds to even."""
    mean, std = tuple(CLIPImageProcessor.image_mean), tuple(CLIPImageProcessor.image_std)
    for size in [(40, 60), (61, 33), (48, 48), (35, 32), (32, 39), (67, 64)]:
        settings = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
        image = picture(*size)
        theirs = CLIPImageProcessor(**settings)(image, return_tensors="pt").pixel_values
        ours = Preprocess((32, 32), "processor", mean, std)(tensor(image))
        d = (ours - theirs).abs() * torch.tensor(std).view(3, 1, 1) * 255
        assert d.quantile(0.99) < 1.1, size
        assert d.mean() < 0.3, size
    rounded = Preprocess((32, 32), "shortest", mean, std)
    x = torch.rand(1, 3, 35, 32)
    down = Preprocess((32, 32), "processor", mean, std).resize(x)
    assert torch.equal(down, x[:, :, 1:33])
    assert torch.equal(rounded.resize(x), x[:, :, 2:34])


def test_preprocessing_is_the_processors(folder, tmp_path, reward):
    assert (reward.preprocessing.mean, reward.preprocessing.std) == (
        (0.5, 0.4, 0.3),
        (0.2, 0.25, 0.3),
    )
    assert (reward.preprocessing.mode, reward.preprocessing.interpolation) == (
        "processor",
        "bicubic",
    )
    bare = published.pickscore_folder(tmp_path / "bare", tokenizer=False)
    other = published.processor_folder(tmp_path / "bilinear", resample=2)
    two = PickScoreReward(bare, processor=other)
    assert two.preprocessing.interpolation == "bilinear"
    published.clip_tokenizer().save_pretrained(tmp_path / "words")
    plain = PickScoreReward(bare, processor=str(tmp_path / "words"))
    np.testing.assert_allclose(plain.preprocessing.mean, CLIPImageProcessor.image_mean)
    assert torch.equal(plain.encode_text(PROMPTS), two.encode_text(PROMPTS))


# the cut tower


def test_prefix_and_tail_are_the_tower(reward):
    pixels = torch.rand(2, 3, 40, 50)
    whole = reward.embed(pixels)
    probe = reward.probe(pixels, (1, 3))
    assert torch.equal(probe.image, whole.image)
    for j in (1, 2, 3, 4):
        tail = reward.tail(j)
        patches = reward.prefix(pixels, j)
        assert patches.shape == (2, 32, 4, 4)
        got = tail(patches, reward.class_tokens(pixels, (j,))[j])
        assert torch.equal(got.tokens, whole.tokens)
        assert torch.equal(got.image, whole.image)
        tail(patches).image.sum().backward()
        assert all(p.grad is not None for p in tail.parameters())
        assert all(p.is_contiguous() for p in tail.parameters()), "FSDP2 takes no others"
    assert torch.equal(probe.patches[3], reward.prefix(pixels, 3))
    assert not any(p.requires_grad for p in reward.parameters())
    assert (reward.num_blocks, reward.grid, reward.width, reward.embed_dim) == (4, (4, 4), 32, 24)


def test_flops_are_those_that_are_done(reward):
    pixels = torch.rand(1, 3, 32, 32)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        reward.embed(pixels)
    assert reward.flops() == counter.get_total_flops()
    tail, h = reward.tail(3), reward.prefix(pixels, 3)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        tail(h)
    assert tail.flops() == counter.get_total_flops()


# errors


def test_a_config_rebuilds_the_reward(folder):
    reward = PickScoreReward(folder, scale="cosine", class_token="constant")
    spec = json.loads(json.dumps(spec_of(reward)))
    again = build(spec)
    assert spec_of(again) == spec
    assert fingerprint(again) == fingerprint(reward)


def test_keys_that_do_not_fit_are_named(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "x")
    file = tmp_path / "x" / "model.safetensors"
    state = load_file(file)
    key = "vision_model.encoder.layers.2.mlp.fc1.weight"
    mutated = {k: v for k, v in state.items() if k != key} | {key + "s": state[key]}
    save_file(mutated, file)
    message = f"1 missing: {key}; 1 unexpected: {key}s"
    with pytest.raises(ValueError, match=message):
        PickScoreReward(str(tmp_path / "x"))
    save_file(state | {"text_projection.weight": torch.zeros(24, 33)}, file)
    with pytest.raises(
        ValueError, match=r"text_projection\.weight \(24, 33\), expected \(24, 32\)"
    ):
        PickScoreReward(str(tmp_path / "x"))
    save_file({k: v for k, v in state.items() if k != "logit_scale"}, file)
    with pytest.raises(ValueError, match="1 missing: logit_scale"):
        PickScoreReward(str(tmp_path / "x"))


def test_folders_that_are_none_are_named(folder, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"has no config\.json"):
        PickScoreReward(str(tmp_path))
    with pytest.raises(FileNotFoundError, match="no such file or folder"):
        PickScoreReward(str(tmp_path / "nothing"))
    (tmp_path / "config.json").write_text('{"model_type": "siglip"}')
    with pytest.raises(ValueError, match=r"that of a 'siglip' model, expected 'clip'"):
        PickScoreReward(str(tmp_path))
    shutil.copytree(folder, tmp_path / "bare")
    (tmp_path / "bare" / "model.safetensors").unlink()
    with pytest.raises(
        FileNotFoundError, match=r"no weights: expected model\.safetensors or pytorch"
    ):
        PickScoreReward(str(tmp_path / "bare"))


def test_a_processor_of_another_model_is_named(folder, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"has no tokenizer: expected tokenizer\.json"):
        PickScoreReward(folder, processor=str(tmp_path))
    large = published.processor_folder(tmp_path / "large", size=48)
    with pytest.raises(ValueError, match="expected 32, 32 and 2 or 3: give the `processor`"):
        PickScoreReward(folder, processor=large)
    published.processor_folder(tmp_path / "words")
    tokenizer = published.clip_tokenizer()
    tokenizer.add_tokens(["zebra"])
    tokenizer.save_pretrained(tmp_path / "words")
    reward = PickScoreReward(folder, processor=str(tmp_path / "words"))
    with pytest.raises(ValueError, match="has token 54, the text tower 54 tokens"):
        reward.encode_text(["a zebra"])


def test_public_ids_lead_to_their_files(tmp_path, monkeypatch):
    """What would be asked of the hub, without asking."""
    asked, bare, words = [], tmp_path / "bare", tmp_path / "words"
    published.pickscore_folder(bare, tokenizer=False)
    (bare / "model.safetensors").unlink()
    published.processor_folder(words)

    def resolve(name, allow_patterns):
        asked.append((name, "config.json" in allow_patterns))
        assert not any("model" in pattern or "*" in pattern for pattern in allow_patterns)
        return bare if name.startswith("yuval") else words

    def first_on_hub(name, files):
        asked.append((name, files))
        raise FileNotFoundError(name)

    monkeypatch.setattr(transformers_clip, "resolve", resolve)
    monkeypatch.setattr(transformers_clip, "first_on_hub", first_on_hub)
    with pytest.raises(FileNotFoundError):
        PickScoreReward()
    assert asked == [
        ("yuvalkirstain/PickScore_v1", True),
        ("laion/CLIP-ViT-H-14-laion2B-s32B-b79K", False),
        ("yuvalkirstain/PickScore_v1", ("model.safetensors", "pytorch_model.bin")),
    ]
