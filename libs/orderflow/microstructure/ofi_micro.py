"""The micro-price: where the mid is expected to settle, given queue imbalance and spread.

S. Stoikov, "The micro-price: a high-frequency estimator of future prices", Quantitative Finance 18(12), 2018. A state
is a cell of imbalance and spread. With P the chain of states from quote to quote and r the expected change of the mid
at a step, the micro-price is mid + G, G = lim sum over k of P^k r, so (I - P) G = r. Stoikov adds every observation's
mirror image (imbalance and price change negated), which makes that limit exist. G is then odd in the imbalance, so it
is enough to keep the half with more bids, a transition to the other half counting as -1: the state here is a matrix of
ten by ten, and (I - P) becomes strictly diagonally dominant, which needs no pivoting.
"""

from __future__ import annotations

import math
from typing import Final

import msgspec

from orderflow.microstructure.windows import LN2

IMBALANCE_CELLS: Final = 5
"""Cells of |queue imbalance|, of width 1/5."""
CELLS: Final = 2 * IMBALANCE_CELLS
"""Times two cells of spread: the narrowest seen in the session, and wider."""
_NARROW: Final = 1.5
_SAME_SPREAD: Final = 1e-6
_SHRINK: Final = 1.0
"""Observations per cell of "goes to balance, price unchanged": shrinks what is little seen towards the mid."""


class MicroPrice(msgspec.Struct):
    """Estimates G from consecutive quotes; `price` applies it, frozen between calls of `refresh`."""

    half_life_sec: float
    min_transitions: float
    narrowest: float = 0.0
    """Smallest spread so far, quote units; 0 before the first quote."""
    moves: list[float] = msgspec.field(default_factory=lambda: [0.0] * (CELLS * CELLS))
    """Row-major: decayed sum of the signs with which a cell went to another."""
    counts: list[float] = msgspec.field(default_factory=lambda: [0.0] * CELLS)
    changes: list[float] = msgspec.field(default_factory=lambda: [0.0] * CELLS)
    """Decayed sum of mid changes out of each cell, quote units."""
    cell: int = -1
    """Of the last quote; -1 where there is none to go on from."""
    sign: int = 0
    mid: float = 0.0
    solution: list[float] = []
    """G per cell, quote units; empty until enough was seen."""
    refreshed_sec: float = -1.0

    def drop(self) -> None:
        """Forget the last quote: no transition is counted across a gap."""
        self.cell = -1

    def on_quote(self, imbalance: float, spread: float, mid: float) -> None:
        """Take the next quote: imbalance in [-1, 1], spread > 0 and mid in quote units."""
        narrowest = self.narrowest
        if spread < narrowest * (1.0 - _SAME_SPREAD) or narrowest == 0.0:
            if spread < narrowest:
                self._restart()
            self.narrowest = spread
        cell = self._cell_of(imbalance, spread)
        sign = 1 if imbalance > 0.0 else (-1 if imbalance < 0.0 else 0)
        before = self.cell
        if before >= 0 and self.sign:
            self.counts[before] += 1.0
            self.moves[before * CELLS + cell] += self.sign * sign
            self.changes[before] += self.sign * (mid - self.mid)
        self.cell = cell
        self.sign = sign
        self.mid = mid

    def _cell_of(self, imbalance: float, spread: float) -> int:
        cell = int(abs(imbalance) * IMBALANCE_CELLS)
        if cell >= IMBALANCE_CELLS:
            cell = IMBALANCE_CELLS - 1
        return cell + IMBALANCE_CELLS if spread > _NARROW * self.narrowest else cell

    def _restart(self) -> None:
        """A narrower spread redefines the cells, so what was counted no longer applies."""
        self.moves = [0.0] * (CELLS * CELLS)
        self.counts = [0.0] * CELLS
        self.changes = [0.0] * CELLS
        self.cell = -1
        self.solution = []

    def refresh(self, now_sec: float) -> None:
        """Solve for G from what was counted, then let the counts fade; `now_sec` is the clock's."""
        if math.fsum(self.counts) >= self.min_transitions:
            self.solution = self._solve()
        if self.refreshed_sec >= 0.0 and now_sec > self.refreshed_sec:
            keep = math.exp(-LN2 * (now_sec - self.refreshed_sec) / self.half_life_sec)
            self.moves = [value * keep for value in self.moves]
            self.counts = [value * keep for value in self.counts]
            self.changes = [value * keep for value in self.changes]
        self.refreshed_sec = now_sec

    def _solve(self) -> list[float]:
        """Gaussian elimination on the diagonally dominant (N + shrink - A) G = changes."""
        rows = []
        for i in range(CELLS):
            row = [-value for value in self.moves[i * CELLS : (i + 1) * CELLS]]
            row[i] += self.counts[i] + _SHRINK
            row.append(self.changes[i])
            rows.append(row)
        for i in range(CELLS):
            pivot = rows[i]
            for below in range(i + 1, CELLS):
                factor = rows[below][i] / pivot[i]
                if factor:
                    row = rows[below]
                    for j in range(i, CELLS + 1):
                        row[j] -= factor * pivot[j]
        solution = [0.0] * CELLS
        for i in range(CELLS - 1, -1, -1):
            row = rows[i]
            known = math.fsum(row[j] * solution[j] for j in range(i + 1, CELLS))
            solution[i] = (row[CELLS] - known) / row[i]
        return solution

    def price(self, imbalance: float, spread: float, mid: float) -> float | None:
        """Micro-price, quote units; None until estimated. Where the tick is small it can lie outside the spread."""
        if not self.solution:
            return None
        if imbalance == 0.0:
            return mid
        shift = self.solution[self._cell_of(imbalance, spread)]
        return mid + shift if imbalance > 0.0 else mid - shift
