"""The broker's process: started so that it dies with its starter or outlives it, and told apart from others."""

from __future__ import annotations

import logging
import os
import random
import signal
import socket
import subprocess
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from orderflow.kafka_embedded.java import JavaRuntime
from orderflow.kafka_embedded.storage import HOST, SETTINGS, TMP_DIR, class_path
from orderflow.lifeline import dying_with_parent

logger = logging.getLogger(__name__)

UNSAFE_MEMORY_OPTION_SINCE: Final = 24
PROC: Final = Path("/proc")
"""Where it is missing (macOS), `ps` is asked instead."""
PS_TIMEOUT_SEC: Final = 5.0
PORTS_LOW: Final = 10_240
PORTS_SPAN: Final = 16_384
PORT_ATTEMPTS: Final = 64


class BrokerProcess:
    """A started broker. A thread of its own starts it and waits for it until it ends.

    The kernel takes the end of the *thread* that started a process for the end of the parent, so that thread has to live
    as long as the broker does; a worker of a pool would not.
    """

    def __init__(self, command: Sequence[str], cwd: Path, log: Path, lock: int, survive_parent: bool) -> None:
        self.exited = threading.Event()
        self._started = threading.Event()
        self._process: subprocess.Popen[bytes] | None = None
        self._error: OSError | None = None
        launch = list(command) if survive_parent else dying_with_parent(command)
        threading.Thread(target=self._host, args=(launch, cwd, log, lock), name="kafka-broker", daemon=True).start()
        self._started.wait()
        if self._error is not None:
            raise self._error

    def _host(self, command: list[str], cwd: Path, log: Path, lock: int) -> None:
        try:
            self._process = _spawn(command, cwd, log, lock)
        except OSError as error:
            self._error = error
            self.exited.set()
            return
        finally:
            self._started.set()
        self._process.wait()
        self.exited.set()

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    @property
    def exit_code(self) -> int | None:
        """None while it runs; negative for a signal."""
        return self._process.returncode if self._process is not None and self.exited.is_set() else None

    def terminate(self) -> None:
        self._signal(signal.SIGTERM)

    def kill(self) -> None:
        self._signal(signal.SIGKILL)

    def _signal(self, number: int) -> None:
        if self._process is not None and not self.exited.is_set():
            self._process.send_signal(number)


def _spawn(command: list[str], cwd: Path, log: Path, lock: int) -> subprocess.Popen[bytes]:
    with log.open("ab") as output:
        return subprocess.Popen(
            command,
            cwd=cwd,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            env={**os.environ, "LC_ALL": "C.UTF-8"},  # in the C locale Java can't take a path with an umlaut
            pass_fds=(lock,),
            start_new_session=True,  # Ctrl-C at the terminal is for the starter, which stops the broker last
        )


def broker_command(java: JavaRuntime, jars: Sequence[Path], data_dir: Path, heap_mb: int) -> list[str]:
    """The command line of a broker whose working directory is `data_dir`."""
    options = [
        f"-Xmx{heap_mb}m",
        "-XX:+UseSerialGC",
        "-XX:TieredStopAtLevel=1",
        "-XX:-UsePerfData",
        "-XX:+ExitOnOutOfMemoryError",  # a broker that limps on is worse than one that its supervisor restarts
        "-Djava.awt.headless=true",
        f"-Djava.io.tmpdir={TMP_DIR}",
        "-Dorg.slf4j.simpleLogger.defaultLogLevel=warn",
        "-Dorg.slf4j.simpleLogger.showDateTime=true",
        "-Dorg.slf4j.simpleLogger.dateTimeFormat=yyyy-MM-dd'T'HH:mm:ss.SSSZ",
        "--enable-native-access=ALL-UNNAMED",
        _marker(data_dir),
    ]
    if java.major >= UNSAFE_MEMORY_OPTION_SINCE:
        options.append("--sun-misc-unsafe-memory-access=allow")
    return [str(java.path), *options, "-cp", class_path(jars), "kafka.Kafka", SETTINGS]


def _marker(data_dir: Path) -> str:
    return f"-Dorderflow.kafka.data={data_dir}"


def is_broker_of(pid: int, data_dir: Path) -> bool:
    """Whether this process is the broker of this folder: a pid alone may have passed to another program."""
    marker = _marker(data_dir)
    if (PROC / "self").exists():
        try:
            return os.fsencode(marker) in (PROC / str(pid) / "cmdline").read_bytes().split(b"\0")
        except OSError:
            return False
    try:
        result = subprocess.run(
            ["ps", "-ww", "-o", "command=", "-p", str(pid)], capture_output=True, timeout=PS_TIMEOUT_SEC, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return False
    return os.fsencode(f"{marker} ") in result.stdout


def port_is_free(port: int) -> bool:
    """Whether a listener could bind this port of the loopback address now."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
            probe.listen(1)
        except OSError:
            return False
        return True


def free_port(avoid: int = 0) -> int:
    """A free port of the loopback address below the range that outgoing connections take their ports from.

    Within that range a client that retries while the broker is down may be given the broker's own port, connect to
    itself, and keep the broker from ever coming back.
    """
    low = _ephemeral_low()
    if low > PORTS_LOW + 1024:
        for _ in range(PORT_ATTEMPTS):
            port = random.randrange(max(PORTS_LOW, low - PORTS_SPAN), low)
            if port != avoid and port_is_free(port):
                return port
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        ephemeral: int = probe.getsockname()[1]
    return ephemeral


def _ephemeral_low() -> int:
    try:
        return int((PROC / "sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    except (OSError, ValueError, IndexError):
        return 32_768
