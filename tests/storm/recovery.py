"""How faults were noticed, and how long it took until all was well again by the exchange's truth."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable
from typing import Any, Final, NamedTuple

import msgspec

from tests.storm.world import Output, Result

CALM_SEC: Final = 90.0
"""A fault is judged alone where no other is within so long before it and after."""


class Span(NamedTuple):
    """When a fault was on, seconds since the start."""

    kind: str
    begin_sec: float
    end_sec: float
    number: int
    """In the exchange's plan; -1 for our machine's."""


def spans(result: Result) -> list[Span]:
    """Every fault of the plan, by its beginning."""
    exchange = result.plan.exchange.faults
    found = [Span(each.kind, each.at_ms / 1000, each.end_ms / 1000, index) for index, each in enumerate(exchange)]
    for each in result.plan.machine:
        found.append(Span(each.kind, each.at_ms / 1000, (each.at_ms + each.duration_ms) / 1000, -1))
    return sorted(found, key=lambda span: (span.begin_sec, span.number))


def isolated(result: Result) -> list[Span]:
    """Those that no other fault disturbed."""
    found = spans(result)
    alone = []
    for place, span in enumerate(found):
        before = max((other.end_sec for other in found[:place]), default=-CALM_SEC)
        after = found[place + 1].begin_sec if place + 1 < len(found) else float("inf")
        if span.begin_sec - before >= CALM_SEC and after - span.end_sec >= CALM_SEC:
            alone.append(span)
    return alone


def isolated_recoveries(result: Result) -> list[tuple[str, float]]:
    """(kind, seconds from the fault's end until all was well for good) of every fault alone.

    Some faults show late: a connection that is half open is found out by its pings. So it is the last moment of being
    unwell that counts, before the calm is over.
    """
    times = [sample.at_sec for sample in result.samples]
    found = []
    for span in isolated(result):
        first, last = bisect_left(times, span.begin_sec), bisect_left(times, span.end_sec + CALM_SEC)
        unwell = [sample.at_sec for sample in result.samples[first:last] if sample.unwell]
        found.append((span.kind, max(0.0, unwell[-1] - span.end_sec) if unwell else 0.0))
    return found


class Traces(NamedTuple):
    """What the pipeline said while a fault was on, and in the calm after it."""

    events: frozenset[str]
    """event_type, and event_type/reason or /why where there is one."""
    rejects: frozenset[str]
    counted: frozenset[str]
    """Totals of the normaliser, jumps of the clock and refused connections that are not 0 at the end."""
    hits: tuple[Any, ...]
    """What the fault did, to streams that are subscribed."""
    rest_errors: frozenset[str]


SUBSCRIBED: Final = frozenset({"aggTrade", "bookTicker", "depth@100ms", ""})
PROVED_BY_IDS: Final = frozenset({"backfill_needed", "trades_backfilled", "trades_lost"})
_DUPLICATES: Final = frozenset({"trade_duplicate", "quote_duplicate", "diff_duplicate", "trade_late"})


def _of(traces: Traces, stream: str) -> bool:
    return any(hit.stream == stream for hit in traces.hits)


def _losses_noticed(traces: Traces) -> bool:
    """Ids prove that trades or diffs are missing; that a quote is missing nothing can prove."""
    trades = not _of(traces, "aggTrade") or bool(traces.events & PROVED_BY_IDS)
    diffs = not _of(traces, "depth@100ms") or "gap/pu_mismatch" in traces.events
    return trades and diffs


def _answered(traces: Traces) -> bool:
    return not any(hit.effect == "answered" for hit in traces.hits) or bool(traces.rest_errors)


def _reconnected(traces: Traces) -> bool:
    return "reconnect" in traces.events


def _refused(traces: Traces) -> bool:
    return "refused" in traces.counted


def _restarted(traces: Traces) -> bool:
    return "gap/restart" in traces.events


NOTICED: Final[dict[str, Callable[[Traces], bool]]] = {
    "drop": _losses_noticed,
    "diff_gap": lambda traces: "gap/pu_mismatch" in traces.events,
    "duplicate": lambda traces: bool(traces.counted & _DUPLICATES),
    "truncate": lambda traces: bool(traces.rejects),
    "garbage": lambda traces: bool(traces.rejects),
    "oversize": _reconnected,
    "crossed_book": lambda traces: "crossed_book" in traces.rejects,
    "zero_price_trade": lambda traces: bool(traces.counted & _DUPLICATES or traces.rejects),
    "insurance_trade": lambda traces: bool(traces.counted & _DUPLICATES or traces.rejects),
    "half_open": _reconnected,
    "mute_pongs": _reconnected,
    "refuse_connect": _refused,
    "unknown_enum": lambda traces: "unknown_values" in traces.events,
    "close_1006": _reconnected,
    "close_1008": _reconnected,
    "life_cut": _reconnected,
    "rest_418": _answered,
    "rest_429": _answered,
    "rest_451": _answered,
    "rest_503": _answered,
    "local_clock_jump": lambda traces: "clock_jumps" in traces.counted,
    "kill": _restarted,
    "zombie": _restarted,
    "broker_fail": _restarted,
}
"""Kinds that must be noticed wherever they had an effect, however small it was. A frame that is a little late, or a slow
answer, is no fault of the data until it lasts: what those leave when they do is in `detection`."""


def unnoticed(result: Result) -> list[str]:
    """Faults that had an effect, and of which the pipeline said nothing."""
    found = []
    for span in isolated(result):
        hits = tuple(entry for entry in result.ledger if entry.fault == span.number and entry.stream in SUBSCRIBED)
        rule = NOTICED.get(span.kind)
        if rule is None or (span.number >= 0 and not hits):
            continue
        if not rule(_traces(result, span, hits)):
            found.append(f"{span.kind} at {span.begin_sec:.1f} s had an effect and was not noticed")
    return found


def _traces(result: Result, span: Span, hits: tuple[Any, ...]) -> Traces:
    def within(outputs: list[Output]) -> list[dict[str, Any]]:
        until = span.end_sec + CALM_SEC
        return [each.record for each in outputs if span.begin_sec <= each.at_sec <= until]

    events = set()
    for event in within(result.events):
        meta = msgspec.json.decode(event["meta_json"])
        events.add(event["event_type"])
        events |= {f"{event['event_type']}/{meta[name]}" for name in ("reason", "why") if name in meta}
    statuses = [life.last_status for life in result.lives]
    errors = {name for status in statuses for name, count in status["rest"]["by_status"].items() if count}
    marks = {"clock_jumps"} if any(status["clock_jumps"] for status in statuses) else set()
    if any("refused" in reason for status in statuses for reason in _ends(status)):
        marks.add("refused")
    return Traces(
        frozenset(events),
        frozenset(reject["reason"] for reject in within(result.rejects)),
        frozenset(name for name, count in result.totals.items() if count) | marks,
        hits,
        frozenset(errors - {"200"}),
    )


def _ends(status: dict[str, Any]) -> list[str]:
    """Why a recorder's connections ended, or did not come about."""
    return [reason for line in status["connections"].values() for reason in (*line["reconnects"], *line["renewals"])]
