"""Runs a `Processor` or a `FileSink` over the partitions that a consumer group gives it.

A partition's life: recover (newest snapshot, then the inputs from where it stood), merge its inputs, step, append what
the steps emit, say how far it has come, snapshot now and then. Outputs at or below an output's own tail are suppressed,
which is what makes a re-run silent; consumers drop what they have already taken, which makes the rest harmless.
"""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Protocol

import msgspec

from orderflow.errors import BrokerAwayError, LogError, OrderflowError
from orderflow.processor import Processor, Record
from orderflow.streaming import crash
from orderflow.streaming.codec import Codecs, peek
from orderflow.streaming.figures import PartitionFigures, StageFigures
from orderflow.streaming.journal import JournalView, epoch_of, session_of
from orderflow.streaming.lag import LagWatch
from orderflow.streaming.log import TP, Log, LogRecord, Membership, Reader, read_ranges
from orderflow.streaming.merge import Input, Merger
from orderflow.streaming.samples import RecentSamples
from orderflow.streaming.seek import epoch_at
from orderflow.streaming.snapshots import (
    Commit,
    InputPosition,
    OutputTail,
    Restored,
    check_fingerprint,
    encode_commit,
    encode_parts,
    hour_of,
    load_newest,
    packed,
)
from orderflow.streaming.writer import Writer
from orderflow.topics import HOURLY, JOURNAL, TICKS

logger = logging.getLogger(__name__)

PROGRESS_HEADER: Final = "progress"
CODE_VERSION: Final = "3"
"""Raised whenever a processor's results or the form of its state change."""
TAIL_RECORDS: Final = 1000
"""Records read back to find an output's tail; where they are all markers, four times as many, and so on."""
NOTHING: Final = (-1, -1)
STOP_SEC: Final = 6.0
"""What is left of the ten seconds of a stop for the last snapshot."""
STALLED_SEC: Final = 5.0
"""A batch unacknowledged for this long: the service is not ready, though a broker answers."""
PATIENCE_SEC: Final = 600.0
RETRY_FIRST_SEC: Final = 0.2
RETRY_MOST_SEC: Final = 5.0
CONTROL_KINDS: Final = frozenset({"config", "end"})
RECORD_BYTES: Final = 400
"""What a record that waits takes besides its value."""
REBUILD_ASKED: Final = (
    "STATE_REBUILD=true",
    "; where these files come from a rebuild that was interrupted, start without STATE_REBUILD: it goes on",
)
"""Why a partition begins in the middle, and what else can be done: the ends of an error's text."""
BY_HAND_OTHERWISE: Final = (
    "; or, to begin at the oldest retained input, remove them with kafka-consumer-groups.sh --delete-offsets"
)


@dataclass(frozen=True, slots=True)
class RuntimeOptions:
    """How a service runs; nothing here changes a result."""

    prefix: str = ""
    input_prefix: str | None = None
    """Of the topics that are read; None: `prefix`."""
    snapshot_sec: float = 10.0
    poll_wait_ms: int = 100
    fetch_min_bytes: int = 1
    """What the broker may gather before it answers: who waits for nothing spares it, and itself, most of the rounds."""
    max_poll_records: int = 4000
    max_buffered: int = 20_000
    """Records of one input that may wait for another input before the faster one is paused."""
    max_waiting_bytes: int = 8 << 20
    """And how much memory they may take, by the size of the newest ones."""
    rebuild: bool = False
    """Compute each partition anew from the oldest retained input, when this process takes it over for the first time."""
    broker_patience_sec: float = PATIENCE_SEC
    """How long a broker may be away, or fail again and again, before the process gives up."""


@dataclass(slots=True)
class Stats:
    """Figures of a running service, read by its metrics; plain numbers so that hot paths stay cheap."""

    records_in: int = 0
    suppressed: int = 0
    duplicates: int = 0
    stale_epoch: int = 0
    markers_out: int = 0
    polls: int = 0
    snapshots: int = 0
    recoveries: int = 0
    recovery_sec: float = 0.0
    broker_losses: int = 0
    """Times that this process began again from its snapshots because the broker had failed it."""
    last_snapshot_at: float = 0.0
    owned_at: float = 0.0
    """When partitions were last taken over; what they recovered from is older than any snapshot made since."""
    buffered: int = 0
    latencies_ms: RecentSamples = field(default_factory=RecentSamples)
    by_topic_in: dict[str, int] = field(default_factory=dict)
    by_topic_out: dict[str, int] = field(default_factory=dict)
    step_sec: float = 0.0
    batch_span: int = 0

    def sample_stamps(self, first_ms: int, last_ms: int) -> None:
        """A batch has been processed whose first and last record the journal took then.

        Both are sampled: the last alone has waited least, and quantiles of such would lean low where batches are large.
        """
        now_ms = time.time() * 1000
        self.latencies_ms.add(now_ms - first_ms)
        self.latencies_ms.add(now_ms - last_ms)


class Task(Protocol):
    """One partition of a service."""

    partition: int
    merger: Merger
    view: JournalView | None
    ended: bool

    async def advance(self, limit: int) -> int: ...

    def commit_due(self) -> bool: ...


class PartitionBase(ABC):
    """What processors and sinks share: inputs, positions, the session, the end."""

    def __init__(self, partition: int, topics: tuple[str, ...], codecs: Codecs, stats: Stats) -> None:
        self.partition = partition
        self.merger = Merger(topics, frozenset({JOURNAL}))
        self.by_topic = {each.topic: each for each in self.merger.inputs}
        self.view = JournalView() if JOURNAL in topics else None
        self.decoders = {topic: codecs.decoder(topic) for topic in topics}
        self.codecs = codecs
        self.stats = stats
        self.session = ""
        self.ended = False
        self.end_seq = -1
        self.epoch = 0
        """Epoch of the newest journal record processed; the view's own may be ahead of it."""
        self.clock_ts_ns = 0
        self.lineage = 0
        """See `Commit.lineage`."""
        self.saved_hour: int | None = None
        """Hour of the newest snapshot; None before the first."""
        self.row_filter: frozenset[int] | None = None
        """Where set: enum indices of the third field that are wanted of `market.rows`; others only keep their place."""
        self.filtered_topic = ""
        self.newest_stamp_ms = int(time.time() * 1000)
        """When the journal took the newest record that was processed; before the first, when this partition came."""
        self.has_symbols = False
        """Whether records of a symbol come in this session: a partition without any is rarely told the time."""

    def note_processed(self, first_ms: int, last_ms: int) -> None:
        """The journal took the first and the last record of a batch then; a clock that was ahead hides nothing later."""
        self.stats.sample_stamps(first_ms, last_ms)
        self.newest_stamp_ms = min(last_ms, int(time.time() * 1000))

    def meet_symbols(self, released: Sequence[tuple[Input, int, int, LogRecord]]) -> None:
        """To be called before a batch is processed, which may begin another session."""
        self.has_symbols = self.has_symbols or any(record.key for _, _, _, record in released)

    async def push(self, topic: str, records: Sequence[LogRecord]) -> None:
        """Take records of one input as they were read: markers, duplicates and all."""
        each = self.by_topic[topic]
        decoder = self.decoders[topic]
        wanted = self.row_filter if topic == self.filtered_topic else None
        view = self.view if topic == JOURNAL else None
        prefix = decoder.prefix
        dropped = self._dropped(each)
        for record in records:
            value = record.value
            if value is None:
                each.mark(_progress_of(record))
                continue
            if not value.startswith(prefix) and not decoder.knows(value):
                await self.codecs.learn(topic, value)
            seq, sub, third = peek(value)
            if view is not None:
                if view.admit(record, seq, sub):
                    each.push(seq, 0, record)
            elif wanted is not None and third not in wanted:
                each.push(seq, sub, None)
            else:
                each.push(seq, sub, record)
        if records:
            each.next_offset = records[-1].offset + 1
            each.record_bytes = RECORD_BYTES + sum(len(record.value or b"") for record in records) // len(records)
        duplicates, stale = self._dropped(each)
        self.stats.duplicates += duplicates - dropped[0]
        self.stats.stale_epoch += stale - dropped[1]

    def _dropped(self, each: Input) -> tuple[int, int]:
        """Records of an input dropped so far: taken before, of a superseded recorder."""
        view = self.view
        if view is None or each.topic != JOURNAL:
            return each.duplicates, 0
        return each.duplicates + view.duplicates, view.stale

    def positions(self, rest: Sequence[tuple[Input, int, int, LogRecord]] = ()) -> list[InputPosition]:
        """Where each input stands, `rest` being what was released and not yet processed."""
        first: dict[str, tuple[int, int, LogRecord]] = {}
        for each, seq, sub, record in rest:
            first.setdefault(each.topic, (seq, sub, record))
        positions = []
        for each in self.merger.inputs:
            if each.topic in first:
                seq, sub, record = first[each.topic]
                done_seq, done_sub = self.done.get(each.topic, NOTHING)
                positions.append(InputPosition(each.topic, record.offset, done_seq, done_sub, seq - 1))
            else:
                positions.append(
                    InputPosition(each.topic, each.oldest_offset, each.taken_seq, each.taken_sub, each.resumable)
                )
        return positions

    done: dict[str, tuple[int, int]]

    @abstractmethod
    def states(self) -> dict[str, bytes]:
        """The whole state, as a snapshot holds it."""

    def output_tails(self) -> list[OutputTail]:
        """The newest (seq, sub) that this computation has come to, per output."""
        return []

    def restore_inputs(self, commit: Commit) -> None:
        """Set inputs to where a snapshot left them."""
        self.lineage = commit.lineage
        for position in commit.inputs:
            each = self.by_topic[position.topic]
            each.next_offset = position.next_offset
            each.last_seq = each.taken_seq = position.seq
            each.last_sub = each.taken_sub = position.sub
            each.progress = position.progress
            if position.topic == JOURNAL and self.view is not None:
                self.view.epoch = self.epoch = commit.epoch
                self.view.last_seq = position.seq if position.seq >= 0 else None
        self.session = commit.session
        self.ended = commit.ended
        self.clock_ts_ns = commit.clock_ts_ns

    def note_control(self, record: Record) -> bool:
        """Follow the session and the end; True where a new session begins with this record."""
        kind = record["kind"]
        if kind == "config":
            begun = session_of(record["payload"])
            if begun is not None:
                self.session = begun["session"]
                self.ended = self.has_symbols = False
                return True
        self.ended = kind == "end"
        if self.ended:
            self.end_seq = record["seq"]
        return False

    @property
    def waits_on_itself(self) -> bool:
        """Whether there is something to do that needs no new record."""
        return False

    @property
    def settled(self) -> bool:
        """Whether the session has ended here and everything that its end caused has been taken."""
        return self.ended and self.merger.frontier >= self.end_seq

    def commit_record(self, inputs: list[InputPosition], outputs: list[OutputTail], fingerprint: str) -> Commit:
        """Where everything stands now; `write_snapshot` adds where its parts are."""
        return Commit(
            first_offset=0,
            parts=0,
            inputs=inputs,
            outputs=outputs,
            session=self.session,
            ended=self.ended,
            code_version=CODE_VERSION,
            fingerprint=fingerprint,
            clock_ts_ns=self.clock_ts_ns,
            epoch=self._epoch_to_go_on(),
            lineage=self.lineage,
        )

    def _epoch_to_go_on(self) -> int:
        """The epoch that the journal is under where reading will go on.

        An `open` that was read lies before that place though nothing of its epoch may have been processed yet: a restart
        that did not know of it would take a superseded recorder's late records.
        """
        if self.view is None:
            return self.epoch
        pending = [record for each, _, _, record in self.released if each.topic == JOURNAL]
        pending += [record for _, _, record in self.by_topic[JOURNAL].waiting if record is not None][:1]
        return epoch_of(pending[0]) if pending else self.view.epoch

    @property
    def released(self) -> Sequence[tuple[Input, int, int, LogRecord]]:
        """What the merge has given and is not processed yet."""
        return ()


class ProcessorTask(PartitionBase):
    """A partition of a processor service."""

    def __init__(
        self,
        partition: int,
        make: Callable[[int], Processor],
        codecs: Codecs,
        stats: Stats,
        writer: Writer,
        physical: Callable[[str], str],
        stage: StageFigures | None = None,
    ) -> None:
        """`stage`: where given, counts what is written."""
        self.make = make
        self.processor = make(partition)
        super().__init__(partition, self.processor.inputs, codecs, stats)
        self.done = {}
        self.writer = writer
        self.outputs = {topic: TP(physical(topic), partition) for topic in self.processor.outputs}
        self.encoders = {topic: codecs.encoder(topic) for topic in self.processor.outputs}
        self.tails = dict.fromkeys(self.processor.outputs, NOTHING)
        self.last_out = dict.fromkeys(self.processor.outputs, NOTHING)
        self.marked = -1
        self.scanned_to: dict[str, int] = {}
        """Per output: below this offset nothing newer than the snapshot's own tail can stand."""
        self._stage = stage
        self.figures: PartitionFigures | None = stage.partition() if stage is not None else None
        self._keys: dict[str, bytes] = {}
        self._control = TICKS if TICKS in self.processor.inputs else JOURNAL
        self._stamp_ms = 0

    async def advance(self, limit: int) -> int:
        """Process what is due, at most about `limit` records; append outputs and the marker."""
        released = self.merger.run(limit)
        if released:
            self.meet_symbols(released)
            self._step_all(released)
            crash.point("stepped")
            self.stats.records_in += len(released)
            self._stamp_ms = released[-1][3].timestamp
            self.note_processed(released[0][3].timestamp, self._stamp_ms)
            self.stats.batch_span = len(released)
        self.mark()
        return len(released)

    def _step_all(self, released: Sequence[tuple[Input, int, int, LogRecord]]) -> None:
        written = dict.fromkeys(self.outputs, 0)
        topic, seq, sub = "", -1, -1
        try:
            for each, seq, sub, record in released:  # noqa: B007 - `sub` is named in the error
                topic = each.topic
                self._step(topic, seq, record, written)
        except Exception as error:
            raise OrderflowError(
                f"{type(self.processor).__name__} failed on {topic}[{self.partition}] seq {seq} sub {sub}: {error!r}"
            ) from error
        by_topic = self.stats.by_topic_out
        for topic, count in written.items():
            if count:
                by_topic[topic] = by_topic.get(topic, 0) + count

    def _step(self, topic: str, seq: int, record: LogRecord, written: dict[str, int]) -> None:
        """Process one record; counts what it wrote in `written`, by topic."""
        value = record.value
        assert value is not None
        decoded = self.decoders[topic](value)
        if topic == JOURNAL:
            self.epoch = epoch_of(record)
        if topic == self._control:
            self._follow(decoded)
        last_out = self.last_out
        figures = self.figures
        for out_topic, symbol, fields in self.processor.step(topic, decoded):
            last_seq, last_sub = last_out[out_topic]
            out_sub = last_sub + 1 if last_seq == seq else 0
            last_out[out_topic] = place = (seq, out_sub)
            if place <= self.tails[out_topic]:
                self.stats.suppressed += 1
                continue
            fields["seq"] = seq
            fields["sub"] = out_sub
            key = self._keys.get(symbol)
            if key is None:
                key = self._keys[symbol] = symbol.encode()
            self.writer.append(self.outputs[out_topic], key, self.encoders[out_topic](fields), record.timestamp)
            written[out_topic] += 1
            if figures is not None:
                figures.take(out_topic, fields)

    def _follow(self, decoded: Record) -> None:
        """Keep up with the session, its end and the clock."""
        kind = decoded["kind"]
        if kind in CONTROL_KINDS or self.ended:
            if self.note_control(decoded):
                self.processor = self.make(self.partition)
                self.figures = self._stage.partition() if self._stage is not None else None
        elif kind == "tick":
            self.clock_ts_ns = decoded["recv_ts_ns"]

    def mark(self) -> None:
        """Say how far this partition's outputs are complete, once per poll and only where it has moved."""
        frontier = self.merger.frontier
        if frontier <= self.marked:
            return
        self.marked = frontier
        headers = [(PROGRESS_HEADER, str(frontier).encode())]
        for topic, tp in self.outputs.items():
            if frontier >= self.tails[topic][0]:
                self.writer.append(tp, b"", None, self._stamp_ms or int(time.time() * 1000), headers)
                self.stats.markers_out += 1

    def states(self) -> dict[str, bytes]:
        return self.processor.snapshot()

    def output_tails(self) -> list[OutputTail]:
        """The newest (seq, sub) that this computation has come to, per output.

        Not the log's own tail: a re-run may still be behind that.
        """
        return [self._output_tail(topic, place) for topic, place in sorted(self.last_out.items())]

    def _output_tail(self, topic: str, place: tuple[int, int]) -> OutputTail:
        scanned_to = self.scanned_to.get(topic, 0)
        written = self.tails[topic]
        if place < written:  # what this process has written since lies behind records that are newer than `place`
            return OutputTail(topic, *place, scanned_to, *written)
        return OutputTail(topic, *place, self.writer.next_offset.get(self.outputs[topic], scanned_to))

    def restore(self, restored: Restored) -> None:
        self.restore_inputs(restored.commit)
        self.processor = self.make(self.partition)
        self.processor.restore(restored.states)
        self.has_symbols = not self.ended and any(restored.states)
        for tail in restored.commit.outputs:
            if tail.topic in self.last_out:
                # What was emitted for the last seq before the snapshot counts on: its next record has the next sub.
                self.last_out[tail.topic] = (tail.seq, tail.sub)
                self.tails[tail.topic] = max(self.tails[tail.topic], tail.written)
                self.scanned_to[tail.topic] = tail.end_offset


@dataclass(slots=True)
class ServiceSpec:
    """What distinguishes one service from another."""

    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    fingerprint: str
    state_name: str = ""

    @property
    def state_topic(self) -> str:
        return f"state.{self.state_name or self.name}"


class ServiceRuntime(ABC):
    """The loop of one service: membership, reading, stepping, snapshots. Subclassed by what is driven."""

    def __init__(self, log: Log, codecs: Codecs, spec: ServiceSpec, options: RuntimeOptions) -> None:
        self.log = log
        self.codecs = codecs
        self.spec = spec
        self.options = options
        self.stats = Stats()
        self.tasks: dict[int, Any] = {}
        self._owning = False
        """Whether partitions are owned, recovered and read."""
        self._membership: Membership | None = None
        self._reader: Reader | None = None
        self._paused: set[TP] = set()
        self._buffered: dict[int, int] = {}
        self._more_due = False
        self._rebuilt: set[int] = set()
        """Partitions that were computed anew as asked for: taken over again, they go on."""
        self._unfinished: set[int] = set()
        """Partitions to look at though nothing new has come: not looked at yet, not at rest yet, a cut to make."""
        self._stopping = asyncio.Event()
        self._limit: asyncio.Timeout | None = None
        self._saving: asyncio.Task[None] | None = None
        """The snapshot that is being written beside the work."""
        self._retry_sec = RETRY_FIRST_SEC
        self._failing_since: float | None = None
        self._failed_at: float | None = None
        self._instance = uuid.uuid4().hex[:12]
        self._snapshot_count = 0
        self._logical: dict[str, str] = {self.physical_input(topic): topic for topic in spec.inputs}
        self.state_writer = Writer(log, patience_sec=options.broker_patience_sec)
        self.lag = LagWatch(log, self.input_positions)

    # -- what subclasses give -------------------------------------------------------------------------------------

    @abstractmethod
    def make_task(self, partition: int) -> Any:
        """A task for a partition that is now owned."""

    async def after_advance(self) -> None:
        """Called once per poll, after every partition has advanced."""

    async def snapshot(self, partitions: Sequence[int]) -> None:
        """Make everything so far durable and save where it stands."""

    async def check_begin(self, task: Any, cause: str, otherwise: str) -> None:
        """Raise where a partition may not begin in the middle; `cause` and `otherwise` are of the error's text."""

    def restore_task(self, task: Any, restored: Restored) -> None:
        task.restore(restored)

    # -- the loop -------------------------------------------------------------------------------------------------

    @property
    def group(self) -> str:
        """The consumer group's name."""
        return f"{self.options.prefix}orderflow.{self.spec.name}"

    def physical(self, topic: str) -> str:
        return self.options.prefix + topic

    def physical_input(self, topic: str) -> str:
        prefix = self.options.input_prefix
        return (self.options.prefix if prefix is None else prefix) + topic

    def logical_input(self, topic: str) -> str:
        """The name of an input without its prefix."""
        return self._logical[topic]

    def input_positions(self) -> dict[TP, int]:
        """Per input partition owned: offset of the oldest record not yet processed."""
        return {
            TP(self.physical_input(position.topic), partition): position.next_offset
            for partition, task in self.tasks.items()
            for position in task.positions(task.released)
        }

    @property
    def writers(self) -> list[Writer]:
        """Everything that this service writes through."""
        return [self.state_writer]

    @property
    def ready(self) -> bool:
        """Whether partitions are owned and worked on, and the broker takes and gives."""
        return self._owning and self.log.reachable and all(writer.waiting_sec < STALLED_SEC for writer in self.writers)

    def stop(self) -> None:
        """Drain what has been read, snapshot, and return from `run`; within bounds, even if the broker is away."""
        if self._stopping.is_set():
            return
        self._stopping.set()
        if self._limit is not None:
            self._limit.reschedule(asyncio.get_running_loop().time() + STOP_SEC)

    @property
    def drained(self) -> bool:
        """Whether every partition owned has processed the `end` of its session."""
        return self.ready and bool(self.tasks) and all(task.settled for task in self.tasks.values())

    async def run(self) -> None:
        """Until `stop`, or a failure. A broker that is away is waited for; then all goes on from the snapshots.

        Raises
        ------
        OrderflowError
            An input is damaged, a step failed, or the broker stayed away beyond the patience: the process must end.
        """
        try:
            async with asyncio.timeout(None) as self._limit:
                while not self._stopping.is_set():
                    try:
                        await self._work()
                    except BrokerAwayError as error:
                        await self._begin_again(error)
        except TimeoutError as error:
            raise LogError(
                f"{self.spec.name}: the last snapshot was not acknowledged within {STOP_SEC:g} s of the stop; nothing is "
                "lost: the next start goes on from the one before"
            ) from error
        finally:
            self._limit = None
            await self._let_go()

    async def _work(self) -> None:
        """Join the group, take over partitions, process; return at a stop with everything saved."""
        topics = [self.physical_input(topic) for topic in self.spec.inputs]
        if self._membership is None:
            self._membership = await self.log.join(self.group, topics)
        next_snapshot = time.monotonic() + self.options.snapshot_sec
        while not self._stopping.is_set():
            if self._membership.failure is not None:
                raise self._membership.failure
            if self._membership.changed.is_set():
                await self._reassign()
            if self._reader is None:
                await self._idle()
                continue
            busy = await self._round(self._reader)
            if self._saving is None and time.monotonic() >= next_snapshot:
                self._saving = asyncio.create_task(self.snapshot(sorted(self.tasks)))
                next_snapshot = time.monotonic() + self.options.snapshot_sec
            elif self._saving is not None and self._saving.done():
                await self._saved()
            if busy:
                await asyncio.sleep(0)
        crash.point("stopping")
        if self._saving is not None:
            await self._saved()
        if self._reader is not None:
            await self.snapshot(sorted(self.tasks))

    async def _saved(self) -> None:
        """Take note of a snapshot that is done, or wait for it; raises what it raised."""
        saving, self._saving = self._saving, None
        if saving is not None:
            await saving

    def note_durable(self) -> None:
        """The broker has taken work: what fails from now on is a failure of its own."""
        self._retry_sec, self._failing_since = RETRY_FIRST_SEC, None

    async def _begin_again(self, error: BrokerAwayError) -> None:
        """Forget what the broker may not have taken, wait, and let everything be recovered from the snapshots.

        What is still under way can arrive later: it is the same as what will be written again, and dropped as such.
        """
        now = time.monotonic()
        if self._failed_at is not None and now - self._failed_at > self.options.broker_patience_sec:
            self.note_durable()  # it has failed nothing for long: there may have been nothing to make durable
        self._failed_at = now
        self._failing_since = self._failing_since or now
        if now - self._failing_since > self.options.broker_patience_sec:
            raise error
        logger.warning("%s: %s; beginning again from the newest snapshots", self.spec.name, error)
        self.stats.broker_losses += 1
        await self._let_go()
        self.tasks.clear()
        for writer in self.writers:
            writer.abandon()
        self.renew_writers()
        while not self._stopping.is_set():
            await self._pause(self._retry_sec)
            self._retry_sec = min(RETRY_MOST_SEC, 2 * self._retry_sec)
            if self.log.reachable or time.monotonic() - self._failing_since > self.options.broker_patience_sec:
                return

    def renew_writers(self) -> None:
        """Make new writers in the place of abandoned ones."""
        self.state_writer = self.renewed(self.state_writer)

    def renewed(self, before: Writer) -> Writer:
        """A new writer that counts on from the one before."""
        writer = Writer(self.log, patience_sec=self.options.broker_patience_sec)
        writer.records_sent, writer.batches_sent = before.records_sent, before.batches_sent
        return writer

    async def _pause(self, pause_sec: float) -> None:
        try:
            async with asyncio.timeout(pause_sec):
                await self._stopping.wait()
        except TimeoutError:
            pass

    async def _let_go(self) -> None:
        """Close the reader and leave the group; a snapshot that is under way is given up."""
        self._owning = False
        saving, self._saving = self._saving, None
        if saving is not None:
            saving.cancel()
            await asyncio.gather(saving, return_exceptions=True)
        reader, self._reader = self._reader, None
        membership, self._membership = self._membership, None
        if reader is not None:
            await reader.close()
        if membership is not None:
            await membership.close()

    async def _idle(self) -> None:
        assert self._membership is not None
        try:
            async with asyncio.timeout(0.2):
                await self._membership.changed.wait()
        except TimeoutError:
            pass

    async def _round(self, reader: Reader) -> bool:
        """One poll and what follows from it; True where more is due at once."""
        options = self.options
        got = await reader.poll(1 if self._more_due else options.poll_wait_ms, options.max_poll_records)
        self.stats.polls += 1
        if got:
            crash.point("polled")
        # What waits in a partition becomes due only by what arrives in it, so the others need no look.
        active = self._unfinished
        for tp, records in got.items():
            topic = self._logical[tp.topic]
            await self.tasks[tp.partition].push(topic, records)
            active.add(tp.partition)
            self.stats.by_topic_in[topic] = self.stats.by_topic_in.get(topic, 0) + len(records)
        self._more_due = False
        self._unfinished = set()
        for partition in sorted(active):
            task = self.tasks[partition]
            waited = task.waits_on_itself
            taken = await task.advance(options.max_poll_records)
            if taken >= options.max_poll_records:
                self._more_due = True
            if taken or waited or task.waits_on_itself:
                self._unfinished.add(partition)
        await self.after_advance()
        self._balance(reader, active)
        return bool(got)

    def _balance(self, reader: Reader, partitions: set[int]) -> None:
        """Pause inputs that run ahead of the others; resume them once they have been taken down to half."""
        options = self.options
        pause: list[TP] = []
        resume: list[TP] = []
        for partition in sorted(partitions):
            buffered = 0
            for each in self.tasks[partition].merger.inputs:
                waiting = len(each.waiting)
                buffered += waiting
                limit = min(options.max_buffered, options.max_waiting_bytes // each.record_bytes)
                if waiting <= limit and not self._paused:
                    continue
                tp = TP(self.physical_input(each.topic), partition)
                if waiting > limit and tp not in self._paused:
                    pause.append(tp)
                elif waiting <= limit // 2 and tp in self._paused:
                    resume.append(tp)
            self._buffered[partition] = buffered
        self.stats.buffered = sum(self._buffered.values())
        if pause:
            reader.pause(pause)
            self._paused.update(pause)
        if resume:
            reader.resume(resume)
            self._paused.difference_update(resume)

    async def _reassign(self) -> None:
        """Take over what the group now gives: keep what is still owned, recover what is new, drop the rest."""
        assert self._membership is not None
        self._membership.changed.clear()
        assigned = self._membership.assigned
        kept = assigned & self.tasks.keys()
        if assigned == self.tasks.keys() and self._reader is not None:
            return
        self._owning = False
        if self._reader is not None:
            await self._reader.close()
            self._reader = None
        crash.point("rebalance")
        for partition in list(self.tasks):
            if partition not in assigned:
                del self.tasks[partition]
        await self._recover(sorted(assigned - kept))
        if not self.tasks:
            return
        self._paused.clear()
        self._buffered.clear()
        self._unfinished = set(self.tasks)
        self._reader = await self.log.reader(
            {
                TP(self.physical_input(each.topic), partition): each.next_offset
                for partition, task in self.tasks.items()
                for each in task.merger.inputs
            },
            min_bytes=self.options.fetch_min_bytes,
        )
        crash.point("recovered")
        self._owning = True
        self.stats.owned_at = time.time()
        logger.info("%s owns partitions %s", self.spec.name, sorted(self.tasks))

    async def _recover(self, partitions: Sequence[int]) -> None:
        if not partitions:
            return
        started = time.monotonic()
        state_tps = {partition: TP(self.physical(self.spec.state_topic), partition) for partition in partitions}
        snapshots = await load_newest(self.log, state_tps.values())
        tails = await self._read_tails(partitions, {p: snapshots[tp] for p, tp in state_tps.items()})
        inputs = [TP(self.physical_input(topic), partition) for topic in self.spec.inputs for partition in partitions]
        begins = await self.log.begin_offsets(inputs)
        ends = await self.log.end_offsets(inputs)
        by_hand = await self._offsets_by_hand(partitions)
        crash.point("recovering")
        for partition in partitions:
            task = self.make_task(partition)
            for topic in self.spec.inputs:
                task.by_topic[topic].next_offset = begins[TP(self.physical_input(topic), partition)]
            for topic, tail in tails[partition].items():
                task.tails[topic] = tail
            restored = snapshots[state_tps[partition]]
            rebuild = self.options.rebuild and partition not in self._rebuilt
            if restored is not None and not rebuild and self._begun_in_vain(restored, begins, partition):
                self._move_beginning(task, restored)
                restored = None
            given = by_hand.get(partition, {})
            if given:
                self._obey(task, given, restored, begins)
            if restored is None:
                await self._begin(task, given, rebuild=rebuild)
            elif rebuild:
                await self.check_begin(task, *REBUILD_ASKED)
                await self._begin_lineage(task, restored, ends)
            else:
                check_fingerprint(restored.commit, self.spec.fingerprint, CODE_VERSION, state_tps[partition])
                self._check_retained(restored, begins, ends, partition)
                self.restore_task(task, restored)
                task.saved_hour = self._hour_of(restored.commit.clock_ts_ns)
                self.stats.recoveries += 1
            if rebuild:
                self._rebuilt.add(partition)
            self.tasks[partition] = task
        self.stats.recovery_sec = time.monotonic() - started

    def _begun_in_vain(self, restored: Restored, begins: Mapping[TP, int], partition: int) -> bool:
        """Whether a snapshot is the mere beginning of a file sink, nothing taken since, and retention has passed it."""
        inputs = restored.commit.inputs
        return (
            not self.spec.outputs
            and all(position.seq < 0 for position in inputs)
            and any(
                position.next_offset < begins[TP(self.physical_input(position.topic), partition)] for position in inputs
            )
        )

    def _move_beginning(self, task: Any, restored: Restored) -> None:
        """Where nothing was taken there is nothing to leave a hole in: begin at what is retained of the same place."""
        task.lineage = restored.commit.lineage + 1  # or the one that is given up might count as the newer
        for position in restored.commit.inputs:
            each = task.by_topic[position.topic]
            each.next_offset = max(each.next_offset, position.next_offset)
        logger.warning(
            "%s partition %d had begun at %s and taken nothing when retention passed it: beginning at %s",
            self.spec.name, task.partition, {each.topic: each.next_offset for each in restored.commit.inputs},
            {each.topic: each.next_offset for each in task.merger.inputs},
        )  # fmt: skip

    async def _begin(self, task: Any, given: Mapping[str, int], *, rebuild: bool) -> None:
        """Begin without a snapshot: at the oldest retained input, or at the offsets `given` by hand.

        A file sink that begins anywhere but where everything begins finds other cuts than one before it has found. It
        does so only where no files are, and saves its beginning before it writes any: those that a restart meets are
        then its own.
        """
        why = REBUILD_ASKED if rebuild else self._begins_late(task, given)
        if why is not None:
            await self.check_begin(task, *why)
        await self._learn_epoch(task)
        if given:
            await self._save_beginning(task)
            told = self._told(given, task.partition)
            logger.info("%s begins at offsets given by hand, without a past: %s", self.spec.name, told)
        elif why is not None and not self.spec.outputs:
            task.saved_hour = self._hour_of(0)  # a beginning is no snapshot of an hour
            await self._save_beginning(task)

    def _begins_late(self, task: Any, given: Mapping[str, int]) -> tuple[str, str] | None:
        """What an error says where a task begins behind the begin of an input (see `REBUILD_ASKED`); else None."""
        partition = task.partition
        late = next((each for each in task.merger.inputs if each.next_offset > 0), None)
        if late is None:
            return None
        if given:
            told = self._told(given, partition)
            cause = f"{self.spec.name}: the offsets of group {self.group!r} were set by hand ({told}): to begin there"
            return cause, BY_HAND_OTHERWISE
        state, cut = self.physical(self.spec.state_topic), self.physical_input(late.topic)
        cause = (
            f"{self.spec.name}: {state}[{partition}] holds no snapshot to go on from, and of {cut}[{partition}] all before "
            f"offset {late.next_offset} has expired: to begin there"
        )
        return (
            cause,
            f"; or, where the state is not lost but under another TOPIC_PREFIX than {self.options.prefix!r}, set that one",
        )

    async def _begin_lineage(self, task: Any, restored: Restored, ends: Mapping[TP, int]) -> None:
        """Compute a partition anew from the oldest retained input; what its outputs hold already stays as it is.

        Raises
        ------
        LogError
            An input was made anew: its records would be numbered below what the outputs hold, and be suppressed.
        """
        if self.spec.outputs:
            self._check_ends(restored, ends, task.partition)
        task.lineage = restored.commit.lineage + 1
        task.saved_hour = self._hour_of(0)  # a beginning is no snapshot of an hour
        await self._learn_epoch(task)
        await self._save_beginning(task)
        logger.warning(
            "%s partition %d is computed anew from the oldest retained input: %s",
            self.spec.name, task.partition, {each.topic: each.next_offset for each in task.merger.inputs},
        )  # fmt: skip

    async def _learn_epoch(self, task: Any) -> None:
        """Where reading begins in the middle of the journal: the `open` that announced its epoch lies before that."""
        if task.view is not None and (offset := task.by_topic[JOURNAL].next_offset) > 0:
            tp = TP(self.physical_input(JOURNAL), task.partition)
            task.view.epoch = task.epoch = await epoch_at(self.log, tp, offset)

    def _hour_of(self, clock_ts_ns: int) -> int:
        return hour_of(self.spec.state_name or self.spec.name, clock_ts_ns, self.options.snapshot_sec)

    async def _offsets_by_hand(self, partitions: Sequence[int]) -> dict[int, dict[str, int]]:
        """Offsets that somebody has given the group with Kafka's own tools: partition -> topic -> offset."""
        assert self._membership is not None
        tps = {
            TP(self.physical_input(topic), partition): topic for topic in self.spec.inputs for partition in partitions
        }
        found: dict[int, dict[str, int]] = {}
        for tp, committed in (await self._membership.committed(tps)).items():
            if committed.by_hand:
                found.setdefault(tp.partition, {})[tps[tp]] = committed.offset
        return found

    def _told(self, offsets: Mapping[str, int], partition: int) -> str:
        return ", ".join(f"{self.physical_input(topic)}[{partition}] at {offset}" for topic, offset in offsets.items())

    def _obey(self, task: Any, offsets: Mapping[str, int], restored: Restored | None, begins: Mapping[TP, int]) -> None:
        """Set a task to offsets given by hand, where nothing has been computed yet.

        Raises
        ------
        LogError
            Results exist already: going on elsewhere would leave a hole in them or repeat them; or only some inputs were
            given an offset.
        """
        partition = task.partition
        if restored is not None and all(
            offsets.get(p.topic, p.next_offset) == p.next_offset for p in restored.commit.inputs
        ):
            return  # committed by an older version of ours, or reset to where we stand
        group, given = self.group, self._told(offsets, partition)
        if restored is not None or any(tail > NOTHING for tail in task.tails.values()):
            raise LogError(
                f"{self.spec.name}: the offsets of group {group!r} were reset by hand ({given}), but results under "
                f"TOPIC_PREFIX={self.options.prefix!r} exist already, and going on elsewhere would repeat them or leave a "
                f"hole: set a new TOPIC_PREFIX and INPUT_PREFIX={self.physical_input('')!r}, and reset the offsets of that "
                "prefix' group; or, to go on as before, set them back with kafka-consumer-groups.sh --delete-offsets"
            )
        missing = [topic for topic in self.spec.inputs if topic not in offsets]
        if missing:
            raise LogError(
                f"{self.spec.name}: of group {group!r} {given} was set by hand, but not "
                f"{self.physical_input(missing[0])}[{partition}]: reset all inputs together (--all-topics), by the same time"
            )
        for topic, offset in offsets.items():
            tp = TP(self.physical_input(topic), partition)
            task.by_topic[topic].next_offset = max(offset, begins[tp])

    async def _save_beginning(self, task: Any) -> None:
        """Before anything is written: a restart must begin where this start did, and know the offsets for its own."""
        await self.write_snapshot(task, packed(task.states()), self._commit_of(task))
        await self.state_writer.flush()
        await self.commit_offsets({task.partition: task.positions()})

    def _commit_of(self, task: ProcessorTask) -> Commit:
        return task.commit_record(task.positions(), task.output_tails(), self.spec.fingerprint)

    def _check_retained(
        self, restored: Restored, begins: Mapping[TP, int], ends: Mapping[TP, int], partition: int
    ) -> None:
        """Raise where something behind a snapshot is gone."""
        for position in restored.commit.inputs:
            begin = begins[TP(self.physical_input(position.topic), partition)]
            if position.next_offset < begin:
                raise LogError(
                    f"{self.spec.name}: the newest snapshot of partition {partition} goes on at offset "
                    f"{position.next_offset} of {position.topic}, but the oldest retained is {begin}: retention has "
                    "passed it; start once with STATE_REBUILD=true to compute the state anew from the oldest retained "
                    "input (lake and sinks: into a DATA_DIR that holds no files of theirs), or replay from the lake"
                )
        self._check_ends(restored, ends, partition)

    def _check_ends(self, restored: Restored, ends: Mapping[TP, int], partition: int) -> None:
        """Raise where an input ends before the place that a snapshot goes on from."""
        for position in restored.commit.inputs:
            end = ends[TP(self.physical_input(position.topic), partition)]
            if end < position.next_offset:
                remedy = "" if self.spec.outputs else ", or start once with STATE_REBUILD=true and another DATA_DIR"
                raise LogError(
                    f"{self.spec.name}: the newest snapshot of partition {partition} goes on at offset "
                    f"{position.next_offset} of {position.topic}, which ends at {end}: the topic was made anew or lost "
                    f"records; restore it, or set another TOPIC_PREFIX{remedy}"
                )

    async def _read_tails(
        self, partitions: Sequence[int], snapshots: Mapping[int, Restored | None]
    ) -> dict[int, dict[str, tuple[int, int]]]:
        """The newest (seq, sub) of each output: what its snapshot knows, and what stands behind that.

        Both count whether or not the snapshot will be gone on from: what was written once is not written again.

        Raises
        ------
        LogError
            An output ends before its place in the snapshot: it was made anew or has lost records, and going on would
            leave a hole that nobody sees.
        """
        tps = {
            TP(self.physical(topic), partition): (topic, partition)
            for topic in self.spec.outputs
            for partition in partitions
        }
        tails: dict[int, dict[str, tuple[int, int]]] = {partition: {} for partition in partitions}
        if not tps:
            return tails
        begins = await self.log.begin_offsets(tps)
        ends = await self.log.end_offsets(tps)
        windows = dict.fromkeys(tps, TAIL_RECORDS)
        for tp, (topic, partition) in tps.items():
            for tail in _tails_of(snapshots.get(partition)):
                if tail.topic == topic:
                    tails[partition][topic] = tail.written
                    if ends[tp] < tail.end_offset:
                        raise LogError(
                            f"{tp.topic}[{tp.partition}] ends at offset {ends[tp]}, and the newest snapshot of "
                            f"{self.spec.name} saw it end at {tail.end_offset}: the topic was made anew or lost records; "
                            "restore it, or set another TOPIC_PREFIX"
                        )
                    begins[tp] = max(begins[tp], tail.end_offset)
        while windows:
            starts = {tp: max(begins[tp], ends[tp] - window) for tp, window in windows.items()}
            records = await read_ranges(self.log, {tp: (start, ends[tp]) for tp, start in starts.items()})
            for tp, start in starts.items():
                topic, partition = tps[tp]
                found = max((peek(r.value)[:2] for r in records[tp] if r.value is not None), default=None)
                if found is not None:
                    tails[partition][topic] = max(found, tails[partition].get(topic, NOTHING))
                elif start > begins[tp]:
                    windows[tp] *= 4
                    continue
                del windows[tp]
        return tails

    async def write_snapshot(self, task: Any, states: dict[str, bytes], commit: Commit) -> None:
        """Write a partition's state and the commit record behind it; the first of an hour is kept with the journal.

        `states` as `packed` gives them. Durable once the writer of state is flushed.
        """
        name = self.spec.state_name or self.spec.name
        hour = self._hour_of(commit.clock_ts_ns)
        if task.saved_hour is None or hour > task.saved_hour:
            hourly = TP(self.physical(HOURLY), task.partition)
            await self._append_snapshot(hourly, states, commit, (await self.log.end_offsets([hourly]))[hourly], name)
            # First: a restart from this state takes the hour's snapshot as written.
            await self.state_writer.settled()
        task.saved_hour = hour
        tp = TP(self.physical(self.spec.state_topic), task.partition)
        own_end = self.state_writer.next_offset.get(tp)
        if own_end is None:  # where to look for the parts from: behind our own newest, or anybody's
            own_end = (await self.log.end_offsets([tp]))[tp]
        await self._append_snapshot(tp, states, commit, own_end)

    async def _append_snapshot(
        self, tp: TP, states: dict[str, bytes], commit: Commit, first_offset: int, service: str = ""
    ) -> None:
        self._snapshot_count += 1
        snapshot_id = f"{self._instance}-{self._snapshot_count}"
        now_ms = int(time.time() * 1000)
        for key, value, headers in encode_parts(snapshot_id, states):
            self.state_writer.append(tp, key, value, now_ms, headers)
        if crash.due("snapshot-half"):
            await self.state_writer.flush()
            crash.die("snapshot-half")
        complete = msgspec.structs.replace(commit, first_offset=first_offset, parts=len(states))
        key, value, headers = encode_commit(snapshot_id, complete, service)
        self.state_writer.append(tp, key, value, now_ms, headers)

    async def commit_offsets(self, positions: Mapping[int, Sequence[InputPosition]]) -> None:
        """Record the offsets with the group, for lag and for those who look with Kafka's own tools."""
        assert self._membership is not None
        offsets = {
            TP(self.physical_input(position.topic), partition): position.next_offset
            for partition, inputs in positions.items()
            for position in inputs
        }
        if offsets:
            await self._membership.commit(offsets)


class ProcessorRuntime(ServiceRuntime):
    """Drives one `Processor` per partition."""

    def __init__(
        self,
        log: Log,
        codecs: Codecs,
        spec: ServiceSpec,
        options: RuntimeOptions,
        make: Callable[[int], Processor],
        row_filter: frozenset[int] | None = None,
        filtered_topic: str = "",
        figures: StageFigures | None = None,
    ) -> None:
        """`figures`: where given, counts what is written; told of the partitions owned."""
        super().__init__(log, codecs, spec, options)
        self._figures = figures
        if figures is not None:
            figures.owned = lambda: [task.figures for task in self.tasks.values()]
        self._make = make
        self._writer = Writer(log, patience_sec=options.broker_patience_sec)
        self._row_filter = row_filter
        self._filtered_topic = filtered_topic

    def make_task(self, partition: int) -> ProcessorTask:
        task = ProcessorTask(partition, self._make, self.codecs, self.stats, self._writer, self.physical, self._figures)
        task.row_filter = self._row_filter
        task.filtered_topic = self._filtered_topic
        return task

    @property
    def writers(self) -> list[Writer]:
        return [self.state_writer, self._writer]

    def renew_writers(self) -> None:
        super().renew_writers()
        self._writer = self.renewed(self._writer)

    async def after_advance(self) -> None:
        await self._writer.ship()

    async def snapshot(self, partitions: Sequence[int]) -> None:
        """Outputs first, then state, then offsets: each step may be lost without harm to the one before.

        The state is taken between two rounds, partition by partition; processing goes on while it is written.
        """
        saved: list[tuple[ProcessorTask, dict[str, bytes], Commit]] = []
        for partition in partitions:
            task: ProcessorTask | None = self.tasks.get(partition)
            if task is None or task.merger.frontier < 0:
                continue  # gone meanwhile, or nothing was ever taken
            saved.append((task, packed(task.states()), self._commit_of(task)))
            await asyncio.sleep(0)
        await self._writer.settled()
        crash.point("snapshot-flushed")
        for task, states, commit in saved:
            await self.write_snapshot(task, states, commit)
        await self.state_writer.flush()
        crash.point("snapshot-written")
        await self.commit_offsets({task.partition: commit.inputs for task, _, commit in saved})
        crash.point("committed")
        self.note_durable()
        self.stats.snapshots += 1
        self.stats.last_snapshot_at = time.time()


def _tails_of(snapshot: Restored | None) -> Sequence[OutputTail]:
    return snapshot.commit.outputs if snapshot is not None else ()


def _progress_of(record: LogRecord) -> int:
    for name, value in record.headers:
        if name == PROGRESS_HEADER:
            return int(value)
    return -1


def control_record(topic: str, record: Record) -> bool:
    """Whether a record of the journal or of the ticks is one that a sink must ask about before taking it."""
    return topic in (JOURNAL, TICKS) and record["kind"] in CONTROL_KINDS
