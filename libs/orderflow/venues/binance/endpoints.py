"""Where Binance USD-M is reached, and what requests weigh. Every base URL can be overridden: the simulated exchange
and the testnet speak the same protocol.
"""

from __future__ import annotations

from typing import Final
from urllib.parse import quote, urlencode

import msgspec

from orderflow.venues.binance.streams import Route


class Endpoints(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Base URLs, without a path and a slash at the end."""

    ws_url: str = "wss://fstream.binance.com"
    rest_url: str = "https://fapi.binance.com"

    def __post_init__(self) -> None:
        for field, value, schemes in (
            ("ws_url", self.ws_url, ("ws://", "wss://")),
            ("rest_url", self.rest_url, ("http://", "https://")),
        ):
            if not value.startswith(schemes) or value.endswith("/"):
                raise ValueError(
                    f"{field} is {value!r}: it must begin with {' or '.join(schemes)} and end without a slash"
                )

    def socket(self, route: Route) -> str:
        """The combined-mode socket of a route. Un-routed sockets are acknowledged and stay silent."""
        return f"{self.ws_url}/{route}/stream"

    def depth(self, symbol: str, limit: int = 1000) -> str:
        """Snapshot of the book.

        Raises
        ------
        ValueError
            The exchange has no such limit.
        """
        depth_weight(limit)
        return self._rest(DEPTH_PATH, symbol=symbol, limit=limit)

    def agg_trades(self, symbol: str, from_id: int, limit: int = 1000) -> str:
        """Aggregate trades from an id on, at most 1000.

        Raises
        ------
        ValueError
            `limit` is not within 1 and 1000.
        """
        if not 1 <= limit <= AGG_TRADES_MAX_LIMIT:
            raise ValueError(f"limit is {limit}: aggTrades takes 1 to {AGG_TRADES_MAX_LIMIT}")
        return self._rest(AGG_TRADES_PATH, symbol=symbol, fromId=from_id, limit=limit)

    def server_time(self) -> str:
        return self._rest(TIME_PATH)

    def exchange_info(self) -> str:
        return self._rest(EXCHANGE_INFO_PATH)

    def _rest(self, path: str, **parameters: str | int) -> str:
        # Symbols in Chinese characters exist; the exchange wants them percent-encoded as UTF-8.
        query = urlencode(parameters, quote_via=quote)
        return f"{self.rest_url}{path}" + (f"?{query}" if query else "")


LIVE: Final = Endpoints()
DEMO: Final = Endpoints(ws_url="wss://demo-fstream.binance.com", rest_url="https://demo-fapi.binance.com")

DEPTH_PATH: Final = "/fapi/v1/depth"
AGG_TRADES_PATH: Final = "/fapi/v1/aggTrades"
TIME_PATH: Final = "/fapi/v1/time"
EXCHANGE_INFO_PATH: Final = "/fapi/v1/exchangeInfo"

DEPTH_WEIGHTS: Final[dict[int, int]] = {5: 2, 10: 2, 20: 2, 50: 2, 100: 5, 500: 10, 1000: 20}
"""Weight of a snapshot by its limit; other limits are refused with -4021."""
AGG_TRADES_WEIGHT: Final = 20
AGG_TRADES_MAX_LIMIT: Final = 1000
TIME_WEIGHT: Final = 1
EXCHANGE_INFO_WEIGHT: Final = 1
WEIGHT_PER_MINUTE: Final = 2400
"""Per IP and UTC clock minute, shared with COIN-M; refused requests count too."""


def depth_weight(limit: int) -> int:
    """Weight of a snapshot with so many levels a side.

    Raises
    ------
    ValueError
        The exchange has no such limit.
    """
    weight = DEPTH_WEIGHTS.get(limit)
    if weight is None:
        raise ValueError(f"limit is {limit}: a snapshot's is one of {', '.join(map(str, DEPTH_WEIGHTS))}")
    return weight
