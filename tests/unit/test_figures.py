"""Figures of the stages and the lake: what they count, whom they tell of, and that no count ever falls."""

from __future__ import annotations

import asyncio
import re
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from lake_rows import T0_MS, record, tick
from orderflow.config import load
from orderflow.counts import ProcessCounts
from orderflow.errors import LogError
from orderflow.ingest.metrics import NormaliserCollector
from orderflow.lake.layout import LakeError
from orderflow.lake.minutes import MAX_MINUTES, MinuteBuckets
from orderflow.lake.parquet import LakeSink
from orderflow.lake.service import SinkCollector, counting, lake_build
from orderflow.lake.settings import LakeConfig
from orderflow.lake.sink import CutResult
from orderflow.microstructure.signal import GUARDS
from orderflow.streaming.codec import Codecs
from orderflow.streaming.figures import (
    MAX_SYMBOLS,
    STAGE_FIGURES,
    CvdFigures,
    FusionFigures,
    OfiFigures,
    SignalFigures,
    StageFigures,
)
from orderflow.streaming.lag import FRESH_SEC, LagWatch
from orderflow.streaming.log import TP
from orderflow.streaming.memory_log import MemoryLog
from orderflow.streaming.metrics import StatsCollector
from orderflow.streaming.runtime import RuntimeOptions, ServiceSpec, Stats
from orderflow.streaming.service import metrics_content
from orderflow.streaming.sinks import SinkRuntime
from orderflow.topics import CVD, FEATURE_EVENTS, FUSION, JOURNAL, OFI, ROWS, SIGNALS, TICKS
from orderflow.venues.binance.normaliser import NormaliserConfig, NormaliserProcessor
from prometheus_client import CollectorRegistry

MINUTE_MS = 60_000


def samples(collector: Any) -> dict[str, float]:
    registry = CollectorRegistry()
    registry.register(collector)
    figures: dict[str, float] = metrics_content("x", registry)["metrics"]
    return figures


def owning(stage: StageFigures, partitions: int = 1) -> list[Any]:
    """`stage` owns so many partitions."""
    parts = [stage.partition() for _ in range(partitions)]
    stage.owned = lambda: parts
    return parts


def test_large_z_are_counted_by_symbol_and_those_withheld_are_not() -> None:
    stage = OfiFigures("ofi")
    (part,) = owning(stage)
    for z in (None, 0.5, -2.0, 2.1, -2.5, 3.0, 3.1, -9.0, float("nan")):
        part.take(OFI, record(OFI, 1, symbol="BTCUSDT", ofi_z_raw=z, ofi_z=z, mid=200.0, micro_price=200.1))
    part.take(OFI, record(OFI, 1, symbol="ETHUSDT", ofi_z_raw=None, ofi_z=None, mid=None, micro_price=None))
    found = samples(stage)
    expected = {
        'feature_z_total{service="ofi",symbol="BTCUSDT"}': 7,
        'feature_z_above_total{limit="2",service="ofi",symbol="BTCUSDT"}': 5,
        'feature_z_above_total{limit="3",service="ofi",symbol="BTCUSDT"}': 2,
        'feature_z_total{service="ofi",symbol="ETHUSDT"}': 0,
        'ofi_z{symbol="BTCUSDT"}': None,
        'ofi_micro_offset_bps{symbol="BTCUSDT"}': pytest.approx(5.0),
        'ofi_micro_offset_bps{symbol="ETHUSDT"}': None,
    }
    assert {name: found.get(name) for name in expected} == expected


def cvd(
    scale: float | None, z: float | None, *, floor: bool = False, limit: float = 8.0, symbol: str = "BTCUSDT"
) -> Any:
    clipped = None if z is None else max(-limit, min(limit, z))
    return record(CVD, 1, symbol=symbol, scale=scale, z_raw=z, z_cvd=clipped, floor_used=floor)


def test_rates_of_cvd_are_shares_of_the_newest_trades() -> None:
    stage = CvdFigures("cvd")
    (part,) = owning(stage)
    for _ in range(1000):
        part.take(CVD, cvd(99.0, 9.0, floor=True))
    for number in range(500):
        part.take(CVD, cvd(1.0 + number, 8.5 if number % 5 == 0 else 8.0, floor=number < 100))
    for _ in range(10):
        part.take(CVD, cvd(None, None))
    found = samples(stage)
    expected = {
        'cvd_scale_median{symbol="BTCUSDT"}': 250,
        'cvd_floor_hit_rate{symbol="BTCUSDT"}': 0.2,
        'sigma_floor_hit_rate{symbol="BTCUSDT"}': 0.2,
        'winsor_hit_rate{symbol="BTCUSDT"}': 0.2,
        'feature_z_above_total{limit="3",service="cvd",symbol="BTCUSDT"}': 1500,
    }
    assert {name: found.get(name) for name in expected} == expected


def test_a_floor_in_the_warm_up_is_one_of_the_scale_but_not_of_a_z() -> None:
    stage = CvdFigures("cvd")
    (part,) = owning(stage)
    part.take(CVD, cvd(2.0, None, floor=True))
    found = samples(stage)
    assert found['cvd_floor_hit_rate{symbol="BTCUSDT"}'] == 1
    assert 'sigma_floor_hit_rate{symbol="BTCUSDT"}' not in found


def test_fusion_is_counted_by_regime_and_events_by_type() -> None:
    stage = FusionFigures("fusion")
    (part,) = owning(stage)
    for regime, score_z in (("active", 2.5), ("active", None), ("quiet", 0.1)):
        part.take(FUSION, record(FUSION, 1, regime=regime, score_z=score_z, score=1.5, cvd_direction=-1, proba=None))
    part.take(FEATURE_EVENTS, record(FEATURE_EVENTS, 1, event_type="flip"))
    found = samples(stage)
    expected = {
        'fusion_records_total{regime="active",symbol="BTCUSDT"}': 2,
        'fusion_records_total{regime="quiet",symbol="BTCUSDT"}': 1,
        'fusion_events_total{event_type="flip"}': 1,
        'fusion_regime{regime="quiet",symbol="BTCUSDT"}': 1,
        'fusion_regime{regime="active",symbol="BTCUSDT"}': None,
        'fusion_score{symbol="BTCUSDT"}': 1.5,
        'fusion_proba{symbol="BTCUSDT"}': None,
        'cvd_direction{symbol="BTCUSDT"}': -1,
        'feature_z_above_total{limit="2",service="fusion",symbol="BTCUSDT"}': 1,
    }
    assert {name: found.get(name) for name in expected} == expected


def test_signals_are_counted_by_direction_and_every_guard_that_blocked() -> None:
    stage = SignalFigures("signal")
    first, second = owning(stage, 2)
    first.take(SIGNALS, record(SIGNALS, 1, direction=1, gating=False, gate_reasons=[]))
    first.take(SIGNALS, record(SIGNALS, 1, direction=1, gating=True, gate_reasons=["spread", "lag"]))
    second.take(SIGNALS, record(SIGNALS, 1, symbol="ETHUSDT", direction=-1, gating=True, gate_reasons=["lag"]))
    found = samples(stage)
    assert {name: value for name, value in found.items() if value} == {
        'signals_total{direction="buy",gating="passed",symbol="BTCUSDT"}': 1,
        'signals_total{direction="buy",gating="blocked",symbol="BTCUSDT"}': 1,
        'signals_total{direction="sell",gating="blocked",symbol="ETHUSDT"}': 1,
        'signals_gated_total{reason="spread"}': 1,
        'signals_gated_total{reason="lag"}': 2,
    }
    assert len([name for name in found if name.startswith("signals_total") and "BTCUSDT" in name]) == 6
    assert found['signals_total{direction="sell",gating="passed",symbol="BTCUSDT"}'] == 0, "its first will be growth"
    assert {f'signals_gated_total{{reason="{guard}"}}' for guard in GUARDS} <= found.keys()


def test_a_symbol_met_late_pushes_no_other_into_the_rest() -> None:
    stage = CvdFigures("cvd")
    (part,) = owning(stage)
    for number in range(MAX_SYMBOLS):
        part.take(CVD, cvd(1.0, 2.5, symbol=f"S{number:04}USDT"))
    part.take(CVD, cvd(1.0, 2.5, symbol="AAAUSDT"))
    found = samples(stage)
    assert found['feature_z_total{service="cvd",symbol="other"}'] == 1
    assert found[f'feature_z_total{{service="cvd",symbol="S{MAX_SYMBOLS - 1:04}USDT"}}'] == 1
    assert 'cvd_scale_median{symbol="AAAUSDT"}' not in found
    assert f'cvd_scale_median{{symbol="S{MAX_SYMBOLS - 1:04}USDT"}}' in found


def test_nothing_is_told_of_a_symbol_that_was_given_away_but_its_counts_stay() -> None:
    stage = CvdFigures("cvd")
    given_away, kept = owning(stage, 2)
    given_away.take(CVD, cvd(1.0, 2.5))
    kept.take(CVD, cvd(2.0, 2.5, symbol="ETHUSDT"))
    stage.owned = lambda: [kept]
    found = samples(stage)
    assert not [name for name in found if "BTCUSDT" in name and not name.startswith("feature_z")]
    assert found['feature_z_total{service="cvd",symbol="BTCUSDT"}'] == 1
    taken_back = stage.partition()
    taken_back.take(CVD, cvd(4.0, 2.5))
    stage.owned = lambda: [taken_back, kept]
    found = samples(stage)
    assert found['cvd_scale_median{symbol="BTCUSDT"}'] == 4, "not with what was newest before"
    assert found['feature_z_total{service="cvd",symbol="BTCUSDT"}'] == 2


def test_labels_of_symbols_are_bounded_and_nothing_is_lost_of_counts() -> None:
    stage = CvdFigures("cvd")
    (part,) = owning(stage)
    for number in range(MAX_SYMBOLS + 20):
        part.take(CVD, cvd(1.0, 2.5, symbol=f"S{number:04}USDT"))
    found = samples(stage)
    assert found['feature_z_total{service="cvd",symbol="other"}'] == 20
    assert len([name for name in found if name.startswith("cvd_z{")]) <= MAX_SYMBOLS
    assert len([name for name in found if name.startswith("cvd_scale_median{")]) == MAX_SYMBOLS
    assert sum(value for name, value in found.items() if name.startswith("feature_z_total")) == MAX_SYMBOLS + 20


def test_every_stage_has_its_families_before_the_first_record() -> None:
    for name, kind in STAGE_FIGURES.items():
        families = [family.name for family in kind(name).collect()]
        assert families
        assert len(set(families)) == len(families)


def test_every_name_is_in_the_list_of_metrics(tmp_path: Path) -> None:
    listed = (Path(__file__).resolve().parents[2] / "docs" / "metrics.md").read_text()
    spec = ServiceSpec("lake", (JOURNAL,), (), "f")
    runtime = SinkRuntime(MemoryLog(), cast(Codecs, None), spec, RuntimeOptions(), cast(Any, None))
    runtime.stats.sample_stamps(1, 1)
    sink = LakeSink(tmp_path, 0, LakeConfig())
    runtime.tasks[0] = cast(Any, SimpleNamespace(sink=sink, stuck=False, newest_stamp_ms=1, has_symbols=True))
    collectors = [
        *(kind(name) for name, kind in STAGE_FIGURES.items()),
        StatsCollector("lake", runtime, "f"),
        SinkCollector("lake", runtime, tmp_path, ProcessCounts()),
        NormaliserCollector(lambda: [NormaliserProcessor(NormaliserConfig())], ProcessCounts()),
    ]
    families = [family for collector in collectors for family in collector.collect()]
    assert len(families) > 60
    for family in families:
        name = family.name + ("_total" if family.type == "counter" else "")
        assert re.search(rf"`{name}[`{{]", listed), f"{name} is not in docs/metrics.md"


# -- lag ---------------------------------------------------------------------------------------------------------------


async def test_the_lag_is_what_lies_between_position_and_end() -> None:
    log = MemoryLog()
    tps = [TP("a", 0), TP("a", 1)]
    for tp, count in zip(tps, (10, 4), strict=True):
        batch = log.batch()
        for _ in range(count):
            batch.append(b"", b"x", 1)
        await (await log.send(batch, tp))
    now = 0.0
    positions = {tps[0]: 3, tps[1]: 4}
    watch = LagWatch(log, lambda: positions, lambda: now)
    await watch.ask()
    assert dict(watch.lags) == {tps[0]: 7, tps[1]: 0}
    del positions[tps[0]]
    await watch.ask()
    assert dict(watch.lags) == {tps[1]: 0}, "a partition that was given away"
    now = FRESH_SEC + 1
    assert dict(watch.lags) == {}, "an old answer"


async def test_a_broker_that_does_not_answer_is_asked_again() -> None:
    class Away:
        async def end_offsets(self, tps: Any) -> Any:
            raise LogError("away")

    watch = LagWatch(cast(Any, Away()), lambda: {TP("a", 0): 3})
    task = asyncio.create_task(watch.run())
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert not task.done()
    assert dict(watch.lags) == {}
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


async def test_a_look_at_the_lag_that_fails_is_not_the_last(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("orderflow.streaming.lag.ASK_SEC", 0.0)
    asked = asyncio.Event()
    looks = 0

    def positions() -> dict[TP, int]:
        nonlocal looks
        looks += 1
        if looks < 3:
            raise RuntimeError("dictionary changed size during iteration")
        asked.set()
        return {}

    task = asyncio.create_task(LagWatch(MemoryLog(), positions).run())
    async with asyncio.timeout(120):
        await asked.wait()
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    assert len([each for each in caplog.messages if "lag" in each]) == 1


# -- the lake ----------------------------------------------------------------------------------------------------------


def minutes_of(buckets: MinuteBuckets, symbol: str = "BTCUSDT") -> tuple[int, int]:
    return buckets.judged.get(symbol, 0), buckets.empty.get(symbol, 0)


def test_a_minute_without_a_trade_is_empty_once_the_next_has_passed() -> None:
    buckets = MinuteBuckets()
    for second in range(0, 301, 5):
        at_ms = T0_MS + 30_000 + second * 1000
        if not 60 <= second < 120:
            buckets.trade("BTCUSDT", at_ms - 700)
        buckets.tick(at_ms * 1_000_000, ["BTCUSDT"])
    # Minutes 1 to 3 of 5.5: the first had begun before the first tick, the last two are not over or may get late trades.
    assert minutes_of(buckets) == (3, 0)
    quiet = MinuteBuckets()
    for minute in range(7):
        if minute not in (2, 3):
            quiet.trade("BTCUSDT", T0_MS + minute * MINUTE_MS)
        quiet.tick((T0_MS + minute * MINUTE_MS) * 1_000_000, [])
    assert minutes_of(quiet) == (4, 2)


def test_a_symbol_that_never_trades_is_known_by_its_quotes_and_an_outage_is_empty() -> None:
    buckets = MinuteBuckets()
    buckets.tick(T0_MS * 1_000_000, ["ETHUSDT"])
    buckets.tick((T0_MS + 60 * MINUTE_MS) * 1_000_000, ["ETHUSDT"])
    assert minutes_of(buckets, "ETHUSDT") == (58, 58)
    buckets.tick((T0_MS + 100_000 * MINUTE_MS) * 1_000_000, ["ETHUSDT"])
    assert minutes_of(buckets, "ETHUSDT") == (58 + MAX_MINUTES, 58 + MAX_MINUTES), "bounded"


def test_minutes_of_another_session_are_not_joined_to_the_ones_before() -> None:
    buckets = MinuteBuckets()
    buckets.tick(T0_MS * 1_000_000, ["BTCUSDT"])
    buckets.begin_session()
    buckets.tick((T0_MS + 500 * MINUTE_MS) * 1_000_000, ["BTCUSDT"])
    assert minutes_of(buckets) == (0, 0)


def test_the_lakes_figures_outlive_their_partitions(tmp_path: Path) -> None:
    counted = ProcessCounts()
    make = counting(lambda partition: LakeSink(tmp_path, partition, LakeConfig()), counted)

    def lake(partition: int) -> LakeSink:
        sink = cast(LakeSink, make(partition))
        for minute in range(4):
            trade = {"src": "aggTrade", "symbol": f"S{partition}USDT", "ts_ms": T0_MS, "recv_ts_ms": T0_MS}
            sink.step(ROWS, record(ROWS, minute + 1, **trade))
            sink.step(TICKS, tick(minute + 1, T0_MS + minute * MINUTE_MS))
        sink.write()
        return sink

    tasks = {partition: SimpleNamespace(sink=lake(partition)) for partition in (0, 1)}
    runtime = cast(SinkRuntime, SimpleNamespace(tasks=tasks, cuts=2, cuts_failed=1, stuck=[]))
    collector = SinkCollector("lake", runtime, tmp_path / "not" / "there", counted)
    found = samples(collector)
    expected = {
        'lake_rows_total{kind="prices",service="lake"}': 8,
        'lake_files_total{service="lake"}': 2,
        'lake_minutes_total{symbol="S0USDT"}': 1,
        'lake_empty_minutes_total{symbol="S1USDT"}': 1,
        'write_errors_total{service="lake"}': 0,
        'lake_cuts_failed_total{service="lake"}': 1,
    }
    assert {name: found.get(name) for name in expected} == expected
    assert 0 < found['lake_disk_free_bytes{service="lake"}'] <= found['lake_disk_total_bytes{service="lake"}']
    for _ in range(3):
        tasks[0].sink._failed(OSError())
    del tasks[0]
    found = samples(collector)
    assert found['lake_rows_total{kind="prices",service="lake"}'] == 8
    assert found['lake_minutes_total{symbol="S0USDT"}'] == 1
    assert found['write_errors_total{service="lake"}'] == 3, "though nobody asked while the partition was ours"
    tasks[0] = SimpleNamespace(sink=lake(0))
    assert samples(collector)['lake_rows_total{kind="prices",service="lake"}'] == 12


async def test_the_status_page_of_the_lake_counts_what_the_metrics_count(tmp_path: Path) -> None:
    """A cut fails once its file has failed four times; and where it can't be noted."""
    codecs = SimpleNamespace(decoder=lambda topic: None)
    config = load({"DATA_DIR": str(tmp_path)})
    running, registry, status = lake_build()(config, cast(Any, MemoryLog()), cast(Codecs, codecs))
    runtime = cast(SinkRuntime, running)
    task = runtime.make_task(0)
    for _ in range(4):
        cast(LakeSink, task.sink)._failed(OSError())
    runtime._blocked(task, LakeError("no room"))
    (tmp_path / "state").write_text("no folder")
    with pytest.raises(LakeError):
        await runtime._note_cut(task, [], CutResult(1, 2, []))
    page = status()
    for key, metric, count in (
        ("write_errors", "write_errors_total", 5),
        ("cuts_failed", "lake_cuts_failed_total", 1),
        ("cuts", "lake_cuts_total", 0),
    ):
        assert (page[key], registry.get_sample_value(metric, {"service": "lake"})) == (count, count), key


def test_latency_is_sampled_from_who_waited_most_too() -> None:
    stats = Stats()
    now_ms = int(time.time() * 1000)
    stats.sample_stamps(now_ms - 5_000, now_ms)
    first_ms, last_ms = stats.latencies_ms.values()
    assert first_ms - last_ms == pytest.approx(5_000)
