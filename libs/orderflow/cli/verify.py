"""`orderflow verify`: recompute a run's derived topics from its journal and compare them byte for byte.

Exit status 0 where everything is identical, 1 on any divergence.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import time
from pathlib import Path
from typing import Any

from orderflow.cli.common import Reached, add_run_argument, check_topics, reach
from orderflow.cli.replay import bounds
from orderflow.errors import OrderflowError
from orderflow.replay import chain
from orderflow.topics import DERIVED, JOURNAL
from orderflow.verify import Report, verify


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser("verify", help="prove that replay equals live", description=__doc__)
    where = "a seq, a receive time, or seq:PARTITION:NUMBER for that partition alone"
    parser.add_argument("--from", dest="start", metavar="WHERE", help=f"judge from here on: {where}")
    parser.add_argument(
        "--to", dest="end", metavar="WHERE", help="judge up to here; a time is left out, a seq is included"
    )
    parser.add_argument(
        "--start",
        dest="computing",
        choices=("beginning", "snapshot"),
        help="where computing begins (default: the beginning; with --from the newest snapshots before it)",
    )
    parser.add_argument(
        "--against", metavar="PREFIX", help="judge the topics under this prefix (default: the run's own)"
    )
    parser.add_argument(
        "--chain",
        action="store_true",
        help="compute nothing: hash the topics block by block, compare with the marks of last time, and add new ones",
    )
    parser.add_argument("--chain-file", type=Path, metavar="FILE", help="where the marks are (default: RUN/chain.json)")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of lines")
    add_run_argument(parser)


def run(args: argparse.Namespace) -> int:
    bounds(args.start, args.end)
    if args.chain and (args.start or args.end):
        raise OrderflowError("--chain hashes whole topics: leave --from and --to out")
    return asyncio.run(_chain(args) if args.chain else _verify(args))


async def _verify(args: argparse.Namespace) -> int:
    begin, end, partitions = bounds(args.start, args.end)
    async with reach(args, [JOURNAL, *DERIVED]) as reached:
        if args.against is not None:
            await check_topics(reached.bootstrap, args.against, DERIVED)
        reached.check_settings()
        started = time.monotonic()
        report = await verify(
            reached.log,
            reached.codecs,
            reached.config,
            reached.prefix,
            begin,
            end,
            live_prefix=args.against,
            from_snapshots=args.computing == "snapshot" or (args.computing is None and begin is not None),
            partitions=partitions,
        )
        seconds = time.monotonic() - started
    _print_json(report, seconds) if args.json else _print_lines(report, seconds)
    if not report.reached:
        why = "; ".join(report.notes) or f"the journal under prefix {reached.prefix!r} has nothing there"
        raise OrderflowError(f"nothing was verified: {why}")
    return 0 if report.identical else 1


def _print_json(report: Report, seconds: float) -> None:
    content = {
        "identical": report.identical,
        "journal_records": report.journal_records,
        "compared": report.compared,
        "divergences": [str(each) for each in report.divergences],
        "notes": report.notes,
        "seconds": round(seconds, 3),
    }
    print(json.dumps(content, indent=2))


def _print_lines(report: Report, seconds: float) -> None:
    for topic, count in report.compared.items():
        print(f"{topic:<20}{count:>12} records")
    print(
        f"recomputed {report.journal_records} journal records, compared {sum(report.compared.values())} derived ones in "
        f"{seconds:.1f} s"
    )
    for note in report.notes:
        print(f"NOT JUDGED {note}")
    for each in report.divergences:
        print(f"DIVERGENCE {each}")
    print("identical" if report.identical else f"{len(report.divergences)} divergences")


async def _chain(args: argparse.Namespace) -> int:
    topics = (JOURNAL, *DERIVED) if args.against is None else DERIVED
    async with reach(args, list(topics) if args.against is None else [JOURNAL]) as reached:
        prefix = reached.prefix if args.against is None else args.against
        await check_topics(reached.bootstrap, prefix, topics)
        path = _chain_file(args, reached)
        known = chain.load(path)
        started = time.monotonic()
        result = await chain.follow(reached.log, prefix, topics, known)
        seconds = time.monotonic() - started
    if args.against is None:
        chain.save(path, result)
    if args.json:
        content = {
            "identical": not result.differences,
            "records": result.records,
            "blocks_compared": result.compared,
            "blocks_new": result.added,
            "differences": [str(each) for each in result.differences],
            "heads": {f"{topic}[{partition}]": head for (topic, partition), head in sorted(result.heads.items())},
            "seconds": round(seconds, 3),
        }
        print(json.dumps(content, indent=2))
    else:
        print(
            f"hashed {result.records} records in {seconds:.1f} s: {result.compared} blocks as before, {result.added} new"
            f"   head of all {chain.head_of_all(result)[:16]}"
        )
        for each in result.differences:
            print(f"DIFFERENCE {each}")
        print("unchanged" if not result.differences else f"{len(result.differences)} topic partitions differ")
    return 1 if result.differences else 0


def _chain_file(args: argparse.Namespace, reached: Reached) -> Path:
    if args.chain_file is not None:
        path: Path = args.chain_file
        return path
    if reached.out is None:
        raise OrderflowError("--chain needs --chain-file FILE where no run's folder is known: the marks are kept there")
    return reached.out / "chain.json"
