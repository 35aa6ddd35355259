"""The sink of signals: one rule of cuts, and the forms in which signals are kept (`SIGNAL_SINK`)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar, Final

import msgspec

from orderflow.config import SinksConfig
from orderflow.lake.jsonl import JsonlForm
from orderflow.lake.layout import avro_fields
from orderflow.lake.packed import PackedRows
from orderflow.lake.signal_form import SignalCut, SignalForm
from orderflow.lake.sink import NS_PER_SEC, CutResult, CutSink, CutState, FileWritten, decode_state
from orderflow.lake.sqlite import SignalDatabase, SqliteForm
from orderflow.processor import Record
from orderflow.topics import SIGNALS, TICKS

MINUTE_SEC: Final = 60
MS_PER_MINUTE: Final = 60_000


class SignalState(CutState, frozen=True):
    """What is carried from cut to cut; `signals` counts what has been written since the oldest input."""

    signals: int = 0


class SignalSink(CutSink):
    """Keeps the signals of one partition in every form that is chosen.

    It cuts at the tick whose clock crosses a minute, at the first tick with `max_rows` signals or more buffered, at
    `end`, and before another session. All forms share the cut and its commit: one that can't be written holds up the
    others, which make the same cut again and change nothing by it. Without a form it follows the ticks, so that a drain
    ends, and writes nothing.
    """

    inputs: ClassVar[tuple[str, ...]] = (SIGNALS, TICKS)
    control: ClassVar[str] = TICKS

    def __init__(self, root: Path, partition: int, config: SinksConfig, database: SignalDatabase) -> None:
        """Remove what dead writers left under `root`, and begin.

        Parameters
        ----------
        database
            Shared by the partitions of a process; touched only where `sqlite` is chosen.
        """
        super().__init__(root, partition, MINUTE_SEC, config.max_rows)
        self._forms: list[SignalForm] = []
        # The database first: it finds a cut made again without writing, which JSON Lines do not.
        if "sqlite" in config.chosen:
            self._forms.append(SqliteForm(database, self._failed))
        if "jsonl" in config.chosen:
            self._forms.append(JsonlForm(root, self._write_file))
        self._names = tuple(avro_fields(SIGNALS))
        self._buffers: dict[str, PackedRows] = {}
        self._rows = 0
        self._minute = 0
        self._signals = 0

    def step(self, topic: str, record: Record) -> bool:
        """Buffer a record; True where a cut is due after it."""
        if topic != TICKS and not self._forms:
            return False
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
        symbol = record["symbol"]
        buffer = self._buffers.get(symbol)
        if buffer is None:
            buffer = self._buffers[symbol] = PackedRows()
        buffer.append(tuple([record[name] for name in self._names]))
        self._rows += 1
        # Not among the signals of one record alone: two cuts of them would have one name.
        return self._rows >= 2 * self._max_rows and seq > self.first_seq and self._due("rows")

    def rows_buffered(self) -> int:
        """Signals that wait to be written."""
        return self._rows

    def write(self) -> CutResult:
        """See `CutSink.write`."""
        signals = self._rows
        result = super().write()
        self._signals += signals
        return result

    def state(self) -> dict[str, bytes]:
        """See `FileSink.state`."""
        return {"": msgspec.msgpack.encode(SignalState(self.session, self._clock_ts_ns, self._signals))}

    def restore(self, states: Mapping[str, bytes]) -> None:
        """See `CutSink.restore`."""
        super().restore(states)
        self._signals = decode_state(states[""], SignalState).signals

    def _full(self) -> bool:
        return self._rows >= self._max_rows

    def _write_files(self) -> list[tuple[str, FileWritten]]:
        if not self._rows:
            return []
        cut = SignalCut(self.session, self.partition, self._minute, self.first_seq, self.last_seq, self._signals)
        return [(form.kind, file) for form in self._forms for file in form.write(cut, self._buffers)]

    def _trees(self) -> tuple[str, ...]:
        return tuple(form.tree for form in self._forms if form.tree is not None)

    def _clear(self) -> None:
        self._buffers.clear()
        self._rows = 0
