"""P1 checked: recompute every derived topic from the journal and compare it with what was written, byte for byte.

What is compared is the canonical view: key, Avro body, schema. The first divergence is reported with topic, partition,
seq, field and both values.
"""

from __future__ import annotations

from collections import deque
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from orderflow.config import Config
from orderflow.errors import LogError
from orderflow.pipeline import STAGES
from orderflow.processor import Processor, Record
from orderflow.streaming.codec import PREFIX_BYTES, Codecs, peek
from orderflow.streaming.journal import JournalView, session_of
from orderflow.streaming.log import TP, Log, LogRecord
from orderflow.topics import DERIVED, JOURNAL, PARTITIONS, TICKS

CHUNK: Final = 5000
MAX_IDLE_POLLS: Final = 60


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

    @property
    def identical(self) -> bool:
        return not self.divergences


@dataclass(frozen=True, slots=True)
class Span:
    """Which part is judged; everything from the oldest retained record is recomputed all the same."""

    from_seq: int = 0
    to_seq: int = 1 << 62
    from_ns: int = 0
    to_ns: int = 1 << 62

    def holds(self, seq: int, recv_ts_ns: int) -> bool:
        return self.from_seq <= seq <= self.to_seq and self.from_ns <= recv_ts_ns <= self.to_ns


class Cascade:
    """Every stage of one partition, stepped synchronously: for one journal record, all that follows from it.

    The order within a seq equals the order of the services' merges: ticks first, then the others by rank.
    """

    def __init__(self, config: Config, codecs: Codecs, partition: int) -> None:
        self._config = config
        self._partition = partition
        self._encode = {topic: codecs.encoder(topic) for topic in DERIVED}
        self._decode = {topic: codecs.decoder(topic) for topic in DERIVED}
        self._processors: dict[str, Processor] = {}

    def step(self, journal: Record) -> dict[str, list[tuple[bytes, bytes]]]:
        """(key, value) of every record caused by one journal record, by topic."""
        if not self._processors or (journal["kind"] == "config" and session_of(journal["payload"])):
            self._processors = {stage.name: stage.make(self._config, self._partition) for stage in STAGES}
        written: dict[str, list[tuple[bytes, bytes]]] = {}
        decoded: dict[str, list[Record]] = {JOURNAL: [journal]}
        for stage in STAGES:
            processor = self._processors[stage.name]
            subs: dict[str, int] = {}
            for topic in stage.inputs:
                for record in decoded.get(topic, ()):
                    if stage.row_sources is not None and topic != TICKS and record["src"] not in stage.row_sources:
                        continue
                    for out_topic, symbol, fields in processor.step(topic, dict(record)):
                        sub = subs.get(out_topic, 0)
                        subs[out_topic] = sub + 1
                        fields["seq"] = journal["seq"]
                        fields["sub"] = sub
                        value = self._encode[out_topic](fields)
                        written.setdefault(out_topic, []).append((symbol.encode(), value))
                        decoded.setdefault(out_topic, []).append(self._decode[out_topic](value))
        return written


async def canonical(log: Log, tp: TP, *, journal: bool = False) -> AsyncIterator[list[tuple[int, int, LogRecord]]]:
    """The canonical view of a topic partition, in chunks of (seq, sub, record), from its oldest record to its end.

    Raises
    ------
    LogError
        The end can't be reached, or a value is not in the wire format: a part would pass for the whole.
    """
    begin = (await log.begin_offsets([tp]))[tp]
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
    """The live canonical view of one topic partition, read ahead in chunks."""

    def __init__(self, log: Log, tp: TP) -> None:
        self._log = log
        self._tp = tp
        self._chunks = canonical(log, tp)
        self._waiting: deque[tuple[int, int, LogRecord]] = deque()
        self._oldest: tuple[int, int] | None = None

    async def head(self) -> tuple[int, int, LogRecord] | None:
        """The next record, left where it is; None at the end."""
        if not self._waiting:
            try:
                self._waiting.extend(await anext(self._chunks))
            except StopAsyncIteration:
                return None
        return self._waiting[0]

    def take(self) -> None:
        """Step over the head."""
        self._waiting.popleft()

    async def retained(self, seq: int, sub: int) -> bool:
        """Whether a record of this place would still be here: retention may have passed it."""
        if self._oldest is None:
            first = await self.head()
            cut = (await self._log.begin_offsets([self._tp]))[self._tp] > 0
            self._oldest = first[:2] if cut and first is not None else (-1, -1)
        return (seq, sub) >= self._oldest


async def verify(
    log: Log, codecs: Codecs, config: Config, prefix: str, span: Span | None = None, live_prefix: str | None = None
) -> Report:
    """Recompute all partitions and compare; `live_prefix` judges topics under another prefix than the journal's.

    Reports at most one divergence per topic partition, the first that lies in `span`: what follows it is a consequence
    more often than not. Records are matched by (seq, sub), so that a missing or an added one does not spoil the rest.
    """
    report = Report()
    for partition in range(PARTITIONS):
        await _verify_partition(
            log,
            codecs,
            config,
            (prefix, prefix if live_prefix is None else live_prefix),
            partition,
            span or Span(),
            report,
        )
    return report


async def _verify_partition(
    log: Log,
    codecs: Codecs,
    config: Config,
    prefixes: tuple[str, str],
    partition: int,
    span: Span,
    report: Report,
) -> None:
    cascade = Cascade(config, codecs, partition)
    decode_journal = codecs.decoder(JOURNAL)
    matches = {
        topic: _Match(topic, partition, _Live(log, TP(prefixes[1] + topic, partition)), codecs) for topic in DERIVED
    }
    newest_ns = 0
    async for chunk in canonical(log, TP(prefixes[0] + JOURNAL, partition), journal=True):
        for _, _, record in chunk:
            assert record.value is not None
            journal = decode_journal(record.value)
            newest_ns = journal["recv_ts_ns"]
            report.journal_records += 1
            written = cascade.step(journal)
            for topic, expected in written.items():
                match = matches[topic]
                for key, value in expected:
                    await match.expect(key, value, span, newest_ns)
                    report.compared[topic] += 1
    for match in matches.values():
        await match.finish(span, newest_ns)
        if match.found is not None:
            report.divergences.append(match.found)


class _Match:
    """The live records of one topic partition beside the recomputed ones."""

    def __init__(self, topic: str, partition: int, live: _Live, codecs: Codecs) -> None:
        self.found: Divergence | None = None
        self._topic = topic
        self._partition = partition
        self._live = live
        self._codecs = codecs

    async def expect(self, key: bytes, value: bytes, span: Span, recv_ts_ns: int) -> None:
        """Compare one recomputed record with the live one in its place."""
        seq, sub, _ = peek(value)
        head = await self._live.head()
        while head is not None and head[:2] < (seq, sub):
            self._added(head, span, recv_ts_ns)
            self._live.take()
            head = await self._live.head()
        if head is not None and head[:2] == (seq, sub):
            difference = self._difference(head[2], key, value)
            self._live.take()
            if difference is not None:
                self._note(span, recv_ts_ns, seq, sub, *difference)
        elif await self._live.retained(seq, sub):
            self._note(span, recv_ts_ns, seq, sub, "(record)", "no such record", "a record")

    async def finish(self, span: Span, recv_ts_ns: int) -> None:
        """Whatever is left was never recomputed."""
        while self.found is None and (head := await self._live.head()) is not None:
            self._added(head, span, recv_ts_ns)
            self._live.take()

    def _added(self, head: tuple[int, int, LogRecord], span: Span, recv_ts_ns: int) -> None:
        self._note(span, recv_ts_ns, head[0], head[1], "(record)", "a record", "no such record")

    def _note(self, span: Span, recv_ts_ns: int, seq: int, sub: int, name: str, live: Any, recomputed: Any) -> None:
        if self.found is None and span.holds(seq, recv_ts_ns):
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
