"""Faults of the simulated exchange: plans and their text, the effect of every kind, the ledger, determinism."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from functools import lru_cache
from itertools import pairwise
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from orderflow.errors import ConfigError
from orderflow.paths import ROOT
from orderflow.venues.binance.frames import (
    UNDECODABLE,
    decode_agg_trade,
    decode_book_ticker,
    decode_depth,
    route_of_parsed,
)
from orderflow.venues.binance.sim import damage, faults
from orderflow.venues.binance.sim.faults import (
    DRAWN_KINDS,
    KINDS,
    Fault,
    FaultEngine,
    FaultPlan,
    LedgerEntry,
    parse_faults,
    read_plan,
)
from orderflow.venues.binance.sim.market import SyntheticConfig, SyntheticMarket
from orderflow.venues.binance.sim.source import Frame
from orderflow.venues.binance.streams import parse_stream, route_of_stream

SYMBOLS = ("BTCUSDT", "ETHUSDT", "SOLUSDT")
OPENED_MS = 1_790_000_000_000
LENGTH_MS = 10_000
FRAME_KINDS = (*(kind for kind, spec in KINDS.items() if spec.scope == "stream"), "clock_jump")
DECODERS = {"aggTrade": decode_agg_trade, "bookTicker": decode_book_ticker, "depth": decode_depth}


@lru_cache(maxsize=1)
def market() -> tuple[Frame, ...]:
    made = SyntheticMarket(3, SYMBOLS, start_ms=OPENED_MS, config=SyntheticConfig(activity=20.0))
    sent = [
        Frame(route_of_stream(stream.partition("@")[2]), stream, payload, at_ms - OPENED_MS)
        for stream, payload, at_ms in made.advance(OPENED_MS + LENGTH_MS)
        if parse_stream(stream).kind in DECODERS
    ]
    assert len(sent) > 600
    return tuple(sent)


def engine_of(text: str, seed: int = 1) -> FaultEngine:
    return FaultEngine(FaultPlan(seed, parse_faults(text)))


def run(engine: FaultEngine, sent: Sequence[Frame] = (), step_ms: int = 5) -> list[tuple[int, Frame]]:
    """(time of delivery, frame), with the market's time in steps until all is delivered."""
    sent = sent or market()
    delivered: list[tuple[int, Frame]] = []
    begin = now_ms = 0
    while begin < len(sent) or not engine.idle:
        now_ms += step_ms
        end = begin
        while end < len(sent) and sent[end].at_ms <= now_ms:
            end += 1
        delivered += [(now_ms, frame) for frame in engine.frames(now_ms, sent[begin:end])]
        engine.sockets(now_ms)
        engine.books_to_keep(now_ms)
        begin = end
        assert now_ms < 300_000, "something is held for ever"
    return delivered


def ids(frame: Frame) -> tuple[int | None, int | None]:
    return damage.ids_of(parse_stream(frame.stream).kind, frame.payload)


def within(begin_ms: int, end_ms: int, **fields: str) -> list[Frame]:
    """What the market sent in [begin, end) of a symbol, kind, route."""
    chosen = []
    for frame in market():
        name = parse_stream(frame.stream)
        has = {"symbol": name.symbol, "kind": name.kind, "route": frame.route}
        if begin_ms <= frame.at_ms < end_ms and all(has[key] == value for key, value in fields.items()):
            chosen.append(frame)
    return chosen


def only(engine: FaultEngine) -> LedgerEntry:
    assert len(engine.ledger) == 1
    return engine.ledger[0]


def data(payload: bytes) -> Any:
    return json.loads(payload)["data"]


# Plans


def test_the_text_form() -> None:
    text = "drop@12.5s+3s:symbol=BTCUSDT,value=0.5; stall_route@1m+250ms:route=public # once\nclose_1006@0s"
    assert parse_faults(text) == (
        Fault("drop", 12_500, 3_000, symbol="BTCUSDT", value=0.5),
        Fault("stall_route", 60_000, 250, route="public"),
        Fault("close_1006", 0),
    )
    assert parse_faults("drop@1s:stream=币安usdt@depth@100ms")[0].stream == "币安usdt@depth@100ms"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("drop", "write kind@time"),
        ("drop@5", "write kind@time"),
        ("nonsense@5s", "'nonsense' is not known: it must be one of drop"),
        ("stall_route@5s", "no duration: give one"),
        ("close_1006@5s+1s", "happens at a moment"),
        ("drop@5s:route=private", "'private': it must be public or market"),
        ("drop@5s:value=2", "value of drop is 2: it must be from 0 to 1"),
        ("drop@5s:value=much", "Expected `float"),
        ("drop@5s:value=nan", "value of drop is nan"),
        ("drop@5s:colour=red", "'colour=red'"),
        ("rest_503@5s+1s:route=public", "concerns no socket"),
        ("half_open@5s:symbol=BTCUSDT", "concerns whole routes"),
        ("drop@999999h", "both must be from 0"),
    ],
)
def test_what_is_not_understood_is_named(text: str, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_faults(text)
    assert said in str(caught.value)


def test_plans_in_json() -> None:
    plan = FaultPlan(7, parse_faults("drop@5s:symbol=BTCUSDT;rest_503@5s+1s:value=2"))
    assert FaultPlan.from_json(plan.to_json()) == plan == read_plan(plan.to_json().decode())
    assert read_plan('[{"kind":"drop","at_ms":5000}]', 9) == FaultPlan(9, (Fault("drop", 5_000),))
    for text, said in (
        ("[{", "truncated"),
        ('[{"kind":"drop"}]', "missing required field `at_ms`"),
        ('[{"kind":"dorp","at_ms":1}]', "'dorp' is not known"),
        ('[{"kind":"drop","at_ms":1,"colour":1}]', "unknown field `colour`"),
        ('{"faults":[{"kind":"drop","at_ms":-1}]}', "at -1 ms"),
        ("7", "Expected `object`"),
    ):
        with pytest.raises(ConfigError) as caught:
            FaultPlan.from_json(text)
        assert said in str(caught.value)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**63), st.integers(0, 3_600_000), st.sampled_from([500.0, 20_000.0]))
def test_drawn_plans_keep_their_bounds_and_come_back_from_their_text(
    seed: int, duration_ms: int, mean_gap_ms: float
) -> None:
    plan = FaultPlan.draw(seed, duration_ms, SYMBOLS, mean_gap_ms=mean_gap_ms)
    assert plan == FaultPlan.draw(seed, duration_ms, SYMBOLS, mean_gap_ms=mean_gap_ms)
    assert all(fault.end_ms <= duration_ms - 60_000 for fault in plan.faults)
    assert all(fault.symbol in ("", *SYMBOLS) for fault in plan.faults)
    assert parse_faults("\n".join(plan.lines())) == plan.faults
    assert read_plan(";".join(plan.lines()), plan.seed) == plan


def test_every_kind_is_drawn_about_as_often_as_the_others() -> None:
    plan = FaultPlan.draw(1, 20_000_000, SYMBOLS, mean_gap_ms=5_000)
    counts = Counter(fault.kind for fault in plan.faults)
    assert set(counts) == set(DRAWN_KINDS)
    assert len(plan.faults) == pytest.approx(4_000, rel=0.1)
    expected = len(plan.faults) / len(DRAWN_KINDS)
    assert all(abs(count - expected) < 5 * expected**0.5 for count in counts.values())


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"kinds": ("drop", "dorp")}, "drop, dorp: choose among"),
        ({"kinds": ()}, "none: choose among"),
        ({"symbols": ()}, "0 symbols"),
        ({"mean_gap_ms": 0.0}, "mean gap 0.0 ms"),
    ],
)
def test_a_plan_that_cannot_be_drawn(change: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        FaultPlan.draw(**{"seed": 1, "duration_ms": 100_000, "symbols": SYMBOLS, **change})


def test_every_kind_has_an_example_in_the_documentation() -> None:
    page = (ROOT / "docs" / "simulator.md").read_text("utf-8")
    rows = re.findall(r"^\| `(\w+)` \| .* \| `([^`]+)` \|$", page, re.MULTILINE)
    examples = {kind: parse_faults(example) for kind, example in rows if "@" in example}
    assert list(examples) == list(KINDS)
    assert all([fault.kind for fault in examples[kind]] == [kind] for kind in KINDS)


# Frames


def test_without_faults_frames_pass_as_they_are() -> None:
    engine = FaultEngine()
    assert engine.idle
    assert engine.frames(LENGTH_MS, market()) == list(market())
    assert not engine.ledger and engine.next_due_ms() is None


def test_one_fault_touches_nothing_else() -> None:
    engine = engine_of("drop@4s+2s:symbol=ETHUSDT,stream=aggTrade")
    lost = within(4_000, 6_000, symbol="ETHUSDT", kind="aggTrade")
    assert [frame for _, frame in run(engine)] == [frame for frame in market() if frame not in lost]
    assert [(e.first_id, e.last_id) for e in engine.ledger] == [ids(frame) for frame in lost]
    assert {(e.kind, e.effect, e.route, e.symbol, e.stream) for e in engine.ledger} == {
        ("drop", "lost", "market", "ETHUSDT", "aggTrade")
    }
    assert engine.status()["counts"] == {"drop": {"lost": len(lost)}}


def test_without_a_duration_the_next_frame_alone() -> None:
    engine = engine_of("drop@4s:symbol=ETHUSDT,stream=depth@100ms")
    first = within(4_000, LENGTH_MS, symbol="ETHUSDT", kind="depth")[0]
    assert [frame for _, frame in run(engine)] == [frame for frame in market() if frame is not first]
    assert only(engine)[-2:] == ids(first)


def test_a_chance_takes_about_its_share() -> None:
    engine = engine_of("drop@0s+10s:value=0.3")
    run(engine)
    assert len(engine.ledger) / len(market()) == pytest.approx(0.3, abs=0.05)


def test_a_fault_that_met_no_frame_is_told() -> None:
    engine = engine_of("drop@1s:symbol=NOPE")
    run(engine)
    assert engine.status()["unmet"] == ["drop@1s:symbol=NOPE"]
    assert engine.idle


def test_duplicate() -> None:
    engine = engine_of("duplicate@4s+1s:symbol=BTCUSDT")
    twice = within(4_000, 5_000, symbol="BTCUSDT")
    expected = [each for frame in market() for each in ([frame, frame] if frame in twice else [frame])]
    assert [frame for _, frame in run(engine)] == expected
    assert [(e.first_id, e.last_id) for e in engine.ledger] == [ids(frame) for frame in twice]


def test_reorder() -> None:
    engine = engine_of("reorder@4s+2s:symbol=BTCUSDT,value=500")
    delivered = run(engine, step_ms=1)
    assert sorted(frame for _, frame in delivered) == sorted(market()), "nothing is lost"
    assert [frame for _, frame in delivered] != list(market())
    late = {(e.stream, e.first_id): e.due_ms for e in engine.ledger}
    for at_ms, frame in delivered:
        name = parse_stream(frame.stream)
        due_ms = late.get((name.stream, ids(frame)[0]), frame.at_ms) if name.symbol == "BTCUSDT" else frame.at_ms
        assert at_ms == max(due_ms, 1), "what the ledger says, and no more"
    assert all(e.effect == "delayed" and 0 < e.due_ms - e.at_ms <= 500 for e in engine.ledger)
    quotes = [frame.at_ms for _, frame in delivered if frame.stream == "btcusdt@bookTicker"]
    assert quotes != sorted(quotes)


@pytest.mark.parametrize("kind", ["truncate", "garbage", "oversize"])
def test_frames_that_are_spoilt(kind: str) -> None:
    engine = engine_of(f"{kind}@4s+100ms:symbol=BTCUSDT")
    hit = within(4_000, 4_100, symbol="BTCUSDT")
    assert hit
    delivered = [frame for _, frame in run(engine)]
    changed = [(a, b) for a, b in zip(market(), delivered, strict=True) if a != b]
    assert [a for a, _ in changed] == hit
    assert [(e.effect, e.first_id) for e in engine.ledger] == [("spoilt", ids(frame)[0]) for frame in hit]
    for before, after in changed:
        if kind == "oversize":
            assert len(after.payload) > 8 << 20
        else:
            with pytest.raises(UNDECODABLE):
                DECODERS[parse_stream(before.stream).kind](after.payload)
        if kind == "garbage":
            after.payload.decode()


def test_all_garbage_is_recognised_and_blowing_up_is_bounded() -> None:
    engine = engine_of("garbage@0s+10s")
    for before, (_, after) in zip(market(), run(engine), strict=True):
        kind = parse_stream(before.stream).kind
        assert route_of_parsed(after.payload).kind in ("garbage", kind), "some look like a frame from outside"
        with pytest.raises(UNDECODABLE):
            DECODERS[kind](after.payload)
    engine = engine_of("oversize@0s+10s")
    run(engine)
    assert engine.status()["counts"] == {"oversize": {"spoilt": faults.OVERSIZE_MOST}}


def test_unknown_enum_leaves_the_numbers() -> None:
    engine = engine_of("unknown_enum@4s+1s")
    for before, (_, after) in zip(market(), run(engine), strict=True):
        decode = DECODERS[parse_stream(before.stream).kind]
        real, altered = decode(before.payload).data, decode(after.payload).data
        assert msgspec.structs.replace(altered, market=real.market) == real
        assert ("zz" in data(after.payload)) is (4_000 <= before.at_ms < 5_000)
        assert (data(after.payload)["st"] != 1) is (4_000 <= before.at_ms < 5_000)
    assert {e.effect for e in engine.ledger} == {"altered"}


@pytest.mark.parametrize(("kind", "said"), [("zero_price_trade", "NA"), ("insurance_trade", "INSURANCE_FUND")])
def test_trades_that_are_none_come_behind_the_trade_whose_id_they_have(kind: str, said: str) -> None:
    engine = engine_of(f"{kind}@4s+3s:symbol=BTCUSDT")
    delivered = [frame for _, frame in run(engine)]
    hit = within(4_000, 7_000, symbol="BTCUSDT", kind="aggTrade")
    assert hit and len(delivered) == len(market()) + len(hit)
    added = [(delivered[at - 1], frame) for at, frame in enumerate(delivered) if b'"X":' in frame.payload]
    assert [before for before, _ in added] == hit
    for before, frame in added:
        real, extra = decode_agg_trade(before.payload).data, decode_agg_trade(frame.payload).data
        assert (extra.agg_trade_id, extra.kind) == (real.agg_trade_id, said)
        assert (extra.price, extra.qty) == ((0.0, 0.0) if said == "NA" else (real.price, real.qty))
    assert {e.effect for e in engine.ledger} == {"added"}


def book_after(delivered: Iterable[Frame], stream: str) -> tuple[list[bool], dict[str, float], dict[str, float]]:
    """Whether the book that the diffs alone make is crossed after each, and its sides."""
    sides: tuple[dict[str, float], dict[str, float]] = ({}, {})
    crossed = []
    for frame in delivered:
        if frame.stream != stream:
            continue
        levels = data(frame.payload)
        for side, changes in zip(sides, (levels["b"], levels["a"]), strict=True):
            for price, qty in changes:
                side[price] = float(qty)
        bids, asks = ([float(price) for price, qty in side.items() if qty] for side in sides)
        crossed.append(bool(bids and asks) and max(bids) >= min(asks))
    return crossed, *sides


def test_crossed_book_is_crossed_once_and_true_again() -> None:
    engine = engine_of("crossed_book@4s:symbol=BTCUSDT")
    stream = "btcusdt@depth@100ms"
    delivered = [frame for _, frame in run(engine)]
    true_crossed, *true_sides = book_after(market(), stream)
    crossed, *sides = book_after(delivered, stream)
    assert not any(true_crossed) and sum(crossed) == 1
    for side, true in zip(sides, true_sides, strict=True):
        assert {p: q for p, q in side.items() if q} == {p: q for p, q in true.items() if q}
    changed = [ids(a) for a, b in zip(market(), delivered, strict=True) if a != b]
    assert [(e.first_id, e.last_id) for e in engine.ledger] == changed
    assert {e.effect for e in engine.ledger} == {"altered"}


def test_a_crossing_bid_yields_to_the_truth() -> None:
    diff = (
        b'{"stream":"x@depth@100ms","data":{"U":1,"u":2,"pu":0,"b":[["5.0","3"]],"a":[["5.1","0"],["5.2","1"]],"st":1}}'
    )
    assert damage.crossing_price(diff) == "5.2"
    assert data(damage.with_bid(diff, "5.2", "1"))["b"] == [["5.2", "1"], ["5.0", "3"]]
    assert damage.with_bid(diff, "5.00", "0") == diff, "the diff itself says what is there"
    empty = diff.replace(b'[["5.0","3"]]', b"[]")
    assert data(damage.with_bid(empty, "5.2", "0"))["b"] == [["5.2", "0"]]
    assert damage.crossing_price(diff.replace(b'["5.2","1"]', b'["5.2","0"]')) is None


def test_diff_gap_breaks_the_chain_of_each_symbol() -> None:
    engine = engine_of("diff_gap@4s:value=2")
    delivered = [frame for _, frame in run(engine)]
    lost = [within(4_000, LENGTH_MS, symbol=symbol, kind="depth")[:2] for symbol in SYMBOLS]
    expected = sorted(frame for each in lost for frame in each)
    assert sorted(set(market()) - set(delivered)) == expected
    for symbol in SYMBOLS:
        chain = [data(f.payload) for f in delivered if f.stream == f"{symbol.lower()}@depth@100ms"]
        assert sum(b["pu"] != a["u"] for a, b in pairwise(chain)) == 1


def test_stall_holds_a_route_and_lets_it_go_at_once() -> None:
    engine = engine_of("stall_route@4s+3s:route=public")
    delivered = run(engine, step_ms=1)
    assert Counter(frame for _, frame in delivered) == Counter(market())
    for at_ms, frame in delivered:
        stalled = frame.route == "public" and 4_000 <= frame.at_ms < 7_000
        assert at_ms == (7_000 if stalled else max(1, frame.at_ms))
    public = [frame for _, frame in delivered if frame.route == "public"]
    assert public == [frame for frame in market() if frame.route == "public"], "in order"


def test_skew_delays_a_route_and_keeps_its_order() -> None:
    engine = engine_of("skew@4s+2s:route=market,value=1500")
    delivered = run(engine, step_ms=1)
    trades = [(at_ms, frame) for at_ms, frame in delivered if frame.route == "market"]
    assert [frame for _, frame in trades] == [frame for frame in market() if frame.route == "market"]
    last_ms = 0
    for at_ms, frame in trades:
        due_ms = frame.at_ms + (1_500 if 4_000 <= frame.at_ms < 6_000 else 0)
        last_ms = max(due_ms, last_ms, 1)
        assert at_ms == last_ms, "late, and behind what is later still"
    assert all(at_ms == max(1, frame.at_ms) for at_ms, frame in delivered if frame.route == "public")


def test_silence_lasts_or_ends_with_a_new_subscription() -> None:
    for value, ends_ms in ((0, 8_000), (1, 5_000)):
        engine = engine_of(f"silent_stream@4s+4s:symbol=BTCUSDT,stream=bookTicker,value={value}")
        before = engine.frames(4_999, [frame for frame in market() if frame.at_ms < 5_000])
        engine.subscribed(5_000, "public", ["ethusdt@bookTicker", "btcusdt@bookTicker"])
        after = engine.frames(LENGTH_MS, [frame for frame in market() if frame.at_ms >= 5_000])
        silent = within(4_000, ends_ms, symbol="BTCUSDT", kind="bookTicker")
        assert silent
        assert before + after == [frame for frame in market() if frame not in silent]
        assert len(engine.ledger) == len(silent)


def test_clock_jump_moves_e_and_server_time_and_nothing_else() -> None:
    engine = engine_of("clock_jump@4s+2s:value=-3000")
    for before, (_, after) in zip(market(), run(engine), strict=True):
        shift = -3_000 if 4_000 <= before.at_ms < 6_000 else 0
        wanted = data(before.payload)
        assert data(after.payload) == {**wanted, "E": wanted["E"] + shift}
    engine = engine_of("clock_jump@4s+2s:value=-3000;local_clock_jump@5s+2s:value=70")
    times = (0, 3_999, 4_000, 5_500, 6_000, 7_000)
    assert [engine.clock_shift_ms(now) for now in times] == [0, 0, -3_000, -3_000, 0, 0]
    engine = engine_of("clock_jump@4s+2s:value=-3000;local_clock_jump@5s+2s:value=70")
    assert [engine.local_shift_ms(now) for now in times] == [0, 0, 0, 70, 70, 0]


def test_several_faults_on_one_frame() -> None:
    text = "stall_route@4s+1s;duplicate@4s+1s;clock_jump@4s+1s:value=7;zero_price_trade@4s+1s;drop@4s+1s:symbol=ETHUSDT"
    engine = engine_of(text)
    delivered = run(engine)
    trade = within(4_000, 5_000, symbol="BTCUSDT", kind="aggTrade")[0]
    same = [(at, data(f.payload)) for at, f in delivered if f.stream == trade.stream and ids(f) == ids(trade)]
    assert [(at, each.get("X")) for at, each in same] == [(5_000, None), (5_000, None), (5_000, "NA")]
    assert {each["E"] for _, each in same} == {data(trade.payload)["E"] + 7}
    effects = [e.effect for e in engine.ledger if e.symbol == "BTCUSDT" and e.first_id == ids(trade)[0]]
    assert effects == ["altered", "doubled", "added", "delayed"]
    assert {e.effect for e in engine.ledger if e.symbol == "ETHUSDT"} == {"lost"}, "what is lost is nothing else"


def test_symbols_beyond_letters() -> None:
    sent = [Frame("public", f"{name}@bookTicker", b"{}", 10) for name in ("btcusdt_261225", "币安usdt", "btcusdt")]
    for symbol, hit in (("BTCUSDT_261225", 0), ("币安USDT", 1), ("BTCUSDT", 2)):
        engine = engine_of(f"drop@0s+1s:symbol={symbol}")
        assert engine.frames(10, sent) == [frame for at, frame in enumerate(sent) if at != hit]
        assert only(engine).symbol == symbol


def test_what_is_held_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(faults, "HELD_MOST", 10)
    monkeypatch.setattr(faults, "LEDGER_MOST", 20)
    engine = engine_of("stall_route@0s+9s")
    sent = within(0, 5_000)
    assert len(engine.frames(5_000, sent)) == len(sent) - 10
    status = engine.status()
    assert (status["held"], status["not_held"]) == (10, len(sent) - 10)
    assert (status["ledger"], status["unrecorded"]) == (20, len(sent) - 20)
    assert engine.next_due_ms() == 9_000
    assert engine.flush() == sent[:10]


# Determinism, and the ledger against what really happened


def many(seed: int, kinds: Sequence[str] = DRAWN_KINDS) -> FaultPlan:
    return FaultPlan.draw(seed, LENGTH_MS, SYMBOLS, kinds=kinds, mean_gap_ms=400, quiet_end_ms=0)


def delivered_in_cuts(plan: FaultPlan, cuts: Iterable[int]) -> tuple[list[Frame], tuple[LedgerEntry, ...]]:
    engine = FaultEngine(plan)
    out: list[Frame] = []
    begin = 0
    for cut in sorted({*cuts, LENGTH_MS}):
        end = begin
        while end < len(market()) and market()[end].at_ms <= cut:
            end += 1
        out += engine.frames(cut, market()[begin:end])
        begin = end
    return out + engine.flush(), tuple(engine.ledger)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**9), st.lists(st.integers(0, LENGTH_MS), max_size=200))
def test_however_time_is_cut_the_deliveries_are_the_same(seed: int, cuts: list[int]) -> None:
    plan = many(seed, tuple(kind for kind in FRAME_KINDS if kind != "oversize"))
    assert delivered_in_cuts(plan, cuts) == delivered_in_cuts(plan, range(0, LENGTH_MS, 7))


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**9))
def test_the_ledger_accounts_for_every_frame(seed: int) -> None:
    plan = many(seed, tuple(kind for kind in FRAME_KINDS if kind not in ("oversize", "garbage", "truncate")))
    delivered, ledger = delivered_in_cuts(plan, range(0, LENGTH_MS, 5))

    def key(frame: Frame) -> tuple[str, str, int | None]:
        name = parse_stream(frame.stream)
        return name.symbol or "", name.stream, ids(frame)[0]

    expected = Counter(map(key, market()))
    for entry in ledger:
        if entry.effect == "lost":
            expected[entry.symbol, entry.stream, entry.first_id] = 0
        elif entry.effect in ("doubled", "added"):
            expected[entry.symbol, entry.stream, entry.first_id] += 1
    assert Counter(map(key, delivered)) == +expected
    originals = {key(frame): frame.payload for frame in market()}
    altered = {(e.symbol, e.stream, e.first_id) for e in ledger if e.effect in ("altered", "added")}
    assert all(frame.payload == originals[key(frame)] for frame in delivered if key(frame) not in altered)


def test_the_same_bytes_in_another_process_with_another_hash_seed() -> None:
    code = (
        "import sys; sys.path.insert(0, 'tests/unit'); import hashlib, test_sim_faults as t;"
        "d, l = t.delivered_in_cuts(t.many(11), range(0, 10_000, 3));"
        "print(len(l), hashlib.sha256(repr((d, l)).encode()).hexdigest())"
    )
    printed = {
        subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            check=True,
            text=True,
            timeout=300,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(printed) == 1 and int(printed.pop().split()[0]) > 50


# Connections, requests


def test_socket_orders_come_once_in_their_time() -> None:
    engine = engine_of("close_1006@2s:route=market;half_open@1s;server_ping@2s:value=300;life_cut@9s;close_1008@2s")
    assert engine.next_due_ms() == 1_000
    assert engine.sockets(999) == []
    assert [(o.kind, o.route) for o in engine.sockets(1_000)] == [("half_open", "")]
    due = engine.sockets(8_000)
    assert [(o.kind, o.at_ms, o.route, o.value) for o in due] == [
        ("close_1006", 2_000, "market", 1.0),
        ("server_ping", 2_000, "", 300.0),
        ("close_1008", 2_000, "", 1.0),
    ]
    engine.acted(8_000, due[0], "market", 2)
    assert [(e.kind, e.effect, e.at_ms, e.route) for e in engine.ledger] == [
        ("close_1006", "closed", 8_000, "market")
    ] * 2
    assert [o.kind for o in engine.sockets(9_000)] == ["life_cut"]
    assert engine.idle


def test_windows_on_connections() -> None:
    text = "refuse_connect@1s+1s:route=public,value=502;half_open@3s+1s:route=market;mute_pongs@5s+1s;refuse_connect@6s+1s:value=0"
    engine = engine_of(text)
    seen = []
    for now_ms in range(500, 8_000, 1_000):
        for route in ("public", "market"):
            seen.append((engine.refusal(now_ms, route), engine.deaf(now_ms, route), engine.mutes_pong(now_ms, route)))
    nothing: tuple[int | None, bool, bool] = (None, False, False)
    expected = [nothing] * 16
    expected[2] = (502, False, False)
    expected[7] = (None, True, False)
    expected[10] = expected[11] = (None, False, True)
    expected[12] = expected[13] = (0, False, False)
    assert seen == expected
    assert Counter(e.effect for e in engine.ledger) == {"refused": 3, "deaf": 1, "muted": 2}


def test_requests() -> None:
    text = (
        "rest_503@1s+1s:stream=depth,symbol=BTCUSDT,value=2;rest_418@3s+1s;slow_snapshot@5s+1s:value=700;"
        "rest_timeout@7s+1s:stream=time;stale_snapshot@9s+1s:value=4000,symbol=ETHUSDT"
    )
    engine = engine_of(text)
    depth, query = "/fapi/v1/depth", {"symbol": "BTCUSDT"}
    assert engine.rest(500, depth, query) is None
    assert engine.rest(1_500, depth, {"symbol": "ETHUSDT"}) is None
    assert engine.rest(1_500, "/fapi/v1/aggTrades", query) is None
    assert engine.rest(1_500, depth, query) == ("rest_503", 2.0, 2_000, b"")
    assert engine.rest(3_500, "/fapi/v1/ping", {}) == ("rest_418", 1.0, 4_000, b"")
    assert engine.books_to_keep(4_999) == []
    assert engine.rest(5_500, "/fapi/v1/aggTrades", query) is None
    assert engine.books_to_keep(5_500) == [(4, "ETHUSDT")]
    engine.keep_book(4, "ETHUSDT", b"old")
    assert engine.rest(5_500, depth, query) == ("slow_snapshot", 700.0, 6_000, b"")
    assert engine.rest(7_500, "/fapi/v1/time", {}) == ("rest_timeout", 1.0, 8_000, b"")
    assert engine.rest(9_500, depth, query) is None, "not of this symbol"
    assert engine.rest(9_500, depth, {"symbol": "ETHUSDT"}) == ("stale_snapshot", 4_000.0, 10_000, b"old")
    assert engine.rest(10_000, depth, {"symbol": "ETHUSDT"}) is None
    assert [(e.kind, e.effect, e.due_ms - e.at_ms, e.stream) for e in engine.ledger] == [
        ("rest_503", "answered", 0, "depth"),
        ("rest_418", "answered", 0, "ping"),
        ("slow_snapshot", "delayed", 700, "depth"),
        ("rest_timeout", "answered", 500, "time"),
        ("stale_snapshot", "answered", 0, "depth"),
    ]
    assert engine.idle


def test_faults_that_are_added_count_from_now(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = FaultEngine(FaultPlan(5))
    engine.frames(3_000, within(0, 3_000))
    engine.add(3_000, [Fault("drop", 500, 1_000), Fault("close_1006", 0)])
    assert not engine.idle
    assert engine.plan == FaultPlan(5, (Fault("drop", 3_500, 1_000), Fault("close_1006", 3_000)))
    assert [order.kind for order in engine.sockets(3_000)] == ["close_1006"]
    assert engine.frames(LENGTH_MS, within(3_000, LENGTH_MS)) == within(3_000, 3_500) + within(4_500, LENGTH_MS)
    with pytest.raises(ConfigError, match="both must be from 0"):
        engine.add(LENGTH_MS, [Fault("drop", 366 * 86_400_000)])
    monkeypatch.setattr(faults, "FAULTS_MOST", 2)
    with pytest.raises(ConfigError, match="3 faults are too many"):
        engine.add(LENGTH_MS, [Fault("drop", 0)])
    assert len(engine.plan.faults) == 2


def test_time_never_goes_back() -> None:
    engine = engine_of("rest_503@1s+1s;close_1006@3s")
    assert engine.rest(1_500, "/fapi/v1/ping", {}) is not None
    assert engine.rest(500, "/fapi/v1/ping", {}) is not None, "an earlier time is the latest"
    assert len(engine.sockets(3_000)) == 1
    assert engine.rest(1_500, "/fapi/v1/ping", {}) is None


def test_the_status_is_json() -> None:
    engine = engine_of("stall_route@1s+5s;rest_503@1s+5s;mute_pongs@9s+1s")
    engine.frames(2_000, within(0, 2_000))
    status = json.loads(msgspec.json.encode(engine.status()))
    assert status["active"] == ["rest_503@1s+5s", "stall_route@1s+5s"]
    assert status["counts"] == {"stall_route": {"delayed": len(within(1_000, 2_000))}}
