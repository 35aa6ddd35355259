"""`orderflow replay`, `diff`, `trace` and `verify --chain` on whole runs of real captures, kills included."""

from __future__ import annotations

import contextlib
import gzip
import json
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from run_helpers import (
    ALTS,
    DERIVED,
    JOURNAL,
    MAJORS,
    Run,
    View,
    call,
    canonical,
    delete_topics,
    end,
    files_of,
    lake,
    physical,
    refused,
    run_arguments,
    shared_run,
    start_run,
    topics_of,
)
from test_verify import altered, copied, divergences, record_in

pytestmark = [pytest.mark.kafka, pytest.mark.capture, pytest.mark.slow]

KILLED = ("ofi", "fusion", "ingestion", "lake")
SETTINGS = {"SNAPSHOT_SEC": "0.5", "PARQUET_ROTATE_SEC": "4", "SIGNAL_SINK": "none"}
"""Cuts and snapshots so often that thirty seconds of market hold several of each."""


@pytest.fixture(scope="module")
def killed(kafka_bootstrap: str, captures: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    """A run with kills in it."""
    out = tmp_path_factory.mktemp("killed") / "run"
    run = start_run(kafka_bootstrap, run_arguments(captures / ALTS, out, "2"), out, **SETTINGS)
    try:
        for service in KILLED:
            run.kill_at_work(service)
        assert run.finish() == 0, run.output
        yield run
    finally:
        end(run)


@contextlib.contextmanager
def replayed(run: Run, *arguments: str, name: str = "r1", code: int = 0) -> Iterator[tuple[str, dict[str, Any], Path]]:
    """(topic prefix, replay.json, folder) of a replay; its topics are removed behind the block."""
    done = call(run.bootstrap, "replay", "--run", str(run.out), "--as", name, "--replace", *arguments)
    try:
        assert done.code == code, (done.stdout, done.stderr)
        folder = run.out / "replays" / name
        yield f"replay.{name}.", json.loads((folder / "replay.json").read_text("utf-8")), folder
    finally:
        delete_topics(run.bootstrap, f"replay.{name}.")


def derived_of(run: Run, prefix: str) -> View:
    return {place: canonical(place[0], found) for place, found in physical(run.bootstrap, prefix, DERIVED).items()}


def only_derived(view: View) -> View:
    return {place: records for place, records in view.items() if place[0] != JOURNAL}


def seq_of(body: bytes) -> int:
    number = shift = 0
    for byte in body:
        number |= (byte & 0x7F) << shift
        if not byte & 0x80:
            break
        shift += 7
    return (number >> 1) ^ -(number & 1)


def assert_files_are_the_runs(run: Run, folder: Path, *, at_least: int) -> dict[str, str]:
    ours, live = files_of(folder), files_of(run.out)
    assert len(ours) >= at_least
    assert [path for path, digest in ours.items() if live.get(path) != digest] == []
    return ours


def moments(run: Run, shares: tuple[float, ...]) -> list[str]:
    """Receive times that lie so far into a run."""
    ((low, high),) = lake(run.out, "SELECT min(recv_ts_ms), max(recv_ts_ms) FROM {quotes}")
    return [
        datetime.fromtimestamp((low + (high - low) * share) / 1000, UTC).isoformat(timespec="milliseconds")
        for share in shares
    ]


def test_from_the_beginning_topics_and_files_are_the_killed_runs(killed: Run) -> None:
    with replayed(killed) as (prefix, info, folder):
        assert info["complete"] is True
        assert info["exact"] is True
        assert derived_of(killed, prefix) == only_derived(topics_of(killed))
        assert files_of(folder) == files_of(killed.out)
        same = call(killed.bootstrap, "diff", "live", "r1", "--run", str(killed.out))
        assert same.code == 0, same.stdout
        assert same.stdout.strip().endswith("the same")
        judged = call(killed.bootstrap, "verify", "--run", str(killed.out), "--against", prefix)
        assert judged.code == 0, judged.stdout


@pytest.mark.parametrize("share", [0.55, 0.7, 0.9])
def test_from_a_later_time_topics_and_files_are_the_runs(killed: Run, share: float) -> None:
    (moment,) = moments(killed, (share,))
    with replayed(killed, "--from", moment) as (prefix, info, folder):
        assert info["exact"] is True
        begins = {int(partition): span[0] for partition, span in info["spans"].items()}
        expected = {
            place: [record for record in records if place[1] in begins and seq_of(record[1]) >= begins[place[1]]]
            for place, records in only_derived(topics_of(killed)).items()
        }
        assert derived_of(killed, prefix) == expected
        assert sum(map(len, expected.values())) > 100
        files = assert_files_are_the_runs(killed, folder, at_least=10)
        # Every file that ends behind the moment is there.
        for path in files_of(killed.out):
            partition, _, last = path.rsplit(".", 2)[0].rsplit("-", 3)[1:] if path.endswith("parquet") else ("", "", "")
            if partition and int(partition[1:]) in begins and int(last) >= begins[int(partition[1:])]:
                assert path in files, path


def test_a_late_replay_does_not_begin_at_the_beginning(killed: Run) -> None:
    (moment,) = moments(killed, (0.9,))
    with replayed(killed, "--from", moment, "--no-files") as (_, info, _):
        assert info["exact"] is True
        assert info["journal_records"] < killed.summary["topics"][JOURNAL] * 0.7


def test_from_the_lake_alone(killed: Run) -> None:
    """Kafka's retention has passed, the files are there: the journal is the same, and all that follows from it."""
    with replayed(killed, "--from-lake", str(killed.out), name="lake") as (prefix, info, folder):
        assert info["journal_prefix"] == prefix
        live = topics_of(killed)
        rebuilt = {place: canonical(place[0], found) for place, found in physical(killed.bootstrap, prefix).items()}
        assert rebuilt == live
        assert files_of(folder) == files_of(killed.out)


def test_a_raw_file_that_misses_is_named(killed: Run, tmp_path: Path) -> None:
    folders = sorted((killed.out / "data" / "raw").glob("date=*/partition=*"))
    busy = max(folders, key=lambda folder: len(list(folder.iterdir())))
    files = sorted(busy.iterdir())
    target = tmp_path / "data" / "raw" / busy.parent.name / busy.name
    target.mkdir(parents=True)
    for path in files[:1] + files[2:]:
        (target / path.name).write_bytes(path.read_bytes())
    run = ("replay", "--run", str(killed.out), "--as", "hole", "--replace", "--from-lake", str(tmp_path))
    try:
        refused(call(killed.bootstrap, *run), "lack seq", "restore the file")
    finally:
        delete_topics(killed.bootstrap, "replay.hole.")


def test_the_majors_from_the_beginning_and_from_the_middle(
    kafka_bootstrap: str, captures: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    majors = shared_run(kafka_bootstrap, captures, MAJORS, tmp_path_factory)
    with replayed(majors, name="majors") as (prefix, info, folder):
        assert derived_of(majors, prefix) == only_derived(topics_of(majors))
        assert files_of(folder) == files_of(majors.out)
        assert info["market_sec"] == pytest.approx(480, abs=1)


def test_what_if_and_diff(killed: Run) -> None:
    (moment,) = moments(killed, (0.6,))
    with replayed(killed, "--from", moment, "--set", "cvd.z_mode=level", name="level") as (_, info, _):
        assert info["changed_stages"] == ["cvd", "fusion", "signal"]
        assert info["changed_settings"] == ["cvd.z_mode=level"]
        done = call(killed.bootstrap, "diff", "live", "level", "--run", str(killed.out), "--json")
        assert done.code == 1, done.stderr
        report = json.loads(done.stdout)
        assert report["topics"]["features.ofi"]["different"] == 0
        assert report["topics"]["features.ofi"]["equal"] > 50
        cvd = report["topics"]["features.cvd"]
        assert cvd["a"] == cvd["b"] > 0
        assert cvd["only_a"] == cvd["only_b"] == 0
        told = call(killed.bootstrap, "diff", "live", "level", "--run", str(killed.out))
        assert told.stdout.strip().endswith("they differ")


def test_an_altered_value_is_named_from_snapshots_too(killed: Run) -> None:
    partition, record = record_in(killed, "features.cvd", 20)
    seq, right = record["seq"], record["cvd"]
    with copied(killed, altered("features.cvd", seq, "cvd", lambda value: value + 0.5, partition)) as prefix:
        done = call(
            killed.bootstrap,
            *("verify", "--run", str(killed.out), "--against", prefix, "--from", f"seq:{partition}:{seq - 2}"),
        )
        assert done.code == 1, done.stderr
        assert divergences(done) == [
            f"features.cvd[{partition}] seq {seq} sub 0 field cvd: live {right + 0.5!r}, recomputed {right!r}"
        ]


def test_the_chain_tells_of_an_alteration_without_computing(killed: Run, tmp_path: Path) -> None:
    marks = tmp_path / "chain.json"
    chain = ("verify", "--run", str(killed.out), "--chain", "--chain-file", str(marks))
    first = call(killed.bootstrap, *chain, "--json")
    assert first.code == 0, first.stderr
    assert json.loads(first.stdout)["records"] == sum(killed.summary["topics"].values())
    again = call(killed.bootstrap, *chain)
    assert again.code == 0
    assert again.stdout.strip().endswith("unchanged")
    partition, record = record_in(killed, "signals", 20)
    change = altered("signals", record["seq"], "score", lambda value: (value or 0.0) + 1e-9, partition)
    with copied(killed, change) as prefix:
        done = call(killed.bootstrap, *chain, "--against", prefix)
        assert done.code == 1
        assert f"DIFFERENCE signals[{partition}] seq 0 to " in done.stdout
        assert done.stdout.count("DIFFERENCE") == 1
    content = json.loads(marks.read_text("utf-8"))
    assert content["marks"][f"signals/{partition}"]["tail"]["records"] > 20


def test_a_signal_is_traced_to_the_very_lines_of_the_capture(killed: Run, captures: Path) -> None:
    ((signal_id,),) = lake(
        killed.out,
        "SELECT signal_id FROM {signals} WHERE z_ofi IS NOT NULL OR z_cvd IS NOT NULL ORDER BY seq DESC LIMIT 1",
    )
    done = call(killed.bootstrap, "trace", signal_id, "--run", str(killed.out), "--json")
    assert done.code == 0, done.stderr
    trace = json.loads(done.stdout)
    assert trace["signal"]["signal_id"] == signal_id
    assert trace["fusion"]["seq"] == trace["signal"]["seq"]
    lines = gzip.decompress((captures / ALTS).read_bytes()).decode().splitlines()
    traced = 0
    for name in ("ofi", "cvd"):
        if trace[name] is None:
            continue
        frame, row = trace[name]["frame"], trace[name]["row"]
        assert lines[frame["source_position"]].split(" ", 2)[2] == frame["payload"]
        assert row["seq"] == frame["seq"] == trace[name]["feature"]["seq"]
        traced += 1
    assert traced == 2
    told = call(killed.bootstrap, "trace", signal_id, "--run", str(killed.out))
    assert told.stdout.startswith(f"signal {signal_id}")
    refused(call(killed.bootstrap, "trace", "nonsense", "--run", str(killed.out)), "is no signal_id")
    gone = signal_id.replace(signal_id.split("-")[1], "999999")
    refused(call(killed.bootstrap, "trace", gone, "--run", str(killed.out)), "there is no signal")


def test_what_can_not_be_done_is_refused(killed: Run, tmp_path: Path) -> None:
    run = ("replay", "--run", str(killed.out))
    refused(call(killed.bootstrap, *run, "--as", "a.b"), "--as is 'a.b'", "hyphens")
    refused(call(killed.bootstrap, *run, "--as", "x", "--set", "cvd.nothing=1"), "there is no setting 'nothing'")
    refused(call(killed.bootstrap, *run, "--as", "x", "--set", "z_mode"), "must be SECTION.SETTING=VALUE")
    refused(call(killed.bootstrap, *run, "--as", "x", "--set", "cvd.z_mode=odd"), "delta, level, flow, rate")
    refused(call(killed.bootstrap, *run, "--as", "x", "--speed", "0"), "--speed is '0'")
    refused(call(killed.bootstrap, *run, "--as", "x", "--from", "seq:12:1"), "partitions are 0 to 11")
    refused(call(killed.bootstrap, *run, "--as", "x", "--from", "5", "--to", "4"), "lies behind")
    refused(call(killed.bootstrap, *run, "--as", "x", "--from-lake", str(tmp_path)), "there are no files")
    try:
        refused(call(killed.bootstrap, *run, "--as", "x", "--from", "2030-01-01T00:00:00Z"), "nothing between")
        refused(call(killed.bootstrap, *run, "--as", "x"), "there is a replay 'x' already", "--replace")
    finally:
        delete_topics(killed.bootstrap, "replay.x.")


def test_paced_replay_takes_its_time(killed: Run) -> None:
    first, last = moments(killed, (0.5, 0.6))
    with replayed(killed, "--from", first, "--to", last, "--speed", "3", "--no-files", name="pace") as (_, info, _):
        assert info["seconds"] >= 0.9 * 30 * 0.1 / 3


def test_a_copy_has_the_heads_of_the_original(killed: Run, tmp_path: Path) -> None:
    """Digests are of content: offsets, timestamps and repeats do not count."""

    def heads(*arguments: str) -> dict[str, str]:
        file = str(tmp_path / f"{len(arguments)}.json")
        done = call(
            killed.bootstrap, "verify", "--run", str(killed.out), "--chain", "--json", "--chain-file", file, *arguments
        )
        found: dict[str, str] = json.loads(done.stdout)["heads"]
        return {place: head for place, head in found.items() if not place.startswith(JOURNAL)}

    with copied(killed, lambda topic, partition, value: value) as prefix:
        assert heads() == heads("--against", prefix)
