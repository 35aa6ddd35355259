"""Counts that last as long as their process."""

from __future__ import annotations

from typing import Final

MAX_CAUSES: Final = 100_000
"""Causes of one figure; symbols are the most numerous of them."""
REST: Final = "other"


class ProcessCounts:
    """Counts by figure and cause, raised by whoever works while it works.

    They are no part of any state: nobody restores them, and they stay when a partition goes or a session ends. So none
    ever falls, and nothing that another process has counted appears in them. What is computed again after a recovery
    counts again.
    """

    def __init__(self) -> None:
        self._counts: dict[str, dict[str, int]] = {}

    def add(self, figure: str, cause: str = "", count: int = 1) -> None:
        """Raise a count; where a figure has too many causes, that of `REST`."""
        counts = self._counts.get(figure)
        if counts is None:
            counts = self._counts[figure] = {}
        if cause not in counts and len(counts) >= MAX_CAUSES:
            cause = REST
        counts[cause] = counts.get(cause, 0) + count

    def by_cause(self, figure: str) -> dict[str, int]:
        """A copy, in the order in which causes were met first."""
        return dict(self._counts.get(figure, {}))

    def of(self, figure: str, cause: str = "") -> int:
        """One count; 0 where nothing was counted."""
        return self._counts.get(figure, {}).get(cause, 0)
