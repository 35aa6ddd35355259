"""`orderflow verify` on whole runs: identical where nothing was touched, and the exact place where something was."""

from __future__ import annotations

import json
import re
import shutil
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import Any

import fastavro
import pytest
from run_helpers import ALTS, MAJORS, ROOT, Run, call, copy_topics, delete_topics, refused, shared_run, topics_of

pytestmark = [pytest.mark.kafka, pytest.mark.capture, pytest.mark.slow]

SCHEMAS = {"features.ofi": "ofi", "features.cvd": "cvd", "signals": "signal", "market.ticks": "tick"}


@pytest.fixture(scope="module")
def alts(kafka_bootstrap: str, captures: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    return shared_run(kafka_bootstrap, captures, ALTS, tmp_path_factory)


def schema_of(topic: str) -> Any:
    return fastavro.parse_schema(json.loads((ROOT / "schemas" / f"{SCHEMAS[topic]}.avsc").read_text("utf-8")))


def altered(topic: str, seq: int, field: str, change: Callable[[Any], Any], partition: int) -> Any:
    """A `change` for `copy_topics` that alters one field of one record, through the codec."""
    schema = schema_of(topic)

    def alter(of_topic: str, of_partition: int, value: bytes) -> bytes:
        if (of_topic, of_partition) != (topic, partition):
            return value
        record: Any = fastavro.schemaless_reader(BytesIO(value[5:]), schema, None)
        if record["seq"] != seq or record["sub"] != 0:
            return value
        record[field] = change(record[field])
        buffer = BytesIO()
        fastavro.schemaless_writer(buffer, schema, record)
        assert buffer.getvalue() != value[5:]
        return value[:5] + buffer.getvalue()

    return alter


def record_in(run: Run, topic: str, number: int) -> tuple[int, dict[str, Any]]:
    """(partition, value) of the `number`th record of the first partition that has so many."""
    for (of_topic, partition), records in sorted(topics_of(run).items()):
        if of_topic == topic and len(records) > number:
            record: Any = fastavro.schemaless_reader(BytesIO(records[number][1]), schema_of(topic), None)
            return partition, record
    raise AssertionError(f"{topic} has no partition with {number} records")


@contextmanager
def copied(run: Run, change: Any) -> Iterator[str]:
    prefix = f"altered.{uuid.uuid4().hex[:8]}."
    try:
        copy_topics(run, prefix, change)
        yield prefix
    finally:
        delete_topics(run.bootstrap, prefix)


def divergences(done: Any) -> list[str]:
    return re.findall(r"^DIVERGENCE (.*)$", done.stdout, re.MULTILINE)


def test_an_untouched_run_is_identical(alts: Run) -> None:
    done = call(alts.bootstrap, "verify", "--run", str(alts.out), "--json")
    report = json.loads(done.stdout)
    assert done.code == 0, done.stdout
    assert report["identical"] is True
    topics = alts.summary["topics"]
    assert report["journal_records"] == topics["market.journal"]
    assert report["compared"] == {name: count for name, count in topics.items() if name != "market.journal"}


def test_an_untouched_run_of_the_majors_is_identical(
    kafka_bootstrap: str, captures: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    majors = shared_run(kafka_bootstrap, captures, MAJORS, tmp_path_factory)
    done = call(majors.bootstrap, "verify", "--run", str(majors.out))
    assert done.code == 0, done.stdout
    assert done.stdout.strip().endswith("identical")


def test_one_altered_value_is_named_with_its_place_and_both_values(alts: Run) -> None:
    partition, record = record_in(alts, "features.cvd", 20)
    seq, right = record["seq"], record["cvd"]
    with copied(alts, altered("features.cvd", seq, "cvd", lambda value: value + 0.5, partition)) as prefix:
        done = call(alts.bootstrap, "verify", "--run", str(alts.out), "--against", prefix)
        assert done.code == 1
        assert divergences(done) == [
            f"features.cvd[{partition}] seq {seq} sub 0 field cvd: live {right + 0.5!r}, recomputed {right!r}"
        ]
        assert "1 divergences" in done.stdout
        # Judged before it, or behind it, the rest is identical; judged from its very seq on, it is found.
        behind = call(alts.bootstrap, "verify", "--run", str(alts.out), "--against", prefix, "--from", str(seq + 1))
        assert (behind.code, divergences(behind)) == (0, [])
        at = call(
            alts.bootstrap,
            *("verify", "--run", str(alts.out), "--against", prefix, "--from", str(seq), "--to", str(seq)),
        )
        assert (at.code, len(divergences(at))) == (1, 1)


def test_a_difference_outside_the_span_does_not_hide_one_inside(alts: Run) -> None:
    partition, early = record_in(alts, "features.cvd", 5)
    _, late = record_in(alts, "features.cvd", 20)
    first = altered("features.cvd", early["seq"], "cvd", lambda value: value + 1.0, partition)
    second = altered("features.cvd", late["seq"], "floor_used", lambda value: not value, partition)
    with copied(alts, lambda topic, number, value: second(topic, number, first(topic, number, value))) as prefix:
        done = call(
            alts.bootstrap,
            *("verify", "--run", str(alts.out), "--against", prefix, "--from", str(early["seq"] + 1)),
        )
        assert done.code == 1
        (found,) = divergences(done)
        assert found.startswith(f"features.cvd[{partition}] seq {late['seq']} sub 0 field floor_used: ")


def test_missing_and_added_records_are_found(alts: Run) -> None:
    partition, record = record_in(alts, "signals", 30)
    tick_partition, tick = record_in(alts, "market.ticks", 10)

    def change(topic: str, number: int, value: bytes) -> bytes:
        # A record whose seq is changed is one that misses in one place and one too many in another.
        if (topic, number) == ("signals", partition):
            return altered("signals", record["seq"], "seq", lambda seq: seq + 1_000_000, partition)(
                topic, number, value
            )
        return altered("market.ticks", tick["seq"], "kind", lambda kind: "end", tick_partition)(topic, number, value)

    with copied(alts, change) as prefix:
        done = call(alts.bootstrap, "verify", "--run", str(alts.out), "--against", prefix)
        assert done.code == 1
        found = divergences(done)
        assert (
            f"market.ticks[{tick_partition}] seq {tick['seq']} sub 0 field kind: live 'end', recomputed 'tick'" in found
        )
        assert (
            f"signals[{partition}] seq {record['seq']} sub 0 field (record): live 'no such record', recomputed 'a record'"
            in found
        )
        assert len(found) == 2


def test_bad_arguments_are_refused(alts: Run) -> None:
    run = ("verify", "--run", str(alts.out))
    refused(call(alts.bootstrap, *run, "--from", "yesterday"), "--from is 'yesterday'", "must be")
    refused(call(alts.bootstrap, *run, "--to", "soon"), "--to is 'soon'", "must be")
    refused(call(alts.bootstrap, *run, "--from", "9", "--to", "3"), "--from 9 lies behind --to 3")
    refused(call(alts.bootstrap, "verify", "--run", "/nowhere"), "/nowhere holds no run", "--run DIR")


def test_settings_that_have_changed_since_are_named_instead_of_judged(alts: Run, tmp_path: Path) -> None:
    shutil.copytree(alts.out, tmp_path / "run", ignore=shutil.ignore_patterns("data", "logs", "kafka"))
    info = json.loads((tmp_path / "run" / "run.json").read_text("utf-8"))
    info["config_fingerprint"] = "0" * 64
    (tmp_path / "run" / "run.json").write_text(json.dumps(info), "utf-8")
    done = call(alts.bootstrap, "verify", "--run", str(tmp_path / "run"))
    refused(done, "began under the settings 000000000000", "restore infra/config")
