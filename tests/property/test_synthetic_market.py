"""The synthetic market: repeatable, consistent with the exchange's rules, and honest about predictability."""

from __future__ import annotations

import json
from bisect import bisect_right
from collections.abc import Sequence
from decimal import Decimal
from itertools import pairwise
from typing import Any

import msgspec
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from orderflow.errors import ConfigError
from orderflow.venues.binance.sim.instruments import exchange_info
from orderflow.venues.binance.sim.market import (
    AGG_LAG_MOST_MS,
    AGG_WINDOW_MS,
    FORCE_WINDOW_MS,
    START_MS,
    MarketFrame,
    SymbolSpec,
    SyntheticConfig,
    SyntheticMarket,
)
from orderflow.venues.binance.sim.regimes import SESSION_MS, SESSIONS
from orderflow.venues.binance.sim.specs import SPECS, spec_of, symbol_names

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
    assert oracle_checks(market, SYMBOLS, 6_000) > 30


def test_the_oracle_holds_on_200_symbols_of_all_kinds() -> None:
    symbols = symbol_names(200)
    market = SyntheticMarket(21, symbols, config=SyntheticConfig(activity=20.0, predictability=0.3, horizon_ms=1_000))
    assert oracle_checks(market, symbols, 4_000) > 200 * 15


def oracle_checks(market: SyntheticMarket, symbols: Sequence[str], for_ms: int) -> int:
    """Depth frames after which the best of a book rebuilt from the wire was held against the quotes."""
    early = market.advance(START_MS + 730)
    snapshots = {symbol: market.snapshot(symbol, 1000) for symbol in symbols}
    by_stream: dict[str, list[dict[str, Any]]] = {}
    for stream, payload, _ in early + market.advance(START_MS + for_ms):
        by_stream.setdefault(stream, []).append(json.loads(payload)["data"])
    checked = 0
    for symbol in symbols:
        book = NaiveBook(snapshots[symbol])
        quotes = by_stream.get(f"{symbol.lower()}@bookTicker", [])
        ids = [quote["u"] for quote in quotes]
        for event in by_stream.get(f"{symbol.lower()}@depth@100ms", []):
            seen = bisect_right(ids, event["u"])
            if book.apply(event) and seen:
                quote = quotes[seen - 1]
                assert book.best() == (quote["b"], quote["B"], quote["a"], quote["A"])
                checked += 1
    return checked


@settings(max_examples=10, deadline=None)
@given(seed=SEEDS, cuts=st.lists(st.integers(min_value=1, max_value=1_999), max_size=20))
def test_the_same_seed_gives_the_same_bytes_however_time_is_cut(seed: int, cuts: list[int]) -> None:
    # Over the change of two sessions, so that their switch is cut too.
    start_ms = (START_MS // SESSION_MS + 1) * SESSION_MS - 1_000
    config = SyntheticConfig(sessions=True)
    whole = SyntheticMarket(seed, SYMBOLS, start_ms=start_ms, config=config)
    pieces = SyntheticMarket(seed, tuple(reversed(SYMBOLS)), start_ms=start_ms, config=config)
    cut: list[MarketFrame] = []
    for at_ms in sorted(cuts):
        cut += pieces.advance(start_ms + at_ms)
        assert all(each[2] <= start_ms + at_ms for each in cut)
    cut += pieces.advance(start_ms + 2_000)
    assert whole.advance(start_ms + 2_000) == cut
    assert [whole.snapshot(symbol, 50) for symbol in SYMBOLS] == [pieces.snapshot(symbol, 50) for symbol in SYMBOLS]


def test_another_seed_gives_another_market() -> None:
    assert SyntheticMarket(1).advance(START_MS + 1_000) != SyntheticMarket(2).advance(START_MS + 1_000)


def best_prices(seed: int, flow_seed: int, predictability: float) -> list[tuple[int, str, str]]:
    """Every change of the best prices: (T, bid, ask)."""
    config = SyntheticConfig(predictability=predictability, horizon_ms=2_000, lead_ms=500)
    market = SyntheticMarket(seed, ("BTCUSDT",), config=config, flow_seed=flow_seed)
    start = json.loads(market.snapshot("BTCUSDT", 5))
    path = [(0, start["bids"][0][0], start["asks"][0][0])]
    for quote in data_of(market.advance(START_MS + 60_000), "btcusdt@bookTicker"):
        step = (quote["T"], quote["b"], quote["a"])
        if path[-1][1:] != step[1:]:
            path.append(step)
    return path


@settings(max_examples=5, deadline=None)
@given(seed=SEEDS, flows=st.tuples(SEEDS, SEEDS).filter(lambda pair: pair[0] != pair[1]))
@example(seed=2_199_023_255_553, flows=(0, 1_712_539_485_224_123)).via("a price that moves before the first flow event")
def test_without_predictability_prices_do_not_depend_on_flow_at_all(seed: int, flows: tuple[int, int]) -> None:
    one, other = (best_prices(seed, flow, 0.0) for flow in flows)
    assert len(one) > 20
    assert one == other


def test_with_predictability_prices_depend_on_the_flow() -> None:
    assert best_prices(1, 2, 1.0) != best_prices(1, 3, 1.0)


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


@pytest.mark.parametrize("activity", [20_000.0, 50_000.0])
def test_activity_goes_to_tens_of_thousands_of_quotes_a_second(activity: float) -> None:
    market = SyntheticMarket(1, ("BTCUSDT",), config=SyntheticConfig(activity=activity, regimes=False))
    quotes = data_of(market.advance(START_MS + 500), "btcusdt@bookTicker")
    assert len(quotes) == pytest.approx(activity / 2, rel=0.1)


def test_sessions_follow_the_hour_of_the_day() -> None:
    """Both sides of each switch: as many flow events and jumps as the session says, which over a day come to 1."""
    config = SyntheticConfig(activity=10.0, regimes=False, sessions=True)
    counts = {session.name: [0, 0] for session in SESSIONS}
    for number, after in enumerate(SESSIONS):
        switch_ms = (START_MS // 86_400_000 + 1) * 86_400_000 + number * SESSION_MS
        market = SyntheticMarket(6, tuple(SPECS), start_ms=switch_ms - 60_000, config=config)
        for session, until_ms in ((SESSIONS[number - 1], switch_ms), (after, switch_ms + 60_000)):
            found = flow_events_and_jumps(market.advance(until_ms))
            counts[session.name] = [a + b for a, b in zip(counts[session.name], found, strict=True)]
    for place, name in enumerate(("activity", "volatility")):
        mean = sum(count[place] for count in counts.values()) / len(SESSIONS)
        shares = [getattr(each, name) for each in SESSIONS]
        assert [counts[each.name][place] / mean for each in SESSIONS] == pytest.approx(shares, rel=0.1)
        assert sum(shares) == pytest.approx(len(SESSIONS))


def flow_events_and_jumps(frames: list[MarketFrame]) -> tuple[int, int]:
    """Quotes that moved no price, and quotes that moved both."""
    events = jumps = 0
    for symbol in SPECS:
        for before, quote in pairwise(data_of(frames, f"{symbol.lower()}@bookTicker")):
            moved = (before["b"] != quote["b"]) + (before["a"] != quote["a"])
            events += moved == 0
            jumps += moved == 2
    return events, jumps


ORDER_KEYS = ["s", "S", "o", "f", "q", "p", "ap", "X", "l", "z", "T", "ps", "st"]


def test_liquidations_have_the_form_of_the_wire_and_come_at_most_once_a_second() -> None:
    config = SyntheticConfig(activity=5.0)
    symbols = ("BTCUSDT", "DOGEUSDT", "BTCUSDT_261225")
    market = SyntheticMarket(8, symbols, config=config, specs=[volatile(symbol) for symbol in symbols])
    frames = market.advance(START_MS + 600_000)
    for symbol in symbols:
        spec = spec_of(symbol)
        events = data_of(frames, f"{symbol.lower()}@forceOrder")
        assert len(events) > 10
        for before, event in pairwise(events):
            assert event["E"] - before["E"] >= FORCE_WINDOW_MS
        for event in events:
            order = event["o"]
            assert list(event) == ["e", "E", "o"] and event["e"] == "forceOrder"
            assert list(order) == ORDER_KEYS
            assert (order["s"], order["ps"]) == (symbol, symbol.partition("_")[0])
            assert (order["o"], order["f"], order["X"], order["st"]) == ("LIMIT", "IOC", "FILLED", 1)
            assert 0 < event["E"] - order["T"] <= FORCE_WINDOW_MS + 1
            assert order["q"] == order["z"] and 0 < Decimal(order["l"]) <= Decimal(order["q"])
            limit, average = Decimal(order["p"]), Decimal(order["ap"])
            assert limit % Decimal(spec.tick) == 0 and Decimal(order["q"]) % Decimal(spec.step) == 0
            assert len(order["ap"].partition(".")[2]) == spec.price_decimals
            assert (limit < average) if order["S"] == "SELL" else (limit > average)
        assert {event["o"]["S"] for event in events} == {"BUY", "SELL"}


def volatile(symbol: str) -> SymbolSpec:
    return msgspec.structs.replace(spec_of(symbol), volatility_bps=3.0)


def test_a_liquidation_sweeps_what_the_trades_show() -> None:
    """Its quantity is that of the fills of one moment, at their average price, on the side of the taker."""
    market = SyntheticMarket(9, ("BTCUSDT",), config=SyntheticConfig(activity=0.1), specs=[volatile("BTCUSDT")])
    frames = market.advance(START_MS + 900_000)
    trades = data_of(frames, "btcusdt@aggTrade")
    alone = 0
    for event in data_of(frames, "btcusdt@forceOrder"):
        order = event["o"]
        near = [t for t in trades if abs(t["T"] - order["T"]) <= AGG_WINDOW_MS and t["m"] == (order["S"] == "SELL")]
        same = [t for t in near if t["T"] == order["T"]]
        assert near, "a liquidation without a trade"
        if same == near:
            alone += 1
            quantity = sum(Decimal(t["q"]) for t in same)
            notional = sum(Decimal(t["q"]) * Decimal(t["p"]) for t in same)
            assert Decimal(order["q"]) == quantity
            assert abs(Decimal(order["ap"]) - notional / quantity) < Decimal("0.01")
    assert alone > 5


def test_odd_names_work_everywhere() -> None:
    symbols = ("币安人生USDT", "BTCUSDT_261225", "1000PEPEUSDT", "BTCUSDT")
    market = SyntheticMarket(2, symbols, config=SyntheticConfig(activity=20.0))
    frames = market.advance(START_MS + 3_000)
    for symbol in symbols:
        quotes = data_of(frames, f"{symbol.lower()}@bookTicker")
        assert quotes and {(each["s"], each["ps"]) for each in quotes} == {(symbol, symbol.partition("_")[0])}
        assert json.loads(market.snapshot(symbol, 5))["bids"]
    listed = {
        each["symbol"]: each for each in exchange_info([each.instrument() for each in market.specs], 0)["symbols"]
    }
    dated, perpetual = listed["BTCUSDT_261225"], listed["BTCUSDT"]
    assert (dated["pair"], dated["baseAsset"], dated["quoteAsset"]) == ("BTCUSDT", "BTC", "USDT")
    assert (dated["contractType"], dated["deliveryDate"]) == ("CURRENT_QUARTER", 1_798_185_600_000)
    assert perpetual["contractType"] == "PERPETUAL"
    assert (listed["币安人生USDT"]["baseAsset"], listed["币安人生USDT"]["quoteAsset"]) == ("币安人生", "USDT")


@given(symbol=st.from_regex(r"[A-Z0-9]{1,12}USDT(_[0-9]{6})?", fullmatch=True))
def test_any_name_has_a_look_of_its_own_that_fits_the_exchange(symbol: str) -> None:
    spec = spec_of(symbol)
    assert spec == spec_of(symbol) and spec.symbol == symbol
    assert spec.price / float(spec.tick) >= 1_000, "a tick below ten basis points"
    assert spec.touch_qty / float(spec.step) >= 100
    assert len(symbol_names(300)) == len({*symbol_names(300)}) == 300


@pytest.mark.parametrize(
    "symbols", [(), ("BTCUSDT", "BTCUSDT"), ("btcusdt",), ("BTC/USDT",), ("",), ("_",), ("İUSDT",)]
)
def test_symbols_that_are_none_are_refused(symbols: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError, match="symbol"):
        SyntheticMarket(1, symbols)


def test_an_increment_finer_than_the_wire_is_refused() -> None:
    with pytest.raises(ValueError, match=r"tick of X is '0\.001'"):
        SymbolSpec(symbol="X", price=1.0, tick="0.001", step="1", price_decimals=2, qty_decimals=0, touch_qty=1.0)
