"""The one table of topics: name, schema, writer, retention."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

PARTITIONS: Final = 12
"""The same everywhere, so that a record's partition number is its journal's."""

HOUR_MS: Final = 3_600_000
DAY_MS: Final = 24 * HOUR_MS


@dataclass(frozen=True, slots=True)
class Topic:
    """One logical topic. `schema` is a file of `schemas/` without its ending; None for opaque bytes (state)."""

    name: str
    schema: str | None
    writer: str
    retention_ms: int
    partitions: int = PARTITIONS
    bounded_by_size: bool = False
    """Kept by size instead of age: however long its writer is away, the newest records stay."""


JOURNAL: Final = "market.journal"
ROWS: Final = "market.rows"
TICKS: Final = "market.ticks"
EVENTS: Final = "market.events"
REJECTS: Final = "quality.rejects"
OFI: Final = "features.ofi"
CVD: Final = "features.cvd"
FUSION: Final = "features.fusion"
FEATURE_EVENTS: Final = "features.events"
SIGNALS: Final = "signals"
COMMANDS: Final = "control.commands"
HOURLY: Final = "state.hourly"
"""A snapshot an hour of every service, kept as long as the journal: where a replay of last week starts from."""

TOPICS: Final[tuple[Topic, ...]] = (
    Topic(JOURNAL, "journal", "recorder", 7 * DAY_MS),
    Topic(ROWS, "row", "normaliser", 3 * DAY_MS),
    Topic(TICKS, "tick", "normaliser", 14 * DAY_MS),
    Topic(EVENTS, "market_event", "normaliser", 14 * DAY_MS),
    Topic(REJECTS, "reject", "normaliser", 14 * DAY_MS),
    Topic(OFI, "ofi", "ofi", 14 * DAY_MS),
    Topic(CVD, "cvd", "cvd", 14 * DAY_MS),
    Topic(FUSION, "fusion", "fusion", 14 * DAY_MS),
    Topic(FEATURE_EVENTS, "feature_event", "fusion", 14 * DAY_MS),
    Topic(SIGNALS, "signal", "signal", 14 * DAY_MS),
    Topic(COMMANDS, "command", "cli", 14 * DAY_MS, partitions=1),
    *(
        Topic(f"state.{service}", None, service, 7 * DAY_MS, bounded_by_size=True)
        for service in ("normaliser", "ofi", "cvd", "fusion", "signal", "lake", "sinks")
    ),
    Topic(HOURLY, None, "every service", 7 * DAY_MS),
)

BY_NAME: Final[dict[str, Topic]] = {topic.name: topic for topic in TOPICS}
DERIVED: Final = (TICKS, ROWS, EVENTS, REJECTS, OFI, CVD, FUSION, FEATURE_EVENTS, SIGNALS)
"""Topics that are pure functions of the journal, in the order in which they are computed."""
