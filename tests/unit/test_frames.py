"""Decoding of what the exchange sends, and the recorder's short cut."""

from __future__ import annotations

import json
import math
from typing import Any

import msgspec
import pytest
import venue_journal as vj
from orderflow.venues.binance import frames
from orderflow.venues.binance.endpoints import LIVE, Endpoints, depth_weight
from orderflow.venues.binance.frames import route_of, route_of_parsed
from orderflow.venues.binance.streams import (
    MAX_STREAMS_PER_CONNECTION,
    parse_stream,
    route_of_stream,
    stream_name,
    stream_names,
    subscribe_messages,
)

# Frames as the exchange sends them since 2026, from the recorded examples of the interface's notes.
AGG_TRADE = b'{"stream":"btcusdt@aggTrade","data":{"e":"aggTrade","E":1790526539033,"a":3466782974,"s":"BTCUSDT","p":"84551.10","q":"0.030","nq":"0.030","f":8123344783,"l":8123344783,"T":1790526538883,"m":false,"st":1}}'
BOOK_TICKER = b'{"stream":"btcusdt@bookTicker","data":{"e":"bookTicker","u":11671659685961,"s":"BTCUSDT","ps":"BTCUSDT","b":"84551.00","B":"2.646","a":"84551.10","A":"5.302","T":1790526538939,"E":1790526538940,"st":1}}'
DEPTH = b'{"stream":"btcusdt@depth@100ms","data":{"e":"depthUpdate","E":1790526538985,"T":1790526538981,"s":"BTCUSDT","ps":"BTCUSDT","U":11671659683245,"u":11671659687966,"pu":11671659683147,"b":[["1000.00","139.491"],["82548.60","0.000"],["84551.00","2.027"]],"a":[["84551.10","5.302"],["84565.90","0.000"]],"st":1}}'
FORCE_ORDER = b'{"stream":"ilvusdt@forceOrder","data":{"e":"forceOrder","E":1791391083124,"o":{"s":"ILVUSDT","S":"SELL","o":"LIMIT","f":"IOC","q":"116.5","p":"3.80300","ap":"3.85642","X":"FILLED","l":"25.2","z":"116.5","T":1791391082119,"ps":"ILVUSDT","st":1}}}'
MARK_PRICE = b'{"stream":"btcusdt@markPrice@1s","data":{"e":"markPriceUpdate","E":1791269856000,"s":"BTCUSDT","p":"85296.60260870","ap":"85296.60260870","P":"85321.91711993","i":"85345.93826087","r":"0.00000523","T":1791273600000,"st":1}}'
SNAPSHOT = b'{"lastUpdateId":11759031561498,"E":1791399966500,"T":1791399966493,"bids":[["83401.90","8.843"]],"asks":[["83402.00","3.480"]]}'


def test_agg_trade() -> None:
    trade = frames.decode_agg_trade(AGG_TRADE).data
    assert (trade.symbol, trade.agg_trade_id, trade.price, trade.qty) == ("BTCUSDT", 3466782974, 84551.1, 0.03)
    assert (trade.ts_ms, trade.event_ts_ms, trade.buyer_is_maker) == (1790526538883, 1790526539033, False)


def test_book_ticker() -> None:
    quote = frames.decode_book_ticker(BOOK_TICKER).data
    assert (quote.bid, quote.bid_qty, quote.ask, quote.ask_qty) == (84551.0, 2.646, 84551.1, 5.302)
    assert (quote.update_id, quote.ts_ms, quote.event_ts_ms) == (11671659685961, 1790526538939, 1790526538940)


def test_depth() -> None:
    diff = frames.decode_depth(DEPTH).data
    assert (diff.first_id, diff.final_id, diff.prev_id) == (11671659683245, 11671659687966, 11671659683147)
    assert diff.bids == [(1000.0, 139.491), (82548.6, 0.0), (84551.0, 2.027)]
    assert diff.asks == [(84551.1, 5.302), (84565.9, 0.0)]


@pytest.mark.parametrize("where", ["inside", "beside", "nowhere"])
def test_force_order_with_its_pair_in_either_place(where: str) -> None:
    content = json.loads(FORCE_ORDER)
    pair = content["data"]["o"].pop("ps")
    if where == "inside":
        content["data"]["o"]["ps"] = pair
    elif where == "beside":
        content["data"]["ps"] = pair
    data = frames.decode_force_order(json.dumps(content).encode()).data
    assert (data.order.symbol, data.order.side, data.order.average_price) == ("ILVUSDT", "SELL", 3.85642)
    assert (data.order.pair, data.pair) == (pair if where == "inside" else None, pair if where == "beside" else None)


def test_mark_price_has_the_next_funding_in_t() -> None:
    mark = frames.decode_mark_price(MARK_PRICE).data
    assert (mark.mark_price, mark.event_ts_ms, mark.next_funding_ts_ms) == (85296.6026087, 1791269856000, 1791273600000)


def test_rest_bodies() -> None:
    snapshot = frames.decode_snapshot(SNAPSHOT)
    assert (snapshot.last_update_id, snapshot.bids, snapshot.symbol) == (11759031561498, [(83401.9, 8.843)], None)
    body = b'[{"a":26129,"p":"0.01633102","q":"4.70443515","nq":"4.7","f":27781,"l":27781,"T":1498793709153,"m":true}]'
    (trade,) = frames.decode_rest_agg_trades(body)
    assert (trade.agg_trade_id, trade.price, trade.ts_ms, trade.buyer_is_maker) == (
        26129,
        0.01633102,
        1498793709153,
        True,
    )
    assert frames.decode_server_time(b'{"serverTime":1790770782215}').server_time_ms == 1790770782215


@pytest.mark.parametrize(
    "level", ['["nan","1"]', '["inf","1"]', '["-1","1"]', '["0","1"]', '["1","nan"]', '["1","-1"]', '["1"]']
)
def test_levels_that_are_no_levels(level: str) -> None:
    with pytest.raises(msgspec.ValidationError):
        frames.decode_depth(DEPTH.replace(b'["84551.10","5.302"]', level.encode()))


def test_time_in_microseconds_is_refused() -> None:
    with pytest.raises(msgspec.ValidationError):
        frames.decode_agg_trade(AGG_TRADE.replace(b"1790526538883", b"1790526538883000"))


@pytest.mark.parametrize(
    ("frame", "expected"),
    [
        (AGG_TRADE, ("BTCUSDT", "aggTrade", 1790526538883)),
        (BOOK_TICKER, ("BTCUSDT", "bookTicker", 1790526538939)),
        (DEPTH, ("BTCUSDT", "depth", 1790526538981)),
        (FORCE_ORDER, ("ILVUSDT", "forceOrder", 1791391082119)),
        (MARK_PRICE, ("BTCUSDT", "markPrice", None)),
        (DEPTH.replace(b"btcusdt@", b"btcusdt_261225@"), ("BTCUSDT_261225", "depth", 1790526538981)),
        (AGG_TRADE.replace(b"btcusdt@", "币安人生usdt@".encode()), ("币安人生USDT", "aggTrade", 1790526538883)),
        (AGG_TRADE.replace(b"btcusdt@", b"\\u5e01usdt@"), ("币USDT", "aggTrade", 1790526538883)),
        (AGG_TRADE.replace(b'{"stream":', b'{ "stream" : '), ("BTCUSDT", "aggTrade", 1790526538883)),
        (AGG_TRADE + b"\n", ("BTCUSDT", "aggTrade", 1790526538883)),
        (AGG_TRADE.replace(b'"T":1790526538883,', b""), ("BTCUSDT", "aggTrade", None)),
        (AGG_TRADE.replace(b'"T":1790526538883', b'"T":"1790526538883"'), ("BTCUSDT", "aggTrade", 1790526538883)),
        (AGG_TRADE.replace(b'"T":1790526538883', b'"T":-3'), ("BTCUSDT", "aggTrade", None)),
        (b'{"stream":"!miniTicker@arr","data":[{"e":"24hrMiniTicker"}]}', (None, "!miniTicker", None)),
        (b'{"stream":"btcusdt@kline_1m","data":{"e":"kline","k":{"T":1}}}', ("BTCUSDT", "kline", None)),
        (b'{"result":null,"id":1}', (None, "reply", None)),
        (b'{"error":{"code":2,"msg":"Invalid request"},"id":1}', (None, "reply", None)),
        (b'{"code":-1121,"msg":"Invalid symbol."}', (None, "reply", None)),
    ],
)
def test_route_of(frame: bytes, expected: tuple[str | None, str, int | None]) -> None:
    assert route_of(frame) == expected
    assert route_of_parsed(frame) == expected


@pytest.mark.parametrize(
    "frame",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b"\xff\xfe",
        b'{"stream":5,"data":{}}',
        b'{"stream":""}',
        b'{"e":"aggTrade"}',
        b"[" * 5000,
        AGG_TRADE[:60],
        b'{"stream":"\xff@aggTrade","data":{}}',
    ],
)
def test_route_of_garbage(frame: bytes) -> None:
    assert route_of(frame) == (None, "garbage", None)


@pytest.mark.capture
@pytest.mark.parametrize("name", [vj.BTC_ETH, vj.ALTS])
def test_short_cut_equals_parsing_on_every_recorded_frame(name: str) -> None:
    vj.need_captures()
    seen = set()
    for _, connection, frame in vj.capture_frames(name):
        if connection == "rest":
            continue
        route = route_of(frame)
        assert route == route_of_parsed(frame)
        seen.add(route.kind)
    assert seen >= {"aggTrade", "bookTicker", "depth"}


@pytest.mark.capture
def test_decoded_numbers_equal_the_recorded_text() -> None:
    vj.need_captures()
    decoders: dict[str, Any] = {
        "aggTrade": frames.decode_agg_trade,
        "bookTicker": frames.decode_book_ticker,
        "depth": frames.decode_depth,
    }
    checked = 0
    for _, connection, frame in vj.capture_frames(vj.ALTS):
        decode = decoders.get(route_of(frame).kind) if connection != "rest" else None
        if decode is None:
            continue
        raw, data = json.loads(frame)["data"], decode(frame).data
        assert data.ts_ms == raw["T"]
        if raw["e"] == "depthUpdate":
            assert data.bids == [(float(price), float(quantity)) for price, quantity in raw["b"]]
            assert data.asks == [(float(price), float(quantity)) for price, quantity in raw["a"]]
        elif raw["e"] == "aggTrade":
            assert (data.price, data.qty, data.buyer_is_maker) == (float(raw["p"]), float(raw["q"]), raw["m"])
        else:
            assert (data.bid, data.ask_qty) == (float(raw["b"]), float(raw["A"]))
        checked += 1
    assert checked == 91 + 613 + 764


def test_stream_names() -> None:
    assert parse_stream("btcusdt@depth@100ms") == ("BTCUSDT", "depth", "depth@100ms")
    assert parse_stream("!markPrice@arr@1s") == (None, "!markPrice", "!markPrice@arr@1s")
    assert parse_stream("btcusdt_perpetual@continuousKline_1m").kind == "continuousKline"
    assert parse_stream("tradingSession") == (None, "tradingSession", "tradingSession")
    assert stream_name("BTCUSDT", "depth@100ms") == "btcusdt@depth@100ms"


def test_streams_have_one_route() -> None:
    assert [route_of_stream(each) for each in ("bookTicker", "depth@100ms", "!bookTicker")] == ["public"] * 3
    assert [route_of_stream(each) for each in ("aggTrade", "markPrice@1s", "forceOrder", "!forceOrder@arr")] == [
        "market"
    ] * 4
    assert route_of_stream("btcusdt@aggTrade") == "market"
    with pytest.raises(ValueError, match="'aggtrade' is not known"):
        route_of_stream("aggtrade")


def test_subscriptions_are_batched() -> None:
    names = stream_names([f"S{number}USDT" for number in range(150)], ["bookTicker", "depth@100ms"])
    messages = list(subscribe_messages(names))
    assert [len(each["params"]) for each in messages] == [200, 100]
    assert [each["id"] for each in messages] == [1, 2]
    assert [name for each in messages for name in each["params"]] == names
    with pytest.raises(ValueError, match=str(MAX_STREAMS_PER_CONNECTION)):
        stream_names([f"S{number}" for number in range(600)], ["bookTicker", "depth@100ms"])


def test_endpoints() -> None:
    assert LIVE.socket("public") == "wss://fstream.binance.com/public/stream"
    assert LIVE.depth("BTCUSDT") == "https://fapi.binance.com/fapi/v1/depth?symbol=BTCUSDT&limit=1000"
    own = Endpoints(ws_url="ws://127.0.0.1:9001", rest_url="http://127.0.0.1:9002")
    assert own.agg_trades("币安USDT", 5, 10) == (
        "http://127.0.0.1:9002/fapi/v1/aggTrades?symbol=%E5%B8%81%E5%AE%89USDT&fromId=5&limit=10"
    )
    assert own.server_time() == "http://127.0.0.1:9002/fapi/v1/time"
    assert depth_weight(1000) == 20
    with pytest.raises(ValueError, match="limit is 7"):
        own.depth("BTCUSDT", 7)
    with pytest.raises(ValueError, match="limit is 0"):
        own.agg_trades("BTCUSDT", 5, 0)
    with pytest.raises(ValueError, match="rest_url is 'fapi"):
        Endpoints(rest_url="fapi.binance.com")


def test_huge_numbers_do_not_become_infinite() -> None:
    with pytest.raises(msgspec.ValidationError):
        frames.decode_agg_trade(AGG_TRADE.replace(b"84551.10", b"1e400"))
    assert math.isinf(frames.decode_agg_trade(AGG_TRADE.replace(b"84551.10", b"inf")).data.price), (
        "refused by rule later"
    )
