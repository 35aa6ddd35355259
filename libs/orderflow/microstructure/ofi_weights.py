"""Level weights from data: the first principal component of the multi-level flow.

R. Cont, M. Cucuringu, C. Zhang, "Cross-impact of order flow imbalance in equity markets", Quantitative Finance 23(10),
2023: each level's flow is divided by the average depth; the integrated flow is w' ofi / ||w||_1, w the first principal
component, fitted on past data only. Here the covariance fades with event time, and the component is found at ticks by
power iteration from the weights in force, which stay frozen in between.
"""

from __future__ import annotations

import math
from typing import Final

import msgspec

from orderflow.microstructure.windows import LN2

_ITERATIONS: Final = 100
_CONVERGED: Final = 1e-12


class IntegratedWeights(msgspec.Struct):
    """Exponentially weighted covariance of the depth-scaled flow vector and its first component."""

    half_life_ms: float
    min_rows: int
    weights: list[float]
    """In force; sum of absolute values 1, sum above 0."""
    count: float = 0.0
    """Effective number of rows."""
    rows: int = 0
    sums: list[float] = []
    products: list[float] = []
    """Row-major lower triangle, decayed sums."""
    ts_ms: int = 0

    def push(self, ts_ms: int, flows: list[float], mean_depth: float) -> None:
        """Take a row's flow per level and the mean depth (> 0), both in base units."""
        size = len(flows)
        if not self.sums:
            self.sums = [0.0] * size
            self.products = [0.0] * (size * (size + 1) // 2)
            self.ts_ms = ts_ms
        dt_ms = ts_ms - self.ts_ms
        keep = 1.0
        if dt_ms > 0:
            keep = math.exp(-LN2 * dt_ms / self.half_life_ms)
            self.ts_ms = ts_ms
        scaled = [flow / mean_depth for flow in flows]
        sums, products = self.sums, self.products
        at = 0
        for i in range(size):
            value = scaled[i]
            sums[i] = sums[i] * keep + value
            for j in range(i + 1):
                products[at] = products[at] * keep + value * scaled[j]
                at += 1
        self.count = self.count * keep + 1.0
        self.rows += 1

    def refresh(self) -> None:
        """Fit the weights anew; keep those in force where rows are too few or the flow doesn't vary."""
        if self.rows < self.min_rows:
            return
        fitted = self._first_component()
        total = math.fsum(abs(value) for value in fitted)
        if not total > 0.0:
            return
        if math.fsum(fitted) < 0.0:
            total = -total
        self.weights = [value / total for value in fitted]

    def _covariance(self) -> list[list[float]]:
        size, count = len(self.sums), self.count
        matrix = [[0.0] * size for _ in range(size)]
        at = 0
        for i in range(size):
            for j in range(i + 1):
                value = self.products[at] / count - self.sums[i] / count * (self.sums[j] / count)
                matrix[i][j] = matrix[j][i] = value
                at += 1
        return matrix

    def _first_component(self) -> list[float]:
        """Power iteration; bounded, so that a tie between two components costs precision and never time."""
        matrix = self._covariance()
        vector = self.weights
        for _ in range(_ITERATIONS):
            new = [math.fsum(a * b for a, b in zip(row, vector, strict=True)) for row in matrix]
            norm = math.sqrt(math.fsum(value * value for value in new))
            if not 0.0 < norm < math.inf:
                return [0.0] * len(vector)
            new = [value / norm for value in new]
            moved = max(abs(a - b) for a, b in zip(new, vector, strict=True))
            vector = new
            if moved < _CONVERGED:
                break
        return vector
