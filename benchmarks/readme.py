"""Puts figures of results/ into docs/results.md, docs/rehearsal.md and the README: `python benchmarks/readme.py`."""

from __future__ import annotations

import page_rehearsal
import page_sampling
import page_training
import page_values
from pages import PAGE, README, fill

SECTIONS = {"values": page_values, "sampling": page_sampling, "training": page_training}


def main() -> None:
    """Rewrites the sections between markers on the pages."""
    for name, page in SECTIONS.items():
        fill(PAGE, name, page.section())
        fill(README, name, page.summary())
    fill(page_rehearsal.PAGE, "full", page_rehearsal.section())


if __name__ == "__main__":
    main()
