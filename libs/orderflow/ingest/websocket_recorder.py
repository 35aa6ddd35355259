"""The recorder for sockets: the exchange, or the simulated one, which differs by its addresses alone.

What arrives goes to the journal verbatim with its receive time; what is lost is journalled as a gap. The parts: `route`
keeps the sockets, `queue` holds what waits for the journal, `requests` serves the normaliser, `clock` stamps.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
from collections.abc import Sequence
from typing import Any, Final

import msgspec

from orderflow.config import IngestionConfig
from orderflow.errors import ConfigError
from orderflow.ingest.capture_source import NOBODYS_PARTITION, STREAM_KEYS, TickBook, ending
from orderflow.ingest.clock import JournalClock
from orderflow.ingest.commands import Commands
from orderflow.ingest.queue import FrameQueue
from orderflow.ingest.requests import Requests
from orderflow.ingest.rest import RestClient
from orderflow.ingest.route import RouteKeeper, RouteSettings, cancel_all
from orderflow.ingest.seams import Outside
from orderflow.ingest.watch import StreamKey
from orderflow.processor import Record
from orderflow.streaming.codec import Codecs
from orderflow.streaming.journal import partition_of
from orderflow.streaming.log import Log
from orderflow.streaming.recorder import JournalWriter, Tail, journal_record
from orderflow.streaming.samples import RecentSamples
from orderflow.venues.binance.endpoints import Endpoints
from orderflow.venues.binance.frames import UNDECODABLE, FrameRoute, decode_server_time
from orderflow.venues.binance.streams import STREAMS_BY_ROUTE, Route, stream_name

logger = logging.getLogger(__name__)

MAX_FRAME_BYTES: Final = 1 << 20
"""Larger frames would fit no batch of the log; the exchange's largest have 100 kB."""
PUMP_RECORDS: Final = 1000
ANSWERS: Final = frozenset({"snapshot", "backfill"})
HEARTBEAT: Final = "markPrice@1s"
"""Every second on `/market`, where on a quiet day no trade may come for minutes."""
SERVER_TIME_SEC: Final = 60.0
SERVER_TIME_AGAIN_SEC: Final = 10.0
SERVER_TIME_LEAST_SEC: Final = 2.0
"""Between two questions, however often a clock jumps."""
SERVER_TIME_TRIES: Final = 3
GOOD_ROUND_TRIP_SEC: Final = 0.1
SLOW_ROUND_TRIP_SEC: Final = 0.2
"""Half of it is the uncertainty of the drift that is measured."""
IDLE_TICK_SEC: Final = 600.0
"""Ticks on partitions without a symbol, so that their numbers outlive the retention."""
LATE_TICK_SEC: Final = 1.0
DRAIN_SEC: Final = 0.2
AHEAD_NS: Final = 5_000_000_000
"""A journal that is further ahead of the clock than this is not gone on with."""
INFO_TRIES: Final = 2


class WebsocketRecorder:
    """Sockets, REST answers and ticks into the journal.

    Raises
    ------
    ConfigError
        A route has more streams than a connection takes.
    """

    def __init__(
        self,
        journal: JournalWriter,
        config: IngestionConfig,
        log: Log,
        codecs: Codecs,
        prefix: str,
        outside: Outside,
    ) -> None:
        self._journal = journal
        self._config = config
        self._outside = outside
        self._symbols = tuple(symbol for symbol in sorted(config.symbols) if partition_of(symbol) in journal.seq)
        self._home = {symbol: partition_of(symbol) for symbol in self._symbols}
        self._nobodys = NOBODYS_PARTITION if NOBODYS_PARTITION in journal.seq else min(journal.seq)
        self._book = TickBook(self._symbols)
        self._endpoints = Endpoints(ws_url=config.ws_url.rstrip("/"), rest_url=config.rest_url.rstrip("/"))
        shards = int(config.shard.partition("/")[2])
        self._rest = RestClient(
            outside.http, self._endpoints, config.weight_per_minute // shards, self._now_ns, outside.chance
        )
        self._ask_time = asyncio.Event()
        self._requests = Requests(
            log, codecs, prefix, self._home, self._rest, config.snapshot_limit, self._put_answer, self._ask_time.set
        )
        self._commands = Commands(log, codecs, prefix, tuple(journal.seq), self._put_command)
        policy = config.queue_policy
        self._blocking = policy == "block" or (policy == "auto" and config.source != "live")
        self._queue = FrameQueue(config.queue_frames, config.queue_mib << 20, self._blocking)
        self._wake = asyncio.Event()
        self._space = asyncio.Event()
        self._space.set()
        self._over = asyncio.Event()
        self._stopping = False
        self._ending = False
        self._pump_until_empty = False
        self._clock: JournalClock | None = None
        self._streams: dict[Route, tuple[str, ...]] = {
            route: (*streams, *(config.extra_streams if route == "market" else ()))
            for route, streams in STREAMS_BY_ROUTE.items()
        }
        self._routes: dict[Route, str] = dict.fromkeys(self._streams, "down")
        self._unlisted: list[str] = []
        self._keepers: dict[Route, RouteKeeper] = {}
        self._keep(self._symbols)  # refuses too many symbols before anything is opened
        self._position = -1
        self._stamp_ms = 0
        self._waited = True
        self.session = ""
        self.ready = False
        self.done = False
        self.frames_by_route: dict[Route, int] = dict.fromkeys(self._streams, 0)
        self.oversize = 0
        self.ticks_skipped = 0
        self.late_ticks = 0
        self._progress = (0.0, -1)
        """When the broker last acknowledged something, and how many records it had by then."""
        self.broker_waited_sec = 0.0
        self.broker_waited_most_sec = 0.0
        self.server_time_slow = 0
        self.drift_ms: float | None = None
        self.round_trip_ms: float | None = None
        self.waits_ms = RecentSamples()
        """From receipt to being handed to the journal, of the oldest record of each of the newest takes."""

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
        ConfigError
            The exchange does not list a symbol.
        FencedError, LogError
            Another recorder took over; the broker stayed away beyond its patience.
        """
        pump: asyncio.Task[None] | None = None
        try:
            await self._open()
            pump = asyncio.create_task(self._pump())
            self.ready = True
            await self._record(pump)
            self._finish()
            await pump
            await self._journal.flush()
        finally:
            if pump is not None:
                await cancel_all([pump])
            await self._rest.close()
        self.done = self._ending and not self._stopping

    async def _record(self, pump: asyncio.Task[None]) -> None:
        chance = self._outside.chance.random
        tasks: list[asyncio.Task[Any]] = [
            asyncio.create_task(self._ticks()),
            asyncio.create_task(self._commands.run(chance)),
        ]
        if self._symbols:
            tasks.append(asyncio.create_task(self._requests.run(chance)))
            tasks.append(asyncio.create_task(self._server_time()))
            tasks.extend(asyncio.create_task(keeper.run()) for keeper in self._keepers.values())
        watched = [pump, asyncio.create_task(self._over.wait()), *tasks]
        try:
            await asyncio.wait(watched, return_when=asyncio.FIRST_COMPLETED)
            for task in watched:
                if task.done():
                    task.result()
        finally:
            await cancel_all(watched[1:])

    def _finish(self) -> None:
        """What is left goes into the queue, and the pump ends with it."""
        self._queue.tell_losses(self._now_ns())
        if self._ending and not self._stopping:
            for partition, record in ending(sorted(self._journal.seq), self._now_ns(), self._position, "drained"):
                self._queue.put(partition, record)
        self._pump_until_empty = True
        self._wake.set()

    # -- opening --------------------------------------------------------------------------------------------------

    async def _open(self) -> None:
        settings = msgspec.json.encode([self._config.source, self._symbols, self._config.tick_ms])
        identity = f"{self._config.source}-{hashlib.sha256(settings).hexdigest()[:12]}"
        before = await self._journal.tails()
        newest_ns = max(tail.clock_ts_ns for tail in before.values())
        going_on = self._going_on(identity, before, newest_ns)
        info = await self._exchange_info(new=not going_on)
        self.session = going_on or f"{identity}-{self._outside.chance.getrandbits(32):08x}"
        loop = asyncio.get_running_loop()
        self._clock = JournalClock(self._outside.clock, loop.time, newest_ns if going_on else 0)
        now_ns = self._now_ns()
        tails = await self._journal.open(self.session, now_ns)
        self._position = max(tail.source_position for tail in tails.values())
        for partition, tail in sorted(tails.items()):
            self._enter(partition, tail, now_ns)
        if info is not None:
            self._put(min(self._journal.seq), self._answer("exchange_info", None, info))
        for symbol in self._unlisted:
            self._put_gap(self._home[symbol], {"reason": "not_listed", "streams": []}, symbol=symbol)
        self._requests.ages.mark(self._journal.seq, loop.time())

    def _going_on(self, identity: str, tails: dict[int, Tail], newest_ns: int) -> str:
        """The session to go on with; empty: none, a new one begins."""
        if newest_ns - self._outside.clock.time_ns() > AHEAD_NS:
            logger.warning("the journal is more than 5 s ahead of this machine's clock: a new session begins")
            return ""
        unended = [
            tail
            for tail in tails.values()
            if tail.seq and tail.kind != "end" and tail.session.startswith(identity + "-")
        ]
        # A recorder that died while it began a session has left older ones on the other partitions.
        return max(unended, key=lambda tail: (tail.clock_ts_ns, tail.session)).session if unended else ""

    def _enter(self, partition: int, tail: Tail, now_ns: int) -> None:
        if tail.seq and tail.session == self.session:
            record = journal_record("gap", now_ns, payload=msgspec.json.encode({"reason": "restart", "streams": []}))
        else:
            record = journal_record("config", now_ns, payload=self._session_payload())
        self._put(partition, record)

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

    async def _exchange_info(self, new: bool) -> bytes | None:
        """The exchange's rules of our symbols; None where it can't be asked, which is no reason not to record.

        Raises
        ------
        ConfigError
            It does not list a symbol, and a new session would begin. One that goes on does so without that symbol.
        """
        if not self._symbols:
            return None
        for _ in range(INFO_TRIES):
            body = await self._rest.exchange_info()
            if body is None:
                continue
            listed, rules = _listed(body, self._home)
            if not listed:
                logger.warning("%s/exchangeInfo names no symbol: symbols are not checked", self._endpoints.rest_url)
                return None
            self._check_listed(listed, new)
            return rules
        logger.warning("%s does not tell which symbols it lists: they are not checked", self._endpoints.rest_url)
        return None

    def _check_listed(self, listed: dict[str, str], new: bool) -> None:
        missing = [symbol for symbol in self._symbols if symbol not in listed]
        if missing and new:
            raise ConfigError(
                f"SYMBOLS names {', '.join(missing)}, and {self._endpoints.rest_url} lists no such symbol: take a name "
                "from its /fapi/v1/exchangeInfo"
            )
        for symbol in missing:
            logger.error("%s is not listed any more: recording goes on without it", symbol)
        for symbol in self._symbols:
            if listed.get(symbol, "TRADING") != "TRADING":
                logger.warning("%s has the status %s", symbol, listed[symbol])
        if missing:
            self._unlisted = missing
            self._keep([symbol for symbol in self._symbols if symbol not in missing])

    def _keep(self, symbols: Sequence[str]) -> None:
        """A keeper for each route; none where there is nothing to subscribe."""
        config = self._config
        settings = RouteSettings(
            first_data_sec=config.first_data_sec,
            silence_sec=config.silence_sec,
            backoff_first_sec=config.backoff_first_sec,
            backoff_most_sec=config.backoff_most_sec,
            rotate_sec=config.rotate_sec,
        )
        self._keepers = {}
        for route, streams in self._streams.items() if symbols else ():
            heartbeat = stream_name(symbols[0], HEARTBEAT) if route == "market" else ""
            try:
                self._keepers[route] = RouteKeeper(
                    route,
                    self._endpoints.socket(route),
                    symbols,
                    streams,
                    heartbeat,
                    settings,
                    self._outside,
                    self._now_ns,
                    self,
                )
            except ValueError as error:
                raise ConfigError(f"SYMBOLS: {error}") from error

    # -- into the journal -----------------------------------------------------------------------------------------

    def _now_ns(self) -> int:
        return self._clock.now_ns() if self._clock is not None else self._outside.clock.time_ns()

    async def _pump(self) -> None:
        """Number what waits, in the order of its coming, and send it."""
        queue = self._queue
        while True:
            if not queue.records:
                if self._pump_until_empty:
                    return
                self._wake.clear()
                await self._wake.wait()
                continue
            self._stamp_ms = self._outside.clock.time_ns() // 1_000_000
            self._waited = False
            queue.take(self._append, PUMP_RECORDS)
            if queue.easy:
                self._space.set()
                queue.tell_losses(self._now_ns())
            await self._journal.ship()

    def _append(self, partition: int, record: Record) -> None:
        if not self._waited:
            self._waited = True
            self.waits_ms.add((self._now_ns() - record["recv_ts_ns"]) / 1e6)
        seq = self._journal.append(partition, record, self._stamp_ms)
        if record["kind"] in ANSWERS:
            self._requests.desk.answered(record["kind"], record["symbol"], seq)

    def _put(self, partition: int, record: Record) -> None:
        self._queue.put(partition, record)
        self._wake.set()

    def _put_gap(self, partition: int, payload: dict[str, Any], route: str = "", symbol: str | None = None) -> None:
        self._put(
            partition,
            journal_record(
                "gap",
                self._now_ns(),
                route=route,
                symbol=symbol,
                source_position=self._position,
                payload=msgspec.json.encode(payload),
            ),
        )

    def _put_answer(self, kind: str, symbol: str, body: bytes) -> None:
        self._put(self._home[symbol], self._answer(kind, symbol, body))

    def _put_command(self, partition: int, payload: bytes) -> None:
        self._put(partition, journal_record("command", self._now_ns(), source_position=self._position, payload=payload))

    def _answer(self, kind: str, symbol: str | None, body: bytes, recv_ts_ns: int | None = None) -> Record:
        at_ns = self._now_ns() if recv_ts_ns is None else recv_ts_ns
        return journal_record(kind, at_ns, route="rest", symbol=symbol, source_position=self._position, payload=body)

    # -- what the routes say (`Sink`) -----------------------------------------------------------------------------

    def take(self, route: Route, frame: bytes, found: FrameRoute, recv_ts_ns: int) -> bool:
        """A frame has come; False: the reader waits for `room`."""
        symbol, kind, ts_ms = found
        self.frames_by_route[route] += 1
        self._position += 1
        partition = self._nobodys if symbol is None else self._home.get(symbol, self._nobodys)
        if len(frame) > MAX_FRAME_BYTES:
            self.oversize += 1
            self._queue.drop(partition, symbol, kind, frame)
            return True
        if ts_ms is not None and symbol is not None and kind in STREAM_KEYS:
            self._book.note(symbol, kind, ts_ms)
        self._queue.admit(
            partition,
            {
                "kind": "frame",
                "route": route,
                "symbol": symbol,
                "recv_ts_ns": recv_ts_ns,
                "source_position": self._position,
                "ordinal": 0,
                "epoch": None,
                "session": None,
                "payload": frame,
            },
            kind,
        )
        self._wake.set()
        if self._blocking and self._queue.over:
            self._space.clear()
            return False
        return True

    async def room(self) -> None:
        """Until the queue is easy again."""
        await self._space.wait()

    def up(self, route: Route) -> None:
        """The route delivers."""
        self._routes[route] = "up"

    def down(self, route: Route, reason: str) -> None:
        """The route's only socket has ended."""
        if self._routes[route] == "down":
            return  # nothing has come since the last gap
        self._routes[route] = "down"
        if not self._over.is_set():  # else closed by us: what comes next is `end`, or the gap of a restart
            self._gap_everywhere(route, reason)

    def missed(self, route: Route, reason: str, streams: Sequence[StreamKey]) -> None:
        """Frames of these streams may be missing; the route itself lives."""
        if self._over.is_set():
            return
        by_symbol: dict[str, list[str]] = {}
        for symbol, kind in streams:
            if kind != "markPrice" or HEARTBEAT in self._streams[route]:
                by_symbol.setdefault(symbol, []).append(kind)
        told = "resubscribed" if reason == "resubscribed" else "disconnected"
        for symbol, kinds in sorted(by_symbol.items()):
            payload = {"reason": told, "route": route, "streams": sorted(kinds), "cause": reason}
            self._put_gap(self._home[symbol], payload, route=route, symbol=symbol)

    def _gap_everywhere(self, route: Route, cause: str) -> None:
        payload = {"reason": "disconnected", "route": route, "streams": list(self._streams[route]), "cause": cause}
        for partition in sorted(self._book.partitions):
            self._put_gap(partition, payload, route=route)

    # -- the clock ------------------------------------------------------------------------------------------------

    async def _ticks(self) -> None:
        """The journal's clock, on the loop's monotonic schedule."""
        loop = asyncio.get_running_loop()
        tick_sec = self._config.tick_ms / 1000
        due_sec = idle_due_sec = loop.time()
        clock = self._clock
        assert clock is not None
        while True:
            now_sec = loop.time()
            missed = max(0, int((now_sec - due_sec) / tick_sec))
            due_sec += (missed + 1) * tick_sec
            await asyncio.sleep(due_sec - now_sec)
            if loop.time() - due_sec > LATE_TICK_SEC:
                # Held up ourselves: what lies in the sockets was there before this tick, so it goes first.
                self.late_ticks += 1
                await asyncio.sleep(DRAIN_SEC)
            if clock.look():
                logger.warning("the wall clock jumped: %.1f ms from the journal's clock now", clock.behind_wall_ms)
                self._ask_time.set()
            self._requests.ages.mark(self._journal.seq, loop.time())
            self._watch_broker(loop.time())
            idle = loop.time() >= idle_due_sec
            if idle:
                idle_due_sec = loop.time() + IDLE_TICK_SEC
            self._tick(sorted(self._journal.seq if idle else self._book.partitions))

    def _watch_broker(self, now_sec: float) -> None:
        """How long the broker has owed an acknowledgement without giving any."""
        writer = self._journal.writer
        if not writer.outstanding or writer.records_sent != self._progress[1]:
            self._progress = now_sec, writer.records_sent
        self.broker_waited_sec = now_sec - self._progress[0]
        self.broker_waited_most_sec = max(self.broker_waited_most_sec, self.broker_waited_sec)

    def _tick(self, partitions: Sequence[int]) -> None:
        if self._queue.full:
            self.ticks_skipped += 1
            return
        now_ns = self._now_ns()
        routes: dict[str, str] = dict(sorted(self._routes.items()))
        for partition in partitions:
            payload = self._book.payload(partition, self.session, routes)
            self._put(partition, journal_record("tick", now_ns, source_position=self._position, payload=payload))

    async def _server_time(self) -> None:
        """The exchange's clock every minute, and whenever ours has jumped, or latencies have."""
        while True:
            self._ask_time.clear()
            wait_sec = SERVER_TIME_SEC if await self._measure_drift() else SERVER_TIME_AGAIN_SEC
            await asyncio.sleep(SERVER_TIME_LEAST_SEC)
            try:
                async with asyncio.timeout(wait_sec - SERVER_TIME_LEAST_SEC):
                    await self._ask_time.wait()
            except TimeoutError:
                pass

    async def _measure_drift(self) -> bool:
        """Journal the quickest of a few answers, stamped with the middle of its round trip; whether there was one."""
        loop = asyncio.get_running_loop()
        best: tuple[float, int, int, bytes] | None = None
        for _ in range(SERVER_TIME_TRIES):
            asked_sec = loop.time()
            body = await self._rest.server_time()
            round_trip_sec = loop.time() - asked_sec
            if body is None:
                break
            if best is None or round_trip_sec < best[0]:
                best = (round_trip_sec, self._now_ns(), self._outside.clock.time_ns(), body)
            if round_trip_sec <= GOOD_ROUND_TRIP_SEC:
                break
        if best is None:
            return False
        round_trip_sec, recv_ts_ns, wall_ns, body = best
        half_ns = int(round_trip_sec / 2 * 1e9)
        self.round_trip_ms = round_trip_sec * 1e3
        self.server_time_slow += round_trip_sec > SLOW_ROUND_TRIP_SEC
        self._put(min(self._book.partitions), self._answer("server_time", None, body, recv_ts_ns - half_ns))
        try:
            server_ns = decode_server_time(body).server_time_ms * 1_000_000
        except UNDECODABLE:
            return False
        self.drift_ms = (wall_ns - half_ns - server_ns) / 1e6
        assert self._clock is not None
        self._clock.compare(server_ns, wall_ns - half_ns)
        return True

    # -- status ---------------------------------------------------------------------------------------------------

    def status(self) -> dict[str, Any]:
        """For `/status`."""
        queue, clock = self._queue, self._clock
        return {
            "source": self._config.source,
            "session": self.session,
            "epoch": self._journal.epoch if self._journal.opened else None,
            "symbols": len(self._symbols),
            "frames_by_route": dict(self.frames_by_route),
            "routes": dict(self._routes),
            "connections": {route: keeper.status() for route, keeper in self._keepers.items()},
            "reconnects": sum(sum(keeper.reconnects.values()) for keeper in self._keepers.values()),
            "renewals": sum(
                count
                for keeper in self._keepers.values()
                for reason, count in keeper.renewals.items()
                if not reason.startswith("failed:")
            ),
            "resubscribed": sum(keeper.resubscribed for keeper in self._keepers.values()),
            "subscribe_errors": sum(keeper.reply_errors for keeper in self._keepers.values()),
            "unlisted": self._unlisted,
            "journal_records": self._journal.records,
            "seqs": {str(partition): seq for partition, seq in self._journal.seq.items()},
            "queue_depth": queue.records,
            "queue_bytes": queue.bytes,
            "queue_bound_frames": self._config.queue_frames,
            "queue_bound_bytes": self._config.queue_mib << 20,
            "queue_most": queue.most_records,
            "conflated": queue.conflated,
            "dropped": sum(queue.dropped.values()),
            "dropped_by_stream": dict(sorted(queue.dropped.items())),
            "oversize": self.oversize,
            "ticks_skipped": self.ticks_skipped,
            "late_ticks": self.late_ticks,
            "broker_waited_sec": round(self.broker_waited_sec, 3),
            "broker_waited_most_sec": round(self.broker_waited_most_sec, 3),
            "rest_requests": self._rest.requests,
            "rest": self._rest.status(),
            "requests": self._requests.status(),
            "commands": self._commands.status(),
            "clock_jumps": clock.jumps if clock is not None else 0,
            "behind_wall_ms": round(clock.behind_wall_ms, 3) if clock is not None else 0.0,
            "drift_ms": self.drift_ms,
            "round_trip_ms": self.round_trip_ms,
            "server_time_slow": self.server_time_slow,
            "done": self.done,
        }


class _Listing(msgspec.Struct):
    symbol: str = ""
    status: str = "TRADING"


class _Info(msgspec.Struct):
    symbols: list[_Listing] = []


def _listed(info: bytes, wanted: dict[str, int]) -> tuple[dict[str, str], bytes]:
    """(symbol -> status of all that are listed, the answer with the rules of `wanted` alone).

    The whole answer of the exchange is larger than a batch of the log.
    """
    try:
        listed = {each.symbol: each.status for each in msgspec.json.decode(info, type=_Info).symbols}
        content = msgspec.json.decode(info)
        content["symbols"] = [each for each in content["symbols"] if each.get("symbol") in wanted]
    except (*UNDECODABLE, KeyError, TypeError, AttributeError):
        return {}, b"{}"
    return listed, msgspec.json.encode(content)
