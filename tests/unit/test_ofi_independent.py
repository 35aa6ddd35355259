"""Best-level and multi-level flow against an independent public library, event by event."""

from __future__ import annotations

from typing import Any

import orderflow_metrics
import pytest
from ofi_cvd_rows import BTC_ETH, CAPTURES, capture_steps, run
from orderflow.microstructure.ofi import OfiConfig, OfiProcessor
from orderflow_metrics import BookSnapshot, Level

pytestmark = [
    pytest.mark.capture,
    pytest.mark.skipif(not BTC_ETH.is_file(), reason=f"no recorded market data at {CAPTURES}; set ORDERFLOW_CAPTURES"),
]


def pairs(src: str) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """(market row, ofi record) of one kind, over the BTC and ETH capture."""
    steps = [step for step in capture_steps() if step[0] == "market.rows" and step[1]["src"] in ("bookTicker", "depth")]
    records = run(OfiProcessor(OfiConfig(), 0), steps)
    assert len(records) == len(steps)
    return [(row, record) for (_, row), record in zip(steps, records, strict=True) if row["src"] == src]


def test_every_quote_gives_the_library_s_flow() -> None:
    previous: dict[str, orderflow_metrics.L1Quote] = {}
    compared = 0
    for row, record in pairs("bookTicker"):
        quote = orderflow_metrics.L1Quote(row["bid"], row["bid_qty"], row["ask"], row["ask_qty"])
        before = previous.get(row["symbol"])
        if before is not None:
            expected = orderflow_metrics.ofi_contribution(before, quote)
            assert record["ofi_l1"] == pytest.approx(expected, abs=1e-9), row
            compared += 1
        previous[row["symbol"]] = quote
    assert compared == 52_260 + 47_328 - 2


def test_every_depth_row_gives_the_library_s_flow_by_level() -> None:
    previous: dict[str, BookSnapshot] = {}
    compared = 0
    for row, record in pairs("depth"):
        book = BookSnapshot(
            [Level(price, size) for price, size in zip(row["bid_px"], row["bid_qtys"], strict=True)],
            [Level(price, size) for price, size in zip(row["ask_px"], row["ask_qtys"], strict=True)],
        )
        before = previous.get(row["symbol"])
        if before is not None:
            expected = orderflow_metrics.multi_level_ofi(before, book, 5)
            # Level 1 comes from quotes, not from depth rows.
            assert record["components"][1:] == pytest.approx(expected[1:], abs=1e-9), row
            compared += 1
        previous[row["symbol"]] = book
    assert compared == 4_773 + 4_770 - 2
