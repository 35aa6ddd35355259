"""Records and streams for the tests of fusion, divergence, regime and signal."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Iterable, Iterator
from typing import Any

import msgspec
from orderflow.processor import Emit, Processor, Record
from orderflow.topics import CVD, OFI, TICKS

T0_MS = 1_700_000_000_000  # 22:13:20 UTC: session newyork
Step = tuple[str, Record]


def ofi(t_ms: int, z: float | None, symbol: str = "BTCUSDT", **fields: Any) -> Step:
    record = {
        "seq": 1, "sub": 0, "src": "bookTicker", "symbol": symbol, "ts_ms": t_ms, "event_ts_ms": t_ms,
        "recv_ts_ms": t_ms + 5, "ofi_l1": 0.0 if z is None else z, "ofi_value": z, "ofi_norm": None,
        "ofi_notional": None, "ofi_ema": None, "ofi_z": z if z is None or not math.isfinite(z) else max(-3.0, min(3.0, z)), "ofi_z_raw": z,
        "scale": 1.0, "ofi_sum_window": None, "components": [], "queue_imbalance": None, "weighted_mid": None,
        "micro_price": None, "mid": 100.0, "spread_bps": 1.0, "quote_rate": 50.0, "regime": "normal", "warmup": False,
        "std_zero": False, "paused": False, "book_state": "synced", "gap_count": 0, "latency_ms": 5,
    }  # fmt: skip
    return OFI, record | fields


def cvd(t_ms: int, z: float | None, symbol: str = "BTCUSDT", **fields: Any) -> Step:
    record = {
        "seq": 1, "sub": 0, "symbol": symbol, "ts_ms": t_ms, "event_ts_ms": t_ms + 145, "recv_ts_ms": t_ms + 150,
        "agg_trade_id": 1, "price": 100.0, "qty": 1.0, "side": "buy", "side_source": "exchange", "delta": 1.0,
        "cvd": 0.0, "cvd_ema": 0.0, "z_raw": z, "z_cvd": z, "scale": 1.0, "sigma_floor": 0.0, "floor_used": False,
        "trades_per_sec": 5.0, "volume_60s": 100.0, "notional_60s": 500_000.0, "imbalance_1s": None,
        "imbalance_5s": None, "imbalance_10s": None, "imbalance_30s": None, "buy_ratio": 0.5, "vpin": None,
        "kyle_lambda": None, "amihud": None, "regime": "normal", "warmup": False, "frozen": False,
        "book_state": "synced", "gap_count": 0, "latency_ms": 150,
    }  # fmt: skip
    return CVD, record | fields


def tick(clock_ms: int, **fields: Any) -> Step:
    record = {
        "seq": 1, "sub": 0, "kind": "tick", "recv_ts_ns": clock_ms * 1_000_000, "clock_ts_ns": clock_ms * 1_000_000,
        "routes": {"public": "up", "market": "up"}, "trade_ts_ms": {}, "quote_ts_ms": {}, "depth_ts_ms": {},
        "payload": None,
    }  # fmt: skip
    return TICKS, record | fields


def command(clock_ms: int, command_id: str, body: dict[str, Any], apply_at_ms: int = 0) -> Step:
    envelope = {"command_id": command_id, "origin": "cli", "apply_at_ns": apply_at_ms * 1_000_000, "payload": body}
    return tick(clock_ms, kind="command", payload=json.dumps(envelope))


def run(processor: Processor, steps: Iterable[Step]) -> list[Emit]:
    """Every record that the steps cause, numbered per topic as the runtime would."""
    emits = []
    for seq, (topic, record) in enumerate(steps, 1):
        subs: dict[str, int] = {}
        for name, key, value in processor.step(topic, record | {"seq": seq, "sub": 0}):
            emits.append((name, key, {"seq": seq, "sub": subs.get(name, 0), **value}))
            subs[name] = subs.get(name, 0) + 1
    return emits


def values(emits: Iterable[Emit], topic: str) -> list[Record]:
    return [value for name, _, value in emits if name == topic]


def packed(emits: object) -> bytes:
    return msgspec.msgpack.encode(emits)


def market(seed: int, seconds: int = 240, symbols: tuple[str, ...] = ("BTCUSDT", "ETHUSDT")) -> Iterator[Step]:
    """A market with everything in it: agreement and conflict, gaps, late trades, silence, quiet and wild minutes."""
    rng = random.Random(seed)
    flow = dict.fromkeys(symbols, 0.0)
    mid = dict.fromkeys(symbols, 100.0)
    level = dict.fromkeys(symbols, 0.0)
    newest: dict[str, dict[str, int]] = {"trade_ts_ms": {}, "quote_ts_ms": {}, "depth_ts_ms": {}}
    for number in range(seconds * 5):
        t_ms = T0_MS + number * 200
        second = number // 5
        for symbol in symbols:
            flow[symbol] = 0.9 * flow[symbol] + rng.gauss(0, 0.6)
            mid[symbol] *= math.exp(rng.gauss(0, 1e-4 * (1 + 4 * (second // 40 % 2))))
            warmup = number < 20
            missing = rng.random() < 0.01
            z = None if warmup or missing else flow[symbol] + rng.gauss(0, 0.5)
            state = "resyncing" if 100 <= second < 103 else "synced"
            gaps = int(second >= 100)
            newest["quote_ts_ms"][symbol] = t_ms
            busy = second // 30 % 2
            yield ofi(
                t_ms, z, symbol, mid=mid[symbol], spread_bps=rng.choice([0.5, 1.0, 3.0]), warmup=warmup,
                quote_rate=60.0 if busy else 12.0, book_state=state, gap_count=gaps,
            )  # fmt: skip
            if rng.random() < 0.6 and not 150 <= second < 158:
                z = None if number < 25 or rng.random() < 0.01 else flow[symbol] + rng.gauss(0, 0.8)
                level[symbol] += z or 0.0
                late = rng.choice([150] * 9 + [700])
                newest["trade_ts_ms"][symbol] = t_ms - 140
                yield cvd(
                    t_ms - 140, z, symbol, recv_ts_ms=t_ms - 140 + late, price=mid[symbol], cvd=level[symbol],
                    trades_per_sec=4.0 if busy else 0.4, notional_60s=400_000.0 if busy else 60_000.0,
                    warmup=number < 25, gap_count=gaps,
                )  # fmt: skip
        routes = {"public": "up", "market": "down" if 155 <= second < 158 else "up"}
        maps = {name: dict(times) for name, times in newest.items()}
        yield tick(t_ms + 60, routes=routes, **maps)
