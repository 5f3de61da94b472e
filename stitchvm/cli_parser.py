"""The command line's parser: what was wrong in a few words, and what may have been meant."""

from __future__ import annotations

import argparse
import difflib
import os
import re
import sys
import traceback
from typing import NoReturn

from lightning.pytorch.cli import LightningArgumentParser

__all__ = ["StitchParser", "condensed"]

YAML_TEXT = '"<unicode string>"'  # what YAML calls a file that somebody else has read


def condensed(message: str) -> str:
    """Returns jsonargparse's report without the types that were tried and the values that were given."""
    noise = (
        "Does not validate against",
        "Subtypes:",
        "Errors:",
        "- Expected a <class 'NoneType'>",
    )
    kept: list[str] = []
    lines = message.splitlines()
    for line, after in zip(lines, [*lines[1:], ""], strict=True):
        if line.strip().startswith("Given value"):
            if "Given value:" in after and len(after) < 100:
                kept.append(after.strip().replace("Given value:", "Got value:"))
            break
        if line.strip() and not line.strip().startswith(noise):
            kept.append(line.strip().removeprefix("- "))
    return "\n  ".join(kept) or message


def did_you_mean(
    message: str, error: BaseException | None, parser: argparse.ArgumentParser
) -> str:
    """Returns what an unknown option may have been meant to be, or the options there are; "" of other errors."""
    if found := re.match(r"unrecognized arguments: --([\w.]+)", message):
        root, _, rest = found[1].partition(".")
        known = {word[2:] for action in parser._actions for word in action.option_strings}
        roots = {word.partition(".")[0] for word in known} - {"help"}
        if root in roots:
            near = difflib.get_close_matches(found[1], known, n=1)
        else:
            near = [f"{n}.{rest}".strip(".") for n in difflib.get_close_matches(root, roots, n=1)]
        return f"; did you mean --{near[0]}?" if near else ""
    found = re.fullmatch(r"Option '([\w.]+)' is not accepted", message)
    if found is None or error is None:
        return ""
    while error.__cause__ is not None:
        error = error.__cause__
    inner: argparse.ArgumentParser = parser  # the class's own, deepest in the trace
    for frame, _ in traceback.walk_tb(error.__traceback__):
        inner = next((x for x in frame.f_locals.values() if isinstance(x, StitchParser)), inner)
    known = {action.dest for action in inner._actions} - {"help"}
    if near := difflib.get_close_matches(found[1], known, n=1):
        return f"; did you mean '{near[0]}'?"
    return f"; expected one of {', '.join(sorted(known))}"


def with_file(message: str, error: BaseException | None) -> str:
    """Returns a message of YAML's with the name of the file that it is about, which it does not know."""
    if YAML_TEXT not in message:
        return message
    named = ""
    while error is not None:
        for frame, _ in traceback.walk_tb(error.__traceback__):
            places = [frame.f_locals.get(name) for name in ("path", "cfg_path")]
            paths = [str(p) for p in places if isinstance(p, (str, os.PathLike))]
            named = next((p for p in paths if os.path.isfile(p)), named)
        error = error.__cause__ or error.__context__
    return message.replace(YAML_TEXT, named) if named else message


class StitchParser(LightningArgumentParser):
    """A parser whose errors are short: what was wrong, not every type that was tried."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Prints the innermost part of an error and exits with code 2."""
        if os.environ.get("JSONARGPARSE_DEBUG") and ex is not None:
            raise ex
        hint = did_you_mean(str(message), ex, self)
        text = with_file(condensed(str(message)), ex)
        sys.stderr.write(f"stitchvm: error: {text}{hint}\n")
        sys.stderr.write(
            "(all options: stitchvm COMMAND --help; the trace: JSONARGPARSE_DEBUG=true)\n"
        )
        raise SystemExit(2)
