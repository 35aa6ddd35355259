"""What must hold of cumulative volume delta and of the side classifier for any input."""

from __future__ import annotations

import math
from decimal import Decimal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ofi_cvd_rows import T0_MS, market, packed, run, trade
from orderflow.microstructure.cvd import CvdConfig, CvdProcessor
from orderflow.microstructure.cvd_lots import to_lots
from orderflow.microstructure.side import SideClassifier, SideConfig

Z_MODES = ("delta", "level", "flow", "rate")
LOTS = st.integers(1, 10**20).map(lambda lots: lots // 10 ** (lots % 19) or 1)
SIDES = st.sampled_from(["buy", "sell"])
TRADES = st.lists(
    st.tuples(st.integers(0, 3000), st.integers(1, 10**6), SIDES, st.integers(900, 1100)), min_size=1, max_size=80
)


def stream(trades, factor=1.0, flip=False):
    ts_ms, steps = T0_MS, []
    for step_ms, lots, side, price in trades:
        ts_ms += step_ms
        shown = {"buy": "sell", "sell": "buy"}[side] if flip else side
        steps.append(trade(ts_ms, lots / 1000 * factor, shown, price / 10))
    return steps


def outputs(steps, **config):
    return run(CvdProcessor(CvdConfig(warmup_trades=3, mad_min_trades=5, level_min_trades=5, **config), 0), steps)


@given(st.integers(1, 10**15))
def test_a_decimal_with_eight_places_or_fewer_is_whole_lots(lots):
    assert to_lots(float(Decimal(lots).scaleb(-8))) == lots


@settings(max_examples=60)
@given(st.lists(st.tuples(LOTS, SIDES), min_size=1, max_size=40), st.randoms(use_true_random=False))
def test_order_within_one_time_does_not_matter(trades, chance):
    shuffled = trades[:]
    chance.shuffle(shuffled)
    ends = []
    for order in (trades, shuffled):
        steps = [trade(T0_MS, float(Decimal(lots).scaleb(-8)), side) for lots, side in order]
        ends.append(outputs(steps)[-1])
    for name in ("cvd", "volume_60s", "notional_60s", "imbalance_1s", "imbalance_30s", "buy_ratio", "trades_per_sec"):
        assert ends[0][name] == ends[1][name], name


@pytest.mark.parametrize("z_mode", Z_MODES)
@settings(max_examples=40)
@given(TRADES)
def test_flipped_sides_give_the_negative(z_mode, trades):
    plain, flipped = outputs(stream(trades), z_mode=z_mode), outputs(stream(trades, flip=True), z_mode=z_mode)
    for one, other in zip(plain, flipped, strict=True):
        for name in ("delta", "cvd", "cvd_ema", "z_raw", "z_cvd", "imbalance_1s", "imbalance_30s", "kyle_lambda"):
            assert other[name] == (None if one[name] is None else -one[name]), name
        for name in ("scale", "sigma_floor", "floor_used", "vpin", "amihud", "volume_60s", "warmup", "frozen"):
            assert other[name] == one[name], name


@pytest.mark.parametrize("z_mode", Z_MODES)
@settings(max_examples=40)
@given(TRADES, st.integers(1, 12))
def test_another_unit_of_quantity_scales_flow_and_leaves_z(z_mode, trades, power):
    factor = 2.0**power
    plain = outputs(stream(trades), z_mode=z_mode)
    other = outputs(stream(trades, factor), z_mode=z_mode)
    for one, two in zip(plain, other, strict=True):
        for name in ("delta", "cvd", "cvd_ema", "scale", "sigma_floor", "volume_60s", "notional_60s"):
            if name == "scale" and one[name] == 1e-9:
                continue
            assert two[name] == (None if one[name] is None else one[name] * factor), name
        for name in ("z_raw", "z_cvd", "imbalance_5s", "buy_ratio", "trades_per_sec"):
            assert two[name] == one[name], name


@given(TRADES, st.integers(2, 5))
def test_a_trade_split_into_equal_parts_adds_up(trades, parts):
    whole = stream(trades)
    split = [
        trade(row["ts_ms"], row["qty"], row["side"], row["price"]) for _, row in stream(trades) for _ in range(parts)
    ]
    times = [trade(row["ts_ms"], row["qty"] * parts, row["side"], row["price"]) for _, row in whole]
    one, other = outputs(split)[-1], outputs(times)[-1]
    for name in ("cvd", "volume_60s", "notional_60s", "imbalance_1s", "buy_ratio"):
        assert one[name] == other[name], name


@given(TRADES)
def test_bounds_and_the_running_sum(trades):
    exact = 0
    for value, (_, lots, side, _) in zip(outputs(stream(trades)), trades, strict=True):
        exact += lots if side == "buy" else -lots
        assert value["cvd"] == exact / 1000
        for name in ("imbalance_1s", "imbalance_5s", "imbalance_10s", "imbalance_30s"):
            assert -1.0 <= value[name] <= 1.0
        assert 0.0 <= value["buy_ratio"] <= 1.0
        assert value["z_cvd"] is None or abs(value["z_cvd"]) <= 8.0
        assert value["warmup"] <= (value["z_cvd"] is None)
        assert value["frozen"] <= (value["z_cvd"] is None)


@settings(max_examples=30)
@given(st.integers(0, 10_000), st.integers(0, 500), st.sampled_from(Z_MODES))
def test_restored_at_any_point_the_rest_is_the_same(seed, cut, z_mode):
    steps = market(seed, 1500, ("BTCUSDT", "ETHUSDT"), src=("aggTrade",))
    config = CvdConfig(z_mode=z_mode, vpin_bucket_sec=0.5, vpin_buckets=3, impact_bars=10, impact_min_bars=3)
    whole = run(CvdProcessor(config, 0), steps)
    first, second = CvdProcessor(config, 0), CvdProcessor(config, 0)
    head = run(first, steps[:cut])
    states = first.snapshot()
    second.restore(states)
    assert second.snapshot() == states
    assert packed(head + run(second, steps[cut:])) == packed(whole)


ODD = st.one_of(
    st.none(),
    st.floats(allow_nan=True, allow_infinity=True),
    st.sampled_from([0.0, -1.0, 1e-8, 1e12, 5e-324, 1.7e308, 9.99e14, 100.0]),
)
TIMES = st.one_of(st.integers(T0_MS, T0_MS + 200_000), st.integers(-(2**63), 2**63 - 1))


@settings(max_examples=150)
@given(
    st.lists(st.tuples(TIMES, ODD, st.sampled_from(["buy", "sell", None]), ODD), max_size=60), st.sampled_from(Z_MODES)
)
def test_nothing_raises_and_everything_put_out_is_finite(trades, z_mode):
    config = CvdConfig(
        z_mode=z_mode, warmup_trades=2, mad_min_trades=2, level_min_trades=2, vpin_buckets=2, impact_min_bars=2
    )
    one = CvdProcessor(config, 0)
    values = run(one, [trade(*each) for each in trades])
    assert len(values) == len(trades)
    for value in values:
        for name, number in value.items():
            assert not isinstance(number, float) or math.isfinite(number), name
    one.restore(one.snapshot())


@settings(max_examples=100)
@given(
    st.lists(
        st.one_of(
            st.tuples(st.just("quote"), TIMES, ODD, ODD),
            st.tuples(st.just("trade"), TIMES, ODD, st.sampled_from([True, False, None])),
        ),
        max_size=80,
    ),
    st.integers(0, 80),
)
def test_the_side_classifier_takes_anything_and_restores(events, cut):
    config = SideConfig(quote_history=8)
    whole, broken = SideClassifier(config), SideClassifier(config)
    for i, (kind, ts_ms, first, second) in enumerate(events):
        if i == cut:
            state = broken.snapshot()
            broken = SideClassifier(config)
            broken.restore(state)
        if kind == "quote":
            whole.on_quote(ts_ms, first, second)
            broken.on_quote(ts_ms, first, second)
        else:
            side, source = whole.classify(ts_ms, first, second)
            assert broken.classify(ts_ms, first, second) == (side, source)
            assert (side is None) == (source == "none")
            assert (source == "exchange") == (second is not None)
    assert whole.snapshot() == broken.snapshot()
    assert len(whole.snapshot()) < 1000
