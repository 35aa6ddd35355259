"""The ingestion service: the recorder and the normaliser, side by side in one process.

They meet only in the log: the normaliser reads the journal from the broker like everybody else, and asks for snapshots
and missing trades through `market.events`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, Protocol

import msgspec
from prometheus_client import CollectorRegistry

from orderflow.config import Config
from orderflow.counts import ProcessCounts
from orderflow.errors import ConfigError
from orderflow.ingest.capture_recorder import CaptureRecorder
from orderflow.ingest.choice import settled
from orderflow.ingest.metrics import (
    NormaliserCollector,
    RecorderCollector,
    counting,
    normalisers,
)
from orderflow.pipeline import BY_NAME
from orderflow.streaming.codec import Codecs
from orderflow.streaming.kafka_log import KafkaLog
from orderflow.streaming.lag import LagWatch
from orderflow.streaming.metrics import Samples, StatsCollector
from orderflow.streaming.recorder import JournalWriter, shard_partitions
from orderflow.streaming.runtime import STALLED_SEC, ProcessorRuntime, ServiceSpec
from orderflow.streaming.samples import RecentSamples
from orderflow.streaming.service import Running, options_of, runtime_status
from orderflow.topics import PARTITIONS


class Recorder(Protocol):
    """One of the recorders: capture or websocket."""

    ready: bool
    done: bool

    async def run(self) -> None: ...

    def stop(self) -> None: ...

    def drain(self) -> None: ...

    def status(self) -> dict[str, Any]: ...


class Ingestion:
    """Runs both; the normaliser stops once the recorder has."""

    def __init__(self, recorder: Recorder, journal: JournalWriter, normaliser: ProcessorRuntime) -> None:
        self._recorder = recorder
        self._journal = journal
        self._normaliser = normaliser
        self._stopping = False

    @property
    def lag(self) -> LagWatch:
        """Of the normaliser behind the journal."""
        return self._normaliser.lag

    @property
    def ready(self) -> bool:
        """Whether both work, and the broker takes the journal as well as what is made of it."""
        stored = self._journal.writer.waiting_sec < STALLED_SEC
        return self._recorder.ready and self._normaliser.ready and stored

    @property
    def drained(self) -> bool:
        """Whether the recorder has journalled the end and the normaliser has processed up to it."""
        tasks = self._normaliser.tasks
        return (
            self._recorder.done
            and self._normaliser.drained
            and all(
                tasks[partition].merger.frontier >= seq
                for partition, seq in self._journal.seq.items()
                if partition in tasks
            )
        )

    def stop(self) -> None:
        self._stopping = True
        self._recorder.stop()
        if self._recorder.done or not self._recorder.ready:
            self._normaliser.stop()

    def drain(self) -> None:
        self._recorder.drain()

    async def run(self) -> None:
        """Until stopped; any failure of either ends both."""
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self._record())
                group.create_task(self._normaliser.run())
        except ExceptionGroup as failures:
            # One cause is what an operator needs; a group of them is not.
            raise failures.exceptions[0] from failures.exceptions[0].__cause__

    async def _record(self) -> None:
        await self._recorder.run()
        if self._stopping:
            self._normaliser.stop()

    def status(self) -> dict[str, Any]:
        return {
            **runtime_status("ingestion", self._normaliser),
            "ready": self.ready,
            "drained": self.drained,
            "recorder": self._recorder.status(),
        }


def build(
    config: Config, log: KafkaLog, codecs: Codecs
) -> tuple[Running, CollectorRegistry, Callable[[], dict[str, Any]]]:
    """Wire the service; see `orderflow.streaming.service.Build`."""
    config = msgspec.structs.replace(config, ingestion=settled(config.ingestion))
    try:
        partitions = shard_partitions(config.ingestion.shard, PARTITIONS)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    journal = JournalWriter(log, codecs, config.runtime.topic_prefix, partitions, config.ingestion.broker_patience_sec)
    recorder: Recorder
    hops: dict[str, Samples] = {"journal": journal.latencies_ms.values}
    if config.ingestion.source == "capture":
        if not config.ingestion.capture:
            raise ConfigError("SOURCE=capture needs CAPTURE, the file to read")
        recorder = CaptureRecorder(journal, config.ingestion)
    else:
        from orderflow.ingest.system import system_outside
        from orderflow.ingest.websocket_recorder import WebsocketRecorder

        outside = system_outside(config.ingestion.ping_interval_sec)
        sockets = WebsocketRecorder(journal, config.ingestion, log, codecs, config.runtime.topic_prefix, outside)
        recorder = sockets
        hops["receive"] = sockets.waits_ms.values
    stage = BY_NAME["normaliser"]
    counted, latencies_ms = ProcessCounts(), RecentSamples()
    hops["exchange"] = latencies_ms.values
    normaliser = ProcessorRuntime(
        log,
        codecs,
        ServiceSpec("normaliser", stage.inputs, stage.outputs, stage.fingerprint(config)),
        options_of(config),
        counting(lambda partition: stage.make(config, partition), counted, latencies_ms),
    )
    service = Ingestion(recorder, journal, normaliser)
    registry = CollectorRegistry()
    processors = normalisers(normaliser)
    registry.register(
        StatsCollector(
            "ingestion",
            normaliser,
            stage.fingerprint(config),
            hops,
            also_written=[journal.writer],
            ready=lambda: service.ready,
        )
    )
    registry.register(NormaliserCollector(processors, counted))
    registry.register(RecorderCollector(recorder))
    return service, registry, service.status
