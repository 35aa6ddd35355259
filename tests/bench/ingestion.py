"""`python -m tests.bench.ingestion`: 200 symbols at 5,000 frames a second through the real ingestion service.

The simulated exchange (its own process, real sockets and REST) plays a synthetic market; the ingestion service (recorder
and normaliser) writes to the embedded Kafka. Then the market is computed once more from its seed, and every journalled
frame is held against it, byte for byte and stream by stream.

Exit status 1 where a check fails:

- *no loss*: of every stream, what is journalled is one unbroken stretch of what the market said, from when everything
  was subscribed to when the stop was asked for; nothing dropped, conflated, reconnected, no gap, no reject, no resync;
  each journalled trade and quote is a row, and every book is synced at the end;
- *bounded*: the queue stays below its bound, the normaliser keeps up, the resident memory of ingestion stays below 200 MB
  and does not grow;
- *valid*: the exchange kept its own pace, and sent what was asked of it.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import sys
import tempfile
import time
from array import array
from bisect import bisect_left
from collections import Counter
from contextlib import AsyncExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import psutil
from orderflow.cli import backing
from orderflow.cli.supervisor import Supervisor
from orderflow.pipeline import ROW_SOURCES
from orderflow.registry.client import RegistryClient
from orderflow.streaming.codec import Codecs, peek
from orderflow.streaming.init import codecs_for, create_topics
from orderflow.streaming.kafka_log import KafkaLog
from orderflow.streaming.log import TP
from orderflow.topics import DERIVED, EVENTS, JOURNAL, PARTITIONS, REJECTS, ROWS
from orderflow.venues.binance.sim.market import SyntheticConfig, SyntheticMarket
from orderflow.venues.binance.sim.specs import symbol_names
from orderflow.venues.binance.streams import MARKET_STREAMS, PUBLIC_STREAMS, parse_stream
from orderflow.verify import canonical
from rich.console import Console
from rich.table import Table

from tests.bench.data import ROOT

SUBSCRIBED = (*PUBLIC_STREAMS, *MARKET_STREAMS)
SEED = 1
SAMPLE_SEC = 1.0
WARM_SEC = 60.0
"""From the start of ingestion: 200 books need two minutes of REST weight, but memory and rate are steady by then."""
SUBSCRIBE_SEC = 120.0
SYNC_SEC = 240.0
_STREAM_MARK = b'{"stream":"'
SETTLE_SEC = 120
"""Every symbol opens in the normal regime, and that is livelier than the mean of all."""
TAIL_MS = 2_000
"""What the exchange sent so shortly before the stop may have been under way."""
RSS_MOST_MB = 200.0
RSS_GROWTH_MOST_MB = 10.0
"""Medians of the last against the second quarter of the steady time."""
LAG_MOST_SEC = 5.0
RATE_TOLERANCE = 0.1


@dataclass
class Sample:
    """One look at everything, `at_sec` after ingestion was started."""

    at_sec: float
    frames: int
    queue_frames: int
    lag_records: int
    rss_mb: float
    sim_lag_ms: int
    cpu_sec: dict[str, float]


@dataclass
class Outcome:
    figures: dict[str, Any] = field(default_factory=dict)
    wrong: list[str] = field(default_factory=list)

    def expect(self, holds: bool, text: str) -> None:
        if not holds:
            self.wrong.append(text)


def activity_for(rate: float, symbols: int) -> float:
    """Quotes a second and symbol with which so many symbols send `rate` frames a second on the subscribed streams.

    Raises
    ------
    ValueError
        So few that depth frames alone would be more, or more than a symbol can be asked for.
    """
    names = symbol_names(symbols)[:60]
    low, high = 0.01, 50_000.0
    activity = min(high, rate / symbols / 2)
    for _ in range(6):
        market = SyntheticMarket(SEED, names, config=SyntheticConfig(activity=activity))
        seconds = int(min(300, 200_000 / (activity * len(names) + 100)) + 30)
        market.advance(market.now_ms + min(SETTLE_SEC, seconds) * 1_000)
        frames = market.advance(market.now_ms + seconds * 1_000)
        found = sum(stream.partition("@")[2] in SUBSCRIBED for stream, _, _ in frames) / seconds / len(names)
        if abs(found * symbols / rate - 1) < RATE_TOLERANCE / 4:
            break
        activity = min(high, max(low, activity * (rate / symbols / found) ** 1.3))
    if not low < activity < high:
        raise ValueError(f"{rate:g} frames/s of {symbols} symbols can't be had: change --rate or --symbols")
    return round(activity, 3)


class Bench:
    """One run: processes up, samples, drain, judgement."""

    def __init__(self, args: argparse.Namespace, out: Path, console: Console) -> None:
        self.args = args
        self.out = out
        self.console = console
        self.symbols = symbol_names(args.symbols)
        self.streams = len(self.symbols) * len(SUBSCRIBED)
        self.prefix = f"bench.{os.getpid()}."
        self.samples: list[Sample] = []
        self.outcome = Outcome()
        self.subscribed_ms = self.stopped_ms = 0
        self.sim: dict[str, Any] = {}
        self.ingestion: dict[str, Any] = {}

    async def run(self) -> Outcome:
        activity = await asyncio.to_thread(activity_for, self.args.rate, self.args.symbols)
        self.console.print(f"{self.args.symbols} symbols, activity {activity:g}, folder {self.out}")
        async with AsyncExitStack() as stack:
            bootstrap = await backing.ensure_kafka(stack, self.out / "kafka")
            registry_url = await backing.ensure_registry(stack, self.out / "registry")
            registry = RegistryClient(registry_url)
            stack.push_async_callback(registry.close)
            await create_topics(bootstrap, self.prefix)
            codecs = await codecs_for(registry, self.prefix, [JOURNAL, *DERIVED])
            supervisor = Supervisor(self.out)
            stack.push_async_callback(supervisor.close)
            await supervisor.open()
            await self._start(supervisor, bootstrap, registry_url, activity)
            await self._measure(supervisor)
            await self._stop(supervisor)
            log = KafkaLog(bootstrap, client_id="bench-ingestion")
            await log.start()
            stack.push_async_callback(log.close)
            await self._judge(log, codecs)
        return self.outcome

    async def _start(self, supervisor: Supervisor, bootstrap: str, registry_url: str, activity: float) -> None:
        port = backing.free_port()
        environment = {
            "KAFKA_BOOTSTRAP": bootstrap,
            "SCHEMA_REGISTRY_URL": registry_url,
            "TOPIC_PREFIX": self.prefix,
            "DATA_DIR": str(self.out),
            "METRICS_PORT": "0",
            "SYMBOLS": ",".join(self.symbols),
            "SOURCE": "sim",
            "SPEED": "1",
            "WSS_URL": f"ws://127.0.0.1:{port}",
            "REST_URL": f"http://127.0.0.1:{port}",
        }
        command = [sys.executable, "-m", "services.simexchange", "--port", str(port), "--source", "synthetic"]
        command += ["--symbols", ",".join(self.symbols), "--seed", str(SEED), "--activity", str(activity)]
        supervisor.add("simexchange", command, environment)
        await supervisor.wait_until(
            lambda: backing.answers(f"127.0.0.1:{port}"), "the simulated exchange", lambda: 0, stall_sec=60.0
        )
        supervisor.add("ingestion", [sys.executable, "-m", "services.ingestion"], environment)

    async def _measure(self, supervisor: Supervisor) -> None:
        """Samples until the time is over; ends early where a process dies."""
        begun = time.monotonic()
        until = begun + self.args.minutes * 60
        shown = begun
        while (now := time.monotonic()) < until:
            for name, child in supervisor.children.items():
                if not child.running:
                    raise RuntimeError(f"{name} has ended; its last words:\n{child.last_words()}")
            await supervisor.ask()
            self._look(supervisor, now - begun)
            if now - shown >= 15.0 and self.samples:
                shown = now
                last = self.samples[-1]
                self.console.print(
                    f"{last.at_sec:4.0f} s  {last.frames:,} frames  queue {last.queue_frames}  lag {last.lag_records:,}"
                    f"  RSS {last.rss_mb:.0f} MB  load {os.getloadavg()[0]:.1f}"
                )
            await asyncio.sleep(SAMPLE_SEC)

    def _look(self, supervisor: Supervisor, at_sec: float) -> None:
        sim = supervisor.children["simexchange"].status
        status = supervisor.children["ingestion"].status
        if not sim or not status or "recorder" not in status:
            return
        if not self.subscribed_ms and sim["subscriptions"] >= self.streams:
            self.subscribed_ms = _exchange_ms()
        recorder = status["recorder"]
        frontiers = status["frontiers"]
        self.samples.append(
            Sample(
                at_sec,
                sum(recorder["frames_by_route"].values()),
                recorder["queue_depth"],
                sum(max(0, seq - frontiers.get(partition, 0)) for partition, seq in recorder["seqs"].items()),
                status["rss_mb"],
                sim["synthetic"]["lag_ms"],
                _cpu_by_process(supervisor),
            )
        )

    async def _stop(self, supervisor: Supervisor) -> None:
        """The recorder journals the end, the normaliser takes what is left; then both are asked for the last time."""
        self.stopped_ms = _exchange_ms()
        await supervisor.ask()
        self.sim = supervisor.children["simexchange"].status
        child = supervisor.children["ingestion"]
        supervisor.signal("ingestion", signal.SIGUSR1)
        await supervisor.wait_until(
            lambda: bool(child.status.get("drained")), "ingestion to drain", lambda: child.status.get("records_in")
        )
        self.ingestion = child.status
        await supervisor.stop(["ingestion", "simexchange"])

    # Judgement

    async def _judge(self, log: KafkaLog, codecs: Codecs) -> None:
        figures = self.outcome.figures
        self._judge_load()
        recorder = self.ingestion["recorder"]
        figures["recorder"] = {
            name: recorder.get(name)
            for name in ("queue_most", "dropped", "conflated", "oversize", "reconnects", "ticks_skipped", "late_ticks")
        }
        for name in ("dropped", "conflated", "oversize", "reconnects", "ticks_skipped"):
            self.outcome.expect(not recorder.get(name), f"the recorder counts {name}: {recorder.get(name)}")
        self.console.print("reading the journal")
        journalled, kinds = await self._journalled(log, codecs)
        figures["journal_by_kind"] = dict(kinds)
        self.outcome.expect(not kinds["gap"], f"{kinds['gap']} gaps are journalled")
        self.console.print("computing the market once more")
        await asyncio.to_thread(self._hold_against_the_market, journalled)
        await self._judge_rows(log, codecs, journalled)

    async def _journalled(self, log: KafkaLog, codecs: Codecs) -> tuple[dict[str, array[int]], Counter[str]]:
        """Hashes of the frames of each stream in the journal's order, and records by kind."""
        decode = codecs.decoder(JOURNAL)
        frames: dict[str, array[int]] = {}
        kinds: Counter[str] = Counter(gap=0)
        for partition in range(PARTITIONS):
            async for chunk in canonical(log, TP(self.prefix + JOURNAL, partition), journal=True):
                for _, _, record in chunk:
                    content = decode(record.value or b"")
                    kinds[content["kind"]] += 1
                    if content["kind"] == "frame":
                        payload = bytes(content["payload"])
                        if not payload.startswith(_STREAM_MARK):
                            kinds["reply"] += 1
                            continue
                        frames.setdefault(stream_of(payload), array("q")).append(hash(payload))
        return frames, kinds

    def _hold_against_the_market(self, journalled: dict[str, array[int]]) -> None:
        """No loss: every stream's frames are an unbroken stretch of the market's, over the whole time that counts."""
        source = self.sim["synthetic"]
        market = SyntheticMarket(
            SEED, self.symbols, start_ms=source["start_ms"], config=SyntheticConfig(activity=source["activity"])
        )
        truth: dict[str, tuple[array[int], array[int]]] = {}
        end_ms = self.stopped_ms + 10_000
        while market.now_ms < end_ms:
            for stream, payload, event_ms in market.advance(min(end_ms, market.now_ms + 1_000)):
                if stream in journalled or stream.partition("@")[2] in SUBSCRIBED:
                    hashes, times = truth.setdefault(stream, (array("q"), array("q")))
                    hashes.append(hash(payload))
                    times.append(event_ms)
        lost = foreign = due = 0
        for stream, (hashes, times) in truth.items():
            begin = bisect_left(times, self.subscribed_ms)
            end = bisect_left(times, self.stopped_ms - TAIL_MS)
            found = journalled.get(stream, array("q"))
            due += end - begin
            if not len(found):
                lost += end - begin
                continue
            first = hashes.index(found[0]) if found[0] in hashes else 0
            if hashes[first : first + len(found)] != found:
                foreign += 1
                lost += sum((Counter(hashes[begin:end]) - Counter(found)).values())
            elif stream.partition("@")[2] in SUBSCRIBED:
                lost += max(0, first - begin) + max(0, end - first - len(found))
        journal_frames = sum(len(each) for each in journalled.values())
        self.outcome.figures |= {"frames": journal_frames, "frames_due": due, "frames_lost": lost}
        self.outcome.expect(not lost, f"{lost} of {due:,} frames are not in the journal")
        self.outcome.expect(not foreign, f"{foreign} streams are no unbroken stretch of what was sent")
        self.outcome.expect(set(journalled) <= set(truth), "frames of streams that the market has not sent")
        self.outcome.figures["frames_sent_until_stop"] = sum(self.sim["frames_sent"].values())

    async def _judge_rows(self, log: KafkaLog, codecs: Codecs, journalled: dict[str, array[int]]) -> None:
        rows: Counter[str] = Counter()
        events: Counter[str] = Counter()
        rejects: Counter[str] = Counter()
        synced: Counter[str] = Counter()
        decoders = {topic: codecs.decoder(topic) for topic in (EVENTS, REJECTS)}
        for partition in range(PARTITIONS):
            async for chunk in canonical(log, TP(self.prefix + ROWS, partition)):
                rows.update(ROW_SOURCES[peek(record.value or b"")[2]] for _, _, record in chunk)
            async for chunk in canonical(log, TP(self.prefix + EVENTS, partition)):
                for _, _, record in chunk:
                    event = decoders[EVENTS](record.value or b"")
                    events[event["event_type"]] += 1
                    if event["event_type"] == "book_synced":
                        synced[event["symbol"]] += 1
            async for chunk in canonical(log, TP(self.prefix + REJECTS, partition)):
                rejects.update(decoders[REJECTS](record.value or b"")["reason"] for _, _, record in chunk)
        frames: Counter[str] = Counter()
        for stream, found in journalled.items():
            frames[parse_stream(stream).kind] += len(found)
        resyncs = sum(synced.values()) - len(synced)
        self.outcome.figures |= {
            "rows": dict(rows),
            "frames_by_kind": dict(frames),
            "events": dict(events.most_common()),
            "rejects": dict(rejects),
            "books_synced": len(synced),
            "resyncs": resyncs,
        }
        for kind in ("aggTrade", "bookTicker"):
            # Depth frames from before a book's first snapshot are no rows.
            text = f"{frames[kind]:,} frames of {kind} are journalled, and {rows[kind]:,} are rows"
            self.outcome.expect(rows[kind] == frames[kind], text)
        self.outcome.expect(not rejects, f"rejects: {dict(rejects)}")
        self.outcome.expect(not resyncs, f"{resyncs} books were synced more than once")
        long_enough = self.args.minutes * 60 >= SYNC_SEC
        if long_enough:
            self.outcome.expect(
                len(synced) == len(self.symbols), f"{len(synced)} of {len(self.symbols)} books are synced"
            )

    def _judge_load(self) -> None:
        steady = [each for each in self.samples if each.at_sec >= min(WARM_SEC, self.args.minutes * 30)]
        if len(steady) < 8:
            raise RuntimeError(f"{len(steady)} samples after the start: give it more --minutes")
        if not self.subscribed_ms:
            raise RuntimeError(f"{self.sim['subscriptions']} streams were subscribed, {self.streams} are needed")
        first, last = steady[0], steady[-1]
        span_sec = last.at_sec - first.at_sec
        rate = (last.frames - first.frames) / span_sec
        quarter = len(steady) // 4
        growth_mb = median(each.rss_mb for each in steady[-quarter:]) - median(
            each.rss_mb for each in steady[quarter : 2 * quarter]
        )
        settled = steady[len(steady) // 2 :]  # by then every book is there
        slope = float(np.polyfit([each.at_sec / 60 for each in settled], [each.rss_mb for each in settled], 1)[0])
        lag_sec = [each.lag_records / rate for each in steady]
        figures = {
            "seconds_steady": round(span_sec, 1),
            "frames_per_sec": round(rate, 1),
            "queue_frames": _spread([each.queue_frames for each in steady]),
            "normaliser_lag_records": _spread([each.lag_records for each in steady]),
            "rss_mb": _spread([each.rss_mb for each in self.samples]),
            "rss_growth_mb": round(growth_mb, 2),
            "rss_slope_mb_per_min": round(slope, 3),
            "cpu_percent": {
                name: round(100 * (last.cpu_sec[name] - first.cpu_sec.get(name, 0.0)) / span_sec, 1)
                for name in last.cpu_sec
            },
            "exchange_lag_ms": _spread([each.sim_lag_ms for each in steady]),
            "load_average": round(os.getloadavg()[0], 1),
        }
        self.outcome.figures |= figures
        expect = self.outcome.expect
        bound = self.ingestion["recorder"].get("queue_bound_frames") or self.ingestion["recorder"].get("queue_bound")
        most = max(each.queue_frames for each in self.samples)
        expect(bound is None or most < bound, f"the queue has reached its bound: {most} of {bound}")
        expect(max(each.rss_mb for each in self.samples) < RSS_MOST_MB, f"RSS beyond {RSS_MOST_MB:g} MB")
        expect(growth_mb < RSS_GROWTH_MOST_MB, f"RSS has grown by {growth_mb:.1f} MB between steady quarters")
        expect(
            median(lag_sec[-quarter:]) < LAG_MOST_SEC,
            f"the normaliser is {median(lag_sec[-quarter:]):.1f} s behind in the last quarter",
        )
        expect(
            abs(rate / self.args.rate - 1) < RATE_TOLERANCE,
            f"NOT VALID: {rate:,.0f} frames/s, {self.args.rate:,.0f} were asked for",
        )
        expect(last.sim_lag_ms < 1_000, f"NOT VALID: the exchange is {last.sim_lag_ms} ms behind its own market")


def _spread(values: list[Any]) -> dict[str, float]:
    ordered = sorted(values)
    return {
        "p50": median(ordered),
        "p99": ordered[min(len(ordered) - 1, len(ordered) * 99 // 100)],
        "most": ordered[-1],
    }


def _exchange_ms() -> int:
    """The exchange's clock, which at speed 1 is that of this machine."""
    return time.time_ns() // 1_000_000


def stream_of(payload: bytes) -> str:
    """The stream that a combined-stream frame names."""
    begin = len(_STREAM_MARK)
    return payload[begin : payload.index(b'"', begin)].decode()


def _cpu_by_process(supervisor: Supervisor) -> dict[str, float]:
    """Processor seconds since the start: the services by name, the broker, the registry, and this bench."""
    names = {
        child.process.pid: name
        for name, child in supervisor.children.items()
        if child.process is not None and child.running
    }
    own = psutil.Process()
    found = {"bench": sum(own.cpu_times()[:2])}
    for process in own.children(recursive=True):
        try:
            name = names.get(process.pid) or ("kafka" if "java" in process.name() else "registry")
            found[name] = found.get(name, 0.0) + sum(process.cpu_times()[:2])
        except psutil.NoSuchProcess:
            continue
    return found


def _print_figures(console: Console, outcome: Outcome) -> None:
    table = Table(box=None, header_style="bold")
    table.add_column("figure")
    table.add_column("value")
    for name, value in outcome.figures.items():
        text = "  ".join(f"{key} {each:,}" for key, each in value.items()) if isinstance(value, dict) else f"{value:,}"
        table.add_row(name, text)
    console.print(table)
    for line in outcome.wrong:
        console.print(f"WRONG {line}")
    console.print("all checks hold" if not outcome.wrong else f"{len(outcome.wrong)} checks fail")


def main() -> int:
    args = _arguments()
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 140)
    with tempfile.TemporaryDirectory(prefix="orderflow-bench-") as folder:
        bench = Bench(args, Path(folder), console)
        try:
            outcome = asyncio.run(bench.run())
        except (RuntimeError, OSError, ValueError) as error:
            console.print(f"the measurement could not be made: {error}")
            return 2
    _print_figures(console, outcome)
    content = {
        "asked": {"symbols": args.symbols, "rate": args.rate, "minutes": args.minutes},
        "cores": os.cpu_count(),
        **asdict(outcome),
        "samples": [asdict(each) for each in bench.samples],
    }
    args.json.parent.mkdir(parents=True, exist_ok=True)
    args.json.write_text(json.dumps(content, indent=1) + "\n", "utf-8")
    console.print(f"written to {args.json}")
    return 1 if outcome.wrong else 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.ingestion", description=__doc__.partition("\n")[0])
    parser.add_argument("--symbols", type=int, default=200, metavar="N", help="of the market (default 200)")
    parser.add_argument("--rate", type=float, default=5_000.0, metavar="X", help="frames a second (default 5000)")
    parser.add_argument("--minutes", type=float, default=5.0, metavar="M", help="how long (default 5)")
    parser.add_argument(
        "--json",
        type=Path,
        default=ROOT / "runs" / "ingestion.json",
        metavar="PATH",
        help="where the figures go (default runs/ingestion.json)",
    )
    args = parser.parse_args()
    if not 1 <= args.symbols <= 500 or args.minutes < 0.5 or args.rate <= 0:
        parser.error("--symbols must lie between 1 and 500, --minutes be at least 0.5, and --rate be above 0")
    return args


if __name__ == "__main__":
    sys.exit(main())
