"""Captures of a market that is wider and longer than the recorded one.

Wider: each symbol once more under other names. Longer: where the recording ends it begins again, as often as asked, with
its times and ids moved on. Such a repetition, a *tile*, goes on as a live market would behind a reconnect: trade ids
without a gap or a repetition, update ids that rise, a chain of diffs that breaks, and the recorded snapshot a moment
later, from which the books are synced anew. Only the prices jump, from the last ones of the recording to its first ones.
"""

from __future__ import annotations

import heapq
import re
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import count, tee
from operator import itemgetter
from pathlib import Path

from orderflow.capture import CaptureWriter, frames, stream_of

SHIFT_NS = 7_777_777
"""Between copies, so that they do not all arrive at the same moment."""
KINDS = (b"aggTrade", b"bookTicker", b"depth@100ms")
"""Streams whose times and ids are known."""
_FAMILIES = {b"E": "time", b"T": "time", b"a": "aggTrade", b"f": "trade", b"l": "trade"}
"""Of keys of whole numbers; those of the other keys are update ids, which are shared by all symbols."""
_NUMBER = re.compile(rb'"(E|T|a|f|l|U|u|pu|lastUpdateId)":(\d+)')
_SYMBOL = re.compile(rb'"(?:s|symbol)":"([A-Z0-9]+)USDT"')
_NS_PER_MS = 1_000_000

Line = tuple[int, str, bytes]
"""Receive time, connection, frame."""


def played(source: Path, seconds: float, tile_sec: float) -> Iterator[Line]:
    """The first `tile_sec` of a recording, over and over, for `seconds`. A tile lasts `tile_sec`, or till its last clock."""
    return _first(seconds, _tiles(lambda: _first(tile_sec, frames(source)), int(tile_sec * 1000)))


def widen(source: Path, target: Path, copies: int, seconds: float, tile_sec: float) -> int:
    """Write what is `played` with each symbol `copies` times; returns its number of frames."""
    target.parent.mkdir(parents=True, exist_ok=True)
    markets = tee(played(source, seconds, tile_sec), copies)
    renamed = (map(partial(_renamed, copy), lines) for copy, lines in enumerate(markets))
    with CaptureWriter(target, level=1) as file:
        for line in heapq.merge(*renamed, key=itemgetter(0)):
            file.write(*line)
    return file.frames


def _first(seconds: float, lines: Iterable[Line]) -> Iterator[Line]:
    end_ns = 0
    for line in lines:
        end_ns = end_ns or line[0] + int(seconds * 1e9)
        if line[0] >= end_ns:
            return
        yield line


def _tiles(recorded: Callable[[], Iterator[Line]], least_ms: int) -> Iterator[Line]:
    yield from recorded()
    steps = _steps(recorded())
    steps["time"] = max(steps["time"], least_ms)
    for tile in count(1):
        ahead = {name: tile * step for name, step in steps.items()}
        for line in recorded():
            yield _moved(line, ahead)


def _steps(lines: Iterable[Line]) -> dict[str, int]:
    """How far each family of numbers goes from one tile to the next: to right behind the highest.

    Times are of one family, whoever's clock they are of, so that none goes back.
    """
    low: dict[str, int] = {}
    high: dict[str, int] = {}
    for rx_ns, conn, frame in lines:
        if conn != "rest" and (stream_of(frame) or b"").partition(b"@")[2] not in KINDS:
            raise ValueError(f"times and ids of {frame[:60]!r} are not known: such a frame can't be moved on")
        head, symbol = _head(frame)
        numbers = [("time", rx_ns // _NS_PER_MS)]
        numbers += [(_family(found[1], symbol), int(found[2])) for found in _NUMBER.finditer(head)]
        for name, number in numbers:
            low[name] = min(low.get(name, number), number)
            high[name] = max(high.get(name, number), number)
    return {name: high[name] - low[name] + 1 for name in low}


def _moved(line: Line, ahead: dict[str, int]) -> Line:
    rx_ns, conn, frame = line
    head, symbol = _head(frame)

    def number(found: re.Match[bytes]) -> bytes:
        return b'"%s":%d' % (found[1], int(found[2]) + ahead[_family(found[1], symbol)])

    return rx_ns + ahead["time"] * _NS_PER_MS, conn, _NUMBER.sub(number, head) + frame[len(head) :]


def _head(frame: bytes) -> tuple[bytes, str]:
    """What lies before the levels of a book, which are long and hold no times and ids; and the symbol."""
    head = frame.partition(b"[")[0]
    found = _SYMBOL.search(head)
    return head, found[1].decode() if found else ""


def _family(key: bytes, symbol: str) -> str:
    family = _FAMILIES.get(key, "update")
    return f"{family} {symbol}" if family in ("aggTrade", "trade") else family


def _renamed(copy: int, line: Line) -> Line:
    if not copy:
        return line
    rx_ns, conn, frame = line
    found = _SYMBOL.search(frame)
    if found is not None:
        base = found[1]
        other = b"%s%d" % (base, copy)
        frame = frame.replace(b'"%sUSDT"' % base, b'"%sUSDT"' % other)
        frame = frame.replace(b'"%susdt@' % base.lower(), b'"%susdt@' % other.lower(), 1)
    return rx_ns + copy * SHIFT_NS, conn, frame
