"""A recorded capture as a source of the simulated exchange: every frame verbatim, in the order of the file.

The file's order holds within a route, and around snapshots: when playback reaches a recorded `rest` frame that the
client needs, it waits for the request, makes sure that everything sent before has been read, answers with the recorded
body, and lets it arrive before it goes on. So the client meets diffs and snapshot in the file's order at any speed.
Snapshots that are asked for at other times come from a book that is kept on the way.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Final

import msgspec

from orderflow.capture import CaptureInfo, frames, rest_body, rest_symbol, scan, stream_of, symbol_of_stream
from orderflow.errors import CaptureError, ConfigError
from orderflow.venues.binance.sim.history import TradeHistory
from orderflow.venues.binance.sim.hub import Hub
from orderflow.venues.binance.sim.instruments import Instrument, infer_instrument
from orderflow.venues.binance.sim.source import Frame, SnapshotUnavailable, limited_book
from orderflow.venues.binance.streams import Route

logger = logging.getLogger(__name__)

AWAITED_KINDS: Final = ("bookTicker", "depth@100ms", "aggTrade")
"""Playback begins once these are subscribed, as far as the file has them."""
SNAPSHOT_LEVELS: Final = 1000
_BATCH_FRAMES: Final = 64
_INFERENCE_FRAMES: Final = 300
"""Frames a symbol from which its increments are inferred, beside its recorded snapshots."""
_EARLY_MOST: Final = 10_000
"""Diffs kept while a book waits for its snapshot; those of a thousand seconds, which no snapshot is late by."""
_EARLY_FRAME_SEC: Final = 0.001
"""A frame may leave this much before its time: timers are no finer."""


class PlaybackConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """How a capture is played."""

    speed: Annotated[float, msgspec.Meta(gt=0, le=10_000, description="factor of the recorded pace")] | None = 1.0
    """None: as fast as the sockets take it."""
    start_grace_sec: Annotated[
        float, msgspec.Meta(ge=0, le=3600, description="from the first subscription to the start at the latest")
    ] = 3.0
    rest_wait_sec: Annotated[
        float, msgspec.Meta(ge=0, le=3600, description="how long a recorded snapshot waits to be asked for")
    ] = 5.0
    hold_sec: Annotated[
        float, msgspec.Meta(gt=0, le=3600, description="how long a request waits for its recorded snapshot")
    ] = 10.0
    settle_before_sec: Annotated[
        float, msgspec.Meta(ge=0, le=60, description="rest between the diffs having been read and the answer")
    ] = 0.1
    settle_after_sec: Annotated[
        float, msgspec.Meta(ge=0, le=60, description="rest between the answer and the next frame")
    ] = 0.25


class _Levels(msgspec.Struct):
    """What of a diff the book needs. Names are the exchange's."""

    U: int
    u: int
    pu: int
    b: list[tuple[str, str]]
    a: list[tuple[str, str]]


class _Diff(msgspec.Struct):
    data: _Levels


class _Snapshot(msgspec.Struct):
    lastUpdateId: int
    bids: list[tuple[str, str]]
    asks: list[tuple[str, str]]


class _Times(msgspec.Struct):
    E: int


class _TimedFrame(msgspec.Struct):
    data: _Times


_decode_diff = msgspec.json.Decoder(_Diff).decode
_decode_snapshot = msgspec.json.Decoder(_Snapshot).decode
_decode_timed = msgspec.json.Decoder(_TimedFrame).decode


class RecordedBook:
    """A symbol's book as the diffs that were played make it. Levels keep the strings of the file."""

    def __init__(self) -> None:
        self._bids: dict[float, tuple[str, str]] = {}
        self._asks: dict[float, tuple[str, str]] = {}
        self._early: list[_Levels] = []
        """Diffs before the snapshot; it is bracketed by one of them, or by one to come."""
        self.last_id = 0
        self._last_u: int | None = None
        self.whole = False
        """Whether there was a snapshot, and no gap since."""

    def diff(self, levels: _Levels) -> None:
        """Apply a depthUpdate; a gap makes the book unusable until the next snapshot."""
        if self._last_u is not None and levels.pu != self._last_u:
            self.whole = False
            self._early.clear()
        self._last_u = levels.u
        if self.whole:
            self._apply(levels)
        else:
            self._early.append(levels)
            del self._early[:-_EARLY_MOST]

    def snapshot(self, body: bytes) -> None:
        """Begin anew from a recorded snapshot."""
        taken = _decode_snapshot(body)
        self._bids = {float(price): (price, qty) for price, qty in taken.bids}
        self._asks = {float(price): (price, qty) for price, qty in taken.asks}
        self.last_id = taken.lastUpdateId
        self.whole = True
        early, self._early = self._early, []
        for levels in early:
            self._apply(levels)

    def _apply(self, levels: _Levels) -> None:
        if levels.u < self.last_id:
            return
        for side, changes in ((self._bids, levels.b), (self._asks, levels.a)):
            for price, qty in changes:
                if float(qty) == 0.0:
                    side.pop(float(price), None)
                else:
                    side[float(price)] = (price, qty)
        self.last_id = levels.u

    def body(self, limit: int, time_ms: int) -> bytes:
        """Body of `GET /fapi/v1/depth`."""
        bids = [self._bids[price] for price in sorted(self._bids, reverse=True)[:limit]]
        asks = [self._asks[price] for price in sorted(self._asks)[:limit]]
        answer = {"lastUpdateId": self.last_id, "E": time_ms, "T": time_ms, "bids": bids, "asks": asks}
        return msgspec.json.encode(answer)


@dataclass(slots=True)
class _Held:
    """A request that waits for its recorded snapshot."""

    limit: int
    answer: asyncio.Future[bytes]


@dataclass(slots=True)
class PlaybackCounts:
    """What playback did with the file's frames and with requests."""

    position: int = 0
    """Frames of the file that have been passed."""
    other_symbols: int = 0
    recorded_answers: int = 0
    book_answers: int = 0
    unrequested_snapshots: int = 0
    unneeded_snapshots: int = 0
    unsettled: int = 0
    """Snapshots before which a socket did not confirm that it had read everything."""
    unavailable: int = 0
    undecodable: dict[str, int] = field(default_factory=dict)


class CaptureSource:
    """Plays a capture through the hub."""

    name = "capture"

    def __init__(self, path: Path, *, symbols: Iterable[str] = (), config: PlaybackConfig | None = None) -> None:
        """Reads the whole file once, so that a bad one is refused before anybody connects.

        Raises
        ------
        CaptureError
            The file cannot be read or is not a capture.
        ConfigError
            A symbol is not in it.
        """
        self.config = config or PlaybackConfig()
        self.info: CaptureInfo = scan(path)
        chosen = sorted(set(symbols)) or list(self.info.symbols)
        missing = [symbol for symbol in chosen if symbol not in self.info.symbols]
        if missing:
            raise ConfigError(
                f"symbols {', '.join(missing)} are not in {path}: choose among {', '.join(self.info.symbols)}"
            )
        self.trades = TradeHistory()
        self.counts = PlaybackCounts()
        self.done = False
        self.started = False
        self._books = {symbol: RecordedBook() for symbol in chosen}
        self._snapshots_left = {symbol: self.info.snapshots.get(symbol, 0) for symbol in chosen}
        self._held: dict[str, list[_Held]] = {symbol: [] for symbol in chosen}
        self._asked = asyncio.Event()
        self._streams = _streams_of(self.info, frozenset(chosen))
        self._instruments = _infer(path, chosen)
        self._newest = b""
        self._newest_ms = _first_time_ms(path)
        self._elapsed_ms = 0
        self._ended_at: float | None = None

    @property
    def instruments(self) -> dict[str, Instrument]:
        return self._instruments

    def server_time_ms(self) -> int:
        """E of the newest frame played; before the first, its E to come."""
        if self._newest:
            try:
                self._newest_ms = _decode_timed(self._newest).data.E
            except msgspec.DecodeError:
                pass  # a frame without E (there are streams of arrays): the time before it stands
            self._newest = b""
        return self._newest_ms

    def elapsed_ms(self) -> int:
        """By the receive times of the file; once it is over, time goes on at its own pace."""
        if self._ended_at is None:
            return self._elapsed_ms
        return self._elapsed_ms + int((time.monotonic() - self._ended_at) * 1_000)

    # Requests

    def book(self, symbol: str, limit: int) -> bytes | None:
        book = self._books[symbol]
        return book.body(limit, self.server_time_ms()) if book.whole else None

    async def snapshot(self, symbol: str, limit: int) -> bytes:
        book = self._books[symbol]
        if book.whole:
            self.counts.book_answers += 1
            return book.body(limit, self.server_time_ms())
        if not self._snapshots_left[symbol]:
            self.counts.unavailable += 1
            raise SnapshotUnavailable(f"the capture holds no further snapshot of {symbol}")
        held = _Held(limit, asyncio.get_running_loop().create_future())
        self._held[symbol].append(held)
        self._asked.set()
        try:
            return await asyncio.wait_for(held.answer, self.config.hold_sec)
        except TimeoutError:
            self.counts.unavailable += 1
            raise SnapshotUnavailable(f"playback has not reached the snapshot of {symbol}") from None
        finally:
            if held in self._held[symbol]:
                self._held[symbol].remove(held)

    # Playback

    async def run(self, hub: Hub) -> None:
        await self._await_start(hub)
        self.started = True
        pace = _Pace(self.config.speed, self.info.first_rx_ns)
        batch: list[Frame] = []
        for rx_ns, conn, frame in frames(self.info.path):
            wait_sec = pace.wait_sec(rx_ns)
            if batch and (wait_sec > 0 or conn == "rest" or len(batch) >= _BATCH_FRAMES):
                await self._send(hub, batch)
                batch = []
            if wait_sec > 0:
                await asyncio.sleep(wait_sec)
            self.counts.position += 1
            self._elapsed_ms = max(self._elapsed_ms, (rx_ns - self.info.first_rx_ns) // 1_000_000)
            if conn == "rest":
                paused_at = time.monotonic()
                await self._play_snapshot(hub, frame)
                pace.shift(time.monotonic() - paused_at)
            elif routed := self._route(conn, frame):
                batch.append(routed)
        await self._send(hub, batch)
        hub.publish_held()
        await hub.drain()
        self._ended_at = time.monotonic()
        self.done = True
        self._release_all()
        logger.info("capture played: %d frames", self.counts.position)

    async def _await_start(self, hub: Hub) -> None:
        await hub.wait_until(lambda: hub.subscriptions > 0, None)
        awaited = [(_route_of(stream), stream) for stream in self._streams if stream.partition("@")[2] in AWAITED_KINDS]
        if not await hub.wait_until(
            lambda: all(hub.subscribed(route, stream) for route, stream in awaited), self.config.start_grace_sec
        ):
            absent = [stream for route, stream in awaited if not hub.subscribed(route, stream)]
            logger.warning("playback begins without subscribers of %s", ", ".join(absent))

    async def _send(self, hub: Hub, batch: list[Frame]) -> None:
        if self.config.speed is None and not hub.clients:
            # Flat out, the sockets set the pace: without one there is none.
            await hub.wait_until(lambda: hub.subscriptions > 0, None)
        hub.publish(batch)
        await hub.drain()
        if self.config.speed is None:
            # Draining returns at once where nothing waits; others must get their turn all the same.
            await asyncio.sleep(0)

    def _route(self, conn: str, frame: bytes) -> Frame | None:
        """Keep the book and the trades, and say where the frame goes."""
        name = stream_of(frame) or b""
        stream = name.decode("utf-8", "replace")
        symbol = self._streams.get(stream)
        if symbol is None:
            self.counts.other_symbols += 1
            return None
        kind = stream.partition("@")[2]
        try:
            if kind == "depth@100ms":
                self._books[symbol].diff(_decode_diff(frame).data)
            elif kind == "aggTrade":
                self.trades.add(symbol, frame)
        except msgspec.DecodeError:
            # Played all the same: whoever records oddities wants to see them again.
            self.counts.undecodable[kind] = self.counts.undecodable.get(kind, 0) + 1
        self._newest = frame
        return Frame("market" if conn == "market" else "public", stream, frame, self._elapsed_ms)

    async def _play_snapshot(self, hub: Hub, frame: bytes) -> None:
        symbol = rest_symbol(frame) or ""
        book = self._books.get(symbol)
        if book is None:
            self.counts.other_symbols += 1
            return
        body = rest_body(frame)
        if book.whole and not self._held[symbol]:
            self.counts.unneeded_snapshots += 1
        elif await self._await_request(hub, symbol):
            if not await hub.settle(self.config.settle_before_sec):
                self.counts.unsettled += 1
            self._answer(symbol, body)
            await asyncio.sleep(self.config.settle_after_sec)
        else:
            self.counts.unrequested_snapshots += 1
        self._snapshots_left[symbol] -= 1
        book.snapshot(body)

    async def _await_request(self, hub: Hub, symbol: str) -> bool:
        """Wait a bounded time until somebody asks for this symbol's snapshot; not at all where nobody is connected."""
        deadline = time.monotonic() + self.config.rest_wait_sec
        while not self._held[symbol]:
            left = deadline - time.monotonic()
            if left <= 0 or not hub.clients:
                return False
            self._asked.clear()
            try:
                await asyncio.wait_for(self._asked.wait(), left)
            except TimeoutError:
                return bool(self._held[symbol])
        return True

    def _answer(self, symbol: str, body: bytes) -> None:
        for held in self._held[symbol]:
            if not held.answer.done():
                held.answer.set_result(body if held.limit >= SNAPSHOT_LEVELS else limited_book(body, held.limit))
                self.counts.recorded_answers += 1

    def _release_all(self) -> None:
        """The file is over: whoever still waits gets what there is."""
        for symbol, waiting in self._held.items():
            for held in waiting:
                if not held.answer.done():
                    held.answer.set_exception(SnapshotUnavailable(f"the capture ended without a snapshot of {symbol}"))

    def status(self) -> dict[str, Any]:
        counts = self.counts
        return {
            "capture": str(self.info.path),
            "sha256": self.info.sha256,
            "symbols": list(self._instruments),
            "speed": "max" if self.config.speed is None else self.config.speed,
            "started": self.started,
            "frames": self.info.frames,
            "position": counts.position,
            "other_symbols": counts.other_symbols,
            "snapshots": {
                "recorded_answers": counts.recorded_answers,
                "book_answers": counts.book_answers,
                "unrequested": counts.unrequested_snapshots,
                "unneeded": counts.unneeded_snapshots,
                "unsettled": counts.unsettled,
                "unavailable": counts.unavailable,
            },
            "undecodable": dict(sorted(counts.undecodable.items())),
        }


class _Pace:
    """When a frame is due, by its receive time and the speed."""

    def __init__(self, speed: float | None, first_rx_ns: int) -> None:
        self._speed = speed
        self._first_rx_ns = first_rx_ns
        self._begun = time.monotonic()

    def wait_sec(self, rx_ns: int) -> float:
        """Seconds until the frame is due; 0 where it is already, or flat out."""
        if self._speed is None:
            return 0.0
        left = self._begun + (rx_ns - self._first_rx_ns) / 1e9 / self._speed - time.monotonic()
        return left if left > _EARLY_FRAME_SEC else 0.0

    def shift(self, seconds: float) -> None:
        """Playback has stood still for so long."""
        self._begun += seconds


def _streams_of(info: CaptureInfo, symbols: frozenset[str]) -> dict[str, str]:
    """Streams that are played -> their symbol; those over all symbols are not, for they hold the others."""
    named = {stream: symbol_of_stream(stream) for stream in info.streams if not stream.startswith("!")}
    return {stream: symbol for stream, symbol in named.items() if symbol in symbols}


def _route_of(stream: str) -> Route:
    return "market" if stream.endswith("@aggTrade") else "public"


def _first_time_ms(path: Path) -> int:
    for rx_ns, conn, frame in frames(path):
        if conn != "rest":
            try:
                return _decode_timed(frame).data.E
            except msgspec.DecodeError:
                return rx_ns // 1_000_000
    return 0


def _infer(path: Path, symbols: list[str]) -> dict[str, Instrument]:
    """Increments from the recorded snapshots and the first frames of each symbol."""
    seen: dict[str, tuple[set[str], set[str]]] = {symbol: (set(), set()) for symbol in symbols}
    left = dict.fromkeys(symbols, _INFERENCE_FRAMES)
    for symbol, price, qty in _levels(path, left):
        if price.replace(".", "", 1).isdecimal() and qty.replace(".", "", 1).isdecimal():
            seen[symbol][0].add(price)
            seen[symbol][1].add(qty)
    return {symbol: infer_instrument(symbol, *seen[symbol]) for symbol in symbols}


def _checked_snapshot(path: Path, frame: bytes) -> _Snapshot:
    try:
        return _decode_snapshot(frame)
    except msgspec.DecodeError as error:
        raise CaptureError(
            f"{path}: the recorded snapshot {frame[:60]!r} ... is none ({error}): it must hold lastUpdateId, bids, asks"
        ) from error


def _levels(path: Path, left: dict[str, int]) -> Iterator[tuple[str, str, str]]:
    """(symbol, price, qty) of every recorded snapshot, and of diffs while `left` of their symbol lasts."""
    for _, conn, frame in frames(path):
        if conn == "rest":
            symbol = rest_symbol(frame) or ""
            if symbol in left:
                taken = _checked_snapshot(path, frame)
                yield from ((symbol, price, qty) for price, qty in (*taken.bids, *taken.asks))
            continue
        stream = (stream_of(frame) or b"").decode("utf-8", "replace")
        symbol, _, kind = stream.partition("@")
        symbol = symbol.upper()
        if left.get(symbol, 0) <= 0 or kind != "depth@100ms":
            continue
        left[symbol] -= 1
        try:
            levels = _decode_diff(frame).data
        except msgspec.DecodeError:
            continue
        yield from ((symbol, price, qty) for price, qty in (*levels.b, *levels.a))
