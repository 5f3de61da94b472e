"""ImageReward against a plain re-computation from the published names: formats, scores, the contract, errors."""

import json
import shutil

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from stitchvm.rewards import blip
from stitchvm.rewards.base import NotFiniteError
from stitchvm.rewards.imagereward import ImageReward
from stitchvm.spec import build, fingerprint, spec_of
from tests.rewards import published

PROMPTS = ["a red circle", "the blue square is left of the circles [PAD] [ENC] a", "a " * 60]
IDS = [[2, 5, 6, 8, 3], [2, 12, 7, 9, 1, 13, 14, 12, 8, 11, 0, 16, 5, 3], [2] + 33 * [5] + [3]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return published.imagereward_folder(tmp_path_factory.mktemp("imagereward"))


@pytest.fixture(scope="module")
def reward(folder):
    return ImageReward(folder)


def attention(x, memory, p, name, heads, allowed=None):
    """Post-norm attention of BERT with the parameters `name`.*; `allowed` (N,) says where one may look."""

    def lin(part, y):
        return F.linear(y, p[f"{name}.{part}.weight"], p[f"{name}.{part}.bias"])

    q, k, v = lin("self.query", x), lin("self.key", memory), lin("self.value", memory)
    width, out = q.shape[-1] // heads, []
    for h in range(heads):
        part = slice(h * width, (h + 1) * width)
        logits = q[:, part] @ k[:, part].T / width**0.5
        if allowed is not None:
            logits = logits[:, allowed]
        out.append(logits.softmax(-1) @ (v[:, part] if allowed is None else v[allowed][:, part]))
    return norm(x + lin("output.dense", torch.cat(out, -1)), p, f"{name}.output.LayerNorm", 1e-12)


def norm(x, p, name, eps):
    centred = x - x.mean(-1, keepdim=True)
    unit = centred / (centred.pow(2).mean(-1, keepdim=True) + eps).sqrt()
    return unit * p[f"{name}.weight"] + p[f"{name}.bias"]


def gelu(x):
    return x * 0.5 * (1 + torch.erf(x / 2**0.5))


def reference(state, x, ids):
    """One image (3, H, W), preprocessed, and one prompt's ids, without its padding: the published network."""
    p = {key: value.double() for key, value in state.items()}
    p = {key.removeprefix("blip."): value for key, value in p.items()}
    v, patch = "visual_encoder", p["visual_encoder.patch_embed.proj.weight"].shape[-1]
    patches = x.double().unfold(1, patch, patch).unfold(2, patch, patch)
    patches = patches.permute(1, 2, 0, 3, 4).flatten(2).flatten(0, 1)
    kernel = p[f"{v}.patch_embed.proj.weight"].flatten(1)
    tokens = patches @ kernel.T + p[f"{v}.patch_embed.proj.bias"]
    h = torch.cat([p[f"{v}.cls_token"][0], tokens]) + p[f"{v}.pos_embed"][0]
    for k in range(3):
        b = f"{v}.blocks.{k}"
        y = norm(h, p, f"{b}.norm1", 1e-6)
        q, key, value = F.linear(y, p[f"{b}.attn.qkv.weight"], p[f"{b}.attn.qkv.bias"]).chunk(
            3, -1
        )
        heads = [slice(i, i + 64) for i in range(0, h.shape[-1], 64)]
        o = torch.cat([(q[:, s] @ key[:, s].T / 8).softmax(-1) @ value[:, s] for s in heads], -1)
        h = h + F.linear(o, p[f"{b}.attn.proj.weight"], p[f"{b}.attn.proj.bias"])
        y = norm(h, p, f"{b}.norm2", 1e-6)
        y = gelu(F.linear(y, p[f"{b}.mlp.fc1.weight"], p[f"{b}.mlp.fc1.bias"]))
        h = h + F.linear(y, p[f"{b}.mlp.fc2.weight"], p[f"{b}.mlp.fc2.bias"])
    image = norm(h, p, f"{v}.norm", 1e-6)
    e = "text_encoder.embeddings"
    c = p[f"{e}.word_embeddings.weight"][ids] + p[f"{e}.position_embeddings.weight"][: len(ids)]
    c = norm(c, p, f"{e}.LayerNorm", 1e-12)
    for k in range(2):
        b = f"text_encoder.encoder.layer.{k}"
        c = attention(c, c, p, f"{b}.attention", 2)
        c = attention(c, image, p, f"{b}.crossattention", 2)
        y = gelu(
            F.linear(c, p[f"{b}.intermediate.dense.weight"], p[f"{b}.intermediate.dense.bias"])
        )
        y = F.linear(y, p[f"{b}.output.dense.weight"], p[f"{b}.output.dense.bias"])
        c = norm(c + y, p, f"{b}.output.LayerNorm", 1e-12)
    r = c[0]
    for place in (0, 2, 4, 6, 7):
        r = F.linear(r, p[f"mlp.layers.{place}.weight"], p[f"mlp.layers.{place}.bias"])
    return image, (r[0] - 0.16717362830052426) / 1.0333394966054072


def test_is_the_published_network(reward):
    state = published.imagereward_state()
    pixels = torch.rand(3, 3, 40, 50)
    embedding = reward.embed(pixels)
    scores = reward.score(embedding.image, reward.encode_text(PROMPTS))
    x = reward.preprocess(pixels)
    for k in range(3):
        image, score = reference(state, x[k], IDS[k])
        torch.testing.assert_close(embedding.tokens[k], image.float(), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(scores[k], score.float(), rtol=1e-4, atol=1e-5)
    assert scores.std() > 0.1
    # the image matters, and so does the prompt
    text = reward.encode_text(PROMPTS[:1])
    assert reward(pixels, text).std() > 1e-3
    one = torch.cat([reward(pixels[:1], reward.encode_text([p])) for p in PROMPTS])
    assert one.std() > 0.03


def test_is_blip_of_transformers(reward):
    """With the masks of the published code: all image tokens, the prompt's own."""
    pixels = torch.rand(3, 3, 40, 50)
    image = reward.visual(pixel_values=reward.preprocess(pixels)).last_hidden_state
    words = reward.tokenizer(
        PROMPTS, padding="max_length", truncation=True, max_length=35, return_tensors="pt"
    )
    hidden = reward.text(
        input_ids=words.input_ids,
        attention_mask=words.attention_mask,
        encoder_hidden_states=image,
        encoder_attention_mask=torch.ones(image.shape[:2], dtype=torch.long),
    ).last_hidden_state
    expected = hidden[:, 0]
    for layer in reward.head.values():
        expected = layer(expected)
    expected = (expected[:, 0] - 0.16717362830052426) / 1.0333394966054072
    assert torch.equal(reward(pixels, reward.encode_text(PROMPTS)), expected)


def test_text_is_the_token_ids(reward):
    text = reward.encode_text(PROMPTS)
    assert text.shape == (3, 36)
    assert text.dtype == torch.float32
    for row, ids in zip(text.tolist(), IDS, strict=True):
        assert row == [*ids, *[-1] * (35 - len(ids)), 1]
    assert reward.encode_text([]).shape == (0, 36)
    with pytest.raises(ValueError, match="expected a list of prompts"):
        reward.encode_text("a circle")


def test_padding_and_company_change_nothing(reward):
    """A prompt scores the same alone, in a batch, and without any padding at all."""
    pixels = torch.rand(3, 3, 32, 32)
    together = reward(pixels, reward.encode_text(PROMPTS))
    for k, prompt in enumerate(PROMPTS):
        text = reward.encode_text([prompt])
        torch.testing.assert_close(reward(pixels[k : k + 1], text)[0], together[k])
        hidden = reward.text(
            input_ids=torch.tensor([IDS[k]]),
            encoder_hidden_states=reward.embed(pixels[k : k + 1]).tokens,
        ).last_hidden_state[:, 0]
        for layer in reward.head.values():
            hidden = layer(hidden)
        torch.testing.assert_close(
            (hidden[0, 0] - 0.16717362830052426) / 1.0333394966054072,
            together[k],
            rtol=1e-4,
            atol=1e-5,
        )
    text = reward.encode_text(PROMPTS[:1])
    torch.testing.assert_close(reward(pixels, text), reward(pixels, text.expand(3, -1)))


def test_length_of_embeddings_does_not_matter(reward):
    """Evaluations and Monte Carlo values bring embeddings to unit length; nothing may be lost by it."""
    pixels = torch.rand(3, 3, 32, 32)
    e, text = reward.embed(pixels).image, reward.encode_text(PROMPTS)
    expected = reward.score(e, text)
    assert e.shape == (3, reward.embed_dim) == (3, 5 * 128 + 1)
    unit = reward.score(F.normalize(e, dim=-1), F.normalize(text, dim=-1))
    torch.testing.assert_close(unit, expected, rtol=1e-4, atol=1e-5)
    # the largest ids of the real vocabulary come back too
    ids = torch.tensor([[101.0, *range(30489, 30522), 102.0, 1.0]])
    back = F.normalize(ids, dim=-1)
    assert torch.equal((back[:, :-1] / back[:, -1:]).round(), ids[:, :-1])
    assert not reward.affine


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
    reward.train()
    assert not any(module.training for module in reward.modules())
    assert not any(p.requires_grad for p in reward.parameters())


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_lower_precision(folder, reward, dtype):
    low = ImageReward(folder, dtype=dtype)
    pixels = torch.rand(3, 3, 32, 32)
    assert low.embed(pixels).image.dtype == getattr(torch, dtype)
    assert all(p.dtype == torch.float32 for p in low.head.parameters())
    text = low.encode_text(PROMPTS)
    r = low(pixels, text)
    assert r.dtype == torch.float32
    torch.testing.assert_close(r, reward(pixels, text), rtol=0.1, atol=0.2)
    with pytest.raises(ValueError, match="float32, bfloat16, float16"):
        ImageReward(folder, dtype="int8")


def test_cutting_it_is_an_error(reward):
    pixels = torch.rand(1, 3, 32, 32)
    for ask in (
        lambda: reward.prefix(pixels, 1),
        lambda: reward.prefixes(pixels, (1, 2)),
        lambda: reward.class_tokens(pixels, (1,)),
        lambda: reward.probe(pixels, (1,)),
        lambda: reward.tail(1),
    ):
        with pytest.raises(ValueError, match=r"ImageReward\(.*cannot be cut and stitched"):
            ask()


def test_flops_are_those_that_are_done(reward):
    with FlopCounterMode(display=False) as counter:
        reward(torch.rand(1, 3, 32, 32), reward.encode_text(PROMPTS[:1]))
    assert reward.flops() == counter.get_total_flops()


# errors


def test_a_config_rebuilds_the_reward(folder, reward):
    spec = json.loads(json.dumps(spec_of(reward)))
    again = build(spec)
    assert spec_of(again) == spec
    assert fingerprint(again) == fingerprint(reward)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_not_finite_is_named(folder, reward, value):
    pixels = torch.rand(3, 3, 32, 32)
    pixels[1] = value
    text = reward.encode_text(PROMPTS)
    with pytest.raises(NotFiniteError, match=r"ImageReward\(.*1 of 3 rewards are not finite"):
        reward(pixels, text)
    assert not ImageReward(folder, check_finite=False)(pixels, text)[1].isfinite()


def test_shapes_that_do_not_match_are_named(reward):
    e, text = reward.embed(torch.rand(3, 3, 32, 32)).image, reward.encode_text(PROMPTS[:2])
    with pytest.raises(ValueError, match="compares images with text"):
        reward.score(e)
    with pytest.raises(ValueError, match=r"3 image embeddings and text \(2, 36\)"):
        reward.score(e, text)
    with pytest.raises(ValueError, match=r"scores image embeddings \(B, 641\), got \(3, 640\)"):
        reward.score(e[:, :-1], text[:1])


@pytest.mark.parametrize(
    "key",
    [
        "blip.visual_encoder.pos_embed",
        "blip.visual_encoder.blocks.1.attn.qkv.weight",
        "blip.visual_encoder.blocks.2.norm2.bias",
        "blip.text_encoder.encoder.layer.1.crossattention.self.key.weight",
        "mlp.layers.6.bias",
    ],
)
def test_a_mutated_key_is_named(tmp_path, key):
    state = published.imagereward_state()
    state[key + "_"] = state.pop(key)
    folder = published.imagereward_folder(tmp_path, state)
    with pytest.raises(ValueError, match=rf"(1 missing: |it has no ){key}"):
        ImageReward(folder)


def test_a_wrong_shape_is_named_as_in_the_file(tmp_path):
    state = published.imagereward_state()
    state["blip.visual_encoder.blocks.0.attn.proj.weight"] = torch.zeros(128, 64)
    with pytest.raises(
        ValueError, match=r"blocks\.0\.attn\.proj\.weight \(128, 64\), expected \(128, 128\)"
    ):
        ImageReward(published.imagereward_folder(tmp_path, state))


def test_files_that_are_none_are_named(folder, tmp_path):
    other = published.imagereward_folder(tmp_path / "other", {"conv1.weight": torch.zeros(2)})
    with pytest.raises(ValueError, match=r"is not ImageReward's checkpoint.*\['conv1\.weight'\]"):
        ImageReward(other)
    odd = published.imagereward_state(width=96)
    with pytest.raises(ValueError, match="a ViT of width 96"):
        ImageReward(published.imagereward_folder(tmp_path / "odd", odd))
    with pytest.raises(FileNotFoundError, match=r"has no med_config\.json"):
        ImageReward(str(tmp_path))
    with pytest.raises(FileNotFoundError, match="no such file or folder"):
        ImageReward(str(tmp_path / "nothing"))
    shutil.copytree(folder, tmp_path / "bare")
    (tmp_path / "bare" / "ImageReward.pt").unlink()
    with pytest.raises(FileNotFoundError, match=r"has no weights: expected ImageReward\.pt"):
        ImageReward(str(tmp_path / "bare"))
    settings = {k: v for k, v in published.MED.items() if k != "layer_norm_eps"}
    (tmp_path / "bare" / "med_config.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match=r"med_config\.json of '.*' lacks layer_norm_eps"):
        ImageReward(str(tmp_path / "bare"))


def test_a_tokenizer_of_another_model_is_named(folder, tmp_path, reward):
    with pytest.raises(FileNotFoundError, match=r"has no tokenizer: expected vocab\.txt"):
        ImageReward(folder, tokenizer=str(tmp_path))
    (tmp_path / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\nwords\n")
    with pytest.raises(ValueError, match=r"has 8 tokens with BLIP's .* the text encoder 17"):
        ImageReward(folder, tokenizer=str(tmp_path))
    bare = published.imagereward_folder(tmp_path / "bare", vocabulary=False)
    again = ImageReward(bare, tokenizer=folder)
    assert torch.equal(again.encode_text(PROMPTS), reward.encode_text(PROMPTS))


def test_public_ids_lead_to_their_files(folder, tmp_path, monkeypatch):
    """What would be asked of the hub, without asking."""
    asked = []
    bare = tmp_path / "bare"
    published.imagereward_folder(bare, vocabulary=False)
    (bare / "ImageReward.pt").unlink()

    def resolve(name, allow_patterns):
        assert "ImageReward.pt" not in allow_patterns
        asked.append(name)
        return bare if name == "THUDM/ImageReward" else blip.Path(folder)

    def resolve_file(name):
        asked.append(name)
        raise FileNotFoundError(name)

    monkeypatch.setattr(blip, "resolve", resolve)
    monkeypatch.setattr(blip, "resolve_file", resolve_file)
    with pytest.raises(FileNotFoundError):
        ImageReward()
    assert asked == [
        "THUDM/ImageReward",
        "google-bert/bert-base-uncased",
        "THUDM/ImageReward/ImageReward.pt",
    ]
