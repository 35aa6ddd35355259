"""How far the inputs of a service are from their ends."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Mapping
from typing import Final

from orderflow.errors import OrderflowError
from orderflow.streaming.log import TP, Log

logger = logging.getLogger(__name__)

ASK_SEC: Final = 5.0
ANSWER_SEC: Final = 5.0
FRESH_SEC: Final = 30.0
"""An older answer is not told: a lag that no longer grows would pass for one that is caught up."""


class LagWatch:
    """Asks the broker now and then for the ends of what a service reads, beside its work.

    Parameters
    ----------
    positions
        Where each input partition stands: offset of the oldest record that is not processed.
    clock
        Seconds, monotonic.
    """

    def __init__(
        self, log: Log, positions: Callable[[], Mapping[TP, int]], clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._log = log
        self._positions = positions
        self._clock = clock
        self._lags: dict[TP, int] = {}
        self._asked_sec = 0.0

    async def run(self) -> None:
        """Until cancelled."""
        failed = False
        while True:
            try:
                await self.ask()
                failed = False
            except Exception:
                # One look that fails must not be the last; the answers grow old meanwhile, and are not told.
                if not failed:
                    logger.exception("the lag can't be found out")
                failed = True
            await asyncio.sleep(ASK_SEC)

    async def ask(self) -> None:
        """Ask once; a broker that does not answer leaves the lags as they are, to grow old."""
        wanted = list(self._positions())
        try:
            async with asyncio.timeout(ANSWER_SEC):
                ends = await self._log.end_offsets(wanted) if wanted else {}
        except (OrderflowError, TimeoutError):
            return
        # Where things stand now, not when the question was put: else the lag would hold what was taken meanwhile.
        positions = self._positions()
        self._lags = {tp: max(0, end - positions[tp]) for tp, end in sorted(ends.items()) if tp in positions}
        self._asked_sec = self._clock()

    @property
    def lags(self) -> Mapping[TP, int]:
        """Records between position and end of each partition; empty where the broker has not told lately."""
        return self._lags if self._clock() - self._asked_sec <= FRESH_SEC else {}
