"""Figures of ingestion: names, labels and bounds of what is scraped, and the file that holds the same."""

from __future__ import annotations

import asyncio
import json
import re
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from orderflow.config import load
from orderflow.counts import ProcessCounts
from orderflow.ingest.metrics import (
    MAX_LABELS,
    NormaliserCollector,
    RecorderCollector,
    counting,
)
from orderflow.ingest.service import build
from orderflow.streaming.codec import Codecs, schema_text
from orderflow.streaming.figures import MAX_SYMBOLS
from orderflow.streaming.journal import EPOCH_HEADER
from orderflow.streaming.log import TP
from orderflow.streaming.memory_log import MemoryLog
from orderflow.streaming.metrics import StatsCollector
from orderflow.streaming.recorder import journal_record
from orderflow.streaming.runtime import ProcessorRuntime, RuntimeOptions, ServiceSpec
from orderflow.streaming.samples import MAX_SAMPLES, SPAN_SEC, RecentSamples
from orderflow.streaming.service import MOST_INSTANCES, claim_metrics_file, keep_metrics_file, metrics_content
from orderflow.streaming.writer import Writer
from orderflow.topics import BY_NAME, EVENTS, JOURNAL, REJECTS, ROWS, TICKS
from orderflow.venues.binance.normaliser import (
    GAP_REASONS,
    REJECT_REASONS,
    RESYNC_REASONS,
    NormaliserConfig,
    NormaliserProcessor,
)
from prometheus_client import CollectorRegistry, generate_latest
from venue_journal import Feed


class FakeRecorder:
    def __init__(self, **more: Any) -> None:
        self.content: dict[str, Any] = {"frames_by_route": {"public": 0, "market": 0}, **more}

    def status(self) -> dict[str, Any]:
        return self.content


def samples(*collectors: Any) -> dict[str, float]:
    registry = CollectorRegistry()
    for collector in collectors:
        registry.register(collector)
    generate_latest(registry)
    figures: dict[str, float] = metrics_content("ingestion", registry)["metrics"]
    return figures


def test_names_that_users_rely_on_are_there_from_the_start() -> None:
    found = samples(
        NormaliserCollector(lambda: [NormaliserProcessor(NormaliserConfig())], ProcessCounts()),
        RecorderCollector(FakeRecorder()),
    )
    assert {
        'dedup_hits_total{stream="aggTrade"}',
        'dedup_hits_total{stream="bookTicker"}',
        'dedup_hits_total{stream="depth"}',
        "ws_reconnects_total",
        'recv_frames_total{route="public"}',
        "backfilled_trades_total",
        "lost_trades_total",
        "oracle_checked_total",
        "oracle_failed_total",
        "books_distrusted_total",
        'books{state="synced"}',
        'streams_silent{stream="depth"}',
    } <= set(found)


def test_what_the_normaliser_counts_is_exported() -> None:
    feed = Feed(first_data_ms=5000)
    feed.tick()
    feed.quote(5, B="2", A="3")
    feed.quote(5)
    feed.quote(6, b="x")
    feed.trade(1)
    feed.trade(5)
    feed.tick(300)
    feed.tick(6000)
    feed.synced()
    feed.diff(21, 25, 20)
    feed.diff(31, 40, 30)
    feed.step("gap", {"reason": "dropped", "streams": ["bookTicker"], "frames": 7}, symbol="BTCUSDT")
    feed.step("server_time", {"serverTime": feed.now_ms - 321})
    found = samples(NormaliserCollector(lambda: [feed.processor], feed.processor.counted))
    expected = {
        'dedup_hits_total{stream="bookTicker"}': 1,
        'rejects_total{reason="bad_price"}': 1,
        'gaps_total{reason="pu_mismatch"}': 1,
        'gaps_total{reason="dropped"}': 1,
        'resyncs_total{reason="pu_mismatch"}': 1,
        'missing_frames_total{reason="dropped"}': 7,
        'market_events_total{event_type="backfill_needed"}': 1,
        "lost_trades_total": 3,
        "backfilled_trades_total": 0,
        "oracle_checked_total": 0,
        "oracle_skipped_total": 1,
        "clock_drift_ms": 321,
        'books{state="resyncing"}': 1,
        'book_synced{symbol="BTCUSDT"}': 0,
        'skew_ms{symbol="BTCUSDT"}': 6300,
    }
    assert {name: found.get(name) for name in expected} == expected


def test_silent_streams_are_exported() -> None:
    feed = Feed(first_data_ms=2000)
    feed.quote(1)
    for _ in range(20):
        feed.tick()
    found = samples(NormaliserCollector(lambda: [feed.processor], feed.processor.counted))
    assert found['stream_silent{stream="depth",symbol="BTCUSDT"}'] == 1
    assert found['streams_silent{stream="depth"}'] == 1
    assert found['streams_silent{stream="bookTicker"}'] == 0


def test_labels_of_symbols_are_bounded() -> None:
    feed = Feed(first_data_ms=2000)
    for number in range(MAX_SYMBOLS + 20):
        feed.symbol = f"S{number:04}USDT"
        feed.synced()
    for _ in range(20):
        feed.tick()
    found = samples(NormaliserCollector(lambda: [feed.processor], feed.processor.counted))
    assert len([name for name in found if name.startswith("book_synced")]) == MAX_SYMBOLS + 1
    assert found['book_synced{symbol="other"}'] == 1, "all of the rest"
    assert found['stream_silent{stream="bookTicker",symbol="other"}'] == 20
    assert found['streams_silent{stream="bookTicker"}'] == MAX_SYMBOLS + 20
    assert found['books{state="synced"}'] == MAX_SYMBOLS + 20


def test_figures_of_several_partitions_are_summed() -> None:
    feeds, counted = [Feed("BTCUSDT"), Feed("ETHUSDT")], ProcessCounts()
    for feed in feeds:
        feed.processor.counted = counted
        feed.quote(1)
        feed.quote(1)
    found = samples(NormaliserCollector(lambda: [feed.processor for feed in feeds], counted))
    assert found['dedup_hits_total{stream="bookTicker"}'] == 2


def test_every_number_of_the_recorders_status_is_exported() -> None:
    status = {
        "epoch": None,
        "reconnects": 7,
        "connections": {
            "public": {"sockets": 1, "reconnects": {"silent": 2, "closed_1006": 1}},
            "market": {"reconnects": {"network": 4}},
        },
        "dropped": {"aggTrade": 5},
        "conflated": 6,
        "routes": {"public": "up"},
        "queue_frames": 7,
        "ready": True,
        "session": "abc",
        "silence": {f"S{number}": number for number in range(MAX_LABELS + 50)},
        "deep": {"a": {"b": {"c": 3}}, "d": 1},
    }
    found = samples(RecorderCollector(FakeRecorder(**status)))
    expected = {
        "ws_reconnects_total": 7,
        "dropped_frames_total": 5,
        "conflated_frames_total": 6,
        "recorder_reconnects": 7,
        'recorder_connections{detail="sockets",key="public"}': 1,
        'recorder_connections{detail="reconnects/silent",key="public"}': 2,
        'recorder_connections{detail="reconnects/network",key="market"}': 4,
        'recorder_dropped{key="aggTrade"}': 5,
        "recorder_queue_frames": 7,
        "recorder_ready": 1,
        'recorder_deep{detail="b/c",key="a"}': 3,
        'recorder_deep{detail="",key="d"}': 1,
    }
    assert {name: found.get(name) for name in expected} == expected
    silences = {name: value for name, value in found.items() if name.startswith("recorder_silence")}
    assert len(silences) == MAX_LABELS + 1
    assert sum(silences.values()) == sum(range(MAX_LABELS + 50))
    assert not [name for name in found if "session" in name or "routes" in name]
    assert "recorder_epoch" not in found, "the journal is not open yet: a 0 now would be a change later"


def test_the_rate_is_that_of_the_newest_stretch() -> None:
    now = 100.0
    recorder = FakeRecorder()
    collector = RecorderCollector(recorder, lambda: now)
    rates = []
    for per_sec in [50] * 30 + [200] * 30:
        now += 1.0
        recorder.content["frames_by_route"]["public"] += per_sec
        rates.append(samples(collector)['recv_rate_tps{route="public"}'])
    assert rates[0] == rates[29] == 50
    assert rates[-1] == 200
    assert rates[32] == pytest.approx((7 * 50 + 3 * 200) / 10)


def test_the_service_exports_them_before_the_first_frame(tmp_path: Path) -> None:
    async def no_other(number: int) -> str:
        raise AssertionError(number)

    topics = (JOURNAL, ROWS, TICKS, EVENTS, REJECTS)
    codecs = Codecs(
        dict.fromkeys(topics, 1), {each: schema_text(BY_NAME[each].schema or "") for each in topics}, no_other
    )
    config = load({"SOURCE": "capture", "CAPTURE": str(tmp_path / "none.gz")})
    _, registry, status = build(config, MemoryLog(), codecs)  # type: ignore[arg-type]
    text = generate_latest(registry).decode()
    families = re.findall(r"^# TYPE (\S+)", text, re.MULTILINE)
    assert len(set(families)) == len(families)
    assert {
        "latency_ms",
        "queue_depth",
        "dedup_hits_total",
        "resyncs_total",
        "ws_reconnects_total",
        "batch_span",
        "consumer_lag_records",
        "orderflow_batches_sent_total",
    } <= set(families)
    assert status()["recorder"]["source"] == "capture"


def test_latency_from_the_exchange_stands_beside_that_of_the_hop() -> None:
    latencies_ms, feed = RecentSamples(), Feed()
    counting(lambda _: feed.processor, ProcessCounts(), latencies_ms)(0)
    for number in range(1, 101):
        feed.quote(number, E=feed.now_ms - number)
    spec = ServiceSpec("normaliser", (JOURNAL,), (), "f")
    runtime = ProcessorRuntime(MemoryLog(), cast(Codecs, None), spec, RuntimeOptions(), lambda _: feed.processor)
    hops = {"exchange": latencies_ms.values, "receive": lambda: [3.0]}
    found = samples(StatsCollector("ingestion", runtime, "f", hops))
    assert found['latency_ms{hop="exchange",quantile="0.5",service="ingestion"}'] == 51
    assert found['latency_ms{hop="exchange",quantile="0.99",service="ingestion"}'] == 100
    assert found['latency_ms{hop="receive",quantile="0.99",service="ingestion"}'] == 3
    assert not [name for name in found if name.startswith("latency_ms") and "rows" in name], "no record yet"


def test_a_quiet_partition_weighs_no_more_than_its_frames() -> None:
    latencies_ms = RecentSamples()
    make = counting(lambda partition: NormaliserProcessor(NormaliserConfig(), partition), ProcessCounts(), latencies_ms)
    busy, quiet = Feed("BTCUSDT"), Feed("ETHUSDT")
    busy.processor, quiet.processor = (cast(NormaliserProcessor, make(partition)) for partition in (0, 1))
    quiet.quote(1, E=quiet.now_ms - 900)
    for number in range(1, 200):
        busy.quote(number, E=busy.now_ms - 5)
    assert sorted(latencies_ms.values())[-2:] == [5, 900]


def test_samples_grow_old() -> None:
    now_sec = 0.0
    ring = RecentSamples(lambda: now_sec)
    for value in range(MAX_SAMPLES + 10):
        ring.add(value)
    assert ring.values() == list(range(10, MAX_SAMPLES + 10))
    now_sec = SPAN_SEC
    ring.add(-1.0)
    assert len(ring.values()) == MAX_SAMPLES
    now_sec = SPAN_SEC + 1
    assert ring.values() == [-1.0], "a quantile does not stand when nothing follows"
    now_sec = 3 * SPAN_SEC
    assert ring.values() == []


def test_instances_of_one_service_keep_a_file_each(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from orderflow.streaming.service import claim_metrics_file; "
        "print(claim_metrics_file(Path(sys.argv[1]), 'ofi'), flush=True); sys.stdin.read()"
    )

    def another() -> tuple[subprocess.Popen[str], str]:
        command = [sys.executable, "-c", code, str(tmp_path)]
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        return process, process.stdout.readline().strip()

    first, of_first = another()
    second, of_second = another()
    try:
        assert of_first == str(tmp_path / "metrics" / "ofi" / "metrics.json")
        assert of_second == str(tmp_path / "metrics" / "ofi-2" / "metrics.json")
        assert claim_metrics_file(tmp_path, "cvd") == tmp_path / "metrics" / "cvd" / "metrics.json"
    finally:
        first.kill()
        first.communicate()
    third, of_third = another()
    try:
        assert of_third == of_first, "its successor"
    finally:
        for process in (second, third):
            process.kill()
            process.communicate()


def test_too_many_instances_write_no_file(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    claimed = {claim_metrics_file(tmp_path, "fusion") for _ in range(MOST_INSTANCES + 1)}
    assert len(claimed) == MOST_INSTANCES + 1
    assert None in claimed
    assert len(caplog.messages) == 1


async def test_the_file_holds_the_figures_and_a_full_disk_ends_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("orderflow.streaming.service.METRICS_FILE_SEC", 0.001)
    registry = CollectorRegistry()
    registry.register(RecorderCollector(FakeRecorder(conflated=6)))
    path = tmp_path / "metrics" / "ingestion" / "metrics.json"
    blocked = tmp_path / "blocked"
    blocked.write_text("a file, not a folder")
    tasks = [
        asyncio.create_task(keep_metrics_file(each, "ingestion", registry)) for each in (path, blocked / "metrics.json")
    ]
    async with asyncio.timeout(120):
        while not path.is_file() or not caplog.messages:
            await asyncio.sleep(0.001)
    for task in tasks:
        task.cancel()
    await asyncio.wait(tasks)
    content = json.loads(path.read_text())
    assert content["service"] == "ingestion"
    assert content["metrics"]["conflated_frames_total"] == 6
    assert len([message for message in caplog.messages if "can't be written" in message]) == 1


async def test_figures_that_fail_once_are_written_the_next_time(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("orderflow.streaming.service.METRICS_FILE_SEC", 0.001)

    class Stumbling(FakeRecorder):
        looks = 0

        def status(self) -> dict[str, Any]:
            self.looks += 1
            if self.looks < 3:
                raise RuntimeError("dictionary changed size during iteration")
            return self.content

    registry = CollectorRegistry()
    registry.register(RecorderCollector(Stumbling(conflated=6)))
    path = tmp_path / "metrics.json"
    task = asyncio.create_task(keep_metrics_file(path, "ingestion", registry))
    async with asyncio.timeout(120):
        while not path.is_file():
            await asyncio.sleep(0.001)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    assert json.loads(path.read_text())["metrics"]["conflated_frames_total"] == 6
    assert len([message for message in caplog.messages if "put together" in message]) == 1


def test_every_reason_of_a_reject_is_there_from_the_start() -> None:
    """A series that begins above 0 has not grown: the first rejects of a reason would be in no rate."""
    found = samples(NormaliserCollector(list, ProcessCounts()))
    assert {f'rejects_total{{reason="{reason}"}}' for reason in REJECT_REASONS} <= found.keys()
    assert found['rejects_total{reason="bad_json"}'] == 0


def test_the_first_gap_resync_and_missing_frame_of_a_reason_are_growth_too() -> None:
    found = samples(NormaliserCollector(list, ProcessCounts()))
    assert found['gaps_total{reason="pu_mismatch"}'] == 0
    assert found['gaps_total{reason="disconnected"}'] == 0
    assert found['resyncs_total{reason="quote_mismatch"}'] == 0
    assert found['missing_frames_total{reason="dropped"}'] == 0


def test_reasons_that_are_told_from_the_start_are_those_that_come() -> None:
    """Every literal reason of a gap or a resync in the normaliser, and of the recorder's gaps."""
    libs = Path(__file__).resolve().parents[2] / "libs" / "orderflow"
    text = (libs / "venues" / "binance" / "normaliser.py").read_text()
    found = set(re.findall(r'self\._gap\(state, record, (?:trade\.)?ts_ms, "(\w+)"', text))
    resyncs = set(re.findall(r'self\._resync\(state, "(\w+)"', text))
    recorded = {"disconnected", "resubscribed"}
    for name in ("websocket_recorder.py", "queue.py"):
        recorded |= set(re.findall(r'"reason": "(\w+)", "streams"', (libs / "ingest" / name).read_text()))
    assert {"pu_mismatch", "restart", "conflated", "dropped", "not_listed"} <= found | recorded
    assert found | recorded | {"unknown"} == set(GAP_REASONS)
    assert resyncs | {"pu_mismatch", "crossed_book"} <= set(RESYNC_REASONS) <= set(GAP_REASONS)


COUNTED = ("dedup_hits", "rejects", "gaps", "resyncs", "missing", "market_events", "lost_trades", "oracle", "unrowed")


def eventful_feed(counted: ProcessCounts) -> Feed:
    """A feed in which something of each kind has happened."""
    feed = Feed()
    feed.processor.counted = counted
    feed.tick()
    feed.quote(5)
    feed.quote(5)
    feed.quote(6, b="x")
    feed.trade(1)
    feed.trade(5)
    feed.tick(300)
    feed.tick(6000)
    feed.synced()
    feed.diff(21, 25, 20)
    feed.diff(31, 40, 30)
    feed.step("gap", {"reason": "dropped", "streams": ["bookTicker"], "frames": 7}, symbol="BTCUSDT")
    return feed


def test_counts_of_the_normaliser_never_fall_and_are_not_restored() -> None:
    """What a snapshot brings was counted by whoever saw it: a new process that shows it would have grown by it."""
    counted = ProcessCounts()
    feed = eventful_feed(counted)
    owned: list[NormaliserProcessor] = []
    collector = NormaliserCollector(lambda: owned, counted)
    owned.append(feed.processor)
    before = {name: value for name, value in samples(collector).items() if name.startswith(COUNTED)}
    assert before["lost_trades_total"] == 3 and before['gaps_total{reason="pu_mismatch"}'] == 1
    assert before["oracle_skipped_total"] > 0
    owned.clear()
    assert {name: samples(collector)[name] for name in before} == before, "the partition was given away"
    make = counting(lambda partition: NormaliserProcessor(feed.processor.config, partition), counted, RecentSamples())
    again = cast(NormaliserProcessor, make(0))
    again.restore(feed.processor.snapshot())
    owned.append(again)
    assert {name: samples(collector)[name] for name in before} == before, "and came back"
    other = ProcessCounts()
    make = counting(lambda partition: NormaliserProcessor(feed.processor.config, partition), other, RecentSamples())
    taken_over = cast(NormaliserProcessor, make(0))
    taken_over.restore(feed.processor.snapshot())
    found = samples(NormaliserCollector(lambda: [taken_over], other))
    assert {name: value for name, value in found.items() if name.startswith(COUNTED) and value} == {}


def test_what_a_gone_partition_counted_last_is_not_lost() -> None:
    """Nobody need ask between the event and the loss of the partition, or the next session."""
    counted = ProcessCounts()
    eventful_feed(counted)
    found = samples(NormaliserCollector(list, counted))
    assert found["lost_trades_total"] == 3
    assert found['rejects_total{reason="bad_price"}'] == 1


# -- the runtime's figures ---------------------------------------------------------------------------------------------


def codecs_of(*topics: str) -> Codecs:
    async def no_other(number: int) -> str:
        raise AssertionError(number)

    return Codecs(
        dict.fromkeys(topics, 1), {each: schema_text(BY_NAME[each].schema or "") for each in topics}, no_other
    )


def runtime_of() -> ProcessorRuntime:
    spec = ServiceSpec("normaliser", (JOURNAL,), (), "f")
    make = partial(NormaliserProcessor, NormaliserConfig())
    return ProcessorRuntime(MemoryLog(), codecs_of(JOURNAL, ROWS, TICKS, EVENTS, REJECTS), spec, RuntimeOptions(), make)


AGE = 'orderflow_input_age_sec{service="ingestion"}'


def test_the_age_of_the_input_is_that_of_the_partition_furthest_behind() -> None:
    runtime = runtime_of()
    collector = StatsCollector("ingestion", runtime, "f")
    assert AGE not in samples(collector), "nothing is owned"
    for partition in (0, 1, 2):
        runtime.tasks[partition] = runtime.make_task(partition)
    assert samples(collector)[AGE] == 0, "nobody knows of a symbol on any of them"
    now_ms = int(time.time() * 1000)
    runtime.tasks[0].has_symbols = runtime.tasks[1].has_symbols = True
    runtime.tasks[0].note_processed(now_ms - 45_000, now_ms - 45_000)
    runtime.tasks[1].note_processed(now_ms, now_ms)
    runtime.tasks[2].note_processed(now_ms - 500_000, now_ms - 500_000)
    assert 44 < samples(collector)[AGE] < 60, "not of one that has no symbols and is told the time every ten minutes"
    runtime.lag._lags, runtime.lag._asked_sec = {TP(JOURNAL, 2): 7}, time.monotonic()
    assert samples(collector)[AGE] > 499, "unless something waits there"


def test_a_service_that_takes_nothing_after_a_restart_has_an_age() -> None:
    runtime = runtime_of()
    runtime.tasks[0] = task = runtime.make_task(0)
    task.has_symbols = True
    task.newest_stamp_ms -= 40_000
    assert 39 < samples(StatsCollector("ingestion", runtime, "f"))[AGE] < 60


def test_a_clock_that_was_ahead_mutes_nothing() -> None:
    runtime = runtime_of()
    runtime.tasks[0] = task = runtime.make_task(0)
    task.has_symbols = True
    now_ms = int(time.time() * 1000)
    task.note_processed(now_ms + 3_600_000, now_ms + 3_600_000)
    assert task.newest_stamp_ms <= int(time.time() * 1000)
    task.note_processed(now_ms - 40_000, now_ms - 40_000)
    assert samples(StatsCollector("ingestion", runtime, "f"))[AGE] > 39


def test_nothing_grows_old_where_nothing_is_owned() -> None:
    runtime = runtime_of()
    runtime.stats.owned_at = time.time() - 1000
    age = 'orderflow_snapshot_age_sec{service="ingestion"}'
    assert samples(StatsCollector("ingestion", runtime, "f"))[age] == 0
    runtime.tasks[0] = runtime.make_task(0)
    assert samples(StatsCollector("ingestion", runtime, "f"))[age] > 999


async def test_records_dropped_by_a_partition_that_is_gone_stay_counted() -> None:
    runtime = runtime_of()
    encode = runtime.codecs.encoder(JOURNAL)

    def record(seq: int, epoch: int, symbol: str = "BTCUSDT") -> Any:
        value = encode({**journal_record("tick", 1, symbol=symbol, payload=b"{}"), "seq": seq})
        headers = ((EPOCH_HEADER, str(epoch).encode()),)
        return SimpleNamespace(value=value, offset=seq, timestamp=1, key=symbol.encode(), headers=headers)

    task = runtime.make_task(0)
    runtime.tasks[0] = task
    await task.push(JOURNAL, [record(1, 2), record(2, 2), record(2, 2), record(3, 1), record(1, 2)])
    await task.push(JOURNAL, [record(3, 2), record(3, 2)])
    expected = {
        'orderflow_records_duplicate_total{service="ingestion"}': 3,
        'orderflow_records_stale_epoch_total{service="ingestion"}': 1,
    }
    collector = StatsCollector("ingestion", runtime, "f")
    assert {name: samples(collector)[name] for name in expected} == expected
    task.meet_symbols(task.merger.run(10))
    assert task.has_symbols
    assert task.note_control({"kind": "config", "payload": b'{"type": "session", "session": "s"}'})
    assert not task.has_symbols, "another session may have other symbols"
    runtime.tasks.clear()
    assert {name: samples(collector)[name] for name in expected} == expected


def test_batches_count_on_over_a_broker_that_was_lost() -> None:
    runtime = runtime_of()
    for writer in runtime.writers:
        writer.batches_sent, writer.records_sent = 3, 40
    before = runtime.writers
    runtime.renew_writers()
    assert not set(map(id, runtime.writers)) & set(map(id, before))
    found = samples(StatsCollector("ingestion", runtime, "f"))
    assert found['orderflow_batches_sent_total{service="ingestion"}'] == 6
    assert found['orderflow_batch_records_total{service="ingestion"}'] == 80


def test_the_journals_writer_is_one_of_ingestions(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    codecs = codecs_of(JOURNAL, ROWS, TICKS, EVENTS, REJECTS)
    config = load({"SOURCE": "capture", "CAPTURE": str(tmp_path / "none.gz")})
    service, registry, _ = build(config, MemoryLog(), codecs)  # type: ignore[arg-type]
    journal = cast(Any, service)._journal
    journal.writer.batches_sent, journal.writer.records_sent, journal.writer._batches = 5, 70, 2
    monkeypatch.setattr(Writer, "waiting_sec", property(lambda writer: 12.0 if writer is journal.writer else 0.0))
    found = metrics_content("ingestion", registry)["metrics"]
    expected = {
        'orderflow_batches_sent_total{service="ingestion"}': 5,
        'orderflow_batch_records_total{service="ingestion"}': 70,
        'orderflow_batches_outstanding{service="ingestion"}': 2,
        'orderflow_unacknowledged_sec{service="ingestion"}': 12,
    }
    assert {name: found[name] for name in expected} == expected


def test_ready_is_what_the_page_says(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    codecs = codecs_of(JOURNAL, ROWS, TICKS, EVENTS, REJECTS)
    config = load({"SOURCE": "capture", "CAPTURE": str(tmp_path / "none.gz")})
    service, registry, _ = build(config, MemoryLog(), codecs)  # type: ignore[arg-type]
    inside = cast(Any, service)
    ready = 'orderflow_ready{service="ingestion"}'
    monkeypatch.setattr(ProcessorRuntime, "ready", True)
    assert not service.ready and metrics_content("ingestion", registry)["metrics"][ready] == 0
    inside._recorder.ready = True
    assert service.ready and metrics_content("ingestion", registry)["metrics"][ready] == 1
    monkeypatch.setattr(Writer, "waiting_sec", property(lambda writer: 6.0 * (writer is inside._journal.writer)))
    assert not service.ready and metrics_content("ingestion", registry)["metrics"][ready] == 0
