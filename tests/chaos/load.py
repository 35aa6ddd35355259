"""What needs load: scaling under it, and running for long under it."""

from __future__ import annotations

import asyncio
import threading
import time
from pathlib import Path
from typing import Any

from aiokafka import AIOKafkaConsumer, TopicPartition

from tests.chaos.faults import Bench, quantile
from tests.chaos.market import widen
from tests.chaos.stack import SERVICES, Stack

MAJORS = "usdm_btc_eth_20240718.gz"
MAJORS_FRAMES = 118_001
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
LAG_SEC = 5.0
"""Records that are behind at most, as seconds of the load."""
SLOPE_MB_PER_MIN = 0.5


def wide_capture(bench: Bench, frames_per_sec: float, seconds: float) -> tuple[Path, int, str]:
    """A capture that gives this load for so long: (file, frames, speed)."""
    recorded = MAJORS_FRAMES / MAJORS_SEC
    span = min(seconds, MAJORS_SEC)
    speed = span / seconds
    copies = max(1, round(frames_per_sec / (recorded * speed)))
    target = bench.folder / f"wide-{copies}-{int(seconds)}.gz"
    frames = widen(bench.captures / MAJORS, target, copies, span)
    # The recorded rate is not even: the speed makes the mean what was asked for.
    return target, frames, f"{frames_per_sec * span / frames:.4f}"


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
    capture, frames, speed = wide_capture(bench, frames_per_sec, minutes * 60)
    bench.say(f"soak: {frames:,} frames at {frames_per_sec}/s for {minutes:g} min")
    samples: list[dict[str, Any]] = []
    with bench.stack("soak", capture=capture, speed=speed, SNAPSHOT_SEC="10", PARQUET_ROTATE_SEC="60") as stack:
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
    bench.expect(not stack.deaths, f"soak: services ended: {[(each.instance, each.cause) for each in stack.deaths]}")
    bench.say(f"{took:.0f} s, {frames / took:,.0f} frames/s; {'service':>9}  rss MB  slope MB/min  cores")
    warm = [each for each in samples if each["at"] > WARM_SHARE * took]
    figures: dict[str, Any] = {"seconds": took, "frames_per_sec": frames / took, "rss": {}}
    for service in SERVICES:
        points = [(each["at"] / 60, each["rss"][service]) for each in warm if service in each["rss"]]
        grows = slope(points)
        figures["rss"][service] = {"mb": points[-1][1], "slope_mb_per_min": grows}
        bench.say(f"{service:>42}  {points[-1][1]:6.0f}  {grows:12.2f}  {cpu[service] / took:5.2f}")
        if minutes >= 10:
            bench.expect(grows < SLOPE_MB_PER_MIN, f"soak: {service} grows by {grows:.2f} MB a minute")
    lag = max((each["lag"] for each in warm), default=0)
    figures["lag_records"] = lag
    bench.expect(
        lag < LAG_SEC * frames_per_sec, f"soak: signals lag by {lag} records, more than {LAG_SEC:g} s of the load"
    )
    for service in ("ingestion", "ofi", "cvd", "fusion", "signal"):
        p50 = [each["latency"][service]["0.5"] for each in warm if each["latency"].get(service)]
        p99 = [each["latency"][service]["0.99"] for each in warm if each["latency"].get(service)]
        figures[f"latency_{service}_ms"] = {"p50": quantile(p50, 0.5), "p99": quantile(p99, 0.5)}
        bench.say(f"receive to {service}: p50 {quantile(p50, 0.5):.0f} ms, p99 {quantile(p99, 0.5):.0f} ms")
    bench.say(f"most records behind: {lag}")
    bench.figures["soak"] = figures


def sample(stack: Stack, at: float) -> dict[str, Any]:
    statuses = {name: each.status() for name, each in stack.instances.items()}
    seqs = statuses["ingestion"].get("recorder", {}).get("seqs", {})
    frontiers = statuses["signal"].get("frontiers", {})
    return {
        "at": at,
        "rss": {name: status["rss_mb"] for name, status in statuses.items() if status},
        "lag": sum(max(0, seq - frontiers.get(str(partition), seq)) for partition, seq in seqs.items()),
        "latency": {name: status.get("latency_ms") for name, status in statuses.items()},
    }


def slope(points: list[tuple[float, float]]) -> float:
    """Of the least-squares line."""
    if len(points) < 2:
        return 0.0
    mean_x = sum(x for x, _ in points) / len(points)
    mean_y = sum(y for _, y in points) / len(points)
    spread = sum((x - mean_x) ** 2 for x, _ in points)
    return sum((x - mean_x) * (y - mean_y) for x, y in points) / spread if spread else 0.0
