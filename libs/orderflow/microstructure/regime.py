"""Which market this is: active or quiet (StrategyMode), volatility slice, session. Pure: every time comes from outside.

A mode is decided once per window of the tick clock from up to two votes: the schedule (no windows = no vote) and the
market (thresholds on samples of one second). It changes only after enough windows in a row asked for the change.
"""

from __future__ import annotations

from datetime import UTC, date, datetime, timedelta
from functools import lru_cache
from importlib.resources import files
from typing import Annotated, Any, Final, Literal, TypeAlias
from zoneinfo import ZoneInfo

import msgspec

from orderflow.microstructure.fusion_stats import TrailingQuantiles

Weekday: TypeAlias = Literal["mon", "tue", "wed", "thu", "fri", "sat", "sun"]
_WEEKDAYS: Final[tuple[Weekday, ...]] = ("mon", "tue", "wed", "thu", "fri", "sat", "sun")
Window: TypeAlias = Annotated[
    str,
    msgspec.Meta(
        pattern=r"^([01][0-9]|2[0-3]):[0-5][0-9]-(([01][0-9]|2[0-3]):[0-5][0-9]|24:00)$",
        description='local time "HH:MM-HH:MM", end excluded; an end at or before its start runs over midnight',
    ),
]
Day: TypeAlias = Annotated[str, msgspec.Meta(pattern=r"^\d{4}-\d{2}-\d{2}$", description="a date, YYYY-MM-DD")]

_DAY_MIN: Final = 1440
_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)
_LAST_MS: Final = 253_402_214_400_000  # 9999-12-31: beyond it a datetime cannot go


class RegimeConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Settings of StrategyMode and of the volatility slices."""

    mode: Annotated[Literal["auto", "active", "quiet"], msgspec.Meta(description="auto, or fixed by hand")] = "auto"
    combine: Annotated[
        Literal["or", "and"], msgspec.Meta(description="how the votes of schedule and market make one")
    ] = "or"
    use_market: Annotated[bool, msgspec.Meta(description="whether the market has a vote")] = True
    window_sec: Annotated[
        int, msgspec.Meta(ge=1, le=3600, description="seconds of the tick clock between two evaluations")
    ] = 60
    min_active_windows: Annotated[
        int, msgspec.Meta(ge=1, le=100, description="windows in a row that must ask for active")
    ] = 2
    min_quiet_windows: Annotated[
        int, msgspec.Meta(ge=1, le=100, description="windows in a row that must ask for quiet")
    ] = 4
    timezone: Annotated[str, msgspec.Meta(description="IANA name of the schedule's time zone")] = "UTC"
    weekdays: Annotated[
        tuple[Weekday, ...], msgspec.Meta(description="days on which the windows begin; empty = every day")
    ] = ()
    holidays: Annotated[
        tuple[Day, ...], msgspec.Meta(description="local dates on which no window begins", max_length=1000)
    ] = ()
    windows: Annotated[
        tuple[Window, ...], msgspec.Meta(description="active hours, local; empty = no vote", max_length=48)
    ] = ()
    min_trades_per_min: Annotated[float, msgspec.Meta(ge=0, le=1e7, description="trades per minute")] = 150.0
    min_quotes_per_sec: Annotated[float, msgspec.Meta(ge=0, le=1e6, description="quotes per second")] = 40.0
    max_spread_bps: Annotated[float, msgspec.Meta(gt=0, le=1e4, description="spread, basis points")] = 5.0
    min_volatility_bps: Annotated[
        float, msgspec.Meta(ge=0, le=1e5, description="realised volatility of a minute, basis points")
    ] = 4.0
    min_volume_usd: Annotated[
        float, msgspec.Meta(ge=0, le=1e12, description="traded notional of a minute, quote units")
    ] = 200_000.0
    basic_gate_ratio: Annotated[
        float,
        msgspec.Meta(gt=0, le=1, description="the newest sample must reach this share of every threshold"),
    ] = 0.5
    winsor_share: Annotated[
        float,
        msgspec.Meta(ge=0, lt=0.5, description="share of a window's samples pulled in at each end before the mean"),
    ] = 0.05
    min_samples: Annotated[
        int, msgspec.Meta(ge=1, le=3600, description="samples below which the market does not vote")
    ] = 3
    vol_every_sec: Annotated[
        int, msgspec.Meta(ge=1, le=600, description="seconds between two volatilities kept for the slices")
    ] = 10
    vol_window: Annotated[int, msgspec.Meta(ge=4, le=8640, description="volatilities kept for the slices")] = 360
    vol_min: Annotated[
        int, msgspec.Meta(ge=4, le=8640, description="volatilities below which the slice is unknown")
    ] = 30
    vol_low_share: Annotated[float, msgspec.Meta(gt=0, lt=1, description="quantile below which the slice is q1")] = 0.25
    vol_high_share: Annotated[float, msgspec.Meta(gt=0, lt=1, description="quantile above which the slice is q3")] = (
        0.75
    )

    def __post_init__(self) -> None:
        if self.vol_min > self.vol_window:
            raise ValueError(f"vol_min {self.vol_min} must not exceed vol_window {self.vol_window}")
        if self.vol_low_share >= self.vol_high_share:
            raise ValueError(f"vol_low_share {self.vol_low_share} must be below vol_high_share {self.vol_high_share}")
        if self.min_samples > self.window_sec:
            raise ValueError(
                f"min_samples {self.min_samples} must not exceed window_sec {self.window_sec}: one sample a second"
            )
        for day in self.holidays:
            try:
                date.fromisoformat(day)
            except ValueError as error:
                raise ValueError(f"holidays: {day!r} is not a date (YYYY-MM-DD)") from error
        load_zone(self.timezone)


@lru_cache(maxsize=32)
def load_zone(name: str) -> ZoneInfo:
    """The zone from the pinned `tzdata` package, never from the machine's files: replay is the same anywhere.

    Raises ValueError for a name that is not there.
    """
    parts = name.split("/")
    if not all(part and part.replace("_", "").replace("-", "").replace("+", "").isalnum() for part in parts):
        raise ValueError(f"timezone: {name!r} is not an IANA name such as Asia/Tokyo")
    try:
        with files("tzdata").joinpath("zoneinfo", *parts).open("rb") as source:
            return ZoneInfo.from_file(source, key=name)
    except (OSError, ValueError) as error:
        raise ValueError(f"timezone: {name!r} is not an IANA name such as Asia/Tokyo") from error


def session_of(ts_ms: int) -> str:
    """Session by the UTC hour of event time: tokyo [0, 8), london [8, 16), newyork [16, 24)."""
    hour = ts_ms // 3_600_000 % 24
    return "tokyo" if hour < 8 else "london" if hour < 16 else "newyork"


class Schedule:
    """Active hours in local time."""

    def __init__(self, config: RegimeConfig) -> None:
        self._zone = load_zone(config.timezone)
        self._weekdays = frozenset(_WEEKDAYS.index(name) for name in config.weekdays or _WEEKDAYS)
        self._holidays = frozenset(date.fromisoformat(day) for day in config.holidays)
        self._windows = tuple(_minutes(window) for window in config.windows)

    def vote(self, clock_ms: int) -> bool | None:
        """Whether the time lies in a window; None where there is no window (no vote).

        A window belongs to the day on which it begins: its part after midnight counts where that day counts.
        """
        if not self._windows:
            return None
        local = (_EPOCH + timedelta(milliseconds=min(max(clock_ms, 0), _LAST_MS))).astimezone(self._zone)
        minute = local.hour * 60 + local.minute
        today = local.date()
        if self._counts(today) and any(begin <= minute < end for begin, end in self._windows):
            return True
        late = minute + _DAY_MIN
        yesterday = today - timedelta(days=1) if today > date.min else today
        return self._counts(yesterday) and any(begin <= late < end for begin, end in self._windows)

    def _counts(self, day: date) -> bool:
        return day.weekday() in self._weekdays and day not in self._holidays


def _minutes(window: str) -> tuple[int, int]:
    begin, end = (int(part[:2]) * 60 + int(part[3:]) for part in window.split("-"))
    return begin, end if end > begin else end + _DAY_MIN


class MarketSample(msgspec.Struct, frozen=True, array_like=True):
    """One second of the market."""

    trades_per_min: float
    quotes_per_sec: float
    spread_bps: float
    volatility_bps: float
    volume_usd: float


class ModeChange(msgspec.Struct, frozen=True):
    """A change of mode: what it was, what it is, who asked (schedule, market or both), and the evidence."""

    before: str
    after: str
    reason: str
    meta: dict[str, Any]


class RegimeState(msgspec.Struct):
    """Of one symbol."""

    vol: TrailingQuantiles
    mode: str = "neutral"
    asked: str = ""
    streak: int = 0
    window_no: int = -1
    samples: list[MarketSample] = []
    vol_slot: int = -1
    vol_slice: str = "unknown"


class Regime:
    """StrategyMode and volatility slices: the rules, for any number of `RegimeState`."""

    def __init__(self, config: RegimeConfig) -> None:
        self._config = config
        self._schedule = Schedule(config)

    def fresh(self) -> RegimeState:
        """State of a symbol not seen before: neutral (or the mode fixed by hand), slice unknown."""
        mode = "neutral" if self._config.mode == "auto" else self._config.mode
        return RegimeState(vol=TrailingQuantiles(size=self._config.vol_window), mode=mode)

    def take(self, state: RegimeState, clock_ms: int, sample: MarketSample | None) -> ModeChange | None:
        """Take the market at a second of the clock (None: not known); at the end of a window, decide.

        A window ends with the first call at or beyond its end; the decision is on the samples before it.
        """
        config = self._config
        change = None
        window_no = clock_ms // (config.window_sec * 1000)
        if window_no != state.window_no:
            if state.window_no >= 0 and config.mode == "auto":
                change = self._decide(state, clock_ms)
            state.window_no = window_no
            state.samples.clear()
        if sample is not None:
            if len(state.samples) < config.window_sec:
                state.samples.append(sample)
            self._slice(state, clock_ms, sample.volatility_bps)
        return change

    def market_vote(self, samples: list[MarketSample]) -> bool | None:
        """Whether a window of samples is active; None for too few samples, or where the market has no vote."""
        config = self._config
        if not config.use_market or len(samples) < config.min_samples:
            return None
        ratio = config.basic_gate_ratio
        return self._reaches(samples[-1], ratio) and self._reaches(_typical(samples, config.winsor_share), 1.0)

    def _reaches(self, sample: MarketSample, ratio: float) -> bool:
        config = self._config
        return (
            sample.trades_per_min >= config.min_trades_per_min * ratio
            and sample.quotes_per_sec >= config.min_quotes_per_sec * ratio
            and sample.spread_bps <= config.max_spread_bps / ratio
            and sample.volatility_bps >= config.min_volatility_bps * ratio
            and sample.volume_usd >= config.min_volume_usd * ratio
        )

    def _decide(self, state: RegimeState, clock_ms: int) -> ModeChange | None:
        config = self._config
        schedule = self._schedule.vote(clock_ms)
        market = self.market_vote(state.samples)
        votes = [vote for vote in (schedule, market) if vote is not None]
        if not votes:
            state.asked, state.streak = "", 0
            return None
        active = any(votes) if config.combine == "or" else all(votes)
        asked = "active" if active else "quiet"
        state.streak = state.streak + 1 if asked == state.asked else 1
        state.asked = asked
        needed = config.min_active_windows if active else config.min_quiet_windows
        if asked == state.mode or state.streak < needed:
            return None
        before, state.mode = state.mode, asked
        meta = {"schedule": schedule, "market": market, "windows": state.streak, "samples": len(state.samples)}
        return ModeChange(before, asked, _reason(active, schedule, market), meta)

    def _slice(self, state: RegimeState, clock_ms: int, volatility_bps: float) -> None:
        config = self._config
        slot = clock_ms // (config.vol_every_sec * 1000)
        if slot == state.vol_slot:
            return
        state.vol_slot = slot
        if len(state.vol.ring) >= config.vol_min:
            low = state.vol.quantile(config.vol_low_share)
            high = state.vol.quantile(config.vol_high_share)
            # Strictly outside, so that a market that never moves is `mid`, not both ends at once.
            state.vol_slice = "q1" if volatility_bps < low else "q3" if volatility_bps > high else "mid"
        state.vol.push(volatility_bps)


def _reason(active: bool, schedule: bool | None, market: bool | None) -> str:
    if schedule is active and market is active:
        return "both"
    return "schedule" if schedule is active else "market"


def _typical(samples: list[MarketSample], share: float) -> MarketSample:
    """Winsorised mean of every field."""
    return MarketSample(
        _winsorised_mean([one.trades_per_min for one in samples], share),
        _winsorised_mean([one.quotes_per_sec for one in samples], share),
        _winsorised_mean([one.spread_bps for one in samples], share),
        _winsorised_mean([one.volatility_bps for one in samples], share),
        _winsorised_mean([one.volume_usd for one in samples], share),
    )


def _winsorised_mean(values: list[float], share: float) -> float:
    ordered = sorted(values)
    count = len(ordered)
    cut = int(share * count)
    inner = sum(ordered[cut : count - cut])
    return (inner + cut * (ordered[cut] + ordered[count - cut - 1])) / count
