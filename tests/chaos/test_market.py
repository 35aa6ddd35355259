"""Captures that are wider and longer than the recording: what is changed in them, and what the pipeline makes of a seam."""

from __future__ import annotations

import gzip
import json
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import pytest
from orderflow.capture import frames, scan
from orderflow.topics import CVD, EVENTS, JOURNAL, REJECTS, ROWS, TICKS
from run_helpers import MAJORS

from tests.bench.data import Dataset, build
from tests.chaos.market import SHIFT_NS, Line, played, widen

pytestmark = pytest.mark.capture

TILE_SEC = 20.0
TILES = 3
TIMES = ("E", "T")
TRADE_IDS = ("a", "f", "l")
UPDATE_IDS = ("u", "U", "pu", "lastUpdateId")


@pytest.fixture
def majors(captures: Path) -> Path:
    return captures / MAJORS


def text(lines: list[Line]) -> bytes:
    return b"".join(b"%d %s %s\n" % (rx_ns, conn.encode(), frame) for rx_ns, conn, frame in lines)


def beginning(path: Path, seconds: float) -> list[Line]:
    first, *rest = frames(path)
    return [first, *(line for line in rest if line[0] < first[0] + seconds * 1e9)]


def parsed(line: Line) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(line[2])
    return content.get("data", content)


def test_one_tile_of_one_copy_is_the_recording(majors: Path, tmp_path: Path) -> None:
    target = tmp_path / "whole.gz"
    assert widen(majors, target, 1, 480.0, 480.0) == 118_001
    with gzip.open(majors) as one, gzip.open(target) as other:
        assert one.read() == other.read()
    again = tmp_path / "again.gz"
    widen(majors, again, 1, 480.0, 480.0)
    assert again.read_bytes() == target.read_bytes()


def test_one_tile_of_three_copies_is_the_recording_under_three_names(majors: Path, tmp_path: Path) -> None:
    widen(majors, tmp_path / "wide.gz", 3, 15.0, TILE_SEC)
    expected = []
    for number, names in enumerate(("BTCUSDT ETHUSDT", "BTC1USDT ETH1USDT", "BTC2USDT ETH2USDT")):
        for rx_ns, conn, frame in beginning(majors, 15.0):
            for old, new in zip(("BTCUSDT", "ETHUSDT"), names.split(), strict=True):
                frame = frame.replace(b'"%s"' % old.encode(), b'"%s"' % new.encode())
                frame = frame.replace(b'"%s@' % old.lower().encode(), b'"%s@' % new.lower().encode())
            expected.append((rx_ns + number * SHIFT_NS, conn, frame))
    expected.sort(key=lambda line: line[0])
    assert text(list(frames(tmp_path / "wide.gz"))) == text(expected)


def moves(old: list[Line], new: list[Line]) -> dict[str, set[int]]:
    """By how much the numbers of each family differ; everything else must be the same."""
    found: dict[str, set[int]] = defaultdict(set)
    for before, after in zip(old, new, strict=True):
        one, other = parsed(before), parsed(after)
        assert before[1] == after[1]
        assert list(one) == list(other)
        found["rx"].add(after[0] - before[0])
        trade = one.get("e") == "aggTrade"
        for key in one:
            if type(one[key]) is int and key in TIMES + UPDATE_IDS + TRADE_IDS * trade:
                family = "T" if key in TIMES else "u" if key in UPDATE_IDS else "a" if key == "a" else "f"
                found[f"{family} {one['s']}" if family in "af" else family].add(other[key] - one[key])
            else:
                assert one[key] == other[key], (key, before)
    return found


@pytest.mark.parametrize("seconds", [480.0, 7.3])
def test_a_tile_differs_from_the_recording_in_times_and_ids_alone(majors: Path, seconds: float) -> None:
    recorded = beginning(majors, seconds)
    count = len(recorded)
    lines = list(islice(played(majors, 1e6, seconds), 2 * count + 1))
    assert lines[:count] == recorded
    found = moves(recorded, lines[count : 2 * count])
    assert sorted(found) == ["T", "a BTCUSDT", "a ETHUSDT", "f BTCUSDT", "f ETHUSDT", "rx", "u"]
    assert all(len(each) == 1 and min(each) > 0 for each in found.values())
    (ms,) = found["T"]
    assert found["rx"] == {ms * 1_000_000}
    assert ms == pytest.approx(seconds * 1000, abs=250)
    # The third is as far from the second as that is from the first.
    twice = moves(recorded[:1], lines[2 * count :])
    assert twice == {name: {2 * step for step in found[name]} for name in twice}


def continues(numbers: dict[str, list[Line]], low: Callable[[Any], int], high: Callable[[Any], int]) -> None:
    """Each trade begins right behind the one before it, in the recording as well as across a seam."""
    for lines in numbers.values():
        for before, after in pairwise(map(parsed, lines)):
            assert low(after) == high(before) + 1


def test_ids_and_clocks_go_on_across_a_seam(majors: Path) -> None:
    lines = list(played(majors, TILES * TILE_SEC, TILE_SEC))
    assert all(before[0] <= after[0] for before, after in pairwise(lines))
    trades: dict[str, list[Line]] = defaultdict(list)
    newest: dict[tuple[str, str], tuple[int, int]] = {}
    seams = Counter[str]()
    for line in lines:
        data = parsed(line)
        if line[1] == "rest":
            continue
        if data["e"] == "aggTrade":
            trades[data["s"]].append(line)
            continue
        place, stream = (data["T"], data["u"]), (data["s"], data["e"])
        assert place[0] >= newest.get(stream, place)[0]
        assert place[1] > newest.get(stream, (0, 0))[1]
        if data["e"] == "depthUpdate" and stream in newest:
            seams[data["s"]] += data["pu"] != newest[stream][1]
        newest[stream] = place
    assert seams == dict.fromkeys(("BTCUSDT", "ETHUSDT"), TILES - 1)
    continues(trades, lambda trade: trade["a"], lambda trade: trade["a"])
    continues(trades, lambda trade: trade["f"], lambda trade: trade["l"])


def test_a_frame_whose_ids_are_not_known_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "kline.txt"
    path.write_bytes(b'1 market {"stream":"btcusdt@kline_1m","data":{"e":"kline","E":1,"s":"BTCUSDT"}}\n')
    with pytest.raises(ValueError, match="kline"):
        list(played(path, 10.0, 1.0))


# -- through the pipeline ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiled(captures: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Dataset]:
    """Three short tiles of two copies, and all that the stages make of them."""
    path = tmp_path_factory.mktemp("tiles") / "tiled.gz"
    widen(captures / MAJORS, path, 2, TILES * TILE_SEC, TILE_SEC)
    return path, build("tiles", path, 1 << 40)


def records(data: Dataset, topic: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """(partition, record)."""
    decode = data.codecs.decoder(topic)
    for partition, entries in sorted(data.topics[topic].items()):
        for _, value in entries:
            yield partition, decode(value)


def test_no_frame_is_refused_and_every_one_is_used(tiled: tuple[Path, Dataset]) -> None:
    path, data = tiled
    assert list(records(data, REJECTS)) == []
    rows = Counter((row["symbol"].lower(), row["src"]) for _, row in records(data, ROWS))
    for stream, count in scan(path).streams.items():
        symbol, kind, *_ = stream.split("@")
        if kind != "depth":
            assert rows[symbol, kind] == count
        else:  # but for those before the snapshot of their tile
            assert count - 6 * TILES < rows[symbol, kind] < count


def test_a_session_begins_once_and_its_clock_rises(tiled: tuple[Path, Dataset]) -> None:
    _, data = tiled
    begun = Counter(partition for partition, record in records(data, JOURNAL) if record["kind"] == "config")
    assert set(begun.values()) == {1}
    clocks: dict[int, list[int]] = defaultdict(list)
    for partition, tick in records(data, TICKS):
        clocks[partition].append(tick["clock_ts_ns"])
    assert all(before <= after for ticks in clocks.values() for before, after in pairwise(ticks))
    assert max(map(len, clocks.values())) >= TILES * TILE_SEC * 10


def test_books_break_at_each_seam_and_are_synced_again(tiled: tuple[Path, Dataset]) -> None:
    path, data = tiled
    symbols = scan(path).symbols
    assert len(symbols) == 4
    events = [event for _, event in records(data, EVENTS)]
    gaps = [event for event in events if event["event_type"] == "gap"]
    assert {json.loads(gap["meta_json"])["reason"] for gap in gaps} == {"pu_mismatch"}
    assert Counter(gap["symbol"] for gap in gaps) == dict.fromkeys(symbols, TILES - 1)
    synced = [event for event in events if event["event_type"] == "book_synced"]
    assert Counter(event["symbol"] for event in synced) == dict.fromkeys(symbols, TILES)
    began = {event["symbol"]: event["recv_ts_ms"] for event in gaps}
    for event in synced[-len(symbols) :]:
        assert event["recv_ts_ms"] - began[event["symbol"]] < 500
    newest = {row["symbol"]: row for _, row in records(data, ROWS)}
    assert {row["book_state"] for row in newest.values()} == {"synced"}
    assert not [event for event in events if event["event_type"] in ("trades_lost", "duplicates", "stream_silent")]


def test_cvd_goes_on_as_if_the_trades_were_one_series(tiled: tuple[Path, Dataset]) -> None:
    _, data = tiled
    trades: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for _, trade in records(data, CVD):
        trades[trade["symbol"]].append(trade)
    assert sorted(trades) == ["BTC1USDT", "BTCUSDT", "ETH1USDT", "ETHUSDT"]
    for series in trades.values():
        assert [trade["agg_trade_id"] for trade in series] == list(range(3_000_000_001, 3_000_000_001 + len(series)))
        each, rest = divmod(len(series), TILES)
        assert rest == 0
        ends = [series[(tile + 1) * each - 1]["cvd"] for tile in range(TILES)]
        assert ends == pytest.approx([(tile + 1) * ends[0] for tile in range(TILES)], abs=1e-6)
        assert series[-1]["late_count"] == series[-1]["no_delta_count"] == 0
