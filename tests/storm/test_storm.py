"""The exchange's faults and our machine's against the real recorder and normaliser, on virtual time."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import msgspec
import pytest
from orderflow.venues.binance.sim.faults import KINDS, FaultPlan, parse_faults

from tests.storm.detection import CASES, Found, found, row, scripted
from tests.storm.judge import judge
from tests.storm.plan import MACHINE_KINDS, MachineFault, StormPlan
from tests.storm.run import digest, storm
from tests.storm.seeds import LOST_ONCE
from tests.storm.world import Options, Output, Result

ROOT: Final = Path(__file__).resolve().parents[2]
SEEDS: Final = int(os.environ.get("ORDERFLOW_STORM_SEEDS", "10"))


def test_every_kind_has_its_test() -> None:
    assert set(CASES) == {*KINDS, *MACHINE_KINDS}


@pytest.mark.parametrize("kind", CASES)
def test_one_kind_alone_is_noticed_and_recovered_from(kind: str) -> None:
    result = storm(scripted(kind))
    verdict = judge(result)
    assert verdict.violations == []
    assert min(verdict.counts[what] for what in ("frames", "trades", "quotes", "books", "answers")) > 0
    # What no one asks, pings or connects into is no fault yet; a clock is off whether anyone looks or not.
    clocks = ("clock_jump", "local_clock_jump")
    assert kind in (*MACHINE_KINDS, *clocks) or any(entry.kind == kind for entry in result.ledger)
    left, case = found(kind, result), CASES[kind]
    assert left.missing == []
    assert (left.detected_sec or 0.0) <= case.detected_sec
    assert left.recovered_sec <= case.recovered_sec
    assert "no_pong" not in result.closed


def test_an_undisturbed_run_says_nothing_that_a_fault_must_leave() -> None:
    result = storm(Options(seed=5, minutes=2.5, activity=3.0, plan=StormPlan(exchange=FaultPlan(seed=3), machine=())))
    assert judge(result).violations == []
    assert {event.record["event_type"] for event in result.events} <= {
        "route_down",
        "route_up",
        "snapshot_needed",
        "book_synced",
    }
    assert result.rejects == []
    for case in CASES.values():
        for metric in case.metrics:
            assert result.metric(metric.name, **metric.labels) <= metric.above or metric.name == "market_events_total"


def test_the_table_of_the_documentation_is_this_one() -> None:
    """But for the times, which are those of one run."""
    text = (ROOT / "docs" / "simulator.md").read_text("utf-8")
    documented = [line.split(" | ")[:4] for line in text.splitlines() if line.startswith("| `")]
    for kind in CASES:
        assert row(kind, Found([], 0.0, 0.0)).split(" | ")[:4] in documented, kind


@pytest.mark.parametrize("seed", range(1, SEEDS + 1))
def test_a_storm(seed: int) -> None:
    options = Options(seed=seed, minutes=4.5, activity=2.5, mean_gap_ms=15_000)
    assert judge(storm(options)).violations == []


@pytest.mark.parametrize("options", [each for each, _ in LOST_ONCE], ids=[f"seed {each.seed}" for each, _ in LOST_ONCE])
def test_what_was_lost_once(options: Options) -> None:
    assert judge(storm(options)).violations == []


def test_another_process_with_another_hash_seed_does_the_same_to_the_byte() -> None:
    options = Options(seed=4, minutes=4.5, activity=2.5, mean_gap_ms=6_000)
    result = storm(options)
    kinds = {each.kind for each in result.plan.exchange.faults} | {each.kind for each in result.plan.machine}
    assert len(kinds) > 5
    found = {digest(result)}
    for hash_seed in ("1", "4242"):
        environment = {**os.environ, "PYTHONHASHSEED": hash_seed, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'libs'}"}
        command = [sys.executable, "-m", "tests.storm.run", msgspec.json.encode(options).decode()]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
        found.add(done.stdout.strip())
    assert len(found) == 1


# One symbol's faults are its own


def _values(result: Result, symbol: str) -> list[dict[str, Any]]:
    """A symbol's rows without what depends on when and where in the journal they came."""
    passing = ("seq", "recv_ts_ns", "recv_ts_ms", "latency_ms", "meta")
    rows = [row.record for row in result.rows if row.record["symbol"] == symbol]
    return [{name: value for name, value in row.items() if name not in passing} for row in rows]


def test_one_symbols_gaps_leave_the_rows_of_the_others_as_they_were() -> None:
    text = (
        "drop@30s+30s:symbol=DOGEUSDT,value=0.3;diff_gap@35s:symbol=DOGEUSDT,value=5;"
        "garbage@70s+10s:symbol=DOGEUSDT,value=0.3;crossed_book@85s:symbol=DOGEUSDT"
    )
    calm = Options(seed=8, minutes=2.5, plan=StormPlan(exchange=FaultPlan(seed=8), machine=()))
    wild = msgspec.structs.replace(
        calm, plan=StormPlan(exchange=FaultPlan(seed=8, faults=parse_faults(text)), machine=())
    )
    undisturbed, disturbed = storm(calm), storm(wild)
    assert judge(disturbed).violations == []
    assert _values(undisturbed, "DOGEUSDT") != _values(disturbed, "DOGEUSDT")
    for symbol in ("BTCUSDT", "XRPUSDT"):
        assert len(_values(undisturbed, symbol)) > 1000
        assert _values(undisturbed, symbol) == _values(disturbed, symbol)


# The judge can be made to condemn


@pytest.fixture(scope="module")
def fair() -> Result:
    """A run in which trades were lost, books resynced and a recorder was killed, all of it reported."""
    text = "rest_503@30s+20s:stream=aggTrades;drop@32s+8s:stream=aggTrade,value=0.5;diff_gap@50s"
    machine = (MachineFault(kind="kill", at_ms=65_000, duration_ms=1_000),)
    plan = StormPlan(exchange=FaultPlan(seed=2, faults=parse_faults(text)), machine=machine)
    result = storm(Options(seed=6, minutes=2.5, plan=plan))
    assert judge(result).violations == []
    assert any(event.record["event_type"] == "trades_lost" for event in result.events)
    return result


def _rows(result: Result, source: str) -> list[Output]:
    return [row for row in result.rows if row.record["src"] == source and row.record["book_state"] == "synced"]


def _without_an_event(result: Result, kind: str) -> None:
    result.events = [event for event in result.events if event.record["event_type"] != kind]


def _cut_journal(result: Result) -> None:
    partition = max(result.journal, key=lambda each: len(result.journal[each]))
    del result.journal[partition][len(result.journal[partition]) // 2]


def _foreign_frame(result: Result) -> None:
    result.lives[0].taken = [each for each in result.lives[0].taken if b"aggTrade" not in each.frame]


def _frame_never_written(result: Result) -> None:
    taken = result.lives[-1].taken
    taken.insert(len(taken) // 2, taken[-1]._replace(frame=b'{"stream":"btcusdt@depth@100ms","data":{"u":1}}'))


def _change(source: str, field: str, value: object) -> Callable[[Result], None]:
    def change(result: Result) -> None:
        rows = _rows(result, source)
        rows[len(rows) // 2].record[field] = value

    return change


def _double_a_trade(result: Result) -> None:
    row = _rows(result, "aggTrade")[40]
    result.rows.insert(result.rows.index(row), row)


def _drop_a_row(source: str) -> Callable[[Result], None]:
    def drop(result: Result) -> None:
        rows = _rows(result, source)
        result.rows.remove(rows[len(rows) // 2])

    return drop


def _change_a_level(result: Result) -> None:
    _rows(result, "depth")[100].record["bid_qtys"][2] += 0.001


def _claim_to_be_synced(result: Result) -> None:
    unsynced = [row for row in result.rows if row.record["src"] == "depth"]
    unsynced[50].record["bid_px"] = unsynced[49].record["ask_px"]


def _stay_unwell(result: Result) -> None:
    result.samples[-1].unwell = ("BTCUSDT depth behind",)


@pytest.mark.parametrize(
    "mutation",
    [
        _cut_journal,
        _foreign_frame,
        _frame_never_written,
        _change("aggTrade", "qty", 123.0),
        _change("aggTrade", "side", None),
        _change("bookTicker", "bid_qty", 123.0),
        _change("depth", "bid", 1.0),
        _double_a_trade,
        _drop_a_row("aggTrade"),
        _drop_a_row("bookTicker"),
        _change_a_level,
        _claim_to_be_synced,
        _stay_unwell,
        lambda result: _without_an_event(result, "trades_lost"),
        lambda result: result.errors.append("a task failed"),
        lambda result: result.attempts.extend([1.0] * 400),
    ],
)
def test_the_judge_sees_every_mutation(fair: Result, mutation: Callable[[Result], None]) -> None:
    spoilt = copy.copy(fair)
    for name in ("rows", "events", "samples", "lives"):
        setattr(spoilt, name, [copy.copy(each) for each in getattr(fair, name)])
    for output in spoilt.rows:
        output.record = {**output.record, "bid_qtys": list(output.record["bid_qtys"])}
    spoilt.journal = {partition: list(records) for partition, records in fair.journal.items()}
    spoilt.errors, spoilt.attempts = list(fair.errors), list(fair.attempts)
    mutation(spoilt)
    assert judge(spoilt).violations
