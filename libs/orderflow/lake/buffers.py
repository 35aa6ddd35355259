"""Buffers of rows that become Parquet files: the same rows give the same bytes, however they were batched."""

from __future__ import annotations

import errno
from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any, Final

import pyarrow as pa
import pyarrow.parquet as pq

from orderflow.lake.layout import Kind, LakeError
from orderflow.lake.packed import PackedRows

MAX_ROW_GROUP_ROWS: Final = 1 << 20
BATCH_ROWS: Final = 1024


class ParquetBuffer:
    """Rows of one kind, symbol and date, in the order of arrival: tuples in the order of `Kind.buffer_schema`."""

    __slots__ = ("_batch_rows", "_schema", "kind", "rows", "symbol")

    def __init__(self, kind: Kind, symbol: str | None, batch_rows: int = BATCH_ROWS) -> None:
        """`batch_rows`: how many rows are Python objects at once while columns are made of them. Changes no byte."""
        self.kind = kind
        self.symbol = symbol
        self.rows = PackedRows()
        self._batch_rows = batch_rows
        self._schema = kind.buffer_schema

    def __len__(self) -> int:
        return len(self.rows)

    def _batches(self) -> Iterator[Any]:
        schema, rows = self._schema, iter(self.rows)
        while batch := list(islice(rows, self._batch_rows)):
            columns = zip(*batch, strict=True)
            arrays = [self._column(field, values) for field, values in zip(schema, columns, strict=True)]
            yield pa.RecordBatch.from_arrays(arrays, schema=schema)

    def _column(self, field: Any, values: tuple[Any, ...]) -> Any:
        try:
            column = pa.array(values, type=field.type)
        except (pa.ArrowException, TypeError, ValueError, OverflowError) as error:
            raise self._misfit(field.name, str(error)) from error
        if column.null_count and not field.nullable:
            raise self._misfit(field.name, f"row {values.index(None)} has none")
        return column

    def _misfit(self, column: str, why: str) -> LakeError:
        return LakeError(
            f"kind={self.kind.name} symbol={self.symbol}: a value does not fit the column {column}: {why}; "
            "records must be decoded with the topic's schema"
        )

    def encode(self, metadata: Mapping[str, str]) -> memoryview:
        """The Parquet file of all rows, `metadata` in its footer. May be called again: the same bytes.

        Raises
        ------
        LakeError
            A value does not fit its column: the record did not come through its Avro schema.
        """
        table = pa.Table.from_batches(self._batches(), schema=self._schema).combine_chunks()
        count = table.num_rows
        symbol = pa.DictionaryArray.from_arrays(
            pa.array([0 if self.symbol is not None else None], pa.int32()).take(pa.array([0] * count, pa.int32())),
            pa.array([self.symbol] if self.symbol is not None else [], pa.string()),
        )
        schema = self.kind.schema
        columns = [symbol if field.name == "symbol" else table.column(field.name) for field in schema]
        return encode_table(pa.Table.from_arrays(columns, schema=schema.with_metadata(dict(metadata))))


def encode_table(table: Any) -> memoryview:
    """A Parquet file in memory: Snappy, one row group, options fixed so that equal tables give equal bytes."""
    out = pa.BufferOutputStream()
    pq.write_table(
        table,
        out,
        version="2.6",
        data_page_version="1.0",
        compression="snappy",
        row_group_size=MAX_ROW_GROUP_ROWS,
        use_dictionary=[
            field.name for field in table.schema if pa.types.is_string(field.type) or field.name == "symbol"
        ],
        column_encoding={field.name: "DELTA_BINARY_PACKED" for field in table.schema if pa.types.is_int64(field.type)},
        write_statistics=True,
        write_page_checksum=False,
        store_schema=True,
    )
    return memoryview(out.getvalue())


def check_footer(path: Path, rows: int) -> None:
    """Read a file's footer back.

    Raises
    ------
    OSError
        It can't be read or counts other rows.
    """
    try:
        found = pq.read_metadata(path).num_rows
    except pa.ArrowException as error:
        raise OSError(errno.EIO, f"the footer can't be read back: {error}") from error
    if found != rows:
        raise OSError(errno.EIO, f"the footer counts {found} rows where {rows} were written")
