"""The Kafka log: aiokafka with batches built by hand, an idempotent producer, and assigned consumers.

Group membership is kept apart from reading: a member consumer owns partitions and commits offsets but is paused for
good, so a rebalance can never touch what a reader has fetched.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine, Iterable, Mapping, Sequence
from typing import Any, Final

from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, ConsumerRebalanceListener
from aiokafka.admin import AIOKafkaAdminClient
from aiokafka.coordinator.assignors.range import RangePartitionAssignor
from aiokafka.errors import (
    CommitFailedError,
    IllegalStateError,
    KafkaConnectionError,
    KafkaError,
    OffsetOutOfRangeError,
)
from aiokafka.structs import OffsetAndMetadata, TopicPartition

from orderflow.errors import LogError
from orderflow.streaming.log import COMMIT_NOTE, TP, Batch, Committed, LogRecord

logger = logging.getLogger(__name__)

MAX_BATCH_BYTES: Final = 512 << 10
MAX_REQUEST_BYTES: Final = 8 << 20
REQUEST_TIMEOUT_MS: Final = 30_000
CONNECT_PATIENCE_SEC: Final = 30.0
GROUP_SESSION_MS: Final = 10_000
GROUP_HEARTBEAT_MS: Final = 300
COMMIT_SEC: Final = 10.0
CLOSE_SEC: Final = 5.0
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
                "made anew: start with --rebuild, or from the lake"
            ) from error
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
        await self._consumer.stop()


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

    def __init__(self, bootstrap: str, group: str, topics: Sequence[str]) -> None:
        self.assigned: frozenset[int] = frozenset()
        self.changed = asyncio.Event()
        self._topics = list(topics)
        self._bootstrap = bootstrap
        self._group = group
        self._consumer = AIOKafkaConsumer(
            bootstrap_servers=bootstrap,
            group_id=group,
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
                self.failure = LogError(f"the consumer group refused this member: {error!r}")
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
                        raise LogError(
                            f"the broker at {self._bootstrap!r} did not tell the offsets of the group {self._group!r} "
                            f"within {COMMIT_SEC:g} s: {error!r}; see whether it runs"
                        ) from error
                    await asyncio.sleep(0.2)
        finally:
            await admin.close()
        return {
            TP(tp.topic, tp.partition): Committed(each.offset, by_hand=each.metadata != COMMIT_NOTE)
            for tp, each in got.items()
            if each.offset >= 0 and TP(tp.topic, tp.partition) in wanted
        }

    async def close(self) -> None:
        if self._watch is not None:
            self._watch.cancel()
            await asyncio.gather(self._watch, return_exceptions=True)
        await _bounded(self._consumer.stop(), "group member")


async def _start(client: Any) -> None:
    """Start an aiokafka client; retry while the broker comes up, within bounds."""
    loop = asyncio.get_running_loop()
    deadline = loop.time() + CONNECT_PATIENCE_SEC
    while True:
        try:
            await client.start()
            return
        except KafkaConnectionError as error:
            if loop.time() > deadline:
                await (client.close() if isinstance(client, AIOKafkaAdminClient) else client.stop())
                raise LogError(
                    f"no Kafka broker answered at {client._client._bootstrap_servers!r} for {CONNECT_PATIENCE_SEC:g} s: "
                    f"{error}; start one with `orderflow kafka up` or set KAFKA_BOOTSTRAP"
                ) from error
            await asyncio.sleep(0.25)


class KafkaLog:
    """One idempotent producer and any number of readers."""

    def __init__(self, bootstrap: str, *, client_id: str = "orderflow", compression: str | None = None) -> None:
        self._bootstrap = bootstrap
        self._client_id = client_id
        self._compression = compression
        self._producer: Any = None
        self._admin: Any = None

    async def start(self) -> None:
        """Connect.

        Raises
        ------
        LogError
            No broker answers within 30 s.
        """
        self._admin = AIOKafkaConsumer(
            bootstrap_servers=self._bootstrap,
            client_id=f"{self._client_id}-offsets",
            request_timeout_ms=REQUEST_TIMEOUT_MS,
        )
        await _start(self._admin)
        self._producer = AIOKafkaProducer(
            bootstrap_servers=self._bootstrap,
            client_id=self._client_id,
            enable_idempotence=True,
            acks="all",
            max_batch_size=MAX_BATCH_BYTES,
            max_request_size=MAX_REQUEST_BYTES,
            compression_type=self._compression,
            request_timeout_ms=REQUEST_TIMEOUT_MS,
        )
        await _start(self._producer)

    def batch(self) -> KafkaBatch:
        return KafkaBatch(self._producer.create_batch())

    async def send(self, batch: Batch, tp: TP) -> asyncio.Future[int]:
        assert isinstance(batch, KafkaBatch)
        batch.builder.close()  # closed batches leave at once instead of lingering
        try:
            native = await self._producer.send_batch(batch.builder, tp.topic, partition=tp.partition)
        except KafkaError as error:
            raise LogError(f"{tp.topic}[{tp.partition}]: batch of {len(batch)} not sent: {error!r}") from error
        return _delivery(native, tp)

    async def begin_offsets(self, tps: Iterable[TP]) -> dict[TP, int]:
        try:
            got = await self._admin.beginning_offsets([TopicPartition(*tp) for tp in tps])
        except KafkaError as error:
            raise self._no_offsets(error) from error
        return {TP(tp.topic, tp.partition): offset for tp, offset in got.items()}

    async def end_offsets(self, tps: Iterable[TP]) -> dict[TP, int]:
        try:
            got = await self._admin.end_offsets([TopicPartition(*tp) for tp in tps])
        except KafkaError as error:
            raise self._no_offsets(error) from error
        return {TP(tp.topic, tp.partition): offset for tp, offset in got.items()}

    def _no_offsets(self, error: KafkaError) -> LogError:
        return LogError(
            f"the broker at {self._bootstrap!r} did not tell its offsets within {REQUEST_TIMEOUT_MS // 1000} s: {error}; "
            "see whether it runs"
        )

    async def reader(self, positions: Mapping[TP, int]) -> KafkaReader:
        consumer = AIOKafkaConsumer(
            bootstrap_servers=self._bootstrap,
            client_id=f"{self._client_id}-reader",
            enable_auto_commit=False,
            auto_offset_reset="none",
            check_crcs=False,
            fetch_max_wait_ms=250,
            fetch_min_bytes=1,
            fetch_max_bytes=8 << 20,
            max_partition_fetch_bytes=PARTITION_FETCH_BYTES,
            request_timeout_ms=REQUEST_TIMEOUT_MS,
        )
        await _start(consumer)
        consumer.assign([TopicPartition(*tp) for tp in positions])
        for tp, offset in positions.items():
            consumer.seek(TopicPartition(*tp), offset)
        return KafkaReader(consumer, positions)

    async def join(self, group: str, topics: Sequence[str]) -> KafkaMembership:
        membership = KafkaMembership(self._bootstrap, group, topics)
        await membership.start()
        return membership

    async def close(self) -> None:
        if self._producer is not None:
            await _bounded(self._producer.stop(), "producer")
        if self._admin is not None:
            await _bounded(self._admin.stop(), "client")


async def _bounded(stopping: Coroutine[Any, Any, None], what: str) -> None:
    """Stop a client, but not for ever: without a broker the client's own stop never returns."""
    try:
        async with asyncio.timeout(CLOSE_SEC):
            await stopping
    except TimeoutError:
        logger.warning("%s did not stop within %g s", what, CLOSE_SEC)


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
            failure = LogError(f"{tp.topic}[{tp.partition}]: a batch was not acknowledged: {error!r}")
            failure.__cause__ = error
            delivery.set_exception(failure)
            delivery.exception()  # whoever awaits still gets it; a closing process is spared the warning

    native.add_done_callback(settle)
    return delivery
