"""The processors of the pipeline: one table that the services, the verifier and the tests share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from orderflow.config import Config, fingerprint
from orderflow.microstructure.cvd import CvdProcessor
from orderflow.microstructure.fusion import FusionProcessor
from orderflow.microstructure.ofi import OfiProcessor
from orderflow.microstructure.signal import SignalProcessor
from orderflow.processor import Processor
from orderflow.topics import CVD, EVENTS, FEATURE_EVENTS, FUSION, JOURNAL, OFI, REJECTS, ROWS, SIGNALS, TICKS
from orderflow.venues.binance.normaliser import NormaliserProcessor

ROW_SOURCES: Final = ("aggTrade", "bookTicker", "depth", "markPrice", "forceOrder", "unknown")
"""Symbols of the enum `src` of market.rows, in the schema's order."""


@dataclass(frozen=True, slots=True)
class Stage:
    """One processor service: what it reads and writes, how it is made, what its results depend on."""

    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    make: Callable[[Config, int], Processor]
    fingerprint: Callable[[Config], str]
    row_sources: tuple[str, ...] | None = None
    """Where set: the kinds of market.rows that it wants; the others are not even decoded."""

    @property
    def row_filter(self) -> frozenset[int] | None:
        if self.row_sources is None:
            return None
        return frozenset(ROW_SOURCES.index(source) for source in self.row_sources)


def _signal_fingerprint(config: Config) -> str:
    return fingerprint("signal", config.signal)


STAGES: Final[tuple[Stage, ...]] = (
    Stage(
        "normaliser",
        (JOURNAL,),
        (TICKS, ROWS, EVENTS, REJECTS),
        lambda config, partition: NormaliserProcessor(config.normaliser, partition),
        lambda config: fingerprint("normaliser", config.normaliser),
    ),
    Stage(
        "ofi",
        (TICKS, ROWS),
        (OFI,),
        lambda config, partition: OfiProcessor(config.ofi, partition),
        lambda config: fingerprint("ofi", config.ofi),
        ("bookTicker", "depth"),
    ),
    Stage(
        "cvd",
        (TICKS, ROWS),
        (CVD,),
        lambda config, partition: CvdProcessor(config.cvd, partition),
        lambda config: fingerprint("cvd", config.cvd),
        ("aggTrade",),
    ),
    Stage(
        "fusion",
        (TICKS, OFI, CVD),
        (FUSION, FEATURE_EVENTS),
        lambda config, partition: FusionProcessor(config.fusion, partition),
        lambda config: fingerprint("fusion", config.fusion),
    ),
    Stage(
        "signal",
        (TICKS, FUSION),
        (SIGNALS,),
        lambda config, partition: SignalProcessor(config.signal, partition, _signal_fingerprint(config)),
        _signal_fingerprint,
    ),
)
"""In the order of computation."""

BY_NAME: Final[dict[str, Stage]] = {stage.name: stage for stage in STAGES}
