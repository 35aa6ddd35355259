"""A session of the exchange straight into a capture: the recorder of the pipeline over a journal that is a file.

Sockets, watchdogs, rotation, the bounded queue and snapshots are the recorder's own. What it journals goes into the file
instead of into Kafka, and into a normaliser that is kept for one purpose: it knows when a book needs a snapshot, at the
start and after every gap, by the very rule by which a replay of the file will judge it. It is not told of gaps, since a
replay is not told either.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

from orderflow.capture import CaptureWriter, rest_frame, why_unheld
from orderflow.config import Config
from orderflow.errors import CaptureError, LogError
from orderflow.ingest.export import gap_reason
from orderflow.processor import Processor, Record
from orderflow.streaming.codec import Codecs, schema_text
from orderflow.streaming.log import TP
from orderflow.streaming.memory_log import MemoryLog
from orderflow.streaming.recorder import JournalWriter
from orderflow.topics import BY_NAME, EVENTS, JOURNAL, PARTITIONS
from orderflow.venues.binance.normaliser import NormaliserProcessor

logger = logging.getLogger(__name__)

PREFIX: Final = "record."
FLUSH_SEC: Final = 1.0
"""What a kill costs at most."""
GATHER_SEC: Final = 0.1
MAX_PENDING_BYTES: Final = 32 << 20
"""Beyond, the recorder's own queue has to wait for the disk, by its own rules."""
NEEDS_KEPT: Final = 1_000
TOPICS: Final = (JOURNAL, EVENTS, "control.commands")


def local_codecs() -> Codecs:
    """Codecs of what the recorder reads and writes, without a registry: nobody else reads it."""
    schemas = {topic: schema_text(BY_NAME[topic].schema or "") for topic in TOPICS}
    return Codecs({topic: number for number, topic in enumerate(TOPICS, 1)}, schemas, _no_other_schema)


async def _no_other_schema(number: int) -> str:
    raise LogError(f"schema {number} is not known")


class FileSeries:
    """The file of a recording, or several one after the other. Used by one thread at a time."""

    def __init__(self, path: Path, in_parts: bool) -> None:
        """`in_parts`: every file has its time in its name.

        Raises
        ------
        CaptureError
            The file is there already, or its folder cannot be written.
        """
        self._path = path
        self._in_parts = in_parts
        self.finished: list[Path] = []
        self._writer = CaptureWriter(self._name())
        self._frames_before = self._bytes_before = 0

    @property
    def frames(self) -> int:
        return self._frames_before + self._writer.frames

    @property
    def size_bytes(self) -> int:
        """Of all files, as they lie on the disk."""
        return self._bytes_before + self._writer.size_bytes

    @property
    def newest_bytes(self) -> int:
        return self._writer.size_bytes

    @property
    def part(self) -> Path:
        return self._writer.part

    def _name(self) -> Path:
        if not self._in_parts:
            return self._path
        ending = "".join(self._path.suffixes[-1:])
        stem = self._path.name.removesuffix(ending)
        return self._path.with_name(f"{stem}-{datetime.now(UTC):%Y%m%dT%H%M%S}{ending}")

    def write(self, lines: Sequence[tuple[int, str, bytes] | None], flush: bool) -> None:
        """Append frames; None stands for the end of a file and the begin of the next."""
        for line in lines:
            if line is not None:
                self._writer.write(*line)
            elif self._writer.frames:
                self.close()
                self._frames_before, self._bytes_before = self.frames, self.size_bytes
                self._writer = CaptureWriter(self._name())
        if flush:
            self._writer.flush()

    def close(self) -> None:
        self._writer.close()
        if self._writer.frames:
            self.finished.append(self._writer.path)

    def abandon(self) -> None:
        self._writer.abandon()


class FileJournal(JournalWriter):
    """A journal whose frames and snapshots lie in a capture; `open` records alone go to the log behind it."""

    def __init__(
        self, log: MemoryLog, codecs: Codecs, config: Config, files: FileSeries, due: Callable[[int, int], bool]
    ) -> None:
        """`due(nanoseconds, bytes)` says whether a file that spans so much is followed by another."""
        super().__init__(log, codecs, PREFIX, range(PARTITIONS))
        self._memory = log
        self._encode_event = codecs.encoder(EVENTS)
        self._config = config
        self._files = files
        self._due = due
        self._processors: dict[int, Processor] = {}
        self._lines: list[tuple[int, str, bytes] | None] = []
        self.pending_bytes = 0
        self._file_begin_ns = -1
        self._wanted = asyncio.Event()
        self._written = asyncio.Event()
        self._failure: BaseException | None = None
        self._under_way: asyncio.Future[None] | None = None
        self.unheld: Counter[str] = Counter()
        self.gaps: Counter[str] = Counter()
        self.snapshots = 0
        self.synced: set[str] = set()
        """Symbols whose book is whole in the newest file."""
        self.frames_by_symbol: Counter[str] = Counter()

    def append(self, partition: int, record: Record, stamp_ms: int) -> int:
        seq = self.seq[partition] + 1
        self.seq[partition] = seq
        self.records += 1
        record["seq"] = seq
        kind = record["kind"]
        if kind == "gap":
            self.gaps[gap_reason(record["payload"])] += 1
            return seq
        if kind in ("frame", "snapshot"):
            self._turn_page(record["recv_ts_ns"])
            self._keep(record)
        if kind in ("frame", "snapshot", "tick"):
            self._ask(partition, record, stamp_ms)
        return seq

    def _turn_page(self, recv_ts_ns: int) -> None:
        if self._file_begin_ns < 0:
            self._file_begin_ns = recv_ts_ns
        elif self._due(recv_ts_ns - self._file_begin_ns, self._files.newest_bytes):
            self._file_begin_ns = recv_ts_ns
            self._lines.append(None)
            # A file must stand by itself: every book needs a snapshot again.
            self._processors.clear()
            self.synced.clear()

    def _keep(self, record: Record) -> None:
        payload: bytes = record["payload"]
        if record["kind"] == "snapshot":
            try:
                payload = rest_frame(record["symbol"], payload)
            except CaptureError as error:
                self.unheld["snapshot_not_json"] += 1
                logger.warning("%s", error)
                return
            self.snapshots += 1
        elif why := why_unheld(payload):
            self.unheld[why] += 1
            return
        self.frames_by_symbol[record["symbol"] or ""] += 1
        self._lines.append((record["recv_ts_ns"], record["route"], payload))
        self.pending_bytes += len(payload)
        self._wanted.set()

    def _ask(self, partition: int, record: Record, stamp_ms: int) -> None:
        """Pass on what the normaliser asks for; the recorder reads it where it always does."""
        processor = self._processors.get(partition)
        if processor is None:
            processor = self._processors[partition] = NormaliserProcessor(self._config.normaliser)
        for topic, symbol, fields in processor.step(JOURNAL, record):
            if topic != EVENTS:
                continue
            if fields["event_type"] == "book_synced":
                self.synced.add(symbol)
            elif fields["event_type"] == "snapshot_needed":
                self.synced.discard(symbol)
                fields["seq"], fields["sub"] = record["seq"], 0
                batch = self._memory.batch()
                batch.append(symbol.encode(), self._encode_event(fields), stamp_ms)
                tp = TP(PREFIX + EVENTS, partition)
                base = self._memory.append(batch, tp)
                if base % NEEDS_KEPT == NEEDS_KEPT - 1:
                    self._memory.trim(tp, base - NEEDS_KEPT // 2)

    async def ship(self) -> None:
        """Wait for the disk where it is far behind.

        Raises
        ------
        CaptureError
            It refused to go on.
        """
        while self.pending_bytes > MAX_PENDING_BYTES and self._failure is None:
            self._written.clear()
            await self._written.wait()
        self._check()

    async def flush(self) -> None:
        """Wait until the file has taken everything; closing it brings it to the disk. Raises as `ship` does."""
        while self._lines and self._failure is None:
            self._written.clear()
            await self._written.wait()
        self._check()

    def _check(self) -> None:
        if self._failure is not None:
            raise self._failure

    async def write_on(self) -> None:
        """Carry to the disk what has gathered, until cancelled; a thread does it, so that no receive time suffers."""
        loop = asyncio.get_running_loop()
        flushed_at = loop.time()
        while True:
            await self._wanted.wait()
            self._wanted.clear()
            lines, count = self._lines[:], self.pending_bytes
            flush = loop.time() - flushed_at >= FLUSH_SEC
            self._under_way = asyncio.ensure_future(asyncio.to_thread(self._files.write, lines, flush))
            await asyncio.wait([self._under_way])
            if error := self._under_way.exception():
                self._failure = error  # whoever waits for the file raises it
                self._written.set()
                return
            del self._lines[: len(lines)]
            self.pending_bytes -= count
            self._written.set()
            if flush:
                flushed_at = loop.time()
            await asyncio.sleep(GATHER_SEC)
            if not flush:
                self._wanted.set()  # what has been written is flushed even where nothing more comes

    async def settle(self) -> None:
        """Wait for the thread that writes: a cancelled `write_on` leaves it at work."""
        if self._under_way is not None:
            await asyncio.wait([self._under_way])
