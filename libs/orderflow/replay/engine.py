"""Recomputes a stretch of a journal into topics and files of its own, beside what the live services wrote."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Final

import msgspec

from orderflow.config import Config, effective_fingerprint
from orderflow.errors import LogError
from orderflow.processor import Record
from orderflow.replay.cascade import Cascade, Derived
from orderflow.replay.files import FileFeed
from orderflow.replay.start import Start
from orderflow.streaming.codec import Codecs
from orderflow.streaming.log import TP, Log, LogRecord, Reader
from orderflow.streaming.runtime import PROGRESS_HEADER
from orderflow.streaming.seek import PATIENCE_SEC, JournalReading, decoded
from orderflow.streaming.writer import Writer
from orderflow.topics import DERIVED, JOURNAL

if TYPE_CHECKING:
    from orderflow.lake.sqlite import SignalDatabase

POLL_RECORDS: Final = 8000
POLL_MS: Final = 200
TURN_RECORDS: Final = 500
"""Journal records of one partition that are computed before others have their turn."""
MOST_WAITING: Final = 20_000
"""Journal records of one partition that wait for their time before reading it is paused."""
IDLE_SEC: Final = 0.02


@dataclass(frozen=True, slots=True)
class Span:
    """What of one partition is asked for: journal records `from_seq` to `to_seq`, both included."""

    from_seq: int
    to_seq: int


@dataclass(slots=True)
class Progress:
    """How far a replay is; figures of its end too."""

    journal_records: int = 0
    """Records stepped, those before the stretch included."""
    derived: dict[str, int] = field(default_factory=lambda: dict.fromkeys(DERIVED, 0))
    files: int = 0
    commands_left_out: int = 0
    first_ns: int = 0
    """Receive time of the first record that was stepped."""
    newest_ns: dict[int, int] = field(default_factory=dict)
    """Receive time up to which each partition is done."""
    at_ns: int = 0
    """Receive time that every partition which is not done has come to."""
    done_share: float = 0.0
    """Of the journal's records that are to be read."""

    @property
    def market_sec(self) -> float:
        """Seconds of market that were computed: from the first record to the newest."""
        return (self.at_ns - self.first_ns) / 1e9 if self.at_ns else 0.0


@dataclass(frozen=True, slots=True)
class Target:
    """Where a replay goes."""

    prefix: str
    folder: Path | None
    """Root of the lake and of the signals' files; None: topics alone."""


class _Partition:
    """One partition: what was read and not yet stepped, and the machine."""

    def __init__(self, replay: Replay, start: Start, span: Span, end_offset: int) -> None:
        self.start = start
        self.span = span
        self.end_offset = end_offset
        self.next_offset = start.offset
        self.waiting: deque[tuple[int, LogRecord]] = deque()
        self.ahead: Record | None = None
        """The first of `waiting`, decoded."""
        self.read_whole = start.offset >= end_offset or span.to_seq < start.from_seq
        self.reading = JournalReading(TP(replay.journal_prefix + JOURNAL, start.partition), start.epoch, start.last_seq)
        self.cascade = Cascade(replay.config, replay.codecs, start.partition)
        self.cascade.restore(start.snapshots)
        self.outputs = {topic: TP(replay.target.prefix + topic, start.partition) for topic in DERIVED}
        self.stepped = start.from_seq - 1
        self.marked = span.from_seq - 1
        self.feeds = replay.feeds(start)

    @property
    def done(self) -> bool:
        return self.read_whole and not self.waiting

    def push(self, records: Sequence[LogRecord]) -> None:
        for record in records:
            if record.offset >= self.end_offset or self.read_whole:
                break
            seq = self.reading.admit(record)
            if seq is None or seq < self.start.from_seq:
                continue
            if seq > self.span.to_seq:
                self.read_whole = True
                break
            self.waiting.append((seq, record))
        if records:
            self.next_offset = records[-1].offset + 1


class Replay:
    """One replay. `run` does it; `progress` may be read meanwhile."""

    def __init__(
        self,
        log: Log,
        journal_codecs: Codecs,
        codecs: Codecs,
        config: Config,
        journal_prefix: str,
        target: Target,
        *,
        speed: float | None = None,
        keep_evaluator: bool = True,
    ) -> None:
        """`speed`: multiple of real time; None for as fast as can be. `codecs` are those of the target's topics."""
        self.log = log
        self.journal_codecs = journal_codecs
        self.codecs = codecs
        self.config = config
        self.journal_prefix = journal_prefix
        self.target = target
        self.progress = Progress()
        self._speed = speed
        self._keep_evaluator = keep_evaluator
        self._writer = Writer(log)
        self._parts: dict[int, _Partition] = {}
        self._read: frozenset[TP] = frozenset()
        self._paused: set[TP] = set()
        self._pace_from: tuple[float, int] | None = None
        self._offsets = 1
        self._database: SignalDatabase | None = None

    def feeds(self, start: Start) -> list[FileFeed]:
        """The file sinks of one partition."""
        root = self.target.folder
        if root is None:
            return []
        from orderflow.lake.parquet import LakeSink
        from orderflow.lake.signals import SignalSink
        from orderflow.lake.sqlite import SignalDatabase

        lake = LakeSink(root, start.partition, self.config.lake, effective_fingerprint(self.config))
        found = [FileFeed(lake, start.session)]
        if self.config.sinks.chosen:
            if self._database is None:
                self._database = SignalDatabase(root)
            sink = SignalSink(root, start.partition, self.config.sinks, self._database)
            found.append(FileFeed(sink, start.session))
        return found

    async def run(self, starts: Mapping[int, Start], spans: Mapping[int, Span], ends: Mapping[int, int]) -> Progress:
        """Recompute the spans of these partitions; `ends` are the journal's end offsets.

        Raises
        ------
        LogError
            The journal is damaged or the broker is away.
        LakeError
            A file can't be written.
        """
        self._parts = {p: _Partition(self, starts[p], spans[p], ends[p]) for p in sorted(starts)}
        positions = {self._tp(p): part.start.offset for p, part in self._parts.items() if not part.read_whole}
        self._offsets = max(1, sum(ends[tp.partition] - offset for tp, offset in positions.items()))
        try:
            if positions:
                self._read = frozenset(positions)
                reader = await self.log.reader(positions)
                try:
                    await self._loop(reader)
                finally:
                    await reader.close()
            for part in self._parts.values():
                for feed in part.feeds:
                    await feed.close()
                    self.progress.files += feed.sink.counted.of("files")
        finally:
            if self._database is not None:
                self._database.close()
        await self._writer.flush()
        self._note_time()
        self.progress.done_share = 1.0
        return self.progress

    def _tp(self, partition: int) -> TP:
        return TP(self.journal_prefix + JOURNAL, partition)

    async def _loop(self, reader: Reader) -> None:
        heard = time.monotonic()
        while not all(part.done for part in self._parts.values()):
            waiting = any(part.waiting for part in self._parts.values())
            got = await reader.poll(1 if waiting else POLL_MS, POLL_RECORDS)
            for tp, records in got.items():
                await self._push(tp.partition, records)
            await self._settle(reader)
            stepped = 0
            for part in self._parts.values():
                stepped += await self._turn(part)
            await self._writer.ship()
            if got or stepped or waiting:
                heard = time.monotonic()
            elif time.monotonic() - heard > PATIENCE_SEC:
                raise LogError(f"the journal gave nothing for {PATIENCE_SEC:g} s: see to the broker and start again")
            if waiting and not stepped:
                await asyncio.sleep(IDLE_SEC)  # a slower pace than the reader's
            await asyncio.sleep(0)

    async def _push(self, partition: int, records: Sequence[LogRecord]) -> None:
        for record in records:
            if record.value is not None and not self.journal_codecs.decoder(JOURNAL).knows(record.value):
                await self.journal_codecs.learn(JOURNAL, record.value)
        self._parts[partition].push(records)

    async def _settle(self, reader: Reader) -> None:
        """Note which partitions are read to their end; hold back those that run ahead."""
        left = 0
        for partition, part in self._parts.items():
            tp = self._tp(partition)
            if not part.read_whole and await reader.position(tp) >= part.end_offset:
                part.read_whole = True
            left += 0 if part.read_whole else max(0, part.end_offset - part.next_offset)
            left += len(part.waiting)
            if tp not in self._read:
                continue
            hold = part.read_whole or len(part.waiting) > MOST_WAITING
            if hold and tp not in self._paused:
                reader.pause([tp])
                self._paused.add(tp)
            elif not hold and tp in self._paused and len(part.waiting) <= MOST_WAITING // 2:
                reader.resume([tp])
                self._paused.discard(tp)
        self.progress.done_share = max(0.0, 1.0 - left / self._offsets)
        self._note_time()

    def _note_time(self) -> None:
        newest = self.progress.newest_ns
        at_work = [
            newest[partition] for partition, part in self._parts.items() if partition in newest and not part.done
        ]
        self.progress.at_ns = max(self.progress.at_ns, min(at_work, default=max(newest.values(), default=0)))

    async def _turn(self, part: _Partition) -> int:
        """Step what is due of one partition, then say how far it is."""
        stepped = 0
        now_ms = int(time.time() * 1000)
        while part.waiting and stepped < TURN_RECORDS:
            seq, record = part.waiting[0]
            if part.ahead is None:
                part.ahead = await decoded(self.journal_codecs, record.value or b"")
            journal = part.ahead
            if not self._due(part, seq, journal["recv_ts_ns"]):
                break
            part.waiting.popleft()
            part.ahead = None
            await self._step(part, seq, journal, now_ms)
            stepped += 1
        if part.stepped > part.marked and stepped:
            part.marked = part.stepped
            headers = [(PROGRESS_HEADER, str(part.stepped).encode())]
            for tp in part.outputs.values():
                self._writer.append(tp, b"", None, now_ms, headers)
        return stepped

    async def _step(self, part: _Partition, seq: int, journal: Record, now_ms: int) -> None:
        progress = self.progress
        progress.journal_records += 1
        recv_ns: int = journal["recv_ts_ns"]
        progress.first_ns = min(progress.first_ns or recv_ns, recv_ns)
        partition = part.start.partition
        progress.newest_ns[partition] = max(progress.newest_ns.get(partition, 0), recv_ns)
        derived: dict[str, list[Derived]] = {}
        if self._left_out(journal):
            progress.commands_left_out += 1
        else:
            derived = part.cascade.step(journal)
        if seq >= part.span.from_seq:
            for topic, records in derived.items():
                tp = part.outputs[topic]
                for each in records:
                    self._writer.append(tp, each.key, each.value, now_ms)
                progress.derived[topic] += len(records)
        for feed in part.feeds:
            await feed.give(journal, derived)
        part.stepped = seq

    def _left_out(self, journal: Record) -> bool:
        """Automatic commands were given for what live settings did; under others nobody would have given them."""
        if self._keep_evaluator or journal["kind"] != "command":
            return False
        try:
            content = msgspec.json.decode(journal["payload"])
        except msgspec.DecodeError:
            return False
        return isinstance(content, dict) and content.get("origin") == "evaluator"

    def _due(self, part: _Partition, seq: int, recv_ns: int) -> bool:
        """Whether the pace has come to a record. The way to the stretch is made at full speed."""
        if self._speed is None or seq < part.span.from_seq:
            return True
        now = time.monotonic()
        if self._pace_from is None:
            self._pace_from = (now, recv_ns)
        since, first_ns = self._pace_from
        return recv_ns <= first_ns + (now - since) * self._speed * 1e9
