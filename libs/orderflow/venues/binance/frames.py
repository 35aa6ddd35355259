"""What Binance sends, as types: combined-stream frames of the sockets, bodies of REST answers.

Numbers that the exchange sends as strings are converted in C (decode with `strict=False`). Unknown fields are skipped
and enums are plain strings, since the exchange adds to both without notice. Field names say what the exchange's letters
mean; prices are quote units, quantities base units, times milliseconds since the epoch.

`route_of` is for the recorder, which does not parse: it reads what routing needs from the bytes.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Annotated, Any, Final, NamedTuple, TypeAlias

import msgspec
from msgspec import Meta, Raw, Struct, field

from orderflow.venues.binance.streams import TIMED_KINDS, StreamName, parse_stream

Id: TypeAlias = Annotated[int, Meta(ge=0, le=2**63 - 1)]
_LATEST_MS: Final = 253_402_300_799_999
TimeMs: TypeAlias = Annotated[int, Meta(ge=1, le=_LATEST_MS)]
"""Up to the year 9999, so that microseconds are refused instead of taken for milliseconds."""
Level: TypeAlias = tuple[Annotated[float, Meta(gt=0, lt=1e300)], Annotated[float, Meta(ge=0, lt=1e300)]]
"""(price, quantity); neither NaN nor infinite passes the bounds."""

TRADE_KINDS: Final = ("MARKET", "INSURANCE_FUND", "NA")
MARKETS: Final = (1, 2)
"""USD-M, COIN-M."""

UNDECODABLE: Final = (msgspec.MsgspecError, UnicodeDecodeError, RecursionError, OverflowError)
"""What decoding raises on bytes that are not the frame they should be."""

ENVELOPE_PREFIX: Final = b'{"stream":"'
_NAME_AT: Final = len(ENVELOPE_PREFIX)
_NAME_END: Final = _NAME_AT + 128
_TIME_KEY: Final = b'"T":'
_DIGITS: Final = 15
_ABSENT: Final = Raw()


class AggTrade(Struct, kw_only=True, gc=False):
    """aggTrade: fills of one taker order at one price within 100 ms."""

    event: str = field(name="e", default="")
    event_ts_ms: TimeMs | None = field(name="E", default=None)
    agg_trade_id: Id = field(name="a")
    symbol: str = field(name="s")
    price: float = field(name="p")
    qty: float = field(name="q")
    """Includes retail price improvement orders."""
    ts_ms: TimeMs = field(name="T")
    buyer_is_maker: bool | None = field(name="m", default=None)
    """True: the aggressor sold."""
    kind: str | None = field(name="X", default=None)
    """One of `TRADE_KINDS`; not sent on every stream."""
    market: Any = field(name="st", default=1)
    """One of `MARKETS`; of any type, for it is only looked at."""


class BookTicker(Struct, kw_only=True, gc=False):
    """bookTicker: best bid and ask, in real time."""

    event: str = field(name="e", default="")
    update_id: Id = field(name="u")
    symbol: str = field(name="s")
    bid: float = field(name="b")
    bid_qty: float = field(name="B")
    ask: float = field(name="a")
    ask_qty: float = field(name="A")
    ts_ms: TimeMs = field(name="T")
    event_ts_ms: TimeMs | None = field(name="E", default=None)
    market: Any = field(name="st", default=1)


class DepthUpdate(Struct, kw_only=True):
    """depthUpdate: levels that changed, absolute quantities, 0 for a level that is gone."""

    event: str = field(name="e", default="")
    event_ts_ms: TimeMs | None = field(name="E", default=None)
    ts_ms: TimeMs = field(name="T")
    symbol: str = field(name="s")
    first_id: Id = field(name="U")
    final_id: Id = field(name="u")
    prev_id: Id = field(name="pu")
    bids: list[Level] = field(name="b")
    asks: list[Level] = field(name="a")
    market: Any = field(name="st", default=1)


class MarkPrice(Struct, kw_only=True, gc=False):
    """markPriceUpdate. Its `T` is the next funding time, so its only time of event is E."""

    event: str = field(name="e", default="")
    event_ts_ms: TimeMs = field(name="E")
    symbol: str = field(name="s")
    mark_price: float = field(name="p")
    index_price: float | None = field(name="i", default=None)
    funding_rate: float | None = field(name="r", default=None)
    next_funding_ts_ms: Annotated[int, Meta(ge=0, le=_LATEST_MS)] | None = field(name="T", default=None)


class LiquidationOrder(Struct, kw_only=True, gc=False):
    """`o` of a forceOrder."""

    symbol: str = field(name="s")
    side: str = field(name="S")
    qty: float = field(name="q")
    price: float = field(name="p")
    average_price: float | None = field(name="ap", default=None)
    status: str = field(name="X", default="")
    filled_qty: float | None = field(name="z", default=None)
    ts_ms: TimeMs = field(name="T")
    pair: str | None = field(name="ps", default=None)


class ForceOrder(Struct, kw_only=True):
    """forceOrder: the largest liquidation of a second. `ps` and `st` come inside `o` or beside it: both are taken."""

    event: str = field(name="e", default="")
    event_ts_ms: TimeMs | None = field(name="E", default=None)
    order: LiquidationOrder = field(name="o")
    pair: str | None = field(name="ps", default=None)


class AggTradeFrame(Struct):
    stream: str
    data: AggTrade


class BookTickerFrame(Struct):
    stream: str
    data: BookTicker


class DepthFrame(Struct):
    stream: str
    data: DepthUpdate


class MarkPriceFrame(Struct):
    stream: str
    data: MarkPrice


class ForceOrderFrame(Struct):
    stream: str
    data: ForceOrder


class DepthSnapshot(Struct, kw_only=True):
    """Body of GET /fapi/v1/depth; `symbol` is added by recorders of captures."""

    symbol: str | None = None
    last_update_id: Id = field(name="lastUpdateId")
    event_ts_ms: TimeMs | None = field(name="E", default=None)
    ts_ms: TimeMs | None = field(name="T", default=None)
    bids: list[Level]
    asks: list[Level]


class RestAggTrade(Struct, kw_only=True, gc=False):
    """An element of GET /fapi/v1/aggTrades."""

    agg_trade_id: Id = field(name="a")
    price: float = field(name="p")
    qty: float = field(name="q")
    ts_ms: TimeMs = field(name="T")
    buyer_is_maker: bool | None = field(name="m", default=None)
    kind: str | None = field(name="X", default=None)


class ServerTime(Struct):
    """Body of GET /fapi/v1/time."""

    server_time_ms: TimeMs = field(name="serverTime")


class Envelope(Struct):
    """A frame of which only the stream is looked at. Replies to requests have an `id` or an `error` instead."""

    stream: str | None = None
    data: Raw = _ABSENT
    id: Raw = _ABSENT
    error: Raw = _ABSENT
    code: Raw = _ABSENT

    @property
    def is_reply(self) -> bool:
        """Whether this answers a SUBSCRIBE or the like."""
        return self.stream is None and bool(bytes(self.id) or bytes(self.error) or bytes(self.code))


decode_agg_trade = msgspec.json.Decoder(AggTradeFrame, strict=False).decode
decode_book_ticker = msgspec.json.Decoder(BookTickerFrame, strict=False).decode
decode_depth = msgspec.json.Decoder(DepthFrame, strict=False).decode
decode_mark_price = msgspec.json.Decoder(MarkPriceFrame, strict=False).decode
decode_force_order = msgspec.json.Decoder(ForceOrderFrame, strict=False).decode
decode_snapshot = msgspec.json.Decoder(DepthSnapshot, strict=False).decode
decode_rest_agg_trades = msgspec.json.Decoder(list[RestAggTrade], strict=False).decode
decode_server_time = msgspec.json.Decoder(ServerTime, strict=False).decode
decode_envelope = msgspec.json.Decoder(Envelope, strict=False).decode


class FrameRoute(NamedTuple):
    """What the recorder needs to know of a frame."""

    symbol: str | None
    """Upper case; None where the frame belongs to none."""
    kind: str
    """`aggTrade`, `bookTicker`, `depth`, ...; `reply` for answers to requests; `garbage` for what is no frame."""
    ts_ms: int | None
    """T of the kinds in `TIMED_KINDS`, milliseconds; None for others, and where it is missing."""


REPLY: Final = FrameRoute(None, "reply", None)
GARBAGE: Final = FrameRoute(None, "garbage", None)


def route_of(frame: bytes) -> FrameRoute:
    """Symbol, kind and T of a combined-stream frame, from the bytes alone where it has the exchange's usual form.

    Never raises. A frame of the usual form that is damaged inside may pass: whoever decodes it finds out.
    """
    if frame.startswith(ENVELOPE_PREFIX) and frame.endswith(b"}}"):
        end = frame.find(b'"', _NAME_AT, _NAME_END)
        name = _name_of(frame[_NAME_AT:end]) if end > 0 else None
        if name is not None:
            if name.kind not in TIMED_KINDS:
                return FrameRoute(name.symbol, name.kind, None)
            ts_ms = _time_after(frame, end)
            if ts_ms is not None:
                return FrameRoute(name.symbol, name.kind, ts_ms)
    return route_of_parsed(frame)


def route_of_parsed(frame: bytes) -> FrameRoute:
    """The same by decoding the frame, whatever its form. Never raises."""
    try:
        envelope = decode_envelope(frame)
    except UNDECODABLE:
        return GARBAGE
    if envelope.stream is None:
        return REPLY if envelope.is_reply else GARBAGE
    name = parse_stream(envelope.stream)
    if not name.kind or not bytes(envelope.data):
        return GARBAGE
    return FrameRoute(name.symbol, name.kind, _parsed_time(envelope.data) if name.kind in TIMED_KINDS else None)


def _time_after(frame: bytes, start: int) -> int | None:
    """The integer behind the first `"T":`; None where there is none of at most 15 digits."""
    at = frame.find(_TIME_KEY, start)
    if at < 0:
        return None
    begin = at + len(_TIME_KEY)
    digits = frame[begin : begin + _DIGITS + 1]
    for mark in (b",", b"}"):
        end = digits.find(mark)
        if end > 0 and digits[:end].isdigit() and 0 < int(digits[:end]) <= _LATEST_MS:
            return int(digits[:end])
    return None


class _Timed(Struct):
    ts_ms: TimeMs | None = field(name="T", default=None)


class _MaybeTimed(_Timed):
    order: _Timed | None = field(name="o", default=None)


_decode_timed = msgspec.json.Decoder(_MaybeTimed, strict=False).decode


def _parsed_time(data: Raw) -> int | None:
    try:
        timed = _decode_timed(data)
    except UNDECODABLE:
        return None
    return timed.ts_ms if timed.ts_ms is not None or timed.order is None else timed.order.ts_ms


@lru_cache(maxsize=4096)
def _name_of(name: bytes) -> StreamName | None:
    """A stream's name from its bytes in JSON; None where those need a parser, or are not UTF-8."""
    if b"\\" in name:
        return None
    try:
        parsed = parse_stream(name.decode())
    except UnicodeDecodeError:
        return None
    return parsed if parsed.kind else None
