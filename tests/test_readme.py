"""The Python blocks of README.md and docs/ that say `# runs on the world` run as they stand."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
MARK = "# runs on the world"
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(page: Path) -> list[tuple[int, str]]:
    """Returns the marked blocks of a page, each with the number of its first line."""
    text, found = page.read_text(encoding="utf-8"), []
    for match in re.finditer(r"^```python\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL):
        if match[1].startswith(MARK + "\n"):
            found.append((text[: match.start(1)].count("\n") + 1, match[1]))
    return found


BLOCKS = [(page, line, code) for page in PAGES for line, code in blocks(page)]
COMPILED = [compile("\n" * (line - 1) + code, str(page), "exec") for page, line, code in BLOCKS]


@pytest.mark.parametrize(
    "place", range(len(BLOCKS)), ids=[f"{page.name}:{line}" for page, line, _ in BLOCKS]
)
def test_runs(place: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    exec(COMPILED[place], {"__name__": "block"})


def test_every_way_is_shown() -> None:
    code = "\n".join(code for _, _, code in BLOCKS)
    for name in ("sample", "load_value", "WeightedValue", "GuidanceCallback", "FKCallback"):
        assert f"stitchvm.{name}(" in code, f"no marked block shows stitchvm.{name}"


def test_only_marked_blocks_are_found(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "# Page\n\n```python\nraise SystemExit\n```\n\n"
        f"```python\n{MARK}\nx = 1\n```\n\n```bash\n{MARK}\n```\n"
    )
    assert blocks(page) == [(8, f"{MARK}\nx = 1\n")]
