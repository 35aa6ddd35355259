"""What the dashboards show. The metrics are those of docs/metrics.md."""

from __future__ import annotations

from typing import Final

from grafana.boards import data_health, order_flow, overview, pipeline, quality, signals
from grafana.panels import Board

BOARDS: Final[tuple[Board, ...]] = (
    overview.BOARD,
    data_health.BOARD,
    pipeline.BOARD,
    order_flow.BOARD,
    signals.BOARD,
    quality.BOARD,
)
