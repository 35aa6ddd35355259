"""Validity, identity and compatibility of schemas; each verdict is held against what fastavro can really read."""

from __future__ import annotations

import hashlib
import io
import json

import avro.schema
import fastavro
import pytest
from fastavro.read import SchemaResolutionError
from orderflow.paths import SCHEMAS
from orderflow.registry.compatibility import (
    Level,
    SchemaError,
    canonical_text,
    fingerprint,
    incompatibilities,
    parse,
    problems,
)


def record(*fields, name="R", **more):
    return {"type": "record", "name": name, "namespace": "orderflow", "fields": list(fields), **more}


def field(name, kind, **more):
    return {"name": name, "type": kind, **more}


def enum(*symbols, name="E", **more):
    return {"type": "enum", "name": name, "symbols": list(symbols), **more}


def array(items):
    return {"type": "array", "items": items}


def mapping(values):
    return {"type": "map", "values": values}


def inner(*fields, name="Inner", **more):
    return {"type": "record", "name": name, "fields": list(fields), **more}


LONG = field("a", "long")

READABLE = {
    "same": (record(LONG), record(LONG), {"a": 1}),
    "field with default added": (record(LONG, field("b", "long", default=3)), record(LONG), {"a": 1}),
    "field dropped": (record(LONG), record(LONG, field("b", "string")), {"a": 1, "b": "x"}),
    "fields in another order": (
        record(field("b", "string"), LONG),
        record(LONG, field("b", "string")),
        {"a": 1, "b": "x"},
    ),
    "field renamed with alias": (record(field("b", "long", aliases=["a"])), record(LONG), {"a": 1}),
    "record renamed, alias not qualified": (
        record(LONG, name="New", aliases=["Old"]),
        record(LONG, name="Old"),
        {"a": 1},
    ),
    "record renamed, alias qualified": (
        record(LONG, name="New", aliases=["orderflow.Old"]),
        record(LONG, name="Old"),
        {"a": 1},
    ),
    "inner record renamed, alias inherits the namespace": (
        record(field("x", inner(LONG, name="New", aliases=["Old"]))),
        record(field("x", inner(LONG, name="Old"))),
        {"x": {"a": 1}},
    ),
    "inner record renamed in a union": (
        record(field("x", ["null", inner(LONG, name="New", aliases=["Old"])])),
        record(field("x", ["null", inner(LONG, name="Old")])),
        {"x": {"a": 1}},
    ),
    "enum symbol added": (record(field("e", enum("a", "b"))), record(field("e", enum("a"))), {"e": "a"}),
    "enum symbol dropped, default": (
        record(field("e", enum("a", "u", default="u"))),
        record(field("e", enum("a", "b", "u"))),
        {"e": "b"},
    ),
    "enum symbol dropped, default, in a union": (
        record(field("e", ["null", enum("a", "u", default="u")])),
        record(field("e", ["null", enum("a", "b", "u")])),
        {"e": "b"},
    ),
    "made nullable": (record(field("a", ["null", "long"])), record(LONG), {"a": 1}),
    "made nullable and wider": (record(field("a", ["null", "double"])), record(LONG), {"a": 1}),
    "wider within a union": (record(field("a", ["null", "long"])), record(field("a", ["null", "int"])), {"a": 1}),
    "union narrowed to what can be promoted": (record(LONG), record(field("a", ["int", "long"])), {"a": 1}),
    "union of records in another order": (
        record(field("a", ["null", inner(field("q", "long"), name="B"), inner(field("p", "long"), name="A")])),
        record(field("a", ["null", inner(field("p", "long"), name="A"), inner(field("q", "long"), name="B")])),
        {"a": ("orderflow.B", {"q": 1})},
    ),
    "long to double": (record(field("a", "double")), record(LONG), {"a": 1}),
    "int to float": (record(field("a", "float")), record(field("a", "int")), {"a": 1}),
    "bytes to string": (record(field("a", "string")), record(field("a", "bytes")), {"a": b"x"}),
    "string to bytes": (record(field("a", "bytes")), record(field("a", "string")), {"a": "x"}),
    "array of wider": (record(field("a", array("double"))), record(field("a", array("long"))), {"a": [1]}),
    "recursive": (
        record(LONG, field("next", ["null", "R"], default=None), field("b", "int", default=0)),
        record(LONG, field("next", ["null", "R"], default=None)),
        {"a": 1, "next": {"a": 2, "next": None}},
    ),
}

UNREADABLE = {
    "field without default added": (
        record(LONG, field("b", "long")),
        record(LONG),
        {"a": 1},
        ["R.b: the field is missing in the writer and has no default"],
    ),
    "enum field added, default of the enum only": (
        record(LONG, field("e", enum("a", "u", default="u"))),
        record(LONG),
        {"a": 1},
        ["R.e: the field is missing in the writer and has no default"],
    ),
    "field renamed": (record(field("b", "long")), record(LONG), {"a": 1}, ["R.b: the field is missing"]),
    "record renamed": (record(LONG, name="New"), record(LONG, name="Old"), {"a": 1}, ["New: the record is named"]),
    "alias of another namespace": (
        record(LONG, name="New", aliases=["other.Old"]),
        record(LONG, name="Old"),
        {"a": 1},
        ["New: the record is named 'orderflow.New' here and 'orderflow.Old' in the writer"],
    ),
    "enum symbol dropped": (
        record(field("e", enum("a"))),
        record(field("e", enum("a", "b"))),
        {"e": "b"},
        ["R.e: the enum 'orderflow.E' lacks 'b' of the writer and has no default"],
    ),
    "enum renamed": (
        record(field("e", enum("a", name="New"))),
        record(field("e", enum("a", name="Old"))),
        {"e": "a"},
        ["R.e: the enum is named 'orderflow.New' here"],
    ),
    "double to float": (
        record(field("a", "float")),
        record(field("a", "double")),
        {"a": 1.5},
        ["R.a: float cannot read double"],
    ),
    "no longer nullable": (
        record(LONG),
        record(field("a", ["null", "long"])),
        {"a": None},
        ["R.a: long cannot read null"],
    ),
    "double to nullable float": (
        record(field("a", ["null", "float"])),
        record(field("a", "double")),
        {"a": 1.5},
        ["R.a: none of the types [null, float] can read double"],
    ),
    "union branch dropped": (
        record(field("a", ["null", "long"])),
        record(field("a", ["null", "long", "string"])),
        {"a": "x"},
        ["R.a: none of the types [null, long] can read string"],
    ),
    "enum symbol dropped in a union": (
        record(field("e", ["null", enum("a")])),
        record(field("e", ["null", enum("a", "b")])),
        {"e": "b"},
        ["R.e: the enum 'orderflow.E' lacks 'b'"],
    ),
    "in an array of records": (
        record(field("x", array(inner(LONG, field("b", "int"))))),
        record(field("x", array(inner(LONG)))),
        {"x": [{"a": 1}]},
        ["R.x[].b: the field is missing"],
    ),
    "in a map": (
        record(field("x", mapping("int"))),
        record(field("x", mapping("long"))),
        {"x": {"k": 1}},
        ["R.x{}: int cannot read long"],
    ),
    "array to map": (
        record(field("x", mapping("int"))),
        record(field("x", array("int"))),
        {"x": [1]},
        ["R.x: map cannot read array"],
    ),
    "fixed of another size": (
        record(field("x", {"type": "fixed", "name": "F", "size": 4})),
        record(field("x", {"type": "fixed", "name": "F", "size": 2})),
        {"x": b"ab"},
        ["R.x: 4 bytes here, 2 in the writer"],
    ),
    "two at once": (
        record(field("a", "int"), field("b", "long")),
        record(LONG),
        {"a": 1},
        ["R.a: int cannot read long", "R.b: the field is missing"],
    ),
    "inside a recursion": (
        record(field("b", "long"), field("next", ["null", "R"], default=None)),
        record(LONG, field("next", ["null", "R"], default=None)),
        {"a": 1, "next": None},
        ["R.b: the field is missing"],
    ),
}


def fastavro_reads(reader, writer, value):
    buffer = io.BytesIO()
    fastavro.schemaless_writer(buffer, fastavro.parse_schema(writer), value)
    buffer.seek(0)
    return fastavro.schemaless_reader(buffer, fastavro.parse_schema(writer), fastavro.parse_schema(reader))


@pytest.mark.parametrize("case", READABLE)
def test_compatible_pairs_are_really_read(case):
    reader, writer, value = READABLE[case]
    assert incompatibilities(json.dumps(reader), json.dumps(writer)) == []
    fastavro_reads(reader, writer, value)


@pytest.mark.parametrize("case", UNREADABLE)
def test_incompatible_pairs_name_the_field(case):
    reader, writer, value, expected = UNREADABLE[case]
    found = incompatibilities(json.dumps(reader), json.dumps(writer))
    assert len(found) == len(expected), found
    for message, beginning in zip(found, expected):
        assert message.startswith(beginning)
    with pytest.raises(SchemaResolutionError):
        fastavro_reads(reader, writer, value)


V1 = json.dumps(record(LONG))
V2 = json.dumps(record(LONG, field("b", "long", default=0)))
V3_DROPS_DEFAULT = json.dumps(record(LONG, field("b", "long")))
"""Reads what V2 wrote and not what V1 wrote."""


@pytest.mark.parametrize(
    ("level", "refused"),
    [
        (Level.NONE, False),
        (Level.BACKWARD, False),
        (Level.BACKWARD_TRANSITIVE, True),
        (Level.FORWARD, False),
        (Level.FORWARD_TRANSITIVE, False),
        (Level.FULL, False),
        (Level.FULL_TRANSITIVE, True),
    ],
)
def test_transitive_levels_look_at_every_version(level, refused):
    found = problems(V3_DROPS_DEFAULT, [("version 1", V1), ("version 2", V2)], level)
    assert bool(found) is refused
    if refused:
        assert len(found) == 1
        assert found[0].startswith("the new schema cannot read data of version 1: R.b: the field is missing")


@pytest.mark.parametrize(
    ("level", "refused"),
    [
        (Level.NONE, False),
        (Level.BACKWARD, False),
        (Level.BACKWARD_TRANSITIVE, False),
        (Level.FORWARD, True),
        (Level.FORWARD_TRANSITIVE, True),
        (Level.FULL, True),
        (Level.FULL_TRANSITIVE, True),
    ],
)
def test_directions(level, refused):
    dropped = json.dumps(record(field("b", "long", default=0)))
    found = problems(dropped, [("version 1", V2)], level)
    assert bool(found) is refused
    assert all(message.startswith("version 1 cannot read data of the new schema: R.a") for message in found)


INVALID = {
    "not JSON": "{",
    "not a constant of JSON": '{"type":"record","name":"R","fields":[],"x":NaN}',
    "unknown type": '{"type":"bogus"}',
    "undefined name": '"Undefined"',
    "number": "5",
    "null": "null",
    "empty union": "[]",
    "duplicate in union": '["null","null"]',
    "no type": "{}",
    "field name": json.dumps(record(field("1a", "long"))),
    "field name with a line end": json.dumps(record(field("a\n", "long"))),
    "name": '{"type":"record","name":"R\u00e9","fields":[]}',
    "field twice": json.dumps(record(LONG, LONG)),
    "default of another type": json.dumps(record(field("a", "long", default="x"))),
    "default true for long": json.dumps(record(field("a", "long", default=True))),
    "default out of range": json.dumps(record(field("a", "int", default=2**31))),
    "default of the second type": json.dumps(record(field("a", ["null", "long"], default=5))),
    "default null in words": json.dumps(record(field("a", ["null", "long"], default="null"))),
    "default not a symbol": json.dumps(record(field("a", enum("x"), default="y"))),
    "default within an array": json.dumps(record(field("a", array("double"), default=[1, "x"]))),
    "default lacks a field": json.dumps(record(field("a", inner(LONG), default={}))),
    "enum default not a symbol": json.dumps(record(field("a", enum("x", default="y")))),
    "aliases not an array": json.dumps(record(LONG, aliases="Old")),
    "error": '{"type":"error","name":"R","fields":[]}',
    "too deep": "[" * 100_000,
    "types too deep": '{"type":"array","items":' * 100 + '"long"' + "}" * 100,
    "default too deep": json.dumps(record(field("a", "long"), x=json.loads("[" * 300 + "]" * 300))),
}


@pytest.mark.parametrize("case", INVALID)
def test_invalid_schemas_are_refused(case):
    with pytest.raises(SchemaError):
        parse(INVALID[case])
    with pytest.raises(SchemaError):
        fingerprint(INVALID[case])


@pytest.mark.parametrize(
    "part",
    [
        field("a", ["null", "long"], default=None),
        field("a", ["long", "null"], default=3),
        field("a", array("double"), default=[1, 2.5]),
        field("a", mapping("string"), default={"k": "v"}),
        field("a", enum("x", "y", default="x"), default="y"),
        field("a", "bytes", default="\u00ff"),
        field("a", {"type": "fixed", "name": "F", "size": 2}, default="ab"),
        field("a", "boolean", default=False),
        field("a", inner(LONG, field("b", "int", default=1)), default={"a": 2}),
        field("a", {"type": "long", "logicalType": "no-such-type"}),
    ],
)
def test_valid_defaults_are_taken(part):
    text = json.dumps(record(part))
    assert parse(text).tree.fullname == "orderflow.R"


def test_one_canonical_text_for_one_schema():
    spaced = (
        '{ "namespace":"orderflow", "fields":[{"type":{"type":"long"},"name":"a"}],\n "name":"R", "type":"record" }'
    )
    assert canonical_text(spaced) == canonical_text(V1)
    assert canonical_text('{"type":"string"}') == canonical_text('"string"')


@pytest.mark.parametrize(
    "other",
    [
        record(LONG, doc="words"),
        record(field("a", "long", default=0)),
        record(field("a", "long", aliases=["b"])),
        record(field("a", {"type": "long", "unit": "ms"})),
    ],
)
def test_what_a_reader_may_need_makes_another_schema_with_the_same_fingerprint(other):
    text = json.dumps(other)
    assert canonical_text(text) != canonical_text(V1)
    assert fingerprint(text) == fingerprint(V1)


def test_a_default_that_looks_like_a_type_is_kept():
    text = json.dumps(record(field("a", mapping("string"), default={"type": "long"})))
    assert json.loads(canonical_text(text))["fields"][0]["default"] == {"type": "long"}


def test_fingerprint_is_of_the_specification():
    """Fields in the order name, type, fields, symbols, items, values, size; full names; nothing else."""
    text = json.dumps(
        record(
            field("a", {"type": "long"}, doc="x", default=1),
            field("e", enum("x", "y", default="x")),
            field("m", mapping(array("E"))),
        )
    )
    form = (
        '{"name":"orderflow.R","type":"record","fields":[{"name":"a","type":"long"},'
        '{"name":"e","type":{"name":"orderflow.E","type":"enum","symbols":["x","y"]}},'
        '{"name":"m","type":{"type":"map","values":{"type":"array","items":"orderflow.E"}}}]}'
    )
    assert fingerprint(text) == hashlib.sha256(form.encode()).hexdigest()


@pytest.mark.parametrize("path", sorted(SCHEMAS.glob("*.avsc")), ids=lambda path: path.stem)
def test_own_schemas_are_valid_and_two_libraries_agree_on_the_fingerprint(path):
    text = path.read_text("utf-8")
    assert incompatibilities(text, text) == []
    assert fingerprint(text) == hashlib.sha256(avro.schema.parse(text).canonical_form.encode()).hexdigest()
