"""The aggressor's side: flag, Lee-Ready, tick rule, nothing."""

from __future__ import annotations

import math

import pytest
from orderflow.microstructure.side import SideClassifier, SideConfig, agreement


def classifier(**settings) -> SideClassifier:
    return SideClassifier(SideConfig(**settings))


@pytest.mark.parametrize(("maker_flag", "side"), [(True, "sell"), (False, "buy")])
@pytest.mark.parametrize("price", [100.0, math.nan, None, -1.0])
def test_the_flag_comes_first(maker_flag, side, price):
    one = classifier()
    one.on_quote(1, 99.0, 100.0)
    assert one.classify(5, price, maker_flag) == (side, "exchange")


@pytest.mark.parametrize(("price", "side"), [(100.0, "buy"), (99.6, "buy"), (99.4, "sell"), (99.0, "sell")])
def test_lee_ready(price, side):
    one = classifier()
    one.on_quote(1, 99.0, 100.0)
    assert one.classify(5, price, None) == (side, "lee_ready")


def test_the_quote_lies_strictly_before_the_trade():
    one = classifier()
    one.on_quote(1, 99.0, 100.0)
    one.on_quote(5, 101.0, 102.0)
    assert one.classify(5, 100.0, None) == ("buy", "lee_ready")
    assert one.classify(6, 100.0, None) == ("sell", "lee_ready")
    assert one.classify(1, 100.0, None) == (None, "none")
    assert one.trades_without_side == 1


def test_at_the_midpoint_the_tick_rule_decides():
    one = classifier()
    one.on_quote(1, 99.0, 101.0)
    one.classify(2, 99.5, None)
    assert one.classify(3, 100.0, None) == ("buy", "tick_rule")


def test_quotes_that_come_late_take_their_place():
    one = classifier()
    one.on_quote(10, 199.0, 200.0)
    one.on_quote(1, 99.0, 100.0)
    assert one.classify(5, 100.0, None) == ("buy", "lee_ready")


def test_an_unusable_quote_blocks_lee_ready_until_the_next():
    one = classifier()
    one.on_quote(1, 99.0, 100.0)
    for ts_ms, bid, ask in ((2, 101.0, 100.0), (3, None, 100.0), (4, math.nan, 100.0), (5, 99.0, math.inf)):
        one.on_quote(ts_ms, bid, ask)
        assert one.classify(ts_ms + 1, 100.0, None) == (None, "none")
    assert one.quotes_unusable == 4
    one.on_quote(6, 99.0, 100.0)
    assert one.classify(7, 100.0, None) == ("buy", "lee_ready")


def test_tick_rule_and_its_limits():
    one = classifier(lee_ready=False, tick_rule_max_repeats=2, tick_rule_max_gap_ms=1000)
    expected = [
        (0, 100.0, None), (1, 100.0, None), (2, 101.0, "buy"), (3, 101.0, "buy"), (4, 101.0, "buy"), (5, 101.0, None),
        (6, 100.0, "sell"), (1006, 100.0, "sell"), (2007, 100.0, None), (2008, 100.0, None), (9000, 99.0, "sell"),
    ]  # fmt: skip
    for ts_ms, price, side in expected:
        assert one.classify(ts_ms, price, None) == (side, "none" if side is None else "tick_rule"), ts_ms


def test_the_tick_rule_follows_prices_through_flagged_trades():
    one = classifier()
    one.classify(0, 100.0, True)
    one.classify(1, 101.0, True)
    assert one.classify(2, 101.0, None) == ("buy", "tick_rule")


@pytest.mark.parametrize("price", [None, math.nan, math.inf, 0.0, -1.0])
def test_a_price_that_is_none_gives_no_side_and_leaves_the_rules_alone(price):
    one = classifier(lee_ready=False)
    one.classify(0, 100.0, None)
    assert one.classify(1, price, None) == (None, "none")
    assert one.classify(2, 101.0, None) == ("buy", "tick_rule")


def test_history_is_bounded_and_what_fell_out_gives_no_answer():
    one = classifier(quote_history=10)
    for ts_ms in range(1000):
        one.on_quote(ts_ms, 99.0, 100.0)
    one.on_quote(0, 99.0, 100.0)
    assert one.quotes_too_old == 1
    assert len(one.snapshot()) < 500
    assert one.classify(900, 100.0, None) == (None, "none")
    assert one.classify(1000, 100.0, None) == ("buy", "lee_ready")


MIXED = [
    ("quote", 0, 99.0, 100.0), ("trade", 1, 100.0), ("trade", 2, 99.5), ("trade", 3, 99.5), ("trade", 4, 99.6),
    ("trade", 5, 99.5), ("quote", 2000, 99.0, 100.0), ("trade", 2001, 99.9), ("trade", 3500, 99.5),
    ("trade", 6000, 99.5), ("quote", 6001, 99.2, 99.4), ("trade", 6002, 99.3), ("trade", 6003, 99.3),
    ("trade", 5999, 99.8), ("trade", 1500, 99.2),
]  # fmt: skip
OTHER = {
    "lee_ready": False, "tick_rule": False, "tick_rule_max_repeats": 0, "tick_rule_max_gap_ms": 10_000,
    "quote_max_age_ms": 100, "quote_history": 1,
}  # fmt: skip


def outcome(**settings):
    one, results = classifier(**settings), []
    for kind, *content in MIXED:
        if kind == "quote":
            one.on_quote(*content)
        else:
            results.append(one.classify(*content, None))
    return results


@pytest.mark.parametrize("name", SideConfig.__struct_fields__)
def test_every_setting_has_an_effect(name):
    assert outcome(**{name: OTHER[name]}) != outcome()


def test_agreement():
    assert agreement(["buy", None, "sell", "buy"], ["buy", "buy", "sell", "sell"]) == 0.5
    assert math.isnan(agreement([], []))
