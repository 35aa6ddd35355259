"""The clock that stamps the journal: the machine's, but without its jumps. Pure.

What computes on the journal takes its time from these stamps, so they must neither go back nor stand still: after a step
of ten minutes back, a clock that merely refused to go back would hold every timer downstream for ten minutes. This one
runs on the event loop's monotonic time and is steered towards the wall clock.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from orderflow.ingest.seams import Clock

JUMP_NS: Final = 200_000_000
"""A wall clock that moves further than this between two looks has jumped."""
STEP_NS: Final = 5_000_000_000
"""The clock is put forward at once by more than this (the machine slept), and run faster for less."""
FASTEST: Final = 2.0
SLOWEST: Final = 0.5
DOUBT_SEC: Final = 10.0
"""How long a wall clock that has jumped is not followed, so that the exchange can say which of the two is right."""
TRIM_SEC: Final = 10.0
"""Small differences are taken off within about this time."""
NS_PER_SEC: Final = 1_000_000_000


class JournalClock:
    """
    Parameters
    ----------
    wall
        The machine's clock.
    loop_time
        Seconds of a monotonic clock.
    at_least_ns
        Where the journal's clock stands already: this one begins no earlier.
    """

    def __init__(self, wall: Clock, loop_time: Callable[[], float], at_least_ns: int = 0) -> None:
        self._wall = wall
        self._loop_time = loop_time
        wall_ns = wall.time_ns()
        self._anchor_ns = max(wall_ns, at_least_ns)
        self._anchor_sec = loop_time()
        self._rate = 1.0
        self._target_offset_ns = 0
        """What the wall clock is taken to be ahead of the truth: not 0 where the exchange contradicts it."""
        self._last_ahead_ns = wall_ns - self._anchor_ns
        self._doubted_until_sec = float("-inf")
        self.jumps = 0

    def now_ns(self) -> int:
        """Nanoseconds since the epoch, never going back."""
        return self._anchor_ns + int((self._loop_time() - self._anchor_sec) * self._rate * NS_PER_SEC)

    @property
    def behind_wall_ms(self) -> float:
        """How far the wall clock is ahead of this one."""
        return (self._wall.time_ns() - self.now_ns()) / 1e6

    def look(self) -> bool:
        """Compare with the wall clock and steer; whether it has jumped since the last look. To be called often."""
        now_ns, now_sec = self.now_ns(), self._loop_time()
        elapsed_ns = int((now_sec - self._anchor_sec) * NS_PER_SEC)
        wall_ns = self._wall.time_ns()
        # What the wall clock has done beyond the monotonic one since the last look.
        moved_ns = (wall_ns - self._anchor_ns - self._last_ahead_ns) - elapsed_ns
        jumped = abs(moved_ns) > JUMP_NS
        if jumped:
            self.jumps += 1
            self._target_offset_ns = 0
            self._doubted_until_sec = now_sec + DOUBT_SEC
        self._anchor_ns, self._anchor_sec = now_ns, now_sec
        if now_sec < self._doubted_until_sec:
            self._rate = 1.0
        else:
            self._steer(wall_ns)
        self._last_ahead_ns = wall_ns - self._anchor_ns
        return jumped

    def compare(self, server_ns: int, wall_ns: int) -> None:
        """The exchange's time and the wall clock's at the same moment: settles which of the two has jumped.

        Where this clock is nearer to the exchange, the wall clock is the one that is wrong, and is followed at the distance
        that it has got. Without a jump the wall clock is followed whatever the exchange says: drift is reported, not mended.
        """
        doubted = self._doubted_until_sec != float("-inf")
        if not doubted and not self._target_offset_ns:
            return
        wall_off_ns = wall_ns - server_ns
        moved_ns = self._wall.time_ns() - self.now_ns()
        ours_off_ns = wall_off_ns - moved_ns
        nearer = abs(ours_off_ns) + JUMP_NS // 2 < abs(wall_off_ns)
        self._target_offset_ns = moved_ns if nearer else 0
        self._doubted_until_sec = float("-inf")

    def _steer(self, wall_ns: int) -> None:
        ahead_ns = wall_ns - self._target_offset_ns - self._anchor_ns
        if ahead_ns > STEP_NS:
            self._anchor_ns += ahead_ns
            self._rate = 1.0
        else:
            self._rate = min(FASTEST, max(SLOWEST, 1.0 + ahead_ns / NS_PER_SEC / TRIM_SEC))
