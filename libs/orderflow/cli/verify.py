"""`orderflow verify`: recompute a run's derived topics from its journal and compare them byte for byte.

Exit status 0 where everything is identical, 1 on any divergence.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import time
from typing import Any

from orderflow.cli.common import add_run_argument, check_topics, reach
from orderflow.cli.tap import moment
from orderflow.config import effective_fingerprint
from orderflow.errors import OrderflowError
from orderflow.topics import DERIVED, JOURNAL
from orderflow.verify import Span, verify


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser("verify", help="prove that replay equals live", description=__doc__)
    parser.add_argument("--from", dest="start", metavar="WHERE", help="judge from this seq or receive time on")
    parser.add_argument("--to", dest="end", metavar="WHERE", help="judge up to this seq or receive time")
    parser.add_argument(
        "--against", metavar="PREFIX", help="judge the topics under this prefix (default: the run's own)"
    )
    parser.add_argument("--json", action="store_true", help="one JSON object instead of lines")
    add_run_argument(parser)


def run(args: argparse.Namespace) -> int:
    return asyncio.run(_verify(args, _span(args.start, args.end)))


def _span(start: str | None, end: str | None) -> Span:
    from_seq, from_ns = _bound(start, 0, "--from")
    to_seq, to_ns = _bound(end, 1 << 62, "--to")
    if from_seq > to_seq or from_ns > to_ns:
        raise OrderflowError(f"--from {start} lies behind --to {end}: exchange them")
    return Span(from_seq, to_seq, from_ns, to_ns)


def _bound(text: str | None, default: int, option: str) -> tuple[int, int]:
    if text is None:
        return default, default
    if text.isdecimal():
        return int(text), default
    return default, moment(text, option, "a seq, or a time as 2026-11-21T08:00:00Z")


async def _verify(args: argparse.Namespace, span: Span) -> int:
    async with reach(args, [JOURNAL, *DERIVED]) as reached:
        if args.against is not None:
            await check_topics(reached.bootstrap, args.against, DERIVED)
        effective = effective_fingerprint(reached.config)
        if reached.began_with and reached.began_with != effective:
            raise OrderflowError(
                f"the run began under the settings {reached.began_with[:12]}, and these are {effective[:12]}: a recomputation "
                "would differ for that reason alone; restore infra/config and ORDERFLOW_CONFIG as they were"
            )
        started = time.monotonic()
        report = await verify(reached.log, reached.codecs, reached.config, reached.prefix, span, args.against)
        seconds = time.monotonic() - started
    compared = sum(report.compared.values())
    if args.json:
        print(
            json.dumps(
                {
                    "identical": report.identical,
                    "journal_records": report.journal_records,
                    "compared": report.compared,
                    "divergences": [str(each) for each in report.divergences],
                    "seconds": round(seconds, 3),
                },
                indent=2,
            )
        )
    else:
        for topic, count in report.compared.items():
            print(f"{topic:<20}{count:>12} records")
        print(
            f"recomputed {report.journal_records} journal records, compared {compared} derived ones in {seconds:.1f} s"
        )
        for each in report.divergences:
            print(f"DIVERGENCE {each}")
        print("identical" if report.identical else f"{len(report.divergences)} divergences")
    if report.journal_records == 0:
        raise OrderflowError(f"the journal under prefix {reached.prefix!r} is empty: nothing was verified")
    return 0 if report.identical else 1
