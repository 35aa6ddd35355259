"""What the server asks of a market, whether recorded or synthetic."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import msgspec

from orderflow.venues.binance.streams import Route

if TYPE_CHECKING:
    from orderflow.venues.binance.sim.history import TradeHistory
    from orderflow.venues.binance.sim.hub import Hub
    from orderflow.venues.binance.sim.instruments import Instrument


class Frame(NamedTuple):
    """A combined-stream frame on its way to whoever subscribed its stream on its route."""

    route: Route
    stream: str
    payload: bytes
    at_ms: int = -1
    """When the exchange sends it, in its own time since it opened; -1: now."""


class SnapshotUnavailable(Exception):
    """No snapshot can be given now; the exchange answers 503 and the client asks again."""


class MarketSource(Protocol):
    """A market: publishes frames through the hub, and knows what REST is asked."""

    name: str
    trades: TradeHistory

    @property
    def instruments(self) -> dict[str, Instrument]:
        """Symbol -> its filters, sorted by symbol."""
        ...

    @property
    def done(self) -> bool:
        """Whether everything has been published that ever will be."""
        ...

    def server_time_ms(self) -> int: ...

    def elapsed_ms(self) -> int:
        """Market time since the exchange opened, which is the time of faults. Never goes back."""
        ...

    def book(self, symbol: str, limit: int) -> bytes | None:
        """What `snapshot` would give without waiting; None where it would have to wait."""
        ...

    async def snapshot(self, symbol: str, limit: int) -> bytes:
        """Body of `GET /fapi/v1/depth` for a symbol of `instruments`.

        Raises
        ------
        SnapshotUnavailable
            There is none now.
        """
        ...

    async def run(self, hub: Hub) -> None:
        """Publish until there is nothing more, or until cancelled."""
        ...

    def status(self) -> dict[str, Any]:
        """What a person or a supervisor wants to know, ready for JSON."""
        ...


def limited_book(body: bytes, limit: int) -> bytes:
    """Body of a depth answer, cut to `limit` levels a side; as it is where it holds no more."""
    answer = msgspec.json.decode(body)
    if max(len(answer["bids"]), len(answer["asks"])) <= limit:
        return body
    for side in ("bids", "asks"):
        answer[side] = answer[side][:limit]
    return msgspec.json.encode(answer)
