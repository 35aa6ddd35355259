"""One symbol's aggregate trades by their ids: repetitions out, holes held open until they are filled or given up.

Ids of aggregate trades are gapless per symbol, so a jump means that trades are missing. Later trades are held until the
missing ones have come by REST, then let go in the order of their ids; what has not come in time is reported as lost by
its exact ids. Everything below `next_id` is settled, so of seen ids only those above it are kept.
"""

from __future__ import annotations

from typing import Final, Literal, TypeAlias

import msgspec

Position: TypeAlias = Literal["first", "next", "ahead", "duplicate", "late"]
"""late: it comes after its id was given up as lost."""
IdRange: TypeAlias = tuple[int, int]
"""First and last id, both included."""

REMEMBERED_LOSSES: Final = 64


class HeldTrade(msgspec.Struct, array_like=True, gc=False):
    """A trade that waits for those before it."""

    agg_trade_id: int
    price: float
    qty: float
    buyer_is_maker: bool | None
    ts_ms: int
    event_ts_ms: int | None
    recv_ts_ns: int
    since_ns: int
    """Clock of the ticks when it came."""
    route: str = ""
    backfilled: bool = False
    refused: bool = False
    """Already rejected: it only fills its place."""
    payload: bytes = b""
    """The frame, in case the trade is refused when its turn comes."""


class TradeSequence(msgspec.Struct):
    """State of one symbol's ids; bounded by the `limit` that is given to `hold`."""

    next_id: int = -1
    """The id that continues the sequence; -1 before the first trade."""
    held: dict[int, HeldTrade] = {}
    lost: list[IdRange] = []
    """The newest losses."""
    asked_id: int = -1
    asked_ns: int = 0
    filled: int = 0
    """Missing trades that have come since the sequence was last whole."""

    def position(self, agg_trade_id: int) -> Position:
        """Where an id lies."""
        if self.next_id < 0:
            return "first"
        if agg_trade_id == self.next_id:
            return "next"
        if agg_trade_id > self.next_id:
            return "duplicate" if agg_trade_id in self.held else "ahead"
        return "late" if any(low <= agg_trade_id <= high for low, high in self.lost) else "duplicate"

    def ready(self) -> list[HeldTrade]:
        """Take out what continues the sequence without a hole."""
        trades: list[HeldTrade] = []
        while self.held:
            trade = self.held.pop(self.next_id, None)
            if trade is None:
                break
            trades.append(trade)
            self.next_id += 1
        return trades

    def expired(self, before_ns: int) -> int:
        """The highest id that has been held since `before_ns` or longer; -1 where none."""
        return max((key for key, trade in self.held.items() if trade.since_ns <= before_ns), default=-1)

    def waited_ns(self, clock_ns: int) -> int:
        """How long the first missing ids have been waited for; something must be held."""
        return clock_ns - self.held[min(self.held)].since_ns

    def give_up(self, up_to_id: int) -> tuple[list[IdRange], list[HeldTrade]]:
        """Let go what is held up to an id (and what follows it without a hole): (ids that are lost, trades in order)."""
        losses: list[IdRange] = []
        trades: list[HeldTrade] = []
        for key in sorted(self.held):
            if key > up_to_id:
                break
            if key > self.next_id:
                losses.append((self.next_id, key - 1))
            trades.append(self.held.pop(key))
            self.next_id = key + 1
        trades.extend(self.ready())
        self.lost = [*self.lost, *losses][-REMEMBERED_LOSSES:]
        return losses, trades

    def first_hole(self) -> IdRange | None:
        """The first ids that are missing; None where nothing is held."""
        return (self.next_id, min(self.held) - 1) if self.held else None

    def restart(self, next_id: int) -> None:
        """Go on from another id: the exchange has begun to count anew."""
        self.next_id = next_id
        self.held = {}
        self.lost = []
        self.asked_id = -1
        self.filled = 0
