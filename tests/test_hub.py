"""Tests of stitchvm/hub.py."""

from __future__ import annotations

from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub import errors

from stitchvm import hub


def refuse(*args: object, **kwargs: object) -> str:
    raise AssertionError("the hub was asked")


def test_local_folder_and_file_are_returned_as_they_are(tmp_path: Path) -> None:
    file = tmp_path / "a.pt"
    file.write_text("")
    assert hub.resolve(str(tmp_path)) == tmp_path
    assert hub.resolve(tmp_path) == tmp_path
    assert hub.resolve_file(str(file)) == file


def test_world_names_lie_in_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "sd3").mkdir()
    (tmp_path / "sd3" / "x.pt").write_text("")
    monkeypatch.setattr(hub, "world_folder", lambda: tmp_path)
    assert hub.resolve("world:sd3") == tmp_path / "sd3"
    assert hub.resolve_file("world:sd3/x.pt") == tmp_path / "sd3" / "x.pt"
    with pytest.raises(FileNotFoundError, match=r"no 'world:sd4'; it has world:sd3"):
        hub.resolve("world:sd4")


@pytest.mark.parametrize("name", ["./a/b", "/a/b", "~/a", "a/b/c", "plain", "there/b"])
def test_what_looks_local_never_asks_the_hub(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "there").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    with pytest.raises(FileNotFoundError, match=r"no such file or folder.*correct the path"):
        hub.resolve(name)


def test_local_files_never_ask_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "runs").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", refuse)
    for name in ("./a/b/c.pt", "/a/b/c.pt", "runs/b/c.pt", "c.pt"):
        with pytest.raises(FileNotFoundError, match="no such file"):
            hub.resolve_file(name)
    with pytest.raises(FileNotFoundError, match="is a folder, a file was expected"):
        hub.resolve_file("runs")


def test_empty_name() -> None:
    with pytest.raises(ValueError, match="empty model path"):
        hub.resolve("")


def test_hub_id_offline_says_so() -> None:
    with pytest.raises(FileNotFoundError, match="HF_HUB_OFFLINE"):
        hub.resolve("nobody-at-all/no-model")
    with pytest.raises(FileNotFoundError, match=r"'x/y.pt' of the hub repository 'nobody/none'"):
        hub.resolve_file("nobody/none/x/y.pt")


def test_malformed_id() -> None:
    with pytest.raises(FileNotFoundError, match="valid hub id"):
        hub.resolve("nobody/no model?")


def response() -> object:
    import httpx2

    return httpx2.Response(403, request=httpx2.Request("GET", "https://huggingface.co"))


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (errors.GatedRepoError, r"gated.*https://huggingface.co/org/name.*`hf auth login`"),
        (errors.RepositoryNotFoundError, "no repository https://huggingface.co/org/name"),
        (errors.RevisionNotFoundError, "no such revision"),
        (errors.RemoteEntryNotFoundError, "no such file"),
    ],
)
def test_hub_errors_name_cause_and_remedy(
    error: type[errors.HfHubHTTPError], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: object, **kwargs: object) -> str:
        raise error("no", response=response())

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(FileNotFoundError, match=message):
        hub.resolve("org/name")


def test_gated_behind_another_error_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object, **kwargs: object) -> str:
        try:
            raise errors.GatedRepoError("no", response=response())
        except errors.GatedRepoError as cause:
            raise errors.LocalEntryNotFoundError("not cached") from cause

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fail)
    with pytest.raises(FileNotFoundError, match="gated"):
        hub.resolve_file("org/name/file.pt")


def test_patterns_and_revision_reach_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = {}

    def download(name: str, **kwargs: object) -> str:
        asked.update(kwargs, name=name)
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert hub.resolve("org/name", allow_patterns=["vae/*"], revision="v1") == tmp_path
    assert asked == {"name": "org/name", "allow_patterns": ["vae/*"], "revision": "v1"}


def test_cache_folder_follows_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STITCHVM_CACHE", "/c/d")
    assert hub.cache_folder() == Path("/c/d")
    monkeypatch.delenv("STITCHVM_CACHE")
    monkeypatch.setenv("HF_HOME", "/h")
    assert hub.cache_folder() == Path("/h/stitchvm")
