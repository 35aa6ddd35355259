"""The connected market sockets: who is subscribed to what, frames out in batches, pings, limits, faults."""

from __future__ import annotations

import asyncio
import logging
import socket
import time
from collections.abc import Callable, Coroutine, Iterable
from dataclasses import dataclass, field
from itertools import count
from typing import Any, Final

from aiohttp import WSMsgType, web

from orderflow.venues.binance.sim.faults import FaultEngine, SocketOrder
from orderflow.venues.binance.sim.protocol import CLOSE_POLICY, ControlSession, MessageRate, Outcome
from orderflow.venues.binance.sim.source import Frame
from orderflow.venues.binance.streams import Route

logger = logging.getLogger(__name__)

ROUTES: Final[tuple[Route, ...]] = ("public", "market")
DRAIN_ABOVE_BYTES: Final = 256 * 1024
DRAIN_POLL_SEC: Final = 0.001
SEND_BUFFER_BYTES: Final = 256 * 1024
"""Of the kernel: without it a socket swallows megabytes, and playback would be far ahead of its reader."""
SETTLE_PING_SEC: Final = 5.0
CLOSE_GOING_AWAY: Final = 1001
_DATA_MARK: Final = b'"data":'
_TEXT_FIN: Final = b"\x81"


@dataclass(frozen=True, slots=True)
class SocketRules:
    """Binance's connection rules; shorter in tests."""

    ping_sec: float = 180.0
    pong_within_sec: float = 600.0
    life_sec: float = 86_400.0
    stall_sec: float = 120.0
    """A client that takes nothing for so long, while frames wait for it, is cut."""
    buffer_most_bytes: int = 64 << 20
    """A client that has this much unread, where the market does not wait for it, is cut."""
    clients_most: int = 256


@dataclass(slots=True)
class HubCounts:
    """Everything that was sent or not sent, with its reason."""

    sent: dict[str, int] = field(default_factory=lambda: dict.fromkeys(ROUTES, 0))
    skipped: dict[str, int] = field(default_factory=lambda: dict.fromkeys(ROUTES, 0))
    """Frames whose stream nobody had subscribed."""
    deaf: int = 0
    """Frames that half-open sockets did not get."""
    closed: dict[str, int] = field(default_factory=dict)
    """Connections that the server ended, by reason."""
    control_errors: int = 0
    connected: int = 0

    def count_closed(self, reason: str) -> None:
        self.closed[reason] = self.closed.get(reason, 0) + 1


class Client:
    """One socket."""

    def __init__(
        self, socket_: web.WebSocketResponse, transport: asyncio.Transport, route: Route, combined: bool, now: float
    ) -> None:
        self.socket = socket_
        self.transport = transport
        self.route: Route = route
        self.session = ControlSession(combined)
        self.rate = MessageRate(now)
        self.pending: list[bytes] = []
        self.since = now
        self.pinged_at = now
        self.unanswered_at: float | None = None
        self.deaf = False
        self.pongs: dict[bytes, asyncio.Future[None]] = {}

    def flush(self) -> None:
        """Hand what is pending to the transport as one write: frames are small and many."""
        if not self.pending:
            return
        if not self.transport.is_closing():
            self.transport.write(b"".join(self.pending))
        self.pending.clear()

    def deafen(self, now: float) -> None:
        """Half open: the peer's packets no longer come through, nor ours. Only time ends it, for want of pongs."""
        self.deaf = True
        self.pending.clear()
        self.unanswered_at = now
        self.transport.pause_reading()

    async def ping_and_wait(self, payload: bytes, within_sec: float) -> bool:
        """Whether a pong came: then everything before the ping has been read from the socket."""
        self.flush()
        pong = self.pongs[payload] = asyncio.get_running_loop().create_future()
        try:
            await asyncio.wait_for(self._ping(payload, pong), within_sec)
        except (TimeoutError, ConnectionError):
            return False
        finally:
            self.pongs.pop(payload, None)
        return True

    async def _ping(self, payload: bytes, pong: asyncio.Future[None]) -> None:
        await self.socket.ping(payload)
        await pong

    def take_pong(self, payload: bytes) -> None:
        self.unanswered_at = None
        waiting = self.pongs.get(payload)
        if waiting is not None and not waiting.done():
            waiting.set_result(None)

    def forget(self) -> None:
        """The socket is gone: nobody waits for it any more."""
        for waiting in self.pongs.values():
            if not waiting.done():
                waiting.set_exception(ConnectionResetError("the socket was closed"))


class Hub:
    """Routes frames to subscribed sockets and keeps Binance's connection rules."""

    def __init__(
        self,
        rules: SocketRules | None = None,
        engine: FaultEngine | None = None,
        elapsed_ms: Callable[[], int] = lambda: 0,
    ) -> None:
        """`elapsed_ms`: the engine's time, since the exchange opened."""
        self.rules = rules or SocketRules()
        self.engine = engine or FaultEngine()
        self._elapsed_ms = elapsed_ms
        self.counts = HubCounts()
        self.clients: set[Client] = set()
        self._subscribers: dict[Route, dict[str, list[Client]]] = {route: {} for route in ROUTES}
        self._changed = asyncio.Event()
        self._pings = count(1)
        self._closing: set[asyncio.Task[Any]] = set()

    # Publishing

    def publish(self, frames: Iterable[Frame]) -> None:
        """Send a batch in its order; each socket gets one write. No waiting: see `drain` and `cut_slow`."""
        if self.engine.idle:
            self._send(frames)
            return
        now_ms = self._elapsed_ms()
        self._send(self.engine.frames(now_ms, frames))
        for order in self.engine.sockets(now_ms):
            self._obey(order, now_ms)

    def publish_held(self) -> None:
        """The market is over: send what faults still hold back."""
        self._send(self.engine.flush())

    def _send(self, frames: Iterable[Frame]) -> None:
        touched: set[Client] = set()
        sent, skipped = self.counts.sent, self.counts.skipped
        for route, stream, payload, _ in frames:
            clients = self._subscribers[route].get(stream)
            if not clients:
                skipped[route] += 1
                continue
            sent[route] += 1
            wire = text_frame(payload)
            for client in clients:
                if client.deaf:
                    self.counts.deaf += 1
                    continue
                client.pending.append(wire if client.session.combined else text_frame(unwrapped(payload)))
                touched.add(client)
        for client in touched:
            client.flush()

    async def drain(self) -> None:
        """Wait until every socket has taken most of what was written: the sockets alone set the pace."""
        for client in tuple(self.clients):
            if client.transport.get_write_buffer_size() > DRAIN_ABOVE_BYTES:
                await self._drain_one(client)

    async def _drain_one(self, client: Client) -> None:
        waiting = client.transport.get_write_buffer_size()
        moved_at = time.monotonic()
        while client in self.clients and not client.transport.is_closing():
            await asyncio.sleep(DRAIN_POLL_SEC)
            left = client.transport.get_write_buffer_size()
            if left <= DRAIN_ABOVE_BYTES:
                return
            now = time.monotonic()
            if left < waiting:
                waiting, moved_at = left, now
            elif now - moved_at > self.rules.stall_sec:
                self.cut(client, "stalled")
                return

    def cut_slow(self) -> None:
        """End connections that lag too far behind a market that does not wait."""
        for client in tuple(self.clients):
            if client.transport.get_write_buffer_size() > self.rules.buffer_most_bytes:
                self.cut(client, "slow")

    async def settle(self, quiet_sec: float) -> bool:
        """Wait until every socket has read all that was sent, and a little longer; whether all of them confirmed it.

        A ping behind the data comes back once the data before it has been read.
        """
        clients = tuple(client for client in self.clients if not client.deaf)
        payloads = [str(time.time_ns() // 1_000_000).encode() + b"-%d" % next(self._pings) for _ in clients]
        answers = await asyncio.gather(
            *(client.ping_and_wait(payload, SETTLE_PING_SEC) for client, payload in zip(clients, payloads, strict=True))
        )
        await asyncio.sleep(quiet_sec)
        return all(answers)

    # Subscriptions

    def subscribed(self, route: Route, stream: str) -> bool:
        return bool(self._subscribers[route].get(stream))

    @property
    def subscriptions(self) -> int:
        return sum(len(client.session.streams) for client in self.clients)

    async def wait_until(self, condition: Callable[[], bool], within_sec: float | None) -> bool:
        """Wait until a condition on clients and subscriptions holds; whether it does."""
        deadline = None if within_sec is None else time.monotonic() + within_sec
        while not condition():
            self._changed.clear()
            left = None if deadline is None else deadline - time.monotonic()
            if left is not None and left <= 0:
                return False
            try:
                await asyncio.wait_for(self._changed.wait(), left)
            except TimeoutError:
                return condition()
        return True

    def _apply(self, client: Client, outcome: Outcome) -> None:
        subscribers = self._subscribers[client.route]
        for stream in outcome.added:
            subscribers.setdefault(stream, []).append(client)
        for stream in outcome.removed:
            self._leave(client, stream)
        if outcome.added and not self.engine.idle:
            self.engine.subscribed(self._elapsed_ms(), client.route, outcome.added)
        if outcome.added or outcome.removed:
            self._changed.set()

    def _leave(self, client: Client, stream: str) -> None:
        subscribers = self._subscribers[client.route]
        clients = subscribers.get(stream, [])
        if client in clients:
            clients.remove(client)
        if not clients:
            subscribers.pop(stream, None)

    # Connections

    async def serve(self, request: web.Request, route: Route, combined: bool, names: list[str]) -> web.StreamResponse:
        """Hold one websocket until it ends."""
        refusal = None if self.engine.idle else self.engine.refusal(self._elapsed_ms(), route)
        if refusal is not None:
            return self._refuse(request, refusal)
        if len(self.clients) >= self.rules.clients_most:
            self.counts.count_closed("too_many_clients")
            raise web.HTTPServiceUnavailable(text="too many connections")
        # No compression, as on Binance; pongs are wanted here, so aiohttp must not swallow them.
        connection = web.WebSocketResponse(autoping=False, compress=False, max_msg_size=1 << 20)
        await connection.prepare(request)
        transport = request.transport
        if transport is None:
            return connection
        raw = transport.get_extra_info("socket")
        if raw is not None:
            raw.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER_BYTES)
        client = Client(connection, transport, route, combined, time.monotonic())
        self.clients.add(client)
        self.counts.connected += 1
        if not self.engine.idle and self.engine.deaf(self._elapsed_ms(), route):
            client.deafen(time.monotonic())
        self._changed.set()
        try:
            if names and not await self._answer(client, client.session.subscribe(names)):
                return connection
            await self._listen(client)
        except ConnectionError:
            pass
        finally:
            self._drop(client)
        return connection

    def _refuse(self, request: web.Request, status: int) -> web.StreamResponse:
        """refuse_connect: an answer that is no handshake, or none at all."""
        self.counts.count_closed("refused")
        if not status and request.transport is not None:
            request.transport.abort()
        return web.Response(status=status or 503, text="the simulated exchange refuses connections")

    async def _listen(self, client: Client) -> None:
        async for message in client.socket:
            if client.deaf:
                continue
            if message.type == WSMsgType.PONG:
                client.take_pong(bytes(message.data))
                continue
            if not client.rate.take(time.monotonic()):
                await self._close(client, 1008, "Too many requests", "too_many_requests")
                return
            if message.type == WSMsgType.PING:
                if self.engine.idle or not self.engine.mutes_pong(self._elapsed_ms(), client.route):
                    await client.socket.pong(message.data)
            elif message.type in (WSMsgType.TEXT, WSMsgType.BINARY):
                text = message.data if message.type == WSMsgType.TEXT else message.data.decode("utf-8", "replace")
                if not await self._answer(client, client.session.handle(text)):
                    return

    async def _answer(self, client: Client, outcome: Outcome) -> bool:
        """Act on a control message; whether the connection goes on."""
        self._apply(client, outcome)
        if outcome.reply is not None:
            await client.socket.send_str(outcome.reply)
        if outcome.close is None:
            return True
        code, reason = outcome.close
        await self._close(client, code, reason, "too_many_subscriptions")
        return False

    async def _close(self, client: Client, code: int, text: str, reason: str) -> None:
        self.counts.count_closed(reason)
        self._drop(client)
        await client.socket.close(code=code, message=text.encode())

    def cut(self, client: Client, reason: str) -> None:
        """End a connection that cannot be talked to, without a closing handshake."""
        logger.warning("cut a socket of /%s: %s", client.route, reason)
        self.counts.count_closed(reason)
        self._drop(client)
        client.transport.abort()

    def _drop(self, client: Client) -> None:
        if client not in self.clients:
            return
        self.clients.discard(client)
        for stream in client.session.streams:
            self._leave(client, stream)
        self.counts.control_errors += client.session.errors
        client.pending.clear()
        client.forget()
        self._changed.set()

    def _obey(self, order: SocketOrder, now_ms: int) -> None:
        """Do to the open connections what a fault wants."""
        for route in ROUTES:
            if order.route not in ("", route):
                continue
            clients = [client for client in self.clients if client.route == route and not client.deaf]
            self.engine.acted(now_ms, order, route, len(clients))
            for client in clients:
                self._obey_one(client, order)

    def _obey_one(self, client: Client, order: SocketOrder) -> None:
        if order.kind == "half_open":
            client.deafen(time.monotonic())
        elif order.kind == "close_1006":
            self.cut(client, "fault")
        elif order.kind == "close_1008":
            self._close_soon(client, CLOSE_POLICY, "Invalid request", "fault")
        elif order.kind == "life_cut":
            self._close_soon(client, CLOSE_GOING_AWAY, "Connection lifetime reached", "lifetime")
        else:
            self._finish_later(self._ping_or_cut(client, order.value / 1_000))

    async def _ping_or_cut(self, client: Client, within_sec: float) -> None:
        payload = str(time.time_ns() // 1_000_000).encode() + b"-%d" % next(self._pings)
        if not await client.ping_and_wait(payload, within_sec) and client in self.clients:
            self.cut(client, "no_pong")

    async def housekeeping(self) -> None:
        """Pings, missing pongs and the end of life; runs until cancelled."""
        rules = self.rules
        pause_sec = min(1.0, rules.ping_sec / 4, rules.pong_within_sec / 4, rules.life_sec / 4)
        while True:
            await asyncio.sleep(pause_sec)
            now = time.monotonic()
            for client in tuple(self.clients):
                if client.unanswered_at is not None and now - client.unanswered_at >= rules.pong_within_sec:
                    self.cut(client, "no_pong")
                elif client.deaf:
                    continue
                elif now - client.since >= rules.life_sec:
                    self._close_soon(client, CLOSE_GOING_AWAY, "Connection lifetime reached", "lifetime")
                elif now - client.pinged_at >= rules.ping_sec:
                    client.pinged_at = now
                    client.unanswered_at = client.unanswered_at or now
                    await self._ping(client)

    async def _ping(self, client: Client) -> None:
        try:
            # Bounded: a socket that takes nothing must not stop the pings of the others.
            await asyncio.wait_for(client.socket.ping(str(time.time_ns() // 1_000_000).encode()), 1.0)
        except (TimeoutError, ConnectionError):
            pass

    def _close_soon(self, client: Client, code: int, text: str, reason: str) -> None:
        self._finish_later(self._close(client, code, text, reason))

    def _finish_later(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._closing.add(task)
        task.add_done_callback(self._closing.discard)

    async def close_all(self, within_sec: float = 3.0) -> None:
        """End every connection with 1001; those that do not answer are aborted."""
        clients = tuple(self.clients)
        for client in clients:
            self._close_soon(client, CLOSE_GOING_AWAY, "Server shutdown", "shutdown")
        if self._closing:
            await asyncio.wait(tuple(self._closing), timeout=within_sec)
        for task in tuple(self._closing):
            task.cancel()
        for client in clients:
            if not client.transport.is_closing():
                client.transport.abort()


def text_frame(payload: bytes) -> bytes:
    """An unmasked, final websocket text frame (RFC 6455, 5.2)."""
    size = len(payload)
    if size < 126:
        return _TEXT_FIN + bytes((size,)) + payload
    if size < 65_536:
        return b"\x81\x7e" + size.to_bytes(2, "big") + payload
    return b"\x81\x7f" + size.to_bytes(8, "big") + payload


def unwrapped(payload: bytes) -> bytes:
    """`{"stream":"...","data":X}` -> X, byte for byte."""
    at = payload.find(_DATA_MARK)
    return payload[at + len(_DATA_MARK) : -1] if at >= 0 else payload
