"""Cumulative volume delta and trade flow: one record a trade. Definitions of every field: `docs/definitions.md`.

Everything is on event time (T, made monotone), so a replay at any speed gives the same bytes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Final

import msgspec

from orderflow.microstructure.cvd_bars import Impact, ImpactState, Vpin, VpinState
from orderflow.microstructure.cvd_config import PRESETS, CvdConfig, ScaleMode
from orderflow.microstructure.cvd_lots import (
    LOT,
    MAX_UNITS,
    LotSum,
    LotSumState,
    PackedInt,
    Trailing,
    TrailingState,
    pack_int,
    to_lots,
)
from orderflow.microstructure.cvd_scale import LEAST_SCALE, Scale, ScaleState
from orderflow.microstructure.windows import DecayedRate, RollingMoments
from orderflow.processor import Emit, Record
from orderflow.topics import CVD, ROWS, TICKS

__all__ = ["PRESETS", "CvdConfig", "CvdProcessor"]

_MINUTE_SEC: Final = 60.0
_NotGiven: Final = (None, None, None, False)


class _State(msgspec.Struct):
    """Serialised form of `_Symbol`."""

    trailing: TrailingState
    vpin: VpinState
    impact: ImpactState
    scale: ScaleState
    level: RollingMoments
    flow: LotSumState
    rate: DecayedRate
    cvd: PackedInt = 0
    ema: float | None = None
    trades: int = 0
    now_ms: int | None = None
    freeze_left: int = 0
    no_delta_count: int = 0
    late_count: int = 0


class _Symbol:
    """Everything known of a symbol."""

    def __init__(self, config: CvdConfig, state: _State | None = None) -> None:
        vpin_ms = (config.vpin_bucket_sec * 1000.0, config.vpin_half_life_sec * 1000.0)
        self.trailing = Trailing(state.trailing if state else None)
        self.vpin = Vpin(config.vpin_buckets, *vpin_ms, state.vpin if state else None)
        self.impact = Impact(config.impact_bars, config.impact_min_bars, config.bar_ms, state.impact if state else None)
        self.scale = Scale(config, state.scale if state else None)
        self.level = state.level if state else RollingMoments(size=config.level_window_trades)
        self.flow = LotSum(config.flow_window_ms, state.flow if state else None)
        self.rate = state.rate if state else DecayedRate(half_life_ms=config.rate_half_life_sec * 1000.0)
        self.cvd = int(state.cvd) if state else 0
        self.ema = state.ema if state else None
        self.trades = state.trades if state else 0
        self.now_ms = state.now_ms if state else None
        self.freeze_left = state.freeze_left if state else 0
        self.no_delta_count = state.no_delta_count if state else 0
        self.late_count = state.late_count if state else 0

    def state(self) -> _State:
        return _State(
            trailing=self.trailing.state(),
            vpin=self.vpin.state(),
            impact=self.impact.state(),
            scale=self.scale.state,
            level=self.level,
            flow=self.flow.state(),
            rate=self.rate,
            cvd=pack_int(self.cvd),
            ema=self.ema,
            trades=self.trades,
            now_ms=self.now_ms,
            freeze_left=self.freeze_left,
            no_delta_count=self.no_delta_count,
            late_count=self.late_count,
        )


class CvdProcessor:
    """`features.cvd` from trade rows, one partition. Ticks are taken for their place in the order only.

    Parameters
    ----------
    config
        Settings; results are a function of them and of the input alone.
    partition
        Number of the partition, part of the processors' common signature; results don't depend on it.
    """

    inputs: ClassVar[tuple[str, ...]] = (TICKS, ROWS)
    outputs: ClassVar[tuple[str, ...]] = (CVD,)
    ROW_SOURCES: ClassVar[frozenset[str]] = frozenset({"aggTrade"})

    def __init__(self, config: CvdConfig, partition: int) -> None:
        self.config = config
        self.partition = partition
        self._symbols: dict[str, _Symbol] = {}

    def step(self, topic: str, record: Record) -> list[Emit]:
        """A record for each trade; nothing else gives one."""
        if topic == TICKS or record["src"] != "aggTrade":
            return []
        name = record["symbol"]
        symbol = self._symbols.get(name)
        if symbol is None:
            symbol = self._symbols[name] = _Symbol(self.config)
        return [(CVD, name, self._trade(symbol, record))]

    def _trade(self, symbol: _Symbol, row: Record) -> Record:
        now_ms = self._arrive(symbol, row["ts_ms"])
        price, qty, side = row["price"], row["qty"], row["side"]
        lots = price_lots = 0
        if price is not None and qty is not None and 0.0 < price < MAX_UNITS and 0.0 < qty < MAX_UNITS:
            lots, price_lots = to_lots(qty), to_lots(price)
        signed: int | None = None
        given: tuple[float | None, float | None, float | None, bool] = _NotGiven
        if lots and price_lots:
            signed = lots if side == "buy" else (-lots if side == "sell" else None)
            notional = lots * price_lots
            symbol.trailing.push(now_ms, signed or 0, lots, notional)
            symbol.impact.push(now_ms, price_lots, signed or 0, notional)
        frozen = symbol.freeze_left > 0
        if signed is None:
            symbol.no_delta_count += 1
        else:
            given = self._signed(symbol, now_ms, signed, frozen)
        return self._record(symbol, row, signed, given, frozen)

    def _arrive(self, symbol: _Symbol, ts_ms: int) -> int:
        """Monotone event time; a pause before this trade decides how many go without z."""
        before_ms = symbol.now_ms
        if before_ms is None:
            symbol.now_ms = ts_ms
            return ts_ms
        pause_ms = ts_ms - before_ms
        if pause_ms <= 0:
            symbol.late_count += pause_ms < 0
            return before_ms
        config = self.config
        if pause_ms > config.hard_pause_ms:
            symbol.freeze_left = max(symbol.freeze_left, config.hard_freeze_trades)
        elif pause_ms > config.soft_pause_ms:
            symbol.freeze_left = max(symbol.freeze_left, config.soft_freeze_trades)
        symbol.now_ms = ts_ms
        return ts_ms

    def _signed(
        self, symbol: _Symbol, now_ms: int, signed: int, frozen: bool
    ) -> tuple[float | None, float | None, float | None, bool]:
        """Take a delta into everything that follows it; return (z_raw, scale, sigma_floor, floor_used)."""
        symbol.cvd += signed
        level = symbol.cvd / LOT
        ema = symbol.ema
        symbol.ema = level if ema is None else ema + self.config.ema_alpha * (level - ema)
        symbol.vpin.push(now_ms, signed)
        symbol.trades += 1
        if frozen:
            symbol.freeze_left -= 1
        withheld = frozen or symbol.trades < self.config.warmup_trades
        if self.config.z_mode == "level":
            return self._level_z(symbol, level, withheld)
        value = self._value(symbol, now_ms, signed)
        trades_per_sec = symbol.trailing.count / _MINUTE_SEC
        scale, floor, floor_used = symbol.scale.push(now_ms, value, trades_per_sec, self._scale_mode(trades_per_sec))
        return (None if withheld else value / scale), scale, floor, floor_used

    def _value(self, symbol: _Symbol, now_ms: int, signed: int) -> float:
        """The series that z measures, base units (rate: base units per second)."""
        mode = self.config.z_mode
        if mode == "delta":
            return signed / LOT
        if mode == "flow":
            return symbol.flow.push(now_ms, signed) / LOT
        return symbol.rate.push(now_ms, signed / LOT)

    def _level_z(
        self, symbol: _Symbol, level: float, withheld: bool
    ) -> tuple[float | None, float | None, float | None, bool]:
        """z of cvd itself against the window before it; 0 where that window doesn't vary."""
        moments = symbol.level
        z_raw = scale = None
        if moments.count >= self.config.level_min_trades:
            deviation = moments.population_std()
            scale = max(deviation, LEAST_SCALE)
            if not withheld:
                z_raw = (level - moments.mean) / scale if deviation > LEAST_SCALE else 0.0
        moments.push(level)
        return z_raw, scale, None, False

    def _scale_mode(self, trades_per_sec: float) -> ScaleMode:
        if self.config.auto_scale_mode:
            if trades_per_sec > self.config.active_trades_per_sec:
                return "ewma"
            if trades_per_sec < self.config.quiet_trades_per_sec:
                return "hybrid"
        return self.config.scale_mode

    def _warming(self, symbol: _Symbol) -> bool:
        config = self.config
        if symbol.trades < config.warmup_trades:
            return True
        # the level's window held one value fewer when this trade's z was due
        return config.z_mode == "level" and symbol.trades <= config.level_min_trades

    def _record(
        self,
        symbol: _Symbol,
        row: Record,
        signed: int | None,
        given: tuple[float | None, float | None, float | None, bool],
        frozen: bool,
    ) -> Record:
        z_raw, scale, sigma_floor, floor_used = given
        z = z_raw
        if z is not None:
            limit = self.config.winsor_limit
            z = limit if z > limit else (-limit if z < -limit else z)
        trailing = symbol.trailing
        trades_per_sec = trailing.count / _MINUTE_SEC
        warmup = self._warming(symbol)
        return {
            "symbol": row["symbol"],
            "ts_ms": row["ts_ms"],
            "event_ts_ms": row["event_ts_ms"],
            "recv_ts_ms": row["recv_ts_ms"],
            "agg_trade_id": row["agg_trade_id"],
            "price": _finite(row["price"]),
            "qty": _finite(row["qty"]),
            "side": row["side"],
            "side_source": row["side_source"],
            "delta": None if signed is None else signed / LOT,
            "cvd": symbol.cvd / LOT,
            "cvd_ema": symbol.ema,
            "z_raw": z_raw,
            "z_cvd": z,
            "scale": scale,
            "sigma_floor": sigma_floor,
            "floor_used": floor_used,
            "trades_per_sec": trades_per_sec,
            "volume_60s": trailing.volume / LOT,
            "notional_60s": trailing.notional / (LOT * LOT),
            "imbalance_1s": trailing.imbalance(0),
            "imbalance_5s": trailing.imbalance(1),
            "imbalance_10s": trailing.imbalance(2),
            "imbalance_30s": trailing.imbalance(3),
            "buy_ratio": trailing.buy_ratio(),
            "vpin": symbol.vpin.value(),
            "kyle_lambda": symbol.impact.kyle_lambda,
            "amihud": symbol.impact.amihud,
            "regime": "unknown" if warmup else self._regime(trades_per_sec),
            "warmup": warmup,
            "frozen": frozen,
            "book_state": row["book_state"],
            "gap_count": row["gap_count"],
            "latency_ms": row["latency_ms"],
            "no_delta_count": symbol.no_delta_count,
            "late_count": symbol.late_count,
        }

    def _regime(self, trades_per_sec: float) -> str:
        if trades_per_sec > self.config.active_trades_per_sec:
            return "active"
        return "quiet" if trades_per_sec < self.config.quiet_trades_per_sec else "normal"

    def snapshot(self) -> dict[str, bytes]:
        """State per symbol."""
        return {name: msgspec.msgpack.encode(self._symbols[name].state()) for name in sorted(self._symbols)}

    def restore(self, states: Mapping[str, bytes]) -> None:
        """Replace the state by one that `snapshot` returned under the same configuration."""
        self._symbols = {
            name: _Symbol(self.config, msgspec.msgpack.decode(states[name], type=_State))
            for name in sorted(states)
            if name
        }


def _finite(value: float | None) -> float | None:
    return value if value is not None and value - value == 0.0 else None
