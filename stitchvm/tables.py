"""Tables of records: what stands in the README, the model card and the terminal, made from JSON.

With a `column` key the records are pivoted as in the paper's Table 5: one row per estimator, one column
per noise level, the clean reward in a column of its own. Without one, each record is a row.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Record = Mapping[str, Any]

# The order of rows in tables and plots; names that are not here follow in order of appearance.
ESTIMATORS = ("clean", "terminal", "stitched", "vae_stitch", "tweedie", "monte_carlo")


@dataclass
class Table:
    """A table of strings: one header and rows of the same length; the first `keys` columns are text."""

    header: list[str]
    rows: list[list[str]]
    keys: int


def number(value: Any, digits: int = 3) -> str:
    """Returns a number with `digits` decimals (integers and text as they are; None as a dash)."""
    if value is None:
        return "–"
    if isinstance(value, float):
        return f"{value:.{digits}f}"
    return str(value)


def ordered(names: Iterable[Any]) -> list[Any]:
    """Returns the distinct names, the known estimators first and in their fixed order."""
    distinct = list(dict.fromkeys(names))
    known = {name: place for place, name in enumerate(ESTIMATORS)}
    return sorted(distinct, key=lambda name: known.get(name, len(known)))


def pivot(
    records: Iterable[Record],
    *,
    rows: Sequence[str] | None = None,
    column: str | None = "sigma",
    value: str = "value",
    digits: int = 3,
    stderr: bool = False,
) -> Table:
    """Returns the records as a table.

    Arguments:
        records: The records; those without all of `rows` are left out.
        rows: The keys that name a row; by default metric and estimator, with benchmark before them if
            there are several. Rows keep the order of appearance, estimators their fixed order.
        column: The key whose values become columns, sorted, with null first as "clean"; None for
            one row per record and one column per key of `rows`.
        value: The key of the numbers.
        digits: The number of decimals.
        stderr: Whether "± standard error" follows each number that has one.

    Raises:
        ValueError: If there is no record with these keys, or two records claim one cell.
    """
    records = list(records)
    if rows is None:
        several = len({record.get("benchmark") for record in records}) > 1
        rows = (*(["benchmark"] if several else []), "metric", "estimator")
    chosen = [record for record in records if all(key in record for key in rows)]
    if column is not None:
        chosen = [record for record in chosen if column in record and value in record]
    if not chosen:
        wanted = ", ".join([*rows, *([column, value] if column else [])])
        raise ValueError(f"there is no record with the keys {wanted}: nothing to tabulate.")
    if column is None:
        lines = [[number(record[key], digits) for key in rows] for record in chosen]
        texts = [i for i, key in enumerate(rows) if any(isinstance(r[key], str) for r in chosen)]
        return Table(list(rows), lines, (max(texts) + 1) if texts else 0)

    levels = sorted({r[column] for r in chosen}, key=lambda x: (x is not None, x or 0))
    cells: dict[tuple[Any, ...], dict[Any, str]] = {}
    for record in chosen:
        row = cells.setdefault(tuple(record[key] for key in rows), {})
        level = record[column]
        if level in row:
            what = ", ".join(f"{key}={record[key]}" for key in (*rows, column))
            raise ValueError(
                f"two records claim the cell {what}: filter the records, or add the key that tells "
                "them apart to `rows`."
            )
        row[level] = number(record[value], digits)
        if stderr and record.get("stderr") is not None:
            row[level] += f" ± {number(record['stderr'], digits)}"
    places = [ordered(names) for names in zip(*cells, strict=True)]
    order = sorted(
        cells, key=lambda names: [p.index(n) for p, n in zip(places, names, strict=True)]
    )
    names = [
        ("clean" if x is None else f"{'σ' if column == 'sigma' else column} = {x}") for x in levels
    ]
    body = [[*map(str, key), *(cells[key].get(level, "") for level in levels)] for key in order]
    return Table([*rows, *names], body, len(rows))


def _widths(table: Table) -> list[int]:
    return [max(map(len, column)) for column in zip(table.header, *table.rows, strict=True)]


def _align(table: Table, cells: Sequence[str], widths: Sequence[int]) -> list[str]:
    return [
        cell.ljust(width) if place < table.keys else cell.rjust(width)
        for place, (cell, width) in enumerate(zip(cells, widths, strict=True))
    ]


def records_to_markdown(records: Iterable[Record], **kwargs: Any) -> str:
    """Returns the records as a Markdown table, aligned in plain text too; arguments as for `pivot`."""
    table = pivot(records, **kwargs)
    widths = [max(width, 3) for width in _widths(table)]
    lines = [f"| {' | '.join(_align(table, table.header, widths))} |"]
    rules = ["-" * w if i < table.keys else "-" * (w - 1) + ":" for i, w in enumerate(widths)]
    lines.append(f"| {' | '.join(rules)} |")
    lines += [f"| {' | '.join(_align(table, row, widths))} |" for row in table.rows]
    return "\n".join(lines)


def records_to_text(records: Iterable[Record], **kwargs: Any) -> str:
    """Returns the records as an aligned table for the terminal; arguments as for `pivot`.

    Repeated leading keys are left blank, so that a metric's rows stand together.
    """
    table = pivot(records, **kwargs)
    widths = _widths(table)
    lines = ["  ".join(_align(table, table.header, widths)).rstrip()]
    lines.append("  ".join("─" * width for width in widths))
    for cells, first in grouped(table):
        if first and len(lines) > 2:
            lines.append("")
        lines.append("  ".join(_align(table, cells, widths)).rstrip())
    return "\n".join(lines)


def grouped(table: Table) -> list[tuple[list[str], bool]]:
    """Returns the rows with repeated leading keys blank, and whether a row begins a new group.

    A group has the same keys but the last.
    """
    answer: list[tuple[list[str], bool]] = []
    last: list[str] = []
    for row in table.rows:
        keys = row[: max(table.keys - 1, 0)]
        same = 0
        while same < len(keys) and same < len(last) and keys[same] == last[same]:
            same += 1
        new = bool(keys) and same < len(keys)
        answer.append(([""] * same + row[same:], new))
        last = keys
    return answer
