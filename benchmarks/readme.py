"""Puts the figures of results/world/ into docs/results.md and, in short, the README: `python benchmarks/readme.py`."""

from __future__ import annotations

import page_sampling
import page_training
import page_values
from pages import PAGE, README, fill

SECTIONS = {"values": page_values, "sampling": page_sampling, "training": page_training}


def main() -> None:
    """Rewrites the sections between markers on both pages."""
    for name, page in SECTIONS.items():
        fill(PAGE, name, page.section())
        fill(README, name, page.summary())


if __name__ == "__main__":
    main()
