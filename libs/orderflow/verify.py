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
    """The canonical view of a topic partition, in chunks of (seq, sub, record), from its oldest record to its end."""
    begin = (await log.begin_offsets([tp]))[tp]
    end = (await log.end_offsets([tp]))[tp]
    if begin >= end:
        return
    view = JournalView()
    last = (-1, -1)
    reader = await log.reader({tp: begin})
    try:
        idle = 0
        while await reader.position(tp) < end and idle < MAX_IDLE_POLLS:
            got = (await reader.poll(500, CHUNK)).get(tp, ())
            idle = 0 if got else idle + 1
            chunk: list[tuple[int, int, LogRecord]] = []
            for record in got:
                if record.value is None or record.offset >= end:
                    continue
                seq, sub, _ = peek(record.value)
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


class _Live:
    """The live canonical view of one topic partition, read ahead in chunks."""

    def __init__(self, log: Log, tp: TP) -> None:
        self._chunks = canonical(log, tp)
        self._waiting: deque[tuple[int, int, LogRecord]] = deque()

    async def next(self) -> tuple[int, int, LogRecord] | None:
        if not self._waiting:
            try:
                self._waiting.extend(await anext(self._chunks))
            except StopAsyncIteration:
                return None
        return self._waiting.popleft()


async def verify(
    log: Log, codecs: Codecs, config: Config, prefix: str, span: Span | None = None, live_prefix: str | None = None
) -> Report:
    """Recompute all partitions and compare; `live_prefix` judges topics under another prefix than the journal's.

    Reports at most one divergence per topic partition: what follows the first is a consequence more often than not.
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
    live = {topic: _Live(log, TP(prefixes[1] + topic, partition)) for topic in DERIVED}
    diverged: set[str] = set()
    async for chunk in canonical(log, TP(prefixes[0] + JOURNAL, partition), journal=True):
        for seq, _, record in chunk:
            assert record.value is not None
            journal = decode_journal(record.value)
            report.journal_records += 1
            judged = span.holds(seq, journal["recv_ts_ns"])
            for topic, expected in cascade.step(journal).items():
                if topic in diverged:
                    continue
                for key, value in expected:
                    found = _compare(topic, partition, (key, value), await live[topic].next(), codecs)
                    report.compared[topic] += 1
                    if found is not None:
                        diverged.add(topic)
                        if judged:
                            report.divergences.append(found)
                        break
    for topic in DERIVED:
        extra = await live[topic].next() if topic not in diverged else None
        if extra is not None:
            report.divergences.append(
                Divergence(topic, partition, extra[0], extra[1], "(record)", "a record", "no such record")
            )


def _compare(
    topic: str,
    partition: int,
    expected: tuple[bytes, bytes],
    live: tuple[int, int, LogRecord] | None,
    codecs: Codecs,
) -> Divergence | None:
    key, value = expected
    seq, sub, _ = peek(value)
    if live is None:
        return Divergence(topic, partition, seq, sub, "(record)", "no such record", "a record")
    live_seq, live_sub, record = live
    live_value = record.value
    assert live_value is not None
    if record.key == key and live_value[PREFIX_BYTES:] == value[PREFIX_BYTES:]:
        return None
    if (live_seq, live_sub) != (seq, sub):
        return Divergence(topic, partition, min(seq, live_seq), sub, "(seq, sub)", (live_seq, live_sub), (seq, sub))
    if record.key != key:
        return Divergence(topic, partition, seq, sub, "(key)", record.key, key)
    name, one, other = first_difference(codecs.decoder(topic)(live_value), codecs.decoder(topic)(value))
    return Divergence(topic, partition, seq, sub, name, one, other)


def first_difference(live: Mapping[str, Any], recomputed: Mapping[str, Any]) -> tuple[str, Any, Any]:
    """The first field, in the schema's order, whose values differ; NaN equals NaN, 0.0 differs from -0.0."""
    for name in recomputed:
        if repr(live.get(name)) != repr(recomputed[name]):
            return name, live.get(name), recomputed[name]
    return "(bytes)", "equal fields, other bytes", "equal fields, other bytes"
