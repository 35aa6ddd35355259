"""Keeps one route of the exchange connected: subscribes, watches, reconnects, and moves to a new socket before the old
one is cut.

There is always one socket that owns the route's streams, and for a while a second one that is to take over: first it must
prove that it delivers what the first does, then the streams are handed over one by one (`handover`).
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Final, Protocol

import msgspec

from orderflow.ingest.handover import MAX_HELD, Handover, Taken
from orderflow.ingest.seams import Outside, Socket, SocketClosed
from orderflow.ingest.watch import WATCH_SEC, RouteMemory, SocketWatch, StreamKey
from orderflow.venues.binance.frames import FrameRoute, route_of
from orderflow.venues.binance.streams import Route, parse_stream, stream_names, subscribe_messages

logger = logging.getLogger(__name__)

MESSAGE_SPACING_SEC: Final = 0.25
"""A connection that sends more than ten messages a second is closed, and the address banned where it goes on."""
CONNECT_SEC: Final = 30.0
STABLE_SEC: Final = 60.0
"""A connection that has lasted so long begins a new count of attempts."""
PROOF_SEC: Final = 30.0
"""What a second socket has to show what it delivers, and then to take over."""
SETTLED_SEC: Final = 2.0
FILTER_SEC: Final = 10.0
MAX_REASONS: Final = 40
ERROR_TEXT: Final = 200


def backoff_sec(attempt: int, first_sec: float, most_sec: float, draw: float) -> float:
    """Exponential backoff with full jitter: uniform over (0, min(most, first * 2^attempt)]; `draw` in [0, 1)."""
    return (1.0 - draw) * min(most_sec, first_sec * 2.0 ** min(attempt, 30))


async def cancel_all(tasks: Sequence[asyncio.Task[Any]]) -> None:
    """Cancel until all have ended: a single cancellation can be lost where it meets a completed wait."""
    pending = [task for task in tasks if not task.done()]
    while pending:
        for task in pending:
            task.cancel()
        await asyncio.wait(pending, timeout=1.0)
        pending = [task for task in pending if not task.done()]


def count_reason(counts: dict[str, int], reason: str) -> None:
    """Count under a name from outside, of which there may be any number."""
    if reason not in counts and len(counts) >= MAX_REASONS:
        reason = "other"
    counts[reason] = counts.get(reason, 0) + 1


@dataclass(frozen=True, slots=True, kw_only=True)
class RouteSettings:
    """How a route is kept."""

    first_data_sec: float
    silence_sec: float
    backoff_first_sec: float
    backoff_most_sec: float
    rotate_sec: float
    """Age at which a socket is replaced; up to a tenth less, by chance, so that routes do not rotate at once."""


class Sink(Protocol):
    """Where a route's frames and fates go."""

    def take(self, route: Route, frame: bytes, found: FrameRoute, recv_ts_ns: int) -> bool:
        """A frame; False: wait for `room` before the next one."""
        ...

    async def room(self) -> None: ...

    def up(self, route: Route) -> None:
        """The route delivers."""
        ...

    def down(self, route: Route, reason: str) -> None:
        """The route's only socket has ended."""
        ...

    def missed(self, route: Route, reason: str, streams: Sequence[StreamKey]) -> None:
        """Frames of these streams may be missing; the route itself lives."""
        ...


class _Line:
    """One socket and what is known of it."""

    def __init__(self, socket: Socket, watch: SocketWatch, opened_sec: float, life_sec: float) -> None:
        self.socket = socket
        self.watch = watch
        self.opened_sec = opened_sec
        self.rotate_at_sec = opened_sec + life_sec
        self.task: asyncio.Task[None]
        self.blocked = False
        self.outbox: deque[str] = deque()
        self.wake = asyncio.Event()
        self.unanswered: set[int] = set()
        """Ids of control messages without a reply."""
        self.settled_sec: float | None = None
        """When the last reply to a subscription came."""
        self.up = False
        self.spoken: set[StreamKey] = set()
        """Streams that have spoken while it was to prove itself, or the other one was."""

    def send(self, messages: Iterable[dict[str, Any]]) -> None:
        for message in messages:
            self.unanswered.add(message["id"])
            self.settled_sec = None
            self.outbox.append(msgspec.json.encode(message).decode())
        self.wake.set()


class RouteKeeper:
    """One route, for as long as `run` runs.

    Parameters
    ----------
    url
        Of the route's combined-mode socket.
    symbols, streams
        What is subscribed: `streams` of each symbol, as `depth@100ms`.
    heartbeat
        One more stream whose only use is that it speaks every second, as `btcusdt@markPrice@1s`; empty for none.
    now_ns
        The clock that stamps frames.
    """

    def __init__(
        self,
        route: Route,
        url: str,
        symbols: Sequence[str],
        streams: Sequence[str],
        heartbeat: str,
        settings: RouteSettings,
        outside: Outside,
        now_ns: Callable[[], int],
        sink: Sink,
    ) -> None:
        self._route: Route = route
        self._url = url
        self._settings = settings
        self._outside = outside
        self._now_ns = now_ns
        self._sink = sink
        names = stream_names(symbols, streams)
        if heartbeat and heartbeat not in names:
            names.append(heartbeat)
        self._names: dict[StreamKey, str] = {}
        for name in names:
            parsed = parse_stream(name)
            self._names[parsed.symbol or "", parsed.kind] = name
        self._memory = RouteMemory()
        self._line: _Line | None = None
        self._second: _Line | None = None
        self._handover: Handover | None = None
        """With two sockets; and for a while behind it, when the new one may still send what the old one has sent."""
        self._filter_until_sec = 0.0
        self._opening: asyncio.Task[Socket] | None = None
        self._renewing = ""
        """Why a second socket is wanted; empty: none is."""
        self._retry_at_sec = 0.0
        self._attempt = 0
        self._second_attempt = 0
        self._message_id = 0
        self._changed = asyncio.Event()
        self.frames = 0
        self.reconnects: dict[str, int] = {}
        """Ends of the route's only socket, and refused connections, by reason."""
        self.renewals: dict[str, int] = {}
        """Second sockets that took over, by what they were opened for; `failed:...` those that did not."""
        self.resubscribed = 0
        self.overlap_duplicates = 0
        self.reply_errors = 0
        self.last_error = ""

    # -- life -----------------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Until cancelled."""
        looked_sec = _loop_sec()
        try:
            while True:
                self._open_what_is_due(_loop_sec())
                await self._wait(looked_sec + WATCH_SEC)
                now_sec = _loop_sec()
                await self._settle(now_sec)
                if now_sec >= looked_sec + WATCH_SEC:
                    await self._look(now_sec, now_sec - looked_sec)
                    looked_sec = now_sec
        finally:
            await self._close_all()

    async def _wait(self, until_sec: float) -> None:
        """Until a task has ended, a connection may be tried again, or it is time to look."""
        self._changed.clear()
        if any(task.done() for task in self._tasks()):
            return
        if self._line is None and self._opening is None:
            until_sec = min(until_sec, self._retry_at_sec)
        try:
            async with asyncio.timeout_at(until_sec):
                await self._changed.wait()
        except TimeoutError:
            pass

    def _tasks(self) -> list[asyncio.Task[Any]]:
        found: list[asyncio.Task[Any]] = [line.task for line in (self._line, self._second) if line is not None]
        if self._opening is not None:
            found.append(self._opening)
        return found

    async def _close_all(self) -> None:
        tasks = self._tasks()
        await cancel_all(tasks)
        if self._opening is not None and not self._opening.cancelled() and self._opening.exception() is None:
            await self._opening.result().close()
        if self._handover is not None:
            self._take_all(self._handover.older_ended())

    def _open_what_is_due(self, now_sec: float) -> None:
        wanted = self._line is None or (bool(self._renewing) and self._second is None)
        if wanted and self._opening is None and now_sec >= self._retry_at_sec and not self._filtering:
            self._opening = asyncio.create_task(self._connect())
            self._opening.add_done_callback(self._note_change)

    @property
    def _filtering(self) -> bool:
        """Whether the last handover is not over yet."""
        return self._line is not None and self._handover is not None

    def _note_change(self, _: asyncio.Task[Any]) -> None:
        self._changed.set()

    async def _connect(self) -> Socket:
        async with asyncio.timeout(CONNECT_SEC):
            return await self._outside.connector.connect(self._url)

    # -- sockets come and go --------------------------------------------------------------------------------------

    async def _settle(self, now_sec: float) -> None:
        """Take note of the tasks that have ended."""
        if self._line is not None and self._line.task.done():
            await self._ended(self._line, _reason_of(self._line.task), now_sec)
        if self._second is not None and self._second.task.done():
            self._drop_second(_reason_of(self._second.task), now_sec)
        if self._opening is not None and self._opening.done():
            self._opened(self._opening, now_sec)
            self._opening = None

    def _opened(self, opening: asyncio.Task[Socket], now_sec: float) -> None:
        error = opening.exception()
        if error is not None:
            if not isinstance(error, OSError):
                raise error
            logger.warning("route %s: %s", self._route, error or "no connection in time")
            if self._line is None:
                count_reason(self.reconnects, "refused")
                self._attempt += 1
                self._pause(self._attempt, now_sec)
            else:
                self._second_failed("refused", now_sec)
            return
        line = self._start(opening.result(), now_sec)
        if self._line is None:
            self._line = line
        else:
            self._second = line
            self._handover = Handover()

    def _start(self, socket: Socket, now_sec: float) -> _Line:
        settings = self._settings
        watch = SocketWatch(self._memory, list(self._names), settings.first_data_sec, settings.silence_sec)
        life_sec = settings.rotate_sec * (1.0 - 0.1 * self._outside.chance.random())
        line = _Line(socket, watch, now_sec, life_sec)
        line.send(subscribe_messages(list(self._names.values()), self._next_id()))
        self._message_id += len(line.outbox)
        line.task = asyncio.create_task(self._serve(line))
        line.task.add_done_callback(self._note_change)
        return line

    def _next_id(self) -> int:
        self._message_id += 1
        return self._message_id

    def _pause(self, attempt: int, now_sec: float) -> None:
        draw = self._outside.chance.random()
        wait_sec = backoff_sec(attempt, self._settings.backoff_first_sec, self._settings.backoff_most_sec, draw)
        self._retry_at_sec = now_sec + wait_sec
        logger.info("route %s: connecting again in %.1f s", self._route, wait_sec)

    async def _ended(self, line: _Line, reason: str, now_sec: float) -> None:
        """The socket that owns the route is gone."""
        logger.info("route %s: %s after %.0f s", self._route, reason, now_sec - line.opened_sec)
        line.watch.close()
        second, handover = self._second, self._handover
        if second is not None and handover is not None:
            self._line, self._second = second, None
            self._replaced(second, handover, reason, now_sec)
            return
        self._line = self._handover = None
        self._renewing = ""
        count_reason(self.reconnects, reason)
        self._attempt = 0 if line.up and now_sec - line.opened_sec > STABLE_SEC else self._attempt + 1
        if self._opening is None:
            self._pause(self._attempt, now_sec)
        self._sink.down(self._route, reason)

    def _replaced(self, line: _Line, handover: Handover, reason: str, now_sec: float) -> None:
        """The second socket is the only one now."""
        self._filter_until_sec = now_sec + FILTER_SEC
        proved = handover.begun
        released = list(handover.older_ended())
        missed = set(handover.missed())
        if not proved:
            missed |= set(self._names) - handover.heard()
        if not line.up:
            self._sink.down(self._route, reason)
        else:
            if missed:
                self._sink.missed(self._route, reason, sorted(missed))
            self._sink.up(self._route)
        self._take_all(released)
        count_reason(self.renewals, self._renewing)
        self._renewing = ""

    def _drop_second(self, reason: str, now_sec: float) -> None:
        handover = self._handover
        self._second = self._handover = None
        if handover is not None:
            missed = handover.missed_with_newer()
            if missed:
                self._sink.missed(self._route, reason, missed)
            self.overlap_duplicates += handover.duplicates
        self._second_failed(reason, now_sec)

    def _second_failed(self, reason: str, now_sec: float) -> None:
        logger.warning("route %s: the second socket did not take over: %s", self._route, reason)
        count_reason(self.renewals, f"failed:{reason}")
        if self._renewing == "age":
            self._second_attempt += 1
            self._pause(self._second_attempt, now_sec)
        else:
            self._renewing = ""

    async def _end(self, line: _Line, reason: str, now_sec: float) -> None:
        """End a socket ourselves: stop reading first, so that nothing of it comes behind its gap."""
        await cancel_all([line.task])
        if line is self._line:
            await self._ended(line, reason, now_sec)
        elif line is self._second:
            self._drop_second(reason, now_sec)

    # -- looking after them ---------------------------------------------------------------------------------------

    async def _look(self, now_sec: float, elapsed_sec: float) -> None:
        line = self._line
        if line is None:
            return
        verdict = line.watch.look(elapsed_sec, line.blocked)
        if verdict.end:
            await self._end(line, verdict.end, now_sec)
            return
        renew = verdict.renew or ("age" if now_sec >= line.rotate_at_sec else "")
        if renew and not self._renewing:
            logger.info("route %s: opening a second socket: %s", self._route, renew)
            self._renewing = renew
            self._second_attempt = 0
        if verdict.resubscribe and not line.outbox:
            self._resubscribe(line, verdict.resubscribe)
        if self._second is not None:
            await self._look_at_second(line, self._second, now_sec, elapsed_sec)
        elif self._handover is not None and now_sec >= self._filter_until_sec:
            self.overlap_duplicates += self._handover.duplicates
            self._handover = None

    async def _look_at_second(self, line: _Line, second: _Line, now_sec: float, elapsed_sec: float) -> None:
        second.watch.look(elapsed_sec, second.blocked)
        handover = self._handover
        assert handover is not None
        late = now_sec - second.opened_sec > (2.0 if handover.begun else 1.0) * PROOF_SEC
        if not handover.begun:
            self._prove(line, second, handover, now_sec)
            if late and not handover.begun:
                await self._end(second, "proved_nothing", now_sec)
            return
        self._take_all(handover.expired(now_sec))
        missed = handover.missed()
        if missed:
            self._sink.missed(self._route, "silent", missed)
        if handover.held > MAX_HELD:
            await self._end(second, "too_far_ahead", now_sec)
        elif late or handover.complete:
            await cancel_all([line.task])
            await self._ended(line, self._renewing, now_sec)

    def _prove(self, line: _Line, second: _Line, handover: Handover, now_sec: float) -> None:
        """Whether the second socket delivers what the first does, all its subscriptions being acknowledged."""
        if second.settled_sec is None:
            line.spoken.clear()
        elif now_sec - second.settled_sec >= SETTLED_SEC and second.up and line.spoken <= second.spoken:
            self._take_all(handover.begin(now_sec))

    def _resubscribe(self, line: _Line, streams: Sequence[StreamKey]) -> None:
        names = [self._names[key] for key in streams]
        logger.warning("route %s: silent, subscribing again: %s", self._route, ", ".join(names))
        self.resubscribed += len(names)
        # Quotes have no chain that would show what is lost between the two messages.
        self._sink.missed(self._route, "resubscribed", streams)
        for method in ("UNSUBSCRIBE", "SUBSCRIBE"):
            line.send(subscribe_messages(names, self._next_id(), method))

    # -- one socket -----------------------------------------------------------------------------------------------

    async def _serve(self, line: _Line) -> None:
        sender = asyncio.create_task(self._send(line))
        try:
            await self._read(line)
        finally:
            await cancel_all([sender])
            await line.socket.close()

    async def _send(self, line: _Line) -> None:
        try:
            while True:
                line.wake.clear()
                while line.outbox:
                    await line.socket.send(line.outbox.popleft())
                    await asyncio.sleep(MESSAGE_SPACING_SEC)
                await line.wake.wait()
        except OSError as error:
            logger.info("route %s: a control message was not sent: %s", self._route, error)  # the reader ends with it

    async def _read(self, line: _Line) -> None:
        """Frames, until the socket ends; what was received before its end comes before the gap."""
        recv, now_ns, note = line.socket.recv, self._now_ns, line.watch.note
        while True:
            frame = await recv()
            found = route_of(frame)
            if found.kind == "reply":
                self._reply(line, frame)
                continue
            ours = note(found.symbol, found.kind)
            self.frames += 1
            if ours and not line.up:
                self._now_up(line)
            if self._handover is None:
                room = self._sink.take(self._route, frame, found, now_ns())
            else:
                room = self._overlapping(line, Taken(frame, found, now_ns()), ours)
            if not room:
                line.blocked = True
                await self._sink.room()
                line.blocked = False

    def _now_up(self, line: _Line) -> None:
        line.up = True
        if line is self._line:
            self._sink.up(self._route)

    def _overlapping(self, line: _Line, taken: Taken, ours: bool) -> bool:
        """A frame while there are two sockets."""
        found, handover = taken.found, self._handover
        assert handover is not None
        if ours and found.symbol is not None:
            line.spoken.add((found.symbol, found.kind))
        if line is self._line and self._second is not None:
            return self._take_all(handover.older(taken))
        return self._take_all(handover.newer(taken))

    def _take_all(self, frames: Iterable[Taken]) -> bool:
        room = True
        for taken in frames:
            room = self._sink.take(self._route, taken.frame, taken.found, taken.recv_ts_ns) and room
        return room

    def _reply(self, line: _Line, frame: bytes) -> None:
        try:
            content = msgspec.json.decode(frame)
        except msgspec.DecodeError:
            content = None
        if not isinstance(content, dict):
            return
        if content.get("error") or content.get("code"):
            self.reply_errors += 1
            self.last_error = str(content.get("error") or content)[:ERROR_TEXT]
            logger.error("route %s: the exchange refused a message: %s", self._route, self.last_error)
            return
        number = content.get("id")
        if isinstance(number, int):
            line.unanswered.discard(number)
            if not line.unanswered:
                line.settled_sec = _loop_sec()

    def status(self) -> dict[str, Any]:
        """For `/status`."""
        return {
            "sockets": (self._line is not None) + (self._second is not None),
            "frames": self.frames,
            "reconnects": dict(sorted(self.reconnects.items())),
            "renewals": dict(sorted(self.renewals.items())),
            "resubscribed": self.resubscribed,
            "overlap_duplicates": self.overlap_duplicates + (self._handover.duplicates if self._handover else 0),
            "reply_errors": self.reply_errors,
            "last_error": self.last_error,
            "silence_sec": self._line.watch.silence_sec() if self._line is not None else {},
        }


def _loop_sec() -> float:
    return asyncio.get_running_loop().time()


def _reason_of(task: asyncio.Task[None]) -> str:
    """Why a socket has ended.

    Raises
    ------
    BaseException
        What is not of the network's making.
    """
    if task.cancelled():
        return "closed"
    error = task.exception()
    if isinstance(error, SocketClosed):
        return f"closed_{error.code}"
    if isinstance(error, OSError):
        return "network"
    if error is not None:
        raise error
    return "closed"
