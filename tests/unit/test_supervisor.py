"""The supervisor of a run with real processes: which ends are final, and which are mended by a start."""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from orderflow.cli.supervisor import DEATHS_ALLOWED, Supervisor
from orderflow.errors import OrderflowError

WAIT_SEC = 300.0
PAGE = """
import json, os, sys, threading
from http.server import BaseHTTPRequestHandler, HTTPServer

class Page(BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.end_headers()
        self.wfile.write(sys.argv[2].encode())
        if os.path.exists(sys.argv[3]):
            threading.Thread(target=lambda: os._exit(int(sys.argv[1])), daemon=True).start()
    def log_message(self, *args):
        pass

server = HTTPServer(("127.0.0.1", 0), Page)
path = os.environ["STATUS_FILE"]
with open(path + ".new", "w") as file:
    json.dump({"pid": os.getpid(), "host": "127.0.0.1", "port": server.server_port}, file)
os.replace(path + ".new", path)
server.serve_forever()
"""
"""Answers its page, and ends with a code once it is asked while a file is there."""


@asynccontextmanager
async def supervisor(folder: Path) -> AsyncIterator[Supervisor]:
    made = Supervisor(folder)
    await made.open()
    try:
        yield made
    finally:
        await made.close()


async def eventually(made: Supervisor, condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + WAIT_SEC
    while not condition():
        assert time.monotonic() < deadline
        await made.ask()
        made.revive()
        await asyncio.sleep(0.02)


@pytest.mark.parametrize("code", [2, 3])
async def test_what_names_its_remedy_before_it_was_ready_is_final_at_once(tmp_path: Path, code: int) -> None:
    async with supervisor(tmp_path) as made:
        # However long it took: on a busy machine the start alone takes many seconds.
        script = f"import sys; print('SYMBOLS is empty', file=sys.stderr); sys.exit({code})"
        child = made.add("ofi", [sys.executable, "-c", script], {})
        child.started_at -= 1_000.0
        with pytest.raises(OrderflowError, match=rf"ofi ended with exit code {code}; its last words(?s:.*)SYMBOLS is"):
            await eventually(made, lambda: False)
        assert child.restarts == 0


async def test_a_page_that_is_not_ready_yet_changes_nothing(tmp_path: Path) -> None:
    async with supervisor(tmp_path) as made:
        go = tmp_path / "go"
        child = made.add("ofi", [sys.executable, "-c", PAGE, "2", '{"ready": false}', str(go)], {})
        await eventually(made, lambda: bool(child.status))
        go.touch()
        with pytest.raises(OrderflowError, match="exit code 2"):
            await eventually(made, lambda: False)
        assert child.restarts == 0


async def test_what_was_ready_once_is_started_again(tmp_path: Path) -> None:
    async with supervisor(tmp_path) as made:
        go = tmp_path / "go"
        child = made.add("ofi", [sys.executable, "-c", PAGE, "2", '{"ready": true}', str(go)], {})
        await eventually(made, lambda: bool(child.status))
        go.touch()
        await eventually(made, lambda: child.restarts == 1)
        go.unlink()
        await eventually(made, lambda: bool(child.status))
        assert child.words == ["exit code 2"]


async def test_what_keeps_dying_is_given_up(tmp_path: Path) -> None:
    async with supervisor(tmp_path) as made:
        child = made.add("ofi", [sys.executable, "-c", "raise SystemExit(1)"], {})
        with pytest.raises(OrderflowError, match=rf"{DEATHS_ALLOWED + 1} times within"):
            await eventually(made, lambda: False)
        assert child.restarts == DEATHS_ALLOWED
