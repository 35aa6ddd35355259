"""The lake's sink: when it cuts, what it writes, and that nothing but the records decides either."""

from __future__ import annotations

import base64
import errno
import fcntl
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import pyarrow.parquet as pq
import pytest
import zstandard
from lake_rows import T0_MS, Item, begin, caused, drive, ending, journal, record, session, tick, ticking, tree
from orderflow.errors import OrderflowError
from orderflow.lake import files
from orderflow.lake.files import LakeWriteError
from orderflow.lake.layout import LakeError
from orderflow.lake.parquet import LakeSink, ReceiveRate
from orderflow.lake.raw import raw_record
from orderflow.lake.settings import LakeConfig
from orderflow.lake.sink import CutResult, CutSink, FileSink, give_back
from orderflow.streaming.service import resident_mb
from orderflow.topics import EVENTS, JOURNAL, OFI, REJECTS, ROWS, TICKS

DATA = "data/ofi_cvd"


def make(root: Path, **fields: Any) -> LakeSink:
    batch_rows = fields.pop("batch_rows", 4096)
    return LakeSink(root, 3, LakeConfig(**fields), fingerprint="f" * 64, batch_rows=batch_rows)


def cuts_of(sink: FileSink, items: list[Item]) -> list[tuple[int, int]]:
    return [(cut.first_seq, cut.last_seq) for cut in drive(sink, items)]


@pytest.fixture
def no_wait(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    waited: list[float] = []
    monkeypatch.setattr(files.time, "sleep", waited.append)
    return waited


# -- the rule -----------------------------------------------------------------------------------------------------


def test_a_cut_follows_the_tick_that_crosses_a_multiple_of_the_period(tmp_path: Path) -> None:
    items = [
        *begin(1, T0_MS - 500),
        *ticking(2, T0_MS - 400),
        *caused(3, T0_MS + 10),  # the data crosses the minute; only a tick cuts
        *ticking(4, T0_MS - 1),
        *ticking(5, T0_MS),
        *ticking(6, T0_MS + 59_999),
        *ticking(7, T0_MS + 60_000),
        *ticking(8, T0_MS + 300_000),  # several minutes at once are one cut
        *ending(9, T0_MS + 300_001),
    ]
    sink = make(tmp_path)
    assert cuts_of(sink, items) == [(1, 5), (6, 7), (8, 8), (9, 9)]
    assert sink.cuts == {"clock": 3, "end": 1}


def test_a_cut_takes_everything_that_its_tick_caused(tmp_path: Path) -> None:
    event = (EVENTS, record(EVENTS, 3, sub=0, ts_ms=T0_MS, recv_ts_ms=T0_MS, event_type="stale"))
    items = [*begin(1, T0_MS - 2), *ticking(2, T0_MS - 1), (JOURNAL, journal(3, T0_MS, "tick")), event]
    sink = make(tmp_path)
    assert not [sink.step(topic, each) for topic, each in items if sink.step(topic, each)]
    assert sink.step(TICKS, tick(3, T0_MS))
    paths = [file.path for file in sink.write().files]
    assert any("kind=events" in path for path in paths)


def test_ticks_come_last_and_every_other_topic_that_is_kept_comes_before() -> None:
    assert LakeSink.inputs[-1] == TICKS
    assert LakeSink.inputs[0] == JOURNAL


def test_rows_cut_at_the_next_tick(tmp_path: Path) -> None:
    items = begin(1, T0_MS)
    for seq in range(2, 12):
        items += ticking(seq, T0_MS + seq) if seq % 4 == 0 else caused(seq, T0_MS + seq, src="bookTicker")
    sink = make(tmp_path, max_rows=12)
    # 5 rows a frame, 3 more where 5 divides seq: 10 by seq 4, which is too few; 28 by seq 8.
    assert cuts_of(sink, items) == [(1, 8)]
    assert sink.cuts == {"rows": 1}


def test_raw_lines_do_not_count_as_rows(tmp_path: Path) -> None:
    items = begin(1, T0_MS) + [item for seq in range(2, 50) for item in ticking(seq, T0_MS + seq)]
    sink = make(tmp_path, max_rows=1)
    assert cuts_of(sink, items) == []
    assert sink.rows_buffered() == 49


def test_without_any_tick_twice_the_rows_cut_and_names_stay_distinct(tmp_path: Path) -> None:
    items = begin(1, T0_MS) + [item for seq in range(2, 40) for item in caused(seq, T0_MS + seq)]
    sink = make(tmp_path, max_rows=20)
    results = [*drive(sink, items)]
    assert len(results) >= 3
    paths = [file.path for result in results for file in result.files]
    assert len(paths) == len(set(paths))
    rows = sum(file.rows for result in results for file in result.files)
    assert rows + sink.rows_buffered() == sum(topic != TICKS for topic, _ in items)


def test_rejected_payloads_are_bounded_in_bytes(tmp_path: Path) -> None:
    sink = make(tmp_path)
    big = b"x" * (16 << 20)
    for seq in range(1, 5):
        assert not sink.step(REJECTS, record(REJECTS, seq, sub=0, payload=big))
        assert sink.step(TICKS, tick(seq, T0_MS)) is (seq == 4)


def test_the_end_cuts(tmp_path: Path) -> None:
    sink = make(tmp_path)
    assert cuts_of(sink, [*begin(1, T0_MS), *caused(2, T0_MS), *ending(3, T0_MS + 1)]) == [(1, 3)]
    assert sink.rows_buffered() == 0


def test_another_session_is_cut_off_before_it_begins(tmp_path: Path) -> None:
    items = [
        *begin(1, T0_MS, "s1"),
        *caused(2, T0_MS),
        *ticking(3, T0_MS),
        *begin(4, T0_MS - 86_400_000, "s/2"),  # the clock goes back, and that is no crossing
        *ticking(5, T0_MS - 86_400_000 + 120_000),
        *caused(6, T0_MS - 86_400_000 + 120_000),
        *ending(7, T0_MS - 86_400_000 + 120_001),
    ]
    sink = make(tmp_path)
    results = [*drive(sink, items)]
    assert [(each.first_seq, each.last_seq) for each in results] == [(1, 3), (4, 7)]
    assert sink.cuts == {"session": 1, "end": 1}
    assert {Path(file.path).name.split("-p03")[0] for file in results[0].files} == {"part-s1"}
    assert {Path(file.path).name.split("-p03")[0] for file in results[1].files} == {"part-s%2F2"}


def test_a_change_of_configuration_and_the_ticks_echo_of_a_session_do_not_cut(tmp_path: Path) -> None:
    sink = make(tmp_path)
    (_, first), (_, echo) = begin(1, T0_MS)
    assert not sink.cut_before(JOURNAL, first), "nothing is buffered"
    sink.step(JOURNAL, first)
    assert not sink.cut_before(TICKS, echo)
    assert not sink.cut_before(JOURNAL, journal(2, T0_MS, "config", b'{"type":"weights"}'))
    assert not sink.cut_before(JOURNAL, journal(2, T0_MS, "config", b"\xff"))
    assert not sink.cut_before(JOURNAL, journal(2, T0_MS, "end"))
    assert sink.cut_before(JOURNAL, begin(2, T0_MS, "s2")[0][1])


# -- what is written ----------------------------------------------------------------------------------------------


def test_every_row_is_in_the_file_of_its_kind_symbol_and_date(tmp_path: Path) -> None:
    items = session(first_ms=T0_MS - 60_000, frames=240, symbols=["BTCUSDT", "币安/USDT", "A_B"])
    sink = make(tmp_path)
    results = [*drive(sink, items)]
    on_disk = set(tree(tmp_path))
    assert on_disk == {file.path for result in results for file in result.files}
    dates = {path.split("date=")[1][:10] for path in on_disk}
    assert dates == {"2024-07-18", "2024-07-19"}
    assert {path.split("symbol=")[1].split("/")[0] for path in on_disk if "symbol=" in path} == {
        "BTCUSDT", "币安%2FUSDT", "A_B", "_",
    }  # fmt: skip
    counted: dict[str, int] = {}
    for path in on_disk:
        if path.startswith(DATA):
            table = pq.read_table(tmp_path / path, partitioning=None)
            kind = path.split("kind=")[1].split("/")[0]
            counted[kind] = counted.get(kind, 0) + table.num_rows
            if kind != "rejects":
                days = {time // 86_400_000 for time in table["ts_ms"].to_pylist()}
                assert days == {19_922 if "2024-07-18" in path else 19_923}
            assert table["seq"].to_pylist() == sorted(table["seq"].to_pylist())
    wanted = {topic: sum(each == topic for each, _ in items) for topic, _ in items}
    assert counted == {
        "prices": 48, "quotes": 48, "book": 48, "marks": 48, "liquidations": 48, "ofi": 240, "cvd": 240,
        "fusion": 240, "signals": 240, "events": wanted[EVENTS] + wanted["features.events"],
        "rejects": wanted[REJECTS],
    }  # fmt: skip
    assert sink.counted.by_cause("rows") == counted | {"raw": wanted[JOURNAL]}
    assert sink.counted.of("files") == len(on_disk)
    assert sink.counted.of("bytes") == sum(len(data) for data in tree(tmp_path).values())
    assert sink.last_flush_sec > 0


def test_a_cut_may_span_two_dates(tmp_path: Path) -> None:
    items = [*begin(1, T0_MS - 10), *caused(2, T0_MS - 5), *caused(3, T0_MS + 200), *ending(4, T0_MS + 201)]
    (cut,) = drive(make(tmp_path), items)
    for kind in ("prices", "ofi", "cvd", "fusion", "signals"):
        paths = [file.path for file in cut.files if f"kind={kind}/" in file.path]
        assert [path.split("date=")[1][:10] for path in paths] == ["2024-07-18", "2024-07-19"]
        assert len({Path(path).name for path in paths}) == 1
    raw = {file.path.split("date=")[1][:10]: file.rows for file in cut.files if file.path.startswith("data/raw")}
    assert raw == {"2024-07-18": 2, "2024-07-19": 2}, "raw goes by receive date"


def test_the_footer_names_the_cut_and_the_configuration(tmp_path: Path) -> None:
    (cut,) = drive(make(tmp_path), [*begin(1, T0_MS), *caused(2, T0_MS), *ending(3, T0_MS)])
    path = next(file.path for file in cut.files if "kind=fusion" in file.path)
    metadata = pq.read_metadata(tmp_path / path)
    named = {key.decode(): value.decode() for key, value in metadata.metadata.items()}
    del named["ARROW:schema"]
    assert named == {
        "orderflow.session": "s1",
        "orderflow.partition": "3",
        "orderflow.first_seq": "1",
        "orderflow.last_seq": "3",
        "orderflow.config_fingerprint": "f" * 64,
    }
    assert metadata.num_row_groups == 1
    assert {metadata.row_group(0).column(i).compression for i in range(metadata.num_columns)} == {"SNAPPY"}


def test_book_levels_are_lists_under_the_names_users_know(tmp_path: Path) -> None:
    row = record(ROWS, 1, sub=0, src="depth", bid_px=[3.0, 2.0], bid_qtys=[1.5, 0.5], ask_px=[], ask_qtys=[])
    sink = make(tmp_path)
    sink.step(ROWS, row)
    (file,) = sink.write().files
    table = pq.read_table(tmp_path / file.path, partitioning=None)
    assert table["bid_px"].to_pylist() == [[3.0, 2.0]]
    assert table["bid_qty"].to_pylist() == [[1.5, 0.5]]
    assert table["ask_px"].to_pylist() == table["ask_qty"].to_pylist() == [[]]


def test_a_row_of_a_source_that_is_not_known_is_counted(tmp_path: Path) -> None:
    sink = make(tmp_path)
    sink.step(ROWS, record(ROWS, 1, src="unknown"))
    assert sink.rows_skipped == {"unknown": 1}
    assert sink.write() == CutResult(1, 1, [])


def test_the_journal_is_kept_whole_and_readable(tmp_path: Path) -> None:
    payloads = [b'{"a":"\xc3\xa9\\u2028\\n"}', b"\xff\x00", b"", b'{"x":1.10}', "line\u2028\n\0".encode()]
    records = [journal(seq, T0_MS + seq, "frame", payload) for seq, payload in enumerate(payloads, 1)]
    sink = make(tmp_path)
    for each in records:
        sink.step(JOURNAL, each)
    (file,) = sink.write().files
    assert file.path == "data/raw/date=2024-07-19/partition=03/part-unknown-p03-000000000001-000000000005.ndjson.zst"
    plain = zstandard.ZstdDecompressor().decompressobj().decompress((tmp_path / file.path).read_bytes())
    lines = plain.split(b"\n")
    assert lines.pop() == b""
    assert [raw_record(line) for line in lines] == records
    parsed = [msgspec.json.decode(line) for line in lines]
    assert [each["payload_encoding"] for each in parsed] == ["utf-8", "base64", "utf-8", "utf-8", "utf-8"]
    assert base64.b64decode(parsed[1]["payload"]) == b"\xff\x00"
    assert list(parsed[0]) == [
        "seq", "kind", "route", "symbol", "recv_ts_ns", "source_position", "ordinal", "epoch", "session", "payload",
        "payload_encoding",
    ]  # fmt: skip


def test_a_raw_line_of_another_encoding_is_refused() -> None:
    with pytest.raises(ValueError, match=r"payload_encoding is 'hex': it must be utf-8 or base64"):
        raw_record(b'{"payload":"00","payload_encoding":"hex"}')


def test_the_receive_rate_counts_the_trailing_ten_seconds() -> None:
    rate = ReceiveRate()
    assert [rate.add(time) for time in (0, 0, 5_000, 9_999, 10_000, 10_001)] == [0.1, 0.2, 0.3, 0.4, 0.3, 0.4]
    assert rate.add(9_000) == 0.5, "a receive time that goes back counts as the newest"
    assert ReceiveRate(rate.runs()).add(15_001) == rate.add(15_001) == 0.5


# -- only the records decide --------------------------------------------------------------------------------------


def test_the_same_records_give_the_same_bytes_whatever_the_batches(tmp_path: Path) -> None:
    items = session(frames=200)
    trees = []
    for batch_rows in (1, 7, 4096):
        root = tmp_path / str(batch_rows)
        assert [*drive(make(root, batch_rows=batch_rows), items)]
        trees.append(tree(root))
    assert trees[0] == trees[1] == trees[2]
    assert len(trees[0]) > 30


def test_a_restart_anywhere_leaves_the_same_lake(tmp_path: Path) -> None:
    items = session(frames=300, step_ms=700)
    [*drive(make(tmp_path / "whole", max_rows=400), items)]
    whole = tree(tmp_path / "whole")
    root = tmp_path / "killed"
    sink, position, committed, states = make(root, max_rows=400), 0, 0, {}
    for stop in [*range(37, len(items), 113), len(items)]:
        while position < stop:
            topic, each = items[position]
            position += 1
            if sink.step(topic, each):
                sink.write()
                states, committed = sink.state(), position
        # The process dies: buffers are gone, the next one goes on from the newest cut.
        sink, position = make(root, max_rows=400), committed
        if states:
            sink.restore(states)
    assert tree(root) == whole


def test_a_cut_written_and_not_committed_is_written_again_alike(tmp_path: Path) -> None:
    items = session(frames=100)
    [*drive(make(tmp_path), items)]
    once = tree(tmp_path)
    [*drive(make(tmp_path), items)]
    assert tree(tmp_path) == once


def test_state_is_small_and_carries_clock_session_and_rates(tmp_path: Path) -> None:
    sink = make(tmp_path)
    [*drive(sink, session(frames=60))]
    states = sink.state()
    assert sorted(states) == ["", "rate:BTCUSDT", "rate:ETHUSDT"]
    again = make(tmp_path / "again")
    again.restore(states)
    assert again.state() == states
    row = record(ROWS, 500, sub=0, src="aggTrade", recv_ts_ms=T0_MS + 1000 + 60 * 500)
    for each in (sink, again):
        each.step(ROWS, row)
        (file,) = each.write().files
        assert (each.root / file.path).read_bytes() == (tmp_path / file.path).read_bytes()


@pytest.mark.parametrize("states", [{}, {"": b"\xc1"}, {"": msgspec.msgpack.encode([1])}])
def test_a_state_that_is_none_is_refused(tmp_path: Path, states: dict[str, bytes]) -> None:
    with pytest.raises(LakeError, match="start once with STATE_REBUILD=true and another DATA_DIR"):
        make(tmp_path).restore(states)


def test_a_value_that_does_not_fit_is_named_and_nothing_is_written(tmp_path: Path) -> None:
    sink = make(tmp_path)
    sink.step(OFI, record(OFI, 1, ofi_l1=None))
    with pytest.raises(LakeError, match=r"kind=ofi symbol=BTCUSDT: .* the column ofi_l1: row 0 has none"):
        sink.write()
    sink = make(tmp_path)
    sink.step(OFI, record(OFI, 1, ofi_l1="much"))
    with pytest.raises(LakeError, match="the column ofi_l1"):
        sink.write()
    assert tree(tmp_path) == {}


# -- the disk -----------------------------------------------------------------------------------------------------


def full_disk(monkeypatch: pytest.MonkeyPatch, after: int, fails: int, number: int = errno.ENOSPC) -> None:
    """Let `after` files through, then fail `fails` times, half of the bytes written."""
    real, seen = files.write_all, [0]

    def write_all(descriptor: int, data: memoryview) -> None:
        seen[0] += 1
        if after < seen[0] <= after + fails:
            os.write(descriptor, data[: len(data) // 2])
            raise OSError(number, os.strerror(number))
        real(descriptor, data)

    monkeypatch.setattr(files, "write_all", write_all)


def test_a_full_disk_is_tried_again_and_then_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_wait: list[float]
) -> None:
    items = [*begin(1, T0_MS), *caused(2, T0_MS), *ending(3, T0_MS)]
    [*drive(make(tmp_path / "whole"), items)]
    root = tmp_path / "full"
    sink = make(root)
    full_disk(monkeypatch, after=2, fails=4)
    with pytest.raises(LakeWriteError) as caught:
        [*drive(sink, items)]
    message = str(caught.value)
    assert "kind=ofi" in message
    assert os.strerror(errno.ENOSPC) in message
    assert " bytes are free" in message
    assert "free some space" in message
    assert isinstance(caught.value, OrderflowError)
    assert no_wait == [0.1, 0.4, 1.6]
    assert sink.counted.of("write_errors") == 4
    assert sink.counted.of("files") == 0
    assert not [path for path in tree(root) if Path(path).name.startswith(".")], "nothing half-written stays"
    waiting = sink.rows_buffered()
    assert waiting > 0
    sink.write()  # the disk has room again
    assert tree(root) == tree(tmp_path / "whole")
    assert sink.rows_buffered() == 0
    assert sum(sink.counted.by_cause("rows").values()) == waiting


def test_a_failure_that_passes_costs_a_retry_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_wait: list[float]
) -> None:
    sink = make(tmp_path)
    full_disk(monkeypatch, after=0, fails=2, number=errno.EIO)
    assert [*drive(sink, [*begin(1, T0_MS), *caused(2, T0_MS), *ending(3, T0_MS)])]
    assert no_wait == [0.1, 0.4]
    assert sink.counted.of("write_errors") == 2


def test_a_record_after_a_failed_cut_is_refused_not_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_wait: list[float]
) -> None:
    sink = make(tmp_path)
    sink.step(JOURNAL, journal(1, T0_MS))
    full_disk(monkeypatch, after=0, fails=4)
    with pytest.raises(LakeWriteError):
        sink.write()
    with pytest.raises(ValueError, match=r"call write\(\) until it succeeds"):
        sink.step(JOURNAL, journal(2, T0_MS))


@pytest.mark.parametrize("damage", ["cut", "rows"])
def test_what_does_not_read_back_is_not_renamed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_wait: list[float], damage: str
) -> None:
    real = files.write_all
    sink = make(tmp_path)
    sink.step(OFI, record(OFI, 1))
    other = make(tmp_path / "other")
    other.step(OFI, record(OFI, 1))
    other.step(OFI, record(OFI, 2))
    (two_rows,) = other._buffers.values()

    def write_all(descriptor: int, data: memoryview) -> None:
        if damage == "cut":
            real(descriptor, bytes(len(data)))  # type: ignore[arg-type]
        else:
            real(descriptor, two_rows.encode({}))

    monkeypatch.setattr(files, "write_all", write_all)
    with pytest.raises(LakeWriteError, match=r"footer can't be read back|bytes on disk where|the footer counts 2 rows"):
        sink.write()
    assert tree(tmp_path) == {}


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path, no_wait: list[float]) -> None:
    (tmp_path / "data").write_text("a file in the way")
    sink = make(tmp_path)
    sink.step(OFI, record(OFI, 1))
    with pytest.raises(LakeWriteError, match="data/ofi_cvd/date=2024-07-19/symbol=BTCUSDT/kind=ofi/part-"):
        sink.write()


def test_what_dead_writers_left_goes_and_what_a_living_one_writes_stays(tmp_path: Path) -> None:
    folder = tmp_path / DATA / "date=2024-07-19" / "symbol=BTCUSDT" / "kind=ofi"
    raw = tmp_path / "data/raw/date=2024-07-19/partition=03"
    for each in (folder, raw):
        each.mkdir(parents=True)
    dead = [each / f"{files.TEMP_PREFIX}0123456789abcdef-part-x{files.TEMP_SUFFIX}" for each in (folder, raw)]
    living = folder / f"{files.TEMP_PREFIX}fedcba9876543210-part-y{files.TEMP_SUFFIX}"
    mine = folder / ".not-ours"
    for path in (*dead, living, mine):
        path.write_bytes(b"half")
    with living.open("rb") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        make(tmp_path)
        assert [path.exists() for path in (*dead, living, mine)] == [False, False, True, True]


def test_leftovers_of_old_dates_go_when_their_cut_is_written_again(tmp_path: Path) -> None:
    left = tmp_path / DATA / "date=2024-07-19/symbol=BTCUSDT/kind=ofi" / f"{files.TEMP_PREFIX}0-part-x.part"
    left.parent.mkdir(parents=True)
    left.write_bytes(b"half")
    for day in range(20, 24):
        (tmp_path / DATA / f"date=2024-07-{day}").mkdir()
    sink = make(tmp_path)
    assert left.exists(), "only the newest dates are searched at start"
    sink.step(OFI, record(OFI, 1))
    sink.write()
    assert not left.exists()


def test_temporary_files_are_invisible_to_readers_of_parquet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    real = os.fsync

    def fsync(descriptor: int) -> None:
        seen.extend(path.name for path in tmp_path.rglob("*.part"))
        seen.extend(path.name for path in tmp_path.rglob("*.parquet"))
        real(descriptor)

    monkeypatch.setattr(files.os, "fsync", fsync)
    sink = make(tmp_path)
    sink.step(OFI, record(OFI, 1))
    sink.write()
    temps = [name for name in seen if name.endswith(".part")]
    assert temps
    assert all(name.startswith(".orderflow-tmp-") for name in temps)
    assert len(seen) - len(temps) == 1, "the name appears after the bytes are flushed, and the folder is flushed then"


def test_both_sinks_are_file_sinks(tmp_path: Path) -> None:
    sink: FileSink = make(tmp_path)
    assert isinstance(sink, CutSink)
    assert set(FileSink.__annotations__) <= set(dir(LakeSink))


# -- computed anew ------------------------------------------------------------------------------------------------


def test_a_rebuild_is_refused_where_files_of_the_partition_are(tmp_path: Path) -> None:
    """Cut elsewhere, the same rows would have other names; and what begins later would replace a file by fewer rows."""
    make(tmp_path).check_begin("STATE_REBUILD=true", "; or else")
    [*drive(make(tmp_path), session(frames=20))]
    before = tree(tmp_path)
    with pytest.raises(LakeError) as caught:
        make(tmp_path, rotate_sec=30).check_begin("STATE_REBUILD=true", "; or else")
    for words in (
        f"STATE_REBUILD=true would write into {tmp_path / DATA}",
        "holds files of partition 3 already (part-s1-p03-000000000001-",
        "another DATA_DIR",
        f"move {tmp_path / DATA} and {tmp_path / 'data/raw'} away; or else",
    ):
        assert words in str(caught.value)
    assert tree(tmp_path) == before
    LakeSink(tmp_path, 4, LakeConfig()).check_begin(
        "STATE_REBUILD=true", "; or else"
    )  # of another partition: this process wrote it just now


def test_raw_files_alone_refuse_a_rebuild_and_temporary_files_do_not(tmp_path: Path) -> None:
    folder = tmp_path / "data/raw/date=2024-07-19/partition=03"
    folder.mkdir(parents=True)
    (folder / f"{files.TEMP_PREFIX}0-part-s-p03-000000000001-000000000002.ndjson.zst{files.TEMP_SUFFIX}").touch()
    make(tmp_path / "other").check_begin("STATE_REBUILD=true", "; or else")
    make(tmp_path).check_begin("STATE_REBUILD=true", "; or else")
    (folder / "part-s-p04-x-p03-000000000001-000000000002.ndjson.zst").touch()
    with pytest.raises(LakeError, match="holds files of partition 3"):
        make(tmp_path).check_begin("STATE_REBUILD=true", "; or else")


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc can be asked to give memory back")
def test_memory_that_was_freed_between_what_stays_goes_back() -> None:
    blocks = [bytes(5000) for _ in range(20_000)]
    kept = blocks[::500]
    full = resident_mb()
    del blocks
    give_back()
    assert full - resident_mb() > 70
    assert len(kept) == 40


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc keeps a heap of this kind")
def test_large_blocks_go_back_though_small_ones_lie_behind_them() -> None:
    kept = """
from orderflow.lake.sink import keep_large_apart
from orderflow.streaming.service import resident_mb
if {apart}:
    keep_large_apart()
freed = bytearray(30 << 20)
del freed  # from now on the library would by itself take what is smaller to its heap
before, blocks = resident_mb(), []
for _ in range(500):
    blocks += [bytearray(b"1") * (100 << 10), bytearray(b"1") * 2000]
blocks[0::2] = [None] * 500
print(resident_mb() - before)
"""
    grown = [
        float(subprocess.run([sys.executable, "-c", kept.format(apart=apart)], check=True, capture_output=True).stdout)
        for apart in (False, True)
    ]
    assert grown[0] > 30
    assert grown[1] < 10


def test_a_large_cut_gives_memory_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[bool] = []
    monkeypatch.setattr("orderflow.lake.sink.give_back", lambda: given.append(True))
    monkeypatch.setattr("orderflow.lake.sink.TRIM_ROWS", 20)
    sink = make(tmp_path)
    cuts = [*drive(sink, [*begin(1, T0_MS), *ticking(2, T0_MS), *caused(3, T0_MS), *ticking(4, T0_MS + 60_000)])]
    assert (len(cuts), given) == (1, [])
    cuts = [*drive(sink, [item for seq in range(5, 15) for item in caused(seq, T0_MS)] + ticking(15, T0_MS + 120_000))]
    assert (len(cuts), given) == (1, [True])
