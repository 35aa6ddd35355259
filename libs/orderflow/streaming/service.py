"""The life of a service process: configuration, log lines, health and metrics pages, signals, exit codes.

Exit codes: 0 drained and stopped; 2 a wrong setting or a failure that names its remedy; 3 fenced by another recorder.
"""

from __future__ import annotations

import asyncio
import fcntl
import gc
import hashlib
import json
import logging
import math
import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final, Protocol

from aiohttp import web
from aiokafka.errors import KafkaError
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, ProcessCollector, generate_latest

from orderflow.config import Config, effective_fingerprint, load
from orderflow.errors import ConfigError, FencedError, OrderflowError
from orderflow.processor import Processor
from orderflow.registry.client import RegistryClient
from orderflow.streaming import crash
from orderflow.streaming.codec import Codecs
from orderflow.streaming.figures import STAGE_FIGURES, StageFigures
from orderflow.streaming.init import codecs_for, wait_for_topics
from orderflow.streaming.kafka_log import KafkaLog
from orderflow.streaming.lag import LagWatch
from orderflow.streaming.metrics import StatsCollector, quantiles
from orderflow.streaming.runtime import (
    PATIENCE_SEC,
    ProcessorRuntime,
    RuntimeOptions,
    ServiceRuntime,
    ServiceSpec,
)
from orderflow.topics import HOURLY, ROWS

logger = logging.getLogger("orderflow")

EXIT_FAILED: Final = 2
EXIT_FENCED: Final = 3
GC_ALLOCATIONS: Final = 50_000
METRICS_FILE_SEC: Final = 10.0
MOST_INSTANCES: Final = 100
"""Of one service that keep a file each."""


class Running(Protocol):
    """What a service process runs."""

    @property
    def ready(self) -> bool: ...

    @property
    def drained(self) -> bool: ...

    async def run(self) -> None: ...

    def stop(self) -> None: ...


class JsonLines(logging.Formatter):
    """One JSON object a line: time, level, service, message."""

    def __init__(self, service: str) -> None:
        super().__init__()
        self._service = service

    def format(self, record: logging.LogRecord) -> str:
        line = {
            "at": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03d}Z",
            "level": record.levelname,
            "service": self._service,
            "message": record.getMessage(),
        }
        if record.exc_info:
            line["error"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False)


class _OneOfEach(logging.Filter):
    """Lets each message of the client library through once a minute.

    While a broker is away the library says so several times a second, and `KafkaLog` says it once: those messages are
    left out altogether.
    """

    def __init__(self, told_elsewhere: tuple[str, ...], every_sec: float = 60.0) -> None:
        super().__init__()
        self._told_elsewhere = told_elsewhere
        self._every_sec = every_sec
        self._last: dict[str, float] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        message = str(record.msg)
        if message.startswith(self._told_elsewhere):
            return False
        before = self._last.get(message)
        if before is not None and record.created - before < self._every_sec:
            return False
        self._last[message] = record.created  # templates, not texts: their number is that of the library's calls
        return True


TOLD_BY_THE_LOG: Final = (
    "Unable connect",
    "Unable to update metadata",
    "Unable to request metadata",
    "Failed fetch messages",
    "Failed fetch offsets",
    "Group Coordinator Request failed",
    "Error sending",
    "Heartbeat send request failed",
    "Heartbeat session expired",
    "LeaveGroup request failed",
    "OffsetCommit failed before join",
)
"""How aiokafka's messages of a broker that is away begin; the first request of a fresh broker's group is among them."""


def set_up_logging(service: str, level: str) -> None:
    """Structured lines on standard error."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines(service))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level)
    # A filter of a logger does not see what the loggers below it hand up; one of the handler sees everything.
    quiet = _OneOfEach(TOLD_BY_THE_LOG)
    handler.addFilter(lambda record: not record.name.startswith("aiokafka") or quiet.filter(record))
    for noisy in ("aiokafka", "websockets", "aiohttp.access"):
        logging.getLogger(noisy).setLevel(logging.ERROR if noisy == "aiokafka" else logging.WARNING)


class Pages:
    """`/metrics`, `/healthz`, `/readyz` and `/status` of a process."""

    def __init__(self, running: Running, registry: CollectorRegistry, status: Callable[[], dict[str, Any]]) -> None:
        self._running = running
        self._registry = registry
        self._status = status
        self._runner: web.AppRunner | None = None
        self.port = 0

    async def start(self, host: str, port: int) -> None:
        """Listen.

        Raises
        ------
        OrderflowError
            The port is taken.
        """
        app = web.Application(client_max_size=1 << 16)
        app.router.add_get("/metrics", self._metrics)
        app.router.add_get("/healthz", self._healthz)
        app.router.add_get("/readyz", self._readyz)
        app.router.add_get("/status", self._status_page)
        self._runner = web.AppRunner(app, access_log=None)
        await self._runner.setup()
        site = web.TCPSite(self._runner, host, port)
        try:
            await site.start()
        except OSError as error:
            raise OrderflowError(
                f"METRICS_PORT={port} on {host} can't be opened: {error.strerror}; choose another, or 0 for any"
            ) from error
        self.port = self._runner.addresses[0][1]

    async def stop(self) -> None:
        if self._runner is not None:
            await self._runner.cleanup()

    async def _metrics(self, _: web.Request) -> web.Response:
        return web.Response(body=generate_latest(self._registry), headers={"Content-Type": CONTENT_TYPE_LATEST})

    async def _healthz(self, _: web.Request) -> web.Response:
        return web.json_response({"ok": True})

    async def _readyz(self, _: web.Request) -> web.Response:
        ready = self._running.ready
        return web.json_response({"ready": ready}, status=200 if ready else 503)

    async def _status_page(self, _: web.Request) -> web.Response:
        return web.json_response(self._status())


def write_status_file(path: str, content: dict[str, Any]) -> None:
    """Tell a supervisor where the pages are; atomically."""
    if not path:
        return
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{os.getpid()}")
    temporary.write_text(json.dumps(content), "utf-8")
    temporary.replace(target)


def instance_of(status_file: str) -> str | None:
    """Name of the place that a process fills: a supervisor gives each place a status file of its own."""
    if not status_file:
        return None
    place = f"{socket.gethostname()}:{Path(status_file).resolve()}"
    return hashlib.sha256(place.encode()).hexdigest()[:16]


def metrics_content(service: str, registry: CollectorRegistry) -> dict[str, Any]:
    """Every sample of a registry under its name with its labels, as on `/metrics`."""
    figures: dict[str, float] = {}
    for family in registry.collect():
        for sample in family.samples:
            labels = ",".join(f'{name}="{value}"' for name, value in sorted(sample.labels.items()))
            if math.isfinite(sample.value):
                figures[f"{sample.name}{{{labels}}}" if labels else sample.name] = sample.value
    at = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    return {"at": at, "service": service, "metrics": dict(sorted(figures.items()))}


def claim_metrics_file(data_dir: Path, service: str) -> Path | None:
    """A file that no other instance of the service writes; this process holds it until it ends. None: there are too many.

    `metrics/<service>/metrics.json`, and where another instance that lives has that one, `metrics/<service>-2/...`.
    """
    for number in range(1, MOST_INSTANCES + 1):
        folder = data_dir / "metrics" / (service if number == 1 else f"{service}-{number}")
        path = folder / "metrics.json"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except OSError:
            return path  # whoever writes it says what is wrong
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(descriptor)
            continue
        return path  # the lock goes with the process
    logger.warning("%s has %d instances that write figures: this one does not; see /metrics", service, MOST_INSTANCES)
    return None


async def keep_metrics_file(path: Path, service: str, registry: CollectorRegistry) -> None:
    """Write `metrics.json` now and then, and once more when cancelled; a disk that does not take it ends nothing."""
    failed = False
    while True:
        try:
            await asyncio.sleep(METRICS_FILE_SEC)
        finally:
            try:
                write_status_file(str(path), metrics_content(service, registry))
                failed = False
            except OSError as error:
                if not failed:
                    logger.warning("%s can't be written: %s; figures are at /metrics", path, error.strerror)
                failed = True
            except Exception:
                # Whatever one look at the figures stumbles over, the next may not.
                if not failed:
                    logger.exception("the figures of %s can't be put together; %s stays as it is", service, path)
                failed = True


def runtime_status(service: str, runtime: ServiceRuntime) -> dict[str, Any]:
    """What the live view and the drain look at."""
    stats = runtime.stats
    return {
        "service": service,
        "ready": runtime.ready,
        "drained": runtime.drained,
        "partitions": sorted(runtime.tasks),
        "ended": sorted(partition for partition, task in runtime.tasks.items() if task.ended),
        "frontiers": {str(partition): task.merger.frontier for partition, task in sorted(runtime.tasks.items())},
        "records_in": stats.records_in,
        "records_out": sum(stats.by_topic_out.values()),
        "by_topic_out": dict(sorted(stats.by_topic_out.items())),
        "buffered": stats.buffered,
        "suppressed": stats.suppressed,
        "recoveries": stats.recoveries,
        "recovery_sec": round(stats.recovery_sec, 3),
        "latency_ms": quantiles(stats.latencies_ms.values()),
        "rss_mb": resident_mb(),
        "cpu_sec": round(time.process_time(), 2),
        "pid": os.getpid(),
    }


def resident_mb() -> float:
    """Resident memory of this process, megabytes; 0 where the system does not say."""
    try:
        pages = int(Path("/proc/self/statm").read_text("ascii").split()[1])
    except (OSError, ValueError, IndexError):
        return 0.0
    return round(pages * os.sysconf("SC_PAGE_SIZE") / 1e6, 1)


Build = Callable[[Config, KafkaLog, Codecs], tuple[Running, CollectorRegistry, Callable[[], dict[str, Any]]]]


async def serve(name: str, config: Config, topics: tuple[str, ...], needs: tuple[str, ...], build: Build) -> None:
    """Run one service until SIGTERM or SIGINT, or a failure.

    `topics` are those that it reads or writes with a schema, `needs` those that must exist before it starts.
    """
    runtime = config.runtime
    logger.info("settings %s", effective_fingerprint(config))
    registry_client = RegistryClient(runtime.schema_registry_url)
    log = KafkaLog(
        runtime.kafka_bootstrap,
        client_id=f"orderflow-{name}",
        compression=None if runtime.compression == "none" else runtime.compression,
        instance=instance_of(runtime.status_file),
        patience_sec=PATIENCE_SEC,
    )
    pages: Pages | None = None
    beside: list[asyncio.Task[None]] = []
    if runtime.input_prefix is not None and name == "ingestion":
        raise ConfigError(
            f"INPUT_PREFIX is {runtime.input_prefix!r}: ingestion records a journal of its own and reads no other; to compute "
            "from another's run `python -m services.normaliser`"
        )
    try:
        await wait_for_topics(runtime.kafka_bootstrap, runtime.topic_prefix, (*needs, HOURLY))
        codecs = await codecs_for(registry_client, runtime.topic_prefix, topics)
        await log.start()
        running, registry, status = build(config, log, codecs)
        if runtime.input_prefix is not None and isinstance(running, ServiceRuntime):
            await wait_for_topics(runtime.kafka_bootstrap, runtime.input_prefix, running.spec.inputs)
        ProcessCollector(registry=registry)
        pages = Pages(running, registry, status)
        await pages.start(runtime.metrics_host, runtime.metrics_port)
        write_status_file(
            runtime.status_file, {"service": name, "pid": os.getpid(), "host": runtime.metrics_host, "port": pages.port}
        )
        logger.info("pages at http://%s:%d", runtime.metrics_host, pages.port)
        metrics_path = claim_metrics_file(Path(runtime.data_dir), name)
        if metrics_path is not None:
            beside.append(asyncio.create_task(keep_metrics_file(metrics_path, name, registry)))
        lag: LagWatch | None = getattr(running, "lag", None)
        if lag is not None:
            beside.append(asyncio.create_task(lag.run()))
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, running.stop)
        drain = getattr(running, "drain", None)
        if drain is not None:
            # SIGTERM leaves the session open for a restart; SIGUSR1 ends it.
            loop.add_signal_handler(signal.SIGUSR1, drain)
        # What start-up made lives as long as the process, and records are freed by reference count: collections among
        # them would only cost.
        gc.collect()
        gc.freeze()
        gc.set_threshold(GC_ALLOCATIONS, 20, 20)
        await running.run()
        logger.info("stopped")
    finally:
        for task in beside:
            task.cancel()
        await asyncio.gather(*beside, return_exceptions=True)
        if pages is not None:
            await pages.stop()
        await log.close()
        await registry_client.close()


def run_service(name: str, topics: tuple[str, ...], needs: tuple[str, ...], build: Build) -> int:
    """The `main` of a service; returns its exit code."""
    try:
        crash.arm(os.environ)
        config = load()
    except OrderflowError as error:
        set_up_logging(name, "INFO")
        logger.error("%s", error)
        return EXIT_FAILED
    set_up_logging(name, config.runtime.log_level)
    try:
        asyncio.run(serve(name, config, topics, needs, build))
    except FencedError as error:
        logger.error("%s", error)
        return EXIT_FENCED
    except OrderflowError as error:
        cause = error.__cause__
        # A broker or a disk that fails is told of in full by the message; what a step raised needs its place.
        told = cause is None or isinstance(cause, OSError | KafkaError)
        logger.error("%s", error, exc_info=None if told else cause)
        return EXIT_FAILED
    return 0


def options_of(config: Config) -> RuntimeOptions:
    """Runtime options of a configuration."""
    return RuntimeOptions(
        prefix=config.runtime.topic_prefix,
        input_prefix=config.runtime.input_prefix,
        snapshot_sec=config.runtime.snapshot_sec,
        rebuild=config.runtime.state_rebuild,
    )


def processor_build(
    name: str,
    inputs: tuple[str, ...],
    outputs: tuple[str, ...],
    make: Callable[[Config, int], Processor],
    fingerprint_of: Callable[[Config], str],
    *,
    row_filter: frozenset[int] | None = None,
    filtered_topic: str = "",
) -> Build:
    """A `Build` for a service that is one processor."""

    def build(
        config: Config, log: KafkaLog, codecs: Codecs
    ) -> tuple[Running, CollectorRegistry, Callable[[], dict[str, Any]]]:
        figures: StageFigures | None = STAGE_FIGURES[name](name) if name in STAGE_FIGURES else None
        runtime = ProcessorRuntime(
            log,
            codecs,
            ServiceSpec(name, inputs, outputs, fingerprint_of(config)),
            options_of(config),
            lambda partition: make(config, partition),
            row_filter,
            filtered_topic,
            figures,
        )
        registry = CollectorRegistry()
        registry.register(StatsCollector(name, runtime, fingerprint_of(config)))
        if figures is not None:
            registry.register(figures)
        return runtime, registry, lambda: runtime_status(name, runtime)

    return build


def run_stage(name: str) -> int:
    """The `main` of a service that is one stage of the pipeline."""
    from orderflow.pipeline import BY_NAME

    stage = BY_NAME[name]
    build = processor_build(
        name,
        stage.inputs,
        stage.outputs,
        stage.make,
        stage.fingerprint,
        row_filter=stage.row_filter,
        filtered_topic=ROWS,
    )
    topics = stage.inputs + stage.outputs
    return run_service(name, topics, (*topics, f"state.{name}"), build)
