"""Settings of cumulative volume delta, and the sets of them that are in use elsewhere."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Final, Literal

import msgspec

ScaleMode = Literal["hybrid", "ewma", "mad"]


class CvdConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Settings of cumulative volume delta."""

    z_mode: Annotated[
        Literal["delta", "level", "flow", "rate"],
        msgspec.Meta(description="what z measures: a trade's delta, cvd itself, flow over a window, or decayed flow"),
    ] = "delta"
    scale_mode: Annotated[
        ScaleMode, msgspec.Meta(description="hybrid: the larger of moving means and MAD floor; or one of them alone")
    ] = "hybrid"
    mad_multiplier: Annotated[float, msgspec.Meta(gt=0.0, le=100.0, description="factor of the MAD floor")] = 1.8
    mad_window_trades: Annotated[int, msgspec.Meta(ge=2, le=1000, description="trades in the MAD's window")] = 200
    mad_min_trades: Annotated[
        int, msgspec.Meta(ge=1, le=1000, description="trades before there is a MAD floor, counted in its window")
    ] = 50
    scale_fast_weight: Annotated[
        float, msgspec.Meta(ge=0.0, le=1.0, description="weight of the fast moving mean at the reference rate or above")
    ] = 0.20
    fast_half_life_sec: Annotated[
        float, msgspec.Meta(gt=0.0, le=86_400.0, description="half-life of the fast moving mean, s")
    ] = 60.0
    half_life_sec: Annotated[
        float, msgspec.Meta(gt=0.0, le=86_400.0, description="half-life of the slow moving mean, s")
    ] = 600.0
    ewma_weighting: Annotated[
        Literal["gap", "event"],
        msgspec.Meta(description="gap: a trade weighs by the time since the one before; event: all weigh the same"),
    ] = "gap"
    reference_trades_per_sec: Annotated[
        float, msgspec.Meta(gt=0.0, le=1e6, description="rate below which the scale is made more cautious")
    ] = 1.5
    fast_weight_exponent: Annotated[
        float, msgspec.Meta(ge=0.0, le=10.0, description="how fast the fast weight fades below the reference rate")
    ] = 1.0
    boost_exponent: Annotated[
        float, msgspec.Meta(ge=0.0, le=10.0, description="how fast the floor rises below the reference rate")
    ] = 0.7
    winsor_limit: Annotated[float, msgspec.Meta(gt=0.0, le=1e6, description="bound of |z_cvd|; z_raw has none")] = 8.0
    warmup_trades: Annotated[int, msgspec.Meta(ge=1, le=100_000, description="z is given from this trade on")] = 20
    soft_pause_ms: Annotated[
        int, msgspec.Meta(ge=1, le=86_400_000, description="z is withheld after a longer pause, ms of event time")
    ] = 4000
    hard_pause_ms: Annotated[
        int, msgspec.Meta(ge=1, le=86_400_000, description="z is withheld for longer after a longer pause, ms")
    ] = 5000
    soft_freeze_trades: Annotated[
        int, msgspec.Meta(ge=0, le=10_000, description="trades without z after a soft pause, the first one included")
    ] = 1
    hard_freeze_trades: Annotated[
        int, msgspec.Meta(ge=0, le=10_000, description="trades without z after a hard pause, the first one included")
    ] = 2
    ema_alpha: Annotated[float, msgspec.Meta(gt=0.0, le=1.0, description="weight of the newest cvd in cvd_ema")] = 0.2
    level_window_trades: Annotated[
        int, msgspec.Meta(ge=2, le=10_000, description="z_mode level: trades in the window")
    ] = 150
    level_min_trades: Annotated[
        int, msgspec.Meta(ge=2, le=10_000, description="z_mode level: trades in the window before z is given")
    ] = 30
    flow_window_ms: Annotated[
        int, msgspec.Meta(ge=1, le=600_000, description="z_mode flow: span of the flow, ms of event time")
    ] = 60_000
    rate_half_life_sec: Annotated[
        float, msgspec.Meta(gt=0.0, le=3600.0, description="z_mode rate: half-life of the decayed flow, s")
    ] = 10.0
    active_trades_per_sec: Annotated[
        float, msgspec.Meta(gt=0.0, le=1e6, description="regime is active above this trade rate")
    ] = 2.0
    quiet_trades_per_sec: Annotated[
        float, msgspec.Meta(ge=0.0, le=1e6, description="regime is quiet below this trade rate")
    ] = 0.5
    auto_scale_mode: Annotated[
        bool, msgspec.Meta(description="regime active takes scale_mode ewma, quiet takes hybrid")
    ] = False
    vpin_buckets: Annotated[int, msgspec.Meta(ge=1, le=1000, description="volume buckets in vpin")] = 50
    vpin_bucket_sec: Annotated[
        float, msgspec.Meta(gt=0.0, le=86_400.0, description="a bucket holds the average volume of this time, s")
    ] = 5.0
    vpin_half_life_sec: Annotated[
        float, msgspec.Meta(gt=0.0, le=604_800.0, description="half-life of the average volume behind a bucket, s")
    ] = 3600.0
    bar_ms: Annotated[
        int, msgspec.Meta(ge=1, le=3_600_000, description="bar of kyle_lambda and amihud, ms of event time")
    ] = 1000
    impact_bars: Annotated[int, msgspec.Meta(ge=2, le=1000, description="bars in kyle_lambda and amihud")] = 300
    impact_min_bars: Annotated[
        int, msgspec.Meta(ge=2, le=1000, description="bars before kyle_lambda and amihud are given")
    ] = 30

    def __post_init__(self) -> None:
        self._check_order("mad_min_trades", "mad_window_trades")
        self._check_order("level_min_trades", "level_window_trades")
        self._check_order("impact_min_bars", "impact_bars")
        self._check_order("soft_pause_ms", "hard_pause_ms")
        self._check_order("fast_half_life_sec", "half_life_sec")
        self._check_order("quiet_trades_per_sec", "active_trades_per_sec")

    def _check_order(self, low: str, high: str) -> None:
        if getattr(self, low) > getattr(self, high):
            raise ValueError(f"{low} is {getattr(self, low)!r}: it must not exceed {high} ({getattr(self, high)!r})")


PRESETS: Final[Mapping[str, Mapping[str, Any]]] = {
    "seed": {
        "z_mode": "delta",
        "scale_mode": "hybrid",
        "mad_multiplier": 1.8,
        "scale_fast_weight": 0.20,
        "half_life_sec": 600.0,
        "winsor_limit": 8.0,
    },
    "v13": {"mad_multiplier": 1.70, "scale_fast_weight": 0.30, "winsor_limit": 2.0},
    "v13_btcusdt": {"mad_multiplier": 1.75, "scale_fast_weight": 0.30, "winsor_limit": 1.9},
    "v13_ethusdt": {"mad_multiplier": 1.70, "scale_fast_weight": 0.30, "winsor_limit": 2.3},
    "analysis": {
        "mad_multiplier": 1.45,
        "scale_fast_weight": 0.35,
        "winsor_limit": 8.0,
        "mad_window_trades": 300,
        "mad_min_trades": 60,
        "warmup_trades": 80,
    },
    "no_freeze": {"soft_freeze_trades": 0, "hard_freeze_trades": 0},
}
"""Name -> settings that differ from, or pin, the defaults: `CvdConfig(**PRESETS[name])`.

seed: the reference set, which the defaults are. v13: the code defaults of the V13 family, and its tables for two
symbols. analysis: its set for offline work.
"""
