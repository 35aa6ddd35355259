"""What the normaliser asks for in `market.events`: snapshots and missing trades. Queued, fetched, journalled. And where
it says that latencies have jumped, whose clock it was is to be found out.

The normaliser repeats a need on ticks while it stands, so a request may be dropped at any time; and it meets the same
needs again when it works off a backlog, so an old one must be.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, Final, NamedTuple

import msgspec

from orderflow.errors import LogError
from orderflow.ingest.rest import RestClient
from orderflow.ingest.route import STABLE_SEC, backoff_sec, cancel_all, count_reason
from orderflow.streaming.codec import Codecs
from orderflow.streaming.log import TP, Log, LogRecord
from orderflow.topics import EVENTS
from orderflow.venues.binance.endpoints import AGG_TRADES_WEIGHT, depth_weight
from orderflow.venues.binance.frames import UNDECODABLE, Id

logger = logging.getLogger(__name__)

OLD_SEC: Final = 10.0
AT_ONCE: Final = 4
"""Requests under way."""
MAX_WAITING: Final = 4096
BACKFILLS_PER_SNAPSHOT: Final = 2
"""Where both wait: a flood of missing trades must not keep the books from coming back."""
LONGEST_WAIT_SEC: Final = 1.0
SEQ_MARKS: Final = 64
SEQ_MARK_SEC: Final = 0.5
KINDS: Final = {"snapshot_needed": "snapshot", "backfill_needed": "backfill"}
JUMPED: Final = "latency_jump"
REST_KINDS: Final = {"snapshot": "depth", "backfill": "aggTrades"}


class Need(NamedTuple):
    """A request of the normaliser."""

    kind: str
    """`snapshot` or `backfill`."""
    symbol: str
    partition: int
    seq: int
    """Journal record that caused it."""
    from_id: int = 0
    to_id: int = 0
    """First and last missing trade of a backfill."""


class _Missing(msgspec.Struct):
    from_id: Id
    to_id: Id


_decode_missing = msgspec.json.Decoder(_Missing).decode


class SeqAges:
    """How long ago our journal had a number: the age of what was derived from it, whatever any wall clock says."""

    def __init__(self) -> None:
        self._marks: dict[int, deque[tuple[float, int]]] = {}

    def mark(self, seqs: Mapping[int, int], now_sec: float) -> None:
        """The journal's numbers now."""
        for partition, seq in seqs.items():
            marks = self._marks.setdefault(partition, deque(maxlen=SEQ_MARKS))
            if not marks or now_sec - marks[-1][0] >= SEQ_MARK_SEC:
                marks.append((now_sec, seq))

    def age_sec(self, partition: int, seq: int, now_sec: float) -> float:
        """Seconds since the journal had reached `seq`, as exactly as the marks tell."""
        for at_sec, marked in self._marks.get(partition, ()):
            if marked >= seq:
                return now_sec - at_sec
        return 0.0


class RequestDesk:
    """Needs that wait: one per symbol and kind, in the order in which they were first told. Pure."""

    def __init__(self, ages: SeqAges) -> None:
        self._ages = ages
        self._waiting: dict[str, dict[str, Need]] = {kind: {} for kind in sorted(KINDS.values())}
        self._busy: set[tuple[str, str]] = set()
        self._answered: dict[tuple[str, str], int] = {}
        """Seq of our newest answer: what was asked before it needs none."""
        self._backfills = 0
        self.dropped: dict[str, int] = {}

    def offer(self, need: Need) -> None:
        """A need was told; one that waits already is brought up to date and keeps its place."""
        waiting = self._waiting[need.kind]
        if need.symbol not in waiting and len(waiting) >= MAX_WAITING:
            count_reason(self.dropped, "too_many")
            return
        waiting[need.symbol] = need

    def pick(self, now_sec: float, ready: Callable[[str], bool]) -> Need | None:
        """The next one to be fetched, of a kind that is `ready`; it counts as under way."""
        self._sweep(now_sec)
        order = ("backfill", "snapshot") if self._backfills < BACKFILLS_PER_SNAPSHOT else ("snapshot", "backfill")
        for kind in order:
            if not ready(kind):
                continue
            for symbol, need in self._waiting[kind].items():
                if (kind, symbol) in self._busy:
                    continue
                del self._waiting[kind][symbol]
                self._busy.add((kind, symbol))
                self._backfills = self._backfills + 1 if kind == "backfill" else 0
                return need
        return None

    def failed(self, need: Need) -> None:
        """It was not fetched."""
        self._busy.discard((need.kind, need.symbol))

    def answered(self, kind: str, symbol: str, seq: int) -> None:
        """The answer stands in the journal under this number."""
        self._answered[kind, symbol] = seq
        self._busy.discard((kind, symbol))

    @property
    def waiting(self) -> int:
        return sum(map(len, self._waiting.values()))

    def _sweep(self, now_sec: float) -> None:
        for kind, waiting in self._waiting.items():
            for symbol, need in list(waiting.items()):
                if need.seq < self._answered.get((kind, symbol), 0):
                    reason = "answered"
                elif self._ages.age_sec(need.partition, need.seq, now_sec) > OLD_SEC:
                    reason = "old"
                else:
                    continue
                count_reason(self.dropped, reason)
                del waiting[symbol]


class Requests:
    """Reads the needs and serves them.

    Parameters
    ----------
    home
        Partition of each symbol that is recorded.
    put
        Takes an answer on its way into the journal: kind, symbol, body.
    jumped
        Is told that latencies have jumped.
    """

    def __init__(
        self,
        log: Log,
        codecs: Codecs,
        prefix: str,
        home: Mapping[str, int],
        rest: RestClient,
        snapshot_limit: int,
        put: Callable[[str, str, bytes], None],
        jumped: Callable[[], None],
    ) -> None:
        self._log = log
        self._codecs = codecs
        self._decode = codecs.decoder(EVENTS)
        self._tps = [TP(prefix + EVENTS, partition) for partition in sorted(set(home.values()))]
        self._home = home
        self._rest = rest
        self._snapshot_limit = snapshot_limit
        self._put = put
        self._jumped = jumped
        self._offered = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []
        self.ages = SeqAges()
        self.desk = RequestDesk(self.ages)
        self.fetched: dict[str, int] = {}
        self.read_errors = 0

    async def run(self, chance: Callable[[], float]) -> None:
        """Until cancelled. Trouble with the log never ends it: recording goes on without answers."""
        serving = asyncio.create_task(self._serve())
        failures = 0
        try:
            while True:
                began_sec = _loop_sec()
                try:
                    await self._read(serving)
                except LogError as error:
                    failures = 1 if _loop_sec() - began_sec > STABLE_SEC else failures + 1
                    self.read_errors += 1
                    logger.warning("requests of the normaliser can't be read: %s", error)
                await asyncio.sleep(backoff_sec(failures, 1.0, 30.0, chance()))
        finally:
            await cancel_all([serving, *self._tasks])

    async def _read(self, serving: asyncio.Task[None]) -> None:
        reader = await self._log.reader(await self._log.end_offsets(self._tps))
        try:
            while True:
                if serving.done():
                    serving.result()
                for tp, records in sorted((await reader.poll(200, 1000)).items()):
                    await self._note(tp.partition, records)
        finally:
            await reader.close()

    async def _note(self, partition: int, records: Sequence[LogRecord]) -> None:
        for record in records:
            value = record.value
            if value is None:
                continue
            if not self._decode.knows(value):
                await self._codecs.learn(EVENTS, value)
            event = self._decode(value)
            if event["event_type"] == JUMPED:
                self._jumped()
            kind = KINDS.get(event["event_type"])
            if kind is None or event["symbol"] not in self._home:
                continue
            need = _need(kind, partition, event)
            if need is None:
                count_reason(self.desk.dropped, "damaged")
                continue
            self.desk.offer(need)
            self._offered.set()

    async def _serve(self) -> None:
        while True:
            for task in self._tasks:
                if task.done():
                    task.result()
            self._tasks = [task for task in self._tasks if not task.done()]
            wait_sec = LONGEST_WAIT_SEC
            self._offered.clear()
            if len(self._tasks) < AT_ONCE:
                need = self.desk.pick(_loop_sec(), lambda kind: self._wait_sec(kind) <= 0)
                if need is not None:
                    task = asyncio.create_task(self._fetch(need))
                    task.add_done_callback(lambda _: self._offered.set())
                    self._tasks.append(task)
                    await asyncio.sleep(0)  # so that it has taken its weight
                    continue
                if self.desk.waiting:
                    wait_sec = min(wait_sec, max(0.01, min(self._wait_sec(kind) for kind in REST_KINDS)))
            try:
                async with asyncio.timeout(wait_sec):
                    await self._offered.wait()
            except TimeoutError:
                pass

    def _wait_sec(self, kind: str) -> float:
        weight = depth_weight(self._snapshot_limit) if kind == "snapshot" else AGG_TRADES_WEIGHT
        return self._rest.wait_sec(REST_KINDS[kind], weight)

    async def _fetch(self, need: Need) -> None:
        body = None
        try:
            fetching: Awaitable[bytes | None]
            if need.kind == "snapshot":
                fetching = self._rest.depth(need.symbol, self._snapshot_limit)
            else:
                fetching = self._rest.agg_trades(need.symbol, need.from_id, need.to_id - need.from_id + 1)
            body = await fetching
        finally:
            if body is None:
                self.desk.failed(need)
        if body is not None:
            count_reason(self.fetched, need.kind)
            self._put(need.kind, need.symbol, body)

    def status(self) -> dict[str, Any]:
        """For `/status`."""
        return {
            "waiting": self.desk.waiting,
            "fetched": dict(sorted(self.fetched.items())),
            "dropped": dict(sorted(self.desk.dropped.items())),
            "read_errors": self.read_errors,
        }


def _need(kind: str, partition: int, event: Mapping[str, Any]) -> Need | None:
    """None where the event does not say what is missing."""
    if kind == "snapshot":
        return Need(kind, event["symbol"], partition, event["seq"])
    try:
        missing = _decode_missing(event["meta_json"])
    except UNDECODABLE:
        return None
    return Need(kind, event["symbol"], partition, event["seq"], missing.from_id, missing.to_id)


def _loop_sec() -> float:
    return asyncio.get_running_loop().time()
