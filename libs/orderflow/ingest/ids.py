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


class _TradeFrame(msgspec.Struct):
    data: _Trade


class _QuoteFrame(msgspec.Struct):
    data: _Quote


class _DiffFrame(msgspec.Struct):
    data: _Diff


_decode_trade = msgspec.json.Decoder(_TradeFrame).decode
_decode_quote = msgspec.json.Decoder(_QuoteFrame).decode
_decode_diff = msgspec.json.Decoder(_DiffFrame).decode


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
