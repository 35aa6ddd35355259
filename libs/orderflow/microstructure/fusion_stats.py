"""Small trailing statistics of the fusion service. Each is a Struct, so that its state is its own serialised form."""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right, insort

import msgspec

_QUANTUM = 1_000_000
"""Scores are summed as whole millionths: sums of integers are exact, so nothing drifts and no order matters."""

VOLATILITY_SEC = 60
"""Length of the window of realised volatility."""

_MIN_VOLATILITY_MS = 10_000


def finite(value: float | None) -> float | None:
    """The value, or None where it is None, NaN or infinite."""
    return value if value is not None and value - value == 0.0 else None


class TrailingDeviation(msgspec.Struct):
    """Sample standard deviation of the last `size` values, each rounded to a millionth.

    Values must lie within +-20 and size within 10000, so that the sums stay within 64 bits.
    """

    size: int
    ring: list[int] = []
    head: int = 0
    total: int = 0
    total_sq: int = 0

    def push(self, value: float) -> None:
        """Take one finite value; the oldest leaves once the window is full."""
        number = round(value * _QUANTUM)
        if len(self.ring) < self.size:
            self.ring.append(number)
        else:
            old = self.ring[self.head]
            self.ring[self.head] = number
            self.head = (self.head + 1) % self.size
            self.total -= old
            self.total_sq -= old * old
        self.total += number
        self.total_sq += number * number

    def deviation(self, min_count: int) -> float | None:
        """Standard deviation (n - 1); None below `min_count` values or where all are equal."""
        count = len(self.ring)
        if count < min_count or count < 2:
            return None
        spread = count * self.total_sq - self.total * self.total
        if spread <= 0:
            return None
        return math.sqrt(spread / (count * (count - 1))) / _QUANTUM


class MidSeries(msgspec.Struct):
    """Mids on a clock of one second over the trailing minute: realised volatility and trend.

    Realised volatility = 1e4 * sqrt(sum r^2 * 60 s / span), r = log return between samples; the factor makes a window
    that is not yet full comparable. `reference/microstructure-algorithms` 3.3: one-second mids, since the deviation of
    ticks mixes two clocks.
    """

    times_ms: list[int] = []
    mids: list[float] = []

    def push(self, clock_ms: int, mid: float) -> None:
        """Add a sample; `clock_ms` rising, mid > 0."""
        self.times_ms.append(clock_ms)
        self.mids.append(mid)
        drop = bisect_left(self.times_ms, clock_ms - VOLATILITY_SEC * 1000)
        if drop:
            del self.times_ms[:drop]
            del self.mids[:drop]

    def volatility_bps(self) -> float | None:
        """Basis points a minute; None until the samples span ten seconds."""
        if len(self.mids) < 2:
            return None
        span_ms = self.times_ms[-1] - self.times_ms[0]
        if span_ms < _MIN_VOLATILITY_MS:
            return None
        log = math.log
        mids = self.mids
        returns = [log(mids[i] / mids[i - 1]) for i in range(1, len(mids))]
        squares = math.fsum([each * each for each in returns])
        return 1e4 * math.sqrt(squares * (VOLATILITY_SEC * 1000) / span_ms)

    def trend_bps(self, horizon_sec: int) -> float | None:
        """1e4 * (newest mid / mid at or before `horizon_sec` earlier - 1); None while no sample is that old."""
        if not self.mids:
            return None
        at = bisect_right(self.times_ms, self.times_ms[-1] - horizon_sec * 1000) - 1
        return None if at < 0 else 1e4 * (self.mids[-1] / self.mids[at] - 1.0)


class TrailingQuantiles(msgspec.Struct):
    """The last `size` values in order of arrival and of size."""

    size: int
    ring: list[float] = []
    ordered: list[float] = []

    def push(self, value: float) -> None:
        """Take one finite value; the oldest leaves once the window is full."""
        if len(self.ring) >= self.size:
            old = self.ring.pop(0)
            del self.ordered[bisect_left(self.ordered, old)]
        self.ring.append(value)
        insort(self.ordered, value)

    def quantile(self, share: float) -> float:
        """Linear between order statistics (Hyndman-Fan type 7). The window must not be empty."""
        place = share * (len(self.ordered) - 1)
        low = int(place)
        high = min(low + 1, len(self.ordered) - 1)
        return self.ordered[low] + (place - low) * (self.ordered[high] - self.ordered[low])
