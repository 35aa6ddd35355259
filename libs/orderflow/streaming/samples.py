"""The newest samples of a latency."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from typing import Final

MAX_SAMPLES: Final = 4096
SPAN_SEC: Final = 60.0
"""What is older is not told: a quantile of samples that nothing follows would stand for ever."""


class RecentSamples:
    """At most the newest `MAX_SAMPLES`, none older than `SPAN_SEC`."""

    __slots__ = ("_clock", "_ring")

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        """`clock`: seconds, monotonic."""
        self._clock = clock
        self._ring: deque[tuple[float, float]] = deque(maxlen=MAX_SAMPLES)

    def add(self, value: float) -> None:
        """Keep a sample of now."""
        self._ring.append((self._clock(), value))

    def values(self) -> list[float]:
        """The samples that are not too old, oldest first."""
        since_sec = self._clock() - SPAN_SEC
        return [value for at_sec, value in self._ring if at_sec >= since_sec]
