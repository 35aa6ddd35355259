"""The normaliser, frame by frame: what becomes a row, what is refused, what is asked for."""

from __future__ import annotations

import json
from typing import Any

import fastavro
import pytest
from orderflow.paths import SCHEMAS
from orderflow.processor import Emit
from orderflow.venues.binance.normaliser import REJECT_REASONS, NormaliserConfig, NormaliserProcessor
from venue_journal import Feed, events, journal_record, of, reasons

SCHEMA_OF = {"market.rows": "row", "market.ticks": "tick", "market.events": "market_event", "quality.rejects": "reject"}
PARSED = {
    topic: fastavro.parse_schema(json.loads((SCHEMAS / f"{name}.avsc").read_text()))
    for topic, name in SCHEMA_OF.items()
}


def rows(emits: list[Emit]) -> list[dict[str, Any]]:
    return of(emits, "market.rows")


def fits_schema(emits: list[Emit]) -> None:
    """Every value has exactly the fields of its schema but for those that the runtime puts in."""
    for topic, key, value in emits:
        schema = PARSED[topic]
        assert set(value) == {field["name"] for field in schema["fields"]} - {"seq", "sub"}, topic
        fastavro.validate({**value, "seq": 1, "sub": 0}, schema, raise_errors=True)
        assert key == (value.get("symbol") or "")


# -- rows -----------------------------------------------------------------------------------------------------------


def test_quote_row() -> None:
    feed = Feed()
    (row,) = rows(feed.quote(7, "99.90", "100.10"))
    assert (row["src"], row["symbol"], row["update_id"]) == ("bookTicker", "BTCUSDT", 7)
    assert (row["bid"], row["bid_qty"], row["ask"], row["ask_qty"]) == (99.9, 2.0, 100.1, 3.0)
    assert row["best_spread_bps"] == pytest.approx(20.0)
    assert (row["ts_ms"], row["event_ts_ms"], row["recv_ts_ms"]) == (
        feed.now_ms - 10,
        feed.now_ms - 9,
        feed.now_ms,
    )
    assert row["latency_ms"] == 9
    assert (row["book_state"], row["gap_count"], row["meta"]) == ("none", 0, None)
    fits_schema(feed.emits)


@pytest.mark.parametrize(("maker", "side"), [(True, "sell"), (False, "buy")])
def test_trade_row(maker: bool, side: str) -> None:
    feed = Feed()
    (row,) = rows(feed.trade(5, "100.5", "0.25", m=maker))
    assert (row["src"], row["agg_trade_id"], row["price"], row["qty"]) == ("aggTrade", 5, 100.5, 0.25)
    assert (row["side"], row["side_source"]) == (side, "exchange")
    assert (row["bid"], row["ask"], row["bid_px"]) == (None, None, [])
    fits_schema(feed.emits)


def test_side_without_the_flag_comes_from_the_quote_before() -> None:
    feed = Feed()
    feed.quote(1, "99", "101")
    feed.now_ms += 5
    (row,) = rows(feed.trade(5, "101", m=None))
    assert (row["side"], row["side_source"]) == ("buy", "lee_ready")


def test_depth_row_shows_the_top_levels() -> None:
    feed = Feed(top_k=2)
    feed.diff(10, 20, 9)
    feed.snapshot(15, [["99", "1"], ["98", "2"], ["97", "3"]], [["101", "4"], ["102", "5"], ["103", "6"]])
    (row,) = rows(feed.diff(21, 25, 20, [["99.5", "7"]], [["101", "0"]]))
    assert (row["bid_px"], row["bid_qtys"]) == ([99.5, 99.0], [7.0, 1.0])
    assert (row["ask_px"], row["ask_qtys"]) == ([102.0, 103.0], [5.0, 6.0])
    assert (row["bid"], row["bid_qty"], row["ask"], row["ask_qty"]) == (99.5, 7.0, 102.0, 5.0)
    assert (row["update_id"], row["book_state"]) == (25, "synced")
    fits_schema(feed.emits)


def test_depth_row_of_a_book_with_one_side() -> None:
    feed = Feed()
    feed.diff(10, 20, 9)
    feed.snapshot(15, [["99", "1"]], [])
    (row,) = rows(feed.diff(21, 25, 20))
    assert (row["bid"], row["ask"], row["best_spread_bps"], row["ask_px"]) == (99.0, None, None, [])
    fits_schema(feed.emits)


def test_latency_above_the_limit_passes_with_a_flag() -> None:
    feed = Feed()
    (row,) = rows(feed.quote(1, E=feed.now_ms - 1500))
    assert (row["latency_ms"], row["meta"]) == (1500, None)
    (row,) = rows(feed.quote(2, E=feed.now_ms - 1501))
    assert json.loads(row["meta"]) == {"stale": True}
    feed.trade(1, E=feed.now_ms - 9000)
    feed.tick()
    (event,) = events(feed.tick(10_000), "stale_rows")
    assert (event["symbol"], event["meta"]) == ("BTCUSDT", {"aggTrade": 1, "bookTicker": 1, "most_ms": 9000})
    assert events(feed.tick(10_000), "stale_rows") == []
    assert feed.processor.tallies["stale_rows"] == {"aggTrade": 1, "bookTicker": 1}
    fits_schema(feed.emits)


def test_send_time_may_be_missing() -> None:
    (row,) = rows(Feed().quote(1, E=None))
    assert (row["event_ts_ms"], row["latency_ms"], row["meta"]) == (None, None, None)


def test_unknown_fields_and_kinds_are_taken() -> None:
    feed = Feed()
    assert rows(feed.quote(1, zz={"new": [1]}))
    assert rows(feed.trade(1, X="SOMETHING_NEW", nq="0.1"))
    assert rows(feed.trade(2, X="MARKET", st=2))
    assert events(feed.emits) == []


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (97, "97"),
        ("97", "97"),
        ("x" * 99, "x" * 40),
        (2**90, "int"),
        ([[1]], "list"),
        ({"a": 1}, "dict"),
        (None, "NoneType"),
    ],
)
def test_unknown_values_pass_and_are_told(value: object, shown: str) -> None:
    feed = Feed()
    assert rows(feed.quote(1, st=value))
    assert rows(feed.trade(1, X="SOMETHING_NEW", st=value))
    feed.tick()
    (event,) = events(feed.tick(10_000), "unknown_values")
    assert event["symbol"] == ""
    assert event["meta"] == {"aggTrade.X=SOMETHING_NEW": 1, f"aggTrade.st={shown}": 1, f"bookTicker.st={shown}": 1}
    assert events(feed.tick(10_000), "unknown_values") == []
    assert feed.processor.tallies["unknown_values"] == {"aggTrade.X": 1, "aggTrade.st": 1, "bookTicker.st": 1}


def test_unknown_values_are_bounded() -> None:
    feed = Feed()
    for number in range(200):
        feed.quote(number, st=1000 + number)
    feed.tick()
    (event,) = events(feed.tick(10_000), "unknown_values")
    assert len(event["meta"]) == 100
    assert feed.processor.tallies["unknown_values"] == {"bookTicker.st": 200}


def test_symbols_with_underscore_and_other_alphabets() -> None:
    for symbol in ("BTCUSDT_261225", "币安人生USDT"):
        feed = Feed(symbol)
        assert rows(feed.quote(1))[0]["symbol"] == symbol
        assert rows(feed.quote(2))[0]["symbol"] == symbol
        fits_schema(feed.emits)


def test_frame_of_unusual_form() -> None:
    feed = Feed()
    data = {"e": "aggTrade", "a": 1, "s": "BTCUSDT", "p": 100.5, "q": 2, "T": feed.now_ms, "m": True}
    for payload in (
        json.dumps({"data": data, "stream": "btcusdt@aggTrade"}).encode(),
        b'{"stream":"btcusdt\\u0040aggTrade","data":' + json.dumps({**data, "a": 2}).encode() + b"}",
    ):
        assert rows(feed.step("frame", payload, symbol="BTCUSDT", route="market"))


@pytest.mark.parametrize("symbol", ["BTCUSDT_261225", "币安人生USDT", "1000PEPEUSDT"])
@pytest.mark.parametrize("escaped", [False, True])
def test_every_stream_of_an_odd_symbol(symbol: str, escaped: bool) -> None:
    """The same symbol, book and trades whether its letters come as UTF-8 or as escapes of JSON."""
    feed = Feed(symbol)
    step = feed.step
    if escaped:
        feed.step = lambda kind, payload=b"", **rest: step(  # type: ignore[method-assign]
            kind,
            json.dumps(json.loads(payload), separators=(",", ":")).encode() if kind == "frame" else payload,
            **rest,
        )
    feed.synced()
    feed.quote(21, bid="99.9", B="1", A="1")
    feed.trade(5)
    (row,) = rows(feed.diff(21, 25, 20))
    assert {(each["symbol"], each["src"]) for each in rows(feed.emits)} == {
        (symbol, "bookTicker"),
        (symbol, "aggTrade"),
        (symbol, "depth"),
    }
    assert (row["bid"], row["book_state"]) == (99.9, "synced")
    assert feed.processor.symbols == (symbol,)
    assert of(feed.emits, "quality.rejects") == []
    fits_schema(feed.emits)


def test_times_sent_as_strings_are_times() -> None:
    feed = Feed()
    sent = str(feed.now_ms - 9)
    for emits in (feed.quote(1, E=sent), feed.trade(1, E=sent, T=sent), feed.synced().diff(21, 25, 20, E=sent)):
        (row,) = rows(emits)
        assert (row["event_ts_ms"], row["latency_ms"]) == (feed.now_ms - 9, 9)
    assert reasons(feed.quote(2, E="soon")) == ["bad_field"]


@pytest.mark.parametrize("where", ["inside", "beside", "nowhere"])
def test_a_liquidation_is_the_same_wherever_its_pair_stands(where: str) -> None:
    feed = Feed(force_order=True)
    order = {"s": "BTCUSDT", "S": "BUY", "q": "3", "p": "90", "ap": "0", "X": "NEW_STATUS", "z": "0", "T": feed.now_ms}
    data: dict[str, Any] = {"e": "forceOrder", "E": str(feed.now_ms), "o": order}
    {"inside": order, "beside": data, "nowhere": {}}[where].update({"ps": "BTCUSDT", "st": 1})
    (row,) = rows(feed.frame("forceOrder", data))
    assert (row["price"], row["qty"], row["side"], row["latency_ms"]) == (90.0, 3.0, "buy", 0)
    assert json.loads(row["meta"]) == {"order_price": 90.0, "order_qty": 3.0, "status": "NEW_STATUS"}
    fits_schema(feed.emits)


def test_a_liquidation_of_an_unknown_side_has_none() -> None:
    feed = Feed(force_order=True)
    order = {"s": "BTCUSDT", "S": "HEDGE", "q": "3", "p": "90", "T": feed.now_ms}
    (row,) = rows(feed.frame("forceOrder", {"e": "forceOrder", "E": feed.now_ms, "o": order}))
    assert (row["side"], row["side_source"]) == (None, "none")


def test_a_trade_id_out_of_its_mind_is_recovered_from_and_told() -> None:
    """Ids that run on beyond 64 bits in sum do not stop the state from being saved."""
    feed = Feed()
    feed.tick()
    feed.trade(5)
    for jump in (10**18, 9 * 10**18, 2**63 - 1):
        feed.trade(jump)
        feed.tick(5000)
    feed.now_ms += 2000
    feed.trade(6)
    assert ids(feed.trade(7)) == [7]
    assert events(feed.emits, "trades_lost")[0]["meta"]["trades"] == 10**18 - 6
    assert events(feed.emits, "gap")[-1]["meta"]["reason"] == "trade_ids_went_back"
    feed.processor.restore(feed.processor.snapshot())
    fits_schema(feed.emits)


# -- rejects --------------------------------------------------------------------------------------------------------


def refused(feed: Feed, emits: list[Emit], reason: str) -> None:
    assert rows(emits) == []
    (reject,) = of(emits, "quality.rejects")
    assert reject["reason"] == reason
    assert reason in REJECT_REASONS
    assert reject["detail"]
    assert reject["payload"]
    assert reject["recv_ts_ns"] == feed.now_ms * 1_000_000
    fits_schema(emits)


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"X": "NA"}, "not_a_trade"),
        ({"X": "INSURANCE_FUND"}, "insurance_fund"),
        ({"p": "0"}, "bad_price"),
        ({"p": "-1"}, "bad_price"),
        ({"p": "nan"}, "bad_price"),
        ({"p": "inf"}, "bad_price"),
        ({"p": "1e400"}, "bad_price"),
        ({"p": "abc"}, "bad_price"),
        ({"p": None}, "missing_field"),
        ({"q": "0"}, "bad_qty"),
        ({"q": "-inf"}, "bad_qty"),
        ({"q": True}, "bad_qty"),
        ({"a": "x"}, "bad_field"),
        ({"a": -1}, "bad_field"),
        ({"a": 2**63}, "bad_field"),
        ({"T": 0}, "bad_field"),
        ({"T": 1_700_000_000_000_000}, "bad_field"),
        ({"m": "perhaps"}, "bad_field"),
        ({"s": "ETHUSDT"}, "symbol_mismatch"),
        ({"e": "trade"}, "type_mismatch"),
    ],
)
def test_refused_trades(fields: dict[str, Any], reason: str) -> None:
    feed = Feed()
    feed.trade(1)
    refused(feed, feed.trade(2, **fields), reason)


@pytest.mark.parametrize("field", ["a", "p", "q", "T", "s"])
def test_trade_without_a_field(field: str) -> None:
    feed = Feed()
    data = {"e": "aggTrade", "a": 1, "s": "BTCUSDT", "p": "1", "q": "1", "T": feed.now_ms, "m": True}
    del data[field]
    refused(feed, feed.frame("aggTrade", data), "missing_field")


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"b": "100.1"}, "crossed_quote"),
        ({"b": "100.2"}, "crossed_quote"),
        ({"b": "0.00", "B": "0"}, "bad_price"),
        ({"a": "inf"}, "bad_price"),
        ({"a": "1e999"}, "bad_price"),
        ({"A": "0"}, "bad_qty"),
        ({"B": "x"}, "bad_qty"),
        ({"s": "ETHUSDT"}, "symbol_mismatch"),
    ],
)
def test_refused_quotes(fields: dict[str, Any], reason: str) -> None:
    feed = Feed()
    feed.quote(1)
    refused(feed, feed.quote(2, **fields), reason)
    assert rows(feed.quote(2)), "a refused quote leaves no trace in the state"


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"b": [["nan", "1"]]}, "bad_level"),
        ({"b": [["1"]]}, "bad_level"),
        ({"a": [["1", "-1"]]}, "bad_level"),
        ({"a": [["0", "1"]]}, "bad_level"),
        ({"b": 5}, "bad_field"),
        ({"pu": None}, "missing_field"),
        ({"U": 26}, "bad_ids"),
        ({"e": "bookTicker"}, "type_mismatch"),
    ],
)
def test_refused_diff_leaves_a_gap_behind(fields: dict[str, Any], reason: str) -> None:
    feed = Feed().synced()
    refused(feed, feed.diff(21, 25, 20, **fields), reason)
    (gap,) = events(feed.diff(26, 30, 25), "gap")
    assert gap["meta"]["reason"] == "pu_mismatch"


@pytest.mark.parametrize(
    ("payload", "reason"),
    [
        (b"", "bad_json"),
        (b'{"stream":"btcusdt@aggTrade","data":', "bad_json"),
        (b"\xff\xfe\x00", "bad_json"),
        (b'{"stream":"btcusdt@aggTrade"}', "missing_field"),
        (b'{"e":"aggTrade"}', "missing_stream"),
        (b"[]", "bad_field"),
        (b'{"stream":"btcusdt@somethingNew","data":{}}', "unknown_stream"),
        (b'{"stream":7,"data":{}}', "bad_field"),
    ],
)
def test_garbage(payload: bytes, reason: str) -> None:
    feed = Feed()
    emits = feed.step("frame", payload, route="market")
    assert reasons(emits) == [reason]
    assert of(emits, "quality.rejects")[0]["payload"] == payload
    fits_schema(emits)


def test_unknown_kind_of_record() -> None:
    assert reasons(Feed().step("unknown", b"x")) == ["unknown_kind"]


def test_time_going_back() -> None:
    feed = Feed()
    feed.quote(1)
    newest = feed.now_ms - 10
    assert rows(feed.quote(2, T=newest - 1000))
    refused(feed, feed.quote(3, T=newest - 1001), "ts_regression")
    assert rows(feed.trade(1, T=newest - 5000)), "each stream has a time of its own"
    feed.synced()
    refused(feed, feed.diff(21, 25, 20, T=newest - 1001), "ts_regression")


def test_a_time_ahead_of_both_clocks_is_refused() -> None:
    """It would drive every window of event time on, and refuse what comes after it as regressed."""
    feed = Feed().synced()
    ahead = feed.now_ms + 1001
    refused(feed, feed.quote(31, T=ahead, E=feed.now_ms), "ts_ahead")
    refused(feed, feed.trade(1, T=ahead, E=feed.now_ms), "ts_ahead")
    refused(feed, feed.diff(21, 30, 20, T=ahead, E=feed.now_ms), "ts_ahead")
    assert rows(feed.quote(31)), "and leaves no trace"
    assert rows(feed.quote(32, T=ahead, E=ahead)), "our own clock may be the one that is wrong"
    assert rows(feed.quote(33, T=feed.now_ms + 999, E=feed.now_ms - 86_400_000)), "or that of E"


def test_a_trade_ahead_of_both_clocks_spends_its_id() -> None:
    feed = Feed()
    feed.trade(1)
    feed.trade(2, T=feed.now_ms + 10**9)
    (row,) = rows(feed.trade(3))
    assert row["agg_trade_id"] == 3


def test_a_newest_time_that_was_wrong_does_not_silence_a_stream() -> None:
    feed = Feed()
    feed.quote(1, T=feed.now_ms + 10**9, E=None)
    outcomes = [bool(rows(feed.quote(number))) for number in range(2, 202)]
    assert outcomes == [False] * 99 + [True] * 101


def test_known_streams_that_are_not_used_are_counted() -> None:
    feed = Feed()
    for stream in ("kline_1m", "markPrice@1s", "miniTicker", "depth5@100ms", "depth@500ms", "forceOrder"):
        assert feed.frame(stream, {"e": "kline"}) == []
    assert feed.step("frame", b'{"result":null,"id":1}') == []
    assert feed.processor.totals == {"reply": 1, "unused": 6}
    feed.tick()
    (event,) = events(feed.tick(10_000), "unused_frames")
    assert event["meta"] == {
        "depth": 1,
        "depth5": 1,
        "forceOrder": 1,
        "kline": 1,
        "miniTicker": 1,
    }, "the recorder's heartbeat is no news"
    assert events(feed.tick(10_000), "unused_frames") == []


def test_symbols_are_bounded() -> None:
    feed = Feed(max_symbols=1)
    feed.quote(1)
    feed.symbol = "ETHUSDT"
    for emits in (feed.quote(1), feed.trade(1), feed.diff(1, 2, 0), feed.snapshot(1)):
        assert reasons(emits) == ["too_many_symbols"]


# -- the book -------------------------------------------------------------------------------------------------------


def test_first_diff_asks_for_a_snapshot_once_and_again_on_ticks() -> None:
    feed = Feed()
    feed.tick()
    (event,) = events(feed.diff(10, 20, 9), "snapshot_needed")
    assert event["meta"] == {"why": "first_diff", "want_update_id": 10, "buffered": 1, "asks": 1}
    assert events(feed.diff(21, 30, 20)) == []
    asked = [bool(events(feed.tick(1000), "snapshot_needed")) for _ in range(64)]
    assert [after for after, now in enumerate(asked, 1) if now] == [1, 3, 7, 15, 31, 47, 63], "doubling up to 16 s"
    feed.snapshot(25)
    assert events(feed.tick(5000), "snapshot_needed") == []


def test_no_snapshot_is_asked_for_a_symbol_without_diffs() -> None:
    feed = Feed()
    feed.quote(1)
    feed.trade(1)
    for _ in range(20):
        feed.tick()
    assert events(feed.emits) == []


def test_diffs_before_the_snapshot_give_no_row_those_after_it_do() -> None:
    feed = Feed()
    assert rows(feed.diff(1, 9, 0)) == []
    assert rows(feed.diff(10, 20, 9)) == []
    emits = feed.snapshot(15)
    assert rows(emits) == []
    assert [each["event_type"] for each in events(emits)] == ["book_synced"]
    assert rows(feed.diff(21, 30, 20))


def test_the_bracketing_diff_after_the_snapshot_gives_a_row() -> None:
    feed = Feed()
    feed.diff(1, 9, 0)
    assert events(feed.snapshot(15)) == []
    emits = feed.diff(10, 20, 9)
    assert [each["event_type"] for each in events(emits)] == ["book_synced"]
    assert [row["book_state"] for row in rows(emits)] == ["synced"]


def test_snapshot_older_than_the_diffs_is_asked_for_again() -> None:
    feed = Feed()
    feed.tick()
    feed.diff(110, 120, 109)
    assert events(feed.snapshot(50)) == [], "asked a moment ago"
    (event,) = events(feed.tick(1000), "snapshot_needed")
    assert event["meta"] == {"why": "snapshot_too_old", "want_update_id": 110, "buffered": 1, "asks": 1}
    feed.snapshot(115)
    assert rows(feed.diff(121, 130, 120))


def test_snapshot_whose_bracket_does_not_come_is_given_up() -> None:
    feed = Feed()
    feed.tick()
    feed.diff(110, 120, 109)
    feed.snapshot(500)
    assert events(feed.tick(9000)) == []
    (event,) = events(feed.tick(1000), "snapshot_needed")
    assert event["meta"]["why"] == "bracket_did_not_come"


def test_gap_resyncs_this_symbol_alone() -> None:
    feed = Feed().synced()
    feed.symbol = "ETHUSDT"
    feed.synced()
    feed.symbol = "BTCUSDT"
    emits = feed.diff(31, 40, 30)
    gap, asked = events(emits)
    assert (gap["event_type"], asked["event_type"]) == ("gap", "snapshot_needed")
    assert gap["meta"] == {"reason": "pu_mismatch", "gap_count": 1, "last_u": 20, "pu": 30, "U": 31, "u": 40}
    assert (asked["meta"]["why"], asked["meta"]["want_update_id"]) == ("pu_mismatch", 31)
    (row,) = rows(feed.quote(41))
    assert (row["book_state"], row["gap_count"]) == ("resyncing", 1)
    assert rows(feed.trade(1))[0]["book_state"] == "resyncing"
    feed.symbol = "ETHUSDT"
    (row,) = rows(feed.diff(21, 25, 20))
    assert (row["book_state"], row["gap_count"]) == ("synced", 0)
    feed.symbol = "BTCUSDT"
    feed.snapshot(35)
    (row,) = rows(feed.diff(41, 50, 40))
    assert (row["book_state"], row["gap_count"]) == ("synced", 1)


def test_repeated_diff_is_dropped_and_counted() -> None:
    feed = Feed().synced()
    feed.diff(21, 25, 20)
    assert feed.diff(21, 25, 20) == []
    assert rows(feed.diff(26, 30, 25))
    feed.tick()
    (event,) = events(feed.tick(10_000), "duplicates")
    assert event["meta"] == {"depth": 1}


def test_crossing_diff_is_refused_and_resyncs() -> None:
    feed = Feed().synced()
    emits = feed.diff(21, 25, 20, [["100.1", "1"]])
    assert rows(emits) == []
    assert reasons(emits) == ["crossed_book"]
    assert [each["event_type"] for each in events(emits)] == ["gap", "snapshot_needed"]
    feed.snapshot(25)
    assert rows(feed.diff(26, 30, 25))[0]["gap_count"] == 1


def test_crossed_snapshot_is_refused() -> None:
    feed = Feed()
    feed.tick()
    feed.diff(10, 20, 9)
    assert reasons(feed.snapshot(15, [["101", "1"]], [["100", "1"]])) == ["crossed_book"]
    assert events(feed.tick(1000), "snapshot_needed")[0]["meta"]["why"] == "crossed_book"


def test_bad_snapshots() -> None:
    feed = Feed()
    assert reasons(feed.step("snapshot", b"{", symbol="BTCUSDT")) == ["bad_json"]
    assert reasons(feed.step("snapshot", {"code": -1121, "msg": "x"}, symbol="BTCUSDT")) == ["missing_field"]
    body = {"lastUpdateId": 1, "bids": [["x", "1"]], "asks": []}
    assert reasons(feed.step("snapshot", body, symbol="BTCUSDT")) == ["bad_level"]
    assert reasons(feed.step("snapshot", {**body, "bids": []})) == ["missing_field"]


def test_snapshot_names_its_symbol_where_the_record_does_not() -> None:
    feed = Feed()
    feed.diff(10, 20, 9)
    emits = feed.step("snapshot", {"symbol": "BTCUSDT", "lastUpdateId": 15, "bids": [], "asks": []})
    assert [each["event_type"] for each in events(emits)] == ["book_synced"]


def test_unrequested_snapshot_changes_nothing() -> None:
    feed = Feed().synced()
    assert feed.snapshot(18, [["1", "1"]], [["2", "1"]]) == []
    assert rows(feed.diff(21, 25, 20))[0]["bid"] == 99.9


def test_update_ids_that_begin_anew() -> None:
    feed = Feed().synced()
    feed.now_ms += 2000
    gap, asked = events(feed.diff(2, 5, 1))
    assert (gap["meta"]["reason"], asked["meta"]["why"]) == ("update_ids_went_back", "update_ids_went_back")
    feed.snapshot(3)
    assert rows(feed.diff(6, 8, 5))


def test_book_without_diffs_gets_stale_and_recovers() -> None:
    feed = Feed().synced()
    for _ in range(50):
        assert events(feed.tick(200)) == []
    (event,) = events(feed.tick(200), "book_stale")
    assert event["meta"] == {"why": "no_diffs", "age_ms": 10_200}
    assert rows(feed.quote(21))[0]["book_state"] == "stale"
    emits = feed.diff(22, 25, 20)
    assert [each["event_type"] for each in events(emits)] == ["book_recovered"]
    assert rows(emits)[0]["book_state"] == "synced"


def test_book_is_stale_at_once_when_its_route_is_down() -> None:
    feed = Feed().synced()
    feed.diff(21, 25, 20)
    emits = feed.tick(routes={"public": "down", "market": "up"})
    assert [(each["event_type"], each["symbol"]) for each in events(emits)] == [
        ("route_down", ""),
        ("book_stale", "BTCUSDT"),
    ]
    assert events(feed.tick(routes={"public": "down", "market": "up"})) == []
    assert [each["event_type"] for each in events(feed.tick())] == ["route_up"]
    assert rows(feed.diff(26, 30, 25))[0]["book_state"] == "synced"


def test_only_the_chosen_speed_of_depth_feeds_the_book() -> None:
    feed = Feed(depth_stream="depth")
    assert feed.diff(10, 20, 9) == []
    data = {"e": "depthUpdate", "T": feed.now_ms, "s": "BTCUSDT", "U": 10, "u": 20, "pu": 9, "b": [], "a": []}
    assert events(feed.frame("depth", data), "snapshot_needed")


# -- trades ---------------------------------------------------------------------------------------------------------


def backfill(feed: Feed, *numbers: int, **fields: Any) -> list[Emit]:
    body = [
        {"a": each, "p": "50", "q": "2", "f": each, "l": each, "T": feed.now_ms - 4000, "m": True, **fields}
        for each in numbers
    ]
    return feed.step("backfill", body, symbol=feed.symbol, route="rest")


def ids(emits: list[Emit]) -> list[int]:
    return [row["agg_trade_id"] for row in rows(emits)]


def test_repeated_trade_is_dropped_and_counted() -> None:
    feed = Feed()
    feed.trade(5)
    assert feed.trade(5) == []
    assert feed.trade(4) == []
    assert ids(feed.trade(6)) == [6]
    feed.tick()
    assert events(feed.tick(9000), "duplicates") == []
    (event,) = events(feed.tick(1000), "duplicates")
    assert event["meta"] == {"trades": 2}
    assert events(feed.tick(10_000), "duplicates") == []


def test_missing_trades_are_asked_for_and_filled_in_order() -> None:
    feed = Feed()
    feed.trade(5)
    feed.tick()
    assert feed.trade(8) == [], "a frame that is only late may still come"
    assert events(feed.tick(199), "backfill_needed") == []
    (event,) = events(feed.tick(1), "backfill_needed")
    assert event["meta"] == {"from_id": 6, "to_id": 7, "held": 1}
    assert feed.trade(9) == []
    feed.now_ms += 500
    emits = backfill(feed, 6, 7)
    assert ids(emits) == [6, 7, 8, 9]
    filled = rows(emits)
    assert [json.loads(row["meta"]) for row in filled] == [{"backfill": True}] * 2 + [{"held": True}] * 2
    assert [row["latency_ms"] for row in filled] == [None, None, 5, 5], "latency is that of the frame, not of the wait"
    assert [row["side"] for row in filled] == ["sell", "sell", "buy", "buy"]
    assert [each["event_type"] for each in events(emits)] == ["trades_backfilled"]
    (row,) = rows(feed.trade(10))
    assert (row["agg_trade_id"], row["gap_count"], row["meta"]) == (10, 0, None)
    fits_schema(feed.emits)


def test_request_is_repeated_on_ticks_while_trades_are_missing() -> None:
    feed = Feed()
    feed.tick()
    feed.trade(5)
    feed.trade(8)
    asked = [bool(events(feed.tick(200), "backfill_needed")) for _ in range(20)]
    assert asked == [True, False, False, False, False] * 4


def test_missing_trades_that_do_not_come_are_reported_lost() -> None:
    feed = Feed()
    feed.tick()
    feed.trade(5)
    feed.trade(8)
    feed.trade(11)
    feed.trade(12)
    assert ids(feed.tick(4999)) == []
    emits = feed.tick(1)
    assert ids(emits) == [8, 11, 12]
    (event,) = events(emits, "trades_lost")
    assert event["meta"] == {"ranges": [[6, 7], [9, 10]], "trades": 4, "gap_count": 1}
    assert {row["gap_count"] for row in rows(emits)} == {1}
    assert backfill(feed, 6) == [], "too late"
    assert ids(feed.trade(13)) == [13]
    (event,) = events(feed.tick(10_000), "dropped")
    assert event["meta"] == {"late_trades": 1}
    fits_schema(feed.emits)


def test_a_trade_is_held_no_longer_than_the_limit_whatever_hole_came_first() -> None:
    feed = Feed()
    feed.tick()
    feed.trade(5)
    feed.trade(8)
    feed.tick(3000)
    feed.trade(11)
    assert ids(feed.tick(2000)) == [8]
    assert ids(feed.tick(2999)) == []
    assert ids(feed.tick(1)) == [11]


def test_what_follows_a_given_up_hole_does_not_wait_on() -> None:
    feed = Feed()
    feed.tick()
    feed.trade(5)
    feed.trade(8)
    feed.tick(3000)
    feed.trade(9)
    assert ids(feed.tick(2000)) == [8, 9]
    assert ids(feed.trade(10)) == [10]


def test_partly_filled_hole_asks_for_the_rest_at_once() -> None:
    feed = Feed()
    feed.tick()
    feed.trade(5)
    feed.trade(10)
    emits = backfill(feed, 6, 7)
    assert ids(emits) == [6, 7]
    (event,) = events(emits, "backfill_needed")
    assert event["meta"] == {"from_id": 8, "to_id": 9, "held": 1}


def test_late_frame_fills_the_hole_itself() -> None:
    feed = Feed()
    feed.trade(5)
    feed.now_ms += 3000
    feed.trade(7)
    assert ids(feed.trade(6, T=feed.now_ms - 3010)) == [6, 7], "by id T has not gone back"


def test_backfill_beyond_what_is_missing_is_left_to_the_socket() -> None:
    feed = Feed()
    feed.trade(5)
    feed.trade(7)
    assert ids(backfill(feed, 4, 5, 6, 7, 8, 9)) == [6, 7]
    assert ids(feed.trade(8)) == [8]
    feed.tick()
    (event,) = events(feed.tick(10_000), "dropped")
    assert event["meta"] == {"backfill_surplus": 5}


def test_backfill_may_go_back_in_time() -> None:
    feed = Feed()
    feed.trade(5)
    feed.trade(7)
    emits = backfill(feed, 6, T=feed.now_ms - 3_600_000)
    assert ids(emits) == [6, 7]
    assert reasons(emits) == []


def test_bad_backfill() -> None:
    feed = Feed()
    feed.trade(5)
    feed.trade(8)
    assert reasons(feed.step("backfill", b"[", symbol="BTCUSDT")) == ["bad_json"]
    assert reasons(feed.step("backfill", {"code": -1003}, symbol="BTCUSDT")) == ["bad_field"]
    assert reasons(feed.step("backfill", [])) == ["missing_field"]
    assert feed.step("backfill", [], symbol="XUSDT") == []
    emits = backfill(feed, 6, 7, p="0")
    assert reasons(emits) == ["bad_price", "bad_price"]
    assert ids(emits) == [8], "a refused trade fills its place"


def test_refused_trade_spends_its_id() -> None:
    feed = Feed()
    feed.trade(5)
    assert reasons(feed.trade(6, X="NA")) == ["not_a_trade"]
    assert ids(feed.trade(7)) == [7]
    feed.trade(10)
    assert reasons(feed.trade(9, q="0")) == ["bad_qty"]
    assert ids(feed.trade(8)) == [8, 10]


def test_refused_trade_with_an_absurd_id_opens_no_hole() -> None:
    feed = Feed()
    feed.trade(5)
    emits = feed.trade(10**15, p="0")
    assert reasons(emits) == ["bad_price"]
    assert events(emits) == []
    assert ids(feed.trade(6)) == [6]


def test_refused_trade_does_not_seed() -> None:
    feed = Feed()
    feed.trade(900, p="0")
    assert ids(feed.trade(5)) == [5]


def test_held_trades_are_bounded() -> None:
    feed = Feed(dedup_lru=3)
    feed.trade(5)
    for number in (7, 8, 9):
        assert ids(feed.trade(number)) == []
    emits = feed.trade(10)
    assert ids(emits) == [7, 8, 9, 10]
    assert events(emits, "trades_lost")[0]["meta"]["ranges"] == [[6, 6]]


def test_trade_ids_that_begin_anew() -> None:
    feed = Feed()
    feed.trade(500)
    feed.now_ms += 2000
    emits = feed.trade(3)
    assert ids(emits) == [3]
    (gap,) = events(emits, "gap")
    assert gap["meta"] == {"reason": "trade_ids_went_back", "gap_count": 1, "agg_trade_id": 3, "next_id": 501}
    assert ids(feed.trade(4)) == [4]


def test_trade_behind_the_newest_time_is_refused_with_its_own_frame() -> None:
    feed = Feed()
    feed.trade(5)
    held_at_ms = feed.now_ms
    feed.trade(7, T=feed.now_ms - 60_000)
    feed.now_ms += 500
    emits = feed.trade(6)
    assert ids(emits) == [6]
    (reject,) = of(emits, "quality.rejects")
    assert reject["reason"] == "ts_regression"
    assert json.loads(reject["payload"])["data"]["a"] == 7
    assert reject["recv_ts_ns"] == held_at_ms * 1_000_000
    assert ids(feed.trade(8)) == [8]


# -- quotes ---------------------------------------------------------------------------------------------------------


def test_older_and_repeated_quotes_are_dropped_and_counted() -> None:
    feed = Feed()
    feed.quote(10)
    assert feed.quote(10) == []
    assert feed.quote(9) == []
    assert rows(feed.quote(11))
    feed.tick()
    (event,) = events(feed.tick(10_000), "duplicates")
    assert event["meta"] == {"quotes": 2}


def test_quote_ids_that_begin_anew() -> None:
    feed = Feed()
    feed.quote(1000)
    feed.now_ms += 2000
    emits = feed.quote(3)
    assert rows(emits)[0]["gap_count"] == 1
    assert events(emits, "gap")[0]["meta"]["reason"] == "quote_ids_went_back"


# -- the rest of the journal ----------------------------------------------------------------------------------------


def test_tick_passes_on_with_a_clock_that_never_goes_back() -> None:
    feed = Feed()
    payload = {
        "routes": {"public": "up", "market": "down"},
        "symbols": {"ETHUSDT": {"depth": 3}, "BTCUSDT": {"aggTrade": 1, "bookTicker": 2, "more": 9}},
    }
    (tick,) = of(feed.step("tick", payload, recv_ts_ns=500), "market.ticks")
    assert tick == {
        "kind": "tick",
        "recv_ts_ns": 500,
        "clock_ts_ns": 500,
        "routes": {"market": "down", "public": "up"},
        "trade_ts_ms": {"BTCUSDT": 1},
        "quote_ts_ms": {"BTCUSDT": 2},
        "depth_ts_ms": {"ETHUSDT": 3},
        "payload": None,
    }
    assert list(tick["routes"]) == ["market", "public"]
    (tick,) = of(feed.step("tick", payload, recv_ts_ns=400), "market.ticks")
    assert (tick["recv_ts_ns"], tick["clock_ts_ns"]) == (400, 500)
    fits_schema(feed.emits)


@pytest.mark.parametrize("payload", [b"", b"{", b'{"routes":{"public":5}}', b'{"symbols":{"X":{"depth":1e400}}}'])
def test_unreadable_tick_still_drives_the_clock(payload: bytes) -> None:
    feed = Feed()
    emits = feed.step("tick", payload)
    (tick,) = of(emits, "market.ticks")
    assert tick["clock_ts_ns"] == feed.now_ms * 1_000_000
    assert len(reasons(emits)) == 1
    fits_schema(emits)


@pytest.mark.parametrize("kind", ["command", "config", "end"])
def test_commands_and_changes_pass_on_with_their_text(kind: str) -> None:
    feed = Feed()
    (tick,) = of(feed.step(kind, b'{"a":1}'), "market.ticks")
    assert (tick["kind"], tick["payload"], tick["routes"]) == (kind, '{"a":1}', {})
    fits_schema(feed.emits)


def test_end_lets_go_what_waits_and_tells_what_was_counted() -> None:
    feed = Feed()
    feed.trade(5)
    feed.trade(5)
    feed.trade(8)
    emits = feed.step("end", {"reason": "stop"})
    assert emits[0][0] == "market.ticks"
    assert ids(emits) == [8]
    assert [each["event_type"] for each in events(emits)] == ["trades_lost", "duplicates"]


def gap(feed: Feed, symbol: str | None = None, route: str = "", streams: tuple[str, ...] = ()) -> list[Emit]:
    return feed.step("gap", {"reason": "restart", "streams": list(streams)}, symbol=symbol, route=route)


def test_recorded_gap_resyncs_every_book_of_the_partition() -> None:
    feed = Feed()
    for symbol in ("ETHUSDT", "BTCUSDT"):
        feed.symbol = symbol
        feed.synced()
        feed.trade(1)
    found = events(gap(feed))
    assert [(each["event_type"], each["symbol"]) for each in found] == [("gap", "BTCUSDT"), ("gap", "ETHUSDT")]
    assert found[0]["meta"] == {"reason": "restart", "gap_count": 1, "route": "", "streams": []}
    (row,) = rows(feed.trade(2))
    assert (row["book_state"], row["gap_count"]) == ("resyncing", 1), "trades go on by their ids"
    emits = feed.diff(900, 910, 899)
    assert [each["event_type"] for each in events(emits)] == ["snapshot_needed"], "a gap already told is none again"
    feed.snapshot(905)
    assert rows(feed.diff(911, 920, 910))[0]["gap_count"] == 1
    fits_schema(feed.emits)


@pytest.mark.parametrize(
    ("route", "streams", "state", "gap_count"),
    [
        ("market", (), "synced", 0),
        ("market", ("aggTrade",), "synced", 0),
        ("", ("bookTicker",), "synced", 1),
        ("public", ("bookTicker", "depth@100ms"), "resyncing", 1),
        ("", ("depth",), "resyncing", 1),
        ("public", (), "resyncing", 1),
    ],
)
def test_recorded_gap_resyncs_only_where_diffs_are_missing(
    route: str, streams: tuple[str, ...], state: str, gap_count: int
) -> None:
    """What is missing of trades their ids show."""
    feed = Feed().synced()
    (event, *_) = events(gap(feed, "BTCUSDT", route, streams), "gap")
    (row,) = rows(feed.quote(30))
    assert (row["book_state"], row["gap_count"], event["meta"]["gap_count"]) == (state, gap_count, gap_count)


PUBLIC_CUT = {"reason": "disconnected", "route": "public", "streams": ["bookTicker", "depth@100ms"]}


def test_after_a_cut_the_next_diff_decides_and_nothing_was_lost() -> None:
    feed = Feed().synced()
    feed.diff(21, 25, 20)
    feed.now_ms += 300
    found = events(feed.step("gap", PUBLIC_CUT, route="public"))
    assert [(each["event_type"], each["symbol"]) for each in found] == [
        ("reconnect", ""),
        ("book_stale", "BTCUSDT"),
        ("gap", "BTCUSDT"),
    ]
    assert found[0]["meta"] == {"route": "public", "streams": ["bookTicker", "depth@100ms"]}
    assert found[1]["meta"] == {"why": "disconnected", "age_ms": 300}
    assert found[2]["meta"]["gap_count"] == 1, "quotes carry no proof"
    assert rows(feed.quote(26))[0]["book_state"] == "stale"
    emits = feed.diff(26, 30, 25)
    assert [each["event_type"] for each in events(emits)] == ["book_recovered"]
    (row,) = rows(emits)
    assert (row["book_state"], row["gap_count"]) == ("synced", 1)
    assert feed.processor.tallies.get("resyncs") is None
    fits_schema(feed.emits)


def test_after_a_cut_the_next_diff_decides_and_something_was_lost() -> None:
    feed = Feed().synced()
    feed.step("gap", PUBLIC_CUT, route="public")
    emits = feed.diff(31, 35, 30)
    assert [each["event_type"] for each in events(emits)] == ["gap", "snapshot_needed"]
    assert events(emits)[0]["meta"]["reason"] == "pu_mismatch"
    assert feed.processor.tallies["resyncs"] == {"pu_mismatch": 1}


def test_a_cut_leaves_a_book_alone_that_waits_for_its_snapshot() -> None:
    feed = Feed()
    feed.diff(10, 20, 9)
    feed.step("gap", PUBLIC_CUT, route="public")
    feed.diff(21, 25, 20)
    assert [each["event_type"] for each in events(feed.snapshot(15))] == ["book_synced"]


def test_a_cut_of_the_trades_route_is_told_and_raises_nothing() -> None:
    feed = Feed().synced()
    feed.trade(5)
    cut = {"reason": "disconnected", "route": "market", "streams": ["aggTrade"]}
    assert [each["event_type"] for each in events(feed.step("gap", cut, route="market"))] == ["reconnect"]
    (row,) = rows(feed.trade(6))
    assert (row["book_state"], row["gap_count"]) == ("synced", 0)


@pytest.mark.parametrize("reason", ["conflated", "dropped"])
def test_a_gap_names_the_frames_that_are_missing(reason: str) -> None:
    feed = Feed().synced()
    payload = {"reason": reason, "streams": ["bookTicker"], "frames": 3, "ranges": [[21, 22], [24, 24]]}
    (event,) = events(feed.step("gap", payload, symbol="BTCUSDT"))
    assert event["meta"] == {
        "reason": reason,
        "route": "",
        "streams": ["bookTicker"],
        "frames": 3,
        "ranges": [[21, 22], [24, 24]],
        "hull": False,
        "gap_count": 1,
    }
    assert rows(feed.quote(30))[0]["book_state"] == "synced"
    assert feed.processor.tallies["missing_frames"] == {reason: 3}
    fits_schema(feed.emits)


def test_recorded_gap_of_one_symbol_and_of_none() -> None:
    feed = Feed()
    assert [each["symbol"] for each in events(gap(feed))] == [""]
    assert [each["symbol"] for each in events(gap(feed, "NEWUSDT"))] == ["NEWUSDT"]
    emits = feed.step("gap", b"{", symbol="NEWUSDT")
    assert reasons(emits) == ["bad_json"]
    assert events(emits)[0]["meta"]["gap_count"] == 2


def test_clock_drift_is_reported_and_cleared() -> None:
    feed = Feed()
    assert feed.step("server_time", {"serverTime": feed.now_ms - 200}) == []
    (event,) = events(feed.step("server_time", {"serverTime": feed.now_ms - 201}))
    assert (event["event_type"], event["meta"]) == ("clock_drift", {"drift_ms": 201, "limit_ms": 200})
    (event,) = events(feed.step("server_time", {"serverTime": feed.now_ms}))
    assert event["event_type"] == "clock_drift_cleared"
    assert feed.step("server_time", {"serverTime": feed.now_ms}) == []
    assert reasons(feed.step("server_time", b"{}")) == ["missing_field"]
    fits_schema(feed.emits)


def latencies(feed: Feed, *by_second: int | None) -> list[dict[str, Any]]:
    """Metas of the jumps that seconds with quotes of these latencies show; None: a second without any."""
    found = []
    for latency_ms in by_second:
        for later_ms in (0, 300) if latency_ms is not None else ():
            feed.quote(feed.seq, E=feed.now_ms - latency_ms - later_ms)
        found += [event["meta"] for event in events(feed.tick(1000), "latency_jump")]
    return found


def test_a_clock_that_was_set_is_told_within_two_seconds() -> None:
    feed = Feed()
    feed.tick()
    assert latencies(feed, 10, 40, -3960, -3970) == [{"route": "public", "before_ms": 40, "after_ms": -3970}]
    assert latencies(feed, -3960, 20, 20) == [{"route": "public", "before_ms": -3960, "after_ms": 20}]
    fits_schema(feed.emits)


def test_one_late_second_and_a_slow_drift_are_no_jumps() -> None:
    feed = Feed()
    feed.tick()
    assert latencies(feed, 10, 5000, 10, None, 5000, None, 10) == []
    assert latencies(feed, *range(10, 6000, 900)) == []


def test_a_pause_of_the_ticks_is_told_where_there_are_symbols() -> None:
    feed = Feed()
    for _ in range(3):
        feed.tick(1000)
    assert events(feed.tick(60_000), "clock_paused") == []
    feed.quote(1)
    for _ in range(3):
        feed.tick(1000)
    assert events(feed.tick(7_000), "clock_paused") == []
    feed.tick(1000)
    (event,) = events(feed.tick(9_000), "clock_paused")
    assert (event["symbol"], event["meta"]) == ("", {"pause_ms": 9_000})
    assert events(feed.tick(1_000), "clock_paused") == []


def test_the_usual_rhythm_of_slow_ticks_is_no_pause() -> None:
    feed = Feed()
    feed.quote(1)
    assert [events(feed.tick(60_000), "clock_paused") for _ in range(5)] == [[]] * 5


NEVER_MS = 3_600_000
"""Of streams that a test leaves out."""


def silences(feed: Feed, seconds: int, every_ms: dict[str, int], tick_ms: int = 200) -> list[tuple[str, str, int]]:
    """Run for a while with frames at fixed intervals: (event, stream, age)."""
    found = []
    due = dict.fromkeys(every_ms, feed.now_ms)
    number = feed.seq
    end_ms = feed.now_ms + 1000 * seconds
    while feed.now_ms < end_ms:
        for name in sorted(due):
            if feed.now_ms >= due[name]:
                due[name] += every_ms[name]
                number += 1
                {"trade": feed.trade, "quote": feed.quote}[name](number)
        for event in events(feed.tick(tick_ms)):
            if event["event_type"] in ("stream_silent", "stream_resumed") and event["meta"]["age_ms"] < NEVER_MS:
                found.append((event["event_type"], event["meta"]["stream"], event["meta"]["age_ms"]))
    return found


def test_a_busy_stream_is_silent_soon_and_resumes() -> None:
    feed = Feed(first_data_ms=NEVER_MS)
    assert silences(feed, 600, {"trade": 500, "quote": 100}) == []
    ((event, stream, age_ms),) = silences(feed, 60, {"quote": 100})
    assert (event, stream) == ("stream_silent", "aggTrade")
    assert 20_000 < age_ms < 30_000, "twenty of its seconds, and a little for the time before it began"
    assert [found[:2] for found in silences(feed, 5, {"trade": 500, "quote": 100})] == [("stream_resumed", "aggTrade")]


@pytest.mark.parametrize("every_sec", [10, 60, 240])
def test_a_quiet_stream_does_not_flap(every_sec: int) -> None:
    feed = Feed(first_data_ms=NEVER_MS, first_trade_ms=NEVER_MS)
    assert silences(feed, 7200, {"trade": 1000 * every_sec, "quote": 1000}, 1000) == []
    burst = silences(feed, 60, {"trade": 100, "quote": 1000}, 1000)
    assert burst + silences(feed, 3600, {"trade": 1000 * every_sec, "quote": 1000}, 1000) == []


def test_a_quiet_stream_is_silent_after_twenty_of_its_intervals() -> None:
    feed = Feed(first_data_ms=NEVER_MS)
    silences(feed, 7200, {"trade": 10_000, "quote": 1000}, 1000)
    ((event, stream, age_ms),) = silences(feed, 1200, {"quote": 1000}, 1000)
    assert (event, stream) == ("stream_silent", "aggTrade")
    assert 180_000 < age_ms < 260_000


def test_a_stream_that_never_spoke_is_told_once() -> None:
    feed = Feed(first_data_ms=30_000, first_trade_ms=90_000)
    feed.quote(1)
    found = silences(feed, 200, {"quote": 1000})
    assert [(event, stream) for event, stream, _ in found] == [
        ("stream_silent", "depth"),
        ("stream_silent", "aggTrade"),
    ]
    (depth, trades) = events(feed.emits, "stream_silent")
    assert depth["meta"] == {
        "stream": "depth",
        "why": "no_first_data",
        "bound_ms": 30_000,
        "age_ms": depth["meta"]["age_ms"],
    }
    assert 30_000 < depth["meta"]["age_ms"] <= 31_200
    assert 90_000 < trades["meta"]["age_ms"] <= 91_200
    assert [found[:2] for found in silences(feed, 3, {"quote": 1000, "trade": 1000})] == [
        ("stream_resumed", "aggTrade")
    ]
    fits_schema(feed.emits)


def test_a_symbol_of_the_ticks_that_sends_nothing_is_told() -> None:
    feed = Feed(first_data_ms=30_000)
    for _ in range(200):
        feed.now_ms += 200
        feed.step("tick", {"routes": {"market": "up", "public": "up"}, "symbols": {"DEADUSDT": {}}})
    found = [(event["symbol"], event["meta"]["stream"]) for event in events(feed.emits, "stream_silent")]
    assert found == [("DEADUSDT", "bookTicker"), ("DEADUSDT", "depth")]


def test_silence_is_excused_while_the_route_is_down_and_while_ticks_pause() -> None:
    feed = Feed(first_data_ms=NEVER_MS)
    silences(feed, 600, {"trade": 500, "quote": 100})
    for _ in range(300):
        feed.tick(200, {"market": "down", "public": "up"})
        feed.quote(feed.seq + 10**6)
    assert events(feed.emits, "stream_silent") == []
    feed.tick(NEVER_MS)
    assert events(feed.emits, "stream_silent") == [], "the clock jumped, or nobody recorded"


def test_exchange_info_is_passed_over() -> None:
    feed = Feed()
    assert feed.step("exchange_info", b"{}") == []
    assert feed.processor.totals == {"exchange_info": 1}


def test_mark_price_and_liquidations_where_they_are_wanted() -> None:
    feed = Feed(mark_price=True, force_order=True)
    mark = {"e": "markPriceUpdate", "E": feed.now_ms - 5, "s": "BTCUSDT", "p": "99", "i": "98", "r": "0.0001", "T": 0}
    (row,) = rows(feed.frame("markPrice@1s", mark))
    assert (row["src"], row["price"], row["ts_ms"], row["qty"]) == ("markPrice", 99.0, feed.now_ms - 5, None)
    assert json.loads(row["meta"]) == {"funding_rate": 0.0001, "index_price": 98.0, "next_funding_ts_ms": 0}
    order = {"s": "BTCUSDT", "S": "SELL", "q": "3", "p": "90", "ap": "91", "X": "FILLED", "z": "2", "T": feed.now_ms}
    (row,) = rows(feed.frame("forceOrder", {"e": "forceOrder", "E": feed.now_ms, "o": order}))
    assert (row["src"], row["price"], row["qty"]) == ("forceOrder", 91.0, 2.0)
    assert (row["side"], row["side_source"]) == ("sell", "exchange")
    assert reasons(feed.frame("markPrice@1s", {**mark, "p": "0"})) == ["bad_price"]
    assert reasons(feed.frame("forceOrder", {"e": "forceOrder", "o": {**order, "q": "0", "z": "0"}})) == ["bad_qty"]
    fits_schema(feed.emits)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"snapshot_wait_ms": 500}, "snapshot_wait_ms is 500: it must be at least request_interval_ms, 1000"),
        ({"silence_most_ms": 5000}, "silence_most_ms is 5000: it must be at least 10000"),
        ({"request_interval_most_ms": 500}, "request_interval_most_ms is 500: it must be at least 1000"),
    ],
)
def test_settings_that_do_not_fit_each_other(settings: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        NormaliserConfig(**settings)


def test_state_of_an_empty_processor() -> None:
    processor = NormaliserProcessor(NormaliserConfig(), 3)
    other = NormaliserProcessor(NormaliserConfig(), 3)
    other.restore(processor.snapshot())
    assert other.step("market.journal", journal_record(1, "open")) == []
    assert other.snapshot() == processor.snapshot()
