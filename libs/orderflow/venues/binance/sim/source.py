"""What the server asks of a market, whether recorded or synthetic."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from orderflow.venues.binance.sim.history import TradeHistory
    from orderflow.venues.binance.sim.hub import Hub
    from orderflow.venues.binance.sim.instruments import Instrument


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
