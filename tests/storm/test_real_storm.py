"""Storms over real sockets: the exchange as a process with a drawn plan of faults, the whole pipeline, a real broker.

Judged by the exchange's own market, which its seed and start make again: trades whole but for what was reported lost,
quotes and books true, the numbers of the journal without a hole, and all well at the quiet end.
"""

from __future__ import annotations

import io
import json
import time
from pathlib import Path
from typing import Any, Final

import fastavro
import msgspec
import pytest
from orderflow.venues.binance.sim.faults import FaultPlan
from orderflow.venues.binance.sim.market import SyntheticConfig
from orderflow.venues.binance.sim.source import Frame
from orderflow.venues.binance.sim.synthetic import SyntheticSource
from run_helpers import ROOT, Run, end, start_run, topics_of

from tests.storm.judge import Market, Verdict, check_books, check_quotes, check_trades
from tests.storm.plan import StormPlan
from tests.storm.world import Options, Output, Result

pytestmark = [pytest.mark.kafka, pytest.mark.slow]

SYMBOLS: Final = ("BTCUSDT", "DOGEUSDT", "XRPUSDT")
ACTIVITY: Final = 30.0
STORM_SEC: Final = 25
CALM_SEC: Final = 35
START_UP_SEC: Final = 8
"""From the start of the exchange until the services have subscribed; faults before would meet nobody."""
KINDS: Final = (
    "drop",
    "duplicate",
    "reorder",
    "truncate",
    "garbage",
    "oversize",
    "unknown_enum",
    "zero_price_trade",
    "insurance_trade",
    "crossed_book",
    "diff_gap",
    "stall_route",
    "skew",
    "close_1006",
    "close_1008",
    "life_cut",
    "server_ping",
    "refuse_connect",
    "stale_snapshot",
    "slow_snapshot",
    "rest_503",
    "clock_jump",
)
"""Those whose recovery fits the calm; the others are stormed on virtual time."""
TOPICS: Final = {"market.rows": "row", "market.events": "market_event", "market.ticks": "tick"}


def plan_of(seed: int) -> FaultPlan:
    drawn = FaultPlan.draw(seed, STORM_SEC * 1000, list(SYMBOLS), kinds=KINDS, mean_gap_ms=2_000, quiet_end_ms=0)
    later = START_UP_SEC * 1000
    return FaultPlan(seed, tuple(msgspec.structs.replace(each, at_ms=each.at_ms + later) for each in drawn.faults))


def decoded(run: Run) -> dict[str, list[dict[str, Any]]]:
    """The canonical view of the normaliser's topics, decoded by the schemas alone; raises at a hole in the journal."""
    found: dict[str, list[dict[str, Any]]] = {topic: [] for topic in TOPICS}
    schemas = {topic: fastavro.schema.load_schema(ROOT / "schemas" / f"{name}.avsc") for topic, name in TOPICS.items()}
    for (topic, _), records in sorted(topics_of(run).items()):
        if topic in TOPICS:
            schema = schemas[topic]
            found[topic] += [fastavro.schemaless_reader(io.BytesIO(body), schema, None) for _, body in records]
    return found


def truth_of(seed: int, start_ms: int, until_ms: int) -> tuple[dict[str, bytes], list[Frame]]:
    """Each symbol's whole book when the exchange opened, and every frame of its market since."""
    source = SyntheticSource(seed, SYMBOLS, config=SyntheticConfig(activity=ACTIVITY), start_ms=start_ms)
    opening = {symbol: source.book(symbol, 1_000_000) for symbol in SYMBOLS}
    frames = source._routed(source._market.advance(until_ms))
    return opening, frames


@pytest.mark.parametrize("seed", [11, 12, 13])
@pytest.mark.timeout(420)
def test_a_storm_over_sockets_leaves_nothing_wrong_and_nothing_unsaid(
    seed: int, kafka_bootstrap: str, tmp_path: Path
) -> None:
    plan = plan_of(seed)
    out = tmp_path / "run"
    start_ms = time.time_ns() // 1_000_000
    arguments = ["run", "--source", "sim", "--seed", str(seed), "--symbols", ",".join(SYMBOLS)]
    arguments += ["--activity", str(ACTIVITY), "--duration", str(START_UP_SEC + STORM_SEC + CALM_SEC)]
    run = start_run(
        kafka_bootstrap,
        [*arguments, "--no-view", "--out", str(out)],
        out,
        SIM_FAULTS=plan.to_json().decode(),
        SIM_START_MS=str(start_ms),
    )
    try:
        assert run.finish(300) == 0, run.output
        topics = decoded(run)
        said = "\n".join([*plan.lines(), run.output])
        summary = json.loads((out / "summary.json").read_text("utf-8"))
        opening, frames = truth_of(seed, start_ms, time.time_ns() // 1_000_000)
        outputs = {name: [Output(0, 0, 0.0, record) for record in records] for name, records in topics.items()}
        result = Result(
            Options(seed=seed),
            StormPlan(exchange=plan, machine=()),
            market=frames,
            opening=opening,
            rows=outputs["market.rows"],
            events=outputs["market.events"],
        )
        verdict = Verdict()
        truth = Market(result)
        check_trades(result, truth, verdict)
        check_quotes(result, truth, [], verdict)
        check_books(result, truth, verdict)
        assert not verdict.violations, (verdict.violations, said)
        assert min(verdict.counts[name] for name in ("trades", "quotes", "books")) > 100, (verdict.counts, said)
        depth = [row for row in topics["market.rows"] if row["src"] == "depth"]
        newest = {row["symbol"]: row["book_state"] for row in depth}
        assert newest == dict.fromkeys(SYMBOLS, "synced"), said
        ticks = [tick for tick in topics["market.ticks"] if tick["kind"] == "tick"]
        assert ticks[-1]["routes"] == {"market": "up", "public": "up"}, said
        assert topics["market.events"], said
        assert summary["lake_agrees"], said
    finally:
        end(run)
