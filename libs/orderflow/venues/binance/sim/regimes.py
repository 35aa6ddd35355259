"""How lively the synthetic market is: regimes that switch by chance, and the sessions of a day."""

from __future__ import annotations

from typing import Final

import msgspec

_HOUR_MS: Final = 3_600_000


class Regime(msgspec.Struct, frozen=True):
    """Factors of the rates of order flow and of jumps, while it lasts."""

    weight: float
    """How often it is the next one."""
    dwell_sec: float
    activity: float
    volatility: float


NORMAL: Final = Regime(weight=0.50, dwell_sec=60.0, activity=1.0, volatility=1.0)
REGIMES: Final = (
    NORMAL,
    Regime(weight=0.28, dwell_sec=60.0, activity=0.5, volatility=0.4),
    Regime(weight=0.12, dwell_sec=20.0, activity=2.5, volatility=3.0),
    Regime(weight=0.10, dwell_sec=6.0, activity=0.03, volatility=0.02),
)
"""Normal, calm, turbulent, quiet."""
MEAN_ACTIVITY: Final = sum(each.weight * each.dwell_sec * each.activity for each in REGIMES) / sum(
    each.weight * each.dwell_sec for each in REGIMES
)


class Session(msgspec.Struct, frozen=True):
    """Factors of the same rates from an hour of the day on, UTC. Over a day each factor has the mean 1."""

    name: str
    from_hour: int
    activity: float
    volatility: float


ALL_DAY: Final = Session(name="all day", from_hour=0, activity=1.0, volatility=1.0)
SESSIONS: Final = (
    Session(name="Tokyo", from_hour=0, activity=0.7, volatility=0.8),
    Session(name="London", from_hour=8, activity=1.0, volatility=1.0),
    Session(name="New York", from_hour=16, activity=1.3, volatility=1.2),
)
SESSION_MS: Final = 24 * _HOUR_MS // len(SESSIONS)


def session_at(at_ms: int) -> Session:
    """The session that a time, in milliseconds since the epoch, falls into."""
    return SESSIONS[at_ms // SESSION_MS % len(SESSIONS)]
