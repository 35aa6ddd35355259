"""Rounds to medians, the table, the file, and the comparison with earlier files."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

from rich.console import Console
from rich.table import Table

from tests.bench.stages import Figure

FORMAT = 1
TOLERANCE = 0.20
"""A change below this is never called a regression."""
NOISE_FACTOR = 3.0
"""Nor is one below so many times the spread of the rounds."""
NOT_COMPARED = (".p99", ".mean", "latency.", "pipeline.")
"""What other load on the machine decides as much as the code does: wall time beyond the median."""


def summarise(rounds: Sequence[tuple[float, Sequence[Figure]]]) -> dict[str, dict[str, Any]]:
    """Figures by name, from rounds of (seconds of the calibration beside it, figures).

    `value` is the median of the rounds, `spread` the median |deviation| over the median, `relative` the median cost in
    calibrations of the same round.
    """
    values: dict[str, list[float]] = {}
    relative: dict[str, list[float]] = {}
    newest: dict[str, Figure] = {}
    for calibration_sec, each in rounds:
        for figure in each:
            values.setdefault(figure.name, []).append(figure.value)
            cost = 1 / figure.value if figure.better == "more" else figure.value
            relative.setdefault(figure.name, []).append(cost / calibration_sec)
            newest[figure.name] = figure
    summary = {}
    for name, found in values.items():
        middle = median(found)
        figure = newest[name]
        summary[name] = {
            "value": middle,
            "unit": figure.unit,
            "better": figure.better,
            "aim": figure.aim,
            "spread": median(abs(value - middle) for value in found) / middle if middle else 0.0,
            "relative": median(relative[name]),
            "rounds": len(found),
            "detail": figure.detail,
        }
    return summary


def met(entry: dict[str, Any]) -> bool | None:
    """Whether a figure meets its aim; None where it has none."""
    if entry["aim"] is None:
        return None
    return bool(entry["value"] <= entry["aim"] if entry["better"] == "less" else entry["value"] >= entry["aim"])


def print_table(console: Console, summary: dict[str, dict[str, Any]], skipped: dict[str, str]) -> None:
    table = Table(box=None, header_style="bold")
    for heading in ("figure", "median", "unit", "spread", "aim", ""):
        table.add_column(heading, justify="right" if heading in ("median", "spread", "aim") else "left")
    for name, entry in summary.items():
        aim, verdict = "", entry["detail"]
        if entry["aim"] is not None:
            aim = f"{'<=' if entry['better'] == 'less' else '>='} {entry['aim']:,.0f}"
            verdict = f"{'met' if met(entry) else 'MISSED'} {entry['detail']}".strip()
        digits = 0 if entry["value"] >= 1000 else 2
        table.add_row(name, f"{entry['value']:,.{digits}f}", entry["unit"], f"{entry['spread']:.1%}", aim, verdict)
    for name, reason in skipped.items():
        table.add_row(name, "-", "", "", "", f"skipped: {reason}")
    console.print(table)


def write(path: Path, content: dict[str, Any]) -> None:
    """As JSON, atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.part")
    temporary.write_text(json.dumps({"format": FORMAT, **content}, indent=2) + "\n", "utf-8")
    temporary.replace(path)


def load(path: Path) -> dict[str, Any]:
    """A file of `write`.

    Raises
    ------
    ValueError
        It is none, or of another format.
    """
    try:
        content: dict[str, Any] = json.loads(path.read_text("utf-8"))
    except (OSError, json.JSONDecodeError) as error:
        raise ValueError(f"--compare {path} can't be read: {error}") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise ValueError(f"--compare {path} is no benchmark file of format {FORMAT}: write one with --json PATH")
    return content


def regressions(now: dict[str, Any], before: Sequence[dict[str, Any]]) -> list[str]:
    """What has become slower than the median of the earlier files, beyond noise, worst first."""
    found: list[tuple[float, str]] = []
    for name, entry in now["figures"].items():
        if any(part in name for part in NOT_COMPARED):
            continue
        earlier = [each for each in before if name in each["figures"]]
        if not earlier:
            continue
        old = median(each["figures"][name]["relative"] for each in earlier)
        new = entry["relative"]
        spread = max(entry["spread"], *(each["figures"][name]["spread"] for each in earlier))
        allowed = max(TOLERANCE, NOISE_FACTOR * spread)
        if new > old * (1 + allowed):
            found.append((new / old, f"{name} costs {new / old - 1:.0%} more, {allowed:.0%} is allowed"))
    return [text for _, text in sorted(found, reverse=True)]
