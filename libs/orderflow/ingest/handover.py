"""Hands the streams of one socket over to a newer one, frame by frame: nothing twice, nothing between, never mixed. Pure.

Two connections are not in step. Were both journalled as they come, a diff that is ahead would break the chain of a book,
and quotes that are behind would count as old. So what the newer socket sends is held, as far as the older one has not
sent the same; and once the newer one has shown what it delivers, each stream is its own from the moment at which the
older one has come to where the newer one began.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from typing import Final, NamedTuple

from orderflow.ingest.ids import place_of
from orderflow.ingest.watch import StreamKey
from orderflow.venues.binance.frames import FrameRoute

HOLD_SEC: Final = 5.0
"""How long the older socket may take to come to where the newer one began."""
MAX_HELD: Final = 20_000
NONE: Final = -1
"""Less than any id."""


class Taken(NamedTuple):
    """A frame as a socket delivered it."""

    frame: bytes
    found: FrameRoute
    recv_ts_ns: int


class Handover:
    """From an older socket to a newer one. Damaged frames are the older one's as long as it lives.

    "Id" is the frame's place in its stream: its newest id, or its event time where the stream has no ids.
    """

    def __init__(self) -> None:
        self._reached: dict[StreamKey, int] = {}
        """Newest id of the older socket, per stream."""
        self._start: dict[StreamKey, int] = {}
        """First id of the newer socket from which on nothing of it is lost: journalled, or held."""
        self._held: dict[StreamKey, deque[tuple[int, Taken]]] = {}
        """What the newer socket has sent beyond that id of the older one."""
        self._floor: dict[StreamKey, int] = {}
        """Streams handed over: the newest id that the journal held then."""
        self._written: dict[StreamKey, int] = {}
        """Newest id of the newer socket that was journalled."""
        self._missed: list[StreamKey] = []
        self._begun_sec: float | None = None
        self._older_ended = False
        self.held = 0
        self.duplicates = 0

    @property
    def begun(self) -> bool:
        """Whether streams are handed over yet."""
        return self._begun_sec is not None

    def begin(self, now_sec: float) -> Iterator[Taken]:
        """The newer socket has shown that it delivers: what is to be journalled now."""
        self._begun_sec = now_sec
        for key in list(self._start):
            if self._covered(key):
                yield from self._hand(key)

    def older(self, taken: Taken) -> Iterator[Taken]:
        """A frame of the older socket: what is to be journalled now."""
        key, last_id = _identify(taken)
        if key is None or last_id == NONE:
            yield taken
            return
        reached = self._reached[key] = max(self._reached.get(key, NONE), last_id)
        if key in self._floor:
            self.duplicates += 1
            return
        yield taken
        self._trim(key, reached)
        if self.begun and self._covered(key):
            yield from self._hand(key)

    def newer(self, taken: Taken) -> Iterator[Taken]:
        """A frame of the newer socket: what is to be journalled now."""
        key, last_id = _identify(taken)
        if key is None or last_id == NONE:
            if self._older_ended:
                yield taken
            else:
                self.duplicates += 1
        elif key in self._floor:
            yield from self._of_newer(key, last_id, taken)
        else:
            self._hold(key, last_id, taken)
            if self._older_ended or (self.begun and self._covered(key)):
                yield from self._hand(key)

    def expired(self, now_sec: float) -> Iterator[Taken]:
        """Once the older socket has had its time: what it does not deliver is the newer one's."""
        if self._begun_sec is not None and now_sec - self._begun_sec >= HOLD_SEC:
            yield from self._hand_all()

    @property
    def complete(self) -> bool:
        """Whether the older socket is not needed any more."""
        return self.begun and not self._held

    def older_ended(self) -> Iterator[Taken]:
        """All streams are the newer socket's from here on. It goes on passing its frames through `newer`."""
        self._older_ended = True
        yield from self._hand_all()

    def missed(self) -> list[StreamKey]:
        """Streams handed over before the older socket had come to where the newer one begins; told once."""
        missed, self._missed = self._missed, []
        return sorted(missed)

    def heard(self) -> frozenset[StreamKey]:
        """Streams that the newer socket has spoken on."""
        return frozenset(self._start)

    def missed_with_newer(self) -> list[StreamKey]:
        """Streams handed over of which the older socket has delivered, in vain, more than the newer one."""
        return sorted(
            key for key, floor in self._floor.items() if self._reached.get(key, NONE) > self._written.get(key, floor)
        )

    def _covered(self, key: StreamKey) -> bool:
        return self._reached.get(key, NONE) >= self._start.get(key, NONE)

    def _hold(self, key: StreamKey, last_id: int, taken: Taken) -> None:
        self._start.setdefault(key, last_id)
        if last_id <= self._reached.get(key, NONE):
            self.duplicates += 1
            return
        self._held.setdefault(key, deque()).append((last_id, taken))
        self.held += 1
        if self.held > MAX_HELD and not self.begun:
            # The oldest of this stream goes; the stream is whole again from the one behind it.
            held = self._held[key]
            held.popleft()
            self.held -= 1
            self._start[key] = held[0][0] if held else last_id + 1
            if not held:
                del self._held[key]

    def _trim(self, key: StreamKey, reached: int) -> None:
        held = self._held.get(key)
        if held is None:
            return
        while held and held[0][0] <= reached:
            held.popleft()
            self.held -= 1
            self.duplicates += 1
        if not held:
            del self._held[key]

    def _hand_all(self) -> Iterator[Taken]:
        for key in list({**self._reached, **self._start}):
            if key not in self._floor:
                if not self._covered(key):
                    self._missed.append(key)
                yield from self._hand(key)

    def _hand(self, key: StreamKey) -> Iterator[Taken]:
        self._floor[key] = self._reached.get(key, NONE)
        held = self._held.pop(key, ())
        self.held -= len(held)
        for last_id, taken in held:
            yield from self._of_newer(key, last_id, taken)

    def _of_newer(self, key: StreamKey, last_id: int, taken: Taken) -> Iterator[Taken]:
        if last_id > self._floor[key]:
            self._written[key] = last_id
            yield taken
        else:
            self.duplicates += 1


def _identify(taken: Taken) -> tuple[StreamKey | None, int]:
    """Stream and place of a frame; `NONE` where it is damaged."""
    symbol, kind, _ = taken.found
    if symbol is None:
        return None, NONE
    place = place_of(kind, taken.frame)
    return (symbol, kind), NONE if place is None else place
