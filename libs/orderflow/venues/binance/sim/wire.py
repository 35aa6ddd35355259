"""The frames of one symbol of the synthetic market, as the exchange writes them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Final, TypeAlias

from orderflow.venues.binance.sim.specs import SymbolSpec, units

MarketFrame: TypeAlias = tuple[str, bytes, int]
"""(stream, combined-stream frame, E in milliseconds)."""

DEPTH_MS: Final = 100
FUNDING_MS: Final = 8 * 3_600_000
MARK_SLOW_MS: Final = 3_000
"""Between two frames of the mark price stream without a suffix."""
_TEXTS_KEPT: Final = 20_000
_BANKRUPTCY_BPS: Final = 120
"""A liquidation order's limit lies so far beyond the price that it is filled at."""


class Aggregate:
    """An aggTrade being gathered: fills of one taker side at one price."""

    __slots__ = ("first_id", "last_id", "lots", "taker_sold", "tick", "ts_ms")

    def __init__(self, tick: int, taker_sold: bool, lots: int, first_id: int, last_id: int, ts_ms: int) -> None:
        self.tick = tick
        self.taker_sold = taker_sold
        self.lots = lots
        self.first_id = first_id
        self.last_id = last_id
        self.ts_ms = ts_ms


class Liquidation:
    """A taker order that the exchange sent for somebody whose margin was used up."""

    __slots__ = ("last_lots", "lots", "notional", "sold", "ts_ms")

    def __init__(self, sold: bool, fills: Sequence[tuple[int, int]], ts_ms: int) -> None:
        self.sold = sold
        self.lots = sum(lots for _, lots in fills)
        self.last_lots = fills[-1][1]
        self.notional = sum(tick * lots for tick, lots in fills)
        """In ticks times lots."""
        self.ts_ms = ts_ms


class FrameWriter:
    """Turns integer ticks and lots into frames. All times are milliseconds since the epoch."""

    def __init__(self, spec: SymbolSpec) -> None:
        self._symbol = spec.symbol
        self._pair = spec.symbol.partition("_")[0]
        self._tick_units = units(spec.tick, spec.price_decimals)
        self._step_units = units(spec.step, spec.qty_decimals)
        self._price_decimals = spec.price_decimals
        self._qty_decimals = spec.qty_decimals
        self._price_texts: dict[int, str] = {}
        self._bid_lots = self._ask_lots = -1
        self._bid_qty = self._ask_qty = ""
        name = spec.symbol.lower()
        self.quote_stream = f"{name}@bookTicker"
        self.depth_stream = f"{name}@depth@{DEPTH_MS}ms"
        self.agg_stream = f"{name}@aggTrade"
        self.mark_stream = f"{name}@markPrice"
        self.force_stream = f"{name}@forceOrder"
        self._quote_head = f'{{"stream":"{self.quote_stream}","data":{{"e":"bookTicker","u":'
        self._quote_names = f',"s":"{self._symbol}","ps":"{self._pair}","b":"'

    def quote(self, update_id: int, bid: int, bid_lots: int, ask: int, ask_lots: int, at_ms: int) -> MarketFrame:
        if bid_lots != self._bid_lots:
            self._bid_lots = bid_lots
            self._bid_qty = self.qty(bid_lots)
        if ask_lots != self._ask_lots:
            self._ask_lots = ask_lots
            self._ask_qty = self.qty(ask_lots)
        texts = self._price_texts
        frame = (
            f'{self._quote_head}{update_id}{self._quote_names}{texts.get(bid) or self.px(bid)}","B":"{self._bid_qty}",'
            f'"a":"{texts.get(ask) or self.px(ask)}","A":"{self._ask_qty}","T":{at_ms},"E":{at_ms + 1},"st":1}}}}'
        )
        return self.quote_stream, frame.encode(), at_ms + 1

    def depth(
        self,
        ids: tuple[int, int, int],
        changed_ms: int,
        event_ms: int,
        bids: Iterable[tuple[int, int]],
        asks: Iterable[tuple[int, int]],
    ) -> MarketFrame:
        """`ids` are U, u, pu; levels are (tick, lots), 0 lots for one that is gone."""
        first, last, previous = ids
        frame = (
            f'{{"stream":"{self.depth_stream}","data":{{"e":"depthUpdate","E":{event_ms},'
            f'"T":{changed_ms},"s":"{self._symbol}","ps":"{self._pair}","U":{first},'
            f'"u":{last},"pu":{previous},"b":[{self._levels(bids)}],"a":[{self._levels(asks)}],"st":1}}}}'
        )
        return self.depth_stream, frame.encode(), event_ms

    def aggregate(self, trade: Aggregate, agg_id: int, event_ms: int) -> MarketFrame:
        quantity = self.qty(trade.lots)
        frame = (
            f'{{"stream":"{self.agg_stream}","data":{{"e":"aggTrade","E":{event_ms},"a":{agg_id},'
            f'"s":"{self._symbol}","p":"{self.px(trade.tick)}","q":"{quantity}","nq":"{quantity}",'
            f'"f":{trade.first_id},"l":{trade.last_id},"T":{trade.ts_ms},'
            f'"m":{"true" if trade.taker_sold else "false"},"st":1}}}}'
        )
        return self.agg_stream, frame.encode(), event_ms

    def mark(self, bid: int, ask: int, event_ms: int) -> list[MarketFrame]:
        """Mark price: the mid; the stream without a suffix every 3 s."""
        mid = (bid + ask) * self._tick_units * 10 ** (8 - self._price_decimals) // 2
        mark, index = decimal(mid, 8), decimal(mid - mid // 5_000, 8)
        data = (
            f'{{"e":"markPriceUpdate","E":{event_ms},"s":"{self._symbol}","p":"{mark}","ap":"{mark}",'
            f'"P":"{index}","i":"{index}","r":"0.00010000","T":{(event_ms // FUNDING_MS + 1) * FUNDING_MS},"st":1}}'
        )
        streams = [f"{self.mark_stream}@1s"]
        if event_ms % MARK_SLOW_MS == 0:
            streams.append(self.mark_stream)
        return [(stream, f'{{"stream":"{stream}","data":{data}}}'.encode(), event_ms) for stream in streams]

    def force(self, order: Liquidation, event_ms: int) -> MarketFrame:
        """A liquidation, filled in one go at the average price `ap`; `p` is its limit."""
        average = order.notional * self._tick_units // order.lots
        mean_tick = order.notional // order.lots
        beyond = 1 + mean_tick * _BANKRUPTCY_BPS // 10_000
        limit = max(1, mean_tick - beyond) if order.sold else mean_tick + beyond
        quantity = self.qty(order.lots)
        frame = (
            f'{{"stream":"{self.force_stream}","data":{{"e":"forceOrder","E":{event_ms},"o":{{"s":"{self._symbol}",'
            f'"S":"{"SELL" if order.sold else "BUY"}","o":"LIMIT","f":"IOC","q":"{quantity}","p":"{self.px(limit)}",'
            f'"ap":"{decimal(average, self._price_decimals)}","X":"FILLED","l":"{self.qty(order.last_lots)}",'
            f'"z":"{quantity}","T":{order.ts_ms},"ps":"{self._pair}","st":1}}}}}}'
        )
        return self.force_stream, frame.encode(), event_ms

    def snapshot(
        self,
        last_update_id: int,
        changed_ms: int,
        at_ms: int,
        bids: Iterable[tuple[int, int]],
        asks: Iterable[tuple[int, int]],
    ) -> bytes:
        """Body of `GET /fapi/v1/depth`."""
        return (
            f'{{"lastUpdateId":{last_update_id},"E":{at_ms},"T":{changed_ms},'
            f'"bids":[{self._levels(bids)}],"asks":[{self._levels(asks)}]}}'
        ).encode()

    def _levels(self, levels: Iterable[tuple[int, int]]) -> str:
        texts = self._price_texts
        return ",".join([f'["{texts.get(tick) or self.px(tick)}","{self.qty(lots)}"]' for tick, lots in levels])

    def px(self, tick: int) -> str:
        text = self._price_texts.get(tick)
        if text is None:
            if len(self._price_texts) >= _TEXTS_KEPT:
                self._price_texts.clear()
            text = self._price_texts[tick] = decimal(tick * self._tick_units, self._price_decimals)
        return text

    def qty(self, lots: int) -> str:
        return decimal(lots * self._step_units, self._qty_decimals)


def decimal(number: int, decimals: int) -> str:
    """`845511`, 1 -> `84551.1`."""
    text = str(number)
    if not decimals:
        return text
    if len(text) <= decimals:
        text = text.zfill(decimals + 1)
    return f"{text[:-decimals]}.{text[-decimals:]}"
