"""`orderflow init`: create the topics and register the schemas of a deployment, in fixed order. Safe to repeat."""

from __future__ import annotations

import argparse
import asyncio
from typing import Any

from orderflow.config import load
from orderflow.registry.client import RegistryClient
from orderflow.streaming.init import create_topics, register_schemas, set_compatibility


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser("init", help="create topics, register schemas", description=__doc__)
    parser.add_argument(
        "--replication", type=int, metavar="N", help="replicas of each topic (default: 3, or 1 below 3 brokers)"
    )


def run(args: argparse.Namespace) -> int:
    return asyncio.run(_init(args.replication))


async def _init(replication: int | None) -> int:
    runtime = load().runtime
    made = await create_topics(runtime.kafka_bootstrap, runtime.topic_prefix, replication=replication)
    registry = RegistryClient(runtime.schema_registry_url)
    try:
        await set_compatibility(registry)
        ids = await register_schemas(registry, runtime.topic_prefix)
    finally:
        await registry.close()
    print(f"{made} topics made, {len(ids)} schemas registered, prefix {runtime.topic_prefix!r}")
    return 0
