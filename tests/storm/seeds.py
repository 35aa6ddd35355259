"""Storms that were lost once, and why: each is run with the tests from then on.

With the plan itself, for what a seed draws changes with the kinds of faults.
"""

from __future__ import annotations

from typing import Final

from orderflow.venues.binance.sim.faults import FaultPlan, parse_faults

from tests.storm.plan import StormPlan
from tests.storm.world import Options


def _options(seed: int, minutes: float, faults: str, activity: float = Options(seed=0).activity) -> Options:
    plan = StormPlan(exchange=FaultPlan(seed=seed, faults=parse_faults(faults)), machine=())
    return Options(seed=seed, minutes=minutes, activity=activity, plan=plan)


LOST_ONCE: Final[tuple[tuple[Options, str], ...]] = (
    (
        _options(
            10,
            2.5,
            "close_1008@41640ms:route=public;half_open@42961ms:route=public;slow_snapshot@61404ms+17801ms:value=6914",
        ),
        "frames that a second socket had delivered before it took over from a half open one were not journalled",
    ),
    (
        _options(
            2143,
            8.5,
            "mute_pongs@384826ms+42620ms:route=public;half_open@387363ms;life_cut@426128ms:route=market",
            activity=2.0,
        ),
        "mark prices that only the newer of two sockets delivered were taken for repetitions: they have no ids",
    ),
    (
        _options(4771, 7.0, "half_open@325228ms;life_cut@357523ms", activity=1.0),
        "heartbeats of a second socket that ended before it took over were held to be lost untold: their route's gap tells",
    ),
)
