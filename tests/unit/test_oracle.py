"""The book against the quotes: which quote a diff belongs to, what a lost quote leaves open, what follows a mismatch."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st
from orderflow.venues.binance.oracle import MAX_CLAIMS, MAX_QUOTES, Claim, Quote, QuoteOracle
from venue_journal import Feed, events, of


def quote(update_id: int, bid: float = 99.0) -> Quote:
    return update_id, bid, 1.0, bid + 2.0, 1.0


def claim(update_id: int, bid: float = 99.0) -> Claim:
    return quote(update_id, bid)


def figures(oracle: QuoteOracle) -> tuple[int, int, int, int]:
    return oracle.checked, oracle.failed, oracle.skipped, len(oracle.claims)


def test_a_diff_behind_the_quotes_is_judged_at_once_by_the_newest_not_above_it() -> None:
    oracle = QuoteOracle()
    for update_id, bid in ((10, 99.0), (20, 98.0), (30, 97.0)):
        oracle.add_quote(quote(update_id, bid))
    assert oracle.add_claim(claim(25, 98.0)) is None
    assert oracle.add_claim(claim(30, 97.0)) is None, "a quote of the same id is the one"
    assert figures(oracle) == (2, 0, 0, 0)
    assert oracle.add_claim(claim(5, 1.0)) is None, "no quote that old is known"
    assert figures(oracle) == (2, 0, 1, 0)


def test_a_diff_ahead_of_the_quotes_waits_for_one_beyond_it() -> None:
    oracle = QuoteOracle()
    oracle.add_quote(quote(10, 99.0))
    oracle.add_claim(claim(25, 98.0))
    assert oracle.add_quote(quote(20, 98.0)) == [], "it still belongs to the diff"
    assert figures(oracle) == (0, 0, 0, 1)
    assert oracle.add_quote(quote(26, 97.0)) == []
    assert figures(oracle) == (1, 0, 0, 0)


def test_a_wrong_book_is_found_either_way() -> None:
    oracle = QuoteOracle()
    oracle.add_quote(quote(10, 99.0))
    assert oracle.add_claim(claim(10, 98.0)) == quote(10, 99.0)
    oracle.add_claim(claim(12, 98.0))
    oracle.add_claim((13, None, None, 101.0, 1.0))
    assert oracle.add_quote(quote(20)) == [(claim(12, 98.0), quote(10)), ((13, None, None, 101.0, 1.0), quote(10))]
    assert figures(oracle) == (3, 3, 0, 0)
    assert oracle.failed_in_row == 1, "one quote, however many diffs it belongs to"


def test_a_lost_quote_leaves_open_what_it_would_have_shown() -> None:
    oracle = QuoteOracle()
    oracle.add_quote(quote(10))
    oracle.add_claim(claim(15, 50.0))
    oracle.lose_quote()
    oracle.add_claim(claim(17, 50.0))
    assert oracle.add_quote(quote(20)) == []
    assert oracle.add_claim(claim(20)) is None
    assert figures(oracle) == (1, 0, 2, 0)


def test_a_quote_out_of_order_leaves_open_what_it_would_have_shown() -> None:
    oracle = QuoteOracle()
    oracle.add_quote(quote(10))
    oracle.add_quote(quote(30))
    oracle.lose_late_quote(30)
    oracle.lose_late_quote(20)
    assert oracle.add_claim(claim(25, 50.0)) is None
    assert oracle.add_claim(claim(30)) is None
    assert figures(oracle) == (1, 0, 1, 0)


def test_bounds() -> None:
    oracle = QuoteOracle()
    for update_id in range(10 * MAX_QUOTES):
        oracle.add_quote(quote(update_id))
    assert len(oracle.quotes) <= MAX_QUOTES
    for update_id in range(10**6, 10**6 + 3 * MAX_CLAIMS):
        oracle.add_claim(claim(update_id, 99.0 if update_id % 2 else 98.0))
    assert figures(oracle) == (MAX_CLAIMS, 0, MAX_CLAIMS, MAX_CLAIMS), "without a later quote only agreement is certain"


@given(
    st.lists(st.tuples(st.integers(1, 5), st.integers(0, 3)), min_size=2, max_size=40),
    st.lists(st.integers(0, 120), max_size=40, unique=True).map(sorted),
    st.data(),
)
def test_every_order_of_arrival_gives_the_same_verdicts(
    steps: list[tuple[int, int]], ends: list[int], data: st.DataObject
) -> None:
    """Quotes and diffs each in their order, mixed at will: a true book never fails, an untrue one always."""
    quotes: list[Quote] = []
    for step, level in steps:
        quotes.append(quote((quotes[-1][0] if quotes else 0) + step, 90.0 + level))
    untrue = data.draw(st.sets(st.sampled_from(ends))) if ends else set()
    claims = []
    for end in ends:
        true = next((each[1] for each in reversed(quotes) if each[0] <= end), 0.0)
        claims.append(claim(end, true + (0.5 if end in untrue else 0.0)))
    oracle, wrong, waiting_quotes, waiting_claims = QuoteOracle(), set(), list(quotes), list(claims)
    while waiting_quotes or waiting_claims:
        if waiting_quotes and (not waiting_claims or data.draw(st.booleans())):
            wrong |= {each[0] for each, _ in oracle.add_quote(waiting_quotes.pop(0))}
        else:
            each = waiting_claims.pop(0)
            if oracle.add_claim(each) is not None:
                wrong.add(each[0])
    wrong |= {each[0] for each, _ in oracle.finish()}
    known = {end for end in ends if end >= quotes[0][0]}
    assert wrong <= untrue & known
    assert oracle.checked + oracle.skipped == len(ends)
    assert oracle.failed == len(wrong)
    assert all(before[0] < after[0] for before, after in pairwise(oracle.quotes))
    if oracle.skipped == len(set(ends) - known):
        assert wrong == untrue & known


# -- in the normaliser ----------------------------------------------------------------------------------------------


def wrong_book(**settings: int) -> Feed:
    """Its best bid is 99.9 by the snapshot, and the quotes say 99.8."""
    feed = Feed(**settings)
    feed.tick()
    return feed.synced()


def disagree(feed: Feed, times: int = 1) -> list[dict[str, object]]:
    """So many diffs, each with a quote that belongs to it."""
    before = len(feed.emits)
    for _ in range(times):
        last = feed.processor._symbols["BTCUSDT"].book.last_update_id
        feed.quote(last + 10, bid="99.8")
        feed.diff(last + 1, last + 10, last)
        feed.now_ms += 100
    return events(feed.emits[before:])


def test_a_mismatch_is_told_with_both_sides() -> None:
    feed = wrong_book()
    (event,) = disagree(feed)
    assert event["event_type"] == "quote_mismatch"
    assert event["meta"] == {
        "u": 30,
        "book": [99.9, 1.0, 100.1, 1.0],
        "quote_update_id": 30,
        "quote": [99.8, 2.0, 100.1, 3.0],
        "mismatches": 1,
        "in_row": 1,
    }


def test_three_quotes_in_a_row_begin_the_book_anew() -> None:
    feed = wrong_book()
    kinds = [event["event_type"] for event in disagree(feed, 3)]
    assert kinds == ["quote_mismatch", "gap"], "told at most once a second"
    last_row = of(feed.emits, "market.rows")[-1]
    assert (last_row["src"], last_row["book_state"], last_row["gap_count"]) == ("depth", "synced", 0)
    (row,) = of(feed.quote(1000), "market.rows")
    assert (row["book_state"], row["gap_count"]) == ("resyncing", 1)
    (asked,) = events(feed.diff(1001, 1010, 1000), "snapshot_needed")
    assert asked["meta"]["why"] == "quote_mismatch"


def test_a_book_that_stays_wrong_is_stale_and_begun_anew_ever_less_often() -> None:
    feed = wrong_book()
    disagree(feed, 3)
    resyncs = []
    for second in range(1, 400):
        feed.tick(1000)
        book = feed.processor._symbols["BTCUSDT"].book
        if book.state == "resyncing":
            start = feed.processor._symbols["BTCUSDT"].values.quote_update_id + 10
            feed.diff(start, start + 10, start - 1)
            feed.snapshot(start + 5)
        for event in disagree(feed, 4):
            if event["event_type"] == "gap":
                resyncs.append(second)
    assert len(resyncs) == 3
    assert 40 < resyncs[0] < 70
    assert 1.8 < (resyncs[2] - resyncs[1]) / (resyncs[1] - resyncs[0]) < 2.2
    row = [row for row in of(feed.emits, "market.rows") if row["src"] == "depth"][-1]
    assert row["book_state"] == "stale", "a book known to be wrong does not pass for a good one"


def test_entering_distrust_is_counted_once_and_one_lost_quote_is_none() -> None:
    feed = wrong_book()
    disagree(feed, 2)
    assert feed.processor.counted.of("distrusted") == 0
    disagree(feed, 1)
    assert feed.processor.counted.of("distrusted") == 1
    start = feed.processor._symbols["BTCUSDT"].values.quote_update_id + 10
    feed.diff(start, start + 10, start - 1)
    feed.snapshot(start + 5)
    disagree(feed, 20)
    assert feed.processor.counted.of("distrusted") == 2, "stale until the pause is over, however many more disagree"
    reported = wrong_book(mismatches_before_resync=0)
    disagree(reported, 20)
    assert reported.processor.counted.of("distrusted") == 1, "a book that is only reported is wrong too"


def test_zero_only_reports() -> None:
    feed = wrong_book(mismatches_before_resync=0)
    assert {event["event_type"] for event in disagree(feed, 20)} == {"quote_mismatch"}
    assert feed.processor.symbol_figures()[0].oracle_failed == 20
    assert of(feed.emits, "market.rows")[-1]["book_state"] == "synced"


def test_a_stale_book_recovers_with_the_first_quote_that_agrees() -> None:
    feed = wrong_book()
    disagree(feed, 3)
    start = feed.processor._symbols["BTCUSDT"].values.quote_update_id + 10
    feed.diff(start, start + 10, start - 1)
    feed.snapshot(start + 5, [["99.9", "2"]], [["100.1", "3"]])
    kinds = [event["event_type"] for event in disagree(feed, 3)]
    assert kinds == ["book_stale"], "the mismatch itself was told within the second"
    last = feed.processor._symbols["BTCUSDT"].book.last_update_id
    feed.quote(last + 10)
    feed.diff(last + 1, last + 10, last)
    assert [event["event_type"] for event in events(feed.diff(last + 11, last + 20, last + 10))] == ["book_recovered"]


def test_refused_and_missing_quotes_accuse_no_book() -> None:
    for spoil in (
        lambda feed: feed.quote(30, bid="100.1"),
        lambda feed: feed.quote(30, B="x"),
        lambda feed: feed.step("frame", b'{"stream":"btcusdt@bookTi', symbol="BTCUSDT", route="public"),
        lambda feed: feed.step("frame", b"\xff", route="public"),
        lambda feed: feed.step(
            "gap", {"reason": "conflated", "streams": ["bookTicker"], "frames": 1}, symbol="BTCUSDT"
        ),
    ):
        feed = Feed().synced()
        feed.quote(20, B="1", A="1")
        feed.diff(21, 30, 20, [["99.95", "1"]])
        spoil(feed)
        feed.quote(40, bid="99.95", B="1", A="1")
        (row,) = of(feed.diff(31, 40, 30), "market.rows")
        (found,) = feed.processor.symbol_figures()
        assert (found.oracle_checked, found.oracle_failed, found.oracle_skipped) == (1, 0, 1)
        assert row["book_state"] == "synced"
