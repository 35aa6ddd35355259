"""Rolling statistics against plain recomputation."""

from __future__ import annotations

import math
import random
import statistics
from collections import deque

import msgspec
import pytest
from orderflow.microstructure.windows import (
    DecayedMean,
    DecayedRate,
    RateCounter,
    RollingMoments,
    SortedWindow,
    WindowSum,
    decay_weight,
)


def values(seed, count):
    chance = random.Random(seed)
    return [chance.gauss(0, 1) * 10 ** chance.randint(-3, 3) for _ in range(count)]


@pytest.mark.parametrize("offset", [0.0, 1e6, -1e9])
def test_moments_follow_the_window(offset):
    moments, window = RollingMoments(size=30), deque(maxlen=30)
    for value in (offset + value for value in values(1, 1000)):
        moments.push(value)
        window.append(value)
        assert moments.count == len(window)
        assert moments.mean == pytest.approx(statistics.fmean(window), rel=1e-12, abs=1e-12)
        if len(window) > 1:
            assert moments.sample_std() == pytest.approx(statistics.stdev(window), rel=1e-6, abs=1e-9)
            assert moments.population_std() == pytest.approx(statistics.pstdev(window), rel=1e-6, abs=1e-9)


def test_moments_recover_at_once_when_an_outlier_leaves():
    moments = RollingMoments(size=10)
    for value in [1e12, *[1.0, 2.0] * 5]:
        moments.push(value)
    assert moments.mean == 1.5
    assert moments.sample_std() == statistics.stdev([1.0, 2.0] * 5)


def test_moments_of_equal_values_have_no_spread():
    moments = RollingMoments(size=7)
    for _ in range(100):
        moments.push(0.1)
        assert moments.m2 >= 0.0
    assert moments.sample_std() == pytest.approx(0.0, abs=1e-17)
    assert RollingMoments(size=3).sample_std() == RollingMoments(size=3).population_std() == 0.0


def test_moments_do_not_drift_over_many_values():
    moments, window = RollingMoments(size=300), deque(maxlen=300)
    chance = random.Random(2)
    for _ in range(200_000):
        value = chance.choice((0.0, 0.001, -250.0, 3.7))
        moments.push(value)
        window.append(value)
    assert moments.mean == pytest.approx(statistics.fmean(window), abs=1e-12)
    assert moments.sample_std() == pytest.approx(statistics.stdev(window), rel=1e-12)


@pytest.mark.parametrize("size", [1, 2, 3, 10, 11, 200])
def test_median_and_mad_follow_the_window(size):
    sorted_window, window = SortedWindow(size=size), deque(maxlen=size)
    assert (sorted_window.median(), sorted_window.mad()) == (0.0, 0.0)
    chance = random.Random(size)
    for _ in range(600):
        value = float(chance.randint(-5, 5)) if chance.random() < 0.7 else chance.gauss(0, 100)
        sorted_window.push(value)
        window.append(value)
        median = statistics.median(window)
        assert sorted_window.median() == median
        assert sorted_window.mad() == statistics.median(abs(value - median) for value in window)
    assert sorted_window.ordered == sorted(window)


def test_window_sum_keeps_both_ends():
    window = WindowSum(span_ms=100)
    assert window.push(1000, 1.0) == 1.0
    assert window.push(1100, 2.0) == 3.0
    assert window.push(1101, 4.0) == 6.0
    assert window.push(900, 8.0) == 14.0  # late: counted at the newest time
    assert window.push(1202, 0.5) == 0.5


def test_window_sum_is_compensated():
    window, naive = WindowSum(span_ms=10), 0.0
    for t, value in enumerate([1e16, 1.0, 1.0, 1.0, -1e16]):
        naive += value
        total = window.push(t, value)
    assert (total, naive) == (3.0, 0.0)
    chance = random.Random(3)
    window, held = WindowSum(span_ms=500), deque()
    for t in range(40_000):
        value = chance.uniform(-1, 1) * 10 ** chance.randint(-6, 6)
        held.append((t, value))
        while held[0][0] < t - 500:
            held.popleft()
        total = window.push(t, value)
    assert total == pytest.approx(math.fsum(value for _, value in held), abs=1e-9)


def test_memory_is_bounded_by_the_span():
    window, counter = WindowSum(span_ms=1000), RateCounter(span_ms=1000)
    for i in range(50_000):
        window.push(i // 4, 1.0)
        counter.push(i // 4)
        counter.per_sec(i // 4)
    assert len(window.values) <= 1001 * 4 / 3 + 128
    assert len(counter.counts) <= 1001 * 4 / 3 + 128
    assert window.push(12_500, 1.0) == 4001.0


def test_decayed_mean_is_the_weighted_mean_of_events():
    mean, events, now_ms = DecayedMean(half_life_ms=1000.0), [], 0
    for ts_ms, value in [(0, 1.0), (0, 5.0), (500, 2.0), (2500, 8.0), (2400, 3.0)]:
        now_ms = max(now_ms, ts_ms)
        events.append((now_ms, value))  # a late event counts at the newest time
        weights = [0.5 ** ((now_ms - at_ms) / 1000) for at_ms, _ in events]
        expected = sum(w * x for w, (_, x) in zip(weights, events)) / sum(weights)
        assert mean.push(ts_ms, value) == pytest.approx(expected, rel=1e-12)
        assert mean.weight == pytest.approx(sum(weights), rel=1e-12)


def test_decayed_rate_of_a_steady_flow_is_its_rate():
    rate = DecayedRate(half_life_ms=1000.0)
    got = [rate.push(t, 0.01) for t in range(60_000)]
    assert got[-1] == pytest.approx(10.0, rel=1e-3)
    assert rate.push(59_000, 0.0) == got[-1]


def test_decay_weight():
    assert decay_weight(1000, 1000.0) == 0.5
    assert decay_weight(0, 1000.0) == decay_weight(-5, 1000.0) == 0.0
    assert decay_weight(1, 1e12) == pytest.approx(math.log(2) * 1e-12, rel=1e-9)


def test_rate_counter():
    counter = RateCounter(span_ms=1000)
    assert counter.per_sec(5) is None
    for t in (0, 0, 500, 400, 900):
        counter.push(t)
        assert counter.per_sec(t if t != 400 else 500) is None
    assert counter.per_sec(1000) == 5.0
    assert counter.per_sec(1001) == 3.0
    assert counter.per_sec(1500) == 3.0  # both ends included
    assert counter.per_sec(9000) == 0.0
    counter.push(8000)
    assert counter.per_sec(9000) == 1.0


@pytest.mark.parametrize(
    ("make", "push"),
    [
        (lambda: RollingMoments(size=20), lambda each, t, x: (each.push(x), each.mean, each.m2)),
        (lambda: SortedWindow(size=20), lambda each, t, x: (each.push(x), each.median(), each.mad())),
        (lambda: WindowSum(span_ms=50), lambda each, t, x: each.push(t, x)),
        (lambda: DecayedMean(half_life_ms=50.0), lambda each, t, x: each.push(t, x)),
        (lambda: DecayedRate(half_life_ms=50.0), lambda each, t, x: each.push(t, x)),
        (lambda: RateCounter(span_ms=50), lambda each, t, x: (each.push(t), each.per_sec(t))),
    ],
)
def test_state_goes_through_bytes_at_any_point(make, push):
    whole, broken = make(), make()
    for i, value in enumerate(values(4, 200)):
        t = 3 * i
        if i % 7 == 0:
            broken = msgspec.msgpack.decode(msgspec.msgpack.encode(broken), type=type(broken))
        assert push(whole, t, value) == push(broken, t, value)
    assert msgspec.msgpack.encode(whole) == msgspec.msgpack.encode(broken)
