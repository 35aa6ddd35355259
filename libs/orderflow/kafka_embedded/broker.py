"""`EmbeddedKafka`: one broker on loopback that this process starts, stops, kills and starts again on the same data."""

from __future__ import annotations

import logging
import os
import time
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from orderflow.errors import OrderflowError
from orderflow.kafka_embedded import storage
from orderflow.kafka_embedded.jars import ensure_jars
from orderflow.kafka_embedded.java import find_java
from orderflow.kafka_embedded.probe import probe
from orderflow.kafka_embedded.process import BrokerProcess, broker_command, free_port, port_is_free
from orderflow.kafka_embedded.storage import BROKER_LOG, HOST, NODE_ID, SETTINGS, BrokerRecord

logger = logging.getLogger(__name__)

START_SEC: Final = 120.0
"""Two seconds on an idle machine, half a minute seen at a load of seven per core."""
STOP_SEC: Final = 15.0
KILL_SEC: Final = 10.0
HEAP_MB: Final = 384
START_ATTEMPTS: Final = 3
"""With ports chosen here: one may be taken between the choice and the broker's bind."""
POLL_SEC: Final = 0.02
PROBE_SEC: Final = 2.0
LAST_WORDS_LINES: Final = 15
LAST_WORDS_BYTES: Final = 65_536
_PORT_LOST: Final = "Address already in use"


class EmbeddedKafkaError(OrderflowError):
    """The embedded broker can't start or stop; the message names the cause and the remedy."""


class PortTakenError(EmbeddedKafkaError):
    """Something else listens on the port."""


class DataDirInUseError(EmbeddedKafkaError):
    """Another broker runs on the folder."""


class _PortLostError(EmbeddedKafkaError):
    """A port was taken between its choice and the broker's bind."""


class EmbeddedKafka:
    """One Apache Kafka broker in KRaft mode on 127.0.0.1, with its data in a folder of its own.

    Methods block; under asyncio call them with `asyncio.to_thread`, one at a time. Acknowledged records survive
    `kill()`. On Linux the kernel ends the broker when the process that started it is gone, however it went.

    Parameters
    ----------
    data_dir
        Made where it is missing. Topics and cluster id are kept from start to start.
    port
        Of the broker; chosen freely by default, and then kept as long as this object lives.
    survive_parent
        Leave the broker running when this process ends.
    node
        Its place in a cluster, whose ports are fixed; see `EmbeddedCluster`.
    """

    def __init__(
        self,
        data_dir: Path,
        port: int | None = None,
        *,
        survive_parent: bool = False,
        node: storage.ClusterNode | None = None,
    ) -> None:
        if port is not None and not 0 < port < 65_536:
            raise EmbeddedKafkaError(f"port is {port}: it must be between 1 and 65535")
        self.data_dir = Path(data_dir).resolve()
        self._port = port or free_port()
        self._port_given = port is not None
        self._survive_parent = survive_parent
        self._node = node
        self._process: BrokerProcess | None = None

    @property
    def bootstrap(self) -> str:
        """`127.0.0.1:PORT`, for clients. Certain once `start` has returned."""
        return f"{HOST}:{self._port}"

    @property
    def is_running(self) -> bool:
        """Whether the broker's process lives."""
        return self._process is not None and not self._process.exited.is_set()

    @property
    def pid(self) -> int | None:
        """Of the broker's process, while it lives."""
        return self._process.pid if self._process is not None and self.is_running else None

    @property
    def log_path(self) -> Path:
        """Where the broker writes warnings and errors."""
        return self.data_dir / BROKER_LOG

    def start(self, timeout_sec: float = START_SEC) -> None:
        """Start and return once the broker answers requests. Does nothing while it runs.

        Raises
        ------
        JarsError, JavaError
            What it needs is not there.
        PortTakenError, DataDirInUseError
            Another process has the port or the folder.
        EmbeddedKafkaError
            The broker ended or did not answer within `timeout_sec`; with the last lines of its log.
        """
        if self.is_running:
            return
        deadline = time.monotonic() + timeout_sec
        for attempt in range(START_ATTEMPTS):
            try:
                self._start_once(deadline, timeout_sec)
                return
            except _PortLostError:
                if attempt == START_ATTEMPTS - 1:
                    raise
                logger.info("a port of the embedded Kafka was lost to another process: choosing others")
                if not self._port_given:
                    self._port = free_port()

    def stop(self, timeout_sec: float = STOP_SEC) -> None:
        """End the broker with SIGTERM, and with SIGKILL where it takes longer than `timeout_sec`.

        Raises
        ------
        EmbeddedKafkaError
            The process does not end even so.
        """
        process = self._process
        if process is None:
            return
        process.terminate()
        if not process.exited.wait(timeout_sec):
            logger.warning("the embedded Kafka (pid %d) did not end within %g s: killing it", process.pid, timeout_sec)
            self.kill()
        storage.drop_record(self.data_dir)
        self._process = None

    def kill(self) -> None:
        """End the broker with SIGKILL, as a crash of the machine's memory manager would.

        Raises
        ------
        EmbeddedKafkaError
            The process does not end.
        """
        process = self._process
        if process is None:
            return
        process.kill()
        if not process.exited.wait(KILL_SEC):
            raise EmbeddedKafkaError(
                f"the embedded Kafka (pid {process.pid}) does not end on SIGKILL: its disk may hang, look at {self.data_dir}"
            )
        self._process = None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def _start_once(self, deadline: float, timeout_sec: float) -> None:
        java, jars = find_java(), ensure_jars()
        lock = self._take_folder()
        try:
            self._check_port()
            cluster_id = storage.prepare(self.data_dir, java, jars, self._node)
            controller_port = self._controller_port()
            settings = storage.settings_text(self._port, controller_port, self._node)
            (self.data_dir / SETTINGS).write_text(settings, encoding="ascii")
            log_start = self.log_path.stat().st_size if self.log_path.exists() else 0
            command = broker_command(java, jars, self.data_dir, HEAP_MB)
            process = BrokerProcess(command, self.data_dir, self.log_path, lock, self._survive_parent)
            self._process = process
            storage.write_record(
                self.data_dir,
                BrokerRecord(pid=process.pid, port=self._port, controller_port=controller_port, cluster_id=cluster_id),
            )
        except OSError as error:
            self.kill()
            raise EmbeddedKafkaError(f"the embedded Kafka can't start in {self.data_dir}: {error}") from error
        finally:
            os.close(lock)  # from here on the broker alone holds it
        try:
            self._wait_until_ready(process, cluster_id, log_start, deadline, timeout_sec)
        except BaseException:
            self.kill()
            storage.drop_record(self.data_dir)
            raise

    def _controller_port(self) -> int:
        """Of a cluster's node: the one that the others know."""
        if self._node is None:
            return free_port(avoid=self._port)
        return dict(self._node.controllers)[self._node.node_id]

    def _take_folder(self) -> int:
        try:
            self.data_dir.mkdir(parents=True, exist_ok=True)
            lock = storage.take_lock(self.data_dir)
        except OSError as error:
            raise EmbeddedKafkaError(
                f"the folder {self.data_dir} of the embedded Kafka can't be used: {error}; choose another"
            ) from error
        if lock is not None:
            return lock
        record = storage.read_record(self.data_dir)
        who = f"pid {record.pid} at {HOST}:{record.port}" if record else "starting just now"
        raise DataDirInUseError(
            f"a broker runs on {self.data_dir} ({who}): use it, stop it with `orderflow kafka down --data "
            f"{self.data_dir}`, or choose another folder"
        )

    def _check_port(self) -> None:
        if port_is_free(self._port):
            return
        if not self._port_given:
            self._port = free_port()
            return
        known = " by a Kafka broker" if probe(HOST, self._port) else ""
        raise PortTakenError(
            f"port {self._port} of {HOST} is taken{known}: see by whom with `ss -ltnp 'sport = :{self._port}'` or "
            f"`lsof -nP -iTCP:{self._port} -sTCP:LISTEN`, then stop it, choose another port, or, to use that broker, set "
            f"KAFKA_BOOTSTRAP={HOST}:{self._port}"
        )

    def _wait_until_ready(
        self, process: BrokerProcess, cluster_id: str, log_start: int, deadline: float, timeout_sec: float
    ) -> None:
        node_id = NODE_ID if self._node is None else self._node.node_id
        while not process.exited.wait(POLL_SEC):
            answer = probe(HOST, self._port, PROBE_SEC)
            if answer is not None and answer.cluster_id == cluster_id and (node_id, HOST, self._port) in answer.brokers:
                return
            if time.monotonic() > deadline:
                raise EmbeddedKafkaError(
                    f"the embedded Kafka did not answer at {self.bootstrap} within {timeout_sec:g} s: give it longer, or "
                    f"look at {self.log_path}{_indented(self._last_words(log_start))}"
                )
        words = self._last_words(log_start)
        kind = _PortLostError if _PORT_LOST in words else EmbeddedKafkaError
        raise kind(
            f"the embedded Kafka ended at its start (exit code {process.exit_code}); the last lines of {self.log_path}:"
            f"{_indented(words)}"
        )

    def _last_words(self, log_start: int) -> str:
        """The end of what this very start wrote to the log, without Java's stack frames, which would crowd out causes."""
        with self.log_path.open("rb") as file:
            end = file.seek(0, os.SEEK_END)
            file.seek(max(log_start, end - LAST_WORDS_BYTES))
            lines = file.read().decode(errors="replace").splitlines()
        return "\n".join([line for line in lines if not line.startswith("\tat ")][-LAST_WORDS_LINES:])


def _indented(text: str) -> str:
    return "".join(f"\n  {line}" for line in text.splitlines())
