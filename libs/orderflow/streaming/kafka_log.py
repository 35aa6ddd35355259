"""The Kafka log: aiokafka with batches built by hand, an idempotent producer, and assigned consumers.

Group membership is kept apart from reading: a member consumer owns partitions and commits offsets but is paused for
good, so a rebalance can never touch what a reader has fetched.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Final

from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, ConsumerRebalanceListener
from aiokafka.admin import AIOKafkaAdminClient
from aiokafka.coordinator.assignors.range import RangePartitionAssignor
from aiokafka.errors import (
    BrokerResponseError,
    CommitFailedError,
    GroupAuthorizationFailedError,
    IllegalStateError,
    InvalidProducerEpoch,
    InvalidProducerIdMapping,
    KafkaError,
    OffsetOutOfRangeError,
    OutOfOrderSequenceNumber,
    ProducerFenced,
    TopicAuthorizationFailedError,
    UnknownProducerId,
)
from aiokafka.structs import OffsetAndMetadata, TopicPartition

from orderflow.errors import BrokerAwayError, LogError
from orderflow.streaming.log import COMMIT_NOTE, GATHER_MS, TP, Batch, Committed, LogRecord

logger = logging.getLogger(__name__)

MAX_BATCH_BYTES: Final = 128 << 10
"""Below what a reader asks of a partition, or the broker hands a batch out only where it comes first in an answer."""
MAX_REQUEST_BYTES: Final = 8 << 20
REQUEST_TIMEOUT_MS: Final = 15_000
"""A broker that hangs is given up for another one after this; above the time that joining a group may take."""
CONNECT_PATIENCE_SEC: Final = 30.0
WATCH_SEC: Final = 1.0
WATCH_ANSWER_SEC: Final = 3.0
MISSED_ANSWERS: Final = 2
"""In a row, before the broker counts as away: one may be missed because this very process stood still."""
GROUP_SESSION_MS: Final = 10_000
GROUP_HEARTBEAT_MS: Final = 300
COMMIT_SEC: Final = 10.0
CLOSE_SEC: Final = 5.0
RETRY_SEC: Final = 0.25
SPENT_PRODUCER: Final = (
    InvalidProducerEpoch,
    InvalidProducerIdMapping,
    OutOfOrderSequenceNumber,
    ProducerFenced,
    UnknownProducerId,
)
"""The broker has lost or refuses this producer's numbering: only a new one can write again."""
REFUSALS: Final = (GroupAuthorizationFailedError, TopicAuthorizationFailedError)
PREFETCH_BACKOFF_SEC: Final = 5.0
PARTITION_FETCH_BYTES: Final = 256 << 10
"""What is fetched ahead of a partition at most: the lake reads 120 of them within its memory limit."""


_NO_HEADERS: Final[list[tuple[str, bytes]]] = []
"""aiokafka's builder wants a list; this one is never changed."""


class KafkaBatch:
    """A Kafka record batch under construction."""

    __slots__ = ("_count", "builder")

    def __init__(self, builder: Any) -> None:
        self.builder = builder
        self._count = 0

    def append(
        self, key: bytes, value: bytes | None, timestamp_ms: int, headers: list[tuple[str, bytes]] | None = None
    ) -> bool:
        if self.builder.append(timestamp=timestamp_ms, key=key, value=value, headers=headers or _NO_HEADERS) is None:
            return False
        self._count += 1
        return True

    def __len__(self) -> int:
        return self._count


class KafkaReader:
    """An assigned consumer at explicit positions."""

    def __init__(self, consumer: Any, tps: Iterable[TP]) -> None:
        self._consumer = consumer
        self._by_native = {TopicPartition(*tp): tp for tp in tps}

    async def poll(self, max_wait_ms: int, max_records: int) -> dict[TP, Sequence[LogRecord]]:
        try:
            got = await self._consumer.getmany(timeout_ms=max_wait_ms, max_records=max_records)
        except OffsetOutOfRangeError as error:
            raise LogError(
                f"a position lies outside the retained data: {error.args}; retention has passed it, or the topic was "
                "made anew: the next start says which, and what to do"
            ) from error
        except KafkaError as error:
            raise BrokerAwayError(f"reading failed: {error!r}; see whether the broker runs") from error
        if not got and self._consumer._fetcher.error_future.done():
            # The client's own loop has ended on something it did not foresee; it would return nothing for ever.
            raise BrokerAwayError("the client has stopped fetching: its log line before this one says why")
        by_native = self._by_native
        return {by_native[tp]: records for tp, records in got.items()}

    async def position(self, tp: TP) -> int:
        offset: int = await self._consumer.position(TopicPartition(*tp))
        return offset

    def pause(self, tps: Iterable[TP]) -> None:
        self._consumer.pause(*(TopicPartition(*tp) for tp in tps))

    def resume(self, tps: Iterable[TP]) -> None:
        self._consumer.resume(*(TopicPartition(*tp) for tp in tps))

    async def close(self) -> None:
        await _stop(self._consumer, "reader")


class _Listener(ConsumerRebalanceListener):  # type: ignore[misc]
    """aiokafka swallows what a listener raises, so it does nothing that can fail: it notes and pauses."""

    def __init__(self, on_change: Callable[[frozenset[int]], None], pause: Callable[[Any], None]) -> None:
        self._on_change = on_change
        self._pause = pause

    async def on_partitions_revoked(self, revoked: Any) -> None:
        """Nothing: what comes next says what is owned, and an overlap of two owners is harmless."""

    async def on_partitions_assigned(self, assigned: Any) -> None:
        self._pause(assigned)
        self._on_change(frozenset(tp.partition for tp in assigned))


class KafkaMembership:
    """A paused group consumer."""

    def __init__(self, bootstrap: str, group: str, topics: Sequence[str], instance: str | None) -> None:
        self.assigned: frozenset[int] = frozenset()
        self.changed = asyncio.Event()
        self._topics = list(topics)
        self._bootstrap = bootstrap
        self._group = group
        self._consumer = AIOKafkaConsumer(
            bootstrap_servers=bootstrap,
            group_id=group,
            # With a name of its own a process that was killed and restarted is the same member: nobody waits for the
            # session of the dead one to run out.
            group_instance_id=instance,
            enable_auto_commit=False,
            auto_offset_reset="earliest",
            partition_assignment_strategy=(RangePartitionAssignor,),
            session_timeout_ms=GROUP_SESSION_MS,
            heartbeat_interval_ms=GROUP_HEARTBEAT_MS,
            request_timeout_ms=REQUEST_TIMEOUT_MS,
            # Nothing is ever fetched here, which the client would take for a hung user, and leave the group for good.
            max_poll_interval_ms=2**31 - 1,
        )
        self._watch: asyncio.Task[None] | None = None
        self.failure: LogError | None = None

    async def start(self) -> None:
        self._consumer.subscribe(
            self._topics, listener=_Listener(self._note, lambda assigned: self._consumer.pause(*assigned))
        )
        await _start(self._consumer)
        self._watch = asyncio.create_task(self._watch_errors())

    async def _watch_errors(self) -> None:
        """Errors of the group reach only those who poll; without this a refused member would idle for good."""
        while True:
            await asyncio.sleep(1.0)
            try:
                await self._consumer.getmany(timeout_ms=0)
            except KafkaError as error:
                kind = LogError if isinstance(error, REFUSALS) else BrokerAwayError
                self.failure = kind(f"the consumer group refused this member: {error!r}")
                self.changed.set()
                return

    def _note(self, partitions: frozenset[int]) -> None:
        self.assigned = partitions
        self.changed.set()

    async def commit(self, offsets: Mapping[TP, int]) -> bool:
        try:
            async with asyncio.timeout(COMMIT_SEC):
                await self._consumer.commit(
                    {TopicPartition(*tp): OffsetAndMetadata(offset, COMMIT_NOTE) for tp, offset in offsets.items()}
                )
        except (CommitFailedError, IllegalStateError) as error:
            # A rebalance is under way. The newest snapshot, not the group's offset, says where to go on.
            logger.info("offsets not committed, a rebalance is under way: %s", error)
            return False
        except (KafkaError, TimeoutError) as error:
            logger.warning("offsets not committed: %r", error)
            return False
        return True

    async def committed(self, tps: Iterable[TP]) -> dict[TP, Committed]:
        wanted = set(tps)
        admin = AIOKafkaAdminClient(bootstrap_servers=self._bootstrap, request_timeout_ms=REQUEST_TIMEOUT_MS)
        loop = asyncio.get_running_loop()
        deadline = loop.time() + COMMIT_SEC
        try:
            await _start(admin)
            while True:
                try:
                    got = await admin.list_consumer_group_offsets(self._group)
                    break
                except KafkaError as error:  # the group's coordinator may be moving
                    if loop.time() > deadline:
                        raise BrokerAwayError(
                            f"the broker at {self._bootstrap!r} did not tell the offsets of the group {self._group!r} "
                            f"within {COMMIT_SEC:g} s: {error!r}; see whether it runs"
                        ) from error
                    await asyncio.sleep(0.2)
        finally:
            await _stop(admin, "client")
        return {
            TP(tp.topic, tp.partition): Committed(each.offset, by_hand=each.metadata != COMMIT_NOTE)
            for tp, each in got.items()
            if each.offset >= 0 and TP(tp.topic, tp.partition) in wanted
        }

    async def close(self) -> None:
        if self._watch is not None:
            self._watch.cancel()
            await asyncio.gather(self._watch, return_exceptions=True)
        if self._consumer._coordinator is not None:
            # A named member would stay until its session has run out; an orderly end makes room at once.
            self._consumer._coordinator._group_instance_id = None
        await _stop(self._consumer, "group member")


async def _start(client: Any) -> None:
    """Start an aiokafka client; retry while the broker comes up, within bounds."""
    loop = asyncio.get_running_loop()
    deadline = loop.time() + CONNECT_PATIENCE_SEC
    while True:
        try:
            await client.start()
            return
        except KafkaError as error:
            if loop.time() > deadline or not error.retriable:
                await _stop(client, "client")
                raise BrokerAwayError(
                    f"no Kafka broker answered at {client._client._bootstrap_servers!r} for {CONNECT_PATIENCE_SEC:g} s: "
                    f"{error}; start one with `orderflow kafka up` or set KAFKA_BOOTSTRAP"
                ) from error
            await asyncio.sleep(RETRY_SEC)


class KafkaLog:
    """One idempotent producer and any number of readers."""

    def __init__(
        self,
        bootstrap: str,
        *,
        client_id: str = "orderflow",
        compression: str | None = None,
        instance: str | None = None,
        patience_sec: float = CONNECT_PATIENCE_SEC,
    ) -> None:
        """
        Parameters
        ----------
        instance
            Names the place that this process fills: whoever is restarted there has the same, no other does.
        patience_sec
            How long a request is repeated while no broker answers it.
        """
        self._patience_sec = patience_sec
        self._bootstrap = bootstrap
        self._instance = instance
        self._client_id = client_id
        self._compression = compression
        self._producer: Any = None
        self._spent = False
        self._renewing = asyncio.Lock()
        self._admin: Any = None
        self._watch: asyncio.Task[None] | None = None
        self._away_since: float | None = None
        self._background: set[asyncio.Task[None]] = set()

    async def start(self) -> None:
        """Connect, and watch from then on whether the broker answers.

        Raises
        ------
        BrokerAwayError
            No broker answers within 30 s.
        """
        self._admin = AIOKafkaConsumer(
            bootstrap_servers=self._bootstrap,
            client_id=f"{self._client_id}-offsets",
            request_timeout_ms=REQUEST_TIMEOUT_MS,
        )
        await _start(self._admin)
        self._producer = await self._new_producer()
        self._watch = asyncio.create_task(self._watch_broker())

    async def _new_producer(self) -> Any:
        producer = AIOKafkaProducer(
            bootstrap_servers=self._bootstrap,
            client_id=self._client_id,
            enable_idempotence=True,
            acks="all",
            max_batch_size=MAX_BATCH_BYTES,
            max_request_size=MAX_REQUEST_BYTES,
            compression_type=self._compression,
            request_timeout_ms=REQUEST_TIMEOUT_MS,
        )
        # Past this age the library would fail a batch for want of a leader and go on numbering behind it.
        producer._message_accumulator._batch_ttl = float("inf")
        await _start(producer)
        return producer

    @property
    def reachable(self) -> bool:
        """Whether a broker has answered lately."""
        return self._away_since is None

    async def _watch_broker(self) -> None:
        """Ask for metadata once a second: the client library retries for ever and tells nobody in one line."""
        loop = asyncio.get_running_loop()
        missed = 0
        while True:
            await asyncio.sleep(WATCH_SEC)
            asked_at = loop.time()
            if await self._answers():
                missed = 0
                if self._away_since is not None:
                    logger.warning(
                        "the broker at %s is back after %.1f s", self._bootstrap, loop.time() - self._away_since
                    )
                    self._away_since = None
                continue
            missed += 1
            if missed == MISSED_ANSWERS:
                self._away_since = asked_at
                logger.warning(
                    "no broker answers at %s: waiting for it, nothing is lost meanwhile; see whether it runs",
                    self._bootstrap,
                )

    async def _answers(self) -> bool:
        try:
            async with asyncio.timeout(WATCH_ANSWER_SEC):
                return bool(await self._admin._client.force_metadata_update())
        except (KafkaError, TimeoutError):
            return False

    def batch(self) -> KafkaBatch:
        return KafkaBatch(self._producer.create_batch())

    async def send(self, batch: Batch, tp: TP) -> asyncio.Future[int]:
        assert isinstance(batch, KafkaBatch)
        if self._spent:
            await self._renew()
        batch.builder.close()  # closed batches leave at once instead of lingering
        try:
            native = await self._producer.send_batch(batch.builder, tp.topic, partition=tp.partition)
        except KafkaError as error:
            raise BrokerAwayError(f"{tp.topic}[{tp.partition}]: batch of {len(batch)} not sent: {error!r}") from error
        native.add_done_callback(self._judge)
        return _delivery(native, tp)

    def _judge(self, done: asyncio.Future[Any]) -> None:
        """Note where the producer itself is of no use any more; whoever waits for the batch learns of it too."""
        error = None if done.cancelled() else done.exception()
        if error is not None and (isinstance(error, SPENT_PRODUCER) or self._producer._sender.sender_task.done()):
            self._spent = True

    async def _renew(self) -> None:
        async with self._renewing:
            if not self._spent:
                return
            logger.warning("the broker has refused this producer's numbering: going on with a new producer")
            old, self._producer = self._producer, await self._new_producer()
            self._spent = False
            closing = asyncio.create_task(_stop(old, "producer"))
            self._background.add(closing)
            closing.add_done_callback(self._background.discard)

    async def begin_offsets(self, tps: Iterable[TP]) -> dict[TP, int]:
        return await self._offsets(self._admin.beginning_offsets, tps)

    async def end_offsets(self, tps: Iterable[TP]) -> dict[TP, int]:
        return await self._offsets(self._admin.end_offsets, tps)

    async def _offsets(self, ask: Callable[[list[TopicPartition]], Any], tps: Iterable[TP]) -> dict[TP, int]:
        natives = [TopicPartition(*tp) for tp in tps]
        deadline = asyncio.get_running_loop().time() + self._patience_sec
        while True:
            try:
                got = await ask(natives)
                return {TP(tp.topic, tp.partition): offset for tp, offset in got.items()}
            except KafkaError as error:
                if asyncio.get_running_loop().time() > deadline:
                    raise BrokerAwayError(
                        f"the broker at {self._bootstrap!r} did not tell its offsets within {self._patience_sec:g} s: "
                        f"{error}; see whether it runs"
                    ) from error
                await asyncio.sleep(RETRY_SEC)

    async def reader(self, positions: Mapping[TP, int], *, min_bytes: int = 1) -> KafkaReader:
        consumer = AIOKafkaConsumer(
            bootstrap_servers=self._bootstrap,
            client_id=f"{self._client_id}-reader",
            enable_auto_commit=False,
            auto_offset_reset="none",
            check_crcs=False,
            fetch_max_wait_ms=GATHER_MS,
            fetch_min_bytes=min_bytes,
            fetch_max_bytes=8 << 20,
            max_partition_fetch_bytes=PARTITION_FETCH_BYTES,
            request_timeout_ms=REQUEST_TIMEOUT_MS,
        )
        await _start(consumer)
        # By default the library asks anew after 0.1 s though some partitions have not been taken yet, leaves those out,
        # and lets them wait until that request is over. Here it asks once all has been taken.
        consumer._fetcher._prefetch_backoff = PREFETCH_BACKOFF_SEC
        consumer.assign([TopicPartition(*tp) for tp in positions])
        for tp, offset in positions.items():
            consumer.seek(TopicPartition(*tp), offset)
        return KafkaReader(consumer, positions)

    async def join(self, group: str, topics: Sequence[str]) -> KafkaMembership:
        membership = KafkaMembership(self._bootstrap, group, topics, self._instance)
        try:
            await membership.start()
        except BaseException:
            await membership.close()
            raise
        return membership

    async def close(self) -> None:
        if self._watch is not None:
            self._watch.cancel()
            await asyncio.gather(self._watch, return_exceptions=True)
        if self._producer is not None:
            await _stop(self._producer, "producer")
        if self._admin is not None:
            await _stop(self._admin, "client")


async def _stop(client: Any, what: str) -> None:
    """Stop a client, but not for ever, and without its troubles.

    Without a broker the client's own stop may never return, or raise a CancelledError that nobody asked for, and then
    leaves its connections open.
    """
    stopping = asyncio.ensure_future(client.close() if isinstance(client, AIOKafkaAdminClient) else client.stop())
    await asyncio.wait([stopping], timeout=CLOSE_SEC)
    if stopping.done() and not stopping.cancelled() and stopping.exception() is None:
        return
    if not stopping.done():
        logger.warning("%s did not stop within %g s", what, CLOSE_SEC)
        stopping.cancel()
    connections = client.client if isinstance(client, AIOKafkaProducer) else client._client
    closing = asyncio.ensure_future(connections.close())
    await asyncio.wait([stopping, closing], timeout=CLOSE_SEC)


def _delivery(native: asyncio.Future[Any], tp: TP) -> asyncio.Future[int]:
    """aiokafka's future of metadata as a future of the base offset, its errors as `LogError`."""
    delivery: asyncio.Future[int] = asyncio.get_running_loop().create_future()

    def settle(done: asyncio.Future[Any]) -> None:
        if delivery.done():
            return
        if done.cancelled():
            delivery.cancel()
            return
        error = done.exception()
        if error is None:
            delivery.set_result(done.result().offset)
        else:
            # What the broker has refused for what it is will be refused again; all else may pass.
            refused = isinstance(error, BrokerResponseError) and not error.retriable
            kind = LogError if refused and not isinstance(error, SPENT_PRODUCER) else BrokerAwayError
            failure = kind(f"{tp.topic}[{tp.partition}]: a batch was not acknowledged: {error!r}")
            failure.__cause__ = error
            delivery.set_exception(failure)
            delivery.exception()  # whoever awaits still gets it; a closing process is spared the warning

    native.add_done_callback(settle)
    return delivery
