"""The recorder's journal: numbering, epochs, fencing. The one writer that is not deterministic, so it is fenced.

Opening: append `open` with a higher epoch to each partition, wait for it, read the tail up to it, and only then go on
numbering. Readers that have passed an `open` drop older epochs behind it. A recorder notices that another has taken
over by a hole in the offsets of its own writes, reads the hole, and stops at a newer epoch.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final

import msgspec

from orderflow.errors import ConfigError, FencedError, LogError
from orderflow.processor import Record
from orderflow.streaming import crash
from orderflow.streaming.codec import Codecs
from orderflow.streaming.journal import EPOCH_HEADER, OPEN_KIND, JournalView, epoch_of
from orderflow.streaming.log import TP, Log, LogRecord, read_ranges
from orderflow.streaming.samples import RecentSamples
from orderflow.streaming.writer import PATIENCE_SEC, Writer
from orderflow.topics import JOURNAL

logger = logging.getLogger(__name__)

TAIL_RECORDS: Final = 20_000
OPEN_ATTEMPTS: Final = 8
OPEN_JITTER_SEC: Final = 0.2


SOCKET_SOURCES: Final = {"live": "the live market", "sim": "a simulated market"}
CAPTURE_SOURCE: Final = "a recorded market"


class _TickSession(msgspec.Struct):
    session: str = ""


@dataclass(slots=True)
class Tail:
    """Where a partition's journal stands when a recorder has opened it."""

    seq: int = 0
    """Number of its newest record; 0 for a new journal."""
    source_position: int = -1
    ordinal: int = 0
    kind: str = ""
    session: str = ""
    """Session that the newest record belongs to; empty for a new journal."""
    clock_ts_ns: int = 0


def market_of(session: str) -> str:
    """What a session recorded, in words; empty where its name does not tell.

    Sessions over sockets begin with their source, as in `live-1f2e3d4c5b6a-0011aabb`; those of captures have no hyphen.
    """
    source, hyphen, _ = session.partition("-")
    return SOCKET_SOURCES.get(source, "") if hyphen else CAPTURE_SOURCE


def check_market(tails: Iterable[Tail], session: str, topic: str) -> None:
    """That a journal is continued with the kind of market that it holds.

    Raises
    ------
    ConfigError
        It is not: numbers from one would stand in the series of the other, and nothing downstream could tell.
    """
    ours = market_of(session)
    for tail in tails:
        theirs = market_of(tail.session) if tail.session else ""
        if ours and theirs and ours != theirs:
            raise ConfigError(
                f"the journal {topic} holds {theirs} (session {tail.session}) and would be continued with {ours}: set "
                "TOPIC_PREFIX to begin another deployment beside it, set SOURCE to what it holds, or remove it with all "
                "its data (`docker compose down -v`)"
            )


class JournalWriter:
    """Appends numbered records to its partitions under one epoch."""

    def __init__(
        self,
        log: Log,
        codecs: Codecs,
        prefix: str,
        partitions: Sequence[int],
        patience_sec: float = PATIENCE_SEC,
        chance: random.Random | None = None,
    ) -> None:
        """`chance` spaces the attempts of recorders that open at the same time; seeded in simulations."""
        self._log = log
        self._chance = chance or random.SystemRandom()
        self._encode = codecs.encoder(JOURNAL)
        self._decode = codecs.decoder(JOURNAL)
        self._codecs = codecs
        self._tps = {partition: TP(prefix + JOURNAL, partition) for partition in partitions}
        self._next_offset: dict[TP, int] = {}
        self._holes: list[tuple[TP, int, int]] = []
        self.writer = Writer(log, patience_sec=patience_sec, on_delivery=self._delivered)
        self.epoch = 0
        self.opened = False
        """Whether the journal is ours; until then the epoch is none, or one that may not win."""
        self.seq = dict.fromkeys(partitions, 0)
        self.records = 0
        self.latencies_ms = RecentSamples()
        """From being appended to being acknowledged, of the oldest record of each of the newest batches."""
        self._unacknowledged: dict[TP, deque[tuple[int, int]]] = {tp: deque() for tp in self._tps.values()}
        """Per partition: (records appended before, stamp) where the stamp changed."""
        self._appended = dict.fromkeys(self._tps.values(), 0)
        self._acknowledged = dict.fromkeys(self._tps.values(), 0)
        self._headers: list[tuple[str, bytes]] = []

    async def open(self, session: str, now_ns: int) -> dict[int, Tail]:
        """Take the journal over; returns the tail of each partition.

        Raises
        ------
        ConfigError
            It holds another kind of market: see `check_market`.
        LogError
            Others keep opening it too, or what it held has expired, so that its numbers are not known any more.
        """
        for _ in range(OPEN_ATTEMPTS):
            before = await self._tails()
            check_market((tail for _, tail in before.values()), session, next(iter(self._tps.values())).topic)
            self.epoch = 1 + max((epoch for epoch, _ in before.values()), default=0)
            self._headers = [(EPOCH_HEADER, str(self.epoch).encode())]
            own = await self._append_opens(session, now_ns)
            crash.point("journal-opened")
            tails = await self._tails(own)
            if all(epoch < self.epoch for epoch, _ in tails.values()):
                begins = await self._log.begin_offsets(self._tps.values())
                for partition, tp in self._tps.items():
                    if begins[tp] > 0 and not tails[tp][1].seq:
                        raise LogError(
                            f"{tp.topic}[{tp.partition}] holds no record any more, all have expired: numbering anew would "
                            "make readers take the new ones for repeated; choose another TOPIC_PREFIX"
                        )
                    self.seq[partition] = tails[tp][1].seq
                    self._next_offset[tp] = own[tp] + 1
                self.opened = True
                return {partition: tails[tp][1] for partition, tp in self._tps.items()}
            logger.warning(
                "another recorder opened the journal with epoch %d at the same time; trying again", self.epoch
            )
            await asyncio.sleep(self._chance.uniform(0.0, OPEN_JITTER_SEC))
        raise LogError(
            f"the journal could not be opened in {OPEN_ATTEMPTS} attempts: other recorders keep opening it; "
            "stop all but one"
        )

    async def tails(self) -> dict[int, Tail]:
        """Where each partition stands now, without opening anything."""
        found = await self._tails()
        return {partition: found[tp][1] for partition, tp in self._tps.items()}

    async def _append_opens(self, session: str, now_ns: int) -> dict[TP, int]:
        own: dict[TP, int] = {}
        record = journal_record("open", now_ns, epoch=self.epoch, session=session)
        value = self._encode({**record, "seq": -1})
        deliveries = []
        for tp in self._tps.values():
            batch = self._log.batch()
            batch.append(b"", value, now_ns // 1_000_000, self._headers)
            deliveries.append((tp, await self._log.send(batch, tp)))
        for tp, delivery in deliveries:
            own[tp] = await delivery
        return own

    async def _tails(self, ends: dict[TP, int] | None = None) -> dict[TP, tuple[int, Tail]]:
        """(newest epoch, tail) of each partition below `ends` (default: the end of the log)."""
        begins = await self._log.begin_offsets(self._tps.values())
        ends = ends or await self._log.end_offsets(self._tps.values())
        found: dict[TP, tuple[int, Tail]] = {}
        windows = dict.fromkeys(self._tps.values(), TAIL_RECORDS)
        while windows:
            starts = {tp: max(begins[tp], ends[tp] - window) for tp, window in windows.items()}
            records = await read_ranges(self._log, {tp: (start, ends[tp]) for tp, start in starts.items()})
            for tp, start in starts.items():
                epoch, tail = await self._tail_of(records[tp])
                if start > begins[tp] and not (tail.seq and tail.session):
                    windows[tp] *= 4
                    continue
                if not tail.seq and begins[tp]:
                    # Retention has taken every record. None of their numbers was above their count: numbers that begin
                    # there are new to everybody, where 1 would be taken for a repetition and dropped in silence.
                    tail.seq = begins[tp]
                found[tp] = epoch, tail
                del windows[tp]
        return found

    async def _tail_of(self, records: Sequence[LogRecord]) -> tuple[int, Tail]:
        """Newest epoch and tail in the canonical view of `records`; seq 0 or no session: older ones are needed."""
        view: JournalView | None = None
        tail = Tail()
        session = ""
        for record in records:
            value = record.value
            if value is None:
                continue
            if not self._decode.knows(value):
                await self._codecs.learn(JOURNAL, value)
            decoded = self._decode(value)
            if view is None:
                view = JournalView(epoch_of(record))
            if decoded["kind"] == "open":
                if epoch_of(record) >= view.epoch:
                    session = decoded["session"] or ""
                view.admit(record, -1, OPEN_KIND)
            elif view.admit(record, decoded["seq"], OPEN_KIND + 1):
                if decoded["kind"] == "tick":
                    # Ticks name the session, so that a long journal need not be read back to its `open`.
                    session = msgspec.json.decode(decoded["payload"], type=_TickSession).session or session
                tail = Tail(
                    decoded["seq"],
                    decoded["source_position"],
                    decoded["ordinal"],
                    decoded["kind"],
                    session,
                    max(tail.clock_ts_ns, decoded["recv_ts_ns"]),
                )
        return (view.epoch if view is not None else 0), tail

    def append(self, partition: int, record: Record, stamp_ms: int) -> int:
        """Number a record and add it to the open batch; returns its seq. `stamp_ms` is the wall clock."""
        seq = self.seq[partition] + 1
        self.seq[partition] = seq
        record["seq"] = seq
        symbol = record["symbol"]
        tp = self._tps[partition]
        waiting = self._unacknowledged[tp]
        if not waiting or waiting[-1][1] != stamp_ms:
            waiting.append((self._appended[tp], stamp_ms))
        self._appended[tp] += 1
        self.writer.append(tp, symbol.encode() if symbol else b"", self._encode(record), stamp_ms, self._headers)
        self.records += 1
        return seq

    async def ship(self) -> None:
        """Send what has gathered.

        Raises
        ------
        FencedError
            Another recorder has taken over.
        LogError
            The broker did not take a batch.
        """
        await self.writer.ship()
        if self._holes:
            await self._inspect_holes()

    async def flush(self) -> None:
        """Send, and wait until all is durable. Raises as `ship` does."""
        await self.writer.flush()
        if self._holes:
            await self._inspect_holes()

    def _delivered(self, tp: TP, base: int, count: int) -> None:
        self._sample(tp, count)
        if base < 0:  # stored, but where is not known: the next delivery can't be judged
            self._next_offset.pop(tp, None)
            return
        expected = self._next_offset.get(tp, base)
        if base != expected:
            self._holes.append((tp, expected, base))
        self._next_offset[tp] = base + count

    def _sample(self, tp: TP, count: int) -> None:
        waiting = self._unacknowledged[tp]
        self._acknowledged[tp] += count
        if waiting and waiting[0][0] < self._acknowledged[tp]:
            self.latencies_ms.add(time.time() * 1000 - waiting[0][1])
        while waiting and waiting[0][0] < self._acknowledged[tp]:
            waiting.popleft()

    async def _inspect_holes(self) -> None:
        """What stands in the offsets between our own writes was written by somebody else: see by whom."""
        holes, self._holes = self._holes, []
        for tp, start, end in holes:
            records = (await read_ranges(self._log, {tp: (start, end)}))[tp]
            newest = max((epoch_of(record) for record in records), default=0)
            if newest >= self.epoch:
                raise FencedError(
                    f"{tp.topic}[{tp.partition}]: another recorder has opened this journal with epoch {newest}, ours "
                    f"is {self.epoch}: this one stops. Run one recorder per shard (INGEST_SHARD)"
                )
            logger.warning(
                "%s[%d]: %d records of an older recorder (epoch %d) lie among ours; readers drop them",
                tp.topic,
                tp.partition,
                end - start,
                newest,
            )


def journal_record(
    kind: str,
    recv_ts_ns: int,
    *,
    route: str = "",
    symbol: str | None = None,
    source_position: int = -1,
    ordinal: int = 0,
    epoch: int | None = None,
    session: str | None = None,
    payload: bytes = b"",
) -> Record:
    """A journal record without its number."""
    return {
        "kind": kind,
        "route": route,
        "symbol": symbol,
        "recv_ts_ns": recv_ts_ns,
        "source_position": source_position,
        "ordinal": ordinal,
        "epoch": epoch,
        "session": session,
        "payload": payload,
    }


def shard_partitions(shard: str, partitions: int) -> list[int]:
    """Partitions of a shard written as `i/n`, 0 <= i < n.

    Raises
    ------
    ValueError
        Not of that form.
    """
    index_text, _, count_text = shard.partition("/")
    if not (index_text.isdecimal() and count_text.isdecimal() and 0 <= int(index_text) < int(count_text) <= partitions):
        raise ValueError(f"INGEST_SHARD is {shard!r}: it must be i/n with 0 <= i < n <= {partitions}, as 0/2")
    return [number for number in range(partitions) if number % int(count_text) == int(index_text)]
