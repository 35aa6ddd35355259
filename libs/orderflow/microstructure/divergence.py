"""Where price and order flow disagree: three plain rules, fractal-pivot divergence, anomalies.

The plain rules read the z of the moment. The pivots read levels (cumulative CVD and cumulative OFI) on bars of a fixed
clock: comparing momentary z at pivots mostly classifies noise. Every threshold on a level grows with the root of the
distance between the pivots, as a random walk does, so that noise is refused at any distance.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated, Any, Final, Literal, TypeAlias

import msgspec

DivType: TypeAlias = Literal["bullish", "bearish", "inconsistent"]
PivotKind: TypeAlias = Literal["high", "low"]
PivotDivergence: TypeAlias = Literal["bull", "bear", "hidden_bull", "hidden_bear"]

STRONG_SCORE: Final = 70.0
NORMAL_SCORE: Final = 50.0
MAX_HOLE_BARS: Final = 5
"""A hole in the clock longer than this drops the bars before it: no pivot is read across it."""

_W_SIZE: Final = 0.35
_W_PIVOT: Final = 0.25
_W_AGREE: Final = 0.25
_W_CONSISTENCY: Final = 0.15


class DivergenceConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Settings of the plain rules, the anomalies and the pivots."""

    trend_sec: Annotated[
        int, msgspec.Meta(ge=1, le=60, description="seconds over which the price trend of the plain rules is taken")
    ] = 30
    min_trend_bps: Annotated[
        float, msgspec.Meta(ge=0, le=1e4, description="the trend must be beyond this, basis points")
    ] = 0.0
    rule_z_ofi: Annotated[float, msgspec.Meta(ge=0, le=10, description="bullish, bearish: |z_ofi| above")] = 1.0
    rule_z_cvd: Annotated[float, msgspec.Meta(ge=0, le=10, description="bullish, bearish: |z_cvd| above")] = 0.5
    conflict_z_ofi: Annotated[float, msgspec.Meta(ge=0, le=10, description="inconsistent: |z_ofi| above")] = 2.0
    conflict_z_cvd: Annotated[float, msgspec.Meta(ge=0, le=10, description="inconsistent: |z_cvd| above")] = 1.0
    anomaly_z_ofi: Annotated[
        float, msgspec.Meta(gt=0, le=1e6, description="anomaly_ofi: |z_ofi| before clip above")
    ] = 3.0
    anomaly_z_cvd: Annotated[
        float, msgspec.Meta(gt=0, le=1e6, description="anomaly_cvd: |z_cvd| before clip above")
    ] = 2.5
    anomaly_price_bps: Annotated[
        float, msgspec.Meta(gt=0, le=1e5, description="anomaly_price: |trend| above, basis points")
    ] = 500.0
    cooldown_sec: Annotated[
        float, msgspec.Meta(ge=0, le=3600, description="seconds between two events of one kind and symbol")
    ] = 30.0
    bar_sec: Annotated[int, msgspec.Meta(ge=1, le=60, description="seconds of the tick clock per bar")] = 1
    swing_left: Annotated[int, msgspec.Meta(ge=1, le=300, description="bars before a pivot that it must exceed")] = 12
    swing_right: Annotated[
        int, msgspec.Meta(ge=1, le=300, description="bars after a pivot that must not exceed it")
    ] = 12
    lookback_bars: Annotated[
        int, msgspec.Meta(ge=10, le=3600, description="bars over which the scale of changes is taken, and warm-up")
    ] = 60
    min_separation: Annotated[int, msgspec.Meta(ge=1, le=600, description="least bars between two paired pivots")] = 6
    max_separation: Annotated[int, msgspec.Meta(ge=1, le=7200, description="most bars between two paired pivots")] = 180
    pair_pivots: Annotated[
        int, msgspec.Meta(ge=1, le=64, description="earlier pivots that a new one is paired with")
    ] = 3
    price_band: Annotated[
        float,
        msgspec.Meta(ge=0, le=100, description="least price change, in mean bar changes times root of separation"),
    ] = 0.5
    flow_band: Annotated[
        float, msgspec.Meta(ge=0, le=100, description="least flow change, in mean bar changes times root of separation")
    ] = 1.0
    min_channels: Annotated[
        int, msgspec.Meta(ge=1, le=2, description="channels (CVD, OFI) that must show the divergence")
    ] = 2
    z_hi: Annotated[float, msgspec.Meta(ge=0, le=100, description="size of the flow change that scores in full")] = 1.5
    z_mid: Annotated[float, msgspec.Meta(ge=0, le=100, description="size of the flow change that scores .7")] = 0.7
    consistency_min: Annotated[
        float, msgspec.Meta(ge=0, lt=1, description="fusion consistency below which it adds nothing to the score")
    ] = 0.3
    min_score: Annotated[float, msgspec.Meta(ge=0, le=100, description="score below which nothing is said")] = 50.0

    def __post_init__(self) -> None:
        if self.min_separation > self.max_separation:
            raise ValueError(
                f"min_separation {self.min_separation} must not exceed max_separation {self.max_separation}"
            )
        if self.z_mid > self.z_hi:
            raise ValueError(f"z_mid {self.z_mid} must not exceed z_hi {self.z_hi}")


# --- plain rules --------------------------------------------------------------------------------------------------


def plain_rule(
    config: DivergenceConfig, trend_bps: float | None, z_ofi: float | None, z_cvd: float | None
) -> tuple[DivType, float] | None:
    """The plain rule in force and its strength, or None. The three exclude each other.

    bullish: trend < 0, z_ofi > 1, z_cvd > .5; strength = |trend_bps| * (z_ofi + z_cvd) / 100. bearish: mirrored.
    inconsistent: |z_ofi| > 2, |z_cvd| > 1, signs differ; strength = |z_ofi - z_cvd|.
    """
    if z_ofi is None or z_cvd is None:
        return None
    if z_ofi * z_cvd < 0.0:
        if abs(z_ofi) > config.conflict_z_ofi and abs(z_cvd) > config.conflict_z_cvd:
            return "inconsistent", abs(z_ofi - z_cvd)
        return None
    if trend_bps is None or abs(trend_bps) <= config.min_trend_bps:
        return None
    if trend_bps < 0.0 and z_ofi > config.rule_z_ofi and z_cvd > config.rule_z_cvd:
        return "bullish", -trend_bps * (z_ofi + z_cvd) / 100.0
    if trend_bps > 0.0 and z_ofi < -config.rule_z_ofi and z_cvd < -config.rule_z_cvd:
        return "bearish", trend_bps * -(z_ofi + z_cvd) / 100.0
    return None


class AlertState(msgspec.Struct):
    """Which conditions hold, and when each was last told. Bounded by the number of kinds."""

    on: dict[str, bool] = {}
    told_ms: dict[str, int] = {}


def onset(state: AlertState, kind: str, holds: bool, now_ms: int, cooldown_ms: float) -> bool:
    """True where a condition begins and its last event is at least `cooldown_ms` old: one condition, one event."""
    if not holds:
        if kind in state.on:
            del state.on[kind]
        return False
    if kind in state.on:
        return False
    state.on[kind] = True
    told = state.told_ms.get(kind)
    if told is not None and now_ms - told < cooldown_ms:
        return False
    state.told_ms[kind] = now_ms
    return True


# --- pivots -------------------------------------------------------------------------------------------------------


class Pivot(msgspec.Struct, frozen=True, array_like=True):
    """A fractal pivot: its bar, and price and levels there."""

    bar: int
    ts_ms: int
    price: float
    cvd: float
    ofi: float


class PivotState(msgspec.Struct):
    """Bars and pivots of one symbol, all bounded by the configuration."""

    bar: int = -1
    ts_ms: list[int] = []
    price: list[float] = []
    cvd: list[float] = []
    ofi: list[float] = []
    highs: list[Pivot] = []
    lows: list[Pivot] = []
    told_bar: dict[str, int] = {}


class Finding(msgspec.Struct, frozen=True):
    """A pivot or a pivot divergence, at its confirmation."""

    event_type: str
    strength: float | None
    meta: dict[str, Any]


def pivot_kind(values: Sequence[float], left: int, right: int) -> PivotKind | None:
    """Whether the value `right` places before the end is a pivot among the last left + 1 + right.

    Strict on the left, not on the right: of a plateau the first point alone counts; a constant has none.
    """
    at = len(values) - 1 - right
    value = values[at]
    before = values[at - left : at]
    after = values[at + 1 :]
    if value > max(before) and value >= max(after):
        return "high"
    if value < min(before) and value <= min(after):
        return "low"
    return None


def classify(kind: PivotKind, price: int, flow: int) -> PivotDivergence | None:
    """The divergence of two pivots of a kind, from the signs (-1, 0, 1) of the changes of price and of a level.

    lows: lower price, higher flow = bull; higher price, lower flow = hidden_bull. highs: higher price, lower flow =
    bear; lower price, higher flow = hidden_bear. Anything else, a change within its band (0) too: none.
    """
    if price * flow >= 0:
        return None
    if kind == "low":
        return "bull" if price < 0 else "hidden_bull"
    return "bear" if price > 0 else "hidden_bear"


def take_bar(
    config: DivergenceConfig,
    state: PivotState,
    bar: int,
    ts_ms: int,
    price: float,
    cvd: float,
    ofi: float,
    consistency: float,
) -> list[Finding]:
    """Add the bar numbered `bar` (rising; clock // bar length); return the pivot it confirms and what that shows.

    A pivot is confirmed `swing_right` bars after it: findings belong to the time of this bar, the pivot's own time is
    in their details.
    """
    if bar <= state.bar:
        return []
    if state.bar >= 0 and bar - state.bar > MAX_HOLE_BARS:
        for series in (state.ts_ms, state.price, state.cvd, state.ofi, state.highs, state.lows):
            series.clear()
    state.bar = bar
    _append(config, state, ts_ms, price, cvd, ofi)
    if len(state.price) < config.swing_left + config.swing_right + 1:
        return []
    recent = state.price[-(config.swing_left + config.swing_right + 1) :]
    kind = pivot_kind(recent, config.swing_left, config.swing_right)
    if kind is None:
        return []
    at = len(state.price) - 1 - config.swing_right
    pivot = Pivot(bar - config.swing_right, state.ts_ms[at], state.price[at], state.cvd[at], state.ofi[at])
    findings = [Finding(f"pivot_{kind}", None, {"pivot_ts_ms": pivot.ts_ms, "price": pivot.price})]
    pivots = state.highs if kind == "high" else state.lows
    if len(state.price) > config.lookback_bars:
        best = _best_pair(config, state, kind, pivots, pivot, consistency)
        if best is not None and _cooled(config, state, best.event_type, bar):
            findings.append(best)
    pivots.append(pivot)
    if len(pivots) > config.pair_pivots:
        del pivots[0]
    return findings


def event_rate(config: DivergenceConfig, price: Sequence[float], cvd: Sequence[float], ofi: Sequence[float]) -> float:
    """Pivot divergences per bar over series of equal length: on shuffled or random input, the noise rate."""
    state = PivotState()
    found = 0
    for bar in range(len(price)):
        for one in take_bar(config, state, bar, bar * 1000, price[bar], cvd[bar], ofi[bar], 0.0):
            found += one.event_type.startswith("pivot_div_")
    return found / len(price) if price else 0.0


def _append(config: DivergenceConfig, state: PivotState, ts_ms: int, price: float, cvd: float, ofi: float) -> None:
    state.ts_ms.append(ts_ms)
    state.price.append(price)
    state.cvd.append(cvd)
    state.ofi.append(ofi)
    keep = max(config.swing_left + config.swing_right, config.lookback_bars) + 1
    if len(state.price) > keep:
        del state.ts_ms[0], state.price[0], state.cvd[0], state.ofi[0]


def _cooled(config: DivergenceConfig, state: PivotState, event_type: str, bar: int) -> bool:
    told = state.told_bar.get(event_type)
    if told is not None and (bar - told) * config.bar_sec < config.cooldown_sec:
        return False
    state.told_bar[event_type] = bar
    return True


def _mean_change(values: Sequence[float]) -> float:
    """Mean absolute change from bar to bar."""
    return math.fsum(abs(values[i] - values[i - 1]) for i in range(1, len(values))) / (len(values) - 1)


def _best_pair(
    config: DivergenceConfig,
    state: PivotState,
    kind: PivotKind,
    pivots: list[Pivot],
    new: Pivot,
    consistency: float,
) -> Finding | None:
    """The divergence with the highest score over the latest `pair_pivots` pivots; of equals the nearest."""
    scales = tuple(_mean_change(values) for values in (state.price, state.cvd, state.ofi))
    best: Finding | None = None
    for old in reversed(pivots):
        separation = new.bar - old.bar
        if not config.min_separation <= separation <= config.max_separation:
            continue
        found = _compare(config, kind, old, new, scales, consistency)
        if found is not None and (best is None or (found.strength or 0.0) > (best.strength or 0.0)):
            best = found
    return best


def _size(change: float, scale: float, separation: int) -> float:
    """A change in units of what a random walk of this scale makes over `separation` bars; 0 where nothing moves."""
    unit = scale * math.sqrt(separation)
    return change / unit if unit > 0.0 else 0.0


def _sign(size: float, band: float) -> int:
    return 1 if size > band else -1 if size < -band else 0


def _compare(
    config: DivergenceConfig, kind: PivotKind, old: Pivot, new: Pivot, scales: tuple[float, ...], consistency: float
) -> Finding | None:
    separation = new.bar - old.bar
    price = _size(new.price - old.price, scales[0], separation)
    flows = {
        "cvd": _size(new.cvd - old.cvd, scales[1], separation),
        "ofi": _size(new.ofi - old.ofi, scales[2], separation),
    }
    price_sign = _sign(price, config.price_band)
    named = {name: classify(kind, price_sign, _sign(size, config.flow_band)) for name, size in flows.items()}
    # Price has one sign, so the channels that show a divergence all show the same one.
    channels = [name for name, one in named.items() if one is not None]
    if len(channels) < config.min_channels:
        return None
    size = max(abs(flows[name]) for name in channels)
    score = _score(config, separation, abs(price), size, len(channels) / len(flows), consistency)
    if score < config.min_score:
        return None
    meta = {
        "bars": separation,
        "channels": channels,
        "grade": "strong" if score >= STRONG_SCORE else "normal" if score >= NORMAL_SCORE else "weak",
        "pivot_ts_ms": new.ts_ms,
        "previous_ts_ms": old.ts_ms,
        "price": new.price,
        "previous_price": old.price,
        "price_size": price,
        "flow_size": size,
    }
    return Finding(f"pivot_div_{named[channels[0]]}", score, meta)


def _score(
    config: DivergenceConfig, separation: int, price: float, flow: float, agree: float, consistency: float
) -> float:
    """100 * (.35 size + .25 pivot + .25 agree + .15 consistency), each part in [0, 1]."""
    size = 1.0 if flow >= config.z_hi else 0.7 if flow >= config.z_mid else 0.3
    swing = config.swing_left + config.swing_right
    pivot = (min(1.0, separation / swing) + min(1.0, (price + flow) / 4.0)) / 2.0
    least = config.consistency_min
    part = 0.0 if consistency < least else (1.0 + 2.0 * (consistency - least) / (1.0 - least)) / 3.0
    return 100.0 * (_W_SIZE * size + _W_PIVOT * pivot + _W_AGREE * agree + _W_CONSISTENCY * part)
