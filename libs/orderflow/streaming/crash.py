"""Named places at which a process can be made to die, so that recovery is tested exactly there.

`ORDERFLOW_CRASH_POINT=name` or `name:count` is read once at the start: the process ends itself by SIGKILL when it comes
to that place for the `count`-th time. Unset, a place costs a comparison; none of them lies in the path of one record.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Mapping
from typing import Final

from orderflow.errors import ConfigError

ENVIRONMENT: Final = "ORDERFLOW_CRASH_POINT"
MARK: Final = "crash point reached: "
"""What the last line of a process that died so begins with."""

POINTS: Final[Mapping[str, str]] = {
    "recovering": "snapshots and the tails of outputs are read, no state is restored",
    "recovered": "state is restored, nothing is read",
    "rebalance": "partitions have changed hands, the old reader is closed",
    "polled": "records are read, none is processed",
    "stepped": "records are processed, what they gave is not handed over",
    "shipped": "batches are handed over, none need be acknowledged",
    "acknowledged": "a batch is acknowledged, nothing is committed",
    "snapshot-flushed": "outputs are durable, state is not written",
    "snapshot-half": "the parts of a snapshot are durable, its commit record is not written",
    "snapshot-written": "the snapshot is durable, offsets are not committed",
    "committed": "offsets are committed",
    "journal-opened": "a new epoch stands in the journal, nothing is numbered under it",
    "file-temporary": "a temporary file is whole and flushed, not renamed",
    "file-renamed": "a file has its name, its folder is not flushed",
    "rows-inserted": "the signals of a cut are in a transaction of the database, it is not committed",
    "rows-committed": "that transaction is durable, its log is not moved into the database's file",
    "cut-written": "every file of a cut is durable, the cut is not committed",
    "stopping": "the stop is asked for, the last snapshot is not made",
}
"""Name: what has been done there, and what has not."""


class _Armed:
    """The place at which this process is to die."""

    def __init__(self, name: str, count: int) -> None:
        self.name = name
        self.left = count

    def due(self, name: str) -> bool:
        if name != self.name:
            return False
        self.left -= 1
        return self.left == 0


_armed: _Armed | None = None


def arm(environment: Mapping[str, str]) -> None:
    """Read the place from the environment; none where it is unset or empty.

    Raises
    ------
    ConfigError
        It names no place, or its count is no whole number above 0.
    """
    global _armed
    text = environment.get(ENVIRONMENT, "")
    if not text:
        _armed = None
        return
    name, _, count = text.partition(":")
    if name not in POINTS or not (count or "1").isdecimal() or int(count or "1") < 1:
        raise ConfigError(
            f"{ENVIRONMENT} is {text!r}: it must be name or name:count, count above 0, name one of "
            f"{', '.join(sorted(POINTS))}; leave it unset outside of tests"
        )
    _armed = _Armed(name, int(count or "1"))


def due(name: str) -> bool:
    """Whether the process is to die here now, for places that have to prepare it; `die` follows."""
    return _armed is not None and _armed.due(name)


def point(name: str) -> None:
    """Die here if this is the place and the time."""
    if _armed is not None and _armed.due(name):
        die(name)


def die(name: str) -> None:
    """End this process at once, as the kernel's memory killer would."""
    sys.stderr.write(f"{MARK}{name}\n")
    sys.stderr.flush()
    os.kill(os.getpid(), signal.SIGKILL)
