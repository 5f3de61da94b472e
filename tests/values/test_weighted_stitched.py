"""Weighted sums of stitched values: shared runs of a network, shared parts, sums from a YAML file."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch
import yaml
from jsonargparse import ArgumentParser

from stitchvm.backbones.latent import LatentBackbone
from stitchvm.backbones.sd3 import SD3Backbone
from stitchvm.generator import Generator
from stitchvm.rewards.aesthetic import AestheticReward
from stitchvm.rewards.base import Reward
from stitchvm.rewards.clip import CLIPReward
from stitchvm.rewards.weighted import WeightedReward
from stitchvm.samplers.field import Field
from stitchvm.value_model import StitchedValueModel
from stitchvm.values.parts import Parts, ValueFactory
from stitchvm.values.stitched import StitchedFactory, StitchedValue
from stitchvm.values.tweedie import TweedieFactory, TweedieValue
from stitchvm.values.weighted import Term, WeightedFactory, WeightedValue
from tests.rewards.tiny import head_file
from tests.values.fakes import WorldGenerator, mixture

PROMPTS = ["a red circle", "a blue square left of the red circle"]


# Stitched values on one network.


def clip_reward(folder: Path) -> Reward:
    return CLIPReward(model=f"local-dir:{folder}")


@pytest.fixture(scope="module")
def folders(
    tiny_sd3: Path, tiny_clip: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    """Returns value models of CLIP after block 2 and of an aesthetic reward after block 3, on one backbone."""
    torch.manual_seed(0)
    root = tmp_path_factory.mktemp("values")
    head = str(head_file(root / "head.pth"))
    rewards = {
        "clip": clip_reward(tiny_clip),
        "aesthetic": AestheticReward(model=f"local-dir:{tiny_clip}", head=head),
    }
    found = {}
    for i, (name, reward) in enumerate(rewards.items(), 2):
        backbone = SD3Backbone(str(tiny_sd3), max_depth=3, dtype="float32", null_tokens=12)
        model = StitchedValueModel(backbone, reward, (i, 1))
        torch.nn.init.normal_(model.stitch.F.weight, std=0.3)
        found[name] = model.save_pretrained(root / name)
    return found


@pytest.fixture(scope="module")
def sd3(tiny_sd3: Path) -> Generator:
    return Generator(str(tiny_sd3), text_tokens=12, guidance_scale=4.5)


def blocks_run(network: torch.nn.Module) -> list[int]:
    """Returns a list to which every block's number is added when it runs."""
    ran: list[int] = []
    for k, block in enumerate(network.transformer_blocks):
        block.register_forward_hook(lambda *_, k=k: ran.append(k))
    return ran


def test_stitched_values_share_the_generators_null_branch(
    tiny_sd3: Path, folders: dict[str, Path]
) -> None:
    generator = Generator(str(tiny_sd3), text_tokens=12, guidance_scale=4.5)
    values = {
        name: StitchedValue.from_pretrained(path, generator=generator)
        for name, path in folders.items()
    }
    # a third model, at the depth of the first but on a network of its own: no prefix of the generator's is its own
    values["apart"] = StitchedValue.from_pretrained(folders["clip"])
    other = values["apart"].value_model.backbone.network.transformer_blocks[1]
    with torch.no_grad():
        other.ff.net[2].weight.mul_(20)
    value = WeightedValue(values, {"aesthetic": 0.5, "apart": -2.0})
    bound = value.bind(PROMPTS)
    shared = Field(generator, PROMPTS, None, bound)
    assert shared.depths == (2, 3)
    z, t, row = torch.randn(3, 4, 8, 8), torch.tensor(0.6), torch.tensor([0, 1, 1])
    ran = blocks_run(generator.transformer)
    v, slope_, prefix = shared.value_gradient(z, t, row)
    assert ran == [0, 1, 2]
    u, _ = shared.velocity(z, t, row, prefix)
    levels = t.expand(3)
    each = {
        name: one.bind(PROMPTS).select(row)(z, levels).detach() for name, one in values.items()
    }
    wanted = each["clip"] + 0.5 * each["aesthetic"] - 2 * each["apart"]
    assert (each["clip"] - each["apart"]).abs().max() > 1e-3
    torch.testing.assert_close(v, wanted)
    apart = Field(generator, PROMPTS, None, bound, share_prefix=False)
    torch.testing.assert_close(apart.value_gradient(z, t, row)[1], slope_)
    torch.testing.assert_close(apart.velocity(z, t, row)[0], u, rtol=1e-4, atol=1e-4)
    assert slope_.abs().max() > 1e-4


def test_without_a_prefix_one_network_still_runs_once(
    tiny_sd3: Path, folders: dict[str, Path]
) -> None:
    generator = Generator(str(tiny_sd3), text_tokens=12)
    value = WeightedValue(
        {
            name: StitchedValue.from_pretrained(path, generator=generator)
            for name, path in folders.items()
        }
    )
    assert len({id(v.value_model.backbone.network) for v in value.values.values()}) == 1
    z_t, t = torch.randn(2, 4, 8, 8), torch.tensor([0.3])
    each = [v.bind(PROMPTS)(z_t, t) for v in value.values.values()]
    ran = blocks_run(generator.transformer)
    v = value.bind(PROMPTS)(z_t, t)
    assert ran == [0, 1, 2]
    torch.testing.assert_close(v, each[0] + each[1])
    # a network on the raw latent has nothing to share
    latent = StitchedValueModel(LatentBackbone(4), value.values["clip"].reward, (0, 1))
    mixed = WeightedValue({**value.values, "latent": StitchedValue(latent)})
    v_mixed = mixed.bind(PROMPTS)(z_t, t)
    torch.testing.assert_close(v_mixed, v + StitchedValue(latent).bind(PROMPTS)(z_t, t))


def test_a_sampler_takes_the_velocity_of_a_tweedie_part(
    sd3: Generator, folders: dict[str, Path]
) -> None:
    stitched = StitchedValue.from_pretrained(folders["clip"], generator=sd3)
    tweedie = TweedieValue(sd3, stitched.reward)
    bound = WeightedValue({"stitched": stitched, "tweedie": tweedie}).bind(PROMPTS)
    shared = Field(sd3, PROMPTS, None, bound)
    apart = Field(sd3, PROMPTS, None, bound, share_prefix=False)
    assert shared.part == "null" and shared.depths == ()
    z, t, row = torch.randn(2, 4, 8, 8), torch.tensor(0.6), torch.tensor([1, 0])
    answers = [field.value_gradient(z, t, row) for field in (shared, apart)]
    for one, other in zip(answers[0][:2], answers[1][:2], strict=True):
        torch.testing.assert_close(one, other)
    velocities = [
        field.velocity(z, t, row, answer[2])[0]
        for field, answer in zip((shared, apart), answers, strict=True)
    ]
    torch.testing.assert_close(*velocities, rtol=1e-4, atol=1e-4)


# From a file.


def test_terms_share_the_run_and_bring_their_own_rewards(
    folders: dict[str, Path], tiny_sd3: Path
) -> None:
    built: list[str] = []

    def generator() -> Generator:
        built.append("generator")
        return Generator(str(tiny_sd3), text_tokens=12)

    terms = {
        "model": Term(StitchedFactory(str(folders["clip"]), share_generator=True), weight=2.0),
        "looks": Term(StitchedFactory(str(folders["aesthetic"])), mean=5.0, std=2.0),
        "again": Term(StitchedFactory(str(folders["clip"])), weight=-1.0),
    }
    parts = Parts(generator=generator)
    value = WeightedFactory(terms)(parts)
    assert list(value.values) == ["model", "looks", "again"] and built == ["generator"]
    model, looks, again = value.values.values()
    networks = [v.value_model.backbone.network for v in (model, looks, again)]
    assert networks[0] is parts.generator.transformer
    assert networks[1] is networks[2] and networks[1] is not networks[0]
    assert model.reward is again.reward and model.reward is not looks.reward
    assert parts.reward is value.reward  # the clean reward of the sum becomes the run's
    z_t, t = torch.randn(2, 4, 8, 8), torch.tensor([0.5])
    v = [one.bind(PROMPTS)(z_t, t) for one in (model, looks)]
    torch.testing.assert_close(value.bind(PROMPTS)(z_t, t), v[0] + (v[1] - 5) / 2)
    assert not any(p.requires_grad for p in value.parameters())
    assert WeightedFactory(terms).sources()["looks.value_model"] == str(folders["aesthetic"])


def test_terms_take_the_runs_reward_where_it_is_theirs(
    folders: dict[str, Path], tiny_clip: Path, tiny_sd3: Path
) -> None:
    counted: list[int] = []

    def reward() -> Reward:
        counted.append(1)
        return clip_reward(tiny_clip)

    def run() -> Parts:
        return Parts(reward, lambda: Generator(str(tiny_sd3), text_tokens=12))

    clip, looks = (StitchedFactory(str(folders[name])) for name in ("clip", "aesthetic"))
    parts = run()
    value = WeightedFactory([Term(clip), Term(looks), Term(TweedieFactory())])(parts)
    first, second, third = value.values.values()
    assert list(value.values) == ["1", "2", "3"]
    assert first.reward is third.reward is parts.reward and counted == [1]
    assert isinstance(second.reward, AestheticReward)
    # in a sum of sums, too
    counted.clear()
    parts = run()
    value = WeightedFactory([Term(WeightedFactory([Term(clip)])), Term(TweedieFactory())])(parts)
    assert value.values["1"].values["1"].reward is value.values["2"].reward is parts.reward
    assert counted == [1]
    # a reward that a term names is found by a value model that stands before it
    alone = Parts(generator=lambda: Generator(str(tiny_sd3), text_tokens=12))
    value = WeightedFactory([Term(clip), Term(TweedieFactory(), reward=reward)])(alone)
    assert value.values["1"].reward is value.values["2"].reward and counted == [1, 1]
    # on a backbone of two blocks no value model after three of them runs
    alone = Parts()
    value = WeightedFactory([Term(clip), Term(looks)])(alone)
    depths = [v.value_model.backbone.loaded_blocks for v in value.values.values()]
    assert depths == [2, 3]
    with pytest.raises(ValueError, match="needs a reward"):
        WeightedFactory([Term(TweedieFactory())])(
            Parts(generator=lambda: WorldGenerator(mixture()))
        )


def test_a_value_model_finds_its_reward_in_the_runs_sum_of_rewards(
    folders: dict[str, Path], tiny_clip: Path
) -> None:
    head = str(folders["clip"].parent / "head.pth")
    rewards = {
        "looks": lambda: AestheticReward(model=f"local-dir:{tiny_clip}", head=head),
        "clip": lambda: clip_reward(tiny_clip),
    }
    parts = Parts(lambda: WeightedReward(rewards))
    value = StitchedFactory(str(folders["clip"]))(parts)
    assert value.reward is dict(parts.reward.items())["clip"]
    # and brings its own where it is none of them
    parts = Parts(lambda: WeightedReward({"looks": rewards["looks"]}))
    value = StitchedFactory(str(folders["clip"]))(parts)
    assert isinstance(value.reward, CLIPReward) and parts.reward.names == ["looks"]


def test_a_yaml_file_builds_nothing_until_it_is_called(
    folders: dict[str, Path],
    tiny_clip: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("JSONARGPARSE_DEPRECATION_WARNINGS", "off")
    parser = ArgumentParser()
    parser.add_subclass_arguments(ValueFactory, "value")
    clip = {
        "class_path": "stitchvm.rewards.clip.CLIPReward",
        "init_args": {"model": f"local-dir:{tiny_clip}"},
    }
    (tmp_path / "clip.yaml").write_text(yaml.safe_dump(clip))
    both = {
        "class_path": "stitchvm.rewards.weighted.WeightedReward",
        "init_args": {"rewards": {"a": "clip.yaml", "b": clip}, "weights": {"b": -0.5}},
    }
    stitched = "stitchvm.values.stitched.StitchedFactory"
    terms = {
        "clip": {
            "value": {"class_path": stitched, "init_args": {"path": str(folders["clip"])}},
            "reward": "clip.yaml",
        },
        "looks": {
            "value": {"class_path": stitched, "init_args": {"path": "no/such"}},
            "weight": 0.5,
            "mean": 5,
            "reward": both,
        },
    }
    factory = "stitchvm.values.weighted.WeightedFactory"
    for given in (terms, list(terms.values())):
        text = {"value": {"class_path": factory, "init_args": {"terms": given}}}
        (tmp_path / "run.yaml").write_text(yaml.safe_dump(text))
        parsed = parser.parse_path(str(tmp_path / "run.yaml"))
        made = parser.instantiate_classes(parsed).value
        assert isinstance(made, WeightedFactory)
        first, second = made.terms.values()
        assert isinstance(second, Term) and (second.weight, second.mean, second.std) == (0.5, 5, 1)
        for term in (first, second):  # factories, and inside of them too
            assert isinstance(term.reward, partial)
        assert all(isinstance(r, partial) for r in second.reward.keywords["rewards"].values())
        assert isinstance(first.reward(), CLIPReward)
        reward = second.reward()
        assert isinstance(reward, WeightedReward) and reward.weights == {"a": 1.0, "b": -0.5}
        with pytest.raises(FileNotFoundError, match="no/such"):
            made(Parts())
