"""What the parts came to: one table of seconds, memory, utilisation and floor, the ratios with their aims, variants.

The floor is what the FLOPs would take at the device's rate of matrix products, the best that any part has seen; the
utilisation is the floor over the seconds. Ratios of sampling and fine-tuning are those of their own benchmarks
(`sampling_report.ratio_records`, `training_report.ratio_records`), over the records of all parts together.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml
from gpu_changes import Results, changes, shipped
from sampling_report import ratio_records as sampling_ratios
from sampling_setups import SAMPLING_SETUPS
from training_report import ratio_records as training_ratios

from stitchvm.results import records_to_text

__all__ = ["met", "rate_of", "ratios", "rows", "text"]

Record = dict[str, Any]
CONFIGS = Path(__file__).parents[1] / "configs"
HALF, HOURS = ">= 0.5", "<= 5"
COMPARE = {">=": operator.ge, "<=": operator.le}


def rate_of(results: Results) -> float | None:
    """Returns the device's FLOP/s in matrix products: the most that was seen, in the dtype of its networks."""
    every = [r for records in results.values() for r in records]
    dtype = {"cuda": "bfloat16", "cpu": "float32"}
    found = [r["flops_per_s"] for r in every if r.get("dtype") == dtype.get(r["device"])]
    found += [r["matmul_flops_per_s"] for r in every if isinstance(_rate(r), float)]
    return max(found, default=None)


def _rate(record: Record) -> Any:
    return record.get("matmul_flops_per_s")


def update_sizes() -> dict[str, int]:
    """Returns the images of an update, by method, from the shipped configurations."""
    answer = {}
    for method, name in (("NFT", "nft"), ("DRaFT-1", "draft1"), ("DRaFT-3", "draft3")):
        text = (CONFIGS / f"{name}_stitched_sd35m.yaml").read_text(encoding="utf-8")
        config = yaml.safe_load(text)
        prompts = config["data"]["init_args"]["prompts_per_update"]
        answer[method] = prompts * config["model"]["init_args"].get("group_size", 1)
    return answer


def rows(results: Results, rate: float | None) -> list[Record]:
    """Returns the table: a row for everything that was measured, or could not be."""
    sizes = update_sizes()
    answer: list[Record] = []
    for part, records in results.items():
        for one in _rows_of(records, sizes):
            seconds, flops = one.get("seconds"), one.get("flops")
            floor = flops / rate if flops and rate else None
            share = floor / seconds if floor and seconds else None
            row = {"part": part, **one, "floor_seconds": floor, "utilisation": share}
            answer.append(row | {"tflop": flops / 1e12 if flops else None})
    return answer


def _rows_of(records: list[Record], sizes: Mapping[str, int]) -> Iterator[Record]:
    search = {r["part"]: r for r in records if r["benchmark"] == "search"}
    if search:
        total, encode = search["total"], search["encode"]
        yield {
            "what": f"stage 1, {total['variant']}",
            "per": "search",
            "seconds": total["seconds"] - encode["seconds"],
            "flops": sum(r["flops"] or 0.0 for name, r in search.items() if name != "ratio"),
            "peak_memory_gib": total["peak_memory_gib"],
        }
    for r in records:
        kind, variant = r["benchmark"], r.get("variant")
        one: Record = {
            "what": f"{r.get('setup')}: {variant}",
            "seconds": r.get("seconds"),
            "peak_memory_gib": r.get("peak_memory_gib"),
            "flops": r.get("flops"),
            "error": r.get("error"),
        }
        if kind == "distillation" and "part" not in r:
            flops = r["flops"] * r["batch_size"] if "flops" in r else None
            yield one | {"per": "micro-batch", "flops": flops}
        elif kind == "sampling" and "method" in r:
            how = f", {r['compile']}" if r.get("compile") else ""
            yield one | {"what": f"{one['what']}{how}", "per": f"image, {r['steps']} steps"}
        elif kind == "value":
            yield one | {"per": "call"}
        elif kind == "training" and "variant" in r:
            n, samples = sizes[r["variant"].split()[0]], r.get("samples")
            scaled = r["seconds"] * n / samples if samples else None
            flops = r["flops"] * n if "flops" in r else None
            how = f", {r['compile']}" if r.get("compile") else ""
            name = f"{one['what']}{how}"
            scale = {"what": name, "per": f"update of {n}", "seconds": scaled, "flops": flops}
            yield one | scale
        elif kind == "rate":
            yield one | {
                "what": f"matrix product, {r['dtype']}, {r['size']}",
                "per": "product",
                "flops": 2 * r["size"] ** 3,
            }


def met(value: float | None, aim: str | None) -> bool | None:
    """Returns whether a number is what an aim such as ">= 3.5" wants; None without one of them."""
    if value is None or aim is None:
        return None
    sign, bound = aim.split()
    return bool(COMPARE[sign](value, float(bound)))


def ratios(results: Results, rate: float | None) -> list[Record]:
    """Returns what the aims are about, each with its aim and whether it is met."""
    every = [r for records in results.values() for r in records]
    found = [
        *(_stage_2(every, rate) if rate else ()),
        *(_roll_outs(every, rate) if rate else ()),
        *_sampling(every),
        *_training(every),
        *_stage_1(every),
    ]
    # the first stays where parts share the plain one
    once = {(r["ratio"], r["of"]): r for r in reversed(found)}
    return [r | {"met": met(r["value"], r["aim"])} for r in reversed(once.values())]


def _stage_2(every: list[Record], rate: float) -> Iterator[Record]:
    ran = [r for r in every if r["benchmark"] == "distillation" and "images_per_second" in r]
    ran = [r for r in ran if "variant" in r]
    for setup in dict.fromkeys(r["setup"] for r in ran):
        own = [r for r in ran if r["setup"] == setup]
        used = {id(r): r["flops"] * r["images_per_second"] / rate for r in own}
        best = max(own, key=lambda r: used[id(r)])
        named = (("uncompiled", shipped(own)), ("as shipped", shipped(own, compiled=True)))
        for name, r in (*named, ("at its best", best)):
            if r is None:
                continue
            what = f"distillation {name}: utilisation"
            of = f"{setup}: {r['variant']}"
            yield {"ratio": what, "of": of, "value": used[id(r)], "aim": HALF}
        timed = [r for r in own if "hours" in r]  # not where sizes are shrunk
        aim = HOURS if setup == "sd35m_512" else None
        least = min(timed, key=lambda r: r["hours_same_latents"], default=None)
        for name, r, key in (
            ("uncompiled: GPU-hours", shipped(timed), "hours"),
            ("as shipped: GPU-hours", shipped(timed, compiled=True), "hours"),
            ("at its best: GPU-hours, same latents", least, "hours_same_latents"),
        ):
            if r is not None:
                of = f"{setup}: {r['variant']}"
                yield {"ratio": f"distillation {name}", "of": of, "value": r[key], "aim": aim}


def _roll_outs(every: list[Record], rate: float) -> Iterator[Record]:
    for r in every:
        if r["benchmark"] == "training" and "seconds_rollout" in r:
            used = r["samples"] * r["flops_rollout"] / r["seconds_rollout"] / rate
        elif r["benchmark"] == "sampling" and r.get("method") == "plain" and "seconds" in r:
            used = r["flops"] / r["seconds"] / rate
        else:
            continue
        how = f", {r['compile']}" if r.get("compile") else ""
        of = f"{r['setup']}: {r['variant']}{how}"
        yield {"ratio": "roll-out: utilisation", "of": of, "value": used, "aim": HALF}


def _sampling(every: list[Record]) -> Iterator[Record]:
    ran = [r for r in every if r["benchmark"] == "sampling" and "method" in r]
    for setup, how in dict.fromkeys((r["setup"], r.get("compile")) for r in ran):
        own = {
            r["variant"]: r
            for r in reversed(ran)  # the first stays where parts share the plain one
            if (r["setup"], r.get("compile")) == (setup, how) and "seconds" in r
        }
        if "plain" not in own:
            continue
        listed = [own.pop("plain"), *reversed(own.values())]
        for r in sampling_ratios(SAMPLING_SETUPS[setup], listed):
            if r["value"] is not None:
                name = f"{r['ratio']}: {r['quantity']}" + (f", {how}" if how else "")
                of = f"{setup}: {r['of']} / {r['over']}"
                yield {"ratio": name, "of": of, "value": r["value"], "aim": r["aim"]} | {
                    "counted": r["flops"],
                    "paper": r["paper"],
                }


def _training(every: list[Record]) -> Iterator[Record]:
    ran = [r for r in every if r["benchmark"] == "training" and "seconds" in r]
    ran = [r for r in ran if not r.get("compile")]
    for setup in dict.fromkeys(r["setup"] for r in ran):
        found = training_ratios([r for r in ran if r["setup"] == setup])
        counted = {r["method"]: r["value"] for r in found if r["quantity"] == "FLOPs"}
        for r in found:
            if r["quantity"] == "time":
                name = f"{r['method']} terminal / stitched: time per sample"
                yield {"ratio": name, "of": setup, "value": r["value"], "aim": r["aim"]} | {
                    "counted": counted.get(r["method"])
                }


def _stage_1(every: list[Record]) -> Iterator[Record]:
    for r in every:
        if r["benchmark"] == "search" and "ratio" in r:
            name = "stage 1 / one plain pass of backbone and reward: time"
            yield {"ratio": name, "of": r["setup"], "value": r["ratio"], "aim": "<= 1.2"}


def text(results: Results, states: list[Record]) -> str:
    """Returns the report: what was run, the table, the ratios, the variants."""
    rate = rate_of(results)
    blocks = [_table(states, "part", "state", "seconds", "estimate", "message")]
    if rate is not None:
        blocks.append(f"matrix products: {rate / 1e12:.4g} TFLOP/s, what floors are made of")
    columns = ("what", "per", "seconds", "floor_seconds", "utilisation", "peak_memory_gib")
    blocks.append(_table(rows(results, rate), "part", *columns, "tflop", "error"))
    found = ratios(results, rate)
    if any(r.get("reduced") for r in states):
        blocks.append("reduced sizes: that numbers are there is all that they say")
    for aimed in (True, False):
        chosen = [r for r in found if (r["aim"] is not None) == aimed]
        blocks.append(_table(chosen, "ratio", "of", "value", "aim", "met", "counted", "paper"))
    blocks.append(_table(changes(results), "what", "change", "before", "after", "speed_up"))
    for r in (r for records in results.values() for r in records):
        if r.get("operator") == "all":
            busy = r["device_seconds"] / r["seconds"]
            blocks.append(f"{r['variant']}: the device was busy {busy:.0%} of the time")
    return "\n\n".join(block for block in blocks if block)


def _table(records: list[Record], *columns: str) -> str:
    if not records:
        return ""
    keys = [c for c in columns if any(r.get(c) is not None for r in records)]
    words = {True: "yes", False: "no"}
    shown = [
        {c: words.get(r.get(c), r.get(c)) if c == "met" else r.get(c) for c in keys}
        for r in records
    ]
    # every row is of a group of its own here
    return records_to_text(shown, rows=keys, column=None, digits=4).replace("\n\n", "\n")
