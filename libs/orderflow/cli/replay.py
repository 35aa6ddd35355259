"""`orderflow replay`: recompute a stretch of a journal into topics and files of its own.

With the settings unchanged, the same bytes as live; with `--set`, what would have been.
"""

from __future__ import annotations

import argparse
import asyncio
import re
import shutil
import sys
import time
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

import msgspec
from aiokafka.admin import AIOKafkaAdminClient

from orderflow.cli import runs
from orderflow.cli.common import Reached, add_run_argument, reach
from orderflow.cli.tap import moment
from orderflow.config import Config, effective_fingerprint, override
from orderflow.errors import OrderflowError
from orderflow.replay.engine import Progress, Replay, Target
from orderflow.replay.from_lake import raw_cuts, rebuild_journal
from orderflow.replay.plan import Bound, Plan, Planner
from orderflow.streaming.init import codecs_for, create_topics
from orderflow.topics import BY_NAME, DERIVED, JOURNAL, PARTITIONS

WARM_UP_SEC: Final = 900.0
"""How long before the start stages under other settings compute, where nothing else is asked for."""
REPLAY_FILE: Final = "replay.json"
LINE_SEC: Final = 5.0
TERMINAL_SEC: Final = 0.5
GONE_SEC: Final = 30.0


class ReplayInfo(msgspec.Struct, kw_only=True):
    """What `replay.json` in a replay's folder holds."""

    name: str
    topic_prefix: str
    journal_prefix: str
    began_at: str
    changed_settings: list[str]
    changed_stages: list[str]
    config_fingerprint: str
    exact: bool
    notes: list[str]
    spans: dict[str, list[int]]
    """Partition -> first and last seq asked for."""
    complete: bool = False
    seconds: float = 0.0
    market_sec: float = 0.0
    journal_records: int = 0
    derived: dict[str, int] = {}
    files: int = 0
    commands_left_out: int = 0


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser("replay", help="recompute a stretch, also under other settings", description=__doc__)
    where = "a receive time (2026-11-21T08:00:00Z), a seq, or seq:PARTITION:NUMBER for that partition alone"
    parser.add_argument("--from", dest="start", metavar="WHERE", help=f"{where} (default: the oldest record kept)")
    parser.add_argument("--to", dest="end", metavar="WHERE", help="likewise; a time is left out, a seq is included")
    parser.add_argument("--as", dest="name", metavar="NAME", required=True, help="topics go to replay.NAME.*")
    parser.add_argument(
        "--set",
        dest="assignments",
        action="append",
        default=[],
        metavar="SECTION.SETTING=VALUE",
        help="another setting, as cvd.z_mode=level; may be given several times",
    )
    parser.add_argument("--speed", default="max", metavar="max|N", help="pace, as a multiple of real time")
    parser.add_argument(
        "--warm-up",
        metavar="SEC|all",
        help="how long before the start stages compute that begin without a snapshot (default: all that is kept; with "
        f"--set {WARM_UP_SEC:g} for those whose results change)",
    )
    parser.add_argument(
        "--from-lake", type=Path, metavar="DIR", help="rebuild the journal from the raw files of this lake first"
    )
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder of its files (default: RUN/replays/NAME)")
    parser.add_argument("--no-files", action="store_true", help="topics alone: no lake, no files of signals")
    parser.add_argument(
        "--keep-evaluator", action="store_true", help="with --set: automatic commands of the evaluator apply too"
    )
    parser.add_argument("--replace", action="store_true", help="remove an earlier replay of this name first")
    add_run_argument(parser)


def run(args: argparse.Namespace) -> int:
    if not re.fullmatch(r"[A-Za-z0-9_-]{1,60}", args.name):
        raise OrderflowError(f"--as is {args.name!r}: it must be at most 60 letters, digits, underscores and hyphens")
    begin, end, partitions = bounds(args.start, args.end)
    speed = _speed(args.speed)
    warm_up_sec = _warm_up(args.warm_up, bool(args.assignments))
    if args.from_lake is not None:
        raw_cuts(args.from_lake)
        if args.run is None and (args.from_lake / runs.RUN_FILE).exists():
            args.run = str(args.from_lake)
    return asyncio.run(_Command(args, begin, end, partitions, speed, warm_up_sec).run())


def bounds(start: str | None, end: str | None) -> tuple[Bound | None, Bound | None, list[int]]:
    """What --from and --to mean, and the partitions that they speak of.

    Raises
    ------
    OrderflowError
        One is neither time nor seq, or they lie the wrong way round.
    """
    begin, begin_partition = _bound(start, "--from")
    until, end_partition = _bound(end, "--to")
    if begin_partition is not None and end_partition is not None and begin_partition != end_partition:
        raise OrderflowError(f"--from {start} and --to {end} name two partitions: name one")
    if begin is not None and until is not None:
        for low, high in ((begin.seq, until.seq), (begin.ns, until.ns)):
            if low is not None and high is not None and low > high:
                raise OrderflowError(f"--from {start} lies behind --to {end}: exchange them")
    one = begin_partition if begin_partition is not None else end_partition
    return begin, until, [one] if one is not None else list(range(PARTITIONS))


def _bound(text: str | None, option: str) -> tuple[Bound | None, int | None]:
    if text is None:
        return None, None
    if text.isdecimal():
        return Bound(seq=int(text)), None
    found = re.fullmatch(r"seq:(\d+):(\d+)", text)
    if found is not None:
        if int(found[1]) >= PARTITIONS:
            raise OrderflowError(f"{option} is {text!r}: partitions are 0 to {PARTITIONS - 1}, as in seq:3:1000")
        return Bound(seq=int(found[2])), int(found[1])
    allowed = "a seq, seq:PARTITION:NUMBER, or a time as 2026-11-21T08:00:00Z"
    return Bound(ns=moment(text, option, allowed)), None


def _speed(text: str) -> float | None:
    if text == "max":
        return None
    try:
        factor = float(text)
    except ValueError:
        factor = 0.0
    if not 0.001 <= factor <= 10_000:
        raise OrderflowError(f"--speed is {text!r}: it must be `max` or a factor from 0.001 to 10000")
    return factor


def _warm_up(text: str | None, changed: bool) -> float | None:
    if text is None:
        return WARM_UP_SEC if changed else None
    if text == "all":
        return None
    try:
        seconds = float(text)
    except ValueError:
        seconds = -1.0
    if not 0 <= seconds <= 1e9:
        raise OrderflowError(f"--warm-up is {text!r}: it must be `all` or seconds from 0")
    return seconds


class _Command:
    def __init__(
        self,
        args: argparse.Namespace,
        begin: Bound | None,
        end: Bound | None,
        partitions: list[int],
        speed: float | None,
        warm_up_sec: float | None,
    ) -> None:
        self.args = args
        self.begin = begin
        self.end = end
        self.partitions = partitions
        self.speed = speed
        self.warm_up_sec = warm_up_sec
        self.prefix = f"replay.{args.name}."

    async def run(self) -> int:
        args = self.args
        rebuilt = args.from_lake is not None
        async with reach(args, [JOURNAL], check=not rebuilt) as reached:
            if not rebuilt:
                reached.check_settings()
            config = override(reached.config, args.assignments)
            folder = self._folder(reached)
            await self._make_room(reached, folder)
            wanted = [BY_NAME[topic] for topic in ((JOURNAL,) if rebuilt else ()) + DERIVED]
            await create_topics(reached.bootstrap, self.prefix, wanted)
            codecs = await codecs_for(reached.registry, self.prefix, [JOURNAL, *DERIVED] if rebuilt else DERIVED)
            journal_codecs, journal_prefix = reached.codecs, reached.prefix
            if rebuilt:
                journal_codecs, journal_prefix = codecs, self.prefix
                written = await rebuild_journal(reached.log, codecs, self.prefix, args.from_lake)
                print(f"rebuilt {sum(written.values()):,} journal records from {args.from_lake}")
            plan = await Planner(reached.log, journal_codecs, journal_prefix, reached.config, config).plan(
                self.partitions,
                self.begin,
                self.end,
                files=not args.no_files,
                warm_up_sec=self.warm_up_sec,
                lost_too=args.warm_up is not None,
                snapshots=not rebuilt,
            )
            info = self._info(plan, journal_prefix, config)
            self._announce(info, plan, folder)
            runs_to = Target(self.prefix, None if args.no_files else folder)
            replay = Replay(
                reached.log,
                journal_codecs,
                codecs,
                config,
                journal_prefix,
                runs_to,
                speed=self.speed,
                keep_evaluator=args.keep_evaluator or not args.assignments,
            )
            _save(folder, info)
            began = time.monotonic()
            shown = asyncio.create_task(_show(replay.progress, began))
            try:
                await replay.run(plan.starts, plan.spans, plan.ends)
            finally:
                shown.cancel()
                with suppress(asyncio.CancelledError):
                    await shown
            _conclude(info, replay.progress, time.monotonic() - began, folder)
        return 0

    def _folder(self, reached: Reached) -> Path:
        if self.args.out is not None:
            folder: Path = self.args.out.resolve()
            return folder
        if reached.out is not None:
            return reached.out.resolve() / "replays" / str(self.args.name)
        return (runs.runs_dir() / f"replay-{self.args.name}").resolve()

    async def _make_room(self, reached: Reached, folder: Path) -> None:
        """Nothing of an earlier replay may lie among what this one writes."""
        admin = AIOKafkaAdminClient(bootstrap_servers=reached.bootstrap)
        await admin.start()
        try:
            present = await self._topics(admin)
            occupied = bool(present) or (folder.exists() and any(folder.iterdir()))
            if not occupied:
                return
            if not self.args.replace:
                raise OrderflowError(
                    f"there is a replay {self.args.name!r} already (topics {self.prefix}*, or files in {folder}): choose "
                    "another --as, or give --replace to remove it"
                )
            if present:
                await admin.delete_topics(present)
            deadline = time.monotonic() + GONE_SEC
            while await self._topics(admin):
                if time.monotonic() > deadline:
                    raise OrderflowError(f"the topics {self.prefix}* were not removed within {GONE_SEC:g} s: try again")
                await asyncio.sleep(0.1)
        finally:
            await admin.close()
        self._clear(folder)

    def _clear(self, folder: Path) -> None:
        if not folder.exists() or not any(folder.iterdir()):
            return
        if not (folder / REPLAY_FILE).exists():
            raise OrderflowError(f"{folder} is not empty and holds no replay: nothing is removed; name another --out")
        shutil.rmtree(folder)

    async def _topics(self, admin: AIOKafkaAdminClient) -> list[str]:
        return sorted(name for name in await admin.list_topics() if name.startswith(self.prefix))

    def _info(self, plan: Plan, journal_prefix: str, config: Config) -> ReplayInfo:
        notes = [
            f"partition {partition}: {', '.join(start.without_past)} began without a past at seq {start.from_seq}, in the "
            "middle of a session"
            for partition, start in sorted(plan.inexact.items())
        ]
        return ReplayInfo(
            name=self.args.name,
            topic_prefix=self.prefix,
            journal_prefix=journal_prefix,
            began_at=datetime.now(UTC).isoformat(timespec="seconds"),
            changed_settings=list(self.args.assignments),
            changed_stages=sorted(plan.changed),
            config_fingerprint=effective_fingerprint(config),
            exact=not notes,
            notes=notes,
            spans={
                str(p): [span.from_seq, span.to_seq] for p, span in plan.spans.items() if span.from_seq <= span.to_seq
            },
        )

    def _announce(self, info: ReplayInfo, plan: Plan, folder: Path) -> None:
        print(f"replay {info.name}: topics {info.topic_prefix}*" + ("" if self.args.no_files else f", files {folder}"))
        if info.changed_settings:
            print(
                f"changed {', '.join(info.changed_settings)}: computed anew are {', '.join(info.changed_stages) or 'none'}"
            )
        if info.notes:
            print(
                f"WARMING UP: in {len(info.notes)} of {len(plan.starts)} partitions stages began without a past in the "
                "middle of a session: windows fill, cvd counts from there, and a book syncs at the next snapshot of the "
                f"exchange. Rows are not those of the live run. {info.notes[0]}"
            )
        else:
            restored = sum(1 for start in plan.starts.values() if start.snapshots)
            print(f"begins from snapshots in {restored} partitions, with a session in {len(plan.starts) - restored}")


def _conclude(info: ReplayInfo, progress: Progress, seconds: float, folder: Path) -> None:
    info.complete = True
    info.seconds = round(seconds, 3)
    info.market_sec = round(progress.market_sec, 3)
    info.journal_records = progress.journal_records
    info.derived = dict(progress.derived)
    info.files = progress.files
    info.commands_left_out = progress.commands_left_out
    _save(folder, info)
    for topic, count in progress.derived.items():
        print(f"{topic:<20}{count:>12,} records")
    if progress.commands_left_out:
        print(f"{progress.commands_left_out} automatic commands of the evaluator were left out (--keep-evaluator)")
    print(
        f"{progress.journal_records:,} journal records, {progress.market_sec:,.1f} s of market, in {seconds:.1f} s: "
        f"{progress.market_sec / max(seconds, 1e-9):,.1f} times real time, "
        f"{progress.journal_records / max(seconds, 1e-9):,.0f} records/s; {progress.files} files"
    )


def _save(folder: Path, info: ReplayInfo) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / f".{REPLAY_FILE}"
    temporary.write_bytes(msgspec.json.format(msgspec.json.encode(info)))
    temporary.replace(folder / REPLAY_FILE)


async def _show(progress: Progress, began: float) -> None:
    """A line now and then: how far, how fast."""
    terminal = sys.stdout.isatty()
    try:
        while True:
            await asyncio.sleep(TERMINAL_SEC if terminal else LINE_SEC)
            seconds = time.monotonic() - began
            at = f"{datetime.fromtimestamp(progress.at_ns / 1e9, UTC):%Y-%m-%dT%H:%M:%SZ}" if progress.at_ns else "-"
            line = (
                f"{progress.done_share:4.0%}  {at}  {progress.journal_records:,} records, "
                f"{progress.journal_records / seconds:,.0f}/s, {progress.market_sec / seconds:,.1f} times real time"
            )
            print(f"\r\x1b[K{line}" if terminal else line, end="" if terminal else "\n", flush=True)
    finally:
        if terminal:
            print()
