"""Records and tables of the training benchmark: stages of each way of fine-tuning, ratios beside the issue's count."""

from __future__ import annotations

from dataclasses import astuple
from typing import Any

from training_setups import Trained, TrainingSetup

from stitchvm.modules.cost import STAGES, Plan, Prices, total
from stitchvm.modules.cost_measure import WarmUp
from stitchvm.results import records_to_text

Record = dict[str, Any]
SAMPLES = 1000
# counted by hand beforehand for SD 3.5 Medium at 512², terminal and stitched: a sample of DRaFT-1 at 205 tokens a
# prompt, with four of 24 blocks and two ViT-H tails, and one of NFT without its values; the world's shares are others
EXPECTED = {
    "DRaFT-1": ("TFLOP", 34, 19, 1.8),
    "NFT, fraction = 1.0": ("forwards", 121, 72.5, 1.67),
}
QUANTITIES = {
    "time": "seconds",
    "FLOPs": "flops",
    "FLOPs, rough": "rough_flops",
    "forwards": "forwards",
    "forwards without values": "passes",
}


def rough_flops(prices: Prices) -> Prices:
    """Returns prices with which a count by hand is made: adapters cost nothing, backward is as much as forward."""
    a_pass = prices.frozen
    return Prices(a_pass, a_pass, a_pass, a_pass, prices.value, prices.value)


def training_record(
    trained: Trained, plan: Plan, model: Prices, run: Prices, forwards: Prices
) -> Record:
    """Returns the record of a way of fine-tuning: what a sample costs, counted.

    Arguments:
        trained: The way.
        plan: What it runs.
        model: Prices in FLOPs.
        run: The same with what gradient checkpointing runs again.
        forwards: Prices in forwards.
    """
    mean = plan.mean()
    record: Record = {
        "variant": trained.name,
        "method": trained.method,
        "value_estimator": trained.estimator,
        "gradient_checkpointing": trained.checkpointing,
        "stop": [plan.window.low, plan.window.high],
        "losses": plan.mean_losses(),
    }
    bare = Prices(*astuple(forwards)[:4], 0.0, 0.0)
    for key, prices in (
        ("flops", model),
        ("run_flops", run),
        ("rough_flops", rough_flops(model)),
        ("forwards", forwards),
        ("passes", bare),
    ):
        record[key] = total(mean.values()).at(prices)
    record |= {f"flops_{stage}": mean[stage].at(model) for stage in STAGES}
    names = ("pass", "frozen_pass", "backward", "last_backward", "value", "value_backward")
    return record | {f"flops_of_{n}": x for n, x in zip(names, astuple(model), strict=True)}


def add_times(record: Record, runs: list[WarmUp], rate: float) -> None:
    """Adds what was measured to a record: seconds of 1,000 samples by stage, memory, utilisation.

    Arguments:
        record: The record.
        runs: What was measured at the first and the last stop, whose mean is that of the window; repeats beside it.
        rate: The device's FLOP/s in matrix products.
    """
    stops = sorted({run.stop for run in runs})
    for stage in STAGES:
        least = [min(r.seconds[stage] for r in runs if r.stop == stop) for stop in stops]
        record[f"seconds_{stage}"] = sum(least) / len(least)
    record["seconds"] = sum(record[f"seconds_{stage}"] for stage in STAGES)
    peak, resident = max(r.peak_gib for r in runs), min(r.resident_gib for r in runs)
    record |= {"peak_memory_gib": peak, "resident_gib": resident, "working_gib": peak - resident}
    record |= {"optimiser_gib": runs[0].optimiser_gib, "samples": SAMPLES}
    record |= {"matmul_flops_per_s": rate, "stops_measured": stops}
    record["utilisation"] = SAMPLES * record["flops"] / record["seconds"] / rate


def ratio_records(records: list[Record]) -> list[Record]:
    """Returns terminal over stitched for each method, measured and counted, beside what was counted beforehand."""
    found: list[Record] = []
    for stitched in (r for r in records if r["value_estimator"] == "stitched"):
        way, method = stitched["variant"].replace(" stitched", ""), stitched["method"]
        terminal = next(
            (r for r in records if r["variant"] == f"{method} terminal"),
            {},
        )
        for quantity, key in QUANTITIES.items():
            pair = terminal.get(key), stitched.get(key)
            if None in pair:
                continue
            record: Record = {
                "ratio": "terminal / stitched",
                "method": way,
                "quantity": quantity,
                "value": pair[0] / pair[1],
                "expected": None,
                "aim": ">= 1.6" if quantity == "time" and method != "DRaFT-3" else None,
            }
            if way in EXPECTED:
                unit, *each, record["expected"] = EXPECTED[way]
                record |= {"expected_terminal": each[0], "expected_stitched": each[1]}
                record["expected_unit"] = unit
            found.append(record)
    return found


def show(setup: TrainingSetup, device: str, records: list[Record], ratios: list[Record]) -> None:
    """Prints the tables of a setup."""
    title = f"{setup.name} on {device}" + (", reduced" if setup.reduced else "")
    print(f"\n{title}: what a sample costs, counted\n")
    lines = [
        {
            "variant": r["variant"],
            "stop": "{} … {}".format(*r["stop"]),
            "losses": f"{r['losses']:g}",
            "forwards": f"{r['forwards']:.1f}",
            "without values": f"{r['passes']:.1f}",
            "TFLOP": f"{r['flops'] / 1e12:.4g}",
            "rough": f"{r['rough_flops'] / 1e12:.4g}",
            **{stage: f"{r[f'flops_{stage}'] / 1e12:.4g}" for stage in STAGES},
        }
        for r in records
    ]
    print(records_to_text(lines, rows=list(lines[0]), column=None))
    timed = [r for r in records if "seconds" in r]
    if timed:
        print(
            f"\nseconds of {SAMPLES} samples, GiB, and the share of the device's matrix products\n"
        )
        columns = ["variant", *(f"seconds_{s}" for s in STAGES), "seconds", "peak_memory_gib"]
        columns += ["working_gib", "utilisation"]
        print(records_to_text(timed, rows=columns, column=None))
    for r in records:
        if "error" in r:
            print(f"{r['variant']}: {r['error']}")
    if ratios:
        print("\nterminal / stitched\n")
        print(
            records_to_text(
                ratios, rows=("method", "quantity", "value", "expected", "aim"), column=None
            )
        )
