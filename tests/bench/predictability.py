"""`python -m tests.bench.predictability`: how far the order flow of the synthetic market foretells its prices, by dial.

Flow is what a receiver of the frames computes: the change of CVD, and the sum of the best-level order flow imbalance,
over the last h seconds; the move is that of the mid over the next h. At each dial and horizon: Pearson correlation, and
AUC of the flow for the sign of the move (ties of the move left out, as in the evaluator's labels).

**Errors** are of blocks: estimates are linearised (a correlation by its influence function, an AUC by its structural
components, E. DeLong, D. DeLong, D. Clarke-Pearson, Biometrics 44, 1988), influences are summed over blocks of
`BLOCK_SEC`, which are much longer than a push, a horizon or a regime, and the sums are taken as independent. Overlapping
windows and clustered volatility are so accounted for. That the errors are honest shows in the last table: over seeds,
without predictability, t = estimate / error has a mean square of 1.

**Verdict** (exit status 1 where it fails): at dial 0 no |t| lies beyond the two-sided bound of Bonferroni at 1 % over
all flows, horizons and seeds; and correlation and AUC grow with the dial (neighbours may be level within two errors).
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from itertools import product
from pathlib import Path
from statistics import NormalDist
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from orderflow.microstructure.ofi_flow import best_flow
from orderflow.venues.binance.frames import BookTicker, decode_agg_trade, decode_book_ticker
from orderflow.venues.binance.sim.market import START_MS, SyntheticConfig, SyntheticMarket
from rich.console import Console
from rich.table import Table

from tests.bench.data import ROOT

Floats = npt.NDArray[np.float64]

SYMBOL = "BTCUSDT"
DIALS = (0.0, 0.1, 0.25, 0.5, 0.75, 1.0)
HORIZONS_SEC = (1, 5, 10)
FLOWS = ("ofi", "cvd")
BLOCK_SEC = 120
SEEDS = 8
HOURS = 2.0
FALSE_ALARM = 0.01


class Series(NamedTuple):
    """What has been seen at the end of each second: cumulative flows in base units, mid in quote units."""

    ofi: Floats
    cvd: Floats
    mid: Floats


class Estimate(NamedTuple):
    """A number and its standard error."""

    value: float
    error: float


class FlowMeter:
    """Best-level OFI, CVD and mid from frames, as our processors define them."""

    def __init__(self) -> None:
        self.ofi = 0.0
        self.cvd = 0.0
        self.mid = 0.0
        self._quote: BookTicker | None = None

    def take(self, stream: str, payload: bytes) -> None:
        if stream.endswith("@bookTicker"):
            self._take_quote(decode_book_ticker(payload).data)
        elif stream.endswith("@aggTrade"):
            trade = decode_agg_trade(payload).data
            self.cvd += -trade.qty if trade.buyer_is_maker else trade.qty

    def _take_quote(self, quote: BookTicker) -> None:
        old, self._quote = self._quote, quote
        self.mid = (quote.bid + quote.ask) / 2
        if old is not None:
            self.ofi += best_flow(
                old.bid, old.bid_qty, old.ask, old.ask_qty, quote.bid, quote.bid_qty, quote.ask, quote.ask_qty
            )


def observe(seed: int, predictability: float, seconds: int, config: SyntheticConfig | None = None) -> Series:
    """The market of a seed and a dial, looked at once a second."""
    config = config or SyntheticConfig(predictability=predictability)
    market = SyntheticMarket(seed, (SYMBOL,), config=config)
    meter = FlowMeter()
    seen = np.empty((3, seconds))
    for second in range(seconds):
        for stream, payload, _ in market.advance(START_MS + (second + 1) * 1_000):
            meter.take(stream, payload)
        seen[:, second] = meter.ofi, meter.cvd, meter.mid
    return Series(*seen)


class Pairs(NamedTuple):
    """Flow of the last h seconds, move of the next h, and the block, once a second."""

    flow: Floats
    move: Floats
    block: npt.NDArray[np.int64]


def pairs(series: Sequence[Series], flow: str, horizon_sec: int) -> Pairs:
    """Of one or more series; no window reaches over the end of one."""
    flows, moves, blocks = [], [], []
    first_block = 0
    for each in series:
        level = getattr(each, flow)
        now = np.arange(horizon_sec, len(level) - horizon_sec)
        flows.append(level[now] - level[now - horizon_sec])
        moves.append(each.mid[now + horizon_sec] - each.mid[now])
        blocks.append(first_block + now // BLOCK_SEC)
        first_block += len(level) // BLOCK_SEC + 1
    return Pairs(np.concatenate(flows), np.concatenate(moves), np.concatenate(blocks))


def _block_error(influence: Floats, block: npt.NDArray[np.int64]) -> float:
    """Standard error of a mean of `influence`, which has mean 0, with what lies in one block fully dependent."""
    sums = np.bincount(block, weights=influence)
    return float(np.sqrt(np.sum(sums**2)) / len(influence))


def correlation(data: Pairs) -> Estimate:
    x = (data.flow - data.flow.mean()) / data.flow.std()
    y = (data.move - data.move.mean()) / data.move.std()
    value = float(np.mean(x * y))
    return Estimate(value, _block_error(x * y - value * (x**2 + y**2) / 2, data.block))


def auc(data: Pairs) -> Estimate:
    """P(flow before a rise > flow before a fall), ties of the flow counted half."""
    moved = data.move != 0.0
    flow, up, block = data.flow[moved], data.move[moved] > 0.0, data.block[moved]
    rises, falls = np.sort(flow[up]), np.sort(flow[~up])
    # Of a rise: the share of falls that it beats; of a fall: the share of rises that beat it.
    won = np.where(up, _share_below(falls, flow), 1.0 - _share_below(rises, flow))
    value = float(won[up].mean())
    weight = np.where(up, len(flow) / len(rises), len(flow) / len(falls))
    return Estimate(value, _block_error(weight * (won - value), block))


def _share_below(ordered: Floats, values: Floats) -> Floats:
    below = np.searchsorted(ordered, values, "left") + np.searchsorted(ordered, values, "right")
    share: Floats = below / (2 * len(ordered))
    return share


def bound(tests: int, false_alarm: float = FALSE_ALARM) -> float:
    """|t| that none of so many tests of true hypotheses exceeds, but for a chance of at most `false_alarm` (Bonferroni)."""
    return NormalDist().inv_cdf(1.0 - false_alarm / (2 * tests))


def main() -> int:
    args = _arguments()
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 130)
    seconds = int(args.hours * 3600)
    seeds = range(1, args.seeds + 1)
    worlds = list(product(DIALS, seeds))
    begun = time.monotonic()
    series: dict[float, list[Series]] = {dial: [] for dial in DIALS}
    with ProcessPoolExecutor(args.workers) as pool:
        done = pool.map(observe, *zip(*((seed, dial, seconds) for dial, seed in worlds)))
        for (dial, _), each in zip(worlds, done):
            series[dial].append(each)
    console.print(
        f"{SYMBOL}, {args.seeds} seeds of {args.hours:g} h at each dial, defaults otherwise; "
        f"{time.monotonic() - begun:.0f} s"
    )
    table = by_dial(series)
    _print_table(console, table)
    nulls = [
        (flow, horizon, seed, correlation(pairs([each], flow, horizon)))
        for seed, each in zip(seeds, series[0.0])
        for flow, horizon in product(FLOWS, HORIZONS_SEC)
    ]
    wrong = _judge_null(console, nulls) + not_growing(table)
    for line in wrong:
        console.print(f"WRONG {line}")
    args.json.parent.mkdir(parents=True, exist_ok=True)
    content = {"seeds": args.seeds, "hours": args.hours, "table": table, "wrong": wrong}
    args.json.write_text(json.dumps(content, indent=2) + "\n", "utf-8")
    console.print(f"written to {args.json}")
    return 1 if wrong else 0


Row = dict[str, dict[str, Estimate]]
"""`ofi 5 s` -> `correlation`, `auc`."""


def by_dial(series: dict[float, list[Series]]) -> dict[float, Row]:
    table: dict[float, Row] = {}
    for dial, each in series.items():
        table[dial] = {}
        for flow, horizon in product(FLOWS, HORIZONS_SEC):
            data = pairs(each, flow, horizon)
            table[dial][f"{flow} {horizon} s"] = {"correlation": correlation(data), "auc": auc(data)}
    return table


def not_growing(table: dict[float, Row]) -> list[str]:
    """Where an estimate does not grow with the dial; neighbours may be level within two standard errors."""
    rows = list(table.items())
    found = []
    for place, (high, after) in enumerate(rows):
        for low, before in rows[max(0, place - 2) : place]:
            neighbours = (low, before) == rows[place - 1]
            for cell, name in product(after, ("correlation", "auc")):
                old, new = before[cell][name], after[cell][name]
                if new.value - old.value <= (-2.0 * math.hypot(old.error, new.error) if neighbours else 0.0):
                    found.append(
                        f"{name} of {cell} is {new.value:.4f} at dial {high:g}, and {old.value:.4f} at {low:g}"
                    )
    return found


def _judge_null(console: Console, nulls: Sequence[tuple[str, int, int, Estimate]]) -> list[str]:
    limit = bound(len(nulls))
    ratios = np.array([estimate.value / estimate.error for *_, estimate in nulls])
    console.print(
        f"dial 0, seed by seed: {len(nulls)} correlations, greatest |t| {np.abs(ratios).max():.2f} (bound {limit:.2f}: "
        f"Bonferroni, {FALSE_ALARM:.0%}), mean {ratios.mean():+.2f}, mean square {np.mean(ratios**2):.2f}"
    )
    return [
        f"dial 0, seed {seed}: {flow} foretells {horizon} s with {estimate.value:+.4f} +- {estimate.error:.4f}"
        for flow, horizon, seed, estimate in nulls
        if abs(estimate.value) > limit * estimate.error
    ]


def _print_table(console: Console, table: dict[float, Row]) -> None:
    for name in ("correlation", "auc"):
        shown = Table(box=None, header_style="bold", title=f"{name} of flow (last h) with the mid's move (next h)")
        shown.add_column("dial", justify="right")
        for cell in table[DIALS[0]]:
            shown.add_column(cell, justify="right")
        for dial, row in table.items():
            shown.add_row(f"{dial:g}", *(f"{each[name].value:+.3f} ± {each[name].error:.3f}" for each in row.values()))
        console.print(shown)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tests.bench.predictability", description=__doc__.partition("\n")[0]
    )
    parser.add_argument("--seeds", type=int, default=SEEDS, metavar="N", help=f"worlds at each dial (default {SEEDS})")
    parser.add_argument("--hours", type=float, default=HOURS, metavar="H", help=f"of each world (default {HOURS:g})")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, metavar="N", help="processes")
    parser.add_argument(
        "--json",
        type=Path,
        default=ROOT / "runs" / "predictability.json",
        metavar="PATH",
        help="where the figures go (default runs/predictability.json)",
    )
    args = parser.parse_args()
    if args.seeds < 1 or args.hours * 3600 < 10 * BLOCK_SEC or args.workers < 1:
        parser.error(f"--seeds and --workers must be at least 1, and --hours at least {10 * BLOCK_SEC / 3600:.2f}")
    return args


if __name__ == "__main__":
    sys.exit(main())
