"""What a stage's records say, as Prometheus families: counted from what passes out, read when scraped.

Counts last as long as the process, so that none ever falls. What describes the newest records goes with the partition
and its session: nothing is told of symbols that another process has taken over.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import product
from statistics import median_low
from typing import Any, ClassVar, Final

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

from orderflow.microstructure.signal import GUARDS
from orderflow.processor import Record
from orderflow.topics import FUSION

MAX_SYMBOLS: Final = 300
"""The first so many that a process meets have labels of their own."""
OTHER: Final = "other"
WINDOW_TRADES: Final = 500
DIRECTIONS: Final = {1: "buy", -1: "sell", 0: "none"}

Gauge = tuple[str, str, Callable[[Record], float | None]]
"""(name, meaning, its value in a record)."""
Counts = dict[tuple[str, ...], int]
"""By values of labels."""
Labelled = Sequence[tuple[str, Any]]
"""(label, figures) of each symbol."""


class SymbolLabels:
    """Which symbols have a label of their own: the first `MAX_SYMBOLS` that were met, for good.

    By rank among all, a symbol met late would push another into the rest, and a count would fall.
    """

    def __init__(self) -> None:
        self._own: set[str] = set()

    def of(self, symbol: str) -> str:
        """The symbol itself, or `OTHER`."""
        own = self._own
        if symbol not in own:
            if len(own) >= MAX_SYMBOLS:
                return OTHER
            own.add(symbol)
        return symbol


class SymbolFigures(ABC):
    """Of one symbol: its newest record, and how large its z have been."""

    __slots__ = ("above_2", "above_3", "newest", "z_count")

    def __init__(self) -> None:
        self.newest: Record = {}
        self.z_count = 0
        self.above_2 = 0
        self.above_3 = 0

    def begin(self) -> None:
        """Forget what was newest; counts stay."""

    @abstractmethod
    def take(self, record: Record) -> None:
        """Count a record."""

    def take_z(self, z: float | None) -> None:
        """Count a z; NaN is none."""
        if z is None or z != z:
            return
        self.z_count += 1
        if z > 2.0 or z < -2.0:
            self.above_2 += 1
            if z > 3.0 or z < -3.0:
                self.above_3 += 1


class OfiSymbol(SymbolFigures):
    """Of `features.ofi`."""

    __slots__ = ()

    def take(self, record: Record) -> None:
        self.newest = record
        self.take_z(record["ofi_z_raw"])


class CvdSymbol(SymbolFigures):
    """Of `features.cvd`: also what scales and z of the newest trades came from."""

    __slots__ = ("scales", "zs")

    def __init__(self) -> None:
        super().__init__()
        self.scales: deque[tuple[float, bool]] = deque(maxlen=WINDOW_TRADES)
        """(scale, whether it was the floor)."""
        self.zs: deque[tuple[bool, bool]] = deque(maxlen=WINDOW_TRADES)
        """(whether the scale was the floor, whether it was clipped)."""

    def begin(self) -> None:
        self.scales.clear()
        self.zs.clear()

    def take(self, record: Record) -> None:
        self.newest = record
        floor_used = record["floor_used"]
        if record["scale"] is not None:
            self.scales.append((record["scale"], floor_used))
        z = record["z_raw"]
        if z is not None:
            self.zs.append((floor_used, z != record["z_cvd"]))
            self.take_z(z)


class FusionSymbol(SymbolFigures):
    """Of `features.fusion`: also its records by regime."""

    __slots__ = ("regimes",)

    def __init__(self) -> None:
        super().__init__()
        self.regimes: dict[str, int] = {}

    def take(self, record: Record) -> None:
        self.newest = record
        self.take_z(record["score_z"])
        regime = record["regime"]
        self.regimes[regime] = self.regimes.get(regime, 0) + 1


class SignalSymbol(SymbolFigures):
    """Of `signals`: its records by direction and whether they were blocked."""

    __slots__ = ("signals",)

    def __init__(self) -> None:
        super().__init__()
        self.signals: dict[tuple[int, bool], int] = dict.fromkeys(product(DIRECTIONS, (False, True)), 0)
        """All from the start: to Prometheus a series that begins above 0 has not grown."""

    def take(self, record: Record) -> None:
        key = (record["direction"], record["gating"])
        self.signals[key] = self.signals.get(key, 0) + 1


class PartitionFigures:
    """Of one partition that is owned, in one session: which symbols it has."""

    def __init__(self, stage: StageFigures) -> None:
        self._begin = stage.begin
        self._apart = stage.apart
        self.symbols: dict[str, Any] = {}

    def take(self, topic: str, record: Record) -> None:
        """Count a record that is being written."""
        if self._apart is not None and self._apart(topic, record):
            return
        symbol = record["symbol"]
        each = self.symbols.get(symbol)
        if each is None:
            each = self.symbols[symbol] = self._begin(symbol)
        each.take(record)


def _field(name: str) -> Callable[[Record], float | None]:
    return lambda record: record[name]


def _micro_offset_bps(record: Record) -> float | None:
    micro, mid = record["micro_price"], record["mid"]
    return None if micro is None or not mid else (micro - mid) / mid * 1e4


OFI_GAUGES: Final[tuple[Gauge, ...]] = (
    ("ofi_z", "newest z of order flow imbalance", _field("ofi_z")),
    ("ofi_sum_window_base", "order flow imbalance over the trailing window, base units", _field("ofi_sum_window")),
    ("ofi_queue_imbalance", "newest imbalance of the best level, -1 to 1", _field("queue_imbalance")),
    ("ofi_spread_bps", "newest spread, basis points", _field("spread_bps")),
    ("ofi_micro_offset_bps", "newest micro-price less mid, basis points", _micro_offset_bps),
    ("ofi_quote_rate_tps", "quotes per second of event time", _field("quote_rate")),
)
CVD_GAUGES: Final[tuple[Gauge, ...]] = (
    ("cvd_base", "cumulative volume delta, base units", _field("cvd")),
    ("cvd_z", "newest z of volume delta", _field("z_cvd")),
    ("cvd_imbalance_10s", "signed over total flow of the last 10 s, -1 to 1", _field("imbalance_10s")),
    ("cvd_buy_ratio", "bought over all quantity of the trailing minute", _field("buy_ratio")),
    ("cvd_vpin", "volume-synchronised probability of informed trading", _field("vpin")),
    ("cvd_trade_rate_tps", "trades per second of the trailing minute", _field("trades_per_sec")),
    ("cvd_price", "newest trade price, quote units", _field("price")),
)
FUSION_GAUGES: Final[tuple[Gauge, ...]] = (
    ("fusion_score", "newest score", _field("score")),
    ("fusion_score_z", "newest score over its trailing deviation", _field("score_z")),
    ("fusion_consistency", "newest consistency, 0 to 1", _field("consistency")),
    ("fusion_proba", "newest calibrated probability of a rise", _field("proba")),
    ("fusion_lag_sec", "how much older the one factor is than the other, seconds", _field("lag_sec")),
    ("fusion_volatility_bps", "realised volatility of the trailing minute, basis points", _field("volatility_bps")),
    ("cvd_direction", "1 where CVD is taken as it is, -1 where flipped", _field("cvd_direction")),
)


class StageFigures:
    """Figures of one stage in one process, and their collector.

    Parameters
    ----------
    service
        Name of the stage.
    owned
        The figures of the partitions owned now.
    """

    apart: Callable[[str, Record], bool] | None = None
    """Where set: counts what belongs to no symbol; True where the record is none of a symbol."""
    symbol_type: ClassVar[type[SymbolFigures]]
    """What is kept of a symbol; each stage has its own kind."""
    gauges: ClassVar[tuple[Gauge, ...]] = ()

    def __init__(self, service: str) -> None:
        self._service = service
        self.symbols: dict[str, Any] = {}
        """Every symbol that this process has met: a subscription is a few hundred at most."""
        self.owned: Callable[[], Iterable[PartitionFigures]] = tuple
        self._labels = SymbolLabels()

    def partition(self) -> PartitionFigures:
        """For a partition, or a session, that begins."""
        return PartitionFigures(self)

    def begin(self, symbol: str) -> SymbolFigures:
        """The figures of a symbol that a partition meets for the first time."""
        each: SymbolFigures | None = self.symbols.get(symbol)
        if each is None:
            each = self.symbols[symbol] = self.symbol_type()
            self._labels.of(symbol)
        each.begin()
        return each

    def collect(self) -> list[Any]:
        """Every family; registered with Prometheus' registry."""
        owned = {name: each for part in self.owned() for name, each in list(part.symbols.items())}
        shown = {name: each for name, each in sorted(owned.items()) if self._labels.of(name) != OTHER}
        labelled = [(self._labels.of(name), each) for name, each in list(self.symbols.items())]
        return [*self.counters(labelled), *self.newest(shown)]

    def counters(self, symbols: Labelled) -> list[Any]:
        """Families of counts, over all symbols."""
        given: Counts = {}
        above: Counts = {}
        for label, each in symbols:
            _add(given, (self._service, label), each.z_count)
            _add(above, (self._service, label, "2"), each.above_2)
            _add(above, (self._service, label, "3"), each.above_3)
        return [
            _counter("feature_z", "z values given", ("service", "symbol"), given),
            _counter("feature_z_above", "z values with |z| above the limit", ("service", "symbol", "limit"), above),
        ]

    def newest(self, symbols: Mapping[str, Any]) -> list[Any]:
        """Families of the newest values, of symbols with labels of their own."""
        families = []
        for name, text, value_of in self.gauges:
            family = _symbol_gauge(name, text)
            for symbol, each in symbols.items():
                value = value_of(each.newest)
                if value is not None and math.isfinite(value):
                    family.add_metric([symbol], value)
            families.append(family)
        return families


class OfiFigures(StageFigures):
    """Of the stage ofi."""

    symbol_type = OfiSymbol
    gauges = OFI_GAUGES


class CvdFigures(StageFigures):
    """Of the stage cvd."""

    symbol_type = CvdSymbol
    gauges = CVD_GAUGES

    def newest(self, symbols: Mapping[str, Any]) -> list[Any]:
        scale = _symbol_gauge("cvd_scale_median", f"median scale of the newest {WINDOW_TRADES} trades, base units")
        floor = _symbol_gauge("cvd_floor_hit_rate", "share of these whose scale was the floor")
        sigma = _symbol_gauge(
            "sigma_floor_hit_rate", f"share of the newest {WINDOW_TRADES} z whose scale was the floor"
        )
        winsor = _symbol_gauge("winsor_hit_rate", "share of these that were clipped")
        for symbol, each in symbols.items():
            if each.scales:
                scale.add_metric([symbol], median_low([value for value, _ in each.scales]))
                floor.add_metric([symbol], sum(hit for _, hit in each.scales) / len(each.scales))
            if each.zs:
                sigma.add_metric([symbol], sum(hit for hit, _ in each.zs) / len(each.zs))
                winsor.add_metric([symbol], sum(hit for _, hit in each.zs) / len(each.zs))
        return [*super().newest(symbols), scale, floor, sigma, winsor]


class FusionFigures(StageFigures):
    """Of the stage fusion."""

    symbol_type = FusionSymbol
    gauges = FUSION_GAUGES

    def __init__(self, service: str) -> None:
        super().__init__(service)
        self._events: Counts = {}
        self.apart = self._count_event

    def _count_event(self, topic: str, record: Record) -> bool:
        if topic == FUSION:
            return False
        _add(self._events, (record["event_type"],), 1)
        return True

    def counters(self, symbols: Labelled) -> list[Any]:
        records: Counts = {}
        for label, each in symbols:
            for regime, count in sorted(each.regimes.items()):
                _add(records, (label, regime), count)
        return [
            *super().counters(symbols),
            _counter("fusion_records", "fusion records by regime", ("symbol", "regime"), records),
            _counter("fusion_events", "records of features.events", ("event_type",), self._events),
        ]

    def newest(self, symbols: Mapping[str, Any]) -> list[Any]:
        regimes = GaugeMetricFamily("fusion_regime", "1 for the regime in force", labels=["symbol", "regime"])
        for symbol, each in symbols.items():
            regimes.add_metric([symbol, each.newest["regime"]], 1.0)
        return [*super().newest(symbols), regimes]


class SignalFigures(StageFigures):
    """Of the stage signal."""

    symbol_type = SignalSymbol

    def __init__(self, service: str) -> None:
        super().__init__(service)
        self._blocked: Counts = {}
        """By all guards that blocked a record: the same few combinations again and again."""
        self.apart = self._count_guards

    def _count_guards(self, topic: str, record: Record) -> bool:
        guards = tuple(record["gate_reasons"])
        self._blocked[guards] = self._blocked.get(guards, 0) + 1
        return False

    def counters(self, symbols: Labelled) -> list[Any]:
        signals: Counts = {}
        for label, each in symbols:
            for (direction, blocked), count in sorted(each.signals.items()):
                _add(signals, (label, DIRECTIONS[direction], "blocked" if blocked else "passed"), count)
        reasons: Counts = {(guard,): 0 for guard in GUARDS}
        for guards, count in self._blocked.items():
            for guard in guards:
                _add(reasons, (guard,), count)
        return [
            _counter("signals", "records of signals", ("symbol", "direction", "gating"), signals),
            _counter("signals_gated", "signals that this guard blocked", ("reason",), reasons),
        ]


STAGE_FIGURES: Final[Mapping[str, type[StageFigures]]] = {
    "ofi": OfiFigures,
    "cvd": CvdFigures,
    "fusion": FusionFigures,
    "signal": SignalFigures,
}


def _add(counts: Counts, labels: tuple[str, ...], count: int) -> None:
    counts[labels] = counts.get(labels, 0) + count


def _counter(
    name: str, text: str, labels: tuple[str, ...], counts: Mapping[tuple[str, ...], int]
) -> CounterMetricFamily:
    family = CounterMetricFamily(name, text, labels=labels)
    for values, count in sorted(counts.items()):
        family.add_metric(values, count)
    return family


def _symbol_gauge(name: str, text: str) -> GaugeMetricFamily:
    return GaugeMetricFamily(name, text, labels=["symbol"])
