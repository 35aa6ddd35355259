"""Signals as JSON Lines: one file per symbol and minute of the clock, whole or absent."""

from __future__ import annotations

import errno
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import ClassVar

import msgspec

from orderflow.lake import files
from orderflow.lake.layout import JSONL_ROOT, avro_fields, jsonl_path
from orderflow.lake.packed import PackedRows
from orderflow.lake.signal_form import SignalCut
from orderflow.lake.sink import FileWritten
from orderflow.topics import SIGNALS

_encode = msgspec.json.Encoder().encode


class JsonlForm:
    """Writes `signals/jsonl/date=.../symbol=.../signals-<session>-p<PP>-<minute>-<first seq>-<last seq>.jsonl`.

    The minute in a file's name is that of the clock (of receipt, as in ticks), so that a minute is one file (more
    where it has more signals than are buffered); a signal's own time is its `ts_ms`. Keys stand in the schema's order;
    numbers are the shortest that read back as the same double.
    """

    kind: ClassVar[str] = "signals"
    tree: ClassVar[str | None] = JSONL_ROOT

    def __init__(self, root: Path, put: Callable[[str, memoryview, Callable[[Path], None]], None]) -> None:
        """Remove what dead writers left under `root`, and begin.

        `put` makes a file of these bytes durable under a path below the root, having called the check on it.
        """
        files.sweep(root / JSONL_ROOT)
        self._put = put
        self._names = tuple(avro_fields(SIGNALS))

    def write(self, cut: SignalCut, signals: Mapping[str, PackedRows]) -> list[FileWritten]:
        """Write the files of a cut."""
        written = []
        for symbol in sorted(signals):
            rows = signals[symbol]
            data = self._lines(rows)
            path = jsonl_path(symbol, cut.minute, cut.session, cut.partition, cut.first_seq, cut.last_seq)
            self._put(path, memoryview(data), lambda temp, data=data: _check(temp, data))  # type: ignore[misc]
            written.append(FileWritten(path, len(rows), len(data)))
        return written

    def _lines(self, rows: PackedRows) -> bytearray:
        names, data = self._names, bytearray()
        for row in rows:
            data += _encode(dict(zip(names, row, strict=True)))
            data += b"\n"
        return data


def _check(path: Path, data: bytearray) -> None:
    if path.read_bytes() != data:
        raise OSError(errno.EIO, "it does not read back as it was written")
