"""The page of definitions of OFI and CVD: its examples hold, and no field or setting is missing from it."""

from __future__ import annotations

import doctest
import json
import re

import pytest
from orderflow.microstructure.cvd import CvdConfig
from orderflow.microstructure.ofi import OfiConfig
from orderflow.paths import ROOT, SCHEMAS

PAGE = (ROOT / "docs" / "definitions.md").read_text("utf-8")
EXAMPLES = re.findall(r"```python\n(.*?)```", PAGE, re.S)


def section(title):
    return PAGE.split(f"\n## {title}\n")[1].split("\n## ")[0]


@pytest.mark.parametrize("number", range(len(EXAMPLES)))
def test_examples(number):
    # an example may go on from the ones before it
    names = {}
    for example in EXAMPLES[: number + 1]:
        test = doctest.DocTestParser().get_doctest(example, names, f"example {number}", None, None)
        assert test.examples
        failures = []
        doctest.DocTestRunner(verbose=False).run(test, out=failures.append, clear_globs=False)
        assert not failures, "".join(failures)
        names = test.globs


@pytest.mark.parametrize(("schema", "title"), [("ofi", "features.ofi"), ("cvd", "features.cvd")])
def test_every_field_is_defined_in_the_schemas_order(schema, title):
    fields = [field["name"] for field in json.loads((SCHEMAS / f"{schema}.avsc").read_text())["fields"]]
    table = section(title).split("### Fields")[1].split("###")[0]
    assert re.findall(r"^\| `(\w+)` \|", table, re.M) == fields


@pytest.mark.parametrize(("config", "title"), [(OfiConfig, "features.ofi"), (CvdConfig, "features.cvd")])
def test_every_setting_is_named(config, title):
    text = section(title)
    missing = [name for name in config.__struct_fields__ if name not in text]
    assert not missing
