"""Numbering, epochs and fencing of the journal, on the in-memory log."""

from __future__ import annotations

import asyncio

import msgspec
import pytest
from orderflow.errors import ConfigError, FencedError, LogError
from orderflow.streaming.codec import Codecs, peek, schema_text
from orderflow.streaming.journal import JournalView, partition_of
from orderflow.streaming.log import TP, read_ranges
from orderflow.streaming.memory_log import MemoryLog
from orderflow.streaming.recorder import JournalWriter, journal_record, market_of, shard_partitions
from orderflow.topics import JOURNAL


async def no_other(number: int) -> str:
    raise AssertionError(number)


def make_codecs() -> Codecs:
    return Codecs({JOURNAL: 1}, {JOURNAL: schema_text("journal")}, no_other)


def tick(session: str) -> dict[str, object]:
    return journal_record("tick", 5, source_position=3, ordinal=1, payload=msgspec.json.encode({"session": session}))


async def view(log: MemoryLog, partition: int = 0) -> list[tuple[int, bytes]]:
    tp = TP(JOURNAL, partition)
    end = (await log.end_offsets([tp]))[tp]
    rule = JournalView()
    found = []
    for record in (await read_ranges(log, {tp: (0, end)}))[tp]:
        assert record.value is not None
        seq, kind, _ = peek(record.value)
        if rule.admit(record, seq, kind):
            found.append((seq, record.value))
    return found


async def test_numbers_begin_at_one_and_go_on_after_a_restart() -> None:
    log, codecs = MemoryLog(), make_codecs()
    first = JournalWriter(log, codecs, "", [0])
    assert (await first.open("s", 1))[0].seq == 0
    for _ in range(3):
        first.append(0, tick("s"), 1)
    await first.flush()
    second = JournalWriter(log, codecs, "", [0])
    tail = (await second.open("s", 2))[0]
    assert (tail.seq, tail.source_position, tail.ordinal, tail.kind, tail.session) == (3, 3, 1, "tick", "s")
    assert second.epoch == first.epoch + 1
    second.append(0, tick("s"), 1)
    await second.flush()
    assert [seq for seq, _ in await view(log)] == [1, 2, 3, 4]


async def test_a_journal_that_has_expired_wholly_is_not_numbered_from_one() -> None:
    """A reader that knows the old numbers must not take the new records for repetitions."""
    log, codecs = MemoryLog(), make_codecs()
    tp = TP(JOURNAL, 0)
    first = JournalWriter(log, codecs, "", [0])
    await first.open("s", 1)
    for _ in range(5):
        first.append(0, tick("s"), 1)
    await first.flush()
    end = (await log.end_offsets([tp]))[tp]
    log.trim(tp, end)
    second = JournalWriter(log, codecs, "", [0])
    assert (await second.open("t", 2))[0].seq >= 5
    second.append(0, tick("t"), 1)
    await second.flush()
    found = (await read_ranges(log, {tp: (end, end + 2)}))[tp]
    fresh, old = JournalView(), JournalView(epoch=1, last_seq=5)
    for record in found:
        seq, kind, _ = peek(record.value or b"")
        fresh.admit(record, seq, kind)
        if kind:
            with pytest.raises(LogError, match="everything in it had expired"):
                old.admit(record, seq, kind)
    assert fresh.last_seq == second.seq[0] > 5


async def test_values_do_not_depend_on_the_epoch() -> None:
    log, codecs = MemoryLog(), make_codecs()
    for _ in range(3):
        writer = JournalWriter(log, codecs, "", [0])
        await writer.open("s", 1)
        writer.append(0, tick("s"), 1)
        await writer.flush()
    values = [value[7:] for _, value in await view(log)]
    assert len(set(values)) == 1


async def test_a_zombie_is_dropped_by_readers_and_stops_itself() -> None:
    log, codecs = MemoryLog(), make_codecs()
    zombie = JournalWriter(log, codecs, "", [0])
    await zombie.open("s", 1)
    zombie.append(0, tick("s"), 1)
    await zombie.flush()
    heir = JournalWriter(log, codecs, "", [0])
    await heir.open("s", 2)
    zombie.append(0, tick("zombie"), 1)
    with pytest.raises(FencedError, match="epoch 2"):
        await zombie.flush()
    heir.append(0, tick("s"), 1)
    await heir.flush()
    seen = await view(log)
    assert [seq for seq, _ in seen] == [1, 2]
    assert all(b"zombie" not in value for _, value in seen)


async def test_two_that_open_at_once_do_not_share_an_epoch() -> None:
    log, codecs = MemoryLog(), make_codecs()
    one, two = JournalWriter(log, codecs, "", [0, 1]), JournalWriter(log, codecs, "", [0, 1])
    await asyncio.gather(one.open("s", 1), two.open("s", 1))
    assert one.epoch != two.epoch
    loser, winner = sorted((one, two), key=lambda each: each.epoch)
    winner.append(0, tick("s"), 1)
    await winner.flush()
    loser.append(0, tick("s"), 1)
    with pytest.raises(FencedError):
        await loser.flush()
    assert [seq for seq, _ in await view(log)] == [1]


async def test_the_tail_is_found_behind_thousands_of_records() -> None:
    log, codecs = MemoryLog(), make_codecs()
    writer = JournalWriter(log, codecs, "", [0])
    await writer.open("long", 1)
    for number in range(9000):
        writer.append(0, journal_record("frame", 1, source_position=number), 1)
    await writer.flush()
    heir = JournalWriter(log, codecs, "", [0])
    tail = (await heir.open("long", 2))[0]
    assert (tail.seq, tail.session) == (9000, "long")


async def test_an_open_of_another_session_does_not_rename_the_tail() -> None:
    log, codecs = MemoryLog(), make_codecs()
    writer = JournalWriter(log, codecs, "", [0])
    await writer.open("one", 1)
    writer.append(0, tick("one"), 1)
    await writer.flush()
    await JournalWriter(log, codecs, "", [0]).open("two", 2)  # and dies at once
    assert (await JournalWriter(log, codecs, "", [0]).open("two", 3))[0].session == "one"


def test_a_hole_in_the_journal_is_an_error() -> None:
    class Stored:
        offset, timestamp, key, value, headers = 9, 0, b"", b"", (("epoch", b"1"),)

    rule = JournalView()
    assert rule.admit(Stored(), 4, 1)
    with pytest.raises(LogError, match="hole: seq 6 at offset 9 follows 4"):
        rule.admit(Stored(), 6, 1)


def test_partitions_are_those_of_kafkas_own_partitioner() -> None:
    # The hashes are those that Apache Kafka's own UtilsTest expects of murmur2.
    for text, java_hash in (("21", -973932308), ("foobar", -790332482), ("a-little-bit-long-string", -985981536)):
        assert partition_of(text) == (java_hash & 0x7FFFFFFF) % 12
    assert 0 <= partition_of("币安人生USDT") < 12


@pytest.mark.parametrize("text", ["", "1", "2/2", "a/b", "-1/2", "0/13", "0/0"])
def test_a_wrong_shard_is_refused_by_name(text: str) -> None:
    with pytest.raises(ValueError, match="INGEST_SHARD"):
        shard_partitions(text, 12)


def test_shards_cover_every_partition_once() -> None:
    assert sorted(number for index in range(3) for number in shard_partitions(f"{index}/3", 12)) == list(range(12))


LIVE, SIM, CAPTURE = "live-1f2e3d4c5b6a-0011aabb", "sim-1f2e3d4c5b6a-0011aabb", "5f0c2f9e"
"""Names of sessions as the recorders give them."""


@pytest.mark.parametrize(
    ("session", "market"),
    [(LIVE, "the live market"), (SIM, "a simulated market"), (CAPTURE, "a recorded market"), ("other-1-2", "")],
)
def test_a_session_tells_what_it_recorded(session: str, market: str) -> None:
    assert market_of(session) == market


async def journal_of(session: str) -> MemoryLog:
    log = MemoryLog()
    writer = JournalWriter(log, make_codecs(), "desk.", [0, 1])
    await writer.open(session, 1)
    writer.append(1, tick(session), 1)
    await writer.flush()
    return log


@pytest.mark.parametrize(("held", "other"), [(LIVE, SIM), (SIM, LIVE), (LIVE, CAPTURE), (CAPTURE, SIM)])
async def test_a_journal_is_not_continued_with_another_kind_of_market(held: str, other: str) -> None:
    """One partition with a record is enough, and nothing is written: the recorder that is at work is not fenced."""
    log = await journal_of(held)
    tps = [TP("desk." + JOURNAL, partition) for partition in (0, 1)]
    before = await log.end_offsets(tps)
    with pytest.raises(
        ConfigError, match=r"desk\.market\.journal holds .*TOPIC_PREFIX.*docker compose down -v"
    ) as refused:
        await JournalWriter(log, make_codecs(), "desk.", [0, 1]).open(other, 2)
    assert held in str(refused.value)
    assert await log.end_offsets(tps) == before


@pytest.mark.parametrize("held", [LIVE, SIM, CAPTURE])
async def test_a_journal_is_continued_with_its_own_kind_of_market(held: str) -> None:
    log = await journal_of(held)
    tails = await JournalWriter(log, make_codecs(), "desk.", [0, 1]).open(held.replace("1f", "2f"), 2)
    assert tails[1].seq == 1 and tails[1].session == held
