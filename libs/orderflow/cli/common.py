"""What the commands that look at a run share: finding it, reaching it, decoding its topics."""

from __future__ import annotations

import argparse
import os
from collections.abc import AsyncIterator, Iterable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from aiokafka.admin import AIOKafkaAdminClient
from aiokafka.errors import KafkaError

from orderflow.cli import runs
from orderflow.config import Config, effective_fingerprint, load
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
    began_with: str
    """Fingerprint of the settings that the run began with; empty where it is not known."""
    registry: RegistryClient

    def check_settings(self) -> None:
        """That the settings are those the run began with.

        Raises
        ------
        OrderflowError
            They are not: a recomputation would differ for that reason alone.
        """
        effective = effective_fingerprint(self.config)
        if self.began_with and self.began_with != effective:
            raise OrderflowError(
                f"the run began under the settings {self.began_with[:12]}, and these are {effective[:12]}: a recomputation "
                "would differ for that reason alone; restore infra/config and ORDERFLOW_CONFIG as they were, and give "
                "what is meant to differ to `orderflow replay --set`"
            )


def add_run_argument(parser: argparse.ArgumentParser) -> None:
    """`--run DIR` and `--prefix P`."""
    parser.add_argument(
        "--run", metavar="DIR", help="folder of a run (default: the newest; with KAFKA_BOOTSTRAP set: none)"
    )
    parser.add_argument(
        "--prefix", "--topic-prefix", metavar="P", help="topic prefix (default: the run's, or TOPIC_PREFIX)"
    )


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


async def check_topics(bootstrap: str, prefix: str, topics: Iterable[str]) -> None:
    """That topics exist under a prefix: asking Kafka for offsets of others would only time out.

    Raises
    ------
    OrderflowError
        They do not, or no broker answers.
    """
    admin = AIOKafkaAdminClient(bootstrap_servers=bootstrap)
    try:
        await admin.start()
        present = set(await admin.list_topics())
    except KafkaError as error:
        raise OrderflowError(f"no Kafka broker answers at {bootstrap!r}: {error}; start it, or name another") from error
    finally:
        await admin.close()
    missing = [topic for topic in topics if prefix + topic not in present]
    if missing:
        raise OrderflowError(
            f"there is no topic {prefix + missing[0]!r} at {bootstrap}: is the prefix {prefix!r} right? "
            "`orderflow init` makes the topics of a new deployment"
        )


@asynccontextmanager
async def reach(args: argparse.Namespace, topics: list[str], *, check: bool = True) -> AsyncIterator[Reached]:
    """Connect to the run that the arguments name; its embedded broker and registry run as long as this lasts.

    `check`: that these topics exist (none named: all); else only the broker is looked for.
    """
    async with AsyncExitStack() as stack:
        out: Path | None = None
        began_with = ""
        environment = dict(os.environ)
        if args.run or not os.environ.get("KAFKA_BOOTSTRAP"):
            out = runs.resolve(args.run)
            info = runs.load(out)
            bootstrap, registry_url = await runs.reach(stack, out, info)
            environment = {**environment, **info.environment}
            prefix = info.topic_prefix
            began_with = info.config_fingerprint
        else:
            runtime = load().runtime
            bootstrap, registry_url, prefix = runtime.kafka_bootstrap, runtime.schema_registry_url, runtime.topic_prefix
        if getattr(args, "prefix", None) is not None:
            prefix = args.prefix
        await check_topics(bootstrap, prefix, (topics or BY_NAME) if check else ())
        registry = RegistryClient(registry_url)
        stack.push_async_callback(registry.close)
        codecs = await codecs_for(registry, prefix, topics)
        log = KafkaLog(bootstrap, client_id="orderflow-cli")
        await log.start()
        stack.push_async_callback(log.close)
        yield Reached(log, codecs, load(environment), prefix, bootstrap, out, began_with, registry)
