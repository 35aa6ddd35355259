"""Avro schemas: validity, identity, and whether one can read what another wrote.

The verdict on a pair is that of `avro.compatibility` (Apache Avro's own checker). Where it falls short is made good here:

* type aliases are compared with full names but not qualified by the namespace as the specification asks, so that
  a rename with an unqualified alias is refused: they are qualified before the comparison;
* its answer is a set of messages beside a set of locations, in no order and without the field's name (inside a union
  without any location): `incompatibilities` walks the pair anew and asks the same checker about each part;
* defaults and field names are not validated by its parser: `parse` validates them.

What no checker of Avro sees is in `schemas/RULES.md`.
"""

from __future__ import annotations

import hashlib
import json
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import lru_cache
from typing import Any, Final, NoReturn

import avro.errors
import avro.schema
from avro.compatibility import (
    ReaderWriterCompatibilityChecker,
    SchemaCompatibilityType,
    lookup_writer_field,
    schema_name_equals,
)
from fastavro.schema import to_parsing_canonical_form

from orderflow.errors import OrderflowError

MAX_DEPTH: Final = 64
"""Types that may lie in one another: bounds the recursion of every walk over a schema."""
MAX_JSON_DEPTH: Final = 4 * MAX_DEPTH
"""The same for its JSON, defaults and unknown attributes with it."""

NAME: Final = re.compile(r"[A-Za-z_][A-Za-z0-9_]*\Z", re.ASCII)
PROTOCOL_ONLY: Final = frozenset({"error", "error_union", "request"})
NAMED: Final = frozenset({"record", "enum", "fixed"})
INTEGER_RANGE: Final = {"int": (-(2**31), 2**31 - 1), "long": (-(2**63), 2**63 - 1)}


class SchemaError(OrderflowError):
    """A schema text that is not a valid Avro schema. The message names the part, its value, and what is allowed."""


class Level(StrEnum):
    """Which earlier versions a new schema is compared with, and in which direction."""

    NONE = "NONE"
    BACKWARD = "BACKWARD"
    BACKWARD_TRANSITIVE = "BACKWARD_TRANSITIVE"
    FORWARD = "FORWARD"
    FORWARD_TRANSITIVE = "FORWARD_TRANSITIVE"
    FULL = "FULL"
    FULL_TRANSITIVE = "FULL_TRANSITIVE"

    @property
    def backward(self) -> bool:
        """The new schema must read what the earlier ones wrote."""
        return self.startswith(("BACKWARD", "FULL"))

    @property
    def forward(self) -> bool:
        """The earlier schemas must read what the new one writes."""
        return self.startswith(("FORWARD", "FULL"))

    @property
    def transitive(self) -> bool:
        """Every earlier version counts, not only the last."""
        return self.endswith("_TRANSITIVE")


@dataclass(frozen=True, slots=True)
class Parsed:
    """A valid schema: its tree of `avro.schema` objects, and the text that says whether two are the same.

    `canonical` is the JSON with sorted attributes and without spaces, `{"type": X}` written as `X`. Unlike Avro's parsing
    canonical form it keeps defaults, aliases and documentation: two schemas that differ in those are two schemas.
    """

    tree: Any
    canonical: str


@lru_cache(maxsize=512)
def parse(text: str) -> Parsed:
    """Check and parse a schema text.

    Raises
    ------
    SchemaError
        Not JSON, or not a valid Avro schema.
    """
    node = _json(text)
    canonical = json.dumps(_normal(node, 0), sort_keys=True, separators=(",", ":"))
    try:
        with warnings.catch_warnings():
            # Unknown logical types are ignored, as the specification asks; a warning in a server's log helps nobody.
            warnings.simplefilter("ignore")
            tree = avro.schema.make_avsc_object(node, avro.schema.Names())
    except (avro.errors.AvroException, AttributeError, KeyError, TypeError, ValueError) as error:
        raise SchemaError(f"not a valid Avro schema: {error}") from error
    _finish(tree, _label(tree), set())
    return Parsed(tree, canonical)


def canonical_text(text: str) -> str:
    """The text by which a registry knows a schema again: see `Parsed`."""
    return parse(text).canonical


@lru_cache(maxsize=512)
def fingerprint(text: str) -> str:
    """SHA-256, in hexadecimal, of the schema's parsing canonical form (Avro specification, "Schema Fingerprints").

    The same for every registry and for every schema that reads and writes the same bytes; documentation, defaults and
    aliases do not count.

    Raises
    ------
    SchemaError
        Not a valid Avro schema.
    """
    parse(text)
    return hashlib.sha256(to_parsing_canonical_form(json.loads(text)).encode()).hexdigest()


def incompatibilities(reader_text: str, writer_text: str) -> list[str]:
    """Why `reader_text` cannot read what `writer_text` wrote, one message a field path; empty where it can.

    Raises
    ------
    SchemaError
        One of the texts is not a valid Avro schema.
    """
    reader, writer = parse(reader_text).tree, parse(writer_text).tree
    result = _compare(reader, writer)
    if result is None:
        return []
    found = list(dict.fromkeys(_explain(reader, writer, _label(reader), set())))
    return found or [f"{_label(reader)}: {'; '.join(sorted(result))}"]


def problems(text: str, earlier: Sequence[tuple[str, str]], level: Level) -> list[str]:
    """What `level` has against `text` as the successor of `earlier`; empty where nothing.

    `earlier`: (label, schema text), oldest first; the label stands in the messages.

    Raises
    ------
    SchemaError
        One of the texts is not a valid Avro schema.
    """
    parse(text)
    found: list[str] = []
    for label, other in reversed(earlier if level.transitive else earlier[-1:]):
        if level.backward:
            found += [f"the new schema cannot read data of {label}: {why}" for why in incompatibilities(text, other)]
        if level.forward:
            found += [f"{label} cannot read data of the new schema: {why}" for why in incompatibilities(other, text)]
    return found


def _json(text: str) -> Any:
    try:
        node = json.loads(text, parse_constant=_refuse_constant)
    except RecursionError as error:
        raise _too_deep() from error
    except ValueError as error:
        raise SchemaError(f"the schema is not JSON: {error}; it begins with {text[:40]!r}") from error
    level = [node]
    for _ in range(MAX_JSON_DEPTH):
        level = [child for each in level for child in _children(each)]
        if not level:
            return node
    raise _too_deep()


def _children(node: Any) -> Iterable[Any]:
    if isinstance(node, dict):
        return node.values()
    return node if isinstance(node, list) else ()


def _too_deep() -> SchemaError:
    return SchemaError(f"the schema is nested too deeply: at most {MAX_DEPTH} levels of types are allowed")


def _refuse_constant(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not JSON")


def _normal(node: Any, depth: int) -> Any:
    """`node` in the one form of `Parsed.canonical`. Only types are followed: a default may look like one."""
    if depth > MAX_DEPTH:
        raise _too_deep()
    if isinstance(node, list):
        return [_normal(branch, depth + 1) for branch in node]
    if not isinstance(node, dict):
        return node
    kind = node.get("type")
    if len(node) == 1 and isinstance(kind, str):
        return kind
    if isinstance(kind, str) and kind in PROTOCOL_ONLY:
        raise SchemaError(f"the type {kind!r} belongs to Avro protocols, not to data: use 'record'")
    result = dict(node)
    for key in ("items", "values"):
        if key in node and kind in ("array", "map"):
            result[key] = _normal(node[key], depth + 1)
    if kind == "record" and isinstance(node.get("fields"), list):
        result["fields"] = [_normal_field(field, depth) for field in node["fields"]]
    return result


def _normal_field(field: Any, depth: int) -> Any:
    if not isinstance(field, dict) or "type" not in field:
        return field
    return {**field, "type": _normal(field["type"], depth + 1)}


def _finish(schema: Any, path: str, seen: set[int]) -> None:
    """Check what avro's parser leaves unchecked, and qualify the aliases of types."""
    kind = schema.type
    if kind in NAMED:
        if id(schema) in seen:
            return
        seen.add(id(schema))
        _qualify_aliases(schema, path)
    if kind == "record":
        for field in schema.fields:
            _finish_field(field, f"{path}.{field.name}", seen)
    elif kind == "array":
        _finish(schema.items, f"{path}[]", seen)
    elif kind == "map":
        _finish(schema.values, f"{path}{{}}", seen)
    elif kind == "union":
        if not schema.schemas:
            raise SchemaError(f"{path}: a union needs at least one type, and has none")
        for branch in schema.schemas:
            _finish(branch, path, seen)


def _finish_field(field: Any, path: str, seen: set[int]) -> None:
    if not NAME.match(field.name):
        raise SchemaError(f"{path}: {field.name!r} is not a field name: letters, digits and _, not a digit first")
    _aliases(field, path)
    _finish(field.type, path, seen)
    if field.has_default and not _fits(field.type, field.default):
        # Readers that know only the older specification take the first type of a union; ours must suit them as well.
        first = " (its first type)" if field.type.type == "union" else ""
        raise SchemaError(f"{path}: default {field.default!r} is not a value of {_describe(field.type)}{first}")


def _aliases(part: Any, path: str) -> list[str]:
    aliases = part.props.get("aliases", [])
    if not isinstance(aliases, list) or not all(isinstance(alias, str) for alias in aliases):
        raise SchemaError(f"{path}: aliases must be an array of names, and are {aliases!r}")
    return aliases


def _qualify_aliases(schema: Any, path: str) -> None:
    aliases = _aliases(schema, path)
    space = schema.fullname.rpartition(".")[0]
    if aliases:
        schema.props["aliases"] = [f"{space}.{alias}" if space and "." not in alias else alias for alias in aliases]


def _fits(schema: Any, value: Any) -> bool:
    """Whether `value`, as JSON gave it, can be the default of a field of this type (Avro specification, "Records")."""
    kind = schema.type
    if kind in INTEGER_RANGE:
        low, high = INTEGER_RANGE[kind]
        return isinstance(value, int) and not isinstance(value, bool) and low <= value <= high
    if kind == "union":
        return _fits(schema.schemas[0], value)
    if kind == "array":
        return isinstance(value, list) and all(_fits(schema.items, item) for item in value)
    if kind == "map":
        return isinstance(value, dict) and all(_fits(schema.values, item) for item in value.values())
    if kind == "record":
        return isinstance(value, dict) and all(
            _fits(field.type, value[field.name]) if field.name in value else field.has_default
            for field in schema.fields
        )
    return _SCALAR[kind](schema, value)


_SCALAR: Final[dict[str, Callable[[Any, Any], bool]]] = {
    "null": lambda _, value: value is None,
    "boolean": lambda _, value: isinstance(value, bool),
    "float": lambda _, value: isinstance(value, int | float) and not isinstance(value, bool),
    "double": lambda _, value: isinstance(value, int | float) and not isinstance(value, bool),
    "string": lambda _, value: isinstance(value, str),
    "bytes": lambda _, value: _is_bytes(value),
    "fixed": lambda schema, value: _is_bytes(value) and len(value) == schema.size,
    "enum": lambda schema, value: value in schema.symbols,
}


def _is_bytes(value: Any) -> bool:
    return isinstance(value, str) and all(ord(character) < 256 for character in value)


def _compare(reader: Any, writer: Any) -> set[str] | None:
    """None where compatible, else the checker's messages. A new checker each time: its memory holds assumptions."""
    result = ReaderWriterCompatibilityChecker().get_compatibility(reader, writer)
    return None if result.compatibility is SchemaCompatibilityType.compatible else set(result.messages)


def _explain(reader: Any, writer: Any, path: str, seen: set[tuple[int, int]]) -> Iterator[str]:
    """One message for each innermost part over which the checker stumbles."""
    messages = _compare(reader, writer)
    pair = (id(reader), id(writer))
    if messages is None or pair in seen:
        return
    seen.add(pair)
    kind = reader.type
    if writer.type == "union":
        for branch in writer.schemas:
            yield from _explain(reader, branch, path, seen)
    elif kind == "union":
        yield from _explain_union(reader, writer, path, seen)
    elif kind != writer.type:
        yield f"{path}: {_describe(reader)} cannot read {_describe(writer)}"
    elif kind in NAMED and not schema_name_equals(reader, writer):
        yield (
            f"{path}: the {kind} is named {reader.fullname!r} here and {writer.fullname!r} in the writer; keep the name, "
            f"or add the old one to its aliases"
        )
    elif kind == "record":
        yield from _explain_fields(reader, writer, path, seen)
    elif kind == "array":
        yield from _explain(reader.items, writer.items, f"{path}[]", seen)
    elif kind == "map":
        yield from _explain(reader.values, writer.values, f"{path}{{}}", seen)
    elif kind == "enum":
        lost = [symbol for symbol in writer.symbols if symbol not in reader.symbols]
        yield (
            f"{path}: the enum {reader.fullname!r} lacks {', '.join(map(repr, lost))} of the writer and has no default; "
            f"keep the symbols, or give the enum a default"
        )
    elif kind == "fixed":
        yield f"{path}: {reader.size} bytes here, {writer.size} in the writer"
    else:
        yield f"{path}: {'; '.join(sorted(messages))}"


def _explain_union(reader: Any, writer: Any, path: str, seen: set[tuple[int, int]]) -> Iterator[str]:
    for branch in reader.schemas:
        if branch.type == writer.type and (branch.type not in NAMED or schema_name_equals(branch, writer)):
            yield from _explain(branch, writer, path, seen)
            return
    yield f"{path}: none of the types {_describe(reader)} can read {_describe(writer)}"


def _explain_fields(reader: Any, writer: Any, path: str, seen: set[tuple[int, int]]) -> Iterator[str]:
    for field in reader.fields:
        here = f"{path}.{field.name}"
        other = lookup_writer_field(writer_schema=writer, reader_field=field)
        if other is not None:
            yield from _explain(field.type, other.type, here, seen)
        elif not field.has_default:
            yield (
                f"{here}: the field is missing in the writer and has no default; give it one, or an alias if it was renamed"
            )


def _label(schema: Any) -> str:
    return str(schema.name) if schema.type in NAMED else str(schema.type)


def _describe(schema: Any) -> str:
    if schema.type in NAMED:
        return f"{schema.type} {schema.fullname}"
    if schema.type == "union":
        return "[" + ", ".join(_describe(branch) for branch in schema.schemas) + "]"
    return str(schema.type)
