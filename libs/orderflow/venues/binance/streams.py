"""Names of Binance USD-M market streams: which socket carries them, how they are subscribed, what they mean."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Final, Literal, NamedTuple, TypeAlias

Route: TypeAlias = Literal["public", "market"]

DEPTH_STREAM: Final = "depth@100ms"

PUBLIC_STREAMS: Final = ("bookTicker", DEPTH_STREAM)
"""What order flow needs of the socket `/public`."""
MARKET_STREAMS: Final = ("aggTrade",)
"""What order flow needs of the socket `/market`."""
OPTIONAL_MARKET_STREAMS: Final = ("markPrice@1s", "forceOrder")

STREAMS_BY_ROUTE: Final[dict[Route, tuple[str, ...]]] = {"public": PUBLIC_STREAMS, "market": MARKET_STREAMS}

MAX_STREAMS_PER_CONNECTION: Final = 1024
"""One more closes the socket, with all that was subscribed."""
NAMES_PER_SUBSCRIBE: Final = 200
"""Names of one SUBSCRIBE message that the exchange is known to take."""
MESSAGES_PER_SEC: Final = 10
"""Messages that the exchange takes from a client; beyond, it closes the socket."""

TIMED_KINDS: Final = frozenset({"aggTrade", "bookTicker", "depth", "forceOrder"})
"""Kinds whose `T` is the matching engine's time of the event (that of markPrice is the next funding, of kline its end)."""

_PUBLIC_KINDS: Final = frozenset(
    {"bookTicker", "!bookTicker", "depth", "depth5", "depth10", "depth20", "rpiDepth", "trade"}
)
_MARKET_KINDS: Final = frozenset(
    {
        "aggTrade",
        "markPrice",
        "!markPrice",
        "kline",
        "continuousKline",
        "indexPriceKline",
        "markPriceKline",
        "miniTicker",
        "!miniTicker",
        "ticker",
        "!ticker",
        "forceOrder",
        "!forceOrder",
        "compositeIndex",
        "!contractInfo",
        "!assetIndex",
        "tradingSession",
    }
)
KNOWN_KINDS: Final = _PUBLIC_KINDS | _MARKET_KINDS


class StreamName(NamedTuple):
    """A stream's name, taken apart: `btcusdt@depth@100ms` is BTCUSDT, depth, depth@100ms."""

    symbol: str | None
    """Upper case; None for streams over all symbols."""
    kind: str
    """Without speed and interval; with the `!` of streams over all symbols."""
    stream: str
    """Everything behind the symbol, as it is subscribed."""


def parse_stream(name: str) -> StreamName:
    """Take a stream's name apart. Total: an unknown name gives a kind outside `KNOWN_KINDS`."""
    head, at, stream = name.partition("@")
    if not at or head.startswith("!"):
        return StreamName(None, head, name)
    kind = stream.partition("@")[0].partition("_")[0]
    return StreamName(head.upper() or None, kind, stream)


def stream_name(symbol: str, stream: str) -> str:
    """`BTCUSDT`, `depth@100ms` -> `btcusdt@depth@100ms`: upper case would be acknowledged and stay silent."""
    return f"{symbol.lower()}@{stream}"


def route_of_stream(stream: str) -> Route:
    """The socket that carries a stream (given with or without its symbol).

    Raises
    ------
    ValueError
        The stream is not known: on the wrong socket it would be acknowledged and stay silent.
    """
    for name in (stream, f"x@{stream}"):
        kind = parse_stream(name).kind
        if kind in _PUBLIC_KINDS:
            return "public"
        if kind in _MARKET_KINDS:
            return "market"
    raise ValueError(f"stream {stream!r} is not known; one of {', '.join(sorted(KNOWN_KINDS))} is expected")


def stream_names(symbols: Sequence[str], streams: Sequence[str]) -> list[str]:
    """Names of `streams` of each symbol, stream by stream.

    Raises
    ------
    ValueError
        More than one connection takes.
    """
    names = [stream_name(symbol, stream) for stream in streams for symbol in symbols]
    if len(names) > MAX_STREAMS_PER_CONNECTION:
        raise ValueError(
            f"{len(names)} streams on one connection: the exchange takes {MAX_STREAMS_PER_CONNECTION}; "
            "subscribe fewer symbols, or shard them with INGEST_SHARD"
        )
    return names


def subscribe_messages(names: Sequence[str], first_id: int = 1, method: str = "SUBSCRIBE") -> Iterator[dict[str, Any]]:
    """SUBSCRIBE (or UNSUBSCRIBE) messages for `names`, batched; the sender spaces them by `1 / MESSAGES_PER_SEC`."""
    for number, start in enumerate(range(0, len(names), NAMES_PER_SUBSCRIBE), first_id):
        yield {"method": method, "params": list(names[start : start + NAMES_PER_SUBSCRIBE]), "id": number}
