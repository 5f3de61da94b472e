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


def test_calls_of_a_value_with_and_without_a_graph_share_a_row():
    from page_gpu import calls

    def one(graph, gradient, seconds, size=1, **more):
        name = f"stitched{', CUDA graph' * graph}"
        record = {"setup": "sd35m_512", "value": name, "cuda_graph": graph, "gradient": gradient}
        return record | {"batch_size": size, "seconds": seconds, "peak_memory_gib": 7.04} | more

    records = [one(False, False, 0.01), one(False, True, 0.0303), one(True, True, 0.02)]
    lost = one(False, False, 0.01, 8)
    del lost["seconds"]
    other = one(False, False, 0.1) | {"value": "Tweedie, null"}
    assert calls([*records, lost, other]).splitlines()[2:] == [
        "| stitched, 512² | 1 | 10 | 30.3 | 7.0 | – | 20 | 7.0 |",
        "| Tweedie, null, 512² | 1 | 100 | – | – | – | – | – |",
    ]


def test_what_parts_share_stands_once():
    from gpu_report import ratios
    from page_gpu import of_parts, times

    plain = {"part": "a", "what": "sd35m_1024: plain", "per": "image", "tflop": 1.0}
    plain |= {"seconds": 8.0, "utilisation": 0.5, "peak_memory_gib": 7.0}
    assert times([plain, plain | {"seconds": 9.0}]).splitlines()[2:] == [
        "| plain, 1024²: image | 1 | 8 | 50% | 7.0 | – | – | – |"
    ]
    change = {"what": "sd35m_1024: denoiser", "change": "a -> b", "speed_up": 2.0}
    change |= {"before": 0.2, "after": 0.1}
    rows = of_parts([change, change | {"before": 0.3}, change | {"what": "sd35m_1024: plain"}])
    assert rows.splitlines()[2:] == ["| denoiser | a -> b | 200 | 100 | 2.00 |"]
    ran = {"benchmark": "sampling", "method": "plain", "variant": "plain", "setup": "sd35m_1024"}
    ran |= {"seconds": 2.0, "flops": 1.0, "value_estimator": None, "peak_memory_gib": 1.0}
    found = ratios({"one": [ran], "two": [ran | {"seconds": 4.0}]}, 1.0)
    assert [(r["ratio"], r["value"]) for r in found] == [("roll-out: utilisation", 0.5)]
