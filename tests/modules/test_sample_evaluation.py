"""`stitchvm test` on folders of finished images: rewards, the exact checker, GenEval, devices, messages."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import Trainer
from PIL import Image

from stitchvm.data.samples import SampleFolder
from stitchvm.metrics.geneval import Detection
from stitchvm.modules.sample_evaluation import SampleEvaluation
from stitchvm.rewards.aesthetic import AestheticReward
from stitchvm.rewards.clip import CLIPReward
from stitchvm.world.render import render
from stitchvm.world.scenes import sample_scenes

ROOT = Path(__file__).parents[2]


def write(folder: Path, pixels: Any, lines: list[dict[str, Any]]) -> Path:
    (folder / "images").mkdir(parents=True)
    with (folder / "samples.jsonl").open("w") as file:
        for i, (image, line) in enumerate(zip(pixels, lines, strict=True)):
            name = f"images/{i:06d}_s0.png"
            array = np.rint(np.asarray(image).transpose(1, 2, 0) * 255).astype(np.uint8)
            Image.fromarray(array).save(folder / name)
            file.write(json.dumps({"index": i, "seed": 0, "file": name, **line}) + "\n")
    return folder


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Seven rendered scenes, the last with another one's caption."""
    drawn = sample_scenes("test", 7, [1], distinct=True)
    captions = [scene.caption for scene in drawn]
    captions[-1] = captions[0]
    lines = [{"prompt": caption} for caption in captions]
    return write(tmp_path_factory.mktemp("scenes"), render(drawn), lines)


def run(module: SampleEvaluation, folder: Path, root: Path, batch_size: int = 3) -> dict[str, Any]:
    trainer = Trainer(
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=root,
    )
    trainer.test(
        module, SampleFolder(str(folder), batch_size=batch_size, num_workers=0), verbose=False
    )
    return {r["metric"]: r for r in module.records}


def test_rewards_and_checker_are_those_of_the_images(scenes: Path, tmp_path: Path) -> None:
    module = SampleEvaluation(
        {
            "clip": lambda: CLIPReward("world:clip"),
            "aesthetic": lambda: AestheticReward("world:aesthetic"),
        },
        checker=True,
        method="rendered",
    )
    found = run(module, scenes, tmp_path)
    lines = [json.loads(line) for line in (scenes / "samples.jsonl").read_text().splitlines()]
    pixels = torch.stack(
        [
            torch.from_numpy(np.asarray(Image.open(scenes / line["file"]))).permute(2, 0, 1) / 255
            for line in lines
        ]
    )
    clip = CLIPReward("world:clip")
    with torch.no_grad():
        direct = clip(pixels, clip.encode_text([line["prompt"] for line in lines]))
    assert found["clip"]["value"] == pytest.approx(float(direct.mean()), abs=1e-5)
    assert found["clip"]["stderr"] == pytest.approx(float(direct.std() / 7**0.5), abs=1e-5)
    assert found["clip"]["n"] == 7 and found["clip"]["estimator"] == "rendered"
    assert found["checker/whole"]["value"] == pytest.approx(6 / 7)
    rows = [json.loads(line) for line in (tmp_path / "scores.jsonl").read_text().splitlines()]
    assert [row["index"] for row in rows] == list(range(7))
    assert [row["clip"] for row in rows] == pytest.approx(direct.tolist(), abs=1e-5)
    assert [row["checker/whole"] for row in rows] == [1, 1, 1, 1, 1, 1, 0]
    written = json.loads((tmp_path / "metrics.json").read_text())
    assert written["records"] == module.records
    assert written["weights"]["clip"]["sha256"] and written["weights"]["aesthetic"]["fingerprint"]


@pytest.mark.slow
def test_two_processes_measure_the_same(scenes: Path, tmp_path: Path) -> None:
    for devices, strategy in ((1, "auto"), (2, "ddp")):
        subprocess.run(
            [
                *(sys.executable, "-m", "stitchvm", "test"),
                *("--config", "configs/eval_samples_world.yaml", "--data.root", str(scenes)),
                *("--data.batch_size", "2", "--model.method", "rendered"),
                *("--trainer.default_root_dir", str(tmp_path / str(devices))),
                *("--trainer.devices", str(devices), "--trainer.strategy", strategy),
            ],
            check=True,
            cwd=ROOT,
            capture_output=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
    one, two = (json.loads((tmp_path / n / "metrics.json").read_text())["records"] for n in "12")
    assert [r["metric"] for r in one] == [r["metric"] for r in two]
    assert [r["value"] for r in one] == pytest.approx([r["value"] for r in two], abs=1e-5)
    assert {r["n"] for r in two} == {7}
    scores = [(tmp_path / n / "scores.jsonl").read_text().count("\n") for n in "12"]
    assert scores == [7, 7]


class OneDog:
    """Finds one dog in images whose first pixel is bright."""

    label, classes = "GenEval-test", frozenset({"dog"})

    def detect(self, pixels: torch.Tensor, threshold: float) -> list[list[Detection]]:
        box = (0.0, 0.0, 4.0, 4.0)
        return [[Detection("dog", 0.95, box)] if image[0, 0, 0] > 0.5 else [] for image in pixels]


def test_geneval_over_a_detector(tmp_path: Path) -> None:
    pixels = np.zeros((3, 3, 8, 8), np.float32)
    pixels[:2] = 1
    entry = {
        "tag": "single_object",
        "include": [{"class": "dog", "count": 1}],
        "prompt": "a photo of a dog",
    }
    lines = [{"prompt": entry["prompt"], "metadata": entry}] * 3
    folder = write(tmp_path / "samples", pixels, lines)
    with pytest.warns(UserWarning, match="over 1 tasks"):
        found = run(SampleEvaluation(detector=OneDog, method="dogs"), folder, tmp_path / "run")
    assert found["GenEval-test/images"]["value"] == pytest.approx(2 / 3)
    assert found["GenEval-test/images"]["estimator"] == "dogs"
    rows = (tmp_path / "run" / "scores.jsonl").read_text().splitlines()
    assert [json.loads(row)["correct"] for row in rows] == [True, True, False]


def test_a_colour_that_nobody_can_name_is_said_before_the_first_image(tmp_path: Path) -> None:
    include = [[{"class": "dog", "count": 1}], [{"class": "dog", "count": 1, "color": "red"}]]
    entries = [
        {"tag": tag, "include": clauses, "prompt": f"a {tag}"}
        for tag, clauses in zip(("single_object", "colors"), include, strict=True)
    ]
    lines = [{"prompt": entry["prompt"], "metadata": entry} for entry in entries]
    folder = write(tmp_path / "samples", np.zeros((2, 3, 8, 8), np.float32), lines)
    asked: list[int] = []

    class Asked(OneDog):
        def detect(self, pixels: torch.Tensor, threshold: float) -> list[list[Detection]]:
            asked.append(len(pixels))
            return super().detect(pixels, threshold)

    with pytest.raises(
        ValueError, match=r"1 prompts name colours, such as 'a colors'.* model\.colours"
    ):
        run(SampleEvaluation(detector=Asked), folder, tmp_path / "run", batch_size=1)
    assert not asked


def test_errors(scenes: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nothing to measure"):
        SampleEvaluation()
    with pytest.raises(ValueError, match="call the rewards otherwise"):
        SampleEvaluation({"geneval": lambda: CLIPReward("world:clip")})
    with pytest.raises(ValueError, match="give a detector, or leave colours out"):
        SampleEvaluation(checker=True, colours=OneDog)
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "a.png").write_bytes((scenes / "images" / "000000_s0.png").read_bytes())
    clip = {"clip": lambda: CLIPReward("world:clip")}
    with pytest.raises(ValueError, match=r"prompt"):
        run(SampleEvaluation(clip), bare, tmp_path / "run0")
    with pytest.raises(ValueError, match="the checker compares images with the world's captions"):
        run(SampleEvaluation(checker=True), bare, tmp_path / "run0")
    with pytest.raises(ValueError, match="GenEval judges by each prompt's metadata"):
        run(SampleEvaluation(detector=OneDog), scenes, tmp_path / "run1")
    found = run(SampleEvaluation(checker=True), scenes, tmp_path / "run2")
    assert found["checker/whole"]["estimator"] == scenes.name  # not that of the results' folder
    with pytest.raises(FileExistsError, match="overwrite"):
        run(SampleEvaluation(checker=True), scenes, tmp_path / "run2")
