"""The benchmarks' own arithmetic, on shrunk setups: the code that runs on a GPU, without one."""

import json
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.filterwarnings("ignore:.*self.trainer. reference is not registered")
BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(autouse=True)
def path(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))


@pytest.fixture
def run():
    from setups import SETUPS
    from steps import Run

    torch.manual_seed(0)
    return Run(SETUPS["sd35m_512"].shrunk(), torch.device("cpu"))


def test_counted_flops_are_the_analytic_ones(run):
    for levels in (1, 3):
        counted, analytic = run.flops(levels), run.analytic_flops(levels)
        for part, flops in analytic.items():
            assert counted[part] == pytest.approx(flops, rel=0.01), part
        # weights and inputs have a gradient each, but the stitch's input has none
        assert 1.8 * counted["student"] < counted["backward"] < 2.3 * counted["student"]


def test_the_split_changes_nothing_and_misses_nothing(run):
    from common import Laps, instrumented
    from steps import Variant

    batch = run.batch(Variant(2))
    batch["pixels"] = batch["pixels"] / 255
    t = torch.tensor([[0.3], [0.7]])
    plain = run.module.losses(batch, t, 0)["loss"]
    laps = Laps.of_seconds(run.device)
    with instrumented(run.module, laps):
        assert torch.equal(run.module.losses(batch, t, 0)["loss"], plain)
    assert laps.sums.keys() == {"vae", "teacher", "prefix", "student", "other"}
    assert min(laps.sums.values()) > 0
    before = dict(laps.sums)
    assert torch.equal(run.module.losses(batch, t, 0)["loss"], plain)
    assert laps.sums == before


def test_step_trains_once_in_accumulate_micro_batches(run):
    from steps import Variant

    batch, period = run.batch(Variant(2, cached=True)), run.setup.accumulate
    weight = run.module.value_model.stitch.F.weight
    kept = weight.detach().clone()
    for _ in range(period - 1):
        run.step(batch)
    assert torch.equal(weight, kept)
    run.step(batch)
    assert not torch.equal(weight, kept)


def test_search_command_writes_its_parts_and_the_ratio(tmp_path):
    import search

    output = tmp_path / "search.json"
    command = "--setup sd35m_512 --reduced --repeats 1 --probes 4 --held-out 4 --end-probes 2"
    search.main([*command.split(), "--output", str(output)])
    records = json.loads(output.read_text())["records"]
    seconds = {r["part"]: r["seconds"] for r in records[:-1]}
    parts = [seconds[name] for name in ("encode", "features", "gram", "solve", "tail")]
    assert sum(parts) == pytest.approx(seconds["total"], rel=0.05)
    pass_seconds = seconds["backbone"] + seconds["reward"]
    expected = (seconds["total"] - seconds["encode"]) / pass_seconds
    assert records[-1]["ratio"] == pytest.approx(expected)
    with pytest.raises(FileExistsError):
        search.main([*command.split(), "--output", str(output)])


@pytest.mark.slow
def test_distillation_command_writes_parts_and_variants(tmp_path):
    import distillation
    from steps import PARTS

    output = tmp_path / "distillation.json"
    distillation.main(
        ["--setup", "sd35m_512", "--reduced", "--steps", "1", "--output", str(output)]
    )
    records = json.loads(output.read_text())["records"]
    parts = {r["part"] for r in records if "part" in r}
    assert parts == {*PARTS, "data"}
    variants = [r for r in records if "images_per_second" in r and "variant" in r]
    assert {r["noise_levels"] for r in variants} == {1, 2, 4}
    assert {r["cached_latents"] for r in variants} == {True, False}
    for record in variants:
        assert 0 < record["utilisation"] < 1.2
        assert record["peak_memory_gib"] > 0
