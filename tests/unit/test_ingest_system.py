"""The real outside of ingestion on loopback: closing codes, bounds, answers in pieces."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator

import pytest
from aiohttp import web
from orderflow.ingest.seams import SocketClosed
from orderflow.ingest.system import MAX_FRAME_BYTES, SystemHttp, system_outside
from websockets.asyncio.server import ServerConnection, serve


async def behave(socket: ServerConnection) -> None:
    """What the message says."""
    async for message in socket:
        if message == "bytes":
            await socket.send(b'{"a":1}')
        elif message == "large":
            await socket.send("x" * (MAX_FRAME_BYTES + 1))
        elif message == "cut":
            socket.transport.abort()
        elif message == "close":
            await socket.close(1008, "Too many requests")
        else:
            await socket.send(message)


@pytest.fixture
async def url() -> AsyncIterator[str]:
    async with serve(behave, "127.0.0.1", 0) as server:
        yield f"ws://127.0.0.1:{server.sockets[0].getsockname()[1]}/public/stream"


@pytest.mark.parametrize(("message", "code"), [("cut", 1006), ("close", 1008), ("large", 1009)])
async def test_a_sockets_end_has_its_code(url: str, message: str, code: int) -> None:
    outside = system_outside(20.0)
    socket = await outside.connector.connect(url)
    await socket.send("币安")
    assert await socket.recv() == "币安".encode()
    await socket.send("bytes")
    assert await socket.recv() == b'{"a":1}'
    await socket.send(message)
    with pytest.raises(SocketClosed) as closed:
        await socket.recv()
    assert closed.value.code == code
    await socket.close()
    with pytest.raises(SocketClosed):
        await socket.send("after")


async def test_a_refused_connection_and_a_refused_handshake_are_os_errors() -> None:
    outside = system_outside(20.0)
    with pytest.raises(OSError):
        await outside.connector.connect("ws://127.0.0.1:1/public/stream")

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 451 Unavailable\r\nContent-Length: 0\r\n\r\n")
        writer.close()

    async with await asyncio.start_server(answer, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        with pytest.raises(OSError, match="451"):
            await outside.connector.connect(f"ws://127.0.0.1:{port}/public/stream")


async def test_an_answer_in_pieces_is_whole_bounded_and_its_address_is_not_encoded_twice() -> None:
    async def handle(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(status=418, headers={"Retry-After": "7"})
        await response.prepare(request)
        for _ in range(10):
            await response.write(b"x" * 1000)
        await response.write(request.raw_path.encode())
        return response

    application = web.Application()
    application.router.add_get("/fapi", handle)
    runner = web.AppRunner(application)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    port = runner.addresses[0][1]
    http = SystemHttp()
    try:
        answer = await http.get(f"http://127.0.0.1:{port}/fapi?symbol=%E5%B8%81USDT", 20_000)
        assert (answer.status, answer.headers["retry-after"]) == (418, "7")
        assert answer.body == b"x" * 10_000 + b"/fapi?symbol=%E5%B8%81USDT"
        with pytest.raises(ValueError, match="more than 9999 bytes"):
            await http.get(f"http://127.0.0.1:{port}/fapi", 9999)
    finally:
        await http.close()
        await runner.cleanup()
    with pytest.raises(OSError):
        await http.get(f"http://127.0.0.1:{port}/fapi", 1)
    await http.close()


def test_the_clock_is_the_machines() -> None:
    assert abs(system_outside(20.0).clock.time_ns() - time.time_ns()) < 60e9
