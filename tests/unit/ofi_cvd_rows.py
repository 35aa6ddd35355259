"""Rows for the tests of OFI and CVD: made by hand, or from the recorded captures by a plain local book."""

from __future__ import annotations

import functools
import gzip
import json
import os
import random
from bisect import bisect_left, insort
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec
from orderflow.processor import Emit, Processor, Record
from orderflow.topics import ROWS, TICKS

T0_MS = 1_700_000_000_000
CAPTURES = Path(os.environ.get("ORDERFLOW_CAPTURES", Path(__file__).resolve().parents[3] / "shared/data/replay"))
BTC_ETH = CAPTURES / "usdm_btc_eth_20240718.gz"
LEVELS = 5
Step = tuple[str, Record]
Book = tuple[Sequence[float], Sequence[float], Sequence[float], Sequence[float]]
"""bid_px, bid_qtys, ask_px, ask_qtys; best first."""


def row(src: str, ts_ms: int, **fields: Any) -> Step:
    record = {
        "seq": 1, "sub": 0, "src": src, "symbol": "BTCUSDT", "ts_ms": ts_ms, "event_ts_ms": ts_ms + 1,
        "recv_ts_ms": ts_ms + 6, "price": None, "qty": None, "side": None, "side_source": "none",
        "agg_trade_id": None, "bid": None, "bid_qty": None, "ask": None, "ask_qty": None, "best_spread_bps": None,
        "bid_px": [], "bid_qtys": [], "ask_px": [], "ask_qtys": [], "update_id": None, "book_state": "synced",
        "gap_count": 0, "latency_ms": 5, "meta": None,
    }  # fmt: skip
    return ROWS, record | fields


def quote(ts_ms: int, bid: Any, bid_qty: Any, ask: Any, ask_qty: Any, **fields: Any) -> Step:
    return row("bookTicker", ts_ms, bid=bid, bid_qty=bid_qty, ask=ask, ask_qty=ask_qty, **fields)


def depth(ts_ms: int, book: Book, **fields: Any) -> Step:
    bid_px, bid_qtys, ask_px, ask_qtys = (list(side) for side in book)
    return row("depth", ts_ms, bid_px=bid_px, bid_qtys=bid_qtys, ask_px=ask_px, ask_qtys=ask_qtys, **fields)


def trade(ts_ms: int, qty: Any, side: str | None = "buy", price: Any = 100.0, **fields: Any) -> Step:
    source = "none" if side is None else "exchange"
    return row("aggTrade", ts_ms, **{"qty": qty, "side": side, "price": price, "side_source": source, **fields})


def tick(clock_ms: int, **fields: Any) -> Step:
    record = {
        "seq": 1, "sub": 0, "kind": "tick", "recv_ts_ns": clock_ms * 1_000_000, "clock_ts_ns": clock_ms * 1_000_000,
        "routes": {"public": "up", "market": "up"}, "trade_ts_ms": {}, "quote_ts_ms": {}, "depth_ts_ms": {},
        "payload": None,
    }  # fmt: skip
    return TICKS, record | fields


def run(processor: Processor, steps: Iterable[Step]) -> list[Record]:
    """Every value that the steps cause."""
    return [value for topic, record in steps for _, _, value in processor.step(topic, record)]


def packed(values: Sequence[Record | Emit]) -> bytes:
    return msgspec.msgpack.encode(values)


def capture_frames(path: Path = BTC_ETH) -> Iterator[tuple[int, str, dict[str, Any]]]:
    """(receive time in ns, connection, decoded frame) in the file's order."""
    with gzip.open(path, "rb") as lines:
        for line in lines:
            received_ns, connection, frame = line.split(b" ", 2)
            yield int(received_ns), connection.decode(), json.loads(frame)


class LocalBook:
    """The plainest book that keeps the exchange's rule; the normaliser's own is tested elsewhere."""

    def __init__(self) -> None:
        self.sides: dict[str, dict[float, float]] = {"b": {}, "a": {}}
        self.order: dict[str, list[float]] = {"b": [], "a": []}
        self.snapshot_id: int | None = None
        self.synced = False

    def load(self, body: dict[str, Any]) -> None:
        self.snapshot_id = body["lastUpdateId"]
        for side, key in (("b", "bids"), ("a", "asks")):
            self._set(side, body[key])

    def apply(self, frame: dict[str, Any]) -> bool:
        """False for a diff before the snapshot."""
        if self.snapshot_id is None or frame["u"] < self.snapshot_id:
            return False
        self.synced = True
        self._set("b", frame["b"])
        self._set("a", frame["a"])
        return True

    def _set(self, side: str, levels: list[list[str]]) -> None:
        quantities, order = self.sides[side], self.order[side]
        for price_text, qty_text in levels:
            price, qty = float(price_text), float(qty_text)
            if qty and price not in quantities:
                insort(order, price)
            if qty:
                quantities[price] = qty
            elif quantities.pop(price, None) is not None:
                del order[bisect_left(order, price)]

    def top(self) -> Book:
        bid_px, ask_px = self.order["b"][: -LEVELS - 1 : -1], self.order["a"][:LEVELS]
        bids, asks = self.sides["b"], self.sides["a"]
        return bid_px, [bids[price] for price in bid_px], ask_px, [asks[price] for price in ask_px]


@functools.cache
def capture_steps() -> tuple[Step, ...]:
    """The BTC and ETH capture as rows, with a tick every 200 ms of receive time."""
    books: dict[str, LocalBook] = {}
    waiting: dict[str, list[dict[str, Any]]] = {}
    steps: list[Step] = []
    next_tick_ms = 0
    for received_ns, connection, frame in capture_frames():
        received_ms = received_ns // 1_000_000
        if received_ms >= next_tick_ms:
            next_tick_ms = received_ms + 200
            steps.append(tick(received_ms))
        if connection == "rest":
            book = books.setdefault(frame["symbol"], LocalBook())
            book.load(frame)
            for held in waiting.pop(frame["symbol"], []):
                book.apply(held)
            continue
        data = frame["data"]
        symbol = data.get("s")
        common = {"symbol": symbol, "event_ts_ms": data["E"], "recv_ts_ms": received_ms}
        if data["e"] == "bookTicker":
            figures = (float(data[key]) for key in "bBaA")
            steps.append(quote(data["T"], *figures, **common))
        elif data["e"] == "depthUpdate":
            book = books.setdefault(symbol, LocalBook())
            if book.snapshot_id is None:
                waiting.setdefault(symbol, []).append(data)
            elif book.apply(data):
                steps.append(depth(data["T"], book.top(), **common))
        elif data["e"] == "aggTrade":
            side = "sell" if data["m"] else "buy"
            steps.append(trade(data["T"], float(data["q"]), side, float(data["p"]), agg_trade_id=data["a"], **common))
    return tuple(steps)


def market(
    seed: int,
    rows: int,
    symbols: Sequence[str] = ("BTCUSDT",),
    src: Sequence[str] = ("bookTicker", "depth", "aggTrade"),
) -> list[Step]:
    """A random market of whole ticks and lots: uneven pace, some pauses, a tick every 200 ms of event time."""
    chance = random.Random(seed)
    best = dict.fromkeys(symbols, 1000)
    now_ms, next_tick_ms = T0_MS, T0_MS
    steps: list[Step] = []
    for i in range(rows):
        pace_ms = 40 if i % 400 < 200 else 4
        now_ms += chance.choice((0, 1, pace_ms, 2 * pace_ms))
        if chance.random() < 0.005:
            now_ms += chance.choice((2500, 4500, 6500))
        if now_ms >= next_tick_ms:
            next_tick_ms = now_ms + 200
            steps.append(tick(now_ms))
        symbol = chance.choice(symbols)
        best[symbol] += chance.choice((-1, 0, 0, 0, 0, 1))
        kind = chance.choice(("bookTicker", "bookTicker", "depth", "aggTrade"))
        if kind not in src:
            continue
        bid, ask = best[symbol], best[symbol] + chance.choice((1, 1, 1, 2))
        sizes = [chance.randint(1, 4000) / 1000 for _ in range(2 * LEVELS)]
        if kind == "bookTicker":
            steps.append(quote(now_ms, bid / 10, sizes[0], ask / 10, sizes[1], symbol=symbol))
        elif kind == "depth":
            bids = sorted(chance.sample(range(bid - 9, bid), LEVELS - 1), reverse=True)
            asks = sorted(chance.sample(range(ask + 1, ask + 10), LEVELS - 1))
            bid_px, ask_px = [px / 10 for px in (bid, *bids)], [px / 10 for px in (ask, *asks)]
            steps.append(depth(now_ms, (bid_px, sizes[:LEVELS], ask_px, sizes[LEVELS:]), symbol=symbol))
        else:
            side = chance.choice(("buy", "sell"))
            price = (ask if side == "buy" else bid) / 10
            steps.append(trade(now_ms, sizes[0], side, price, symbol=symbol, agg_trade_id=i))
    return steps
