"""From a score to a state: classification, boost, duration, and the machine neutral / long / short x normal / strong.

Levels are signed: 0 neutral, +-1 normal, +-2 strong. Time is event time made monotone, milliseconds. Every step that
acts appends its name to `reasons`.
"""

from __future__ import annotations

import msgspec

from orderflow.microstructure.fusion_config import FusionConfig

STRENGTHS: dict[int, str] = {2: "strong_buy", 1: "buy", 0: "neutral", -1: "sell", -2: "strong_sell"}


class MachineState(msgspec.Struct):
    """Of one symbol."""

    level: int = 0
    entry_ms: int = 0
    entry_sign: int = 0
    """Direction of the last entry; 0 before the first."""
    support_ms: int = 0
    """When a score last asked for this direction."""
    strong_ms: int = 0
    """When a score last asked for strong."""
    streak: int = 0
    streak_sign: int = 0


def consistency_of(z_ofi: float, z_cvd: float) -> float:
    """0 where signs differ or either |z| is below 1e-9, else min|z| / max|z|."""
    a = abs(z_ofi)
    b = abs(z_cvd)
    if a < 1e-9 or b < 1e-9 or (z_ofi > 0.0) is not (z_cvd > 0.0):
        return 0.0
    return a / b if a < b else b / a


class Machine:
    """The stages after the score: the rules, for any number of `MachineState`."""

    def __init__(self, config: FusionConfig) -> None:
        limits = config.thresholds()
        self._buy = limits.buy
        self._strong = limits.strong
        self._min_consistency = limits.min_consistency
        self._strong_consistency = limits.strong_consistency
        stages = frozenset(config.stages)
        self._consistency_on = "consistency" in stages
        self._boost_on = "boost" in stages
        self._throttle_on = "throttle" in stages
        self._duration_on = "duration" in stages
        self._cooldown_on = "cooldown" in stages
        self._rearm_on = "flip_rearm" in stages
        self._hysteresis_on = "hysteresis" in stages
        self._boost_consistency = config.boost_consistency
        self._boost_score = config.boost_ratio * limits.buy
        self._throttle_consistency = config.throttle_consistency
        self._min_consecutive = config.min_consecutive
        self._cooldown_ms = config.cooldown_sec * 1000.0
        self._cooldown_min_ms = config.cooldown_min_sec * 1000.0
        self._relief = config.cooldown_relief
        self._rearm_score = config.flip_rearm_ratio * limits.buy
        self._hold_score = config.exit_ratio * limits.buy
        self._hold_strong_score = config.exit_ratio * limits.strong
        self._max_hold_ms = config.max_hold_sec * 1000.0

    def advance(
        self, state: MachineState, now_ms: int, score: float, consistency: float, degraded: bool, reasons: list[str]
    ) -> int:
        """Take a score; return the level after it."""
        target = self._target(score, consistency, reasons)
        if degraded and (target in (2, -2) or state.level in (2, -2)):
            reasons.append("degraded_capped")
            target = max(-1, min(1, target))
            state.level = max(-1, min(1, state.level))
        if self._duration_on:
            target = self._lasting(state, target, reasons)
        held = state.level
        if target == 0:
            level = self._hold(state, now_ms, score, reasons) if held else 0
        elif target * held > 0:
            level = self._support(state, now_ms, score, target, reasons)
        else:
            level = self._enter(state, now_ms, score, target, reasons)
        if level and self._throttle_on and consistency < self._throttle_consistency:
            reasons.append("low_consistency_throttle")
            level = 0
        state.level = level
        return level

    def drop(self, state: MachineState) -> None:
        """Go to neutral: an input is missing, or the warm-up is not over. The cooldown goes on."""
        state.level = 0
        state.streak = 0
        state.streak_sign = 0

    def _target(self, score: float, consistency: float, reasons: list[str]) -> int:
        """The level that this score alone asks for."""
        size = abs(score)
        sign = 1 if score > 0.0 else -1
        checked = self._consistency_on
        if size > self._buy and (not checked or consistency > self._min_consistency):
            if size <= self._strong:
                return sign
            if not checked or consistency > self._strong_consistency:
                return 2 * sign
            reasons.append("strong_needs_consistency")
            return sign
        if self._boost_on and size > self._boost_score and consistency > self._boost_consistency:
            reasons.append("consistency_boost")
            return sign
        reasons.append("low_consistency" if size > self._buy else "weak_score")
        return 0

    def _lasting(self, state: MachineState, target: int, reasons: list[str]) -> int:
        """Neutral until a direction has been asked for often enough in a row."""
        sign = (target > 0) - (target < 0)
        if sign != state.streak_sign:
            state.streak_sign = sign
            state.streak = 0
        if state.streak < self._min_consecutive:
            state.streak += 1
        if sign and state.streak < self._min_consecutive:
            reasons.append("min_duration")
            return 0
        return target

    def _support(self, state: MachineState, now_ms: int, score: float, target: int, reasons: list[str]) -> int:
        """The state's own direction is asked for again."""
        held = state.level
        state.support_ms = now_ms
        if target in (2, -2):
            state.strong_ms = now_ms
            reasons.append("in_force" if held == target else "upgrade")
            return target
        if held == target:
            reasons.append("in_force")
            return held
        if self._holds_strong(state, now_ms, score):
            reasons.append("hysteresis_hold_strong")
            return held
        reasons.append("downgrade")
        return target

    def _hold(self, state: MachineState, now_ms: int, score: float, reasons: list[str]) -> int:
        """Nothing is asked for: keep the state within hysteresis, for a limited time, or leave it."""
        held = state.level
        sign = 1 if held > 0 else -1
        if not self._hysteresis_on or score * sign <= self._hold_score:
            reasons.append("exit")
            return 0
        if now_ms - state.support_ms >= self._max_hold_ms:
            reasons.append("hold_expired")
            return 0
        if held == sign:
            reasons.append("hysteresis_hold")
            return sign
        if self._holds_strong(state, now_ms, score):
            reasons.append("hysteresis_hold_strong")
            return held
        reasons.append("downgrade")
        return sign

    def _holds_strong(self, state: MachineState, now_ms: int, score: float) -> bool:
        return (
            self._hysteresis_on
            and abs(score) > self._hold_strong_score
            and now_ms - state.strong_ms < self._max_hold_ms
        )

    def _enter(self, state: MachineState, now_ms: int, score: float, target: int, reasons: list[str]) -> int:
        """From neutral, or from the other direction."""
        sign = 1 if target > 0 else -1
        size = abs(score)
        if self._cooldown_on and state.entry_sign and now_ms - state.entry_ms < self._cooldown(size):
            if not self._rearm_on or sign == state.entry_sign or size < self._rearm_score:
                reasons.append("cooldown")
                return 0
            reasons.append("flip_rearm")
        reasons.append("flip" if state.level else "entry")
        state.entry_ms = state.support_ms = now_ms
        state.entry_sign = sign
        if target in (2, -2):
            state.strong_ms = now_ms
        return target

    def _cooldown(self, size: float) -> float:
        """Milliseconds: the stronger the score, the shorter."""
        share = (size - self._buy) / (self._strong - self._buy)
        share = 0.0 if share < 0.0 else 1.0 if share > 1.0 else share
        return max(self._cooldown_min_ms, self._cooldown_ms * (1.0 - self._relief * share))
