"""From the journal to rows: decodes frames, keeps each symbol's book and sequence of trades, refuses what is wrong.

Per symbol and independent of the others: a gap of one symbol resynchronises that symbol alone. Every frame ends as rows,
as a reject, or in a count of `totals`; nothing is dropped without one of them.

Events (`market.events`): gap, reconnect, book_synced, book_stale, book_recovered, quote_mismatch, snapshot_needed,
backfill_needed, trades_backfilled, trades_lost, duplicates, dropped, stale_rows, unused_frames, unknown_values,
stream_silent, stream_resumed, route_down, route_up, latency_jump, clock_drift, clock_drift_cleared, clock_paused.
`trades_lost` raises `gap_count`, and so does a `gap` that is not of trades alone: those are proved by their ids.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Callable, Mapping
from typing import Annotated, Any, ClassVar, Final, Literal, NamedTuple, TypeAlias

import msgspec
from msgspec import Meta, Struct

from orderflow.counts import ProcessCounts
from orderflow.microstructure.book import BookStatus, LocalBook
from orderflow.microstructure.side import SideClassifier, SideConfig
from orderflow.processor import Emit, Record
from orderflow.topics import EVENTS, JOURNAL, REJECTS, ROWS, TICKS
from orderflow.venues.binance.frames import (
    ENVELOPE_PREFIX,
    MARKETS,
    TRADE_KINDS,
    UNDECODABLE,
    AggTrade,
    DepthUpdate,
    Id,
    LiquidationOrder,
    RestAggTrade,
    decode_agg_trade,
    decode_book_ticker,
    decode_depth,
    decode_envelope,
    decode_force_order,
    decode_mark_price,
    decode_rest_agg_trades,
    decode_server_time,
    decode_snapshot,
)
from orderflow.venues.binance.latency import LatencyWatch
from orderflow.venues.binance.oracle import Claim, Quote, QuoteOracle
from orderflow.venues.binance.silence import Span, StreamWatch, span_of
from orderflow.venues.binance.streams import DEPTH_STREAM, KNOWN_KINDS, Route, parse_stream
from orderflow.venues.binance.trades import HeldTrade, TradeSequence

REJECT_REASONS: Final[dict[str, str]] = {
    "bad_json": "not JSON",
    "bad_field": "a field is of another type, or out of range",
    "bad_ids": "a diff whose first update id lies above its last",
    "bad_level": "a level of a book whose price is not finite and positive, or whose quantity is not finite and >= 0",
    "bad_price": "a price that is not finite and positive",
    "bad_qty": "a quantity that is not finite and positive",
    "crossed_book": "after a diff, or in a snapshot, the best bid is not below the best ask",
    "crossed_quote": "a best bid that is not below the best ask",
    "insurance_fund": "a trade of the insurance fund",
    "missing_field": "a field that must be there is missing or null",
    "missing_stream": "JSON that names no stream and answers no request",
    "not_a_trade": "a trade of kind NA: an id that was spent without a fill",
    "symbol_mismatch": "the stream is of another symbol than its data",
    "too_many_symbols": "one more symbol than this partition keeps",
    "ts_ahead": "T lies further ahead of both E and the receive time than the tolerance",
    "ts_regression": "T lies further back within one symbol's stream than the tolerance",
    "type_mismatch": "the stream is of another type than its data",
    "unknown_kind": "a journal record of a kind that this version does not know",
    "unknown_stream": "a stream that the exchange is not known to have",
}
"""Codes of `quality.rejects`, field `reason`."""

GAP_REASONS: Final = (
    "conflated",
    "crossed_book",
    "disconnected",
    "dropped",
    "not_listed",
    "pu_mismatch",
    "quote_ids_went_back",
    "quote_mismatch",
    "restart",
    "resubscribed",
    "trade_ids_went_back",
    "unknown",
    "update_ids_went_back",
)
"""Of gaps: those that are found here, and those of the recorder's own."""
RESYNC_REASONS: Final = (
    "crossed_book",
    "dropped",
    "not_listed",
    "pu_mismatch",
    "quote_mismatch",
    "restart",
    "unknown",
    "update_ids_went_back",
)
MISSING_REASONS: Final = ("conflated", "dropped", "unknown")

_PREFIX_LENGTH: Final = len(ENVELOPE_PREFIX)
_NAME_END: Final = _PREFIX_LENGTH + 128
_NS_PER_MS: Final = 1_000_000
_HUGE: Final = 1e300
_DETAIL_LENGTH: Final = 240
_TALLY_CAUSES: Final = 100
_MOST: Final = 2**63 - 1
_WATCH_NS: Final = 1_000_000_000
"""Streams are looked at once in so much of the tick clock."""
_PAUSE_NS: Final = 5_000_000_000
"""Where ticks pause for longer (a restart, a jump of the clock), the pause says nothing about any stream."""
_LONGEST_ORACLE_PAUSE_MS: Final = 3_600_000
_VERDICT: Final = 3
"""Mismatches in a row that prove a book wrong, where the settings only report them."""
_REGRESSIONS_BEFORE_BELIEF: Final = 100
"""So many frames in a row that lie behind the newest T show that it was T which was wrong."""
_KINDS_REFUSED: Final = {"INSURANCE_FUND": "insurance_fund", "NA": "not_a_trade"}
_FIELD_REASONS: Final[dict[tuple[str, str], str]] = {
    ("aggTrade", "p"): "bad_price",
    ("aggTrade", "q"): "bad_qty",
    ("bookTicker", "b"): "bad_price",
    ("bookTicker", "a"): "bad_price",
    ("bookTicker", "B"): "bad_qty",
    ("bookTicker", "A"): "bad_qty",
}
_DUPLICATES: Final = {"diff_duplicate": "depth", "quote_duplicate": "quotes", "trade_duplicate": "trades"}
_DROPPED: Final = {
    "backfill_surplus": "backfill_surplus",
    "snapshot_ignored": "snapshots_ignored",
    "trade_late": "late_trades",
}
_META: Final = {
    (backfilled, held, stale): msgspec.json.encode(flags, order="sorted").decode() if flags else None
    for backfilled in (False, True)
    for held in (False, True)
    for stale in (False, True)
    for flags in [
        {name: True for name, on in (("backfill", backfilled), ("held", held), ("stale", stale)) if on},
    ]
}
_STALE: Final = _META[False, False, True]

_UNPROVEN_LOSS: Final = frozenset({"disconnected", "resubscribed"})
"""Reasons of a gap after which the next diff's `pu` shows whether diffs were missed."""
_ROUTES: Final[dict[str, Route]] = {"aggTrade": "market", "bookTicker": "public", "depth": "public"}
_HEARTBEAT: Final = "markPrice"
"""The recorder subscribes it where nobody asked for it, so that its route is heard every second: no news."""
_VALUE_LENGTH: Final = 40

Milliseconds: TypeAlias = Annotated[int, Meta(ge=1, le=3_600_000)]


class NormaliserConfig(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Settings of `NormaliserProcessor`. Durations run on the clock of the ticks, unless T is named."""

    top_k: Annotated[int, Meta(ge=1, le=20, description="levels a side in depth rows")] = 5
    depth_stream: Annotated[
        Literal["depth", "depth@100ms", "depth@500ms"],
        Meta(description="the stream that books are kept from; each speed has its own chain of ids"),
    ] = DEPTH_STREAM
    max_levels: Annotated[int, Meta(ge=100, le=100_000, description="levels kept a side; deeper ones are pruned")] = (
        5000
    )
    max_buffered_diffs: Annotated[
        int, Meta(ge=10, le=100_000, description="diffs kept while a snapshot is awaited, per symbol")
    ] = 1000
    max_symbols: Annotated[int, Meta(ge=1, le=100_000, description="symbols kept per partition")] = 2000
    ts_tolerance_ms: Annotated[
        int,
        Meta(ge=0, le=3_600_000, description="how far T may go back within a symbol's stream, or lie ahead of E and R"),
    ] = 1000
    stale_ms: Annotated[
        int, Meta(ge=1, le=3_600_000, description="latency above which a row is marked stale, and passes")
    ] = 1500
    book_stale_ms: Annotated[Milliseconds, Meta(description="without a diff for so long a book is stale")] = 10_000
    dedup_lru: Annotated[
        int,
        Meta(ge=1, le=1_000_000, description="ids above the complete interval that are remembered, their trades held"),
    ] = 8192
    trade_hold_ms: Annotated[int, Meta(ge=0, le=60_000, description="longest wait for missing trades")] = 5000
    request_interval_ms: Annotated[
        int, Meta(ge=100, le=60_000, description="shortest time between requests for one symbol")
    ] = 1000
    request_interval_most_ms: Annotated[
        int, Meta(ge=100, le=600_000, description="the time between requests for a snapshot doubles up to this")
    ] = 16_000
    backfill_after_ms: Annotated[
        int, Meta(ge=0, le=60_000, description="trades that are missing for so long are asked for")
    ] = 200
    snapshot_wait_ms: Annotated[
        Milliseconds, Meta(description="how long a snapshot ahead of the diffs waits for its bracket")
    ] = 10_000
    report_ms: Annotated[Milliseconds, Meta(description="time between reports of counts")] = 10_000
    silence_intervals: Annotated[
        int, Meta(ge=2, le=1000, description="a stream is silent after so many of its mean intervals without a frame")
    ] = 20
    silence_least_ms: Annotated[Milliseconds, Meta(description="no stream is called silent sooner")] = 10_000
    silence_most_ms: Annotated[
        int, Meta(ge=1, le=86_400_000, description="every stream is called silent after so long")
    ] = 3_600_000
    first_data_ms: Annotated[
        Milliseconds, Meta(description="a symbol's bookTicker or depth that has never spoken is silent after so long")
    ] = 60_000
    first_trade_ms: Annotated[
        Milliseconds, Meta(description="a symbol's aggTrade that has never spoken is silent after so long")
    ] = 300_000
    mismatches_before_resync: Annotated[
        int, Meta(ge=0, le=1000, description="quotes in a row that disagree with the book; 0 only reports them")
    ] = 3
    oracle_pause_ms: Annotated[
        Milliseconds, Meta(description="shortest time between resyncs by disagreeing quotes; doubles up to an hour")
    ] = 60_000
    clock_drift_ms: Annotated[
        int, Meta(ge=1, le=60_000, description="|receive time - server time| that is reported")
    ] = 200
    mark_price: Annotated[bool, Meta(description="rows of markPrice")] = False
    force_order: Annotated[bool, Meta(description="rows of forceOrder (liquidations)")] = False
    side: SideConfig = SideConfig()

    def __post_init__(self) -> None:
        if self.snapshot_wait_ms < self.request_interval_ms:
            raise ValueError(
                f"snapshot_wait_ms is {self.snapshot_wait_ms}: "
                f"it must be at least request_interval_ms, {self.request_interval_ms}"
            )
        for name, least, most in (
            ("request_interval", self.request_interval_ms, self.request_interval_most_ms),
            ("silence", self.silence_least_ms, self.silence_most_ms),
        ):
            if most < least:
                raise ValueError(f"{name}_most_ms is {most}: it must be at least {least}, the least that is set for it")


class _EventTime(Struct):
    """The newest T of one symbol's stream."""

    ts_ms: int = 0
    refused: int = 0
    """Frames in a row that lay behind it."""

    def admit(self, ts_ms: int, tolerance_ms: int) -> bool:
        """Whether T has not gone back by more than the tolerance; takes it over."""
        if ts_ms >= self.ts_ms:
            self.ts_ms = ts_ms
        elif ts_ms < self.ts_ms - tolerance_ms:
            self.refused += 1
            if self.refused < _REGRESSIONS_BEFORE_BELIEF:
                return False
            self.ts_ms = ts_ms
        self.refused = 0
        return True


class _Values(Struct):
    """A symbol's state but for its book and its classifier, which keep theirs."""

    gap_count: int = 0
    quote_update_id: int = -1
    quote_time: _EventTime = msgspec.field(default_factory=_EventTime)
    trade_time: _EventTime = msgspec.field(default_factory=_EventTime)
    depth_time: _EventTime = msgspec.field(default_factory=_EventTime)
    quote_recv_ns: int = 0
    trade_recv_ns: int = 0
    depth_recv_ns: int = 0
    since_ns: int = 0
    """Clock at which the symbol was first watched."""
    trade_watch: StreamWatch = msgspec.field(default_factory=StreamWatch)
    quote_watch: StreamWatch = msgspec.field(default_factory=StreamWatch)
    depth_watch: StreamWatch = msgspec.field(default_factory=StreamWatch)
    oracle: QuoteOracle = msgspec.field(default_factory=QuoteOracle)
    mismatches: int = 0
    """Not yet told by an event."""
    mismatch_told_ns: int = 0
    oracle_resyncs: int = 0
    """Without a pause of two hours between them."""
    oracle_resync_ns: int = 0
    trades: TradeSequence = msgspec.field(default_factory=TradeSequence)
    snapshot_why: str = "first_diff"
    snapshot_asked_ns: int = 0
    snapshot_asks: int = 0
    """Since the last answer."""
    pending_since_ns: int = 0
    counts: dict[str, int] = {}
    """Since the last report."""
    stale: dict[str, int] = {}
    """Stale rows by stream, and `most_ms`, since the last report."""


class _SymbolRecord(Struct):
    """What is written of a symbol."""

    values: _Values
    book: bytes
    side: bytes


class _Symbol:
    """One symbol's state."""

    __slots__ = ("book", "name", "side", "values")

    def __init__(self, name: str, config: NormaliserConfig) -> None:
        self.name = name
        self.book = LocalBook(max_levels=config.max_levels, max_buffered=config.max_buffered_diffs)
        self.side = SideClassifier(config.side)
        self.values = _Values()


class SymbolFigures(NamedTuple):
    """How one symbol stands."""

    symbol: str
    book_state: BookStatus
    silent: tuple[str, ...]
    skew_ms: int | None
    """T of the newest depth frame less T of the newest trade; None until both have come."""
    oracle_checked: int
    oracle_failed: int
    oracle_skipped: int
    oracle_waiting: int


def _figures_of(state: _Symbol) -> SymbolFigures:
    values = state.values
    depth_ts_ms, trade_ts_ms, oracle = values.depth_time.ts_ms, values.trade_time.ts_ms, values.oracle
    return SymbolFigures(
        state.name,
        state.book.state,
        tuple(stream for stream, _, watch in _streams_of(values) if watch.silent),
        depth_ts_ms - trade_ts_ms if depth_ts_ms and trade_ts_ms else None,
        oracle.checked,
        oracle.failed,
        oracle.skipped,
        len(oracle.claims),
    )


def _streams_of(values: _Values) -> tuple[tuple[str, int, StreamWatch], ...]:
    """(stream, receive time of its newest frame, its watch)."""
    return (
        ("aggTrade", values.trade_recv_ns, values.trade_watch),
        ("bookTicker", values.quote_recv_ns, values.quote_watch),
        ("depth", values.depth_recv_ns, values.depth_watch),
    )


class _Common(Struct):
    """State that belongs to no symbol."""

    clock_ts_ns: int = 0
    reported_ns: int = 0
    routes: dict[str, str] = {}
    drifting: bool = False
    drift_ms: int | None = None
    public_latency: LatencyWatch = msgspec.field(default_factory=LatencyWatch)
    market_latency: LatencyWatch = msgspec.field(default_factory=LatencyWatch)
    unused: dict[str, int] = {}
    """Frames by kind since the last report."""
    unknown: dict[str, int] = {}
    """Values that this version does not know, by field and value, since the last report."""
    totals: dict[str, int] = {}
    tallies: dict[str, dict[str, int]] = {}
    """What has happened in this session, by cause; for metrics."""
    watched_ns: int = 0
    watch_span_ns: int = 0
    audible_ns: dict[str, int] = {}
    """Per route: clock from which a silence counts; moved on while the route is down."""


class _TickTimes(Struct):
    trade: Id | None = msgspec.field(name="aggTrade", default=None)
    quote: Id | None = msgspec.field(name="bookTicker", default=None)
    depth: Id | None = None


class _TickPayload(Struct):
    routes: dict[str, str] = {}
    symbols: dict[str, _TickTimes] = {}


class _GapPayload(Struct):
    reason: str = "unknown"
    streams: list[str] = []
    frames: Id | None = None
    ranges: list[tuple[Id, Id]] | None = None
    hull: bool = False

    def lacks(self, kind: str, route: str) -> bool:
        """Whether frames of a kind may be missing; a record without streams is of all that its route carries."""
        if self.streams:
            return any(kind in stream.split("@") for stream in self.streams)
        return route in ("", _ROUTES[kind])


_decode_tick = msgspec.json.Decoder(_TickPayload).decode
_decode_gap = msgspec.json.Decoder(_GapPayload).decode
_Handler: TypeAlias = Callable[[str, Record], list[Emit]]


ORACLE_COUNTS: Final = ("checked", "failed", "skipped")


class NormaliserProcessor:
    """Steps through one partition of the journal.

    Parameters
    ----------
    partition
        Number of the partition; results do not depend on it.
    """

    inputs: ClassVar[tuple[str, ...]] = (JOURNAL,)
    outputs: ClassVar[tuple[str, ...]] = (ROWS, TICKS, EVENTS, REJECTS)

    def __init__(self, config: NormaliserConfig, partition: int = 0) -> None:
        self.config = config
        self.partition = partition
        self._symbols: dict[str, _Symbol] = {}
        self._sorted: list[str] = []
        self._common = _Common()
        self._tolerance_ms = config.ts_tolerance_ms
        self._stale_ms = config.stale_ms
        self.note_latency_ms: Callable[[int], None] = _ignore
        """Told R - E of each row; for metrics alone, so no part of the state."""
        self.counted = ProcessCounts()
        """The same counts as `totals` and `tallies`, of the process's life; the normalisers of a process share one."""
        self._oracle_counted = (0, 0, 0)
        self._handlers: dict[str, _Handler] = {
            "aggTrade": self._on_trade,
            "bookTicker": self._on_quote,
            "depth": self._on_depth,
        }
        if config.mark_price:
            self._handlers["markPrice"] = self._on_mark_price
        if config.force_order:
            self._handlers["forceOrder"] = self._on_force_order
        # A pure function of the stream's name, so no part of the state.
        self._by_name: dict[bytes, tuple[_Handler, str]] = {}
        self._kinds: dict[str, Callable[[Record], list[Emit]]] = {
            "frame": self._frame,
            "tick": self._tick,
            "snapshot": self._snapshot_arrived,
            "backfill": self._backfill_arrived,
            "server_time": self._server_time,
            "exchange_info": lambda record: self._pass_over("exchange_info"),
            "command": self._control,
            "config": self._control,
            "end": self._end,
            "gap": self._gap_recorded,
            "open": lambda record: [],
        }

    @property
    def totals(self) -> dict[str, int]:
        """Frames that gave neither a row nor a reject, by what became of them, so far in this session."""
        return dict(sorted(self._common.totals.items()))

    @property
    def tallies(self) -> dict[str, dict[str, int]]:
        """What has happened in this session, by cause: rejects, gaps, resyncs, events, trades, frames."""
        return {name: dict(sorted(counts.items())) for name, counts in sorted(self._common.tallies.items())}

    def count_oracle(self) -> None:
        """Add to `counted` what the oracles have checked since the last call."""
        now = self._oracle_sums()
        for name, count, before in zip(ORACLE_COUNTS, now, self._oracle_counted, strict=True):
            if count > before:
                self.counted.add("oracle", name, count - before)
        self._oracle_counted = now

    def _oracle_sums(self) -> tuple[int, int, int]:
        oracles = [state.values.oracle for state in self._symbols.values()]
        return sum(o.checked for o in oracles), sum(o.failed for o in oracles), sum(o.skipped for o in oracles)

    @property
    def drift_ms(self) -> int | None:
        """The newest receive time less server time; None before the first."""
        return self._common.drift_ms

    @property
    def symbols(self) -> tuple[str, ...]:
        """Symbols seen in this session."""
        return tuple(self._sorted)

    def symbol_figures(self) -> list[SymbolFigures]:
        """How each symbol stands, in order of their names."""
        return [_figures_of(self._symbols[name]) for name in self._sorted]

    def step(self, topic: str, record: Record) -> list[Emit]:
        """Take one journal record."""
        kind = record["kind"]
        if kind == "frame":
            return self._frame(record)
        handler = self._kinds.get(kind)
        if handler is None:
            return [self._reject(record, record["symbol"], None, "unknown_kind", f"kind is {kind!r}")]
        return handler(record)

    def snapshot(self) -> dict[str, bytes]:
        """The whole state."""
        states = {"": msgspec.msgpack.encode(self._common)}
        for name in self._sorted:
            state = self._symbols[name]
            states[name] = msgspec.msgpack.encode(
                _SymbolRecord(state.values, state.book.snapshot(), state.side.snapshot())
            )
        return states

    def restore(self, states: Mapping[str, bytes]) -> None:
        """Replace the state by one that `snapshot` returned.

        Raises
        ------
        msgspec.MsgspecError
            The bytes are no such state.
        """
        self._common = msgspec.msgpack.decode(states[""], type=_Common) if "" in states else _Common()
        self._symbols = {}
        self._sorted = sorted(name for name in states if name)
        for name in self._sorted:
            found = msgspec.msgpack.decode(states[name], type=_SymbolRecord)
            state = self._symbols[name] = _Symbol(name, self.config)
            state.values = found.values
            state.book.restore(found.book)
            state.side.restore(found.side)
        # What was checked before this snapshot was counted by whoever checked it.
        self._oracle_counted = self._oracle_sums()

    # -- frames ---------------------------------------------------------------------------------------------------

    def _frame(self, record: Record) -> list[Emit]:
        payload: bytes = record["payload"]
        if payload.startswith(ENVELOPE_PREFIX):
            found = self._by_name.get(payload[_PREFIX_LENGTH : payload.find(b'"', _PREFIX_LENGTH, _NAME_END)])
            if found is not None:
                return found[0](found[1], record)
        return self._unfamiliar_frame(record)

    def _unfamiliar_frame(self, record: Record) -> list[Emit]:
        """A frame whose stream is not in the short cut: new, unused, of unusual form, or garbage."""
        payload: bytes = record["payload"]
        try:
            envelope = decode_envelope(payload)
        except UNDECODABLE as error:
            self._quote_may_be_lost(record["symbol"])
            return [self._undecodable(record, record["symbol"], None, error)]
        if envelope.stream is None:
            if envelope.is_reply:
                return self._pass_over("reply")
            self._quote_may_be_lost(record["symbol"])
            return [self._reject(record, record["symbol"], None, "missing_stream", "neither a stream nor a reply")]
        name = parse_stream(envelope.stream)
        if name.kind not in KNOWN_KINDS:
            self._quote_may_be_lost(record["symbol"])
            return [self._reject(record, name.symbol, None, "unknown_stream", f"stream is {envelope.stream!r}")]
        handler = self._handlers.get(name.kind)
        if handler is None or name.symbol is None or (name.kind == "depth" and name.stream != self.config.depth_stream):
            return self._pass_over("unused", name.kind)
        emits = handler(name.symbol, record)
        end = payload.find(b'"', _PREFIX_LENGTH, _NAME_END)
        if name.symbol in self._symbols and end > 0 and payload.startswith(ENVELOPE_PREFIX):
            if len(self._by_name) >= 8 * self.config.max_symbols:
                self._by_name.clear()
            self._by_name[payload[_PREFIX_LENGTH:end]] = (handler, name.symbol)
        return emits

    def _on_quote(self, symbol: str, record: Record) -> list[Emit]:
        try:
            quote = decode_book_ticker(record["payload"]).data
        except UNDECODABLE as error:
            self._quote_may_be_lost(symbol)
            return [self._undecodable(record, symbol, "bookTicker", error)]
        if quote.symbol != symbol or (quote.event != "bookTicker" and quote.event):
            self._quote_may_be_lost(symbol)
            return [self._mismatch(record, symbol, "bookTicker", quote.symbol, quote.event)]
        state = self._symbols.get(symbol) or self._add(symbol)
        if state is None:
            return [self._one_too_many(record, symbol, "bookTicker")]
        values, ts_ms, update_id = state.values, quote.ts_ms, quote.update_id
        repeated = update_id <= values.quote_update_id
        if repeated and ts_ms <= values.quote_time.ts_ms + self._tolerance_ms:
            values.oracle.lose_late_quote(update_id)
            return self._count(state, "quote_duplicate")
        bid, bid_qty, ask, ask_qty = quote.bid, quote.bid_qty, quote.ask, quote.ask_qty
        if not (0.0 < bid < ask < _HUGE and 0.0 < bid_qty < _HUGE and 0.0 < ask_qty < _HUGE):
            values.oracle.lose_quote()
            return [self._bad_quote(record, symbol, bid, bid_qty, ask, ask_qty)]
        event_ts_ms = quote.event_ts_ms
        if event_ts_ms is not None and ts_ms > event_ts_ms and self._is_ahead(ts_ms, event_ts_ms, record):
            values.oracle.lose_quote()
            return [self._reject(record, symbol, "bookTicker", *_ahead(ts_ms, event_ts_ms))]
        if not values.quote_time.admit(ts_ms, self._tolerance_ms):
            values.oracle.lose_quote()
            return [self._regression(record, symbol, "bookTicker", ts_ms, values.quote_time)]
        emits: list[Emit] = []
        if repeated:
            meta = {"update_id": update_id, "last_update_id": values.quote_update_id}
            emits.append(self._gap(state, record, ts_ms, "quote_ids_went_back", meta))
            values.oracle.restart()
        values.quote_update_id = update_id
        in_row = values.oracle.failed_in_row
        wrong = values.oracle.add_quote((update_id, bid, bid_qty, ask, ask_qty))
        if wrong:
            self._book_is_wrong(state, record, ts_ms, wrong, in_row, emits)
        recv_ts_ns = record["recv_ts_ns"]
        values.quote_recv_ns = recv_ts_ns
        state.side.on_quote(ts_ms, bid, ask)
        recv_ts_ms = recv_ts_ns // _NS_PER_MS
        latency_ms = self._latency(state, "bookTicker", event_ts_ms, recv_ts_ms)
        if quote.market not in MARKETS:
            self._unknown_value("bookTicker.st", quote.market)
        row = {
            "src": "bookTicker",
            "symbol": symbol,
            "ts_ms": ts_ms,
            "event_ts_ms": event_ts_ms,
            "recv_ts_ms": recv_ts_ms,
            "price": None,
            "qty": None,
            "side": None,
            "side_source": "none",
            "agg_trade_id": None,
            "bid": bid,
            "bid_qty": bid_qty,
            "ask": ask,
            "ask_qty": ask_qty,
            "best_spread_bps": 2e4 * (ask - bid) / (ask + bid),
            "bid_px": [],
            "bid_qtys": [],
            "ask_px": [],
            "ask_qtys": [],
            "update_id": update_id,
            "book_state": state.book.state,
            "gap_count": values.gap_count,
            "latency_ms": latency_ms,
            "meta": _STALE if latency_ms is not None and latency_ms > self._stale_ms else None,
        }
        emits.append((ROWS, symbol, row))
        return emits

    # -- depth ----------------------------------------------------------------------------------------------------

    def _on_depth(self, symbol: str, record: Record) -> list[Emit]:
        try:
            diff = decode_depth(record["payload"]).data
        except UNDECODABLE as error:
            return [self._undecodable(record, symbol, "depth", error)]
        if diff.symbol != symbol or (diff.event != "depthUpdate" and diff.event):
            return [self._mismatch(record, symbol, "depth", diff.symbol, diff.event)]
        if diff.first_id > diff.final_id:
            return [self._reject(record, symbol, "depth", "bad_ids", f"U is {diff.first_id}, above u, {diff.final_id}")]
        state = self._symbols.get(symbol) or self._add(symbol)
        if state is None:
            return [self._one_too_many(record, symbol, "depth")]
        values, book, ts_ms = state.values, state.book, diff.ts_ms
        repeated = book.seen(diff.final_id)
        if repeated and ts_ms <= values.depth_time.ts_ms + self._tolerance_ms:
            return self._count(state, "diff_duplicate")
        event_ts_ms = diff.event_ts_ms
        if event_ts_ms is not None and ts_ms > event_ts_ms and self._is_ahead(ts_ms, event_ts_ms, record):
            return [self._reject(record, symbol, "depth", *_ahead(ts_ms, event_ts_ms))]
        if not values.depth_time.admit(ts_ms, self._tolerance_ms):
            return [self._regression(record, symbol, "depth", ts_ms, values.depth_time)]
        values.depth_recv_ns = record["recv_ts_ns"]
        emits: list[Emit] = []
        if repeated:
            meta = {"last_u": book.last_update_id, "U": diff.first_id, "u": diff.final_id}
            emits.append(self._gap(state, record, ts_ms, "update_ids_went_back", meta))
            self._resync(state, "update_ids_went_back")
            values.oracle.restart()
        was_stale, last_id = book.state == "stale", book.last_update_id
        outcome = book.apply_diff(diff.first_id, diff.final_id, diff.prev_id, diff.bids, diff.asks)
        if outcome == "applied":
            if self._is_distrusted(values):
                book.mark_stale()
            elif was_stale:
                emits.append(self._event(symbol, "book_recovered", ts_ms, record, {"u": diff.final_id}))
            self._depth_row(state, record, diff, emits)
            return emits
        self._diff_not_chained(state, record, diff, outcome, last_id, emits)
        return emits

    def _diff_not_chained(
        self, state: _Symbol, record: Record, diff: DepthUpdate, outcome: str, last_id: int, emits: list[Emit]
    ) -> None:
        """A diff that did more, or less, than continue a synced book."""
        ts_ms = diff.ts_ms
        ids = {"last_u": last_id, "pu": diff.prev_id, "U": diff.first_id, "u": diff.final_id}
        if outcome == "synced":
            emits.append(self._synced(state, record, ts_ms))
            self._depth_row(state, record, diff, emits)
            return
        if last_id >= 0:
            self._tally("resyncs", "crossed_book" if outcome == "crossed" else "pu_mismatch")
        if outcome == "crossed":
            self._snapshot_for(state, "crossed_book")
            emits.append(
                self._reject(record, state.name, "depth", "crossed_book", f"after the diff ending at {ids['u']}")
            )
            emits.append(self._gap(state, record, ts_ms, "crossed_book", ids))
        else:
            self._count(state, "diff_buffered")
        if outcome == "gap":
            self._snapshot_for(state, "pu_mismatch")
            emits.append(self._gap(state, record, ts_ms, "pu_mismatch", ids))
        elif outcome == "snapshot_too_old":
            self._snapshot_for(state, "snapshot_too_old")
        self._ask_snapshot(state, record, ts_ms, emits)

    def _depth_row(self, state: _Symbol, record: Record, diff: DepthUpdate, emits: list[Emit]) -> None:
        """The row of an applied diff; the best of the book after it is held against the quotes."""
        book = state.book
        bid_px, bid_qtys, ask_px, ask_qtys = book.top(self.config.top_k)
        bid, bid_qty = (bid_px[0], bid_qtys[0]) if bid_px else (None, None)
        ask, ask_qty = (ask_px[0], ask_qtys[0]) if ask_px else (None, None)
        event_ts_ms = diff.event_ts_ms
        recv_ts_ms = record["recv_ts_ns"] // _NS_PER_MS
        latency_ms = self._latency(state, "depth", event_ts_ms, recv_ts_ms)
        if diff.market not in MARKETS:
            self._unknown_value("depth.st", diff.market)
        row = {
            "src": "depth",
            "symbol": state.name,
            "ts_ms": diff.ts_ms,
            "event_ts_ms": event_ts_ms,
            "recv_ts_ms": recv_ts_ms,
            "price": None,
            "qty": None,
            "side": None,
            "side_source": "none",
            "agg_trade_id": None,
            "bid": bid,
            "bid_qty": bid_qty,
            "ask": ask,
            "ask_qty": ask_qty,
            "best_spread_bps": None if bid is None or ask is None else 2e4 * (ask - bid) / (ask + bid),
            "bid_px": bid_px,
            "bid_qtys": bid_qtys,
            "ask_px": ask_px,
            "ask_qtys": ask_qtys,
            "update_id": diff.final_id,
            "book_state": book.state,
            "gap_count": state.values.gap_count,
            "latency_ms": latency_ms,
            "meta": _STALE if latency_ms is not None and latency_ms > self._stale_ms else None,
        }
        emits.append((ROWS, state.name, row))
        claim = (diff.final_id, bid, bid_qty, ask, ask_qty)
        in_row = state.values.oracle.failed_in_row
        quote = state.values.oracle.add_claim(claim)
        if quote is not None:
            self._book_is_wrong(state, record, diff.ts_ms, [(claim, quote)], in_row, emits)

    # -- the book against the quotes ------------------------------------------------------------------------------

    def _is_distrusted(self, values: _Values) -> bool:
        limit = self.config.mismatches_before_resync
        return limit > 0 and values.oracle.failed_in_row >= limit

    def _book_is_wrong(
        self,
        state: _Symbol,
        record: Record,
        ts_ms: int,
        wrong: list[tuple[Claim, Quote]],
        in_row: int,
        emits: list[Emit],
    ) -> None:
        """Quotes disagree with the book: say so, and after some in a row begin it anew, ever less often.

        `in_row` is how many in a row had disagreed before these.
        """
        values, now_ns = state.values, self._now_ns(record)
        if in_row < (self.config.mismatches_before_resync or _VERDICT) <= values.oracle.failed_in_row:
            self.counted.add("distrusted")
        values.mismatches += len(wrong)
        if not values.mismatch_told_ns or not 0 <= now_ns - values.mismatch_told_ns < self._request_ns:
            claim, quote = wrong[-1]
            meta = {
                "u": claim[0],
                "book": claim[1:],
                "quote_update_id": quote[0],
                "quote": quote[1:],
                "mismatches": values.mismatches,
                "in_row": values.oracle.failed_in_row,
            }
            emits.append(self._event(state.name, "quote_mismatch", ts_ms, record, meta))
            values.mismatches, values.mismatch_told_ns = 0, now_ns
        if not self._is_distrusted(values) or state.book.state not in ("synced", "stale"):
            return
        since_ns = now_ns - values.oracle_resync_ns
        if values.oracle_resync_ns and 0 <= since_ns < self._oracle_pause_ns(values):
            if state.book.state == "synced":
                state.book.mark_stale()
                meta = {"why": "quote_mismatch", "age_ms": 0}
                emits.append(self._event(state.name, "book_stale", ts_ms, record, meta))
            return
        if since_ns > 2 * _LONGEST_ORACLE_PAUSE_MS * _NS_PER_MS:
            values.oracle_resyncs = 0
        values.oracle_resyncs += 1
        values.oracle_resync_ns = now_ns
        self._resync(state, "quote_mismatch")
        values.oracle.restart()
        emits.append(self._gap(state, record, ts_ms, "quote_mismatch", {"resyncs": values.oracle_resyncs}))

    def _oracle_pause_ns(self, values: _Values) -> int:
        doubled_ms = self.config.oracle_pause_ms << min(max(values.oracle_resyncs - 1, 0), 16)
        return min(doubled_ms, max(_LONGEST_ORACLE_PAUSE_MS, self.config.oracle_pause_ms)) * _NS_PER_MS

    def _quote_may_be_lost(self, symbol: str | None) -> None:
        """A frame that can't be read may have been a quote: of its symbol, or of any where that is not known."""
        for name in self._sorted if symbol is None else (symbol,):
            state = self._symbols.get(name)
            if state is not None:
                state.values.oracle.lose_quote()

    # -- snapshots ------------------------------------------------------------------------------------------------

    def _resync(self, state: _Symbol, why: str) -> None:
        """Drop the book."""
        if state.book.state in ("synced", "stale"):
            self._tally("resyncs", why)
        state.book.resync()
        self._snapshot_for(state, why)

    def _snapshot_for(self, state: _Symbol, why: str) -> None:
        """A snapshot is wanted for another reason than before: what was asked in vain counts no longer."""
        if why != state.values.snapshot_why:
            state.values.snapshot_why = why
            state.values.snapshot_asks = 0

    def _snapshot_arrived(self, record: Record) -> list[Emit]:
        try:
            snapshot = decode_snapshot(record["payload"])
        except UNDECODABLE as error:
            return [self._undecodable(record, record["symbol"], "snapshot", error)]
        symbol = record["symbol"] or snapshot.symbol
        if not symbol:
            return [self._reject(record, None, "snapshot", "missing_field", "a snapshot without a symbol")]
        state = self._symbols.get(symbol) or self._add(symbol)
        if state is None:
            return [self._one_too_many(record, symbol, "snapshot")]
        ts_ms = snapshot.ts_ms or record["recv_ts_ns"] // _NS_PER_MS
        emits: list[Emit] = []
        state.values.snapshot_asks = 0
        outcome = state.book.apply_snapshot(snapshot.last_update_id, snapshot.bids, snapshot.asks)
        if outcome == "synced":
            emits.append(self._synced(state, record, ts_ms))
        elif outcome == "waiting":
            state.values.pending_since_ns = self._now_ns(record)
        elif outcome == "ignored":
            self._count(state, "snapshot_ignored")
        elif outcome == "crossed":
            detail = f"snapshot with lastUpdateId {snapshot.last_update_id}"
            emits.append(self._reject(record, symbol, "snapshot", "crossed_book", detail))
            self._snapshot_for(state, "crossed_book")
        else:
            self._snapshot_for(state, "snapshot_too_old")
        self._ask_snapshot(state, record, ts_ms, emits)
        return emits

    def _synced(self, state: _Symbol, record: Record, ts_ms: int) -> Emit:
        state.values.snapshot_why = "resync"
        state.values.snapshot_asked_ns = 0
        bids, asks = state.book.levels
        meta = {"u": state.book.last_update_id, "bid_levels": bids, "ask_levels": asks}
        return self._event(state.name, "book_synced", ts_ms, record, meta)

    def _ask_snapshot(self, state: _Symbol, record: Record, ts_ms: int, emits: list[Emit]) -> None:
        """Ask for a snapshot where only that helps, at most once per interval, which doubles while none comes."""
        values, book = state.values, state.book
        if not book.wants_snapshot:
            return
        now_ns = self._now_ns(record)
        doubled_ms = self.config.request_interval_ms << min(max(values.snapshot_asks - 1, 0), 20)
        interval_ns = min(doubled_ms, self.config.request_interval_most_ms) * _NS_PER_MS
        if values.snapshot_asked_ns and 0 <= now_ns - values.snapshot_asked_ns < interval_ns:
            return
        values.snapshot_asked_ns = now_ns
        values.snapshot_asks += 1
        meta = {
            "why": values.snapshot_why,
            "want_update_id": book.wanted_update_id,
            "buffered": book.buffered,
            "asks": values.snapshot_asks,
        }
        emits.append(self._event(state.name, "snapshot_needed", ts_ms, record, meta))

    # -- trades ---------------------------------------------------------------------------------------------------

    def _on_trade(self, symbol: str, record: Record) -> list[Emit]:
        try:
            trade = decode_agg_trade(record["payload"]).data
        except UNDECODABLE as error:
            return [self._undecodable(record, symbol, "aggTrade", error)]
        if trade.symbol != symbol or (trade.event != "aggTrade" and trade.event):
            return [self._mismatch(record, symbol, "aggTrade", trade.symbol, trade.event)]
        state = self._symbols.get(symbol) or self._add(symbol)
        if state is None:
            return [self._one_too_many(record, symbol, "aggTrade")]
        values = state.values
        values.trade_recv_ns = record["recv_ts_ns"]
        if trade.market not in MARKETS:
            self._unknown_value("aggTrade.st", trade.market)
        if trade.kind is not None and trade.kind not in TRADE_KINDS:
            self._unknown_value("aggTrade.X", trade.kind)
        refusal = _trade_refusal(trade)
        event_ts_ms = trade.event_ts_ms
        if event_ts_ms is not None and trade.ts_ms > event_ts_ms and self._is_ahead(trade.ts_ms, event_ts_ms, record):
            refusal = refusal or _ahead(trade.ts_ms, event_ts_ms)
        sequence = values.trades
        if trade.agg_trade_id != sequence.next_id or sequence.held or refusal is not None:
            return self._trade_out_of_line(state, record, trade, refusal)
        sequence.next_id += 1
        if not values.trade_time.admit(trade.ts_ms, self._tolerance_ms):
            return [self._regression(record, symbol, "aggTrade", trade.ts_ms, values.trade_time)]
        recv_ts_ms = record["recv_ts_ns"] // _NS_PER_MS
        return [
            self._trade_row(
                state,
                trade.agg_trade_id,
                trade.price,
                trade.qty,
                trade.buyer_is_maker,
                trade.ts_ms,
                trade.event_ts_ms,
                recv_ts_ms,
                (False, False),
            )
        ]

    def _trade_out_of_line(
        self, state: _Symbol, record: Record, trade: AggTrade, refusal: tuple[str, str] | None
    ) -> list[Emit]:
        """A trade that is not simply the next: the first, repeated, behind a hole, held up, or refused."""
        values, sequence, number = state.values, state.values.trades, trade.agg_trade_id
        emits: list[Emit] = []
        position = sequence.position(number)
        if position == "duplicate" or position == "late":
            if trade.ts_ms <= values.trade_time.ts_ms + self._tolerance_ms or number >= sequence.next_id or refusal:
                return self._count(state, "trade_duplicate" if position == "duplicate" else "trade_late")
            meta = {"agg_trade_id": number, "next_id": sequence.next_id}
            self._give_up(state, record, trade.ts_ms, max(sequence.held, default=-1), emits)
            emits.append(self._gap(state, record, trade.ts_ms, "trade_ids_went_back", meta))
            sequence.restart(number)
        if refusal is not None:
            emits.append(self._reject(record, state.name, "aggTrade", *refusal))
            # Its id is spent, unless it lies so far ahead that the id itself is in doubt.
            if position == "first" or number - sequence.next_id > self.config.dedup_lru:
                return emits
        if position == "first":
            sequence.restart(number)
        waiting = len(sequence.held)
        sequence.held[number] = HeldTrade(
            number,
            trade.price,
            trade.qty,
            trade.buyer_is_maker,
            trade.ts_ms,
            trade.event_ts_ms,
            record["recv_ts_ns"],
            self._now_ns(record),
            record["route"],
            refused=refusal is not None,
            payload=record["payload"] if refusal is None else b"",
        )
        self._let_go(state, record, sequence.ready(), emits, number)
        if len(sequence.held) > self.config.dedup_lru:
            self._give_up(state, record, trade.ts_ms, max(sequence.held), emits, number)
        if len(sequence.held) > waiting and refusal is None:
            self._count(state, "trade_held")
        return emits

    def _let_go(
        self, state: _Symbol, record: Record, trades: list[HeldTrade], emits: list[Emit], current: int = -1
    ) -> None:
        """Rows of trades whose turn has come; `current` is the id of the one that this record brought."""
        values = state.values
        for trade in trades:
            if trade.refused:
                continue
            if not trade.backfilled and not values.trade_time.admit(trade.ts_ms, self._tolerance_ms):
                source = {
                    "route": trade.route,
                    "recv_ts_ns": trade.recv_ts_ns,
                    "payload": trade.payload,
                    "symbol": state.name,
                }
                emits.append(self._regression(source, state.name, "aggTrade", trade.ts_ms, values.trade_time))
                continue
            emits.append(
                self._trade_row(
                    state,
                    trade.agg_trade_id,
                    trade.price,
                    trade.qty,
                    trade.buyer_is_maker,
                    trade.ts_ms,
                    trade.event_ts_ms,
                    trade.recv_ts_ns // _NS_PER_MS,
                    (trade.backfilled, trade.agg_trade_id != current and not trade.backfilled),
                )
            )
        sequence = values.trades
        if sequence.filled and not sequence.held:
            ts_ms = values.trade_time.ts_ms
            emits.append(self._event(state.name, "trades_backfilled", ts_ms, record, {"trades": sequence.filled}))
            sequence.filled = 0

    def _give_up(
        self, state: _Symbol, record: Record, ts_ms: int, up_to_id: int, emits: list[Emit], current: int = -1
    ) -> None:
        """Stop waiting for what is missing below `up_to_id`: say which ids are lost, let the rest go."""
        losses, trades = state.values.trades.give_up(up_to_id)
        if losses:
            state.values.gap_count += 1
            lost = sum(high - low + 1 for low, high in losses)
            meta = {"ranges": losses, "trades": lost, "gap_count": state.values.gap_count}
            self._tally("trades", "lost", lost)
            emits.append(self._event(state.name, "trades_lost", ts_ms, record, meta))
        self._let_go(state, record, trades, emits, current)

    def _ask_backfill(self, state: _Symbol, record: Record, ts_ms: int, emits: list[Emit]) -> None:
        """Ask for the first ids that are missing, and again per interval while they are."""
        sequence = state.values.trades
        if not sequence.held:
            return
        now_ns = self._now_ns(record)
        if sequence.asked_id == sequence.next_id and 0 <= now_ns - sequence.asked_ns < self._request_ns:
            return
        hole = sequence.first_hole()
        assert hole is not None
        sequence.asked_id, sequence.asked_ns = hole[0], now_ns
        meta = {"from_id": hole[0], "to_id": hole[1], "held": len(sequence.held)}
        emits.append(self._event(state.name, "backfill_needed", ts_ms, record, meta))

    def _backfill_arrived(self, record: Record) -> list[Emit]:
        symbol = record["symbol"]
        try:
            trades = decode_rest_agg_trades(record["payload"])
        except UNDECODABLE as error:
            return [self._undecodable(record, symbol, "backfill", error)]
        if not symbol:
            return [self._reject(record, None, "backfill", "missing_field", "a backfill without a symbol")]
        state = self._symbols.get(symbol)
        if state is None:
            return self._pass_over("backfill_surplus")
        emits: list[Emit] = []
        sequence = state.values.trades
        newest = max(sequence.held, default=-1)
        trades.sort(key=lambda trade: trade.agg_trade_id)
        for trade in trades:
            number = trade.agg_trade_id
            if not sequence.next_id <= number < newest or number in sequence.held:
                late = sequence.position(number) == "late"
                self._count(state, "trade_late" if late else "backfill_surplus")
                continue
            refusal = _trade_refusal(trade)
            if refusal is not None:
                emits.append(self._reject(record, symbol, "backfill", *refusal))
            sequence.held[number] = self._backfilled(record, trade, refused=refusal is not None)
            if refusal is None:
                sequence.filled += 1
                self._tally("trades", "backfilled")
        ts_ms = state.values.trade_time.ts_ms
        self._let_go(state, record, sequence.ready(), emits)
        self._ask_backfill(state, record, ts_ms, emits)
        return emits

    def _backfilled(self, record: Record, trade: RestAggTrade, *, refused: bool) -> HeldTrade:
        return HeldTrade(
            trade.agg_trade_id,
            trade.price,
            trade.qty,
            trade.buyer_is_maker,
            trade.ts_ms,
            None,
            record["recv_ts_ns"],
            self._now_ns(record),
            record["route"],
            backfilled=True,
            refused=refused,
        )

    def _trade_row(
        self,
        state: _Symbol,
        agg_trade_id: int,
        price: float,
        qty: float,
        buyer_is_maker: bool | None,
        ts_ms: int,
        event_ts_ms: int | None,
        recv_ts_ms: int,
        flags: tuple[bool, bool],
    ) -> Emit:
        """`flags`: backfilled, held."""
        side, side_source = state.side.classify(ts_ms, price, buyer_is_maker)
        latency_ms = self._latency(state, "aggTrade", event_ts_ms, recv_ts_ms)
        row = {
            "src": "aggTrade",
            "symbol": state.name,
            "ts_ms": ts_ms,
            "event_ts_ms": event_ts_ms,
            "recv_ts_ms": recv_ts_ms,
            "price": price,
            "qty": qty,
            "side": side,
            "side_source": side_source,
            "agg_trade_id": agg_trade_id,
            "bid": None,
            "bid_qty": None,
            "ask": None,
            "ask_qty": None,
            "best_spread_bps": None,
            "bid_px": [],
            "bid_qtys": [],
            "ask_px": [],
            "ask_qtys": [],
            "update_id": None,
            "book_state": state.book.state,
            "gap_count": state.values.gap_count,
            "latency_ms": latency_ms,
            "meta": _META[flags[0], flags[1], latency_ms is not None and latency_ms > self._stale_ms],
        }
        return ROWS, state.name, row

    # -- rare kinds -----------------------------------------------------------------------------------------------

    def _on_mark_price(self, symbol: str, record: Record) -> list[Emit]:
        try:
            mark = decode_mark_price(record["payload"]).data
        except UNDECODABLE as error:
            return [self._undecodable(record, symbol, "markPrice", error)]
        if mark.symbol != symbol or (mark.event != "markPriceUpdate" and mark.event):
            return [self._mismatch(record, symbol, "markPrice", mark.symbol, mark.event)]
        if not 0.0 < mark.mark_price < _HUGE:
            return [self._reject(record, symbol, "markPrice", "bad_price", f"p is {mark.mark_price}")]
        state = self._symbols.get(symbol) or self._add(symbol)
        if state is None:
            return [self._one_too_many(record, symbol, "markPrice")]
        meta = {
            "funding_rate": mark.funding_rate,
            "index_price": mark.index_price,
            "next_funding_ts_ms": mark.next_funding_ts_ms,
        }
        row = self._rare_row(state, record, "markPrice", mark.event_ts_ms, mark.event_ts_ms, meta)
        row["price"] = mark.mark_price
        return [(ROWS, symbol, row)]

    def _on_force_order(self, symbol: str, record: Record) -> list[Emit]:
        try:
            data = decode_force_order(record["payload"]).data
        except UNDECODABLE as error:
            return [self._undecodable(record, symbol, "forceOrder", error)]
        order = data.order
        if order.symbol != symbol or (data.event != "forceOrder" and data.event):
            return [self._mismatch(record, symbol, "forceOrder", order.symbol, data.event)]
        price, qty = _liquidation(order)
        if not 0.0 < price < _HUGE:
            return [self._reject(record, symbol, "forceOrder", "bad_price", f"p is {order.price}")]
        if not 0.0 < qty < _HUGE:
            return [self._reject(record, symbol, "forceOrder", "bad_qty", f"q is {order.qty}")]
        state = self._symbols.get(symbol) or self._add(symbol)
        if state is None:
            return [self._one_too_many(record, symbol, "forceOrder")]
        meta = {"order_price": order.price, "order_qty": order.qty, "status": order.status}
        row = self._rare_row(state, record, "forceOrder", order.ts_ms, data.event_ts_ms, meta)
        row["price"], row["qty"] = price, qty
        if order.side in ("BUY", "SELL"):
            row["side"], row["side_source"] = order.side.lower(), "exchange"
        return [(ROWS, symbol, row)]

    def _rare_row(
        self,
        state: _Symbol,
        record: Record,
        src: str,
        ts_ms: int,
        event_ts_ms: int | None,
        meta: dict[str, Any],
    ) -> Record:
        recv_ts_ms = record["recv_ts_ns"] // _NS_PER_MS
        latency_ms = None if event_ts_ms is None else recv_ts_ms - event_ts_ms
        if latency_ms is not None and latency_ms > self._stale_ms:
            meta["stale"] = True
        return {
            "src": src,
            "symbol": state.name,
            "ts_ms": ts_ms,
            "event_ts_ms": event_ts_ms,
            "recv_ts_ms": recv_ts_ms,
            "price": None,
            "qty": None,
            "side": None,
            "side_source": "none",
            "agg_trade_id": None,
            "bid": None,
            "bid_qty": None,
            "ask": None,
            "ask_qty": None,
            "best_spread_bps": None,
            "bid_px": [],
            "bid_qtys": [],
            "ask_px": [],
            "ask_qtys": [],
            "update_id": None,
            "book_state": state.book.state,
            "gap_count": state.values.gap_count,
            "latency_ms": latency_ms,
            "meta": _json(meta),
        }

    # -- the clock ------------------------------------------------------------------------------------------------

    def _tick(self, record: Record) -> list[Emit]:
        emits: list[Emit] = []
        common = self._common
        common.clock_ts_ns = max(common.clock_ts_ns, record["recv_ts_ns"])
        try:
            payload = _decode_tick(record["payload"])
        except UNDECODABLE as error:
            emits.append(self._undecodable(record, None, "tick", error))
            payload = _TickPayload(routes=dict(common.routes))
        times = sorted(payload.symbols.items())
        value = {
            "kind": "tick",
            "recv_ts_ns": record["recv_ts_ns"],
            "clock_ts_ns": common.clock_ts_ns,
            "routes": dict(sorted(payload.routes.items())),
            "trade_ts_ms": {symbol: each.trade for symbol, each in times if each.trade is not None},
            "quote_ts_ms": {symbol: each.quote for symbol, each in times if each.quote is not None},
            "depth_ts_ms": {symbol: each.depth for symbol, each in times if each.depth is not None},
            "payload": None,
        }
        emits.append((TICKS, "", value))
        self._note_routes(record, payload.routes, emits)
        for name, _ in times:
            if name not in self._symbols:
                self._add(name)
        for name in self._sorted:
            self._symbol_tick(self._symbols[name], record, emits)
        if common.clock_ts_ns - common.watched_ns >= _WATCH_NS:
            self._watch(record, emits)
        if common.reported_ns == 0:
            common.reported_ns = common.clock_ts_ns
        elif common.clock_ts_ns - common.reported_ns >= self.config.report_ms * _NS_PER_MS:
            self._report(record, emits)
        return emits

    def _note_routes(self, record: Record, routes: dict[str, str], emits: list[Emit]) -> None:
        common = self._common
        for route in sorted(routes):
            before, now = common.routes.get(route, "up"), routes[route]
            if before != now and now in ("up", "down"):
                emits.append(self._event("", f"route_{now}", self._clock_ms, record, {"route": route}))
        common.routes = dict(sorted(routes.items()))

    def _symbol_tick(self, state: _Symbol, record: Record, emits: list[Emit]) -> None:
        """What must happen to a symbol without any frame of its own."""
        values, book, clock_ns, clock_ms = state.values, state.book, self._common.clock_ts_ns, self._clock_ms
        public_down = self._common.routes.get("public") == "down"
        if book.state == "synced":
            age_ms = (clock_ns - values.depth_recv_ns) // _NS_PER_MS
            if public_down or age_ms > self.config.book_stale_ms:
                book.mark_stale()
                meta = {"why": "route_down" if public_down else "no_diffs", "age_ms": age_ms}
                emits.append(self._event(state.name, "book_stale", clock_ms, record, meta))
        elif book.state == "resyncing":
            wait_ns = self.config.snapshot_wait_ms * _NS_PER_MS
            if book.waits_for_bracket and clock_ns - values.pending_since_ns >= wait_ns:
                book.discard_pending()
                values.snapshot_why = "bracket_did_not_come"
            if not public_down:
                self._ask_snapshot(state, record, clock_ms, emits)
        if values.trades.held:
            expired = values.trades.expired(clock_ns - self.config.trade_hold_ms * _NS_PER_MS)
            if expired >= 0:
                self._give_up(state, record, clock_ms, expired, emits)
            if values.trades.held and values.trades.waited_ns(clock_ns) >= self.config.backfill_after_ms * _NS_PER_MS:
                self._ask_backfill(state, record, clock_ms, emits)

    def _watch(self, record: Record, emits: list[Emit]) -> None:
        """Look for silent streams. A pause of the ticks themselves, and a route that is down, excuse silence."""
        common, clock_ns = self._common, self._common.clock_ts_ns
        span_ns, usual_ns = clock_ns - common.watched_ns, common.watch_span_ns
        paused = common.watched_ns == 0 or span_ns > _PAUSE_NS + 3 * usual_ns
        common.watched_ns, common.watch_span_ns = clock_ns, 0 if common.watched_ns == 0 else span_ns
        if paused and usual_ns and self._sorted:
            meta = {"pause_ms": span_ns // _NS_PER_MS}
            emits.append(self._event("", "clock_paused", self._clock_ms, record, meta))
        self._watch_latency(record, emits)
        self.count_oracle()
        for route in ("market", "public"):
            if paused or common.routes.get(route) == "down":
                common.audible_ns[route] = clock_ns
        span: Span | None = None if paused else span_of(span_ns / 1e9)
        for name in self._sorted:
            state = self._symbols[name]
            state.values.since_ns = state.values.since_ns or clock_ns
            for stream, recv_ns, watch in _streams_of(state.values):
                if span is not None:
                    watch.fold(recv_ns, span)
                self._watch_stream(state, stream, recv_ns, watch, record, emits)

    def _watch_latency(self, record: Record, emits: list[Emit]) -> None:
        common = self._common
        for route, watch in (("market", common.market_latency), ("public", common.public_latency)):
            jump = watch.look()
            if jump is not None:
                meta = {"route": route, "before_ms": jump.before_ms, "after_ms": jump.after_ms}
                emits.append(self._event("", "latency_jump", self._clock_ms, record, meta))

    def _watch_stream(
        self, state: _Symbol, stream: str, recv_ns: int, watch: StreamWatch, record: Record, emits: list[Emit]
    ) -> None:
        config, clock_ns = self.config, self._common.clock_ts_ns
        since_ns = max(recv_ns or state.values.since_ns, self._common.audible_ns.get(_ROUTES[stream], 0))
        age_ms = (clock_ns - since_ns) // _NS_PER_MS
        if recv_ns:
            why, bound_ms = (
                "rate",
                watch.bound_ms(config.silence_intervals, config.silence_least_ms, config.silence_most_ms),
            )
        else:
            why, bound_ms = "no_first_data", config.first_trade_ms if stream == "aggTrade" else config.first_data_ms
        silent = age_ms > bound_ms
        if silent == watch.silent or (watch.silent and recv_ns == watch.silent_recv_ns):
            return
        watch.silent, watch.silent_recv_ns = silent, recv_ns
        meta = {"stream": stream, "age_ms": age_ms}
        if silent:
            meta |= {"why": why, "bound_ms": bound_ms}
        event_type = "stream_silent" if silent else "stream_resumed"
        emits.append(self._event(state.name, event_type, self._clock_ms, record, meta))

    def _report(self, record: Record, emits: list[Emit]) -> None:
        """Counts since the last report, where there are any."""
        common = self._common
        common.reported_ns = common.clock_ts_ns
        for name in self._sorted:
            state = self._symbols[name]
            counts, state.values.counts = state.values.counts, {}
            pruned = state.book.take_counts()
            dropped = {_DROPPED[key]: count for key, count in counts.items() if key in _DROPPED}
            if pruned.pruned_levels:
                dropped["pruned_levels"] = pruned.pruned_levels
            if pruned.buffered_diffs:
                dropped["buffered_diffs"] = pruned.buffered_diffs
            duplicates = {_DUPLICATES[key]: count for key, count in counts.items() if key in _DUPLICATES}
            stale, state.values.stale = state.values.stale, {}
            for event_type, meta in (("duplicates", duplicates), ("dropped", dropped), ("stale_rows", stale)):
                if meta:
                    emits.append(self._event(name, event_type, self._clock_ms, record, meta))
        unused, common.unused = common.unused, {}
        unknown, common.unknown = common.unknown, {}
        for event_type, meta in (("unused_frames", unused), ("unknown_values", unknown)):
            if meta:
                emits.append(self._event("", event_type, self._clock_ms, record, meta))

    def _control(self, record: Record) -> list[Emit]:
        """Commands, changes of configuration and the end pass on with their text."""
        common = self._common
        common.clock_ts_ns = max(common.clock_ts_ns, record["recv_ts_ns"])
        value = {
            "kind": record["kind"],
            "recv_ts_ns": record["recv_ts_ns"],
            "clock_ts_ns": common.clock_ts_ns,
            "routes": {},
            "trade_ts_ms": {},
            "quote_ts_ms": {},
            "depth_ts_ms": {},
            "payload": record["payload"].decode("utf-8", "replace"),
        }
        return [(TICKS, "", value)]

    def _end(self, record: Record) -> list[Emit]:
        """The session is over: nothing more will come, so what waits is let go and what was counted is told."""
        emits = self._control(record)
        for name in self._sorted:
            state = self._symbols[name]
            if state.values.trades.held:
                self._give_up(state, record, self._clock_ms, max(state.values.trades.held), emits)
            in_row = state.values.oracle.failed_in_row
            wrong = state.values.oracle.finish()
            if wrong:
                self._book_is_wrong(state, record, self._clock_ms, wrong, in_row, emits)
        self._report(record, emits)
        self.count_oracle()
        return emits

    # -- what else the journal holds ------------------------------------------------------------------------------

    def _gap_recorded(self, record: Record) -> list[Emit]:
        """The recorder has missed something: what it cannot vouch for is begun anew."""
        emits: list[Emit] = []
        try:
            payload = _decode_gap(record["payload"])
        except UNDECODABLE as error:
            emits.append(self._undecodable(record, record["symbol"], "gap", error))
            payload = _GapPayload()
        symbol = record["symbol"]
        if symbol and symbol not in self._symbols and self._add(symbol) is None:
            return [*emits, self._one_too_many(record, symbol, "gap")]
        ts_ms = record["recv_ts_ns"] // _NS_PER_MS
        self._tally("gap_records", payload.reason)
        if payload.frames is not None:
            self._tally("missing_frames", payload.reason, payload.frames)
        meta: dict[str, Any] = {"route": record["route"], "streams": payload.streams}
        if payload.reason == "disconnected":
            emits.append(self._event("", "reconnect", ts_ms, record, meta))
        if payload.frames is not None:
            meta["frames"] = payload.frames
        if payload.ranges is not None:
            meta |= {"ranges": payload.ranges, "hull": payload.hull}
        names = [symbol] if symbol else self._sorted
        if not names:
            emits.append(self._event("", "gap", ts_ms, record, {**meta, "reason": payload.reason}))
        for name in names:
            self._frames_missing(self._symbols[name], record, payload, meta, emits)
        return emits

    def _frames_missing(
        self, state: _Symbol, record: Record, payload: _GapPayload, meta: dict[str, Any], emits: list[Emit]
    ) -> None:
        """What a gap means for one symbol. Of trades the ids prove what is missing, of diffs `pu`; of quotes nothing."""
        reason, route, ts_ms = payload.reason, record["route"], record["recv_ts_ns"] // _NS_PER_MS
        if payload.lacks("bookTicker", route):
            state.values.oracle.lose_quote()
        elif not payload.lacks("depth", route):
            if reason not in _UNPROVEN_LOSS:
                full = {**meta, "reason": reason, "gap_count": state.values.gap_count}
                self._tally("gaps", reason)
                emits.append(self._event(state.name, "gap", ts_ms, record, full))
            return
        if payload.lacks("depth", route):
            if reason not in _UNPROVEN_LOSS:
                self._resync(state, reason)
            elif state.book.state == "synced":
                state.book.mark_stale()
                age_ms = max(0, record["recv_ts_ns"] - state.values.depth_recv_ns) // _NS_PER_MS
                emits.append(self._event(state.name, "book_stale", ts_ms, record, {"why": reason, "age_ms": age_ms}))
        emits.append(self._gap(state, record, ts_ms, reason, meta))

    def _server_time(self, record: Record) -> list[Emit]:
        """Drift of the receiving clock; half the round trip is in it."""
        try:
            server_time_ms = decode_server_time(record["payload"]).server_time_ms
        except UNDECODABLE as error:
            return [self._undecodable(record, None, "server_time", error)]
        drift_ms = record["recv_ts_ns"] // _NS_PER_MS - server_time_ms
        self._common.drift_ms = drift_ms
        was_drifting = self._common.drifting
        self._common.drifting = abs(drift_ms) > self.config.clock_drift_ms
        if not self._common.drifting and not was_drifting:
            return []
        event_type = "clock_drift" if self._common.drifting else "clock_drift_cleared"
        meta = {"drift_ms": drift_ms, "limit_ms": self.config.clock_drift_ms}
        return [self._event("", event_type, server_time_ms, record, meta)]

    # -- helpers --------------------------------------------------------------------------------------------------

    @property
    def _request_ns(self) -> int:
        return self.config.request_interval_ms * _NS_PER_MS

    @property
    def _clock_ms(self) -> int:
        return self._common.clock_ts_ns // _NS_PER_MS

    def _now_ns(self, record: Record) -> int:
        """The clock of the ticks; before the first tick the receive time."""
        recv_ts_ns: int = record["recv_ts_ns"]
        return self._common.clock_ts_ns or recv_ts_ns

    def _add(self, symbol: str) -> _Symbol | None:
        """A new symbol's state; None where there are too many."""
        if len(self._symbols) >= self.config.max_symbols:
            return None
        state = self._symbols[symbol] = _Symbol(symbol, self.config)
        insort(self._sorted, symbol)
        return state

    def _tally(self, what: str, cause: str, count: int = 1) -> None:
        counts = self._common.tallies.setdefault(what, {})
        if len(counts) >= _TALLY_CAUSES and cause not in counts:
            cause = "other"
        # A trade id that is out of its mind can come to more lost trades than a state can hold.
        counts[cause] = min(counts.get(cause, 0) + count, _MOST)
        self.counted.add(what, cause, count)

    def _count(self, state: _Symbol, name: str) -> list[Emit]:
        counts, totals = state.values.counts, self._common.totals
        counts[name] = counts.get(name, 0) + 1
        totals[name] = totals.get(name, 0) + 1
        self.counted.add("totals", name)
        return []

    def _pass_over(self, name: str, unused_kind: str = "") -> list[Emit]:
        """A record that is known and not used."""
        totals, unused = self._common.totals, self._common.unused
        totals[name] = totals.get(name, 0) + 1
        self.counted.add("totals", name)
        if unused_kind and unused_kind != _HEARTBEAT:
            unused[unused_kind] = unused.get(unused_kind, 0) + 1
        return []

    def _latency(self, state: _Symbol, src: str, event_ts_ms: int | None, recv_ts_ms: int) -> int | None:
        """R - E of a row, noted by what watches it; None without E."""
        if event_ts_ms is None:
            return None
        latency_ms = recv_ts_ms - event_ts_ms
        self.note_latency_ms(latency_ms)
        common = self._common
        (common.market_latency if src == "aggTrade" else common.public_latency).note(latency_ms)
        if latency_ms > self._stale_ms:
            stale = state.values.stale
            stale[src] = stale.get(src, 0) + 1
            stale["most_ms"] = max(stale.get("most_ms", 0), latency_ms)
            self._tally("stale_rows", src)
        return latency_ms

    def _unknown_value(self, name: str, value: object) -> None:
        """A field has a value that this version does not know. The frame passes: what it means for us has not changed."""
        self._tally("unknown_values", name)
        if isinstance(value, int) and -_MOST <= value <= _MOST:
            shown = str(value)
        else:
            shown = value[:_VALUE_LENGTH] if isinstance(value, str) else type(value).__name__
        unknown, key = self._common.unknown, f"{name}={shown}"
        if key in unknown or len(unknown) < _TALLY_CAUSES:
            unknown[key] = unknown.get(key, 0) + 1

    def _gap(self, state: _Symbol, record: Record, ts_ms: int, reason: str, meta: dict[str, Any]) -> Emit:
        state.values.gap_count += 1
        self._tally("gaps", reason)
        full = {**meta, "reason": reason, "gap_count": state.values.gap_count}
        return self._event(state.name, "gap", ts_ms, record, full)

    def _event(self, symbol: str, event_type: str, ts_ms: int, record: Record, meta: dict[str, Any]) -> Emit:
        self._tally("events", event_type)
        value = {
            "symbol": symbol,
            "event_type": event_type,
            "ts_ms": ts_ms,
            "recv_ts_ms": record["recv_ts_ns"] // _NS_PER_MS,
            "meta_json": _json(meta),
        }
        return EVENTS, symbol, value

    # -- refusals -------------------------------------------------------------------------------------------------

    def _reject(self, record: Record, symbol: str | None, src: str | None, reason: str, detail: str) -> Emit:
        self._tally("rejects", reason)
        value = {
            "symbol": symbol,
            "src": src,
            "reason": reason,
            "detail": detail[:_DETAIL_LENGTH],
            "route": record["route"],
            "recv_ts_ns": record["recv_ts_ns"],
            "payload": record["payload"],
        }
        return REJECTS, symbol or "", value

    def _undecodable(self, record: Record, symbol: str | None, src: str | None, error: Exception) -> Emit:
        return self._reject(record, symbol, src, _reason_of(error, src), str(error))

    def _mismatch(self, record: Record, symbol: str, src: str, data_symbol: str, event: str) -> Emit:
        if data_symbol != symbol:
            detail = f"the stream is of {symbol}, s is {data_symbol!r}"
            return self._reject(record, symbol, src, "symbol_mismatch", detail)
        return self._reject(record, symbol, src, "type_mismatch", f"the stream is {src}, e is {event!r}")

    def _bad_quote(self, record: Record, symbol: str, bid: float, bid_qty: float, ask: float, ask_qty: float) -> Emit:
        if not (0.0 < bid < _HUGE and 0.0 < ask < _HUGE):
            reason, detail = "bad_price", f"b is {bid}, a is {ask}"
        elif not (0.0 < bid_qty < _HUGE and 0.0 < ask_qty < _HUGE):
            reason, detail = "bad_qty", f"B is {bid_qty}, A is {ask_qty}"
        else:
            reason, detail = "crossed_quote", f"b is {bid}, not below a, {ask}"
        return self._reject(record, symbol, "bookTicker", reason, detail)

    def _is_ahead(self, ts_ms: int, event_ts_ms: int, record: Record) -> bool:
        """Whether T is wrong by two clocks: one alone may be wrong itself. It would drive windows of event time far on."""
        recv_ts_ms: int = record["recv_ts_ns"] // _NS_PER_MS
        newest_ms = max(event_ts_ms, recv_ts_ms)
        return ts_ms > newest_ms + self._tolerance_ms

    def _regression(self, record: Record, symbol: str, src: str, ts_ms: int, newest: _EventTime) -> Emit:
        detail = f"T is {ts_ms}, {newest.ts_ms - ts_ms} ms behind the newest"
        return self._reject(record, symbol, src, "ts_regression", detail)

    def _one_too_many(self, record: Record, symbol: str, src: str) -> Emit:
        detail = f"{len(self._symbols)} symbols are kept (max_symbols is {self.config.max_symbols})"
        return self._reject(record, symbol, src, "too_many_symbols", detail)


def _ignore(latency_ms: int) -> None:
    """Nobody has asked."""


def _json(meta: dict[str, Any]) -> str:
    return msgspec.json.encode(meta, order="sorted").decode()


def _ahead(ts_ms: int, event_ts_ms: int) -> tuple[str, str]:
    return "ts_ahead", f"T is {ts_ms}, {ts_ms - event_ts_ms} ms ahead of E"


def _trade_refusal(trade: AggTrade | RestAggTrade) -> tuple[str, str] | None:
    """(reason, detail) where a trade must not count as one."""
    if trade.kind is not None and trade.kind in _KINDS_REFUSED:
        return _KINDS_REFUSED[trade.kind], f"X is {trade.kind}"
    if not 0.0 < trade.price < _HUGE:
        return "bad_price", f"p is {trade.price}"
    if not 0.0 < trade.qty < _HUGE:
        return "bad_qty", f"q is {trade.qty}"
    return None


def _liquidation(order: LiquidationOrder) -> tuple[float, float]:
    """Price and quantity of what was filled; of the order where nothing was."""
    price = order.average_price if order.average_price is not None and order.average_price > 0.0 else order.price
    qty = order.filled_qty if order.filled_qty is not None and order.filled_qty > 0.0 else order.qty
    return price, qty


def _reason_of(error: Exception, src: str | None) -> str:
    """The code of a decoding error. msgspec says where it is at the end: ... - at `$.data.b[7][0]`."""
    if not isinstance(error, msgspec.ValidationError):
        return "bad_json"
    text = str(error)
    if "missing required field" in text or "got `null`" in text:
        return "missing_field"
    path = text.rpartition("`$")[2].rstrip("`")
    if "[" in path and src in ("depth", "snapshot"):
        return "bad_level"
    return _FIELD_REASONS.get((src or "", path.rpartition(".")[2]), "bad_field")
