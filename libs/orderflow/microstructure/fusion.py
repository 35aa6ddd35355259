"""Fusion of OFI and CVD into one score and state, and the events around it.

One record of `features.fusion` per record of `features.ofi` or `features.cvd`, on what has arrived by then, in journal
order. Each stage is a step of its own that says in `reasons` what it did (`docs/definitions-fusion-signal.md`).

Two clocks, never mixed: event time T of the records, made monotone per symbol, for cooldown, holds and events caused by
records; the tick clock for samples, bars, regime and the silence of streams.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar, Final

import msgspec

from orderflow.microstructure.divergence import (
    AlertState,
    PivotState,
    onset,
    plain_rule,
    take_bar,
)
from orderflow.microstructure.fusion_commands import Controls, ControlState, meta_json
from orderflow.microstructure.fusion_config import PRESETS, FusionConfig, SliceWeights, Stage, Thresholds
from orderflow.microstructure.fusion_machine import STRENGTHS, Machine, MachineState, consistency_of
from orderflow.microstructure.fusion_stats import MidSeries, TrailingDeviation, finite
from orderflow.microstructure.regime import MarketSample, Regime, RegimeState, session_of
from orderflow.processor import Emit, Record
from orderflow.topics import CVD, FEATURE_EVENTS, FUSION, OFI, TICKS

__all__ = ["PRESETS", "FusionConfig", "FusionProcessor", "SliceWeights", "Stage", "Thresholds", "consistency_of"]

RATE_SILENCE_MS: Final = 60_000
"""A stream silent for a minute has the rates 0, whatever its last record said: they are over a minute."""

_DIVERGENCES: Final = ("bullish", "bearish", "inconsistent")


class StreamState(msgspec.Struct):
    """One of the two factors of a symbol: book rows (OFI) or trades (CVD)."""

    t_ms: int = 0
    """Largest T of its records."""
    seen: bool = False
    delay_ms: int = 0
    """R - T of its newest record."""
    z: float | None = None
    warm: bool = False
    heard_ms: int = 0
    """Largest T that its records or the ticks have told of."""
    heard_clock_ms: int = 0
    """Tick clock when `heard_ms` last changed."""
    live: bool = True

    def arrive(self, record: Record) -> None:
        """Take the times of a record."""
        ts_ms: int = record["ts_ms"]
        if ts_ms > self.t_ms or not self.seen:
            self.t_ms = ts_ms
        self.seen = True
        self.delay_ms = record["recv_ts_ms"] - ts_ms
        self.warm = not record["warmup"]

    def tick(self, clock_ms: int, told_ms: int | None, up: bool, max_quiet_ms: float) -> bool:
        """Judge by the tick clock whether the stream lives; return whether it has been silent for a minute."""
        newest = self.t_ms if told_ms is None or told_ms < self.t_ms else told_ms
        if newest != self.heard_ms or not self.heard_clock_ms:
            self.heard_ms = newest
            self.heard_clock_ms = clock_ms
        silent_ms = clock_ms - self.heard_clock_ms
        self.live = up and silent_ms <= max_quiet_ms
        return silent_ms >= RATE_SILENCE_MS


class SymbolState(msgspec.Struct):
    """Everything about one symbol."""

    deviation: TrailingDeviation
    regime: RegimeState
    machine: MachineState
    book: StreamState
    trade: StreamState
    mids: MidSeries
    alerts: AlertState
    pivots: PivotState
    now_ms: int = 0
    """Largest T so far."""
    second: int = -1
    updates: int = 0
    consistency: float = 0.0
    mid: float | None = None
    spread_bps: float | None = None
    quote_rate: float | None = None
    book_state: str = "none"
    cum_ofi: float = 0.0
    """Sum of ofi_l1: read only as differences over minutes, for which a double is far more than enough."""
    price: float | None = None
    trades_per_min: float | None = None
    volume_usd: float | None = None
    cvd: float = 0.0
    gap_count: int = 0
    trend_bps: float | None = None
    volatility_bps: float | None = None


_encode = msgspec.msgpack.Encoder(order="deterministic").encode
_decode_symbol = msgspec.msgpack.Decoder(SymbolState).decode
_decode_controls = msgspec.msgpack.Decoder(ControlState).decode


class FusionProcessor:
    """`orderflow.processor.Processor` of fusion, divergence and regime. `partition` is the journal's, for the log."""

    inputs: ClassVar[tuple[str, ...]] = (TICKS, OFI, CVD)
    outputs: ClassVar[tuple[str, ...]] = (FUSION, FEATURE_EVENTS)

    def __init__(self, config: FusionConfig, partition: int) -> None:
        self.partition = partition
        self._config = config
        self._machine = Machine(config)
        self._regime = Regime(config.regime)
        self._divergence = config.divergence
        self._controls = Controls()
        self._states: dict[str, SymbolState] = {}
        self._symbols: list[str] = []
        self._weights_cache: dict[tuple[str, str, str, str], tuple[float, float, str | None]] = {}
        stages = frozenset(config.stages)
        self._lag_on = "lag" in stages
        self._warmup_updates = config.warmup_updates if "warmup" in stages else 0
        self._warmup_on = "warmup" in stages
        self._zsum = config.method == "zsum"
        self._ofi_raw = config.ofi_input == "raw"
        self._max_quiet_ms = config.max_quiet_sec * 1000.0
        self._cooldown_ms = config.divergence.cooldown_sec * 1000.0

    def step(self, topic: str, record: Record) -> list[Emit]:
        """Take a tick, an ofi record or a cvd record."""
        if topic == OFI:
            return self._take_ofi(record)
        if topic == CVD:
            return self._take_cvd(record)
        if topic == TICKS:
            return self._take_tick(record)
        return []

    def snapshot(self) -> dict[str, bytes]:
        """The state: commands under "", the rest per symbol."""
        states = {"": _encode(self._controls.state)}
        for symbol in self._symbols:
            states[symbol] = _encode(self._states[symbol])
        return states

    def restore(self, states: Mapping[str, bytes]) -> None:
        """Replace the state."""
        self._controls.state = _decode_controls(states[""]) if "" in states else ControlState()
        self._symbols = sorted(name for name in states if name)
        self._states = {name: _decode_symbol(states[name]) for name in self._symbols}
        self._weights_cache.clear()

    # --- records --------------------------------------------------------------------------------------------------

    def _state(self, symbol: str) -> SymbolState:
        state = self._states.get(symbol)
        if state is None:
            state = self._states[symbol] = SymbolState(
                deviation=TrailingDeviation(size=self._config.score_z_window),
                regime=self._regime.fresh(),
                machine=MachineState(),
                book=StreamState(),
                trade=StreamState(),
                mids=MidSeries(),
                alerts=AlertState(),
                pivots=PivotState(),
            )
            self._symbols = sorted(self._states)
        return state

    def _take_ofi(self, record: Record) -> list[Emit]:
        state = self._state(record["symbol"])
        state.book.arrive(record)
        z = finite(record["ofi_z"])
        if z is not None and self._ofi_raw:
            raw = finite(record["ofi_z_raw"])
            z = z if raw is None else raw
        state.book.z = z
        mid = finite(record["mid"])
        if mid is not None and mid > 0.0:
            state.mid = mid
        spread_bps = finite(record["spread_bps"])
        if spread_bps is not None:
            state.spread_bps = spread_bps
        state.quote_rate = finite(record["quote_rate"])
        state.book_state = record["book_state"]
        flow: float = record["ofi_l1"]
        if flow - flow == 0.0:
            state.cum_ofi += flow
        return self._fuse("ofi", record, state, "anomaly_ofi", z, self._divergence.anomaly_z_ofi)

    def _take_cvd(self, record: Record) -> list[Emit]:
        state = self._state(record["symbol"])
        state.trade.arrive(record)
        z = finite(record["z_cvd"])
        state.trade.z = z
        price = finite(record["price"])
        if price is not None and price > 0.0:
            state.price = price
        rate = finite(record["trades_per_sec"])
        state.trades_per_min = None if rate is None else rate * 60.0
        state.volume_usd = finite(record["notional_60s"])
        level: float = record["cvd"]
        if level - level == 0.0:
            state.cvd = level
        return self._fuse("cvd", record, state, "anomaly_cvd", z, self._divergence.anomaly_z_cvd)

    def _fuse(
        self, src: str, record: Record, state: SymbolState, anomaly: str, z: float | None, limit: float
    ) -> list[Emit]:
        """Every stage, in order; `z` is the one that has just arrived, for its anomaly."""
        symbol: str = record["symbol"]
        ts_ms: int = record["ts_ms"]
        if ts_ms > state.now_ms:
            state.now_ms = ts_ms
        if record["gap_count"] > state.gap_count:
            state.gap_count = record["gap_count"]
        reasons: list[str] = []
        session = session_of(ts_ms)
        regime = state.regime
        w_ofi, w_cvd, why = self._weights(symbol, regime.mode, session, regime.vol_slice)
        if why is not None:
            reasons.append(why)
        direction = self._controls.direction(symbol, self._config.cvd_direction)
        if direction < 0:
            reasons.append("cvd_flipped")
        z_ofi = self._clip(state.book.z)
        z_cvd = self._clip(None if state.trade.z is None else direction * state.trade.z)
        lag_sec = _lag_sec(state.book, state.trade)
        entered = state.machine.entry_sign
        warmup = not (state.book.warm and state.trade.warm) or state.updates < self._warmup_updates
        score = score_z = proba = dispersion = version = None
        consistency = 0.0
        if z_ofi is None or z_cvd is None:
            self._miss(state, z_ofi, z_cvd, reasons)
        else:
            consistency = consistency_of(z_ofi, z_cvd)
            dispersion = abs(z_ofi - z_cvd)
            degraded = self._lag_on and lag_sec is not None and lag_sec > self._config.max_lag_sec
            if degraded:
                w_ofi, w_cvd = self._degrade(state, z_ofi, z_cvd, reasons)
            score = z_ofi + z_cvd if self._zsum and not degraded else w_ofi * z_ofi + w_cvd * z_cvd
            score_z = self._score_z(state, score)
            proba, version = self._proba(symbol, score, degraded)
            self._advance(state, score, consistency, degraded, warmup, reasons)
        state.consistency = consistency
        divergence = plain_rule(self._divergence, state.trend_bps, z_ofi, z_cvd)
        value: Record = {
            "src": src,
            "symbol": symbol,
            "ts_ms": ts_ms,
            "event_ts_ms": record["event_ts_ms"],
            "recv_ts_ms": record["recv_ts_ms"],
            "score": score,
            "score_z": score_z,
            "consistency": consistency,
            "dispersion": dispersion,
            "sign_agree": consistency > 0.0,
            "proba": proba,
            "calibration_version": version,
            "strength": STRENGTHS[state.machine.level],
            "reasons": reasons,
            "w_ofi": w_ofi,
            "w_cvd": w_cvd,
            "cvd_direction": direction,
            "skew_ms": state.book.t_ms - state.trade.t_ms if state.book.seen and state.trade.seen else None,
            "lag_sec": lag_sec,
            "z_ofi": z_ofi,
            "z_cvd": z_cvd,
            "price": state.price,
            "mid": state.mid,
            "spread_bps": state.spread_bps,
            "trades_per_min": state.trades_per_min,
            "quote_rate": state.quote_rate,
            "volatility_bps": state.volatility_bps,
            "volume_usd": state.volume_usd,
            "regime": regime.mode,
            "session": session,
            "vol_slice": regime.vol_slice,
            "div_type": divergence[0] if divergence is not None else None,
            "div_strength": divergence[1] if divergence is not None else None,
            "warmup": warmup,
            "book_state": state.book_state,
            "gap_count": state.gap_count,
            "latency_ms": record["latency_ms"],
        }
        emits: list[Emit] = [(FUSION, symbol, value)]
        abnormal = z is not None and (z > limit or z < -limit)
        flip = entered * state.machine.entry_sign < 0
        if abnormal or divergence is not None or state.alerts.on or flip:
            self._tell(emits, value, state, anomaly, z if abnormal else None, flip)
        return emits

    def _miss(self, state: SymbolState, z_ofi: float | None, z_cvd: float | None, reasons: list[str]) -> None:
        """Neutral for want of a factor."""
        if z_ofi is None:
            reasons.append("ofi_z_missing")
        if z_cvd is None:
            reasons.append("cvd_z_missing")
        self._machine.drop(state.machine)

    def _score_z(self, state: SymbolState, score: float) -> float | None:
        """Score over the deviation of the scores before it; then it joins them."""
        spread = state.deviation.deviation(self._config.score_z_min)
        state.deviation.push(score)
        return None if spread is None else score / spread

    def _proba(self, symbol: str, score: float, degraded: bool) -> tuple[float | None, str | None]:
        """Calibrated probability of a rise, and the calibration's version."""
        calibration = self._controls.calibration(symbol)
        if calibration is None:
            return None, None
        proba = platt(calibration.a, calibration.b, score)
        if degraded:
            proba = 0.5 + (proba - 0.5) * self._config.degraded_confidence
        return proba, calibration.version

    def _advance(
        self, state: SymbolState, score: float, consistency: float, degraded: bool, warmup: bool, reasons: list[str]
    ) -> None:
        """Let the machine take the score, unless it is too early."""
        if state.updates < self._warmup_updates:
            state.updates += 1
        if warmup and self._warmup_on:
            reasons.append("warmup")
            self._machine.drop(state.machine)
        else:
            self._machine.advance(state.machine, state.now_ms, score, consistency, degraded, reasons)

    def _tell(
        self, emits: list[Emit], value: Record, state: SymbolState, anomaly: str, z: float | None, flip: bool
    ) -> None:
        """Add an event for every condition of this record that begins."""
        now_ms = state.now_ms
        alerts = state.alerts
        div_type = value["div_type"]
        found: list[tuple[str, float]] = []
        for kind in _DIVERGENCES:
            if onset(alerts, f"div_{kind}", kind == div_type, now_ms, self._cooldown_ms):
                found.append((f"div_{kind}", value["div_strength"]))
        if onset(alerts, anomaly, z is not None, now_ms, self._cooldown_ms) and z is not None:
            found.append((anomaly, abs(z)))
        if onset(alerts, "flip", flip, now_ms, self._cooldown_ms):
            found.append(("flip", abs(value["score"])))
        if not found:
            return
        meta = {
            "z_ofi": value["z_ofi"],
            "z_cvd": value["z_cvd"],
            "score": value["score"],
            "trend_bps": state.trend_bps,
            "strength": value["strength"],
            "src": value["src"],
        }
        symbol = value["symbol"]
        emits.extend(_event(symbol, kind, now_ms, value["recv_ts_ms"], size, meta) for kind, size in found)

    def _clip(self, z: float | None) -> float | None:
        if z is None:
            return None
        limit = self._config.z_clip
        return limit if z > limit else -limit if z < -limit else z

    def _degrade(self, state: SymbolState, z_ofi: float, z_cvd: float, reasons: list[str]) -> tuple[float, float]:
        """One factor alone: the one whose stream lives; of two the larger |z|; of equals OFI, which is the faster."""
        reasons.append("lag_exceeded")
        if state.book.live is state.trade.live:
            ofi_alone = abs(z_ofi) >= abs(z_cvd)
        else:
            ofi_alone = state.book.live
        reasons.append("degraded_ofi_only" if ofi_alone else "degraded_cvd_only")
        return (1.0, 0.0) if ofi_alone else (0.0, 1.0)

    def _weights(self, symbol: str, mode: str, session: str, vol_slice: str) -> tuple[float, float, str | None]:
        """Weights in force, and which slice gave them: regime, session, volatility, base; in each a command first."""
        key = (symbol, mode, session, vol_slice)
        found = self._weights_cache.get(key)
        if found is None:
            found = self._weights_cache[key] = self._find_weights(key)
        return found

    def _find_weights(self, key: tuple[str, str, str, str]) -> tuple[float, float, str | None]:
        symbol, *slices = key
        configured: Mapping[str, SliceWeights] = {str(name): one for name, one in self._config.slice_weights.items()}
        for part in slices:
            commanded = self._controls.weights(symbol, part)
            if commanded is not None:
                return (*commanded, f"weights_{part}_command")
            if part in configured:
                return configured[part].ofi, configured[part].cvd, f"weights_{part}"
        commanded = self._controls.weights(symbol, "")
        if commanded is not None:
            return (*commanded, "weights_command")
        return self._config.w_ofi, self._config.w_cvd, None

    # --- ticks ----------------------------------------------------------------------------------------------------

    def _take_tick(self, record: Record) -> list[Emit]:
        emits: list[Emit] = []
        recv_ts_ms = record["recv_ts_ns"] // 1_000_000
        outcomes = self._controls.take(record)
        clock_ms = self._controls.state.clock_ns // 1_000_000
        if outcomes:
            self._weights_cache.clear()
            for one in outcomes:
                emits.append(_event(one.symbol, one.event_type, clock_ms, recv_ts_ms, None, one.meta))
        if record["kind"] == "tick":
            for symbol in self._symbols:
                self._tick_symbol(emits, symbol, self._states[symbol], record, clock_ms, recv_ts_ms)
        return emits

    def _tick_symbol(
        self, emits: list[Emit], symbol: str, state: SymbolState, record: Record, clock_ms: int, recv_ts_ms: int
    ) -> None:
        routes = record["routes"]
        quote_ms = record["quote_ts_ms"].get(symbol)
        depth_ms = record["depth_ts_ms"].get(symbol)
        book_ms = depth_ms if quote_ms is None or (depth_ms is not None and depth_ms > quote_ms) else quote_ms
        if state.book.tick(clock_ms, book_ms, routes.get("public") != "down", self._max_quiet_ms):
            state.quote_rate = None if state.quote_rate is None else 0.0
        trade_ms = record["trade_ts_ms"].get(symbol)
        if state.trade.tick(clock_ms, trade_ms, routes.get("market") != "down", self._max_quiet_ms):
            state.trades_per_min = None if state.trades_per_min is None else 0.0
            state.volume_usd = None if state.volume_usd is None else 0.0
        second = clock_ms // 1000
        if second == state.second:
            return
        state.second = second
        self._sample_mid(state, clock_ms)
        for kind, strength, meta in self._sampled(state, clock_ms):
            emits.append(_event(symbol, kind, clock_ms, recv_ts_ms, strength, meta))

    def _sample_mid(self, state: SymbolState, clock_ms: int) -> None:
        if state.mid is None:
            return
        state.mids.push(clock_ms, state.mid)
        state.volatility_bps = state.mids.volatility_bps()
        state.trend_bps = state.mids.trend_bps(self._divergence.trend_sec)

    def _sampled(self, state: SymbolState, clock_ms: int) -> list[tuple[str, float | None, dict[str, Any]]]:
        """What a second of the clock brings: anomaly of price, change of regime, pivots."""
        found: list[tuple[str, float | None, dict[str, Any]]] = []
        config = self._divergence
        trend = state.trend_bps
        wild = trend is not None and abs(trend) > config.anomaly_price_bps
        # A key of its own clock: the other alerts count event time.
        if onset(state.alerts, "anomaly_price", wild, clock_ms, self._cooldown_ms) and trend is not None:
            found.append(("anomaly_price", abs(trend), {"trend_bps": trend, "trend_sec": config.trend_sec}))
        change = self._regime.take(state.regime, clock_ms, _sample(state))
        if change is not None:
            meta = {"before": change.before, "after": change.after, "reason": change.reason, **change.meta}
            found.append(("regime_change", None, meta))
        price = state.mid if state.mid is not None else state.price
        if price is not None:
            bar = clock_ms // (config.bar_sec * 1000)
            levels = (price, state.cvd, state.cum_ofi, state.consistency)
            found.extend(
                (one.event_type, one.strength, one.meta)
                for one in take_bar(config, state.pivots, bar, clock_ms, *levels)
            )
        return found


def platt(a: float, b: float, score: float) -> float:
    """1 / (1 + exp(a * score + b)), without overflow. Lin, Lin, Weng, Machine Learning 68 (2007)."""
    x = a * score + b
    if x > 0.0:
        e = math.exp(-min(x, 700.0))
        return e / (1.0 + e)
    return 1.0 / (1.0 + math.exp(max(x, -700.0)))


def _lag_sec(book: StreamState, trade: StreamState) -> float | None:
    """How much older the one factor's information is than the other's, seconds.

    Both streams live: the event-time gap between their newest records less the receive-time gap, |(R - T)_cvd -
    (R - T)_ofi|: time in which nothing was traded is no lag. One is dead (its route down, or silent for too long): its
    silence tells nothing, so the whole event-time gap |T_ofi - T_cvd|.
    """
    if not (book.seen and trade.seen):
        return None
    if book.live and trade.live:
        return abs(trade.delay_ms - book.delay_ms) / 1000.0
    return abs(book.t_ms - trade.t_ms) / 1000.0


def _sample(state: SymbolState) -> MarketSample | None:
    """The market of this second for the regime; None while any part is unknown."""
    if (
        state.trades_per_min is None
        or state.quote_rate is None
        or state.spread_bps is None
        or state.volatility_bps is None
        or state.volume_usd is None
    ):
        return None
    return MarketSample(
        state.trades_per_min, state.quote_rate, state.spread_bps, state.volatility_bps, state.volume_usd
    )


def _event(
    symbol: str, event_type: str, ts_ms: int, recv_ts_ms: int, strength: float | None, meta: dict[str, Any]
) -> Emit:
    value: Record = {
        "symbol": symbol,
        "event_type": event_type,
        "ts_ms": ts_ms,
        "recv_ts_ms": recv_ts_ms,
        "strength": strength,
        "meta_json": meta_json(meta),
    }
    return FEATURE_EVENTS, symbol, value
