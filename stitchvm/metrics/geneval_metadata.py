"""Entries of GenEval's evaluation_metadata.jsonl: recognised and checked before anything is computed from them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from stitchvm.metrics.geneval import COLOURS, RELATIONS, TASKS

__all__ = ["check_metadata", "group_of", "is_metadata"]


def is_metadata(entry: Any) -> bool:
    """Returns whether an object is meant as an entry of GenEval: it has a "tag" and "include" clauses."""
    return isinstance(entry, Mapping) and "tag" in entry and "include" in entry


def group_of(entry: Mapping[str, Any]) -> int:
    """Returns a number below 2^63 that names the entry, the same on every device and in every run."""
    text = json.dumps(entry, sort_keys=True)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def check_metadata(entry: Any, where: str) -> None:
    """Checks an entry.

    Arguments:
        entry: The entry.
        where: Where it stands, to begin a message with ("Line 3 of FILE").

    Raises:
        ValueError: If a key is missing, or a tag, colour, relation or number is none of GenEval's.
    """
    for key in ("tag", "include", "prompt"):
        if not isinstance(entry, Mapping) or key not in entry:
            has = sorted(entry) if isinstance(entry, Mapping) else type(entry).__name__
            raise ValueError(f"{where} has no key {key!r}, only {has}: expected GenEval metadata.")
    if entry["tag"] not in TASKS:
        raise ValueError(f"{where} has the tag {entry['tag']!r}: expected one of {list(TASKS)}.")
    include, exclude = entry["include"], entry.get("exclude", [])
    if not isinstance(include, list) or not isinstance(exclude, list) or not include + exclude:
        raise ValueError(
            f"{where}: 'include' and 'exclude' must be lists of clauses, not both empty."
        )
    for place, clause in enumerate(include + exclude):
        problem = _problem(clause, min(place, len(include)))
        if problem:
            raise ValueError(f"{where}, clause {clause!r}: {problem}.")


def _problem(clause: Any, earlier: int) -> str | None:
    """Returns what is wrong with a clause that has `earlier` include clauses before it."""
    if not isinstance(clause, Mapping) or not isinstance(clause.get("class"), str):
        return "expected an object with a 'class'"
    count = clause.get("count")
    if not isinstance(count, int) or count < 1:
        return f"'count' must be a whole number from 1, got {count!r}"
    if "color" in clause and clause["color"] not in COLOURS:
        return f"'color' must be one of {list(COLOURS)}"
    if "position" in clause:
        position = clause["position"]
        if not isinstance(position, (list, tuple)) or len(position) != 2:
            return "'position' must be [relation, number of an earlier clause]"
        if position[0] not in RELATIONS:
            return f"the relation must be one of {list(RELATIONS)}"
        if not isinstance(position[1], int) or not 0 <= position[1] < earlier:
            return f"its position refers to clause {position[1]!r}, of which only {earlier} come before"
    return None
