"""How two computations of the same journal differ: records of signals and features, matched by (seq, sub)."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from orderflow.errors import OrderflowError
from orderflow.processor import Record
from orderflow.replay.cascade import WHOLE, Place
from orderflow.streaming.codec import PREFIX_BYTES, Codecs
from orderflow.streaming.log import TP, Log, LogRecord
from orderflow.topics import CVD, FEATURE_EVENTS, FUSION, OFI, PARTITIONS, SIGNALS
from orderflow.verify import canonical, first_difference, frontiers

COMPARED: Final = (OFI, CVD, FUSION, FEATURE_EVENTS, SIGNALS)
EXAMPLES: Final = 5
YIELD_RECORDS: Final = 500
_IDENTITY: Final = frozenset({"signal_id", "config_fingerprint"})
"""Fields that name the settings: they differ whenever those do, and say nothing about the market."""


@dataclass(slots=True)
class FieldDifference:
    """One field over all records in which both have it and differ."""

    records: int = 0
    numbers: int = 0
    sum_abs: float = 0.0
    most_abs: float = 0.0
    sum_signed: float = 0.0

    def add(self, left: Any, right: Any) -> None:
        self.records += 1
        if not (_is_number(left) and _is_number(right)):
            return
        change = right - left
        self.numbers += 1
        self.sum_abs += abs(change)
        self.sum_signed += change
        self.most_abs = max(self.most_abs, abs(change))

    def content(self) -> dict[str, Any]:
        """For JSON; means are over the records in which both values are numbers."""
        return {
            "records": self.records,
            "mean_abs_change": self.sum_abs / self.numbers if self.numbers else None,
            "max_abs_change": self.most_abs if self.numbers else None,
            "mean_change": self.sum_signed / self.numbers if self.numbers else None,
        }


@dataclass(slots=True)
class TopicDifference:
    """One topic of both."""

    left: int = 0
    right: int = 0
    equal: int = 0
    differing: int = 0
    only_left: int = 0
    only_right: int = 0
    fields: dict[str, FieldDifference] = field(default_factory=dict)
    first: str = ""
    """The first difference by partition and place, in words."""


@dataclass(slots=True)
class SignalChange:
    """Confirmed signals of one symbol."""

    left: int = 0
    right: int = 0
    kept: int = 0
    lost: int = 0
    gained: int = 0
    turned: int = 0
    """Confirmed in both, in opposite directions."""


@dataclass(slots=True)
class Difference:
    """What `compare` found."""

    topics: dict[str, TopicDifference] = field(default_factory=dict)
    signals: dict[str, SignalChange] = field(default_factory=dict)
    examples: list[str] = field(default_factory=list)
    """The first signals lost, gained or turned."""
    stretch: dict[int, tuple[int, int]] = field(default_factory=dict)
    """Partition -> first and last seq that both have computed."""

    @property
    def same(self) -> bool:
        return all(not (each.differing or each.only_left or each.only_right) for each in self.topics.values())


async def compare(log: Log, codecs: Codecs, left: str, right: str, topics: Sequence[str] = COMPARED) -> Difference:
    """Compare the topics under two prefixes over the stretch that both hold.

    Raises
    ------
    OrderflowError
        They do not come from the same journal, or have no stretch in common.
    """
    result = Difference(topics={topic: TopicDifference() for topic in topics})
    for partition in range(PARTITIONS):
        stretch = await _stretch(log, (left, right), partition, topics)
        if stretch is None:
            continue
        result.stretch[partition] = stretch
        for topic in topics:
            await _check_journal(log, codecs, (left, right), topic, partition, stretch)
            await _compare_topic(log, codecs, (left, right), topic, partition, stretch, result)
    if not result.stretch:
        raise OrderflowError(f"{left}* and {right}* have no journal numbers in common: nothing can be compared")
    return result


async def _stretch(
    log: Log, prefixes: tuple[str, str], partition: int, topics: Sequence[str]
) -> tuple[int, int] | None:
    firsts, lasts = [], []
    for prefix in prefixes:
        tps = [TP(prefix + topic, partition) for topic in topics]
        first = [seq for tp in tps if (seq := await _first_seq(log, tp)) is not None]
        if not first:
            return None
        firsts.append(min(first))
        lasts.append(min((await frontiers(log, tps)).values()))
    return (max(firsts), min(lasts)) if max(firsts) <= min(lasts) else None


async def _first_seq(log: Log, tp: TP) -> int | None:
    async for chunk in canonical(log, tp):
        return chunk[0][0]
    return None


async def _check_journal(
    log: Log, codecs: Codecs, prefixes: tuple[str, str], topic: str, partition: int, stretch: tuple[int, int]
) -> None:
    """Numbers mean the same in both only where they count the same journal: the time of receipt tells."""
    async for place, left, right in _pairs(log, prefixes, topic, partition, stretch):
        if left is None or right is None:
            continue
        records = [await _decoded(codecs, topic, each) for each in (left, right)]
        times = [each.get("recv_ts_ns", each.get("recv_ts_ms")) for each in records]
        if times[0] != times[1]:
            raise OrderflowError(
                f"{prefixes[0]}* and {prefixes[1]}* were not computed from the same journal ({topic}[{partition}] seq "
                f"{place[0]} was received at {times[0]} and at {times[1]}): records can't be matched. Compare a run with its "
                "replays"
            )
        return


async def _compare_topic(
    log: Log,
    codecs: Codecs,
    prefixes: tuple[str, str],
    topic: str,
    partition: int,
    stretch: tuple[int, int],
    result: Difference,
) -> None:
    found = result.topics[topic]
    count = 0
    async for place, left, right in _pairs(log, prefixes, topic, partition, stretch):
        count += 1
        if count % YIELD_RECORDS == 0:
            await asyncio.sleep(0)
        found.left += left is not None
        found.right += right is not None
        same = left is not None and right is not None and _body(left) == _body(right)
        found.equal += same
        if same and topic != SIGNALS:
            continue
        one = None if left is None else await _decoded(codecs, topic, left)
        other = one if same else None if right is None else await _decoded(codecs, topic, right)
        if not same:
            _note(found, topic, partition, place, one, other)
        if topic == SIGNALS:
            _note_signal(result, one, other)


def _note(
    found: TopicDifference, topic: str, partition: int, place: Place, left: Record | None, right: Record | None
) -> None:
    where = f"{topic}[{partition}] seq {place[0]} sub {place[1]}"
    if left is None or right is None:
        found.only_left += right is None
        found.only_right += left is None
        found.first = found.first or f"{where}: only in {'A' if right is None else 'B'}"
        return
    differing = [name for name in right if name not in _IDENTITY and repr(left.get(name)) != repr(right[name])]
    if not differing:
        found.equal += 1
        return
    found.differing += 1
    for name in differing:
        found.fields.setdefault(name, FieldDifference()).add(left.get(name), right[name])
    if not found.first:
        name, one, other = first_difference(
            {key: left.get(key) for key in differing}, {key: right[key] for key in differing}
        )
        found.first = f"{where} field {name}: {one!r} and {other!r}"


def _note_signal(result: Difference, left: Record | None, right: Record | None) -> None:
    signal = left or right
    assert signal is not None
    was = left is not None and left["confirm"]
    now = right is not None and right["confirm"]
    if not was and not now:
        return
    change = result.signals.setdefault(signal["symbol"], SignalChange())
    change.left += was
    change.right += now
    if was and now:
        assert left is not None
        assert right is not None
        if left["direction"] == right["direction"]:
            change.kept += 1
            return
        change.turned += 1
    change.lost += was and not now
    change.gained += now and not was
    if len(result.examples) < EXAMPLES:
        kind = "turned" if was and now else "lost" if was else "gained"
        result.examples.append(f"{kind} {_told(left)} -> {_told(right)}")


def _told(signal: Record | None) -> str:
    if signal is None:
        return "nothing"
    why = f" ({', '.join(signal['gate_reasons'])})" if signal["gate_reasons"] else ""
    score = "-" if signal["score"] is None else f"{signal['score']:.2f}"
    return f"{signal['signal_id']} {signal['strength']} {score}{why}"


async def _pairs(
    log: Log, prefixes: tuple[str, str], topic: str, partition: int, stretch: tuple[int, int]
) -> AsyncIterator[tuple[Place, LogRecord | None, LogRecord | None]]:
    """Both sides' records by place, None where one has none."""
    sides = [_within(log, TP(prefix + topic, partition), stretch) for prefix in prefixes]
    heads: list[tuple[Place, LogRecord] | None] = [await anext(side, None) for side in sides]
    while any(heads):
        place = min(head[0] for head in heads if head is not None)
        at = [head is not None and head[0] == place for head in heads]
        left, right = (head[1] if head is not None and is_at else None for head, is_at in zip(heads, at, strict=True))
        yield place, left, right
        for index, is_at in enumerate(at):
            if is_at:
                heads[index] = await anext(sides[index], None)


async def _within(log: Log, tp: TP, stretch: tuple[int, int]) -> AsyncIterator[tuple[Place, LogRecord]]:
    low, high = (stretch[0], -1), (stretch[1], WHOLE)
    async for chunk in canonical(log, tp):
        for seq, sub, record in chunk:
            if low < (seq, sub) <= high:
                yield (seq, sub), record
        if chunk[-1][:2] > high:
            return


async def _decoded(codecs: Codecs, topic: str, record: LogRecord) -> Record:
    value = record.value or b""
    decode = codecs.decoder(topic)
    if not decode.knows(value):
        await codecs.learn(topic, value)
    return decode(value)


def _body(record: LogRecord) -> tuple[bytes | None, bytes]:
    return record.key, (record.value or b"")[PREFIX_BYTES:]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def fields_by_change(found: TopicDifference) -> Iterable[tuple[str, FieldDifference]]:
    """Fields, the one that differs most often first."""
    return sorted(found.fields.items(), key=lambda item: (-item[1].records, item[0]))
