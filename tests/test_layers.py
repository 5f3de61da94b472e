"""Data flows downwards only: every file imports from its own layer or lower ones, heavy packages where they belong."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "stitchvm"
LAYERS = [
    [
        "_version",
        "py.typed",
        "tables",
        "results",
        "hub",
        "packing",
        "randomness",
        "spec",
        "path",
        "schedule",
        "plots",
        "pictures",
        "interruption",
        "deferral",
        "compilation",
        "cuda_graphs",
        "writing",
        "training_curves",
        "training_logs",
    ],
    ["stitch", "vae", "backbones", "rewards"],
    ["value_model", "generator", "adapters"],
    ["values"],
    ["search", "samplers", "objectives", "metrics"],
    ["api", "diffusers_native", "__init__"],
    ["world"],
    ["data"],
    ["modules"],
    ["cli", "cli_parser", "lightning_cli", "sweep", "curves", "preflight", "__main__"],
]
RANK = {name: rank for rank, names in enumerate(LAYERS) for name in names}
# the embedded world's trainer and demo stand beside the library, not in it
OUTSIDE = ("world/train/", "world/demo.py", "world/gates.py")
FILES = sorted(
    p for p in PACKAGE.rglob("*.py") if not p.relative_to(PACKAGE).as_posix().startswith(OUTSIDE)
)
WRAPPERS = {  # what may be imported while a file is loaded, and by whom
    "diffusers": (),
    "transformers": (),
    "open_clip": (),
    "lightning": ("data/", "modules/", "lightning_cli.py", "cli_parser.py"),
    "matplotlib": (),
}


def imported(tree: ast.AST, everywhere: bool) -> set[str]:
    nodes = ast.walk(tree) if everywhere else top_level(tree)
    names: set[str] = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names.add(node.module)
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def top_level(tree: ast.Module):
    for node in tree.body:
        yield from [node] if isinstance(node, (ast.Import, ast.ImportFrom)) else []


@pytest.mark.parametrize("file", FILES, ids=lambda p: p.relative_to(PACKAGE).as_posix())
def test_imports_go_down_only(file):
    relative = file.relative_to(PACKAGE).as_posix()
    own = RANK[relative.split("/")[0].removesuffix(".py")]
    tree = ast.parse(file.read_text())
    for name in imported(tree, everywhere=True):
        parts = name.split(".")
        if parts[0] == "stitchvm" and len(parts) > 1 and parts[1] in RANK:
            assert RANK[parts[1]] <= own, f"{relative} imports {name} from a higher layer"
    for name in imported(tree, everywhere=False):
        for heavy, allowed in WRAPPERS.items():
            if name.split(".")[0] == heavy:
                assert relative.startswith(allowed) if allowed else False, (
                    f"{relative} imports {heavy} when it is loaded; import it where it is used"
                )


def test_every_file_has_a_layer():
    unknown = {p.relative_to(PACKAGE).parts[0].removesuffix(".py") for p in FILES} - RANK.keys()
    assert not unknown
