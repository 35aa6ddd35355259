"""A seeded synthetic market: the same seed gives the same frames, byte for byte, however time is cut into steps.

**Prices.** The best bid and ask of a symbol are a jump process of their own: jumps of both quotes by a geometric number
of ticks, and now and then a spread that opens by a tick and closes again, on sides drawn by coin. Its random numbers
are its own, so at predictability 0 the path of the best prices does not depend on order flow in any way: not even on
the seed of the flow. The mid is then a martingale, and what an evaluation finds is chance.

**Flow.** Limit orders, cancellations and market orders come at a rate that switches between regimes (normal, calm,
turbulent, quiet) and, where `sessions` is set, with the session of the day (Tokyo 0-8, London 8-16, New York 16-24
UTC); jumps become more frequent and rarer with them. A latent push, -1, 0 or +1, which lasts `horizon_ms` on average,
leans the taker side and the queues at the touch. It is there at any predictability, so that the flow looks the same.

**Dial 1, `activity`**: mean changes of the best quote a second and symbol. Depth frames, trades and the rest follow.

**Dial 2, `predictability`** p: a jump goes up with probability 0.5 + 0.5 p x, where x is the push as it stood
`lead_ms` earlier. So flow shows first what prices then do: not at all at 0, as far as it can at 1. What that gives in
correlation and AUC of OFI and CVD is measured by `python -m tests.bench.predictability`, and tabled in docs/synthetic-market.md.

**Book.** Integer ticks and lots. A market order takes from the best queue but leaves something of it (prices move by
jumps alone); a jump is a market order that sweeps what is left of the levels in its way, and now and then the order of
somebody liquidated. Sizes of trades have heavy tails. Every change has an update id; ids grow over all symbols, with gaps. bookTicker goes out on every change of
the best price or quantity, depth every 100 ms, aggTrade 100 to 150 ms behind T, forceOrder a second after the first
liquidation of a symbol: the largest one of that second. After a depth that ends at `u`, the best of the book are those
of the bookTicker with the greatest `u' <= u`.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from heapq import heappop, heappush, heapreplace
from math import gamma, log, log1p, sqrt
from random import Random
from typing import Annotated, Final, TypeAlias

import msgspec

from orderflow.errors import ConfigError
from orderflow.venues.binance.sim.regimes import (
    ALL_DAY,
    MEAN_ACTIVITY,
    NORMAL,
    REGIMES,
    SESSION_MS,
    session_at,
)
from orderflow.venues.binance.sim.specs import SymbolSpec, spec_of
from orderflow.venues.binance.sim.wire import DEPTH_MS, Aggregate, FrameWriter, Liquidation, MarketFrame

__all__ = [
    "AGG_LAG_MOST_MS",
    "AGG_WINDOW_MS",
    "DEFAULT_SYMBOLS",
    "START_MS",
    "MarketFrame",
    "SymbolSpec",
    "SyntheticConfig",
    "SyntheticMarket",
]

AGG_WINDOW_MS: Final = 100
"""Fills at one price and side within this time make one aggTrade."""
AGG_LAG_MOST_MS: Final = 50
FORCE_WINDOW_MS: Final = 1_000
"""Of the liquidations of a symbol within this time the largest is sent, when it is over."""
START_MS: Final = 1_790_000_000_000
"""Where a market starts that is given no time."""

DEFAULT_SYMBOLS: Final = ("BTCUSDT", "ETHUSDT", "SOLUSDT")

_FLOW, _PRICE, _DEPTH, _PUSH, _REGIME, _AGG, _MARK, _FAR, _FORCE, _SESSION = range(10)
_MS_US: Final = 1_000
_SEC_US: Final = 1_000_000
_NEVER_US: Final = 1 << 62
_DONE: Final = 0
"""Instead of a time: nothing of this kind follows by itself."""

# Ids start from the time, so that those of a restarted exchange go on above those of the one before.
_UPDATE_IDS_PER_MS: Final = 1_000
_TRADE_IDS_PER_MS: Final = 4
_UPDATE_ID_GAP: Final = 40

_WINDOW_TICKS: Final = 400
"""Levels are placed up to this far from the touch."""
_FAR_TICKS: Final = 3 * _WINDOW_TICKS
"""And cancelled beyond so far."""
_JUMP_MOST_TICKS: Final = 60
_FLOOR_TICKS: Final = 2 * _JUMP_MOST_TICKS
"""The best bid does not fall below this."""
_DENSITY: Final = 0.6
"""Share of the prices near the touch that hold orders."""
_WIDE_SHARE: Final = 0.2
_DEEP_MEAN_TICKS: Final = 30.0
_SWEEP_FILLS_MOST: Final = 6
_ORDER_POWER: Final = 2.5
"""Sizes of taker orders are an exponential variate to this power: the median is a tenth of the mean, as in recorded
trades of BTCUSDT and ETHUSDT. Sizes of one scale would put the scale of CVD on its floor for good."""
_ORDER_MEAN: Final = gamma(1 + _ORDER_POWER)
_PULLED_POWER: Final = 8
"""Most of a queue is pulled before the price comes: a sweep meets u^8 of it, u uniform, a ninth on average."""
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
_LIQUIDATED: Final = 0.02
"""Share of jumps that are the order of somebody liquidated."""


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
    sessions: bool = False
    """Whether they follow the hour of the day (UTC) too: `activity` is then the mean over a day."""


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

    def changes(self) -> list[tuple[int, int]]:
        """(tick, lots) of what changed since the last call, by tick; 0 lots for what is gone."""
        get = self.levels.get
        changed = [(tick, get(tick, 0)) for tick in sorted(self.dirty)]
        self.dirty.clear()
        return changed

    def best_first(self, limit: int) -> list[tuple[int, int]]:
        levels = self.levels
        return [(tick, levels[tick]) for tick in sorted(levels, reverse=self.sign > 0)[:limit]]


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
        self._liquidations = Random(f"{flow_seed}/{spec.symbol}/liquidations")
        self._price = Random(f"{seed}/{spec.symbol}/price")
        self._regime_rng = Random(f"{seed}/{spec.symbol}/regime")
        self._draw = self._flow.random

        self._wire = FrameWriter(spec)
        self._touch_lots = max(2.0, spec.touch_qty / float(spec.step))
        self._regime = NORMAL
        self._session = session_at(start_us // _MS_US) if config.sessions else ALL_DAY
        self._set_rates()
        self.generations = [0] * (_SESSION + 1)
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
        self._update_id = self._new_id()
        self._last_depth_id = self._update_id
        self._first_id = 0
        """The first update that no depth frame has shown yet; 0 for none."""
        self._changed_us = start_us
        start_ms = start_us // _MS_US
        self._agg_id = start_ms
        self._trade_id = start_ms * _TRADE_IDS_PER_MS
        self._aggregates: deque[Aggregate] = deque()
        """In the order in which they will be sent; the newest may still grow."""
        self._last_agg_us = 0
        self._liquidation: Liquidation | None = None
        """The largest of the second that runs."""
        self._schedule_first(start_us)

    def run(self, kind: int, at_us: int, out: list[MarketFrame]) -> int:
        """Let happen what is due.

        Returns
        -------
        When the next event of this kind is due, always later than `at_us`; `_DONE` for none.
        """
        if kind == _FLOW:
            self._flow_event(at_us, out)
            return at_us + self._flow_gap_us()
        if kind == _DEPTH:
            self._send_depth(at_us, out)
            return at_us + DEPTH_MS * _MS_US
        if kind == _PRICE:
            self._price_event(at_us, out)
            return at_us + self._price_gap_us()
        if kind == _AGG:
            out.append(self._wire.aggregate(self._aggregates.popleft(), self._agg_id, at_us // _MS_US + 1))
            self._agg_id += 1
            return _DONE
        return self._run_rare(kind, at_us, out)

    def _run_rare(self, kind: int, at_us: int, out: list[MarketFrame]) -> int:
        if kind == _MARK:
            out.extend(self._wire.mark(self.bids.best, self.asks.best, at_us // _MS_US + 1))
            return at_us + _SEC_US
        if kind == _FAR:
            self._cancel_far(at_us)
            return at_us + _SEC_US
        if kind == _PUSH:
            self._change_push(at_us)
            return at_us + self._push_gap_us()
        if kind == _REGIME:
            self._change_regime(at_us)
            return at_us + self._regime_gap_us()
        if kind == _SESSION:
            self._session = session_at(at_us // _MS_US)
            self._redraw(at_us)
            return at_us + SESSION_MS * _MS_US
        if self._liquidation is not None:
            out.append(self._wire.force(self._liquidation, at_us // _MS_US + 1))
            self._liquidation = None
        return _DONE

    # Scheduling

    def _schedule(self, at_us: int, kind: int) -> None:
        heappush(self._heap, (at_us, kind, self._index, self.generations[kind]))

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
        if self._config.sessions:
            session_us = SESSION_MS * _MS_US
            self._schedule((start_us // session_us + 1) * session_us, _SESSION)

    def _set_rates(self) -> None:
        rate = self._config.activity / _TOUCH_SHARE * self._regime.activity
        if self._config.regimes:
            rate /= MEAN_ACTIVITY
        self._flow_rate = rate * self._session.activity
        self._volatility = self._regime.volatility * self._session.volatility

    def _redraw(self, at_us: int) -> None:
        """The rates have changed: what was scheduled under the old ones is void."""
        self._set_rates()
        for kind, gap_us in ((_FLOW, self._flow_gap_us()), (_PRICE, self._price_gap_us())):
            self.generations[kind] += 1
            self._schedule(at_us + gap_us, kind)

    # `-log(1 - u) / rate` is what `Random.expovariate` computes, without its call.

    def _flow_gap_us(self) -> int:
        return 1 + int(-log(1.0 - self._draw()) / self._flow_rate * _SEC_US)

    def _price_rates(self) -> tuple[float, float]:
        """Jumps, and steps of one side, a second."""
        volatility = self._volatility
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
        for regime in REGIMES:
            self._regime = regime
            draw -= regime.weight
            if draw < 0:
                break
        self._redraw(at_us)

    # Prices: draws from `_price` (and the regime's) alone decide the best ticks

    def _price_event(self, at_us: int, out: list[MarketFrame]) -> None:
        while self._pushes and self._pushes[0][0] <= at_us:
            self._felt = self._pushes.popleft()[1]
        jumps, steps = self._price_rates()
        kind, side, size = self._price.random(), self._price.random(), self._price.random()
        if kind * (jumps + steps) < jumps:
            ticks = min(_JUMP_MOST_TICKS, 1 + int(log(1.0 - size) / self._jump_log)) if self._jump_log else 1
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
        fills: list[tuple[int, int]] = []
        for distance in range(abs(shift)):
            tick = swept.best - swept.sign * distance
            lots = swept.levels.get(tick)
            if lots is not None and len(fills) < _SWEEP_FILLS_MOST:
                taken = 1 + int((lots - 1) * self._draw() ** _PULLED_POWER)
                self._fill(tick, shift < 0, taken, at_us)
                fills.append((tick, taken))
        if self._liquidations.random() < _LIQUIDATED and fills:
            self._liquidate(Liquidation(shift < 0, fills, at_us // _MS_US), at_us)
        self._set_best(swept, swept.best + shift)
        old = followed.best
        self._set_best(followed, old + shift)
        for tick in range(min(old, followed.best) + 1, max(old, followed.best)):
            if self._draw() < _DENSITY:
                followed.put(tick, self._lots(1.0))

    def _liquidate(self, order: Liquidation, at_us: int) -> None:
        if self._liquidation is None:
            self._schedule(at_us + FORCE_WINDOW_MS * _MS_US, _FORCE)
        elif order.notional <= self._liquidation.notional:
            return
        self._liquidation = order

    def _set_best(self, side: _Side, tick: int) -> None:
        """Levels in front of the new best go; there is always more than one lot at it."""
        for each in range(tick + side.sign, side.best + side.sign, side.sign):
            side.drop(each)
        side.best = tick
        if side.levels.get(tick, 0) < 2:
            side.put(tick, 1 + self._lots(1.0 + _QUEUE_LEAN * self._push * side.sign))

    # Order flow: draws from `_flow` decide quantities and trades

    def _flow_event(self, at_us: int, out: list[MarketFrame]) -> None:
        draw = self._draw()
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
        touch_lots = self._touch_lots
        usual = touch_lots * (1.0 + _QUEUE_LEAN * self._push * side.sign)
        queue = side.levels[side.best]
        size = 1 + int(-log(1.0 - self._draw()) * touch_lots * 0.15)
        if self._draw() * (queue + usual) < usual or queue < 2:
            queue += size
        else:
            queue -= min(size, queue - 1)
        side.put(side.best, queue)

    def _market_order(self, at_us: int) -> bool:
        """A taker order that leaves something at the best price; whether there was enough for one."""
        buys = self._draw() < 0.5 + 0.5 * _PUSH_LEAN * self._push
        size = 1 + int((-log(1.0 - self._draw())) ** _ORDER_POWER / _ORDER_MEAN * self._touch_lots * 0.08)
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
        draw = self._draw()
        if draw < _WIDE_SHARE:
            distance = 1 + int(draw / _WIDE_SHARE * _WINDOW_TICKS)
        else:
            distance = 1 + min(_WINDOW_TICKS, int(-log(1.0 - self._draw()) / (1 / _DEEP_MEAN_TICKS)))
        tick = side.best - side.sign * distance
        if tick < 1:
            return False
        if tick in side.levels and self._draw() < 0.5:
            side.drop(tick)
        else:
            side.put(tick, self._lots(1.0))
        return True

    def _cancel_far(self, at_us: int) -> None:
        """Cancel what the market has left far behind, so that a book stays bounded."""
        changed = False
        for side in (self.bids, self.asks):
            deepest = min(side.levels) if side.sign > 0 else max(side.levels)
            if (side.best - deepest) * side.sign <= _FAR_TICKS:
                continue
            for tick in [tick for tick in side.levels if (side.best - tick) * side.sign > _FAR_TICKS]:
                side.drop(tick)
            changed = True
        if changed:
            self._new_update(at_us)

    def _fill_book(self) -> None:
        for side in (self.bids, self.asks):
            side.put(side.best, 1 + self._lots(1.0))
            for distance in range(1, _WINDOW_TICKS + 1):
                tick = side.best - side.sign * distance
                if tick >= 1 and self._draw() < _DENSITY:
                    side.put(tick, self._lots(1.0))
            side.dirty.clear()

    def _lots(self, lean: float) -> int:
        """A heavy-tailed size around the usual one."""
        scale = self._touch_lots * lean
        if self._draw() < 0.05:
            scale *= 5
        return 1 + int(-log(1.0 - self._draw()) * scale)

    def _fill(self, tick: int, taker_sold: bool, lots: int, at_us: int) -> None:
        """A taker order's fills at one price: they join the newest aggTrade or open one."""
        at_ms = at_us // _MS_US
        first_id = self._trade_id
        self._trade_id += 1 + min(lots - 1, int(-log(1.0 - self._draw())))
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
        self._aggregates.append(Aggregate(tick, taker_sold, lots, first_id, self._trade_id - 1, at_ms))
        lag_ms = AGG_WINDOW_MS + self._flow.randrange(AGG_LAG_MOST_MS)
        self._last_agg_us = max(self._last_agg_us, (at_ms + lag_ms) * _MS_US)
        self._schedule(self._last_agg_us, _AGG)

    # Frames

    def _new_id(self) -> int:
        ids = self._ids
        ids.last += 2 + int(self._draw() * _UPDATE_ID_GAP)
        return ids.last

    def _new_update(self, at_us: int) -> None:
        self._update_id = self._new_id()
        self._changed_us = at_us
        if not self._first_id:
            self._first_id = self._update_id

    def _send_quote(self, at_us: int, out: list[MarketFrame]) -> None:
        """One update of the book, and the bookTicker that shows it."""
        self._new_update(at_us)
        bids, asks = self.bids, self.asks
        bid, ask = bids.best, asks.best
        out.append(self._wire.quote(self._update_id, bid, bids.levels[bid], ask, asks.levels[ask], at_us // _MS_US))

    def _send_depth(self, at_us: int, out: list[MarketFrame]) -> None:
        """The levels that changed, with absolute quantities; nothing where nothing changed."""
        if not self._first_id:
            return
        ids = (self._first_id, self._update_id, self._last_depth_id)
        changed_ms, event_ms = self._changed_us // _MS_US, at_us // _MS_US + 1
        out.append(self._wire.depth(ids, changed_ms, event_ms, self.bids.changes(), self.asks.changes()))
        self._last_depth_id = self._update_id
        self._first_id = 0

    def snapshot(self, limit: int, at_ms: int) -> bytes:
        """Body of `GET /fapi/v1/depth`."""
        bids, asks = self.bids.best_first(limit), self.asks.best_first(limit)
        return self._wire.snapshot(self._update_id, self._changed_us // _MS_US, at_ms, bids, asks)


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
        specs : looks of symbols that should not be as `spec_of` has them.
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
        self.start_ms = start_ms
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
            at_us, kind, index, generation = heap[0]
            symbol = symbols[index]
            # All that an event schedules lies behind it: it is still the first of the heap afterwards.
            if generation == symbol.generations[kind] and (next_us := symbol.run(kind, at_us, out)):
                heapreplace(heap, (next_us, kind, index, generation))
            else:
                heappop(heap)
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
    mean = (1.0 + sqrt(1.0 + 8.0 * square)) / 4.0
    return _JUMPS_PER_SEC, log1p(-1.0 / mean)
