"""`orderflow diff A B`: how the signals and features of two computations of one journal differ.

Exit status 0 where they are the same, 1 where not.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import json
from typing import Any, Final

from orderflow.cli.common import Reached, add_run_argument, check_topics, reach, topic_named
from orderflow.replay.diff import COMPARED, Difference, compare, fields_by_change

FIELDS_SHOWN: Final = 8
LIVE: Final = "live"


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser("diff", help="compare a run with its replays", description=__doc__)
    side = f"{LIVE}, the NAME of a replay, or a topic prefix that ends in a dot"
    parser.add_argument("left", metavar="A", help=side)
    parser.add_argument("right", metavar="B", help=side)
    parser.add_argument(
        "--topic", action="append", metavar="TOPIC", help=f"compare this (default: {', '.join(COMPARED)})"
    )
    parser.add_argument("--json", action="store_true", help="one JSON object instead of tables")
    add_run_argument(parser)


def run(args: argparse.Namespace) -> int:
    topics = tuple(dict.fromkeys(topic_named(name) for name in args.topic)) if args.topic else COMPARED
    return asyncio.run(_diff(args, topics))


def prefix_of(side: str, live: str) -> str:
    """The topic prefix that a person means by `live`, a replay's name or a prefix."""
    if side == LIVE:
        return live
    return side if side.endswith(".") else f"replay.{side}."


async def _diff(args: argparse.Namespace, topics: tuple[str, ...]) -> int:
    async with reach(args, list(topics), check=False) as reached:
        left, right = (prefix_of(side, reached.prefix) for side in (args.left, args.right))
        for prefix in (left, right):
            await check_topics(reached.bootstrap, prefix, topics)
        result = await _compare(reached, left, right, topics)
    _print_json(result) if args.json else _print(result, args.left, args.right)
    return 0 if result.same else 1


async def _compare(reached: Reached, left: str, right: str, topics: tuple[str, ...]) -> Difference:
    return await compare(reached.log, reached.codecs, left, right, topics)


def _print_json(result: Difference) -> None:
    content = {
        "same": result.same,
        "stretch": {str(partition): list(stretch) for partition, stretch in result.stretch.items()},
        "topics": {
            topic: {
                "a": found.left,
                "b": found.right,
                "equal": found.equal,
                "different": found.differing,
                "only_a": found.only_left,
                "only_b": found.only_right,
                "first": found.first or None,
                "fields": {name: each.content() for name, each in fields_by_change(found)},
            }
            for topic, found in result.topics.items()
        },
        "signals": {symbol: dataclasses.asdict(each) for symbol, each in sorted(result.signals.items())},
        "examples": result.examples,
    }
    print(json.dumps(content, indent=2))


def _print(result: Difference, left: str, right: str) -> None:
    print(f"A {left}   B {right}")
    print(f"{'topic':<18}{'A':>10}{'B':>10}{'equal':>10}{'different':>11}{'only A':>9}{'only B':>9}")
    for topic, found in result.topics.items():
        print(
            f"{topic:<18}{found.left:>10}{found.right:>10}{found.equal:>10}{found.differing:>11}{found.only_left:>9}"
            f"{found.only_right:>9}"
        )
    for topic, found in result.topics.items():
        if found.first:
            print(f"first in {found.first}")
        for name, each in list(fields_by_change(found))[:FIELDS_SHOWN]:
            numbers = (
                f"   mean |change| {each.sum_abs / each.numbers:.6g}, largest {each.most_abs:.6g}, mean "
                f"{each.sum_signed / each.numbers:+.6g}"
                if each.numbers
                else ""
            )
            print(f"  {topic} {name:<18}{each.records:>9} records{numbers}")
        if len(found.fields) > FIELDS_SHOWN:
            print(f"  {topic} and {len(found.fields) - FIELDS_SHOWN} fields more (--json names all)")
    if result.signals:
        print("confirmed signals   A       B    kept    lost  gained  turned")
        for symbol, change in sorted(result.signals.items()):
            print(
                f"{symbol:<14}{change.left:>7}{change.right:>8}{change.kept:>8}{change.lost:>8}{change.gained:>8}{change.turned:>8}"
            )
    for example in result.examples:
        print(f"  {example}")
    print("the same" if result.same else "they differ")
