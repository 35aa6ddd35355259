"""Judges whether a socket still delivers what was subscribed: an acknowledged subscription proves nothing. Pure.

Three levels, each with a remedy that fits it:

* nothing at all comes: the socket is ended and opened anew;
* a kind of stream (all symbols' depth) is silent while others live: a second socket is opened and takes over without a
  loss, so that a false alarm costs nothing;
* one symbol's stream is silent: it is subscribed again.

How long a silence may last follows from the stream's own rate over minutes, judged only once five of them are known:
after a burst a stream is silent for longer than the burst suggests.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final, NamedTuple, TypeAlias

StreamKey: TypeAlias = tuple[str, str]
"""(symbol, kind)."""

WATCH_SEC: Final = 0.5
"""Time between two looks."""
LATE_SEC: Final = 1.0
"""A look that is later than this was held up by ourselves: the time beyond is nobody's silence."""
FAST_SEC: Final = 60.0
SLOW_SEC: Final = 600.0
KNOWN_SEC: Final = 300.0
"""Time observed before a rate is believed."""
KIND_FRAMES: Final = 30.0
"""Silence of a kind that is too long, in mean times between two of its frames."""
STREAM_FRAMES: Final = 20.0
KIND_FLOOR_SEC: Final = 15.0
KIND_UNKNOWN_SEC: Final = 60.0
FLOOR_SEC: Final = 60.0
"""For trades, and for single streams."""
STREAM_MOST_SEC: Final = 300.0
MOST_SEC: Final = 600.0
PAUSE_MOST_SEC: Final = 3600.0
FIRST_DATA_FACTOR: Final = 3.0
MOST_AT_ONCE: Final = 10
"""More silent streams than this, or than this share of a kind's, are the socket's fault and not the symbols'."""
SHARE_AT_ONCE: Final = 0.2
FEWEST_AT_ONCE: Final = 3
NEVER_JUDGED: Final = frozenset({"forceOrder"})
"""Kinds that say nothing for hours on a quiet day."""
MAY_START_LATE: Final = frozenset({"aggTrade", "markPrice"})
"""Kinds for which no first frame of a single stream proves nothing."""


class Verdict(NamedTuple):
    """What is to be done."""

    end: str = ""
    """Why the socket is to be ended; empty: it is not."""
    renew: str = ""
    """Why another socket should take over; empty: none."""
    resubscribe: Sequence[StreamKey] = ()


ALL_WELL: Final = Verdict()


@dataclass(slots=True)
class Rate:
    """Frames per second of a stream or kind: the lesser of two means, so that a burst raises no expectations."""

    fast: float = 0.0
    slow: float = 0.0
    observed_sec: float = 0.0

    def add(self, frames: int, elapsed_sec: float) -> None:
        """`frames` came within the last `elapsed_sec` > 0."""
        self.observed_sec += elapsed_sec
        now = frames / elapsed_sec
        self.fast += (now - self.fast) * min(1.0, elapsed_sec / min(self.observed_sec, FAST_SEC))
        self.slow += (now - self.slow) * min(1.0, elapsed_sec / min(self.observed_sec, SLOW_SEC))

    def bound_sec(self, frames: float, least_sec: float, most_sec: float, unknown_sec: float) -> float:
        """How long a silence may last: `frames` mean times between frames, within bounds."""
        expected = min(self.fast, self.slow)
        if self.observed_sec < KNOWN_SEC or expected <= 0:
            return unknown_sec
        return min(most_sec, max(least_sec, frames / expected))


@dataclass(slots=True)
class RouteMemory:
    """What outlives a socket: rates, and how often a remedy was of no use."""

    rates: dict[StreamKey, Rate] = field(default_factory=dict)
    kind_rates: dict[str, Rate] = field(default_factory=dict)
    idle_sec: dict[str | StreamKey, float] = field(default_factory=dict)
    """Silence at the end of earlier sockets, by stream and by kind: part of the time over which rates are taken."""
    futile_ends: int = 0
    """Sockets in a row that were ended for silence."""
    kind_pause_sec: dict[str, float] = field(default_factory=dict)
    """Least silence of a kind before the next remedy; doubles with each that did not help."""
    stream_pause_sec: dict[StreamKey, float] = field(default_factory=dict)


class _Stream:
    __slots__ = ("came_sec", "count", "known", "remedy_sec", "seen")

    def __init__(self) -> None:
        self.count = 0
        self.known = 0
        """`count` at the last look."""
        self.seen = False
        self.came_sec = 0.0
        """When it last spoke, or when it was asked to."""
        self.remedy_sec = 0.0
        """Not to be subscribed again before this."""


class SocketWatch:
    """Watches one socket.

    Parameters
    ----------
    memory
        Of the route.
    streams
        What is subscribed.
    first_data_sec, silence_sec
        How long a socket may say nothing at all: at first, and later.
    """

    def __init__(
        self, memory: RouteMemory, streams: Sequence[StreamKey], first_data_sec: float, silence_sec: float
    ) -> None:
        self._memory = memory
        self._first_data_sec = first_data_sec
        self._silence_sec = silence_sec
        self._clock_sec = 0.0
        self._streams: dict[str, dict[str, _Stream]] = {}
        self._by_kind: dict[str, list[tuple[str, _Stream]]] = {}
        self._kinds: dict[str, _Stream] = {}
        self._any = _Stream()
        for symbol, kind in streams:
            stream = self._streams.setdefault(symbol, {})[kind] = _Stream()
            self._by_kind.setdefault(kind, []).append((symbol, stream))
            self._kinds.setdefault(kind, _Stream())

    def note(self, symbol: str | None, kind: str) -> bool:
        """A frame has come; whether it is of a subscribed stream."""
        try:
            self._streams[symbol][kind].count += 1  # type: ignore[index]
        except KeyError:
            return False
        return True

    @property
    def seen(self) -> bool:
        """Whether any subscribed stream has spoken, as of the last look."""
        return self._any.seen

    def silence_sec(self) -> dict[str, float]:
        """Seconds since each kind last spoke."""
        return {kind: round(self._clock_sec - state.came_sec, 1) for kind, state in self._kinds.items()}

    def close(self) -> None:
        """The socket has ended."""
        idle = self._memory.idle_sec
        for kind, state in self._kinds.items():
            idle[kind] = idle.get(kind, 0.0) + self._clock_sec - state.came_sec
            for symbol, stream in self._by_kind[kind]:
                idle[symbol, kind] = idle.get((symbol, kind), 0.0) + self._clock_sec - stream.came_sec

    def look(self, elapsed_sec: float, blocked: bool) -> Verdict:
        """To be called every `WATCH_SEC`, with the time since the last look; `blocked`: the reader was made to wait."""
        if blocked:
            return ALL_WELL
        self._clock_sec += min(elapsed_sec, WATCH_SEC + LATE_SEC)
        self._count()
        end = self._all_silent()
        if end:
            self._memory.futile_ends += 1
            return Verdict(end=end)
        if not self._any.seen:
            return ALL_WELL
        for kind, state in self._kinds.items():
            renew = self._kind_silent(kind, state)
            if renew:
                return Verdict(renew=renew)
        return self._streams_silent()

    def _count(self) -> None:
        total = 0
        for kind, streams in self._by_kind.items():
            of_kind = 0
            for symbol, stream in streams:
                came = stream.count - stream.known
                if came:
                    of_kind += came
                    stream.known = stream.count
                    self._spoke(stream, (symbol, kind), self._memory.rates.setdefault((symbol, kind), Rate()), came)
                    self._memory.stream_pause_sec.pop((symbol, kind), None)
            if of_kind:
                total += of_kind
                self._spoke(self._kinds[kind], kind, self._memory.kind_rates.setdefault(kind, Rate()), of_kind)
                self._memory.kind_pause_sec.pop(kind, None)
        if total:
            self._any.seen = True
            self._any.came_sec = self._clock_sec
            self._memory.futile_ends = 0

    def _spoke(self, stream: _Stream, key: str | StreamKey, rate: Rate, frames: int) -> None:
        # A rate changes when frames come and not while they stay away, so that a silence is judged by what was before.
        elapsed_sec = self._clock_sec - stream.came_sec + self._memory.idle_sec.pop(key, 0.0)
        if elapsed_sec > 0:
            rate.add(frames, elapsed_sec)
        stream.seen = True
        stream.came_sec = self._clock_sec

    def _all_silent(self) -> str:
        allowed_sec = self._silence_sec
        if not self._any.seen:
            first_sec = self._first_data_sec
            allowed_sec = min(max(first_sec, FLOOR_SEC), first_sec * 2.0 ** min(10, self._memory.futile_ends))
        silent_sec = self._clock_sec - self._any.came_sec
        return ("silent" if self._any.seen else "no_first_data") if silent_sec > allowed_sec else ""

    def _kind_silent(self, kind: str, state: _Stream) -> str:
        if kind in NEVER_JUDGED or (kind == "markPrice" and not state.seen):
            return ""
        trades = kind == "aggTrade"
        if state.seen:
            rate = self._memory.kind_rates[kind]
            floor_sec = FLOOR_SEC if trades else KIND_FLOOR_SEC
            allowed_sec = rate.bound_sec(KIND_FRAMES, floor_sec, MOST_SEC, KIND_UNKNOWN_SEC)
        else:
            allowed_sec = FLOOR_SEC if trades else FIRST_DATA_FACTOR * self._first_data_sec
        allowed_sec = max(allowed_sec, self._memory.kind_pause_sec.get(kind, 0.0))
        silent_sec = self._clock_sec - state.came_sec
        if silent_sec <= allowed_sec or self._clock_sec < state.remedy_sec:
            return ""
        self._memory.kind_pause_sec[kind] = min(PAUSE_MOST_SEC, 2.0 * allowed_sec)
        state.remedy_sec = self._clock_sec + allowed_sec
        return f"{kind}_silent"

    def _streams_silent(self) -> Verdict:
        found: list[StreamKey] = []
        for kind, streams in self._by_kind.items():
            if kind in NEVER_JUDGED:
                continue
            silent = [(symbol, stream) for symbol, stream in streams if self._stream_silent(symbol, kind, stream)]
            for symbol, stream in silent:
                pause_sec = self._memory.stream_pause_sec.get((symbol, kind), FLOOR_SEC)
                stream.remedy_sec = self._clock_sec + pause_sec
                self._memory.stream_pause_sec[symbol, kind] = min(PAUSE_MOST_SEC, 2.0 * pause_sec)
            share = len(silent) / len(streams)
            if len(silent) >= MOST_AT_ONCE or (len(silent) >= FEWEST_AT_ONCE and share >= SHARE_AT_ONCE):
                return Verdict(renew=f"{kind}_partly_silent")
            found.extend((symbol, kind) for symbol, _ in silent)
        return Verdict(resubscribe=found) if found else ALL_WELL

    def _stream_silent(self, symbol: str, kind: str, stream: _Stream) -> bool:
        silent_sec = self._clock_sec - stream.came_sec
        if silent_sec <= FLOOR_SEC or self._clock_sec < stream.remedy_sec:
            return False
        if not stream.seen:
            return kind not in MAY_START_LATE
        most_sec = MOST_SEC if kind == "aggTrade" else STREAM_MOST_SEC
        bound_sec = self._memory.rates[symbol, kind].bound_sec(STREAM_FRAMES, FLOOR_SEC, most_sec, most_sec)
        return silent_sec > bound_sec
