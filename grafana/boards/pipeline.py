"""The machinery: rates, lag, latency by hop, batches, snapshots, recoveries, processes."""

from __future__ import annotations

from typing import Final

from grafana.boards.common import LATENCY_STEPS, OF_SERVICE, RATE, READY, SERVICE, rate_by
from grafana.panels import ORANGE, RED, Board, Panel, Query, Row, Unit


def _by_service(title: str, metric: str, unit: str, text: str, width: int = 8) -> Panel:
    """The largest of a service's processes, a line for each service."""
    query = Query(f"max by (service) ({metric}{OF_SERVICE})", "{{service}}")
    return Panel(title, text, unit, (query,), width=width, lowest=0)


def _by_process(title: str, expr: str, unit: str, text: str) -> Panel:
    return Panel(title, text, unit, (Query(expr, "{{service}} {{instance}}"),), lowest=0)


def _of_process(metric: str) -> str:
    """A figure of the process, which has no label `service`, with that of the same process's settings."""
    return f"{metric} * on (job, instance) group_left (service) max by (job, instance, service) (orderflow_ready{OF_SERVICE} >= bool 0)"


def _latency(quantile: str) -> Panel:
    percent = f"{float(quantile) * 100:g}"
    return Panel(
        f"Latency p{percent}, by hop",
        "exchange: sent there to received here, two clocks. receive: the wait in the queue. journal: handed to the "
        "journal to acknowledged. rows and the services: handed to the journal to processed there.",
        Unit.Milliseconds,
        (Query(f'max by (hop) (latency_ms{{quantile="{quantile}"}})', "{{hop}}"),),
        steps=LATENCY_STEPS if quantile == "0.99" else (),
    )


BOARD: Final = Board(
    uid="orderflow-pipeline",
    title="Order flow: pipeline",
    text="The machinery: rates, lag, latency by hop, batches, snapshots, recoveries, processes.",
    variables=(SERVICE,),
    rows=(
        Row(
            "Rates",
            (
                Panel(
                    "Frames received, by route",
                    "From the exchange. A route whose line falls to nothing delivers no data.",
                    Unit.MessagesPerSecond,
                    (rate_by("route", "recv_frames_total"),),
                    lowest=0,
                ),
                Panel(
                    "Records taken, by service",
                    "Each service's input, in canonical order.",
                    Unit.RecordsPerSecond,
                    (rate_by("service", "orderflow_records_in_total", OF_SERVICE),),
                    lowest=0,
                ),
                Panel(
                    "Records written, by topic",
                    "By the chosen services.",
                    Unit.RecordsPerSecond,
                    (rate_by("topic", "orderflow_topic_records_written_total", OF_SERVICE),),
                    lowest=0,
                ),
            ),
        ),
        Row(
            "Lag",
            (
                Panel(
                    "Records behind, by service",
                    "End of the topics less the oldest record not yet processed. Grows where a service can't keep up: "
                    "start another process of it.",
                    Unit.Short,
                    (
                        Query(
                            f"sum by (service) (max by (service, topic, partition) (consumer_lag_records{OF_SERVICE}))",
                            "{{service}}",
                        ),
                    ),
                    lowest=0,
                ),
                Panel(
                    "The partitions furthest behind",
                    "The ten newest. One alone: its symbols are busier than the others, or its process stands still.",
                    Unit.Short,
                    (
                        Query(
                            f"topk(10, max by (service, topic, partition) (consumer_lag_records{OF_SERVICE}))",
                            "{{service}} {{topic}}/{{partition}}",
                        ),
                    ),
                    lowest=0,
                ),
                _by_service(
                    "Age of the newest input",
                    "orderflow_input_age_sec",
                    Unit.Seconds,
                    "Seconds since receipt of the newest record processed. Ticks come five times a second, so above a few "
                    "seconds something stands still, here or before it.",
                ),
            ),
        ),
        Row("Latency", (_latency("0.5"), _latency("0.9"), _latency("0.99"))),
        Row(
            "Batches and queues",
            (
                Panel(
                    "Records per batch sent",
                    "Mean of what the broker has acknowledged.",
                    Unit.Short,
                    (
                        Query(
                            f"sum by (service) (rate(orderflow_batch_records_total{OF_SERVICE}{RATE}))"
                            f" / sum by (service) (rate(orderflow_batches_sent_total{OF_SERVICE}{RATE}))",
                            "{{service}}",
                        ),
                    ),
                    lowest=0,
                ),
                _by_service("Records per batch taken", "batch_span", Unit.Short, "Records of the newest batch."),
                _by_service(
                    "Waiting for another input",
                    "queue_depth",
                    Unit.Short,
                    "Records that can't be taken in order before another topic's have come. Only growing: that one stands still.",
                ),
                _by_service(
                    "Batches under way",
                    "orderflow_batches_outstanding",
                    Unit.Short,
                    "Sent and not yet acknowledged; 64 at most, then the service waits.",
                ),
                _by_service(
                    "Oldest batch under way",
                    "orderflow_unacknowledged_sec",
                    Unit.Seconds,
                    "How long it has been waiting for the broker.",
                ),
                Panel(
                    "The recorder's queue",
                    "Frames that wait for the broker, and how many may. When it is full, quotes are conflated and then frames dropped.",
                    Unit.Short,
                    (
                        Query("max(recorder_queue_depth)", "waiting"),
                        Query("max(recorder_queue_bound_frames)", "bound"),
                    ),
                    lowest=0,
                ),
            ),
        ),
        Row(
            "Recovery",
            (
                READY,
                _by_service(
                    "Age of the newest snapshot",
                    "orderflow_snapshot_age_sec",
                    Unit.Seconds,
                    "Above a minute restarts take longer. The lake and the sinks make one per cut.",
                    width=6,
                ),
                _by_service(
                    "Newest recovery took",
                    "orderflow_recovery_sec",
                    Unit.Seconds,
                    "From a snapshot to working.",
                    width=6,
                ),
                Panel(
                    "Recoveries, trailing hour",
                    "Each start, and each time that partitions move.",
                    Unit.Short,
                    (Query(f"sum by (service) (increase(orderflow_recoveries_total{OF_SERVICE}[1h]))", "{{service}}"),),
                    lowest=0,
                ),
                Panel(
                    "Broker losses, trailing hour",
                    "Times that a process recovered everything because the broker had refused or lost something.",
                    Unit.Short,
                    (
                        Query(
                            f"sum by (service) (increase(orderflow_broker_losses_total{OF_SERVICE}[1h]))", "{{service}}"
                        ),
                    ),
                    lowest=0,
                    steps=((1, ORANGE),),
                ),
                Panel(
                    "Repetitions kept out",
                    "Suppressed: outputs of a re-run that were there already. Duplicate: inputs taken before. Long after a "
                    "start there are none.",
                    Unit.RecordsPerSecond,
                    (
                        Query(
                            f"sum by (service) (rate(orderflow_records_suppressed_total{OF_SERVICE}{RATE}))",
                            "{{service}} suppressed",
                        ),
                        Query(
                            f"sum by (service) (rate(orderflow_records_duplicate_total{OF_SERVICE}{RATE}))",
                            "{{service}} duplicate",
                        ),
                    ),
                    lowest=0,
                ),
            ),
        ),
        Row(
            "Processes",
            (
                _by_process(
                    "CPU",
                    _of_process(f"rate(process_cpu_seconds_total{RATE})"),
                    Unit.PercentUnit,
                    "Share of one core.",
                ),
                _by_process(
                    "Memory",
                    _of_process("process_resident_memory_bytes"),
                    Unit.BytesIEC,
                    "Resident. Flat over days, or something grows.",
                ),
                _by_process(
                    "Files open",
                    _of_process("(process_open_fds / process_max_fds)"),
                    Unit.PercentUnit,
                    "Of those that the process may have.",
                ),
                Panel(
                    "Running since",
                    "A line that falls is a restart.",
                    Unit.DurationSeconds,
                    (
                        Query(
                            f"min by (service) ({_of_process('(time() - process_start_time_seconds)')})",
                            "{{service}}",
                        ),
                    ),
                    lowest=0,
                ),
                Panel(
                    "Settings",
                    "Fingerprint of each process's settings. Two of one service that differ: half of a change.",
                    Unit.Short,
                    (
                        Query(
                            f"count by (service, fingerprint) (orderflow_config_info{OF_SERVICE})",
                        ),
                    ),
                    kind="table",
                ),
                Panel(
                    "Broker reachable",
                    "Whether a broker has answered within the last seconds.",
                    Unit.Short,
                    (Query(f"min by (service) (orderflow_broker_reachable{OF_SERVICE})", "{{service}}"),),
                    kind="states",
                    names={0: ("away", RED), 1: ("there", "green")},
                    steps=((1, "green"),),
                    below=RED,
                ),
            ),
        ),
    ),
)
