"""Captures and single frames as journal records, for tests of the normaliser."""

from __future__ import annotations

import gzip
import json
import os
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
from orderflow.processor import Emit, Record
from orderflow.venues.binance.frames import route_of
from orderflow.venues.binance.normaliser import NormaliserConfig, NormaliserProcessor

CAPTURES = Path(os.environ.get("ORDERFLOW_CAPTURES", Path(__file__).resolve().parents[3] / "shared/data/replay"))
BTC_ETH = "usdm_btc_eth_20240718.gz"
ALTS = "usdm_4alts_20210722_realagg.gz"
TICK_NS = 200_000_000
STREAMS = ("aggTrade", "bookTicker", "depth")


def need_captures() -> None:
    """Skip the test where the recorded data is not there."""
    if not (CAPTURES / BTC_ETH).is_file() or not (CAPTURES / ALTS).is_file():
        pytest.skip(f"recorded market data not found in {CAPTURES}: set ORDERFLOW_CAPTURES to its folder")


def journal_record(
    seq: int,
    kind: str,
    payload: bytes | dict[str, Any] | list[Any] = b"",
    *,
    recv_ts_ns: int = 0,
    route: str = "",
    symbol: str | None = None,
) -> Record:
    """A journal record as the runtime hands it to the processor."""
    return {
        "seq": seq,
        "kind": kind,
        "route": route,
        "symbol": symbol,
        "recv_ts_ns": recv_ts_ns,
        "source_position": seq,
        "ordinal": 0,
        "epoch": None,
        "session": None,
        "payload": payload if isinstance(payload, bytes) else json.dumps(payload).encode(),
    }


def capture_frames(name: str) -> Iterator[tuple[int, str, bytes]]:
    """(receive time in ns, connection, frame) of a capture."""
    with gzip.open(CAPTURES / name, "rb") as lines:
        for line in lines:
            recv_ts_ns, connection, frame = line.rstrip(b"\n").split(b" ", 2)
            yield int(recv_ts_ns), connection.decode(), frame


@lru_cache(maxsize=2)
def capture_journal(name: str) -> tuple[Record, ...]:
    """A capture as one journal partition: session, frames, a tick every 200 ms of its receive times, end."""
    records: list[Record] = []
    newest: dict[str, dict[str, int]] = {}
    tick = 0

    def put(kind: str, recv_ts_ns: int, payload: bytes | dict[str, Any], **rest: Any) -> None:
        records.append(journal_record(len(records) + 1, kind, payload, recv_ts_ns=recv_ts_ns, **rest))

    recv_ts_ns = 0
    for recv_ts_ns, connection, frame in capture_frames(name):
        if not records:
            put("config", recv_ts_ns, {"type": "session", "session": "test", "source": "capture", "symbols": []})
            tick = recv_ts_ns // TICK_NS
        while tick < recv_ts_ns // TICK_NS:
            tick += 1
            payload = {"routes": {"market": "up", "public": "up"}, "symbols": dict(sorted(newest.items()))}
            put("tick", tick * TICK_NS, payload)
        if connection == "rest":
            put("snapshot", recv_ts_ns, frame, route="rest", symbol=json.loads(frame)["symbol"])
            continue
        symbol, kind, ts_ms = route_of(frame)
        if symbol is not None and kind in STREAMS and ts_ms is not None:
            newest.setdefault(symbol, {})[kind] = ts_ms
        put("frame", recv_ts_ns, frame, route=connection, symbol=symbol)
    put("end", recv_ts_ns, {"reason": "end of capture"})
    return tuple(records)


def run(records: Sequence[Record], processor: NormaliserProcessor | None = None) -> list[tuple[int, Emit]]:
    """(seq, emit) of everything that the records cause."""
    processor = processor or NormaliserProcessor(NormaliserConfig(), 0)
    return [(record["seq"], emit) for record in records for emit in processor.step("market.journal", record)]


class Feed:
    """A normaliser fed by hand, one symbol, with ids and times that continue by themselves."""

    def __init__(self, symbol: str = "BTCUSDT", **settings: Any) -> None:
        self.symbol = symbol
        self.processor = NormaliserProcessor(NormaliserConfig(**settings), 0)
        self.seq = 0
        self.now_ms = 1_700_000_000_000
        self.emits: list[Emit] = []
        """Everything so far."""

    def step(self, kind: str, payload: Any = b"", **rest: Any) -> list[Emit]:
        self.seq += 1
        rest.setdefault("recv_ts_ns", self.now_ms * 1_000_000)
        emits = self.processor.step("market.journal", journal_record(self.seq, kind, payload, **rest))
        self.emits.extend(emits)
        return emits

    def frame(self, stream: str, data: dict[str, Any], **rest: Any) -> list[Emit]:
        payload = json.dumps(
            {"stream": f"{self.symbol.lower()}@{stream}", "data": data}, separators=(",", ":"), ensure_ascii=False
        ).encode()
        return self.step("frame", payload, symbol=self.symbol, route="public", **rest)

    def trade(self, number: int, price: str = "100.0", qty: str = "1.0", **fields: Any) -> list[Emit]:
        return self.frame(
            "aggTrade",
            {
                "e": "aggTrade",
                "E": self.now_ms - 5,
                "a": number,
                "s": self.symbol,
                "p": price,
                "q": qty,
                "f": number,
                "l": number,
                "T": self.now_ms - 10,
                "m": False,
                **fields,
            },
        )

    def quote(self, update_id: int, bid: str = "99.9", ask: str = "100.1", **fields: Any) -> list[Emit]:
        return self.frame(
            "bookTicker",
            {
                "e": "bookTicker",
                "u": update_id,
                "s": self.symbol,
                "b": bid,
                "B": "2",
                "a": ask,
                "A": "3",
                "T": self.now_ms - 10,
                "E": self.now_ms - 9,
                **fields,
            },
        )

    def diff(self, first: int, final: int, prev: int, bids: Any = (), asks: Any = (), **fields: Any) -> list[Emit]:
        return self.frame(
            "depth@100ms",
            {
                "e": "depthUpdate",
                "E": self.now_ms - 9,
                "T": self.now_ms - 10,
                "s": self.symbol,
                "U": first,
                "u": final,
                "pu": prev,
                "b": list(bids),
                "a": list(asks),
                **fields,
            },
        )

    def snapshot(self, last_update_id: int, bids: Any = (("99.9", "1"),), asks: Any = (("100.1", "1"),)) -> list[Emit]:
        body = {"lastUpdateId": last_update_id, "E": self.now_ms, "T": self.now_ms, "bids": bids, "asks": asks}
        return self.step("snapshot", body, symbol=self.symbol, route="rest")

    def tick(self, after_ms: int = 200, routes: dict[str, str] | None = None) -> list[Emit]:
        self.now_ms += after_ms
        return self.step("tick", {"routes": routes or {"market": "up", "public": "up"}, "symbols": {}})

    def synced(self) -> Feed:
        """With a book that is in step, u = 20."""
        self.diff(10, 20, 9)
        self.snapshot(15)
        return self


def of(emits: Sequence[Emit], topic: str) -> list[Record]:
    """Values of one topic."""
    return [value for name, _, value in emits if name == topic]


def events(emits: Sequence[Emit], event_type: str | None = None) -> list[dict[str, Any]]:
    """Events with their details decoded as `meta`."""
    found = of(emits, "market.events")
    return [
        {**value, "meta": json.loads(value["meta_json"])}
        for value in found
        if event_type is None or value["event_type"] == event_type
    ]


def reasons(emits: Sequence[Emit]) -> list[str]:
    """Reasons of the rejects."""
    return [value["reason"] for value in of(emits, "quality.rejects")]
