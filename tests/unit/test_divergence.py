"""Divergence: plain rules, pivots, what noise and planted patterns give."""

from __future__ import annotations

import itertools
import json
import math
import random

import msgspec
import pytest
from fusion_streams import T0_MS, cvd, ofi, run, tick, values
from orderflow.microstructure.divergence import (
    AlertState,
    DivergenceConfig,
    PivotState,
    classify,
    event_rate,
    onset,
    pivot_kind,
    plain_rule,
    take_bar,
)
from orderflow.microstructure.fusion import FusionConfig, FusionProcessor
from orderflow.topics import FEATURE_EVENTS, FUSION

DEFAULT = DivergenceConfig()

NOISE_TARGET = 0.005
"""Pivot divergences per bar on independent random walks: at most one in 200 bars."""

# --- plain rules --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("trend", "z_ofi", "z_cvd", "expected"),
    [
        (-10.0, 2.0, 1.0, ("bullish", 0.3)),
        (10.0, -2.0, -1.0, ("bearish", 0.3)),
        (None, 2.5, -1.5, ("inconsistent", 4.0)),
        (5.0, -2.5, 1.5, ("inconsistent", 4.0)),
        (-10.0, 1.0, 1.0, None),
        (-10.0, 2.0, 0.5, None),
        (0.0, 2.0, 1.0, None),
        (None, 2.0, 1.0, None),
        (10.0, 2.0, 1.0, None),
        (-10.0, 2.0, -1.0, None),
        (-10.0, None, 1.0, None),
        (-10.0, 2.0, None, None),
        (-10.0, math.nan, 1.0, None),
    ],
)
def test_plain_rules(trend, z_ofi, z_cvd, expected):
    assert plain_rule(DEFAULT, trend, z_ofi, z_cvd) == expected


def test_plain_rules_exclude_each_other_and_mirror():
    grid = [-4.0, -2.1, -1.1, -0.6, 0.0, 0.6, 1.1, 2.1, 4.0]
    opposite = {"bullish": "bearish", "bearish": "bullish", "inconsistent": "inconsistent"}
    seen = set()
    for trend, z_ofi, z_cvd in itertools.product([-3.0, 0.0, 3.0], grid, grid):
        wanted = {
            "bullish": trend < 0 and z_ofi > 1 and z_cvd > 0.5,
            "bearish": trend > 0 and z_ofi < -1 and z_cvd < -0.5,
            "inconsistent": abs(z_ofi) > 2 and abs(z_cvd) > 1 and z_ofi * z_cvd < 0,
        }
        assert sum(wanted.values()) <= 1
        found = plain_rule(DEFAULT, trend, z_ofi, z_cvd)
        assert (found[0] if found else None) == next((name for name, holds in wanted.items() if holds), None)
        mirrored = plain_rule(DEFAULT, -trend, -z_ofi, -z_cvd)
        assert mirrored == (None if found is None else (opposite[found[0]], found[1]))
        seen.add(found and found[0])
    assert seen == {None, "bullish", "bearish", "inconsistent"}


def test_one_condition_one_event():
    state = AlertState()
    told = [onset(state, "x", holds, now, 100) for now, holds in [(0, 1), (10, 1), (20, 0), (30, 1), (40, 0), (100, 1)]]
    assert told == [True, False, False, False, False, True]


def test_divergence_in_force_is_told_once_and_stands_in_every_record():
    steps = [tick(T0_MS + 1000 * i) for i in range(2)] + [ofi(T0_MS, 3.0, mid=100.0)]
    steps += [tick(T0_MS + 1000 * i) for i in range(2, 40)] + [ofi(T0_MS + 40_000, 3.0, mid=99.9), tick(T0_MS + 41_000)]
    steps += [cvd(T0_MS + 41_000 + i, 1.5) for i in range(5)]
    emits = run(FusionProcessor(FusionConfig(), 0), steps)
    records = values(emits, FUSION)[-5:]
    assert [record["div_type"] for record in records] == ["bullish"] * 5
    assert records[-1]["div_strength"] == pytest.approx(10.0 * 4.5 / 100, rel=1e-6)
    events = [event for event in values(emits, FEATURE_EVENTS) if event["event_type"] == "div_bullish"]
    assert len(events) == 1
    assert json.loads(events[0]["meta_json"])["trend_bps"] == pytest.approx(-10.0)


def test_anomalies():
    steps = [ofi(T0_MS, 3.1), cvd(T0_MS, -2.6), ofi(T0_MS + 1, 9.0), ofi(T0_MS + 2, 0.0), ofi(T0_MS + 30_000, -5.0)]
    events = values(run(FusionProcessor(FusionConfig(), 0), steps), FEATURE_EVENTS)
    anomalies = [event for event in events if event["event_type"].startswith("anomaly")]
    assert [(event["event_type"], event["strength"]) for event in anomalies] == [
        ("anomaly_ofi", 3.1),
        ("anomaly_cvd", 2.6),
        ("anomaly_ofi", 5.0),
    ]


def test_anomaly_of_price():
    steps = [ofi(T0_MS, 0.0, mid=100.0), tick(T0_MS), ofi(T0_MS, 0.0, mid=106.0), tick(T0_MS + 30_000)]
    events = values(run(FusionProcessor(FusionConfig(), 0), steps), FEATURE_EVENTS)
    assert [(event["event_type"], event["strength"]) for event in events] == [("anomaly_price", pytest.approx(600.0))]


# --- pivots -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values_", "kind"),
    [
        ([1, 2, 3, 2, 1], "high"),
        ([3, 2, 1, 2, 3], "low"),
        ([1, 2, 3, 3, 1], "high"),
        ([1, 3, 3, 2, 1], None),
        ([1, 1, 1, 1, 1], None),
        ([1, 2, 3, 4, 5], None),
        ([3, 1, 1, 2, 3], None),
        ([3, 2, 1, 1, 3], "low"),
    ],
)
def test_pivots_are_strict_on_the_left_alone(values_, kind):
    assert pivot_kind(values_, 2, 2) == kind


def test_a_constant_has_no_pivots_and_stays_small():
    state = PivotState()
    found = [one for bar in range(3000) for one in take_bar(DEFAULT, state, bar, bar * 1000, 5.0, 1.0, 1.0, 1.0)]
    assert found == []
    assert len(state.price) == DEFAULT.lookback_bars + 1


def test_table_of_divergences_is_complete():
    named = {
        ("low", -1, 1): "bull",
        ("low", 1, -1): "hidden_bull",
        ("high", 1, -1): "bear",
        ("high", -1, 1): "hidden_bear",
    }
    for kind, price, flow in itertools.product(["high", "low"], [-1, 0, 1], [-1, 0, 1]):
        assert classify(kind, price, flow) == named.get((kind, price, flow))


def test_pivots_are_told_when_confirmed_with_their_own_time_apart():
    config = DivergenceConfig(swing_left=2, swing_right=3)
    state = PivotState()
    found = []
    for bar, price in enumerate([1.0, 2.0, 5.0, 3.0, 2.0, 1.0]):
        found = [(bar, one) for one in take_bar(config, state, bar, bar * 1000, price, 0.0, 0.0, 0.0)]
    ((bar, pivot),) = found
    assert (bar, pivot.event_type, pivot.meta) == (5, "pivot_high", {"pivot_ts_ms": 2000, "price": 5.0})


def test_rings_are_bounded():
    rng = random.Random(5)
    config = DivergenceConfig(swing_left=1, swing_right=1, pair_pivots=8)
    state = PivotState()
    for bar in range(2000):
        take_bar(config, state, bar, bar * 1000, rng.random(), rng.random(), rng.random(), 0.0)
    assert len(state.highs) == len(state.lows) == 8
    assert len(state.price) == config.lookback_bars + 1


def test_no_pivot_across_a_hole_in_the_clock():
    state = PivotState()
    for bar in range(70):
        take_bar(DEFAULT, state, bar, bar * 1000, math.sin(bar / 5), 0.0, 0.0, 0.0)
    assert state.highs
    take_bar(DEFAULT, state, 76, 76_000, 1.0, 0.0, 0.0, 0.0)
    assert (state.price, state.highs, state.lows) == ([1.0], [], [])


def test_a_bar_is_taken_once():
    state = PivotState()
    take_bar(DEFAULT, state, 7, 7000, 1.0, 0.0, 0.0, 0.0)
    take_bar(DEFAULT, state, 7, 7200, 2.0, 0.0, 0.0, 0.0)
    take_bar(DEFAULT, state, 6, 6000, 2.0, 0.0, 0.0, 0.0)
    assert state.price == [1.0]


# --- noise and planted patterns -----------------------------------------------------------------------------------


def walk(rng, bars, start=0.0):
    return list(itertools.accumulate((rng.gauss(0, 1) for _ in range(bars - 1)), initial=start))


def test_noise_rate_on_independent_walks():
    rng = random.Random(11)
    rates = [event_rate(DEFAULT, walk(rng, 4000, 1e4), walk(rng, 4000), walk(rng, 4000)) for _ in range(3)]
    assert 0.0 < max(rates) <= NOISE_TARGET


def test_noise_rate_on_shuffled_changes():
    """Flows that do move with the price, their changes shuffled: nothing true is left, and little may be found."""
    rng = random.Random(12)
    price = walk(rng, 6000, 1e4)
    flow = [0.8 * (b - a) + rng.gauss(0, 0.5) for a, b in itertools.pairwise(price)]
    levels = []
    for _ in range(2):
        shuffled = flow[:]
        rng.shuffle(shuffled)
        levels.append(list(itertools.accumulate(shuffled, initial=0.0)))
    assert event_rate(DEFAULT, price, *levels) <= NOISE_TARGET


def planted(rng, kind):
    """Price and one flow level over 120 bars with a divergence between the pivots at bars 70 and 100, and its noise."""
    high = kind in {"bear", "hidden_bear"}
    side = 1.0 if high else -1.0
    further = 1.0 if kind in {"bear", "bull"} else -1.0  # the second pivot beyond the first?
    marks = [(0, 0.0), (55, -6.0 * side), (70, 8.0 * side), (85, -1.0 * side), (100, (8.0 + 5.0 * further) * side)]
    marks += [(120, -8.0 * side)]
    flow = [(0, 0.0), (55, -3.0 * side), (70, 12.0 * side), (100, (12.0 - 14.0 * further) * side), (120, -8.0 * side)]
    return [[level + rng.gauss(0, 0.2) for level in polyline(one)] for one in (marks, flow, flow)]


def polyline(marks):
    return [a + (b - a) * (bar - x) / (y - x) for (x, a), (y, b) in itertools.pairwise(marks) for bar in range(x, y)]


def divergences(price, first, second):
    state = PivotState()
    return [
        (bar, one.event_type.removeprefix("pivot_div_"))
        for bar in range(len(price))
        for one in take_bar(DEFAULT, state, bar, bar * 1000, 1e4 + price[bar], first[bar], second[bar], 0.0)
        if one.event_type.startswith("pivot_div_")
    ]


@pytest.mark.parametrize("kind", ["bull", "bear", "hidden_bull", "hidden_bear"])
def test_planted_divergences_are_found(kind):
    rng = random.Random(kind)
    hits = false = 0
    for _ in range(50):
        found = divergences(*planted(rng, kind))
        hits += any(name == kind and 110 <= bar <= 116 for bar, name in found)
        false += sum(name != kind for _, name in found)
    recall, precision = hits / 50, hits / max(1, hits + false)
    assert recall >= 0.9, (recall, precision)
    assert precision >= 0.9, (recall, precision)


def test_agreement_is_no_divergence():
    rng = random.Random(3)
    price = walk(rng, 3000, 1e4)
    follows = [level + rng.gauss(0, 0.1) for level in price]
    assert event_rate(DEFAULT, price, follows, follows) == 0.0


@pytest.mark.parametrize(
    "settings",
    [{"min_separation": 200}, {"pair_pivots": 0}, {"z_mid": 2.0}, {"bar_sec": 0}, {"nope": 1}],
)
def test_a_wrong_setting_is_named(settings):
    with pytest.raises(msgspec.ValidationError, match=next(iter(settings))):
        msgspec.convert(settings, DivergenceConfig)
