"""`orderflow preflight`: the verdict on a sound exchange, on faulty ones, and on one that can't be run against."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from orderflow.cli.preflight import CHECKS, Evidence, judge
from run_helpers import ALTS, Finished, call, command, delete_topics, refused, shared_run

from tests.serving import serving

pytestmark = [pytest.mark.kafka, pytest.mark.slow]

BY_CHANCE = {"|E - R| p99", "clock drift"}
"""What a busy machine may fail by itself."""


def preflight(bootstrap: str, out: Path, *arguments: str, **settings: str) -> Finished:
    verdict = str(out.parent / "verdict.json")
    what = ["preflight", "--duration", "12", "--no-view", "--out", str(out), "--json", verdict, *arguments]
    try:
        return command(bootstrap, *what, **settings)
    finally:
        if (out / "run.json").exists():
            delete_topics(bootstrap, json.loads((out / "run.json").read_text("utf-8"))["topic_prefix"])


def verdict_of(out: Path) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    verdict = json.loads((out.parent / "verdict.json").read_text("utf-8"))
    return verdict, {check["name"]: check for check in verdict["checks"]}


def test_a_sound_exchange_is_fit(kafka_bootstrap: str, tmp_path: Path) -> None:
    out = tmp_path / "run"
    done = preflight(kafka_bootstrap, out, "--source", "sim", "--symbols", "BTCUSDT,ETHUSDT")
    verdict, checks = verdict_of(out)
    failed = {name for name, check in checks.items() if not check["passed"]}
    assert failed <= BY_CHANCE, done.stdout
    assert done.code == (1 if failed else 0)
    assert verdict == json.loads((out / "preflight.json").read_text("utf-8"))
    assert (verdict["passed"], verdict["symbols"]) == (not failed, ["BTCUSDT", "ETHUSDT"])
    assert checks["ran to its end"]["number"] > 10
    assert checks["clock drift"]["number"] is not None
    screen = done.stdout[done.stdout.index("preflight  ") :].splitlines()
    assert max(map(len, screen[: len(CHECKS) + 1])) <= 100
    assert screen[-1] == ("FIT" if not failed else f"NOT FIT: {len(failed)} of {len(CHECKS)} checks failed")


def test_delays_cuts_and_losses_are_named(kafka_bootstrap: str, tmp_path: Path) -> None:
    """Every frame 400 ms late, BTCUSDT's diffs torn apart while the socket lives, its trades silent."""
    out = tmp_path / "run"
    faults = "; ".join(
        [
            "skew@0s+3600s:value=400",
            "silent_stream@0s+3600s:symbol=BTCUSDT,stream=aggTrade",
            *(f"diff_gap@{at_sec}s:symbol=BTCUSDT" for at_sec in range(2, 60)),
            "duplicate@0s+3600s:stream=bookTicker,value=0.3",
        ]
    )
    done = preflight(kafka_bootstrap, out, "--source", "sim", "--symbols", "BTCUSDT,ETHUSDT", SIM_FAULTS=faults)
    assert done.code == 1, (done.stdout, done.stderr)
    verdict, checks = verdict_of(out)
    assert verdict["passed"] is False
    failed = {name for name, check in checks.items() if not check["passed"]}
    assert failed - BY_CHANCE == {
        "book gaps but by reconnects",
        "duplicate frames",
        "quotes with a synced book",
        "prices and cvd on disk",
    }
    assert checks["|E - R| p99"]["number"] >= 400
    assert not checks["|E - R| p99"]["passed"]
    assert checks["prices and cvd on disk"]["value"] == "none of BTCUSDT (prices), BTCUSDT (cvd)"
    assert "prices and cvd on disk: none of BTCUSDT" in done.stdout
    assert "is the symbol listed and traded?" in done.stdout


@pytest.fixture
def exchange() -> Iterator[int]:
    """A simulated exchange that lists BTCUSDT alone; its port."""
    with serving("simexchange", "--symbols", "BTCUSDT") as port:
        yield port


def test_a_symbol_that_is_not_listed_cannot_be_run(kafka_bootstrap: str, tmp_path: Path, exchange: int) -> None:
    out = tmp_path / "run"
    done = preflight(
        kafka_bootstrap,
        out,
        "--symbols",
        "BTCUSDT,NOSUCHUSDT",
        WSS_URL=f"ws://127.0.0.1:{exchange}",
        REST_URL=f"http://127.0.0.1:{exchange}",
    )
    assert done.code == 2, (done.stdout, done.stderr)
    assert "NOSUCHUSDT" in done.stderr
    verdict, checks = verdict_of(out)
    assert (verdict["passed"], checks) == (False, {})
    assert "NOSUCHUSDT" in verdict["error"]


def test_wrong_arguments_cannot_be_run(kafka_bootstrap: str, tmp_path: Path) -> None:
    refused(call(kafka_bootstrap, "preflight", "--json", str(tmp_path / "no" / "v.json")), "--json", "does not exist")
    refused(call(kafka_bootstrap, "preflight", "--duration", "-1", "--out", str(tmp_path / "run")), "--duration is -1")


@pytest.mark.capture
def test_each_check_finds_its_fault_in_what_is_left(
    kafka_bootstrap: str, captures: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """The checks on the folder of a sound run of a capture, and on the same with its evidence altered."""
    run = shared_run(kafka_bootstrap, captures, ALTS, tmp_path_factory)

    def failed(**altered: Any) -> set[str]:
        evidence = Evidence(run.out)
        evidence.summary.update(altered)
        evidence.symbols = evidence.summary["symbols"]
        evidence.recorder = {"reconnects": 0, **evidence.recorder, **altered.get("recorder", {})}
        try:
            return {check.name for check in judge(evidence) if not check.passed}
        finally:
            evidence.close()

    fit = {"stopped_by": "duration"}
    sound = failed(**fit)
    # Far from the exchange in 2021, and without its server time.
    assert sound == {"|E - R| p99", "clock drift"}
    assert failed(stopped_by="interrupted") - sound == {"ran to its end"}
    assert failed(**fit, recorder={"reconnects": {"public": {"silent": 4}}}) - sound == {"reconnects"}
    assert failed(**fit, recorder={"reconnects": 3}) == sound
    seqs = {str(partition): 10_000 for partition in range(12)}
    assert failed(**fit, recorder={"seqs": seqs}) - sound == {"journal numbers missing"}
    unknown = failed(**fit, symbols=["SUSHIUSDT", "NOSUCHUSDT"]) - sound
    assert unknown == {"quotes with a synced book", "prices and cvd on disk"}
    assert failed(**fit, lake_disagreements=["signals has 5 records"]) - sound == {"lake holds what topics hold"}
    restarts = {"ofi": {"count": 1, "causes": ["signal SIGKILL"]}}
    assert failed(**fit, restarts=restarts) - sound == {"services restarted"}
