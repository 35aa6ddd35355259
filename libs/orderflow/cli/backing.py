"""The broker and the registry behind a run: reached where they are up, started where they are not."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit

import aiohttp

from orderflow.errors import OrderflowError
from orderflow.kafka_embedded.process import free_port as any_free_port
from orderflow.lifeline import dying_with_parent
from orderflow.paths import ROOT

START_SEC: Final = 20.0
STOP_SEC: Final = 10.0
START_ATTEMPTS: Final = 3


def free_port(preferred: int = 0, host: str = "127.0.0.1") -> int:
    """`preferred` where it is free, else any port outside the range that clients are given."""
    if preferred:
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((host, preferred))
                return preferred
            except OSError:
                pass
    return any_free_port()


def answers(address: str) -> bool:
    """Whether something listens at host:port."""
    host, _, port = address.rpartition(":")
    try:
        with socket.create_connection((host, int(port)), timeout=1.0):
            return True
    except OSError:
        return False


def check_bootstrap(bootstrap: str) -> None:
    """That a broker named by KAFKA_BOOTSTRAP can be reached.

    Raises
    ------
    OrderflowError
        It is not a list of host:port, or nothing answers at any of them.
    """
    addresses = [address.strip() for address in bootstrap.split(",") if address.strip()]
    for address in addresses:
        host, _, port = address.rpartition(":")
        if not host or not port.isdecimal() or not 0 < int(port) < 65536:
            raise OrderflowError(
                f"KAFKA_BOOTSTRAP is {bootstrap!r}: it must be host:port, several joined by commas, as 127.0.0.1:9092"
            )
    if not any(answers(address) for address in addresses):
        raise OrderflowError(
            f"KAFKA_BOOTSTRAP is {bootstrap!r}, and nothing answers there: start that broker, or unset it to use the "
            "embedded one"
        )


async def check_registry(url: str) -> None:
    """That the registry named by SCHEMA_REGISTRY_URL answers.

    Raises
    ------
    OrderflowError
        It does not.
    """
    if not await _registry_answers(url):
        raise OrderflowError(
            f"SCHEMA_REGISTRY_URL is {url!r}, and no Schema Registry answers there: start it, or unset it to use the "
            "embedded one"
        )


async def ensure_kafka(stack: AsyncExitStack, data: Path, bootstrap: str = "") -> str:
    """A broker over `data`: the one that runs, or one started now and stopped with the stack."""
    ours: bool = await asyncio.to_thread(_is_broker_of, data, bootstrap)
    if ours:
        return bootstrap
    from orderflow.kafka_embedded import EmbeddedKafka, PortTakenError

    preferred = int(bootstrap.rpartition(":")[2]) if bootstrap else 9092
    for attempt in range(START_ATTEMPTS):
        broker = EmbeddedKafka(data, port=free_port(0 if attempt else preferred))
        # Before the start: one that is cancelled goes on in its thread, and must be stopped all the same.
        stack.push_async_callback(asyncio.to_thread, broker.stop)
        try:
            await asyncio.to_thread(broker.start)
            break
        except PortTakenError:  # somebody was quicker between the look and the start
            if attempt == START_ATTEMPTS - 1:
                raise
    address: str = broker.bootstrap
    return address


async def ensure_registry(stack: AsyncExitStack, data: Path, url: str = "") -> str:
    """A schema registry over `data`: the one that runs, or one started now and stopped with the stack."""
    if url and await _registry_answers(url, data):
        return url
    preferred = (urlsplit(url).port or 8081) if url else 8081
    for attempt in range(START_ATTEMPTS):
        port = free_port(0 if attempt else preferred)
        try:
            return await _start_registry(stack, data, port)
        except OrderflowError:
            # Somebody may have been quicker between the look and the start; whatever else it is comes again.
            if attempt == START_ATTEMPTS - 1:
                raise
    raise AssertionError("unreachable")  # pragma: no cover - the loop returns or raises


async def _start_registry(stack: AsyncExitStack, data: Path, port: int) -> str:
    url = f"http://127.0.0.1:{port}"
    data.mkdir(parents=True, exist_ok=True)
    log = (data / "registry.log").open("ab")
    process = subprocess.Popen(
        dying_with_parent([sys.executable, "-m", "services.registry", "--port", str(port), "--data", str(data)]),
        cwd=ROOT,
        stdout=log,
        stderr=subprocess.STDOUT,
        stdin=subprocess.DEVNULL,
        start_new_session=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    log.close()
    stack.push_async_callback(_stop, process)
    loop = asyncio.get_running_loop()
    deadline = loop.time() + START_SEC
    while not await _registry_answers(url, data):
        if process.poll() is not None or loop.time() > deadline:
            words = (data / "registry.log").read_text("utf-8", "replace").strip().splitlines()
            raise OrderflowError(f"the schema registry did not start at {url}: {words[-1] if words else 'no output'}")
        await asyncio.sleep(0.05)
    return url


def _is_broker_of(data: Path, bootstrap: str) -> bool:
    """Whether the broker at an address is the one of this folder: another run's may have taken the port since."""
    from orderflow.kafka_embedded import storage
    from orderflow.kafka_embedded.probe import probe

    if not bootstrap or not data.is_dir():
        return False
    host, _, port = bootstrap.rpartition(":")
    answer = probe(host, int(port))
    return answer is not None and answer.cluster_id == storage.cluster_id(data)


async def _registry_answers(url: str, data: Path | None = None) -> bool:
    """Whether a registry answers; with `data`, whether it is the one of this folder.

    Another run's may have taken the port since, and its ids would name other schemas.
    """
    path = "subjects" if data is None else "healthz"
    try:
        async with (
            aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=2)) as session,
            session.get(f"{url.rstrip('/')}/{path}") as answer,
        ):
            if data is None or answer.status != 200:
                return answer.status == 200
            folder: object = (await answer.json()).get("folder")
            return folder == str(data.resolve())
    except (aiohttp.ClientError, TimeoutError, ValueError, AttributeError):
        return False


async def _stop(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
        try:
            await asyncio.to_thread(process.wait, STOP_SEC)
        except subprocess.TimeoutExpired:
            process.kill()
            await asyncio.to_thread(process.wait)
