"""The recorder for sockets on virtual time: a scripted exchange, a log in memory, and what stands in the journal after."""

from __future__ import annotations

from itertools import pairwise

import pytest
from ingest_exchange import START_NS, World, frame, gaps, loop_sec, numbers, of_kind
from orderflow.errors import ConfigError
from orderflow.ingest.metrics import RecorderCollector
from orderflow.ingest.seams import Answer
from orderflow.streaming.journal import partition_of

from tests.storm.virtual_loop import run

BTC, ETH = "BTCUSDT", "ETHUSDT"


def whole(found: list[int]) -> bool:
    """Every number once, in order."""
    return len(found) > 10 and found == list(range(found[0], found[-1] + 1))


def test_a_quiet_run_journals_every_frame_once() -> None:
    async def main() -> None:
        world = World(BTC, ETH)
        world.start()
        await world.until_sec(100)
        status = world.recorder.status()
        await world.stop()
        records = await world.journal()
        for symbol in (BTC, ETH):
            for stream in ("aggTrade", "bookTicker", "depth@100ms"):
                assert whole(numbers(records, f"{symbol.lower()}@{stream}"))
        assert gaps(records) == []
        assert len(numbers(records, "btcusdt@markPrice@1s")) == pytest.approx(99, abs=1), "the heartbeat of /market"
        assert len(of_kind(records, "end")) == 12
        assert (status["reconnects"], status["routes"]) == (0, {"public": "up", "market": "up"})
        ticks = [record for record in of_kind(records, "tick") if record["partition"] == partition_of(BTC)]
        assert len(ticks) == pytest.approx(500, abs=2)
        assert len(of_kind(records, "server_time")) == 2

    run(main())


def test_a_cut_is_a_gap_and_the_route_comes_back() -> None:
    async def main() -> None:
        world = World(BTC)
        world.start()
        await world.until_sec(20)
        world.exchange.live("public")[0].cut(1006)
        await world.until_sec(60)
        status = world.recorder.status()
        await world.stop()
        records = await world.journal()
        (gap,) = gaps(records)
        assert (gap["reason"], gap["cause"], gap["route"]) == ("disconnected", "closed_1006", "public")
        assert gap["streams"] == ["bookTicker", "depth@100ms"]
        assert status["connections"]["public"]["reconnects"] == {"closed_1006": 1}
        families = RecorderCollector(world.recorder).collect()
        figures = {(each.name, *each.labels.values()): each.value for family in families for each in family.samples}
        assert figures["recorder_connections", "public", "reconnects/closed_1006"] == 1, "as runbooks ask for it"
        assert figures["ws_reconnects_total",] == 1
        assert (figures["recorder_epoch",], figures["recorder_symbols",]) == (1, 1)
        assert whole(numbers(records, "btcusdt@aggTrade")), "the other route is not touched"
        depth = numbers(records, "btcusdt@depth@100ms")
        assert depth == sorted(set(depth))
        at = next(place for place, record in enumerate(records) if record["kind"] == "gap")
        before = numbers(records[:at], "btcusdt@depth@100ms")
        assert before[-1] * 0.1 == pytest.approx(20, abs=0.2), "what had come before the cut stands before the gap"
        assert len(before) < len(depth)

    run(main())


def test_refused_connections_are_tried_again_with_growing_pauses() -> None:
    async def main() -> None:
        world = World(BTC)
        world.exchange.refuse = 8
        world.start()
        await world.until_sec(150)
        status = world.recorder.status()
        await world.stop()
        refused = sum(each["reconnects"].get("refused", 0) for each in status["connections"].values())
        assert refused == 8
        assert status["routes"] == {"public": "up", "market": "up"}
        assert gaps(await world.journal()) == [], "what has never been up was not lost"

    run(main())


@pytest.mark.parametrize("lags", [(0.0, 0.0), (0.0, 0.45), (0.45, 0.0)])
def test_rotation_loses_nothing_and_repeats_nothing(lags: tuple[float, float]) -> None:
    async def main() -> None:
        world = World(BTC, ETH, rotate_sec=100.0)
        world.exchange.lags = [lags[0], lags[0], lags[1], lags[1], lags[0], lags[0]]
        world.start()
        await world.until_sec(160)
        status = world.recorder.status()
        live = [len(world.exchange.live(route)) for route in ("public", "market")]
        await world.stop()
        records = await world.journal()
        for symbol in (BTC, ETH):
            for stream in ("aggTrade", "bookTicker", "depth@100ms"):
                assert whole(numbers(records, f"{symbol.lower()}@{stream}")), stream
        assert gaps(records) == []
        assert live == [1, 1]
        for route in ("public", "market"):
            assert status["connections"][route]["renewals"] == {"age": 1}
        assert status["reconnects"] == 0

    run(main())


def test_a_second_socket_that_stays_silent_does_not_replace_the_first() -> None:
    async def main() -> None:
        world = World(BTC, rotate_sec=100.0)
        world.start()
        await world.until_sec(80)
        connect = world.exchange.connect

        async def silent_one(url: str) -> object:
            socket = await connect(url)
            socket.silent = lambda stream: True
            return socket

        world.exchange.connect = silent_one  # type: ignore[method-assign, assignment]
        await world.until_sec(180)
        world.exchange.connect = connect  # type: ignore[method-assign]
        await world.until_sec(260)
        status = world.recorder.status()
        await world.stop()
        records = await world.journal()
        assert whole(numbers(records, "btcusdt@depth@100ms"))
        assert gaps(records) == []
        renewals = status["connections"]["public"]["renewals"]
        assert renewals["failed:proved_nothing"] >= 2
        assert renewals["age"] == 1

    run(main())


@pytest.mark.parametrize("lag_sec", [0.0, 0.45])
def test_the_first_socket_may_die_while_the_second_is_proving_itself(lag_sec: float) -> None:
    async def main() -> None:
        world = World(BTC, rotate_sec=100.0)
        world.exchange.lags = [lag_sec] * 2
        world.start()
        await world.until_sec(80)
        while len(world.exchange.live("public")) < 2:
            await world.until_sec(loop_sec() + 0.1)
        await world.until_sec(loop_sec() + 1.0)
        first, second = world.exchange.live("public")
        first.cut()
        await world.until_sec(130)
        assert world.exchange.live("public") == [second]
        status = world.recorder.status()
        await world.stop()
        records = await world.journal()
        for stream in ("depth@100ms", "bookTicker"):
            assert whole(numbers(records, f"btcusdt@{stream}")), "what the second had delivered meanwhile was held"
        assert gaps(records) == []
        assert status["routes"]["public"] == "up"

    run(main())


def test_the_first_socket_may_die_before_the_second_delivers() -> None:
    async def main() -> None:
        world = World(BTC, rotate_sec=100.0)
        world.start()
        await world.until_sec(80)
        while len(world.exchange.live("public")) < 2:
            await world.until_sec(loop_sec() + 0.1)
        first, second = world.exchange.live("public")
        second.silent = lambda stream: "bookTicker" in stream
        first.cut()
        await world.until_sec(85)
        second.silent = lambda stream: False
        await world.until_sec(130)
        await world.stop()
        records = await world.journal()
        assert {stream for gap in gaps(records, "disconnected") for stream in gap["streams"]} >= {"bookTicker"}
        quotes = numbers(records, "btcusdt@bookTicker")
        assert quotes == sorted(set(quotes))

    run(main())


def test_a_socket_without_data_is_ended() -> None:
    async def main() -> None:
        world = World(BTC)
        world.exchange.silent = lambda stream: loop_sec() < 35
        world.start()
        await world.until_sec(120)
        status = world.recorder.status()
        await world.stop()
        for route in ("public", "market"):
            assert status["connections"][route]["reconnects"]["no_first_data"] >= 1
        assert status["routes"] == {"public": "up", "market": "up"}
        assert gaps(await world.journal()) == []

    run(main())


def test_one_dead_kind_is_renewed_without_a_gap_while_the_other_lives() -> None:
    async def main() -> None:
        world = World(BTC, ETH)
        world.start()
        await world.until_sec(400)
        dead_at = loop_sec()
        world.exchange.live("public")[0].silent = lambda stream: "depth" in stream
        await world.until_sec(500)
        status = world.recorder.status()
        await world.stop()
        records = await world.journal()
        assert status["connections"]["public"]["renewals"] == {"depth_silent": 1}
        assert whole(numbers(records, "btcusdt@bookTicker"))
        found = gaps(records)
        assert [(gap["reason"], gap["cause"], gap["streams"]) for gap in found] == [
            ("disconnected", "silent", ["depth"])
        ] * 2
        depth = numbers(records, "btcusdt@depth@100ms")
        (hole,) = [(low, high) for low, high in pairwise(depth) if high != low + 1]
        assert hole[0] * 0.1 == pytest.approx(dead_at, abs=0.2)
        assert (hole[1] - hole[0]) * 0.1 < 15 + 0.5 + 10

    run(main())


def test_one_silent_symbol_is_subscribed_again() -> None:
    async def main() -> None:
        symbols = tuple(f"A{number}USDT" for number in range(8))
        world = World(*symbols)
        world.start()
        await world.until_sec(400)
        socket = world.exchange.live("public")[0]
        socket.subscribed.pop("a3usdt@depth@100ms")
        await world.until_sec(500)
        status = world.recorder.status()
        await world.stop()
        records = await world.journal()
        (gap,) = gaps(records)
        assert (gap["reason"], gap["symbol"], gap["streams"]) == ("resubscribed", "A3USDT", ["depth"])
        assert status["resubscribed"] == 1
        assert numbers(records, "a3usdt@depth@100ms")[-1] > 4900
        spacing = [second[0] - first[0] for first, second in pairwise(socket.sent)]
        assert min(spacing) >= 0.1, "ten messages a second"

    run(main())


def test_a_quiet_altcoin_is_left_in_peace() -> None:
    async def main() -> None:
        world = World("QUIETUSDT")
        world.exchange.slow = {"quietusdt@aggTrade": 200.0, "quietusdt@bookTicker": 45.0, "quietusdt@depth@100ms": 20.0}
        world.start()
        await world.until_sec(3600)
        status = world.recorder.status()
        await world.stop()
        assert gaps(await world.journal()) == []
        assert status["reconnects"] <= 1, "nothing at all within the first ten seconds"
        assert status["renewals"] <= 6

    run(main())


def test_an_unknown_symbol_is_refused_before_the_journal_is_touched() -> None:
    async def main() -> None:
        world = World(BTC, "NOSUCHUSDT")
        world.exchange.symbols = (BTC,)
        world.start()
        with pytest.raises(ConfigError, match="NOSUCHUSDT"):
            await world.task
        assert await world.journal() == []
        assert world.recorder.status()["epoch"] is None

    run(main())


def test_a_session_goes_on_without_a_symbol_that_was_delisted() -> None:
    async def main() -> None:
        world = World(BTC, ETH)
        world.start()
        await world.until_sec(10)
        await world.stop(drain=False)
        world.exchange.symbols = (BTC,)
        world.start(seed=2)
        await world.until_sec(30)
        assert world.recorder.status()["unlisted"] == [ETH]
        await world.stop()
        records = await world.journal()
        assert {gap["reason"] for gap in gaps(records)} == {"restart", "not_listed"}
        assert numbers(records, "btcusdt@depth@100ms")[-1] > 290
        assert numbers(records, "ethusdt@depth@100ms")[-1] <= 101

    run(main())


def test_a_restart_goes_on_with_the_session_and_says_so() -> None:
    async def main() -> None:
        world = World(BTC)
        world.start()
        await world.until_sec(10)
        session = world.recorder.session
        await world.stop(drain=False)
        world.start(seed=2)
        await world.until_sec(20)
        assert world.recorder.session == session
        await world.stop()
        assert len(gaps(await world.journal(), "restart")) == 12
        world.start(seed=3)
        await world.until_sec(30)
        assert world.recorder.session != session, "it has ended"
        await world.stop()

    run(main())


def test_a_journal_far_ahead_of_the_clock_is_not_gone_on_with() -> None:
    async def main() -> None:
        world = World(BTC)
        world.start()
        await world.until_sec(10)
        session = world.recorder.session
        await world.stop(drain=False)
        world.clock.offset_ns = -60_000_000_000
        world.start(seed=2)
        await world.until_sec(20)
        assert world.recorder.session != session
        await world.stop()

    run(main())


@pytest.mark.parametrize("jump_sec", [-600, -3, 0.5, 3, 3600])
def test_stamps_neither_go_back_nor_stand_when_the_wall_clock_jumps(jump_sec: float) -> None:
    async def main() -> None:
        world = World(BTC)
        world.start()
        await world.until_sec(30)
        world.clock.offset_ns = int(jump_sec * 1e9)
        await world.until_sec(90)
        status = world.recorder.status()
        await world.stop()
        records = await world.journal()
        stamps = [record["recv_ts_ns"] for record in records if record["partition"] == partition_of(BTC)]
        ticks = [
            record["recv_ts_ns"] for record in of_kind(records, "tick") if record["partition"] == partition_of(BTC)
        ]
        assert status["clock_jumps"] == 1
        assert all(0 < after - before < 600e6 for before, after in pairwise(ticks))
        # The exchange says that the wall clock is wrong, and the journal's clock has not moved.
        assert abs(stamps[-1] - START_NS - 90e9) < 1e9

    run(main())


def test_a_jump_of_latencies_asks_for_the_exchanges_time_at_once_and_seldom() -> None:
    async def main() -> None:
        world = World(BTC)
        home = partition_of(BTC)
        world.start()
        await world.until_sec(20)
        before = len(of_kind(await world.journal(), "server_time"))
        await world.ask("latency_jump", "", home, 1)
        await world.until_sec(22)
        assert len(of_kind(await world.journal(), "server_time")) == before + 1
        for number in range(100):
            await world.ask("latency_jump", "", home, 1)
            await world.until_sec(22 + number / 10)
        await world.stop()
        assert 3 <= len(of_kind(await world.journal(), "server_time")) - before <= 7

    run(main())


def test_snapshots_and_trades_that_are_asked_for_are_fetched_once() -> None:
    async def main() -> None:
        world = World(BTC)
        home = partition_of(BTC)
        world.start()
        await world.until_sec(5)
        for _ in range(3):
            seq = world.recorder.status()["seqs"][str(home)]
            await world.ask("snapshot_needed", BTC, home, seq)
            await world.ask("backfill_needed", BTC, home, seq, '{"from_id":7,"to_id":9}')
        await world.until_sec(8)
        records = await world.journal()
        assert (len(of_kind(records, "snapshot")), len(of_kind(records, "backfill"))) == (1, 1)
        (answer,) = of_kind(records, "snapshot")
        await world.ask("snapshot_needed", BTC, home, answer["seq"])  # it was too old, says the normaliser
        await world.ask("snapshot_needed", "OTHERUSDT", home, 10**6)
        await world.until_sec(12)
        await world.stop()
        assert len(of_kind(await world.journal(), "snapshot")) == 2
        assert any("fromId=7&limit=3" in url for _, url in world.exchange.gets)

    run(main())


def test_a_ban_is_kept_to() -> None:
    async def main() -> None:
        world = World(BTC)
        home = partition_of(BTC)
        world.exchange.answers["/depth"] = lambda url: Answer(418, {"retry-after": "40"}, b"{}")
        world.start()
        await world.until_sec(5)
        for second in range(6, 70):
            if second == 20:
                del world.exchange.answers["/depth"]
            await world.ask("snapshot_needed", BTC, home, world.recorder.status()["seqs"][str(home)])
            await world.until_sec(second)
        status = world.recorder.status()
        await world.stop()
        asked = [at_sec for at_sec, url in world.exchange.gets if "/depth" in url]
        assert asked[1] - asked[0] >= 40
        assert len(of_kind(await world.journal(), "snapshot")) >= 1
        assert status["rest"]["by_status"]["418"] == 1

    run(main())


def test_more_symbols_than_a_connection_takes_are_refused_at_once() -> None:
    async def main() -> None:
        with pytest.raises(ConfigError, match="INGEST_SHARD"):
            World(*(f"A{number}USDT" for number in range(600))).start()

    run(main())


def test_a_shard_without_symbols_keeps_its_partitions_alive_and_asks_nobody() -> None:
    async def main() -> None:
        world = World(BTC)
        partition = next(number for number in range(12) if number != partition_of(BTC))
        world.start(partitions=range(partition, partition + 1))
        await world.until_sec(1300)
        assert world.recorder.ready
        await world.stop()
        records = await world.journal()
        assert [record["kind"] for record in records] == ["config", "tick", "tick", "tick", "end"]
        assert (world.exchange.sockets, world.exchange.gets) == ([], [])

    run(main())


@pytest.mark.parametrize("symbol", ["币安人生USDT", "BTCUSDT_261225", "1000SHIBUSDT"])
def test_odd_names_are_recorded(symbol: str) -> None:
    async def main() -> None:
        world = World(symbol)
        world.start()
        await world.until_sec(20)
        await world.stop()
        records = await world.journal()
        assert whole(numbers(records, f"{symbol.lower()}@depth@100ms"))
        assert {record["partition"] for record in of_kind(records, "frame")} == {partition_of(symbol)}

    run(main())


def test_garbage_is_journalled_and_too_large_a_frame_is_a_gap() -> None:
    async def main() -> None:
        world = World(BTC)
        world.start()
        await world.until_sec(5)
        socket = world.exchange.live("public")[0]
        socket.push(b"\xff\x00 no frame")
        socket.push(frame("btcusdt@depth@100ms", 7)[:-2] + b',"x":"' + b"y" * (1 << 20) + b'"}}')
        socket.push(b'{"error":{"code":3,"msg":"Invalid JSON"},"id":9}')
        await world.until_sec(10)
        status = world.recorder.status()
        await world.stop()
        records = await world.journal()
        assert [record["partition"] for record in of_kind(records, "frame") if record["symbol"] is None] == [0]
        (gap,) = gaps(records, "dropped")
        assert (gap["symbol"], gap["streams"], gap["frames"], gap["ranges"]) == (BTC, ["depth"], 1, [[61, 70]])
        assert status["connections"]["public"]["reply_errors"] == 1

    run(main())


def test_the_same_seed_gives_the_same_journal() -> None:
    async def main() -> list[tuple[int, bytes]]:
        world = World(BTC, ETH, rotate_sec=60.0)
        world.start(seed=5)
        await world.until_sec(20)
        world.exchange.live("market")[0].cut()
        await world.until_sec(120)
        await world.stop()
        return [(record["seq"], record["payload"]) for record in await world.journal()]

    assert run(main()) == run(main())
