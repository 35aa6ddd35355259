"""What must hold of order flow imbalance for any input."""

from __future__ import annotations

import itertools
import math
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ofi_cvd_rows import T0_MS, depth, market, packed, quote, run, tick
from orderflow.microstructure.ofi import OfiConfig, OfiProcessor
from orderflow.microstructure.ofi_flow import best_flow, price_flows, rank_flows

METHODS = ("cks", "level_difference", "price_keyed", "integrated")
LEVELS = 5
SIZES = st.integers(1, 5000)


@st.composite
def books(draw, levels=LEVELS):
    """Whole ticks and lots: exact in a double, so that equalities are exact."""
    bid = draw(st.integers(95, 105))
    bids, asks = [bid], [bid + draw(st.integers(1, 3))]
    for _ in range(levels - 1):
        bids.append(bids[-1] - draw(st.integers(1, 3)))
        asks.append(asks[-1] + draw(st.integers(1, 3)))
    quantities = draw(st.lists(SIZES, min_size=2 * levels, max_size=2 * levels))
    return tuple([float(number) for number in side] for side in (bids, quantities[:levels], asks, quantities[levels:]))


BOOKS = st.lists(books(), min_size=2, max_size=12)


def mirrored(book):
    bid_px, bid_qtys, ask_px, ask_qtys = book
    return [300.0 - price for price in ask_px], ask_qtys, [300.0 - price for price in bid_px], bid_qtys


def scaled(book, factor):
    bid_px, bid_qtys, ask_px, ask_qtys = book
    return bid_px, [qty * factor for qty in bid_qtys], ask_px, [qty * factor for qty in ask_qtys]


def stream(frames):
    """A quote of the best level and a depth row for each frame, and ticks."""
    steps = []
    for i, book in enumerate(frames):
        ts_ms = T0_MS + 100 * i
        steps += [tick(ts_ms), quote(ts_ms, *(side[0] for side in book)), depth(ts_ms, book)]
    return steps


def outputs(frames, **config):
    return run(OfiProcessor(OfiConfig(z_window=8, warmup_rows=3, **config), 0), stream(frames))


@pytest.mark.parametrize("method", METHODS)
@settings(max_examples=50)
@given(BOOKS)
def test_a_mirrored_market_gives_the_negative(method, frames):
    plain = outputs(frames, method=method)
    mirror = outputs([mirrored(book) for book in frames], method=method)
    for one, other in zip(plain, mirror, strict=True):
        assert other["ofi_l1"] == -one["ofi_l1"]
        assert other["components"] == [-flow for flow in one["components"]]
        assert other["queue_imbalance"] == -one["queue_imbalance"]
        for name in ("ofi_value", "ofi_norm", "ofi_ema", "ofi_z", "ofi_z_raw", "ofi_sum_window"):
            assert other[name] == (None if one[name] is None else -one[name]), name
        assert (other["scale"], other["std_zero"]) == (one["scale"], one["std_zero"])


@pytest.mark.parametrize("method", METHODS)
@settings(max_examples=40)
@given(BOOKS, st.integers(-12, 12))
def test_another_unit_of_quantity_scales_flow_and_leaves_z(method, frames, power):
    factor = 2.0**power
    plain = outputs(frames, method=method, std_floor=1e-12)
    other = outputs([scaled(book, factor) for book in frames], method=method, std_floor=1e-12)
    for one, two in zip(plain, other, strict=True):
        assert two["ofi_l1"] == one["ofi_l1"] * factor
        assert two["components"] == [flow * factor for flow in one["components"]]
        for name in ("ofi_value", "ofi_ema", "ofi_sum_window", "ofi_notional"):
            assert two[name] == (None if one[name] is None else one[name] * factor), name
        for name in ("ofi_norm", "queue_imbalance", "weighted_mid", "micro_price"):
            assert two[name] == one[name], name
        if not one["std_zero"] and not two["std_zero"]:
            assert (two["ofi_z"], two["ofi_z_raw"]) == (one["ofi_z"], one["ofi_z_raw"])


@given(BOOKS)
def test_flow_adds_up_over_a_split_of_the_stream(frames):
    """Level 1 over all quotes is the sum over two parts that share the frame between them; nothing counts twice."""
    whole = math.fsum(value["ofi_l1"] for value in outputs(frames))
    cut = len(frames) // 2
    parts = (frames[: cut + 1], frames[cut:])
    assert whole == math.fsum(value["ofi_l1"] for part in parts for value in outputs(part))


@given(books(1), st.lists(SIZES, min_size=1, max_size=8), st.booleans())
def test_flow_at_one_price_is_the_net_change_however_it_is_split(book, sizes, on_bid):
    """Additions at unchanged prices: the sum of flows is last quantity less first."""
    bid, bid_qty, ask, ask_qty = (side[0] for side in book)
    states = [(bid, bid_qty, ask, ask_qty)]
    states += [(bid, float(size), ask, ask_qty) if on_bid else (bid, bid_qty, ask, float(size)) for size in sizes]
    total = sum(best_flow(*before, *after) for before, after in itertools.pairwise(states))
    assert total == (states[-1][1] - bid_qty if on_bid else ask_qty - states[-1][3])


@given(books(), st.lists(SIZES, min_size=2 * LEVELS, max_size=2 * LEVELS))
def test_without_price_changes_all_methods_agree(book, sizes):
    after = (book[0], [float(size) for size in sizes[:LEVELS]], book[2], [float(size) for size in sizes[LEVELS:]])
    results = [outputs([book, after], method=method) for method in METHODS]
    for values in results[1:]:
        for one, other in zip(results[0], values, strict=True):
            assert one["components"] == other["components"]
            assert one["ofi_value"] == other["ofi_value"]


@given(books(), books())
def test_identical_frames_give_no_flow_and_mirrored_formulas_agree(book, after):
    assert rank_flows(*book, *book, 0, LEVELS) == price_flows(*book, *book, LEVELS) == [0.0] * LEVELS
    flows = rank_flows(*book, *after, 0, LEVELS)
    for m in range(LEVELS):
        before_m, after_m = ([side[m] for side in each] for each in (book, after))
        assert flows[m] == best_flow(*before_m, *after_m)


@given(books(3), books(3))
def test_price_keyed_flow_is_the_change_of_what_both_frames_show(book, after):
    """Summed over ranks, against dictionaries of prices."""
    expected = 0.0
    for side, sign, outward in ((0, 1.0, -1), (2, -1.0, 1)):
        old, new = dict(zip(book[side], book[side + 1])), dict(zip(after[side], after[side + 1]))
        shown = {px for px in old | new if all(px * outward <= each[side][-1] * outward for each in (book, after))}
        shown.discard(min(old | new, key=lambda px: px * outward))  # the better best price: level 1, the quotes'
        expected += sign * sum(new.get(px, 0.0) - old.get(px, 0.0) for px in shown)
    assert math.fsum(price_flows(*book, *after, 3)) == expected


@settings(max_examples=30)
@given(st.integers(0, 10_000), st.integers(0, 400), st.sampled_from(METHODS))
def test_restored_at_any_point_the_rest_is_the_same(seed, cut, method):
    steps = market(seed, 400, ("BTCUSDT", "ETHUSDT"))
    config = OfiConfig(method=method, z_window=30, warmup_rows=10, integrated_min_rows=10, micro_min_transitions=20)
    whole = run(OfiProcessor(config, 0), steps)
    first, second = OfiProcessor(config, 0), OfiProcessor(config, 0)
    head = run(first, steps[:cut])
    states = first.snapshot()
    second.restore(states)
    assert second.snapshot() == states
    assert packed(head + run(second, steps[cut:])) == packed(whole)


ODD = st.one_of(
    st.none(),
    st.floats(allow_nan=True, allow_infinity=True),
    st.sampled_from([0.0, -1.0, 1e-8, 1e12, 5e-324, 1.7e308, 100.0, 101.0]),
)
ODD_SIDE = st.lists(ODD.filter(lambda value: value is not None), max_size=7)
TIMES = st.one_of(st.integers(T0_MS, T0_MS + 20_000), st.integers(-(2**63), 2**63 - 1))
ODD_STEPS = st.lists(
    st.one_of(
        st.builds(quote, TIMES, ODD, ODD, ODD, ODD, gap_count=st.integers(0, 2)),
        st.builds(
            depth,
            TIMES,
            st.one_of(st.tuples(ODD_SIDE, ODD_SIDE, ODD_SIDE, ODD_SIDE), books(), books(2)),
            book_state=st.sampled_from(["synced", "synced", "stale", "none"]),
        ),
        st.builds(lambda ts_ms, book: quote(ts_ms, *(side[0] for side in book)), TIMES, books()),
        st.builds(tick, st.integers(T0_MS, T0_MS + 60_000)),
    ),
    max_size=40,
)


@settings(max_examples=150)
@given(ODD_STEPS, st.sampled_from(METHODS))
def test_nothing_raises_and_everything_put_out_is_finite(steps, method):
    one = OfiProcessor(OfiConfig(method=method, z_window=6, warmup_rows=2, integrated_min_rows=2), 0)
    rows = sum(topic == "market.rows" for topic, _ in steps)
    values = run(one, steps)
    assert len(values) == rows
    for value in values:
        for name, content in value.items():
            for number in content if isinstance(content, list) else [content]:
                assert not isinstance(number, float) or math.isfinite(number), name
        assert value["warmup"] <= (value["ofi_z"] is None)
        assert (value["ofi_value"] is None) == (value["components"] == [])
    one.restore(one.snapshot())


@settings(max_examples=50)
@given(st.lists(st.tuples(st.integers(0, 2), st.integers(1, 10**6), st.integers(1, 10**6)), min_size=2, max_size=60))
def test_level_one_is_exact_to_a_billionth_of_a_lot(frames):
    """Against exact fractions, with quantities that are decimals of three places as the exchange has them."""
    exact, before, steps = Fraction(0), None, []
    for i, (move, bid_lots, ask_lots) in enumerate(frames):
        state = (100 + move, Fraction(bid_lots, 1000), 101 + move, Fraction(ask_lots, 1000))
        steps.append(quote(T0_MS + i, 100.0 + move, bid_lots / 1000, 101.0 + move, ask_lots / 1000))
        exact += 0 if before is None else best_flow(*before, *state)
        before = state
    total = 0.0
    for value in run(OfiProcessor(OfiConfig(), 0), steps):
        total += value["ofi_l1"]
    assert abs(total - float(exact)) < 1e-9
