"""What the soak makes of its samples."""

from __future__ import annotations

from tests.chaos.load import SHOWN, growth, lags_sec, slope, thinned


def test_lag_in_seconds_is_how_long_ago_so_many_records_were_written() -> None:
    steady = [{"at": 2.0 * number, "written": 1000 * number, "lag": 0} for number in range(10)]
    assert lags_sec(steady) == [0.0] * 10
    steady[6]["lag"], steady[9]["lag"] = 1000, 2500
    assert lags_sec(steady)[6:] == [2.0, 0.0, 0.0, 5.0]
    # A source that stands still does not make what is behind it older than the moment it was written.
    assert lags_sec([*steady[:4], {"at": 30.0, "written": 3000, "lag": 500}]) == [0.0, 0.0, 0.0, 0.0, 25.0]
    assert lags_sec([{"at": 0.0, "written": 0, "lag": 0}]) == [0.0]


def test_a_series_is_thinned_to_what_can_be_shown() -> None:
    for length in (0, 1, 2, SHOWN - 1, SHOWN, SHOWN + 1, 917, 100_000):
        points = list(range(length))
        kept = thinned(points)
        assert len(kept) <= SHOWN
        assert sorted(set(kept)) == kept
        assert kept[:1] == points[:1]
        assert kept[-1:] == points[-1:]


def test_a_slope_is_that_of_the_line_through_the_points() -> None:
    assert slope([(number / 2, 70.0 + 3 * number) for number in range(9)]) == 6.0
    assert slope([(1.0, 2.0)]) == 0.0


def test_growth_is_told_apart_from_the_markets_own_ups_and_downs() -> None:
    wave = [(number / 2, 70.0 + 20 * (number % 16 > 11)) for number in range(48)]
    assert slope(wave) > 0.1
    assert growth(wave, 8.0) == 0.0
    assert growth([(at, value + 3 * at) for at, value in wave], 8.0) == 3.0
    assert growth(wave[:9], 8.0) == slope(wave[:9])
