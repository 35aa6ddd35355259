"""The lake's settings, apart from the code that needs Arrow: every service reads the configuration, one writes files."""

from __future__ import annotations

from typing import Annotated

import msgspec


class LakeConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What decides the lake's files. A change changes where files are cut, so it is part of the fingerprint."""

    rotate_sec: Annotated[
        int, msgspec.Meta(ge=1, le=86_400, description="cut at ticks whose clock crosses a multiple of this, seconds")
    ] = 60
    max_rows: Annotated[
        int, msgspec.Meta(ge=1, le=2_000_000, description="cut at the next tick with so many rows buffered")
    ] = 200_000
    zstd_level: Annotated[int, msgspec.Meta(ge=1, le=19, description="compression of the raw journal")] = 3
