"""Snapshots in `state.<service>`: records of state, then a commit record that makes them count.

A record's key is the symbol; its header `snapshot` holds the id of the snapshot that it belongs to. A commit record has
the header `commit` with that id and a `Commit` as value. What has no commit, or lacks a part, does not exist.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
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


class InputPosition(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Where an input stands: `next_offset` is the oldest record not yet merged."""

    topic: str
    next_offset: int
    seq: int
    sub: int
    progress: int


class OutputTail(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The newest record of an output."""

    topic: str
    seq: int
    sub: int
    end_offset: int = 0
    """Offset behind it when the snapshot was made: what came later is all that a recovery must look at."""


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


def encode_parts(snapshot_id: str, states: Mapping[str, bytes]) -> list[tuple[bytes, bytes, list[tuple[str, bytes]]]]:
    """(key, value, headers) of each state record, in the order of symbols."""
    compressor = zstandard.ZstdCompressor(level=ZSTD_LEVEL)
    headers = [(SNAPSHOT_HEADER, snapshot_id.encode())]
    return [(symbol.encode(), compressor.compress(states[symbol]), headers) for symbol in sorted(states)]


def encode_commit(snapshot_id: str, commit: Commit) -> tuple[bytes, bytes, list[tuple[str, bytes]]]:
    """(key, value, headers) of the commit record."""
    return b"", msgspec.json.encode(commit), [(COMMIT_HEADER, snapshot_id.encode())]


def newest(records: list[LogRecord]) -> Restored | int | None:
    """The complete snapshot of the highest rank among `records`, the last of them where several have it.

    An offset where an older record is needed to complete it; None where there is none.
    """
    first_seen = records[0].offset if records else 0
    commits = [
        (msgspec.json.decode(record.value or b"", type=Commit), commit_id, index)
        for index, record in enumerate(records)
        if (commit_id := _header(record, COMMIT_HEADER)) is not None
    ]
    for commit, commit_id, index in sorted(commits, key=lambda each: (each[0].rank, each[2]), reverse=True):
        if commit.first_offset < first_seen:
            return commit.first_offset
        parts = [
            record
            for record in records[:index]
            if record.offset >= commit.first_offset and _header(record, SNAPSHOT_HEADER) == commit_id
        ]
        states = {(record.key or b"").decode(): record.value or b"" for record in parts}
        if len(states) == commit.parts:
            decompressor = zstandard.ZstdDecompressor()
            return Restored(
                commit,
                {
                    symbol: decompressor.decompress(state, max_output_size=MAX_STATE_BYTES)
                    for symbol, state in states.items()
                },
            )
    return None


async def load_newest(log: Log, tps: Iterable[TP]) -> dict[TP, Restored | None]:
    """Read the newest complete snapshot of each partition of state; None where there is none."""
    found: dict[TP, Restored | None] = {}
    begins = await log.begin_offsets(tps)
    ends = await log.end_offsets(tps)
    windows = dict.fromkeys(begins, FIRST_WINDOW)
    while windows:
        starts = {tp: max(begins[tp], ends[tp] - window) for tp, window in windows.items()}
        records = await read_ranges(log, {tp: (start, ends[tp]) for tp, start in starts.items()})
        for tp, start in starts.items():
            got = newest(records[tp])
            if isinstance(got, Restored):
                found[tp] = got
            elif start == begins[tp]:
                found[tp] = None
            else:
                windows[tp] = max(windows[tp] * 4, ends[tp] - got if got is not None else 0)
                continue
            del windows[tp]
    return found


def check_fingerprint(commit: Commit, fingerprint: str, code_version: str, tp: TP, *, rebuild: bool) -> bool:
    """Whether a snapshot may be used; False: start anew.

    Raises
    ------
    LogError
        It was made under other settings, and no rebuild was asked for.
    """
    if commit.fingerprint == fingerprint and commit.code_version == code_version:
        return True
    if rebuild:
        return False
    if commit.code_version != code_version:
        raise LogError(
            f"{tp.topic}[{tp.partition}]: the newest snapshot was made by version {commit.code_version} of the code, and "
            f"this is {code_version}: run that one, choose another TOPIC_PREFIX, or set STATE_REBUILD=true to compute "
            "the state anew from the oldest retained input"
        )
    raise LogError(
        f"{tp.topic}[{tp.partition}]: the newest snapshot was made under the settings {commit.fingerprint[:12]}, and "
        f"these are {fingerprint[:12]}: restore the old settings, choose another TOPIC_PREFIX, or set "
        "STATE_REBUILD=true to compute the state anew from the oldest retained input"
    )


def _header(record: LogRecord, name: str) -> str | None:
    for key, value in record.headers:
        if key == name:
            return value.decode()
    return None
