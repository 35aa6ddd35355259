"""The broker away, or another recorder in the way: what the recorder for sockets does with what keeps coming."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from ingest_exchange import World, gaps, loop_sec, numbers, of_kind
from orderflow.errors import FencedError, LogError
from orderflow.processor import Record
from orderflow.streaming.log import TP, Batch
from orderflow.streaming.memory_log import MemoryLog

from tests.storm.virtual_loop import run

BTC = "BTCUSDT"
STREAMS = ("aggTrade", "bookTicker", "depth@100ms")


class OutageLog(MemoryLog):
    """A log whose broker can be away: what is sent meanwhile hangs, and arrives once it is back."""

    def __init__(self) -> None:
        super().__init__(max_batch_bytes=2000)
        self.here = asyncio.Event()
        self.here.set()

    async def send(self, batch: Batch, tp: TP) -> asyncio.Future[int]:
        await asyncio.sleep(0.002)
        await self.here.wait()
        return await super().send(batch, tp)


def account(records: list[Record], stream: str) -> list[int]:
    """Numbers of a stream's frames that are journalled, or in the range of a gap, in the journal's order."""
    found: list[int] = []
    kind = stream.partition("@")[0]
    scale = 10 if kind == "depth" else 1
    for record in records:
        if record["symbol"] != BTC:
            continue
        if record["kind"] == "frame":
            found.extend(numbers([record], f"btcusdt@{stream}"))
        for gap in gaps([record]):
            if gap["streams"] == [kind] and gap["reason"] == "conflated":
                last = found[-1] if found else 0
                found.extend(range(last + 1, last + 1 + gap["frames"]))
            elif gap["streams"] == [kind] and gap["reason"] == "dropped":
                for low, high in gap["ranges"]:
                    found.extend(range((low + scale - 1) // scale, high // scale + 1))
    return found


def test_what_a_live_recorder_can_not_keep_is_told_exactly() -> None:
    async def main() -> None:
        log = OutageLog()
        world = World(BTC, log=log, queue_frames=100)
        world.start()
        await world.until_sec(20)
        log.here.clear()
        await world.until_sec(65)
        status = world.recorder.status()
        log.here.set()
        await world.until_sec(90)
        await world.stop()
        assert status["conflated"] > 50
        assert set(status["dropped_by_stream"]) == {"aggTrade", "depth", "markPrice"}
        assert status["queue_depth"] <= 2 * 100 + 1
        records = await world.journal()
        for stream in STREAMS:
            found = account(records, stream)
            assert found == list(range(found[0], found[-1] + 1)), stream
            assert found[-1] * {"aggTrade": 0.5, "bookTicker": 0.2, "depth@100ms": 0.1}[stream] > 89
        assert {gap["reason"] for gap in gaps(records)} == {"conflated", "dropped"}

    run(main())


@pytest.mark.parametrize("settings", [{"source": "sim"}, {"source": "live", "queue_policy": "block"}])
def test_a_blocking_recorder_loses_nothing_and_does_not_blame_the_exchange(settings: dict[str, Any]) -> None:
    async def main() -> None:
        log = OutageLog()
        world = World(BTC, log=log, queue_frames=100, **settings)
        world.start()
        await world.until_sec(20)
        log.here.clear()
        await world.until_sec(75)
        assert world.recorder.status()["queue_depth"] <= 100 + 2 + 5 * 55
        log.here.set()
        await world.until_sec(100)
        status = world.recorder.status()
        await world.stop()
        records = await world.journal()
        for stream in STREAMS:
            found = numbers(records, f"btcusdt@{stream}")
            assert found == list(range(found[0], found[-1] + 1)), stream
        assert gaps(records) == []
        assert (status["reconnects"], status["conflated"], status["dropped"]) == (0, 0, 0)

    run(main())


def test_a_broker_away_beyond_the_patience_ends_the_recorder_and_the_next_one_says_so() -> None:
    async def main() -> None:
        log = OutageLog()
        world = World(BTC, log=log, broker_patience_sec=30.0)
        world.start()
        await world.until_sec(20)
        log.here.clear()
        with pytest.raises(LogError, match="30 s"):
            await world.task
        assert 50 <= loop_sec() <= 55
        log.here.set()
        session = world.recorder.session
        world.start(seed=2)
        await world.until_sec(100)
        assert world.recorder.session == session
        await world.stop()
        records = await world.journal()
        assert {gap["reason"] for gap in gaps(records)} == {"restart"}
        assert len(gaps(records)) == 12
        for stream in STREAMS:
            found = numbers(records, f"btcusdt@{stream}")
            assert found == sorted(set(found))

    run(main())


def test_a_recorder_that_is_overtaken_stops_and_its_records_are_not_in_the_view() -> None:
    async def main() -> None:
        world = World(BTC)
        world.start()
        await world.until_sec(20)
        first = world.task
        world.start(seed=2)
        await world.until_sec(40)
        with pytest.raises(FencedError, match="epoch 2"):
            await first
        await world.stop()
        records = await world.journal()
        found = numbers(records, "btcusdt@depth@100ms")
        assert found == sorted(set(found))
        assert len(of_kind(records, "end")) == 12

    run(main())


def test_needs_are_read_again_after_the_log_has_failed() -> None:
    class FailingReaders(MemoryLog):
        left = 3

        async def end_offsets(self, tps: Any) -> dict[TP, int]:
            tps = list(tps)
            if tps and tps[0].topic == "market.events" and self.left:
                self.left -= 1
                raise LogError("no offsets")
            return await super().end_offsets(tps)

    async def main() -> None:
        world = World(BTC, log=FailingReaders())
        world.start()
        await world.until_sec(60)
        partition = next(iter(world.recorder._book.partitions))
        await world.ask("snapshot_needed", BTC, partition, world.recorder.status()["seqs"][str(partition)])
        await world.until_sec(65)
        status = world.recorder.status()
        await world.stop()
        assert status["requests"]["read_errors"] == 3
        assert status["requests"]["fetched"] == {"snapshot": 1}

    run(main())
