"""Waiting for a condition, with a bound: the one place where tests of whole processes pause."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


def wait_for(look: Callable[[], T], timeout_sec: float, every_sec: float = 0.2) -> T:
    """Look again and again until what is found is true, or the time is up; returns what was found last.

    `OSError` means that nobody answers yet; it is raised where that is so to the end.
    """
    deadline = time.monotonic() + timeout_sec
    while True:
        late = time.monotonic() >= deadline
        try:
            found = look()
        except OSError:
            if late:
                raise
        else:
            if found or late:
                return found
        time.sleep(every_sec)
