"""The journal's canonical view and the arithmetic of who goes where."""

from __future__ import annotations

from typing import Any, Final

import msgspec
from aiokafka.partitioner import murmur2

from orderflow.errors import LogError
from orderflow.streaming.log import LogRecord
from orderflow.topics import PARTITIONS

EPOCH_HEADER: Final = "epoch"
OPEN_KIND: Final = 0
"""Index of `open` in the enum of journal kinds."""


def partition_of(symbol: str, partitions: int = PARTITIONS) -> int:
    """Partition of a symbol: Java-compatible murmur2 of its UTF-8, as Kafka's own default partitioner has it."""
    number: int = (murmur2(symbol.encode()) & 0x7FFFFFFF) % partitions
    return number


def epoch_of(record: LogRecord) -> int:
    """The epoch in a journal record's headers; 0 where it has none."""
    for name, value in record.headers:
        if name == EPOCH_HEADER:
            return int(value)
    return 0


class JournalView:
    """The rule that every reader of the journal keeps: newest epoch only, numbers without gaps. Pure."""

    __slots__ = ("duplicates", "epoch", "last_seq", "stale")

    def __init__(self, epoch: int = 0, last_seq: int | None = None) -> None:
        self.epoch = epoch
        self.last_seq = last_seq
        self.stale = 0
        """Records dropped because a newer recorder had opened the journal."""
        self.duplicates = 0

    def admit(self, record: LogRecord, seq: int, kind: int) -> bool:
        """Whether a physical record belongs to the view.

        Raises
        ------
        LogError
            A number is missing: the journal was cut or damaged.
        """
        epoch = epoch_of(record)
        if epoch < self.epoch:
            self.stale += 1
            return False
        self.epoch = epoch
        if kind == OPEN_KIND:
            return False
        if self.last_seq is None or seq == self.last_seq + 1:
            self.last_seq = seq
            return True
        if seq <= self.last_seq:
            self.duplicates += 1
            return False
        raise LogError(
            f"the journal has a hole: seq {seq} at offset {record.offset} follows {self.last_seq}; "
            "the topic was cut or damaged, or everything in it had expired: restore it, replay from the lake, or begin "
            "anew under another TOPIC_PREFIX"
        )


def session_of(payload: bytes | str | None) -> dict[str, Any] | None:
    """The session that a `config` payload begins; None where it is another change of configuration."""
    if not payload:
        return None
    try:
        content = msgspec.json.decode(payload)
    except msgspec.DecodeError:
        return None
    if isinstance(content, dict) and content.get("type") == "session" and isinstance(content.get("session"), str):
        return content
    return None
