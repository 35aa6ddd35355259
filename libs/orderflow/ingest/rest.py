"""The recorder's REST client: snapshots, missing trades, server time; within one weight budget.

Each failure is counted and gives None: a need is asked for again while it stands. What the exchange forbids is kept to: a
request during a ban makes the ban longer.
"""

from __future__ import annotations

import asyncio
import logging
import random
import re
from collections.abc import Callable
from typing import Any, Final

from orderflow.ingest.route import backoff_sec, count_reason
from orderflow.ingest.seams import Answer, Http
from orderflow.venues.binance.endpoints import (
    AGG_TRADES_MAX_LIMIT,
    AGG_TRADES_WEIGHT,
    EXCHANGE_INFO_WEIGHT,
    TIME_WEIGHT,
    Endpoints,
    depth_weight,
)

logger = logging.getLogger(__name__)

MAX_INFO_BYTES: Final = 64 << 20
MAX_BODY_BYTES: Final = 4 << 20
"""What still fits a batch of the log; the largest snapshot of the exchange has about 60 kB."""
TIMEOUT_SEC: Final = 15.0
SLOW_SEC: Final = 1.0
BAN_FIRST_SEC: Final = 120.0
BAN_MOST_SEC: Final = 86_400.0
LIMIT_SEC: Final = 10.0
LONGEST_BLOCK_SEC: Final = 3 * 86_400.0
"""The exchange's own longest ban."""
PAUSE_FIRST_SEC: Final = 0.5
PAUSE_MOST_SEC: Final = 30.0
STOP_STATUSES: Final = frozenset({403, 451})
TOO_MANY: Final = 429
BANNED: Final = 418
_BANNED_UNTIL: Final = re.compile(rb"banned until (\d{13})\b")


class WeightBudget:
    """Request weight per UTC minute, as the exchange counts it. Pure.

    Parameters
    ----------
    now_sec
        Seconds since the epoch: minutes are the exchange's.
    loop_sec
        A monotonic clock: bans are waited out whatever the wall clock does.
    """

    def __init__(self, per_minute: int, now_sec: Callable[[], float], loop_sec: Callable[[], float]) -> None:
        self.per_minute = per_minute
        self._now_sec = now_sec
        self._loop_sec = loop_sec
        self._minute = -1
        self._used = 0
        self._blocked_until_sec = float("-inf")

    @property
    def used(self) -> int:
        """Weight used in this minute, as far as is known."""
        self._turn()
        return self._used

    @property
    def minute(self) -> int:
        """Number of the minute now, for `told`."""
        return int(self._now_sec() // 60)

    @property
    def blocked_sec(self) -> float:
        """How long the exchange takes no request at all."""
        return max(0.0, self._blocked_until_sec - self._loop_sec())

    def wait_sec(self, weight: int) -> float:
        """Seconds until a request of this weight may go; 0 where it may go now."""
        if self.blocked_sec > 0:
            return self.blocked_sec
        self._turn()
        if self._used + weight > self.per_minute:
            return (self._minute + 1) * 60 - self._now_sec()
        return 0.0

    def take(self, weight: int) -> None:
        """A request of this weight goes out."""
        self._turn()
        self._used += weight

    def told(self, used: int, minute: int) -> None:
        """The exchange's own count of the minute in which a request went out: it holds what others on this address use."""
        self._turn()
        if minute == self._minute:
            self._used = max(self._used, used)

    def block(self, seconds: float) -> None:
        """No request for so long."""
        until_sec = self._loop_sec() + min(seconds, LONGEST_BLOCK_SEC)
        self._blocked_until_sec = max(self._blocked_until_sec, until_sec)

    def _turn(self) -> None:
        if self.minute != self._minute:
            self._minute, self._used = self.minute, 0


class RestClient:
    """Bounded GETs."""

    def __init__(
        self,
        http: Http,
        endpoints: Endpoints,
        per_minute: int,
        now_ns: Callable[[], int],
        chance: random.Random,
    ) -> None:
        self._http = http
        self._endpoints = endpoints
        self._now_ns = now_ns
        self._chance = chance
        self.budget = WeightBudget(per_minute, lambda: now_ns() / 1e9, _loop_sec)
        self.by_status: dict[str, int] = {}
        """Answers by status; `connection`, `oversize` and `budget` where there was none."""
        self.requests = 0
        self.slow: dict[str, int] = {}
        """Requests by kind that took longer than `SLOW_SEC`, whatever their outcome."""
        self._bans = 0
        self._failures: dict[str, int] = {}
        self._paused_until_sec: dict[str, float] = {}

    async def close(self) -> None:
        await self._http.close()

    async def depth(self, symbol: str, limit: int) -> bytes | None:
        return await self._get("depth", self._endpoints.depth(symbol, limit), depth_weight(limit))

    async def agg_trades(self, symbol: str, from_id: int, count: int) -> bytes | None:
        limit = max(1, min(AGG_TRADES_MAX_LIMIT, count))
        return await self._get("aggTrades", self._endpoints.agg_trades(symbol, from_id, limit), AGG_TRADES_WEIGHT)

    async def server_time(self) -> bytes | None:
        return await self._get("time", self._endpoints.server_time(), TIME_WEIGHT)

    async def exchange_info(self) -> bytes | None:
        return await self._get(
            "exchangeInfo", self._endpoints.exchange_info(), EXCHANGE_INFO_WEIGHT, most_bytes=MAX_INFO_BYTES
        )

    def wait_sec(self, kind: str, weight: int) -> float:
        """Seconds until a request of that kind may go; 0: now."""
        return max(self.budget.wait_sec(weight), self._paused_until_sec.get(kind, 0.0) - _loop_sec())

    async def _get(self, kind: str, url: str, weight: int, most_bytes: int = MAX_BODY_BYTES) -> bytes | None:
        wait_sec = self.budget.wait_sec(weight)
        if wait_sec > 0:
            self._failed("budget", f"{url} must wait {wait_sec:.1f} s for request weight")
            return None
        self.requests += 1
        self.budget.take(weight)
        minute = self.budget.minute
        asked_sec = _loop_sec()
        try:
            async with asyncio.timeout(TIMEOUT_SEC):
                answer = await self._http.get(url, most_bytes)
        except OSError as error:
            self._pause(kind)
            self._failed("connection", f"{url}: {error!r}")
            return None
        except ValueError as error:
            self._pause(kind)
            self._failed("oversize", str(error))
            return None
        finally:
            if _loop_sec() - asked_sec > SLOW_SEC:
                self.slow[kind] = self.slow.get(kind, 0) + 1
        used = answer.headers.get("x-mbx-used-weight-1m", "")
        if used.isdecimal():
            self.budget.told(int(used), minute)
        if answer.status != 200:
            self._refused(kind, url, answer)
            return None
        count_reason(self.by_status, "200")
        self._failures.pop(kind, None)
        self._paused_until_sec.pop(kind, None)
        self._bans = 0
        return answer.body

    def _refused(self, kind: str, url: str, answer: Answer) -> None:
        status = answer.status
        if status in (TOO_MANY, BANNED) or status in STOP_STATUSES:
            self.budget.block(self._block_sec(answer))
        else:
            self._pause(kind)
        self._failed(str(status), f"{url} answered {status}: {answer.body[:200].decode('utf-8', 'replace')}")

    def _block_sec(self, answer: Answer) -> float:
        """As long as the exchange says, and longer from ban to ban where it does not."""
        after = answer.headers.get("retry-after", "")
        if after.isdecimal():
            return float(after)
        until = _BANNED_UNTIL.search(answer.body)
        if until is not None:
            return max(LIMIT_SEC, int(until[1]) / 1e3 - self._now_ns() / 1e9)
        if answer.status == TOO_MANY:
            return LIMIT_SEC
        if not self.budget.blocked_sec or not self._bans:
            # What was under way together and is refused together is one ban.
            self._bans += 1
        return min(BAN_MOST_SEC, BAN_FIRST_SEC * 2.0 ** min(self._bans - 1, 20))

    def _pause(self, kind: str) -> None:
        failures = self._failures[kind] = self._failures.get(kind, 0) + 1
        wait_sec = backoff_sec(failures, PAUSE_FIRST_SEC, PAUSE_MOST_SEC, self._chance.random())
        self._paused_until_sec[kind] = _loop_sec() + wait_sec

    def _failed(self, reason: str, text: str) -> None:
        count_reason(self.by_status, reason)
        logger.warning("%s", text)

    def status(self) -> dict[str, Any]:
        """For `/status`."""
        return {
            "requests": self.requests,
            "by_status": dict(sorted(self.by_status.items())),
            "slow": dict(sorted(self.slow.items())),
            "weight_used": self.budget.used,
            "weight_per_minute": self.budget.per_minute,
            "blocked_sec": round(self.budget.blocked_sec, 1),
        }


def _loop_sec() -> float:
    return asyncio.get_running_loop().time()
