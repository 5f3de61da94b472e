"""Configurations put together as the command line does, without building a parser: quick, and with nothing imported.

A value that is the path of a YAML file, relative to the file that names it, stands for that file's content. Several
files are merged, the last wins; `--model.value.path X` overrides, with or without `init_args` in between.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

__all__ = ["compose", "read"]


def compose(files: Sequence[Path], overrides: Sequence[tuple[str, str]] = ()) -> dict[str, Any]:
    """Returns the composed configuration.

    Arguments:
        files: The files, the last wins.
        overrides: Pairs of a dotted key and the text of its value.

    Raises:
        ValueError: If a file is missing or no YAML mapping, or an override goes through something that is none.
    """
    config: dict[str, Any] = {}
    for file in files:
        config = _merge(config, read(file))
    for key, text in overrides:
        value = _included(yaml.safe_load(text), Path.cwd())
        _set(config, key.split("."), value, key)
    return config


def read(file: Path) -> dict[str, Any]:
    """Returns the content of a file, with the files that it names put in.

    Raises:
        ValueError: If it is missing or no YAML mapping.
    """
    if not file.is_file():
        raise ValueError(f"there is no configuration {file}: give --config a YAML file")
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{file} is not YAML ({error})") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file} holds no mapping: expected model, data and trainer")
    included = _included(content, file.parent)
    assert isinstance(included, dict)
    return included


def _included(value: Any, folder: Path) -> Any:
    if isinstance(value, dict):
        return {key: _included(item, folder) for key, item in value.items()}
    if isinstance(value, list):
        return [_included(item, folder) for item in value]
    if isinstance(value, str) and value.endswith((".yaml", ".yml")):
        path = folder / value
        return read(path) if path.is_file() else value
    return value


def _merge(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    merged = dict(below)
    for key, value in above.items():
        old = merged.get(key)
        merged[key] = (
            _merge(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
        )
    return merged


def _set(config: dict[str, Any], parts: list[str], value: Any, key: str) -> None:
    for name in parts[:-1]:
        if "class_path" in config and name not in ("class_path", "init_args"):
            config = config.setdefault("init_args", {})
        step = config.setdefault(name, {})
        if isinstance(step, str) and "." in step:  # a class, named by its path alone
            step = config[name] = {"class_path": step}
        if not isinstance(step, dict):
            raise ValueError(f"--{key}: {name} is {step!r}, which has no keys below it")
        config = step
    last = parts[-1]
    if "class_path" in config and last not in ("class_path", "init_args"):
        config = config.setdefault("init_args", {})
    config[last] = value
