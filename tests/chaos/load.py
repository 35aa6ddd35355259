"""What needs load: scaling under it, and running for long under it."""

from __future__ import annotations

import asyncio
import threading
import time
from bisect import bisect_left
from pathlib import Path
from typing import Any, TypeVar

from aiokafka import AIOKafkaConsumer, TopicPartition

from tests.chaos.faults import Bench, quantile
from tests.chaos.market import played, widen
from tests.chaos.stack import SERVICES, Stack

MAJORS = "usdm_btc_eth_20240718.gz"
MAJORS_SEC = 480.0
SCALED = ("ofi", "cvd", "fusion")
SCALE_SEC = 60.0
SCALE_AT_SEC = (12.0, 34.0)
"""After which the scaled services go to three processes, and then to two."""
OUTPUTS = ("features.ofi", "features.cvd", "features.fusion", "signals")
ACTIVE_MOVES = 5
"""A partition without a symbol has nothing between its session and its end: its standing still is no pause."""
SAMPLE_SEC = 2.0
WARM_SHARE = 0.25
"""Of a soak that is left out of the slopes: buffers and rolling windows fill."""
LAG_SEC = 10.0
"""How far signals may be behind: some minutes of the market are twice its mean, and bursts many times that."""
SLOPE_MB_PER_MIN = 0.5
TILES_TO_JUDGE = 2.5
"""How many of the soak's tiles it takes to say whether memory grows."""
SHOWN = 200
"""Points of a series in the figures."""
BROKEN_CHAIN = 'gaps_total{reason="pu_mismatch"}'

T = TypeVar("T")


def wide_capture(
    bench: Bench, frames_per_sec: float, seconds: float, tile_sec: float = MAJORS_SEC
) -> tuple[Path, int, str]:
    """A capture of so many seconds of the market that gives this load: (file, frames, speed).

    The load comes from copies of the symbols, so that the market keeps its pace: what holds a minute of it holds what a
    minute is, and not what a minute stretched over four is.
    """
    source = bench.captures / MAJORS
    recorded = sum(1 for _ in played(source, seconds, tile_sec))
    copies = max(1, round(frames_per_sec * seconds / recorded))
    target = bench.folder / f"wide-{copies}-{int(seconds)}.gz"
    frames = widen(source, target, copies, seconds, tile_sec)
    # Whole copies do not come to every rate: the speed makes the mean what was asked for.
    return target, frames, f"{frames_per_sec * seconds / frames:.4f}"


class Pauses(threading.Thread):
    """Watches from outside how long each partition of the outputs stands still."""

    def __init__(self, stack: Stack) -> None:
        super().__init__(daemon=True)
        self._stack = stack
        self._over = threading.Event()
        self.longest: dict[str, float] = {}

    def run(self) -> None:
        asyncio.run(self._watch())

    async def _watch(self) -> None:
        consumer = AIOKafkaConsumer(bootstrap_servers=self._stack.bootstrap)
        await consumer.start()
        try:
            tps = [TopicPartition(self._stack.prefix + topic, number) for topic in OUTPUTS for number in range(12)]
            ends: dict[TopicPartition, int] = {}
            moved: dict[TopicPartition, float] = {}
            moves: dict[TopicPartition, int] = {}
            while not self._over.is_set():
                now = time.monotonic()
                for tp, end in (await consumer.end_offsets(tps)).items():
                    if end == ends.get(tp):
                        if moves[tp] < ACTIVE_MOVES:
                            continue
                        topic = tp.topic.removeprefix(self._stack.prefix)
                        self.longest[topic] = max(self.longest.get(topic, 0.0), now - moved[tp])
                    else:
                        ends[tp], moved[tp] = end, now
                        moves[tp] = moves.get(tp, -1) + 1
                await asyncio.sleep(0.05)
        finally:
            await consumer.stop()

    def stop(self) -> None:
        self._over.set()
        self.join()


def scale(bench: Bench) -> None:
    """ofi, cvd and fusion from one process to three and to two under load."""
    frames_per_sec = bench.options["frames"]
    capture, frames, speed = wide_capture(bench, frames_per_sec, SCALE_SEC)
    bench.reference(capture)
    with bench.stack("scale", capture=capture, speed=speed, SNAPSHOT_SEC="10") as stack:
        stack.start()
        stack.until_at_work("signal")
        began = time.monotonic()
        pauses = Pauses(stack)
        pauses.start()
        stack.until(lambda: time.monotonic() - began > SCALE_AT_SEC[0], "the time to scale out")
        before = dict(pauses.longest)
        for service in SCALED:
            stack.add(service)
            stack.add(service)
        stack.until(lambda: time.monotonic() - began > SCALE_AT_SEC[1], "the time to scale in")
        owned = {
            service: [len(each.status().get("partitions", ())) for each in stack.of(service)] for service in SCALED
        }
        for service in SCALED:
            stack.remove(service)
        stack.until(lambda: bool(stack.recorder().get("done")), "the end of the capture")
        pauses.stop()
        stack.drain()
    green = bench.judge("scale", stack)
    bench.expect(not stack.deaths, f"scale: services ended: {[(each.instance, each.cause) for each in stack.deaths]}")
    for service, counts in owned.items():
        bench.expect(counts == [4, 4, 4], f"scale: three {service} owned {counts} partitions")
    bench.figures["scale"] = {"frames": frames, "owned": owned, "pause_before_sec": before, "pause_sec": pauses.longest}
    shown = ", ".join(f"{topic} {seconds:.1f} s" for topic, seconds in pauses.longest.items())
    bench.say(
        f"1 -> 3 -> 2 of {', '.join(SCALED)} at {frames_per_sec} frames/s: {'same bytes' if green else 'WRONG'}; longest "
        f"pause {shown}; before scaling {max(before.values(), default=0):.1f} s"
    )


def soak(bench: Bench) -> None:
    """Hours in small: memory, lag and latency under a steady load."""
    frames_per_sec, minutes = bench.options["frames"], bench.options["minutes"]
    capture, frames, speed = wide_capture(bench, frames_per_sec, minutes * 60, bench.options["tile"])
    samples: list[dict[str, Any]] = []
    with bench.stack("soak", capture=capture, speed=speed, SNAPSHOT_SEC="10", PARQUET_ROTATE_SEC="60") as stack:
        symbols = len(stack.info.symbols)
        bench.say(
            f"soak: {frames:,} frames of {symbols} symbols at {frames_per_sec}/s, {speed} of the market's own pace"
        )
        stack.start()
        stack.until_at_work("signal")
        began = time.monotonic()
        cpu_began = {name: each.status().get("cpu_sec", 0.0) for name, each in stack.instances.items()}
        while not stack.recorder().get("done"):
            samples.append(sample(stack, time.monotonic() - began))
            time.sleep(SAMPLE_SEC)
        took = time.monotonic() - began
        cpu = {name: each.status().get("cpu_sec", 0.0) - cpu_began[name] for name, each in stack.instances.items()}
        stack.drain()
        routes = stack.recorder().get("frames_by_route", {})
    bench.expect(not stack.deaths, f"soak: services ended: {[(each.instance, each.cause) for each in stack.deaths]}")
    expect_whole(bench, stack, routes)
    bench.say(f"{took:.0f} s, {frames / took:,.0f} frames/s")
    warm = [each for each in samples if each["at"] > WARM_SHARE * took]
    figures: dict[str, Any] = {
        "seconds": took,
        "frames": frames,
        "frames_per_sec": frames / took,
        "symbols": symbols,
        "speed": float(speed),
        "cores": {service: cpu[service] / took for service in SERVICES},
    }
    bench.figures["soak"] = figures
    judge_memory(bench, figures, samples, warm)
    judge_lag(bench, figures, samples, warm)
    for service in ("ingestion", "ofi", "cvd", "fusion", "signal"):
        p50 = [each["latency"][service]["0.5"] for each in warm if each["latency"].get(service)]
        p99 = [each["latency"][service]["0.99"] for each in warm if each["latency"].get(service)]
        figures[f"latency_{service}_ms"] = {"p50": quantile(p50, 0.5), "p99": quantile(p99, 0.5)}
        bench.say(f"receive to {service}: p50 {quantile(p50, 0.5):.0f} ms, p99 {quantile(p99, 0.5):.0f} ms")


def expect_whole(bench: Bench, stack: Stack, routes: dict[str, int]) -> None:
    """Whether everything in the capture has gone through: counts, since a run to compare with would take as long."""
    info = stack.info
    bench.expect(
        routes == info.frames_by_conn, f"soak: the capture holds {info.frames_by_conn}, journalled were {routes}"
    )
    counts = stack.final_metrics("ingestion")
    for name in ("rejects_total", "lost_trades_total", "dedup_hits_total", "missing_frames_total"):
        found = {key: value for key, value in counts.items() if key.startswith(f"{name}{{") or key == name}
        bench.expect(bool(found) and not any(found.values()), f"soak: {name} is not 0: {found}")
    gaps = {key: value for key, value in counts.items() if key.startswith("gaps_total{") and value}
    seams = gaps.pop(BROKEN_CHAIN, 0)
    bench.expect(not gaps, f"soak: gaps: {gaps}")
    # A snapshot for each book of each tile; the end may cut off those of the last one.
    books = sum(info.snapshots.values())
    expected = range(books - len(info.symbols), books + 1)
    bench.expect(seams in expected, f"soak: {seams:g} chains of diffs broke, with {books} snapshots in the capture")
    rows = stack.final_metrics("lake")
    for kind, stream in (("prices", "@aggTrade"), ("quotes", "@bookTicker")):
        held = rows.get(f'lake_rows_total{{kind="{kind}",service="lake"}}', 0)
        sent = sum(number for name, number in info.streams.items() if name.endswith(stream))
        bench.expect(held == sent, f"soak: the lake holds {held:,g} {kind} of {sent:,} frames")


def judge_memory(
    bench: Bench, figures: dict[str, Any], samples: list[dict[str, Any]], warm: list[dict[str, Any]]
) -> None:
    figures["rss"], figures["rss_over_time"] = {}, {}
    period = bench.options["tile"] / figures["speed"] / 60
    judged = bench.options["minutes"] / period >= TILES_TO_JUDGE
    # Memory comes to its height in the market's busiest minute, which a service has met once a tile is over.
    seen = [each for each in warm if each["at"] > 60 * period] if judged else warm
    bench.say(f"{'service':>9}  rss MB  slope and growth from tile to tile, MB/min  first and last quarter  cores")
    for service in SERVICES:
        points = rss_of(service, seen)
        quarter = max(1, len(points) // 4)
        leans, grows = slope(points), growth(points, period)
        early, late = (quantile([mb for _, mb in part], 0.5) for part in (points[:quarter], points[-quarter:]))
        figures["rss"][service] = {
            "mb": points[-1][1],
            "most_mb": max(mb for _, mb in points),
            "slope_mb_per_min": leans,
            "growth_mb_per_min": grows,
            "first_quarter_mb": early,
            "last_quarter_mb": late,
        }
        figures["rss_over_time"][service] = [(round(at, 3), mb) for at, mb in thinned(rss_of(service, samples))]
        bench.say(
            f"{service:>9}  {points[-1][1]:6.0f}  {leans:8.2f} {grows:24.2f}  {early:23.0f} {late:8.0f}  {figures['cores'][service]:5.2f}"
        )
        if judged:
            bench.expect(grows < SLOPE_MB_PER_MIN, f"soak: {service} grows by {grows:.2f} MB a minute")


def judge_lag(bench: Bench, figures: dict[str, Any], samples: list[dict[str, Any]], warm: list[dict[str, Any]]) -> None:
    figures["lag_records"] = lag = max((each["lag"] for each in warm), default=0)
    behind = lags_sec(samples)
    figures["lag_sec"] = lag_sec = max(behind[-len(warm) :], default=0.0)
    figures["source_behind_sec"] = late = max((each["behind_sec"] for each in warm), default=0.0)
    figures["lag_over_time"] = [
        (round(each["at"] / 60, 3), each["lag"], round(sec, 1))
        for each, sec in thinned(list(zip(samples, behind, strict=True)))
    ]
    bench.expect(lag_sec < LAG_SEC, f"soak: signals lag by {lag_sec:.1f} s ({lag:,} records), and may by {LAG_SEC:g} s")
    figures["lake_lag_sec"] = lake = max(lags_sec(samples, "lake_lag")[-len(warm) :], default=0.0)
    bench.say(
        f"most behind: {lag:,} records, {lag_sec:.1f} s; the lake {lake:.1f} s; the source behind its pace: {late:.1f} s"
    )


def sample(stack: Stack, at: float) -> dict[str, Any]:
    statuses = {name: each.status() for name, each in stack.instances.items()}
    recorder = statuses["ingestion"].get("recorder", {})
    seqs = recorder.get("seqs", {})

    def lag(service: str) -> int:
        frontiers = statuses[service].get("frontiers", {})
        return sum(max(0, seq - frontiers.get(str(partition), seq)) for partition, seq in seqs.items())

    return {
        "at": at,
        "rss": {name: status["rss_mb"] for name, status in statuses.items() if status},
        "written": sum(seqs.values()),
        "lag": lag("signal"),
        "lake_lag": lag("lake"),
        "behind_sec": recorder.get("behind_sec", 0.0),
        "latency": {name: status.get("latency_ms") for name, status in statuses.items()},
    }


def rss_of(service: str, samples: list[dict[str, Any]]) -> list[tuple[float, float]]:
    """(minute, MB)."""
    return [(each["at"] / 60, each["rss"][service]) for each in samples if service in each["rss"]]


def lags_sec(samples: list[dict[str, Any]], lag: str = "lag") -> list[float]:
    """Of each sample, how long before it as many records were written as were dealt with by then."""
    times = [each["at"] for each in samples]
    written = [each["written"] for each in samples]
    found = []
    for number, each in enumerate(samples):
        done = each["written"] - each[lag]
        place = min(bisect_left(written, done, 0, number), number)
        before = max(0, place - 1)
        share = (done - written[before]) / ((written[place] - written[before]) or 1)
        found.append(each["at"] - times[before] - max(0.0, share) * (times[place] - times[before]))
    return found


def thinned(points: list[T]) -> list[T]:
    """Every so many of them, and the last."""
    return points[: -1 : -(-len(points) // (SHOWN - 1)) or 1] + points[-1:]


def growth(points: list[tuple[float, float]], period: float) -> float:
    """Mean growth over a period, per unit of it: each point against the one a period later.

    A market has its quiet and its busy minutes, which a line through all points takes for growth. Where there is no such
    pair, the slope.
    """
    times = [at for at, _ in points]
    later = [(value, bisect_left(times, at + period)) for at, value in points]
    pairs = [(value, points[place][1]) for value, place in later if place < len(points)]
    return sum(after - before for before, after in pairs) / len(pairs) / period if pairs else slope(points)


def slope(points: list[tuple[float, float]]) -> float:
    """Of the least-squares line."""
    if len(points) < 2:
        return 0.0
    mean_x = sum(x for x, _ in points) / len(points)
    mean_y = sum(y for _, y in points) / len(points)
    spread = sum((x - mean_x) ** 2 for x, _ in points)
    return sum((x - mean_x) * (y - mean_y) for x, y in points) / spread if spread else 0.0
