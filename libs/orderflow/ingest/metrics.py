"""Figures of ingestion as Prometheus families: what the recorder and the normaliser count, read when scraped.

The first `MAX_SYMBOLS` symbols that are met have a label of their own; figures of the rest stand under `other`.
"""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Final, Protocol

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, UnknownMetricFamily

from orderflow.counts import ProcessCounts
from orderflow.processor import Processor
from orderflow.streaming.figures import OTHER, SymbolLabels
from orderflow.streaming.runtime import ProcessorRuntime
from orderflow.streaming.samples import RecentSamples
from orderflow.venues.binance.normaliser import (
    GAP_REASONS,
    MISSING_REASONS,
    REJECT_REASONS,
    RESYNC_REASONS,
    NormaliserProcessor,
    SymbolFigures,
)

MAX_LABELS: Final = 300
"""Values of one figure of the recorder."""
RATE_SEC: Final = 10.0
"""A rate is that of the newest stretch that is at least so long, where the process has lived so long."""
STATUS_LABELS: Final = ("key", "detail")
BOOK_STATES: Final = ("none", "resyncing", "stale", "synced")
DUPLICATES: Final = {"trade_duplicate": "aggTrade", "quote_duplicate": "bookTicker", "diff_duplicate": "depth"}
TALLIES: Final = (
    ("rejects", "rejects", "reason", "frames and rows refused, whole, with their reason"),
    ("gaps", "gaps", "reason", "gaps told of a symbol"),
    ("resyncs", "resyncs", "reason", "books that were dropped and begun anew"),
    ("missing_frames", "missing_frames", "reason", "frames that the recorder has said it lacks"),
    ("stale_rows", "stale_rows", "stream", "rows whose R - E is above the bound"),
    ("unknown_values", "unknown_values", "field", "values that this version does not know"),
    ("market_events", "events", "event_type", "records of market.events"),
)
"""(name of the metric, tally, label, meaning)."""
KNOWN: Final = {
    "rejects": tuple(REJECT_REASONS),
    "gaps": GAP_REASONS,
    "resyncs": RESYNC_REASONS,
    "missing_frames": MISSING_REASONS,
}
"""Labels told from the start: to Prometheus a series that begins above 0 has not grown."""


class HasStatus(Protocol):
    """A recorder, as far as figures go."""

    def status(self) -> dict[str, Any]: ...


class RecorderCollector:
    """The recorder's figures: those with names of their own, and every other number of its status.

    A number `x` of the status is `recorder_x`; mappings of numbers get the labels `key` and, one level deeper, `detail`.
    """

    def __init__(self, recorder: HasStatus, clock: Callable[[], float] = time.monotonic) -> None:
        self._recorder = recorder
        self._clock = clock
        self._begun_sec = clock()
        self._counted: deque[tuple[float, dict[str, float]]] = deque([(self._begun_sec, {})])

    def collect(self) -> list[Any]:
        status = self._recorder.status()
        by_route = dict(sorted(status.get("frames_by_route", {}).items()))
        frames = CounterMetricFamily("recv_frames", "frames received", labels=["route"])
        for route, count in by_route.items():
            frames.add_metric([route], count)
        rate = GaugeMetricFamily("recv_rate_tps", "frames received per second, newest stretch", labels=["route"])
        for route, per_sec in self._rates(by_route).items():
            rate.add_metric([route], per_sec)
        families: list[Any] = [frames, rate]
        for name, key in (
            ("ws_reconnects", "reconnects"),
            ("dropped_frames", "dropped"),
            ("conflated_frames", "conflated"),
        ):
            counter = CounterMetricFamily(name, f"{key} since the process began")
            counter.add_metric([], sum(number for _, number in _numbers(status.get(key, 0))))
            families.append(counter)
        return families + [_status_family(key, status[key]) for key in sorted(status) if any(_numbers(status[key]))]

    def _rates(self, by_route: Mapping[str, float]) -> dict[str, float]:
        """Frames per second of each route since the newest look that is `RATE_SEC` back."""
        now_sec, looks = self._clock(), self._counted
        while len(looks) > 1 and looks[1][0] <= now_sec - RATE_SEC:
            looks.popleft()
        then_sec, before = looks[0]
        if now_sec - looks[-1][0] >= RATE_SEC / 10:
            looks.append((now_sec, dict(by_route)))
        span_sec = now_sec - then_sec
        if span_sec <= 0.0:
            return {}
        return {route: max(0.0, count - before.get(route, 0)) / span_sec for route, count in by_route.items()}


def _numbers(value: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], float]]:
    """Every number in a value of the status with the keys that lead to it, in order."""
    if isinstance(value, bool | int | float):
        yield path, float(value)
    elif isinstance(value, Mapping):
        for key in sorted(value, key=str):
            yield from _numbers(value[key], (*path, str(key)))


def _status_family(key: str, value: Any) -> UnknownMetricFamily:
    numbers = list(_numbers(value))
    depth = min(max(len(path) for path, _ in numbers), len(STATUS_LABELS))
    family = UnknownMetricFamily(f"recorder_{key}", f"{key} of the recorder's status", labels=STATUS_LABELS[:depth])
    merged: dict[tuple[str, ...], float] = {}
    for path, number in numbers:
        labels = (*path[: depth - 1], "/".join(path[depth - 1 :])) if depth else ()
        labels += ("",) * (depth - len(labels))
        if labels not in merged and len(merged) >= MAX_LABELS:
            labels = (OTHER,) * depth
        merged[labels] = merged.get(labels, 0.0) + number
    for labels, number in merged.items():
        family.add_metric(labels, number)
    return family


class NormaliserCollector:
    """What the normalisers of this process have counted since it began, and how each symbol stands."""

    def __init__(self, processors: Callable[[], Iterable[NormaliserProcessor]], counted: ProcessCounts) -> None:
        """`counted`: what the processors of this process, also those that are gone, have raised."""
        self._processors = processors
        self._counted = counted
        self._labels = SymbolLabels()

    def collect(self) -> list[Any]:
        processors, counted = list(self._processors()), self._counted
        for processor in processors:
            processor.count_oracle()
        families: list[Any] = [
            _counter(name, text, label, {**dict.fromkeys(KNOWN.get(tally, ()), 0), **counted.by_cause(tally)})
            for name, tally, label, text in TALLIES
        ]
        duplicates = {stream: counted.of("totals", name) for name, stream in DUPLICATES.items()}
        families.append(_counter("dedup_hits", "frames dropped because they had come before", "stream", duplicates))
        totals = counted.by_cause("totals")
        families.append(_counter("unrowed_frames", "frames that gave neither a row nor a reject", "cause", totals))
        for name, text, count in (
            ("backfilled_trades", "missing trades that were fetched", counted.of("trades", "backfilled")),
            ("lost_trades", "missing trades that were given up", counted.of("trades", "lost")),
            ("books_distrusted", "times that quotes in a row proved a book wrong", counted.of("distrusted")),
            (
                "oracle_checked",
                "applied diffs held against the quote that they belong to",
                counted.of("oracle", "checked"),
            ),
            ("oracle_failed", "applied diffs that disagreed with it", counted.of("oracle", "failed")),
            ("oracle_skipped", "applied diffs whose quote is not known", counted.of("oracle", "skipped")),
        ):
            families.append(_plain_counter(name, text, count))
        drifts = [each.drift_ms for each in processors if each.drift_ms is not None]
        if drifts:
            families.append(
                _gauge("clock_drift_ms", "receive time less the exchange's server time", max(drifts, key=abs))
            )
        figures = sorted(figure for processor in processors for figure in processor.symbol_figures())
        return families + _symbol_families(figures, self._labels)


def _symbol_families(figures: list[SymbolFigures], labels: SymbolLabels) -> list[Any]:
    states = Counter(each.book_state for each in figures)
    books = GaugeMetricFamily("books", "books by state", labels=["state"])
    for state in BOOK_STATES:
        books.add_metric([state], states[state])
    synced = GaugeMetricFamily(
        "book_synced", "1 where the book can be trusted (other: all of the rest)", labels=["symbol"]
    )
    skew = GaugeMetricFamily("skew_ms", "T of the newest depth less T of the newest trade", labels=["symbol"])
    silent = GaugeMetricFamily("stream_silent", "1 where the stream is silent", labels=["symbol", "stream"])
    own = [each for each in figures if labels.of(each.symbol) != OTHER]
    rest = [each for each in figures if labels.of(each.symbol) == OTHER]
    for each in own:
        synced.add_metric([each.symbol], float(each.book_state == "synced"))
        if each.skew_ms is not None:
            skew.add_metric([each.symbol], each.skew_ms)
        for stream in each.silent:
            silent.add_metric([each.symbol, stream], 1.0)
    if rest:
        synced.add_metric([OTHER], float(all(each.book_state == "synced" for each in rest)))
        for stream, count in sorted(Counter(stream for each in rest for stream in each.silent).items()):
            silent.add_metric([OTHER, stream], count)
    streams = GaugeMetricFamily("streams_silent", "silent streams", labels=["stream"])
    silent_streams = Counter(stream for each in figures for stream in each.silent)
    for stream in ("aggTrade", "bookTicker", "depth"):
        streams.add_metric([stream], silent_streams[stream])
    return [books, synced, skew, silent, streams]


def normalisers(runtime: ProcessorRuntime) -> Callable[[], list[NormaliserProcessor]]:
    """The normalisers of a runtime as they are at the time of asking."""
    return lambda: [
        task.processor for _, task in sorted(runtime.tasks.items()) if isinstance(task.processor, NormaliserProcessor)
    ]


def counting(
    make: Callable[[int], Processor], counted: ProcessCounts, latencies_ms: RecentSamples
) -> Callable[[int], Processor]:
    """`make`, whose normalisers all raise the same counts and sample R - E of each row into the same ring."""

    def made(partition: int) -> Processor:
        processor = make(partition)
        if isinstance(processor, NormaliserProcessor):
            processor.counted = counted
            processor.note_latency_ms = latencies_ms.add
        return processor

    return made


def _counter(name: str, text: str, label: str, counts: Mapping[str, int]) -> CounterMetricFamily:
    family = CounterMetricFamily(name, text, labels=[label])
    for cause, count in sorted(counts.items()):
        family.add_metric([cause], count)
    return family


def _plain_counter(name: str, text: str, count: int) -> CounterMetricFamily:
    family = CounterMetricFamily(name, text)
    family.add_metric([], count)
    return family


def _gauge(name: str, text: str, value: float) -> GaugeMetricFamily:
    family = GaugeMetricFamily(name, text)
    family.add_metric([], value)
    return family
