"""Prometheus' rules by Prometheus' own tool: every alert fires when it should, clears, and stays quiet when it should."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from alert_cases import CASES, RECORDED, Case, Series

ROOT = Path(__file__).resolve().parents[2]
RULES = ROOT / "infra" / "prometheus" / "rules"
RUNBOOKS = ROOT / "docs" / "runbooks.md"
METRICS = (ROOT / "docs" / "metrics.md").read_text()
IMAGE = "prom/prometheus"


def rules(kind: str) -> list[dict[str, Any]]:
    return [
        rule
        for path in sorted(RULES.glob("*.yml"))
        for group in yaml.safe_load(path.read_text())["groups"]
        for rule in group["rules"]
        if kind in rule
    ]


ALERTS = {rule["alert"]: rule for rule in rules("alert")}


def tool(name: str, folder: Path) -> list[str]:
    """The command, installed or in its image; the test is skipped where neither is there."""
    if shutil.which(name):
        return [name]
    images = ["docker", "image", "ls", "-q", IMAGE]
    if shutil.which("docker") and name == "promtool" and subprocess.run(images, capture_output=True).stdout.strip():
        mounts = [part for path in (ROOT, folder) for part in ("-v", f"{path}:{path}:ro")]
        return ["docker", "run", "--rm", *mounts, "--entrypoint", name, IMAGE]
    pytest.skip(f"no {name}: apt-get install prometheus, or docker pull {IMAGE}")


def firing(case: Case, at: str, labels: list[dict[str, str]]) -> dict[str, Any]:
    """A test of promtool: which instances of the alert fire at that time."""
    severity = ALERTS[case.alert]["labels"]["severity"]
    samples = []
    for each in labels:
        whole = {"alertname": case.alert, "alertstate": "firing", "severity": severity, **each}
        written = ",".join(f"{name}={json.dumps(value)}" for name, value in sorted(whole.items()))
        samples.append({"labels": f"ALERTS{{{written}}}", "value": 1})
    return {
        "expr": f'ALERTS{{alertname="{case.alert}",alertstate="firing"}}',
        "eval_time": at,
        "exp_samples": samples,
    }


def promtool_test(name: str, series: Series, tests: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "name": name,
        "interval": "15s",
        "input_series": [{"series": each, "values": values} for each, values in series.items()],
        "promql_expr_test": tests,
    }


def run_promtool(folder: Path, tests: list[dict[str, Any]], names: set[str]) -> None:
    """Run tests with those rules of the repository alone that are named: promtool computes every rule for every test."""
    chosen = folder / "rules.yml"
    groups = [
        {"name": rule[kind], "rules": [rule]}
        for kind in ("record", "alert")
        for rule in rules(kind)
        if rule[kind] in names
    ]
    chosen.write_text(json.dumps({"groups": groups}))
    path = folder / "tests.yml"
    order = [group["name"] for group in groups]
    content = {"rule_files": [str(chosen)], "evaluation_interval": "15s", "group_eval_order": order, "tests": tests}
    path.write_text(json.dumps(content))
    done = subprocess.run([*tool("promtool", folder), "test", "rules", str(path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def needed(alert: str) -> set[str]:
    """An alert and the recorded series that it reads."""
    return {alert} | {rule["record"] for rule in rules("record") if rule["record"] in ALERTS[alert]["expr"]}


@pytest.mark.parametrize("alert", sorted(ALERTS))
def test_an_alert_fires_clears_and_stays_quiet(alert: str, tmp_path: Path) -> None:
    tests = []
    for case in (case for case in CASES if case.alert == alert):
        at_times = [firing(case, case.fires, [case.labels]), firing(case, case.after, [])]
        if case.before != "0m":
            at_times.insert(0, firing(case, case.before, []))
        tests.append(promtool_test(f"{alert} fires", case.series, at_times))
        quiet = [firing(case, at, []) for at in ("1m", "3m", case.fires)]
        tests.append(promtool_test(f"{alert} is quiet", case.quiet, quiet))
    run_promtool(tmp_path, tests, needed(alert))


def test_a_wrong_expectation_is_noticed(tmp_path: Path) -> None:
    case = CASES[0]
    with pytest.raises(AssertionError, match="FAILED"):
        run_promtool(tmp_path, [promtool_test("wrong", case.series, [firing(case, case.fires, [])])], {case.alert})


@pytest.mark.parametrize(("record", "series", "at", "values"), RECORDED, ids=[each[0] for each in RECORDED])
def test_a_recorded_series_is_what_it_says(
    record: str, series: Series, at: str, values: dict[str, float], tmp_path: Path
) -> None:
    samples = [{"labels": labels, "value": value} for labels, value in values.items()]
    asked = {"expr": f"round({record}, 1e-6)", "eval_time": at, "exp_samples": samples}
    run_promtool(tmp_path, [promtool_test(record, series, [asked])], {record})


def test_rules_and_configuration_are_valid(tmp_path: Path) -> None:
    promtool = tool("promtool", tmp_path)
    text = (ROOT / "infra" / "prometheus" / "prometheus.yml").read_text()
    local = tmp_path / "prometheus.yml"
    local.write_text(text.replace("/etc/prometheus/rules", str(RULES)))
    done = subprocess.run([*promtool, "check", "config", str(local)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{len(rules('alert'))} rules found" in done.stdout
    for path in RULES.glob("*.yml"):
        linted = subprocess.run(
            [*promtool, "check", "rules", "--lint-fatal", str(path)], capture_output=True, text=True
        )
        assert linted.returncode == 0, linted.stdout + linted.stderr


def test_alertmanagers_configuration_is_valid(tmp_path: Path) -> None:
    amtool = tool("amtool", tmp_path)
    path = ROOT / "infra" / "alertmanager" / "alertmanager.yml"
    done = subprocess.run([*amtool, "check-config", str(path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


INHIBITED = (
    # (labels of what fires, labels of what follows, whether that is muted)
    (("BrokerAway", "lake"), ("InputStalled", "lake"), True),
    (("BrokerAway", "lake"), ("InputStalled", "ofi"), False),
    (("BrokerAway", "lake"), ("WritesUnacknowledged", "fusion"), False),
    (("BrokerAway", "lake"), ("NoFrames", ""), False),
    (("BrokerAway", "lake"), ("NoSignals", ""), False),
    (("BrokerAway", "signal"), ("NoSignals", ""), True),
    (("BrokerAway", "ingestion"), ("NoFrames", ""), True),
    (("BrokerAway", "ingestion"), ("InputStalled", "ofi"), True),
    (("BrokerAway", "ingestion"), ("WritesUnacknowledged", "lake"), False),
    (("ServiceMissing", "ingestion"), ("BookNotSynced", ""), True),
    (("ServiceNotReady", "sinks"), ("InputStalled", "fusion"), False),
    (("ServiceNotReady", "sinks"), ("InputStalled", "sinks"), True),
    (("ServiceMissing", "cvd"), ("StreamSilent", ""), False),
    (("ServiceMissing", "signal"), ("NoSignals", ""), True),
    (("NoFrames", ""), ("RouteSilent", ""), True),
    (("NoFrames", ""), ("InputStalled", "ofi"), False),
)


def matches(matchers: list[str], labels: dict[str, str]) -> bool:
    """As Alertmanager has it: a label that is not there is empty; an expression is of the whole value."""
    for matcher in matchers:
        name, regular, value = re.fullmatch(r'(\w+)=(~?)"([^"]*)"', matcher.strip()).groups()  # type: ignore[union-attr]
        found = labels.get(name, "")
        if not (re.fullmatch(value, found) if regular else found == value):
            return False
    return True


@pytest.mark.parametrize(("source", "target", "muted"), INHIBITED)
def test_an_alert_mutes_what_follows_from_it_and_nothing_else(
    source: tuple[str, str], target: tuple[str, str], muted: bool
) -> None:
    text = (ROOT / "infra" / "alertmanager" / "alertmanager.yml").read_text()
    fires, follows = (
        {"alertname": alert} | ({"service": service} if service else {}) for alert, service in (source, target)
    )
    assert {source[0], target[0]} <= ALERTS.keys()
    assert muted == any(
        matches(rule["source_matchers"], fires)
        and matches(rule["target_matchers"], follows)
        and all(fires.get(name, "") == follows.get(name, "") for name in rule.get("equal", []))
        for rule in yaml.safe_load(text)["inhibit_rules"]
    )


def test_inhibitions_name_alerts_that_exist() -> None:
    text = (ROOT / "infra" / "alertmanager" / "alertmanager.yml").read_text()
    for rule in yaml.safe_load(text)["inhibit_rules"]:
        for matcher in [*rule["source_matchers"], *rule["target_matchers"]]:
            if matcher.startswith("alertname"):
                assert set(matcher.partition('"')[2].rstrip('"').split("|")) <= ALERTS.keys()


def test_every_alert_has_a_case_and_every_case_an_alert() -> None:
    assert {case.alert for case in CASES} == ALERTS.keys()


def test_every_alert_says_what_it_is_and_where_its_runbook_is() -> None:
    headings = re.findall(r"^## (\S+)$", RUNBOOKS.read_text(), re.MULTILINE)
    assert len(set(headings)) == len(headings)
    assert set(headings) == ALERTS.keys(), "runbooks and alerts must be the same"
    for name, rule in ALERTS.items():
        assert rule["labels"].keys() == {"severity"}
        assert rule["labels"]["severity"] in {"critical", "warning"}
        assert rule["annotations"].keys() == {"summary", "description", "runbook"}
        assert rule["annotations"]["runbook"] == f"docs/runbooks.md#{name.lower()}"


def test_every_runbook_says_what_it_means_where_to_look_and_what_to_do() -> None:
    sections = re.split(r"^## (\S+)$", RUNBOOKS.read_text(), flags=re.MULTILINE)[1:]
    for name, text in zip(sections[::2], sections[1::2], strict=True):
        for part in ("**Means.**", "**Look.**", "**Do.**"):
            assert part in text, f"{name} lacks {part}"


def test_rules_and_their_metrics_are_listed() -> None:
    for rule in [*rules("alert"), *rules("record")]:
        if "record" in rule:
            assert f"`{rule['record']}`" in METRICS, rule["record"]
        expression = re.sub(r"\{[^}]*\}|\[[^]]*\]|\"|(by|on|group_left) \([^)]*\)", " ", rule["expr"])
        names = set(re.findall(r"[a-zA-Z_:][a-zA-Z0-9_:]*(?![a-zA-Z0-9_:]*\s*\()", expression))
        for metric in names - {"and", "or", "unless", "on", "by", "up", "m", "s"}:
            assert re.search(rf"[`{{ ]{re.escape(metric)}[`{{]", METRICS), f"{metric} is not in docs/metrics.md"


def test_questions_of_the_runbooks_are_valid(tmp_path: Path) -> None:
    questions = re.findall(r"ask '([^']+)'", RUNBOOKS.read_text())
    assert len(questions) > len(ALERTS)
    asked = [{"record": "asked", "expr": question, "labels": {"n": str(n)}} for n, question in enumerate(questions)]
    path = tmp_path / "asked.yml"
    path.write_text(json.dumps({"groups": [{"name": "asked", "rules": asked}]}))
    done = subprocess.run([*tool("promtool", tmp_path), "check", "rules", str(path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
