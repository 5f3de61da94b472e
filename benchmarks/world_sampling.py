"""What the world must show of inference-time alignment: Tables 1, 2 and 6 and Figure 3 in small.

    python benchmarks/world_sampling.py --parts tables scaling cross --rewards hps aesthetic clip

- tables: plain, best-of-N, FK steering, DPS and the last two with the stitched value, on 200 captions of "test"; the
  λ of FK steering and the strength of guidance are swept before, on captions of "tune", and the best average gain over
  the rewards decides, as the paper reports "the best average";
- scaling: reward against cost for N and M (Figure 3);
- cross: the small backbone's value model on the larger generator, beside the larger one's own where it is given.

Everything is `stitchvm predict` / `stitchvm sweep` on the shipped configs with overrides, each run in a folder and a
process of its own: what is finished is not done again, an interrupted run goes on. Writes results/world/sampling_*.json
and docs/images/world_sampling_*.png. Seconds are CPU seconds of one thread, so that a busy machine does not matter.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from figures import reward_against_cost

from stitchvm.results import write_results
from stitchvm.tables import records_to_text

RUNS = Path("runs/world_sampling")
RESULTS = Path("results/world")
REWARDS = ("hps", "aesthetic", "clip")
METHODS = ("plain", "bon", "fks", "fks_stitched", "dps", "dps_stitched")
SWEEPS: dict[
    str, tuple[str, tuple[float, ...]]
] = {  # the first setting is what gains are measured over
    "fks": ("lam", (2.0, 5.0, 10.0)),
    "fks_stitched": ("lam", (2.0, 5.0, 10.0)),
    "dps": ("strength", (0.0, 0.2, 0.5, 1.0)),
    "dps_stitched": ("strength", (0.0, 0.2, 0.5, 1.0)),
}
SCALING = {  # Figure 3: N particles of plain FK steering; N particles with M proposals of the stitched value
    "fks": [(2, 1), (4, 1), (8, 1), (14, 1)],
    "fks_stitched": [(2, 2), (4, 1), (4, 2), (4, 4), (8, 2)],
}


def stitchvm(*arguments: str | Path) -> None:
    """Runs the command line in a process of its own, on one thread."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "stitchvm", *map(str, arguments)]
    subprocess.run(command, check=True, env=environment)


def options(method: str, reward: str, steps: int | None, seed: int = 0) -> list[str]:
    """Returns the overrides that put a reward (and a number of steps) into a shipped config."""
    found = [f"--model.seed={seed}", "--trainer.enable_progress_bar=false"]
    if method != "plain":
        found.append(f"--model.reward=configs/rewards/world_{reward}.yaml")
    if method.endswith("stitched"):
        found.append(f"--model.value.path=world:value_{reward}")
    if steps is not None:
        found.append(f"--model.sampler.num_steps={steps}")
    return found


def sample(
    folder: Path, method: str, reward: str, extra: Iterable[str], steps: int | None
) -> Path:
    """Returns the folder of finished samples, made first if need be."""
    if not (folder / "summary.json").is_file():
        config = f"configs/{method}_world.yaml"
        where = f"--trainer.default_root_dir={folder}"
        stitchvm("predict", "--config", config, *options(method, reward, steps), *extra, where)
    return folder


def records(folder: Path, **keys: Any) -> list[dict[str, Any]]:
    """Returns a run's records with further keys."""
    summary = json.loads((folder / "summary.json").read_text())
    calls = summary["calls_per_sample"]
    return [{**record, **keys, "calls": calls} for record in summary["records"]]


def sweep(method: str, reward: str, prompts: int, steps: int | None) -> tuple[str, float]:
    """Returns the parameter that scales the value and its best setting on the split "tune", swept first if need be.

    λ of FK steering and the strength of guidance: the paper tells neither. The best is that of the highest gain, the
    average over the steering and the held-out rewards. λ is in units of the values' spread, one choice for all rewards:
    it is made with the first of `REWARDS`.
    """
    parameter, settings = SWEEPS[method]
    reward = REWARDS[0] if parameter == "lam" else reward
    folder = RUNS / reward / f"sweep_{method}"
    if not (folder / "sweep.json").is_file():
        stitchvm(
            *("sweep", "--config", f"configs/{method}_world.yaml"),
            *("--sweep", f"sampler.{parameter}", *map(str, settings)),
            *("--folder", folder),
            *options(method, reward, steps),
            *(
                "--data.split=tune",
                f"--data.num_prompts={prompts}",
                f"--data.batch_size={prompts}",
            ),
        )
    found = json.loads((folder / "sweep.json").read_text())
    write_results(
        RESULTS / f"sampling_sweep_{method}_{reward}.json",
        found["records"],
        command=command(),
        extra={"reward": reward, "method": method, "split": "tune"},
        overwrite=True,
    )
    averages = [record for record in found["records"] if record["metric"] == "average gain"]
    gains = {settings[0]: 0.0} | {record["setting"]: record["value"] for record in averages}
    best = max((setting for setting in gains if setting > 0), key=lambda setting: gains[setting])
    print(f"{method} {reward}: {parameter} = {best} of average gains {gains}", flush=True)
    return parameter, best


def tables(reward: str, args: argparse.Namespace) -> None:
    """Tables 1 and 2: every method with one reward, on the same prompts and seeds."""
    found: list[dict[str, Any]] = []
    for method in METHODS:
        extra = [f"--data.num_prompts={args.prompts}"]
        keys: dict[str, Any] = {"name": method, "target": reward}
        steps = args.guided_steps if method.startswith("dps") else args.steps
        if method in SWEEPS:
            parameter, keys[parameter] = sweep(method, reward, args.tune_prompts, steps)
            extra.append(f"--model.sampler.{parameter}={keys[parameter]}")
        folder = RUNS / ("plain" if method == "plain" else f"{reward}/{method}")
        found += records(sample(folder, method, reward, extra, steps), **keys)
        save(found, reward)
    print(records_to_text(found, rows=("name",), column="metric", value="value", digits=3))


def save(found: list[dict[str, Any]], name: str) -> None:
    """Writes results/world/sampling_NAME.json."""
    path = RESULTS / f"sampling_{name}.json"
    write_results(path, found, command=command(), overwrite=True)


def scaling(reward: str, args: argparse.Namespace) -> None:
    """Figure 3: the reward against the seconds of a sample, for N and M."""
    found: list[dict[str, Any]] = []
    for method, points in SCALING.items():
        for n, m in points:
            extra = [
                f"--data.num_prompts={args.prompts}",
                f"--model.sampler.particles={n}",
                f"--model.sampler.proposals={m}",
                f"--data.batch_size={max(1, 128 // n)}",
            ]
            folder = RUNS / reward / f"scaling_{method}_N{n}_M{m}"
            keys = {"name": method, "target": reward, "particles": n, "proposals": m}
            found += records(sample(folder, method, reward, extra, args.steps), **keys)
            save(found, f"scaling_{reward}")
    shown = [r for r in found if r["metric"] == reward]
    reward_against_cost(shown, Path(f"docs/images/world_sampling_scaling_{reward}.png"))
    columns = ("name", "particles", "proposals", "value", "stderr", "cpu_seconds")
    print(records_to_text(shown, rows=columns, column=None))


def cross(reward: str, args: argparse.Namespace) -> None:
    """Table 6: the larger generator, plain and steered by the small backbone's value model or by its own."""
    found: list[dict[str, Any]] = []
    generator = "--model.generator.path=world:sd3_large"
    runs: list[tuple[str, str, list[str]]] = [
        ("plain", "plain", []),
        ("fks", "fks", []),
        ("fks_stitched, small backbone", "fks_stitched", []),
    ]
    if args.large_value is not None:
        own = [f"--model.value.path={args.large_value}"]
        runs.append(("fks_stitched, own backbone", "fks_stitched", own))
    for name, method, more in runs:
        extra = [f"--data.num_prompts={args.prompts}", generator, *more]
        folder = RUNS / reward / f"cross_{name.replace(', ', '_').replace(' ', '_')}"
        keys = {"name": name, "target": reward, "generator": "world:sd3_large"}
        found += records(sample(folder, method, reward, extra, args.steps), **keys)
        save(found, f"cross_{reward}")
    print(records_to_text(found, rows=("name",), column="metric", value="value", digits=3))


def command() -> str:
    """Returns the command that is running."""
    return " ".join(["python benchmarks/world_sampling.py", *sys.argv[1:]])


def main() -> None:
    """Runs what is missing of the parts that are asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parts = ("tables", "scaling", "cross")
    parser.add_argument("--parts", nargs="+", default=["tables"], choices=parts)
    parser.add_argument("--rewards", nargs="+", default=list(REWARDS), choices=REWARDS)
    parser.add_argument("--prompts", type=int, default=200)
    parser.add_argument("--tune-prompts", type=int, default=32)
    parser.add_argument(
        "--steps", type=int, default=40, help="of plain, best-of-N and FK steering"
    )
    parser.add_argument("--guided-steps", type=int, default=40, help="of DPS; 100 in the paper")
    parser.add_argument("--large-value", help="a value model distilled on world:sd3_large")
    args = parser.parse_args()
    for part in args.parts:
        for reward in args.rewards:
            globals()[part](reward, args)


if __name__ == "__main__":
    main()
