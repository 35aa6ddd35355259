"""Measures of price impact and informed trading from trades: VPIN, Kyle's lambda, Amihud's illiquidity."""

from __future__ import annotations

import math
from typing import Final

import msgspec

from orderflow.microstructure.cvd_lots import LOT, PackedInt, pack_int, pack_ints
from orderflow.microstructure.windows import LN2

_SIZING_MS: Final = 60_000
"""Event time that must have been seen before the first bucket is sized."""
_AMIHUD_UNIT: Final = 10**40
"""|return| / notional is kept in whole parts of 1e-40 per quote unit: far below any market's, and exact to sum."""
_RATIO_UNIT: Final = _AMIHUD_UNIT * LOT * LOT


class VpinState(msgspec.Struct):
    """Serialised form of `Vpin`."""

    first_ms: int | None = None
    now_ms: int = 0
    decayed_lots: float = 0.0
    decayed_ms: float = 0.0
    size: PackedInt = 0
    filled: PackedInt = 0
    net: PackedInt = 0
    sizes: list[PackedInt] = []
    imbalances: list[PackedInt] = []
    head: int = 0


class Vpin:
    """Volume-synchronised probability of informed trading: sum of |V_buy - V_sell| over sum of V of the last buckets.

    D. Easley, M. Lopez de Prado, M. O'Hara, "Flow toxicity and liquidity in a high-frequency world", Review of
    Financial Studies 25(5), 2012, with the exchange's aggressor flag in the place of bulk classification. There a
    bucket is a fixed share of the average day's volume; here it is the trailing average volume (half-life
    `half_life_ms` of event time) of `bucket_ms`, fixed when the bucket opens.
    """

    def __init__(self, buckets: int, bucket_ms: float, half_life_ms: float, state: VpinState | None = None) -> None:
        state = state or VpinState()
        self._buckets = buckets
        self._bucket_ms = bucket_ms
        self._half_life_ms = half_life_ms
        self._first_ms, self._now_ms = state.first_ms, state.now_ms
        self._decayed_lots, self._decayed_ms = state.decayed_lots, state.decayed_ms
        self._size, self._filled, self._net = int(state.size), int(state.filled), int(state.net)
        self._sizes = [int(value) for value in state.sizes]
        self._imbalances = [int(value) for value in state.imbalances]
        self._head = state.head
        self._sum_sizes, self._sum_imbalances = sum(self._sizes), sum(self._imbalances)

    def push(self, now_ms: int, signed: int) -> None:
        """Take a trade with a side; a large one fills several buckets, at most as many as are kept."""
        lots = abs(signed)
        self._pace(now_ms, lots)
        if not self._size and not self._open(now_ms):
            return
        sign = 1 if signed > 0 else -1
        for _ in range(self._buckets + 1):
            room = self._size - self._filled
            if lots < room:
                self._filled += lots
                self._net += sign * lots
                return
            self._close(abs(self._net + sign * room))
            lots -= room
            self._open(now_ms)
        # What is left would push out buckets that are all of this one trade already.
        lots %= self._size
        self._filled = lots
        self._net = sign * lots

    def _pace(self, now_ms: int, lots: int) -> None:
        """Follow the average volume per millisecond, decayed volume over decayed time."""
        if self._first_ms is None:
            self._first_ms = self._now_ms = now_ms
        dt_ms = now_ms - self._now_ms
        if dt_ms > 0:
            gone = -math.expm1(-LN2 * dt_ms / self._half_life_ms)
            self._decayed_lots -= self._decayed_lots * gone
            # the integral of 2^(-t / half-life) over the step is gone * half-life / ln 2
            self._decayed_ms += gone * (self._half_life_ms / LN2 - self._decayed_ms)
            self._now_ms = now_ms
        self._decayed_lots += lots

    def _open(self, now_ms: int) -> bool:
        assert self._first_ms is not None
        if now_ms - self._first_ms >= _SIZING_MS:
            self._size = max(1, round(self._decayed_lots / self._decayed_ms * self._bucket_ms))
            self._filled = self._net = 0
        return self._size > 0

    def _close(self, imbalance: int) -> None:
        if len(self._sizes) < self._buckets:
            self._sizes.append(self._size)
            self._imbalances.append(imbalance)
        else:
            head = self._head
            self._sum_sizes -= self._sizes[head]
            self._sum_imbalances -= self._imbalances[head]
            self._sizes[head], self._imbalances[head] = self._size, imbalance
            self._head = (head + 1) % self._buckets
        self._sum_sizes += self._size
        self._sum_imbalances += imbalance

    def value(self) -> float | None:
        """VPIN in [0, 1]; None until all buckets have been filled once."""
        return self._sum_imbalances / self._sum_sizes if len(self._sizes) >= self._buckets else None

    def state(self) -> VpinState:
        """Serialisable copy."""
        return VpinState(
            self._first_ms,
            self._now_ms,
            self._decayed_lots,
            self._decayed_ms,
            pack_int(self._size),
            pack_int(self._filled),
            pack_int(self._net),
            list(pack_ints(self._sizes)),
            list(pack_ints(self._imbalances)),
            self._head,
        )


class ImpactState(msgspec.Struct):
    """Serialised form of `Impact`."""

    bar: int | None = None
    net: PackedInt = 0
    notional: PackedInt = 0
    close: PackedInt = 0
    before: PackedInt | None = None
    flows: list[PackedInt] = []
    changes: list[PackedInt] = []
    ratios: list[PackedInt] = []
    head: int = 0
    kyle_lambda: float | None = None
    amihud: float | None = None


class Impact:
    """Kyle's lambda and Amihud's illiquidity over the last bars of event time that had trades.

    Lambda is the slope of ordinary least squares, with intercept, of a bar's price change (last price less the last
    price of the bar before) on its signed volume (A. Kyle, Econometrica 53(6), 1985). Amihud is the mean of
    |return| / notional (Y. Amihud, J. Financial Markets 5(1), 2002). Both change when a bar closes, which is when a
    trade of a later bar comes. All sums are of integers, so nothing drifts.
    """

    def __init__(self, bars: int, min_bars: int, bar_ms: int, state: ImpactState | None = None) -> None:
        state = state or ImpactState()
        self._bars, self._min_bars, self._bar_ms = bars, min_bars, bar_ms
        self._bar = state.bar
        self._net, self._notional, self._close = int(state.net), int(state.notional), int(state.close)
        self._before = None if state.before is None else int(state.before)
        self._flows = [int(value) for value in state.flows]
        self._changes = [int(value) for value in state.changes]
        self._ratios = [int(value) for value in state.ratios]
        self._head = state.head
        self.kyle_lambda, self.amihud = state.kyle_lambda, state.amihud
        self._sum_x, self._sum_y, self._sum_ratios = sum(self._flows), sum(self._changes), sum(self._ratios)
        self._sum_xx = sum(x * x for x in self._flows)
        self._sum_xy = sum(x * y for x, y in zip(self._flows, self._changes, strict=True))

    def push(self, now_ms: int, price_lots: int, signed: int, notional: int) -> None:
        """Take a trade at `now_ms`, which must not go back; price and notional above 0; `signed` 0 without a side."""
        bar = now_ms // self._bar_ms
        if bar != self._bar:
            if self._bar is not None:
                self._end_bar()
            self._bar = bar
            self._net = self._notional = 0
        self._net += signed
        self._notional += notional
        self._close = price_lots

    def _end_bar(self) -> None:
        before, self._before = self._before, self._close
        if before is None:
            return
        change, flow = self._close - before, self._net
        ratio = abs(change) * _RATIO_UNIT // (before * self._notional)
        if len(self._flows) < self._bars:
            self._flows.append(flow)
            self._changes.append(change)
            self._ratios.append(ratio)
        else:
            head = self._head
            x, y = self._flows[head], self._changes[head]
            self._sum_x -= x
            self._sum_y -= y
            self._sum_xx -= x * x
            self._sum_xy -= x * y
            self._sum_ratios -= self._ratios[head]
            self._flows[head], self._changes[head], self._ratios[head] = flow, change, ratio
            self._head = (head + 1) % self._bars
        self._sum_x += flow
        self._sum_y += change
        self._sum_xx += flow * flow
        self._sum_xy += flow * change
        self._sum_ratios += ratio
        self._estimate()

    def _estimate(self) -> None:
        count = len(self._flows)
        if count < self._min_bars:
            return
        spread = count * self._sum_xx - self._sum_x * self._sum_x
        self.kyle_lambda = (count * self._sum_xy - self._sum_x * self._sum_y) / spread if spread else None
        self.amihud = self._sum_ratios / (count * _AMIHUD_UNIT)

    def state(self) -> ImpactState:
        """Serialisable copy."""
        return ImpactState(
            self._bar,
            pack_int(self._net),
            pack_int(self._notional),
            pack_int(self._close),
            None if self._before is None else pack_int(self._before),
            list(pack_ints(self._flows)),
            list(pack_ints(self._changes)),
            list(pack_ints(self._ratios)),
            self._head,
            self.kyle_lambda,
            self.amihud,
        )
