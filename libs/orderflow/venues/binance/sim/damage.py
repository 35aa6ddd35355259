"""What faults do to the bytes of a frame: pure functions, and the ids that a frame carries."""

from __future__ import annotations

import re
from random import Random
from typing import Final

import msgspec

OVERSIZE_BYTES: Final = (8 << 20) + 65_536
"""A frame beyond what a careful client takes."""

_AGG_ID: Final = re.compile(rb'"a":(\d{1,19})')
_FIRST_ID: Final = re.compile(rb'"U":(\d{1,19})')
_FINAL_ID: Final = re.compile(rb'"u":(\d{1,19})')
_EVENT_TIME: Final = re.compile(rb'"E":(\d{1,15})')
_PRICE_AND_QTY: Final = re.compile(rb'("(?:p|q|nq)":)"[^"]*"')
_ENUM: Final = re.compile(rb'"st":\d+')
_BIDS: Final = b'"b":['
_GARBAGE_BYTES: Final = 200
_NESTING: Final = 5_000


class _Levels(msgspec.Struct):
    b: list[tuple[str, str]]
    a: list[tuple[str, str]]


class _Diff(msgspec.Struct):
    data: _Levels


_decode_levels = msgspec.json.Decoder(_Diff).decode


def ids_of(kind: str, payload: bytes) -> tuple[int | None, int | None]:
    """First and last id of a frame: aggTrade a..a, depth U..u, bookTicker u..u; None where there are none."""
    if kind == "aggTrade":
        first = last = _AGG_ID.search(payload)
    elif kind == "depth":
        first, last = _FIRST_ID.search(payload), _FINAL_ID.search(payload)
    elif kind == "bookTicker":
        first = last = _FINAL_ID.search(payload)
    else:
        return None, None
    return (int(first[1]), int(last[1])) if first and last else (None, None)


def truncated(payload: bytes, chance: Random) -> bytes:
    """The beginning of a frame, at least a byte short."""
    return payload[: chance.randrange(1, max(2, len(payload)))]


def garbage(payload: bytes, chance: Random) -> bytes:
    """Text that is no frame, though it may be JSON. Valid UTF-8, for a text message must be."""
    number = chance.randrange(6)
    if number == 0:
        return b"null"
    if number == 1:
        return b'{"stream":null,"data":[]}'
    if number == 2:
        return payload[: payload.find(b'"data":')] + b'"data":1e999}'
    if number == 3:
        return b"[" * _NESTING
    text = "".join(
        chr(chance.choice((chance.randrange(1, 127), 0x4E2D))) for _ in range(chance.randrange(1, _GARBAGE_BYTES))
    )
    return text.encode()


def oversize(payload: bytes) -> bytes:
    """The frame with a field that makes it longer than 8 MiB."""
    return with_field(payload, b'"pad":"' + b"x" * OVERSIZE_BYTES + b'"')


def with_field(payload: bytes, field: bytes) -> bytes:
    """The frame with one more field at the end of its data; unchanged where it has not the usual form."""
    return payload[:-2] + b"," + field + b"}}" if payload.endswith(b"}}") else payload


def unknown_enum(payload: bytes) -> bytes:
    """A value of `st` and a field that nobody knows; everything else stands."""
    return with_field(_ENUM.sub(b'"st":97', payload, 1), b'"zz":{"kind":"NOT_YET_KNOWN","levels":[1,"2"]}')


def shifted(payload: bytes, shift_ms: int) -> bytes:
    """The frame with another E."""
    return _EVENT_TIME.sub(lambda found: b'"E":%d' % max(1, int(found[1]) + shift_ms), payload, 1)


def spent_id(payload: bytes) -> bytes:
    """An aggTrade frame as the exchange sends it for an id that was spent without a fill."""
    return with_field(_PRICE_AND_QTY.sub(rb'\1"0"', payload), b'"X":"NA"')


def insurance(payload: bytes) -> bytes:
    """An aggTrade frame as a trade of the insurance fund."""
    return with_field(payload, b'"X":"INSURANCE_FUND"')


def crossing_price(payload: bytes) -> str | None:
    """The price of an ask in a diff: a bid there crosses the book. None where the diff sets no ask."""
    try:
        levels = _decode_levels(payload).data
    except msgspec.MsgspecError:
        return None
    asks = [price for price, qty in levels.a if float(qty) > 0.0]
    return max(asks, key=float, default=None)


def with_bid(payload: bytes, price: str, qty: str) -> bytes:
    """The diff with one more bid, unless it says something of that price itself: then that is the truth."""
    try:
        levels = _decode_levels(payload).data
    except msgspec.MsgspecError:
        return payload
    if any(float(bid) == float(price) for bid, _ in levels.b):
        return payload
    comma = b"," if levels.b else b""
    return payload.replace(_BIDS, _BIDS + f'["{price}","{qty}"]'.encode() + comma, 1)
