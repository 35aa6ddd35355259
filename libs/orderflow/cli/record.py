"""`orderflow record`: a session of the exchange, or the journal of a run, as a capture.

Straight from the sockets it needs no Kafka. A snapshot of each book is asked for at the start and again after every gap,
so that the file can be checked and replayed by itself. Until it is complete it is called FILE.part, a readable capture
up to its last second whatever happens. Ctrl-C ends in order.
"""

from __future__ import annotations

import argparse
import asyncio
import math
import os
import signal
import sys
import tempfile
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any, Final

from orderflow.capture import CaptureWriter
from orderflow.cli import backing
from orderflow.cli.common import reach
from orderflow.cli.recording import PREFIX, FileJournal, FileSeries, local_codecs
from orderflow.cli.supervisor import Supervisor
from orderflow.config import Config, load
from orderflow.errors import OrderflowError
from orderflow.ingest.export import Exported, export
from orderflow.ingest.system import system_outside
from orderflow.ingest.websocket_recorder import WebsocketRecorder
from orderflow.streaming.memory_log import MemoryLog
from orderflow.topics import JOURNAL

LINE_SEC: Final = 5.0
SIM_START_SEC: Final = 30.0
MIN_ROTATE_SEC: Final = 10.0
MB: Final = 1_000_000


def add_parser(subparsers: Any) -> None:
    """Add `record` to the command line."""
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "record", help="record a session, or export a run, as a capture", description=__doc__
    )
    parser.add_argument("--out", metavar="FILE", type=Path, required=True, help="a name in .gz is compressed")
    live = parser.add_argument_group("from sockets")
    live.add_argument("--source", choices=("live", "sim"), help="the exchange, or a simulated one (default: live)")
    live.add_argument("--symbols", metavar="A,B", help="symbols (default: SYMBOLS, or BTCUSDT,ETHUSDT)")
    live.add_argument("--duration", type=float, metavar="S", help="stop after so many seconds (default: at Ctrl-C)")
    live.add_argument("--ws-url", metavar="URL", help="another exchange's sockets (default: WSS_URL, or Binance)")
    live.add_argument("--rest-url", metavar="URL", help="another exchange's REST (default: REST_URL, or Binance)")
    live.add_argument(
        "--rotate-sec", type=float, metavar="S", help="a file every so many seconds, its time in its name"
    )
    live.add_argument("--rotate-mb", type=float, metavar="N", help="a file every so many megabytes on disk, likewise")
    run_ = parser.add_argument_group("from a run")
    run_.add_argument(
        "--run", nargs="?", const="", metavar="DIR", help="export a run's journal (without DIR: the newest run's)"
    )
    run_.add_argument(
        "--prefix", "--topic-prefix", metavar="P", help="export the journal under this prefix (with KAFKA_BOOTSTRAP)"
    )


def run(args: argparse.Namespace) -> int:
    """Record until the end, or export.

    Raises
    ------
    OrderflowError
        An option is wrong; nothing was received; the disk or the exchange refused.
    """
    if args.run is not None or args.prefix is not None:
        _check_export(args)
        return asyncio.run(_export(args))
    _check_session(args)
    return asyncio.run(_Session(args).run())


def _check_export(args: argparse.Namespace) -> None:
    for name in ("source", "symbols", "duration", "ws_url", "rest_url", "rotate_sec", "rotate_mb"):
        if getattr(args, name) is not None:
            raise OrderflowError(
                f"--{name.replace('_', '-')} is for a recording from sockets, not for the export of a run: leave it out"
            )


def _check_session(args: argparse.Namespace) -> None:
    for option, value, least in (
        ("--duration", args.duration, 0.0),
        ("--rotate-sec", args.rotate_sec, MIN_ROTATE_SEC),
        ("--rotate-mb", args.rotate_mb, 0.0),
    ):
        if value is not None and not (least <= value < math.inf and value > 0):
            raise OrderflowError(
                f"{option} is {value:g}: it must be a finite number " + (f"from {least:g} on" if least else "above 0")
            )
    if (args.ws_url is None) != (args.rest_url is None):
        raise OrderflowError("--ws-url and --rest-url go together: frames and snapshots must be of one exchange")
    if args.source == "sim" and args.ws_url is not None:
        raise OrderflowError("--source sim starts its own exchange: leave out --source to record the one of --ws-url")


# -- from a run -------------------------------------------------------------------------------------------------------


async def _export(args: argparse.Namespace) -> int:
    async with reach(args, [JOURNAL]) as reached:
        writer = CaptureWriter(args.out)
        try:
            exported = await export(reached.log, reached.codecs, reached.prefix, writer)
            writer.close()
        except BaseException:
            # Half an export is of no use: the journal is still there to begin again.
            writer.abandon()
            writer.part.unlink(missing_ok=True)
            raise
    _say_exported(exported, writer, args.out)
    return 0


def _say_exported(exported: Exported, writer: CaptureWriter, out: Path) -> None:
    if not writer.frames:
        raise OrderflowError(f"the journal holds neither frame nor snapshot: {out} was not written")
    print(f"{exported.frames:,} frames and {exported.snapshots:,} snapshots of {', '.join(sorted(exported.sources))}")
    for partition, seq in sorted(exported.cut.items()):
        print(f"partition {partition} begins at seq {seq:,}: what was before has expired, and is not in the file")
    if exported.gaps:
        reasons = ", ".join(f"{reason} {count:,}" for reason, count in sorted(exported.gaps.items()))
        print(f"gaps in the journal: {reasons}; a replay finds them by the missing ids")
    if exported.backfilled_trades:
        print(f"{exported.backfilled_trades:,} trades fetched afterwards are NOT in the file: a replay lacks them")
    rest = {kind: count for kind, count in sorted(exported.unheld.items()) if kind not in ("gap", "backfill", "tick")}
    if rest:
        print("not in the file: " + ", ".join(f"{kind} {count:,}" for kind, count in rest.items()))
    _say_file(out)


def _say_file(path: Path) -> None:
    print(f"{path}   {path.stat().st_size:,} bytes")
    print(f"look into it: orderflow capture info {path}")


# -- from sockets -----------------------------------------------------------------------------------------------------


class _Session:
    """One recording from start to summary."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.stopping = asyncio.Event()

    async def run(self) -> int:
        environment = dict(os.environ)
        if self.args.symbols:
            environment["SYMBOLS"] = self.args.symbols
        if self.args.ws_url:
            environment |= {"WSS_URL": self.args.ws_url, "REST_URL": self.args.rest_url}
        environment["SOURCE"] = self.args.source or "live"
        config = load(environment)
        if not config.ingestion.symbols:
            raise OrderflowError("no symbols: name them, as --symbols BTCUSDT,ETHUSDT")
        async with AsyncExitStack() as stack:
            if self.args.source == "sim":
                port = await self._start_sim(stack, config)
                environment |= {"WSS_URL": f"ws://127.0.0.1:{port}", "REST_URL": f"http://127.0.0.1:{port}"}
                config = load(environment)
            return await self._record(config)

    async def _start_sim(self, stack: AsyncExitStack, config: Config) -> int:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="orderflow-record-")))
        supervisor = Supervisor(folder)
        stack.push_async_callback(supervisor.close)
        await supervisor.open()
        port = backing.free_port()
        symbols = ",".join(config.ingestion.symbols)
        command = [sys.executable, "-m", "services.simexchange", "--port", str(port), "--symbols", symbols]
        supervisor.add("simexchange", command, {})
        await supervisor.wait_until(
            lambda: backing.answers(f"127.0.0.1:{port}"),
            "the simulated exchange",
            lambda: 0,
            stall_sec=SIM_START_SEC,
        )
        return port

    def _due(self, span_ns: int, size: int) -> bool:
        by_time, by_size = self.args.rotate_sec, self.args.rotate_mb
        if span_ns < MIN_ROTATE_SEC * 1e9:
            return False  # names tell files apart by the second, and every file costs a snapshot of each book
        return (by_time is not None and span_ns >= by_time * 1e9) or (by_size is not None and size >= by_size * MB)

    async def _record(self, config: Config) -> int:
        log, codecs = MemoryLog(), local_codecs()
        in_parts = self.args.rotate_sec is not None or self.args.rotate_mb is not None
        files = FileSeries(self.args.out, in_parts)
        journal = FileJournal(log, codecs, config, files, self._due)
        outside = system_outside(config.ingestion.ping_interval_sec)
        recorder = WebsocketRecorder(journal, config.ingestion, log, codecs, PREFIX, outside)
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self.stopping.set)
        print(f"recording {', '.join(config.ingestion.symbols)} from {config.ingestion.ws_url} into {files.part}")
        writing = asyncio.create_task(journal.write_on())
        recording = asyncio.create_task(recorder.run())
        try:
            await self._watch(recorder, recording, journal, files, len(config.ingestion.symbols))
            recorder.drain()
            await recording
            await journal.flush()
        finally:
            recording.cancel()
            writing.cancel()
            await asyncio.wait([recording, writing])
            await journal.settle()
            # What has come until a failure is whole: it gets its name, too.
            files.close()
            for path in files.finished:
                _say_file(path)
        return self._conclude(config, recorder, journal, files)

    async def _watch(
        self,
        recorder: WebsocketRecorder,
        recording: asyncio.Task[None],
        journal: FileJournal,
        files: FileSeries,
        all_: int,
    ) -> None:
        """Say how it stands until it is over."""
        loop = asyncio.get_running_loop()
        begun = loop.time()
        until = math.inf if self.args.duration is None else begun + self.args.duration
        stopping = asyncio.create_task(self.stopping.wait())
        frames_before, then = 0, begun
        try:
            while not self.stopping.is_set() and (left := until - loop.time()) > 0:
                await asyncio.wait(
                    [recording, stopping], timeout=min(LINE_SEC, left), return_when=asyncio.FIRST_COMPLETED
                )
                if recording.done():
                    recording.result()
                    return
                now, frames = loop.time(), journal.frames_by_symbol.total()
                rate = (frames - frames_before) / max(1e-3, now - then)
                status = recorder.status()
                print(
                    f"{now - begun:7.1f} s  {frames:,} frames  {rate:,.0f}/s  books {len(journal.synced)}/{all_}  "
                    f"reconnects {_total(status['reconnects'])}  dropped {_total(status['dropped'])}  "
                    f"{files.size_bytes / MB:,.1f} MB",
                    flush=True,
                )
                frames_before, then = frames, now
        finally:
            stopping.cancel()

    def _conclude(self, config: Config, recorder: WebsocketRecorder, journal: FileJournal, files: FileSeries) -> int:
        if not files.finished:
            raise OrderflowError(
                f"not a single frame came from {config.ingestion.ws_url}: look at the network, at the address and at "
                f"the symbols ({', '.join(config.ingestion.symbols)}); {self.args.out} was not written"
            )
        status = recorder.status()
        print(
            f"{files.frames:,} lines, {journal.snapshots:,} of them snapshots; reconnects {_total(status['reconnects'])}, "
            f"quotes conflated {_total(status['conflated'])}, frames dropped {_total(status['dropped'])}"
        )
        for reason, count in sorted(journal.gaps.items()):
            if reason != "disconnected":
                print(f"gaps told by the recorder: {reason} {count:,}")
        for why, count in sorted(journal.unheld.items()):
            print(f"{count:,} frames are NOT in the file, which cannot hold them: {why}")
        for symbol in config.ingestion.symbols:
            if not journal.frames_by_symbol[symbol]:
                print(f"WARNING: not a single frame of {symbol}: is it listed?")
            elif symbol not in journal.synced:
                print(f"WARNING: the book of {symbol} was not whole at the end: see `orderflow capture info`")
        return 0


def _total(value: Any) -> int:
    """A count, or the sum of counts by whatever they are told apart."""
    return sum(map(_total, value.values())) if isinstance(value, dict) else int(value)
