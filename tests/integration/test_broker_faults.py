"""A broker that goes and comes, a producer that the broker refuses, a node of a cluster that is lost."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

import pytest
from aiokafka.admin import AIOKafkaAdminClient
from aiokafka.structs import TopicPartition
from orderflow.errors import BrokerAwayError
from orderflow.kafka_embedded import EmbeddedCluster, EmbeddedKafka, EmbeddedKafkaError
from orderflow.streaming.init import create_topics
from orderflow.streaming.kafka_log import KafkaLog
from orderflow.streaming.log import TP, read_ranges
from orderflow.topics import BY_NAME, SIGNALS

pytestmark = [pytest.mark.kafka, pytest.mark.slow]

WAIT_SEC = 300.0
HERE = TP(SIGNALS, 0)


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(WAIT_SEC):
        while not condition():
            await asyncio.sleep(0.05)


async def write(log: KafkaLog, *values: bytes) -> int:
    batch = log.batch()
    for value in values:
        assert batch.append(b"", value, 0)
    async with asyncio.timeout(WAIT_SEC):
        return await (await log.send(batch, HERE))


async def values(log: KafkaLog) -> list[bytes | None]:
    ends = await log.end_offsets([HERE])
    return [record.value for record in (await read_ranges(log, {HERE: (0, ends[HERE])}))[HERE]]


async def test_a_write_waits_for_the_broker_and_is_there_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with EmbeddedKafka(tmp_path / "kafka") as broker:
        await create_topics(broker.bootstrap, "", [BY_NAME[SIGNALS]])
        log = KafkaLog(broker.bootstrap, patience_sec=WAIT_SEC)
        await log.start()
        try:
            await write(log, b"before")
            assert log.reachable
            await asyncio.to_thread(broker.kill)
            writing = asyncio.create_task(write(log, b"meanwhile"))
            asking = asyncio.create_task(log.end_offsets([HERE]))
            await until(lambda: not log.reachable)
            assert not writing.done()
            await asyncio.to_thread(broker.start)
            await writing
            assert (await asking)[HERE] >= 1
            await until(lambda: log.reachable)
            assert await values(log) == [b"before", b"meanwhile"]
        finally:
            await log.close()
    ours = [record.getMessage() for record in caplog.records if record.name == "orderflow.streaming.kafka_log"]
    assert [text.partition(" at ")[0] for text in ours] == ["no broker answers", "the broker"]


async def test_a_producer_whose_numbering_is_refused_is_replaced(tmp_path: Path) -> None:
    with EmbeddedKafka(tmp_path / "kafka") as broker:
        await create_topics(broker.bootstrap, "", [BY_NAME[SIGNALS]])
        log = KafkaLog(broker.bootstrap)
        await log.start()
        try:
            await write(log, b"1")
            # What a broker that lost its tail would see: numbers that leave some out.
            log._producer._txn_manager._sequence_numbers[TopicPartition(*HERE)] += 5
            with pytest.raises(BrokerAwayError, match="OutOfOrderSequence"):
                await write(log, b"refused")
            await write(log, b"2")
            assert await values(log) == [b"1", b"2"]
        finally:
            await log.close()


async def test_one_node_of_three_may_be_lost(tmp_path: Path) -> None:
    with EmbeddedCluster(tmp_path / "cluster") as cluster:
        await create_topics(cluster.bootstrap, "", [BY_NAME[SIGNALS]])
        admin = AIOKafkaAdminClient(bootstrap_servers=cluster.bootstrap)
        await admin.start()
        (described,) = await admin.describe_topics([SIGNALS])
        await admin.close()
        assert {len(partition["replicas"]) for partition in described["partitions"]} == {3}
        leader = described["partitions"][0]["leader"]
        log = KafkaLog(cluster.bootstrap, patience_sec=WAIT_SEC)
        await log.start()
        try:
            await write(log, b"three")
            await asyncio.to_thread(cluster.nodes[leader].kill)
            await write(log, b"two")
            await asyncio.to_thread(cluster.nodes[leader].start)
            await write(log, b"three again")
            assert await values(log) == [b"three", b"two", b"three again"]
        finally:
            await log.close()


def test_a_cluster_keeps_its_size_and_its_folder(tmp_path: Path) -> None:
    cluster = EmbeddedCluster(tmp_path / "cluster")
    assert EmbeddedCluster(tmp_path / "cluster").plan == cluster.plan
    with pytest.raises(EmbeddedKafkaError, match="has 3 nodes, not 5"):
        EmbeddedCluster(tmp_path / "cluster", 5)
    with pytest.raises(EmbeddedKafkaError, match="must have 2 to 9"):
        EmbeddedCluster(tmp_path / "other", 1)
    (tmp_path / "single" / "log").mkdir(parents=True)
    with pytest.raises(EmbeddedKafkaError, match="stands alone"):
        EmbeddedCluster(tmp_path / "single")
