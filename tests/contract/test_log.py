"""One suite for every implementation of `Log`: memory and Apache Kafka."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator

import pytest
from aiokafka import AIOKafkaConsumer, TopicPartition
from orderflow.errors import LogError
from orderflow.streaming.init import create_topics
from orderflow.streaming.kafka_log import KafkaLog
from orderflow.streaming.log import TP, Committed, Log, read_ranges
from orderflow.streaming.memory_log import MemoryLog
from orderflow.topics import DAY_MS, Topic


@pytest.fixture(params=["memory", pytest.param("kafka", marks=pytest.mark.kafka)])
async def made(request: pytest.FixtureRequest) -> AsyncIterator[tuple[Log, str]]:
    prefix = f"t{uuid.uuid4().hex[:8]}."
    if request.param == "memory":
        yield MemoryLog(), prefix
        return
    bootstrap = request.getfixturevalue("kafka_bootstrap")
    await create_topics(bootstrap, prefix, [Topic("a", None, "test", DAY_MS), Topic("b", None, "test", DAY_MS)])
    log = KafkaLog(bootstrap)
    await log.start()
    yield log, prefix
    await log.close()


async def put(log: Log, tp: TP, values: list[bytes | None], stamp: int = 1_700_000_000_000) -> int:
    batch = log.batch()
    for index, value in enumerate(values):
        assert batch.append(b"k%d" % index, value, stamp + index, [("h", b"%d" % index)])
    return await (await log.send(batch, tp))


async def test_appended_records_come_back_whole_and_in_order(made: tuple[Log, str]) -> None:
    log, prefix = made
    tp = TP(prefix + "a", 3)
    assert await put(log, tp, [b"x", None, b""]) == 0
    assert await put(log, tp, [b"y"]) == 3
    records = (await read_ranges(log, {tp: (0, 4)}))[tp]
    assert [record.offset for record in records] == [0, 1, 2, 3]
    assert [record.value for record in records] == [b"x", None, b"", b"y"]
    assert [record.key for record in records] == [b"k0", b"k1", b"k2", b"k0"]
    assert records[1].timestamp == 1_700_000_000_001
    assert list(records[1].headers) == [("h", b"1")]


async def test_batches_of_one_partition_keep_their_order_without_waiting(made: tuple[Log, str]) -> None:
    log, prefix = made
    tp = TP(prefix + "a", 0)
    deliveries = []
    for number in range(40):
        batch = log.batch()
        batch.append(b"", b"%d" % number, 1_700_000_000_000)
        deliveries.append(await log.send(batch, tp))
    assert [await delivery for delivery in deliveries] == list(range(40))
    records = (await read_ranges(log, {tp: (0, 40)}))[tp]
    assert [int(record.value or b"-1") for record in records] == list(range(40))


async def test_offsets_of_begin_and_end(made: tuple[Log, str]) -> None:
    log, prefix = made
    full, empty = TP(prefix + "a", 1), TP(prefix + "b", 1)
    await put(log, full, [b"1", b"2"])
    assert await log.begin_offsets([full, empty]) == {full: 0, empty: 0}
    assert await log.end_offsets([full, empty]) == {full: 2, empty: 0}


async def test_reader_begins_where_it_is_told_and_knows_its_position(made: tuple[Log, str]) -> None:
    log, prefix = made
    tp = TP(prefix + "a", 2)
    await put(log, tp, [b"0", b"1", b"2", b"3"])
    reader = await log.reader({tp: 2})
    assert await reader.position(tp) == 2
    got: list[bytes | None] = []
    while len(got) < 2:
        got += [record.value for record in (await reader.poll(500, 100)).get(tp, ())]
    assert got == [b"2", b"3"]
    assert await reader.position(tp) == 4
    assert await reader.poll(20, 100) == {}
    await reader.close()


async def test_a_waiting_reader_wakes_for_an_append(made: tuple[Log, str]) -> None:
    log, prefix = made
    tp = TP(prefix + "a", 4)
    reader = await log.reader({tp: 0})
    waiting = asyncio.create_task(reader.poll(20_000, 100))
    await asyncio.sleep(0.05)
    await put(log, tp, [b"late"])
    got = await asyncio.wait_for(waiting, 120)
    assert [record.value for record in got[tp]] == [b"late"]
    await reader.close()


async def test_paused_partitions_give_nothing_until_resumed(made: tuple[Log, str]) -> None:
    log, prefix = made
    first, second = TP(prefix + "a", 5), TP(prefix + "b", 5)
    await put(log, first, [b"1"])
    await put(log, second, [b"2"])
    reader = await log.reader({first: 0, second: 0})
    reader.pause([first])
    got: dict[TP, int] = {}
    while second not in got:
        for tp, records in (await reader.poll(500, 100)).items():
            got[tp] = len(records)
    assert first not in got
    reader.resume([first])
    while first not in got:
        for tp, records in (await reader.poll(500, 100)).items():
            got[tp] = len(records)
    await reader.close()


async def test_a_full_batch_refuses_and_keeps_what_it_has(made: tuple[Log, str]) -> None:
    log, prefix = made
    tp = TP(prefix + "a", 6)
    batch = log.batch()
    count = 0
    while batch.append(b"", bytes(100_000), 1_700_000_000_000):
        count += 1
        assert count < 100
    assert len(batch) == count
    assert await (await log.send(batch, tp)) == 0
    assert await log.end_offsets([tp]) == {tp: count}


async def test_one_answer_holds_of_every_partition_though_its_batches_are_full(made: tuple[Log, str]) -> None:
    """A batch above a reader's share of an answer comes only where it is first in it: the rest would starve behind."""
    log, prefix = made
    tps = [TP(prefix + topic, partition) for topic in "ab" for partition in range(8)]
    for tp in tps:
        batch = log.batch()
        while batch.append(b"", bytes(1000), 1_700_000_000_000):
            pass
        assert len(batch) > 50
        await (await log.send(batch, tp))
    reader = await log.reader(dict.fromkeys(tps, 0))
    got: set[TP] = set()
    async with asyncio.timeout(120):
        while not got:
            got = set(await reader.poll(2000, 100_000))
    assert got == set(tps)
    await reader.close()


async def test_members_share_partitions_and_take_over_from_one_another(made: tuple[Log, str]) -> None:
    log, prefix = made
    topics = [prefix + "a", prefix + "b"]
    one = await log.join(prefix + "g", topics)
    await settle(lambda: one.assigned == frozenset(range(12)))
    two = await log.join(prefix + "g", topics)
    await settle(lambda: one.assigned | two.assigned == frozenset(range(12)) and not one.assigned & two.assigned)
    assert len(one.assigned) == len(two.assigned) == 6
    owned = TP(topics[0], min(two.assigned))
    assert await two.commit({owned: 7})
    other = TP(topics[0], max(two.assigned))
    assert await two.committed([owned, other]) == {owned: Committed(7, by_hand=False)}
    await one.close()
    await settle(lambda: two.assigned == frozenset(range(12)))
    await two.close()


async def test_an_offset_that_somebody_else_has_set_shows(
    made: tuple[Log, str], request: pytest.FixtureRequest
) -> None:
    log, prefix = made
    tp, group = TP(prefix + "a", 4), prefix + "group"
    await put(log, tp, [b"0", b"1"])
    if isinstance(log, MemoryLog):
        log.reset_offsets(group, {tp: 1})
    else:
        # As Kafka's own tools do it: by the group's name, at rest, without a note.
        consumer = AIOKafkaConsumer(
            bootstrap_servers=request.getfixturevalue("kafka_bootstrap"), group_id=group, enable_auto_commit=False
        )
        await consumer.start()
        consumer.assign([TopicPartition(*tp)])
        await consumer.commit({TopicPartition(*tp): 1})
        await consumer.stop()
    member = await log.join(group, [tp.topic])
    await settle(lambda: tp.partition in member.assigned)
    assert await member.committed([tp]) == {tp: Committed(1, by_hand=True)}
    assert await member.commit({tp: 2})
    assert await member.committed([tp]) == {tp: Committed(2, by_hand=False)}
    await member.close()


async def test_a_position_outside_the_data_is_an_error_that_says_so(made: tuple[Log, str]) -> None:
    log, prefix = made
    tp = TP(prefix + "a", 7)
    await put(log, tp, [b"0", b"1"])
    if isinstance(log, MemoryLog):
        log.trim(tp, 1)
        position = 0
    else:
        position = 50
    reader = await log.reader({tp: position})
    with pytest.raises(LogError, match="position"):
        for _ in range(40):
            await reader.poll(500, 10)
    await reader.close()


async def settle(condition, timeout_sec: float = 120.0) -> None:  # type: ignore[no-untyped-def]
    async with asyncio.timeout(timeout_sec):
        while not condition():
            await asyncio.sleep(0.02)


async def test_a_reader_who_lets_the_broker_gather_gets_the_same_soon(made: tuple[Log, str]) -> None:
    log, prefix = made
    tp = TP(prefix + "a", 7)
    reader = await log.reader({tp: 0}, min_bytes=1 << 20)
    got: list[bytes | None] = []
    for number in range(3):
        await put(log, tp, [b"%d" % number])
        async with asyncio.timeout(120):
            while len(got) <= number:
                got += [record.value for record in (await reader.poll(2000, 100)).get(tp, ())]
    assert got == [b"0", b"1", b"2"]
    await reader.close()
