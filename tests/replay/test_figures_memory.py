"""What the stages' figures count is what their topics hold, over the real stages, without a broker."""

from __future__ import annotations

import asyncio
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from memory_pipeline import Pipeline, dataset, options, run_until_settled, runtime, write_journal
from orderflow.config import load
from orderflow.microstructure.signal import GUARDS
from orderflow.pipeline import STAGES
from orderflow.streaming.figures import STAGE_FIGURES, StageFigures
from orderflow.streaming.log import TP
from orderflow.streaming.memory_log import MemoryLog
from orderflow.streaming.metrics import StatsCollector
from orderflow.streaming.runtime import ProcessorRuntime
from orderflow.streaming.service import metrics_content
from orderflow.topics import CVD, FEATURE_EVENTS, FUSION, OFI, PARTITIONS, SIGNALS
from orderflow.verify import canonical
from prometheus_client import CollectorRegistry
from run_helpers import ALTS

pytestmark = pytest.mark.capture

Run = tuple[dict[str, list[dict[str, Any]]], dict[str, StageFigures], list[ProcessorRuntime]]


@pytest.fixture(scope="module")
def run(captures: Path) -> Run:
    async def go() -> Run:
        data = dataset(captures / ALTS)
        pipeline = Pipeline(MemoryLog(), data.codecs, load({}), data)
        await write_journal(pipeline.log, data)
        figures = {name: kind(name) for name, kind in STAGE_FIGURES.items()}
        runtimes = [runtime(pipeline, stage.name, options(), figures.get(stage.name)) for stage in STAGES]
        await run_until_settled(runtimes)
        for each in runtimes:
            await each.lag.ask()
        values = {topic: await values_of(pipeline, topic) for topic in (OFI, CVD, FUSION, FEATURE_EVENTS, SIGNALS)}
        return values, figures, runtimes

    return asyncio.run(go())


def samples(collector: Any) -> dict[str, float]:
    registry = CollectorRegistry()
    registry.register(collector)
    figures: dict[str, float] = metrics_content("x", registry)["metrics"]
    return figures


async def values_of(pipeline: Pipeline, topic: str) -> list[dict[str, Any]]:
    decode = pipeline.codecs.decoder(topic)
    found = []
    for partition in range(PARTITIONS):
        async for chunk in canonical(pipeline.log, TP(topic, partition)):
            found += [decode(record.value) for _, _, record in chunk if record.value is not None]
    return found


def total(found: dict[str, float], name: str) -> float:
    return sum(value for each, value in found.items() if each.startswith(name + "{"))


@pytest.mark.parametrize(
    ("stage", "topic", "z"), [("ofi", OFI, "ofi_z_raw"), ("cvd", CVD, "z_raw"), ("fusion", FUSION, "score_z")]
)
def test_shares_of_large_z_are_those_of_the_topic(run: Run, stage: str, topic: str, z: str) -> None:
    values, figures, _ = run
    found = samples(figures[stage])
    zs = [abs(value[z]) for value in values[topic] if value[z] is not None]
    assert zs
    assert total(found, "feature_z_total") == len(zs)
    above = {
        limit: sum(v for k, v in found.items() if "feature_z_above" in k and f'limit="{limit}"' in k)
        for limit in (2, 3)
    }
    assert above == {limit: sum(size > limit for size in zs) for limit in (2, 3)}


def test_signals_and_their_guards_are_those_of_the_topic(run: Run) -> None:
    values, figures, _ = run
    found = samples(figures["signal"])
    signals = values[SIGNALS]
    assert total(found, "signals_total") == len(signals) > 0
    reasons = Counter(reason for signal in signals for reason in signal["gate_reasons"])
    assert {name: v for name, v in found.items() if "gated" in name} == {
        f'signals_gated_total{{reason="{guard}"}}': reasons[guard] for guard in GUARDS
    }
    assert sum(reasons[guard] for guard in GUARDS) == reasons.total() > 0
    fused = samples(figures["fusion"])
    assert total(fused, "fusion_records_total") == len(signals)
    assert total(fused, "fusion_events_total") == len(values[FEATURE_EVENTS])


def test_the_newest_values_are_the_newest_of_the_topic(run: Run) -> None:
    values, figures, _ = run
    found = samples(figures["cvd"])
    newest = {value["symbol"]: value["cvd"] for value in values[CVD]}
    assert {name: v for name, v in found.items() if name.startswith("cvd_base")} == {
        f'cvd_base{{symbol="{symbol}"}}': level for symbol, level in newest.items()
    }


def test_at_the_end_nothing_lags(run: Run) -> None:
    _, _, runtimes = run
    for each in runtimes:
        found = samples(StatsCollector(each.spec.name, each, "f"))
        lags = {name: value for name, value in found.items() if name.startswith("consumer_lag_records")}
        assert len(lags) == len(each.spec.inputs) * PARTITIONS
        assert set(lags.values()) == {0}
        assert found[f'orderflow_input_age_sec{{service="{each.spec.name}"}}'] > 0
