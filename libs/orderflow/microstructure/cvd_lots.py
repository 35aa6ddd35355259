"""Quantities as whole lots of 1e-8: sums are exact whatever the order, and nothing drifts over months.

Python's integers have no limit; in serialised state those beyond 64 bits become decimal strings.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, TypeAlias

import msgspec

LOT: Final = 100_000_000
"""Lots in one unit."""
MAX_UNITS: Final = 1e15
"""Prices and quantities at or above this are refused."""

PackedInt: TypeAlias = int | str

_LOW: Final = -(1 << 63)
_HIGH: Final = 1 << 63
_COMPACT_AT: Final = 128
"""Entries that have left a window before its lists are cut, where they are at least a quarter of all."""


def to_lots(value: float) -> int:
    """Nearest whole number of lots, exact for every double that stands for a decimal with 8 places or fewer.

    The whole part is split off first, so that the product stays well within a double's 53 bits.
    """
    whole = int(value)
    return whole * LOT + round((value - whole) * 1e8)


def pack_int(value: int) -> PackedInt:
    """As it is within 64 bits, else its decimal digits."""
    return value if _LOW <= value < _HIGH else str(value)


def pack_ints(values: Sequence[int]) -> Sequence[PackedInt]:
    """`pack_int` of each."""
    if not values or (min(values) >= _LOW and max(values) < _HIGH):
        return values
    return [pack_int(value) for value in values]


class LotSumState(msgspec.Struct):
    """Serialised form of `LotSum`."""

    times_ms: list[int] = []
    lots: list[PackedInt] = []
    head: int = 0


class LotSum:
    """Exact sum over [now - span, now] of event time; trades of one millisecond share an entry."""

    __slots__ = ("_head", "_lots", "_times_ms", "span_ms", "total")

    def __init__(self, span_ms: int, state: LotSumState | None = None) -> None:
        state = state or LotSumState()
        self.span_ms = span_ms
        self._times_ms = state.times_ms
        self._lots = [int(value) for value in state.lots]
        self._head = state.head
        self.total = sum(self._lots[self._head :])

    def push(self, now_ms: int, lots: int) -> int:
        """Add lots at `now_ms`, which must not go back; return the sum."""
        times = self._times_ms
        if times and times[-1] == now_ms:
            self._lots[-1] += lots
        else:
            times.append(now_ms)
            self._lots.append(lots)
            oldest_ms, head = now_ms - self.span_ms, self._head
            while times[head] < oldest_ms:
                self.total -= self._lots[head]
                head += 1
            if head >= _COMPACT_AT and 4 * head >= len(times):
                del times[:head]
                del self._lots[:head]
                head = 0
            self._head = head
        self.total += lots
        return self.total

    def state(self) -> LotSumState:
        """Serialisable copy."""
        return LotSumState(self._times_ms, list(pack_ints(self._lots)), self._head)


class TrailingState(msgspec.Struct):
    """Serialised form of `Trailing`."""

    times_ms: list[int] = []
    counts: list[int] = []
    net: list[PackedInt] = []
    gross: list[PackedInt] = []
    volume: list[PackedInt] = []
    notional: list[PackedInt] = []
    tails: list[int] = []


IMBALANCE_SPANS_MS: Final = (1_000, 5_000, 10_000, 30_000)
MINUTE_MS: Final = 60_000


class Trailing:
    """Sums over the last 1, 5, 10, 30 and 60 s of event time, from one column of trades with five tails.

    `net` is the signed and `gross` the absolute quantity of trades with a side, in lots; `volume` and `notional`
    (lots times lots) count every trade. At most 60001 entries: trades of one millisecond share one.
    """

    __slots__ = (
        "_counts",
        "_gross",
        "_net",
        "_notional",
        "_tails",
        "_times_ms",
        "_volume",
        "count",
        "gross",
        "net",
        "notional",
        "short_gross",
        "short_net",
        "volume",
    )

    def __init__(self, state: TrailingState | None = None) -> None:
        state = state or TrailingState(tails=[0] * (len(IMBALANCE_SPANS_MS) + 1))
        self._times_ms, self._counts, self._tails = state.times_ms, state.counts, state.tails
        self._net = [int(value) for value in state.net]
        self._gross = [int(value) for value in state.gross]
        self._volume = [int(value) for value in state.volume]
        self._notional = [int(value) for value in state.notional]
        minute = self._tails[-1]
        self.count = sum(self._counts[minute:])
        self.net = sum(self._net[minute:])
        self.gross = sum(self._gross[minute:])
        self.volume = sum(self._volume[minute:])
        self.notional = sum(self._notional[minute:])
        self.short_net = [sum(self._net[tail:]) for tail in self._tails[:-1]]
        self.short_gross = [sum(self._gross[tail:]) for tail in self._tails[:-1]]

    def push(self, now_ms: int, signed: int, lots: int, notional: int) -> None:
        """Add a trade at `now_ms`, which must not go back; `signed` is 0 for one without a side."""
        times = self._times_ms
        absolute = abs(signed)
        if times and times[-1] == now_ms:
            self._counts[-1] += 1
            self._net[-1] += signed
            self._gross[-1] += absolute
            self._volume[-1] += lots
            self._notional[-1] += notional
        else:
            times.append(now_ms)
            self._counts.append(1)
            self._net.append(signed)
            self._gross.append(absolute)
            self._volume.append(lots)
            self._notional.append(notional)
            self._evict(now_ms)
        self.count += 1
        self.net += signed
        self.gross += absolute
        self.volume += lots
        self.notional += notional
        if absolute:
            short_net, short_gross = self.short_net, self.short_gross
            for i in range(len(short_net)):
                short_net[i] += signed
                short_gross[i] += absolute

    def _evict(self, now_ms: int) -> None:
        """Move the tails; the newest entry, not yet in any sum, stays in front of all of them."""
        times, tails, net, gross = self._times_ms, self._tails, self._net, self._gross
        for i, span_ms in enumerate(IMBALANCE_SPANS_MS):
            tail, oldest_ms = tails[i], now_ms - span_ms
            if times[tail] >= oldest_ms:
                continue
            while times[tail] < oldest_ms:
                self.short_net[i] -= net[tail]
                self.short_gross[i] -= gross[tail]
                tail += 1
            tails[i] = tail
        tail, oldest_ms = tails[-1], now_ms - MINUTE_MS
        while times[tail] < oldest_ms:
            self.count -= self._counts[tail]
            self.net -= net[tail]
            self.gross -= gross[tail]
            self.volume -= self._volume[tail]
            self.notional -= self._notional[tail]
            tail += 1
        tails[-1] = tail
        if tail >= _COMPACT_AT and 4 * tail >= len(times):
            for column in (times, self._counts, net, gross, self._volume, self._notional):
                del column[:tail]
            self._tails = [each - tail for each in tails]

    def imbalance(self, i: int) -> float | None:
        """sum of delta / sum of |delta| over `IMBALANCE_SPANS_MS[i]`; None where nothing with a side was traded."""
        gross = self.short_gross[i]
        return self.short_net[i] / gross if gross else None

    def buy_ratio(self) -> float | None:
        """Bought over bought and sold quantity of the minute; None where nothing with a side was traded."""
        return (self.gross + self.net) / (2 * self.gross) if self.gross else None

    def state(self) -> TrailingState:
        """Serialisable copy."""
        return TrailingState(
            self._times_ms,
            self._counts,
            list(pack_ints(self._net)),
            list(pack_ints(self._gross)),
            list(pack_ints(self._volume)),
            list(pack_ints(self._notional)),
            self._tails,
        )
