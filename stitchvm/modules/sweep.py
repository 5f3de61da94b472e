"""Several settings of one parameter over the same prompts and seeds, compared sample by sample.

Settings share prompts and seeds, so the *gain* of a setting over the first one is a mean of paired differences: its
standard error, over prompts, is much below that of either mean. The paper picks a strength by the best average of
its metrics, which are on different scales; here each gain is divided by the spread of its metric over the samples
of the first setting, and "average gain" is their mean over the rewards.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from stitchvm.metrics.estimate import Estimate, ratio
from stitchvm.modules.sample_store import Line
from stitchvm.modules.sampling_report import numbers, summary

__all__ = ["AVERAGE", "Outcome", "best", "drawn", "sweep_records"]

AVERAGE = "average gain"
Key = tuple[int, int]  # index of the prompt, seed


@dataclass
class Outcome:
    """What a setting came to.

    Attributes:
        setting: The setting: a number, or text.
        lines: Its samples; none if it failed.
        error: Why it failed, or None.
    """

    setting: Any
    lines: Sequence[Line] = field(default_factory=list)
    error: str | None = None

    @property
    def scores(self) -> dict[Key, dict[str, float]]:
        """What each sample is measured by."""
        return {(line["index"], line["seed"]): numbers(line) for line in self.lines}

    def steps(self) -> dict[str, float]:
        """Returns the numbers that steps report (rms of gradient and update, …), averaged over steps and samples."""
        found: dict[str, list[float]] = {}
        for line in self.lines:
            for name, series in line.get("info", {}).items():
                found.setdefault(name, []).extend(x for _, x in series if x is not None)
        return {name: sum(each) / len(each) for name, each in found.items() if each}


def sweep_records(
    outcomes: Sequence[Outcome], parameter: str, average: Sequence[str] | None = None, **keys: Any
) -> list[dict[str, Any]]:
    """Returns a record for every setting and metric, and one for the average of its gains.

    A record has `metric`, `parameter`, `setting`, `value`, `stderr`, `n`, `seconds`, `peak_memory_gib`, the averages of
    what steps report, `gain` over the first setting that worked and its `gain_stderr`; and where a setting failed,
    no numbers but `error`.

    Arguments:
        outcomes: What the settings came to, in order.
        parameter: What was swept.
        average: The metrics whose gains are averaged; by default the rewards: neither checks, nor the final value, nor
            parts of a weighted reward.
        keys: Further entries of every record: method, value_estimator, ….

    Raises:
        ValueError: If no setting worked, settings have other samples than the first, or there is no such metric.
    """
    worked = [outcome for outcome in outcomes if outcome.error is None]
    if not worked:
        why = outcomes[0].error if outcomes else "there are none"
        raise ValueError(f"no setting of {parameter} worked: {why}")
    first = worked[0].scores
    names = list(dict.fromkeys(name for each in first.values() for name in each))
    plain = [name for name in names if "/" not in name and "." not in name]
    average = [name for name in plain if name != "final_value"] if average is None else average
    if missing := [name for name in average if name not in names]:
        raise ValueError(f"no sample is measured by {missing}: there are {', '.join(names)}.")
    spreads = {name: _spread([each[name] for each in first.values()]) for name in average}

    records: list[dict[str, Any]] = []
    for outcome in outcomes:
        common = {**keys, "parameter": parameter, "setting": outcome.setting}
        if outcome.error is not None:
            nothing = {"value": None, "stderr": None, "n": 0, "error": outcome.error}
            records += [{"metric": name, **common, **nothing} for name in (*names, AVERAGE)]
            continue
        scores = outcome.scores
        if scores.keys() != first.keys():
            raise ValueError(
                f"{parameter} = {outcome.setting} has {len(scores)} samples and {parameter} = {worked[0].setting} has "
                f"{len(first)}, {len(scores.keys() & first.keys())} of the same prompt and seed: expected all. Delete "
                "the folder of the one that is wrong and run the sweep again."
            )
        common |= outcome.steps()
        for record in summary(outcome.lines):
            name = record["metric"]
            gain = _mean({key: scores[key][name] - first[key][name] for key in scores})
            gains = {"gain": float(gain.value), "gain_stderr": float(gain.stderr)}
            records.append({"metric": name, **common, **record, **gains})
        if average:
            gain = _mean(
                {
                    key: sum((scores[key][n] - first[key][n]) / spreads[n] for n in average)
                    / len(average)
                    for key in scores
                }
            )
            found = {"value": float(gain.value), "stderr": float(gain.stderr), "n": int(gain.n)}
            records.append({"metric": AVERAGE, **common, **found})
    return records


def drawn(records: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Returns the records worth a panel: the average first, and no metric that says what one before it says.

    Arguments:
        records: The records of a sweep.
    """
    curves: dict[str, list[tuple[Any, Any]]] = {}
    for record in records:
        curves.setdefault(record["metric"], []).append((record["setting"], record["value"]))
    order = sorted(curves, key=lambda metric: metric != AVERAGE)
    kept = [m for k, m in enumerate(order) if curves[m] not in [curves[o] for o in order[:k]]]
    return [record for metric in kept for record in records if record["metric"] == metric]


def _mean(samples: Mapping[Key, float]) -> Estimate:
    """Returns the mean over samples, its standard error over prompts."""
    prompts: dict[int, list[float]] = {}
    for (index, _), number in samples.items():
        prompts.setdefault(index, []).append(number)
    sums = torch.tensor([sum(each) for each in prompts.values()], dtype=torch.float64)
    return ratio(sums, torch.tensor([len(each) for each in prompts.values()]))


def _spread(values: Sequence[float]) -> float:
    """Returns the standard deviation, 1 where there is none to speak of."""
    found = torch.tensor(values, dtype=torch.float64)
    spread = float(found.std()) if len(found) > 1 else 0.0
    return spread if spread > 1e-12 * float(found.abs().max()) else 1.0


def best(records: Sequence[Mapping[str, Any]], metric: str = AVERAGE) -> Any:
    """Returns the setting with the highest value of a metric, by default of the average gain.

    Raises:
        ValueError: If no record has one.
    """
    found = [r for r in records if r["metric"] == metric and r["value"] is not None]
    if not found:
        known = ", ".join(dict.fromkeys(r["metric"] for r in records))
        raise ValueError(f"no record of {metric!r} has a value: there are {known}.")
    return max(found, key=lambda record: record["value"])["setting"]
