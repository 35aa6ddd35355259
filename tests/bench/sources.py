"""What the sources of frames cost: a recorded file, and the simulated exchange."""

from __future__ import annotations

import asyncio
import time

from orderflow.capture import frames
from orderflow.venues.binance.sim.server import ServerOptions, SimExchange
from orderflow.venues.binance.sim.synthetic import SyntheticSource
from websockets.asyncio.client import connect

from tests.bench.data import Dataset
from tests.bench.stages import Figure

EXCHANGE_SEC = 2.0


def capture_figures(data: Dataset) -> list[Figure]:
    """Lines of a recorded file per second of processor time."""
    begun = time.process_time()
    count = sum(1 for _ in frames(data.path))
    rate = count / (time.process_time() - begun)
    return [Figure("capture.read", rate, "lines/s", "more", 300_000.0, f"{count:,} lines")]


def exchange_figures(_: Dataset) -> list[Figure]:
    """Share of a processor that the exchange's default market takes at its own pace, a client of its quotes included."""
    return [Figure("simexchange.share", asyncio.run(_exchange_share()), "%", aim=10.0)]


async def _exchange_share() -> float:
    source = SyntheticSource(1)
    streams = "/".join(f"{symbol.lower()}@bookTicker" for symbol in source.instruments)
    async with (
        SimExchange(source, ServerOptions(port=0)) as exchange,
        connect(f"{exchange.ws_url}/public/stream?streams={streams}", max_size=None) as socket,
    ):
        await socket.recv()
        begun, used = time.monotonic(), time.process_time()
        while time.monotonic() - begun < EXCHANGE_SEC:
            await socket.recv()
        return 100.0 * (time.process_time() - used) / (time.monotonic() - begun)
