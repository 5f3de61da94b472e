"""What the pages of results share: sections between markers, and captions that name command and machine."""

from __future__ import annotations

import re
from pathlib import Path

from stitchvm.results import read_results

__all__ = ["PAGE", "README", "WORLD", "fill", "read", "source"]

README = Path("README.md")
PAGE = Path("docs/results.md")
WORLD = Path("results/world")


def read(name: str) -> list[dict[str, object]] | None:
    """Returns the records of results/world/NAME.json, None if it has not been measured."""
    path = WORLD / f"{name}.json"
    return read_results(path)["records"] if path.is_file() else None


def source(path: Path) -> str:
    """Returns the command and the machine of a results file, as a caption."""
    content = read_results(path)
    machine = content["machine"]
    return f"`{content['command']}` on {machine['cpu']}, {machine['cores']} cores (`{path}`)"


def fill(page: Path, section: str, body: str) -> None:
    """Writes a section of a page, which stands between `<!-- SECTION: begin … -->` and `<!-- SECTION: end -->`.

    Raises:
        SystemExit: If the page has not exactly one pair of such markers.
    """
    markers = re.compile(rf"(<!-- {section}: begin.*?-->\n).*?(<!-- {section}: end -->)", re.S)
    new, count = markers.subn(lambda m: f"{m[1]}\n{body}\n\n{m[2]}", page.read_text())
    if count != 1:
        raise SystemExit(f"{page} must have one pair of markers <!-- {section}: begin/end -->")
    page.write_text(new)
    print(f"{page}: {section}, {len(body.splitlines())} lines")
