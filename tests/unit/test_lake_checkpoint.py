"""`state/checkpoint.json`."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from orderflow.lake import files
from orderflow.lake.checkpoint import PartitionCheckpoint, advance, read
from orderflow.lake.layout import LakeError

WRITER = """
import sys
from pathlib import Path
from orderflow.lake.checkpoint import advance
partition = int(sys.argv[2])
for seq in range(1, 41):
    assert advance(Path(sys.argv[1]), partition, session="s1", last_seq=seq, clock_ts_ns=seq, inputs={"signals": seq})
"""


def put(root: Path, partition: int, last_seq: int, session: str = "s1") -> bool:
    return advance(
        root, partition, session=session, last_seq=last_seq, clock_ts_ns=5, inputs={"signals": 9, "market.ticks": 3}
    )


def test_entries_are_kept_by_partition_in_order(tmp_path: Path) -> None:
    assert read(tmp_path) == {}
    for partition in (11, 2):
        assert put(tmp_path, partition, 7)
    content = json.loads((tmp_path / "state/checkpoint.json").read_text())
    assert list(content) == ["2", "11"]
    assert content["2"] == {
        "session": "s1",
        "last_seq": 7,
        "clock_ts_ns": 5,
        "inputs": {"market.ticks": 3, "signals": 9},
    }
    assert read(tmp_path)[11] == PartitionCheckpoint(
        session="s1", last_seq=7, clock_ts_ns=5, inputs={"market.ticks": 3, "signals": 9}
    )


def test_a_checkpoint_never_goes_back_within_a_session(tmp_path: Path) -> None:
    assert put(tmp_path, 0, 9)
    assert not put(tmp_path, 0, 8)
    assert read(tmp_path)[0].last_seq == 9
    assert put(tmp_path, 0, 9), "a cut committed again"
    assert put(tmp_path, 0, 1, "s2")
    assert read(tmp_path)[0].session == "s2"


def test_processes_that_own_some_partitions_each_lose_nothing(tmp_path: Path) -> None:
    writers = [subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path), str(number)]) for number in range(3)]
    assert [writer.wait(timeout=300) for writer in writers] == [0, 0, 0]
    assert {partition: entry.last_seq for partition, entry in read(tmp_path).items()} == {0: 40, 1: 40, 2: 40}
    assert sorted(path.name for path in (tmp_path / "state").iterdir()) == [".checkpoint.lock", "checkpoint.json"]


def test_what_a_dead_writer_left_goes(tmp_path: Path) -> None:
    put(tmp_path, 0, 1)
    left = tmp_path / "state" / f"{files.TEMP_PREFIX}0-checkpoint.json.part"
    left.write_bytes(b"{")
    put(tmp_path, 0, 2)
    assert not left.exists()


def test_a_damaged_file_is_named_with_what_to_do(tmp_path: Path) -> None:
    put(tmp_path, 0, 1)
    (tmp_path / "state/checkpoint.json").write_text('{"0": {"session": 1}}')
    with pytest.raises(LakeError, match=r"checkpoint\.json is damaged: .* remove it"):
        put(tmp_path, 0, 2)


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "state").write_text("in the way")
    with pytest.raises(LakeError, match=r"\.checkpoint\.lock can't be made"):
        put(tmp_path, 0, 1)
