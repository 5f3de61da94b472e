"""Where weights come from: the package itself, a local path, or the Hugging Face hub.

Three spellings are understood everywhere a configuration names a checkpoint:

- `world:NAME`: the embedded world, shipped inside the package;
- a local path: taken as it is, and never looked up on the hub;
- `org/name`: a hub repository, of which only the files that are needed are downloaded.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

_WORLD = "world:"
_Path = TypeVar("_Path")


def world_folder() -> Path:
    """Returns the folder of the weights that are shipped inside the package."""
    return Path(__file__).parent / "world" / "weights"


def cache_folder() -> Path:
    """Returns the folder of what the library computes once and keeps: prompt embeddings.

    It is `$STITCHVM_CACHE` if that is set, else `stitchvm` in the hub's own cache (`$HF_HOME`).
    """
    if chosen := os.environ.get("STITCHVM_CACHE"):
        return Path(chosen).expanduser()
    home = os.environ.get("HF_HOME") or Path.home() / ".cache" / "huggingface"
    return Path(home).expanduser() / "stitchvm"


def looks_local(path_or_id: str) -> bool:
    """Returns whether a name can only mean a local path: the hub is then never asked."""
    if path_or_id.startswith((".", "/", "~")) or path_or_id.count("/") != 1 or "\\" in path_or_id:
        return True
    return Path(path_or_id).parent.is_dir()


def resolve(
    path_or_id: str | Path,
    *,
    allow_patterns: list[str] | None = None,
    revision: str | None = None,
) -> Path:
    """Returns the local folder (or file) that `path_or_id` names, downloading it if it is on the hub.

    Arguments:
        path_or_id: `world:NAME`, an existing path, or a hub id `org/name`.
        allow_patterns: The files to download from the hub, as glob patterns; all of them by default.
        revision: A branch, tag or commit of the hub repository.

    Raises:
        FileNotFoundError: If there is no such path, no such repository, no permission (gated), or no network.
        ValueError: If the name is empty.
    """
    name = os.fspath(path_or_id)
    if not name:
        raise ValueError(
            "an empty model path; give a folder, a hub id such as 'org/name', or 'world:NAME'"
        )
    if name.startswith(_WORLD):
        return _resolve_world(name)
    local = Path(name).expanduser()
    if local.exists():
        return local
    if looks_local(name):
        raise FileNotFoundError(
            f"no such file or folder: '{name}' (looked for {local.absolute()}); correct the path, or "
            "give a hub id of the form 'org/name'"
        )

    def download() -> str:
        from huggingface_hub import snapshot_download

        return snapshot_download(name, revision=revision, allow_patterns=allow_patterns)

    return Path(_ask_hub(name, None, download))


def resolve_file(path_or_id_and_file: str | Path, *, revision: str | None = None) -> Path:
    """Returns the local file that `world:NAME/FILE`, a path, or `org/name/FILE` on the hub names.

    Raises:
        FileNotFoundError: If there is no such file, no permission (gated), or no network.
        ValueError: If the name is empty.
    """
    name = os.fspath(path_or_id_and_file)
    parts = name.split("/")
    local = Path(name).expanduser()
    may_be_remote = (
        len(parts) >= 3
        and all(parts)
        and not name.startswith((".", "/", "~", _WORLD))
        and not Path(parts[0]).is_dir()
    )
    if local.is_file() or not may_be_remote:
        path = resolve(name)
        if not path.is_file():
            raise FileNotFoundError(
                f"'{name}' is a folder, a file was expected: name the file in it"
            )
        return path
    repository, file = "/".join(parts[:2]), "/".join(parts[2:])

    def download() -> str:
        from huggingface_hub import hf_hub_download

        return hf_hub_download(repository, file, revision=revision)

    return Path(_ask_hub(repository, file, download))


def _resolve_world(name: str) -> Path:
    """Returns the path of `world:NAME` inside the package."""
    path = world_folder() / name.removeprefix(_WORLD)
    if path.exists():
        return path
    weights = world_folder()
    there = sorted(p.name for p in weights.iterdir() if p.is_dir()) if weights.is_dir() else []
    raise FileNotFoundError(
        f"the embedded world has no '{name}'; it has {', '.join(_WORLD + n for n in there) or 'nothing'}"
        " (`make world` trains its networks anew)"
    )


def _ask_hub(repository: str, file: str | None, download: Callable[[], _Path]) -> _Path:
    """Runs a download and turns the hub's many errors into one line that says what to do."""
    from huggingface_hub import errors

    wanted = (
        f"'{file}' of the hub repository '{repository}'" if file else f"'{repository}' on the hub"
    )
    url = f"https://huggingface.co/{repository}"
    try:
        return download()
    except (errors.HfHubHTTPError, OSError, ValueError, errors.EntryNotFoundError) as error:
        causes = _causes(error)
        if any(isinstance(e, errors.GatedRepoError) for e in causes):
            remedy = f"it is gated: accept its licence at {url}, then log in with `hf auth login`"
        elif any(isinstance(e, errors.RepositoryNotFoundError) for e in causes):
            remedy = (
                f"there is no repository {url} (or it is private: `hf auth login`), and no local folder "
                "of that name"
            )
        elif any(isinstance(e, errors.RevisionNotFoundError) for e in causes):
            remedy = "it has no such revision: check the branch, tag or commit"
        elif any(isinstance(e, errors.RemoteEntryNotFoundError) for e in causes):
            remedy = f"the repository has no such file: see {url}/tree/main"
        elif any(isinstance(e, errors.HFValidationError) for e in causes):
            remedy = "that is neither a local path nor a valid hub id of the form 'org/name'"
        elif any(isinstance(e, (errors.LocalEntryNotFoundError, ConnectionError)) for e in causes):
            remedy = (
                "it is not in the local cache and the hub cannot be reached (offline?): unset "
                "HF_HUB_OFFLINE, or give a local folder"
            )
        else:
            raise
        raise FileNotFoundError(f"cannot get {wanted}: {remedy}") from error


def _causes(error: BaseException) -> list[BaseException]:
    """Returns an error with everything that caused it."""
    chain: list[BaseException] = []
    following: BaseException | None = error
    while following is not None and following not in chain:
        chain.append(following)
        following = following.__cause__ or following.__context__
    return chain
