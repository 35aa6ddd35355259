"""File sinks: consumers of merged records that write files cut by journal positions alone.

What is buffered and not yet cut is lost with the process and read again, so everything that decides a cut, a name or a
byte comes from the records: never from the wall clock, a signal or a rebalance. Retries write the same bytes under the
same names.
"""

from __future__ import annotations

import ctypes
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar, Final, NamedTuple, Protocol

import msgspec

from orderflow.counts import ProcessCounts
from orderflow.lake import files
from orderflow.lake.layout import LakeError, partition_of
from orderflow.processor import Record
from orderflow.streaming.journal import session_of

NS_PER_SEC: Final = 1_000_000_000
TRIM_ROWS: Final = 10_000
"""From how many rows on a cut is followed by giving memory back: it takes some milliseconds."""
LARGE_BYTES: Final = 64 << 10
M_MMAP_THRESHOLD: Final = -3
M_ARENA_MAX: Final = -8
"""Numbers of malloc.h."""


class FileWritten(NamedTuple):
    """One file of a cut; `path` is relative to the lake's root, with `/` between folders.

    `made` is False for a file that was there before and has grown by these rows and bytes.
    """

    path: str
    rows: int
    bytes: int
    made: bool = True


class CutResult(NamedTuple):
    """What a cut wrote: the first and last seq taken since the cut before it (-1 where there was none), its files."""

    first_seq: int
    last_seq: int
    files: list[FileWritten]


class FileSink(Protocol):
    """Buffers the merged records of one journal partition and writes them at cuts."""

    inputs: ClassVar[tuple[str, ...]]
    """Logical topics by rank; `market.ticks` last, so that a cut takes everything that its tick caused."""

    def step(self, topic: str, record: Record) -> bool:
        """Buffer a record; True: a cut is due after this record, before any other is given."""
        ...

    def cut_before(self, topic: str, record: Record) -> bool:
        """Whether a cut must be made before this record is given: it begins another session."""
        ...

    def write(self) -> CutResult:
        """Write everything buffered, durably, and empty the buffers. Blocks; to be run in a thread.

        May be repeated after a failure: the same bytes under the same names.

        Raises
        ------
        LakeError
            A file could not be written; the buffers are kept.
        """
        ...

    def state(self) -> dict[str, bytes]:
        """What is carried from cut to cut. Called right after `write`."""
        ...

    def restore(self, states: Mapping[str, bytes]) -> None:
        """Go on from what `state` returned after some cut."""
        ...

    def check_begin(self, cause: str, otherwise: str) -> None:
        """Called before a beginning anywhere but where everything begins. Blocks; to be run in a thread.

        `cause`, why it begins there, and `otherwise`, what else can be done, are of the error's text.

        Raises
        ------
        LakeError
            Files of this partition are there already: other cuts would repeat their rows, or replace them by fewer.
        """
        ...

    @abstractmethod
    def rows_buffered(self) -> int:
        """Records that wait to be written."""
        ...


class CutState(msgspec.Struct, frozen=True):
    """The session and the clock of the newest tick, nanoseconds; None before the first."""

    session: str
    clock_ts_ns: int | None


class CutSink(ABC):
    """What the sinks share: when to cut, under which numbers, and how the files of a cut get to the disk."""

    inputs: ClassVar[tuple[str, ...]]
    control: ClassVar[str]
    """The topic whose `config` records begin sessions here."""

    def __init__(self, root: Path, partition: int, rotate_sec: int, max_rows: int) -> None:
        self.root = root
        self.partition = partition
        self.session = ""
        self.first_seq = -1
        self.last_seq = -1
        self.counted = ProcessCounts()
        """Files, bytes, rows by kind, and write errors; the sinks of a service share one."""
        self.last_flush_sec = 0.0
        self.cuts: dict[str, int] = {}
        """Cuts by cause: clock, rows, end, session."""
        self._rotate_ns = rotate_sec * NS_PER_SEC
        self._max_rows = max_rows
        self._clock_ts_ns: int | None = None
        self._cause = ""
        self._swept: set[Path] | None = set()
        """Folders searched for what a dead writer of the same cut left; None once a cut has been written."""

    # -- what subclasses give -------------------------------------------------------------------------------------

    @abstractmethod
    def step(self, topic: str, record: Record) -> bool:
        """Buffer a record; True where a cut is due after it."""

    @abstractmethod
    def rows_buffered(self) -> int:
        """Records that wait to be written."""

    @abstractmethod
    def _full(self) -> bool:
        """Whether so much is buffered that the next tick cuts."""

    @abstractmethod
    def _write_files(self) -> list[tuple[str, FileWritten]]:
        """Write each file; returns (kind, file) in the order of paths."""

    @abstractmethod
    def _clear(self) -> None:
        """Empty the buffers: what was in them is durable."""

    @abstractmethod
    def _trees(self) -> tuple[str, ...]:
        """Folders below the root with files whose names depend on where the cuts lie."""

    def _begin_session(self) -> None:
        """Forget what a new session must not inherit."""

    # -- the rule -------------------------------------------------------------------------------------------------

    def cut_before(self, topic: str, record: Record) -> bool:
        """Whether `record` begins a session while something of the one before is buffered."""
        if topic != self.control or self.rows_buffered() == 0 or session_id(record) is None:
            return False
        self._cause = "session"
        return True

    def _control_record(self, record: Record) -> None:
        session = session_id(record)
        if session is None:
            return
        self.session = session
        self.first_seq = record["seq"]
        self._clock_ts_ns = None
        self._begin_session()

    def _tick(self, record: Record) -> bool:
        """Follow the clock; True where this record of market.ticks makes a cut due."""
        kind = record["kind"]
        if kind == "end":
            return self._due("end")
        if kind != "tick":
            return False
        clock, before = record["clock_ts_ns"], self._clock_ts_ns
        self._clock_ts_ns = clock
        if before is not None and clock // self._rotate_ns != before // self._rotate_ns:
            return self._due("clock")
        return self._full() and self._due("rows")

    def _due(self, cause: str) -> bool:
        self._cause = cause
        return True

    # -- writing --------------------------------------------------------------------------------------------------

    def discard(self) -> str:
        """Drop what a cut would write, as though it had; returns the cut's cause. For a reader that began in its middle."""
        cause = self._cause
        self._after_cut()
        return cause

    def write(self) -> CutResult:
        """Write the files of the cut in the order of their paths; see `FileSink.write`."""
        started = time.perf_counter()
        written = self._write_files()
        self._sync([file.path for _, file in written])
        result = CutResult(self.first_seq, self.last_seq, [file for _, file in written])
        for kind, file in written:
            self.counted.add("files", "", file.made)
            self.counted.add("bytes", "", file.bytes)
            self.counted.add("rows", kind, file.rows)
        if self._cause:
            self.cuts[self._cause] = self.cuts.get(self._cause, 0) + 1
        self._swept = None
        self._after_cut()
        if sum(file.rows for _, file in written) >= TRIM_ROWS:
            give_back()
        self.last_flush_sec = time.perf_counter() - started
        return result

    def _after_cut(self) -> None:
        self._clear()
        self._cause = ""
        self.first_seq = self.last_seq = -1

    def _write_file(self, path: str, data: memoryview, check: Callable[[Path], None]) -> None:
        target = self.root / path
        if self._swept is not None and target.parent not in self._swept:
            files.sweep_folder(target.parent)
            self._swept.add(target.parent)
        files.write_file(target, data, check, self._failed)

    def _failed(self, error: OSError) -> None:
        self.counted.add("write_errors")

    def _sync(self, paths: list[str]) -> None:
        try:
            files.sync_folders(sorted({(self.root / path).parent for path in paths}))
        except OSError as error:
            self._failed(error)
            raise files.LakeWriteError(
                f"a folder of the cut {self.first_seq} to {self.last_seq} below {self.root} can't be flushed: {error}; "
                "see to the disk: the log keeps the data and writing goes on from there"
            ) from error

    def check_begin(self, cause: str, otherwise: str) -> None:
        """See `FileSink.check_begin`.

        Where retention has passed the record that names the session, or inputs begin at different places, neither the
        names nor the rows of the first files are those of a reader who was there from the start.
        """
        for tree in self._trees():
            held = files.first_file(self.root / tree, lambda name: partition_of(name) == self.partition)
            if held is not None:
                raise LakeError(
                    f"{cause} would write into {self.root / tree}, which holds files of partition "
                    f"{self.partition} already ({held.name}): their rows would be written twice, or replaced by fewer. Set "
                    f"another DATA_DIR, or move {' and '.join(str(self.root / each) for each in self._trees())} away"
                    f"{otherwise}"
                )

    # -- state ----------------------------------------------------------------------------------------------------

    def state(self) -> dict[str, bytes]:
        """See `FileSink.state`."""
        return {"": msgspec.msgpack.encode(CutState(self.session, self._clock_ts_ns))}

    def restore(self, states: Mapping[str, bytes]) -> None:
        """See `FileSink.restore`.

        Raises
        ------
        LakeError
            It is not a state of this sink.
        """
        state = decode_state(states.get("", b""), CutState)
        self.session = state.session
        self._clock_ts_ns = state.clock_ts_ns
        self.first_seq = self.last_seq = -1
        self._clear()


def decode_state(data: bytes, type_: type[Any]) -> Any:
    """One entry of a saved state."""
    try:
        return msgspec.msgpack.decode(data, type=type_)
    except msgspec.DecodeError as error:
        raise LakeError(
            f"the saved state of a file sink can't be read ({error}): start once with STATE_REBUILD=true and "
            "another DATA_DIR to begin anew from the oldest retained input"
        ) from error


def give_back() -> None:
    """Give freed memory back to the system, where the C library can (glibc).

    Between two cuts buffers grow, and go at once; what was taken among them meanwhile would keep the process as large as
    it ever was.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)


def keep_large_apart() -> None:
    """Let blocks of 64 KiB and more, fetched answers and buffers, be taken from the system and go back to it one by one.

    By itself the C library (glibc) takes to its heap whatever is as large as a block that was freed once, where one
    small block behind them keeps them; and each thread that writes a cut begins a heap of its own.
    """
    adjust = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if adjust is not None:
        adjust(M_MMAP_THRESHOLD, LARGE_BYTES)
        adjust(M_ARENA_MAX, 1)


def session_id(record: Record) -> str | None:
    """The session that a record of the journal or of the ticks begins; None where it begins none."""
    begun = session_of(record["payload"]) if record["kind"] == "config" else None
    return None if begun is None else str(begun["session"])
