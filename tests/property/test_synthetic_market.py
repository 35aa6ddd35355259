"""The synthetic market: repeatable, consistent with the exchange's rules, and honest about predictability."""

from __future__ import annotations

import json
import time
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from orderflow.errors import ConfigError
from orderflow.venues.binance.sim.market import (
    AGG_LAG_MOST_MS,
    AGG_WINDOW_MS,
    START_MS,
    MarketFrame,
    SymbolSpec,
    SyntheticConfig,
    SyntheticMarket,
)

SYMBOLS = ("BTCUSDT", "ETHUSDT", "SOLUSDT")
SEEDS = st.integers(min_value=0, max_value=1 << 62)


def data_of(frames: list[MarketFrame], stream: str) -> list[dict[str, Any]]:
    return [json.loads(payload)["data"] for name, payload, _ in frames if name == stream]


class NaiveBook:
    """A book of strings by the futures rule, written anew here so that it shares nothing with the market."""

    def __init__(self, snapshot: bytes) -> None:
        body = json.loads(snapshot)
        self.sides = {"b": dict(body["bids"]), "a": dict(body["asks"])}
        self.last_id: int = body["lastUpdateId"]
        self.chained: int | None = None

    def apply(self, event: dict[str, Any]) -> bool:
        if event["u"] < self.last_id and self.chained is None:
            return False
        if self.chained is None:
            assert event["U"] <= self.last_id <= event["u"] or event["pu"] == self.last_id
        else:
            assert event["pu"] == self.chained
        self.chained = event["u"]
        for side in ("b", "a"):
            for price, qty in event[side]:
                if float(qty) == 0:
                    self.sides[side].pop(price, None)
                else:
                    self.sides[side][price] = qty
        return True

    def best(self) -> tuple[str, str, str, str]:
        bid = max(self.sides["b"], key=float)
        ask = min(self.sides["a"], key=float)
        return bid, self.sides["b"][bid], ask, self.sides["a"][ask]


@settings(max_examples=12, deadline=None)
@given(seed=SEEDS, predictability=st.sampled_from([0.0, 0.5, 1.0]), activity=st.sampled_from([5.0, 60.0, 1_000.0]))
def test_the_oracle_holds_for_every_depth_update(seed: int, predictability: float, activity: float) -> None:
    market = SyntheticMarket(
        seed, SYMBOLS, config=SyntheticConfig(activity=activity, predictability=predictability, horizon_ms=1_000)
    )
    early = market.advance(START_MS + 730)
    snapshots = {symbol: market.snapshot(symbol, 1000) for symbol in SYMBOLS}
    frames = early + market.advance(START_MS + 6_000)
    checked = 0
    for symbol in SYMBOLS:
        book = NaiveBook(snapshots[symbol])
        quotes = {quote["u"]: quote for quote in data_of(frames, f"{symbol.lower()}@bookTicker")}
        ids = sorted(quotes)
        for event in data_of(frames, f"{symbol.lower()}@depth@100ms"):
            seen = [u for u in ids if u <= event["u"]]
            if book.apply(event) and seen:
                quote = quotes[seen[-1]]
                assert book.best() == (quote["b"], quote["B"], quote["a"], quote["A"])
                checked += 1
    assert checked > 30


@settings(max_examples=10, deadline=None)
@given(seed=SEEDS, cuts=st.lists(st.integers(min_value=1, max_value=1_999), max_size=20))
def test_the_same_seed_gives_the_same_bytes_however_time_is_cut(seed: int, cuts: list[int]) -> None:
    whole = SyntheticMarket(seed, SYMBOLS)
    pieces = SyntheticMarket(seed, tuple(reversed(SYMBOLS)))
    cut: list[MarketFrame] = []
    for at_ms in sorted(cuts):
        cut += pieces.advance(START_MS + at_ms)
        assert all(each[2] <= START_MS + at_ms for each in cut)
    cut += pieces.advance(START_MS + 2_000)
    assert whole.advance(START_MS + 2_000) == cut
    assert [whole.snapshot(symbol, 50) for symbol in SYMBOLS] == [pieces.snapshot(symbol, 50) for symbol in SYMBOLS]


def test_another_seed_gives_another_market() -> None:
    assert SyntheticMarket(1).advance(START_MS + 1_000) != SyntheticMarket(2).advance(START_MS + 1_000)


def best_prices(seed: int, flow_seed: int, predictability: float) -> list[tuple[int, str, str]]:
    config = SyntheticConfig(predictability=predictability, horizon_ms=2_000, lead_ms=500)
    market = SyntheticMarket(seed, ("BTCUSDT",), config=config, flow_seed=flow_seed)
    path: list[tuple[int, str, str]] = []
    for quote in data_of(market.advance(START_MS + 60_000), "btcusdt@bookTicker"):
        step = (quote["T"], quote["b"], quote["a"])
        if not path or path[-1][1:] != step[1:]:
            path.append(step)
    return path[1:]


@settings(max_examples=5, deadline=None)
@given(seed=SEEDS, flows=st.tuples(SEEDS, SEEDS).filter(lambda pair: pair[0] != pair[1]))
def test_without_predictability_prices_do_not_depend_on_flow_at_all(seed: int, flows: tuple[int, int]) -> None:
    one, other = (best_prices(seed, flow, 0.0) for flow in flows)
    # The first quote of a path may come late where the flow is thin; from then on every step is the same.
    assert len(one) > 20
    assert one == other


def test_with_predictability_prices_follow_the_flow() -> None:
    assert best_prices(1, 2, 1.0) != best_prices(1, 3, 1.0)
    agreement = {p: flow_and_next_move_agree(p) for p in (0.0, 1.0)}
    assert abs(agreement[0.0] - 0.5) < 0.1
    assert agreement[1.0] > 0.65


def flow_and_next_move_agree(predictability: float) -> float:
    """Share of 5 s windows whose signed volume has the sign of the mid's next 5 s."""
    market = SyntheticMarket(7, ("BTCUSDT",), config=SyntheticConfig(predictability=predictability, activity=20.0))
    cvd = mid = 0.0
    cvds, mids = [], []
    for second in range(0, 3_000, 5):
        for stream, payload, _ in market.advance(START_MS + second * 1_000):
            if stream.endswith("@aggTrade"):
                trade = json.loads(payload)["data"]
                cvd += float(trade["q"]) * (-1 if trade["m"] else 1)
            elif stream.endswith("@bookTicker"):
                quote = json.loads(payload)["data"]
                mid = (float(quote["b"]) + float(quote["a"])) / 2
        cvds.append(cvd)
        mids.append(mid)
    moves = [((b - a) * (d - c)) for (a, b), (c, d) in zip(pairwise(cvds[1:]), pairwise(mids[2:]), strict=False)]
    decided = [move for move in moves if move]
    assert len(decided) > 300
    return sum(move > 0 for move in decided) / len(decided)


@settings(max_examples=8, deadline=None)
@given(seed=SEEDS)
def test_frames_keep_the_rules_of_the_exchange(seed: int) -> None:
    frames = SyntheticMarket(seed, SYMBOLS).advance(START_MS + 8_000)
    times = [event_ms for _, _, event_ms in frames]
    assert times == sorted(times)
    assert all(json.loads(payload)["data"]["E"] == event_ms for _, payload, event_ms in frames)
    assert all(json.loads(payload)["stream"] == stream for stream, payload, _ in frames)
    for symbol in SYMBOLS:
        check_quotes(data_of(frames, f"{symbol.lower()}@bookTicker"))
        check_depth(data_of(frames, f"{symbol.lower()}@depth@100ms"))
        check_trades(data_of(frames, f"{symbol.lower()}@aggTrade"))
        marks = data_of(frames, f"{symbol.lower()}@markPrice@1s")
        assert len(marks) == 8 and all(mark["E"] % 1_000 == 0 and "ap" in mark for mark in marks)


def check_quotes(quotes: list[dict[str, Any]]) -> None:
    for before, quote in pairwise(quotes):
        assert quote["u"] > before["u"] and quote["T"] >= before["T"]
        assert any(quote[key] != before[key] for key in "bBaA"), "a quote without a change"
    for quote in quotes:
        assert 0 <= quote["E"] - quote["T"] <= 5
        assert float(quote["b"]) < float(quote["a"]) and float(quote["B"]) > 0 and float(quote["A"]) > 0
        assert {"ps", "st"} <= quote.keys()


def check_depth(events: list[dict[str, Any]]) -> None:
    assert events
    for before, event in pairwise(events):
        assert event["pu"] == before["u"] and event["U"] > event["pu"] + 1 and event["u"] >= event["U"]
        assert event["E"] - before["E"] >= 100 and (event["E"] - before["E"]) % 100 == 0
    for event in events:
        assert event["b"] or event["a"]
        assert event["T"] <= event["E"]


def check_trades(trades: list[dict[str, Any]]) -> None:
    for before, trade in pairwise(trades):
        assert trade["a"] == before["a"] + 1 and trade["f"] == before["l"] + 1 and trade["T"] >= before["T"]
    for trade in trades:
        assert trade["f"] <= trade["l"] and trade["nq"] == trade["q"] and float(trade["q"]) > 0
        assert trade["E"] - trade["T"] >= AGG_WINDOW_MS
    lags = [trade["E"] - trade["T"] for trade in trades]
    assert not lags or sorted(lags)[len(lags) // 2] <= AGG_WINDOW_MS + AGG_LAG_MOST_MS + 1


def test_numbers_have_the_symbol_s_decimals() -> None:
    frames = SyntheticMarket(3, ("DOGEUSDT",)).advance(START_MS + 3_000)
    quote = data_of(frames, "dogeusdt@bookTicker")[0]
    assert len(quote["b"].partition(".")[2]) == 6 and "." not in quote["B"]


def test_prices_and_quantities_lie_on_tick_and_step() -> None:
    spec = SymbolSpec(
        symbol="XUSDT", price=10.0, tick="0.05", step="0.5", price_decimals=2, qty_decimals=1, touch_qty=20.0
    )
    frames = SyntheticMarket(3, ("XUSDT",), specs=[spec]).advance(START_MS + 5_000)
    for event in data_of(frames, "xusdt@depth@100ms"):
        for price, qty in event["b"] + event["a"]:
            assert int(price.replace(".", "")) % 5 == 0
            assert int(qty.replace(".", "")) % 5 == 0


def test_a_price_near_nothing_stays_above_it() -> None:
    spec = SymbolSpec(
        symbol="XUSDT",
        price=0.013,
        tick="0.0001",
        step="1",
        price_decimals=4,
        qty_decimals=0,
        touch_qty=50.0,
        volatility_bps=20.0,
    )
    market = SyntheticMarket(5, ("XUSDT",), specs=[spec], config=SyntheticConfig(activity=5.0))
    quotes = data_of(market.advance(START_MS + 600_000), "xusdt@bookTicker")
    assert len({quote["b"] for quote in quotes}) > 3
    assert min(float(quote["b"]) for quote in quotes) > 0


def test_a_book_stays_bounded_over_hours() -> None:
    market = SyntheticMarket(11, ("BTCUSDT",), config=SyntheticConfig(activity=2.0, predictability=1.0))
    sizes = []
    for minute in range(0, 240, 20):
        market.advance(START_MS + minute * 60_000)
        body = json.loads(market.snapshot("BTCUSDT", 1_000_000))
        sizes.append(max(len(body["bids"]), len(body["asks"])))
    assert max(sizes) <= 3 * 400 + 2


def test_activity_and_regimes_do_what_they_say() -> None:
    def quotes_per_sec(activity: float) -> float:
        market = SyntheticMarket(4, ("ETHUSDT",), config=SyntheticConfig(activity=activity, regimes=False))
        return len(data_of(market.advance(START_MS + 60_000), "ethusdt@bookTicker")) / 60

    assert quotes_per_sec(60.0) == pytest.approx(60.0, rel=0.15)
    assert quotes_per_sec(600.0) == pytest.approx(600.0, rel=0.1)
    market = SyntheticMarket(4, ("ETHUSDT",), config=SyntheticConfig(activity=10.0))
    quotes = data_of(market.advance(START_MS + 1_800_000), "ethusdt@bookTicker")
    gaps = [after["T"] - before["T"] for before, after in pairwise(quotes)]
    assert max(gaps) > 1_500, "quiet spells are quiet"


@pytest.mark.parametrize("symbols", [(), ("BTCUSDT", "BTCUSDT"), ("btcusdt",), ("BTC/USDT",)])
def test_symbols_that_are_none_are_refused(symbols: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError, match="symbol"):
        SyntheticMarket(1, symbols)


def test_an_increment_finer_than_the_wire_is_refused() -> None:
    with pytest.raises(ValueError, match=r"tick of X is '0\.001'"):
        SymbolSpec(symbol="X", price=1.0, tick="0.001", step="1", price_decimals=2, qty_decimals=0, touch_qty=1.0)


def test_it_is_fast_enough_for_tens_of_thousands_of_events_a_second() -> None:
    market = SyntheticMarket(1, SYMBOLS, config=SyntheticConfig(activity=2_000.0))
    begun = time.process_time()
    count = len(market.advance(START_MS + 3_000))
    rate = count / (time.process_time() - begun)
    assert count > 10_000
    assert rate > 30_000, f"{rate:.0f} frames a second of processor time"
