"""A small exchange without sockets on a loop of virtual time, and a recorder on it: what the tests of ingestion share.

Frames follow from the time alone, so that all sockets see the same ids: frame n of a stream comes at n periods.
"""

from __future__ import annotations

import asyncio
import random
from collections import deque
from collections.abc import Callable
from typing import Any

import msgspec
from orderflow.config import IngestionConfig
from orderflow.ingest.seams import Answer, Outside, SocketClosed
from orderflow.ingest.websocket_recorder import WebsocketRecorder
from orderflow.processor import Record
from orderflow.streaming.codec import Codecs, peek, schema_text
from orderflow.streaming.journal import JournalView
from orderflow.streaming.log import TP, Log, read_ranges
from orderflow.streaming.memory_log import MemoryLog
from orderflow.streaming.recorder import JournalWriter
from orderflow.topics import COMMANDS, EVENTS, JOURNAL, PARTITIONS
from orderflow.venues.binance.streams import parse_stream

START_NS = 1_790_000_000_000_000_000
PERIOD_SEC = {"aggTrade": 0.5, "bookTicker": 0.2, "depth": 0.1, "markPrice": 1.0}
STEP_SEC = 0.05


async def no_other(number: int) -> str:
    raise AssertionError(number)


def make_codecs() -> Codecs:
    texts = {
        JOURNAL: schema_text("journal"),
        EVENTS: schema_text("market_event"),
        COMMANDS: schema_text("command"),
    }
    return Codecs({JOURNAL: 1, EVENTS: 2, COMMANDS: 3}, texts, no_other)


def loop_sec() -> float:
    return asyncio.get_running_loop().time()


def frame(stream: str, number: int) -> bytes:
    """Frame `number` of a stream."""
    name = parse_stream(stream)
    ts_ms = START_NS // 1_000_000 + int(number * PERIOD_SEC.get(name.kind, 1.0) * 1000)
    data: dict[str, Any] = {"e": name.kind, "E": ts_ms, "s": name.symbol, "T": ts_ms}
    if name.kind == "aggTrade":
        data |= {"a": number, "p": "100.0", "q": "1.0", "m": False}
    elif name.kind == "bookTicker":
        data |= {"u": number, "b": "100.0", "B": "1.0", "a": "100.1", "A": "1.0"}
    elif name.kind == "depth":
        data |= {"U": 10 * number - 9, "u": 10 * number, "pu": 10 * number - 10, "b": [], "a": []}
    return msgspec.json.encode({"stream": stream, "data": data})


class WallClock:
    """Loop time from `START_NS` on, with jumps."""

    def __init__(self) -> None:
        self.offset_ns = 0

    def time_ns(self) -> int:
        return START_NS + self.offset_ns + round(loop_sec() * 1e9)


class FakeSocket:
    """One connection; `lag_sec` is how far its frames are behind."""

    def __init__(self, exchange: Exchange, url: str, lag_sec: float) -> None:
        self.exchange = exchange
        self.route = url.split("/")[-2]
        self.lag_sec = lag_sec
        self.subscribed: dict[str, int] = {}
        self.sent: list[tuple[float, dict[str, Any]]] = []
        self.silent: Callable[[str], bool] = lambda stream: False
        self.closed: SocketClosed | None = None
        self._frames: deque[bytes] = deque()
        self._came = asyncio.Event()
        self._task = asyncio.create_task(self._deliver())

    async def _deliver(self) -> None:
        while True:
            await asyncio.sleep(STEP_SEC)
            due: list[tuple[float, bytes]] = []
            for stream, last in self.subscribed.items():
                period_sec = self.exchange.period_sec(stream)
                number = int((loop_sec() - self.lag_sec) / period_sec)
                for each in range(last + 1, number + 1):
                    if not self.silent(stream) and not self.exchange.silent(stream):
                        due.append((each * period_sec, frame(stream, each)))
                self.subscribed[stream] = max(last, number)
            for _, content in sorted(due):
                self.push(content)

    def push(self, content: bytes) -> None:
        self._frames.append(content)
        self._came.set()

    def cut(self, code: int = 1006) -> None:
        """The exchange ends the connection, once what is under way has been read."""
        self.closed = SocketClosed(code, "")
        self._task.cancel()
        self._came.set()

    async def recv(self) -> bytes:
        while not self._frames:
            if self.closed is not None:
                raise self.closed
            self._came.clear()
            await self._came.wait()
        return self._frames.popleft()

    async def send(self, text: str) -> None:
        if self.closed is not None:
            raise self.closed
        message = msgspec.json.decode(text)
        self.sent.append((loop_sec(), message))
        for name in message["params"]:
            if message["method"] == "UNSUBSCRIBE":
                self.subscribed.pop(name, None)
            else:
                number = int((loop_sec() - self.lag_sec) / self.exchange.period_sec(name))
                self.subscribed.setdefault(name, number)
        self.push(msgspec.json.encode({"result": None, "id": message["id"]}))

    async def close(self) -> None:
        self.closed = self.closed or SocketClosed(1000, "")
        self._task.cancel()


class Exchange:
    """Connector and HTTP in one."""

    def __init__(self, symbols: tuple[str, ...]) -> None:
        self.symbols = symbols
        self.sockets: list[FakeSocket] = []
        self.silent: Callable[[str], bool] = lambda stream: False
        self.slow: dict[str, float] = {}
        """Period of single streams."""
        self.refuse = 0
        """Connections still to be refused."""
        self.lags: list[float] = []
        """Lag of the sockets to come."""
        self.gets: list[tuple[float, str]] = []
        self.answers: dict[str, Callable[[str], Answer]] = {}
        """By path; they come before the usual answers."""
        self.round_trip_sec = 0.02

    def period_sec(self, stream: str) -> float:
        return self.slow.get(stream, PERIOD_SEC[parse_stream(stream).kind])

    async def connect(self, url: str) -> FakeSocket:
        await asyncio.sleep(0.05)
        if self.refuse > 0:
            self.refuse -= 1
            raise ConnectionError("refused")
        socket = FakeSocket(self, url, self.lags.pop(0) if self.lags else 0.0)
        self.sockets.append(socket)
        return socket

    def live(self, route: str) -> list[FakeSocket]:
        return [socket for socket in self.sockets if socket.route == route and socket.closed is None]

    async def get(self, url: str, most_bytes: int) -> Answer:
        self.gets.append((loop_sec(), url))
        await asyncio.sleep(self.round_trip_sec)
        path = url.partition("/fapi/v1")[2].partition("?")[0]
        if path in self.answers:
            return self.answers[path](url)
        content: Any = {}
        if path == "/exchangeInfo":
            content = {"symbols": [{"symbol": each, "status": "TRADING"} for each in self.symbols]}
        elif path == "/time":
            content = {"serverTime": (START_NS + int((loop_sec() - self.round_trip_sec / 2) * 1e9)) // 1_000_000}
        elif path == "/depth":
            content = {"lastUpdateId": int(loop_sec() / PERIOD_SEC["depth"]) * 10, "bids": [], "asks": []}
        elif path == "/aggTrades":
            content = []
        return Answer(200, {}, msgspec.json.encode(content))

    async def close(self) -> None:
        """Nothing is held."""

    def asked(self, path: str) -> int:
        return sum(f"/fapi/v1{path}" in url for _, url in self.gets)


class World:
    """An exchange, a log, and recorders on them."""

    def __init__(self, *symbols: str, log: Log | None = None, **settings: Any) -> None:
        self.exchange = Exchange(symbols)
        self.clock = WallClock()
        self.log = log or MemoryLog()
        self.codecs = make_codecs()
        values: dict[str, Any] = {"source": "live", "symbols": symbols, **settings}
        self.config = IngestionConfig(**values)
        self.recorder: WebsocketRecorder
        self.task: asyncio.Task[None]

    def start(self, seed: int = 1, partitions: range = range(PARTITIONS)) -> None:
        chance = random.Random(seed)
        outside = Outside(self.clock, self.exchange, self.exchange, chance)
        patience_sec = self.config.broker_patience_sec
        journal = JournalWriter(self.log, self.codecs, "", partitions, patience_sec, chance)
        self.recorder = WebsocketRecorder(journal, self.config, self.log, self.codecs, "", outside)
        self.task = asyncio.create_task(self.recorder.run())

    async def until_sec(self, at_sec: float) -> None:
        """Until that time, or the recorder's end."""
        await asyncio.wait([self.task], timeout=at_sec - loop_sec())

    async def stop(self, drain: bool = True) -> None:
        if drain:
            self.recorder.drain()
        else:
            self.recorder.stop()
        await self.task

    async def journal(self) -> list[Record]:
        """The canonical view of all partitions, partition by partition, each record with its `partition`."""
        decode = self.codecs.decoder(JOURNAL)
        found: list[Record] = []
        for partition in range(PARTITIONS):
            tp = TP(JOURNAL, partition)
            end = (await self.log.end_offsets([tp]))[tp]
            view = JournalView()
            for record in (await read_ranges(self.log, {tp: (0, end)}))[tp]:
                assert record.value is not None
                seq, kind, _ = peek(record.value)
                if view.admit(record, seq, kind):
                    found.append({**decode(record.value), "partition": partition})
        return found

    async def ask(self, event_type: str, symbol: str, partition: int, seq: int, meta: str = "{}") -> None:
        """What the normaliser would say."""
        record = {
            "seq": seq,
            "sub": 0,
            "symbol": symbol,
            "event_type": event_type,
            "ts_ms": 1,
            "recv_ts_ms": 1,
            "meta_json": meta,
        }
        batch = self.log.batch()
        batch.append(symbol.encode(), self.codecs.encoder(EVENTS)(record), 1)
        await (await self.log.send(batch, TP(EVENTS, partition)))


async def command(log: Log, command_id: str, payload: str = "{}", apply_at_ns: int = 0, stamp_ms: int = 5) -> None:
    """An order on `control.commands`."""
    record = {"command_id": command_id, "origin": "test", "apply_at_ns": apply_at_ns, "payload": payload}
    batch = log.batch()
    batch.append(b"", make_codecs().encoder(COMMANDS)(record), stamp_ms)
    await (await log.send(batch, TP(COMMANDS, 0)))


def of_kind(records: list[Record], kind: str) -> list[Record]:
    return [record for record in records if record["kind"] == kind]


def gaps(records: list[Record], reason: str = "") -> list[dict[str, Any]]:
    """Payloads of gaps, with their symbol."""
    found = [{**msgspec.json.decode(each["payload"]), "symbol": each["symbol"]} for each in of_kind(records, "gap")]
    return [each for each in found if not reason or each["reason"] == reason]


def numbers(records: list[Record], stream: str) -> list[int]:
    """Numbers of the frames of a stream in the journal, in its order."""
    name = parse_stream(stream)
    key = {"aggTrade": "a", "bookTicker": "u", "depth": "u", "markPrice": "T"}[name.kind]
    found = []
    for record in of_kind(records, "frame"):
        content = msgspec.json.decode(record["payload"])
        if content.get("stream") == stream:
            found.append(content["data"][key] // (10 if name.kind == "depth" else 1))
    return found
