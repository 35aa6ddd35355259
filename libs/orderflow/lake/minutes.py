"""Which minutes of a symbol hold no trade: the lake's empty one-minute buckets, counted as they pass. Pure."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from orderflow.counts import ProcessCounts

MS_PER_MINUTE: Final = 60_000
NS_PER_MINUTE: Final = 60_000_000_000
MAX_MINUTES: Final = 1440
"""After a longer leap of the clock only the newest so many are judged, and no more are kept of a symbol."""


class MinuteBuckets:
    """Minutes of the journal's clock, each judged once the next one has passed: trades come a little late.

    The first minute, which began before the first tick, is not judged.
    """

    def __init__(self) -> None:
        self.judged: dict[str, int] = {}
        """Per symbol: minutes that were judged."""
        self.empty: dict[str, int] = {}
        """Of these, without a trade."""
        self.counted = ProcessCounts()
        """The same counts, of the process's life."""
        self._traded: dict[str, set[int]] = {}
        self._newest: int | None = None
        """The newest minute that was judged, or the first one of all."""

    def begin_session(self) -> None:
        """Forget the market, keep the counts."""
        self._traded.clear()
        self._newest = None

    def trade(self, symbol: str, ts_ms: int) -> None:
        """A trade with T = `ts_ms`."""
        minutes = self._traded.get(symbol)
        if minutes is None:
            minutes = self._traded[symbol] = set()
        minute = ts_ms // MS_PER_MINUTE
        if minute not in minutes and len(minutes) < MAX_MINUTES:
            minutes.add(minute)

    def tick(self, clock_ts_ns: int, symbols: Iterable[str]) -> None:
        """A tick; `symbols` are those that it tells of, whether they trade or not."""
        minute = clock_ts_ns // NS_PER_MINUTE
        if self._newest is None:
            self._newest = minute
        last = minute - 2
        if last <= self._newest:
            return
        for symbol in sorted(self._traded.keys() | set(symbols)):
            self._judge(symbol, max(self._newest, last - MAX_MINUTES) + 1, last)
        self._newest = last

    def _judge(self, symbol: str, first: int, last: int) -> None:
        traded = self._traded.setdefault(symbol, set())
        minutes = last - first + 1
        empty = minutes - sum(first <= minute <= last for minute in traded)
        self.judged[symbol] = self.judged.get(symbol, 0) + minutes
        self.empty[symbol] = self.empty.get(symbol, 0) + empty
        self.counted.add("minutes", symbol, minutes)
        self.counted.add("empty_minutes", symbol, empty)
        self._traded[symbol] = {minute for minute in traded if minute > last}
