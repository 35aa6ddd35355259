"""A run's journal as a capture: its frames and snapshots with their receive times, in the order in which they came.

The numbers of the journal count per partition. Across partitions the order is that of `source_position`: the frame's line
in a capture, or the recorder's count of frames received. Several recorders that share the symbols count each for itself;
their frames are put in the order of receipt.

What the format has no place for is counted: trades fetched afterwards (`backfill`), the exchange's clock and rules, ticks,
commands, and `gap`s. A replay of the file finds a gap again by the ids that are missing.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Final

import msgspec

from orderflow.capture import CaptureWriter, rest_frame, why_unheld
from orderflow.errors import CaptureError, OrderflowError
from orderflow.processor import Record
from orderflow.streaming.codec import Codecs
from orderflow.streaming.journal import session_of
from orderflow.streaming.log import TP, Log
from orderflow.topics import JOURNAL, PARTITIONS
from orderflow.venues.binance.frames import UNDECODABLE, decode_rest_agg_trades
from orderflow.venues.binance.streams import STREAMS_BY_ROUTE
from orderflow.verify import canonical

FLUSH_FRAMES: Final = 50_000
_RANKS: Final = {"frame": 0, "snapshot": 1}
"""A snapshot takes the position of the newest frame before it."""


@dataclass(slots=True)
class Exported:
    """What an export has written, and what it has not.

    Attributes
    ----------
    unheld : reason or kind of journal record -> number of records that the format can't hold.
    gaps : reason of a journalled gap -> number, a gap on several partitions counting once for each.
    cut : partition -> seq of its oldest record, where older ones have expired.
    """

    frames: int = 0
    snapshots: int = 0
    backfilled_trades: int = 0
    unheld: Counter[str] = field(default_factory=Counter)
    gaps: Counter[str] = field(default_factory=Counter)
    sessions: list[str] = field(default_factory=list)
    sources: set[str] = field(default_factory=set)
    cut: dict[int, int] = field(default_factory=dict)


class _Gap(msgspec.Struct):
    reason: str = "unknown"


class _Partition:
    """The journal of one partition, read ahead by one record that is of use."""

    def __init__(self, log: Log, codecs: Codecs, tp: TP, exported: Exported) -> None:
        self._chunks = canonical(log, tp, journal=True)
        self._codecs = codecs
        self._decode = codecs.decoder(JOURNAL)
        self._exported = exported
        self._records = self._all()
        self._number = tp.partition
        self.head: Record | None = None
        self.opening = ""
        """Session that the partition's oldest record belongs to; empty where that record has expired."""
        self.begun = False
        self._place = (0, 0)

    async def advance(self) -> Record | None:
        """Go on to the next frame or snapshot, counting what lies before it; None at the end."""
        self.head = None
        async for record in self._records:
            if record["kind"] in _RANKS:
                self.head = record
                break
            self._pass(record)
        return self.head

    def place(self, by_time: bool) -> tuple[int, int, int, int]:
        """Where the head belongs in the file; never before one of this partition that was there first."""
        assert self.head is not None
        head = self.head
        mark = (head["recv_ts_ns"] if by_time else head["source_position"], _RANKS[head["kind"]])
        self._place = max(self._place, mark)
        return (*self._place, head["recv_ts_ns"], self._number)

    async def _all(self) -> AsyncIterator[Record]:
        async for chunk in self._chunks:
            for seq, _, each in chunk:
                value = each.value or b""
                if not self._decode.knows(value):
                    await self._codecs.learn(JOURNAL, value)
                record = self._decode(value)
                if not self.begun:
                    self.begun = True
                    session = session_of(record["payload"]) if record["kind"] == "config" else None
                    self.opening = session["session"] if session else ""
                    if seq > 1:
                        self._exported.cut[self._number] = seq
                yield record

    def _pass(self, record: Record) -> None:
        exported, kind = self._exported, record["kind"]
        if kind == "config":
            session = session_of(record["payload"])
            if session is not None:
                exported.sources.add(str(session.get("source", "unknown")))
                if session["session"] not in exported.sessions:
                    exported.sessions.append(session["session"])
                return
        if kind == "gap":
            exported.gaps[gap_reason(record["payload"])] += 1
        elif kind == "backfill":
            try:
                exported.backfilled_trades += len(decode_rest_agg_trades(record["payload"]))
            except UNDECODABLE:
                pass  # counted as a record below all the same
        if kind != "end":
            exported.unheld[kind] += 1


def gap_reason(payload: bytes) -> str:
    """Why frames are missing, from the payload of a `gap`; `unknown` where it does not say."""
    try:
        return msgspec.json.decode(payload, type=_Gap).reason
    except UNDECODABLE:
        return "unknown"


async def export(log: Log, codecs: Codecs, prefix: str, writer: CaptureWriter) -> Exported:
    """Write every frame and snapshot of the journal under `prefix`; the caller closes the writer.

    Raises
    ------
    LogError
        The journal has a hole, or can't be read to its end.
    OrderflowError
        It holds several captures, whose frames have no common order; or nothing at all.
    """
    exported = Exported()
    partitions = [_Partition(log, codecs, TP(prefix + JOURNAL, number), exported) for number in range(PARTITIONS)]
    for each in partitions:
        await each.advance()
    if not any(each.begun for each in partitions):
        raise OrderflowError(f"the journal under prefix {prefix!r} is empty: name another run or prefix")
    by_time = len({each.opening for each in partitions if each.opening}) > 1
    heads = [(each.place(by_time), each) for each in partitions if each.head is not None]
    heap = [(place, number, each) for number, (place, each) in enumerate(heads)]
    heapq.heapify(heap)
    written = 0
    while heap:
        _, number, partition = heap[0]
        assert partition.head is not None
        _write(writer, partition.head, exported)
        written += 1
        if written % FLUSH_FRAMES == 0:
            writer.flush()
        following = await partition.advance()
        if "capture" in exported.sources and len(exported.sessions) > 1:
            raise OrderflowError(
                f"the journal under prefix {prefix!r} holds {len(exported.sessions)} sessions, of "
                f"{', '.join(sorted(exported.sources))}: the order of their frames is not known; export runs that hold "
                "one capture"
            )
        if following is None:
            heapq.heappop(heap)
        else:
            heapq.heapreplace(heap, (partition.place(by_time), number, partition))
    return exported


def _write(writer: CaptureWriter, record: Record, exported: Exported) -> None:
    payload: bytes = record["payload"]
    if record["kind"] == "snapshot":
        try:
            line = rest_frame(record["symbol"] or "", payload)
        except CaptureError:
            exported.unheld["snapshot_not_json"] += 1
            return
        writer.write(record["recv_ts_ns"], "rest", line)
        exported.snapshots += 1
        return
    why = why_unheld(payload) if record["route"] in STREAMS_BY_ROUTE else "no_route"
    if why is not None:
        exported.unheld[why] += 1
        return
    writer.write(record["recv_ts_ns"], record["route"], payload)
    exported.frames += 1
