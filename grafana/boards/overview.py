"""Is it up, is it right, does anything come out."""

from __future__ import annotations

from typing import Final

from grafana.boards.common import LATENCY_STEPS, RATE, READY, rate_by
from grafana.panels import GREEN, ORANGE, RED, Board, Panel, Query, Row, Unit

BOARD: Final = Board(
    uid="orderflow-overview",
    title="Order flow: overview",
    text="Is it up, is it right, does anything come out. What each figure is: docs/metrics.md; alerts: docs/runbooks.md.",
    rows=(
        Row(
            "Now",
            (
                Panel(
                    "Services ready",
                    "Services of which every process works. Seven in all: ingestion, ofi, cvd, fusion, signal, sinks, lake. "
                    "verify, where it runs, is left out.",
                    Unit.Short,
                    (Query('sum(min by (service) (orderflow_ready{service!="verify"}))', "ready"),),
                    kind="stat",
                    width=4,
                    height=5,
                    steps=((7, GREEN),),
                    below=RED,
                ),
                Panel(
                    "Alerts firing",
                    "Of all the rules of infra/prometheus/rules; which ones stands below.",
                    Unit.Short,
                    (Query('count(ALERTS{alertstate="firing"}) or vector(0)', "firing"),),
                    kind="stat",
                    width=4,
                    height=5,
                    steps=((1, RED),),
                ),
                Panel(
                    "Books to be trusted",
                    "Share of the symbols whose order book is synchronised. Below 100 % the features of the others are marked.",
                    Unit.PercentUnit,
                    (Query('sum(books{state="synced"}) / sum(books)', "synced"),),
                    kind="stat",
                    width=4,
                    height=5,
                    lowest=0,
                    highest=1,
                    steps=((0.9, ORANGE), (1, GREEN)),
                    below=RED,
                ),
                Panel(
                    "Frames received",
                    "From the exchange, over all routes.",
                    Unit.MessagesPerSecond,
                    (Query(f"sum(rate(recv_frames_total{RATE}))", "frames"),),
                    kind="stat",
                    width=4,
                    height=5,
                ),
                Panel(
                    "Journal to signal, p99",
                    "From a frame's being handed to the journal to the signal that it belongs to, 99 % of the newest.",
                    Unit.Milliseconds,
                    (Query('max(latency_ms{hop="signal",quantile="0.99"})', "p99"),),
                    kind="stat",
                    width=4,
                    height=5,
                    steps=LATENCY_STEPS,
                ),
                Panel(
                    "Signals passed",
                    "Signals that no guard has blocked, over five minutes.",
                    Unit.CountsPerMinute,
                    (Query('60 * sum(rate(signals_total{gating="passed"}[5m]))', "passed"),),
                    kind="stat",
                    width=4,
                    height=5,
                ),
            ),
        ),
        Row(
            "State",
            (
                READY,
                Panel(
                    "Alerts that fire",
                    "Each has a section in docs/runbooks.md: what it means, what to look at, what to do.",
                    Unit.Short,
                    (
                        Query(
                            'max by (alertname, severity, service, symbol) (ALERTS{alertstate="firing"})', eventful=True
                        ),
                    ),
                    kind="table",
                    width=12,
                ),
            ),
        ),
        Row(
            "Flow",
            (
                Panel(
                    "Frames received, by route",
                    "A route whose line falls to nothing delivers no data, whatever its socket says.",
                    Unit.MessagesPerSecond,
                    (rate_by("route", "recv_frames_total"),),
                    lowest=0,
                ),
                Panel(
                    "Records taken, by service",
                    "Each service's input. All follow the frames; one that falls behind the others is behind.",
                    Unit.RecordsPerSecond,
                    (rate_by("service", "orderflow_records_in_total"),),
                    lowest=0,
                ),
                Panel(
                    "Records behind, by service",
                    "End of the topics less what has been processed. Grows where a service can't keep up.",
                    Unit.Short,
                    (
                        Query(
                            "sum by (service) (max by (service, topic, partition) (consumer_lag_records))",
                            "{{service}}",
                        ),
                    ),
                    lowest=0,
                ),
                Panel(
                    "Latency p99, by hop",
                    "exchange: sent there to received here, two clocks. receive, journal, rows: within ingestion. The "
                    "others: handed to the journal to processed there.",
                    Unit.Milliseconds,
                    (Query('max by (hop) (latency_ms{quantile="0.99"})', "{{hop}}"),),
                    steps=LATENCY_STEPS,
                ),
                Panel(
                    "Signals, by direction",
                    "Passed ones alone.",
                    Unit.CountsPerMinute,
                    (
                        Query(
                            '60 * sum by (direction) (rate(signals_total{gating="passed"}[5m]))',
                            "{{direction}}",
                        ),
                    ),
                    kind="bars",
                    lowest=0,
                ),
                Panel(
                    "Disk free",
                    "Of the file system that holds the data folder. A full disk stops the lake's files; Kafka holds the data.",
                    Unit.PercentUnit,
                    (
                        Query(
                            "min by (service) (lake_disk_free_bytes / lake_disk_total_bytes)",
                            "{{service}}",
                        ),
                    ),
                    lowest=0,
                    highest=1,
                ),
            ),
        ),
    ),
)
