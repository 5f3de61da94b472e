"""What sampling leaves behind: summary.json, a table in the terminal, grids, the plot of values along trajectories."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from stitchvm.metrics.estimate import ratio
from stitchvm.modules.report import describe_data, print_table, run_config
from stitchvm.modules.sample_store import Line
from stitchvm.pictures import grid, trajectory
from stitchvm.plots import style_of
from stitchvm.results import finite, write_results

if TYPE_CHECKING:
    from stitchvm.modules.sampling import Sampling

SECONDS = (
    "wall time of sampling and decoding a batch, the device waited for, divided by its samples; cpu_seconds: the time "
    "this process' threads ran meanwhile"
)


def report(module: Sampling, lines: Sequence[Line]) -> list[dict[str, Any]]:
    """Writes, draws and prints what the samples of a folder come to; for the first process only.

    Returns:
        The records of summary.json.
    """
    method, estimator = names(module)
    shared = {"method": method, "value_estimator": estimator, "seed": module.seed}
    records = [shared | record for record in summary(lines)]
    folder = module.folder
    pages = grid(lines, folder, folder / "grid.png", per_prompt=module.samples_per_prompt)
    written = [str(page) for page in pages]
    if any(line["values"] for line in lines):
        label, final = labels(estimator, module.store.known("measured"))
        picture = folder / "trajectory.png"
        written.append(str(trajectory(lines, picture, label=label, final_label=final)))
    path = write_results(
        folder / "summary.json",
        records,
        config=run_config(module),
        overwrite=True,
        extra={
            "data": describe_data(getattr(module.trainer, "datamodule", None)),
            "prompts": len({line["index"] for line in lines}),
            "seconds_are": SECONDS,
            "peak_memory_is": sorted({line["peak_memory_of"] for line in lines}),
            "calls_per_sample": lines[-1]["calls"],
        },
    )
    print_table(
        [finite(record) for record in records],
        rows=("metric", "value", "stderr", "n"),
        column=None,
    )
    seconds, memory = records[0]["seconds"], records[0]["peak_memory_gib"]
    print(
        f"{method}{f' with the {estimator} value' if estimator else ''}: {len(lines)} "
        f"sample{'s' * (len(lines) > 1)}, {seconds:.3g} s each; {memory:.2f} GiB, {lines[-1]['peak_memory_of']}"
    )
    print(f"wrote {folder / 'samples.jsonl'}, {path}, {', '.join(written)}")
    return records


def labels(estimator: str | None, measured: Mapping[str, Any]) -> tuple[str, str | None]:
    """Returns what the value is called and, unless the final value is of the same reward, what that is called.

    Arguments:
        estimator: The value's estimator.
        measured: What `sampling_config.measured` returned; nothing for folders of earlier versions.
    """
    value, final = (measured.get(name, {}) for name in ("value", "final_value"))
    label = "value" if estimator is None else f"{style_of([estimator])[estimator][0]} value"
    label, other = (
        f"{kind} of {each['reward']}" if each else kind
        for kind, each in ((label, value), ("final value", final))
    )
    return label, None if value and value == final else other


def names(module: Sampling) -> tuple[str, str | None]:
    """Returns what the method and the value estimator are called: their classes' names in lower case."""
    method = snake(type(module.sampler).__name__.removesuffix("Sampler"))
    factory = module.value_factory
    return method, None if factory is None else snake(
        type(factory).__name__.removesuffix("Factory")
    )


def snake(name: str) -> str:
    """Returns a class's name in lower case with underscores."""
    return re.sub(r"(?<=[a-z])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", name).lower()


def summary(lines: Sequence[Line]) -> list[dict[str, Any]]:
    """Returns one record for every reward, check and final value: its mean over samples and the rest of the costs.

    Standard errors are over prompts: samples of one prompt are not independent.
    """
    columns: dict[str, dict[int, list[float]]] = {}
    for line in lines:
        for name, value in numbers(line).items():
            columns.setdefault(name, {}).setdefault(line["index"], []).append(value)
    costs = {
        "seconds": sum(line["seconds"] for line in lines) / len(lines),
        "cpu_seconds": sum(line["cpu_seconds"] for line in lines) / len(lines),
        "peak_memory_gib": max(line["peak_memory_gib"] for line in lines),
    }
    records: list[dict[str, Any]] = []
    for name, prompts in columns.items():
        sums = torch.tensor([sum(each) for each in prompts.values()], dtype=torch.float64)
        counts = torch.tensor([len(each) for each in prompts.values()])
        estimate = ratio(sums, counts)
        records.append(
            {
                "metric": name,
                "value": float(estimate.value),
                "stderr": float(estimate.stderr),
                "n": int(estimate.n),
                **costs,
            }
        )
    return records or [
        {"metric": "samples", "value": None, "stderr": None, "n": len(lines), **costs}
    ]


def numbers(line: Line) -> dict[str, float]:
    """Returns what a sample is measured by."""
    found = dict(line["rewards"])
    found |= {f"checker/{name}": value for name, value in line.get("checker", {}).items()}
    if line.get("final_value") is not None:
        found["final_value"] = line["final_value"]
    return found
