"""Snapshots in `state.<service>`: records of state, then a commit record that makes them count.

A record's key is the symbol; its header `snapshot` holds the id of the snapshot that it belongs to. A commit record has
the header `commit` with that id and a `Commit` as value. What has no commit, or lacks a part, does not exist.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from operator import itemgetter
from typing import Final

import msgspec
import zstandard

from orderflow.errors import LogError
from orderflow.streaming.log import TP, Log, LogRecord, read_ranges

SNAPSHOT_HEADER: Final = "snapshot"
COMMIT_HEADER: Final = "commit"
ZSTD_LEVEL: Final = 3
MAX_STATE_BYTES: Final = 64 << 20
FIRST_WINDOW: Final = 256
HOUR_NS: Final = 3_600_000_000_000
_INTO: Final = " (lake and sinks: into a DATA_DIR that holds no files of theirs)"
STAGGER: Final = {"normaliser": 0, "ofi": 1, "cvd": 1, "fusion": 2, "signal": 3, "lake": 4, "sinks": 4}
"""How many steps behind the full hour a service takes its hourly snapshot, in the order of computation.

A replay can start from a set of snapshots only where each service stands at or behind what reads from it has taken; a
step is two intervals of snapshots, so those of one hour are such a set.
"""


class InputPosition(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Where an input stands: `next_offset` is the oldest record not yet merged."""

    topic: str
    next_offset: int
    seq: int
    sub: int
    progress: int


class OutputTail(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """The newest record of an output that this computation has come to."""

    topic: str
    seq: int
    sub: int
    end_offset: int = 0
    """Offset such that nothing newer than both places stands before it: a recovery must look only behind it."""
    written_seq: int = -1
    written_sub: int = -1
    """The newest record that was ever written, where a re-run is still behind it; the log may keep it no longer."""

    @property
    def written(self) -> tuple[int, int]:
        """(seq, sub) at or below which everything has been written."""
        return max((self.seq, self.sub), (self.written_seq, self.written_sub))


class Commit(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What makes a snapshot complete."""

    first_offset: int
    parts: int
    inputs: list[InputPosition]
    outputs: list[OutputTail]
    session: str
    ended: bool
    code_version: str
    fingerprint: str
    clock_ts_ns: int = 0
    epoch: int = 0
    note: dict[str, str] = {}
    lineage: int = 0
    """One more for each time that state was computed anew: a process that still runs under the settings before it must
    not put its state in front of the new one's."""

    @property
    def rank(self) -> tuple[int, int]:
        """What makes one snapshot newer than another: not its place in the topic, since a process that has lost its
        partition without knowing goes on saving what is older."""
        return self.lineage, sum(position.next_offset for position in self.inputs)


class Restored(msgspec.Struct, frozen=True):
    """A snapshot read back: state by symbol, and its commit."""

    commit: Commit
    states: dict[str, bytes]


def packed(states: Mapping[str, bytes]) -> dict[str, bytes]:
    """States by symbol, compressed: what waits to be written should take little room."""
    compressor = zstandard.ZstdCompressor(level=ZSTD_LEVEL)
    # Copies: what the library returns keeps the room of data that can't be compressed.
    return {symbol: bytes(memoryview(compressor.compress(state))) for symbol, state in states.items()}


def encode_parts(snapshot_id: str, states: Mapping[str, bytes]) -> list[tuple[bytes, bytes, list[tuple[str, bytes]]]]:
    """(key, value, headers) of each state record, in the order of symbols; `states` as `packed` gives them."""
    headers = [(SNAPSHOT_HEADER, snapshot_id.encode())]
    return [(symbol.encode(), states[symbol], headers) for symbol in sorted(states)]


def encode_commit(snapshot_id: str, commit: Commit, service: str = "") -> tuple[bytes, bytes, list[tuple[str, bytes]]]:
    """(key, value, headers) of the commit record; the key names the service where a topic has several."""
    return service.encode(), msgspec.json.encode(commit), [(COMMIT_HEADER, snapshot_id.encode())]


Suits = Callable[[Commit], bool]


def anything(commit: Commit) -> bool:
    """Takes every snapshot."""
    return True


def hour_of(service: str, clock_ts_ns: int, snapshot_sec: float) -> int:
    """Number of the hour whose snapshot a service owes at a clock; see `STAGGER`."""
    return (clock_ts_ns - int(STAGGER.get(service, 0) * 2 * snapshot_sec * 1e9)) // HOUR_NS


def newest(
    records: Sequence[LogRecord], suits: Suits = anything, service: str = "", *, whole: bool = False
) -> Restored | int | None:
    """The complete snapshot of the highest rank that suits among `records`, the last of them where several have it.

    An offset where an older record is needed to complete it; None where there is none. `service` picks one writer's where
    a topic has several: their commit records have its name as key. `whole`: the topic holds nothing older.
    """
    first_seen = records[0].offset if records else 0
    commits = [
        (commit.rank, index, commit)
        for index, record in enumerate(records)
        if (commit := _commit_at(record, service)) is not None and suits(commit)
    ]
    for _, index, commit in sorted(commits, key=itemgetter(0, 1), reverse=True):
        if commit.first_offset < first_seen and not whole:
            return commit.first_offset
        restored = _complete(records, index, commit)
        if restored is not None:
            return restored
    return None


def oldest(records: Sequence[LogRecord], suits: Suits = anything, service: str = "") -> Restored | None:
    """The oldest complete snapshot among `records` that suits."""
    for index, record in enumerate(records):
        commit = _commit_at(record, service)
        if commit is not None and suits(commit):
            restored = _complete(records, index, commit)
            if restored is not None:
                return restored
    return None


def _commit_at(record: LogRecord, service: str) -> Commit | None:
    if _header(record, COMMIT_HEADER) is None or (service and record.key != service.encode()):
        return None
    return msgspec.json.decode(record.value or b"", type=Commit)


def _complete(records: Sequence[LogRecord], index: int, commit: Commit) -> Restored | None:
    """The snapshot whose commit record is `records[index]`; None where it lacks a part."""
    decompressor = zstandard.ZstdDecompressor()
    commit_id = _header(records[index], COMMIT_HEADER)
    states: dict[str, bytes] = {}
    for record in records[:index]:
        if record.offset >= commit.first_offset and _header(record, SNAPSHOT_HEADER) == commit_id:
            states[(record.key or b"").decode()] = decompressor.decompress(
                record.value or b"", max_output_size=MAX_STATE_BYTES
            )
    return Restored(commit, states) if len(states) == commit.parts else None


async def load_newest(
    log: Log, tps: Iterable[TP], suits: Suits = anything, service: str = ""
) -> dict[TP, Restored | None]:
    """Read the newest complete snapshot that suits of each partition of state; None where there is none."""
    tps = list(tps)
    found: dict[TP, Restored | None] = {}
    begins = await log.begin_offsets(tps)
    ends = await log.end_offsets(tps)
    windows = dict.fromkeys(begins, FIRST_WINDOW)
    while windows:
        starts = {tp: max(begins[tp], ends[tp] - window) for tp, window in windows.items()}
        records = await read_ranges(log, {tp: (start, ends[tp]) for tp, start in starts.items()})
        for tp, start in starts.items():
            got = newest(records[tp], suits, service, whole=start == begins[tp])
            if isinstance(got, Restored):
                found[tp] = got
            elif start == begins[tp]:
                found[tp] = None
            else:
                windows[tp] = max(windows[tp] * 4, ends[tp] - got if got is not None else 0)
                continue
            del windows[tp]
    return found


async def load_oldest(log: Log, tp: TP, suits: Suits = anything, service: str = "") -> Restored | None:
    """Read the oldest complete snapshot that suits of one partition of state; None where there is none."""
    begin = (await log.begin_offsets([tp]))[tp]
    end = (await log.end_offsets([tp]))[tp]
    window = FIRST_WINDOW
    while True:
        until = min(end, begin + window)
        found = oldest((await read_ranges(log, {tp: (begin, until)}))[tp], suits, service)
        if found is not None or until >= end:
            return found
        window *= 4


def check_fingerprint(commit: Commit, fingerprint: str, code_version: str, tp: TP) -> None:
    """Refuse a snapshot that may not be gone on from.

    Raises
    ------
    LogError
        It was made under other settings, or by another version of the code.
    """
    if commit.fingerprint == fingerprint and commit.code_version == code_version:
        return
    if commit.code_version != code_version:
        raise LogError(
            f"{tp.topic}[{tp.partition}]: the newest snapshot was made by version {commit.code_version} of the code, and "
            f"this is {code_version}: run that one, choose another TOPIC_PREFIX, or start once with STATE_REBUILD=true to "
            f"compute the state anew from the oldest retained input{_INTO}"
        )
    raise LogError(
        f"{tp.topic}[{tp.partition}]: the newest snapshot was made under the settings {commit.fingerprint[:12]}, and "
        f"these are {fingerprint[:12]}: restore the old settings, choose another TOPIC_PREFIX, or start once with "
        f"STATE_REBUILD=true to compute the state anew from the oldest retained input{_INTO}"
    )


def _header(record: LogRecord, name: str) -> str | None:
    for key, value in record.headers:
        if key == name:
            return value.decode()
    return None
