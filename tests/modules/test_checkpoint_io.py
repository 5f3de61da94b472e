"""Checkpoint files: what is written comes back, in one piece, and without a copy in memory."""

from __future__ import annotations

import tracemalloc
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO

from stitchvm.modules.checkpoint_io import LeanCheckpointIO

MEBIBYTE = 2**20


def checkpoint(seed: int, n: int = 1000) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(n, generator=generator)
    return {
        "state_dict": {"w": w},
        "optimizer_states": [{"state": {0: {"m": w * 2}}}],
        "step": seed,
    }


def same(a: dict[str, Any], b: dict[str, Any]) -> bool:
    return (
        torch.equal(a["state_dict"]["w"], b["state_dict"]["w"])
        and torch.equal(
            a["optimizer_states"][0]["state"][0]["m"], b["optimizer_states"][0]["state"][0]["m"]
        )
        and a["step"] == b["step"]
    )


def test_what_is_written_comes_back_and_is_a_file_of_lightning_s_own(tmp_path: Path) -> None:
    path = tmp_path / "new" / "last.ckpt"
    LeanCheckpointIO().save_checkpoint(checkpoint(1), path)
    assert same(LeanCheckpointIO().load_checkpoint(path, weights_only=True), checkpoint(1))
    assert same(TorchCheckpointIO().load_checkpoint(path, weights_only=True), checkpoint(1))
    assert [p.name for p in path.parent.iterdir()] == ["last.ckpt"]


def test_a_checkpoint_of_lightning_s_own_is_read(tmp_path: Path) -> None:
    TorchCheckpointIO().save_checkpoint(checkpoint(2), tmp_path / "a.ckpt")
    assert same(LeanCheckpointIO().load_checkpoint(tmp_path / "a.ckpt"), checkpoint(2))
    torch.save(checkpoint(3), tmp_path / "old.ckpt", _use_new_zipfile_serialization=False)
    assert same(LeanCheckpointIO().load_checkpoint(tmp_path / "old.ckpt"), checkpoint(3))


def test_saving_takes_no_memory_of_the_checkpoint_s_size(tmp_path: Path) -> None:
    made = checkpoint(1, n=4 * MEBIBYTE)  # 32 MiB in two tensors

    def peak(io: TorchCheckpointIO) -> float:
        tracemalloc.start()
        io.save_checkpoint(made, tmp_path / "a.ckpt")
        result = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return result / MEBIBYTE

    assert peak(LeanCheckpointIO()) < 2
    assert peak(TorchCheckpointIO()) >= 32


def test_what_was_read_stays_when_the_file_is_replaced_removed_or_changed_in_memory(
    tmp_path: Path,
) -> None:
    io, path = LeanCheckpointIO(), tmp_path / "last.ckpt"
    io.save_checkpoint(checkpoint(1), path)
    read = io.load_checkpoint(path)
    io.save_checkpoint(checkpoint(2), path)
    assert same(read, checkpoint(1))
    again = io.load_checkpoint(path)
    again["state_dict"]["w"].zero_()
    assert same(io.load_checkpoint(path), checkpoint(2))
    io.remove_checkpoint(path)
    assert not path.exists()
    assert same(read, checkpoint(1))


def test_a_save_that_fails_leaves_the_file_before_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    io, path = LeanCheckpointIO(), tmp_path / "last.ckpt"
    io.save_checkpoint(checkpoint(1), path)

    def half(made: Any, file: Path) -> None:
        file.write_bytes(b"half")
        raise OSError("no space left on device")

    monkeypatch.setattr(torch, "save", half)
    with pytest.raises(OSError, match="no space"):
        io.save_checkpoint(checkpoint(2), path)
    assert same(io.load_checkpoint(path), checkpoint(1))
    assert [p.name for p in tmp_path.iterdir()] == ["last.ckpt"]


def test_what_a_killed_process_has_left_is_removed(tmp_path: Path) -> None:
    names = (".a[1].ckpt.123.part", ".other.ckpt.123.part", "a[1].ckpt.123.part")
    for name in names:
        (tmp_path / name).write_bytes(b"half")
    LeanCheckpointIO().save_checkpoint(checkpoint(1), tmp_path / "a[1].ckpt")
    assert {p.name for p in tmp_path.iterdir()} == {"a[1].ckpt", *names[1:]}


def test_other_file_systems_go_lightning_s_way() -> None:
    io, path = LeanCheckpointIO(), "memory://run/last.ckpt"
    io.save_checkpoint(checkpoint(4), path)
    assert fsspec.filesystem("memory").exists("/run/last.ckpt")
    assert same(io.load_checkpoint(path), checkpoint(4))


def test_a_path_without_a_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nothing\.ckpt"):
        LeanCheckpointIO().load_checkpoint(tmp_path / "nothing.ckpt")


def test_what_is_no_checkpoint_or_half_of_one_is_said_without_a_trace(tmp_path: Path) -> None:
    torch.save(checkpoint(5), tmp_path / "whole.ckpt")
    whole = (tmp_path / "whole.ckpt").read_bytes()
    for content in (b"", b"# a text", whole[:-50]):
        (tmp_path / "bad.ckpt").write_bytes(content)
        with pytest.raises(ValueError, match=rf"bad\.ckpt is not a .* \({len(content)} bytes\)"):
            LeanCheckpointIO().load_checkpoint(tmp_path / "bad.ckpt")
