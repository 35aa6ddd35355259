"""A recorded file as a source: a pure function of the file and the options, so that any restart writes the same journal.

Each record carries where in the file it comes from: `source_position` is the frame's line, `ordinal` 0 for the frame and
1, 2, ... for the ticks that the recorder puts in between it and the next one.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import msgspec

from orderflow.capture import CaptureInfo, frames
from orderflow.errors import CaptureError
from orderflow.processor import Record
from orderflow.streaming.journal import partition_of
from orderflow.streaming.recorder import journal_record
from orderflow.topics import PARTITIONS
from orderflow.venues.binance.frames import route_of

FORMAT: Final = 1
"""Raised whenever the journal that a file gives changes."""
MAX_TICKS_BETWEEN_FRAMES: Final = 50_000
"""A longer silence in a file is bridged by this many ticks before the next frame; the others are counted."""
END_ORDINAL: Final = 2**31 - 1
NOBODYS_PARTITION: Final = 0
"""Where frames go that can't be routed; the normaliser refuses them with a reason."""
STREAM_KEYS: Final = {"aggTrade": "aggTrade", "bookTicker": "bookTicker", "depth": "depth"}


class TickBook:
    """What a tick says of each symbol: T of the newest frame per stream. One per recorder."""

    def __init__(self, symbols: tuple[str, ...]) -> None:
        self.partitions: dict[int, dict[str, dict[str, int]]] = {}
        self._newest: dict[str, dict[str, int]] = {}
        for symbol in sorted(symbols):
            newest: dict[str, int] = {}
            self._newest[symbol] = newest
            self.partitions.setdefault(partition_of(symbol), {})[symbol] = newest

    def note(self, symbol: str, stream: str, ts_ms: int) -> None:
        """A frame of one of the three streams has come."""
        newest = self._newest.get(symbol)
        if newest is not None:
            newest[stream] = ts_ms

    def payload(self, partition: int, session: str, routes: dict[str, str]) -> bytes:
        """The JSON of a partition's tick, keys sorted."""
        content: dict[str, Any] = {
            "routes": routes,
            "session": session,
            "symbols": {
                symbol: dict(sorted(newest.items())) for symbol, newest in self.partitions.get(partition, {}).items()
            },
        }
        return msgspec.json.encode(content)


class CaptureSource:
    """The journal that a capture gives, record by record."""

    def __init__(self, path: Path, info: CaptureInfo, symbols: tuple[str, ...], tick_ms: int) -> None:
        """`symbols` empty: every symbol of the file.

        Raises
        ------
        CaptureError
            A symbol is not in the file.
        """
        self._path = path
        for symbol in symbols:
            if symbol not in info.symbols:
                raise CaptureError(f"symbol {symbol} is not in {path}, which holds {', '.join(info.symbols)}")
        self.symbols = tuple(sorted(symbols or info.symbols))
        self._info = info
        self._tick_ns = tick_ms * 1_000_000
        self._tick_ms = tick_ms
        identity = msgspec.json.encode([FORMAT, info.sha256, self.symbols, tick_ms])
        self.session = hashlib.sha256(identity).hexdigest()[:16]
        self.frames_by_route: dict[str, int] = {}
        self.frames_skipped = 0
        """Frames of symbols that nobody asked for."""
        self.ticks_skipped = 0

    def records(self) -> Iterator[tuple[int, Record]]:
        """(partition, journal record without its number), in the order of the journal."""
        wanted = {symbol: partition_of(symbol) for symbol in self.symbols}
        known = frozenset(self._info.symbols)
        book = TickBook(self.symbols)
        yield from self._opening()
        boundary = -1
        position = -1
        newest_rx = self._info.first_rx_ns
        for rx_ns, conn, frame in frames(self._path):
            now = rx_ns // self._tick_ns
            if boundary < 0:
                boundary = now
            elif now > boundary:
                yield from self._ticks(book, boundary, now, position)
                boundary = now
            position += 1
            newest_rx = max(newest_rx, rx_ns)
            self.frames_by_route[conn] = self.frames_by_route.get(conn, 0) + 1
            record = self._frame(conn, frame, rx_ns, position, book)
            symbol = record["symbol"]
            if symbol is None:
                yield NOBODYS_PARTITION, record
            elif symbol in wanted:
                yield wanted[symbol], record
            elif symbol in known:
                self.frames_skipped += 1
            else:
                yield NOBODYS_PARTITION, record
        yield from ending(range(PARTITIONS), newest_rx, position, "end of the capture")

    def _opening(self) -> Iterator[tuple[int, Record]]:
        payload = msgspec.json.encode(
            {
                "type": "session",
                "session": self.session,
                "source": "capture",
                "sha256": self._info.sha256,
                "symbols": list(self.symbols),
                "tick_ms": self._tick_ms,
            }
        )
        for partition in range(PARTITIONS):
            yield partition, journal_record("config", self._info.first_rx_ns, payload=payload)

    def _ticks(self, book: TickBook, boundary: int, now: int, position: int) -> Iterator[tuple[int, Record]]:
        first = boundary + 1
        if now - boundary > MAX_TICKS_BETWEEN_FRAMES:
            first = now - MAX_TICKS_BETWEEN_FRAMES + 1
            self.ticks_skipped += first - boundary - 1
        routes = {"market": "up", "public": "up"}
        payloads = {partition: book.payload(partition, self.session, routes) for partition in sorted(book.partitions)}
        for ordinal, number in enumerate(range(first, now + 1), 1):
            for partition, payload in payloads.items():
                yield (
                    partition,
                    journal_record(
                        "tick", number * self._tick_ns, source_position=position, ordinal=ordinal, payload=payload
                    ),
                )

    def _frame(self, conn: str, frame: bytes, rx_ns: int, position: int, book: TickBook) -> Record:
        if conn == "rest":
            return journal_record(
                "snapshot",
                rx_ns,
                route="rest",
                symbol=snapshot_symbol(frame),
                source_position=position,
                payload=frame,
            )
        symbol, stream, ts_ms = route_of(frame)
        if ts_ms is not None and symbol is not None and stream in STREAM_KEYS:
            book.note(symbol, stream, ts_ms)
        return journal_record("frame", rx_ns, route=conn, symbol=symbol, source_position=position, payload=frame)


class _Snapshot(msgspec.Struct):
    symbol: str | None = None


def snapshot_symbol(body: bytes) -> str | None:
    """The symbol that a recorded snapshot names; None where it names none."""
    try:
        return msgspec.json.decode(body, type=_Snapshot).symbol
    except msgspec.MsgspecError:
        return None


def ending(partitions: range | list[int], now_ns: int, position: int, reason: str) -> Iterator[tuple[int, Record]]:
    """The `end` of a session, on every partition."""
    payload = msgspec.json.encode({"reason": reason})
    for partition in partitions:
        yield (
            partition,
            journal_record("end", now_ns, source_position=position, ordinal=END_ORDINAL, payload=payload),
        )
