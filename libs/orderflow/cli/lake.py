"""`orderflow lake`: questions to the lake."""

from __future__ import annotations

import argparse
import base64
import csv
import datetime as dt
import decimal
import json
import math
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final, TextIO

from orderflow.lake.layout import PARQUET_ROOT, RAW_ROOT
from orderflow.lake.query import connect, execute, fetch, mentioned

CHUNK_ROWS: Final = 4096
TABLE_ROWS: Final = 200
CELL_CHARS: Final = 80

Rows = Iterator[tuple[Any, ...]]


def add_parser(subparsers: Any) -> None:
    """Add `lake` to the command line."""
    parser: argparse.ArgumentParser = subparsers.add_parser("lake", help="query the Parquet lake of a run")
    tasks = parser.add_subparsers(dest="task", metavar="TASK", required=True)
    sql = tasks.add_parser(
        "sql",
        help="run SQL over the lake (DuckDB)",
        description="Every kind is a view: prices, quotes, book, ofi, cvd, fusion, signals, events, rejects, marks, "
        "liquidations; the journal is the view raw. `date` and `symbol` are columns that narrow down the files read.",
        epilog='as in: orderflow lake sql "SELECT symbol, sum(delta) FROM cvd GROUP BY symbol"',
    )
    sql.add_argument("sql", metavar="SQL")
    sql.add_argument(
        "--out", "--run", type=Path, metavar="DIR", help="a run's folder or a lake's root (default: the newest run)"
    )
    sql.add_argument(
        "--format", choices=sorted(_WRITERS), default="table", help=f"table shows the first {TABLE_ROWS} rows"
    )


def run(args: argparse.Namespace) -> int:
    """Answer on standard output; returns the exit code.

    Raises
    ------
    OrderflowError
        There is no lake, or the SQL is wrong.
    """
    out: Path = args.out if args.out is not None else _default_out()
    connection = connect(out, mentioned(args.sql))
    try:
        if not any((out / tree).is_dir() for tree in (PARQUET_ROOT, RAW_ROOT)):
            print(f"orderflow: nothing has been written to {out} yet: its views are empty", file=sys.stderr)
        columns = execute(connection, args.sql)
        _WRITERS[args.format](sys.stdout, columns, _rows(connection))
    finally:
        connection.close()
    return 0


def _default_out() -> Path:
    from orderflow.cli.runs import default_out

    return default_out()


def _rows(connection: Any) -> Rows:
    while chunk := fetch(connection, CHUNK_ROWS):
        yield from chunk


def _table(file: TextIO, columns: list[str], rows: Rows) -> None:
    shown: list[tuple[Any, ...]] = []
    more = False
    for row in rows:
        if len(shown) == TABLE_ROWS:
            more = True
            break
        shown.append(row)
    cells = [columns, *([_cell(value) for value in row] for row in shown)]
    widths = [max(len(row[index]) for row in cells) for index in range(len(columns))]
    right = [any(_is_number(row[index]) for row in shown) for index in range(len(columns))]

    def line(row: list[str]) -> str:
        return "  ".join(
            cell.rjust(width) if to_right else cell.ljust(width)
            for cell, width, to_right in zip(row, widths, right, strict=True)
        ).rstrip()

    print(line(cells[0]), file=file)
    print("  ".join("-" * width for width in widths), file=file)
    for each in cells[1:]:
        print(line(each), file=file)
    if more:
        print(f"(the first {TABLE_ROWS} rows; --format csv or json gives all)", file=file)
    else:
        print(f"({len(shown)} row{'' if len(shown) == 1 else 's'})", file=file)


def _cell(value: Any) -> str:
    text = "null" if value is None else _text(value)
    text = "".join(char if char.isprintable() else "\N{REPLACEMENT CHARACTER}" for char in text)
    return text if len(text) <= CELL_CHARS else text[: CELL_CHARS - 1] + "\N{HORIZONTAL ELLIPSIS}"


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float | decimal.Decimal) and not isinstance(value, bool)


def _csv(file: TextIO, columns: list[str], rows: Rows) -> None:
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows(["" if value is None else _text(value) for value in row] for row in rows)


def _json(file: TextIO, columns: list[str], rows: Rows) -> None:
    names = _distinct(columns)
    separator = "["
    for row in rows:
        record = dict(zip(names, map(_plain, row), strict=True))
        file.write(f"{separator}\n{json.dumps(record, ensure_ascii=False, allow_nan=False)}")
        separator = ","
    file.write("[]\n" if separator == "[" else "\n]\n")


def _distinct(columns: list[str]) -> list[str]:
    """Names that a JSON object can hold side by side: a second `x` becomes `x_1`."""
    names: list[str] = []
    for column in columns:
        name, number = column, 0
        while name in names:
            number += 1
            name = f"{column}_{number}"
        names.append(name)
    return names


def _text(value: Any) -> str:
    """One value as text: as in JSON, but for strings, which stand as they are."""
    plain = _plain(value)
    if isinstance(plain, str):
        return plain
    return repr(value) if isinstance(value, float) else json.dumps(plain, ensure_ascii=False)


def _plain(value: Any) -> Any:
    """A value of DuckDB as JSON can hold it; what is not finite is null, as in the rest of JSON here."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, decimal.Decimal):
        return float(value)
    if isinstance(value, bytes):
        try:
            return value.decode()
        except UnicodeDecodeError:
            return "base64:" + base64.b64encode(value).decode()
    if isinstance(value, dt.date | dt.time):
        return value.isoformat()
    return value if value is None or isinstance(value, bool | int | str) else str(value)


_WRITERS: Final[dict[str, Callable[[TextIO, list[str], Rows], None]]] = {"csv": _csv, "json": _json, "table": _table}
