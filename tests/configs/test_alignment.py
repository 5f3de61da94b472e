"""The fine-tuning configs: the paper's numbers, the same settings where only networks and sizes differ."""

from __future__ import annotations

import pytest
import yaml

from tests.configs.test_all import CONFIGS, parse

DRAFT = [f"draft{K}{stitched}" for K in (1, 3) for stitched in ("", "_stitched")]


@pytest.mark.parametrize("name", DRAFT)
def test_papers_draft_settings(name, monkeypatch):
    """Appendix D.3: LoRA 32/64, lr 5e-5, no decay, clip 1, 10 steps, shift 3, CFG 1, window 3…7, λ .01, 2048 images."""
    config = parse(CONFIGS / f"{name}_sd35m.yaml", monkeypatch=monkeypatch).config.fit
    model, data = config.model.init_args, config.data.init_args
    assert (model.policy.init_args.r, model.policy.init_args.alpha) == (32, 64)
    assert (model.lr, model.weight_decay, model.clip, model.lam) == (5e-5, 0.0, 1.0, 0.01)
    assert (model.num_steps, model.shift, model.guidance_scale) == (10, 3.0, 1.0)
    assert (model.height, model.width) == (512, 512)
    assert model.backprop_steps == int(name[5])
    assert model.group_size * data.prompts_per_update == 2048
    sampler = model.evaluation.sampler.init_args
    assert (sampler.num_steps, sampler.guidance_scale) == (40, 1.0)
    assert {"dfn_clip", "hpsv2", "imagereward", "pickscore"} == set(model.evaluation.rewards)
    if "stitched" in name:
        assert model.stop == [3, 7]
        terms = model.value.init_args.terms
        assert set(terms) == {"dfn_clip", "hpsv2"}
        assert {t["weight"] for t in terms.values()} == {1.0}
        for term, path in terms.items():
            arguments = path["value"]["init_args"]
            assert arguments["share_generator"]
            assert arguments["path"] == f"runs/distill_sd35m_{term}/value_model"
    else:
        assert model.stop is None and set(model.reward.init_args.rewards) == {"dfn_clip", "hpsv2"}


@pytest.mark.parametrize("name", DRAFT)
def test_the_world_is_trained_as_the_paper_trains(name):
    """Nothing but networks and sizes differs."""
    sizes = {"generator", "value", "reward", "policy", "evaluation", "height", "width"}
    sizes |= {"micro_batch", "gradient_checkpointing", "lr", "weight_decay"}
    found = []
    for where in ("sd35m", "world"):
        config = yaml.safe_load((CONFIGS / f"{name}_{where}.yaml").read_text())
        model = config["model"]["init_args"]
        found.append({key: value for key, value in model.items() if key not in sizes})
    assert found[0] == found[1]
