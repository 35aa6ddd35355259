"""Kill the sinks service anywhere, let zombies write: the database and the JSON Lines are those of an undisturbed run.

The real sink runs over the in-memory log. It is killed in two ways: at every passage of every named place of a cut, one
after another, and at random moments, where a write that is under way goes on in its thread and ends as a zombie's,
beside the successor's.
"""

from __future__ import annotations

import asyncio
import os
import random
import sqlite3
from pathlib import Path
from typing import Any

import msgspec
import pytest
from orderflow.config import SinksConfig
from orderflow.lake import files
from orderflow.lake.layout import SIGNALS_DATABASE, LakeError, avro_fields
from orderflow.lake.signals import SignalSink
from orderflow.lake.sqlite import SignalDatabase
from orderflow.streaming import crash
from orderflow.streaming.codec import Codecs, schema_text
from orderflow.streaming.log import TP
from orderflow.streaming.memory_log import MemoryLog
from orderflow.streaming.runtime import PROGRESS_HEADER, RuntimeOptions, ServiceSpec
from orderflow.streaming.sinks import SinkRuntime
from orderflow.streaming.writer import Writer
from orderflow.topics import PARTITIONS, SIGNALS, TICKS

T0_MS = 1_721_347_200_000
SYMBOLS = {0: ("BTCUSDT", "ETHUSDT"), 5: ("币安/USDT",)}
"""By partition; the others have a session and an end."""
FRAMES = 120
STEP_MS = 2_900
"""Between frames: a cut every 20 of them."""
PLACES = (
    "polled", "rows-inserted", "rows-committed", "file-temporary", "file-renamed", "cut-written",
    "snapshot-half", "snapshot-written", "committed",
)  # fmt: skip

Content = tuple[list[tuple[Any, ...]], dict[str, bytes]]


class KilledError(BaseException):
    """Nothing between the place and the process may catch it."""


@pytest.fixture(autouse=True, scope="module")
def quick_disk() -> Any:
    """Hundreds of runs: what reaches the disk when is not looked at here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(files.os, "fsync", lambda descriptor: None)
        yield


def codecs() -> Codecs:
    async def by_id(number: int) -> str:
        raise AssertionError(f"no other writer's schema is in play, {number} was asked for")

    return Codecs({TICKS: 1, SIGNALS: 2}, {TICKS: schema_text("tick"), SIGNALS: schema_text("signal")}, by_id)


def tick(seq: int, at_ms: int, kind: str = "tick", payload: str | None = None) -> dict[str, Any]:
    at_ns = at_ms * 1_000_000
    maps: dict[str, Any] = {name: {} for name in ("routes", "trade_ts_ms", "quote_ts_ms", "depth_ts_ms")}
    return {"seq": seq, "sub": 0, "kind": kind, "recv_ts_ns": at_ns, "clock_ts_ns": at_ns, "payload": payload, **maps}


def signal(rng: random.Random, seq: int, sub: int, symbol: str, at_ms: int) -> dict[str, Any]:
    made: dict[str, Any] = {}
    for name, avro in avro_fields(SIGNALS).items():
        nullable = isinstance(avro, list)
        kind = next(branch for branch in avro if branch != "null") if nullable else avro
        if nullable and rng.random() < 0.2:
            made[name] = None
        elif isinstance(kind, dict):
            made[name] = (
                rng.choice(kind["symbols"]) if kind["type"] == "enum" else rng.choices("ab", k=rng.randrange(3))
            )
        else:
            made[name] = {
                "long": rng.randrange(10**12), "int": 1, "double": rng.choice((rng.gauss(0, 1), 3.0)),
                "boolean": rng.random() < 0.5, "string": "é",
            }[kind]  # fmt: skip
    return made | {"seq": seq, "sub": sub, "symbol": symbol, "recv_ts_ms": at_ms, "signal_id": f"{symbol}-{seq}-{sub}"}


async def write_topics(log: MemoryLog) -> None:
    """Ticks and signals as the services before write them, some of them twice, with markers between."""
    rng, both, writer = random.Random(7), codecs(), Writer(log)
    for partition in range(PARTITIONS):
        session = msgspec.json.encode({"type": "session", "session": "s1"}).decode()
        places: list[tuple[str, dict[str, Any]]] = [(TICKS, tick(1, T0_MS, "config", session))]
        seq = 1
        for number in range(FRAMES if partition in SYMBOLS else 0):
            at_ms = T0_MS + number * STEP_MS
            seq += 1
            symbol = rng.choice(SYMBOLS[partition])
            places += [(SIGNALS, signal(rng, seq, sub, symbol, at_ms)) for sub in range(rng.choice((0, 1, 1, 3)))]
            if number % 3 == 2:
                seq += 1
                places.append((TICKS, tick(seq, at_ms + 1)))
        places.append((TICKS, tick(seq + 1, T0_MS + FRAMES * STEP_MS, "end", "{}")))
        for topic, record in places:
            value = both.encoder(topic)(record)
            for _ in range(1 + (rng.random() < 0.1)):
                writer.append(TP(topic, partition), b"", value, 1)
        for topic in (TICKS, SIGNALS):
            writer.append(TP(topic, partition), b"", None, 1, [(PROGRESS_HEADER, str(seq + 1).encode())])
    await writer.flush()


def service(
    log: MemoryLog, root: Path, chosen: tuple[str, ...] = ("jsonl", "sqlite"), *, rebuild: bool = False
) -> SinkRuntime:
    """A process of its own: its own connection to the database."""
    database = SignalDatabase(root, pause_sec=0.0)
    return SinkRuntime(
        log,
        codecs(),
        ServiceSpec("sinks", SignalSink.inputs, (), "f"),
        RuntimeOptions(poll_wait_ms=1, max_poll_records=13, max_buffered=60, rebuild=rebuild),
        lambda partition: SignalSink(root, partition, SinksConfig(signal_sink=",".join(chosen)), database),
    )


async def until_settled(runtime: SinkRuntime, running: asyncio.Task[None]) -> None:
    async with asyncio.timeout(300):
        while not running.done() and sum(task.settled for task in runtime.tasks.values()) < PARTITIONS:
            await asyncio.sleep(0.001)


async def ended(runtime: SinkRuntime, running: asyncio.Task[None]) -> None:
    await until_settled(runtime, running)
    runtime.stop()
    await running
    assert runtime.write_errors == 0


def content(root: Path) -> Content:
    """The database's rows, its copy by VACUUM INTO, and every file of JSON Lines."""
    reader = sqlite3.connect(f"file:{root / SIGNALS_DATABASE}?mode=ro", uri=True)
    rows = reader.execute("SELECT * FROM signals ORDER BY session, symbol, seq, sub").fetchall()
    assert reader.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
    copy = root / "copy.sqlite"
    reader.execute("VACUUM INTO ?", (str(copy),))
    reader.close()
    lines = {
        str(path.relative_to(root)): path.read_bytes()
        for path in sorted((root / "signals").rglob("*.jsonl"))
        if not path.name.startswith(".")
    }
    return rows, {"copy.sqlite": copy.read_bytes(), **lines}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Content:
    async def run(root: Path) -> None:
        log = MemoryLog()
        await write_topics(log)
        runtime = service(log, root)
        await ended(runtime, asyncio.create_task(runtime.run()))

    root = tmp_path_factory.mktemp("undisturbed")
    asyncio.run(run(root))
    return content(root)


def test_the_undisturbed_run_is_whole(undisturbed: Content) -> None:
    rows, kept = undisturbed
    places = [row[:4] for row in rows]
    assert len(places) == len(set(places)) > 250
    assert sum(data.count(b"\n") for name, data in kept.items() if name.endswith(".jsonl")) == len(rows)
    assert len(kept) > 15


@pytest.mark.parametrize("place", PLACES)
async def test_killed_at_every_passage_of_a_place(
    place: str, undisturbed: Content, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each passage kills one process; its successor goes on and dies at its own, until one comes to the end."""
    log = MemoryLog()
    await write_topics(log)

    def die(name: str) -> None:
        raise KilledError(name)

    monkeypatch.setattr(crash, "die", die)
    deaths = 0
    for life in range(1, 40):
        # The first dies at the first passage, the next at the second: with every start the place lies further on.
        crash.arm({crash.ENVIRONMENT: f"{place}:{life}"})
        runtime = service(log, tmp_path)
        running = asyncio.create_task(runtime.run())
        await until_settled(runtime, running)
        if not running.done():
            runtime.stop()
            await asyncio.gather(running, return_exceptions=True)
        if running.exception() is None:
            break
        assert isinstance(running.exception(), KilledError)
        deaths += 1
    else:
        raise AssertionError("no life came to its end")
    crash.arm({})
    assert deaths >= 2
    assert content(tmp_path) == undisturbed


@pytest.mark.parametrize("seed", range(1, 1 + int(os.environ.get("ORDERFLOW_SEEDS", "6"))))
async def test_killed_at_random_with_zombies_the_files_are_the_same(
    seed: int, undisturbed: Content, tmp_path: Path
) -> None:
    rng = random.Random(seed)
    log = MemoryLog()
    await write_topics(log)
    killed = 0
    for _ in range(12):
        lives = [service(log, tmp_path) for _ in range(rng.choice((1, 1, 2)))]
        running = [asyncio.create_task(each.run()) for each in lives]
        for _ in range(rng.randrange(1, 400)):
            await asyncio.sleep(0)
        for each, task in zip(lives, running, strict=True):
            if rng.random() < 0.2:
                each.stop()
            else:  # as SIGKILL, but that a write under way goes on in its thread
                killed += not task.done()
                task.cancel()
        await asyncio.gather(*running, return_exceptions=True)
    runtime = service(log, tmp_path)
    await ended(runtime, asyncio.create_task(runtime.run()))
    # Zombies' threads, before their folder is looked at.
    await asyncio.get_running_loop().shutdown_default_executor()
    assert killed > 5
    assert content(tmp_path) == undisturbed


async def run_to_end(log: MemoryLog, root: Path, chosen: tuple[str, ...], *, rebuild: bool = False) -> None:
    runtime = service(log, root, chosen, rebuild=rebuild)
    await ended(runtime, asyncio.create_task(runtime.run()))


def retire_first_minutes(log: MemoryLog) -> None:
    """Retention takes the record that names the session, and of the signals less than of the ticks."""
    for partition in SYMBOLS:
        log.trim(TP(TICKS, partition), 15)
        log.trim(TP(SIGNALS, partition), 5)


def database_rows(root: Path) -> list[tuple[Any, ...]]:
    reader = sqlite3.connect(f"file:{root / SIGNALS_DATABASE}?mode=ro", uri=True)
    rows = reader.execute("SELECT * FROM signals ORDER BY session, symbol, seq, sub").fetchall()
    reader.close()
    return rows


def lines(root: Path) -> list[bytes]:
    return [line for path in sorted(root.rglob("*.jsonl")) for line in path.read_bytes().splitlines()]


async def test_a_lost_database_is_written_again(undisturbed: Content, tmp_path: Path) -> None:
    """The settings are those of before: only what was asked for tells a rebuild from a restart."""
    log = MemoryLog()
    await write_topics(log)
    await run_to_end(log, tmp_path, ("sqlite",))
    for suffix in ("", "-wal", "-shm"):
        (tmp_path / (SIGNALS_DATABASE + suffix)).unlink(missing_ok=True)
    runtime = service(log, tmp_path, ("sqlite",), rebuild=True)
    killed = asyncio.create_task(runtime.run())
    async with asyncio.timeout(150):
        while not runtime.ready:
            await asyncio.sleep(0)
    killed.cancel()  # before anything is cut: the start without the flag has to go on all the same
    await asyncio.gather(killed, return_exceptions=True)
    await run_to_end(log, tmp_path, ("sqlite",))
    assert database_rows(tmp_path) == undisturbed[0]
    await run_to_end(log, tmp_path, ("sqlite",), rebuild=True)
    retire_first_minutes(log)
    await run_to_end(log, tmp_path, ("sqlite",), rebuild=True)
    assert database_rows(tmp_path) == undisturbed[0]


@pytest.mark.parametrize("trimmed", [False, True])
async def test_json_lines_are_not_written_anew_beside_those_that_are_there(
    trimmed: bool, undisturbed: Content, tmp_path: Path
) -> None:
    log = MemoryLog()
    await write_topics(log)
    chosen = ("jsonl", "sqlite")
    await run_to_end(log, tmp_path, chosen)
    held = lines(tmp_path)
    if trimmed:
        retire_first_minutes(log)
    with pytest.raises(LakeError, match=r"STATE_REBUILD=true would write into .*signals/jsonl, which holds files of p"):
        await run_to_end(log, tmp_path, chosen, rebuild=True)
    assert (lines(tmp_path), database_rows(tmp_path)) == (held, undisturbed[0])
    (tmp_path / "signals" / "jsonl").rename(tmp_path / "away")
    await run_to_end(log, tmp_path, chosen, rebuild=True)
    again = lines(tmp_path / "signals")
    assert len(again) == len(set(again))
    assert set(again) < set(held) if trimmed else again == held
    assert database_rows(tmp_path) == undisturbed[0]
    with pytest.raises(LakeError, match="start without STATE_REBUILD: it goes on"):
        await run_to_end(log, tmp_path, chosen, rebuild=True)
    await run_to_end(log, tmp_path, chosen)
    assert lines(tmp_path / "signals") == again
