"""Signals as JSON Lines: one file per symbol and minute of the clock, whole or absent."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import ClassVar, Final

import msgspec

from orderflow.lake import files
from orderflow.lake.layout import JSONL_ROOT, avro_fields, jsonl_path
from orderflow.lake.settings import LakeConfig
from orderflow.lake.sink import NS_PER_SEC, CutSink, FileWritten
from orderflow.processor import Record
from orderflow.topics import SIGNALS, TICKS

MINUTE_SEC: Final = 60
MS_PER_MINUTE: Final = 60_000

_encode = msgspec.json.Encoder().encode


class JsonlSink(CutSink):
    """Writes `signals/jsonl/date=.../symbol=.../signals-<session>-p<PP>-<minute>-<first seq>-<last seq>.jsonl`.

    Files are cut at the tick whose clock crosses a minute, at the first tick with `max_rows` signals or more buffered,
    at `end`, and before another session. The minute in a file's name is that of the clock (of receipt, as in ticks), so
    that a minute is one file; a signal's own time is its `ts_ms`. Keys stand in the schema's order; numbers are the
    shortest that read back as the same double.
    """

    inputs: ClassVar[tuple[str, ...]] = (SIGNALS, TICKS)
    control: ClassVar[str] = TICKS

    def __init__(self, root: Path, partition: int, config: LakeConfig) -> None:
        """Remove what dead writers left under `root`, and begin. Of `config` only `max_rows` counts here."""
        super().__init__(root, partition, MINUTE_SEC, config.max_rows)
        self._names = tuple(avro_fields(SIGNALS))
        self._lines: dict[str, list[bytes]] = {}
        self._rows = 0
        self._minute = 0
        files.sweep(root / JSONL_ROOT)

    def step(self, topic: str, record: Record) -> bool:
        """Buffer a record; True where a cut is due after it."""
        seq = record["seq"]
        if self.first_seq < 0:
            self.first_seq = seq
        self.last_seq = seq
        if topic == TICKS:
            self._control_record(record)
            return self._tick(record)
        if self._rows == 0:
            clock = self._clock_ts_ns
            self._minute = (
                record["recv_ts_ms"] // MS_PER_MINUTE if clock is None else clock // (MINUTE_SEC * NS_PER_SEC)
            )
        line = _encode({name: record.get(name) for name in self._names}) + b"\n"
        self._lines.setdefault(record["symbol"], []).append(line)
        self._rows += 1
        return self._rows >= 2 * self._max_rows and self._due("rows")

    def rows_buffered(self) -> int:
        """Signals that wait to be written."""
        return self._rows

    def _full(self) -> bool:
        return self._rows >= self._max_rows

    def _write_files(self) -> list[tuple[str, FileWritten]]:
        written = []
        for symbol in sorted(self._lines):
            lines = self._lines[symbol]
            data = b"".join(lines)
            path = jsonl_path(symbol, self._minute, self.session, self.partition, self.first_seq, self.last_seq)
            self._write_file(path, memoryview(data), lambda temp, data=data: _check(temp, data))  # type: ignore[misc]
            written.append(("signals", FileWritten(path, len(lines), len(data))))
        return written

    def _clear(self) -> None:
        self._lines.clear()
        self._rows = 0


class DiscardSink(JsonlSink):
    """SIGNAL_SINK=none: follows the ticks, so that a drain ends, and writes nothing."""

    def step(self, topic: str, record: Record) -> bool:
        """Pass signals by."""
        return topic == TICKS and super().step(topic, record)


def _check(path: Path, data: bytes) -> None:
    if path.read_bytes() != data:
        raise OSError(errno.EIO, "it does not read back as it was written")
