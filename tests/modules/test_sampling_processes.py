"""Sampling in real processes: interrupted in every way and gone on with, and on two processes."""

from __future__ import annotations

import signal
import time
from pathlib import Path

import pytest

from stitchvm.results import read_results
from tests.modules import runs, sampling_runs
from tests.modules.sampling_runs import lines, same

pytestmark = pytest.mark.slow
PATIENCE = 900  # seconds, on a machine with much else to do


@pytest.fixture(scope="module")
def make(tiny_sd3, tiny_clip, tmp_path_factory):
    """Writes a run's configuration and returns the folder it samples into."""
    folder = tmp_path_factory.mktemp("processes")
    value = sampling_runs.value_model(tiny_sd3, tiny_clip, folder / "value")

    def config(name: str, **trainer) -> Path:
        made = sampling_runs.config(folder / name, tiny_sd3, tiny_clip, value, trainer=trainer)
        runs.write_config(made, folder / f"{name}.yaml")
        return folder / name

    return config


@pytest.fixture(scope="module")
def whole(make) -> Path:
    """The run that nobody interrupts: 8 prompts × 2 samples in 6 calls of the sampler."""
    root = make("whole")
    runs.stitchvm("predict", "--config", root.with_suffix(".yaml"))
    assert len(lines(root)) == 16
    return root


def count(root: Path) -> int:
    """Returns how many whole lines there are, in the files of all processes."""
    return sum(path.read_bytes().count(b"\n") for path in root.glob("samples*.jsonl"))


def interrupted(root: Path, number: int, more: int = 1) -> tuple[int, str, int]:
    """Runs a command, sends it a signal once it has sampled so much more; returns its end, its words, and the lines."""
    before, output = count(root), ""
    process = runs.start("predict", "--config", root.with_suffix(".yaml"))
    try:
        deadline = time.monotonic() + PATIENCE
        while count(root) < before + more and process.poll() is None:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        process.send_signal(number)
        output, _ = process.communicate(timeout=PATIENCE)
    finally:
        process.kill()
    return process.returncode, output, count(root)


def test_whatever_ends_a_run_the_same_command_goes_on(make, whole: Path) -> None:
    """Ctrl-C, SIGTERM and kill -9, one after the other; then to the end, bit for bit as if nothing had been."""
    root, done = make("interrupted"), 0
    for number, code in ((signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGKILL, -9)):
        returncode, output, there = interrupted(root, number)
        assert returncode == code, output
        assert done < there < 16, output
        if number != signal.SIGKILL:
            assert f"{there} finished samples are kept in {root}: the same command" in output
            assert "Traceback" not in output
        done = there
        assert not (root / "summary.json").exists()
    output = runs.stitchvm("predict", "--config", root.with_suffix(".yaml"))
    assert f"{done} samples are there already and are kept" in output
    same(whole, root)
    ours, theirs = (read_results(r / "summary.json")["records"] for r in (whole, root))
    for one, two in zip(ours, theirs, strict=True):
        assert [one[k] for k in ("metric", "value", "stderr", "n")] == [
            two[k] for k in ("metric", "value", "stderr", "n")
        ]


def test_two_processes_share_the_prompts(make, whole: Path) -> None:
    root = make("two", devices=2, strategy="ddp")
    returncode, output, there = interrupted(root, signal.SIGINT, more=3)
    assert returncode == 130, output
    assert 3 <= there < 16
    assert {path.name for path in root.glob("samples*")} <= {
        "samples.rank0.jsonl",
        "samples.rank1.jsonl",
    }
    output = runs.stitchvm("predict", "--config", root.with_suffix(".yaml"))
    assert [path.name for path in root.glob("samples*")] == ["samples.jsonl"]
    assert {line["batch"] for line in lines(root)} == {1, 3}, "4 prompts of a process in 3 + 1"
    same(whole, root, exact=False)
    assert output.count("fk_steering with the stitched value: 16 samples") == 1
