"""Topics and schemas, created in the order of the table by one initialiser; services wait for them."""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import Iterable, Sequence
from typing import Any, Final

from aiokafka.admin import AIOKafkaAdminClient, NewTopic
from aiokafka.errors import KafkaConnectionError, KafkaError, TopicAlreadyExistsError

from orderflow.errors import ConfigError, LogError
from orderflow.registry.client import RegistryClient
from orderflow.streaming.codec import Codecs, schema_text
from orderflow.topics import BY_NAME, TOPICS, Topic

logger = logging.getLogger(__name__)

WAIT_SEC: Final = 60.0
POLL_SEC: Final = 0.2
MAX_MESSAGE_BYTES: Final = 8 << 20
STATE_BYTES: Final = 64 << 20
"""Of snapshots kept per partition of state."""
COPIES: Final = 3
"""Of each topic where there are brokers enough; how many of them a write needs is the broker's min.insync.replicas."""
TOPIC_EXISTS: Final = 36
"""Kafka's error code of a topic that somebody else has made meanwhile."""
LONGEST_PREFIX: Final = 200
"""Kafka takes names of up to 249 characters, and a group's name is the prefix and a little more."""


def check_prefix(prefix: str) -> None:
    """That Kafka takes topic names which begin so.

    Raises
    ------
    ConfigError
        It does not; names the prefix and what is allowed.
    """
    if not re.fullmatch(rf"[A-Za-z0-9._-]{{0,{LONGEST_PREFIX}}}", prefix):
        raise ConfigError(
            f"TOPIC_PREFIX is {prefix!r}: it must be at most {LONGEST_PREFIX} letters, digits, dots, underscores and "
            "hyphens, as in desk1."
        )


async def _admin(bootstrap: str) -> AIOKafkaAdminClient:
    admin = AIOKafkaAdminClient(bootstrap_servers=bootstrap, request_timeout_ms=30_000)
    loop = asyncio.get_running_loop()
    deadline = loop.time() + WAIT_SEC / 2
    while True:
        try:
            await admin.start()
            return admin
        except KafkaConnectionError as error:
            if loop.time() > deadline:
                await admin.close()
                raise LogError(
                    f"no Kafka broker answered at {bootstrap!r} for {WAIT_SEC / 2:g} s: {error}; start one with "
                    "`orderflow kafka up` or set KAFKA_BOOTSTRAP"
                ) from error
            await asyncio.sleep(POLL_SEC)


def topic_settings(topic: Topic) -> dict[str, str]:
    """Settings of a topic at the broker."""
    settings = {"cleanup.policy": "delete", "max.message.bytes": str(MAX_MESSAGE_BYTES)}
    if topic.bounded_by_size:
        return settings | {
            "retention.ms": "-1",
            "retention.bytes": str(STATE_BYTES),
            "segment.bytes": str(STATE_BYTES // 4),
        }
    return settings | {"retention.ms": str(topic.retention_ms)}


async def create_topics(
    bootstrap: str, prefix: str, topics: Sequence[Topic] = TOPICS, replication: int | None = None
) -> int:
    """Create what is missing; returns how many topics were made.

    `replication` is 3 by default on a cluster of three brokers or more, else 1.

    Raises
    ------
    ConfigError
        Kafka does not take names with this prefix.
    LogError
        The broker refuses, or a topic exists with another number of partitions.
    """
    check_prefix(prefix)
    admin = await _admin(bootstrap)
    try:
        if replication is None:
            brokers = len((await admin.describe_cluster())["brokers"])
            replication = COPIES if brokers >= COPIES else 1
        wanted = [
            NewTopic(
                prefix + topic.name,
                num_partitions=topic.partitions,
                replication_factor=replication,
                topic_configs=topic_settings(topic),
            )
            for topic in topics
        ]
        existing = set(await admin.list_topics())
        missing = [topic for topic in wanted if topic.name not in existing]
        if missing:
            try:
                _check_created(await admin.create_topics(missing), bootstrap)
            except TopicAlreadyExistsError:
                logger.info("another initialiser made the topics at the same time")
            except KafkaError as error:
                raise LogError(f"topics of prefix {prefix!r} can't be created at {bootstrap}: {error!r}") from error
        await _check(admin, {prefix + topic.name: topic.partitions for topic in topics})
        return len(missing)
    finally:
        await admin.close()


def _check_created(response: Any, bootstrap: str) -> None:
    """The broker answers for each topic by itself; without this its reason would be lost."""
    for name, code, *reason in response.topic_errors:
        if code not in (0, TOPIC_EXISTS):
            why = next((text for text in reason if text), f"Kafka's error {code}")
            raise LogError(f"topic {name} can't be created at {bootstrap}: {why}; choose another TOPIC_PREFIX")


async def _check(admin: AIOKafkaAdminClient, partitions: dict[str, int]) -> None:
    loop = asyncio.get_running_loop()
    deadline = loop.time() + WAIT_SEC
    while True:
        described = {each["topic"]: len(each["partitions"]) for each in await admin.describe_topics(list(partitions))}
        wrong = {
            name: described.get(name, 0)
            for name, count in partitions.items()
            if described.get(name, 0) not in (0, count)
        }
        if wrong:
            name, count = min(wrong.items())
            raise LogError(
                f"topic {name} has {count} partitions and must have {partitions[name]}: delete it, or set another "
                "TOPIC_PREFIX"
            )
        if all(described.get(name) == count for name, count in partitions.items()):
            return
        if loop.time() > deadline:
            raise LogError(
                f"topics did not come to be within {WAIT_SEC:g} s: {sorted(set(partitions) - set(described))}"
            )
        await asyncio.sleep(POLL_SEC)


async def wait_for_topics(bootstrap: str, prefix: str, topics: Iterable[str]) -> None:
    """Until the initialiser has made them.

    Raises
    ------
    LogError
        They are not there within 60 s.
    """
    names = {prefix + topic for topic in topics}
    admin = await _admin(bootstrap)
    try:
        loop = asyncio.get_running_loop()
        deadline = loop.time() + WAIT_SEC
        while True:
            missing = names - set(await admin.list_topics())
            if not missing:
                return
            if loop.time() > deadline:
                raise LogError(
                    f"topics are missing at {bootstrap}: {', '.join(sorted(missing))}; run `orderflow init` "
                    f"(TOPIC_PREFIX={prefix!r})"
                )
            await asyncio.sleep(POLL_SEC)
    finally:
        await admin.close()


async def register_schemas(
    registry: RegistryClient, prefix: str, topics: Iterable[str] | None = None
) -> dict[str, int]:
    """Register the schema of each topic (idempotent), in the order of the table; returns ids by logical topic.

    Raises
    ------
    LogError
        The registry does not answer, or refuses a schema as incompatible.
    """
    wanted = [topic for topic in TOPICS if topic.schema is not None and (topics is None or topic.name in set(topics))]
    ids: dict[str, int] = {}
    for topic in wanted:
        assert topic.schema is not None
        ids[topic.name] = await registry.register(f"{prefix}{topic.name}-value", schema_text(topic.schema))
    return ids


async def set_compatibility(registry: RegistryClient) -> None:
    """Make the registry refuse what an older reader or writer would break on: its own default may be laxer."""
    await registry.set_compatibility("BACKWARD_TRANSITIVE")


async def codecs_for(registry: RegistryClient, prefix: str, topics: Iterable[str]) -> Codecs:
    """Encoders and decoders of these topics."""
    names = [name for name in topics if BY_NAME[name].schema is not None]
    ids = await register_schemas(registry, prefix, names)
    schemas = {name: schema_text(BY_NAME[name].schema or "") for name in names}
    return Codecs(ids, schemas, registry.schema_by_id)
