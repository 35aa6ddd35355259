"""A local order book kept from one snapshot and a stream of diffs, by the rule of Binance's futures.

The rule ("How to manage a local order book correctly", USD-M futures): diffs are buffered until a snapshot has come;
diffs whose final id `u` lies below the snapshot's `lastUpdateId` L are dropped; the first one applied must bracket L;
from then on each diff's `pu` must equal the `u` before it. Quantities are absolute, 0 removes a level.

A diff brackets L where `pu <= L <= u`. The documentation has `U <= L <= u`; between `pu` and `U` the stream has no
update, so a snapshot taken there is the state at `pu`. Without this a quiet symbol might never find its bracket.

`pu` is tested for every diff, not only while synchronising. The spot test `U == u_before + 1` is wrong here: ids are
shared between symbols.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence
from typing import Final, Literal, TypeAlias

import msgspec

BookStatus: TypeAlias = Literal["none", "resyncing", "synced", "stale"]
"""none: nothing seen yet; resyncing: waiting for a snapshot or its bracket; stale: whole, but maybe no longer current."""

Level: TypeAlias = tuple[float, float]
"""(price, quantity): quote units and base units."""

DiffOutcome: TypeAlias = Literal["applied", "synced", "buffered", "duplicate", "gap", "crossed", "snapshot_too_old"]
"""applied: in the chain. synced: applied, and it bracketed the snapshot that waited. buffered: kept for a snapshot.
duplicate: `u` not above what was seen. gap: `pu` is not the last `u`; the book was dropped and this diff is the first of
the new chain. crossed: after it best bid >= best ask; dropped likewise. snapshot_too_old: buffered, and it shows that
the snapshot that waited lies before the chain, so another is needed."""

SnapshotOutcome: TypeAlias = Literal["synced", "waiting", "too_old", "crossed", "ignored"]
"""synced: bracketed by what was buffered. waiting: ahead of every diff seen, its bracket is still to come. too_old:
before the first buffered diff, another is needed. crossed: refused. ignored: the book needs none."""

DEFAULT_MAX_LEVELS: Final = 5000
DEFAULT_MAX_BUFFERED: Final = 1000


class Diff(msgspec.Struct, array_like=True, frozen=True, gc=False):
    """A buffered diff. Ids are the exchange's update ids: U, u, pu."""

    first_id: int
    final_id: int
    prev_id: int
    bids: list[Level]
    asks: list[Level]


class _Pending(msgspec.Struct, array_like=True, frozen=True):
    """A snapshot that waits for its bracketing diff."""

    last_update_id: int
    bids: list[Level]
    asks: list[Level]


class BookCounts(msgspec.Struct):
    """What was dropped since the counts were last taken."""

    pruned_levels: int = 0
    """Levels beyond the bound, deepest first."""
    buffered_diffs: int = 0
    """Diffs that fell out of a full buffer, oldest first."""


class _State(msgspec.Struct, array_like=True):
    status: BookStatus
    last_update_id: int
    chain_id: int
    bid_px: list[float]
    bid_qtys: list[float]
    ask_px: list[float]
    ask_qtys: list[float]
    buffer: list[Diff]
    pending: _Pending | None
    counts: BookCounts


class LocalBook:
    """One symbol's book. Prices are quote units, quantities base units; both must be finite, prices positive.

    Parameters
    ----------
    max_levels
        Levels kept per side; the deepest beyond it are pruned and counted.
    max_buffered
        Diffs kept while a snapshot is awaited; the oldest beyond it are dropped and counted.
    """

    __slots__ = (
        "_ask_keys",
        "_asks",
        "_bid_keys",
        "_bids",
        "_buffer",
        "_chain_id",
        "_counts",
        "_pending",
        "last_update_id",
        "max_buffered",
        "max_levels",
        "state",
    )

    def __init__(self, *, max_levels: int = DEFAULT_MAX_LEVELS, max_buffered: int = DEFAULT_MAX_BUFFERED) -> None:
        self.max_levels = max_levels
        self.max_buffered = max_buffered
        self.state: BookStatus = "none"
        self.last_update_id = -1
        """`u` of the last applied diff; -1 while there is no book."""
        self._chain_id = -1
        """`u` of the newest diff seen, applied or not; -1 where none was since the last resync."""
        # Best prices lie at the end of both lists (asks negated), since that is where insertions are cheap and most.
        self._bid_keys: list[float] = []
        self._ask_keys: list[float] = []
        self._bids: dict[float, float] = {}
        self._asks: dict[float, float] = {}
        self._buffer: list[Diff] = []
        self._pending: _Pending | None = None
        self._counts = BookCounts()

    # -- questions ------------------------------------------------------------------------------------------------

    @property
    def wants_snapshot(self) -> bool:
        """Whether only another snapshot can bring the book further."""
        return self.state == "resyncing" and self._pending is None and self._chain_id >= 0

    @property
    def waits_for_bracket(self) -> bool:
        """Whether a snapshot is here that lies ahead of every diff seen."""
        return self._pending is not None

    @property
    def wanted_update_id(self) -> int:
        """A snapshot is of use where its lastUpdateId is at least this; -1 where no diff was seen."""
        return self._buffer[0].first_id if self._buffer else self._chain_id

    @property
    def buffered(self) -> int:
        """Diffs that wait for a snapshot."""
        return len(self._buffer)

    @property
    def levels(self) -> tuple[int, int]:
        """Number of levels (bids, asks)."""
        return len(self._bid_keys), len(self._ask_keys)

    def seen(self, final_id: int) -> bool:
        """Whether a diff ending at `final_id` would be dropped as a repetition."""
        return final_id <= self._chain_id

    def best(self) -> tuple[float, float, float, float] | None:
        """(bid, bid quantity, ask, ask quantity); None where a side is empty."""
        if not self._bid_keys or not self._ask_keys:
            return None
        bid, ask = self._bid_keys[-1], -self._ask_keys[-1]
        return bid, self._bids[bid], ask, self._asks[ask]

    def top(self, count: int) -> tuple[list[float], list[float], list[float], list[float]]:
        """Up to `count` levels a side, best first: bid prices, bid quantities, ask prices, ask quantities."""
        bid_px = self._bid_keys[: -count - 1 : -1]
        ask_px = [-key for key in self._ask_keys[: -count - 1 : -1]]
        bids, asks = self._bids, self._asks
        return bid_px, [bids[price] for price in bid_px], ask_px, [asks[price] for price in ask_px]

    # -- what comes in --------------------------------------------------------------------------------------------

    def apply_diff(
        self, first_id: int, final_id: int, prev_id: int, bids: Sequence[Level], asks: Sequence[Level]
    ) -> DiffOutcome:
        """Take a diff with ids U, u, pu; a repetition is dropped before `pu` is tested."""
        if final_id <= self._chain_id:
            return "duplicate"
        if self.state == "synced" or self.state == "stale":
            if prev_id != self.last_update_id:
                return self._begin_chain(first_id, final_id, prev_id, bids, asks, "gap")
            self._write(bids, asks)
            self.last_update_id = self._chain_id = final_id
            if self._is_crossed():
                return self._begin_chain(first_id, final_id, prev_id, bids, asks, "crossed")
            self.state = "synced"
            return "applied"
        return self._buffer_diff(first_id, final_id, prev_id, bids, asks)

    def apply_snapshot(self, last_update_id: int, bids: Sequence[Level], asks: Sequence[Level]) -> SnapshotOutcome:
        """Take a snapshot of the book as of `last_update_id`."""
        if self.state == "synced" or self.state == "stale":
            return "ignored"
        if self._pending is not None and last_update_id <= self._pending.last_update_id:
            return "ignored"
        if _crossed(bids, asks):
            return "crossed"
        self.state = "resyncing"
        self._pending = _Pending(last_update_id, list(bids), list(asks))
        return self._bracket()

    def resync(self) -> None:
        """Drop the book: what it was can no longer be trusted, and the next diff begins a new chain."""
        self._drop_levels()
        self._buffer.clear()
        self._pending = None
        self._chain_id = -1
        if self.state != "none":
            self.state = "resyncing"

    def mark_stale(self) -> None:
        """Say that a synced book may no longer be current; the next diff that fits the chain makes it synced again."""
        if self.state == "synced":
            self.state = "stale"

    def discard_pending(self) -> None:
        """Give up a snapshot whose bracket has not come."""
        self._pending = None

    def take_counts(self) -> BookCounts:
        """What was dropped since the last call."""
        counts, self._counts = self._counts, BookCounts()
        return counts

    # -- state ----------------------------------------------------------------------------------------------------

    def snapshot(self) -> bytes:
        """The whole state. Restoring it gives the same future."""
        bid_px, bid_qtys, ask_px, ask_qtys = self.top(max(len(self._bid_keys), len(self._ask_keys)))
        return msgspec.msgpack.encode(
            _State(
                self.state,
                self.last_update_id,
                self._chain_id,
                bid_px,
                bid_qtys,
                ask_px,
                ask_qtys,
                self._buffer,
                self._pending,
                self._counts,
            )
        )

    def restore(self, state: bytes) -> None:
        """Replace the state by one that `snapshot` returned.

        Raises
        ------
        msgspec.MsgspecError
            The bytes are no such state.
        """
        found = msgspec.msgpack.decode(state, type=_State)
        self.state = found.status
        self.last_update_id, self._chain_id = found.last_update_id, found.chain_id
        self._bid_keys = found.bid_px[::-1]
        self._ask_keys = [-price for price in reversed(found.ask_px)]
        self._bids = dict(zip(found.bid_px, found.bid_qtys, strict=True))
        self._asks = dict(zip(found.ask_px, found.ask_qtys, strict=True))
        self._buffer, self._pending, self._counts = found.buffer, found.pending, found.counts

    # -- inside ---------------------------------------------------------------------------------------------------

    def _write(self, bids: Sequence[Level], asks: Sequence[Level]) -> None:
        """Set levels to absolute quantities. Removing an unknown level is normal."""
        keys, quantities = self._bid_keys, self._bids
        for price, quantity in bids:
            if quantity > 0.0:
                if price not in quantities:
                    insort(keys, price)
                quantities[price] = quantity
            elif price in quantities:
                del quantities[price]
                del keys[bisect_left(keys, price)]
        keys, quantities = self._ask_keys, self._asks
        for price, quantity in asks:
            if quantity > 0.0:
                if price not in quantities:
                    insort(keys, -price)
                quantities[price] = quantity
            elif price in quantities:
                del quantities[price]
                del keys[bisect_left(keys, -price)]
        if len(self._bid_keys) > self.max_levels or len(self._ask_keys) > self.max_levels:
            self._prune()

    def _prune(self) -> None:
        for keys, quantities, sign in ((self._bid_keys, self._bids, 1.0), (self._ask_keys, self._asks, -1.0)):
            surplus = len(keys) - self.max_levels
            if surplus > 0:
                for key in keys[:surplus]:
                    del quantities[sign * key]
                del keys[:surplus]
                self._counts.pruned_levels += surplus

    def _is_crossed(self) -> bool:
        return bool(self._bid_keys and self._ask_keys) and self._bid_keys[-1] >= -self._ask_keys[-1]

    def _drop_levels(self) -> None:
        self._bid_keys.clear()
        self._ask_keys.clear()
        self._bids.clear()
        self._asks.clear()
        self.last_update_id = -1

    def _begin_chain(
        self,
        first_id: int,
        final_id: int,
        prev_id: int,
        bids: Sequence[Level],
        asks: Sequence[Level],
        outcome: DiffOutcome,
    ) -> DiffOutcome:
        """Drop the book and everything that waited; this diff is the first of what can be built upon."""
        self.state = "resyncing"
        self.resync()
        self._buffer.append(Diff(first_id, final_id, prev_id, list(bids), list(asks)))
        self._chain_id = final_id
        return outcome

    def _buffer_diff(
        self, first_id: int, final_id: int, prev_id: int, bids: Sequence[Level], asks: Sequence[Level]
    ) -> DiffOutcome:
        self.state = "resyncing"
        pending = self._pending
        if self._chain_id >= 0 and prev_id != self._chain_id:
            if pending is None or pending.last_update_id < prev_id:
                return self._begin_chain(first_id, final_id, prev_id, bids, asks, "gap")
            # What is missing lies before the snapshot that waits, so the book lacks nothing.
            self._buffer.clear()
        if len(self._buffer) >= self.max_buffered:
            del self._buffer[0]
            self._counts.buffered_diffs += 1
        self._buffer.append(Diff(first_id, final_id, prev_id, list(bids), list(asks)))
        self._chain_id = final_id
        if pending is None:
            return "buffered"
        outcome = self._bracket()
        if outcome == "too_old":
            return "snapshot_too_old"
        if outcome == "crossed":
            return self._begin_chain(first_id, final_id, prev_id, bids, asks, "crossed")
        return "synced" if outcome == "synced" else "buffered"

    def _bracket(self) -> SnapshotOutcome:
        """Build the book from the waiting snapshot and the buffered diffs, where one of them brackets it."""
        pending, buffer = self._pending, self._buffer
        assert pending is not None
        obsolete = 0
        for diff in buffer:
            if diff.final_id >= pending.last_update_id:
                break
            obsolete += 1
        del buffer[:obsolete]
        if not buffer:
            return "waiting"
        self._pending = None
        if buffer[0].prev_id > pending.last_update_id:
            return "too_old"
        self._bids = {price: quantity for price, quantity in pending.bids if quantity > 0.0}
        self._asks = {price: quantity for price, quantity in pending.asks if quantity > 0.0}
        self._bid_keys = sorted(self._bids)
        self._ask_keys = sorted(-price for price in self._asks)
        self._prune()
        for diff in buffer:
            # One that ends exactly at the snapshot is in it already: it only continues the chain.
            if diff.final_id > pending.last_update_id:
                self._write(diff.bids, diff.asks)
        if self._is_crossed():
            self._drop_levels()
            return "crossed"
        self.last_update_id = self._chain_id
        buffer.clear()
        self.state = "synced"
        return "synced"


def _crossed(bids: Sequence[Level], asks: Sequence[Level]) -> bool:
    best_bid = max((price for price, quantity in bids if quantity > 0.0), default=None)
    best_ask = min((price for price, quantity in asks if quantity > 0.0), default=None)
    return best_bid is not None and best_ask is not None and best_bid >= best_ask
