"""Where a recomputation of one partition may begin: a set of snapshots that fit each other, or none and a warm-up.

A record is computed again exactly where every stage before it stands at or behind what the stages after it have taken.
So snapshots are chosen backwards, from the last stage to the first: each the newest whose outputs end at or before what
is needed of them.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Final

import msgspec

from orderflow.config import Config
from orderflow.pipeline import STAGES, Stage
from orderflow.replay.cascade import NOTHING, WHOLE, Place
from orderflow.streaming.codec import Codecs
from orderflow.streaming.journal import session_of
from orderflow.streaming.log import TP, Log
from orderflow.streaming.runtime import CODE_VERSION
from orderflow.streaming.seek import decoded, journal_entry, read_journal
from orderflow.streaming.snapshots import Commit, Restored, Suits, load_newest, load_oldest
from orderflow.topics import DERIVED, HOURLY, JOURNAL

UNKNOWN: Final = "unknown"
EVERY_STAGE: Final = frozenset(stage.name for stage in STAGES)


class _TickSession(msgspec.Struct):
    session: str = ""


@dataclass(slots=True)
class Start:
    """Where one partition begins."""

    partition: int
    offset: int
    """Of the journal."""
    epoch: int
    last_seq: int | None
    """The newest seq that is known to lie before `offset`; None where reading begins without one."""
    from_seq: int
    """The first journal record that is stepped."""
    snapshots: dict[str, Restored] = field(default_factory=dict)
    without_past: tuple[str, ...] = ()
    """Stages that begin with no state."""
    session: str = ""
    """The session that goes on here; empty where the journal's first record begins one."""

    @property
    def exact(self) -> bool:
        """Whether all that follows equals what the live services computed, settings being the same."""
        return not self.without_past or not self.session


def downstream(changed: Iterable[str]) -> frozenset[str]:
    """These stages and all that compute from what they write."""
    found = set(changed)
    for stage in STAGES:
        sources = {other.name for other in STAGES if set(other.outputs) & set(stage.inputs)}
        if sources & found:
            found.add(stage.name)
    return frozenset(found)


def changed_stages(live: Config, other: Config) -> frozenset[str]:
    """The stages whose results differ under another configuration, those that compute from them included."""
    return downstream(stage.name for stage in STAGES if stage.fingerprint(live) != stage.fingerprint(other))


async def newest_start(
    log: Log,
    codecs: Codecs,
    config: Config,
    prefix: str,
    partition: int,
    need_seq: int,
    *,
    anew: frozenset[str] = frozenset(),
    warm_seq: int = 0,
    lost_seq: int = 0,
) -> Start:
    """Begin as late as the record `need_seq` allows.

    Stages named in `anew` begin without a past, at the record `warm_seq` or before; those that have no snapshot which
    fits, at `lost_seq`. 0 is the oldest record retained.
    """
    journal = TP(prefix + JOURNAL, partition)
    begin = (await log.begin_offsets([journal]))[journal]
    need: dict[str, Place] = dict.fromkeys((JOURNAL, *DERIVED), (need_seq - 1, WHOLE))
    found: dict[str, Restored] = {}
    for stage in reversed(STAGES):
        restored = None
        if stage.name not in anew:
            restored = await _find_newest(log, config, prefix, partition, stage, need, begin)
        if restored is None:
            for topic in stage.inputs:
                need[topic] = min(need[topic], ((warm_seq if stage.name in anew else lost_seq) - 1, WHOLE))
            continue
        found[stage.name] = restored
        for position in restored.commit.inputs:
            need[position.topic] = min(need[position.topic], (position.seq, position.sub))
    return await _start(log, codecs, journal, begin, found, max(0, need[JOURNAL][0] + 1))


async def oldest_start(log: Log, codecs: Codecs, config: Config, prefix: str, partition: int) -> Start | None:
    """Begin as early as the retained journal allows; None where there are no snapshots that fit."""
    journal = TP(prefix + JOURNAL, partition)
    begin = (await log.begin_offsets([journal]))[journal]
    written: dict[str, Place] = {}
    found: dict[str, Restored] = {}
    for stage in STAGES:

        def suits(commit: Commit, stage: Stage = stage) -> bool:
            return _usable(commit, stage, config, begin) and all(
                (position.seq, position.sub) >= written.get(position.topic, NOTHING) for position in commit.inputs
            )

        restored = None
        for topic, service in ((HOURLY, stage.name), (f"state.{stage.name}", "")):
            restored = restored or await load_oldest(log, TP(prefix + topic, partition), suits, service)
        if restored is None:
            return None
        found[stage.name] = restored
        written.update({tail.topic: (tail.seq, tail.sub) for tail in restored.commit.outputs})
    return await _start(log, codecs, journal, begin, found, 0)


async def _find_newest(
    log: Log, config: Config, prefix: str, partition: int, stage: Stage, need: dict[str, Place], begin: int
) -> Restored | None:
    def suits(commit: Commit) -> bool:
        return (
            _usable(commit, stage, config, begin)
            and all((tail.seq, tail.sub) <= need[tail.topic] for tail in commit.outputs)
            and all(
                (position.seq, position.sub) <= need[JOURNAL] for position in commit.inputs if position.topic == JOURNAL
            )
        )

    recent = await _newest_of(log, TP(f"{prefix}state.{stage.name}", partition), suits, "")
    return recent or await _newest_of(log, TP(prefix + HOURLY, partition), suits, stage.name)


async def _newest_of(log: Log, tp: TP, suits: Suits, service: str) -> Restored | None:
    return (await load_newest(log, [tp], suits, service))[tp]


def _usable(commit: Commit, stage: Stage, config: Config, begin: int) -> bool:
    """Whether a snapshot was made by this code under these settings, and the journal behind it is still there."""
    return (
        commit.code_version == CODE_VERSION
        and commit.fingerprint == stage.fingerprint(config)
        and all(position.topic != JOURNAL or position.next_offset >= begin for position in commit.inputs)
    )


async def _start(
    log: Log, codecs: Codecs, journal: TP, begin: int, found: dict[str, Restored], begin_seq: int
) -> Start:
    without = tuple(stage.name for stage in STAGES if stage.name not in found)
    first = found.get(STAGES[0].name)
    session = next((each.commit.session for each in found.values()), "")
    if first is not None:
        position = next(each for each in first.commit.inputs if each.topic == JOURNAL)
        offset, epoch, last_seq = position.next_offset, first.commit.epoch, position.seq
        from_seq = position.seq + 1
    else:
        from_seq, last_seq = begin_seq, None
        offset, epoch = (begin, 0) if begin_seq <= 1 else await journal_entry(log, journal, begin_seq)
    start = Start(journal.partition, offset, epoch, last_seq, from_seq, found, without, session)
    if without:
        start.session = await _session_going_on(log, codecs, journal, start) or ""
    return start


async def _session_going_on(log: Log, codecs: Codecs, journal: TP, start: Start) -> str | None:
    """What session the first record that is stepped belongs to; None where it begins one, or is the first of all."""
    end = (await log.end_offsets([journal]))[journal]
    first = True
    async for chunk in read_journal(log, journal, start.offset, start.epoch, start.last_seq, end, chunk=500):
        for seq, record in chunk:
            if seq < start.from_seq:
                continue
            assert record.value is not None
            content = await decoded(codecs, record.value)
            if first and (seq <= 1 or (content["kind"] == "config" and session_of(content["payload"]))):
                return None
            first = False
            if start.session:
                return start.session
            if content["kind"] == "tick":
                return msgspec.json.decode(content["payload"], type=_TickSession).session or UNKNOWN
    return None if first else UNKNOWN
