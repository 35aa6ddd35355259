"""Faults of the simulated exchange: what goes wrong, when, and an exact ledger of what was done to which ids.

Pure: the time is given, in milliseconds since the exchange opened, and chance is a generator seeded from the plan. The
same plan and the same frames give the same deliveries, however time is cut into calls. The market itself knows nothing
of faults: REST has the truth, so that what was lost on a stream can be fetched.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from heapq import heappop, heappush
from random import Random
from typing import Any, Final, Literal, NamedTuple, TypeAlias

import msgspec

from orderflow.errors import ConfigError
from orderflow.venues.binance.sim import damage
from orderflow.venues.binance.sim.source import Frame
from orderflow.venues.binance.streams import Route, StreamName, parse_stream

Shape: TypeAlias = Literal["frame", "window", "moment", "either"]
Scope: TypeAlias = Literal["stream", "route", "rest", "clock"]

FAULTS_MOST: Final = 10_000
LEDGER_MOST: Final = 1_000_000
"""Entries that are kept; beyond, only their number."""
HELD_MOST: Final = 500_000
"""Frames that are held back at a time; beyond, they are delivered at once, which is counted."""
OVERSIZE_MOST: Final = 16
"""Frames that one fault blows up."""
UNMET_AFTER_MS: Final = 60_000
"""A fault that waits for its next frame is given up so long after its time."""
_LATEST_MS: Final = 366 * 86_400_000
_STREAMS_KEPT: Final = 10_000


class Kind(NamedTuple):
    """What a kind of fault needs and means."""

    shape: Shape
    """frame: without a duration the next frame that matches, else each one of the time with chance `value`;
    window: needs a duration; moment: takes none; either: both are allowed."""
    scope: Scope
    text: str
    default: float = 1.0
    """Of `value`."""
    least: float = 0.0
    most: float = 1.0
    streams: str = ""
    """The only stream kind that it touches; empty: any."""


_HOUR_MS: Final = 3_600_000.0

KINDS: Final[dict[str, Kind]] = {
    "drop": Kind("frame", "stream", "frames are lost although the socket lives; value: chance"),
    "duplicate": Kind("frame", "stream", "frames come twice; value: chance"),
    "reorder": Kind("frame", "stream", "frames come up to value ms late, in any order", 300, 1, 60_000),
    "truncate": Kind("frame", "stream", "frames are cut short; value: chance"),
    "garbage": Kind("frame", "stream", "frames are replaced by what is none; value: chance"),
    "oversize": Kind("frame", "stream", "frames are blown up beyond 8 MiB; value: chance"),
    "unknown_enum": Kind("frame", "stream", "frames have a new enum value and a new field; value: chance"),
    "zero_price_trade": Kind(
        "frame", "stream", "after a trade its id comes again with X=NA, price and quantity 0", streams="aggTrade"
    ),
    "insurance_trade": Kind(
        "frame", "stream", "after a trade its id comes again with X=INSURANCE_FUND", streams="aggTrade"
    ),
    "crossed_book": Kind(
        "frame", "stream", "a diff has a bid at an ask's price; the stream's next diff takes it back", streams="depth"
    ),
    "diff_gap": Kind("moment", "stream", "the next value diffs of each symbol are lost", 3, 1, 10_000, "depth"),
    "stall_route": Kind("window", "stream", "frames are held back until the end, then come at once"),
    "skew": Kind("window", "stream", "frames come value ms late, in order", 1_000, 1, 60_000),
    "silent_stream": Kind(
        "window", "stream", "subscribed streams say nothing; value 1: until they are subscribed anew", 0
    ),
    "half_open": Kind("either", "route", "nothing arrives any more, pings stay unanswered, TCP stays open"),
    "close_1006": Kind("moment", "route", "connections are cut without a closing frame"),
    "close_1008": Kind("moment", "route", "connections are closed with 1008"),
    "life_cut": Kind("moment", "route", "connections have reached their 24 hours"),
    "server_ping": Kind(
        "moment", "route", "the server pings, and drops who does not answer within value ms", 5_000, 1, 600_000
    ),
    "mute_pongs": Kind("window", "route", "clients' pings stay unanswered while data flows"),
    "refuse_connect": Kind(
        "window", "route", "no new connection: the handshake gets HTTP status value; 0: TCP is reset", 503, 0, 599
    ),
    "stale_snapshot": Kind(
        "window", "rest", "depth answers with the book of value ms before the fault", 2_000, 0, 600_000
    ),
    "slow_snapshot": Kind("window", "rest", "depth answers value ms late", 2_000, 1, 600_000),
    "rest_418": Kind("window", "rest", "the address is banned until the end"),
    "rest_429": Kind("window", "rest", "too many requests, Retry-After tells the end"),
    "rest_451": Kind("window", "rest", "the region is blocked"),
    "rest_503": Kind("window", "rest", "the exchange fails; value chooses the text, 0 to 3", 0, 0, 3),
    "rest_timeout": Kind("window", "rest", "no answer until the end, then the connection is cut"),
    "clock_jump": Kind("window", "clock", "E and serverTime are value ms off", 5_000, -_HOUR_MS, _HOUR_MS),
    "local_clock_jump": Kind(
        "window", "clock", "the client's own clock is value ms off; in simulated time only", 1_000, -_HOUR_MS, _HOUR_MS
    ),
}

DRAWN_KINDS: Final = tuple(kind for kind in KINDS if kind != "local_clock_jump")
"""What a plan is drawn from unless kinds are given: everything that a server can do."""


class Fault(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """One thing that goes wrong. Times are ms since the exchange opened; an empty filter lets everything through."""

    kind: str
    at_ms: int
    duration_ms: int = 0
    route: str = ""
    """public or market."""
    symbol: str = ""
    stream: str = ""
    """A stream's kind (`depth`), its form (`depth@100ms`) or its whole name; for REST the endpoint (`depth`)."""
    value: float | None = None
    """What it means, and its default: see `KINDS`."""

    def __post_init__(self) -> None:
        if problem := _problem(self):
            raise ValueError(problem)

    @property
    def amount(self) -> float:
        """`value`, or the kind's default."""
        return KINDS[self.kind].default if self.value is None else self.value

    @property
    def end_ms(self) -> int:
        return self.at_ms + self.duration_ms

    def text(self) -> str:
        """`kind@12500ms+3s:route=public,symbol=BTCUSDT`, which `parse_faults` reads."""
        more = {"route": self.route, "symbol": self.symbol, "stream": self.stream}
        filters = [f"{name}={value}" for name, value in more.items() if value]
        if self.value is not None:
            filters.append(f"value={self.value:.15g}")
        length = f"+{_duration_text(self.duration_ms)}" if self.duration_ms else ""
        return f"{self.kind}@{_duration_text(self.at_ms)}{length}" + (":" + ",".join(filters) if filters else "")


def _problem(fault: Fault) -> str | None:
    kind = KINDS.get(fault.kind)
    if kind is None:
        return f"fault kind {fault.kind!r} is not known: it must be one of {', '.join(KINDS)}"
    if not (0 <= fault.at_ms <= _LATEST_MS and 0 <= fault.duration_ms <= _LATEST_MS):
        return f"{fault.kind} is at {fault.at_ms} ms for {fault.duration_ms} ms: both must be from 0 to {_LATEST_MS}"
    if kind.shape == "window" and not fault.duration_ms:
        return f"{fault.kind} has no duration: give one, as in {fault.kind}@10s+3s"
    if kind.shape == "moment" and fault.duration_ms:
        return f"{fault.kind} has a duration of {fault.duration_ms} ms: it happens at a moment; leave it out"
    if fault.route not in ("", "public", "market"):
        return f"route of {fault.kind} is {fault.route!r}: it must be public or market, or left out"
    if fault.route and kind.scope in ("rest", "clock"):
        return f"{fault.kind} has the route {fault.route!r}: it concerns no socket; leave it out"
    if (fault.symbol or fault.stream) and kind.scope in ("route", "clock"):
        return f"{fault.kind} is limited to {fault.symbol or fault.stream!r}: it concerns whole routes; leave it out"
    if fault.value is not None and not kind.least <= fault.value <= kind.most:
        return (
            f"value of {fault.kind} is {fault.value:g}: it must be from {kind.least:g} to {kind.most:g} ({kind.text})"
        )
    return None


class FaultPlan(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Faults, and the seed of what they leave to chance."""

    seed: int = 1
    faults: tuple[Fault, ...] = ()

    def __post_init__(self) -> None:
        if len(self.faults) > FAULTS_MOST:
            raise ValueError(f"{len(self.faults)} faults are too many: at most {FAULTS_MOST} are kept")

    @classmethod
    def draw(
        cls,
        seed: int,
        duration_ms: int,
        symbols: Sequence[str],
        *,
        kinds: Sequence[str] = DRAWN_KINDS,
        mean_gap_ms: float = 20_000.0,
        quiet_end_ms: int = 60_000,
    ) -> FaultPlan:
        """A plan by chance: faults begin `mean_gap_ms` apart on average and end `quiet_end_ms` before the end.

        Raises
        ------
        ConfigError
            A kind is not known, there are no symbols or kinds, or the mean gap is not above 0.
        """
        unknown = [kind for kind in kinds if kind not in KINDS]
        if unknown or not kinds:
            raise ConfigError(f"fault kinds are {', '.join(kinds) or 'none'}: choose among {', '.join(KINDS)}")
        if not symbols or not mean_gap_ms > 0.0:
            raise ConfigError(f"{len(symbols)} symbols, mean gap {mean_gap_ms} ms: both must be above 0")
        chance = Random(f"plan/{seed}")
        end_ms = duration_ms - quiet_end_ms
        faults: list[Fault] = []
        at_ms = chance.expovariate(1.0 / mean_gap_ms)
        while at_ms < end_ms - 1 and len(faults) < FAULTS_MOST:
            faults.append(_drawn(chance, chance.choice(kinds), int(at_ms), end_ms, symbols))
            at_ms += chance.expovariate(1.0 / mean_gap_ms)
        return cls(seed, tuple(faults))

    def to_json(self) -> bytes:
        return msgspec.json.encode(self)

    @classmethod
    def from_json(cls, text: bytes | str, seed: int = 1) -> FaultPlan:
        """`{"seed": 7, "faults": [...]}`, or a list of faults alone, which takes `seed`.

        Raises
        ------
        ConfigError
            It is no plan; says where and why.
        """
        try:
            given = msgspec.json.decode(text)
            return msgspec.convert({"seed": seed, "faults": given} if isinstance(given, list) else given, cls)
        except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError) as error:
            raise ConfigError(
                f"the faults are no plan: {error}; a list of faults is expected, such as "
                '[{"kind": "drop", "at_ms": 5000, "symbol": "BTCUSDT"}]'
            ) from error

    def lines(self) -> list[str]:
        """A line a fault, which `parse_faults` reads."""
        return [fault.text() for fault in self.faults]


_TIME: Final = r"(\d{1,12}(?:\.\d{1,9})?)(ms|s|m|h)"
_FAULT: Final = re.compile(rf"(\w+)@{_TIME}(?:\+{_TIME})?(?::(.*))?", re.ASCII | re.DOTALL)
_UNIT_MS: Final = {"ms": 1, "s": 1_000, "m": 60_000, "h": 3_600_000}
_FILTERS: Final = ("route", "symbol", "stream", "value")


def parse_faults(text: str) -> tuple[Fault, ...]:
    """Faults in their text form, separated by `;` or newlines; `#` begins a comment. Raises `ConfigError`."""
    parts = [part.strip() for line in text.splitlines() for part in line.partition("#")[0].split(";")]
    return tuple(_parse_fault(part) for part in parts if part)


def read_plan(text: str, seed: int = 1) -> FaultPlan:
    """A plan from JSON or from the text form, whichever it is. Raises `ConfigError`."""
    if text.lstrip()[:1] in ("{", "["):
        return FaultPlan.from_json(text, seed)
    faults = parse_faults(text)
    if len(faults) > FAULTS_MOST:
        raise ConfigError(f"{len(faults)} faults are too many: at most {FAULTS_MOST} are kept")
    return FaultPlan(seed, faults)


def _parse_fault(text: str) -> Fault:
    found = _FAULT.fullmatch(text)
    if found is None:
        raise ConfigError(
            f"fault {text!r} is not understood: write kind@time, as in drop@12.5s+3s:symbol=BTCUSDT,value=0.5 "
            "(times in ms, s, m or h)"
        )
    kind, at, at_unit, length, length_unit, more = found.groups()
    given: dict[str, Any] = {"kind": kind, "at_ms": round(float(at) * _UNIT_MS[at_unit])}
    if length is not None:
        given["duration_ms"] = round(float(length) * _UNIT_MS[length_unit])
    for pair in (more or "").split(",") if more else ():
        name, equals, value = pair.partition("=")
        if name.strip() not in _FILTERS or not equals or not value.strip():
            raise ConfigError(f"{pair!r} of fault {text!r} is not understood: {', '.join(_FILTERS)}=... are expected")
        given[name.strip()] = value.strip()
    try:
        return msgspec.convert(given, Fault, strict=False)
    except msgspec.ValidationError as error:
        raise ConfigError(f"fault {text!r}: {error}") from error


# Plans by chance

_DRAWN_MS: Final[dict[str, tuple[int, int]]] = {
    "stall_route": (1_000, 20_000),
    "skew": (2_000, 20_000),
    "silent_stream": (5_000, 90_000),
    "mute_pongs": (20_000, 90_000),
    "refuse_connect": (1_000, 20_000),
    "stale_snapshot": (2_000, 20_000),
    "slow_snapshot": (2_000, 20_000),
    "rest_418": (5_000, 60_000),
    "rest_429": (1_000, 60_000),
    "rest_timeout": (2_000, 20_000),
    "clock_jump": (2_000, 20_000),
}
"""From, to; of the kinds that are not named, half a second to five."""
_DRAWN_VALUES: Final[dict[str, tuple[int, int]]] = {
    "reorder": (5, 2_000),
    "skew": (50, 5_000),
    "diff_gap": (1, 20),
    "silent_stream": (0, 1),
    "server_ping": (2_000, 10_000),
    "stale_snapshot": (500, 20_000),
    "slow_snapshot": (100, 8_000),
    "rest_503": (0, 3),
    "clock_jump": (-10_000, 10_000),
    "local_clock_jump": (-10_000, 10_000),
}
_DRAWN_STREAMS: Final = ("aggTrade", "bookTicker", "depth")
_DRAWN_STATUSES: Final = (0, 502, 503)


def _drawn(chance: Random, kind: str, at_ms: int, end_ms: int, symbols: Sequence[str]) -> Fault:
    spec = KINDS[kind]
    least, most = _DRAWN_MS.get(kind, (500, 5_000))
    duration_ms = min(chance.randint(least, most), end_ms - at_ms)
    single = spec.shape in ("moment", "either") or (
        spec.shape == "frame" and (kind == "oversize" or chance.random() < 0.5)
    )
    value: float | None = None
    if kind in _DRAWN_VALUES:
        value = chance.randint(*_DRAWN_VALUES[kind])
    elif kind == "refuse_connect":
        value = chance.choice(_DRAWN_STATUSES)
    elif spec.shape == "frame" and not single:
        value = round(chance.uniform(0.02, 0.6), 3)
    route = symbol = stream = ""
    if spec.scope == "route" or kind in ("stall_route", "skew"):
        route = chance.choice(("", "public", "market"))
    elif spec.scope == "stream":
        symbol = chance.choice(symbols) if single or chance.random() < 0.7 else ""
        stream = chance.choice(_DRAWN_STREAMS) if not spec.streams and chance.random() < 0.7 else ""
    if kind == "silent_stream" and not stream:
        stream = chance.choice(_DRAWN_STREAMS)
    return Fault(kind, at_ms, 0 if single else duration_ms, route, symbol, stream, value)


# The engine


class LedgerEntry(NamedTuple):
    """What a fault did to one frame, connection or request."""

    fault: int
    """Index in the engine's plan."""
    kind: str
    effect: str
    """Frames: lost, spoilt (delivered, but unusable), altered (delivered, changed, its ids true), doubled, delayed,
    added. Connections: closed, deaf, pinged, muted, refused. Requests: answered (by the fault) or delayed."""
    at_ms: int
    """When the exchange sent the frame, or the fault acted."""
    due_ms: int
    """When a delayed frame is delivered by this fault's doing; at_ms for other effects."""
    route: str
    symbol: str
    stream: str
    """The form (`depth@100ms`); for REST the endpoint."""
    first_id: int | None
    """aggTrade a..a, depth U..u, bookTicker u..u; None where there are no ids."""
    last_id: int | None


class SocketOrder(NamedTuple):
    """What to do now, once, with the connections of a route that are open now."""

    fault: int
    kind: str
    """half_open, close_1006, close_1008, life_cut or server_ping."""
    at_ms: int
    route: str
    """Empty: both."""
    value: float


class RestFault(NamedTuple):
    """What to do with a request."""

    kind: str
    value: float
    end_ms: int
    """When the fault ends."""
    body: bytes = b""
    """stale_snapshot: the book that was kept."""


class _State:
    """One fault's course."""

    def __init__(self, index: int, fault: Fault, seed: int) -> None:
        self.index = index
        self.fault = fault
        self.kind = KINDS[fault.kind]
        self.chance = Random(f"fault/{seed}/{index}")
        self.amount = fault.amount
        self.done = False
        self.hits = 0
        self.per_symbol: dict[str | None, int] = {}
        self.undo: dict[str, str] = {}
        """crossed_book: stream -> the price of the bid to be taken back."""
        self.healed: set[str] = set()
        self.floor_ms = 0
        """Matching frames come no earlier: what was held back keeps its place in the order."""
        self.last_ms = fault.end_ms if fault.duration_ms else fault.at_ms + UNMET_AFTER_MS
        self._matches: dict[tuple[Route, str], bool] = {}

    def matches(self, route: Route, stream: str, name: StreamName) -> bool:
        known = self._matches.get((route, stream))
        if known is None:
            fault = self.fault
            known = (
                fault.route in ("", route)
                and fault.symbol in ("", name.symbol)
                and fault.stream in ("", name.kind, name.stream, stream)
                and self.kind.streams in ("", name.kind)
            )
            if len(self._matches) < _STREAMS_KEPT:
                self._matches[route, stream] = known
        return known

    def over(self, at_ms: int) -> bool:
        return (self.done or at_ms >= self.last_ms) and at_ms >= self.floor_ms and not self.undo

    def running(self, at_ms: int) -> bool:
        """Within its time; what is left of it afterwards only puts things in order."""
        return not self.done and at_ms < self.last_ms

    def hit(self) -> bool:
        """Whether this frame is one that it takes."""
        if not self.fault.duration_ms:
            self.done = True
        elif self.amount < 1.0 and self.chance.random() >= self.amount:
            return False
        self.hits += 1
        return True


class _Passing:
    """A frame on its way through the active faults."""

    __slots__ = ("_ids", "at_ms", "due_ms", "frame", "name", "payloads", "spoilt")

    def __init__(self, frame: Frame, name: StreamName, at_ms: int) -> None:
        self.frame = frame
        self.name = name
        self.at_ms = at_ms
        self.due_ms = at_ms
        self.payloads = [frame.payload]
        self.spoilt = False
        self._ids: tuple[int | None, int | None] | None = None

    @property
    def ids(self) -> tuple[int | None, int | None]:
        """Those that the exchange gave it."""
        if self._ids is None:
            self._ids = damage.ids_of(self.name.kind, self.frame.payload)
        return self._ids


_STAGES: Final = {
    **dict.fromkeys(("drop", "diff_gap", "silent_stream"), 0),
    **dict.fromkeys(("clock_jump", "unknown_enum", "crossed_book"), 1),
    **dict.fromkeys(("truncate", "garbage", "oversize"), 2),
    **dict.fromkeys(("duplicate", "zero_price_trade", "insurance_trade"), 3),
    **dict.fromkeys(("reorder", "skew", "stall_route"), 4),
}
"""Of the kinds that touch frames: a frame is first lost, then changed, spoilt, multiplied, delayed."""
_ORDERS: Final = {
    "half_open": "deaf",
    "close_1006": "closed",
    "close_1008": "closed",
    "life_cut": "closed",
    "server_ping": "pinged",
}
_DEPTH_ONLY: Final = frozenset({"stale_snapshot", "slow_snapshot"})


class FaultEngine:
    """Applies a plan. Every call takes the time; time never goes back (an earlier time counts as the latest)."""

    def __init__(self, plan: FaultPlan | None = None) -> None:
        self._seed = 1 if plan is None else plan.seed
        self._states: list[_State] = []
        self._now_ms = 0
        self._frame_ms = 0
        self._coming: list[tuple[int, int]] = []
        """Heap of (start, fault) of what touches frames."""
        self._active: list[_State] = []
        """Of these those that have begun and are not over, by stage."""
        self._last_ms = 0
        """When the first of them has had its time."""
        self._orders: list[tuple[int, int]] = []
        self._keeps: list[tuple[int, int]] = []
        self._windows: list[_State] = []
        """What concerns connections, requests and clocks, until it is over."""
        self._window_ends_ms = _LATEST_MS * 2
        """When the first of them is over."""
        self._books: dict[int, dict[str, bytes]] = {}
        self._held: list[tuple[int, int, Frame]] = []
        """Heap of (due, order of sending, frame)."""
        self._number = 0
        self._names: dict[str, StreamName] = {}
        self._ledger: list[LedgerEntry] = []
        self._counts: dict[str, dict[str, int]] = {}
        self._unrecorded = 0
        self._not_held = 0
        self._unmet: list[str] = []
        for fault in () if plan is None else plan.faults:
            self._schedule(fault)

    @property
    def plan(self) -> FaultPlan:
        """With what was added, in the order of their indices."""
        return FaultPlan(self._seed, tuple(state.fault for state in self._states))

    @property
    def idle(self) -> bool:
        """Nothing is held, and no fault is active or to come: everything may pass by the engine."""
        return not (self._held or self._active or self._coming or self._orders or self._keeps or self._windows)

    def add(self, now_ms: int, faults: Iterable[Fault]) -> None:
        """Add faults whose times are relative to now, all or none.

        Raises
        ------
        ConfigError
            They are more than `FAULTS_MOST` in all, or too far ahead.
        """
        now_ms = self._advance(now_ms)
        try:
            given = [msgspec.structs.replace(fault, at_ms=fault.at_ms + now_ms) for fault in faults]
        except ValueError as error:
            raise ConfigError(f"at {now_ms} ms: {error}") from error
        if len(self._states) + len(given) > FAULTS_MOST:
            raise ConfigError(f"{len(self._states) + len(given)} faults are too many: at most {FAULTS_MOST} are kept")
        for fault in given:
            self._schedule(fault)

    def _schedule(self, fault: Fault) -> None:
        state = _State(len(self._states), fault, self._seed)
        self._states.append(state)
        if fault.kind in _STAGES:
            heappush(self._coming, (fault.at_ms, state.index))
        if fault.kind in _ORDERS:
            heappush(self._orders, (fault.at_ms, state.index))
        if fault.kind == "stale_snapshot":
            heappush(self._keeps, (max(self._now_ms, fault.at_ms - int(state.amount)), state.index))
        if fault.duration_ms and state.kind.scope != "stream":
            self._windows.append(state)
            self._window_ends_ms = min(self._window_ends_ms, fault.end_ms)

    def _advance(self, now_ms: int) -> int:
        self._now_ms = max(self._now_ms, now_ms)
        if self._now_ms >= self._window_ends_ms:
            self._windows = [state for state in self._windows if self._now_ms < state.fault.end_ms]
            self._window_ends_ms = min((state.fault.end_ms for state in self._windows), default=_LATEST_MS * 2)
            for index in [index for index in self._books if self._states[index].fault.end_ms <= self._now_ms]:
                del self._books[index]
        return self._now_ms

    # Frames

    def frames(self, now_ms: int, frames: Iterable[Frame]) -> list[Frame]:
        """Take frames that the exchange has sent by now (at their `at_ms`, else now); give what arrives by now.

        A frame that nothing delays arrives when it is sent. What arrives at one time keeps the order of sending.
        """
        now_ms = self._advance(now_ms)
        coming, held = self._coming, self._held
        if not (held or self._active) and (not coming or coming[0][0] > now_ms):
            return list(frames)
        out: list[Frame] = []
        for frame in frames:
            at_ms = min(now_ms, max(frame.at_ms if frame.at_ms >= 0 else now_ms, self._frame_ms))
            self._frame_ms = at_ms
            if held and held[0][0] <= at_ms:
                self._release(at_ms, out)
            if coming and coming[0][0] <= at_ms:
                self._begin(at_ms)
            if self._active:
                self._pass(frame, at_ms, out)
            else:
                out.append(frame)
        self._release(now_ms, out)
        self._begin(now_ms)
        self._end(now_ms)
        return out

    def flush(self) -> list[Frame]:
        """Everything that is still held, in order of its time: the market is over."""
        out: list[Frame] = []
        self._release(_LATEST_MS * 2, out)
        return out

    def next_due_ms(self) -> int | None:
        """When a held frame, a socket order or a book to keep falls due, if anything does."""
        heaps: tuple[Sequence[tuple[Any, ...]], ...] = (self._held, self._orders, self._keeps)
        return min((heap[0][0] for heap in heaps if heap), default=None)

    def _release(self, at_ms: int, out: list[Frame]) -> None:
        held = self._held
        while held and held[0][0] <= at_ms:
            out.append(heappop(held)[2])

    def _begin(self, at_ms: int) -> None:
        coming = self._coming
        begun = bool(coming) and coming[0][0] <= at_ms
        while coming and coming[0][0] <= at_ms:
            self._active.append(self._states[heappop(coming)[1]])
        if begun:
            self._active.sort(key=lambda state: (_STAGES[state.fault.kind], state.index))
            self._last_ms = min(state.last_ms for state in self._active)

    def _end(self, at_ms: int) -> None:
        """Forget what is over."""
        over = [state for state in self._active if state.over(at_ms)]
        if over:
            self._active = [state for state in self._active if not state.over(at_ms)]
            self._last_ms = min((state.last_ms for state in self._active), default=0)
            self._unmet += [state.fault.text() for state in over if not state.hits]

    def _pass(self, frame: Frame, at_ms: int, out: list[Frame]) -> None:
        name = self._names.get(frame.stream)
        if name is None:
            if len(self._names) >= _STREAMS_KEPT:
                self._names.clear()
            name = self._names[frame.stream] = parse_stream(frame.stream)
        passing: _Passing | None = None
        for state in self._active:
            if state.matches(frame.route, frame.stream, name):
                if passing is None:
                    passing = _Passing(frame, name, at_ms)
                _EFFECTS[state.fault.kind](self, state, passing)
                if not passing.payloads:
                    break
        if at_ms >= self._last_ms or any(state.done for state in self._active):
            self._end(at_ms)
        if passing is None:
            out.append(frame)
        else:
            self._deliver(passing, out)

    def _deliver(self, passing: _Passing, out: list[Frame]) -> None:
        late = passing.due_ms > passing.at_ms
        for payload in passing.payloads:
            frame = passing.frame if payload is passing.frame.payload else passing.frame._replace(payload=payload)
            if late and len(self._held) < HELD_MOST:
                self._number += 1
                heappush(self._held, (passing.due_ms, self._number, frame))
            else:
                self._not_held += late
                out.append(frame)

    def _note(self, state: _State, effect: str, passing: _Passing, due_ms: int | None = None) -> None:
        frame, name = passing.frame, passing.name
        due_ms = passing.at_ms if due_ms is None else due_ms
        self._enter(state, effect, passing.at_ms, due_ms, (frame.route, name.symbol or "", name.stream), passing.ids)

    def _enter(
        self,
        state: _State,
        effect: str,
        at_ms: int,
        due_ms: int,
        where: tuple[str, str, str],
        ids: tuple[int | None, int | None] = (None, None),
    ) -> None:
        kind = state.fault.kind
        counts = self._counts.setdefault(kind, {})
        counts[effect] = counts.get(effect, 0) + 1
        if len(self._ledger) >= LEDGER_MOST:
            self._unrecorded += 1
            return
        self._ledger.append(LedgerEntry(state.index, kind, effect, at_ms, due_ms, *where, *ids))

    def _lose(self, state: _State, passing: _Passing) -> None:
        if state.running(passing.at_ms) and state.hit():
            passing.payloads.clear()
            self._note(state, "lost", passing)

    def _gap(self, state: _State, passing: _Passing) -> None:
        symbol = passing.name.symbol
        lost = state.per_symbol.get(symbol, 0)
        if not state.running(passing.at_ms) or lost >= state.amount:
            return
        state.per_symbol[symbol] = lost + 1
        state.hits += 1
        state.done = bool(state.fault.symbol) and lost + 1 >= state.amount
        passing.payloads.clear()
        self._note(state, "lost", passing)

    def _silence(self, state: _State, passing: _Passing) -> None:
        if state.running(passing.at_ms) and passing.frame.stream not in state.healed:
            state.hits += 1
            passing.payloads.clear()
            self._note(state, "lost", passing)

    def _shift(self, state: _State, passing: _Passing) -> None:
        if state.running(passing.at_ms):
            state.hits += 1
            passing.payloads = [damage.shifted(payload, int(state.amount)) for payload in passing.payloads]
            self._note(state, "altered", passing)

    def _rename(self, state: _State, passing: _Passing) -> None:
        if state.running(passing.at_ms) and state.hit():
            passing.payloads = [damage.unknown_enum(payload) for payload in passing.payloads]
            self._note(state, "altered", passing)

    def _cross(self, state: _State, passing: _Passing) -> None:
        stream = passing.frame.stream
        undo = state.undo.pop(stream, None)
        if undo is not None:
            passing.payloads = [damage.with_bid(payload, undo, "0") for payload in passing.payloads]
            self._note(state, "altered", passing)
            return
        price = damage.crossing_price(passing.payloads[0]) if state.running(passing.at_ms) else None
        if price is not None and state.hit():
            state.undo[stream] = price
            passing.payloads = [damage.with_bid(payload, price, "1") for payload in passing.payloads]
            self._note(state, "altered", passing)

    def _spoil(self, state: _State, passing: _Passing) -> None:
        kind = state.fault.kind
        full = kind == "oversize" and state.hits >= OVERSIZE_MOST
        if passing.spoilt or full or not state.running(passing.at_ms) or not state.hit():
            return
        passing.spoilt = True
        payload = passing.payloads[0]
        if kind == "truncate":
            passing.payloads = [damage.truncated(payload, state.chance)]
        elif kind == "garbage":
            passing.payloads = [damage.garbage(payload, state.chance)]
        else:
            passing.payloads = [damage.oversize(payload)]
        self._note(state, "spoilt", passing)

    def _double(self, state: _State, passing: _Passing) -> None:
        if state.running(passing.at_ms) and state.hit():
            passing.payloads.insert(1, passing.payloads[0])
            self._note(state, "doubled", passing)

    def _add_trade(self, state: _State, passing: _Passing) -> None:
        if passing.spoilt or not state.running(passing.at_ms) or not state.hit():
            return
        made = damage.spent_id if state.fault.kind == "zero_price_trade" else damage.insurance
        # Behind the trade whose id it takes: before it, the id would count as spent, and the trade as repeated.
        passing.payloads.append(made(passing.payloads[0]))
        self._note(state, "added", passing)

    def _delay(self, state: _State, passing: _Passing) -> None:
        at_ms = passing.due_ms
        if state.running(passing.at_ms):
            if state.fault.kind == "reorder":
                if not state.fault.duration_ms:
                    state.done = True
                    passing.due_ms += int(state.amount)
                else:
                    passing.due_ms += state.chance.randint(0, int(state.amount))
            elif state.fault.kind == "skew":
                passing.due_ms += int(state.amount)
            else:
                passing.due_ms = max(at_ms, state.fault.end_ms)
            state.hits += 1
        if state.fault.kind != "reorder":
            passing.due_ms = state.floor_ms = max(passing.due_ms, state.floor_ms)
        if passing.due_ms > at_ms:
            self._note(state, "delayed", passing, passing.due_ms)

    # Connections

    def sockets(self, now_ms: int) -> list[SocketOrder]:
        """Orders that have fallen due since the last call."""
        now_ms = self._advance(now_ms)
        due: list[SocketOrder] = []
        while self._orders and self._orders[0][0] <= now_ms:
            at_ms, index = heappop(self._orders)
            state = self._states[index]
            due.append(SocketOrder(index, state.fault.kind, at_ms, state.fault.route, state.amount))
        return due

    def acted(self, now_ms: int, order: SocketOrder, route: Route, connections: int) -> None:
        """An order was carried out on so many connections of a route: an entry of the ledger for each."""
        now_ms = self._advance(now_ms)
        for _ in range(connections):
            self._enter(self._states[order.fault], _ORDERS[order.kind], now_ms, now_ms, (route, "", ""))

    def refusal(self, now_ms: int, route: Route) -> int | None:
        """None: a new connection is accepted; 0: reset it; else the HTTP status of the handshake's answer."""
        state = self._window("refuse_connect", now_ms, route, "refused")
        return None if state is None else int(state.amount)

    def deaf(self, now_ms: int, route: Route) -> bool:
        """Whether a connection opened now is half open from its first moment on (half_open with a duration)."""
        return self._window("half_open", now_ms, route, "deaf") is not None

    def mutes_pong(self, now_ms: int, route: Route) -> bool:
        """Whether a ping that a client sent now stays unanswered."""
        return self._window("mute_pongs", now_ms, route, "muted") is not None

    def subscribed(self, now_ms: int, route: Route, streams: Iterable[str]) -> None:
        """A client has subscribed streams (whole names): ends a silent_stream of value 1."""
        now_ms = self._advance(now_ms)
        self._begin(now_ms)
        silent = [state for state in self._active if state.fault.kind == "silent_stream" and state.amount == 1.0]
        for stream in streams if silent else ():
            name = parse_stream(stream)
            for state in silent:
                if state.running(now_ms) and state.matches(route, stream, name):
                    state.healed.add(stream)

    def _window(self, kind: str, now_ms: int, route: Route, effect: str) -> _State | None:
        """The first fault of a kind that is on for a route now; that it acts goes into the ledger."""
        if not self._windows:
            return None
        now_ms = self._advance(now_ms)
        for state in self._windows:
            fault = state.fault
            if fault.kind == kind and fault.at_ms <= now_ms and fault.route in ("", route):
                state.hits += 1
                self._enter(state, effect, now_ms, now_ms, (route, "", ""))
                return state
        return None

    # Requests

    def rest(self, now_ms: int, path: str, query: Mapping[str, str]) -> RestFault | None:
        """What to do with a request (`/fapi/v1/depth`): the first fault that matches; None: answer it."""
        if not self._windows:
            return None
        now_ms = self._advance(now_ms)
        endpoint, symbol = path.rpartition("/")[2], query.get("symbol", "")
        for state in self._windows:
            fault = state.fault
            if (
                state.kind.scope != "rest"
                or fault.at_ms > now_ms
                or fault.symbol not in ("", symbol)
                or fault.stream not in ("", endpoint)
                or (fault.kind in _DEPTH_ONLY and endpoint != "depth")
            ):
                continue
            body = self._books.get(state.index, {}).get(symbol, b"")
            if fault.kind == "stale_snapshot" and not body:
                continue
            delays = {"slow_snapshot": now_ms + int(state.amount), "rest_timeout": fault.end_ms}
            due_ms = delays.get(fault.kind, now_ms)
            effect = "delayed" if fault.kind == "slow_snapshot" else "answered"
            self._enter(state, effect, now_ms, due_ms, ("", symbol, endpoint))
            return RestFault(fault.kind, state.amount, fault.end_ms, body)
        return None

    def books_to_keep(self, now_ms: int) -> list[tuple[int, str]]:
        """(fault, symbol or empty for all) whose REST books are to be given to `keep_book` now."""
        now_ms = self._advance(now_ms)
        due: list[tuple[int, str]] = []
        while self._keeps and self._keeps[0][0] <= now_ms:
            index = heappop(self._keeps)[1]
            due.append((index, self._states[index].fault.symbol))
        return due

    def keep_book(self, fault: int, symbol: str, body: bytes) -> None:
        """A symbol's book as REST would give it now, for stale_snapshot to answer with later."""
        self._books.setdefault(fault, {})[symbol] = body

    # Clocks

    def clock_shift_ms(self, now_ms: int) -> int:
        """How far the exchange's clock is off now."""
        return self._shift_ms("clock_jump", now_ms)

    def local_shift_ms(self, now_ms: int) -> int:
        """How far the client's wall clock is off now (local_clock_jump)."""
        return self._shift_ms("local_clock_jump", now_ms)

    def _shift_ms(self, kind: str, now_ms: int) -> int:
        if not self._windows:
            return 0
        now_ms = self._advance(now_ms)
        return sum(
            int(state.amount)
            for state in self._windows
            if state.fault.kind == kind and state.fault.at_ms <= now_ms < state.fault.end_ms
        )

    # What was done

    @property
    def ledger(self) -> Sequence[LedgerEntry]:
        """In the order in which it was done."""
        return self._ledger

    def status(self) -> dict[str, Any]:
        """Counts by kind and effect, ready for JSON."""
        on = [state for state in self._windows if state.fault.at_ms <= self._now_ms] + self._active
        return {
            "seed": self._seed,
            "faults": len(self._states),
            "now_ms": self._now_ms,
            "active": sorted({state.fault.text() for state in on}),
            "counts": {kind: dict(sorted(counts.items())) for kind, counts in sorted(self._counts.items())},
            "unmet": self._unmet,
            "held": len(self._held),
            "not_held": self._not_held,
            "ledger": len(self._ledger),
            "unrecorded": self._unrecorded,
        }


_EFFECTS: Final[dict[str, Callable[[FaultEngine, _State, _Passing], None]]] = {
    "drop": FaultEngine._lose,
    "diff_gap": FaultEngine._gap,
    "silent_stream": FaultEngine._silence,
    "clock_jump": FaultEngine._shift,
    "unknown_enum": FaultEngine._rename,
    "crossed_book": FaultEngine._cross,
    **dict.fromkeys(("truncate", "garbage", "oversize"), FaultEngine._spoil),
    "duplicate": FaultEngine._double,
    **dict.fromkeys(("zero_price_trade", "insurance_trade"), FaultEngine._add_trade),
    **dict.fromkeys(("reorder", "skew", "stall_route"), FaultEngine._delay),
}


def _duration_text(ms: int) -> str:
    return f"{ms // 1_000}s" if ms % 1_000 == 0 else f"{ms}ms"
