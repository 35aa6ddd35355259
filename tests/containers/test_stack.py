"""The whole system in containers, from a fresh copy of the tree: one stack, taken through what happens to a stack.

The tests stand in their order, each on what the one before left. Times are printed at the end, not judged: they are the
machine's. `make containers`; skipped where no Docker engine answers.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from orderflow.registry.client import IncompatibleSchemaError, RegistryClient

from tests.chaos.verifier import verify
from tests.containers.stack import (
    PARTITIONS,
    ROOT,
    SERVICES,
    UP_SEC,
    Stack,
    docker,
    engine_answers,
    health_of,
    service_of,
    stack,
)

pytestmark = [
    pytest.mark.containers,
    pytest.mark.timeout(2 * UP_SEC),
    pytest.mark.skipif(bool(reason := engine_answers()), reason=reason or "-"),
]

FOREVER = {"kafka", "karapace", "simexchange", *SERVICES, "prometheus", "alertmanager", "grafana"}
NOT_KARAPACE = (
    "test_client_calls",
    "test_incompatible_change_is_refused_by_both_clients",
    "test_configuration_and_errors",
)
"""Calls of Confluent's client that Karapace lacks or answers with another code; nothing of ours makes them."""
OURS = ("init", "simexchange", *SERVICES)


@pytest.fixture(scope="module")
def system(tmp_path_factory: pytest.TempPathFactory, pytestconfig: pytest.Config) -> Iterator[Stack]:
    with stack(tmp_path_factory.mktemp("stack")) as made:
        try:
            yield made
        finally:
            capture = pytestconfig.pluginmanager.getplugin("capturemanager")
            with capture.global_and_fixture_disabled():
                print("\n" + "\n".join(f"{what:52} {figure}" for what, figure in made.figures.items()))


def healthy(system: Stack) -> set[str]:
    return {service_of(each) for each in system.containers() if health_of(each) == "healthy"}


def test_comes_up_healthy_from_a_fresh_clone(system: Stack) -> None:
    with system.timed("docker compose build"):
        system.ok("build")
    with system.timed("docker compose --profile sim up --build --wait"):
        system.ok("up", "--build", "--detach", "--wait")
    assert healthy(system) == FOREVER
    system.figures["first signal after that"] = f"{system.until_at_work('signal', 'after the start'):.1f} s"
    logs = system.ok("logs", *OURS).stdout
    assert "the simulated exchange answers at simexchange:9443" in logs
    assert '"level": "ERROR"' not in logs and "can't be written" not in logs
    for each in system.containers():
        assert each["RestartCount"] == 0, each["Name"]


def test_our_containers_can_do_little(system: Stack) -> None:
    for name in OURS:
        found = system.container(name)
        host = found["HostConfig"]
        assert found["Config"]["User"] == "10001:10001", name
        assert host["ReadonlyRootfs"] and host["CapDrop"] == ["ALL"] and host["Memory"] > 0, name
        assert host["SecurityOpt"] == ["no-new-privileges:true"], name
    (image,) = json.loads(docker("image", "inspect", system.container("ofi")["Image"]))
    sizes = docker("history", "--human=false", "--format", "{{.Size}}", image["Id"]).split()
    ours = sum(map(int, sizes[:-1]))
    system.figures["image"] = f"{image['Size'] / 1e6:.0f} MB, of which ours {ours / 1e6:.0f} MB"


def test_signals_can_be_tapped(system: Stack) -> None:
    tapped = system.kcat("-C", "-t", "signals", "-o", "end", "-c", "40", "-q")
    assert tapped.code == 0, tapped.text
    signals = [json.loads(line) for line in tapped.stdout.splitlines() if line.strip()]
    assert signals and {each["symbol"] for each in signals} <= {"BTCUSDT", "ETHUSDT", "SOLUSDT"}
    assert all(each["strength"] for each in signals)
    listed = system.compose("run", "--rm", "-T", "cli", "topics")
    assert listed.code == 0 and "market.journal" in listed.stdout, listed.text


def test_the_doctor_finds_nothing_wrong(system: Stack) -> None:
    found = system.compose("run", "--rm", "-T", "cli", "doctor", "--json")
    assert found.code == 0, found.text


def test_prometheus_sees_every_service_and_no_alert_fires(system: Stack) -> None:
    def targets() -> dict[str, str]:
        active = system.prometheus("/api/v1/targets?state=active")["activeTargets"]
        return {each["labels"]["instance"]: each["health"] for each in active}

    system.until(lambda: len(targets()) > len(SERVICES) and set(targets().values()) == {"up"}, "targets up")
    system.until(lambda: bool(system.prometheus("/api/v1/alertmanagers")["activeAlertmanagers"]), "Alertmanager")
    ready = system.prometheus("/api/v1/query?query=orderflow_ready")["result"]
    assert {each["metric"]["service"] for each in ready} == set(SERVICES)
    assert [each["labels"] for each in system.prometheus("/api/v1/alerts")["alerts"] if each["state"] == "firing"] == []
    groups = system.prometheus("/api/v1/rules")["groups"]
    assert [rule for group in groups for rule in group["rules"] if rule["health"] == "err"] == []
    grafana = Stack.get(f"http://127.0.0.1:{system.ports['GRAFANA_PORT']}/api/health")
    assert grafana["database"] == "ok"


def test_what_it_takes_of_the_machine(system: Stack) -> None:
    names = {each["Id"][:12]: service_of(each) for each in system.containers() if each["State"]["Running"]}
    sampled = docker("stats", "--no-stream", "--format", "{{json .}}", *names)
    shares: dict[str, tuple[float, float]] = {}
    for line in sampled.splitlines():
        found = json.loads(line)
        used = found["MemUsage"].partition("iB /")[0]
        scale = {"K": 1 / 1024, "M": 1.0, "G": 1024.0}[used[-1]]
        shares[names[found["ID"][:12]]] = float(found["CPUPerc"].rstrip("%")), float(used[:-1]) * scale
    assert set(shares) == FOREVER
    for name, (cpu, memory) in sorted(shares.items()):
        system.figures[f"  {name}"] = f"{cpu:5.1f} % of a core, {memory:5.0f} MiB"
    cpu, memory = (sum(each) for each in zip(*shares.values()))
    system.figures["the whole stack"] = f"{cpu:5.1f} % of a core, {memory:5.0f} MiB"


@pytest.mark.parametrize("service", ["ofi", "ingestion", "lake"])
def test_what_dies_comes_back(system: Stack, service: str) -> None:
    system.signal(service, signal.SIGKILL)
    took = system.until(lambda: system.container(service)["RestartCount"] == 1, f"{service} restarted")
    took += system.until_at_work(service, "after its death")
    system.until(lambda: health_of(system.container(service)) == "healthy", f"{service} healthy")
    system.figures[f"{service} killed: back at work after"] = f"{took:.1f} s"


def test_a_broker_that_was_killed_and_started_again_loses_nobody(system: Stack) -> None:
    system.ok("kill", "kafka")
    system.ok("start", "kafka")
    system.figures["broker killed and started: work goes on after"] = f"{system.until_at_work('signal', 'after'):.1f} s"
    system.until(lambda: healthy(system) == FOREVER, "all healthy after the broker's death")
    for each in ("cvd", "fusion", "signal"):
        assert system.container(each)["RestartCount"] == 0, each


def test_one_service_three_times(system: Stack) -> None:
    with system.timed("up --scale ofi=3 --wait"):
        system.ok("up", "--detach", "--wait", "--scale", "ofi=3")

    def shares() -> list[set[int]]:
        return [set(system.page("ofi", "status", index).get("partitions", ())) for index in (1, 2, 3)]

    system.until(lambda: all(shares()) and sum(map(len, shares())) == PARTITIONS, "partitions shared by three")
    found = shares()
    assert set().union(*found) == set(range(PARTITIONS))

    def seen() -> int:
        up = system.prometheus("/api/v1/query?query=up")["result"]
        return sum(each["metric"]["job"] == "orderflow" and each["value"][1] == "1" for each in up)

    system.until(lambda: seen() == len(SERVICES) + 2, "Prometheus sees the new ones")
    system.until_at_work("fusion", "with three ofi")


def test_another_kind_of_market_is_refused(system: Stack) -> None:
    done = system.compose("run", "--rm", "-T", "--no-deps", "-e", "SOURCE=live", "ingestion", timeout_sec=180)
    assert done.code == 2, done.text
    last = json.loads(done.text.strip().splitlines()[-1])["message"]
    assert "holds a simulated market" in last and "TOPIC_PREFIX" in last and "docker compose down -v" in last


def test_stop_ends_everything_by_itself(system: Stack) -> None:
    with system.timed("docker compose stop"):
        system.ok("stop")
    codes = {service_of(each): each["State"]["ExitCode"] for each in system.containers()}
    # The registry holds nothing but what is in Kafka, and is given little time: away from its broker it would use it all.
    assert {name: code for name, code in codes.items() if code not in (0, 143) and name != "karapace"} == {}
    assert {name for name in OURS if codes[name] != 0} == set()
    with system.timed("docker compose down"):
        system.ok("down")


def test_a_wrong_setting_ends_with_a_readable_line(system: Stack) -> None:
    done = system.compose("up", "--detach", "--wait", Z_MODE="nope")
    assert done.code != 0
    assert 'service "init" didn\'t complete successfully: exit 2' in done.text
    lines = system.ok("logs", "--no-log-prefix", "init").stdout.strip().splitlines()
    assert len(lines) == 1, lines
    assert lines[0].startswith("orderflow: Z_MODE=nope is refused") and "delta, level, flow, rate" in lines[0]


def test_up_again_goes_on_where_it_stood(system: Stack) -> None:
    """With the settings of .env.example this time: they are the defaults, so state made without them is taken."""
    shutil.copy(system.folder / ".env.example", system.folder / ".env")
    with system.timed("up --wait once more (images built, volumes there)"):
        system.ok("up", "--detach", "--wait")
    system.until_at_work("signal", "after up")
    logs = system.ok("logs", "ingestion", "ofi").stdout
    assert '"level": "ERROR"' not in logs
    assert system.page("ofi", "status")["recoveries"] > 0


def test_nothing_was_lost_or_repeated(system: Stack, tmp_path: Path) -> None:
    """The session is ended, the lake closed, and all topics and files are read by a judge that imports nothing of us."""
    system.ok("kill", "-s", "USR1", "ingestion")
    recorder: dict[str, object] = {}

    def ended() -> bool:
        recorder.update(system.page("ingestion", "status").get("recorder", {}))
        return bool(recorder.get("done"))

    system.until(ended, "the end of the session")
    seqs = recorder["seqs"]
    assert isinstance(seqs, dict) and sum(seqs.values()) > 1000
    for service in SERVICES:
        system.until(lambda service=service: system.drained(service, seqs), f"{service} drained")  # type: ignore[misc]
    recomputed = system.compose("run", "--rm", "-T", "cli", "verify", timeout_sec=UP_SEC)
    assert recomputed.code == 0 and "identical" in recomputed.stdout, recomputed.text
    system.ok("cp", "lake:/data", str(tmp_path / "volume"))
    verdict = verify(system.bootstrap, system.registry, "", tmp_path / "volume", database=False)
    assert verdict.problems == []
    assert verdict.counts["signals"] > 1000
    system.figures["judged"] = f"{verdict.records:,} records, {verdict.duplicates} physical duplicates"


def test_the_contracts_hold_against_this_kafka_and_this_karapace(system: Stack, tmp_path: Path) -> None:
    """What the embedded broker and our own registry are held to, against those of the containers."""
    left_out = [f"--deselect=tests/contract/test_registry_confluent.py::{name}" for name in NOT_KARAPACE]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "tests/contract", *left_out],
        cwd=ROOT,
        env=os.environ
        | {
            "KAFKA_BOOTSTRAP_TEST": system.bootstrap,
            "SCHEMA_REGISTRY_CONTRACT_URL": system.registry,
            "TMPDIR": str(tmp_path),
        },
        capture_output=True,
        text=True,
        timeout=UP_SEC,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-4000:]


async def test_this_karapace_refuses_what_readers_would_break_on(system: Stack) -> None:
    text = (ROOT / "schemas" / "row.avsc").read_text("utf-8")
    schema = json.loads(text)
    schema["fields"].append({"name": "added", "type": "long"})
    async with RegistryClient(system.registry) as client:
        assert await client.register("market.rows-value", text) > 0
        assert await client.check_compatibility("market.rows-value", text) == []
        assert await client.check_compatibility("market.rows-value", json.dumps(schema))
        with pytest.raises(IncompatibleSchemaError, match="added"):
            await client.register("market.rows-value", json.dumps(schema))
