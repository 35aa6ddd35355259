"""OFI, CVD and the side rules on recorded data, against reference totals from exact decimals."""

from __future__ import annotations

import collections
import csv
import json
import statistics

import pytest
from ofi_cvd_rows import BTC_ETH, CAPTURES, capture_frames, capture_steps, packed, run
from orderflow.microstructure.cvd import CvdConfig, CvdProcessor
from orderflow.microstructure.ofi import OfiConfig, OfiProcessor
from orderflow.microstructure.side import SideClassifier, SideConfig, agreement

REFERENCE = CAPTURES.parent / "reference"
SYMBOLS = ("BTCUSDT", "ETHUSDT")

pytestmark = [
    pytest.mark.capture,
    pytest.mark.skipif(
        not BTC_ETH.is_file() or not REFERENCE.is_dir(),
        reason=f"no recorded market data at {CAPTURES}; set ORDERFLOW_CAPTURES",
    ),
]


@pytest.fixture(scope="module")
def totals():
    sets = json.loads((REFERENCE / "totals.json").read_text())
    return {each["set"].split("_")[0].upper(): each for each in sets}


@pytest.fixture(scope="module")
def steps():
    return capture_steps()


@pytest.fixture(scope="module")
def ofi(steps):
    return run(OfiProcessor(OfiConfig(), 0), (step for step in steps if step[1].get("src") != "aggTrade"))


@pytest.fixture(scope="module")
def cvd(steps):
    return run(CvdProcessor(CvdConfig(), 0), (step for step in steps if step[1].get("src") == "aggTrade"))


def of(symbol, values):
    return [value for value in values if value["symbol"] == symbol]


@pytest.mark.parametrize("symbol", SYMBOLS)
def test_level_one_flow_adds_up_to_the_reference(symbol, ofi, totals):
    values = of(symbol, ofi)
    plain = 0.0
    for value in values:  # as SQL's sum adds doubles
        plain += value["ofi_l1"]
    assert plain == pytest.approx(totals[symbol]["ofi_bt_exact"], abs=1e-9)
    assert sum(value["src"] == "bookTicker" for value in values) == totals[symbol]["bt"]
    assert values[-1]["bad_frames"] == values[-1]["late_rows"] == 0
    assert not any(value["ofi_l1"] for value in values if value["src"] == "depth")


@pytest.mark.parametrize("symbol", SYMBOLS)
def test_level_one_flow_matches_the_reference_second_by_second(symbol, ofi):
    flow = collections.defaultdict(float)
    for value in of(symbol, ofi):
        flow[value["event_ts_ms"] // 1000] += value["ofi_l1"]
    with (REFERENCE / f"{symbol.lower()}_20240718_19_1s.csv").open() as lines:
        seconds = list(csv.DictReader(lines))
    assert len(seconds) > 400
    for second in seconds:
        assert flow[int(second["sec_E"])] == pytest.approx(float(second["ofi_l1_bookticker"]), abs=1e-9)


@pytest.mark.parametrize("symbol", SYMBOLS)
def test_cvd_is_the_reference_exactly(symbol, cvd, totals):
    values, expected = of(symbol, cvd), totals[symbol]
    assert values[-1]["cvd"] == expected["cvd"]
    for side in ("buy", "sell"):
        assert sum(value["qty"] for value in values if value["side"] == side) == pytest.approx(expected[side], abs=1e-9)
    assert values[-1]["no_delta_count"] == 0


@pytest.mark.parametrize("symbol", SYMBOLS)
def test_mid_moves_with_flow(symbol, ofi):
    """Cont-Kukanov-Stoikov's regression: change of the mid over a second on the flow of that second."""
    flow, mid = collections.defaultdict(float), {}
    for value in of(symbol, ofi):
        if value["src"] == "bookTicker":
            flow[value["ts_ms"] // 1000] += value["ofi_l1"]
            mid[value["ts_ms"] // 1000] = value["mid"]
    first, last = min(mid), max(mid)
    x, y, before = [], [], mid[first]
    for second in range(first + 1, last):
        x.append(flow[second])
        y.append(mid.get(second, before) - before)
        before = mid.get(second, before)
    assert len(x) > 400
    assert statistics.linear_regression(x, y).slope > 0
    assert 0.4 < statistics.correlation(x, y) ** 2 < 0.65


def classified(symbol, config, time_key, quotes_first=False):
    """(inferred, true) sides, each aggregate trade counting as the single trades it is made of."""
    one, pairs, frames = SideClassifier(config), [], []
    for _, connection, frame in capture_frames():
        data = frame["data"] if connection != "rest" else {}
        if data.get("s") == symbol and data["e"] in ("aggTrade", "bookTicker"):
            frames.append(data)
    if quotes_first:
        frames.sort(key=lambda data: data["e"] == "aggTrade")
    for data in frames:
        if data["e"] == "bookTicker":
            one.on_quote(data[time_key], float(data["b"]), float(data["a"]))
        else:
            side, _ = one.classify(data[time_key], float(data["p"]), None)
            pairs += [(side, "sell" if data["m"] else "buy")] * (data["l"] - data["f"] + 1)
    return pairs


def share(pairs):
    return agreement([side for side, _ in pairs], [truth for _, truth in pairs])


UNLIMITED = {"tick_rule_max_repeats": 1_000_000, "tick_rule_max_gap_ms": 86_400_000}


@pytest.mark.parametrize("symbol", SYMBOLS)
def test_tick_rule_agrees_as_often_as_the_reference(symbol, totals):
    """The reference's rule carries the last side without limit; ours is silent where it would reach too far."""
    pairs = classified(symbol, SideConfig(lee_ready=False, **UNLIMITED), "T")
    expected = totals[symbol]["tick_rule_agree"]
    assert len(pairs) == totals[symbol]["trades"]
    assert share(pairs) == pytest.approx(expected, abs=1e-5)
    limited = [pair for pair in classified(symbol, SideConfig(lee_ready=False), "T") if pair[0] is not None]
    assert 0.97 * len(pairs) < len(limited) < len(pairs)
    assert share(limited) == pytest.approx(expected, abs=0.01)


@pytest.mark.parametrize("symbol", SYMBOLS)
def test_lee_ready_agrees_as_often_as_the_reference(symbol, totals):
    """Quote rule of the reference: the newest quote *sent* (E) strictly before the trade was, whichever arrived first.

    By T, as the normaliser calls it, the quote is the one that the trade met, and nearly every side is right.
    """
    by_sent = classified(symbol, SideConfig(quote_history=65_536, **UNLIMITED), "E", quotes_first=True)
    assert share(by_sent) == pytest.approx(totals[symbol]["lee_ready_agree"], abs=0.01)
    assert share(classified(symbol, SideConfig(), "T")) > 0.999


def test_replay_from_a_snapshot_in_the_middle_is_the_same(steps):
    part = steps[:30_000]
    for make in (lambda: OfiProcessor(OfiConfig(), 0), lambda: CvdProcessor(CvdConfig(), 0)):
        whole, first, second = run(make(), part), make(), make()
        head = run(first, part[:17_001])
        second.restore(first.snapshot())
        assert packed(head + run(second, part[17_001:])) == packed(whole)


def test_z_is_usable_on_real_flow(ofi, cvd):
    z = [value["ofi_z_raw"] for value in ofi if value["ofi_z_raw"] is not None]
    assert len(z) > 0.99 * len(ofi)
    assert 0.01 < sum(abs(each) > 2 for each in z) / len(z) < 0.08
    assert not any(value["std_zero"] for value in ofi)
    z = [value["z_raw"] for value in cvd if value["z_raw"] is not None]
    assert len(z) > 0.99 * len(cvd)
    assert sum(value["floor_used"] for value in cvd) / len(cvd) < 0.6


def test_micro_price_forecasts_better_than_the_mid(ofi):
    """Out of sample by construction: each is from the quotes before. Error against the mid 1 s later."""
    for symbol in SYMBOLS:
        quotes = [value for value in of(symbol, ofi) if value["src"] == "bookTicker"]
        squares = collections.Counter()
        later = 0
        for value in quotes[5000:-2000:7]:
            while quotes[later + 1]["ts_ms"] <= value["ts_ms"] + 1000:
                later += 1
            for name in ("mid", "weighted_mid", "micro_price"):
                squares[name] += (quotes[later]["mid"] - value[name]) ** 2
        assert squares["micro_price"] < 0.9 * squares["weighted_mid"] < squares["mid"]
