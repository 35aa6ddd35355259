"""The lake's sink: every kind of row as Parquet, the journal as compressed lines of JSON."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping
from operator import itemgetter
from pathlib import Path
from typing import Any, ClassVar, Final, TypeAlias

import msgspec

from orderflow.lake import files
from orderflow.lake.buffers import BATCH_ROWS, ParquetBuffer, check_footer
from orderflow.lake.layout import (
    NS_PER_DAY,
    PARQUET_ROOT,
    RAW_ROOT,
    Kind,
    cut_name,
    kinds,
    parquet_path,
    raw_path,
    row_kinds,
)
from orderflow.lake.minutes import MinuteBuckets
from orderflow.lake.raw import RawBuffer, check_frame, raw_line
from orderflow.lake.settings import LakeConfig
from orderflow.lake.sink import CutSink, FileWritten, decode_state
from orderflow.processor import Record
from orderflow.topics import CVD, EVENTS, FEATURE_EVENTS, FUSION, JOURNAL, OFI, REJECTS, ROWS, SIGNALS, TICKS

RATE_WINDOW_MS: Final = 10_000
MAX_REJECT_BYTES: Final = 64 << 20
MAX_RAW_BYTES: Final = 1 << 30
"""Bounds on what is buffered besides rows; a cut follows at the next tick."""


class ReceiveRate:
    """Trades received over the trailing ten seconds of receive time, per second. State of one symbol.

    Receive times are made monotone. In the first ten seconds of a session the rate is that of what has come so far,
    over the whole ten seconds.
    """

    __slots__ = ("_times_ms",)

    def __init__(self, runs: list[tuple[int, int]] | None = None) -> None:
        """`runs`: (receive time in milliseconds, trades at it), as `runs` returned it."""
        self._times_ms: deque[int] = deque(time for time, count in runs or () for _ in range(count))

    def add(self, recv_ts_ms: int) -> float:
        """Count a trade; returns the rate with it, trades per second."""
        times = self._times_ms
        if times and recv_ts_ms < times[-1]:
            recv_ts_ms = times[-1]
        times.append(recv_ts_ms)
        oldest = recv_ts_ms - RATE_WINDOW_MS
        while times[0] <= oldest:
            times.popleft()
        return len(times) * 1000 / RATE_WINDOW_MS

    def runs(self) -> list[tuple[int, int]]:
        """The window, run-length encoded."""
        runs: list[tuple[int, int]] = []
        for each in self._times_ms:
            if runs and runs[-1][0] == each:
                runs[-1] = (each, runs[-1][1] + 1)
            else:
                runs.append((each, 1))
        return runs


Route: TypeAlias = tuple[Kind, Callable[[Record], tuple[Any, ...]]]


def _route(kind: Kind) -> Route:
    return kind, itemgetter(*kind.fields)


class LakeSink(CutSink):
    """The lake: Parquet by date, symbol and kind; the journal as compressed lines of JSON.

    Files are cut at the tick whose clock crosses a multiple of `rotate_sec`, at the first tick with `max_rows` rows
    (raw lines not counted) or more buffered, at `end`, and before another session. Ticks come last among the records
    of their seq, so a cut never parts what one journal record caused; only where twice `max_rows` have come without
    any tick, it does.
    """

    inputs: ClassVar[tuple[str, ...]] = (
        JOURNAL, ROWS, EVENTS, REJECTS, OFI, CVD, FUSION, FEATURE_EVENTS, SIGNALS, TICKS,
    )  # fmt: skip
    control: ClassVar[str] = JOURNAL

    def __init__(
        self, root: Path, partition: int, config: LakeConfig, fingerprint: str = "", batch_rows: int = BATCH_ROWS
    ) -> None:
        """Remove what dead writers left under `root`, and begin.

        Parameters
        ----------
        root
            The lake's folder; made when the first file is written.
        partition
            The journal partition.
        fingerprint
            Of the settings that the rows were computed under; written into every Parquet footer.
        batch_rows
            See `ParquetBuffer`.
        """
        super().__init__(root, partition, config.rotate_sec, config.max_rows)
        self.fingerprint = fingerprint
        self.rows_skipped: dict[str, int] = {}
        """Rows that no kind takes, by `src`."""
        self._zstd_level = config.zstd_level
        self._batch_rows = batch_rows
        self._buffers: dict[tuple[str, str | None, int], ParquetBuffer] = {}
        self._raw: dict[int, RawBuffer] = {}
        self._rates: dict[str, ReceiveRate] = {}
        self.minutes = MinuteBuckets()
        """For the figures only."""
        self._rows = 0
        self._reject_bytes = 0
        self._row_routes = {src: _route(kind) for src, kind in row_kinds().items()}
        self._routes = {
            topic: _route(kinds()[name])
            for topic, name in ((OFI, "ofi"), (CVD, "cvd"), (FUSION, "fusion"), (SIGNALS, "signals"))
        }
        self._reject_route = _route(kinds()["rejects"])
        self._event_route = _route(kinds()["events"])
        for tree in (PARQUET_ROOT, RAW_ROOT):
            files.sweep(root / tree)

    def step(self, topic: str, record: Record) -> bool:
        """Buffer a record; True where a cut is due after it."""
        seq = record["seq"]
        if self.first_seq < 0:
            self.first_seq = seq
        self.last_seq = seq
        if topic == ROWS:
            self._add_row(record)
        elif topic == JOURNAL:
            return self._add_raw(record)
        elif topic == TICKS:
            if record["kind"] == "tick":
                self.minutes.tick(record["clock_ts_ns"], record["quote_ts_ms"])
            return self._tick(record)
        elif topic in self._routes:
            kind, fields = self._routes[topic]
            self._add(kind, record["symbol"], record, fields(record))
        elif topic == REJECTS:
            kind, fields = self._reject_route
            self._reject_bytes += len(record["payload"])
            self._add(kind, record["symbol"] or None, record, fields(record))
        else:
            kind, fields = self._event_route
            self._add(kind, record["symbol"], record, (*fields(record), record.get("strength"), topic))
        return False

    def _add_row(self, record: Record) -> None:
        route = self._row_routes.get(record["src"])
        if route is None:
            self.rows_skipped[record["src"]] = self.rows_skipped.get(record["src"], 0) + 1
            return
        kind, fields = route
        values = fields(record)
        symbol = record["symbol"]
        if kind.computed:
            rate = self._rates.get(symbol)
            if rate is None:
                rate = self._rates[symbol] = ReceiveRate()
            values = (*values, rate.add(record["recv_ts_ms"]))
            self.minutes.trade(symbol, record["ts_ms"])
        self._add(kind, symbol, record, values)

    def _add(self, kind: Kind, symbol: str | None, record: Record, values: tuple[Any, ...]) -> None:
        key = (kind.name, symbol, kind.day_of(record))
        buffer = self._buffers.get(key)
        if buffer is None:
            buffer = self._buffers[key] = ParquetBuffer(kind, symbol, self._batch_rows)
        buffer.rows.append(values)
        self._rows += 1

    def _add_raw(self, record: Record) -> bool:
        if record["kind"] == "config":
            self._control_record(record)
        day = max(record["recv_ts_ns"] // NS_PER_DAY, 0)
        buffer = self._raw.get(day)
        if buffer is None:
            buffer = self._raw[day] = RawBuffer(self._zstd_level)
        buffer.append(raw_line(record))
        return self._rows >= 2 * self._max_rows and self._due("rows")

    def _begin_session(self) -> None:
        self._rates.clear()
        self.minutes.begin_session()

    def rows_buffered(self) -> int:
        """Rows and raw lines that wait to be written."""
        # A copy: figures are asked for while a cut is written in a thread.
        return self._rows + sum(buffer.lines for buffer in list(self._raw.values()))

    def _full(self) -> bool:
        return (
            self._rows >= self._max_rows
            or self._reject_bytes >= MAX_REJECT_BYTES
            or sum(buffer.plain_bytes for buffer in self._raw.values()) >= MAX_RAW_BYTES
        )

    def _write_files(self) -> list[tuple[str, FileWritten]]:
        cut = cut_name(self.session, self.partition, self.first_seq, self.last_seq)
        metadata = {
            "orderflow.session": self.session,
            "orderflow.partition": str(self.partition),
            "orderflow.first_seq": str(self.first_seq),
            "orderflow.last_seq": str(self.last_seq),
            "orderflow.config_fingerprint": self.fingerprint,
        }
        written = []
        buffers = {
            parquet_path(kind, symbol, day, cut): buffer for (kind, symbol, day), buffer in self._buffers.items()
        }
        for path in sorted(buffers):
            buffer = buffers[path]
            data = buffer.encode(metadata)
            rows = len(buffer)
            self._write_file(path, data, lambda temp, rows=rows: check_footer(temp, rows))  # type: ignore[misc]
            written.append((buffer.kind.name, FileWritten(path, rows, len(data))))
        for day, raw in sorted(self._raw.items()):
            path, data, size = raw_path(self.partition, day, cut), raw.encode(), raw.plain_bytes
            self._write_file(path, data, lambda temp, size=size: check_frame(temp, size))  # type: ignore[misc]
            written.append(("raw", FileWritten(path, raw.lines, len(data))))
        return written

    def _trees(self) -> tuple[str, ...]:
        return PARQUET_ROOT, RAW_ROOT

    def _clear(self) -> None:
        self._buffers.clear()
        self._raw.clear()
        self._rows = self._reject_bytes = 0

    def state(self) -> dict[str, bytes]:
        """The clock and the session, and the window of each symbol's receive rate."""
        states = super().state()
        for symbol in sorted(self._rates):
            states[f"rate:{symbol}"] = msgspec.msgpack.encode(self._rates[symbol].runs())
        return states

    def restore(self, states: Mapping[str, bytes]) -> None:
        """Go on from a saved state; buffers begin empty."""
        super().restore(states)
        self._rates = {
            name.removeprefix("rate:"): ReceiveRate(decode_state(states[name], list[tuple[int, int]]))
            for name in sorted(states)
            if name.startswith("rate:")
        }
