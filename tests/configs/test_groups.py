"""The configs of DiffusionNFT and Flow-GRPO: the references' numbers; where only networks and sizes differ."""

from __future__ import annotations

import pytest
import yaml

from tests.configs.test_all import CONFIGS, parse

NFT, GRPO = ["nft", "nft_stitched"], ["grpo_fast", "grpo"]


@pytest.fixture
def settings(monkeypatch):
    """Returns model, data and trainer of a run at SD 3.5 Medium."""

    def read(name: str):
        config = parse(CONFIGS / f"{name}_sd35m.yaml", monkeypatch=monkeypatch).config.fit
        return config.model.init_args, config.data.init_args, config.trainer

    return read


@pytest.mark.parametrize("name", NFT + GRPO)
def test_common_settings(name, settings):
    """LoRA 32/64, lr 3e-4, decay 1e-4, clip 1, A_max 5, global spread, CFG 1, 512², 1152 images an update."""
    model, data, _ = settings(name)
    policy = model.policy.init_args
    assert (policy.r, policy.alpha, policy.attn2) == (32, 64, False)
    assert (model.lr, model.weight_decay, model.clip) == (3e-4, 1e-4, 1.0)
    assert (model.adv_clip, model.std, model.normalise) == (5.0, "global", "none")
    assert (model.guidance_scale, model.grid, model.shift) == (1.0, "double", 3.0)
    assert (model.height, model.width, model.micro_batch) == (512, 512, 9)
    assert model.group_size * data.prompts_per_update == 1152
    sampler = model.evaluation.sampler.init_args
    assert (sampler.num_steps, sampler.guidance_scale) == (40, 1.0)
    assert {"dfn_clip", "hpsv2", "imagereward", "pickscore"} == set(model.evaluation.rewards)
    if name == "nft_stitched":
        terms = model.value.init_args.terms
        assert {term: path["value"]["init_args"]["path"] for term, path in terms.items()} == {
            reward: f"runs/distill_sd35m_{reward}/value_model" for reward in ("dfn_clip", "hpsv2")
        }
    else:
        assert set(model.reward.init_args.rewards) == {"dfn_clip", "hpsv2"}


@pytest.mark.parametrize("name", NFT)
def test_diffusion_nft(name, settings):
    """sd3_multi_reward: K 24, 25 steps, β 0.1, decay type 1, "KL" 1e-4; Appendix D.3: the window 12 … 17."""
    model, _, _ = settings(name)
    assert (model.group_size, model.num_steps, model.fraction) == (24, 25, 0.99)
    assert (model.beta, model.lam, model.decay_type, model.inner_steps) == (0.1, 1e-4, 1, 1)
    assert model.form == "self_normalised" and model.ema_limit == 0.9
    assert model.stop == ([12, 17] if "stitched" in name else None)


@pytest.mark.parametrize("window", ["[12, 25]", "[2, 12]", "[20, 25]"])
def test_the_windows_of_figure_7_are_said_and_parse(window, monkeypatch):
    path = CONFIGS / "nft_stitched_sd35m.yaml"
    assert f"--model.stop '{window}'" in path.read_text()
    config = parse(path, "--model.stop", window, monkeypatch=monkeypatch).config.fit
    assert config.model.init_args.stop == yaml.safe_load(window)


@pytest.mark.parametrize("name", GRPO)
def test_flow_grpo(name, settings):
    """pickscore_sd3_fast_nocfg, and pickscore_sd3: 10 steps, two optimiser steps an update."""
    model, _, trainer = settings(name)
    assert (model.num_steps, model.inner_steps, model.stop) == (10, 2, None)
    noise = (model.window, model.kind, model.noise_level, model.ratio_clip, model.kl)
    if name == "grpo_fast":
        assert noise == (3, "cps", 0.8, 1e-5, 0.0)
        assert (model.group_size, model.bounds) == (18, [0, 5])
    else:
        assert noise == (None, "sde", 0.7, 1e-4, 0.01)
        assert model.group_size == 24
    # the average of eight steps: 0.9
    assert model.ema_limit**8 == pytest.approx(0.9, abs=1e-3)
    # a skipped step must not keep the number of steps from being a multiple of it
    (kept,) = trainer.callbacks
    assert kept.init_args.every_n_train_steps % model.inner_steps


@pytest.mark.parametrize("name", [*NFT, "grpo_fast"])
def test_the_world_is_trained_as_the_references_train(name):
    """Nothing but networks and sizes differs."""
    sizes = {"generator", "value", "reward", "policy", "evaluation", "height", "width", "shift"}
    sizes |= {"micro_batch", "rollout_batch", "gradient_checkpointing", "lr", "betas", "grid"}
    sizes |= {"weight_decay", "group_size", "num_steps", "stop", "ratio_clip"}
    found = []
    for where in ("sd35m", "world"):
        config = yaml.safe_load((CONFIGS / f"{name}_{where}.yaml").read_text())
        model = config["model"]["init_args"]
        found.append({key: value for key, value in model.items() if key not in sizes})
    found[1].setdefault("inner_steps", 1)
    assert found[0] == found[1]
