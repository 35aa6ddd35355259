"""What the commands that look at a run share: finding it, reaching it, decoding its topics."""

from __future__ import annotations

import argparse
import os
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from orderflow.cli import runs
from orderflow.config import Config, load
from orderflow.errors import OrderflowError
from orderflow.registry.client import RegistryClient
from orderflow.streaming.codec import Codecs
from orderflow.streaming.init import codecs_for
from orderflow.streaming.kafka_log import KafkaLog
from orderflow.topics import BY_NAME, TOPICS


@dataclass(frozen=True, slots=True)
class Reached:
    """A run (or a deployment named by the environment), reached."""

    log: KafkaLog
    codecs: Codecs
    config: Config
    prefix: str
    bootstrap: str
    out: Path | None


def add_run_argument(parser: argparse.ArgumentParser) -> None:
    """`--run DIR` and `--prefix P`."""
    parser.add_argument(
        "--run", metavar="DIR", help="folder of a run (default: the newest; with KAFKA_BOOTSTRAP set: none)"
    )
    parser.add_argument("--prefix", help="topic prefix (default: the run's, or TOPIC_PREFIX)")


def topic_named(name: str) -> str:
    """A logical topic that carries Avro.

    Raises
    ------
    OrderflowError
        There is no such topic.
    """
    topic = BY_NAME.get(name)
    if topic is None or topic.schema is None:
        known = ", ".join(each.name for each in TOPICS if each.schema)
        raise OrderflowError(f"no topic {name!r}; there are: {known}")
    return name


@asynccontextmanager
async def reach(args: argparse.Namespace, topics: list[str]) -> AsyncIterator[Reached]:
    """Connect to the run that the arguments name; its embedded broker and registry run as long as this lasts."""
    async with AsyncExitStack() as stack:
        out: Path | None = None
        environment = dict(os.environ)
        if args.run or not os.environ.get("KAFKA_BOOTSTRAP"):
            out = runs.resolve(args.run)
            info = runs.load(out)
            bootstrap, registry_url = await runs.reach(stack, out, info)
            environment = {**environment, **info.environment}
            prefix = info.topic_prefix
        else:
            runtime = load().runtime
            bootstrap, registry_url, prefix = runtime.kafka_bootstrap, runtime.schema_registry_url, runtime.topic_prefix
        if getattr(args, "prefix", None) is not None:
            prefix = args.prefix
        registry = RegistryClient(registry_url)
        stack.push_async_callback(registry.close)
        codecs = await codecs_for(registry, prefix, topics)
        log = KafkaLog(bootstrap, client_id="orderflow-cli")
        await log.start()
        stack.push_async_callback(log.close)
        yield Reached(log, codecs, load(environment), prefix, bootstrap, out)
