"""FK steering on a tiny SD3 pipeline: work that values share with the velocity, values of other backbones."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from stitchvm.backbones.sd3 import SD3Backbone
from stitchvm.generator import Generator
from stitchvm.rewards.clip import CLIPReward
from stitchvm.samplers.fk import FKSteering
from stitchvm.value_model import StitchedValueModel
from stitchvm.values.stitched import StitchedValue
from stitchvm.values.terminal import TerminalValue
from stitchvm.values.tweedie import TweedieValue
from tests.tiny import sd3_folder

PROMPTS = ["a red circle", "a blue square left of the red circle"]


@pytest.fixture(scope="module")
def stitched(sd3: Generator, value_folder: Path) -> StitchedValue:
    return StitchedValue.from_pretrained(value_folder, generator=sd3)


def written(backbone: Path, clip: CLIPReward, folder: Path) -> Path:
    """Writes a value model on a backbone, with random weights, and returns the folder."""
    torch.manual_seed(0)
    network = SD3Backbone(str(backbone), max_depth=3, dtype="float32", null_tokens=12)
    model = StitchedValueModel(network, clip, (2, 1))
    torch.nn.init.normal_(model.stitch.F.weight, std=0.3)
    return model.save_pretrained(folder)


def sampler(**changes: object) -> FKSteering:
    settings = {"lam": 5.0, "num_steps": 6, "resample_every": 2, "resample_from": 1} | changes
    return FKSteering(3, 2, **settings)


def test_the_chosen_childs_prefix_goes_on(sd3: Generator, stitched: StitchedValue) -> None:
    shared = sampler()(sd3, PROMPTS, stitched, seeds=5)
    apart = sampler(share_prefix=False)(sd3, PROMPTS, stitched, seeds=5)
    pieces = sampler(micro_batch=4)(sd3, PROMPTS, stitched, seeds=5)
    assert min(float(r.info["distinct_ancestors"].min()) for r in shared.records if r.info) < 1
    assert torch.allclose(shared.particles, apart.particles, atol=1e-4)
    assert torch.allclose(shared.particles, pieces.particles, atol=1e-4)
    # scored at steps 1, 2 (M = 2), 3 and 5: the velocities of the next steps go on from there
    assert shared.calls == {
        "velocity": 36,
        "continued": 24,
        "value": 2 * 12 + 2 * 6 + 6,
    }
    assert apart.calls["continued"] == 0
    assert pieces.calls == shared.calls


def test_a_smaller_backbones_value_steers(
    sd3: Generator, stitched: StitchedValue, clip: CLIPReward, tmp_path: Path
) -> None:
    sizes = {"num_layers": 4, "num_attention_heads": 1, "caption_projection_dim": 16}
    small = sd3_folder(tmp_path / "small", seed=5, dual_attention_layers=(0,), **sizes)
    folder = written(small, clip, tmp_path / "value")
    value = StitchedValue.from_pretrained(folder, generator=sd3)
    assert value.value_model.backbone.width(2) == 16 != stitched.value_model.backbone.width(2)
    samples = sampler()(sd3, PROMPTS, value, seeds=5)
    plain = sampler(lam=0.0)(sd3, PROMPTS, value, seeds=5)
    assert samples.calls["continued"] == 0 and samples.latents.isfinite().all()
    assert samples.final_values.mean() > plain.final_values.mean()
    again = sampler(share_prefix=False)(sd3, PROMPTS, value, seeds=5)
    assert torch.equal(samples.latents, again.latents)


def test_a_value_of_another_latent_space_is_an_error(
    sd3: Generator, clip: CLIPReward, tmp_path: Path
) -> None:
    other = sd3_folder(tmp_path / "other", in_channels=8, out_channels=8)
    folder = written(other, clip, tmp_path / "value")
    with pytest.raises(ValueError, match=r"reads latents of 8 channels .* has 4"):
        StitchedValue.from_pretrained(folder, generator=sd3)
    same_size = sd3_folder(tmp_path / "same size", seed=3)
    config = same_size / "vae" / "config.json"
    config.write_text(
        config.read_text().replace('"scaling_factor": 1.5', '"scaling_factor": 0.3611')
    )
    elsewhere = written(same_size, clip, tmp_path / "elsewhere")
    with pytest.raises(
        ValueError, match=r"shift \(0.3611, 0.1\).* have \(1.5, 0.1\): another VAE"
    ):
        StitchedValue.from_pretrained(elsewhere, generator=sd3)
    value = StitchedValue.from_pretrained(folder)  # nobody compared, until it meets latents
    with pytest.raises(ValueError, match="latents"):
        sampler()(sd3, PROMPTS, value)


@pytest.mark.parametrize("velocity", ["cfg", "null"])
def test_a_tweedie_values_velocity_is_the_next_steps(
    sd3: Generator, clip: CLIPReward, velocity: str
) -> None:
    value = TweedieValue(sd3, clip, velocity=velocity)
    terminal = TerminalValue(sd3.vae, clip)
    rows: list[int] = []
    hook = sd3.transformer.register_forward_pre_hook(
        lambda _, args, kwargs: rows.append(len(kwargs["hidden_states"])), with_kwargs=True
    )
    settings = {"lam": 3.0, "num_steps": 6, "resample_every": 1, "resample_from": 1}
    try:
        counts, samples = {}, {}
        for share in (True, False):
            rows.clear()
            steered = FKSteering(3, resample_to=5, share_prefix=share, **settings)
            samples[share] = steered(sd3, PROMPTS, value, seeds=5, final_value=terminal)
            counts[share] = sum(rows)
        rows.clear()
        parent = FKSteering(3, resample_to=5, score="parent", **settings)
        parent(sd3, PROMPTS, terminal, seeds=5)
    finally:
        hook.remove()
    plain = 6 * 6 * 2  # steps × rows × branches
    assert (
        counts[True] == plain == sum(rows)
    )  # fresh, and as cheap as the stale score of the parents
    assert counts[False] == plain + 5 * 6 * (2 if velocity == "cfg" else 1)
    drawn = [r.info["distinct_ancestors"].min() for r in samples[True].records if r.info]
    assert len(drawn) == 5 and min(drawn) < 1
    assert torch.allclose(samples[True].particles, samples[False].particles, atol=1e-4)
