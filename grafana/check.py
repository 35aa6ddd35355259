"""Ask a real Prometheus for every panel: `python -m grafana.check --prometheus http://127.0.0.1:9090`.

Each query must parse, name only metrics that something exports, and give numbers that its unit can be. Exit status 0:
all is right. 1: something is not.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from collections import Counter
from dataclasses import dataclass
from typing import Any, Final, Literal, TypeAlias

from grafana.boards import BOARDS
from grafana.boards.quality import WAITING
from grafana.panels import ALL, Board, Panel, Query, Unit

Outcome: TypeAlias = Literal["data", "nothing happened", "waiting", "wrong"]
STEPS: Final = 60
"""Points of a graph."""
TIMEOUT_SEC: Final = 30.0
VARIABLES: Final = {"$__rate_interval": "1m", "$symbol": ALL, "$service": ALL}
SYNTHETIC: Final = {"ALERTS"}
"""Of Prometheus itself, without a description, and there only while one fires."""
NOT_METRICS: Final = re.compile(
    r'"[^"]*"'  # texts
    r"|\[[^\]]*\]|\boffset\s+\w+"  # durations
    r"|\{[^}]*\}"  # selectors
    r"|\b(?:by|without|on|ignoring|group_left|group_right)\s*\([^)]*\)"
)
NAME: Final = re.compile(r"[a-zA-Z_:][\w:]*(?!\w|\s*\()")
WORDS: Final = {"or", "and", "unless", "bool", "by", "without", "on", "ignoring", "group_left", "group_right"}
BY_NAME: Final = re.compile(r'__name__=~?"([\w:]+)')
MORE_THAN_ALL: Final = {"CPU"}
"""Panels whose share may exceed 1: of one core, where there are several."""


@dataclass(frozen=True, slots=True)
class Finding:
    board: str
    panel: str
    expr: str
    outcome: Outcome
    detail: str


def expand(expr: str) -> str:
    """A query as Grafana would send it, with everything chosen."""
    for name, value in VARIABLES.items():
        expr = expr.replace(name, value)
    return expr


def metrics_of(expr: str) -> set[str]:
    """The names of the metrics in a query; of one that is sought by its beginning, the beginning."""
    found = set(BY_NAME.findall(expr))
    plain = NOT_METRICS.sub(lambda match: "" if match[0][0] in '"[{' else " ", expr)
    return found | {name for name in NAME.findall(plain) if name not in WORDS}


def is_waiting(expr: str) -> bool:
    """Whether a query asks for what nothing exports yet."""
    return bool(metrics_of(expr) & WAITING)


class Prometheus:
    """What is asked of one.

    Raises
    ------
    OSError
        It does not answer.
    ValueError
        It answers that it can't.
    """

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")

    def get(self, path: str, **parameters: str | float) -> Any:
        """The `data` of an answer."""
        url = f"{self.url}/api/v1/{path}?{urllib.parse.urlencode(parameters)}"
        try:
            with urllib.request.urlopen(url, timeout=TIMEOUT_SEC) as answer:
                body = answer.read()
        except urllib.error.HTTPError as error:
            body = error.read()
        content = json.loads(body)
        if content.get("status") != "success":
            raise ValueError(str(content.get("error", content))[:500])
        return content["data"]

    def names(self) -> set[str]:
        """Of every metric that is scraped, also those without a series so far, and of those that rules record."""
        described = {name for name, _ in self._described()}
        return described | {f"{name}_total" for name in described} | set(self.get("label/__name__/values"))

    def _described(self) -> list[tuple[str, Any]]:
        return list(self.get("metadata").items())

    def series(self, expr: str, since_sec: float, until_sec: float) -> list[list[float]]:
        """Values of each series that a graph of the query has."""
        step = max(1.0, (until_sec - since_sec) / STEPS)
        content = self.get("query_range", query=expr, start=since_sec, end=until_sec, step=step)
        return [[float(value) for _, value in each["values"]] for each in content["result"]]

    def now(self, expr: str, at_sec: float) -> list[list[float]]:
        """The value of each series at that time."""
        content = self.get("query", query=expr, time=at_sec)
        return [[float(each["value"][1])] for each in content["result"]]


def check_query(
    prometheus: Prometheus, names: set[str], panel: Panel, query: Query, spans: tuple[float, float]
) -> tuple[Outcome, str]:
    """What a query gives, and why that is wrong where it is."""
    expr = expand(query.expr)
    try:
        series = prometheus.now(expr, spans[1]) if panel.instant else prometheus.series(expr, *spans)
    except ValueError as error:
        return "wrong", str(error)
    finite = [value for values in series for value in values if math.isfinite(value)]
    if is_waiting(query.expr):
        return ("data" if finite else "waiting"), f"{len(series)} series"
    unknown = sorted(metrics_of(query.expr) - names - SYNTHETIC)
    if unknown:
        return "wrong", f"nothing exports {', '.join(unknown)}"
    if not finite:
        return ("nothing happened", "") if query.eventful else ("wrong", "no data")
    low, high = min(finite), max(finite)
    detail = f"{len(series)} series, {low:.6g} to {high:.6g}"
    if panel.unit == Unit.PercentUnit and panel.title not in MORE_THAN_ALL and not -1e-9 <= low <= high <= 1.0 + 1e-9:
        return "wrong", f"{detail}: no shares"
    if panel.lowest is not None and low < panel.lowest:
        return "wrong", f"{detail}: the panel begins at {panel.lowest:g}"
    if panel.highest is not None and high > panel.highest:
        return "wrong", f"{detail}: the panel ends at {panel.highest:g}"
    if panel.names and not set(finite) <= set(panel.names):
        return "wrong", f"{detail}: values without a name"
    return "data", detail


def check(prometheus: Prometheus, boards: tuple[Board, ...], range_sec: float) -> list[Finding]:
    """Every query of every panel, and every variable."""
    now_sec = time.time()
    names = prometheus.names()
    findings = []
    for board in boards:
        for variable in board.variables:
            values = prometheus.get(f"label/{variable.name}/values", **{"match[]": variable.metric})
            outcome: Outcome = "data" if values else "wrong"
            findings.append(
                Finding(board.title, f"variable {variable.name}", variable.metric, outcome, ", ".join(values))
            )
        for panel in board.panels():
            for query in panel.queries:
                outcome, detail = check_query(prometheus, names, panel, query, (now_sec - range_sec, now_sec))
                findings.append(Finding(board.title, panel.title, query.expr, outcome, detail))
    return findings


def main() -> int:
    """Ask, show, judge."""
    parser = argparse.ArgumentParser(prog="python -m grafana.check", description=__doc__)
    parser.add_argument("--prometheus", default="http://127.0.0.1:9090", metavar="URL")
    parser.add_argument(
        "--range", type=float, default=300.0, metavar="S", dest="range_sec", help="seconds back (default 300)"
    )
    parser.add_argument("--verbose", action="store_true", help="show every query, not only what is wrong")
    args = parser.parse_args()
    try:
        findings = check(Prometheus(args.prometheus), BOARDS, args.range_sec)
    except (OSError, ValueError) as error:
        sys.stderr.write(f"{args.prometheus}: {error}\n")
        return 1
    for each in findings:
        if args.verbose or each.outcome == "wrong":
            print(f"{each.outcome:<16}  {each.board} / {each.panel}: {each.detail}\n{'':18}{each.expr}")
    counts = Counter(each.outcome for each in findings)
    print(", ".join(f"{count} {outcome}" for outcome, count in sorted(counts.items())))
    return 1 if counts["wrong"] else 0


if __name__ == "__main__":
    sys.exit(main())
