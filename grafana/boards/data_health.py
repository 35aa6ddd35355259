"""Can the numbers be trusted: what is missing, repeated, refused, silent, late."""

from __future__ import annotations

from typing import Final

from grafana.boards.common import OF_SYMBOL, RATE, SYMBOL, of_symbol, rate_by, trailing_hour
from grafana.panels import GREEN, ORANGE, RED, Board, Panel, Query, Row, Unit

BUCKETS: Final = "[10m]"
"""Several minutes must be judged within it, or the heat map would be mostly holes."""


def _hourly(title: str, metric: str, label: str, text: str, width: int = 8) -> Panel:
    """How many within the trailing hour, by a label; where there are none there is no line."""
    query = Query(trailing_hour(label, metric), f"{{{{{label}}}}}", eventful=True)
    return Panel(title, text, Unit.Short, (query,), width=width, lowest=0)


BOARD: Final = Board(
    uid="orderflow-data-health",
    title="Order flow: data health",
    text="Can the numbers be trusted: what is missing, repeated, refused, silent, late. Rows of the topics say the same "
    "of themselves (book_state, gap_count).",
    variables=(SYMBOL,),
    since="now-6h",
    refresh="30s",
    rows=(
        Row(
            "Completeness",
            (
                Panel(
                    "Empty one-minute buckets",
                    "Share of the minutes without a single trade, of ten minutes, a row for each symbol: dark is empty. "
                    "A whole column is the connection, a whole row a symbol that does not trade. Time between two sessions is not "
                    "judged.",
                    Unit.PercentUnit,
                    (
                        Query(
                            f"sum by (symbol) (increase(lake_empty_minutes_total{OF_SYMBOL}{BUCKETS}))"
                            f" / sum by (symbol) (increase(lake_minutes_total{OF_SYMBOL}{BUCKETS}))",
                            "{{symbol}}",
                        ),
                    ),
                    kind="heatmap",
                    width=12,
                    height=9,
                ),
                Panel(
                    "Empty buckets, trailing hour",
                    "Over all symbols; above .5 % an alert fires. The lake's own check asks for less than .1 %.",
                    Unit.PercentUnit,
                    (Query(":lake_empty_minutes:ratio_increase1h", "empty"),),
                    kind="stat",
                    width=4,
                    height=9,
                    decimals=2,
                    steps=((0.001, ORANGE), (0.005, RED)),
                ),
                Panel(
                    "Duplicates",
                    "Frames that had come before and were dropped, of all frames received; five minutes. Two sockets hand "
                    "over to each other, so a few are as they should be.",
                    Unit.PercentUnit,
                    (Query(":dedup_hits:ratio_rate5m", "duplicates"),),
                    width=8,
                    height=9,
                    lowest=0,
                ),
                Panel(
                    "Duplicates, by stream",
                    "Dropped as repetitions; none of them reaches a feature.",
                    Unit.MessagesPerSecond,
                    (rate_by("stream", "dedup_hits_total"),),
                    lowest=0,
                ),
                _hourly(
                    "Gaps, trailing hour",
                    "gaps_total",
                    "reason",
                    "Told of a symbol, by reason. Each is a record of market.events too. Of all symbols, whichever are chosen.",
                ),
                _hourly(
                    "Missing frames, trailing hour",
                    "missing_frames_total",
                    "reason",
                    "That the recorder has said it lacks, by reason. Of all symbols, whichever are chosen.",
                ),
                Panel(
                    "Missing trades, trailing hour",
                    "Backfilled: fetched afterwards, nothing is lost. Lost: given up; cvd is marked from there.",
                    Unit.Short,
                    (
                        Query("sum(increase(backfilled_trades_total[1h]))", "backfilled"),
                        Query("sum(increase(lost_trades_total[1h]))", "lost"),
                    ),
                    lowest=0,
                ),
                _hourly(
                    "Rejects, trailing hour",
                    "rejects_total",
                    "reason",
                    "Frames and rows refused, whole, by reason; they are in quality.rejects. Of all symbols, whichever are chosen.",
                ),
                Panel(
                    "Dropped under pressure",
                    "Dropped: lost, and told as missing. Conflated: quotes superseded by newer ones. Any at all means that "
                    "this machine was too slow for a moment.",
                    Unit.MessagesPerSecond,
                    (
                        Query(f"sum(rate(dropped_frames_total{RATE}))", "dropped"),
                        Query(f"sum(rate(conflated_frames_total{RATE}))", "conflated"),
                    ),
                    lowest=0,
                ),
            ),
        ),
        Row(
            "Books and streams",
            (
                Panel(
                    "Book synced, by symbol",
                    "Green: the book can be trusted. Red for a minute: an alert.",
                    Unit.Short,
                    (Query(f"min by (symbol) (book_synced{OF_SYMBOL})", "{{symbol}}"),),
                    kind="states",
                    width=12,
                    steps=((1, GREEN),),
                    below=RED,
                    names={0: ("not synced", RED), 1: ("synced", GREEN)},
                ),
                Panel(
                    "Books, by state",
                    "none: nothing seen yet. resyncing: a snapshot is under way. stale: diffs have stopped. synced: whole.",
                    Unit.Short,
                    (Query("sum by (state) (books)", "{{state}}"),),
                    width=6,
                    lowest=0,
                ),
                _hourly(
                    "Books begun anew, trailing hour",
                    "resyncs_total",
                    "reason",
                    "By reason. Of all symbols, whichever are chosen.",
                    width=6,
                ),
                Panel(
                    "Silent streams",
                    "Streams that have sent nothing for longer than they may, by kind.",
                    Unit.Short,
                    (Query("sum by (stream) (streams_silent)", "{{stream}}"),),
                    lowest=0,
                ),
                Panel(
                    "Silent now",
                    "Which ones.",
                    Unit.Short,
                    (
                        Query(
                            f"max by (symbol, stream) (stream_silent{OF_SYMBOL})",
                            "{{symbol}} {{stream}}",
                            eventful=True,
                        ),
                    ),
                    kind="states",
                    names={1: ("silent", RED)},
                    steps=((1, RED),),
                ),
                Panel(
                    "Books against quotes",
                    "Diffs whose best prices were held against the quote that they belong to, and disagreed: the book is "
                    "wrong, or a quote was lost on the way. Several quotes in a row prove the book wrong; an alert fires then.",
                    Unit.PercentUnit,
                    (
                        Query(
                            f"sum(rate(oracle_failed_total{RATE})) / sum(rate(oracle_checked_total{RATE}))", "disagreed"
                        ),
                    ),
                    lowest=0,
                ),
            ),
        ),
        Row(
            "Clocks and writing",
            (
                Panel(
                    "Clock drift",
                    "This machine's clock less the exchange's, below 0 where it is behind. Beyond 200 ms either way an alert fires.",
                    Unit.Milliseconds,
                    (Query("max by (instance) (clock_drift_ms)", "{{instance}}"),),
                    below=RED,
                    steps=((-200, GREEN), (200, RED)),
                ),
                of_symbol(
                    "Skew of trades and depth",
                    "skew_ms",
                    Unit.Milliseconds,
                    "Exchange time of the newest depth less that of the newest trade: how far the two inputs of a feature are apart.",
                ),
                Panel(
                    "Sockets lost or refused, trailing hour",
                    "Beyond the planned hand-over; attempts to connect that were refused count too. More than ten an hour fires an alert.",
                    Unit.Short,
                    (Query("sum(increase(ws_reconnects_total[1h]))", "reconnects"),),
                    lowest=0,
                    steps=((10, RED),),
                ),
                Panel(
                    "Seconds to write a cut",
                    "The lake's and the sinks' newest cut: all files of a partition, durable on the disk.",
                    Unit.Seconds,
                    (Query("max by (service) (parquet_flush_sec)", "{{service}}"),),
                    lowest=0,
                ),
                Panel(
                    "Write errors, trailing hour",
                    "Attempts that failed, and partitions whose files can't be written now. Kafka holds what waits.",
                    Unit.Short,
                    (
                        Query("sum by (service) (increase(write_errors_total[1h]))", "{{service}} errors"),
                        Query("sum by (service) (lake_partitions_stuck)", "{{service}} stuck"),
                    ),
                    lowest=0,
                    steps=((1, RED),),
                ),
                Panel(
                    "Rows made durable, by kind",
                    "What the lake writes, over five minutes.",
                    Unit.RowsPerSecond,
                    (Query("sum by (kind) (rate(lake_rows_total[5m]))", "{{kind}}"),),
                    lowest=0,
                ),
            ),
        ),
    ),
)
