"""Writing files so that they are whole or absent, whatever dies in between.

A file is written under a temporary name in its own folder, flushed to the disk, read back and renamed. The writer holds
a lock on the temporary file; one whose lock is free was left by a writer that is dead, and may be removed.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import shutil
import time
import uuid
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Final, TypeVar

from orderflow.lake.layout import LakeError
from orderflow.streaming import crash

logger = logging.getLogger(__name__)

T = TypeVar("T")

TEMP_PREFIX: Final = ".orderflow-tmp-"
TEMP_SUFFIX: Final = ".part"
RETRY_DELAYS_SEC: Final = (0.1, 0.4, 1.6)
SWEPT_DATES: Final = 3
"""How many of the newest dates are searched for what dead writers left; a lake of years is not walked at each start."""


class LakeWriteError(LakeError):
    """A file could not be written beyond the retries. Nothing half-written is left; the log still holds the data."""


def write_all(descriptor: int, data: memoryview) -> None:
    """Write all of `data`. The one place where bytes go to a disk."""
    while data:
        data = data[os.write(descriptor, data) :]


def write_file(
    path: Path,
    data: memoryview,
    check: Callable[[Path], None],
    failed: Callable[[OSError], None] = lambda error: None,
    delays_sec: Iterable[float] = RETRY_DELAYS_SEC,
) -> None:
    """Put `data` under `path`: wholly there on return, absent (or as it was) on failure.

    The folder's own entry is not flushed: see `sync_folders`. `check` reads the temporary file back and raises OSError
    where it is not what it should be; `failed` is told of every failed attempt.

    Raises
    ------
    LakeWriteError
        Every attempt failed.
    """
    persist(path, f"{len(data)} bytes", lambda: _attempt(path, data, check), failed, delays_sec)


def persist(
    path: Path,
    what: str,
    attempt: Callable[[], T],
    failed: Callable[[OSError], None] = lambda error: None,
    delays_sec: Iterable[float] = RETRY_DELAYS_SEC,
) -> T:
    """What `attempt` returns, tried again after each delay; `what`, of the data for `path`, is named in the error.

    Raises
    ------
    LakeWriteError
        Every attempt raised OSError.
    """
    delays = iter(delays_sec)
    while True:
        try:
            return attempt()
        except OSError as error:
            failed(error)
            delay = next(delays, None)
            if delay is None:
                raise _write_error(path, what, error) from error
            logger.warning("writing %s failed, next attempt in %.1f s: %s", path, delay, error)
            time.sleep(delay)


def _attempt(path: Path, data: memoryview, check: Callable[[Path], None]) -> None:
    make_folders(path.parent)
    temp = path.parent / f"{TEMP_PREFIX}{uuid.uuid4().hex[:16]}-{path.name}{TEMP_SUFFIX}"
    descriptor = os.open(temp, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        write_all(descriptor, data)
        os.fsync(descriptor)
        size = temp.stat().st_size
        if size != len(data):
            raise OSError(errno.EIO, f"{size} bytes on disk where {len(data)} were written")
        check(temp)
        crash.point("file-temporary")
        temp.rename(path)
        crash.point("file-renamed")
    except BaseException:
        temp.unlink(missing_ok=True)
        raise
    finally:
        os.close(descriptor)


def _write_error(path: Path, what: str, error: OSError) -> LakeWriteError:
    try:
        free = f"{shutil.disk_usage(_existing(path.parent)).free} bytes are free"
    except OSError as cause:
        free = f"free space unknown ({cause.strerror})"
    remedy = {
        errno.ENOSPC: "free some space or move the lake (DATA_DIR)",
        errno.EDQUOT: "raise the quota or move the lake (DATA_DIR)",
        errno.EACCES: "let the service's user write there",
        errno.EPERM: "let the service's user write there",
        errno.EROFS: "mount it writable or move the lake (DATA_DIR)",
        errno.EBUSY: "end the transaction, or the program, that holds its lock",
    }.get(error.errno or 0, "see to the disk")
    return LakeWriteError(
        f"{path} ({what}) can't be written: {error.strerror or error}; {free}; {remedy}: "
        "the log keeps the data and writing goes on from there"
    )


def _existing(folder: Path) -> Path:
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    return folder


def make_folders(folder: Path) -> None:
    """Make a folder and what is missing above it, each durable in its parent."""
    if folder.is_dir():
        return
    make_folders(folder.parent)
    folder.mkdir(exist_ok=True)
    sync_folders([folder.parent])


def sync_folders(folders: Iterable[Path]) -> None:
    """Flush the entries of folders (what was renamed into them) to the disk."""
    for folder in folders:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def sweep_folder(folder: Path) -> int:
    """Remove what dead writers left in a folder; returns how many files."""
    removed = 0
    try:
        with os.scandir(folder) as entries:
            stale = [entry.path for entry in entries if entry.name.startswith(TEMP_PREFIX)]
    except OSError:
        return 0
    for path in stale:
        removed += _remove_if_dead(path)
    return removed


def _remove_if_dead(path: str) -> bool:
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return False  # renamed or removed meanwhile, or another user's
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        Path(path).unlink(missing_ok=True)
        logger.info("removed %s, left by a writer that died", path)
        return True
    except OSError:
        return False  # its writer lives
    finally:
        os.close(descriptor)


def first_file(tree: Path, wanted: Callable[[str], bool]) -> Path | None:
    """The first file below a folder, in the order of paths, whose name is wanted; None where there is none.

    Raises
    ------
    LakeError
        A folder can't be read.
    """

    def failed(error: OSError) -> None:
        if not isinstance(error, FileNotFoundError):
            raise LakeError(
                f"{error.filename} can't be read: {error.strerror}; let the service's user read it"
            ) from error

    for folder, folders, names in os.walk(tree, onerror=failed):
        folders.sort()
        for name in sorted(names):
            if wanted(name):
                return Path(folder, name)
    return None


def sweep(tree: Path) -> int:
    """Remove what dead writers left under the newest dates of a tree of `date=` folders; returns how many files."""
    try:
        dates = sorted(entry for entry in tree.iterdir() if entry.name.startswith("date="))
    except OSError:
        return 0  # not there yet; where it can't be read, writing will say so
    removed = 0
    for date in dates[-SWEPT_DATES:]:
        for folder, _, names in os.walk(date):
            if any(name.startswith(TEMP_PREFIX) for name in names):
                removed += sweep_folder(Path(folder))
    return removed
