"""What `orderflow run` makes of the environment before anything is started."""

from __future__ import annotations

from pathlib import Path

import pytest
from orderflow.cli.run import _own_name, _plan_file


def test_a_plan_is_found_from_where_the_command_was_called(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "plan.txt").write_text("close_1006@25s")
    monkeypatch.chdir(tmp_path)
    assert _plan_file("plan.txt") == tmp_path / "plan.txt"


@pytest.mark.parametrize("plan", ["", "close_1006@25s", '[{"kind": "drop"}]' * 400, "a\0b"])
def test_a_plan_that_is_written_out_is_no_file(plan: str) -> None:
    assert _plan_file(plan) is None


def test_the_closing_hint_can_be_called(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr("sys.argv", [".venv/bin/orderflow", "run"])
    assert _own_name() == ".venv/bin/orderflow"
    monkeypatch.setattr("sys.argv", ["/somewhere/main.py", "run"])
    assert _own_name() == "orderflow"
