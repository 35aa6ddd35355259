"""The journal as text: one JSON object a record, compressed with zstd. Every field, nothing left out."""

from __future__ import annotations

import base64
import errno
from collections.abc import Callable
from functools import cache
from operator import itemgetter
from pathlib import Path
from typing import Any, Final

import msgspec
import zstandard

from orderflow.lake.layout import PAYLOAD_ENCODING, avro_fields
from orderflow.processor import Record
from orderflow.topics import JOURNAL

FEED_BYTES: Final = 1 << 20
"""The compressor is fed in pieces of this size, so that its output depends on the bytes alone."""

_encode = msgspec.json.Encoder().encode


@cache
def _journal() -> tuple[tuple[str, ...], Callable[[Record], tuple[Any, ...]]]:
    """The journal's fields and what takes their values out of a record."""
    names = tuple(avro_fields(JOURNAL))
    return names, itemgetter(*names)


def raw_line(record: Record) -> bytes:
    """A journal record as one line of JSON, line break included; keys in the schema's order.

    `payload` is text where it is valid UTF-8 and base64 elsewhere; `payload_encoding` says which.
    """
    names, values = _journal()
    fields: Record = dict(zip(names, values(record), strict=True))
    payload: bytes = record["payload"]
    try:
        fields["payload"] = payload.decode()
        fields[PAYLOAD_ENCODING] = "utf-8"
    except UnicodeDecodeError:
        fields["payload"] = base64.b64encode(payload).decode()
        fields[PAYLOAD_ENCODING] = "base64"
    return _encode(fields) + b"\n"


def raw_record(line: bytes | str) -> Record:
    """The journal record that `raw_line` wrote.

    Raises
    ------
    ValueError
        The line is not one of a raw file.
    """
    fields: Record = msgspec.json.decode(line)
    encoding = fields.pop(PAYLOAD_ENCODING)
    if encoding not in ("utf-8", "base64"):
        raise ValueError(f"{PAYLOAD_ENCODING} is {encoding!r}: it must be utf-8 or base64")
    payload = fields["payload"]
    fields["payload"] = base64.b64decode(payload, validate=True) if encoding == "base64" else payload.encode()
    return fields


class RawBuffer:
    """The lines of one receive date, compressed as they come."""

    __slots__ = ("_compressor", "_parts", "_pending", "_whole", "lines", "plain_bytes")

    def __init__(self, level: int) -> None:
        self._compressor = zstandard.ZstdCompressor(level=level, write_checksum=True, threads=0).compressobj()
        self._pending = bytearray()
        self._parts: list[bytes] = []
        self._whole: bytes | None = None
        self.lines = 0
        self.plain_bytes = 0

    def append(self, line: bytes) -> None:
        """Add a line.

        Raises
        ------
        ValueError
            The file is encoded: its cut has to be written before anything further is taken.
        """
        if self._whole is not None:
            raise ValueError("a line came while a cut waits to be written: call write() until it succeeds")
        pending = self._pending
        pending += line
        self.lines += 1
        self.plain_bytes += len(line)
        while len(pending) >= FEED_BYTES:
            self._parts.append(self._compressor.compress(bytes(pending[:FEED_BYTES])))
            del pending[:FEED_BYTES]

    def encode(self) -> memoryview:
        """The compressed file. May be called again: the same bytes; nothing can be added after it."""
        if self._whole is None:
            self._parts.append(self._compressor.compress(bytes(self._pending)))
            self._parts.append(self._compressor.flush())
            self._whole = b"".join(self._parts)
            self._parts.clear()
            self._pending.clear()
        return memoryview(self._whole)


def check_frame(path: Path, plain_bytes: int) -> None:
    """Decompress a file whole: zstd verifies its checksum.

    Raises
    ------
    OSError
        It is damaged or holds another number of bytes.
    """
    found = 0
    try:
        with path.open("rb") as file, zstandard.ZstdDecompressor().stream_reader(file) as reader:
            while piece := reader.read(FEED_BYTES):
                found += len(piece)
    except zstandard.ZstdError as error:
        raise OSError(errno.EIO, f"it can't be decompressed: {error}") from error
    if found != plain_bytes:
        raise OSError(errno.EIO, f"it decompresses to {found} bytes where {plain_bytes} were written")
