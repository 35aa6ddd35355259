"""What a person sees of a run: a live screen on a terminal, a line every few seconds elsewhere."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any, Final

from rich.console import Group
from rich.table import Table
from rich.text import Text

from orderflow.cli.supervisor import Child, Supervisor
from orderflow.processor import Record
from orderflow.streaming.codec import Codecs
from orderflow.streaming.log import TP, Log, Reader
from orderflow.topics import FUSION, PARTITIONS, SIGNALS

NEWEST: Final = {FUSION: 4, SIGNALS: 200}
"""Newest records of a poll that are decoded per partition. Of features the last is shown; of signals the last confirmed
one, which is seldom the newest."""


@dataclass(slots=True)
class SymbolLine:
    """What is shown of a symbol."""

    fusion: Record = field(default_factory=dict)
    signal: Record = field(default_factory=dict)
    signal_seen_at: float = 0.0
    """When the signal came in, seconds of the monotonic clock."""


class Watcher:
    """Follows fusion and signals from where they end now, decoding only the newest of each poll."""

    def __init__(self, log: Log, codecs: Codecs, prefix: str) -> None:
        self._log = log
        self._codecs = codecs
        self._tps = [TP(prefix + topic, partition) for topic in (FUSION, SIGNALS) for partition in range(PARTITIONS)]
        self._logical = {prefix + FUSION: FUSION, prefix + SIGNALS: SIGNALS}
        self._reader: Reader | None = None
        self.symbols: dict[str, SymbolLine] = {}
        self.first_feature_at = 0.0

    async def open(self) -> None:
        self._reader = await self._log.reader(await self._log.end_offsets(self._tps))

    async def look(self) -> None:
        """Take in what is new."""
        assert self._reader is not None
        for tp, records in (await self._reader.poll(0, 20_000)).items():
            topic = self._logical[tp.topic]
            decode = self._codecs.decoder(topic)
            newest = [record for record in records if record.value is not None][-NEWEST[topic] :]
            if newest and not self.first_feature_at:
                self.first_feature_at = time.monotonic()
            for record in newest:
                assert record.value is not None
                row = decode(record.value)
                line = self.symbols.setdefault(row["symbol"], SymbolLine())
                if topic == FUSION:
                    line.fusion = row
                elif row["confirm"]:
                    line.signal = row
                    line.signal_seen_at = time.monotonic()

    async def close(self) -> None:
        if self._reader is not None:
            await self._reader.close()


def screen(title: str, supervisor: Supervisor, watcher: Watcher, rates: dict[str, float]) -> Group:
    """The live screen."""
    return Group(Text(title, style="bold"), _symbols(watcher), _services(supervisor, rates))


def _number(value: Any, digits: int = 2) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _symbols(watcher: Watcher) -> Table:
    table = Table(box=None, pad_edge=False)
    for name in ("symbol", "price", "spread bps", "OFI z", "CVD z", "score", "regime", "book", "last signal"):
        table.add_column(name, justify="left" if name in ("symbol", "regime", "book", "last signal") else "right")
    for symbol in sorted(watcher.symbols):
        line = watcher.symbols[symbol]
        row = line.fusion
        table.add_row(
            symbol,
            f"{row.get('price'):.12g}" if row.get("price") is not None else "-",
            _number(row.get("spread_bps")),
            _number(row.get("z_ofi")),
            _number(row.get("z_cvd")),
            _number(row.get("score")),
            str(row.get("regime", "-")),
            str(row.get("book_state", "-")),
            _last_signal(line),
        )
    if not watcher.symbols:
        table.add_row("waiting for the first feature row", *[""] * 8)
    return table


def _last_signal(line: SymbolLine) -> str:
    if not line.signal:
        return "-"
    age_sec = time.monotonic() - line.signal_seen_at
    return f"{line.signal['strength']} {_number(line.signal['score'])}, {age_sec:.0f} s ago"


def _services(supervisor: Supervisor, rates: dict[str, float]) -> Table:
    table = Table(box=None, pad_edge=False)
    for name in ("service", "records/s", "lag", "latency p99 ms", "restarts", "state"):
        table.add_column(name, justify="left" if name in ("service", "state") else "right")
    # Readers are started before writers; a person follows the data from the source on.
    for name, child in reversed(supervisor.children.items()):
        latency = child.status.get("latency_ms") or {}
        table.add_row(
            name,
            f"{rates[name]:,.0f}" if name in rates else "-",
            _lag(child, supervisor),
            _number(latency.get("0.99"), 1),
            str(child.restarts),
            _state(child),
        )
    return table


def _lag(child: Child, supervisor: Supervisor) -> str:
    """Journal records that the recorder has numbered and this service has not yet dealt with."""
    frontiers = child.status.get("frontiers")
    ingestion = supervisor.children.get("ingestion")
    seqs = ingestion.status.get("recorder", {}).get("seqs") if ingestion is not None else None
    if not frontiers or not seqs:
        return "-"
    return f"{sum(max(0, seqs[partition] - frontiers.get(partition, 0)) for partition in seqs):,}"


def _state(child: Child) -> str:
    if not child.running:
        return "restarting" if child.expected_to_run else "stopped"
    if child.status.get("drained"):
        return "drained"
    return "ready" if child.status.get("ready") else "starting"


def plain_line(elapsed_sec: float, supervisor: Supervisor, watcher: Watcher, rates: dict[str, float]) -> str:
    """One line for where there is no terminal."""
    symbols = "  ".join(
        f"{symbol} {_number(line.fusion.get('mid'))} z_ofi {_number(line.fusion.get('z_ofi'))} "
        f"z_cvd {_number(line.fusion.get('z_cvd'))} score {_number(line.fusion.get('score'))}"
        for symbol, line in sorted(watcher.symbols.items())[:3]
    )
    down = [name for name, child in supervisor.children.items() if not child.status.get("ready")]
    state = f"  not ready: {','.join(down)}" if down else ""
    restarts = sum(child.restarts for child in supervisor.children.values())
    return (
        f"{elapsed_sec:6.1f} s  ingestion {rates.get('ingestion', 0):,.0f}/s  signal {rates.get('signal', 0):,.0f}/s  "
        f"restarts {restarts}{state}  {symbols}"
    )
