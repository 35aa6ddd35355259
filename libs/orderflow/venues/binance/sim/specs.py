"""How the symbols of the synthetic market look: prices, increments, usual quantities."""

from __future__ import annotations

import math
from collections.abc import Iterable
from decimal import Decimal, InvalidOperation
from itertools import chain
from typing import Annotated, Final
from zlib import crc32

import msgspec

from orderflow.errors import ConfigError
from orderflow.venues.binance.sim.instruments import Instrument

_MADE_UP_NOTIONAL: Final = 30_000.0
"""Usual quantity at the best price of a made-up symbol, in quote units."""


class SymbolSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """How a synthetic symbol looks. Prices and quantities on the wire have exactly the given decimals."""

    symbol: str
    price: Annotated[float, msgspec.Meta(gt=0, description="where it starts, in quote units")]
    tick: str
    step: str
    price_decimals: Annotated[int, msgspec.Meta(ge=0, le=8)]
    qty_decimals: Annotated[int, msgspec.Meta(ge=0, le=8)]
    touch_qty: Annotated[float, msgspec.Meta(gt=0, description="usual quantity at the best price, in base units")]
    notional_least: str = "5"
    volatility_bps: Annotated[
        float, msgspec.Meta(ge=0, le=20, description="of the mid, per square root of a second, in the normal regime")
    ] = 0.3

    def __post_init__(self) -> None:
        for name, value, decimals in (
            ("tick", self.tick, self.price_decimals),
            ("step", self.step, self.qty_decimals),
        ):
            if units(value, decimals) < 1:
                raise ValueError(
                    f"{name} of {self.symbol} is {value!r}: it must be a decimal above 0 with at most {decimals} decimals"
                )

    def instrument(self) -> Instrument:
        return Instrument(
            self.symbol, self.tick, self.step, self.price_decimals, self.qty_decimals, self.notional_least
        )


def units(value: str, decimals: int) -> int:
    """A decimal string in units of its last decimal; 0 where it is no such decimal."""
    try:
        scaled = Decimal(value).scaleb(decimals)
        return int(scaled) if scaled == scaled.to_integral_value() else 0
    except (InvalidOperation, ValueError, OverflowError):
        return 0


def _spec(symbol: str, price: float, tick: str, step: str, touch_qty: float, notional: str = "5") -> SymbolSpec:
    return SymbolSpec(
        symbol=symbol,
        price=price,
        tick=tick,
        step=step,
        price_decimals=len(tick.partition(".")[2]),
        qty_decimals=len(step.partition(".")[2]),
        touch_qty=touch_qty,
        notional_least=notional,
    )


SPECS: Final[dict[str, SymbolSpec]] = {
    each.symbol: each
    for each in (
        _spec("BTCUSDT", 84_551.0, "0.10", "0.001", 6.0, "50"),
        _spec("ETHUSDT", 3_120.0, "0.01", "0.001", 60.0, "20"),
        _spec("SOLUSDT", 168.0, "0.0100", "0.01", 450.0),
        _spec("BNBUSDT", 905.0, "0.010", "0.01", 25.0),
        _spec("XRPUSDT", 2.31, "0.0001", "0.1", 30_000.0),
        _spec("DOGEUSDT", 0.214, "0.000010", "1", 200_000.0),
        _spec("ADAUSDT", 0.79, "0.00010", "1", 60_000.0),
        _spec("LINKUSDT", 18.4, "0.001", "0.01", 300.0),
        _spec("AVAXUSDT", 27.6, "0.0010", "1", 300.0),
        _spec("LTCUSDT", 96.0, "0.01", "0.001", 120.0),
    )
}


def spec_of(symbol: str) -> SymbolSpec:
    """The spec of a well-known symbol, or of a made-up one: a function of its name alone.

    Raises
    ------
    ConfigError
        It is no symbol as the exchange writes them.
    """
    letters = symbol.replace("_", "")
    # Streams are named in lower case: a name that does not come back from there would lose its frames.
    if not letters.isalnum() or symbol != symbol.upper() or symbol != symbol.lower().upper():
        raise ConfigError(
            f"symbol is {symbol!r}: it must be letters, digits and `_` in upper case, as in BTCUSDT or BTCUSDT_261225"
        )
    known = SPECS.get(symbol) or SPECS.get(symbol.partition("_")[0])
    if known is None:
        return _made_up(symbol)
    return msgspec.structs.replace(known, symbol=symbol)


def symbol_names(count: int) -> tuple[str, ...]:
    """That many symbols: the well-known ones, a dated one and one in other letters first, then made-up ones."""
    fixed = (*SPECS, "BTCUSDT_261225", "币安人生USDT")
    made_up: Iterable[str] = (f"COIN{number:03d}USDT" for number in range(count))
    return tuple(name for name, _ in zip(chain(fixed, made_up), range(count), strict=False))


def _made_up(symbol: str) -> SymbolSpec:
    """A price between 0.01 and 1,000 by the name, four or five digits of it, and round lots of about one per mille."""
    price = float(f"{10.0 ** (crc32(symbol.encode()) % 5_000 / 1_000 - 2.0):.4g}")
    tick_exponent = math.floor(math.log10(price)) - 4
    step_exponent = min(0, math.floor(math.log10(_MADE_UP_NOTIONAL / price)) - 3)
    return _spec(
        symbol,
        price,
        f"{Decimal(1).scaleb(tick_exponent):f}",
        f"{Decimal(1).scaleb(step_exponent):f}",
        _MADE_UP_NOTIONAL / price,
    )
