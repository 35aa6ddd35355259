"""A journal rebuilt from the lake's raw files, for when Kafka's retention has passed."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import Final

import zstandard

from orderflow.errors import OrderflowError
from orderflow.lake.layout import RAW_ROOT
from orderflow.lake.raw import raw_record
from orderflow.processor import Record
from orderflow.streaming.codec import Codecs
from orderflow.streaming.journal import EPOCH_HEADER
from orderflow.streaming.log import TP, Log
from orderflow.streaming.recorder import journal_record
from orderflow.streaming.writer import Writer
from orderflow.topics import JOURNAL

EPOCH: Final = 1
"""Of the one turn that writes a rebuilt journal."""
SHIP_RECORDS: Final = 2000
_NAME: Final = re.compile(r"part-(.+)-p(\d\d)-(\d+)-(\d+)\.ndjson\.zst")


@dataclass(frozen=True, slots=True)
class _Cut:
    """The raw files of one cut of one partition: one for each date of receipt."""

    first_seq: int
    last_seq: int
    session: str
    paths: tuple[Path, ...]


def raw_cuts(root: Path) -> dict[int, list[_Cut]]:
    """The cuts of each partition in the order of the journal.

    Raises
    ------
    OrderflowError
        There are no raw files.
    """
    grouped: dict[tuple[int, int, int, str], list[Path]] = {}
    for path in sorted((root / RAW_ROOT).glob("date=*/partition=*/part-*.ndjson.zst")):
        found = _NAME.fullmatch(path.name)
        if found is not None:
            key = (int(found[2]), int(found[3]), int(found[4]), found[1])
            grouped.setdefault(key, []).append(path)
    if not grouped:
        raise OrderflowError(
            f"--from-lake {root}: there are no files {RAW_ROOT}/date=*/partition=*/part-*.ndjson.zst below it; name the "
            "folder of a run, or DATA_DIR of the lake service"
        )
    cuts: dict[int, list[_Cut]] = {}
    for (partition, first_seq, last_seq, session), paths in sorted(grouped.items()):
        cuts.setdefault(partition, []).append(_Cut(first_seq, last_seq, session, tuple(paths)))
    return cuts


def journal_of(cuts: list[_Cut], partition: int) -> Iterator[Record]:
    """The journal records of one partition, in order, each once.

    Raises
    ------
    OrderflowError
        A record is missing or there twice with different content, or a file is damaged.
    """
    last: Record | None = None
    for cut in cuts:
        for record in _records(cut):
            seq = record["seq"]
            if last is None or seq == last["seq"] + 1:
                last = record
                yield record
            elif seq > last["seq"]:
                raise OrderflowError(
                    f"the raw files of partition {partition} lack seq {last['seq'] + 1} to {seq - 1}, before "
                    f"{cut.paths[0]}: restore the file that held them"
                )
            elif seq == last["seq"] and record != last:
                raise OrderflowError(
                    f"{cut.paths[0]}: seq {seq} of partition {partition} is not what an earlier file says: the folder "
                    "holds the files of two journals; name one that holds those of one"
                )


def _records(cut: _Cut) -> list[Record]:
    """The records of a cut by seq: around midnight its files interleave."""
    records: list[Record] = []
    for path in cut.paths:
        try:
            with path.open("rb") as file, zstandard.ZstdDecompressor().stream_reader(file) as reader:
                records.extend(raw_record(line) for line in BufferedReader(reader))
        except (OSError, ValueError, KeyError, zstandard.ZstdError) as error:
            raise OrderflowError(f"{path} can't be read: {error}; restore it from a copy") from error
    records.sort(key=lambda record: int(record["seq"]))
    return records


async def rebuild_journal(log: Log, codecs: Codecs, prefix: str, root: Path) -> dict[int, int]:
    """Write the journal that raw files hold to `prefix`; returns how many records each partition got.

    Values are those of the old journal to the byte; the epoch begins anew, and Kafka's timestamps are of now.

    Raises
    ------
    OrderflowError
        As `raw_cuts` and `journal_of`.
    LogError
        The broker does not take them.
    """
    encode = codecs.encoder(JOURNAL)
    writer = Writer(log)
    headers = [(EPOCH_HEADER, str(EPOCH).encode())]
    written: dict[int, int] = {}
    for partition, cuts in raw_cuts(root).items():
        tp = TP(prefix + JOURNAL, partition)
        now_ns = time.time_ns()
        opening = journal_record("open", now_ns, epoch=EPOCH, session=cuts[0].session)
        writer.append(tp, b"", encode({**opening, "seq": -1}), now_ns // 1_000_000, headers)
        for count, record in enumerate(journal_of(cuts, partition), 1):
            symbol = record["symbol"]
            writer.append(tp, symbol.encode() if symbol else b"", encode(record), now_ns // 1_000_000, headers)
            written[partition] = count
            if count % SHIP_RECORDS == 0:
                await writer.ship()
        await writer.ship()
    await writer.flush()
    return written
