"""What comes out, what is held back and why, and whether the scales behind it are in order."""

from __future__ import annotations

from typing import Final

from grafana.boards.common import OF_SYMBOL, SYMBOL, of_symbol, trailing_hour
from grafana.panels import ORANGE, RED, Board, Panel, Query, Row, Unit

SHARE: Final = {"lowest": 0.0, "highest": 1.0}


def _tail(limit: str, normal: str) -> tuple[Panel, Panel]:
    """p(|Z| > limit), of all by service, and by symbol."""
    text = (
        f"Share of the z values of the trailing hour beyond {limit}. A normal distribution has {normal}; markets have "
        "more. What counts is that it stays where it was: a jump means a scale that has lost its hold."
    )
    return (
        Panel(
            f"p(|Z| > {limit}), by service",
            text,
            Unit.PercentUnit,
            (Query(f'service_limit:feature_z_above:ratio_rate1h{{limit="{limit}"}}', "{{service}}"),),
            width=12,
            lowest=0,
        ),
        Panel(
            f"p(|Z| > {limit}), by symbol",
            text,
            Unit.PercentUnit,
            (
                Query(
                    f'service_symbol_limit:feature_z_above:ratio_rate1h{{limit="{limit}",symbol=~"$symbol"}}',
                    "{{service}} {{symbol}}",
                ),
            ),
            width=12,
            lowest=0,
        ),
    )


BOARD: Final = Board(
    uid="orderflow-signals",
    title="Order flow: signals",
    text="What comes out, what is held back and why, and the trends of a day that show whether the scales are in order.",
    variables=(SYMBOL,),
    since="now-24h",
    refresh="1m",
    rows=(
        Row(
            "Signals",
            (
                Panel(
                    "Signals passed, by direction",
                    "Blocked ones left out.",
                    Unit.CountsPerMinute,
                    (
                        Query(
                            '60 * sum by (direction) (rate(signals_total{symbol=~"$symbol",gating="passed"}[5m]))',
                            "{{direction}}",
                        ),
                    ),
                    kind="bars",
                    lowest=0,
                ),
                Panel(
                    "Blocked, by reason",
                    "Each guard that has held a record back; one record may be held back by several. Of all symbols, whichever "
                    "are chosen.",
                    Unit.CountsPerMinute,
                    (Query("60 * sum by (reason) (rate(signals_gated_total[5m]))", "{{reason}}"),),
                    kind="bars",
                    lowest=0,
                ),
                Panel(
                    "Share blocked",
                    "Of all records of the signal service.",
                    Unit.PercentUnit,
                    (
                        Query(
                            f'sum by (symbol) (rate(signals_total{{symbol=~"$symbol",gating="blocked"}}[5m]))'
                            f" / sum by (symbol) (rate(signals_total{OF_SYMBOL}[5m]))",
                            "{{symbol}}",
                        ),
                    ),
                    lowest=0,
                    highest=1,
                ),
                Panel(
                    "Records of the signal service, by symbol",
                    "Passed and blocked. A line that ends: the symbol gives none any more.",
                    Unit.RecordsPerSecond,
                    (Query(f"sum by (symbol) (rate(signals_total{OF_SYMBOL}[5m]))", "{{symbol}}"),),
                    lowest=0,
                ),
                Panel(
                    "Events of the features, trailing hour",
                    "Divergences and anomalies, by type. Their number is no aim.",
                    Unit.Short,
                    (
                        Query(
                            trailing_hour("event_type", "fusion_events_total"),
                            "{{event_type}}",
                            eventful=True,
                        ),
                    ),
                    lowest=0,
                ),
                Panel(
                    "Probability",
                    "That the price goes the score's way; there only where a calibration is.",
                    Unit.PercentUnit,
                    (Query(f"max by (symbol) (fusion_proba{OF_SYMBOL})", "{{symbol}}", eventful=True),),
                    lowest=0,
                    highest=1,
                ),
            ),
        ),
        Row("Trends of a day: tails", (*_tail("2", "4.6 %"), *_tail("3", "0.27 %"))),
        Row(
            "Trends of a day: scales and rates",
            (
                of_symbol(
                    "Scale, median",
                    "cvd_scale_median",
                    Unit.Short,
                    "Of the newest 500 trades, in base units.",
                    lowest=0,
                ),
                Panel(
                    "Received, overall, and records by regime",
                    "Frames from the exchange over all routes; records of the fusion of symbols that were active, quiet, neutral.",
                    Unit.EventsPerSecond,
                    (
                        Query(":recv_frames:rate1m", "frames, overall"),
                        Query("regime:fusion_records:rate1m", "records, {{regime}}"),
                    ),
                    lowest=0,
                ),
                Panel(
                    "Floor of the scale hit",
                    "Share of the newest 500 trades whose scale was the floor. Above 60 % for 15 minutes an alert fires: z "
                    "is then made of the floor, not of the market.",
                    Unit.PercentUnit,
                    (Query(f"max by (symbol) (cvd_floor_hit_rate{OF_SYMBOL})", "{{symbol}}"),),
                    lowest=0,
                    highest=1,
                    steps=((0.6, RED),),
                ),
                of_symbol(
                    "Floor of sigma hit",
                    "sigma_floor_hit_rate",
                    Unit.PercentUnit,
                    "The same among the newest 500 trades that have a z.",
                    **SHARE,
                ),
                of_symbol(
                    "Clipped",
                    "winsor_hit_rate",
                    Unit.PercentUnit,
                    "Share of these that were clipped at WINSOR_LIMIT.",
                    **SHARE,
                ),
                Panel(
                    "Factors apart",
                    "How much older the one factor is than the other; beyond .5 s signals are blocked.",
                    Unit.Seconds,
                    (Query(f"max by (symbol) (fusion_lag_sec{OF_SYMBOL})", "{{symbol}}"),),
                    lowest=0,
                    steps=((0.25, ORANGE), (0.5, RED)),
                ),
            ),
        ),
    ),
)
