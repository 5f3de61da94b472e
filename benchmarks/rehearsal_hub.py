"""A folder that looks like the hub's cache, so that configurations run as they stand, hub ids and all.

    ROOT/hub/models--ORG--NAME/refs/main            the commit
    ROOT/hub/models--ORG--NAME/snapshots/COMMIT/    the files (on the hub: links to blobs/)

With HF_HOME=ROOT and HF_HUB_OFFLINE=1 the libraries look there and nowhere else.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

__all__ = ["enter", "repository", "snapshot"]


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


def enter(root: Path) -> None:
    """Makes ROOT the hub's cache and the library's for this process and its children, without a network.

    The libraries read this once, when they are imported: call it before.
    """
    for key in [key for key in os.environ if key.startswith("HF_")]:
        del os.environ[key]  # HF_HUB_CACHE would win over HF_HOME
    os.environ |= {
        "HF_HOME": str(root),
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "STITCHVM_CACHE": str(root / "cache"),
    }
