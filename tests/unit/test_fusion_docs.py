"""The page of definitions: its examples hold, and nothing that is put out is missing from it."""

from __future__ import annotations

import doctest
import json
import re

import pytest
from fusion_streams import command, market, run, values
from orderflow.microstructure.fusion import FusionConfig, FusionProcessor
from orderflow.microstructure.signal import GUARDS
from orderflow.paths import ROOT, SCHEMAS
from orderflow.topics import FEATURE_EVENTS, FUSION

PAGE = (ROOT / "docs" / "definitions-fusion-signal.md").read_text()
EXAMPLES = re.findall(r"```python\n(.*?)```", PAGE, re.S)


@pytest.mark.parametrize("number", range(len(EXAMPLES)))
def test_examples(number):
    test = doctest.DocTestParser().get_doctest(EXAMPLES[number], {}, f"example {number}", None, None)
    assert test.examples
    failures = []
    doctest.DocTestRunner(verbose=False).run(test, out=failures.append)
    assert not failures, "".join(failures)


def section(title):
    return PAGE.split(f"\n## {title}\n")[1].split("\n## ")[0]


def first_cells(text):
    """Names in backquotes in the first column of the tables."""
    return {
        name
        for line in text.splitlines()
        if line.startswith("| ")
        for name in re.findall(r"`(\w+)`", line.split("|")[1])
    }


@pytest.mark.parametrize(
    ("schema", "title"),
    [("fusion", "features.fusion"), ("feature_event", "features.events"), ("signal", "signals")],
)
def test_every_field_is_defined(schema, title):
    fields = {field["name"] for field in json.loads((SCHEMAS / f"{schema}.avsc").read_text())["fields"]}
    assert fields <= first_cells(section(title))


def test_every_guard_is_defined_in_order():
    text = section("signals")
    places = [text.rindex(f"\n| `{guard}` |") for guard in GUARDS]
    assert places == sorted(places)


def test_every_reason_and_event_is_defined():
    stages = (*FusionConfig().stages, "throttle")
    steps = [*market(2, 240), command(1, "x", {"type": "direction", "cvd_direction": -1}), *market(3, 60)]
    emits = run(FusionProcessor(FusionConfig(stages=stages, throttle_consistency=0.1), 0), steps)
    reasons = {reason for record in values(emits, FUSION) for reason in record["reasons"]}
    known = set(re.findall(r"`(\w+)`", section("Stages of fusion")))
    assert {one for one in reasons if not one.startswith("weights_")} <= known
    assert {event["event_type"] for event in values(emits, FEATURE_EVENTS)} <= first_cells(section("features.events"))
    assert len(reasons) > 15
