"""The synthetic market as a source of the simulated exchange: simulated time paced to the wall clock."""

from __future__ import annotations

import asyncio
import time
from typing import Any, Final

from orderflow.venues.binance.sim.history import TradeHistory
from orderflow.venues.binance.sim.hub import Frame, Hub, Route
from orderflow.venues.binance.sim.instruments import Instrument
from orderflow.venues.binance.sim.market import MarketFrame, SyntheticMarket

PACE_SEC: Final = 0.005
"""A frame leaves at most this long after its E, and then some for the scheduler."""
STEP_MOST_MS: Final = 200
"""Market time of one batch: after a pause of the process the sockets must be served while it catches up."""
HISTORY_MS: Final = 60_000
"""The market lives this long before the exchange opens, so that there are trades to ask for."""


class SyntheticSource:
    """Publishes a `SyntheticMarket` as time passes; never done."""

    name = "synthetic"
    done = False

    def __init__(self, market: SyntheticMarket, *, seed: int, speed: float = 1.0, history_ms: int = HISTORY_MS) -> None:
        """`market` stands at the time at which the history begins; the exchange opens `history_ms` later."""
        self.trades = TradeHistory()
        self._market = market
        self._seed = seed
        self._speed = speed
        self._frames = 0
        self._lag_most_ms = 0
        self._routes: dict[str, Route] = {}
        self._instruments = {spec.symbol: spec.instrument() for spec in market.specs}
        self._remember(market.advance(market.now_ms + history_ms))

    @property
    def instruments(self) -> dict[str, Instrument]:
        return self._instruments

    def server_time_ms(self) -> int:
        return self._market.now_ms

    async def snapshot(self, symbol: str, limit: int) -> bytes:
        return self._market.snapshot(symbol, limit)

    async def run(self, hub: Hub) -> None:
        """Publish what is due, every few milliseconds. A socket that does not keep up is cut, as by the exchange."""
        begun_ms = self._market.now_ms
        begun = time.monotonic()
        while True:
            due_ms = begun_ms + int((time.monotonic() - begun) * 1_000 * self._speed)
            now_ms = self._market.now_ms
            self._lag_most_ms = max(self._lag_most_ms, due_ms - now_ms)
            frames = self._market.advance(min(due_ms, now_ms + STEP_MOST_MS))
            self._frames += len(frames)
            hub.publish(self._routed(frames))
            self._remember(frames)
            hub.cut_slow()
            await asyncio.sleep(PACE_SEC if due_ms - now_ms <= STEP_MOST_MS else 0)

    def status(self) -> dict[str, Any]:
        config = self._market.config
        return {
            "seed": self._seed,
            "symbols": list(self._instruments),
            "speed": self._speed,
            "activity": config.activity,
            "predictability": config.predictability,
            "lead_ms": config.lead_ms,
            "horizon_ms": config.horizon_ms,
            "frames": self._frames,
            "lag_most_ms": self._lag_most_ms,
        }

    def _routed(self, frames: list[MarketFrame]) -> list[Frame]:
        routes = self._routes
        routed = []
        for stream, payload, _ in frames:
            route = routes.get(stream)
            if route is None:
                route = routes[stream] = _route_of(stream)
            routed.append(Frame(route, stream, payload))
        return routed

    def _remember(self, frames: list[MarketFrame]) -> None:
        for stream, payload, _ in frames:
            if stream.endswith("@aggTrade"):
                self.trades.add(stream.partition("@")[0].upper(), payload)


def _route_of(stream: str) -> Route:
    kind = stream.partition("@")[2]
    return "public" if kind.startswith(("bookTicker", "depth")) else "market"
