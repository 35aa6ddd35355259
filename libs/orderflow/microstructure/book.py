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

from array import array
from bisect import bisect_left
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


class _Side:
    """Levels of one side as two packed columns, 16 bytes a level where objects of their own would need some 150.

    The best price lies at the end, since that is where insertions are cheap and most; keys of asks are negated.
    """

    __slots__ = ("keys", "qtys", "sign")

    def __init__(self, sign: float) -> None:
        self.sign = sign
        self.keys = array("d")
        self.qtys = array("d")

    def replace(self, levels: Sequence[Level]) -> None:
        """Take these levels and no others; of one price given twice the last."""
        found = {self.sign * price: quantity for price, quantity in levels if quantity > 0.0}
        self.keys = array("d", sorted(found))
        self.qtys = array("d", map(found.__getitem__, self.keys))

    def write(self, levels: Sequence[Level]) -> None:
        """Set levels to absolute quantities. Removing an unknown level is normal."""
        keys, qtys, sign = self.keys, self.qtys, self.sign
        count = len(keys)
        for price, quantity in levels:
            key = sign * price
            index = bisect_left(keys, key)
            if index < count and keys[index] == key:
                if quantity > 0.0:
                    qtys[index] = quantity
                else:
                    del keys[index], qtys[index]
                    count -= 1
            elif quantity > 0.0:
                keys.insert(index, key)
                qtys.insert(index, quantity)
                count += 1

    def prune(self, most: int) -> int:
        """Drop the deepest levels beyond so many; returns how many there were."""
        surplus = len(self.keys) - most
        if surplus <= 0:
            return 0
        del self.keys[:surplus], self.qtys[:surplus]
        return surplus

    def clear(self) -> None:
        self.keys = array("d")
        self.qtys = array("d")

    def top(self, count: int) -> tuple[list[float], list[float]]:
        """Prices and quantities of up to `count` levels, best first."""
        keys = self.keys[: -count - 1 : -1].tolist()
        return (keys if self.sign > 0.0 else [-key for key in keys]), self.qtys[: -count - 1 : -1].tolist()


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
        "_asks",
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
        self._bids = _Side(1.0)
        self._asks = _Side(-1.0)
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
        return len(self._bids.keys), len(self._asks.keys)

    def seen(self, final_id: int) -> bool:
        """Whether a diff ending at `final_id` would be dropped as a repetition."""
        return final_id <= self._chain_id

    def best(self) -> tuple[float, float, float, float] | None:
        """(bid, bid quantity, ask, ask quantity); None where a side is empty."""
        bids, asks = self._bids, self._asks
        if not bids.keys or not asks.keys:
            return None
        return bids.keys[-1], bids.qtys[-1], -asks.keys[-1], asks.qtys[-1]

    def top(self, count: int) -> tuple[list[float], list[float], list[float], list[float]]:
        """Up to `count` levels a side, best first: bid prices, bid quantities, ask prices, ask quantities."""
        return *self._bids.top(count), *self._asks.top(count)

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
        bid_px, bid_qtys, ask_px, ask_qtys = self.top(max(self.levels))
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
        self._bids.replace(list(zip(found.bid_px, found.bid_qtys, strict=True)))
        self._asks.replace(list(zip(found.ask_px, found.ask_qtys, strict=True)))
        self._buffer, self._pending, self._counts = found.buffer, found.pending, found.counts

    # -- inside ---------------------------------------------------------------------------------------------------

    def _write(self, bids: Sequence[Level], asks: Sequence[Level]) -> None:
        """Set levels to absolute quantities, and keep to the bound."""
        self._bids.write(bids)
        self._asks.write(asks)
        self._prune()

    def _prune(self) -> None:
        self._counts.pruned_levels += self._bids.prune(self.max_levels) + self._asks.prune(self.max_levels)

    def _is_crossed(self) -> bool:
        bids, asks = self._bids.keys, self._asks.keys
        return bool(bids and asks) and bids[-1] >= -asks[-1]

    def _drop_levels(self) -> None:
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
        self._bids.replace(pending.bids)
        self._asks.replace(pending.asks)
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
