"""What docs/ says is true of the code: its examples run, and every name, file and link in it exists."""

from __future__ import annotations

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


def module_files() -> list[Path]:
    return [p for p in (ROOT / "stitchvm").rglob("*.py") if not p.name.startswith("_")]


def test_every_public_module_is_in_the_reference() -> None:
    shown = set(
        re.findall(r"^::: (\S+)$", "".join(map(Path.read_text, DOCS.glob("api/*.md"))), re.M)
    )
    for path in module_files():
        parts = path.relative_to(ROOT).with_suffix("").parts
        names = {".".join(parts[: n + 1]) for n in range(1, len(parts))}
        assert names & shown, f"{path} is on no page of docs/api/"
    for name in shown:
        importable = ROOT.joinpath(*name.split("."))
        assert importable.is_dir() or importable.with_suffix(".py").is_file(), name


@pytest.mark.parametrize("page", PAGES, ids=[str(page.relative_to(DOCS)) for page in PAGES])
def test_names_files_and_links_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for dotted in set(re.findall(r"\bstitchvm(?:\.\w+)+", text)):
        assert is_defined(dotted), f"{dotted} is not defined"
    for path in set(re.findall(r"(?:configs|stitchvm|benchmarks|tests)/[\w/*.]+\w", text)):
        assert list(ROOT.glob(path)), f"{path} does not exist"
    for target, anchor in re.findall(r"\]\(([^)#:\s]*)(#[^)\s]*)?\)", text):
        assert not target or (page.parent / target).exists(), f"link to {target}"
        assert target or f"## {anchor[1:]}" in text.lower(), f"link to {anchor}"


def is_defined(dotted: str) -> bool:
    """Returns whether a name is a module, or is defined in one; nothing is imported."""
    names = dotted.split(".")
    for n in range(len(names), 0, -1):
        base = ROOT.joinpath(*names[:n])
        if base.is_dir() and n == len(names):
            return True
        file = base / "__init__.py" if base.is_dir() else base.with_suffix(".py")
        if file.is_file():
            rest = names[n:]
            code = file.read_text(encoding="utf-8")
            words = "|".join(map(re.escape, rest[:1]))
            defined = (
                rf"^\s*(?:class|def) (?:{words})\b|^\s*(?:{words})\b.*[=:]|[\"'](?:{words})[\"']"
            )
            return not rest or re.search(defined, code, re.M) is not None
    return False


def test_what_does_not_exist_is_found() -> None:
    assert is_defined("stitchvm.rewards.clip.CLIPReward") and is_defined("stitchvm.sample")
    assert not is_defined("stitchvm.rewards.clip.Nothing") and not is_defined("stitchvm.nothing")


def test_every_page_is_in_the_navigation() -> None:
    navigation = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    listed = set(re.findall(r"[\w/]+\.md", navigation))
    assert listed == {str(page.relative_to(DOCS)) for page in PAGES}


def test_the_page_of_costs_is_what_its_script_makes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    monkeypatch.chdir(ROOT)
    import scaling_page

    text = (DOCS / "scaling.md").read_text(encoding="utf-8")
    assert scaling_page.fill(text) == text


def test_costs_are_added_up_from_the_counted_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    monkeypatch.chdir(ROOT)
    import scaling_page

    u = scaling_page.Part(2.0, 3.0)
    counted = {"denoiser": u, "prefix": scaling_page.Part(0.5, 0.75)}
    counted["reward"] = scaling_page.Part(7.0, 14.0)  # a backward pass is two forward passes
    counted["decoder"] = scaling_page.Part(4.0, 5.0)
    monkeypatch.setattr(scaling_page, "parts", lambda setup: counted)
    monkeypatch.setattr(scaling_page, "towers", lambda: (0.5, 0.5))
    found = scaling_page.updates()
    # 25 calls, decoder and rewards; 24 levels of three forward passes and one backward pass
    assert found["DiffusionNFT"] == (1152, 25 * 2 + 4 + 0.5, 24 * 9)
    # 12 … 17 calls, on average 14.5, and a level less; a prefix and the tails
    assert found["DiffusionNFT + StitchVM"] == (1152, 14.5 * 2 + 1, 13.5 * 9)
    assert found["DRaFT-3"] == (2048, 10 * 2 + 4.5, 3 * (2 + 3) + 5 + 2 * 0.5)
    assert found["DRaFT-1 + StitchVM"] == (2048, 5 * 2 + 1, (2 + 3) + 0.75 + 2 * 0.5)
    assert found["Flow-GRPO-Fast"] == (1152, 10 * 2 + 4.5, 3 * (2 + 3))


def commands() -> list[list[str]]:
    """Returns every different `stitchvm` command of the bash blocks, and of README.md's, in words."""
    found: dict[str, list[str]] = {}
    for page in (ROOT / "README.md", *PAGES):
        for block in blocks(page.read_text(encoding="utf-8")):
            if block.language != "bash" or block.text.startswith(MARK):
                continue
            text = re.sub(r"(?m)(?:^|\s)#.*$", "", block.text).replace("\\\n", " ")
            for line in re.findall(r"(?:'[^']*'|[^'\n])+", text):  # a quoted text may have several
                words = shlex.split(line)
                if words[:1] == ["stitchvm"] and "--config" in words:
                    found[shlex.join(words)] = words[1:]
    return list(found.values())


def test_commands_are_found() -> None:
    found = commands()
    assert {words[0] for words in found} == {"fit", "search", "test", "predict", "check", "sweep"}
    assert any("--model.estimators" in words and '"tweedie"' in words[-1] for words in found)


@pytest.mark.slow
def test_commands_parse(monkeypatch: pytest.MonkeyPatch) -> None:
    from stitchvm.lightning_cli import ParsedCLI, parse
    from stitchvm.preflight.compose import compose
    from stitchvm.sweep import _parser

    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", ["stitchvm"])  # Lightning warns of any other
    assert len(commands()) > 20
    for command, *words in commands():
        try:
            if command == "check":
                config = compose([Path(words[words.index("--config") + 1])])
                parse(words, config["model"]["class_path"])
            elif command == "sweep":
                given, rest = _parser().parse_known_args(words)
                parameter, setting = given.sweep[:2]
                run = ["predict", "--config", str(given.config), *rest]
                ParsedCLI(args=[*run, f"--model.{parameter}={setting}"], command="predict")
            else:
                ParsedCLI(args=[command, *words], command=command)
        except SystemExit:
            pytest.fail(f"stitchvm {command} {shlex.join(words)}")
