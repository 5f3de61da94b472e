"""The command `stitchvm check`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from stitchvm.preflight.findings import BAD, table

__all__ = ["main"]


def main(argv: Sequence[str]) -> None:
    """Checks what a configuration names, prints a table, and exits with 1 if something is not right.

    What a run would not even parse, such as an option that does not exist, ends in the run's message and exit code 2.

    Arguments:
        argv: The command line after `stitchvm check`.
    """
    parser = argparse.ArgumentParser(
        prog="stitchvm check",
        description="Are the files that a configuration names complete and right? Reads headers only.",
        epilog="Further --KEY VALUE override the configuration, as with the other commands.",
    )
    parser.add_argument("--config", type=Path, action="append", required=True, metavar="FILE")
    args, rest = parser.parse_known_args(list(argv))
    from stitchvm.lightning_cli import parse
    from stitchvm.preflight.compose import compose
    from stitchvm.preflight.walk import check

    try:
        config = compose(args.config, _pairs(rest))
        model = config.get("model")
        parse(list(argv), model.get("class_path") if isinstance(model, dict) else model)
        findings = check(config)
    except ValueError as error:
        print(f"stitchvm: error: {error}", file=sys.stderr)
        raise SystemExit(1) from error
    print(table(findings))
    raise SystemExit(int(any(f.state in BAD for f in findings)))


def _pairs(rest: Sequence[str]) -> list[tuple[str, str]]:
    """Returns overrides as pairs of key and text, from `--KEY VALUE` and `--KEY=VALUE`.

    Raises:
        ValueError: If something is no option, or has no value.
    """
    pairs: list[tuple[str, str]] = []
    words = list(rest)
    while words:
        word = words.pop(0)
        if not word.startswith("--"):
            raise ValueError(f"{word!r} is no option: expected --KEY VALUE")
        key, equals, value = word[2:].partition("=")
        if not equals:
            if not words:
                raise ValueError(f"--{key} has no value")
            value = words.pop(0)
        pairs.append((key, value))
    return pairs
