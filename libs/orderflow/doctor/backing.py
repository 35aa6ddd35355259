"""The broker, the topics in it, the registry and its schemas."""

from __future__ import annotations

import asyncio
import json
from typing import Any, Final

from aiokafka.admin import AIOKafkaAdminClient
from aiokafka.admin.config_resource import ConfigResource, ConfigResourceType
from aiokafka.errors import KafkaError

from orderflow.cli.backing import answers
from orderflow.doctor.check import Check, http_get, ok, several, warning, wrong
from orderflow.errors import OrderflowError
from orderflow.kafka_embedded.probe import ClusterAnswer, probe
from orderflow.registry.client import NOT_FOUND, RegistryClient, RegistryError, value_subject
from orderflow.streaming.codec import schema_text
from orderflow.streaming.init import topic_settings
from orderflow.topics import TOPICS

START_BROKER: Final = "start one: `docker compose up`, `orderflow kafka up`, or `orderflow run`, which brings its own; or set KAFKA_BOOTSTRAP"
START_REGISTRY: Final = (
    "start one: `docker compose up`, `python -m services.registry --data DIR`, or `orderflow run`, which brings its own; "
    "or set SCHEMA_REGISTRY_URL"
)
LIMITS: Final = {"max.message.bytes"}
"""Settings of a topic that may be larger at the broker than ours."""
HARMFUL: Final = {"cleanup.policy", "max.message.bytes"}
"""Settings of a topic that lose or refuse records where they differ; the others only keep them for another time."""


async def broker(bootstrap: str, required: bool, timeout_sec: float) -> Check:
    """Whether Kafka answers, and whether the addresses that it gives to clients lead to it from here.

    `required`: somebody has named this broker.
    """
    name = "broker"
    silent: list[str] = []
    for address in (part.strip() for part in bootstrap.split(",") if part.strip()):
        host, _, port = address.rpartition(":")
        if not host or not port.isdecimal() or not 0 < int(port) < 65536:
            return wrong(name, f"KAFKA_BOOTSTRAP is {bootstrap!r}", "set it to host:port, several joined by commas")
        answer = await asyncio.to_thread(probe, host, int(port), timeout_sec)
        if answer is not None:
            return await _advertised(address, answer)
        silent.append(address)
    open_ports = [address for address in silent if await asyncio.to_thread(answers, address)]
    if open_ports:
        return wrong(
            name,
            f"something that is no Kafka (or that wants TLS) listens at {several(open_ports)}",
            "set KAFKA_BOOTSTRAP to a plain-text listener of a Kafka broker",
        )
    return (wrong if required else warning)(name, f"nothing answers at {bootstrap}", START_BROKER)


async def _advertised(address: str, answer: ClusterAnswer) -> Check:
    if not answer.brokers:
        return wrong("broker", f"{address} answers, with no broker in its cluster", "look at the broker's log")
    away = [
        f"{host}:{port}" for _, host, port in answer.brokers if not await asyncio.to_thread(answers, f"{host}:{port}")
    ]
    if away:
        return wrong(
            "broker",
            f"{address} answers, and sends clients to {several(away)}, which can't be reached from here",
            "give it an address that can (Kafka: advertised.listeners), or use another of its listeners as KAFKA_BOOTSTRAP",
        )
    return ok("broker", f"{address}, cluster {answer.cluster_id}, {len(answer.brokers)} broker(s)")


async def topics(bootstrap: str, prefix: str, timeout_sec: float) -> list[Check]:
    """Whether all are there, with their partitions, their copies in step, and their settings."""
    admin = AIOKafkaAdminClient(bootstrap_servers=bootstrap, request_timeout_ms=int(timeout_sec * 1000) + 1000)
    try:
        await admin.start()
        present = set(await admin.list_topics())
        names = {prefix + topic.name: topic for topic in TOPICS}
        missing = [name for name in names if name not in present]
        if len(missing) == len(names):
            return [warning("topics", f"none with prefix {prefix!r}", _prefix_remedy(prefix, present))]
        there = [name for name in names if name in present]
        described = await admin.describe_topics(there)
        settings = await _settings(admin, there)
    except (KafkaError, OSError, TimeoutError) as error:
        return [wrong("topics", f"can't be asked for: {error!r}", "look at the broker's log, and at its access rules")]
    finally:
        await admin.close()
    return [_partitions(names, missing, described), _copies(described), _settings_differ(names, settings)]


def _prefix_remedy(prefix: str, present: set[str]) -> str:
    others = sorted(name.removesuffix("market.journal") for name in present if name.endswith("market.journal"))
    if others:
        return f"TOPIC_PREFIX is {prefix!r}; at this broker there are {several([repr(each) for each in others])}"
    return "`orderflow init` makes them (compose and `orderflow run` do so by themselves)"


def _partitions(names: dict[str, Any], missing: list[str], described: list[dict[str, Any]]) -> Check:
    if missing:
        return wrong("topics", f"missing: {several(missing)}", "`orderflow init` makes what is missing")
    differing = [
        f"{each['topic']} has {len(each['partitions'])}, not {names[each['topic']].partitions}"
        for each in described
        if len(each["partitions"]) != names[each["topic"]].partitions
    ]
    if differing:
        return wrong(
            "topics",
            f"partitions: {several(differing)}",
            "records would go astray: delete these topics, or set another TOPIC_PREFIX; then `orderflow init`",
        )
    return ok("topics", f"{len(names)} with the partitions they must have")


def _copies(described: list[dict[str, Any]]) -> Check:
    leaderless = [
        f"{each['topic']}/{partition['partition']}"
        for each in described
        for partition in each["partitions"]
        if partition["leader"] < 0
    ]
    if leaderless:
        return wrong("topics: copies", f"no leader: {several(leaderless)}", "a broker is away: start it again")
    behind = [
        f"{each['topic']}/{partition['partition']}"
        for each in described
        for partition in each["partitions"]
        if len(partition["isr"]) < len(partition["replicas"])
    ]
    if behind:
        return warning("topics: copies", f"not in step: {several(behind)}", "a broker is away, or far behind")
    fewest = min(len(partition["replicas"]) for each in described for partition in each["partitions"])
    return ok("topics: copies", f"in step, {fewest} of each partition")


async def _settings(admin: AIOKafkaAdminClient, names: list[str]) -> dict[str, dict[str, str]]:
    """Topic -> setting -> value at the broker."""
    resources = [ConfigResource(ConfigResourceType.TOPIC, name) for name in names]
    found: dict[str, dict[str, str]] = {}
    for response in await admin.describe_configs(resources):
        for _, _, _, name, entries in (resource[:5] for resource in response.resources):
            found[name] = {entry[0]: entry[1] for entry in entries}
    return found


def _settings_differ(names: dict[str, Any], settings: dict[str, dict[str, str]]) -> Check:
    differing: list[tuple[bool, str]] = []
    for name in sorted(settings):
        for setting, ours in topic_settings(names[name]).items():
            theirs = settings[name].get(setting, ours)
            if theirs != ours and not (setting in LIMITS and int(theirs) > int(ours)):
                differing.append((setting in HARMFUL, f"{name} {setting}={theirs}, ours {ours}"))
    if not differing:
        return ok("topics: settings", "retention and sizes as they must be")
    harmful = any(harm for harm, _ in differing)
    return (wrong if harmful else warning)(
        "topics: settings",
        several([text for _, text in sorted(differing, reverse=True)]),
        "`kafka-configs.sh --alter --entity-type topics --entity-name TOPIC --add-config SETTING=VALUE`, unless it is meant so",
    )


async def registry(url: str, required: bool, timeout_sec: float) -> Check:
    """Whether a Schema Registry answers, and refuses what older readers would break on."""
    name = "registry"
    client = RegistryClient(url, timeout_s=timeout_sec, attempts=1)
    try:
        subjects = await client.subjects()
        _, body = await http_get(f"{client.url}/config", timeout_sec)
        level = json.loads(body).get("compatibilityLevel", "")
    except RegistryError as error:
        return wrong(name, f"{client.url} answers {error.status}", str(error))
    except (OrderflowError, OSError, ValueError, AttributeError):
        return (wrong if required else warning)(name, f"no Schema Registry answers at {client.url}", START_REGISTRY)
    finally:
        await client.close()
    if level != "BACKWARD_TRANSITIVE":
        return warning(
            name,
            f"{client.url}, {len(subjects)} subjects, compatibility {level or 'not told'}",
            "`orderflow init` sets BACKWARD_TRANSITIVE: under a laxer rule a change could break older readers",
        )
    return ok(name, f"{client.url}, {len(subjects)} subjects, {level}")


async def schemas(url: str, prefix: str, timeout_sec: float) -> Check:
    """Whether what is registered is what this code writes, or may be followed by it."""
    client = RegistryClient(url, timeout_s=timeout_sec, attempts=1)
    missing: list[str] = []
    other: list[str] = []
    refused: list[str] = []
    carried = [topic for topic in TOPICS if topic.schema is not None]
    try:
        for topic in carried:
            ours, subject = schema_text(topic.schema or ""), value_subject(prefix + topic.name)
            try:
                registered = await client.latest(subject)
            except RegistryError as error:
                if error.error_code not in NOT_FOUND:
                    raise
                missing.append(subject)
                continue
            if json.loads(registered.schema) == json.loads(ours):
                continue
            reasons = await client.check_compatibility(subject, ours)
            (refused if reasons else other).append(f"{subject}{': ' + reasons[0] if reasons else ''}")
    except (OrderflowError, ValueError) as error:
        return wrong("schemas", "can't be compared", str(error))
    finally:
        await client.close()
    if refused:
        return wrong(
            "schemas",
            f"not compatible with what is registered: {several(refused, 1)}",
            "this code can't write there: take the version that wrote it, or set another TOPIC_PREFIX",
        )
    if missing:
        return warning(
            "schemas", f"{len(missing)} of {len(carried)} not registered: {several(missing)}", "`orderflow init` does"
        )
    if other:
        return warning(
            "schemas",
            f"registered in another version: {several(other)}",
            "it may be followed by this code's, which its services register when they start; other readers may be older",
        )
    return ok("schemas", f"{len(carried)} registered as this code writes them")
