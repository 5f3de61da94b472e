"""`Sampling` on a tiny SD3 pipeline and on the embedded world: what it writes, seeds, resuming, refusals."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch

from stitchvm.data.prompts import Prompts
from stitchvm.data.world_prompts import WorldPrompts
from stitchvm.generator import Generator
from stitchvm.modules.sample_lines import sample_stream
from stitchvm.modules.sampling import Sampling
from stitchvm.results import read_results
from stitchvm.rewards.clip import CLIPReward
from stitchvm.samplers.best_of_n import BestOfN
from stitchvm.samplers.fk import FKSteering
from stitchvm.samplers.guidance import GuidedSampler
from stitchvm.samplers.plain import PlainSampler
from stitchvm.values.stitched import StitchedFactory
from stitchvm.values.terminal import TerminalFactory
from stitchvm.values.tweedie import TweedieFactory
from stitchvm.values.weighted import Term, WeightedFactory
from tests.modules.sampling_runs import (
    PROMPTS,
    generator,
    lines,
    pixels,
    predict,
    reward,
    same,
    value_model,
    values,
)


@pytest.fixture(scope="module")
def parts(tiny_sd3, tiny_clip, tmp_path_factory):
    """The tiny generator, reward and value model, and a folder."""
    folder = tmp_path_factory.mktemp("sampling")
    value = value_model(tiny_sd3, tiny_clip, folder / "value")
    return generator(tiny_sd3), reward(tiny_clip), value, folder


@pytest.fixture(scope="module")
def plain(parts):
    """A plain run of 4 prompts × 2 samples."""
    make, clip, _, folder = parts
    arguments = {"generator": make, "rewards": {"clip": clip}, "samples_per_prompt": 2, "seed": 3}
    predict(folder / "plain", **arguments)
    return folder / "plain", arguments


@pytest.fixture(scope="module")
def steered(parts):
    """An FK run with a stitched value."""
    make, clip, value, folder = parts
    arguments = {
        "generator": make,
        "reward": clip,
        "value": StitchedFactory(str(value), share_generator=True),
        "rewards": {"clip": clip},
        "sampler": FKSteering(num_steps=5, particles=3, proposals=2, resample_every=1),
        "save_particles": True,
    }
    predict(folder / "steered", **arguments)
    return folder / "steered", arguments


def test_a_plain_sample_is_what_the_sampler_makes_of_its_stream(plain, parts, tiny_clip) -> None:
    root, _ = plain
    found, model = lines(root), parts[0]()
    assert [(x["index"], x["seed"]) for x in found] == [(i, s) for i in range(4) for s in (3, 4)]
    assert [x["prompt"] for x in found] == [p for p in PROMPTS for _ in range(2)]
    judge = CLIPReward(model=f"local-dir:{tiny_clip}")
    for line in found[::3]:
        assert line["file"] == f"images/{line['index']:06d}_s{line['seed']}.png"
        assert line["stream"] == sample_stream(line["seed"], line["index"]) < 2**53
        samples = PlainSampler(num_steps=3)(model, [line["prompt"]], seeds=[line["stream"]])
        image = (255 * model.vae.decode(samples.latents, clamp=True)).round()[0]
        written = pixels(root, line["file"])
        assert np.abs(written - image.permute(1, 2, 0).numpy()).max() <= 1
        x = torch.from_numpy(written).permute(2, 0, 1)[None] / 255
        scored = float(judge(x, judge.encode_text([line["prompt"]])))
        assert line["rewards"]["clip"] == pytest.approx(scored, abs=1e-5)
        assert line["calls"] == {"velocity": 3, "continued": 0}
        assert line["values"] == [] and line["batch"] == 2
        assert line["seconds"] > 0 and line["peak_memory_gib"] > 0.05
        assert "resident memory" in line["peak_memory_of"]
    assert len({line["stream"] for line in found}) == 8


def test_summary_grid_and_table(plain, parts, capsys) -> None:
    root, arguments = plain
    predict(root, **arguments)  # nothing to do, but to say it again
    printed = capsys.readouterr().out
    found, summary = lines(root), read_results(root / "summary.json")
    (record,) = summary["records"]
    scores = np.array([x["rewards"]["clip"] for x in found]).reshape(4, 2)
    assert record["metric"] == "clip" and record["n"] == 8
    assert (record["method"], record["value_estimator"], record["seed"]) == ("plain", None, 3)
    assert record["value"] == pytest.approx(scores.mean())
    over_prompts = scores.mean(axis=1).std(ddof=1) / 2
    assert record["stderr"] == pytest.approx(over_prompts)
    assert record["seconds"] == pytest.approx(np.mean([x["seconds"] for x in found]))
    assert record["peak_memory_gib"] == max(x["peak_memory_gib"] for x in found)
    assert summary["prompts"] == 4 and summary["calls_per_sample"]["velocity"] == 3
    assert f"{scores.mean():.3f}" in printed and "plain: 8 samples" in printed
    assert (root / "grid.png").read_bytes().startswith(b"\x89PNG")
    assert not (root / "trajectory.png").exists(), "a plain run has no values"


@pytest.mark.parametrize("batch_size", [1, 3])
def test_a_sample_does_not_depend_on_the_batch(batch_size, plain, parts) -> None:
    root, arguments = plain
    other = parts[3] / f"batches{batch_size}"
    predict(other, batch_size=batch_size, **arguments)
    same(root, other, exact=False)


def test_steered_samples_do_not_depend_on_the_batch(steered, parts) -> None:
    root, arguments = steered
    other = parts[3] / "steered_batches"
    sampler = FKSteering(num_steps=5, particles=3, proposals=2, resample_every=1, micro_batch=2)
    predict(other, batch_size=4, **arguments | {"sampler": sampler})
    same(root, other, exact=False)


def test_particles_values_and_the_choice(steered) -> None:
    root, _ = steered
    for line in lines(root):
        finals = [each["final_value"] for each in line["particles"]]
        best = int(np.argmax(finals))
        assert line["final_value"] == finals[best]
        assert (pixels(root, line["file"]) == pixels(root, line["particles"][best]["file"])).all()
        assert line["rewards"]["clip"] == pytest.approx(line["final_value"], abs=5e-3)
        sigmas = values(line)[:, 0]
        assert len(sigmas) > 2 and (np.diff(sigmas) < 0).all()
        assert {"ess", "lam"} <= line["info"].keys()
        assert all(1 <= x <= 3 + 1e-9 for _, x in line["info"]["ess"])
    records = read_results(root / "summary.json")["records"]
    assert {record["method"] for record in records} == {"fk_steering"}
    assert {record["value_estimator"] for record in records} == {"stitched"}
    assert [record["metric"] for record in records] == ["clip", "final_value"]
    assert (root / "trajectory.png").read_bytes().startswith(b"\x89PNG")


def test_a_final_value_of_another_reward_is_drawn_on_its_own_axis(parts, monkeypatch) -> None:
    """Also where nothing is left to sample, and so nothing is loaded."""
    make, clip, value, folder = parts
    drawn: list[tuple[str, str | None]] = []

    def draw(lines, path, label, final_label) -> str:
        drawn.append((label, final_label))
        return path

    monkeypatch.setattr("stitchvm.modules.sampling_report.trajectory", draw)
    arguments = {
        "sampler": FKSteering(num_steps=3, particles=2, resample_every=1),
        "generator": make,
        "value": StitchedFactory(str(value), share_generator=True),
        "prompts": PROMPTS[:2],
    }
    name = f"local-dir:{clip.keywords['model'].removeprefix('local-dir:')}"
    predict(folder / "own", **arguments)
    twice = WeightedFactory({"twice": Term(TerminalFactory(), weight=2.0)})
    for _ in range(2):
        predict(folder / "other", final_value=twice, **arguments)
    assert drawn[0] == (f"stitched value of {name}", None)
    assert drawn[1:] == [(f"stitched value of {name}", f"final value of 2·{name}")] * 2


def test_guidance_needs_gradients_whatever_mode_the_trainer_is_in(parts) -> None:
    make, _, value, folder = parts
    for inference_mode in (True, False):
        root = folder / f"guided{inference_mode}"
        predict(
            root,
            sampler=GuidedSampler(num_steps=3, mode="unit_norm", strength=0.5),
            generator=make,
            value=StitchedFactory(str(value), share_generator=True),
            prompts=PROMPTS[:2],
            trainer={"inference_mode": inference_mode},
        )
    same(folder / "guidedTrue", folder / "guidedFalse")
    (line, _) = lines(folder / "guidedTrue")
    assert len(line["values"]) == 3 and min(x for _, x in line["info"]["gradient_rms"]) > 0
    assert line["calls"]["gradient"] == 3 and line["rewards"] == {}


def test_the_best_of_n_needs_a_reward_only(parts) -> None:
    make, clip, _, folder = parts
    sampler = BestOfN(particles=3, num_steps=2)
    predict(folder / "bon", sampler=sampler, generator=make, reward=clip, save_particles=True)
    for line in lines(folder / "bon"):
        finals = [each["final_value"] for each in line["particles"]]
        assert line["final_value"] == max(finals) and len(finals) == 3


def test_size_in_pixels(parts) -> None:
    make, _, _, folder = parts
    predict(folder / "size", generator=make, prompts=PROMPTS[:1], height=20, width=12)
    assert pixels(folder / "size", "images/000000_s0.png").shape == (20, 12, 3)
    with pytest.raises(ValueError, match=r"multiples of 4 .* such as 20 and 12"):
        predict(folder / "wrong", generator=make, height=21, width=12)
    assert not (folder / "wrong" / "samples.jsonl").exists()


def test_metadata_of_the_prompts_is_kept(parts, tmp_path) -> None:
    entry = {"tag": "single_object", "include": [{"class": "bench", "count": 1}]}
    (tmp_path / "geneval.jsonl").write_text(json.dumps(entry | {"prompt": "a red bench"}) + "\n")
    data = Prompts(path=str(tmp_path / "geneval.jsonl"), batch_size=1)
    predict(tmp_path / "run", generator=parts[0], prompts=data)
    (line,) = lines(tmp_path / "run")
    assert line["metadata"] == entry | {"prompt": "a red bench"}


def test_a_missing_sample_is_made_again_bit_for_bit(plain, parts) -> None:
    root, arguments = plain
    other = parts[3] / "holes"
    shutil.copytree(root, other)
    kept = (other / "samples.jsonl").read_bytes().splitlines(keepends=True)
    # a killed run: two whole lines, a third cut short; an image without a line; one lost image; rubbish
    (other / "samples.jsonl").write_bytes(b"".join(kept[:2]) + kept[2][:40])
    (other / "images" / "000000_s4.png").unlink()
    (other / "images" / ".000003_s3.1.part").write_bytes(b"half an image")
    module = predict(other, **arguments)
    same(root, other)
    assert len(module.store.notices) == 0 and not list((other / "images").glob(".*"))
    assert lines(other)[0]["seconds"] == lines(root)[0]["seconds"], (
        "the finished one was made again"
    )


def test_batches_that_are_run_again_have_their_prompts_encoded_ahead(plain, parts) -> None:
    """Else the text encoders come back beside the other networks, and stay."""
    root, arguments = plain
    other = parts[3] / "encoders"
    shutil.copytree(root, other)
    (other / "images" / "000002_s4.png").unlink()
    module = predict(other, **arguments)
    same(root, other)
    memory = module.parts.generator._memory
    assert set(memory.kept) == set(PROMPTS[2:]) and not memory.encoders._loaded


def test_more_samples_per_prompt_are_added(plain, parts) -> None:
    root, arguments = plain
    other = parts[3] / "more"
    predict(other, **arguments | {"samples_per_prompt": 1})
    first = lines(other)
    assert [line["seed"] for line in first] == [3] * 4
    predict(other, **arguments)
    same(root, other)
    assert [x for x in lines(other) if x["seed"] == 3] == first


def test_samples_of_another_configuration_are_refused(plain, parts) -> None:
    root, arguments = plain
    other = parts[3] / "refused"
    shutil.copytree(root, other)
    before = {path.name: path.read_bytes() for path in other.rglob("*") if path.is_file()}
    changes = [
        ({"sampler": PlainSampler(num_steps=4)}, r"model\.sampler\.num_steps: 3 → 4"),
        ({"seed": 5}, r"model\.seed: 3 → 5"),
        ({"rewards": {}}, r"model\.rewards"),
        ({"prompts": ["a red square", *PROMPTS[1:]]}, "prompt 0: 'a red circle' → 'a red square'"),
    ]
    for change, message in changes:
        with pytest.raises(FileExistsError, match=f"8 samples of another .*{message}.*overwrite"):
            predict(other, **arguments | change)
    after = {path.name: path.read_bytes() for path in other.rglob("*") if path.is_file()}
    assert before == after, "a refusal changed the folder"
    predict(other, **arguments | {"sampler": PlainSampler(num_steps=3, micro_batch=1)})
    predict(other, **arguments | {"seed": 5, "samples_per_prompt": 1, "overwrite": True})
    assert [line["seed"] for line in lines(other)] == [5] * 4
    assert len(list((other / "images").iterdir())) == 4
    kept = (other / "samples.jsonl").read_bytes()
    predict(other, **arguments | {"seed": 5, "samples_per_prompt": 1, "overwrite": True})
    assert (other / "samples.jsonl").read_bytes() == kept, "the same configuration goes on"


def test_other_weights_under_the_same_name_are_refused(
    parts, tiny_sd3, tiny_clip, tmp_path
) -> None:
    make, _, _, _ = parts
    value = value_model(tiny_sd3, tiny_clip, tmp_path / "value")
    arguments = {
        "generator": make,
        "value": StitchedFactory(str(value), share_generator=True),
        "sampler": GuidedSampler(num_steps=2, mode="raw"),
        "prompts": PROMPTS[:2],
    }
    predict(tmp_path / "run", **arguments)
    from safetensors.torch import load_file, save_file

    state = load_file(value / "model.safetensors")
    state["stitch.F.weight"] *= 2
    save_file(state, value / "model.safetensors")
    for more in ({"samples_per_prompt": 2}, {}):  # also where nothing is left to sample
        with pytest.raises(FileExistsError, match=r"value.*sha256"):
            predict(tmp_path / "run", **arguments | more)
    first = lines(tmp_path / "run")
    predict(tmp_path / "run", **arguments | {"overwrite": True})
    assert [line["values"] for line in lines(tmp_path / "run")] != [x["values"] for x in first]
    kept = lines(tmp_path / "run")
    predict(tmp_path / "run", **arguments)
    assert lines(tmp_path / "run") == kept


def test_the_world_with_its_checker_and_a_weighted_reward(tmp_path) -> None:
    from functools import partial

    from stitchvm.rewards.aesthetic import AestheticReward
    from stitchvm.rewards.weighted import WeightedReward

    clip = partial(CLIPReward, model="world:clip")
    both = partial(
        WeightedReward,
        {"clip": clip, "aesthetic": partial(AestheticReward, model="world:aesthetic")},
        {"clip": 2.0, "aesthetic": 0.5},
    )
    module = predict(
        tmp_path,
        sampler=PlainSampler(num_steps=8),
        generator=partial(Generator, "world:sd3", text_tokens=1, guidance_scale=4.5),
        prompts=WorldPrompts(num_prompts=4, batch_size=4),
        rewards={"clip": clip, "both": both},
        checker=True,
    )
    found = lines(tmp_path)
    for line in found:
        scores = line["rewards"]
        assert list(scores) == ["clip", "both", "both.clip", "both.aesthetic"]
        assert scores["both.clip"] == pytest.approx(scores["clip"], abs=1e-5)
        total = 2 * scores["both.clip"] + 0.5 * scores["both.aesthetic"]
        assert scores["both"] == pytest.approx(total, abs=1e-4)
        assert set(line["checker"]) == {
            "whole",
            "count",
            "colour",
            "shape",
            "relation",
            "background",
        }
    right = sum(line["checker"]["whole"] for line in found)
    assert right >= 2, "the world's generator draws most scenes right in 8 steps"
    names = [record["metric"] for record in module.records]
    assert "checker/whole" in names and "both.aesthetic" in names
    whole = next(r for r in module.records if r["metric"] == "checker/whole")
    assert whole["value"] == right / 4


def test_several_seeds_and_prompts_have_streams_of_their_own() -> None:
    streams = {sample_stream(seed, index) for seed in range(30) for index in range(30)}
    assert len(streams) == 900 and sample_stream(1, 12) != sample_stream(11, 2)


def test_only_predicts(parts, tmp_path) -> None:
    from lightning.pytorch import Trainer

    module = Sampling(PlainSampler(num_steps=2), parts[0])
    trainer = Trainer(accelerator="cpu", logger=False, default_root_dir=str(tmp_path))
    module.test_step = lambda batch, batch_idx: None  # type: ignore[method-assign]
    with pytest.raises(ValueError, match="only predicts"):
        trainer.test(module, datamodule=Prompts(prompts=PROMPTS, batch_size=2))


def test_tweedie_steers_too(parts, tmp_path) -> None:
    make, clip, _, _ = parts
    predict(
        tmp_path,
        sampler=GuidedSampler(num_steps=2, mode="unit_norm"),
        generator=make,
        reward=clip,
        value=TweedieFactory(velocity="cfg"),
        prompts=PROMPTS[:1],
    )
    (line,) = lines(tmp_path)
    assert line["calls"] == {"velocity": 2, "continued": 2, "gradient": 2}
