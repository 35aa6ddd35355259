"""The lake read back: as SQL, on the command line, and by pandas."""

from __future__ import annotations

import argparse
import csv
import datetime as dt
import io
import json
import sys
import types
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from lake_rows import T0_MS, begin, caused, drive, ending, journal, record, session
from orderflow.cli import lake as cli
from orderflow.lake.layout import kinds
from orderflow.lake.parquet import LakeSink
from orderflow.lake.query import LakeQueryError, connect, execute, fetch, mentioned, view_names
from orderflow.lake.settings import LakeConfig
from orderflow.topics import JOURNAL, OFI, ROWS

SYMBOLS = ["BTCUSDT", "币安/USDT", "A_B", "a=b", "1"]


@pytest.fixture(scope="module")
def lake(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two partitions, two dates, symbols of every sort, under a folder whose name holds glob characters."""
    root = tmp_path_factory.mktemp("lake") / "run [1] it's*"
    for partition in (0, 11):
        sink = LakeSink(root, partition, LakeConfig())
        names = SYMBOLS[:3] if partition == 0 else SYMBOLS[3:]
        assert [*drive(sink, session(first_ms=T0_MS - 60_000, frames=120, step_ms=1000, symbols=names))]
    return root


def rows_of(root: Path, sql: str) -> list[tuple[Any, ...]]:
    connection = connect(root)
    execute(connection, sql)
    return fetch(connection, 100_000)


def command(root: Path | None, sql: str, format_: str = "json") -> int:
    parser = argparse.ArgumentParser()
    cli.add_parser(parser.add_subparsers())
    out = [] if root is None else ["--out", str(root)]
    return cli.run(parser.parse_args(["lake", "sql", sql, "--format", format_, *out]))


def test_every_view_counts_what_was_written(lake: Path) -> None:
    counts = {name: rows_of(lake, f"SELECT count(*) FROM {name}")[0][0] for name in view_names()}
    assert counts == {
        "prices": 48, "quotes": 48, "book": 48, "marks": 48, "liquidations": 48, "ofi": 240, "cvd": 240,
        "fusion": 240, "signals": 240, "events": 120, "rejects": 60, "raw": 304,
    }  # fmt: skip


def test_date_and_symbol_are_columns_of_their_own_types(lake: Path) -> None:
    got = rows_of(lake, "SELECT symbol, date, count(*) FROM ofi GROUP BY ALL ORDER BY ALL")
    assert {symbol for symbol, _, _ in got} == set(SYMBOLS)
    assert {date for _, date, _ in got} == {dt.date(2024, 7, 18), dt.date(2024, 7, 19)}
    assert sum(count for _, _, count in got) == 240
    assert rows_of(lake, "SELECT count(*) FROM ofi WHERE symbol = '1' AND date = '2024-07-18'")[0][0] > 0
    assert rows_of(
        lake, "SELECT count(*) FROM ofi WHERE date <> (to_timestamp(ts_ms / 1000) AT TIME ZONE 'UTC')::DATE"
    ) == [(0,)]


def test_rows_that_belong_to_no_symbol_have_an_underscore(lake: Path) -> None:
    assert rows_of(lake, "SELECT DISTINCT symbol FROM rejects") == [("_",)]


@pytest.mark.parametrize("view", view_names())
def test_an_empty_lake_has_the_same_columns_and_types(lake: Path, tmp_path: Path, view: str) -> None:
    full, empty = (rows_of(root, f"DESCRIBE {view}") for root in (lake, tmp_path))
    assert [row[:2] for row in full] == [row[:2] for row in empty]
    assert rows_of(tmp_path, f"SELECT * FROM {view}") == []
    if view in kinds():
        assert [row[0] for row in full] == [*kinds()[view].schema.names, "date"]


def test_columns_that_older_files_lack_are_null(lake: Path, tmp_path: Path) -> None:
    import pyarrow.parquet as pq

    sink = LakeSink(tmp_path, 0, LakeConfig())
    for day in range(2):
        sink.step(OFI, record(OFI, day, ts_ms=T0_MS + day * 86_400_000))
    old, _ = sorted(tmp_path / file.path for file in sink.write().files)
    pq.write_table(pq.read_table(old, partitioning=None).drop_columns(["ofi_l1"]), old)
    assert rows_of(tmp_path, "SELECT ofi_l1 IS NULL, seq FROM ofi ORDER BY seq") == [(True, 0), (False, 1)]


def test_values_come_back_as_they_went_in(tmp_path: Path) -> None:
    row = record(ROWS, 1, sub=0, src="depth", bid_px=[0.1, 1e-300], bid_qtys=[5e-324, 0.0], ask_px=[], ask_qtys=[])
    sink = LakeSink(tmp_path, 0, LakeConfig())
    sink.step(ROWS, row)
    sink.write()
    assert rows_of(tmp_path, "SELECT bid_px, bid_qty, ask_px, book_state, latency_ms, gap_count FROM book") == [
        ([0.1, 1e-300], [5e-324, 0.0], [], row["book_state"], row["latency_ms"], row["gap_count"])
    ]


def test_raw_is_the_journal(lake: Path, tmp_path: Path) -> None:
    assert rows_of(lake, "SELECT partition, min(seq), max(seq), count(*) FROM raw GROUP BY ALL ORDER BY ALL") == [
        (0, 1, 152, 152),
        (11, 1, 152, 152),
    ]
    sink = LakeSink(tmp_path, 0, LakeConfig())
    sink.step(JOURNAL, journal(1, T0_MS, payload=b'{"p":"1.10"}'))
    sink.step(JOURNAL, journal(2, T0_MS, payload=b"\xff"))
    sink.write()
    got = rows_of(tmp_path, "SELECT payload->>'p', payload_encoding, recv_ts_ns, symbol, date FROM raw WHERE seq = 1")
    assert got == [("1.10", "utf-8", T0_MS * 1_000_000, None, dt.date(2024, 7, 19))]
    assert rows_of(tmp_path, "SELECT from_base64(payload) FROM raw WHERE seq = 2") == [(b"\xff",)]


def test_a_filter_on_symbol_and_date_opens_only_those_files(lake: Path) -> None:
    paths = [*(lake / "data/ofi_cvd").glob("date=2024-07-18/symbol=BTCUSDT/kind=ofi/*.parquet")]
    (plan,) = rows_of(
        lake, "EXPLAIN ANALYZE SELECT sum(ofi_l1) FROM ofi WHERE symbol = 'BTCUSDT' AND date = '2024-07-18'"
    )
    assert len(paths) == 1
    assert "Total Files Read: 1" in plan[1]


def test_pandas_reads_many_files_and_one_alike(lake: Path) -> None:
    paths = sorted((lake / "data/ofi_cvd").glob("date=*/symbol=*/kind=ofi/*.parquet"))
    many = pd.read_parquet(paths)
    assert len(many) == 240
    assert sorted(many["symbol"].astype(str).unique()) == sorted(["BTCUSDT", "币安/USDT", "A_B", "a=b", "1"])
    one = pd.read_parquet(paths[0])
    assert list(one.columns[:2]) == ["ts_ms", "symbol"]


def test_only_views_that_are_mentioned_are_made() -> None:
    assert mentioned("select * from OFI join cvd using (seq)") == ("ofi", "cvd")
    assert mentioned("SHOW TABLES") == view_names()


def test_bad_sql_says_what_and_names_the_views(lake: Path) -> None:
    connection = connect(lake)
    with pytest.raises(LakeQueryError) as caught:
        execute(connection, "SELECT sum(ofi_value)\nFROM offi")
    message = str(caught.value)
    assert "offi" in message
    assert "views: prices, quotes, book" in message
    assert "\n" not in message
    with pytest.raises(LakeQueryError, match="the SQL is empty"):
        execute(connection, " ")


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(LakeQueryError, match=r"gone is not a folder: name .* with --out DIR"):
        connect(tmp_path / "gone")


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    sink = LakeSink(tmp_path, 0, LakeConfig())
    [(path, _)] = [(file.path, file.rows) for file in _one_ofi_row(sink)]
    (tmp_path / path).write_bytes(b"not parquet")
    with pytest.raises(LakeQueryError, match=r"can't be read: .*part-unknown-p00"):
        connect(tmp_path)


def _one_ofi_row(sink: LakeSink) -> Any:
    sink.step(OFI, record(OFI, 1))
    return sink.write().files


# -- command line -------------------------------------------------------------------------------------------------


def test_json(lake: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sql = (
        "SELECT 1 AS x, 2 AS x, 170141183460469231731687303715884105727::HUGEINT AS big, 'nan'::DOUBLE AS nan, "
        "1.5 AS d, DATE '2024-07-18' AS date, [0.1, NULL] AS l, {'k': 'é'} AS s, 'ab'::BLOB AS b, '\\xFF'::BLOB AS c, "
        "INTERVAL 1 DAY AS i"
    )
    assert command(lake, sql) == 0
    assert json.loads(capsys.readouterr().out) == [
        {
            "x": 1, "x_1": 2, "big": 2**127 - 1, "nan": None, "d": 1.5, "date": "2024-07-18", "l": [0.1, None],
            "s": {"k": "é"}, "b": "ab", "c": "base64:/w==", "i": "1 day, 0:00:00",
        }
    ]  # fmt: skip
    command(lake, "SELECT seq FROM ofi WHERE false")
    assert json.loads(capsys.readouterr().out) == []


def test_csv_has_every_row(lake: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command(lake, "SELECT seq, symbol, ofi_z, components FROM ofi ORDER BY symbol, seq", "csv") == 0
    lines = [*csv.reader(io.StringIO(capsys.readouterr().out))]
    assert lines[0] == ["seq", "symbol", "ofi_z", "components"]
    assert len(lines) == 241
    wanted = rows_of(lake, "SELECT seq, symbol, ofi_z, components FROM ofi ORDER BY symbol, seq")
    got = [(int(a), b, float(c) if c else None, json.loads(d)) for a, b, c, d in lines[1:]]
    assert got == wanted


def test_table_is_aligned_and_says_how_much_it_shows(lake: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command(lake, "SELECT 'a' AS name, 12 AS n UNION ALL SELECT 'long\nname', NULL ORDER BY n", "table") == 0
    assert capsys.readouterr().out == (
        "name          n\n---------  ----\na            12\nlong\N{REPLACEMENT CHARACTER}name  null\n(2 rows)\n"
    )
    assert command(lake, "SELECT seq FROM ofi ORDER BY seq", "table") == 0
    out = capsys.readouterr().out
    assert len(out.splitlines()) == cli.TABLE_ROWS + 3
    assert "the first 200 rows; --format csv or json gives all" in out


def test_the_newest_run_is_the_default(
    lake: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = types.ModuleType("orderflow.cli.runs")
    runs.default_out = lambda: lake  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "orderflow.cli.runs", runs)
    assert command(None, "SELECT count(*) AS n FROM prices") == 0
    assert json.loads(capsys.readouterr().out) == [{"n": 48}]


def test_a_folder_without_a_lake_answers_and_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command(tmp_path, "SELECT count(*) AS n FROM prices") == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out) == [{"n": 0}]
    assert "nothing has been written to" in captured.err


@pytest.mark.capture
def test_real_frames_come_back_from_the_raw_lake_byte_for_byte(tmp_path: Path, captures: Path) -> None:
    import gzip
    import itertools

    with gzip.open(captures / "usdm_btc_eth_20240718.gz", "rb") as file:
        lines = [line.rstrip(b"\n").split(b" ", 2) for line in itertools.islice(file, 20_000)]
    sink = LakeSink(tmp_path, 0, LakeConfig())
    for position, (received, route, frame) in enumerate(lines):
        each = journal(position + 1, 0, payload=frame) | {"recv_ts_ns": int(received), "route": route.decode()}
        sink.step(JOURNAL, each)
    (file,) = sink.write().files
    assert file.rows == len(lines)
    got = rows_of(tmp_path, "SELECT recv_ts_ns, route, payload FROM raw ORDER BY seq")
    assert [(str(a).encode(), b.encode(), c.encode()) for a, b, c in got] == [tuple(line) for line in lines]
    assert file.bytes < sum(len(frame) for _, _, frame in lines) / 3


def test_two_lakes_written_in_one_session_join(tmp_path: Path) -> None:
    sink = LakeSink(tmp_path, 0, LakeConfig())
    assert [*drive(sink, [*begin(1, T0_MS), *caused(2, T0_MS), *caused(3, T0_MS), *ending(4, T0_MS)])]
    joined = "SELECT f.seq, o.ofi_l1, c.cvd FROM fusion f JOIN ofi o USING (symbol, seq) JOIN cvd c USING (symbol, seq)"
    assert [row[0] for row in rows_of(tmp_path, joined + " ORDER BY 1")] == [2, 3]
