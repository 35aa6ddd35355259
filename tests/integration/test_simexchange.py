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

import aiohttp
import pytest
from orderflow.capture import frames, rest_body, rest_symbol, stream_of
from orderflow.errors import CaptureError, ConfigError, OrderflowError
from orderflow.paths import ROOT
from orderflow.venues.binance.sim.history import TradeHistory
from orderflow.venues.binance.sim.hub import Frame, Hub, SocketRules
from orderflow.venues.binance.sim.instruments import Instrument
from orderflow.venues.binance.sim.market import SyntheticConfig, SyntheticMarket
from orderflow.venues.binance.sim.playback import CaptureSource, PlaybackConfig
from orderflow.venues.binance.sim.server import ServerOptions, SimExchange
from orderflow.venues.binance.sim.source import MarketSource, SnapshotUnavailable
from orderflow.venues.binance.sim.synthetic import SyntheticSource
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed

from services.simexchange.__main__ import main

ALTS = "usdm_4alts_20210722_realagg.gz"
WAIT_SEC = 20.0
QUIET_SEC = 0.1
"""What is to stay silent is listened to for so long after a socket that must speak has spoken."""


class ManualMarket:
    """A market that says only what the test publishes."""

    name = "manual"
    done = False

    def __init__(self) -> None:
        self.trades = TradeHistory()

    @property
    def instruments(self) -> dict[str, Instrument]:
        return {"BTCUSDT": Instrument("BTCUSDT", "0.10", "0.001", 2, 3)}

    def server_time_ms(self) -> int:
        return 1_790_770_782_215

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
    async with exchange(rules=rules) as running, raw_client(running, "/public/stream") as (reader, _):
        head = await asyncio.wait_for(reader.readexactly(2), WAIT_SEC)
        assert head[0] == 0x89, "a ping"
        payload = await reader.readexactly(head[1])
        assert abs(int(payload) - time.time() * 1_000) < 10_000
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


def ten_seconds(tmp_path: Path) -> Path:
    """A capture of one symbol, a frame every 100 ms, with a gap in the diffs before its second snapshot."""
    start_ns = 1_790_000_000_000_000_000
    lines = [b'%d rest {"symbol":"BTCUSDT","lastUpdateId":5,"bids":[["9.0","1"]],"asks":[["9.1","1"]]}' % start_ns]
    for number in range(100):
        u = 10 * (number + 1)
        previous = 5 if number == 50 else u - 10
        if number == 75:
            lines.append(
                b'%d rest {"symbol":"BTCUSDT","lastUpdateId":%d,"bids":[["8.0","7"]],"asks":[["9.1","1"]]}'
                % (start_ns + number * 100_000_000, u - 10)
            )
        lines.append(
            b'%d public {"stream":"btcusdt@depth@100ms","data":{"e":"depthUpdate","E":1,"U":%d,"u":%d,"pu":%d,"b":[],"a":[]}}'
            % (start_ns + number * 100_000_000, u - 5, u, previous)
        )
    path = tmp_path / "ten.txt"
    path.write_bytes(b"\n".join(lines) + b"\n")
    return path


async def test_playback_keeps_pace_and_counts_unsubscribed_frames(tmp_path: Path) -> None:
    config = PlaybackConfig(speed=20.0, start_grace_sec=0.05, rest_wait_sec=0)
    source = CaptureSource(ten_seconds(tmp_path), config=config)
    async with exchange(source) as running, client(running, "/market/stream") as ws:
        assert not source.started
        await ask(ws, method="SUBSCRIBE", params=["btcusdt@aggTrade"], id=1)
        begun = time.monotonic()
        await eventually(lambda: source.done, "played to the end")
        assert 0.45 < time.monotonic() - begun < 5.0, "9.9 s at 20 times the pace"
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
    source = SyntheticSource(9, symbols, config=SyntheticConfig(activity=100.0))
    async with (
        exchange(source) as running,
        rest(running) as get,
        client(running, f"/public/stream?streams={streams}", max_queue=None) as ws,
    ):
        received = [json.loads(await ws.recv())["data"]]
        snapshots = {symbol: (await get(f"/fapi/v1/depth?symbol={symbol}&limit=1000"))[1] for symbol in symbols}
        server_ms = (await get("/fapi/v1/time"))[1]["serverTime"]
        assert abs(server_ms - time.time() * 1_000) < 1_000
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


async def test_the_default_market_needs_little_of_a_processor() -> None:
    source = SyntheticSource(1)
    streams = [f"{symbol.lower()}@bookTicker" for symbol in source.instruments]
    async with exchange(source) as running, client(running, f"/public/stream?streams={'/'.join(streams)}") as ws:
        await ws.recv()
        begun, used = time.monotonic(), time.process_time()
        while time.monotonic() - begun < 1.0:
            await ws.recv()
        share = (time.process_time() - used) / (time.monotonic() - begun)
    assert share < 0.25, f"{share:.0%} of a processor, this client included; the aim is 10 % without it"


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


async def test_a_taken_port_is_named() -> None:
    async with exchange() as running:
        with pytest.raises(OrderflowError, match=rf"127\.0\.0\.1:{running.port}: it is taken; choose another --port"):
            await SimExchange(ManualMarket(), ServerOptions(port=running.port)).start()
