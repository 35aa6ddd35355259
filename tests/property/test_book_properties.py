"""The book against a model that is obviously right, and its state against the loss of the process."""

from __future__ import annotations

from dataclasses import dataclass, field

from hypothesis import given, settings
from hypothesis import strategies as st
from orderflow.microstructure.book import Level, LocalBook

PRICES = st.integers(1, 40).map(lambda ticks: ticks / 4)
QUANTITIES = st.sampled_from([0.0, 0.0, 0.5, 1.0, 2.25])
LEVELS = st.lists(st.tuples(PRICES, QUANTITIES), max_size=6)
"""Prices of bids; asks lie 100 higher, so that the two never cross."""


@dataclass
class World:
    """An exchange with one book: diffs in order, and what the book is after each."""

    diffs: list[tuple[int, int, int, list[Level], list[Level]]] = field(default_factory=list)
    books: list[tuple[dict[float, float], dict[float, float]]] = field(default_factory=list)


@st.composite
def worlds(draw: st.DrawFn) -> World:
    world = World()
    bids: dict[float, float] = {}
    asks: dict[float, float] = {}
    last = draw(st.integers(1, 1000))
    for _ in range(draw(st.integers(2, 12))):
        first = last + draw(st.integers(1, 5))
        final = first + draw(st.integers(0, 5))
        bid_levels = draw(LEVELS)
        ask_levels = [(100 + price, quantity) for price, quantity in draw(LEVELS)]
        for side, levels in ((bids, bid_levels), (asks, ask_levels)):
            for price, quantity in levels:
                if quantity:
                    side[price] = quantity
                else:
                    side.pop(price, None)
        world.diffs.append((first, final, last, bid_levels, ask_levels))
        world.books.append((dict(bids), dict(asks)))
        last = final
    return world


def agrees(book: LocalBook, model: tuple[dict[float, float], dict[float, float]]) -> None:
    bids, asks = model
    bid_px, bid_qtys, ask_px, ask_qtys = book.top(1000)
    assert list(zip(bid_px, bid_qtys, strict=True)) == sorted(bids.items(), reverse=True)
    assert list(zip(ask_px, ask_qtys, strict=True)) == sorted(asks.items())
    if bids and asks:
        assert book.best() == (max(bids), bids[max(bids)], min(asks), asks[min(asks)])


@given(worlds(), st.data())
@settings(max_examples=200, deadline=None)
def test_a_synced_book_equals_the_exchange(world: World, data: st.DataObject) -> None:
    """Whenever the snapshot was taken and came, and whatever repeats: synced means equal."""
    taken = data.draw(st.integers(0, len(world.diffs) - 1), "snapshot taken after diff")
    arrives = data.draw(st.integers(0, len(world.diffs) - 1), "snapshot arrives before diff")
    first_seen = data.draw(st.integers(0, len(world.diffs) - 1), "first diff seen")
    bids, asks = world.books[taken]
    last_update_id = world.diffs[taken][1]
    book = LocalBook()
    for number, diff in enumerate(world.diffs):
        if number == arrives:
            book.apply_snapshot(last_update_id, list(bids.items()), list(asks.items()))
        if number < first_seen:
            continue
        outcome = book.apply_diff(*diff)
        if data.draw(st.booleans(), "repeated"):
            assert book.apply_diff(*diff) == "duplicate"
        assert outcome in ("applied", "synced", "buffered", "snapshot_too_old")
        if book.state == "synced":
            agrees(book, world.books[number])
    if first_seen <= taken + 1 and taken + 1 < len(world.diffs):
        assert book.state == "synced", "a diff brackets the snapshot, so the book must be in step"


@given(worlds(), st.data())
@settings(max_examples=200, deadline=None)
def test_a_lost_diff_is_never_overlooked(world: World, data: st.DataObject) -> None:
    lost = data.draw(st.integers(0, len(world.diffs) - 2), "lost diff")
    book = LocalBook()
    book.apply_snapshot(world.diffs[0][2], [], [])
    for number, diff in enumerate(world.diffs):
        if number == lost:
            continue
        book.apply_diff(*diff)
        if number < lost:
            assert book.state == "synced"
        else:
            assert book.state == "resyncing"
            assert book.wants_snapshot


@given(worlds(), st.data())
@settings(max_examples=150, deadline=None)
def test_a_restored_book_goes_on_the_same(world: World, data: st.DataObject) -> None:
    cut = data.draw(st.integers(0, len(world.diffs)), "restored before diff")
    arrives = data.draw(st.integers(0, len(world.diffs) - 1), "snapshot arrives before diff")
    skipped = data.draw(st.integers(0, len(world.diffs)), "lost diff")
    books = [LocalBook(max_levels=5, max_buffered=3), LocalBook(max_levels=5, max_buffered=3)]
    for number, diff in enumerate(world.diffs):
        if number == cut:
            fresh = LocalBook(max_levels=5, max_buffered=3)
            fresh.restore(books[1].snapshot())
            books[1] = fresh
        outcomes = []
        for book in books:
            outcome: list[str] = []
            if number == arrives:
                bids, asks = world.books[number]
                outcome.append(book.apply_snapshot(diff[1], list(bids.items()), list(asks.items())))
            if number != skipped:
                outcome.append(book.apply_diff(*diff))
            outcomes.append((outcome, book.state, book.top(5), book.snapshot()))
        assert outcomes[0] == outcomes[1]
