"""The files of a replay: the sinks of the live services, fed in the order of their merges, written at the same cuts."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import Final

import msgspec

from orderflow.lake.sink import NS_PER_SEC, CutSink, CutState, session_id
from orderflow.processor import Record
from orderflow.replay.cascade import Derived
from orderflow.topics import JOURNAL, TICKS

SETTLE_SEC: Final = 11
"""Longer than any window that a sink carries from cut to cut."""


class FileFeed:
    """One sink of one partition.

    Files are cut by journal positions, so a replay that begins in the middle of one can't write it: what comes before
    the first cut by the clock is dropped, and from there on every file is the live one's equal. The caller begins early
    enough that this cut lies before the stretch that was asked for.
    """

    def __init__(self, sink: CutSink, session: str) -> None:
        """`session` that goes on; empty where the journal is fed from the beginning of one."""
        self.sink = sink
        self.whole = not session
        self._settled_ns = -1
        if session:
            sink.restore({"": msgspec.msgpack.encode(CutState(session, None))})

    async def give(self, journal: Record, derived: Mapping[str, Sequence[Derived]]) -> None:
        """Take a journal record and what it caused.

        Raises
        ------
        LakeError
            A file can't be written.
        """
        if self._settled_ns < 0:
            self._settled_ns = journal["recv_ts_ns"] + SETTLE_SEC * NS_PER_SEC
        for topic in self.sink.inputs:
            if topic == JOURNAL:
                await self._take(topic, journal)
            else:
                for each in derived.get(topic, ()):
                    await self._take(topic, each.record)

    async def close(self) -> None:
        """Write what waits for a cut that the stretch does not reach: a file of its own name."""
        if self.sink.rows_buffered():
            await self._cut(journal_ns=0)

    async def _take(self, topic: str, record: Record) -> None:
        if self.sink.cut_before(topic, record):
            await self._cut(journal_ns=0)
        if topic == self.sink.control and session_id(record) is not None:
            self.whole = True
        if self.sink.step(topic, record):
            await self._cut(record["clock_ts_ns"] if topic == TICKS else 0)

    async def _cut(self, journal_ns: int) -> None:
        if self.whole:
            await asyncio.to_thread(self.sink.write)
            return
        if self.sink.discard() == "clock" and journal_ns >= self._settled_ns:
            self.whole = True
