"""What the benchmarks run on: a journal and everything that follows from it, encoded, by topic and partition."""

from __future__ import annotations

import gzip
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from orderflow.capture import scan
from orderflow.config import Config, load
from orderflow.ingest.capture_source import CaptureSource
from orderflow.replay.cascade import Cascade
from orderflow.streaming.codec import Codecs, schema_text
from orderflow.topics import BY_NAME, CVD, DERIVED, FUSION, JOURNAL, OFI, ROWS, SIGNALS

ROOT = Path(__file__).resolve().parents[2]
CAPTURE = "usdm_btc_eth_20240718.gz"
TICK_MS = 100
SYNTHETIC_SYMBOLS = ("BTCUSDT", "ETHUSDT")
SYNTHETIC_STEP_MS = 100

Entry = tuple[bytes, bytes]
"""(key, encoded value) of a record."""


@dataclass(slots=True)
class Dataset:
    """Records of each topic by partition; `journal_seqs` the newest seq of each partition."""

    name: str
    config: Config
    codecs: Codecs
    path: Path
    """Of the file that the journal comes from."""
    topics: dict[str, dict[int, list[Entry]]] = field(default_factory=dict)
    journal_seqs: dict[int, int] = field(default_factory=dict)


def capture_path() -> Path | None:
    """The recorded market, where it is at hand."""
    folder = Path(os.environ.get("ORDERFLOW_CAPTURES", ROOT.parent / "shared" / "data" / "replay"))
    path = folder / CAPTURE
    return path if path.is_file() else None


def bench_codecs() -> Codecs:
    """Codecs of every topic under made-up registry ids."""
    topics = (JOURNAL, *DERIVED)

    async def by_id(number: int) -> str:
        raise LookupError(f"no schema has id {number} here")

    schemas = {topic: schema_text(BY_NAME[topic].schema or "") for topic in topics}
    return Codecs({topic: number for number, topic in enumerate(topics, 1)}, schemas, by_id)


def write_synthetic(path: Path, frames: int) -> Path:
    """A capture of the synthetic market, at least `frames` frames; snapshots stand behind the first step."""
    from orderflow.venues.binance.sim.market import SyntheticMarket

    market = SyntheticMarket(1, SYNTHETIC_SYMBOLS)
    written = 0
    with gzip.open(path, "wt", compresslevel=1) as file:
        while written < frames:
            now_ms = market.now_ms + SYNTHETIC_STEP_MS
            for stream, payload, _ in market.advance(now_ms):
                route = "public" if stream.partition("@")[2].startswith(("bookTicker", "depth")) else "market"
                file.write(f"{now_ms * 1_000_000} {route} {payload.decode()}\n")
                if not written:
                    for symbol in SYNTHETIC_SYMBOLS:
                        body = market.snapshot(symbol, 1000).decode()
                        file.write(f'{now_ms * 1_000_000} rest {{"symbol":"{symbol}",{body[1:]}\n')
                written += 1
    return path


def build(name: str, path: Path, frames: int) -> Dataset:
    """The first `frames` journal records of a capture, and all that the pipeline makes of them."""
    data = Dataset(name, load({}), bench_codecs(), path, {topic: {} for topic in (JOURNAL, *DERIVED)})
    encode = data.codecs.encoder(JOURNAL)
    cascades: dict[int, Cascade] = {}
    for partition, record in _records(path, frames):
        seq = data.journal_seqs.get(partition, 0) + 1
        data.journal_seqs[partition] = record["seq"] = seq
        if partition not in cascades:
            cascades[partition] = Cascade(data.config, data.codecs, partition)
        key = (record["symbol"] or "").encode()
        data.topics[JOURNAL].setdefault(partition, []).append((key, encode(record)))
        for topic, entries in cascades[partition].step(record).items():
            data.topics[topic].setdefault(partition, []).extend((each.key, each.value) for each in entries)
    empty = [topic for topic in (ROWS, OFI, CVD, FUSION, SIGNALS) if not data.topics[topic]]
    if empty:
        raise ValueError(
            f"{path}: its first {frames} records give nothing on {empty[0]}, so no rate would mean anything"
        )
    return data


def _records(path: Path, frames: int) -> Iterator[tuple[int, dict[str, object]]]:
    source = CaptureSource(path, scan(path), (), TICK_MS)
    for count, item in enumerate(source.records()):
        if count >= frames:
            return
        yield item
