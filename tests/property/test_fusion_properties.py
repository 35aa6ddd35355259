"""What must hold for any input of fusion and signal: recovery, bounds, mirror images, no dead setting, no exception."""

from __future__ import annotations

import itertools
import math
import random
import sys
from pathlib import Path

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "unit"))

from fusion_streams import T0_MS, command, cvd, market, ofi, packed, run, tick, values
from orderflow.microstructure.fusion import FusionConfig, FusionProcessor, SliceWeights, consistency_of
from orderflow.microstructure.regime import MarketSample, Regime, RegimeConfig
from orderflow.microstructure.signal import Scenario, SignalConfig, SignalProcessor
from orderflow.topics import FEATURE_EVENTS, FUSION, SIGNALS

MIRROR = {"strong_buy": "strong_sell", "buy": "sell", "neutral": "neutral", "sell": "buy", "strong_sell": "strong_buy"}
Z = st.one_of(st.none(), st.floats(-12, 12), st.sampled_from([math.nan, math.inf, -math.inf, 0.0, -0.0, 1e-12, 1e308]))
BODIES = (
    {"type": "direction", "cvd_direction": -1, "symbol": "ETHUSDT"},
    {"type": "weights", "w_ofi": 0.3, "w_cvd": 0.3},
    {"type": "weights", "w_ofi": 0.1, "w_cvd": 0.2, "slice": "quiet"},
    {"type": "calibration", "a": -0.8, "b": 0.1, "version": "v1"},
    {"type": "pause", "slice": "active"},
)


def lively(seed=1, seconds=240):
    """A market with commands on the way."""
    steps = list(market(seed, seconds))
    for number, body in enumerate(BODIES):
        at_ms = T0_MS + (20 + 30 * number) * 1000
        steps.insert((number + 1) * len(steps) // 8, command(T0_MS, f"c{number}", body, at_ms))
    return steps


SHORT_REGIME = RegimeConfig(window_sec=10, vol_every_sec=2, vol_min=10)


def fusion_processor(config=None):
    return FusionProcessor(config or FusionConfig(regime=SHORT_REGIME), 0)


def signal_processor(config=None):
    return SignalProcessor(config or SignalConfig(), 0, "feedface00")


def signal_steps(steps):
    """The steps of the service behind: ticks, and what fusion made, in order of seq."""
    processor = fusion_processor()
    out = []
    for topic, record in steps:
        if topic == "market.ticks":
            out.append((topic, record))
        out.extend((FUSION, value) for name, _, value in run(processor, [(topic, record)]) if name == FUSION)
    return out


LIVELY = lively()
SIGNAL_STEPS = signal_steps(LIVELY)

# --- recovery -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "steps"), [(fusion_processor, LIVELY), (signal_processor, SIGNAL_STEPS)], ids=["fusion", "signal"]
)
def test_a_restart_at_any_point_changes_nothing(make, steps):
    whole = make()
    expected = [whole.step(*one) for one in steps]
    rng = random.Random(7)
    running = make()
    for number, (topic, record) in enumerate(steps):
        if number in (0, 1, 2) or rng.random() < 0.02:
            states = running.snapshot()
            running = make()
            running.restore(dict(sorted(states.items(), reverse=True)))
            assert running.snapshot() == states
        assert packed(running.step(topic, record)) == packed(expected[number])
    assert running.snapshot() == whole.snapshot()


def test_restoring_replaces_what_was_there():
    one, other = fusion_processor(), fusion_processor()
    run(one, LIVELY[:500])
    run(other, LIVELY)
    other.restore(one.snapshot())
    assert other.snapshot() == one.snapshot()
    other.restore({})
    assert other.snapshot() == fusion_processor().snapshot()


def test_order_of_symbols_does_not_matter():
    """Symbols touch nothing of each other, in whatever order they were first seen."""
    alone = [one for one in LIVELY if one[1].get("symbol", "ETHUSDT") == "ETHUSDT"]
    together = [value for value in values(run(fusion_processor(), LIVELY), FUSION) if value["symbol"] == "ETHUSDT"]
    separate = values(run(fusion_processor(), alone), FUSION)
    strip = [{k: v for k, v in value.items() if k != "seq"} for value in together]
    assert packed(strip) == packed([{k: v for k, v in value.items() if k != "seq"} for value in separate])


# --- bounds and mirrors -------------------------------------------------------------------------------------------


@given(st.floats(-1e6, 1e6), st.floats(-1e6, 1e6))
def test_consistency_is_a_share_and_even(a, b):
    value = consistency_of(a, b)
    assert 0.0 <= value <= 1.0
    assert value == consistency_of(b, a) == consistency_of(-a, -b)
    if abs(a) >= 1e-9:
        assert consistency_of(a, a) == 1.0
        assert consistency_of(a, -a) == 0.0


records = st.lists(
    st.tuples(
        st.sampled_from(["ofi", "cvd", "tick"]),
        Z,
        st.integers(-2000, 4000),
        st.sampled_from(["BTCUSDT", "ETHUSDT"]),
        st.sampled_from([0, 150, 900, -50]),
        st.booleans(),
    ),
    max_size=60,
)


def steps_of(drawn, sign=1.0):
    steps, t_ms = [], T0_MS
    for kind, z, move, symbol, delay, odd in drawn:
        t_ms += move
        z = None if z is None else sign * z
        if kind == "ofi":
            extra = {"mid": math.nan, "ofi_l1": math.inf, "spread_bps": None, "quote_rate": None} if odd else {}
            steps.append(ofi(t_ms, z, symbol, recv_ts_ms=t_ms + delay, **extra))
        elif kind == "cvd":
            extra = {"price": -1.0, "cvd": math.nan, "trades_per_sec": None, "notional_60s": math.inf} if odd else {}
            steps.append(cvd(t_ms, z, symbol, recv_ts_ms=t_ms + delay, **extra))
        else:
            routes = {"public": "down", "market": "down"} if odd else {}
            steps.append(tick(max(0, t_ms), routes=routes, trade_ts_ms={symbol: t_ms}))
    return steps


@given(records, st.sampled_from(["weighted", "zsum"]))
@settings(max_examples=60, deadline=None)
def test_no_input_raises_and_every_output_is_bounded(drawn, method):
    config = FusionConfig(warmup_updates=2, method=method)
    steps = steps_of(drawn)
    emits = run(FusionProcessor(config, 0), steps)
    bound = 8.0 if method == "zsum" else 4.0
    for value in values(emits, FUSION):
        assert value["score"] is None or abs(value["score"]) <= bound
        assert 0.0 <= value["consistency"] <= 1.0
        assert value["reasons"]
        assert value["strength"] in MIRROR
        assert (value["score"] is None) is (value["z_ofi"] is None or value["z_cvd"] is None)
        assert all(one is None or math.isfinite(one) for one in value.values() if isinstance(one, float))
    decided = run(signal_processor(), [(FUSION, value) for value in values(emits, FUSION)])
    assert len(decided) == len(values(emits, FUSION))


@given(records)
@settings(max_examples=60, deadline=None)
def test_negated_flow_is_the_mirror_image(drawn):
    config = FusionConfig(warmup_updates=2)
    plain = values(run(FusionProcessor(config, 0), steps_of(drawn)), FUSION)
    mirrored = values(run(FusionProcessor(config, 0), steps_of(drawn, -1.0)), FUSION)
    for a, b in zip(plain, mirrored, strict=True):
        assert b["strength"] == MIRROR[a["strength"]]
        assert b["reasons"] == a["reasons"]
        assert b["consistency"] == a["consistency"]
        for name in ("score", "score_z", "z_ofi", "z_cvd"):
            assert b[name] == (None if a[name] is None else -a[name])


@given(records)
@settings(max_examples=30, deadline=None)
def test_signals_of_the_mirror_image(drawn):
    config = FusionConfig(warmup_updates=0)
    both = []
    for sign in (1.0, -1.0):
        fused = values(run(FusionProcessor(config, 0), steps_of(drawn, sign)), FUSION)
        both.append(values(run(signal_processor(), [(FUSION, one) for one in fused]), SIGNALS))
    for a, b in zip(*both, strict=True):
        assert (b["direction"], b["gate_reasons"]) == (-a["direction"], a["gate_reasons"])


def test_confirmed_signals_keep_their_distance():
    records = values(run(signal_processor(), SIGNAL_STEPS), SIGNALS)
    for symbol in ("BTCUSDT", "ETHUSDT"):
        newest, times = 0, []
        for one in records:
            if one["symbol"] == symbol:
                newest = max(newest, one["ts_ms"])
                if one["confirm"]:
                    times.append(newest)
        assert len(times) > 4
        assert all(b - a >= 250 for a, b in itertools.pairwise(times))


# --- no dead setting ----------------------------------------------------------------------------------------------

FUSION_CHANGES = {
    "preset": "v13_code",
    "buy_score": 1.2,
    "strong_score": 2.0,
    "min_consistency": 0.5,
    "strong_consistency": 0.3,
    "method": "zsum",
    "w_ofi": 0.5,
    "w_cvd": 0.3,
    "slice_weights": {"newyork": SliceWeights(0.8, 0.2)},
    "ofi_input": "clipped",
    "cvd_direction": -1,
    "z_clip": 2.0,
    "score_z_window": 300,
    "score_z_min": 60,
    "max_lag_sec": 0.8,
    "max_quiet_sec": 5.0,
    "degraded_confidence": 0.1,
    "warmup_updates": 40,
    "boost_consistency": 0.9,
    "boost_ratio": 0.5,
    "throttle_consistency": 0.6,
    "min_consecutive": 3,
    "cooldown_sec": 1.0,
    "cooldown_min_sec": 2.9,
    "cooldown_relief": 0.0,
    "flip_rearm_ratio": 1.8,
    "exit_ratio": 0.3,
    "max_hold_sec": 0.3,
}
FUSION_BASE = {
    "slice_weights": {},
    "regime": SHORT_REGIME,
    "stages": (*FusionConfig().stages, "throttle"),
    "cooldown_sec": 3.0,
    "throttle_consistency": 0.05,
}
DIVERGENCE_CHANGES = {
    "trend_sec": 5,
    "min_trend_bps": 5.0,
    "rule_z_ofi": 2.0,
    "rule_z_cvd": 1.5,
    "conflict_z_ofi": 0.5,
    "conflict_z_cvd": 0.1,
    "anomaly_z_ofi": 2.0,
    "anomaly_z_cvd": 1.5,
    "anomaly_price_bps": 5.0,
    "cooldown_sec": 1.0,
    "bar_sec": 2,
    "swing_left": 4,
    "swing_right": 4,
    "lookback_bars": 120,
    "min_separation": 60,
    "max_separation": 10,
    "pair_pivots": 1,
    "price_band": 2.0,
    "flow_band": 2.0,
    "min_channels": 2,
    "z_hi": 3.0,
    "z_mid": 1.4,
    "consistency_min": 0.9,
    "min_score": 75.0,
}
DIVERGENCE_BASE = {
    "swing_left": 2,
    "swing_right": 2,
    "min_channels": 1,
    "flow_band": 0.2,
    "price_band": 0.1,
    "pair_pivots": 4,
    "min_score": 10.0,
    "min_separation": 3,
    "lookback_bars": 30,
    "cooldown_sec": 2.0,
}
REGIME_CHANGES = {
    "mode": "active",
    "combine": "and",
    "use_market": False,
    "window_sec": 10,
    "min_active_windows": 1,
    "min_quiet_windows": 1,
    "timezone": "Asia/Tokyo",
    "weekdays": ("mon",),
    "holidays": ("2023-11-14",),
    "windows": (),
    "min_trades_per_min": 1e4,
    "min_quotes_per_sec": 1e3,
    "max_spread_bps": 0.1,
    "min_volatility_bps": 1e3,
    "min_volume_usd": 1e9,
    "basic_gate_ratio": 1.0,
    "winsor_share": 0.4,
    "min_samples": 10,
    "vol_every_sec": 5,
    "vol_window": 12,
    "vol_min": 20,
    "vol_low_share": 0.4,
    "vol_high_share": 0.5,
}
REGIME_BASE = {
    "window_sec": 20,
    "vol_every_sec": 2,
    "vol_min": 10,
    "vol_window": 60,
    "windows": ("22:30-22:50", "23:00-23:10"),
    "winsor_share": 0.1,
}
SIGNAL_CHANGES = {
    "preset": "strong_only",
    "min_score": 2.0,
    "min_consistency": 0.6,
    "divergence_ratio": 0.3,
    "max_spread_bps": 0.6,
    "max_lag_sec": 0.1,
    "gap_cooldown_sec": 5.0,
    "min_trades_per_min": 100.0,
    "min_quotes_per_sec": 20.0,
    "min_hold_sec": 1.0,
    "reversal_streak": 8,
    "dedupe_ms": 1000,
    "ttl_ms": 5000,
    "use_scenarios": False,
    "a_h": Scenario(enabled=False),
    "a_l": Scenario(enabled=False),
    "q_h": Scenario(enabled=False),
    "q_l": Scenario(enabled=False),
}
SCENARIO_CHANGES = {
    "enabled": False,
    "z_hi_long": 3.5,
    "z_hi_short": 3.5,
    "z_mid": 1.5,
    "tp_bps": 1.0,
    "sl_bps": 1.0,
    "min_hold_sec": 0.0,
}


def covers(config, changes, *elsewhere):
    """Every setting of a configuration is tried here (or in a table of its own)."""
    assert set(config.__struct_fields__) == set(changes) | set(elsewhere)


def of_fusion(steps=LIVELY, **over):
    return packed(run(FusionProcessor(FusionConfig(**{**FUSION_BASE, **over}), 0), steps))


def test_the_tables_are_complete():
    covers(FusionConfig, FUSION_CHANGES, "stages", "divergence", "regime")
    covers(type(FusionConfig().divergence), DIVERGENCE_CHANGES)
    covers(RegimeConfig, REGIME_CHANGES)
    covers(SignalConfig, SIGNAL_CHANGES)
    covers(Scenario, SCENARIO_CHANGES)


@pytest.fixture(scope="module")
def fusion_base():
    return of_fusion()


@pytest.mark.parametrize("name", sorted(FUSION_CHANGES))
def test_no_setting_of_fusion_is_dead(name, fusion_base):
    assert of_fusion(**{name: FUSION_CHANGES[name]}) != fusion_base


@pytest.mark.parametrize("stage", FUSION_BASE["stages"])
def test_every_stage_can_be_switched_off(stage, fusion_base):
    # Duration does nothing at one record, which is its default.
    over = {"min_consecutive": 2} if stage == "duration" else {}
    stages = tuple(one for one in FUSION_BASE["stages"] if one != stage)
    base = of_fusion(**over) if over else fusion_base
    assert of_fusion(stages=stages, **over) != base


def of_divergence(**over):
    kind = type(FusionConfig().divergence)
    emits = run(FusionProcessor(FusionConfig(divergence=kind(**{**DIVERGENCE_BASE, **over})), 0), LIVELY)
    return packed([values(emits, FEATURE_EVENTS), [one["div_type"] for one in values(emits, FUSION)]])


@pytest.fixture(scope="module")
def divergence_base():
    return of_divergence()


@pytest.mark.parametrize("name", sorted(DIVERGENCE_CHANGES))
def test_no_setting_of_divergence_is_dead(name, divergence_base):
    assert of_divergence(**{name: DIVERGENCE_CHANGES[name]}) != divergence_base


def regime_samples():
    """An hour of seconds about the thresholds, with holes."""
    rng = random.Random(9)
    for second in range(3600):
        if second % 100 == 0:
            level = rng.choice([0.6, 1.0, 1.2, 2.5])
        hole = second % 20 < (15 if second // 200 % 2 else 4)
        noise = [level * math.exp(rng.gauss(0, 0.4)) for _ in range(5)]
        sample = MarketSample(150 * noise[0], 40 * noise[1], 5 / noise[2], 4 * noise[3], 2e5 * noise[4])
        yield T0_MS + second * 1000, None if hole else sample


def of_regime(**over):
    regime = Regime(RegimeConfig(**{**REGIME_BASE, **over}))
    state = regime.fresh()
    out = []
    for clock_ms, sample in regime_samples():
        regime.take(state, clock_ms, sample)
        out.append((state.mode, state.vol_slice))
    return out


@pytest.fixture(scope="module")
def regime_base():
    return of_regime()


@pytest.mark.parametrize("name", sorted(REGIME_CHANGES))
def test_no_setting_of_regime_is_dead(name, regime_base):
    assert of_regime(**{name: REGIME_CHANGES[name]}) != regime_base


def of_signal(steps=SIGNAL_STEPS, **over):
    return packed(run(signal_processor(SignalConfig(**over)), steps))


@pytest.mark.parametrize("name", sorted(SIGNAL_CHANGES))
def test_no_setting_of_signal_is_dead(name):
    assert of_signal(**{name: SIGNAL_CHANGES[name]}) != of_signal()


@pytest.mark.parametrize("name", sorted(SCENARIO_CHANGES))
@pytest.mark.parametrize("which", ["a_h", "a_l", "q_h", "q_l"])
def test_no_setting_of_a_scenario_is_dead(which, name):
    regime = "active" if which.startswith("a") else "quiet"
    vol_slice = "q3" if which.endswith("h") else "mid"
    steps = [
        (topic, record | {"regime": regime, "vol_slice": vol_slice} if topic == FUSION else record)
        for topic, record in SIGNAL_STEPS
    ]
    changed = msgspec.structs.replace(Scenario(), **{name: SCENARIO_CHANGES[name]})
    assert of_signal(steps, **{which: changed}) != of_signal(steps, **{which: Scenario()})


def test_the_fingerprint_is_in_every_record():
    a = run(SignalProcessor(SignalConfig(), 0, "a" * 16), SIGNAL_STEPS[:50])
    b = run(SignalProcessor(SignalConfig(), 0, "b" * 16), SIGNAL_STEPS[:50])
    assert all(x["signal_id"] != y["signal_id"] for x, y in zip(values(a, SIGNALS), values(b, SIGNALS), strict=True))
