"""`orderflow capture`: questions to recorded files."""

from __future__ import annotations

import argparse
import json
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

import msgspec
from rich.console import Console
from rich.table import Table

from orderflow.cli.inspection import Report, SymbolReport, inspect
from orderflow.errors import CaptureError

WIDTH: Final = 100
SHOWN_SYMBOLS: Final = 20
SHOWN_FAULTS: Final = 8


def add_parser(subparsers: Any) -> None:
    """Add `capture` to the command line."""
    parser: argparse.ArgumentParser = subparsers.add_parser("capture", help="look into a recorded file")
    tasks = parser.add_subparsers(dest="task", metavar="TASK", required=True)
    info = tasks.add_parser(
        "info",
        help="what a capture holds, and whether it can be trusted",
        description="Frames by stream, rates, missing trade ids, breaks in the chains of diffs, whether each snapshot is "
        "bracketed, whether the book's best level is the quote's after every diff, delays. Exit status 0, or 2 where the "
        "file can't be read to its end.",
    )
    info.add_argument("file", metavar="FILE", type=Path)
    info.add_argument("--json", action="store_true", help="one JSON object instead of a table")


def run(args: argparse.Namespace) -> int:
    """Report on standard output.

    Raises
    ------
    CaptureError
        The file can't be read to its end; what came before has been reported.
    """
    report = inspect(args.file)
    if args.json:
        content = {**msgspec.to_builtins(report), "faults": report.faults}
        json.dump(content, sys.stdout, indent=2, ensure_ascii=False)
        sys.stdout.write("\n")
    else:
        show(report)
    if report.error:
        sys.stdout.flush()
        raise CaptureError(report.error)
    return 0


def show(report: Report) -> None:
    """One screen for a person."""
    console = Console(width=WIDTH, highlight=False, markup=False, soft_wrap=False)
    begin, end = (datetime.fromtimestamp(ns / 1e9, UTC) for ns in (report.first_rx_ns, report.last_rx_ns))
    console.print(report.path, soft_wrap=True)
    console.print(
        f"{report.frames:,} frames, {report.file_bytes:,} bytes on disk, {report.text_bytes:,} of frames",
        no_wrap=True,
    )
    console.print(
        f"received {begin:%Y-%m-%d %H:%M:%S} to {end:%Y-%m-%d %H:%M:%S} UTC: {report.span_sec:,.1f} s, "
        f"{report.frames_per_sec:,.0f} frames/s, at most {report.peak_per_sec:,}/s"
    )
    conns = ", ".join(f"{conn} {count:,}" for conn, count in report.frames_by_conn.items())
    back = f", back by up to {report.rx_back_most_ms:,.1f} ms" if report.rx_back else ""
    console.print(
        f"{conns}; receive times go back {report.rx_back:,} times{back}; "
        f"longest silence {report.longest_silence_sec:,.1f} s"
    )
    console.print(_latency(report))
    console.print()
    _show_symbols(console, report.symbols)
    others = {stream: count for stream, count in report.streams.items() if not _in_table(stream)}
    if others:
        console.print(
            f"other streams: {sum(others.values()):,} frames of {len(others)} streams, as {next(iter(others))}"
        )
    if report.sha256:
        console.print(f"sha256 {report.sha256}")
    _show_faults(console, report.faults)


def _in_table(stream: str) -> bool:
    return stream.partition("@")[2] in ("bookTicker", "aggTrade") or "@depth@" in stream or stream.endswith("@depth")


def _latency(report: Report) -> str:
    pairs = [f"{kind} {pair[0]:,} / {pair[1]:,}" for kind, pair in report.latency_ms.items() if pair]
    return "R - E in ms, p50 / p99: " + ("; ".join(pairs) or "no frame has an E")


def _show_symbols(console: Console, symbols: list[SymbolReport]) -> None:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("symbol", no_wrap=True)
    for name in ("quotes", "trades", "missing", "twice", "diffs", "breaks", "snapshots", "oracle", "book"):
        table.add_column(name, justify="right", no_wrap=True)
    # Symbols with a fault come first, so that they are on the screen however many there are.
    ordered = sorted(symbols, key=lambda each: (not _flawed(each), each.symbol))
    for each in ordered[:SHOWN_SYMBOLS]:
        table.add_row(
            each.symbol,
            f"{each.quotes:,}",
            f"{each.trades:,}",
            f"{each.trades_missing:,}",
            f"{each.trade_duplicates + each.quotes_out_of_order + each.diff_duplicates:,}",
            f"{each.diffs:,}",
            f"{each.chain_breaks:,}",
            f"{each.bracketed}/{each.snapshots}",
            f"{each.oracle_equal:,}/{each.oracle_checked:,}",
            each.book_state,
        )
    console.print(table)
    if len(ordered) > SHOWN_SYMBOLS:
        console.print(f"and {len(ordered) - SHOWN_SYMBOLS} symbols more; --json has them all")
    console.print(
        "missing: trade ids; twice: repetitions; snapshots: bracketed/all; oracle: book is quote/compared",
        style="dim",
    )


def _flawed(each: SymbolReport) -> bool:
    return bool(
        each.trades_missing or each.chain_breaks or each.crossed or each.oracle_equal < each.oracle_checked
    ) or (each.diffs > 0 and each.book_state != "synced")


def _show_faults(console: Console, faults: list[str]) -> None:
    if not faults:
        console.print("no fault found")
        return
    console.print(f"{len(faults)} faults:" if len(faults) > 1 else "1 fault:")
    for fault in faults[:SHOWN_FAULTS]:
        console.print(f"  {fault}", soft_wrap=True)
    if len(faults) > SHOWN_FAULTS:
        console.print(f"  and {len(faults) - SHOWN_FAULTS} more; --json has them all")
