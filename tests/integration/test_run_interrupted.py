"""Runs that somebody stops, goes on with, or that a service refuses to go on with."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from aiokafka import TopicPartition
from aiokafka.admin import AIOKafkaAdminClient, RecordsToDelete
from run_helpers import (
    ALTS,
    DERIVED,
    JOURNAL,
    ROOT,
    Run,
    call,
    command,
    end,
    files_of,
    lake,
    refused,
    run_arguments,
    shared_run,
    start_run,
    topics_of,
)

pytestmark = [pytest.mark.kafka, pytest.mark.capture, pytest.mark.slow]

SETTINGS = "cvd: {z_mode: delta}\n"  # the default, so that results equal those of the other runs
END_KIND = 10 << 1
"""Index of `end` in the enum of journal kinds, as Avro's zigzag writes it."""


@pytest.fixture(scope="module")
def interrupted(kafka_bootstrap: str, captures: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    """A run that had SIGINT in the middle of the capture."""
    out = tmp_path_factory.mktemp("interrupted") / "run"
    settings_of(out).write_text(SETTINGS, "utf-8")
    run = start_run(kafka_bootstrap, run_arguments(captures / ALTS, out, "2"), out, ORDERFLOW_CONFIG=relative(out))
    run.until("signal", lambda status: status["records_in"] > 100)
    run.process.send_signal(signal.SIGINT)
    run.finish()
    yield run
    end(run)


def settings_of(out: Path) -> Path:
    """The settings file that the run was started with."""
    return out.parent / "settings.yaml"


def relative(out: Path) -> str:
    """The same as a user in the project's folder names it; the services must find it all the same."""
    return os.path.relpath(settings_of(out), ROOT)


def frames(run: Run) -> int:
    count: int = run.summary["frames"]
    return count


def test_interrupt_drains_and_exits_with_0(interrupted: Run) -> None:
    assert interrupted.process.returncode == 0, interrupted.output
    assert "draining (interrupted)" in interrupted.output
    assert "Traceback" not in interrupted.output
    summary = interrupted.summary
    assert summary["stopped_by"] == "interrupted"
    assert 0 < frames(interrupted) < 1539
    assert summary["lake_agrees"] is True
    assert sum(each["count"] for each in summary["restarts"].values()) == 0
    assert summary["journal_by_kind"]["end"] == 12
    (held,) = lake(interrupted.out, "SELECT count(*) FROM {book}")
    assert held == (summary["rows_by_source"]["depth"],)
    done = call(interrupted.bootstrap, "verify", "--run", str(interrupted.out))
    assert done.code == 0, done.stdout


def test_resume_under_other_settings_is_refused_before_anything_starts(interrupted: Run, captures: Path) -> None:
    before = sorted((interrupted.out / "logs").iterdir())
    arguments = run_arguments(captures / ALTS, interrupted.out)
    refused(
        call(interrupted.bootstrap, *arguments, "--resume", Z_MODE="level"),
        *("Z_MODE is 'level'", "was not set", str(interrupted.out), "set it as it was, or start another run"),
    )
    assert sorted((interrupted.out / "logs").iterdir()) == before


def test_a_service_that_refuses_its_state_ends_the_run_with_its_last_words(interrupted: Run, captures: Path) -> None:
    """The settings file has changed meanwhile: only the service itself can tell, by the fingerprint of its state."""
    settings_of(interrupted.out).write_text("cvd: {z_mode: level}\n", "utf-8")
    try:
        done = command(interrupted.bootstrap, *run_arguments(captures / ALTS, interrupted.out), "--resume")
    finally:
        settings_of(interrupted.out).write_text(SETTINGS, "utf-8")
    assert done.code == 2, done.stdout
    assert "Traceback" not in done.stdout + done.stderr
    for words in ("orderflow: service cvd ended with exit code 2", "its last words", "STATE_REBUILD=true", "state.cvd"):
        assert words in done.stderr, (words, done.stderr)


def test_resume_goes_on_to_the_end_and_loses_nothing(
    interrupted: Run, captures: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    undisturbed = shared_run(interrupted.bootstrap, captures, ALTS, tmp_path_factory)
    done = command(interrupted.bootstrap, *run_arguments(captures / ALTS, interrupted.out), "--resume")
    assert done.code == 0, done.stdout + done.stderr
    assert frames(interrupted) == 1539
    assert interrupted.summary["lake_agrees"] is True
    one, other = topics_of(interrupted), topics_of(undisturbed)
    for partition in range(12):
        # The early `end` takes a number, so the numbers behind it differ by one; everything else is the same.
        assert without_ends(one[JOURNAL, partition]) == without_ends(other[JOURNAL, partition])
    # Both ends tell of the frames that nobody uses, and a tick passes each `end` on: two topics have more records.
    for topic in set(DERIVED) - {"market.ticks", "market.events"}:
        for partition in range(12):
            assert len(one[topic, partition]) == len(other[topic, partition]), (topic, partition)
    sums = "SELECT symbol, count(*), fsum(ofi_l1) FROM {ofi} GROUP BY symbol ORDER BY symbol"
    assert lake(interrupted.out, sums) == lake(undisturbed.out, sums)
    done = call(interrupted.bootstrap, "verify", "--run", str(interrupted.out))
    assert done.code == 0, done.stdout


def test_a_lake_that_lost_its_state_does_not_cut_anew_beside_its_files(interrupted: Run, captures: Path) -> None:
    """Retention has taken the begin of the journal: the first cut would lie elsewhere, its rows be there twice."""
    before = files_of(interrupted.out)
    asyncio.run(expire(interrupted.bootstrap, interrupted.prefix + "state.lake", None))
    asyncio.run(expire(interrupted.bootstrap, interrupted.prefix + "market.journal", 2))
    done = command(interrupted.bootstrap, *run_arguments(captures / ALTS, interrupted.out), "--resume")
    assert done.code == 2, done.stdout
    assert "Traceback" not in done.stdout + done.stderr
    for words in (
        "orderflow: service lake ended with exit code 2",
        f"lake: {interrupted.prefix}state.lake[",
        "holds no snapshot to go on from",
        "all before offset 2 has expired",
        "which holds files of partition",
    ):
        assert words in done.stderr, (words, done.stderr)
    assert files_of(interrupted.out) == before


async def expire(bootstrap: str, topic: str, offset: int | None) -> None:
    """Remove what lies before an offset of every partition, or everything, as retention does."""
    admin = AIOKafkaAdminClient(bootstrap_servers=bootstrap)
    await admin.start()
    try:
        before = RecordsToDelete(before_offset=-1 if offset is None else offset)  # -1: the end
        await admin.delete_records({TopicPartition(topic, partition): before for partition in range(12)})
    finally:
        await admin.close()


def without_ends(records: list[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]]:
    """Journal records without their numbers, the `end`s left out."""
    found = []
    for key, body in records:
        at = next(index for index, byte in enumerate(body) if not byte & 0x80) + 1
        if body[at] != END_KIND:
            found.append((key, body[at:]))
    return found
