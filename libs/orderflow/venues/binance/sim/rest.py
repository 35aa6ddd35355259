"""Market REST of the simulated exchange: parameters, weights, limits and error bodies as Binance's."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, Final

import msgspec
from aiohttp import web

from orderflow.venues.binance.sim.instruments import WEIGHT_PER_MINUTE, exchange_info
from orderflow.venues.binance.sim.source import MarketSource, SnapshotUnavailable

DEPTH_WEIGHTS: Final = {5: 2, 10: 2, 20: 2, 50: 2, 100: 5, 500: 10, 1000: 20}
DEPTH_LIMIT_DEFAULT: Final = 500
DEPTH_WEIGHT_DEFAULT: Final = 1
"""What production was measured to charge for a request without a limit."""
TRADES_WEIGHT: Final = 20
TRADES_LIMIT_DEFAULT: Final = 500
TRADES_LIMIT_MOST: Final = 1000
TRADES_SPAN_MOST_MS: Final = 3_600_000
ADDRESSES_MOST: Final = 10_000

Handler = Callable[[Mapping[str, str]], Awaitable[bytes]]


class RestError(Exception):
    """A refusal with Binance's code and text."""

    def __init__(self, status: int, code: int, message: str, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.body = msgspec.json.encode({"code": code, "msg": message})
        self.headers = dict(headers or {})


class WeightLimit:
    """Request weight per address and UTC minute; refused requests count too, as measured."""

    def __init__(self, per_minute: int = WEIGHT_PER_MINUTE, clock: Callable[[], float] = time.time) -> None:
        self._per_minute = per_minute
        self._clock = clock
        self._minute = -1
        self._used: dict[str, int] = {}

    def take(self, address: str, weight: int) -> int:
        """Count a request; the weight used in this minute.

        Raises
        ------
        RestError
            429, with the seconds to the next minute.
        """
        now = self._clock()
        minute = int(now // 60)
        if minute != self._minute or len(self._used) >= ADDRESSES_MOST:
            self._minute = minute
            self._used.clear()
        used = self._used[address] = self._used.get(address, 0) + weight
        if used > self._per_minute:
            raise RestError(
                429,
                -1003,
                f"Too many requests; current limit of IP({address}) is {self._per_minute} requests per minute. "
                "Please use the websocket for live updates to avoid polling the API.",
                {"Retry-After": str(max(1, int((minute + 1) * 60 - now) + 1)), "X-MBX-USED-WEIGHT-1M": str(used)},
            )
        return used


class RestApi:
    """The endpoints of `/fapi/v1` that give market data."""

    def __init__(self, source: MarketSource, weights: WeightLimit | None = None) -> None:
        self._source = source
        self._weights = weights or WeightLimit()
        self.requests: dict[str, int] = {}
        self.errors: dict[str, int] = {}
        """By HTTP status and Binance's code."""

    def routes(self) -> list[web.RouteDef]:
        """For an aiohttp application."""
        table: dict[str, tuple[Handler, Callable[[Mapping[str, str]], int]]] = {
            "ping": (self._ping, lambda _: 1),
            "time": (self._time, lambda _: 1),
            "exchangeInfo": (self._exchange_info, lambda _: 1),
            "depth": (self._depth, _depth_weight),
            "aggTrades": (self._agg_trades, lambda _: TRADES_WEIGHT),
        }
        return [
            web.get(f"/fapi/v1/{name}", self._endpoint(name, handler, weight))
            for name, (handler, weight) in table.items()
        ]

    def _endpoint(
        self, name: str, handler: Handler, weight_of: Callable[[Mapping[str, str]], int]
    ) -> Callable[[web.Request], Awaitable[web.Response]]:
        async def endpoint(request: web.Request) -> web.Response:
            self.requests[name] = self.requests.get(name, 0) + 1
            headers: dict[str, str] = {}
            try:
                used = self._weights.take(request.remote or "unknown", weight_of(request.query))
                headers["X-MBX-USED-WEIGHT-1M"] = str(used)
                body = await handler(request.query)
            except RestError as error:
                return self._refusal(error, headers)
            except SnapshotUnavailable:
                text = "Internal error; unable to process your request. Please try again."
                return self._refusal(RestError(503, -1001, text), headers)
            return web.Response(body=body, content_type="application/json", headers=headers)

        return endpoint

    def _refusal(self, error: RestError, headers: dict[str, str]) -> web.Response:
        code = msgspec.json.decode(error.body)["code"]
        name = f"{error.status}/{code}"
        self.errors[name] = self.errors.get(name, 0) + 1
        return web.Response(
            status=error.status,
            body=error.body,
            content_type="application/json",
            headers={**headers, **error.headers},
        )

    async def _ping(self, _: Mapping[str, str]) -> bytes:
        return b"{}"

    async def _time(self, _: Mapping[str, str]) -> bytes:
        return msgspec.json.encode({"serverTime": self._source.server_time_ms()})

    async def _exchange_info(self, _: Mapping[str, str]) -> bytes:
        return msgspec.json.encode(exchange_info(self._source.instruments.values(), self._source.server_time_ms()))

    async def _depth(self, query: Mapping[str, str]) -> bytes:
        symbol = self._symbol(query)
        limit = _integer(query, "limit")
        if limit is None:
            limit = DEPTH_LIMIT_DEFAULT
        elif limit not in DEPTH_WEIGHTS:
            raise RestError(400, -4021, f"{limit} is not valid depth limit")
        return await self._source.snapshot(symbol, limit)

    async def _agg_trades(self, query: Mapping[str, str]) -> bytes:
        symbol = self._symbol(query)
        given: dict[str, int | None] = {name: _integer(query, name) for name in ("fromId", "startTime", "endTime")}
        limit = _integer(query, "limit")
        limit = TRADES_LIMIT_DEFAULT if limit is None else limit
        if not 1 <= limit <= TRADES_LIMIT_MOST:
            raise RestError(400, -1130, "Data sent for parameter 'limit' is not valid.")
        trades = self._source.trades
        first, start_ms, end_ms = given["fromId"], given["startTime"], given["endTime"]
        if first is not None:
            oldest = trades.first_id(symbol)
            if oldest is not None and first < oldest:
                # Answering with later trades would pass for a gap in the ids.
                raise RestError(400, -4166, "Search window is restricted to recent 48 hours only.")
            return trades.from_id(symbol, first, limit)
        if start_ms is not None and end_ms is not None and not 0 <= end_ms - start_ms < TRADES_SPAN_MOST_MS:
            raise RestError(400, -1127, "More than 1 hours between startTime and endTime.")
        return trades.between(symbol, start_ms, end_ms, limit)

    def _symbol(self, query: Mapping[str, str]) -> str:
        symbol = query.get("symbol", "")
        if not symbol:
            raise RestError(400, -1102, "Mandatory parameter 'symbol' was not sent, was empty/null, or malformed.")
        if symbol not in self._source.instruments:
            raise RestError(400, -1121, "Invalid symbol.")
        return symbol

    def status(self) -> dict[str, Any]:
        return {"requests": dict(sorted(self.requests.items())), "errors": dict(sorted(self.errors.items()))}


def _integer(query: Mapping[str, str], name: str) -> int | None:
    text = query.get(name)
    if text is None:
        return None
    if not (text.isascii() and text.isdecimal() and len(text) <= 20):
        raise RestError(
            400, -1100, f"Illegal characters found in parameter '{name}'; legal range is '^[0-9]{{1,20}}$'."
        )
    return int(text)


def _depth_weight(query: Mapping[str, str]) -> int:
    text = query.get("limit", "")
    return DEPTH_WEIGHTS.get(int(text), 1) if text.isascii() and text.isdecimal() and len(text) <= 20 else 1
