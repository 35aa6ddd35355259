"""Malformed frames by the hundred thousand: nothing raises, every frame is accounted for, nothing grows.

30,000 by default; ORDERFLOW_FUZZ_FRAMES=1000000 for more, which also prints what became of them. The seed is fixed.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable
from io import BytesIO
from itertools import islice, pairwise
from random import Random
from typing import Any, Final

import fastavro
import pytest
import venue_journal as vj
from orderflow.microstructure.book import LocalBook
from orderflow.paths import SCHEMAS
from orderflow.processor import Emit
from orderflow.streaming.service import resident_mb
from orderflow.venues.binance.frames import route_of
from orderflow.venues.binance.normaliser import REJECT_REASONS, NormaliserConfig, NormaliserProcessor

FRAMES: Final = int(os.environ.get("ORDERFLOW_FUZZ_FRAMES", "30000"))
SEED: Final = 20_261_121
SYMBOLS: Final = ("XRPUSDT", "BTCUSDT_261225", "币安人生USDT")
CONFIG: Final = NormaliserConfig(
    max_symbols=40, max_levels=200, max_buffered_diffs=50, dedup_lru=64, mark_price=True, force_order=True
)
SOUND_SHARES: Final = (0.1, 0.95)
"""By turns: a storm, and a spell in which books come together again."""
SPELL: Final = 3000
LARGE: Final = 1 << 20
GROWTH_MB: Final = 12.0
SCHEMA_OF: Final = {
    topic: fastavro.parse_schema(json.loads((SCHEMAS / f"{name}.avsc").read_text()))
    for topic, name in (
        ("market.rows", "row"),
        ("market.ticks", "tick"),
        ("market.events", "market_event"),
        ("quality.rejects", "reject"),
    )
}

VALUES: Final[tuple[Any, ...]] = (
    *(None, True, False, -1, 0, 1, 2**31, 2**53 + 1, 2**63 - 1, 2**63, -(2**63), 2**64, 10**30, 1e308, -0.0, 0.1),
    *(
        "",
        "0",
        "-0",
        "nan",
        "NaN",
        "-inf",
        "Infinity",
        "1e999",
        "1e-999",
        "0x10",
        "1_000",
        " 1",
        "1 ",
        "１",
        "\x00",
        "x" * 500,
    ),
    *([], {}, [[]], [None], {"s": {}}, [["1"]], [["1", "1", "1"]], [["1", "-1"]], [["nan", "1"]], ["1", "1"]),
)
RAW_VALUES: Final = (
    b"NaN",
    b"Infinity",
    b"-Infinity",
    b"1e400",
    b"-1e400",
    b"01",
    b"+1",
    b"1.",
    b".5",
    b"9" * 400,
    b"0." + b"0" * 400 + b"1",
    b'"\\ud800"',
    b'"\\ud83d\\ude00"',
    b'"\xff\xfe"',
    b'"\xed\xa0\x80"',
    b"[" * 3000,
    b"[" * 3000 + b"]" * 3000,
    b'{"a":' * 2000 + b"1" + b"}" * 2000,
    b"nul",
    b"truefalse",
    b"",
)


class Market:
    """Sound frames of a few symbols, with books that quotes agree with, on a clock of their own."""

    def __init__(self, chance: Random) -> None:
        self._chance = chance
        self.now_ms = 1_700_000_000_000
        self._last_id = dict.fromkeys(SYMBOLS, 1000)
        self._next_trade = dict.fromkeys(SYMBOLS, 1)
        self._bids = {symbol: {99.9 - 0.1 * step: 1.0 for step in range(40)} for symbol in SYMBOLS}
        self._asks = {symbol: {100.1 + 0.1 * step: 1.0 for step in range(40)} for symbol in SYMBOLS}
        self._kinds: tuple[Callable[[str], tuple[str, dict[str, Any]]], ...] = (
            *(self._trade, self._trade, self._quote, self._quote, self._diff, self._diff),
            *(self._mark, self._liquidation, self._kline),
        )

    def frame(self) -> tuple[str, bytes]:
        """(symbol, frame)."""
        symbol = self._chance.choice(SYMBOLS)
        stream, data = self._chance.choice(self._kinds)(symbol)
        return symbol, _frame(f"{symbol.lower()}@{stream}", data)

    def snapshot(self, symbol: str) -> bytes:
        levels = [
            [[f"{price:.1f}", str(qty)] for price, qty in side[symbol].items() if qty]
            for side in (self._bids, self._asks)
        ]
        return json.dumps({"lastUpdateId": self._last_id[symbol], "bids": levels[0], "asks": levels[1]}).encode()

    def trades(self, first_id: int, last_id: int) -> bytes:
        ids = range(first_id, min(last_id + 1, first_id + 50))
        return json.dumps([{"a": each, "p": "100", "q": "1", "T": self.now_ms, "m": True} for each in ids]).encode()

    def _trade(self, symbol: str) -> tuple[str, dict[str, Any]]:
        number = self._next_trade[symbol]
        self._next_trade[symbol] += 1
        data = {"a": number, "p": "100.0", "q": "0.5", "f": number, "l": number, "T": self.now_ms, "m": number % 3 == 0}
        return "aggTrade", {"e": "aggTrade", "E": self.now_ms + 1, "s": symbol, **data}

    def _quote(self, symbol: str) -> tuple[str, dict[str, Any]]:
        bid = max(price for price, qty in self._bids[symbol].items() if qty)
        ask = min(price for price, qty in self._asks[symbol].items() if qty)
        self._last_id[symbol] += 1
        return "bookTicker", {
            "e": "bookTicker",
            "u": self._last_id[symbol],
            "s": symbol,
            "b": f"{bid:.1f}",
            "B": str(self._bids[symbol][bid]),
            "a": f"{ask:.1f}",
            "A": str(self._asks[symbol][ask]),
            "T": self.now_ms,
            "E": self.now_ms + 1,
        }

    _chain: dict[str, int]

    def _diff(self, symbol: str) -> tuple[str, dict[str, Any]]:
        if not hasattr(self, "_chain"):
            self._chain = dict.fromkeys(SYMBOLS, 999)
        changed: list[list[list[str]]] = []
        for side in (self._bids[symbol], self._asks[symbol]):
            prices = self._chance.sample(sorted(side), 3)
            for price in prices:
                side[price] = float(self._chance.choice((0, 1, 2, 5)))
            best = sorted(side)[20]
            side[best] = side[best] or 1.0
            changed.append([[f"{price:.1f}", str(side[price])] for price in {*prices, best}])
        first, previous = self._last_id[symbol] + 1, self._chain[symbol]
        self._last_id[symbol] = self._chain[symbol] = first + 5
        ids = {"U": previous + 1, "u": first + 5, "pu": previous}
        times = {"E": self.now_ms + 1, "T": self.now_ms}
        return "depth@100ms", {"e": "depthUpdate", **times, "s": symbol, **ids, "b": changed[0], "a": changed[1]}

    def _mark(self, symbol: str) -> tuple[str, dict[str, Any]]:
        data = {"s": symbol, "p": "100", "i": "100", "P": "100", "r": "0.0001", "T": self.now_ms + 3_600_000}
        return "markPrice@1s", {"e": "markPriceUpdate", "E": self.now_ms, **data}

    def _liquidation(self, symbol: str) -> tuple[str, dict[str, Any]]:
        order = {"s": symbol, "S": "SELL", "o": "LIMIT", "f": "IOC", "q": "1", "p": "99", "ap": "99", "X": "FILLED"}
        return "forceOrder", {"e": "forceOrder", "E": self.now_ms, "o": {**order, "z": "1", "T": self.now_ms}}

    def _kline(self, symbol: str) -> tuple[str, dict[str, Any]]:
        return "kline_1m", {"e": "kline", "E": self.now_ms, "s": symbol, "k": {"t": 1}}


def _frame(stream: str, data: dict[str, Any]) -> bytes:
    return json.dumps({"stream": stream, "data": data}, separators=(",", ":"), ensure_ascii=False).encode()


class Damage:
    """Ways to spoil a frame; each gives bytes from bytes."""

    def __init__(self, chance: Random, others: list[bytes]) -> None:
        self._chance = chance
        self._others = others
        self.ways: tuple[tuple[str, Callable[[bytes], bytes]], ...] = (
            ("flip", self.flip),
            ("bits", self.bits),
            ("cut", lambda frame: frame[: chance.randrange(len(frame))]),
            ("cut_front", lambda frame: frame[chance.randrange(len(frame)) :]),
            ("splice", self.splice),
            ("double", self.double),
            ("remove", self.remove),
            ("digits", self.digits),
            ("value", self.value),
            ("value", self.value),
            ("raw_value", self.raw_value),
            ("missing", self.missing),
            ("extra", self.extra),
            ("twice", self.twice),
            ("other_stream", self.other_stream),
            ("other_symbol", self.other_symbol),
            ("ids", self.ids),
            ("ids", self.ids),
            ("time", self.time),
            ("levels", self.levels),
            ("utf8", self.utf8),
            ("odd", self.odd),
        )

    def spoil(self, frame: bytes) -> tuple[str, bytes]:
        """(how, damaged frame)."""
        if self._chance.random() < 2e-4:
            return "large", self.large(frame)
        name, way = self._chance.choice(self.ways)
        return name, way(frame)

    def flip(self, frame: bytes) -> bytes:
        data = bytearray(frame)
        for _ in range(self._chance.randint(1, 4)):
            data[self._chance.randrange(len(data))] = self._chance.randrange(256)
        return bytes(data)

    def bits(self, frame: bytes) -> bytes:
        data = bytearray(frame)
        data[self._chance.randrange(len(data))] ^= 1 << self._chance.randrange(8)
        return bytes(data)

    def splice(self, frame: bytes) -> bytes:
        other = self._chance.choice(self._others)
        return frame[: self._chance.randrange(len(frame))] + other[self._chance.randrange(len(other)) :]

    def double(self, frame: bytes) -> bytes:
        start = self._chance.randrange(len(frame))
        return frame[:start] + frame[start : start + self._chance.randint(1, 30)] * 2 + frame[start:]

    def remove(self, frame: bytes) -> bytes:
        start = self._chance.randrange(len(frame))
        return frame[:start] + frame[start + self._chance.randint(1, 20) :]

    def digits(self, frame: bytes) -> bytes:
        data = bytearray(frame)
        places = [place for place, byte in enumerate(data) if 48 <= byte <= 57]
        for place in self._chance.sample(places, min(len(places), self._chance.randint(1, 4))):
            data[place] = self._chance.randrange(48, 58)
        return bytes(data)

    def _changed(self, frame: bytes, change: Callable[[dict[str, Any], str], None]) -> bytes:
        content = json.loads(frame)
        data = content["data"]
        fields = data["o"] if isinstance(data.get("o"), dict) and self._chance.random() < 0.7 else data
        change(fields, self._chance.choice(sorted(fields)))
        return _frame(content["stream"], data)

    def value(self, frame: bytes) -> bytes:
        return self._changed(frame, lambda fields, name: fields.update({name: self._chance.choice(VALUES)}))

    def raw_value(self, frame: bytes) -> bytes:
        marked = self._changed(frame, lambda fields, name: fields.update({name: "MARK"}))
        return marked.replace(b'"MARK"', self._chance.choice(RAW_VALUES))

    def missing(self, frame: bytes) -> bytes:
        return self._changed(frame, lambda fields, name: fields.pop(name) and None)

    def extra(self, frame: bytes) -> bytes:
        return self._changed(frame, lambda fields, _: fields.update({"zz": self._chance.choice(VALUES), "X": "NEW"}))

    def twice(self, frame: bytes) -> bytes:
        """A key that is there twice, with another value."""
        content = json.loads(frame)
        name = self._chance.choice(sorted(content["data"]))
        again = json.dumps({name: self._chance.choice(VALUES)})[1:-1].encode()
        return frame[:-2] + b"," + again + frame[-2:]

    def other_stream(self, frame: bytes) -> bytes:
        content = json.loads(frame)
        other = json.loads(self._chance.choice(self._others))["stream"]
        names = (
            other,
            "!bookTicker",
            "x@nonsense",
            "@depth@100ms",
            "a@b@c@d",
            "",
            "btcusdt@depth@500ms",
            "btcusdt",
            "@",
            "é" * 200,
        )
        return _frame(self._chance.choice(names), content["data"])

    def other_symbol(self, frame: bytes) -> bytes:
        content = json.loads(frame)
        name = self._chance.choice(("NEW", "ETHUSDT", "币", "A" * 100, f"S{self._chance.randrange(100)}", "\ud800"))
        both = self._chance.random() < 0.7
        stream = f"{name.lower()}@{content['stream'].partition('@')[2]}" if both else content["stream"]
        data = {**content["data"], "s": name}
        return json.dumps({"stream": stream, "data": data}, separators=(",", ":")).encode()

    def ids(self, frame: bytes) -> bytes:
        jump = self._chance.choice((-1000, -10, -2, -1, 1, 2, 3, 10, 100, 10**6, 10**15, 2**62))

        def change(fields: dict[str, Any], _: str) -> None:
            for name in self._chance.sample(("a", "u", "U", "pu"), 2):
                if isinstance(fields.get(name), int):
                    fields[name] += jump

        return self._changed(frame, change)

    def time(self, frame: bytes) -> bytes:
        jump = self._chance.choice((-(10**9), -86_400_000, -5000, -1001, 1001, 60_000, 10**9, 10**12, 10**15))

        def change(fields: dict[str, Any], _: str) -> None:
            if isinstance(fields.get("T"), int):
                fields["T"] += jump

        return self._changed(frame, change)

    def levels(self, frame: bytes) -> bytes:
        rungs = [[str(self._chance.choice((99.9, 100.0, 100.1, 150, "1e300", "1e-300"))), "3"] for _ in range(3)]
        many = [[str(50 + step / 100), "1"] for step in range(500)]
        return self._changed(
            frame, lambda fields, _: fields.update({self._chance.choice("ab"): self._chance.choice((rungs, many))})
        )

    def utf8(self, frame: bytes) -> bytes:
        start = self._chance.randrange(len(frame))
        return (
            frame[:start]
            + self._chance.choice((b"\xff", b"\xc3", b"\xed\xa0\x80", b"\xf8\x88\x80\x80\x80", b"\x00"))
            + frame[start:]
        )

    def odd(self, frame: bytes) -> bytes:
        return self._chance.choice(
            (
                b"",
                b" ",
                b"\x00",
                b"\xef\xbb\xbf" + frame,
                b" \n" + frame + b"\n ",
                frame + frame,
                b"[" + frame + b"]",
                b"null",
                b"[]",
                b"{}",
                b'{"result":null,"id":7}',
                b'{"error":{"code":2,"msg":"x"}}',
                b"[" * 100_000,
                b'{"stream":"btcusdt@aggTrade"}',
                b'{"stream":null,"data":null}',
                frame.replace(b'"stream"', b'"Stream"'),
                json.dumps(json.loads(frame), ensure_ascii=True, indent=1).encode(),
            )
        )

    def large(self, frame: bytes) -> bytes:
        return self._chance.choice(
            (
                frame[:-1] + b" " * LARGE + b"}",
                self._chance.randbytes(LARGE),
                self._changed(frame, lambda fields, name: fields.update({name: "9" * LARGE})),
                self._changed(frame, lambda fields, _: fields.update({"b": [["1", "1"]] * (LARGE // 10)})),
            )
        )


class Run:
    """A normaliser under damaged frames, with an account of every one."""

    def __init__(self, frames: list[bytes]) -> None:
        self.chance = Random(SEED)
        self.market = Market(self.chance)
        self.damage = Damage(self.chance, frames)
        self.recorded = frames
        self.processor = NormaliserProcessor(CONFIG)
        self.account: Counter[str] = Counter()
        self.ways: Counter[str] = Counter()
        self.reasons: Counter[str] = Counter()
        self.steps = self.frames = self.damaged = 0

    def step(self, kind: str, payload: bytes, symbol: str | None = None, route: str = "public") -> list[Emit]:
        self.steps += 1
        record = vj.journal_record(
            self.steps, kind, payload, recv_ts_ns=(self.market.now_ms + 5) * 1_000_000, route=route, symbol=symbol
        )
        emits = self.processor.step("market.journal", record)
        for topic, _, value in emits:
            if topic == "quality.rejects":
                self.reasons[value["reason"]] += 1
            if self.steps % 50 == 0:
                fastavro.schemaless_writer(BytesIO(), SCHEMA_OF[topic], {**value, "seq": 1, "sub": 0}, strict=True)
        return emits

    def frame(self) -> None:
        """A frame, damaged or sound; what it causes must come to one outcome."""
        if self.recorded and self.chance.random() < 0.4:
            frame = self.chance.choice(self.recorded)
        else:
            _, frame = self.market.frame()
        way = "sound"
        if self.chance.random() >= SOUND_SHARES[self.frames // SPELL % 2]:
            way, frame = self.damage.spoil(frame)
        self.frames += 1
        self.damaged += way != "sound"
        self.ways[way] += 1
        counts = self.processor._common.totals
        before = sum(counts.values())
        emits = self.step("frame", frame, route_of(frame).symbol)
        rows = rejects = 0
        for topic, _, value in emits:
            if topic == "market.rows":
                # What was held until now has had its count when it came, and a fetched trade is no frame.
                rows += not (value["meta"] and ('"held"' in value["meta"] or '"backfill"' in value["meta"]))
            elif topic == "quality.rejects":
                rejects += value["payload"] is frame
        counted = sum(counts.values()) - before
        assert rows + rejects + counted == 1, (way, frame[:300], rows, rejects, counted)
        self.account["rows" if rows else "rejects" if rejects else "counted"] += 1
        self.answer(emits)

    def answer(self, emits: list[Emit]) -> None:
        """What the recorder would fetch; now and then damaged too."""
        for event in vj.events(emits):
            symbol = event["symbol"]
            if symbol not in SYMBOLS:
                continue
            if event["event_type"] == "snapshot_needed":
                self.step("snapshot", self._maybe(self.market.snapshot(symbol)), symbol, "rest")
            elif event["event_type"] == "backfill_needed":
                body = self.market.trades(event["meta"]["from_id"], event["meta"]["to_id"])
                self.step("backfill", self._maybe(body), symbol, "rest")

    def _maybe(self, body: bytes) -> bytes:
        return body if self.chance.random() < 0.8 else self.chance.choice((self.damage.flip, self.damage.digits))(body)

    def tick(self) -> None:
        self.market.now_ms += 200
        body = json.dumps({"routes": {"market": "up", "public": "up"}, "symbols": {each: {} for each in SYMBOLS}})
        self.answer(self.step("tick", self._maybe(body.encode()), route=""))

    def check(self) -> None:
        """Bounds and rules of everything that is kept."""
        processor = self.processor
        assert len(processor.symbols) <= CONFIG.max_symbols
        assert len(processor._by_name) <= 8 * CONFIG.max_symbols
        for name in processor.symbols:
            state = processor._symbols[name]
            check_book(state.book)
            assert len(state.values.trades.held) <= CONFIG.dedup_lru
            assert all(held > state.values.trades.next_id for held in state.values.trades.held)
        for each in processor.symbol_figures():
            assert each.oracle_failed <= each.oracle_checked

    def restart(self) -> None:
        state = self.processor.snapshot()
        self.processor = NormaliserProcessor(CONFIG)
        self.processor.restore(state)
        assert self.processor.snapshot() == state


def check_book(book: LocalBook) -> None:
    bid_px, bid_qtys, ask_px, ask_qtys = book.top(CONFIG.max_levels + 1)
    assert max(len(bid_px), len(ask_px)) <= CONFIG.max_levels
    assert all(above > below for above, below in pairwise(bid_px))
    assert all(below < above for below, above in pairwise(ask_px))
    assert all(0.0 < qty < 1e300 for qty in bid_qtys + ask_qtys)
    if book.state in ("synced", "stale"):
        assert not bid_px or not ask_px or bid_px[0] < ask_px[0]
        assert book.last_update_id >= 0
    else:
        assert not bid_px and not ask_px
    assert book.buffered <= CONFIG.max_buffered_diffs


def recorded_frames() -> list[bytes]:
    """Frames of both captures, where they are at hand."""
    frames: list[bytes] = []
    for name in (vj.BTC_ETH, vj.ALTS):
        if (vj.CAPTURES / name).is_file():
            frames += [frame for _, route, frame in islice(vj.capture_frames(name), 1500) if route != "rest"]
    return frames


@pytest.mark.timeout(3600)
def test_malformed_frames(capsys: pytest.CaptureFixture[str]) -> None:
    chance = Random(SEED)
    market = Market(chance)
    recorded = recorded_frames()
    run = Run(recorded)
    run.damage._others.extend(market.frame()[1] for _ in range(200))
    resident: list[float] = []
    while run.damaged < FRAMES:
        run.frame()
        if run.frames % 25 == 0:
            run.tick()
        if run.frames % 1000 == 0:
            run.check()
        if run.frames % 10_000 == 0:
            run.restart()
            resident.append(resident_mb())
    run.step("end", b"{}")
    run.check()
    assert sum(run.account.values()) == run.frames
    assert min(run.account["rows"], run.account["rejects"], run.account["counted"]) > FRAMES // 10
    assert set(run.reasons) <= set(REJECT_REASONS)
    assert set(REJECT_REASONS) - set(run.reasons) <= {"unknown_kind", "insurance_fund", "not_a_trade"}
    tallies = run.processor.tallies
    assert sum(tallies["rejects"].values()) == sum(run.reasons.values())
    assert tallies["events"]["book_synced"] > FRAMES // 2000, "books are begun anew all the time"
    assert sum(each.oracle_checked for each in run.processor.symbol_figures()) > FRAMES // 100
    half = len(resident) // 2
    assert max(resident[half:]) - max(resident[: half + 1]) < GROWTH_MB, resident
    if FRAMES > 100_000:
        with capsys.disabled():
            report(run, resident)


def report(run: Run, resident: list[float]) -> None:
    oracle = [(each.oracle_checked, each.oracle_failed, each.oracle_skipped) for each in run.processor.symbol_figures()]
    print(f"\n{run.damaged:,} damaged frames of {run.frames:,}: {dict(run.account)}")
    print(f"rejects {dict(run.reasons.most_common())}")
    print(f"counted {run.processor.totals}")
    print(f"tallies {run.processor.tallies}")
    print(f"oracle checked, failed, skipped {[sum(each) for each in zip(*oracle, strict=True)]}")
    print(f"RSS MB by tenths {[round(each) for each in resident[:: max(1, len(resident) // 10)]]}")
    print(f"RSS MB first {resident[0]}, half {resident[len(resident) // 2]}, last {resident[-1]}, most {max(resident)}")


def test_every_way_of_damage_is_seeded_and_bytes() -> None:
    """The same seed spoils alike, so that a failure can be repeated."""

    def spoilt() -> list[bytes]:
        chance = Random(3)
        market = Market(chance)
        frames = [market.frame()[1] for _ in range(50)]
        damage = Damage(chance, frames)
        return [way(frame) for frame in frames for _, way in damage.ways]

    first = spoilt()
    assert first == spoilt()
    assert len(set(first)) > len(first) // 2
