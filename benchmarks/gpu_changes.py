"""What each variant changes: attention kernel, layout, compilation, batch shape; seconds before and after."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from setups import SETUPS

__all__ = ["Results", "changes", "shipped"]

Record = dict[str, Any]
Results = Mapping[str, list[Record]]  # records by part


def shipped(records: Sequence[Record], compiled: bool = False) -> Record | None:
    """Returns the variant of stage 2 that has the shipped sizes, real or reduced; the shipped ones are compiled."""
    for r in records:
        setup = SETUPS[r["setup"]]
        sizes = {setup.batch_size, setup.shrunk().batch_size}
        other = r["cached_latents"] or r["noise_levels"] != setup.noise_levels
        if r["batch_size"] in sizes and not other and r["compile"] == compiled:
            return r
    return None


def changed(form: str) -> str:
    """Returns what a form of a part is, beside the eager one."""
    return form if form == "CUDA graph" else f"compiled {form}"


def changes(results: Results) -> list[Record]:
    """Returns what each variant changes: seconds before and after, and the speed-up."""
    answer: list[Record] = []

    def add(what: str, change: str, before: float | None, after: float | None) -> None:
        gain = before / after if before and after else None
        row = {"what": what, "change": change, "before": before, "after": after, "speed_up": gain}
        answer.append(row)

    every = [r for records in results.values() for r in records]
    for part in ("denoiser", "decoder"):
        for records in results.values():
            tried = [r for r in records if r.get("tuning") == part and not r.get("compile")]
            for r in tried[1:]:  # the first is what stands without a choice
                change = f"{tried[0]['choice']} -> {r['choice']}"
                add(f"{r['setup']}: {part}", change, tried[0]["seconds"], r["seconds"])
    eager = {r["part"]: r for r in every if r.get("form") == "eager" and "seconds" in r}
    for r in every:
        # the reward is compiled in no form
        if r.get("form", "eager") != "eager" and r["part"] in eager and r["part"] != "reward":
            for way in ("seconds", "backward_seconds"):
                what = f"{r['setup']}: {r['part']}{', backward' * (way != 'seconds')}"
                add(what, changed(r["form"]), eager[r["part"]][way], r[way])
    steps = [r for r in every if r["benchmark"] == "distillation" and "latents_per_second" in r]
    for setup in dict.fromkeys(r["setup"] for r in steps):
        own = [r for r in steps if r["setup"] == setup]
        first = shipped(own)
        for r in own:
            if first is not None and r is not first:
                change = f"{first['variant']} -> {r['variant']}"
                each = (1 / one["latents_per_second"] for one in (first, r))
                add(f"{setup}: stage 2, a noisy latent", change, *each)
    runs = [r for r in every if r["benchmark"] == "sampling" and "seconds" in r and "method" in r]
    plain = {(r["setup"], r["variant"]): r for r in reversed(runs) if not r.get("compile")}
    for r in runs:
        if r.get("compile") and (r["setup"], r["variant"]) in plain:
            before = plain[r["setup"], r["variant"]]["seconds"]
            add(f"{r['setup']}: {r['variant']}", f"blocks by {r['compile']}", before, r["seconds"])
    updates = [r for r in every if r["benchmark"] == "training" and "seconds" in r]
    before = {(r["setup"], r["variant"]): r for r in updates if not r.get("compile")}
    for r in updates:
        other = before.get((r["setup"], r["variant"]))
        if r.get("compile") and other is not None:
            for stage in ("seconds", "seconds_rollout", "seconds_update"):
                what = f"{r['setup']}: {r['variant']}, {stage.replace('_', ' of ')} of {r['samples']} images"
                add(what, f"blocks by {r['compile']}", other[stage], r[stage])
    calls = [r for r in every if r["benchmark"] == "value" and "seconds" in r]
    single = {(r["setup"], r["value"], r["gradient"]): r for r in calls if r["batch_size"] == 1}
    for r in calls:
        one = single.get((r["setup"], r["value"], r["gradient"]))
        if one is not None and r["batch_size"] > 1:
            what = f"{r['setup']}: {r['value']} value{' and gradient' * r['gradient']}, a sample"
            each = (x["seconds"] / x["batch_size"] for x in (one, r))
            add(what, f"batch 1 -> {r['batch_size']}", *each)
    for r in calls:
        same = ("setup", "gradient", "batch_size")
        others = (o for o in calls if o["value"] == "stitched")
        other = next((o for o in others if all(o[key] == r[key] for key in same)), None)
        if r.get("cuda_graph") and other is not None:
            what = f"{r['setup']}: stitched value{' and gradient' * r['gradient']}, batch {r['batch_size']}"
            add(what, "stitch and tail as a CUDA graph", other["seconds"], r["seconds"])
    return answer
