"""What each fault must leave when it comes alone and lasts: an event, a figure on `/metrics`, and how soon.

`python -m tests.storm.detection` runs every kind and prints the table that stands in docs/simulator.md.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, Final, NamedTuple

import msgspec
from orderflow.venues.binance.sim.faults import FaultPlan, parse_faults

from tests.storm.plan import MachineFault, StormPlan
from tests.storm.recovery import spans
from tests.storm.run import storm
from tests.storm.world import Options, Result


class Metric(NamedTuple):
    """A sample on `/metrics` that is above a bound after the fault."""

    name: str
    labels: Mapping[str, str] = MappingProxyType({})
    above: float = 0.0

    def __str__(self) -> str:
        labels = ",".join(f'{name}="{value}"' for name, value in self.labels.items())
        return f"{self.name}{{{labels}}}" if labels else self.name


def _ended(reason: str, route: str = "public") -> Metric:
    return Metric("recorder_connections", {"key": route, "detail": f"reconnects/{reason}"})


def _rest(key: str, detail: str) -> Metric:
    return Metric("recorder_rest", {"key": key, "detail": detail})


class Case(NamedTuple):
    """A fault alone, or with the one that makes it show, and what must come of it."""

    script: str | MachineFault
    events: tuple[str, ...]
    """`event_type`, `event_type/reason`, `snapshot_needed/again`, or `reject/reason` for what is in `quality.rejects`."""
    metrics: tuple[Metric, ...]
    recovery: str
    """What brings all well again, in words."""
    detected_sec: float = 3.0
    """From the fault's first effect to the first of the events, at most."""
    recovered_sec: float = 15.0
    """From the end of the last fault until all is well for good, at most."""
    heals: bool = False
    """The recovery ends the fault: its time counts from the fault's beginning."""
    minutes: float = 2.5


_GAP: Final = Metric("gaps_total", {"reason": "pu_mismatch"})
_BACKFILLED: Final = Metric("backfilled_trades_total")
_RECONNECTS: Final = Metric("ws_reconnects_total")
_CHAIN: Final = ("gap/pu_mismatch", "book_synced")
_TRADES: Final = ("backfill_needed", "trades_backfilled")
_CUT: Final = ("reconnect", "route_down", "route_up")
_RESTART: Final = ("gap/restart", "book_synced")
_RESYNC: Final = "snapshot and diffs anew, missing trades fetched"
_ANEW: Final = "connected anew; " + _RESYNC
_REPORT_SEC: Final = 11.0
"""Counts are told every ten seconds."""
_UNANSWERED: Final = ("snapshot_needed/again", "book_synced")


def _hits(stream: str) -> Metric:
    return Metric("dedup_hits_total", {"stream": stream})


def _stale(stream: str) -> Metric:
    return Metric("stale_rows_total", {"stream": stream})


CASES: Final[dict[str, Case]] = {
    "drop": Case("drop@40s+20s:value=0.2", (*_CHAIN, *_TRADES), (_GAP, _BACKFILLED), _RESYNC),
    "duplicate": Case(
        "duplicate@40s+20s:value=0.3",
        ("duplicates",),
        (_hits("aggTrade"), _hits("bookTicker"), _hits("depth")),
        "the second one is dropped",
        _REPORT_SEC,
    ),
    "reorder": Case(
        "reorder@40s+20s:value=400",
        (*_CHAIN, "backfill_needed", "duplicates"),
        (_GAP, Metric("unrowed_frames_total", {"cause": "trade_held"}), _hits("bookTicker")),
        "trades wait for their turn, quotes that are late are dropped, books begin anew",
    ),
    "truncate": Case(
        "truncate@40s+20s:value=0.1",
        ("reject/bad_json", *_CHAIN, *_TRADES),
        (Metric("rejects_total", {"reason": "bad_json"}), _GAP, _BACKFILLED),
        _RESYNC,
    ),
    "garbage": Case(
        "garbage@40s+20s:value=0.1",
        ("reject/bad_json", "reject/missing_stream", *_CHAIN, *_TRADES),
        (Metric("rejects_total"), _GAP, _BACKFILLED),
        _RESYNC,
    ),
    "oversize": Case(
        "oversize@40s:stream=depth", (*_CUT, "gap/disconnected", *_CHAIN), (_RECONNECTS, _ended("closed_1009")), _ANEW
    ),
    "unknown_enum": Case(
        "unknown_enum@40s+20s",
        ("unknown_values",),
        tuple(Metric("unknown_values_total", {"field": f"{name}.st"}) for name in ("aggTrade", "bookTicker", "depth")),
        "none is needed: the rows stand",
        _REPORT_SEC,
    ),
    "zero_price_trade": Case(
        "zero_price_trade@40s+20s",
        ("duplicates",),
        (_hits("aggTrade"),),
        "none is needed: no row comes of it",
        _REPORT_SEC,
    ),
    "insurance_trade": Case(
        "insurance_trade@40s+20s",
        ("duplicates",),
        (_hits("aggTrade"),),
        "none is needed: no row comes of it",
        _REPORT_SEC,
    ),
    "crossed_book": Case(
        "crossed_book@40s:symbol=XRPUSDT",
        ("reject/crossed_book", "gap/crossed_book", "book_synced"),
        (Metric("rejects_total", {"reason": "crossed_book"}), Metric("gaps_total", {"reason": "crossed_book"})),
        "snapshot and diffs anew",
    ),
    "diff_gap": Case("diff_gap@40s:value=4", _CHAIN, (_GAP,), "snapshot and diffs anew"),
    "stall_route": Case(
        "stall_route@40s+12s:route=public",
        ("book_stale/no_diffs", "book_recovered", "stale_rows"),
        (_stale("bookTicker"), _stale("depth")),
        "books are stale until the chain of ids goes on, which proves that nothing was lost",
        _REPORT_SEC,
    ),
    "skew": Case(
        "skew@40s+20s:value=2500",
        ("latency_jump", "stale_rows"),
        (_stale("aggTrade"), _stale("depth")),
        "none is needed: rows are marked stale",
        5.0,
    ),
    "silent_stream": Case(
        "silent_stream@340s+120s:symbol=DOGEUSDT,stream=depth,value=1",
        ("stream_silent/rate", "book_stale/no_diffs", "gap/resubscribed", "stream_resumed", *_CHAIN),
        (Metric("recorder_resubscribed"), Metric("gaps_total", {"reason": "resubscribed"})),
        "subscribed anew; snapshot and diffs anew",
        _REPORT_SEC,
        90.0,
        heals=True,
        minutes=8.0,
    ),
    # Found out by silence or by pings, then connected anew.
    "half_open": Case(
        "half_open@40s",
        ("book_stale/no_diffs", *_CUT, "gap/disconnected", *_CHAIN, *_TRADES),
        (_RECONNECTS, _ended("closed_1011")),
        _ANEW,
        _REPORT_SEC,
        45.0,
    ),
    "close_1006": Case(
        "close_1006@40s", (*_CUT, "gap/disconnected", *_CHAIN, *_TRADES), (_RECONNECTS, _ended("closed_1006")), _ANEW
    ),
    "close_1008": Case(
        "close_1008@40s:route=market", (*_CUT, *_TRADES), (_RECONNECTS, _ended("closed_1008", "market")), _ANEW
    ),
    "life_cut": Case(
        "life_cut@40s", (*_CUT, "gap/disconnected", *_CHAIN, *_TRADES), (_RECONNECTS, _ended("closed_1001")), _ANEW
    ),
    "server_ping": Case("server_ping@40s:value=5000", (), (), "answered: the exchange cuts no connection"),
    "mute_pongs": Case(
        "mute_pongs@40s+60s",
        (*_CUT, "gap/disconnected", *_CHAIN),
        (_RECONNECTS, _ended("closed_1011")),
        _ANEW,
        25.0,
        45.0,
    ),
    # The backoff has grown meanwhile.
    "refuse_connect": Case(
        "refuse_connect@38s+20s;close_1006@40s", (*_CUT, *_CHAIN, *_TRADES), (_ended("refused"),), _ANEW, 3.0, 30.0
    ),
    "stale_snapshot": Case(
        "stale_snapshot@38s+10s:value=8000;diff_gap@40s",
        ("snapshot_needed/snapshot_too_old", "book_synced"),
        (Metric("market_events_total", {"event_type": "snapshot_needed"}, 3.0),),
        "asked again, less and less often, until one is new enough",
    ),
    "slow_snapshot": Case(
        "slow_snapshot@38s+10s:value=4000;diff_gap@40s",
        _UNANSWERED,
        (_rest("slow", "depth"),),
        "diffs are kept until it comes",
    ),
    "rest_418": Case(
        "rest_418@38s+20s;diff_gap@40s", _UNANSWERED, (_rest("by_status", "418"),), "asked again when the ban is over"
    ),
    "rest_429": Case(
        "rest_429@38s+20s;diff_gap@40s", _UNANSWERED, (_rest("by_status", "429"),), "asked again after Retry-After"
    ),
    # The exchange bans who goes on asking; without a time in its answer two minutes are waited.
    "rest_451": Case(
        "rest_451@38s+20s;diff_gap@40s",
        _UNANSWERED,
        (_rest("by_status", "451"),),
        "asked again after two minutes, then four, ...",
        recovered_sec=130.0,
        minutes=4.0,
    ),
    "rest_503": Case(
        "rest_503@38s+20s;diff_gap@40s",
        _UNANSWERED,
        (_rest("by_status", "503"),),
        "asked again, less and less often",
        recovered_sec=40.0,
    ),
    # Requests that were under way hang until their own time is up, and wait longer each time.
    "rest_timeout": Case(
        "rest_timeout@38s+20s;diff_gap@40s",
        _UNANSWERED,
        (_rest("by_status", "connection"), _rest("slow", "depth")),
        "given up after 10 s, asked again",
        recovered_sec=40.0,
    ),
    "clock_jump": Case(
        "clock_jump@40s+4s:value=4000",
        ("latency_jump", "clock_drift", "clock_drift_cleared"),
        (
            Metric("market_events_total", {"event_type": "latency_jump"}),
            Metric("market_events_total", {"event_type": "clock_drift"}),
        ),
        "none is needed: the journal has a clock of its own",
    ),
    "local_clock_jump": Case(
        "local_clock_jump@40s+20s:value=-30000",
        (),
        (Metric("recorder_clock_jumps"),),
        "the journal's clock goes on as before; the exchange's says which of the two is right",
    ),
    "kill": Case(
        MachineFault(kind="kill", at_ms=40_000, duration_ms=1_500),
        (*_RESTART, *_TRADES),
        (Metric("gaps_total", {"reason": "restart"}),),
        "the next recorder goes on with the journal; " + _RESYNC,
    ),
    "zombie": Case(
        MachineFault(kind="zombie", at_ms=40_000, duration_ms=4_000),
        _RESTART,
        (Metric("gaps_total", {"reason": "restart"}),),
        "the older recorder is fenced and ends",
    ),
    "broker_hang": Case(
        MachineFault(kind="broker_hang", at_ms=40_000, duration_ms=25_000),
        (),
        (Metric("recorder_broker_waited_most_sec", above=20.0),),
        "none is needed: everything waits in the queue",
    ),
    "broker_fail": Case(
        MachineFault(kind="broker_fail", at_ms=40_000, duration_ms=2_000),
        (*_RESTART, *_TRADES),
        (Metric("gaps_total", {"reason": "restart"}),),
        "the recorder ends and is started again; " + _RESYNC,
    ),
    "stall": Case(
        MachineFault(kind="stall", at_ms=40_000, duration_ms=8_000),
        ("clock_paused", "stale_rows"),
        (Metric("recorder_late_ticks"), _stale("depth")),
        "none is needed: what lay in the sockets is journalled late",
        _REPORT_SEC,
    ),
}
"""By kind. Some faults show only where another one makes the recorder ask or connect."""


def plan_of(kind: str) -> StormPlan:
    script = CASES[kind].script
    if isinstance(script, MachineFault):
        return StormPlan(exchange=FaultPlan(seed=3), machine=(script,))
    return StormPlan(exchange=FaultPlan(seed=3, faults=parse_faults(script)), machine=())


def scripted(kind: str) -> Options:
    """A few minutes with faults of one kind, and what makes them show."""
    return Options(seed=5, minutes=CASES[kind].minutes, activity=3.0, plan=plan_of(kind))


class Found(NamedTuple):
    """What a fault left."""

    missing: list[str]
    """Events and metrics that must be there and are not."""
    detected_sec: float | None
    """From its first effect to the first event that must come; None where none must."""
    recovered_sec: float
    """From the end of the last fault, or where it heals from its beginning, until all was well for good."""


def found(kind: str, result: Result) -> Found:
    case = CASES[kind]
    begin_sec, _ = _span(result)
    effect_sec = _first_effect_sec(kind, result)
    first: dict[str, float] = {}
    for names, at_sec in _said(result):
        for name in names if at_sec >= begin_sec else ():
            first.setdefault(name, at_sec)
    missing = [name for name in case.events if name not in first]
    missing += [str(each) for each in case.metrics if result.metric(each.name, **each.labels) <= each.above]
    told = [first[name] for name in case.events if name in first]
    return Found(missing, max(0.0, min(told) - effect_sec) if told else None, _well_after_sec(case, result))


def _said(result: Result) -> list[tuple[set[str], float]]:
    """(names by which it may be asked for, when) of every event and reject, in order."""
    said = []
    for event in result.events:
        name, meta = event.record["event_type"], msgspec.json.decode(event.record["meta_json"])
        names = {name} | {f"{name}/{meta[key]}" for key in ("reason", "why") if key in meta}
        if meta.get("asks", 1) > 1:
            names.add(f"{name}/again")
        said.append((names, event.at_sec))
    said += [({f"reject/{reject.record['reason']}"}, reject.at_sec) for reject in result.rejects]
    return sorted(said, key=lambda each: each[1])


def _first_effect_sec(kind: str, result: Result) -> float:
    """When it first did something to what is subscribed; when it was to begin, where that can't be told."""
    for entry in result.ledger:
        if entry.kind == kind and entry.stream in ("", "aggTrade", "bookTicker", "depth@100ms", "depth", "aggTrades"):
            return float(entry.at_ms) / 1000
    plan = result.plan
    faults: Sequence[Any] = plan.machine or [each for each in plan.exchange.faults if each.kind == kind]
    return float(faults[0].at_ms) / 1000


def _span(result: Result) -> tuple[float, float]:
    """When the first fault of the plan begins and the last one ends, seconds."""
    every = spans(result)
    return min(each.begin_sec for each in every), max(each.end_sec for each in every)


def _well_after_sec(case: Case, result: Result) -> float:
    begin_sec, end_sec = _span(result)
    unwell = [sample.at_sec for sample in result.samples if sample.unwell and sample.at_sec > begin_sec]
    return max(0.0, unwell[-1] - (begin_sec if case.heals else end_sec)) if unwell else 0.0


def row(kind: str, left: Found) -> str:
    """A line of the table."""
    case = CASES[kind]
    events = ", ".join(f"`{name}`" for name in case.events) or "-"
    metrics = ", ".join(f"`{each}`" for each in case.metrics) or "-"
    noticed = "-" if left.detected_sec is None else f"{left.detected_sec:.1f}"
    return f"| `{kind}` | {events} | {metrics} | {case.recovery} | {noticed} | {left.recovered_sec:.1f} |"


def main() -> int:
    logging.disable(logging.CRITICAL)
    print("| Fault | Events | Metrics | Recovery | Noticed after s | Well after s |")
    print("|---|---|---|---|---|---|")
    wrong = 0
    for kind in CASES:
        left = found(kind, storm(scripted(kind)))
        print(row(kind, left))
        for name in left.missing:
            wrong += 1
            print(f"{kind}: {name} is missing", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
