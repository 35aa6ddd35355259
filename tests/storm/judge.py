"""Judges a storm from outside: the exchange's own frames and what its faults did are the truth.

Of the pipeline nothing is imported but the codec that reads the journal's bytes.
"""

from __future__ import annotations

from bisect import bisect_right, insort
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from math import fsum, isclose
from typing import Any, Final

import msgspec

from tests.storm.recovery import isolated_recoveries, unnoticed
from tests.storm.world import Life, Output, Result, codecs, number_after

TOP: Final = 5
QUIET_SEC: Final = 30.0
"""So long before the end all must be well, without a break."""
ATTEMPTS_MOST: Final = 300
ATTEMPTS_SEC: Final = 300.0
SAID_MOST: Final = 40
HEARTBEAT: Final = "markPrice"
HEARTBEAT_ROUTE: Final = "market"
"""That stream of one symbol is subscribed there whether anybody wants its rows or not: it speaks every second."""
_REPLIES: Final = (b'{"result"', b'{"error"', b'{"id"')
_STREAM_AT: Final = len(b'{"stream":"')


class _Trade(msgspec.Struct):
    a: int
    p: float
    q: float
    T: int
    m: bool


class _Quote(msgspec.Struct):
    u: int
    b: float
    B: float
    a: float
    A: float


class _Diff(msgspec.Struct):
    U: int
    u: int
    pu: int
    b: list[tuple[float, float]]
    a: list[tuple[float, float]]


class _Book(msgspec.Struct):
    lastUpdateId: int
    bids: list[tuple[float, float]]
    asks: list[tuple[float, float]]


class _TradeFrame(msgspec.Struct):
    data: _Trade


class _QuoteFrame(msgspec.Struct):
    data: _Quote


class _DiffFrame(msgspec.Struct):
    data: _Diff


_decode_trade = msgspec.json.Decoder(_TradeFrame, strict=False).decode
_decode_quote = msgspec.json.Decoder(_QuoteFrame, strict=False).decode
_decode_diff = msgspec.json.Decoder(_DiffFrame, strict=False).decode
_decode_book = msgspec.json.Decoder(_Book, strict=False).decode
Top = tuple[list[float], list[float], list[float], list[float]]


@dataclass(slots=True)
class Verdict:
    """What is wrong, and how long things took."""

    violations: list[str] = field(default_factory=list)
    recoveries: list[tuple[str, float]] = field(default_factory=list)
    """(kind, seconds) of each fault that no other disturbed."""
    counts: Counter[str] = field(default_factory=Counter)
    """What was compared: a judge that looked at nothing has proved nothing."""

    def wrong(self, text: str) -> None:
        if len(self.violations) < SAID_MOST:
            self.violations.append(text)


@dataclass(slots=True)
class Entry:
    """A record of the journal's canonical view."""

    partition: int
    epoch: int
    seq: int
    kind: str
    symbol: str | None
    payload: bytes
    recv_ts_ns: int


def judge(result: Result) -> Verdict:
    """Everything that must hold of a run."""
    verdict = Verdict()
    for error in result.errors:
        verdict.wrong(error)
    journal = list(read_journal(result, verdict))
    check_frames(result, journal, verdict)
    check_answers(result, journal, verdict)
    truth = Market(result)
    check_trades(result, truth, verdict)
    check_quotes(result, truth, journal, verdict)
    check_books(result, truth, verdict)
    check_end(result, verdict)
    check_attempts(result, verdict)
    verdict.recoveries = isolated_recoveries(result)
    for text in unnoticed(result):
        verdict.wrong(text)
    return verdict


# The journal


def read_journal(result: Result, verdict: Verdict) -> Iterator[Entry]:
    """The canonical view: the newest epoch only, numbers from 1 on without holes."""
    decode = codecs().decoder("market.journal")
    for partition, records in sorted(result.journal.items()):
        newest, last = 0, 0
        for record in records:
            epoch = next((int(value) for name, value in record.headers if name == "epoch"), 0)
            if epoch < newest or record.value is None:
                continue
            newest = epoch
            entry = decode(record.value)
            if entry["kind"] == "open":
                continue
            if entry["seq"] != last + 1:
                verdict.wrong(f"journal {partition}: {entry['seq']} follows {last} at offset {record.offset}")
            last = entry["seq"]
            verdict.counts["journal"] += 1
            yield Entry(partition, epoch, last, entry["kind"], entry["symbol"], entry["payload"], entry["recv_ts_ns"])


def _stream_of(frame: bytes) -> tuple[str, str]:
    """(symbol, form of the stream) by the frame's head; empty where it has none."""
    if not frame.startswith(b'{"stream":"'):
        return "", ""
    name = frame[_STREAM_AT : frame.find(b'"', _STREAM_AT, _STREAM_AT + 100)].decode("utf-8", "replace")
    symbol, _, stream = name.partition("@")
    return symbol.upper(), stream


def check_frames(result: Result, journal: list[Entry], verdict: Verdict) -> None:
    """What a recorder took from a socket is in the journal, in its order, or a gap tells of it."""
    written: dict[int, list[Entry]] = defaultdict(list)
    for entry in journal:
        written[entry.epoch].append(entry)
    known = {life.last_status.get("epoch", 0) for life in result.lives}
    for epoch, entries in written.items():
        if epoch not in known and any(entry.kind == "frame" for entry in entries):
            verdict.wrong(f"the journal has frames of epoch {epoch}, which no recorder had")
    _check_restarts(journal, verdict)
    for life in result.lives:
        _check_life(life, written.get(life.last_status.get("epoch", 0), []), verdict)


def _check_restarts(journal: list[Entry], verdict: Verdict) -> None:
    """A recorder that goes on where another one stood says first that something may be missing, or begins a session."""
    for before, after in pairwise(journal):
        if before.partition == after.partition and before.epoch != after.epoch:
            verdict.counts["restarts"] += 1
            told = after.kind == "config" or (after.kind == "gap" and b'"restart"' in after.payload)
            if not told:
                verdict.wrong(f"journal {after.partition} seq {after.seq}: a new recorder begins with a {after.kind}")


def _check_life(life: Life, entries: list[Entry], verdict: Verdict) -> None:
    taken = [each.frame for each in life.taken if not each.frame.startswith(_REPLIES)]
    budget = Counter(taken)
    places: dict[bytes, int] = {}
    journalled: Counter[bytes] = Counter()
    for place, entry in enumerate(entries):
        if entry.kind == "frame":
            journalled[entry.payload] += 1
            places[entry.payload] = place
            verdict.counts["frames"] += 1
            if journalled[entry.payload] > budget[entry.payload]:
                verdict.wrong(f"journal {entry.partition} seq {entry.seq}: a frame that came from no socket")
    _check_order(life, entries, verdict)
    lost = _lost(life, taken, places, entries)
    told: Counter[tuple[str, str]] = Counter()
    for entry in entries:
        if entry.kind == "gap":
            gap = msgspec.json.decode(entry.payload)
            if gap.get("frames"):
                told[entry.symbol or "", gap["streams"][0].partition("@")[0]] += gap["frames"]
    for key in sorted(set(lost) | set(told)):
        # What a process that was ended had lost and not told yet belongs to the gap of its restart.
        if lost[key] != told[key] and not (life.ending != "over" and told[key] <= lost[key]):
            verdict.wrong(
                f"recorder {life.number}: {lost[key]} frames of {key} are not in the journal, gaps tell of {told[key]}"
            )


def _lost(life: Life, taken: list[bytes], places: dict[bytes, int], entries: list[Entry]) -> Counter[tuple[str, str]]:
    """Frames that are not in the journal, by (symbol, kind), less those in whose place stands a gap without a count."""
    covering: dict[tuple[str, str], list[int]] = defaultdict(list)
    by_stream: dict[tuple[str, str], list[bytes]] = defaultdict(list)
    for frame in taken:
        symbol, stream = _stream_of(frame)
        by_stream[symbol, stream.partition("@")[0]].append(frame)
    for place, entry in enumerate(entries):
        gap: dict[str, Any] = msgspec.json.decode(entry.payload) if entry.kind == "gap" else {"frames": 1}
        if not gap.get("frames"):
            kinds = {stream.partition("@")[0] for stream in gap["streams"]}
            if entry.symbol is None and gap.get("route") == HEARTBEAT_ROUTE:
                # Of the route as a whole: its heartbeat, which nobody has asked for as data, is not named in it.
                kinds.add(HEARTBEAT)
            for key in by_stream:
                if entry.symbol in (None, key[0]) and (not kinds or key[1] in kinds):
                    covering[key].append(place)
    lost: Counter[tuple[str, str]] = Counter()
    for key, frames in by_stream.items():
        waiting, before = 0, -1
        for frame in frames:
            written = places.get(frame)
            if written is None:
                waiting += 1
                continue
            if waiting and not any(before < told < written for told in covering[key]):
                lost[key] += waiting
            waiting, before = 0, written
        # Behind what a stream has last in the journal: what a process had not written when it was ended.
        if waiting and life.ending == "over" and not any(before < told for told in covering[key]):
            lost[key] += waiting
    return +lost


def _check_order(life: Life, entries: list[Entry], verdict: Verdict) -> None:
    """Within a connection and a stream the journal keeps the order of arrival."""
    places: dict[bytes, list[int]] = defaultdict(list)
    for index, each in enumerate(life.taken):
        places[each.frame].append(index)
    newest: dict[tuple[int, int, tuple[str, str]], int] = {}
    for entry in entries:
        if entry.kind != "frame" or not places[entry.payload]:
            continue
        index = places[entry.payload].pop(0)
        # A frame cut short may be of no known symbol, and lie in another partition.
        key = entry.partition, life.taken[index].connection, _stream_of(entry.payload)
        if index < newest.get(key, -1):
            verdict.wrong(f"journal {entry.partition} seq {entry.seq}: {key[2]} is out of the order of arrival")
        newest[key] = index


def check_answers(result: Result, journal: list[Entry], verdict: Verdict) -> None:
    """Snapshots and missing trades in the journal are bytes that the exchange answered with."""
    bodies = {answer.body for life in result.lives for answer in life.answers}
    for entry in journal:
        if entry.kind in ("snapshot", "backfill", "server_time"):
            verdict.counts["answers"] += 1
            if entry.payload not in bodies:
                verdict.wrong(
                    f"journal {entry.partition} seq {entry.seq}: a {entry.kind} that the exchange did not give"
                )


# The market


class Market:
    """The exchange's own frames, by symbol and id."""

    def __init__(self, result: Result) -> None:
        self.trades: dict[str, dict[int, _Trade]] = defaultdict(dict)
        self.quotes: dict[str, dict[int, _Quote]] = defaultdict(dict)
        self.quote_ids: dict[str, list[int]] = defaultdict(list)
        self.diffs: dict[str, list[_Diff]] = defaultdict(list)
        self.frames: set[bytes] = set()
        for frame in result.market:
            name, _, stream = frame.stream.partition("@")
            symbol = name.upper()
            if stream == "aggTrade":
                trade = _decode_trade(frame.payload).data
                self.trades[symbol][trade.a] = trade
            elif stream == "bookTicker":
                quote = _decode_quote(frame.payload).data
                self.quotes[symbol][quote.u] = quote
                self.quote_ids[symbol].append(quote.u)
                self.frames.add(frame.payload)
            elif stream == "depth@100ms":
                self.diffs[symbol].append(_decode_diff(frame.payload).data)

    def newest_quote(self, symbol: str, update_id: int) -> _Quote | None:
        """The quote with the greatest id not above `update_id`."""
        ids = self.quote_ids[symbol]
        place = bisect_right(ids, update_id)
        return self.quotes[symbol][ids[place - 1]] if place else None


class _TrueSide:
    """One side of the true book; `sign` +1 for bids."""

    def __init__(self, sign: int, levels: Iterable[tuple[float, float]]) -> None:
        self._sign = sign
        self._qty: dict[float, float] = {}
        self._keys: list[float] = []
        for price, qty in levels:
            self.put(price, qty)

    def put(self, price: float, qty: float) -> None:
        key = -self._sign * price
        if qty:
            if key not in self._qty:
                insort(self._keys, key)
            self._qty[key] = qty
        elif self._qty.pop(key, None) is not None:
            self._keys.remove(key)

    def top(self) -> tuple[list[float], list[float]]:
        keys = self._keys[:TOP]
        return [-self._sign * key for key in keys], [self._qty[key] for key in keys]


def true_tops(opening: bytes, diffs: list[_Diff], wanted: set[int]) -> dict[int, Top]:
    """The best levels after the diffs that end at the wanted ids."""
    book = _decode_book(opening)
    bids, asks = _TrueSide(1, book.bids), _TrueSide(-1, book.asks)
    tops: dict[int, Top] = {}
    for diff in diffs:
        for side, levels in ((bids, diff.b), (asks, diff.a)):
            for price, qty in levels:
                side.put(price, qty)
        if diff.u in wanted:
            tops[diff.u] = (*bids.top(), *asks.top())
    return tops


# Rows


def _by_symbol(outputs: list[Output], source: str) -> dict[tuple[str, int], list[Output]]:
    """Rows of a source by (symbol, session)."""
    found: dict[tuple[str, int], list[Output]] = defaultdict(list)
    for output in outputs:
        if output.record["src"] == source:
            found[output.record["symbol"], output.session].append(output)
    return found


def check_trades(result: Result, truth: Market, verdict: Verdict) -> None:
    """Every trade once, in order, with its true values; what is missing was reported, id by id."""
    lost: dict[tuple[str, int], set[int]] = defaultdict(set)
    for event in result.events:
        if event.record["event_type"] == "trades_lost":
            for low, high in msgspec.json.decode(event.record["meta_json"])["ranges"]:
                lost[event.record["symbol"], event.session].update(range(low, high + 1))
    for (symbol, session), rows in sorted(_by_symbol(result.rows, "aggTrade").items()):
        market = truth.trades[symbol]
        ids = [row.record["agg_trade_id"] for row in rows]
        for before, after in pairwise(ids):
            if after <= before:
                verdict.wrong(f"{symbol}: trade {after} follows {before}")
        reported = lost[symbol, session]
        expected = [number for number in range(ids[0], ids[-1] + 1) if number not in reported]
        absent = sorted(set(expected) - set(ids))
        if absent:
            verdict.wrong(f"{symbol}: {len(absent)} trades from {absent[0]} on are missing and nobody said so")
        both = reported & set(ids)
        if both:
            verdict.wrong(f"{symbol}: trades {sorted(both)[:3]} are rows and reported as lost")
        for row in rows:
            verdict.counts["trades"] += 1
            _check_trade(symbol, row.record, market.get(row.record["agg_trade_id"]), verdict)
        ours = fsum(_signed(row.record["side"] == "buy", row.record["qty"]) for row in rows)
        theirs = fsum(_signed(not market[number].m, market[number].q) for number in expected if number in market)
        if not isclose(ours, theirs, rel_tol=1e-12, abs_tol=1e-9):
            verdict.wrong(f"{symbol}: signed volume is {ours}, the market's less what was reported is {theirs}")


def _signed(bought: bool, qty: float) -> float:
    return qty if bought else -qty


def _check_trade(symbol: str, row: dict[str, Any], trade: _Trade | None, verdict: Verdict) -> None:
    if trade is None:
        verdict.wrong(f"{symbol}: trade {row['agg_trade_id']} never happened")
    elif (row["price"], row["qty"], row["side"]) != (trade.p, trade.q, "sell" if trade.m else "buy"):
        verdict.wrong(f"{symbol}: trade {trade.a} is {row['side']} {row['qty']} at {row['price']}, in truth {trade}")


def check_quotes(result: Result, truth: Market, journal: list[Entry], verdict: Verdict) -> None:
    """Quotes with their true values, in order; one that was journalled in its turn is a row."""
    seen: dict[str, set[int]] = defaultdict(set)
    for (symbol, _), rows in sorted(_by_symbol(result.rows, "bookTicker").items()):
        newest = -1
        for row in rows:
            number = row.record["update_id"]
            verdict.counts["quotes"] += 1
            quote = truth.quotes[symbol].get(number)
            if number <= newest:
                verdict.wrong(f"{symbol}: quote {number} follows {newest}")
            newest = number
            seen[symbol].add(number)
            values = tuple(row.record[name] for name in ("bid", "bid_qty", "ask", "ask_qty"))
            if quote is None or values != (quote.b, quote.B, quote.a, quote.A):
                verdict.wrong(f"{symbol}: quote {number} is {values}, in truth {quote}")
    newest_of: dict[str, int] = defaultdict(int)
    for entry in journal:
        if entry.kind == "frame" and entry.payload in truth.frames:
            symbol = _stream_of(entry.payload)[0]
            number = number_after(entry.payload, b'"u":')
            if number > newest_of[symbol]:
                newest_of[symbol] = number
                if number not in seen[symbol]:
                    verdict.wrong(f"{symbol}: quote {number} is in the journal (seq {entry.seq}) and no row")


def check_books(result: Result, truth: Market, verdict: Verdict) -> None:
    """A book that calls itself synced is the true one, and agrees with the newest quote at or below it."""
    for (symbol, _), rows in sorted(_by_symbol(result.rows, "depth").items()):
        synced = [row.record for row in rows if row.record["book_state"] == "synced"]
        wanted = {row["update_id"] for row in synced}
        tops = true_tops(result.opening[symbol], truth.diffs[symbol], wanted)
        for row in synced:
            verdict.counts["books"] += 1
            number = row["update_id"]
            shown = (row["bid_px"], row["bid_qtys"], row["ask_px"], row["ask_qtys"])
            if shown != tops.get(number):
                verdict.wrong(f"{symbol}: the book at {number} is {shown}, in truth {tops.get(number)}")
            quote = truth.newest_quote(symbol, number)
            if quote and (row["bid"], row["bid_qty"], row["ask"], row["ask_qty"]) != (
                quote.b,
                quote.B,
                quote.a,
                quote.A,
            ):
                verdict.wrong(f"{symbol}: the best of the book at {number} is not that of quote {quote.u}")


# The end, and manners


def check_end(result: Result, verdict: Verdict) -> None:
    """After the quiet end all is well."""
    end_sec = result.options.duration_ms / 1000
    for sample in result.samples:
        if sample.at_sec > end_sec - QUIET_SEC and sample.unwell:
            verdict.wrong(f"at {sample.at_sec:.1f} s, {end_sec - sample.at_sec:.0f} s before the end: {sample.unwell}")
            return
    verdict.counts["samples"] += len(result.samples)


def check_attempts(result: Result, verdict: Verdict) -> None:
    """The exchange bans addresses that connect too often."""
    attempts = result.attempts
    for index in range(ATTEMPTS_MOST, len(attempts)):
        if attempts[index] - attempts[index - ATTEMPTS_MOST] < ATTEMPTS_SEC:
            verdict.wrong(f"{ATTEMPTS_MOST} attempts to connect within {ATTEMPTS_SEC:g} s at {attempts[index]:.0f} s")
            return
