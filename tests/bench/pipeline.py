"""The whole pipeline as its own processes, from the journal to the signals and the lake, broker included."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from itertools import islice
from pathlib import Path
from typing import Any

from orderflow.capture import frames

from tests.bench.data import ROOT
from tests.bench.stages import Figure

AIM_FRAMES_PER_SEC = 10_000.0
PACED_FRAMES_PER_SEC = 2_000.0
PACED_SEC = 25.0
RUN_TIMEOUT_SEC = 900.0


def throughput(capture: Path, out: Path) -> list[Figure]:
    """`orderflow run --speed max`: frames per second, and processor time per frame over every process but a foreign
    broker."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    summary = _run(capture, out, "--speed", "max", "--exit-at-end")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu_sec = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return [
        Figure("pipeline.frames", summary["frames_per_sec"], "frames/s", "more", AIM_FRAMES_PER_SEC, _load()),
        Figure("pipeline.cpu", cpu_sec / summary["frames"] * 1e6, "us/frame"),
    ]


def _load() -> str:
    return f"load average {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores"


def _captured_rate(capture: Path, count: int) -> float:
    """Frames per second that the first `count` frames were received at."""
    received_ns = [rx_ns for rx_ns, _, _ in islice(frames(capture), count)]
    return len(received_ns) * 1e9 / max(1, max(received_ns) - received_ns[0])


def latency(capture: Path, out: Path) -> list[Figure]:
    """Receipt to each hop at about 2,000 frames a second."""
    rate = _captured_rate(capture, int(PACED_FRAMES_PER_SEC * PACED_SEC))
    speed = f"{PACED_FRAMES_PER_SEC / rate:.3f}"
    summary = _run(capture, out, "--speed", speed, "--duration", f"{PACED_SEC:g}")
    figures = []
    for service, name in (("signal", "latency.signal"), ("sinks", "latency.sinks")):
        found = summary["latency_ms"].get(service, {})
        for quantile, label, aim in (("0.5", "p50", 15.0), ("0.99", "p99", 50.0)):
            if quantile in found:
                figures.append(Figure(f"{name}.{label}", found[quantile], "ms", aim=aim, detail=_load()))
    return figures


def _run(capture: Path, out: Path, *options: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "orderflow.cli.main", "run", "--source", "capture", "--capture", str(capture)]
    done = subprocess.run(
        [*command, *options, "--no-view", "--out", str(out)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=RUN_TIMEOUT_SEC,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"orderflow run ended with {done.returncode}: {(done.stderr or done.stdout).strip()[-500:]}")
    summary: dict[str, Any] = json.loads((out / "summary.json").read_text("utf-8"))
    return summary
