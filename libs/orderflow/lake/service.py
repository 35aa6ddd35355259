"""The file services: a sink per partition, its figures, the checkpoint."""

from __future__ import annotations

import dataclasses
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import msgspec
from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

from orderflow.config import Config, effective_fingerprint, fingerprint
from orderflow.counts import ProcessCounts
from orderflow.lake.checkpoint import advance
from orderflow.lake.parquet import LakeSink
from orderflow.lake.signals import SignalSink
from orderflow.lake.sink import CutSink, FileSink, keep_large_apart
from orderflow.lake.sqlite import SignalDatabase
from orderflow.streaming.codec import Codecs
from orderflow.streaming.figures import SymbolLabels
from orderflow.streaming.kafka_log import KafkaLog
from orderflow.streaming.metrics import StatsCollector
from orderflow.streaming.runtime import ServiceSpec
from orderflow.streaming.service import Build, Running, options_of, runtime_status
from orderflow.streaming.sinks import SinkRuntime, SinkTask
from orderflow.streaming.snapshots import InputPosition

FETCH_BYTES: Final = 192 << 10
"""Files are cut once a minute. What a round costs is its partitions, of which the lake reads 120, not its records. Less
than one input alone can give, so that one that lags behind is answered at once."""
WAITING_BYTES: Final = 512 << 10
"""Of one input; while signals stand still 108 of the lake's wait for them. Little more than one answer gives: the journal
has the largest records, so after a stop all other inputs of a busy partition run ahead of it, and what they are sent is
what it has to wait for."""


def counting(make: Callable[[int], FileSink], counted: ProcessCounts) -> Callable[[int], FileSink]:
    """`make`, whose sinks all raise the same counts: they come and go with their partitions, a count stays."""

    def made(partition: int) -> FileSink:
        sink = make(partition)
        if isinstance(sink, CutSink):
            sink.counted = counted
        if isinstance(sink, LakeSink):
            sink.minutes.counted = counted
        return sink

    return made


class SinkCollector:
    """Figures of the sinks of a process as Prometheus families."""

    def __init__(self, name: str, runtime: SinkRuntime, root: Path, counted: ProcessCounts) -> None:
        """`counted`: what the sinks of this process, also those that are gone, have raised."""
        self._name = name
        self._runtime = runtime
        self._root = root
        self._counted = counted
        self._labels = SymbolLabels()

    def collect(self) -> list[Any]:
        sinks: list[Any] = [task.sink for _, task in sorted(self._runtime.tasks.items())]
        counted = self._counted
        families: list[Any] = []
        for metric, text, value in (
            ("write_errors", "attempts to write a file that failed", counted.of("write_errors")),
            ("lake_cuts", "cuts made durable", self._runtime.cuts),
            (
                "lake_cuts_failed",
                "times that a cut could not be made and its partition waited",
                self._runtime.cuts_failed,
            ),
            ("lake_files", "files written", counted.of("files")),
            ("lake_bytes", "bytes written", counted.of("bytes")),
        ):
            counter = CounterMetricFamily(metric, text, labels=["service"])
            counter.add_metric([self._name], value)
            families.append(counter)
        rows = CounterMetricFamily("lake_rows", "rows made durable", labels=["service", "kind"])
        for kind, count in sorted(counted.by_cause("rows").items()):
            rows.add_metric([self._name, kind], count)
        for metric, text, size in (
            (
                "parquet_flush_sec",
                "seconds that the newest cut took",
                max((s.last_flush_sec for s in sinks), default=0.0),
            ),
            ("lake_rows_buffered", "rows that wait for a cut", float(sum(sink.rows_buffered() for sink in sinks))),
            ("lake_partitions_stuck", "partitions whose files can't be written now", float(len(self._runtime.stuck))),
            *self._disk(),
        ):
            gauge = GaugeMetricFamily(metric, text, labels=["service"])
            gauge.add_metric([self._name], size)
            families.append(gauge)
        return [*families, rows, *self._minutes()]

    def _minutes(self) -> list[Any]:
        """Of each symbol."""
        families = []
        for name, text, figure in (
            ("lake_minutes", "minutes judged", "minutes"),
            ("lake_empty_minutes", "minutes without a trade", "empty_minutes"),
        ):
            family = CounterMetricFamily(name, text, labels=["symbol"])
            merged: Counter[str] = Counter()
            for symbol, count in self._counted.by_cause(figure).items():
                merged[self._labels.of(symbol)] += count
            for symbol, count in sorted(merged.items()):
                family.add_metric([symbol], count)
            families.append(family)
        return families if self._name == "lake" else []

    def _disk(self) -> list[tuple[str, str, float]]:
        """Space of the file system that the folder is, or will be, on; nothing where the system does not say."""
        root = self._root
        try:
            while not root.exists():
                root = root.parent
            usage = shutil.disk_usage(root)
        except OSError:
            return []
        return [
            ("lake_disk_free_bytes", "bytes free on the file system of the data folder", float(usage.free)),
            ("lake_disk_total_bytes", "bytes of the file system of the data folder", float(usage.total)),
        ]


def _runtime_build(
    name: str,
    make: Callable[[Config, int], FileSink],
    inputs: tuple[str, ...],
    fingerprint_of: Callable[[Config], str],
    on_cut: Callable[[Config, ProcessCounts], Callable[[int, Any, list[InputPosition], SinkTask], None]] | None = None,
    on_end: Callable[[], None] | None = None,
) -> Build:
    def build(
        config: Config, log: KafkaLog, codecs: Codecs
    ) -> tuple[Running, CollectorRegistry, Callable[[], dict[str, Any]]]:
        keep_large_apart()
        counted = ProcessCounts()
        runtime = SinkRuntime(
            log,
            codecs,
            ServiceSpec(name, inputs, (), fingerprint_of(config)),
            dataclasses.replace(options_of(config), fetch_min_bytes=FETCH_BYTES, max_waiting_bytes=WAITING_BYTES),
            counting(lambda partition: make(config, partition), counted),
            on_cut(config, counted) if on_cut is not None else None,
            on_end,
        )
        registry = CollectorRegistry()
        registry.register(StatsCollector(name, runtime, fingerprint_of(config)))
        registry.register(SinkCollector(name, runtime, Path(config.runtime.data_dir), counted))

        def status() -> dict[str, Any]:
            return {
                **runtime_status(name, runtime),
                "cuts": runtime.cuts,
                "cuts_failed": runtime.cuts_failed,
                "write_errors": counted.of("write_errors"),
                "stuck": runtime.stuck,
            }

        return runtime, registry, status

    return build


def lake_build() -> Build:
    """The `lake` service."""

    def on_cut(config: Config, counted: ProcessCounts) -> Callable[[int, Any, list[InputPosition], SinkTask], None]:
        root = Path(config.runtime.data_dir)

        def note(partition: int, result: Any, positions: list[InputPosition], task: SinkTask) -> None:
            advance(
                root,
                partition,
                session=task.session,
                last_seq=result.last_seq,
                clock_ts_ns=task.clock_ts_ns,
                inputs={position.topic: position.next_offset for position in positions},
                failed=lambda error: counted.add("write_errors"),
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
        return SignalSink(root, partition, config.sinks, databases[root])

    def close() -> None:
        for database in databases.values():
            database.close()

    return _runtime_build("sinks", make, SignalSink.inputs, sinks_fingerprint, on_end=close)


def sinks_fingerprint(config: Config) -> str:
    """Of what the files of signals depend on; the same however the choice is spelt."""
    spelt = ",".join(config.sinks.chosen) or "none"
    return fingerprint("sinks", msgspec.structs.replace(config.sinks, signal_sink=spelt))
