"""The command `stitchvm curves`: picture, results file and table of runs, and what it refuses."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from stitchvm.cli import main as command
from stitchvm.curves import XS, main
from stitchvm.results import read_results
from stitchvm.training_curves import AXES
from tests.test_training_logs import write


def make(root: Path, name: str, speed: float) -> Path:
    """Writes a run whose reward rises by `speed` in 10 core-seconds."""
    steps = range(0, 50, 10)
    scalars = {
        "val/hps": {s: 1 + speed * s / 10 for s in steps},
        "val/checker/whole": {s: 0.5 - s / 1000 for s in steps},
        "val/image/saturation": dict.fromkeys(steps, 0.3),
        "cost/cpu_seconds": {s: float(s) for s in steps},
        "cost/samples": {s: 8.0 * s for s in steps},
        "train/reward": dict.fromkeys(steps, 1.0),
    }
    write(root / name, 1000.0, scalars)
    return root / name


@pytest.fixture
def two(tmp_path):
    fast = [make(tmp_path, f"fast{k}", 2 + k / 10) for k in range(3)]
    return make(tmp_path, "slow", 1), f"fast={','.join(map(str, fast))}"


def test_picture_results_and_table(two, tmp_path, capsys, monkeypatch):
    slow, fast = two
    monkeypatch.chdir(tmp_path)
    output = tmp_path / "out" / "curves.png"
    argv = [f"slow={slow}", fast, "--metric", "val/hps", "--x", "cpu_seconds"]
    command(["curves", *argv, "--output", str(output)])
    out = capsys.readouterr().out
    assert output.stat().st_size > 5000
    before = output.with_suffix(".json").read_bytes()
    other = ["curves", *argv[:2], "--x", "samples", "--output", str(output)]
    with pytest.raises(SystemExit) as exit_:
        command(other)
    said = capsys.readouterr().err
    assert exit_.value.code == 2 and f"{output} and " in said and "--overwrite" in said
    assert output.with_suffix(".json").read_bytes() == before
    command([*other, "--overwrite"])
    assert output.with_suffix(".json").read_bytes() != before
    command(["curves", *argv, "--output", str(output), "--overwrite"])
    results = read_results(output.with_suffix(".json"))
    assert results["runs"] == {"slow": ["slow"], "fast": ["fast0", "fast1", "fast2"]}
    assert str(tmp_path) not in output.with_suffix(".json").read_text()
    summary = [r for r in results["records"] if "level" in r]
    assert [(r["method"], r["runs"], r["level"]) for r in summary] == [
        ("slow", 1, 5.0),
        ("fast", 3, 5.0),
    ]
    assert summary[0]["cost_to_level"] == 40
    mean = sum(40 / (2 + k / 10) for k in range(3)) / 3
    assert summary[1]["cost_to_level"] == pytest.approx(mean)
    assert summary[1]["ratio"] == pytest.approx(40 / mean)
    every = [r for r in results["records"] if "step" in r]
    assert len(every) == 4 * 5 and every[1] == {
        "method": "slow",
        "run": 0,
        "metric": "val/hps",
        "step": 10,
        "cpu_seconds": 10.0,
        "samples": 80.0,
        "value": 2.0,
    }
    lines = [line.split() for line in out.splitlines()]
    assert ["slow", "1", "5.0000", "–", "40", "40", "–", "1.00"] in lines
    assert [
        "fast",
        "3",
        "9.4000",
        "0.2309",
        "40",
        "19.1",
        "0.525",  # of 20, 19.05 and 18.18
        f"{40 / mean:.2f}",
    ] in lines
    assert "cpu_seconds to 5" in out and "the cost of slow to the level" in out


def test_by_default_all_scores_and_names_of_folders(two, tmp_path, capsys):
    slow, fast = two
    argv = [str(slow), fast, "--x", "samples", "--output", str(tmp_path / "all.png")]
    found = main([*argv, "--against", "fast"])
    assert [(r["metric"], r["method"]) for r in found] == [
        ("val/hps", "slow"),
        ("val/hps", "fast"),
        ("val/checker/whole", "slow"),
        ("val/checker/whole", "fast"),
    ]
    assert {r["against"] for r in found} == {"fast"} and found[1]["ratio"] == 1
    assert found[0]["ratio"] < 1  # the slow one costs more


def test_a_level_of_ones_own(two, tmp_path):
    slow, fast = two
    argv = [str(slow), fast, "--metric", "val/hps", "--x", "cpu_seconds", "--target", "2.5"]
    found = main([*argv, "--output", str(tmp_path / "a.pdf")])
    assert found[0]["level"] == 2.5 and found[0]["cost_to_level"] == 15


def refused(argv: list[str], capsys) -> str:
    with pytest.raises(SystemExit) as exit_:
        main(argv)
    assert exit_.value.code == 2
    return capsys.readouterr().err


def test_what_is_refused(two, tmp_path, capsys):
    slow, _ = two
    run = str(slow)
    assert f"{run}: there is no val/clip in the logs" in refused(
        [run, "--metric", "val/clip"], capsys
    )
    assert "no seconds in its logs" in refused([run, "--x", "seconds"], capsys)
    assert "expected a number, or `equal`" in refused([run, "--target", "high"], capsys)
    assert "a level of one metric" in refused([run, "--target", "0.5"], capsys)
    assert "the run slow comes twice" in refused([run, f"other={run}"], capsys)
    assert "the name 'a' comes twice" in refused([f"a={run}", f"a={run}x"], capsys)
    assert "expected the folder of a run" in refused([f"={run}"], capsys)
    assert "there is no folder" in refused([f"{run}x"], capsys)
    assert "'b' to compare with: expected one of slow" in refused(
        [run, "--x", "step", "--against", "b"], capsys
    )
    other = tmp_path / "other"
    write(other, 1000.0, {"val/aesthetic": {0: 1.0}})
    assert "no score of held-out prompts in common" in refused([run, str(other)], capsys)
    losses = tmp_path / "losses"
    write(losses, 1000.0, {"train/loss": {0: 2.0}})
    assert "They have train/loss" in refused([str(losses)], capsys)


def test_its_help_is_quick():
    code = (
        "import sys; from stitchvm.cli import main\n"
        "try: main(['curves', '--help'])\n"
        "except SystemExit: pass\n"
        "assert not {'torch', 'lightning', 'numpy', 'tensorboard'} & sys.modules.keys()"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert "--target" in done.stdout
    assert set(XS) == set(AXES)
