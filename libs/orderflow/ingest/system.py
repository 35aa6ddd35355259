"""The real outside of ingestion: this machine's clock, websockets, aiohttp, chance from the operating system."""

from __future__ import annotations

import asyncio
import logging
import random
import time
from typing import Final

import aiohttp
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed, WebSocketException
from yarl import URL

from orderflow.ingest.seams import Answer, Outside, SocketClosed

logger = logging.getLogger(__name__)

MAX_FRAME_BYTES: Final = 8 << 20
SOCKET_FRAMES: Final = 1024
"""Messages that a socket holds for its reader; beyond, the exchange's TCP connection is left to wait."""
OPEN_SEC: Final = 10.0
CLOSE_SEC: Final = 2.0
HTTP_SEC: Final = 10.0
NO_CLOSING_FRAME: Final = 1006


class SystemClock:
    """The machine's wall clock."""

    def time_ns(self) -> int:
        return time.time_ns()


class SystemSocket:
    """A websocket of the `websockets` library under the names of `Socket`."""

    __slots__ = ("_connection",)

    def __init__(self, connection: ClientConnection) -> None:
        self._connection = connection

    async def recv(self) -> bytes:
        try:
            return await self._connection.recv(decode=False)
        except ConnectionClosed as error:
            raise _closed(error) from error

    async def send(self, text: str) -> None:
        try:
            await self._connection.send(text)
        except ConnectionClosed as error:
            raise _closed(error) from error

    async def close(self) -> None:
        try:
            async with asyncio.timeout(2 * CLOSE_SEC):
                await self._connection.close()
        except (OSError, WebSocketException, asyncio.CancelledError) as error:
            self._connection.transport.abort()
            if isinstance(error, asyncio.CancelledError):
                raise
            logger.info("a websocket did not close in good order: %r", error)


class SystemConnector:
    """Opens websockets that ping every `ping_interval_sec`, and end where a pong stays away as long again."""

    def __init__(self, ping_interval_sec: float) -> None:
        self._ping_interval_sec = ping_interval_sec

    async def connect(self, url: str) -> SystemSocket:
        try:
            connection = await connect(
                url,
                ping_interval=self._ping_interval_sec,
                ping_timeout=self._ping_interval_sec,
                max_size=MAX_FRAME_BYTES,
                max_queue=SOCKET_FRAMES,
                open_timeout=OPEN_SEC,
                close_timeout=CLOSE_SEC,
                compression=None,
            )
        except ConnectionClosed as error:
            raise _closed(error) from error
        except WebSocketException as error:
            raise ConnectionError(f"{url}: {error}") from error
        return SystemSocket(connection)


class SystemHttp:
    """GETs of aiohttp, over one session that is opened by the first of them."""

    def __init__(self) -> None:
        self._session: aiohttp.ClientSession | None = None

    async def get(self, url: str, most_bytes: int) -> Answer:
        if self._session is None:
            self._session = aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=HTTP_SEC))
        try:
            # The address is percent-encoded already; encoding it again would turn every % into %25.
            async with self._session.get(URL(url, encoded=True), allow_redirects=False) as answer:
                body = bytearray()
                async for piece in answer.content.iter_any():
                    body += piece
                    if len(body) > most_bytes:
                        raise ValueError(f"{url} answered more than {most_bytes} bytes")
                headers = {name.lower(): value for name, value in answer.headers.items()}
                return Answer(answer.status, headers, bytes(body))
        except aiohttp.ClientError as error:
            raise ConnectionError(f"{url}: {error!r}") from error

    async def close(self) -> None:
        session, self._session = self._session, None
        if session is not None:
            await session.close()


def system_outside(ping_interval_sec: float) -> Outside:
    """Everything from outside, for real."""
    return Outside(SystemClock(), SystemConnector(ping_interval_sec), SystemHttp(), random.SystemRandom())


def _closed(error: ConnectionClosed) -> SocketClosed:
    """The exchange's closing frame; ours where we ended it (1009 for an oversize message, 1011 for no pong)."""
    frame = error.rcvd or error.sent
    return SocketClosed(frame.code, frame.reason) if frame else SocketClosed(NO_CLOSING_FRAME, "")
