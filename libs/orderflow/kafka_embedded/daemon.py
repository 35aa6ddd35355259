"""The broker of `orderflow kafka up`: it outlives the command and is found again by the record in its folder."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
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
    """Whether a broker lives on this folder, and whether it answers as the cluster of this folder."""
    folder = _folder(data_dir)
    record = storage.read_record(folder)
    if record is None or not is_broker_of(record.pid, folder):
        return DaemonStatus(folder)
    answer = probe(HOST, record.port, PROBE_SEC)
    answers = answer is not None and answer.cluster_id == record.cluster_id and bool(answer.brokers)
    return DaemonStatus(folder, record.pid, f"{HOST}:{record.port}", answers)


def running_daemon(data_dir: Path | None = None) -> str | None:
    """Address of the daemon's broker, or None where none answers."""
    status = daemon_status(data_dir)
    return status.bootstrap if status.answers else None


def start_daemon(port: int | None = None, data_dir: Path | None = None, timeout_sec: float = START_SEC) -> DaemonStatus:
    """Start the broker of this folder, or find it running. `port` is 9092 by default.

    Raises
    ------
    EmbeddedKafkaError
        It runs at another port than the one asked for, or can't be started.
    """
    folder = _folder(data_dir)
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
    """Stop the broker of this folder; False where none runs. A pid that has passed to another program is left alone.

    Raises
    ------
    EmbeddedKafkaError
        It belongs to another user, or does not end even on SIGKILL.
    """
    folder = _folder(data_dir)
    record = storage.read_record(folder)
    if record is None or not is_broker_of(record.pid, folder):
        return False
    for number, patience_sec in ((signal.SIGTERM, timeout_sec), (signal.SIGKILL, KILL_SEC)):
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
