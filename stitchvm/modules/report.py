"""What an evaluation leaves behind: metrics.json, a table in the terminal, the plot of Figure 2, measured cards."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from stitchvm.modules.card import write_measured
from stitchvm.plots import retention_curves
from stitchvm.results import weights_of, write_results
from stitchvm.spec import fingerprint
from stitchvm.tables import Table, grouped, pivot, records_to_text

if TYPE_CHECKING:
    from stitchvm.modules.evaluation import ValueEvaluation

# Metrics left out of the terminal's table; metrics.json has all.
DETAILS = ("truth_noise", "truth_std", "r2_corrected", "bias", "mean_r5", "mean_r10")


def report(module: ValueEvaluation) -> None:
    """Writes, prints and draws the records of an evaluation; for the first process only."""
    path = write_results(
        module.folder / "metrics.json",
        module.records,
        config=run_config(module),
        overwrite=module.overwrite,
        extra={
            "seed": module.seed,
            "task": module.task.name,
            "data": describe_data(module.datamodule),
            "weights": weights(module),
            "ms_per_image": {
                name: 1000 * module.seconds[name] / max(module.calls[name], 1)
                for name in module.factories
            },
        },
    )
    shown = [r for r in module.records if r["metric"].rpartition("/")[2] not in DETAILS]
    print_table(shown)
    print(f"wrote {path}")
    if module.plot and module.sigmas and module.factories:
        print(f"wrote {retention_curves(module.records, module.folder / 'retention.png')}")
    if module.write_cards:
        data = (describe_data(module.datamodule) or module.task.name).rpartition(".")[2]
        for name, factory in module.factories.items():
            for source in factory.sources().values():
                card = write_measured(source, data, name, shown)
                if card is not None:
                    print(f"wrote {card}")


def run_config(module: Any) -> Any:
    """Returns the run's configuration as plain data, from the command line; None without one."""
    import yaml

    return None if module.run_config is None else yaml.safe_load(module.run_config)


def describe_data(datamodule: Any) -> str | None:
    """Returns the class path of the data module."""
    return (
        None
        if datamodule is None
        else f"{type(datamodule).__module__}.{type(datamodule).__qualname__}"
    )


def weights(module: ValueEvaluation) -> dict[str, dict[str, Any]]:
    """Returns ids and hashes of all that was loaded: files' SHA-256 and the loaded weights' fingerprints."""
    assert module.parts is not None
    answer: dict[str, dict[str, Any]] = {}
    for name in ("reward", "generator", "vae"):
        if module.parts.has(name) or (name == "vae" and module.vae is not None):
            part = getattr(module.parts, name)
            answer[name] = weights_of(str(getattr(part, "id", "")))
            if hasattr(part, "named_parameters"):
                answer[name]["fingerprint"] = fingerprint(part)
            if tuned := getattr(part, "finetuned", None):  # a fingerprint does not look at LoRA
                answer[name]["finetuned"] = weights_of(tuned)
    for name, factory in module.factories.items():
        for path in factory.sources().values():
            answer[name] = weights_of(path)
    return answer


def print_table(records: Iterable[dict[str, Any]], **options: Any) -> None:
    """Prints estimator rows and noise-level columns: in colour on a terminal with rich, else plain.

    Arguments:
        records: The records.
        options: As for `pivot`, for other rows and columns.
    """
    records = list(records)
    if sys.stdout.isatty():
        try:
            print_rich(pivot(records, **options))
            return
        except ImportError:
            pass
    print(records_to_text(records, **options))


def print_rich(table: Table) -> None:
    """Prints a table with rich. Raises ImportError if it is not installed."""
    from rich.console import Console
    from rich.table import Table as RichTable

    drawn = RichTable(header_style="bold")
    for place, name in enumerate(table.header):
        drawn.add_column(name, justify="left" if place < table.keys else "right", no_wrap=True)
    for cells, first in grouped(table):
        if first:
            drawn.add_section()
        drawn.add_row(*cells)
    Console().print(drawn)
