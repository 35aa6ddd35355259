"""Confluent's own client, serializer and deserializer against our registry, with the schemas of this tree.

The same calls hold for any registry: SCHEMA_REGISTRY_CONTRACT_URL runs them against another one (Karapace, Confluent).
"""

from __future__ import annotations

import asyncio
import io
import json
import os
import uuid

import fastavro
import pytest
from confluent_kafka.schema_registry import Schema, SchemaRegistryClient
from confluent_kafka.schema_registry.avro import AvroDeserializer, AvroSerializer
from confluent_kafka.schema_registry.error import SchemaRegistryError
from confluent_kafka.serialization import MessageField, SerializationContext
from orderflow.paths import SCHEMAS
from orderflow.registry.client import IncompatibleSchemaError, RegistryClient, value_subject
from orderflow.registry.server import RegistryServer
from orderflow.topics import TOPICS

NAMES = sorted(path.stem for path in SCHEMAS.glob("*.avsc"))
SAMPLES = {
    "null": None,
    "boolean": True,
    "int": -7,
    "long": -(2**62),
    "float": 0.5,
    "double": 0.1,
    "string": "BTCUSDT \u00e9",
    "bytes": b"\x00\xff",
}


def text_of(name):
    return (SCHEMAS / f"{name}.avsc").read_text("utf-8")


def sample(kind, last):
    """A value of a type: the first or the last branch of every union, the first or last symbol of every enum."""
    if isinstance(kind, str):
        return SAMPLES[kind]
    if isinstance(kind, list):
        return sample(kind[-1 if last else 0], last)
    if kind["type"] == "record":
        return {field["name"]: sample(field["type"], last) for field in kind["fields"]}
    if kind["type"] == "enum":
        return kind["symbols"][-1 if last else 0]
    if kind["type"] == "array":
        return [sample(kind["items"], last)] * 3 if last else []
    if kind["type"] == "map":
        return {"ETHUSDT": sample(kind["values"], last)} if last else {}
    return sample(kind["type"], last)


def changed(text, **field):
    schema = json.loads(text)
    return json.dumps({**schema, "fields": [*schema["fields"], field]})


def fastavro_body(text, value):
    buffer = io.BytesIO()
    fastavro.schemaless_writer(buffer, fastavro.parse_schema(json.loads(text)), value)
    return buffer.getvalue()


@pytest.fixture
async def url(tmp_path):
    other = os.environ.get("SCHEMA_REGISTRY_CONTRACT_URL")
    if other:
        yield other
        return
    async with RegistryServer(tmp_path, 0) as server:
        yield server.url


@pytest.fixture
def confluent(url):
    """Confluent's client; it blocks, so every use of it runs in a thread beside the server's loop."""
    with SchemaRegistryClient({"url": url, "max.retries": 0}) as client:
        yield client


@pytest.fixture
def topic():
    return f"contract.{uuid.uuid4().hex}"


@pytest.mark.parametrize("name", NAMES)
async def test_serializer_and_deserializer(url, confluent, topic, name):
    text = text_of(name)
    context = SerializationContext(topic, MessageField.VALUE)

    def round_trip():
        serialize = AvroSerializer(confluent, text)
        with SchemaRegistryClient({"url": url}) as another:
            deserialize = AvroDeserializer(another)
            for last in (False, True):
                value = sample(json.loads(text), last)
                data = serialize(value, context)
                assert data[:1] == b"\x00"
                assert data[5:] == fastavro_body(text, value)
                assert deserialize(data, context) == value
                yield int.from_bytes(data[1:5], "big")

    ids = await asyncio.to_thread(lambda: set(round_trip()))
    async with RegistryClient(url) as own:
        assert ids == {await own.register(value_subject(topic), text)}
        assert json.loads(await own.schema_by_id(ids.pop())) == json.loads(text)


async def test_confluent_reads_what_an_older_schema_wrote(url, confluent, topic):
    old = text_of("tick")
    new = changed(old, name="added", type=["null", "long"], default=None)
    context = SerializationContext(topic, MessageField.VALUE)
    value = sample(json.loads(old), True)
    async with RegistryClient(url) as own:
        first = await own.register(value_subject(topic), old)
        second = await own.register(value_subject(topic), new)
    assert second != first
    data = bytes([0]) + first.to_bytes(4, "big") + fastavro_body(old, value)
    read = await asyncio.to_thread(lambda: AvroDeserializer(confluent, new)(data, context))
    assert read == {**value, "added": None}


async def test_serializer_that_may_not_register(confluent, topic):
    text = text_of("command")
    context = SerializationContext(topic, MessageField.VALUE)
    value = sample(json.loads(text), True)

    def check():
        looks_up = AvroSerializer(confluent, text, conf={"auto.register.schemas": False})
        with pytest.raises(SchemaRegistryError) as caught:
            looks_up(value, context)
        assert (caught.value.http_status_code, caught.value.error_code) == (404, 40401)
        schema_id = confluent.register_schema(value_subject(topic), Schema(text, "AVRO"))
        assert looks_up(value, context)[1:5] == schema_id.to_bytes(4, "big")
        latest = AvroSerializer(confluent, text, conf={"auto.register.schemas": False, "use.latest.version": True})
        assert latest(value, context)[1:5] == schema_id.to_bytes(4, "big")

    await asyncio.to_thread(check)


async def test_client_calls(confluent, topic):
    subject = f"{topic}/with a slash-value"
    text = text_of("signal")
    newer = changed(text, name="added", type="long", default=0)

    def check():
        schema_id = confluent.register_schema(subject, Schema(text, "AVRO"))
        assert confluent.register_schema(subject, Schema(json.dumps(json.loads(text), indent=3), "AVRO")) == schema_id
        assert confluent.register_schema_full_response(subject, Schema(newer, "AVRO")).schema_id > 0
        confluent.clear_caches()
        assert json.loads(confluent.get_schema(schema_id).schema_str) == json.loads(text)
        assert subject in confluent.get_subjects()
        assert confluent.get_versions(subject) == [1, 2]
        assert confluent.get_version(subject, 1).schema_id == schema_id
        latest = confluent.get_latest_version(subject)
        assert (latest.subject, latest.version, json.loads(latest.schema.schema_str)) == (subject, 2, json.loads(newer))
        assert confluent.lookup_schema(subject, Schema(text, "AVRO")).version == 1
        assert subject in confluent.get_subjects_by_schema_id(schema_id)
        assert (subject, 1) in [(each.subject, each.version) for each in confluent.get_schema_versions(schema_id)]
        assert "AVRO" in confluent.get_schema_types()
        assert confluent.get_referenced_by(subject, 1) == []
        assert confluent.delete_version(subject, 2) == 2
        assert confluent.delete_subject(subject) == [1]
        assert confluent.delete_subject(subject, permanent=True)
        assert subject not in confluent.get_subjects(deleted=True)

    await asyncio.to_thread(check)


async def test_incompatible_change_is_refused_by_both_clients(url, confluent, topic):
    subject = value_subject(topic)
    text = text_of("row")
    bad = changed(text, name="added", type="long")

    def check():
        confluent.set_compatibility(subject, "BACKWARD_TRANSITIVE")
        confluent.register_schema(subject, Schema(text, "AVRO"))
        assert confluent.test_compatibility(subject, Schema(text, "AVRO"))
        assert not confluent.test_compatibility(subject, Schema(bad, "AVRO"))
        assert not confluent.test_compatibility_all_versions(subject, Schema(bad, "AVRO"), verbose=True)
        with pytest.raises(SchemaRegistryError) as caught:
            confluent.register_schema(subject, Schema(bad, "AVRO"))
        assert caught.value.http_status_code == 409
        with pytest.raises(SchemaRegistryError) as caught:
            AvroSerializer(confluent, bad)(
                {**sample(json.loads(text), True), "added": 1}, SerializationContext(topic, MessageField.VALUE)
            )
        assert caught.value.http_status_code == 409

    await asyncio.to_thread(check)
    async with RegistryClient(url) as own:
        with pytest.raises(IncompatibleSchemaError, match="added"):
            await own.register(subject, bad)
        assert await own.check_compatibility(subject, text) == []
        assert await own.check_compatibility(subject, bad)


async def test_configuration_and_errors(confluent, topic):
    subject = value_subject(topic)

    def check():
        with pytest.raises(SchemaRegistryError) as caught:
            confluent.get_compatibility(subject)
        assert caught.value.error_code == 40408
        assert confluent.set_compatibility(subject, "FULL") == {"compatibility": "FULL"}
        assert confluent.get_compatibility(subject) == "FULL"
        assert confluent.get_config(subject).compatibility_level.value == "FULL"
        confluent.delete_config(subject)
        assert confluent.get_global_mode() == "READWRITE"
        for call, code in (
            (lambda: confluent.get_latest_version(subject), 40401),
            (lambda: confluent.get_schema(2**31 - 1), 40403),
            (lambda: confluent.register_schema(subject, Schema('{"type":"bogus"}', "AVRO")), 42201),
            (lambda: confluent.set_compatibility(subject, "SIDEWAYS"), 42203),
        ):
            with pytest.raises(SchemaRegistryError) as caught:
                call()
            assert caught.value.error_code == code

    await asyncio.to_thread(check)


async def test_every_topic_under_one_prefix(url, topic):
    """As the initialiser does it: one subject a topic, the same schema the same id."""
    wanted = {value_subject(f"{topic}.{each.name}"): each.schema for each in TOPICS if each.schema}
    async with RegistryClient(url) as own:
        ids = {subject: await own.register(subject, text_of(name)) for subject, name in wanted.items()}
        again = {
            subject: await own.register(value_subject("again." + subject), text_of(name))
            for subject, name in wanted.items()
        }
        assert again == ids
        assert set(wanted) <= set(await own.subjects())
    assert len(set(ids.values())) == len(set(wanted.values()))
