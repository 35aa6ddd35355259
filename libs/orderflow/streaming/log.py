"""The `Log` seam: partitioned, append-only, read by position. Kafka implements it for production, memory for tests.

Both implementations run under one contract-test suite (`tests/contract/test_log.py`). A reader always names the
position it starts from; nothing here keeps a position on the caller's behalf.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Mapping, Sequence
from typing import Final, NamedTuple, Protocol, TypeAlias

from orderflow.errors import BrokerAwayError, LogError

Headers: TypeAlias = Sequence[tuple[str, bytes]]


class TP(NamedTuple):
    """A topic partition. `topic` is the physical name, prefix included."""

    topic: str
    partition: int


class LogRecord(Protocol):
    """What a reader gets: aiokafka's `ConsumerRecord` has exactly these attributes, so nothing is copied."""

    @property
    def offset(self) -> int: ...

    @property
    def timestamp(self) -> int:
        """Milliseconds since the epoch, as the writer gave it."""
        ...

    @property
    def key(self) -> bytes | None: ...

    @property
    def value(self) -> bytes | None: ...

    @property
    def headers(self) -> Headers: ...


class Batch(Protocol):
    """Records of one topic partition that are sent together."""

    def append(
        self, key: bytes, value: bytes | None, timestamp_ms: int, headers: list[tuple[str, bytes]] | None = None
    ) -> bool:
        """Add a record; False where the batch is full (the record was not added)."""
        ...

    def __len__(self) -> int: ...


class Reader(Protocol):
    """Reads assigned partitions from given positions. One user at a time."""

    async def poll(self, max_wait_ms: int, max_records: int) -> Mapping[TP, Sequence[LogRecord]]:
        """Records in offset order per partition; empty when none came within the wait.

        Raises
        ------
        LogError
            A position lies below the retained data, or the broker is beyond the bounded retries.
        """
        ...

    async def position(self, tp: TP) -> int:
        """Offset of the next record to be returned."""
        ...

    def pause(self, tps: Iterable[TP]) -> None: ...

    def resume(self, tps: Iterable[TP]) -> None: ...

    async def close(self) -> None: ...


GATHER_MS: Final = 250
COMMIT_NOTE: Final = "orderflow"
"""Stands beside every offset that we commit. Kafka's own tools leave the place empty, so a reset by hand shows."""


class Committed(NamedTuple):
    """An offset that a group has for a partition."""

    offset: int
    by_hand: bool
    """Whether somebody else than a service of ours has set it."""


class Membership(Protocol):
    """A place in a consumer group: gives partition numbers, takes commits; reads no data itself."""

    @property
    def assigned(self) -> frozenset[int]:
        """Partition numbers owned now, of every topic of the subscription alike."""
        ...

    @property
    def failure(self) -> LogError | None:
        """Why membership is over for good; None while it lasts."""
        ...

    @property
    def changed(self) -> asyncio.Event:
        """Set whenever `assigned` has changed; the user clears it."""
        ...

    async def commit(self, offsets: Mapping[TP, int]) -> bool:
        """Record offsets for the group; False where a rebalance made them void (harmless: state decides)."""
        ...

    async def committed(self, tps: Iterable[TP]) -> dict[TP, Committed]:
        """The group's offsets; partitions without one are left out.

        Raises
        ------
        LogError
            The broker does not tell.
        """
        ...

    async def close(self) -> None: ...


class Log(Protocol):
    """Append, read from a position, position."""

    @property
    def reachable(self) -> bool:
        """Whether a broker has answered lately."""
        ...

    def batch(self) -> Batch: ...

    async def send(self, batch: Batch, tp: TP) -> asyncio.Future[int]:
        """Hand a batch over, in order per partition; the future gives the base offset once it is durable.

        The future fails with `LogError` where the batch was not acknowledged; what was sent after it to the same
        partition must be taken as lost too.
        """
        ...

    async def begin_offsets(self, tps: Iterable[TP]) -> dict[TP, int]: ...

    async def end_offsets(self, tps: Iterable[TP]) -> dict[TP, int]: ...

    async def reader(self, positions: Mapping[TP, int], *, min_bytes: int = 1) -> Reader:
        """`min_bytes`: how much the broker may gather, for up to `GATHER_MS`, before it answers."""
        ...

    async def join(self, group: str, topics: Sequence[str]) -> Membership: ...

    async def close(self) -> None: ...


Ranges: TypeAlias = Mapping[TP, tuple[int, int]]


async def read_ranges(
    log: Log, ranges: Ranges, *, max_wait_ms: int = 500, max_idle_polls: int = 60
) -> dict[TP, list[LogRecord]]:
    """Every record with start <= offset < end of each partition; ends on position, never on having seen a record.

    Raises
    ------
    BrokerAwayError
        No position made progress for `max_idle_polls` polls.
    """
    found: dict[TP, list[LogRecord]] = {tp: [] for tp in ranges}
    open_ranges = {tp: span for tp, span in ranges.items() if span[0] < span[1]}
    if not open_ranges:
        return found
    reader = await log.reader({tp: start for tp, (start, _) in open_ranges.items()})
    try:
        idle = 0
        while open_ranges:
            got = await reader.poll(max_wait_ms, 10_000)
            idle = 0 if got else idle + 1
            for tp, records in got.items():
                end = ranges[tp][1]
                found[tp].extend(record for record in records if record.offset < end)
            for tp in [tp for tp in open_ranges if tp in got or idle]:
                if await reader.position(tp) >= ranges[tp][1]:
                    del open_ranges[tp]
                    reader.pause([tp])
            if idle > max_idle_polls:
                raise BrokerAwayError(f"no progress reading {sorted(open_ranges)}: is the broker in trouble?")
    finally:
        await reader.close()
    return found
