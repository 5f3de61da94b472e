"""A folder that looks like the hub's cache, so that configurations run as they stand, hub ids and all.

    ROOT/hub/models--ORG--NAME/refs/main            the commit
    ROOT/hub/models--ORG--NAME/snapshots/COMMIT/    the files (on the hub: links to blobs/)

With HF_HOME=ROOT and HF_HUB_OFFLINE=1 the libraries look there and nowhere else.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

__all__ = ["environment", "repository", "snapshot"]


def snapshot(root: Path, id: str) -> Path:
    """Returns the folder of a repository's files."""
    commit = hashlib.sha1(id.encode()).hexdigest()
    return root / "hub" / f"models--{id.replace('/', '--')}" / "snapshots" / commit


def repository(root: Path, id: str) -> Path:
    """Returns the folder of a repository's files, made, with its ref."""
    folder = snapshot(root, id)
    folder.mkdir(parents=True, exist_ok=True)
    refs = folder.parents[1] / "refs"
    refs.mkdir(exist_ok=True)
    (refs / "main").write_text(folder.name)
    return folder


def environment(root: Path) -> dict[str, str]:
    """Returns the environment in which ROOT is the hub's cache and the library's, and there is no network."""
    named = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    return named | {
        "HF_HOME": str(root),
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "STITCHVM_CACHE": str(root / "cache"),
    }
