"""The stack of docker-compose.yml from a copy of the tree, under a project name and on ports of its own."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import time
import urllib.request
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.waiting import wait_for

ROOT = Path(__file__).resolve().parents[2]
SERVICES = ("ingestion", "ofi", "cvd", "fusion", "signal", "sinks", "lake")
PORTS = (
    "KAFKA_PORT",
    "SCHEMA_REGISTRY_PORT",
    "PROMETHEUS_PORT",
    "ALERTMANAGER_PORT",
    "GRAFANA_PORT",
    "SIM_PORT",
    "KAFKA_UI_PORT",
)
PARTITIONS = 12
PROFILE = "sim"
UP_SEC = 900.0
WAIT_SEC = 300.0

DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))
"""The stack is on this machine: never through a proxy."""
SIGNAL = """
import os, sys
for name in os.listdir("/proc"):
    if name.isdigit() and int(name) not in (1, os.getpid()):
        os.kill(int(name), int(sys.argv[1]))
"""
"""To what the container's init has started: a process can't kill the init of its own container, and the engine does not
restart what `docker kill` has signalled."""


def engine_answers() -> str:
    """Empty where `docker compose` works; else why not."""
    if shutil.which("docker") is None:
        return "no docker on this machine"
    for words in (["docker", "info"], ["docker", "compose", "version"]):
        done = subprocess.run(words, capture_output=True, text=True, timeout=60, check=False)
        if done.returncode:
            return f"`{' '.join(words)}`: {(done.stderr.strip() or done.stdout.strip()).splitlines()[-1][:200]}"
    return ""


def free_ports(count: int) -> list[int]:
    """Ports that nothing listens on now."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    try:
        return [each.getsockname()[1] for each in sockets]
    finally:
        for each in sockets:
            each.close()


def copy_tree(target: Path) -> None:
    """What a clone would hold if this moment were committed."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        check=True,
    ).stdout.decode()
    for name in filter(None, listed.split("\0")):
        if (ROOT / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, target / name)


def docker(*words: str) -> str:
    return subprocess.run(["docker", *words], capture_output=True, text=True, check=True, timeout=60).stdout


def service_of(container: dict[str, Any]) -> str:
    name: str = container["Config"]["Labels"]["com.docker.compose.service"]
    return name


def health_of(container: dict[str, Any]) -> str:
    """healthy, unhealthy, starting; where nothing asks, or it does not run: its state."""
    state = container["State"]
    found: str = state["Health"]["Status"] if state["Running"] and "Health" in state else state["Status"]
    return found


@dataclass
class Done:
    code: int
    stdout: str
    stderr: str

    @property
    def text(self) -> str:
        return self.stdout + self.stderr


@dataclass
class Stack:
    """`docker compose` in a folder."""

    folder: Path
    name: str
    ports: dict[str, int]
    figures: dict[str, str] = field(default_factory=dict)
    """What was measured, printed at the end."""

    @property
    def bootstrap(self) -> str:
        return f"127.0.0.1:{self.ports['KAFKA_PORT']}"

    @property
    def registry(self) -> str:
        return f"http://127.0.0.1:{self.ports['SCHEMA_REGISTRY_PORT']}"

    def compose(self, *words: str, timeout_sec: float = UP_SEC, **settings: str) -> Done:
        """`docker compose WORDS` with a clean environment: nothing of the developer's own settings leaks in."""
        kept = {name: os.environ[name] for name in ("PATH", "HOME", "LANG", "DOCKER_HOST") if name in os.environ}
        ports = {name: str(port) for name, port in self.ports.items()}
        done = subprocess.run(
            ["docker", "compose", "-p", self.name, "--profile", PROFILE, *words],
            cwd=self.folder,
            env=kept | ports | settings,
            capture_output=True,
            text=True,
            timeout=timeout_sec,
            check=False,
        )
        return Done(done.returncode, done.stdout, done.stderr)

    def ok(self, *words: str, timeout_sec: float = UP_SEC, **settings: str) -> Done:
        done = self.compose(*words, timeout_sec=timeout_sec, **settings)
        assert done.code == 0, f"docker compose {' '.join(words)}:\n{done.text[-3000:]}\n{self.last_words()}"
        return done

    @contextmanager
    def timed(self, what: str) -> Iterator[None]:
        began = time.monotonic()
        yield
        self.figures[what] = f"{time.monotonic() - began:.1f} s"

    def last_words(self) -> str:
        """Of every container: what a failed test shows."""
        return self.compose("logs", "--no-color", "--tail", "5").stdout[-6000:]

    def containers(self, service: str = "") -> list[dict[str, Any]]:
        """Of the project, or of one service in the order of their numbers, as `docker inspect` shows them; those that
        have ended too, those of `run` not. Asked of the engine: cheaper than `docker compose ps`."""
        filters = [f"label=com.docker.compose.project={self.name}", "label=com.docker.compose.oneoff=False"]
        if service:
            filters.append(f"label=com.docker.compose.service={service}")
        words = [word for each in filters for word in ("--filter", each)]
        listed = docker("ps", "--all", "--quiet", *words).split()
        found: list[dict[str, Any]] = json.loads(docker("inspect", *listed)) if listed else []
        return sorted(found, key=lambda each: int(each["Config"]["Labels"]["com.docker.compose.container-number"]))

    def container(self, service: str) -> dict[str, Any]:
        return self.containers(service)[0]

    def page(self, service: str, name: str, number: int = 1) -> Any:
        """A page of a service's own, asked over the bridge; JSON, empty while nothing answers."""
        found = self.containers(service)
        if len(found) < number:
            return {}
        (network,) = found[number - 1]["NetworkSettings"]["Networks"].values()
        try:
            return self.get(f"http://{network['IPAddress']}:9100/{name}") if network["IPAddress"] else {}
        except OSError:
            return {}

    def signal(self, service: str, number: signal.Signals) -> None:
        self.compose("exec", "-T", service, "python", "-S", "-c", SIGNAL, str(int(number)), timeout_sec=60)

    def kcat(self, *words: str, timeout_sec: float = 120) -> Done:
        return self.compose("run", "--rm", "-T", "kcat", *words, timeout_sec=timeout_sec)

    def prometheus(self, path: str) -> Any:
        return self.get(f"http://127.0.0.1:{self.ports['PROMETHEUS_PORT']}{path}")["data"]

    @staticmethod
    def get(url: str) -> Any:
        with DIRECT.open(url, timeout=10) as answer:
            return json.load(answer)

    def until(self, condition: Callable[[], bool], what: str, timeout_sec: float = WAIT_SEC) -> float:
        """Poll; returns how long it took, in seconds."""
        began = time.monotonic()
        with suppress(OSError):
            if wait_for(condition, timeout_sec, 0.5):
                return time.monotonic() - began
        states = [f"{service_of(each)} {health_of(each)}" for each in self.containers()]
        raise AssertionError(f"{what}: not within {timeout_sec:g} s\n{'; '.join(states)}\n{self.last_words()}")

    def records_in(self, service: str) -> int:
        """Records that a service has taken since its process started; 0 where it does not answer."""
        return int(self.page(service, "status").get("records_in", 0))

    def until_at_work(self, service: str, what: str) -> float:
        """Until it has taken records that come now; returns how long it took, in seconds."""
        before = self.records_in(service)

        def more() -> bool:
            nonlocal before
            found = self.records_in(service)
            before, risen = found, found > before > 0
            return risen

        return self.until(more, f"{what}: {service} at work")

    def drained(self, service: str, seqs: dict[str, int]) -> bool:
        """Whether it has dealt with the journal up to these numbers, by partition."""
        status = self.page(service, "status")
        frontiers = status.get("frontiers", {})
        return bool(status.get("drained")) and all(frontiers.get(name, -1) >= seq for name, seq in seqs.items())

    def close(self) -> None:
        (self.folder / "containers.log").write_text(self.compose("logs", "--no-color").text, "utf-8")
        self.compose("--profile", "tools", "down", "--volumes", "--remove-orphans", "--timeout", "5")


@contextmanager
def stack(folder: Path) -> Iterator[Stack]:
    """A stack that is not up yet; whatever it started is removed at the end, with its volumes."""
    copy_tree(folder)
    ports = dict(zip(PORTS, free_ports(len(PORTS))))
    made = Stack(folder, f"orderflow-test-{uuid.uuid4().hex[:8]}", ports)
    try:
        yield made
    finally:
        made.close()
