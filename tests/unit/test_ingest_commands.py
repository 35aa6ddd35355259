"""`control.commands` into the journal: on every partition, once, whatever happens in between."""

from __future__ import annotations

import asyncio
from collections import Counter

import msgspec
from ingest_exchange import START_NS, World, command, loop_sec, make_codecs, of_kind
from orderflow.ingest.commands import COMMAND_KIND, JOURNAL_LOOK_BACK, Commands
from orderflow.streaming.codec import peek
from orderflow.streaming.memory_log import MemoryLog
from orderflow.streaming.recorder import JournalWriter, journal_record
from orderflow.topics import JOURNAL

from tests.storm.virtual_loop import run

BTC = "BTCUSDT"
PAUSE = '{"type":"pause","symbol":"BTCUSDT"}'


def counted(records: list[dict[str, object]]) -> Counter[tuple[object, str]]:
    return Counter(
        (record["partition"], msgspec.json.decode(record["payload"])["command_id"])  # type: ignore[arg-type]
        for record in of_kind(records, "command")
    )


def test_a_command_is_one_record_on_each_partition_with_the_same_time() -> None:
    async def main() -> None:
        world = World(BTC)
        await command(world.log, "before", PAUSE)
        world.start()
        await world.until_sec(5)
        for _ in range(2):
            await command(world.log, "twice", PAUSE, stamp_ms=START_NS // 1_000_000 + 5000)
        await command(world.log, "later", PAUSE, apply_at_ns=77)
        await command(world.log, "damaged", "{")
        await world.until_sec(10)
        status = world.recorder.status()
        await world.stop(drain=False)
        world.start(seed=2)
        await world.until_sec(20)
        await world.stop()
        records = await world.journal()
        assert counted(records) == {(number, name): 1 for number in range(12) for name in ("before", "twice", "later")}
        contents = {record["payload"] for record in of_kind(records, "command")}
        assert len(contents) == 3, "the same on every partition"
        by_id = {each["command_id"]: each for each in map(msgspec.json.decode, contents)}
        assert by_id["twice"]["apply_at_ns"] == START_NS + 6_000_000_000
        assert by_id["later"] == {
            "command_id": "later",
            "origin": "test",
            "apply_at_ns": 77,
            "payload": {"type": "pause", "symbol": "BTCUSDT"},
        }
        assert status["commands"] == {"journalled": 36, "refused": {"damaged": 1}, "read_errors": 0}

    run(main())


async def commanded(log: MemoryLog, partitions: range, sec: float = 3.0) -> list[tuple[int, str]]:
    """(partition, id) of what a new recorder would journal."""
    found: list[tuple[int, str]] = []
    commands = Commands(
        log,
        make_codecs(),
        "",
        partitions,
        lambda partition, payload: found.append((partition, msgspec.json.decode(payload)["command_id"])),
    )
    task = asyncio.create_task(commands.run(lambda: 0.5))
    await asyncio.wait([task], timeout=sec)
    assert not task.done()
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    return found


def test_a_command_journalled_in_part_is_completed() -> None:
    async def main() -> None:
        log = MemoryLog()
        journal = JournalWriter(log, make_codecs(), "", range(3))
        await journal.open("s", 1)
        await command(log, "half")
        journal.append(1, journal_record("command", 1, payload=b'{"command_id":"half"}'), 5)
        await journal.flush()
        assert await commanded(log, range(3)) == [(0, "half"), (2, "half")]

    run(main())


def test_what_only_an_overtaken_recorder_has_written_is_journalled_again() -> None:
    async def main() -> None:
        log = MemoryLog()
        zombie, heir = (JournalWriter(log, make_codecs(), "", range(1)) for _ in range(2))
        await zombie.open("s", 1)
        await heir.open("s", 2)
        await command(log, "lost")
        zombie.append(0, journal_record("command", 1, payload=b'{"command_id":"lost"}'), 5)
        await zombie.writer.flush()
        assert await commanded(log, range(1)) == [(0, "lost")]

    run(main())


def test_commands_from_before_what_is_looked_back_on_are_not_repeated() -> None:
    async def main() -> None:
        log = MemoryLog()
        journal = JournalWriter(log, make_codecs(), "", range(1))
        await journal.open("s", 1)
        for number in range(JOURNAL_LOOK_BACK + 100):
            journal.append(0, journal_record("tick", 1, payload=b"{}"), 10_000_000 + number)
        await journal.flush()
        await command(log, "long ago", stamp_ms=5)
        await command(log, "while it was away", stamp_ms=10_000_000 + JOURNAL_LOOK_BACK)
        assert await commanded(log, range(1)) == [(0, "while it was away")]
        assert loop_sec() < 10

    run(main())


def test_the_kinds_number_is_the_schemas() -> None:
    record = journal_record("command", 1, payload=b"{}")
    assert peek(make_codecs().encoder(JOURNAL)({**record, "seq": 3}))[1] == COMMAND_KIND
