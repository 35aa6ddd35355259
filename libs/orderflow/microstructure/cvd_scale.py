"""What a trade's signed flow is divided by: moving means of its size, and a floor from its spread.

The floor keeps z small where flow is erratic or trades are rare; the means follow the market's size. It is a scale and
no standard deviation: for Gaussian flow the mean of |x| is 0.8 of it.
"""

from __future__ import annotations

from typing import Final

import msgspec

from orderflow.microstructure.cvd_config import CvdConfig, ScaleMode
from orderflow.microstructure.windows import DecayedMean, SortedWindow, decay_weight

MAD_TO_SIGMA: Final = 1.4826
"""1 / quantile of the normal distribution at 3/4."""
LEAST_SCALE: Final = 1e-9
_LEAST_RATE: Final = 0.2
_FLOOR_TOLERANCE: Final = 1.0 - 1e-6


class ScaleState(msgspec.Struct):
    """Moving means and the window of the floor."""

    window: SortedWindow
    fast: DecayedMean
    slow: DecayedMean
    fast_gap: float = 0.0
    slow_gap: float = 0.0
    ts_ms: int | None = None


class Scale:
    """`push` takes the series that z measures, once per trade with a side."""

    def __init__(self, config: CvdConfig, state: ScaleState | None = None) -> None:
        self._config = config
        self._fast_ms = config.fast_half_life_sec * 1000.0
        self._slow_ms = config.half_life_sec * 1000.0
        self.state = state or ScaleState(
            window=SortedWindow(size=config.mad_window_trades),
            fast=DecayedMean(half_life_ms=self._fast_ms),
            slow=DecayedMean(half_life_ms=self._slow_ms),
        )

    def push(self, now_ms: int, value: float, trades_per_sec: float, mode: ScaleMode) -> tuple[float, float, bool]:
        """Take a value; return (scale, sigma_floor, floor_used), the first two in the value's unit.

        `trades_per_sec` is that of the trailing minute. The means and the window include the value.
        """
        config, state = self._config, self.state
        fast, slow = self._means(now_ms, abs(value))
        state.window.push(value)
        if mode == "ewma":
            return max(slow, LEAST_SCALE), 0.0, False
        floor = 0.0
        if state.window.count >= config.mad_min_trades:
            floor = MAD_TO_SIGMA * state.window.mad() * config.mad_multiplier
            if trades_per_sec < config.reference_trades_per_sec:
                floor *= (config.reference_trades_per_sec / max(trades_per_sec, _LEAST_RATE)) ** config.boost_exponent
        if mode == "mad":
            return max(floor, LEAST_SCALE), floor, floor >= LEAST_SCALE
        share = min(1.0, (trades_per_sec / config.reference_trades_per_sec) ** config.fast_weight_exponent)
        weight = config.scale_fast_weight * share
        mean = weight * fast + (1.0 - weight) * slow
        return max(mean, floor, LEAST_SCALE), floor, floor >= mean * _FLOOR_TOLERANCE

    def _means(self, now_ms: int, size: float) -> tuple[float, float]:
        """Fast and slow moving mean of the size."""
        state = self.state
        if self._config.ewma_weighting == "event":
            return state.fast.push(now_ms, size), state.slow.push(now_ms, size)
        if state.ts_ms is None:
            state.fast_gap = state.slow_gap = size
        else:
            dt_ms = max(1, now_ms - state.ts_ms)
            state.fast_gap += decay_weight(dt_ms, self._fast_ms) * (size - state.fast_gap)
            state.slow_gap += decay_weight(dt_ms, self._slow_ms) * (size - state.slow_gap)
        state.ts_ms = now_ms
        return state.fast_gap, state.slow_gap
