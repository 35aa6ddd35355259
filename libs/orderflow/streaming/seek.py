"""Finding a place in a topic partition by bisection, and a safe place to begin reading a journal in its middle."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Final

from orderflow.errors import LogError
from orderflow.processor import Record
from orderflow.streaming.codec import Codecs, peek
from orderflow.streaming.journal import OPEN_KIND, JournalView, epoch_of
from orderflow.streaming.log import TP, Log, LogRecord, read_ranges
from orderflow.topics import JOURNAL

BEYOND: Final = 1 << 62
"""A seq, or a moment in nanoseconds, behind everything."""
PATIENCE_SEC: Final = 30.0
NEIGHBOURS: Final = 2000
"""Records looked at on both sides of a place in the journal, to learn which recorder's turn it is there."""


async def value_at(log: Log, tp: TP, offset: int, end: int) -> bytes | None:
    """The first value at or behind an offset, markers stepped over; None at the end.

    Raises
    ------
    LogError
        The broker gives nothing for 30 s.
    """
    if offset >= end:
        return None
    reader = await log.reader({tp: offset})
    try:
        async with asyncio.timeout(PATIENCE_SEC):
            while await reader.position(tp) < end:
                for record in (await reader.poll(500, 50)).get(tp, ()):
                    if record.value is not None:
                        return record.value
    except TimeoutError as error:
        raise LogError(
            f"{tp.topic}[{tp.partition}]: nothing came at offset {offset} within {PATIENCE_SEC:g} s"
        ) from error
    finally:
        await reader.close()
    return None


async def bisect(log: Log, tp: TP, at_or_after: Callable[[bytes], Awaitable[bool]]) -> int:
    """Offset of the first record of which a predicate holds that, once true, stays true; the end where none is."""
    low = (await log.begin_offsets([tp]))[tp]
    end = high = (await log.end_offsets([tp]))[tp]
    while low < high:
        middle = (low + high) // 2
        value = await value_at(log, tp, middle, end)
        if value is None or await at_or_after(value):
            high = middle
        else:
            low = middle + 1
    return low


async def offset_of_seq(log: Log, tp: TP, seq: int) -> int:
    """Offset of the first record of a topic partition at or above `seq`."""

    async def at_or_after(value: bytes) -> bool:
        return peek(value)[0] >= seq

    return await bisect(log, tp, at_or_after)


async def seq_at(log: Log, codecs: Codecs, tp: TP, moment_ns: int) -> int:
    """The first seq of a partition's journal whose receive time is at or after a moment; `BEYOND` where none is."""

    async def at_or_after(value: bytes) -> bool:
        # An `open` has no number and may be older than what precedes it: as a boundary it counts like any other.
        return bool((await decoded(codecs, value))["recv_ts_ns"] >= moment_ns)

    offset = await bisect(log, tp, at_or_after)
    end = (await log.end_offsets([tp]))[tp]
    while (value := await value_at(log, tp, offset, end)) is not None:
        seq = peek(value)[0]
        if seq >= 0:
            return seq
        offset += 1
    return BEYOND


async def decoded(codecs: Codecs, value: bytes) -> Record:
    """A journal value, whatever compatible schema wrote it."""
    decode = codecs.decoder(JOURNAL)
    if not decode.knows(value):
        await codecs.learn(JOURNAL, value)
    return decode(value)


async def journal_entry(log: Log, tp: TP, seq: int) -> tuple[int, int]:
    """(offset, epoch) from which the journal's canonical view holds every record from `seq` on.

    A reader that begins in the middle has not seen the `open` records before it, and could take a superseded recorder's
    late writes for the journal. So the records about the place are read: an epoch that rises among them without an
    `open` was opened before, and everything older is void.
    """
    begin = (await log.begin_offsets([tp]))[tp]
    end = (await log.end_offsets([tp]))[tp]
    offset = await offset_of_seq(log, tp, seq)
    back = NEIGHBOURS
    while True:
        start = max(begin, offset - back)
        records = (await read_ranges(log, {tp: (start, min(end, offset + NEIGHBOURS))}))[tp]
        epoch = _epoch_before(records)
        view = JournalView(epoch)
        first = next((peek(record.value)[0] for record in records if record.value and _admits(view, record)), None)
        if start == begin or (first is not None and first <= seq):
            return start, epoch
        back *= 4


async def epoch_at(log: Log, tp: TP, offset: int) -> int:
    """The epoch that the journal is under at an offset; see `journal_entry`."""
    begin = (await log.begin_offsets([tp]))[tp]
    end = (await log.end_offsets([tp]))[tp]
    span = (max(begin, offset - NEIGHBOURS), min(end, offset + NEIGHBOURS))
    records = (await read_ranges(log, {tp: span}))[tp]
    before = max((epoch_of(record) for record in records if record.offset < offset), default=0)
    return max(before, _epoch_before(records))


def _admits(view: JournalView, record: LogRecord) -> bool:
    seq, kind, _ = peek(record.value or b"")
    return view.admit(record, seq, kind)


def _epoch_before(records: Sequence[LogRecord]) -> int:
    """The newest epoch among records that none of their own `open`s announces."""
    newest = unannounced = 0
    for record in records:
        epoch = epoch_of(record)
        if epoch > newest:
            newest = epoch
            if record.value and peek(record.value)[1] != OPEN_KIND:
                unannounced = epoch
    return unannounced


class JournalReading:
    """The canonical view of one journal partition from a safe place on; a rise of epoch that nobody announced ends it."""

    def __init__(self, tp: TP, epoch: int, last_seq: int | None = None) -> None:
        self._tp = tp
        self._begun = epoch > 0
        self.view = JournalView(epoch, last_seq)

    def admit(self, record: LogRecord) -> int | None:
        """The seq of a record of the view; None for what does not belong to it.

        Raises
        ------
        LogError
            A number is missing, or what was read before was a superseded recorder's.
        """
        if record.value is None:
            return None
        try:
            seq, kind, _ = peek(record.value)
        except IndexError as error:
            raise LogError(
                f"{self._tp.topic}[{self._tp.partition}]: the value at offset {record.offset} is not in the wire "
                f"format: {record.value[:20].hex()}; something else has written into this topic"
            ) from error
        epoch = epoch_of(record)
        if self._begun and epoch > self.view.epoch and kind != OPEN_KIND:
            raise LogError(
                f"{self._tp.topic}[{self._tp.partition}]: at offset {record.offset} epoch {epoch} goes on that was "
                f"opened before this reading began, so what was read since is void: begin earlier"
            )
        self._begun = True
        return seq if self.view.admit(record, seq, kind) else None


async def read_journal(
    log: Log, tp: TP, offset: int, epoch: int, last_seq: int | None, end: int, *, chunk: int = 5000
) -> AsyncIterator[list[tuple[int, LogRecord]]]:
    """The journal's canonical view from `offset` to before `end`, in chunks of (seq, record).

    Raises
    ------
    LogError
        The end can't be reached, or the journal is damaged.
    """
    reading = JournalReading(tp, epoch, last_seq)
    if offset >= end:
        return
    reader = await log.reader({tp: offset})
    try:
        idle = 0
        while await reader.position(tp) < end:
            got = (await reader.poll(500, chunk)).get(tp, ())
            idle = 0 if got else idle + 1
            if idle * 0.5 > PATIENCE_SEC:
                raise LogError(
                    f"{tp.topic}[{tp.partition}]: nothing came for {PATIENCE_SEC:g} s before offset {end}: see to the "
                    "broker and try again"
                )
            found = [
                (seq, record) for record in got if record.offset < end and (seq := reading.admit(record)) is not None
            ]
            if found:
                yield found
    finally:
        await reader.close()
