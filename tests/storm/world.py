"""One process in which everything is real but the sockets, the broker's disk and time.

The simulated exchange, the recorder, the journal's writer and the normaliser run on a loop of virtual time over one log
in memory. What the recorder took from its sockets, what the exchange's market did, and what came out is kept for the
judge.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from random import Random
from typing import Any, Final

import msgspec
from orderflow.config import IngestionConfig
from orderflow.errors import FencedError, LogError
from orderflow.ingest.metrics import NormaliserCollector, RecorderCollector
from orderflow.ingest.seams import Outside
from orderflow.ingest.websocket_recorder import WebsocketRecorder
from orderflow.processor import Record
from orderflow.streaming.codec import Codecs, peek, schema_text
from orderflow.streaming.journal import JournalView, partition_of, session_of
from orderflow.streaming.log import TP, Batch, LogRecord, Membership
from orderflow.streaming.memory_log import MemoryBatch, MemoryLog, MemoryReader
from orderflow.streaming.recorder import JournalWriter
from orderflow.topics import COMMANDS, EVENTS, JOURNAL, PARTITIONS, REJECTS, ROWS
from orderflow.venues.binance.normaliser import NormaliserConfig, NormaliserProcessor
from orderflow.venues.binance.sim.faults import DRAWN_KINDS, FaultEngine, FaultPlan
from orderflow.venues.binance.sim.market import START_MS, SyntheticConfig
from orderflow.venues.binance.sim.source import Frame
from orderflow.venues.binance.sim.virtual import (
    RestAnswered,
    SteppedMarket,
    Taken,
    VirtualClock,
    VirtualConnector,
    VirtualExchange,
    VirtualHttp,
)

from tests.storm.plan import MACHINE_KINDS, QUIET_END_MS, QUIET_START_MS, MachineFault, StormPlan, draw_machine
from tests.storm.virtual_loop import VirtualLoop

logger = logging.getLogger(__name__)

SYMBOLS: Final = ("BTCUSDT", "DOGEUSDT", "XRPUSDT")
"""The last two share a partition."""
FEED_SEC: Final = 0.05
"""How long the normaliser lets the journal gather; it stands for the way through the broker."""
SAMPLE_SEC: Final = 0.5
DENSE_GAP_MS: Final = 25_000
SPARSE_GAP_MS: Final = 200_000
RESTART_SEC: Final = 1.0
"""From a recorder's end to the start of the next by whoever supervises it."""
BROKER_GIVES_UP_SEC: Final = 30.0
EXCHANGE_KINDS: Final = (*DRAWN_KINDS, "local_clock_jump")


class Options(msgspec.Struct, frozen=True, kw_only=True):
    """What a storm is made of; with these equal, everything is."""

    seed: int
    minutes: float = 10.0
    symbols: tuple[str, ...] = SYMBOLS
    activity: float = 4.0
    """Changes of the best quote a second and symbol."""
    kinds: tuple[str, ...] = (*EXCHANGE_KINDS, *MACHINE_KINDS)
    """Of faults to draw from; empty: none."""
    mean_gap_ms: int = 0
    """Between faults on average; 0: sparse for every third seed, so that faults can be judged alone, else dense."""
    plan: StormPlan | None = None
    """Instead of drawing one."""

    @property
    def duration_ms(self) -> int:
        return int(self.minutes * 60_000)

    def storm_plan(self) -> StormPlan:
        """The plan that is given, or the one that the seed draws."""
        if self.plan is not None:
            return self.plan
        kinds = [kind for kind in self.kinds if kind not in MACHINE_KINDS]
        mean_gap_ms = self.mean_gap_ms or (SPARSE_GAP_MS if self.seed % 3 == 0 else DENSE_GAP_MS)
        exchange = FaultPlan(seed=self.seed)
        if kinds:
            drawn = FaultPlan.draw(
                self.seed,
                self.duration_ms - QUIET_START_MS,
                self.symbols,
                kinds=kinds,
                mean_gap_ms=mean_gap_ms,
                quiet_end_ms=QUIET_END_MS,
            )
            later = [msgspec.structs.replace(fault, at_ms=fault.at_ms + QUIET_START_MS) for fault in drawn.faults]
            exchange = FaultPlan(drawn.seed, tuple(later))
        machine = tuple(kind for kind in self.kinds if kind in MACHINE_KINDS)
        # As many of each kind as the exchange's have, on average.
        share = mean_gap_ms * len(kinds) // max(1, len(machine)) if kinds else mean_gap_ms
        return StormPlan(exchange=exchange, machine=draw_machine(self.seed, self.duration_ms, machine, share))


async def _no_schema(number: int) -> str:
    raise AssertionError(f"schema {number} was never registered")


@cache
def codecs() -> Codecs:
    """Of the topics that are written and read here."""
    names = {JOURNAL: "journal", EVENTS: "market_event", COMMANDS: "command"}
    return Codecs(
        {topic: number for number, topic in enumerate(names, 1)},
        {topic: schema_text(name) for topic, name in names.items()},
        _no_schema,
    )


class Broker:
    """The one log, and whether it can be reached."""

    def __init__(self, seed: int) -> None:
        self.log = MemoryLog()
        self.up = asyncio.Event()
        self.up.set()
        self.fails = False
        """While it is away: whether it refuses at once instead of saying nothing."""
        self.chance = Random(f"{seed}/broker")

    async def back(self) -> None:
        """Until the broker answers.

        Raises
        ------
        LogError
            It does not within the client's patience.
        """
        try:
            async with asyncio.timeout(BROKER_GIVES_UP_SEC):
                await self.up.wait()
        except TimeoutError:
            raise LogError("the broker did not answer") from None


class ClientLog:
    """The log as one process sees it: acknowledgements take time, and end with the process."""

    def __init__(self, broker: Broker) -> None:
        self._broker = broker
        self._memory = broker.log
        self._under_way: list[asyncio.Task[None]] = []
        self.dead = False
        self.held_until = 0.0
        """What this process sends does not leave it before this loop time."""

    def batch(self) -> MemoryBatch:
        return self._memory.batch()

    async def send(self, batch: Batch, tp: TP) -> asyncio.Future[int]:
        loop = asyncio.get_running_loop()
        future: asyncio.Future[int] = loop.create_future()
        if self._broker.up.is_set() and not self.dead and self.held_until <= loop.time():
            loop.call_later(0.001 + self._broker.chance.random() * 0.004, self._store, batch, tp, future)
        else:
            self._under_way = [task for task in self._under_way if not task.done()]
            self._under_way.append(loop.create_task(self._deliver_later(batch, tp, future)))
        return future

    def _store(self, batch: Batch, tp: TP, future: asyncio.Future[int]) -> None:
        """What was under way when its process died has reached the broker or not."""
        if self.dead and self._broker.chance.random() < 0.5:
            return
        base = self._memory.append(batch, tp)
        if not self.dead and not future.done():
            future.set_result(base)

    async def _deliver_later(self, batch: Batch, tp: TP, future: asyncio.Future[int]) -> None:
        broker = self._broker
        await asyncio.sleep(self.held_until - asyncio.get_running_loop().time())
        if broker.fails:
            await asyncio.sleep(broker.chance.random() * 2.0)
            if broker.chance.random() < 0.5:
                self._store(batch, tp, asyncio.get_running_loop().create_future())
            if not self.dead and not future.done():
                future.set_exception(LogError("the broker refused the batch"))
            return
        await broker.up.wait()
        await asyncio.sleep(0.001)
        self._store(batch, tp, future)

    async def begin_offsets(self, tps: Iterable[TP]) -> dict[TP, int]:
        await self._broker.back()
        return await self._memory.begin_offsets(tps)

    async def end_offsets(self, tps: Iterable[TP]) -> dict[TP, int]:
        await self._broker.back()
        return await self._memory.end_offsets(tps)

    async def reader(self, positions: Mapping[TP, int], *, min_bytes: int = 1) -> ClientReader:
        await self._broker.back()
        return ClientReader(self._broker, await self._memory.reader(positions, min_bytes=min_bytes))

    async def join(self, group: str, topics: Sequence[str]) -> Membership:
        return await self._memory.join(group, topics)

    async def close(self) -> None:
        """The log outlives its clients."""


class ClientReader:
    """A reader that gets nothing while the broker is away."""

    def __init__(self, broker: Broker, reader: MemoryReader) -> None:
        self._broker = broker
        self._reader = reader
        self.position = reader.position
        self.pause = reader.pause
        self.resume = reader.resume
        self.close = reader.close

    async def poll(self, max_wait_ms: int, max_records: int) -> Mapping[TP, Sequence[LogRecord]]:
        if self._broker.up.is_set():
            found = await self._reader.poll(0, max_records)
            if found:
                return found
        # Waking at every append of any topic would be most of the work.
        await asyncio.sleep(max(0.001, max_wait_ms / 1000))
        return {}


@dataclass(slots=True)
class Life:
    """One recorder process, from its start to its end."""

    number: int
    began_sec: float
    ended_sec: float = -1.0
    ending: str = ""
    """killed, fenced, log_error, or over."""
    taken: list[Taken] = field(default_factory=list)
    answers: list[RestAnswered] = field(default_factory=list)
    last_status: dict[str, Any] = field(default_factory=dict)
    """The recorder's when it ended."""

    def status(self) -> dict[str, Any]:
        """As a recorder has it, for its metrics."""
        return self.last_status


@dataclass(slots=True)
class Output:
    """A record that the normaliser gave, and the journal record that caused it."""

    partition: int
    session: int
    at_sec: float
    record: Record


@dataclass(slots=True)
class Sample:
    """Whether all was well at a point of time, by the exchange's truth."""

    at_sec: float
    unwell: tuple[str, ...]


@dataclass(slots=True)
class Result:
    """Everything that the judge may look at."""

    options: Options
    plan: StormPlan
    market: list[Frame] = field(default_factory=list)
    """Every frame of the market since the exchange opened, before any fault."""
    opening: dict[str, bytes] = field(default_factory=dict)
    """Each symbol's book when the exchange opened."""
    lives: list[Life] = field(default_factory=list)
    journal: dict[int, list[LogRecord]] = field(default_factory=dict)
    """By partition, as stored."""
    rows: list[Output] = field(default_factory=list)
    events: list[Output] = field(default_factory=list)
    rejects: list[Output] = field(default_factory=list)
    totals: dict[str, int] = field(default_factory=dict)
    samples_of_metrics: list[tuple[str, dict[str, str], float]] = field(default_factory=list)
    """(name, labels, value) as on `/metrics`, of every recorder and normaliser when it ended."""
    ledger: list[Any] = field(default_factory=list)
    samples: list[Sample] = field(default_factory=list)
    attempts: list[float] = field(default_factory=list)
    closed: dict[str, int] = field(default_factory=dict)
    """Connections that the exchange ended, by reason."""
    errors: list[str] = field(default_factory=list)
    """What must not happen at all: exceptions that are none of a recorder's declared ends."""
    steps: int = 0

    def note_metrics(self, collector: NormaliserCollector | RecorderCollector) -> None:
        """Take down what a collector tells now."""
        for family in collector.collect():
            self.samples_of_metrics += [(sample.name, sample.labels, sample.value) for sample in family.samples]

    def metric(self, name: str, **labels: str) -> float:
        """The sum of the samples that have these labels."""
        return sum(
            value
            for sample, given, value in self.samples_of_metrics
            if sample == name and labels.items() <= given.items()
        )


class Feed:
    """The normaliser: from the journal to rows, and its events back to the recorder."""

    def __init__(self, broker: Broker, partitions: Sequence[int], result: Result) -> None:
        self._broker = broker
        self._result = result
        self._loop = asyncio.get_running_loop()
        self._decode = codecs().decoder(JOURNAL)
        self._encode = codecs().encoder(EVENTS)
        self._offsets = dict.fromkeys(partitions, 0)
        self._views = {partition: JournalView() for partition in partitions}
        self._processors = {partition: self._processor(partition) for partition in partitions}
        self._sessions = dict.fromkeys(partitions, 0)
        self.newest: dict[tuple[str, str], Record] = {}
        """The newest row by symbol and source."""
        self.routes: dict[int, dict[str, str]] = {}

    @staticmethod
    def _processor(partition: int) -> NormaliserProcessor:
        return NormaliserProcessor(NormaliserConfig(), partition)

    async def run(self) -> None:
        """Until cancelled."""
        while True:
            await self._broker.log.wait_for_append()
            await asyncio.sleep(FEED_SEC)
            await self._broker.up.wait()
            self.drain()

    def drain(self) -> None:
        """Take all that the journal has."""
        for partition in self._offsets:
            records = self._broker.log.slice(TP(JOURNAL, partition), self._offsets[partition], 1_000_000)
            if records:
                self._offsets[partition] += len(records)
                self._take(partition, records)

    def _take(self, partition: int, records: Sequence[LogRecord]) -> None:
        batch = self._broker.log.batch()
        view = self._views[partition]
        for record in records:
            value = record.value
            assert value is not None
            seq, kind, _ = peek(value)
            if not view.admit(record, seq, kind):
                continue
            decoded = self._decode(value)
            if decoded["kind"] == "config" and session_of(decoded["payload"]):
                self._end_processor(partition)
            self._step(partition, seq, decoded, batch, record.timestamp)
        if len(batch):
            self._broker.log.append(batch, TP(EVENTS, partition))

    def _step(self, partition: int, seq: int, decoded: Record, batch: MemoryBatch, stamp_ms: int) -> None:
        result, newest = self._result, self.newest
        now, session = self._loop.time(), self._sessions[partition]
        sub = 0
        for topic, symbol, value in self._processors[partition].step(JOURNAL, decoded):
            value["seq"] = seq
            if topic == ROWS:
                result.rows.append(Output(partition, session, now, value))
                newest[symbol, value["src"]] = value
            elif topic == EVENTS:
                value["sub"] = sub
                sub += 1
                result.events.append(Output(partition, session, now, value))
                batch.append(symbol.encode(), self._encode(value), stamp_ms)
            elif topic == REJECTS:
                result.rejects.append(Output(partition, session, now, value))
            else:
                self.routes[partition] = value["routes"] or self.routes.get(partition, {})

    def _end_processor(self, partition: int) -> None:
        self.note_totals(partition)
        self._processors[partition] = self._processor(partition)
        self._sessions[partition] += 1

    def note_totals(self, partition: int) -> None:
        """Add a processor's counts and figures to the result's."""
        processor = self._processors[partition]
        for name, count in processor.totals.items():
            self._result.totals[name] = self._result.totals.get(name, 0) + count
        self._result.note_metrics(NormaliserCollector(lambda: [processor], processor.counted))


_IDS: Final = {"bookTicker": b'"u":', "depth@100ms": b'"u":', "aggTrade": b'"a":'}
_SOURCES: Final = {"bookTicker": "bookTicker", "depth@100ms": "depth", "aggTrade": "aggTrade"}


class Truth:
    """What the exchange has sent that a client who keeps up must have by now."""

    def __init__(self, market: list[Frame]) -> None:
        self._market = market
        self._position = 0
        self.due: dict[tuple[str, str], int] = {}
        """By symbol and source: the newest id that is old enough."""

    def advance(self, to_ms: int) -> None:
        """Take over what was sent by `to_ms`, milliseconds since the exchange opened."""
        market, position = self._market, self._position
        while position < len(market) and market[position].at_ms <= to_ms:
            frame = market[position]
            position += 1
            name, _, stream = frame.stream.partition("@")
            mark = _IDS.get(stream)
            if mark is not None:
                self.due[name.upper(), _SOURCES[stream]] = number_after(frame.payload, mark)
        self._position = position


def number_after(frame: bytes, mark: bytes) -> int:
    """The integer behind a key."""
    begin = frame.index(mark) + len(mark)
    end = begin
    while frame[end : end + 1].isdigit():
        end += 1
    return int(frame[begin:end])


DUE_MS: Final = 3_000
"""What the exchange sent so long ago must have become a row where all is well."""
MOST_RESTARTS: Final = 200
CANCEL_SEC: Final = 2.0
DRAIN_SEC: Final = 200.0


class Storm:
    """One run."""

    def __init__(self, options: Options) -> None:
        loop = asyncio.get_running_loop()
        assert isinstance(loop, VirtualLoop)
        self._loop = loop
        plan = options.storm_plan()
        self.result = result = Result(options, plan)
        self._seed = options.seed
        config = SyntheticConfig(activity=options.activity)
        open_ms = START_MS + options.seed % 1_000_000 * 1_000
        venue = SteppedMarket(options.seed, options.symbols, config=config, start_ms=open_ms)
        self._engine = FaultEngine(plan.exchange)
        self.exchange = VirtualExchange(
            venue, self._engine, options.seed, open_ms=open_ms, witness=result.market.extend
        )
        self._venue = venue
        self._broker = Broker(options.seed)
        self._feed = Feed(self._broker, range(PARTITIONS), result)
        self._truth = Truth(result.market)
        self._config = IngestionConfig(
            source="live", symbols=options.symbols, ws_url="ws://exchange", rest_url="http://exchange"
        )
        self._homes = sorted({partition_of(symbol) for symbol in options.symbols})
        self._running: list[_Process] = []
        self._over = False
        self._pauses: list[float] = []

    async def run(self) -> Result:
        """The whole storm; never raises for what the pipeline did, see `Result.errors`."""
        result, options = self.result, self.result.options
        for symbol in options.symbols:
            result.opening[symbol] = await self._venue.snapshot(symbol, 1000)
        background = [
            asyncio.create_task(self.exchange.run()),
            asyncio.create_task(self._feed.run()),
            asyncio.create_task(self._sample()),
            asyncio.create_task(self._machine_faults()),
        ]
        supervisor = asyncio.create_task(self._supervise())
        await asyncio.sleep(options.duration_ms / 1000)
        await self._finish(supervisor)
        for task in background:
            task.cancel()
        for outcome in await asyncio.gather(*background, return_exceptions=True):
            if isinstance(outcome, Exception):
                result.errors.append(f"the harness failed: {outcome!r}")
        self._feed_rest()
        for partition in range(PARTITIONS):
            result.journal[partition] = list(self._broker.log.slice(TP(JOURNAL, partition), 0, 10_000_000))
            self._feed.note_totals(partition)
        for life in result.lives:
            result.note_metrics(RecorderCollector(life))
        result.ledger = list(self._engine.ledger)
        result.attempts = self.exchange.attempts
        result.closed = self.exchange.closed
        result.steps = self._loop.steps
        return result

    def _feed_rest(self) -> None:
        try:
            self._feed.drain()
        except Exception as error:
            self.result.errors.append(f"the normaliser failed: {error!r}")

    async def _finish(self, supervisor: asyncio.Task[None]) -> None:
        self._over = True
        for process in self._running:
            process.recorder.drain()
        try:
            async with asyncio.timeout(DRAIN_SEC):
                await supervisor
        except TimeoutError:
            self.result.errors.append(f"the recorder did not drain within {DRAIN_SEC:g} s")
            supervisor.cancel()

    # Processes

    async def _supervise(self) -> None:
        """Keep a recorder running: start the next where one has ended."""
        while not self._over and len(self.result.lives) < MOST_RESTARTS:
            # A second one may have taken over from the one that has ended.
            process = self._running[-1] if self._running else self._start()
            await process.ended.wait()
            if not self._over:
                await asyncio.sleep(self._pauses.pop() if self._pauses else RESTART_SEC)
        for process in list(self._running):
            await process.ended.wait()

    def _start(self) -> _Process:
        life = Life(len(self.result.lives), self._loop.time())
        self.result.lives.append(life)
        process = _Process(self, life)
        self._running.append(process)
        process.task = asyncio.create_task(process.run())
        return process

    def make(self, process: _Process) -> WebsocketRecorder:
        """A recorder for a process."""
        life = process.life
        process.log = ClientLog(self._broker)
        process.connector = VirtualConnector(self.exchange, self._config.ping_interval_sec, life.taken.append)
        chance = Random(f"{self._seed}/life/{life.number}")
        http = VirtualHttp(self.exchange, life.answers.append)
        outside = Outside(VirtualClock(self.exchange), process.connector, http, chance)
        journal = JournalWriter(
            process.log, codecs(), "", range(PARTITIONS), self._config.broker_patience_sec, Random(chance.random())
        )
        return WebsocketRecorder(journal, self._config, process.log, codecs(), "", outside)

    def forget(self, process: _Process) -> None:
        """A process has ended."""
        self._running.remove(process)
        process.connector.vanish()
        life = process.life
        life.ended_sec = self._loop.time()
        if life.ending not in ("killed", "fenced", "log_error") and not (life.ending == "over" and self._over):
            self.result.errors.append(f"recorder {life.number} ended after {life.ended_sec:.1f} s: {life.ending}")

    # Faults of our side

    async def _machine_faults(self) -> None:
        for fault in self.result.plan.machine:
            await asyncio.sleep(fault.at_ms / 1000 - self._loop.time())
            await self._strike(fault)

    async def _strike(self, fault: MachineFault) -> None:
        duration_sec = fault.duration_ms / 1000
        if fault.kind == "kill":
            for process in list(self._running):
                self._pauses = [duration_sec]
                await process.kill()
        elif fault.kind == "zombie":
            for process in self._running[-1:]:
                process.log.held_until = self._loop.time() + duration_sec
            # Whoever supervises the first goes on with the second once the first has been fenced.
            self._start()
        elif fault.kind == "stall":
            self._loop.stall(duration_sec)
        else:
            self._broker.fails = fault.kind == "broker_fail"
            self._broker.up.clear()
            await asyncio.sleep(duration_sec)
            self._broker.up.set()

    async def _sample(self) -> None:
        while True:
            await asyncio.sleep(SAMPLE_SEC)
            self._truth.advance(self.exchange.now_ms - DUE_MS)
            self.result.samples.append(Sample(self._loop.time(), tuple(self._unwell())))

    def _unwell(self) -> list[str]:
        unwell = []
        newest = self._feed.newest
        for (symbol, source), number in sorted(self._truth.due.items()):
            row = newest.get((symbol, source))
            if row is None or (row["agg_trade_id"] if source == "aggTrade" else row["update_id"]) < number:
                unwell.append(f"{symbol} {source} behind")
            elif source == "depth" and row["book_state"] != "synced":
                unwell.append(f"{symbol} book {row['book_state']}")
        for partition in self._homes:
            routes = self._feed.routes.get(partition, {})
            unwell += [f"{route} down at {partition}" for route, state in sorted(routes.items()) if state != "up"]
        return unwell


class _Process:
    """A recorder and what dies with it."""

    log: ClientLog
    connector: VirtualConnector
    recorder: WebsocketRecorder
    task: asyncio.Task[None]

    def __init__(self, storm: Storm, life: Life) -> None:
        self._storm = storm
        self.life = life
        self.ended = asyncio.Event()
        self._killed = False
        self.recorder = storm.make(self)

    async def run(self) -> None:
        life = self.life
        try:
            await self.recorder.run()
            life.ending = "over"
        except FencedError:
            life.ending = "fenced"
        except LogError:
            life.ending = "log_error"
        except Exception as error:
            life.ending = repr(error)
        finally:
            if not self._killed:
                life.last_status = self.recorder.status()
                self._storm.forget(self)
                self.ended.set()

    async def kill(self) -> None:
        """End it as SIGKILL does: what it does while it is cancelled reaches nobody."""
        self._killed = True
        self.life.last_status = self.recorder.status()
        self.life.ending = "killed"
        self.log.dead = True
        self._storm.forget(self)
        self.task.cancel()
        await asyncio.wait([self.task], timeout=CANCEL_SEC)
        self.life.ending = "killed"
        self.ended.set()
