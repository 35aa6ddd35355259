"""A sink takes everything once, whatever its writes do: a partition that waited for a write goes on by itself."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any, ClassVar

import msgspec
import pytest
from orderflow.errors import BrokerAwayError, OrderflowError
from orderflow.processor import Record
from orderflow.streaming import sinks
from orderflow.streaming.codec import Codecs, schema_text
from orderflow.streaming.log import TP, Batch
from orderflow.streaming.memory_log import MemoryLog
from orderflow.streaming.recorder import JournalWriter, journal_record
from orderflow.streaming.runtime import PROGRESS_HEADER, RuntimeOptions, ServiceSpec
from orderflow.streaming.sinks import SinkRuntime, SinkTask
from orderflow.streaming.snapshots import InputPosition
from orderflow.streaming.writer import Writer
from orderflow.topics import JOURNAL, PARTITIONS, TICKS

CUT_EVERY = 7


class FlakySink:
    """Notes what it is given; of every three writes the first two fail."""

    inputs: ClassVar[tuple[str, ...]] = (JOURNAL,)

    def __init__(self, durable: list[int], *, flaky: bool = True) -> None:
        self.durable = durable
        self.flaky = flaky
        self.buffered: list[int] = []
        self.writes = 0

    def step(self, topic: str, record: Record) -> bool:
        self.buffered.append(record["seq"])
        return record["seq"] % CUT_EVERY == 0 or record["kind"] == "end"

    def cut_before(self, topic: str, record: Record) -> bool:
        return False

    def check_begin(self, cause: str, otherwise: str) -> None:
        pass

    def rows_buffered(self) -> int:
        return len(self.buffered)

    def write(self) -> Any:
        self.writes += 1
        if self.writes % 3 and self.flaky:
            raise OrderflowError("the disk is full: make room")
        self.durable.extend(self.buffered)
        self.buffered.clear()
        return None

    def state(self) -> dict[str, bytes]:
        return {"": b""}

    def restore(self, states: Mapping[str, bytes]) -> None:
        self.buffered.clear()


async def write_journal(log: MemoryLog, codecs: Codecs, count: int) -> None:
    journal = JournalWriter(log, codecs, "", list(range(PARTITIONS)))
    await journal.open("s1", 1)
    payload = msgspec.json.encode({"type": "session", "session": "s1"})
    for partition in range(PARTITIONS):
        journal.append(partition, journal_record("config", 1, payload=payload), 1)
        for _ in range(count):
            journal.append(partition, journal_record("frame", 1, payload=b"{}"), 1)
        journal.append(partition, journal_record("end", 1, payload=b"{}"), 1)
    await journal.flush()


def make_codecs(*schemas: tuple[str, str]) -> Codecs:
    async def by_id(number: int) -> str:
        raise AssertionError(f"schema {number} is not in play")

    texts = {topic: schema_text(name) for topic, name in schemas or ((JOURNAL, "journal"),)}
    return Codecs({topic: number for number, topic in enumerate(texts, 1)}, texts, by_id)


async def test_everything_is_written_once_though_writes_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sinks, "RETRY_FIRST_SEC", 0.0)
    monkeypatch.setattr(sinks, "RETRY_MOST_SEC", 0.0)
    codecs, log = make_codecs(), MemoryLog()
    count = 60
    await write_journal(log, codecs, count)
    durable: dict[int, list[int]] = {partition: [] for partition in range(PARTITIONS)}
    # Few records a poll and a low bound on what waits: inputs are paused while a write is tried again.
    options = RuntimeOptions(poll_wait_ms=1, max_poll_records=5, max_buffered=8)
    runtime = SinkRuntime(
        log, codecs, ServiceSpec("sinks", (JOURNAL,), (), "f"), options, lambda partition: FlakySink(durable[partition])
    )
    running = asyncio.create_task(runtime.run())
    everything = list(range(1, count + 3))
    try:
        async with asyncio.timeout(150):
            while any(taken != everything for taken in durable.values()):
                assert not running.done(), running.result()
                await asyncio.sleep(0.001)
    finally:
        runtime.stop()
        await running
    assert runtime.cuts_failed > 0
    assert runtime.stuck == []


async def test_a_cut_that_cannot_be_noted_pauses_its_partition(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its files and its commit stand; what is told of it must not run ahead of what follows."""
    monkeypatch.setattr(sinks, "RETRY_FIRST_SEC", 0.0)
    monkeypatch.setattr(sinks, "RETRY_MOST_SEC", 0.0)
    codecs, log = make_codecs(), MemoryLog()
    await write_journal(log, codecs, 60)
    durable: dict[int, list[int]] = {partition: [] for partition in range(PARTITIONS)}
    noted: dict[int, list[int]] = {partition: [] for partition in range(PARTITIONS)}
    attempts = [0]

    def note(partition: int, result: Any, positions: list[InputPosition], task: SinkTask) -> None:
        attempts[0] += 1
        if attempts[0] % 3:
            raise OSError(28, "No space left on device") if attempts[0] % 2 else OrderflowError("the disk is full")
        noted[partition].append(positions[0].seq)

    runtime = SinkRuntime(
        log,
        codecs,
        ServiceSpec("sinks", (JOURNAL,), (), "f"),
        RuntimeOptions(poll_wait_ms=1, max_poll_records=5, max_buffered=8),
        lambda partition: FlakySink(durable[partition], flaky=False),
        note,
    )
    running = asyncio.create_task(runtime.run())
    async with asyncio.timeout(150):
        while any(seqs[-1:] != [62] for seqs in noted.values()):
            assert not running.done(), running.result()
            await asyncio.sleep(0.001)
    runtime.stop()
    await running
    assert all(taken == [*range(1, 63)] for taken in durable.values())
    assert all(seqs == [*range(CUT_EVERY, 62, CUT_EVERY), 62] for seqs in noted.values())
    assert runtime.cuts_failed == attempts[0] - runtime.cuts


class DeafLog(MemoryLog):
    """Takes no state."""

    async def send(self, batch: Batch, tp: TP) -> asyncio.Future[int]:
        if tp.topic.startswith("state."):
            raise BrokerAwayError("a batch was not acknowledged")
        return await super().send(batch, tp)


async def test_a_sink_whose_every_commit_fails_gives_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """That it has nothing to save between two cuts is no success of the broker's."""
    monkeypatch.setattr("orderflow.streaming.runtime.RETRY_FIRST_SEC", 0.001)
    monkeypatch.setattr("orderflow.streaming.runtime.RETRY_MOST_SEC", 0.002)
    codecs, log = make_codecs(), DeafLog()
    await write_journal(log, codecs, 60)
    runtime = SinkRuntime(
        log,
        codecs,
        ServiceSpec("sinks", (JOURNAL,), (), "f"),
        RuntimeOptions(poll_wait_ms=1, max_poll_records=5, snapshot_sec=0.0, broker_patience_sec=0.2),
        lambda partition: FlakySink([], flaky=False),
    )
    with pytest.raises(BrokerAwayError):
        await asyncio.wait_for(runtime.run(), 120)
    assert runtime.stats.broker_losses > 1


class TwoInputs(FlakySink):
    """Its second input may stand still."""

    inputs: ClassVar[tuple[str, ...]] = (JOURNAL, TICKS)


@pytest.mark.parametrize("limits", [{"max_buffered": 8}, {"max_waiting_bytes": 8 * 450}])
async def test_an_input_that_stands_still_bounds_what_the_others_leave_waiting(limits: dict[str, int]) -> None:
    """Kafka keeps the rest: a service that is down must not fill the memory of those behind it."""
    log, count, bound, poll = MemoryLog(), 200, 8, 5
    codecs = make_codecs((JOURNAL, "journal"), (TICKS, "tick"))
    await write_journal(log, codecs, count)
    durable: dict[int, list[int]] = {partition: [] for partition in range(PARTITIONS)}
    runtime = SinkRuntime(
        log,
        codecs,
        ServiceSpec("sinks", TwoInputs.inputs, (), "f"),
        RuntimeOptions(poll_wait_ms=1, max_poll_records=poll, **limits),
        lambda partition: TwoInputs(durable[partition], flaky=False),
    )
    running = asyncio.create_task(runtime.run())
    try:
        async with asyncio.timeout(150):
            while runtime.stats.buffered <= PARTITIONS * bound:
                await asyncio.sleep(0.001)
            for _ in range(50):
                await asyncio.sleep(0.001)
                assert runtime.stats.buffered <= PARTITIONS * (bound + poll)
            assert not any(durable.values())
            writer = Writer(log)
            for partition in range(PARTITIONS):
                writer.append(TP(TICKS, partition), b"", None, 1, [(PROGRESS_HEADER, b"%d" % (count + 2))])
            await writer.flush()
            while any(taken != [*range(1, count + 3)] for taken in durable.values()):
                assert not running.done(), running.result()
                await asyncio.sleep(0.001)
    finally:
        runtime.stop()
        await running
