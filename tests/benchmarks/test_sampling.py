"""The cost benchmark of inference-time alignment: its counts against the calls, its plan against the samplers."""

from __future__ import annotations

import json
import mmap
from collections import Counter
from pathlib import Path
from unittest import mock

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from stitchvm.modules.cost_flops import FlopCounter

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
CPU, META = torch.device("cpu"), torch.device("meta")


@pytest.fixture(autouse=True)
def path(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))


def reduced(name, device=CPU):
    from sampling_setups import SAMPLING_SETUPS, Rig

    return Rig(SAMPLING_SETUPS[name].shrunk(), device)


def variant(name, two_branches=True):
    from sampling_variants import variants

    return next(v for v in variants(two_branches) if v.name == name)


NAMES = ("sd35m_1024", "sd35l_512_hpsv2", "flux_1024")


@pytest.mark.parametrize("name", NAMES)
def test_the_count_on_paper_is_that_of_the_calls(name):
    from sampling_counts import Paper
    from sampling_flops import counted_parts, counted_units, meta_sampling
    from sampling_variants import variants

    with meta_sampling():
        rig = reduced(name, META)
        paper = Paper(rig)
        for part, counted in counted_parts(rig).items():
            assert counted.forward == paper.parts[part].forward, part
            assert counted.backward == paper.parts[part].backward, part
        listed = variants(rig.branches == 2)
        again = [v for v in listed if v.checkpointing == "blocks" and v.velocity == "null"]
        listed = [v for v in listed if v.checkpointing == "no"]
        if name == "sd35m_1024":
            listed += [*again, variant("DPS stitched, checkpointing blocks")]
        elif name == "sd35l_512_hpsv2":
            listed = [v for v in listed if v.estimator != "tweedie"]
        found = counted_units(rig, listed)
    for v, units in found.items():
        expected = paper.units(v)
        for what in ("fresh", "continued", "judged", "decoded"):
            assert getattr(units, what) == getattr(expected, what), (v.name, what)
        asked = "value" if v.method == "fk" else "gradient"
        ratio = getattr(units, asked) / max(getattr(expected, asked), 1)
        if v.estimator is not None and v.checkpointing == "no":
            assert ratio == 1, v.name
        elif v.estimator is not None:
            # what is run again stops where nothing more is needed: a whole block of these 6, on paper nothing
            assert 0.85 < ratio < 1, v.name


def test_the_cost_of_a_stitched_value_on_sd35_medium():
    from sampling_counts import Paper
    from sampling_setups import SAMPLING_SETUPS, Rig
    from sampling_variants import make_sampler, plan

    setup = SAMPLING_SETUPS["sd35m_1024"]
    rig = Rig(setup, META)
    # by hand, in multiply-adds: 4096 image and 333 text tokens of width 1536, 4 of 24 blocks, 13 of them dual
    n, m, w = 4096, 333, 1536
    linear = [
        (16 if k < 13 else 12) * n * w**2 + (12 if k < 23 else 3) * m * w**2 for k in range(24)
    ]
    attention = [2 * (n + m) ** 2 * w + (2 * n**2 * w if k < 13 else 0) for k in range(24)]
    step, prefix = 2 * (sum(linear) + sum(attention)), sum(linear[:4]) + sum(attention[:4])
    tokens, width = 577, 1024
    tail = 24 * (12 * tokens * width**2 + 2 * tokens**2 * width)
    rough = (prefix + 2 * tail) / step
    exact = rough + (sum(attention[:4]) - 12 * m * w**2 + 24 * 2 * tokens**2 * width) / step
    for paper, cost, low in ((Paper(rig, rough=True), rough, 0.13), (Paper(rig), exact, 0.17)):
        assert paper.parts["denoiser"].forward == pytest.approx(step, rel=0.005)
        for name, more in (("DPS stitched", 0.0), ("DPS stitched, not shared", prefix / step)):
            v = variant(name)
            units = paper.units(v)
            kind = plan(make_sampler(setup, v), v.share)[1]
            found = units.step(kind) / units.fresh - 1
            assert found == pytest.approx(cost + more, rel=0.02)
            assert low + 0.1 * (more > 0) <= found < low + 0.1 * (more > 0) + 0.01


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("sd35m_1024", "FK stitched, M = 2"),
        ("sd35m_1024", "DPS tweedie, null"),
        ("flux_1024", "FK tweedie, cfg, M = 1"),
    ],
)
def test_every_step_does_what_the_plan_says_and_costs_what_it_is_made_of(name, what):
    from sampling_flops import counted_units, meta_sampling
    from sampling_steps import run_short

    rig = reduced(name)
    v = variant(what, rig.branches == 2)
    with meta_sampling():
        units = counted_units(reduced(name, META), [v])[v]
    with FlopCounter() as counter, sdpa_kernel(SDPBackend.MATH):
        took = run_short(rig, v, 3, lambda: float(counter.get_total_flops()))
    for kind, flops in took.each.items():
        assert flops == units.step(kind), kind
    assert took.end == units.end(v)
    assert took.sample == units.sample(v, took.full)
    assert took.steps < len(took.full)


def test_calls_step_by_step_are_those_of_the_plan():
    from sampling_variants import final_value, make_sampler, make_value, plan

    rig = reduced("sd35m_1024")
    v = variant("FK stitched, M = 4")
    sampler = make_sampler(rig.setup, v, 9)
    seen: list[tuple[int, ...]] = []
    before: Counter[str] = Counter()
    advance = sampler.advance

    def watched(run, k):
        record = advance(run, k)
        gained = run.field.calls - before
        before.update(gained)
        seen.append(tuple(gained[w] for w in ("velocity", "continued", "value", "gradient")))
        return record

    with mock.patch.object(sampler, "advance", watched):
        sampler(
            rig.generator,
            rig.prompts,
            make_value(rig, v),
            latent_size=rig.latent_size,
            final_value=final_value(rig, v),
        )
    kinds = plan(sampler, shared=True)
    assert seen == [tuple(kind[1:]) for kind in kinds]
    assert [kind.value for kind in kinds] == [16, 16, 0, 0, 4, 0, 0, 0, 0]


def test_short_runs_have_every_kind_of_step_of_the_full_ones():
    from sampling_setups import SAMPLING_SETUPS
    from sampling_variants import make_sampler, plan, variants

    for setup in SAMPLING_SETUPS.values():
        for two in (True, False):
            for v in variants(two):
                for shared in {v.share, False}:
                    full = plan(make_sampler(setup, v), shared)
                    assert set(full) <= set(plan(make_sampler(setup, v, 2), shared)), v.name
                    assert len(full) == (
                        setup.guided_steps if v.particles == 1 else setup.fk_steps
                    )
    kinds = plan(make_sampler(SAMPLING_SETUPS["sd35m_1024"], variant("FK stitched, M = 2")), True)
    # the paper's: proposals in the first 16 of 40 steps, resampling every 4 of 8 … 32
    assert [k + 1 for k, kind in enumerate(kinds) if kind.value == 8] == [*range(1, 17)]
    assert [k + 1 for k, kind in enumerate(kinds) if kind.value == 4] == [20, 24, 28, 32]


def test_a_variants_memory_is_its_own():
    from sampling_steps import in_own_process

    from stitchvm.modules.meter import Meter

    def peak(mib):
        meter = Meter(CPU)
        meter.start()
        block = mmap.mmap(-1, mib * 2**20)  # fresh pages, whatever the heap has free
        for page in range(0, len(block), mmap.PAGESIZE):
            block[page] = 1
        meter.stop()
        return meter.peak_gib

    large, small = (in_own_process(lambda mib=mib: peak(mib)) for mib in (300, 50))
    assert large - small == pytest.approx(250 / 1024, rel=0.1)
    with pytest.raises(RuntimeError, match="no such thing"):
        in_own_process(lambda: {}["no such thing"])


def test_ratios_are_against_the_best_tweedie_of_each_kind():
    from sampling_report import ratio_records
    from sampling_setups import SAMPLING_SETUPS

    def record(name, estimator, seconds, memory, **more):
        method = name.split()[0].lower()
        made = {"variant": name, "method": method, "value_estimator": estimator, "proposals": 1}
        made |= {"seconds": seconds, "peak_memory_gib": memory, "working_gib": memory - 4}
        return made | {"flops": seconds} | more

    records = [
        record("plain", None, 10.0, 5.0),
        record("DPS tweedie, cfg", "tweedie", 40.0, 30.0),
        record("DPS tweedie, cfg, checkpointing blocks", "tweedie", 60.0, 12.0),
        record("DPS tweedie, cfg, not shared", "tweedie", 50.0, 31.0),
        record("DPS stitched", "stitched", 12.0, 9.0),
        record("DPS stitched, checkpointing blocks", "stitched", 13.0, 6.0),
        record("FK stitched, M = 1", "stitched", 20.0, 9.0),
        record("FK stitched, M = 2", "stitched", 25.0, 9.0, proposals=2),
    ]
    setup = SAMPLING_SETUPS["sd35m_1024_hpsv2"]
    found = {(r["ratio"], r["quantity"]): r for r in ratio_records(setup, records)}
    expected = {
        ("fastest Tweedie / stitched", "time"): 40 / 12,
        ("stitched / fastest Tweedie", "memory"): 9 / 30,
        ("stitched / fastest Tweedie", "working memory"): 5 / 26,
        ("the literature's / stitched", "time"): 50 / 12,
        ("stitched / the literature's", "memory"): 9 / 31,
        ("stitched / the literature's", "working memory"): 5 / 27,
        ("leanest stitched / leanest Tweedie", "memory"): 6 / 12,
        ("leanest Tweedie / leanest stitched", "time"): 60 / 13,
        ("stitched / plain", "time"): 1.2,
        ("FK stitched, M = 2 / M = 1", "time"): 25 / 20,
    }
    assert {key: r["value"] for key, r in found.items()} == expected
    first = found["fastest Tweedie / stitched", "time"]
    assert first["paper"] == pytest.approx(3.2) and first["aim"] == ">= 3.5"


def test_a_run_without_time_left_still_writes_what_it_counted(tmp_path):
    import sampling

    output = tmp_path / "sampling.json"
    command = [
        "--setup",
        "sd35m_512",
        "--reduced",
        "--repeats",
        "1",
        "--minutes",
        "1e-9",
        "--only",
        "M*",
    ]
    sampling.main([*command, "--output", str(output)])
    variants = [r for r in json.loads(output.read_text())["records"] if "variant" in r]
    assert [r["error"] for r in variants] == ["no time left"]
    with pytest.raises(FileExistsError):
        sampling.main([*command, "--output", str(output)])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sd35m_512", "flux_1024"])
def test_the_command_measures_every_variant(tmp_path, name):
    import sampling

    output = tmp_path / "sampling.json"
    sampling.main(["--setup", name, "--reduced", "--repeats", "1", "--output", str(output)])
    content = json.loads(output.read_text())
    records = content["records"]
    variants = {r["variant"]: r for r in records if "variant" in r}
    assert len(variants) == (18 if name == "sd35m_512" else 14)
    for r in variants.values():
        assert r["extrapolated"] and r["steps_measured"] < r["steps"]
        rest = (r["steps"] - 1) * r["step_seconds"]
        total = r["first_step_seconds"] + rest + r["end_seconds"]
        assert r["seconds"] == pytest.approx(total)
        assert r["peak_memory_gib"] >= r["resident_gib"] > 0.1
        assert 0 < r["utilisation"] < 1.2
    ratios = {(r["ratio"], r["quantity"]) for r in records if "ratio" in r}
    assert ("stitched / plain", "time") in ratios
    assert {r["part"] for r in records if "part" in r} >= {"denoiser", "prefix", "decoder"}
    assert sum("tuning" in r for r in records) == 7


@pytest.mark.slow
def test_blocks_can_be_compiled():
    import sampling

    command = [
        "--setup",
        "sd35m_512",
        "--reduced",
        "--repeats",
        "1",
        "--compile",
        "eager",
        "--only",
    ]
    sampling.main([*command, "DPS stitched"])
