"""The aggressor's side of a trade: the exchange's flag, else Lee-Ready, else the tick rule, else nothing.

Lee and Ready, "Inferring trade direction from intraday data", J. Finance 46(2), 1991: a trade above the midpoint of the
prevailing quote is a buy, below it a sell, at it the tick rule decides. The prevailing quote is the newest one whose
matching engine time lies **strictly before** the trade's: a trade consumes the quote of its own millisecond, so that
one already shows the trade's effect. Arrival plays no part, since trades and quotes come over different sockets.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from typing import Annotated, Final, Literal, TypeAlias

import msgspec

Side: TypeAlias = Literal["buy", "sell"]
SideSource: TypeAlias = Literal["exchange", "lee_ready", "tick_rule", "none"]

_TS_LIMIT_MS: Final = 1 << 53
_UNUSABLE: Final = -1.0
"""Stands for the midpoint of a quote that has none: one-sided, crossed, not finite."""


class SideConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """How far the chain goes where the exchange gives no flag."""

    lee_ready: Annotated[bool, msgspec.Meta(description="use the prevailing quote")] = True
    tick_rule: Annotated[bool, msgspec.Meta(description="use the last price change")] = True
    tick_rule_max_repeats: Annotated[
        int, msgspec.Meta(ge=0, le=1_000_000, description="trades at an unchanged price that carry the last side")
    ] = 5
    tick_rule_max_gap_ms: Annotated[
        int, msgspec.Meta(ge=0, le=86_400_000, description="longest pause over which the tick rule reaches, ms")
    ] = 2000
    quote_max_age_ms: Annotated[
        int, msgspec.Meta(ge=1, le=86_400_000, description="oldest quote that Lee-Ready takes, ms before the trade")
    ] = 60_000
    quote_history: Annotated[
        int, msgspec.Meta(ge=1, le=65_536, description="quotes kept at least; twice as many at most")
    ] = 512


class _State(msgspec.Struct):
    quote_ts_ms: list[int] = []
    mids: list[float] = []
    price: float = 0.0
    """Of the last trade; 0 before the first."""
    trade_ts_ms: int = 0
    sign: int = 0
    """Of the last price change; 0 before the first."""
    repeats: int = 0
    quotes_unusable: int = 0
    quotes_too_old: int = 0
    trades_without_side: int = 0


class SideClassifier:
    """Classifies one symbol's trades in the order of their arrival. Memory is bounded by `quote_history`."""

    def __init__(self, config: SideConfig | None = None) -> None:
        self.config = config or SideConfig()
        self._state = _State()

    @property
    def quotes_unusable(self) -> int:
        """Quotes without a midpoint (one-sided, crossed, not finite, time out of range) so far."""
        return self._state.quotes_unusable

    @property
    def quotes_too_old(self) -> int:
        """Quotes that came when everything kept was newer, so far."""
        return self._state.quotes_too_old

    @property
    def trades_without_side(self) -> int:
        """Trades that no rule could classify so far."""
        return self._state.trades_without_side

    def on_quote(self, ts_ms: int, bid: float | None, ask: float | None) -> None:
        """Take a best quote, `ts_ms` = T. One without a midpoint blocks Lee-Ready until the next."""
        state = self._state
        if bid is not None and ask is not None and 0.0 < bid <= ask < 1e300:
            mid = 0.5 * (bid + ask)
        else:
            mid = _UNUSABLE
            state.quotes_unusable += 1
        times = state.quote_ts_ms
        if times and ts_ms >= times[-1] and ts_ms < _TS_LIMIT_MS:
            times.append(ts_ms)
            state.mids.append(mid)
        else:
            self._insert(ts_ms, mid)
        if len(times) > 2 * self.config.quote_history:
            surplus = len(times) - self.config.quote_history
            del times[:surplus]
            del state.mids[:surplus]

    def _insert(self, ts_ms: int, mid: float) -> None:
        """The rare quote that is the first, or whose time went back."""
        state = self._state
        if not -_TS_LIMIT_MS < ts_ms < _TS_LIMIT_MS:
            state.quotes_unusable += mid != _UNUSABLE
            return
        place = bisect_right(state.quote_ts_ms, ts_ms)
        if place == 0 and len(state.quote_ts_ms) >= self.config.quote_history:
            state.quotes_too_old += 1
            return
        state.quote_ts_ms.insert(place, ts_ms)
        state.mids.insert(place, mid)

    def classify(self, ts_ms: int, price: float | None, maker_flag: bool | None) -> tuple[Side | None, SideSource]:
        """Side of a trade and the rule that decided it.

        Parameters
        ----------
        ts_ms
            T, matching engine time.
        price
            Trade price, quote units; one that is not finite and positive is left to the flag alone.
        maker_flag
            Binance's `m`: true where the buyer was the maker, so that the aggressor sold; None where unknown.
        """
        tick_side: Side | None = None
        usable = price is not None and 0.0 < price < 1e300 and -_TS_LIMIT_MS < ts_ms < _TS_LIMIT_MS
        if usable:
            assert price is not None
            tick_side = self._tick(ts_ms, price)
        if maker_flag is not None:
            return ("sell" if maker_flag else "buy"), "exchange"
        if usable:
            assert price is not None
            if self.config.lee_ready:
                mid = self._prevailing_mid(ts_ms)
                if mid > 0.0 and price != mid:
                    return ("buy" if price > mid else "sell"), "lee_ready"
            if self.config.tick_rule and tick_side is not None:
                return tick_side, "tick_rule"
        self._state.trades_without_side += 1
        return None, "none"

    def _tick(self, ts_ms: int, price: float) -> Side | None:
        """The tick rule. It follows prices only, so it is the same whether or not flags came with them."""
        state, config = self._state, self.config
        if state.price == 0.0:
            state.price, state.trade_ts_ms = price, ts_ms
            return None
        within = ts_ms - state.trade_ts_ms <= config.tick_rule_max_gap_ms
        if price == state.price:
            state.repeats = min(state.repeats + 1, _TS_LIMIT_MS)
            if not within:
                state.sign = 0
            carried = within and state.repeats <= config.tick_rule_max_repeats
        else:
            state.sign = 1 if price > state.price else -1
            state.repeats = 0
            carried = True
        state.price = price
        state.trade_ts_ms = max(state.trade_ts_ms, ts_ms)
        if not carried or state.sign == 0:
            return None
        return "buy" if state.sign > 0 else "sell"

    def _prevailing_mid(self, ts_ms: int) -> float:
        """Midpoint of the newest quote strictly before `ts_ms`; negative where there is none that can be used."""
        state = self._state
        place = bisect_left(state.quote_ts_ms, ts_ms) - 1
        if place < 0 or ts_ms - state.quote_ts_ms[place] > self.config.quote_max_age_ms:
            return _UNUSABLE
        return state.mids[place]

    def snapshot(self) -> bytes:
        """The whole state. Restoring it gives the same future."""
        return msgspec.msgpack.encode(self._state)

    def restore(self, state: bytes) -> None:
        """Replace the state by one that `snapshot` returned.

        Raises
        ------
        msgspec.MsgspecError
            The bytes are no such state.
        """
        self._state = msgspec.msgpack.decode(state, type=_State)


def agreement(sides: Sequence[Side | None], truth: Sequence[Side]) -> float:
    """Share of trades whose inferred side is the true one; a trade without a side counts as a miss."""
    return sum(side == true for side, true in zip(sides, truth, strict=True)) / len(truth) if truth else float("nan")
