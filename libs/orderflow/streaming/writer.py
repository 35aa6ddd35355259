"""Batches by hand: appends are synchronous and cheap, `ship` hands over what has gathered, `flush` waits for it."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from typing import Final

from orderflow.streaming.log import TP, Batch, Headers, Log

MAX_OUTSTANDING: Final = 256
"""Batches handed over and not yet acknowledged; beyond that `ship` waits for the oldest."""


class Writer:
    """Gathers records per topic partition and sends them in order."""

    def __init__(
        self,
        log: Log,
        *,
        max_outstanding: int = MAX_OUTSTANDING,
        on_delivery: Callable[[TP, int, int], None] | None = None,
    ) -> None:
        """`on_delivery(tp, base_offset, count)` is called for each acknowledged batch, in order per partition."""
        self._log = log
        self._open: dict[TP, list[Batch]] = {}
        self._outstanding: deque[tuple[asyncio.Future[int], TP, int]] = deque()
        self._max_outstanding = max_outstanding
        self._on_delivery = on_delivery
        self.records_sent = 0
        self.batches_sent = 0

    def append(
        self, tp: TP, key: bytes, value: bytes | None, timestamp_ms: int, headers: list[tuple[str, bytes]] | None = None
    ) -> None:
        """Add a record to the open batch of its partition."""
        batches = self._open.get(tp)
        if batches is None:
            batches = self._open[tp] = [self._log.batch()]
        if not batches[-1].append(key, value, timestamp_ms, headers):
            batches.append(self._log.batch())
            if not batches[-1].append(key, value, timestamp_ms, headers):
                raise ValueError(f"{tp.topic}[{tp.partition}]: a record of {len(value or b'')} bytes fits no batch")

    @property
    def outstanding(self) -> int:
        return len(self._outstanding)

    async def ship(self) -> None:
        """Hand over everything gathered; wait only where too much is unacknowledged.

        Raises
        ------
        LogError
            A batch was not acknowledged: nothing that follows may be sent.
        """
        self._reap()
        if self._open:
            opened, self._open = self._open, {}
            for tp, batches in opened.items():
                for batch in batches:
                    delivery = await self._log.send(batch, tp)
                    self._outstanding.append((delivery, tp, len(batch)))
                    self.records_sent += len(batch)
                    self.batches_sent += 1
        while len(self._outstanding) > self._max_outstanding:
            await self._outstanding[0][0]
            self._reap()

    async def flush(self) -> None:
        """Ship, then wait until everything is durable.

        Raises
        ------
        LogError
            A batch was not acknowledged.
        """
        await self.ship()
        while self._outstanding:
            await self._outstanding[0][0]
            self._reap()

    def _reap(self) -> None:
        outstanding = self._outstanding
        while outstanding and outstanding[0][0].done():
            delivery, tp, count = outstanding.popleft()
            base = delivery.result()
            if self._on_delivery is not None:
                self._on_delivery(tp, base, count)
