"""The embedded broker itself: it serves, keeps what it acknowledged through SIGKILL, and is found again as a daemon."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, TopicPartition
from aiokafka.admin import AIOKafkaAdminClient, NewTopic
from aiokafka.errors import UnknownTopicOrPartitionError
from orderflow.kafka_embedded import (
    DataDirInUseError,
    EmbeddedKafka,
    EmbeddedKafkaError,
    PortTakenError,
    ensure_jars,
    storage,
)
from orderflow.kafka_embedded.probe import probe
from orderflow.kafka_embedded.process import free_port, is_broker_of

pytestmark = pytest.mark.kafka

WAIT_SEC = 300.0


@pytest.fixture
def broker(tmp_path: Path) -> Iterator[EmbeddedKafka]:
    """A broker of the test's own, to be stopped and killed at will."""
    with EmbeddedKafka(tmp_path / "kafka") as running:
        yield running


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedKafka]:
    """A broker whose folder and process tests may look at, but not stop."""
    with EmbeddedKafka(tmp_path_factory.mktemp("kafka") / "data, größer") as running:
        yield running


async def create_topic(bootstrap: str, name: str, partitions: int = 1, **configs: str) -> None:
    admin = AIOKafkaAdminClient(bootstrap_servers=bootstrap)
    await admin.start()
    try:
        await admin.create_topics([NewTopic(name, partitions, 1, topic_configs=configs)])
    finally:
        await admin.close()


async def produce(bootstrap: str, topic: str, values: list[bytes]) -> list[int]:
    """Offsets at which an idempotent producer was told that the records are safe."""
    producer = AIOKafkaProducer(
        bootstrap_servers=bootstrap, acks="all", enable_idempotence=True, max_request_size=8 << 20
    )
    await producer.start()
    try:
        sent = [await producer.send(topic, value, partition=0) for value in values]
        return [(await each).offset for each in sent]
    finally:
        await producer.stop()


async def consume(bootstrap: str, topic: str, count: int) -> list[bytes]:
    consumer = AIOKafkaConsumer(bootstrap_servers=bootstrap, enable_auto_commit=False, auto_offset_reset="earliest")
    await consumer.start()
    try:
        tp = TopicPartition(topic, 0)
        consumer.assign([tp])
        await consumer.seek_to_beginning(tp)
        values: list[bytes] = []
        async with asyncio.timeout(WAIT_SEC):
            while len(values) < count:
                values += [record.value for record in (await consumer.getmany(tp, timeout_ms=500)).get(tp, ())]
        assert (await consumer.end_offsets([tp]))[tp] == len(values)
        return values
    finally:
        await consumer.stop()


async def test_the_shared_broker_answers(kafka_bootstrap: str) -> None:
    host, port = kafka_bootstrap.rsplit(":", 1)
    answer = probe(host, int(port))
    assert answer is not None and answer.brokers


async def test_acknowledged_records_survive_kill_stop_and_a_new_object(broker: EmbeddedKafka, tmp_path: Path) -> None:
    address, cluster = broker.bootstrap, storage.cluster_id(broker.data_dir)
    await create_topic(address, "kept", partitions=12)
    first = [b"%d" % number for number in range(1_000)]
    assert await produce(address, "kept", first) == list(range(1_000))

    await asyncio.to_thread(broker.kill)
    assert not broker.is_running and probe("127.0.0.1", int(address.rsplit(":")[1])) is None
    await asyncio.to_thread(broker.start)
    assert broker.bootstrap == address
    assert await produce(address, "kept", [b"after the kill"]) == [1_000]

    await asyncio.to_thread(broker.stop)
    assert storage.read_record(broker.data_dir) is None and not storage.is_locked(broker.data_dir)
    with EmbeddedKafka(tmp_path / "kafka") as other:
        assert await consume(other.bootstrap, "kept", 1_001) == [*first, b"after the kill"]
        assert storage.cluster_id(other.data_dir) == cluster


async def test_a_producer_and_a_group_get_over_a_kill(broker: EmbeddedKafka) -> None:
    await create_topic(broker.bootstrap, "through")
    producer = AIOKafkaProducer(bootstrap_servers=broker.bootstrap, acks="all", enable_idempotence=True)
    consumer = AIOKafkaConsumer(
        "through",
        bootstrap_servers=broker.bootstrap,
        group_id="readers",
        auto_offset_reset="earliest",
        enable_auto_commit=False,
        session_timeout_ms=1_000,  # refused by a broker with the default minimum of 6 s
        heartbeat_interval_ms=300,
    )
    await producer.start()
    await consumer.start()
    try:
        await producer.send_and_wait("through", b"0", partition=0)
        pending = []
        await asyncio.to_thread(broker.kill)
        restart = asyncio.create_task(asyncio.to_thread(broker.start))
        for number in range(1, 50):
            pending.append(await producer.send("through", b"%d" % number, partition=0))
        await restart
        async with asyncio.timeout(WAIT_SEC):
            assert [(await each).offset for each in pending] == list(range(1, 50))
            seen: list[bytes] = []
            while len(seen) < 50:
                seen += [r.value for records in (await consumer.getmany(timeout_ms=500)).values() for r in records]
        assert list(dict.fromkeys(seen)) == [b"%d" % number for number in range(50)]
    finally:
        await producer.stop()
        await consumer.stop()


async def test_topics_are_not_made_by_accident(shared: EmbeddedKafka) -> None:
    admin = AIOKafkaAdminClient(bootstrap_servers=shared.bootstrap)
    await admin.start()
    try:
        described = await admin.describe_topics(["no.such.topic"])
        assert [each["error_code"] for each in described] == [UnknownTopicOrPartitionError.errno]
        assert "no.such.topic" not in await admin.list_topics()
    finally:
        await admin.close()


async def test_records_of_eight_mebibytes_fit(shared: EmbeddedKafka) -> None:
    await create_topic(shared.bootstrap, "large")
    large = os.urandom((8 << 20) - 4_096)
    assert await produce(shared.bootstrap, "large", [large]) == [0]
    assert await consume(shared.bootstrap, "large", 1) == [large]


async def test_the_native_codec_of_the_broker_works(shared: EmbeddedKafka) -> None:
    """A topic that packs anew with zstd makes the broker unpack and load native code from its own `tmp`."""
    await create_topic(shared.bootstrap, "packed", **{"compression.type": "zstd"})
    await produce(shared.bootstrap, "packed", [b"again and again " * 1_000])
    segment = next((shared.data_dir / "log" / "packed-0").glob("*.log"))
    assert 0 < segment.stat().st_size < 2_000


def test_a_start_with_a_full_cache_needs_no_network(
    shared: EmbeddedKafka, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "orderflow.kafka_embedded.jars.fetch_with_jgo", lambda *_: pytest.fail("the network was asked for a jar")
    )
    assert len(ensure_jars()) == 46
    with EmbeddedKafka(tmp_path / "second") as second:
        assert second.is_running and second.bootstrap != shared.bootstrap


def test_folder_and_port_have_one_broker(shared: EmbeddedKafka, tmp_path: Path) -> None:
    with pytest.raises(DataDirInUseError, match=f"pid {shared.pid} at {shared.bootstrap}"):
        EmbeddedKafka(shared.data_dir).start()
    port = int(shared.bootstrap.rsplit(":")[1])
    with pytest.raises(PortTakenError, match="taken by a Kafka broker"):
        EmbeddedKafka(tmp_path / "other", port).start()
    shared.start()  # it runs: nothing happens
    assert shared.is_running


def test_a_broker_that_cant_read_its_data_says_why(tmp_path: Path) -> None:
    kafka = EmbeddedKafka(tmp_path)
    kafka.start()
    kafka.stop()
    meta = tmp_path / "log" / storage.META
    meta.write_text(meta.read_text().replace("node.id=1", "node.id=2"))
    with pytest.raises(EmbeddedKafkaError, match=r"(?s)ended at its start.*Stored node id 2"):
        kafka.start()
    assert not kafka.is_running


def test_a_broker_does_not_outlive_a_killed_starter(tmp_path: Path) -> None:
    if sys.platform != "linux":
        pytest.skip("only the Linux kernel ends a process with its parent")
    code = (
        "import asyncio, os, signal, sys; from pathlib import Path; from orderflow.kafka_embedded import EmbeddedKafka\n"
        "broker = EmbeddedKafka(Path(sys.argv[1]))\n"
        "asyncio.run(asyncio.to_thread(broker.start))\n"  # its loop and its pool of threads are gone by now
        "print(broker.is_running, flush=True); os.kill(os.getpid(), signal.SIGKILL)"
    )
    starter = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=False, timeout=WAIT_SEC
    )
    assert starter.stdout == "True\n" and starter.returncode == -signal.SIGKILL
    record = storage.read_record(tmp_path)
    assert record is not None
    assert_gone(record.pid, tmp_path)


def assert_gone(pid: int, data_dir: Path) -> None:
    lock = None
    for _ in range(15):  # each waits for up to a second
        lock = storage.take_lock(data_dir)
        if lock is not None:
            break
    assert lock is not None, "the broker still holds its folder"
    os.close(lock)
    assert not is_broker_of(pid, data_dir)


def orderflow_kafka(home: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "KAFKA_BOOTSTRAP"}
    return subprocess.run(
        [sys.executable, "-m", "orderflow.cli.main", "kafka", *arguments],
        env={**environment, "ORDERFLOW_HOME": str(home)},
        capture_output=True,
        text=True,
        check=False,
        timeout=WAIT_SEC * 2,
    )


def test_the_daemon_stays_up_and_is_found_again(tmp_path: Path) -> None:
    port = free_port()
    try:
        up = orderflow_kafka(tmp_path, "up", "--port", str(port))
        assert (up.returncode, up.stdout) == (0, f"127.0.0.1:{port}\n"), up.stderr
        record = storage.read_record(tmp_path / "kafka")
        assert record is not None and is_broker_of(record.pid, tmp_path / "kafka")

        again = orderflow_kafka(tmp_path, "up")
        assert (again.returncode, again.stdout) == (0, up.stdout)
        assert storage.read_record(tmp_path / "kafka") == record
        elsewhere = orderflow_kafka(tmp_path, "up", "--port", str(free_port()))
        assert elsewhere.returncode == 2 and "orderflow kafka down" in elsewhere.stderr

        status = orderflow_kafka(tmp_path, "status")
        assert (status.returncode, status.stdout) == (0, up.stdout)
        assert "Traceback" not in up.stderr + again.stderr + elsewhere.stderr + status.stderr
    finally:
        down = orderflow_kafka(tmp_path, "down")
    assert down.returncode == 0 and "stopped" in down.stderr
    assert not is_broker_of(record.pid, tmp_path / "kafka")
    assert orderflow_kafka(tmp_path, "status").returncode == 3
