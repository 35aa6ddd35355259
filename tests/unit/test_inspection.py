"""`orderflow capture info`: what is found in sound files, in faulty ones, and how it is shown."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from orderflow.capture import CaptureWriter
from orderflow.cli.inspection import Brackets, Delays, IdHoles, inspect
from orderflow.cli.main import main
from orderflow.errors import CaptureError

T0_NS = 1_700_000_000_000_000_000
MS = 1_000_000

Line = tuple[int, str, bytes]


def frame(kind: str, symbol: str, **data: Any) -> bytes:
    stream = f"{symbol.lower()}@{'depth@100ms' if kind == 'depth' else kind}"
    return json.dumps({"stream": stream, "data": {"s": symbol, **data}}, separators=(",", ":")).encode()


def trade(number: int, symbol: str = "BTCUSDT", at_ms: int = 0) -> Line:
    ts_ms = T0_NS // MS + at_ms
    body = frame("aggTrade", symbol, E=ts_ms, a=number, p="1.5", q="2", T=ts_ms, m=True)
    return T0_NS + (at_ms + 7) * MS, "market", body


def quote(u: int, bid: float, ask: float, symbol: str = "BTCUSDT") -> Line:
    ts_ms = T0_NS // MS
    body = frame("bookTicker", symbol, E=ts_ms, u=u, b=str(bid), B="1", a=str(ask), A="1", T=ts_ms)
    return T0_NS + 5 * MS, "public", body


def diff(pu: int, u: int, bids: Sequence[Sequence[str]] = (), symbol: str = "BTCUSDT") -> Line:
    ts_ms = T0_NS // MS
    body = frame("depth", symbol, E=ts_ms, T=ts_ms, U=pu + 1, u=u, pu=pu, b=list(bids), a=[])
    return T0_NS + 6 * MS, "public", body


def snapshot(number: int, symbol: str = "BTCUSDT") -> Line:
    body = {"symbol": symbol, "lastUpdateId": number, "bids": [["10", "1"]], "asks": [["11", "1"]]}
    return T0_NS + 6 * MS, "rest", json.dumps(body, separators=(",", ":")).encode()


def written(path: Path, lines: Sequence[Line]) -> Path:
    with CaptureWriter(path) as writer:
        for line in lines:
            writer.write(*line)
    return path


SOUND = [quote(1, 10, 11), diff(0, 2), snapshot(1), diff(2, 4), quote(5, 10, 11), diff(4, 6), trade(1), trade(2)]


def test_a_sound_capture_has_no_fault(tmp_path: Path) -> None:
    report = inspect(written(tmp_path / "a.gz", SOUND))
    assert report.faults == []
    (symbol,) = report.symbols
    assert (symbol.quotes, symbol.trades, symbol.diffs, symbol.snapshots, symbol.bracketed) == (2, 2, 3, 1, 1)
    assert (symbol.oracle_checked, symbol.oracle_equal, symbol.book_state) == (2, 2, "synced")
    assert report.latency_ms == {"bookTicker": [5, 5], "depth": [6, 6], "aggTrade": [7, 7], "all": [6, 7]}
    assert (report.rx_back, report.rx_back_most_ms, report.peak_per_sec) == (1, 1.0, 8)


def test_missing_and_repeated_trades_are_found_by_their_ids(tmp_path: Path) -> None:
    report = inspect(written(tmp_path / "a.gz", [trade(number) for number in (5, 6, 9, 9, 12, 7, 5)]))
    (symbol,) = report.symbols
    assert (symbol.trades_missing, symbol.trade_duplicates) == (3, 2)
    assert symbol.trade_holes == [(8, 8), (10, 11)]
    assert report.faults == ["BTCUSDT: 3 trade ids are missing, first 8 to 8"]


def test_a_broken_chain_asks_for_another_snapshot(tmp_path: Path) -> None:
    lines = [*SOUND, quote(7, 9, 11), diff(8, 9), quote(10, 10, 11)]
    report = inspect(written(tmp_path / "a.gz", lines))
    (symbol,) = report.symbols
    assert (symbol.chain_breaks, symbol.book_state) == (1, "resyncing")
    assert report.faults == [
        "BTCUSDT: the chain of diffs breaks 1 times",
        "BTCUSDT: the book ends resyncing: of 1 snapshots 1 are bracketed by a diff, none since the last break",
    ]
    mended = inspect(written(tmp_path / "b.gz", [*lines, snapshot(9), diff(9, 12), quote(13, 10, 11)]))
    assert mended.symbols[0].book_state == "synced"
    assert mended.symbols[0].oracle_equal == mended.symbols[0].oracle_checked == 3


def test_a_wrong_book_does_not_pass_the_oracle(tmp_path: Path) -> None:
    lines = [quote(1, 10, 11), diff(0, 2), snapshot(1), diff(2, 4, [["10.5", "1"]]), quote(5, 10, 11)]
    report = inspect(written(tmp_path / "a.gz", lines))
    assert (report.symbols[0].oracle_checked, report.symbols[0].oracle_equal) == (1, 0)
    assert report.symbols[0].first_mismatch == {
        "u": 4,
        "book": (10.5, 1.0, 11.0, 1.0),
        "quote_u": 1,
        "quote": (10.0, 1.0, 11.0, 1.0),
    }
    assert "1 times the book's best level is not the quote's" in report.faults[0]


@pytest.mark.parametrize(
    ("lines", "bracketed", "unbracketed"),
    [
        ([diff(0, 5), snapshot(3)], 1, {}),
        ([snapshot(3), diff(0, 5)], 1, {}),
        ([diff(5, 8), snapshot(5)], 1, {}),
        ([diff(5, 8), snapshot(4)], 0, {"too_old": 1}),
        ([diff(5, 8), snapshot(9)], 0, {"no_diff": 1}),
        ([diff(0, 5), diff(8, 9), snapshot(6)], 0, {"in_a_gap": 1}),
        ([diff(0, 5), snapshot(6), diff(8, 9)], 0, {"in_a_gap": 1}),
        ([diff(0, 5), snapshot(7), snapshot(12), diff(5, 9)], 1, {"no_diff": 1}),
    ],
)
def test_brackets(tmp_path: Path, lines: list[Line], bracketed: int, unbracketed: dict[str, int]) -> None:
    (symbol,) = inspect(written(tmp_path / "a.gz", lines)).symbols
    assert (symbol.bracketed, symbol.unbracketed) == (bracketed, unbracketed)


def test_frames_that_cannot_be_decoded_are_counted_and_the_first_is_named(tmp_path: Path) -> None:
    bad = (T0_NS, "public", b'{"stream":"btcusdt@bookTicker","data":{"u":"x"}}')
    report = inspect(written(tmp_path / "a.gz", [trade(1), bad, bad]))
    assert report.undecodable == {"bookTicker": 2}
    assert "2 frames can't be decoded, first line 2: " in report.faults[0]


def test_what_came_before_the_end_of_a_broken_file_is_reported(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"".join(b"%d %s %s\n" % (at, conn.encode(), body) for at, conn, body in SOUND) + b"nonsense\n")
    assert inspect(path).frames == 8
    assert main(["capture", "info", str(path)]) == 2
    stdout, stderr = capsys.readouterr()
    assert "8 frames" in stdout
    assert stderr.startswith(f"orderflow: {path}: line 9 is not of the capture format: 'nonsense'")
    assert len(stderr.splitlines()) == 1


@pytest.mark.parametrize(("content", "said"), [(b"", "holds no frame"), (b"nonsense\n", "line 1 is not of")])
def test_a_file_without_a_frame_is_refused(tmp_path: Path, content: bytes, said: str) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(content)
    with pytest.raises(CaptureError, match=said):
        inspect(path)


@pytest.mark.parametrize("symbols", [1, 60])
def test_the_screen_is_one_and_its_lines_are_not_wrapped(
    tmp_path: Path, symbols: int, capsys: pytest.CaptureFixture[str]
) -> None:
    lines: list[Line] = [(T0_NS, "market", b'{"stream":"!markPrice@arr","data":[]}')]
    for number in range(symbols):
        name = f"1000000VERYLONG{number}USDT"
        lines += [
            trade(10**12, name, 10**8),
            trade(2 * 10**12, name),
            quote(10**15, 10**6, 10**6 + 1, name),
            snapshot(5, name),
        ]
    assert main(["capture", "info", str(written(tmp_path / "a.gz", lines))]) == 0
    screen = capsys.readouterr().out.splitlines()
    path_and_faults = [line for line in screen if line.endswith("a.gz") or line.startswith("  ")]
    assert max(len(line) for line in screen if line not in path_and_faults) <= 100
    assert len(screen) < 45


def test_json_holds_everything(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = written(tmp_path / "a.gz", SOUND)
    assert main(["capture", "info", str(path), "--json"]) == 0
    content = json.loads(capsys.readouterr().out)
    assert content["faults"] == []
    assert content["symbols"][0]["oracle_equal"] == 2
    assert content["file_bytes"] == path.stat().st_size


@given(st.lists(st.integers(0, 60), max_size=120))
def test_ids_are_accounted_for_exactly(numbers: list[int]) -> None:
    """Whatever their order: an id from the first one on is there, missing, or there more than once."""
    ids = IdHoles()
    for number in numbers:
        ids.add(number)
    if not numbers:
        assert (ids.missing, ids.duplicates, ids.holes) == (0, 0, [])
        return
    first = numbers[0]
    seen = {number for number in numbers if number >= first}
    assert ids.missing == max(numbers) - first + 1 - len(seen)
    assert {number for low, high in ids.holes for number in range(low, high + 1)} == (
        set(range(first, max(numbers) + 1)) - seen
    )
    assert ids.duplicates == len(numbers) - len(seen)


@given(st.lists(st.integers(-50, 50), min_size=1, max_size=60), st.floats(0.01, 1.0))
def test_quantiles_are_of_the_nearest_rank(values: list[int], rank: float) -> None:
    delays = Delays()
    for value in values:
        delays.add(value)
    found = delays.quantiles(rank)
    assert found is not None
    assert sum(value <= found[0] for value in values) >= rank * len(values) - 1e-6
    assert sum(value < found[0] for value in values) < rank * len(values)


@given(st.integers(1, 5), st.lists(st.integers(0, 40), max_size=8), st.lists(st.integers(1, 5), max_size=12), st.data())
def test_a_gapless_chain_brackets_whatever_it_covers_in_any_order(
    first: int, numbers: list[int], steps: list[int], data: st.DataObject
) -> None:
    brackets = Brackets()
    links, last = [], first
    for step in steps:
        links.append((last, last + step))
        last += step
    events: list[Any] = data.draw(st.permutations([*numbers, *([None] * len(links))]))
    chain = iter(links)
    for event in events:
        if event is None:
            brackets.diff(*next(chain))
        else:
            brackets.snapshot(event)
    covered = sum(bool(links) and first <= number <= last for number in numbers)
    assert brackets.bracketed == covered
    assert brackets.bracketed + brackets.refused.total() + brackets.waiting == len(numbers)


@pytest.mark.capture
def test_the_published_figures_of_the_recorded_markets(captures: Path) -> None:
    majors = inspect(captures / "usdm_btc_eth_20240718.gz")
    assert majors.faults == []
    assert (majors.frames, majors.peak_per_sec, round(majors.span_sec)) == (118_001, 1_505, 480)
    assert [
        (each.symbol, each.oracle_equal, each.oracle_checked, each.trades, each.quotes, each.bracketed, each.snapshots)
        for each in majors.symbols
    ] == [("BTCUSDT", 4_773, 4_773, 4_393, 52_260, 1, 1), ("ETHUSDT", 4_770, 4_770, 4_469, 47_328, 1, 1)]
    alts = inspect(captures / "usdm_4alts_20210722_realagg.gz")
    assert alts.faults == []
    assert {each.symbol: (each.oracle_equal, each.oracle_checked) for each in alts.symbols} == {
        "SUSHIUSDT": (252, 252),
        "AKROUSDT": (182, 182),
        "KEEPUSDT": (130, 130),
        "CTKUSDT": (180, 180),
    }
