"""Replay and verification from every kind of start, over the real stages with their real snapshots, without a broker."""

from __future__ import annotations

import asyncio
import copy
import itertools
from pathlib import Path

import pytest
from memory_pipeline import Pipeline, append, dataset, live, options, run_until_settled, runtime, view, write_journal
from orderflow.cli.summary import signal_counts
from orderflow.config import override
from orderflow.errors import LogError, OrderflowError
from orderflow.pipeline import STAGES
from orderflow.replay import chain, service
from orderflow.replay.diff import compare
from orderflow.replay.engine import Replay, Target
from orderflow.replay.plan import Bound, Plan, Planner
from orderflow.replay.start import changed_stages
from orderflow.streaming.log import TP
from orderflow.streaming.seek import journal_entry, read_journal, seq_at
from orderflow.streaming.snapshots import HOUR_NS, hour_of, load_newest
from orderflow.topics import CVD, DERIVED, HOURLY, JOURNAL, OFI, PARTITIONS, ROWS, SIGNALS, TICKS
from orderflow.verify import verify
from run_helpers import ALTS

pytestmark = pytest.mark.capture

EVERYTHING = range(PARTITIONS)


@pytest.fixture(scope="module")
def shared(captures: Path) -> Pipeline:
    return asyncio.run(live(dataset(captures / ALTS)))


@pytest.fixture
def pipeline(shared: Pipeline) -> Pipeline:
    """A copy that a test may cut and alter."""
    log = copy.copy(shared.log)
    log._records = {tp: list(records) for tp, records in shared.log._records.items()}
    log._begin = dict(shared.log._begin)
    log._groups = {}
    log._appended = asyncio.Event()
    return Pipeline(log, shared.codecs, shared.config, shared.data)


def busiest(pipeline: Pipeline) -> int:
    return max(pipeline.data.journal_seqs, key=lambda partition: pipeline.data.journal_seqs[partition])


def alter_last(pipeline: Pipeline, topic: str, field: str, back: int = 0) -> int:
    """Add 1 to a field of the newest record of the busiest partition, or the `back`th before it; returns its seq."""
    records = pipeline.log._records[TP(topic, busiest(pipeline))]
    index = [number for number, record in enumerate(records) if record.value is not None][-1 - back]
    old = records[index]
    assert old.value is not None
    row = pipeline.codecs.decoder(topic)(old.value)
    value = pipeline.codecs.encoder(topic)({**row, field: row[field] + 1})
    records[index] = type(old)(old.offset, old.timestamp, old.key, value, old.headers)
    seq: int = row["seq"]
    return seq


async def replayed(
    pipeline: Pipeline,
    begin: Bound | None,
    end: Bound | None = None,
    *,
    sets: tuple[str, ...] = (),
    warm: float | None = None,
) -> tuple[str, Plan, Replay]:
    prefix = f"replay.{len(pipeline.log._records)}."
    config = override(pipeline.config, sets)
    planner = Planner(pipeline.log, pipeline.codecs, "", pipeline.config, config)
    plan = await planner.plan(EVERYTHING, begin, end, files=False, warm_up_sec=warm)
    replay = Replay(pipeline.log, pipeline.codecs, pipeline.codecs, config, "", Target(prefix, None))
    await replay.run(plan.starts, plan.spans, plan.ends)
    return prefix, plan, replay


async def test_from_the_beginning_everything_is_the_same(pipeline: Pipeline) -> None:
    prefix, plan, replay = await replayed(pipeline, None)
    assert not plan.inexact
    assert await view(pipeline.log, prefix) == await view(pipeline.log)
    assert replay.progress.journal_records == sum(pipeline.data.journal_seqs.values())
    assert (await compare(pipeline.log, pipeline.codecs, "", prefix)).same


async def test_its_folder_has_the_signals_in_every_form_that_is_chosen(pipeline: Pipeline, tmp_path: Path) -> None:
    config = override(pipeline.config, ("sinks.signal_sink=jsonl,sqlite",))
    planner = Planner(pipeline.log, pipeline.codecs, "", pipeline.config, config)
    plan = await planner.plan(EVERYTHING, None, None, files=True)
    replay = Replay(pipeline.log, pipeline.codecs, pipeline.codecs, config, "", Target("filed.", tmp_path))
    progress = await replay.run(plan.starts, plan.spans, plan.ends)
    signals = progress.derived[SIGNALS]
    assert signals > 100
    in_folder = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert progress.files == len(in_folder)
    assert [path.name for path in in_folder if path.name.startswith("signals.sqlite")] == ["signals.sqlite"]
    assert signal_counts(tmp_path, config.sinks.chosen) == {"jsonl": signals, "sqlite": signals}


@pytest.mark.parametrize("share", [number / 16 for number in range(1, 16)])
async def test_from_any_later_place_everything_behind_it_is_the_same(pipeline: Pipeline, share: float) -> None:
    seqs = pipeline.data.journal_seqs
    begin = int(seqs[busiest(pipeline)] * share)
    prefix, plan, replay = await replayed(pipeline, Bound(seq=begin))
    assert not plan.inexact
    assert await view(pipeline.log, prefix, begin) == await view(pipeline.log, "", begin)
    assert await view(pipeline.log, prefix, 0, begin - 1) == {place: [] for place in await view(pipeline.log)}
    if share > 0.8:  # it did not begin at the beginning
        assert replay.progress.journal_records < 0.8 * sum(seqs.values())


async def test_a_stretch_of_time_is_that_stretch_of_every_partition(pipeline: Pipeline) -> None:
    journal = TP(JOURNAL, busiest(pipeline))
    first = pipeline.log._records[journal][3].value
    assert first is not None
    first_ns = pipeline.codecs.decoder(JOURNAL)(first)["recv_ts_ns"]
    from_ns, to_ns = first_ns + 9_000_000_000, first_ns + 14_000_000_000
    prefix, plan, _ = await replayed(pipeline, Bound(ns=from_ns), Bound(ns=to_ns))
    rows = 0
    for (topic, partition), records in (await view(pipeline.log, prefix)).items():
        span = plan.spans[partition]
        expected = (await view(pipeline.log, "", span.from_seq, span.to_seq))[topic, partition]
        assert records == (expected if span.from_seq <= span.to_seq else [])
        for seq, _, _, body in records:
            if topic == ROWS:
                rows += 1
                row = pipeline.codecs.decoder(ROWS)(pipeline.codecs.encoder(ROWS)._prefix + body)
                assert from_ns // 1_000_000 <= row["recv_ts_ms"] < to_ns // 1_000_000 + 1, (partition, seq)
    assert rows > 50


async def test_old_snapshots_gone_the_hourly_ones_serve(pipeline: Pipeline) -> None:
    for stage in STAGES:
        for partition in EVERYTHING:
            tp = TP(f"state.{stage.name}", partition)
            pipeline.log.trim(tp, (await pipeline.log.end_offsets([tp]))[tp])
    hourly = TP(HOURLY, busiest(pipeline))
    for stage in STAGES:
        found = (await load_newest(pipeline.log, [hourly], lambda _: True, stage.name))[hourly]
        assert found is not None
        assert found.commit.fingerprint == stage.fingerprint(pipeline.config)
    begin = pipeline.data.journal_seqs[busiest(pipeline)] * 3 // 4
    prefix, plan, _ = await replayed(pipeline, Bound(seq=begin))
    assert not plan.inexact
    assert await view(pipeline.log, prefix, begin) == await view(pipeline.log, "", begin)


def test_hourly_snapshots_of_one_hour_stand_in_the_order_of_computation() -> None:
    interval = 10.0
    clock = 500_000 * HOUR_NS
    ordered = [stage.name for stage in STAGES]
    for earlier, later in itertools.pairwise(ordered):
        # A service takes its snapshot at most one interval after it is due; the next one is due later than that.
        due = {
            name: next(s for s in range(3600) if hour_of(name, clock + s * 10**9, interval) == 500_000)
            for name in (earlier, later)
        }
        assert due[later] >= due[earlier]
        if {earlier, later} != {"ofi", "cvd"}:
            assert due[later] - due[earlier] > interval


async def test_verify_from_snapshots_and_from_the_beginning(pipeline: Pipeline) -> None:
    whole = await verify(pipeline.log, pipeline.codecs, pipeline.config, "")
    assert whole.identical
    assert sum(whole.compared.values()) == sum(len(records) for records in (await view(pipeline.log)).values())
    begin = pipeline.data.journal_seqs[busiest(pipeline)] * 7 // 8
    late = await verify(pipeline.log, pipeline.codecs, pipeline.config, "", Bound(seq=begin), from_snapshots=True)
    assert late.identical
    assert late.journal_records < whole.journal_records * 0.8
    expected = await view(pipeline.log, "", begin)
    assert sum(late.compared.values()) == sum(len(records) for records in expected.values())


async def test_a_journal_cut_by_retention_is_verified_from_its_oldest_snapshots(pipeline: Pipeline) -> None:
    partition = busiest(pipeline)
    tp = TP(JOURNAL, partition)
    pipeline.log.trim(tp, (await pipeline.log.end_offsets([tp]))[tp] // 3)
    report = await verify(pipeline.log, pipeline.codecs, pipeline.config, "", partitions=[partition])
    assert report.identical
    assert report.notes == []
    assert report.compared[SIGNALS] > 50
    # Altered behind the cut, it is found; the place where the live topic was altered is named.
    seq = alter_last(pipeline, CVD, "cvd")
    for from_snapshots in (False, True):
        found = await verify(
            pipeline.log,
            pipeline.codecs,
            pipeline.config,
            "",
            Bound(seq=seq - 3) if from_snapshots else None,
            partitions=[partition],
            from_snapshots=from_snapshots,
        )
        (divergence,) = found.divergences
        assert (divergence.topic, divergence.seq, divergence.field) == (CVD, seq, "cvd")
        assert divergence.live == divergence.recomputed + 1.0


async def test_a_cut_journal_without_snapshots_is_not_called_identical(pipeline: Pipeline) -> None:
    partition = busiest(pipeline)
    tp = TP(JOURNAL, partition)
    pipeline.log.trim(tp, (await pipeline.log.end_offsets([tp]))[tp] // 3)
    for topic in (HOURLY, *(f"state.{stage.name}" for stage in STAGES)):
        state = TP(topic, partition)
        pipeline.log.trim(state, (await pipeline.log.end_offsets([state]))[state])
    report = await verify(pipeline.log, pipeline.codecs, pipeline.config, "", partitions=[partition])
    assert sum(report.compared.values()) == 0
    assert report.reached == {}
    assert "nothing was judged" in report.notes[0]
    _, plan, _ = await replayed(pipeline, None)
    assert list(plan.inexact) == [partition]


async def test_a_reader_in_the_middle_does_not_take_a_zombies_records(pipeline: Pipeline) -> None:
    """Wherever it begins, also between what a superseded recorder wrote and the true records."""
    partition = busiest(pipeline)
    tp = TP(JOURNAL, partition)
    end = (await pipeline.log.end_offsets([tp]))[tp]
    true = [value for _, value in pipeline.data.topics[JOURNAL][partition]]
    for seq in range(1, len(true) + 1, 7):
        offset, epoch = await journal_entry(pipeline.log, tp, seq)
        read = [
            (number, record.value)
            async for chunk in read_journal(pipeline.log, tp, offset, epoch, None, end)
            for number, record in chunk
            if number >= seq
        ]
        assert read == list(enumerate(true, 1))[seq - 1 :]


async def test_an_epoch_that_rises_unannounced_ends_the_reading(pipeline: Pipeline) -> None:
    """Begun behind an `open` at a superseded recorder's record, without a look around: refused, never silent."""
    partition = busiest(pipeline)
    tp = TP(JOURNAL, partition)
    records = pipeline.log._records[tp]
    opened = next(number for number, record in enumerate(records) if dict(record.headers)["epoch"] == b"2")
    with pytest.raises(LogError, match="opened before this reading began"):
        async for _ in read_journal(pipeline.log, tp, opened + 1, 0, None, len(records)):
            pass


async def test_a_snapshot_taken_anywhere_goes_on_with_the_true_journal(pipeline: Pipeline) -> None:
    """Also right behind an `open`, before anything of its epoch has come, where the superseded recorder still writes."""
    partition = busiest(pipeline)
    tp = TP(JOURNAL, partition)
    records = pipeline.log._records[tp]
    true = [value for _, value in pipeline.data.topics[JOURNAL][partition]]
    service = runtime(pipeline, "normaliser", options())
    for read in range(1, len(records)):
        if read % 31 and not any(dict(r.headers)["epoch"] != b"1" for r in records[read - 1 : read]):
            continue
        task = service.make_task(partition)
        await task.push(JOURNAL, records[:read])
        task.merger.run(read - read % 3)
        commit = task.commit_record(task.positions(), [], "f")
        (position,) = commit.inputs
        last_seq = position.seq if position.seq >= 0 else None
        rest = [
            record.value
            async for chunk in read_journal(
                pipeline.log, tp, position.next_offset, commit.epoch, last_seq, len(records)
            )
            for _, record in chunk
        ]
        assert rest == true[max(position.seq, 0) :], read


async def test_time_is_found_by_bisection(pipeline: Pipeline) -> None:
    partition = busiest(pipeline)
    decode = pipeline.codecs.decoder(JOURNAL)
    times = [decode(value)["recv_ts_ns"] for _, value in pipeline.data.topics[JOURNAL][partition]]
    for place in range(10, len(times), 53):
        seq = await seq_at(pipeline.log, pipeline.codecs, TP(JOURNAL, partition), times[place])
        assert times[seq - 1] == times[place]
        assert seq == 1 or times[seq - 2] < times[place]


async def test_what_if_differs_where_it_must_and_nowhere_else(pipeline: Pipeline) -> None:
    sets = ("cvd.z_mode=level",)
    assert changed_stages(pipeline.config, override(pipeline.config, sets)) == {"cvd", "fusion", "signal"}
    begin = pipeline.data.journal_seqs[busiest(pipeline)] // 2
    prefix, plan, _ = await replayed(pipeline, Bound(seq=begin), sets=sets, warm=1e6)
    assert not plan.inexact  # the warm-up reaches back to where the session begins
    found, live_view = await view(pipeline.log, prefix, begin), await view(pipeline.log, "", begin)
    for topic in (TICKS, ROWS, OFI):
        assert {p: found[topic, p] for p in EVERYTHING} == {p: live_view[topic, p] for p in EVERYTHING}
    result = await compare(pipeline.log, pipeline.codecs, "", prefix)
    assert not result.same
    assert result.topics[OFI].equal == result.topics[OFI].left > 0
    cvd = result.topics[CVD]
    assert cvd.left == cvd.right == cvd.equal + cvd.differing
    assert cvd.only_left == cvd.only_right == 0
    assert "z_cvd" in cvd.fields
    assert "cvd" not in cvd.fields  # the level itself is no matter of the mode
    assert cvd.first.startswith(f"{CVD}[")


async def test_without_a_way_back_a_what_if_says_that_it_warms_up(pipeline: Pipeline) -> None:
    begin = pipeline.data.journal_seqs[busiest(pipeline)] * 7 // 8
    _, plan, _ = await replayed(pipeline, Bound(seq=begin), sets=("cvd.z_mode=level",), warm=1.0)
    start = plan.inexact[busiest(pipeline)]
    assert start.without_past == ("cvd", "fusion", "signal")
    assert 1 < start.from_seq <= begin


async def test_automatic_commands_are_left_out_of_a_what_if(pipeline: Pipeline) -> None:
    """Appended as a session of its own, so that both computations begin alike."""
    partition = busiest(pipeline)
    seq = pipeline.data.journal_seqs[partition]
    encode = pipeline.codecs.encoder(JOURNAL)
    last = pipeline.codecs.decoder(JOURNAL)(pipeline.data.topics[JOURNAL][partition][-1][1])
    for number, origin in enumerate((b"evaluator", b"cli"), 1):
        payload = b'{"command_id":"c%d","origin":"%s","apply_at_ns":0,"payload":"{}"}' % (number, origin)
        value = encode({**last, "seq": seq + number, "kind": "command", "payload": payload})
        await append(pipeline.log, TP(JOURNAL, partition), b"", value, [("epoch", b"3")])
    for keep, expected in ((True, 2), (False, 1)):
        config = override(pipeline.config, ("cvd.z_mode=level",))
        planner = Planner(pipeline.log, pipeline.codecs, "", pipeline.config, config)
        plan = await planner.plan([partition], None, None, files=False)
        prefix = f"commands.{keep}."
        replay = Replay(
            pipeline.log, pipeline.codecs, pipeline.codecs, config, "", Target(prefix, None), keep_evaluator=keep
        )
        progress = await replay.run(plan.starts, plan.spans, plan.ends)
        ticks = [
            pipeline.codecs.decoder(TICKS)(record.value)
            for record in pipeline.log._records[TP(prefix + TICKS, partition)]
            if record.value is not None
        ]
        assert sum(tick["kind"] == "command" for tick in ticks) == expected
        assert progress.commands_left_out == 2 - expected


async def test_runs_of_different_journals_are_not_compared(pipeline: Pipeline) -> None:
    for tp, records in list(pipeline.log._records.items()):
        if tp.topic in DERIVED:
            moved = pipeline.log._records[TP("other." + tp.topic, tp.partition)] = list(records)
            for number, record in enumerate(moved):
                if tp.topic == TICKS and record.value is not None:
                    tick = pipeline.codecs.decoder(TICKS)(record.value)
                    value = pipeline.codecs.encoder(TICKS)({**tick, "recv_ts_ns": tick["recv_ts_ns"] + 1})
                    moved[number] = type(record)(record.offset, 1, record.key, value, record.headers)
    with pytest.raises(OrderflowError, match="not computed from the same journal"):
        await compare(pipeline.log, pipeline.codecs, "", "other.", (TICKS,))


async def test_the_service_judges_the_newest_stretch_and_counts_divergences(
    pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(service, "SETTLE_SEC", 0.0)
    monkeypatch.setattr(service, "LOOK_SEC", 0.001)
    config = override(pipeline.config, ("runtime.verify_span_sec=12",))
    for altered in (False, True):
        if altered:
            alter_last(pipeline, SIGNALS, "ttl_ms", back=20)
        verifying = service.VerifyService(pipeline.log, pipeline.codecs, config)
        running = asyncio.create_task(verifying.run())
        async with asyncio.timeout(300):
            while verifying.rounds < 1:
                assert not running.done(), running.result()
                await asyncio.sleep(0.001)
        assert verifying.ready
        verifying.stop()
        await running
        assert verifying.compared > 100
        assert verifying.not_judged == 0
        expected = {"altered": 1} if altered else {}
        assert sum(verifying.divergences.values()) == len(expected)
        assert verifying.divergences[SIGNALS] == len(expected)
        families = {family.name: family for family in service.VerifyCollector(verifying, "f" * 64).collect()}
        counted = {sample.labels["topic"]: sample.value for sample in families["replay_divergence"].samples}
        assert counted == {topic: float(altered and topic == SIGNALS) for topic in DERIVED}
        (ready,) = families["orderflow_ready"].samples
        assert (ready.labels, ready.value) == ({"service": "verify"}, 0.0), "stopped"
        assert families["verify_span_sec"].samples[0].value == 12


async def test_the_chain_goes_on_where_retention_has_cut_and_tells_of_what_was_altered(
    pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(chain, "BLOCK_SEQS", 100)
    topics = (JOURNAL, *DERIVED)
    partition = busiest(pipeline)
    first = await chain.follow(pipeline.log, "", topics, {})
    assert not first.differences
    assert first.added > 10
    chain.save(tmp_path / "chain.json", first)
    assert chain.load(tmp_path / "chain.json") == first.marks
    for topic in topics:
        tp = TP(topic, partition)
        pipeline.log.trim(tp, (await pipeline.log.end_offsets([tp]))[tp] // 3)
    cut = await chain.follow(pipeline.log, "", topics, chain.load(tmp_path / "chain.json"))
    assert not cut.differences
    assert cut.added == 0
    assert cut.heads == first.heads
    seq = alter_last(pipeline, CVD, "cvd")
    altered = await chain.follow(pipeline.log, "", topics, first.marks)
    (difference,) = altered.differences
    assert (difference.topic, difference.partition) == (CVD, partition)
    assert difference.first_seq <= seq <= difference.last_seq
    chain.save(tmp_path / "chain.json", altered)  # what was there stays known
    assert chain.load(tmp_path / "chain.json") == first.marks
    content = (tmp_path / "chain.json").read_text("utf-8")
    mark = first.marks[CVD, partition].blocks[0]
    (tmp_path / "chain.json").write_text(content.replace(mark.digest, "0" * 64), "utf-8")
    with pytest.raises(OrderflowError, match="the file was altered"):
        chain.load(tmp_path / "chain.json")


# -- offsets given by hand --------------------------------------------------------------------------------------------


async def test_offsets_reset_by_hand_are_honoured_under_a_new_prefix(pipeline: Pipeline) -> None:
    """To the beginning: the same as live. The service is stopped at once and started again: it goes on, the same."""
    tps = [TP(topic, partition) for topic in (TICKS, ROWS) for partition in EVERYTHING]
    pipeline.log.reset_offsets("new.orderflow.ofi", dict.fromkeys(tps, 0))
    first = runtime(pipeline, "ofi", options(prefix="new.", input_prefix=""))
    task = asyncio.create_task(first.run())
    async with asyncio.timeout(150):
        while first.stats.records_in < 100:
            await asyncio.sleep(0)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    await run_until_settled([runtime(pipeline, "ofi", options(prefix="new.", input_prefix=""))])
    live_view, new = await view(pipeline.log), await view(pipeline.log, "new.")
    assert {p: new[OFI, p] for p in EVERYTHING} == {p: live_view[OFI, p] for p in EVERYTHING}


async def test_offsets_in_the_middle_begin_a_computation_without_a_past(pipeline: Pipeline) -> None:
    partition = busiest(pipeline)
    tps = [TP(topic, number) for topic in (TICKS, ROWS) for number in EVERYTHING]
    ends = await pipeline.log.end_offsets(tps)
    pipeline.log.reset_offsets("new.orderflow.ofi", {tp: ends[tp] // 2 for tp in tps})
    middle = pipeline.log._records[TP(ROWS, partition)][ends[TP(ROWS, partition)] // 2 :]
    first = min(pipeline.codecs.decoder(ROWS)(r.value)["seq"] for r in middle if r.value is not None)
    await run_until_settled([runtime(pipeline, "ofi", options(prefix="new.", input_prefix=""))])
    found = (await view(pipeline.log, "new."))[OFI, partition]
    assert found
    assert min(seq for seq, *_ in found) >= first


async def test_offsets_reset_under_the_old_prefix_are_refused_with_the_remedy(pipeline: Pipeline) -> None:
    tps = [TP(topic, partition) for topic in (TICKS, ROWS) for partition in EVERYTHING]
    pipeline.log.reset_offsets("orderflow.ofi", dict.fromkeys(tps, 0))
    with pytest.raises(LogError, match=r"reset by hand.*set a new TOPIC_PREFIX and INPUT_PREFIX=''"):
        await runtime(pipeline, "ofi", options()).run()


async def test_offsets_of_some_inputs_only_are_refused(pipeline: Pipeline) -> None:
    pipeline.log.reset_offsets("new.orderflow.ofi", {TP(topic, 3): 0 for topic in (ROWS, TICKS)})
    group = next(iter(pipeline.log._groups.values()))
    del group.offsets[TP(TICKS, 3)]
    with pytest.raises(LogError, match=r"but not market\.ticks\[3\]: reset all inputs together"):
        await runtime(pipeline, "ofi", options(prefix="new.", input_prefix="")).run()


async def test_a_journal_reset_in_the_middle_begins_under_the_right_epoch(pipeline: Pipeline) -> None:
    """Right behind an `open`, among what the superseded recorder still wrote."""
    partition = busiest(pipeline)
    await write_journal(pipeline.log, pipeline.data, "again.")
    records = pipeline.log._records[TP("again." + JOURNAL, partition)]
    opened = next(number for number, record in enumerate(records) if dict(record.headers)["epoch"] == b"2")
    offsets = {TP("again." + JOURNAL, number): 0 for number in EVERYTHING}
    pipeline.log.reset_offsets("new.orderflow.normaliser", offsets | {TP("again." + JOURNAL, partition): opened + 1})
    await run_until_settled([runtime(pipeline, "normaliser", options(prefix="new.", input_prefix="again."))])
    rejects = await view(pipeline.log, "new.")
    assert all(b"void" not in body for records in rejects.values() for *_, body in records)
