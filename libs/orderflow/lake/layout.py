"""Where the lake's files lie and which columns they have.

Kinds and their columns are derived from `schemas/*.avsc`: a field added to a schema reaches the lake by itself. The
columns that users are promised come first, by name, so that removing one is an error at start, not a hole in the data.
"""

from __future__ import annotations

import datetime as dt
import hashlib
import json
import re
from dataclasses import dataclass
from functools import cache
from typing import Any, Final

import pyarrow as pa

from orderflow.errors import OrderflowError
from orderflow.paths import SCHEMAS
from orderflow.processor import Record
from orderflow.topics import BY_NAME, CVD, EVENTS, FEATURE_EVENTS, FUSION, JOURNAL, OFI, REJECTS, ROWS, SIGNALS

DAY_MS: Final = 86_400_000
NS_PER_DAY: Final = DAY_MS * 1_000_000
LAST_DAY: Final = (dt.date.max - dt.date(1970, 1, 1)).days
NO_SYMBOL: Final = "_"
"""Folder of rows that belong to no symbol."""
HIVE_NULL: Final = "__HIVE_DEFAULT_PARTITION__"
MAX_NAME_BYTES: Final = 120
"""Longest symbol or session in a path; with the rest of a name and the temporary prefix it stays below 255 bytes."""

PARQUET_ROOT: Final = "data/ofi_cvd"
RAW_ROOT: Final = "data/raw"
JSONL_ROOT: Final = "signals/jsonl"
SIGNALS_DATABASE: Final = "signals/signals.sqlite"
CHECKPOINT: Final = "state/checkpoint.json"

_FILE_NAME: Final = re.compile(
    r"(?:part|signals)-.+-p(\d\d+)(?:-\d+T\d+)?-\d{12,}-\d{12,}\.(?:parquet|ndjson\.zst|jsonl)", re.DOTALL
)

PAYLOAD_ENCODING: Final = "payload_encoding"
"""Field that a raw line has besides the journal's own: utf-8 or base64."""


class LakeError(OrderflowError):
    """The lake's files or settings do not fit."""


@dataclass(frozen=True, slots=True)
class Kind:
    """One kind of Parquet file.

    `fields` are the record's fields in the order of the columns; `schema` is the file's, which also has the symbol,
    kept once per file, and what the sink computes (`computed`, behind the fields, in that order).
    """

    name: str
    topics: tuple[str, ...]
    fields: tuple[str, ...]
    computed: tuple[str, ...]
    schema: pa.Schema
    time_field: str
    time_divisor: int

    @property
    def buffer_schema(self) -> pa.Schema:
        """Columns in the order of buffered tuples: `fields`, then `computed`."""
        renamed = _RENAMED.get(self.name, {})
        names = [renamed.get(field, field) for field in self.fields]
        return pa.schema([self.schema.field(name) for name in (*names, *self.computed)])

    def day_of(self, record: Record) -> int:
        """UTC day of a record, days since the epoch; a time that no date can hold counts to the nearest one that can."""
        day: int = record[self.time_field] // self.time_divisor
        return day if 0 <= day <= LAST_DAY else min(max(day, 0), LAST_DAY)


SYMBOL_TYPE: Final = pa.dictionary(pa.int32(), pa.string())
"""What readers of `symbol=...` folders make of the folder's name: pandas and pyarrow refuse a plain string beside it."""

_TRUST: Final = ("book_state", "gap_count", "recv_ts_ms", "seq", "sub")
_ROW_KINDS: Final[dict[str, tuple[str, tuple[str, ...]]]] = {
    "aggTrade": (
        "prices",
        ("ts_ms", "event_ts_ms", "symbol", "price", "qty", "agg_trade_id", "latency_ms", "recv_rate_tps", "side",
         "side_source", "meta", *_TRUST),
    ),
    "bookTicker": (
        "quotes",
        ("ts_ms", "event_ts_ms", "symbol", "bid", "bid_qty", "ask", "ask_qty", "best_spread_bps", "update_id",
         "latency_ms", "meta", *_TRUST),
    ),
    "depth": (
        "book",
        ("ts_ms", "event_ts_ms", "symbol", "bid_px", "bid_qtys", "ask_px", "ask_qtys", "best_spread_bps", "update_id",
         "latency_ms", "meta", *_TRUST),
    ),
    "markPrice": ("marks", ("ts_ms", "event_ts_ms", "symbol", "price", "latency_ms", "meta", *_TRUST)),
    "forceOrder": (
        "liquidations",
        ("ts_ms", "event_ts_ms", "symbol", "price", "qty", "side", "side_source", "latency_ms", "meta", *_TRUST),
    ),
}  # fmt: skip
"""`src` of market.rows -> kind and columns. In depth rows the scalar best level only repeats the lists' first entry."""

_RENAMED: Final[dict[str, dict[str, str]]] = {"book": {"bid_qtys": "bid_qty", "ask_qtys": "ask_qty"}}
"""Kind -> record field -> column, where they differ."""

_HEADS: Final[dict[str, tuple[str, tuple[str, ...]]]] = {
    "ofi": (OFI, ("ts_ms", "symbol", "ofi_value", "ofi_z", "scale", "regime", "ofi_l1")),
    "cvd": (
        CVD,
        ("ts_ms", "symbol", "cvd", "delta", "z_raw", "z_cvd", "scale", "sigma_floor", "floor_used", "regime"),
    ),
    "fusion": (FUSION, ("ts_ms", "symbol", "score", "score_z", "regime")),
    "signals": (
        SIGNALS,
        ("ts_ms", "symbol", "signal_id", "score", "proba", "direction", "confirm", "gating", "gate_reasons"),
    ),
    "rejects": (REJECTS, ("recv_ts_ns", "symbol", "reason", "detail")),
}
"""Kind -> topic and promised columns; every further field of the topic's schema follows in the schema's order."""

_EVENT_COLUMNS: Final = (
    "ts_ms", "symbol", "event_type", "meta_json", "strength", "topic", "recv_ts_ms", "seq", "sub",
)  # fmt: skip

_COMPUTED: Final[dict[str, pa.Field]] = {
    "recv_rate_tps": pa.field("recv_rate_tps", pa.float64(), nullable=False),
    "topic": pa.field("topic", pa.string(), nullable=False),
    "strength": pa.field("strength", pa.float64()),
}

_AVRO_TYPES: Final = {
    "long": pa.int64(),
    "int": pa.int64(),
    "double": pa.float64(),
    "float": pa.float64(),
    "boolean": pa.bool_(),
    "string": pa.string(),
    "bytes": pa.binary(),
}


def avro_fields(topic: str) -> dict[str, Any]:
    """The fields of a topic's schema in its order: name -> Avro type."""
    schema = BY_NAME[topic].schema
    assert schema is not None
    content = json.loads((SCHEMAS / f"{schema}.avsc").read_text("utf-8"))
    return {field["name"]: field["type"] for field in content["fields"]}


def _arrow_field(name: str, avro: Any) -> pa.Field:
    nullable = isinstance(avro, list)
    if nullable:
        (avro,) = [branch for branch in avro if branch != "null"]
    if isinstance(avro, dict):
        if avro["type"] == "array":
            item = pa.field("element", _AVRO_TYPES[avro["items"]], nullable=False)
            return pa.field(name, pa.list_(item), nullable=nullable)
        avro = "string" if avro["type"] == "enum" else avro["type"]
    # A named type that is used again (an enum seen before) is written as its name alone.
    return pa.field(name, _AVRO_TYPES.get(avro, pa.string()), nullable=nullable)


def _kind(name: str, topics: tuple[str, ...], columns: tuple[str, ...]) -> Kind:
    avro = avro_fields(topics[0])
    renamed = _RENAMED.get(name, {})
    fields: list[str] = []
    computed: list[str] = []
    arrow: list[pa.Field] = []
    for column in columns:
        if column == "symbol":
            arrow.append(pa.field("symbol", SYMBOL_TYPE, nullable=isinstance(avro["symbol"], list)))
        elif column in avro:
            fields.append(column)
            arrow.append(_arrow_field(renamed.get(column, column), avro[column]))
        elif column in _COMPUTED:
            computed.append(column)
            arrow.append(_COMPUTED[column])
        else:
            raise LakeError(
                f"schemas/{BY_NAME[topics[0]].schema}.avsc has no field {column!r}, which kind={name} of the lake "
                "promises: put the field back, or take the promise out of orderflow/lake/layout.py"
            )
    by_ns = "ts_ms" not in avro
    return Kind(
        name,
        topics,
        tuple(fields),
        tuple(computed),
        pa.schema(arrow),
        "recv_ts_ns" if by_ns else "ts_ms",
        NS_PER_DAY if by_ns else DAY_MS,
    )


@cache
def kinds() -> dict[str, Kind]:
    """Every kind of Parquet file by name.

    Raises
    ------
    LakeError
        A schema lacks a column that the lake promises.
    """
    found = {name: _kind(name, (ROWS,), columns) for name, columns in _ROW_KINDS.values()}
    for name, (topic, head) in _HEADS.items():
        rest = tuple(field for field in avro_fields(topic) if field not in head)
        found[name] = _kind(name, (topic,), head + rest)
    found["events"] = _kind("events", (EVENTS, FEATURE_EVENTS), _EVENT_COLUMNS)
    return found


def row_kinds() -> dict[str, Kind]:
    """`src` of market.rows -> kind."""
    return {src: kinds()[name] for src, (name, _) in _ROW_KINDS.items()}


@cache
def raw_fields() -> tuple[str, ...]:
    """Keys of a raw line, in order: the journal's fields in the schema's order, then the payload's encoding."""
    return (*avro_fields(JOURNAL), PAYLOAD_ENCODING)


def path_part(text: str) -> str:
    """`text` as one component of a `name=value` path; reversible by percent decoding unless longer than a name may be.

    Letters and digits of every script stay. Of ASCII everything but letters, digits, `_`, `-` and `.` is
    percent-encoded: a path can't hold `/` and NUL, and DuckDB does not take `=`, `?` or a line break in the value of a
    partition. A text too long for a file name is cut and given a digest; the column has it whole.
    """
    pieces = [_encoded(char) for char in text]
    if not text or text in (NO_SYMBOL, HIVE_NULL) or text[0] == ".":
        pieces[:1] = [_percent(text[:1] or "\0")]
    if sum(len(piece.encode()) for piece in pieces) <= MAX_NAME_BYTES:
        return "".join(pieces)
    digest = hashlib.sha256(text.encode()).hexdigest()[:16]
    # No character takes more than 12 bytes: four of UTF-8, each encoded.
    return "".join(pieces[: (MAX_NAME_BYTES - len(digest) - 1) // 12]) + "~" + digest


def _encoded(char: str) -> str:
    plain = char.isalnum() if char.isascii() else char.isprintable()
    return char if plain or char in "_-." else _percent(char)


def _percent(char: str) -> str:
    return "".join(f"%{byte:02X}" for byte in char.encode())


def date_text(day: int) -> str:
    """UTC date of a day since the epoch, 0 to `LAST_DAY`."""
    return str(dt.date(1970, 1, 1) + dt.timedelta(days=day))


def cut_name(session: str, partition: int, first_seq: int, last_seq: int) -> str:
    """The part of a file's name that says which cut it belongs to."""
    return f"{path_part(session) if session else 'unknown'}-p{partition:02d}-{first_seq:012d}-{last_seq:012d}"


def parquet_path(kind: str, symbol: str | None, day: int, cut: str) -> str:
    """Path of a Parquet file below the lake's root."""
    folder = path_part(symbol) if symbol else NO_SYMBOL
    return f"{PARQUET_ROOT}/date={date_text(day)}/symbol={folder}/kind={kind}/part-{cut}.parquet"


def partition_of(name: str) -> int | None:
    """The partition that a file of the lake belongs to, by its name; None where it is none of ours."""
    found = _FILE_NAME.fullmatch(name)
    return int(found[1]) if found else None


def raw_path(partition: int, day: int, cut: str) -> str:
    """Path of a raw file below the lake's root."""
    return f"{RAW_ROOT}/date={date_text(day)}/partition={partition:02d}/part-{cut}.ndjson.zst"


def jsonl_path(symbol: str, minute: int, session: str, partition: int, first_seq: int, last_seq: int) -> str:
    """Path of a file of signals below the lake's root; `minute` counts minutes since the epoch."""
    minute = min(max(minute, 0), (LAST_DAY + 1) * 1440 - 1)
    begin = dt.datetime(1970, 1, 1, tzinfo=dt.UTC) + dt.timedelta(minutes=minute)
    session_part = path_part(session) if session else "unknown"
    name = f"signals-{session_part}-p{partition:02d}-{begin:%Y%m%dT%H%M}-{first_seq:012d}-{last_seq:012d}.jsonl"
    return f"{JSONL_ROOT}/date={begin.date()}/symbol={path_part(symbol) if symbol else NO_SYMBOL}/{name}"
