"""Symbols of the simulated exchange: increments, filters, and the body of `GET /fapi/v1/exchangeInfo`."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from decimal import Decimal
from math import gcd
from typing import Any, Final

WEIGHT_PER_MINUTE: Final = 2400
_QUOTES: Final = ("USDT", "USDC", "FDUSD", "BUSD", "BTC")
_ORDER_TYPES: Final = (
    "LIMIT",
    "MARKET",
    "STOP",
    "STOP_MARKET",
    "TAKE_PROFIT",
    "TAKE_PROFIT_MARKET",
    "TRAILING_STOP_MARKET",
)
_TIMES_IN_FORCE: Final = ("GTC", "IOC", "FOK", "GTX", "GTD")
_PERPETUAL_DELIVERY_MS: Final = 4_133_404_800_000
_SETTLED_HOUR: Final = 8
_ONBOARD_MS: Final = 1_569_398_400_000


@dataclass(frozen=True, slots=True)
class Instrument:
    """One contract. `tick` and `step` are decimal strings; the decimals are those of prices and quantities on the wire."""

    symbol: str
    tick: str
    step: str
    price_decimals: int
    qty_decimals: int
    notional_least: str = "5"

    @property
    def pair(self) -> str:
        """`BTCUSDT_261225` -> `BTCUSDT`."""
        return self.symbol.partition("_")[0]

    @property
    def base(self) -> str:
        """`BTCUSDT` -> `BTC`."""
        return self.pair.removesuffix(self.quote)

    @property
    def quote(self) -> str:
        return next((quote for quote in _QUOTES if self.pair.endswith(quote) and self.pair != quote), "")

    @property
    def delivery_ms(self) -> int | None:
        """When a dated contract is settled, milliseconds since the epoch; None for a perpetual one."""
        try:
            day = datetime.strptime(self.symbol.partition("_")[2], "%y%m%d").replace(hour=_SETTLED_HOUR, tzinfo=UTC)
        except ValueError:
            return None
        return int(day.timestamp() * 1_000)


def infer_instrument(symbol: str, prices: Iterable[str], quantities: Iterable[str]) -> Instrument:
    """The coarsest increments that fit every price and quantity seen, and the wire's decimals."""
    tick, price_decimals = _increment(prices)
    step, qty_decimals = _increment(quantities)
    return Instrument(symbol, tick, step, price_decimals, qty_decimals)


def _increment(values: Iterable[str]) -> tuple[str, int]:
    """Greatest common divisor of decimal strings as a decimal string, and their greatest number of decimals.

    One unit of the last decimal where there is nothing to infer from.
    """
    texts = [text for text in values if text]
    decimals = max((len(text.partition(".")[2]) for text in texts), default=0)
    divisor = 0
    for text in texts:
        whole, _, fraction = text.partition(".")
        divisor = gcd(divisor, int(whole + fraction.ljust(decimals, "0")))
    return f"{Decimal(divisor or 1).scaleb(-decimals):f}", decimals


def exchange_info(instruments: Iterable[Instrument], server_time_ms: int) -> dict[str, Any]:
    """Body of `GET /fapi/v1/exchangeInfo`."""
    listed = list(instruments)
    nearest: dict[str, int] = {}
    for each in listed:
        if each.delivery_ms is not None:
            nearest[each.pair] = min(each.delivery_ms, nearest.get(each.pair, each.delivery_ms))
    symbols = [_symbol(each, nearest.get(each.pair)) for each in listed]
    quotes = sorted({each["marginAsset"] for each in symbols})
    return {
        "timezone": "UTC",
        "serverTime": server_time_ms,
        "futuresType": "U_MARGINED",
        "rateLimits": [
            {"rateLimitType": "REQUEST_WEIGHT", "interval": "MINUTE", "intervalNum": 1, "limit": WEIGHT_PER_MINUTE},
            {"rateLimitType": "ORDERS", "interval": "MINUTE", "intervalNum": 1, "limit": 1200},
            {"rateLimitType": "ORDERS", "interval": "SECOND", "intervalNum": 10, "limit": 300},
        ],
        "exchangeFilters": [],
        "assets": [{"asset": quote, "marginAvailable": True, "autoAssetExchange": "-100"} for quote in quotes],
        "symbols": symbols,
    }


def _symbol(instrument: Instrument, nearest_ms: int | None) -> dict[str, Any]:
    delivery_ms = instrument.delivery_ms
    dated = "CURRENT_QUARTER" if delivery_ms == nearest_ms else "NEXT_QUARTER"
    return {
        "symbol": instrument.symbol,
        "pair": instrument.pair,
        "contractType": "PERPETUAL" if delivery_ms is None else dated,
        "deliveryDate": _PERPETUAL_DELIVERY_MS if delivery_ms is None else delivery_ms,
        "onboardDate": _ONBOARD_MS,
        "status": "TRADING",
        "maintMarginPercent": "2.5000",
        "requiredMarginPercent": "5.0000",
        "baseAsset": instrument.base,
        "quoteAsset": instrument.quote,
        "marginAsset": instrument.quote,
        "pricePrecision": instrument.price_decimals,
        "quantityPrecision": instrument.qty_decimals,
        "baseAssetPrecision": 8,
        "quotePrecision": 8,
        "underlyingType": "COIN",
        "underlyingSubType": [],
        "triggerProtect": "0.0500",
        "liquidationFee": "0.020000",
        "marketTakeBound": "0.05",
        "maxMoveOrderLimit": 1000,
        "filters": _filters(instrument),
        "orderTypes": list(_ORDER_TYPES),
        "timeInForce": list(_TIMES_IN_FORCE),
        "permissionSets": ["GRID", "COPY", "RPI"],
    }


def _filters(instrument: Instrument) -> list[dict[str, Any]]:
    tick, step = Decimal(instrument.tick), Decimal(instrument.step)
    return [
        {
            "filterType": "PRICE_FILTER",
            "minPrice": f"{tick:f}",
            "maxPrice": f"{tick * 10_000_000:f}",
            "tickSize": f"{tick:f}",
        },
        {"filterType": "LOT_SIZE", "minQty": f"{step:f}", "maxQty": f"{step * 1_000_000:f}", "stepSize": f"{step:f}"},
        {
            "filterType": "MARKET_LOT_SIZE",
            "minQty": f"{step:f}",
            "maxQty": f"{step * 120_000:f}",
            "stepSize": f"{step:f}",
        },
        {"filterType": "MAX_NUM_ORDERS", "limit": 200},
        {"filterType": "MIN_NOTIONAL", "notional": instrument.notional_least},
        {
            "filterType": "PERCENT_PRICE",
            "multiplierUp": "1.0500",
            "multiplierDown": "0.9500",
            "multiplierDecimal": "4",
        },
        {"filterType": "POSITION_RISK_CONTROL", "positionControlSide": "NONE"},
    ]
