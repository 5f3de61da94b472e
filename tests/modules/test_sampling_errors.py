"""What can go wrong when sampling: one message that says what, where and how to go on; finished samples stay."""

from __future__ import annotations

import json
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from stitchvm.backbones.latent import LatentBackbone
from stitchvm.backbones.sd3 import SD3Backbone
from stitchvm.cli import main
from stitchvm.data.prompts import Prompts
from stitchvm.generator import Generator
from stitchvm.modules.sampling import Sampling
from stitchvm.rewards.clip import CLIPReward
from stitchvm.samplers.base import Record, Run
from stitchvm.samplers.best_of_n import BestOfN
from stitchvm.samplers.fk import FKSteering
from stitchvm.samplers.guidance import GuidedSampler
from stitchvm.samplers.plain import PlainSampler
from stitchvm.value_model import StitchedValueModel
from stitchvm.values.stitched import StitchedFactory
from stitchvm.values.terminal import TerminalFactory
from stitchvm.values.weighted import Term, WeightedFactory
from tests.modules import sampling_runs
from tests.modules.runs import write_config
from tests.modules.sampling_runs import PROMPTS, generator, lines, predict, reward


class Failing(PlainSampler):
    """A sampler whose second batch fails."""

    def __init__(self, failure: Any, **kwargs: Any) -> None:
        super().__init__(num_steps=2, **kwargs)
        self.fail, self.batches = failure, 0

    def begin(self, run: Run) -> None:
        self.batches += 1

    def advance(self, run: Run, k: int) -> Record:
        if self.batches == 2:
            self.fail(run)
        return super().advance(run, k)


def gpu_is_full(run: Run) -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


def cpu_is_full(run: Run) -> None:
    torch.empty(2**56)


def not_finite(run: Run) -> None:
    run.z[1, 0, 0, 0] = torch.nan


@pytest.mark.parametrize("failure", [gpu_is_full, cpu_is_full])
def test_out_of_memory_says_what_to_lower(failure, tiny_sd3, tmp_path) -> None:
    message = (
        r"out of memory with 2 prompts, 2 rows of latents, at 16 x 16 pixels\. Lower "
        r"model\.sampler\.micro_batch \(now null: all 2 rows .*data\.batch_size \(now 2\).*model\.height.*"
        r"2 finished samples are kept in .*run: the same command goes on"
    )
    arguments = {"generator": generator(tiny_sd3), "prompts": PROMPTS}
    with pytest.raises(MemoryError, match=message):
        predict(tmp_path / "run", sampler=Failing(failure), **arguments)
    assert [line["index"] for line in lines(tmp_path / "run")] == [0, 1]


def test_out_of_memory_while_loading(tmp_path) -> None:
    def make() -> Generator:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    with pytest.raises(MemoryError, match=r"while loading .* \(dtype\)"):
        predict(tmp_path, generator=make)


def test_a_sample_that_is_not_finite_is_named(tiny_sd3, tmp_path) -> None:
    arguments = {"generator": generator(tiny_sd3), "prompts": PROMPTS}
    with pytest.raises(ValueError, match="the sample of 'a blue square' is not finite"):
        predict(tmp_path, sampler=Failing(not_finite), **arguments)
    assert [line["index"] for line in lines(tmp_path)] == [0, 1]


def test_a_value_that_is_not_finite_is_named(tiny_sd3, tiny_clip, tmp_path) -> None:
    value = sampling_runs.value_model(tiny_sd3, tiny_clip, tmp_path / "value")
    from safetensors.torch import load_file, save_file

    state = load_file(value / "model.safetensors")
    state["stitch.F.weight"].fill_(torch.nan)
    save_file(state, value / "model.safetensors")
    with pytest.raises(ValueError, match=r"step 1, σ = 1.*not finite"):
        predict(
            tmp_path / "run",
            sampler=GuidedSampler(num_steps=2),
            generator=generator(tiny_sd3),
            value=StitchedFactory(str(value), share_generator=True),
        )


def test_what_does_not_go_together_is_said_at_once(tiny_sd3, tiny_clip) -> None:
    make = generator(tiny_sd3)
    for arguments, message in [
        ({"sampler": GuidedSampler()}, "GuidedSampler asks a value, but none is configured"),
        ({"sampler": FKSteering()}, "FKSteering asks a value"),
        ({"sampler": BestOfN()}, "chooses among 4 particles, but by what"),
        (
            {"sampler": GuidedSampler(), "value": TerminalFactory()},
            "GuidedSampler asks the value at every noise level, but model.value is the terminal reward",
        ),
        (
            {
                "sampler": FKSteering(),
                "value": WeightedFactory({"end": Term(TerminalFactory())}),
            },
            "but the term 'end' of model.value is the terminal reward",
        ),
        ({"sampler": PlainSampler(), "samples_per_prompt": 0}, "expected at least 1"),
        ({"sampler": PlainSampler(), "height": 16}, "two numbers of pixels, or neither"),
        ({"sampler": PlainSampler(), "height": 0, "width": 16}, "two numbers of pixels"),
    ]:
        with pytest.raises(ValueError, match=message):
            Sampling(generator=make, **arguments)
    Sampling(BestOfN(), make, reward=reward(tiny_clip))
    Sampling(BestOfN(), make, value=TerminalFactory(), reward=reward(tiny_clip))
    parents = FKSteering(score="parent")  # asks about denoised parents, at σ = 0 only
    Sampling(parents, make, value=TerminalFactory(), reward=reward(tiny_clip))


def test_a_value_model_of_another_latent_space(tiny_sd3, tiny_clip, tmp_path) -> None:
    clip = CLIPReward(model=f"local-dir:{tiny_clip}")
    wide = StitchedValueModel(LatentBackbone(16), clip, (0, 1)).save_pretrained(tmp_path / "wide")
    other = shutil.copytree(tiny_sd3, tmp_path / "other")
    config = json.loads((other / "vae" / "config.json").read_text())
    config["scaling_factor"] = 0.3611
    (other / "vae" / "config.json").write_text(json.dumps(config))
    backbone = SD3Backbone(str(other), max_depth=3, dtype="float32", null_tokens=12)
    scaled = StitchedValueModel(backbone, clip, (2, 1)).save_pretrained(tmp_path / "scaled")
    latents = LatentBackbone(4, scale=0.3611, shift=0.1)
    stitch = StitchedValueModel(latents, clip, (0, 1)).save_pretrained(tmp_path / "vae")
    for path, share, message in [
        (wide, True, "16"),
        (stitch, True, r"scale, shift \(0\.3611, 0\.1\) \(latent\)"),
        (stitch, False, r"another latent space .*\(0\.3611, 0\.1\), not \(1\.5, 0\.1\)"),
        (wide, False, r"another latent space .*16 channels, not 4"),
        (scaled, False, r"another latent space .*\(0\.3611, 0\.1\), not \(1\.5, 0\.1\)"),
    ]:
        with pytest.raises(ValueError, match=message):
            predict(
                tmp_path / "run",
                sampler=GuidedSampler(num_steps=2),
                generator=generator(tiny_sd3),
                value=StitchedFactory(str(path), share_generator=share),
            )
    assert not (tmp_path / "run" / "samples.jsonl").exists(), "it was said before any work"


def never() -> Generator:
    raise AssertionError("loaded before it was checked whether what is asked for can be done")


def test_what_can_be_known_before_loading_is_said_before_it(tmp_path) -> None:
    nowhere = StitchedFactory(str(tmp_path / "nowhere"))
    for arguments, message in [
        (
            {"sampler": GuidedSampler(num_steps=2), "value": nowhere},
            "no such file or folder.*nowhere",
        ),
        (
            {
                "sampler": GuidedSampler(num_steps=2),
                "value": WeightedFactory({"one": Term(nowhere)}),
            },
            "no such file or folder.*nowhere",
        ),
        ({"checker": True, "prompts": ["a cat"]}, "'a cat' is not in the world's grammar"),
    ]:
        with pytest.raises((FileNotFoundError, ValueError), match=message):
            predict(tmp_path / "run", generator=never, **arguments)
    assert not (tmp_path / "run").exists(), "nothing was written"


def test_a_reward_that_is_not_finite_names_itself(tiny_sd3, tiny_clip, tmp_path) -> None:
    def broken() -> CLIPReward:
        clip = CLIPReward(model=f"local-dir:{tiny_clip}")
        clip.visual.proj.fill_(torch.nan)
        return clip

    rewards = {"fine": reward(tiny_clip), "broken": broken}
    message = r"the reward 'broken' of finished images, of the prompts \['a red circle', 'a red square'\].*NaN"
    with pytest.raises(ValueError, match=message):
        predict(tmp_path, generator=generator(tiny_sd3), rewards=rewards)
    assert not lines(tmp_path)


def test_no_prompts(tiny_sd3, tmp_path) -> None:
    (tmp_path / "empty.txt").write_text("\n\n")
    make = generator(tiny_sd3)
    with pytest.raises(ValueError, match="has no prompts"):
        predict(tmp_path, generator=make, prompts=Prompts(path=str(tmp_path / "empty.txt")))
    with pytest.raises(ValueError, match="nothing was sampled"):
        predict(tmp_path, generator=make, trainer={"limit_predict_batches": 0})


def test_the_checker_reads_the_world_only(tiny_sd3, tmp_path) -> None:
    with pytest.raises(ValueError, match="32 x 32 pixels, but these are 16 x 16"):
        prompts = ["a red circle on a dark background"]
        predict(tmp_path, generator=generator(tiny_sd3), checker=True, prompts=prompts)
    world = partial(Generator, "world:sd3", text_tokens=1)
    with pytest.raises(ValueError, match="'a blue circle' is not in the world's grammar"):
        predict(tmp_path, generator=world, checker=True, prompts=["a blue circle"])
    assert not (tmp_path / "images").exists() or not list((tmp_path / "images").iterdir())


def test_a_broken_folder_is_not_guessed_at(tiny_sd3, tmp_path) -> None:
    arguments = {"generator": generator(tiny_sd3), "prompts": PROMPTS[:2]}
    root = tmp_path / "run"
    predict(root, **arguments)
    whole = (root / "samples.jsonl").read_text()
    (root / "samples.jsonl").write_text("{}\n" + whole)
    with pytest.raises(ValueError, match=r"line 1 of .*samples\.jsonl is not a sample .*delete"):
        predict(root, **arguments)
    (root / "samples.jsonl").write_text(whole)
    (root / "sampling.json").write_text("{")
    with pytest.raises(ValueError, match=r"sampling\.json is not JSON"):
        predict(root, **arguments)
    (root / "sampling.json").unlink()
    with pytest.raises(FileExistsError, match=r"sampling\.json: missing"):
        predict(root, **arguments)


def test_the_command_line_says_it_in_one_message(
    tiny_sd3, tiny_clip, tmp_path, capsys, monkeypatch
) -> None:
    value = tmp_path / "nowhere"
    config = sampling_runs.config(tmp_path / "run", tiny_sd3, tiny_clip, value)
    path = write_config(config, tmp_path / "run.yaml")

    def fails(*more: str) -> str:
        with pytest.raises(SystemExit) as exit_:
            main(["predict", "--config", str(path), *more])
        assert exit_.value.code == 1
        error = capsys.readouterr().err
        assert error.count("stitchvm: error:") == 1 and "Traceback" not in error
        return error

    assert "nowhere" in fails()
    assert "FKSteering asks a value" in fails("--model.value=null")
    sampling_runs.value_model(tiny_sd3, tiny_clip, value)
    main(["predict", "--config", str(path), "--data.prompts=[a red circle]"])
    assert "wrote" in capsys.readouterr().out
    refusal = fails("--data.prompts=[a red circle]", "--model.sampler.num_steps=7")
    assert "model.sampler.num_steps: 6 → 7" in refusal and "overwrite" in refusal
    monkeypatch.setattr(FKSteering, "advance", lambda self, run, k: gpu_is_full(run))
    assert "model.sampler.micro_batch" in fails("--data.prompts=[a red circle, a blue circle]")
    assert len(lines(tmp_path / "run")) == 2


def test_a_line_whose_image_is_lost(tiny_sd3, tmp_path: Path) -> None:
    arguments = {"generator": generator(tiny_sd3), "prompts": PROMPTS[:2]}
    predict(tmp_path, **arguments)
    (tmp_path / "images" / "000001_s0.png").unlink()
    module = predict(tmp_path, **arguments)
    assert (tmp_path / "images" / "000001_s0.png").is_file()
    assert [line["index"] for line in lines(tmp_path)] == [0, 1]
    assert len(module.done) == 2
