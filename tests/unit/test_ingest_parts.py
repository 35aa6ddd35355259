"""The pure parts of ingestion: handing over, watching, the clock, weight and requests."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from ingest_exchange import frame
from orderflow.ingest.clock import JournalClock
from orderflow.ingest.handover import HOLD_SEC, Handover, Taken
from orderflow.ingest.ids import ids_of
from orderflow.ingest.requests import Need, RequestDesk, SeqAges
from orderflow.ingest.rest import WeightBudget
from orderflow.ingest.route import MAX_REASONS, backoff_sec, count_reason
from orderflow.ingest.watch import ALL_WELL, WATCH_SEC, Rate, RouteMemory, SocketWatch, StreamKey
from orderflow.venues.binance.frames import route_of

STREAMS = ("btcusdt@aggTrade", "btcusdt@depth@100ms", "ethusdt@bookTicker")


def test_ids_are_read_from_the_three_kinds_and_from_nothing_else() -> None:
    assert ids_of("aggTrade", frame("btcusdt@aggTrade", 7)) == (7, 7)
    assert ids_of("bookTicker", frame("btcusdt@bookTicker", 7)) == (7, 7)
    assert ids_of("depth", frame("btcusdt@depth@100ms", 7)) == (61, 70)
    assert ids_of("markPrice", frame("btcusdt@markPrice@1s", 7)) is None
    for damaged in (b"", b"{}", b'{"data":{"a":"x"}}', b'{"data":{"a":-1}}', b"\xff"):
        assert ids_of("aggTrade", damaged) is None


# -- handing over -----------------------------------------------------------------------------------------------------


def taken(stream: str, number: int) -> Taken:
    content = frame(stream, number)
    return Taken(content, route_of(content), number)


@st.composite
def two_sockets(draw: st.DrawFn) -> tuple[list[tuple[str, str, int]], int, int]:
    """Deliveries of two sockets that send the same frames of three streams, at their own pace.

    (which socket, stream, number), number of deliveries before the handover begins, and where the older one ends.
    """
    count = draw(st.integers(5, 25))
    order = [draw(st.permutations(STREAMS)) for _ in range(count)]
    older = [("older", stream, number) for number in range(1, count + 1) for stream in order[number - 1]]
    first = draw(st.integers(1, 3))
    newer = [("newer", stream, number) for number in range(first, count + 1) for stream in order[number - 1]]
    mixed: list[tuple[str, str, int]] = []
    while older or newer:
        source = older if not newer or (older and draw(st.booleans())) else newer
        mixed.append(source.pop(0))
    return mixed, draw(st.integers(0, len(mixed))), draw(st.integers(0, len(mixed)))


@given(two_sockets())
def test_nothing_is_lost_or_repeated_or_mixed_wherever_two_sockets_stand(
    case: tuple[list[tuple[str, str, int]], int, int],
) -> None:
    deliveries, begin_at, end_at = case
    handover = Handover()
    journal: list[Taken] = []
    spoken: set[tuple[str, str]] = set()
    ended = False
    for place, (which, stream, number) in enumerate(deliveries):
        # Streams are handed over only once both sockets have shown that they deliver them.
        if place >= begin_at and len(spoken) == 2 * len(STREAMS) and not handover.begun:
            journal.extend(handover.begin(0.0))
        spoken.add((which, stream))
        if place >= end_at and handover.complete and not ended:
            ended = True
            journal.extend(handover.older_ended())
        if which == "newer":
            journal.extend(handover.newer(taken(stream, number)))
        elif not ended:
            journal.extend(handover.older(taken(stream, number)))
    journal.extend(handover.older_ended())
    assert handover.missed() == []
    for stream in STREAMS:
        key = route_of(frame(stream, 1))[:2]
        numbers = [each.recv_ts_ns for each in journal if each.found[:2] == key]
        assert numbers == list(range(1, len(numbers) + 1))
        assert len(numbers) == max(number for _, each, number in deliveries if each == stream)
    assert handover.held == 0


def test_a_stream_on_which_the_older_socket_is_deaf_is_taken_over_in_the_end_and_told() -> None:
    handover = Handover()
    assert list(handover.older(taken(STREAMS[0], 1))) == [taken(STREAMS[0], 1)]
    assert list(handover.newer(taken(STREAMS[0], 5))) == []
    assert list(handover.begin(10.0)) == []
    assert list(handover.newer(taken(STREAMS[0], 6))) == []
    assert not handover.complete
    assert list(handover.expired(10.0 + HOLD_SEC - 0.1)) == []
    assert list(handover.expired(10.0 + HOLD_SEC)) == [taken(STREAMS[0], 5), taken(STREAMS[0], 6)]
    assert handover.missed() == [("BTCUSDT", "aggTrade")]
    assert handover.complete
    assert list(handover.older(taken(STREAMS[0], 7))) == []
    assert handover.missed_with_newer() == [("BTCUSDT", "aggTrade")], "should the newer one die without it"


def test_streams_without_ids_are_handed_over_by_their_event_time() -> None:
    first, second, third = (taken("btcusdt@markPrice@1s", number) for number in (1, 2, 3))
    handover = Handover()
    assert list(handover.older(first)) == [first]
    assert list(handover.newer(first)) == []
    assert list(handover.newer(second)) == [], "the older one may deliver it yet"
    assert list(handover.older_ended()) == [second], "it did not"
    assert list(handover.newer(third)) == [third]


def test_a_damaged_frame_is_the_older_sockets_as_long_as_it_lives() -> None:
    damaged = Taken(b'{"stream":"btcusdt@aggTrade","data":{"a":"x"}}', route_of(frame("btcusdt@aggTrade", 1)), 1)
    handover = Handover()
    assert list(handover.older(damaged)) == [damaged]
    assert list(handover.newer(damaged)) == []
    assert list(handover.older_ended()) == []
    assert list(handover.newer(damaged)) == [damaged]


# -- watching ---------------------------------------------------------------------------------------------------------


class Watched:
    """A socket under watch, with streams that speak at given periods."""

    def __init__(self, periods: dict[StreamKey, float], memory: RouteMemory | None = None) -> None:
        self.memory = memory or RouteMemory()
        self.watch = SocketWatch(self.memory, list(periods), 10.0, 60.0)
        self.periods = periods
        self.now_sec = 0.0

    def go(self, sec: float, silent: frozenset[StreamKey] = frozenset(), blocked: bool = False) -> list[object]:
        """What was said of it in that time, all-well left out."""
        said: list[object] = []
        for _ in range(round(sec / WATCH_SEC)):
            before, self.now_sec = self.now_sec, self.now_sec + WATCH_SEC
            for (symbol, kind), period_sec in self.periods.items():
                if (symbol, kind) not in silent:
                    for _ in range(int(self.now_sec / period_sec) - int(before / period_sec)):
                        assert self.watch.note(symbol, kind)
            verdict = self.watch.look(WATCH_SEC, blocked)
            if verdict != ALL_WELL:
                said.append(verdict)
        return said


BUSY: dict[StreamKey, float] = {(symbol, kind): 0.2 for symbol in ("A", "B") for kind in ("depth", "bookTicker")}


def test_a_busy_socket_is_left_alone() -> None:
    assert Watched(BUSY).go(3600) == []


def test_frames_of_other_streams_are_no_sign_of_life() -> None:
    watched = Watched(BUSY)
    assert not watched.watch.note("C", "depth")
    assert not watched.watch.note(None, "garbage")


def test_without_first_data_it_is_ended_after_growing_times() -> None:
    memory = RouteMemory()
    ages = []
    for _ in range(5):
        watched = Watched(BUSY, memory)
        while not watched.go(WATCH_SEC, frozenset(BUSY)):
            pass
        ages.append(watched.now_sec)
    assert ages == [pytest.approx(each, abs=1) for each in (10, 20, 40, 60, 60)]


def test_silence_of_everything_ends_it() -> None:
    watched = Watched(BUSY)
    watched.go(100)
    assert watched.go(16, frozenset(BUSY)) == [], "in its first minutes nothing is known of its rates"
    assert any(getattr(each, "end", "") == "silent" for each in watched.go(60, frozenset(BUSY)))


def test_a_silent_kind_asks_for_another_socket_ever_more_rarely() -> None:
    watched = Watched(BUSY)
    watched.go(400)
    silent = frozenset(key for key in BUSY if key[1] == "depth")
    times = []
    for _ in range(3600):
        before = watched.now_sec
        if any(getattr(each, "renew", "") == "depth_silent" for each in watched.go(1.0, silent)):
            times.append(before - 400)
    assert 15 <= times[0] <= 17
    assert len(times) <= 9
    assert watched.go(10) == []


def test_a_pause_after_a_burst_is_nothing() -> None:
    watched = Watched({("A", "aggTrade"): 100.0, ("A", "markPrice"): 1.0})
    watched.go(900)
    for _ in range(2000):
        watched.watch.note("A", "aggTrade")
    assert watched.go(55) == []


def test_a_blocked_reader_and_a_late_look_are_nobodys_silence() -> None:
    watched = Watched(BUSY)
    watched.go(400)
    assert watched.go(300, frozenset(BUSY), blocked=True) == []
    assert watched.watch.look(120.0, False) == ALL_WELL
    assert watched.go(1) == []


def test_many_silent_streams_are_the_sockets_fault_and_one_is_its_own() -> None:
    periods: dict[StreamKey, float] = {(f"S{number:02}", "depth"): 0.2 for number in range(30)}
    watched = Watched(periods)
    watched.go(400)
    said = watched.go(65, frozenset([("S03", "depth")]))
    assert [getattr(each, "resubscribe", ()) for each in said] == [[("S03", "depth")]]
    watched = Watched(periods)
    watched.go(400)
    said = watched.go(65, frozenset((f"S{number:02}", "depth") for number in range(12)))
    assert [getattr(each, "renew", "") for each in said] == ["depth_partly_silent"]


def test_a_rate_is_the_lesser_of_two_means() -> None:
    rate = Rate()
    for _ in range(600):
        rate.add(1, 1.0)
    rate.add(1000, 1.0)
    assert min(rate.fast, rate.slow) == pytest.approx(1 + 999 / 600, rel=0.05)
    assert rate.bound_sec(30, 15, 600, 60) == 15
    assert Rate().bound_sec(30, 15, 600, 60) == 60


# -- the clock --------------------------------------------------------------------------------------------------------


class Times:
    """A wall clock and a monotonic one, by hand."""

    def __init__(self) -> None:
        self.wall_ns = 10**18
        self.loop_sec = 5.0

    def time_ns(self) -> int:
        return self.wall_ns

    def loop(self) -> float:
        return self.loop_sec

    def go(self, sec: float) -> None:
        self.wall_ns += round(sec * 1e9)
        self.loop_sec += sec


@given(st.lists(st.tuples(st.floats(0.01, 30.0), st.floats(-7200, 7200)), max_size=40))
def test_the_journals_clock_never_goes_back_and_never_stands(steps: list[tuple[float, float]]) -> None:
    times = Times()
    clock = JournalClock(times, times.loop)
    before = clock.now_ns()
    for elapsed_sec, jump_sec in steps:
        times.go(elapsed_sec)
        times.wall_ns += round(jump_sec * 1e9)
        clock.look()
        now = clock.now_ns()
        assert now - before >= 0.49 * elapsed_sec * 1e9
        before = now


def test_a_jump_is_doubted_until_the_exchange_has_spoken() -> None:
    times = Times()
    clock = JournalClock(times, times.loop)
    times.wall_ns += 3600 * 10**9
    assert clock.look()
    times.go(1.0)
    assert not clock.look()
    assert clock.behind_wall_ms == pytest.approx(3600e3)
    clock.compare(times.wall_ns - 3600 * 10**9, times.wall_ns)
    for _ in range(100):
        times.go(1.0)
        assert not clock.look()
    assert clock.behind_wall_ms == pytest.approx(3600e3, abs=1), "the exchange contradicts the wall clock"
    clock.compare(times.wall_ns, times.wall_ns)
    times.go(0.2)
    clock.look()
    assert clock.behind_wall_ms == pytest.approx(0, abs=1), "the machine had slept"


def test_without_an_answer_the_wall_clock_is_followed_in_the_end() -> None:
    times = Times()
    clock = JournalClock(times, times.loop)
    times.wall_ns -= 3 * 10**9
    clock.look()
    for _ in range(200):
        times.go(0.2)
        clock.look()
    assert abs(clock.behind_wall_ms) < 500
    assert clock.jumps == 1


def test_an_exchange_of_another_time_does_not_move_it() -> None:
    times = Times()
    clock = JournalClock(times, times.loop)
    year_ns = 365 * 86_400 * 10**9
    for _ in range(5):
        clock.compare(times.wall_ns - year_ns - 1, times.wall_ns)
        times.go(60.0)
        clock.look()
        assert clock.behind_wall_ms == pytest.approx(0, abs=1)
    times.wall_ns += 3600 * 10**9
    clock.look()
    clock.compare(times.wall_ns - year_ns - 3600 * 10**9, times.wall_ns)
    for _ in range(5):
        times.go(60.0)
        clock.look()
    assert clock.behind_wall_ms == pytest.approx(3600e3, abs=1), "the jump is known for one all the same"


def test_it_begins_no_earlier_than_the_journal_stands() -> None:
    times = Times()
    clock = JournalClock(times, times.loop, times.wall_ns + 2 * 10**9)
    assert clock.now_ns() == times.wall_ns + 2 * 10**9
    assert not clock.look()


# -- weight and requests ----------------------------------------------------------------------------------------------


def test_weight_is_counted_per_minute_of_the_exchange() -> None:
    now, loop = [119.0], [0.0]
    budget = WeightBudget(100, lambda: now[0], lambda: loop[0])
    budget.take(60)
    minute = budget.minute
    assert budget.wait_sec(40) == 0
    assert budget.wait_sec(41) == pytest.approx(1.0)
    now[0] = 120.5
    assert budget.wait_sec(100) == 0
    budget.told(95, minute)
    assert budget.used == 0, "an answer of the minute before says nothing of this one"
    budget.told(95, budget.minute)
    assert budget.wait_sec(6) > 0


def test_a_ban_is_waited_out_whatever_the_wall_clock_does() -> None:
    now, loop = [1000.0], [0.0]
    budget = WeightBudget(100, lambda: now[0], lambda: loop[0])
    budget.block(30.0)
    now[0] = 10**6
    assert budget.wait_sec(1) == 30.0
    loop[0] = 31.0
    assert budget.wait_sec(1) == 0.0
    budget.block(1e12)
    assert budget.blocked_sec == 3 * 86_400.0


def need(kind: str, symbol: str, seq: int = 1, from_id: int = 0) -> Need:
    return Need(kind, symbol, 0, seq, from_id, from_id)


def test_missing_trades_go_first_but_not_always() -> None:
    desk = RequestDesk(SeqAges())
    for number in range(6):
        desk.offer(need("backfill", f"B{number}"))
        desk.offer(need("snapshot", f"S{number}"))
    picked = [desk.pick(0.0, lambda kind: True) for _ in range(6)]
    assert [each.symbol for each in picked if each] == ["B0", "B1", "S0", "B2", "B3", "S1"]


def test_a_repeated_need_keeps_its_place_and_brings_its_news() -> None:
    desk = RequestDesk(SeqAges())
    desk.offer(need("backfill", "A", 1, 10))
    desk.offer(need("backfill", "B", 1))
    desk.offer(need("backfill", "A", 5, 12))
    assert desk.pick(0.0, lambda kind: True) == need("backfill", "A", 5, 12)


def test_what_is_under_way_is_not_asked_again_until_its_answer_stands_in_the_journal() -> None:
    desk = RequestDesk(SeqAges())
    desk.offer(need("snapshot", "A", 3))
    first = desk.pick(0.0, lambda kind: True)
    assert first is not None
    desk.offer(need("snapshot", "A", 4))
    assert desk.pick(0.0, lambda kind: True) is None
    desk.answered("snapshot", "A", 10)
    assert desk.pick(0.0, lambda kind: True) is None
    assert desk.dropped == {"answered": 1}
    desk.offer(need("snapshot", "A", 10))
    assert desk.pick(0.0, lambda kind: True) is not None, "what the answer itself has caused is new"


def test_old_needs_are_dropped_by_the_journals_own_age() -> None:
    ages = SeqAges()
    for second in range(31):
        ages.mark({0: 100 * second}, float(second))
    desk = RequestDesk(ages)
    desk.offer(need("snapshot", "OLD", 1500))
    desk.offer(need("snapshot", "NEW", 2900))
    desk.offer(need("snapshot", "NEWEST", 99_999))
    picked = [desk.pick(30.0, lambda kind: True) for _ in range(3)]
    assert [each.symbol for each in picked if each] == ["NEW", "NEWEST"]
    assert desk.dropped == {"old": 1}


def test_backoff_grows_within_its_bounds() -> None:
    assert backoff_sec(0, 1.0, 30.0, 0.0) == 1.0
    assert backoff_sec(50, 1.0, 30.0, 0.0) == 30.0
    assert 0 < backoff_sec(3, 1.0, 30.0, 0.999999) < 0.1


def test_reasons_from_outside_are_bounded() -> None:
    counts: dict[str, int] = {}
    for number in range(1000):
        count_reason(counts, f"closed_{number}")
    assert len(counts) == MAX_REASONS + 1
    assert sum(counts.values()) == 1000
