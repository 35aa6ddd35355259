"""P1 checked: recompute every derived topic from the journal and compare it with what was written, byte for byte.

What is compared is the canonical view: key, Avro body, schema. The first divergence is reported with topic, partition,
seq, field and both values.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterator, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from orderflow.config import Config
from orderflow.errors import LogError
from orderflow.replay.cascade import NOTHING, WHOLE, Cascade, Derived, Place
from orderflow.replay.plan import Bound, Planner
from orderflow.replay.start import Start, newest_start, oldest_start
from orderflow.streaming.codec import PREFIX_BYTES, Codecs, peek
from orderflow.streaming.journal import JournalView, session_of
from orderflow.streaming.log import TP, Log, LogRecord, read_ranges
from orderflow.streaming.runtime import PROGRESS_HEADER
from orderflow.streaming.seek import BEYOND, NEIGHBOURS, decoded, offset_of_seq, read_journal
from orderflow.topics import DERIVED, JOURNAL, PARTITIONS

CHUNK: Final = 5000
MAX_IDLE_POLLS: Final = 60
TURN_RECORDS: Final = 100
TAIL_RECORDS: Final = 50
CATCH_UP_SEC: Final = 10.0
"""How long services that lag may stand still before they are judged as they are."""


@dataclass(frozen=True, slots=True)
class Divergence:
    """The first place where a topic partition differs from its recomputation."""

    topic: str
    partition: int
    seq: int
    sub: int
    field: str
    live: Any
    recomputed: Any

    def __str__(self) -> str:
        return (
            f"{self.topic}[{self.partition}] seq {self.seq} sub {self.sub} field {self.field}: "
            f"live {self.live!r}, recomputed {self.recomputed!r}"
        )


@dataclass(slots=True)
class Report:
    """What a verification found."""

    journal_records: int = 0
    compared: dict[str, int] = field(default_factory=lambda: dict.fromkeys(DERIVED, 0))
    divergences: list[Divergence] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    """What could not be judged, and why."""
    reached: dict[int, int] = field(default_factory=dict)
    """Partition -> the newest seq that was judged."""

    @property
    def identical(self) -> bool:
        return not self.divergences


@dataclass(frozen=True, slots=True)
class Span:
    """Which journal records of a partition are judged, both ends included."""

    from_seq: int = 0
    to_seq: int = BEYOND


async def canonical(
    log: Log, tp: TP, *, journal: bool = False, start: int = 0
) -> AsyncIterator[list[tuple[int, int, LogRecord]]]:
    """The canonical view of a topic partition, in chunks of (seq, sub, record), from offset `start` to its end.

    Raises
    ------
    LogError
        The end can't be reached, or a value is not in the wire format: a part would pass for the whole.
    """
    begin = max(start, (await log.begin_offsets([tp]))[tp])
    end = (await log.end_offsets([tp]))[tp]
    if begin >= end:
        return
    view = JournalView()
    last = (-1, -1)
    reader = await log.reader({tp: begin})
    try:
        idle = 0
        while await reader.position(tp) < end:
            got = (await reader.poll(500, CHUNK)).get(tp, ())
            idle = 0 if got else idle + 1
            if idle >= MAX_IDLE_POLLS:
                raise LogError(
                    f"{tp.topic}[{tp.partition}]: nothing came for {MAX_IDLE_POLLS // 2} s at offset "
                    f"{await reader.position(tp)} of {end}: see to the broker and try again"
                )
            chunk: list[tuple[int, int, LogRecord]] = []
            for record in got:
                if record.value is None or record.offset >= end:
                    continue
                seq, sub = _place(tp, record.offset, record.value)
                if journal:
                    if view.admit(record, seq, sub):
                        chunk.append((seq, 0, record))
                elif (seq, sub) > last:
                    last = (seq, sub)
                    chunk.append((seq, sub, record))
            if chunk:
                yield chunk
    finally:
        await reader.close()


def _place(tp: TP, offset: int, value: bytes) -> tuple[int, int]:
    try:
        return peek(value)[:2]
    except IndexError as error:
        raise LogError(
            f"{tp.topic}[{tp.partition}]: the value at offset {offset} is not in the wire format: {value[:20].hex()}; "
            "something else has written into this topic"
        ) from error


class _Live:
    """The live canonical view of one topic partition behind a place, read ahead in chunks."""

    def __init__(self, log: Log, tp: TP, after: Place) -> None:
        self._log = log
        self._tp = tp
        self._after = after
        self._chunks: AsyncIterator[list[tuple[int, int, LogRecord]]] | None = None
        self._waiting: deque[tuple[int, int, LogRecord]] = deque()
        self._oldest: Place | None = None

    async def head(self) -> tuple[int, int, LogRecord] | None:
        """The next record, left where it is; None at the end."""
        if self._chunks is None:
            self._chunks = canonical(self._log, self._tp, start=await self._first_offset())
        while not self._waiting:
            try:
                chunk = await anext(self._chunks)
            except StopAsyncIteration:
                return None
            self._waiting.extend(each for each in chunk if each[:2] > self._after)
        return self._waiting[0]

    async def _first_offset(self) -> int:
        if self._after == NOTHING:
            return 0
        # What a superseded writer repeated may stand out of order: begin well before.
        return max(0, await offset_of_seq(self._log, self._tp, self._after[0]) - NEIGHBOURS)

    def take(self) -> None:
        """Step over the head."""
        self._waiting.popleft()

    async def retained(self, seq: int, sub: int) -> bool:
        """Whether a record of this place would still be here: retention may have passed it."""
        if self._oldest is None:
            begin = (await self._log.begin_offsets([self._tp]))[self._tp]
            self._oldest = NOTHING
            if begin > 0:
                async for chunk in canonical(self._log, self._tp):
                    self._oldest = chunk[0][:2]
                    break
        return (seq, sub) >= self._oldest


async def verify(
    log: Log,
    codecs: Codecs,
    config: Config,
    prefix: str,
    begin: Bound | None = None,
    end: Bound | None = None,
    *,
    live_prefix: str | None = None,
    from_snapshots: bool = False,
    partitions: Iterable[int] = range(PARTITIONS),
    catch_up_sec: float = CATCH_UP_SEC,
) -> Report:
    """Recompute a stretch and compare.

    Reports at most one divergence per topic partition, the first that lies in the stretch: what follows it is a
    consequence more often than not. Records are matched by (seq, sub), so that a missing or an added one does not spoil
    the rest.

    Parameters
    ----------
    begin, end
        What is judged; None: everything that is there when this is called. `end` is included where it is a seq.
    live_prefix
        Judge topics under another prefix than the journal's.
    from_snapshots
        Compute from the newest snapshots before `begin`, which is quick; else from the oldest retained record, which
        trusts no snapshot but where the journal's beginning is gone.
    catch_up_sec
        How long to wait for services that make no progress; what they lack then is a divergence.
    """
    judge = _Judge(log, codecs, config, prefix, prefix if live_prefix is None else live_prefix)
    chosen = sorted(partitions)
    journals = {partition: TP(prefix + JOURNAL, partition) for partition in chosen}
    ends = await log.end_offsets(journals.values())
    newest = {p: await newest_seq(log, tp, ends[tp]) for p, tp in journals.items()}
    await judge.catch_up(newest, catch_up_sec)
    planner = Planner(log, codecs, prefix, config, config)
    for partition, tp in journals.items():
        span = Span(*await planner.bounds_of(tp, ends[tp], begin, end))
        await judge.partition(partition, span, ends[tp], from_snapshots=from_snapshots)
    return judge.report


class _Judge:
    """One verification under way."""

    def __init__(self, log: Log, codecs: Codecs, config: Config, prefix: str, live_prefix: str) -> None:
        self.report = Report()
        self._log = log
        self._codecs = codecs
        self._config = config
        self._prefix = prefix
        self._live_prefix = live_prefix

    async def catch_up(self, newest: Mapping[int, int], patience_sec: float) -> None:
        """Wait until every service has dealt with what was in the journal, or stands still."""
        behind = {TP(self._live_prefix + topic, p): seq for p, seq in newest.items() if seq > 0 for topic in DERIVED}
        moved = time.monotonic()
        before: dict[TP, int] = {}
        while behind:
            now = await frontiers(self._log, behind)
            if now != before:
                before, moved = now, time.monotonic()
            behind = {tp: seq for tp, seq in behind.items() if now[tp] < seq}
            before = {tp: now[tp] for tp in behind}
            if behind and time.monotonic() - moved > patience_sec:
                return
            if behind:
                await asyncio.sleep(min(0.2, patience_sec))

    async def partition(self, partition: int, span: Span, end: int, *, from_snapshots: bool) -> None:
        journal_tp = TP(self._prefix + JOURNAL, partition)
        start = await self._start(partition, span, from_snapshots)
        if start is None or span.from_seq > span.to_seq:
            return
        cascade = Cascade(self._config, self._codecs, partition)
        cascade.restore(start.snapshots)
        after = {
            topic: max(place, (span.from_seq - 1, WHOLE)) if span.from_seq > 1 else place
            for topic, place in cascade.written.items()
        }
        matches = {
            topic: _Match(
                topic, partition, _Live(self._log, TP(self._live_prefix + topic, partition), after[topic]), self._codecs
            )
            for topic in DERIVED
        }
        judging = start.exact
        last = -1
        reading = read_journal(self._log, journal_tp, start.offset, start.epoch, start.last_seq, end, chunk=CHUNK)
        async for chunk in reading:
            for seq, record in chunk:
                if seq < start.from_seq or seq > span.to_seq:
                    continue
                assert record.value is not None
                journal = await decoded(self._codecs, record.value)
                if not judging and journal["kind"] == "config" and session_of(journal["payload"]):
                    judging = self._judge_from(matches, partition, seq)
                await self._step(cascade, matches, journal, span, judging=judging)
                if seq % TURN_RECORDS == 0:
                    await asyncio.sleep(0)  # pages and signals have their turn
                last = seq
            if chunk[-1][0] > span.to_seq:
                break
        if not judging and last >= 0:
            self.report.notes.append(
                f"partition {partition}: nothing was judged: {', '.join(start.without_past)} would have begun in the middle "
                "of a session, without a snapshot"
            )
            return
        self.report.reached[partition] = last
        await self._finish(matches, journal_tp, end, span.to_seq)

    async def _start(self, partition: int, span: Span, from_snapshots: bool) -> Start | None:
        log, codecs, config, prefix = self._log, self._codecs, self._config, self._prefix
        if from_snapshots:
            return await newest_start(log, codecs, config, prefix, partition, span.from_seq)
        start = await newest_start(log, codecs, config, prefix, partition, 0)
        if start.exact:
            return start
        oldest = await oldest_start(log, codecs, config, prefix, partition)
        return start if oldest is None else oldest

    def _judge_from(self, matches: Mapping[str, _Match], partition: int, seq: int) -> bool:
        """A session begins: from here on everything is known, and nothing before it is judged."""
        self.report.notes.append(
            f"partition {partition}: judged from seq {seq} on, where a session begins; before it there is no snapshot that "
            "fits"
        )
        for match in matches.values():
            match.pass_by((seq - 1, WHOLE))
        return True

    async def _step(
        self, cascade: Cascade, matches: Mapping[str, _Match], journal: dict[str, Any], span: Span, *, judging: bool
    ) -> None:
        self.report.journal_records += 1
        written = cascade.step(journal)
        if not judging or journal["seq"] < span.from_seq:
            return
        for topic, expected in written.items():
            match = matches[topic]
            for each in expected:
                await match.expect(each)
                self.report.compared[topic] += 1

    async def _finish(self, matches: Mapping[str, _Match], journal: TP, end: int, to_seq: int) -> None:
        newest = await newest_seq(self._log, journal, end)
        limit = to_seq
        if to_seq >= newest:
            # Behind the end of a journal that rests nothing may be left; one that grows meanwhile has more.
            rests = (await self._log.end_offsets([journal]))[journal] == end
            limit = BEYOND if rests else newest
        for match in matches.values():
            await match.finish(limit)
            if match.found is not None:
                self.report.divergences.append(match.found)


async def newest_seq(log: Log, journal: TP, end: int) -> int:
    """Number of the newest record of a journal partition before an offset; -1 where there is none."""
    return max((await _tail(log, {journal: end}))[journal], default=(-1, -1))[0]


async def frontiers(log: Log, tps: Iterable[TP]) -> dict[TP, int]:
    """Per topic partition: the seq at or below which its writer will write nothing more."""
    ends = await log.end_offsets(tps)
    return {tp: max((done for _, done in found), default=-1) for tp, found in (await _tail(log, ends)).items()}


async def _tail(log: Log, ends: Mapping[TP, int]) -> dict[TP, list[tuple[int, int]]]:
    """Per partition: (seq, what it promises) of its newest records; of a marker, (-1, progress)."""
    begins = await log.begin_offsets(ends)
    spans = {tp: (max(begins[tp], end - TAIL_RECORDS), end) for tp, end in ends.items()}
    found: dict[TP, list[tuple[int, int]]] = {}
    for tp, records in (await read_ranges(log, spans)).items():
        found[tp] = []
        for record in records:
            if record.value is not None:
                seq = peek(record.value)[0]
                found[tp].append((seq, seq - 1))
            else:
                progress = [int(value) for name, value in record.headers if name == PROGRESS_HEADER]
                found[tp].append((-1, max(progress, default=-1)))
    return found


class _Match:
    """The live records of one topic partition beside the recomputed ones."""

    def __init__(self, topic: str, partition: int, live: _Live, codecs: Codecs) -> None:
        self.found: Divergence | None = None
        self._topic = topic
        self._partition = partition
        self._live = live
        self._codecs = codecs
        self._passed = NOTHING

    def pass_by(self, place: Place) -> None:
        """Judge nothing at or below a place."""
        self._passed = place

    async def expect(self, derived: Derived) -> None:
        """Compare one recomputed record with the live one in its place."""
        seq, sub, key, value, _ = derived
        head = await self._live.head()
        while head is not None and head[:2] < (seq, sub):
            self._added(head)
            self._live.take()
            head = await self._live.head()
        if head is not None and head[:2] == (seq, sub):
            difference = self._difference(head[2], key, value)
            self._live.take()
            if difference is not None:
                self._note(seq, sub, *difference)
        elif await self._live.retained(seq, sub):
            self._note(seq, sub, "(record)", "no such record", "a record")

    async def finish(self, last_seq: int) -> None:
        """Whatever is left up to a seq was never recomputed."""
        while self.found is None and (head := await self._live.head()) is not None and head[0] <= last_seq:
            self._added(head)
            self._live.take()

    def _added(self, head: tuple[int, int, LogRecord]) -> None:
        self._note(head[0], head[1], "(record)", "a record", "no such record")

    def _note(self, seq: int, sub: int, name: str, live: Any, recomputed: Any) -> None:
        if self.found is None and (seq, sub) > self._passed:
            self.found = Divergence(self._topic, self._partition, seq, sub, name, live, recomputed)

    def _difference(self, record: LogRecord, key: bytes, value: bytes) -> tuple[str, Any, Any] | None:
        live = record.value
        assert live is not None
        if record.key == key and live[PREFIX_BYTES:] == value[PREFIX_BYTES:]:
            return None
        if record.key != key:
            return "(key)", record.key, key
        decode = self._codecs.decoder(self._topic)
        recomputed = decode(value)
        try:
            decoded = decode(live)
        except (LogError, ValueError, EOFError, LookupError) as error:
            return "(bytes)", f"{live[:40].hex()}, which can't be decoded: {error!r}", value[:40].hex()
        return first_difference(decoded, recomputed)


def first_difference(live: Mapping[str, Any], recomputed: Mapping[str, Any]) -> tuple[str, Any, Any]:
    """The first field, in the schema's order, whose values differ; NaN equals NaN, 0.0 differs from -0.0."""
    for name in recomputed:
        if repr(live.get(name)) != repr(recomputed[name]):
            return name, live.get(name), recomputed[name]
    return "(bytes)", "equal fields, other bytes", "equal fields, other bytes"
