"""Order flow between two states of the book: the pure formulas of order flow imbalance.

A frame's side is two parallel sequences, prices and quantities, best first. Positive flow is buying pressure: bids
that arrive, asks that go. Swapping the sides of both frames and negating the prices negates every result exactly.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

Side = Sequence[float]

LIMIT: Final = 1e15
TINY: Final = 1e-12
"""Prices and quantities from TINY to below LIMIT are taken: products, squares and quotients of them stay finite."""


def best_flow(
    bid_0: float,
    bid_qty_0: float,
    ask_0: float,
    ask_qty_0: float,
    bid: float,
    bid_qty: float,
    ask: float,
    ask_qty: float,
) -> float:
    """Cont-Kukanov-Stoikov flow e_n from one best quote to the next, base units.

    e_n = I{b_n >= b_n-1} qb_n - I{b_n <= b_n-1} qb_n-1 - I{a_n <= a_n-1} qa_n + I{a_n >= a_n-1} qa_n-1
    (R. Cont, A. Kukanov, S. Stoikov, J. Financial Econometrics 12(1), 2014). The same formula at a deeper rank gives
    the multi-level flow of K. Xu, M. Gould, S. Howison, Market Microstructure and Liquidity 4, 2018.
    """
    if bid == bid_0:
        bid_flow = bid_qty - bid_qty_0
    elif bid > bid_0:
        bid_flow = bid_qty
    else:
        bid_flow = -bid_qty_0
    if ask == ask_0:
        ask_flow = ask_qty - ask_qty_0
    elif ask < ask_0:
        ask_flow = ask_qty
    else:
        ask_flow = -ask_qty_0
    return bid_flow - ask_flow


def rank_flows(
    bid_px_0: Side,
    bid_qtys_0: Side,
    ask_px_0: Side,
    ask_qtys_0: Side,
    bid_px: Side,
    bid_qtys: Side,
    ask_px: Side,
    ask_qtys: Side,
    first: int,
    levels: int,
) -> list[float]:
    """`best_flow` for each rank `first` <= m < `levels` with the prices of that rank; zeros before `first`.

    Sequences must hold `levels` entries (see `padded`).
    """
    flows = [0.0] * levels
    for m in range(first, levels):
        bid, bid_0 = bid_px[m], bid_px_0[m]
        ask, ask_0 = ask_px[m], ask_px_0[m]
        if bid == bid_0:
            bid_flow = bid_qtys[m] - bid_qtys_0[m]
        elif bid > bid_0:
            bid_flow = bid_qtys[m]
        else:
            bid_flow = -bid_qtys_0[m]
        if ask == ask_0:
            ask_flow = ask_qtys[m] - ask_qtys_0[m]
        elif ask < ask_0:
            ask_flow = ask_qtys[m]
        else:
            ask_flow = -ask_qtys_0[m]
        flows[m] = bid_flow - ask_flow
    return flows


def level_differences(
    bid_qtys_0: Side, ask_qtys_0: Side, bid_qtys: Side, ask_qtys: Side, first: int, levels: int
) -> list[float]:
    """The plain difference of quantities at the same rank, whatever the prices; zeros before `first`.

    Kept for comparison only. Its defect: where a price moves it compares different prices, so that on a bid that rises
    it subtracts the old level's quantity, and its sign is right in about half of the price changes.
    """
    flows = [0.0] * levels
    for m in range(first, levels):
        flows[m] = (bid_qtys[m] - bid_qtys_0[m]) - (ask_qtys[m] - ask_qtys_0[m])
    return flows


def price_flows(
    bid_px_0: Side,
    bid_qtys_0: Side,
    ask_px_0: Side,
    ask_qtys_0: Side,
    bid_px: Side,
    bid_qtys: Side,
    ask_px: Side,
    ask_qtys: Side,
    levels: int,
) -> list[float]:
    """Flow per price, new quantity less old, gathered by the price's rank in the two frames' union.

    Only prices that both frames show count: what lies beyond a frame's last level is unknown there, unless the frame
    has fewer than `levels` levels and so ends its side of the book. Rank 0, the better of the two best prices, is left
    at 0: it is what `best_flow` measures on quotes. Ranks from `levels` on are gathered at the last.
    """
    bid_flows = _side_price_flows(bid_px_0, bid_qtys_0, bid_px, bid_qtys, levels, -1.0)
    ask_flows = _side_price_flows(ask_px_0, ask_qtys_0, ask_px, ask_qtys, levels, 1.0)
    return [bid_flow - ask_flow for bid_flow, ask_flow in zip(bid_flows, ask_flows, strict=True)]


def _side_price_flows(px_0: Side, qtys_0: Side, px: Side, qtys: Side, levels: int, outward: float) -> list[float]:
    """Merge two runs of prices, best first; `outward` is the direction away from the other side."""
    flows = [0.0] * levels
    count_0, count = min(len(px_0), levels), min(len(px), levels)
    i = j = rank = 0
    while i < count_0 or j < count:
        if i >= count_0:
            if count_0 == levels:
                break  # beyond what the older frame shows
            ahead = -1.0
        elif j >= count:
            if count == levels:
                break  # beyond what the newer frame shows
            ahead = 1.0
        else:
            ahead = (px[j] - px_0[i]) * outward
        flow = 0.0
        if ahead <= 0.0:
            flow = qtys[j]
            j += 1
        if ahead >= 0.0:
            flow -= qtys_0[i]
            i += 1
        if rank and levels > 1:
            flows[min(rank, levels - 1)] += flow
        rank += 1
    return flows


def padded(values: Side, levels: int, filler: float) -> Side:
    """Exactly `levels` entries: cut, or filled for ranks that the book doesn't have.

    A rank that is absent has quantity 0 at a price no order can be behind: 0 for bids, infinity for asks.
    """
    count = len(values)
    if count == levels:
        return values
    if count > levels:
        return values[:levels]
    return [*values, *([filler] * (levels - count))]


def valid_quote(bid: float | None, bid_qty: float | None, ask: float | None, ask_qty: float | None) -> bool:
    """Whether a best quote has two sides, in order, with quantities at both. NaN and infinity fail."""
    return (
        bid is not None
        and bid_qty is not None
        and ask is not None
        and ask_qty is not None
        and TINY <= bid < ask < LIMIT
        and TINY <= bid_qty < LIMIT
        and TINY <= ask_qty < LIMIT
    )


def valid_depth(bid_px: Side, bid_qtys: Side, ask_px: Side, ask_qtys: Side) -> bool:
    """Whether a depth frame has two sides, strictly sorted from the best, uncrossed, with quantities at every level."""
    if not bid_px or not ask_px or len(bid_px) != len(bid_qtys) or len(ask_px) != len(ask_qtys):
        return False
    if not TINY <= bid_px[0] < ask_px[0]:
        return False
    before = LIMIT
    for price in bid_px:
        if not TINY <= price < before:
            return False
        before = price
    before = 0.0
    for price in ask_px:
        if not before < price < LIMIT:
            return False
        before = price
    for qty in bid_qtys:
        if not TINY <= qty < LIMIT:
            return False
    return all(TINY <= qty < LIMIT for qty in ask_qtys)
