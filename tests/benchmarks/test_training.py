"""The cost benchmark of training-time alignment: its settings, its counts against the parts' own, its arithmetic."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml

ROOT = Path(__file__).parents[2]
META = torch.device("meta")


@pytest.fixture(autouse=True)
def path(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))


@pytest.mark.parametrize("name", ["world", "sd35m"])
def test_settings_are_those_of_the_configs(name):
    from training_setups import TRAINING_SETUPS, trainings

    setup = TRAINING_SETUPS[name]
    for file, settings in (("draft1", setup.draft), ("nft", setup.nft)):
        config = yaml.safe_load((ROOT / f"configs/{file}_stitched_{name}.yaml").read_text())
        arguments = config["model"]["init_args"]
        assert {key: arguments[key] for key in settings} == settings
        assert arguments["policy"]["init_args"]["r"] == setup.rank
        assert arguments.get("height", 32) == setup.resolution
    names = [t.name for t in trainings()]
    assert names[:2] == ["DRaFT-1 terminal", "DRaFT-1 stitched"] and len(set(names)) == 6


def test_calls_cost_what_their_parts_say():
    from sampling_counts import decoder_part
    from sampling_flops import meta_sampling
    from training_setups import TRAINING_SETUPS, Trained, build

    from stitchvm.modules.cost_flops import counted_prices

    setup = TRAINING_SETUPS["sd35m"].shrunk()
    with meta_sampling():
        prices = {}
        for estimator in ("terminal", "stitched"):
            module = build(setup, Trained("DRaFT-1", estimator), META)
            prices[estimator] = counted_prices(module)
            if estimator == "terminal":  # a stitched value has no vision towers
                rewards = sum(r.flops() for _, r in module._built.value.reward.items())
        generator, size = module.generator, module._built.latent_size
        backbone = generator.null_branch()
        a_pass = backbone.flops(size, backbone.num_blocks)
        models = [v.value_model for v in module._built.value.values.values()]
        grid = (size[0] // backbone.patch, size[1] // backbone.patch)
        w, channels = backbone.width(0), generator.latent_channels
        head = 2 * (grid[0] * grid[1] * w * backbone.patch**2 * channels + 2 * w * w)
        prefix = backbone.flops(size, 4)
        tails = sum(m.stitch.flops(grid) + m.tail.flops() for m in models)
        decoder = decoder_part(SimpleNamespace(generator=generator, latent_size=size))
    # one run of the prefix for both tails
    assert prices["stitched"].value == prefix + tails
    assert prices["terminal"].value == decoder.forward + rewards
    for each in prices.values():
        assert each.frozen == a_pass + head
        # adapters of rank 2 at a width of 48
        assert each.frozen < each.forward < 1.05 * each.frozen
        # no gradient for the input is a little less; attention costs twice backward
        assert each.frozen < each.ends < each.backward < 1.3 * each.forward


def test_a_record_by_hand():
    from training_report import training_record
    from training_setups import Trained

    from stitchvm.modules.cost import Prices, nft_plan, rough
    from stitchvm.objectives.stopping import StopWindow

    plan = nft_plan(StopWindow(12, 17), fraction=1.0)
    model = Prices(11, 10, 13, 12, 5, 6)
    run = Prices(11, 10, 24, 23, 5, 6)
    trained = Trained("NFT", "stitched", settings=(("fraction", 1.0),))
    record = training_record(trained, plan, model, run, rough(0.5))
    assert record["variant"] == "NFT stitched, fraction = 1.0"
    assert record["flops_rollout"] == 14.5 * 11 and record["flops_value"] == 5
    assert record["flops_update"] == pytest.approx(14.5 * (2 * 11 + 10 + 12))
    assert record["flops"] == pytest.approx(14.5 * (11 + 2 * 11 + 10 + 12) + 5)
    assert record["run_flops"] == pytest.approx(record["flops"] + 14.5 * 11)
    assert record["rough_flops"] == pytest.approx(72.5 * 10 + 5)
    assert record["forwards"] == 73 and record["passes"] == 72.5
    assert record["flops_of_last_backward"] == 12 and record["losses"] == 14.5


def test_times_are_the_least_of_each_stop_and_their_mean():
    from training_report import add_times

    from stitchvm.modules.cost_measure import WarmUp

    def run(stop, rollout, update, peak):
        seconds = {"rollout": rollout, "value": 1.0, "update": update}
        return WarmUp(seconds, seconds, stop, 4, 2, 2, 1.0, peak, 0.25, "memory")

    record = {"flops": 30.0}
    runs = [
        run(3, 4.0, 8.0, 2.0),
        run(7, 9.0, 6.0, 3.0),
        run(3, 5.0, 7.0, 2.5),
        run(7, 8.0, 8.0, 1),
    ]
    add_times(record, runs, rate=2000.0)
    assert record["seconds_rollout"] == (4 + 8) / 2
    assert record["seconds_update"] == (7 + 6) / 2
    assert record["seconds"] == 6 + 1 + 6.5
    assert record["utilisation"] == pytest.approx(1000 * 30 / 13.5 / 2000)
    assert (record["peak_memory_gib"], record["working_gib"]) == (3.0, 2.0)


def test_ratios_are_terminal_over_stitched():
    from training_report import ratio_records

    def record(name, estimator, seconds, flops):
        method, _, more = name.partition(",")
        made = {"method": method, "value_estimator": estimator, "flops": flops}
        made["variant"] = f"{method} {estimator}" + more * bool(more)
        made |= {"rough_flops": flops, "forwards": flops, "passes": flops}
        return made | ({"seconds": seconds} if seconds else {})

    records = [
        record("DRaFT-1", "terminal", 6.0, 34.0),
        record("DRaFT-1", "stitched", 3.0, 17.0),
        record("NFT", "terminal", None, 121.0),
        record("NFT", "stitched", None, 68.5),
        record("NFT,, fraction = 1.0", "stitched", None, 72.5),
        record("DRaFT-3", "terminal", 5.0, 50.0),
    ]
    found = {(r["method"], r["quantity"]): r for r in ratio_records(records)}
    assert found["DRaFT-1", "time"]["value"] == 2 and found["DRaFT-1", "time"]["aim"] == ">= 1.6"
    assert found["DRaFT-1", "FLOPs"]["expected"] == 1.8
    assert found["DRaFT-1", "FLOPs"]["expected_terminal"] == 34
    every = found["NFT, fraction = 1.0", "forwards"]
    assert every["value"] == pytest.approx(1.67, abs=0.005) and every["expected"] == 1.67
    assert found["NFT", "forwards"]["value"] == pytest.approx(121 / 68.5)
    assert found["NFT", "forwards"]["expected"] is None
    assert ("NFT", "time") not in found and not any(m == "DRaFT-3" for m, _ in found)


def test_the_kept_counts_are_those_of_the_plan():
    """results/counts_training.json beside what was counted by hand beforehand."""
    content = json.loads((ROOT / "results/counts_training.json").read_text())
    records = content["records"]
    kept = {(r["setup"], r["variant"]): r for r in records if "variant" in r}
    for setup in ("sd35m", "sd35m_205"):
        nft, draft = kept[setup, "NFT terminal"], kept[setup, "DRaFT-1 terminal"]
        every = kept[setup, "NFT stitched, fraction = 1.0"]
        assert nft["passes"] == 121 and every["passes"] == 72.5
        assert draft["passes"] == 10 + 1 + 1 and kept[setup, "DRaFT-3 terminal"]["passes"] == 16
        assert kept[setup, "DRaFT-1 stitched"]["passes"] == 5 + 1 + 1
        for r in (nft, every, draft):
            stages = sum(r[f"flops_{s}"] for s in ("rollout", "value", "update"))
            assert r["flops"] == pytest.approx(stages)
    # by hand, at 205 tokens: a forward pass of 2.22 TFLOP, 34 and 19 for a sample of DRaFT-1
    short = {name: r for (setup, name), r in kept.items() if setup == "sd35m_205"}
    assert short["NFT terminal"]["flops_of_frozen_pass"] == pytest.approx(2.22e12, rel=0.01)
    for estimator, tera in (("terminal", 34), ("stitched", 19)):
        assert short[f"DRaFT-1 {estimator}"]["rough_flops"] == pytest.approx(tera * 1e12, rel=0.02)


@pytest.mark.slow
def test_the_command_measures_each_way(tmp_path):
    import training

    output = tmp_path / "training.json"
    command = ["--setup", "sd35m", "--reduced", "--repeats", "1", "--losses", "1"]
    training.main([*command, "--output", str(output)])
    records = json.loads(output.read_text())["records"]
    ways = {r["variant"]: r for r in records if "variant" in r}
    assert len(ways) == 6
    for r in ways.values():
        assert r["seconds"] == pytest.approx(
            r["seconds_rollout"] + r["seconds_value"] + r["seconds_update"]
        )
        assert min(r["seconds_rollout"], r["seconds_value"], r["seconds_update"]) > 0
        assert r["peak_memory_gib"] >= r["resident_gib"] > 0.1 and 0 < r["utilisation"] < 1.2
    assert ways["NFT stitched"]["stops_measured"] == [12, 17]
    assert {(r["method"], r["quantity"]) for r in records if "ratio" in r} >= {
        ("DRaFT-1", "time"),
        ("NFT", "time"),
    }
    with pytest.raises(FileExistsError):
        training.main([*command, "--output", str(output)])
