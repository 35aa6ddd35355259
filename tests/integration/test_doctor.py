"""`orderflow doctor` among things that are really wrong: ports, broker, topics, registry, schemas, clocks, the exchange."""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import socket
import struct
import subprocess
import sys
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from aiokafka.admin import AIOKafkaAdminClient, NewTopic
from orderflow.cli import doctor
from orderflow.cli.backing import free_port
from orderflow.doctor import backing, exchange, machine
from orderflow.doctor.check import Check
from orderflow.paths import ROOT
from orderflow.registry.client import RegistryClient, value_subject
from orderflow.registry.server import RegistryServer
from orderflow.streaming.init import create_topics, register_schemas, set_compatibility, topic_settings
from orderflow.topics import TOPICS
from orderflow.venues.binance.endpoints import Endpoints
from orderflow.venues.binance.sim.faults import FaultPlan, parse_faults
from orderflow.venues.binance.sim.market import SyntheticConfig
from orderflow.venues.binance.sim.server import ServerOptions, SimExchange
from orderflow.venues.binance.sim.synthetic import SyntheticSource

PATIENCE_SEC = 10.0
SHORT_SEC = 1.0
"""For what never comes."""
SYMBOLS = ("BTCUSDT", "ETHUSDT")


def judged(check: Check, outcome: str, *words: str) -> None:
    """Of this outcome, with these words in what was found or in the remedy; what is not ok has a remedy."""
    text = f"{check.found} | {check.remedy}"
    assert check.outcome == outcome, check
    assert [word for word in words if word not in text] == [], text
    assert bool(check.remedy) == (outcome != "ok"), check


# -- this machine -----------------------------------------------------------------------------------------------------


def test_packages_that_are_not_as_pinned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    judged(machine.python(), "ok")
    folder = tmp_path / "infra" / "requirements"
    folder.mkdir(parents=True)
    (folder / "run.txt").write_text(
        "msgspec==0.0.1 \\\n  --hash=x\nelsewhere==1 ; sys_platform == 'x' \\\nnowhere==2.0 \\\n", "utf-8"
    )
    monkeypatch.setattr(machine, "ROOT", tmp_path)
    judged(machine.python(), "warning", "(pinned 0.0.1)", "nowhere missing", "make clean setup")


def test_java_and_jars_are_asked_for_where_the_broker_is_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ORDERFLOW_CACHE", str(tmp_path))
    judged(machine.java(True), "ok")
    judged(machine.jars(True), "warning", "missing", str(tmp_path), "Maven Central")
    judged(machine.jars(False), "ok", "not needed")


def test_a_folder_that_can_not_be_written(tmp_path: Path) -> None:
    judged(machine.disk(tmp_path / "data" / "not" / "there"), "ok", "GiB free")
    judged(machine.disk(Path("/proc/orderflow")), "wrong", "/proc can't be written", "DATA_DIR")


def test_a_disk_that_is_nearly_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "DISK_WARNING_BYTES", 1 << 60)
    judged(machine.disk(tmp_path), "warning", "GiB free", "DATA_DIR")
    monkeypatch.setattr(machine, "DISK_WRONG_BYTES", 1 << 60)
    judged(machine.disk(tmp_path), "wrong", "GiB free")


async def test_ports_that_others_have(tmp_path: Path) -> None:
    environment = {name: str(free_port()) for name, *_ in machine.PORTS}
    judged(await machine.ports(environment, SHORT_SEC), "ok", "free")
    async with RegistryServer(tmp_path, 0) as registry, stranger() as address:
        own = registry.url.rpartition(":")[2]
        environment |= {"SCHEMA_REGISTRY_PORT": own}
        judged(await machine.ports(environment, PATIENCE_SEC), "ok", f"{own} a Schema Registry")
        environment |= {"PROMETHEUS_PORT": address.rpartition(":")[2]}
        judged(await machine.ports(environment, SHORT_SEC), "warning", "is not Prometheus", "set PROMETHEUS_PORT")
    judged(await machine.ports({"KAFKA_PORT": "kafka"}, SHORT_SEC), "wrong", "KAFKA_PORT is 'kafka'", "65535")


@asynccontextmanager
async def stranger(answer: bytes = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nhi") -> AsyncIterator[str]:
    """Something that listens, and is not what is looked for: its address."""

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(1024)
        writer.write(answer)
        writer.close()

    async with await asyncio.start_server(talk, "127.0.0.1", 0) as server:
        yield f"127.0.0.1:{server.sockets[0].getsockname()[1]}"


# -- broker and topics ------------------------------------------------------------------------------------------------


async def test_brokers_that_are_none() -> None:
    nobody = f"127.0.0.1:{free_port()}"
    judged(await backing.broker(nobody, True, SHORT_SEC), "wrong", nobody, "docker compose up")
    judged(await backing.broker(nobody, False, SHORT_SEC), "warning", nobody)
    judged(await backing.broker("kafka", True, SHORT_SEC), "wrong", "KAFKA_BOOTSTRAP is 'kafka'", "host:port")
    async with stranger() as address:
        judged(await backing.broker(address, True, SHORT_SEC), "wrong", "no Kafka", address)


async def test_a_broker_that_sends_its_clients_astray() -> None:
    """What a container's broker does that advertises a name of its own network."""
    port = free_port()
    host = b"127.0.0.1"
    brokers = struct.pack(">iih", 1, 1, len(host)) + host + struct.pack(">ih", port, -1)
    body = struct.pack(">ii", 1, 0) + brokers + struct.pack(">hii", -1, 1, 0)
    async with stranger(struct.pack(">i", len(body)) + body) as address:
        found = await backing.broker(address, True, SHORT_SEC)
    judged(found, "wrong", f"sends clients to 127.0.0.1:{port}", "advertised.listeners")


@pytest.mark.kafka
async def test_topics_that_are_not_as_they_must_be(kafka_bootstrap: str) -> None:
    prefix = f"doctor-{uuid.uuid4().hex[:8]}."
    judged(await backing.broker(kafka_bootstrap, True, PATIENCE_SEC), "ok", kafka_bootstrap)
    (none,) = await backing.topics(kafka_bootstrap, prefix, PATIENCE_SEC)
    judged(none, "warning", prefix)
    await create_topics(kafka_bootstrap, prefix)
    for check in await backing.topics(kafka_bootstrap, prefix, PATIENCE_SEC):
        judged(check, "ok")
    (elsewhere,) = await backing.topics(kafka_bootstrap, f"{prefix}x.", PATIENCE_SEC)
    judged(elsewhere, "warning", "TOPIC_PREFIX")

    async with administrator(kafka_bootstrap) as admin:
        signals = f"{prefix}signals"
        await admin.delete_topics([signals])
        await once_told(admin, signals, there=False)
        missing, *_ = await backing.topics(kafka_bootstrap, prefix, PATIENCE_SEC)
        judged(missing, "wrong", f"missing: {signals}", "orderflow init")
        await admin.create_topics([NewTopic(signals, num_partitions=3, replication_factor=1)])
        await once_told(admin, signals, there=True)
        differing, *_ = await backing.topics(kafka_bootstrap, prefix, PATIENCE_SEC)
        judged(differing, "wrong", f"{signals} has 3, not", "astray")


@pytest.mark.kafka
@pytest.mark.parametrize(
    ("setting", "value", "outcome"),
    [
        ("retention.ms", "1000", "warning"),
        ("cleanup.policy", "compact", "wrong"),
        ("max.message.bytes", "1000", "wrong"),
        ("max.message.bytes", "100000000", "ok"),
    ],
)
async def test_settings_of_topics(kafka_bootstrap: str, setting: str, value: str, outcome: str) -> None:
    prefix = f"doctor-{uuid.uuid4().hex[:8]}."
    journal = next(topic for topic in TOPICS if topic.name == "market.journal")
    settings = {**topic_settings(journal), setting: value}
    async with administrator(kafka_bootstrap) as admin:
        topic = NewTopic(f"{prefix}{journal.name}", journal.partitions, 1, topic_configs=settings)
        await admin.create_topics([topic])
    await create_topics(kafka_bootstrap, prefix)
    *_, found = await backing.topics(kafka_bootstrap, prefix, PATIENCE_SEC)
    judged(found, outcome, *([f"{setting}={value}", "kafka-configs.sh"] if outcome != "ok" else []))


@asynccontextmanager
async def administrator(bootstrap: str) -> AsyncIterator[AIOKafkaAdminClient]:
    admin = AIOKafkaAdminClient(bootstrap_servers=bootstrap)
    await admin.start()
    try:
        yield admin
    finally:
        await admin.close()


async def once_told(admin: AIOKafkaAdminClient, topic: str, there: bool) -> None:
    """Wait until the broker's list has a topic, or has it no more."""
    async with asyncio.timeout(150):
        while (topic in await admin.list_topics()) is not there:
            await asyncio.sleep(0.05)


# -- registry and schemas ---------------------------------------------------------------------------------------------


async def test_registries_that_are_none() -> None:
    nobody = f"http://127.0.0.1:{free_port()}"
    judged(await backing.registry(nobody, True, SHORT_SEC), "wrong", nobody, "SCHEMA_REGISTRY_URL")
    judged(await backing.registry(nobody, False, SHORT_SEC), "warning", nobody)
    async with stranger() as address:
        judged(await backing.registry(f"http://{address}", True, PATIENCE_SEC), "wrong", address)


async def test_a_registry_that_would_take_anything(tmp_path: Path) -> None:
    async with RegistryServer(tmp_path, 0) as server:
        client = RegistryClient(server.url)
        await client.set_compatibility("NONE")
        judged(
            await backing.registry(server.url, True, PATIENCE_SEC), "warning", "compatibility NONE", "orderflow init"
        )
        await set_compatibility(client)
        judged(await backing.registry(server.url, True, PATIENCE_SEC), "ok", "BACKWARD_TRANSITIVE")
        await client.close()


async def test_schemas_that_are_not_ours(tmp_path: Path) -> None:
    async with RegistryServer(tmp_path, 0) as server:
        client = RegistryClient(server.url)
        await client.set_compatibility("NONE")
        judged(await backing.schemas(server.url, "", PATIENCE_SEC), "warning", "not registered", "orderflow init")
        await register_schemas(client, "")
        judged(await backing.schemas(server.url, "", PATIENCE_SEC), "ok")
        subject = value_subject("signals")
        registered = json.loads((await client.latest(subject)).schema)
        older = {**registered, "fields": registered["fields"][:-1]}
        await client.register(subject, json.dumps(older))
        await set_compatibility(client)
        found = await backing.schemas(server.url, "", PATIENCE_SEC)
        judged(found, "warning", "another version", subject)
        await client.set_compatibility("NONE")
        foreign = {
            "type": "record",
            "name": registered["name"],
            "namespace": registered.get("namespace", ""),
            "fields": [
                {"name": "nothing_of_ours", "type": "long"},
            ],
        }
        await client.register(subject, json.dumps(foreign))
        await set_compatibility(client)
        judged(await backing.schemas(server.url, "", PATIENCE_SEC), "wrong", "not compatible", subject, "TOPIC_PREFIX")
        await client.close()


# -- the exchange -----------------------------------------------------------------------------------------------------


@asynccontextmanager
async def simulated(faults: str = "") -> AsyncIterator[Endpoints]:
    plan = FaultPlan(faults=parse_faults(faults)) if faults else FaultPlan()
    source = SyntheticSource(1, SYMBOLS, config=SyntheticConfig(activity=50.0))
    async with SimExchange(source, ServerOptions(faults=plan)) as server:
        yield Endpoints(ws_url=server.ws_url, rest_url=server.url)


async def test_an_exchange_that_is_well() -> None:
    async with simulated() as endpoints:
        judged(await exchange.rest(endpoints, SYMBOLS, PATIENCE_SEC), "ok", endpoints.rest_url)
        judged(await exchange.clock(endpoints, PATIENCE_SEC), "ok", "ms against the exchange")
        for check in await exchange.sockets(endpoints, "BTCUSDT", PATIENCE_SEC):
            judged(check, "ok", "btcusdt@")
        judged(await exchange.rest(endpoints, ("BTCUSDT", "NOSUCH"), PATIENCE_SEC), "wrong", "NOSUCH", "SYMBOLS")


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("rest_418@0s+60s", ("418", "asked too much")),
        ("rest_429@0s+60s", ("429", "asked too much")),
        ("rest_451@0s+60s", ("451", "does not serve this address")),
        ("rest_503@0s+60s", ("503", "try again later")),
    ],
)
async def test_an_exchange_that_refuses(fault: str, words: tuple[str, ...]) -> None:
    async with simulated(fault) as endpoints:
        judged(await exchange.rest(endpoints, SYMBOLS, PATIENCE_SEC), "wrong", *words)
        judged(await exchange.clock(endpoints, PATIENCE_SEC), "wrong", *words)


async def test_an_exchange_that_does_not_answer() -> None:
    async with simulated("rest_timeout@0s+60s") as endpoints:
        judged(await exchange.rest(endpoints, SYMBOLS, SHORT_SEC), "wrong", "no answer within 1 s", "firewall")
    nobody = Endpoints(ws_url=f"ws://127.0.0.1:{free_port()}", rest_url=f"http://127.0.0.1:{free_port()}")
    judged(await exchange.rest(nobody, SYMBOLS, SHORT_SEC), "wrong", "REST_URL")
    for check in await exchange.sockets(nobody, "BTCUSDT", SHORT_SEC):
        judged(check, "wrong", nobody.ws_url, "WSS_URL")


@pytest.mark.parametrize("jump_ms", [-5000, 5000])
async def test_a_clock_that_is_off(jump_ms: int) -> None:
    async with simulated(f"clock_jump@0s+60s:value={jump_ms}") as endpoints:
        check = await exchange.clock(endpoints, PATIENCE_SEC)
    judged(check, "wrong", "against the exchange", "NTP")
    assert abs(float(check.found.split()[0]) + jump_ms) < 1000


async def test_routes_that_deliver_nothing() -> None:
    """Both are acknowledged, and say nothing: a stalled route, and a path that is none of the exchange's routes."""
    async with simulated("stall_route@0s+60s:route=market") as endpoints:
        public, market = sorted(
            await exchange.sockets(endpoints, "BTCUSDT", 3 * SHORT_SEC), key=lambda check: "market" in check.name
        )
    judged(public, "ok")
    judged(market, "wrong", "no data of BTCUSDT", "a wrong route is acknowledged")
    async with simulated("refuse_connect@0s+60s:route=public,value=503") as endpoints:
        checks = {check.name: check for check in await exchange.sockets(endpoints, "BTCUSDT", PATIENCE_SEC)}
    judged(checks["exchange: /public"], "wrong", "503")
    judged(checks["exchange: /market"], "ok")


async def test_a_stream_that_is_silent() -> None:
    async with simulated("silent_stream@0s+60s:stream=depth") as endpoints:
        checks = {check.name: check for check in await exchange.sockets(endpoints, "BTCUSDT", 3 * SHORT_SEC)}
    judged(checks["exchange: /public"], "warning", "btcusdt@depth", "--timeout 60")


# -- the command ------------------------------------------------------------------------------------------------------


def command(*arguments: str, **environment: str) -> tuple[int, str, str]:
    """Exit status and output; of the environment only what is given."""
    plain = {name: os.environ[name] for name in ("PATH", "HOME", "TMPDIR") if name in os.environ}
    done = subprocess.run(
        [sys.executable, "-m", "orderflow.cli.main", "doctor", "--timeout", "3", *arguments],
        env={**plain, "PYTHONPATH": str(ROOT / "libs"), **environment},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    return done.returncode, done.stdout, done.stderr


def outcomes(output: str) -> dict[str, str]:
    return {check["name"]: check["outcome"] for check in json.loads(output)["checks"]}


def test_json_and_exit_status(tmp_path: Path) -> None:
    nobody = f"127.0.0.1:{free_port()}"
    status, output, _ = command("--no-exchange", "--json", KAFKA_BOOTSTRAP=nobody, DATA_DIR=str(tmp_path))
    content = json.loads(output)
    assert (status, content["ok"]) == (1, False)
    (broker,) = [check for check in content["checks"] if check["name"] == "broker"]
    assert broker["outcome"] == "wrong" and nobody in broker["found"] and broker["remedy"]
    assert not any(check["name"].startswith("exchange") for check in content["checks"])


def test_a_broker_that_nobody_has_named_is_only_missed(tmp_path: Path) -> None:
    status, output, _ = command(
        "--no-exchange", "--json", DATA_DIR=str(tmp_path), ORDERFLOW_CACHE=str(tmp_path), SCHEMA_REGISTRY_URL=""
    )
    assert outcomes(output)["broker"] in ("warning", "ok")
    assert status == 0, output


def test_a_wrong_setting_is_told_and_the_rest_left_out() -> None:
    status, output, _ = command("--no-exchange", Z_MODE="nope")
    assert status == 1
    assert "WRONG" in output and "Z_MODE=nope" in output and "broker" not in output


def test_a_run_that_is_none(tmp_path: Path) -> None:
    status, output, errors = command("--run", str(tmp_path))
    assert status != 0
    assert str(tmp_path) in output + errors and "Traceback" not in errors


@pytest.mark.parametrize("timeout", ["0", "nan", "inf", "-1"])
def test_a_patience_that_is_none(timeout: str) -> None:
    status, _, errors = command("--timeout", timeout)
    assert status != 0
    assert "--timeout" in errors and "Traceback" not in errors


async def test_live_data_need_the_exchange_and_others_do_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WSS_URL", "REST_URL"):
        scheme = "ws" if name == "WSS_URL" else "http"
        monkeypatch.setenv(name, f"{scheme}://127.0.0.1:{free_port()}")
    for name, value in (
        ("KAFKA_BOOTSTRAP", f"127.0.0.1:{free_port()}"),
        ("DATA_DIR", str(tmp_path)),
        ("SOURCE", "sim"),
    ):
        monkeypatch.setenv(name, value)
    args = argparse.Namespace(run=None, prefix=None, no_exchange=False, timeout=SHORT_SEC, json=False)
    checks: dict[str, Any] = {check.name: check for check in await doctor.examine(args)}
    judged(checks["exchange: REST"], "wrong", "REST_URL")
    monkeypatch.delenv("WSS_URL")
    monkeypatch.delenv("REST_URL")
    monkeypatch.setenv("SOURCE", "sim")
    patient = doctor._patient(args)
    assert not patient.endpoint_named and patient.source == "sim" and patient.kafka_named


async def test_the_exchange_that_would_be_chosen_is_looked_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("SOURCE", "auto"), ("SYMBOLS", "BTCUSDT"), ("DATA_DIR", str(tmp_path))):
        monkeypatch.setenv(name, value)
    args = argparse.Namespace(run=None, prefix=None, no_exchange=False, timeout=PATIENCE_SEC, json=False)
    async with simulated() as endpoints:
        monkeypatch.setenv("SIM_ADDRESS", endpoints.rest_url.removeprefix("http://"))
        checks = await doctor._exchange(doctor._patient(args), PATIENCE_SEC)
    assert [check.outcome for check in checks] == ["ok"] * 4, checks
    assert endpoints.rest_url in checks[0].found
    async with stranger() as address:
        monkeypatch.setenv("SIM_ADDRESS", address)
        (refused,) = await doctor._exchange(doctor._patient(args), PATIENCE_SEC)
    judged(refused, "wrong", "no simulated exchange", "SOURCE=sim")


def test_the_text_fits_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    long = "word " * 60
    doctor._show([Check(name="broker", outcome="wrong", found=long, remedy=long)])
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= doctor.WIDTH
    assert "".join(lines).count("word") == 120
    assert lines[-1] == "0 ok, 0 warnings, 1 wrong"


def test_nothing_is_left_behind(tmp_path: Path) -> None:
    """It looks, and changes nothing."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        command("--no-exchange", KAFKA_BOOTSTRAP=f"127.0.0.1:{taken.getsockname()[1]}", DATA_DIR=str(tmp_path / "data"))
    assert list(tmp_path.iterdir()) == []
