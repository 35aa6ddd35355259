"""Services that stand alone, started for a test and ended with it."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from orderflow.kafka_embedded.process import free_port
from orderflow.lifeline import dying_with_parent

from tests.waiting import wait_for

ROOT = Path(__file__).resolve().parents[1]
START_SEC = 120.0
STOP_SEC = 10.0


@contextmanager
def serving(service: str, *arguments: str) -> Iterator[int]:
    """A service that takes `--port`; its port."""
    port = free_port()
    process = subprocess.Popen(
        dying_with_parent([sys.executable, "-m", f"services.{service}", "--port", str(port), *arguments]),
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "libs")])},
        cwd=ROOT,
        stderr=subprocess.DEVNULL,
    )

    def answers() -> bool:
        assert process.poll() is None, f"{service} ended with {process.returncode}"
        socket.create_connection(("127.0.0.1", port), timeout=1).close()
        return True

    try:
        wait_for(answers, START_SEC, 0.05)
        yield port
    finally:
        process.terminate()
        process.wait(STOP_SEC)


@contextmanager
def registry(folder: Path) -> Iterator[str]:
    """A schema registry of its own over `folder`; its URL."""
    folder.mkdir(parents=True, exist_ok=True)
    with serving("registry", "--data", str(folder)) as port:
        yield f"http://127.0.0.1:{port}"
