"""The synthetic market as a source of the simulated exchange: simulated time paced to the wall clock."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Sequence
from typing import Any, Final

from orderflow.venues.binance.sim.history import TradeHistory
from orderflow.venues.binance.sim.hub import Hub
from orderflow.venues.binance.sim.instruments import Instrument
from orderflow.venues.binance.sim.market import DEFAULT_SYMBOLS, MarketFrame, SyntheticConfig, SyntheticMarket
from orderflow.venues.binance.sim.source import Frame
from orderflow.venues.binance.streams import Route

logger = logging.getLogger(__name__)

PACE_SEC: Final = 0.005
"""A frame leaves at most this long after its E, and then some for the scheduler."""
STEP_MOST_MS: Final = 200
"""Market time of one batch: after a pause of the process the sockets must be served while it catches up."""
LAG_WARNED_MS: Final = 2_000
HISTORY_MS: Final = 60_000
HISTORY_QUOTES: Final = 20_000
"""The market lives so long, or for so many quotes, before the exchange opens: there are trades to ask for at once."""


class SyntheticSource:
    """Publishes a `SyntheticMarket` as time passes; never done."""

    name = "synthetic"
    done = False

    def __init__(
        self,
        seed: int,
        symbols: Sequence[str] = DEFAULT_SYMBOLS,
        *,
        config: SyntheticConfig | None = None,
        speed: float = 1.0,
        start_ms: int | None = None,
    ) -> None:
        """
        Parameters
        ----------
        speed : simulated seconds a second.
        start_ms : simulated time at which the exchange opens; the wall clock's if left out.

        Raises
        ------
        ConfigError
            `symbols` are none, or hold what is no symbol.
        """
        config = config or SyntheticConfig()
        quotes_per_ms = config.activity * max(1, len(symbols)) / 1_000
        history_ms = int(min(HISTORY_MS, HISTORY_QUOTES / quotes_per_ms))
        opens_ms = _now_ms() if start_ms is None else start_ms
        self.trades = TradeHistory()
        self._market = SyntheticMarket(seed, symbols, start_ms=opens_ms - history_ms, config=config)
        self._seed = seed
        self._speed = speed
        self._start_ms = start_ms
        self._opened_ms = opens_ms
        self._frames = 0
        self._lag_ms = 0
        self._lag_most_ms = 0
        self._routes: dict[str, Route] = {}
        self._instruments = {spec.symbol: spec.instrument() for spec in self._market.specs}
        self._remember(self._market.advance(opens_ms))

    @property
    def instruments(self) -> dict[str, Instrument]:
        return self._instruments

    def server_time_ms(self) -> int:
        return self._market.now_ms

    def elapsed_ms(self) -> int:
        return max(0, self._market.now_ms - self._opened_ms)

    def book(self, symbol: str, limit: int) -> bytes:
        return self._market.snapshot(symbol, limit)

    async def snapshot(self, symbol: str, limit: int) -> bytes:
        return self._market.snapshot(symbol, limit)

    async def run(self, hub: Hub) -> None:
        """Publish what is due, every few milliseconds. A socket that does not keep up is cut, as by the exchange."""
        begun_ms = _now_ms() if self._start_ms is None else self._start_ms
        begun = time.monotonic()
        self._remember(self._market.advance(begun_ms))
        self._opened_ms = begun_ms
        while True:
            due_ms = begun_ms + int((time.monotonic() - begun) * 1_000 * self._speed)
            now_ms = self._market.now_ms
            self._note_lag(due_ms - now_ms)
            frames = self._market.advance(min(due_ms, now_ms + STEP_MOST_MS))
            self._frames += len(frames)
            hub.publish(self._routed(frames))
            self._remember(frames)
            hub.cut_slow()
            await asyncio.sleep(PACE_SEC if due_ms - now_ms <= STEP_MOST_MS else 0)

    def _note_lag(self, lag_ms: int) -> None:
        if lag_ms > LAG_WARNED_MS >= self._lag_most_ms:
            logger.warning("the synthetic market is %d ms behind: lower the activity or the number of symbols", lag_ms)
        self._lag_ms = lag_ms
        self._lag_most_ms = max(self._lag_most_ms, lag_ms)

    def status(self) -> dict[str, Any]:
        config = self._market.config
        return {
            "seed": self._seed,
            "start_ms": self._market.start_ms,
            "symbols": list(self._instruments),
            "speed": self._speed,
            "activity": config.activity,
            "sessions": config.sessions,
            "predictability": config.predictability,
            "lead_ms": config.lead_ms,
            "horizon_ms": config.horizon_ms,
            "frames": self._frames,
            "lag_ms": self._lag_ms,
            "lag_most_ms": self._lag_most_ms,
        }

    def _routed(self, frames: list[MarketFrame]) -> list[Frame]:
        routes, opened_ms = self._routes, self._opened_ms
        routed = []
        for stream, payload, event_ms in frames:
            route = routes.get(stream)
            if route is None:
                route = routes[stream] = _route_of(stream)
            routed.append(Frame(route, stream, payload, event_ms - opened_ms))
        return routed

    def _remember(self, frames: list[MarketFrame]) -> None:
        for stream, payload, _ in frames:
            if stream.endswith("@aggTrade"):
                self.trades.add(stream.partition("@")[0].upper(), payload)


def _now_ms() -> int:
    return time.time_ns() // 1_000_000


def _route_of(stream: str) -> Route:
    kind = stream.partition("@")[2]
    return "public" if kind.startswith(("bookTicker", "depth")) else "market"
