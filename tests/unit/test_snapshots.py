"""Which snapshot counts: the one that is furthest along in the newest lineage, whoever wrote last."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest
from orderflow.config import Config
from orderflow.errors import LogError
from orderflow.lake.parquet import LakeSink
from orderflow.lake.settings import LakeConfig
from orderflow.pipeline import STAGES, Stage
from orderflow.streaming.log import TP
from orderflow.streaming.memory_log import MemoryLog
from orderflow.streaming.snapshots import (
    Commit,
    InputPosition,
    OutputTail,
    check_fingerprint,
    encode_commit,
    encode_parts,
    load_newest,
    packed,
)

STATE = TP("state.ofi", 0)


async def write(
    log: MemoryLog, name: str, position: int, lineage: int = 0, fingerprint: str = "f", parts: int = 1
) -> None:
    """One snapshot; `parts` that its commit tells of, one that is there."""
    batch = log.batch()
    first = (await log.end_offsets([STATE]))[STATE]
    for key, value, headers in encode_parts(name, packed({"BTCUSDT": name.encode()})):
        batch.append(key, value, 0, headers)
    inputs = [InputPosition("market.rows", position, position, 0, position)]
    commit = Commit(first, parts, inputs, [], "s", False, "1", fingerprint, lineage=lineage)
    key, value, headers = encode_commit(name, commit)
    batch.append(key, value, 0, headers)
    await (await log.send(batch, STATE))


async def newest(log: MemoryLog) -> str | None:
    restored = (await load_newest(log, [STATE]))[STATE]
    return None if restored is None else restored.states["BTCUSDT"].decode()


async def test_a_zombie_that_saves_older_state_later_is_passed_over() -> None:
    log = MemoryLog()
    await write(log, "owner", 900)
    await write(log, "zombie", 400)
    assert await newest(log) == "owner"
    await write(log, "owner2", 901)
    assert await newest(log) == "owner2"


async def test_a_rebuilt_lineage_stands_above_what_runs_on_under_old_settings() -> None:
    log = MemoryLog()
    await write(log, "old", 900, fingerprint="old")
    await write(log, "rebuilt", 20, lineage=1, fingerprint="new")
    await write(log, "zombie", 950, fingerprint="old")
    restored = (await load_newest(log, [STATE]))[STATE]
    assert restored is not None
    assert await newest(log) == "rebuilt"
    check_fingerprint(restored.commit, "new", "1", STATE)
    with pytest.raises(LogError, match="made under the settings new"):
        check_fingerprint(restored.commit, "old", "1", STATE)


async def test_what_lacks_a_part_does_not_exist() -> None:
    log = MemoryLog()
    assert await newest(log) is None
    await write(log, "torn", 900, parts=2)
    assert await newest(log) is None
    await write(log, "whole", 100)
    assert await newest(log) == "whole"


async def test_a_snapshot_counts_though_retention_has_passed_the_place_that_its_search_would_begin_at() -> None:
    """A writer looks for its parts from behind its own snapshot before, which may be gone long since."""
    log = MemoryLog()
    for number in range(5):
        await write(log, f"early{number}", number)
    batch = log.batch()
    for key, value, headers in encode_parts("late", packed({"BTCUSDT": b"late"})):
        batch.append(key, value, 0, headers)
    inputs = [InputPosition("market.rows", 50, 50, 0, 50)]
    key, value, headers = encode_commit("late", Commit(2, 1, inputs, [], "s", False, "1", "f"))
    batch.append(key, value, 0, headers)
    await (await log.send(batch, STATE))
    log.trim(STATE, 10)
    assert await newest(log) == "late"
    log.trim(STATE, 11)
    assert await newest(log) is None, "its part is gone too"


def test_snapshots_from_before_lineages_are_read() -> None:
    old = msgspec.json.decode(msgspec.json.encode(Commit(0, 0, [], [], "", False, "1", "f")))
    del old["lineage"]
    assert msgspec.convert(old, Commit).lineage == 0


@pytest.mark.parametrize("stage", STAGES, ids=lambda stage: stage.name)
def test_a_beginning_is_a_state_to_go_on_from(stage: Stage) -> None:
    """What is computed anew saves it before anything else."""
    config = Config()
    beginning = stage.make(config, 0).snapshot()
    again = stage.make(config, 0)
    again.restore(beginning)
    assert again.snapshot() == beginning


def test_the_beginning_of_a_lake_is_a_state_to_go_on_from(tmp_path: Path) -> None:
    beginning = LakeSink(tmp_path, 0, LakeConfig()).state()
    again = LakeSink(tmp_path, 0, LakeConfig())
    again.restore(beginning)
    assert again.state() == beginning


def test_a_tail_reads_back_with_what_was_written_before_it() -> None:
    for tail, written in (
        (OutputTail("t", 5, 1, 9), (5, 1)),
        (OutputTail("t", 5, 1, 9, 7, 0), (7, 0)),
        (OutputTail("t", -1, -1), (-1, -1)),
    ):
        assert msgspec.json.decode(msgspec.json.encode(tail), type=OutputTail) == tail
        assert tail.written == written
    of_before = b'{"topic":"t","seq":5,"sub":1,"end_offset":9}'
    assert msgspec.json.decode(of_before, type=OutputTail) == OutputTail("t", 5, 1, 9)
    assert msgspec.json.encode(OutputTail("t", 5, 1, 9)) == of_before, "a version before this one reads it"
