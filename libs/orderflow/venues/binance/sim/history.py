"""The recent aggregate trades of each symbol, as `GET /fapi/v1/aggTrades` gives them."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from typing import Final

import msgspec

TRADES_KEPT: Final = 20_000
"""A symbol. Binance keeps two days; a bound in number keeps memory flat at any activity."""


class _Trade(msgspec.Struct):
    """An aggTrade payload in the order in which REST gives its fields; `nq` is missing before 2026."""

    a: int
    p: str
    q: str
    f: int
    l: int  # noqa: E741 (the exchange's name)
    T: int
    m: bool
    nq: str | msgspec.UnsetType = msgspec.UNSET


class _Data(msgspec.Struct):
    data: _Trade


class TradeHistory:
    """Bounded, in the order of publication; ids and times do not go back within a symbol."""

    def __init__(self, kept: int = TRADES_KEPT) -> None:
        self._kept = kept
        self._trades: dict[str, list[_Trade]] = {}
        self._decode = msgspec.json.Decoder(_Data).decode

    def add(self, symbol: str, frame: bytes) -> None:
        """Take one combined-stream aggTrade frame.

        Raises
        ------
        msgspec.DecodeError
            The frame is no aggTrade.
        """
        trades = self._trades.setdefault(symbol, [])
        trades.append(self._decode(frame).data)
        if len(trades) >= 2 * self._kept:
            # In halves, so that adding stays O(1) on average.
            del trades[: -self._kept]

    def first_id(self, symbol: str) -> int | None:
        """The oldest id that is kept; None before the first trade."""
        trades = self._recent(symbol)
        return trades[0].a if trades else None

    def from_id(self, symbol: str, first: int, limit: int) -> bytes:
        """JSON array of at most `limit` trades, from id `first` on; empty where it lies in the future."""
        trades = self._recent(symbol)
        at = bisect_left(trades, first, key=_id_of)
        return msgspec.json.encode(trades[at : at + limit])

    def between(self, symbol: str, start_ms: int | None, end_ms: int | None, limit: int) -> bytes:
        """JSON array of at most `limit` trades with T in [start_ms, end_ms]; the oldest if there is a start, else the newest."""
        trades = self._recent(symbol)
        begin = 0 if start_ms is None else bisect_left(trades, start_ms, key=_time_of)
        end = len(trades) if end_ms is None else bisect_right(trades, end_ms, key=_time_of)
        if start_ms is None:
            begin = max(0, end - limit)
        return msgspec.json.encode(trades[begin : min(end, begin + limit)])

    def _recent(self, symbol: str) -> list[_Trade]:
        return self._trades.get(symbol, [])[-self._kept :]


def _id_of(trade: _Trade) -> int:
    return trade.a


def _time_of(trade: _Trade) -> int:
    return trade.T
