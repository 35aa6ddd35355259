"""Every stage of one partition as one function: journal record in, derived records out. No clock, no I/O."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final, NamedTuple

from orderflow.config import Config
from orderflow.pipeline import STAGES, Stage
from orderflow.processor import Processor, Record
from orderflow.streaming.codec import Codecs
from orderflow.streaming.journal import session_of
from orderflow.streaming.snapshots import Restored
from orderflow.topics import DERIVED, JOURNAL, TICKS

NOTHING: Final = (-1, -1)
WHOLE: Final = 1 << 40
"""Above every `sub`: (seq, WHOLE) is behind all records of a seq."""

Place = tuple[int, int]
"""(seq, sub)."""


class Derived(NamedTuple):
    """One record that a journal record causes: as bytes, and decoded as its readers see it."""

    seq: int
    sub: int
    key: bytes
    value: bytes
    record: Record


class _StageRun:
    """One stage: its processor, what it has taken of each input, what it has written to each output."""

    __slots__ = ("_config", "_partition", "control", "last_out", "processor", "sources", "stage", "taken")

    def __init__(self, stage: Stage, config: Config, partition: int) -> None:
        self.stage = stage
        self._config = config
        self._partition = partition
        self.processor: Processor = stage.make(config, partition)
        self.control = TICKS if TICKS in stage.inputs else JOURNAL
        self.sources = stage.row_sources
        self.taken: dict[str, Place] = dict.fromkeys(stage.inputs, NOTHING)
        self.last_out: dict[str, Place] = dict.fromkeys(stage.outputs, NOTHING)

    def restore(self, restored: Restored) -> None:
        self.processor.restore(restored.states)
        for position in restored.commit.inputs:
            self.taken[position.topic] = (position.seq, position.sub)
        for tail in restored.commit.outputs:
            if tail.topic in self.last_out:
                self.last_out[tail.topic] = (tail.seq, tail.sub)

    def begin_anew(self) -> None:
        """A session has begun: nothing of the one before may be known."""
        self.processor = self.stage.make(self._config, self._partition)


class Cascade:
    """The stages of one partition, stepped synchronously: for one journal record, all that follows from it.

    The order within a seq equals the order of the services' merges: ticks first, then the others by rank. Each stage
    can begin from a snapshot of its service: what that had taken already is passed by, and its numbering goes on.
    """

    def __init__(self, config: Config, codecs: Codecs, partition: int) -> None:
        self._encode = {topic: codecs.encoder(topic) for topic in DERIVED}
        self._decode = {topic: codecs.decoder(topic) for topic in DERIVED}
        self._stages = [_StageRun(stage, config, partition) for stage in STAGES]

    def restore(self, snapshots: Mapping[str, Restored]) -> None:
        """Begin each stage that is named from its snapshot; the others begin without a past."""
        for run in self._stages:
            if run.stage.name in snapshots:
                run.restore(snapshots[run.stage.name])

    @property
    def written(self) -> dict[str, Place]:
        """The newest (seq, sub) of each output; what lies at or below it before any step is not computed here."""
        return {topic: place for run in self._stages for topic, place in run.last_out.items()}

    def step(self, journal: Record) -> dict[str, list[Derived]]:
        """Every record caused by one journal record, by topic."""
        seq: int = journal["seq"]
        written: dict[str, list[Derived]] = {}
        given: dict[str, list[Derived]] = {JOURNAL: [Derived(seq, 0, b"", b"", journal)]}
        for run in self._stages:
            for topic in run.stage.inputs:
                for each in given.get(topic, ()):
                    if (seq, each.sub) <= run.taken[topic]:
                        continue
                    if run.sources is not None and topic != TICKS and each.record["src"] not in run.sources:
                        continue
                    self._step_stage(run, topic, seq, each.record, written, given)
        return written

    def _step_stage(
        self,
        run: _StageRun,
        topic: str,
        seq: int,
        record: Record,
        written: dict[str, list[Derived]],
        given: dict[str, list[Derived]],
    ) -> None:
        if topic == run.control and record["kind"] == "config" and session_of(record["payload"]):
            run.begin_anew()
        for out_topic, symbol, fields in run.processor.step(topic, dict(record)):
            last_seq, last_sub = run.last_out[out_topic]
            sub = last_sub + 1 if last_seq == seq else 0
            run.last_out[out_topic] = (seq, sub)
            fields["seq"] = seq
            fields["sub"] = sub
            value = self._encode[out_topic](fields)
            derived = Derived(seq, sub, symbol.encode(), value, self._decode[out_topic](value))
            written.setdefault(out_topic, []).append(derived)
            given.setdefault(out_topic, []).append(derived)
