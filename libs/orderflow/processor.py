"""The seam between the pure core and everything around it.

A `Processor` is a state machine over the merged records of one journal partition. It has no clock, no randomness,
no I/O and no knowledge of Kafka: the same records in the same order give the same records out, which is what makes
replay equal live and a restart harmless.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Protocol, TypeAlias

Record: TypeAlias = dict[str, Any]
"""A decoded Avro value. Every derived record holds `seq` (the journal record that caused it) and `sub`."""

Emit: TypeAlias = tuple[str, str, Record]
"""(logical topic, key = symbol or "", value without `seq` and `sub`): the runtime numbers records as it sends them."""


class Processor(Protocol):
    """A deterministic step function with a state that can be saved and restored between any two steps."""

    inputs: ClassVar[tuple[str, ...]]
    """Logical topics in the order of rank: records of one seq are taken in this order."""
    outputs: ClassVar[tuple[str, ...]]

    def step(self, topic: str, record: Record) -> list[Emit]:
        """Take one record; return what it causes, in order.

        Must never raise on market data, however odd: refuse it with a reason, or give a defined output.
        """
        ...

    def snapshot(self) -> dict[str, bytes]:
        """The whole state, an entry per symbol and "" for what belongs to none. Restoring it gives the same future."""
        ...

    def restore(self, states: Mapping[str, bytes]) -> None:
        """Replace the state by one that `snapshot` returned."""
        ...
