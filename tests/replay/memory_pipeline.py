"""The stages of the pipeline as their services run them, over an in-memory log: real capture, real snapshots, no broker."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from pathlib import Path

from orderflow.config import Config, load
from orderflow.pipeline import STAGES
from orderflow.streaming.codec import PREFIX_BYTES, Codecs
from orderflow.streaming.figures import StageFigures
from orderflow.streaming.journal import EPOCH_HEADER
from orderflow.streaming.log import TP
from orderflow.streaming.memory_log import MemoryLog
from orderflow.streaming.recorder import journal_record
from orderflow.streaming.runtime import ProcessorRuntime, RuntimeOptions, ServiceSpec
from orderflow.topics import DERIVED, JOURNAL, PARTITIONS, ROWS
from orderflow.verify import canonical

from tests.bench.data import Dataset, build

FRAMES = 1800
"""More journal records than the small capture gives."""
EPOCHS = (1, 2, 3)
"""The recorder was restarted twice; see `write_journal`."""

View = dict[tuple[str, int], list[tuple[int, int, bytes | None, bytes]]]


@dataclass
class Pipeline:
    """A log that holds a journal, everything computed from it, and the snapshots on the way."""

    log: MemoryLog
    codecs: Codecs
    config: Config
    data: Dataset


def dataset(capture: Path) -> Dataset:
    """The journal of a capture, ended on every partition as the recorder does."""
    data = build("alts", capture, FRAMES)
    encode, decode = data.codecs.encoder(JOURNAL), data.codecs.decoder(JOURNAL)
    newest_ns = max(decode(entries[-1][1])["recv_ts_ns"] for entries in data.topics[JOURNAL].values())
    for partition in range(PARTITIONS):
        seq = data.journal_seqs[partition] = data.journal_seqs.get(partition, 0) + 1
        end = {**journal_record("end", newest_ns, payload=b"{}"), "seq": seq}
        data.topics[JOURNAL].setdefault(partition, []).append((b"", encode(end)))
    return data


async def append(log: MemoryLog, tp: TP, key: bytes, value: bytes | None, headers: list[tuple[str, bytes]]) -> None:
    batch = log.batch()
    batch.append(key, value, 1, headers)
    await log.send(batch, tp)


async def write_journal(log: MemoryLog, data: Dataset, prefix: str = "") -> None:
    """The journal under three epochs; each recorder that was superseded still writes a little, as zombies do."""
    encode = data.codecs.encoder(JOURNAL)
    for partition, entries in data.topics[JOURNAL].items():
        tp = TP(prefix + JOURNAL, partition)
        third = len(entries) // len(EPOCHS) + 1
        for number, epoch in enumerate(EPOCHS):
            headers = [(EPOCH_HEADER, str(epoch).encode())]
            old = [(EPOCH_HEADER, str(epoch - 1).encode())]
            opening = encode({**journal_record("open", 1, epoch=epoch, session="s"), "seq": -1})
            await append(log, tp, b"", opening, headers)
            part = entries[number * third : (number + 1) * third]
            for place, (key, value) in enumerate(part):
                if epoch > 1 and place < 5:
                    stale = encode({**data.codecs.decoder(JOURNAL)(value), "kind": "frame", "payload": b'{"void":1}'})
                    await append(log, tp, key, stale, old)
                await append(log, tp, key, value, headers)


def runtime(
    pipeline: Pipeline, name: str, options: RuntimeOptions, figures: StageFigures | None = None
) -> ProcessorRuntime:
    stage = next(stage for stage in STAGES if stage.name == name)
    spec = ServiceSpec(name, stage.inputs, stage.outputs, stage.fingerprint(pipeline.config))
    make = stage.make
    return ProcessorRuntime(
        pipeline.log,
        pipeline.codecs,
        spec,
        options,
        lambda partition: make(pipeline.config, partition),
        stage.row_filter,
        ROWS,
        figures,
    )


def options(**more: object) -> RuntimeOptions:
    """Few records a poll and a snapshot after each, so that there are some in every part of the journal."""
    return RuntimeOptions(snapshot_sec=1e-9, poll_wait_ms=1, max_poll_records=20, **more)  # type: ignore[arg-type]


async def run_until_settled(runtimes: list[ProcessorRuntime]) -> None:
    running = [asyncio.create_task(each.run()) for each in runtimes]
    try:
        async with asyncio.timeout(600):
            while not all(len(each.tasks) == PARTITIONS and each.drained for each in runtimes):
                for task in running:
                    if task.done():
                        task.result()
                await asyncio.sleep(0.001)
    finally:
        for each in runtimes:
            each.stop()
        await asyncio.gather(*running)


async def live(data: Dataset) -> Pipeline:
    """The whole pipeline over a journal."""
    pipeline = Pipeline(MemoryLog(), data.codecs, load({}), data)
    await write_journal(pipeline.log, data)
    await run_until_settled([runtime(pipeline, stage.name, options()) for stage in STAGES])
    return pipeline


async def view(log: MemoryLog, prefix: str = "", from_seq: int = 0, to_seq: int = 1 << 62) -> View:
    """The canonical view of every derived topic partition, between two seqs."""
    found: View = {}
    for topic in DERIVED:
        for partition in range(PARTITIONS):
            records = found[topic, partition] = []
            async for chunk in canonical(log, TP(prefix + topic, partition)):
                for seq, sub, record in chunk:
                    if from_seq <= seq <= to_seq:
                        assert record.value is not None
                        records.append((seq, sub, record.key, record.value[PREFIX_BYTES:]))
    return found
