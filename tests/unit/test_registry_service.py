"""The service as a process: start, SIGTERM, and the one line it says when it cannot start."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import socket
import sys
from contextlib import asynccontextmanager

import pytest
from orderflow.paths import ROOT
from orderflow.registry.client import RegistryClient

START_SEC = 150.0


async def start(*arguments, **environment):
    """The service as a child process, its log on a pipe."""
    return await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "services.registry", *map(str, arguments)),
        cwd=ROOT,
        env={**os.environ, **environment},
        stderr=asyncio.subprocess.PIPE,
    )


async def url_of(process):
    line = (await asyncio.wait_for(process.stderr.readline(), START_SEC)).decode()
    found = re.search(r"schema registry at (http://127\.0\.0\.1:\d+) over", line)
    assert found, line
    return found[1]


@asynccontextmanager
async def serving(folder):
    """A running service and a client of it; whatever happens, the process is gone afterwards."""
    process = await start("--port", 0, "--data", folder)
    try:
        async with RegistryClient(await url_of(process)) as client:
            yield process, client
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_serves_until_told_to_stop_and_keeps_everything(tmp_path, number):
    for expected in ([], ["x"]):
        async with serving(tmp_path) as (process, client):
            assert await client.subjects() == expected
            assert await client.register("x", '"string"') == 1
            process.send_signal(number)
            assert await asyncio.wait_for(process.wait(), 120) == 0


async def test_what_was_answered_survives_sigkill(tmp_path):
    async with serving(tmp_path) as (process, client):
        assert await client.register("x", '"string"') == 1
        process.kill()
        assert await process.wait() == -signal.SIGKILL
    async with serving(tmp_path) as (_, client):
        assert await client.subjects() == ["x"]


async def refused(*arguments, **environment):
    process = await start(*arguments, **environment)
    _, words = await asyncio.wait_for(process.communicate(), START_SEC)
    assert process.returncode == 2
    lines = words.decode().splitlines()
    assert len(lines) == 1, lines
    return lines[0]


async def test_a_start_that_fails_says_why_in_one_line(tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        said, by_environment, name, folder = await asyncio.gather(
            refused("--port", port, "--data", tmp_path / "a"),
            refused("--data", tmp_path / "b", SCHEMA_REGISTRY_PORT=port),
            refused("--data", tmp_path / "c", SCHEMA_REGISTRY_PORT="many"),
            refused("--port", 0, "--data", __file__),
        )
    assert f"127.0.0.1:{port} is taken by another process" in said
    assert f"127.0.0.1:{port} is taken by another process" in by_environment
    assert "SCHEMA_REGISTRY_PORT 'many' is not a port" in name
    assert "can't be used" in folder
