"""Every service as a process of its own against a broker or a cluster: started, killed, frozen, scaled, judged.

Dead processes are restarted at once, and the time until the successor is at work is measured from outside: from the
signal to `/readyz` of the process that took over.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from orderflow.capture import CaptureInfo, scan
from orderflow.kafka_embedded import EmbeddedCluster, EmbeddedKafka
from orderflow.lifeline import dying_with_parent
from orderflow.streaming.crash import ENVIRONMENT as CRASH_POINT
from orderflow.streaming.crash import MARK

from tests.waiting import wait_for

ROOT = Path(__file__).resolve().parents[2]
SERVICES = ("ingestion", "ofi", "cvd", "fusion", "signal", "sinks", "lake")
POLL_SEC = 0.02
DRAIN_SEC = 900.0
STOP_SEC = 20.0
REFUSALS = 5
"""Ends by an exit code, not by a signal, after which a run has failed."""


@dataclass
class Death:
    """One end of a process and what followed. Times are of the monotonic clock."""

    instance: str
    cause: str
    at: float
    ready_at: float | None = None

    @property
    def recovery_sec(self) -> float | None:
        return None if self.ready_at is None else self.ready_at - self.at


class Instance:
    """One place of a service: the process that fills it now, restarted when it dies."""

    def __init__(self, service: str, number: int, folder: Path, environment: Mapping[str, str]) -> None:
        self.service = service
        self.name = f"{service}-{number}" if number else service
        self.log = folder / "logs" / f"{self.name}.log"
        self.status_path = folder / "status" / f"{self.name}.json"
        self.environment = {**environment, "STATUS_FILE": str(self.status_path)}
        self.crash_points: list[str] = []
        """For the next incarnations, in turn; empty text: none for that one."""
        self.wanted = False
        self.deaths: list[Death] = []
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        self.status_path.unlink(missing_ok=True)
        environment = dict(self.environment)
        point = self.crash_points.pop(0) if self.crash_points else ""
        if point:
            environment[CRASH_POINT] = point
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                dying_with_parent([sys.executable, "-m", f"services.{self.service}"]),
                cwd=ROOT,
                env=environment,
                stdout=log,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
            )
        self.wanted = True

    @property
    def running(self) -> bool:
        return self.process is not None and self.process.poll() is None

    @property
    def exit_code(self) -> int | None:
        """None while it runs; negative for a signal."""
        return None if self.process is None else self.process.poll()

    def page(self, name: str) -> tuple[int, dict[str, Any]]:
        """HTTP status and content of a page of the process that runs now; 0 where nothing answers."""
        try:
            address = json.loads(self.status_path.read_text("utf-8"))
            if self.process is None or address["pid"] != self.process.pid:
                return 0, {}
            url = f"http://127.0.0.1:{address['port']}/{name}"
            with urllib.request.urlopen(url, timeout=2) as answer:
                return answer.status, json.load(answer)
        except urllib.error.HTTPError as error:
            return error.code, {}
        except (OSError, ValueError, KeyError):
            return 0, {}

    def status(self) -> dict[str, Any]:
        return self.page("status")[1]

    @property
    def ready(self) -> bool:
        return self.page("readyz")[0] == 200

    def signal(self, number: signal.Signals) -> bool:
        if self.process is None or not self.running:
            return False
        self.process.send_signal(number)
        return True


@dataclass
class Stack:
    """A run of the whole pipeline over a capture."""

    folder: Path
    bootstrap: str
    registry: str
    prefix: str
    capture: Path
    speed: str = "1"
    settings: Mapping[str, str] = field(default_factory=dict)
    instances: dict[str, Instance] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("logs", "status"):
            (self.folder / name).mkdir(parents=True, exist_ok=True)
        self._lock = threading.RLock()
        self._over = threading.Event()
        self._keeper = threading.Thread(target=self._keep, daemon=True)

    @cached_property
    def info(self) -> CaptureInfo:
        return scan(self.capture)

    @cached_property
    def environment(self) -> dict[str, str]:
        kept = {
            name: os.environ[name] for name in ("PATH", "HOME", "LANG", "TMPDIR", "JAVA_HOME") if name in os.environ
        }
        return {
            **kept,
            "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "libs")]),
            "KAFKA_BOOTSTRAP": self.bootstrap,
            "SCHEMA_REGISTRY_URL": self.registry,
            "TOPIC_PREFIX": self.prefix,
            "DATA_DIR": str(self.folder),
            "METRICS_PORT": "0",
            "SOURCE": "capture",
            "CAPTURE": str(self.capture),
            "SYMBOLS": ",".join(self.info.symbols),
            "SPEED": self.speed,
            "SNAPSHOT_SEC": "1",
            **self.settings,
        }

    def start(self, crash_points: Mapping[str, list[str]] | None = None) -> None:
        """Make the topics, start one process of each service."""
        made = subprocess.run(
            [sys.executable, "-m", "orderflow.cli.main", "init"],
            cwd=ROOT,
            env=self.environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert made.returncode == 0, f"`orderflow init` ended with {made.returncode}: {made.stderr}"
        for service in reversed(SERVICES):
            self.add(service, (crash_points or {}).get(service, []))
        self._keeper.start()

    def add(self, service: str, crash_points: list[str] | None = None) -> Instance:
        """Start one more process of a service."""
        with self._lock:
            number = 0
            while (f"{service}-{number}" if number else service) in self.instances:
                number += 1
            environment = dict(self.environment)
            if service != "ingestion":
                environment.pop("CAPTURE")
            instance = Instance(service, number, self.folder, environment)
            instance.crash_points = list(crash_points or [])
            instance.start()
            self.instances[instance.name] = instance
            return instance

    def remove(self, name: str) -> None:
        """Stop a process in order and for good."""
        with self._lock:
            instance = self.instances.pop(name)
            instance.wanted = False
        instance.signal(signal.SIGTERM)
        self._await_end(instance)

    def of(self, service: str) -> list[Instance]:
        return [instance for instance in list(self.instances.values()) if instance.service == service]

    # -- keeping ----------------------------------------------------------------------------------------------------

    def _keep(self) -> None:
        """Restart what has died; note when what was restarted is ready."""
        while not self._over.wait(POLL_SEC):
            with self._lock:
                instances = list(self.instances.values())
                for instance in instances:
                    if instance.wanted and not instance.running:
                        assert instance.process is not None
                        code = instance.process.returncode
                        cause = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
                        instance.deaths.append(Death(instance.name, cause, time.monotonic()))
                        instance.start()
            for instance in instances:
                if instance.deaths and instance.deaths[-1].ready_at is None and instance.ready:
                    instance.deaths[-1].ready_at = time.monotonic()

    @property
    def deaths(self) -> list[Death]:
        return [death for instance in list(self.instances.values()) for death in instance.deaths]

    def crashed_at(self, service: str, point: str) -> int:
        """How many processes of a service have ended at a crash point."""
        return sum(
            instance.log.read_text("utf-8", "replace").count(f"{MARK}{point}\n")
            for instance in self.of(service)
            if instance.log.exists()
        )

    # -- waiting ----------------------------------------------------------------------------------------------------

    def until(self, condition: Callable[[], bool], what: str, timeout_sec: float = 300.0) -> float:
        """Wait for a condition; returns how long it took, in seconds."""
        began = time.monotonic()

        def look() -> bool:
            self._refuse_to_go_on()
            return condition()

        if not wait_for(look, timeout_sec, POLL_SEC):
            raise AssertionError(f"not within {timeout_sec:g} s: {what}; logs in {self.folder / 'logs'}")
        return time.monotonic() - began

    def _refuse_to_go_on(self) -> None:
        refusals = [death for death in self.deaths if death.cause.startswith("exit code")]
        if len(refusals) > REFUSALS:
            raise AssertionError(f"{refusals[-1].instance} keeps ending with {refusals[-1].cause}: {self.log_lines()}")

    def recorder(self) -> dict[str, Any]:
        (instance,) = self.of("ingestion")
        found: dict[str, Any] = instance.status().get("recorder", {})
        return found

    def until_at_work(self, service: str, records: int = 30) -> None:
        self.until(
            lambda: any(each.status().get("records_in", 0) > records for each in self.of(service)), f"{service} at work"
        )

    def frontiers(self, service: str) -> dict[str, int]:
        """How far each partition is, by the instances that own it."""
        found: dict[str, int] = {}
        for instance in self.of(service):
            for partition, seq in instance.status().get("frontiers", {}).items():
                found[partition] = max(found.get(partition, -1), seq)
        return found

    def drained(self, service: str, seqs: Mapping[str, int]) -> bool:
        frontiers = self.frontiers(service)
        settled = all(each.status().get("drained") or not each.status().get("partitions") for each in self.of(service))
        return settled and all(frontiers.get(partition, -1) >= seq for partition, seq in seqs.items())

    def drain(self, timeout_sec: float = DRAIN_SEC) -> None:
        """Until the capture has ended and everything that follows from it is computed and written."""
        self.until(lambda: bool(self.recorder().get("done")), "the end of the capture", timeout_sec)
        for service in SERVICES:
            self.until(lambda service=service: self.drained(service, self._seqs()), f"{service} drained", timeout_sec)  # type: ignore[misc]

    def _seqs(self) -> dict[str, int]:
        return {str(partition): seq for partition, seq in self.recorder().get("seqs", {"-": 1}).items()}

    def stop(self) -> None:
        """End every process; SIGKILL after a while."""
        with self._lock:
            for instance in self.instances.values():
                instance.wanted = False
        for instance in self.instances.values():
            instance.signal(signal.SIGCONT)
            instance.signal(signal.SIGTERM)
        for instance in self.instances.values():
            self._await_end(instance)
        # Last: what its thread has restarted would end with it, and not in order.
        self._over.set()
        if self._keeper.is_alive():
            self._keeper.join()

    def _await_end(self, instance: Instance) -> None:
        """One that has been asked to end. Not asked twice: an interpreter on its way out would die of the second time."""
        assert instance.process is not None
        try:
            instance.process.wait(STOP_SEC)
        except subprocess.TimeoutExpired:
            instance.process.kill()
            instance.process.wait()

    def final_metrics(self, service: str) -> dict[str, float]:
        """What a service that has been stopped in order had counted."""
        content = json.loads((self.folder / "metrics" / service / "metrics.json").read_text("utf-8"))
        found: dict[str, float] = content["metrics"]
        return found

    def last_words(self, name: str) -> str:
        return "\n".join((self.folder / "logs" / f"{name}.log").read_text("utf-8", "replace").splitlines()[-3:])

    def log_lines(self, levels: tuple[str, ...] = ("WARNING", "ERROR")) -> dict[str, list[str]]:
        """Messages of each process at these levels."""
        found: dict[str, list[str]] = {}
        for path in sorted((self.folder / "logs").glob("*.log")):
            for line in path.read_text("utf-8", "replace").splitlines():
                try:
                    content = json.loads(line)
                except ValueError:
                    if not line.startswith(MARK):
                        found.setdefault(path.stem, []).append(line)
                    continue
                if content["level"] in levels:
                    found.setdefault(path.stem, []).append(content["message"])
        return found


@contextmanager
def brokers(folder: Path, nodes: int) -> Iterator[EmbeddedKafka | EmbeddedCluster]:
    """A broker of its own, or a cluster."""
    with EmbeddedKafka(folder) if nodes == 1 else EmbeddedCluster(folder, nodes) as running:
        yield running
