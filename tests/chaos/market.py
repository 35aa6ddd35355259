"""Captures of a market with more symbols, made from a recorded one by copying each symbol under other names."""

from __future__ import annotations

import gzip
import heapq
import re
from collections.abc import Iterator
from pathlib import Path

SHIFT_NS = 7_777_777
"""Between copies, so that they do not all arrive at the same moment."""
_SYMBOL = re.compile(rb'"(?:s|symbol)":"([A-Z0-9]+)USDT"')


def _renamed(line: bytes, copy: int) -> tuple[int, bytes]:
    rx_ns, rest = line.split(b" ", 1)
    found = _SYMBOL.search(rest)
    if copy and found is not None:
        base = found[1]
        other = b"%s%d" % (base, copy)
        rest = rest.replace(b'"%sUSDT"' % base, b'"%sUSDT"' % other)
        rest = rest.replace(b'"%susdt@' % base.lower(), b'"%susdt@' % other.lower(), 1)
    shifted = int(rx_ns) + copy * SHIFT_NS
    return shifted, b"%d %s" % (shifted, rest)


def _copy(source: Path, copy: int, seconds: float) -> Iterator[tuple[int, bytes]]:
    end_ns = 0
    with gzip.open(source, "rb") as file:
        for line in file:
            at, text = _renamed(line, copy)
            end_ns = end_ns or at + int(seconds * 1e9)
            if at > end_ns:
                return
            yield at, text


def widen(source: Path, target: Path, copies: int, seconds: float = 1e6) -> int:
    """Write a capture with each symbol of `source` `copies` times; returns its number of frames."""
    frames = 0
    target.parent.mkdir(parents=True, exist_ok=True)
    with gzip.open(target, "wb", compresslevel=1) as file:
        for _, line in heapq.merge(*(_copy(source, copy, seconds) for copy in range(copies)), key=lambda each: each[0]):
            file.write(line)
            frames += 1
    return frames
