"""What one process costs: codec, step and whole service, per record, on one core."""

from __future__ import annotations

import asyncio
import struct
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from orderflow.pipeline import STAGES, Stage
from orderflow.processor import Record
from orderflow.streaming.codec import Decoder, Encoder
from orderflow.streaming.figures import STAGE_FIGURES
from orderflow.streaming.log import TP
from orderflow.streaming.memory_log import MemoryLog
from orderflow.streaming.runtime import PROGRESS_HEADER, ProcessorTask, Stats
from orderflow.streaming.writer import Writer
from orderflow.topics import BY_NAME, DERIVED, JOURNAL, ROWS, TICKS

from tests.bench.data import Dataset, Entry

CODEC_RECORDS = 3000
MIN_RECORDS = 100
"""Of fewer records of a kind no figure is given."""
POLL_RECORDS = 4000
STAMP_MS = 1_700_000_000_000


@dataclass(frozen=True, slots=True)
class Figure:
    """One measured value. `better` is "less" or "more"; `aim` in the same unit."""

    name: str
    value: float
    unit: str
    better: str = "less"
    aim: float | None = None
    detail: str = ""


def calibrate() -> float:
    """Seconds of a fixed piece of work, so that figures of different hours or machines can be set against each other.

    Of the kind that the stages do: small records made, packed and taken apart, on more memory than the nearest cache.
    """
    pack = struct.Struct("<12d").pack
    begun = time.process_time()
    held: list[dict[str, float]] = [{} for _ in range(2000)]
    for number in range(30_000):
        record = dict.fromkeys("abcdefghijkl", number * 0.5)
        held[number % 2000] = record
        packed = pack(*record.values())
        assert packed[:8] == packed[8:16]
    return time.process_time() - begun


def codec_figures(data: Dataset) -> list[Figure]:
    """Microseconds to encode and to decode a record of each schema."""
    figures = []
    for topic in (JOURNAL, *DERIVED):
        values = [value for entries in data.topics[topic].values() for _, value in entries][-CODEC_RECORDS:]
        if len(values) < MIN_RECORDS:
            continue
        decode, encode = data.codecs.decoder(topic), data.codecs.encoder(topic)
        records = [decode(value) for value in values]
        for name, work, items in (("encode", encode, records), ("decode", decode, values)):
            figures.append(Figure(f"codec.{name}.{BY_NAME[topic].schema}", _mean_us(work, items), "us"))
    return figures


def _mean_us(work: Encoder | Decoder, items: Sequence[Any]) -> float:
    begun = time.process_time()
    for item in items:
        work(item)
    return (time.process_time() - begun) / len(items) * 1e6


STEP_AIMS_US = {"ofi": 100.0, "cvd": 50.0, "fusion": 50.0}


def step_figures(data: Dataset) -> list[Figure]:
    """Microseconds of `Processor.step` by stage and kind of record: mean, p50 and p99 of wall time."""
    figures = []
    for stage in STAGES:
        times = _step_times(data, stage)
        for kind in sorted(times):
            ordered = sorted(times[kind])
            name = f"step.{stage.name}.{kind}"
            aim = STEP_AIMS_US.get(stage.name)
            detail = f"{len(ordered):,} records"
            figures += [
                Figure(f"{name}.mean", sum(ordered) / len(ordered) / 1e3, "us", detail=detail),
                Figure(f"{name}.p50", ordered[len(ordered) // 2] / 1e3, "us"),
                Figure(f"{name}.p99", ordered[int(len(ordered) * 0.99)] / 1e3, "us", aim=aim),
            ]
    return figures


def _step_times(data: Dataset, stage: Stage) -> dict[str, list[int]]:
    times: dict[str, list[int]] = {}
    clock = time.perf_counter_ns
    for partition, merged in _merged(data, stage).items():
        processor = stage.make(data.config, partition)
        for topic, record in merged:
            begun = clock()
            processor.step(topic, record)
            times.setdefault(_kind(topic, record), []).append(clock() - begun)
    return {kind: found for kind, found in times.items() if len(found) >= MIN_RECORDS}


def _kind(topic: str, record: Record) -> str:
    if topic == JOURNAL:
        if record["kind"] != "frame":
            return str(record["kind"])
        stream = bytes(record["payload"][:64]).partition(b"@")[2].partition(b'"')[0]
        return stream.partition(b"@")[0].decode()
    if topic == TICKS:
        return "tick"
    return str(record.get("src") or topic.rpartition(".")[2])


def _merged(data: Dataset, stage: Stage) -> dict[int, list[tuple[str, Record]]]:
    """The stage's inputs per partition in the order (seq, rank, sub), decoded."""
    merged: dict[int, list[tuple[tuple[int, int, int], str, Record]]] = {}
    for rank, topic in enumerate(stage.inputs):
        decode = data.codecs.decoder(topic)
        for partition, entries in data.topics[topic].items():
            for _, value in entries:
                record = decode(value)
                if topic == ROWS and stage.row_sources is not None and record["src"] not in stage.row_sources:
                    continue
                place = (record["seq"], rank, record.get("sub", 0))
                merged.setdefault(partition, []).append((place, topic, record))
    return {
        partition: [(topic, record) for _, topic, record in sorted(items, key=lambda item: item[0])]
        for partition, items in sorted(merged.items())
    }


SERVICE_AIMS = {"ofi": 60_000.0}


def service_figures(data: Dataset) -> list[Figure]:
    """Records per second and core through the real task: read, merge, decode, step, encode, append, send."""
    return [
        Figure(
            f"service.{stage.name}",
            asyncio.run(_service_rate(data, stage)),
            "records/s",
            "more",
            SERVICE_AIMS.get(stage.name),
        )
        for stage in STAGES
    ]


async def _service_rate(data: Dataset, stage: Stage) -> float:
    log = MemoryLog()
    positions: dict[TP, int] = {}
    for topic in stage.inputs:
        for partition, seq in data.journal_seqs.items():
            await _fill(log, TP(topic, partition), data.topics[topic].get(partition, []), seq)
            positions[TP(topic, partition)] = 0
    writer, stats = Writer(log), Stats()
    figures = STAGE_FIGURES[stage.name](stage.name) if stage.name in STAGE_FIGURES else None

    def task(partition: int) -> ProcessorTask:
        make = stage.make
        made = ProcessorTask(
            partition, lambda number: make(data.config, number), data.codecs, stats, writer, str, figures
        )
        made.row_filter, made.filtered_topic = stage.row_filter, ROWS
        return made

    tasks = {partition: task(partition) for partition in data.journal_seqs}
    reader = await log.reader(positions)
    begun = time.process_time()
    while got := await reader.poll(0, POLL_RECORDS):
        for tp, records in got.items():
            await tasks[tp.partition].push(tp.topic, records)
        for each in tasks.values():
            await each.advance(POLL_RECORDS)
        await writer.ship()
    for each in tasks.values():
        while await each.advance(POLL_RECORDS):
            await writer.ship()
    await writer.flush()
    spent = time.process_time() - begun
    _check_all_taken(data, stage, stats)
    return stats.records_in / spent


async def _fill(log: MemoryLog, tp: TP, entries: Sequence[Entry], newest_seq: int) -> None:
    batch = log.batch()
    for key, value in entries:
        if not batch.append(key, value, STAMP_MS):
            await log.send(batch, tp)
            batch = log.batch()
            batch.append(key, value, STAMP_MS)
    if tp.topic != JOURNAL and not batch.append(b"", None, STAMP_MS, [(PROGRESS_HEADER, b"%d" % newest_seq)]):
        raise AssertionError("a marker fits any batch")
    await log.send(batch, tp)


def _check_all_taken(data: Dataset, stage: Stage, stats: Stats) -> None:
    """A rate counts only where the outputs are what the dataset holds."""
    for topic in stage.outputs:
        expected = sum(len(entries) for entries in data.topics[topic].values())
        if stats.by_topic_out.get(topic, 0) != expected:
            raise AssertionError(f"{stage.name} wrote {stats.by_topic_out.get(topic, 0)} of {expected} {topic} records")


GROUPS: dict[str, Callable[[Dataset], list[Figure]]] = {
    "codec": codec_figures,
    "step": step_figures,
    "service": service_figures,
}
