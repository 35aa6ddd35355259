"""`orderflow topics`: what exists, how much is in it, how far its readers are behind."""

from __future__ import annotations

import argparse
import asyncio
import json
from typing import Any

from orderflow.cli.common import Reached, add_run_argument, reach
from orderflow.pipeline import STAGES
from orderflow.streaming.log import TP
from orderflow.topics import TOPICS


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser("topics", help="list topics with counts and lag", description=__doc__)
    parser.add_argument("--json", action="store_true", help="one JSON object instead of a table")
    add_run_argument(parser)


def run(args: argparse.Namespace) -> int:
    return asyncio.run(_topics(args))


async def _topics(args: argparse.Namespace) -> int:
    async with reach(args, []) as reached:
        rows = await survey(reached)
        if args.json:
            print(json.dumps(rows, indent=2))
            return 0
        print(f"broker {reached.bootstrap}   prefix {reached.prefix!r}")
        print(f"{'topic':<24}{'records':>12}{'partitions':>12}   lag by group")
        for row in rows:
            lags = "  ".join(f"{group} {lag}" for group, lag in row["lag"].items())
            print(f"{row['topic']:<24}{row['records']:>12}{row['partitions']:>12}   {lags}")
    return 0


async def survey(reached: Reached) -> list[dict[str, Any]]:
    """Per topic: physical records (markers included) and, per reading group, how many are not yet committed."""
    committed = await _committed(reached)
    rows: list[dict[str, Any]] = []
    for topic in TOPICS:
        tps = [TP(reached.prefix + topic.name, partition) for partition in range(topic.partitions)]
        ends = await reached.log.end_offsets(tps)
        begins = await reached.log.begin_offsets(tps)
        lag = {
            group: sum(ends[tp] - offsets[tp] for tp in tps if tp in offsets)
            for group, offsets in committed.items()
            if any(tp in offsets for tp in tps)
        }
        rows.append(
            {
                "topic": topic.name,
                "records": sum(ends.values()) - sum(begins.values()),
                "partitions": topic.partitions,
                "lag": lag,
            }
        )
    return rows


async def _committed(reached: Reached) -> dict[str, dict[TP, int]]:
    from aiokafka.admin import AIOKafkaAdminClient

    admin = AIOKafkaAdminClient(bootstrap_servers=reached.bootstrap)
    await admin.start()
    try:
        found: dict[str, dict[TP, int]] = {}
        for name in [*(stage.name for stage in STAGES), "lake", "sinks"]:
            offsets = await admin.list_consumer_group_offsets(f"{reached.prefix}orderflow.{name}")
            if offsets:
                found[name] = {TP(tp.topic, tp.partition): each.offset for tp, each in offsets.items()}
        return found
    finally:
        await admin.close()
