"""Avro bodies by generated code: the same bytes and values as fastavro's, at a third of its cost on wide flat records.

Most of what a wide record of nullable numbers costs is deciding, field by field, which branch of a union it takes. Here
that is decided once per combination of types met (a variant): a variant's code packs and unpacks whole runs of fixed-size
fields with one `struct` call. Whatever a variant does not fit is left to fastavro, which stays the authority on what is
valid: `encode` and `decode` answer None, and the caller asks fastavro.

Avro 1.11 binary encoding: zigzag variable-length integers, little-endian doubles, a union's branch as an integer in
front, arrays as counted blocks closed by a zero.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass
from operator import itemgetter
from typing import Any, Final

from orderflow.processor import Record

MAX_VARIANTS: Final = 64
"""Compiled per schema and direction; combinations beyond that are fastavro's."""
MAX_LENGTHS: Final = 4096
MAX_CACHED: Final = 512
"""Strings remembered per field: names recur, identifiers do not, so a full cache is left as it is."""
MAX_CACHED_BYTES: Final = 64
BEGINNING: Final = 12
"""Bytes by which an array of strings is recalled; it is then compared whole."""
MAX_ARRAY: Final = 63
"""Longest array whose block count takes one byte."""
MISFITS: Final = (struct.error, LookupError, TypeError, ValueError, OverflowError)
"""What a variant's code raises on what it does not fit."""

_PAIR: Final = 1 << 14


def _varint(number: int) -> bytes:
    encoded = bytearray()
    while number > 0x7F:
        encoded.append(number & 0x7F | 0x80)
        number >>= 7
    encoded.append(number)
    return bytes(encoded)


_LAST: Final = [_varint(number) for number in range(_PAIR)]
"""The last fourteen bits of a variable-length integer, in one byte or two."""
_MORE: Final = [bytes((number & 0x7F | 0x80, number >> 7 | 0x80)) for number in range(_PAIR)]
"""Fourteen bits that more follow."""
_SMALL: Final = _LAST[::2]
"""Encoded longs from 0 to 8191, sign folded in."""
_LENGTH: Final = [None if byte & 0x81 else byte >> 1 for byte in range(256)]
"""A length or count from its one byte; None where it has more or is negative."""
_LOW: Final = {_MORE[number]: number >> 1 for number in range(0, _PAIR, 2)}
"""First two bytes of a positive long of three bytes or more."""


def write_long(number: int) -> bytes:
    """An encoded long.

    Raises
    ------
    OverflowError
        It needs more than 64 bits.
    """
    folded = (number << 1) ^ (number >> 63)
    if folded < 1 << 14:
        return _LAST[folded]
    if folded < 1 << 28:
        return _MORE[folded & 0x3FFF] + _LAST[folded >> 14]
    if folded < 1 << 42:
        return _MORE[folded & 0x3FFF] + _MORE[folded >> 14 & 0x3FFF] + _LAST[folded >> 28]
    if folded >> 64:
        raise OverflowError(f"{number} needs more than 64 bits")
    return _MORE[folded & 0x3FFF] + _MORE[folded >> 14 & 0x3FFF] + _MORE[folded >> 28 & 0x3FFF] + _varint(folded >> 42)


def read_long(value: bytes, position: int) -> tuple[int, int]:
    """A long and the position behind it.

    Raises
    ------
    IndexError
        The value ends within it.
    OverflowError
        It has more than ten bytes.
    """
    byte = value[position]
    if byte < 0x80:
        return (byte >> 1) ^ -(byte & 1), position + 1
    second = value[position + 1]
    folded = byte & 0x7F | (second & 0x7F) << 7
    position += 2
    shift = 14
    while second & 0x80:
        second = value[position]
        folded |= (second & 0x7F) << shift
        position += 1
        shift += 7
    if shift > 70:
        raise OverflowError("a long of more than ten bytes")
    return (folded >> 1) ^ -(folded & 1), position


def _read_length(value: bytes, position: int) -> tuple[int, int]:
    length, position = read_long(value, position)
    if length < 0:
        raise ValueError("a negative length")
    return length, position


class _Times:
    """Longs of six bytes, as times in milliseconds have: the upper four change every 8 s, so they are remembered."""

    def __init__(self) -> None:
        self.high: dict[bytes, int] = {}

    def read(self, value: bytes, position: int) -> tuple[int, int]:
        number, end = read_long(value, position)
        if end - position == 6 and number >= 0:
            if len(self.high) >= MAX_CACHED:
                self.high.clear()
            self.high[value[position + 2 : end]] = number >> 13 << 13
        return number, end


_DOUBLES: Final = [struct.Struct(f"<{count}d") for count in range(MAX_ARRAY + 1)]
_BLOCKS: Final = [struct.Struct(f"<B{count}dx") for count in range(MAX_ARRAY + 1)]


def _write_doubles(numbers: list[float]) -> bytes:
    count = len(numbers)
    return _BLOCKS[count].pack(count << 1, *numbers) if count else b"\x00"


def _read_doubles(value: bytes, position: int) -> tuple[list[float], int]:
    count = _LENGTH[value[position]]
    if not count:
        if count is None:
            raise ValueError("an array of more than one byte's count")
        return [], position + 1
    end = position + 1 + 8 * count
    if value[end]:
        raise ValueError("an array of more than one block")
    return list(_DOUBLES[count].unpack_from(value, position + 1)), end + 1


def _string_writer(branch: bytes) -> tuple[dict[str, bytes], Callable[[str], bytes]]:
    cache: dict[str, bytes] = {}

    def write(text: str) -> bytes:
        raw = text.encode()
        encoded = branch + write_long(len(raw)) + raw
        if len(cache) < MAX_CACHED and len(raw) <= MAX_CACHED_BYTES:
            cache[text] = encoded
        return encoded

    return cache, write


def _strings_writer() -> tuple[dict[tuple[str, ...], bytes], Callable[[list[str]], bytes]]:
    cache: dict[tuple[str, ...], bytes] = {(): b"\x00"}

    def write(texts: list[str]) -> bytes:
        parts = [write_long(len(texts))]
        for text in texts:
            raw = text.encode()
            parts += (write_long(len(raw)), raw)
        encoded = b"".join((*parts, b"\x00"))
        if len(cache) < MAX_CACHED and len(encoded) <= MAX_CACHED_BYTES * 4:
            cache[tuple(texts)] = encoded
        return encoded

    return cache, write


def _string_reader() -> tuple[dict[bytes, str], Callable[[bytes], str]]:
    cache: dict[bytes, str] = {}

    def read(raw: bytes) -> str:
        text = raw.decode()
        if raw and len(cache) < MAX_CACHED and len(raw) <= MAX_CACHED_BYTES:
            cache[raw] = text
        return text

    return cache, read


def _strings_reader() -> Callable[[bytes, int], tuple[list[str], int]]:
    cache, read_new = _string_reader()
    recent: dict[bytes, tuple[bytes, tuple[str, ...]]] = {}

    def read(value: bytes, position: int) -> tuple[list[str], int]:
        begun = value[position : position + BEGINNING]
        known = recent.get(begun)
        if known is not None and value.startswith(known[0], position):
            return list(known[1]), position + len(known[0])
        texts, end = read_items(value, position)
        if len(recent) >= MAX_CACHED:
            recent.clear()
        recent[begun] = value[position:end], tuple(texts)
        return texts, end

    def read_items(value: bytes, position: int) -> tuple[list[str], int]:
        count = _LENGTH[value[position]]
        position += 1
        texts: list[str] = []
        if count == 0:
            return texts, position
        if count is None:
            raise ValueError("an array of more than one byte's count")
        for _ in range(count):
            length = _LENGTH[value[position]]
            if length is None:
                length, position = _read_length(value, position)
            else:
                position += 1
            raw = value[position : position + length]
            position += length
            texts.append(cache.get(raw) or read_new(raw))
        if value[position]:
            raise ValueError("an array of more than one block")
        return texts, position + 1

    return read


@dataclass(frozen=True, slots=True)
class Field:
    """One field of a flat record. `kind`: long, double, boolean, string, bytes, enum, doubles or strings."""

    name: str
    kind: str
    nullable: bool
    symbols: tuple[str, ...] = ()


_ACCEPTED: Final[dict[str, tuple[type, ...]]] = {
    "long": (int,),
    "double": (float, int),
    "boolean": (bool,),
    "string": (str,),
    "bytes": (bytes,),
    "enum": (str,),
    "doubles": (list,),
    "strings": (list,),
}
_PLAIN: Final = {name: name for name in ("long", "double", "boolean", "string", "bytes")} | {"int": "long"}
_ARRAYS: Final = {"double": "doubles", "string": "strings"}
_FIXED: Final = {"double": "d", "boolean": "?", "enum": "B"}
"""Kinds of fixed size, and their `struct` letters. An enum's index below 64 is one byte."""


def flat_fields(schema: dict[str, Any]) -> tuple[Field, ...] | None:
    """The fields of a record schema (JSON, before any parsing); None where it holds what is not compiled."""
    named: dict[str, tuple[str, ...]] = {}
    fields = [_field(each["name"], each["type"], named) for each in schema.get("fields", ())]
    if schema.get("type") != "record" or not fields or any(field is None for field in fields):
        return None
    return tuple(field for field in fields if field is not None)


def _field(name: str, kind: Any, named: dict[str, tuple[str, ...]]) -> Field | None:
    nullable = isinstance(kind, list)
    if nullable:
        # A nullable `int` is checked against 32 bits and a nullable array has no cheap test: both are fastavro's.
        if len(kind) != 2 or kind[0] != "null" or kind[1] == "int":
            return None
        kind = kind[1]
    if isinstance(kind, str):
        if kind in _PLAIN:
            return Field(name, _PLAIN[kind], nullable)
        return Field(name, "enum", nullable, named[kind]) if kind in named else None
    if "logicalType" in kind:
        return None
    if kind["type"] == "enum" and len(kind["symbols"]) <= MAX_ARRAY:
        named[kind["name"]] = tuple(kind["symbols"])
        return Field(name, "enum", nullable, tuple(kind["symbols"]))
    if kind["type"] == "array" and isinstance(kind["items"], str) and kind["items"] in _ARRAYS and not nullable:
        return Field(name, _ARRAYS[kind["items"]], nullable)
    return None


def _function(source: list[str], names: dict[str, Any]) -> Any:
    # What is compiled is made of field numbers and struct formats alone; no text of a schema goes into it unquoted.
    exec(compile("\n".join(source), "<avro variant>", "exec"), names)
    return names["variant"]


class CompiledEncoder:
    """Encodes records of one flat schema."""

    def __init__(self, fields: tuple[Field, ...], prefix: bytes) -> None:
        self._fields = fields
        self._prefix = prefix
        self._values: Callable[[Record], tuple[Any, ...]] = itemgetter(*(field.name for field in fields))
        self._variants: dict[tuple[type, ...], Callable[..., bytes] | None] = {}
        self._names: dict[str, Any] = {"SMALL": _SMALL, "long": write_long, "doubles": _write_doubles, "prefix": prefix}
        for number, field in enumerate(fields):
            if field.kind == "string":
                branch = b"\x02" if field.nullable else b""
                cache, self._names[f"write{number}"] = _string_writer(branch)
                self._names[f"known{number}"] = cache.get
            elif field.kind == "strings":
                known, self._names[f"write{number}"] = _strings_writer()
                self._names[f"known{number}"] = known.get
            elif field.kind == "enum":
                self._names[f"index{number}"] = {symbol: index << 1 for index, symbol in enumerate(field.symbols)}

    def __call__(self, record: Record) -> bytes | None:
        """Prefix and body; None where only fastavro can say."""
        try:
            values = self._values(record)
            types = tuple(map(type, values))
            variant = self._variants.get(types)
            if variant is None:
                variant = self._learn(types)
                if variant is None:
                    return None
            return variant(*values)
        except MISFITS:
            return None

    def _learn(self, types: tuple[type, ...]) -> Callable[..., bytes] | None:
        if len(self._variants) >= MAX_VARIANTS or types in self._variants:
            return None
        for field, given in zip(self._fields, types, strict=True):
            if given not in _ACCEPTED[field.kind] and not (field.nullable and given is type(None)):
                return None
        variant: Callable[..., bytes] = self._compile(types)
        self._variants[types] = variant
        return variant

    def _compile(self, types: tuple[type, ...]) -> Any:
        names = dict(self._names)
        parts = ["prefix"]
        layout = ""
        values: list[str] = []

        def close_run() -> None:
            nonlocal layout
            if layout:
                names[f"pack{len(parts)}"] = struct.Struct("<" + layout).pack
                parts.append(f"pack{len(parts)}({', '.join(values)})")
                layout = ""
                values.clear()

        for number, (field, given) in enumerate(zip(self._fields, types, strict=True)):
            name = f"f{number}"
            if given is type(None):
                layout += "x"  # the null branch is a zero byte
                continue
            if field.nullable and field.kind != "string":
                layout += "B"
                values.append("2")
            if field.kind in _FIXED:
                layout += _FIXED[field.kind]
                values.append(f"index{number}[{name}]" if field.kind == "enum" else name)
                continue
            close_run()
            parts.extend(_WRITTEN[field.kind].replace("#", str(number)).split("; "))
        close_run()
        arguments = ", ".join(f"f{number}" for number in range(len(types)))
        return _function([f"def variant({arguments}):", f"    return b''.join(({', '.join(parts)},))"], names)


_WRITTEN: Final = {
    "long": "SMALL[f#] if 0 <= f# < 8192 else long(f#)",
    "string": "known#(f#) or write#(f#)",
    "bytes": "long(len(f#)); f#",
    "doubles": "doubles(f#)",
    "strings": "known#(tuple(f#)) or write#(f#)",
}


class CompiledDecoder:
    """Decodes values of one flat schema: guesses a variant from the value's length, and checks every branch."""

    def __init__(self, fields: tuple[Field, ...], prefix_bytes: int) -> None:
        self._fields = fields
        self._start = prefix_bytes
        self._nullable = [field.name for field in fields if field.nullable]
        self._variants: dict[tuple[bool, ...], Callable[[bytes], Record | None]] = {}
        self._by_length: dict[int, Callable[[bytes], Record | None]] = {}
        times = _Times()
        self._names: dict[str, Any] = {
            "LENGTH": _LENGTH,
            "low": _LOW.get,
            "high": times.high.get,
            "time": times.read,
            "long": read_long,
            "length": _read_length,
            "doubles": _read_doubles,
        }
        for number, field in enumerate(fields):
            if field.kind == "string":
                cache, self._names[f"read{number}"] = _string_reader()
                self._names[f"known{number}"] = cache.get
            elif field.kind == "strings":
                self._names[f"read{number}"] = _strings_reader()
            elif field.kind == "enum":
                self._names[f"symbol{number}"] = {index << 1: symbol for index, symbol in enumerate(field.symbols)}

    def __call__(self, value: bytes) -> Record | None:
        """The record; None where only fastavro can say."""
        guess = self._by_length.get(len(value))
        if guess is not None:
            try:
                record = guess(value)
            except MISFITS:
                record = None
            if record is not None:
                return record
        for variant in self._variants.values():
            if variant is guess:
                continue
            try:
                record = variant(value)
            except MISFITS:
                continue
            if record is not None:
                self._note_length(len(value), variant)
                return record
        return None

    def learn(self, record: Record) -> None:
        """Take note of what fastavro read, so that the next value like it needs no fastavro."""
        nulls = tuple(record[name] is None for name in self._nullable)
        if nulls not in self._variants and len(self._variants) < MAX_VARIANTS:
            self._variants[nulls] = self._compile(dict(zip(self._nullable, nulls, strict=True)))

    def _note_length(self, length: int, variant: Callable[[bytes], Record | None]) -> None:
        if len(self._by_length) >= MAX_LENGTHS:
            self._by_length.clear()
        self._by_length[length] = variant

    def _compile(self, nulls: dict[str, bool]) -> Any:
        writer = _VariantReader(self._names, self._start)
        for number, field in enumerate(self._fields):
            writer.field(number, field, null=nulls.get(field.name, False))
        return writer.finish(self._fields)


class _VariantReader:
    """Generates the code that decodes one variant. `p` is the position, plus a distance known when generating."""

    def __init__(self, names: dict[str, Any], start: int) -> None:
        self._names = dict(names)
        self._lines = ["def variant(v):", f"    p = {start}"]
        self._distance = 0
        self._layout = ""
        self._targets: list[str] = []
        self._checks: dict[int, list[str]] = {0: [], 2: []}
        self._after: list[str] = []

    def _emit(self, *lines: str) -> None:
        self._lines.extend("    " + line for line in lines)

    def _branch(self, number: int, branch: int) -> None:
        self._layout += "B"
        self._targets.append(f"b{number}")
        self._checks[branch].append(f"b{number}")

    def field(self, number: int, field: Field, *, null: bool) -> None:
        name = f"f{number}"
        if null:
            self._branch(number, 0)
            self._after.append(f"{name} = None")
            return
        if field.nullable:
            self._branch(number, 2)
        if field.kind in _FIXED:
            self._layout += _FIXED[field.kind]
            self._targets.append(name)
            if field.kind == "enum":
                self._after.append(f"{name} = symbol{number}[{name}]")
            return
        self._close_run()
        kind = "time" if field.kind == "long" and field.name.endswith("ts_ms") else field.kind
        at = f"p + {self._distance}" if self._distance else "p"
        self._emit(*(line.replace("#", str(number)).replace("@", at) for line in _READ[kind]))
        self._distance = 0

    def _close_run(self) -> None:
        if not self._layout:
            return
        layout = struct.Struct("<" + self._layout)
        at = f"p + {self._distance}" if self._distance else "p"
        if self._layout == "B" and not self._after:
            self._emit(f"{self._targets[0]} = v[{at}]")
        else:
            name = f"unpack{len(self._lines)}"
            self._names[name] = layout.unpack_from
            self._emit(f"{', '.join(self._targets)}, = {name}(v, {at})")
        for branch, found in self._checks.items():
            if found:
                self._emit(f"if not ({' == '.join([str(branch), *found])}): return None")
                found.clear()
        self._emit(*self._after)
        self._distance += layout.size
        self._layout = ""
        self._targets.clear()
        self._after.clear()

    def finish(self, fields: tuple[Field, ...]) -> Any:
        self._close_run()
        content = ", ".join(f"{field.name!r}: f{number}" for number, field in enumerate(fields))
        # A value that is longer or shorter than its fields is damaged, or another variant's.
        self._emit(f"if p + {self._distance} != len(v): return None", f"return {{{content}}}")
        return _function(self._lines, self._names)


_READ: Final[dict[str, tuple[str, ...]]] = {
    "long": (
        "f# = v[@]",
        "if f# < 128:",
        "    f# = (f# >> 1) ^ -(f# & 1)",
        "    p = @ + 1",
        "else:",
        "    f#, p = long(v, @)",
    ),
    "time": (
        "p = @",
        "f# = low(v[p:p + 2])",
        "h = high(v[p + 2:p + 6])",
        "if f# is None or h is None:",
        "    f#, p = time(v, p)",
        "else:",
        "    f# += h",
        "    p += 6",
    ),
    "string": (
        "n = LENGTH[v[@]]",
        "if n is None:",
        "    n, q = length(v, @)",
        "else:",
        "    q = @ + 1",
        "p = q + n",
        "r = v[q:p]",
        "f# = known#(r) or read#(r)",
    ),
    "bytes": (
        "n, q = length(v, @)",
        "p = q + n",
        "f# = v[q:p]",
    ),
    "doubles": ("f#, p = doubles(v, @)",),
    "strings": ("f#, p = read#(v, @)",),
}
