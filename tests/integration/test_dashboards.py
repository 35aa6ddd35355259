"""Every panel of every dashboard against a real Prometheus that scrapes a real run."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from orderflow.paths import ROOT

from grafana.boards import BOARDS
from grafana.check import Finding, Prometheus, check
from tests.prometheus_fixture import prometheus
from tests.waiting import wait_for

SERVICES = ("ingestion", "ofi", "cvd", "fusion", "signal", "sinks", "lake")
START_SEC = 600.0
FILL_SEC = 420.0
"""Minutes are judged two minutes after they began."""
STOP_SEC = 900.0
SPAN_SEC = 60.0
FAULTS: tuple[dict[str, Any], ...] = (
    {"kind": "duplicate", "at_ms": 0, "duration_ms": 10_000, "value": 0.2},
    {"kind": "garbage", "at_ms": 0, "duration_ms": 10_000, "value": 0.05},
    {"kind": "diff_gap", "at_ms": 0, "symbol": "BTCUSDT"},
)
EVENTFUL = {"Gaps, trailing hour", "Books begun anew, trailing hour", "Rejects, trailing hour"}
"""Panels that the faults must fill."""


@contextmanager
def run(folder: Path, bootstrap: str) -> Iterator[Path]:
    """A run on the simulated exchange, until the end of the block: its folder."""
    out = folder / "run"
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "libs"), "KAFKA_BOOTSTRAP": bootstrap}
    command = [sys.executable, "-m", "orderflow.cli.main", "run", "--source", "sim", "--no-view", "--out", str(out)]
    with (folder / "run.log").open("wb") as log:
        process = subprocess.Popen(
            [*command, "--duration", str(int(START_SEC + FILL_SEC))], env=environment, cwd=ROOT, stdout=log, stderr=log
        )
    try:
        yield out
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGINT)
        process.wait(STOP_SEC)


def addresses(out: Path) -> dict[str, str]:
    """Where each process has its pages, once all are up."""
    names = (*SERVICES, "simexchange")

    def look() -> dict[str, str]:
        try:
            pages = {name: json.loads((out / "status" / f"{name}.json").read_bytes()) for name in names}
            return {name: f"{page['host']}:{page['port']}" for name, page in pages.items()}
        except (OSError, ValueError):
            return {}

    found = wait_for(look, START_SEC)
    assert found, (out.parent / "run.log").read_text("utf-8", "replace")[-2000:]
    return found


def post(url: str, content: Any) -> None:
    request = urllib.request.Request(url, json.dumps(content).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=10) as answer:
        assert answer.status == 200


def unfilled(findings: list[Finding]) -> list[Finding]:
    return [
        each
        for each in findings
        if each.outcome == "wrong" or (each.outcome == "nothing happened" and each.panel in EVENTFUL)
    ]


@pytest.mark.kafka
@pytest.mark.slow
@pytest.mark.timeout(2400)
def test_every_panel_shows_a_real_run(kafka_bootstrap: str, tmp_path: Path) -> None:
    with run(tmp_path, kafka_bootstrap) as out:
        pages = addresses(out)
        exchange = pages.pop("simexchange")
        with prometheus(tmp_path, pages) as url:
            deadline = time.monotonic() + FILL_SEC
            answers = Prometheus(url)
            synced = 'sum(books{state="synced"}) == 3'
            assert wait_for(lambda: answers.get("query", query=synced)["result"], FILL_SEC, 1.0), "books not synced"
            post(f"http://{exchange}/sim/faults", FAULTS)
            missing: list[Finding] = []

            def complete() -> bool:
                missing[:] = unfilled(check(answers, BOARDS, SPAN_SEC))
                return not missing

            wait_for(complete, deadline - time.monotonic(), 5.0)
    assert missing == []
