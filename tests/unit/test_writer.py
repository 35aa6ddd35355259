"""The writer's own bookkeeping: what is durable, what waits, what is given up."""

from __future__ import annotations

import asyncio

import pytest
from orderflow.errors import BrokerAwayError, LogError
from orderflow.streaming.log import TP, Batch
from orderflow.streaming.memory_log import MemoryLog
from orderflow.streaming.writer import Writer

HERE, THERE = TP("rows", 0), TP("rows", 1)


class SlowLog(MemoryLog):
    """Stores at once, acknowledges when told to."""

    def __init__(self) -> None:
        super().__init__()
        self.waiting: list[tuple[asyncio.Future[int], int]] = []

    async def send(self, batch: Batch, tp: TP) -> asyncio.Future[int]:
        base = (await super().send(batch, tp)).result()
        future: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self.waiting.append((future, base))
        return future

    async def acknowledge(self) -> None:
        """What is on its way now."""
        while not self.waiting:
            await asyncio.sleep(0)
        future, base = self.waiting.pop(0)
        future.set_result(base)
        for _ in range(5):
            await asyncio.sleep(0)


async def test_settled_waits_for_what_was_there_and_not_for_what_came_later() -> None:
    log = SlowLog()
    writer = Writer(log)
    writer.append(HERE, b"", b"1", 0)
    await writer.ship()
    writer.append(HERE, b"", b"2", 0)  # gathers behind the batch that is under way
    settled = asyncio.ensure_future(writer.settled())
    await asyncio.sleep(0)
    writer.append(THERE, b"", b"later", 0)
    await log.acknowledge()
    assert not settled.done()
    await log.acknowledge()
    await asyncio.wait_for(settled, 120)
    assert writer.outstanding == 1
    assert writer.next_offset == {HERE: 2}


async def test_waiting_sec_tells_of_a_broker_that_does_not_acknowledge() -> None:
    log = SlowLog()
    writer = Writer(log)
    assert writer.waiting_sec == 0
    writer.append(HERE, b"", b"1", 0)
    await writer.ship()
    await asyncio.sleep(0)
    assert writer.waiting_sec > 0
    await log.acknowledge()
    assert writer.waiting_sec == 0


async def test_patience_ends_with_a_reason() -> None:
    writer = Writer(SlowLog(), patience_sec=1e-6)
    writer.append(HERE, b"", b"1", 0)
    with pytest.raises(LogError, match="acknowledged nothing for 1e-06 s"):
        await writer.flush()


async def test_an_abandoned_writer_sends_nothing_more() -> None:
    log = SlowLog()
    writer = Writer(log)
    writer.append(HERE, b"", b"under way", 0)
    await writer.ship()
    writer.append(HERE, b"", b"gathered", 0)
    while not log.waiting:
        await asyncio.sleep(0)
    writer.abandon()
    await log.acknowledge()
    assert (await log.end_offsets([HERE])) == {HERE: 1}
    with pytest.raises(LogError, match="given up"):
        await writer.ship()


class RefusingLog(MemoryLog):
    """Fails as the client does where it did not foresee something."""

    def __init__(self, failure: BaseException, *, at_once: bool) -> None:
        super().__init__()
        self._failure = failure
        self._at_once = at_once

    async def send(self, batch: Batch, tp: TP) -> asyncio.Future[int]:
        if self._at_once:
            raise self._failure
        future: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        if isinstance(self._failure, asyncio.CancelledError):
            future.cancel()
        else:
            future.set_exception(self._failure)
        return future


@pytest.mark.parametrize("at_once", [False, True])
@pytest.mark.parametrize("failure", [AssertionError("Unrecognized partition"), asyncio.CancelledError()])
async def test_whatever_a_delivery_fails_with_is_told_to_those_who_wait(failure: BaseException, at_once: bool) -> None:
    writer = Writer(RefusingLog(failure, at_once=at_once))
    writer.append(HERE, b"", b"1", 0)
    for wait in (writer.settled, writer.flush, writer.ship):
        with pytest.raises(BrokerAwayError, match=r"rows\[0\]: a batch was not delivered: (Assertion|Cancelled)Error"):
            await asyncio.wait_for(wait(), 120)


async def test_a_failing_listener_stops_the_writer() -> None:
    def fail(tp: TP, base: int, count: int) -> None:
        raise ValueError("not mine")

    writer = Writer(MemoryLog(), on_delivery=fail)
    writer.append(HERE, b"", b"1", 0)
    writer.append(THERE, b"", b"1", 0)
    with pytest.raises(BrokerAwayError, match="not mine"):
        await asyncio.wait_for(writer.flush(), 120)
    writer.append(HERE, b"", b"2", 0)
    with pytest.raises(BrokerAwayError, match="not mine"):
        await asyncio.wait_for(writer.flush(), 120)
