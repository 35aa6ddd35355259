"""Any rows, in any batches, read back as they were put in; the same rows are the same bytes."""

from __future__ import annotations

import math
import struct
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from lake_rows import journal, tree
from orderflow.lake import files
from orderflow.lake.layout import avro_fields, kinds, path_part, row_kinds
from orderflow.lake.parquet import LakeSink, ReceiveRate
from orderflow.lake.raw import raw_line, raw_record
from orderflow.lake.settings import LakeConfig
from orderflow.topics import CVD, EVENTS, FEATURE_EVENTS, FUSION, OFI, REJECTS, ROWS, SIGNALS

LONGS = st.integers(-(2**63), 2**63 - 1)
DOUBLES = st.floats(allow_nan=True, allow_infinity=True)
STRINGS = st.text(max_size=12)
SYMBOLS = st.one_of(
    st.sampled_from(["BTCUSDT", "ETHUSDT", "币安USDT", "A/B", ".x", "_"]), st.text(min_size=1, max_size=8)
)
TOPICS = [ROWS, OFI, CVD, FUSION, SIGNALS, EVENTS, FEATURE_EVENTS, REJECTS]


@pytest.fixture(autouse=True, scope="module")
def quick_disk() -> Iterator[None]:
    """Hundreds of small files: what reaches the disk when is not looked at here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(files.os, "fsync", lambda descriptor: None)
        yield


def values(name: str, avro: Any) -> st.SearchStrategy[Any]:
    if name == "symbol":
        return SYMBOLS if avro == "string" else st.none() | SYMBOLS
    if isinstance(avro, list):
        return st.none() | values("", next(branch for branch in avro if branch != "null"))
    if isinstance(avro, dict):
        return (
            st.sampled_from(avro["symbols"])
            if avro["type"] == "enum"
            else st.lists(values("", avro["items"]), max_size=6)
        )
    return {
        "long": LONGS, "int": st.integers(-(2**31), 2**31 - 1), "double": DOUBLES, "boolean": st.booleans(),
        "string": STRINGS, "bytes": st.binary(max_size=20),
    }.get(avro, STRINGS)  # fmt: skip


@st.composite
def items(draw: st.DrawFn) -> tuple[str, dict[str, Any]]:
    topic = draw(st.sampled_from(TOPICS))
    each = {name: draw(values(name, avro)) for name, avro in avro_fields(topic).items()}
    if topic == ROWS:
        each["src"] = draw(st.sampled_from(sorted(row_kinds())))
    return topic, each


def exact(value: Any) -> Any:
    """A form in which doubles are compared bit for bit, all NaN as one."""
    if isinstance(value, float):
        return "nan" if math.isnan(value) else struct.pack(">d", value)
    if isinstance(value, list):
        return [exact(item) for item in value]
    return value


def written(topic: str, each: dict[str, Any], rates: dict[str, ReceiveRate]) -> tuple[str, dict[str, Any]]:
    """Kind and columns that a record must become."""
    columns = dict(each)
    if topic == ROWS:
        kind = row_kinds()[columns["src"]].name
        if kind == "prices":
            columns["recv_rate_tps"] = rates.setdefault(each["symbol"], ReceiveRate()).add(each["recv_ts_ms"])
        if kind == "book":
            columns |= {"bid_qty": each["bid_qtys"], "ask_qty": each["ask_qtys"]}
    elif topic in (EVENTS, FEATURE_EVENTS):
        kind = "events"
        columns = {"strength": None, "topic": topic, **columns}
    else:
        kind = {OFI: "ofi", CVD: "cvd", FUSION: "fusion", SIGNALS: "signals", REJECTS: "rejects"}[topic]
    return kind, {name: exact(columns[name]) for name in kinds()[kind].schema.names}


def cut(root: Path, records: list[tuple[str, dict[str, Any]]], batch_rows: int) -> None:
    sink = LakeSink(root, 0, LakeConfig(), batch_rows=batch_rows)
    for topic, each in records:
        sink.step(topic, each)
    result = sink.write()
    assert sum(file.rows for file in result.files) == len(records)


@settings(max_examples=40, deadline=None)
@given(st.lists(items(), max_size=25), st.integers(1, 30))
def test_rows_read_back_as_they_were_put_in(records: list[tuple[str, dict[str, Any]]], batch_rows: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        first, second = Path(folder) / "a", Path(folder) / "b"
        cut(first, records, batch_rows)
        cut(second, records, 4096)
        assert tree(first) == tree(second)
        rates: dict[str, ReceiveRate] = {}
        wanted = [written(topic, each, rates) for topic, each in records]
        found: list[tuple[str, dict[str, Any]]] = []
        for path in sorted(first.rglob("*.parquet")):
            kind = path.parent.name.removeprefix("kind=")
            for row in pq.read_table(path, partitioning=None).to_pylist():
                found.append((kind, {name: exact(value) for name, value in row.items()}))
                named = path.parent.parent.name.removeprefix("symbol=")
                assert (None if named == "_" else unquote(named)) == row["symbol"]

    def order(pair: tuple[str, dict[str, Any]]) -> tuple[str, str]:
        return pair[0], repr(sorted(pair[1].items(), key=lambda item: item[0]))

    assert sorted(found, key=order) == sorted(wanted, key=order)


@settings(deadline=None)
@given(st.binary(max_size=200), st.integers(0, 2**62))
def test_raw_lines_read_back(payload: bytes, seq: int) -> None:
    each = journal(seq, seq % 10**13, payload=payload)
    line = raw_line(each)
    assert line.count(b"\n") == 1
    assert line.endswith(b"\n")
    assert raw_record(line) == each


@given(st.text(min_size=1, max_size=30), st.text(min_size=1, max_size=30))
def test_names_in_paths_are_reversible_and_harmless(first: str, second: str) -> None:
    part = path_part(first)
    assert not set(part) & set("/\0=?\n\\*[]")
    assert not part.startswith(".")
    assert part != "_"
    if "~" not in part:
        assert unquote(part) == first
    assert (part == path_part(second)) == (first == second)


@given(st.lists(st.integers(0, 40_000), max_size=60), st.integers(0, 60))
def test_the_receive_rate_is_the_count_over_ten_seconds_and_survives_a_save(times: list[int], saved_at: int) -> None:
    rate = ReceiveRate()
    monotone: list[int] = []
    for index, time in enumerate(times):
        if index == saved_at:
            rate = ReceiveRate(rate.runs())
        monotone.append(max([time, *monotone[-1:]]))
        assert rate.add(time) == sum(each > monotone[-1] - 10_000 for each in monotone) / 10
