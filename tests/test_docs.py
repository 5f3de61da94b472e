"""What docs/ says is true of the code: its examples run, and every name, file and link in it exists."""

from __future__ import annotations

import importlib
import re
import shlex
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

from stitchvm.cli import main

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
MARK = "# runs on the world\n"
PAGES = sorted(DOCS.rglob("*.md"))
FENCE = re.compile(r"^```(\w+)(?: title=\"([^\"]+)\")?\n(.*?)^```$", re.MULTILINE | re.DOTALL)


class Block(NamedTuple):
    """A fenced block: its language, the file it is to be written to, its first line, its text."""

    language: str
    title: str | None
    line: int
    text: str


def blocks(text: str) -> list[Block]:
    """Returns the fenced blocks of a page."""
    return [
        Block(m[1], m[2], text[: m.start(3)].count("\n") + 1, m[3]) for m in FENCE.finditer(text)
    ]


def run(page: Path, block: Block) -> None:
    """Writes a block to its file, and runs it where it is marked."""
    if block.title is not None:
        Path(block.title).write_text(block.text)
    if not block.text.startswith(MARK):
        return
    if block.language == "python":
        code = "\n" * (block.line - 1) + block.text
        exec(compile(code, str(page), "exec"), {"__name__": "block"})
    else:
        for line in block.text.splitlines()[1:]:
            command = shlex.split(line)
            assert command[:3] == ["python", "-m", "stitchvm"], line
            main(command[3:])


EXAMPLES = [page for page in PAGES if page.parent.name == "extend" and page.stem != "index"]


@pytest.mark.parametrize("page", EXAMPLES, ids=[page.stem for page in EXAMPLES])
def test_examples_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    Path("configs").symlink_to(ROOT / "configs")
    found = blocks(page.read_text(encoding="utf-8"))
    assert any(block.text.startswith(MARK) for block in found)
    for block in found:
        run(page, block)
    for name in [Path(block.title).stem for block in found if block.title]:
        sys.modules.pop(name, None)
