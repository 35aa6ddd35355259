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
from orderflow.errors import LogError
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
from orderflow.streaming.snapshots import Restored, load_newest
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
    assert runtime.cuts_failed == 0


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


async def topics(*, cut: bool = False) -> MemoryLog:
    """A log with what the services before have written; `cut`: retention has taken the begin of it."""
    log = MemoryLog()
    await write_topics(log)
    if cut:
        retire_first_minutes(log)
    return log


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Content:
    return run_undisturbed(tmp_path_factory.mktemp("undisturbed"), cut=False)


@pytest.fixture(scope="module")
def undisturbed_cut(tmp_path_factory: pytest.TempPathFactory) -> Content:
    """Of a first start on inputs that retention has cut."""
    return run_undisturbed(tmp_path_factory.mktemp("cut"), cut=True)


def run_undisturbed(root: Path, *, cut: bool) -> Content:
    async def run() -> None:
        runtime = service(await topics(cut=cut), root)
        await ended(runtime, asyncio.create_task(runtime.run()))

    asyncio.run(run())
    return content(root)


def test_the_undisturbed_run_is_whole(undisturbed: Content) -> None:
    rows, kept = undisturbed
    places = [row[:4] for row in rows]
    assert len(places) == len(set(places)) > 250
    assert sum(data.count(b"\n") for name, data in kept.items() if name.endswith(".jsonl")) == len(rows)
    assert len(kept) > 15


@pytest.mark.parametrize("cut", [False, True])
@pytest.mark.parametrize("place", PLACES)
async def test_killed_at_every_passage_of_a_place(
    place: str,
    cut: bool,
    undisturbed: Content,
    undisturbed_cut: Content,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Each passage kills one process; its successor goes on and dies at its own, until one comes to the end."""
    log = await topics(cut=cut)

    def die(name: str) -> None:
        raise KilledError(name)

    monkeypatch.setattr(crash, "die", die)
    deaths = 0
    for life in range(1, 60):
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
    assert content(tmp_path) == (undisturbed_cut if cut else undisturbed)


@pytest.mark.parametrize("cut", [False, True])
@pytest.mark.parametrize("seed", range(1, 1 + int(os.environ.get("ORDERFLOW_SEEDS", "6"))))
async def test_killed_at_random_with_zombies_the_files_are_the_same(
    seed: int, cut: bool, undisturbed: Content, undisturbed_cut: Content, tmp_path: Path
) -> None:
    rng = random.Random(seed)
    log = await topics(cut=cut)
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
    assert content(tmp_path) == (undisturbed_cut if cut else undisturbed)


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


# -- state that is lost -------------------------------------------------------------------------------------------


STATE = "state.sinks"
GROUP = "orderflow.sinks"


async def lose_state(log: MemoryLog) -> None:
    tps = [TP(STATE, partition) for partition in range(PARTITIONS)]
    for tp, end in (await log.end_offsets(tps)).items():
        log.trim(tp, end)


async def snapshots(log: MemoryLog) -> list[Restored | None]:
    return list((await load_newest(log, [TP(STATE, partition) for partition in range(PARTITIONS)])).values())


@pytest.mark.parametrize("cut", [(TICKS, SIGNALS), (TICKS,), (SIGNALS,)])
async def test_state_lost_and_inputs_cut_nothing_is_written_beside_the_files_that_are_there(
    cut: tuple[str, ...], undisturbed: Content, tmp_path: Path
) -> None:
    """Where one input alone is cut, files would be replaced by such with fewer rows."""
    log = await topics()
    await run_to_end(log, tmp_path, ("jsonl",))
    held = lines(tmp_path)
    await lose_state(log)
    for topic in cut:
        log.trim(TP(topic, 5), 15)
    with pytest.raises(LakeError) as caught:
        await run_to_end(log, tmp_path, ("jsonl",))
    folder = tmp_path / "signals" / "jsonl"
    for words in (
        f"sinks: {STATE}[5] holds no snapshot to go on from",
        f"of {'signals' if SIGNALS in cut else 'market.ticks'}[5] all before offset 15 has expired: to begin there would",
        f"write into {folder}, which holds files of partition 5 already (signals-s1-p05-",
        "their rows would be written twice, or replaced by fewer. Set another DATA_DIR, or move",
        "under another TOPIC_PREFIX than '', set that one",
    ):
        assert words in str(caught.value)
    assert lines(tmp_path) == held
    folder.rename(tmp_path / "away")
    await run_to_end(log, tmp_path, ("jsonl",))
    again = lines(tmp_path / "signals")
    assert len(again) == len(set(again))
    assert set(again) < set(held) if SIGNALS in cut else set(again) == set(held)
    await run_to_end(log, tmp_path, ("jsonl",))
    assert lines(tmp_path / "signals") == again


async def test_state_lost_on_whole_inputs_the_same_files_are_written_again(
    undisturbed: Content, tmp_path: Path
) -> None:
    log = await topics()
    await run_to_end(log, tmp_path, ("jsonl", "sqlite"))
    await lose_state(log)
    await run_to_end(log, tmp_path, ("jsonl", "sqlite"))
    assert content(tmp_path) == undisturbed


async def test_state_lost_and_inputs_cut_sqlite_goes_on_by_itself(undisturbed: Content, tmp_path: Path) -> None:
    log = await topics()
    await run_to_end(log, tmp_path, ("sqlite",))
    await lose_state(log)
    retire_first_minutes(log)
    await run_to_end(log, tmp_path, ("sqlite",))
    assert database_rows(tmp_path) == undisturbed[0]


@pytest.mark.parametrize("rebuild", [False, True])
async def test_a_beginning_that_retention_passes_before_anything_was_taken_moves(
    rebuild: bool, undisturbed_cut: Content, tmp_path: Path
) -> None:
    """Between it and the first cut there is nothing to leave a hole in; files that are there it respects."""
    log = await topics()
    if rebuild:
        await run_to_end(log, tmp_path / "before", ("jsonl", "sqlite"))
    for partition in SYMBOLS:
        log.trim(TP(TICKS, partition), 3)
    runtime = service(log, tmp_path, rebuild=rebuild)
    killed = asyncio.create_task(runtime.run())
    async with asyncio.timeout(150):
        while not runtime.ready:
            await asyncio.sleep(0)
    killed.cancel()
    await asyncio.gather(killed, return_exceptions=True)
    assert not any((tmp_path / "signals").rglob("*"))
    lineage = int(rebuild)
    begun = [(await snapshots(log))[partition] for partition in SYMBOLS]
    assert [each.commit.lineage for each in begun if each is not None] == [lineage] * len(SYMBOLS)
    retire_first_minutes(log)
    await run_to_end(log, tmp_path, ("jsonl", "sqlite"))
    assert content(tmp_path) == undisturbed_cut
    begun = [(await snapshots(log))[partition] for partition in SYMBOLS]
    assert [each.commit.lineage for each in begun if each is not None] == [lineage + 1] * len(SYMBOLS)


async def test_a_beginning_that_retention_passes_behind_its_first_files_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They were written and not committed: what is cut from a later place would stand beside them."""
    log = await topics(cut=True)

    def die(name: str) -> None:
        raise KilledError(name)

    monkeypatch.setattr(crash, "die", die)
    crash.arm({crash.ENVIRONMENT: "file-renamed:1"})
    with pytest.raises(KilledError):
        await service(log, tmp_path).run()
    crash.arm({})
    held = lines(tmp_path)
    assert held
    for partition in SYMBOLS:
        log.trim(TP(TICKS, partition), 20)
    with pytest.raises(LakeError, match="holds no snapshot to go on from"):
        await run_to_end(log, tmp_path, ("jsonl", "sqlite"))
    assert lines(tmp_path) == held


@pytest.mark.parametrize("rebuild", [False, True])
async def test_offsets_by_hand_do_not_write_beside_the_files_that_are_there(
    rebuild: bool, undisturbed: Content, tmp_path: Path
) -> None:
    log = await topics()
    await run_to_end(log, tmp_path, ("jsonl",))
    held = lines(tmp_path)
    await lose_state(log)
    everywhere = [TP(topic, partition) for topic in (TICKS, SIGNALS) for partition in range(PARTITIONS)]
    log.reset_offsets(GROUP, dict.fromkeys(everywhere, 0) | {TP(TICKS, 0): 20, TP(SIGNALS, 0): 20})
    words = "STATE_REBUILD=true" if rebuild else r"of group 'orderflow.sinks' were set by hand \(.*signals\[0\] at 20"
    with pytest.raises(LakeError, match=words) as caught:
        await run_to_end(log, tmp_path, ("jsonl",), rebuild=rebuild)
    assert "files of partition 0 already" in str(caught.value)
    assert rebuild or "--delete-offsets" in str(caught.value)
    assert lines(tmp_path) == held
    assert await snapshots(log) == [None] * PARTITIONS, "a beginning that was refused would be gone on from"
    (tmp_path / "signals" / "jsonl").rename(tmp_path / "away")
    await run_to_end(log, tmp_path, ("jsonl",))
    again = lines(tmp_path / "signals")
    assert len(again) == len(set(again))
    assert set(again) < set(held)


async def test_offsets_by_hand_at_the_begin_of_whole_inputs_write_the_same_files(
    undisturbed: Content, tmp_path: Path
) -> None:
    log = await topics()
    await run_to_end(log, tmp_path, ("jsonl", "sqlite"))
    await lose_state(log)
    everywhere = [TP(topic, partition) for topic in (TICKS, SIGNALS) for partition in range(PARTITIONS)]
    log.reset_offsets(GROUP, dict.fromkeys(everywhere, 0))
    await run_to_end(log, tmp_path, ("jsonl", "sqlite"))
    assert content(tmp_path) == undisturbed


async def test_a_rebuild_without_a_snapshot_that_was_interrupted_goes_on_by_itself(
    undisturbed: Content, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Retention may pass what its first files hold: only its beginning says that they are its own."""
    log = await topics()

    def die(name: str) -> None:
        raise KilledError(name)

    monkeypatch.setattr(crash, "die", die)
    crash.arm({crash.ENVIRONMENT: "file-renamed:1"})
    with pytest.raises(KilledError):
        await service(log, tmp_path, rebuild=True).run()
    crash.arm({})
    assert lines(tmp_path)
    assert None not in await snapshots(log)
    await run_to_end(log, tmp_path, ("jsonl", "sqlite"))
    assert content(tmp_path) == undisturbed


async def test_state_that_retention_has_passed_is_refused(tmp_path: Path) -> None:
    log = await topics()
    await run_to_end(log, tmp_path, ("jsonl",))
    held = lines(tmp_path)
    end = (await log.end_offsets([TP(TICKS, 5)]))[TP(TICKS, 5)]
    log.trim(TP(TICKS, 5), end + 1)
    with pytest.raises(LogError, match=r"retention has passed it; start once with STATE_REBUILD=true .*holds no files"):
        await run_to_end(log, tmp_path, ("jsonl",))
    assert lines(tmp_path) == held
