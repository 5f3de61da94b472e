"""The rewards: published formats, scores, errors."""

import json
import warnings

import open_clip
import pytest
import torch
import torch.nn.functional as F

from stitchvm.rewards import checkpoint
from stitchvm.rewards.aesthetic import AestheticReward
from stitchvm.rewards.base import NotFiniteError
from stitchvm.rewards.clip import CLIPReward
from stitchvm.rewards.hpsv2 import HPSv2Reward
from stitchvm.spec import build, fingerprint, spec_of
from tests.rewards import tiny

PROMPTS = ["a red circle", "a blue square"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.clip_folder(tmp_path_factory.mktemp("clip"), quick_gelu=True)


@pytest.fixture(scope="module")
def arch(tmp_path_factory):
    """Two architecture names of open_clip, with GELU and with QuickGELU."""
    place = tmp_path_factory.mktemp("configs")
    tiny.register("tiny-quickgelu", place, tiny.clip_config(quick_gelu=True))
    return tiny.register("tiny", place, tiny.clip_config())


@pytest.fixture(scope="module")
def state():
    return tiny.clip_model(tiny.clip_config()).state_dict()


def reference(quick_gelu: bool = False):
    return tiny.clip_model(tiny.clip_config(quick_gelu=quick_gelu))


def test_clip_is_the_cosine(folder):
    reward = CLIPReward(folder)
    pixels = torch.rand(2, 3, 40, 50)
    text = reward.encode_text(PROMPTS)
    theirs = reference(quick_gelu=True)
    image = theirs.encode_image(reward.preprocess(pixels), normalize=True)
    expected = (image * text).sum(-1)
    torch.testing.assert_close(reward(pixels, text), expected)
    torch.testing.assert_close(reward(pixels, text[:1]), (image * text[:1]).sum(-1))
    assert (reward.num_blocks, reward.grid, reward.width, reward.embed_dim) == (4, (4, 4), 32, 24)
    torch.testing.assert_close(text.norm(dim=-1), torch.ones(2))


def test_gradient_reaches_the_pixels_and_nothing_else(folder):
    reward = CLIPReward(folder).train()
    assert not reward.training
    assert not any(module.training for module in reward.modules())
    pixels = torch.rand(2, 3, 40, 50, requires_grad=True)
    reward(pixels, reward.encode_text(PROMPTS)).sum().backward()
    assert pixels.grad.abs().amax((1, 2, 3)).min() > 0
    assert not any(p.requires_grad for p in reward.parameters())


def test_score_is_affine_in_the_unit_embedding(folder):
    reward = CLIPReward(folder)
    e = F.normalize(torch.randn(5, 24), dim=-1)
    text = reward.encode_text(PROMPTS[:1])
    torch.testing.assert_close(reward.score(3 * e, text), reward.score(e, text))
    torch.testing.assert_close(reward.score(e, text).mean(), (e.mean(0) * text[0]).sum())


def test_prompts_are_encoded_once(folder, monkeypatch):
    reward = CLIPReward(folder)
    seen = []
    encode = reward.text.encode_text

    def counted(tokens):
        seen.append(len(tokens))
        return encode(tokens)

    monkeypatch.setattr(reward.text, "encode_text", counted)
    first = reward.encode_text([*PROMPTS, PROMPTS[0]])
    again = reward.encode_text([PROMPTS[1], "a cross"])
    assert seen == [2, 1]
    assert torch.equal(first[0], first[2])
    assert torch.equal(first[1], again[0])
    assert reward.encode_text([]).shape == (0, 24)
    with pytest.raises(ValueError, match="expected a list of prompts"):
        reward.encode_text("a red circle")


def test_what_is_kept_of_a_prompt_does_not_depend_on_autocast(folder):
    expected = CLIPReward(folder).encode_text(PROMPTS)
    reward = CLIPReward(folder)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(reward.encode_text(PROMPTS), expected)
    assert torch.equal(reward.encode_text(PROMPTS), expected)


def test_old_prompts_are_forgotten(folder, monkeypatch):
    monkeypatch.setattr("stitchvm.rewards.open_clip_reward.TEXT_CACHE", 2)
    reward = CLIPReward(folder)
    assert reward.encode_text([str(k) for k in range(5)]).shape == (5, 24)
    assert list(reward._text_cache) == ["3", "4"]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_not_finite_is_named_at_once(folder, value):
    reward = CLIPReward(folder)
    pixels = torch.rand(3, 3, 32, 32)
    pixels[1] = value
    text = reward.encode_text(PROMPTS[:1])
    with pytest.raises(
        NotFiniteError, match=r"CLIPReward\(local-dir.*1 of 3 rewards are not finite"
    ):
        reward(pixels, text)
    assert not CLIPReward(folder, check_finite=False)(pixels, text)[1].isfinite()


def test_text_that_does_not_match_is_named(folder):
    reward, e = CLIPReward(folder), torch.randn(3, 24)
    with pytest.raises(ValueError, match="compares images with text"):
        reward.score(e)
    with pytest.raises(ValueError, match=r"3 image embeddings and text embeddings \(2, 24\)"):
        reward.score(e, reward.encode_text(PROMPTS))
    with pytest.raises(ValueError, match=r"scores image embeddings \(B, 24\)"):
        reward.score(torch.randn(3, 25), reward.encode_text(PROMPTS[:1]))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_lower_precision_scores_in_float32(folder, dtype):
    low, exact = CLIPReward(folder, dtype=dtype), CLIPReward(folder)
    pixels = torch.rand(2, 3, 40, 50)
    r = low(pixels, low.encode_text(PROMPTS))
    assert low.embed(pixels).image.dtype == getattr(torch, dtype)
    assert r.dtype == torch.float32
    torch.testing.assert_close(r, exact(pixels, exact.encode_text(PROMPTS)), rtol=0.1, atol=0.03)
    with pytest.raises(ValueError, match="float32, bfloat16, float16"):
        CLIPReward(folder, dtype="int8")


def test_a_config_rebuilds_the_reward(folder, tmp_path):
    tiny.head_file(tmp_path / "head.pth")
    for reward in (
        CLIPReward(folder, resize_mode="squash", class_token="constant"),
        HPSv2Reward(folder, version="v2.0"),
        AestheticReward(folder, head=str(tmp_path / "head.pth")),
    ):
        spec = json.loads(json.dumps(spec_of(reward)))
        again = build(spec)
        assert spec_of(again) == spec
        assert fingerprint(again) == fingerprint(reward)
        assert again.id == reward.id


# formats


def test_every_form_of_a_checkpoint_is_the_same(tmp_path, arch, state):
    """A plain and a wrapped torch file, data-parallel names, safetensors, a folder."""
    torch.save(state, tmp_path / "plain.pt")
    torch.save(
        {"state_dict": {f"module.{k}": v for k, v in state.items()}}, tmp_path / "wrapped.pt"
    )
    one = {**state, "logit_scale": state["logit_scale"].reshape(1)}
    torch.save({"state_dict": one}, tmp_path / "one.pt")
    folder = tiny.clip_folder(tmp_path / "folder")
    pixels = torch.rand(1, 3, 32, 32)
    expected = reference().visual(CLIPReward(folder).preprocess(pixels))
    sources = [(arch, tmp_path / f"{name}.pt") for name in ("plain", "wrapped", "one")]
    sources.append((arch, tmp_path / "folder" / "open_clip_model.safetensors"))
    sources.append((folder, tmp_path / "plain.pt"))
    for model, file in sources:
        assert torch.equal(CLIPReward(model, str(file)).embed(pixels).image, expected)
    assert torch.equal(CLIPReward(folder).embed(pixels).image, expected)


def test_archive_of_openai(tmp_path, arch):
    """OpenAI's own files are TorchScript archives of networks with QuickGELU."""
    model = reference(quick_gelu=True)
    for name in ("input_resolution", "context_length", "vocab_size"):
        vars(model).pop(name, None)
        model.register_buffer(name, torch.tensor(1))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        inputs = torch.rand(1, 3, 32, 32), torch.ones(1, 16, dtype=torch.long)
        traced = torch.jit.trace(model, inputs, check_trace=False)
        torch.jit.save(traced, tmp_path / "ViT-tiny.pt")
        reward = CLIPReward("tiny-quickgelu", str(tmp_path / "ViT-tiny.pt"))
        pixels = torch.rand(1, 3, 32, 32)
        expected = reference(quick_gelu=True).visual(reward.preprocess(pixels))
        assert torch.equal(reward.embed(pixels).image, expected)
        with pytest.raises(ValueError, match="use model 'tiny-quickgelu'"):
            CLIPReward(arch, str(tmp_path / "ViT-tiny.pt"))


def test_hpsv2_reads_its_file(tmp_path, arch, state):
    file = tiny.hps_file(tmp_path / "HPS_v2.1_compressed.pt", state)
    reward = HPSv2Reward(arch, str(file))
    assert reward.preprocessing.mode == "pad"
    pixels = torch.rand(2, 3, 20, 50)
    text = reward.encode_text(PROMPTS)
    theirs = reference().half().float()
    image = theirs.encode_image(reward.preprocess(pixels), normalize=True)
    torch.testing.assert_close(reward(pixels, text), (image * text).sum(-1))
    assert next(reward.parameters()).dtype == torch.float32
    with pytest.raises(ValueError, match=r"expected one of v2\.0, v2\.1"):
        HPSv2Reward(arch, str(file), version="v3")
    # a folder with the config beside the published kind of file
    config = {"model_cfg": tiny.clip_config(), "preprocess_cfg": {}}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(config))
    again = HPSv2Reward(f"local-dir:{tmp_path}")
    assert torch.equal(again(pixels, text), reward(pixels, text))
    (tmp_path / "second.pt").touch()
    with pytest.raises(FileNotFoundError, match="has no weights"):
        HPSv2Reward(f"local-dir:{tmp_path}")
    with pytest.raises(ValueError, match=r"QuickGELU mismatch.*use model 'tiny'"):
        HPSv2Reward("tiny-quickgelu", str(file))


@pytest.mark.parametrize("relu", [False, True])
def test_aesthetic_is_the_mlp_of_the_unit_embedding(tmp_path, relu):
    folder = tiny.clip_folder(tmp_path, quick_gelu=True)
    path = tiny.head_file(tmp_path / "aesthetic.pth", relu=relu)
    reward = AestheticReward(folder)
    state = torch.load(path)
    pixels = torch.rand(3, 3, 40, 50)
    x = F.normalize(reference(quick_gelu=True).visual(reward.preprocess(pixels)), dim=-1)
    places = sorted({int(key.split(".")[1]) for key in state})
    for place in places:
        x = F.linear(x, state[f"layers.{place}.weight"], state[f"layers.{place}.bias"])
        x = x.relu() if relu and place != places[-1] else x
    torch.testing.assert_close(reward(pixels), x.squeeze(-1))
    assert reward.affine == (not relu)
    assert not reward.uses_text
    assert not any(name.startswith("text") for name, _ in reward.named_parameters())
    with pytest.raises(ValueError, match="reads no text"):
        reward.encode_text(PROMPTS)
    e = F.normalize(torch.randn(6, 24), dim=-1)
    average = reward._score(e.mean(0, keepdim=True), None)
    assert torch.allclose(reward.score(e).mean(), average[0], atol=1e-5) == (not relu)


def test_a_head_that_is_none_is_named(tmp_path, folder, state):
    torch.save({"fc.weight": torch.zeros(1, 24)}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match=r"is not an aesthetic head: it has \['fc.weight'\]"):
        AestheticReward(folder, head=str(tmp_path / "other.pth"))
    tiny.head_file(tmp_path / "wide.pth", embed_dim=32)
    with pytest.raises(
        ValueError, match=r"is \(64, 32\), expected \(…, 24\): this head was made for"
    ):
        AestheticReward(folder, head=str(tmp_path / "wide.pth"))
    with pytest.raises(FileNotFoundError, match=r"has no aesthetic\.pth; give `head`"):
        AestheticReward(folder)


def test_the_published_head_is_looked_for_in_the_cache(monkeypatch, tmp_path):
    """A file in the cache under the published name, but with other bytes, is not taken for it."""
    monkeypatch.setenv("STITCHVM_CACHE", str(tmp_path))
    tiny.head_file(tmp_path / "sac+logos+ava1-l14-linearMSE.pth", 768)
    with pytest.raises(ValueError, match="is not the published sac"):
        AestheticReward()


# errors


def test_keys_that_do_not_fit_are_named(tmp_path, arch, state):
    part = {k: v for k, v in state.items() if k != "visual.ln_post.weight"}
    torch.save({**part, "head.bias": torch.zeros(1)}, tmp_path / "part.pt")
    message = r"1 missing: visual\.ln_post\.weight; 1 unexpected: head\.bias"
    with pytest.raises(ValueError, match=message):
        CLIPReward(arch, str(tmp_path / "part.pt"))
    other = tiny.clip_model(tiny.clip_config(image_size=40)).state_dict()
    torch.save(other, tmp_path / "larger.pt")
    with pytest.raises(ValueError, match=r"positional_embedding \(26, 32\), expected \(17, 32\)"):
        CLIPReward(arch, str(tmp_path / "larger.pt"))


def test_a_file_that_holds_no_weights_is_named(tmp_path, arch):
    (tmp_path / "text.pt").write_text("not weights")
    with pytest.raises(ValueError, match=r"text\.pt is not a file of weights"):
        CLIPReward(arch, str(tmp_path / "text.pt"))
    torch.save({"epoch": 3, "name": "x"}, tmp_path / "training.pt")
    with pytest.raises(ValueError, match="holds no tensors by name"):
        CLIPReward(arch, str(tmp_path / "training.pt"))


@pytest.mark.parametrize(
    ("model", "checkpoint_file"),
    [
        ("ViT-L-14-336", "openai"),
        ("ViT-H-14-378", "dfn5b"),
        ("ViT-L-14", "openai"),
        # no tag, but every published checkpoint of these has QuickGELU
        ("ViT-L-14-336", "weights.pt"),
        ("ViT-L-14", "timm/vit_large_patch14_clip_224.openai/open_clip_model.safetensors"),
    ],
)
@pytest.mark.filterwarnings("ignore:DFN")
def test_wrong_activation_names_the_right_model(tmp_path, monkeypatch, model, checkpoint_file):
    """The weights are never looked for: the names alone show the mistake."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "weights.pt").touch()
    with pytest.raises(ValueError, match=f"QuickGELU.*use model '{model}-quickgelu'"):
        CLIPReward(model, checkpoint_file)


@pytest.mark.filterwarnings("ignore:DFN")
def test_public_ids_lead_to_their_files(monkeypatch, tmp_path):
    """What would be asked for, and how images would be resized, without a download."""
    asked = []

    def not_there(name):
        asked.append(name)
        raise FileNotFoundError(name)

    monkeypatch.setattr(checkpoint, "resolve_file", not_there)
    for make in (
        CLIPReward,
        lambda: CLIPReward("ViT-H-14-378-quickgelu"),
        HPSv2Reward,
        lambda: HPSv2Reward(version="v2.0"),
        lambda: AestheticReward(head=str(tiny.head_file(tmp_path / "head.pth", 768))),
        lambda: CLIPReward("ViT-H-14-378-quickgelu", "a/b/dfn.bin"),
    ):
        with pytest.raises(FileNotFoundError):
            make()
    for repository in (
        "timm/vit_large_patch14_clip_336.openai",
        "apple/DFN5B-CLIP-ViT-H-14-378",
        "timm/vit_large_patch14_clip_224.openai",
    ):
        assert f"{repository}/open_clip_model.safetensors" in asked
        assert f"{repository}/open_clip_pytorch_model.bin" in asked
    assert "xswu/HPSv2/HPS_v2.1_compressed.pt" in asked
    assert "xswu/HPSv2/HPS_v2_compressed.pt" in asked
    for tag in ("dfn5b", "weights.bin"):
        source = checkpoint._architecture_source("ViT-H-14-378-quickgelu", tag)
        assert source.preprocess["resize_mode"] == "squash"
    source = checkpoint._architecture_source("ViT-L-14-336-quickgelu", "openai")
    assert source.preprocess["resize_mode"] == "shortest"


def test_unknown_names_are_errors(tmp_path, folder):
    with pytest.raises(ValueError, match="open_clip has no architecture 'ViT-Q'"):
        CLIPReward("ViT-Q", "openai")
    with pytest.raises(ValueError, match="neither a file nor a tag of ViT-L-14-336-quickgelu"):
        CLIPReward("ViT-L-14-336-quickgelu", "opnai")
    with pytest.raises(ValueError, match="which weights of ViT-B-32"):
        CLIPReward("ViT-B-32")
    with pytest.raises(FileNotFoundError):
        CLIPReward("ViT-L-14-336-quickgelu", str(tmp_path / "no.pt"))
    with pytest.raises(FileNotFoundError):
        CLIPReward(f"local-dir:{tmp_path / 'no'}")
    with pytest.raises(FileNotFoundError, match=r"has no open_clip_config\.json"):
        CLIPReward(f"local-dir:{tmp_path}")
    with pytest.raises(FileNotFoundError, match="embedded world has no"):
        CLIPReward("world:nothing")


def test_towers_that_cannot_be_cut_are_errors(tmp_path, state):
    resnet = {"layers": [1, 1, 1, 1], "width": 8, "image_size": 32}
    tiny.register("tiny-resnet", tmp_path, {**tiny.clip_config(), "vision_cfg": resnet})
    torch.save(open_clip.create_model("tiny-resnet").state_dict(), tmp_path / "resnet.pt")
    with pytest.raises(ValueError, match="the vision tower is a ModifiedResNet"):
        CLIPReward("tiny-resnet", str(tmp_path / "resnet.pt"))
    timm = {**tiny.clip_config(), "vision_cfg": {"timm_model_name": "vit_base_patch16_224"}}
    tiny.register("tiny-timm", tmp_path, timm)
    torch.save(state, tmp_path / "plain.pt")
    with pytest.raises(ValueError, match="is not a plain CLIP"):
        CLIPReward("tiny-timm", str(tmp_path / "plain.pt"))


def test_research_licence_is_told_once(tmp_path, arch, state):
    torch.save(state, tmp_path / "DFN5B.pt")
    checkpoint._warn_dfn.cache_clear()
    with pytest.warns(UserWarning, match="Apple's machine learning research model licence"):
        CLIPReward(arch, str(tmp_path / "DFN5B.pt"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        CLIPReward(arch, str(tmp_path / "DFN5B.pt"))
