"""The broker, or the cluster, of `orderflow kafka up`: it outlives the command and is found again by the record in its folder."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from orderflow.kafka_embedded import storage
from orderflow.kafka_embedded.broker import (
    KILL_SEC,
    START_SEC,
    STOP_SEC,
    DataDirInUseError,
    EmbeddedKafka,
    EmbeddedKafkaError,
)
from orderflow.kafka_embedded.cluster import EmbeddedCluster, node_dir, read_plan
from orderflow.kafka_embedded.probe import probe
from orderflow.kafka_embedded.process import is_broker_of
from orderflow.kafka_embedded.storage import HOST

DEFAULT_PORT: Final = 9092
POLL_SEC: Final = 0.05
PROBE_SEC: Final = 2.0


@dataclass(frozen=True, slots=True)
class DaemonStatus:
    """What is known of a folder's broker. `pid` and `bootstrap` are None where no process lives."""

    data_dir: Path
    pid: int | None = None
    bootstrap: str | None = None
    answers: bool = False


def daemon_dir() -> Path:
    """Folder of the daemon's data: `kafka` in ORDERFLOW_HOME, which is ~/.local/share/orderflow by default."""
    home = os.environ.get("ORDERFLOW_HOME")
    return (Path(home).expanduser() if home else Path.home() / ".local" / "share" / "orderflow") / "kafka"


def daemon_status(data_dir: Path | None = None) -> DaemonStatus:
    """Whether a broker lives on this folder, and whether it answers as the cluster of this folder.

    Of several nodes: the addresses and the answer of those that live; the pid is the first one's.
    """
    folder = _folder(data_dir)
    living = [status for status in daemon_nodes(folder).values() if status.bootstrap is not None]
    if not living:
        return DaemonStatus(folder)
    bootstrap = ",".join(status.bootstrap or "" for status in living)
    return DaemonStatus(folder, living[0].pid, bootstrap, any(status.answers for status in living))


def daemon_nodes(data_dir: Path | None = None) -> dict[int, DaemonStatus]:
    """The same node by node; a broker that stands alone is number 1."""
    return {number: _status(folder) for number, folder in _node_folders(_folder(data_dir)).items()}


def _status(folder: Path) -> DaemonStatus:
    record = storage.read_record(folder)
    if record is None or not is_broker_of(record.pid, folder):
        return DaemonStatus(folder)
    answer = probe(HOST, record.port, PROBE_SEC)
    answers = answer is not None and answer.cluster_id == record.cluster_id and bool(answer.brokers)
    return DaemonStatus(folder, record.pid, f"{HOST}:{record.port}", answers)


def _node_folders(folder: Path) -> dict[int, Path]:
    plan = read_plan(folder)
    if plan is None:
        return {1: folder}
    return {number: node_dir(folder, number) for number in range(1, len(plan.ports) + 1)}


def running_daemon(data_dir: Path | None = None) -> str | None:
    """Address of the daemon's broker, or None where none answers."""
    status = daemon_status(data_dir)
    return status.bootstrap if status.answers else None


def start_daemon(
    port: int | None = None, data_dir: Path | None = None, timeout_sec: float = START_SEC, nodes: int = 1
) -> DaemonStatus:
    """Start the broker of this folder, or its cluster, or find it running. `port` is 9092 by default.

    A folder that holds a cluster starts as that cluster; `nodes` above 1 makes a new folder hold one.

    Raises
    ------
    EmbeddedKafkaError
        It runs at another port than the one asked for, or can't be started.
    """
    folder = _folder(data_dir)
    plan = read_plan(folder)
    if nodes > 1 or plan is not None:
        size = nodes if nodes > 1 or plan is None else len(plan.ports)
        cluster = EmbeddedCluster(folder, size, port or (None if plan else DEFAULT_PORT), survive_parent=True)
        cluster.start(timeout_sec)
        return daemon_status(folder)
    try:
        if not storage.is_locked(folder):
            EmbeddedKafka(folder, port or DEFAULT_PORT, survive_parent=True).start(timeout_sec)
    except DataDirInUseError:
        pass  # another command was quicker
    if not _wait(lambda: daemon_status(folder).answers or not storage.is_locked(folder), timeout_sec):
        raise EmbeddedKafkaError(
            f"a broker runs on {folder} but does not answer: look at {folder / storage.BROKER_LOG}, or stop it with "
            "`orderflow kafka down`"
        )
    status = daemon_status(folder)
    if status.bootstrap is None:
        raise EmbeddedKafkaError(f"the broker on {folder} ended at its start: look at {folder / storage.BROKER_LOG}")
    if port is not None and status.bootstrap != f"{HOST}:{port}":
        raise EmbeddedKafkaError(
            f"the broker on {folder} runs at {status.bootstrap}, not at port {port}: stop it first with `orderflow kafka "
            "down`, or leave out --port"
        )
    return status


def stop_daemon(data_dir: Path | None = None, timeout_sec: float = STOP_SEC) -> bool:
    """Stop what runs on this folder; False where nothing does. A pid that has passed to another program is left alone.

    Raises
    ------
    EmbeddedKafkaError
        It belongs to another user, or does not end even on SIGKILL.
    """
    folders = _node_folders(_folder(data_dir)).values()
    with ThreadPoolExecutor(len(folders)) as pool:
        return any(list(pool.map(lambda folder: _end(folder, timeout_sec), folders)))


def start_node(number: int, data_dir: Path | None = None, timeout_sec: float = START_SEC) -> DaemonStatus:
    """Start one node of a cluster again.

    Raises
    ------
    EmbeddedKafkaError
        There is no such node, it runs already, or it can't be started; it needs a majority of the others.
    """
    folder = _folder(data_dir)
    node_folder = _node_folder(folder, number)
    plan = read_plan(folder)
    if plan is None:
        return start_daemon(data_dir=folder, timeout_sec=timeout_sec)
    EmbeddedCluster(folder, len(plan.ports), survive_parent=True).nodes[number].start(timeout_sec)
    return _status(node_folder)


def stop_node(number: int, data_dir: Path | None = None, timeout_sec: float = STOP_SEC) -> bool:
    """Stop one node; False where it does not run. Raises as `stop_daemon`, and where there is no such node."""
    return _end(_node_folder(_folder(data_dir), number), timeout_sec)


def kill_node(number: int, data_dir: Path | None = None) -> bool:
    """SIGKILL to one node; False where it does not run. Raises as `stop_node`."""
    return _end(_node_folder(_folder(data_dir), number), None)


def _node_folder(folder: Path, number: int) -> Path:
    folders = _node_folders(folder)
    if number not in folders:
        raise EmbeddedKafkaError(f"there is no node {number} in {folder}: it has 1 to {len(folders)}")
    return folders[number]


def _end(folder: Path, timeout_sec: float | None) -> bool:
    """End the broker of a folder: by SIGTERM and, after `timeout_sec`, SIGKILL; by SIGKILL alone where that is None."""
    record = storage.read_record(folder)
    if record is None or not is_broker_of(record.pid, folder):
        return False
    attempts = [(signal.SIGKILL, KILL_SEC)]
    if timeout_sec is not None:
        attempts.insert(0, (signal.SIGTERM, timeout_sec))
    for number, patience_sec in attempts:
        try:
            os.kill(record.pid, number)
        except ProcessLookupError:
            pass  # it ended in this moment
        except PermissionError as error:
            raise EmbeddedKafkaError(f"the broker on {folder} (pid {record.pid}) belongs to another user") from error
        if _wait(lambda: not is_broker_of(record.pid, folder), patience_sec):
            storage.drop_record(folder)
            return True
    raise EmbeddedKafkaError(f"the broker on {folder} (pid {record.pid}) does not end on SIGKILL: its disk may hang")


def _folder(data_dir: Path | None) -> Path:
    return (data_dir or daemon_dir()).resolve()


def _wait(condition: Callable[[], bool], patience_sec: float) -> bool:
    deadline = time.monotonic() + patience_sec
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(POLL_SEC)
    return True
