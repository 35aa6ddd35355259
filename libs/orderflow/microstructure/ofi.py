"""Order flow imbalance: one record a quote or depth row. Definitions of every field: `docs/definitions.md`.

Level 1 comes from quotes (bookTicker shows every change of the best prices), deeper levels from depth rows (100 ms
apart), so that nothing is counted twice. No difference is ever taken across a gap, a resync or a frame that can't be
trusted.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, ClassVar, Final, Literal

import msgspec

from orderflow.microstructure.ofi_flow import (
    best_flow,
    level_differences,
    padded,
    price_flows,
    rank_flows,
    valid_depth,
    valid_quote,
)
from orderflow.microstructure.ofi_micro import MicroPrice
from orderflow.microstructure.ofi_weights import IntegratedWeights
from orderflow.microstructure.windows import DecayedMean, RateCounter, RollingMoments, WindowSum
from orderflow.processor import Emit, Record
from orderflow.topics import OFI, ROWS, TICKS

__all__ = ["OfiConfig", "OfiProcessor"]

_Weight = Annotated[float, msgspec.Meta(ge=0.0, le=1.0)]
_INF: Final = float("inf")


class OfiConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Settings of order flow imbalance."""

    method: Annotated[
        Literal["cks", "level_difference", "price_keyed", "integrated"],
        msgspec.Meta(description="how flow is measured; level_difference is kept for comparison only"),
    ] = "cks"
    weights: Annotated[
        tuple[_Weight, ...],
        msgspec.Meta(min_length=1, max_length=20, description="per level, best first; their number is the levels used"),
    ] = (0.4, 0.25, 0.2, 0.1, 0.05)
    z_window: Annotated[int, msgspec.Meta(ge=2, le=10_000, description="values in the window of z")] = 300
    warmup_rows: Annotated[int, msgspec.Meta(ge=2, le=10_000, description="values before z is given")] = 60
    std_floor: Annotated[
        float, msgspec.Meta(ge=1e-12, le=1e12, description="least deviation that z divides by, base units")
    ] = 1e-4
    z_clip: Annotated[
        Annotated[float, msgspec.Meta(gt=0.0, le=1e6)] | None,
        msgspec.Meta(description="bound of |ofi_z|; null for none. ofi_z_raw is never clipped"),
    ] = 3.0
    ema_alpha: Annotated[float, msgspec.Meta(gt=0.0, le=1.0, description="weight of the newest value in ofi_ema")] = 0.2
    window_ms: Annotated[int, msgspec.Meta(ge=1, le=60_000, description="span of ofi_sum_window, ms of event time")] = (
        5000
    )
    pause_ms: Annotated[
        int, msgspec.Meta(ge=1, le=3_600_000, description="pause beyond which a value is kept out of z, ms")
    ] = 2000
    depth_half_life_sec: Annotated[
        float, msgspec.Meta(gt=0.0, le=86_400.0, description="half-life of the mean depth behind ofi_norm, s")
    ] = 60.0
    rate_window_ms: Annotated[
        int, msgspec.Meta(ge=100, le=60_000, description="span of quote_rate, ms of event time")
    ] = 10_000
    active_quotes_per_sec: Annotated[
        float, msgspec.Meta(gt=0.0, le=1e6, description="regime is active from this quote rate on")
    ] = 50.0
    quiet_quotes_per_sec: Annotated[
        float, msgspec.Meta(ge=0.0, le=1e6, description="regime is quiet below this quote rate")
    ] = 5.0
    refresh_sec: Annotated[
        float, msgspec.Meta(ge=0.1, le=3600.0, description="clock time between estimates of micro-price and weights, s")
    ] = 10.0
    integrated_half_life_sec: Annotated[
        float, msgspec.Meta(gt=0.0, le=604_800.0, description="half-life of the covariance behind `integrated`, s")
    ] = 3600.0
    integrated_min_rows: Annotated[
        int, msgspec.Meta(ge=2, le=1_000_000, description="depth rows before `integrated` leaves `weights`")
    ] = 100
    micro_half_life_sec: Annotated[
        float, msgspec.Meta(gt=0.0, le=604_800.0, description="half-life of the counts behind micro_price, s")
    ] = 3600.0
    micro_min_transitions: Annotated[
        int, msgspec.Meta(ge=1, le=1_000_000, description="quotes before micro_price leaves the weighted mid")
    ] = 500

    def __post_init__(self) -> None:
        total = sum(self.weights)
        if not abs(total - 1.0) <= 1e-9:
            raise ValueError(f"weights is {list(self.weights)}, which sum to {total:.12g}: they must sum to 1")
        if self.warmup_rows > self.z_window:
            raise ValueError(f"warmup_rows is {self.warmup_rows}: it must not exceed z_window ({self.z_window})")
        if self.quiet_quotes_per_sec >= self.active_quotes_per_sec:
            raise ValueError(
                f"quiet_quotes_per_sec is {self.quiet_quotes_per_sec:g}: it must be below active_quotes_per_sec "
                f"({self.active_quotes_per_sec:g})"
            )


class _Depth(msgspec.Struct, array_like=True):
    """The levels of a depth frame as they came, best first."""

    bid_px: list[float]
    bid_qtys: list[float]
    ask_px: list[float]
    ask_qtys: list[float]


class _State(msgspec.Struct):
    """Everything known of a symbol."""

    moments: RollingMoments
    window: WindowSum
    mean_depth: DecayedMean
    rate: RateCounter
    micro: MicroPrice
    integrated: IntegratedWeights | None
    has_quote: bool = False
    bid: float = 0.0
    bid_qty: float = 0.0
    ask: float = 0.0
    ask_qty: float = 0.0
    depth: _Depth | None = None
    ema: float | None = None
    gap_count: int | None = None
    now_ms: int | None = None
    """Event time made monotone over both sources."""
    quote_ts_ms: int | None = None
    depth_ts_ms: int | None = None
    quote_paused: bool = False
    """A pause lies between the last quote and the next."""
    depth_paused: bool = False
    bad_frames: int = 0
    late_rows: int = 0


class _Clock(msgspec.Struct):
    slot: int = -1
    """Number of the refresh interval that the last tick fell into."""


class _View(msgspec.Struct):
    """What a usable frame says of the best level."""

    queue_imbalance: float
    weighted_mid: float
    micro_price: float
    mid: float
    spread_bps: float


class OfiProcessor:
    """`features.ofi` from quotes and depth rows, one partition.

    Parameters
    ----------
    config
        Settings; results are a function of them and of the input alone.
    partition
        Number of the partition, part of the processors' common signature; results don't depend on it.
    """

    inputs: ClassVar[tuple[str, ...]] = (TICKS, ROWS)
    outputs: ClassVar[tuple[str, ...]] = (OFI,)
    ROW_SOURCES: ClassVar[frozenset[str]] = frozenset({"bookTicker", "depth"})

    def __init__(self, config: OfiConfig, partition: int) -> None:
        self.config = config
        self.partition = partition
        self._levels = len(config.weights)
        self._zeros = [0.0] * (self._levels - 1)
        self._states: dict[str, _State] = {}
        self._clock = _Clock()
        self._refresh_ns = round(config.refresh_sec * 1e9)

    def step(self, topic: str, record: Record) -> list[Emit]:
        """A record for each quote or depth row; ticks refresh the estimates and give nothing."""
        if topic == TICKS:
            if record["kind"] == "tick":
                self._tick(record["clock_ts_ns"])
            return []
        source = record["src"]
        if source == "bookTicker":
            handle = self._quote
        elif source == "depth":
            handle = self._depth
        else:
            return []
        symbol = record["symbol"]
        state = self._states.get(symbol)
        if state is None:
            state = self._states[symbol] = self._fresh()
        self._arrive(state, record["ts_ms"], record["gap_count"])
        return [(OFI, symbol, handle(state, record))]

    def _fresh(self) -> _State:
        config = self.config
        integrated = None
        if config.method == "integrated":
            integrated = IntegratedWeights(
                half_life_ms=config.integrated_half_life_sec * 1000.0,
                min_rows=config.integrated_min_rows,
                weights=list(config.weights),
            )
        return _State(
            moments=RollingMoments(size=config.z_window),
            window=WindowSum(span_ms=config.window_ms),
            mean_depth=DecayedMean(half_life_ms=config.depth_half_life_sec * 1000.0),
            rate=RateCounter(span_ms=config.rate_window_ms),
            micro=MicroPrice(
                half_life_sec=config.micro_half_life_sec, min_transitions=float(config.micro_min_transitions)
            ),
            integrated=integrated,
        )

    def _tick(self, clock_ts_ns: int) -> None:
        """Refresh every symbol's estimates once per interval of the clock."""
        slot = clock_ts_ns // self._refresh_ns
        if slot == self._clock.slot:
            return
        self._clock.slot = slot
        for symbol in sorted(self._states):
            state = self._states[symbol]
            state.micro.refresh(clock_ts_ns / 1e9)
            if state.integrated is not None:
                state.integrated.refresh()

    def _arrive(self, state: _State, ts_ms: int, gap_count: int) -> None:
        """What every row brings, usable or not: time, pauses, gaps."""
        if state.gap_count != gap_count:
            state.gap_count = gap_count
            state.has_quote = False
            state.depth = None
            state.micro.drop()
        now_ms = state.now_ms
        if now_ms is None:
            state.now_ms = ts_ms
        elif ts_ms > now_ms:
            state.now_ms = ts_ms
            if ts_ms - now_ms > self.config.pause_ms:
                state.quote_paused = state.depth_paused = True

    def _quote(self, state: _State, record: Record) -> Record:
        bid, bid_qty, ask, ask_qty = record["bid"], record["bid_qty"], record["ask"], record["ask_qty"]
        ts_ms: int = record["ts_ms"]
        if state.quote_ts_ms is not None and ts_ms < state.quote_ts_ms:
            state.late_rows += 1
        else:
            state.quote_ts_ms = ts_ms
        now_ms = state.now_ms
        assert now_ms is not None
        state.rate.push(now_ms)
        if not valid_quote(bid, bid_qty, ask, ask_qty):
            state.bad_frames += 1
            return self._record(state, record, 0.0, None, [], False, None)
        paused = state.quote_paused
        state.quote_paused = False
        view = self._look(state, bid, bid_qty, ask, ask_qty, True, paused)
        if self._levels == 1:
            state.mean_depth.push(now_ms, 0.5 * (bid_qty + ask_qty))
        flow_l1 = 0.0
        value = None
        components: list[float] = []
        if state.has_quote:
            flow_l1 = best_flow(state.bid, state.bid_qty, state.ask, state.ask_qty, bid, bid_qty, ask, ask_qty)
            flow = flow_l1
            if self.config.method == "level_difference":
                flow = (bid_qty - state.bid_qty) - (ask_qty - state.ask_qty)
            components = [flow, *self._zeros]
            value = (state.integrated.weights if state.integrated is not None else self.config.weights)[0] * flow
        state.bid, state.bid_qty, state.ask, state.ask_qty = bid, bid_qty, ask, ask_qty
        state.has_quote = True
        return self._record(state, record, flow_l1, value, components, paused, view)

    def _depth(self, state: _State, record: Record) -> Record:
        ts_ms: int = record["ts_ms"]
        if state.depth_ts_ms is not None and ts_ms < state.depth_ts_ms:
            state.late_rows += 1
        else:
            state.depth_ts_ms = ts_ms
        if record["book_state"] != "synced":
            state.depth = None
            return self._record(state, record, 0.0, None, [], False, None)
        frame = _Depth(record["bid_px"], record["bid_qtys"], record["ask_px"], record["ask_qtys"])
        if not valid_depth(frame.bid_px, frame.bid_qtys, frame.ask_px, frame.ask_qtys):
            state.bad_frames += 1
            return self._record(state, record, 0.0, None, [], False, None)
        paused = state.depth_paused
        state.depth_paused = False
        view = self._look(state, frame.bid_px[0], frame.bid_qtys[0], frame.ask_px[0], frame.ask_qtys[0], False, paused)
        value, components = self._deep_flow(state, frame)
        state.depth = frame
        return self._record(state, record, 0.0, value, components, paused, view)

    def _deep_flow(self, state: _State, frame: _Depth) -> tuple[float | None, list[float]]:
        """Weighted and per-level flow of ranks 2 and deeper since the previous depth frame."""
        levels, config, before = self._levels, self.config, state.depth
        if levels == 1:
            return None, []
        bid_qtys, ask_qtys = padded(frame.bid_qtys, levels, 0.0), padded(frame.ask_qtys, levels, 0.0)
        now_ms = state.now_ms
        assert now_ms is not None
        mean_depth = state.mean_depth.push(now_ms, (sum(bid_qtys) + sum(ask_qtys)) / (2 * levels))
        if before is None:
            return None, []
        if config.method == "price_keyed":
            components = price_flows(
                before.bid_px,
                before.bid_qtys,
                before.ask_px,
                before.ask_qtys,
                frame.bid_px,
                frame.bid_qtys,
                frame.ask_px,
                frame.ask_qtys,
                levels,
            )
        elif config.method == "level_difference":
            components = level_differences(
                padded(before.bid_qtys, levels, 0.0),
                padded(before.ask_qtys, levels, 0.0),
                bid_qtys,
                ask_qtys,
                1,
                levels,
            )
        else:
            components = rank_flows(
                padded(before.bid_px, levels, 0.0),
                padded(before.bid_qtys, levels, 0.0),
                padded(before.ask_px, levels, _INF),
                padded(before.ask_qtys, levels, 0.0),
                padded(frame.bid_px, levels, 0.0),
                bid_qtys,
                padded(frame.ask_px, levels, _INF),
                ask_qtys,
                0 if state.integrated is not None else 1,
                levels,
            )
        weights: tuple[float, ...] | list[float] = config.weights
        if state.integrated is not None:
            weights = state.integrated.weights
            state.integrated.push(now_ms, components, mean_depth)
            components[0] = 0.0  # level 1 is the quotes'
        value = 0.0
        for m in range(1, levels):
            value += weights[m] * components[m]
        return value, components

    def _look(
        self, state: _State, bid: float, bid_qty: float, ask: float, ask_qty: float, quote: bool, paused: bool
    ) -> _View:
        """Figures of the best level; quotes also teach the micro-price."""
        both = bid_qty + ask_qty
        imbalance = (bid_qty - ask_qty) / both
        spread = ask - bid
        mid = 0.5 * (bid + ask)
        weighted = (bid_qty * ask + ask_qty * bid) / both
        micro = state.micro
        if quote:
            if paused:
                micro.drop()
            micro.on_quote(imbalance, spread, mid)
        price = micro.price(imbalance, spread, mid) if micro.solution else None
        return _View(imbalance, weighted, weighted if price is None else price, mid, 1e4 * spread / mid)

    def _record(
        self,
        state: _State,
        row: Record,
        flow_l1: float,
        value: float | None,
        components: list[float],
        paused: bool,
        view: _View | None,
    ) -> Record:
        config = self.config
        moments = state.moments
        now_ms = state.now_ms
        assert now_ms is not None
        warm = len(moments.ring) >= config.warmup_rows
        norm = notional = ema = z = z_raw = scale = total = None
        std_zero = False
        if value is not None:
            if warm and not paused:
                scale = moments.sample_std()
                if scale < config.std_floor:
                    scale = config.std_floor
                    std_zero = True
                z = z_raw = (value - moments.mean) / scale
                clip = config.z_clip
                if clip is not None:
                    z = clip if z > clip else (-clip if z < -clip else z)
            if not paused:
                moments.push(value)
            total = state.window.push(now_ms, value)
            ema = state.ema
            ema = value if ema is None else ema + config.ema_alpha * (value - ema)
            state.ema = ema
            depth = state.mean_depth
            if depth.weight > 0.0:
                norm = value * depth.weight / depth.total
            if view is not None:
                notional = value * view.mid
        rate = state.rate.per_sec(now_ms)
        return {
            "src": row["src"],
            "symbol": row["symbol"],
            "ts_ms": row["ts_ms"],
            "event_ts_ms": row["event_ts_ms"],
            "recv_ts_ms": row["recv_ts_ms"],
            "ofi_l1": flow_l1,
            "ofi_value": value,
            "ofi_norm": norm,
            "ofi_notional": notional,
            "ofi_ema": ema,
            "ofi_z": z,
            "ofi_z_raw": z_raw,
            "scale": scale,
            "ofi_sum_window": total,
            "components": components,
            "queue_imbalance": None if view is None else view.queue_imbalance,
            "weighted_mid": None if view is None else view.weighted_mid,
            "micro_price": None if view is None else view.micro_price,
            "mid": None if view is None else view.mid,
            "spread_bps": None if view is None else view.spread_bps,
            "quote_rate": rate,
            "regime": self._regime(rate),
            "warmup": not warm,
            "std_zero": std_zero,
            "paused": paused,
            "book_state": row["book_state"],
            "gap_count": row["gap_count"],
            "latency_ms": row["latency_ms"],
            "weights": list(state.integrated.weights) if state.integrated is not None else [],
            "bad_frames": state.bad_frames,
            "late_rows": state.late_rows,
        }

    def _regime(self, quotes_per_sec: float | None) -> str:
        if quotes_per_sec is None:
            return "unknown"
        if quotes_per_sec >= self.config.active_quotes_per_sec:
            return "active"
        return "quiet" if quotes_per_sec < self.config.quiet_quotes_per_sec else "normal"

    def snapshot(self) -> dict[str, bytes]:
        """State per symbol, and the clock under ""."""
        encode = msgspec.msgpack.encode
        states = {symbol: encode(self._states[symbol]) for symbol in sorted(self._states)}
        states[""] = encode(self._clock)
        return states

    def restore(self, states: Mapping[str, bytes]) -> None:
        """Replace the state by one that `snapshot` returned under the same configuration."""
        self._states = {
            symbol: msgspec.msgpack.decode(states[symbol], type=_State) for symbol in sorted(states) if symbol
        }
        self._clock = msgspec.msgpack.decode(states[""], type=_Clock) if "" in states else _Clock()
