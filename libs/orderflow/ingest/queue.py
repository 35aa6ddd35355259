"""What waits between the sockets and the journal: bounded, in the order of arrival, every loss accounted for. Pure.

Two bounds in one: records and bytes. Beyond the bound a newer quote of a symbol takes the place of the one that waits
(conflation: the older one is superseded anyway); diffs and trades go on to twice the bound and are dropped beyond it.
Either way a `gap` says exactly how much, in front of the next record of that stream: whoever has come to a record of the
journal knows all that is missing before it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any, Final

import msgspec

from orderflow.ingest.ids import IdSpan, ids_of
from orderflow.processor import Record
from orderflow.streaming.recorder import journal_record

DROP_FACTOR: Final = 2
"""Frames are dropped only beyond so many times the bound."""
RECORD_BYTES: Final = 640
"""What a waiting record costs besides its payload: its dictionary, its numbers, its place here."""
MAX_RANGES: Final = 64
"""Ranges of ids told per loss; what lies beyond widens the last one."""
COMPACT_SLACK: Final = 1024
"""Superseded places that may wait among the others before they are swept out."""


class _Place:
    """A record's place in the queue; None where a newer quote has superseded it."""

    __slots__ = ("conflated", "partition", "record")

    def __init__(self, partition: int, record: Record, conflated: int) -> None:
        self.partition = partition
        self.record: Record | None = record
        self.conflated = conflated
        """Older quotes of the symbol that this one stands for."""


class Loss:
    """Frames of one stream of one symbol that were dropped in a row."""

    __slots__ = ("frames", "hull", "ranges")

    def __init__(self) -> None:
        self.frames = 0
        self.ranges: list[IdSpan] = []
        self.hull = False
        """Whether the last range also covers ids that were not dropped."""

    def add(self, kind: str, frame: bytes) -> None:
        """Count a frame. Ids of trades follow each other; those of diffs and quotes only rise."""
        self.frames += 1
        ids = ids_of(kind, frame)
        if ids is None:
            return
        if self.ranges:
            first, last = self.ranges[-1]
            follows = first <= ids[0] <= last + 1 if kind == "aggTrade" else ids[0] >= first
            if follows or len(self.ranges) >= MAX_RANGES:
                self.hull = self.hull or not follows
                self.ranges[-1] = (min(first, ids[0]), max(last, ids[1]))
                return
        self.ranges.append(ids)

    def payload(self, kind: str) -> bytes:
        """The JSON of the `gap` that tells of it."""
        content: dict[str, Any] = {"reason": "dropped", "streams": [kind], "frames": self.frames, "ranges": self.ranges}
        if self.hull:
            content["hull"] = True
        return msgspec.json.encode(content)


class FrameQueue:
    """Records on their way into the journal.

    Parameters
    ----------
    max_records, max_bytes
        The bound.
    blocking
        Whether readers wait beyond the bound: then nothing is conflated or dropped, and each of them overshoots the bound
        by one frame at most.
    """

    def __init__(self, max_records: int, max_bytes: int, blocking: bool) -> None:
        self._max_records = max_records
        self._max_bytes = max_bytes
        self._blocking = blocking
        self._places: deque[_Place] = deque()
        self._quotes: dict[str, _Place] = {}
        """The newest waiting quote of each symbol."""
        self._losses: dict[tuple[int, str | None, str], Loss] = {}
        self.records = 0
        """Records that wait."""
        self.bytes = 0
        self.most_records = 0
        self.conflated = 0
        self.dropped: dict[str, int] = {}
        """Frames dropped by kind of stream, since the process began."""

    @property
    def over(self) -> bool:
        """Whether the bound is reached: readers that can wait do."""
        return self.records >= self._max_records or self.bytes >= self._max_bytes

    @property
    def full(self) -> bool:
        """Whether no frame goes in any more."""
        return self.records >= DROP_FACTOR * self._max_records or self.bytes >= DROP_FACTOR * self._max_bytes

    @property
    def easy(self) -> bool:
        """Whether it is at most half as full as the bound allows: readers that waited go on."""
        return 2 * self.records <= self._max_records and 2 * self.bytes <= self._max_bytes

    def put(self, partition: int, record: Record) -> None:
        """Add what is no frame: never refused, for its senders have bounds of their own."""
        self._add(partition, record, 0)

    def admit(self, partition: int, record: Record, kind: str) -> None:
        """Add a frame of a stream of that kind, or conflate it, or count it as dropped."""
        if not self.over or self._blocking:
            self._admitted(partition, record, kind, 0)
            return
        waiting = self._quotes.get(record["symbol"]) if kind == "bookTicker" else None
        if waiting is not None:
            self._supersede(waiting)
            self._admitted(partition, record, kind, waiting.conflated + 1)
        elif not self.full:
            self._admitted(partition, record, kind, 0)
        else:
            self.drop(partition, record["symbol"], kind, record["payload"])

    def drop(self, partition: int, symbol: str | None, kind: str, frame: bytes) -> None:
        """Count a frame as dropped; a gap tells of it before the next one of its stream."""
        self.dropped[kind] = self.dropped.get(kind, 0) + 1
        key = (partition, symbol, kind)
        loss = self._losses.get(key)
        if loss is None:
            loss = self._losses[key] = Loss()
        loss.add(kind, frame)

    def tell_losses(self, now_ns: int) -> None:
        """A gap for whatever was dropped and is not told yet."""
        for key in list(self._losses):
            self._tell(key, now_ns)

    def take(self, append: Callable[[int, Record], None], most: int) -> None:
        """Hand over at most `most` places, oldest first; gaps of conflated quotes come in between."""
        places = self._places
        for _ in range(min(most, len(places))):
            place = places.popleft()
            record = place.record
            if record is None:
                continue
            self.records -= 1
            self.bytes -= len(record["payload"]) + RECORD_BYTES
            symbol = record["symbol"]
            if self._quotes.get(symbol) is place:
                del self._quotes[symbol]
            if place.conflated:
                payload = {"reason": "conflated", "streams": ["bookTicker"], "frames": place.conflated}
                gap = journal_record(
                    "gap",
                    record["recv_ts_ns"],
                    route=record["route"],
                    symbol=symbol,
                    source_position=record["source_position"],
                    payload=msgspec.json.encode(payload),
                )
                append(place.partition, gap)
            append(place.partition, record)

    def _admitted(self, partition: int, record: Record, kind: str, conflated: int) -> None:
        symbol = record["symbol"]
        if self._losses and (partition, symbol, kind) in self._losses:
            self._tell((partition, symbol, kind), record["recv_ts_ns"])
        place = self._add(partition, record, conflated)
        if kind == "bookTicker":
            self._quotes[symbol] = place

    def _add(self, partition: int, record: Record, conflated: int) -> _Place:
        place = _Place(partition, record, conflated)
        self._places.append(place)
        self.records += 1
        self.bytes += len(record["payload"]) + RECORD_BYTES
        if self.records > self.most_records:
            self.most_records = self.records
        return place

    def _supersede(self, place: _Place) -> None:
        record = place.record
        assert record is not None
        place.record = None
        self.conflated += 1
        self.records -= 1
        self.bytes -= len(record["payload"]) + RECORD_BYTES
        if len(self._places) > 2 * self.records + COMPACT_SLACK:
            self._places = deque(each for each in self._places if each.record is not None)

    def _tell(self, key: tuple[int, str | None, str], now_ns: int) -> None:
        partition, symbol, kind = key
        loss = self._losses.pop(key)
        self._add(partition, journal_record("gap", now_ns, symbol=symbol, payload=loss.payload(kind)), 0)
