"""The measured table in the card of a tested value model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from stitchvm.modules.card import measured_card, write_measured
from stitchvm.results import weights_of
from stitchvm.value_model import model_card
from tests.modules.evaluation_runs import Data, NoisyFactory, run

CONFIG = {
    "stitch_point": [4, 1],
    "stitchvm_version": "0",
    "backbone": {"class_path": "a.B", "init_args": {"path": "world:sd3"}},
    "reward": {"class_path": "c.D", "init_args": {}},
}


def records(value: float, estimator: str = "stitched") -> list[dict]:
    one = {"metric": "aesthetic/srcc", "stderr": 0.01, "n": 40}
    return [
        one | {"estimator": "clean", "sigma": None, "value": 0.95},
        one | {"estimator": estimator, "sigma": 0.1, "value": value},
        one | {"estimator": "tweedie", "sigma": 0.1, "value": 0.123},
    ]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "value").mkdir()
    (tmp_path / "value" / "config.json").write_text(json.dumps(CONFIG))
    (tmp_path / "value" / "model.safetensors").write_bytes(b"weights")
    (tmp_path / "value" / "README.md").write_text(model_card(CONFIG))
    return tmp_path / "value"


def test_parts_are_kept_by_data_set_and_replaced() -> None:
    plain = model_card(CONFIG)
    one = measured_card(plain, "WorldAesthetic", "stitched", records(0.9))
    assert one.startswith(plain.rstrip()) and "0.900 ± 0.010" in one and "0.123" not in one
    two = measured_card(one, "AVA", "stitched", records(0.8))
    assert "0.900" in two and "0.800" in two
    three = measured_card(two, "WorldAesthetic", "stitched", records(0.7))
    assert "0.900" not in three and "0.700" in three and "0.800" in three
    assert three.count("### WorldAesthetic") == three.count("### AVA") == 1
    assert three.count("\n## Measured\n") == 1
    given = measured_card(model_card(CONFIG, "a table"), "AVA", "stitched", records(0.6))
    assert "a table" in given and "0.600" in given


def test_several_benchmarks_of_one_data_set_have_rows_of_their_own() -> None:
    """COCO and Flickr30K in one test, as Table 5 has them: the same metrics and noise levels."""
    both = [r | {"benchmark": name} for name in ("coco", "flickr30k") for r in records(0.9)]
    both[-2]["value"] = 0.6
    card = measured_card(model_card(CONFIG), "Retrieval", "stitched", both)
    rows = [line for line in card.splitlines() if "stitched" in line and "|" in line]
    assert ["coco" in row for row in rows] == [True, False] and "flickr30k" in rows[1]
    assert "0.900" in rows[0] and "0.600" in rows[1]
    assert "\n40 samples a number" in card
    both[1]["n"] = 25  # images of one, captions of the other
    card = measured_card(model_card(CONFIG), "Retrieval", "stitched", both)
    assert "\n25 to 40 samples a number" in card


def test_only_local_folders_with_a_card_are_written_to(folder: Path) -> None:
    before = (folder / "README.md").read_text()
    assert write_measured("world:sd3", "x", "stitched", records(0.5)) is None
    assert write_measured("org/name", "x", "stitched", records(0.5)) is None
    assert write_measured(str(folder.parent), "x", "stitched", records(0.5)) is None
    assert (folder / "README.md").read_text() == before
    digest = weights_of(str(folder))
    assert write_measured(str(folder), "x", "stitched", records(0.5)) == folder / "README.md"
    assert "0.500" in (folder / "README.md").read_text()
    assert weights_of(str(folder)) == digest  # what was tested is still what was tested
    assert sorted(p.name for p in folder.iterdir()) == [
        "README.md",
        "config.json",
        "model.safetensors",
    ]


def test_a_test_leaves_its_table_in_the_card(folder: Path, tmp_path: Path, capsys) -> None:
    factory = NoisyFactory()
    factory.sources = lambda: {"value_model": str(folder)}
    plain = (folder / "README.md").read_text()
    run(tmp_path / "a", Data("aesthetic"), {"mine": factory}, write_cards=False)
    assert (folder / "README.md").read_text() == plain
    module = run(tmp_path / "b", Data("aesthetic"), {"mine": factory})
    card = (folder / "README.md").read_text()
    assert card.startswith(plain.rstrip()) and "### Data" in card
    found = {r["sigma"]: r["value"] for r in module.records if r["metric"] == "aesthetic/srcc"}
    assert f"{found[0.1]:.3f}" in card and f"{found[None]:.3f}" in card
    assert f"wrote {folder / 'README.md'}" in capsys.readouterr().out
