"""`orderflow record`: sessions of a simulated exchange into files, and runs back into files."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from orderflow.capture import frames
from orderflow.cli.inspection import Report, inspect
from orderflow.errors import CaptureError
from run_helpers import (
    ALTS,
    ROOT,
    call,
    command,
    end,
    environment,
    lake,
    refused,
    run_arguments,
    shared_run,
    start_run,
)

from tests.waiting import wait_for

WAIT_SEC = 450.0


@contextmanager
def recording(out: Path, *arguments: str, **settings: str) -> Iterator[subprocess.Popen[str]]:
    """`orderflow record --source sim` in the background; killed at the exit of the block where it still runs."""
    process = subprocess.Popen(
        [sys.executable, "-m", "orderflow.cli.main", "record", "--source", "sim", "--out", str(out), *arguments],
        env=environment("", **settings),
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        yield process
    finally:
        if process.poll() is None:
            process.kill()
        process.wait()
        assert process.stdout is not None
        process.stdout.close()


def until(process: subprocess.Popen[str], part: Path, holds: Callable[[Report], bool]) -> Report:
    """Look into a recording under way until something holds of it."""
    report: Report | None = None

    def look() -> bool:
        nonlocal report
        try:
            report = inspect(part)
        except CaptureError:
            return process.poll() is not None  # not there yet, or without a frame
        assert report.error == "", "what lies on the disk is whole at any time"
        return holds(report) or process.poll() is not None

    if wait_for(look, WAIT_SEC) and report is not None and holds(report):
        return report
    raise AssertionError(f"{part} did not come to hold what was waited for; exit code {process.poll()}")


def test_books_are_whole_again_after_the_sockets_were_cut(tmp_path: Path) -> None:
    out = tmp_path / "session.gz"
    with recording(out, "--symbols", "BTCUSDT,ETHUSDT", SIM_LIFE_SEC="4") as process:
        until(
            process,
            tmp_path / "session.gz.part",
            lambda report: (
                len(report.symbols) == 2
                and all(each.bracketed >= 2 and each.book_state == "synced" for each in report.symbols)
            ),
        )
        process.send_signal(signal.SIGINT)
        output = process.communicate(timeout=WAIT_SEC)[0]
    assert process.returncode == 0, output
    report = inspect(out)
    assert report.symbols[0].chain_breaks >= 1
    for each in report.symbols:
        assert each.oracle_equal == each.oracle_checked > 10
        assert each.bracketed >= 2
    assert f"{report.frames:,} lines" in output
    assert [path.name for path in tmp_path.iterdir()] == ["session.gz"]


def test_a_kill_leaves_a_readable_part(tmp_path: Path) -> None:
    part = tmp_path / "session.gz.part"
    with recording(tmp_path / "session.gz", "--symbols", "BTCUSDT") as process:
        before = until(process, part, lambda report: report.frames > 100)
        process.kill()
        process.wait()
    report = inspect(part)
    assert (report.error, report.faults) == ("", [])
    assert report.frames >= before.frames
    part.rename(tmp_path / "rescued.gz")
    assert sum(1 for _ in frames(tmp_path / "rescued.gz")) == report.frames


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--duration", "0"), ("--duration is 0", "above 0")),
        (("--duration", "nan"), ("--duration is nan",)),
        (("--rotate-sec", "3"), ("--rotate-sec is 3", "from 10 on")),
        (("--rotate-mb", "-1"), ("--rotate-mb is -1", "above 0")),
        (("--ws-url", "ws://127.0.0.1:1"), ("--ws-url and --rest-url go together",)),
        (("--source", "sim", "--ws-url", "ws://h", "--rest-url", "http://h"), ("--source sim starts its own",)),
        (("--run", "--symbols", "BTCUSDT"), ("--symbols is for a recording from sockets",)),
        (("--symbols", "BTC/USDT"), ("symbols holds 'BTC/USDT'",)),
        (("--run", "/nowhere"), ("/nowhere", "holds no run")),
    ],
)
def test_wrong_options_are_refused(tmp_path: Path, arguments: tuple[str, ...], words: tuple[str, ...]) -> None:
    refused(call("", "record", "--out", str(tmp_path / "a.gz"), *arguments), *words)
    assert list(tmp_path.iterdir()) == []


def test_an_exchange_that_is_not_there_leaves_no_file(tmp_path: Path) -> None:
    urls = ("--ws-url", "ws://127.0.0.1:9", "--rest-url", "http://127.0.0.1:9")
    done = command("", "record", "--out", str(tmp_path / "a.gz"), "--duration", "2", *urls)
    assert done.code == 2
    assert "orderflow: not a single frame came from ws://127.0.0.1:9" in done.stderr.splitlines()[-1]
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_is_there_is_not_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "a.gz"
    path.write_bytes(b"precious")
    refused(call("", "record", "--out", str(path), "--source", "sim"), "is there already", "another name")
    assert path.read_bytes() == b"precious"


@pytest.mark.kafka
@pytest.mark.capture
def test_the_run_of_a_capture_comes_back_as_it_was(
    kafka_bootstrap: str, captures: Path, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    run = shared_run(kafka_bootstrap, captures, ALTS, tmp_path_factory)
    done = call(run.bootstrap, "record", "--run", str(run.out), "--out", str(tmp_path / "export.gz"))
    assert (done.code, done.stderr) == (0, "")
    assert "1,535 frames and 4 snapshots of capture" in done.stdout
    assert list(frames(tmp_path / "export.gz")) == list(frames(captures / ALTS))


ROWS = {
    "prices": "symbol, agg_trade_id, price, qty, side, ts_ms, event_ts_ms, recv_ts_ms, latency_ms",
    "quotes": "symbol, update_id, bid, bid_qty, ask, ask_qty, ts_ms, event_ts_ms, recv_ts_ms, book_state",
    "book": "symbol, update_id, bid_px, bid_qty, ask_px, ask_qty, ts_ms, event_ts_ms, recv_ts_ms, book_state",
    "cvd": "symbol, agg_trade_id, delta, cvd, z_raw, z_cvd, scale, vpin, imbalance_1s",
    "ofi": "symbol, ts_ms, src, ofi_value, ofi_l1, ofi_z, mid",
}
"""What depends on frames alone: a replay makes its own ticks, by which seq counts and the micro-price is renewed."""


def rows_of(out: Path) -> dict[str, list[tuple[Any, ...]]]:
    return {
        kind: lake(out, f"SELECT {columns} FROM {{{kind}}} ORDER BY symbol, seq, sub") for kind, columns in ROWS.items()
    }


@pytest.mark.kafka
@pytest.mark.slow
def test_the_run_of_a_live_session_can_be_run_again_from_its_export(kafka_bootstrap: str, tmp_path: Path) -> None:
    what = ["run", "--source", "sim", "--symbols", "BTCUSDT,ETHUSDT", "--no-view", "--out", str(tmp_path / "live")]
    live = start_run(kafka_bootstrap, what, tmp_path / "live")
    export = tmp_path / "export.gz"
    try:
        live.until("signal", lambda status: status["records_in"] > 2_000, WAIT_SEC)
        live.process.send_signal(signal.SIGINT)
        assert live.finish() == 0, live.output
        done = call(kafka_bootstrap, "record", "--run", str(live.out), "--out", str(export))
    finally:
        end(live)
    assert (done.code, done.stderr) == (0, "")
    report = inspect(export)
    assert report.faults == []
    assert report.frames == live.summary["frames"] > 100
    again = start_run(kafka_bootstrap, run_arguments(export, tmp_path / "again"), tmp_path / "again")
    try:
        assert again.finish() == 0, again.output
    finally:
        end(again)
    expected, got = rows_of(live.out), rows_of(again.out)
    for kind in ROWS:
        assert len(expected[kind]) > 10
        assert got[kind] == expected[kind], kind
