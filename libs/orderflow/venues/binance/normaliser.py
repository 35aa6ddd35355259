"""From the journal to rows: decodes frames, keeps each symbol's book and sequence of trades, refuses what is wrong.

Per symbol and independent of the others: a gap of one symbol resynchronises that symbol alone. Every frame ends as rows,
as a reject, or in a count of `totals`; nothing is dropped without one of them.

Events (`market.events`): gap, book_synced, book_stale, book_recovered, snapshot_needed, backfill_needed,
trades_backfilled, trades_lost, duplicates, dropped, unused_frames, stream_silent, stream_resumed, route_down, route_up,
clock_drift, clock_drift_cleared. `gap` and `trades_lost` raise `gap_count`.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Callable, Mapping
from typing import Annotated, Any, ClassVar, Final, Literal, TypeAlias

import msgspec
from msgspec import Meta, Struct

from orderflow.microstructure.book import LocalBook
from orderflow.microstructure.side import SideClassifier, SideConfig
from orderflow.processor import Emit, Record
from orderflow.topics import EVENTS, JOURNAL, REJECTS, ROWS, TICKS
from orderflow.venues.binance.frames import (
    ENVELOPE_PREFIX,
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
from orderflow.venues.binance.streams import KNOWN_KINDS, parse_stream
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
    "ts_regression": "T lies further back within one symbol's stream than the tolerance",
    "type_mismatch": "the stream is of another type than its data",
    "unknown_kind": "a journal record of a kind that this version does not know",
    "unknown_stream": "a stream that the exchange is not known to have",
}
"""Codes of `quality.rejects`, field `reason`."""

_PREFIX_LENGTH: Final = len(ENVELOPE_PREFIX)
_NAME_END: Final = _PREFIX_LENGTH + 128
_NS_PER_MS: Final = 1_000_000
_HUGE: Final = 1e300
_DETAIL_LENGTH: Final = 240
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

Milliseconds: TypeAlias = Annotated[int, Meta(ge=1, le=3_600_000)]


class NormaliserConfig(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Settings of `NormaliserProcessor`. Durations run on the clock of the ticks, unless T is named."""

    top_k: Annotated[int, Meta(ge=1, le=20, description="levels a side in depth rows")] = 5
    depth_stream: Annotated[
        Literal["depth", "depth@100ms", "depth@500ms"],
        Meta(description="the stream that books are kept from; each speed has its own chain of ids"),
    ] = "depth@100ms"
    max_levels: Annotated[int, Meta(ge=100, le=100_000, description="levels kept a side; deeper ones are pruned")] = (
        5000
    )
    max_buffered_diffs: Annotated[
        int, Meta(ge=10, le=100_000, description="diffs kept while a snapshot is awaited, per symbol")
    ] = 1000
    max_symbols: Annotated[int, Meta(ge=1, le=100_000, description="symbols kept per partition")] = 2000
    ts_tolerance_ms: Annotated[
        int, Meta(ge=0, le=3_600_000, description="how far T may go back within one symbol's stream")
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
    snapshot_wait_ms: Annotated[
        Milliseconds, Meta(description="how long a snapshot ahead of the diffs waits for its bracket")
    ] = 10_000
    report_ms: Annotated[Milliseconds, Meta(description="time between reports of counts")] = 10_000
    silence_ms: Annotated[Milliseconds, Meta(description="without a frame for so long a stream is silent")] = 60_000
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
        if self.silence_ms < self.book_stale_ms:
            raise ValueError(
                f"silence_ms is {self.silence_ms}: it must be at least book_stale_ms, {self.book_stale_ms}"
            )


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
    silent: list[str] = []
    trades: TradeSequence = msgspec.field(default_factory=TradeSequence)
    snapshot_why: str = "first_diff"
    snapshot_asked_ns: int = 0
    pending_since_ns: int = 0
    counts: dict[str, int] = {}
    """Since the last report."""


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


class _Common(Struct):
    """State that belongs to no symbol."""

    clock_ts_ns: int = 0
    reported_ns: int = 0
    routes: dict[str, str] = {}
    drifting: bool = False
    unused: dict[str, int] = {}
    """Frames by kind since the last report."""
    totals: dict[str, int] = {}


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


_decode_tick = msgspec.json.Decoder(_TickPayload).decode
_decode_gap = msgspec.json.Decoder(_GapPayload).decode
_Handler: TypeAlias = Callable[[str, Record], list[Emit]]


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
    def symbols(self) -> tuple[str, ...]:
        """Symbols seen in this session."""
        return tuple(self._sorted)

    def step(self, topic: str, record: Record) -> list[Emit]:
        """Take one journal record."""
        kind = record["kind"]
        if kind == "frame":
            return self._frame(record)
        handler = self._kinds.get(kind)
        if handler is None:
            return [_reject(record, record["symbol"], None, "unknown_kind", f"kind is {kind!r}")]
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
            return [_undecodable(record, record["symbol"], None, error)]
        if envelope.stream is None:
            if envelope.is_reply:
                return self._pass_over("reply")
            return [_reject(record, record["symbol"], None, "missing_stream", "neither a stream nor a reply")]
        name = parse_stream(envelope.stream)
        if name.kind not in KNOWN_KINDS:
            return [_reject(record, name.symbol, None, "unknown_stream", f"stream is {envelope.stream!r}")]
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
            return [_undecodable(record, symbol, "bookTicker", error)]
        if quote.symbol != symbol or (quote.event != "bookTicker" and quote.event):
            return [_mismatch(record, symbol, "bookTicker", quote.symbol, quote.event)]
        state = self._symbols.get(symbol) or self._add(symbol)
        if state is None:
            return [self._one_too_many(record, symbol, "bookTicker")]
        values, ts_ms, update_id = state.values, quote.ts_ms, quote.update_id
        repeated = update_id <= values.quote_update_id
        if repeated and ts_ms <= values.quote_time.ts_ms + self._tolerance_ms:
            return self._count(state, "quote_duplicate")
        bid, bid_qty, ask, ask_qty = quote.bid, quote.bid_qty, quote.ask, quote.ask_qty
        if not (0.0 < bid < ask < _HUGE and 0.0 < bid_qty < _HUGE and 0.0 < ask_qty < _HUGE):
            return [_bad_quote(record, symbol, bid, bid_qty, ask, ask_qty)]
        if not values.quote_time.admit(ts_ms, self._tolerance_ms):
            return [_regression(record, symbol, "bookTicker", ts_ms, values.quote_time)]
        emits: list[Emit] = []
        if repeated:
            meta = {"update_id": update_id, "last_update_id": values.quote_update_id}
            emits.append(self._gap(state, record, ts_ms, "quote_ids_went_back", meta))
        values.quote_update_id = update_id
        recv_ts_ns = record["recv_ts_ns"]
        values.quote_recv_ns = recv_ts_ns
        state.side.on_quote(ts_ms, bid, ask)
        event_ts_ms = quote.event_ts_ms
        recv_ts_ms = recv_ts_ns // _NS_PER_MS
        latency_ms = None if event_ts_ms is None else recv_ts_ms - event_ts_ms
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
            return [_undecodable(record, symbol, "depth", error)]
        if diff.symbol != symbol or (diff.event != "depthUpdate" and diff.event):
            return [_mismatch(record, symbol, "depth", diff.symbol, diff.event)]
        if diff.first_id > diff.final_id:
            return [_reject(record, symbol, "depth", "bad_ids", f"U is {diff.first_id}, above u, {diff.final_id}")]
        state = self._symbols.get(symbol) or self._add(symbol)
        if state is None:
            return [self._one_too_many(record, symbol, "depth")]
        values, book, ts_ms = state.values, state.book, diff.ts_ms
        repeated = book.seen(diff.final_id)
        if repeated and ts_ms <= values.depth_time.ts_ms + self._tolerance_ms:
            return self._count(state, "diff_duplicate")
        if not values.depth_time.admit(ts_ms, self._tolerance_ms):
            return [_regression(record, symbol, "depth", ts_ms, values.depth_time)]
        values.depth_recv_ns = record["recv_ts_ns"]
        emits: list[Emit] = []
        if repeated:
            meta = {"last_u": book.last_update_id, "U": diff.first_id, "u": diff.final_id}
            emits.append(self._gap(state, record, ts_ms, "update_ids_went_back", meta))
            values.snapshot_why = "update_ids_went_back"
            book.resync()
        was_stale, last_id = book.state == "stale", book.last_update_id
        outcome = book.apply_diff(diff.first_id, diff.final_id, diff.prev_id, diff.bids, diff.asks)
        if outcome == "applied":
            if was_stale:
                emits.append(self._event(symbol, "book_recovered", ts_ms, record, {"u": diff.final_id}))
            emits.append(self._depth_row(state, record, diff))
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
            emits.append(self._depth_row(state, record, diff))
            return
        if outcome == "crossed":
            state.values.snapshot_why = "crossed_book"
            emits.append(_reject(record, state.name, "depth", "crossed_book", f"after the diff ending at {ids['u']}"))
            emits.append(self._gap(state, record, ts_ms, "crossed_book", ids))
        else:
            self._count(state, "diff_buffered")
        if outcome == "gap":
            state.values.snapshot_why = "pu_mismatch"
            emits.append(self._gap(state, record, ts_ms, "pu_mismatch", ids))
        elif outcome == "snapshot_too_old":
            state.values.snapshot_why = "snapshot_too_old"
        self._ask_snapshot(state, record, ts_ms, emits)

    def _depth_row(self, state: _Symbol, record: Record, diff: DepthUpdate) -> Emit:
        book = state.book
        bid_px, bid_qtys, ask_px, ask_qtys = book.top(self.config.top_k)
        bid, bid_qty = (bid_px[0], bid_qtys[0]) if bid_px else (None, None)
        ask, ask_qty = (ask_px[0], ask_qtys[0]) if ask_px else (None, None)
        event_ts_ms = diff.event_ts_ms
        recv_ts_ms = record["recv_ts_ns"] // _NS_PER_MS
        latency_ms = None if event_ts_ms is None else recv_ts_ms - event_ts_ms
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
        return ROWS, state.name, row

    def _snapshot_arrived(self, record: Record) -> list[Emit]:
        try:
            snapshot = decode_snapshot(record["payload"])
        except UNDECODABLE as error:
            return [_undecodable(record, record["symbol"], "snapshot", error)]
        symbol = record["symbol"] or snapshot.symbol
        if not symbol:
            return [_reject(record, None, "snapshot", "missing_field", "a snapshot without a symbol")]
        state = self._symbols.get(symbol) or self._add(symbol)
        if state is None:
            return [self._one_too_many(record, symbol, "snapshot")]
        ts_ms = snapshot.ts_ms or record["recv_ts_ns"] // _NS_PER_MS
        emits: list[Emit] = []
        outcome = state.book.apply_snapshot(snapshot.last_update_id, snapshot.bids, snapshot.asks)
        if outcome == "synced":
            emits.append(self._synced(state, record, ts_ms))
        elif outcome == "waiting":
            state.values.pending_since_ns = self._now_ns(record)
        elif outcome == "ignored":
            self._count(state, "snapshot_ignored")
        elif outcome == "crossed":
            detail = f"snapshot with lastUpdateId {snapshot.last_update_id}"
            emits.append(_reject(record, symbol, "snapshot", "crossed_book", detail))
            state.values.snapshot_why = "crossed_book"
        else:
            state.values.snapshot_why = "snapshot_too_old"
        self._ask_snapshot(state, record, ts_ms, emits)
        return emits

    def _synced(self, state: _Symbol, record: Record, ts_ms: int) -> Emit:
        state.values.snapshot_why = "resync"
        state.values.snapshot_asked_ns = 0
        bids, asks = state.book.levels
        meta = {"u": state.book.last_update_id, "bid_levels": bids, "ask_levels": asks}
        return self._event(state.name, "book_synced", ts_ms, record, meta)

    def _ask_snapshot(self, state: _Symbol, record: Record, ts_ms: int, emits: list[Emit]) -> None:
        """Ask for a snapshot where only that helps, at most once per interval."""
        values, book = state.values, state.book
        if not book.wants_snapshot:
            return
        now_ns = self._now_ns(record)
        if values.snapshot_asked_ns and 0 <= now_ns - values.snapshot_asked_ns < self._request_ns:
            return
        values.snapshot_asked_ns = now_ns
        meta = {"why": values.snapshot_why, "want_update_id": book.wanted_update_id, "buffered": book.buffered}
        emits.append(self._event(state.name, "snapshot_needed", ts_ms, record, meta))

    # -- trades ---------------------------------------------------------------------------------------------------

    def _on_trade(self, symbol: str, record: Record) -> list[Emit]:
        try:
            trade = decode_agg_trade(record["payload"]).data
        except UNDECODABLE as error:
            return [_undecodable(record, symbol, "aggTrade", error)]
        if trade.symbol != symbol or (trade.event != "aggTrade" and trade.event):
            return [_mismatch(record, symbol, "aggTrade", trade.symbol, trade.event)]
        state = self._symbols.get(symbol) or self._add(symbol)
        if state is None:
            return [self._one_too_many(record, symbol, "aggTrade")]
        values = state.values
        values.trade_recv_ns = record["recv_ts_ns"]
        refusal = _trade_refusal(trade)
        sequence = values.trades
        if trade.agg_trade_id != sequence.next_id or sequence.held or refusal is not None:
            return self._trade_out_of_line(state, record, trade, refusal)
        sequence.next_id += 1
        if not values.trade_time.admit(trade.ts_ms, self._tolerance_ms):
            return [_regression(record, symbol, "aggTrade", trade.ts_ms, values.trade_time)]
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
            emits.append(_reject(record, state.name, "aggTrade", *refusal))
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
            self._give_up(state, record, trade.ts_ms, max(sequence.held), emits)
        if len(sequence.held) > waiting and refusal is None:
            self._count(state, "trade_held")
        self._ask_backfill(state, record, trade.ts_ms, emits)
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
                emits.append(_regression(source, state.name, "aggTrade", trade.ts_ms, values.trade_time))
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

    def _give_up(self, state: _Symbol, record: Record, ts_ms: int, up_to_id: int, emits: list[Emit]) -> None:
        """Stop waiting for what is missing below `up_to_id`: say which ids are lost, let the rest go."""
        losses, trades = state.values.trades.give_up(up_to_id)
        if losses:
            state.values.gap_count += 1
            meta = {
                "ranges": losses,
                "trades": sum(high - low + 1 for low, high in losses),
                "gap_count": state.values.gap_count,
            }
            emits.append(self._event(state.name, "trades_lost", ts_ms, record, meta))
        self._let_go(state, record, trades, emits)

    def _ask_backfill(self, state: _Symbol, record: Record, ts_ms: int, emits: list[Emit]) -> None:
        """Ask for the first ids that are missing: at once, and again per interval while they are."""
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
            return [_undecodable(record, symbol, "backfill", error)]
        if not symbol:
            return [_reject(record, None, "backfill", "missing_field", "a backfill without a symbol")]
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
                emits.append(_reject(record, symbol, "backfill", *refusal))
            sequence.held[number] = self._backfilled(record, trade, refused=refusal is not None)
            sequence.filled += refusal is None
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
        latency_ms = None if event_ts_ms is None else recv_ts_ms - event_ts_ms
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
            return [_undecodable(record, symbol, "markPrice", error)]
        if mark.symbol != symbol or (mark.event != "markPriceUpdate" and mark.event):
            return [_mismatch(record, symbol, "markPrice", mark.symbol, mark.event)]
        if not 0.0 < mark.mark_price < _HUGE:
            return [_reject(record, symbol, "markPrice", "bad_price", f"p is {mark.mark_price}")]
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
            return [_undecodable(record, symbol, "forceOrder", error)]
        order = data.order
        if order.symbol != symbol or (data.event != "forceOrder" and data.event):
            return [_mismatch(record, symbol, "forceOrder", order.symbol, data.event)]
        price, qty = _liquidation(order)
        if not 0.0 < price < _HUGE:
            return [_reject(record, symbol, "forceOrder", "bad_price", f"p is {order.price}")]
        if not 0.0 < qty < _HUGE:
            return [_reject(record, symbol, "forceOrder", "bad_qty", f"q is {order.qty}")]
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
            emits.append(_undecodable(record, None, "tick", error))
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
        for name in self._sorted:
            self._symbol_tick(self._symbols[name], record, emits)
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
            self._ask_backfill(state, record, clock_ms, emits)
        self._watch_silence(state, record, emits)

    def _watch_silence(self, state: _Symbol, record: Record, emits: list[Emit]) -> None:
        """Streams that have said something once and nothing for long: `depth` alive says nothing about `aggTrade`."""
        values, clock_ns = state.values, self._common.clock_ts_ns
        silence_ns = self.config.silence_ms * _NS_PER_MS
        for stream, recv_ns in (
            ("aggTrade", values.trade_recv_ns),
            ("bookTicker", values.quote_recv_ns),
            ("depth", values.depth_recv_ns),
        ):
            silent = recv_ns > 0 and clock_ns - recv_ns > silence_ns
            if silent == (stream in values.silent):
                continue
            meta = {"stream": stream, "age_ms": (clock_ns - recv_ns) // _NS_PER_MS}
            if silent:
                insort(values.silent, stream)
            else:
                values.silent.remove(stream)
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
            for event_type, meta in (("duplicates", duplicates), ("dropped", dropped)):
                if meta:
                    emits.append(self._event(name, event_type, self._clock_ms, record, meta))
        if common.unused:
            unused, common.unused = common.unused, {}
            emits.append(self._event("", "unused_frames", self._clock_ms, record, unused))

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
        self._report(record, emits)
        return emits

    # -- what else the journal holds ------------------------------------------------------------------------------

    def _gap_recorded(self, record: Record) -> list[Emit]:
        """The recorder has missed something: what it cannot vouch for is begun anew."""
        emits: list[Emit] = []
        try:
            payload = _decode_gap(record["payload"])
        except UNDECODABLE as error:
            emits.append(_undecodable(record, record["symbol"], "gap", error))
            payload = _GapPayload()
        symbol = record["symbol"]
        if symbol and symbol not in self._symbols and self._add(symbol) is None:
            return [*emits, self._one_too_many(record, symbol, "gap")]
        if payload.streams:
            diffs_missing = any("depth" in stream for stream in payload.streams)
        else:
            diffs_missing = record["route"] != "market"
        meta = {"route": record["route"], "streams": payload.streams}
        ts_ms = record["recv_ts_ns"] // _NS_PER_MS
        names = [symbol] if symbol else self._sorted
        if not names:
            emits.append(self._event("", "gap", ts_ms, record, {**meta, "reason": payload.reason}))
        for name in names:
            state = self._symbols[name]
            if diffs_missing:
                state.book.resync()
                state.values.snapshot_why = payload.reason
            emits.append(self._gap(state, record, ts_ms, payload.reason, meta))
        return emits

    def _server_time(self, record: Record) -> list[Emit]:
        """Drift of the receiving clock; half the round trip is in it."""
        try:
            server_time_ms = decode_server_time(record["payload"]).server_time_ms
        except UNDECODABLE as error:
            return [_undecodable(record, None, "server_time", error)]
        drift_ms = record["recv_ts_ns"] // _NS_PER_MS - server_time_ms
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

    def _count(self, state: _Symbol, name: str) -> list[Emit]:
        counts, totals = state.values.counts, self._common.totals
        counts[name] = counts.get(name, 0) + 1
        totals[name] = totals.get(name, 0) + 1
        return []

    def _pass_over(self, name: str, unused_kind: str = "") -> list[Emit]:
        """A record that is known and not used."""
        totals, unused = self._common.totals, self._common.unused
        totals[name] = totals.get(name, 0) + 1
        if unused_kind:
            unused[unused_kind] = unused.get(unused_kind, 0) + 1
        return []

    def _gap(self, state: _Symbol, record: Record, ts_ms: int, reason: str, meta: dict[str, Any]) -> Emit:
        state.values.gap_count += 1
        full = {**meta, "reason": reason, "gap_count": state.values.gap_count}
        return self._event(state.name, "gap", ts_ms, record, full)

    def _event(self, symbol: str, event_type: str, ts_ms: int, record: Record, meta: dict[str, Any]) -> Emit:
        value = {
            "symbol": symbol,
            "event_type": event_type,
            "ts_ms": ts_ms,
            "recv_ts_ms": record["recv_ts_ns"] // _NS_PER_MS,
            "meta_json": _json(meta),
        }
        return EVENTS, symbol, value

    def _one_too_many(self, record: Record, symbol: str, src: str) -> Emit:
        detail = f"{len(self._symbols)} symbols are kept (max_symbols is {self.config.max_symbols})"
        return _reject(record, symbol, src, "too_many_symbols", detail)


def _json(meta: dict[str, Any]) -> str:
    return msgspec.json.encode(meta, order="sorted").decode()


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


def _reject(record: Record, symbol: str | None, src: str | None, reason: str, detail: str) -> Emit:
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


def _undecodable(record: Record, symbol: str | None, src: str | None, error: Exception) -> Emit:
    return _reject(record, symbol, src, _reason_of(error, src), str(error))


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


def _mismatch(record: Record, symbol: str, src: str, data_symbol: str, event: str) -> Emit:
    if data_symbol != symbol:
        return _reject(record, symbol, src, "symbol_mismatch", f"the stream is of {symbol}, s is {data_symbol!r}")
    return _reject(record, symbol, src, "type_mismatch", f"the stream is {src}, e is {event!r}")


def _bad_quote(record: Record, symbol: str, bid: float, bid_qty: float, ask: float, ask_qty: float) -> Emit:
    if not (0.0 < bid < _HUGE and 0.0 < ask < _HUGE):
        reason, detail = "bad_price", f"b is {bid}, a is {ask}"
    elif not (0.0 < bid_qty < _HUGE and 0.0 < ask_qty < _HUGE):
        reason, detail = "bad_qty", f"B is {bid_qty}, A is {ask_qty}"
    else:
        reason, detail = "crossed_quote", f"b is {bid}, not below a, {ask}"
    return _reject(record, symbol, "bookTicker", reason, detail)


def _regression(record: Record, symbol: str, src: str, ts_ms: int, newest: _EventTime) -> Emit:
    return _reject(record, symbol, src, "ts_regression", f"T is {ts_ms}, {newest.ts_ms - ts_ms} ms behind the newest")
