"""Folders of finished images in their three layouts, and GenEval's layout written from one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from stitchvm.data.geneval_layout import main, write_geneval
from stitchvm.data.sample_files import natural, read_folder
from stitchvm.data.samples import SampleDataset, SampleFolder
from tests.data.files import write_images
from tests.data.test_bad_images import spoil
from tests.data.test_prompts import METADATA


def line(index: int, seed: int = 0, **more: Any) -> dict[str, Any]:
    file = f"images/{index:06d}_s{seed}.png"
    return {"index": index, "prompt": f"prompt {index}", "seed": seed, "file": file, **more}


def write(root: Path, lines: list[dict[str, Any]], images: bool = True) -> Path:
    """Writes samples.jsonl; the image of line n is flat with grey level n."""
    root.mkdir(parents=True, exist_ok=True)
    (root / "samples.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in lines))
    if images:
        write_images(root, [entry["file"] for entry in lines])
    return root


def batches(root: Path, **arguments: Any) -> list[dict[str, Any]]:
    data = SampleFolder(str(root), **{"num_workers": 0, "batch_size": 2, **arguments})
    data.setup("test")
    return list(data.test_dataloader())


def test_samples_of_a_run(tmp_path: Path) -> None:
    lines = [line(2, seconds=0.5), line(0), line(1), line(0, seed=1)]
    write(tmp_path, lines)
    first, second = batches(tmp_path)
    assert set(first) == {"index", "pixels", "prompt", "file", "group", "seed"}
    assert first["pixels"].shape == (2, 3, 10, 12) and first["pixels"].dtype == torch.float32
    # in the order of prompts and seeds; `index` is the line, and so the grey level
    assert [*first["index"].tolist(), *second["index"].tolist()] == [1, 3, 2, 0]
    levels = torch.cat([first["pixels"], second["pixels"]]).mean(dim=(1, 2, 3)) * 255
    assert levels.tolist() == pytest.approx([1, 3, 2, 0], abs=1e-4)
    assert first["prompt"] == ["prompt 0", "prompt 0"] and second["group"].tolist() == [1, 2]
    assert first["seed"].tolist() == [0, 1] and second["file"][1] == lines[0]["file"]
    dataset = SampleDataset(tmp_path, read_folder(tmp_path))
    assert dataset.samples[3].line["seconds"] == 0.5


def test_the_later_of_two_lines_counts(tmp_path: Path) -> None:
    again = line(0) | {"file": "images/again.png"}
    write(tmp_path, [line(0), line(1), again])
    [batch] = batches(tmp_path)
    assert batch["file"] == ["images/again.png", line(1)["file"]]
    assert batch["index"].tolist() == [2, 1]


def test_metadata_go_along(tmp_path: Path) -> None:
    write(tmp_path, [line(0, metadata=METADATA[0]), line(1, metadata=METADATA[1])])
    [batch] = batches(tmp_path)
    assert batch["metadata"] == METADATA
    write(tmp_path, [line(0, metadata=METADATA[0]), line(1)])
    assert batches(tmp_path)[0]["metadata"] == [METADATA[0], None]


def test_a_line_cut_short_by_the_end_of_a_run_is_left_out(tmp_path: Path) -> None:
    write(tmp_path, [line(0), line(1)])
    path = tmp_path / "samples.jsonl"
    path.write_text(path.read_text()[:-20])
    with pytest.warns(UserWarning, match="last line of .* was cut short"):
        samples = read_folder(tmp_path)
    assert [sample.group for sample in samples] == [0]
    path.write_text(path.read_text() + "\n" + json.dumps(line(2)) + "\n")
    with pytest.raises(ValueError, match=r"line 2 of .* not valid JSON"):
        read_folder(tmp_path)


def test_a_run_on_several_devices_that_was_ended(tmp_path: Path) -> None:
    write(tmp_path, [line(0), line(1)])
    for rank, index in ((0, 2), (1, 1)):  # 1 was made again
        entry = line(index, rank=rank)
        (tmp_path / f"samples.rank{rank}.jsonl").write_text(json.dumps(entry) + "\n")
    write_images(tmp_path, [line(2)["file"]])
    samples = read_folder(tmp_path)
    assert [(s.group, s.number, s.line.get("rank")) for s in samples] == [
        (0, 0, None),
        (1, 3, 1),
        (2, 2, 0),
    ]
    (tmp_path / "samples.jsonl").unlink()
    assert [sample.group for sample in read_folder(tmp_path)] == [1, 2]


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([], "has no samples"),
        ([{"prompt": "x"}], "line 1 of .* expected 'index' with a whole number, got None"),
        (
            [line(0), line(1) | {"seed": "0"}],
            "line 2 of .* expected 'seed' with a whole number, got '0'",
        ),
        ([line(0), line(0, 1) | {"prompt": "y"}], "two prompts with the index 0: 'prompt 0' and"),
        ([line(0, metadata={"tag": "x"})], "'metadata' in line 1 of .* no key 'include'"),
    ],
)
def test_malformed_lists(tmp_path: Path, lines: list[Any], message: str) -> None:
    write(tmp_path, lines, images=False)
    with pytest.raises(ValueError, match=message):
        read_folder(tmp_path)


def test_missing_and_unreadable_images(tmp_path: Path) -> None:
    lines = [line(i) for i in range(10)]
    write(tmp_path, lines)
    (tmp_path / lines[3]["file"]).unlink()
    with pytest.raises(ValueError, match=r"1 of 10 images are missing .*000003_s0\.png"):
        batches(tmp_path)
    spoil(tmp_path / lines[5]["file"])
    with pytest.warns(UserWarning, match=r"unreadable image: .*000005_s0\.png"):
        got = batches(tmp_path, max_bad_fraction=0.2)
    # the next readable one stands in, under its own index
    assert [i for batch in got for i in batch["index"].tolist()] == [0, 1, 2, 4, 6, 6, 7, 8, 9]
    with pytest.warns(UserWarning), pytest.raises(ValueError, match="2 of 10 images are missing"):
        batches(tmp_path, max_bad_fraction=0.1)


def test_sizes(tmp_path: Path) -> None:
    write(tmp_path, [line(0), line(1)])
    write_images(tmp_path, [line(1)["file"]], size=(20, 16))
    with pytest.raises(
        ValueError, match=r"000000_s0\.png has \(10, 12\) and .* \(16, 20\) pixels"
    ):
        batches(tmp_path)
    assert [b["pixels"].shape[2:] for b in batches(tmp_path, batch_size=1)] == [(10, 12), (16, 20)]
    assert batches(tmp_path, resolution=8)[0]["pixels"].shape == (2, 3, 8, 8)


def write_layout(root: Path) -> None:
    for n, entry in enumerate(METADATA):
        folder = root / f"{n:05d}"
        write_images(folder / "samples", [f"{k:04d}.png" for k in range(3)])
        (folder / "metadata.jsonl").write_text(json.dumps(entry))
    (root / "00000" / "grid.png").write_bytes(b"not a sample")
    (root / "00000" / "samples" / "notes.png").write_bytes(b"neither")
    (root / "notes").mkdir()


def test_genevals_layout(tmp_path: Path) -> None:
    write_layout(tmp_path)
    got = batches(tmp_path, batch_size=6)[0]
    assert got["index"].tolist() == list(range(6)) and got["group"].tolist() == [0, 0, 0, 1, 1, 1]
    assert got["seed"].tolist() == [0, 1, 2] * 2
    assert got["metadata"] == [METADATA[0]] * 3 + [METADATA[1]] * 3
    assert got["prompt"][5] == METADATA[1]["prompt"] and got["file"][5] == "00001/samples/0002.png"
    (tmp_path / "00002" / "samples").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"00002 has no metadata\.jsonl"):
        read_folder(tmp_path)
    (tmp_path / "00002" / "metadata.jsonl").write_text(json.dumps(METADATA[0]))
    with pytest.raises(ValueError, match=r"1 of 7 images are missing .*00002.samples.0000\.png"):
        batches(tmp_path)


def test_plain_folders(tmp_path: Path) -> None:
    root = tmp_path / "images"
    names = ["1.png", "2.png", "10.png", "b/3.png"]
    write_images(root, names)
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("one\ntwo\nten\nthree\n")
    got = batches(root, prompts=str(prompts), batch_size=4)[0]
    assert list(zip(got["file"], got["prompt"], strict=True)) == list(
        zip(names, ["one", "two", "ten", "three"], strict=True)
    )
    assert "prompt" not in batches(root)[0]
    prompts.write_text("one\ntwo\n")
    with pytest.raises(ValueError, match=r"4 images but .* 2 prompts: .* first is 1\.png"):
        batches(root, prompts=str(prompts))
    assert sorted(["a10", "a9", "b1", "10", "9"], key=natural) == ["9", "10", "a9", "a10", "b1"]


def test_wrong_folders(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no folder .*absent"):
        read_folder(tmp_path / "absent")
    with pytest.raises(ValueError, match=r"has no images, no samples\.jsonl and no NNNNN"):
        read_folder(tmp_path)
    write(tmp_path, [line(0)])
    with pytest.raises(ValueError, match=r"has its prompts in samples\.jsonl, but a file"):
        read_folder(tmp_path, prompts="p.txt")


def test_written_for_the_official_evaluator(tmp_path: Path, capsys: Any) -> None:
    run = tmp_path / "run"
    lines = [
        line(i, seed, metadata=METADATA[i], prompt=METADATA[i]["prompt"])
        for seed in (7, 3)
        for i in (1, 0)
    ]
    lines[3]["file"] = "images/other.jpg"
    write(run, lines)
    main([str(run), str(tmp_path / "out")])
    assert "wrote 4 images" in capsys.readouterr().out
    back = read_folder(tmp_path / "out")
    assert [(s.group, s.seed, s.metadata) for s in back] == [
        (i, k, METADATA[i]) for i in (0, 1) for k in (0, 1)
    ]
    for sample, level in zip(back, (3, 1, 2, 0), strict=True):  # seeds in order: 3, then 7
        with Image.open(tmp_path / "out" / sample.file) as image:
            assert image.format == "PNG" and image.getpixel((0, 0)) == (level,) * 3
    with pytest.raises(FileExistsError, match="out is there already"):
        write_geneval(run, tmp_path / "out")
    (run / lines[0]["file"]).unlink()
    with pytest.raises(ValueError, match=r"1 images are missing .*000001_s7\.png"):
        write_geneval(run, tmp_path / "out2")
    write(run, [line(0)])
    with pytest.raises(ValueError, match=r"1 of 1 samples .* no GenEval metadata"):
        write_geneval(run, tmp_path / "out2")
