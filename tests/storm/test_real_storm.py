"""Storms over real sockets: the exchange as a process with a drawn plan of faults, the whole pipeline, a real broker.

Judged by the exchange's own market, which its seed and start make again: trades whole but for what was reported lost,
quotes and books true, the numbers of the journal without a hole, and all well at the quiet end.
"""

from __future__ import annotations

import io
import json
import signal
import time
import urllib.request
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
OVER_MS: Final = (START_UP_SEC + STORM_SEC + CALM_SEC) * 1000
WELL_SEC: Final = 300.0
"""How long is waited for the end of the calm, and for all to be well: a busy machine takes longer to start, and to
recover."""
STARTS: Final = 3
LOOK_SEC: Final = 0.5
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


def decoded(run: Run) -> dict[str, list[Output]]:
    """The canonical view of the normaliser's topics, decoded by the schemas alone; raises at a hole in the journal."""
    found: dict[str, list[Output]] = {topic: [] for topic in TOPICS}
    schemas = {topic: fastavro.schema.load_schema(ROOT / "schemas" / f"{name}.avsc") for topic, name in TOPICS.items()}
    for (topic, partition), records in sorted(topics_of(run).items()):
        if topic in TOPICS:
            for _, body in records:
                record: Any = fastavro.schemaless_reader(io.BytesIO(body), schemas[topic], None)
                found[topic].append(Output(partition, 0, 0.0, record))
    return found


def newest_routes(topics: dict[str, list[Output]]) -> dict[int, dict[str, str]]:
    """How the routes stood at the last tick of each partition that has rows.

    The others have a tick every ten minutes: theirs may still be that of the start, before anything was connected.
    """
    homes = {row.partition for row in topics["market.rows"]}
    ticks = [each for each in topics["market.ticks"] if each.record["kind"] == "tick" and each.partition in homes]
    return {each.partition: each.record["routes"] for each in ticks}


def truth_of(seed: int, start_ms: int, until_ms: int) -> tuple[dict[str, bytes], list[Frame]]:
    """Each symbol's whole book when the exchange opened, and every frame of its market since."""
    source = SyntheticSource(seed, SYMBOLS, config=SyntheticConfig(activity=ACTIVITY), start_ms=start_ms)
    opening = {symbol: source.book(symbol, 1_000_000) for symbol in SYMBOLS}
    frames = source._routed(source._market.advance(until_ms))
    return opening, frames


def page(run: Run, service: str, path: str) -> bytes:
    """A page of a service; empty while it does not answer."""
    try:
        address = json.loads((run.out / "status" / f"{service}.json").read_text("utf-8"))
        with urllib.request.urlopen(f"http://127.0.0.1:{address['port']}{path}", timeout=5) as answer:
            body: bytes = answer.read()
    except (OSError, ValueError, KeyError):
        return b""
    return body


def over(run: Run) -> bool:
    """Whether the exchange's calm is over and the pipeline says that all is well."""
    exchange = json.loads(page(run, "simexchange", "/status") or b"{}")
    if exchange.get("elapsed_ms", 0) < OVER_MS:
        return False
    status = json.loads(page(run, "ingestion", "/status") or b"{}")
    synced = f'books{{state="synced"}} {len(SYMBOLS)}.0'.encode()
    routes = status.get("recorder", {}).get("routes", {"": "down"})
    return set(routes.values()) == {"up"} and synced in page(run, "ingestion", "/metrics")


def begun(seed: int, plan: FaultPlan, kafka_bootstrap: str, folder: Path) -> tuple[Run, int]:
    """A run whose services have been started, and when its market begins.

    The broker may be too busy to create a run's topics in time: then nothing has begun, and another start may be made.
    """
    arguments = ["run", "--source", "sim", "--seed", str(seed), "--symbols", ",".join(SYMBOLS)]
    arguments += ["--activity", str(ACTIVITY), "--no-view"]
    for number in range(STARTS):
        out = folder / f"run{number}"
        start_ms = time.time_ns() // 1_000_000
        faults = plan.to_json().decode()
        run = start_run(
            kafka_bootstrap, [*arguments, "--out", str(out)], out, SIM_FAULTS=faults, SIM_START_MS=str(start_ms)
        )
        while run.process.poll() is None:
            if page(run, "simexchange", "/status"):
                return run, start_ms
            time.sleep(LOOK_SEC)
        assert run.finish() == 2, run.output
        assert "broker" in run.output.splitlines()[-1], run.output
        end(run)
    raise AssertionError(f"the broker was too busy for {STARTS} starts: {run.output}")


def weathered(run: Run) -> None:
    """Wait until the storm is over, and end the run as a person would."""
    deadline = time.monotonic() + WELL_SEC
    while not over(run) and time.monotonic() < deadline and run.process.poll() is None:
        time.sleep(LOOK_SEC)
    run.process.send_signal(signal.SIGINT)
    assert run.finish(300) == 0, run.output


@pytest.mark.parametrize("seed", [11, 12, 13])
@pytest.mark.timeout(900)
def test_a_storm_over_sockets_leaves_nothing_wrong_and_nothing_unsaid(
    seed: int, kafka_bootstrap: str, tmp_path: Path
) -> None:
    plan = plan_of(seed)
    run, start_ms = begun(seed, plan, kafka_bootstrap, tmp_path)
    try:
        weathered(run)
        topics = decoded(run)
        said = "\n".join([*plan.lines(), run.output])
        summary = json.loads((run.out / "summary.json").read_text("utf-8"))
        opening, frames = truth_of(seed, start_ms, time.time_ns() // 1_000_000)
        result = Result(
            Options(seed=seed),
            StormPlan(exchange=plan, machine=()),
            market=frames,
            opening=opening,
            rows=topics["market.rows"],
            events=topics["market.events"],
        )
        verdict = Verdict()
        truth = Market(result)
        check_trades(result, truth, verdict)
        check_quotes(result, truth, [], verdict)
        check_books(result, truth, verdict)
        assert not verdict.violations, (verdict.violations, said)
        assert min(verdict.counts[name] for name in ("trades", "quotes", "books")) > 100, (verdict.counts, said)
        rows = [row.record for row in topics["market.rows"]]
        newest = {row["symbol"]: row["book_state"] for row in rows if row["src"] == "depth"}
        assert newest == dict.fromkeys(SYMBOLS, "synced"), said
        routes = newest_routes(topics)
        assert routes, said
        assert all(states == {"market": "up", "public": "up"} for states in routes.values()), (routes, said)
        assert topics["market.events"], said
        assert summary["lake_agrees"], said
    finally:
        end(run)
