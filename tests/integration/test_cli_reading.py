"""`tap`, `topics` and `lake sql` on a run that is over."""

from __future__ import annotations

import csv
import io
import json
import select
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from run_helpers import ALTS, Run, call, environment, refused, shared_run, topics_of

pytestmark = [pytest.mark.kafka, pytest.mark.capture]

SUSHI_PARTITION = 0


@pytest.fixture(scope="module")
def run(kafka_bootstrap: str, captures: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    return shared_run(kafka_bootstrap, captures, ALTS, tmp_path_factory)


def tap(run: Run, *arguments: str) -> list[dict[str, Any]]:
    done = call(run.bootstrap, "tap", *arguments, "--run", str(run.out))
    assert done.code == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_tap_from_the_earliest_to_the_end_gives_every_record(run: Run) -> None:
    rows = tap(run, "features.cvd", "--from", "earliest", "--no-follow")
    assert len(rows) == 91
    assert {row["symbol"] for row in rows} == {"AKROUSDT", "CTKUSDT", "KEEPUSDT", "SUSHIUSDT"}
    last = {row["symbol"]: row["cvd"] for row in sorted(rows, key=lambda row: row["seq"])}
    assert last == {"SUSHIUSDT": 1026.0, "AKROUSDT": 32340.0, "KEEPUSDT": -3185.0, "CTKUSDT": -2733.0}


def test_tap_stops_after_the_count_and_keeps_to_the_symbol(run: Run) -> None:
    rows = tap(run, "signals", "--from", "earliest", "--count", "7", "--symbol", "ctkusdt")
    assert [row["symbol"] for row in rows] == ["CTKUSDT"] * 7


def test_tap_from_the_latest_shows_nothing_of_what_was(run: Run) -> None:
    assert tap(run, "signals", "--no-follow") == []


def test_tap_says_that_it_waits_where_nothing_matches(run: Run) -> None:
    arguments = ["tap", "signals", "--symbol", "btcusdt", "--run", str(run.out)]
    with subprocess.Popen(
        [sys.executable, "-m", "orderflow.cli.main", *arguments],
        env=environment(run.bootstrap),
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stderr is not None
        readable, _, _ = select.select([process.stderr], [], [], 60)
        line = process.stderr.readline() if readable else ""
        process.kill()
    assert "no record of BTCUSDT within 5 s, waiting" in line and "--from earliest" in line


def test_tap_from_a_seq_reads_that_partition_alone(run: Run) -> None:
    rows = tap(run, "features.ofi", "--from", f"seq:{SUSHI_PARTITION}:400", "--no-follow")
    expected = len([key for key, _ in topics_of(run)["features.ofi", SUSHI_PARTITION]])
    assert 0 < len(rows) < expected
    assert {row["partition"] for row in rows} == {SUSHI_PARTITION}
    assert min(row["seq"] for row in rows) >= 400
    everything = tap(run, "features.ofi", "--from", "seq:0:0", "--no-follow")
    assert [row for row in everything if row["seq"] >= 400] == rows
    assert tap(run, "features.ofi", "--from", "seq:0:900000", "--no-follow") == []


def test_tap_from_a_time_begins_at_that_receive_time(run: Run) -> None:
    everything = tap(run, "market.journal", "--from", "earliest", "--no-follow")
    numbered = [row for row in everything if row["seq"] > 0]
    moment_ns = 1_626_992_760_000_000_000  # 2021-07-22T22:26:00Z, in the middle of the capture
    rows = tap(run, "market.journal", "--from", "2021-07-22T22:26:00Z", "--no-follow")
    assert 0 < len(rows) < len(numbered)
    assert min(row["recv_ts_ns"] for row in rows if row["kind"] == "tick") >= moment_ns
    for partition in {row["partition"] for row in rows}:
        late = [row["seq"] for row in numbered if row["partition"] == partition and row["recv_ts_ns"] >= moment_ns]
        assert min(row["seq"] for row in rows if row["partition"] == partition) == min(late)
    assert tap(run, "signals", "--from", "2030-01-01", "--no-follow") == []


def test_tap_shows_frames_as_the_exchange_sent_them(run: Run) -> None:
    rows = tap(run, "market.journal", "--from", "earliest", "--no-follow")
    frames = [row for row in rows if row["kind"] == "frame"]
    assert len(frames) == 1535
    assert all(row["payload"].startswith('{"stream":"') for row in frames)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("nonsense",), ("no topic 'nonsense'", "features.ofi")),
        (("state.ofi",), ("no topic 'state.ofi'",)),
        (("signals", "--count", "0"), ("--count is 0", "at least 1")),
        (("signals", "--from", "yesterday"), ("--from is 'yesterday'", "earliest, latest, a time")),
        (("signals", "--from", "seq:12:1"), ("--from is 'seq:12:1'", "below 12")),
        (("signals", "--from", "seq:1"), ("--from is 'seq:1'", "seq:PARTITION:NUMBER")),
        (("signals", "--from", "seq:-1:5"), ("--from is 'seq:-1:5'",)),
    ],
)
def test_tap_refuses_bad_arguments(run: Run, arguments: tuple[str, ...], words: tuple[str, ...]) -> None:
    refused(call(run.bootstrap, "tap", *arguments, "--run", str(run.out)), *words)


def test_reading_commands_name_a_run_that_is_not_there(run: Run, tmp_path: Path) -> None:
    for arguments in (("tap", "signals"), ("topics",)):
        refused(call(run.bootstrap, *arguments, "--run", str(tmp_path)), str(tmp_path), "holds no run", "--run DIR")
    missing = tmp_path / "missing"
    refused(call(run.bootstrap, "lake", "sql", "SELECT 1", "--run", str(missing)), str(missing), "not a folder")


def test_a_prefix_without_topics_is_named(run: Run) -> None:
    for arguments in (("tap", "signals", "--no-follow"), ("topics",), ("verify",)):
        done = call(run.bootstrap, *arguments, "--run", str(run.out), "--prefix", "nobody.")
        refused(done, "no topic 'nobody.", "prefix 'nobody.'")
    done = call(run.bootstrap, "verify", "--run", str(run.out), "--against", "nobody.")
    refused(done, "no topic 'nobody.market.ticks'")


def test_topics_lists_every_topic_with_its_records_and_lag(run: Run) -> None:
    done = call(run.bootstrap, "topics", "--run", str(run.out), "--json")
    assert done.code == 0, done.stderr
    rows = {row["topic"]: row for row in json.loads(done.stdout)}
    assert rows["signals"]["records"] >= run.summary["topics"]["signals"]  # markers count too
    assert rows["signals"]["partitions"] == 12
    assert rows["market.journal"]["lag"] == {"normaliser": 0, "lake": 0}
    assert all(lag == 0 for row in rows.values() for lag in row["lag"].values())
    table = call(run.bootstrap, "topics", "--run", str(run.out))
    assert table.code == 0
    assert [line.split()[0] for line in table.stdout.splitlines()[2:]] == list(rows)


def test_lake_sql_answers_in_every_format(run: Run) -> None:
    sql = "SELECT symbol, count(*) AS trades FROM prices GROUP BY symbol ORDER BY symbol"
    expected = {"AKROUSDT": 8, "CTKUSDT": 38, "KEEPUSDT": 5, "SUSHIUSDT": 40}
    ask = ("lake", "sql", sql, "--run", str(run.out), "--format")
    as_json = json.loads(call(run.bootstrap, *ask, "json").stdout)
    assert {row["symbol"]: row["trades"] for row in as_json} == expected
    as_csv = csv.DictReader(io.StringIO(call(run.bootstrap, *ask, "csv").stdout))
    assert {row["symbol"]: int(row["trades"]) for row in as_csv} == expected
    table = call(run.bootstrap, *ask, "table").stdout.splitlines()
    assert [line.split() for line in table[2:-1]] == [[symbol, str(count)] for symbol, count in expected.items()]
    assert table[-1] == "(4 rows)"


@pytest.mark.parametrize("sql", ["SELEC 1", "SELECT * FROM nowhere", "SELECT nothing FROM ofi", "DROP VIEW ofi; SELEC"])
def test_lake_sql_refuses_what_is_wrong(run: Run, sql: str) -> None:
    refused(call(run.bootstrap, "lake", "sql", sql, "--run", str(run.out)), "SQL refused")
