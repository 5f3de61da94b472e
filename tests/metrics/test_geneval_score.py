"""GenEval's score: the unweighted mean over tasks, its errors, and the official evaluator's results file."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from stitchvm.metrics.geneval import TASKS, Verdict
from stitchvm.metrics.geneval_official import import_official, main, read_official
from stitchvm.metrics.geneval_score import GenEvalScore, geneval_records, geneval_score
from stitchvm.results import read_results

SIZES = dict(zip(TASKS, (8, 10, 7, 9, 11, 6), strict=True))


def images(seed: int = 0, per_prompt: int = 4) -> list[dict[str, Any]]:
    """Returns lines of the official results file, prompts of different difficulty, in a mixed order."""
    rng = random.Random(seed)
    lines = []
    for task, prompts in SIZES.items():
        for p in range(prompts):
            ease = rng.random()
            meta = {
                "tag": task,
                "include": [{"class": "dog", "count": 1}],
                "prompt": f"{task} {p}",
            }
            lines += [
                {
                    "filename": f"images/{task}{p:03d}/samples/{k:04d}.png",
                    "tag": task,
                    "prompt": meta["prompt"],
                    "correct": rng.random() < ease,
                    "reason": "",
                    "metadata": json.dumps(meta),
                    "details": "{}",
                }
                for k in range(per_prompt)
            ]
    rng.shuffle(lines)
    return lines


def write(path: Path, lines: list[dict[str, Any]]) -> Path:
    # as pandas writes it: slashes escaped, no blank at the end
    path.write_text("\n".join(json.dumps(line).replace("/", "\\/") for line in lines) + "\n")
    return path


def test_overall_is_the_mean_of_the_tasks(tmp_path: Path) -> None:
    lines = images()
    records = {r["metric"]: r for r in import_official(write(tmp_path / "r.jsonl", lines))}
    shares = {}
    for task in TASKS:
        of_task = [line["correct"] for line in lines if line["tag"] == task]
        shares[task] = sum(of_task) / len(of_task)
        assert records[f"GenEval/{task}"]["value"] == pytest.approx(shares[task], abs=1e-15)
        assert records[f"GenEval/{task}"]["n"] == 4 * SIZES[task]
    overall = records["GenEval/overall"]
    assert overall["value"] == pytest.approx(sum(shares.values()) / 6, abs=1e-15)
    share = sum(line["correct"] for line in lines) / len(lines)
    assert records["GenEval/images"]["value"] == pytest.approx(share, abs=1e-15)
    assert abs(overall["value"] - share) > 1e-3, "the tasks differ in size"
    prompts = {line["metadata"]: 0 for line in lines}
    for line in lines:
        prompts[line["metadata"]] |= line["correct"]
    anyone = sum(prompts.values()) / len(prompts)
    assert records["GenEval/prompts"]["value"] == pytest.approx(anyone, abs=1e-15)
    assert records["GenEval/prompts"]["n"] == sum(SIZES.values())
    assert set(overall) == {"metric", "estimator", "sigma", "value", "stderr", "n"}


def test_standard_errors_know_that_images_of_a_prompt_are_alike() -> None:
    tags = [task for task in TASKS for _ in range(20)]
    groups = [f"{task}{k // 4}" for task in TASKS for k in range(20)]
    # all four images of a prompt agree: 5 independent prompts, not 20 images
    correct = [k // 4 < 2 for _ in TASKS for k in range(20)]
    scores = geneval_score(tags, correct, groups)
    by_prompt = (0.4 * 0.6 / 4) ** 0.5  # s/√n of two ones and three zeros
    assert float(scores["counting"].stderr) == pytest.approx(by_prompt)
    assert float(scores["overall"].stderr) == pytest.approx(by_prompt / 6**0.5)
    # one image a prompt: the usual s/√n
    alone = geneval_score(tags, correct, list(range(len(tags))))
    assert float(alone["counting"].stderr) == pytest.approx((0.4 * 0.6 / 19) ** 0.5)


def test_the_error_is_the_spread_over_repetitions() -> None:
    values, errors = [], []
    for seed in range(400):
        lines = images(seed)
        columns = ([line[key] for line in lines] for key in ("tag", "correct", "metadata"))
        overall = geneval_score(*columns)["overall"]
        values.append(float(overall.value))
        errors.append(float(overall.stderr))
    spread = float(torch.tensor(values).std())
    assert spread == pytest.approx(sum(errors) / 400, rel=0.1)


def test_a_task_that_does_not_occur_is_named() -> None:
    with pytest.warns(UserWarning, match="over 1 tasks: there is no image of single_object, two_"):
        scores = geneval_score(["colors", "colors"], [True, False], ["a", "b"])
    assert float(scores["overall"].value) == 0.5 and list(scores) == [
        "overall",
        "colors",
        "images",
        "prompts",
    ]
    with pytest.raises(ValueError, match="expected as many of each, at least one"):
        geneval_score([], [], [])


def test_the_metric_counts_each_image_once_in_any_order() -> None:
    lines = images(1)
    columns = ([line[key] for line in lines] for key in ("tag", "correct", "metadata"))
    wanted = geneval_score(*columns)
    metric = GenEvalScore()
    order = [*torch.randperm(len(lines)).tolist(), 3, 4]  # two samples twice
    for part in (order[:50], order[50:]):
        metric.update(
            [Verdict(lines[i]["correct"]) for i in part],
            [json.loads(lines[i]["metadata"]) for i in part],
            torch.tensor(part),
        )
    got = metric.compute()
    assert list(got) == list(wanted)
    for name, estimate in wanted.items():
        assert [float(x) for x in got[name]] == pytest.approx([float(x) for x in estimate])
    with pytest.raises(ValueError, match="1 verdicts, 0 entries and 1 indices"):
        metric.update([Verdict(True)], [], torch.tensor([0]))
    records = geneval_records(got, "GenEval-HF", method="bon")
    assert records[0]["metric"] == "GenEval-HF/overall" and records[0]["method"] == "bon"


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path / "results.jsonl", images())
    arguments = [str(path), "--output", str(tmp_path / "out.json"), "--method", "fks"]
    main(arguments)
    content = read_results(tmp_path / "out.json")
    assert content["records"] == import_official(path, method="fks")
    assert content["geneval_results"]["file"] == "results.jsonl"
    assert "GenEval/overall" in capsys.readouterr().out
    with pytest.raises(FileExistsError):
        main(arguments)


def test_other_files_are_refused(tmp_path: Path) -> None:
    good = images()[0]
    for name, text, message in [
        ("empty", "\n", "is empty"),
        ("cut", json.dumps(good) + '\n{"filename', "Line 2 of .* not valid JSON"),
        ("list", "[1]", "Line 1 of .* has no filename, tag"),
        ("other", json.dumps({"prompt": "x"}), "has no filename, tag, correct, metadata"),
        ("text", json.dumps(good | {"correct": "yes"}), "correct = 'yes'"),
    ]:
        (tmp_path / name).write_text(text)
        with pytest.raises(ValueError, match=message):
            read_official(tmp_path / name)
    with pytest.raises(FileNotFoundError, match=r"no file .*absent"):
        read_official(tmp_path / "absent")
