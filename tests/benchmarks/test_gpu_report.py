"""The report of the GPU benchmarks, by hand-made records: rows, ratios with aims, before and after."""

from __future__ import annotations

from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
RATE = 100e12


@pytest.fixture(autouse=True)
def path(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))


def by_hand():
    """Records as the benchmarks write them, in numbers that can be followed."""
    about = {"device": "cuda"}
    stage_2 = about | {"benchmark": "distillation", "setup": "sd35m_512", "compile": False}
    stage_2 |= {"noise_levels": 1, "cached_latents": False, "batch_size": 32, "flops": 3e12}
    guided = about | {"benchmark": "sampling", "setup": "sd35m_1024", "compile": None}
    guided |= {"steps": 100, "particles": 1, "proposals": 1, "checkpointing": "no"}
    tuned = about | {"benchmark": "sampling", "setup": "sd35m_1024", "tuning": "denoiser"}
    trained = about | {"benchmark": "training", "setup": "sd35m", "method": "NFT", "samples": 1000}
    one_call = about | {"benchmark": "value", "setup": "sd35m_1024", "value": "stitched"}
    return {
        "rate": [
            about | {"benchmark": "rate", "dtype": "bfloat16", "size": 10, "flops_per_s": RATE}
            | {"seconds": 2000 / RATE},
            about | {"benchmark": "rate", "dtype": "float64", "size": 10, "flops_per_s": 9e15}
            | {"seconds": 2000 / 9e15},
        ],
        "distillation_512": [
            stage_2 | {"part": "vae", "variant": "batch 32, K = 1", "seconds": 1.0},
            stage_2 | {"part": "data", "images_per_second": 9.0},
            stage_2 | {"variant": "batch 32, K = 1", "seconds": 1.6, "images_per_second": 20.0}
            | {"latents_per_second": 20.0, "peak_memory_gib": 30.0}
            | {"hours": 6.0, "hours_same_latents": 6.0, "matmul_flops_per_s": 0.9 * RATE},
            stage_2 | {"variant": "batch 32, K = 4, cached latents", "cached_latents": True}
            | {"noise_levels": 4, "seconds": 3.2, "images_per_second": 10.0, "flops": 8e12}
            | {"latents_per_second": 40.0, "peak_memory_gib": 60.0}
            | {"hours": 16.0, "hours_same_latents": 4.0, "matmul_flops_per_s": 0.9 * RATE},
            about | {"benchmark": "distillation", "setup": "sd35m_512"}
            | {"variant": "batch 64, K = 1", "error": "out of memory"},
        ],
        "guidance": [
            tuned | {"choice": "attention auto", "seconds": 0.2},
            tuned | {"choice": "attention cudnn", "seconds": 0.1},
            guided | {"variant": "plain", "method": "plain", "value_estimator": None}
            | {"seconds": 10.0, "flops": 600e12, "peak_memory_gib": 8.0, "working_gib": 2.0},
            guided | {"variant": "DPS tweedie, cfg", "method": "dps", "value_estimator": "tweedie"}
            | {"seconds": 44.0, "flops": 2000e12, "peak_memory_gib": 50.0, "working_gib": 40.0},
            guided | {"variant": "DPS stitched", "method": "dps", "value_estimator": "stitched"}
            | {"seconds": 11.0, "flops": 700e12, "peak_memory_gib": 15.0, "working_gib": 5.0},
            guided | {"variant": "DPS tweedie, null", "method": "dps", "error": "out of memory"}
            | {"value_estimator": "tweedie", "flops": 1800e12},
        ],
        "guidance_compiled": [
            guided | {"variant": "plain", "method": "plain", "value_estimator": None}
            | {"seconds": 8.0, "flops": 600e12, "peak_memory_gib": 8.0, "working_gib": 2.0}
            | {"compile": "inductor"},
        ],
        "training_nft": [
            trained | {"variant": f"NFT {value}", "value_estimator": value, "flops": flops}
            | {"seconds": seconds, "seconds_rollout": rollout, "flops_rollout": 65e12}
            | {"peak_memory_gib": 40.0, "rough_flops": 1.0, "forwards": 1.0, "passes": 1.0}
            for value, flops, seconds, rollout in (
                ("terminal", 300e12, 6000.0, 1000.0),
                ("stitched", 200e12, 4000.0, 1625.0),
            )
        ],
        "search": [
            about | {"benchmark": "search", "setup": "sd35m_512", "part": part, "seconds": s}
            | {"flops": flops, "variant": "24 x 4 cells", "peak_memory_gib": 12.0}
            for part, s, flops in (
                ("encode", 2.0, None),
                ("backbone", 5.0, 200e12),
                ("gram", 1.0, 50e12),
                ("total", 8.0, None),
            )
        ]
        + [about | {"benchmark": "search", "setup": "sd35m_512", "part": "ratio", "ratio": 1.1}
           | {"matmul_flops_per_s": {"bfloat16": 9e15}}],
        "values": [
            one_call | {"variant": f"stitched, batch {n}", "batch_size": n, "gradient": False}
            | {"seconds": s, "flops": n * 1e12, "peak_memory_gib": 6.0}
            for n, s in ((1, 0.04), (8, 0.16))
        ],
        "compile": [
            about | {"benchmark": "compile", "setup": "sd35m_1024", "part": "prefix"}
            | {"form": form, "seconds": s, "backward_seconds": 2 * s}
            for form, s in (("eager", 0.3), ("whole", 0.2))
        ]
        + [about | {"benchmark": "compile", "form": "per block", "part": "all", "error": "broken"}],
        "profile_guidance": [
            about
            | {"benchmark": "profile", "operator": "all", "variant": "DPS"}
            | {"device_seconds": 0.3, "seconds": 0.4, "profiled_seconds": 0.6}
        ],
    }  # fmt: skip


def test_rows_by_hand():
    from gpu_report import rate_of, rows

    results = by_hand()
    assert rate_of(results) == RATE  # of bfloat16 alone, the most of them
    found = {row["what"]: row for row in rows(results, RATE)}
    shipped = found["sd35m_512: batch 32, K = 1"]
    assert shipped["tflop"] == 96 and shipped["floor_seconds"] == pytest.approx(0.96)
    assert shipped["utilisation"] == pytest.approx(0.6) and shipped["per"] == "micro-batch"
    plain = found["sd35m_1024: plain"]
    assert (plain["seconds"], plain["peak_memory_gib"], plain["per"]) == (
        10,
        8,
        "image, 100 steps",
    )
    assert plain["utilisation"] == pytest.approx(0.6)
    assert found["sd35m_1024: plain, inductor"]["utilisation"] == pytest.approx(0.75)
    failed = found["sd35m_1024: DPS tweedie, null"]
    assert (
        failed["error"] == "out of memory" and failed["seconds"] is failed["utilisation"] is None
    )
    assert failed["floor_seconds"] == 18
    # 48 prompts in groups of 24
    update = found["sd35m: NFT terminal"]
    assert update["per"] == "update of 1152" and update["seconds"] == pytest.approx(6 * 1152)
    assert update["utilisation"] == pytest.approx(0.5)
    search = found["stage 1, 24 x 4 cells"]
    assert search["seconds"] == 6 and search["floor_seconds"] == pytest.approx(2.5)
    value = found["sd35m_1024: stitched, batch 8"]
    assert value["per"] == "call" and value["utilisation"] == pytest.approx(0.5)
    assert found["matrix product, bfloat16, 10"]["utilisation"] == pytest.approx(1)
    assert found["sd35m_512: batch 64, K = 1"]["error"] == "out of memory"
    assert len(found) == 15


def test_ratios_by_hand():
    from gpu_report import ratios

    found = {(r["ratio"], r["of"]): r for r in ratios(by_hand(), RATE)}

    def of(ratio, what):
        record = found.pop((ratio, what))
        return pytest.approx(record["value"]), record["aim"], record["met"]

    shipped, cached = (f"sd35m_512: batch 32, K = {k}" for k in ("1", "4, cached latents"))
    assert of("distillation uncompiled: utilisation", shipped) == (0.6, ">= 0.5", True)
    assert of("distillation at its best: utilisation", cached) == (0.8, ">= 0.5", True)
    assert of("distillation uncompiled: GPU-hours", shipped) == (6, "<= 5", False)
    least = "distillation at its best: GPU-hours, same latents"
    assert of(least, cached) == (4, "<= 5", True)
    rolled = "roll-out: utilisation"
    assert of(rolled, "sd35m_1024: plain") == (0.6, ">= 0.5", True)
    assert of(rolled, "sd35m_1024: plain, inductor") == (0.75, ">= 0.5", True)
    assert of(rolled, "sd35m: NFT terminal") == (0.65, ">= 0.5", True)
    assert of(rolled, "sd35m: NFT stitched") == (0.4, ">= 0.5", False)
    pair = "DPS tweedie, cfg", "DPS stitched"
    forth, back = (f"sd35m_1024: {a} / {b}" for a, b in (pair, pair[::-1]))
    assert found["fastest Tweedie / stitched: time", forth]["counted"] == pytest.approx(20 / 7)
    assert of("fastest Tweedie / stitched: time", forth) == (4, ">= 3.5", True)
    assert of("stitched / fastest Tweedie: memory", back) == (0.3, "<= 0.4", True)
    assert of("stitched / fastest Tweedie: working memory", back) == (0.125, None, None)
    over_plain = "sd35m_1024: DPS stitched / plain"
    assert of("stitched / plain: time", over_plain) == (1.1, "<= 1.2", True)
    nft = "NFT terminal / stitched: time per sample"
    assert found[nft, "sd35m"]["counted"] == 1.5
    assert of(nft, "sd35m") == (1.5, ">= 1.6", False)
    stage_1 = "stage 1 / one plain pass of backbone and reward: time"
    assert of(stage_1, "sd35m_512") == (1.1, "<= 1.2", True)
    assert {name for name, _ in found} == {
        "leanest stitched / leanest Tweedie: memory",
        "leanest Tweedie / leanest stitched: time",
    }


def test_changes_by_hand():
    from gpu_changes import changes

    found = {(r["what"], r["change"]): r["speed_up"] for r in changes(by_hand())}
    shipped, cached = "batch 32, K = 1", "batch 32, K = 4, cached latents"
    assert found == {
        ("sd35m_1024: denoiser", "attention auto -> attention cudnn"): pytest.approx(2),
        ("sd35m_1024: prefix", "compiled whole"): pytest.approx(1.5),
        ("sd35m_1024: prefix, backward", "compiled whole"): pytest.approx(1.5),
        ("sd35m_512: stage 2, a noisy latent", f"{shipped} -> {cached}"): pytest.approx(2),
        ("sd35m_1024: plain", "blocks by inductor"): pytest.approx(1.25),
        ("sd35m_1024: stitched value, a sample", "batch 1 -> 8"): pytest.approx(2),
    }


def test_the_report_has_every_block_and_stands_without_results():
    from gpu_report import text

    states = [{"part": "guidance", "state": "done", "seconds": 3.0, "message": None}]
    states.append({"part": "rate", "state": "skipped", "message": "5 s are left"})
    lines = text(by_hand(), states).splitlines()

    def line(*words):
        return next(one.split() for one in lines if all(word in one for word in words))

    assert "5 s are left" in " ".join(line("skipped"))
    assert line("matrix products:")[2] == "100"
    assert line("stitched / plain: time")[-6:-2] == ["1.1000", "<=", "1.2", "yes"]
    assert line("blocks by inductor")[-3:] == ["10.0000", "8.0000", "1.2500"]
    assert line("busy")[-4:] == ["75%", "of", "the", "time"]
    assert "it" not in text({}, states[:1]).split()
