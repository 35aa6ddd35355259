"""The recorder for sockets: the exchange, or the simulated one, which differs by its addresses alone.

One socket a route. What arrives goes to the journal verbatim with its receive time; what is lost is journalled as a gap.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import random
import secrets
import time
from collections import deque
from collections.abc import Sequence
from typing import Any, Final

import msgspec
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed, InvalidHandshake, InvalidURI

from orderflow.config import IngestionConfig
from orderflow.ingest.capture_source import NOBODYS_PARTITION, STREAM_KEYS, TickBook, ending
from orderflow.ingest.rest import RestClient
from orderflow.processor import Record
from orderflow.streaming.codec import Codecs
from orderflow.streaming.journal import partition_of
from orderflow.streaming.log import TP, Log
from orderflow.streaming.recorder import JournalWriter, Tail, journal_record
from orderflow.topics import EVENTS
from orderflow.venues.binance.frames import route_of

logger = logging.getLogger(__name__)

ROUTES: Final = {"public": ("bookTicker", "depth@100ms"), "market": ("aggTrade",)}
NAMES_PER_MESSAGE: Final = 200
MESSAGE_SPACING_SEC: Final = 0.25
"""Under the limit of ten messages a second that a connection may send."""
MAX_FRAME_BYTES: Final = 8 << 20
ANSWERS: Final = {"snapshot": "snapshot_needed", "backfill": "backfill_needed"}
SERVER_TIME_SEC: Final = 60.0
WATCH_SEC: Final = 0.5
STABLE_SEC: Final = 60.0
ROTATE_SEC: Final = 23 * 3600.0
OVERLAP_SEC: Final = 30.0
DROP_FACTOR: Final = 2
"""Diffs and trades are dropped, and journalled as a gap, only beyond so many times the queue's bound."""


def backoff_sec(attempt: int, first_sec: float, most_sec: float, draw: float) -> float:
    """Exponential backoff with full jitter: uniform over (0, min(most, first * 2^attempt)]; `draw` in [0, 1)."""
    return (1.0 - draw) * min(most_sec, first_sec * 2.0 ** min(attempt, 30))


async def cancel_all(tasks: Sequence[asyncio.Task[Any]]) -> None:
    """Cancel until all have ended: a single cancellation can be lost where it meets a completed wait."""
    pending = {task for task in tasks if not task.done()}
    while pending:
        for task in pending:
            task.cancel()
        _, pending = await asyncio.wait(pending, timeout=1.0)


class WebsocketRecorder:
    """Sockets, REST answers and ticks into the journal."""

    def __init__(self, journal: JournalWriter, config: IngestionConfig, log: Log, codecs: Codecs, prefix: str) -> None:
        self._journal = journal
        self._config = config
        self._log = log
        self._codecs = codecs
        self._prefix = prefix
        self._symbols = tuple(symbol for symbol in sorted(config.symbols) if partition_of(symbol) in journal.seq)
        self._home = {symbol: partition_of(symbol) for symbol in self._symbols}
        self._book = TickBook(self._symbols)
        self._rest = RestClient(config.rest_url, config.weight_per_minute)
        self._pending: deque[tuple[int, Record]] = deque()
        self._newest_quote: dict[str, Record] = {}
        self._wake = asyncio.Event()
        self._space = asyncio.Event()
        self._space.set()
        self._over = asyncio.Event()
        self._stopping = False
        self._ending = False
        self._routes = dict.fromkeys(ROUTES, "down")
        self._had_data: set[str] = set()
        self._lost: dict[tuple[str, str], int] = {}
        self._busy: set[tuple[str, str]] = set()
        self._answered: dict[tuple[str, str], int] = {}
        """Per symbol and kind of request: seq of our newest answer; what was asked before it needs none."""
        self._position = -1
        self._last_frame_at = dict.fromkeys(ROUTES, 0.0)
        self.session = ""
        self.ready = False
        self.done = False
        self.frames_by_route = dict.fromkeys(ROUTES, 0)
        self.reconnects = 0
        self.conflated = 0
        self.dropped = 0
        self.subscribe_errors = 0

    # -- life -----------------------------------------------------------------------------------------------------

    def stop(self) -> None:
        """End without `end`: the session goes on when the recorder comes back."""
        self._stopping = True
        self._over.set()

    def drain(self) -> None:
        """Close the sockets and journal `end`."""
        self._ending = True
        self._over.set()

    async def run(self) -> None:
        """Until `stop` or `drain`.

        Raises
        ------
        FencedError, LogError
            Another recorder took over; the broker stayed away beyond its patience.
        """
        await self._open_journal()
        await self._rest.open()
        pump = asyncio.create_task(self._pump())
        tasks = [
            asyncio.create_task(self._ticks()),
            asyncio.create_task(self._serve_requests()),
            asyncio.create_task(self._server_time()),
            *(asyncio.create_task(self._route(route)) for route in ROUTES),
        ]
        self.ready = True
        over = asyncio.create_task(self._over.wait())
        try:
            done, _ = await asyncio.wait([pump, over, *tasks], return_when=asyncio.FIRST_COMPLETED)
            for task in done - {over}:
                task.result()
        finally:
            await cancel_all([*tasks, over])
            await self._rest.close()
        if self._ending and not self._stopping:
            for partition, record in ending(sorted(self._journal.seq), time.time_ns(), self._position, "drained"):
                self._pending.append((partition, record))
        self._wake.set()
        self._pump_until_empty = True
        await pump
        await self._journal.flush()
        if self._ending and not self._stopping:
            self.done = True

    _pump_until_empty = False

    async def _open_journal(self) -> None:
        settings = msgspec.json.encode([self._config.source, self._symbols, self._config.tick_ms])
        identity = f"{self._config.source}-{hashlib.sha256(settings).hexdigest()[:12]}"
        before = await self._journal.tails()
        going_on = next(
            (
                tail.session
                for tail in before.values()
                if tail.seq and tail.kind != "end" and tail.session.startswith(identity + "-")
            ),
            None,
        )
        self.session = going_on or f"{identity}-{secrets.token_hex(4)}"
        now_ns = time.time_ns()
        tails = await self._journal.open(self.session, now_ns)
        self._position = max(tail.source_position for tail in tails.values())
        for partition, tail in sorted(tails.items()):
            self._enter(partition, tail, now_ns)

    def _enter(self, partition: int, tail: Tail, now_ns: int) -> None:
        if tail.seq and tail.session == self.session:
            record = journal_record("gap", now_ns, payload=msgspec.json.encode({"reason": "restart", "streams": []}))
        else:
            record = journal_record("config", now_ns, payload=self._session_payload())
        self._pending.append((partition, record))

    def _session_payload(self) -> bytes:
        return msgspec.json.encode(
            {
                "type": "session",
                "session": self.session,
                "source": self._config.source,
                "symbols": list(self._symbols),
                "tick_ms": self._config.tick_ms,
            }
        )

    # -- into the journal -----------------------------------------------------------------------------------------

    async def _pump(self) -> None:
        """Number what waits, in the order of its coming, and send it."""
        pending = self._pending
        while True:
            if not pending:
                if self._pump_until_empty:
                    return
                self._wake.clear()
                if not pending:
                    await self._wake.wait()
                continue
            stamp_ms = int(time.time() * 1000)
            for _ in range(min(len(pending), 1000)):
                partition, record = pending.popleft()
                symbol = record["symbol"]
                if symbol is not None and self._newest_quote.get(symbol) is record:
                    del self._newest_quote[symbol]
                seq = self._journal.append(partition, record, stamp_ms)
                if record["kind"] in ANSWERS and symbol is not None:
                    self._answered[symbol, ANSWERS[record["kind"]]] = seq
            if len(pending) < self._config.queue_frames // 2:
                self._space.set()
                self._tell_losses()
            await self._journal.ship()

    def _tell_losses(self) -> None:
        """What had to be dropped is journalled, exactly, as soon as there is room."""
        if not self._lost:
            return
        lost, self._lost = self._lost, {}
        for (symbol, stream), count in sorted(lost.items()):
            payload = {"reason": "dropped", "streams": [stream], "frames": count}
            record = journal_record("gap", time.time_ns(), symbol=symbol, payload=msgspec.json.encode(payload))
            self._pending.append((self._home[symbol], record))

    def _put(self, partition: int, record: Record) -> None:
        self._pending.append((partition, record))
        self._wake.set()

    async def _take(self, route: str, frame: bytes) -> None:
        """A frame has come."""
        recv_ts_ns = time.time_ns()
        symbol, stream, ts_ms = route_of(frame)
        if symbol is None and stream == "reply":
            return
        self.frames_by_route[route] += 1
        self._last_frame_at[route] = time.monotonic()
        self._position += 1
        if symbol is not None and ts_ms is not None and stream in STREAM_KEYS:
            self._book.note(symbol, stream, ts_ms)
            self._had_data.add(f"{route}:{stream}")
        record = journal_record(
            "frame", recv_ts_ns, route=route, symbol=symbol, source_position=self._position, payload=frame
        )
        partition = self._home.get(symbol, NOBODYS_PARTITION) if symbol is not None else NOBODYS_PARTITION
        if partition not in self._journal.seq:
            partition = min(self._journal.seq)
        if len(self._pending) < self._config.queue_frames:
            self._admit(partition, record, stream)
        elif self._config.source != "live":
            self._space.clear()
            await self._space.wait()
            self._admit(partition, record, stream)
        else:
            self._crowded(partition, record, stream)

    def _admit(self, partition: int, record: Record, stream: str) -> None:
        if stream == "bookTicker":
            self._newest_quote[record["symbol"]] = record
        self._put(partition, record)

    def _crowded(self, partition: int, record: Record, stream: str) -> None:
        """The queue is full and the exchange does not wait: quotes conflate, the rest goes on to a harder bound."""
        symbol = record["symbol"]
        waiting = self._newest_quote.get(symbol) if stream == "bookTicker" else None
        if waiting is not None:
            waiting.update(record)
            self.conflated += 1
        elif len(self._pending) < DROP_FACTOR * self._config.queue_frames:
            self._admit(partition, record, stream)
        else:
            self.dropped += 1
            if symbol in self._home:
                self._lost[symbol, stream] = self._lost.get((symbol, stream), 0) + 1

    # -- sockets --------------------------------------------------------------------------------------------------

    async def _route(self, route: str) -> None:
        """Keep one route connected."""
        attempt = 0
        while True:
            began = time.monotonic()
            try:
                await self._connected(route)
            except (ConnectionClosed, InvalidHandshake, InvalidURI, OSError, TimeoutError) as error:
                logger.warning("route %s: %s", route, error or type(error).__name__)
            finally:
                self._went_down(route)
            self.reconnects += 1
            attempt = 0 if time.monotonic() - began > STABLE_SEC else attempt + 1
            wait = backoff_sec(attempt, self._config.backoff_first_sec, self._config.backoff_most_sec, random.random())
            logger.info("route %s: connecting again in %.1f s", route, wait)
            await asyncio.sleep(wait)

    def _went_down(self, route: str) -> None:
        if self._routes[route] == "up":
            self._routes[route] = "down"
            if self._over.is_set():
                return  # closed by us: what comes next is `end`, or the gap of a restart
            payload = msgspec.json.encode({"reason": "disconnected", "route": route, "streams": list(ROUTES[route])})
            for partition in sorted(self._book.partitions):
                self._put(partition, journal_record("gap", time.time_ns(), route=route, payload=payload))

    async def _connected(self, route: str) -> None:
        """One connection, from the handshake to its end; rotates into the next one before the exchange cuts it."""
        url = f"{self._config.ws_url.rstrip('/')}/{route}/stream"
        async with connect(
            url,
            ping_interval=self._config.ping_interval_sec,
            ping_timeout=self._config.ping_interval_sec,
            max_size=MAX_FRAME_BYTES,
            max_queue=1024,
            open_timeout=10,
            close_timeout=2,
            compression=None,
        ) as socket:
            tasks = [
                asyncio.create_task(self._read(route, socket)),
                asyncio.create_task(self._watch_silence(route)),
                asyncio.create_task(self._subscribe(route, socket)),
            ]
            try:
                await self._until_one_fails(tasks)
            finally:
                await cancel_all(tasks)

    async def _until_one_fails(self, tasks: list[asyncio.Task[None]]) -> None:
        """Until a task raises, or the last one has ended; a subscription that is made ends early and well."""
        pending = set(tasks)
        while pending:
            done, pending = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()

    async def _subscribe(self, route: str, socket: ClientConnection) -> None:
        names = [f"{symbol.lower()}@{stream}" for stream in ROUTES[route] for symbol in self._symbols]
        for number, start in enumerate(range(0, len(names), NAMES_PER_MESSAGE), 1):
            await socket.send(
                json.dumps({"method": "SUBSCRIBE", "params": names[start : start + NAMES_PER_MESSAGE], "id": number})
            )
            await asyncio.sleep(MESSAGE_SPACING_SEC)

    async def _read(self, route: str, socket: ClientConnection) -> None:
        """Frames, until the socket ends."""
        while True:
            frame = await socket.recv(decode=False)
            if frame.startswith((b'{"result"', b'{"error"', b'{"id"')):
                self._reply(route, frame)
                continue
            self._routes[route] = "up"
            await self._take(route, frame)

    async def _watch_silence(self, route: str) -> None:
        """An acknowledged subscription proves nothing: end a connection on which no data comes.

        Raises
        ------
        TimeoutError
            Nothing came for as long as is allowed, before the first data or after.
        """
        opened = time.monotonic()
        while True:
            await asyncio.sleep(WATCH_SEC)
            last = self._last_frame_at[route]
            limit = self._config.silence_sec if last > opened else self._config.first_data_sec
            silent = time.monotonic() - max(last, opened)
            if silent > limit:
                raise TimeoutError(f"no data for {silent:.0f} s, allowed are {limit:g} s")

    def _reply(self, route: str, frame: bytes) -> None:
        try:
            content = msgspec.json.decode(frame)
        except msgspec.DecodeError:
            content = {}
        if isinstance(content, dict) and content.get("error"):
            self.subscribe_errors += 1
            logger.error("route %s: the exchange refused a subscription: %s", route, content["error"])

    # -- the clock, and what it asks ------------------------------------------------------------------------------

    async def _ticks(self) -> None:
        tick_ns = self._config.tick_ms * 1_000_000
        boundary = time.time_ns() // tick_ns
        while True:
            await asyncio.sleep(max(0.001, ((boundary + 1) * tick_ns - time.time_ns()) / 1e9))
            now = time.time_ns()
            if now // tick_ns <= boundary:
                continue
            boundary = now // tick_ns
            if len(self._pending) >= DROP_FACTOR * self._config.queue_frames:
                continue
            for partition in sorted(self._book.partitions):
                payload = self._book.payload(partition, self.session, dict(sorted(self._routes.items())))
                self._put(partition, journal_record("tick", now, source_position=self._position, payload=payload))

    async def _server_time(self) -> None:
        """Exchange rules once, then the exchange's clock every minute."""
        info = await self._rest.exchange_info()
        if info is not None:
            self._put(min(self._journal.seq), self._answer("exchange_info", None, self._stripped(info)))
        while True:
            body = await self._rest.server_time()
            if body is not None:
                for partition in sorted(self._book.partitions)[:1]:
                    self._put(partition, self._answer("server_time", None, body))
            await asyncio.sleep(SERVER_TIME_SEC)

    def _stripped(self, info: bytes) -> bytes:
        """The rules of our symbols alone: the whole answer of the exchange is larger than a batch."""
        try:
            content = msgspec.json.decode(info)
            content["symbols"] = [each for each in content["symbols"] if each.get("symbol") in self._home]
        except (msgspec.DecodeError, KeyError, TypeError, AttributeError):
            return b"{}"
        return msgspec.json.encode(content)

    def _answer(self, kind: str, symbol: str | None, body: bytes) -> Record:
        return journal_record(
            kind, time.time_ns(), route="rest", symbol=symbol, source_position=self._position, payload=body
        )

    async def _serve_requests(self) -> None:
        """Act on what the normaliser asks for, as long as it is fresh."""
        tps = [TP(self._prefix + EVENTS, partition) for partition in sorted(self._journal.seq)]
        reader = await self._log.reader(await self._log.end_offsets(tps))
        decode = self._codecs.decoder(EVENTS)
        working: set[asyncio.Task[None]] = set()
        try:
            while True:
                for records in (await reader.poll(200, 1000)).values():
                    for record in records:
                        if record.value is None:
                            continue
                        event = decode(record.value)
                        if event["event_type"] not in ("snapshot_needed", "backfill_needed"):
                            continue
                        key = (event["symbol"], event["event_type"])
                        if event["seq"] <= self._answered.get(key, 0):
                            continue
                        if key in self._busy or event["symbol"] not in self._home:
                            continue
                        self._busy.add(key)
                        task = asyncio.create_task(self._fetch(event, key))
                        working.add(task)
                        task.add_done_callback(working.discard)
        finally:
            for task in working:
                task.cancel()
            await reader.close()

    async def _fetch(self, event: Record, key: tuple[str, str]) -> None:
        symbol = event["symbol"]
        try:
            if event["event_type"] == "snapshot_needed":
                body = await self._rest.depth(symbol, self._config.snapshot_limit)
                kind = "snapshot"
            else:
                wanted = msgspec.json.decode(event["meta_json"])
                body = await self._rest.agg_trades(
                    symbol, int(wanted["from_id"]), int(wanted["to_id"]) - int(wanted["from_id"]) + 1
                )
                kind = "backfill"
            if body is not None:
                self._put(self._home[symbol], self._answer(kind, symbol, body))
        finally:
            self._busy.discard(key)

    def status(self) -> dict[str, Any]:
        """For `/status`."""
        return {
            "source": self._config.source,
            "session": self.session,
            "epoch": self._journal.epoch,
            "frames_by_route": dict(self.frames_by_route),
            "routes": dict(self._routes),
            "journal_records": self._journal.records,
            "seqs": {str(partition): seq for partition, seq in self._journal.seq.items()},
            "queue_depth": len(self._pending),
            "reconnects": self.reconnects,
            "conflated": self.conflated,
            "dropped": self.dropped,
            "rest_requests": self._rest.requests,
            "rest_errors": dict(sorted(self._rest.errors.items())),
            "subscribe_errors": self.subscribe_errors,
            "done": self.done,
        }
