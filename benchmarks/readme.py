"""Puts figures of results/ into pages of docs/ and the README: `python benchmarks/readme.py`."""

from __future__ import annotations

import page_gpu
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
    fill(README, "speed", page_gpu.summary())
    for name, body in page_gpu.sections().items():
        fill(page_gpu.PAGE, name, body)


if __name__ == "__main__":
    main()
