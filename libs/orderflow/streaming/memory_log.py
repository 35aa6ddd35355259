"""The in-memory twin of the Kafka log: for unit tests, simulation and recomputation. Same contract, no clock."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from orderflow.errors import LogError
from orderflow.streaming.log import TP, Batch, Committed, Headers, LogRecord
from orderflow.topics import PARTITIONS


@dataclass(frozen=True, slots=True)
class MemoryRecord:
    """One stored record."""

    offset: int
    timestamp: int
    key: bytes | None
    value: bytes | None
    headers: Headers


class MemoryBatch:
    """A list of records, closed at `max_bytes` like a Kafka batch."""

    def __init__(self, max_bytes: int) -> None:
        self.records: list[tuple[bytes, bytes | None, int, Headers]] = []
        self._bytes = 0
        self._max_bytes = max_bytes

    def append(
        self, key: bytes, value: bytes | None, timestamp_ms: int, headers: list[tuple[str, bytes]] | None = None
    ) -> bool:
        size = len(key) + len(value or b"")
        if self.records and self._bytes + size > self._max_bytes:
            return False
        self._bytes += size
        self.records.append((key, value, timestamp_ms, headers or ()))
        return True

    def __len__(self) -> int:
        return len(self.records)


class MemoryReader:
    """Positions over a `MemoryLog`."""

    def __init__(self, log: MemoryLog, positions: Mapping[TP, int]) -> None:
        self._log = log
        self._positions = dict(positions)
        self._paused: set[TP] = set()
        self._turn = 0

    async def poll(self, max_wait_ms: int, max_records: int) -> dict[TP, Sequence[LogRecord]]:
        found = self._take(max_records)
        if not found and max_wait_ms > 0:
            try:
                async with asyncio.timeout(max_wait_ms / 1000):
                    while not found:
                        await self._log.wait_for_append()
                        found = self._take(max_records)
            except TimeoutError:
                pass
        else:
            await asyncio.sleep(0)
        return found

    def _take(self, max_records: int) -> dict[TP, Sequence[LogRecord]]:
        found: dict[TP, Sequence[LogRecord]] = {}
        left = max_records
        tps = sorted(self._positions)
        self._turn += 1
        first = self._turn % max(1, len(tps))
        for tp in tps[first:] + tps[:first]:
            if tp in self._paused or left <= 0:
                continue
            records = self._log.slice(tp, self._positions[tp], left)
            if records:
                found[tp] = records
                self._positions[tp] = records[-1].offset + 1
                left -= len(records)
        return found

    async def position(self, tp: TP) -> int:
        return self._positions[tp]

    def pause(self, tps: Iterable[TP]) -> None:
        self._paused.update(tps)

    def resume(self, tps: Iterable[TP]) -> None:
        self._paused.difference_update(tps)

    async def close(self) -> None:
        self._positions.clear()


class MemoryMembership:
    """A member of an in-memory group with range assignment."""

    def __init__(self, group: _Group) -> None:
        self._group = group
        self.assigned: frozenset[int] = frozenset()
        self.changed = asyncio.Event()
        self.failure: LogError | None = None

    def assign(self, partitions: frozenset[int]) -> None:
        if partitions != self.assigned:
            self.assigned = partitions
            self.changed.set()

    async def commit(self, offsets: Mapping[TP, int]) -> bool:
        if any(tp.partition not in self.assigned for tp in offsets):
            return False
        self._group.offsets.update({tp: Committed(offset, by_hand=False) for tp, offset in offsets.items()})
        return True

    async def committed(self, tps: Iterable[TP]) -> dict[TP, Committed]:
        return {tp: self._group.offsets[tp] for tp in tps if tp in self._group.offsets}

    async def close(self) -> None:
        self._group.leave(self)


class _Group:
    def __init__(self, partitions: int) -> None:
        self.offsets: dict[TP, Committed] = {}
        self._members: list[MemoryMembership] = []
        self._partitions = partitions

    def join(self) -> MemoryMembership:
        member = MemoryMembership(self)
        self._members.append(member)
        self._assign()
        return member

    def leave(self, member: MemoryMembership) -> None:
        if member in self._members:
            self._members.remove(member)
            member.assign(frozenset())
            self._assign()

    def _assign(self) -> None:
        count = len(self._members)
        if not count:
            return
        base, extra = divmod(self._partitions, count)
        start = 0
        for index, member in enumerate(self._members):
            size = base + (1 if index < extra else 0)
            member.assign(frozenset(range(start, start + size)))
            start += size


class MemoryLog:
    """Every topic partition is a list. Topics come to be at the first append, or by `create`."""

    def __init__(self, *, max_batch_bytes: int = 1 << 20) -> None:
        self._records: dict[TP, list[MemoryRecord]] = {}
        self._begin: dict[TP, int] = {}
        self._max_batch_bytes = max_batch_bytes
        self._appended = asyncio.Event()
        self._groups: dict[tuple[str, tuple[str, ...]], _Group] = {}

    reachable = True

    def batch(self) -> MemoryBatch:
        return MemoryBatch(self._max_batch_bytes)

    async def send(self, batch: Batch, tp: TP) -> asyncio.Future[int]:
        future: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        future.set_result(self.append(batch, tp))
        return future

    def append(self, batch: Batch, tp: TP) -> int:
        """Store a batch at once; its base offset."""
        assert isinstance(batch, MemoryBatch)
        stored = self._records.setdefault(tp, [])
        base = self._begin.get(tp, 0) + len(stored)
        for index, (key, value, timestamp_ms, headers) in enumerate(batch.records):
            stored.append(MemoryRecord(base + index, timestamp_ms, key, value, tuple(headers)))
        self._appended.set()
        self._appended = asyncio.Event()
        return base

    async def wait_for_append(self) -> None:
        """Until the next append to any partition."""
        await self._appended.wait()

    def slice(self, tp: TP, start: int, count: int) -> Sequence[LogRecord]:
        """At most `count` records from offset `start`."""
        begin = self._begin.get(tp, 0)
        if start < begin:
            raise LogError(
                f"{tp.topic}[{tp.partition}]: position {start} lies before the oldest retained record {begin}; "
                "start from a newer position or rebuild the state"
            )
        return self._records.get(tp, [])[start - begin : start - begin + count]

    def trim(self, tp: TP, begin: int) -> None:
        """Forget records below offset `begin`, as retention does."""
        old = self._begin.get(tp, 0)
        self._records[tp] = self._records.get(tp, [])[max(0, begin - old) :]
        self._begin[tp] = max(old, begin)

    async def begin_offsets(self, tps: Iterable[TP]) -> dict[TP, int]:
        return {tp: self._begin.get(tp, 0) for tp in tps}

    async def end_offsets(self, tps: Iterable[TP]) -> dict[TP, int]:
        return {tp: self._begin.get(tp, 0) + len(self._records.get(tp, ())) for tp in tps}

    async def reader(self, positions: Mapping[TP, int], *, min_bytes: int = 1) -> MemoryReader:
        return MemoryReader(self, positions)

    def reset_offsets(self, group: str, offsets: Mapping[TP, int]) -> None:
        """What Kafka's own tools do to a group at rest."""
        key = (group, tuple(sorted({tp.topic for tp in offsets})))
        found = self._groups.setdefault(key, _Group(PARTITIONS))
        found.offsets.update({tp: Committed(offset, by_hand=True) for tp, offset in offsets.items()})

    async def join(self, group: str, topics: Sequence[str]) -> MemoryMembership:
        key = (group, tuple(sorted(topics)))
        if key not in self._groups:
            self._groups[key] = _Group(PARTITIONS)
        return self._groups[key].join()

    async def close(self) -> None:
        self._records.clear()
