"""Generated Avro code gives fastavro's bytes and values, and leaves to fastavro whatever it is not sure of."""

from __future__ import annotations

import json
from io import BytesIO
from typing import Any

import fastavro
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from orderflow.streaming.avro_compiled import CompiledDecoder, CompiledEncoder, flat_fields, read_long, write_long
from orderflow.streaming.codec import PREFIX_BYTES, Decoder, Encoder, schema_text
from orderflow.topics import TOPICS

LONGS = st.integers(-(2**63), 2**63 - 1) | st.integers(-200, 9000) | st.integers(1_700_000_000_000, 1_700_000_100_000)
DOUBLES = st.floats(width=64) | st.sampled_from([0.0, -0.0, 5e-324, 1e308])
TEXTS = st.text(max_size=200) | st.sampled_from(["", "BTCUSDT", "neutral"])
SCHEMAS = sorted({topic.schema for topic in TOPICS if topic.schema is not None})


def values_of(kind: Any, named: dict[str, Any]) -> st.SearchStrategy[Any]:
    """Values of an Avro type, as the processors give them."""
    if isinstance(kind, list):
        return st.one_of(*(values_of(branch, named) for branch in kind))
    if isinstance(kind, dict) and kind["type"] == "enum":
        named[kind["name"]] = kind
        return st.sampled_from(kind["symbols"])
    if isinstance(kind, dict) and kind["type"] == "array":
        return st.lists(values_of(kind["items"], named), max_size=70)
    if isinstance(kind, dict) and kind["type"] == "map":
        return st.dictionaries(st.text(max_size=5), values_of(kind["values"], named), max_size=3)
    plain = {
        "null": st.none(),
        "long": LONGS,
        "int": st.integers(-(2**31), 2**31 - 1),
        "double": DOUBLES,
        "boolean": st.booleans(),
        "string": TEXTS,
        "bytes": st.binary(max_size=300),
    }
    return plain[kind] if kind in plain else values_of(named[kind], named)


def records_of(schema: dict[str, Any]) -> st.SearchStrategy[dict[str, Any]]:
    named: dict[str, Any] = {}
    return st.fixed_dictionaries({field["name"]: values_of(field["type"], named) for field in schema["fields"]})


def by_fastavro(schema: dict[str, Any], record: dict[str, Any]) -> bytes:
    buffer = BytesIO()
    fastavro.schemaless_writer(buffer, fastavro.parse_schema(schema), record)
    return buffer.getvalue()


@pytest.mark.parametrize("name", SCHEMAS)
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_bytes_and_values_are_those_of_fastavro(name: str, data: st.DataObject) -> None:
    text = schema_text(name)
    schema = json.loads(text)
    encode, decode = Encoder(text, 7), Decoder(text, 7)
    for record in data.draw(st.lists(records_of(schema), min_size=1, max_size=6)):
        expected = by_fastavro(json.loads(text), record)
        for _ in range(3):  # the first is fastavro's and teaches, the second seeks, the third knows the length
            value = encode(record)
            assert value[PREFIX_BYTES:] == expected
            assert repr(decode(value)) == repr(
                fastavro.schemaless_reader(BytesIO(expected), fastavro.parse_schema(json.loads(text)), None)
            )


@pytest.mark.parametrize("name", [name for name in SCHEMAS if name != "tick"])
def test_every_schema_but_the_ticks_with_their_maps_is_compiled(name: str) -> None:
    assert flat_fields(json.loads(schema_text(name))) is not None


@given(number=LONGS)
def test_longs_come_back(number: int) -> None:
    encoded = write_long(number)
    assert encoded == by_fastavro(
        {"type": "record", "name": "R", "fields": [{"name": "x", "type": "long"}]}, {"x": number}
    )
    assert read_long(encoded, 0) == (number, len(encoded))


SMALL = {
    "type": "record",
    "name": "Small",
    "fields": [
        {"name": "seq", "type": "long"},
        {"name": "sub", "type": "int"},
        {"name": "side", "type": {"type": "enum", "name": "Side", "symbols": ["buy", "sell"]}},
        {"name": "price", "type": ["null", "double"]},
        {"name": "note", "type": ["null", "string"], "default": None},
        {"name": "levels", "type": {"type": "array", "items": "double"}},
    ],
}
GOOD = {"seq": 5, "sub": 0, "side": "sell", "price": 2.5, "note": None, "levels": [1.0, 2.0]}


@pytest.mark.parametrize(
    "change",
    [
        {"price": True},
        {"price": "2.5"},
        {"side": "hold"},
        {"side": None},
        {"seq": 2**63},
        {"seq": 1.5},
        {"levels": [1.0, None]},
        {"levels": None},
        {"note": 3},
        {"note": "\ud800"},
    ],
)
def test_a_value_that_does_not_fit_is_left_to_fastavro(change: dict[str, Any]) -> None:
    fields = flat_fields(SMALL)
    assert fields is not None
    encode = CompiledEncoder(fields, b"")
    assert encode(GOOD) == by_fastavro(SMALL, GOOD)
    assert encode(GOOD | change) is None
    try:
        expected = by_fastavro(SMALL, GOOD | change)
    except Exception as error:
        with pytest.raises(type(error)):
            Encoder(json.dumps(SMALL), 1)(GOOD | change)
    else:
        assert Encoder(json.dumps(SMALL), 1)(GOOD | change)[PREFIX_BYTES:] == expected


def test_a_missing_field_is_left_to_fastavro() -> None:
    without = {name: value for name, value in GOOD.items() if name != "note"}
    assert Encoder(json.dumps(SMALL), 1)(without)[PREFIX_BYTES:] == by_fastavro(SMALL, GOOD)


@settings(max_examples=300)
@given(cut=st.integers(0, 30), at=st.integers(0, 40), byte=st.integers(0, 255))
def test_a_damaged_value_is_never_read_otherwise_than_by_fastavro(cut: int, at: int, byte: int) -> None:
    fields = flat_fields(SMALL)
    assert fields is not None
    decode = CompiledDecoder(fields, 0)
    decode.learn(GOOD)
    whole = by_fastavro(SMALL, GOOD)
    assert decode(whole) == GOOD
    damaged = bytearray(whole[: len(whole) - cut])
    if at < len(damaged):
        damaged[at] = byte
    got = decode(bytes(damaged))
    if got is not None:
        parsed = fastavro.parse_schema(SMALL)
        assert repr(got) == repr(fastavro.schemaless_reader(BytesIO(bytes(damaged)), parsed, None))


def test_combinations_beyond_the_bound_are_fastavros() -> None:
    names = [f"x{number}" for number in range(8)]
    schema = {
        "type": "record",
        "name": "Wide",
        "fields": [{"name": name, "type": ["null", "double"]} for name in names],
    }
    encode, decode = Encoder(json.dumps(schema), 1), Decoder(json.dumps(schema), 1)
    for mask in range(256):
        record = {name: None if mask >> bit & 1 else float(bit) for bit, name in enumerate(names)}
        value = encode(record)
        assert value[PREFIX_BYTES:] == by_fastavro(schema, record)
        assert decode(value) == record
