"""Results files: written whole or not at all, never over others, hashed, without traces of the machine."""

from __future__ import annotations

import hashlib
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from stitchvm.results import (
    command_line,
    machine,
    read_results,
    sha256_of,
    versions,
    weights_of,
    write_results,
)

RECORD = {
    "metric": "retrieval/image_to_text_r1",
    "estimator": "stitched",
    "sigma": 0.5,
    "value": 0.25,
}


def test_what_is_written_is_read(tmp_path: Path) -> None:
    records = [RECORD | {"value": torch.tensor(0.25), "stderr": math.nan, "n": torch.tensor(4)}]
    path = write_results(
        tmp_path / "deep" / "metrics.json",
        records,
        command="stitchvm test",
        config={"b": 1, "a": [0.1, None]},
        extra={"seed": 3},
    )
    content = read_results(path)
    assert content["records"] == [RECORD | {"stderr": None, "n": 4}]
    assert content["command"] == "stitchvm test" and content["seed"] == 3
    assert content["versions"]["torch"] == torch.__version__
    assert content["config"] == {"b": 1, "a": [0.1, None]}
    canonical = hashlib.sha256(b'{"a": [0.1, null], "b": 1}').hexdigest()
    assert content["config_sha256"] == canonical
    assert list(path.parent.iterdir()) == [path]


def test_results_are_not_written_over(tmp_path: Path) -> None:
    path = write_results(tmp_path / "m.json", [RECORD], command="first")
    with pytest.raises(FileExistsError, match="is not overwritten"):
        write_results(path, [], command="second")
    assert read_results(path)["command"] == "first"
    write_results(path, [], command="third", overwrite=True)
    assert read_results(path)["command"] == "third"
    assert read_results(path)["config_sha256"] is None


def test_a_failed_write_leaves_what_was_there(tmp_path: Path, monkeypatch) -> None:
    path = write_results(tmp_path / "m.json", [RECORD], command="first")
    monkeypatch.setattr("os.replace", lambda a, b: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        write_results(path, [], command="second", overwrite=True)
    assert read_results(path)["command"] == "first"
    assert list(tmp_path.iterdir()) == [path]


def test_other_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no results file"):
        read_results(tmp_path / "none.json")
    for text, message in (("not json", "is not JSON"), ("[1]", "expected an object")):
        (tmp_path / "x.json").write_text(text)
        with pytest.raises(ValueError, match=message):
            read_results(tmp_path / "x.json")


def test_hashes_see_content_and_names_only(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name / "sub").mkdir(parents=True)
        (tmp_path / name / "a.txt").write_text("a")
        (tmp_path / name / "sub" / "b.txt").write_text("b")
    assert sha256_of(tmp_path / "one" / "a.txt") == hashlib.sha256(b"a").hexdigest()
    whole = sha256_of(tmp_path / "one")
    assert whole == sha256_of(tmp_path / "two")
    (tmp_path / "two" / ".hidden").write_text("x")
    assert whole == sha256_of(tmp_path / "two")
    (tmp_path / "two" / "sub" / "b.txt").write_text("c")
    assert whole != sha256_of(tmp_path / "two")
    (tmp_path / "one" / "a.txt").rename(tmp_path / "one" / "c.txt")
    assert whole != sha256_of(tmp_path / "one")
    with pytest.raises(FileNotFoundError, match="to hash"):
        sha256_of(tmp_path / "none")
    assert weights_of(str(tmp_path / "one"))["sha256"] == sha256_of(tmp_path / "one")
    assert weights_of("org/name") == {"id": "org/name"}
    assert weights_of("world:none") == {"id": "world:none"}


def test_the_command_names_no_place_of_the_machine(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    argv = ["/opt/env/bin/stitchvm", "test", "--config", f"{tmp_path}/configs/a b.yaml"]
    assert command_line(argv) == "stitchvm test --config 'configs/a b.yaml'"
    argv = ["/opt/env/lib/stitchvm/__main__.py", "test", str(Path.home() / "x.yaml")]
    assert command_line(argv) == "python -m stitchvm test ~/x.yaml" or Path.home() == Path("/")
    assert command_line(["/somewhere/bench.py"]) == "python bench.py"


def test_machine_and_versions_in_general_words() -> None:
    answer = machine()
    assert answer["cores"] >= 1 and answer["cpu"] and answer["threads"] == torch.get_num_threads()
    import platform

    assert platform.node() not in json.dumps(answer)
    assert versions()["python"] == platform.python_version()


def test_results_need_no_torch() -> None:
    code = "import sys, stitchvm.results, stitchvm.tables, stitchvm.plots; stitchvm.results.machine(); "
    code += "print([m for m in ('torch', 'numpy', 'matplotlib', 'lightning') if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"
