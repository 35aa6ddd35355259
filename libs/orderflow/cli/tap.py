"""`orderflow tap TOPIC`: decoded JSON lines, for where a distribution's kcat lacks Avro."""

from __future__ import annotations

import argparse
import asyncio
import base64
import json
import math
import sys
import time
from datetime import UTC, datetime
from typing import Any, Final

from orderflow.cli.common import Reached, add_run_argument, reach, topic_named
from orderflow.errors import OrderflowError
from orderflow.streaming.codec import peek
from orderflow.streaming.log import TP, LogRecord
from orderflow.streaming.seek import offset_of_seq, seq_at
from orderflow.topics import BY_NAME, JOURNAL

IDLE_SEC: Final = 1.0
SILENT_SEC: Final = 5.0
"""Without a line, after which a person is told that nothing is broken."""


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser("tap", help="print a topic's records as JSON lines", description=__doc__)
    parser.add_argument("topic", metavar="TOPIC", help="such as features.ofi")
    parser.add_argument(
        "--from",
        dest="start",
        default="latest",
        metavar="WHERE",
        help="earliest, latest, a receive time (2026-11-21T08:00:00Z), or seq:PARTITION:NUMBER (default: latest)",
    )
    parser.add_argument("--count", type=int, metavar="N", help="stop after N records")
    parser.add_argument("--symbol", help="only this symbol")
    parser.add_argument("--no-follow", action="store_true", help="stop at the end instead of waiting for more")
    add_run_argument(parser)


def run(args: argparse.Namespace) -> int:
    topic_named(args.topic)
    if args.count is not None and args.count < 1:
        raise OrderflowError(f"--count is {args.count}: it must be at least 1")
    return asyncio.run(_tap(args))


async def _tap(args: argparse.Namespace) -> int:
    # A moment is looked up in the journal; topics of a replay have none beside them.
    by_time = args.start not in ("earliest", "latest") and not args.start.startswith("seq:")
    async with reach(args, list(dict.fromkeys([args.topic, *([JOURNAL] if by_time else [])]))) as reached:
        partitions = range(BY_NAME[args.topic].partitions)
        tps = [TP(reached.prefix + args.topic, partition) for partition in partitions]
        positions = await _positions(args.start, reached, args.topic, tps)
        ends = await reached.log.end_offsets(tps)
        reader = await reached.log.reader(positions)
        shown = 0
        hint_at = time.monotonic() + SILENT_SEC
        last: dict[TP, tuple[int, int]] = {}
        decode = reached.codecs.decoder(args.topic)
        try:
            while True:
                got = await reader.poll(int(IDLE_SEC * 1000), 1000)
                for tp in sorted(got):
                    for record in got[tp]:
                        if record.value is None:
                            continue
                        seq_sub = peek(record.value)[:2]
                        if args.topic != JOURNAL and seq_sub <= last.get(tp, (-1, -1)):
                            continue
                        last[tp] = seq_sub
                        if not decode.knows(record.value):
                            await reached.codecs.learn(args.topic, record.value)
                        line = _line(tp, record, decode(record.value), args)
                        if line is None:
                            continue
                        sys.stdout.write(line + "\n")
                        shown += 1
                        if args.count is not None and shown >= args.count:
                            sys.stdout.flush()
                            return 0
                sys.stdout.flush()
                if not shown and time.monotonic() > hint_at:
                    print(_silence(args), file=sys.stderr, flush=True)
                    hint_at = math.inf
                if args.no_follow and all([await reader.position(tp) >= ends[tp] for tp in positions]):
                    return 0
        finally:
            await reader.close()


def _silence(args: argparse.Namespace) -> str:
    """What to tell a person who sees nothing."""
    which = f"of {args.symbol.upper()} " if args.symbol else ""
    before = "; what came before shows with --from earliest" if args.start == "latest" else ""
    return f"orderflow: no record {which}within {SILENT_SEC:g} s, waiting for one{before} (Ctrl-C ends)"


def _line(tp: TP, record: LogRecord, decoded: dict[str, Any], args: argparse.Namespace) -> str | None:
    if args.symbol and decoded.get("symbol") != args.symbol.upper():
        return None
    if isinstance(decoded.get("payload"), bytes):
        payload: bytes = decoded["payload"]
        try:
            decoded["payload"] = payload.decode("utf-8")
        except UnicodeDecodeError:
            decoded["payload"] = {"base64": base64.b64encode(payload).decode()}
    return json.dumps({"partition": tp.partition, "offset": record.offset, **decoded}, ensure_ascii=False)


async def _positions(start: str, reached: Reached, topic: str, tps: list[TP]) -> dict[TP, int]:
    if start == "earliest":
        return await reached.log.begin_offsets(tps)
    ends = await reached.log.end_offsets(tps)
    if start == "latest":
        return ends
    if start.startswith("seq:"):
        partition, seq = _seq(start)
        tp = TP(reached.prefix + topic, partition)
        return {tp: await offset_of_seq(reached.log, tp, seq)}
    moment_ns = moment(start, "--from", "earliest, latest, a time as 2026-11-21T08:00:00Z, or seq:PARTITION:NUMBER")
    positions = {}
    for tp in tps:
        journal = TP(reached.prefix + JOURNAL, tp.partition)
        positions[tp] = await offset_of_seq(
            reached.log, tp, await seq_at(reached.log, reached.codecs, journal, moment_ns)
        )
    return positions


def _seq(text: str) -> tuple[int, int]:
    parts = text.split(":")
    if len(parts) != 3 or not (parts[1].isdecimal() and parts[2].isdecimal()) or int(parts[1]) >= 12:
        raise OrderflowError(
            f"--from is {text!r}: it must be seq:PARTITION:NUMBER with a partition below 12, as seq:3:1000"
        )
    return int(parts[1]), int(parts[2])


def moment(text: str, option: str, allowed: str) -> int:
    """A time of ISO 8601 in nanoseconds since the epoch; UTC where it names no zone.

    Raises
    ------
    OrderflowError
        It is no time; names the option and what it allows.
    """
    try:
        parsed = datetime.fromisoformat(text)
    except ValueError as error:
        raise OrderflowError(f"{option} is {text!r}: it must be {allowed}") from error
    if parsed.tzinfo is None:
        parsed = parsed.replace(tzinfo=UTC)
    since = parsed - datetime(1970, 1, 1, tzinfo=UTC)
    return ((since.days * 86_400 + since.seconds) * 1_000_000 + since.microseconds) * 1000
