"""What a sampling run is made of and called: judges, descriptions, records, the meter, the trajectory."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch
from torch import Tensor

from stitchvm.backbones.latent import LatentBackbone
from stitchvm.modules.judges import Judges, same
from stitchvm.modules.meter import Meter
from stitchvm.modules.sample_lines import decode, trajectories
from stitchvm.modules.sampling_config import describe
from stitchvm.modules.sampling_parts import SamplingParts
from stitchvm.modules.sampling_report import numbers, snake, summary
from stitchvm.rewards.clip import CLIPReward
from stitchvm.rewards.weighted import WeightedReward
from stitchvm.samplers.base import Record, Samples
from stitchvm.samplers.fk import FKSteering
from stitchvm.samplers.plain import PlainSampler
from stitchvm.value_model import StitchedValueModel
from stitchvm.values.parts import Parts
from stitchvm.values.stitched import StitchedFactory, StitchedValue
from stitchvm.values.terminal import TerminalValue
from stitchvm.values.weighted import WeightedValue
from tests.modules.sampling_runs import reward
from tests.values.fakes import IdentityVAE


def test_the_chosen_particles_ancestors_are_followed_back() -> None:
    """Three particles of two prompts. Prompt 0: 2 ← 1 ← 0; prompt 1: 0 ← 0 ← 2, worked out by hand."""

    def record(sigma: float, values: list[list[float]], came: list[list[int]] | None) -> Record:
        ancestors = None if came is None else torch.tensor(came)
        info = {"ess": torch.tensor([sigma, -sigma])}
        return Record(0, sigma, torch.tensor(values), info, ancestors)

    records = [
        record(0.9, [[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]], None),
        record(0.8, [[10.0, 20.0, 30.0], [40.0, 50.0, 60.0]], [[2, 0, 2], [2, 1, 1]]),
        Record(0, 0.7),
        record(0.6, [[0.1, 0.2, 0.3], [0.4, 0.5, 0.6]], [[0, 0, 1], [0, 1, 2]]),
    ]
    final = torch.tensor([[7.0, 8.0, 9.0], [9.0, 8.0, 7.0]])
    nothing = torch.zeros(2, 3, 1, 1, 1)
    samples = Samples(nothing[:, 0], nothing, torch.tensor([2, 0]), final, records, {})
    one, two = trajectories(samples)
    assert one["values"] == [[0.9, 1.0], [0.8, 20.0], [0.6, 0.3]] and one["final_value"] == 9.0
    assert two["values"] == [[0.9, 6.0], [0.8, 40.0], [0.6, 0.4]] and two["final_value"] == 9.0
    assert two["info"] == {"ess": [[0.9, -0.9], [0.8, -0.8], [0.6, -0.6]]}


def test_fk_steering_tells_who_comes_from_whom() -> None:
    """In the records, a particle whose ancestor is another has that one's child's value at the next level."""
    from stitchvm.world.closed_form import GaussianWorld, KnownReward
    from tests.samplers.fakes import ClosedFormGenerator, KnownValue

    world = GaussianWorld(torch.zeros(1, 1, 1), 1.0)
    value = KnownValue(world, KnownReward.quadratic(torch.ones(1, 1, 1), 4.0))
    sampler = FKSteering(particles=4, num_steps=8, resample_every=2, resample_from=2, lam=6.0)
    samples = sampler(ClosedFormGenerator(world), ["0", "0"], value, seeds=[1, 2])
    known = [record for record in samples.records if record.ancestors is not None]
    assert [record.step for record in known] == [2, 4, 6]
    for record in known:
        assert record.ancestors.shape == (2, 4)
        for prompt in range(2):  # particles of one ancestor share its value
            for n, m in zip(*np.triu_indices(4), strict=True):
                if record.ancestors[prompt, n] == record.ancestors[prompt, m]:
                    assert record.values[prompt, n] == record.values[prompt, m]
    assert any(len(set(row)) < 4 for record in known for row in record.ancestors.tolist())


def test_judges_score_the_8_bit_image_and_share_the_runs_reward(tiny_clip) -> None:
    clip = reward(tiny_clip)
    parts = Parts(clip)
    factories = {
        "clip": reward(tiny_clip),
        "other": partial(clip.func, model=clip.keywords["model"], dtype="bfloat16"),
    }
    judges = Judges(factories, parts, clip, checker=False, device=torch.device("cpu"))
    assert judges.rewards["clip"] is parts.reward and judges.rewards["other"] is not parts.reward
    pixels = torch.randint(0, 256, (3, 3, 16, 16), dtype=torch.uint8)
    prompts = ["a red circle", "a blue square", "a red circle"]
    rows = judges(pixels, prompts)
    wanted = parts.reward(pixels / 255, parts.reward.encode_text(prompts))
    assert [row["rewards"]["clip"] for row in rows] == pytest.approx(wanted.tolist(), abs=1e-6)
    assert all(set(row) == {"rewards"} for row in rows)


def stitched(clip: CLIPReward) -> StitchedValue:
    return StitchedValue(StitchedValueModel(LatentBackbone(4), clip, (0, 1)))


def test_only_a_reward_that_steps_look_through_stays_on_the_device(tiny_clip) -> None:
    class Looking(TerminalValue):
        """Stands for a value that looks at images, such as Tweedie's."""

    def release(steer, final=None, judge=False) -> list[tuple[bool, bool]]:
        clips = [reward(tiny_clip)() for _ in range(2)]
        judges = Judges({}, Parts(), None, checker=False, device=torch.device("cpu"))
        judges.rewards = {"clip": clips[0], "away": reward(tiny_clip)()}
        judges.resident = {"clip"} if judge else set()
        value = None if steer is None else steer(clips)
        parts = SamplingParts(None, value, None if final is None else final(clips), judges, (8, 8))
        parts.release()
        assert not judges.rewards["away"].parked and judges.rewards["away"].visual is not None
        if judge:
            assert judges(torch.zeros(1, 3, 16, 16, dtype=torch.uint8), ["a"])
        return [(clip.parked, clip.visual is None) for clip in clips]

    parked, dropped, stays = (True, False), (False, True), (False, False)
    assert release(lambda c: stitched(c[0])) == [dropped, stays]
    assert release(lambda c: stitched(c[0]), judge=True) == [parked, stays]
    terminal = lambda c: TerminalValue(IdentityVAE(), c[0])  # noqa: E731
    assert release(lambda c: stitched(c[0]), terminal) == [parked, stays]
    assert release(lambda c: Looking(IdentityVAE(), c[0]), terminal, judge=True) == [stays, stays]
    both = {"stitched": 0, "looking": 1}
    assert release(
        lambda c: WeightedValue(
            {"stitched": stitched(c[0]), "looking": Looking(IdentityVAE(), c[1])}
        ),
        lambda c: TerminalValue(
            IdentityVAE(), WeightedReward({name: c[k] for name, k in both.items()})
        ),
    ) == [parked, stays]
    one = lambda c: WeightedValue(  # noqa: E731
        {"stitched": stitched(c[0]), "looking": Looking(IdentityVAE(), c[0])}
    )
    assert release(one) == [stays, stays]
    assert release(None, terminal) == [parked, stays]


def test_which_factories_build_the_same(tiny_clip) -> None:
    one, two = reward(tiny_clip), reward(tiny_clip)
    assert same(one, two) and same(one, one) and not same(one, None)
    assert not same(one, partial(CLIPReward, model="other"))


def test_decoding_in_parts_and_rounding() -> None:
    class Doubling:
        def decode(self, z: Tensor, clamp: bool) -> Tensor:
            assert clamp and len(z) <= 2
            return (z.repeat_interleave(2, 2).repeat_interleave(2, 3)[:, :3]).clamp(0, 1)

    z = torch.tensor([-1.0, 0.25, 0.5, 3.0, 127.6 / 255]).reshape(-1, 1, 1, 1).expand(-1, 3, 1, 1)
    pixels = decode(Doubling(), z, ["p"] * 5, micro_batch=2)
    assert pixels.dtype == torch.uint8 and pixels.shape == (5, 3, 2, 2)
    assert pixels[:, 0, 0, 0].tolist() == [0, 64, 128, 255, 128]
    with pytest.raises(ValueError, match="the sample of 'second' is not finite"):
        decode(Doubling(), torch.tensor([0.0, torch.inf]).reshape(2, 1, 1, 1), ["first", "second"])


def test_records_by_hand() -> None:
    costs = {"seconds": 2.0, "cpu_seconds": 1.0, "peak_memory_gib": 3.0}
    lines = [
        {"index": 0, "rewards": {"a": 1.0}, "checker": {"whole": 1.0}, **costs},
        {"index": 0, "rewards": {"a": 3.0}, "checker": {"whole": 0.0}, **costs},
        {"index": 1, "rewards": {"a": 6.0}, "checker": {"whole": 1.0}, **costs | {"seconds": 5.0}},
    ]
    one, two = summary(lines)
    assert (one["metric"], one["n"], one["seconds"]) == ("a", 3, 3.0)
    assert one["value"] == pytest.approx(10 / 3)
    # sums 4 and 6 over 2 and 1 samples: residuals 4 - 20/3 and 6 - 10/3, ((2)·Σ²)^½ / 3
    assert one["stderr"] == pytest.approx((2 * ((8 / 3) ** 2 + (8 / 3) ** 2)) ** 0.5 / 3)
    assert (two["metric"], two["value"]) == ("checker/whole", pytest.approx(2 / 3))
    assert numbers(lines[0] | {"final_value": 0.5}) == {
        "a": 1.0,
        "checker/whole": 1.0,
        "final_value": 0.5,
    }
    (bare,) = summary([{"index": 0, "rewards": {}, **costs}])
    assert (bare["metric"], bare["value"], bare["n"]) == ("samples", None, 1)


def test_names_of_methods() -> None:
    names = ("FKSteering", "BestOfN", "SVDD", "Guided", "MonteCarlo", "Plain")
    found = [snake(name) for name in names]
    assert found == ["fk_steering", "best_of_n", "svdd", "guided", "monte_carlo", "plain"]


def test_descriptions_are_plain_and_tell_settings_apart(tiny_clip) -> None:
    import json

    described = [
        describe(part)
        for part in (
            PlainSampler(num_steps=3),
            PlainSampler(num_steps=4),
            PlainSampler(num_steps=3, nu="linear_sde"),
            StitchedFactory("a"),
            StitchedFactory("b"),
            reward(tiny_clip),
            partial(CLIPReward, model="other"),
            None,
            {"list": [1, (2.0, "x")]},
        )
    ]
    assert len({json.dumps(each) for each in described}) == len(described)
    assert describe(PlainSampler(num_steps=3)) == described[0]
    assert described[0]["init_args"]["num_steps"] == 3
    assert "0x" not in json.dumps(described), "an address would be another in every process"


def test_the_meter_sees_a_peak_and_forgets_it() -> None:
    meter = Meter(torch.device("cpu"))
    meter.start()
    big = torch.ones(2**26)
    meter.stop()
    high = meter.peak_gib
    del big
    meter.start()
    meter.stop()
    assert meter.seconds >= 0 and high > 0.25
    if meter.resets:  # Linux
        assert meter.peak_gib < high - 0.2 and "while sampling" in meter.memory
    else:
        assert meter.peak_gib >= high and "since its start" in meter.memory
