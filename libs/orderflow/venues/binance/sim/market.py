"""A seeded synthetic market: the same seed gives the same frames, byte for byte, however time is cut into steps.

**Prices.** The best bid and ask of a symbol are a jump process of their own: jumps of both quotes by a geometric number
of ticks, and now and then a spread that opens by a tick and closes again, on sides drawn by coin. Its random numbers
are its own, so at predictability 0 the path of the best prices does not depend on order flow in any way: not even on
the seed of the flow. The mid is then a martingale, and what an evaluation finds is chance.

**Flow.** Limit orders, cancellations and market orders come at a rate that switches between regimes (quiet, calm,
normal, turbulent; volatility switches along). A latent push, -1, 0 or +1, which lasts `horizon_ms` on average, leans the
taker side and the queues at the touch. It is there at any predictability, so that the flow looks the same.

**Predictability** p links the two: a jump goes up with probability 0.5 + 0.5 p x, where x is the push as it stood
`lead_ms` earlier. So flow shows first what prices then do: not at all at 0, as far as it can at 1. Measured over two
hours of BTCUSDT at the defaults, the change of CVD over 5 s against the sign of the mid's next 5 s has an AUC of 0.49 at
0, 0.54 at 0.2, 0.58 at 0.3, 0.65 at 0.5, 0.79 at 1 (standard error 0.015).

**Book.** Integer ticks and lots. A market order takes from the best queue but leaves something of it (prices move by
jumps alone); a jump is a market order that sweeps the levels in its way. Every change has an update id; ids grow over
all symbols, with gaps. bookTicker goes out on every change of the best price or quantity, depth every 100 ms, aggTrade
100 to 150 ms behind T. After a depth that ends at `u`, the best of the book are those of the bookTicker with the
greatest `u' <= u`.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from decimal import Decimal, InvalidOperation
from heapq import heappop, heappush
from random import Random
from typing import Annotated, Final, TypeAlias

import msgspec

from orderflow.errors import ConfigError
from orderflow.venues.binance.sim.instruments import Instrument

MarketFrame: TypeAlias = tuple[str, bytes, int]
"""(stream, combined-stream frame, E in milliseconds)."""

DEPTH_MS: Final = 100
AGG_WINDOW_MS: Final = 100
"""Fills at one price and side within this time make one aggTrade."""
AGG_LAG_MOST_MS: Final = 50
FUNDING_MS: Final = 8 * 3_600_000
START_MS: Final = 1_790_000_000_000
"""Where a market starts that is given no time."""

_FLOW, _PRICE, _DEPTH, _PUSH, _REGIME, _AGG, _MARK, _FAR = range(8)
_MS_US: Final = 1_000
_SEC_US: Final = 1_000_000
_NEVER_US: Final = 1 << 62

# Ids start from the time, so that those of a restarted exchange go on above those of the one before.
_UPDATE_IDS_PER_MS: Final = 1_000
_TRADE_IDS_PER_MS: Final = 4
_UPDATE_ID_GAP: Final = 40

_WINDOW_TICKS: Final = 400
"""Levels are placed up to this far from the touch, and cancelled beyond three times as far."""
_JUMP_MOST_TICKS: Final = 60
_FLOOR_TICKS: Final = 2 * _JUMP_MOST_TICKS
"""The best bid does not fall below this."""
_DENSITY: Final = 0.6
"""Share of the prices near the touch that hold orders."""
_WIDE_SHARE: Final = 0.2
_DEEP_MEAN_TICKS: Final = 30.0
_SWEEP_FILLS_MOST: Final = 6
_PUSH_LEAN: Final = 0.4
"""How far the push leans the taker side: P(buy) = 0.5 + 0.5 * 0.4 * push."""
_QUEUE_LEAN: Final = 0.4
_JUMPS_PER_SEC: Final = 1.5
_WIDENINGS_PER_SEC: Final = 0.1
_CLOSINGS_PER_SEC: Final = 6.0
_AT_TOUCH: Final = 0.55
_MARKET_ORDERS: Final = 0.10
_TOUCH_SHARE: Final = _AT_TOUCH + _MARKET_ORDERS
"""Share of flow events that change the best quantity: limit orders and cancellations there, and market orders."""
_TEXTS_KEPT: Final = 20_000


class _Regime(msgspec.Struct, frozen=True):
    weight: float
    dwell_sec: float
    activity: float
    volatility: float


_REGIMES: Final = (
    _Regime(weight=0.50, dwell_sec=60.0, activity=1.0, volatility=1.0),
    _Regime(weight=0.28, dwell_sec=60.0, activity=0.5, volatility=0.4),
    _Regime(weight=0.12, dwell_sec=20.0, activity=2.5, volatility=3.0),
    _Regime(weight=0.10, dwell_sec=6.0, activity=0.03, volatility=0.02),
)
_MEAN_ACTIVITY: Final = sum(each.weight * each.dwell_sec * each.activity for each in _REGIMES) / sum(
    each.weight * each.dwell_sec for each in _REGIMES
)


class SymbolSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """How a synthetic symbol looks. Prices and quantities on the wire have exactly the given decimals."""

    symbol: str
    price: Annotated[float, msgspec.Meta(gt=0, description="where it starts, in quote units")]
    tick: str
    step: str
    price_decimals: Annotated[int, msgspec.Meta(ge=0, le=8)]
    qty_decimals: Annotated[int, msgspec.Meta(ge=0, le=8)]
    touch_qty: Annotated[float, msgspec.Meta(gt=0, description="usual quantity at the best price, in base units")]
    notional_least: str = "5"
    volatility_bps: Annotated[
        float, msgspec.Meta(ge=0, le=20, description="of the mid, per square root of a second, in the normal regime")
    ] = 0.3

    def __post_init__(self) -> None:
        for name, value, decimals in (
            ("tick", self.tick, self.price_decimals),
            ("step", self.step, self.qty_decimals),
        ):
            if _units(value, decimals) < 1:
                raise ValueError(
                    f"{name} of {self.symbol} is {value!r}: it must be a decimal above 0 with at most {decimals} decimals"
                )

    def instrument(self) -> Instrument:
        return Instrument(
            self.symbol, self.tick, self.step, self.price_decimals, self.qty_decimals, self.notional_least
        )


def _units(value: str, decimals: int) -> int:
    """A decimal string in units of its last decimal; 0 where it is no such decimal."""
    try:
        scaled = Decimal(value).scaleb(decimals)
        return int(scaled) if scaled == scaled.to_integral_value() else 0
    except (InvalidOperation, ValueError, OverflowError):
        return 0


def _spec(symbol: str, price: float, tick: str, step: str, touch_qty: float, notional: str = "5") -> SymbolSpec:
    return SymbolSpec(
        symbol=symbol,
        price=price,
        tick=tick,
        step=step,
        price_decimals=len(tick.partition(".")[2]),
        qty_decimals=len(step.partition(".")[2]),
        touch_qty=touch_qty,
        notional_least=notional,
    )


SPECS: Final[dict[str, SymbolSpec]] = {
    each.symbol: each
    for each in (
        _spec("BTCUSDT", 84_551.0, "0.10", "0.001", 6.0, "50"),
        _spec("ETHUSDT", 3_120.0, "0.01", "0.001", 60.0, "20"),
        _spec("SOLUSDT", 168.0, "0.0100", "0.01", 450.0),
        _spec("BNBUSDT", 905.0, "0.010", "0.01", 25.0),
        _spec("XRPUSDT", 2.31, "0.0001", "0.1", 30_000.0),
        _spec("DOGEUSDT", 0.214, "0.000010", "1", 200_000.0),
        _spec("ADAUSDT", 0.79, "0.00010", "1", 60_000.0),
        _spec("LINKUSDT", 18.4, "0.001", "0.01", 300.0),
        _spec("AVAXUSDT", 27.6, "0.0010", "1", 300.0),
        _spec("LTCUSDT", 96.0, "0.01", "0.001", 120.0),
    )
}
DEFAULT_SYMBOLS: Final = ("BTCUSDT", "ETHUSDT", "SOLUSDT")


class SyntheticConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The dials of the synthetic market."""

    activity: Annotated[
        float,
        msgspec.Meta(gt=0, le=50_000, description="mean changes of the best quote a second and symbol, over regimes"),
    ] = 60.0
    predictability: Annotated[
        float, msgspec.Meta(ge=0, le=1, description="how far order flow foretells jumps: 0 not at all")
    ] = 0.0
    lead_ms: Annotated[
        int, msgspec.Meta(ge=0, le=600_000, description="how long the push shows in the flow before prices follow it")
    ] = 2_000
    horizon_ms: Annotated[int, msgspec.Meta(ge=100, le=3_600_000, description="how long a push lasts on average")] = (
        15_000
    )
    regimes: bool = True
    """Whether activity and volatility switch; off: the normal regime alone."""


def spec_of(symbol: str) -> SymbolSpec:
    """The spec of a well-known symbol, or of a made-up one.

    Raises
    ------
    ConfigError
        It is no symbol as the exchange writes them.
    """
    if not symbol or not symbol.isalnum() or symbol != symbol.upper():
        raise ConfigError(f"symbol is {symbol!r}: it must be letters and digits in upper case, as in BTCUSDT")
    return SPECS.get(symbol) or _spec(symbol, 10.0, "0.001", "0.1", 2_000.0)


class _Ids:
    """Update ids grow over all symbols; the gaps are what the exchange's other symbols use up."""

    __slots__ = ("last",)

    def __init__(self, last: int) -> None:
        self.last = last


class _Side:
    """One side of a book: ticks -> lots, best tick, what changed since the last depth frame.

    `sign` is +1 for bids and -1 for asks: `best - sign * d` is d ticks behind the best.
    """

    __slots__ = ("best", "dirty", "levels", "sign")

    def __init__(self, sign: int, best: int) -> None:
        self.sign = sign
        self.best = best
        self.levels: dict[int, int] = {}
        self.dirty: set[int] = set()

    def put(self, tick: int, lots: int) -> None:
        self.levels[tick] = lots
        self.dirty.add(tick)

    def drop(self, tick: int) -> None:
        if self.levels.pop(tick, None) is not None:
            self.dirty.add(tick)


class _Aggregate:
    """An aggTrade being gathered: fills of one taker side at one price within `AGG_WINDOW_MS` of the first."""

    __slots__ = ("first_id", "last_id", "lots", "taker_sold", "tick", "ts_ms")

    def __init__(self, tick: int, taker_sold: bool, lots: int, first_id: int, last_id: int, ts_ms: int) -> None:
        self.tick = tick
        self.taker_sold = taker_sold
        self.lots = lots
        self.first_id = first_id
        self.last_id = last_id
        self.ts_ms = ts_ms


_Heap: TypeAlias = list[tuple[int, int, int, int]]
"""(time in microseconds, kind, index of the symbol, generation)."""


class _Symbol:
    """One symbol's processes, driven by the market's heap. Times are microseconds of simulated time."""

    def __init__(
        self,
        spec: SymbolSpec,
        config: SyntheticConfig,
        start_us: int,
        index: int,
        ids: _Ids,
        heap: _Heap,
        seed: int,
        flow_seed: int,
    ) -> None:
        self.spec = spec
        self._config = config
        self._index = index
        self._ids = ids
        self._heap = heap
        # A generator for each process: what one draws must not move what another draws.
        self._flow = Random(f"{flow_seed}/{spec.symbol}/flow")
        self._push_rng = Random(f"{flow_seed}/{spec.symbol}/push")
        self._price = Random(f"{seed}/{spec.symbol}/price")
        self._regime_rng = Random(f"{seed}/{spec.symbol}/regime")

        self._tick_units = _units(spec.tick, spec.price_decimals)
        self._step_units = _units(spec.step, spec.qty_decimals)
        self._touch_lots = max(2.0, spec.touch_qty / float(spec.step))
        self._price_texts: dict[int, str] = {}
        self._regime = _REGIMES[0]
        self._generations = [0] * (_FAR + 1)
        """A scheduled event of an older generation is void: its rate has changed since."""
        self._push = 0
        self._pushes: deque[tuple[int, int]] = deque()
        """Changes of the push that prices have yet to follow: (from when, value)."""
        self._felt = 0
        self._jumps_per_sec, self._jump_log = _jump_law(spec)

        bid = max(_FLOOR_TICKS, round(spec.price / float(spec.tick)))
        self.bids = _Side(1, bid)
        self.asks = _Side(-1, bid + 1)
        self._fill_book()
        self.update_id = self._new_id()
        self._last_depth_id = self.update_id
        self._first_id = 0
        """The first update that no depth frame has shown yet; 0 for none."""
        self._changed_us = start_us
        start_ms = start_us // _MS_US
        self._agg_id = start_ms
        self._trade_id = start_ms * _TRADE_IDS_PER_MS
        self._aggregates: deque[_Aggregate] = deque()
        """In the order in which they will be sent; the newest may still grow."""
        self._last_agg_us = 0

        name = spec.symbol.lower()
        self._quote_stream = f"{name}@bookTicker"
        self._depth_stream = f"{name}@depth@{DEPTH_MS}ms"
        self._agg_stream = f"{name}@aggTrade"
        self._mark_stream = f"{name}@markPrice"
        self._schedule_first(start_us)

    def run(self, kind: int, generation: int, at_us: int, out: list[MarketFrame]) -> None:
        """Let happen what is due, and schedule what follows."""
        if generation != self._generations[kind]:
            return
        if kind == _FLOW:
            self._flow_event(at_us, out)
            self._schedule(at_us + self._flow_gap_us(), _FLOW)
        elif kind == _AGG:
            self._send_aggregate(at_us, out)
        elif kind == _DEPTH:
            self._send_depth(at_us, out)
            self._schedule(at_us + DEPTH_MS * _MS_US, _DEPTH)
        elif kind == _PRICE:
            self._price_event(at_us, out)
            self._schedule(at_us + self._price_gap_us(), _PRICE)
        elif kind == _MARK:
            self._send_mark(at_us, out)
            self._schedule(at_us + _SEC_US, _MARK)
        elif kind == _FAR:
            self._cancel_far(at_us)
            self._schedule(at_us + _SEC_US, _FAR)
        elif kind == _PUSH:
            self._change_push(at_us)
            self._schedule(at_us + self._push_gap_us(), _PUSH)
        else:
            self._change_regime(at_us)

    # Scheduling

    def _schedule(self, at_us: int, kind: int) -> None:
        heappush(self._heap, (at_us, kind, self._index, self._generations[kind]))

    def _schedule_first(self, start_us: int) -> None:
        phase_us = (self._index * 17 % DEPTH_MS + 1) * _MS_US
        self._schedule(start_us + self._flow_gap_us(), _FLOW)
        self._schedule(start_us + self._price_gap_us(), _PRICE)
        self._schedule(start_us + phase_us, _DEPTH)
        self._schedule(start_us + self._push_gap_us(), _PUSH)
        self._schedule(start_us + self._regime_gap_us(), _REGIME)
        self._schedule(start_us + _SEC_US, _FAR)
        # A millisecond before the full second, for E is one after the event: mark prices are aligned.
        self._schedule((start_us // _SEC_US + 1) * _SEC_US - _MS_US, _MARK)

    def _flow_gap_us(self) -> int:
        rate = self._config.activity / _TOUCH_SHARE * self._regime.activity
        if self._config.regimes:
            rate /= _MEAN_ACTIVITY
        return 1 + int(self._flow.expovariate(rate) * _SEC_US)

    def _price_rates(self) -> tuple[float, float]:
        """Jumps, and steps of one side, a second."""
        volatility = self._regime.volatility
        wide = self.asks.best - self.bids.best > 1
        return self._jumps_per_sec * volatility, _CLOSINGS_PER_SEC if wide else _WIDENINGS_PER_SEC * volatility

    def _price_gap_us(self) -> int:
        jumps, steps = self._price_rates()
        return 1 + int(self._price.expovariate(jumps + steps) * _SEC_US)

    def _push_gap_us(self) -> int:
        return 1 + int(self._push_rng.expovariate(1_000 / self._config.horizon_ms) * _SEC_US)

    def _regime_gap_us(self) -> int:
        if not self._config.regimes:
            return _NEVER_US
        return 1 + int(self._regime_rng.expovariate(1 / self._regime.dwell_sec) * _SEC_US)

    # Latent processes

    def _change_push(self, at_us: int) -> None:
        others = [value for value in (-1, 0, 1) if value != self._push]
        self._push = others[self._push_rng.random() < 0.5]
        self._pushes.append((at_us + self._config.lead_ms * _MS_US, self._push))

    def _change_regime(self, at_us: int) -> None:
        draw = self._regime_rng.random()
        for regime in _REGIMES:
            self._regime = regime
            draw -= regime.weight
            if draw < 0:
                break
        for kind in (_FLOW, _PRICE):
            self._generations[kind] += 1
        self._schedule(at_us + self._flow_gap_us(), _FLOW)
        self._schedule(at_us + self._price_gap_us(), _PRICE)
        self._schedule(at_us + self._regime_gap_us(), _REGIME)

    # Prices: draws from `_price` (and the regime's) alone decide the best ticks

    def _price_event(self, at_us: int, out: list[MarketFrame]) -> None:
        while self._pushes and self._pushes[0][0] <= at_us:
            self._felt = self._pushes.popleft()[1]
        jumps, steps = self._price_rates()
        kind, side, size = self._price.random(), self._price.random(), self._price.random()
        if kind * (jumps + steps) < jumps:
            ticks = min(_JUMP_MOST_TICKS, 1 + int(math.log(1.0 - size) / self._jump_log)) if self._jump_log else 1
            up = side < 0.5 + 0.5 * self._config.predictability * self._felt
            self._jump(ticks if up or self.bids.best - ticks < _FLOOR_TICKS else -ticks, at_us)
        else:
            moved = self.bids if side < 0.5 else self.asks
            wide = self.asks.best - self.bids.best > 1
            self._set_best(moved, moved.best + (moved.sign if wide else -moved.sign))
        self._send_quote(at_us, out)

    def _jump(self, shift: int, at_us: int) -> None:
        """Both quotes move by `shift` ticks: a market order sweeps one side, limit orders fill up the other.

        One update, since half of a jump would foretell its other half.
        """
        swept, followed = (self.asks, self.bids) if shift > 0 else (self.bids, self.asks)
        fills = 0
        for distance in range(abs(shift)):
            tick = swept.best - swept.sign * distance
            lots = swept.levels.get(tick)
            if lots is not None and fills < _SWEEP_FILLS_MOST:
                self._fill(tick, shift < 0, lots, at_us)
                fills += 1
        self._set_best(swept, swept.best + shift)
        old = followed.best
        self._set_best(followed, old + shift)
        for tick in range(min(old, followed.best) + 1, max(old, followed.best)):
            if self._flow.random() < _DENSITY:
                followed.put(tick, self._lots(1.0))

    def _set_best(self, side: _Side, tick: int) -> None:
        """Levels in front of the new best go; there is always more than one lot at it."""
        for each in range(tick + side.sign, side.best + side.sign, side.sign):
            side.drop(each)
        side.best = tick
        if side.levels.get(tick, 0) < 2:
            side.put(tick, 1 + self._lots(1.0 + _QUEUE_LEAN * self._push * side.sign))

    # Order flow: draws from `_flow` decide quantities and trades

    def _flow_event(self, at_us: int, out: list[MarketFrame]) -> None:
        draw = self._flow.random()
        if draw < _AT_TOUCH:
            self._touch_event(self.bids if draw < _AT_TOUCH / 2 else self.asks)
            self._send_quote(at_us, out)
        elif draw < _TOUCH_SHARE:
            if self._market_order(at_us):
                self._send_quote(at_us, out)
        elif self._deep_event(self.bids if draw < (_TOUCH_SHARE + 1) / 2 else self.asks):
            self._new_update(at_us)

    def _touch_event(self, side: _Side) -> None:
        """A limit order or a cancellation at the best price: the queue returns to its usual size, which the push leans."""
        usual = self._touch_lots * (1.0 + _QUEUE_LEAN * self._push * side.sign)
        queue = side.levels[side.best]
        size = 1 + int(self._flow.expovariate(1.0) * self._touch_lots * 0.15)
        if self._flow.random() * (queue + usual) < usual or queue < 2:
            queue += size
        else:
            queue -= min(size, queue - 1)
        side.put(side.best, queue)

    def _market_order(self, at_us: int) -> bool:
        """A taker order that leaves something at the best price; whether there was enough for one."""
        buys = self._flow.random() < 0.5 + 0.5 * _PUSH_LEAN * self._push
        size = 1 + int(self._flow.expovariate(1.0) * self._touch_lots * 0.08)
        side = self.asks if buys else self.bids
        queue = side.levels[side.best]
        if queue < 2:
            return False
        size = min(size, queue - 1)
        side.put(side.best, queue - size)
        self._fill(side.best, not buys, size, at_us)
        return True

    def _deep_event(self, side: _Side) -> bool:
        """A limit order or a cancellation behind the best price; whether the price is one."""
        draw = self._flow.random()
        if draw < _WIDE_SHARE:
            distance = 1 + int(draw / _WIDE_SHARE * _WINDOW_TICKS)
        else:
            distance = 1 + min(_WINDOW_TICKS, int(self._flow.expovariate(1 / _DEEP_MEAN_TICKS)))
        tick = side.best - side.sign * distance
        if tick < 1:
            return False
        if tick in side.levels and self._flow.random() < 0.5:
            side.drop(tick)
        else:
            side.put(tick, self._lots(1.0))
        return True

    def _cancel_far(self, at_us: int) -> None:
        """Cancel what the market has left far behind, so that a book stays bounded."""
        changed = False
        for side in (self.bids, self.asks):
            far = [tick for tick in side.levels if (side.best - tick) * side.sign > 3 * _WINDOW_TICKS]
            for tick in far:
                side.drop(tick)
            changed = changed or bool(far)
        if changed:
            self._new_update(at_us)

    def _fill_book(self) -> None:
        for side in (self.bids, self.asks):
            side.put(side.best, 1 + self._lots(1.0))
            for distance in range(1, _WINDOW_TICKS + 1):
                tick = side.best - side.sign * distance
                if tick >= 1 and self._flow.random() < _DENSITY:
                    side.put(tick, self._lots(1.0))
            side.dirty.clear()

    def _lots(self, lean: float) -> int:
        """A heavy-tailed size around the usual one."""
        scale = self._touch_lots * lean
        if self._flow.random() < 0.05:
            scale *= 5
        return 1 + int(self._flow.expovariate(1.0) * scale)

    def _fill(self, tick: int, taker_sold: bool, lots: int, at_us: int) -> None:
        """A taker order's fills at one price: they join the newest aggTrade or open one."""
        at_ms = at_us // _MS_US
        first_id = self._trade_id
        self._trade_id += 1 + min(lots - 1, int(self._flow.expovariate(1.0)))
        if self._aggregates:
            newest = self._aggregates[-1]
            if (
                newest.tick == tick
                and newest.taker_sold == taker_sold
                and at_ms - newest.ts_ms < AGG_WINDOW_MS
                and at_us < self._last_agg_us
            ):
                newest.lots += lots
                newest.last_id = self._trade_id - 1
                return
        self._aggregates.append(_Aggregate(tick, taker_sold, lots, first_id, self._trade_id - 1, at_ms))
        lag_ms = AGG_WINDOW_MS + self._flow.randrange(AGG_LAG_MOST_MS)
        self._last_agg_us = max(self._last_agg_us, (at_ms + lag_ms) * _MS_US)
        self._schedule(self._last_agg_us, _AGG)

    # Frames

    def _new_id(self) -> int:
        self._ids.last += 2 + int(self._flow.random() * _UPDATE_ID_GAP)
        return self._ids.last

    def _new_update(self, at_us: int) -> None:
        self.update_id = self._new_id()
        self._changed_us = at_us
        if not self._first_id:
            self._first_id = self.update_id

    def _send_quote(self, at_us: int, out: list[MarketFrame]) -> None:
        """One update of the book, and the bookTicker that shows it."""
        self._new_update(at_us)
        at_ms = at_us // _MS_US
        bids, asks = self.bids, self.asks
        symbol = self.spec.symbol
        frame = (
            f'{{"stream":"{self._quote_stream}","data":{{"e":"bookTicker","u":{self.update_id},"s":"{symbol}",'
            f'"ps":"{symbol}","b":"{self._px(bids.best)}","B":"{self._qty(bids.levels[bids.best])}",'
            f'"a":"{self._px(asks.best)}","A":"{self._qty(asks.levels[asks.best])}",'
            f'"T":{at_ms},"E":{at_ms + 1},"st":1}}}}'
        )
        out.append((self._quote_stream, frame.encode(), at_ms + 1))

    def _send_depth(self, at_us: int, out: list[MarketFrame]) -> None:
        """The levels that changed, with absolute quantities; nothing where nothing changed."""
        if not self._first_id:
            return
        event_ms = at_us // _MS_US + 1
        symbol = self.spec.symbol
        frame = (
            f'{{"stream":"{self._depth_stream}","data":{{"e":"depthUpdate","E":{event_ms},'
            f'"T":{self._changed_us // _MS_US},"s":"{symbol}","ps":"{symbol}","U":{self._first_id},'
            f'"u":{self.update_id},"pu":{self._last_depth_id},'
            f'"b":[{self._changes(self.bids)}],"a":[{self._changes(self.asks)}],"st":1}}}}'
        )
        self._last_depth_id = self.update_id
        self._first_id = 0
        out.append((self._depth_stream, frame.encode(), event_ms))

    def _changes(self, side: _Side) -> str:
        levels = side.levels
        text = ",".join([f'["{self._px(tick)}","{self._qty(levels.get(tick, 0))}"]' for tick in sorted(side.dirty)])
        side.dirty.clear()
        return text

    def _send_aggregate(self, at_us: int, out: list[MarketFrame]) -> None:
        trade = self._aggregates.popleft()
        event_ms = at_us // _MS_US + 1
        quantity = self._qty(trade.lots)
        frame = (
            f'{{"stream":"{self._agg_stream}","data":{{"e":"aggTrade","E":{event_ms},"a":{self._agg_id},'
            f'"s":"{self.spec.symbol}","p":"{self._px(trade.tick)}","q":"{quantity}","nq":"{quantity}",'
            f'"f":{trade.first_id},"l":{trade.last_id},"T":{trade.ts_ms},'
            f'"m":{"true" if trade.taker_sold else "false"},"st":1}}}}'
        )
        self._agg_id += 1
        out.append((self._agg_stream, frame.encode(), event_ms))

    def _send_mark(self, at_us: int, out: list[MarketFrame]) -> None:
        """Mark price: the mid; the stream without a suffix every 3 s."""
        event_ms = at_us // _MS_US + 1
        mid = (self.bids.best + self.asks.best) * self._tick_units * 10 ** (8 - self.spec.price_decimals) // 2
        mark, index = _decimal(mid, 8), _decimal(mid - mid // 5_000, 8)
        data = (
            f'{{"e":"markPriceUpdate","E":{event_ms},"s":"{self.spec.symbol}","p":"{mark}","ap":"{mark}",'
            f'"P":"{index}","i":"{index}","r":"0.00010000","T":{(event_ms // FUNDING_MS + 1) * FUNDING_MS},"st":1}}'
        )
        every = 3 * _SEC_US // _MS_US
        for stream in (f"{self._mark_stream}@1s", *((self._mark_stream,) if event_ms % every == 0 else ())):
            out.append((stream, f'{{"stream":"{stream}","data":{data}}}'.encode(), event_ms))

    def snapshot(self, limit: int, at_ms: int) -> bytes:
        """Body of `GET /fapi/v1/depth`."""
        sides = (
            ",".join(f'["{self._px(tick)}","{self._qty(side.levels[tick])}"]' for tick in self._best_first(side, limit))
            for side in (self.bids, self.asks)
        )
        bids, asks = sides
        return (
            f'{{"lastUpdateId":{self.update_id},"E":{at_ms},"T":{self._changed_us // _MS_US},'
            f'"bids":[{bids}],"asks":[{asks}]}}'
        ).encode()

    @staticmethod
    def _best_first(side: _Side, limit: int) -> list[int]:
        return sorted(side.levels, reverse=side.sign > 0)[:limit]

    def _px(self, tick: int) -> str:
        text = self._price_texts.get(tick)
        if text is None:
            if len(self._price_texts) >= _TEXTS_KEPT:
                self._price_texts.clear()
            text = self._price_texts[tick] = _decimal(tick * self._tick_units, self.spec.price_decimals)
        return text

    def _qty(self, lots: int) -> str:
        return _decimal(lots * self._step_units, self.spec.qty_decimals)


class SyntheticMarket:
    """Several symbols on one simulated clock.

    Frames come ordered by E. Cutting time into other steps changes nothing.
    """

    def __init__(
        self,
        seed: int,
        symbols: Sequence[str] = DEFAULT_SYMBOLS,
        *,
        start_ms: int = START_MS,
        config: SyntheticConfig | None = None,
        specs: Sequence[SymbolSpec] = (),
        flow_seed: int | None = None,
    ) -> None:
        """
        Parameters
        ----------
        specs : looks of symbols that are not, or should not be as, in `SPECS`.
        flow_seed : another seed for the order flow alone; at predictability 0 the best prices stay what they were.

        Raises
        ------
        ConfigError
            No symbol, one of them twice, or a name that is none.
        """
        if not symbols or len(set(symbols)) != len(symbols):
            raise ConfigError(f"symbols are {list(symbols)}: give at least one, and each once")
        own = {each.symbol: each for each in specs}
        chosen = [own.get(symbol) or spec_of(symbol) for symbol in sorted(symbols)]
        self.config = config or SyntheticConfig()
        self.now_ms = start_ms
        """Simulated time: every frame with E up to here has been given out."""
        self._heap: _Heap = []
        ids = _Ids(start_ms * _UPDATE_IDS_PER_MS)
        self._symbols = [
            _Symbol(
                spec,
                self.config,
                start_ms * _MS_US,
                index,
                ids,
                self._heap,
                seed,
                seed if flow_seed is None else flow_seed,
            )
            for index, spec in enumerate(chosen)
        ]
        self._by_name = {each.spec.symbol: each for each in self._symbols}

    @property
    def specs(self) -> tuple[SymbolSpec, ...]:
        """Of its symbols, sorted by name."""
        return tuple(each.spec for each in self._symbols)

    def advance(self, to_ms: int) -> list[MarketFrame]:
        """Let time pass: the frames with E up to `to_ms` that have not been given out yet, by E."""
        out: list[MarketFrame] = []
        heap = self._heap
        symbols = self._symbols
        end_us = to_ms * _MS_US
        while heap[0][0] < end_us:
            at_us, kind, index, generation = heappop(heap)
            symbols[index].run(kind, generation, at_us, out)
        self.now_ms = max(self.now_ms, to_ms)
        return out

    def snapshot(self, symbol: str, limit: int) -> bytes:
        """Body of `GET /fapi/v1/depth` now, at most `limit` levels a side.

        Raises
        ------
        KeyError
            The market has no such symbol.
        """
        return self._by_name[symbol].snapshot(limit, self.now_ms)


def _jump_law(spec: SymbolSpec) -> tuple[float, float]:
    """Jumps a second in the normal regime, and log(1 - 1/m) of their geometric size (0 for always one tick).

    The size k of mean m has E[k^2] = 2 m^2 - m, so that the variance a second is that of `volatility_bps`. Where it
    is less than a tick a jump, jumps become rarer instead.
    """
    ticks = spec.volatility_bps * 1e-4 * spec.price / float(spec.tick)
    square = ticks * ticks / _JUMPS_PER_SEC
    if square <= 1.0:
        return _JUMPS_PER_SEC * square, 0.0
    mean = (1.0 + math.sqrt(1.0 + 8.0 * square)) / 4.0
    return _JUMPS_PER_SEC, math.log1p(-1.0 / mean)


def _decimal(units: int, decimals: int) -> str:
    """`845511`, 1 -> `84551.1`."""
    if not decimals:
        return str(units)
    whole, fraction = divmod(units, 10**decimals)
    return f"{whole}.{fraction:0{decimals}d}"
