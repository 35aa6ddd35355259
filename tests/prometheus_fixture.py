"""A real Prometheus of Debian's package, with the project's rules, for as long as a test lasts."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import pytest
import yaml
from orderflow.cli.backing import free_port
from orderflow.paths import ROOT

START_SEC = 240.0


@contextmanager
def prometheus(folder: Path, targets: Mapping[str, str], every_sec: int = 2) -> Iterator[str]:
    """Its address. `targets`: name -> host:port of what it scrapes, as the job `orderflow`."""
    program = shutil.which("prometheus")
    if program is None:
        pytest.skip("prometheus is not installed (Debian: prometheus)")
    port = free_port()
    (folder / "targets.json").write_text(json.dumps([{"targets": [address]} for _, address in sorted(targets.items())]))
    settings = {
        "global": {"scrape_interval": f"{every_sec}s", "evaluation_interval": f"{every_sec}s"},
        "rule_files": [str(ROOT / "infra" / "prometheus" / "rules" / "*.yml")],
        "scrape_configs": [
            {"job_name": "orderflow", "file_sd_configs": [{"files": [str(folder / "targets.json")]}]},
        ],
    }
    (folder / "prometheus.yml").write_text(yaml.safe_dump(settings), "utf-8")
    log = (folder / "prometheus.log").open("wb")
    process = subprocess.Popen(
        [
            program,
            f"--config.file={folder / 'prometheus.yml'}",
            f"--storage.tsdb.path={folder / 'tsdb'}",
            f"--web.listen-address=127.0.0.1:{port}",
        ],
        stdout=log,
        stderr=log,
    )
    url = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + START_SEC
        while not _ready(url):
            if process.poll() is not None or time.monotonic() > deadline:
                raise AssertionError((folder / "prometheus.log").read_text("utf-8", "replace")[-2000:])
            time.sleep(0.1)
        yield url
    finally:
        if process.poll() is None:
            os.kill(process.pid, signal.SIGTERM)
        process.wait(30)
        log.close()


def _ready(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/-/ready", timeout=2) as answer:
            return bool(answer.status == 200)
    except (urllib.error.URLError, OSError):
        return False
