"""The broker and registry behind a run are its own, whoever has taken their ports since."""

from __future__ import annotations

import signal
import subprocess
import sys
from contextlib import AsyncExitStack
from pathlib import Path

import pytest
from orderflow.cli import backing
from orderflow.registry.client import RegistryClient

from tests.waiting import wait_for


async def test_another_runs_registry_on_the_same_port_is_not_taken_for_ours(tmp_path: Path) -> None:
    schema = '{"type":"record","name":"R","fields":[{"name":"x","type":"int"}]}'
    async with AsyncExitStack() as first:
        url = await backing.ensure_registry(first, tmp_path / "first", f"http://127.0.0.1:{backing.free_port()}")
        client = RegistryClient(url)
        await client.register("only-here-value", schema)
        await client.close()
    async with AsyncExitStack() as others, AsyncExitStack() as ours:
        other_url = await backing.ensure_registry(others, tmp_path / "second", url)
        assert other_url == url, "the port of the one that has ended is free again"
        our_url = await backing.ensure_registry(ours, tmp_path / "first", url)
        assert our_url != other_url
        client = RegistryClient(our_url)
        assert await client.subjects() == ["only-here-value"]
        await client.close()
        assert await backing.ensure_registry(ours, tmp_path / "first", our_url) == our_url


async def test_a_port_that_is_taken_between_the_look_and_the_start_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    look = backing.free_port
    async with AsyncExitStack() as quicker, AsyncExitStack() as ours:
        taken = await backing.ensure_registry(quicker, tmp_path / "quicker")
        port = int(taken.rpartition(":")[2])
        monkeypatch.setattr(backing, "free_port", lambda preferred=0: port if preferred else look())
        url = await backing.ensure_registry(ours, tmp_path / "ours", f"http://127.0.0.1:{port}")
        assert url != taken


@pytest.mark.skipif(sys.platform != "linux", reason="only the Linux kernel ends a process with its parent")
def test_a_registry_ends_with_the_run_that_started_it_even_by_a_kill(tmp_path: Path) -> None:
    starter = (
        "import asyncio, os, signal, sys; from contextlib import AsyncExitStack; from pathlib import Path; "
        "from orderflow.cli import backing\n"
        "async def start():\n"
        "    async with AsyncExitStack() as stack:\n"
        "        print(await backing.ensure_registry(stack, Path(sys.argv[1])), flush=True)\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "asyncio.run(start())"
    )
    killed = subprocess.run(
        [sys.executable, "-c", starter, str(tmp_path)], capture_output=True, text=True, check=False, timeout=300
    )
    address = killed.stdout.strip().removeprefix("http://")
    assert killed.returncode == -signal.SIGKILL and address, killed.stderr
    assert wait_for(lambda: not backing.answers(address), 120.0)


def test_a_port_with_nothing_or_something_else_behind_is_no_broker_of_ours(tmp_path: Path) -> None:
    assert not backing._is_broker_of(tmp_path / "missing", "127.0.0.1:9")
    (tmp_path / "meta.properties").write_text("version=1\ncluster.id=x\nnode.id=1\n")
    assert not backing._is_broker_of(tmp_path, "127.0.0.1:9")
