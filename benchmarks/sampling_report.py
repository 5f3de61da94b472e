"""Records and tables of the sampling benchmark: variants, what their values cost, ratios beside their aims."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from sampling_counts import Part, Units
from sampling_setups import SamplingSetup
from sampling_steps import Measured
from sampling_variants import Kind, Variant

from stitchvm.results import records_to_text

Record = dict[str, Any]
QUANTITIES = {"time": "seconds", "memory": "peak_memory_gib", "working memory": "working_gib"}
SOURCES = ("rough", "paper", "counted", "measured")
# What the paper measured: SD 3.5 Medium, 1024², CLIP | HPSv2 (Table 1): seconds and memory, Tweedie and stitched.
PAPER = {
    "sd35m_1024": (52.2 / 14.6, 23.9 / 54.6),
    "sd35m_1024_hpsv2": (52.8 / 16.5, 26.0 / 56.4),
    "sd35l_1024_hpsv2": (84.6 / 36.3, 43.2 / 89.3),
}


@dataclass
class Outcome:
    """What is known of a variant: FLOPs on paper and counted, and, if it was run, seconds and memory.

    Attributes:
        variant: The variant.
        full: The kinds of the full run's steps.
        paper: What its steps are made of, on paper.
        rough: The same, a backward pass taken for as much as a forward pass.
        counted: The same, counted on the calls.
        measured: Seconds.
        memory: GiB, by name.
    """

    variant: Variant
    full: list[Kind]
    paper: Units
    rough: Units
    counted: Units
    measured: Measured | None = None
    memory: dict[str, float] | None = None

    def step(self, source: str) -> float | None:
        """Returns the mean of the full run's steps but the first: FLOPs by one of the counts, or seconds "measured"."""
        if source == "measured":
            return None if self.measured is None else self.measured.step
        units: Units = getattr(self, source)
        rest = self.full[1:] or self.full
        return sum(map(units.step, rest)) / len(rest)

    def sample(self, source: str) -> float | None:
        """Returns the whole sample."""
        if source == "measured":
            return None if self.measured is None else self.measured.sample
        units: Units = getattr(self, source)
        return units.sample(self.variant, self.full)


def forwards(outcome: Outcome, plain: Outcome, branches: int, source: str) -> float | None:
    """Returns what a step costs beyond the plain one, per particle, in passes of the generator."""
    mine, own = outcome.step(source), plain.step(source)
    if mine is None or own is None:
        return None
    return (mine / outcome.variant.particles - own) / (own / branches)


def variant_records(
    outcomes: list[Outcome], branches: int, rate: float | None, assumed: float | None = None
) -> list[Record]:
    """Returns one record a variant.

    Arguments:
        outcomes: The variants, the plain one first.
        branches: The velocities of a plain step.
        rate: The FLOP/s of a large matrix product, measured.
        assumed: The FLOP/s at which samples that were only counted are timed.
    """
    plain, records = outcomes[0], []
    for one in outcomes:
        v, flops = one.variant, one.sample("counted")
        assert flops is not None
        record: Record = {
            "variant": v.name,
            "method": v.method,
            "value_estimator": v.estimator,
            "velocity": v.velocity if v.estimator == "tweedie" else None,
            "shared": any(kind.continued for kind in one.full),
            "checkpointing": v.checkpointing,
            "particles": v.particles,
            "proposals": v.proposals,
            "cuda_graph": v.graph,
            "steps": len(one.full),
            "flops": flops,
            "paper_flops": one.sample("paper"),
            "step_flops": one.step("counted"),
            "paper_step_flops": one.step("paper"),
        }
        for source in SOURCES:
            record[f"forwards_{source}"] = forwards(one, plain, branches, source)
        if one.measured is not None and one.memory is not None:
            seconds = one.measured.sample
            record |= {
                "steps_measured": one.measured.steps,
                "extrapolated": one.measured.steps < len(one.full),
                "seconds": seconds,
                "first_step_seconds": one.measured.first,
                "step_seconds": one.measured.step,
                "end_seconds": one.measured.end,
                "seconds_by_kind": [
                    k._asdict() | {"seconds": s} for k, s in one.measured.each.items()
                ],
                "utilisation": flops / seconds / rate if rate else None,
                **one.memory,
            }
        elif assumed:
            record["seconds_at_half_rate"] = flops / (assumed / 2)
        records.append(record)
    return records


def part_records(
    paper: dict[str, Part], counted: dict[str, Part], seconds: dict[str, tuple[float, float]]
) -> list[Record]:
    """Returns one record a part of the computation, forward and backward to its input, for one sample."""
    records: list[Record] = []
    for name, part in paper.items():
        record: Record = {
            "part": name,
            "flops": counted[name].forward,
            "paper_flops": part.forward,
            "backward_flops": counted[name].backward,
            "paper_backward_flops": part.backward,
        }
        if name in seconds:
            forward, backward = seconds[name]
            record |= {
                "seconds": forward,
                "backward_seconds": backward,
                "tflops_per_s": counted[name].forward / forward / 1e12,
                "backward_tflops_per_s": counted[name].backward / backward / 1e12,
            }
        records.append(record)
    return records


def ratio_records(setup: SamplingSetup, records: list[Record]) -> list[Record]:
    """Returns the ratios of interest, in FLOPs and, where variants were run, seconds or memory, with aim and paper.

    Tweedie guidance stands for itself in its fastest form, in its leanest, and as the literature has it: through the
    guided velocity, which is run apart from the sampler's own.
    """
    dps = [r for r in records if r["method"] == "dps"]
    by_name = {r["variant"]: r for r in records}
    key = "seconds" if any("seconds" in r for r in dps) else "flops"
    ran = [r for r in dps if key in r]
    tweedie = [r for r in ran if r["value_estimator"] == "tweedie"]
    stitched = [r for r in ran if r["value_estimator"] == "stitched"]
    answer: list[Record] = []

    def add(name: str, a: Record | None, b: Record | None, kind: str, **more: Any) -> None:
        if a is None or b is None:
            return
        row: Record = {"ratio": name, "of": a["variant"], "over": b["variant"], "quantity": kind}
        row["flops"] = a["flops"] / b["flops"] if kind == "time" else None
        what = QUANTITIES[kind]
        row["value"] = a[what] / b[what] if what in a and what in b else None
        answer.append(row | {"aim": more.get("aim"), "paper": more.get("paper")})

    def least(of: list[Record], what: str) -> Record | None:
        return min((r for r in of if what in r), key=lambda r: r[what], default=None)

    ours = least(stitched, key)
    times, memory = PAPER.get(setup.name, (None, None))
    literature = by_name.get("DPS tweedie, cfg, not shared")
    if literature is not None and key not in literature:
        literature = None
    for name, other in (
        ("fastest Tweedie", least(tweedie, key)),
        ("the literature's", literature),
    ):
        add(f"{name} / stitched", other, ours, "time", aim=">= 3.5", paper=times)
        add(f"stitched / {name}", ours, other, "memory", aim="<= 0.4", paper=memory)
        add(f"stitched / {name}", ours, other, "working memory")
    lean = least(tweedie, "peak_memory_gib")
    leanest = least(stitched, "peak_memory_gib")
    add("leanest stitched / leanest Tweedie", leanest, lean, "memory", aim="<= 0.4")
    add("leanest Tweedie / leanest stitched", lean, leanest, "time")
    add("stitched / plain", ours, records[0], "time", aim="<= 1.2")
    fk = [r for r in records if r["method"] == "fk" and key in r]
    one = next((r for r in fk if r["value_estimator"] == "stitched" and r["proposals"] == 1), None)
    for r in fk:
        if r["value_estimator"] == "stitched" and r["proposals"] > 1:
            add(f"FK stitched, M = {r['proposals']} / M = 1", r, one, "time")
    fks = least([r for r in fk if r["value_estimator"] == "tweedie"], key)
    add("FK Tweedie / FK stitched, M = 1", fks, one, "time")
    add("best of N / FK stitched, M = 1", by_name.get("best of 4"), one, "time")
    return answer


def show(
    setup: SamplingSetup,
    device: str,
    parts: list[Record],
    records: list[Record],
    ratios: list[Record],
) -> None:
    """Prints the tables of a setup."""
    print(f"\n{setup.name}{', reduced' * setup.reduced} on {device}\n")

    def table(rows: list[Record], *columns: str) -> None:
        if not rows:
            return
        keys = [c for c in columns if any(c in r for r in rows)]
        print(records_to_text([dict.fromkeys(keys) | r for r in rows], rows=keys, column=None))
        print()

    shown = []
    for r in parts:
        more = {
            "gflop": r["flops"] / 1e9,
            "on_paper": r["paper_flops"] / 1e9,
            "backward": r["backward_flops"] / 1e9,
            "backward_on_paper": r["paper_backward_flops"] / 1e9,
        }
        if "seconds" in r:
            more |= {"ms": 1e3 * r["seconds"], "backward_ms": 1e3 * r["backward_seconds"]}
        shown.append(r | more)
    counts = ("gflop", "on_paper", "backward", "backward_on_paper")
    rates = ("ms", "backward_ms", "tflops_per_s", "backward_tflops_per_s")
    table(shown, "part", *counts, *rates)

    plain = records[0]
    shown = []
    for r in records:
        more = {"tflop": r["flops"] / 1e12, "flops_to_plain": r["flops"] / plain["flops"]}
        if "seconds" in r:
            more |= {
                "s_per_sample": r["seconds"],
                "ms_per_step": 1e3 * r["step_seconds"],
                "to_plain": r["seconds"] / plain["seconds"],
                "peak_gib": r["peak_memory_gib"],
                "working_gib": r["working_gib"],
            }
        elif "seconds_at_half_rate" in r:
            more["s_at_half_rate"] = r["seconds_at_half_rate"]
        shown.append(r | more)
    table(
        shown,
        *("variant", "steps", "s_per_sample", "s_at_half_rate", "ms_per_step", "to_plain"),
        *("peak_gib", "working_gib", "tflop", "flops_to_plain", "utilisation", "error"),
    )
    values = [r for r in records if r["value_estimator"]]
    if values:
        print("a value per step and particle, in passes of the generator:\n")
    table(values, "variant", *(f"forwards_{s}" for s in SOURCES))
    table(ratios, "ratio", "quantity", "of", "over", "value", "flops", "aim", "paper")
