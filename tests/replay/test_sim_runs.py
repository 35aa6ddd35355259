"""Whole runs over real sockets: the simulated exchange plays a capture, and a market of its own."""

from __future__ import annotations

import signal
from decimal import Decimal
from pathlib import Path

import pytest
from run_helpers import ALTS, MAJORS, Run, end, lake, start_run
from test_capture_runs import ALTS_EXPECTED, MAJORS_EXPECTED, ORACLE, SIGNED, counts

pytestmark = [pytest.mark.kafka, pytest.mark.slow]

SIGNALS_ENOUGH = 1_500


def run_of(bootstrap: str, out: Path, *arguments: str) -> Run:
    run = start_run(bootstrap, ["run", "--source", "sim", *arguments, "--no-view", "--out", str(out)], out)
    try:
        assert run.finish() == 0, run.output
    finally:
        end(run)
    return run


@pytest.mark.capture
@pytest.mark.parametrize("name", [ALTS, MAJORS])
def test_a_capture_over_sockets_gives_the_same_figures(
    name: str, kafka_bootstrap: str, captures: Path, tmp_path: Path
) -> None:
    run = run_of(
        kafka_bootstrap, tmp_path / "run", "--capture", str(captures / name), "--speed", "max", "--exit-at-end"
    )
    signed = {symbol: total for symbol, total, _, _ in lake(run.out, SIGNED)}
    checked = {symbol: (rows, equal) for symbol, rows, equal in lake(run.out, ORACLE)}
    if name == ALTS:
        expected = {symbol: (depth, quotes, trades) for symbol, (depth, quotes, trades, _) in ALTS_EXPECTED.items()}
        assert signed == {symbol: cvd for symbol, (_, _, _, cvd) in ALTS_EXPECTED.items()}
    else:
        expected = dict(MAJORS_EXPECTED)
        assert signed == {"BTCUSDT": Decimal("-233.243"), "ETHUSDT": Decimal("-3932.142")}
    # Quotes, trades and the oracle do not depend on when the snapshot came. Which diffs were still ahead of it does, by
    # a hair's breadth on a busy machine: the exchange holds the market while it answers, so that none should be.
    assert counts(run, "quotes") == {symbol: quotes for symbol, (_, quotes, _) in expected.items()}
    assert counts(run, "prices") == {symbol: trades for symbol, (_, _, trades) in expected.items()}
    assert checked == {symbol: (depth, depth) for symbol, (depth, _, _) in expected.items()}
    assert (run.summary["gaps"], run.summary["rejects"], run.summary["lake_agrees"]) == (0, {}, True)


def test_a_market_of_its_own_ends_whole_and_keeps_the_oracle(kafka_bootstrap: str, tmp_path: Path) -> None:
    out = tmp_path / "run"
    run = start_run(kafka_bootstrap, ["run", "--source", "sim", "--seed", "7", "--no-view", "--out", str(out)], out)
    try:
        # Not for a time, of which a busy machine needs most for the start: until there is enough to judge.
        run.until("signal", lambda status: status["records_in"] > SIGNALS_ENOUGH, timeout_sec=900)
        run.process.send_signal(signal.SIGINT)
        assert run.finish() == 0, run.output
    finally:
        end(run)
    summary = run.summary
    assert set(counts(run, "signals")) == set(summary["symbols"]) == {"BTCUSDT", "ETHUSDT", "SOLUSDT"}
    assert (summary["gaps"], summary["rejects"], summary["lake_agrees"]) == (0, {}, True)
    assert summary["first_feature_sec"] is not None
    checked = lake(run.out, ORACLE)
    assert len(checked) == 3
    assert all(rows == equal > 20 for _, rows, equal in checked)
    trades = lake(
        run.out, "SELECT symbol, max(agg_trade_id) - min(agg_trade_id) + 1, count(*) FROM {prices} GROUP BY 1"
    )
    assert all(span == count for _, span, count in trades), "trade ids without gaps"
