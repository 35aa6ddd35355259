"""An asyncio loop whose time is a number: sleeping costs nothing, and the same program runs the same way every time.

There is no selector, no thread and no socket, so nothing from outside can come in between two steps. Where nothing is
ready, time moves to the next timer.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from concurrent.futures import Executor
from typing import Any, Final, NoReturn, TypeVar

STEPS_MOST: Final = 20_000_000
STEPS_AT_ONCE_MOST: Final = 200_000
STEPS_TO_END: Final = 10_000
T = TypeVar("T")


class DeadlockError(RuntimeError):
    """Nothing is ready and no timer is set: the program would wait for ever."""


class LivelockError(RuntimeError):
    """The program runs on and on without time moving, or beyond the number of steps allowed."""


class VirtualLoop(asyncio.BaseEventLoop):
    """Simulated time in seconds from 0.

    Parameters
    ----------
    steps_most
        Rounds of the loop before it gives up.
    steps_at_once_most
        Rounds at one point of time before it gives up.
    """

    def __init__(self, steps_most: int = STEPS_MOST, steps_at_once_most: int = STEPS_AT_ONCE_MOST) -> None:
        super().__init__()
        self._now = 0.0
        self._steps_left = steps_most
        self._at_once_most = self._at_once_left = steps_at_once_most
        # `BaseEventLoop` asks its selector for events once a round: here that is where time passes.
        self._selector = self
        self.steps = 0

    def time(self) -> float:
        return self._now

    def stall(self, sec: float) -> None:
        """The process stands still: time passes, and nothing runs."""
        self._now += sec

    def select(self, timeout: float | None) -> list[Any]:
        """What the base class calls once a round: `timeout` seconds pass, 0 where callbacks are ready.

        Raises
        ------
        DeadlockError, LivelockError
            See there.
        """
        self.steps += 1
        if timeout is None:
            raise DeadlockError(f"at {self._now:.3f} s nothing is ready and no timer is set: {self._waiting()}")
        if timeout > 0:
            self._now += timeout
            self._at_once_left = self._at_once_most
        self._at_once_left -= 1
        self._steps_left -= 1
        if self._at_once_left < 0 or self._steps_left < 0:
            # What is cancelled after this needs some steps to end.
            self._at_once_left = self._steps_left = STEPS_TO_END
            raise LivelockError(f"at {self._now:.3f} s after {self.steps} steps: {self._waiting()}")
        return []

    def _waiting(self) -> str:
        names = sorted(_call_chain(task.get_coro()) for task in asyncio.all_tasks(self))
        return "waiting are " + (", ".join(names) or "none")

    def _process_events(self, event_list: list[Any]) -> None:
        """There are none."""

    def _write_to_self(self) -> None:
        """Nobody needs to be woken: the loop never sleeps."""

    def run_in_executor(  # type: ignore[override]
        self, executor: Executor | None, func: Callable[..., Any], *args: Any
    ) -> NoReturn:
        raise RuntimeError(f"{func!r} wants a thread: what a thread does is not simulated")


def _call_chain(coroutine: Any) -> str:
    """Where a task waits: its functions, from the outermost in."""
    names = []
    while hasattr(coroutine, "cr_await"):
        names.append(coroutine.__qualname__.rpartition("<locals>.")[2])
        coroutine = coroutine.cr_await
    return " > ".join(names)


def run(main: Coroutine[Any, Any, T], steps_most: int = STEPS_MOST) -> T:
    """Run a coroutine on a loop of its own, and cancel what it leaves behind.

    Raises
    ------
    DeadlockError, LivelockError
        See there.
    """
    found: list[T] = []

    async def keep() -> None:
        # Not as the task's result: the runner prints its task, result and all, when it restores the signal handler.
        found.append(await main)

    with asyncio.Runner(loop_factory=lambda: VirtualLoop(steps_most)) as runner:
        runner.run(keep())
    return found[0]
