"""The command: a run for every setting, what fails and what goes on, and a real sweep of a tiny generator."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from stitchvm.cli import main as command
from stitchvm.modules.sample_store import SampleStore
from stitchvm.results import read_results
from stitchvm.sweep import main


class Predict:
    """Writes what a run would, with a reward that is the setting."""

    def __init__(self) -> None:
        self.asked: list[list[str]] = []

    def __call__(self, argv: list[str]) -> tuple[int, str]:
        self.asked.append(argv)
        options = dict(each.removeprefix("--").split("=", 1) for each in argv if "=" in each)
        strength = options["model.sampler.strength"]
        if strength == "wrong":
            return 2, "unknown"
        if strength == "1e39":
            return 1, "the latent is not finite at step 3"
        store = SampleStore(Path(options["trainer.default_root_dir"]))
        store.prepare(config={})
        store.open(0, 1)
        for index in range(3):
            file = store.save_image(f"{index}", np.zeros((4, 4, 3), np.uint8))
            rewards = {"clip": index + float(strength)}
            line = {"index": index, "seed": 0, "prompt": "a", "file": file, "rewards": rewards}
            store.append(
                line | {"info": {}, "seconds": 1.0, "cpu_seconds": 1.0, "peak_memory_gib": 1.0}
            )
        store.close()
        return 0, ""


def test_every_setting_is_a_run_of_its_own(tmp_path: Path, capsys: Any) -> None:
    predict = Predict()
    settings = ["0", "0.5", "1e39", "2"]
    argv = ["--config", "configs/dps.yaml", "--sweep", "sampler.strength", *settings]
    records = main([*argv, "--folder", str(tmp_path), "--data.batch_size=4"], predict)
    assert [asked[:3] for asked in predict.asked] == [
        ["--config", "configs/dps.yaml", "--data.batch_size=4"]
    ] * 4
    folders = [tmp_path / f"sampler.strength_{setting}" for setting in settings]
    assert [asked[3:] for asked in predict.asked] == [
        [f"--model.sampler.strength={s}", f"--trainer.default_root_dir={folder}"]
        for s, folder in zip(settings, folders, strict=True)
    ]
    clip = {r["setting"]: r for r in records if r["metric"] == "clip"}
    assert [clip[s]["value"] for s in (0, 0.5, 1e39, 2)] == [1, 1.5, None, 3]
    assert [clip[s]["gain"] for s in (0, 0.5, 2)] == [0, 0.5, 2]
    assert "not finite" in clip[1e39]["error"]
    assert read_results(tmp_path / "sweep.json")["records"] == records
    assert (tmp_path / "sweep.png").stat().st_size > 5000
    out = capsys.readouterr().out
    table = [row.split() for row in out.partition("clip")[2].splitlines()[:3]]
    assert [row[0] for row in table] == ["0", "0.5", "2"], "settings as they were given"
    assert "highest average gain: sampler.strength = 2" in out
    assert "sampler.strength = 1e+39 failed: the latent is not finite" in out


def test_other_errors_end_it(tmp_path: Path, capsys: Any) -> None:
    argv = ["--config", "c.yaml", "--folder", str(tmp_path), "--sweep", "sampler.strength"]
    predict = Predict()
    with pytest.raises(SystemExit) as exit_:
        main([*argv, "wrong", "1"], predict)
    assert exit_.value.code == 2 and len(predict.asked) == 1
    for settings in ([], ["1", "1"]):
        with pytest.raises(SystemExit):
            main([*argv, *settings], predict)
        assert "distinct settings" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main([*argv, "1e39"], predict)
    assert "no setting of sampler.strength worked" in capsys.readouterr().err


@pytest.mark.slow
def test_a_sweep_of_guidance(tiny_sd3: Path, tiny_clip: Path, tmp_path: Path, capsys: Any) -> None:
    generator = {"path": str(tiny_sd3), "text_tokens": 12, "guidance_scale": 4.5}
    clip = {"model": f"local-dir:{tiny_clip}"}
    reward = {"class_path": "stitchvm.rewards.clip.CLIPReward", "init_args": clip}
    run = {
        "class_path": "stitchvm.modules.sampling.Sampling",
        "init_args": {
            "sampler": {
                "class_path": "stitchvm.samplers.guidance.GuidedSampler",
                "init_args": {"mode": "unit_norm", "num_steps": 3},
            },
            "generator": {
                "class_path": "stitchvm.generator.Generator",
                "init_args": generator,
            },
            "value": {
                "class_path": "stitchvm.values.tweedie.TweedieFactory",
                "init_args": {"velocity": "cfg"},
            },
            "reward": reward,
            "rewards": {"clip": reward},
        },
    }
    prompts = ["a red circle", "a blue square", "the circle above the square"]
    data = {"class_path": "stitchvm.data.prompts.Prompts", "init_args": {"prompts": prompts}}
    quiet = {"enable_progress_bar": False, "accelerator": "cpu", "devices": 1, "logger": False}
    config = tmp_path / "dps.yaml"
    config.write_text(yaml.safe_dump({"model": run, "data": data, "trainer": quiet}))

    def predict(argv: list[str]) -> tuple[int, str]:
        capsys.readouterr()
        try:
            command(["predict", *argv])
        except SystemExit as error:
            return error.code, capsys.readouterr().err  # type: ignore[return-value]
        return 0, ""

    argv = ["--config", str(config), "--folder", str(tmp_path / "sweep"), "--sweep"]
    records = main([*argv, "sampler.strength", "0", "2", "1e39"], predict)
    clip = {r["setting"]: r for r in records if r["metric"] == "clip"}
    assert clip[2]["gain"] > 2 * clip[2]["gain_stderr"]  # it climbs the reward it is told to
    assert clip[2]["update_rms"] == pytest.approx(2 / 16, rel=1e-3)  # ‖update‖ = 2 of 256 numbers
    assert clip[0]["method"] == "guided" and clip[0]["value_estimator"] == "tweedie"
    assert "not finite at step 1" in clip[1e39]["error"]
    kept = json.loads((tmp_path / "sweep" / "sweep.json").read_text())
    assert kept["config"]["model"]["init_args"]["sampler"]["init_args"]["strength"] == 0
