"""The capture's recorder on the in-memory log: drains, restarts, resumes."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
from orderflow.config import IngestionConfig
from orderflow.ingest.capture_recorder import CaptureRecorder
from orderflow.processor import Record
from orderflow.streaming.codec import Codecs, schema_text
from orderflow.streaming.journal import JournalView, partition_of
from orderflow.streaming.log import TP, read_ranges
from orderflow.streaming.memory_log import MemoryLog
from orderflow.streaming.recorder import JournalWriter, shard_partitions
from orderflow.topics import JOURNAL, PARTITIONS

SYMBOLS = ("BTCUSDT", "ETHUSDT")
FRAMES = 40
START_NS = 1_700_000_000_000_000_000
STEP_NS = 70_000_000


@pytest.fixture
def capture(tmp_path: Path) -> Path:
    """40 frames of two symbols, 70 ms apart, so that ticks of 200 ms fall in between."""
    path = tmp_path / "capture.txt"
    path.write_bytes(b"".join(lines()))
    return path


def lines() -> Iterator[bytes]:
    for number in range(FRAMES):
        rx_ns = START_NS + number * STEP_NS
        symbol = SYMBOLS[number % 2]
        data = {"e": "bookTicker", "E": rx_ns // 1_000_000, "T": rx_ns // 1_000_000, "s": symbol, "u": number}
        frame = msgspec.json.encode({"stream": f"{symbol.lower()}@bookTicker", "data": data})
        yield b"%d public %s\n" % (rx_ns, frame)


async def no_other(number: int) -> str:
    raise AssertionError(number)


def codecs() -> Codecs:
    return Codecs({JOURNAL: 1}, {JOURNAL: schema_text("journal")}, no_other)


def recorder(log: MemoryLog, capture: Path, speed: str = "max", shard: str = "0/1") -> CaptureRecorder:
    journal = JournalWriter(log, codecs(), "", shard_partitions(shard, PARTITIONS))
    return CaptureRecorder(journal, IngestionConfig(source="capture", symbols=(), capture=str(capture), speed=speed))


async def journal_of(log: MemoryLog) -> dict[int, list[Record]]:
    """The canonical view of each partition, without the numbers."""
    decode = codecs().decoder(JOURNAL)
    found: dict[int, list[Record]] = {}
    for partition in range(PARTITIONS):
        tp = TP(JOURNAL, partition)
        end = (await log.end_offsets([tp]))[tp]
        view = JournalView()
        found[partition] = []
        for record in (await read_ranges(log, {tp: (0, end)}))[tp]:
            assert record.value is not None
            decoded = decode(record.value)
            if view.admit(record, decoded["seq"], 0 if decoded["kind"] == "open" else 1):
                found[partition].append({name: value for name, value in decoded.items() if name != "seq"})
    return found


def ends(journal: dict[int, list[Record]]) -> dict[int, list[str]]:
    return {
        partition: [msgspec.json.decode(each["payload"])["reason"] for each in records if each["kind"] == "end"]
        for partition, records in journal.items()
    }


async def drain_in_the_middle(log: MemoryLog, capture: Path) -> None:
    """A paced recorder that is drained once some frames are journalled."""
    slow = recorder(log, capture, speed="10")
    running = asyncio.create_task(slow.run())
    async with asyncio.timeout(120):
        while slow.status()["journal_records"] < PARTITIONS + 8:
            await asyncio.sleep(0.001)
    slow.drain()
    await running
    assert slow.done
    assert slow.status()["journal_records"] < PARTITIONS + FRAMES


async def test_a_drain_ends_every_partition_once(capture: Path) -> None:
    log = MemoryLog()
    await drain_in_the_middle(log, capture)
    journal = await journal_of(log)
    assert ends(journal) == {partition: ["drained"] for partition in range(PARTITIONS)}
    assert all(records[-1]["kind"] == "end" for records in journal.values())


async def test_a_drain_of_what_was_wholly_read_adds_nothing(capture: Path) -> None:
    """As when the recorder dies after the end and its successor is told to drain."""
    log = MemoryLog()
    await recorder(log, capture).run()
    before = await journal_of(log)
    assert ends(before) == {partition: ["end of the capture"] for partition in range(PARTITIONS)}
    successor = recorder(log, capture)
    successor.drain()
    await successor.run()
    assert successor.done
    assert await journal_of(log) == before


async def test_a_successor_told_to_drain_at_once_ends_only_what_has_not_ended(capture: Path) -> None:
    log = MemoryLog()
    await drain_in_the_middle(log, capture)
    before = await journal_of(log)
    successor = recorder(log, capture)
    successor.drain()
    await successor.run()
    assert await journal_of(log) == before


@pytest.mark.parametrize("drains", [1, 3])
async def test_going_on_after_drains_gives_the_undisturbed_journal_besides_the_ends(capture: Path, drains: int) -> None:
    undisturbed, log = MemoryLog(), MemoryLog()
    await recorder(undisturbed, capture).run()
    await drain_in_the_middle(log, capture)
    for _ in range(drains - 1):
        again = recorder(log, capture)
        again.drain()
        await again.run()
    await recorder(log, capture).run()
    expected = await journal_of(undisturbed)
    got = await journal_of(log)
    early = msgspec.json.encode({"reason": "drained"})
    assert {
        partition: [each for each in records if each["payload"] != early] for partition, records in got.items()
    } == expected
    assert set(map(tuple, ends(got).values())) == {("drained", "end of the capture")}
    assert len(expected[partition_of("BTCUSDT")]) > FRAMES // 2  # frames and ticks: the comparison is of something


async def test_shards_write_the_journal_of_one(capture: Path) -> None:
    whole, sharded = MemoryLog(), MemoryLog()
    await recorder(whole, capture).run()
    for shard in ("1/3", "0/3", "2/3"):
        await recorder(sharded, capture, shard=shard).run()
    assert await journal_of(sharded) == await journal_of(whole)
