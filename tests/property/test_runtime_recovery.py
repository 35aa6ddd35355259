"""Kill any service anywhere, let zombies write, move partitions about: the canonical outputs are the same.

A toy pipeline over the in-memory log: journal -> (ticks, rows) -> ofi -> signals, with processors whose outputs depend
on everything they have seen, so that any loss, repetition or reordering shows.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import random
from collections.abc import Mapping
from typing import ClassVar

import msgspec
import pytest
from orderflow.errors import BrokerAwayError, FencedError, LogError
from orderflow.processor import Emit, Record
from orderflow.streaming.codec import Codecs, peek
from orderflow.streaming.log import TP, Batch, read_ranges
from orderflow.streaming.memory_log import MemoryBatch, MemoryLog, MemoryRecord
from orderflow.streaming.recorder import JournalWriter, journal_record
from orderflow.streaming.runtime import PROGRESS_HEADER, ProcessorRuntime, RuntimeOptions, ServiceSpec
from orderflow.streaming.snapshots import load_newest
from orderflow.topics import EVENTS, HOURLY, JOURNAL, OFI, REJECTS, ROWS, SIGNALS, TICKS

PARTITIONS_USED = (0, 5)


def simple_schema(name: str, *fields: str) -> str:
    return msgspec.json.encode(
        {
            "type": "record",
            "name": name,
            "fields": [
                {"name": "seq", "type": "long"},
                {"name": "sub", "type": "int"},
                *([{"name": "src", "type": "int"}] if name == "rows" else []),
                *({"name": field, "type": "string"} for field in fields),
            ],
        }
    ).decode()


def make_codecs() -> Codecs:
    from orderflow.streaming.codec import schema_text

    schemas = {
        JOURNAL: schema_text("journal"),
        TICKS: schema_text("tick"),
        ROWS: simple_schema("rows", "digest"),
        OFI: simple_schema("ofi", "digest"),
        SIGNALS: simple_schema("signals", "digest"),
        EVENTS: simple_schema("events", "digest"),
        REJECTS: simple_schema("rejects", "digest"),
    }

    async def by_id(number: int) -> str:
        raise AssertionError(f"no other writer's schema is in play, {number} was asked for")

    return Codecs({topic: number for number, topic in enumerate(schemas, 1)}, schemas, by_id)


class Digest:
    """Rolls a hash over everything that it is given."""

    def __init__(self) -> None:
        self.value = ""

    def roll(self, *parts: object) -> str:
        self.value = hashlib.sha256(repr((self.value, *parts)).encode()).hexdigest()[:16]
        return self.value

    def snapshot(self) -> dict[str, bytes]:
        return {"": self.value.encode()}

    def restore(self, states: Mapping[str, bytes]) -> None:
        self.value = states[""].decode()


class ToyNormaliser(Digest):
    inputs: ClassVar[tuple[str, ...]] = (JOURNAL,)
    outputs: ClassVar[tuple[str, ...]] = (TICKS, ROWS, REJECTS)

    def step(self, topic: str, record: Record) -> list[Emit]:
        digest = self.roll(record["seq"], record["payload"])
        if record["seq"] % 50 == 40:  # an output that is quiet for longer than snapshots are apart
            return [(REJECTS, "", {"digest": digest})]
        if record["kind"] != "frame":
            tick = {
                "kind": record["kind"],
                "recv_ts_ns": 0,
                "clock_ts_ns": 0,
                "routes": {},
                "trade_ts_ms": {},
                "quote_ts_ms": {},
                "depth_ts_ms": {},
                "payload": record["payload"].decode(),
            }
            return [(TICKS, "", tick)]
        return [(ROWS, "S", {"src": record["seq"] // 7 % 2, "digest": digest}) for _ in range(record["seq"] % 3)]


class ToyFeature(Digest):
    inputs: ClassVar[tuple[str, ...]] = (TICKS, ROWS)
    outputs: ClassVar[tuple[str, ...]] = (OFI, EVENTS)

    def step(self, topic: str, record: Record) -> list[Emit]:
        digest = self.roll(topic, record["seq"], record["sub"], record.get("digest"))
        emits: list[Emit] = [(EVENTS, "", {"digest": digest})] if topic == TICKS else []
        return emits + [(OFI, "S", {"digest": digest}) for _ in range(record["seq"] % 2 + (topic == ROWS))]


class ToySignal(Digest):
    inputs: ClassVar[tuple[str, ...]] = (TICKS, OFI, EVENTS)
    outputs: ClassVar[tuple[str, ...]] = (SIGNALS,)

    def step(self, topic: str, record: Record) -> list[Emit]:
        return [(SIGNALS, "S", {"digest": self.roll(topic, record["seq"], record["sub"], record.get("digest"))})]


OUTPUTS = (TICKS, ROWS, REJECTS, OFI, EVENTS, SIGNALS)
STAGES = {"normaliser": ToyNormaliser, "ofi": ToyFeature, "signal": ToySignal}


async def record_journal(log: MemoryLog, codecs: Codecs, seed: int, count: int) -> JournalWriter:
    """A journal with restarts of the recorder in it."""
    rng = random.Random(seed)
    journal = JournalWriter(log, codecs, "", list(range(12)))
    await journal.open("s1", 1)
    session = msgspec.json.encode({"type": "session", "session": "s1"})
    for partition in range(12):
        journal.append(partition, journal_record("config", 1, payload=session), 1)
    for number in range(count):
        partition = rng.choice(PARTITIONS_USED)
        kind = "tick" if rng.random() < 0.2 else "frame"
        payload = msgspec.json.encode({"session": "s1", "n": number})
        journal.append(partition, journal_record(kind, 1, payload=payload), 1)
        if rng.random() < 0.05:
            await journal.flush()
    for partition in range(12):
        journal.append(partition, journal_record("end", 1, payload=b"{}"), 1)
    await journal.flush()
    return journal


def runtime(
    log: MemoryLog, codecs: Codecs, name: str, snapshot_sec: float, fingerprint: str = "f", rebuild: bool = False
) -> ProcessorRuntime:
    kind = STAGES[name]
    spec = ServiceSpec(name, kind.inputs, kind.outputs, fingerprint)
    options = RuntimeOptions(
        snapshot_sec=snapshot_sec, poll_wait_ms=1, max_poll_records=7, max_buffered=40, rebuild=rebuild
    )
    wanted = frozenset({0}) if name == "ofi" else None  # of runs of rows, every second is of no use to it
    return ProcessorRuntime(log, codecs, spec, options, lambda _: kind(), wanted, ROWS)


async def canonical(log: MemoryLog, topic: str) -> dict[int, list[tuple[int, int, bytes]]]:
    views = {}
    for partition in range(12):
        tp = TP(topic, partition)
        end = (await log.end_offsets([tp]))[tp]
        last, view = (-1, -1), []
        for record in (await read_ranges(log, {tp: (0, end)}))[tp]:
            if record.value is None:
                continue
            place = peek(record.value)[:2]
            if place > last:
                last = place
                view.append((*place, record.value))
        views[partition] = view
    return views


class FailingLog(MemoryLog):
    """Fails some writes of services, having stored them or not, as a broker that dies at the wrong moment."""

    def __init__(self, seed: int, failures: int) -> None:
        super().__init__()
        self._rng = random.Random(seed)
        self.left = failures

    async def send(self, batch: Batch, tp: TP) -> asyncio.Future[int]:
        if tp.topic == JOURNAL or not self.left or self._rng.random() > 0.02:
            return await super().send(batch, tp)
        self.left -= 1
        if self._rng.random() < 0.5:
            await super().send(batch, tp)
        raise BrokerAwayError(f"{tp.topic}[{tp.partition}]: a batch was not acknowledged")


async def run_pipeline(seed: int, kills: int, failures: int = 0) -> dict[str, dict[int, list[tuple[int, int, bytes]]]]:
    rng = random.Random(seed)
    log, codecs = FailingLog(seed, failures), make_codecs()
    writing = asyncio.create_task(record_journal(log, codecs, 1, 400))
    running: dict[str, tuple[ProcessorRuntime, asyncio.Task[None]]] = {}

    def start(slot: str) -> None:
        service = runtime(log, codecs, slot.split("/")[0], rng.choice([0.0, 0.004, 0.05, 10.0]))
        running[slot] = (service, asyncio.create_task(service.run()))

    for name in STAGES:
        start(name)
    for _ in range(kills):
        for _ in range(rng.randrange(1, 60)):
            await asyncio.sleep(0)
        slot = rng.choice(sorted(running))
        service, task = running[slot]
        if rng.random() < 0.25:  # graceful
            service.stop()
        else:  # as SIGKILL: wherever it is, nothing flushed
            task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        del running[slot]
        if rng.random() < 0.3:  # scaled out: another member, which takes half of the partitions over
            slots = [slot.split("/")[0] + "/2", slot]
        else:
            slots = [slot]
        for each in slots:
            if each not in running:
                start(each)
    await writing

    async with asyncio.timeout(300):
        while True:
            ended: dict[str, set[int]] = {}
            for slot, (service, task) in running.items():
                if task.done():
                    task.result()
                owned = {number for number, each in service.tasks.items() if each.settled}
                ended.setdefault(slot.split("/")[0], set()).update(owned)
            if all(len(ended.get(name, ())) == 12 for name in STAGES):
                break
            await asyncio.sleep(0.001)
    assert not log.left, "nothing failed: the test shows nothing"
    for service, _ in running.values():
        service.stop()
    await asyncio.gather(*(task for _, task in running.values()))
    return {topic: await canonical(log, topic) for topic in OUTPUTS}


@pytest.fixture(scope="module")
def undisturbed() -> dict[str, dict[int, list[tuple[int, int, bytes]]]]:
    return asyncio.run(run_pipeline(0, 0))


def test_the_undisturbed_run_is_whole(undisturbed: dict[str, dict[int, list[tuple[int, int, bytes]]]]) -> None:
    assert sum(map(len, undisturbed[SIGNALS].values())) > 400
    assert all(len(undisturbed[TICKS][partition]) >= 2 for partition in range(12))


@pytest.mark.parametrize("seed", range(1, 1 + int(os.environ.get("ORDERFLOW_SEEDS", "24"))))
async def test_killed_anywhere_the_outputs_are_the_same(
    seed: int, undisturbed: dict[str, dict[int, list[tuple[int, int, bytes]]]]
) -> None:
    disturbed = await run_pipeline(seed, 12)
    for topic, views in undisturbed.items():
        for partition, view in views.items():
            assert disturbed[topic][partition] == view, (topic, partition)


@pytest.mark.parametrize("seed", range(1, 9))
async def test_a_broker_that_fails_writes_is_survived_without_a_restart(
    seed: int, undisturbed: dict[str, dict[int, list[tuple[int, int, bytes]]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("orderflow.streaming.runtime.RETRY_FIRST_SEC", 0.001)
    monkeypatch.setattr("orderflow.streaming.runtime.RETRY_MOST_SEC", 0.002)
    assert await run_pipeline(seed, 0, failures=6) == undisturbed


class KeepingLog(MemoryLog):
    """Remembers every record that was ever appended to an output, whatever retention does."""

    def __init__(self) -> None:
        super().__init__()
        self.kept: dict[TP, list[tuple[int, int, bytes]]] = {}

    def append(self, batch: Batch, tp: TP) -> int:
        if tp.topic in OUTPUTS:
            assert isinstance(batch, MemoryBatch)
            kept = self.kept.setdefault(tp, [])
            kept += [(*peek(value)[:2], value) for _, value, _, _ in batch.records if value is not None]
        return super().append(batch, tp)

    def views(self) -> dict[str, dict[int, list[tuple[int, int, bytes]]]]:
        return {topic: {number: self.kept.get(TP(topic, number), []) for number in range(12)} for topic in OUTPUTS}


async def until_settled(*services: ProcessorRuntime) -> None:
    """Run services until all their partitions are at the end, then stop them in good order."""
    running = [asyncio.create_task(each.run()) for each in services]
    async with asyncio.timeout(300):
        while not all(sum(task.settled for task in each.tasks.values()) == 12 for each in services):
            for task in running:
                assert not task.done(), task.result()
            await asyncio.sleep(0.001)
    for each in services:
        each.stop()
    await asyncio.gather(*running)


async def lineages(log: MemoryLog, name: str) -> list[int]:
    found = await load_newest(log, [TP(f"state.{name}", partition) for partition in range(12)])
    return [each.commit.lineage if each is not None else -1 for each in found.values()]


async def retire(log: MemoryLog, rng: random.Random, topics: tuple[str, ...], *, most: float) -> None:
    """Let retention take a part of each topic."""
    tps = [TP(topic, partition) for topic in topics for partition in range(12)]
    for tp, end in (await log.end_offsets(tps)).items():
        log.trim(tp, int(end * rng.uniform(0, most)))


@pytest.mark.parametrize("seed", range(1, 1 + int(os.environ.get("ORDERFLOW_SEEDS", "24"))))
async def test_computed_anew_nothing_is_written_twice(
    seed: int, undisturbed: dict[str, dict[int, list[tuple[int, int, bytes]]]]
) -> None:
    """A rebuild at any moment, settings changed or not, killed on its way, over what retention left of the topics."""
    rng = random.Random(seed)
    log, codecs = KeepingLog(), make_codecs()
    writing = asyncio.create_task(record_journal(log, codecs, 1, 400))
    trimmed = rng.random() < 0.5
    services = [runtime(log, codecs, name, rng.choice([0.0, 0.004])) for name in STAGES]
    running = [asyncio.create_task(each.run()) for each in services]
    for _ in range(rng.choice([30, 150, 600, 4000])):
        await asyncio.sleep(0)
    for service, task in zip(services, running, strict=True):
        if trimmed:  # by a retention of days: what it takes a snapshot has seen
            service.stop()
        else:
            task.cancel()
    await asyncio.gather(*running, return_exceptions=True)
    await writing
    if trimmed:  # inputs at different ages; and outputs, of which a quiet one may be gone wholly
        await retire(log, rng, (JOURNAL, *OUTPUTS), most=0.7)
        await retire(log, rng, (REJECTS,), most=1.4)
    before = log.views()
    before = {topic: {number: [*view] for number, view in views.items()} for topic, views in before.items()}
    anew = {name: rng.choice(["f", "g"]) for name in STAGES}
    began = {name: await lineages(log, name) for name in STAGES}
    for _ in range(rng.randrange(4)):  # killed on the way
        name = rng.choice(sorted(STAGES))
        task = asyncio.create_task(runtime(log, codecs, name, 0.0, anew[name], rebuild=True).run())
        for _ in range(rng.randrange(1, 400)):
            await asyncio.sleep(0)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
    await until_settled(*(runtime(log, codecs, name, 0.01, anew[name], rebuild=True) for name in STAGES))
    await until_settled(*(runtime(log, codecs, name, 0.01, anew[name]) for name in STAGES))

    for name in STAGES:
        assert all(now > then for now, then in zip(await lineages(log, name), began[name], strict=True) if then >= 0)
    for topic, views in log.views().items():
        for partition, view in views.items():
            places = [each[:2] for each in view]
            assert places == sorted(set(places)), (topic, partition)
            held = before[topic][partition]
            assert view[: len(held)] == held == undisturbed[topic][partition][: len(held)]
            if not trimmed:
                assert view == undisturbed[topic][partition], (topic, partition)


async def test_asked_for_once_a_partition_is_computed_anew_once(
    undisturbed: dict[str, dict[int, list[tuple[int, int, bytes]]]],
) -> None:
    """The settings are those of the snapshot; a rebalance afterwards goes on from where the rebuild stood."""
    log, codecs = KeepingLog(), make_codecs()
    await record_journal(log, codecs, 1, 400)
    await until_settled(*(runtime(log, codecs, name, 0.01) for name in STAGES))
    service = runtime(log, codecs, "normaliser", 0.01, rebuild=True)
    running = asyncio.create_task(service.run())

    async def owned(count: int) -> None:
        async with asyncio.timeout(300):
            while not (
                service.ready and len(service.tasks) == count and all(t.settled for t in service.tasks.values())
            ):
                assert not running.done(), running.result()
                await asyncio.sleep(0.001)

    await owned(12)
    assert service.stats.suppressed == sum(
        len(view) for topic in (TICKS, ROWS, REJECTS) for view in undisturbed[topic].values()
    )
    other = runtime(log, codecs, "normaliser", 0.01)
    beside = asyncio.create_task(other.run())
    await owned(6)
    other.stop()
    await beside
    await owned(12)
    service.stop()
    await running
    assert await lineages(log, "normaliser") == [1] * 12
    assert log.views() == undisturbed


async def test_an_input_made_anew_is_not_computed_over() -> None:
    """Its records would be numbered below what the outputs hold, and be suppressed without a word."""
    log, codecs = MemoryLog(), make_codecs()
    await record_journal(log, codecs, 1, 400)
    await until_settled(runtime(log, codecs, "normaliser", 0.01))
    for partition in range(12):
        log._records.pop(TP(JOURNAL, partition))
    await record_journal(log, codecs, 2, 10)
    for rebuild in (False, True):
        with pytest.raises(
            LogError, match=r"the topic was made anew or lost records; restore it, or set another TOPIC_PREFIX$"
        ):
            await runtime(log, codecs, "normaliser", 0.01, rebuild=rebuild).run()


async def test_a_marker_behind_filtered_records_alone_is_kept() -> None:
    """It will not be read again: a merge that forgot it would stand still, for ever where the session has ended."""
    codecs = make_codecs()
    task = runtime(MemoryLog(), codecs, "ofi", 0.01).make_task(0)
    row = codecs.encoder(ROWS)({"seq": 500, "sub": 0, "src": 1, "digest": ""})
    marker = ((PROGRESS_HEADER, b"510"),)
    await task.push(ROWS, [MemoryRecord(0, 1, b"", row, ()), MemoryRecord(1, 1, b"", None, marker)])
    rows = next(each for each in task.positions() if each.topic == ROWS)
    assert (rows.next_offset, rows.progress) == (2, 510)


class StuckHourlyLog(MemoryLog):
    """Never acknowledges what goes to the hourly snapshots."""

    def __init__(self) -> None:
        super().__init__()
        self.asked = asyncio.Event()

    async def send(self, batch: Batch, tp: TP) -> asyncio.Future[int]:
        if tp.topic != HOURLY:
            return await super().send(batch, tp)
        self.asked.set()
        return asyncio.get_running_loop().create_future()


async def test_an_hours_snapshot_is_durable_before_the_state_that_takes_it_as_written() -> None:
    log, codecs = StuckHourlyLog(), make_codecs()
    await record_journal(log, codecs, 1, 400)
    running = asyncio.create_task(runtime(log, codecs, "normaliser", 0.0).run())
    async with asyncio.timeout(150):
        await log.asked.wait()
    for _ in range(300):
        await asyncio.sleep(0)
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
    assert await lineages(log, "normaliser") == [-1] * 12, "a restart would never write this hour's"


async def test_begun_behind_an_open_that_retention_took_a_superseded_recorder_is_passed_over() -> None:
    log, codecs = MemoryLog(), make_codecs()
    first, second = (JournalWriter(log, codecs, "", list(range(12))) for _ in range(2))
    await first.open("s1", 1)
    first.append(0, journal_record("frame", 1, payload=b"{}"), 1)
    await first.flush()
    await second.open("s1", 2)
    tp = TP(JOURNAL, 0)
    cut = (await log.end_offsets([tp]))[tp]
    first.append(0, journal_record("frame", 1, payload=b"late"), 1)
    with pytest.raises(FencedError):  # it learns of it when the record is stored
        await first.flush()
    second.append(0, journal_record("tick", 1, payload=b"true"), 1)
    second.append(0, journal_record("end", 1, payload=b"{}"), 1)
    await second.flush()
    log.trim(tp, cut)
    service = runtime(log, codecs, "normaliser", 0.01)
    running = asyncio.create_task(service.run())
    async with asyncio.timeout(150):
        while not (0 in service.tasks and service.tasks[0].settled):
            assert not running.done(), running.result()
            await asyncio.sleep(0.001)
    service.stop()
    await running
    assert service.tasks[0].epoch == 2
    assert [place[:2] for place in (await canonical(log, TICKS))[0]] == [(2, 0), (3, 0)]
