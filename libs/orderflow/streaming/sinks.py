"""Runs a `FileSink` over its partitions: merge, buffer, cut by journal positions, commit what is durable.

A sink has no outputs in the log. What was buffered and not yet cut is discarded by a restart and read again, so a cut
gives the same files under the same names however often it is made.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from typing import Any, Final

from orderflow.errors import OrderflowError
from orderflow.lake.sink import FileSink
from orderflow.streaming import crash
from orderflow.streaming.codec import Codecs
from orderflow.streaming.journal import epoch_of
from orderflow.streaming.log import Log, LogRecord
from orderflow.streaming.merge import Input
from orderflow.streaming.runtime import (
    CONTROL_KINDS,
    PartitionBase,
    RuntimeOptions,
    ServiceRuntime,
    ServiceSpec,
    Stats,
)
from orderflow.streaming.snapshots import InputPosition, Restored, packed
from orderflow.topics import JOURNAL, TICKS

logger = logging.getLogger(__name__)

RETRY_FIRST_SEC: Final = 1.0
RETRY_MOST_SEC: Final = 30.0


class SinkTask(PartitionBase):
    """A partition of a sink service."""

    def __init__(
        self,
        partition: int,
        sink: FileSink,
        codecs: Codecs,
        stats: Stats,
        commit: Callable[[SinkTask, list[InputPosition], Any], Any],
        note: Callable[[SinkTask, list[InputPosition], Any], Any],
        blocked: Callable[[SinkTask, Exception], None],
    ) -> None:
        super().__init__(partition, sink.inputs, codecs, stats)
        self.sink = sink
        self.tails: dict[str, tuple[int, int]] = {}
        self.done = {}
        self.stuck = False
        """True while files cannot be written: the partition waits, and the log holds the data."""
        self._rest: list[Any] = []
        self._cut_pending = False
        self._retry_at = 0.0
        self._retry_sec = RETRY_FIRST_SEC
        self._commit = commit
        self._note = note
        self._committed: tuple[list[InputPosition], Any] | None = None
        """A cut that is committed and has to be noted yet."""
        self._blocked = blocked

    async def advance(self, limit: int) -> int:
        """Buffer what is due; write at every cut. While a write fails nothing further is taken."""
        if self.stuck and time.monotonic() < self._retry_at:
            return 0
        if not self._rest:
            self._rest = list(self.merger.run(limit))
            if self._rest:
                self.meet_symbols(self._rest)
                self.note_processed(self._rest[0][3].timestamp, self._rest[-1][3].timestamp)
        processed = 0
        while self._rest or self._cut_pending:
            if self._cut_pending:
                if not await self._cut():
                    break
                continue
            processed += self._take_until_cut()
        self.stats.records_in += processed
        return processed

    def _take_until_cut(self) -> int:
        """Buffer records up to the next cut; returns how many were taken."""
        sink, rest, decoders, done = self.sink, self._rest, self.decoders, self.done
        for index, (each, seq, sub, record) in enumerate(rest):
            topic = each.topic
            decoded = decoders[topic](record.value)
            control = topic in (JOURNAL, TICKS) and decoded["kind"] in CONTROL_KINDS
            if control and sink.cut_before(topic, decoded) and sink.rows_buffered():
                self._rest = rest[index:]
                self._cut_pending = True
                return index
            due = sink.step(topic, decoded)
            done[topic] = (seq, sub)
            if topic == JOURNAL:
                self.epoch = epoch_of(record)
            if topic == TICKS:
                self.clock_ts_ns = decoded["clock_ts_ns"]
                if control or self.ended:
                    self.note_control(decoded)
            if due:
                self._rest = rest[index + 1 :]
                self._cut_pending = True
                return index + 1
        self._rest = []
        return len(rest)

    async def _cut(self) -> bool:
        """Write the files of a cut, commit and note it; False where it has to be tried again later."""
        if self._committed is None:
            try:
                result = await asyncio.to_thread(self.sink.write)
            except OrderflowError as error:
                return self._wait(error)
            positions = self.positions(self._rest)
            await self._commit(self, positions, result)
            self._committed = positions, result
        try:
            await self._note(self, *self._committed)
        except (OrderflowError, OSError) as error:
            return self._wait(error)
        self._committed = None
        self.stuck = False
        self._retry_sec = RETRY_FIRST_SEC
        self._cut_pending = False
        return True

    def _wait(self, error: Exception) -> bool:
        """The disk takes nothing, or not this: pause the partition, and say why each time that it is tried again."""
        self.stuck = True
        self._retry_at = time.monotonic() + self._retry_sec
        self._retry_sec = min(RETRY_MOST_SEC, self._retry_sec * 2)
        self._blocked(self, error)
        return False

    @property
    def released(self) -> Sequence[tuple[Input, int, int, LogRecord]]:
        return self._rest

    @property
    def waits_on_itself(self) -> bool:
        """A cut that could not be made yet, or records behind one."""
        return self._cut_pending or bool(self._rest)

    @property
    def settled(self) -> bool:
        return self.ended and self.merger.frontier >= self.end_seq and not self._cut_pending and not self._rest

    def states(self) -> dict[str, bytes]:
        return self.sink.state()

    def restore(self, restored: Restored) -> None:
        self.restore_inputs(restored.commit)
        for position in restored.commit.inputs:
            self.done[position.topic] = (position.seq, position.sub)
        self.sink.restore(restored.states)


class SinkRuntime(ServiceRuntime):
    """Drives one file sink per partition."""

    def __init__(
        self,
        log: Log,
        codecs: Codecs,
        spec: ServiceSpec,
        options: RuntimeOptions,
        make: Callable[[int], FileSink],
        on_cut: Callable[[int, Any, list[InputPosition], SinkTask], None] | None = None,
        on_end: Callable[[], None] | None = None,
    ) -> None:
        """`on_cut` is called after each commit, in a thread, and again where it failed; `on_end` once, when nothing is written any more."""
        super().__init__(log, codecs, spec, options)
        self._make = make
        self._on_cut = on_cut
        self._on_end = on_end
        self.cuts = 0
        self.cuts_failed = 0
        """Times that a cut could not be made, or noted, and its partition waited to try again."""

    async def run(self) -> None:
        """See `ServiceRuntime.run`."""
        try:
            await super().run()
        finally:
            if self._on_end is not None:
                self._on_end()

    def make_task(self, partition: int) -> SinkTask:
        return SinkTask(
            partition, self._make(partition), self.codecs, self.stats, self._commit_cut, self._note_cut, self._blocked
        )

    async def check_begin(self, task: SinkTask, cause: str, otherwise: str) -> None:
        """See `FileSink.check_begin`."""
        await asyncio.to_thread(task.sink.check_begin, cause, otherwise)

    @property
    def stuck(self) -> list[int]:
        """Partitions whose files cannot be written now."""
        return sorted(partition for partition, task in self.tasks.items() if task.stuck)

    def _blocked(self, task: SinkTask, error: Exception) -> None:
        self.cuts_failed += 1
        logger.error("%s partition %d waits, nothing is lost: %s", self.spec.name, task.partition, error)

    async def _commit_cut(self, task: SinkTask, positions: list[InputPosition], result: Any) -> None:
        crash.point("cut-written")
        commit = task.commit_record(positions, [], self.spec.fingerprint)
        await self.write_snapshot(task, packed(task.states()), commit)
        await self.state_writer.flush()
        crash.point("snapshot-written")
        await self.commit_offsets({task.partition: positions})
        crash.point("committed")
        self.note_durable()
        self.cuts += 1
        self.stats.snapshots += 1
        self.stats.last_snapshot_at = time.time()

    async def _note_cut(self, task: SinkTask, positions: list[InputPosition], result: Any) -> None:
        if self._on_cut is not None:
            await asyncio.to_thread(self._on_cut, task.partition, result, positions, task)

    async def snapshot(self, partitions: Sequence[int]) -> None:
        """Nothing: only a cut commits, and a cut never comes from the wall clock or a signal."""
