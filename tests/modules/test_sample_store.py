"""The folder of samples: whole lines or none, one configuration, one sorted file in the end."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from stitchvm.modules.sample_store import SampleStore, differences, plain

GREY = np.full((2, 3, 3), 128, dtype=np.uint8)


def line(store: SampleStore, index: int, seed: int = 0, **more: Any) -> dict[str, Any]:
    name = f"{index:06d}_s{seed}"
    file = store.save_image(name, GREY)
    return {"index": index, "prompt": f"p{index}", "seed": seed, "file": file, **more}


@pytest.fixture
def store(tmp_path: Path) -> SampleStore:
    store = SampleStore(tmp_path / "deep" / "run")
    store.prepare(config={"model": {"seed": 0}})
    store.open(0, 1)
    return store


def test_images_and_lines(store: SampleStore) -> None:
    store.append(line(store, 1, score=float("nan"), array=np.float32(0.5)))
    store.append(line(store, 0))
    image = Image.open(store.images / "000001_s0.png")
    assert image.size == (3, 2) and (np.asarray(image) == 128).all()
    raw = store.merged.read_text().splitlines()
    assert json.loads(raw[0])["score"] is None and json.loads(raw[0])["array"] == 0.5
    assert list(store.read()) == [(0, 0), (1, 0)]
    assert not list(store.images.glob(".*"))


def test_files_of_several_devices_become_one(store: SampleStore, tmp_path: Path) -> None:
    store.append(line(store, 2))
    other = SampleStore(store.root)
    other.open(1, 2)
    other.append(line(store, 1, again=False))
    store.open(0, 2)
    store.append(line(store, 0))
    store.append(
        line(store, 2, again=True)
    )  # what a sampler repeats, to give all devices as many batches
    assert [p.name for p in sorted(store.root.glob("samples*"))] == [
        "samples.jsonl",
        "samples.rank0.jsonl",
        "samples.rank1.jsonl",
    ]
    merged = store.merge()
    assert [each["index"] for each in merged] == [0, 1, 2] and merged[2]["again"]
    assert [p.name for p in store.root.glob("samples*")] == ["samples.jsonl"]
    assert [json.loads(x)["index"] for x in store.merged.read_text().splitlines()] == [0, 1, 2]
    stamp = store.merged.stat().st_mtime_ns
    store.merge()
    assert store.merged.stat().st_mtime_ns == stamp, "a file in order is left alone"


def test_an_unfinished_line_is_dropped_and_cut_off(store: SampleStore) -> None:
    store.append(line(store, 0))
    whole = store.merged.read_bytes()
    for rest in (b'{"index": 1, "se', b"\0" * 20 + b"\n"):
        store.merged.write_bytes(whole + rest)
        assert list(store.read()) == [(0, 0)]
        assert store.notices == ["samples.jsonl: dropped an unfinished last line"]
        assert store.merged.read_bytes() == whole + rest, "reading changes nothing"
        store.prepare(config={"model": {"seed": 0}})
        assert store.merged.read_bytes() == whole
        assert list(store.read()) == [(0, 0)] and store.notices == []
    store.merged.write_bytes(b"rubbish\n" + whole)
    with pytest.raises(ValueError, match=r"line 1 of .* is not a sample"):
        store.read()


def test_a_line_without_its_images_does_not_count(store: SampleStore) -> None:
    store.append(line(store, 0, particles=[{"file": "images/gone.png"}]))
    store.append(line(store, 1))
    assert list(store.read()) == [(1, 0)]
    assert store.notices == ["1 samples have lost their image and are made again"]


def test_the_configuration_of_a_folder(store: SampleStore) -> None:
    now = {"model": {"seed": 1}}
    assert store.check(now) == [], "there is nothing yet that it could differ from"
    store.append(line(store, 0))
    assert store.check({"model": {"seed": 0}}) == []
    assert store.check(now) == ["model.seed: 0 → 1"]
    assert store.check({"a": 1}, "weights") == []
    store.prepare(config={"model": {"seed": 0}}, weights={"value": {"sha256": "x"}})
    assert store.check({"value": {"sha256": "y"}}, "weights") == ['value.sha256: "x" → "y"']
    store.prepare(config={"model": {"seed": 0}})
    assert json.loads(store.configuration.read_text())["weights"] == {"value": {"sha256": "x"}}


def test_erasing_leaves_what_is_not_its_own(store: SampleStore) -> None:
    store.append(line(store, 0))
    (store.root / "grid.png").write_bytes(b"")
    (store.root / "notes.txt").write_text("mine")
    theirs = ["images/best.png", "images/mine.jpg", "samples_best.jsonl"]
    for name in theirs:
        (store.root / name).write_text("{}")
    assert len(store.merge()) == 1
    store.erase()
    left = sorted(p.relative_to(store.root).as_posix() for p in store.root.rglob("*"))
    assert left == sorted(["images", "notes.txt", *theirs])


def test_differences_are_spelt_as_on_the_command_line() -> None:
    def sampler(cls: str, **arguments: Any) -> dict[str, Any]:
        return {"model": {"sampler": {"class_path": cls, "init_args": arguments}}}

    there = sampler("a.Plain", num_steps=40, shift=3.0)
    assert differences(there, sampler("a.Plain", num_steps=20, shift=3.0)) == [
        "model.sampler.num_steps: 40 → 20"
    ]
    assert differences(there, sampler("a.FK", num_steps=40)) == ["model.sampler: a.Plain → a.FK"]
    assert differences({"a": [1, 2]}, {"a": [1, 2], "b": None}) == []
    assert differences({"a": "x" * 100}, {"a": None})[0].endswith("... → null")


def test_what_does_not_change_samples_is_left_out() -> None:
    config = {
        "sampler": {"micro_batch": 4, "steps": (1, 2)},
        "list": [{"batch_size": 1, "a": 2.0}],
    }
    assert plain(config) == {"sampler": {"steps": [1, 2]}, "list": [{"a": 2.0}]}
