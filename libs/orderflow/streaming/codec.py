"""Avro in Confluent wire format: byte 0, schema id in four bytes (big endian), body.

`seq` and `sub` are the first two fields of every derived schema, so `peek` reads them without decoding the rest.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Awaitable, Callable, Mapping
from io import BytesIO
from typing import Any, Final

import fastavro

from orderflow.errors import LogError
from orderflow.paths import SCHEMAS
from orderflow.processor import Record
from orderflow.streaming.avro_compiled import CompiledDecoder, CompiledEncoder, flat_fields

PREFIX_BYTES: Final = 5


def schema_text(name: str) -> str:
    """The text of `schemas/<name>.avsc`."""
    return (SCHEMAS / f"{name}.avsc").read_text("utf-8")


class Encoder:
    """Writes values of one schema under one registry id."""

    def __init__(self, text: str, schema_id: int) -> None:
        schema = json.loads(text)
        fields = flat_fields(schema)
        self._schema = fastavro.parse_schema(schema)
        self._prefix = struct.pack(">bI", 0, schema_id)
        self._buffer = BytesIO()
        self._compiled = CompiledEncoder(fields, self._prefix) if fields else None

    def __call__(self, record: Record) -> bytes:
        """Encode.

        Raises
        ------
        ValueError, TypeError
            A field is missing or of the wrong type: a defect of the writer.
        """
        if self._compiled is not None:
            encoded = self._compiled(record)
            if encoded is not None:
                return encoded
        buffer = self._buffer
        buffer.seek(0)
        buffer.truncate()
        buffer.write(self._prefix)
        fastavro.schemaless_writer(buffer, self._schema, record)
        return buffer.getvalue()


class Decoder:
    """Reads values of one reader schema, whatever compatible schema wrote them."""

    def __init__(self, text: str, own_id: int, writer_texts: Mapping[int, str] | None = None) -> None:
        schema = json.loads(text)
        fields = flat_fields(schema)
        self._schema = fastavro.parse_schema(schema)
        self._prefix = struct.pack(">bI", 0, own_id)
        self._compiled = CompiledDecoder(fields, PREFIX_BYTES) if fields else None
        self._writers: dict[bytes, Any] = {}
        for schema_id, writer in (writer_texts or {}).items():
            self.add_writer(schema_id, writer)

    @property
    def prefix(self) -> bytes:
        """What values under the own schema id begin with."""
        return self._prefix

    def add_writer(self, schema_id: int, text: str) -> None:
        """Make values written under another id readable."""
        self._writers[struct.pack(">bI", 0, schema_id)] = fastavro.parse_schema(json.loads(text))

    def knows(self, value: bytes) -> bool:
        """Whether `value`'s schema id has been seen."""
        return value.startswith(self._prefix) or value[:PREFIX_BYTES] in self._writers

    def __call__(self, value: bytes) -> Record:
        """Decode.

        Raises
        ------
        LogError
            The value is not in the wire format, or its schema id is not known (see `knows`).
        """
        if value.startswith(self._prefix):
            compiled = self._compiled
            if compiled is not None:
                quick = compiled(value)
                if quick is not None:
                    return quick
            record: Record = fastavro.schemaless_reader(_body(value), self._schema, None)
            if compiled is not None:
                compiled.learn(record)
            return record
        prefix = value[:PREFIX_BYTES]
        writer = self._writers.get(prefix)
        if writer is None:
            raise LogError(f"value with unknown schema prefix {prefix.hex()}: not Avro in Confluent wire format?")
        resolved: Record = fastavro.schemaless_reader(_body(value), writer, self._schema)
        return resolved


def _body(value: bytes) -> BytesIO:
    buffer = BytesIO(value)
    buffer.seek(PREFIX_BYTES)
    return buffer


def schema_id(value: bytes) -> int:
    """Registry id in front of a value."""
    if len(value) < PREFIX_BYTES or value[0] != 0:
        raise LogError(f"value does not begin with the wire format's zero byte: {value[:8].hex()}")
    return int.from_bytes(value[1:PREFIX_BYTES], "big")


def peek(value: bytes) -> tuple[int, int, int]:
    """`seq`, `sub`, and the third field read as a number (an enum's index) from an encoded value.

    Zigzag variable-length integers, as the Avro specification has them.
    """
    position = PREFIX_BYTES
    byte = value[position]
    position += 1
    seq = byte & 0x7F
    shift = 7
    while byte & 0x80:
        byte = value[position]
        position += 1
        seq |= (byte & 0x7F) << shift
        shift += 7
    byte = value[position]
    position += 1
    sub = byte & 0x7F
    shift = 7
    while byte & 0x80:
        byte = value[position]
        position += 1
        sub |= (byte & 0x7F) << shift
        shift += 7
    return (seq >> 1) ^ -(seq & 1), (sub >> 1) ^ -(sub & 1), value[position] >> 1 if position < len(value) else 0


SchemaById = Callable[[int], Awaitable[str]]


class Codecs:
    """The encoders and decoders of one process, by logical topic, over a registry."""

    def __init__(self, ids: Mapping[str, int], schemas: Mapping[str, str], by_id: SchemaById) -> None:
        """`ids` and `schemas` by logical topic; `by_id` fetches an older writer's schema."""
        self._encoders = {topic: Encoder(schemas[topic], schema_id) for topic, schema_id in ids.items()}
        self._decoders = {topic: Decoder(schemas[topic], schema_id) for topic, schema_id in ids.items()}
        self._by_id = by_id

    def encoder(self, topic: str) -> Encoder:
        return self._encoders[topic]

    def decoder(self, topic: str) -> Decoder:
        return self._decoders[topic]

    async def learn(self, topic: str, value: bytes) -> None:
        """Fetch the schema that wrote `value`, so that the topic's decoder can read it."""
        number = schema_id(value)
        self._decoders[topic].add_writer(number, await self._by_id(number))
