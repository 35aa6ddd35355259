"""The local book: the futures rule, its states, its bounds."""

from __future__ import annotations

import tracemalloc

import msgspec
import pytest
from orderflow.microstructure.book import DEFAULT_MAX_LEVELS, LocalBook

BIDS = [(99.0, 1.0), (98.0, 2.0), (97.0, 3.0)]
ASKS = [(101.0, 1.5), (102.0, 2.5), (103.0, 3.5)]


def synced(**bounds: int) -> LocalBook:
    """A book in step at u = 20."""
    book = LocalBook(**bounds)
    assert book.apply_diff(10, 20, 9, [], []) == "buffered"
    assert book.apply_snapshot(15, BIDS, ASKS) == "synced"
    return book


def test_starts_without_anything() -> None:
    book = LocalBook()
    assert book.state == "none"
    assert book.best() is None
    assert book.top(5) == ([], [], [], [])
    assert not book.wants_snapshot


def test_first_diff_wants_a_snapshot_that_covers_it() -> None:
    book = LocalBook()
    book.apply_diff(10, 20, 9, [(99.0, 1.0)], [])
    assert book.state == "resyncing"
    assert book.wants_snapshot
    assert book.wanted_update_id == 10


def test_bracketing_diff_before_the_snapshot() -> None:
    book = LocalBook()
    book.apply_diff(1, 9, 0, [(50.0, 7.0)], [])
    book.apply_diff(10, 20, 9, [(99.0, 5.0)], [(101.0, 0.0)])
    assert book.apply_snapshot(15, BIDS, ASKS) == "synced"
    assert book.best() == (99.0, 5.0, 102.0, 2.5)
    assert 50.0 not in book.top(10)[0], "a diff older than the snapshot must not be applied"
    assert book.last_update_id == 20


def test_bracketing_diff_after_the_snapshot() -> None:
    book = LocalBook()
    book.apply_diff(1, 9, 0, [], [])
    assert book.apply_snapshot(15, BIDS, ASKS) == "waiting"
    assert book.state == "resyncing"
    assert not book.wants_snapshot
    assert book.waits_for_bracket
    assert book.apply_diff(10, 12, 9, [(98.5, 9.0)], []) == "buffered"
    assert book.apply_diff(13, 20, 12, [(99.5, 4.0)], []) == "synced"
    assert book.best() == (99.5, 4.0, 101.0, 1.5)
    assert 98.5 not in book.top(10)[0]


@pytest.mark.parametrize("last_update_id", [10, 15, 20])
def test_bracket_takes_both_ends(last_update_id: int) -> None:
    book = LocalBook()
    book.apply_diff(10, 20, 9, [], [])
    assert book.apply_snapshot(last_update_id, BIDS, ASKS) == "synced"


def test_snapshot_between_two_diffs_is_the_state_at_pu() -> None:
    book = LocalBook()
    book.apply_diff(15, 20, 9, [(99.0, 8.0)], [])
    assert book.apply_snapshot(12, BIDS, ASKS) == "synced"
    assert book.best() == (99.0, 8.0, 101.0, 1.5)


def test_snapshot_older_than_the_diffs_is_asked_for_again() -> None:
    book = LocalBook()
    book.apply_diff(15, 20, 9, [], [])
    assert book.apply_snapshot(8, BIDS, ASKS) == "too_old"
    assert book.wants_snapshot
    assert book.wanted_update_id == 15
    assert book.apply_snapshot(20, BIDS, ASKS) == "synced"


def test_snapshot_before_any_diff_waits_and_may_prove_too_old() -> None:
    book = LocalBook()
    assert book.apply_snapshot(15, BIDS, ASKS) == "waiting"
    assert not book.wants_snapshot
    assert book.apply_diff(30, 40, 29, [], []) == "snapshot_too_old"
    assert book.wants_snapshot


def test_newer_snapshot_replaces_the_one_that_waits() -> None:
    book = LocalBook()
    book.apply_diff(1, 9, 0, [], [])
    assert book.apply_snapshot(15, [(90.0, 1.0)], ASKS) == "waiting"
    assert book.apply_snapshot(14, [(80.0, 1.0)], ASKS) == "ignored"
    assert book.apply_snapshot(18, BIDS, ASKS) == "waiting"
    book.apply_diff(10, 20, 9, [], [])
    assert book.best() == (99.0, 1.0, 101.0, 1.5)


def test_quantities_are_absolute_and_zero_removes() -> None:
    book = synced()
    assert book.apply_diff(21, 25, 20, [(99.0, 4.0), (98.0, 0.0)], [(100.5, 0.5), (77.0, 0.0)]) == "applied"
    assert book.top(3) == ([99.0, 97.0], [4.0, 3.0], [100.5, 101.0, 102.0], [0.5, 1.5, 2.5])
    assert book.levels == (2, 4)


def test_pu_not_the_last_u_is_a_gap_also_when_in_step() -> None:
    book = synced()
    assert book.apply_diff(21, 25, 20, [], []) == "applied"
    assert book.apply_diff(31, 35, 30, [(99.0, 9.0)], []) == "gap"
    assert book.state == "resyncing"
    assert book.best() is None
    assert book.wants_snapshot
    assert book.wanted_update_id == 31
    assert book.apply_snapshot(33, BIDS, ASKS) == "synced"
    assert book.best() == (99.0, 9.0, 101.0, 1.5)


def test_ids_shared_with_other_symbols_are_no_gap() -> None:
    book = synced()
    assert book.apply_diff(500, 600, 20, [], []) == "applied", "U is not u + 1, and need not be"


def test_gap_among_buffered_diffs_drops_those_before_it() -> None:
    book = LocalBook()
    book.apply_diff(10, 20, 9, [(98.0, 9.0)], [])
    assert book.apply_diff(40, 50, 39, [], []) == "gap"
    assert book.apply_snapshot(15, BIDS, ASKS) == "too_old"
    assert book.apply_snapshot(45, BIDS, ASKS) == "synced"
    assert book.top(2)[1] == [1.0, 2.0]


def test_gap_before_a_waiting_snapshot_is_harmless() -> None:
    book = LocalBook()
    book.apply_diff(1, 9, 0, [], [])
    book.apply_snapshot(45, BIDS, ASKS)
    assert book.apply_diff(40, 50, 39, [(99.5, 1.0)], []) == "synced"
    assert book.best() == (99.5, 1.0, 101.0, 1.5)


def test_repetition_is_dropped_before_pu_is_tested() -> None:
    book = synced()
    book.apply_diff(21, 25, 20, [(99.0, 4.0)], [])
    assert book.apply_diff(21, 25, 20, [(99.0, 7.0)], []) == "duplicate"
    assert book.apply_diff(3, 4, 2, [(99.0, 7.0)], []) == "duplicate"
    assert book.best() == (99.0, 4.0, 101.0, 1.5)
    assert book.state == "synced"


def test_crossed_by_a_diff_drops_the_book() -> None:
    book = synced()
    assert book.apply_diff(21, 25, 20, [(101.0, 1.0)], []) == "crossed"
    assert book.state == "resyncing"
    assert book.best() is None
    assert book.wants_snapshot


def test_crossed_snapshot_is_refused() -> None:
    book = LocalBook()
    book.apply_diff(10, 20, 9, [], [])
    assert book.apply_snapshot(15, [(101.0, 1.0)], [(101.0, 1.0)]) == "crossed"
    assert book.wants_snapshot
    assert book.apply_snapshot(16, BIDS, ASKS) == "synced"


def test_crossed_by_what_was_buffered() -> None:
    book = LocalBook()
    book.apply_diff(10, 20, 9, [(101.0, 1.0)], [])
    assert book.apply_snapshot(15, BIDS, ASKS) == "crossed"
    assert book.best() is None
    assert book.apply_snapshot(20, BIDS, ASKS) == "synced", "a diff that ends where the snapshot stands is in it"
    assert book.best() == (99.0, 1.0, 101.0, 1.5)


def test_stale_book_recovers_with_the_next_diff_that_fits() -> None:
    book = synced()
    book.mark_stale()
    assert book.state == "stale"
    assert book.apply_snapshot(99, BIDS, ASKS) == "ignored"
    assert book.apply_diff(21, 25, 20, [], []) == "applied"
    assert book.state == "synced"


def test_stale_book_with_a_gap_resyncs() -> None:
    book = synced()
    book.mark_stale()
    assert book.apply_diff(31, 35, 30, [], []) == "gap"
    assert book.state == "resyncing"


def test_only_a_synced_book_gets_stale() -> None:
    book = LocalBook()
    book.mark_stale()
    assert book.state == "none"
    book.apply_diff(10, 20, 9, [], [])
    book.mark_stale()
    assert book.state == "resyncing"


def test_resync_begins_a_new_chain() -> None:
    book = synced()
    book.resync()
    assert book.state == "resyncing"
    assert not book.wants_snapshot, "no diff has been seen since"
    assert book.apply_diff(5, 6, 4, [], []) == "buffered", "ids may begin anew"
    assert book.wants_snapshot


def test_buffer_is_bounded_and_counted() -> None:
    book = LocalBook(max_buffered=3)
    for number in range(1, 6):
        book.apply_diff(number, number, number - 1, [], [])
    assert book.buffered == 3
    assert book.take_counts().buffered_diffs == 2
    assert book.take_counts().buffered_diffs == 0
    assert book.wanted_update_id == 3


def test_deepest_levels_are_pruned_and_counted() -> None:
    book = synced(max_levels=3)
    book.apply_diff(21, 25, 20, [(99.5, 1.0), (10.0, 1.0)], [(500.0, 1.0)])
    assert book.top(10)[0] == [99.5, 99.0, 98.0]
    assert book.top(10)[2] == [101.0, 102.0, 103.0]
    assert book.take_counts().pruned_levels == 3


def test_a_full_book_takes_few_bytes_a_level() -> None:
    """200 books are kept: what a level takes decides how much memory the service needs once they are full."""
    levels = 2 * DEFAULT_MAX_LEVELS
    tracemalloc.start()
    try:
        book = LocalBook()
        book.apply_diff(1, 1, 0, [], [])
        book.apply_snapshot(1, BIDS, ASKS)
        for tick in range(1, levels):
            book.apply_diff(
                tick + 1, tick + 1, tick, [(90.0 - tick / 1000, tick / 7)], [(110.0 + tick / 1000, tick / 7)]
            )
        taken = tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()
    assert book.levels == (DEFAULT_MAX_LEVELS, DEFAULT_MAX_LEVELS)
    assert taken < 24 * levels


def test_of_a_price_given_twice_the_last_counts() -> None:
    book = LocalBook()
    book.apply_diff(1, 9, 0, [], [])
    book.apply_snapshot(5, [(99.0, 1.0), (99.0, 2.0), (98.0, 0.0)], [(101.0, 1.0), (101.0, 3.0)])
    assert book.top(5) == ([99.0], [2.0], [101.0], [3.0])
    book.apply_diff(10, 10, 9, [(99.0, 4.0), (99.0, 5.0), (97.0, 1.0), (97.0, 0.0)], [(101.0, 0.0), (101.0, 6.0)])
    assert book.top(5) == ([99.0], [5.0], [101.0], [6.0])


def test_snapshot_of_one_side() -> None:
    book = LocalBook()
    book.apply_diff(10, 20, 9, [], [])
    assert book.apply_snapshot(15, BIDS, []) == "synced"
    assert book.best() is None
    assert book.top(1) == ([99.0], [1.0], [], [])


@pytest.mark.parametrize("stage", ["none", "buffered", "waiting", "synced", "stale"])
def test_restored_book_has_the_same_future(stage: str) -> None:
    book = LocalBook(max_levels=4, max_buffered=5)
    if stage != "none":
        book.apply_diff(1, 9, 0, [(1.0, 1.0)], [])
    if stage == "waiting":
        book.apply_snapshot(15, BIDS, ASKS)
    if stage in ("synced", "stale"):
        book.apply_snapshot(5, BIDS, ASKS)
    if stage == "stale":
        book.mark_stale()
    other = LocalBook(max_levels=4, max_buffered=5)
    other.restore(book.snapshot())
    for each in (book, other):
        each.apply_diff(10, 20, 9, [(98.5, 3.0)], [(101.0, 0.0)])
        each.apply_snapshot(12, BIDS, ASKS)
        each.apply_diff(21, 30, 20, [(99.0, 0.0)], [(104.0, 1.0), (105.0, 1.0)])
    assert other.snapshot() == book.snapshot()
    assert other.state == "synced"


def test_restore_refuses_what_is_no_state() -> None:
    with pytest.raises(msgspec.MsgspecError):
        LocalBook().restore(b"\x01\x02")
