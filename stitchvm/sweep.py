"""`stitchvm sweep`: `stitchvm predict` for several settings of one parameter, and what they come to.

    stitchvm sweep --config configs/dps_stitched_world.yaml --sweep sampler.strength 0 0.5 1 2 4

Every setting is a run of its own, in a folder of its own, on the same prompts and seeds: what is finished is not done
again, so that the same command goes on after an interruption, and more settings can be added later. The folder then has
sweep.json, sweep.png and the table that is printed. Gains are over the first setting: put the plain sampler
there (strength 0).
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

__all__ = ["main"]

Predict = Callable[[list[str]], tuple[int, str]]
NOT_FINITE = "not finite"  # what every message of a NotFiniteError says
PARTS = ("model.", "data.", "trainer.")


def main(argv: Sequence[str], predict: Predict | None = None) -> list[dict[str, Any]]:
    """Runs a sweep and returns its records.

    Arguments:
        argv: The command line after `stitchvm sweep`.
        predict: Runs `stitchvm predict` with arguments and returns exit code and error output; in a process of its own
            by default.

    Raises:
        SystemExit: If a setting ends in another error than numbers that are not finite, with its exit code.
    """
    args, rest = _parser().parse_known_args(list(argv))
    parameter, *settings = args.sweep
    if not settings or len(set(map(_plain, settings))) < len(settings):
        _fail(
            f"--sweep {' '.join(args.sweep)}: expected a parameter and its distinct settings, such as "
            "--sweep sampler.strength 0 0.5 1 2 4"
        )
    folder = args.folder or Path("runs/sweep") / f"{args.config.stem}_{_plain(parameter)}"
    option = parameter if parameter.startswith(PARTS) else f"model.{parameter}"
    runs = [folder / f"{_plain(parameter)}_{_plain(setting)}" for setting in settings]
    outcomes = []
    for setting, run in zip(settings, runs, strict=True):
        print(f"\n{parameter} = {setting}: {run}", flush=True)
        where = [f"--{option}={setting}", f"--trainer.default_root_dir={run}"]
        code, message = (predict or _predict)(["--config", str(args.config), *rest, *where])
        if code and not (code == 1 and NOT_FINITE in message):
            raise SystemExit(code if code > 0 else 128 - code)
        outcomes.append(_outcome(_number(setting), run, message if code else None))
    summaries = [run / "summary.json" for run in runs]
    return _report(outcomes, parameter, folder, args.average, summaries)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="stitchvm sweep",
        description="Samples the same prompts and seeds under several settings of one parameter and compares them.",
        epilog="Every other option is handed to `stitchvm predict`.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--config", type=Path, required=True, help="a configuration of `stitchvm predict`"
    )
    parser.add_argument(
        "--sweep",
        nargs="+",
        required=True,
        metavar=("PARAMETER", "SETTING"),
        help="the parameter, as in the configuration below `model`, and its settings; gains are over the first",
    )
    parser.add_argument(
        "--folder", type=Path, help="where everything is written; runs/sweep/… by default"
    )
    parser.add_argument(
        "--average",
        nargs="+",
        metavar="REWARD",
        help="the rewards whose gains are averaged; all by default",
    )
    return parser


def _predict(argv: list[str]) -> tuple[int, str]:
    """Runs `stitchvm predict` in a process of its own; its error output is shown and its end returned."""
    tail = bytearray()

    def forward(descriptor: int) -> None:
        while piece := os.read(descriptor, 1 << 16):
            sys.stderr.write(piece.decode(errors="replace"))
            sys.stderr.flush()
            tail.extend(piece)
            del tail[: -(1 << 14)]

    command = [sys.executable, "-m", "stitchvm", "predict", *argv]
    with subprocess.Popen(command, stderr=subprocess.PIPE) as process:
        assert process.stderr is not None
        try:
            forward(process.stderr.fileno())
        except KeyboardInterrupt:  # it was interrupted, too, and says what it keeps
            process.wait()
            raise SystemExit(130) from None
    message = tail.decode(errors="replace").rpartition("stitchvm: error: ")[2]
    return process.returncode, " ".join(message.split())


def _outcome(setting: Any, run: Path, error: str | None) -> Any:
    """Returns what a setting came to, from its folder."""
    from stitchvm.modules.sample_store import SampleStore
    from stitchvm.modules.sweep import Outcome

    if error is not None:
        return Outcome(setting, error=error)
    return Outcome(setting, list(SampleStore(run).read().values()))


def _report(
    outcomes: list[Any],
    parameter: str,
    folder: Path,
    average: list[str] | None,
    summaries: list[Path],
) -> list[dict[str, Any]]:
    """Writes, draws and prints what a sweep came to."""
    from stitchvm.modules.sweep import AVERAGE, best, drawn, sweep_records
    from stitchvm.plots import sweep_curves
    from stitchvm.results import read_results, write_results
    from stitchvm.tables import records_to_text

    made = [read_results(path) for path in summaries if path.is_file()]
    first = made[0]["records"][0] if made else {}
    keys = {key: first[key] for key in ("method", "value_estimator", "seed") if key in first}
    try:
        records = sweep_records(outcomes, parameter, average, **keys)
    except ValueError as error:
        _fail(str(error))
    # the first setting's configuration: the others differ from it in the parameter alone
    config = made[0].get("config") if made else None
    path = write_results(folder / "sweep.json", records, config=config, overwrite=True)
    shown = [r for r in records if r["value"] is not None]
    columns = ("metric", "setting", "value", "stderr", "gain", "gain_stderr")
    order = list(dict.fromkeys(record["metric"] for record in shown))
    shown.sort(key=lambda record: order.index(record["metric"]))
    rows = [
        {"gain": None, "gain_stderr": None, **record, "setting": str(record["setting"])}
        for record in shown
    ]
    print(f"\n{records_to_text(rows, rows=columns, column=None)}")
    for outcome in outcomes:
        if outcome.error is not None:
            print(f"{parameter} = {outcome.setting} failed: {outcome.error}")
    if any(record["metric"] == AVERAGE for record in records):
        print(f"highest {AVERAGE}: {parameter} = {best(records)}")
    picture = sweep_curves(drawn(records), folder / "sweep.png")
    print(f"wrote {path}, {picture}")
    return records


def _number(text: str) -> Any:
    """Returns a setting as a number, if it is one."""
    try:
        return json.loads(text)
    except ValueError:
        return text


def _plain(text: str) -> str:
    """Returns text as part of a folder's name."""
    return re.sub(r"[^\w.+-]+", "_", text).strip("_")


def _fail(message: str) -> Any:
    print(f"stitchvm: error: {message}", file=sys.stderr)
    raise SystemExit(2)
