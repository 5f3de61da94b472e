"""A value model that was made for other blocks, another reward or another latent space is told before it is loaded."""

from __future__ import annotations

import pytest
from rehearsal_weights import write_safetensors

from stitchvm.preflight.walk import check
from tests.preflight.conftest import FLUX, MEDIUM, change, part, replace, run

CLIP = part("CLIPReward", model="ViT-L-14-336-quickgelu", checkpoint="openai")
LARGE = "stabilityai/stable-diffusion-3.5-large"


@pytest.fixture
def value_model(tmp_path):
    """Returns what writes a value model's folder: the numbers of the tiny SD 3.5 Medium and CLIP by default."""

    def write(backbone=None, reward=CLIP, stitch=(32, 32, 1, 1)):
        folder = tmp_path / "value_model"
        folder.mkdir(exist_ok=True)
        backbone = backbone or part("SD3Backbone", path=MEDIUM)
        config = {"format": 1, "stitch_point": [4, 1], "backbone": backbone, "reward": reward}
        replace(folder / "config.json", config)
        write_safetensors(folder / "model.safetensors", {"stitch.F.weight": stitch}, "float32")
        return part("StitchedFactory", path=folder)

    return write


def of(value, reward=CLIP, generator=MEDIUM):
    """What is found of the value model itself."""
    config = run(value=value, reward=reward, generator=part("Generator", path=generator))
    path = value["init_args"]["path"]
    return next(f for f in check(config) if f.what.startswith(path))


def test_one_that_fits(hub, value_model):
    assert of(value_model()).state == "ok"
    assert of(value_model(), generator=LARGE).state == "ok", "the same latents (Table 6)"


def test_what_it_brings_along_is_looked_at(hub, copy, value_model):
    """Blocks of another repository than the generator's, and a reward that the run does not name."""
    medium = copy(MEDIUM)
    value = value_model(backbone=part("SD3Backbone", path=medium))
    config = run(value=value, reward=CLIP, generator=part("Generator", path=LARGE))
    assert {f.state for f in check(config)} == {"ok"}
    assert f"{medium}/transformer" in {f.what for f in check(config)}
    (medium / "transformer" / "diffusion_pytorch_model.safetensors").unlink()
    (missing,) = (f for f in check(config) if f.state != "ok")
    assert missing.state == "missing" and missing.what.startswith(f"{medium}/transformer")
    absent = part("CLIPReward", model="ViT-L-14-336-quickgelu", checkpoint="org/nothing/clip.pt")
    found = check(run(value=value_model(reward=absent), generator=part("Generator", path=MEDIUM)))
    assert [f.what for f in found if f.state != "ok"] == ["org/nothing/clip.pt"]


def test_one_that_is_not_there_yet(hub):
    value = part("StitchedFactory", path="runs/distill_sd35m_hpsv2/value_model")
    finding = of(value)
    assert finding.state == "missing"
    assert finding.remedy == "`stitchvm fit --config configs/distill_sd35m_hpsv2.yaml` makes it"


def test_blocks_of_another_width(hub, value_model):
    finding = of(value_model(stitch=(32, 1536, 1, 1)))
    assert finding.state == "wrong" and "width 1536" in finding.detail and "32" in finding.detail


def test_a_reward_of_another_width(hub, value_model):
    finding = of(value_model(stitch=(1280, 32, 1, 1)))
    assert finding.state == "wrong" and "width 1280" in finding.detail


def test_another_class_of_blocks(hub, value_model):
    finding = of(value_model(backbone=part("SD3Backbone", path=FLUX)))
    assert finding.state == "wrong" and "FluxTransformer2DModel" in finding.detail


def test_another_latent_space(hub, value_model):
    finding = of(value_model(), generator=FLUX)
    assert finding.state == "wrong" and "1.5305" in finding.detail and "0.3611" in finding.detail
    own = value_model(backbone=part("LatentBackbone", channels=4), stitch=(32, 4, 1, 1))
    assert "4 channels" in of(own).detail
    latents = part("LatentBackbone", channels=16, scale=1.5305, shift=0.0609)
    stitch = value_model(backbone=latents, stitch=(32, 16, 1, 1))
    assert of(stitch).state == "ok"
    told = of(stitch, generator=FLUX)
    assert told.state == "wrong" and "(1.5305, 0.0609)" in told.detail
    # an evaluation has a VAE
    for wrote in (lambda: value_model(backbone=latents, stitch=(32, 16, 1, 1)), value_model):
        value = wrote()
        for vae, state in ((MEDIUM, "ok"), (FLUX, "wrong")):
            config = run(estimators={"it": value}, reward=CLIP, vae=part("VAE", path=vae))
            found = [f for f in check(config) if f.what == value["init_args"]["path"]]
            assert [f.state for f in found] == [state]


def test_another_reward(hub, value_model):
    finding = of(value_model(), reward=part("HPSv2Reward"))
    assert finding.state == "wrong" and "HPSv2Reward" in finding.detail
    other = part("CLIPReward", model="ViT-H-14-378-quickgelu", checkpoint="dfn5b")
    assert "ViT-H-14-378-quickgelu" in of(value_model(), reward=other).detail
    spelled = part(
        "CLIPReward", model="ViT-L-14-336-quickgelu", checkpoint="openai", dtype="bfloat16"
    )
    assert of(value_model(), reward=spelled).state == "ok", "its dtype is no other reward"


def test_files_that_are_none(hub, value_model):
    from pathlib import Path

    value = value_model()
    folder = Path(value["init_args"]["path"])
    change(folder / "config.json", backbone=None)
    assert of(value).state == "wrong"
    whole = value_model()
    data = (folder / "model.safetensors").read_bytes()
    replace(folder / "model.safetensors", data[:-8])
    assert of(whole).state == "wrong" and "truncated" in of(whole).detail
    (folder / "model.safetensors").unlink()
    assert of(whole).state == "missing"


def test_terms_of_a_sum_have_rewards_of_their_own(hub, value_model):
    term = {"value": value_model(), "reward": part("HPSv2Reward")}
    total = {
        "class_path": "stitchvm.values.weighted.WeightedFactory",
        "init_args": {"terms": {"clip": term}},
    }
    found = check(run(value=total, reward=CLIP, generator=part("Generator", path=MEDIUM)))
    assert [f for f in found if f.state == "wrong" and "HPSv2Reward" in f.detail]
