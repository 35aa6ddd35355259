"""The lake as SQL: every kind a DuckDB view, the journal too."""

from __future__ import annotations

import re
from collections.abc import Collection
from pathlib import Path
from typing import Any, Final

import duckdb
import pyarrow as pa

from orderflow.lake.layout import PARQUET_ROOT, RAW_ROOT, LakeError, avro_fields, kinds, raw_fields
from orderflow.topics import JOURNAL

RAW_VIEW: Final = "raw"

_SQL_TYPES: Final = {
    pa.int64(): "BIGINT",
    pa.float64(): "DOUBLE",
    pa.bool_(): "BOOLEAN",
    pa.string(): "VARCHAR",
    pa.binary(): "BLOB",
}


class LakeQueryError(LakeError):
    """The SQL is wrong, or there is no lake where one was named."""


def view_names() -> tuple[str, ...]:
    """Every view: the kinds, then `raw`."""
    return (*kinds(), RAW_VIEW)


def mentioned(sql: str) -> tuple[str, ...]:
    """The views whose names occur in `sql`; all of them where none does (as in SHOW TABLES)."""
    words = set(re.findall(r"\w+", sql.lower()))
    return tuple(name for name in view_names() if name in words) or view_names()


def connect(out: Path, views: Collection[str] | None = None) -> Any:
    """A DuckDB connection in memory with a view per kind over the lake under `out`.

    Every view has the kind's columns, then `date` (DATE, of the row's own time; of receipt in `raw`). `symbol` is that
    of the folder, so that a filter on `date` or `symbol` opens only the files it needs; rows that belong to no symbol
    have `_`. Kinds without a file are views without a row. `raw` has the journal's fields, `payload_encoding` and
    `partition`.

    Parameters
    ----------
    out
        The lake's root, or a run's folder.
    views
        Only these; None for all. A view reads the footers of all its files when it is made.

    Raises
    ------
    LakeQueryError
        `out` is not a folder, or a file in it is damaged.
    """
    if not out.is_dir():
        raise LakeQueryError(f"{out} is not a folder: name a run's folder or a lake's root with --out DIR")
    # Nothing is fetched from the network: what the views need is built in.
    connection = duckdb.connect(":memory:", config={"autoinstall_known_extensions": "false"})
    try:
        for name in view_names() if views is None else views:
            connection.execute(_raw_view(out) if name == RAW_VIEW else _kind_view(out, name))
    except duckdb.Error as error:
        connection.close()
        raise LakeQueryError(
            f"the lake under {out} can't be read: {_one_line(error)}; `orderflow lake` writes files whole or not at "
            "all: restore or remove the file that is named"
        ) from error
    return connection


def execute(connection: Any, sql: str) -> list[str]:
    """Run SQL; returns the names of the result's columns, whose rows `connection.fetchmany` then gives.

    Raises
    ------
    LakeQueryError
        DuckDB refused it; names the place and the views there are.
    """
    if not sql.strip():
        raise LakeQueryError(f"the SQL is empty; as in: SELECT symbol, count(*) FROM prices GROUP BY symbol; {_hint()}")
    try:
        connection.execute(sql)
        return [column[0] for column in connection.description or ()]
    except duckdb.Error as error:
        raise LakeQueryError(f"SQL refused: {_one_line(error)}; {_hint()}") from error


def fetch(connection: Any, rows: int) -> list[tuple[Any, ...]]:
    """The next rows of a result.

    Raises
    ------
    LakeQueryError
        The query failed while it ran.
    """
    try:
        got: list[tuple[Any, ...]] = connection.fetchmany(rows)
    except duckdb.Error as error:
        raise LakeQueryError(f"the query failed: {_one_line(error)}") from error
    return got


def _hint() -> str:
    return f"views: {', '.join(view_names())}; their columns: DESCRIBE <view>"


def _one_line(error: Exception) -> str:
    """DuckDB's message without its drawing of the place, which a line by itself can't carry."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip(" ^~")]
    return " ".join(lines)


def _sql_type(arrow: Any) -> str:
    if pa.types.is_dictionary(arrow):
        return _sql_type(arrow.value_type)
    if pa.types.is_list(arrow):
        return f"{_sql_type(arrow.value_type)}[]"
    return _SQL_TYPES[arrow]


def _literal(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"


def _glob(root: Path, pattern: str) -> str:
    """SQL literal of a glob below `root`, whose own name is taken as it is."""
    return _literal(re.sub(r"([*?\[])", r"[\1]", str(root)) + "/" + pattern)


def _empty(columns: dict[str, str]) -> str:
    return "SELECT " + ", ".join(f'NULL::{type_} AS "{name}"' for name, type_ in columns.items()) + " WHERE false"


def _view(name: str, columns: dict[str, str], source: str | None) -> str:
    # BY NAME: a column that older files lack is null in them, and the view has it even where no file does.
    read = f" UNION ALL BY NAME {source}" if source is not None else ""
    return f"CREATE VIEW {name} AS {_empty(columns)}{read}"


def _kind_view(out: Path, name: str) -> str:
    columns = {field.name: _sql_type(field.type) for field in kinds()[name].schema} | {"date": "DATE"}
    root, pattern = out / PARQUET_ROOT, f"date=*/symbol=*/kind={name}/part-*.parquet"
    if next(root.glob(pattern), None) is None:
        return _view(name, columns, None)
    return _view(
        name,
        columns,
        f"SELECT * EXCLUDE (kind) FROM read_parquet({_glob(root, pattern)}, union_by_name = true, "
        "hive_partitioning = true, hive_types = {'date': DATE, 'symbol': VARCHAR, 'kind': VARCHAR})",
    )


def _raw_view(out: Path) -> str:
    integers = {name for name, avro in avro_fields(JOURNAL).items() if {"long", "int"} & _branches(avro)}
    fields = {name: "BIGINT" if name in integers else "VARCHAR" for name in raw_fields()}
    columns = fields | {"date": "DATE", "partition": "INTEGER"}
    root, pattern = out / RAW_ROOT, "date=*/partition=*/part-*.ndjson.zst"
    if next(root.glob(pattern), None) is None:
        return _view(RAW_VIEW, columns, None)
    types = ", ".join(f"{_literal(name)}: {_literal(type_)}" for name, type_ in fields.items())
    return _view(
        RAW_VIEW,
        columns,
        f"SELECT * FROM read_json({_glob(root, pattern)}, format = 'newline_delimited', compression = 'zstd', "
        f"columns = {{{types}}}, hive_partitioning = true, hive_types = {{'date': DATE, 'partition': INTEGER}})",
    )


def _branches(avro: Any) -> set[str]:
    return {branch for branch in (avro if isinstance(avro, list) else [avro]) if isinstance(branch, str)}
