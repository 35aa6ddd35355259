"""Settings of fusion: thresholds by name, weights by slice, stages."""

from __future__ import annotations

from typing import Annotated, Final, Literal, TypeAlias

import msgspec

from orderflow.microstructure.divergence import DivergenceConfig
from orderflow.microstructure.fusion_commands import Slice, Weight, check_weights
from orderflow.microstructure.regime import RegimeConfig

Stage: TypeAlias = Literal[
    "lag", "warmup", "consistency", "boost", "throttle", "duration", "cooldown", "flip_rearm", "hysteresis"
]
_Score: TypeAlias = Annotated[float, msgspec.Meta(gt=0, le=20)]
_Share: TypeAlias = Annotated[float, msgspec.Meta(ge=0, le=1)]


class Thresholds(msgspec.Struct, frozen=True):
    """All strict: |score| above `buy` and consistency above `min_consistency` is a normal signal; likewise strong."""

    buy: float
    strong: float
    min_consistency: float
    strong_consistency: float


PRESETS: Final[dict[str, Thresholds]] = {
    "balanced": Thresholds(1.5, 2.5, 0.15, 0.70),
    "v13_code": Thresholds(0.95, 1.70, 0.12, 0.45),
    "v13_production": Thresholds(1.0, 2.3, 0.20, 0.65),
    "v13_strict": Thresholds(2.0, 3.0, 0.40, 0.80),
}
"""`microstructure-algorithms` 1.3 and 9."""


class SliceWeights(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Weights of the two factors; 0 < ofi + cvd <= 1."""

    ofi: Weight
    cvd: Weight

    def __post_init__(self) -> None:
        check_weights(self.ofi, self.cvd)


def _slice_weights() -> dict[Slice, SliceWeights]:
    return {
        "active": SliceWeights(0.7, 0.3),
        "quiet": SliceWeights(0.5, 0.5),
        "tokyo": SliceWeights(0.55, 0.45),
    }


class FusionConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Settings of `FusionProcessor`."""

    preset: Annotated[
        Literal["balanced", "v13_code", "v13_production", "v13_strict"],
        msgspec.Meta(description="named thresholds; the four settings below override one each"),
    ] = "balanced"
    buy_score: Annotated[_Score | None, msgspec.Meta(description="|score| above which a signal is normal")] = None
    strong_score: Annotated[_Score | None, msgspec.Meta(description="|score| above which a signal is strong")] = None
    min_consistency: Annotated[_Share | None, msgspec.Meta(description="consistency above which it is normal")] = None
    strong_consistency: Annotated[_Share | None, msgspec.Meta(description="consistency above which it is strong")] = (
        None
    )
    method: Annotated[
        Literal["weighted", "zsum"],
        msgspec.Meta(description="weighted: w_ofi z_ofi + w_cvd z_cvd; zsum: z_ofi + z_cvd"),
    ] = "weighted"
    w_ofi: Annotated[Weight, msgspec.Meta(description="base weight of z_ofi")] = 0.6
    w_cvd: Annotated[Weight, msgspec.Meta(description="base weight of z_cvd")] = 0.4
    slice_weights: Annotated[
        dict[Slice, SliceWeights],
        msgspec.Meta(description="weights by slice; regime before session before volatility before base"),
    ] = msgspec.field(default_factory=_slice_weights)
    ofi_input: Annotated[
        Literal["raw", "clipped"], msgspec.Meta(description="ofi_z_raw, or ofi_z (clipped for display)")
    ] = "raw"
    cvd_direction: Annotated[
        Literal[-1, 1], msgspec.Meta(description="sign put on z_cvd until a command says else")
    ] = 1
    z_clip: Annotated[float, msgspec.Meta(gt=0, le=10, description="both z are clipped at this")] = 4.0
    score_z_window: Annotated[
        int, msgspec.Meta(ge=2, le=10000, description="scores whose deviation score_z is measured in")
    ] = 600
    score_z_min: Annotated[int, msgspec.Meta(ge=2, le=10000, description="scores below which score_z is null")] = 30
    max_lag_sec: Annotated[
        float, msgspec.Meta(gt=0, le=60, description="lag beyond which the stronger factor stands alone, seconds")
    ] = 0.25
    max_quiet_sec: Annotated[
        float, msgspec.Meta(gt=0, le=3600, description="silence after which a stream counts as dead, seconds")
    ] = 30.0
    degraded_confidence: Annotated[
        float, msgspec.Meta(ge=0, le=1, description="share of proba - 1/2 kept where one factor stands alone")
    ] = 0.5
    warmup_updates: Annotated[int, msgspec.Meta(ge=0, le=100000, description="first scores that stay neutral")] = 10
    boost_consistency: Annotated[
        float, msgspec.Meta(ge=0, le=1, description="consistency above which a nearly sufficient score is taken")
    ] = 0.7
    boost_ratio: Annotated[float, msgspec.Meta(gt=0, le=1, description="share of buy_score that then suffices")] = 0.8
    throttle_consistency: Annotated[
        float, msgspec.Meta(ge=0, le=1, description="stage throttle: neutral below this consistency, held states too")
    ] = 0.3
    min_consecutive: Annotated[
        int, msgspec.Meta(ge=1, le=1000, description="records in a row that must ask for a direction")
    ] = 1
    cooldown_sec: Annotated[
        float, msgspec.Meta(ge=0, le=3600, description="seconds of event time between two entries, at the threshold")
    ] = 0.3
    cooldown_min_sec: Annotated[
        float, msgspec.Meta(ge=0, le=3600, description="the least that a strong score shortens it to, seconds")
    ] = 0.12
    cooldown_relief: Annotated[
        float, msgspec.Meta(ge=0, le=1, description="share of the cooldown that a strong score is let off")
    ] = 0.6
    flip_rearm_ratio: Annotated[
        float, msgspec.Meta(ge=1, le=10, description="a reversal at this many times buy_score needs no cooldown")
    ] = 1.05
    exit_ratio: Annotated[
        float,
        msgspec.Meta(ge=0, lt=1, description="a state is held while |score| is above this share of its threshold"),
    ] = 0.6
    max_hold_sec: Annotated[
        float, msgspec.Meta(gt=0, le=86400, description="longest hold without a score over the threshold, seconds")
    ] = 10.0
    stages: Annotated[tuple[Stage, ...], msgspec.Meta(description="stages in force; one left out is off")] = (
        "lag",
        "warmup",
        "consistency",
        "boost",
        "duration",
        "cooldown",
        "flip_rearm",
        "hysteresis",
    )
    divergence: DivergenceConfig = DivergenceConfig()
    regime: RegimeConfig = RegimeConfig()

    def __post_init__(self) -> None:
        check_weights(self.w_ofi, self.w_cvd)
        limits = self.thresholds()
        if limits.strong <= limits.buy:
            raise ValueError(f"strong_score {limits.strong} must be above buy_score {limits.buy}")
        if limits.strong_consistency < limits.min_consistency:
            raise ValueError(
                f"strong_consistency {limits.strong_consistency} must not be below min_consistency "
                f"{limits.min_consistency}"
            )
        if self.score_z_min > self.score_z_window:
            raise ValueError(f"score_z_min {self.score_z_min} must not exceed score_z_window {self.score_z_window}")
        if self.cooldown_min_sec > self.cooldown_sec:
            raise ValueError(
                f"cooldown_min_sec {self.cooldown_min_sec} must not exceed cooldown_sec {self.cooldown_sec}"
            )

    def thresholds(self) -> Thresholds:
        """Thresholds in force: those of the preset, with what is set here instead."""
        preset = PRESETS[self.preset]
        return Thresholds(
            preset.buy if self.buy_score is None else self.buy_score,
            preset.strong if self.strong_score is None else self.strong_score,
            preset.min_consistency if self.min_consistency is None else self.min_consistency,
            preset.strong_consistency if self.strong_consistency is None else self.strong_consistency,
        )
