"""A broker's folder: its settings, its storage format, the record of the process that owns it.

data_dir/log/               Kafka's own: meta.properties, the topics
data_dir/server.properties  written at every start, since ports change
data_dir/broker.log         standard error of the broker, warnings and worse
data_dir/broker.json        pid and address of the broker that runs, or last ran, here
data_dir/broker.lock        flock held by the broker process itself, so that it can't outlive it or be left behind
data_dir/tmp/               Java's temporary files, emptied at every start
"""

from __future__ import annotations

import base64
import fcntl
import os
import shutil
import subprocess
import tempfile
import time
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import msgspec

from orderflow.errors import OrderflowError
from orderflow.kafka_embedded.jars import write_atomically
from orderflow.kafka_embedded.java import JavaRuntime

HOST: Final = "127.0.0.1"
NODE_ID: Final = 1
LOG_DIR: Final = "log"
TMP_DIR: Final = "tmp"
SETTINGS: Final = "server.properties"
BROKER_LOG: Final = "broker.log"
RECORD: Final = "broker.json"
LOCK: Final = "broker.lock"
META: Final = "meta.properties"
CHECKPOINT: Final = "bootstrap.checkpoint"
BROKER_LOG_MAX_BYTES: Final = 4 << 20
FORMAT_TIMEOUT_SEC: Final = 60.0
LOCK_PATIENCE_SEC: Final = 1.0
LOCK_POLL_SEC: Final = 0.02

_KIB: Final = 1 << 10
_MIB: Final = 1 << 20

STATIC_SETTINGS: Final[dict[str, str | int]] = {
    "process.roles": "broker,controller",
    "node.id": NODE_ID,
    "controller.listener.names": "CONTROLLER",
    "inter.broker.listener.name": "PLAINTEXT",
    "listener.security.protocol.map": "PLAINTEXT:PLAINTEXT,CONTROLLER:PLAINTEXT",
    # Relative to the working directory of the broker: a comma or a letter beyond Latin-1 in the path can't break it.
    "log.dirs": LOG_DIR,
    "num.network.threads": 2,
    "num.io.threads": 2,
    "background.threads": 2,
    "num.recovery.threads.per.data.dir": 2,
    "auto.create.topics.enable": "false",
    "default.replication.factor": 1,
    "min.insync.replicas": 1,
    "unclean.leader.election.enable": "false",
    "compression.type": "producer",
    "message.max.bytes": 8 * _MIB,
    "replica.fetch.max.bytes": 8 * _MIB,
    # A group is ready at once, and a killed member is missed after a second instead of six.
    "group.initial.rebalance.delay.ms": 0,
    "group.min.session.timeout.ms": 1_000,
    # After SIGKILL the controller refuses the new process until the session of the old one is over.
    "broker.session.timeout.ms": 2_000,
    "broker.heartbeat.interval.ms": 400,
    "offsets.topic.replication.factor": 1,
    "offsets.topic.num.partitions": 4,
    "offsets.topic.segment.bytes": 16 * _MIB,
    "transaction.state.log.replication.factor": 1,
    "transaction.state.log.min.isr": 1,
    "transaction.state.log.num.partitions": 4,
    "share.coordinator.state.topic.replication.factor": 1,
    "share.coordinator.state.topic.min.isr": 1,
    "share.coordinator.state.topic.num.partitions": 4,
    # Some 250 partitions, most of them small: two index files each, mapped at their full size.
    "log.index.size.max.bytes": _MIB,
    "log.segment.bytes": 128 * _MIB,
    # Only the offsets topic is compacted; the default of 128 MiB would be a third of the heap.
    "log.cleaner.dedupe.buffer.size": 16 * _MIB,
    "log.cleaner.io.buffer.size": 128 * _KIB,
}


INTERNAL_TOPICS: Final = ("offsets.topic", "transaction.state.log", "share.coordinator.state.topic")


class BrokerRecord(msgspec.Struct, frozen=True, kw_only=True):
    """Who runs, or last ran, on a folder."""

    pid: int
    port: int
    controller_port: int
    cluster_id: str


class ClusterNode(msgspec.Struct, frozen=True, kw_only=True):
    """One node's place in a cluster: its own number and the controllers of all nodes, as (node id, port)."""

    node_id: int
    controllers: tuple[tuple[int, int], ...]
    cluster_id: str

    @property
    def settings(self) -> dict[str, str | int]:
        """What differs from the settings of a node that stands alone."""
        copies = min(3, len(self.controllers))
        in_sync = min(2, copies)
        return {
            "node.id": self.node_id,
            "default.replication.factor": copies,
            "min.insync.replicas": in_sync,
            **{f"{topic}.replication.factor": copies for topic in INTERNAL_TOPICS},
            "transaction.state.log.min.isr": in_sync,
            "share.coordinator.state.topic.min.isr": in_sync,
            "controller.quorum.voters": ",".join(f"{node}@{HOST}:{port}" for node, port in self.controllers),
            # A follower that is dead leaves the in-sync set soon.
            "replica.lag.time.max.ms": 4_000,
            # Three brokers on one busy machine miss a heartbeat now and then: that must not cost an election each time.
            "broker.session.timeout.ms": 4_000,
            # Whoever comes back leads again what it led before, so that load does not stay on the survivors.
            "leader.imbalance.check.interval.seconds": 10,
            # A node's stop hands its partitions over first, but not for ever: the last node has nobody to hand them to.
            "controlled.shutdown.enable": "true",
        }


def settings_text(port: int, controller_port: int, node: ClusterNode | None = None) -> str:
    """`server.properties` for these ports; with `node`, as one of a cluster."""
    addresses: dict[str, str | int] = {
        "listeners": f"PLAINTEXT://{HOST}:{port},CONTROLLER://{HOST}:{controller_port}",
        "advertised.listeners": f"PLAINTEXT://{HOST}:{port}",
        "controller.quorum.voters": f"{NODE_ID}@{HOST}:{controller_port}",
    }
    own = node.settings if node is not None else {}
    return "".join(f"{name}={value}\n" for name, value in {**STATIC_SETTINGS, **addresses, **own}.items())


def prepare(data_dir: Path, java: JavaRuntime, jars: Sequence[Path], node: ClusterNode | None = None) -> str:
    """Make the folder ready for a start and return its cluster id. To be called with the folder's lock held.

    Raises
    ------
    OrderflowError
        The folder holds something else, its meta.properties is damaged, or Kafka's storage tool fails.
    """
    shutil.rmtree(data_dir / TMP_DIR, ignore_errors=True)
    (data_dir / TMP_DIR).mkdir()
    log = data_dir / BROKER_LOG
    if log.exists() and log.stat().st_size > BROKER_LOG_MAX_BYTES:
        log.replace(data_dir / f"{BROKER_LOG}.1")
    if not (data_dir / LOG_DIR / META).exists():
        _format(data_dir / LOG_DIR, java, jars, node)
    return cluster_id(data_dir)


def cluster_id(data_dir: Path) -> str:
    """The cluster id that a folder was formatted with.

    Raises
    ------
    OrderflowError
        It was not formatted, or its meta.properties is damaged.
    """
    path = data_dir / LOG_DIR / META
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise OrderflowError(
            f"{path} can't be read: {error}; restore it, or remove {data_dir} to start empty"
        ) from error
    values = dict(line.split("=", 1) for line in lines if "=" in line and not line.startswith("#"))
    if not values.get("cluster.id"):
        raise OrderflowError(f"{path} names no cluster.id: restore it, or remove {data_dir} to start empty")
    return values["cluster.id"]


def _format(log_dir: Path, java: JavaRuntime, jars: Sequence[Path], node: ClusterNode | None) -> None:
    """What `kafka-storage format` writes; meta.properties last, as it is what makes a folder count as formatted."""
    log_dir.mkdir(exist_ok=True)
    strangers = sorted(each.name for each in log_dir.iterdir() if each.name != CHECKPOINT and each.name[0] != ".")
    if strangers:
        raise OrderflowError(
            f"{log_dir} has no {META} but holds {strangers[0]!r}: it is not the folder of an embedded broker, or it is "
            "damaged; choose another folder, or remove it to start empty"
        )
    write_atomically(log_dir / CHECKPOINT, _checkpoint(java, jars))
    cluster, number = (kafka_uuid(), NODE_ID) if node is None else (node.cluster_id, node.node_id)
    meta = f"version=1\ncluster.id={cluster}\nnode.id={number}\ndirectory.id={kafka_uuid()}\n"
    write_atomically(log_dir / META, meta.encode())


def kafka_uuid() -> str:
    """A random UUID as Kafka writes it; none begins with a dash, which command lines would take for an option."""
    while True:
        text = base64.urlsafe_b64encode(uuid.uuid4().bytes).decode().rstrip("=")
        if text[0] != "-":
            return text


def _checkpoint(java: JavaRuntime, jars: Sequence[Path]) -> bytes:
    """The feature levels that a new cluster begins with: the same for every cluster of one Kafka version.

    Kafka's own tool makes it once and it is kept beside the jars, so that only the first start of all pays a second
    Java process.
    """
    kept = jars[0].parent / CHECKPOINT
    try:
        return kept.read_bytes()
    except FileNotFoundError:
        content = _run_storage_tool(java, jars)
    try:
        write_atomically(kept, content)
    except OSError:
        pass  # a read-only cache: the next new folder runs the tool again
    return content


def _run_storage_tool(java: JavaRuntime, jars: Sequence[Path]) -> bytes:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / SETTINGS).write_text(settings_text(port=9092, controller_port=9093), encoding="ascii")
        tool = ("kafka.tools.StorageTool", "format", "--cluster-id", kafka_uuid(), "--config", SETTINGS)
        command = [str(java.path), "-XX:+UseSerialGC", "-XX:TieredStopAtLevel=1", "-cp", class_path(jars), *tool]
        try:
            result = subprocess.run(
                command, cwd=folder, capture_output=True, text=True, errors="replace", timeout=FORMAT_TIMEOUT_SEC
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            raise OrderflowError(f"Kafka's storage tool can't be run: {error}; try again") from error
        try:
            return (folder / LOG_DIR / CHECKPOINT).read_bytes()
        except OSError as error:
            last = (result.stdout + result.stderr).strip()[-2000:]
            raise OrderflowError(f"Kafka's storage tool failed (exit code {result.returncode}): {last}") from error


def class_path(jars: Sequence[Path]) -> str:
    """For `java -cp`."""
    return os.pathsep.join(str(jar) for jar in jars)


def take_lock(data_dir: Path) -> int | None:
    """A descriptor that holds the folder's lock, or None where a broker holds it.

    The lock lives as long as any process has the descriptor: handed to the broker, it ends with the broker.
    """
    descriptor = os.open(data_dir / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    deadline = time.monotonic() + LOCK_PATIENCE_SEC  # `is_locked` holds it for a moment
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return descriptor
        except BlockingIOError:
            if time.monotonic() > deadline:
                os.close(descriptor)
                return None
            time.sleep(LOCK_POLL_SEC)
        except OSError:
            os.close(descriptor)
            raise


def is_locked(data_dir: Path) -> bool:
    """Whether a broker, or one that is about to start, holds the folder."""
    try:
        descriptor = os.open(data_dir / LOCK, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False


def write_record(data_dir: Path, record: BrokerRecord) -> None:
    """Note who runs here."""
    write_atomically(data_dir / RECORD, msgspec.json.encode(record))


def read_record(data_dir: Path) -> BrokerRecord | None:
    """Who runs, or last ran, here; None where nobody did or the note is damaged."""
    try:
        return msgspec.json.decode((data_dir / RECORD).read_bytes(), type=BrokerRecord)
    except (OSError, msgspec.MsgspecError):
        return None


def drop_record(data_dir: Path) -> None:
    """The broker of this folder has been stopped."""
    (data_dir / RECORD).unlink(missing_ok=True)
