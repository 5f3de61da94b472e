"""Results of the official GenEval evaluator, brought into the library's records.

The evaluator writes one JSON object a line, {"filename", "tag", "prompt", "correct", "reason", "metadata", …}, with
`metadata` the prompt's entry as a JSON string; images with the same string are those of one prompt. The overall score
here is the evaluator's own ("Overall score (avg. over tasks)" of its summary). As a command:

    python -m stitchvm.metrics.geneval_official results.jsonl --output metrics.json
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from stitchvm.metrics.geneval_score import geneval_records, geneval_score
from stitchvm.results import records_to_text, sha256_of, write_results

__all__ = ["LABEL", "import_official", "main", "read_official"]

LABEL = "GenEval"


def read_official(path: str | Path) -> list[dict[str, Any]]:
    """Returns the lines of the evaluator's results file.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it has no line, or a line is not one of the evaluator's.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(
            f"there is no file {path}: give the evaluator's --outfile (results.jsonl)."
        )
    lines = []
    for number, text in enumerate(path.read_text(encoding="utf-8").split("\n"), 1):
        if not text.strip():
            continue
        try:
            line = json.loads(text)
        except ValueError as error:
            raise ValueError(f"Line {number} of {path} is not valid JSON ({error}).") from error
        wanted = ("filename", "tag", "prompt", "correct", "metadata")
        lacking = [key for key in wanted if not isinstance(line, dict) or key not in line]
        if lacking:
            raise ValueError(
                f"Line {number} of {path} has no {', '.join(lacking)}: expected the results file of the "
                "official GenEval evaluator."
            )
        if not isinstance(line["correct"], (bool, int)) or line["correct"] not in (0, 1):
            raise ValueError(
                f"Line {number} of {path} has correct = {line['correct']!r}: expected true or false."
            )
        lines.append(line)
    if not lines:
        raise ValueError(f"{path} is empty: the evaluator found no image. Check its image folder.")
    return lines


def import_official(path: str | Path, **more: Any) -> list[dict[str, Any]]:
    """Returns tidy records "GenEval/overall", "GenEval/counting", … from the evaluator's results file.

    Arguments:
        path: The results file.
        **more: Further keys of every record, such as `method` or `seed`.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is not such a file.
    """
    lines = read_official(path)
    tags = [str(line["tag"]) for line in lines]
    groups = [json.dumps(line["metadata"]) for line in lines]
    scores = geneval_score(tags, [bool(line["correct"]) for line in lines], groups)
    return geneval_records(scores, LABEL, **more)


def main(argv: Sequence[str] | None = None) -> None:
    """Imports a results file from the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m stitchvm.metrics.geneval_official",
        description="Imports the results file of the official GenEval evaluator.",
    )
    parser.add_argument("results", help="the evaluator's --outfile, results.jsonl")
    parser.add_argument("--output", default="geneval.json", help="the file to write")
    parser.add_argument("--method", help="how the images were made, kept in every record")
    parser.add_argument("--overwrite", action="store_true")
    given = parser.parse_args(argv)
    more = {} if given.method is None else {"method": given.method}
    records = import_official(given.results, **more)
    source = {"file": Path(given.results).name, "sha256": sha256_of(given.results)}
    path = write_results(
        given.output, records, overwrite=given.overwrite, extra={"geneval_results": source}
    )
    print(records_to_text(records))
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
