"""The page of GPU timings says what results/h200 holds."""

from __future__ import annotations

from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(autouse=True)
def path(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    monkeypatch.chdir(BENCHMARKS.parent)


def test_the_page_and_the_readme_are_in_step_with_the_results():
    import page_gpu

    page = page_gpu.PAGE.read_text(encoding="utf-8")
    for name, body in page_gpu.sections().items():
        assert f"\n{body}\n" in page, f"{name}: run `python benchmarks/readme.py`"
    assert f"\n{page_gpu.summary()}\n" in Path("README.md").read_text(encoding="utf-8")


def test_a_row_has_what_was_timed_as_it_stands_and_compiled():
    from page_gpu import times

    one = {"part": "a", "what": "sd35m_512: batch 32, K = 1", "per": "micro-batch", "tflop": 50.0}
    timed = {"seconds": 0.4, "utilisation": 0.25, "peak_memory_gib": 20.04}
    quick = {"seconds": 0.2, "utilisation": 0.5, "peak_memory_gib": 10.0}
    other = {"part": "c", "what": "sd35m: NFT stitched, inductor", "per": "update", "tflop": 5e4}
    lost = {"part": "d", "what": "sd35m: NFT terminal", "per": "update", "error": "out of memory"}
    rows = [
        one | timed,
        one | quick | {"what": f"{one['what']}, compiled"},
        other | quick | {"seconds": 1234.5},
        lost,
    ]
    lines = times(rows).splitlines()[2:]
    assert lines == [
        "| batch 32, K = 1, 512²: micro-batch | 50 | 0.4 | 25% | 20.0 | 0.2 | 50% | 10.0 |",
        "| NFT stitched, 512²: update | 50,000 | – | – | – | 1,234 | 50% | 10.0 |",
    ]
