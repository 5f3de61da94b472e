"""Settings compared sample by sample, against numbers worked out by hand."""

from __future__ import annotations

import math
from typing import Any

import pytest

from stitchvm.modules.sweep import AVERAGE, Outcome, best, drawn, sweep_records


def line(index: int, seed: int, clip: float, hps: float, right: float = 1.0) -> dict[str, Any]:
    return {
        "index": index,
        "seed": seed,
        "rewards": {"clip": clip, "hps": hps},
        "checker": {"whole": right},
        "info": {"update_rms": [[1.0, 0.1], [0.5, 0.3]]},
        "values": [],
        "seconds": 2.0,
        "cpu_seconds": 2.0,
        "peak_memory_gib": 1.5,
    }


def outcomes() -> list[Outcome]:
    plain = [line(0, 0, 1.0, 10.0), line(1, 0, 3.0, 14.0), line(2, 0, 5.0, 12.0)]
    other = [line(2, 0, 5.4, 15.0), line(0, 0, 1.1, 10.5), line(1, 0, 3.4, 14.5, 0.0)]
    return [Outcome(0, plain), Outcome(1e9, error="the latent is not finite"), Outcome(2, other)]


def test_gains_are_paired_and_the_average_is_in_units_of_spread() -> None:
    records = sweep_records(outcomes(), "sampler.strength", method="guided")
    found = {(r["metric"], r["setting"]): r for r in records}
    assert {r["parameter"] for r in records} == {"sampler.strength"}
    assert {r["method"] for r in records} == {"guided"}
    names = ["clip", "hps", "checker/whole", AVERAGE]
    assert [r["metric"] for r in records] == names * 3

    clip = found["clip", 2]
    assert clip["value"] == pytest.approx(3.3) and clip["n"] == 3
    assert clip["gain"] == pytest.approx(0.3)
    # differences 0.1, 0.4, 0.4: s.d. √0.03, of three prompts
    assert clip["gain_stderr"] == pytest.approx(math.sqrt(0.03 / 3))
    assert clip["stderr"] > 5 * clip["gain_stderr"]
    assert clip["seconds"] == 2 and clip["peak_memory_gib"] == 1.5
    assert clip["update_rms"] == pytest.approx(0.2)
    assert found["clip", 0]["gain"] == found["clip", 0]["gain_stderr"] == 0
    assert found["checker/whole", 2]["value"] == pytest.approx(2 / 3)

    # spreads 2 (of 1, 3, 5) and 2 (of 10, 14, 12); the checker does not count
    average = found[AVERAGE, 2]
    each = [(0.1 + 0.5) / 4, (0.4 + 0.5) / 4, (0.4 + 3.0) / 4]
    assert average["value"] == pytest.approx(sum(each) / 3)
    assert found[AVERAGE, 0]["value"] == 0
    failed = found["hps", 1e9]
    assert failed["value"] is None and failed["error"] == "the latent is not finite"
    assert best(records) == 2 and best(records, "checker/whole") == 0


def test_several_samples_of_a_prompt_are_one_cluster() -> None:
    plain = [line(i, s, 0.0, 0.0) for i in range(2) for s in range(2)]
    # both samples of a prompt gain alike: two prompts' worth of evidence
    other = [line(i, s, float(i), 0.0) for i in range(2) for s in range(2)]
    records = sweep_records([Outcome("a", plain), Outcome("b", other)], "x")
    clip = next(r for r in records if (r["metric"], r["setting"]) == ("clip", "b"))
    assert clip["gain"] == 0.5 and clip["n"] == 4
    assert clip["gain_stderr"] == pytest.approx(math.sqrt(0.5 / 2))


def test_which_metrics_are_averaged_can_be_told() -> None:
    records = sweep_records(outcomes(), "strength", ["checker/whole", "clip"])
    average = next(r for r in records if (r["metric"], r["setting"]) == (AVERAGE, 2))
    # a metric without spread counts as it is
    assert average["value"] == pytest.approx((-1 / 3 + 0.3 / 2) / 2)
    with pytest.raises(ValueError, match=r"measured by \['aesthetic'\]: there are clip, hps"):
        sweep_records(outcomes(), "strength", ["aesthetic"])


def test_what_cannot_be_compared_is_an_error() -> None:
    first, failed, last = outcomes()
    with pytest.raises(ValueError, match="no setting of strength worked: the latent"):
        sweep_records([failed], "strength")
    last.lines = last.lines[1:]
    with pytest.raises(
        ValueError, match="strength = 2 has 2 samples and strength = 0 has 3, 2 of"
    ):
        sweep_records([first, last], "strength")
    with pytest.raises(ValueError, match="there are clip"):
        best(sweep_records([first], "strength"), "hpsv2")
    # gains are over the first that worked
    records = sweep_records([failed, first], "strength")
    assert [r["gain"] for r in records if r["metric"] == "clip" and r["setting"] == 0] == [0]


def test_the_picture_has_the_average_first_and_nothing_twice() -> None:
    settings = outcomes()
    for each in settings:
        for sample in each.lines:  # wrong as a whole because of its colours; its shapes are right
            sample["checker"] |= {"colour": sample["checker"]["whole"], "shape": 1.0}
    records = sweep_records(settings, "sampler.strength")
    kept = drawn(records)
    metrics = list(dict.fromkeys(record["metric"] for record in kept))
    assert metrics == [AVERAGE, "clip", "hps", "checker/whole", "checker/shape"]
    assert [r["setting"] for r in kept if r["metric"] == "clip"] == [0, 1e9, 2]
    assert {r["metric"] for r in records} - set(metrics) == {"checker/colour"}
