"""A hash chain over each topic partition: a cheap proof, day by day, that what was verified is still what is there.

The canonical view of a topic partition is cut into blocks of journal numbers. A block's digest covers seq, key and Avro
body of each record; the chain links each digest to all before it. A block is closed once something behind it has come
(a record or a progress marker), so that its digest is final. Schema ids, offsets, timestamps and repeats do not count.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import msgspec

from orderflow.errors import OrderflowError
from orderflow.streaming.codec import PREFIX_BYTES
from orderflow.streaming.log import TP, Log
from orderflow.streaming.seek import BEYOND
from orderflow.topics import JOURNAL, PARTITIONS

BLOCK_SEQS: Final = 10_000
"""Journal numbers in a block."""
Where = tuple[str, int]
"""(topic, partition)."""


class Mark(msgspec.Struct, frozen=True):
    """One closed block: seqs `block * BLOCK_SEQS` up to the next multiple."""

    block: int
    records: int
    digest: str
    """sha256 of the block alone."""
    chain: str
    """sha256 of the chain before it and `digest`."""


class Tail(msgspec.Struct, frozen=True):
    """What has come of the block that is still open, up to a seq that nothing at or below will follow."""

    to_seq: int
    records: int
    digest: str


@dataclass(slots=True)
class Marks:
    """What is known of one topic partition."""

    blocks: list[Mark] = field(default_factory=list)
    tail: Tail | None = None

    @property
    def head(self) -> str:
        """One digest for everything up to the tail."""
        chain = self.blocks[-1].chain if self.blocks else ""
        return hashlib.sha256(f"{chain}{self.tail}".encode()).hexdigest()


@dataclass(frozen=True, slots=True)
class Difference:
    """The first block of a topic partition that is not what it was."""

    topic: str
    partition: int
    first_seq: int
    last_seq: int
    before: str
    now: str

    def __str__(self) -> str:
        place = f"--from seq:{self.partition}:{self.first_seq} --to seq:{self.partition}:{self.last_seq}"
        return (
            f"{self.topic}[{self.partition}] seq {self.first_seq} to {self.last_seq}: was {self.before}, is {self.now}; "
            f"`orderflow verify {place}` names the record"
        )


@dataclass(slots=True)
class Result:
    """What following the chains found."""

    marks: dict[Where, Marks] = field(default_factory=dict)
    heads: dict[Where, str] = field(default_factory=dict)
    """The newest chain value of each topic partition that has one."""
    records: int = 0
    compared: int = 0
    added: int = 0
    differences: list[Difference] = field(default_factory=list)


def head_of_all(result: Result) -> str:
    """One digest for all topic partitions: what to write down, or to compare between two machines."""
    digest = hashlib.sha256()
    for (topic, partition), head in sorted(result.heads.items()):
        digest.update(f"{topic}[{partition}] {head}\n".encode())
    return digest.hexdigest()


async def follow(log: Log, prefix: str, topics: Sequence[str], known: Mapping[Where, Marks]) -> Result:
    """Hash all that is retained, compare with the known marks, and go on from them.

    A block whose beginning retention has taken is passed over: its mark stays as it was.
    """
    result = Result()
    for topic in topics:
        for partition in range(PARTITIONS):
            where = (topic, partition)
            before = known.get(where, Marks())
            found = await _hash(log, TP(prefix + topic, partition), before.tail, result)
            marks = _link(where, before, found, result)
            if marks.blocks or marks.tail is not None:
                result.marks[where] = marks
                result.heads[where] = marks.head
    return result


@dataclass(slots=True)
class _Found:
    """What a topic partition holds now."""

    blocks: dict[int, tuple[int, str]] = field(default_factory=dict)
    """Of each whole, closed block: records and digest."""
    tail: Tail | None = None
    """Of the open block."""
    at_old_tail: Tail | None = None
    """The block of the tail of last time, as far as it went then."""


async def _hash(log: Log, tp: TP, old: Tail | None, result: Result) -> _Found:
    from orderflow.verify import canonical, frontiers

    begin = (await log.begin_offsets([tp]))[tp]
    journal = tp.topic.endswith(JOURNAL)
    # A record of the journal is all that there is of its seq; which one is the newest only the canonical view tells.
    closed_to = BEYOND if journal else (await frontiers(log, [tp]))[tp]
    newest = -1
    found = _Found()
    block, count, digest = 0, 0, hashlib.sha256()
    # Of the block in which retention has cut, a part is gone; an empty topic partition has whole blocks without records.
    whole_from = 0 if begin == 0 else -1

    def pass_old_tail(next_seq: int) -> None:
        if old is not None and found.at_old_tail is None and next_seq > old.to_seq:
            same = block == old.to_seq // BLOCK_SEQS
            if 0 <= whole_from <= old.to_seq // BLOCK_SEQS:
                found.at_old_tail = Tail(
                    old.to_seq, count if same else 0, (digest if same else hashlib.sha256()).hexdigest()
                )

    async for chunk in canonical(log, tp, journal=journal):
        for seq, sub, record in chunk:
            if seq > closed_to:
                break
            newest = seq
            number = seq // BLOCK_SEQS
            if whole_from < 0:
                whole_from = number + 1
            pass_old_tail(seq)
            if number != block:
                _close(found.blocks, range(block, number), whole_from, count, digest)
                block, count, digest = number, 0, hashlib.sha256()
            key, value = record.key or b"", record.value or b""
            digest.update(b"%d %d %d %d " % (seq, sub, len(key), len(value) - PREFIX_BYTES))
            digest.update(key)
            digest.update(memoryview(value)[PREFIX_BYTES:])
            count += 1
            result.records += 1
    if whole_from < 0:
        return found  # retention has taken every record, and what there was before the markers nobody knows
    closed_to = newest if journal else closed_to
    pass_old_tail(closed_to + 1)
    open_block = (closed_to + 1) // BLOCK_SEQS
    _close(found.blocks, range(block, open_block), whole_from, count, digest)
    if closed_to >= 0 and whole_from <= open_block:
        same = block == open_block
        found.tail = Tail(closed_to, count if same else 0, (digest if same else hashlib.sha256()).hexdigest())
    return found


def _close(
    blocks: dict[int, tuple[int, str]], numbers: range, whole_from: int, count: int, digest: hashlib._Hash
) -> None:
    """Close the block that was gathered and the empty ones behind it."""
    for number in numbers:
        gathered = number == numbers.start
        if number >= whole_from:
            blocks[number] = (count, digest.hexdigest()) if gathered else (0, hashlib.sha256().hexdigest())


def _link(where: Where, before: Marks, found: _Found, result: Result) -> Marks:
    """Compare with the marks of last time and add what is new behind them."""
    marks = Marks(list(before.blocks), found.tail or before.tail)
    differences: list[Difference] = []
    for mark in before.blocks:
        now = found.blocks.get(mark.block)
        if now is None:
            continue
        result.compared += 1
        if now != (mark.records, mark.digest):
            first = mark.block * BLOCK_SEQS
            said = _said(mark.records, mark.digest), _said(*now)
            differences.append(Difference(*where, first, first + BLOCK_SEQS - 1, *said))
    if before.tail is not None:
        differences += _tail_difference(where, before.tail, found)
        result.compared += 1
    result.differences += differences[:1]
    for number in sorted(found.blocks):
        if not marks.blocks or number > marks.blocks[-1].block:
            count, digest = found.blocks[number]
            earlier = marks.blocks[-1].chain if marks.blocks else ""
            marks.blocks.append(Mark(number, count, digest, _linked(earlier, number, digest)))
            result.added += 1
    return marks


def _tail_difference(where: Where, old: Tail, found: _Found) -> list[Difference]:
    first = old.to_seq // BLOCK_SEQS * BLOCK_SEQS
    if found.tail is not None and found.tail.to_seq < old.to_seq:
        now = f"an end at seq {found.tail.to_seq}"
    elif found.at_old_tail in (None, old):
        return []
    else:
        assert found.at_old_tail is not None
        now = _said(found.at_old_tail.records, found.at_old_tail.digest)
    return [Difference(*where, first, old.to_seq, _said(old.records, old.digest), now)]


def _linked(earlier: str, number: int, digest: str) -> str:
    return hashlib.sha256(f"{earlier}{number} {digest}".encode()).hexdigest()


def _said(records: int, digest: str) -> str:
    return f"{records} records {digest[:16]}"


class _Entry(msgspec.Struct):
    blocks: list[Mark]
    tail: Tail | None


class _File(msgspec.Struct):
    block_seqs: int
    marks: dict[str, _Entry]


def load(path: Path) -> dict[Where, Marks]:
    """The marks of last time; none where there is no file.

    Raises
    ------
    OrderflowError
        The file is damaged: its own chain does not hold.
    """
    try:
        content = msgspec.json.decode(path.read_bytes(), type=_File)
    except FileNotFoundError:
        return {}
    except (OSError, msgspec.MsgspecError) as error:
        raise OrderflowError(f"{path} can't be read: {error}; restore it, or remove it to begin a new chain") from error
    marks: dict[Where, Marks] = {}
    for name, entry in content.marks.items():
        topic, _, partition = name.rpartition("/")
        earlier = ""
        for mark in entry.blocks:
            earlier = _linked(earlier, mark.block, mark.digest)
            if earlier != mark.chain or content.block_seqs != BLOCK_SEQS:
                raise OrderflowError(
                    f"{path}: the chain of {topic}[{partition}] does not hold at block {mark.block}: the file was altered; "
                    "restore it, or remove it to begin a new chain"
                )
        marks[topic, int(partition)] = Marks(entry.blocks, entry.tail)
    return marks


def save(path: Path, result: Result) -> None:
    """Write the marks, atomically. Where something differs, the old ones stay: they say what was there."""
    if result.differences:
        return
    entries = {
        f"{topic}/{partition}": _Entry(marks.blocks, marks.tail)
        for (topic, partition), marks in sorted(result.marks.items())
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_bytes(msgspec.json.format(msgspec.json.encode(_File(BLOCK_SEQS, entries))))
    temporary.replace(path)
