"""A sample of `make chaos`, and the verifier itself: what it must find, it finds."""

from __future__ import annotations

import math
import random
import sqlite3
from collections import Counter
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest

from tests.chaos import faults
from tests.chaos.faults import SERVICES, Bench
from tests.chaos.verifier import (
    DATABASE,
    JOURNAL,
    SIGNALS,
    PartitionJudge,
    Schemas,
    Verdict,
    compare,
    compare_places,
    judge_completeness,
    judge_database,
    row_digest,
)

SEED = 11


class PlainSchemas(Schemas):
    """Values that are a list of fields as text, so that the judge's rules are tested without a registry."""

    def __init__(self) -> None:
        super().__init__("")

    def decode(self, value: bytes) -> dict[str, Any]:
        kind, seq, sub = value[5:].decode().split()[:3]
        return {"kind": kind, "seq": int(seq), "sub": int(sub)}


def record(text: str | None, *, epoch: int = 1, progress: int = 0) -> Any:
    value = None if text is None else b"\0\0\0\0\1" + text.encode()
    headers = (("epoch", str(epoch).encode()), ("progress", str(progress).encode()))
    return SimpleNamespace(value=value, key=b"BTCUSDT", headers=headers, offset=0)


def judged(topic: str, *records: Any) -> Verdict:
    verdict = Verdict()
    judge = PartitionJudge(verdict, topic, 0, PlainSchemas())
    for each in records:
        judge.take(each)
    return verdict


def test_a_sound_partition_passes_with_its_duplicates_counted() -> None:
    verdict = judged(
        "features.ofi",
        record("row 1 0 a"),
        record("row 1 1 b"),
        record(None, progress=1),
        record("row 1 1 b"),
        record("row 2 0 c"),
    )
    assert verdict.problems == []
    assert (verdict.duplicates, verdict.markers) == (1, 1)


@pytest.mark.parametrize(
    ("records", "problem"),
    [
        ((record("row 1 0 a"), record("row 1 0 b")), "differs from the first"),
        ((record("row 2 0 a"), record("row 1 0 b")), "differs from the first"),
        ((record(None, progress=5), record("row 5 0 a")), "a marker had promised 5"),
    ],
)
def test_an_unsound_partition_is_named(records: tuple[Any, ...], problem: str) -> None:
    (found,) = judged("features.ofi", *records).problems
    assert problem in found
    assert found.startswith("features.ofi[0]")


def test_the_journal_is_judged_by_epoch_and_numbers() -> None:
    sound = judged(
        "market.journal",
        record("open -1 0", epoch=1),
        record("frame 1 0", epoch=1),
        record("open -1 0", epoch=2),
        record("frame 2 0 zombie", epoch=1),
        record("frame 2 0", epoch=2),
    )
    assert (sound.problems, sound.stale) == ([], 1)
    assert "has a hole, 3 follows 1" in judged("market.journal", record("frame 1 0"), record("frame 3 0")).problems[0]


def test_what_is_lost_or_too_much_is_counted() -> None:
    verdict = Verdict()
    judges: dict[tuple[str, int], Any] = {
        (topic, number): SimpleNamespace(view=[], last=(9, 0))
        for topic in ("market.journal", *faults_topics())
        for number in range(12)
    }
    judges["market.rows", 3].view += [(4, 0, "BTCUSDT", "depth"), (5, 0, "BTCUSDT", "depth")]
    judges["features.ofi", 3].view += [(4, 0, "BTCUSDT", "")]
    judges["features.fusion", 3].view += [(4, 0, "BTCUSDT", ""), (4, 1, "BTCUSDT", "")]
    judges["signals", 3].view += [(4, 0, "BTCUSDT", ""), (4, 1, "BTCUSDT", "")]
    judge_completeness(judges, verdict)
    assert verdict.problems == [
        "features.ofi[3]: 1 records lost, the first at seq 5",
        "features.fusion[3]: 1 records too many, the first at seq 4",
    ]
    compare_places("lake", Counter({("S", 1, 0): 1}), Counter({("S", 1, 0): 2}), verdict)
    assert verdict.problems[-1] == "lake: 1 rows repeated or made up, the first ('S', 1, 0)"


def faults_topics() -> tuple[str, ...]:
    from tests.chaos.verifier import DERIVED

    return DERIVED


def test_other_bytes_than_undisturbed_are_named() -> None:
    verdict = Verdict(hashes={"signals[0]": "a"}, files={"data/x": "1", "data/more": "2"})
    compare(verdict, Verdict(hashes={"signals[0]": "b"}, files={"data/x": "0", "data/less": "3"}))
    assert len(verdict.problems) == 4
    assert verdict.problems[0] == "signals[0]: not the bytes of the undisturbed run"


class OneSignal:
    """Judges of a run whose only signal is at seq 4 of partition 3, and the database that holds it."""

    signal: ClassVar[dict[str, Any]] = {
        "seq": 4, "sub": 1, "symbol": "BTCUSDT", "score": -0.0, "consistency": math.nan, "confirm": True,
        "gate_reasons": ["spread", "é"],
    }  # fmt: skip
    columns = "session TEXT, symbol TEXT, seq INTEGER, sub INTEGER, score REAL, consistency REAL, confirm INTEGER"

    def __init__(self, out: Path, key: str = "session, symbol, seq, sub") -> None:
        self.out = out
        self.judges: dict[tuple[str, int], Any] = {
            (topic, number): PartitionJudge(Verdict(), topic, number, PlainSchemas())
            for topic in (JOURNAL, SIGNALS)
            for number in range(12)
        }
        self.judges[JOURNAL, 3].sessions = [(1, "s1"), (9, "s2")]
        self.judges[SIGNALS, 3].view = [(4, 1, "BTCUSDT", "")]
        self.judges[SIGNALS, 3].rows = {(4, 1): row_digest(self.signal)}
        (out / "signals").mkdir(parents=True)
        with closing(sqlite3.connect(out / DATABASE)) as database:
            database.execute("PRAGMA journal_mode = WAL")
            database.execute(
                f"CREATE TABLE signals ({self.columns}, gate_reasons TEXT, PRIMARY KEY ({key})) WITHOUT ROWID"
            )
            database.execute("""INSERT INTO signals VALUES ('s1', 'BTCUSDT', 4, 1, 0.0, NULL, 1, '["spread", "é"]')""")
            database.commit()

    def problems(self, change: str = "") -> list[str]:
        verdict = Verdict()
        with closing(sqlite3.connect(self.out / DATABASE)) as database:
            database.execute(change or "SELECT 1")
            database.commit()
        judge_database(self.judges, self.out, verdict)
        return verdict.problems


def test_a_database_that_holds_the_signals_passes(tmp_path: Path) -> None:
    assert OneSignal(tmp_path).problems() == []


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ("DELETE FROM signals", "1 rows lost, the first ('s1', 'BTCUSDT', 4, 1)"),
        ("UPDATE signals SET session = 's2'", "1 rows repeated or made up, the first ('s2', 'BTCUSDT', 4, 1)"),
        ("UPDATE signals SET confirm = 0", "1 rows have other values than the topic"),
        ("""UPDATE signals SET gate_reasons = '["spread"]'""", "1 rows have other values than the topic"),
        ("PRAGMA journal_mode = DELETE", "is in mode delete"),
    ],
)
def test_a_database_with_anything_else_is_named(change: str, problem: str, tmp_path: Path) -> None:
    problems = OneSignal(tmp_path).problems(change)
    assert any(problem in each for each in problems), problems


def test_a_database_that_is_missing_damaged_or_of_another_key_is_named(tmp_path: Path) -> None:
    run = OneSignal(tmp_path / "key", "symbol, session, seq, sub")
    assert "has the key ['symbol', 'session', 'seq', 'sub']" in run.problems()[0]
    verdict = Verdict()
    judge_database(run.judges, tmp_path / "nowhere", verdict)
    assert verdict.problems == ["there is no signals/signals.sqlite"]
    with (run.out / DATABASE).open("r+b") as file:
        file.seek(4096)
        file.write(b"\xff" * 4096)
    damaged = Verdict()
    judge_database(run.judges, run.out, damaged)
    assert "is damaged" in damaged.problems[0]


@pytest.fixture
def bench(captures: Path, tmp_path: Path) -> Iterator[Bench]:
    made = Bench(tmp_path, captures, random.Random(SEED), {"points": "snapshot-half,recovering", "rounds": 6})
    yield made
    made.close()


@pytest.mark.kafka
@pytest.mark.capture
@pytest.mark.slow
def test_a_sample_of_the_matrix_and_of_random_kills(bench: Bench) -> None:
    faults.matrix(bench)
    faults.kills(bench)
    assert bench.problems == []
    assert set(bench.figures["matrix"]["recovering"]) == set(SERVICES)
    assert set(bench.figures["matrix"]["snapshot-half"].values()) == {"ok"}
    assert bench.figures["kills"]["kills"] == 6
