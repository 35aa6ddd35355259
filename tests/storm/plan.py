"""What goes wrong in a storm: the exchange's faults, and those of our own machine, drawn by one seed."""

from __future__ import annotations

from random import Random
from typing import Final

import msgspec
from orderflow.venues.binance.sim.faults import FaultPlan

MACHINE_KINDS: Final = (
    "kill",
    "zombie",
    "broker_hang",
    "broker_fail",
    "stall",
)
"""kill: the recorder vanishes, what was not acknowledged is lost or not. zombie: a second recorder opens while the first
lives. broker_hang: the broker answers nothing for a while. broker_fail: it refuses batches, some after storing them.
stall: the whole process stands still."""

QUIET_START_MS: Final = 20_000
QUIET_END_MS: Final = 160_000
"""After 451 the recorder asks nothing for two minutes; then half a minute in which all is well."""


class MachineFault(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A fault on our side of the wire."""

    kind: str
    at_ms: int
    duration_ms: int = 0

    def __post_init__(self) -> None:
        if self.kind not in MACHINE_KINDS:
            raise ValueError(f"kind is {self.kind!r}: one of {', '.join(MACHINE_KINDS)} is expected")

    def __str__(self) -> str:
        return f"{self.kind}@{self.at_ms}ms+{self.duration_ms}ms"


class StormPlan(msgspec.Struct, frozen=True, kw_only=True):
    """Everything that goes wrong in one run."""

    exchange: FaultPlan
    machine: tuple[MachineFault, ...]


def draw_machine(
    seed: int, duration_ms: int, kinds: tuple[str, ...], mean_gap_ms: int, quiet_end_ms: int = QUIET_END_MS
) -> tuple[MachineFault, ...]:
    """Faults of the given kinds, one after the other, `mean_gap_ms` apart on average; none near the start and the end."""
    chance = Random(f"{seed}/machine")
    faults: list[MachineFault] = []
    at_ms = QUIET_START_MS
    if not kinds:
        return ()
    while True:
        at_ms += 1 + int(chance.expovariate(1 / mean_gap_ms))
        kind = kinds[chance.randrange(len(kinds))]
        fault = machine_fault(kind, at_ms, chance)
        if at_ms + fault.duration_ms > duration_ms - quiet_end_ms:
            return tuple(faults)
        faults.append(fault)
        at_ms += fault.duration_ms


def machine_fault(kind: str, at_ms: int, chance: Random) -> MachineFault:
    """A fault of a kind with duration and value drawn."""
    duration_ms = 0
    if kind == "kill":
        duration_ms = 200 + int(chance.expovariate(1 / 2_000))
    elif kind == "zombie":
        duration_ms = int(chance.expovariate(1 / 3_000))
    elif kind == "broker_hang":
        # Now and then longer than the recorder's patience.
        duration_ms = min(100_000, 500 + int(chance.expovariate(1 / 15_000)))
    elif kind == "broker_fail":
        duration_ms = 500 + int(chance.expovariate(1 / 4_000))
    elif kind == "stall":
        duration_ms = 300 + min(20_000, int(chance.expovariate(1 / 3_000)))
    return MachineFault(kind=kind, at_ms=at_ms, duration_ms=duration_ms)
