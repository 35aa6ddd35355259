"""The simulated exchange without sockets: a market, a network and the faults of both, on the time of the event loop.

It stands where websockets, HTTP and the wall clock stand (`orderflow.ingest.seams`). On a loop of simulated time ten
minutes pass in a second, and the same seed gives the same bytes at the same times.

What passes between the exchange and a client takes time, drawn by seed, and keeps its order within a connection.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from random import Random
from typing import Any, Final, NamedTuple
from urllib.parse import parse_qsl, urlsplit

from orderflow.ingest.seams import Answer, SocketClosed
from orderflow.venues.binance.sim.faults import FaultEngine, SocketOrder
from orderflow.venues.binance.sim.protocol import ControlSession, MessageRate
from orderflow.venues.binance.sim.rest import RestApi, WeightLimit
from orderflow.venues.binance.sim.source import Frame
from orderflow.venues.binance.sim.synthetic import SyntheticSource
from orderflow.venues.binance.streams import Route

STEP_MS: Final = 100
"""The exchange sends what has gathered so often."""
MESSAGE_MOST_BYTES: Final = 8 << 20
BUFFER_MOST_FRAMES: Final = 50_000
"""A client that has so much unread is cut."""
HTTP_SEC: Final = 10.0
ROUTES: Final[tuple[Route, ...]] = ("public", "market")
WS_PATHS: Final[dict[str, Route]] = {"/public/stream": "public", "/market/stream": "market", "/stream": "public"}
NO_CLOSING_FRAME: Final = 1006
GOING_AWAY: Final = 1001
POLICY: Final = 1008
TOO_BIG: Final = 1009
NO_PONG: Final = 1011
SOCKET_FRAMES: Final = 1024
"""With so many unread messages a client's library reads no further, and so no pong either."""
ADDRESS: Final = "127.0.0.1"


class VirtualClock:
    """A machine's wall clock: the exchange's time on the event loop, and as far off as the faults have it."""

    def __init__(self, exchange: VirtualExchange) -> None:
        self._exchange = exchange

    def time_ns(self) -> int:
        exchange = self._exchange
        shift_ms = exchange.faults.local_shift_ms(exchange.now_ms)
        return exchange.open_ms * 1_000_000 + exchange.since_open_ns + shift_ms * 1_000_000


class SteppedMarket(SyntheticSource):
    """The synthetic source, moved by hand instead of by the clock."""

    def advance(self, to_ms: int) -> list[Frame]:
        """Let the market move on, to a time since the epoch: its frames since the last call."""
        frames = self._market.advance(to_ms)
        self._remember(frames)
        return self._routed(frames)


class Network:
    """How long things are under way: a few milliseconds, now and then a few hundred."""

    def __init__(self, seed: int, path: str) -> None:
        """`path` names what goes this way: each has chance of its own, so that one does not move another's delays."""
        self._chance = Random(f"{seed}/network/{path}")

    def delay_sec(self) -> float:
        draw = self._chance.random()
        if draw < 0.005:
            return 0.05 + self._chance.random() * 0.35
        return 0.002 + self._chance.expovariate(200.0)


class _Lane:
    """One direction of a connection: what is put in comes out in its order, each after its delay."""

    __slots__ = ("_deliver", "_last_at", "_loop", "_queue")

    def __init__(self, deliver: Callable[[Any], None]) -> None:
        self._loop = asyncio.get_running_loop()
        self._deliver = deliver
        self._queue: deque[Any] = deque()
        self._last_at = 0.0

    def put(self, item: object, delay_sec: float) -> None:
        self._last_at = max(self._last_at, self._loop.time() + delay_sec)
        self._queue.append(item)
        # The timers of one lane may fire in any order where they are due at once; the queue keeps the order.
        self._loop.call_at(self._last_at, self._arrive)

    def _arrive(self) -> None:
        self._deliver(self._queue.popleft())


class Taken(NamedTuple):
    """A message that a client has taken from a socket."""

    at_sec: float
    connection: int
    route: Route
    frame: bytes


class VirtualSocket:
    """A connection, its both ends."""

    def __init__(
        self,
        exchange: VirtualExchange,
        number: int,
        route: Route,
        ping_interval_sec: float,
        taken: Callable[[Taken], None] | None,
    ) -> None:
        self.number = number
        self.route: Route = route
        self.session = ControlSession(combined=True)
        self.opened_at = exchange.loop.time()
        self.served = True
        """Whether the exchange still holds its end."""
        self.severed = False
        """Nothing arrives any more, either way, and neither end is told."""
        self._exchange = exchange
        self._loop = exchange.loop
        self._rate = MessageRate(self._loop.time())
        self.network = Network(exchange.seed, f"connection {number}")
        self._down = _Lane(self._arrived)
        self._up = _Lane(self._heard)
        self._inbox: deque[bytes] = deque()
        self._ended: SocketClosed | None = None
        self._waiter: asyncio.Future[None] | None = None
        self._ping_sec = ping_interval_sec
        self._taken = taken
        self._timer = self._loop.call_later(ping_interval_sec, self._ping)

    # The client's end

    async def recv(self) -> bytes:
        inbox = self._inbox
        while not inbox:
            if self._ended is not None:
                raise SocketClosed(self._ended.code, self._ended.reason)
            self._waiter = self._loop.create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        frame = inbox.popleft()
        if self._taken is not None:
            self._taken(Taken(self._loop.time(), self.number, self.route, frame))
        return frame

    async def send(self, text: str) -> None:
        if self._ended is not None:
            raise SocketClosed(self._ended.code, self._ended.reason)
        self._up.put(text, self.network.delay_sec())

    async def close(self) -> None:
        if self._ended is None:
            self._end(1000, "")
            self._up.put(None, self.network.delay_sec())
        if self.severed:
            # The exchange is not told; its own pings would find out. Nobody would see a difference.
            self._exchange.forget(self)
        self._inbox.clear()

    def vanish(self) -> None:
        """Nobody is there any more to read it, or to be told."""
        self._timer.cancel()
        self.severed = True
        self._inbox.clear()

    def _end(self, code: int, reason: str) -> None:
        """The client's end is over; what has arrived before can still be read."""
        if self._ended is None:
            self._ended = SocketClosed(code, reason)
            self._timer.cancel()
            self._wake()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def _arrived(self, item: list[bytes] | SocketClosed) -> None:
        if self._ended is not None or self.severed:
            return
        if isinstance(item, SocketClosed):
            self._end(item.code, item.reason)
            return
        for frame in item:
            if len(frame) > MESSAGE_MOST_BYTES:
                self._end(TOO_BIG, "message too big")
                self._up.put(None, self.network.delay_sec())
                return
            self._inbox.append(frame)
        if len(self._inbox) > BUFFER_MOST_FRAMES:
            self._exchange.cut(self, "slow")
        self._wake()

    def _ping(self) -> None:
        exchange = self._exchange
        answered = self.served and not self.severed and not exchange.faults.mutes_pong(exchange.now_ms, self.route)
        self._timer = self._loop.call_later(self._ping_sec, self._pong_due, answered)

    def _pong_due(self, answered: bool) -> None:
        if answered and len(self._inbox) < SOCKET_FRAMES:
            self._ping()
            return
        self._end(NO_PONG, "keepalive ping timeout")
        self._up.put(None, self.network.delay_sec())

    # The exchange's end

    def deliver(self, frames: list[bytes]) -> None:
        """Send messages to the client."""
        # Drawn for nothing too: what one stream lacks must not move the others in time.
        delay_sec = self.network.delay_sec()
        if frames and not self.severed:
            self._down.put(frames, delay_sec)

    def hang_up(self, code: int, reason: str) -> None:
        """End the connection; 1006: without a word, the client finds out at once."""
        self._down.put(SocketClosed(code, reason), self.network.delay_sec())

    @property
    def answers_pings(self) -> bool:
        return not self.severed and self._ended is None

    def _heard(self, text: str | None) -> None:
        if self.severed or not self.served:
            return
        if text is None:
            self._exchange.forget(self)
            return
        if not self._rate.take(self._loop.time()):
            self._exchange.close(self, POLICY, "Too many requests", "too_many_requests")
            return
        outcome = self.session.handle(text)
        self._exchange.resubscribe(self, outcome.added, outcome.removed)
        if outcome.reply is not None:
            self.deliver([outcome.reply.encode()])
        if outcome.close is not None:
            self._exchange.close(self, *outcome.close, "too_many_subscriptions")


class VirtualConnector:
    """Opens connections to the exchange for one client."""

    def __init__(
        self, exchange: VirtualExchange, ping_interval_sec: float, taken: Callable[[Taken], None] | None = None
    ) -> None:
        self._exchange = exchange
        self._ping_interval_sec = ping_interval_sec
        self._taken = taken
        self.sockets: list[VirtualSocket] = []

    async def connect(self, url: str) -> VirtualSocket:
        exchange = self._exchange
        parts = urlsplit(url)
        route = WS_PATHS.get(parts.path)
        exchange.attempts.append(exchange.loop.time())
        await asyncio.sleep(3 * exchange.network.delay_sec())
        if route is None:
            raise ConnectionError(f"{url}: server rejected WebSocket connection: HTTP 404")
        exchange.admit(route, url)
        socket = exchange.open(route, self._ping_interval_sec, self._taken)
        self.sockets.append(socket)
        return socket

    def vanish(self) -> None:
        """The client's process is gone: its connections are reset."""
        for socket in self.sockets:
            self._exchange.forget(socket)
            socket.vanish()
        self.sockets.clear()


class RestAnswered(NamedTuple):
    """A body that a client was given."""

    at_sec: float
    path: str
    symbol: str
    body: bytes


class VirtualHttp:
    """GETs of one client."""

    def __init__(self, exchange: VirtualExchange, taken: Callable[[RestAnswered], None] | None = None) -> None:
        self._exchange = exchange
        self._taken = taken
        self.gone = False

    async def get(self, url: str, most_bytes: int) -> Answer:
        exchange = self._exchange
        parts = urlsplit(url)
        query = dict(parse_qsl(parts.query))
        async with asyncio.timeout(HTTP_SEC):
            await asyncio.sleep(exchange.network.delay_sec())
            answer = await exchange.answer(parts.path, query)
            await asyncio.sleep(exchange.network.delay_sec())
        if len(answer.body) > most_bytes:
            raise ValueError(f"{url} answered more than {most_bytes} bytes")
        if self._taken is not None and answer.status == 200:
            self._taken(RestAnswered(exchange.loop.time(), parts.path, query.get("symbol", ""), answer.body))
        return answer

    async def close(self) -> None:
        """There is nothing to close."""


class VirtualExchange:
    """The exchange over one market. `run` lets time pass over it; clients come by connectors and HTTP.

    Parameters
    ----------
    seed
        Of the network's delays.
    open_ms
        Exchange time at the loop's present time, milliseconds since the epoch.
    witness
        Is given every frame of the market before any fault touches it.
    """

    def __init__(
        self,
        venue: SteppedMarket,
        faults: FaultEngine,
        seed: int,
        *,
        open_ms: int,
        step_ms: int = STEP_MS,
        witness: Callable[[list[Frame]], None] | None = None,
    ) -> None:
        self.loop = asyncio.get_running_loop()
        self.open_ms = open_ms
        self.venue = venue
        self.faults = faults
        self.seed = seed
        self.network = Network(seed, "requests")
        self.attempts: list[float] = []
        """When clients tried to connect, loop time."""
        self.closed: dict[str, int] = {}
        """Connections that the exchange ended, by reason."""
        self._opened_at = self.loop.time()
        self._step_sec = step_ms / 1000
        self._witness = witness
        self._sockets: list[VirtualSocket] = []
        self._subscribers: dict[Route, dict[str, list[VirtualSocket]]] = {"public": {}, "market": {}}
        self._numbers = 0
        self._rest = RestApi(venue, WeightLimit(clock=lambda: (open_ms + self.now_ms) / 1000), faults)

    @property
    def since_open_ns(self) -> int:
        return round((self.loop.time() - self._opened_at) * 1e9)

    @property
    def now_ms(self) -> int:
        """Milliseconds since it opened."""
        return int((self.loop.time() - self._opened_at) * 1000 + 1e-6)

    async def run(self) -> None:
        """Publish what the market does, a step at a time, until cancelled."""
        step = 0
        while True:
            step += 1
            await asyncio.sleep(max(0.0, self._opened_at + step * self._step_sec - self.loop.time()))
            self._publish()

    def _publish(self) -> None:
        now_ms = self.now_ms
        frames = self.venue.advance(self.open_ms + now_ms)
        if self._witness is not None:
            self._witness(frames)
        if not self.faults.idle:
            self._rest.keep_books(now_ms)
            for order in self.faults.sockets(now_ms):
                self._obey(now_ms, order)
            frames = self.faults.frames(now_ms, frames)
        gathered: dict[VirtualSocket, list[bytes]] = {socket: [] for socket in self._sockets}
        subscribers = self._subscribers
        for frame in frames:
            for socket in subscribers[frame.route].get(frame.stream, ()):
                gathered[socket].append(frame.payload)
        for socket, payloads in gathered.items():
            if socket.served:
                socket.deliver(payloads)

    def _obey(self, now_ms: int, order: SocketOrder) -> None:
        for route in ROUTES:
            if order.route not in ("", route):
                continue
            sockets = [socket for socket in self._sockets if socket.route == route]
            for socket in sockets:
                self._strike(socket, order)
            self.faults.acted(now_ms, order, route, len(sockets))

    def _strike(self, socket: VirtualSocket, order: SocketOrder) -> None:
        if order.kind == "half_open":
            socket.severed = True
        elif order.kind == "close_1006":
            self.cut(socket, "fault")
        elif order.kind == "close_1008":
            self.close(socket, POLICY, "Invalid request", "fault")
        elif order.kind == "life_cut":
            self.close(socket, GOING_AWAY, "Connection lifetime reached", "lifetime")
        elif order.kind == "server_ping":
            there_and_back = 2 * self.network.delay_sec()
            if not socket.answers_pings or there_and_back * 1000 > order.value:
                self.loop.call_later(order.value / 1000, self.cut, socket, "no_pong")

    # Connections

    def admit(self, route: Route, url: str) -> None:
        """Raises ConnectionError where the faults have it that no connection is made."""
        status = self.faults.refusal(self.now_ms, route)
        if status is None:
            return
        if status == 0:
            raise ConnectionResetError(f"{url}: connection reset by peer")
        raise ConnectionError(f"{url}: server rejected WebSocket connection: HTTP {status}")

    def open(
        self, route: Route, ping_interval_sec: float, taken: Callable[[Taken], None] | None = None
    ) -> VirtualSocket:
        """A new connection."""
        self._numbers += 1
        socket = VirtualSocket(self, self._numbers, route, ping_interval_sec, taken)
        socket.severed = self.faults.deaf(self.now_ms, route)
        self._sockets.append(socket)
        return socket

    def resubscribe(self, socket: VirtualSocket, added: Sequence[str], removed: Sequence[str]) -> None:
        """Change what a connection gets. Streams of the other route are taken, and stay silent."""
        streams = self._subscribers[socket.route]
        for stream in added:
            streams.setdefault(stream, []).append(socket)
        for stream in removed:
            streams[stream].remove(socket)
        if added:
            self.faults.subscribed(self.now_ms, socket.route, added)

    def forget(self, socket: VirtualSocket) -> None:
        """The exchange's end of a connection is over."""
        if not socket.served:
            return
        socket.served = False
        self._sockets.remove(socket)
        for stream in socket.session.streams:
            self._subscribers[socket.route][stream].remove(socket)

    def close(self, socket: VirtualSocket, code: int, text: str, reason: str) -> None:
        """End a connection with a closing frame."""
        if socket.served:
            self.closed[reason] = self.closed.get(reason, 0) + 1
            self.forget(socket)
            socket.hang_up(code, text)

    def cut(self, socket: VirtualSocket, reason: str) -> None:
        """End a connection without a closing frame."""
        self.close(socket, NO_CLOSING_FRAME, "", reason)

    # REST

    async def answer(self, path: str, query: dict[str, str]) -> Answer:
        """What a GET gives, faults included.

        Raises
        ------
        ConnectionError
            No answer comes.
        """
        reply = await self._rest.answer(path, query, ADDRESS, self.now_ms)
        if reply is None:
            raise ConnectionResetError(f"{path}: connection reset by peer")
        return Answer(reply.status, {name.lower(): value for name, value in reply.headers.items()}, reply.body)
