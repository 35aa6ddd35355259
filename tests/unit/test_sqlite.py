"""Signals in SQLite."""

from __future__ import annotations

import logging
import math
import os
import shutil
import sqlite3
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from lake_rows import T0_MS, Item, begin, drive, ending, record, session, ticking, tree
from orderflow.cli.summary import disagreements, signal_counts
from orderflow.config import SinksConfig
from orderflow.lake import files
from orderflow.lake import sqlite as sqlite_module
from orderflow.lake.files import LakeWriteError
from orderflow.lake.layout import SIGNALS_DATABASE, LakeError, avro_fields
from orderflow.lake.signals import SignalSink
from orderflow.lake.sink import CutResult, FileWritten
from orderflow.lake.sqlite import SignalDatabase, columns, table_sql
from orderflow.topics import CVD, EVENTS, FEATURE_EVENTS, FUSION, OFI, REJECTS, SIGNALS
from small_disk import SmallDisk


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files.time, "sleep", lambda seconds: None)


def database(root: Path) -> SignalDatabase:
    return SignalDatabase(root, busy_sec=0.0, pause_sec=0.0)


def make(root: Path, partition: int = 7, **fields: Any) -> SignalSink:
    return SignalSink(root, partition, SinksConfig(signal_sink="sqlite", **fields), database(root))


def signal(seq: int, at_ms: int = T0_MS, symbol: str = "BTCUSDT", sub: int = 0, **fields: Any) -> Item:
    return SIGNALS, record(SIGNALS, seq, sub=sub, symbol=symbol, ts_ms=at_ms - 150, recv_ts_ms=at_ms, **fields)


def signals_of(root: Path) -> list[dict[str, Any]]:
    """Every row in the order of the key, as a reader who may only read gets it."""
    reader = sqlite3.connect(f"file:{root / SIGNALS_DATABASE}?mode=ro", uri=True)
    reader.row_factory = sqlite3.Row
    rows = [dict(row) for row in reader.execute("SELECT * FROM signals ORDER BY session, symbol, seq, sub")]
    reader.close()
    return rows


def compact(root: Path, name: str = "copy.sqlite") -> bytes:
    """The bytes of a copy made by VACUUM INTO."""
    copy = root / name
    copy.unlink(missing_ok=True)
    reader = sqlite3.connect(f"file:{root / SIGNALS_DATABASE}?mode=ro", uri=True)
    reader.execute("VACUUM INTO ?", (str(copy),))
    reader.close()
    return copy.read_bytes()


def cut(sink: SignalSink, *items: Item) -> CutResult:
    for topic, each in items:
        sink.step(topic, each)
    return sink.write()


def test_every_field_has_a_column_of_its_type(tmp_path: Path) -> None:
    known = record(
        SIGNALS,
        41,
        sub=2,
        symbol="币安/USDT",
        signal_id="币安/USDT-41-2-0011aabb",
        ts_ms=T0_MS,
        event_ts_ms=None,
        recv_ts_ms=T0_MS + 150,
        score=0.1 + 0.2,
        proba=None,
        z_ofi=math.inf,
        z_cvd=-0.0,
        confirm=True,
        gating=False,
        gate_reasons=["spread", 'é"\n'],
        direction=-1,
        consistency=math.nan,
        skew_ms=-(2**63),
        ttl_ms=2**63 - 1,
        scenario="A_H",
    )
    sink = make(tmp_path)
    [*drive(sink, [*begin(1, T0_MS, "s1"), (SIGNALS, known), *ending(42, T0_MS)])]
    (row,) = signals_of(tmp_path)
    as_kept = {"session": "s1", **known, "consistency": None, "gate_reasons": '["spread","é\\"\\n"]'}
    assert row == as_kept
    assert list(row) == ["session", *avro_fields(SIGNALS)]
    assert (type(row["confirm"]), type(row["score"]), math.copysign(1, row["z_cvd"])) == (int, float, 1.0)
    reader = sqlite3.connect(tmp_path / SIGNALS_DATABASE)
    described = reader.execute("PRAGMA table_info(signals)").fetchall()
    assert {name: kind for _, name, kind, *_ in described} == {
        name: declared.split()[0] for name, declared in columns().items()
    }
    assert [name for *_, name in sorted((place, name) for _, name, _, _, _, place in described if place)] == [
        "session", "symbol", "seq", "sub",
    ]  # fmt: skip
    assert reader.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    with pytest.raises(sqlite3.IntegrityError, match=r"TEXT value in INTEGER column signals\.seq"):
        reader.execute("UPDATE signals SET seq = 'x'")
    reader.close()


def test_a_commit_waits_for_the_disk(tmp_path: Path) -> None:
    """Or a loss of power could take back what the commit record in Kafka calls written."""
    made = database(tmp_path)
    sink = SignalSink(tmp_path, 7, SinksConfig(signal_sink="sqlite"), made)
    cut(sink, signal(1))
    assert made._connection is not None
    assert made._connection.execute("PRAGMA synchronous").fetchone() == (2,)


def test_signals_of_one_seq_are_all_kept(tmp_path: Path) -> None:
    """A backfill is one journal record and many trades."""
    cut(make(tmp_path), signal(5), signal(5, sub=1), signal(5, sub=2), signal(5, symbol="ETHUSDT"))
    assert [(row["symbol"], row["seq"], row["sub"]) for row in signals_of(tmp_path)] == [
        ("BTCUSDT", 5, 0),
        ("BTCUSDT", 5, 1),
        ("BTCUSDT", 5, 2),
        ("ETHUSDT", 5, 0),
    ]


def test_a_cut_made_again_changes_nothing(tmp_path: Path) -> None:
    items = [signal(1), signal(1, symbol="ETHUSDT"), signal(2, consistency=math.nan, z_ofi=-0.0)]
    (first,) = cut(make(tmp_path), *items).files
    assert (first.path, first.rows, first.made) == (SIGNALS_DATABASE, 3, True)
    before = signals_of(tmp_path), compact(tmp_path)
    again = make(tmp_path)
    assert cut(again, *items).files == [FileWritten(SIGNALS_DATABASE, 3, 0, made=False)]
    # A zombie's cut, whose successor is further already.
    successor, zombie = make(tmp_path), make(tmp_path)
    cut(successor, *items)
    cut(successor, signal(3))
    cut(zombie, *items)
    assert len(signals_of(tmp_path)) == 4
    assert signals_of(tmp_path)[:2] == before[0][:2]
    assert zombie.counted.of("files") == successor.counted.of("files") == 0


def test_both_forms_share_the_cut(tmp_path: Path) -> None:
    sink = SignalSink(tmp_path, 7, SinksConfig(signal_sink="jsonl,sqlite"), database(tmp_path))
    (result,) = drive(sink, [*begin(1, T0_MS), signal(2), signal(3, symbol="ETHUSDT"), *ending(4, T0_MS)])
    assert [(Path(file.path).suffix, file.rows) for file in result.files] == [
        (".sqlite", 2),
        (".jsonl", 1),
        (".jsonl", 1),
    ]
    assert sink.counted.by_cause("rows") == {"signals": 2, "sqlite": 2}
    assert len(signals_of(tmp_path)) == 2


def test_a_session_without_signals_makes_no_file(tmp_path: Path) -> None:
    items = [*begin(1, T0_MS), *ticking(2, T0_MS), *ticking(3, T0_MS + 60_000), *ending(4, T0_MS + 60_000)]
    assert [*drive(make(tmp_path), items)] == [CutResult(1, 3, []), CutResult(4, 4, [])]
    assert tree(tmp_path) == {}


def test_a_restart_anywhere_and_another_order_leave_the_same_bytes(tmp_path: Path) -> None:
    items = [(topic, each) for topic, each in session(frames=300, step_ms=700) if topic in SignalSink.inputs]
    [*drive(make(tmp_path / "whole"), items)]
    other = [(topic, each) for topic, each in session(symbols=["XRPUSDT"]) if topic in SignalSink.inputs]
    [*drive(make(tmp_path / "whole", 8), other)]
    root = tmp_path / "killed"
    [*drive(make(root, 8), other)]
    sink, position, committed, states = make(root), 0, 0, {}
    for stop in [*range(11, len(items), 29), len(items)]:
        while position < stop:
            topic, each = items[position]
            position += 1
            if sink.step(topic, each):
                sink.write()
                if stop % 2:  # else killed between the transaction and the commit record
                    states, committed = sink.state(), position
        sink, position = make(root), committed
        if states:
            sink.restore(states)
    assert signals_of(root) == signals_of(tmp_path / "whole")
    assert len(signals_of(root)) == 600
    assert compact(root) == compact(tmp_path / "whole")


def test_another_computations_signals_are_neither_changed_nor_mixed_with(tmp_path: Path) -> None:
    cut(make(tmp_path), signal(1, score=1.0), signal(3, score=1.0))
    before = signals_of(tmp_path)
    sink = make(tmp_path)
    with pytest.raises(
        LakeError, match=r"session  symbol BTCUSDT seq 3 sub 0 has score 1\.0, and 2\.5 is to be written"
    ):
        cut(sink, signal(1, score=1.0), signal(2), signal(3, score=2.5))
    assert sink.rows_buffered() == 3
    with pytest.raises(LakeError, match=r"seq 3 sub 0 is there, and no such signal is to be written.*DATA_DIR"):
        cut(make(tmp_path), signal(1, score=1.0), signal(4))
    assert signals_of(tmp_path) == before


def test_a_reader_who_began_within_a_session_writes_nothing_twice(tmp_path: Path) -> None:
    """The log no longer holds the record that names the session: STATE_REBUILD after retention."""
    items = [*begin(1, T0_MS, "s1"), signal(2), signal(3), *ending(4, T0_MS)]
    [*drive(make(tmp_path), items)]
    before = signals_of(tmp_path)
    [*drive(make(tmp_path), items[3:])]
    assert signals_of(tmp_path) == before
    [*drive(make(tmp_path), [signal(2, symbol="NEWUSDT"), *ending(4, T0_MS)])]
    assert [(row["session"], row["symbol"]) for row in signals_of(tmp_path)] == [
        ("", "NEWUSDT"),
        ("s1", "BTCUSDT"),
        ("s1", "BTCUSDT"),
    ]


def test_a_reader_sees_whole_cuts_at_any_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[str, int]] = []

    def look(name: str) -> None:
        if name.startswith("rows-"):
            seen.append((name, len(signals_of(tmp_path))))

    sink = make(tmp_path)
    cut(sink, signal(1))
    monkeypatch.setattr(sqlite_module.crash, "point", look)
    long_reader = sqlite3.connect(f"file:{tmp_path / SIGNALS_DATABASE}?mode=ro", uri=True)
    long_reader.execute("BEGIN")
    count = "SELECT count(*) FROM signals"
    assert long_reader.execute(count).fetchone() == (1,)
    cut(sink, signal(2), signal(3))
    cut(sink, signal(4))
    assert seen == [("rows-inserted", 1), ("rows-committed", 3), ("rows-inserted", 3), ("rows-committed", 4)]
    assert long_reader.execute(count).fetchone() == (1,)
    long_reader.close()


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A folder that everybody may read, as those of pytest are not."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        yield Path(folder)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody who may not write")
def test_a_reader_needs_no_right_to_write(open_folder: Path) -> None:
    made = database(open_folder)
    cut(SignalSink(open_folder, 7, SinksConfig(signal_sink="sqlite"), made), signal(1))
    code = (
        "import os, sqlite3, sys\n"
        "os.setgid(65534), os.setuid(65534)\n"
        "print(sqlite3.connect(sys.argv[1], uri=True).execute('SELECT count(*) FROM signals').fetchone())\n"
    )

    def read(options: str) -> str:
        uri = f"file:{open_folder / SIGNALS_DATABASE}?{options}"
        done = subprocess.run([sys.executable, "-c", code, uri], capture_output=True, text=True, check=False)
        return done.stdout.strip() or done.stderr.strip().rpartition("\n")[2]

    assert read("mode=ro") == "(1,)"  # while the service lives
    made.close()
    assert [*tree(open_folder)] == [SIGNALS_DATABASE]
    assert "readonly" in read("mode=ro")
    assert read("mode=ro&immutable=1") == "(1,)"


# -- what can go wrong ------------------------------------------------------------------------------------------------


def test_a_lock_held_by_another_program_is_waited_for(tmp_path: Path) -> None:
    sink = make(tmp_path)
    cut(sink, signal(1))
    other = sqlite3.connect(tmp_path / SIGNALS_DATABASE, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    with pytest.raises(
        LakeWriteError, match=r"database is locked.*end the transaction, or the program, that holds its lock"
    ):
        cut(sink, signal(2))
    assert sink.rows_buffered() == 1
    assert sink.counted.of("write_errors") == 4
    other.execute("ROLLBACK")
    assert sink.write().files[0].rows == 1
    assert [row["seq"] for row in signals_of(tmp_path)] == [1, 2]
    other.close()


def test_after_a_failure_the_other_partitions_do_not_wait_each_in_its_turn(tmp_path: Path) -> None:
    shared = SignalDatabase(tmp_path, busy_sec=0.0, pause_sec=1e9)
    sinks = [SignalSink(tmp_path, partition, SinksConfig(signal_sink="sqlite"), shared) for partition in (1, 2)]
    (tmp_path / "signals").write_bytes(b"a file where the folder should be")
    with pytest.raises(LakeWriteError) as first:
        cut(sinks[0], signal(1))
    (tmp_path / "signals").unlink()
    with pytest.raises(LakeWriteError) as second:
        cut(sinks[1], signal(1, symbol="ETHUSDT"))
    assert str(first.value) == str(second.value)
    assert "Not a directory" in str(first.value)
    assert (sinks[0].counted.of("write_errors"), sinks[1].counted.of("write_errors")) == (4, 0)
    assert tree(tmp_path) == {}


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[SmallDisk]:
    disk = SmallDisk(tmp_path / "disk")
    disk.mount("2m")
    yield disk
    disk.unmount()


def test_a_disk_that_fills_up_anywhere_keeps_the_signals_and_loses_none(small_disk: SmallDisk, tmp_path: Path) -> None:
    """Page by page less room, so that every write of a transaction comes to be the one that fails."""
    items = [signal(seq, gate_reasons=["x" * 300]) for seq in range(1, 80)]
    cut(make(tmp_path / "whole"), *items)
    outcomes = set()
    ballast = small_disk.folder / "ballast"
    for pages in range(0, 60, 2):
        root = small_disk.folder / str(pages)
        made = database(root)
        sink = SignalSink(root, 7, SinksConfig(signal_sink="sqlite"), made)
        cut(sink, *items[:20])
        free = os.statvfs(small_disk.folder)
        ballast.write_bytes(bytes(max(0, (free.f_bavail - pages) * free.f_frsize)))
        try:
            cut(sink, *items[20:])
            outcomes.add("written")
        except LakeWriteError as error:
            assert "free some space" in str(error) or "see to the disk" in str(error), error
            outcomes.add("refused")
            assert sink.rows_buffered() == 59
            ballast.unlink()
            assert len(signals_of(root)) == 20
            sink.write()
        ballast.unlink(missing_ok=True)
        assert signals_of(root) == signals_of(tmp_path / "whole")
        made.close()
        shutil.rmtree(root)
    assert outcomes == {"written", "refused"}


@pytest.mark.parametrize("where", [0, 4096 * 2 + 100], ids=["head", "page"])
def test_a_damaged_file_is_named_with_what_to_do(tmp_path: Path, where: int) -> None:
    made = database(tmp_path)
    first = SignalSink(tmp_path, 7, SinksConfig(signal_sink="sqlite"), made)
    cut(first, *(signal(seq) for seq in range(1, 200)))
    state = first.state()
    made.close()
    path = tmp_path / SIGNALS_DATABASE
    with path.open("r+b") as file:
        file.seek(where)
        file.write(b"\xff" * 4096)
    sink = make(tmp_path)
    sink.restore(state)
    with pytest.raises(LakeError, match=r"is damaged \(.*move the file away.*STATE_REBUILD=true"):
        cut(sink, *(signal(seq) for seq in range(1, 210)))
    assert sink.rows_buffered() == 209
    path.rename(tmp_path / "damaged")
    sink.write()
    assert len(signals_of(tmp_path)) == 209


def test_another_table_is_refused_and_named(tmp_path: Path) -> None:
    path = tmp_path / SIGNALS_DATABASE
    path.parent.mkdir()
    other = sqlite3.connect(path)
    other.execute(table_sql().replace("  sl_bps REAL,", "  note TEXT,"))
    other.commit()
    sink = make(tmp_path)
    with pytest.raises(LakeError, match="has another table 'signals', without sl_bps and with note: stop the service"):
        cut(sink, signal(1))
    other.execute("DROP TABLE signals")
    other.execute(table_sql().replace("STRICT, ", ""))
    other.commit()
    with pytest.raises(LakeError, match="of other types or another key"):
        sink.write()
    other.execute("DROP TABLE signals")
    other.commit()
    other.close()
    assert sink.write().files[0].rows == 1


def test_a_file_that_goes_away_is_made_anew_and_said_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    sink = make(tmp_path)
    cut(sink, signal(1), signal(2))
    for path in (tmp_path / "signals").iterdir():
        path.unlink()
    assert cut(sink, signal(3)).files[0].made
    assert [row["seq"] for row in signals_of(tmp_path)] == [3]
    assert "was moved or removed while it was in use" in caplog.text
    assert "begins with seq 3 of partition 7: 2 signals of this partition were written before" in caplog.text
    caplog.clear()
    restarted = make(tmp_path / "elsewhere")
    restarted.restore(sink.state())
    cut(restarted, signal(4))
    assert "begins with seq 4 of partition 7: 3 signals of this partition were written before" in caplog.text
    caplog.clear()
    cut(make(tmp_path / "new"), signal(1))
    assert caplog.text == ""


def test_a_value_of_another_type_is_refused(tmp_path: Path) -> None:
    sink = make(tmp_path)
    with pytest.raises(LakeError, match=r"cannot store TEXT value in INTEGER column.*decoded with the topic's schema"):
        cut(sink, signal(1, ttl_ms="soon"))


def test_an_old_sqlite_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sqlite_module.sqlite3, "sqlite_version_info", (3, 31, 1))
    with pytest.raises(LakeError, match=r"needs SQLite 3\.37\.0 or newer.*leave sqlite out of SIGNAL_SINK"):
        cut(make(tmp_path), signal(1))


def test_a_runs_summary_counts_the_signals_of_each_form(tmp_path: Path) -> None:
    sink = SignalSink(tmp_path, 7, SinksConfig(signal_sink="jsonl,sqlite"), database(tmp_path))
    cut(sink, signal(1), signal(2), signal(2, symbol="A B?#"))
    assert signal_counts(tmp_path, ("jsonl", "sqlite")) == {"jsonl": 3, "sqlite": 3}
    assert signal_counts(tmp_path, ()) == {}
    assert signal_counts(tmp_path / "empty", ("sqlite",)) == {"sqlite": 0}
    (tmp_path / SIGNALS_DATABASE).write_bytes(b"no database" * 1000)
    with pytest.raises(LakeError, match="can't be read: file is not a database"):
        signal_counts(tmp_path, ("sqlite",))


def test_files_of_signals_that_lack_some_are_named() -> None:
    names = (OFI, CVD, FUSION, SIGNALS, EVENTS, FEATURE_EVENTS, REJECTS)
    topics: dict[str, Any] = {"topics": dict.fromkeys(names, 0) | {SIGNALS: 3}, "rows": {}}
    kinds = ("ofi", "cvd", "fusion", "signals", "prices", "quotes", "book", "events", "rejects")
    lake: dict[str, Any] = {"rows": {kind: {} for kind in kinds} | {"signals": {"BTCUSDT": 3}}}
    assert disagreements(topics, lake, {"jsonl": 3, "sqlite": 2}) == [
        "signals has 3 records and the files of the sink sqlite 2"
    ]
