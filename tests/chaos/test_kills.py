"""SIGKILL, SIGSTOP and full disks in the middle of a run leave the same topics and files as if nothing had happened."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from run_helpers import ALTS, SERVICES, Run, assert_same_run, at_work, running, shared_run
from small_disk import SmallDisk

pytestmark = [pytest.mark.kafka, pytest.mark.capture, pytest.mark.slow]

SPEED = "2"
"""The 30 s of the capture take 15 s, so that a service killed and restarted still has work before it."""
STOPPED_SEC = 3.0


@pytest.fixture(scope="module")
def undisturbed(kafka_bootstrap: str, captures: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    return shared_run(kafka_bootstrap, captures, ALTS, tmp_path_factory)


def assert_restarts(run: Run, expected: dict[str, int]) -> None:
    """The summary tells of exactly these restarts, each by its signal."""
    restarts = run.summary["restarts"]
    assert {name: each["count"] for name, each in restarts.items()} == {
        name: expected.get(name, 0) for name in SERVICES
    }
    assert {cause for each in restarts.values() for cause in each["causes"]} <= {"signal SIGKILL"}
    for name, count in expected.items():
        assert f"{name} was restarted {count} times: signal SIGKILL" in run.output


def test_each_service_killed_once_leaves_the_same_bytes(
    undisturbed: Run, kafka_bootstrap: str, captures: Path, tmp_path: Path
) -> None:
    with running(kafka_bootstrap, captures / ALTS, tmp_path / "run", SPEED, SNAPSHOT_SEC="1") as run:
        for service in reversed(SERVICES):
            run.kill_at_work(service)
        assert run.finish() == 0, run.output
        assert_restarts(run, dict.fromkeys(SERVICES, 1))
        assert_same_run(run, undisturbed)


def test_killed_again_while_recovering_and_together_leaves_the_same_bytes(
    undisturbed: Run, kafka_bootstrap: str, captures: Path, tmp_path: Path
) -> None:
    with running(kafka_bootstrap, captures / ALTS, tmp_path / "run", SPEED, SNAPSHOT_SEC="1") as run:
        first = run.kill_at_work("fusion")
        # The successor, before it has taken anything; then three at once, the recorder among them.
        second = run.until("fusion", lambda status: status["pid"] != first)["pid"]
        run.signal("fusion", signal.SIGKILL, second)
        together = [(name, run.until(name, at_work)["pid"]) for name in ("ingestion", "ofi", "lake")]
        for name, pid in together:
            run.signal(name, signal.SIGKILL, pid)
        assert run.finish() == 0, run.output
        assert_restarts(run, {"fusion": 2, "ingestion": 1, "ofi": 1, "lake": 1})
        assert_same_run(run, undisturbed)


def test_recorder_restarted_and_services_frozen_leave_the_same_bytes(
    undisturbed: Run, kafka_bootstrap: str, captures: Path, tmp_path: Path
) -> None:
    """SIGTERM, as a deployment does it: the session goes on with the next recorder. Then SIGSTOP for 3 s."""
    with running(kafka_bootstrap, captures / ALTS, tmp_path / "run", SPEED) as run:
        first = run.until("ingestion", at_work)["pid"]
        run.signal("ingestion", signal.SIGTERM, first)
        run.until("ingestion", lambda status: status["pid"] != first and at_work(status))
        frozen = [(name, run.until(name, at_work)["pid"]) for name in ("ingestion", "cvd")]
        for name, pid in frozen:
            run.signal(name, signal.SIGSTOP, pid)
        began = time.monotonic()
        # What is tested is the time itself: the others go on, and nothing may take the silence for an end.
        while time.monotonic() - began < STOPPED_SEC:
            assert run.process.poll() is None, run.finish()
            time.sleep(0.1)
        for name, pid in frozen:
            run.signal(name, signal.SIGCONT, pid)
        assert run.finish() == 0, run.output
        restarts = run.summary["restarts"]
        assert restarts.pop("ingestion") == {"count": 1, "causes": ["exit code 0"]}
        assert {each["count"] for each in restarts.values()} == {0}
        assert run.summary["recorder"]["epoch"] == 2
        assert run.summary["recorder"]["resumed"] is True
        assert_same_run(run, undisturbed)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[SmallDisk]:
    disk = SmallDisk(tmp_path / "run" / "data")
    yield disk
    disk.unmount()


def test_full_disk_makes_the_lake_wait_and_loses_nothing(
    small_disk: SmallDisk, undisturbed: Run, kafka_bootstrap: str, captures: Path, tmp_path: Path
) -> None:
    with running(kafka_bootstrap, captures / ALTS, tmp_path / "run", "5") as run:
        run.until("lake", lambda status: True)
        small_disk.mount("64k")
        status = run.until("lake", lambda status: bool(status["stuck"]))
        assert status["write_errors"] > 0
        assert status["cuts_failed"] > 0
        assert status["ready"]
        run.until("signal", lambda status: bool(status["drained"]))  # the others go on, Kafka holds the data
        assert run.process.poll() is None
        log = (run.out / "logs" / "lake.log").read_text("utf-8")
        assert "No space left on device" in log
        assert "nothing is lost" in log
        assert "free some space or move the lake (DATA_DIR)" in log
        assert [path for path in small_disk.folder.rglob("*") if path.name.startswith(".orderflow-tmp")] == []
        small_disk.grow("64m")
        assert run.finish() == 0, run.output
        assert_restarts(run, {})
        assert_same_run(run, undisturbed)
