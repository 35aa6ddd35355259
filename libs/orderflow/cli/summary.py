"""What a run came to: counts from the topics' canonical views, checked against the lake and the files of signals."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from orderflow.lake.layout import JSONL_ROOT
from orderflow.lake.query import connect
from orderflow.lake.sqlite import signals_held
from orderflow.streaming.codec import Codecs
from orderflow.streaming.log import TP, Log
from orderflow.topics import (
    CVD,
    DERIVED,
    EVENTS,
    FEATURE_EVENTS,
    FUSION,
    JOURNAL,
    OFI,
    PARTITIONS,
    REJECTS,
    ROWS,
    SIGNALS,
)
from orderflow.verify import canonical

LAKE_KINDS: Final = {OFI: "ofi", CVD: "cvd", FUSION: "fusion", SIGNALS: "signals"}
ROW_KINDS: Final = {"aggTrade": "prices", "bookTicker": "quotes", "depth": "book"}
ROW_SOURCES: Final = ("aggTrade", "bookTicker", "depth", "markPrice", "forceOrder", "unknown")


async def topic_counts(log: Log, codecs: Codecs, prefix: str) -> dict[str, Any]:
    """Canonical records per topic, rows by source and symbol, journal by kind, events and rejects by name."""
    from orderflow.streaming.codec import peek

    counts: dict[str, Any] = {"topics": {}, "rows": {}, "journal": {}, "events": {}, "rejects": {}, "confirmed": 0}
    counts["first_stamp_ms"] = None
    decoders = {topic: codecs.decoder(topic) for topic in (JOURNAL, *DERIVED)}
    synced: dict[str, int] = {}
    for topic in (JOURNAL, *DERIVED):
        total = 0
        for partition in range(PARTITIONS):
            async for chunk in canonical(log, TP(prefix + topic, partition), journal=topic == JOURNAL):
                total += len(chunk)
                if topic == ROWS:
                    for _, _, record in chunk:
                        source = ROW_SOURCES[peek(record.value or b"")[2]]
                        counts["rows"][source] = counts["rows"].get(source, 0) + 1
                elif topic in (EVENTS, FEATURE_EVENTS):
                    if topic == EVENTS:
                        for _, _, record in chunk:
                            event = decoders[topic](record.value or b"")
                            if event["event_type"] == "book_synced":
                                synced[event["symbol"]] = synced.get(event["symbol"], 0) + 1
                    _count(counts["events"], (decoders[topic](r.value or b"")["event_type"] for _, _, r in chunk))
                elif topic == REJECTS:
                    _count(counts["rejects"], (decoders[topic](r.value or b"")["reason"] for _, _, r in chunk))
                elif topic == JOURNAL:
                    oldest = min(record.timestamp for _, _, record in chunk)
                    counts["first_stamp_ms"] = min(oldest, counts["first_stamp_ms"] or oldest)
                    _count(counts["journal"], (decoders[topic](r.value or b"")["kind"] for _, _, r in chunk))
                elif topic == SIGNALS:
                    counts["confirmed"] += sum(decoders[topic](r.value or b"")["confirm"] for _, _, r in chunk)
        counts["topics"][topic] = total
    counts["resyncs"] = sum(count - 1 for count in synced.values())
    return counts


def _count(into: dict[str, int], names: Any) -> None:
    for name in names:
        into[name] = into.get(name, 0) + 1


def lake_counts(out: Path) -> dict[str, Any]:
    """Rows per kind and symbol, and files, as DuckDB reads them back."""
    connection = connect(out)
    kinds: dict[str, dict[str, int]] = {}
    for kind in (
        "prices",
        "quotes",
        "book",
        "ofi",
        "cvd",
        "fusion",
        "events",
        "signals",
        "rejects",
        "marks",
        "liquidations",
    ):
        rows = connection.execute(f"SELECT symbol, count(*) FROM {kind} GROUP BY symbol ORDER BY symbol").fetchall()
        kinds[kind] = {str(symbol): int(count) for symbol, count in rows}
    connection.close()
    files = sorted((out / "data").rglob("part-*"))
    return {"rows": kinds, "files": len(files), "bytes": sum(path.stat().st_size for path in files)}


def signal_counts(out: Path, chosen: Sequence[str]) -> dict[str, int]:
    """Signals in each of the chosen forms (`orderflow.config.SIGNAL_SINKS`), read back."""
    counts: dict[str, int] = {}
    if "jsonl" in chosen:
        counts["jsonl"] = sum(_lines(path) for path in (out / JSONL_ROOT).glob("date=*/symbol=*/signals-*.jsonl"))
    if "sqlite" in chosen:
        counts["sqlite"] = signals_held(out)
    return counts


def _lines(path: Path) -> int:
    with path.open("rb") as file:
        return sum(1 for _ in file)


def disagreements(topics: dict[str, Any], lake: dict[str, Any], signals: Mapping[str, int]) -> list[str]:
    """Where the lake and the files of signals do not hold what the topics do; empty when all is well."""
    found = [
        f"{SIGNALS} has {topics['topics'][SIGNALS]} records and the files of the sink {form} {held}"
        for form, held in signals.items()
        if held != topics["topics"][SIGNALS]
    ]
    for topic, kind in LAKE_KINDS.items():
        _compare(found, topic, topics["topics"][topic], kind, lake)
    for source, kind in ROW_KINDS.items():
        _compare(found, f"{ROWS} {source}", topics["rows"].get(source, 0), kind, lake)
    _compare(found, "events", topics["topics"][EVENTS] + topics["topics"][FEATURE_EVENTS], "events", lake)
    _compare(found, REJECTS, topics["topics"][REJECTS], "rejects", lake)
    return found


def _compare(found: list[str], name: str, count: int, kind: str, lake: dict[str, Any]) -> None:
    held = sum(lake["rows"][kind].values())
    if held != count:
        found.append(f"{name} has {count} records and the lake's {kind} {held}")


def write(out: Path, content: dict[str, Any]) -> Path:
    """`DIR/summary.json`, atomically."""
    path = out / "summary.json"
    temporary = out / ".summary.json.part"
    temporary.write_text(json.dumps(content, indent=2, sort_keys=False) + "\n", "utf-8")
    temporary.replace(path)
    return path
