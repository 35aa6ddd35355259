"""Keeps the service processes of a run alive, asks them how they are, and drains them in order."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import signal
import subprocess
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import aiohttp

from orderflow.errors import OrderflowError
from orderflow.lifeline import dying_with_parent
from orderflow.paths import ROOT

logger = logging.getLogger(__name__)

DEATHS_ALLOWED: Final = 5
DEATHS_WINDOW_SEC: Final = 60.0
STALL_SEC: Final = 90.0
"""A drain that makes no progress for this long has failed."""
STOP_SEC: Final = 15.0
FINAL_EXITS: Final = frozenset({2, 3})
"""Exit codes of a service that no restart can help where it has never been ready: wrong setting, fenced."""
LAST_WORDS_LINES: Final = 5


@dataclass(slots=True)
class Child:
    """One service process and what became of its predecessors."""

    name: str
    command: list[str]
    environment: dict[str, str]
    log_path: Path
    status_path: Path
    process: subprocess.Popen[bytes] | None = None
    restarts: int = 0
    deaths: deque[float] = field(default_factory=deque)
    started_at: float = 0.0
    retry_at: float = 0.0
    expected_to_run: bool = False
    status: dict[str, Any] = field(default_factory=dict)
    was_ready: bool = False
    """At any time, in any of its processes."""
    exit_code: int | None = None
    words: list[str] = field(default_factory=list)

    @property
    def running(self) -> bool:
        return self.process is not None and self.process.poll() is None

    def start(self) -> None:
        self.status_path.unlink(missing_ok=True)
        self.status = {}
        with self.log_path.open("ab") as log:
            self.process = subprocess.Popen(
                # A supervisor that is killed leaves nothing behind.
                dying_with_parent(self.command),
                cwd=ROOT,
                env={**os.environ, "PYTHONPATH": str(ROOT), **self.environment, "STATUS_FILE": str(self.status_path)},
                stdout=log,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
            )
        self.started_at = time.monotonic()
        self.expected_to_run = True

    def last_words(self) -> str:
        """The end of its log, for a person."""
        try:
            lines = self.log_path.read_text("utf-8", "replace").strip().splitlines()
        except OSError:
            return "(no log)"
        return "\n".join(_readable(line) for line in lines[-LAST_WORDS_LINES:]) or "(silent)"


def _readable(line: str) -> str:
    try:
        content = json.loads(line)
        return f"{content['level']} {content['message']}"
    except (ValueError, KeyError, TypeError):
        return line


class Supervisor:
    """The processes of a run."""

    def __init__(self, out: Path) -> None:
        self.children: dict[str, Child] = {}
        self._out = out
        self._http: aiohttp.ClientSession | None = None
        (out / "logs").mkdir(parents=True, exist_ok=True)
        (out / "status").mkdir(parents=True, exist_ok=True)

    def add(self, name: str, command: Sequence[str], environment: Mapping[str, str]) -> Child:
        """Start a process under supervision."""
        child = Child(
            name,
            list(command),
            dict(environment),
            self._out / "logs" / f"{name}.log",
            self._out / "status" / f"{name}.json",
        )
        child.start()
        self.children[name] = child
        return child

    async def open(self) -> None:
        self._http = aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=2))

    def revive(self) -> None:
        """Restart what has died.

        Raises
        ------
        OrderflowError
            A service keeps dying, or refuses its settings; with its last words.
        """
        now = time.monotonic()
        for child in self.children.values():
            if not child.expected_to_run or child.running:
                continue
            assert child.process is not None
            if child.retry_at == 0.0:
                self._bury(child, now)
            if now >= child.retry_at:
                child.retry_at = 0.0
                child.restarts += 1
                child.start()

    def _bury(self, child: Child, now: float) -> None:
        assert child.process is not None
        code = child.exit_code = child.process.returncode
        cause = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        child.words.append(cause)
        child.deaths.append(now)
        while child.deaths and child.deaths[0] < now - DEATHS_WINDOW_SEC:
            child.deaths.popleft()
        hopeless = code in FINAL_EXITS and not child.was_ready
        if hopeless or len(child.deaths) > DEATHS_ALLOWED:
            child.expected_to_run = False
            raise OrderflowError(
                f"service {child.name} ended with {cause}"
                + ("" if hopeless else f", {len(child.deaths)} times within {DEATHS_WINDOW_SEC:g} s")
                + f"; its last words ({child.log_path}):\n{child.last_words()}"
            )
        # The first restart is at once; one that dies again and again waits longer each time.
        child.retry_at = now + min(5.0, 0.2 * (2 ** (len(child.deaths) - 1) - 1)) + 1e-9

    async def ask(self) -> None:
        """Refresh every child's status from its page."""
        await asyncio.gather(*(self._ask(child) for child in self.children.values() if child.running))

    async def _ask(self, child: Child) -> None:
        assert self._http is not None
        try:
            address = json.loads(child.status_path.read_text("utf-8"))
            if child.process is None or address["pid"] != child.process.pid:
                return
            async with self._http.get(f"http://{address['host']}:{address['port']}/status") as answer:
                child.status = await answer.json()
                child.was_ready = child.was_ready or bool(child.status.get("ready"))
        except (OSError, ValueError, KeyError, aiohttp.ClientError, TimeoutError):
            return

    async def wait_until(
        self, condition: Callable[[], bool], what: str, progress: Callable[[], Any], stall_sec: float = STALL_SEC
    ) -> None:
        """Supervise until a condition holds.

        Raises
        ------
        OrderflowError
            Nothing moved for `stall_sec`; names what was waited for.
        """
        last = progress()
        moved_at = time.monotonic()
        while True:
            self.revive()
            await self.ask()
            if condition():
                return
            now = progress()
            if now != last:
                last, moved_at = now, time.monotonic()
            elif time.monotonic() - moved_at > stall_sec:
                raise OrderflowError(
                    f"no progress for {stall_sec:g} s while waiting for {what}; logs: {self._out / 'logs'}"
                )
            await asyncio.sleep(0.1)

    def signal(self, name: str, number: signal.Signals) -> None:
        child = self.children[name]
        if child.running and child.process is not None:
            child.process.send_signal(number)

    async def stop(self, names: Sequence[str]) -> None:
        """SIGTERM, a bounded wait, then SIGKILL."""
        for name in names:
            self.children[name].expected_to_run = False
            self.signal(name, signal.SIGTERM)
        for name in names:
            process = self.children[name].process
            if process is None:
                continue
            try:
                await asyncio.to_thread(process.wait, STOP_SEC)
            except subprocess.TimeoutExpired:
                logger.warning("service %s did not stop within %g s and was killed", name, STOP_SEC)
                process.kill()
                await asyncio.to_thread(process.wait)
            self.children[name].exit_code = process.returncode

    async def close(self) -> None:
        """End whatever still runs."""
        await self.stop([name for name, child in self.children.items() if child.running])
        if self._http is not None:
            await self._http.close()
