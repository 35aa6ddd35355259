"""Rows that wait for a cut, packed and compressed: a row of Python objects takes twenty times the room."""

from __future__ import annotations

import threading
from array import array
from collections.abc import Iterator
from typing import Any, Final

import msgspec
import zstandard

CHUNK_BYTES: Final = 64 << 10
"""How much of a buffer is not compressed yet: a lake of 60 symbols has 400 buffers."""
LEVEL: Final = 1

_compressor: Final = zstandard.ZstdCompressor(level=LEVEL)
_compressing: Final = threading.Lock()
"""One for all buffers of the process: it holds some 2 MB."""
_pack: Final = msgspec.msgpack.Encoder().encode
_unpack: Final = msgspec.msgpack.Decoder(tuple[Any, ...]).decode


class PackedRows:
    """Rows in the order in which they came; they are unpacked anew whenever they are read.

    Values come back as they were put in (numbers bit for bit), but for tuples inside a row, which come back as lists.
    """

    __slots__ = ("_chunk_bytes", "_chunks", "_count", "_data", "_ends", "first", "last")

    def __init__(self, chunk_bytes: int = CHUNK_BYTES) -> None:
        self._chunk_bytes = chunk_bytes
        self._chunks: list[tuple[bytes, array[int]]] = []
        self._data = bytearray()
        self._ends = array("I")
        self._count = 0
        self.first: tuple[Any, ...] = ()
        self.last: tuple[Any, ...] = ()
        """The oldest and the newest row; empty where there are none."""

    def append(self, row: tuple[Any, ...]) -> None:
        """Add a row of None, booleans, numbers, strings, bytes, and lists and dicts of these."""
        data = self._data
        data += _pack(row)
        self._ends.append(len(data))
        if not self._count:
            self.first = row
        self.last = row
        self._count += 1
        if len(data) >= self._chunk_bytes:
            with _compressing:
                chunk = _compressor.compress(data)
            # A copy: what the library returns keeps the room of data that can't be compressed.
            self._chunks.append((bytes(memoryview(chunk)), self._ends))
            self._data, self._ends = bytearray(), array("I")

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[tuple[Any, ...]]:
        decompress = zstandard.ZstdDecompressor().decompress
        for chunk, ends in self._chunks:
            yield from _rows(decompress(chunk), ends)
        yield from _rows(self._data, self._ends)


def _rows(data: bytes | bytearray, ends: array[int]) -> Iterator[tuple[Any, ...]]:
    start = 0
    for end in ends:
        yield _unpack(data[start:end])
        start = end
