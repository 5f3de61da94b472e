"""Weighted sums of values against sums of known values; shared runs of the network; sums from a YAML file."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch
import yaml
from jsonargparse import ArgumentParser
from torch import Tensor

from stitchvm.backbones.latent import LatentBackbone
from stitchvm.backbones.sd3 import SD3Backbone
from stitchvm.generator import Generator
from stitchvm.rewards.aesthetic import AestheticReward
from stitchvm.rewards.base import Reward
from stitchvm.rewards.clip import CLIPReward
from stitchvm.rewards.weighted import WeightedReward
from stitchvm.samplers.field import Field
from stitchvm.value_model import StitchedValueModel
from stitchvm.values.monte_carlo import MonteCarloValue
from stitchvm.values.parts import Parts, ValueFactory
from stitchvm.values.stitched import StitchedFactory, StitchedValue
from stitchvm.values.terminal import TerminalValue
from stitchvm.values.tweedie import TweedieFactory, TweedieValue
from stitchvm.values.weighted import Term, WeightedFactory, WeightedValue, measured_constants
from stitchvm.world.closed_form import KnownReward
from tests.rewards.tiny import head_file
from tests.values.fakes import ClosedFormReward, IdentityVAE, WorldGenerator, known, mixture

PROMPTS = ["a red circle", "a blue square left of the red circle"]


def slope() -> KnownReward:
    return KnownReward.linear(torch.tensor([0.7, -1.2])[:, None, None], b=3.0)


def gradient(v: Tensor, z: Tensor) -> Tensor:
    (found,) = torch.autograd.grad(v.sum(), z, retain_graph=True)
    return found


def tweedie_sum(generator: WorldGenerator) -> WeightedValue:
    values = {
        "curved": TweedieValue(generator, ClosedFormReward(known())),
        "slope": TweedieValue(generator, ClosedFormReward(slope())),
    }
    return WeightedValue(values, {"slope": -0.5}, {"curved": 2.0, "slope": 1.0}, {"slope": 4.0})


@pytest.mark.parametrize("t", [0.0, 0.3, 0.9])
def test_the_sum_and_its_gradient_are_the_closed_form(t: float) -> None:
    world = mixture()
    z_t = world.sample(4, t=t).requires_grad_()
    value = tweedie_sum(WorldGenerator(world))
    v = value.bind()(z_t, torch.tensor([t]))
    wanted = (world.tweedie_value(z_t, t, known()) - 2) - 0.5 * (
        world.tweedie_value(z_t, t, slope()) - 1
    ) / 4
    assert torch.allclose(v, wanted, atol=1e-8)
    assert torch.allclose(gradient(v, z_t), gradient(wanted, z_t), atol=1e-6)
    assert gradient(wanted, z_t).abs().max() > 1e-2
    through = value.score(value.embed(z_t, torch.tensor([t])))
    assert torch.allclose(through, wanted, atol=1e-6)


def test_all_estimators_mixed_are_the_clean_sum_at_zero() -> None:
    world = mixture()
    generator, z_0 = WorldGenerator(world), mixture().sample(3).requires_grad_()
    value = WeightedValue(
        {
            "terminal": TerminalValue(IdentityVAE(), ClosedFormReward(known(), uses_text=True)),
            "tweedie": TweedieValue(generator, ClosedFormReward(slope())),
            "rolled": MonteCarloValue(generator, ClosedFormReward(known()), rollouts=3, steps=2),
        },
        {"terminal": 2.0, "rolled": -0.5},
        stds={"tweedie": 0.5},
    )
    bound, t = value.bind(["+", "-", "+"]), torch.zeros(3)
    sign = torch.tensor([1.0, -1, 1])
    wanted = (2 * sign - 0.5) * known()(z_0) + 2 * slope()(z_0)
    v = bound(z_0, t)
    assert torch.allclose(v, wanted, atol=1e-4)
    assert torch.allclose(gradient(v, z_0), gradient(wanted, z_0), atol=1e-4)
    clean = value.reward(z_0, value.reward.encode_text(["+", "-", "+"]))
    assert torch.allclose(clean, wanted, atol=1e-4)
    assert bound.name.startswith("2·TerminalValue of fake reward + 1·TweedieValue")
    # each for itself, and of samples in another order
    parts = bound.parts(z_0, t)
    assert list(parts) == ["terminal", "tweedie", "rolled"]
    assert torch.allclose(parts["tweedie"], slope()(z_0), atol=1e-6)
    index = torch.tensor([1, 1, 0])
    assert torch.allclose(bound.select(index)(z_0[index], t), wanted[index], atol=1e-4)
    with pytest.raises(ValueError, match="t = 0 only"):
        bound(z_0, t + 0.1)


def test_a_mixture_of_rollouts_and_tweedie_scores_averages() -> None:
    world, t, n = mixture(), 0.5, 4000
    generator, z_t = WorldGenerator(world), mixture().sample(2, t=t)
    value = WeightedValue(
        {
            "mean": MonteCarloValue(generator, ClosedFormReward(known()), rollouts=n, steps=20),
            "point": TweedieValue(generator, ClosedFormReward(known())),
        },
        {"point": -1.0},
    )
    gap = world.value(z_t, t, known()) - world.tweedie_value(z_t, t, known())
    random = torch.Generator().manual_seed(0)
    direct = value.bind(generator=random)(z_t, torch.tensor([t]))
    through = value.score(value.embed(z_t, torch.tensor([t]), generator=random))
    assert torch.allclose(direct.double(), gap, atol=0.1)
    assert torch.allclose(through.double(), gap, atol=0.1)
    assert gap.abs().min() > 0.5


def test_sums_of_sums() -> None:
    world, t = mixture(), torch.tensor([0.4])
    inner = tweedie_sum(WorldGenerator(world))
    outer = WeightedValue({"sum": inner, "again": inner}, {"again": 3.0})
    z_t = world.sample(2, t=0.4)
    v = inner.bind()(z_t, t)
    assert torch.allclose(outer.bind()(z_t, t), 4 * v, atol=1e-8)
    assert torch.allclose(outer.score(outer.embed(z_t, t)), 4 * v, atol=1e-5)


def test_text_is_encoded_once_per_reward() -> None:
    reward = ClosedFormReward(known(), uses_text=True)
    generator = WorldGenerator(mixture())
    value = WeightedValue(
        {
            "terminal": TerminalValue(IdentityVAE(), reward),
            "tweedie": TweedieValue(generator, reward),
            "other": TerminalValue(IdentityVAE(), ClosedFormReward(slope())),
        }
    )
    bound = value.bind(["+", "-", "+"])
    assert reward.encoded == ["+", "-"]
    z_0, sign = mixture().sample(3), torch.tensor([1.0, -1, 1])
    wanted = 2 * sign * known()(z_0) + slope()(z_0)
    assert torch.allclose(bound(z_0, torch.zeros(3)), wanted, atol=1e-6)
    with pytest.raises(ValueError, match="no prompts came"):
        value.bind()


def test_measured_constants_make_every_part_standard() -> None:
    world, t = mixture(), torch.full((50,), 0.4)
    value = tweedie_sum(WorldGenerator(world))
    z_t = world.sample(50, t=0.4)
    found = measured_constants(value, z_t, t, batch_size=16)
    curved = world.tweedie_value(z_t, 0.4, known())
    assert found["curved"] == pytest.approx((float(curved.mean()), float(curved.std())), rel=1e-6)
    parts = value.with_constants(found)
    v = parts.bind()(z_t, t)
    slopes = world.tweedie_value(z_t, 0.4, slope())
    standard = [(x - x.mean()) / x.std() for x in (curved, slopes)]
    assert torch.allclose(v, standard[0] - 0.5 * standard[1], atol=1e-6)
    with pytest.raises(ValueError, match="1 latents have no spread"):
        measured_constants(value, z_t[:1], t[:1])
    with pytest.raises(ValueError, match=r"the part 'curved' is .* for all 2 latents"):
        measured_constants(value, z_t[:1].expand(2, -1, -1, -1), t[:2])


def test_bad_arguments() -> None:
    value = TweedieValue(WorldGenerator(mixture()), ClosedFormReward(known()))
    with pytest.raises(ValueError, match="no parts"):
        WeightedValue({})
    with pytest.raises(ValueError, match=r"weights are given for \['b'\]"):
        WeightedValue({"a": value}, {"b": 1.0})
    with pytest.raises(ValueError, match=r"stds of 'a' = -1\.0"):
        WeightedValue({"a": value}, stds={"a": -1.0})


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
