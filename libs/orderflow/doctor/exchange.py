"""The exchange as this machine sees it: REST, its clock, and sockets that deliver data."""

from __future__ import annotations

import asyncio
import json
import time
from typing import Final

import msgspec
from websockets.asyncio.client import connect
from websockets.exceptions import WebSocketException

from orderflow.doctor.check import Check, http_get, ok, several, warning, wrong
from orderflow.venues.binance.endpoints import Endpoints
from orderflow.venues.binance.streams import STREAMS_BY_ROUTE, Route, stream_name

DRIFT_WRONG_MS: Final = 200.0
DRIFT_WARNING_MS: Final = 100.0
LOOKS: Final = 3
MAX_FRAME_BYTES: Final = 8 << 20
LIVELY: Final = "markPrice@1s"
"""Subscribed too on the market's route: sent once a second whether or not anybody trades."""


class _ServerTime(msgspec.Struct):
    serverTime: int


class _Symbol(msgspec.Struct):
    symbol: str
    status: str = ""


class _ExchangeInfo(msgspec.Struct):
    symbols: list[_Symbol]


async def rest(endpoints: Endpoints, symbols: tuple[str, ...], timeout_sec: float) -> Check:
    """Whether REST answers, and lists the symbols."""
    name, url = "exchange: REST", endpoints.exchange_info()
    try:
        status, body = await http_get(url, timeout_sec)
    except OSError as error:
        return wrong(name, f"{endpoints.rest_url}: {error}", _NETWORK)
    if status != 200:
        return wrong(name, f"{url} answered {status}", _refusal(status))
    try:
        listed = {each.symbol: each.status for each in msgspec.json.decode(body, type=_ExchangeInfo).symbols}
    except msgspec.MsgspecError as error:
        return wrong(name, f"{url} is no exchange's answer: {error}", "set REST_URL to the exchange's")
    absent = [symbol for symbol in symbols if symbol not in listed]
    if absent:
        return wrong(name, f"{several(absent)} is not listed", "take them out of SYMBOLS")
    halted = [f"{symbol} {listed[symbol]}" for symbol in symbols if listed[symbol] not in ("TRADING", "")]
    if halted:
        return warning(
            name, f"not trading: {several(halted)}", "they send nothing until the exchange takes them up again"
        )
    return ok(name, f"{endpoints.rest_url}, {len(listed)} symbols, ours among them")


async def clock(endpoints: Endpoints, timeout_sec: float) -> Check:
    """This machine's clock against the exchange's: the look with the shortest round trip counts."""
    name = "clock"
    best: tuple[float, float] | None = None
    for _ in range(LOOKS):
        before_ns, began_sec = time.time_ns(), time.monotonic()
        try:
            status, body = await http_get(endpoints.server_time(), timeout_sec)
            server_ms = msgspec.json.decode(body, type=_ServerTime).serverTime if status == 200 else None
        except (OSError, msgspec.MsgspecError) as error:
            return wrong(name, f"{endpoints.rest_url} does not tell its time: {error}", _NETWORK)
        if server_ms is None:
            return wrong(name, f"{endpoints.server_time()} answered {status}", _refusal(status))
        half_ms = (time.monotonic() - began_sec) * 500
        if best is None or half_ms < best[1]:
            best = (before_ns / 1e6 + half_ms - server_ms, half_ms)
    assert best is not None
    drift_ms, half_ms = best
    what = f"{drift_ms:+.0f} ms against the exchange, known to {half_ms:.0f} ms"
    remedy = "let the machine's clock be kept by NTP (`timedatectl set-ntp true`, chrony); a container has its host's"
    if abs(drift_ms) - half_ms > DRIFT_WRONG_MS:
        return wrong(name, what, remedy)
    if abs(drift_ms) - half_ms > DRIFT_WARNING_MS:
        return warning(name, what, remedy)
    if half_ms > DRIFT_WRONG_MS:
        return warning(name, what, "the way to the exchange is too slow to tell: look at the network, try again")
    return ok(name, what)


async def sockets(endpoints: Endpoints, symbol: str, timeout_sec: float) -> list[Check]:
    """Whether each route delivers data. That a subscription is acknowledged proves nothing: a wrong route does so too."""
    return list(await asyncio.gather(*(_route(endpoints, route, symbol, timeout_sec) for route in STREAMS_BY_ROUTE)))


async def _route(endpoints: Endpoints, route: Route, symbol: str, timeout_sec: float) -> Check:
    name = f"exchange: /{route}"
    url = endpoints.socket(route)
    wanted = {stream_name(symbol, stream) for stream in STREAMS_BY_ROUTE[route]}
    lively = {stream_name(symbol, LIVELY)} if route == "market" else set()
    heard: set[str] = set()
    began = time.monotonic()
    try:
        async with (
            asyncio.timeout(timeout_sec),
            connect(url, max_size=MAX_FRAME_BYTES, open_timeout=timeout_sec, close_timeout=1) as socket,
        ):
            await socket.send(json.dumps({"method": "SUBSCRIBE", "params": sorted(wanted | lively), "id": 1}))
            while not wanted <= heard:
                frame = json.loads(await socket.recv())
                if isinstance(frame, dict) and "error" in frame:
                    return wrong(name, f"{url} refused: {frame['error']}", "look at SYMBOLS and WSS_URL")
                if isinstance(frame, dict) and "stream" in frame:
                    heard.add(str(frame["stream"]))
    except TimeoutError:
        pass  # what was heard until then decides
    except (OSError, WebSocketException, ValueError) as error:
        return wrong(name, f"{url}: {error}", _NETWORK)
    spent_sec = time.monotonic() - began
    if not heard:
        return wrong(
            name,
            f"{url}: no data of {symbol} within {timeout_sec:g} s",
            "look at WSS_URL (a wrong route is acknowledged and stays silent), and at proxies between here and there",
        )
    silent = sorted(wanted - heard)
    if silent:
        remedy = "a quiet symbol may take longer: try --timeout 60, or a busier symbol"
        return warning(name, f"{url}: nothing of {several(silent)} within {timeout_sec:g} s", remedy)
    return ok(name, f"{url}: {', '.join(sorted(wanted))} after {spent_sec:.1f} s")


def _refusal(status: int) -> str:
    if status in (403, 451):
        return "the exchange does not serve this address (its country, or a firewall): use another, or a simulated exchange"
    if status in (418, 429):
        return "this address has asked too much: stop everything here that asks, wait some minutes"
    return "look at REST_URL; if it is right, try again later"


_NETWORK: Final = (
    "look at WSS_URL and REST_URL, DNS, the firewall and proxies; offline, use the simulated exchange: "
    "`orderflow run --source sim`, `docker compose --profile sim up`"
)
