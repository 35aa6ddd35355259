"""Whole runs of real captures: every number of the lake against the reference, and the same bytes each time."""

from __future__ import annotations

import json
from decimal import Decimal
from pathlib import Path

import pytest
from run_helpers import (
    ALTS,
    JOURNAL,
    MAJORS,
    Run,
    assert_same_run,
    files_of,
    lake,
    physical,
    running,
    shared_run,
    topics_of,
)

pytestmark = [pytest.mark.kafka, pytest.mark.capture, pytest.mark.slow]

ALTS_EXPECTED = {
    # symbol: depth rows checked by the oracle, quotes, trades, CVD
    "SUSHIUSDT": (252, 305, 40, Decimal(1026)),
    "KEEPUSDT": (130, 75, 5, Decimal(-3185)),
    "CTKUSDT": (180, 145, 38, Decimal(-2733)),
    "AKROUSDT": (182, 88, 8, Decimal(32340)),
}
MAJORS_EXPECTED = {"BTCUSDT": (4773, 52_260, 4393), "ETHUSDT": (4770, 47_328, 4469)}

ORACLE = """
    SELECT b.symbol, count(*),
           count(*) FILTER (b.bid_px[1] = q.bid AND b.bid_qty[1] = q.bid_qty
                            AND b.ask_px[1] = q.ask AND b.ask_qty[1] = q.ask_qty)
    FROM {book} b ASOF JOIN {quotes} q ON b.symbol = q.symbol AND b.update_id >= q.update_id
    WHERE b.book_state = 'synced'
    GROUP BY b.symbol
"""
"""Best level of each depth row against the newest quote at or below its own update id."""

SIGNED = """
    SELECT symbol,
           sum(CASE side WHEN 'buy' THEN qty::DECIMAL(28, 8) ELSE -qty::DECIMAL(28, 8) END),
           sum(qty::DECIMAL(28, 8)) FILTER (side = 'buy'),
           sum(qty::DECIMAL(28, 8)) FILTER (side = 'sell')
    FROM {prices} GROUP BY symbol
"""


@pytest.fixture(scope="module")
def alts(kafka_bootstrap: str, captures: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    return shared_run(kafka_bootstrap, captures, ALTS, tmp_path_factory)


@pytest.fixture(scope="module")
def majors(kafka_bootstrap: str, captures: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    return shared_run(kafka_bootstrap, captures, MAJORS, tmp_path_factory)


def counts(run: Run, kind: str) -> dict[str, int]:
    """Rows by symbol; `_` for those that belong to none, as their folder is called."""
    return dict(lake(run.out, f"SELECT if(symbol = '', '_', symbol), count(*) FROM {{{kind}}} GROUP BY ALL"))


def test_every_trade_and_every_quote_of_the_majors_is_in_the_lake(majors: Run) -> None:
    assert counts(majors, "quotes") == {symbol: quotes for symbol, (_, quotes, _) in MAJORS_EXPECTED.items()}
    assert counts(majors, "prices") == {symbol: trades for symbol, (_, _, trades) in MAJORS_EXPECTED.items()}
    assert majors.summary["gaps"] == majors.summary["resyncs"] == 0
    assert majors.summary["rejects"] == {}


def test_signed_quantities_of_the_majors_equal_the_reference_to_the_last_digit(majors: Run, captures: Path) -> None:
    reference = {
        each["set"].split("_")[0].upper(): tuple(Decimal(str(each[name])) for name in ("cvd", "buy", "sell"))
        for each in json.loads((captures.parent / "reference" / "totals.json").read_text("utf-8"))
    }
    assert {symbol: sums for symbol, *sums in lake(majors.out, SIGNED)} == {
        symbol: list(sums) for symbol, sums in reference.items()
    }
    last = dict(lake(majors.out, "SELECT symbol, arg_max(cvd, seq) FROM {cvd} GROUP BY symbol"))
    assert {symbol: Decimal(repr(cvd)) for symbol, cvd in last.items()} == {
        symbol: cvd for symbol, (cvd, _, _) in reference.items()
    }


def test_order_flow_imbalance_of_the_majors_equals_the_reference(majors: Run, captures: Path) -> None:
    reference = {
        each["set"].split("_")[0].upper(): each["ofi_bt_exact"]
        for each in json.loads((captures.parent / "reference" / "totals.json").read_text("utf-8"))
    }
    sums = dict(lake(majors.out, "SELECT symbol, fsum(ofi_l1) FROM {ofi} GROUP BY symbol"))
    assert sums == pytest.approx(reference, rel=0, abs=1e-9)


def test_every_book_of_the_majors_passes_the_oracle(majors: Run) -> None:
    expected = {symbol: (checked, checked) for symbol, (checked, _, _) in MAJORS_EXPECTED.items()}
    assert {symbol: (rows, right) for symbol, rows, right in lake(majors.out, ORACLE)} == expected


def test_alts_equal_the_reference(alts: Run) -> None:
    assert counts(alts, "quotes") == {symbol: each[1] for symbol, each in ALTS_EXPECTED.items()}
    assert counts(alts, "prices") == {symbol: each[2] for symbol, each in ALTS_EXPECTED.items()}
    assert {symbol: cvd for symbol, cvd, _, _ in lake(alts.out, SIGNED)} == {
        symbol: each[3] for symbol, each in ALTS_EXPECTED.items()
    }
    assert {symbol: (rows, right) for symbol, rows, right in lake(alts.out, ORACLE)} == {
        symbol: (each[0], each[0]) for symbol, each in ALTS_EXPECTED.items()
    }


@pytest.mark.parametrize("name", ["alts", "majors"])
def test_summary_topics_and_lake_agree(name: str, request: pytest.FixtureRequest) -> None:
    run: Run = request.getfixturevalue(name)
    summary = run.summary
    for kind in ("prices", "quotes", "book", "ofi", "cvd", "fusion", "events", "signals"):
        assert summary["lake"]["rows"][kind] == counts(run, kind), kind
    sizes: dict[str, int] = {}
    for (topic, _), records in topics_of(run).items():
        sizes[topic] = sizes.get(topic, 0) + len(records)
    assert summary["topics"] == sizes
    assert summary["rows_by_source"] == {
        "aggTrade": sum(counts(run, "prices").values()),
        "bookTicker": sum(counts(run, "quotes").values()),
        "depth": sum(counts(run, "book").values()),
    }
    assert summary["lake_agrees"] is True
    assert sum(each["count"] for each in summary["restarts"].values()) == 0
    files = files_of(run.out)
    lake_files = [path for path in files if path.startswith("data/")]
    assert summary["lake"]["files"] == len(lake_files)
    assert summary["lake"]["bytes"] == sum((run.out / path).stat().st_size for path in lake_files)


def test_the_same_capture_gives_the_same_bytes_at_any_pace(
    alts: Run, kafka_bootstrap: str, captures: Path, tmp_path: Path
) -> None:
    with running(kafka_bootstrap, captures / ALTS, tmp_path / "paced", speed="20") as paced:
        assert paced.finish() == 0, paced.output
        assert paced.prefix != alts.prefix
        assert_same_run(paced, alts)


def test_the_same_capture_twice_gives_the_same_bytes(
    majors: Run, kafka_bootstrap: str, captures: Path, tmp_path: Path
) -> None:
    with running(kafka_bootstrap, captures / MAJORS, tmp_path / "again") as again:
        assert again.finish() == 0, again.output
        assert_same_run(again, majors)


def test_every_value_of_a_topic_is_written_under_one_schema(alts: Run) -> None:
    ids: dict[str, set[bytes]] = {}
    for (topic, _), records in physical(alts.bootstrap, alts.prefix).items():
        ids.setdefault(topic, set()).update(record.value[:5] for record in records if record.value is not None)
    assert {topic: len(found) for topic, found in ids.items() if topic != "quality.rejects"} == {
        topic: 1 for topic in ids if topic != "quality.rejects"
    }
    assert ids[JOURNAL] != ids["market.rows"]
