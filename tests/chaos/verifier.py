"""The outside judge of a run: knows topics, the lake and their rules, and imports nothing of the services.

    python -m tests.chaos.verifier --bootstrap HOST:PORT --registry URL --prefix PREFIX --out DIR [--save FILE] [--as FILE]

It reads every topic to its end and every file, and says whether anything is lost, repeated, out of order or different
from an undisturbed run. The rules are those of DESIGN §3, §4 and §13:

* the journal's numbers have no gap within the view of the newest epoch;
* the view of a derived topic rises strictly in `(seq, sub)`; what is there twice is the same, byte for byte;
* nothing new comes at or below a progress marker that stands before it;
* one tick per tick, command, config and end of the journal; one OFI record per quote and depth row, one CVD record per
  trade, one fusion record per OFI or CVD record, one signal per fusion record;
* the lake, the raw frames, the JSON Lines and the SQLite database hold each record of their topic once;
* the database holds it with every value of its fields, under its session, typed, with the key that its readers rely on.
"""

from __future__ import annotations

import argparse
import asyncio
import gzip
import hashlib
import io
import json
import sqlite3
import sys
import urllib.request
from collections import Counter
from collections.abc import Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import fastavro
import pyarrow.parquet as pq
from aiokafka import AIOKafkaConsumer, TopicPartition

PARTITIONS = 12
JOURNAL = "market.journal"
TICKS = "market.ticks"
ROWS = "market.rows"
SIGNALS = "signals"
DERIVED = (
    TICKS,
    ROWS,
    "market.events",
    "quality.rejects",
    "features.ofi",
    "features.cvd",
    "features.fusion",
    "features.events",
    SIGNALS,
)
TICK_KINDS = ("tick", "command", "config", "end")
LAKE_KINDS = {
    "ofi": ("features.ofi", None),
    "cvd": ("features.cvd", None),
    "fusion": ("features.fusion", None),
    "signals": ("signals", None),
    "prices": (ROWS, "aggTrade"),
    "quotes": (ROWS, "bookTicker"),
    "book": (ROWS, "depth"),
}
"""Kind of Parquet file -> (topic, `src` of the rows that it holds)."""
FILE_TREES = ("data", "signals")
DATABASE = "signals/signals.sqlite"
KEY = ["session", "symbol", "seq", "sub"]
READ_SEC = 900.0
SHOWN = 20
"""Problems of one rule that are listed; the rest is counted."""

Place = tuple[int, int]


@dataclass
class Verdict:
    """What was found. `hashes`: topic[partition] -> sha256 over key and body of its view; `files`: path -> sha256."""

    problems: list[str] = field(default_factory=list)
    hashes: dict[str, str] = field(default_factory=dict)
    files: dict[str, str] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)
    duplicates: int = 0
    """Physical records that are no part of a view: retries, zombies, re-runs."""
    stale: int = 0
    """Journal records of an epoch that had been taken over."""
    markers: int = 0
    leftovers: int = 0
    """Temporary files of writers that died and whose folder was not written to again."""

    def note(self, problem: str) -> None:
        self.problems.append(problem)

    @property
    def records(self) -> int:
        return sum(self.counts.values())


class Schemas:
    """Writers' schemas by id, from the registry."""

    def __init__(self, url: str) -> None:
        self._url = url.rstrip("/")
        self._known: dict[int, Any] = {}

    def decode(self, value: bytes) -> dict[str, Any]:
        if value[:1] != b"\0":
            raise ValueError(f"not Confluent's wire format: {value[:8]!r}")
        number = int.from_bytes(value[1:5], "big")
        if number not in self._known:
            with urllib.request.urlopen(f"{self._url}/schemas/ids/{number}", timeout=10) as answer:
                self._known[number] = fastavro.parse_schema(json.loads(json.load(answer)["schema"]))
        body = io.BytesIO(value)
        body.seek(5)
        record: dict[str, Any] = fastavro.schemaless_reader(body, self._known[number], None)
        if body.tell() != len(value):
            raise ValueError(f"{len(value) - body.tell()} bytes behind the record")
        return record


class PartitionJudge:
    """Follows one topic partition record by record."""

    def __init__(self, verdict: Verdict, topic: str, partition: int, schemas: Schemas) -> None:
        self.verdict = verdict
        self.name = f"{topic}[{partition}]"
        self.journal = topic == JOURNAL
        self.topic = topic
        self.decode = schemas.decode
        self.digest = hashlib.sha256()
        self.last: Place = (0, 0) if self.journal else (-1, -1)
        self.bodies: dict[Place, bytes] = {}
        self.promised = -1
        self.epoch = 0
        self.view: list[tuple[int, int, str, str]] = []
        """(seq, sub, symbol, kind or src)"""
        self.sessions: list[tuple[int, str]] = []
        """Of the journal: from which seq on each session goes."""
        self.rows: dict[Place, bytes] = {}
        """Of the signals: a digest of the values."""

    def take(self, record: Any) -> None:
        headers = {name: value.decode() for name, value in record.headers}
        if record.value is None:
            self.verdict.markers += 1
            self.promised = max(self.promised, int(headers["progress"]))
            return
        decoded = self.decode(record.value)
        if self.journal and not self._current(int(headers["epoch"]), decoded):
            return
        seq = decoded["seq"]
        place = (seq, 0) if self.journal else (seq, decoded["sub"])
        body = hashlib.sha256(bytes(record.key or b"") + b"\0" + record.value[5:]).digest()
        if place <= self.last:
            self.verdict.duplicates += 1
            if self.bodies.get(place, body if self.journal and seq <= 0 else b"") != body:
                self.verdict.note(
                    f"{self.name}: seq {place} at offset {record.offset} differs from the first of its place"
                )
            return
        if self.journal and seq != self.last[0] + 1:
            self.verdict.note(f"{self.name}: the journal has a hole, {seq} follows {self.last[0]}")
        if seq <= self.promised:
            self.verdict.note(f"{self.name}: seq {place} is new, and a marker had promised {self.promised}")
        self.last = place
        self.bodies[place] = body
        self.digest.update(body)
        kind = decoded.get("kind") or decoded.get("src") or ""
        if self.journal and kind == "config":
            self._note_session(seq, decoded.get("payload") or b"{}")
        if self.topic == SIGNALS:
            self.rows[place] = row_digest(decoded)
        self.view.append((*place, (record.key or b"").decode(), kind))

    def _note_session(self, seq: int, payload: bytes) -> None:
        content = json.loads(payload)
        if content.get("type") == "session":
            self.sessions.append((seq, content["session"]))

    def session_at(self, seq: int) -> str:
        return next((session for first, session in reversed(self.sessions) if first <= seq), "")

    def _current(self, epoch: int, decoded: dict[str, Any]) -> bool:
        if epoch < self.epoch:
            self.verdict.stale += 1
            return False
        self.epoch = epoch
        return bool(decoded["kind"] != "open")


async def read_topics(
    bootstrap: str, prefix: str, schemas: Schemas, verdict: Verdict
) -> dict[tuple[str, int], PartitionJudge]:
    """Every topic from its oldest record to what is its end now."""
    consumer = AIOKafkaConsumer(bootstrap_servers=bootstrap, enable_auto_commit=False, auto_offset_reset="earliest")
    await consumer.start()
    try:
        judges = {
            (topic, number): PartitionJudge(verdict, topic, number, schemas)
            for topic in (JOURNAL, *DERIVED)
            for number in range(PARTITIONS)
        }
        by_tp = {TopicPartition(prefix + topic, number): judge for (topic, number), judge in judges.items()}
        consumer.assign(list(by_tp))
        ends = await consumer.end_offsets(list(by_tp))
        await consumer.seek_to_beginning(*by_tp)
        behind = {tp for tp in by_tp if ends[tp]}
        async with asyncio.timeout(READ_SEC):
            while behind:
                for tp, records in (await consumer.getmany(timeout_ms=200)).items():
                    for record in records:
                        by_tp[tp].take(record)
                for tp in list(behind):
                    if await consumer.position(tp) >= ends[tp]:
                        behind.discard(tp)
        return judges
    finally:
        await consumer.stop()


def judge_completeness(judges: dict[tuple[str, int], PartitionJudge], verdict: Verdict) -> None:
    """What each record must have caused, by partition and seq."""

    def per_seq(topic: str, number: int, kinds: tuple[str, ...] = ()) -> Counter[int]:
        view = judges[topic, number].view
        return Counter(seq for seq, _, _, kind in view if not kinds or kind in kinds)

    for number in range(PARTITIONS):
        ofi, cvd = per_seq("features.ofi", number), per_seq("features.cvd", number)
        fusion = per_seq("features.fusion", number)
        for name, expected, found in (
            (TICKS, per_seq(JOURNAL, number, TICK_KINDS), per_seq(TICKS, number)),
            ("features.ofi", per_seq(ROWS, number, ("bookTicker", "depth")), ofi),
            ("features.cvd", per_seq(ROWS, number, ("aggTrade",)), cvd),
            ("features.fusion", ofi + cvd, fusion),
            ("signals", fusion, per_seq("signals", number)),
        ):
            lost, repeated = expected - found, found - expected
            if lost:
                verdict.note(f"{name}[{number}]: {lost.total()} records lost, the first at seq {min(lost)}")
            if repeated:
                verdict.note(f"{name}[{number}]: {repeated.total()} records too many, the first at seq {min(repeated)}")
        last = judges[JOURNAL, number].last[0]
        for topic in DERIVED:
            if judges[topic, number].last[0] > last:
                verdict.note(f"{topic}[{number}] goes to seq {judges[topic, number].last[0]}, the journal to {last}")


def judge_lake(judges: dict[tuple[str, int], PartitionJudge], out: Path, verdict: Verdict) -> None:
    """Each record of a topic once in its files, and nothing else."""
    for kind, (topic, source) in LAKE_KINDS.items():
        expected = Counter(
            (symbol, seq, sub)
            for number in range(PARTITIONS)
            for seq, sub, symbol, src in judges[topic, number].view
            if source is None or src == source
        )
        found: Counter[tuple[str, int, int]] = Counter()
        for path in (out / "data" / "ofi_cvd").glob(f"date=*/symbol=*/kind={kind}/*.parquet"):
            symbol = path.parent.parent.name.removeprefix("symbol=")
            table = pq.ParquetFile(path).read(columns=["seq", "sub"])
            found.update((symbol, seq, sub) for seq, sub in zip(*(column.to_pylist() for column in table.columns)))
        compare_places(f"lake kind={kind}", expected, found, verdict)
    expected = Counter(
        (symbol, seq, sub) for number in range(PARTITIONS) for seq, sub, symbol, _ in judges["signals", number].view
    )
    found = Counter()
    for path in (out / "signals").rglob("*.jsonl"):
        for line in path.read_text("utf-8").splitlines():
            record = json.loads(line)
            found[record["symbol"], record["seq"], record["sub"]] += 1
    compare_places("signals as JSON Lines", expected, found, verdict)
    raw = sum(_lines(path) for path in (out / "data" / "raw").rglob("*.ndjson*"))
    journal = sum(len(judges[JOURNAL, number].view) for number in range(PARTITIONS))
    if raw != journal:
        verdict.note(f"raw frames: {raw} lines for {journal} journal records")


def row_digest(row: dict[str, Any]) -> bytes:
    """Of a signal's values as SQLite can hold them: flags are numbers, NaN is null, -0.0 is 0.0."""
    values = sorted(row.items())
    plain = [(name, (None if value != value else value + 0) if is_number(value) else value) for name, value in values]
    return hashlib.sha256(json.dumps(plain).encode()).digest()


def is_number(value: Any) -> bool:
    return isinstance(value, int | float)


def judge_database(judges: dict[tuple[str, int], PartitionJudge], out: Path, verdict: Verdict) -> None:
    """Each signal once, whole, under its session; `files` gets the hash of the rows in the key's order."""
    path = out / DATABASE
    if not path.exists():
        verdict.note(f"there is no {DATABASE}")
        return
    with closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as database:
        try:
            said = [row[0] for row in database.execute("PRAGMA integrity_check")]
        except sqlite3.DatabaseError as error:
            said = [str(error)]
        if said != ["ok"]:
            verdict.note(f"{DATABASE} is damaged: {said[:3]}")
            return
        mode = database.execute("PRAGMA journal_mode").fetchone()[0]
        columns = database.execute("PRAGMA table_info(signals)").fetchall()
        key = [name for _, name in sorted((place, name) for _, name, _, _, _, place in columns if place)]
        if mode != "wal" or key != KEY:
            verdict.note(f"{DATABASE} is in mode {mode} and has the key {key}")
        judge_rows(judges, [name for _, name, *_ in columns], database, verdict)


def judge_rows(
    judges: dict[tuple[str, int], PartitionJudge], names: Sequence[str], database: sqlite3.Connection, verdict: Verdict
) -> None:
    """Compare the rows of the database with the topic."""
    expected = {
        (judges[JOURNAL, number].session_at(seq), symbol, seq, sub): judges[SIGNALS, number].rows[seq, sub]
        for number in range(PARTITIONS)
        for seq, sub, symbol, _ in judges[SIGNALS, number].view
    }
    found: Counter[tuple[str, str, int, int]] = Counter()
    whole = hashlib.sha256()
    differing = 0
    for values in database.execute(f"SELECT * FROM signals ORDER BY {', '.join(KEY)}"):
        row = dict(zip(names, values, strict=True))
        place = (row.pop("session"), row["symbol"], row["seq"], row["sub"])
        row["gate_reasons"] = json.loads(row["gate_reasons"])
        digest = row_digest(row)
        found[place] += 1
        differing += expected.get(place, digest) != digest
        whole.update(repr(place).encode() + digest)
    compare_places(DATABASE, Counter(list(expected)), found, verdict)
    if differing:
        verdict.note(f"{DATABASE}: {differing} rows have other values than the topic")
    verdict.files[DATABASE] = whole.hexdigest()


def compare_places(name: str, expected: Counter[Any], found: Counter[Any], verdict: Verdict) -> None:
    for text, difference in (("lost", expected - found), ("repeated or made up", found - expected)):
        if difference:
            verdict.note(f"{name}: {difference.total()} rows {text}, the first {min(difference)}")


def _lines(path: Path) -> int:
    if path.suffix == ".gz":
        with gzip.open(path, "rb") as file:
            return sum(1 for _ in file)
    if path.suffix == ".zst":
        import zstandard

        with path.open("rb") as raw, zstandard.ZstdDecompressor().stream_reader(raw, read_across_frames=True) as file:
            return sum(1 for _ in io.BufferedReader(file))
    with path.open("rb") as plain:
        return sum(1 for _ in plain)


def judge_files(out: Path, verdict: Verdict) -> None:
    for tree in FILE_TREES:
        for path in sorted((out / tree).rglob("*")):
            if path.is_file() and not str(path.relative_to(out)).startswith(DATABASE):
                if path.name.startswith("."):
                    verdict.leftovers += 1
                else:
                    verdict.files[str(path.relative_to(out))] = hashlib.sha256(path.read_bytes()).hexdigest()


def verify(bootstrap: str, registry: str, prefix: str, out: Path, *, database: bool = True) -> Verdict:
    """Judge a run that is over; `database`: whether signals were to be written to SQLite too."""
    verdict = Verdict()
    judges = asyncio.run(read_topics(bootstrap, prefix, Schemas(registry), verdict))
    for (topic, number), judge in judges.items():
        verdict.hashes[f"{topic}[{number}]"] = judge.digest.hexdigest()
        verdict.counts[topic] = verdict.counts.get(topic, 0) + len(judge.view)
    judge_completeness(judges, verdict)
    judge_lake(judges, out, verdict)
    judge_files(out, verdict)
    if database:
        judge_database(judges, out, verdict)
    return verdict


def compare(verdict: Verdict, reference: Verdict) -> None:
    """Add what differs from an undisturbed run to the problems."""
    for name, expected in reference.hashes.items():
        if verdict.hashes.get(name) != expected:
            verdict.note(f"{name}: not the bytes of the undisturbed run")
    for path in sorted(reference.files.keys() | verdict.files.keys()):
        if verdict.files.get(path) != reference.files.get(path):
            there = "missing" if path not in verdict.files else "not in the undisturbed run"
            both = path in verdict.files and path in reference.files
            verdict.note(f"{path}: {'other bytes than in the undisturbed run' if both else there}")


def total_hash(verdict: Verdict) -> str:
    """One hash over every topic and every file."""
    text = json.dumps([sorted(verdict.hashes.items()), sorted(verdict.files.items())])
    return hashlib.sha256(text.encode()).hexdigest()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("--bootstrap", "--registry", "--prefix"):
        parser.add_argument(name, required=True)
    parser.add_argument("--out", type=Path, required=True, help="folder of the lake")
    parser.add_argument("--save", type=Path, help="write the verdict, for a later --as")
    parser.add_argument("--as", dest="reference", type=Path, help="verdict of the undisturbed run")
    args = parser.parse_args()
    verdict = verify(args.bootstrap, args.registry, args.prefix, args.out)
    if args.reference:
        compare(verdict, Verdict(**json.loads(args.reference.read_text("utf-8"))))
    if args.save:
        args.save.write_text(json.dumps(asdict(verdict)), "utf-8")
    print(f"{verdict.records} records, {verdict.duplicates} physical duplicates, hash {total_hash(verdict)}")
    for problem in verdict.problems[:SHOWN]:
        print(f"PROBLEM {problem}")
    return 1 if verdict.problems else 0


if __name__ == "__main__":
    sys.exit(main())
