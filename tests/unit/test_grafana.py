"""The dashboards: as their script makes them, of metrics that exist, with queries that Prometheus takes and units that fit."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import yaml
from orderflow.paths import ROOT

from grafana.boards import BOARDS
from grafana.boards.quality import WAITING
from grafana.build import FOLDER, contents
from grafana.check import SYNTHETIC, Prometheus, check, expand, is_waiting, metrics_of
from grafana.panels import DATASOURCE, RED, WIDTH, Panel, Unit
from tests.prometheus_fixture import prometheus

GRAFANA = ROOT / "grafana"
PANELS = [(board, panel) for board in BOARDS for panel in board.panels()]
NAMES = [f"{board.uid.removeprefix('orderflow-')}: {panel.title}" for board, panel in PANELS]
PER_SECOND = {Unit.MessagesPerSecond, Unit.RecordsPerSecond, Unit.EventsPerSecond, Unit.RowsPerSecond}
UNITS = (
    (r"_ms$", {Unit.Milliseconds}),
    (r"_(sec|seconds)$", {Unit.Seconds, Unit.DurationSeconds}),
    (r"_bytes$", {Unit.BytesIEC}),
    (r"_bps$", {"suffix: bps"}),
    (r"_tps$|:rate\d+m$", PER_SECOND),
    (r"_hit_rate|:ratio|_ratio$|match_rate", {Unit.PercentUnit}),
)
"""(end of a metric's name, units that a panel of it may have)."""


def dashboards() -> dict[str, dict[str, Any]]:
    return {path.name: json.loads(path.read_text("utf-8")) for path in sorted(FOLDER.glob("*.json"))}


def documented() -> set[str]:
    """Names of docs/metrics.md: whatever stands as code, without labels."""
    text = (ROOT / "docs" / "metrics.md").read_text("utf-8")
    names = {re.sub(r"\{.*", "", code) for code in re.findall(r"`([^`]+)`", text)}
    return names | {f":{name.rpartition(':')[2]}" for name in names}


def test_files_are_what_the_script_makes() -> None:
    assert {path.name: path.read_text("utf-8") for path in FOLDER.glob("*.json")} == contents(), (
        "run `.venv/bin/python -m grafana.build`"
    )


@pytest.mark.parametrize(("board", "panel"), PANELS, ids=NAMES)
def test_panels_say_what_they_show(board: Any, panel: Panel) -> None:
    assert panel.title and len(panel.text) > 8 and panel.unit
    assert 1 <= len(panel.queries) <= 8
    variables = {variable.name for variable in board.variables}
    for query in panel.queries:
        assert set(re.findall(r"\$(\w+)", query.expr)) <= variables | {"__rate_interval"}, query.expr
        # A figure of each process would be a crowd of lines without names.
        assert query.legend or panel.kind == "table", query.expr
        for label in re.findall(r"\{\{(\w+)\}\}", query.legend):
            assert label in query.expr or label in ("service", "regime", "__name__"), (label, query.expr)


@pytest.mark.parametrize(("board", "panel"), PANELS, ids=NAMES)
def test_units_fit(board: Any, panel: Panel) -> None:
    for query in panel.queries:
        if re.search(r"(rate|increase)\(|count\(| / ", query.expr):
            continue
        for name in metrics_of(query.expr):
            for ending, units in UNITS:
                assert not re.search(ending, name) or panel.unit in units, (name, panel.unit)


@pytest.mark.parametrize(("board", "panel"), PANELS, ids=NAMES)
def test_rates_are_per_second_or_shares(board: Any, panel: Panel) -> None:
    for query in panel.queries:
        if " / " in query.expr:
            assert panel.unit in (Unit.PercentUnit, Unit.Short), query.expr
        elif query.expr.startswith("60 * "):
            assert panel.unit == Unit.CountsPerMinute, query.expr
        elif re.search(r"\brate\(", query.expr) and "process_cpu" not in query.expr:
            assert panel.unit in PER_SECOND, query.expr
        elif "increase(" in query.expr:
            assert panel.unit == Unit.Short, query.expr


def test_metrics_are_documented() -> None:
    known = documented()
    for _, panel in PANELS:
        for query in panel.queries:
            for name in metrics_of(query.expr) - SYNTHETIC:
                assert (
                    name in known
                    or any(each.startswith(name) for each in known if name.endswith("_"))
                    or (name.startswith("recorder_"))
                ), f"{panel.title}: {name} is not in docs/metrics.md"


def test_what_waits_is_asked_for() -> None:
    asked = {name for _, panel in PANELS for query in panel.queries for name in metrics_of(query.expr)}
    assert asked >= WAITING


def test_names_in_queries_are_found() -> None:
    expr = 'sum by (a, b) (rate(x_total{c=~"$d",e="by"}[5m])) / on (job) group_left (f) max(y:z:rate1m >= bool 0) or {__name__=~"slice_auc_.+"}'
    assert metrics_of(expr) == {"x_total", "y:z:rate1m", "slice_auc_"}


def test_dashboards_are_sound() -> None:
    made = dashboards()
    assert len(made) == len(BOARDS)
    assert len({each["uid"] for each in made.values()}) == len(made)
    for name, each in made.items():
        numbers = Counter(panel["id"] for panel in each["panels"])
        assert max(numbers.values()) == 1, name
        taken: set[tuple[int, int]] = set()
        for panel in each["panels"]:
            place = panel["gridPos"]
            cells = {
                (x, y)
                for x in range(place["x"], place["x"] + place["w"])
                for y in range(place["y"], place["y"] + place["h"])
            }
            assert place["x"] + place["w"] <= WIDTH, (name, panel["title"])
            assert not cells & taken, (name, panel["title"])
            taken |= cells


def test_what_is_shown_as_now_is_asked_of_now() -> None:
    """The last value of a range would stand for an hour after its source is gone."""
    stats = [panel for each in dashboards().values() for panel in each["panels"] if panel["type"] in ("stat", "table")]
    assert stats
    for panel in stats:
        for target in panel["targets"]:
            assert target["instant"] is True and not target.get("range"), panel["title"]


def test_a_clock_that_is_behind_is_shown_too() -> None:
    (panel,) = (panel for _, panel in PANELS if panel.title == "Clock drift")
    assert "by (instance)" in panel.queries[0].expr
    assert [value for value, _ in panel.steps] == [-200, 200] and panel.below == RED


def test_panels_that_the_chosen_symbols_do_not_narrow_say_so() -> None:
    for board, panel in PANELS:
        if panel.title.split(",")[0] in ("Gaps", "Rejects", "Books begun anew", "Blocked"):
            assert any(variable.name == "symbol" for variable in board.variables)
            assert "whichever are chosen" in panel.text, panel.title


def test_every_row_of_panels_is_full() -> None:
    for name, each in dashboards().items():
        widths: Counter[int] = Counter()
        for panel in each["panels"]:
            widths[panel["gridPos"]["y"]] += panel["gridPos"]["w"]
        assert {y: width for y, width in widths.items() if width != WIDTH} == {}, name


def test_they_are_provisioned() -> None:
    (source,) = yaml.safe_load((GRAFANA / "provisioning/datasources/prometheus.yaml").read_text("utf-8"))["datasources"]
    assert (source["uid"], source["type"]) == (DATASOURCE.uid, DATASOURCE.type_val)
    (provider,) = yaml.safe_load((GRAFANA / "provisioning/dashboards/orderflow.yaml").read_text("utf-8"))["providers"]
    grafana = yaml.safe_load((ROOT / "docker-compose.yml").read_text("utf-8"))["services"]["grafana"]
    folder = provider["options"]["path"]
    assert f"./grafana/dashboards:{folder}:ro" in grafana["volumes"]
    home = Path(grafana["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"])
    assert str(home.parent) == folder and (FOLDER / home.name).exists()
    scraped = yaml.safe_load((ROOT / "infra/prometheus/prometheus.yml").read_text("utf-8"))["global"]["scrape_interval"]
    assert source["jsonData"]["timeInterval"] == scraped
    listed = yaml.safe_load((GRAFANA / "kustomization.yaml").read_text("utf-8"))["configMapGenerator"]
    assert {"grafana-dashboards": [f"dashboards/{name}" for name in sorted(dashboards())]}.items() <= {
        each["name"]: each["files"] for each in listed
    }.items()


def test_prometheus_parses_every_query(tmp_path: Path) -> None:
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("promtool is not installed (Debian: prometheus)")
    queries = [expand(query.expr) for _, panel in PANELS for query in panel.queries]
    rules = [{"record": f"query:{number}", "expr": expr} for number, expr in enumerate(queries)]
    path = tmp_path / "queries.yml"
    path.write_text(yaml.safe_dump({"groups": [{"name": "dashboards", "rules": rules}]}), "utf-8")
    done = subprocess.run([promtool, "check", "rules", path], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_check_finds_what_nothing_exports(tmp_path: Path) -> None:
    """Against a Prometheus that scrapes nothing, every panel is wrong but those that wait."""
    with prometheus(tmp_path, targets={}) as url:
        findings = check(Prometheus(url), BOARDS, 60.0)
    outcomes = {each.outcome for each in findings if not is_waiting(each.expr) and "ALERTS" not in each.expr}
    assert outcomes == {"wrong"}
    assert {each.outcome for each in findings if is_waiting(each.expr)} == {"waiting"}
