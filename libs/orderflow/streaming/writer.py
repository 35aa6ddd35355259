"""Batches by hand: appends are synchronous and cheap; one batch a partition is under way at a time.

One at a time because the client's sequence numbers can't save more: were the first of two batches refused, the second
could be stored without it, a hole that no restart would see. What gathers meanwhile makes the next batch.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Final

from orderflow.errors import BrokerAwayError, LogError
from orderflow.streaming import crash
from orderflow.streaming.log import TP, Batch, Log

logger = logging.getLogger(__name__)

MAX_BATCHES: Final = 64
"""Batches not yet acknowledged, under way or gathering, beyond which `ship` waits."""
PATIENCE_SEC: Final = 120.0
"""How long a batch may go unacknowledged before the writer gives the broker up."""
WATCH_SEC: Final = 1.0


class _Lane:
    """The batches of one partition: those that gather, and whether one is under way."""

    __slots__ = ("done", "made", "open", "since", "task")

    def __init__(self) -> None:
        self.open: list[Batch] = []
        self.made = 0
        self.done = 0
        """Batches begun, and acknowledged."""
        self.task: asyncio.Task[None] | None = None
        self.since = 0.0


class Writer:
    """Gathers records per topic partition and sends them in order."""

    def __init__(
        self,
        log: Log,
        *,
        max_batches: int = MAX_BATCHES,
        patience_sec: float = PATIENCE_SEC,
        on_delivery: Callable[[TP, int, int], None] | None = None,
    ) -> None:
        """`on_delivery(tp, base_offset, count)` is called for each acknowledged batch, in order per partition.

        `base_offset` is negative where the broker did not say.
        """
        self._log = log
        self._lanes: dict[TP, _Lane] = {}
        self._ready: list[TP] = []
        self._max_batches = max_batches
        self._patience_sec = patience_sec
        self._on_delivery = on_delivery
        self._failure: LogError | None = None
        self._moved = asyncio.Event()
        self._batches = 0
        self.records_sent = 0
        self.batches_sent = 0
        self.next_offset: dict[TP, int] = {}
        """Offset behind the newest acknowledged batch of each partition written."""

    def append(
        self,
        tp: TP,
        key: bytes,
        value: bytes | None,
        timestamp_ms: int,
        headers: list[tuple[str, bytes]] | None = None,
    ) -> None:
        """Add a record to the open batch of its partition."""
        lane = self._lanes.get(tp)
        if lane is None:
            lane = self._lanes[tp] = _Lane()
        batches = lane.open
        if not batches:
            self._begin(lane)
            self._ready.append(tp)
        if not batches[-1].append(key, value, timestamp_ms, headers):
            self._begin(lane)
            if not batches[-1].append(key, value, timestamp_ms, headers):
                raise ValueError(f"{tp.topic}[{tp.partition}]: a record of {len(value or b'')} bytes fits no batch")

    def _begin(self, lane: _Lane) -> None:
        lane.open.append(self._log.batch())
        lane.made += 1
        self._batches += 1

    @property
    def outstanding(self) -> int:
        """Batches not yet acknowledged."""
        return self._batches

    @property
    def waiting_sec(self) -> float:
        """How long the oldest batch under way has been waiting for its acknowledgement; 0 where none is."""
        oldest = min((lane.since for lane in self._lanes.values() if lane.task is not None), default=None)
        return 0.0 if oldest is None else asyncio.get_running_loop().time() - oldest

    def abandon(self) -> None:
        """Send nothing more: what is under way may still arrive, what has gathered is forgotten."""
        self._failure = self._failure or LogError("this writer was given up")
        for lane in self._lanes.values():
            lane.open.clear()

    async def ship(self) -> None:
        """Send what has gathered wherever nothing is under way; wait only where too much is unacknowledged.

        Raises
        ------
        LogError
            A batch was refused, or not acknowledged within the patience: nothing that follows may be sent.
        """
        self._start_ready()
        self._check()
        crash.point("shipped")
        while self._batches > self._max_batches:
            await self._wait()

    async def flush(self, deadline_sec: float | None = None) -> None:
        """Send, then wait until everything is durable.

        Raises
        ------
        LogError
            As `ship`, or `deadline_sec` has passed.
        """
        until = None if deadline_sec is None else asyncio.get_running_loop().time() + deadline_sec
        self._start_ready()
        self._check()
        while self._batches:
            if until is not None and asyncio.get_running_loop().time() > until:
                raise BrokerAwayError(
                    f"{self._batches} batches were not acknowledged within {deadline_sec:g} s: broker away?"
                )
            await self._wait()

    async def settled(self) -> None:
        """Until everything appended so far is durable, while more may be appended meanwhile. Raises as `ship`."""
        self._start_ready()
        marks = [(lane, lane.made) for lane in self._lanes.values()]
        self._check()
        while any(lane.done < made for lane, made in marks):
            await self._wait()

    async def _wait(self) -> None:
        moved = self._moved
        try:
            async with asyncio.timeout(WATCH_SEC):
                await moved.wait()
        except TimeoutError:
            pass
        self._check()

    def _start_ready(self) -> None:
        ready, self._ready = self._ready, []
        for tp in ready:
            lane = self._lanes[tp]
            if lane.task is None and lane.open:
                self._start(tp, lane)

    def _start(self, tp: TP, lane: _Lane) -> None:
        lane.since = asyncio.get_running_loop().time()
        # A task of its own: whoever waits here may be cancelled, a batch on its way may not.
        lane.task = asyncio.get_running_loop().create_task(self._deliver(tp, lane, lane.open.pop(0)))

    async def _deliver(self, tp: TP, lane: _Lane, batch: Batch) -> None:
        try:
            base = await (await self._log.send(batch, tp))
            self._acknowledged(tp, lane, base, len(batch))
        except (Exception, asyncio.CancelledError) as error:
            # Whatever it was: unless it is known here, everybody would wait for an acknowledgement that never comes.
            if not isinstance(error, LogError):
                detail = f"{tp.topic}[{tp.partition}]: a batch was not delivered: {error!r}"
                logger.error(detail, exc_info=error)
                error = BrokerAwayError(detail)
            self._failure = self._failure or error
            self._wake()
            if _cancelled():
                raise
            return
        crash.point("acknowledged")
        lane.task = None
        if lane.open and self._failure is None:
            self._start(tp, lane)
        self._wake()

    def _acknowledged(self, tp: TP, lane: _Lane, base: int, count: int) -> None:
        self._batches -= 1
        lane.done += 1
        self.records_sent += count
        self.batches_sent += 1
        if base >= 0:
            self.next_offset[tp] = base + count
        if self._on_delivery is not None:
            self._on_delivery(tp, base, count)

    def _wake(self) -> None:
        """Wake everybody who waits; who comes later waits for the next time."""
        self._moved.set()
        self._moved = asyncio.Event()

    def _check(self) -> None:
        if self._failure is not None:
            raise self._failure
        if self._batches and self.waiting_sec > self._patience_sec:
            raise LogError(
                f"the broker has acknowledged nothing for {self._patience_sec:g} s: look at it; nothing is lost, this "
                "process goes on where it stood once restarted"
            )


def _cancelled() -> bool:
    """Whether the task that runs is itself being cancelled, not merely something that it waited for."""
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0
