"""The loop of virtual time, and what the exchange without sockets does on it."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from orderflow.ingest.seams import SocketClosed
from orderflow.venues.binance.sim.faults import FaultEngine, FaultPlan, parse_faults
from orderflow.venues.binance.sim.market import START_MS, SyntheticConfig
from orderflow.venues.binance.sim.virtual import (
    SteppedMarket,
    VirtualClock,
    VirtualConnector,
    VirtualExchange,
    VirtualHttp,
    VirtualSocket,
)

from tests.storm.virtual_loop import DeadlockError, LivelockError, run

PUBLIC = "ws://exchange/public/stream"
MARKET = "ws://exchange/market/stream"


# The loop


async def elapse(virtual_sec: float) -> None:
    """Let simulated time pass: the loop's clock moves on, and nobody waits."""
    await asyncio.sleep(virtual_sec)


def test_time_passes_without_waiting_and_in_order() -> None:
    async def main() -> list[tuple[float, str]]:
        loop = asyncio.get_running_loop()
        seen: list[tuple[float, str]] = []

        async def note(name: str, sec: float) -> None:
            await asyncio.sleep(sec)
            seen.append((round(loop.time(), 6), name))

        await asyncio.gather(note("day", 86_400.0), note("hour", 3_600.0), note("now", 0.0))
        return seen

    assert run(main()) == [(0.0, "now"), (3_600.0, "hour"), (86_400.0, "day")]


def test_who_waits_for_nothing_is_named() -> None:
    async def wait_for_ever() -> None:
        await asyncio.Event().wait()

    with pytest.raises(DeadlockError, match="wait_for_ever"):
        run(wait_for_ever())


def test_a_program_that_does_not_get_on_is_ended() -> None:
    async def spin() -> None:
        while True:
            await asyncio.sleep(0)

    with pytest.raises(LivelockError, match="spin"):
        run(spin())


def test_threads_are_refused() -> None:
    async def main() -> None:
        await asyncio.to_thread(print)

    with pytest.raises(RuntimeError, match="thread"):
        run(main())


# The exchange


def on_exchange(scenario: Callable[[VirtualExchange], Awaitable[Any]], faults: str = "") -> Any:
    """Run a scenario against the exchange of two symbols with the given faults."""

    async def main() -> Any:
        market = SteppedMarket(3, ("BTCUSDT", "ETHUSDT"), config=SyntheticConfig(activity=5.0), start_ms=START_MS)
        engine = FaultEngine(FaultPlan(1, parse_faults(faults)))
        exchange = VirtualExchange(market, engine, 3, open_ms=START_MS)
        running = asyncio.create_task(exchange.run())
        try:
            return await scenario(exchange)
        finally:
            running.cancel()

    return run(main())


async def subscribed(exchange: VirtualExchange, url: str, *streams: str) -> VirtualSocket:
    """A connection, past its acknowledgement."""
    socket = await VirtualConnector(exchange, 20.0).connect(url)
    await socket.send(json.dumps({"method": "SUBSCRIBE", "params": streams, "id": 1}))
    assert json.loads(await socket.recv()) == {"result": None, "id": 1}
    return socket


async def until_closed(socket: VirtualSocket) -> tuple[float, int]:
    """(loop time, code) of its end."""
    async with asyncio.timeout(600):
        while True:
            try:
                await socket.recv()
            except SocketClosed as error:
                return asyncio.get_running_loop().time(), error.code


def test_streams_come_on_their_own_route_alone() -> None:
    async def scenario(exchange: VirtualExchange) -> bytes:
        right = await subscribed(exchange, PUBLIC, "btcusdt@depth@100ms")
        wrong = await subscribed(exchange, MARKET, "btcusdt@depth@100ms")
        frame = await right.recv()
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(30):
                await wrong.recv()
        return frame

    assert on_exchange(scenario).startswith(b'{"stream":"btcusdt@depth@100ms"')


def test_too_many_messages_close_the_connection_with_1008() -> None:
    async def scenario(exchange: VirtualExchange) -> tuple[float, int]:
        socket = await VirtualConnector(exchange, 20.0).connect(PUBLIC)
        for number in range(40):
            await socket.send(json.dumps({"method": "LIST_SUBSCRIPTIONS", "id": number}))
        return await until_closed(socket)

    assert on_exchange(scenario)[1] == 1008


def test_a_half_open_connection_ends_by_the_clients_own_pings() -> None:
    async def scenario(exchange: VirtualExchange) -> tuple[float, int]:
        return await until_closed(await subscribed(exchange, PUBLIC, "btcusdt@bookTicker"))

    at_sec, code = on_exchange(scenario, "half_open@5s")
    assert code == 1011
    assert 40.0 <= at_sec < 41.0


@pytest.mark.parametrize(
    ("faults", "code"),
    [
        ("close_1006@5s", 1006),
        ("close_1008@5s", 1008),
        ("life_cut@5s", 1001),
        ("oversize@5s:symbol=BTCUSDT,stream=depth", 1009),
    ],
)
def test_ends_have_their_codes(faults: str, code: int) -> None:
    async def scenario(exchange: VirtualExchange) -> tuple[float, int]:
        return await until_closed(await subscribed(exchange, PUBLIC, "btcusdt@bookTicker", "btcusdt@depth@100ms"))

    at_sec, found = on_exchange(scenario, faults)
    assert found == code
    assert 5.0 <= at_sec < 8.0


def test_connections_are_refused_for_a_while() -> None:
    async def scenario(exchange: VirtualExchange) -> None:
        connector = VirtualConnector(exchange, 20.0)
        with pytest.raises(ConnectionError, match="HTTP 503"):
            await connector.connect(PUBLIC)
        with pytest.raises(ConnectionError, match="HTTP 404"):
            await connector.connect("ws://exchange/nowhere")
        await elapse(10.0)
        await connector.connect(PUBLIC)

    on_exchange(scenario, "refuse_connect@0s+5s")


def test_rest_has_the_book_and_the_faults() -> None:
    async def scenario(exchange: VirtualExchange) -> tuple[int, int, dict[str, Any]]:
        http = VirtualHttp(exchange)
        banned = await http.get("http://exchange/fapi/v1/time", 1 << 20)
        await elapse(10.0)
        with pytest.raises(ValueError, match="more than 100 bytes"):
            await http.get("http://exchange/fapi/v1/depth?symbol=BTCUSDT&limit=100", 100)
        answer = await http.get("http://exchange/fapi/v1/depth?symbol=BTCUSDT&limit=5", 1 << 20)
        assert int(answer.headers["x-mbx-used-weight-1m"]) > 0
        return banned.status, answer.status, json.loads(answer.body)

    banned, status, book = on_exchange(scenario, "rest_418@0s+5s")
    assert (banned, status, len(book["bids"])) == (418, 200, 5)


def test_the_clients_clock_jumps_and_comes_back() -> None:
    async def scenario(exchange: VirtualExchange) -> list[int]:
        clock = VirtualClock(exchange)
        found = []
        for _ in range(3):
            found.append(clock.time_ns() // 1_000_000 - START_MS - exchange.now_ms)
            await elapse(10.0)
        return found

    assert on_exchange(scenario, "local_clock_jump@5s+10s:value=-30000") == [0, -30_000, 0]
