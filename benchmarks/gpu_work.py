"""FLOPs that the parts of the GPU benchmarks will run, added up from results/counts_*.json."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any

from common import chosen
from setups import SETUPS
from steps import variants
from training_setups import TRAINING_SETUPS

from stitchvm.results import read_results

__all__ = ["PROBES", "REPEATS", "STEPS", "Counts"]

Record = dict[str, Any]
COUNTS = Path(__file__).parents[1] / "results"
STEPS, REPEATS = (
    8,
    2,
)  # micro-batches of stage 2 per variant; runs of a sampling variant, and of stage 1
PROBES = 400  # images of stage 1
CALLS = 4  # of each value: one to warm up, three timed


class Counts:
    """What is counted of the real sizes."""

    @staticmethod
    def _read(name: str) -> list[Record]:
        return list(read_results(COUNTS / f"counts_{name}.json")["records"])

    @cached_property
    def distillation_records(self) -> list[Record]:
        return self._read("distillation")

    @cached_property
    def sampling_records(self) -> list[Record]:
        return self._read("sampling")

    @cached_property
    def training_records(self) -> list[Record]:
        return self._read("training")

    def distillation(self, name: str, compiled: bool, *only: str) -> float:
        """Returns the FLOPs of measuring variants of stage 2, and its parts."""
        setup = SETUPS[name]
        flops = {
            tuple(r["variant"].split(", ")[1:]): r["flops"]
            for r in self.distillation_records
            if r["setup"] == name and "tflop_per_image" in r
        }
        every = variants(setup, compiled)
        measured = [v for v in every if chosen(v.name, only)]
        period = setup.accumulate
        cycles = 1 + max(1, STEPS // period)  # the first is not timed
        split = flops["K = 1",] * setup.batch_size * (period + max(period, STEPS))
        words = {v: tuple(w for w in v.name.split(", ")[1:] if w != "compiled") for v in measured}
        return split + sum(flops[words[v]] * v.batch_size * period * cycles for v in measured)

    def part(self, setup: str, name: str, backward: bool = False) -> float:
        """Returns the FLOPs of a part of the computation, forward or with its backward pass."""
        found = next(
            r for r in self.sampling_records if r["setup"] == setup and r.get("part") == name
        )
        return float(found["flops"] + backward * found["backward_flops"])

    def sampling(self, setup: str, *only: str, repeats: int = REPEATS) -> float:
        """Returns the FLOPs of measuring variants of sampling, its parts, and what is fastest."""
        steps = {"plain": 2, "dps": 2, "fk": 7, "bon": 2}
        runs = sum(
            r["flops"] / r["steps"] * steps[r["method"]]
            for r in self.sampling_records
            if r["setup"] == setup
            and "variant" in r
            and (r["variant"] == "plain" or chosen(r["variant"], only))
        )
        tuning = 4 * self.part(setup, "denoiser") + 3 * self.part(setup, "decoder", True)
        return repeats * runs + (1 + repeats) * (tuning + self.all_parts(setup))

    def all_parts(self, setup: str) -> float:
        """Returns the FLOPs of timing every part once, forward alone and with its backward pass."""
        names = ("denoiser", "prefix", "stitch and tail", "decoder", "reward")
        return sum(self.part(setup, n) + self.part(setup, n, True) for n in names)

    def search(self, name: str, repeats: int) -> float:
        """Returns the FLOPs of stage 1 and of the plain pass beside it."""
        encode = next(
            r["flops"]
            for r in self.distillation_records
            if r["setup"] == name and r.get("part") == "vae"
        )
        image = encode + self.part(name, "denoiser") + self.part(name, "reward")
        return 2 * repeats * PROBES * float(image)

    def training(self, name: str, method: str, *values: str) -> float:
        """Returns the FLOPs of short runs of a method's two ways, or one: a warm-up of one loss, then two losses."""
        setup, total = TRAINING_SETUPS[name], 0.0
        for r in self.training_records:
            wanted = [f"{method} {value}" for value in values or ("terminal", "stitched")]
            if r["setup"] != name or r.get("variant") not in wanted:
                continue
            stops = len(set(r["stop"]))
            if method == "NFT":  # rolls out a batch ahead of its losses, one level each
                ahead = 2 * setup.nft["rollout_batch"] * (r["flops_rollout"] + r["flops_value"])
                losses = 3 * setup.nft["micro_batch"] * r["flops_update"] / r["losses"]
                total += stops * (ahead + losses)
            else:
                total += stops * 3 * setup.draft["micro_batch"] * r["flops"]
        return total

    def values(self, setup: str) -> float:
        """Returns the FLOPs of the calls of values: four each, of 26 stitched samples and one Tweedie in two ways."""
        prefix, tail, u, decoder, reward = (
            self.part(setup, name) + self.part(setup, name, True)
            for name in ("prefix", "stitch and tail", "denoiser", "decoder", "reward")
        )
        return CALLS * (26 * (prefix + tail) + 3 * u + 2 * (decoder + reward))

    def step(self, setup: str, variant: str) -> float:
        """Returns the FLOPs of a step of sampling."""
        found = next(
            r for r in self.sampling_records if (r["setup"], r.get("variant")) == (setup, variant)
        )
        return float(found["step_flops"])

    def image(self, setup: str) -> float:
        """Returns the FLOPs of an image of stage 2, as shipped."""
        every = self.distillation_records
        return float(
            next(r["flops"] for r in every if r["setup"] == setup and "tflop_per_image" in r)
        )
