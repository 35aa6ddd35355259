"""The file services: a sink per partition, its figures, the checkpoint."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

from orderflow.config import Config, SinksConfig, effective_fingerprint, fingerprint
from orderflow.lake.checkpoint import advance
from orderflow.lake.parquet import LakeSink
from orderflow.lake.signals import SignalSink
from orderflow.lake.sink import FileSink
from orderflow.lake.sqlite import SignalDatabase
from orderflow.streaming.codec import Codecs
from orderflow.streaming.kafka_log import KafkaLog
from orderflow.streaming.runtime import ServiceSpec
from orderflow.streaming.service import Build, Running, StatsCollector, options_of, runtime_status
from orderflow.streaming.sinks import SinkRuntime, SinkTask
from orderflow.streaming.snapshots import InputPosition


class SinkCollector:
    """Figures of the sinks of a process as Prometheus families."""

    def __init__(self, name: str, runtime: SinkRuntime) -> None:
        self._name = name
        self._runtime = runtime

    def collect(self) -> list[Any]:
        sinks: list[Any] = [task.sink for _, task in sorted(self._runtime.tasks.items())]
        families: list[Any] = []
        for metric, text, value in (
            ("write_errors", "attempts to write a file that failed", sum(sink.write_errors for sink in sinks)),
            ("lake_cuts", "cuts made durable", self._runtime.cuts),
            ("lake_files", "files written", sum(sink.files_written for sink in sinks)),
            ("lake_bytes", "bytes written", sum(sink.bytes_written for sink in sinks)),
        ):
            counter = CounterMetricFamily(metric, text, labels=["service"])
            counter.add_metric([self._name], value)
            families.append(counter)
        for metric, text, value in (
            (
                "parquet_flush_sec",
                "seconds that the newest cut took",
                max((s.last_flush_sec for s in sinks), default=0.0),
            ),
            ("lake_rows_buffered", "rows that wait for a cut", float(sum(sink.rows_buffered() for sink in sinks))),
            ("lake_partitions_stuck", "partitions whose files can't be written now", float(len(self._runtime.stuck))),
        ):
            gauge = GaugeMetricFamily(metric, text, labels=["service"])
            gauge.add_metric([self._name], value)
            families.append(gauge)
        return families


def _runtime_build(
    name: str,
    make: Callable[[Config, int], FileSink],
    inputs: tuple[str, ...],
    fingerprint_of: Callable[[Config], str],
    on_cut: Callable[[Config], Callable[[int, Any, list[InputPosition], SinkTask], None]] | None = None,
    on_end: Callable[[], None] | None = None,
) -> Build:
    def build(
        config: Config, log: KafkaLog, codecs: Codecs
    ) -> tuple[Running, CollectorRegistry, Callable[[], dict[str, Any]]]:
        runtime = SinkRuntime(
            log,
            codecs,
            ServiceSpec(name, inputs, (), fingerprint_of(config)),
            options_of(config),
            lambda partition: make(config, partition),
            on_cut(config) if on_cut is not None else None,
            on_end,
        )
        registry = CollectorRegistry()
        registry.register(StatsCollector(name, runtime, fingerprint_of(config)))
        registry.register(SinkCollector(name, runtime))

        def status() -> dict[str, Any]:
            return {
                **runtime_status(name, runtime),
                "cuts": runtime.cuts,
                "write_errors": runtime.write_errors,
                "stuck": runtime.stuck,
            }

        return runtime, registry, status

    return build


def lake_build() -> Build:
    """The `lake` service."""

    def on_cut(config: Config) -> Callable[[int, Any, list[InputPosition], SinkTask], None]:
        root = Path(config.runtime.data_dir)

        def note(partition: int, result: Any, positions: list[InputPosition], task: SinkTask) -> None:
            advance(
                root,
                partition,
                session=task.session,
                last_seq=result.last_seq,
                clock_ts_ns=task.clock_ts_ns,
                inputs={position.topic: position.next_offset for position in positions},
            )

        return note

    return _runtime_build(
        "lake",
        lambda config, partition: LakeSink(
            Path(config.runtime.data_dir), partition, config.lake, effective_fingerprint(config)
        ),
        LakeSink.inputs,
        lambda config: fingerprint("lake", config.lake),
        on_cut,
    )


def sinks_build() -> Build:
    """The `sinks` service: signals as JSON Lines and in SQLite."""
    databases: dict[Path, SignalDatabase] = {}

    def make(config: Config, partition: int) -> FileSink:
        root = Path(config.runtime.data_dir)
        if root not in databases:
            databases[root] = SignalDatabase(root)
        return SignalSink(root, partition, config.lake, config.sinks.chosen, databases[root])

    def close() -> None:
        for database in databases.values():
            database.close()

    return _runtime_build("sinks", make, SignalSink.inputs, sinks_fingerprint, on_end=close)


def sinks_fingerprint(config: Config) -> str:
    """Of what the files of signals depend on; the same however the choice is spelt."""
    chosen = SinksConfig(signal_sink=",".join(config.sinks.chosen) or "none")
    return fingerprint("sinks", chosen, str(config.lake.max_rows))
