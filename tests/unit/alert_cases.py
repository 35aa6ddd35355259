"""For each alert: figures that make it fire and let it clear, and figures that come near and must not.

Values are in promtool's notation, one sample every 15 s: `1+0x8` is 1 and eight more of it, `0+5x8` rises by 5 each, `_` is
no sample, `stale` that the target is gone. A minute is 4 samples.
"""

from __future__ import annotations

from dataclasses import dataclass, field

Series = dict[str, str]

READY = {
    f'orderflow_ready{{service="{service}"}}': "1+0x260"
    for service in ("ingestion", "ofi", "cvd", "fusion", "signal", "sinks", "lake")
}


@dataclass(frozen=True)
class Case:
    """`series` fire `alert` at `fires` with `labels`, not yet at `before` and no more at `after`; `quiet` never do."""

    alert: str
    series: Series
    before: str
    fires: str
    after: str
    quiet: Series
    labels: dict[str, str] = field(default_factory=dict)


def flag(alert: str, name: str, bad: str, good: str, lasts: str, labels: dict[str, str], margin: str = "") -> Case:
    """A gauge that is bad for 20 minutes and good again; `margin` is the worst that is still good."""
    return Case(
        alert,
        {name: f"{bad}+0x79 {good}+0x40"},
        "0m" if lasts == "0m" else _less(lasts),
        _more(lasts),
        "21m",
        {name: f"{margin or good}+0x120"},
        labels,
    )


def _less(span: str) -> str:
    return f"{_seconds(span) - 15}s"


def _more(span: str) -> str:
    return f"{_seconds(span) + 15}s"


def _seconds(span: str) -> int:
    return int(span[:-1]) * {"s": 1, "m": 60}[span[-1]]


OFI = {"service": "ofi"}
CASES = (
    flag("ServiceDown", 'up{job="orderflow",instance="a"}', "0", "1", "30s", {"job": "orderflow", "instance": "a"}),
    Case(
        "ServiceMissing",
        READY | {'orderflow_ready{service="cvd"}': "1+0x8 stale _x23 1+0x20"},
        "3m",
        "4m",
        "9m",
        READY,
        {"service": "cvd"},
    ),
    flag("ServiceNotReady", 'orderflow_ready{service="ofi"}', "0", "1", "1m", OFI),
    Case(
        "ServiceRestarting",
        {'orderflow_start_time_sec{service="ofi"}': "100+0x4 200+0x4 300+0x4 400+0x80"},
        "2m",
        "4m",
        "20m",
        {
            'orderflow_start_time_sec{service="ofi"}': "100+0x4 200+0x4 300+0x80",
            'orderflow_start_time_sec{service="cvd"}': "100+0x4 200+0x80",
        },
        OFI,
    ),
    flag("BrokerAway", 'orderflow_broker_reachable{service="ofi"}', "0", "1", "30s", OFI),
    flag("WritesUnacknowledged", 'orderflow_unacknowledged_sec{service="ofi"}', "11", "0", "30s", OFI, "10"),
    Case(
        "SnapshotsStale",
        {
            'orderflow_snapshot_age_sec{service="ofi"}': "0+15x40 0+0x20",
            'orderflow_snapshot_interval_sec{service="ofi"}': "10+0x60",
        },
        "4m",
        "5m",
        "10m15s",
        {
            'orderflow_snapshot_age_sec{service="ofi"}': "119+0x40",
            'orderflow_snapshot_interval_sec{service="ofi"}': "10+0x40",
            'orderflow_snapshot_age_sec{service="lake"}': "900+0x40",
            'orderflow_snapshot_interval_sec{service="lake"}': "10+0x40",
            # Set to an hour.
            'orderflow_snapshot_age_sec{service="cvd"}': "3700+0x40",
            'orderflow_snapshot_interval_sec{service="cvd"}': "3600+0x40",
        },
        OFI,
    ),
    Case(
        "ConsumerLagGrowing",
        {
            'consumer_lag_records{service="ofi",topic="a",partition="0"}': "0+400x48 15000-500x20",
            'consumer_lag_records{service="ofi",topic="a",partition="1"}': "100+0x80",
        },
        "8m",
        "10m",
        "16m",
        {
            'consumer_lag_records{service="ofi",topic="a",partition="0"}': "60000-100x80",
            'consumer_lag_records{service="cvd",topic="a",partition="0"}': "0+50x80",
        },
        OFI,
    ),
    flag("InputStalled", 'orderflow_input_age_sec{service="ofi"}', "31", "1", "30s", OFI, "29"),
    flag("ReplayDivergence", 'replay_divergence_total{topic="signals"}', "1", "0", "0m", {"topic": "signals"}),
    Case(
        "ReplayNotJudged",
        {'verify_not_judged_total{instance="a"}': "0+0x20 2+0x600"},
        "9m",
        "11m",
        "140m",
        {'verify_not_judged_total{instance="a"}': "2+0x80"},
        {"instance": "a"},
    ),
    Case(
        "ReplayNotJudged",
        {
            'verify_behind_sec{instance="a"}': "0+0x4 10801+0x40 40+0x40",
            'verify_span_sec{instance="a"}': "3600+0x100",
        },
        "5m45s",
        "7m",
        "13m",
        {'verify_behind_sec{instance="a"}': "7200+0x80", 'verify_span_sec{instance="a"}': "3600+0x80"},
        {"instance": "a"},
    ),
    Case(
        "NoFrames",
        {
            'recv_frames_total{route="public"}': "0+100x20 2000+0x20 2000+100x20",
            'recv_frames_total{route="market"}': "0+10x20 200+0x20 200+10x20",
        },
        "6m",
        "7m",
        "12m",
        {'recv_frames_total{route="public"}': "0+1x60", 'recv_frames_total{route="market"}': "0+0x60"},
    ),
    Case(
        "RouteSilent",
        {
            'recv_frames_total{instance="a",route="public"}': "0+100x80",
            'recv_frames_total{instance="a",route="market"}': "0+10x20 200+0x20 200+10x40",
            'recorder_symbols{instance="a"}': "3+0x80",
        },
        "6m",
        "8m",
        "12m",
        {
            # A capture, and a shard without symbols.
            'recv_frames_total{instance="b",route="market"}': "0+0x80",
            'recv_frames_total{instance="c",route="public"}': "0+0x80",
            'recorder_symbols{instance="c"}': "0+0x80",
            'recv_frames_total{instance="d",route="market"}': "0+1x80",
            'recorder_symbols{instance="d"}': "1+0x80",
        },
        {"instance": "a", "route": "market"},
    ),
    Case(
        "RouteSilent",
        {
            'recv_frames_total{instance="a",route="public"}': "0+100x80",
            'recorder_symbols{instance="a"}': "3+0x80",
            'recv_frames_total{instance="b",route="public"}': "0+100x20 2000+0x20 2000+100x40",
            'recorder_symbols{instance="b"}': "2+0x80",
        },
        "6m",
        "8m",
        "12m",
        {'recv_frames_total{instance="a",route="public"}': "0+1x80", 'recorder_symbols{instance="a"}': "3+0x80"},
        {"instance": "b", "route": "public"},
    ),
    Case(
        "RecorderFenced",
        {'recorder_epoch{instance="a"}': "1+0x4 3+0x4 5+0x4 7+0x80", 'recorder_epoch{instance="b"}': "1+0x100"},
        "2m",
        "4m",
        "20m",
        # Three shards, each begun anew twice; unknown until the journal is open.
        {f'recorder_epoch{{instance="{shard}"}}': "1+0x4 _ 2+0x4 _ 3+0x80" for shard in "abc"},
    ),
    flag(
        "LatencyHigh",
        'latency_ms{service="ingestion",hop="exchange",quantile="0.99"}',
        "121",
        "60",
        "10m",
        {"service": "ingestion", "hop": "exchange", "quantile": "0.99"},
        "120",
    ),
    Case(
        "ReconnectsFrequent",
        {"ws_reconnects_total": "0+1x16 16+0x300"},
        "2m",
        "5m",
        "70m",
        {"ws_reconnects_total": "0+1x10 10+0x300"},
    ),
    flag(
        "StreamSilent",
        'stream_silent{symbol="BTCUSDT",stream="depth"}',
        "1",
        "0",
        "15s",
        {"symbol": "BTCUSDT", "stream": "depth"},
    ),
    flag("BookNotSynced", 'book_synced{symbol="BTCUSDT"}', "0", "1", "1m", {"symbol": "BTCUSDT"}),
    Case(
        "BookNotSynced",
        {
            'book_synced{instance="a",symbol="other"}': "1+0x80",
            'book_synced{instance="b",symbol="other"}': "1+0x4 0+0x20 1+0x60",
        },
        "2m",
        "3m",
        "9m",
        {'book_synced{instance="a",symbol="other"}': "1+0x80"},
        {"symbol": "other"},
    ),
    Case(
        "OracleFailed",
        {"books_distrusted_total": "0+0x20 2+0x60"},
        "5m",
        "6m",
        "12m",
        # A lost quote fails updates of a right book.
        {"books_distrusted_total": "7+0x60", "oracle_failed_total": "0+1x60"},
    ),
    Case("TradesLost", {"lost_trades_total": "0+0x20 2+0x80"}, "5m", "6m", "18m", {"lost_trades_total": "7+0x80"}),
    Case(
        "FramesDropped",
        {"dropped_frames_total": "0+0x20 2+0x60"},
        "5m",
        "6m",
        "12m",
        {"dropped_frames_total": "7+0x60"},
    ),
    Case(
        "RejectsFrequent",
        {'rejects_total{reason="a"}': "0+2x60 120+0x80", 'recv_frames_total{route="public"}': "0+100x140"},
        "4m",
        "8m",
        "22m",
        {'rejects_total{reason="a"}': "0+9x120", 'recv_frames_total{route="public"}': "0+1000x120"},
    ),
    flag("ClockDrift", "clock_drift_ms", "-201", "5", "1m", {}, "200"),
    flag(
        "CvdFloorHitRateHigh", 'cvd_floor_hit_rate{symbol="BTCUSDT"}', "0.7", "0.1", "15m", {"symbol": "BTCUSDT"}, "0.6"
    ),
    Case(
        "NoSignals",
        {
            'orderflow_topic_records_written_total{service="fusion",topic="features.fusion"}': "0+50x60",
            'orderflow_topic_records_written_total{service="signal",topic="signals"}': "0+50x16 _x20 0+50x30",
        },
        "6m",
        "8m",
        "12m",
        {
            'orderflow_topic_records_written_total{service="fusion",topic="features.fusion"}': "0+50x20 1000+0x40",
            'orderflow_topic_records_written_total{service="signal",topic="signals"}': "0+50x20 1000+0x40",
        },
    ),
    Case(
        "WriteErrors",
        {'write_errors_total{service="lake"}': "0+0x20 2+0x60"},
        "5m",
        "6m",
        "12m",
        {'write_errors_total{service="lake"}': "7+0x60", 'lake_partitions_stuck{service="lake"}': "0+0x60"},
        {"service": "lake"},
    ),
    flag("WriteErrors", 'lake_partitions_stuck{service="lake"}', "1", "0", "0m", {"service": "lake"}),
    Case(
        "DiskNearlyFull",
        {'lake_disk_free_bytes{service="lake"}': "9+0x40 50+0x40", 'lake_disk_total_bytes{service="lake"}': "100+0x80"},
        "1m45s",
        "3m",
        "11m",
        {'lake_disk_free_bytes{service="lake"}': "10+0x60", 'lake_disk_total_bytes{service="lake"}': "100+0x60"},
        {"service": "lake"},
    ),
    Case(
        "EmptyBuckets",
        {
            'lake_minutes_total{symbol="BTCUSDT"}': "0+0.25x640",
            'lake_empty_minutes_total{symbol="BTCUSDT"}': "0+0x8 1+0x640",
        },
        "20m",
        "40m",
        "75m",
        {
            'lake_minutes_total{symbol="BTCUSDT"}': "0+25x240",
            'lake_empty_minutes_total{symbol="BTCUSDT"}': "0+0.1x240",
        },
    ),
    flag("FusionAucLow", "fusion_auc_active_lower", "0.57", "0.61", "10m", {}, "0.58"),
    flag("CalibrationOff", "ece", "0.11", "0.05", "10m", {}, "0.1"),
    flag("CalibrationUntested", "platt_test_samples", "0", "500", "10m", {}, "1"),
    flag("MergeSlow", 'merge_time_diff_ms{quantile="0.99"}', "2001", "900", "5m", {"quantile": "0.99"}, "2000"),
    flag("MatchRateLow", "match_rate", "0.79", "0.95", "5m", {}, "0.8"),
    flag("ExecutorHalted", "executor_halted", "1", "0", "0m", {}),
)

RECORDED: tuple[tuple[str, Series, str, dict[str, float]], ...] = (
    (
        "service_limit:feature_z_above:ratio_rate1h",
        {
            'feature_z_total{service="cvd",symbol="A"}': "0+100x240",
            'feature_z_total{service="cvd",symbol="B"}': "0+300x240",
            'feature_z_above_total{service="cvd",symbol="A",limit="2"}': "0+10x240",
            'feature_z_above_total{service="cvd",symbol="B",limit="2"}': "0+6x240",
            'feature_z_total{service="ofi",symbol="A"}': "0+0x240",
            'feature_z_above_total{service="ofi",symbol="A",limit="2"}': "0+0x240",
        },
        "60m",
        {'{service="cvd",limit="2"}': 0.04},
    ),
    (
        "service_symbol_limit:feature_z_above:ratio_rate1h",
        {
            'feature_z_total{service="cvd",symbol="A"}': "0+100x240",
            'feature_z_above_total{service="cvd",symbol="A",limit="3"}': "0+1x240",
        },
        "60m",
        {'{service="cvd",symbol="A",limit="3"}': 0.01},
    ),
    (
        ":dedup_hits:ratio_rate5m",
        {
            'dedup_hits_total{stream="depth"}': "0+1x40",
            'recv_frames_total{route="public"}': "0+90x40",
            'recv_frames_total{route="market"}': "0+10x40",
        },
        "10m",
        {"{}": 0.01},
    ),
    (
        "service:orderflow_batch_records:mean1m",
        {
            'orderflow_batch_records_total{service="ofi"}': "0+300x40",
            'orderflow_batches_sent_total{service="ofi"}': "0+20x40",
            'orderflow_batch_records_total{service="cvd"}': "0+0x40",
            'orderflow_batches_sent_total{service="cvd"}': "0+0x40",
        },
        "10m",
        {'{service="ofi"}': 15.0},
    ),
    (
        ":lake_empty_minutes:ratio_increase1h",
        {
            'lake_minutes_total{symbol="A"}': "0+0.25x320",
            'lake_minutes_total{symbol="B"}': "0+0.25x320",
            'lake_empty_minutes_total{symbol="A"}': "0+0.05x320",
            'lake_empty_minutes_total{symbol="B"}': "0+0x320",
        },
        "70m",
        {"{}": 0.1},
    ),
    (
        "service:consumer_lag_records:sum",
        {
            'consumer_lag_records{instance="a",service="ofi",topic="t",partition="0"}': "5+0x10",
            'consumer_lag_records{instance="b",service="ofi",topic="t",partition="0"}': "3+0x10",
            'consumer_lag_records{instance="b",service="ofi",topic="u",partition="0"}': "6+0x10",
        },
        "2m",
        {'{service="ofi"}': 11.0},
    ),
    (
        "service_topic:consumer_lag_records:sum",
        {
            'consumer_lag_records{instance="a",service="ofi",topic="t",partition="0"}': "5+0x10",
            'consumer_lag_records{instance="b",service="ofi",topic="t",partition="0"}': "3+0x10",
            'consumer_lag_records{instance="a",service="ofi",topic="t",partition="1"}': "6+0x10",
        },
        "2m",
        {'{service="ofi",topic="t"}': 11.0},
    ),
    (
        "regime:fusion_records:rate1m",
        {'fusion_records_total{symbol="A",regime="active"}': "0+150x20"},
        "4m",
        {'{regime="active"}': 10.0},
    ),
    ("route:recv_frames:rate1m", {'recv_frames_total{route="public"}': "0+150x20"}, "4m", {'{route="public"}': 10.0}),
)
"""(record, series, when, its values)."""
