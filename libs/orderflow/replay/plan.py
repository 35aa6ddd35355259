"""What a replay is to do: which records of each partition, and where each begins to compute."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from orderflow.config import Config
from orderflow.errors import OrderflowError
from orderflow.replay.cascade import NOTHING
from orderflow.replay.engine import Span
from orderflow.replay.files import SETTLE_SEC
from orderflow.replay.start import EVERY_STAGE, Start, changed_stages, newest_start, oldest_start
from orderflow.streaming.codec import Codecs, peek
from orderflow.streaming.log import TP, Log
from orderflow.streaming.seek import BEYOND, decoded, offset_of_seq, seq_at, value_at
from orderflow.topics import JOURNAL

NS_PER_SEC: Final = 1_000_000_000
JSONL_SEC: Final = 60
"""How often the files of signals are cut."""


@dataclass(frozen=True, slots=True)
class Bound:
    """A place given by a person: a seq of every partition, or a receive time in nanoseconds."""

    seq: int | None = None
    ns: int | None = None


@dataclass(slots=True)
class Plan:
    """Per partition: what is asked for, where computing begins, where the journal ends."""

    spans: dict[int, Span]
    starts: dict[int, Start]
    ends: dict[int, int]
    changed: frozenset[str]
    """Stages whose settings, or whose inputs' settings, differ from the live ones."""

    @property
    def inexact(self) -> dict[int, Start]:
        """Partitions that begin without a past although a session goes on there."""
        return {
            partition: start
            for partition, start in self.starts.items()
            if not start.exact and self.spans[partition].to_seq >= start.from_seq
        }


class Planner:
    """Makes a plan over one journal."""

    def __init__(self, log: Log, codecs: Codecs, prefix: str, live: Config, config: Config) -> None:
        self._log = log
        self._codecs = codecs
        self._prefix = prefix
        self._config = config
        self._changed = changed_stages(live, config)

    async def plan(
        self,
        partitions: Sequence[int],
        begin: Bound | None,
        end: Bound | None,
        *,
        files: bool,
        warm_up_sec: float | None = None,
        lost_too: bool = False,
        snapshots: bool = True,
    ) -> Plan:
        """Decide where everything begins.

        Parameters
        ----------
        begin, end
            None: the oldest retained record, and the end as it is now. `end` is included where it is a seq, and left
            out where it is a time.
        files
            Whether files are written too: computing then begins a cut earlier, so that the first file is whole.
        warm_up_sec
            How much before the start stages under other settings begin; None: at the oldest retained record.
        lost_too
            Whether stages that lack a snapshot begin there too; else at the oldest retained record, so that nothing but
            what was changed differs.
        snapshots
            False where the journal has none beside it, as one that was rebuilt from files.

        Raises
        ------
        OrderflowError
            Nothing lies within the bounds.
        """
        tps = {partition: TP(self._prefix + JOURNAL, partition) for partition in partitions}
        ends = await self._log.end_offsets(tps.values())
        anew = self._changed if snapshots else EVERY_STAGE
        lead_sec = max(self._config.lake.rotate_sec, JSONL_SEC) + SETTLE_SEC + 1 if files else 0
        found = await asyncio.gather(
            *(self._one(tp, ends[tp], begin, end, anew, lead_sec, warm_up_sec, lost_too) for tp in tps.values())
        )
        spans = {partition: span for partition, (span, _) in zip(tps, found, strict=True)}
        if not any(span.from_seq <= span.to_seq for span in spans.values()):
            raise OrderflowError(
                f"the journal under prefix {self._prefix!r} has nothing between --from and --to: "
                "`orderflow tap market.journal --from earliest --count 1` shows where it begins"
            )
        return Plan(
            spans,
            {partition: start for partition, (_, start) in zip(tps, found, strict=True)},
            {tp.partition: offset for tp, offset in ends.items()},
            self._changed,
        )

    async def _one(
        self,
        tp: TP,
        end_offset: int,
        begin: Bound | None,
        end: Bound | None,
        anew: frozenset[str],
        lead_sec: float,
        warm_up_sec: float | None,
        lost_too: bool,
    ) -> tuple[Span, Start]:
        first = await self._first_seq(tp, end_offset)
        to_seq = await self._to_seq(tp, end)
        if first is None:
            empty = Start(tp.partition, end_offset, 0, None, 1)
            return Span(1, 0), empty
        if begin is None and first > 1 and not anew:
            start = await oldest_start(self._log, self._codecs, self._config, self._prefix, tp.partition)
            if start is not None:
                return Span(max(_taken(start) + 1, start.from_seq), to_seq), start
        from_seq = await self._from_seq(tp, begin, first)
        if from_seq > to_seq or from_seq == BEYOND:
            return Span(1, 0), Start(tp.partition, end_offset, 0, None, 1)
        need_seq, warm_seq = from_seq, 0
        if from_seq > first:
            moment_ns = await self._time_of(tp, from_seq)
            if lead_sec:
                need_seq = min(from_seq, await self._seq_at(tp, moment_ns - int(lead_sec * NS_PER_SEC)))
            if warm_up_sec is not None:
                warm_seq = min(need_seq, await self._seq_at(tp, moment_ns - int(warm_up_sec * NS_PER_SEC)))
        warm_seq = 0 if warm_seq <= first else warm_seq
        start = await newest_start(
            self._log,
            self._codecs,
            self._config,
            self._prefix,
            tp.partition,
            need_seq,
            anew=anew,
            warm_seq=warm_seq,
            lost_seq=warm_seq if lost_too else 0,
        )
        return Span(from_seq, to_seq), start

    async def bounds_of(self, tp: TP, end_offset: int, begin: Bound | None, end: Bound | None) -> tuple[int, int]:
        """First and last seq of a partition that lie within two bounds; the first is above the last where none does."""
        first = await self._first_seq(tp, end_offset)
        if first is None:
            return 1, 0
        return await self._from_seq(tp, begin, first), await self._to_seq(tp, end)

    async def _first_seq(self, tp: TP, end: int) -> int | None:
        offset = (await self._log.begin_offsets([tp]))[tp]
        while (value := await value_at(self._log, tp, offset, end)) is not None:
            seq = peek(value)[0]
            if seq >= 0:
                return seq
            offset += 1  # an `open`
        return None

    async def _from_seq(self, tp: TP, begin: Bound | None, first: int) -> int:
        if begin is None:
            return first
        if begin.seq is not None:
            return max(first, begin.seq)
        assert begin.ns is not None
        return max(first, await self._seq_at(tp, begin.ns))

    async def _to_seq(self, tp: TP, end: Bound | None) -> int:
        if end is None:
            return BEYOND
        if end.seq is not None:
            return end.seq
        assert end.ns is not None
        return await self._seq_at(tp, end.ns) - 1

    async def _seq_at(self, tp: TP, moment_ns: int) -> int:
        return await seq_at(self._log, self._codecs, tp, moment_ns)

    async def _time_of(self, tp: TP, seq: int) -> int:
        offset = await offset_of_seq(self._log, tp, seq)
        end = (await self._log.end_offsets([tp]))[tp]
        value = await value_at(self._log, tp, offset, end)
        if value is None:
            return BEYOND
        moment_ns: int = (await decoded(self._codecs, value))["recv_ts_ns"]
        return moment_ns


def _taken(start: Start) -> int:
    """The newest seq that any stage has taken or written before the start: what follows is computed whole."""
    places = [
        place
        for restored in start.snapshots.values()
        for place in (
            *((position.seq, position.sub) for position in restored.commit.inputs),
            *((tail.seq, tail.sub) for tail in restored.commit.outputs),
        )
    ]
    return max(places, default=NOTHING)[0]
