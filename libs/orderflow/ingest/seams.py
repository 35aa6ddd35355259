"""What ingestion asks of the outside world, so that the same code runs over real sockets and in simulated time.

Timers need no seam: they are the event loop's, and a loop of simulated time moves them. What is left is the wall clock,
sockets, HTTP and chance.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple, Protocol


class Clock(Protocol):
    """The machine's wall clock. It may jump, as clocks do."""

    def time_ns(self) -> int:
        """Nanoseconds since the epoch."""
        ...


class SocketClosed(ConnectionError):
    """A websocket has ended, in good order or not. `code` is 1006 where no closing frame came."""

    def __init__(self, code: int, reason: str) -> None:
        super().__init__(f"closed with {code} {reason}".rstrip())
        self.code = code
        self.reason = reason


class Socket(Protocol):
    """A connected websocket that answers pings, and ends itself where its own pings stay unanswered."""

    async def recv(self) -> bytes:
        """The next message.

        Raises
        ------
        SocketClosed
            There will be none; also for a message beyond the size that is accepted (1009).
        """
        ...

    async def send(self, text: str) -> None:
        """Send a text message. Raises `SocketClosed`."""
        ...

    async def close(self) -> None:
        """Close and forget, within a bounded time. Never raises."""
        ...


class Connector(Protocol):
    """Opens websockets."""

    async def connect(self, url: str) -> Socket:
        """
        Raises
        ------
        OSError
            No connection, no handshake (also `TimeoutError`, `SocketClosed`); the message says what came instead.
        """
        ...


class Answer(NamedTuple):
    """An HTTP answer; header names are lower case."""

    status: int
    headers: Mapping[str, str]
    body: bytes


class Http(Protocol):
    """GET requests."""

    async def get(self, url: str, most_bytes: int) -> Answer:
        """
        Raises
        ------
        OSError
            No answer, or none within the time allowed (also `TimeoutError`).
        ValueError
            The body is longer than `most_bytes`.
        """
        ...

    async def close(self) -> None: ...


@dataclass(frozen=True, slots=True)
class Outside:
    """Everything from outside that ingestion over sockets uses."""

    clock: Clock
    connector: Connector
    http: Http
    chance: random.Random
    """For jitter and for the names of sessions; seeded in simulations."""
