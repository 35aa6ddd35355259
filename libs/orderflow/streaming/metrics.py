"""Figures that every service has, as Prometheus families, read when scraped."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

from orderflow.streaming.runtime import ServiceRuntime, Stats
from orderflow.streaming.writer import Writer

Samples = Callable[[], list[float]]
"""Newest latencies of a hop, milliseconds."""
HOPS: Final = {"ingestion": "rows", "normaliser": "rows"}
"""The hop that a service's own latency is of, where that is not its name."""


def quantiles(samples: list[float]) -> dict[str, float]:
    """p50, p90, p99 of the newest samples, by nearest rank; empty where there are none."""
    ordered = sorted(samples)
    if not ordered:
        return {}
    return {
        name: ordered[min(len(ordered) - 1, int(share * len(ordered)))]
        for name, share in (("0.5", 0.5), ("0.9", 0.9), ("0.99", 0.99))
    }


class StatsCollector:
    """Turns a runtime's `Stats` into Prometheus families when scraped, so that hot paths pay nothing."""

    def __init__(
        self,
        service: str,
        runtime: ServiceRuntime,
        fingerprint: str,
        hops: Mapping[str, Samples] | None = None,
        also_written: Sequence[Writer] = (),
        ready: Callable[[], bool] | None = None,
    ) -> None:
        """What this process has besides its runtime.

        `hops`: latencies; `also_written`: writers; `ready`: what `/readyz` says, where it is more than the runtime's.
        """
        self._service = service
        self._began_sec = time.time()
        self._runtime = runtime
        self._fingerprint = fingerprint
        self._hops = dict(hops or {})
        self._also_written = list(also_written)
        self._ready = ready or (lambda: runtime.ready)

    def collect(self) -> list[Any]:
        stats: Stats = self._runtime.stats
        writers = [*self._runtime.writers, *self._also_written]
        families: list[Any] = []
        for name, text, value in (
            ("records_in", "records taken in canonical order", stats.records_in),
            ("records_suppressed", "outputs not written because they were there already", stats.suppressed),
            ("records_duplicate", "records dropped because they had been taken", stats.duplicates),
            ("records_stale_epoch", "journal records of a superseded recorder, dropped", stats.stale_epoch),
            ("progress_markers", "progress markers written", stats.markers_out),
            ("snapshots", "snapshots written", stats.snapshots),
            ("recoveries", "partitions recovered from a snapshot", stats.recoveries),
            ("broker_losses", "times that all was recovered because the broker had failed", stats.broker_losses),
            ("batches_sent", "batches acknowledged", sum(each.batches_sent for each in writers)),
            ("batch_records", "records of these batches", sum(each.records_sent for each in writers)),
        ):
            counter = CounterMetricFamily(f"orderflow_{name}", text, labels=["service"])
            counter.add_metric([self._service], value)
            families.append(counter)
        for direction, by_topic in (("read", stats.by_topic_in), ("written", stats.by_topic_out)):
            counter = CounterMetricFamily(
                f"orderflow_topic_records_{direction}", f"records {direction} by topic", labels=["service", "topic"]
            )
            for topic in sorted(by_topic):
                counter.add_metric([self._service, topic], by_topic[topic])
            families.append(counter)
        latency = GaugeMetricFamily(
            "latency_ms",
            "milliseconds from receipt to here (hop exchange: from sending)",
            labels=["service", "hop", "quantile"],
        )
        own = HOPS.get(self._service, self._service)
        for hop, samples in (*((hop, ask()) for hop, ask in self._hops.items()), (own, stats.latencies_ms.values())):
            for quantile, latency_ms in quantiles(samples).items():
                latency.add_metric([self._service, hop, quantile], latency_ms)
        families += [latency, self._lag()]
        if self._runtime.tasks:
            age = GaugeMetricFamily(
                "orderflow_input_age_sec",
                "seconds since receipt of the newest record processed, of the partition that is furthest behind",
                labels=["service"],
            )
            age.add_metric([self._service], self._input_age_sec())
            families.append(age)
        for name, text, gauge_value in (
            ("queue_depth", "records waiting for another input", float(stats.buffered)),
            ("batch_span", "records of the newest batch", float(stats.batch_span)),
            (
                "orderflow_batches_outstanding",
                "batches not yet acknowledged",
                float(sum(each.outstanding for each in writers)),
            ),
            (
                "orderflow_unacknowledged_sec",
                "how long the oldest batch under way has been waiting",
                max(each.waiting_sec for each in writers),
            ),
            ("orderflow_start_time_sec", "when this process began, seconds since the epoch", self._began_sec),
            ("orderflow_recovery_sec", "seconds that the newest recovery took", stats.recovery_sec),
            ("orderflow_ready", "1 where the service owns partitions and works", float(self._ready())),
            ("orderflow_broker_reachable", "1 where a broker has answered lately", float(self._runtime.log.reachable)),
            (
                "orderflow_snapshot_interval_sec",
                "seconds between snapshots, as set; the lake and the sinks save at cuts",
                self._runtime.options.snapshot_sec,
            ),
            (
                "orderflow_snapshot_age_sec",
                "seconds since the newest snapshot, or since partitions were taken over; 0 where none are owned",
                self._snapshot_age_sec(),
            ),
        ):
            gauge = GaugeMetricFamily(name, text, labels=["service"])
            gauge.add_metric([self._service], gauge_value)
            families.append(gauge)
        info = GaugeMetricFamily(
            "orderflow_config_info", "fingerprint of the settings", labels=["service", "fingerprint"]
        )
        info.add_metric([self._service, self._fingerprint[:16]], 1)
        families.append(info)
        return families

    def _lag(self) -> GaugeMetricFamily:
        lag = GaugeMetricFamily(
            "consumer_lag_records",
            "end offset less the oldest offset not yet processed",
            labels=["service", "topic", "partition"],
        )
        for (topic, partition), records in self._runtime.lag.lags.items():
            lag.add_metric([self._service, self._runtime.logical_input(topic), str(partition)], records)
        return lag

    def _snapshot_age_sec(self) -> float:
        stats = self._runtime.stats
        if not self._runtime.tasks or not stats.owned_at:
            return 0.0
        return time.time() - max(stats.last_snapshot_at, stats.owned_at)

    def _input_age_sec(self) -> float:
        """Of partitions that have something to do: symbols, whose ticks come several times a second, or a lag."""
        runtime = self._runtime
        behind = {partition for (_, partition), records in runtime.lag.lags.items() if records}
        stamps = [
            task.newest_stamp_ms for partition, task in runtime.tasks.items() if task.has_symbols or partition in behind
        ]
        return max(0.0, time.time() - min(stamps) / 1000) if stamps else 0.0
