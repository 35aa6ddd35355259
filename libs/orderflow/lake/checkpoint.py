"""`state/checkpoint.json`: how far each partition of the lake is committed, for people and for `orderflow lake`.

Recovery does not read it (the log's own state topic decides), so it never runs ahead of what is durable. Several
processes may own partitions of one lake: an update takes a lock, reads, merges its own entry, and renames.
"""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Final

import msgspec

from orderflow.lake import files
from orderflow.lake.layout import CHECKPOINT, LakeError

LOCK_NAME: Final = ".checkpoint.lock"


class PartitionCheckpoint(msgspec.Struct, frozen=True, kw_only=True):
    """Where a partition stands after its newest committed cut.

    `clock_ts_ns` is the clock of the newest tick in the cut, nanoseconds since the epoch; `inputs` the next offset to
    read of each topic.
    """

    session: str
    last_seq: int
    clock_ts_ns: int
    inputs: dict[str, int]


def read(root: Path) -> dict[int, PartitionCheckpoint]:
    """Every partition's entry, in the order of partitions; empty where nothing has been committed.

    Raises
    ------
    LakeError
        The file is damaged.
    """
    path = root / CHECKPOINT
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise LakeError(f"{path} can't be read: {error.strerror}; let the user of this process read it") from error
    try:
        entries = msgspec.json.decode(content, type=dict[int, PartitionCheckpoint])
    except msgspec.DecodeError as error:
        raise LakeError(
            f"{path} is damaged: {error}; remove it: the services write it anew at their next cut and lose nothing"
        ) from error
    return dict(sorted(entries.items()))


def advance(
    root: Path,
    partition: int,
    *,
    session: str,
    last_seq: int,
    clock_ts_ns: int,
    inputs: Mapping[str, int],
    failed: Callable[[OSError], None] = lambda error: None,
) -> bool:
    """Put a partition's entry in; False where the file already stands further in the same session and is left so.

    The arguments are the fields of `PartitionCheckpoint`; `failed` is told of every failed attempt to write. Blocks for
    as long as another process holds the lock, which is one small write.

    Raises
    ------
    LakeError
        The file can't be written, or is damaged.
    """
    entry = PartitionCheckpoint(
        session=session, last_seq=last_seq, clock_ts_ns=clock_ts_ns, inputs=dict(sorted(inputs.items()))
    )
    folder = (root / CHECKPOINT).parent
    try:
        files.make_folders(folder)
        descriptor = os.open(folder / LOCK_NAME, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    except OSError as error:
        failed(error)
        raise LakeError(
            f"{folder / LOCK_NAME} can't be made: {error.strerror}; let the service's user write to {folder}"
        ) from error
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        entries = read(root)
        current = entries.get(partition)
        if current is not None and current.session == entry.session and current.last_seq > entry.last_seq:
            return False
        entries[partition] = entry
        _write(root / CHECKPOINT, entries, failed)
        return True
    finally:
        os.close(descriptor)


def _write(path: Path, entries: Mapping[int, PartitionCheckpoint], failed: Callable[[OSError], None]) -> None:
    ordered = {str(partition): entries[partition] for partition in sorted(entries)}
    data = msgspec.json.format(msgspec.json.encode(ordered), indent=2) + b"\n"

    def check(temp: Path) -> None:
        if temp.read_bytes() != data:
            raise OSError(errno.EIO, "it does not read back as it was written")

    files.sweep_folder(path.parent)
    files.write_file(path, memoryview(data), check, failed)
    files.sync_folders([path.parent])
