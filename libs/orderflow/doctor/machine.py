"""This machine: Python and its packages, Java and the broker's jars, disk, ports."""

from __future__ import annotations

import importlib.metadata
import os
import re
import shutil
import socket
import sys
import tempfile
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Final

from orderflow.doctor.check import Check, http_get, ok, several, warning, wrong
from orderflow.errors import OrderflowError
from orderflow.kafka_embedded.jars import damaged_jars, jars_dir, read_lock
from orderflow.kafka_embedded.java import find_java
from orderflow.kafka_embedded.probe import probe
from orderflow.paths import ROOT

PYTHON_LEAST: Final = (3, 11)
DISK_WRONG_BYTES: Final = 1 << 30
DISK_WARNING_BYTES: Final = 10 << 30
LOOPBACK: Final = "127.0.0.1"
PIN: Final = re.compile(r"^([A-Za-z0-9._-]+)==([^ ;\\]+)(?: ;([^\\]*))?", re.MULTILINE)


def python() -> Check:
    """The interpreter, and whether its packages are those that the project pins."""
    name, version = "python", sys.version.split()[0]
    if sys.version_info < PYTHON_LEAST:
        return wrong(
            name, f"{version} at {sys.executable}", "install Python 3.11 or newer, then `make setup PYTHON=...`"
        )
    pins = _pins(ROOT / "infra" / "requirements" / "run.txt")
    differing: list[str] = []
    for package, pinned in sorted(pins.items()):
        try:
            found = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found = "missing"
        if found != pinned:
            differing.append(f"{package} {found} (pinned {pinned})")
    if differing:
        return warning(
            name,
            f"{version}; packages differ from infra/requirements/run.txt: {several(differing)}",
            "`make clean setup` makes the virtual environment anew",
        )
    return ok(name, f"{version}" + (f", {len(pins)} packages as pinned" if pins else ""))


def _pins(path: Path) -> dict[str, str]:
    """Name -> version of the packages that are pinned for every platform; none in a container, which has other ones."""
    try:
        text = path.read_text("utf-8")
    except OSError:
        return {}
    return {match[1]: match[2] for match in PIN.finditer(text) if not (match[3] or "").strip()}


def java(needed: bool) -> Check:
    """What would run the embedded broker."""
    if not needed:
        return ok("java", "not needed: KAFKA_BOOTSTRAP names a broker")
    try:
        found = find_java()
    except OrderflowError as error:
        return wrong("java", "none that can run the embedded Kafka", str(error))
    return ok("java", f"{found.major} at {found.path}")


def jars(needed: bool) -> Check:
    """Whether the embedded broker's jars are in the cache and sound."""
    name = "jars"
    if not needed:
        return ok(name, "not needed: KAFKA_BOOTSTRAP names a broker")
    try:
        total, damaged = len(read_lock()), damaged_jars()
    except (OrderflowError, OSError) as error:
        return wrong(name, "can't be checked", str(error))
    folder = jars_dir()
    if not damaged:
        return ok(name, f"{total} of Apache Kafka in {folder}")
    missing = [jar for jar in damaged if not (folder / jar.filename).exists()]
    what = f"{len(missing)} of {total} missing, {len(damaged) - len(missing)} damaged in {folder}"
    return warning(
        name,
        what,
        "`orderflow kafka up` fetches them from Maven Central; without network copy that folder from a machine that has it",
    )


def disk(folder: Path, name: str = "disk") -> Check:
    """Whether files can be written where they will be, and for how long."""
    place = folder
    while not place.exists() and place != place.parent:
        place = place.parent
    try:
        with tempfile.NamedTemporaryFile(dir=place, prefix=".doctor-"):
            pass
        free_bytes = shutil.disk_usage(place).free
    except OSError as error:
        remedy = f"make {place} writable for user {os.getuid()}, or set DATA_DIR to another folder"
        return wrong(name, f"{place} can't be written: {error.strerror}", remedy)
    what = f"{free_bytes / (1 << 30):,.1f} GiB free for {folder}"
    remedy = "free some, or set DATA_DIR to a larger disk; a full disk stops the lake's files and Kafka's"
    if free_bytes < DISK_WRONG_BYTES:
        return wrong(name, what, remedy)
    if free_bytes < DISK_WARNING_BYTES:
        return warning(name, what, remedy)
    return ok(name, what)


# -- ports ------------------------------------------------------------------------------------------------------------

Ask = Callable[[int, float], Awaitable[bool]]


async def _is_kafka(port: int, timeout_sec: float) -> bool:
    return probe(LOOPBACK, port, timeout_sec) is not None


def _answers(path: str, word: bytes) -> Ask:
    async def ask(port: int, timeout_sec: float) -> bool:
        try:
            status, body = await http_get(f"http://{LOOPBACK}:{port}{path}", timeout_sec)
        except OSError:
            return False
        return status == 200 and word in body

    return ask


PORTS: Final[tuple[tuple[str, int, str, Ask], ...]] = (
    ("KAFKA_PORT", 9092, "Kafka", _is_kafka),
    ("SCHEMA_REGISTRY_PORT", 8081, "a Schema Registry", _answers("/subjects", b"[")),
    ("PROMETHEUS_PORT", 9090, "Prometheus", _answers("/-/healthy", b"Prometheus")),
    ("ALERTMANAGER_PORT", 9093, "Alertmanager", _answers("/-/healthy", b"OK")),
    ("GRAFANA_PORT", 3000, "Grafana", _answers("/api/health", b"database")),
)
"""(name in the environment, default, what belongs there, how to tell) of the ports that compose publishes."""


async def ports(environment: Mapping[str, str], timeout_sec: float) -> Check:
    """Whether the ports that `docker compose up` publishes are free, or its own already."""
    free: list[str] = []
    own: list[str] = []
    taken: list[str] = []
    for name, default, what, ask in PORTS:
        text = environment.get(name) or str(default)
        if not text.isdecimal() or not 0 < int(text) < 65536:
            return wrong("ports", f"{name} is {text!r}", f"set {name} to a number from 1 to 65535")
        port = int(text)
        if _is_free(port):
            free.append(str(port))
        elif await ask(port, timeout_sec):
            own.append(f"{port} {what}")
        else:
            taken.append(f"{port} by something that is not {what} ({name})")
    if taken:
        names = ", ".join(re.findall(r"\((\w+)\)", " ".join(taken)))
        return warning(
            "ports",
            f"taken: {several(taken)}",
            f"for `docker compose up` set {names} to ports that are free; `orderflow run` finds its own",
        )
    said = [f"free: {', '.join(free)}"] if free else []
    return ok("ports", "; ".join([*said, *([f"in use: {', '.join(own)}"] if own else [])]))


def _is_free(port: int) -> bool:
    with socket.socket() as probe_socket:
        probe_socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe_socket.bind((LOOPBACK, port))
        except OSError:
            return False
        return True
