"""Drives a capture into the journal: opens it, goes on where its tail stands, keeps the pace."""

from __future__ import annotations

import asyncio
import logging
import time
from pathlib import Path
from typing import Any, Final

from orderflow.capture import scan
from orderflow.config import IngestionConfig
from orderflow.errors import LogError
from orderflow.ingest.capture_source import CaptureSource, ending
from orderflow.processor import Record
from orderflow.streaming.recorder import JournalWriter, Tail

logger = logging.getLogger(__name__)

SHIP_RECORDS: Final = 500
QUANTUM_SEC: Final = 0.004
"""A paced recorder sleeps at least this long, so that frames travel in batches."""


class CaptureRecorder:
    """The recorder for `SOURCE=capture`."""

    def __init__(self, journal: JournalWriter, config: IngestionConfig) -> None:
        self._journal = journal
        self._config = config
        self._stopping = False
        self._ending = False
        self.source: CaptureSource | None = None
        self.ready = False
        self.done = False
        self.resumed = False
        self.behind_sec = 0.0

    def stop(self) -> None:
        """End without `end`: the session goes on when the recorder comes back."""
        self._stopping = True

    def drain(self) -> None:
        """Stop reading and journal `end`."""
        self._ending = True

    async def run(self) -> None:
        """Until the file's end, `stop` or `drain`.

        Raises
        ------
        CaptureError, LogError, FencedError
            The file is bad, the journal holds something else, another recorder took over.
        """
        path = Path(self._config.capture)
        info = await asyncio.to_thread(scan, path)
        source = self.source = CaptureSource(path, info, self._config.symbols, self._config.tick_ms)
        tails = await self._journal.open(source.session, time.time_ns())
        await self._pour(source, tails)
        await self._journal.flush()
        if not self._stopping:
            self.done = True

    async def _pour(self, source: CaptureSource, tails: dict[int, Tail]) -> None:
        resume = {
            partition: (tail.source_position, tail.ordinal)
            for partition, tail in tails.items()
            if tail.seq and tail.session == source.session
        }
        self.resumed = bool(resume)
        if self.resumed:
            logger.info("the journal holds this session already: going on behind its tail")
        speed = None if self._config.speed == "max" else float(self._config.speed)
        self.ready = True
        begun: tuple[float, int] | None = None
        gathered = 0
        stamp_ms = int(time.time() * 1000)
        places, newest_rx = dict(resume), 0
        append = self._journal.append
        owned = self._journal.seq.keys()
        for partition, record in source.records():
            if partition not in owned:
                continue  # another shard's
            place = (record["source_position"], record["ordinal"])
            if partition in resume and place <= resume[partition]:
                if place == resume[partition]:
                    _check_tail(tails[partition], partition, record)
                continue
            if self._halted():
                break
            rx_ns = record["recv_ts_ns"]
            if speed is not None and record["kind"] != "end":
                now = time.monotonic()
                begun = begun or (now, rx_ns)
                due = begun[0] + (rx_ns - begun[1]) / 1e9 / speed
                if due > now:
                    await self._journal.ship()
                    gathered = 0
                    await asyncio.sleep(max(due - now, QUANTUM_SEC))
                    stamp_ms = int(time.time() * 1000)
                    if self._halted():
                        break
                self.behind_sec = max(0.0, now - due)
            append(partition, record, stamp_ms)
            places[partition] = place
            newest_rx = max(newest_rx, rx_ns)
            gathered += 1
            if gathered >= SHIP_RECORDS:
                await self._journal.ship()
                await asyncio.sleep(0)
                gathered = 0
                stamp_ms = int(time.time() * 1000)
        else:
            return  # wholly read: the file's own `end` is in the journal
        if not self._stopping:
            self._end_early(tails, places, newest_rx)

    def _halted(self) -> bool:
        return self._stopping or self._ending

    def _end_early(self, tails: dict[int, Tail], places: dict[int, tuple[int, int]], newest_rx: int) -> None:
        """A drain before the file's end: `end` on every partition that has not ended already.

        It takes the place of its partition's newest record, so that a recorder that resumes goes on right behind it.
        """
        now_ns = max(newest_rx, *(tail.clock_ts_ns for tail in tails.values()))
        for partition, record in ending(sorted(tails), now_ns, -1, "drained"):
            tail = tails[partition]
            if tail.kind == "end" and self._journal.seq[partition] == tail.seq:
                continue
            record["source_position"], record["ordinal"] = places.get(partition, (-1, 0))
            self._journal.append(partition, record, int(time.time() * 1000))

    def status(self) -> dict[str, Any]:
        """For `/status`."""
        source = self.source
        return {
            "source": "capture",
            "session": source.session if source else "",
            "epoch": self._journal.epoch if self._journal.opened else None,
            "frames_by_route": dict(source.frames_by_route) if source else {},
            "frames_skipped": source.frames_skipped if source else 0,
            "ticks_skipped": source.ticks_skipped if source else 0,
            "journal_records": self._journal.records,
            "seqs": {str(partition): seq for partition, seq in self._journal.seq.items()},
            "resumed": self.resumed,
            "behind_sec": round(self.behind_sec, 3),
            "done": self.done,
        }


def _check_tail(tail: Tail, partition: int, record: Record) -> None:
    """The tail of the journal and the recomputation must be the same record.

    Raises
    ------
    LogError
        They are not: the journal was written from something else under the same session id.
    """
    if tail.kind not in (record["kind"], "end"):  # an `end` that a drain put there has the place of the one before it
        raise LogError(
            f"journal partition {partition} ends with a {tail.kind} at frame {tail.source_position}, and the capture has a "
            f"{record['kind']} there: the journal is not this capture's; choose another TOPIC_PREFIX"
        )
