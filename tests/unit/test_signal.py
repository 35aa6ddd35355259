"""Signal: every guard alone, their order, presets, scenarios, reversal and dedupe."""

from __future__ import annotations

import json
import math

import fastavro
import msgspec
import pytest
from fusion_streams import T0_MS, command, market, run, tick, values
from orderflow.microstructure.fusion import FusionConfig, FusionProcessor
from orderflow.microstructure.signal import (
    GUARDS,
    SIGNAL_PRESETS,
    SignalConfig,
    SignalProcessor,
    scenario_of,
)
from orderflow.paths import SCHEMAS
from orderflow.topics import FUSION, SIGNALS

FINGERPRINT = "0123456789abcdef"


def fusion(t_ms=T0_MS, **fields):
    """A fusion record that every guard lets pass."""
    record = {
        "seq": 7, "sub": 0, "src": "ofi", "symbol": "BTCUSDT", "ts_ms": t_ms, "event_ts_ms": t_ms,
        "recv_ts_ms": t_ms + 5, "score": 3.0, "score_z": 2.0, "consistency": 0.9, "dispersion": 0.3,
        "sign_agree": True, "proba": None, "calibration_version": None, "strength": "strong_buy", "reasons": ["entry"],
        "w_ofi": 0.6, "w_cvd": 0.4, "cvd_direction": 1, "skew_ms": 100, "lag_sec": 0.145, "z_ofi": 3.0, "z_cvd": 3.0,
        "price": 100.0, "mid": 100.0, "spread_bps": 1.0, "trades_per_min": 300.0, "quote_rate": 50.0,
        "volatility_bps": 5.0, "volume_usd": 5e5, "regime": "neutral", "session": "newyork", "vol_slice": "unknown",
        "div_type": None, "div_strength": None, "warmup": False, "book_state": "synced", "gap_count": 0,
        "latency_ms": 5,
    }  # fmt: skip
    return FUSION, record | fields


SELL = {"strength": "strong_sell", "score": -3.0, "z_ofi": -3.0, "z_cvd": -3.0}


def signals(steps, **settings):
    return values(run(SignalProcessor(SignalConfig(**settings), 0, FINGERPRINT), steps), SIGNALS)


def reasons(steps, **settings):
    return [record["gate_reasons"] for record in signals(steps, **settings)]


def test_a_good_record_is_confirmed():
    (record,) = signals([fusion()])
    assert (record["confirm"], record["gating"], record["gate_reasons"], record["direction"]) == (True, False, [], 1)
    assert record["signal_id"] == "BTCUSDT-1-0-01234567"
    assert record["config_fingerprint"] == FINGERPRINT
    assert record["ttl_ms"] == 10_000


@pytest.mark.parametrize(
    ("fields", "guard"),
    [
        ({"warmup": True}, "warmup"),
        ({"book_state": "resyncing"}, "book_not_synced"),
        ({"book_state": "stale"}, "book_not_synced"),
        ({"book_state": "none"}, "book_not_synced"),
        ({"spread_bps": 2.51}, "spread"),
        ({"spread_bps": None}, "spread"),
        ({"spread_bps": math.nan}, "spread"),
        ({"spread_bps": -0.1}, "spread"),
        ({"lag_sec": 0.501}, "lag"),
        ({"lag_sec": None}, "lag"),
        ({"trades_per_min": 9.9}, "low_activity"),
        ({"trades_per_min": None}, "low_activity"),
        ({"quote_rate": 0.9}, "low_activity"),
        ({"quote_rate": math.nan}, "low_activity"),
        ({"score": 1.5}, "weak_signal"),
        ({"score": None}, "weak_signal"),
        ({"score": math.nan}, "weak_signal"),
        ({"consistency": 0.15}, "low_consistency"),
        ({"consistency": math.nan}, "low_consistency"),
        ({"strength": "neutral"}, "neutral"),
        ({"strength": "sideways"}, "neutral"),
        ({"regime": "active", "vol_slice": "q3", "z_cvd": 0.7}, "scenario"),
        ({"regime": "active", "vol_slice": "q3", "z_cvd": 2.6, "z_ofi": 2.6}, "scenario"),
        ({"regime": "quiet", "vol_slice": "mid", "z_cvd": None}, "scenario"),
    ],
)
def test_each_guard_blocks_alone_under_its_name(fields, guard):
    (record,) = signals([fusion(**fields)])
    assert record["gate_reasons"] == [guard]
    assert (record["confirm"], record["gating"]) == (False, True)


@pytest.mark.parametrize(
    "fields",
    [{"spread_bps": 2.5}, {"lag_sec": 0.5}, {"trades_per_min": 10.0}, {"quote_rate": 1.0}, {"spread_bps": 0.0}],
)
def test_limits_themselves_pass(fields):
    assert reasons([fusion(**fields)]) == [[]]


def test_missing_messages_block_for_their_cooldown():
    steps = [fusion(gap_count=3), fusion(T0_MS + 1000, gap_count=4), fusion(T0_MS + 120_999, gap_count=4)]
    steps += [fusion(T0_MS + 121_000, gap_count=4)]
    assert reasons(steps) == [[], ["missing_msgs"], ["missing_msgs"], []]


def test_all_guards_at_once_in_their_order():
    bad = {
        "warmup": True, "book_state": "none", "spread_bps": 9.0, "lag_sec": 9.0, "gap_count": 1, "trades_per_min": 0.0,
        "score": -0.1, "consistency": 0.0, "strength": "sell", "regime": "quiet", "vol_slice": "q3",
    }  # fmt: skip
    steps = [fusion(), command(1, "p", {"type": "pause"}), fusion(T0_MS + 1, **bad)]
    steps += [fusion(T0_MS + 2, **{**bad, "strength": "neutral"})]
    opposite, neutral = reasons(steps)[1:]
    assert opposite == [name for name in GUARDS if name != "neutral"]
    assert set(opposite) | set(neutral) == set(GUARDS)
    assert neutral == [name for name in GUARDS if name in neutral]


def test_dedupe_by_event_time_of_confirmed_signals():
    times = [0, 100, 249, 250, 300, 500]
    assert reasons([fusion(T0_MS + t) for t in times]) == [[], ["dedupe"], ["dedupe"], [], ["dedupe"], []]


def test_a_blocked_signal_does_not_start_dedupe():
    assert reasons([fusion(warmup=True), fusion(T0_MS + 10)]) == [["warmup"], []]


def test_symbols_do_not_touch_each_other():
    assert reasons([fusion(), fusion(symbol="ETHUSDT")]) == [[], []]


def test_time_going_back_stays_deduped():
    assert reasons([fusion(), fusion(T0_MS - 5000)]) == [[], ["dedupe"]]


def test_reversal_waits_for_the_hold_and_a_row_of_records():
    early = [fusion(), fusion(T0_MS + 59_999, **SELL)]
    assert reasons(early)[1] == ["reversal"]
    late = [fusion(), *(fusion(T0_MS + 60_000 + i * 1000, **SELL) for i in range(3))]
    assert reasons(late) == [[], ["reversal"], ["reversal"], []]


def test_the_hold_runs_from_the_first_confirmation_of_the_direction():
    steps = [fusion(), fusion(T0_MS + 59_000), *(fusion(T0_MS + 60_000 + i, **SELL) for i in range(3))]
    assert reasons(steps)[-1] == []


def test_a_scenario_brings_its_own_hold_and_exits():
    known = {"regime": "active", "vol_slice": "q3"}
    steps = [fusion(**known), *(fusion(T0_MS + 8000 + i, **SELL, **known) for i in range(3))]
    records = signals(steps)
    assert records[-1]["gate_reasons"] == []
    assert [(one["scenario"], one["tp_bps"], one["sl_bps"]) for one in records[:1]] == [("A_H", 15.0, 10.0)]


def test_scenario_names():
    table = {(r, v): scenario_of(r, v) for r in ("active", "quiet", "neutral") for v in ("q1", "mid", "q3", "unknown")}
    assert {name for (regime, vol), name in table.items() if regime == "neutral" or vol == "unknown"} == {None}
    assert table["active", "q3"] == "A_H"
    assert table["active", "q1"] == table["active", "mid"] == "A_L"
    assert table["quiet", "q3"] == "Q_H"
    assert table["quiet", "q1"] == table["quiet", "mid"] == "Q_L"


def test_long_and_short_marks_differ():
    known = {"regime": "active", "vol_slice": "q3", "score": 2.6, "z_ofi": 2.6, "z_cvd": 2.6}
    mirrored = {"score": -2.6, "z_ofi": -2.6, "z_cvd": -2.6, "strength": "sell"}
    assert reasons([fusion(**known)]) == [["scenario"]]
    assert reasons([fusion(**{**known, **mirrored})]) == [[]]
    assert reasons([fusion(**known)], use_scenarios=False) == [[]]


@pytest.mark.parametrize("preset", sorted(SIGNAL_PRESETS))
@pytest.mark.parametrize("regime", ["active", "quiet", "neutral"])
def test_presets_are_strict_limits(preset, regime):
    limits = SIGNAL_PRESETS[preset][regime]
    at = {"score": limits.min_score, "consistency": limits.min_consistency, "regime": regime}
    above = {"score": limits.min_score + 1e-9, "consistency": limits.min_consistency + 1e-9, "regime": regime}
    assert reasons([fusion(**at)], preset=preset) == [["weak_signal", "low_consistency"]]
    assert reasons([fusion(**above)], preset=preset) == [[]]


def test_strong_only_is_the_published_pair():
    limits = SignalConfig(preset="strong_only").limits()["neutral"]
    assert (limits.min_score, limits.min_consistency) == (2.5, 0.7)
    assert SignalConfig(preset="strong_only", min_score=2.0).limits()["neutral"].min_score == 2.0


def test_a_divergence_the_same_way_lowers_the_mark():
    weak = {"score": 1.3, "strength": "buy"}
    assert reasons([fusion(**weak, div_type="bullish")]) == [[]]
    assert reasons([fusion(**weak, div_type="bearish")]) == [["weak_signal"]]
    assert reasons([fusion(**weak, div_type="inconsistent")]) == [["weak_signal"]]


@pytest.mark.parametrize(
    ("scope", "blocked"),
    [
        ({}, True),
        ({"symbol": "BTCUSDT"}, True),
        ({"symbol": "ETHUSDT"}, False),
        ({"slice": "newyork"}, True),
        ({"slice": "active"}, False),
        ({"symbol": "BTCUSDT", "slice": "newyork"}, True),
        ({"symbol": "BTCUSDT", "slice": "tokyo"}, False),
    ],
)
def test_pauses_by_symbol_and_slice(scope, blocked):
    pause = command(1, "p", {"type": "pause", **scope})
    assert reasons([pause, fusion()]) == [["paused"] if blocked else []]
    resume = command(2, "r", {"type": "resume", **scope})
    assert reasons([pause, resume, fusion()]) == [[]]


def test_a_pause_begins_at_its_time():
    pause = command(1, "p", {"type": "pause"}, apply_at_ms=5000)
    steps = [pause, tick(4999), fusion(), tick(5000), fusion(T0_MS + 1000)]
    assert reasons(steps) == [[], ["paused"]]


def test_resume_of_all_undoes_every_pause():
    pauses = [command(1, str(i), {"type": "pause", **scope}) for i, scope in enumerate([{}, {"slice": "newyork"}])]
    assert reasons([*pauses, command(2, "r", {"type": "resume"}), fusion()]) == [[]]


def test_records_of_a_whole_market():
    fused = [(FUSION, one) for one in values(run(FusionProcessor(FusionConfig(), 0), market(6, 240)), FUSION)]
    records = []
    processor = SignalProcessor(SignalConfig(), 0, FINGERPRINT)
    for topic, record in fused:
        records.extend((record, value) for _, _, value in processor.step(topic, record))
    schema = fastavro.parse_schema(json.loads((SCHEMAS / "signal.avsc").read_text()))
    names = [field["name"] for field in schema["fields"]]
    for source, value in records:
        full = {"seq": source["seq"], "sub": 0, **value}
        fastavro.validate(full, schema, strict=True)
        assert list(full) == names
        assert value["confirm"] is (not value["gating"]) is (not value["gate_reasons"])
        assert not value["confirm"] or value["direction"]
    assert len(records) == len(fused)
    assert len({value["signal_id"] for _, value in records}) == len(records)
    confirmed = sum(value["confirm"] for _, value in records)
    assert 0 < confirmed < len(records) / 4


@pytest.mark.parametrize(
    "settings",
    [{"preset": "lucky"}, {"dedupe_ms": -1}, {"a_h": {"z_hi_long": 99}}, {"reversal_streak": 0}, {"nope": 1}],
)
def test_a_wrong_setting_is_named(settings):
    with pytest.raises(msgspec.ValidationError, match=next(iter(settings))):
        msgspec.convert(settings, SignalConfig)
