"""Market REST of the simulated exchange: parameters, weights, limits and error bodies as Binance's."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, Final, NamedTuple, TypeAlias

import msgspec

from orderflow.venues.binance.sim.damage import shifted
from orderflow.venues.binance.sim.faults import FaultEngine, RestFault
from orderflow.venues.binance.sim.instruments import WEIGHT_PER_MINUTE, exchange_info
from orderflow.venues.binance.sim.source import MarketSource, SnapshotUnavailable, limited_book

DEPTH_WEIGHTS: Final = {5: 2, 10: 2, 20: 2, 50: 2, 100: 5, 500: 10, 1000: 20}
DEPTH_LIMIT_DEFAULT: Final = 500
DEPTH_WEIGHT_DEFAULT: Final = 1
"""What production was measured to charge for a request without a limit."""
TRADES_WEIGHT: Final = 20
TRADES_LIMIT_DEFAULT: Final = 500
TRADES_LIMIT_MOST: Final = 1000
TRADES_SPAN_MOST_MS: Final = 3_600_000
ADDRESSES_MOST: Final = 10_000

DEPTH_LIMIT_MOST: Final = 1000
HANG_MOST_SEC: Final = 3_600.0

FAILURES: Final = (
    "Internal error; unable to process your request. Please try again.",
    "Service Unavailable.",
    "Unknown error, please check your request or try again later.",
    "Request throttled by system-level protection. Reduce-only/close-position orders are exempt. Please try again.",
)
"""Texts of a 503, chosen by the value of rest_503."""
_FAILURE_CODES: Final = (-1001, -1000, -1000, -1008)
"""Of the second and third the documentation gives the text alone; -1000 is its code for an unknown error."""
_REGION: Final = (
    "Service unavailable from a restricted location according to 'b. Eligibility' in https://www.binance.com/en/terms. "
    "Please contact customer service if you believe you received this message in error."
)
_UNWEIGHED: Final = frozenset({"rest_451", "rest_503"})
"""Refused before anybody counts."""
_WEIGHED: Final = frozenset({"rest_418", "rest_429"})


class _Request(NamedTuple):
    query: Mapping[str, str]
    fault: RestFault | None
    now_ms: int


Handler: TypeAlias = Callable[[_Request], Awaitable[bytes]]


class RestError(Exception):
    """A refusal with Binance's code and text."""

    def __init__(self, status: int, code: int, message: str, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
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
                _too_many(address, self._per_minute),
                {"Retry-After": str(max(1, int((minute + 1) * 60 - now) + 1)), "X-MBX-USED-WEIGHT-1M": str(used)},
            )
        return used


class Reply(NamedTuple):
    """An answer, of whatever carries it."""

    status: int
    headers: Mapping[str, str]
    body: bytes


class RestApi:
    """The endpoints of `/fapi/v1` that give market data. Knows nothing of HTTP servers: see `answer`."""

    def __init__(
        self, source: MarketSource, weights: WeightLimit | None = None, engine: FaultEngine | None = None
    ) -> None:
        self._source = source
        self._weights = weights or WeightLimit()
        self._engine = engine or FaultEngine()
        self._endpoints: dict[str, tuple[Handler, Callable[[Mapping[str, str]], int]]] = {
            "/fapi/v1/ping": (self._ping, lambda _: 1),
            "/fapi/v1/time": (self._time, lambda _: 1),
            "/fapi/v1/exchangeInfo": (self._exchange_info, lambda _: 1),
            "/fapi/v1/depth": (self._depth, _depth_weight),
            "/fapi/v1/aggTrades": (self._agg_trades, lambda _: TRADES_WEIGHT),
        }
        self.requests: dict[str, int] = {}
        self.errors: dict[str, int] = {}
        """By HTTP status and Binance's code."""

    @property
    def paths(self) -> tuple[str, ...]:
        return tuple(self._endpoints)

    async def answer(self, path: str, query: Mapping[str, str], address: str, now_ms: int) -> Reply | None:
        """What a GET request gets. Waits only where the market or a fault does, with the event loop's timers.

        Parameters
        ----------
        path, query : decoded, as `/fapi/v1/depth` and its parameters.
        address : the client's, by which weight is counted.
        now_ms : time since the exchange opened, for faults.

        Returns
        -------
        The answer; None where none ever comes and the connection is to be cut.
        """
        endpoint = self._endpoints.get(path)
        if endpoint is None:
            return self._refused(RestError(404, -5000, f"Path {path}, Method GET is invalid"), {})
        handler, weight_of = endpoint
        name = path.rpartition("/")[2]
        self.requests[name] = self.requests.get(name, 0) + 1
        self.keep_books(now_ms)
        fault = None if self._engine.idle else self._engine.rest(now_ms, path, query)
        if fault is not None and fault.kind == "rest_timeout":
            await asyncio.sleep(_seconds(fault.end_ms - now_ms))
            return None
        headers: dict[str, str] = {}
        try:
            if fault is not None and fault.kind in _UNWEIGHED:
                raise fault_error(fault, address, now_ms, self._time_ms(now_ms))
            headers["X-MBX-USED-WEIGHT-1M"] = str(self._weights.take(address, weight_of(query)))
            if fault is not None and fault.kind in _WEIGHED:
                raise fault_error(fault, address, now_ms, self._time_ms(now_ms))
            reply = Reply(200, headers, await handler(_Request(query, fault, now_ms)))
        except RestError as error:
            reply = self._refused(error, headers)
        except SnapshotUnavailable:
            reply = self._refused(RestError(503, -1001, FAILURES[0]), headers)
        if fault is not None and fault.kind == "slow_snapshot":
            # The book of the time of asking, late: it is as old as it can be when it arrives.
            await asyncio.sleep(_seconds(fault.value))
        return reply

    def keep_books(self, now_ms: int) -> None:
        """Keep the books that stale_snapshot will answer with; to be called as time goes on."""
        if self._engine.idle:
            return
        for fault, symbol in self._engine.books_to_keep(now_ms):
            for each in (symbol,) if symbol else tuple(self._source.instruments):
                body = self._source.book(each, DEPTH_LIMIT_MOST) if each in self._source.instruments else None
                if body is not None:
                    self._engine.keep_book(fault, each, body)

    def _refused(self, error: RestError, headers: dict[str, str]) -> Reply:
        name = f"{error.status}/{error.code}"
        self.errors[name] = self.errors.get(name, 0) + 1
        return Reply(error.status, {**headers, **error.headers}, error.body)

    def _time_ms(self, now_ms: int) -> int:
        """The exchange's clock, which may have jumped."""
        return self._source.server_time_ms() + self._engine.clock_shift_ms(now_ms)

    async def _ping(self, _: _Request) -> bytes:
        return b"{}"

    async def _time(self, request: _Request) -> bytes:
        return msgspec.json.encode({"serverTime": self._time_ms(request.now_ms)})

    async def _exchange_info(self, request: _Request) -> bytes:
        return msgspec.json.encode(exchange_info(self._source.instruments.values(), self._time_ms(request.now_ms)))

    async def _depth(self, request: _Request) -> bytes:
        query, fault, now_ms = request
        symbol = self._symbol(query)
        limit = _integer(query, "limit")
        if limit is None:
            limit = DEPTH_LIMIT_DEFAULT
        elif limit not in DEPTH_WEIGHTS:
            raise RestError(400, -4021, f"{limit} is not valid depth limit")
        if fault is not None and fault.kind == "stale_snapshot":
            return limited_book(fault.body, limit)
        body = await self._source.snapshot(symbol, limit)
        shift_ms = self._engine.clock_shift_ms(now_ms)
        return shifted(body, shift_ms) if shift_ms else body

    async def _agg_trades(self, request: _Request) -> bytes:
        query = request.query
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


def fault_error(fault: RestFault, address: str, now_ms: int, exchange_ms: int) -> RestError:
    """The refusal that a fault wants, until it ends."""
    left_ms = max(0, fault.end_ms - now_ms)
    retry_after = {"Retry-After": str(-(-left_ms // 1_000))}
    if fault.kind == "rest_418":
        text = f"Way too many requests; IP({address}) banned until {exchange_ms + left_ms}. "
        return RestError(418, -1003, text + "Please use the websocket for live updates to avoid bans.", retry_after)
    if fault.kind == "rest_429":
        return RestError(429, -1003, _too_many(address, WEIGHT_PER_MINUTE), retry_after)
    if fault.kind == "rest_451":
        return RestError(451, 0, _REGION)
    number = int(fault.value)
    return RestError(503, _FAILURE_CODES[number], FAILURES[number])


def _too_many(address: str, per_minute: int) -> str:
    return (
        f"Too many requests; current limit of IP({address}) is {per_minute} requests per minute. "
        "Please use the websocket for live updates to avoid polling the API."
    )


def _seconds(ms: float) -> float:
    return min(HANG_MOST_SEC, max(0.0, ms / 1_000))


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
