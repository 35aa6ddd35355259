"""Order flow imbalance: known answers, gaps, pauses, z, estimates, odd input, settings."""

from __future__ import annotations

import itertools
import json
import math
import statistics

import fastavro
import msgspec
import pytest
from ofi_cvd_rows import T0_MS, depth, market, packed, quote, row, run, tick, trade
from orderflow.microstructure.ofi import OfiConfig, OfiProcessor
from orderflow.microstructure.ofi_flow import best_flow, level_differences, price_flows, rank_flows
from orderflow.microstructure.ofi_micro import CELLS, MicroPrice
from orderflow.microstructure.ofi_weights import IntegratedWeights
from orderflow.paths import SCHEMAS
from orderflow.processor import Processor

METHODS = ("cks", "level_difference", "price_keyed", "integrated")
BEFORE = (100.0, 10.0, 101.0, 12.0)
TABLE = [
    ("bid add 5", (100.0, 15.0, 101.0, 12.0), 5.0, 5.0),
    ("ask add 8", (100.0, 10.0, 101.0, 20.0), -8.0, -8.0),
    ("market buy 5", (100.0, 10.0, 101.0, 7.0), 5.0, 5.0),
    ("bid improves", (100.5, 3.0, 101.0, 12.0), 3.0, -7.0),
    ("bid falls", (99.5, 8.0, 101.0, 12.0), -10.0, -2.0),
    ("ask improves", (100.0, 10.0, 100.5, 4.0), -4.0, 8.0),
    ("ask depleted", (100.0, 10.0, 101.5, 9.0), 12.0, 3.0),
    ("both up one tick", (101.0, 6.0, 102.0, 9.0), 18.0, -1.0),
]
BOOK = ([100.0, 99.0, 98.0, 97.0, 96.0], [1.0, 2.0, 3.0, 4.0, 5.0], [101.0, 102.0, 103.0, 104.0, 105.0], [1.0] * 5)


def processor(**settings) -> OfiProcessor:
    return OfiProcessor(OfiConfig(**settings), 0)


def book(**changes):
    """BOOK with quantities of some levels replaced: book(b1=7.0) sets the second bid."""
    sides = [list(side) for side in BOOK]
    for name, qty in changes.items():
        sides[1 if name[0] == "b" else 3][int(name[1:])] = qty
    return tuple(sides)


def quotes(sizes, step_ms=100):
    """Quotes at one price whose bid quantity grows by `sizes`."""
    total, steps = 1000.0, [quote(T0_MS, 100.0, 1000.0, 101.0, 5.0)]
    for i, size in enumerate(sizes, 1):
        total += size
        steps.append(quote(T0_MS + i * step_ms, 100.0, total, 101.0, 5.0))
    return steps


# --- flow ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("event", "after", "cks", "naive"), TABLE, ids=[line[0] for line in TABLE])
def test_known_answers_at_the_best_level(event, after, cks, naive):
    assert best_flow(*BEFORE, *after) == cks
    sides = [([bid], [bid_qty], [ask], [ask_qty]) for bid, bid_qty, ask, ask_qty in (BEFORE, after)]
    assert rank_flows(*sides[0], *sides[1], 0, 1) == [cks]
    assert level_differences(sides[0][1], sides[0][3], sides[1][1], sides[1][3], 0, 1) == [naive]
    for method, expected in (("cks", cks), ("level_difference", naive), ("price_keyed", cks), ("integrated", cks)):
        first, second = run(processor(method=method), [quote(T0_MS, *BEFORE), quote(T0_MS + 1, *after)])
        assert (first["ofi_l1"], first["ofi_value"], first["components"]) == (0.0, None, [])
        assert second["ofi_l1"] == cks
        assert second["components"] == [expected, 0.0, 0.0, 0.0, 0.0]
        assert second["ofi_value"] == 0.4 * expected


@pytest.mark.parametrize("method", METHODS)
def test_deeper_levels_come_from_depth_rows(method):
    steps = [depth(T0_MS, BOOK), depth(T0_MS + 100, book(b0=50.0, b1=7.0, a2=0.5, b4=4.0))]
    first, second = run(processor(method=method), steps)
    assert (first["ofi_value"], first["components"]) == (None, [])
    # +5 at rank 1, +.5 at rank 2 (less on offer), -1 at rank 4; rank 0 is the quotes'
    assert second["components"] == [0.0, 5.0, 0.5, 0.0, -1.0]
    assert second["ofi_value"] == 0.25 * 5.0 + 0.2 * 0.5 + 0.05 * -1.0
    assert second["ofi_l1"] == 0.0


def test_a_new_level_in_front_shifts_ranks_but_not_prices():
    sides = [list(side) for side in BOOK]
    sides[0], sides[1] = [100.0, 99.5, 99.0, 98.0, 97.0], [1.0, 6.0, 2.0, 3.0, 4.0]
    steps = [depth(T0_MS, BOOK), depth(T0_MS + 100, sides)]
    assert run(processor(), steps)[1]["components"] == [0.0, 6.0, 2.0, 3.0, 4.0]
    assert run(processor(method="price_keyed"), steps)[1]["components"] == [0.0, 6.0, 0.0, 0.0, 0.0]
    assert run(processor(method="level_difference"), steps)[1]["components"] == [0.0, 4.0, -1.0, -1.0, -1.0]


def test_price_keyed_leaves_out_what_one_frame_does_not_show():
    old = ([100.0, 99.0], [1.0, 2.0], [101.0, 102.0], [1.0, 1.0])
    new = ([99.0, 98.0], [5.0, 9.0], [101.0, 103.0], [1.0, 4.0])
    # 98 and 103 lie beyond the old frame; 102 was shown and is gone; 100 is rank 0
    assert price_flows(*old, *new, 2) == [0.0, (5.0 - 2.0) + 1.0]
    # a side with fewer levels than asked for is the whole side, so 98 and 103 are new
    assert price_flows(*old, *new, 3) == [0.0, (5.0 - 2.0) + 1.0, 9.0 - 4.0]


def test_a_book_with_fewer_levels_is_padded():
    small = ([100.0, 99.0], [1.0, 2.0], [101.0], [1.0])
    components = [value["components"] for value in run(processor(), [depth(T0_MS, BOOK), depth(T0_MS + 1, small)])]
    # ranks that vanished: bids 3, 4, 5 flow out; asks of 1.0 flow out, which is buying
    assert components[1] == [0.0, 1.0, -2.0, -3.0, -4.0]


def test_one_level_alone_gives_no_value_on_depth_rows():
    steps = [depth(T0_MS, BOOK), depth(T0_MS + 1, book(b1=9.0)), quote(T0_MS + 2, *BEFORE), quote(T0_MS + 3, *BEFORE)]
    values = run(processor(weights=(1.0,)), steps)
    assert [value["ofi_value"] for value in values] == [None, None, None, 0.0]
    assert values[3]["ofi_norm"] == 0.0


def test_both_sources_keep_books_of_their_own():
    steps = [quote(T0_MS, *BEFORE), depth(T0_MS, BOOK), quote(T0_MS + 1, 100.0, 15.0, 101.0, 12.0)]
    assert run(processor(), steps)[2]["ofi_l1"] == 5.0


def test_symbols_do_not_mix():
    steps = [
        quote(T0_MS, *BEFORE),
        quote(T0_MS, 5.0, 1.0, 6.0, 1.0, symbol="ETHUSDT"),
        quote(T0_MS + 1, 100.0, 15.0, 101.0, 12.0),
    ]
    assert [value["ofi_l1"] for value in run(processor(), steps)] == [0.0, 0.0, 5.0]
    assert processor().step(*trade(T0_MS, 1.0)) == []
    assert processor().step(*row("markPrice", T0_MS)) == []


# --- trust --------------------------------------------------------------------------------------------------------


def test_no_difference_across_a_gap():
    after = (100.0, 15.0, 101.0, 12.0)
    steps = [
        quote(T0_MS, *BEFORE),
        depth(T0_MS, BOOK),
        quote(T0_MS + 1, *after, gap_count=1),
        depth(T0_MS + 2, book(b1=9.0), gap_count=1),
        quote(T0_MS + 3, 100.0, 16.0, 101.0, 12.0, gap_count=1),
        depth(T0_MS + 4, book(b1=10.0), gap_count=1),
    ]
    values = run(processor(), steps)
    assert [value["ofi_value"] for value in values] == [None, None, None, None, 0.4, 0.25]
    assert [value["ofi_l1"] for value in values] == [0.0, 0.0, 0.0, 0.0, 1.0, 0.0]
    assert [value["gap_count"] for value in values] == [0, 0, 1, 1, 1, 1]


@pytest.mark.parametrize("state", ["resyncing", "stale", "none"])
def test_depth_that_is_not_synced_gives_no_value_and_quotes_count(state):
    steps = [
        depth(T0_MS, BOOK),
        quote(T0_MS, *BEFORE, book_state=state),
        depth(T0_MS + 1, book(b1=9.0), book_state=state),
        depth(T0_MS + 2, book(b1=10.0)),
        depth(T0_MS + 3, book(b1=11.0)),
        quote(T0_MS + 4, 100.0, 11.0, 101.0, 12.0, book_state=state),
    ]
    values = run(processor(), steps)
    assert [value["ofi_value"] for value in values] == [None, None, None, None, 0.25, 0.4]
    assert values[2]["mid"] is None and values[2]["book_state"] == state


def test_a_pause_is_flagged_and_kept_out_of_z():
    sizes = [1.0, 2.0, 3.0, 4.0]
    steps = quotes(sizes)
    steps.append(quote(T0_MS + 400 + 2001, 100.0, 1510.0, 101.0, 5.0))  # spans the pause
    steps.append(depth(T0_MS + 2402, BOOK))
    steps.append(quote(T0_MS + 2403, 100.0, 1515.0, 101.0, 5.0))
    values = run(processor(warmup_rows=4, z_window=10), steps)
    spanning, first_depth, later = values[5:]
    assert (spanning["ofi_value"], spanning["paused"], spanning["ofi_z"]) == (0.4 * 500.0, True, None)
    assert spanning["ofi_sum_window"] == pytest.approx(0.4 * 510.0)
    assert (first_depth["paused"], first_depth["ofi_value"]) == (True, None)
    assert later["paused"] is False
    window = [0.4 * size for size in sizes]
    assert later["ofi_z_raw"] == pytest.approx((2.0 - statistics.fmean(window)) / statistics.stdev(window), rel=1e-12)
    assert later["scale"] == pytest.approx(statistics.stdev(window), rel=1e-12)
    assert not run(processor(), [*quotes(sizes), quote(T0_MS + 400 + 2000, 100.0, 9.0, 101.0, 5.0)])[-1]["paused"]


def test_time_that_goes_back_is_counted():
    steps = [quote(T0_MS + 10, *BEFORE), depth(T0_MS, BOOK), quote(T0_MS + 5, *BEFORE), quote(T0_MS + 12, *BEFORE)]
    assert [value["late_rows"] for value in run(processor(), steps)] == [0, 0, 1, 1]


BAD_QUOTES = [
    (101.0, 1.0, 100.0, 1.0), (100.0, 1.0, 100.0, 1.0), (None, None, 101.0, 1.0), (100.0, 1.0, None, None),
    (None, None, None, None), (100.0, 0.0, 101.0, 1.0), (100.0, -1.0, 101.0, 1.0), (math.nan, 1.0, 101.0, 1.0),
    (100.0, math.nan, 101.0, 1.0), (100.0, 1.0, math.inf, 1.0), (100.0, 1e300, 101.0, 1.0), (0.0, 1.0, 101.0, 1.0),
]  # fmt: skip


@pytest.mark.parametrize("bad", BAD_QUOTES)
def test_a_bad_quote_is_counted_and_changes_nothing_else(bad):
    values = run(
        processor(), [quote(T0_MS, *BEFORE), quote(T0_MS + 1, *bad), quote(T0_MS + 2, 100.0, 15.0, 101.0, 12.0)]
    )
    assert [value["bad_frames"] for value in values] == [0, 1, 1]
    assert (values[1]["ofi_l1"], values[1]["ofi_value"], values[1]["mid"]) == (0.0, None, None)
    assert values[2]["ofi_l1"] == 5.0


BAD_BOOKS = [
    ([], [], [], []),
    ([100.0], [1.0], [], []),
    ([100.0], [1.0], [99.0], [1.0]),
    ([100.0, 100.5], [1.0, 1.0], [101.0], [1.0]),
    ([100.0], [1.0], [102.0, 101.0], [1.0, 1.0]),
    ([100.0, 99.0], [1.0], [101.0], [1.0]),
    ([100.0], [1.0], [101.0, 102.0], [1.0]),
    ([100.0], [math.nan], [101.0], [1.0]),
    ([100.0], [1.0], [math.nan], [1.0]),
    ([100.0], [1.0], [101.0], [0.0]),
    ([100.0], [-1.0], [101.0], [1.0]),
    ([100.0], [1.0], [101.0], [math.inf]),
]


@pytest.mark.parametrize("bad", BAD_BOOKS)
def test_a_bad_depth_frame_is_counted_and_changes_nothing_else(bad):
    values = run(processor(), [depth(T0_MS, BOOK), depth(T0_MS + 1, bad), depth(T0_MS + 2, book(b1=3.0))])
    assert [value["bad_frames"] for value in values] == [0, 1, 1]
    assert values[1]["ofi_value"] is None
    assert values[2]["components"] == [0.0, 1.0, 0.0, 0.0, 0.0]


@pytest.mark.parametrize("method", METHODS)
def test_extreme_quantities_stay_finite(method):
    steps = []
    for i in range(400):
        size = (1e-8, 1e12, 9.9e14, 1e-12)[i % 4]
        price = (1e-8, 1e9)[i % 2]
        steps.append(quote(T0_MS + i, price, size, price * 2, 1.0 / size if size < 1 else size))
        steps.append(depth(T0_MS + i, ([price, price / 2], [size, size], [price * 2], [size])))
        steps.append(tick(T0_MS + 1000 * i))
    for value in run(processor(method=method), steps):
        for name, content in value.items():
            for number in content if isinstance(content, list) else [content]:
                assert not isinstance(number, float) or math.isfinite(number), name


def test_times_at_the_ends_of_their_type_are_taken():
    ends = (2**63 - 1, -(2**63), 0, 2**63 - 1)
    one = processor()
    values = run(one, [quote(ts_ms, *BEFORE, recv_ts_ms=0) for ts_ms in ends])
    assert [value["ofi_value"] for value in values] == [None, 0.0, 0.0, 0.0]
    one.restore(one.snapshot())


# --- z and the rest -----------------------------------------------------------------------------------------------


def test_z_excludes_the_current_value_and_is_clipped_only_on_the_way_out():
    sizes = [1.0, -2.0, 3.0, 0.0, 2.0, 500.0, 1.0]
    values = run(processor(z_window=5, warmup_rows=3), quotes(sizes))
    flow = [0.4 * size for size in sizes]
    assert [value["ofi_z_raw"] is None for value in values] == [True] * 4 + [False] * 4
    assert [value["warmup"] for value in values] == [True] * 4 + [False] * 4
    for i in range(3, len(sizes)):
        window = flow[max(0, i - 5) : i]
        z = (flow[i] - statistics.fmean(window)) / statistics.stdev(window)
        assert values[i + 1]["ofi_z_raw"] == pytest.approx(z, rel=1e-12)
        assert values[i + 1]["ofi_z"] == max(-3.0, min(3.0, values[i + 1]["ofi_z_raw"]))
    assert values[6]["ofi_z"] == 3.0 < values[6]["ofi_z_raw"]
    assert run(processor(z_window=5, warmup_rows=3, z_clip=None), quotes(sizes))[6]["ofi_z"] > 100.0


def test_a_flat_window_takes_the_floor():
    values = run(processor(z_window=5, warmup_rows=3, std_floor=0.5), quotes([1.0, 1.0, 1.0, 2.0]))
    assert values[4]["std_zero"] is True
    assert values[4]["scale"] == 0.5
    assert values[4]["ofi_z_raw"] == pytest.approx((0.8 - 0.4) / 0.5)


def test_companions_of_a_quote():
    value = run(processor(), [quote(T0_MS, 100.0, 3.0, 101.0, 1.0)])[0]
    assert value["queue_imbalance"] == 0.5
    assert value["weighted_mid"] == value["micro_price"] == 100.75
    assert value["mid"] == 100.5
    assert value["spread_bps"] == pytest.approx(1e4 / 100.5, rel=1e-15)


def test_norm_notional_ema_and_window_sum():
    steps = [depth(T0_MS, BOOK), depth(T0_MS, book(b1=12.0)), depth(T0_MS + 5001, book(b1=11.0))]
    values = run(processor(pause_ms=10_000), steps)
    # mean quantity over both sides of five levels: 20 / 10, then 30 / 10, then 29 / 10 after 5.001 s
    keep = 0.5 ** (5.001 / 60)
    assert values[1]["ofi_value"] == 2.5
    assert values[1]["ofi_norm"] == pytest.approx(2.5 / 2.5)
    assert values[2]["ofi_norm"] == pytest.approx(-0.25 / ((5.0 * keep + 2.9) / (2 * keep + 1)), rel=1e-12)
    assert values[1]["ofi_notional"] == 2.5 * 100.5
    assert [value["ofi_ema"] for value in values] == [None, 2.5, pytest.approx(2.5 + 0.2 * -2.75)]
    assert [value["ofi_sum_window"] for value in values] == [None, 2.5, -0.25]


def test_quote_rate_and_regime():
    steps = [quote(T0_MS + 10 * i, *BEFORE) for i in range(1001)]
    steps += [quote(T0_MS + 10_000 + 100 * i, *BEFORE) for i in range(1, 201)]
    steps += [quote(T0_MS + 30_000 + 1000 * i, *BEFORE) for i in range(1, 21)]
    values = run(processor(), steps)
    assert {value["regime"] for value in values[:1000]} == {"unknown"}
    assert (values[1000]["quote_rate"], values[1000]["regime"]) == (100.1, "active")
    assert (values[1200]["quote_rate"], values[1200]["regime"]) == (10.1, "normal")
    assert (values[-1]["quote_rate"], values[-1]["regime"]) == (1.1, "quiet")


# --- estimates ----------------------------------------------------------------------------------------------------


def test_micro_price_of_a_chain_with_a_known_answer():
    """Imbalance +.5 is followed by a mid one tick higher and balance: G = 1 tick, shrunk by one observation in 400."""
    micro, mid = MicroPrice(half_life_sec=3600.0, min_transitions=400.0), 100.0
    assert micro.price(0.5, 1.0, mid) is None
    for _ in range(400):
        micro.on_quote(0.5, 1.0, mid)
        mid += 1.0
        micro.on_quote(0.0, 1.0, mid)
    micro.refresh(0.0)
    shift = 400 / 401
    assert micro.price(0.5, 1.0, mid) == pytest.approx(mid + shift, rel=1e-12)
    assert micro.price(-0.5, 1.0, mid) == pytest.approx(mid - shift, rel=1e-12)
    assert micro.price(0.0, 1.0, mid) == mid


def test_micro_price_follows_the_chain_beyond_one_step():
    """Cell A goes to cell B without a move of the mid, B to balance with one: both expect that move."""
    micro, mid = MicroPrice(half_life_sec=3600.0, min_transitions=10.0), 100.0
    for _ in range(5000):
        for imbalance, move in ((0.3, 0.0), (0.9, 0.0), (0.0, 0.5)):
            mid += move
            micro.on_quote(imbalance, 1.0, mid)
    micro.refresh(0.0)
    assert len(micro.solution) == CELLS
    assert micro.solution[1] == pytest.approx(0.5, rel=1e-3)
    assert micro.solution[4] == pytest.approx(0.5, rel=1e-3)


def test_a_narrower_spread_starts_the_micro_price_afresh():
    micro = MicroPrice(half_life_sec=3600.0, min_transitions=1.0)
    for i in range(10):
        micro.on_quote(0.5, 2.0, 100.0 + i)
    micro.refresh(0.0)
    assert micro.price(0.5, 2.0, 100.0) is not None
    micro.on_quote(0.5, 1.0, 100.0)
    assert micro.price(0.5, 2.0, 100.0) is None


def test_estimates_change_at_ticks_alone():
    steps = [step for step in market(5, 3000) if step[0] == "market.rows"]
    values = run(processor(), steps)
    assert all(value["micro_price"] in (None, value["weighted_mid"]) for value in values)
    one = processor()
    run(one, steps)
    before = one.snapshot()["BTCUSDT"]
    one.step(*tick(T0_MS, kind="config"))
    assert one.snapshot()["BTCUSDT"] == before
    one.step(*tick(T0_MS))
    assert one.snapshot()["BTCUSDT"] != before
    last = quote(steps[-1][1]["ts_ms"] + 1, 90.0, 3.0, 90.1, 1.0)
    assert run(one, [last])[0]["micro_price"] != run(processor(), [last])[0]["micro_price"]


def test_integrated_weights_find_the_planted_component():
    planted = [0.1, 0.2, 0.3, 0.4]
    fitted = IntegratedWeights(half_life_ms=1e9, min_rows=100, weights=[0.25] * 4)
    for i in range(400):
        size = math.sin(i)
        fitted.push(10 * i, [size * w + 0.001 * math.cos(7 * i + m) for m, w in enumerate(planted)], 2.0)
        if i == 50:
            fitted.refresh()
            assert fitted.weights == [0.25] * 4
    fitted.refresh()
    assert fitted.weights == pytest.approx(planted, abs=1e-3)
    assert math.fsum(map(abs, fitted.weights)) == pytest.approx(1.0, rel=1e-12)


def test_integrated_weights_are_frozen_between_refreshes_and_put_out():
    values = run(processor(method="integrated"), market(6, 6000))
    weights = [tuple(value["weights"]) for value in values]
    assert weights[0] == OfiConfig().weights
    assert len(set(weights)) > 2
    changes = sum(a != b for a, b in itertools.pairwise(weights))
    span_sec = (values[-1]["ts_ms"] - values[0]["ts_ms"]) / 1000
    assert changes <= span_sec / 10 + 1
    for value in values:
        if value["ofi_value"] is not None:
            total = sum(w * flow for w, flow in zip(value["weights"], value["components"]))
            assert value["ofi_value"] == pytest.approx(total, rel=1e-12, abs=1e-12)
    assert run(processor(), market(6, 50))[-1]["weights"] == []


def test_no_flow_keeps_the_configured_weights():
    fitted = IntegratedWeights(half_life_ms=1e9, min_rows=2, weights=[0.6, 0.4])
    for i in range(10):
        fitted.push(i, [0.0, 0.0], 1.0)
    fitted.refresh()
    assert fitted.weights == [0.6, 0.4]


# --- the processor ------------------------------------------------------------------------------------------------


def test_it_is_a_processor_and_fits_its_schema():
    one: Processor = processor(method="integrated")
    assert (one.inputs, one.outputs) == (("market.ticks", "market.rows"), ("features.ofi",))
    schema = fastavro.parse_schema(json.loads((SCHEMAS / "ofi.avsc").read_text()))
    names = {field["name"] for field in schema["fields"]} - {"seq", "sub"}
    for value in run(one, market(7, 400)):
        assert value.keys() == names
        fastavro.validation.validate({"seq": 1, "sub": 0, **value}, schema)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("cut", [0, 1, 37, 1500])
def test_restoring_goes_on_as_if_nothing_had_happened(method, cut):
    steps = market(8, 2000, ("BTCUSDT", "ETHUSDT", "AKROUSDT"))
    whole = run(processor(method=method), steps)
    first, second = processor(method=method), processor(method=method)
    head = run(first, steps[:cut])
    second.restore(first.snapshot())
    assert packed(head + run(second, steps[cut:])) == packed(whole)


def test_a_partition_number_changes_nothing():
    steps = market(9, 300)
    assert run(OfiProcessor(OfiConfig(), 0), steps) == run(OfiProcessor(OfiConfig(), 11), steps)


OTHER = {
    "method": "price_keyed", "weights": (0.5, 0.5), "z_window": 100, "warmup_rows": 20, "std_floor": 10.0,
    "z_clip": 1.0, "ema_alpha": 0.5, "window_ms": 500, "pause_ms": 100, "depth_half_life_sec": 1.0,
    "rate_window_ms": 1000, "active_quotes_per_sec": 10.0, "quiet_quotes_per_sec": 40.0, "refresh_sec": 1.0,
    "integrated_half_life_sec": 5.0, "integrated_min_rows": 400, "micro_half_life_sec": 5.0,
    "micro_min_transitions": 50,
}  # fmt: skip


@pytest.mark.parametrize("name", OfiConfig.__struct_fields__)
def test_every_setting_has_an_effect(name):
    steps = market(10, 4000)
    changed = {"method": "integrated", name: OTHER[name]}
    assert getattr(OfiConfig(**changed), name) != getattr(OfiConfig(), name)
    assert run(processor(**changed), steps) != run(processor(method="integrated"), steps)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"weights": (0.5, 0.4)}, "weights is \\[0.5, 0.4\\], which sum to 0.9: they must sum to 1"),
        ({"warmup_rows": 301}, "warmup_rows is 301: it must not exceed z_window \\(300\\)"),
        ({"quiet_quotes_per_sec": 50}, "quiet_quotes_per_sec is 50: it must be below active_quotes_per_sec"),
        ({"method": "naive"}, "Invalid enum value 'naive'"),
        ({"weights": ()}, "length >= 1"),
        ({"z_clip": 0.0}, "> 0"),
        ({"std_floor": 0.0}, ">= 1e-12"),
        ({"window": 5}, "unknown field `window`"),
    ],
)
def test_settings_are_checked(settings, message):
    with pytest.raises(msgspec.ValidationError, match=message):
        msgspec.convert(settings, OfiConfig)
