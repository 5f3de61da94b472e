"""Data sets: the layouts that the readers take are ok, and what lacks a list or its images is missing."""

from __future__ import annotations

import shutil

import pytest

from stitchvm.data import preference, retrieval
from stitchvm.data.ava import AVA, ava_test_data, ava_training_files
from stitchvm.data.hpdv2 import HPDv2, hpdv2_test_data, hpdv2_training_files
from stitchvm.data.images import ConcatImages, ImageFolder
from stitchvm.data.preference import imagereward_test_data
from stitchvm.data.sample_files import read_folder
from stitchvm.preflight.data import CHECKS, LAYOUTS, check_images, check_layout, check_prompts
from tests.data import files

READERS = {
    "ava": ("AVA", lambda root: ava_training_files(root, True)),
    "ava_test": ("AVA", lambda root: ava_test_data(root, 8)),
    "hpdv2_train": ("HPDv2", hpdv2_training_files),
    "hpdv2_test": ("HPDv2", lambda root: hpdv2_test_data(root, 8)),
    "imagereward": ("ImageReward", lambda root: imagereward_test_data(root, 8)),
    "coco": ("coco", lambda root: retrieval.Retrieval(coco=root).test_data()),
    "flickr30k": ("flickr30k", lambda root: retrieval.Retrieval(flickr30k=root).test_data()),
}


@pytest.fixture
def root(tmp_path):
    files.write_ava(tmp_path / "AVA", range(1, 9), range(1, 3))
    files.write_hpdv2(tmp_path / "HPDv2")
    files.write_imagereward(tmp_path / "ImageReward")
    files.write_coco(tmp_path / "coco")
    files.write_flickr30k(tmp_path / "flickr30k")
    return tmp_path


def test_every_layout_has_a_reader():
    assert READERS.keys() == LAYOUTS.keys()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_the_reader_takes_is_ok_and_what_it_refuses_is_not(root, layout):
    """Each alternative, and the folder without its list, without its images, and not there at all."""
    name, read = READERS[layout]
    folder, (lists, folders, _) = root / name, LAYOUTS[layout]
    read(str(folder))
    assert check_layout("data", str(folder), layout).state == "ok"
    images = next(f for f in folders if (folder / f).is_dir())
    for alternative in folders:
        if alternative not in ("", images):
            (folder / alternative).parent.mkdir(exist_ok=True)
            (folder / images).rename(folder / alternative)
            read(str(folder))
            assert check_layout("data", str(folder), layout).state == "ok", alternative
            (folder / alternative).rename(folder / images)
    for names in lists:
        there = next(n for n in names if (folder / n).is_file())
        (folder / there).rename(root / "aside")
        with pytest.raises(ValueError, match=there.rpartition("/")[2].partition(".")[0]):
            read(str(folder))
        finding = check_layout("data", str(folder), layout)
        assert finding.state == "missing" and there in finding.detail
        (root / "aside").rename(folder / there)
    shutil.rmtree(folder / images)
    with pytest.raises(ValueError):
        read(str(folder))
    assert check_layout("data", str(folder), layout).state == "missing"
    shutil.rmtree(folder)
    assert check_layout("data", str(folder), layout).detail == "no such folder"


def test_alternatives_are_the_readers_own():
    assert LAYOUTS["coco"][1] == tuple(retrieval.COCO_FOLDERS)
    assert LAYOUTS["flickr30k"][1] == tuple(retrieval.FLICKR_FOLDERS)
    assert preference.imagereward_test_data is imagereward_test_data


def test_folders_of_images(root, tmp_path):
    assert check_images("data", str(root / "AVA")).state == "ok"
    (root / "AVA" / "AVA_test.csv").unlink()
    assert "AVA_test.csv" in check_images("data", str(root / "AVA")).detail
    assert check_images("data", str(root / "AVA"), exclude_test=False).state == "ok"
    plain = tmp_path / "plain"
    assert check_images("data", str(plain)).detail == "no such folder"
    plain.mkdir()
    assert check_images("data", str(plain)).detail == "no images below it"
    files.write_folder(plain)
    assert check_images("data", str(plain)).state == "ok"


def state_of(kind, **arguments):
    (finding,) = CHECKS[kind]("data", {k: str(v) for k, v in arguments.items()})
    return finding.state


@pytest.mark.parametrize("kind", [AVA, HPDv2, ImageFolder])
@pytest.mark.parametrize("name", ["AVA", "HPDv2", "plain"])
def test_a_folder_is_looked_at_as_the_class_reads_it(root, kind, name):
    """Whatever it is called, and whatever else lies in it."""
    files.write_folder(root / "plain")
    at = root / name
    for called in (name, "mine"):
        at = at.rename(root / called)
        try:
            kind(str(at), val_size=1).fit_data()
            expected = "ok"
        except ValueError:
            expected = "missing"
        assert state_of(kind.__name__, root=at) == expected, called


def test_images_are_found_where_a_run_finds_them(root, tmp_path):
    """Behind links, not among hidden files, and not behind a ~ that nobody resolves."""
    linked, hidden = tmp_path / "linked", tmp_path / "hidden"
    for folder in (linked, hidden / ".cache"):
        folder.mkdir(parents=True)
    files.write_folder(tmp_path / "plain")
    (linked / "more").symlink_to(tmp_path / "plain", target_is_directory=True)
    next(p for p in (tmp_path / "plain").rglob("*") if p.is_file()).rename(hidden / "._0.jpg")
    ConcatImages([str(linked)], val_size=1).fit_data()
    assert check_images("data", str(linked)).state == "ok"
    for folder in (str(hidden), "~"):
        with pytest.raises(ValueError):
            ConcatImages([folder]).fit_data()
        assert check_images("data", folder).state == "missing"


def test_samples_in_every_layout_that_a_run_reads(root, tmp_path):
    at = tmp_path / "samples"
    assert state_of("SampleFolder", root=at) == "missing"
    files.write_folder(at)
    number = len(read_folder(at))
    assert state_of("SampleFolder", root=at) == "ok"
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a cat\n" * number)
    assert state_of("SampleFolder", root=at, prompts=prompts) == "ok"
    prompts.write_text("a cat\n" * (number + 1))
    assert state_of("SampleFolder", root=at, prompts=prompts) == "wrong"
    (at / "samples.jsonl").write_text('{"index": 0}\n\n')
    assert state_of("SampleFolder", root=at) == "wrong"


def test_prompts(tmp_path):
    path = tmp_path / "prompts.txt"
    assert check_prompts("data.path", str(path)).state == "missing"
    path.write_text("a cat\na dog\n")
    finding = check_prompts("data.path", str(path))
    assert finding.state == "ok" and finding.what.endswith("(2 prompts)")
    path.write_text("a cat\na dog\n\na cat\n")  # a run samples two
    assert check_prompts("data.path", str(path)).what.endswith("(3 prompts, 2 different)")
    broken = tmp_path / "prompts.jsonl"
    broken.write_text('{"prompt": "a cat"}\n{"text": "a dog"}\n')
    finding = check_prompts("data.path", str(broken))
    assert finding.state == "wrong" and "'prompt'" in finding.detail
