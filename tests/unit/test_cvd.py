"""Cumulative volume delta: known answers, scale, freezes, windows, impact, odd input, settings."""

from __future__ import annotations

import json
import math
import random
import statistics
from decimal import Decimal

import fastavro
import msgspec
import pytest
from ofi_cvd_rows import T0_MS, market, packed, quote, run, tick, trade
from orderflow.microstructure.cvd import PRESETS, CvdConfig, CvdProcessor
from orderflow.microstructure.cvd_bars import Impact, Vpin
from orderflow.microstructure.cvd_lots import LOT, LotSum, Trailing, to_lots
from orderflow.paths import SCHEMAS
from orderflow.processor import Processor

Z_MODES = ("delta", "level", "flow", "rate")
SECOND_MS = 1000


def processor(**settings) -> CvdProcessor:
    return CvdProcessor(CvdConfig(**settings), 0)


def alternating(count, step_ms=SECOND_MS, qty=1.0):
    return [trade(T0_MS + step_ms * i, qty, ("buy", "sell")[i % 2]) for i in range(count)]


# --- known answers ------------------------------------------------------------------------------------------------


def test_known_answers_of_the_hybrid_scale():
    """Alternating one unit a second, 300 trades, under the code defaults of the V13 family."""
    values = run(processor(**PRESETS["v13"]), alternating(300))
    last = values[-1]
    trades_per_sec = 61 / 60
    floor = 1.4826 * 1.70 * (1.5 / trades_per_sec) ** 0.7
    assert last["trades_per_sec"] == pytest.approx(trades_per_sec, rel=1e-12)
    assert last["sigma_floor"] == last["scale"] == pytest.approx(floor, rel=1e-9)
    assert last["scale"] == pytest.approx(2.52042 * 1.3129218381093821, rel=1e-9)
    assert last["floor_used"] is True
    assert abs(last["z_raw"]) == pytest.approx(1 / floor, rel=1e-9)
    assert abs(last["z_cvd"]) == pytest.approx(0.302196, abs=5e-7)
    first_z = next(i for i, value in enumerate(values, 1) if value["z_cvd"] is not None)
    assert first_z == 20
    assert [value["warmup"] for value in values].count(True) == 19


def test_moving_means_of_the_hybrid_scale():
    """Before there is a floor the scale is the mix of the two means, each by the time since the trade before."""
    sizes, gaps = [1.0, 4.0, 2.0, 8.0], [0, 500, 0, 3000]
    ts_ms, steps, fast, slow = T0_MS, [], None, None
    expected = []
    for i, (size, gap) in enumerate(zip(sizes, gaps)):
        ts_ms += gap
        steps.append(trade(ts_ms, size))
        dt_sec = max(gap, 1) / 1000
        fast = size if fast is None else fast + (1 - 2 ** (-dt_sec / 60)) * (size - fast)
        slow = size if slow is None else slow + (1 - 2 ** (-dt_sec / 600)) * (size - slow)
        weight = 0.2 * min(1.0, (i + 1) / 60 / 1.5)
        expected.append(weight * fast + (1 - weight) * slow)
    values = run(processor(warmup_trades=1), steps)
    assert [value["scale"] for value in values] == pytest.approx(expected, rel=1e-12)
    assert [value["z_raw"] for value in values] == pytest.approx(
        [size / scale for size, scale in zip(sizes, expected)], rel=1e-12
    )
    assert [value["sigma_floor"] for value in values] == [0.0] * 4
    assert not any(value["floor_used"] for value in values)


def test_scale_modes():
    steps = [trade(T0_MS + 100 * i, 1.0 + i % 7, ("buy", "sell")[i % 2]) for i in range(200)]
    deltas = [value["delta"] for value in run(processor(), steps)]
    median = statistics.median(deltas)
    mad = statistics.median(abs(delta - median) for delta in deltas)
    by_mad = run(processor(scale_mode="mad"), steps)[-1]
    assert by_mad["scale"] == by_mad["sigma_floor"] == pytest.approx(1.4826 * mad * 1.8, rel=1e-12)
    assert by_mad["floor_used"] is True
    by_mean = run(processor(scale_mode="ewma"), steps)[-1]
    assert (by_mean["sigma_floor"], by_mean["floor_used"]) == (0.0, False)
    both = run(processor(), steps)[-1]
    assert both["scale"] >= both["sigma_floor"] == by_mad["sigma_floor"]
    few = run(processor(scale_mode="mad"), steps[:49])[-1]
    assert (few["scale"], few["sigma_floor"], few["floor_used"]) == (1e-9, 0.0, False)


def test_auto_scale_mode_follows_the_trade_rate():
    fast, slow = alternating(400, 100), alternating(400, 4000)
    assert run(processor(auto_scale_mode=True), fast)[-1] == run(processor(scale_mode="ewma"), fast)[-1]
    assert run(processor(auto_scale_mode=True, scale_mode="ewma"), slow)[-1] == run(processor(), slow)[-1]


def test_event_weighting_gives_bursts_their_weight():
    steps = [*alternating(30), *(trade(T0_MS + 29_001, 9.0) for _ in range(30))]
    by_gap, by_event = (
        run(processor(scale_mode="ewma", ewma_weighting=weighting), steps)[-1]["scale"]
        for weighting in ("gap", "event")
    )
    assert by_gap < 1.1
    assert by_event == pytest.approx(5.0, rel=0.02)


def test_z_mode_level():
    steps = [trade(T0_MS + 100 * i, 1.0 + i % 3) for i in range(40)]
    values = run(processor(z_mode="level", level_window_trades=35, level_min_trades=30, warmup_trades=1), steps)
    levels = [value["cvd"] for value in values]
    assert [value["z_raw"] is None for value in values] == [True] * 30 + [False] * 10
    assert [value["warmup"] for value in values] == [True] * 30 + [False] * 10
    for i in range(30, 40):
        window = levels[max(0, i - 35) : i]
        assert values[i]["scale"] == pytest.approx(statistics.pstdev(window), rel=1e-9)
        z = (levels[i] - statistics.fmean(window)) / statistics.pstdev(window)
        assert values[i]["z_raw"] == pytest.approx(z, rel=1e-9)
        assert (values[i]["sigma_floor"], values[i]["floor_used"]) == (None, False)


def test_z_mode_flow_and_rate():
    steps = [trade(T0_MS + 100 * i, 1.0 + i % 3, ("buy", "buy", "sell")[i % 3]) for i in range(60)]
    values = run(processor(z_mode="flow", flow_window_ms=1000, scale_mode="ewma"), steps)
    deltas = [value["delta"] for value in values]
    flow = sum(deltas[-11:])
    assert values[-1]["z_raw"] == pytest.approx(flow / values[-1]["scale"], rel=1e-12)
    values = run(processor(z_mode="rate", rate_half_life_sec=2.0, scale_mode="ewma"), steps)
    rate = math.log(2) / 2 * sum(delta * 0.5 ** (0.1 * age / 2) for age, delta in enumerate(reversed(deltas)))
    assert values[-1]["z_raw"] * values[-1]["scale"] == pytest.approx(rate, rel=1e-12)


def test_winsor_applies_to_the_output_only():
    steps = [*alternating(60), trade(T0_MS + 60_000, 1000.0), trade(T0_MS + 61_000, 1.0, "sell")]
    values = run(processor(), steps)
    assert values[-2]["z_cvd"] == 8.0 < values[-2]["z_raw"]
    limited = run(processor(winsor_limit=0.5), steps)
    assert limited[-2]["z_cvd"] == 0.5
    assert [value["z_raw"] for value in limited] == [value["z_raw"] for value in values]


# --- freeze -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("pause_ms", "withheld"), [(4000, 0), (4001, 1), (5000, 1), (5001, 2)])
def test_z_is_withheld_after_a_pause(pause_ms, withheld):
    steps = alternating(30)
    start_ms = T0_MS + 29_000 + pause_ms
    steps += [trade(start_ms + 1000 * i, 1.0) for i in range(4)]
    values = run(processor(), steps)[30:]
    expected = [i < withheld for i in range(4)]
    assert [value["frozen"] for value in values] == expected
    assert [value["z_cvd"] is None for value in values] == [value["z_raw"] is None for value in values] == expected
    assert all(value["scale"] is not None and not value["warmup"] for value in values)
    thawed = run(processor(**PRESETS["no_freeze"]), steps)
    assert not any(value["frozen"] for value in thawed)


def test_a_trade_without_a_side_does_not_use_up_a_freeze():
    steps = [*alternating(30), trade(T0_MS + 40_000, 1.0, None)]
    steps += [trade(T0_MS + 41_000 + i, 1.0) for i in range(3)]
    values = run(processor(), steps)[30:]
    assert [value["frozen"] for value in values] == [True, True, True, False]


# --- sums ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text", ["0.00000001", "0.1", "0.29", "0.00000057", "123456.78901234", "9007199.25474099", "1e12", "1e-8"]
)
def test_lots_are_exact(text):
    assert to_lots(float(text)) == int(Decimal(text) * LOT)


def test_cvd_is_exact_to_the_lot():
    chance = random.Random(1)
    texts = [f"{chance.uniform(0, 10 ** chance.randint(-6, 6)):.8f}" for _ in range(2000)]
    texts = [text for text in texts if Decimal(text) > 0] + ["1000000000000", "0.00000001"]
    exact, steps = Decimal(0), []
    for i, text in enumerate(texts):
        side = chance.choice(("buy", "sell"))
        exact += Decimal(text) if side == "buy" else -Decimal(text)
        steps.append(trade(T0_MS + i, float(text), side))
    values = run(processor(), steps)
    assert values[-1]["cvd"] == float(exact)
    assert [value["delta"] for value in values] == [
        float(text) * (1 if step[1]["side"] == "buy" else -1) for text, step in zip(texts, steps)
    ]


def test_beyond_64_bits():
    steps = [trade(T0_MS + i, 1e12, ("buy", "buy", "sell")[i % 3], 1e9) for i in range(300)]
    whole, first, second = processor(), processor(), processor()
    head = run(first, steps[:150])
    second.restore(first.snapshot())
    assert packed(head + run(second, steps[150:])) == packed(run(whole, steps))
    assert head[-1]["cvd"] == 50e12
    assert head[-1]["notional_60s"] == 150e21


def test_trailing_windows():
    steps = [
        trade(T0_MS, 4.0, "sell", 10.0),
        trade(T0_MS + 25_000, 1.0, "buy", 10.0),
        trade(T0_MS + 30_000, 2.0, "buy", 20.0),
        trade(T0_MS + 30_000, 1.0, "sell", 20.0),
        trade(T0_MS + 60_001, 3.0, "buy", 5.0),
    ]
    values = run(processor(), steps)
    at_30, last = values[3], values[4]
    assert at_30["imbalance_1s"] == pytest.approx(1 / 3)
    assert at_30["imbalance_5s"] == at_30["imbalance_10s"] == pytest.approx(2 / 4)
    assert at_30["imbalance_30s"] == pytest.approx(-2 / 8)
    assert (at_30["volume_60s"], at_30["notional_60s"]) == (8.0, 40.0 + 10.0 + 40.0 + 20.0)
    assert at_30["buy_ratio"] == pytest.approx(3 / 8)
    assert at_30["trades_per_sec"] == pytest.approx(4 / 60)
    assert last["imbalance_30s"] == 1.0
    assert (last["volume_60s"], last["notional_60s"]) == (7.0, 10.0 + 40.0 + 20.0 + 15.0)
    assert last["buy_ratio"] == pytest.approx(6 / 7)


def test_cvd_ema():
    values = run(processor(ema_alpha=0.5), [trade(T0_MS, 4.0), trade(T0_MS, 2.0)])
    assert [value["cvd_ema"] for value in values] == [4.0, 5.0]


def test_memory_is_bounded_by_the_span():
    trailing, flow = Trailing(), LotSum(500)
    for ms in range(200_000):
        trailing.push(ms, 1, 1, 1)
        flow.push(ms, 1)
    assert len(trailing.state().times_ms) <= 60_001 * 4 / 3 + 128
    assert len(flow.state().times_ms) <= 501 * 4 / 3 + 128
    assert (trailing.count, trailing.short_net) == (60_001, [1001, 5001, 10_001, 30_001])
    assert flow.total == 501


# --- informed trading and impact ----------------------------------------------------------------------------------


def test_vpin_of_one_sided_and_balanced_flow():
    one_sided, balanced, half = (Vpin(10, 1000.0, 1e9) for _ in range(3))
    for i in range(2000):
        one_sided.push(100 * i, -5)
        balanced.push(100 * i, (5, -5)[i % 2])
        half.push(100 * i, (5, 5, 5, -5)[i % 4])
    assert one_sided.value() == 1.0
    assert balanced.value() < 0.15
    assert half.value() == pytest.approx(0.5, abs=0.05)


def test_vpin_splits_a_trade_over_buckets():
    vpin = Vpin(4, 1000.0, 1e9)
    for i in range(61):
        vpin.push(1000 * i, 10)  # ten lots a second
    assert vpin.value() is None
    vpin.push(60_000, -(10**9))
    assert vpin.value() == 1.0
    state = vpin.state()
    assert len(state.sizes) == 4
    assert 0 <= state.filled < state.size
    assert abs(state.net) <= state.filled


def test_vpin_waits_for_a_minute_and_all_buckets():
    vpin = Vpin(5, 10_000.0, 1e9)
    given = []
    for second in range(200):
        vpin.push(1000 * second, 7 if second % 3 else -7)
        given.append(vpin.value() is not None)
    assert 60 + 4 * 10 <= given.index(True) <= 60 + 5 * 10 + 5


def test_kyle_lambda_finds_the_planted_slope():
    chance, impact, price = random.Random(4), Impact(100, 30, 1000), 5_000_000
    for second in range(150):
        flow = chance.randint(-1000, 1000)
        price += 3 * flow
        impact.push(1000 * second, price, flow, abs(flow) * price)
        assert (impact.kyle_lambda is None) == (second <= 30)
    assert impact.kyle_lambda == 3.0


def test_kyle_lambda_and_amihud_against_their_definitions():
    chance = random.Random(5)
    steps = [
        trade(
            T0_MS + 137 * i,
            chance.randint(1, 900) / 100,
            chance.choice(("buy", "sell")),
            100 + chance.randint(-9, 9) / 10,
        )
        for i in range(400)
    ]
    last = run(processor(impact_bars=20, impact_min_bars=20), steps)[-1]
    bars = {}
    for _, row in steps:
        bars.setdefault(row["ts_ms"] // 1000, []).append(row)
    closes = [rows[-1]["price"] for rows in bars.values()]
    flows = [sum(row["qty"] * (1 if row["side"] == "buy" else -1) for row in rows) for rows in bars.values()]
    notional = [sum(row["qty"] * row["price"] for row in rows) for rows in bars.values()]
    ends = range(len(closes) - 21, len(closes) - 1)  # the last bar is still open
    x, y = [flows[i] for i in ends], [closes[i] - closes[i - 1] for i in ends]
    assert last["kyle_lambda"] == pytest.approx(statistics.linear_regression(x, y).slope, rel=1e-9)
    ratios = [abs(closes[i] / closes[i - 1] - 1) / notional[i] for i in ends]
    assert last["amihud"] == pytest.approx(statistics.fmean(ratios), rel=1e-9)


def test_kyle_lambda_needs_flow_that_varies():
    impact = Impact(10, 2, 1000)
    for second in range(20):
        impact.push(1000 * second, 100 + second, 5, 500)
    assert impact.kyle_lambda is None
    assert impact.amihud is not None


def test_regime():
    for step_ms, expected in ((100, "active"), (1000, "normal"), (3000, "quiet")):
        values = run(processor(), alternating(200, step_ms))
        assert values[0]["regime"] == "unknown"
        assert values[-1]["regime"] == expected


# --- odd input ----------------------------------------------------------------------------------------------------


def test_a_trade_without_a_side_counts_as_volume_only():
    values = run(processor(), [trade(T0_MS, 2.0), trade(T0_MS + 1, 5.0, None), trade(T0_MS + 2, 1.0, "sell")])
    middle = values[1]
    assert (middle["delta"], middle["z_raw"], middle["cvd"], middle["side"]) == (None, None, 2.0, None)
    assert (middle["volume_60s"], middle["imbalance_1s"], middle["buy_ratio"]) == (7.0, 1.0, 1.0)
    assert [value["no_delta_count"] for value in values] == [0, 1, 1]
    assert values[2]["cvd"] == 1.0


BAD = [
    {"qty": 0.0}, {"qty": -1.0}, {"qty": math.nan}, {"qty": math.inf}, {"qty": None}, {"qty": 1e300}, {"qty": 1e-10},
    {"price": None}, {"price": math.nan}, {"price": -5.0}, {"price": 0.0}, {"price": math.inf},
]  # fmt: skip


@pytest.mark.parametrize("bad", BAD)
def test_a_bad_trade_is_counted_and_changes_nothing_else(bad):
    values = run(processor(), [trade(T0_MS, 2.0), trade(T0_MS + 1, **{"qty": 1.0, **bad}), trade(T0_MS + 2, 1.0)])
    assert [value["delta"] for value in values] == [2.0, None, 1.0]
    assert [value["cvd"] for value in values] == [2.0, 2.0, 3.0]
    assert [value["volume_60s"] for value in values] == [2.0, 2.0, 3.0]
    assert [value["no_delta_count"] for value in values] == [0, 1, 1]


def test_time_that_goes_back_is_counted_and_stands_still():
    values = run(processor(), [trade(T0_MS + 5000, 1.0), trade(T0_MS, 1.0), trade(T0_MS + 5001, 1.0, "sell")])
    assert [value["late_count"] for value in values] == [0, 1, 1]
    assert values[1]["imbalance_1s"] == 1.0
    assert values[2]["imbalance_1s"] == pytest.approx(1 / 3)


def test_other_records_give_nothing():
    one = processor()
    assert one.step(*tick(T0_MS)) == []
    assert one.step(*quote(T0_MS, 1.0, 1.0, 2.0, 1.0)) == []
    assert one.snapshot() == {}


# --- the processor ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("z_mode", Z_MODES)
def test_it_is_a_processor_and_fits_its_schema(z_mode):
    one: Processor = processor(z_mode=z_mode)
    assert (one.inputs, one.outputs) == (("market.ticks", "market.rows"), ("features.cvd",))
    assert sorted(one.ROW_SOURCES) == ["aggTrade"]
    schema = fastavro.parse_schema(json.loads((SCHEMAS / "cvd.avsc").read_text()))
    names = {field["name"] for field in schema["fields"]} - {"seq", "sub"}
    for value in run(one, [*market(1, 600), trade(T0_MS + 60_000, math.nan, None)]):
        assert value.keys() == names
        fastavro.validation.validate({"seq": 1, "sub": 0, **value}, schema)


@pytest.mark.parametrize("z_mode", Z_MODES)
@pytest.mark.parametrize("cut", [0, 1, 37, 5000])
def test_restoring_goes_on_as_if_nothing_had_happened(z_mode, cut):
    steps = market(2, 8000, ("BTCUSDT", "ETHUSDT", "AKROUSDT"))
    config = {"z_mode": z_mode, "vpin_bucket_sec": 1.0, "vpin_buckets": 5}
    whole = run(processor(**config), steps)
    assert whole[-1]["vpin"] is not None and whole[-1]["kyle_lambda"] is not None
    first, second = processor(**config), processor(**config)
    head = run(first, steps[:cut])
    second.restore(first.snapshot())
    assert packed(head + run(second, steps[cut:])) == packed(whole)


BASE = {"z_mode": "delta", "vpin_bucket_sec": 1.0, "vpin_buckets": 5}
OTHER = {
    "z_mode": "flow", "scale_mode": "ewma", "mad_multiplier": 3.0, "mad_window_trades": 60, "mad_min_trades": 20,
    "scale_fast_weight": 0.9, "fast_half_life_sec": 1.0, "half_life_sec": 60.0, "ewma_weighting": "event",
    "reference_trades_per_sec": 50.0, "fast_weight_exponent": 3.0, "boost_exponent": 0.1, "winsor_limit": 0.5,
    "warmup_trades": 40, "soft_pause_ms": 2000, "hard_pause_ms": 9000, "soft_freeze_trades": 7,
    "hard_freeze_trades": 9, "ema_alpha": 0.9, "level_window_trades": 40, "level_min_trades": 10,
    "flow_window_ms": 500, "rate_half_life_sec": 1.0, "active_trades_per_sec": 9.0, "quiet_trades_per_sec": 1.9,
    "auto_scale_mode": True, "vpin_buckets": 8, "vpin_bucket_sec": 2.0, "vpin_half_life_sec": 10.0, "bar_ms": 250,
    "impact_bars": 40, "impact_min_bars": 10,
}  # fmt: skip
NEEDS = {
    "level_window_trades": {"z_mode": "level"},
    "level_min_trades": {"z_mode": "level"},
    "flow_window_ms": {"z_mode": "flow"},
    "rate_half_life_sec": {"z_mode": "rate"},
}


@pytest.mark.parametrize("name", CvdConfig.__struct_fields__)
def test_every_setting_has_an_effect(name):
    steps = market(3, 6000)
    base = {**BASE, **NEEDS.get(name, {})}
    assert OTHER[name] not in (base.get(name), getattr(CvdConfig(), name))
    assert run(processor(**{**base, name: OTHER[name]}), steps) != run(processor(**base), steps)


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_presets_are_valid_and_seed_is_the_default(name):
    config = CvdConfig(**PRESETS[name])
    assert msgspec.convert(msgspec.to_builtins(config), CvdConfig) == config
    assert (config == CvdConfig()) is (name == "seed")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mad_min_trades": 300}, "mad_min_trades is 300: it must not exceed mad_window_trades \\(200\\)"),
        ({"soft_pause_ms": 6000}, "soft_pause_ms is 6000: it must not exceed hard_pause_ms \\(5000\\)"),
        ({"half_life_sec": 10.0}, "fast_half_life_sec is 60.0: it must not exceed half_life_sec \\(10.0\\)"),
        ({"z_mode": "cvd"}, "Invalid enum value 'cvd'"),
        ({"winsor_limit": 0}, "> 0"),
        ({"sigma": 1}, "unknown field `sigma`"),
    ],
)
def test_settings_are_checked(settings, message):
    with pytest.raises(msgspec.ValidationError, match=message):
        msgspec.convert(settings, CvdConfig)
