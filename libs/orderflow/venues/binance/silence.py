"""When a stream's silence says that it is dead: "depth alive" says nothing of the trades.

A stream is expected as often as it usually speaks: its *activity* is the share of seconds with a frame, exponentially
weighted on the clock of the ticks; of a short and a long memory the lower one counts. Seconds and not frames, and the
lower one, since bursts would let a quiet stream look like a busy one. It is silent after so many mean intervals
without a frame (20: e^-20 of being wrong were its frames independent), within bounds; one that has never spoken, after
a fixed time.
"""

from __future__ import annotations

from typing import Final, NamedTuple

from msgspec import Struct

SHORT_HALF_LIFE_SEC: Final = 60.0
LONG_HALF_LIFE_SEC: Final = 600.0
PRIOR_SEC: Final = 60.0
"""A stream begins as if it had been silent for so long: two frames in the first second make no busy stream."""


class Span(NamedTuple):
    """A stretch of the clock, and how much of what was before it still counts."""

    sec: float
    short_decay: float
    long_decay: float


def span_of(sec: float) -> Span:
    """A stretch of so many seconds."""
    return Span(sec, float(0.5 ** (sec / SHORT_HALF_LIFE_SEC)), float(0.5 ** (sec / LONG_HALF_LIFE_SEC)))


class StreamWatch(Struct, array_like=True):
    """How active one symbol's stream is."""

    seen_recv_ns: int = 0
    """Receive time of the newest frame that has been taken into account."""
    short_active_sec: float = 0.0
    short_span_sec: float = PRIOR_SEC
    long_active_sec: float = 0.0
    long_span_sec: float = PRIOR_SEC
    activity: float = 0.0
    """Share of seconds with a frame, as of the newest frame: it doesn't fall while the stream is silent."""
    silent: bool = False
    silent_recv_ns: int = 0
    """Receive time of the newest frame when it was last called silent, or not."""

    def fold(self, recv_ns: int, span: Span) -> None:
        """Take in a stretch of the clock in which `recv_ns` was the newest frame's."""
        sec, short_decay, long_decay = span
        self.short_span_sec = self.short_span_sec * short_decay + sec
        self.long_span_sec = self.long_span_sec * long_decay + sec
        self.short_active_sec *= short_decay
        self.long_active_sec *= long_decay
        if recv_ns != self.seen_recv_ns:
            self.seen_recv_ns = recv_ns
            self.short_active_sec += sec
            self.long_active_sec += sec
            self.activity = min(self.short_active_sec / self.short_span_sec, self.long_active_sec / self.long_span_sec)

    def bound_ms(self, intervals: int, least_ms: int, most_ms: int) -> int:
        """Silence that is longer shows that the stream is dead."""
        expected_ms = 1000.0 * intervals / self.activity if self.activity > 0.0 else float(most_ms)
        return int(min(max(expected_ms, least_ms), most_ms))
