"""The simulated exchange over real sockets: protocol, REST, playback of a real capture, the synthetic market, process."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import signal
import socket
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any
from urllib.parse import quote as quote_url

import aiohttp
import pytest
from orderflow.capture import frames, rest_body, rest_symbol, stream_of
from orderflow.errors import CaptureError, ConfigError, OrderflowError
from orderflow.paths import ROOT
from orderflow.venues.binance.sim.faults import FaultPlan, parse_faults
from orderflow.venues.binance.sim.history import TradeHistory
from orderflow.venues.binance.sim.hub import Hub, SocketRules
from orderflow.venues.binance.sim.instruments import Instrument
from orderflow.venues.binance.sim.market import SyntheticConfig, SyntheticMarket
from orderflow.venues.binance.sim.playback import CaptureSource, PlaybackConfig
from orderflow.venues.binance.sim.server import ServerOptions, SimExchange
from orderflow.venues.binance.sim.source import Frame, MarketSource, SnapshotUnavailable
from orderflow.venues.binance.sim.synthetic import SyntheticSource
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed, InvalidMessage, InvalidStatus
from websockets.protocol import State

from services.simexchange.__main__ import main, parser, plan_of

ALTS = "usdm_4alts_20210722_realagg.gz"
WAIT_SEC = 120.0
QUIET_SEC = 0.1
"""What is to stay silent is listened to for so long after a socket that must speak has spoken."""


class ManualMarket:
    """A market that says only what the test publishes."""

    name = "manual"
    done = False

    def __init__(self) -> None:
        self.trades = TradeHistory()
        self.now_ms = 0

    @property
    def instruments(self) -> dict[str, Instrument]:
        return {name: Instrument(name, "0.10", "0.001", 2, 3) for name in ("BTCUSDT", "BTCUSDT_261225", "币安USDT")}

    def server_time_ms(self) -> int:
        return 1_790_770_782_215

    def elapsed_ms(self) -> int:
        return self.now_ms

    def book(self, symbol: str, limit: int) -> bytes | None:
        return b'{"lastUpdateId":%d,"E":100,"bids":[["1","1"],["0.9","1"]],"asks":[]}' % self.now_ms

    async def snapshot(self, symbol: str, limit: int) -> bytes:
        if limit == 1000:
            raise SnapshotUnavailable("not now")
        return b'{"lastUpdateId":%d}' % limit

    async def run(self, hub: Hub) -> None:
        return

    def status(self) -> dict[str, Any]:
        return {}


class FailingMarket(ManualMarket):
    async def run(self, hub: Hub) -> None:
        raise CaptureError("the file has changed")


@asynccontextmanager
async def exchange(source: MarketSource | None = None, **options: Any) -> AsyncIterator[SimExchange]:
    async with SimExchange(source or ManualMarket(), ServerOptions(**options)) as running:
        yield running


def client(running: SimExchange, path: str, **options: Any) -> connect:
    return connect(running.ws_url + path, max_size=None, **options)


async def ask(ws: ClientConnection, **request: Any) -> Any:
    await ws.send(json.dumps(request))
    return json.loads(await asyncio.wait_for(ws.recv(), WAIT_SEC))


async def eventually(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + WAIT_SEC
    while not condition():
        assert time.monotonic() < deadline, f"timed out: {what}"
        await asyncio.sleep(0.005)


async def silent(ws: ClientConnection) -> bool:
    try:
        await asyncio.wait_for(ws.recv(), QUIET_SEC)
    except TimeoutError:
        return True
    return False


def quote(number: int, stream: str = "btcusdt@bookTicker") -> bytes:
    return b'{"stream":"%s","data":{"e":"bookTicker","u":%d}}' % (stream.encode(), number)


# Sockets


async def test_control_protocol_over_the_wire() -> None:
    async with exchange() as running, client(running, "/public/stream") as ws:
        assert await ask(ws, method="SUBSCRIBE", params=["btcusdt@bookTicker"], id=1) == {"result": None, "id": 1}
        assert await ask(ws, method="LIST_SUBSCRIPTIONS", id=2) == {"result": ["btcusdt@bookTicker"], "id": 2}
        assert await ask(ws, method="GET_PROPERTY", params=["combined"], id=3) == {"result": True, "id": 3}
        assert (await ask(ws, method="NOPE", id=4))["error"]["code"] == 2
        running.hub.publish([Frame("public", "btcusdt@bookTicker", quote(1))])
        assert await ws.recv() == quote(1).decode()
        assert await ask(ws, method="SET_PROPERTY", params=["combined", False], id=5) == {"result": None, "id": 5}
        running.hub.publish([Frame("public", "btcusdt@bookTicker", quote(2))])
        assert json.loads(await ws.recv()) == {"e": "bookTicker", "u": 2}
        await ask(ws, method="UNSUBSCRIBE", params=["btcusdt@bookTicker"], id=6)
        running.hub.publish([Frame("public", "btcusdt@bookTicker", quote(3))])
        assert await silent(ws)
        assert running.hub.counts.sent["public"] == 2
        assert running.hub.counts.skipped["public"] == 1
        assert running.status()["errors"]["control"] == 1


@pytest.mark.parametrize(
    ("path", "combined"),
    [
        ("/public/stream?streams=btcusdt@bookTicker/ethusdt@bookTicker", True),
        ("/public/ws/btcusdt@bookTicker/ethusdt@bookTicker", False),
        ("/stream?streams=btcusdt@bookTicker/ethusdt@bookTicker", True),
        ("/ws/btcusdt@bookTicker/ethusdt@bookTicker", False),
    ],
)
async def test_streams_in_the_url(path: str, combined: bool) -> None:
    async with exchange() as running, client(running, path) as ws:
        await eventually(lambda: running.hub.subscriptions == 2, "both streams subscribed")
        running.hub.publish([Frame("public", "ethusdt@bookTicker", quote(1, "ethusdt@bookTicker"))])
        body = json.loads(await ws.recv())
        assert ("stream" in body) is combined
        assert (body["data"] if combined else body)["u"] == 1


async def test_an_acknowledgement_proves_nothing() -> None:
    frame = Frame("market", "btcusdt@aggTrade", b'{"stream":"btcusdt@aggTrade","data":{}}')
    wrong = ["btcusdt@aggTrade", "BTCUSDT@bookTicker", "nosuch@bookTicker", "btcusdt@depth@250ms"]
    async with (
        exchange() as running,
        client(running, "/public/stream") as public,
        client(running, "/stream") as unrouted,
        client(running, "/market/stream") as market,
    ):
        for ws in (public, unrouted):
            assert await ask(ws, method="SUBSCRIBE", params=wrong, id=1) == {"result": None, "id": 1}
            assert (await ask(ws, method="LIST_SUBSCRIPTIONS", id=2))["result"] == wrong
        await ask(market, method="SUBSCRIBE", params=["btcusdt@aggTrade", "btcusdt@bookTicker"], id=1)
        running.hub.publish([Frame("public", "btcusdt@bookTicker", quote(1)), frame])
        assert await market.recv() == frame.payload.decode(), "the first it gets is no public frame"
        assert await silent(public) and await silent(unrouted)


async def test_the_1025th_stream_ends_the_connection() -> None:
    async with exchange() as running, client(running, "/market/stream") as ws:
        for batch in range(5):
            names = [f"s{batch}x{n}@aggTrade" for n in range(204)]
            assert await ask(ws, method="SUBSCRIBE", params=names, id=batch) == {"result": None, "id": batch}
        assert await ask(ws, method="SUBSCRIBE", params=[f"t{n}@aggTrade" for n in range(4)], id=8) == {
            "result": None,
            "id": 8,
        }
        assert await ask(ws, method="SUBSCRIBE", params=["one@more"], id=9) == {
            "error": {"code": 4, "msg": "Too many subscriptions"}
        }
        with pytest.raises(ConnectionClosed):
            await ws.recv()
        assert (ws.close_code, ws.close_reason) == (1008, "Invalid request")
        assert running.hub.counts.closed == {"too_many_subscriptions": 1}
        assert running.hub.subscriptions == 0


async def test_of_40_messages_15_are_answered() -> None:
    async with exchange() as running, client(running, "/public/stream") as ws:
        for number in range(40):
            await ws.send(json.dumps({"method": "LIST_SUBSCRIPTIONS", "id": number}))
        answers = []
        with pytest.raises(ConnectionClosed):
            while True:
                answers.append(json.loads(await ws.recv())["id"])
        assert answers == list(range(len(answers)))
        assert 15 <= len(answers) < 40, "a token comes back every tenth of a second meanwhile"
        assert (ws.close_code, ws.close_reason) == (1008, "Too many requests")


@asynccontextmanager
async def raw_client(
    running: SimExchange, path: str
) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    """A websocket by hand, with a small receive buffer, which answers and reads only what the test reads."""
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    sock.setblocking(False)
    await asyncio.get_running_loop().sock_connect(sock, ("127.0.0.1", running.port))
    reader, writer = await asyncio.open_connection(sock=sock, limit=4096)
    writer.write(
        f"GET {path} HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
        "Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\nSec-WebSocket-Version: 13\r\n\r\n".encode()
    )
    try:
        head = await reader.readuntil(b"\r\n\r\n")
        assert b" 101 " in head
        assert b"permessage-deflate" not in head
        yield reader, writer
    finally:
        writer.close()


async def test_server_pings_carry_the_time_and_want_an_answer() -> None:
    rules = SocketRules(ping_sec=0.05, pong_within_sec=0.2)
    begun_ms = time.time_ns() // 1_000_000
    async with exchange(rules=rules) as running, raw_client(running, "/public/stream") as (reader, _):
        head = await asyncio.wait_for(reader.readexactly(2), WAIT_SEC)
        assert head[0] == 0x89, "a ping"
        payload = await reader.readexactly(head[1])
        assert begun_ms <= int(payload) <= time.time() * 1_000
        await eventually(lambda: running.hub.counts.closed == {"no_pong": 1}, "the silent client is cut")


async def test_a_client_that_answers_pings_stays_until_the_end_of_life() -> None:
    rules = SocketRules(ping_sec=0.02, pong_within_sec=0.1, life_sec=0.5)
    begun = time.monotonic()
    async with exchange(rules=rules) as running, client(running, "/public/stream") as ws:
        with pytest.raises(ConnectionClosed):
            await asyncio.wait_for(ws.recv(), WAIT_SEC)
        assert ws.close_code == 1001
        assert time.monotonic() - begun > 0.4
        assert running.hub.counts.closed == {"lifetime": 1}


async def test_client_pings_are_answered() -> None:
    async with exchange() as running, client(running, "/public/stream") as ws:
        await asyncio.wait_for(await ws.ping(b"hello"), WAIT_SEC)


async def fill(running: SimExchange, size: int) -> None:
    await eventually(lambda: running.hub.subscriptions == 1, "subscribed")
    payload = quote(1) + b" " * 10_000
    running.hub.publish([Frame("public", "btcusdt@bookTicker", payload)] * (size // len(payload)))


async def test_a_market_that_does_not_wait_cuts_a_client_that_lags() -> None:
    rules = SocketRules(buffer_most_bytes=1 << 20)
    async with exchange(rules=rules) as running, raw_client(running, "/public/ws/btcusdt@bookTicker"):
        await fill(running, 4 << 20)
        running.hub.cut_slow()
        assert running.hub.counts.closed == {"slow": 1}
        assert not running.hub.clients


async def test_draining_waits_for_the_reader_and_gives_up_on_one_that_never_reads() -> None:
    rules = SocketRules(stall_sec=0.1)
    async with exchange(rules=rules) as running, raw_client(running, "/public/ws/btcusdt@bookTicker") as (reader, _):
        await fill(running, 4 << 20)
        draining = asyncio.create_task(running.hub.drain())
        for _ in range(3):
            await reader.readexactly(4096)
            assert not draining.done()
        await asyncio.wait_for(draining, WAIT_SEC)
        assert running.hub.counts.closed == {"stalled": 1}


async def test_stopping_closes_sockets_with_1001() -> None:
    async with exchange() as running:
        ws = await client(running, "/public/stream")
        await running.stop()
        with pytest.raises(ConnectionClosed):
            await ws.recv()
        assert ws.close_code == 1001


async def test_a_failing_market_is_reported() -> None:
    async with exchange(FailingMarket()) as running:
        with pytest.raises(CaptureError, match="has changed"):
            await asyncio.wait_for(running.wait_failed(), WAIT_SEC)
        assert running.status()["errors"]["source"] == "the file has changed"
        assert running.status()["ready"] is False


# REST


@asynccontextmanager
async def rest(running: SimExchange) -> AsyncIterator[Callable[[str], Awaitable[tuple[int, Any, dict[str, str]]]]]:
    async with aiohttp.ClientSession() as session:

        async def get(path: str) -> tuple[int, Any, dict[str, str]]:
            async with session.get(running.url + path) as answer:
                return answer.status, json.loads(await answer.read()), dict(answer.headers)

        yield get


@pytest.mark.parametrize(
    ("path", "status", "code", "weight"),
    [
        ("/fapi/v1/depth?symbol=BTCUSDT&limit=7", 400, -4021, 1),
        ("/fapi/v1/depth?symbol=NOPE&limit=100", 400, -1121, 5),
        ("/fapi/v1/depth?limit=100", 400, -1102, 5),
        ("/fapi/v1/depth?symbol=BTCUSDT&limit=x", 400, -1100, 1),
        ("/fapi/v1/depth?symbol=BTCUSDT&limit=1000", 503, -1001, 20),
        ("/fapi/v1/aggTrades?symbol=BTCUSDT&limit=1001", 400, -1130, 20),
        ("/fapi/v1/aggTrades?symbol=BTCUSDT&startTime=0&endTime=3600000", 400, -1127, 20),
        ("/fapi/v1/nothing", 404, -5000, 0),
    ],
)
async def test_refusals(path: str, status: int, code: int, weight: int) -> None:
    async with exchange() as running, rest(running) as get:
        answer = await get(path)
        assert (answer[0], answer[1]["code"]) == (status, code)
        if weight:
            assert answer[2]["X-MBX-USED-WEIGHT-1M"] == str(weight), "refused requests cost weight too"
        if code == -4021:
            assert answer[1]["msg"] == "7 is not valid depth limit"


async def test_weights_add_up_and_run_out() -> None:
    # A minute may turn between two requests; the counter then begins anew, so a minute's rest must be long enough.
    while time.time() % 60 > 55:
        await asyncio.sleep(0.1)
    async with exchange(weight_per_minute=60) as running, rest(running) as get:
        used = []
        for limit, weight in ((5, 2), (50, 2), (100, 5), (500, 10)):
            status, body, headers = await get(f"/fapi/v1/depth?symbol=BTCUSDT&limit={limit}")
            assert (status, body) == (200, {"lastUpdateId": limit})
            used.append(weight)
            assert headers["X-MBX-USED-WEIGHT-1M"] == str(sum(used))
        assert (await get("/fapi/v1/depth?symbol=BTCUSDT"))[1] == {"lastUpdateId": 500}, "the default limit"
        assert (await get("/fapi/v1/ping"))[1] == {}
        assert (await get("/fapi/v1/time"))[1] == {"serverTime": 1_790_770_782_215}
        await get("/fapi/v1/aggTrades?symbol=BTCUSDT")
        status, body, headers = await get("/fapi/v1/aggTrades?symbol=BTCUSDT")
        assert (status, body["code"]) == (429, -1003)
        assert 1 <= int(headers["Retry-After"]) <= 61
        assert running.status()["errors"]["rest"] == {"429/-1003": 1}


# Playback


def recorded(path: Path, route: str) -> list[tuple[bytes, bytes]]:
    """(stream, frame) of a route, in the order of the file, without what the tests do not subscribe."""
    named = [(stream_of(frame) or b"", frame) for _, conn, frame in frames(path) if conn == route]
    return [each for each in named if b"@kline" not in each[0]]


class Recorder:
    """A client of both routes that writes down what arrives, in the order of arrival."""

    def __init__(self, running: SimExchange, path: Path) -> None:
        self.running = running
        self.frames: dict[str, list[bytes]] = {"public": [], "market": []}
        self.arrived: list[tuple[str, bytes]] = []
        self.streams = {
            route: sorted({stream.decode() for stream, _ in recorded(path, route)}) for route in ("public", "market")
        }

    async def listen(self, route: str) -> None:
        async with client(self.running, f"/{route}/stream") as ws:
            await ask(ws, method="SUBSCRIBE", params=self.streams[route], id=1)
            while True:
                frame = await ws.recv(decode=False)
                self.frames[route].append(frame)
                self.arrived.append((route, frame))

    @asynccontextmanager
    async def listening(self) -> AsyncIterator[None]:
        tasks = [asyncio.create_task(self.listen(route)) for route in self.frames]
        try:
            yield
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)


async def fetch(session: aiohttp.ClientSession, running: SimExchange, symbol: str) -> bytes:
    async with session.get(f"{running.url}/fapi/v1/depth?symbol={symbol}&limit=1000") as answer:
        assert answer.status == 200
        return await answer.read()


@pytest.mark.capture
async def test_playback_flat_out_is_the_file_byte_for_byte(captures: Path) -> None:
    path = captures / ALTS
    source = CaptureSource(path, config=PlaybackConfig(speed=None))
    snapshots = {rest_symbol(frame): rest_body(frame) for _, conn, frame in frames(path) if conn == "rest"}
    async with exchange(source) as running, aiohttp.ClientSession() as session:
        recorder = Recorder(running, path)

        async def snapshot(symbol: str) -> None:
            body = await fetch(session, running, symbol)
            recorder.arrived.append(("rest", body))

        async with recorder.listening():
            await asyncio.gather(*(snapshot(symbol) for symbol in source.instruments))
            expected = {route: [frame for _, frame in recorded(path, route)] for route in recorder.frames}
            await eventually(lambda: source.done, "played to the end")
            await eventually(
                lambda: all(len(recorder.frames[route]) >= len(expected[route]) for route in expected), "all received"
            )
            assert recorder.frames == expected

    # Around each snapshot the public frames and the snapshots come in exactly the file's order.
    order = [
        rest_body(frame) if conn == "rest" else frame for _, conn, frame in frames(path) if conn in ("public", "rest")
    ]
    assert [frame for route, frame in recorder.arrived if route != "market"] == order
    assert set(snapshots.values()) == {frame for route, frame in recorder.arrived if route == "rest"}

    status = running.status()
    assert status["done"] is True
    assert status["frames_sent"] == {"public": len(expected["public"]), "market": len(expected["market"])}
    assert status["frames_unsubscribed"] == {"public": 0, "market": 67}, "the klines"
    assert status["capture"]["snapshots"]["recorded_answers"] == 4
    assert status["capture"]["snapshots"]["unsettled"] == 0


@pytest.mark.capture
async def test_after_playback_rest_knows_book_trades_and_time(captures: Path) -> None:
    path = captures / ALTS
    config = PlaybackConfig(speed=None, start_grace_sec=0, rest_wait_sec=0)
    source = CaptureSource(path, symbols=["SUSHIUSDT"], config=config)
    async with (
        exchange(source) as running,
        rest(running) as get,
        client(running, "/public/stream", max_queue=None) as ws,
    ):
        await ask(ws, method="SUBSCRIBE", params=["sushiusdt@bookTicker"], id=1)
        await eventually(lambda: source.done, "played to the end")
        assert source.counts.unrequested_snapshots == 1
        assert source.counts.other_symbols > 500

        payloads = [json.loads(frame)["data"] for stream, frame in recorded(path, "public") if b"sushi" in stream]
        last = [each for each in payloads if each["e"] == "depthUpdate"][-1]
        quotes = [each for each in payloads if each["e"] == "bookTicker" and each["u"] <= last["u"]]
        best = max(quotes, key=lambda each: each["u"])
        _, body, _ = await get("/fapi/v1/depth?symbol=SUSHIUSDT&limit=20")
        assert body["lastUpdateId"] == last["u"]
        assert (body["bids"][0], body["asks"][0]) == ([best["b"], best["B"]], [best["a"], best["A"]])
        assert len(body["bids"]) == len(body["asks"]) == 20

        trades = [
            json.loads(frame)["data"] for stream, frame in recorded(path, "market") if stream.startswith(b"sushi")
        ]
        _, rows, _ = await get(f"/fapi/v1/aggTrades?symbol=SUSHIUSDT&fromId={trades[3]['a']}&limit=2")
        keys = ("a", "p", "q", "f", "l", "T", "m")
        assert rows == [{key: trade[key] for key in keys} for trade in trades[3:5]]
        assert (await get(f"/fapi/v1/aggTrades?symbol=SUSHIUSDT&fromId={trades[-1]['a'] + 1}"))[1] == []
        assert (await get("/fapi/v1/aggTrades?symbol=SUSHIUSDT&fromId=1"))[1]["code"] == -4166

        newest = [
            json.loads(frame)["data"]["E"]
            for _, conn, frame in frames(path)
            if conn != "rest" and (stream_of(frame) or b"").startswith(b"sushi")
        ][-1]
        assert (await get("/fapi/v1/time"))[1] == {"serverTime": newest}
        info = (await get("/fapi/v1/exchangeInfo"))[1]
        assert [each["symbol"] for each in info["symbols"]] == ["SUSHIUSDT"]
        assert (await get("/fapi/v1/depth?symbol=CTKUSDT&limit=5"))[1]["code"] == -1121
        assert (await get("/sim/status"))[1]["capture"]["position"] == 1539


@pytest.mark.capture
async def test_a_snapshot_is_held_until_playback_reaches_it(captures: Path) -> None:
    source = CaptureSource(captures / ALTS, symbols=["CTKUSDT"], config=PlaybackConfig(speed=None, hold_sec=0.1))
    async with exchange(source) as running, rest(running) as get:
        status, body, _ = await get("/fapi/v1/depth?symbol=CTKUSDT&limit=1000")
        assert (status, body["code"]) == (503, -1001), "nobody has subscribed, so nothing is played"
        assert source.counts.unavailable == 1


def ten_seconds(tmp_path: Path, step_ns: int = 100_000_000) -> Path:
    """A capture of one symbol, 100 frames, one every 100 ms, with a gap in the diffs before its second snapshot."""
    start_ns = 1_790_000_000_000_000_000
    lines = [b'%d rest {"symbol":"BTCUSDT","lastUpdateId":5,"bids":[["9.0","1"]],"asks":[["9.1","1"]]}' % start_ns]
    for number in range(100):
        u = 10 * (number + 1)
        previous = 5 if number == 50 else u - 10
        if number == 75:
            lines.append(
                b'%d rest {"symbol":"BTCUSDT","lastUpdateId":%d,"bids":[["8.0","7"]],"asks":[["9.1","1"]]}'
                % (start_ns + number * step_ns, u - 10)
            )
        lines.append(
            b'%d public {"stream":"btcusdt@depth@100ms","data":{"e":"depthUpdate","E":1,"U":%d,"u":%d,"pu":%d,"b":[],"a":[]}}'
            % (start_ns + number * step_ns, u - 5, u, previous)
        )
    path = tmp_path / "ten.txt"
    path.write_bytes(b"\n".join(lines) + b"\n")
    return path


async def test_playback_keeps_pace_and_counts_unsubscribed_frames(tmp_path: Path) -> None:
    config = PlaybackConfig(speed=120.0, start_grace_sec=0.05, rest_wait_sec=0)
    source = CaptureSource(ten_seconds(tmp_path, step_ns=600_000_000), config=config)
    async with exchange(source) as running, client(running, "/market/stream") as ws:
        assert not source.started
        await ask(ws, method="SUBSCRIBE", params=["btcusdt@aggTrade"], id=1)
        begun = time.monotonic()
        await eventually(
            lambda: source.done, "a minute played to its end, which at its own pace takes longer than is waited"
        )
        assert time.monotonic() - begun > 0.45, "and no faster"
        assert running.hub.counts.skipped == {"public": 100, "market": 0}


async def test_a_recorded_snapshot_heals_a_recorded_gap(tmp_path: Path) -> None:
    quick = {"settle_before_sec": 0.01, "settle_after_sec": 0.01}
    source = CaptureSource(ten_seconds(tmp_path), config=PlaybackConfig(speed=None, **quick))
    path = "/public/stream?streams=btcusdt@depth@100ms"
    async with exchange(source) as running, aiohttp.ClientSession() as session, client(running, path) as ws:
        first = json.loads(await fetch(session, running, "BTCUSDT"))
        assert first["lastUpdateId"] == 5
        second = asyncio.create_task(fetch_until(session, running, lambda body: body["bids"] == [["8.0", "7"]]))
        received = [json.loads(await asyncio.wait_for(ws.recv(), WAIT_SEC))["data"]["u"] for _ in range(100)]
        assert received == [10 * (number + 1) for number in range(100)]
        assert (await asyncio.wait_for(second, WAIT_SEC))["lastUpdateId"] >= 750


async def fetch_until(session: aiohttp.ClientSession, running: SimExchange, condition: Callable[[Any], bool]) -> Any:
    while True:
        body = json.loads(await fetch(session, running, "BTCUSDT"))
        if condition(body):
            return body


def test_a_symbol_that_the_capture_lacks_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"NOPE are not in .*BTCUSDT"):
        CaptureSource(ten_seconds(tmp_path), symbols=["NOPE"])


def test_a_recorded_snapshot_that_is_none_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "bad.txt"
    path.write_bytes(b'1 rest {"symbol":"BTCUSDT","code":-1003}\n')
    with pytest.raises(CaptureError, match="must hold lastUpdateId"):
        CaptureSource(path)


# The synthetic market, live


async def test_the_synthetic_market_is_published_as_it_is_made() -> None:
    start_ms = 1_790_000_060_000
    names = [f"btcusdt@{kind}" for kind in ("bookTicker", "depth@100ms")]
    config = SyntheticConfig(activity=200.0)
    source = SyntheticSource(5, ["BTCUSDT"], config=config, start_ms=start_ms)
    async with exchange(source) as running, client(running, f"/public/stream?streams={'/'.join(names)}") as ws:
        taken = [await asyncio.wait_for(ws.recv(decode=False), WAIT_SEC) for _ in range(100)]
    market = SyntheticMarket(5, ["BTCUSDT"], start_ms=start_ms - 60_000, config=config)
    made = [frame for stream, frame, _ in market.advance(start_ms + 60_000) if stream in names]
    begin = made.index(taken[0])
    assert made[begin : begin + 100] == taken


async def test_a_book_kept_over_sockets_passes_the_oracle_and_time_is_the_wall_s() -> None:
    symbols = ("BTCUSDT", "ETHUSDT")
    streams = "/".join(f"{symbol.lower()}@{kind}" for symbol in symbols for kind in ("bookTicker", "depth@100ms"))
    begun_ms = time.time_ns() // 1_000_000
    source = SyntheticSource(9, symbols, config=SyntheticConfig(activity=100.0))
    async with (
        exchange(source) as running,
        rest(running) as get,
        client(running, f"/public/stream?streams={streams}", max_queue=None) as ws,
    ):
        received = [json.loads(await ws.recv())["data"]]
        snapshots = {symbol: (await get(f"/fapi/v1/depth?symbol={symbol}&limit=1000"))[1] for symbol in symbols}
        server_ms = (await get("/fapi/v1/time"))[1]["serverTime"]
        assert begun_ms <= server_ms <= time.time() * 1_000
        depths = 0
        while depths < 30:
            received.append(json.loads(await asyncio.wait_for(ws.recv(), WAIT_SEC))["data"])
            depths += received[-1]["e"] == "depthUpdate"
        assert (await get("/fapi/v1/aggTrades?symbol=ETHUSDT&limit=3"))[1][-1]["a"] > 0
    for symbol in symbols:
        assert oracle_holds(snapshots[symbol], [each for each in received if each["s"] == symbol]) >= 8


def oracle_holds(snapshot: dict[str, Any], events: list[dict[str, Any]]) -> int:
    """Number of depth updates after which the book's best equal the quote of the greatest id not above theirs."""
    sides = {"b": dict(snapshot["bids"]), "a": dict(snapshot["asks"])}
    quotes = {each["u"]: each for each in events if each["e"] == "bookTicker"}
    previous = None
    checked = 0
    for event in (each for each in events if each["e"] == "depthUpdate" and each["u"] >= snapshot["lastUpdateId"]):
        if previous is None:
            assert event["U"] <= snapshot["lastUpdateId"] or event["pu"] == snapshot["lastUpdateId"]
        else:
            assert event["pu"] == previous
        previous = event["u"]
        for side, levels in sides.items():
            levels.update(event[side])
            for price in [price for price, qty in event[side] if float(qty) == 0]:
                levels.pop(price, None)
        known = [u for u in quotes if u <= event["u"]]
        if known:
            shown = quotes[max(known)]
            bid, ask = max(sides["b"], key=float), min(sides["a"], key=float)
            assert (bid, sides["b"][bid], ask, sides["a"][ask]) == (shown["b"], shown["B"], shown["a"], shown["A"])
            checked += 1
    return checked


# Faults: on the wire they look as in production


async def quoted(running: SimExchange, ws: ClientConnection, number: int) -> bool:
    """Whether a quote that the market publishes now is the next thing to arrive."""
    running.hub.publish([Frame("public", "btcusdt@bookTicker", quote(number))])
    return bool(await asyncio.wait_for(ws.recv(decode=False), WAIT_SEC) == quote(number))


QUOTES = "/public/stream?streams=btcusdt@bookTicker"


async def test_half_open_says_nothing_and_stays_open() -> None:
    async with exchange() as running, client(running, QUOTES, ping_interval=None, close_timeout=0.1) as dead:
        assert await quoted(running, dead, 1)
        running.add_faults(parse_faults("half_open@0s:route=public"))
        running.hub.publish([])
        assert running.hub.counts.closed == {} and len(running.hub.clients) == 1
        pong = await dead.ping()
        await dead.send('{"method":"LIST_SUBSCRIPTIONS","id":1}')
        async with client(running, QUOTES) as alive:
            await eventually(lambda: running.hub.subscriptions == 2, "a new connection is served")
            assert await quoted(running, alive, 2)
            await asyncio.wait_for(await alive.ping(), WAIT_SEC)
        assert await silent(dead) and not pong.done()
        assert dead.state is State.OPEN
        assert running.status()["frames_deaf"] == 1
        assert running.engine.status()["counts"] == {"half_open": {"deaf": 1}}


async def test_half_open_with_a_duration_takes_new_connections_too() -> None:
    async with exchange() as running:
        running.add_faults(parse_faults("half_open@0s+5s"))
        async with client(running, QUOTES, ping_interval=None, close_timeout=0.1) as ws:
            await eventually(lambda: len(running.hub.clients) == 1, "the handshake is answered")
            await ws.send('{"method":"LIST_SUBSCRIPTIONS","id":1}')
            assert await silent(ws)


async def test_a_half_open_socket_is_given_up_for_want_of_pongs() -> None:
    rules = SocketRules(ping_sec=0.05, pong_within_sec=0.2)
    async with exchange(rules=rules) as running, client(running, QUOTES, ping_interval=None):
        await eventually(lambda: running.hub.subscriptions == 1, "subscribed")
        running.add_faults(parse_faults("half_open@0s"))
        await eventually(lambda: running.hub.counts.closed == {"no_pong": 1}, "forgotten")


@pytest.mark.parametrize(
    ("kind", "code", "reason", "counted"),
    [
        ("close_1006", 1006, "", "fault"),
        ("close_1008", 1008, "Invalid request", "fault"),
        ("life_cut", 1001, "Connection lifetime reached", "lifetime"),
    ],
)
async def test_connections_of_one_route_end(kind: str, code: int, reason: str, counted: str) -> None:
    async with exchange() as running, client(running, QUOTES) as public, client(running, "/market/stream") as market:
        await eventually(lambda: len(running.hub.clients) == 2, "both connected")
        running.add_faults(parse_faults(f"{kind}@0s:route=market"))
        with pytest.raises(ConnectionClosed):
            await asyncio.wait_for(market.recv(), WAIT_SEC)
        assert (market.close_code, market.close_reason or "") == (code, reason)
        assert (market.protocol.close_rcvd is None) is (kind == "close_1006"), "a closing frame, or none"
        assert await quoted(running, public, 1)
        assert running.hub.counts.closed == {counted: 1}
        assert running.status()["faults"]["counts"] == {kind: {"closed": 1}}


async def test_pongs_are_muted_while_data_flows() -> None:
    async with exchange() as running, client(running, QUOTES, ping_interval=None) as ws:
        running.add_faults(parse_faults("mute_pongs@0s+1s:route=public"))
        pong = await ws.ping()
        assert await ask(ws, method="LIST_SUBSCRIPTIONS", id=1), "what came behind the ping is answered"
        assert await quoted(running, ws, 1)
        assert not pong.done()
        assert isinstance(running.source, ManualMarket)
        running.source.now_ms = 1_000
        await asyncio.wait_for(await ws.ping(), WAIT_SEC)


async def test_who_does_not_answer_a_server_ping_is_dropped() -> None:
    async with (
        exchange() as running,
        client(running, QUOTES) as ws,
        raw_client(running, "/public/stream") as (reader, _),
    ):
        await eventually(lambda: len(running.hub.clients) == 2, "both connected")
        running.add_faults(parse_faults("server_ping@0s:value=1000"))
        head = await asyncio.wait_for(reader.readexactly(2), WAIT_SEC)
        assert head[0] == 0x89, "a ping"
        await eventually(lambda: running.hub.counts.closed == {"no_pong": 1}, "the silent one is cut")
        assert await quoted(running, ws, 1)


async def test_connections_are_refused() -> None:
    async with exchange() as running:
        running.add_faults(parse_faults("refuse_connect@0s+1s:route=market; refuse_connect@0s+1s:route=public,value=0"))
        with pytest.raises(InvalidStatus) as refused:
            await client(running, "/market/stream")
        assert refused.value.response.status_code == 503
        with pytest.raises((ConnectionResetError, InvalidMessage)):
            await client(running, "/public/stream")
        assert running.status()["faults"]["counts"] == {"refuse_connect": {"refused": 2}}
        assert isinstance(running.source, ManualMarket)
        running.source.now_ms = 1_000
        async with client(running, QUOTES) as ws:
            await eventually(lambda: running.hub.subscriptions == 1, "accepted again")
            assert await quoted(running, ws, 1)


async def test_a_silent_stream_speaks_when_it_is_subscribed_anew() -> None:
    async with exchange() as running, client(running, QUOTES) as ws:
        await eventually(lambda: running.hub.subscriptions == 1, "subscribed")
        running.add_faults(parse_faults("silent_stream@0s+1m:stream=bookTicker,value=1"))
        running.hub.publish([Frame("public", "btcusdt@bookTicker", quote(1))])
        for number, method in enumerate(("UNSUBSCRIBE", "SUBSCRIBE"), 1):
            said = await ask(ws, method=method, params=["btcusdt@bookTicker"], id=number)
            assert said == {"result": None, "id": number}, "acknowledged, and nothing before it"
        assert await quoted(running, ws, 2)


async def test_an_oversize_frame_ends_a_careful_client() -> None:
    async with exchange() as running, connect(running.ws_url + QUOTES, max_size=8 << 20) as ws:
        await eventually(lambda: running.hub.subscriptions == 1, "subscribed")
        running.add_faults(parse_faults("oversize@0s"))
        running.hub.publish([Frame("public", "btcusdt@bookTicker", quote(1))])
        with pytest.raises(ConnectionClosed):
            await asyncio.wait_for(ws.recv(), WAIT_SEC)
        assert ws.protocol.close_sent is not None and ws.protocol.close_sent.code == 1009, "said by the client"


async def test_held_frames_come_when_time_has_passed_though_the_market_is_quiet() -> None:
    market = ManualMarket()
    async with exchange(market) as running, client(running, QUOTES) as ws:
        await eventually(lambda: running.hub.subscriptions == 1, "subscribed")
        running.add_faults(parse_faults("stall_route@0s+3s:route=public"))
        running.hub.publish([Frame("public", "btcusdt@bookTicker", quote(number), 0) for number in (1, 2)])
        assert await silent(ws)
        market.now_ms = 3_000
        received = [await asyncio.wait_for(ws.recv(decode=False), WAIT_SEC) for _ in range(2)]
        assert received == [quote(1), quote(2)]


@pytest.mark.parametrize(
    ("fault", "status", "code", "text", "retry_after"),
    [
        ("rest_418@0s+90s", 418, -1003, "Way too many requests; IP(127.0.0.1) banned until 1790770872215.", "90"),
        ("rest_429@0s+1500ms", 429, -1003, "Too many requests; current limit of IP(127.0.0.1) is 2400 requests", "2"),
        ("rest_451@0s+1s", 451, 0, "Service unavailable from a restricted location", None),
        ("rest_503@0s+1s", 503, -1001, "Internal error; unable to process your request. Please try again.", None),
        ("rest_503@0s+1s:value=1", 503, -1000, "Service Unavailable.", None),
        ("rest_503@0s+1s:value=3", 503, -1008, "Request throttled by system-level protection.", None),
    ],
)
async def test_requests_are_refused_as_by_the_exchange(
    fault: str, status: int, code: int, text: str, retry_after: str | None
) -> None:
    async with exchange() as running, rest(running) as get:
        running.add_faults(parse_faults(fault))
        answer = await get("/fapi/v1/depth?symbol=BTCUSDT&limit=100")
        assert (answer[0], answer[1]["code"], answer[2].get("Retry-After")) == (status, code, retry_after)
        assert answer[1]["msg"].startswith(text)
        assert ("X-MBX-USED-WEIGHT-1M" in answer[2]) is (status in (418, 429))
        assert running.status()["errors"]["rest"] == {f"{status}/{code}": 1}
        assert isinstance(running.source, ManualMarket)
        running.source.now_ms = 90_000
        assert (await get("/fapi/v1/depth?symbol=BTCUSDT&limit=100"))[0] == 200, "until the fault ends"


async def test_a_request_without_an_answer() -> None:
    async with exchange() as running, rest(running) as get:
        running.add_faults(parse_faults("rest_timeout@0s+200ms:stream=depth"))
        assert (await get("/fapi/v1/ping"))[0] == 200, "another endpoint"
        begun = time.monotonic()
        with pytest.raises(aiohttp.ServerDisconnectedError):
            await get("/fapi/v1/depth?symbol=BTCUSDT&limit=100")
        assert time.monotonic() - begun >= 0.2


async def test_old_and_slow_books() -> None:
    market = ManualMarket()
    async with exchange(market) as running, rest(running) as get:
        market.now_ms = 1_000
        running.add_faults(
            parse_faults("stale_snapshot@5s+2s:value=3000,symbol=BTCUSDT; slow_snapshot@5s+2s:value=200")
        )
        for now_ms in (3_500, 4_500):
            market.now_ms = now_ms
            running.hub.publish([])
            running.rest.keep_books(now_ms)
        assert (await get("/fapi/v1/depth?symbol=BTCUSDT&limit=5"))[1] == {"lastUpdateId": 5}, "not yet"
        market.now_ms = 6_500
        assert (await get("/fapi/v1/depth?symbol=BTCUSDT&limit=7"))[1]["code"] == -4021, "what is wrong stays so"
        old = (await get("/fapi/v1/depth?symbol=BTCUSDT&limit=5"))[1]
        assert old == {"lastUpdateId": 3_500, "E": 100, "bids": [["1", "1"], ["0.9", "1"]], "asks": []}
        begun = time.monotonic()
        assert (await get("/fapi/v1/depth?symbol=BTCUSDT_261225&limit=5"))[1] == {"lastUpdateId": 5}
        assert time.monotonic() - begun >= 0.2
        market.now_ms = 8_500
        assert (await get("/fapi/v1/depth?symbol=BTCUSDT&limit=5"))[1] == {"lastUpdateId": 5}


async def test_the_exchange_s_clock_jumps() -> None:
    async with exchange() as running, rest(running) as get, client(running, QUOTES) as ws:
        await eventually(lambda: running.hub.subscriptions == 1, "subscribed")
        running.add_faults(parse_faults("clock_jump@0s+1s:value=-4000"))
        for path in ("time", "exchangeInfo"):
            assert (await get(f"/fapi/v1/{path}"))[1]["serverTime"] == 1_790_770_782_215 - 4_000
        stamped = b'{"stream":"btcusdt@bookTicker","data":{"e":"bookTicker","u":1,"T":50000,"E":50001}}'
        running.hub.publish([Frame("public", "btcusdt@bookTicker", stamped)])
        received = json.loads(await asyncio.wait_for(ws.recv(), WAIT_SEC))["data"]
        assert (received["E"], received["T"]) == (46_001, 50_000)


async def test_faults_by_hand() -> None:
    async with exchange() as running, aiohttp.ClientSession() as session, client(running, QUOTES) as ws:
        await eventually(lambda: running.hub.subscriptions == 1, "subscribed")
        assert isinstance(running.source, ManualMarket)
        running.source.now_ms = 2_000
        page = f"{running.url}/sim/faults"
        faults = [{"kind": "drop", "at_ms": 500, "symbol": "BTCUSDT"}, {"kind": "life_cut", "at_ms": 60_000}]
        async with session.post(page, json=faults) as answer:
            added = ["drop@500ms:symbol=BTCUSDT", "life_cut@60s"]
            assert (answer.status, await answer.json()) == (200, {"added": added, "now_ms": 2_000})
        assert await quoted(running, ws, 1)
        running.source.now_ms = 2_500
        running.hub.publish([Frame("public", "btcusdt@bookTicker", quote(2))])
        assert await quoted(running, ws, 3), "the second is lost"
        async with session.get(page) as answer:
            shown = await answer.json()
        assert shown["lines"] == ["drop@2500ms:symbol=BTCUSDT", "life_cut@62s"]
        assert shown["status"]["counts"] == {"drop": {"lost": 1}}
        assert [(entry["kind"], entry["first_id"]) for entry in shown["ledger"]] == [("drop", 2)]
        for body, said in (
            (b'[{"kind":"dorp","at_ms":1}]', "'dorp' is not known"),
            (b"nonsense", "a list of faults is expected"),
            (b'[{"kind":"local_clock_jump","at_ms":1,"duration_ms":5}]', "needs simulated time"),
        ):
            async with session.post(page, data=body) as answer:
                assert answer.status == 400
                assert said in (await answer.json())["error"]
        assert len(running.engine.plan.faults) == 2


def test_a_plan_that_a_server_cannot_carry_out_is_refused() -> None:
    plan = FaultPlan(1, parse_faults("local_clock_jump@5s+1s"))
    with pytest.raises(ConfigError, match="needs simulated time"):
        SimExchange(ManualMarket(), ServerOptions(faults=plan))


async def test_a_capture_with_faults_is_the_file_but_for_the_ledger(tmp_path: Path) -> None:
    quick = {"settle_before_sec": 0.01, "settle_after_sec": 0.01, "rest_wait_sec": 0.0}
    source = CaptureSource(ten_seconds(tmp_path), config=PlaybackConfig(speed=None, **quick))
    plan = FaultPlan(1, parse_faults("diff_gap@2s:value=3; duplicate@4s; stall_route@9s+30s; drop@5s+1s:value=0.5"))
    path = "/public/stream?streams=btcusdt@depth@100ms"
    async with exchange(source, faults=plan) as running, client(running, path) as ws:
        await eventually(lambda: source.done, "played to the end")
        ledger = running.engine.ledger
        lost = [entry.last_id for entry in ledger if entry.effect == "lost"]
        expected = [10 * (number + 1) for number in range(100) if 10 * (number + 1) not in lost]
        expected.insert(expected.index(410), 410)
        received = [json.loads(await asyncio.wait_for(ws.recv(), WAIT_SEC))["data"]["u"] for _ in expected]
        assert received == expected, "with what was still held at the end"
        assert lost[:3] == [210, 220, 230] and 3 < len(lost) < 13
        assert [entry.last_id for entry in ledger if entry.effect == "doubled"] == [410]


async def test_the_synthetic_market_with_faults_is_the_truth_but_for_the_ledger() -> None:
    plan = FaultPlan(4, parse_faults("drop@0s+1h:stream=aggTrade,value=0.5"))
    source = SyntheticSource(9, ("BTCUSDT",), config=SyntheticConfig(activity=200.0))
    path = "/market/stream?streams=btcusdt@aggTrade"
    async with exchange(source, faults=plan) as running, rest(running) as get, client(running, path) as ws:
        received = [json.loads(await asyncio.wait_for(ws.recv(), WAIT_SEC))["data"]["a"] for _ in range(15)]
        first, last = received[0], received[-1]
        lost = {e.first_id for e in running.engine.ledger if first < (e.first_id or 0) < last}
        truth = (await get(f"/fapi/v1/aggTrades?symbol=BTCUSDT&fromId={first}&limit={last - first + 1}"))[1]
        assert [trade["a"] for trade in truth] == list(range(first, last + 1)), "REST has all of them"
        assert sorted(lost | set(received)) == list(range(first, last + 1))
        assert lost and not lost & set(received)


async def test_symbols_beyond_letters() -> None:
    async with exchange() as running, rest(running) as get, client(running, "/public/stream") as ws:
        for symbol in ("BTCUSDT_261225", "币安USDT"):
            answer = await get(f"/fapi/v1/depth?symbol={quote_url(symbol)}&limit=5")
            assert (answer[0], answer[1]) == (200, {"lastUpdateId": 5})
            stream = f"{symbol.lower()}@bookTicker"
            await ask(ws, method="SUBSCRIBE", params=[stream], id=1)
            assert stream in (await ask(ws, method="LIST_SUBSCRIPTIONS", id=2))["result"]
            running.hub.publish([Frame("public", stream, quote(1, stream))])
            assert json.loads(await ws.recv())["stream"] == stream
        url = f"/public/stream?streams={quote_url('币安usdt@bookTicker')}"
        async with client(running, url) as other:
            await eventually(lambda: running.hub.subscriptions == 3, "subscribed by its URL")
            running.hub.publish([Frame("public", "币安usdt@bookTicker", quote(2, "币安usdt@bookTicker"))])
            assert json.loads(await other.recv())["data"]["u"] == 2


# The process


@asynccontextmanager
async def process(tmp_path: Path, *arguments: str, **variables: str) -> AsyncIterator[asyncio.subprocess.Process]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "STATUS_FILE": str(tmp_path / "status.json"), **variables}
    started = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "services.simexchange",
        *arguments,
        cwd=ROOT,
        env=environment,
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        yield started
    finally:
        if started.returncode is None:
            started.kill()
            await started.wait()


async def test_the_process_tells_where_it_is_and_stops_gracefully(tmp_path: Path) -> None:
    async with process(tmp_path, "--port", "0", "--seed", "42", SYMBOLS="BTCUSDT", SIM_ACTIVITY="30") as started:
        status_file = tmp_path / "status.json"
        await eventually(status_file.exists, "the status file is written")
        place = json.loads(status_file.read_text("utf-8"))
        assert (place["service"], place["pid"]) == ("simexchange", started.pid)
        async with aiohttp.ClientSession() as session:
            async with session.get(f"http://{place['host']}:{place['port']}/status") as answer:
                status = await answer.json()
            async with session.get(f"http://{place['host']}:{place['port']}/readyz") as answer:
                assert answer.status == 200
        assert status["source"] == "synthetic" and status["done"] is False
        assert (status["synthetic"]["seed"], status["synthetic"]["activity"]) == (42, 30.0)
        assert status["synthetic"]["symbols"] == ["BTCUSDT"]
        started.send_signal(signal.SIGTERM)
        _, said = await asyncio.wait_for(started.communicate(), WAIT_SEC)
        assert started.returncode == 0
        assert f"http://127.0.0.1:{place['port']}" in said.decode() and "seed 42" in said.decode()


@pytest.mark.parametrize(
    ("arguments", "variables", "said"),
    [
        (["--source", "capture"], {}, "--capture is missing"),
        (["--source", "capture", "--capture", "none.gz"], {}, "cannot read the capture none.gz"),
        (["--speed", "max"], {}, "--speed is max"),
        (["--predictability", "2"], {}, "--predictability is 2.0"),
        ([], {"SIM_SOURCE": "nowhere"}, "--source is 'nowhere'"),
        (["--sessions", "maybe"], {}, "--sessions is 'maybe'"),
        (["--faults", "dorp@5s"], {}, "'dorp' is not known"),
        ([], {"SIM_FAULTS": "drop"}, "write kind@time"),
        (["--fault-seed", "1", "--fault-minutes", "0"], {}, "--fault-minutes is 0"),
        (["--symbols", "btcusdt"], {}, "symbol is 'btcusdt'"),
    ],
)
def test_wrong_settings_end_it_with_one_line(
    arguments: list[str],
    variables: dict[str, str],
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(logging.getLogger(), "handlers", [])
    assert main(["--port", "0", *arguments]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and said in lines[0]


def test_a_plan_is_a_file_or_itself_however_long(tmp_path: Path) -> None:
    drawn = FaultPlan.draw(3, 3_600_000, ("BTCUSDT",))
    text = drawn.to_json().decode()
    assert len(text) > 3_000, "longer than the name of a file may be"
    path = tmp_path / "plan.json"
    path.write_text(text, encoding="utf-8")
    for given in (text, str(path)):
        assert plan_of(parser({}).parse_args(["--faults", given]), ()) == drawn
        assert plan_of(parser({"SIM_FAULTS": given}).parse_args([]), ()) == drawn
    lines = "\n".join(drawn.lines())
    assert plan_of(parser({}).parse_args(["--faults", lines, "--fault-seed", "3"]), ()) == drawn
    for wrong in (str(tmp_path), str(tmp_path / "no.json"), "a\0b"):
        with pytest.raises(ConfigError, match="not understood"):
            plan_of(parser({}).parse_args(["--faults", wrong]), ())
    path.write_bytes(b"\xff")
    with pytest.raises(ConfigError, match=r"plan\.json cannot be read"):
        plan_of(parser({}).parse_args(["--faults", str(path)]), ())


async def test_the_process_prints_its_faults_and_empty_variables_are_not_given(tmp_path: Path) -> None:
    plan = tmp_path / "plan.txt"
    plan.write_text("# first\ndrop@1s:symbol=BTCUSDT\nrest_503@2s+1s\n", encoding="utf-8")
    empty = dict.fromkeys(("SIM_PORT", "SIM_HOST", "SIM_SOURCE", "SIM_SEED", "SIM_ACTIVITY", "SIM_LIFE_SEC"), "")
    drawn = ("--fault-seed", "7", "--fault-minutes", "2")
    lines = FaultPlan.draw(7, 120_000, ("BTCUSDT",), quiet_end_ms=30_000).lines()
    assert lines
    for arguments, said in (
        (("--faults", str(plan)), ["fault drop@1s:symbol=BTCUSDT", "fault rest_503@2s+1s"]),
        (drawn, [*(f"fault {line}" for line in lines), "--fault-seed 7 --fault-minutes 2"]),
    ):
        (tmp_path / "status.json").unlink(missing_ok=True)
        given = ("--port", "0", "--symbols", "BTCUSDT", *arguments)
        async with process(tmp_path, *given, **{**empty, "SYMBOLS": ""}) as started:
            await eventually((tmp_path / "status.json").exists, "it has started")
            started.send_signal(signal.SIGTERM)
            _, text = await asyncio.wait_for(started.communicate(), WAIT_SEC)
        assert started.returncode == 0
        assert all(line in text.decode() for line in said)


async def test_a_taken_port_is_named() -> None:
    async with exchange() as running:
        with pytest.raises(OrderflowError, match=rf"127\.0\.0\.1:{running.port}: it is taken; choose another --port"):
            await SimExchange(ManualMarket(), ServerOptions(port=running.port)).start()
