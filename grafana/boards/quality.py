"""Whether the signals are any good: the evaluator's figures. Empty until it runs."""

from __future__ import annotations

from typing import Final

from grafana.boards.common import SYMBOL, newest_by_symbol, of_symbol
from grafana.panels import GREEN, RED, Board, Panel, Query, Row, Unit

SHARE: Final = {"lowest": 0.0, "highest": 1.0}
WAITING: Final = frozenset(
    {
        "fusion_auc_active",
        "fusion_auc_active_lower",
        "slice_auc_",
        "topk_hit_rate_5p",
        "ece",
        "brier",
        "platt_train_samples",
        "platt_test_samples",
        "merge_time_diff_ms",
        "match_rate",
        "executor_halted",
    }
)
"""Metrics of the evaluator and the executor, which nothing exports yet. A name that ends with _ is a beginning."""

BOARD: Final = Board(
    uid="orderflow-quality",
    title="Order flow: quality of signals",
    text="Whether the signals are any good. The figures come from the evaluator and the executor; without them the "
    "panels are empty. Below stands what the features say of themselves.",
    variables=(SYMBOL,),
    since="now-24h",
    refresh="1m",
    rows=(
        Row(
            "Does it predict",
            (
                Panel(
                    "AUC of the fusion, active hours",
                    ".5 is a coin. Lower: the confidence bound, which must not be below .58 for ten minutes.",
                    Unit.Short,
                    (Query("fusion_auc_active", "AUC"), Query("fusion_auc_active_lower", "lower bound")),
                    lowest=0.4,
                    highest=0.8,
                    decimals=3,
                    below=RED,
                    steps=((0.58, GREEN),),
                ),
                Panel(
                    "AUC by slice",
                    "Active and quiet, sessions, volatility.",
                    Unit.Short,
                    (Query('{__name__=~"slice_auc_.+"}', "{{__name__}}"),),
                    lowest=0.4,
                    highest=0.8,
                    decimals=3,
                ),
                Panel(
                    "Hit rate of the strongest 5 %",
                    "Share whose direction was right.",
                    Unit.PercentUnit,
                    (Query("topk_hit_rate_5p", "hit rate"),),
                    lowest=0,
                    highest=1,
                ),
            ),
        ),
        Row(
            "Is its probability true",
            (
                Panel(
                    "Calibration error (ECE)",
                    "Mean distance between what was said and what happened. Above .10 for ten minutes an alert fires.",
                    Unit.Short,
                    (Query("ece", "ECE"),),
                    lowest=0,
                    decimals=3,
                    steps=((0.1, RED),),
                ),
                Panel(
                    "Brier score",
                    "Mean squared error of the probability; .25 is a coin.",
                    Unit.Short,
                    (Query("brier", "Brier"),),
                    lowest=0,
                    decimals=3,
                    steps=((0.25, RED),),
                ),
                Panel(
                    "Samples of the calibration",
                    "It is fitted on the train samples and judged on the test samples; no test samples for ten minutes fires an alert.",
                    Unit.Short,
                    (Query("platt_train_samples", "train"), Query("platt_test_samples", "test")),
                    lowest=0,
                ),
            ),
        ),
        Row(
            "Is it joined rightly",
            (
                Panel(
                    "Time between joined rows",
                    "Of a signal and the price that it is judged by. p99 above 2000 ms for five minutes fires an alert.",
                    Unit.Milliseconds,
                    (Query("max by (quantile) (merge_time_diff_ms)", "p{{quantile}}"),),
                    lowest=0,
                    steps=((2000, RED),),
                ),
                Panel(
                    "Match rate",
                    "Signals that found their price. At least 80 %.",
                    Unit.PercentUnit,
                    (Query("match_rate", "matched"),),
                    lowest=0,
                    highest=1,
                    below=RED,
                    steps=((0.8, GREEN),),
                ),
                Panel(
                    "Executor",
                    "Halted: it places no order until somebody lets it go on.",
                    Unit.Short,
                    (Query("max(executor_halted)", "executor"),),
                    kind="states",
                    names={0: ("running", GREEN), 1: ("halted", RED)},
                    steps=((1, RED),),
                ),
            ),
        ),
        Row(
            "What the features say of themselves",
            (
                of_symbol(
                    "Floor of sigma hit",
                    "sigma_floor_hit_rate",
                    Unit.PercentUnit,
                    "Share of the newest 500 trades with a z whose scale was the floor.",
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
                    "Direction of CVD",
                    "As is, or flipped because it has proved to point the other way out of sample.",
                    Unit.Short,
                    (newest_by_symbol("cvd_direction"),),
                    kind="states",
                    names={-1: ("flipped", RED), 1: ("as is", GREEN)},
                    steps=((0, GREEN),),
                    below=RED,
                ),
            ),
        ),
    ),
)
