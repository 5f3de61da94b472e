"""Runs over several nodes: what the scripts hand on, what SLURM's variables become, and real processes of both."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch import Trainer
from lightning.pytorch.plugins.environments import SLURMEnvironment, TorchElasticEnvironment
from lightning.pytorch.utilities import rank_zero_only

from tests.modules import alignment_runs, runs
from tests.modules.alignment_runs import assert_close, assert_same

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "configs"
JOB = {"SLURM_NNODES": "4", "SLURM_NTASKS_PER_NODE": "4", "SLURM_CPUS_PER_TASK": "8"}
# stands for srun: a task per node, two nodes, both here
SRUN = """#!/bin/bash
shift
for k in 0 1; do SLURM_PROCID=$k SLURM_NODEID=$k SLURM_LOCALID=0 "$@" & pids+=($!); done
for pid in "${pids[@]}"; do wait "$pid" || exit; done
"""


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def script(name: str, *arguments: str | Path, **environment: str) -> Any:
    """Runs a script, with `python` and `stitchvm` of this environment."""
    own = {"PYTHON": sys.executable, "STITCHVM": f"{sys.executable} -m stitchvm"} | environment
    return subprocess.run(
        [str(ROOT / "scripts" / name), *map(str, arguments)],
        env=runs.environment() | own,
        capture_output=True,
        text=True,
        timeout=600,
        cwd=ROOT,
    )


def program(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)
    return path


def handed_on(tmp_path: Path, name: str, *arguments: str, **environment: str) -> list[str]:
    """Returns the command that a script ends in, word by word."""
    echo = program(tmp_path / "bin" / "srun", '#!/bin/bash\nprintf "%s\\n" "$@"\n')
    path = f"{echo.parent}:{os.environ['PATH']}"
    done = script(name, *arguments, **({"PATH": path, "PYTHON": "srun"} | environment))
    assert done.returncode == 0, done.stderr
    return list(done.stdout.splitlines())


# -- what is handed on ---------------------------------------------------------------------------------


def test_the_slurm_script_says_the_jobs_size_once(tmp_path):
    config = "configs/nft_stitched_sd35m.yaml"
    options = {**JOB, "STITCHVM": "stitchvm", "RUN": str(tmp_path / "run")}
    words = handed_on(tmp_path, "slurm.sh", config, "--model.lr", "1e-4", **options)
    assert words[:5] == ["--cpus-per-task=8", "stitchvm", "fit", "--config", config]
    told = dict(zip(words[5::2], words[6::2], strict=True))
    assert told == {
        "--trainer.num_nodes": "4",
        "--trainer.devices": "4",
        "--trainer.strategy": "ddp",
        "--trainer.default_root_dir": str(tmp_path / "run"),
        "--model.lr": "1e-4",
    }
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    (tmp_path / "run" / "checkpoints" / "last.ckpt").touch()
    words = handed_on(tmp_path, "slurm.sh", config, **options)
    assert words[-2:] == ["--ckpt_path", "last"]


@pytest.mark.parametrize("name", ["slurm.sh", "torchrun.sh"])
def test_a_configuration_that_shards_keeps_its_strategy(name, tmp_path, monkeypatch):
    options = {**JOB, "STITCHVM": "stitchvm", "NODES": "4", "GPUS": "4"}
    words = handed_on(tmp_path, name, "configs/nft_stitched_flux.yaml", **options)
    assert "--trainer.strategy" not in words
    at = words.index("--trainer.strategy.init_args.data_parallel_size")
    assert words[at + 1] == "16"
    assert words[words.index("--trainer.default_root_dir") + 1] == "runs/nft_stitched_flux"
    # the command line takes it
    from tests.configs.test_all import parse

    start = words.index("--trainer.num_nodes")
    cli = parse(CONFIGS / "nft_stitched_flux.yaml", *words[start:], monkeypatch=monkeypatch)
    trainer = cli.config.fit.trainer
    assert (trainer.num_nodes, int(trainer.devices)) == (4, 4)
    assert trainer.strategy.class_path.endswith("ModelParallelStrategy")
    sizes = trainer.strategy.init_args
    assert (sizes.data_parallel_size, sizes.tensor_parallel_size) == (16, 1)
    assert sizes.save_distributed_checkpoint is False


def test_scripts_say_what_they_miss():
    done = script("slurm.sh", "configs/nft_sd35m.yaml")
    assert done.returncode == 1 and "this script is for sbatch" in done.stderr
    done = script("slurm.sh", "configs/nft_sd35m.yaml", SLURM_NNODES="2")
    assert done.returncode == 1 and "--ntasks-per-node" in done.stderr
    for name in ("slurm.sh", "torchrun.sh"):
        done = script(name)
        assert done.returncode == 1 and "usage: " in done.stderr


# -- what the variables become -------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def own_rank(monkeypatch):
    """Takes back the rank that a Trainer tells Lightning's `rank_zero_only`: the tests after these are rank 0."""
    monkeypatch.setattr(rank_zero_only, "rank", 0, raising=False)


@pytest.fixture
def slurm(monkeypatch):
    """The third task of a job of two nodes with two tasks each: the first on the second node."""
    variables = {
        "SLURM_JOB_ID": "4711",
        "SLURM_JOB_NAME": "stitchvm",
        "SLURM_NODELIST": "gpu[07-08]",
        "SLURM_NNODES": "2",
        "SLURM_NTASKS": "4",
        "SLURM_NTASKS_PER_NODE": "2",
        "SLURM_PROCID": "2",
        "SLURM_LOCALID": "0",
        "SLURM_NODEID": "1",
    }
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "")  # whatever Lightning sets is undone
        monkeypatch.delenv(name)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)


def trainer(num_nodes: int, devices: int) -> Trainer:
    return Trainer(
        accelerator="cpu", strategy="ddp", num_nodes=num_nodes, devices=devices, logger=False
    )


def launch(num_nodes: int, devices: int) -> None:
    """Does what every command does first, before anything is built."""
    made = trainer(num_nodes, devices)
    made.strategy.launcher.launch(lambda: None, trainer=made)


def test_slurm_is_found_by_its_variables(slurm):
    found = trainer(num_nodes=2, devices=2)
    environment = found.strategy.cluster_environment
    assert isinstance(environment, SLURMEnvironment)
    assert (found.world_size, found.global_rank, found.local_rank, found.node_rank) == (4, 2, 0, 1)
    assert (environment.main_address, environment.main_port) == ("gpu07", 15000 + 4711)


def test_a_trainer_that_differs_from_the_job_is_refused(slurm, monkeypatch):
    with pytest.raises(
        ValueError, match=r"`devices=1`.*--ntasks-per-node=2` does not match. HINT"
    ):
        launch(num_nodes=2, devices=1)
    with pytest.raises(ValueError, match=r"`num_nodes=1`.*--nodes=2` does not match. HINT: Set"):
        launch(num_nodes=1, devices=2)
    monkeypatch.delenv("SLURM_NTASKS_PER_NODE")
    with pytest.raises(RuntimeError, match=r"Use `--ntasks-per-node=4` instead"):
        trainer(num_nodes=2, devices=2)


def test_torchrun_is_found_by_its_variables(monkeypatch):
    variables = {"RANK": 3, "LOCAL_RANK": 1, "GROUP_RANK": 1, "WORLD_SIZE": 4}
    variables |= {"TORCHELASTIC_RUN_ID": "run", "MASTER_ADDR": "gpu07", "MASTER_PORT": 29500}
    for name, value in variables.items():
        monkeypatch.setenv(name, str(value))
    found = trainer(num_nodes=2, devices=2)
    assert isinstance(found.strategy.cluster_environment, TorchElasticEnvironment)
    assert (found.world_size, found.global_rank, found.local_rank, found.node_rank) == (4, 3, 1, 1)
    with pytest.raises(ValueError, match=r"\(2 \* 1\) does not match the world size \(4\)"):
        launch(num_nodes=1, devices=2)


# -- real processes ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def make(tiny_sd3, tiny_clip, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")

    def config(name: str, max_steps: int = 4) -> Path:
        made = alignment_runs.draft_config(tiny_sd3, tiny_clip, folder / name)
        return runs.write_run(made, folder / name, max_steps=max_steps)

    return config


@pytest.fixture(scope="module")
def single(make):
    """The run on one process."""
    return runs.fit(make("single"))


@pytest.mark.slow
def test_two_processes_by_torchrun_equal_one_and_go_on(make, single):
    root = make("torchrun", max_steps=2)
    options = {"GPUS": "2", "HOST": f"127.0.0.1:{free_port()}", "RUN": str(root)}
    done = script("torchrun.sh", root.with_suffix(".yaml"), **options)
    assert done.returncode == 0, done.stdout + done.stderr
    half = runs.checkpoint(root)
    assert half["global_step"] == 2 and half["spent"]["samples"] == 16
    make("torchrun")
    done = script("torchrun.sh", root.with_suffix(".yaml"), **options)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "num_nodes" not in done.stderr
    assert_close(single, runs.checkpoint(root))
    assert (root / "lora" / "pytorch_lora_weights.safetensors").is_file()


@pytest.mark.slow
def test_two_nodes_by_slurm_equal_one(make, single, tmp_path):
    srun = program(tmp_path / "bin" / "srun", SRUN)
    job = {
        "PATH": f"{srun.parent}:{os.environ['PATH']}",
        "SLURM_JOB_ID": "1",
        "SLURM_JOB_NAME": "stitchvm",
        "SLURM_NODELIST": "127.0.0.1",
        "SLURM_NNODES": "2",
        "SLURM_NTASKS": "2",
        "SLURM_NTASKS_PER_NODE": "1",
        "MASTER_PORT": str(free_port()),
    }
    root = make("slurm")
    done = script("slurm.sh", root.with_suffix(".yaml"), **job, RUN=str(root))
    assert done.returncode == 0, done.stdout + done.stderr
    two = runs.checkpoint(root)
    assert_close(single, two)
    assert two["spent"]["samples"] == single["spent"]["samples"] == 32
    again = script(
        "slurm.sh", root.with_suffix(".yaml"), **job, RUN=str(root)
    )  # has nothing to do
    assert again.returncode == 0, again.stdout + again.stderr
    assert_same(two, runs.checkpoint(root))
