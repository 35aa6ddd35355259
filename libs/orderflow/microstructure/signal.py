"""From a fusion record to a decision: one record of `signals` each, blocked ones with every guard that blocked them.

All times are event time T, made monotone per symbol. Guards are judged in the order of `GUARDS`; each is named in
`gate_reasons` whatever the others say, so that their counts can be compared.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, ClassVar, Final, Literal, TypeAlias

import msgspec

from orderflow.microstructure.fusion_commands import Controls, ControlState
from orderflow.processor import Emit, Record
from orderflow.topics import FUSION, SIGNALS, TICKS

GUARDS: Final = (
    "paused",
    "warmup",
    "book_not_synced",
    "spread",
    "lag",
    "missing_msgs",
    "low_activity",
    "weak_signal",
    "low_consistency",
    "reversal",
    "dedupe",
    "scenario",
    "neutral",
)
"""Every guard, in the order in which they are judged and listed."""

_DIRECTIONS: Final = {"strong_buy": 1, "buy": 1, "neutral": 0, "sell": -1, "strong_sell": -1}

_Bps: TypeAlias = Annotated[float, msgspec.Meta(ge=0, le=1e4)]
_Z: TypeAlias = Annotated[float, msgspec.Meta(ge=0, le=10)]
_Sec: TypeAlias = Annotated[float, msgspec.Meta(ge=0, le=86400)]


class Limits(msgspec.Struct, frozen=True):
    """|score| and consistency must both be above, strictly."""

    min_score: float
    min_consistency: float


_EVEN: Final = {
    "balanced": Limits(1.5, 0.15),
    "strong_only": Limits(2.5, 0.70),
    "v13_code": Limits(0.95, 0.12),
    "v13_production": Limits(1.0, 0.20),
    "v13_strict": Limits(2.0, 0.40),
}
SIGNAL_PRESETS: Final[dict[str, dict[str, Limits]]] = {
    **{name: {"active": one, "neutral": one, "quiet": one} for name, one in _EVEN.items()},
    "v13_regime": {"active": Limits(1.3, 0.45), "neutral": Limits(1.5, 0.50), "quiet": Limits(1.7, 0.55)},
}
"""Thresholds by name and regime; `microstructure-algorithms` 1.3 and 9."""


class Scenario(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One of the four of regime {A, Q} x volatility {H, L}."""

    enabled: Annotated[bool, msgspec.Meta(description="false: no signal in this scenario")] = True
    z_hi_long: Annotated[_Z, msgspec.Meta(description="buy: the stronger z, in its direction, at or above")] = 2.5
    z_hi_short: Annotated[_Z, msgspec.Meta(description="sell: the same")] = 2.5
    z_mid: Annotated[_Z, msgspec.Meta(description="the weaker z, in the direction, at or above")] = 0.5
    tp_bps: Annotated[_Bps, msgspec.Meta(description="take profit handed on, basis points")] = 12.0
    sl_bps: Annotated[_Bps, msgspec.Meta(description="stop loss handed on, basis points")] = 9.0
    min_hold_sec: Annotated[_Sec, msgspec.Meta(description="least seconds before a reversal")] = 10.0


class SignalConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Settings of `SignalProcessor`."""

    preset: Annotated[
        Literal["balanced", "strong_only", "v13_code", "v13_production", "v13_strict", "v13_regime"],
        msgspec.Meta(description="named thresholds; min_score and min_consistency override them"),
    ] = "balanced"
    min_score: Annotated[
        Annotated[float, msgspec.Meta(ge=0, le=20)] | None, msgspec.Meta(description="|score| must be above")
    ] = None
    min_consistency: Annotated[
        Annotated[float, msgspec.Meta(ge=0, le=1)] | None, msgspec.Meta(description="consistency must be above")
    ] = None
    divergence_ratio: Annotated[
        float,
        msgspec.Meta(
            gt=0, le=1, description="min_score is multiplied by this where a plain divergence points the same way"
        ),
    ] = 0.8
    max_spread_bps: Annotated[_Bps, msgspec.Meta(description="spread, or its being unknown, blocks above")] = 2.5
    max_lag_sec: Annotated[_Sec, msgspec.Meta(description="lag of the factors, or its being unknown, blocks above")] = (
        0.5
    )
    gap_cooldown_sec: Annotated[_Sec, msgspec.Meta(description="seconds blocked after gap_count rose")] = 120.0
    min_trades_per_min: Annotated[
        float, msgspec.Meta(ge=0, le=1e7, description="trades per minute, or their being unknown, block below")
    ] = 10.0
    min_quotes_per_sec: Annotated[
        float, msgspec.Meta(ge=0, le=1e6, description="quotes per second, or their being unknown, block below")
    ] = 1.0
    min_hold_sec: Annotated[
        _Sec, msgspec.Meta(description="least seconds before a reversal where no scenario is known")
    ] = 60.0
    reversal_streak: Annotated[
        int, msgspec.Meta(ge=1, le=10000, description="records in a row of the new direction before a reversal")
    ] = 3
    dedupe_ms: Annotated[
        int, msgspec.Meta(ge=0, le=3_600_000, description="least milliseconds of event time between confirmed signals")
    ] = 250
    ttl_ms: Annotated[
        int, msgspec.Meta(ge=1, le=86_400_000, description="how long a signal is meant to hold, milliseconds")
    ] = 10_000
    use_scenarios: Annotated[bool, msgspec.Meta(description="whether the four below hold")] = True
    a_h: Annotated[Scenario, msgspec.Meta(description="active, volatility q3")] = Scenario(
        z_hi_long=2.75, z_hi_short=2.5, z_mid=0.75, tp_bps=15.0, sl_bps=10.0, min_hold_sec=8.0
    )
    a_l: Annotated[Scenario, msgspec.Meta(description="active, volatility q1 or mid")] = Scenario(
        z_hi_long=2.25, z_hi_short=2.25, z_mid=0.6, min_hold_sec=12.0
    )
    q_h: Annotated[Scenario, msgspec.Meta(description="quiet, volatility q3")] = Scenario(
        z_hi_long=2.5, z_hi_short=2.75, z_mid=0.75, tp_bps=10.0, sl_bps=8.0, min_hold_sec=15.0
    )
    q_l: Annotated[Scenario, msgspec.Meta(description="quiet, volatility q1 or mid")] = Scenario(
        z_hi_long=2.0, z_hi_short=2.0, tp_bps=8.0, sl_bps=7.0, min_hold_sec=20.0
    )

    def limits(self) -> dict[str, Limits]:
        """Thresholds in force, by regime."""
        return {
            regime: Limits(
                one.min_score if self.min_score is None else self.min_score,
                one.min_consistency if self.min_consistency is None else self.min_consistency,
            )
            for regime, one in SIGNAL_PRESETS[self.preset].items()
        }


class SignalState(msgspec.Struct):
    """Of one symbol."""

    now_ms: int = 0
    gap_count: int = -1
    """-1: none seen yet; the first is where counting begins."""
    gap_until_ms: int = 0
    streak: int = 0
    streak_direction: int = 0
    confirmed_ms: int = 0
    confirmed_direction: int = 0
    held_since_ms: int = 0
    """When the direction confirmed last was first confirmed."""


_encode = msgspec.msgpack.Encoder(order="deterministic").encode
_decode_symbol = msgspec.msgpack.Decoder(SignalState).decode
_decode_controls = msgspec.msgpack.Decoder(ControlState).decode


class SignalProcessor:
    """`orderflow.processor.Processor` of the decisions. `fingerprint`: that of the settings, put into every record."""

    inputs: ClassVar[tuple[str, ...]] = (TICKS, FUSION)
    outputs: ClassVar[tuple[str, ...]] = (SIGNALS,)

    def __init__(self, config: SignalConfig, partition: int, fingerprint: str) -> None:
        self.partition = partition
        self._config = config
        self._fingerprint = fingerprint
        self._suffix = fingerprint[:8]
        self._controls = Controls()
        self._states: dict[str, SignalState] = {}
        self._limits = config.limits()
        self._gap_cooldown_ms = round(config.gap_cooldown_sec * 1000)
        scenarios = {"A_H": config.a_h, "A_L": config.a_l, "Q_H": config.q_h, "Q_L": config.q_l}
        self._scenarios: dict[str, Scenario] = scenarios if config.use_scenarios else {}

    def step(self, topic: str, record: Record) -> list[Emit]:
        """Take a tick or a fusion record."""
        if topic == FUSION:
            return [self._decide(record)]
        if topic == TICKS:
            self._controls.take(record)
        return []

    def snapshot(self) -> dict[str, bytes]:
        """The state: commands under "", the rest per symbol."""
        states = {"": _encode(self._controls.state)}
        for symbol in sorted(self._states):
            states[symbol] = _encode(self._states[symbol])
        return states

    def restore(self, states: Mapping[str, bytes]) -> None:
        """Replace the state."""
        self._controls.state = _decode_controls(states[""]) if "" in states else ControlState()
        self._states = {name: _decode_symbol(one) for name, one in states.items() if name}

    def _decide(self, fusion: Record) -> Emit:
        symbol: str = fusion["symbol"]
        state = self._states.get(symbol)
        if state is None:
            state = self._states[symbol] = SignalState()
        if fusion["ts_ms"] > state.now_ms:
            state.now_ms = fusion["ts_ms"]
        direction = _DIRECTIONS.get(fusion["strength"], 0)
        self._follow(state, fusion["gap_count"], direction)
        name = scenario_of(fusion["regime"], fusion["vol_slice"])
        scenario = self._scenarios.get(name) if name is not None else None
        reasons: list[str] = []
        self._judge_market(state, fusion, reasons)
        self._judge_score(fusion, direction, reasons)
        self._judge_pace(state, scenario, direction, reasons)
        if scenario is not None and not _fits(scenario, direction, fusion["z_ofi"], fusion["z_cvd"]):
            reasons.append("scenario")
        if direction == 0:
            reasons.append("neutral")
        confirm = not reasons
        if confirm:
            self._confirm(state, direction)
        return SIGNALS, symbol, self._record(fusion, direction, reasons, name, scenario)

    def _follow(self, state: SignalState, gap_count: int, direction: int) -> None:
        """Keep count of gaps and of records of one direction in a row."""
        if state.gap_count < 0:
            state.gap_count = gap_count
        elif gap_count > state.gap_count:
            state.gap_count = gap_count
            state.gap_until_ms = state.now_ms + self._gap_cooldown_ms
        if direction != state.streak_direction:
            state.streak_direction = direction
            state.streak = 0
        if state.streak < self._config.reversal_streak:
            state.streak += 1

    def _judge_market(self, state: SignalState, fusion: Record, reasons: list[str]) -> None:
        """Guards on the state of the data and the market."""
        config = self._config
        slices = (fusion["regime"], fusion["session"], fusion["vol_slice"])
        if self._controls.is_paused(fusion["symbol"], slices):
            reasons.append("paused")
        if fusion["warmup"]:
            reasons.append("warmup")
        if fusion["book_state"] != "synced":
            reasons.append("book_not_synced")
        if not _within(fusion["spread_bps"], 0.0, config.max_spread_bps):
            reasons.append("spread")
        if not _within(fusion["lag_sec"], 0.0, config.max_lag_sec):
            reasons.append("lag")
        if state.now_ms < state.gap_until_ms:
            reasons.append("missing_msgs")
        if not (
            _within(fusion["trades_per_min"], config.min_trades_per_min, _ANY)
            and _within(fusion["quote_rate"], config.min_quotes_per_sec, _ANY)
        ):
            reasons.append("low_activity")

    def _judge_score(self, fusion: Record, direction: int, reasons: list[str]) -> None:
        """Guards on the score itself."""
        limits = self._limits.get(fusion["regime"]) or self._limits["neutral"]
        least = limits.min_score
        if (fusion["div_type"] == "bullish" and direction > 0) or (fusion["div_type"] == "bearish" and direction < 0):
            least *= self._config.divergence_ratio
        score = fusion["score"]
        # Written so that NaN is weak.
        if score is None or not abs(score) > least:
            reasons.append("weak_signal")
        if not fusion["consistency"] > limits.min_consistency:
            reasons.append("low_consistency")

    def _judge_pace(self, state: SignalState, scenario: Scenario | None, direction: int, reasons: list[str]) -> None:
        """Guards on what was confirmed before."""
        if not state.confirmed_direction:
            return
        config = self._config
        if direction * state.confirmed_direction < 0:
            hold_sec = config.min_hold_sec if scenario is None else scenario.min_hold_sec
            if state.now_ms - state.held_since_ms < hold_sec * 1000.0 or state.streak < config.reversal_streak:
                reasons.append("reversal")
        if state.now_ms - state.confirmed_ms < config.dedupe_ms:
            reasons.append("dedupe")

    def _confirm(self, state: SignalState, direction: int) -> None:
        if direction != state.confirmed_direction:
            state.confirmed_direction = direction
            state.held_since_ms = state.now_ms
        state.confirmed_ms = state.now_ms

    def _record(
        self, fusion: Record, direction: int, reasons: list[str], name: str | None, scenario: Scenario | None
    ) -> Record:
        confirm = not reasons
        return {
            "symbol": fusion["symbol"],
            "signal_id": f"{fusion['symbol']}-{fusion['seq']}-{fusion['sub']}-{self._suffix}",
            "ts_ms": fusion["ts_ms"],
            "event_ts_ms": fusion["event_ts_ms"],
            "recv_ts_ms": fusion["recv_ts_ms"],
            "score": fusion["score"],
            "proba": fusion["proba"],
            "z_ofi": fusion["z_ofi"],
            "z_cvd": fusion["z_cvd"],
            "regime": fusion["regime"],
            "div_type": fusion["div_type"],
            "confirm": confirm,
            "gating": not confirm,
            "gate_reasons": reasons,
            "direction": direction,
            "strength": fusion["strength"],
            "consistency": fusion["consistency"],
            "price": fusion["price"],
            "mid": fusion["mid"],
            "spread_bps": fusion["spread_bps"],
            "skew_ms": fusion["skew_ms"],
            "ttl_ms": self._config.ttl_ms,
            "config_fingerprint": self._fingerprint,
            "book_state": fusion["book_state"],
            "gap_count": fusion["gap_count"],
            "latency_ms": fusion["latency_ms"],
            "src": fusion["src"],
            "lag_sec": fusion["lag_sec"],
            "scenario": name,
            "tp_bps": None if scenario is None else scenario.tp_bps,
            "sl_bps": None if scenario is None else scenario.sl_bps,
        }


_ANY: Final = float("inf")


def _within(value: float | None, low: float, high: float) -> bool:
    """Whether a value is known and in [low, high]; NaN is not."""
    return value is not None and low <= value <= high


def scenario_of(regime: str, vol_slice: str) -> str | None:
    """A_H, A_L, Q_H or Q_L; None while the regime is neutral or the volatility slice unknown."""
    first = "A" if regime == "active" else "Q" if regime == "quiet" else None
    if first is None or vol_slice == "unknown":
        return None
    return f"{first}_H" if vol_slice == "q3" else f"{first}_L"


def _fits(scenario: Scenario, direction: int, z_ofi: float | None, z_cvd: float | None) -> bool:
    """Whether the scenario is enabled and both factors reach its marks in the signal's direction."""
    if not scenario.enabled:
        return False
    if direction == 0:
        return True  # nothing to judge; the guard `neutral` says so
    if z_ofi is None or z_cvd is None:
        return False
    a = direction * z_ofi
    b = direction * z_cvd
    high, low = (a, b) if a >= b else (b, a)
    return high >= (scenario.z_hi_long if direction > 0 else scenario.z_hi_short) and low >= scenario.z_mid
