"""The dial of predictability: nothing at 0, more with every turn, judged with honest errors on a bounded sample.

`python -m tests.bench.predictability` does the same at full size and prints the table of docs/synthetic-market.md.
"""

from __future__ import annotations

import math
import re
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from orderflow.capture import frames
from orderflow.topics import CVD, OFI

from tests.bench import data
from tests.bench.ingestion import stream_of
from tests.bench.predictability import (
    DIALS,
    FLOWS,
    HORIZONS_SEC,
    Estimate,
    FlowMeter,
    Pairs,
    Series,
    auc,
    bound,
    correlation,
    not_growing,
    observe,
    pairs,
)

SECONDS = 1_200
NULL_SEEDS = (1, 2, 3)
TURNS = (0.25, 1.0)
PAGE = Path(__file__).resolve().parents[2] / "docs" / "synthetic-market.md"


@pytest.fixture(scope="module")
def nulls() -> list[Series]:
    return [observe(seed, 0.0, SECONDS) for seed in NULL_SEEDS]


@pytest.fixture(scope="module")
def turned(nulls: list[Series]) -> dict[float, list[Series]]:
    """By dial, the same seed at each: what differs is the dial alone."""
    return {0.0: nulls[:1], **{dial: [observe(NULL_SEEDS[0], dial, SECONDS)] for dial in TURNS}}


def test_without_predictability_flow_foretells_nothing(nulls: list[Series]) -> None:
    """No |t| of 36 beyond the bound of Bonferroni at 1 %, and their mean square is that of chance."""
    cells = list(product(nulls, FLOWS, HORIZONS_SEC))
    ratios = []
    for each, flow, horizon_sec in cells:
        sample = pairs([each], flow, horizon_sec)
        tied, ranked = correlation(sample), auc(sample)
        ratios += [tied.value / tied.error, (ranked.value - 0.5) / ranked.error]
    assert np.abs(ratios).max() < bound(len(ratios))
    assert 0.2 < np.mean(np.square(ratios)) < 2.5


def test_the_same_sample_finds_a_dial_that_is_turned(turned: dict[float, list[Series]]) -> None:
    """That nothing is found at 0 means something: the test has the power to see the dial at 0.25."""
    for flow, horizon_sec in product(FLOWS, (5, 10)):
        found = auc(pairs(turned[0.25], flow, horizon_sec))
        assert (found.value - 0.5) / found.error > bound(36) / 2
    strongest = [correlation(pairs(turned[1.0], flow, h)) for flow, h in product(FLOWS, HORIZONS_SEC)]
    assert min(each.value / each.error for each in strongest) > bound(36)


def test_it_grows_with_the_dial(turned: dict[float, list[Series]]) -> None:
    for flow, horizon_sec, measure in product(FLOWS, HORIZONS_SEC, (correlation, auc)):
        values = [measure(pairs(series, flow, horizon_sec)).value for series in turned.values()]
        assert all(low < high for low, high in pairwise(values)), (flow, horizon_sec, values)


def documented(title: str) -> dict[float, dict[tuple[str, int], Estimate]]:
    """A table of the page: dial -> (flow, horizon in seconds) -> estimate."""
    lines = PAGE.read_text("utf-8").partition(f"**{title}**")[2].strip().splitlines()
    heads = [cell.strip() for cell in lines[0].strip("|").split("|")][1:]
    cells = [(head.split()[0].lower(), int(head.split()[1])) for head in heads]
    table = {}
    for line in lines[2:]:
        if not line.startswith("|"):
            break
        dial, *values = [cell.strip() for cell in line.strip("|").split("|")]
        numbers = [[float(number) for number in re.findall(r"[-\d.]+", value)] for value in values]
        table[float(dial)] = {cell: Estimate(*number) for cell, number in zip(cells, numbers, strict=True)}
    return table


@pytest.mark.parametrize(("title", "measure"), [("Correlation", correlation), ("AUC", auc)])
def test_the_page_says_what_is_measured(turned: dict[float, list[Series]], title: str, measure: object) -> None:
    assert callable(measure)
    table = documented(title)
    assert tuple(table) == DIALS
    cells = list(product(turned, FLOWS, HORIZONS_SEC))
    for dial, flow, horizon_sec in cells:
        found: Estimate = measure(pairs(turned[dial], flow, horizon_sec))
        said = table[dial][(flow, horizon_sec)]
        allowed = bound(2 * len(cells)) * math.hypot(found.error, said.error)
        assert abs(found.value - said.value) < allowed, (dial, flow, horizon_sec, found, said)
    rows = {
        dial: {f"{flow} {h} s": {"correlation": each, "auc": each} for (flow, h), each in row.items()}
        for dial, row in table.items()
    }
    assert not not_growing(rows)


def test_the_meter_computes_what_our_processors_do(tmp_path: Path) -> None:
    """OFI and CVD of the judge above are those of the normaliser and the OFI and CVD processors on the same frames."""
    path = data.write_synthetic(tmp_path / "market.gz", 5_000)
    meters = {symbol: FlowMeter() for symbol in data.SYNTHETIC_SYMBOLS}
    for _, route, payload in frames(path):
        if route != "rest":
            name = stream_of(payload)
            meters[name.partition("@")[0].upper()].take(name, payload)
    dataset = data.build("synthetic market", path, 1_000_000)
    found = {symbol: [0.0, 0.0] for symbol in meters}
    for record in records(dataset, OFI):
        found[record["symbol"]][0] += record["ofi_l1"]
    for record in records(dataset, CVD):
        found[record["symbol"]][1] = record["cvd"]
    for symbol, meter in meters.items():
        assert found[symbol] == pytest.approx([meter.ofi, meter.cvd], abs=1e-6)
        assert abs(meter.ofi) > 1.0 and abs(meter.cvd) > 0.1


def records(dataset: data.Dataset, topic: str) -> list[dict[str, Any]]:
    decode = dataset.codecs.decoder(topic)
    return [decode(value) for entries in dataset.topics[topic].values() for _, value in entries]


def test_errors_are_those_of_dependent_samples() -> None:
    """A walk's moves over overlapping windows: the error found is the spread over many walks, not that of independence."""
    chance = np.random.default_rng(5)
    estimates = []
    for _ in range(300):
        steps = chance.standard_normal((2, 3_000))
        walk = Series(*np.cumsum(np.vstack([steps, chance.standard_normal(3_000)]), axis=1))
        estimates.append(correlation(pairs([walk], "ofi", 10)))
    spread = float(np.std([each.value for each in estimates]))
    said = float(np.mean([each.error for each in estimates]))
    assert said == pytest.approx(spread, rel=0.15)
    assert said > 2 / math.sqrt(3_000)


def test_auc_and_correlation_of_known_answers() -> None:
    sample = Pairs(np.array([1.0, 2.0, 3.0, 4.0, 9.0]), np.array([-1.0, 1.0, -1.0, 1.0, 0.0]), np.arange(5))
    assert auc(sample).value == 0.75
    tied = Pairs(np.array([1.0, 1.0, 2.0, 0.0]), np.array([1.0, -1.0, 1.0, -1.0]), np.arange(4))
    assert auc(tied).value == pytest.approx((0.5 + 1 + 1 + 1) / 4)
    assert correlation(sample).value == pytest.approx(np.corrcoef(sample.flow, sample.move)[0, 1])
