"""Regime: schedule, market vote, hysteresis, volatility slices."""

from __future__ import annotations

from datetime import datetime, timedelta
from zoneinfo import ZoneInfo

import msgspec
import pytest
from orderflow.microstructure.regime import MarketSample, Regime, RegimeConfig, Schedule, load_zone, session_of

BUSY = MarketSample(200.0, 60.0, 1.0, 6.0, 400_000.0)
DULL = MarketSample(20.0, 5.0, 1.0, 1.0, 10_000.0)
MINUTE_MS = 60_000


def at(text, zone="UTC"):
    return round(datetime.fromisoformat(text).replace(tzinfo=ZoneInfo(zone)).timestamp() * 1000)


def modes(config, minutes):
    """Mode after each minute of samples, and the changes told."""
    regime = Regime(config)
    state = regime.fresh()
    out, changes = [], []
    for number, sample in enumerate([*minutes, None]):
        for second in range(60):
            change = regime.take(state, number * MINUTE_MS + second * 1000, sample)
            if change:
                changes.append((number, change.before, change.after, change.reason))
        if number:
            out.append(state.mode)
    return out, changes


# --- schedule -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("moment", "expected"),
    [
        ("2024-07-18T08:59:59.999", False),
        ("2024-07-18T09:00", True),
        ("2024-07-18T15:59:59.999", True),
        ("2024-07-18T16:00", False),
        ("2024-07-18T20:00", True),
        ("2024-07-19T01:59", True),
        ("2024-07-19T02:00", False),
    ],
)
def test_windows_in_local_time_and_over_midnight(moment, expected):
    schedule = Schedule(RegimeConfig(timezone="Asia/Hong_Kong", windows=("09:00-16:00", "20:00-02:00")))
    assert schedule.vote(at(moment, "Asia/Hong_Kong")) is expected


def test_a_window_belongs_to_the_day_on_which_it_begins():
    schedule = Schedule(RegimeConfig(windows=("22:00-02:00",), weekdays=("fri",), holidays=("2024-07-26",)))
    assert schedule.vote(at("2024-07-19T23:00"))  # Friday
    assert schedule.vote(at("2024-07-20T01:00"))  # Saturday morning, begun on Friday
    assert not schedule.vote(at("2024-07-19T01:00"))  # Friday morning, begun on Thursday
    assert not schedule.vote(at("2024-07-26T23:00"))  # holiday
    assert not schedule.vote(at("2024-07-27T01:00"))  # its night too


def test_no_windows_no_vote():
    assert Schedule(RegimeConfig(weekdays=("mon",))).vote(at("2024-07-15T12:00")) is None


def test_the_whole_day():
    for window in ("00:00-24:00", "00:00-00:00"):
        schedule = Schedule(RegimeConfig(windows=(window,)))
        assert all(schedule.vote(at("2024-07-15T00:00") + minute * MINUTE_MS) for minute in range(1440))


def test_daylight_saving_moves_the_window():
    schedule = Schedule(RegimeConfig(timezone="America/New_York", windows=("09:30-16:00",)))
    assert schedule.vote(at("2024-03-08T14:30"))  # EST
    assert schedule.vote(at("2024-03-11T13:30"))  # EDT
    assert not schedule.vote(at("2024-03-08T13:30"))


def test_zones_equal_those_of_the_machine_wherever_it_has_them():
    moment = datetime(2024, 7, 18, 12)
    for name, hours in (("Asia/Tokyo", 9), ("UTC", 0), ("Europe/London", 1), ("America/New_York", -4)):
        assert load_zone(name).utcoffset(moment) == timedelta(hours=hours)


@pytest.mark.parametrize("clock_ms", [-(10**15), 0, 10**18])
def test_odd_clocks_do_no_harm(clock_ms):
    schedule = Schedule(RegimeConfig(timezone="Asia/Tokyo", windows=("22:00-02:00",)))
    assert schedule.vote(clock_ms) in (True, False)


# --- mode ---------------------------------------------------------------------------------------------------------


def test_hysteresis_two_and_four_windows():
    sequence = [BUSY] * 3 + [DULL] * 5
    mode, changes = modes(RegimeConfig(), sequence)
    assert mode == ["neutral", "active", "active", "active", "active", "active", "quiet", "quiet"]
    assert changes == [(2, "neutral", "active", "market"), (7, "active", "quiet", "market")]


def test_windows_must_follow_each_other():
    mode, changes = modes(RegimeConfig(), [BUSY, DULL] * 4)
    assert set(mode) == {"neutral"}
    assert changes == []


def test_no_vote_breaks_the_row():
    mode, _ = modes(RegimeConfig(), [BUSY, None, BUSY])
    assert mode == ["neutral"] * 3


def test_an_empty_schedule_is_neutral_not_active():
    assert modes(RegimeConfig(use_market=False), [BUSY] * 6)[0] == ["neutral"] * 6
    assert modes(RegimeConfig(), [DULL] * 6)[0][-1] == "quiet"


def test_or_and():
    always = {"windows": ("00:00-24:00",)}
    assert modes(RegimeConfig(combine="or", **always), [DULL] * 5)[0][-1] == "active"
    assert modes(RegimeConfig(combine="and", **always), [DULL] * 5)[0][-1] == "quiet"
    assert modes(RegimeConfig(combine="and", **always), [BUSY] * 5)[1] == [(2, "neutral", "active", "both")]


def test_a_mode_fixed_by_hand_stays():
    assert modes(RegimeConfig(mode="active"), [DULL] * 8) == (["active"] * 8, [])
    assert modes(RegimeConfig(mode="quiet"), [BUSY] * 8) == (["quiet"] * 8, [])


@pytest.mark.parametrize(
    "short",
    [
        {"trades_per_min": 149.0},
        {"quotes_per_sec": 39.0},
        {"spread_bps": 5.1},
        {"volatility_bps": 3.9},
        {"volume_usd": 199_999.0},
    ],
)
def test_every_threshold_must_hold(short):
    regime = Regime(RegimeConfig())
    assert regime.market_vote([BUSY] * 60) is True
    assert regime.market_vote([msgspec.structs.replace(BUSY, **short)] * 60) is False


def test_the_newest_sample_must_pass_the_basic_gate():
    regime = Regime(RegimeConfig())
    assert regime.market_vote([BUSY] * 59 + [msgspec.structs.replace(BUSY, trades_per_min=76.0)]) is True
    assert regime.market_vote([BUSY] * 59 + [msgspec.structs.replace(BUSY, trades_per_min=74.0)]) is False


def test_outliers_are_pulled_in():
    wild = msgspec.structs.replace(DULL, trades_per_min=1e6, quotes_per_sec=1e5, volatility_bps=1e4, volume_usd=1e9)
    samples = [DULL] * 58 + [wild] * 2
    assert Regime(RegimeConfig()).market_vote(samples) is False
    assert Regime(RegimeConfig(winsor_share=0.0)).market_vote(samples) is True


def test_too_few_samples_are_no_vote():
    assert Regime(RegimeConfig()).market_vote([BUSY] * 2) is None


# --- slices -------------------------------------------------------------------------------------------------------


def test_volatility_slices():
    regime = Regime(RegimeConfig(vol_every_sec=1, vol_min=4, vol_window=8))
    state = regime.fresh()
    seen = []
    for second, vol in enumerate([1.0, 2.0, 3.0, 4.0, 0.5, 9.0, 2.5]):
        regime.take(state, second * 1000, msgspec.structs.replace(BUSY, volatility_bps=vol))
        seen.append(state.vol_slice)
    assert seen == ["unknown"] * 4 + ["q1", "q3", "mid"]


def test_a_market_that_never_moves_is_mid():
    regime = Regime(RegimeConfig(vol_every_sec=1, vol_min=4, vol_window=8))
    state = regime.fresh()
    for second in range(20):
        regime.take(state, second * 1000, msgspec.structs.replace(BUSY, volatility_bps=0.0))
    assert state.vol_slice == "mid"
    assert len(state.vol.ring) == len(state.vol.ordered) == 8


def test_sessions_cover_the_day():
    assert [session_of(hour * 3_600_000) for hour in range(24)] == ["tokyo"] * 8 + ["london"] * 8 + ["newyork"] * 8


@pytest.mark.parametrize(
    "settings",
    [
        {"timezone": "Mars/Base"},
        {"timezone": "../etc/passwd"},
        {"windows": ["9-16"]},
        {"windows": ["25:00-26:00"]},
        {"holidays": ["2024-02-30"]},
        {"weekdays": ["monday"]},
        {"vol_min": 400},
        {"vol_low_share": 0.8},
        {"min_samples": 61},
        {"unknown": 1},
    ],
)
def test_a_wrong_setting_is_named(settings):
    with pytest.raises(msgspec.ValidationError, match=next(iter(settings))):
        msgspec.convert(settings, RegimeConfig)
