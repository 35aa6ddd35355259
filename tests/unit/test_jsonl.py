"""Signals as JSON Lines."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest
from lake_rows import T0_MS, Item, begin, drive, ending, record, session, tick, ticking, tree
from orderflow.config import SinksConfig
from orderflow.lake import files
from orderflow.lake.files import LakeWriteError
from orderflow.lake.layout import avro_fields
from orderflow.lake.signals import SignalSink
from orderflow.lake.sink import CutResult, FileSink
from orderflow.lake.sqlite import SignalDatabase
from orderflow.topics import SIGNALS, TICKS


def make(root: Path, **fields: Any) -> SignalSink:
    return SignalSink(root, 7, SinksConfig(signal_sink="jsonl", **fields), SignalDatabase(root))


def signal(seq: int, at_ms: int, symbol: str = "BTCUSDT", **fields: Any) -> Item:
    return SIGNALS, record(SIGNALS, seq, sub=0, symbol=symbol, ts_ms=at_ms - 150, recv_ts_ms=at_ms, **fields)


def test_one_file_per_symbol_and_minute(tmp_path: Path) -> None:
    items = [
        *begin(1, T0_MS - 1000),
        *ticking(2, T0_MS - 900),
        signal(3, T0_MS - 800),
        signal(3, T0_MS - 800, "币安/USDT"),
        signal(4, T0_MS + 5),  # received before the tick that crosses: it belongs to that minute's file
        *ticking(5, T0_MS + 10),
        signal(6, T0_MS + 20),
        *ticking(7, T0_MS + 200),
        *ticking(8, T0_MS + 60_000),
        signal(9, T0_MS + 60_010),
        *ending(10, T0_MS + 60_020),
    ]
    sink: FileSink = make(tmp_path)
    results = [*drive(sink, items)]
    assert [(cut.first_seq, cut.last_seq) for cut in results] == [(1, 5), (6, 8), (9, 10)]
    folder = "signals/jsonl/date=2024-07-1"
    assert {path: data.count(b"\n") for path, data in tree(tmp_path).items()} == {
        f"{folder}8/symbol=BTCUSDT/signals-s1-p07-20240718T2359-000000000001-000000000005.jsonl": 2,
        f"{folder}8/symbol=币安%2FUSDT/signals-s1-p07-20240718T2359-000000000001-000000000005.jsonl": 1,
        f"{folder}9/symbol=BTCUSDT/signals-s1-p07-20240719T0000-000000000006-000000000008.jsonl": 1,
        f"{folder}9/symbol=BTCUSDT/signals-s1-p07-20240719T0001-000000000009-000000000010.jsonl": 1,
    }


def test_lines_hold_every_field_in_the_schemas_order(tmp_path: Path) -> None:
    _, each = signal(1, T0_MS, score=0.1 + 0.2, proba=1e-7, z_ofi=None, gate_reasons=["spread", "é"])
    sink = make(tmp_path)
    sink.step(SIGNALS, dict(reversed(each.items())))
    (file,) = sink.write().files
    (line,) = (tmp_path / file.path).read_text("utf-8").splitlines()
    assert json.loads(line) == each
    assert list(json.loads(line)) == list(avro_fields(SIGNALS))
    assert '"score":0.30000000000000004,' in line


def test_a_minute_without_signals_leaves_no_file(tmp_path: Path) -> None:
    results = [*drive(make(tmp_path), [*begin(1, T0_MS), *ticking(2, T0_MS), *ticking(3, T0_MS + 60_000)])]
    assert results == [CutResult(1, 3, [])]
    assert tree(tmp_path) == {}


def test_rows_cut_at_the_next_tick_or_at_twice_as_many(tmp_path: Path) -> None:
    sink = make(tmp_path, max_rows=2)
    due = [sink.step(*signal(seq, T0_MS)) for seq in (1, 2, 3)]
    assert due == [False, False, False]
    assert sink.step(TICKS, tick(4, T0_MS))
    assert sink.write().files[0].rows == 3
    assert [sink.step(*signal(seq, T0_MS)) for seq in (5, 6, 7, 8)] == [False, False, False, True]
    sink.write()
    assert sink.cuts == {"rows": 2}


def test_many_signals_of_one_record_do_not_end_in_files_of_one_name(tmp_path: Path) -> None:
    """A backfill is one journal record and thousands of trades: a second file of its seq alone would replace the first."""
    sink = make(tmp_path, max_rows=1)
    cuts = drive(sink, [signal(6, T0_MS), *[signal(7, T0_MS)] * 10, signal(8, T0_MS), *ending(9, T0_MS)])
    held = sum(file.rows for cut in cuts for file in cut.files)
    assert held == sum(data.count(b"\n") for data in tree(tmp_path).values()) == 12


def test_another_session_is_cut_off_and_an_empty_one_leaves_no_trace(tmp_path: Path) -> None:
    items = [
        *begin(1, T0_MS, "s1"),
        *begin(2, T0_MS, "s2"),
        signal(3, T0_MS),
        *begin(4, T0_MS - 10**10, "s3"),
        *ticking(5, T0_MS - 10**10 + 120_000),
        signal(6, T0_MS),
        *ending(7, T0_MS),
    ]
    results = [*drive(make(tmp_path), items)]
    assert [(cut.first_seq, cut.last_seq) for cut in results] == [(2, 3), (4, 7)]
    assert sorted(Path(path).name.split("-")[1] for path in tree(tmp_path)) == ["s2", "s3"]


def test_a_restart_anywhere_leaves_the_same_files(tmp_path: Path) -> None:
    items = [(topic, each) for topic, each in session(frames=300, step_ms=700) if topic in SignalSink.inputs]
    [*drive(make(tmp_path / "whole"), items)]
    root = tmp_path / "killed"
    sink, position, committed, states = make(root), 0, 0, {}
    for stop in [*range(11, len(items), 29), len(items)]:
        while position < stop:
            topic, each = items[position]
            position += 1
            if sink.step(topic, each):
                sink.write()
                states, committed = sink.state(), position
        sink, position = make(root), committed
        if states:
            sink.restore(states)
    assert tree(root) == tree(tmp_path / "whole")
    assert len(tree(root)) > 5


def test_a_full_disk_leaves_nothing_and_keeps_the_signals(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, fails = files.write_all, [4]

    def write_all(descriptor: int, data: memoryview) -> None:
        if fails[0]:
            fails[0] -= 1
            os.write(descriptor, data[:10])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(descriptor, data)

    monkeypatch.setattr(files, "write_all", write_all)
    monkeypatch.setattr(files.time, "sleep", lambda seconds: None)
    sink = make(tmp_path)
    sink.step(*signal(1, T0_MS))
    with pytest.raises(LakeWriteError, match="free some space"):
        sink.write()
    assert tree(tmp_path) == {}
    assert sink.rows_buffered() == 1
    assert sink.write().files[0].rows == 1
    assert len(tree(tmp_path)) == 1
    assert sink.counted.of("write_errors") == 4


def test_none_follows_the_ticks_and_writes_nothing(tmp_path: Path) -> None:
    sink = SignalSink(tmp_path, 7, SinksConfig(signal_sink="none"), SignalDatabase(tmp_path))
    items = [*begin(1, T0_MS), signal(2, T0_MS), *ticking(3, T0_MS), signal(4, T0_MS), *ending(5, T0_MS)]
    assert [*drive(sink, items)] == [CutResult(1, 5, [])]
    assert tree(tmp_path) == {}


def test_what_a_dead_writer_left_goes(tmp_path: Path) -> None:
    left = tmp_path / f"signals/jsonl/date=2024-07-18/symbol=BTCUSDT/{files.TEMP_PREFIX}0-signals.jsonl.part"
    left.parent.mkdir(parents=True)
    left.write_bytes(b'{"half')
    make(tmp_path)
    assert not left.exists()
