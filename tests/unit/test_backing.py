"""The broker and registry behind a run are its own, whoever has taken their ports since."""

from __future__ import annotations

from contextlib import AsyncExitStack
from pathlib import Path

import pytest
from orderflow.cli import backing
from orderflow.registry.client import RegistryClient


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


def test_a_port_with_nothing_or_something_else_behind_is_no_broker_of_ours(tmp_path: Path) -> None:
    assert not backing._is_broker_of(tmp_path / "missing", "127.0.0.1:9")
    (tmp_path / "meta.properties").write_text("version=1\ncluster.id=x\nnode.id=1\n")
    assert not backing._is_broker_of(tmp_path, "127.0.0.1:9")
