"""PickScore and ImageReward as terminal, Tweedie and Monte Carlo values, in an evaluation, and in the configs."""

import inspect
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import yaml
from torch import nn

from stitchvm.modules.tasks import TASKS
from stitchvm.path import FlowPath
from stitchvm.rewards.imagereward import ImageReward
from stitchvm.rewards.pickscore import PickScoreReward
from stitchvm.values.monte_carlo import MonteCarloValue
from stitchvm.values.terminal import TerminalValue
from stitchvm.values.tweedie import TweedieValue
from tests.rewards import published
from tests.values.fakes import IdentityVAE

CONFIGS = Path(__file__).parents[2] / "configs" / "rewards"
PROMPTS = ["a red circle", "the blue square"]


class PixelWorld(nn.Module):
    """The exact velocity for independent pixels ~ N(0.5, 0.2²): pixels are latents."""

    def __init__(self):
        super().__init__()
        self.vae, self.null = IdentityVAE(), None

    def encode_prompts(self, prompts):
        raise AssertionError("no estimator here was made to use prompts")

    def velocity(self, z_t, t, cond, guidance_scale=None):
        t = t.reshape(-1, 1, 1, 1)
        gain = (1 - t) * 0.04 / ((1 - t) ** 2 * 0.04 + t**2)
        return (z_t - 0.5 - gain * (z_t - (1 - t) * 0.5)) / t


@pytest.fixture(scope="module", params=["pickscore", "imagereward"])
def reward(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    if request.param == "pickscore":
        return PickScoreReward(published.pickscore_folder(folder))
    return ImageReward(published.imagereward_folder(folder))


def latents():
    return (0.5 + 0.2 * torch.randn(2, 3, 32, 40)).requires_grad_()


def test_terminal_is_the_reward_itself(reward):
    z_0 = latents()
    v = TerminalValue(IdentityVAE(), reward).bind(PROMPTS)
    value = v(z_0, torch.zeros(2))
    expected = reward(z_0, reward.encode_text(PROMPTS))
    torch.testing.assert_close(value, expected)
    (gradient,) = torch.autograd.grad(value.sum(), z_0)
    assert gradient.abs().amax((1, 2, 3)).min() > 0
    with pytest.raises(ValueError, match="at t = 0 only"):
        v(z_0, torch.full((2,), 0.5))


@pytest.mark.parametrize("checkpointing", [False, True])
def test_tweedie_is_the_reward_of_the_denoised(reward, checkpointing):
    z_t, t, world = latents(), torch.tensor([0.3, 0.7]), PixelWorld()
    value = TweedieValue(world, reward, checkpointing=checkpointing).bind(PROMPTS)(z_t, t)
    clean = FlowPath.denoise(z_t, world.velocity(z_t, t, None), t)
    expected = reward(clean, reward.encode_text(PROMPTS))
    torch.testing.assert_close(value, expected)
    gradients = [torch.autograd.grad(x.sum(), z_t)[0] for x in (value, expected)]
    torch.testing.assert_close(*gradients)
    assert gradients[0].abs().amax((1, 2, 3)).min() > 0
    # one prompt for all
    both = TweedieValue(world, reward).bind(PROMPTS[:1])(z_t, t)
    torch.testing.assert_close(both, reward(clean, reward.encode_text(PROMPTS[:1] * 2)))


@pytest.mark.parametrize("reduction", ["mean", "log_mean_exp"])
def test_monte_carlo_scores_every_rollout(reward, reduction):
    """Its embeddings have unit length: for ImageReward nothing may be lost by that."""
    z_t, t, world = latents(), torch.tensor([0.3, 0.7]), PixelWorld()
    value = MonteCarloValue(world, reward, rollouts=3, steps=3, reduction=reduction)
    got = value.bind(PROMPTS, generator=torch.Generator().manual_seed(5))(z_t, t)
    z_0 = value.rollout(
        z_t.repeat(3, 1, 1, 1), t.repeat(3), None, torch.Generator().manual_seed(5)
    )
    r = reward(z_0, reward.encode_text(PROMPTS * 3)).unflatten(0, (3, 2))
    assert r.std(0).min() > 1e-3
    expected = r.mean(0) if reduction == "mean" else r.exp().mean(0).log()
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


def test_an_average_embedding_has_the_average_score_or_is_refused(reward):
    z_t, t = latents().detach(), torch.tensor([0.3, 0.7])
    value = MonteCarloValue(PixelWorld(), reward, rollouts=3, steps=3)
    mean = value.embed(z_t, t, generator=torch.Generator().manual_seed(5))
    text = value.encode_text(PROMPTS)
    if not reward.affine:
        with pytest.raises(ValueError, match=r"not affine in the image embedding.*bind the value"):
            value.score(mean, text)
        return
    bound = value.bind(PROMPTS, generator=torch.Generator().manual_seed(5))(z_t, t)
    torch.testing.assert_close(value.score(mean, text), bound, rtol=1e-4, atol=1e-4)


def test_evaluation_with_unit_embeddings_is_the_reward(reward):
    """An evaluation normalises image and text before it scores them."""
    pixels = torch.rand(4, 3, 32, 40)
    prompts = [PROMPTS[0]] * 2 + [PROMPTS[1]] * 2
    image = F.normalize(reward.embed(pixels).image.float(), dim=-1)
    text = F.normalize(reward.encode_text(prompts).float(), dim=-1)
    score = reward.score(image, text)
    torch.testing.assert_close(
        score, reward(pixels, reward.encode_text(prompts)), rtol=1e-4, atol=1e-4
    )


def test_retrieval_needs_a_product_of_embeddings(reward):
    batch = {"index": torch.arange(1), "captions": [["a"]]}
    if reward.affine:
        TASKS["retrieval"]().check(batch, reward)
        return
    with pytest.raises(ValueError, match="compares images with texts by the product"):
        TASKS["retrieval"]().check(batch, reward)


@pytest.mark.parametrize(
    ("name", "cls"), [("pickscore", PickScoreReward), ("imagereward", ImageReward)]
)
def test_configs_name_the_classes_and_their_arguments(name, cls):
    config = yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())
    assert config["class_path"] == f"{cls.__module__}.{cls.__qualname__}"
    inspect.signature(cls).bind(**config["init_args"])
    ids = [v for v in config["init_args"].values() if isinstance(v, str) and "/" in v]
    assert len(ids) == 2
    assert all(v.count("/") == 1 for v in ids), "hub ids"
