"""The ids that a frame covers, from its bytes, for accounts of what was dropped and for handing streams over. Pure."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, TypeAlias

import msgspec

from orderflow.venues.binance.frames import UNDECODABLE, Id

IdSpan: TypeAlias = tuple[int, int]
"""First and last id, both included."""


class _Trade(msgspec.Struct):
    agg_trade_id: Id = msgspec.field(name="a")


class _Quote(msgspec.Struct):
    update_id: Id = msgspec.field(name="u")


class _Diff(msgspec.Struct):
    first_id: Id = msgspec.field(name="U")
    final_id: Id = msgspec.field(name="u")


class _Event(msgspec.Struct):
    event_time_ms: Id = msgspec.field(name="E")


class _TradeFrame(msgspec.Struct):
    data: _Trade


class _QuoteFrame(msgspec.Struct):
    data: _Quote


class _DiffFrame(msgspec.Struct):
    data: _Diff


class _EventFrame(msgspec.Struct):
    data: _Event


_decode_trade = msgspec.json.Decoder(_TradeFrame).decode
_decode_quote = msgspec.json.Decoder(_QuoteFrame).decode
_decode_diff = msgspec.json.Decoder(_DiffFrame).decode
_decode_event = msgspec.json.Decoder(_EventFrame).decode


def _trade(frame: bytes) -> IdSpan:
    agg_trade_id = _decode_trade(frame).data.agg_trade_id
    return agg_trade_id, agg_trade_id


def _quote(frame: bytes) -> IdSpan:
    update_id = _decode_quote(frame).data.update_id
    return update_id, update_id


def _diff(frame: bytes) -> IdSpan:
    diff = _decode_diff(frame).data
    return diff.first_id, diff.final_id


_BY_KIND: Final[dict[str, Callable[[bytes], IdSpan]]] = {"aggTrade": _trade, "bookTicker": _quote, "depth": _diff}


def ids_of(kind: str, frame: bytes) -> IdSpan | None:
    """`a`..`a` of an aggTrade, `u`..`u` of a bookTicker, `U`..`u` of a diff; None for others and for damaged ones."""
    reader = _BY_KIND.get(kind)
    if reader is None:
        return None
    try:
        return reader(frame)
    except UNDECODABLE:
        return None


def place_of(kind: str, frame: bytes) -> int | None:
    """Where a frame stands in its stream: the newest id, or `E` where a stream has none; None for damaged frames."""
    if kind in _BY_KIND:
        span = ids_of(kind, frame)
        return None if span is None else span[1]
    try:
        return _decode_event(frame).data.event_time_ms
    except UNDECODABLE:
        return None
