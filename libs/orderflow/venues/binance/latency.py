"""When the way from the exchange to us has changed: its clock, or ours, or what lies between has jumped. Pure.

What is watched is the least R - E of each second. Queues and bursts only add to a latency, so the least is what the way
itself takes; it changes by this much from one second to the next where a clock was set, or where everything on a route
is held back.
"""

from __future__ import annotations

from typing import Final, NamedTuple

from msgspec import Struct

JUMP_MS: Final = 1000
"""A network's own changes are far smaller."""
SECONDS: Final = 2
"""So many in a row must agree: in a quiet second the only frame may be a late one."""
_NONE: Final = 2**62


class Jump(NamedTuple):
    """Least R - E, milliseconds, before and since."""

    before_ms: int
    after_ms: int


class LatencyWatch(Struct, array_like=True):
    """Least latency of one route."""

    least_ms: int = _NONE
    """Of the second that is running."""
    usual_ms: int | None = None
    far: int = 0
    """Seconds in a row that lay far from the usual."""

    def note(self, latency_ms: int) -> None:
        """A frame has come."""
        if latency_ms < self.least_ms:
            self.least_ms = latency_ms

    def look(self) -> Jump | None:
        """A second is over. One without frames tells nothing."""
        least_ms, usual_ms = self.least_ms, self.usual_ms
        if least_ms == _NONE:
            return None
        self.least_ms = _NONE
        if usual_ms is None or abs(least_ms - usual_ms) <= JUMP_MS:
            self.usual_ms, self.far = least_ms, 0
            return None
        self.far += 1
        if self.far < SECONDS:
            return None
        self.usual_ms, self.far = least_ms, 0
        return Jump(usual_ms, least_ms)
