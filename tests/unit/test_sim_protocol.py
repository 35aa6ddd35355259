"""The control protocol of the simulated exchange, its limits, trade history and increments."""

from __future__ import annotations

import json
from typing import Any

import pytest
from orderflow.venues.binance.sim.history import TradeHistory
from orderflow.venues.binance.sim.hub import text_frame, unwrapped
from orderflow.venues.binance.sim.instruments import Instrument, exchange_info, infer_instrument
from orderflow.venues.binance.sim.playback import RecordedBook, _Levels
from orderflow.venues.binance.sim.protocol import ControlSession, MessageRate
from orderflow.venues.binance.sim.rest import RestError, WeightLimit


def ask(session: ControlSession, **request: Any) -> Any:
    reply = session.handle(json.dumps(request)).reply
    assert reply is not None
    return json.loads(reply)


def test_subscriptions_are_acknowledged_listed_and_ended() -> None:
    session = ControlSession(combined=True)
    names = ["btcusdt@aggTrade", "nosuch@stream", "BTCUSDT@depth", "btcusdt@aggTrade"]
    outcome = session.handle(json.dumps({"method": "SUBSCRIBE", "params": names, "id": 1}))
    assert outcome.reply == '{"result":null,"id":1}'
    assert outcome.added == ("btcusdt@aggTrade", "nosuch@stream", "BTCUSDT@depth")
    assert ask(session, method="LIST_SUBSCRIPTIONS", id=3) == {"result": list(outcome.added), "id": 3}
    again = session.handle('{"method":"SUBSCRIBE","params":["btcusdt@aggTrade"],"id":4}')
    assert again.added == ()
    ended = session.handle('{"method":"UNSUBSCRIBE","params":["BTCUSDT@depth","never@subscribed"],"id":5}')
    assert (ended.reply, ended.removed) == ('{"result":null,"id":5}', ("BTCUSDT@depth",))
    assert ask(session, method="LIST_SUBSCRIPTIONS", id=0)["result"] == ["btcusdt@aggTrade", "nosuch@stream"]


@pytest.mark.parametrize("combined", [True, False])
def test_the_property_combined(combined: bool) -> None:
    session = ControlSession(combined)
    assert ask(session, method="GET_PROPERTY", params=["combined"], id=2) == {"result": combined, "id": 2}
    assert ask(session, method="SET_PROPERTY", params=["combined", not combined], id=5) == {"result": None, "id": 5}
    assert session.combined is not combined


@pytest.mark.parametrize(
    ("text", "code", "message", "number"),
    [
        ('{"method":"GET_PROPERTY","params":["speed"],"id":1}', 0, "Unknown property", 1),
        ('{"method":"SET_PROPERTY","params":["combined","yes"],"id":1}', 1, "Invalid value type: expected Boolean", 1),
        ('{"method":"SET_PROPERTY","params":["combined"],"id":1}', 1, "Invalid value type: expected Boolean", 1),
        ('{"method":"GET_PROPERTY","params":[7],"id":1}', 2, "property name must be a string", 1),
        ('{"method":"GET_PROPERTY","params":["combined",1],"id":1}', 2, "too many parameters", 1),
        ('{"method":"SUBSCRIBE","params":["a@b"],"id":"x"}', 2, "request ID must be an unsigned integer", None),
        ('{"method":"SUBSCRIBE","params":["a@b"],"id":-1}', 2, "request ID must be an unsigned integer", None),
        ('{"method":"SUBSCRIBE","params":["a@b"],"id":true}', 2, "request ID must be an unsigned integer", None),
        ('{"method":"SUBSCRIBE","params":["a@b"]}', 2, "request ID must be an unsigned integer", None),
        ('{"method":"SUBSCRIBE","params":"a@b","id":1}', 2, "params must be an array", 1),
        ('{"method":"NOPE","id":1}', 2, "unknown variant `NOPE`", None),
        ('{"id":1}', 2, "missing field `method`", None),
        ("[1]", 2, "Invalid request", None),
        ("{nope", 3, "Invalid JSON: expected value at line 1 column 2", None),
        ("", 3, "Invalid JSON", None),
        ("[" * 100_000, 3, "Invalid JSON", None),
    ],
)
def test_error_replies(text: str, code: int, message: str, number: int | None) -> None:
    session = ControlSession(combined=True)
    outcome = session.handle(text)
    assert outcome.close is None and not outcome.added
    assert outcome.reply is not None
    body = json.loads(outcome.reply)
    assert body["error"]["code"] == code and message in body["error"]["msg"]
    assert body.get("id") == number
    assert session.errors == 1


def test_one_stream_too_many_ends_the_connection() -> None:
    session = ControlSession(combined=True)
    assert session.subscribe(f"s{n}@aggTrade" for n in range(1024)).close is None
    assert session.handle('{"method":"SUBSCRIBE","params":["s0@aggTrade"],"id":1}').close is None, "it is there already"
    outcome = session.handle('{"method":"SUBSCRIBE","params":["s1024@aggTrade"],"id":2}')
    assert outcome.reply == '{"error":{"code":4,"msg":"Too many subscriptions"}}'
    assert outcome.close == (1008, "Invalid request")


def test_message_rate_allows_a_burst_of_15_and_10_a_second() -> None:
    rate = MessageRate(0.0)
    assert [rate.take(0.0) for _ in range(40)].count(True) == 15
    assert not rate.take(0.05)
    assert [rate.take(1.0) for _ in range(40)].count(True) == 10
    assert all(rate.take(2.0 + n / 10) for n in range(1000))


def test_weights_count_by_utc_minute_and_address() -> None:
    now = 59.0
    weights = WeightLimit(100, clock=lambda: now)
    assert weights.take("a", 60) == 60
    assert weights.take("a", 40) == 100
    assert weights.take("b", 20) == 20
    with pytest.raises(RestError) as refused:
        weights.take("a", 1)
    assert refused.value.status == 429
    assert refused.value.headers["Retry-After"] == "2"
    assert json.loads(refused.value.body)["code"] == -1003
    now = 60.0
    assert weights.take("a", 1) == 1


def trade_frame(number: int, time_ms: int) -> bytes:
    return (
        b'{"stream":"btcusdt@aggTrade","data":{"e":"aggTrade","E":%d,"a":%d,"s":"BTCUSDT","p":"1.0","q":"2","f":1,"l":2,'
        b'"T":%d,"m":true}}' % (time_ms + 100, number, time_ms)
    )


def ids(body: bytes) -> list[int]:
    return [row["a"] for row in json.loads(body)]


def test_trade_history_is_bounded_and_found_by_id_and_time() -> None:
    history = TradeHistory(kept=10)
    assert history.first_id("BTCUSDT") is None
    assert history.from_id("BTCUSDT", 0, 5) == b"[]"
    for number in range(100, 135):
        history.add("BTCUSDT", trade_frame(number, number * 10))
    assert history.first_id("BTCUSDT") == 125
    assert ids(history.from_id("BTCUSDT", 130, 3)) == [130, 131, 132]
    assert ids(history.from_id("BTCUSDT", 135, 3)) == []
    assert ids(history.between("BTCUSDT", 1_300, 1_319, 10)) == [130, 131]
    assert ids(history.between("BTCUSDT", 1_300, None, 2)) == [130, 131]
    assert ids(history.between("BTCUSDT", None, None, 2)) == [133, 134], "the newest, without a start"
    row = json.loads(history.from_id("BTCUSDT", 134, 1))[0]
    assert row == {"a": 134, "p": "1.0", "q": "2", "f": 1, "l": 2, "T": 1340, "m": True}, "without nq, as recorded"


def test_increments_are_inferred() -> None:
    found = infer_instrument("BTCUSDT", ["63943.90", "63944.00", "1000.10"], ["0.003", "12.000", "1.250"])
    assert (found.tick, found.step, found.price_decimals, found.qty_decimals) == ("0.10", "0.001", 2, 3)
    assert infer_instrument("X", ["5", "15"], []).tick == "5"
    assert infer_instrument("X", ["0.00000010"], ["1"]).tick == "0.00000010"


def test_exchange_info_holds_what_clients_look_for() -> None:
    info = exchange_info([Instrument("SOLUSDT", "0.0100", "0.01", 4, 2)], 5)
    symbol = info["symbols"][0]
    filters = {each["filterType"]: each for each in symbol["filters"]}
    assert (symbol["baseAsset"], symbol["quoteAsset"], symbol["status"]) == ("SOL", "USDT", "TRADING")
    assert filters["PRICE_FILTER"]["tickSize"] == "0.0100"
    assert filters["LOT_SIZE"]["stepSize"] == "0.01"
    assert "notional" in filters["MIN_NOTIONAL"]


@pytest.mark.parametrize(("size", "head"), [(125, 2), (126, 4), (65_535, 4), (65_536, 10)])
def test_websocket_frames_by_size(size: int, head: int) -> None:
    frame = text_frame(b"x" * size)
    assert len(frame) == size + head and frame[0] == 0x81


def test_raw_mode_takes_the_wrapper_off() -> None:
    assert unwrapped(b'{"stream":"a@b","data":{"e":"x","data":[1]}}') == b'{"e":"x","data":[1]}'


def diff(first: int, last: int, previous: int, *bids: tuple[str, str]) -> _Levels:
    return _Levels(U=first, u=last, pu=previous, b=list(bids), a=[])


def test_the_recorded_book_takes_diffs_before_and_after_its_snapshot() -> None:
    book = RecordedBook()
    book.diff(diff(5, 9, 3, ("1.0", "7")))
    book.diff(diff(11, 20, 9, ("1.1", "8")))
    assert not book.whole
    book.snapshot(b'{"lastUpdateId":15,"bids":[["1.0","1"],["0.9","5"]],"asks":[["1.2","3"]]}')
    body = json.loads(book.body(1000, 0))
    assert body["bids"] == [["1.1", "8"], ["1.0", "1"], ["0.9", "5"]], "the diff that ended before the snapshot is old"
    assert body["lastUpdateId"] == 20
    book.diff(diff(25, 30, 20, ("1.1", "0.000")))
    assert json.loads(book.body(1, 0))["bids"] == [["1.0", "1"]]
    book.diff(diff(45, 50, 40, ("1.0", "0")))
    assert not book.whole, "previous u was 30, not 40"
