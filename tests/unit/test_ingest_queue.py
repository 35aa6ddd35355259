"""What waits for the journal: bounds, conflation, drops, and that the account of them is exact."""

from __future__ import annotations

from collections import Counter
from typing import Any

import msgspec
from hypothesis import given
from hypothesis import strategies as st
from ingest_exchange import frame
from orderflow.ingest.queue import COMPACT_SLACK, MAX_RANGES, FrameQueue, Loss
from orderflow.processor import Record
from orderflow.streaming.recorder import journal_record

STREAMS = {"aggTrade": "btcusdt@aggTrade", "bookTicker": "btcusdt@bookTicker", "depth": "btcusdt@depth@100ms"}


def record_of(kind: str, number: int, symbol: str = "BTCUSDT") -> Record:
    stream = STREAMS[kind].replace("btcusdt", symbol.lower())
    return journal_record("frame", number, symbol=symbol, source_position=number, payload=frame(stream, number))


def taken(queue: FrameQueue, most: int = 10**6) -> list[Record]:
    found: list[Record] = []
    queue.take(lambda partition, record: found.append(record), most)
    return found


def payload(record: Record) -> dict[str, Any]:
    content: dict[str, Any] = msgspec.json.decode(record["payload"])
    return content


def number_of(record: Record) -> int:
    data = payload(record)["data"]
    return int(data["a"] if "m" in data else data["u"] // (10 if "U" in data else 1))


def test_below_the_bound_everything_passes_in_order() -> None:
    queue = FrameQueue(100, 1 << 20, blocking=False)
    for number in range(50):
        queue.admit(0, record_of("bookTicker", number), "bookTicker")
    assert [number_of(record) for record in taken(queue)] == list(range(50))
    assert (queue.records, queue.bytes) == (0, 0)


def test_beyond_the_bound_a_newer_quote_stands_for_the_older_ones_and_says_how_many() -> None:
    queue = FrameQueue(4, 1 << 20, blocking=False)
    for number in range(3):
        queue.admit(0, record_of("depth", number), "depth")
    for number in range(10, 16):
        queue.admit(0, record_of("bookTicker", number), "bookTicker")
    found = taken(queue)
    assert [record["kind"] for record in found] == ["frame"] * 3 + ["gap", "frame"]
    assert payload(found[3]) == {"reason": "conflated", "streams": ["bookTicker"], "frames": 5}
    assert number_of(found[4]) == 15
    assert queue.conflated == 5


def test_beyond_twice_the_bound_diffs_are_dropped_and_told_before_the_next_one() -> None:
    queue = FrameQueue(2, 1 << 20, blocking=False)
    for number in range(1, 8):
        queue.admit(0, record_of("depth", number), "depth")
    first = taken(queue)
    assert [number_of(record) for record in first] == [1, 2, 3, 4]
    queue.admit(0, record_of("depth", 8), "depth")
    gap, after = taken(queue)
    assert payload(gap) == {"reason": "dropped", "streams": ["depth"], "frames": 3, "ranges": [[41, 70]]}
    assert (gap["symbol"], number_of(after)) == ("BTCUSDT", 8)
    queue.tell_losses(9)
    assert taken(queue) == [], "told once"


def test_bytes_are_a_bound_too_and_an_empty_queue_takes_what_is_beyond_it() -> None:
    queue = FrameQueue(1000, 2000, blocking=True)
    queue.admit(0, journal_record("frame", 1, symbol="A", payload=b"x" * 5000), "depth")
    assert queue.over
    assert len(taken(queue)) == 1
    assert queue.easy


def test_superseded_quotes_do_not_pile_up() -> None:
    queue = FrameQueue(1, 1 << 30, blocking=False)
    queue.put(0, journal_record("tick", 1))
    for number in range(20 * COMPACT_SLACK):
        queue.admit(0, record_of("bookTicker", number), "bookTicker")
    assert queue.records == 2
    assert len(queue._places) <= 2 * COMPACT_SLACK
    assert number_of(taken(queue)[-1]) == 20 * COMPACT_SLACK - 1


def test_ranges_of_a_loss_are_exact_for_trades_and_bounded() -> None:
    loss = Loss()
    for number in (5, 6, 7, 9, 10, 10):
        loss.add("aggTrade", frame(STREAMS["aggTrade"], number))
    assert payload({"payload": loss.payload("aggTrade")})["ranges"] == [[5, 7], [9, 10]]
    for number in range(100, 100 + 10 * MAX_RANGES, 2):
        loss.add("aggTrade", frame(STREAMS["aggTrade"], number))
    content = payload({"payload": loss.payload("aggTrade")})
    assert (len(content["ranges"]), content["hull"]) == (MAX_RANGES, True)
    assert content["ranges"][-1][1] == 98 + 10 * MAX_RANGES
    assert content["frames"] == 6 + 5 * MAX_RANGES
    damaged = Loss()
    damaged.add("aggTrade", b"damaged")
    assert payload({"payload": damaged.payload("aggTrade")})["ranges"] == []


KINDS = sorted(STREAMS)
SYMBOLS = ("AUSDT", "BUSDT")
OPERATIONS = st.lists(
    st.one_of(st.tuples(st.sampled_from(KINDS), st.sampled_from(SYMBOLS)), st.integers(1, 12), st.just("tell")),
    max_size=200,
)


@given(OPERATIONS, st.integers(1, 10))
def test_what_comes_in_is_journalled_conflated_or_dropped_and_the_gaps_say_which(
    operations: list[Any], bound: int
) -> None:
    queue = FrameQueue(bound, 1 << 30, blocking=False)
    sent: dict[tuple[str, str], list[int]] = {}
    found: list[Record] = []
    for number, operation in enumerate(operations, 1):
        if isinstance(operation, tuple):
            kind, symbol = operation
            mine = sent.setdefault((kind, symbol), [])
            mine.append(len(mine) + 1)
            queue.admit(0, record_of(kind, len(mine), symbol) | {"recv_ts_ns": number}, kind)
        elif isinstance(operation, int):
            queue.take(lambda partition, record: found.append(record), operation)
        else:
            queue.tell_losses(number)
    queue.tell_losses(len(operations) + 1)
    found.extend(taken(queue))
    assert (queue.records, queue.bytes) == (0, 0)
    for (kind, symbol), came in sent.items():
        account: list[int] = []
        for record in found:
            if record["symbol"] != symbol:
                continue
            if record["kind"] == "frame":
                if kind == _kind_of(record):
                    account.append(number_of(record))
                continue
            content = payload(record)
            if content["streams"] != [kind]:
                continue
            # Whoever has come this far knows all that is missing before it: the account is in order without sorting.
            if content["reason"] == "conflated":
                account.extend(
                    range(account[-1] + 1 if account else 1, (account[-1] if account else 0) + 1 + content["frames"])
                )
            else:
                (low, high) = content["ranges"][0][0], content["ranges"][-1][1]
                scale = 10 if kind == "depth" else 1
                numbers = list(range((low + scale - 1) // scale, high // scale + 1))
                assert len(numbers) == content["frames"]
                account.extend(numbers)
        assert account == came
    frames = Counter(record["kind"] for record in found)["frame"]
    assert frames + queue.conflated + sum(queue.dropped.values()) == sum(map(len, sent.values()))
    stamps = [record["recv_ts_ns"] for record in found if record["kind"] == "frame"]
    assert stamps == sorted(stamps), "in the order of arrival"


def _kind_of(record: Record) -> str:
    data = payload(record)["data"]
    return "aggTrade" if "m" in data else "depth" if "U" in data else "bookTicker"
