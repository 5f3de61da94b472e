"""Tables from records: the paper's layout, order, alignment, errors."""

from __future__ import annotations

import pytest

from stitchvm.modules.report import print_rich
from stitchvm.tables import pivot, records_to_markdown, records_to_text


def records() -> list[dict]:
    return [
        {"metric": m, "estimator": e, "sigma": s, "value": v, "stderr": 0.01, "n": 9}
        for m, e, s, v in (
            ("r1", "tweedie", 0.5, 0.25),
            ("r1", "tweedie", 0.1, 0.75),
            ("r1", "stitched", 0.1, 0.8),
            ("r1", "clean", None, 0.9),
            ("r5", "stitched", 0.5, None),
        )
    ]


def test_markdown_has_estimator_rows_and_noise_columns() -> None:
    assert records_to_markdown(records(), digits=2).splitlines() == [
        "| metric | estimator | clean | σ = 0.1 | σ = 0.5 |",
        "| ------ | --------- | ----: | ------: | ------: |",
        "| r1     | clean     |  0.90 |         |         |",
        "| r1     | stitched  |       |    0.80 |         |",
        "| r1     | tweedie   |       |    0.75 |    0.25 |",
        "| r5     | stitched  |       |         |       – |",
    ]


def test_text_groups_rows_and_shows_errors() -> None:
    lines = records_to_text(records(), digits=2, stderr=True).splitlines()
    assert lines[0].split() == ["metric", "estimator", "clean", "σ", "=", "0.1", "σ", "=", "0.5"]
    assert lines[4].split() == ["tweedie", "0.75", "±", "0.01", "0.25", "±", "0.01"]
    assert lines[5] == "" and lines[6].startswith("r5")
    assert len({line.index("clean") for line in lines if "clean" in line}) == 2


def test_several_benchmarks_get_a_column() -> None:
    both = [r | {"benchmark": name} for name in ("coco", "flickr") for r in records()[:2]]
    table = pivot(both)
    assert table.header[:3] == ["benchmark", "metric", "estimator"]
    assert [row[0] for row in table.rows] == ["coco", "flickr"]
    assert pivot(both[:2]).header[0] == "metric"


def test_flat_tables_have_one_row_per_record() -> None:
    rows = [
        {"method": "fk", "seed": 1, "seconds": 2.5},
        {"method": "dps", "seed": 2, "seconds": 3.0},
    ]
    table = pivot(rows, rows=("method", "seed", "seconds"), column=None, digits=1)
    assert table.rows == [["fk", "1", "2.5"], ["dps", "2", "3.0"]]
    assert table.keys == 1


def test_two_numbers_for_one_cell_are_an_error() -> None:
    with pytest.raises(ValueError, match=r"metric=r1, estimator=tweedie, sigma=0\.5"):
        records_to_markdown([*records(), records()[0]])
    with pytest.raises(ValueError, match="nothing to tabulate"):
        records_to_markdown([{"other": 1}])


def test_rich_prints_the_same_cells(capsys) -> None:
    pytest.importorskip("rich")
    print_rich(pivot(records()))
    out = capsys.readouterr().out
    assert "0.750" in out and "σ = 0.1" in out and "stitched" in out
