"""A journal that is a file: what goes in, when snapshots are asked for, files in a row, a slow disk and a full one."""

from __future__ import annotations

import asyncio
import json
import random
import resource
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from orderflow.capture import frames, scan
from orderflow.cli.inspection import inspect
from orderflow.cli.recording import MAX_PENDING_BYTES, NEEDS_KEPT, PREFIX, FileJournal, FileSeries, local_codecs
from orderflow.config import Config
from orderflow.errors import CaptureError
from orderflow.streaming.journal import partition_of
from orderflow.streaming.log import TP, read_ranges
from orderflow.streaming.memory_log import MemoryLog
from orderflow.streaming.recorder import journal_record
from orderflow.topics import EVENTS

T0_NS = 1_700_000_000_000_000_000
HOME = partition_of("BTCUSDT")


def never(_: int, __: int) -> bool:
    return False


class Recording:
    """A journal over a file in a folder."""

    def __init__(self, path: Path, due: Callable[[int, int], bool] = never, in_parts: bool = False) -> None:
        self.log = MemoryLog()
        self.files = FileSeries(path, in_parts)
        self.journal = FileJournal(self.log, local_codecs(), Config(), self.files, due)
        self.at_ms = 0

    def put(self, kind: str, body: bytes, route: str = "public", symbol: str | None = "BTCUSDT", ms: int = 100) -> int:
        self.at_ms += ms
        record = journal_record(kind, T0_NS + self.at_ms * 1_000_000, route=route, symbol=symbol, payload=body)
        return self.journal.append(HOME, record, 0)

    def diff(self, pu: int, u: int) -> int:
        ts_ms = T0_NS // 1_000_000 + self.at_ms
        data: dict[str, Any] = {
            "e": "depthUpdate",
            "E": ts_ms,
            "T": ts_ms,
            "s": "BTCUSDT",
            "U": pu + 1,
            "u": u,
            "pu": pu,
        }
        data |= {"b": [["10", "1"]], "a": [["11", "1"]]}
        return self.put("frame", json.dumps({"stream": "btcusdt@depth@100ms", "data": data}).replace(" ", "").encode())

    def snapshot(self, number: int) -> int:
        body = {"lastUpdateId": number, "bids": [["10", "1"]], "asks": [["11", "1"]]}
        return self.put("snapshot", json.dumps(body).encode(), "rest")

    async def needs(self) -> list[int]:
        """Numbers of the records that made the normaliser ask for a snapshot."""
        tp = TP(PREFIX + EVENTS, HOME)
        begin, end = (await self.log.begin_offsets([tp]))[tp], (await self.log.end_offsets([tp]))[tp]
        decode = local_codecs().decoder(EVENTS)
        events = [decode(each.value or b"") for each in (await read_ranges(self.log, {tp: (begin, end)}))[tp]]
        assert {each["event_type"] for each in events} <= {"snapshot_needed"}
        return [each["seq"] for each in events]


@asynccontextmanager
async def writing(recording: Recording) -> AsyncIterator[asyncio.Task[None]]:
    task = asyncio.create_task(recording.journal.write_on())
    try:
        yield task
    finally:
        task.cancel()
        await asyncio.wait([task])
        await recording.journal.settle()


async def test_a_snapshot_is_asked_for_at_the_begin_and_after_every_gap(tmp_path: Path) -> None:
    recording = Recording(tmp_path / "a.gz")
    async with writing(recording):
        first = recording.diff(0, 2)
        assert await recording.needs() == [first]
        assert recording.journal.synced == set()
        recording.snapshot(1)
        recording.diff(2, 4)
        assert recording.journal.synced == {"BTCUSDT"}
        broken = recording.diff(6, 8)
        assert await recording.needs() == [first, broken]
        assert recording.journal.synced == set()
        recording.snapshot(8)
        recording.diff(8, 9)
        assert recording.journal.synced == {"BTCUSDT"}
        await recording.journal.flush()
    recording.files.close()
    (symbol,) = inspect(tmp_path / "a.gz").symbols
    assert (symbol.diffs, symbol.chain_breaks, symbol.bracketed, symbol.book_state) == (4, 1, 2, "synced")


async def test_every_file_of_a_series_stands_by_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recording = Recording(tmp_path / "a.gz", lambda span_ns, _: span_ns >= 1_000_000_000, in_parts=True)
    # Files are told apart by the second in which they begin: three of them shall not take three seconds here.
    names = iter(["a-1.gz", "a-2.gz", "a-3.gz"])
    monkeypatch.setattr(FileSeries, "_name", lambda _: tmp_path / next(names))
    async with writing(recording):
        for number in range(27):
            seq = recording.diff(number, number + 1)
            if seq in await recording.needs():
                recording.snapshot(number + 1)
        await recording.journal.flush()
    recording.files.close()
    assert len(recording.files.finished) == 3
    total = 0
    for path in recording.files.finished:
        report = inspect(path)
        assert report.faults == []
        assert report.symbols[0].bracketed == 1
        total += report.frames
    assert total == 27 + 3 == recording.files.frames
    assert recording.files.size_bytes == sum(path.stat().st_size for path in recording.files.finished)


async def test_what_the_format_cannot_hold_is_counted_and_left_out(tmp_path: Path) -> None:
    recording = Recording(tmp_path / "a.gz")
    async with writing(recording):
        recording.diff(0, 1)
        recording.put("frame", b"garbage", symbol=None)
        recording.put("frame", b'{"stream":"btcusdt@bookTicker",\n"data":{}}')
        recording.put("snapshot", b"<html>", "rest")
        recording.put("gap", b'{"reason":"dropped","frames":2}')
        recording.put("tick", b"{}", "", None)
        recording.put("server_time", b'{"serverTime":1}', "rest", None)
        await recording.journal.flush()
    recording.files.close()
    assert scan(tmp_path / "a.gz").frames == 1
    assert recording.journal.unheld == {"no_stream": 1, "line_break": 1, "snapshot_not_json": 1}
    assert (recording.journal.gaps, recording.journal.seq[HOME]) == ({"dropped": 1}, 7)


async def test_a_disk_that_is_far_behind_holds_the_recorder_up(tmp_path: Path) -> None:
    recording = Recording(tmp_path / "a.txt")
    body = b'{"stream":"btcusdt@kline_1m","data":"%s"}' % (b"x" * (1 << 20))
    while recording.journal.pending_bytes <= MAX_PENDING_BYTES:
        recording.put("frame", body)
    waiting = asyncio.create_task(recording.journal.ship())
    await asyncio.sleep(0)
    assert not waiting.done()
    async with writing(recording), asyncio.timeout(300):
        await waiting
        await recording.journal.flush()
    assert recording.journal.pending_bytes == 0
    recording.files.close()
    assert sum(1 for _ in frames(tmp_path / "a.txt")) == recording.files.frames > 30


async def test_a_full_disk_ends_the_recording_with_its_reason(tmp_path: Path) -> None:
    recording = Recording(tmp_path / "a.gz")
    noise = random.Random(1)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        async with writing(recording), asyncio.timeout(150):
            recording.diff(0, 1)
            while not recording.files.size_bytes:
                await asyncio.sleep(0.01)
            with pytest.raises(CaptureError, match="File too large; free some space"):
                while True:
                    body = noise.randbytes(5_000).hex().encode()
                    recording.put("frame", b'{"stream":"btcusdt@kline_1m","data":"%s"}' % body)
                    await recording.journal.flush()
                    await asyncio.sleep(0.01)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    recording.files.abandon()
    assert next(frames(recording.files.part))[1] == "public"


async def test_what_was_asked_does_not_pile_up(tmp_path: Path) -> None:
    recording = Recording(tmp_path / "a.gz")
    for number in range(10 * NEEDS_KEPT):
        recording.diff(10 * number, 10 * number + 1)  # each breaks the chain
        recording.put("tick", b"{}", "", None, ms=5_000)
    tp = TP(PREFIX + EVENTS, HOME)
    end = (await recording.log.end_offsets([tp]))[tp]
    begin = (await recording.log.begin_offsets([tp]))[tp]
    assert end > 2 * NEEDS_KEPT
    assert end - begin <= 2 * NEEDS_KEPT
    recording.files.abandon()
