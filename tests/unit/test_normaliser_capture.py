"""The normaliser over the recorded market data: counts, the oracle, totals, restarts, damage."""

from __future__ import annotations

import json
import random
from bisect import bisect_right
from collections import Counter, defaultdict
from decimal import Decimal
from functools import lru_cache
from io import BytesIO
from typing import Any

import fastavro
import pytest
import venue_journal as vj
from hypothesis import given, settings
from hypothesis import strategies as st
from orderflow.paths import SCHEMAS
from orderflow.processor import Emit, Record
from orderflow.venues.binance.normaliser import REJECT_REASONS, NormaliserConfig, NormaliserProcessor

pytestmark = pytest.mark.capture

COUNTS = {
    vj.BTC_ETH: {
        ("BTCUSDT", "bookTicker"): 52_260,
        ("ETHUSDT", "bookTicker"): 47_328,
        ("BTCUSDT", "aggTrade"): 4_393,
        ("ETHUSDT", "aggTrade"): 4_469,
        ("BTCUSDT", "depth"): 4_773,
        ("ETHUSDT", "depth"): 4_770,
    },
    vj.ALTS: {
        ("SUSHIUSDT", "bookTicker"): 305,
        ("AKROUSDT", "bookTicker"): 88,
        ("KEEPUSDT", "bookTicker"): 75,
        ("CTKUSDT", "bookTicker"): 145,
        ("SUSHIUSDT", "aggTrade"): 40,
        ("AKROUSDT", "aggTrade"): 8,
        ("KEEPUSDT", "aggTrade"): 5,
        ("CTKUSDT", "aggTrade"): 38,
        ("SUSHIUSDT", "depth"): 252,
        ("AKROUSDT", "depth"): 188,
        ("KEEPUSDT", "depth"): 132,
        ("CTKUSDT", "depth"): 180,
    },
}
ORACLE = {
    vj.BTC_ETH: {"BTCUSDT": 4_773, "ETHUSDT": 4_770},
    vj.ALTS: {"SUSHIUSDT": 252, "AKROUSDT": 182, "KEEPUSDT": 130, "CTKUSDT": 180},
}

SCHEMA_FILES = {
    "market.rows": "row",
    "market.ticks": "tick",
    "market.events": "market_event",
    "quality.rejects": "reject",
}
PARSED = {
    topic: fastavro.parse_schema(json.loads((SCHEMAS / f"{name}.avsc").read_text()))
    for topic, name in SCHEMA_FILES.items()
}


def _encode(topic: str, value: Record) -> None:
    """Write a value as the runtime does. Raises where a field is missing, or does not fit its type."""
    fastavro.schemaless_writer(BytesIO(), PARSED[topic], {**value, "seq": 1, "sub": 0}, strict=True)


@pytest.fixture(scope="module", autouse=True)
def _captures() -> None:
    vj.need_captures()


@pytest.fixture(scope="module", params=[vj.BTC_ETH, vj.ALTS])
def capture(request: pytest.FixtureRequest) -> tuple[str, list[Emit]]:
    """A capture's name and everything that comes of it."""
    return request.param, [emit for _, emit in vj.run(vj.capture_journal(request.param))]


def test_every_frame_gives_its_row_and_nothing_is_refused(capture: tuple[str, list[Emit]]) -> None:
    name, emits = capture
    rows = vj.of(emits, "market.rows")
    assert Counter((row["symbol"], row["src"]) for row in rows) == COUNTS[name]
    assert vj.of(emits, "quality.rejects") == []
    assert {row["gap_count"] for row in rows} == {0}
    allowed = {"snapshot_needed", "book_synced", "unused_frames", "dropped"}
    assert {event["event_type"] for event in vj.events(emits)} <= allowed
    for event in vj.events(emits, "dropped"):
        assert set(event["meta"]) == {"pruned_levels"}


def test_the_live_oracle_holds_every_diff_against_its_quote(capture: tuple[str, list[Emit]]) -> None:
    """In the recorded order, where many diffs come before their quotes, it comes to the same count as afterwards."""
    processor = NormaliserProcessor(NormaliserConfig())
    vj.run(vj.capture_journal(capture[0]), processor)
    depth_rows = {key[0]: count for key, count in COUNTS[capture[0]].items() if key[1] == "depth"}
    for each in processor.symbol_figures():
        assert (each.oracle_checked, each.oracle_failed) == (ORACLE[capture[0]][each.symbol], 0)
        assert each.oracle_checked + each.oracle_skipped == depth_rows[each.symbol]
        assert (each.oracle_waiting, each.silent, each.book_state) == (0, (), "synced")


@pytest.mark.parametrize("symbol", ["BTCUSDT", "ETHUSDT"])
def test_the_live_oracle_finds_one_wrong_quantity(symbol: str) -> None:
    records = list(vj.capture_journal(vj.BTC_ETH)[:8_000])
    before = vj.of([emit for seq, emit in vj.run(records) if seq > 5_000], "market.rows")
    row = next(row for row in before if row["src"] == "depth" and row["symbol"] == symbol)
    place = next(
        number
        for number, record in enumerate(records)
        if record["symbol"] == symbol and f'"u":{row["update_id"]},'.encode() in record["payload"]
    )
    content = json.loads(records[place]["payload"])
    content["data"]["b"].append([str(row["bid"]), str(row["bid_qty"] + 0.001)])
    records[place] = {**records[place], "payload": json.dumps(content, separators=(",", ":")).encode()}
    emits = [emit for _, emit in vj.run(records)]
    first = vj.events(emits, "quote_mismatch")[0]
    assert (first["symbol"], first["meta"]["u"]) == (symbol, row["update_id"])
    assert first["meta"]["book"][:2] == [row["bid"], row["bid_qty"] + 0.001]
    assert first["meta"]["quote"] == [row["bid"], row["bid_qty"], row["ask"], row["ask_qty"]]
    assert {event["symbol"] for event in vj.events(emits, "quote_mismatch")} == {symbol}


def test_oracle(capture: tuple[str, list[Emit]]) -> None:
    """After a diff ending at u the best level is that of the quote with the greatest id not above u."""
    name, emits = capture
    rows = vj.of(emits, "market.rows")
    quotes: dict[str, list[Record]] = defaultdict(list)
    for row in rows:
        if row["src"] == "bookTicker":
            quotes[row["symbol"]].append(row)
    ids = {symbol: [quote["update_id"] for quote in found] for symbol, found in quotes.items()}
    held: Counter[str] = Counter()
    for row in rows:
        if row["src"] != "depth":
            continue
        assert row["book_state"] == "synced"
        place = bisect_right(ids[row["symbol"]], row["update_id"]) - 1
        if place < 0:
            continue
        quote = quotes[row["symbol"]][place]
        for field in ("bid", "bid_qty", "ask", "ask_qty"):
            assert row[field] == quote[field], (row["symbol"], row["update_id"], field)
        held[row["symbol"]] += 1
    assert held == ORACLE[name]


def test_depth_rows_are_ordered_books(capture: tuple[str, list[Emit]]) -> None:
    for row in vj.of(capture[1], "market.rows"):
        if row["src"] != "depth":
            continue
        assert row["bid_px"] == sorted(row["bid_px"], reverse=True)
        assert row["ask_px"] == sorted(row["ask_px"])
        assert 0 < len(row["bid_px"]) == len(row["bid_qtys"]) <= 5
        assert 0 < len(row["ask_px"]) == len(row["ask_qtys"]) <= 5
        assert row["bid_px"][0] < row["ask_px"][0]
        assert min(row["bid_qtys"] + row["ask_qtys"]) > 0


def test_totals_by_side_are_exact() -> None:
    reference = vj.CAPTURES.parent / "reference" / "totals.json"
    if not reference.is_file():
        pytest.skip(f"no reference numbers at {reference}")
    expected = {entry["set"].partition("_")[0].upper(): entry for entry in json.loads(reference.read_text())}
    sums: dict[tuple[str, str], Decimal] = defaultdict(Decimal)
    for _, (topic, symbol, row) in vj.run(vj.capture_journal(vj.BTC_ETH)):
        if topic == "market.rows" and row["src"] == "aggTrade":
            assert row["side_source"] == "exchange"
            sums[symbol, row["side"]] += Decimal(repr(row["qty"]))
    assert set(expected) == {"BTCUSDT", "ETHUSDT"}
    for symbol, entry in expected.items():
        buy, sell = sums[symbol, "buy"], sums[symbol, "sell"]
        assert (buy, sell) == (Decimal(repr(entry["buy"])), Decimal(repr(entry["sell"])))
        assert buy - sell == Decimal(repr(entry["cvd"]))


def test_every_value_can_be_encoded(capture: tuple[str, list[Emit]]) -> None:
    for topic, _, value in capture[1]:
        _encode(topic, value)


@lru_cache(maxsize=1)
def _damaged() -> tuple[Record, ...]:
    """The small capture with losses, repetitions and a gap, so that restarts meet every state there is."""
    chance = random.Random(5)
    records: list[Record] = []
    trades: dict[str, list[Record]] = defaultdict(list)
    for record in vj.capture_journal(vj.ALTS):
        is_trade = record["kind"] == "frame" and b"@aggTrade" in record["payload"][:60]
        roll = chance.random()
        if record["kind"] == "frame" and roll < 0.02:
            if is_trade:
                trades[record["symbol"]].append(record)
            continue
        if is_trade and roll < 0.15:
            trades[record["symbol"]].append(record)
            continue
        records.append(record)
        if roll > 0.97 and record["kind"] == "frame":
            records.append(record)
        if roll > 0.99 and trades:
            symbol = min(trades)
            data = [json.loads(lost["payload"])["data"] for lost in trades.pop(symbol)]
            body = json.dumps([{key: each[key] for key in "apqflTm"} for each in data]).encode()
            records.append(
                vj.journal_record(0, "backfill", body, recv_ts_ns=record["recv_ts_ns"], route="rest", symbol=symbol)
            )
        if len(records) == 800:
            records.append(vj.journal_record(0, "gap", {"reason": "restart"}, recv_ts_ns=record["recv_ts_ns"]))
            snapshots = [each for each in records if each["kind"] == "snapshot"]
            records.extend({**each, "payload": _later(each["payload"], records)} for each in snapshots)
    return tuple({**record, "seq": seq} for seq, record in enumerate(records, 1))


def _later(body: bytes, records: list[Record]) -> bytes:
    """A snapshot as of the newest diff of its symbol."""
    content = json.loads(body)
    for record in reversed(records):
        if record["symbol"] == content["symbol"] and b"@depth" in record["payload"][:60]:
            content["lastUpdateId"] = json.loads(record["payload"])["data"]["u"] + 1
            break
    return json.dumps(content).encode()


def test_damage_meets_every_state() -> None:
    """Guards the tests of restarts below: the damaged capture must hold what they are about."""
    processor = NormaliserProcessor(NormaliserConfig())
    emits = [emit for _, emit in vj.run(_damaged(), processor)]
    kinds = Counter(event["event_type"] for event in vj.events(emits))
    assert {"gap", "snapshot_needed", "backfill_needed", "trades_backfilled", "trades_lost", "duplicates"} <= set(kinds)
    states = {row["book_state"] for row in vj.of(emits, "market.rows")}
    assert states == {"none", "resyncing", "synced"}
    assert {"trade_held", "trade_duplicate", "quote_duplicate", "diff_duplicate"} <= set(processor.totals)


@given(st.lists(st.integers(0, 1700), min_size=1, max_size=4))
@settings(max_examples=25, deadline=None)
def test_restarts_change_nothing(cuts: list[int]) -> None:
    """State saved and restored at any points gives the same records, and the same state in the end."""
    records = _damaged()
    whole, interrupted = NormaliserProcessor(NormaliserConfig()), NormaliserProcessor(NormaliserConfig())
    for number, record in enumerate(records):
        if number in cuts:
            fresh = NormaliserProcessor(NormaliserConfig())
            fresh.restore(interrupted.snapshot())
            assert fresh.snapshot() == interrupted.snapshot()
            interrupted = fresh
        assert interrupted.step("market.journal", record) == whole.step("market.journal", record)
    assert interrupted.snapshot() == whole.snapshot()


def test_restart_in_the_big_capture_changes_nothing() -> None:
    records = vj.capture_journal(vj.BTC_ETH)[:12_000]
    whole = vj.run(records)
    cut = 7_777
    first = NormaliserProcessor(NormaliserConfig())
    head = vj.run(records[:cut], first)
    second = NormaliserProcessor(NormaliserConfig())
    second.restore(first.snapshot())
    assert head + vj.run(records[cut:], second) == whole


def test_symbols_do_not_touch_each_other() -> None:
    """Rows of a symbol are the same whether or not others come in between."""
    records = vj.capture_journal(vj.ALTS)
    together = [emit for _, emit in vj.run(records) if emit[0] == "market.rows"]
    for symbol in ("SUSHIUSDT", "KEEPUSDT"):
        alone = vj.run([record for record in records if record["symbol"] in (None, symbol)])
        assert [emit for _, emit in alone if emit[0] == "market.rows"] == [
            emit for emit in together if emit[1] == symbol
        ]


def _mutate(frame: bytes, chance: random.Random) -> bytes:
    """Damage of many kinds: bits, cuts, doubled parts, other numbers, other types."""
    data = bytearray(frame)
    kind = chance.randrange(7)
    if kind == 0:
        for _ in range(chance.randint(1, 4)):
            data[chance.randrange(len(data))] = chance.randrange(256)
    elif kind == 1:
        del data[chance.randrange(len(data)) :]
    elif kind == 2:
        start = chance.randrange(len(data))
        data[start:start] = data[start : start + chance.randint(1, 30)]
    elif kind == 3:
        start = chance.randrange(len(data))
        del data[start : start + chance.randint(1, 20)]
    elif kind == 4:
        digits = [place for place, byte in enumerate(data) if 48 <= byte <= 57]
        for place in chance.sample(digits, min(len(digits), chance.randint(1, 5))):
            data[place] = chance.randrange(48, 58)
    else:
        content: Any = json.loads(frame)
        fields = content["data"]
        name = chance.choice(sorted(fields))
        values = [None, -1, 0, "", "nan", "-inf", "1e999", [], {}, True, 2**63, -(2**70), 1e308, "0", "\u0000", "7"]
        fields[name] = chance.choice(values)
        if kind == 6:
            del fields[chance.choice(sorted(fields))]
        return json.dumps(content, separators=(",", ":")).encode()
    return bytes(data)


def test_damaged_frames_never_break_it_and_are_all_accounted_for() -> None:
    """20,000 damaged frames among sound ones: each gives rows, or a reject, or exactly one count."""
    chance = random.Random(20_240_718)
    frames = [record for record in vj.capture_journal(vj.ALTS) if record["kind"] != "tick"]
    damaged = 0
    reasons: Counter[str] = Counter()
    while damaged < 20_000:
        processor = NormaliserProcessor(NormaliserConfig())
        for record in frames:
            if record["kind"] == "frame" and chance.random() < 0.9:
                record = {**record, "payload": _mutate(record["payload"], chance)}
                damaged += 1
            counted = sum(processor.totals.values())
            emits = processor.step("market.journal", record)
            if record["kind"] == "frame" and not {"market.rows", "quality.rejects"} & {emit[0] for emit in emits}:
                assert sum(processor.totals.values()) == counted + 1, record["payload"]
            for topic, _, value in emits:
                if topic == "quality.rejects":
                    reasons[value["reason"]] += 1
                    assert value["payload"] == record["payload"] or value["reason"] == "ts_regression"
                _encode(topic, value)
        other = NormaliserProcessor(NormaliserConfig())
        other.restore(processor.snapshot())
        assert other.snapshot() == processor.snapshot()
    assert set(reasons) <= set(REJECT_REASONS)
    assert len(reasons) >= 12, reasons
