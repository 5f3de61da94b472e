"""What is measured, as tidy JSON: one format for evaluations, samplings, trainings and benchmarks.

A results file is one object,

    {"command": …, "versions": {…}, "machine": {…}, "config_sha256": …, "records": [{…}, …]}

and every table of the project is rendered from such records, so that no number is typed by hand. An
evaluation record is `{"metric", "estimator", "sigma", "value", "stderr", "n"}` with `sigma` null for the
clean reward. A number that is not finite is written as null: JSON has no NaN.

This file imports nothing but the standard library. Tables of records are made in `stitchvm.tables`.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import platform
import re
import shlex
import sys
from collections.abc import Iterable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from stitchvm.tables import records_to_markdown, records_to_text
from stitchvm.writing import written

__all__ = [
    "check_free",
    "command_line",
    "finite",
    "machine",
    "read_results",
    "records_to_markdown",
    "records_to_text",
    "sha256_of",
    "versions",
    "weights_of",
    "write_results",
]

Record = Mapping[str, Any]

PACKAGES = (
    "stitchvm",
    "torch",
    "lightning",
    "torchmetrics",
    "diffusers",
    "transformers",
    "open_clip_torch",
    "peft",
    "safetensors",
    "numpy",
)


def machine() -> dict[str, Any]:
    """Returns the machine in general words: CPU model, cores, memory in GiB, system, accelerators.

    No host name, user or path. Accelerators are listed if torch has already been imported.
    """
    cpu = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        found = re.search(r"^model name\s*:\s*(.+)$", cpuinfo.read_text(errors="replace"), re.M)
        cpu = found.group(1).strip() if found else cpu
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    answer: dict[str, Any] = {"cpu": cpu, "cores": cores, "system": platform.system()}
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        answer["memory_gib"] = round(total / 2**30, 1)
    torch = sys.modules.get("torch")
    if torch is not None:
        answer["threads"] = torch.get_num_threads()
        if torch.cuda.is_available():
            names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
            answer["accelerators"] = names
    return answer


def versions() -> dict[str, str]:
    """Returns the versions of Python and of the packages a result depends on (those installed)."""
    answer = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            answer[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    if "torch" in sys.modules:
        answer["torch"] = str(sys.modules["torch"].__version__)  # tells the CUDA build, too
    return answer


def command_line(argv: Sequence[str] | None = None) -> str:
    """Returns the command that is running, without the path of the program or of this machine.

    Paths below the working directory become relative and those below the home folder begin with ~.
    """
    argv = list(sys.argv if argv is None else argv)
    program = Path(argv[0]).name if argv else ""
    if program == "__main__.py":
        program = f"python -m {Path(argv[0]).parent.name}"
    elif program.endswith(".py"):
        program = f"python {program}"
    here, home = f"{Path.cwd()}{os.sep}", f"{Path.home()}{os.sep}"
    # ~ comes after quoting: quoted, a shell would not expand it
    rest = [shlex.quote(arg.replace(here, "")).replace(home, "~/") for arg in argv[1:]]
    return " ".join([program, *rest])


def sha256_of(path: str | Path) -> str:
    """Returns the SHA-256 of a file's bytes, or of a folder: its files' names and hashes, sorted.

    Hidden files and folders do not count, nor a README.md: a card may be written on without the weights changing.

    Raises:
        FileNotFoundError: If there is nothing at `path`.
    """
    path = Path(path)
    if path.is_file():
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    if not path.is_dir():
        raise FileNotFoundError(f"there is no file or folder {path} to hash.")
    digest = hashlib.sha256()
    for file_path in sorted(p for p in path.rglob("*") if p.is_file()):
        name = file_path.relative_to(path)
        if name.name != "README.md" and not any(part.startswith(".") for part in name.parts):
            digest.update(f"{name.as_posix()}\0{sha256_of(file_path)}\n".encode())
    return digest.hexdigest()


def weights_of(path_or_id: str) -> dict[str, Any]:
    """Returns what identifies weights: {"id", "sha256"} for files that are here, else {"id"}.

    Arguments:
        path_or_id: `world:NAME`, a path, or a hub id, which is not looked up.
    """
    from stitchvm.hub import resolve

    answer: dict[str, Any] = {"id": path_or_id}
    if path_or_id.startswith("world:") or Path(path_or_id).expanduser().exists():
        try:
            answer["sha256"] = sha256_of(resolve(path_or_id))
        except (FileNotFoundError, ValueError):
            return answer
    return answer


def finite(value: Any) -> Any:
    """Returns plain JSON: tensors and numpy scalars as numbers, non-finite numbers as None."""
    if isinstance(value, Mapping):
        return {str(k): finite(v) for k, v in value.items()}
    if isinstance(value, (str, bool, int)) or value is None:
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, (list, tuple, set)):
        return [finite(v) for v in value]
    if hasattr(value, "tolist"):
        return finite(value.tolist())
    return str(value)


def check_free(path: str | Path, *, overwrite: bool = False, remedy: str = "") -> None:
    """Raises if a results file is already there.

    Raises:
        FileExistsError: If `path` exists and `overwrite` is False; `remedy` ends the message.
    """
    if Path(path).exists() and not overwrite:
        remedy = remedy or "choose another path, or pass overwrite=True."
        raise FileExistsError(f"{path} already holds results and is not overwritten: {remedy}")


def write_results(
    path: str | Path,
    records: Iterable[Record],
    *,
    command: str | None = None,
    config: Mapping[str, Any] | str | None = None,
    overwrite: bool = False,
    extra: Mapping[str, Any] | None = None,
) -> Path:
    """Writes a results file and returns its path. The file appears whole or not at all.

    Arguments:
        path: The JSON file; its folder is made.
        records: The records.
        command: The command that made them; the running one by default.
        config: The run's configuration, a mapping or YAML text; kept, with its SHA-256.
        overwrite: Whether a file that is there may be replaced.
        extra: Further entries of the top level (seed, hashes of weights, …).

    Raises:
        FileExistsError: If the file is there and `overwrite` is False.
    """
    path = Path(path)
    check_free(path, overwrite=overwrite)
    config = None if config is None else config if isinstance(config, str) else finite(config)
    text = config if isinstance(config, str) else json.dumps(config, sort_keys=True)
    content: dict[str, Any] = {
        "command": command_line() if command is None else command,
        "versions": versions(),
        "machine": machine(),
        "config_sha256": None if config is None else hashlib.sha256(text.encode()).hexdigest(),
        **finite(extra or {}),
        "records": [finite(record) for record in records],
    }
    if config is not None:
        content["config"] = config
    path.parent.mkdir(parents=True, exist_ok=True)
    with written(path) as part:
        part.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n")
    return path


def read_results(path: str | Path) -> dict[str, Any]:
    """Returns a results file as a dict with at least "records".

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is not a results file.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no results file {path}.")
    try:
        content = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON ({error}); expected a results file.") from error
    if not isinstance(content, dict) or not isinstance(content.get("records"), list):
        raise ValueError(f'{path} is no results file: expected an object with a list "records".')
    return content
