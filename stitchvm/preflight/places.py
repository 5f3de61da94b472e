"""Where a name points to without asking anybody: a folder, the embedded world, or the local cache of the hub."""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple

from stitchvm.hub import looks_local, world_folder
from stitchvm.preflight.findings import Finding

__all__ = ["Place", "find", "hub_state"]

# repositories whose files are given out after a licence has been accepted
GATED = ("stabilityai/stable-diffusion-3", "black-forest-labs/FLUX.1-dev")


class Place(NamedTuple):
    """What a name points to.

    Attributes:
        name: The name.
        folder: The folder (or file), None if there is none.
        hub: Whether it is a hub id.
    """

    name: str
    folder: Path | None
    hub: bool

    def absent(self, part: str, file: str = "") -> Finding:
        """Returns what to say of the name, or of a file in it, that is not there."""
        what = f"{self.name}/{file}" if file else self.name
        if self.hub:
            return hub_state(part, self.name, file)
        if self.folder is None:
            detail, remedy = (
                "no such file or folder",
                "correct the path, or give a hub id org/name",
            )
            if self.name.startswith("world:"):
                detail, remedy = (
                    "the embedded world has no such part",
                    "see stitchvm/world/weights",
                )
        else:
            detail = f"there is no {self.folder / file}"
            remedy = "complete the folder: download this file from where the others came from"
        return Finding(part, what, "missing", detail, remedy)


def find(name: str, revision: str | None = None) -> Place:
    """Returns what a name points to: `world:NAME`, a path, or what the cache has of a hub id."""
    if name.startswith("world:"):
        path = world_folder() / name.removeprefix("world:")
        return Place(name, path if path.exists() else None, hub=False)
    local = Path(name).expanduser()
    if local.exists():
        return Place(name, local, hub=False)
    if looks_local(name):
        return Place(name, None, hub=False)
    return Place(name, cached(name, revision), hub=True)


def cached(id: str, revision: str | None = None) -> Path | None:
    """Returns the snapshot of a hub id in the local cache, if there is one."""
    from huggingface_hub.constants import HF_HUB_CACHE

    folder = Path(HF_HUB_CACHE) / f"models--{id.replace('/', '--')}"
    revision = revision or "main"
    ref = folder / "refs" / revision
    commit = ref.read_text().strip() if ref.is_file() else revision
    snapshot = folder / "snapshots" / commit
    return snapshot if snapshot.is_dir() else None


def hub_state(part: str, id: str, file: str = "") -> Finding:
    """Returns what to say of something that is on the hub and not in the cache."""
    from huggingface_hub import get_token

    what = f"{id}/{file}" if file else id
    fetch = f"hf download {id}" + (f" {file}" if file and "*" not in file else "")
    detail = "not in the local cache"
    if id.startswith(GATED) and get_token() is None:
        page = f"https://huggingface.co/{id}"
        return Finding(
            part,
            what,
            "gated",
            f"{detail}; its licence has to be accepted, and there is no token",
            f"accept the licence at {page}, then `hf auth login` and `{fetch}`",
        )
    if offline():
        return Finding(part, what, "missing", f"{detail}, and HF_HUB_OFFLINE is set", f"`{fetch}`")
    return Finding(part, what, "download", detail, f"the run will fetch it; or now: `{fetch}`")


def offline() -> bool:
    """Whether the hub may not be asked."""
    return os.environ.get("HF_HUB_OFFLINE", "0").lower() in ("1", "true", "yes", "on")
