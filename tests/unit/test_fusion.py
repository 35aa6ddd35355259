"""Fusion: score, lag, stages, commands, the state of the market."""

from __future__ import annotations

import json
import math
from pathlib import Path

import fastavro
import msgspec
import pytest
from fusion_streams import T0_MS, command, cvd, market, ofi, run, tick, values
from orderflow.microstructure.fusion import FusionConfig, FusionProcessor, consistency_of, platt
from orderflow.microstructure.fusion_commands import PENDING_LIMIT, SEEN_LIMIT
from orderflow.microstructure.fusion_machine import Machine, MachineState
from orderflow.microstructure.fusion_stats import MidSeries, TrailingDeviation, TrailingQuantiles
from orderflow.paths import SCHEMAS
from orderflow.topics import FEATURE_EVENTS, FUSION

BARE = {"stages": (), "slice_weights": {}}


def fused(steps, **settings):
    return values(run(FusionProcessor(FusionConfig(**settings), 0), steps), FUSION)


def pair(z_ofi, z_cvd, t_ms=T0_MS, **settings):
    return fused([ofi(t_ms, z_ofi), cvd(t_ms, z_cvd)], **{**BARE, **settings})[-1]


# --- score --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("z_ofi", "z_cvd", "expected"),
    [(2.0, 1.0, 0.5), (-1.0, -4.0, 0.25), (3.0, 3.0, 1.0), (2.0, -1.0, 0.0), (0.0, 2.0, 0.0), (1e-10, 1e-10, 0.0)],
)
def test_consistency_known_answers(z_ofi, z_cvd, expected):
    assert consistency_of(z_ofi, z_cvd) == expected


def test_score_is_the_weighted_sum_after_clip():
    record = pair(6.0, 1.0)
    assert (record["z_ofi"], record["z_cvd"]) == (4.0, 1.0)
    assert record["score"] == 0.6 * 4.0 + 0.4 * 1.0
    assert record["dispersion"] == 3.0
    assert record["sign_agree"] is True
    assert record["consistency"] == 0.25


def test_zsum_takes_no_weights():
    assert pair(2.0, 1.5, method="zsum")["score"] == 3.5


def test_ofi_input_chooses_between_raw_and_display():
    assert pair(3.5, 1.0)["z_ofi"] == 3.5
    assert pair(3.5, 1.0, ofi_input="clipped")["z_ofi"] == 3.0


def test_score_z_excludes_the_current_score():
    steps = [cvd(T0_MS, 0.0)]
    steps += [ofi(T0_MS + 100 * i, z) for i, z in enumerate([1.0, -1.0, 1.0, -1.0, 5.0])]
    records = fused(steps, **BARE, score_z_min=4, z_clip=10.0)
    assert records[3]["score_z"] is None
    # scores so far: .6, -.6, .6, -.6: mean 0, sample deviation .6 * sqrt(4 / 3)
    assert records[5]["score_z"] == pytest.approx(3.0 / (0.6 * math.sqrt(4 / 3)), rel=1e-12)


@pytest.mark.parametrize("bad", [None, math.nan, math.inf, -math.inf])
def test_a_missing_factor_gives_no_score_and_says_which(bad):
    record = pair(bad, 1.0)
    assert record["score"] is None
    assert record["strength"] == "neutral"
    assert record["reasons"] == ["ofi_z_missing"]
    assert pair(1.0, bad)["reasons"] == ["cvd_z_missing"]
    assert pair(bad, bad)["reasons"] == ["ofi_z_missing", "cvd_z_missing"]


def test_every_record_fits_its_schema():
    emits = run(FusionProcessor(FusionConfig(), 0), market(3, 200))
    for topic, name in ((FUSION, "fusion"), (FEATURE_EVENTS, "feature_event")):
        schema = fastavro.parse_schema(json.loads((SCHEMAS / f"{name}.avsc").read_text()))
        records = values(emits, topic)
        assert len(records) > 30
        for record in records:
            fastavro.validate(record, schema, strict=True)
        assert all(list(record) == [field["name"] for field in schema["fields"]] for record in records)


def test_one_record_an_input_record():
    steps = list(market(4, 20))
    wanted = [("ofi" if "ofi_l1" in record else "cvd", record["symbol"]) for _, record in steps if "symbol" in record]
    assert [(record["src"], record["symbol"]) for record in fused(steps)] == wanted


# --- lag ----------------------------------------------------------------------------------------------------------


def test_usual_delays_are_a_small_lag():
    record = pair(2.0, 2.0)
    assert record["lag_sec"] == 0.145
    assert record["skew_ms"] == 0


def test_silence_of_trades_is_not_lag():
    steps = [cvd(T0_MS, 2.0), tick(T0_MS), ofi(T0_MS + 5000, 2.0)]
    record = fused(steps, stages=("lag",), slice_weights={})[-1]
    assert record["skew_ms"] == 5000
    assert record["lag_sec"] == 0.145
    assert record["reasons"] == ["entry"]


def test_a_late_trade_is_lag_and_the_stronger_factor_stands_alone():
    steps = [ofi(T0_MS + 1000, 2.0), cvd(T0_MS, 3.0, recv_ts_ms=T0_MS + 1005)]
    record = fused(steps, stages=("lag",), slice_weights={})[-1]
    assert record["lag_sec"] == 1.0
    assert record["reasons"][:2] == ["lag_exceeded", "degraded_cvd_only"]
    assert (record["w_ofi"], record["w_cvd"], record["score"]) == (0.0, 1.0, 3.0)


def test_a_degraded_score_is_never_strong_and_never_looser():
    late = {"recv_ts_ms": T0_MS + 1005}
    strong = fused([ofi(T0_MS, 4.0), cvd(T0_MS, 4.0, **late)], stages=("lag", "consistency"))[-1]
    assert strong["strength"] == "buy"
    assert "degraded_capped" in strong["reasons"]
    alone = fused([ofi(T0_MS, 4.0), cvd(T0_MS, -0.1, **late)], stages=("lag", "consistency"))[-1]
    assert alone["strength"] == "neutral"
    assert alone["reasons"][-1] == "low_consistency"


def test_a_dead_route_leaves_the_living_factor_however_weak():
    down = {"routes": {"public": "up", "market": "down"}}
    steps = [cvd(T0_MS, 4.0), ofi(T0_MS, 1.0), tick(T0_MS + 200, **down), ofi(T0_MS + 3000, 1.0)]
    record = fused(steps, stages=("lag",))[-1]
    assert record["lag_sec"] == 3.0
    assert record["reasons"] == ["lag_exceeded", "degraded_ofi_only", "weak_score", "exit"]
    assert record["score"] == 1.0


def test_a_stream_silent_too_long_is_dead_until_it_speaks():
    steps = [cvd(T0_MS, 4.0), ofi(T0_MS, 1.0)]
    steps += [tick(T0_MS + 1000 * i, quote_ts_ms={"BTCUSDT": T0_MS + 1000 * i}) for i in range(1, 33)]
    dead = fused([*steps, ofi(T0_MS + 32_000, 1.0)], stages=("lag",))[-1]
    assert dead["lag_sec"] == 32.0
    spoken = tick(T0_MS + 33_000, trade_ts_ms={"BTCUSDT": T0_MS + 32_900})
    alive = fused([*steps, spoken, ofi(T0_MS + 33_100, 1.0)], stages=("lag",))[-1]
    assert alive["lag_sec"] == 0.145


def test_the_first_factor_alone_has_no_lag():
    record = fused([ofi(T0_MS, 1.0)])[-1]
    assert record["lag_sec"] is None
    assert record["skew_ms"] is None


# --- stages -------------------------------------------------------------------------------------------------------

QUIET = {"slice_weights": {}, "w_ofi": 0.5, "w_cvd": 0.5}


def states(scores, step_ms=1000, consistency=1.0, **settings):
    """Strength and reasons of a machine that is given scores."""
    settings.setdefault("stages", ("consistency", "boost", "duration", "cooldown", "flip_rearm", "hysteresis"))
    machine, state, out = Machine(FusionConfig(**settings)), MachineState(), []
    for i, score in enumerate(scores):
        reasons = []
        out.append((machine.advance(state, i * step_ms, score, consistency, False, reasons), reasons))
    return out


def levels(*args, **settings):
    return [level for level, _ in states(*args, **settings)]


def test_warm_up_counts_valid_updates_only():
    steps = [cvd(T0_MS, None)] + [ofi(T0_MS + i, 3.0) for i in range(5)] + [cvd(T0_MS + 5, 3.0)]
    steps += [ofi(T0_MS + 6 + i, 3.0) for i in range(12)]
    records = fused(steps, warmup_updates=10, stages=("warmup",))
    warm = [record["warmup"] for record in records]
    assert warm == [True] * 16 + [False] * 3
    assert records[15]["reasons"] == ["warmup"]
    assert records[16]["strength"] == "strong_buy"


def test_a_factor_in_warm_up_keeps_the_fusion_there():
    record = fused([ofi(T0_MS, 3.0, warmup=True), cvd(T0_MS, 3.0)], warmup_updates=0)[-1]
    assert record["warmup"] is True
    assert record["reasons"] == ["warmup"]


def test_thresholds_are_strict():
    assert levels([1.5], stages=()) == [0]
    assert levels([1.5000001], stages=()) == [1]
    assert levels([-2.5], stages=()) == [-1]
    assert levels([-2.5000001], stages=()) == [-2]


def test_consistency_decides_level():
    assert levels([3.0], consistency=0.15) == [0]
    assert levels([3.0], consistency=0.70) == [1]
    assert levels([3.0], consistency=0.71) == [2]
    assert states([3.0], consistency=0.5)[0][1] == ["strong_needs_consistency", "entry"]


def test_boost_takes_a_nearly_sufficient_score():
    assert states([1.3], consistency=0.8) == [(1, ["consistency_boost", "entry"])]
    assert states([1.3], consistency=0.8, stages=("consistency",)) == [(0, ["weak_score"])]
    assert states([1.3], consistency=0.7) == [(0, ["weak_score"])]


def test_hysteresis_holds_then_exits():
    assert states([2.0, 1.0, 0.89]) == [
        (1, ["entry"]),
        (1, ["weak_score", "hysteresis_hold"]),
        (0, ["weak_score", "exit"]),
    ]


def test_hysteresis_expires():
    held = states([2.0] + [1.0] * 12, consistency=0.5)
    assert [level for level, _ in held] == [1] * 10 + [0] * 3
    assert held[10][1] == ["weak_score", "hold_expired"]


def test_support_renews_the_hold():
    assert levels([2.0] + [1.0] * 9 + [2.0] + [1.0] * 9, consistency=0.5) == [1] * 20


def test_strong_is_held_apart_from_normal():
    held = states([3.0, 1.6, 1.4, 1.4], consistency=0.8)
    assert [level for level, _ in held] == [2, 2, 1, 1]
    assert held[1][1][-1] == "hysteresis_hold_strong"
    assert held[2][1][-1] == "downgrade"


def test_upgrade_needs_no_cooldown():
    assert states([2.0, 3.0], step_ms=10)[1] == (2, ["upgrade"])


def test_cooldown_blocks_the_same_direction_and_a_strong_score_shortens_it():
    assert levels([1.6, 0.0, 1.6, 1.6], step_ms=100) == [1, 0, 0, 1]
    assert states([1.6, 0.0, 1.6], step_ms=100)[2][1] == ["cooldown"]
    assert levels([1.6, 0.0, 3.0], step_ms=60) == [1, 0, 2]
    assert levels([1.6, 0.0, 3.0], step_ms=59) == [1, 0, 0]


def test_a_clear_reversal_needs_no_cooldown():
    assert states([1.6, -1.6], step_ms=10)[1] == (-1, ["flip_rearm", "flip"])
    assert states([1.6, -1.55], step_ms=10)[1] == (0, ["cooldown"])
    assert states([1.6, -1.6], step_ms=10, stages=("cooldown",))[1] == (0, ["cooldown"])


def test_minimum_duration_counts_records_in_a_row():
    lasting = states([2.0, 2.0, 0.0, 2.0, 2.0, 2.0], min_consecutive=3)
    assert [level for level, _ in lasting] == [0, 0, 0, 0, 0, 1]
    assert lasting[0][1] == ["min_duration"]


def test_throttle_drops_a_held_state():
    settings = {"stages": ("throttle", "hysteresis"), "throttle_consistency": 0.3}
    assert states([2.0], consistency=0.29, **settings) == [(0, ["entry", "low_consistency_throttle"])]
    assert levels([2.0], consistency=0.31, **settings) == [1]


def test_no_stage_no_memory():
    assert levels([2.0, 1.0, 2.0, -2.0, 3.0], step_ms=1, stages=()) == [1, 0, 1, -1, 2]


def test_a_missing_input_drops_the_state():
    steps = [cvd(T0_MS, 2.0), ofi(T0_MS, 2.0), ofi(T0_MS + 1, None), ofi(T0_MS + 500, 1.1)]
    strengths = [record["strength"] for record in fused(steps, warmup_updates=0)]
    assert strengths == ["neutral", "buy", "neutral", "neutral"]
    held = fused([*steps[:2], steps[3]], warmup_updates=0)[-1]
    assert held["reasons"] == ["weak_score", "hysteresis_hold"]


def test_time_going_back_does_not_reopen_a_cooldown():
    steps = [cvd(T0_MS, 2.0), ofi(T0_MS, 2.0), ofi(T0_MS + 400, -0.1), ofi(T0_MS + 100, 2.0)]
    assert fused(steps, warmup_updates=0)[-1]["reasons"] == ["entry"]


def test_flip_is_an_event_once():
    steps = [cvd(T0_MS, 2.0), ofi(T0_MS, 2.0), cvd(T0_MS + 1, -4.0), ofi(T0_MS + 2, -4.0), ofi(T0_MS + 3, -4.0)]
    emits = run(FusionProcessor(FusionConfig(warmup_updates=0), 0), steps)
    flips = [event for event in values(emits, FEATURE_EVENTS) if event["event_type"] == "flip"]
    assert [(event["ts_ms"], event["strength"]) for event in flips] == [(T0_MS + 2, 4.0)]


# --- commands -----------------------------------------------------------------------------------------------------


def with_commands(*commands, z_ofi=2.0, z_cvd=1.0, **settings):
    processor = FusionProcessor(FusionConfig(**{**BARE, **settings}), 0)
    emits = run(processor, [*commands, ofi(T0_MS, z_ofi), cvd(T0_MS, z_cvd)])
    return values(emits, FUSION)[-1], values(emits, FEATURE_EVENTS)


def test_a_command_holds_from_its_time_on():
    body = {"type": "direction", "cvd_direction": -1}
    processor = FusionProcessor(FusionConfig(**BARE), 0)
    steps = [
        ofi(T0_MS, 2.0), command(T0_MS, "one", body, T0_MS + 1000), cvd(T0_MS, 1.0), tick(T0_MS + 999),
        cvd(T0_MS + 1, 1.0), tick(T0_MS + 1000), cvd(T0_MS + 2, 1.0),
    ]  # fmt: skip
    records = values(run(processor, steps), FUSION)
    assert [record["z_cvd"] for record in records] == [None, 1.0, 1.0, -1.0]
    assert [record["cvd_direction"] for record in records] == [1, 1, 1, -1]
    assert "cvd_flipped" in records[-1]["reasons"]


def test_a_command_seen_twice_counts_once():
    one = {"type": "direction", "cvd_direction": -1}
    two = {"type": "direction", "cvd_direction": 1}
    record, events = with_commands(command(1, "a", one), command(2, "b", two), command(3, "a", one))
    assert record["cvd_direction"] == 1
    assert [event["event_type"] for event in events] == ["command_applied"] * 2 + ["command_ignored"]
    assert json.loads(events[-1]["meta_json"])["reason"] == "duplicate"


def test_calibration_gives_proba_until_suspended():
    body = {"type": "calibration", "a": -1.5, "b": 0.25, "version": "v7"}
    record, _ = with_commands(command(1, "a", body))
    assert record["proba"] == pytest.approx(1 / (1 + math.exp(-1.5 * record["score"] + 0.25)), rel=1e-15)
    assert record["calibration_version"] == "v7"
    record, _ = with_commands(command(1, "a", body), command(2, "b", {"type": "calibration", "a": None, "b": None}))
    assert record["proba"] is None
    assert record["calibration_version"] is None


def test_degraded_proba_is_drawn_to_one_half():
    body = command(1, "a", {"type": "calibration", "a": -1.0, "b": 0.0})
    steps = [body, ofi(T0_MS, 2.0), cvd(T0_MS, 1.0, recv_ts_ms=T0_MS + 2000)]
    record = fused(steps, stages=("lag",), degraded_confidence=0.5)[-1]
    assert record["proba"] == pytest.approx(0.5 + (platt(-1.0, 0.0, 2.0) - 0.5) / 2, rel=1e-15)


def test_platt_does_not_overflow():
    assert platt(-1e6, 0.0, 20.0) == 1.0
    assert 0.0 <= platt(1e6, 0.0, 20.0) < 1e-300


def weights(command_id, w_ofi, w_cvd, **scope):
    return command(1, command_id, {"type": "weights", "w_ofi": w_ofi, "w_cvd": w_cvd, **scope})


@pytest.mark.parametrize(
    ("commands", "settings", "expected", "reason"),
    [
        ([], {}, (0.6, 0.4), None),
        ([weights("a", 0.2, 0.3)], {}, (0.2, 0.3), "weights_command"),
        ([weights("a", 0.2, 0.3), weights("b", 0.1, 0.1, symbol="BTCUSDT")], {}, (0.1, 0.1), "weights_command"),
        ([weights("a", 0.2, 0.3), weights("b", None, None)], {}, (0.6, 0.4), None),
        ([weights("a", 0.2, 0.3, symbol="ETHUSDT")], {}, (0.6, 0.4), None),
        ([weights("a", 0.2, 0.3)], {"slice_weights": {"newyork": (0.9, 0.1)}}, (0.9, 0.1), "weights_newyork"),
        (
            [weights("a", 0.2, 0.3, slice="newyork")],
            {"slice_weights": {"newyork": (0.9, 0.1)}},
            (0.2, 0.3),
            "weights_newyork_command",
        ),
        (
            [weights("a", 0.2, 0.3, slice="newyork")],
            {"slice_weights": {"quiet": (0.5, 0.5)}, "regime": {"mode": "quiet"}},
            (0.5, 0.5),
            "weights_quiet",
        ),
    ],
)
def test_precedence_of_weights(commands, settings, expected, reason):
    config = msgspec.convert(
        {**BARE, **settings, "slice_weights": {
            name: {"ofi": a, "cvd": b} for name, (a, b) in settings.get("slice_weights", {}).items()
        }},
        FusionConfig,
    )  # fmt: skip
    record = values(run(FusionProcessor(config, 0), [*commands, ofi(T0_MS, 2.0), cvd(T0_MS, 1.0)]), FUSION)[-1]
    assert (record["w_ofi"], record["w_cvd"]) == expected
    assert [one for one in record["reasons"] if one.startswith("weights")] == ([reason] if reason else [])


@pytest.mark.parametrize(
    "payload",
    ["", "{", "[]", '{"command_id":1}', '{"command_id":"x","payload":{}}', '{"command_id":"x","payload":"{"}', None],
)
def test_a_malformed_command_is_refused(payload):
    emits = run(FusionProcessor(FusionConfig(), 0), [tick(1, kind="command", payload=payload)])
    (event,) = values(emits, FEATURE_EVENTS)
    assert event["event_type"] == "command_refused"
    assert json.loads(event["meta_json"])["reason"] == "malformed"


@pytest.mark.parametrize(
    "body",
    [
        {"type": "weights", "w_ofi": 0.9, "w_cvd": 0.9},
        {"type": "weights", "w_ofi": 0.5, "w_cvd": None},
        {"type": "weights", "w_ofi": -0.1, "w_cvd": 0.5},
        {"type": "direction", "cvd_direction": 0},
        {"type": "calibration", "a": 1.0, "b": None},
        {"type": "pause", "slice": "sunday"},
        {"type": "resume", "unknown": 1},
    ],
)
def test_an_invalid_command_is_refused_and_changes_nothing(body):
    record, events = with_commands(command(1, "a", body))
    assert (record["w_ofi"], record["w_cvd"], record["cvd_direction"], record["proba"]) == (0.6, 0.4, 1, None)
    assert [event["event_type"] for event in events] == ["command_refused"]
    assert json.loads(events[0]["meta_json"])["reason"] == "invalid"


def test_commands_of_others_are_left_alone():
    _, events = with_commands(command(1, "a", {"type": "halt"}))
    assert json.loads(events[0]["meta_json"])["reason"] == "not_for_fusion_or_signal"


def test_a_payload_may_be_a_string_of_json():
    text = json.dumps({"type": "direction", "cvd_direction": -1})
    record, _ = with_commands(command(1, "a", text))
    assert record["cvd_direction"] == -1


def test_memory_of_commands_is_bounded():
    processor = FusionProcessor(FusionConfig(), 0)
    body = {"type": "direction", "cvd_direction": -1}
    emits = run(processor, [command(1, f"id{i}", body, 10**9) for i in range(SEEN_LIMIT + 50)])
    state = processor._controls.state
    assert len(state.seen) == SEEN_LIMIT
    assert len(state.pending) == PENDING_LIMIT
    assert {json.loads(event["meta_json"])["reason"] for event in values(emits, FEATURE_EVENTS)} == {"queue_full"}


# --- the state of the market --------------------------------------------------------------------------------------


def test_volatility_of_a_known_path():
    series = MidSeries()
    for second in range(61):
        series.push(second * 1000, 100.0 * math.exp(1e-4 * (second % 2)))
    assert series.volatility_bps() == pytest.approx(math.sqrt(60), rel=1e-9)  # 60 returns of 1 bp
    assert series.trend_bps(30) == 0.0
    assert series.trend_bps(61) is None


def test_volatility_waits_for_ten_seconds():
    series = MidSeries()
    for second in range(10):
        series.push(second * 1000, 100.0)
        assert series.volatility_bps() is None
    series.push(10_000, 100.0)
    assert series.volatility_bps() == 0.0


def test_rates_fall_to_zero_in_a_minute_of_silence():
    steps = [cvd(T0_MS, 1.0), tick(T0_MS), tick(T0_MS + 60_000), ofi(T0_MS + 60_000, 1.0)]
    record = fused(steps)[-1]
    assert record["trades_per_min"] == 0.0
    assert record["volume_usd"] == 0.0
    assert fused([*steps[:2], tick(T0_MS + 59_999), steps[3]])[-1]["trades_per_min"] == 300.0


@pytest.mark.parametrize(
    ("hour", "session"), [(0, "tokyo"), (7, "tokyo"), (8, "london"), (15, "london"), (16, "newyork")]
)
def test_sessions_by_event_time(hour, session):
    day_ms = T0_MS // 86_400_000 * 86_400_000
    assert fused([ofi(day_ms + hour * 3_600_000, 1.0)])[-1]["session"] == session


def test_market_fields_come_from_the_newest_record_of_their_stream():
    steps = [
        ofi(T0_MS, 1.0, mid=101.0, spread_bps=2.0, book_state="resyncing", gap_count=3),
        cvd(T0_MS, 1.0, price=102.0, gap_count=2, book_state="none"),
        ofi(T0_MS + 1, 1.0, mid=None, spread_bps=math.nan, book_state="stale"),
    ]
    record = fused(steps)[-1]
    assert (record["mid"], record["spread_bps"], record["price"]) == (101.0, 2.0, 102.0)
    assert (record["book_state"], record["gap_count"]) == ("stale", 3)


def test_a_tick_for_symbols_never_seen_says_nothing():
    processor = FusionProcessor(FusionConfig(), 0)
    assert processor.step(*tick(T0_MS, trade_ts_ms={"XRPUSDT": 5})) == []
    assert list(processor.snapshot()) == [""]


def test_trailing_deviation_is_exact():
    window = TrailingDeviation(size=3)
    for value in (9.0, 1.0, 2.0, 3.0):
        window.push(value)
    assert window.deviation(2) == 1.0
    assert window.deviation(4) is None


def test_trailing_quantiles():
    window = TrailingQuantiles(size=4)
    for value in (100.0, 4.0, 1.0, 3.0, 2.0):
        window.push(value)
    assert window.ordered == [1.0, 2.0, 3.0, 4.0]
    assert window.quantile(0.25) == 1.75


# --- configuration ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "names"),
    [
        ({"buy_score": 2.6}, ["strong_score", "buy_score", "2.6"]),
        ({"w_ofi": 0.7}, ["0.7", "at most 1"]),
        ({"min_consistency": 0.9}, ["strong_consistency", "min_consistency"]),
        ({"score_z_min": 601}, ["score_z_min", "601"]),
        ({"cooldown_min_sec": 0.4}, ["cooldown_min_sec", "0.4"]),
        ({"typo": 1}, ["typo"]),
        ({"z_clip": 0}, ["z_clip"]),
        ({"slice_weights": {"midnight": {"ofi": 0.5, "cvd": 0.5}}}, ["midnight"]),
    ],
)
def test_a_wrong_setting_is_named(settings, names):
    with pytest.raises(msgspec.ValidationError) as caught:
        msgspec.convert(settings, FusionConfig)
    assert all(name in str(caught.value) for name in names)


def test_no_module_of_fusion_reads_a_clock_or_chance():
    folder = Path(consistency_of.__code__.co_filename).parent
    for path in sorted(folder.glob("*.py")):
        if path.name.split("_")[0].removesuffix(".py") in {"fusion", "divergence", "regime", "signal"}:
            text = path.read_text()
            for word in ("import time", "import random", "datetime.now", "import logging", "import os"):
                assert word not in text, f"{path.name}: {word}"
