"""What the market does, symbol by symbol."""

from __future__ import annotations

from typing import Final

from grafana.boards.common import OF_SYMBOL, REGIMES, SYMBOL, newest_by_symbol, of_symbol
from grafana.panels import Board, Panel, Query, Row, Unit

BPS: Final = "suffix: bps"
BOTH_WAYS: Final = {"lowest": -1.0, "highest": 1.0}
SHARE: Final = {"lowest": 0.0, "highest": 1.0}


def _regime(selector_value: str, number: int) -> str:
    return f'{number} * max by (symbol) (fusion_regime{{symbol=~"$symbol",regime="{selector_value}"}})'


BOARD: Final = Board(
    uid="orderflow-order-flow",
    title="Order flow: by symbol",
    text="What the market does, symbol by symbol: the newest values of the features. Definitions: docs/definitions.md.",
    variables=(SYMBOL,),
    since="now-30m",
    rows=(
        Row(
            "Score",
            (
                of_symbol(
                    "Fusion score", "fusion_score", Unit.Short, "Weighted z of both factors; positive buys.", width=12
                ),
                Panel(
                    "Score and its factors",
                    "The z of order flow imbalance, of the cumulative volume delta, and of the score. Choose one symbol.",
                    Unit.Short,
                    (
                        Query(f"max by (symbol) (ofi_z{OF_SYMBOL})", "{{symbol}} ofi"),
                        Query(f"max by (symbol) (cvd_z{OF_SYMBOL})", "{{symbol}} cvd"),
                        Query(f"max by (symbol) (fusion_score_z{OF_SYMBOL})", "{{symbol}} score"),
                    ),
                    width=12,
                ),
                of_symbol(
                    "Consistency", "fusion_consistency", Unit.Short, "How far both factors say the same.", **SHARE
                ),
                Panel(
                    "Regime",
                    "In force for each symbol; schedule and market decide.",
                    Unit.Short,
                    (
                        Query(
                            " or ".join(_regime(name, int(number)) for number, (name, _) in REGIMES.items()),
                            "{{symbol}}",
                        ),
                    ),
                    kind="states",
                    names=REGIMES,
                ),
                of_symbol("Volatility", "fusion_volatility_bps", BPS, "Of the trailing minute.", lowest=0),
            ),
        ),
        Row(
            "Order flow imbalance",
            (
                of_symbol("z of OFI", "ofi_z", Unit.Short, "Newest, clipped as on the topic."),
                of_symbol(
                    "OFI of the window",
                    "ofi_sum_window_base",
                    Unit.Short,
                    "Sum over the trailing window, in base units.",
                ),
                of_symbol(
                    "Queue imbalance",
                    "ofi_queue_imbalance",
                    Unit.Short,
                    "At the best level: 1 is all bid.",
                    **BOTH_WAYS,
                ),
                of_symbol("Micro-price", "ofi_micro_offset_bps", BPS, "Less the mid."),
                of_symbol(
                    "Spread", "ofi_spread_bps", BPS, "Best ask less best bid. Wide spreads block signals.", lowest=0
                ),
                of_symbol("Quotes", "ofi_quote_rate_tps", Unit.EventsPerSecond, "A second of event time.", lowest=0),
            ),
        ),
        Row(
            "Cumulative volume delta",
            (
                of_symbol("Price", "cvd_price", Unit.Short, "Of the newest trade. Choose one symbol."),
                of_symbol(
                    "CVD", "cvd_base", Unit.Short, "Bought less sold by takers, in base units, since the session began."
                ),
                of_symbol("z of CVD", "cvd_z", Unit.Short, "Newest, clipped."),
                of_symbol("Imbalance of 10 s", "cvd_imbalance_10s", Unit.Short, "Signed over total flow.", **BOTH_WAYS),
                of_symbol("Buy ratio", "cvd_buy_ratio", Unit.PercentUnit, "Of the trailing minute.", **SHARE),
                Panel(
                    "VPIN",
                    "Share of one-sided volume over equal buckets of volume; none before the first fifty of them.",
                    Unit.Short,
                    (Query(f"max by (symbol) (cvd_vpin{OF_SYMBOL})", "{{symbol}}", eventful=True),),
                    lowest=0,
                    highest=1,
                ),
                of_symbol(
                    "Trades",
                    "cvd_trade_rate_tps",
                    Unit.EventsPerSecond,
                    "A second, of the trailing minute of event time.",
                    lowest=0,
                ),
                of_symbol("Scale, median", "cvd_scale_median", Unit.Short, "Of the newest 500 trades, in base units."),
                Panel(
                    "Factors apart",
                    "How much older the one factor is than the other. Above .25 s the stronger one counts alone.",
                    Unit.Seconds,
                    (newest_by_symbol("fusion_lag_sec"),),
                    steps=((0.25, "orange"),),
                    lowest=0,
                ),
            ),
        ),
    ),
)
