"""What a capture holds and whether it can be trusted: ids, chains, snapshots, books, delays. One pass, bounded memory."""

from __future__ import annotations

from collections import Counter, deque
from functools import lru_cache
from pathlib import Path
from typing import Any, Final

import msgspec

from orderflow.capture import CaptureInfo, Tally
from orderflow.errors import CaptureError
from orderflow.microstructure.book import LocalBook
from orderflow.venues.binance.frames import (
    UNDECODABLE,
    AggTrade,
    BookTicker,
    DepthSnapshot,
    DepthUpdate,
    decode_agg_trade,
    decode_book_ticker,
    decode_depth,
    decode_snapshot,
)
from orderflow.venues.binance.oracle import QuoteOracle
from orderflow.venues.binance.streams import StreamName, parse_stream

MAX_LEVELS: Final = 20_000
"""Per side of a book: far beyond what a snapshot of 1,000 levels grows to in a day."""
MAX_BUFFERED: Final = 20_000
CHAIN_LINKS: Final = 5_000
"""Diffs among which the bracket of a snapshot is looked for: eight minutes of a symbol."""
MAX_HOLES: Final = 10_000
"""Runs of missing ids that are kept, so that late ones can still fill them."""
SHOWN_HOLES: Final = 20
KINDS: Final = ("bookTicker", "depth", "aggTrade")


class IdHoles:
    """One symbol's trade ids, which are gapless: what is missing, what came twice."""

    def __init__(self) -> None:
        self.next_id = -1
        self.missing = 0
        self.duplicates = 0
        self.holes: list[tuple[int, int]] = []
        """Runs of missing ids, both ends included, rising; the first `MAX_HOLES` of them."""

    def add(self, number: int) -> None:
        if self.next_id < 0 or number == self.next_id:
            self.next_id = number + 1
        elif number > self.next_id:
            self.missing += number - self.next_id
            if len(self.holes) < MAX_HOLES:
                self.holes.append((self.next_id, number - 1))
            self.next_id = number + 1
        else:
            self._late(number)

    def _late(self, number: int) -> None:
        for place, (low, high) in enumerate(self.holes):
            if low <= number <= high:
                self.missing -= 1
                self.holes[place : place + 1] = [
                    (first, last) for first, last in ((low, number - 1), (number + 1, high)) if first <= last
                ]
                return
        self.duplicates += 1


class Brackets:
    """Which snapshots a diff brackets, before or behind them in the file: `pu <= lastUpdateId <= u`."""

    def __init__(self) -> None:
        self.bracketed = 0
        self.refused: Counter[str] = Counter()
        """too_old: before the first diff seen. in_a_gap: between diffs that do not join."""
        self._links: deque[tuple[int, int]] = deque(maxlen=CHAIN_LINKS)
        self._waiting: list[int] = []

    @property
    def waiting(self) -> int:
        """Snapshots whose diff has not come (yet)."""
        return len(self._waiting)

    def diff(self, prev_id: int, final_id: int) -> None:
        """A diff behind all others."""
        self._links.append((prev_id, final_id))
        if not self._waiting:
            return
        due = [number for number in self._waiting if number <= final_id]
        self._waiting = [number for number in self._waiting if number > final_id]
        for number in due:
            self._judge(prev_id <= number, "in_a_gap")

    def snapshot(self, number: int) -> None:
        links = self._links
        if not links or number > links[-1][1]:
            self._waiting.append(number)
        elif number < links[0][0]:
            self._judge(False, "too_old")
        else:
            self._judge(any(prev_id <= number <= final_id for prev_id, final_id in reversed(links)), "in_a_gap")

    def _judge(self, held: bool, otherwise: str) -> None:
        if held:
            self.bracketed += 1
        else:
            self.refused[otherwise] += 1


class Delays:
    """Milliseconds from the exchange's sending (E) to receipt (R), exact to one."""

    def __init__(self) -> None:
        self._counts: Counter[int] = Counter()

    def add(self, delay_ms: int) -> None:
        self._counts[delay_ms] += 1

    def quantiles(self, *ranks: float) -> list[int] | None:
        """Nearest-rank quantiles; None without a value."""
        total = self._counts.total()
        if not total:
            return None
        found: list[int] = []
        ordered = sorted(self._counts.items())
        for rank in ranks:
            left = rank * total
            for value, count in ordered:
                left -= count
                if left <= 1e-9:
                    found.append(value)
                    break
        return found


class SymbolReport(msgspec.Struct, kw_only=True):
    """One symbol of a capture. Counts are of frames unless they say otherwise."""

    symbol: str
    trades: int = 0
    trade_duplicates: int = 0
    trades_missing: int = 0
    """Ids that no frame has, between the first and the last one."""
    trade_holes: list[tuple[int, int]] = []
    """The first runs of missing ids, both ends included."""
    quotes: int = 0
    quotes_out_of_order: int = 0
    """Update id not above the one before: repetitions too."""
    diffs: int = 0
    diff_duplicates: int = 0
    chain_breaks: int = 0
    """Diffs whose `pu` is not the `u` before."""
    crossed: int = 0
    """Diffs after which the book was crossed."""
    snapshots: int = 0
    bracketed: int = 0
    unbracketed: dict[str, int] = {}
    """too_old, in_a_gap, no_diff: snapshots of no use, by reason."""
    book_state: str = "none"
    """At the end."""
    oracle_checked: int = 0
    """Diffs applied to the book after which its best level could be compared with a quote."""
    oracle_equal: int = 0
    oracle_skipped: int = 0
    """No quote to compare with: before the first one, or where quotes are missing."""
    first_mismatch: dict[str, Any] | None = None


class Report(msgspec.Struct, kw_only=True):
    """A whole capture.

    `peak_per_sec` is the most frames of one second of receive time; `latency_ms` maps a kind of stream, and `all`, to
    [p50, p99] of R - E.
    """

    path: str
    sha256: str
    file_bytes: int
    text_bytes: int
    frames: int
    frames_by_conn: dict[str, int]
    streams: dict[str, int]
    first_rx_ns: int
    last_rx_ns: int
    span_sec: float
    frames_per_sec: float
    peak_per_sec: int
    longest_silence_sec: float
    rx_back: int
    rx_back_most_ms: float
    undecodable: dict[str, int]
    first_undecodable: str
    latency_ms: dict[str, list[int] | None]
    symbols: list[SymbolReport]
    error: str
    """Why reading stopped before the file's end; empty where it did not."""

    @property
    def faults(self) -> list[str]:
        """What is wrong, in words; empty for a capture without a flaw."""
        found = [self.error] if self.error else []
        if self.undecodable:
            found.append(f"{sum(self.undecodable.values()):,} frames can't be decoded, first {self.first_undecodable}")
        for each in self.symbols:
            found.extend(f"{each.symbol}: {fault}" for fault in _faults(each))
        return found


def _faults(symbol: SymbolReport) -> list[str]:
    found: list[str] = []
    if symbol.trades_missing:
        low, high = symbol.trade_holes[0]
        found.append(f"{symbol.trades_missing:,} trade ids are missing, first {low} to {high}")
    if symbol.chain_breaks:
        found.append(f"the chain of diffs breaks {symbol.chain_breaks:,} times")
    if symbol.crossed:
        found.append(f"{symbol.crossed:,} diffs leave the book crossed")
    if symbol.diffs and symbol.book_state != "synced":
        found.append(f"the book ends {symbol.book_state}: " + _why_unsynced(symbol))
    if symbol.oracle_equal < symbol.oracle_checked:
        number = symbol.oracle_checked - symbol.oracle_equal
        found.append(f"{number:,} times the book's best level is not the quote's, first {symbol.first_mismatch}")
    return found


def _why_unsynced(symbol: SymbolReport) -> str:
    if not symbol.snapshots:
        return "no snapshot of it is in the file"
    return f"of {symbol.snapshots} snapshots {symbol.bracketed} are bracketed by a diff, none since the last break"


class _Symbol:
    """The state of one symbol while a capture is read."""

    def __init__(self, name: str) -> None:
        self.report = SymbolReport(symbol=name)
        self.ids = IdHoles()
        self.brackets = Brackets()
        self._book = LocalBook(max_levels=MAX_LEVELS, max_buffered=MAX_BUFFERED)
        self._oracle = QuoteOracle()
        self._quote_id = -1
        self._chain_id = -1

    def trade(self, trade: AggTrade) -> None:
        self.report.trades += 1
        self.ids.add(trade.agg_trade_id)

    def quote(self, quote: BookTicker) -> None:
        self.report.quotes += 1
        if quote.update_id <= self._quote_id:
            self.report.quotes_out_of_order += 1
            self._oracle.lose_late_quote(quote.update_id)
            return
        self._quote_id = quote.update_id
        self._note(self._oracle.add_quote((quote.update_id, quote.bid, quote.bid_qty, quote.ask, quote.ask_qty)))

    def diff(self, diff: DepthUpdate) -> None:
        report = self.report
        report.diffs += 1
        if diff.final_id <= self._chain_id:
            report.diff_duplicates += 1
            return
        if self._chain_id >= 0 and diff.prev_id != self._chain_id:
            report.chain_breaks += 1
            self._note(self._oracle.finish())
            # Quotes went missing with the diffs: those before the break say nothing of the books behind it.
            self._oracle.restart()
        self._chain_id = diff.final_id
        self.brackets.diff(diff.prev_id, diff.final_id)
        outcome = self._book.apply_diff(diff.first_id, diff.final_id, diff.prev_id, diff.bids, diff.asks)
        if outcome in ("applied", "synced"):
            best = self._book.best() or (None, None, None, None)
            wrong = self._oracle.add_claim((diff.final_id, *best))
            if wrong is not None:
                self._note([((diff.final_id, *best), wrong)])
        elif outcome == "crossed":
            report.crossed += 1

    def snapshot(self, body: DepthSnapshot) -> None:
        self.report.snapshots += 1
        self.brackets.snapshot(body.last_update_id)
        self._book.apply_snapshot(body.last_update_id, body.bids, body.asks)

    def _note(self, wrong: list[Any]) -> None:
        for claim, quote in wrong:
            if self.report.first_mismatch is None:
                self.report.first_mismatch = {"u": claim[0], "book": claim[1:], "quote_u": quote[0], "quote": quote[1:]}

    def finish(self) -> SymbolReport:
        self._note(self._oracle.finish())
        report, brackets, oracle = self.report, self.brackets, self._oracle
        report.trade_duplicates, report.trades_missing = self.ids.duplicates, self.ids.missing
        report.trade_holes = self.ids.holes[:SHOWN_HOLES]
        report.bracketed = brackets.bracketed
        report.unbracketed = dict(sorted(brackets.refused.items()))
        if brackets.waiting:
            report.unbracketed["no_diff"] = brackets.waiting
        report.book_state = self._book.state
        report.oracle_checked, report.oracle_skipped = oracle.checked, oracle.skipped
        report.oracle_equal = oracle.checked - oracle.failed
        return report


class Inspection:
    """Takes the frames of a capture one by one."""

    def __init__(self) -> None:
        self.symbols: dict[str, _Symbol] = {}
        self.undecodable: Counter[str] = Counter()
        self.first_undecodable = ""
        self.peak_per_sec = 0
        self.longest_silence_ns = 0
        self.rx_back_most_ns = 0
        self._delays = {kind: Delays() for kind in KINDS}
        self._second = self._in_second = 0
        self._newest_ns = -1
        self._name_of = lru_cache(maxsize=4096)(lambda stream: parse_stream(stream.decode("utf-8", "replace")))

    def take(self, line: int, rx_ns: int, stream: bytes, frame: bytes) -> None:
        """One frame; `stream` as `Tally.add` gives it."""
        self._time(rx_ns)
        name = self._name_of(stream) if stream else StreamName(None, "snapshot", "")
        try:
            if name.kind == "bookTicker" and name.symbol:
                quote = decode_book_ticker(frame).data
                self._symbol(name.symbol).quote(quote)
                self._delay(name.kind, rx_ns, quote.event_ts_ms)
            elif name.kind == "depth" and name.symbol:
                diff = decode_depth(frame).data
                self._symbol(name.symbol).diff(diff)
                self._delay(name.kind, rx_ns, diff.event_ts_ms)
            elif name.kind == "aggTrade" and name.symbol:
                trade = decode_agg_trade(frame).data
                self._symbol(name.symbol).trade(trade)
                self._delay(name.kind, rx_ns, trade.event_ts_ms)
            elif name.kind == "snapshot":
                body = decode_snapshot(frame)
                self._symbol(body.symbol or "").snapshot(body)
        except UNDECODABLE as error:
            self.undecodable[name.kind] += 1
            self.first_undecodable = self.first_undecodable or f"line {line}: {error}"

    def _symbol(self, name: str) -> _Symbol:
        found = self.symbols.get(name)
        if found is None:
            found = self.symbols[name] = _Symbol(name)
        return found

    def _delay(self, kind: str, rx_ns: int, event_ts_ms: int | None) -> None:
        if event_ts_ms is not None:
            self._delays[kind].add(rx_ns // 1_000_000 - event_ts_ms)

    def _time(self, rx_ns: int) -> None:
        if self._newest_ns >= 0:
            self.longest_silence_ns = max(self.longest_silence_ns, rx_ns - self._newest_ns)
            self.rx_back_most_ns = max(self.rx_back_most_ns, self._newest_ns - rx_ns)
        self._newest_ns = max(self._newest_ns, rx_ns)
        if rx_ns // 1_000_000_000 != self._second:
            self._second, self._in_second = rx_ns // 1_000_000_000, 0
        self._in_second += 1
        self.peak_per_sec = max(self.peak_per_sec, self._in_second)

    def latency_ms(self) -> dict[str, list[int] | None]:
        """[p50, p99] of R - E per kind that the file has, and over all."""
        together = Delays()
        for each in self._delays.values():
            together._counts.update(each._counts)
        found = {kind: delays.quantiles(0.5, 0.99) for kind, delays in self._delays.items()}
        return {**{kind: pair for kind, pair in found.items() if pair}, "all": together.quantiles(0.5, 0.99)}


def inspect(path: Path) -> Report:
    """Read a capture once and report.

    What can't be read ends the report where it stands (`Report.error`), since the frames before it are still of use.

    Raises
    ------
    CaptureError
        Not a single frame can be read.
    """
    tally, inspection = Tally(path), Inspection()
    error = ""
    try:
        for rx_ns, conn, frame in tally.frames():
            stream = tally.add(rx_ns, conn, frame)
            inspection.take(tally.count, rx_ns, stream, frame)
    except CaptureError as failure:
        if not tally.count:
            raise
        error = str(failure)
    return _report(tally, tally.info(), inspection, error)


def _report(tally: Tally, info: CaptureInfo, inspection: Inspection, error: str) -> Report:
    span_sec = (info.last_rx_ns - info.first_rx_ns) / 1e9
    return Report(
        path=str(info.path),
        sha256="" if error else info.sha256,
        file_bytes=info.path.stat().st_size,
        text_bytes=tally.text_bytes,
        frames=info.frames,
        frames_by_conn=info.frames_by_conn,
        streams=info.streams,
        first_rx_ns=info.first_rx_ns,
        last_rx_ns=info.last_rx_ns,
        span_sec=round(span_sec, 3),
        frames_per_sec=round(info.frames / span_sec, 1) if span_sec > 0 else 0.0,
        peak_per_sec=inspection.peak_per_sec,
        longest_silence_sec=round(inspection.longest_silence_ns / 1e9, 3),
        rx_back=info.rx_back,
        rx_back_most_ms=round(max(0, inspection.rx_back_most_ns) / 1e6, 3),
        undecodable=dict(sorted(inspection.undecodable.items())),
        first_undecodable=inspection.first_undecodable,
        latency_ms=inspection.latency_ms(),
        symbols=[inspection.symbols[name].finish() for name in sorted(inspection.symbols)],
        error=error,
    )
