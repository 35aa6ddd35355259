"""Crash points: read once, refused when wrong, deadly at the count."""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest
from orderflow.errors import ConfigError
from orderflow.streaming import crash


@pytest.mark.parametrize("text", ["nowhere", "polled:0", "polled:x", "polled:-1", ":2"])
def test_a_wrong_point_is_refused_by_name(text: str) -> None:
    with pytest.raises(ConfigError, match="ORDERFLOW_CRASH_POINT is") as refused:
        crash.arm({crash.ENVIRONMENT: text})
    assert text in str(refused.value)
    assert "snapshot-half" in str(refused.value)


def test_unset_and_empty_do_nothing() -> None:
    for environment in ({}, {crash.ENVIRONMENT: ""}):
        crash.arm(environment)
        for name in crash.POINTS:
            crash.point(name)
            assert not crash.due(name)


def test_the_process_dies_at_the_count_and_says_where() -> None:
    code = (
        "import os\nfrom orderflow.streaming import crash\ncrash.arm(os.environ)\n"
        "for number in range(5):\n    print(number, flush=True)\n    crash.point('stepped')\n    crash.point('polled')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={"ORDERFLOW_CRASH_POINT": "polled:3"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == -signal.SIGKILL
    assert done.stdout.split() == ["0", "1", "2"]
    assert done.stderr == f"{crash.MARK}polled\n"
