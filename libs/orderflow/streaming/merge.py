"""Merging the inputs of one partition in the order `(seq, rank of the input, sub)`. Pure.

An input's promise ("nothing more at or below seq p") comes from its records, which rise strictly, and from progress
markers. A record leaves as soon as every other input has promised that nothing smaller can come.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import Final

from orderflow.streaming.log import LogRecord

RANK_BITS: Final = 5
"""Room for 32 inputs in the low bits of a merge key."""


@dataclass(slots=True)
class Input:
    """One input of a merge: what was taken, what waits, what is promised."""

    topic: str
    rank: int
    single: bool = False
    """One record a seq at most, as in the journal: a record then is a promise for its own seq too."""
    next_offset: int = 0
    """Offset behind the newest record pushed (markers and duplicates included)."""
    last_seq: int = -1
    last_sub: int = -1
    """The newest (seq, sub) pushed: what is not above it is a duplicate."""
    progress: int = -1
    """Nothing more at or below this seq will come."""
    taken_seq: int = -1
    taken_sub: int = -1
    """The newest (seq, sub) released."""
    duplicates: int = 0
    record_bytes: int = 1
    """What a record of the newest read takes, on average; for whoever bounds what waits."""
    waiting: deque[tuple[int, int, LogRecord | None]] = field(default_factory=deque)
    """(seq, sub, record), in order; None where the record is of no use here and only its place matters."""

    def push(self, seq: int, sub: int, record: LogRecord | None) -> bool:
        """Add a record; False for a duplicate."""
        if seq < self.last_seq or (seq == self.last_seq and sub <= self.last_sub):
            self.duplicates += 1
            return False
        self.last_seq = seq
        self.last_sub = sub
        self.waiting.append((seq, sub, record))
        return True

    def mark(self, progress: int) -> None:
        """Take a progress marker; an older one (a zombie's, a restarted writer's) changes nothing."""
        if progress > self.progress:
            self.progress = progress

    @property
    def promised(self) -> int:
        """Largest s such that nothing at or below s can still arrive."""
        return max(self.progress, self.last_seq if self.single else self.last_seq - 1)

    @property
    def frontier(self) -> int:
        """Largest s such that everything at or below s has been released."""
        return self.waiting[0][0] - 1 if self.waiting else self.promised

    @property
    def resumable(self) -> int:
        """What a restart at `oldest_offset` may take as promised.

        Places of filtered records need no second look. Where nothing else waits reading goes on behind the newest
        promise, which would never be read again.
        """
        for seq, _, record in self.waiting:
            if record is not None:
                return seq - 1
        return self.promised

    @property
    def oldest_offset(self) -> int:
        """Offset of the oldest record not yet released; where a restart has to begin reading."""
        for _, _, record in self.waiting:
            if record is not None:
                return record.offset
        return self.next_offset


class Merger:
    """The merge of one partition's inputs."""

    def __init__(self, topics: tuple[str, ...], single: frozenset[str] = frozenset()) -> None:
        """`topics` by rank; `single` names those with one record a seq at most."""
        self.inputs = [Input(topic, rank, topic in single) for rank, topic in enumerate(topics)]

    def run(self, limit: int) -> list[tuple[Input, int, int, LogRecord]]:
        """Release at most about `limit` records that are due, in order."""
        inputs = self.inputs
        released: list[tuple[Input, int, int, LogRecord]] = []
        while len(released) < limit:
            best: Input | None = None
            best_key = bound = 1 << 100
            for each in inputs:
                if each.waiting:
                    key = (each.waiting[0][0] << RANK_BITS) | each.rank
                    if key < best_key:
                        if best is not None and best_key < bound:
                            bound = best_key
                        best, best_key = each, key
                        continue
                else:
                    key = ((each.promised + 1) << RANK_BITS) | each.rank
                if key < bound:
                    bound = key
            if best is None or best_key >= bound:
                break
            waiting = best.waiting
            newest = (bound - 1 - best.rank) >> RANK_BITS  # of this input, what lies below the bound
            room = limit - len(released)
            seq, sub = best.taken_seq, best.taken_sub
            while room and waiting and waiting[0][0] <= newest:
                seq, sub, record = waiting.popleft()
                if record is not None:
                    released.append((best, seq, sub, record))
                    room -= 1
            best.taken_seq, best.taken_sub = seq, sub
        return released

    @property
    def frontier(self) -> int:
        """Largest s such that everything at or below s, of every input, has been released."""
        return min(each.frontier for each in self.inputs)

    @property
    def buffered(self) -> int:
        return sum(len(each.waiting) for each in self.inputs)
