"""A journal back into a capture: same frames, same order, and an account of what the format can't hold."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from orderflow.capture import CaptureWriter, frames
from orderflow.config import IngestionConfig
from orderflow.errors import OrderflowError
from orderflow.ingest.capture_recorder import CaptureRecorder
from orderflow.ingest.export import Exported, export, gap_reason
from orderflow.processor import Record
from orderflow.streaming.codec import Codecs, schema_text
from orderflow.streaming.journal import partition_of
from orderflow.streaming.log import TP
from orderflow.streaming.memory_log import MemoryLog
from orderflow.streaming.recorder import JournalWriter, journal_record, shard_partitions
from orderflow.topics import JOURNAL, PARTITIONS

ALTS = "usdm_4alts_20210722_realagg.gz"
T0_NS = 1_700_000_000_000_000_000
SYMBOLS = ("BTCUSDT", "ETHUSDT", "SOLUSDT")
BODY = b'{"lastUpdateId":5,"bids":[],"asks":[]}'


async def no_other(number: int) -> str:
    raise AssertionError(number)


def codecs() -> Codecs:
    return Codecs({JOURNAL: 1}, {JOURNAL: schema_text("journal")}, no_other)


def frame(number: int, symbol: str) -> bytes:
    return msgspec.json.encode({"stream": f"{symbol.lower()}@bookTicker", "data": {"n": number}})


async def exported(log: MemoryLog, path: Path) -> tuple[list[tuple[int, str, bytes]], Exported]:
    with CaptureWriter(path) as writer:
        report = await export(log, codecs(), "", writer)
    return list(frames(path)), report


class Journal:
    """A journal written by hand, as the recorder for sockets writes it."""

    def __init__(self, log: MemoryLog, shard: str = "0/1", session: str = "s1", source: str = "live") -> None:
        self.log = log
        self.writer = JournalWriter(log, codecs(), "", shard_partitions(shard, PARTITIONS))
        self.session = session
        self.source = source
        self.position = -1

    async def open(self) -> None:
        tails = await self.writer.open(self.session, T0_NS)
        self.position = max(tail.source_position for tail in tails.values())
        payload = {"type": "session", "session": self.session, "source": self.source, "symbols": list(SYMBOLS)}
        for partition, tail in tails.items():
            if tail.session != self.session or not tail.seq:
                self.put(partition, journal_record("config", T0_NS, payload=json.dumps(payload).encode()))

    def put(self, partition: int, record: Record) -> None:
        self.writer.append(partition, record, 0)

    def take(self, symbol: str, at_ms: int, body: bytes = b"", kind: str = "frame", route: str = "public") -> None:
        if kind == "frame":
            self.position += 1
            body = body or frame(self.position, symbol)
        self.put(
            partition_of(symbol),
            journal_record(
                kind,
                T0_NS + at_ms * 1_000_000,
                route="rest" if kind != "frame" else route,
                symbol=symbol,
                source_position=self.position,
                payload=body,
            ),
        )


@pytest.mark.capture
async def test_a_capture_comes_back_byte_for_byte(captures: Path, tmp_path: Path) -> None:
    log = MemoryLog()
    journal = JournalWriter(log, codecs(), "", range(PARTITIONS))
    config = IngestionConfig(source="capture", symbols=(), capture=str(captures / ALTS), speed="max")
    await CaptureRecorder(journal, config).run()
    lines, report = await exported(log, tmp_path / "out.gz")
    assert lines == list(frames(captures / ALTS))
    assert (report.frames, report.snapshots, report.sources) == (1_535, 4, {"capture"})
    assert set(report.unheld) == {"tick"}


async def test_frames_of_sockets_come_in_the_order_of_receipt(tmp_path: Path) -> None:
    """Also where the wall clock went back: the count of frames decides."""
    log = MemoryLog()
    journal = Journal(log)
    await journal.open()
    for number, at_ms in enumerate((10, 20, 30, 5, 6, 40, 50)):
        journal.take(SYMBOLS[number % 3], at_ms)
        if number == 4:
            journal.take("BTCUSDT", 7, BODY, "snapshot")
    await journal.writer.flush()
    lines, report = await exported(log, tmp_path / "out.txt")
    assert [conn for _, conn, _ in lines] == ["public"] * 5 + ["rest"] + ["public"] * 2
    numbers = [msgspec.json.decode(body)["data"]["n"] for _, conn, body in lines if conn == "public"]
    assert numbers == list(range(7))
    assert lines[5] == (T0_NS + 7_000_000, "rest", b'{"symbol":"BTCUSDT",' + BODY[1:])
    assert (report.frames, report.snapshots, report.sessions) == (7, 1, ["s1"])


async def test_shards_are_put_in_the_order_of_receipt(tmp_path: Path) -> None:
    """Each recorder counts for itself, so that counts say nothing across them."""
    log = MemoryLog()
    homes = {symbol: partition_of(symbol) % 2 for symbol in SYMBOLS}
    assert set(homes.values()) == {0, 1}
    shards = [Journal(log, f"{index}/2", f"s{index}") for index in range(2)]
    for journal in shards:
        await journal.open()
    expected = []
    for at_ms in range(60):
        symbol = SYMBOLS[0] if at_ms < 40 else SYMBOLS[at_ms % 3]
        shards[homes[symbol]].take(symbol, at_ms)
        expected.append((T0_NS + at_ms * 1_000_000, symbol.lower()))
    for journal in shards:
        await journal.writer.flush()
    lines, _ = await exported(log, tmp_path / "out.txt")
    streams = [(rx_ns, msgspec.json.decode(body)["stream"].partition("@")[0]) for rx_ns, _, body in lines]
    assert streams == expected


async def test_a_recorder_that_came_back_goes_on(tmp_path: Path) -> None:
    """Same session with another epoch, then another session: one file, in order."""
    log = MemoryLog()
    for session in ("s1", "s1", "s2"):
        journal = Journal(log, session=session)
        await journal.open()
        for number in range(5):
            journal.take(SYMBOLS[number % 3], number)
        journal.put(3, journal_record("gap", T0_NS, payload=b'{"reason":"restart","streams":[]}'))
        await journal.writer.flush()
    lines, report = await exported(log, tmp_path / "out.txt")
    assert [msgspec.json.decode(body)["data"]["n"] for _, _, body in lines] == list(range(15))
    assert (report.sessions, report.gaps) == (["s1", "s2"], Counter(restart=3))


async def test_what_the_format_cannot_hold_is_counted(tmp_path: Path) -> None:
    log = MemoryLog()
    journal = Journal(log)
    await journal.open()
    journal.take("BTCUSDT", 1)
    journal.take("BTCUSDT", 2, b'{"stream":"btcusdt@aggTrade",\n"data":{}}')
    journal.take("BTCUSDT", 3, b"garbage")
    journal.take("BTCUSDT", 4, route="user")
    journal.take("BTCUSDT", 5, b"<html>", "snapshot")
    one = {"a": 1, "p": "1", "q": "1", "T": 1, "m": True}
    journal.take("BTCUSDT", 6, msgspec.json.encode([one, {**one, "a": 2}]), "backfill")
    journal.take("BTCUSDT", 7, b'{"serverTime":1}', "server_time")
    gaps = (b'{"reason":"disconnected","route":"public"}', b'{"reason":"dropped","frames":3}', b"nonsense")
    for body in gaps:
        journal.put(partition_of("BTCUSDT"), journal_record("gap", T0_NS, payload=body))
    journal.put(0, journal_record("end", T0_NS, payload=b"{}"))
    await journal.writer.flush()
    lines, report = await exported(log, tmp_path / "out.txt")
    assert len(lines) == report.frames == 1
    assert report.unheld == Counter(
        line_break=1, no_stream=1, no_route=1, snapshot_not_json=1, backfill=1, server_time=1, gap=3
    )
    assert report.gaps == Counter(disconnected=1, dropped=1, unknown=1)
    assert (report.backfilled_trades, report.cut) == (2, {})


async def test_a_journal_whose_begin_has_expired_says_where_it_begins(tmp_path: Path) -> None:
    log = MemoryLog()
    journal = Journal(log)
    await journal.open()
    for number in range(9):
        journal.take("BTCUSDT", number)
    await journal.writer.flush()
    log.trim(TP(JOURNAL, partition_of("BTCUSDT")), 6)
    lines, report = await exported(log, tmp_path / "out.txt")
    assert report.cut == {partition_of("BTCUSDT"): 6}
    assert [msgspec.json.decode(body)["data"]["n"] for _, _, body in lines] == [4, 5, 6, 7, 8]


async def test_several_captures_in_one_journal_have_no_common_order(tmp_path: Path) -> None:
    log = MemoryLog()
    for session in ("c1", "c2"):
        journal = Journal(log, session=session, source="capture")
        await journal.open()
        journal.take("BTCUSDT", 1)
        await journal.writer.flush()
    with pytest.raises(OrderflowError, match="holds 2 sessions, of capture: the order of their frames is not known"):
        await exported(log, tmp_path / "out.txt")


async def test_an_empty_journal_is_refused(tmp_path: Path) -> None:
    with pytest.raises(OrderflowError, match="the journal under prefix '' is empty"):
        await exported(MemoryLog(), tmp_path / "out.txt")


@given(st.binary(max_size=40) | st.just(b'{"reason":[]}') | st.just(b'{"reason":"dropped"}'))
def test_a_gap_has_a_reason_whatever_it_says(payload: bytes) -> None:
    assert isinstance(gap_reason(payload), str)


def test_reasons_are_those_of_the_payload() -> None:
    cases: dict[bytes, Any] = {b'{"reason":"dropped"}': "dropped", b'{"reason":[]}': "unknown", b"": "unknown"}
    assert {payload: gap_reason(payload) for payload in cases} == cases
