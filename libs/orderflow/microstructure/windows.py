"""Rolling statistics over counts and over event time: bounded, serialisable, stable.

Each is a Struct whose fields are its whole state, so its serialised form needs no code of its own. Times are integer
milliseconds and may go back: a window's own clock is the greatest time it has seen. Windows over time hold what lies in
[now - span, now], both ends included, as `RANGE BETWEEN span PRECEDING AND CURRENT ROW` does in SQL.

Every operation is exact under scaling of the values by a power of two (away from underflow), so ratios such as z do
not depend on the unit of quantity.
"""

from __future__ import annotations

import math
from bisect import bisect_left, insort
from typing import Final

import msgspec

LN2: Final = math.log(2.0)

_CANCELLATION: Final = 1e-6
"""A sum of squares that fell below this share of its peak has lost digits to cancellation and is computed afresh."""
_REBASE_EVERY: Final = 16_384
"""Additions and removals after which a compensated sum is computed afresh."""
_COMPACT_AT: Final = 128
"""Dead entries in front of a window before its lists are cut, where they are at least a quarter of all."""


def decay_weight(dt_ms: float, half_life_ms: float) -> float:
    """1 - 2^(-dt / half-life): weight of the new sample in an irregular moving average; 0 where time stood or went back."""
    return -math.expm1(-LN2 * dt_ms / half_life_ms) if dt_ms > 0 else 0.0


class RollingMoments(msgspec.Struct):
    """Mean and variance of the last `size` values, by Welford's update with removal.

    B. P. Welford, Technometrics 4(3), 1962; the replacing form is `m += (x - y) / n`,
    `M2 += (x - y) (x - m' + y - m)`. Rounding is bounded by an exact recomputation every `size` values, and at once
    when an outlier leaves. O(1) amortised.
    """

    size: int
    ring: list[float] = []
    head: int = 0
    mean: float = 0.0
    """Of the window; 0 while empty."""
    m2: float = 0.0
    """Sum of squared deviations from the mean; never negative."""
    peak: float = 0.0
    since: int = 0

    @property
    def count(self) -> int:
        """Values in the window."""
        return len(self.ring)

    def push(self, value: float) -> None:
        """Take one finite value; the oldest leaves once the window is full."""
        ring = self.ring
        count = len(ring)
        mean = self.mean
        if count < self.size:
            ring.append(value)
            diff = value - mean
            mean += diff / (count + 1)
            m2 = self.m2 + diff * (value - mean)
        else:
            head = self.head
            old = ring[head]
            ring[head] = value
            head += 1
            self.head = head if head < count else 0
            diff = value - old
            before = mean
            mean += diff / count
            m2 = self.m2 + diff * (value - mean + old - before)
        self.mean = mean
        self.m2 = m2 if m2 > 0.0 else 0.0
        if m2 > self.peak:
            self.peak = m2
        self.since += 1
        if self.since >= self.size or m2 < _CANCELLATION * self.peak:
            self._recompute()

    def _recompute(self) -> None:
        """Mean and squares afresh from the window, correctly rounded sums."""
        ring = self.ring
        mean = math.fsum(ring) / len(ring)
        self.mean = mean
        self.m2 = math.fsum([(value - mean) * (value - mean) for value in ring])
        self.peak = self.m2
        self.since = 0

    def sample_std(self) -> float:
        """Standard deviation with divisor n - 1; 0 below two values."""
        count = len(self.ring)
        return math.sqrt(self.m2 / (count - 1)) if count > 1 else 0.0

    def population_std(self) -> float:
        """Standard deviation with divisor n; 0 while empty."""
        count = len(self.ring)
        return math.sqrt(self.m2 / count) if count else 0.0


class SortedWindow(msgspec.Struct):
    """The last `size` values in order of arrival and of size: median and median absolute deviation.

    Insertion is a bisection and a memory move, which for some hundreds of values beats trees and heaps.
    """

    size: int
    ring: list[float] = []
    head: int = 0
    ordered: list[float] = []

    @property
    def count(self) -> int:
        """Values in the window."""
        return len(self.ring)

    def push(self, value: float) -> None:
        """Take one finite value; the oldest leaves once the window is full."""
        ring = self.ring
        count = len(ring)
        if count < self.size:
            ring.append(value)
        else:
            head = self.head
            del self.ordered[bisect_left(self.ordered, ring[head])]
            ring[head] = value
            head += 1
            self.head = head if head < count else 0
        insort(self.ordered, value)

    def median(self) -> float:
        """Middle value, or the mean of the two middle ones; 0 while empty."""
        ordered = self.ordered
        count = len(ordered)
        if not count:
            return 0.0
        half = count // 2
        return ordered[half] if count % 2 else 0.5 * (ordered[half - 1] + ordered[half])

    def mad(self) -> float:
        """Median of |value - median|, unscaled, in O(log n); 0 while empty.

        The deviations form two sorted runs around the median, so the k smallest are a slice of the window, whose start
        a bisection finds.
        """
        ordered = self.ordered
        count = len(ordered)
        if count < 2:
            return 0.0
        half = count // 2
        median = ordered[half] if count % 2 else 0.5 * (ordered[half - 1] + ordered[half])
        low, high = 0, count - half
        while low < high:
            middle = (low + high) // 2
            if median - ordered[middle] > ordered[middle + half] - median:
                low = middle + 1
            else:
                high = middle
        end = low + half
        above = ordered[end] - median if end < count else math.inf
        if low:
            below = median - ordered[low - 1]
            if below < above:
                above = below
        if count % 2:
            return above
        return 0.5 * (max(median - ordered[low], ordered[end - 1] - median) + above)


class WindowSum(msgspec.Struct):
    """Sum of the values of the last `span_ms` of event time, by Neumaier's compensated addition.

    A. Neumaier, Z. Angew. Math. Mech. 54, 1974. Values of one millisecond share an entry, so there are at most
    `span_ms + 1` of them.
    """

    span_ms: int
    times_ms: list[int] = []
    values: list[float] = []
    head: int = 0
    total: float = 0.0
    lost: float = 0.0
    """What rounding has taken from `total`."""
    since: int = 0

    def push(self, ts_ms: int, value: float) -> float:
        """Take one finite value; return the sum up to now."""
        times = self.times_ms
        values = self.values
        if len(times) > self.head and ts_ms <= times[-1]:
            values[-1] += value
        else:
            times.append(ts_ms)
            values.append(value)
            if times[self.head] < ts_ms - self.span_ms:
                self._evict(ts_ms - self.span_ms)
        self._add(value)
        self.since += 1
        if self.since >= _REBASE_EVERY:
            self._rebase()
        return self.total + self.lost

    def _evict(self, oldest_ms: int) -> None:
        times, values, head = self.times_ms, self.values, self.head
        while times[head] < oldest_ms:
            self._add(-values[head])
            head += 1
        self.head = head
        if head == len(times) - 1:
            self.total = self.lost = 0.0  # nothing is left but the value that is about to be added
            self.since = 0
        if head >= _COMPACT_AT and 4 * head >= len(times):
            del times[:head]
            del values[:head]
            self.head = 0

    def _add(self, value: float) -> None:
        total = self.total
        new = total + value
        if abs(total) >= abs(value):
            self.lost += (total - new) + value
        else:
            self.lost += (value - new) + total
        self.total = new

    def _rebase(self) -> None:
        self.total = math.fsum(self.values[self.head :])
        self.lost = 0.0
        self.since = 0


class DecayedMean(msgspec.Struct):
    """Exponentially weighted mean of irregular events, by decayed sums: S <- d S + x, N <- d N + 1, mean = S / N.

    d = 2^(-dt / half-life). Each event weighs the same however long it came after the one before, and `weight` (N) is
    the effective number of samples, which fades over a pause.
    """

    half_life_ms: float
    total: float = 0.0
    weight: float = 0.0
    ts_ms: int = 0

    def push(self, ts_ms: int, value: float) -> float:
        """Take one finite value; return the mean."""
        dt_ms = ts_ms - self.ts_ms
        if self.weight == 0.0:
            self.ts_ms = ts_ms
        elif dt_ms > 0:
            keep = math.exp(-LN2 * dt_ms / self.half_life_ms)
            self.total *= keep
            self.weight *= keep
            self.ts_ms = ts_ms
        self.total += value
        self.weight += 1.0
        return self.total / self.weight


class DecayedRate(msgspec.Struct):
    """Exponentially weighted rate: ln 2 / half-life times the sum of decayed values, in value units per second."""

    half_life_ms: float
    total: float = 0.0
    ts_ms: int | None = None

    def push(self, ts_ms: int, value: float) -> float:
        """Take one finite value; return the rate."""
        if self.ts_ms is None:
            self.ts_ms = ts_ms
        elif ts_ms > self.ts_ms:
            self.total *= math.exp(-LN2 * (ts_ms - self.ts_ms) / self.half_life_ms)
            self.ts_ms = ts_ms
        self.total += value
        return self.total * (1000.0 * LN2 / self.half_life_ms)


class RateCounter(msgspec.Struct):
    """Events per second over the last `span_ms` of event time; at most `span_ms + 1` entries."""

    span_ms: int
    times_ms: list[int] = []
    counts: list[int] = []
    head: int = 0
    total: int = 0
    first_ms: int | None = None
    newest_ms: int = 0

    def push(self, ts_ms: int) -> None:
        """Count an event; one whose time went back counts at the newest time."""
        if self.first_ms is None:
            self.first_ms = self.newest_ms = ts_ms
        self.total += 1
        if ts_ms > self.newest_ms:
            self.newest_ms = ts_ms
        elif len(self.counts) > self.head:
            self.counts[-1] += 1
            return
        self.times_ms.append(self.newest_ms)
        self.counts.append(1)

    def per_sec(self, now_ms: int) -> float | None:
        """The rate at `now_ms`, which must not go back; None until the span has passed since the first event."""
        if self.first_ms is None:
            return None
        oldest_ms = now_ms - self.span_ms
        times, counts, head = self.times_ms, self.counts, self.head
        while head < len(times) and times[head] < oldest_ms:
            self.total -= counts[head]
            head += 1
        if head >= _COMPACT_AT and 4 * head >= len(times):
            del times[:head]
            del counts[:head]
            head = 0
        self.head = head
        return 1000.0 * self.total / self.span_ms if oldest_ms >= self.first_ms else None
