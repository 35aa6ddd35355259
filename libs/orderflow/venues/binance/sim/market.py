"""A seeded synthetic market: the same seed gives the same frames, byte for byte, however time is cut into steps.

**Prices.** The best bid and ask of a symbol are a jump process of their own: jumps of both quotes by a geometric number
of ticks, and now and then a spread that opens by a tick and closes again, on sides drawn by coin. Its random numbers
are its own, so at predictability 0 the path of the best prices does not depend on order flow in any way: not even on
the seed of the flow. The mid is then a martingale, and what an evaluation finds is chance.

**Flow.** Limit orders, cancellations and market orders come at a rate that switches between regimes (quiet, calm,
normal, turbulent; volatility switches along). A latent push, -1, 0 or +1, which lasts `horizon_ms` on average, leans the
taker side and the queues at the touch. It is there at any predictability, so that the flow looks the same.

**Predictability** p links the two: a jump goes up with probability 0.5 + 0.5 p x, where x is the push as it stood
`lead_ms` earlier. So flow shows first what prices then do: not at all at 0, as far as it can at 1.

**Book.** Integer ticks and lots. A market order takes from the best queue but leaves something of it (prices move by
jumps alone); a jump is a market order that sweeps the levels in its way. Every change has an update id; ids grow over
all symbols, with gaps. bookTicker goes out on every change of the best price or quantity, depth every 100 ms, aggTrade
100 to 150 ms behind T. After a depth that ends at `u`, the best of the book are those of the bookTicker with the
greatest `u' <= u`.
"""

from __future__ import annotations

import heapq
import math
from collections import deque
from collections.abc import Sequence
from random import Random
from typing import Annotated, Final

import msgspec

from orderflow.errors import ConfigError
from orderflow.venues.binance.sim.instruments import Instrument

DEPTH_MS: Final = 100
AGG_WINDOW_MS: Final = 100
"""Fills at one price and side within this time make one aggTrade."""
AGG_LAG_MOST_MS: Final = 50
FUNDING_MS: Final = 8 * 3_600_000
START_MS: Final = 1_790_000_000_000
"""Where a market starts that is given no time."""

_FLOW, _PRICE, _DEPTH, _PUSH, _REGIME, _AGG, _MARK, _FAR = range(8)
_SEC_US: Final = 1_000_000

_WINDOW_TICKS: Final = 400
"""Levels are placed up to this far from the touch, and cancelled beyond three times as far."""
_JUMP_MOST_TICKS: Final = 60
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
_STRINGS_KEPT: Final = 20_000


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

    def instrument(self) -> Instrument:
        return Instrument(
            self.symbol, self.tick, self.step, self.price_decimals, self.qty_decimals, self.notional_least
        )


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
    horizon_ms: Annotated[
        int, msgspec.Meta(ge=100, le=3_600_000, description="how long a push lasts on average")
    ] = 15_000
    regimes: bool = True
    """Whether activity and volatility switch; off: the normal regime alone."""


class SymbolEvent(msgspec.Struct, frozen=True):
    """One frame of the market: its stream, its combined-stream bytes, and E in milliseconds."""

    stream: str
    payload: bytes
    event_ts_ms: int


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

    __slots__ = ("next",)

    def __init__(self, first: int) -> None:
        self.next = first


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


class _Symbol:
    """One symbol's processes. Times are microseconds of simulated time; the market calls `run` at those it asked for."""

    def __init__(
        self, spec: SymbolSpec, config: SyntheticConfig, ids: _Ids, start_us: int, seed: int, flow_seed: int
    ) -> None:
        self.spec = spec
        self.config = config
        self._ids = ids
        # A generator for each process: what one draws must not move what another draws.
        self._flow = Random(f"{flow_seed}/{spec.symbol}/flow")
        self._price = Random(f"{seed}/{spec.symbol}/price")
        self._push_rng = Random(f"{flow_seed}/{spec.symbol}/push")
        self._regime_rng = Random(f"{seed}/{spec.symbol}/regime")

        self._tick_units = round(float(spec.tick) * 10**spec.price_decimals)
        self._touch_lots = max(2.0, spec.touch_qty * 10**spec.qty_decimals / self._step_units())
        self._strings: dict[int, str] = {}
        self.regime = _REGIMES[0]
        self._push = 0
        self._pushes: deque[tuple[int, int]] = deque()
        """Changes of the push that prices have yet to follow: (from when, value)."""
        self._felt = 0
        self._jump_rate, self._jump_log = self._jumps()

        bid = max(2 * _JUMP_MOST_TICKS, round(spec.price / float(spec.tick)))
        self.bids = _Side(1, bid)
        self.asks = _Side(-1, bid + 1)
        self._fill_book()
        self.update_id = self._new_id()
        self._last_depth_id = self.update_id
        self._first_id = 0
        self._changed_us = start_us
        self._agg_id = 1_000_000_000 + self._flow.randrange(1_000_000)
        self._trade_id = 3_000_000_000 + self._flow.randrange(1_000_000)
        self._open: list[int] | None = None
        """The aggTrade being gathered: tick, taker sold, lots, first id, last id, T in ms."""
        self._closed: deque[tuple[int, list[int]]] = deque()
        """Gathered ones until they are sent: (E in ms, as above)."""
        self._last_agg_e = 0

        name = spec.symbol.lower()
        self.quote_stream = f"{name}@bookTicker"
        self.depth_stream = f"{name}@depth@100ms"
        self.agg_stream = f"{name}@aggTrade"
        self.mark_streams = (f"{name}@markPrice@1s", f"{name}@markPrice")
        self.generations = [0] * 8
        """A scheduled event of an older generation is void: its rate has changed since."""

    # Scheduling

    def first_events(self, start_us: int, index: int) -> list[tuple[int, int]]:
        """(time, kind) of what happens first."""
        return [
            (start_us + self._flow_gap(), _FLOW),
            (start_us + self._price_gap(), _PRICE),
            (start_us + (index * 17 % DEPTH_MS + 1) * 1_000, _DEPTH),
            (start_us + self._push_gap(), _PUSH),
            (start_us + self._regime_gap(), _REGIME),
            ((start_us // _SEC_US + 1) * _SEC_US, _MARK),
            (start_us + _SEC_US, _FAR),
        ]

    def run(self, kind: int, at_us: int, out: list[SymbolEvent]) -> list[tuple[int, int]]:
        """Let what is due happen; returns what it schedules, as (time, kind)."""
        if kind == _FLOW:
            self._flow_event(at_us, out)
            events = [(at_us + self._flow_gap(), _FLOW)]
            return events if self._open is None else [*events, *self._await_agg()]
        if kind == _DEPTH:
            self._depth_event(at_us, out)
            return [(at_us + DEPTH_MS * 1_000, _DEPTH)]
        if kind == _AGG:
            self._agg_event(at_us, out)
            return []
        if kind == _PRICE:
            self._price_event(at_us, out)
            return [(at_us + self._price_gap(), _PRICE), *self._await_agg()]
        if kind == _PUSH:
            self._push_event(at_us)
            return [(at_us + self._push_gap(), _PUSH)]
        if kind == _REGIME:
            return self._regime_event(at_us)
        if kind == _MARK:
            self._mark_event(at_us, out)
            return [(at_us + _SEC_US, _MARK)]
        self._far_event(at_us)
        return [(at_us + _SEC_US, _FAR)]

    def _flow_gap(self) -> int:
        rate = self.config.activity / _TOUCH_SHARE * self.regime.activity
        if self.config.regimes:
            rate /= _MEAN_ACTIVITY
        return 1 + int(self._flow.expovariate(rate) * _SEC_US)

    def _price_gap(self) -> int:
        spread = self.asks.best - self.bids.best
        rate = self._jump_rate * self.regime.volatility + (
            _CLOSINGS_PER_SEC if spread > 1 else _WIDENINGS_PER_SEC * self.regime.volatility
        )
        return 1 + int(self._price.expovariate(max(rate, 1e-6)) * _SEC_US)

    def _push_gap(self) -> int:
        return 1 + int(self._push_rng.expovariate(1_000 / self.config.horizon_ms) * _SEC_US)

    def _regime_gap(self) -> int:
        if not self.config.regimes:
            return 1 << 60
        return 1 + int(self._regime_rng.expovariate(1 / self.regime.dwell_sec) * _SEC_US)

    def _jumps(self) -> tuple[float, float]:
        """Jumps a second and log(1 - 1/m) of their geometric size, so that the variance is what the spec says.

        With size k geometric of mean m, E[k^2] = 2 m^2 - m; below one tick of variance a jump, jumps become rarer.
        """
        ticks = self.spec.volatility_bps * 1e-4 * self.spec.price / float(self.spec.tick)
        square = ticks * ticks / _JUMPS_PER_SEC
        if square <= 1.0:
            return _JUMPS_PER_SEC * square, -math.inf
        mean = (1 + math.sqrt(1 + 8 * square)) / 4
        return _JUMPS_PER_SEC, math.log1p(-1 / mean)

    # Latent processes

    def _push_event(self, at_us: int) -> None:
        others = [value for value in (-1, 0, 1) if value != self._push]
        self._push = others[self._push_rng.random() < 0.5]
        self._pushes.append((at_us + self.config.lead_ms * 1_000, self._push))

    def _regime_event(self, at_us: int) -> list[tuple[int, int]]:
        draw = self._regime_rng.random()
        for regime in _REGIMES:
            draw -= regime.weight
            if draw < 0:
                break
        self.regime = regime
        self.generations[_FLOW] += 1
        self.generations[_PRICE] += 1
        return [
            (at_us + self._regime_gap(), _REGIME),
            (at_us + self._flow_gap(), _FLOW),
            (at_us + self._price_gap(), _PRICE),
        ]

    # Prices: draws from self._price alone decide the best ticks

    def _price_event(self, at_us: int, out: list[SymbolEvent]) -> None:
        while self._pushes and self._pushes[0][0] <= at_us:
            self._felt = self._pushes.popleft()[1]
        spread = self.asks.best - self.bids.best
        jump_rate = self._jump_rate * self.regime.volatility
        other = _CLOSINGS_PER_SEC if spread > 1 else _WIDENINGS_PER_SEC * self.regime.volatility
        kind, side, size = self._price.random(), self._price.random(), self._price.random()
        if kind * (jump_rate + other) < jump_rate:
            up = side < 0.5 + 0.5 * self.config.predictability * self._felt
            ticks = 1 + int(math.log(1.0 - size) / self._jump_log) if self._jump_log > -math.inf else 1
            self._jump(up, min(ticks, _JUMP_MOST_TICKS), at_us)
        else:
            bid_side = side < 0.5
            moved = self.bids if bid_side else self.asks
            # Widening steps a side back, closing steps it forward.
            self._set_best(moved, moved.best + (moved.sign if spread > 1 else -moved.sign))
        self._quote(at_us, out)

    def _jump(self, up: bool, ticks: int, at_us: int) -> None:
        """Both quotes move by `ticks`: a market order sweeps one side, orders fill up the other.

        One update, since half of a jump would foretell its other half.
        """
        swept, followed = (self.asks, self.bids) if up else (self.bids, self.asks)
        shift = ticks if up else -ticks
        if self.bids.best + shift < 2 * _JUMP_MOST_TICKS:
            return
        fills = 0
        for distance in range(ticks):
            tick = swept.best - swept.sign * distance
            lots = swept.levels.get(tick)
            if lots is not None and fills < _SWEEP_FILLS_MOST:
                self._fill(tick, not up, lots, at_us)
                fills += 1
        self._set_best(swept, swept.best + shift)
        old = followed.best
        self._set_best(followed, old + shift)
        for tick in range(min(old, followed.best) + 1, max(old, followed.best)):
            if self._flow.random() < 0.6:
                followed.put(tick, self._lots(1.0))

    def _set_best(self, side: _Side, tick: int) -> None:
        """Levels in front of the new best go; a level is put there if there is none."""
        if (tick - side.best) * side.sign < 0:
            for each in range(min(tick, side.best), max(tick, side.best) + 1):
                if each != tick:
                    side.drop(each)
        side.best = tick
        lots = side.levels.get(tick)
        if lots is None or lots < 2:
            side.put(tick, 1 + self._lots(1.0 + _QUEUE_LEAN * self._push * side.sign))

    # Order flow: draws from self._flow decide quantities and trades

    def _flow_event(self, at_us: int, out: list[SymbolEvent]) -> None:
        draw = self._flow.random()
        if draw < _AT_TOUCH:
            self._touch_event(draw < _AT_TOUCH / 2)
            self._quote(at_us, out)
        elif draw < _TOUCH_SHARE:
            if self._market_order(at_us):
                self._quote(at_us, out)
        else:
            self._deep_event(draw < _TOUCH_SHARE + (1 - _TOUCH_SHARE) / 2)
            self._new_update(at_us)

    def _touch_event(self, bid: bool) -> None:
        """A limit order or a cancellation at the best price; the queue returns to its usual size, leaned by the push."""
        side = self.bids if bid else self.asks
        usual = self._touch_lots * (1.0 + _QUEUE_LEAN * self._push * side.sign)
        queue = side.levels[side.best]
        size = 1 + int(self._flow.expovariate(1.0) * self._touch_lots * 0.15)
        if queue <= 1 or self._flow.random() * (queue + usual) < usual:
            queue += size
        else:
            queue -= min(size, queue - 1)
        side.put(side.best, queue)

    def _market_order(self, at_us: int) -> bool:
        """A taker order that leaves something at the best price; whether there was enough for one."""
        buys = self._flow.random() < 0.5 + 0.5 * _PUSH_LEAN * self._push
        side = self.asks if buys else self.bids
        queue = side.levels[side.best]
        size = 1 + int(self._flow.expovariate(1.0) * self._touch_lots * 0.08)
        if queue < 2:
            return False
        size = min(size, queue - 1)
        side.put(side.best, queue - size)
        self._fill(side.best, not buys, size, at_us)
        return True

    def _deep_event(self, bid: bool) -> None:
        """A limit order or a cancellation behind the best price."""
        side = self.bids if bid else self.asks
        draw = self._flow.random()
        if draw < 0.2:
            distance = 1 + int(draw * 5 * _WINDOW_TICKS)
        else:
            distance = 1 + min(_WINDOW_TICKS, int(self._flow.expovariate(1 / 30)))
        tick = side.best - side.sign * distance
        if tick < 1:
            return
        if tick in side.levels and self._flow.random() < 0.5:
            side.drop(tick)
        else:
            side.put(tick, self._lots(1.0))

    def _far_event(self, at_us: int) -> None:
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
                if tick >= 1 and self._flow.random() < 0.6:
                    side.put(tick, self._lots(1.0))
            side.dirty.clear()

    def _lots(self, lean: float) -> int:
        """A heavy-tailed size around the usual one."""
        scale = self._touch_lots * lean
        if self._flow.random() < 0.05:
            scale *= 5
        return 1 + int(self._flow.expovariate(1.0) * scale)

    # Trades

    def _fill(self, tick: int, taker_sold: bool, lots: int, at_us: int) -> None:
        at_ms = at_us // 1_000
        fills = 1 + min(lots - 1, int(self._flow.expovariate(1.0)))
        first, self._trade_id = self._trade_id, self._trade_id + fills
        gathered = self._open
        if gathered and gathered[0] == tick and gathered[1] == taker_sold and at_ms - gathered[5] < AGG_WINDOW_MS:
            gathered[2] += lots
            gathered[4] = self._trade_id - 1
            return
        self._close_agg()
        self._open = [tick, taker_sold, lots, first, self._trade_id - 1, at_ms]

    def _close_agg(self) -> None:
        """The gathered aggTrade takes its place in the queue of those to be sent."""
        gathered = self._open
        if gathered is None:
            return
        self._open = None
        lag = AGG_WINDOW_MS + self._flow.randrange(AGG_LAG_MOST_MS)
        self._last_agg_e = max(self._last_agg_e, gathered[5] + lag)
        self._closed.append((self._last_agg_e, gathered))

    def _await_agg(self) -> list[tuple[int, int]]:
        """Look again when the newest gathered trade's window is over; and for each closed one when it is due."""
        if self._open is None:
            return []
        return [((self._open[5] + AGG_WINDOW_MS) * 1_000, _AGG)]

    # Frames

    def _new_id(self) -> int:
        # Never previous + 1: the exchange's own sequence has other symbols in between.
        self._ids.next += 2 + int(self._flow.random() * 40)
        return self._ids.next

    def _new_update(self, at_us: int) -> None:
        self.update_id = self._new_id()
        self._changed_us = at_us
        if not self._first_id:
            self._first_id = self.update_id

    def _quote(self, at_us: int, out: list[SymbolEvent]) -> None:
        """One update of the book, and the bookTicker that shows it."""
        self._new_update(at_us)
        at_ms = at_us // 1_000
        bids, asks = self.bids, self.asks
        symbol = self.spec.symbol
        payload = (
            f'{{"stream":"{self.quote_stream}","data":{{"e":"bookTicker","u":{self.update_id},"s":"{symbol}",'
            f'"ps":"{symbol}","b":"{self._px(bids.best)}","B":"{self._qty(bids.levels[bids.best])}",'
            f'"a":"{self._px(asks.best)}","A":"{self._qty(asks.levels[asks.best])}",'
            f'"T":{at_ms},"E":{at_ms + 1},"st":1}}}}'
        )
        out.append(SymbolEvent(self.quote_stream, payload.encode(), at_ms + 1))

    def _depth_event(self, at_us: int, out: list[SymbolEvent]) -> None:
        if not self._first_id:
            return
        at_ms = at_us // 1_000
        symbol = self.spec.symbol
        payload = (
            f'{{"stream":"{self.depth_stream}","data":{{"e":"depthUpdate","E":{at_ms + 1},'
            f'"T":{self._changed_us // 1_000},"s":"{symbol}","ps":"{symbol}","U":{self._first_id},'
            f'"u":{self.update_id},"pu":{self._last_depth_id},'
            f'"b":[{self._changes(self.bids)}],"a":[{self._changes(self.asks)}],"st":1}}}}'
        )
        self._last_depth_id = self.update_id
        self._first_id = 0
        out.append(SymbolEvent(self.depth_stream, payload.encode(), at_ms + 1))

    def _changes(self, side: _Side) -> str:
        levels = side.levels
        text = ",".join(f'["{self._px(tick)}","{self._qty(levels.get(tick, 0))}"]' for tick in sorted(side.dirty))
        side.dirty.clear()
        return text

    def _agg_event(self, at_us: int, out: list[SymbolEvent]) -> None:
        raise NotImplementedError

    def _mark_event(self, at_us: int, out: list[SymbolEvent]) -> None:
        raise NotImplementedError

    def _step_units(self) -> int:
        return round(float(self.spec.step) * 10**self.spec.qty_decimals)

    def _px(self, tick: int) -> str:
        text = self._strings.get(tick)
        if text is None:
            if len(self._strings) >= _STRINGS_KEPT:
                self._strings.clear()
            text = self._strings[tick] = _decimal(tick * self._tick_units, self.spec.price_decimals)
        return text

    def _qty(self, lots: int) -> str:
        raise NotImplementedError
