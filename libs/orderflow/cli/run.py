"""`orderflow run`: broker, registry, the market's source, every service, a live view, the lake; in one command."""

from __future__ import annotations

import argparse
import asyncio
import math
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable
from contextlib import AsyncExitStack
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

from rich.console import Console
from rich.live import Live

from orderflow.cli import backing, runs, summary, view
from orderflow.cli.supervisor import Supervisor
from orderflow.config import Config, effective_fingerprint, load
from orderflow.errors import CaptureError, OrderflowError
from orderflow.registry.client import RegistryClient
from orderflow.streaming.codec import Codecs
from orderflow.streaming.init import check_prefix, codecs_for, create_topics
from orderflow.streaming.kafka_log import KafkaLog
from orderflow.topics import DERIVED, JOURNAL

FEATURES: Final = ("ofi", "cvd", "fusion", "signal")
FILES: Final = ("sinks", "lake")
VIEW_SEC: Final = 0.5
LINE_SEC: Final = 5.0
FIRST_FRAME_SEC: Final = 120.0
"""A duration that counts from the first frame counts from here at the latest."""
QUIET_SEC: Final = 2.0
"""After the simulated exchange has sent everything, silence this long means that everything was received."""


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser("run", help="run the whole pipeline", description=__doc__)
    parser.add_argument("--source", choices=("sim", "capture", "live"), default="sim", help="where frames come from")
    parser.add_argument(
        "--capture", metavar="FILE", help="a recorded file; with --source sim the simulated exchange plays it"
    )
    parser.add_argument(
        "--speed", default="1", metavar="1|N|max", help="pace of a capture or of the simulated exchange"
    )
    parser.add_argument(
        "--symbols", metavar="A,B", help="symbols (default: those of the capture, or BTCUSDT,ETHUSDT,SOLUSDT)"
    )
    parser.add_argument(
        "--duration", type=float, metavar="S", help="stop after so many seconds, the start of the services included"
    )
    parser.add_argument("--out", metavar="DIR", help="folder of the run (default: runs/<time>-<source>)")
    parser.add_argument("--resume", action="store_true", help="go on with the run that DIR holds")
    parser.add_argument("--exit-at-end", action="store_true", help="stop when the capture is drained")
    parser.add_argument("--no-view", action="store_true", help="lines instead of the live screen")
    parser.add_argument("--seed", type=int, default=1, metavar="N", help="of the synthetic market (default 1)")
    parser.add_argument(
        "--activity", type=float, metavar="X", help="events a second and symbol of the synthetic market"
    )
    parser.add_argument(
        "--predictability", type=float, metavar="P", help="0 to 1: how far its order flow foretells moves"
    )
    parser.set_defaults(duration_of_frames=False)


def run(args: argparse.Namespace) -> int:
    _check(args)
    return asyncio.run(_Run(args).run())


def _check(args: argparse.Namespace) -> None:
    if args.source == "capture" and not args.capture:
        raise OrderflowError("--source capture needs --capture FILE")
    if args.source == "live" and args.capture:
        raise OrderflowError("--capture goes with --source capture or sim, not with live")
    if args.duration is not None and not 0 < args.duration < math.inf:
        raise OrderflowError(f"--duration is {args.duration:g}: it must be a number of seconds above 0")
    if args.exit_at_end and not args.capture:
        raise OrderflowError("--exit-at-end needs --capture FILE: nothing else has an end")
    if args.resume and not args.out:
        raise OrderflowError("--resume needs --out DIR: the run to go on with")
    _pace(args.speed)


def _pace(speed: str) -> None:
    if speed == "max":
        return
    try:
        factor = float(speed)
    except ValueError:
        factor = 0.0
    if not 0.001 <= factor <= 10_000:
        raise OrderflowError(f"--speed is {speed!r}: it must be `max` or a factor from 0.001 to 10000")


def _reached(status: dict[str, Any], recorder: dict[str, Any]) -> bool:
    """Whether a service has processed all that the recorder has journalled.

    That it saw an `end` is not enough: a run that goes on has one in its middle, and a service that has just recovered
    its state from there knows of nothing behind it yet.
    """
    frontiers = status.get("frontiers", {})
    return bool(recorder.get("done")) and all(
        frontiers.get(partition, -1) >= seq for partition, seq in recorder["seqs"].items()
    )


def _daemon() -> str | None:
    """Bootstrap of a broker that `orderflow kafka up` has started."""
    from orderflow.cli.kafka import running_daemon

    return running_daemon()


def _plan_file(faults: str) -> Path | None:
    """The file that SIM_FAULTS names, seen from here: services run in another folder. None where it is a plan itself."""
    try:
        return Path(faults).resolve() if faults and Path(faults).is_file() else None
    except (OSError, ValueError):  # longer than any name may be, or with characters that no name has
        return None


def _own_name() -> str:
    """How a shell calls this program: by its path where it was called so and is not on the search path."""
    called = sys.argv[0]
    return called if Path(called).name == "orderflow" and not shutil.which("orderflow") else "orderflow"


class _Run:
    """One run from start to summary."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.started_at = datetime.now(UTC)
        self.begun = time.monotonic()
        self.out = Path(args.out or runs.runs_dir() / f"{self.started_at:%Y%m%dT%H%M%S}-{args.source}").resolve()
        self.config: Config
        self.capture_symbols: tuple[str, ...] = ()
        self.symbols: tuple[str, ...] = ()
        self.stopping = asyncio.Event()
        self.stop_reason = ""
        self.rates: dict[str, float] = {}
        self._counted: dict[str, tuple[float, int]] = {}
        self.first_feature_sec: float | None = None
        self.drained_at = 0.0
        self._last_frames: tuple[float, Any] = (self.begun, None)
        self._counted_from: float | None = None if args.duration_of_frames else self.begun
        # Paths may hold brackets, and a line that goes into a file must not be broken at 80 columns.
        self.console = Console(highlight=False, markup=False, soft_wrap=True)

    async def run(self) -> int:
        self._look_at_source()
        await self._look_at_backing()
        info = self._folder()
        async with AsyncExitStack() as stack:
            bootstrap, registry_url = await self._backing(stack, info)
            supervisor = Supervisor(self.out)
            stack.push_async_callback(supervisor.close)
            await supervisor.open()
            registry = RegistryClient(registry_url)
            stack.push_async_callback(registry.close)
            await create_topics(bootstrap, info.topic_prefix)
            codecs = await codecs_for(registry, info.topic_prefix, [JOURNAL, *DERIVED])
            log = KafkaLog(bootstrap, client_id="orderflow-run")
            await log.start()
            stack.push_async_callback(log.close)
            self._say_where(bootstrap, registry_url, info.topic_prefix)
            watcher = view.Watcher(log, codecs, info.topic_prefix)
            await watcher.open()
            stack.push_async_callback(watcher.close)
            self._catch_signals()
            await self._start_services(supervisor, bootstrap, registry_url, info)
            await self._watch(supervisor, watcher)
            await self._drain(supervisor, watcher)
            return await self._conclude(log, codecs, info, supervisor)

    def _look_at_source(self) -> None:
        args = self.args
        environment = dict(os.environ)
        asked = tuple(
            part.strip().upper() for part in (args.symbols or environment.get("SYMBOLS", "")).split(",") if part.strip()
        )
        if args.capture:
            from orderflow.capture import scan

            captured = scan(Path(args.capture))
            self.capture_symbols = tuple(captured.symbols)
            unknown = [symbol for symbol in asked if symbol not in self.capture_symbols]
            if unknown:
                raise CaptureError(
                    f"symbol {unknown[0]} is not in {args.capture}, which holds {', '.join(self.capture_symbols)}"
                )
        self.symbols = asked or self.capture_symbols or ("BTCUSDT", "ETHUSDT", "SOLUSDT")
        environment["SYMBOLS"] = ",".join(self.symbols)
        self.config = load(environment)

    async def _look_at_backing(self) -> None:
        """Before anything is written: a start that can't succeed leaves no folder behind."""
        check_prefix(os.environ.get("TOPIC_PREFIX", ""))
        if given := os.environ.get("KAFKA_BOOTSTRAP"):
            backing.check_bootstrap(given)
        if given := os.environ.get("SCHEMA_REGISTRY_URL"):
            await backing.check_registry(given)

    def _folder(self) -> runs.RunInfo:
        if self.args.resume:
            info = runs.load(self.out)
            self._check_same_settings(info)
            return info
        if self.out.exists() and not self.out.is_dir():
            raise OrderflowError(f"--out {self.out} is a file: name a folder")
        if self.out.exists() and any(self.out.iterdir()):
            raise OrderflowError(f"{self.out} is not empty: choose another --out, or go on with it by --resume")
        try:
            self.out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OrderflowError(f"--out {self.out} can't be made: {error.strerror}") from error
        run_id = f"{self.started_at:%Y%m%dT%H%M%S}{os.getpid() % 1000:03d}"
        return runs.RunInfo(
            run_id=run_id,
            source=self.args.source,
            topic_prefix=os.environ.get("TOPIC_PREFIX") or f"run.{run_id}.",
            bootstrap="",
            registry_url="",
            embedded_kafka=False,
            embedded_registry=False,
            environment=self._result_environment(),
            config_fingerprint=effective_fingerprint(self.config),
        )

    def _check_same_settings(self, info: runs.RunInfo) -> None:
        """A run keeps the settings it began with: half of it under others would be no one's results."""
        for name, value in self._result_environment().items():
            if info.environment.get(name, "") != value:
                before = repr(info.environment[name]) if name in info.environment else "not set"
                raise OrderflowError(
                    f"{name} is {value!r}, and was {before} when the run in {self.out} began: set it as it was, or "
                    "start another run"
                )

    def _result_environment(self) -> dict[str, str]:
        """The settings of the environment that results depend on, so that `verify` computes with the same."""
        from orderflow.config import ENVIRONMENT

        kept = {"ORDERFLOW_PRESET", "ORDERFLOW_CONFIG"} | {
            name for name, (section, _) in ENVIRONMENT.items() if section not in ("runtime", "ingestion")
        }
        found = {name: os.environ[name] for name in sorted(kept) if name in os.environ}
        if found.get("ORDERFLOW_CONFIG"):
            # Services run in another folder, and a later verification may run in any.
            found["ORDERFLOW_CONFIG"] = str(Path(found["ORDERFLOW_CONFIG"]).resolve())
        return found

    async def _backing(self, stack: AsyncExitStack, info: runs.RunInfo) -> tuple[str, str]:
        given = os.environ.get("KAFKA_BOOTSTRAP")
        outside = given or (None if info.embedded_kafka else _daemon())
        if outside:
            info.bootstrap = outside
        else:
            info.bootstrap = await backing.ensure_kafka(stack, self.out / "kafka", info.bootstrap)
            info.embedded_kafka = True
        registry_given = os.environ.get("SCHEMA_REGISTRY_URL")
        if registry_given:
            info.registry_url = registry_given
        else:
            info.registry_url = await backing.ensure_registry(stack, self.out / "registry", info.registry_url)
            info.embedded_registry = True
        runs.save(self.out, info)
        runs.note_latest(self.out)
        return info.bootstrap, info.registry_url

    def _say_where(self, bootstrap: str, registry_url: str, prefix: str) -> None:
        self.console.print(f"run {self.out}")
        self.console.print(
            f"broker {bootstrap}   registry {registry_url}   topics {prefix}*   symbols {','.join(self.symbols)}"
        )

    def _catch_signals(self) -> None:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self._ask_to_stop, number)

    def _ask_to_stop(self, number: signal.Signals) -> None:
        if self.stopping.is_set():
            return
        self.stop_reason = "interrupted" if number == signal.SIGINT else "terminated"
        self.stopping.set()

    async def _start_services(
        self, supervisor: Supervisor, bootstrap: str, registry_url: str, info: runs.RunInfo
    ) -> None:
        args = self.args
        environment = {
            "KAFKA_BOOTSTRAP": bootstrap,
            "SCHEMA_REGISTRY_URL": registry_url,
            "TOPIC_PREFIX": info.topic_prefix,
            "DATA_DIR": str(self.out),
            "METRICS_PORT": "0",
            "SYMBOLS": ",".join(self.symbols),
            "SOURCE": args.source,
            "SPEED": args.speed,
            **info.environment,
        }
        if args.capture:
            environment["CAPTURE"] = str(Path(args.capture).resolve())
        for name in (*FILES[::-1], *FEATURES[::-1]):
            supervisor.add(name, [sys.executable, "-m", f"services.{name}"], environment)
        if args.source == "sim":
            port = backing.free_port(int(os.environ.get("SIM_PORT", "0")))
            supervisor.add("simexchange", self._sim_command(port), environment)
            environment = {**environment, "WSS_URL": f"ws://127.0.0.1:{port}", "REST_URL": f"http://127.0.0.1:{port}"}
            await supervisor.wait_until(
                lambda: backing.answers(f"127.0.0.1:{port}"), "the simulated exchange", lambda: 0, stall_sec=30.0
            )
        supervisor.add("ingestion", [sys.executable, "-m", "services.ingestion"], environment)

    def _sim_command(self, port: int) -> list[str]:
        args = self.args
        command = [sys.executable, "-m", "services.simexchange", "--port", str(port), "--speed", args.speed]
        command += ["--symbols", ",".join(self.symbols), "--seed", str(args.seed)]
        if args.capture:
            command += ["--source", "capture", "--capture", str(Path(args.capture).resolve())]
        else:
            command += ["--source", "synthetic"]
        if args.activity is not None:
            command += ["--activity", str(args.activity)]
        if args.predictability is not None:
            command += ["--predictability", str(args.predictability)]
        if plan := _plan_file(os.environ.get("SIM_FAULTS", "")):
            command += ["--faults", str(plan)]
        return command

    async def _watch(self, supervisor: Supervisor, watcher: view.Watcher) -> None:
        """Until the duration is over, the capture is drained, or somebody asks to stop."""
        live: Live | None = None
        if self.console.is_terminal and not self.args.no_view:
            live = Live(console=self.console, refresh_per_second=4, transient=False)
            live.start()
        next_line = self.begun + 1.0
        try:
            while not self.stopping.is_set():
                supervisor.revive()
                await asyncio.gather(supervisor.ask(), watcher.look())
                now = time.monotonic()
                self._update(supervisor, watcher, now)
                if live is not None:
                    live.update(
                        view.screen(
                            f"{now - self.begun:.0f} s   Ctrl-C drains and stops", supervisor, watcher, self.rates
                        )
                    )
                elif now >= next_line:
                    self.console.print(view.plain_line(now - self.begun, supervisor, watcher, self.rates))
                    next_line = now + LINE_SEC
                if self._over(supervisor, now):
                    return
                try:
                    await asyncio.wait_for(self.stopping.wait(), VIEW_SEC)
                except TimeoutError:
                    pass
        finally:
            if live is not None:
                live.stop()

    def _update(self, supervisor: Supervisor, watcher: view.Watcher, now: float) -> None:
        if watcher.first_feature_at and self.first_feature_sec is None:
            self._note_first_feature(watcher)
        for name, child in supervisor.children.items():
            count = child.status.get("records_in")
            if count is None:
                continue
            at, before = self._counted.get(name, (self.begun, 0))
            if now - at >= VIEW_SEC:
                self.rates[name] = max(0.0, (count - before) / (now - at))
                self._counted[name] = (now, count)

    def _note_first_feature(self, watcher: view.Watcher) -> None:
        self.first_feature_sec = watcher.first_feature_at - self.begun
        if not self.console.is_terminal or self.args.no_view:
            self.console.print(f"first feature row after {self.first_feature_sec:.1f} s")

    def _over(self, supervisor: Supervisor, now: float) -> bool:
        if self._counted_from is None:
            self._counted_from = self._first_frame(supervisor, now)
        elif self.args.duration is not None and now - self._counted_from >= self.args.duration:
            self.stop_reason = "duration"
            return True
        if self.args.exit_at_end and self._source_done(supervisor):
            self.stop_reason = "end of the capture"
            return True
        return False

    def _first_frame(self, supervisor: Supervisor, now: float) -> float | None:
        """When the first frame came, to a look; the latest moment to wait for where none comes."""
        recorder = supervisor.children["ingestion"].status.get("recorder", {})
        came = any(recorder.get("frames_by_route", {}).values())
        return now if came or now - self.begun >= FIRST_FRAME_SEC else None

    def _source_done(self, supervisor: Supervisor) -> bool:
        recorder = supervisor.children["ingestion"].status.get("recorder", {})
        if self.args.source == "capture":
            return bool(recorder.get("done"))
        if not (supervisor.children["simexchange"].status or {}).get("done"):
            return False
        # Sent is not yet received: the source is done once nothing more has come for a while and nothing waits.
        frames = (dict(recorder.get("frames_by_route", {})), recorder.get("queue_depth", 0))
        now = time.monotonic()
        if frames != self._last_frames[1] or frames[1]:
            self._last_frames = (now, frames)
        return now - self._last_frames[0] > QUIET_SEC

    async def _drain(self, supervisor: Supervisor, watcher: view.Watcher) -> None:
        """Source first, then each service once it has processed the end, files last."""
        self.console.print(f"draining ({self.stop_reason})")

        def positions() -> Any:
            return [
                (name, child.status.get("records_in"), child.restarts) for name, child in supervisor.children.items()
            ]

        asked: set[int] = set()
        looking = asyncio.create_task(self._await_first_feature(watcher))
        try:
            for name in ("ingestion", *FEATURES, *FILES):
                await supervisor.wait_until(self._drained(supervisor, name, asked), f"{name} to drain", positions)
        finally:
            looking.cancel()
            await asyncio.gather(looking, return_exceptions=True)
        self.drained_at = time.time()
        names = ["ingestion", *FEATURES, *FILES]
        await supervisor.stop([*names, *(["simexchange"] if "simexchange" in supervisor.children else [])])

    async def _await_first_feature(self, watcher: view.Watcher) -> None:
        """A short capture is read before its first row is computed: that still has its time."""
        while self.first_feature_sec is None:
            await watcher.look()
            if watcher.first_feature_at:
                self._note_first_feature(watcher)
            else:
                await asyncio.sleep(0.1)

    def _drained(self, supervisor: Supervisor, name: str, asked: set[int]) -> Callable[[], bool]:
        def check() -> bool:
            ingestion = supervisor.children["ingestion"]
            # Only a recorder whose page answers takes the signal; one that was restarted has not heard it yet.
            if (
                ingestion.running
                and ingestion.process is not None
                and ingestion.process.pid not in asked
                and ingestion.status
            ):
                supervisor.signal("ingestion", signal.SIGUSR1)
                asked.add(ingestion.process.pid)
            status = supervisor.children[name].status
            return bool(status.get("drained")) and _reached(status, ingestion.status.get("recorder", {}))

        return check

    async def _conclude(self, log: KafkaLog, codecs: Codecs, info: runs.RunInfo, supervisor: Supervisor) -> int:
        elapsed = time.monotonic() - self.begun
        topics = await summary.topic_counts(log, codecs, info.topic_prefix)
        lake = summary.lake_counts(self.out)
        signals = summary.signal_counts(self.out, self.config.sinks.chosen)
        wrong = summary.disagreements(topics, lake, signals)
        children = supervisor.children
        recorder = children["ingestion"].status.get("recorder", {})
        frames = topics["journal"].get("frame", 0) + topics["journal"].get("snapshot", 0)
        pipeline_sec = max(1e-3, self.drained_at - (topics["first_stamp_ms"] or 0) / 1000)
        content = {
            "run": info.run_id,
            "source": info.source,
            "stopped_by": self.stop_reason,
            "started_at": self.started_at.isoformat(),
            "seconds": round(elapsed, 3),
            "config_fingerprint": effective_fingerprint(self.config),
            "symbols": list(self.symbols),
            "frames": frames,
            "pipeline_sec": round(pipeline_sec, 3),
            "frames_per_sec": round(frames / pipeline_sec, 1),
            "first_feature_sec": None if self.first_feature_sec is None else round(self.first_feature_sec, 3),
            "rows_by_source": topics["rows"],
            "features": sum(topics["topics"][name] for name in ("features.ofi", "features.cvd", "features.fusion")),
            "signals": topics["topics"]["signals"],
            "signals_confirmed": topics["confirmed"],
            "signals_in_files": signals,
            "rejects": topics["rejects"],
            "events": topics["events"],
            "gaps": topics["events"].get("gap", 0),
            "resyncs": topics["resyncs"],
            "journal_by_kind": topics["journal"],
            "topics": topics["topics"],
            "lake": lake,
            "lake_agrees": not wrong,
            "lake_disagreements": wrong,
            "restarts": {name: {"count": child.restarts, "causes": child.words} for name, child in children.items()},
            "rss_mb": {name: child.status.get("rss_mb") for name, child in children.items() if child.status},
            "cpu_sec": {name: child.status.get("cpu_sec") for name, child in children.items() if child.status},
            "latency_ms": {
                name: child.status.get("latency_ms", {}) for name, child in children.items() if child.status
            },
            "recorder": recorder,
        }
        path = summary.write(self.out, content)
        self._print_summary(content, path)
        return 0 if not wrong else 1

    def _print_summary(self, content: dict[str, Any], path: Path) -> None:
        say = self.console.print
        rows = content["rows_by_source"]
        say(
            f"{content['frames']:,} frames in {content['pipeline_sec']:.1f} s, from the first one journalled to the last one in "
            f"the lake ({content['frames_per_sec']:,.0f}/s)"
        )
        say(
            f"{rows.get('aggTrade', 0):,} trades, {rows.get('bookTicker', 0):,} quotes, {rows.get('depth', 0):,} depth rows, "
            f"{content['features']:,} feature rows, {content['signals']:,} signals ({content['signals_confirmed']:,} confirmed)"
        )
        say(
            f"gaps {content['gaps']}, resyncs {content['resyncs']}, rejects {sum(content['rejects'].values())}, "
            f"restarts {sum(each['count'] for each in content['restarts'].values())}"
        )
        for name, restart in content["restarts"].items():
            if restart["count"]:
                say(f"  {name} was restarted {restart['count']} times: {', '.join(restart['causes'])}")
        for wrong in content["lake_disagreements"]:
            say(f"THE LAKE DISAGREES: {wrong}", style="red")
        say(
            f"lake {self.out / 'data' / 'ofi_cvd'}   ({content['lake']['files']} files, {content['lake']['bytes']:,} bytes)"
        )
        say(f"summary {path}")
        say(f'ask it: {_own_name()} lake sql "SELECT symbol, count(*), sum(ofi_l1) FROM ofi GROUP BY symbol"')
