"""Records as the services' Avro decoders give them, and a driver that treats a sink as the runtime does."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from orderflow.lake.layout import avro_fields
from orderflow.lake.sink import CutResult, FileSink
from orderflow.topics import CVD, EVENTS, FEATURE_EVENTS, FUSION, JOURNAL, OFI, REJECTS, ROWS, SIGNALS, TICKS

T0_MS = 1_721_347_200_000
"""2024-07-19T00:00:00Z, a multiple of a minute."""
TEXT = {"symbol": "BTCUSDT", "meta_json": "{}", "meta": None, "event_type": "gap"}

Item = tuple[str, dict[str, Any]]


def record(topic: str, seq: int, **fields: Any) -> dict[str, Any]:
    """A record of a topic with every field of its schema; those not named get a value that depends on seq alone."""
    made = {
        name: fields.pop(name) if name in fields else _value(name, avro, seq)
        for name, avro in avro_fields(topic).items()
    }
    assert not fields, f"{topic} has no {sorted(fields)}"
    return made


def _value(name: str, avro: Any, seq: int) -> Any:
    if name in TEXT:
        return TEXT[name]
    if isinstance(avro, list):
        return None if (seq + len(name)) % 3 == 0 else _value(name, next(b for b in avro if b != "null"), seq)
    if isinstance(avro, dict):
        if avro["type"] == "enum":
            return avro["symbols"][seq % len(avro["symbols"])]
        return [seq / 7, -0.0] if avro.get("items") == "double" else ["a", "b"][: seq % 3]
    if name == "seq":
        return seq
    if name.endswith("ts_ms"):
        return T0_MS + seq
    if name.endswith("ts_ns"):
        return (T0_MS + seq) * 1_000_000
    plain = {"long": seq, "int": 0, "double": seq / 3, "boolean": seq % 2 == 0, "string": "normal", "bytes": b"{}"}
    return plain.get(avro, "synced")


def tick(seq: int, at_ms: int, kind: str = "tick", payload: str | None = None) -> dict[str, Any]:
    at_ns = at_ms * 1_000_000
    maps: dict[str, Any] = {name: {} for name in ("routes", "trade_ts_ms", "quote_ts_ms", "depth_ts_ms")}
    return record(TICKS, seq, sub=0, kind=kind, recv_ts_ns=at_ns, clock_ts_ns=at_ns, payload=payload, **maps)


def journal(seq: int, at_ms: int, kind: str = "frame", payload: bytes = b'{"stream":"x"}') -> dict[str, Any]:
    return record(
        JOURNAL, seq, kind=kind, route="", symbol=None, recv_ts_ns=at_ms * 1_000_000, epoch=None, session=None,
        payload=payload,
    )  # fmt: skip


def begin(seq: int, at_ms: int, session: str = "s1") -> list[Item]:
    payload = json.dumps({"type": "session", "session": session})
    return [(JOURNAL, journal(seq, at_ms, "config", payload.encode())), (TICKS, tick(seq, at_ms, "config", payload))]


def ticking(seq: int, at_ms: int) -> list[Item]:
    return [(JOURNAL, journal(seq, at_ms, "tick", b"{}")), (TICKS, tick(seq, at_ms))]


def ending(seq: int, at_ms: int) -> list[Item]:
    return [(JOURNAL, journal(seq, at_ms, "end", b"{}")), (TICKS, tick(seq, at_ms, "end", "{}"))]


def caused(seq: int, at_ms: int, symbol: str = "BTCUSDT", src: str = "aggTrade") -> list[Item]:
    """A frame and everything it causes, in the order of ranks."""
    times = {"symbol": symbol, "ts_ms": at_ms - 150, "recv_ts_ms": at_ms}
    items: list[Item] = [
        (JOURNAL, journal(seq, at_ms)),
        (ROWS, record(ROWS, seq, sub=0, src=src, **times)),
        (OFI, record(OFI, seq, sub=0, **times)),
        (CVD, record(CVD, seq, sub=0, **times)),
        (FUSION, record(FUSION, seq, sub=0, **times)),
        (SIGNALS, record(SIGNALS, seq, sub=0, **times)),
    ]
    if seq % 5 == 0:
        items.insert(2, (EVENTS, record(EVENTS, seq, sub=0, **times)))
        items.insert(3, (REJECTS, record(REJECTS, seq, sub=0, symbol=None, recv_ts_ns=at_ms * 1_000_000)))
        items.insert(7, (FEATURE_EVENTS, record(FEATURE_EVENTS, seq, sub=0, event_type="flip", **times)))
    return items


def session(
    first_ms: int = T0_MS + 1000, frames: int = 300, step_ms: int = 500, symbols: Iterable[str] = ("BTCUSDT", "ETHUSDT")
) -> list[Item]:
    """A whole session: config, frames of each kind in turn with a tick after every fourth, end."""
    names = list(symbols)
    sources = ("aggTrade", "bookTicker", "depth", "markPrice", "forceOrder")
    items = begin(1, first_ms)
    seq = 1
    for index in range(frames):
        seq += 1
        at_ms = first_ms + index * step_ms
        items += caused(seq, at_ms, names[index % len(names)], sources[index % len(sources)])
        if index % 4 == 3:
            seq += 1
            items += ticking(seq, at_ms + 1)
    return items + ending(seq + 1, first_ms + frames * step_ms)


def drive(sink: FileSink, items: Iterable[Item]) -> Iterator[CutResult]:
    """Give a sink its records as the runtime does, and yield each cut as it is made."""
    for topic, each in items:
        if topic not in sink.inputs:
            continue
        control = topic in (JOURNAL, TICKS) and each["kind"] in ("config", "end")
        if control and sink.cut_before(topic, each) and sink.rows_buffered():
            yield sink.write()
        if sink.step(topic, each):
            yield sink.write()


def tree(root: Path) -> dict[str, bytes]:
    """Every file below a folder, hidden ones too."""
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}
