"""The recorder's REST client: snapshots, missing trades, server time; within one weight budget."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from typing import Final

import aiohttp

logger = logging.getLogger(__name__)

MAX_BODY_BYTES: Final = 64 << 20
TIMEOUT_SEC: Final = 10.0
DEPTH_WEIGHTS: Final = {5: 2, 10: 2, 20: 2, 50: 2, 100: 5, 500: 10, 1000: 20}
AGG_TRADES_WEIGHT: Final = 20
AGG_TRADES_LIMIT: Final = 1000
BAN_DEFAULT_SEC: Final = 120.0
LIMIT_DEFAULT_SEC: Final = 10.0
STOP_STATUSES: Final = frozenset({403, 451})


class WeightBudget:
    """Request weight per UTC minute, as the exchange counts it. Pure but for the clock that it is given."""

    def __init__(self, per_minute: int, clock: Callable[[], float] = time.time) -> None:
        self._per_minute = per_minute
        self._clock = clock
        self._minute = -1
        self._used = 0
        self.blocked_until = 0.0

    def wait_sec(self, weight: int) -> float:
        """Seconds until a request of this weight may go; 0 and taken where it may go now."""
        now = self._clock()
        if now < self.blocked_until:
            return self.blocked_until - now
        minute = int(now // 60)
        if minute != self._minute:
            self._minute, self._used = minute, 0
        if self._used + weight > self._per_minute:
            return (minute + 1) * 60 - now
        self._used += weight
        return 0.0

    def told(self, used: int) -> None:
        """The exchange's own count of this minute, which also holds what others on this address use."""
        self._used = max(self._used, used)

    def block(self, seconds: float) -> None:
        """No request for so long: 429 or 418."""
        self.blocked_until = max(self.blocked_until, self._clock() + seconds)


class RestClient:
    """Bounded GETs; every failure is counted and gives None, for the need is asked for again while it stands."""

    def __init__(self, base_url: str, per_minute: int) -> None:
        self._base = base_url.rstrip("/")
        self.budget = WeightBudget(per_minute)
        self.errors: dict[str, int] = {}
        self.requests = 0
        self._session: aiohttp.ClientSession | None = None
        self._slots = asyncio.Semaphore(4)

    async def open(self) -> None:
        self._session = aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=TIMEOUT_SEC + 5, connect=TIMEOUT_SEC))

    async def close(self) -> None:
        if self._session is not None:
            await self._session.close()

    async def depth(self, symbol: str, limit: int) -> bytes | None:
        return await self._get("/fapi/v1/depth", {"symbol": symbol, "limit": str(limit)}, DEPTH_WEIGHTS[limit])

    async def agg_trades(self, symbol: str, from_id: int, count: int) -> bytes | None:
        limit = max(1, min(AGG_TRADES_LIMIT, count))
        parameters = {"symbol": symbol, "fromId": str(from_id), "limit": str(limit)}
        return await self._get("/fapi/v1/aggTrades", parameters, AGG_TRADES_WEIGHT)

    async def server_time(self) -> bytes | None:
        return await self._get("/fapi/v1/time", {}, 1)

    async def exchange_info(self) -> bytes | None:
        return await self._get("/fapi/v1/exchangeInfo", {}, 1)

    async def _get(self, path: str, parameters: dict[str, str], weight: int) -> bytes | None:
        assert self._session is not None
        async with self._slots:
            wait_sec = self.budget.wait_sec(weight)
            if wait_sec > 0:
                self._failed("budget", f"{path} must wait {wait_sec:.1f} s for request weight")
                return None
            self.requests += 1
            try:
                async with self._session.get(self._base + path, params=parameters) as answer:
                    used = answer.headers.get("X-MBX-USED-WEIGHT-1M", "")
                    if used.isdecimal():
                        self.budget.told(int(used))
                    body = await answer.content.read(MAX_BODY_BYTES + 1)
                    if len(body) > MAX_BODY_BYTES:
                        self._failed("oversize", f"{path} answered more than {MAX_BODY_BYTES} bytes")
                    elif answer.status == 200:
                        return body
                    else:
                        self._refused(path, parameters, answer, body)
            except (aiohttp.ClientError, TimeoutError, OSError) as error:
                self._failed("connection", f"{self._base}{path} {parameters}: {error!r}")
        return None

    def _refused(self, path: str, parameters: dict[str, str], answer: aiohttp.ClientResponse, body: bytes) -> None:
        status = answer.status
        if status in (418, 429):
            after = answer.headers.get("Retry-After", "")
            default = BAN_DEFAULT_SEC if status == 418 else LIMIT_DEFAULT_SEC
            self.budget.block(float(after) if after.replace(".", "", 1).isdecimal() else default)
        elif status in STOP_STATUSES:
            self.budget.block(BAN_DEFAULT_SEC)
        self._failed(str(status), f"{path} {parameters} answered {status}: {body[:200].decode('utf-8', 'replace')}")

    def _failed(self, reason: str, text: str) -> None:
        self.errors[reason] = self.errors.get(reason, 0) + 1
        logger.warning("%s", text)
