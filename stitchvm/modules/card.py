"""The measured table in a value model's card: what `stitchvm test` found, put where users of the folder see it.

The card keeps one part per data set under "## Measured"; testing again on the same data replaces that part.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from stitchvm.tables import records_to_markdown
from stitchvm.value_model import CARD, CONFIG
from stitchvm.writing import written

__all__ = ["measured_card", "write_measured"]

TITLE = "## Measured"


def measured_card(
    card: str, data: str, estimator: str, records: Iterable[Mapping[str, Any]]
) -> str:
    """Returns a card with the records of an estimator, and the clean reward's beside them, as a table.

    Arguments:
        card: The text of the card.
        data: What was tested on; the part of the same name is replaced.
        estimator: The name of the value model among the estimators.
        records: The evaluation's records.

    Raises:
        ValueError: If no record is of that estimator.
    """
    shown = [r for r in records if r["estimator"] in (estimator, "clean")]
    # of retrieval captions count, too, and benchmarks differ in size
    sizes = sorted({r["n"] for r in shown if r["estimator"] == estimator}) or [0]
    n = f"{sizes[0]} to {sizes[-1]}" if len(sizes) > 1 else str(sizes[0])
    table = records_to_markdown(
        shown, stderr=True
    )  # with a column of benchmarks if there are several
    part = f"### {data}\n\n{n} samples a number; ± is one standard error over them.\n\n{table}\n"
    head, title, rest = card.partition(f"{TITLE}\n")
    parts = re.split(r"(?m)^(?=### )", rest) if title else []
    lead = parts.pop(0).strip() if parts and not parts[0].startswith("### ") else ""
    kept = [p.strip() for p in parts if p.partition("\n")[0] != f"### {data}"]
    body = "\n\n".join(p for p in (lead, *kept, part.strip()) if p)
    return f"{head.rstrip()}\n\n{TITLE}\n\n{body}\n"


def write_measured(
    path: str, data: str, estimator: str, records: Iterable[Mapping[str, Any]]
) -> Path | None:
    """Puts the records into the card of a value-model folder; returns the card's path, or None if that may not be.

    Only a local folder is written to: never the package's own (`world:`) nor the hub's cache.

    Arguments:
        path: What the estimator was loaded from.
        data: What was tested on.
        estimator: The name of the value model among the estimators.
        records: The evaluation's records.
    """
    folder = Path(path).expanduser()
    card = folder / CARD
    if path.startswith("world:") or not (folder / CONFIG).is_file() or not card.is_file():
        return None
    if not os.access(card, os.W_OK) or not os.access(folder, os.W_OK):
        return None
    text = measured_card(card.read_text(), data, estimator, records)
    with written(card) as part:
        part.write_text(text)
    return card
